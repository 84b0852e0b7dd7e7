"""Votes as arrays: one row per example, one column per voter, the label that it named, -1 where it named none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

# A voter is one-sided where naming one label only, as often as it did, would be this improbable for one that follows
# the shares of all votes.
_ONE_SIDED = 0.05
_MAX_NAMES = 8


def check_votes(votes: Any, num_labels: int | None = None) -> np.ndarray:
    """Read votes `(num_rows, num_voters)`, -1 for none, as int64 whatever holds them, or refuse what are none."""
    array = np.asarray(votes)
    if array.ndim != 2 or array.dtype.kind not in "iu" or array.shape[1] == 0:
        raise ValueError(
            "Expected `votes` as whole numbers of shape (num_rows, num_voters) with a voter, got shape "
            f"{array.shape} of {array.dtype}. Write -1 where a voter named no label."
        )
    array = array.astype(np.int64, copy=False)
    if array.size and (array.min() < -1 or num_labels is not None and array.max() >= num_labels):
        limit = "" if num_labels is None else f" below {num_labels}"
        raise ValueError(
            f"`votes` must be labels from 0{limit}, or -1 for no vote, got values from {array.min()} to "
            f"{array.max()}. Number the labels from 0."
        )
    return array


def count_votes(votes: np.ndarray, num_labels: int) -> np.ndarray:
    """Count the votes for each label of each row, `(num_rows, num_labels)` in float64."""
    rows, voters = np.nonzero(votes >= 0)
    cells = rows * num_labels + votes[rows, voters]
    counts = np.bincount(cells, minlength=len(votes) * num_labels).astype(np.float64)
    return counts.reshape(len(votes), num_labels)


def share_out(values: np.ndarray) -> np.ndarray:
    """Divide each row by its sum; a row without anything stays zero."""
    total = values.sum(axis=1, keepdims=True)
    return values / np.where(total > 0, total, 1)


def best_labels(values: np.ndarray) -> np.ndarray:
    """Give a row to its greatest label, and share it among several that are equally great; a row of zeros has none."""
    top = values.max(axis=1, keepdims=True, initial=0)
    return share_out(((values == top) & (top > 0)).astype(np.float64))


def information(probs: np.ndarray) -> float:
    """Measure how much posteriors tell about the label: H(mean of q) - mean of H(q) in nats, 0 to ln(num_labels)."""
    if not len(probs):
        return 0.0

    def entropy(values: np.ndarray) -> np.ndarray:
        return -(values * np.log(np.where(values > 0, values, 1))).sum(axis=-1)

    return max(float(entropy(probs.mean(axis=0)) - entropy(probs).mean()), 0.0)


def one_sided_voters(votes: np.ndarray) -> np.ndarray:
    """Find the voters that name one label or nothing, as most labelling functions do."""
    num_labels = int(votes.max(initial=-1)) + 1
    counts = count_votes(votes.T, max(num_labels, 1))
    shares = counts.sum(axis=0) / max(counts.sum(), 1)
    only = ((counts > 0).sum(axis=1) == 1) & (shares.max() < 1)
    return only & (shares[counts.argmax(axis=1)] ** counts.sum(axis=1) < _ONE_SIDED)


def silence_speaks(votes: np.ndarray) -> bool:
    """Tell whether no vote is an answer too: most votes are from one-sided voters that could have spoken elsewhere."""
    # What a one-sided voter says is always the same, so that only where it is silent can tell anything. A worker of
    # a crowd was not asked where it is silent, which tells nothing.
    said = votes >= 0
    only = one_sided_voters(votes) & ~said.all(axis=0)
    return bool(2 * said[:, only].sum() > said.sum())


def name_voters(voters: np.ndarray, names: Sequence[str] | None) -> str:
    """Give voters their names in a message, or their numbers where they have none."""
    found = [str(index) if names is None else repr(names[index]) for index in np.flatnonzero(voters).tolist()]
    return ", ".join(found[:_MAX_NAMES]) + (f" and {len(found) - _MAX_NAMES} more" if len(found) > _MAX_NAMES else "")


@dataclass(frozen=True)
class VoterFacts:
    """What is known about one voter without ground truth, and with it."""

    name: str
    polarity: tuple[int, ...]  # the labels that it named
    # Shares of the rows: that it voted on, that another voted on too, that another named another label for.
    coverage: float
    overlaps: float
    conflicts: float
    accuracy: float | None = None  # share of its votes that are right, where ground truth is declared and it voted


def voter_facts(votes: np.ndarray, names: Sequence[str], truth: np.ndarray | None = None) -> list[VoterFacts]:
    """Describe each voter, its accuracy too where there is ground truth (-1 where that is not known).

    Examples:
        >>> voter_facts(np.array([[0, 0], [1, 0], [1, -1], [-1, -1]]), ["a", "b"])[0]
        VoterFacts(name='a', polarity=(0, 1), coverage=0.75, overlaps=0.5, conflicts=0.25, accuracy=None)
    """
    said, num_rows = votes >= 0, max(len(votes), 1)
    several = said.sum(axis=1) > 1
    lowest = np.where(said, votes, np.iinfo(np.int64).max).min(axis=1, initial=np.iinfo(np.int64).max)
    disputed = several & (votes.max(axis=1, initial=-1) != lowest)
    facts = []
    for voter, name in enumerate(names):
        own = said[:, voter]
        # a row may be disputed between others, but then one of them names another label than this voter too
        coverage, overlaps, conflicts = (float((own & some).sum() / num_rows) for some in (own, several, disputed))
        accuracy = None
        if truth is not None and (known := own & (truth >= 0)).any():
            accuracy = float((votes[known, voter] == truth[known]).mean())
        polarity = tuple(np.unique(votes[own, voter]).tolist())
        facts.append(VoterFacts(name, polarity, coverage, overlaps, conflicts, accuracy))
    return facts


@dataclass(frozen=True)
class Answers:
    """Hold who answered what where, for sums over the answers of a row and over the rows of an answer."""

    codes: np.ndarray
    num_codes: int

    @cached_property
    def cells(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`tuple`: rows, voters and answers, all of shape `(num_answers,)`, row by row."""
        rows, voters = np.nonzero(self.codes >= 0)
        return rows, voters, self.codes[rows, voters]

    @cached_property
    def _matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        rows, voters, codes = self.cells
        index, size = torch.from_numpy(np.stack([rows, voters * self.num_codes + codes])), len(rows)
        shape = (self.codes.shape[0], self.codes.shape[1] * self.num_codes)
        ones = torch.ones(size, dtype=torch.float64)
        # said to be valid: a check of its own is what a warning asks for otherwise
        make = torch.sparse_coo_tensor
        forth = make(index, ones, shape, check_invariants=True).coalesce()
        return forth, make(index.flip(0), ones, shape[::-1], check_invariants=True).coalesce()

    def sum_by_row(self, values: torch.Tensor) -> torch.Tensor:
        """From `(num_voters, num_codes, size)` to the sum over the answers of each row, `(num_rows, size)`."""
        return torch.sparse.mm(self._matrices[0], values.reshape(-1, values.shape[-1]))

    def sum_by_answer(self, values: torch.Tensor) -> torch.Tensor:
        """From `(num_rows, size)` to the sum over the rows with each answer, `(num_voters, num_codes, size)`."""
        sums = torch.sparse.mm(self._matrices[1], values)
        return sums.reshape(self.codes.shape[1], self.num_codes, values.shape[1])

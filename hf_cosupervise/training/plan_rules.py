"""The rules by which one chunk of a level is planned: who speaks for each example, and which tests it passes.

What the teachers say of a chunk is fetched once and handed on from rule to rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch

from ..hierarchy import TeacherHierarchy
from ..method.aggregation import mean_probs
from ..method.assignment import (
    NOBODY,
    agreement_scores,
    assign_by_chance,
    assign_by_domain,
    assign_by_scope,
    choose_lowest,
    oracle_assign_by_domain,
    oracle_assign_by_loss,
    oracle_assign_by_scope,
)
from ..method.neighbors import mean_over_neighbors
from ..method.rejection import (
    default_top_k,
    in_top_k,
    parent_confident,
    pseudolabel_loss,
    student_entropy,
    vote_entropy,
)
from ..pool.pseudolabels import ORACLE_DOMAIN, PseudolabelPool
from ..pool.top_k import decode_top_k, scale_top_k
from .config import CoSupervisedConfig

StudentChunks = Iterable[tuple[slice, torch.Tensor]]
# A user's own assignment: from the student's log-probabilities `(rows, num_labels)`, the probabilities of the level's
# teachers `(rows, num_teachers, num_labels)` and who answered `(rows, num_teachers)`, to positions in it `(rows,)`.
AssignFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# A user's own rejection: from the student's log-probabilities and the pseudolabels, `(rows, num_labels)` both, to what
# is kept `(rows,)`.
KeepFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def level_assignment(args: CoSupervisedConfig, level: int, hierarchy: TeacherHierarchy) -> str:
    """Give the assignment of a level; `auto` is what the level's teachers allow."""
    method = args.assignment[0] if len(args.assignment) == 1 else args.assignment[level]
    if method != "auto":
        return method
    teachers = hierarchy.levels[level]
    if level == 0:
        return "ensemble" if len(teachers) > 1 else "scope"  # there is nobody to choose
    has_scopes = any(teacher.scope is not None for teacher in teachers) and hierarchy.has_distinct_scopes(level)
    return "scope" if has_scopes or len(teachers) == 1 else "agreement"


# ── what is known of a chunk ────────────────────────────────────────────────────────────────────────────────────────


class LevelAnswers:
    """What the teachers say of one chunk of rows: the pool is asked once for each teacher, when it is first needed."""

    def __init__(self, pool: PseudolabelPool, level: int, rows: slice) -> None:
        self.pool, self.level, self.rows = pool, level, rows
        self.indices = pool.hierarchy.level_indices(level)
        # A pool that lies on disk is read once per teacher and chunk, however many rules ask.
        fetch = cache(lambda index: pool.stored(pool.hierarchy.names[index], rows))
        self._fetch, num_labels = fetch, pool.hierarchy.num_labels
        self._decode = cache(lambda index: decode_top_k(*fetch(index), num_labels))

    def __len__(self) -> int:
        return self.rows.stop - self.rows.start

    @cached_property
    def answered(self) -> torch.Tensor:
        """`torch.BoolTensor` of shape `(num_rows, num_teachers)`: Which teachers of the level answered."""
        return self._who_answered(self.indices)

    @property
    def probs(self) -> torch.Tensor:
        """`torch.Tensor` of shape `(num_rows, num_teachers, num_labels)`: What the level's teachers say."""
        return self._probs(self.indices, slice(None))

    @property
    def top_k(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`tuple`: Label ids and probabilities `(num_rows, num_teachers, k)`, and that of each other label."""
        stored = [self._fetch(index) for index in self.indices]
        label_ids = np.stack([ids for ids, _ in stored], axis=1).astype(np.int64)  # torch gathers by no other type
        scaled = [scale_top_k(probs, self.pool.hierarchy.num_labels) for _, probs in stored]
        probs, rest = (np.stack(parts, axis=1) for parts in zip(*scaled))
        return torch.from_numpy(label_ids), torch.from_numpy(probs), torch.from_numpy(rest)

    @property
    def votes(self) -> torch.Tensor:
        """`torch.LongTensor` of shape `(num_rows, num_teachers)`: Hard labels of the teachers of all levels."""
        return torch.from_numpy(np.stack([self._first(i) for i in range(len(self.pool.hierarchy.names))], axis=1))

    def hard_labels(self, speakers: np.ndarray) -> np.ndarray:
        """Give the most probable label of each row by whoever speaks for it."""
        if (speakers >= len(self.pool.hierarchy.names)).any():  # an ensemble's best label is known of its mean only
            probs = self.pseudolabels(speakers)
            return np.where(probs.any(axis=1), probs.argmax(axis=1), -1)
        # Only speakers are asked: at a level of a hundred teachers most speak for few rows or for none.
        labels = np.full(len(self), -1, dtype=np.int64)
        for speaker in np.unique(speakers[speakers != NOBODY]).tolist():
            here = speakers == speaker
            labels[here] = self._first(speaker)[here]
        return labels

    def pseudolabels(self, speakers: np.ndarray) -> np.ndarray:
        """Give the probabilities of whoever speaks for each row, see [`PseudolabelPool.pseudolabels`]."""
        hierarchy = self.pool.hierarchy
        probs = np.zeros((len(self), hierarchy.num_labels), dtype=np.float32)
        for speaker in np.unique(speakers[speakers != NOBODY]).tolist():
            here = np.flatnonzero(speakers == speaker)
            if speaker < len(hierarchy.names):
                probs[here] = self._decode(speaker)[here]
            else:
                indices = hierarchy.level_indices(speaker - len(hierarchy.names))
                probs[here] = mean_probs(self._probs(indices, here), self._who_answered(indices)[here]).numpy()
        return probs

    def _first(self, index: int) -> np.ndarray:
        """A teacher's own best label, which is stored first: float16 may have made two of them equal."""
        label_ids, probs = self._fetch(index)
        return np.where(probs[:, 0] > 0, label_ids[:, 0].astype(np.int64), -1)

    def _probs(self, indices: Sequence[int], rows: np.ndarray | slice) -> torch.Tensor:
        return torch.from_numpy(np.stack([self._decode(index)[rows] for index in indices], axis=1))

    def _who_answered(self, indices: Sequence[int]) -> torch.Tensor:
        return torch.from_numpy(np.stack([self._fetch(index)[1][:, 0] > 0 for index in indices], axis=1))


def _remembered(kind: type) -> Any:
    """A number per example; 0 where no rule needs it. Kinds are small: they are kept for the whole pool."""
    return field(default_factory=lambda: np.zeros((), dtype=kind), metadata={"kind": kind})


@dataclass
class PlannedRows:
    """The few numbers remembered of each example, of a chunk or of all chunks together."""

    assigned: np.ndarray = _remembered(np.int32)
    labels: np.ndarray = _remembered(np.int32)
    losses: np.ndarray = _remembered(np.float32)
    in_student_top_k: np.ndarray = _remembered(np.int8)
    passes_parent: np.ndarray = _remembered(np.int8)
    passes_others: np.ndarray = _remembered(np.int8)
    student_labels: np.ndarray = _remembered(np.int32)
    student_entropy: np.ndarray = _remembered(np.float32)
    student_confidence: np.ndarray = _remembered(np.float32)
    vote_entropy: np.ndarray = _remembered(np.float32)

    @classmethod
    def concatenate(
        cls,
        chunks: Sequence[tuple[slice, PlannedRows]],
        num_examples: int,
        sum_over_processes: Callable[[np.ndarray], np.ndarray],
    ) -> PlannedRows:
        """Put this process's chunks in their places, and those of the others."""
        columns = {}
        for item in fields(cls):
            # Zeros where other processes have filled in theirs: summed over all, each row is there once.
            whole = np.zeros(num_examples, dtype=item.metadata["kind"])
            for part, rows in chunks:
                whole[part] = getattr(rows, item.name)
            columns[item.name] = sum_over_processes(whole)
        return cls(**columns)


# ── who speaks ──────────────────────────────────────────────────────────────────────────────────────────────────────


def assign(answers: LevelAnswers, args: CoSupervisedConfig, log_probs: torch.Tensor | None) -> torch.Tensor:
    """Say who of a level speaks for each row of a chunk, before anybody falls back."""
    level, hierarchy = answers.level, answers.pool.hierarchy
    method = level_assignment(args, level, hierarchy)
    # An ensemble is one more voice after all teachers, one for each level.
    if method == "ensemble" and len(answers.indices) > 1:
        return torch.where(answers.answered.any(dim=1), len(hierarchy.teachers) + level, NOBODY)
    if log_probs is None or method == "ensemble":  # of one, as at the root, where there is no student yet
        return torch.where(answers.answered[:, 0], answers.indices[0], NOBODY)
    return in_hierarchy(answers, _assign_inside(answers, args, method, log_probs))


def in_hierarchy(answers: LevelAnswers, inside: torch.Tensor) -> torch.Tensor:
    """Turn positions within a level into positions in the hierarchy."""
    return torch.where(inside == NOBODY, NOBODY, inside + answers.indices[0])


def _assign_inside(
    answers: LevelAnswers, args: CoSupervisedConfig, method: str, log_probs: torch.Tensor
) -> torch.Tensor:
    """Positions within the level by each method that asks the student, or ground truth for an upper bound."""
    pool, level, answered = answers.pool, answers.level, answers.answered
    if method == "scope":
        student_labels = torch.from_numpy(log_probs.numpy().argmax(axis=1))  # torch promises no order of ties
        return assign_by_scope(student_labels, pool.hierarchy.scope_mask(level), answered)
    if method == "agreement":
        return choose_lowest(_agreement_scores(answers, args, log_probs), answered)
    if method == "random":
        # By chunk, which is cut alike for any number of processes.
        seed = np.random.SeedSequence([int(args.data_seed or 0), level, answers.rows.start]).generate_state(1)[0]
        return assign_by_chance(answered, torch.Generator().manual_seed(int(seed)))
    domains = [teacher.domains for teacher in pool.hierarchy.levels[level]]
    if method == "metadata":
        return assign_by_domain(_texts(answers, str(args.metadata_column)), domains, answered)
    if method == "oracle_domain":
        return oracle_assign_by_domain(_texts(answers, ORACLE_DOMAIN), domains, answered)
    oracle_labels = torch.from_numpy(np.asarray(pool.oracle_labels)[answers.rows])
    if method == "oracle_scope":
        return oracle_assign_by_scope(oracle_labels, pool.hierarchy.scope_mask(level), answered)
    return oracle_assign_by_loss(oracle_labels, answers.probs, answered)


def _texts(answers: LevelAnswers, column: str) -> list[str]:
    return [str(value) for value in answers.pool.column(column, answers.rows)]


def _agreement_scores(answers: LevelAnswers, args: CoSupervisedConfig, log_probs: torch.Tensor) -> torch.Tensor:
    """How far each teacher of a level is from the student, `(num_rows, num_teachers)`."""
    rule, min_prob = args.agreement_rule, args.agreement_min_prob
    if not answers.pool.has_one_k:  # rows of unequal length do not fit into one array
        return agreement_scores(log_probs, answers.probs, rule, min_prob)
    ids, probs, rest = answers.top_k
    return agreement_scores(log_probs, probs, rule, min_prob, label_ids=ids, rest_probs=rest)


def assign_by_neighbors(
    pool: PseudolabelPool,
    level: int,
    args: CoSupervisedConfig,
    student_chunks: StudentChunks,
    neighbors: torch.Tensor,
    sum_over_processes: Callable[[np.ndarray], np.ndarray] = lambda values: values,
) -> torch.Tensor:
    """Choose the teacher that the student agrees with most on an example and on those next to it."""
    # All scores are needed before the first mean: neighbours lie anywhere in the pool.
    shape = len(pool), len(pool.hierarchy.level_indices(level))
    scores, answered = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.int8)
    for part, log_probs in student_chunks:
        answers = LevelAnswers(pool, level, part)
        scores[part], answered[part] = _agreement_scores(answers, args, log_probs), answers.answered
    whole = torch.from_numpy(sum_over_processes(answered) > 0)
    smoothed = mean_over_neighbors(torch.from_numpy(sum_over_processes(scores)), neighbors, whole)
    return choose_lowest(smoothed, whole)


def assign_by_function(answers: LevelAnswers, log_probs: torch.Tensor, function: AssignFunction) -> torch.Tensor:
    """Ask the user's own assignment, and see that who shall speak has something to say."""
    answered, part = answers.answered, answers.rows
    # A function may write into what it is given; the next rule must not see that.
    found = function(log_probs, answers.probs, answered.clone())
    chosen, num_teachers = _check_function("assign_func", found, part, torch.long), answered.shape[1]
    if len(chosen) and not -1 <= int(chosen.min()) <= int(chosen.max()) < num_teachers:
        raise ValueError(
            f"`assign_func` must give positions of level {answers.level}, 0..{num_teachers - 1}, or -1 for nobody, "
            f"got {int(chosen.min())}..{int(chosen.max())}."
        )
    silent = (chosen != NOBODY) & ~answered.gather(1, chosen.clamp(min=0).unsqueeze(1)).squeeze(1)
    if silent.any():
        raise ValueError(
            f"`assign_func` must choose teachers that answered, got {int(silent.sum())} of {len(chosen)} rows without "
            f"an answer, row {part.start + int(silent.nonzero()[0])} first. Look at its third argument, or give -1."
        )
    return chosen


def _check_function(name: str, found: object, part: slice, dtype: torch.dtype) -> torch.Tensor:
    """What a user's function gave, if it can be used."""
    shape, kind = (part.stop - part.start,), "booleans" if dtype is torch.bool else "integers"
    if not isinstance(found, torch.Tensor) or found.shape != shape or found.dtype is not dtype:
        given = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
        raise ValueError(f"`{name}` must give a tensor of {kind} ({dtype}) of shape {shape}, got {given}.")
    # Plans are made on the CPU, wherever the function worked.
    return found.cpu()


# ── what is kept ────────────────────────────────────────────────────────────────────────────────────────────────────


def judge(
    answers: LevelAnswers,
    args: CoSupervisedConfig,
    assigned: torch.Tensor,
    parent: torch.Tensor,
    log_probs: torch.Tensor | None,
    keep_func: KeepFunction | None = None,
) -> PlannedRows:
    """Compare the pseudolabels of a chunk with the student and with the level above."""
    speakers = assigned.numpy()
    rows = PlannedRows(speakers, answers.hard_labels(speakers), passes_parent=np.array(1))
    if log_probs is None:
        return rows  # at the root there is nobody to disagree with
    # A row without a label gets some loss here, and is left out of every count by its label of -1.
    labels = torch.from_numpy(rows.labels).clamp(min=0)
    k = args.rejection_k or default_top_k(answers.pool.hierarchy.num_labels)
    rows.losses = pseudolabel_loss(log_probs, labels).numpy()
    rows.in_student_top_k = in_top_k(log_probs, labels, k).numpy()
    rows.student_labels = log_probs.numpy().argmax(axis=1)  # numpy promises ties to the first
    rows.passes_others = np.array(1)
    if args.relabel_above is not None:
        rows.student_confidence = log_probs.max(dim=1).values.exp().numpy()
    # A test of the user's own takes the place of all others.
    if keep_func is not None:
        found = keep_func(log_probs, torch.from_numpy(answers.pseudolabels(speakers)))
        rows.passes_others = _check_function("keep_func", found, answers.rows, torch.bool).numpy()
        return rows
    if "student_entropy" in args.rejection:
        rows.student_entropy = student_entropy(log_probs).numpy()
    if "confidence_window" in args.rejection:
        confidence = answers.pseudolabels(speakers).max(axis=1)
        rows.passes_others = (args.rejection_window[0] <= confidence) & (confidence <= args.rejection_window[1])
    if "vote_entropy" in args.rejection:
        rows.vote_entropy = vote_entropy(answers.votes, answers.pool.hierarchy.num_labels).numpy()
    if {"parent_topk", "parent_confident"} & set(args.rejection):
        own, above = (torch.from_numpy(answers.pseudolabels(who.numpy())) for who in (assigned, parent))
        passes = torch.ones_like(labels, dtype=torch.bool)
        if "parent_topk" in args.rejection:
            passes &= in_top_k(above, labels, k)
        if "parent_confident" in args.rejection:
            above_labels = torch.from_numpy(above.numpy().argmax(axis=1))
            passes &= parent_confident(labels, own.max(dim=1).values, above_labels, above.max(dim=1).values)
        # Where nobody above has answered there is nothing to contradict.
        rows.passes_parent = (passes | (parent == NOBODY)).numpy()
    return rows

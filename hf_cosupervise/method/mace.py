"""MACE: who knows the label, and what those say who do not."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from .label_model import _FLAT, LabelModel, check_count
from .votes import Answers, name_voters, one_sided_voters

_TRUST_PRIOR, _SPAM_PRIOR = 0.5, 10.0
_MAX_SHARPNESS = 1e9


@dataclass
class Mace(LabelModel):
    """Weigh votes by how often each voter knows the label, and by what it says when it does not.

    Voter k knows the label of a row with probability r_k and gives it, else it names label l with probability
    xi_k(l): p(vote_ik | c) = r_k [vote_ik = c] + (1 - r_k) xi_k(vote_ik). Variational EM with prior Beta(0.5, 0.5) on
    r and Dirichlet(10) on xi, from random starts, of which the most likely stays.

    Where every voter names one label only, xi explains all votes and r falls to 0: the order of the labels of a row
    still weighs votes by r / xi, but their posteriors are nearly equal. They are then sharpened, q^t normalised, until
    the mean probability of the best label is the mean share of the votes behind it; a warning says so.

    Args:
        max_iterations (`int`, *optional*, defaults to 50):
            EM steps, all of which are done.
        num_restarts (`int`, *optional*, defaults to 3):
            Random starts.
        seed (`int`, *optional*, defaults to 0):
            For the starts: the same seed gives the same answer.

    Raises:
        ValueError: If a setting is not as said above.

    Source:
        Hovy et al. 2013, with the priors of its authors; sharpening is ours.

    Examples:
        >>> votes = [[0, 0, 1], [1, 1, 0], [0, 0, -1], [1, 1, 1]]
        >>> Mace(num_restarts=1).fit(votes).predict(votes).argmax(axis=1).tolist()
        [0, 1, 0, 1]
    """

    name: ClassVar[str] = "mace"
    max_iterations: int = 50
    num_restarts: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.max_iterations)
        check_count(self.num_restarts, "num_restarts")

    def _fit(self, answers: Answers) -> np.ndarray:
        random, shape = np.random.RandomState(self.seed), (answers.codes.shape[1], answers.num_codes)
        most = -np.inf
        for _ in range(self.num_restarts):
            trust = 1 + 1.5 * random.uniform(size=(shape[0], 2))  # guesses, knows
            spam = 1 + 1.5 * random.uniform(size=shape)
            trust, spam = trust / trust.sum(axis=1, keepdims=True), spam / spam.sum(axis=1, keepdims=True)
            for _ in range(self.max_iterations):
                trust, spam = _step(answers, trust, spam)
            found, evidence = _label_posteriors(answers, trust, spam)
            if evidence > most:
                most, probs = evidence, found
                self.parameters = {"trust": trust, "spam": spam, "sharpness": np.ones(1)}
        return probs

    def _posteriors(self, answers: Answers) -> np.ndarray:
        probs, _ = _label_posteriors(answers, self.parameters["trust"], self.parameters["spam"])
        return _sharpen(probs, float(self.parameters["sharpness"][0]))

    def _finish(self, codes: np.ndarray, posteriors: np.ndarray, votes: np.ndarray) -> np.ndarray:
        found, possible = self._compare(codes, posteriors)
        if found >= _FLAT * possible:
            return posteriors
        rows = np.arange(len(posteriors))
        wanted = float(self._vote_shares(codes)[rows, posteriors.argmax(axis=1)].mean())
        low, high = 0.0, np.log(_MAX_SHARPNESS)
        for _ in range(60):  # the mean grows with the sharpness
            middle = (low + high) / 2
            is_less = _sharpen(posteriors, np.exp(middle)).max(axis=1).mean() < wanted
            low, high = (middle, high) if is_less else (low, middle)
        self.parameters["sharpness"] = np.array([np.exp(low)])
        only = name_voters(one_sided_voters(votes), self.voter_names)
        warnings.warn(
            f"`mace` finds no voter that knows more than what it always says: its posteriors tell {found:.2g} nats "
            f"about the label, the shares of the votes {possible:.2g}. They are sharpened until they are as sure as "
            "voters agree with them. " + (f"Voters that name one label only: {only}. " if only else "")
            + "Compare with `shared_majority`."
        )  # fmt: skip
        return _sharpen(posteriors, float(np.exp(low)))


def _step(answers: Answers, trust: np.ndarray, spam: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One step of variational EM: expected logarithms of the new parameters, as weights."""
    rows, voters, codes = answers.cells
    probs, _ = _label_posteriors(answers, trust, spam)
    guess, known = trust[voters, 0] * spam[voters, codes], trust[voters, 1]
    knows = probs[rows, codes] * known / (guess + known)
    num_voters, num_labels = spam.shape
    new_trust = np.stack([np.bincount(voters, part, num_voters) for part in (1 - knows, knows)], axis=1)
    new_spam = np.bincount(voters * num_labels + codes, 1 - knows, num_voters * num_labels).reshape(spam.shape)
    return _log_mean_weights(new_trust + _TRUST_PRIOR), _log_mean_weights(new_spam + _SPAM_PRIOR)


def _label_posteriors(answers: Answers, trust: np.ndarray, spam: np.ndarray) -> tuple[np.ndarray, float]:
    """Posteriors `(num_rows, num_labels)`, and the log-likelihood of all votes."""
    (rows, voters, codes), num_rows, num_labels = answers.cells, len(answers.codes), answers.num_codes
    guess, known = trust[voters, 0] * spam[voters, codes], trust[voters, 1]
    # log1p: what a voter hardly knows still tells which label is before another
    logs = np.bincount(rows * num_labels + codes, np.log1p(known / guess), num_rows * num_labels)
    logits = logs.reshape(num_rows, num_labels) + np.bincount(rows, np.log(guess), num_rows)[:, None]
    top = logits.max(axis=1, keepdims=True)
    probs = np.exp(logits - top)
    total = probs.sum(axis=1, keepdims=True)
    return probs / total, float((top + np.log(total)).sum()) - num_rows * float(np.log(num_labels))


def _log_mean_weights(counts: np.ndarray) -> np.ndarray:
    """exp of the expected logarithm under a Dirichlet distribution."""
    values = torch.from_numpy(counts)
    return (values.digamma() - values.sum(dim=1, keepdim=True).digamma()).exp().numpy()


def _sharpen(probs: np.ndarray, sharpness: float) -> np.ndarray:
    if sharpness == 1:
        return probs
    logits = sharpness * np.log(np.maximum(probs, np.finfo(np.float64).tiny))
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)

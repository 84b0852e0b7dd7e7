"""Dawid and Skene: one confusion matrix per voter, found together with the labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from .label_model import LabelModel
from .votes import Answers

_FLOOR = 1e-10


@dataclass
class DawidSkene(LabelModel):
    """Weigh votes by a confusion matrix for each voter, estimated together with the labels.

    EM from vote shares q: pi_c = mean_i q_ic and theta_k(l | c) = sum_i q_ic [vote_ik = l] / sum_i q_ic over what k
    answered, both at least 1e-10; then q_ic ~ pi_c prod_k theta_k(vote_ik | c). Votes are taken as independent given
    the label.

    Args:
        max_iterations (`int`, *optional*, defaults to 100):
            EM steps at most.
        tolerance (`float`, *optional*, defaults to 1e-5):
            Stop when the bound on the likelihood per answer grows by less.
        abstention (`str`, *optional*, defaults to `"auto"`):
            `"missing"`: no vote tells nothing, as where a worker was not asked. `"answer"`: it is one answer more, as
            where a labelling function kept silent. `"auto"`: missing, but where most votes are from voters that name
            one label only, who tell nothing else. There theta_k(l | c) is of all rows, silent ones too, while in a row
            silence speaks for no label, and q is the mean of that and the vote shares.

    Source:
        Dawid and Skene 1979, doi 10.2307/2346806, with the results of crowd-kit. As there, the bound counts the prior
        once per answer instead of once per row, which only changes when it stops. Silence as an answer is ours; there
        it is counted once per row. That silence tells how often a voter speaks of a label, but nothing of a row, is
        as in Ratner et al., arXiv 1810.02840; the mean is ours. Functions written for cases of their own exclude each
        other: read as independent signs, their silences outweigh their votes, and without the mean EM runs away.

    Examples:
        >>> votes = [[0, 0, 1], [1, 1, 0], [0, 0, -1], [1, 1, 1]]
        >>> DawidSkene().fit(votes).predict(votes).argmax(axis=1).tolist()
        [0, 1, 0, 1]
    """

    name: ClassVar[str] = "dawid_skene"
    needs_several_labels: ClassVar[bool] = True
    max_iterations: int = 100
    tolerance: float = 1e-5
    abstention: str = "auto"

    @property
    def _is_anchored(self) -> bool:
        """Whether voters know cases of their own, so that silence is no sign and vote shares have a say."""
        return self.silence_is_answer and self.abstention == "auto"

    def _fit(self, answers: Answers) -> np.ndarray:
        shares = torch.from_numpy(self._vote_shares(answers.codes))
        return self._fit_anchored(answers, shares) if self._is_anchored else self._fit_freely(answers, shares)

    def _fit_anchored(self, answers: Answers, shares: torch.Tensor) -> np.ndarray:
        probs, said = shares, answers.sum_by_answer(torch.ones(len(shares), 1, dtype=torch.float64)) > 0
        for _ in range(self.max_iterations):
            self.parameters = _maximize(answers, probs, said)
            last, probs = probs, torch.from_numpy(self._posteriors(answers))
            # There is no bound to watch: a mean of two is not what EM climbs.
            if float((probs - last).abs().mean()) < self.tolerance:
                break
        return probs.numpy()

    def _fit_freely(self, answers: Answers, probs: torch.Tensor) -> np.ndarray:
        num_answers = len(answers.cells[0])
        # (num_voters, num_codes, 1): the answers that a voter has ever given.
        said = answers.sum_by_answer(torch.ones(len(probs), 1, dtype=torch.float64)) > 0
        # crowd-kit's bound adds the prior for each answer of a row. To stop where it stops, so does this one.
        num_others = answers.sum_by_row(torch.ones(*said.shape, dtype=torch.float64)) - 1
        if self.silence_is_answer:  # not a case of crowd-kit, whose bound may fall here and stop too early
            num_others.zero_()
        next_parameters, last = _maximize(answers, probs, said), -np.inf
        for _ in range(self.max_iterations):
            self.parameters = next_parameters  # those that give what is returned
            probs = self._logits(answers).softmax(dim=1)
            next_parameters = _maximize(answers, probs, said)
            log_prior = torch.from_numpy(next_parameters["prior"]).log()
            # xlogy below, because a posterior of 0 has an entropy of 0 and no logarithm.
            expected = probs * (self._logits(answers, next_parameters) + num_others * log_prior)
            bound = float((expected - torch.xlogy(probs, probs)).sum())
            # The parameters are not those of the last step, but those that made `probs`: rows that come later get the
            # posteriors that the same votes got here.
            if bound - last < self.tolerance * num_answers:
                break
            last = bound
        return probs.numpy()

    def _logits(self, answers: Answers, parameters: dict[str, np.ndarray] | None = None) -> torch.Tensor:
        known = self.parameters if parameters is None else parameters
        log_confusion, log_prior = (torch.from_numpy(known[key]).log() for key in ("confusion", "prior"))
        if self._is_anchored:
            log_confusion[:, len(self.named)] = 0.0
        return answers.sum_by_row(log_confusion) + log_prior

    def _posteriors(self, answers: Answers) -> np.ndarray:
        probs = self._logits(answers).softmax(dim=1).numpy()
        if not self._is_anchored:
            return probs
        shares = self._vote_shares(answers.codes)
        return np.where(shares.any(axis=1, keepdims=True), (probs + shares) / 2, probs)


def _maximize(answers: Answers, probs: torch.Tensor, said: torch.Tensor) -> dict[str, np.ndarray]:
    """Parameters of posteriors `(num_rows, num_labels)`."""
    prior = (probs.sum(dim=0) / probs.sum()).clamp(min=_FLOOR)
    counts = answers.sum_by_answer(probs).clamp(min=_FLOOR) * said
    # what a voter never said is equally improbable under each label, so that it tells nothing later
    confusion = torch.where(said, counts / counts.sum(dim=1, keepdim=True), _FLOOR)
    return {"prior": prior.numpy(), "confusion": confusion.numpy()}

"""Enhanced Bayesian classifier combination: voters that err together on a kind of rows."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from .label_model import LabelModel
from .votes import Answers


@dataclass
class Ebcc(LabelModel):
    """Weigh votes by a confusion matrix for each voter and each of several kinds of rows under a label.

    A row of label c is of kind m with probability pi_cm ~ Dirichlet(0.1 / M), and voter k then says l with probability
    v_kcm(l) ~ Dirichlet(1, and 4 at the label itself); tau_c, of prior the vote shares of all rows, is the
    probability of a label. Voters are independent given label *and* kind, so that those who err on the same rows
    are not counted as often as they are many. Mean-field inference in closed form: digamma steps until no posterior
    moves by 1e-3.

    One kind (which is Bayesian Dawid-Skene) is fitted first; then `num_kinds` from random kinds, half of them from
    the vote shares and half from the posteriors of one kind: five steps from every start, and to the end from the ten
    of greatest bound on the evidence. What has the greatest bound in the end stays.

    Args:
        num_kinds (`int`, *optional*, defaults to 10):
            Kinds of rows under each label, M. Fewer, with a warning, where they would need more than about 1 GB.
        num_restarts (`int`, *optional*, defaults to 100):
            Random starts.
        max_iterations (`int`, *optional*, defaults to 500):
            Steps of each at most.
        seed (`int`, *optional*, defaults to 0):
            For the starts: the same seed gives the same answer.
        abstention (`str`, *optional*, defaults to `"auto"`):
            Of [`DawidSkene`]. Where `"auto"` takes silence for an answer, q is the mean of the posterior and the vote
            shares in the end: many silences that are no independent signs cannot overrule all votes of a row.

    Source:
        Li, Rubinstein and Cohn, ICML 2019, with its published priors, number of kinds and stop. One kind as a
        candidate and as a start, and short runs first, are ours: one kind has the greater bound on many sets.

    Examples:
        >>> votes = [[0, 0, 1], [1, 1, 0], [0, 0, -1], [1, 1, 1]]
        >>> Ebcc().fit(votes).predict(votes).argmax(axis=1).tolist()
        [0, 1, 0, 1]
    """

    name: ClassVar[str] = "ebcc"
    needs_several_labels: ClassVar[bool] = True
    num_kinds: int = 10
    num_restarts: int = 100
    max_iterations: int = 500
    seed: int = 0
    abstention: str = "auto"

    def _fit(self, answers: Answers) -> np.ndarray:
        shares = torch.from_numpy(self._vote_shares(answers.codes))
        prior, random = shares.sum(dim=0), np.random.default_rng(self.seed)
        # One kind has one start only: it is a candidate itself, and half of the others begin from its labels.
        best = first = _infer(answers, shares, prior, shares[:, :, None], self.max_iterations)
        num_kinds = self._affordable_kinds(answers, shares.shape[1])

        def run(restart: int, num_steps: int) -> _Inferred:
            # Kinds must begin unequal: equal ones stay equal, and are one.
            kinds = torch.from_numpy(random.dirichlet(np.ones(num_kinds), tuple(shares.shape)))
            start = first.labels if restart % 2 else shares
            return _infer(answers, start, prior, kinds.mul_(start[:, :, None]), num_steps)

        begun: list[tuple[float, int, Mapping[str, Any]]] = []
        for restart in range(self.num_restarts if num_kinds > 1 else 0):
            state = random.bit_generator.state
            begun.append((run(restart, min(_SHORT, self.max_iterations)).bound, restart, state))
        # Begun anew, from the same draws: posteriors of every kind are too large to keep ten of.
        for _, restart, state in sorted(begun, key=lambda start: -start[0])[:_NUM_LONG]:
            random.bit_generator.state = state
            best = max(
                best, run(restart, self.max_iterations), key=lambda result: result.bound
            )  # of equals the earlier
        self.parameters = {"log_prior": best.log_prior.numpy(), "log_confusion": best.log_confusion.numpy()}
        return best.labels.numpy()

    def _affordable_kinds(self, answers: Answers, num_labels: int) -> int:
        """As many kinds as posteriors and confusion matrices of a bearable size can tell apart."""
        num_rows, num_voters = answers.codes.shape
        num_kinds = max(
            min(self.num_kinds, _MAX_CELLS // (num_labels * (num_rows + num_voters * answers.num_codes))), 1
        )
        if num_kinds < self.num_kinds:
            warnings.warn(
                f"`ebcc` has {num_kinds} instead of {self.num_kinds} kinds of rows under a label: with {num_rows} "
                f"rows, {num_voters} voters and {num_labels} labels more would need too much memory. Set "
                f"`num_kinds={num_kinds}` to say that this is meant."
            )
        return num_kinds

    def _posteriors(self, answers: Answers) -> np.ndarray:
        log_prior, log_confusion = (torch.from_numpy(self.parameters[key]) for key in ("log_prior", "log_confusion"))
        probs = _responsibilities(answers, log_prior, log_confusion)[0]
        return self._heed_votes(answers.codes, probs.reshape(-1, *log_prior.shape).sum(dim=2).numpy())

    def _finish(self, codes: np.ndarray, posteriors: np.ndarray, votes: np.ndarray) -> np.ndarray:
        return super()._finish(codes, self._heed_votes(codes, posteriors), votes)

    def _heed_votes(self, codes: np.ndarray, probs: np.ndarray) -> np.ndarray:
        """Let what was said weigh as much as all signs together, where nobody told that silence is one."""
        is_told = not self.silence_is_answer or self.abstention == "answer"
        return probs if is_told else (probs + self._vote_shares(codes)) / 2


# As published: few kinds have any weight, and voters are more often right than not.
_KIND_PRIOR, _RIGHT_PRIOR, _WRONG_PRIOR = 0.1, 4.0, 1.0
_STEP = 1e-3
# Numbers in the posteriors and the confusion matrices of all kinds: some six copies are alive at once, about 1 GB.
_MAX_CELLS = 2**24
# Bounds after a few steps choose the starts that are worth many: to take all to the end would cost ten times as much.
_SHORT, _NUM_LONG = 5, 10


@dataclass
class _Inferred:
    bound: float
    labels: torch.Tensor  # (num_rows, num_labels)
    log_prior: torch.Tensor  # (num_labels, num_kinds), expected
    log_confusion: torch.Tensor  # (num_voters, num_codes, num_labels * num_kinds), expected


def _infer(
    answers: Answers, labels: torch.Tensor, label_prior: torch.Tensor, joint: torch.Tensor, max_iterations: int
) -> _Inferred:
    """Mean-field inference from posteriors `(num_rows, num_labels)`, spread over kinds in `joint`."""
    num_labels, num_kinds = joint.shape[1:]
    kind_prior = torch.full((num_labels, num_kinds), _KIND_PRIOR / num_kinds, dtype=torch.float64)
    code_prior = torch.full((answers.num_codes, num_labels), _WRONG_PRIOR, dtype=torch.float64)
    # Silence, where it is an answer, is the code after all labels: right for none of them.
    code_prior[range(num_labels), range(num_labels)] = _RIGHT_PRIOR
    code_prior = code_prior.repeat_interleave(num_kinds, dim=1)[None]
    for _ in range(max_iterations):
        codes = log_confusion = kind_prior  # those of the last step are not kept beside new ones: they are the largest
        kinds, shares = kind_prior + joint.sum(dim=0), label_prior + labels.sum(dim=0)
        codes = answers.sum_by_answer(joint.reshape(len(joint), -1)).add_(code_prior)
        log_kinds, log_shares = _log_mean(kinds, 1), _log_mean(shares, 0)
        log_prior = log_kinds + log_shares[:, None]
        log_confusion = _log_mean(codes, 1)
        flat, evidence = _responsibilities(answers, log_prior, log_confusion)
        joint, last = flat.reshape(joint.shape), labels
        labels = joint.sum(dim=2)
        # Of the labels, not of the kinds, which may go on changing places without any label being moved.
        if (last - labels).abs_().max() < _STEP:
            break
    # Of the counts that made the last posteriors, as the evidence is: those of `joint` would be a step further.
    bound = float(evidence.sum()) - _divergence(kinds, kind_prior, log_kinds, 1)
    bound -= _divergence(shares, label_prior, log_shares, 0) + _divergence(codes, code_prior, log_confusion, 1)
    return _Inferred(bound, labels, log_prior, log_confusion)


def _responsibilities(
    answers: Answers, log_prior: torch.Tensor, log_confusion: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Posteriors of label and kind `(num_rows, num_labels * num_kinds)`, and each row's share of the bound."""
    logits = answers.sum_by_row(log_confusion).add_(log_prior.reshape(-1))
    evidence = logits.logsumexp(dim=1, keepdim=True)
    return logits.sub_(evidence).exp_(), evidence


def _log_mean(counts: torch.Tensor, dim: int) -> torch.Tensor:
    """Expected logarithm under a Dirichlet distribution."""
    return counts.digamma().sub_(counts.sum(dim=dim, keepdim=True).digamma())


def _divergence(counts: torch.Tensor, prior: torch.Tensor, log_mean: torch.Tensor, dim: int) -> float:
    """KL divergence of Dirichlet distributions from their priors, summed."""
    norms = [values.sum(dim=dim).lgamma() - values.lgamma().sum(dim=dim) for values in (counts, prior)]
    return float((norms[0] - norms[1] + (counts - prior).mul_(log_mean).sum(dim=dim)).sum())

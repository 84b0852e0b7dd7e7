"""Enhanced Bayesian classifier combination: voters that err together on a kind of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from .label_model import LabelModel, check_abstention, check_count, takes_silence
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
            Kinds of rows under each label, M.
        num_restarts (`int`, *optional*, defaults to 100):
            Random starts.
        max_iterations (`int`, *optional*, defaults to 500):
            Steps of each at most.
        seed (`int`, *optional*, defaults to 0):
            For the starts: the same seed gives the same answer.
        abstention (`str`, *optional*, defaults to `"auto"`):
            Of [`DawidSkene`].

    Raises:
        ValueError: If a setting is not as said above.

    Source:
        Li, Rubinstein and Cohn, ICML 2019, with its published priors, number of kinds and stop. One kind as a
        candidate and as a start, and short runs first, are ours: one kind has the greater bound on many sets.

    Examples:
        >>> votes = [[0, 0, 1], [1, 1, 0], [0, 0, -1], [1, 1, 1]]
        >>> Ebcc().fit(votes).predict(votes).argmax(axis=1).tolist()
        [0, 1, 0, 1]
    """

    name: ClassVar[str] = "ebcc"
    num_kinds: int = 10
    num_restarts: int = 100
    max_iterations: int = 500
    seed: int = 0
    abstention: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("num_kinds", "num_restarts", "max_iterations"):
            check_count(getattr(self, key), key)
        check_abstention(self.abstention)

    def _choose_silence(self, votes: np.ndarray) -> bool:
        return takes_silence(self.name, self.abstention, votes, self.voter_names)

    def _fit(self, answers: Answers) -> np.ndarray:
        shares = torch.from_numpy(self._vote_shares(answers.codes))
        prior, random = shares.sum(dim=0), np.random.default_rng(self.seed)
        # One kind has one start only: it is a candidate itself, and half of the others begin from its labels.
        best = first = _infer(answers, shares, prior, shares[:, :, None], self.max_iterations)
        begun: list[_Inferred] = []
        for restart in range(self.num_restarts if self.num_kinds > 1 else 0):
            # Kinds must begin unequal: equal ones stay equal, and are one.
            kinds = torch.from_numpy(random.dirichlet(np.ones(self.num_kinds), tuple(shares.shape)))
            start = first.labels if restart % 2 else shares
            found = _infer(answers, start, prior, kinds * start[:, :, None], min(_SHORT, self.max_iterations))
            begun = sorted([*begun, found], key=lambda result: -result.bound)[:_NUM_LONG]  # the others are forgotten
        for found in begun:  # from where the short run ended
            found = _infer(answers, found.labels, prior, found.joint, self.max_iterations)
            best = max(best, found, key=lambda result: result.bound)  # of equals the earlier
        self.parameters = {"log_prior": best.log_prior.numpy(), "log_confusion": best.log_confusion.numpy()}
        return best.labels.numpy()

    def _posteriors(self, answers: Answers) -> np.ndarray:
        log_prior, log_confusion = (torch.from_numpy(self.parameters[key]) for key in ("log_prior", "log_confusion"))
        probs = _responsibilities(answers, log_prior, log_confusion)[0]
        return probs.reshape(-1, *log_prior.shape).sum(dim=2).numpy()


# As published: few kinds have any weight, and voters are more often right than not.
_KIND_PRIOR, _RIGHT_PRIOR, _WRONG_PRIOR = 0.1, 4.0, 1.0
_STEP = 1e-3
# Bounds after a few steps choose the starts that are worth many: to take all to the end would cost ten times as much.
_SHORT, _NUM_LONG = 5, 10


@dataclass
class _Inferred:
    bound: float
    labels: torch.Tensor  # (num_rows, num_labels)
    joint: torch.Tensor  # (num_rows, num_labels, num_kinds)
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
        kinds, shares = kind_prior + joint.sum(dim=0), label_prior + labels.sum(dim=0)
        codes = code_prior + answers.sum_by_answer(joint.reshape(len(joint), -1))
        log_prior = _log_mean(kinds, 1) + _log_mean(shares, 0)[:, None]
        log_confusion = _log_mean(codes, 1)
        flat, evidence = _responsibilities(answers, log_prior, log_confusion)
        joint, last = flat.reshape(joint.shape), labels
        labels = joint.sum(dim=2)
        # Of the labels, not of the kinds, which may go on changing places without any label being moved.
        if torch.allclose(last, labels, atol=_STEP):
            break
    # Of the counts that made the last posteriors, as the evidence is: those of `joint` would be a step further.
    bound = float(evidence.sum()) - _divergence(kinds, kind_prior, 1) - _divergence(shares, label_prior, 0)
    bound -= _divergence(codes, code_prior.expand_as(codes), 1)
    return _Inferred(bound, labels, joint, log_prior, log_confusion)


def _responsibilities(
    answers: Answers, log_prior: torch.Tensor, log_confusion: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Posteriors of label and kind `(num_rows, num_labels * num_kinds)`, and each row's share of the bound."""
    logits = answers.sum_by_row(log_confusion) + log_prior.reshape(-1)
    evidence = logits.logsumexp(dim=1, keepdim=True)
    return (logits - evidence).exp(), evidence


def _log_mean(counts: torch.Tensor, dim: int) -> torch.Tensor:
    """Expected logarithm under a Dirichlet distribution."""
    return counts.digamma() - counts.sum(dim=dim, keepdim=True).digamma()


def _divergence(counts: torch.Tensor, prior: torch.Tensor, dim: int) -> float:
    """KL divergence of Dirichlet distributions from their priors, summed."""
    norms = [values.sum(dim=dim).lgamma() - values.lgamma().sum(dim=dim) for values in (counts, prior)]
    return float((norms[0] - norms[1] + ((counts - prior) * _log_mean(counts, dim)).sum(dim=dim)).sum())

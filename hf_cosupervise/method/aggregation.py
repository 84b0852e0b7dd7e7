"""Means of several teachers: one pseudolabel per example without a hierarchy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .assignment import first_argmax
from .checks import check_answers, check_labels, check_min_prob
from .label_model import LabelModel, SharedMajority
from .label_models import LABEL_MODELS
from .metrics import SUM_TOLERANCE

# From `teacher_probs (num_examples, num_teachers, num_labels)` and `answered (num_examples, num_teachers)` to
# pseudolabels `(num_examples, num_labels)`: any function will do.
Aggregator = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def aggregate(teacher_probs: torch.Tensor, answered: torch.Tensor, method: str | Aggregator) -> torch.Tensor:
    """Make one pseudolabel per example of what several teachers said.

    Args:
        teacher_probs (`torch.Tensor` of shape `(num_examples, num_teachers, num_labels)`):
            Rows sum to 1, or are all zero where there is no answer.
        answered (`torch.BoolTensor` of shape `(num_examples, num_teachers)`):
            Who answered.
        method (`str` or `Callable`):
            A name of `AGGREGATORS`, or a function from `(teacher_probs, answered)` to what is returned here.

    Returns:
        `torch.Tensor` of shape `(num_examples, num_labels)`: rows sum to 1, all zero where there is no pseudolabel.

    Raises:
        ValueError: If the method is unknown, or if what goes in or comes out is not as said above.
        TypeError: If the method is neither a name nor a function, or returns something else than a tensor.

    Examples:
        >>> probs = torch.tensor([[[0.9, 0.1], [0.4, 0.6], [0.4, 0.6]]])
        >>> aggregate(probs, torch.ones(1, 3, dtype=torch.bool), "majority_vote").tolist()
        [[0.0, 1.0]]
    """
    if isinstance(method, str):
        if method not in AGGREGATORS:
            raise ValueError(
                f"Unknown `method` '{method}'. Choose one of {', '.join(AGGREGATORS)}, or give a function."
            )
        name, function = method, AGGREGATORS[method]
    elif callable(method):
        name, function = getattr(method, "__name__", repr(method)), method
    else:
        raise TypeError(f"`method` must be a name or a function, got {method!r}. Names are {', '.join(AGGREGATORS)}.")
    check_teacher_probs(teacher_probs, answered)
    found = function(teacher_probs, answered)
    _check_result(found, name, (teacher_probs.shape[0], teacher_probs.shape[2]))
    return found


def check_teacher_probs(teacher_probs: torch.Tensor, answered: torch.Tensor) -> None:
    """Refuse what is not the output of teachers: rows sum to 1 within 2e-3, or are all zero where nobody answered."""
    check_answers(teacher_probs, answered)
    if teacher_probs.shape[1] == 0 or teacher_probs.shape[2] == 0:
        raise ValueError(f"`teacher_probs` needs a teacher and a label, got shape {tuple(teacher_probs.shape)}.")
    # float32 sums: in half precision a thousand labels are summed with an error above the tolerance
    sums = teacher_probs.sum(dim=-1, dtype=torch.promote_types(teacher_probs.dtype, torch.float32))
    wrong = ~((sums - answered.to(sums.dtype)).abs() <= SUM_TOLERANCE)
    if teacher_probs.numel():
        wrong |= ~(teacher_probs.amin(dim=-1) >= 0)
    if bool(wrong.any()):
        row, teacher = (int(position) for position in wrong.nonzero()[0])
        raise ValueError(
            "Each row of `teacher_probs` must be probabilities that sum to 1, or all zero where `answered` is False: "
            f"example {row}, teacher {teacher} sums to {float(sums[row, teacher]):.6g} with "
            f"`answered={bool(answered[row, teacher])}` ({int(wrong.sum())} such rows). NaN is not an answer: set the "
            "row to 0 and `answered` to False."
        )


def _check_result(found: Any, name: str, shape: tuple[int, int]) -> None:
    if not isinstance(found, torch.Tensor):
        raise TypeError(f"`{name}` must return a tensor of shape {shape}, got {type(found).__name__}.")
    if found.shape != shape:
        raise ValueError(f"`{name}` must return shape (num_examples, num_labels) = {shape}, got {tuple(found.shape)}.")
    sums = found.sum(dim=-1, dtype=torch.promote_types(found.dtype, torch.float32))
    wrong = ~(((sums - 1).abs() <= SUM_TOLERANCE) | (sums == 0))
    if found.numel():
        wrong |= ~(found.amin(dim=-1) >= 0)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"`{name}` must return probabilities, each row with sum 1 or all zero: row {row} sums to "
            f"{float(sums[row]):.6g}, its smallest value is {float(found[row].amin()):.6g}. Normalise what it returns."
        )


# ── means and votes ─────────────────────────────────────────────────────────────────────────────────────────────────


def mean_probs(teacher_probs: torch.Tensor, answered: torch.Tensor) -> torch.Tensor:
    """Average the probabilities of the teachers that answered, as [`aggregate`] takes and gives them.

    Examples:
        >>> mean_probs(torch.tensor([[[1.0, 0.0], [0.5, 0.5]]]), torch.tensor([[True, True]])).tolist()
        [[0.75, 0.25]]
    """
    weights = answered.to(teacher_probs.dtype)
    total = (teacher_probs * weights.unsqueeze(-1)).sum(dim=1)
    # Where nobody answered it stays zero, instead of 0 / 0.
    return total / weights.sum(dim=1, keepdim=True).clamp(min=1)


def mean_logits(teacher_probs: torch.Tensor, answered: torch.Tensor, min_prob: float = 1e-6) -> torch.Tensor:
    """Average the log-probabilities of the teachers that answered, and normalise, as [`aggregate`] takes them.

    With the m teachers that answered, softmax((1/m) sum_k log max(t_k, min_prob)): their geometric mean, at least in
    float32. [`mean_probs`] is the arithmetic one, which keeps a label that one teacher is sure of; here one that
    excludes a label pulls it down for all. A product of experts has the sum in place of the mean, so that m copies of
    a teacher are m times as sharp; here they are that teacher. `min_prob` lies in (0, 1), or a `ValueError`; without
    it, one teacher's zero would be a veto.

    Examples:
        >>> probs = torch.tensor([[[0.9, 0.1], [0.5, 0.5]]], dtype=torch.float64)  # odds of 9 and 1: sqrt(9) is 3
        >>> [round(p, 6) for p in mean_logits(probs, torch.tensor([[True, True]]))[0].tolist()]
        [0.75, 0.25]
    """
    check_min_prob(min_prob)
    num_examples, num_teachers, num_labels = teacher_probs.shape
    total = torch.zeros(
        num_examples,
        num_labels,
        dtype=torch.promote_types(teacher_probs.dtype, torch.float32),
        device=teacher_probs.device,
    )
    for teacher in range(num_teachers):  # one teacher at a time: no second array of everything
        log_probs = teacher_probs[:, teacher].to(total.dtype).clamp(min=min_prob).log()
        total += log_probs.masked_fill(~answered[:, teacher, None], 0.0)
    num_answers = answered.sum(dim=1, keepdim=True)
    return (total / num_answers.clamp(min=1)).softmax(dim=-1) * (num_answers > 0)


def majority_vote(labels: torch.Tensor, num_labels: int) -> torch.Tensor:
    """Let every teacher that answered cast one vote.

    Takes hard labels `(num_examples, num_teachers)`, -1 where a teacher has no answer; others than 0..num_labels - 1
    are a `ValueError`.

    Returns:
        `torch.Tensor` of shape `(num_examples, num_labels)`: 1 at the label with most votes, 1/m at each of m labels
        that have equally many, all zero where nobody answered.

    Examples:
        >>> majority_vote(torch.tensor([[2, 1, 2], [1, 0, -1]]), num_labels=3).tolist()
        [[0.0, 0.0, 1.0], [0.5, 0.5, 0.0]]
    """
    return label_model_posteriors(SharedMajority(), labels, num_labels)


def harden(teacher_probs: torch.Tensor, answered: torch.Tensor) -> torch.Tensor:
    """Take each teacher's best label `(num_examples, num_teachers)`: ties to the lowest, -1 without an answer.

    Examples:
        >>> harden(torch.tensor([[[0.5, 0.5], [0.0, 0.0]]]), torch.tensor([[True, False]])).tolist()
        [[0, -1]]
    """
    # Teacher by teacher: `first_argmax` counts in an array as large as what it is given.
    labels = torch.stack([first_argmax(teacher_probs[:, k]) for k in range(teacher_probs.shape[1])], dim=1)
    return labels.masked_fill(~answered, -1)


def label_model_posteriors(model: LabelModel, labels: torch.Tensor, num_labels: int) -> torch.Tensor:
    """Fit a label model on hard labels, and give its posteriors of them, as [`majority_vote`] takes and gives both."""
    check_labels(labels, num_labels)
    return torch.from_numpy(model.fit_predict_proba(labels.cpu().numpy(), num_labels)).float().to(labels.device)


# ── by name ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _fit_new(name: str) -> Callable[[torch.Tensor, int], torch.Tensor]:
    return lambda labels, num_labels: label_model_posteriors(LABEL_MODELS[name](), labels, num_labels)


def _harden_first(name: str, method: Callable[[torch.Tensor, int], torch.Tensor]) -> Aggregator:
    def hardened(teacher_probs: torch.Tensor, answered: torch.Tensor) -> torch.Tensor:
        return method(harden(teacher_probs, answered), teacher_probs.shape[2])

    hardened.__name__ = name  # which errors and pools show
    return hardened


# What makes each row of that row alone, and what needs no more than hard labels `(num_examples, num_teachers)`.
ROW_AGGREGATORS: dict[str, Aggregator] = {"mean_probs": mean_probs, "mean_logits": mean_logits}
VOTE_AGGREGATORS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "majority_vote": majority_vote,
    **{name: _fit_new(name) for name in LABEL_MODELS if name != "shared_majority"},  # which is the one before
}
AGGREGATORS: dict[str, Aggregator] = {
    **ROW_AGGREGATORS,
    **{name: _harden_first(name, method) for name, method in VOTE_AGGREGATORS.items()},
}

"""Means of several teachers: one pseudolabel per example without a hierarchy."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from numbers import Integral
from typing import Any

import torch

from .assignment import first_argmax
from .dawid_skene import DawidSkene
from .ebcc import Ebcc
from .glad import Glad
from .label_model import LabelModel, SharedMajority
from .mace import Mace
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
    if teacher_probs.ndim != 3 or answered.shape != teacher_probs.shape[:2] or answered.dtype != torch.bool:
        raise ValueError(
            "Expected `teacher_probs` of shape (num_examples, num_teachers, num_labels) and boolean `answered` of "
            f"shape (num_examples, num_teachers), got {tuple(teacher_probs.shape)} and {tuple(answered.shape)} of "
            f"{answered.dtype}."
        )
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
    """Average the probabilities of the teachers that answered.

    Args:
        teacher_probs, answered (`torch.Tensor`):
            See [`aggregate`].

    Returns:
        `torch.Tensor` of shape `(num_examples, num_labels)`: rows sum to 1, all zero where nobody answered.

    Examples:
        >>> mean_probs(torch.tensor([[[1.0, 0.0], [0.5, 0.5]]]), torch.tensor([[True, True]])).tolist()
        [[0.75, 0.25]]
    """
    weights = answered.to(teacher_probs.dtype)
    total = (teacher_probs * weights.unsqueeze(-1)).sum(dim=1)
    # Where nobody answered it stays zero, instead of 0 / 0.
    return total / weights.sum(dim=1, keepdim=True).clamp(min=1)


def mean_logits(teacher_probs: torch.Tensor, answered: torch.Tensor, min_prob: float = 1e-6) -> torch.Tensor:
    """Average the log-probabilities of the teachers that answered, and normalise.

    With the m teachers that answered, softmax((1/m) sum_k log max(t_k, min_prob)): their geometric mean.
    [`mean_probs`] is the arithmetic one, which keeps a label that one teacher is sure of; here one teacher that
    excludes a label pulls it down for all. A product of experts has the sum in place of the mean, so that m copies of
    a teacher are m times as sharp; here they are that teacher.

    Args:
        teacher_probs, answered (`torch.Tensor`):
            See [`aggregate`].
        min_prob (`float`, *optional*, defaults to 1e-6):
            In (0, 1); one teacher's zero would be a veto otherwise.

    Returns:
        `torch.Tensor` of shape `(num_examples, num_labels)`, at least float32: rows sum to 1, all zero where nobody
        answered.

    Raises:
        ValueError: If `min_prob` is out of range.

    Examples:
        >>> probs = torch.tensor([[[0.9, 0.1], [0.5, 0.5]]], dtype=torch.float64)  # odds of 9 and 1: sqrt(9) is 3
        >>> [round(p, 6) for p in mean_logits(probs, torch.tensor([[True, True]]))[0].tolist()]
        [0.75, 0.25]
    """
    if not 0 < min_prob < 1:
        raise ValueError(f"`min_prob` must be in (0, 1), got {min_prob}.")
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

    Args:
        labels (`torch.LongTensor` of shape `(num_examples, num_teachers)`):
            Hard labels, -1 where a teacher has no answer.
        num_labels (`int`):
            At least 1.

    Returns:
        `torch.Tensor` of shape `(num_examples, num_labels)`: 1 at the label with most votes, 1/m at each of m labels
        that have equally many, all zero where nobody answered.

    Raises:
        ValueError: If an argument is not as said above.

    Examples:
        >>> majority_vote(torch.tensor([[2, 1, 2], [1, 0, -1]]), num_labels=3).tolist()
        [[0.0, 0.0, 1.0], [0.5, 0.5, 0.0]]
    """
    return _label_model_posteriors(SharedMajority(), labels, num_labels)


def harden(teacher_probs: torch.Tensor, answered: torch.Tensor) -> torch.Tensor:
    """Take each teacher's most probable label.

    Args:
        teacher_probs, answered (`torch.Tensor`):
            See [`aggregate`].

    Returns:
        `torch.LongTensor` of shape `(num_examples, num_teachers)`: ties to the lowest label, -1 without an answer.

    Examples:
        >>> harden(torch.tensor([[[0.5, 0.5], [0.0, 0.0]]]), torch.tensor([[True, False]])).tolist()
        [[0, -1]]
    """
    # Teacher by teacher: `first_argmax` counts in an array as large as what it is given.
    labels = torch.stack([first_argmax(teacher_probs[:, k]) for k in range(teacher_probs.shape[1])], dim=1)
    return labels.masked_fill(~answered, -1)


def check_labels(labels: torch.Tensor, num_labels: int) -> None:
    """Refuse what are not hard labels `(num_examples, num_teachers)` of teachers, -1 where one has no answer."""
    if not isinstance(num_labels, Integral) or num_labels < 1:
        raise ValueError(f"`num_labels` must be a whole number of at least 1, got {num_labels!r}. Give the task's.")
    if labels.ndim != 2 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            "Expected `labels` as whole numbers of shape (num_examples, num_teachers), got shape "
            f"{tuple(labels.shape)} of {labels.dtype}. Use `harden` on probabilities."
        )
    if labels.numel() and not (int(labels.min()) >= -1 and int(labels.max()) < num_labels):
        raise ValueError(
            f"`labels` must be in [0, {num_labels}), or -1 where there is no answer, got values from "
            f"{int(labels.min())} to {int(labels.max())}."
        )


# ── crowds: who errs how, without gold labels ───────────────────────────────────────────────────────────────────────


def dawid_skene(
    labels: torch.Tensor,
    num_labels: int,
    *,
    max_iterations: int = 100,
    tolerance: float = 1e-5,
    abstention: str = "auto",
) -> torch.Tensor:
    """Weigh hard labels by a confusion matrix for each teacher, with the settings of [`DawidSkene`].

    Answers are taken as independent given the label, which teachers trained on the same data are not: it can end below
    a plain vote.

    Args:
        labels, num_labels:
            See [`majority_vote`]; labels that nobody names get 0.

    Returns:
        `torch.Tensor` of shape `(num_examples, num_labels)`: posteriors; rows sum to 1, or to 0 without an answer.

    Raises:
        ValueError: If fewer than three teachers answered anything, or nothing can be learned from them.

    Examples:
        >>> labels = torch.tensor([[0, 0, 1], [1, 1, 0], [0, 0, -1], [1, 1, 1]])
        >>> dawid_skene(labels, num_labels=2).argmax(dim=1).tolist()
        [0, 1, 0, 1]
    """
    return _label_model_posteriors(DawidSkene(max_iterations, tolerance, abstention), labels, num_labels)


def glad(labels: torch.Tensor, num_labels: int, *, max_iterations: int = 100, tolerance: float = 1e-5) -> torch.Tensor:
    """Weigh hard labels by an ability for each teacher and a difficulty for each example: [`Glad`], with its settings.

    Takes and gives what [`dawid_skene`] does; labels that nobody names do not count among the others. Two or three EM
    steps are usual and take about 1 s for 20,000 examples of 8 teachers and 10 labels on one core; crowd-kit's take 70
    to 90 s.

    Raises:
        ValueError: If fewer than three teachers answered anything.
        ImportError: Without scipy, which comes with crowd-kit.

    Examples:
        >>> glad(torch.tensor([[0, 0, 1], [1, 1, 0], [-1, -1, -1], [1, 1, 1]]), num_labels=2).sum(dim=1).tolist()
        [1.0, 1.0, 0.0, 1.0]
    """
    return _label_model_posteriors(Glad(max_iterations, tolerance), labels, num_labels)


def mace(
    labels: torch.Tensor,
    num_labels: int,
    *,
    max_iterations: int = 50,
    num_restarts: int = 3,
    seed: int = 0,
    abstention: str = "auto",
) -> torch.Tensor:
    """Weigh hard labels by how often each teacher knows the label, with the settings of [`Mace`].

    Takes and gives what [`dawid_skene`] does.

    Raises:
        ValueError: If fewer than three teachers answered anything.

    Examples:
        >>> labels = torch.tensor([[0, 0, 1], [1, 1, 0], [0, 0, -1], [1, 1, 1]])
        >>> mace(labels, num_labels=2, num_restarts=1).argmax(dim=1).tolist()
        [0, 1, 0, 1]
    """
    return _label_model_posteriors(Mace(max_iterations, num_restarts, seed, abstention), labels, num_labels)


def ebcc(
    labels: torch.Tensor, num_labels: int, *, num_restarts: int = 100, seed: int = 0, abstention: str = "auto"
) -> torch.Tensor:
    """Weigh hard labels by what teachers say on each of several kinds of examples, with the settings of [`Ebcc`].

    Takes, gives and raises what [`dawid_skene`] does.

    Examples:
        >>> labels = torch.tensor([[0, 0, 1], [1, 1, 0], [0, 0, -1], [1, 1, 1]])
        >>> ebcc(labels, num_labels=2, num_restarts=2).argmax(dim=1).tolist()
        [0, 1, 0, 1]
    """
    model = Ebcc(num_restarts=num_restarts, seed=seed, abstention=abstention)
    return _label_model_posteriors(model, labels, num_labels)


def _label_model_posteriors(model: LabelModel, labels: torch.Tensor, num_labels: int) -> torch.Tensor:
    check_labels(labels, num_labels)
    return torch.from_numpy(model.fit_predict_proba(labels.cpu().numpy(), num_labels)).float().to(labels.device)


# ── by name ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _harden_first(method: Callable[[torch.Tensor, int], torch.Tensor]) -> Aggregator:
    # Under its name, which errors and pools show.
    @wraps(method)
    def hardened(teacher_probs: torch.Tensor, answered: torch.Tensor) -> torch.Tensor:
        return method(harden(teacher_probs, answered), teacher_probs.shape[2])

    return hardened


# What makes each row of that row alone, and what needs no more than hard labels `(num_examples, num_teachers)`.
ROW_AGGREGATORS: dict[str, Aggregator] = {"mean_probs": mean_probs, "mean_logits": mean_logits}
VOTE_AGGREGATORS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "majority_vote": majority_vote,
    "dawid_skene": dawid_skene,
    "glad": glad,
    "mace": mace,
    "ebcc": ebcc,
}
AGGREGATORS: dict[str, Aggregator] = {
    **ROW_AGGREGATORS,
    **{name: _harden_first(method) for name, method in VOTE_AGGREGATORS.items()},
}

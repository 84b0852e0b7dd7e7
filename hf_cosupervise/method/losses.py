"""Losses of the method on hard and soft pseudolabels, one value per example.

All take student logits `(num_examples, num_labels)` and give `(num_examples,)`. Shapes that do not fit are a
`ValueError`, and, on the CPU, so is a label out of range; an accelerator stops by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real

import torch
from torch.nn import functional

MIN_PROB = 1e-6  # as in `assignment.agreement_scores`


def soft_cross_entropy(logits: torch.Tensor, target_probs: torch.Tensor) -> torch.Tensor:
    """Compute the cross-entropy of the student against probabilities `(num_examples, num_labels)`, rows sum to 1.

    loss_i = -sum_c y_ic log softmax(s_i)_c, in float32 whatever the dtype of the logits.

    Examples:
        >>> soft_cross_entropy(torch.zeros(1, 2), torch.tensor([[0.3, 0.7]])).tolist()
        [0.6931471824645996]
    """
    _check_shapes(logits, target_probs)
    return -(target_probs.float() * functional.log_softmax(logits.float(), dim=-1)).sum(dim=-1)


def sparse_soft_cross_entropy(
    logits: torch.Tensor, label_ids: torch.Tensor, label_probs: torch.Tensor, rest_probs: torch.Tensor
) -> torch.Tensor:
    """Compute [`soft_cross_entropy`] against pseudolabels that name k labels, without building all the others.

    With r the probability `(num_examples,)` of every label that is not named among `label_ids` (int64, each once) and
    `label_probs`, `(num_examples, k)` both, -sum_c y_c log s_c = -sum_k (y_k - r) log s_k - r sum_c log s_c.

    Examples:
        >>> ids, probs, rest = torch.tensor([[1]]), torch.tensor([[0.5]]), torch.tensor([0.25])
        >>> sparse_soft_cross_entropy(torch.zeros(1, 3), ids, probs, rest).tolist()
        [1.0986123085021973]
    """
    if logits.ndim != 2 or not label_ids.shape == label_probs.shape == (len(logits), *label_ids.shape[-1:]):
        raise ValueError(
            "`logits` (num_examples, num_labels), and `label_ids` and `label_probs` (num_examples, k) are needed, got "
            f"{tuple(logits.shape)}, {tuple(label_ids.shape)} and {tuple(label_probs.shape)}. Give all for the same "
            "examples."
        )
    if rest_probs.shape != logits.shape[:1]:
        raise ValueError(
            f"`rest_probs` must have shape ({len(logits)},), got {tuple(rest_probs.shape)}. Give one per example."
        )
    _check_label_ids("label_ids", label_ids, logits.shape[1])
    log_probs = functional.log_softmax(logits.float(), dim=-1)
    # Every label counts with the rest first, and those that are named with what they have beyond it.
    excess = label_probs.float() - rest_probs.float().unsqueeze(-1)
    return -(excess * log_probs.gather(1, label_ids)).sum(dim=1) - rest_probs.float() * log_probs.sum(dim=1)


def hard_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute the cross-entropy of the student against label ids `(num_examples,)`, int64.

    Examples:
        >>> hard_cross_entropy(torch.zeros(1, 2), torch.tensor([1])).tolist()
        [0.6931471824645996]
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"`logits` (num_examples, num_labels) and `labels` (num_examples,) are needed, got {tuple(logits.shape)} "
            f"and {tuple(labels.shape)}. Give both for the same examples."
        )
    _check_label_ids("labels", labels, logits.shape[1])
    # No label is ignored: torch's default takes -100 for a loss of 0, on an accelerator without a word.
    return functional.cross_entropy(
        logits.float(), labels, reduction="none", ignore_index=torch.iinfo(torch.int64).min
    )


# From logits and pseudolabels `(batch, num_labels)` and rows of the pool `(batch,)`, to losses `(batch,)`; and to
# losses with their gradient in the logits.
LossFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
LossAndGradient = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


# ── pieces ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def as_float(values: torch.Tensor) -> torch.Tensor:
    """Compute in float32, or in float64 if that is what there is."""
    return values if values.dtype == torch.float64 else values.float()


def _check_shapes(logits: torch.Tensor, target_probs: torch.Tensor) -> None:
    if logits.ndim != 2 or logits.shape != target_probs.shape:
        raise ValueError(
            "`logits` and `target_probs` must have one shape (num_examples, num_labels), got "
            f"{tuple(logits.shape)} and {tuple(target_probs.shape)}. Pass a probability for each label."
        )


def check_pair(logits: torch.Tensor, target_probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as float32, or float64 if the logits are."""
    _check_shapes(logits, target_probs)
    logits = as_float(logits)
    return logits, target_probs.to(logits.dtype)


def _check_label_ids(name: str, label_ids: torch.Tensor, num_labels: int) -> None:
    """On the CPU; elsewhere to look at them would cost more than the loss, and a label out of range stops the run."""
    if label_ids.dtype != torch.int64:
        raise ValueError(f"`{name}` must be label ids of torch.int64, got {label_ids.dtype}. Give one per example.")
    if label_ids.device.type != "cpu" or label_ids.numel() == 0:
        return
    lowest, highest = (int(value) for value in label_ids.aminmax())
    if lowest < 0 or highest >= num_labels:
        raise ValueError(
            f"`{name}` must lie in 0..{num_labels - 1}, got {lowest}..{highest}. Leave out examples without a label."
        )


def check_number(name: str, value: float, advice: str, highest: float = 1.0, *, above: bool = False) -> None:
    """From 0, or above 0, to the highest; never infinite or NaN."""
    if not isinstance(value, Real) or not 0 <= value <= highest or value == math.inf or (above and value == 0):
        wanted = ("above 0" if above else "at least 0") + ("" if highest == math.inf else f" and at most {highest:g}")
        raise ValueError(f"`{name}` must be {wanted}, got {value!r}. {advice}")


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """- sum_c y_c log p_c for each example."""
    return -(targets * functional.log_softmax(as_float(logits), dim=-1)).sum(dim=-1)


def cross_entropy_gradient(logits: torch.Tensor, target_probs: torch.Tensor) -> torch.Tensor:
    """(sum_c y_c) p - y, which is p - y where rows sum to 1."""
    logits, targets = check_pair(logits, target_probs)
    return functional.softmax(logits, dim=-1) * targets.sum(dim=-1, keepdim=True) - targets

"""Losses on hard and soft pseudolabels, one value per example."""

from __future__ import annotations

import torch
from torch.nn import functional


def soft_cross_entropy(logits: torch.Tensor, target_probs: torch.Tensor) -> torch.Tensor:
    """Compute the cross-entropy of the student against a full probability vector.

    loss_i = -sum_c y_ic log softmax(s_i)_c, in float32 whatever the dtype of the logits.

    Args:
        logits (`torch.Tensor` of shape `(num_examples, num_labels)`):
            Student logits.
        target_probs (`torch.Tensor` of shape `(num_examples, num_labels)`):
            Pseudolabels, rows sum to 1.

    Returns:
        `torch.Tensor` of shape `(num_examples,)`.

    Raises:
        ValueError: If the shapes differ.

    Examples:
        >>> soft_cross_entropy(torch.zeros(1, 2), torch.tensor([[0.3, 0.7]])).tolist()
        [0.6931471824645996]
    """
    if logits.shape != target_probs.shape:
        raise ValueError(
            f"`logits` and `target_probs` must have one shape, got {logits.shape} and {target_probs.shape}."
        )
    return -(target_probs.float() * functional.log_softmax(logits.float(), dim=-1)).sum(dim=-1)


def hard_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute the cross-entropy of the student against label ids.

    Args:
        logits (`torch.Tensor` of shape `(num_examples, num_labels)`):
            Student logits.
        labels (`torch.LongTensor` of shape `(num_examples,)`):
            Label ids.

    Returns:
        `torch.Tensor` of shape `(num_examples,)`.

    Examples:
        >>> hard_cross_entropy(torch.zeros(1, 2), torch.tensor([1])).tolist()
        [0.6931471824645996]
    """
    return functional.cross_entropy(logits.float(), labels, reduction="none")

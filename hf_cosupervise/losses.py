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


def sparse_soft_cross_entropy(
    logits: torch.Tensor, label_ids: torch.Tensor, label_probs: torch.Tensor, rest_probs: torch.Tensor
) -> torch.Tensor:
    """Compute [`soft_cross_entropy`] against pseudolabels that name k labels, without building all the others.

    With r the probability of every label that is not named, -sum_c y_c log s_c = -sum_k (y_k - r) log s_k -
    r sum_c log s_c.

    Args:
        logits (`torch.Tensor` of shape `(num_examples, num_labels)`):
            Student logits.
        label_ids (`torch.LongTensor` of shape `(num_examples, k)`):
            Labels that are named, each once.
        label_probs (`torch.Tensor` of shape `(num_examples, k)`):
            Their probabilities.
        rest_probs (`torch.Tensor` of shape `(num_examples,)`):
            Probability of each other label.

    Returns:
        `torch.Tensor` of shape `(num_examples,)`.

    Examples:
        >>> ids, probs, rest = torch.tensor([[1]]), torch.tensor([[0.5]]), torch.tensor([0.25])
        >>> sparse_soft_cross_entropy(torch.zeros(1, 3), ids, probs, rest).tolist()
        [1.0986123085021973]
    """
    log_probs = functional.log_softmax(logits.float(), dim=-1)
    excess = label_probs.float() - rest_probs.float().unsqueeze(-1)
    return -(excess * log_probs.gather(1, label_ids)).sum(dim=1) - rest_probs.float() * log_probs.sum(dim=1)


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

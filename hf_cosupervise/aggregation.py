"""Several teachers into one pseudolabel per example, with no student asked."""

from __future__ import annotations

import torch
from torch.nn import functional

from .assignment import first_argmax


def mean_probs(teacher_probs: torch.Tensor, answered: torch.Tensor) -> torch.Tensor:
    """Average the probabilities of the teachers that answered.

    Args:
        teacher_probs (`torch.Tensor` of shape `(num_examples, num_teachers, num_labels)`):
            Rows sum to 1, or are all zero where there is no answer.
        answered (`torch.BoolTensor` of shape `(num_examples, num_teachers)`):
            Who answered.

    Returns:
        `torch.Tensor` of shape `(num_examples, num_labels)`: rows sum to 1, all zero where nobody answered.

    Examples:
        >>> mean_probs(torch.tensor([[[1.0, 0.0], [0.5, 0.5]]]), torch.tensor([[True, True]])).tolist()
        [[0.75, 0.25]]
    """
    weights = answered.to(teacher_probs.dtype)
    total = (teacher_probs * weights.unsqueeze(-1)).sum(dim=1)
    return total / weights.sum(dim=1, keepdim=True).clamp(min=1)


def majority_vote(labels: torch.Tensor, num_labels: int) -> torch.Tensor:
    """Let every teacher that answered cast one vote.

    Args:
        labels (`torch.LongTensor` of shape `(num_examples, num_teachers)`):
            Hard labels, -1 where a teacher has no answer.
        num_labels (`int`):
            Number of labels.

    Returns:
        `torch.Tensor` of shape `(num_examples, num_labels)`: 1 at the label with most votes (ties to the lowest
        label), all zero where nobody answered.

    Examples:
        >>> majority_vote(torch.tensor([[2, 1, 2], [1, 0, -1]]), num_labels=3).argmax(dim=1).tolist()
        [2, 0]
    """
    votes = functional.one_hot(labels.clamp(min=0), num_labels) * (labels >= 0).unsqueeze(-1)
    counts = votes.sum(dim=1)
    winner = functional.one_hot(first_argmax(counts), num_labels)
    return (winner * (counts.sum(dim=-1, keepdim=True) > 0)).float()

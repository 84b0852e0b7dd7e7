"""RAVEN: weights of teachers that are learned beside a student."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .aggregation import check_teacher_probs, harden
from .losses import soft_cross_entropy
from .weighting import weighted_mean


class RavenFit(NamedTuple):
    """What [`fit_raven`] finds."""

    weight: torch.Tensor  # of the student's head, (num_labels, feature_size)
    bias: torch.Tensor  # (num_labels,)
    teacher_weights: torch.Tensor  # (num_teachers,), of sum 1 over those that ever answered: for `weighted_mean_probs`


def fit_raven(
    features: torch.Tensor,
    teacher_probs: torch.Tensor,
    answered: torch.Tensor,
    *,
    epochs: int = 20,
    easy_epochs: int = 5,
    learning_rate: float = 1e-3,
    weight_learning_rate: float = 1e-3,
    batch_size: int = 256,
    seed: int = 0,
) -> RavenFit:
    """Fit a linear student and the weights of its teachers on the same loss.

    The label is y_i = sum_k w_k t_ik over the teachers that answered, the loss the mean cross-entropy of the student
    against y; Adam moves the head (from zero), plain SGD w (from equal shares), and after each step w is clamped from
    below at 1e-6 and normalised. The first `easy_epochs` take only examples on which all answering teachers have the
    same most probable label, and leave w alone. Hard teachers are one-hot rows, like any others; the released code
    raises on them.

    Takes features `(num_examples, feature_size)`, what [`aggregate`] does (examples without an answer are left out),
    rates of the head and of w, and a seed for the order of the examples. Gives [`RavenFit`], in the precision of the
    features but at least float32. A `ValueError` if shapes or values are not as said above, or if there is nothing to
    learn from.
    Source: RAVEN, arXiv 2510.21332; missing answers are ours. The loss is linear in w and lowest at the teacher that
    the student follows already, hence the easy start.

    Examples:
        >>> probs = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]]).repeat(50, 1, 1)
        >>> fit = fit_raven(torch.tensor([[1.0], [-1.0]]).repeat(50, 1), probs, torch.ones(100, 2, dtype=torch.bool))
        >>> fit.teacher_weights.tolist()
        [0.5, 0.5]
    """
    _check_raven(features, teacher_probs, answered, (epochs, batch_size), easy_epochs)
    usable = answered.any(dim=1).nonzero().flatten()
    easy = usable[unanimous(teacher_probs, answered)[usable]]
    if len(easy if easy_epochs else usable) == 0:
        raise ValueError(
            f"Nothing to learn from: of {len(features)} examples {len(usable)} have an answer, and on {len(easy)} of "
            "them all teachers agree. Set `easy_epochs=0` to start without agreement."
        )
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    # From zero, so that at the first step the student says the same of all labels, and favours no teacher.
    weight = features.new_zeros(teacher_probs.shape[2], features.shape[1]).requires_grad_()
    bias = features.new_zeros(teacher_probs.shape[2]).requires_grad_()
    optimizer = torch.optim.Adam([weight, bias], lr=learning_rate)
    can_speak = answered.any(dim=0)
    teacher_weights = _project(torch.ones_like(can_speak, dtype=features.dtype), can_speak)
    # Of the CPU, whose numbers are the same on every machine.
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        is_easy = epoch < easy_epochs
        rows = easy if is_easy else usable
        order = torch.randperm(len(rows), generator=generator).to(rows.device)
        for batch in rows[order].split(batch_size):
            current = teacher_weights.clone().requires_grad_()
            targets = weighted_mean(teacher_probs[batch], answered[batch], current)
            logits = torch.nn.functional.linear(features[batch], weight, bias)
            optimizer.zero_grad()
            soft_cross_entropy(logits, targets).mean().backward()
            optimizer.step()
            # The loss is lowest at the teacher that the student follows already, so w waits until the student follows
            # what all of them say.
            if is_easy or current.grad is None:
                continue
            # A plain step, because Adam's would be as large for a teacher of which the loss says nothing.
            teacher_weights = _project(current.detach() - weight_learning_rate * current.grad, can_speak)
    return RavenFit(weight.detach(), bias.detach(), teacher_weights)


def _project(weights: torch.Tensor, can_speak: torch.Tensor) -> torch.Tensor:
    """Clamp at 1e-6 and normalise over those who can speak."""
    weights = weights.clamp(min=1e-6) * can_speak
    return weights / weights.sum(dim=-1, keepdim=True)


def unanimous(teacher_probs: torch.Tensor, answered: torch.Tensor) -> torch.Tensor:
    """Tell where all teachers that answered have the same most probable label; True where nobody answered, too."""
    labels = harden(teacher_probs, answered)
    highest = labels.amax(dim=1, keepdim=True)
    return ((labels == highest) | ~answered).all(dim=1)


def _check_raven(
    features: torch.Tensor, teacher_probs: torch.Tensor, answered: torch.Tensor, counts: tuple[int, ...], easy: int
) -> None:
    check_teacher_probs(teacher_probs, answered)
    if features.ndim != 2 or len(features) != len(teacher_probs) or not bool(features.isfinite().all()):
        raise ValueError(
            f"Expected finite `features` of shape ({len(teacher_probs)}, feature_size), got {tuple(features.shape)}."
        )
    if min(counts) < 1 or not 0 <= easy <= counts[0]:
        raise ValueError(
            "Expected `epochs` and `batch_size` of at least 1 and `easy_epochs` from 0 to `epochs`, got "
            f"{counts[0]}, {counts[1]} and {easy}."
        )

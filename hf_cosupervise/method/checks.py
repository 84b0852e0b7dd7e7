"""What several functions of the method refuse, each in one sentence for all of them."""

from __future__ import annotations

from numbers import Integral

import torch

from .metrics import SUM_TOLERANCE


def check_answered(answered: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Refuse what does not say who answered, booleans `(num_examples, num_teachers)` with a teacher or more."""
    if answered.dtype != torch.bool or tuple(answered.shape) != shape or len(shape) != 2 or shape[1] == 0:
        raise ValueError(
            "`answered` must be booleans of shape (num_examples, num_teachers) with at least one teacher, "
            f"{shape} here, got {tuple(answered.shape)} of {answered.dtype}. Say of each teacher and example whether "
            "it answered."
        )


def check_label_ids(labels: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Refuse labels `(num_examples,)` that are not one of the columns of each row of a shape.

    Examples:
        >>> check_label_ids(torch.tensor([0, 3]), (2, 3))
        Traceback (most recent call last):
        ValueError: Labels must lie in 0..2, got 0..3. Leave out examples without a label.
    """
    is_whole = not (labels.is_floating_point() or labels.dtype == torch.bool)
    if len(shape) != 2 or labels.shape != shape[:1] or not is_whole:
        raise ValueError(
            f"Labels must be label ids of shape (num_examples,) for (num_examples, num_labels) = {tuple(shape)}, got "
            f"{tuple(labels.shape)} of {labels.dtype}. Give one integer per example."
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < shape[1]:
        raise ValueError(
            f"Labels must lie in 0..{shape[1] - 1}, got {int(labels.min())}..{int(labels.max())}. Leave out "
            "examples without a label."
        )


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


def check_answers(teacher_probs: torch.Tensor, answered: torch.Tensor) -> None:
    """Refuse shapes that are not those of the output of teachers."""
    if teacher_probs.ndim != 3 or answered.shape != teacher_probs.shape[:2] or answered.dtype != torch.bool:
        raise ValueError(
            "Expected `teacher_probs` of shape (num_examples, num_teachers, num_labels) and boolean `answered` of "
            f"shape (num_examples, num_teachers), got {tuple(teacher_probs.shape)} and {tuple(answered.shape)} of "
            f"{answered.dtype}. Give both for the same examples."
        )


def check_weights(weights: torch.Tensor, *shapes: tuple[int, ...]) -> None:
    """Refuse weights of teachers that are of no such shape, negative or not finite."""
    if weights.shape not in shapes or not bool(((weights >= 0) & weights.isfinite()).all()):
        wanted = " or ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(
            f"Expected finite `weights` of shape {wanted}, each at least 0, got {weights}. Give one for each teacher."
        )


def check_prob_rows(probs: torch.Tensor, name: str) -> None:
    """Refuse rows `(num_examples, num_labels)`, of two labels or more, that are no probabilities."""
    sums = probs.sum(dim=-1, dtype=torch.float64)
    is_right = bool(((sums - 1).abs() <= SUM_TOLERANCE).all() & (probs >= 0).all())
    if probs.ndim != 2 or probs.shape[1] < 2 or not is_right:
        raise ValueError(
            f"Rows of `{name}` must be probabilities of two labels or more that sum to 1, got shape "
            f"{tuple(probs.shape)} with other sums, negative numbers or NaN. Leave out examples without an answer. "
            "Give softmax outputs, not logits."
        )


def check_min_prob(min_prob: float) -> None:
    """Refuse what is no bound of probabilities inside a logarithm."""
    if not 0 < min_prob < 1:
        raise ValueError(f"`min_prob` must be in (0, 1), got {min_prob}. Leave it out for 1e-6.")

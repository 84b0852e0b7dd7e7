"""AE-KD: weights of teachers that balance their gradients on a batch."""

from __future__ import annotations

import math

import torch

from .aggregation import check_teacher_probs
from .min_norm import min_norm_weights

_MIN_PROB = 1e-6


def aekd_weights(
    student_logits: torch.Tensor,
    teacher_probs: torch.Tensor,
    answered: torch.Tensor,
    *,
    temperature: float = 4.0,
    cap: float = 0.6,
) -> torch.Tensor:
    """Weigh the teachers of a batch so that their gradients on the student's outputs oppose each other least.

    g_m is the mean over what teacher m answered of the gradient of T^2 KL(softmax(t_m/T) || softmax(s/T)) by s, which
    is T (softmax(s/T) - softmax(t_m/T)); the weights are [`min_norm_weights`] of them, made anew for every batch and
    without gradient, for a loss of sum_m w_m times the mean of that over what teacher m answered. One vector serves a
    whole batch, so a specialist counts alike inside and outside its scope.

    Takes logits `(batch, num_labels)`, and what [`aggregate`] takes, of which t is the logarithm, of at least 1e-6; T
    is above 0. The cap is raised to 1/m where only m teachers answered in the batch and it leaves no room. Anything
    else is a `ValueError`.
    Source: Du et al., Agree to Disagree, NeurIPS 2020; missing answers are ours.

    Returns:
        `torch.Tensor` of shape `(num_teachers,)`, float32: sums to 1, 0 for a teacher without an answer, all zero if
        nobody answered.

    Examples:
        >>> probs, answered = torch.tensor([[[0.9, 0.1], [0.2, 0.8]]]), torch.tensor([[True, True]])
        >>> [round(w, 3) for w in aekd_weights(torch.zeros(1, 2), probs, answered, temperature=1.0, cap=1.0).tolist()]
        [0.429, 0.571]
    """
    check_teacher_probs(teacher_probs, answered)
    if student_logits.shape != (teacher_probs.shape[0], teacher_probs.shape[2]) or temperature <= 0:
        raise ValueError(
            f"Expected `student_logits` of shape ({teacher_probs.shape[0]}, {teacher_probs.shape[2]}) and a "
            f"`temperature` above 0, got {tuple(student_logits.shape)} and {temperature}."
        )
    student = (student_logits.detach().double() / temperature).softmax(dim=-1)
    weights = torch.zeros(teacher_probs.shape[1], device=teacher_probs.device)
    speakers = answered.any(dim=0).nonzero().flatten().tolist()
    if not speakers:
        return weights
    gradients = []
    for k in speakers:
        rows = answered[:, k]
        teacher = (teacher_probs[rows, k].double().clamp(min=_MIN_PROB).log() / temperature).softmax(dim=-1)
        gradients.append(temperature * (student[rows] - teacher).mean(dim=0))
    weights[speakers] = min_norm_weights(torch.stack(gradients), max(cap, 1 / len(speakers))).to(weights.dtype)
    return weights


class AdaptiveEnsembleDistillation:
    """Distil from several teachers at once, with shares of [`aekd_weights`] for every batch.

    The loss of example i is T^2 sum_m w_m KL(softmax(t_im/T) || softmax(s_i/T)) over the teachers that answered it,
    with t the logarithm of their probabilities and w without gradient. Made for
    `CoSupervisedTrainer(loss_func=...)` on a pool of the same examples, all of whose answers stay in memory. Its
    arguments, errors and source are those of [`aekd_weights`].

    Examples:
        >>> probs, answered = torch.tensor([[[0.9, 0.1], [0.2, 0.8]]]), torch.tensor([[True, True]])
        >>> loss = AdaptiveEnsembleDistillation(probs, answered, temperature=1.0, cap=1.0)
        >>> [round(value, 3) for value in loss(torch.zeros(1, 2), None, torch.tensor([0])).tolist()]
        [0.268]
    """

    def __init__(
        self, teacher_probs: torch.Tensor, answered: torch.Tensor, *, temperature: float = 4.0, cap: float = 0.6
    ) -> None:
        check_teacher_probs(teacher_probs, answered)
        if not (0 < temperature < math.inf and 0 < cap <= 1):
            raise ValueError(
                f"Expected a `temperature` above 0 and a `cap` in (0, 1], got {temperature} and {cap}. Leave them out "
                "for 4 and 0.6."
            )
        self.teacher_probs, self.answered = teacher_probs, answered
        self.temperature, self.cap = temperature, cap

    def __call__(self, logits: torch.Tensor, target_probs: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
        """Give the loss of each example of a batch."""
        # Answers stay where they are; those of a batch alone go to the student's device.
        rows = rows.to(self.answered.device)
        probs, answered = self.teacher_probs[rows].to(logits.device), self.answered[rows].to(logits.device)
        weights = aekd_weights(logits, probs, answered, temperature=self.temperature, cap=self.cap) * answered
        # What is one-hot has no logarithm of its zeros.
        teacher = (probs.float().clamp(min=_MIN_PROB).log() / self.temperature).log_softmax(dim=-1)
        student = (logits.float() / self.temperature).log_softmax(dim=-1)
        divergences = (teacher.exp() * (teacher - student.unsqueeze(1))).sum(dim=-1)
        return self.temperature**2 * (weights * divergences).sum(dim=1)

"""AE-KD: weights of teachers that balance their gradients on a batch."""

from __future__ import annotations

import math

import numpy as np
import torch

from .aggregation import check_teacher_probs

_RIDGE = 1e-10
_MIN_PROB = 1e-6


def min_norm_weights(gradients: torch.Tensor, cap: float = 0.6) -> torch.Tensor:
    """Find the shares of teachers whose mixed gradient is shortest.

    argmin |sum_m w_m g_m|^2 over w_m >= 0, sum_m w_m = 1 and w_m <= cap, by active sets: exact but for a term of
    1e-10 |w|^2 sum_m |g_m|^2, which picks the most even w where several are as good (two equal teachers).

    Args:
        gradients (`torch.Tensor` of shape `(num_teachers, num_directions)`):
            One gradient for each teacher.
        cap (`float`, *optional*, defaults to 0.6):
            The largest share, in [1/num_teachers, 1]. A single teacher has share 1 whatever the cap.

    Returns:
        `torch.DoubleTensor` of shape `(num_teachers,)`, sums to 1.

    Raises:
        ValueError: If the cap leaves no room for a sum of 1, or gradients are not finite.

    Source:
        Du et al., Agree to Disagree, NeurIPS 2020.

    Examples:
        >>> gradients = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> [round(weight, 6) for weight in min_norm_weights(gradients, cap=1.0).tolist()]
        [0.8, 0.2]
        >>> [round(weight, 6) for weight in min_norm_weights(gradients).tolist()]
        [0.6, 0.4]
    """
    if gradients.ndim != 2 or len(gradients) == 0 or not bool(gradients.isfinite().all()):
        raise ValueError(
            "Expected finite `gradients` of shape (num_teachers, num_directions) of one teacher or more, got shape "
            f"{tuple(gradients.shape)}."
        )
    num_teachers = len(gradients)
    if num_teachers == 1:
        return torch.ones(1, dtype=torch.float64, device=gradients.device)
    if not 1 / num_teachers - 1e-12 <= cap <= 1:  # a cap of 1 / 3 is one, however it was rounded
        raise ValueError(
            f"`cap` must be in [1/{num_teachers}, 1] for {num_teachers} teachers, or shares cannot sum to 1, got "
            f"{cap}."
        )
    # In float64 and scaled to 1: squares of small gradients would vanish beside the ridge.
    rows = gradients.detach().double().cpu()
    scale = float(rows.abs().max())
    rows = rows / scale if scale > 0 else rows
    gram = (rows @ rows.T).numpy()
    gram = gram / max(float(np.trace(gram)), 1.0) + _RIDGE * np.eye(num_teachers)  # a trace of 0: no gradient at all
    return torch.from_numpy(_solve_capped(gram, cap)).to(gradients.device)


def _solve_capped(gram: np.ndarray, cap: float) -> np.ndarray:
    """Minimise w G w over the capped simplex, G positive definite: move until a bound blocks, release what pulls."""
    num = len(gram)
    weights, free = np.full(num, 1 / num), np.ones(num, dtype=bool)
    for _ in range(100 * num):  # each pass ends at a new set of bounds; far fewer are met
        goal = _solve_free(gram, weights, free)
        step = goal - weights
        room = np.full(num, np.inf)
        down, up = free & (step < 0), free & (step > 0)
        room[down] = weights[down] / -step[down]
        room[up] = np.maximum(cap - weights[up], 0) / step[up]
        blocking = int(room.argmin())
        if room[blocking] < 1 and free.sum() > 1:  # the last one is where the others leave it, but for rounding
            weights = weights + room[blocking] * step
            weights[blocking] = cap if up[blocking] else 0.0
            free[blocking] = False
            continue
        weights = goal
        slopes = gram @ weights
        level = slopes[free].mean()
        pulls = ~free & np.where(weights > 0, slopes > level + 1e-12, slopes < level - 1e-12)
        if not pulls.any():
            return weights.clip(0, cap)
        free[int(pulls.argmax())] = True  # the first, which cannot go round in circles
    raise ArithmeticError(f"No shares found for {num} teachers; their gradients span too many orders of magnitude.")


def _solve_free(gram: np.ndarray, weights: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Minimise over the free weights while the others stay and the sum is 1."""
    num = int(free.sum())
    system = np.zeros((num + 1, num + 1))
    system[:num, :num] = gram[np.ix_(free, free)]
    system[:num, num] = system[num, :num] = 1.0
    right = np.append(-gram[np.ix_(free, ~free)] @ weights[~free], 1 - weights[~free].sum())
    goal = weights.copy()
    goal[free] = np.linalg.solve(system, right)[:num]
    return goal


def aekd_weights(
    student_logits: torch.Tensor,
    teacher_probs: torch.Tensor,
    answered: torch.Tensor,
    *,
    temperature: float = 4.0,
    cap: float = 0.6,
    min_prob: float = _MIN_PROB,
) -> torch.Tensor:
    """Weigh the teachers of a batch so that their gradients on the student's outputs oppose each other least.

    g_m is the mean over what teacher m answered of the gradient of T^2 KL(softmax(t_m/T) || softmax(s/T)) by s, which
    is T (softmax(s/T) - softmax(t_m/T)); the weights are [`min_norm_weights`] of them, made anew for every batch and
    without gradient, for a loss of sum_m w_m times the mean of that over what teacher m answered. One vector serves a
    whole batch, so a specialist counts alike inside and outside its scope.

    Args:
        student_logits (`torch.Tensor` of shape `(batch, num_labels)`):
            Student logits.
        teacher_probs, answered (`torch.Tensor`):
            See [`aggregate`]; t is the logarithm of `teacher_probs`.
        temperature (`float`, *optional*, defaults to 4.0):
            T, above 0.
        cap (`float`, *optional*, defaults to 0.6):
            The largest share; raised to 1/m where only m teachers answered in the batch and it leaves no room.
        min_prob (`float`, *optional*, defaults to 1e-6):
            Probabilities are at least this inside the logarithm.

    Returns:
        `torch.Tensor` of shape `(num_teachers,)`, float32: sums to 1, 0 for a teacher without an answer, all zero if
        nobody answered.

    Raises:
        ValueError: If shapes or values are not as said above.

    Source:
        Du et al., Agree to Disagree, NeurIPS 2020; missing answers are ours.

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
        teacher = (teacher_probs[rows, k].double().clamp(min=min_prob).log() / temperature).softmax(dim=-1)
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
        rows = rows.to(self.answered.device)
        probs, answered = self.teacher_probs[rows].to(logits.device), self.answered[rows].to(logits.device)
        options = {"temperature": self.temperature, "cap": self.cap, "min_prob": _MIN_PROB}
        weights = aekd_weights(logits, probs, answered, **options) * answered
        teacher = (probs.float().clamp(min=_MIN_PROB).log() / self.temperature).log_softmax(dim=-1)
        student = (logits.float() / self.temperature).log_softmax(dim=-1)
        divergences = (teacher.exp() * (teacher - student.unsqueeze(1))).sum(dim=-1)
        return self.temperature**2 * (weights * divergences).sum(dim=1)

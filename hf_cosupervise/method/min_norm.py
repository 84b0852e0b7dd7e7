"""The shortest mix of several gradients."""

from __future__ import annotations

import numpy as np
import torch

_RIDGE = 1e-10


def min_norm_weights(gradients: torch.Tensor, cap: float = 0.6) -> torch.Tensor:
    """Find the shares of teachers whose mixed gradient is shortest, `(num_teachers,)` in float64, with a sum of 1.

    argmin |sum_m w_m g_m|^2 over w_m >= 0, sum_m w_m = 1 and w_m <= cap, by active sets: exact but for a term of
    1e-10 |w|^2 sum_m |g_m|^2, which picks the most even w where several are as good (two equal teachers). Gradients
    `(num_teachers, num_directions)` are finite and the cap is in [1/num_teachers, 1], or a `ValueError`; a single
    teacher has share 1 whatever the cap.
    Source: Du et al., Agree to Disagree, NeurIPS 2020.

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

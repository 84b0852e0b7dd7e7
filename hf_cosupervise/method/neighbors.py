"""Which examples lie next to each other in the features of a frozen backbone, and what they say together."""

from __future__ import annotations

from numbers import Integral

import torch
from torch.nn import functional

# Rows that are compared with all at once: at 100,000 examples 0.8 GB of similarities.
_BLOCK = 2048
_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@torch.no_grad()
def nearest_neighbors(features: torch.Tensor, k: int) -> torch.Tensor:
    """Find the k nearest other examples of each example by cosine similarity, exactly.

    The work grows with the square of the number of examples: seconds for 20,000 of 1,280 features, minutes for
    100,000. Memory does not. Features `(num_examples, feature_size)` are finite, of any floating type, and may be
    mapped from disk; k is from 1 to `num_examples - 1`; else a `ValueError`.

    Returns:
        `torch.LongTensor` of shape `(num_examples, k)`, on the CPU: rows, most similar first, never the example's own.

    Examples:
        >>> nearest_neighbors(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]]), k=1).flatten().tolist()
        [1, 0, 3, 2]
    """
    if features.ndim != 2:
        raise ValueError(
            f"`features` must have shape (num_examples, feature_size), got {tuple(features.shape)}. Give one row each."
        )
    num_examples = features.shape[0]
    if not isinstance(k, Integral) or not 1 <= k < num_examples:
        raise ValueError(
            f"`k` must be a whole number in 1..{num_examples - 1} for {num_examples} examples, got {k!r}. Ask for "
            "fewer neighbours."
        )
    unit = functional.normalize(features.float(), dim=1)
    if not bool(unit.isfinite().all()):  # which tells of the features, too
        raise ValueError(
            "`features` must be finite, got NaN or infinity. Check the inputs, and whether half precision is enough."
        )
    found = torch.empty(num_examples, k, dtype=torch.long)
    for start in range(0, num_examples, _BLOCK):
        similarity = unit[start : start + _BLOCK] @ unit.T
        rows = torch.arange(similarity.shape[0], device=similarity.device)
        # Itself, by row: of two equal examples each must be found by the other.
        similarity[rows, rows + start] = -torch.inf
        found[start : start + _BLOCK] = similarity.topk(k, dim=1).indices.cpu()
    return found


def mean_over_neighbors(values: torch.Tensor, neighbors: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Average the values `(num_examples, num_columns)` of each example and its neighbours, those that are known.

    Such as how far each teacher is from the student. Takes what [`nearest_neighbors`] gives, and booleans of the shape
    of the values; means are infinite where nothing is known. A `ValueError` if shapes do not fit.
    Source: ours: one student's agreement with a teacher on one example is noisy; teachers that are good at a part of
    the task are good at what lies next to it. Measured in `recipes/README.md`.

    Examples:
        >>> values, known = torch.tensor([[1.0], [3.0], [9.0]]), torch.tensor([[True], [True], [False]])
        >>> mean_over_neighbors(values, torch.tensor([[1], [2], [1]]), known).flatten().tolist()
        [2.0, 3.0, 3.0]
    """
    _check_neighbors(values, neighbors, known)
    counted = torch.where(known, values, values.new_zeros(()))
    total, count = counted.clone(), known.to(values.dtype)
    share = count.clone()
    for column in neighbors.T:  # one neighbour of all examples at a time: no array of all of them
        rows = column.long()  # bytes would be taken for a mask
        total += counted[rows]
        count += share[rows]
    return torch.where(count > 0, total / count.clamp(min=1), torch.inf)


def _check_neighbors(values: torch.Tensor, neighbors: torch.Tensor, known: torch.Tensor) -> None:
    if values.ndim != 2 or known.shape != values.shape or known.dtype != torch.bool:
        raise ValueError(
            "`values` and booleans `known` must have one shape (num_examples, num_columns), got "
            f"{tuple(values.shape)} and {tuple(known.shape)} of {known.dtype}. Give both for the same examples."
        )
    check_neighbors(neighbors, len(values))


def check_neighbors(neighbors: torch.Tensor, num_examples: int) -> None:
    """Refuse what are no rows `(num_examples, k)` of as many examples."""
    if neighbors.ndim != 2 or len(neighbors) != num_examples or neighbors.dtype not in _WHOLE:
        raise ValueError(
            f"`neighbors` must be rows of shape ({num_examples}, k), got {tuple(neighbors.shape)} of "
            f"{neighbors.dtype}. Use `nearest_neighbors` on the same examples."
        )
    if neighbors.numel() and not (int(neighbors.min()) >= 0 and int(neighbors.max()) < num_examples):
        raise ValueError(
            f"`neighbors` must lie in 0..{num_examples - 1}, got {int(neighbors.min())}..{int(neighbors.max())}. Use "
            "`nearest_neighbors` on the same examples."
        )

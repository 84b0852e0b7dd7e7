"""Top-k soft labels: how a teacher's probabilities are stored and read back."""

from __future__ import annotations

import numpy as np

# float16 rounding of a probability vector moves its sum by less than this (measured: 3e-4 at 100 labels).
SUM_TOLERANCE = 2e-3


def label_dtype(num_labels: int) -> np.dtype:
    """Give the smallest integer type that holds every label id.

    Args:
        num_labels (`int`):
            Number of labels, at least 1.

    Returns:
        `np.dtype`: `uint8`, `uint16` or `int32`.

    Examples:
        >>> label_dtype(10), label_dtype(1000)
        (dtype('uint8'), dtype('uint16'))
    """
    if num_labels <= 2**8:
        return np.dtype(np.uint8)
    return np.dtype(np.uint16) if num_labels <= 2**16 else np.dtype(np.int32)


def default_pool_k(num_labels: int) -> int:
    """Give how many labels per row a pool keeps by default: `min(16, num_labels)`.

    Args:
        num_labels (`int`):
            Number of labels.

    Returns:
        `int`
    """
    return min(16, num_labels)


def encode_top_k(probs: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Keep the `k` most probable labels of each row, in float16.

    The order is by the *stored* (rounded) probability, descending, ties to the lowest label, so that the first stored
    label is the argmax of what is read back.

    Args:
        probs (`np.ndarray` of shape `(num_examples, num_labels)`):
            Rows sum to 1, or are all zero where there is no answer.
        k (`int`):
            1 to `num_labels`.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: label ids (smallest integer type) and float16 probabilities, both of shape
        `(num_examples, k)`. A row without an answer is all zero.

    Raises:
        ValueError: If `k` is out of range, or a row is negative, not finite, or neither sums to 1 nor is all zero.

    Examples:
        >>> ids, stored = encode_top_k(np.array([[0.25, 0.5, 0.25]]), k=2)
        >>> ids.tolist(), stored.tolist()
        ([[1, 0]], [[0.5, 0.25]])
    """
    probs = np.asarray(probs, dtype=np.float32)
    if probs.ndim != 2:
        raise ValueError(f"`probs` must have shape (num_examples, num_labels), got {probs.shape}.")
    num_labels = probs.shape[1]
    if not 1 <= k <= num_labels:
        raise ValueError(f"`k` must lie in 1..{num_labels} (the number of labels), got {k}.")
    _check_rows(probs, "probs")
    sums = probs.sum(axis=1)
    if (wrong := np.flatnonzero((sums < 1 - SUM_TOLERANCE) & (sums != 0))).size:
        raise ValueError(f"Rows of `probs` must sum to 1 or be all zero, got {sums[wrong[0]]:.4f} in row {wrong[0]}.")
    # Scaled first, so that what is stored keeps within the tolerance whatever the rounding does.
    rounded = np.divide(probs, sums[:, None], out=np.zeros_like(probs), where=sums[:, None] > 0).astype(np.float16)
    # A stable sort of the negated values puts the lowest label first among equals.
    order = np.argsort(-rounded, axis=1, kind="stable")[:, :k]
    label_probs = np.take_along_axis(rounded, order, axis=1)
    label_ids = np.where(sums[:, None] > 0, order, 0).astype(label_dtype(num_labels))
    return label_ids, label_probs


def decode_top_k(label_ids: np.ndarray, label_probs: np.ndarray, num_labels: int) -> np.ndarray:
    """Turn stored rows back into full probability vectors.

    Mass that was not stored is spread evenly over the labels that were not stored; a row is then scaled to sum to 1.

    Args:
        label_ids (`np.ndarray` of shape `(num_examples, k)`):
            Label ids.
        label_probs (`np.ndarray` of shape `(num_examples, k)`):
            Their probabilities; all zero where there is no answer.
        num_labels (`int`):
            Number of labels of the task.

    Returns:
        `np.ndarray` of shape `(num_examples, num_labels)`, float32: rows sum to 1, or are all zero.

    Examples:
        >>> decode_top_k(np.array([[1]]), np.array([[0.5]]), num_labels=3).tolist()
        [[0.25, 0.5, 0.25]]
    """
    stored = np.asarray(label_probs, dtype=np.float32)
    num_examples, k = stored.shape
    answered = stored[:, :1] > 0
    probs = np.zeros((num_examples, num_labels), dtype=np.float32)
    if k < num_labels:
        rest = np.clip(1.0 - stored.sum(axis=1, keepdims=True), 0.0, None) / (num_labels - k)
        # A label that was left out never beats one that was kept, and never ties with the most probable one.
        first, last = stored[:, :1], stored[:, -1:]
        most = np.where(last < first, last, first * np.float32(1 - 2**-20))
        probs[:] = np.where(answered, np.minimum(rest, most), 0.0)
    np.put_along_axis(probs, np.asarray(label_ids, dtype=np.int64), stored, axis=1)
    sums = probs.sum(axis=1, keepdims=True)
    return np.divide(probs, sums, out=np.zeros_like(probs), where=answered & (sums > 0))


def check_top_k(label_ids: np.ndarray, label_probs: np.ndarray, num_labels: int, name: str) -> None:
    """Check stored rows of one teacher.

    Args:
        label_ids (`np.ndarray` of shape `(num_examples, k)`):
            Label ids.
        label_probs (`np.ndarray` of shape `(num_examples, k)`):
            Their probabilities.
        num_labels (`int`):
            Number of labels of the task.
        name (`str`):
            Who is checked, for the error.

    Raises:
        ValueError: If a probability is negative or not finite, a row sums to more than 1, is not in descending order,
            or names a label twice or one that does not exist.
    """
    if label_ids.shape != label_probs.shape or label_ids.ndim != 2 or not 1 <= label_ids.shape[1] <= num_labels:
        raise ValueError(
            f"Pseudolabels of '{name}' must be two arrays of one shape (num_examples, k) with k in 1..{num_labels}, "
            f"got {label_ids.shape} and {label_probs.shape}."
        )
    _check_rows(label_probs, f"'{name}'")
    if label_ids.size == 0:
        return
    if label_ids.min() < 0 or label_ids.max() >= num_labels:
        raise ValueError(
            f"Label ids of '{name}' must lie in 0..{num_labels - 1}, got {label_ids.min()}..{label_ids.max()}."
        )
    answered = label_probs[:, 0] > 0
    if (np.diff(label_probs.astype(np.float32), axis=1) > 0).any():
        raise ValueError(
            f"Probabilities of '{name}' must stand in descending order in each row. Build it with `encode_top_k`."
        )
    if label_ids.shape[1] > 1 and (np.diff(np.sort(label_ids[answered].astype(np.int64), axis=1), axis=1) == 0).any():
        raise ValueError(
            f"A row of '{name}' must name each label once, got a repeated label. Build it with `encode_top_k`."
        )


def _check_rows(probs: np.ndarray, name: str) -> None:
    values = probs.astype(np.float32, copy=False)
    finite = np.isfinite(values).all(axis=1)
    negative = (values < 0).any(axis=1)
    with np.errstate(invalid="ignore"):
        sums = values.sum(axis=1)
        too_much = sums > 1 + SUM_TOLERANCE
    for bad, what in ((~finite, "is not finite"), (negative, "is negative"), (too_much, "sums to more than 1")):
        if (rows := np.flatnonzero(bad)).size:
            raise ValueError(
                f"Probabilities of {name} must be finite, not negative and sum to at most 1 in each row: "
                f"row {rows[0]} {what} (got {values[rows[0]].tolist()[:8]}), {rows.size} such rows in all."
            )

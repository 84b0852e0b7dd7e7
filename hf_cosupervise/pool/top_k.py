"""Top-k soft labels: how a teacher's probabilities are stored and read back."""

from __future__ import annotations

import numbers

import numpy as np
import torch

from ..method.metrics import SUM_TOLERANCE


def label_dtype(num_labels: int) -> np.dtype:
    """Give the smallest integer type that holds every label id: `uint8`, `uint16` or `int32`."""
    if num_labels <= 2**8:
        return np.dtype(np.uint8)
    return np.dtype(np.uint16) if num_labels <= 2**16 else np.dtype(np.int32)


def default_pool_k(num_labels: int) -> int:
    """Give how many labels per row a pool keeps by default."""
    # Of 1,000 labels 16 held 97.6 to 99.6 % of the probability where it was measured, and a student trained on them
    # was as accurate as one trained on all (`recipes/benchmark.py --sections truncation`).
    return min(16, num_labels)


def encode_top_k(probs: np.ndarray, k: int, name: str = "`probs`") -> tuple[np.ndarray, np.ndarray]:
    """Keep the `k` most probable labels of each row: ids and float16 probabilities, all 0 without an answer."""
    # By the *stored* (rounded) probability, descending, ties to the lowest label, so that the first stored label is
    # the argmax of what is read back. It is that of `probs` in their own precision as well: where half precision makes
    # another label equal to it, it is stored as the next larger number.
    probs = np.asarray(probs)
    if probs.ndim != 2 or probs.dtype.kind not in "fiub":
        raise ValueError(
            f"Probabilities of {name} must be numbers of shape (num_examples, num_labels), got {probs.shape} of "
            f"{probs.dtype}. Give one row per example."
        )
    # Sums and rounding in float32; which label is best is asked of what was given, where float64 may tell two apart.
    exact, probs, num_labels = probs, probs.astype(np.float32, copy=False), probs.shape[1]
    if not isinstance(k, numbers.Integral) or not 1 <= k <= num_labels:
        raise ValueError(f"`k` must lie in 1..{num_labels} (the number of labels), got {k!r}. Choose a whole number.")
    values = torch.from_numpy(np.require(probs, requirements=("C", "W")))  # torch is much faster here
    sums = values.sum(dim=1)
    # One pass over all rows; which row is wrong, and why, is looked for only where something is. NaN fails here too.
    if len(values) and not (values.amin() >= 0 and ((sums - 1).abs().le(SUM_TOLERANCE) | (sums == 0)).all()):
        _check_rows(probs, name)
        if len(wrong := ((sums < 1 - SUM_TOLERANCE) & (sums != 0)).nonzero()):
            row = int(wrong[0])
            raise ValueError(f"Rows of {name} must sum to 1 or be all zero, got {sums[row]:.4f} in row {row}.")
    # Scaled first, so that what is stored keeps within the tolerance whatever the rounding does.
    rounded = (values / torch.where(sums > 0, sums, 1)[:, None]).half().abs()  # -0 would sort below 0
    # Halves that are not negative are in the order of their bits; the label breaks ties, so no two keys are equal.
    key_dtype = torch.int32 if num_labels <= 2**16 else torch.int64
    lowest_first = torch.arange(num_labels - 1, -1, -1, dtype=key_dtype)
    bits = 16 if key_dtype is torch.int32 else 32

    def top_keys(halves: torch.Tensor) -> torch.Tensor:
        return torch.topk((halves.view(torch.int16).to(key_dtype) << bits) | lowest_first, int(k), dim=1).values

    keys = top_keys(rounded)
    first = num_labels - 1 - (keys[:, 0] & (2**bits - 1))
    best = torch.from_numpy(exact.argmax(axis=1))
    lost = ((first != best) & (sums > 0)).nonzero()[:, 0]
    if len(lost):
        # The next bit pattern of a half that is not negative is the next larger half.
        rounded.view(torch.int16)[lost, best[lost]] += 1
        # Only these rows again: they are rare, and the order of their labels has changed.
        keys[lost] = top_keys(rounded[lost])
    # Without an answer all keys tie and would name labels 0..k-1; a missing row is zero in both arrays.
    label_ids = torch.where(sums[:, None] > 0, num_labels - 1 - (keys & (2**bits - 1)), 0)
    label_probs = (keys >> bits).to(torch.int16).view(torch.float16)
    return label_ids.numpy().astype(label_dtype(num_labels)), label_probs.numpy()


def dropped_mass(probs: np.ndarray, label_ids: np.ndarray) -> float:
    """Measure the probability of all labels that are not kept, summed over the rows; at least 0."""
    if probs.ndim != 2 or label_ids.ndim != 2 or len(label_ids) != len(probs):
        raise ValueError(
            "`probs` (num_examples, num_labels) and `label_ids` (num_examples, k) are needed, got "
            f"{probs.shape} and {label_ids.shape}. Give both for the same examples."
        )
    # Nothing was left out; the difference of two sums would be rounding and no loss.
    if label_ids.shape[1] == probs.shape[1]:
        return 0.0
    _check_label_ids(label_ids, probs.shape[1], "`label_ids`")
    kept = np.take_along_axis(probs, label_ids.astype(np.int64), axis=1)
    answered = probs.sum(axis=1) > 0  # a row without an answer names label 0, which holds nothing
    # In float64: what was dropped may be less than the rounding of a float32 sum of all rows.
    return max(0.0, float(probs[answered].sum(dtype=np.float64) - kept[answered].sum(dtype=np.float64)))


def scale_top_k(label_probs: np.ndarray, num_labels: int) -> tuple[np.ndarray, np.ndarray]:
    """Say what stored rows mean: float32 probabilities of the stored labels `(num_examples, k)`, and of each other."""
    # Mass that was not stored is spread evenly over the labels that were not; a row is then scaled to sum to 1.
    stored = np.asarray(label_probs, dtype=np.float32)
    if stored.ndim != 2 or not 1 <= stored.shape[1] <= num_labels:
        raise ValueError(
            f"`label_probs` must have shape (num_examples, k) with k in 1..{num_labels}, got {stored.shape}. Give the "
            "task's number of labels as `num_labels`."
        )
    sums, num_others = stored.sum(axis=1), num_labels - stored.shape[1]
    # All of the mass is stored where k is the number of labels, whatever the stored sum is.
    rest = np.zeros_like(sums)
    if num_others:
        # A label that was left out never beats one that was kept, and never ties with the most probable one.
        first, last = stored[:, 0], stored[:, -1]
        most = np.where(last < first, last, first * np.float32(1 - 2**-20))
        rest = np.where(sums > 0, np.minimum(np.clip(1.0 - sums, 0.0, None) / num_others, most), 0.0)
        sums = sums + num_others * rest
    # Rows without an answer stay zero instead of 0 / 0.
    sums = np.where(sums > 0, sums, 1.0)
    return (stored / sums[:, None]).astype(np.float32), (rest / sums).astype(np.float32)


def decode_top_k(label_ids: np.ndarray, label_probs: np.ndarray, num_labels: int) -> np.ndarray:
    """Turn stored rows back into probabilities `(num_examples, num_labels)`, as [`scale_top_k`] says."""
    stored, rest = scale_top_k(label_probs, num_labels)
    label_ids = np.asarray(label_ids)
    if label_ids.shape != stored.shape:
        raise ValueError(
            f"`label_ids` and `label_probs` must have one shape (num_examples, k), got {label_ids.shape} and "
            f"{stored.shape}. Give both for the same examples."
        )
    _check_label_ids(label_ids, num_labels, "`label_ids`")
    probs = np.empty((len(stored), num_labels), dtype=np.float32)
    # Every label gets the rest first; those that were stored are written over it.
    probs[:] = rest[:, None]
    np.put_along_axis(probs, label_ids.astype(np.int64), stored, axis=1)
    return probs


def check_top_k(label_ids: np.ndarray, label_probs: np.ndarray, num_labels: int, name: str) -> None:
    """Check stored rows of one teacher."""
    if label_ids.shape != label_probs.shape or label_ids.ndim != 2 or not 1 <= label_ids.shape[1] <= num_labels:
        raise ValueError(
            f"Pseudolabels of '{name}' must be two arrays of one shape (num_examples, k) with k in 1..{num_labels}, "
            f"got {label_ids.shape} and {label_probs.shape}. Build them with `encode_top_k`."
        )
    if label_probs.dtype.kind != "f":
        raise ValueError(f"Probabilities of '{name}' must be floats, got {label_probs.dtype}. Store them as float16.")
    # Sums may lie far below 1 here: 16 of 1,000 labels can hold as little as 0.44 of the mass.
    _check_rows(label_probs, f"'{name}'")
    _check_label_ids(label_ids, num_labels, f"'{name}'")
    # A row without an answer repeats label 0, which the rules for labels must let pass.
    answered = label_probs[:, 0] > 0
    # `answered` and `hard_labels` read the first column only, and rely on this.
    if (np.diff(label_probs.astype(np.float32), axis=1) > 0).any():
        raise ValueError(
            f"Probabilities of '{name}' must stand in descending order in each row. Build it with `encode_top_k`."
        )
    if ((label_probs == label_probs[:, :1]) & (label_ids < label_ids[:, :1]))[answered].any():
        raise ValueError(
            f"Of equally probable labels of '{name}' the lowest must stand first in each row. Build it with "
            "`encode_top_k`."
        )
    ordered = np.sort(label_ids[answered], axis=1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise ValueError(
            f"A row of '{name}' must name each label once, got a repeated label. Build it with `encode_top_k`."
        )


def _check_label_ids(label_ids: np.ndarray, num_labels: int, name: str) -> None:
    if label_ids.dtype.kind not in "iu":
        raise ValueError(f"Label ids of {name} must be integers, got {label_ids.dtype}. Number the labels from 0.")
    if label_ids.size and (label_ids.min() < 0 or label_ids.max() >= num_labels):
        raise ValueError(
            f"Label ids of {name} must lie in 0..{num_labels - 1}, got {label_ids.min()}..{label_ids.max()}. Give "
            "those of this task."
        )


def _check_rows(probs: np.ndarray, name: str) -> None:
    values = probs.astype(np.float32, copy=False)
    # In this order: of a row with NaN or a negative number the sum says nothing.
    finite = np.isfinite(values).all(axis=1)
    negative = (values < 0).any(axis=1)
    with np.errstate(invalid="ignore"):
        sums = values.sum(axis=1)
        too_much = sums > 1 + SUM_TOLERANCE
    for bad, what in ((~finite, "is not finite"), (negative, "is negative"), (too_much, "sums to more than 1")):
        if (rows := np.flatnonzero(bad)).size:
            raise ValueError(
                f"Probabilities of {name} must be finite, not negative and sum to at most 1 in each row: "
                f"row {rows[0]} {what} (got {values[rows[0]].tolist()[:8]}), {rows.size} such rows in all. Give "
                "softmax outputs, not logits."
            )

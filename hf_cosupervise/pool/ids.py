"""Ids of rows: read, checked, matched and digested."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from ..hierarchy import is_writable_text


def check_id_values(ids: Sequence[Any] | np.ndarray) -> None:
    """Refuse ids that are not all integers or all strings."""
    if isinstance(ids, str) or not isinstance(ids, Sequence | np.ndarray):
        raise TypeError(
            f"`ids` must be one integer or string per example, got {type(ids).__name__}. Make a list of them."
        )
    # The first decides, for in a file all ids are of one type.
    kind = str if len(ids) and isinstance(ids[0], str) else int | np.integer
    # `True` is an integer to Python, and would be the id 1.
    if wrong := [value for value in ids if not isinstance(value, kind) or isinstance(value, bool)]:
        raise ValueError(f"`ids` must be integers or strings, got {wrong[0]!r}. Number the examples.")
    if kind is str and (wrong := [value for value in ids if not is_writable_text(value)]):
        raise ValueError(f"`ids` must hold no NUL and no halves of characters, got {wrong[0]!r}. Rename it.")
    # What Arrow can hold as `int64`: larger ones would fail in the middle of writing.
    if kind is not str and len(ids) and not -(2**63) <= min(ids) <= max(ids) < 2**63:
        raise ValueError(f"`ids` must be integers or strings, got {max(ids, key=abs)}. Number the examples.")


def match_ids(ids: np.ndarray, wanted: np.ndarray, what: str) -> np.ndarray:
    """Find the rows that hold the wanted ids."""
    # A dictionary and no sorted search: it takes texts and numbers alike, and each id stands there once.
    positions = {value: row for row, value in enumerate(ids.tolist())}
    rows = [positions.get(value, -1) for value in wanted.tolist()]
    if missing := [value for value, row in zip(wanted.tolist(), rows) if row < 0]:
        raise ValueError(
            f"{what} must hold every id of the other side, got {len(missing)} missing of {len(wanted)} (such as "
            f"{missing[0]!r}). Use the data that the pool was built from."
        )
    return np.asarray(rows, dtype=np.int64)


def read_ids(dataset: Dataset, what: str) -> np.ndarray:
    """Read the `id` column of a dataset."""
    if "id" not in dataset.column_names:
        raise ValueError(f"Every dataset of a pool needs an `id` column, {what} got {dataset.column_names}.")
    column = (
        # By Arrow, where `dataset["id"]` would make a Python object of each; an empty column has no type yet.
        dataset.with_format("arrow")[:].column("id") if len(dataset) else pa.chunked_array([pa.array([], pa.int64())])
    )
    if column.null_count:
        raise ValueError(f"Ids of {what} must not be missing, got {column.null_count} empty ones. Fill them.")
    kind = column.type
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"Ids of {what} must be integers or strings, got {kind}. Number the examples.")
    if not pa.types.is_integer(kind) and (wrong := [v for v in column.to_pylist() if not is_writable_text(v)]):
        raise ValueError(f"Ids of {what} must hold no NUL, got {wrong[0]!r}. Rename it.")  # numpy would cut it off
    ids = column.to_numpy() if pa.types.is_integer(kind) else np.asarray(column.to_pylist())
    values, counts = np.unique(ids, return_counts=True)
    if len(values) != len(ids):
        first = int(np.flatnonzero(counts > 1)[0])
        raise ValueError(
            f"Ids of {what} must be unique, got {values[first].item()!r} {counts[first]} times "
            f"({int((counts > 1).sum())} repeated in all)."
        )
    return ids

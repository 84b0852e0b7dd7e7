"""Which column of a dataset holds what, and what its cells say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Array2D, Array3D, Array4D, Array5D, ClassLabel, Dataset, Image, LargeList, List, Value

LABEL_NAMES = ("label", "labels", "oracle_label")
INPUT_NAMES = ("image", "img", "pixel_values", "text", "sentence")
_NO_NUMBERS = ("string", "binary", "date", "time", "duration", "decimal", "null")


def find_input_column(dataset: Any, input_column: str | None = None) -> str:
    """Find the column that models read."""
    check_column_name(input_column, "input_column")
    # A stream may not know its columns before the first row is read.
    columns = list(dataset.column_names or (dataset.features or {}))
    if input_column is not None:
        if input_column not in columns:
            raise ValueError(f"`input_column` must be one of {columns}, got {input_column!r}.")
        return input_column
    images = [name for name, feature in (dataset.features or {}).items() if isinstance(feature, Image)]
    # Of texts the first known name is taken; of images one has to be the only one, for their names say little.
    candidates = images or [name for name in INPUT_NAMES if name in columns][:1]
    candidates = candidates or [name for name, feature in (dataset.features or {}).items() if holds_vectors(feature)]
    if len(candidates) != 1:
        raise ValueError(
            f"The column that models read must be an image column or one of {list(INPUT_NAMES)}, or the only one of "
            f"vectors, got {candidates or 'none'} among {columns}. Name it, or several of numbers, with "
            "`input_column`."
        )
    return candidates[0]


def check_column_name(column: Any, what: str) -> None:
    """Refuse what names no single column."""
    if not isinstance(column, str | None):
        raise TypeError(f"`{what}` must be the name of one column, got {column!r}. Give its name.")


def check_column(dataset: Dataset, column: str) -> None:
    """Refuse a column that the data do not have."""
    if column not in dataset.column_names:
        raise ValueError(f"The column must be one of {dataset.column_names}, got {column!r}. Correct the name.")


def is_text_column(dataset: Dataset, column: str) -> bool:
    """Tell whether a column holds text."""
    check_column(dataset, column)
    feature = dataset.features[column]
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def is_vector_column(dataset: Dataset, column: str) -> bool:
    """Tell whether a column holds lists of numbers."""
    check_column(dataset, column)
    return holds_vectors(dataset.features[column])


def holds_vectors(feature: Any) -> bool:
    """Tell whether a feature of a dataset is of lists of numbers, of any depth."""
    if isinstance(feature, Array2D | Array3D | Array4D | Array5D):
        return True
    while isinstance(feature, List | LargeList):
        feature = feature.feature
        if isinstance(feature, Value):
            return not feature.dtype.startswith((*_NO_NUMBERS, "large_"))
    return False


def find_label_column(dataset: Dataset) -> str:
    """Find the column with the labels of an evaluation set."""
    for name in LABEL_NAMES:
        if name in dataset.column_names:
            return name
    raise ValueError(
        f"An evaluation set needs labels in a column {list(LABEL_NAMES)}, got {dataset.column_names}. "
        "Rename the column that holds them."
    )


def read_labels(dataset: Dataset, column: str, labels: Sequence[str]) -> np.ndarray:
    """Read a label column as label ids of the task, by name where the data has names."""
    check_column(dataset, column)
    feature, values = dataset.features[column], list(dataset[column][:])
    positions = {name: index for index, name in enumerate(labels)}
    if isinstance(feature, ClassLabel):
        # By name: ids of the data need not be those of the task; -1 is how data sets spell a label that is missing.
        values = [feature.names[value] if value is not None and value >= 0 else value for value in values]
    ids = [positions.get(value, -1) if isinstance(value, str) else as_label_id(value) for value in values]
    wrong = [row for row, value in enumerate(ids) if not isinstance(value, int) or not 0 <= value < len(labels)]
    if wrong:
        raise ValueError(
            f"Column `{column}` must hold labels of the task {list(labels)[:8]}, got {values[wrong[0]]!r} in row "
            f"{wrong[0]} ({len(wrong)} such rows)."
        )
    return np.asarray(ids, dtype=np.int64)


def as_label_id(value: Any) -> Any:
    """Give a whole float as an integer: pandas makes 0.0, 1.0 and NaN of label ids of which one is missing."""
    # A `np.bool_` must not become the integer that Python's own booleans are.
    if getattr(value, "ndim", None) == 0 and not isinstance(value, np.bool_):
        value = value.item()
    if not isinstance(value, float | Decimal):
        return value
    if math.isnan(value):
        return None
    return int(value) if math.isfinite(value) and value == int(value) else value


def has_input(dataset: Dataset, column: str) -> np.ndarray:
    """Tell which rows hold anything: a pool stores what could not be read as missing."""
    check_column(dataset, column)
    cells = dataset.data.column(column)
    is_there = cells.is_valid().to_numpy()
    if pa.types.is_struct(cells.type) and {"bytes", "path"} <= {field.name for field in cells.type}:
        # A struct of two nulls is valid itself, but an image without bytes or path is none.
        held = (pc.struct_field(cells, name).is_valid().to_numpy() for name in ("bytes", "path"))
        is_there = is_there & np.any(list(held), axis=0)
    # A selection keeps the whole table and the positions wanted of it.
    return is_there if dataset._indices is None else is_there[dataset._indices.column(0).to_numpy()]


def is_numeric(cell: Any) -> bool:
    """Tell whether a cell can be read as a number."""
    try:
        float(cell)
    except (TypeError, ValueError):
        return False
    return True


def shorten(names: Iterable[Any], limit: int = 20) -> str:
    """Give the first names as a list, and how many more there are: a thousand labels make no readable error."""
    names = list(names)
    return str(names) if len(names) <= limit else f"{names[:limit]} and {len(names) - limit} more"

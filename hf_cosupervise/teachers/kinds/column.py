"""Teachers whose answers are a column of the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...data.columns import as_label_id, shorten
from ...data.inputs import RowError
from ...hierarchy import Teacher
from ...method.metrics import SUM_TOLERANCE
from .base import Kind, label_finder


class ColumnTeacher:
    """Answers that are in a column already: of people, of a language model, of an older system."""

    column: str | None

    def __init__(self, teacher: Teacher, labels: Sequence[str]) -> None:
        self.teacher, self.labels, self.column = teacher, tuple(labels), teacher.model
        self.find_label = label_finder(self.labels)
        self.facts: dict[str, Any] = {"kind": "column", "revision": None, "commit": None, "class": "column"}
        self.facts["preprocessing"] = None

    def prepare(self, cells: Sequence[Any]) -> list[int | np.ndarray]:
        """Give the cells as they are."""
        return [
            self._read_vector(value) if isinstance(value, list | tuple | np.ndarray) else self._read_label(value)
            for value in cells
        ]

    def __call__(self, inputs: Sequence[int | np.ndarray]) -> np.ndarray:
        probs = np.zeros((len(inputs), len(self.labels)), dtype=np.float32)
        for row, answer in enumerate(inputs):
            if isinstance(answer, np.ndarray):
                probs[row] = answer
            elif answer >= 0:
                probs[row, answer] = 1.0
        return probs

    def _read_label(self, value: Any) -> int:
        """Label id of one answer; -1 where there is none."""
        value = as_label_id(value)
        if value is None or isinstance(value, str) and value == "":
            return -1
        if isinstance(value, int) and not isinstance(value, bool) and -1 <= value < len(self.labels):
            return value
        if isinstance(value, str):
            name = (self.teacher.label_map or {}).get(value, value)
            if (position := self.find_label(name)) is not None:
                return position
        raise self._bad(value)

    def _read_vector(self, value: Sequence[Any] | np.ndarray) -> np.ndarray:
        if len(value) == 0 or all(item is None for item in value):
            return np.zeros(len(self.labels), dtype=np.float32)
        try:
            vector = np.asarray(value, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise self._bad(value) from error
        is_valid = vector.shape == (len(self.labels),) and np.isfinite(vector).all() and (vector >= 0).all()
        if not is_valid or not (vector.sum() == 0 or abs(vector.sum() - 1) <= SUM_TOLERANCE):
            raise self._bad(value)
        return vector

    def _bad(self, value: Any) -> RowError:
        return RowError(
            f"Answers in column '{self.teacher.model}' must be label names of the task ({shorten(self.labels)}; "
            f"other names can be mapped with `label_map`), label ids 0..{len(self.labels) - 1}, {len(self.labels)} "
            f"probabilities that sum to 1, or None, NaN, '' or -1 for no answer; got {value!r}"
        )


KIND = Kind(
    load=lambda source, labels, device: ColumnTeacher(source.teacher, labels),
    identify=lambda source: ({}, 0),
)

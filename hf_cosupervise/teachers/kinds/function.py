"""Teachers that are Python functions of a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from ...data.columns import as_label_id, shorten
from ...data.inputs import RowError
from ...functions import LabelingFunction
from ...method.metrics import SUM_TOLERANCE
from .base import NO_LABEL, ROW, Answers, Kind, TeacherSource, find_targets, leave_out


class FunctionTeacher:
    """A function that is given a row, or a list of them, and gives a label, probabilities or nothing."""

    column: str | None = ROW

    def __init__(self, source: TeacherSource, labels: Sequence[str]) -> None:
        teacher, function = source.teacher, source.teacher.function
        if not isinstance(function, LabelingFunction):
            version = "" if teacher.revision is None else f" and version '{teacher.revision}'"
            raise ValueError(
                f"Teacher '{source.name}' must be given its function, which no file and no pickle holds, got its name "
                f"'{teacher.model}'{version} only. Pass it by `models={{'{source.name}': …}}`."
            )
        self.function, self.labels, self.what = function, tuple(labels), f"Function '{teacher.model}'"
        self.teacher, self.places = teacher, dict[str, tuple[int, ...] | None]()
        # A function of this module, which workers that read rows are sent instead of the function that labels.
        self.prepare = _give
        self.facts: dict[str, Any] = {"kind": "function", "revision": teacher.revision, "commit": None}
        self.facts |= {"class": "function", "preprocessing": None}

    def __call__(self, inputs: Sequence[dict[str, Any]]) -> Answers:
        answers = Answers(np.zeros((len(inputs), len(self.labels)), dtype=np.float32), {})
        values = self._call(inputs, answers)
        for row, value in enumerate(values):
            if row not in answers.errors and value is not None:
                try:
                    answers.probs[row] = self._read(value)
                except RowError as error:
                    answers.errors[row] = error
        return answers

    def _call(self, rows: Sequence[dict[str, Any]], answers: Answers) -> Sequence[Any]:
        """What the function gives for each row; of those that it fails on, the errors are told."""
        if self.function.batched:
            # Of no row yet: where a batch fails, each row is asked by itself.
            failure: dict[int, RowError] = {}
            values: Any = None
            with _Caught(failure, 0, self.what):
                values = self.function([dict(row) for row in rows])
            if not failure:
                return self._check_length(values, len(rows))
        values = [None] * len(rows)
        for place, row in enumerate(rows):
            with _Caught(answers.errors, place, self.what):
                # A copy, for other functions are given the same row. Alone where it failed on the batch, so that the
                # row at fault is known.
                own = dict(row)
                values[place] = (
                    self._check_length(self.function([own]), 1)[0] if self.function.batched else self.function(own)
                )
        return values

    def _check_length(self, values: Any, num_rows: int) -> Sequence[Any]:
        # A text has a length too.
        is_list = isinstance(values, Sequence | np.ndarray) and not isinstance(values, str)
        if not is_list or len(values) != num_rows:
            got = f"{len(values)} answers" if is_list else repr(values)
            raise ValueError(
                f"{self.what} must give a list of as many answers as it is given rows, {num_rows}, got {got}. Correct "
                "it, or leave out `batched=True` for a function of one row."
            )
        return values

    def _read(self, value: Any) -> np.ndarray:
        """Probabilities of one answer, `(num_labels,)`."""
        probs = np.zeros(len(self.labels), dtype=np.float32)
        value = value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value
        value = as_label_id(value)  # as in a column: 1.0 is the label 1, and NaN no answer
        if value is None:
            return probs
        if isinstance(value, str):
            self._add(probs, value, 1.0, value)
        elif isinstance(value, int) and not isinstance(value, bool):
            if value not in NO_LABEL:
                if not 0 <= value < len(self.labels):
                    raise self._bad(value)
                probs[value] = 1.0
        elif isinstance(value, Mapping):
            outside = sum(
                self._add(probs, label, self._numbers(share, value, ()), value) for label, share in value.items()
            )
            self._check_sum(float(probs.sum()) + outside, value)
            probs = leave_out(probs[None], np.array([outside]), self.teacher.max_outside_mass)[0]
        else:
            probs = self._numbers(value, value, (len(self.labels),))
            self._check_sum(float(probs.sum()), value)
        return probs

    def _add(self, probs: np.ndarray, label: Any, share: Any, value: Any) -> float:
        """Give a label its share, as the label map leads it; what the task has no label for is given back."""
        if not isinstance(label, str):
            raise self._bad(value)
        # Once for each name: a function gives few of them, and many times.
        if label not in self.places:
            self.places[label] = find_targets(self.teacher, [label], self.labels)[0]
        found = self.places[label]
        if found is None and self.teacher.max_outside_mass is None:
            raise self._bad(value)
        if not found:
            return float(share)
        probs[list(found)] += share / len(found)
        return 0.0

    def _numbers(self, numbers: Any, value: Any, shape: tuple[int, ...]) -> np.ndarray:
        try:
            array = np.asarray(numbers, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise self._bad(value) from error
        if array.shape != shape or not np.isfinite(array).all() or (array < 0).any():
            raise self._bad(value)
        return array

    def _check_sum(self, total: float, value: Any) -> None:
        # All zeros are no answer, as from any teacher.
        if total and abs(total - 1) > SUM_TOLERANCE:
            raise self._bad(value)

    def _bad(self, value: Any) -> RowError:
        return RowError(
            f"{self.what} must give a label of the task ({shorten(self.labels)}; other names can be mapped with "
            f"`label_map`), a label id 0..{len(self.labels) - 1}, {len(self.labels)} probabilities that sum to 1, a "
            f"mapping of labels to them, or None, NaN, -1 or -100 for no answer; got {value!r}"
        )


class _Caught(AbstractContextManager[None]):
    """Keep what a function raises as the error of a row: what somebody else's code raises can be anything."""

    def __init__(self, errors: dict[int, RowError], place: int, what: str) -> None:
        self.errors, self.place, self.what = errors, place, what

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> bool:
        # Neither Ctrl-C nor a full memory is the fault of a row.
        if not isinstance(error, Exception) or isinstance(error, MemoryError):
            return False
        self.errors[self.place] = RowError(f"{self.what} must answer every row, got {type(error).__name__}: {error}")
        self.errors[self.place].__cause__ = error
        return True


def _give(cells: Sequence[Any]) -> Sequence[Any]:
    return cells


KIND = Kind(
    load=lambda source, labels, device: FunctionTeacher(source, labels),
    identify=lambda source: ({}, 0),
    column=lambda teacher: ROW,
)

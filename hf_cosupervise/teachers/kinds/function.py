"""Teachers that are Python functions of a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from ...data.columns import as_label_id
from ...data.inputs import RowError
from ...functions import LabelingFunction
from .base import ROW, Answers, Kind, TeacherSource
from .column import AnswerReader


class FunctionTeacher(AnswerReader):
    """A function that is given a row, or a list of them, and gives for each what may stand in a column of answers."""

    column: str | None = ROW
    has_text_ids = False  # a function has numbers for them: "1" is a name, perhaps of no label of the task

    def __init__(self, source: TeacherSource, labels: Sequence[str]) -> None:
        teacher, function = source.teacher, source.teacher.function
        if not isinstance(function, LabelingFunction):
            version = "" if teacher.revision is None else f" and version '{teacher.revision}'"
            raise ValueError(
                f"Teacher '{source.name}' must be given its function, which no file and no pickle holds, got its name "
                f"'{teacher.model}'{version} only. Pass it by `models={{'{source.name}': …}}`."
            )
        self.function, self.subject = function, f"Function '{teacher.model}'"
        super().__init__(teacher, labels, f"{self.subject} must give a label")
        # A function of this module, which workers that read rows are sent instead of the function that labels.
        self.prepare = _give
        self.facts: dict[str, Any] = {"kind": "function", "revision": teacher.revision, "commit": None}
        self.facts |= {"class": "function", "preprocessing": None}

    def __call__(self, inputs: Sequence[dict[str, Any]]) -> Answers:
        answers = Answers(np.zeros((len(inputs), len(self.labels)), dtype=np.float32), {})
        for row, value in enumerate(self._call(inputs, answers.errors)):
            if row not in answers.errors:
                try:
                    # In a row of a table names may lack a number; a function is asked for those that it gives.
                    if isinstance(value, Mapping) and any(as_label_id(share) is None for share in value.values()):
                        raise self.bad(value)
                    answers.probs[row] = self.read(value)
                except RowError as error:
                    answers.errors[row] = error
        return answers

    def _call(self, rows: Sequence[dict[str, Any]], errors: dict[int, RowError]) -> Sequence[Any]:
        """What the function gives for each row; of those that it fails on, the errors are told."""
        if self.function.batched:
            # Of no row yet: where a batch fails, each row is asked by itself.
            failure: dict[int, RowError] = {}
            values: Any = None
            with _Caught(failure, 0, self.subject):
                values = self.function([dict(row) for row in rows])
            if not failure:
                return self._check_length(values, len(rows))
        values = [None] * len(rows)
        for place, row in enumerate(rows):
            with _Caught(errors, place, self.subject):
                own = dict(row)  # a copy, for other functions are given the same row
                is_many = self.function.batched
                values[place] = self._check_length(self.function([own]), 1)[0] if is_many else self.function(own)
        return values

    def _check_length(self, values: Any, num_rows: int) -> Sequence[Any]:
        # A text has a length too.
        is_list = isinstance(values, Sequence | np.ndarray) and not isinstance(values, str)
        if not is_list or len(values) != num_rows:
            got = f"{len(values)} answers" if is_list else repr(values)
            raise ValueError(
                f"{self.subject} must give a list of as many answers as it is given rows, {num_rows}, got {got}. "
                "Correct it, or leave out `batched=True` for a function of one row."
            )
        return values


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

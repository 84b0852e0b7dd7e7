"""Teachers whose answers are a column of the data."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Any

import numpy as np

from ...data.columns import as_label_id, shorten
from ...data.inputs import RowError
from ...hierarchy import Teacher
from ...method.metrics import SUM_TOLERANCE
from .base import NO_LABEL, Kind, find_targets, fold_answer, leave_out

_NUMBER = re.compile(r"([+-]?\d{1,18})(\.0*)?")
_NUM_TOLD, _NUM_LETTERS = 10, 60
# The words of an answer, of which a sign such as `+` may be a part.
_words = partial(fold_answer, blanks="PZC")


class ColumnTeacher:
    """Answers that are in a column already: of people, of a language model, of an older system."""

    def __init__(self, teacher: Teacher, labels: Sequence[str]) -> None:
        self.teacher, self.labels = teacher, tuple(labels)
        self.column: str | None = teacher.model
        self.find = _answer_finder(teacher, self.labels)
        nothing = dict.fromkeys(("revision", "commit", "preprocessing"))
        self.facts: dict[str, Any] = {"kind": "column", "class": "column", **nothing}

    def prepare(self, cells: Sequence[Any]) -> list[int | np.ndarray]:
        """Read each cell as a label id, -1 for none, or as probabilities."""
        return [self._read(cell) for cell in cells]

    def __call__(self, inputs: Sequence[int | np.ndarray]) -> np.ndarray:
        probs = np.zeros((len(inputs), len(self.labels)), dtype=np.float32)
        for row, answer in enumerate(inputs):
            if isinstance(answer, np.ndarray):
                probs[row] = answer
            elif answer >= 0:
                probs[row, answer] = 1.0
        return probs

    def tell_unmatched(self, cells: Iterable[Any]) -> str:
        """List what cannot be read as an answer, with how often it is there, the most frequent first."""
        unread: Counter[str] = Counter()
        for cell in cells:
            try:
                self._read(cell)
            except RowError:
                text = repr(cell)
                unread[text if len(text) <= _NUM_LETTERS else f"{text[:_NUM_LETTERS]}…"] += 1
        table = ", ".join(f"{text} × {count}" for text, count in unread.most_common(_NUM_TOLD))
        return f"{table}, and {len(unread) - _NUM_TOLD} others" if len(unread) > _NUM_TOLD else table

    def _read(self, cell: Any) -> int | np.ndarray:
        if isinstance(cell, Mapping):
            return self._read_counts(cell)
        if isinstance(cell, list | tuple | np.ndarray):
            return self._read_vector(cell)
        places = self._places(cell)
        if places is None:
            raise self._bad(cell)
        if len(places) <= 1:
            return places[0] if places else -1
        shared = np.zeros(len(self.labels), dtype=np.float32)
        shared[list(places)] = 1 / len(places)
        return shared

    def _places(self, value: Any) -> tuple[int, ...] | None:
        """Label ids that an answer names, nothing for no answer, `None` for what is none."""
        value = as_label_id(value)
        if value is None or isinstance(value, str) and not value.strip():
            return ()
        if isinstance(value, str):
            if (found := self.find(value)) is not None:
                return found
            # Names first: a task may call its labels "1" and "2".
            if not (number := _NUMBER.fullmatch(value.strip())):
                return () if self.teacher.max_outside_mass is not None else None
            value = int(number[1])
        if isinstance(value, int) and not isinstance(value, bool):
            if value in NO_LABEL:
                return ()
            if 0 <= value < len(self.labels):
                return (value,)
        return None

    def _read_vector(self, value: Sequence[Any] | np.ndarray) -> np.ndarray:
        if len(value) == 0 or all(item is None for item in value):
            return np.zeros(len(self.labels), dtype=np.float32)
        try:
            vector = np.asarray(value, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise self._bad(value) from error
        if vector.shape != (len(self.labels),):
            raise self._bad(value)
        return self._as_probs(vector, value)

    def _read_counts(self, value: Mapping[Any, Any]) -> np.ndarray:
        """Read votes or probabilities by name; a table has all names in every row, with None where a row lacks one."""
        inside, outside = np.zeros(len(self.labels)), 0.0
        for name, number in value.items():
            number = as_label_id(number)
            if number is None or number == 0:
                continue
            places = self._places(name)
            if places is None or isinstance(number, bool) or not isinstance(number, Real):
                raise self._bad(value)
            if places:
                inside[list(places)] += float(number) / len(places)
            else:
                outside += float(number)
        probs = self._as_probs(np.append(inside, outside), value)
        return leave_out(probs[None, :-1], probs[-1:], self.teacher.max_outside_mass)[0]

    def _as_probs(self, vector: np.ndarray, value: Any) -> np.ndarray:
        """Probabilities as they are, and vote counts as shares."""
        total = vector.sum()
        is_valid = np.isfinite(vector).all() and (vector >= 0).all()
        if is_valid and (total == 0 or abs(total - 1) <= SUM_TOLERANCE):
            return vector.astype(np.float32)
        # As they stand in the cell: the counts of a label that is mapped to several are halves and thirds here.
        numbers = value.values() if isinstance(value, Mapping) else value
        if not is_valid or not all(isinstance(as_label_id(number), int | None) for number in numbers):
            raise self._bad(value)
        return (vector / total).astype(np.float32)

    def _bad(self, value: Any) -> RowError:
        return RowError(
            f"Answers in column '{self.teacher.model}' must be label names of the task ({shorten(self.labels)}; "
            f"others by `label_map`), ids 0..{len(self.labels) - 1}, {len(self.labels)} probabilities or vote counts, "
            f"these by name too, or None, NaN, '', -1 or -100 for no answer; got {value!r}"
        )


def _answer_finder(teacher: Teacher, labels: Sequence[str]) -> Callable[[str], tuple[int, ...] | None]:
    """Give a function that finds what an answer in words means: as written, or else but for case and punctuation."""
    names = list(dict.fromkeys([*(teacher.label_map or {}), *labels]))
    exact = {name: found for name, found in zip(names, find_targets(teacher, names, labels)) if found is not None}
    tables = [(fold, _alike(exact, fold)) for fold in (str, str.casefold, _words)]

    def find(text: str) -> tuple[int, ...] | None:
        # A number is no word: its sign and its point are punctuation, and mean something.
        folds = tables[: 2 if _NUMBER.fullmatch(text.strip()) else 3]
        return next((found for fold, table in folds if (found := table.get(fold(text))) is not None), None)

    return find


def _alike(exact: Mapping[str, tuple[int, ...]], fold: Callable[[str], str]) -> dict[str, tuple[int, ...] | None]:
    """Where folded names lead; of several that are alike and lead to different labels, none is meant."""
    table: dict[str, tuple[int, ...] | None] = {}
    for name, found in exact.items():
        table[fold(name)] = found if table.get(fold(name), found) == found else None
    table.pop("", None)
    return table


KIND = Kind(
    load=lambda source, labels, device: ColumnTeacher(source.teacher, labels),
    identify=lambda source: ({}, 0),
    column=lambda teacher: teacher.model,
)

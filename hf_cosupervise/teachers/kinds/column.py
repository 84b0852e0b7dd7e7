"""Teachers whose answers are a column of the data."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
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


class AnswerReader:
    """Read an answer however it is put: as a name, an id, probabilities or votes, these by place or by name."""

    has_text_ids = True  # as tables have, where "1" may be an id

    def __init__(self, teacher: Teacher, labels: Sequence[str], what: str) -> None:
        self.teacher, self.labels, self.what = teacher, tuple(labels), what
        self.find = answer_finder(teacher, self.labels)

    def read(self, value: Any) -> np.ndarray:
        """Give probabilities float32 `(num_labels,)`, all zeros for no answer."""
        value = as_label_id(value)
        if isinstance(value, Mapping):
            return self._read_counts(value)
        probs = np.zeros(len(self.labels), dtype=np.float32)
        if value is None or isinstance(value, str | Real):
            places = self._places(value, of=value)
            for place in places:  # faster than all at once, for most are alone
                probs[place] = 1 / len(places)
            return probs
        if isinstance(value, list | tuple) and all(item is None for item in value):
            return probs
        try:
            vector = np.asarray(value, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise self.bad(value) from error
        if vector.shape != probs.shape:
            raise self.bad(value)
        return self._as_probs(vector, value)

    def _places(self, name: Any, of: Any) -> tuple[int, ...]:
        """Label ids that an answer, or a name in it, stands for; none for no answer."""
        if name is None or isinstance(name, str) and not name.strip():
            return ()
        if isinstance(name, str):
            if (found := self.find(name)) is not None:
                return found
            # Names first: a task may call its labels "1" and "2".
            if self.has_text_ids and (number := _NUMBER.fullmatch(name.strip())):
                name = int(number[1])
            elif self.teacher.max_outside_mass is not None:
                return ()
        if isinstance(name, int) and not isinstance(name, bool):
            if name in NO_LABEL:
                return ()
            if 0 <= name < len(self.labels):
                return (name,)
        raise self.bad(of)

    def _read_counts(self, value: Mapping[Any, Any]) -> np.ndarray:
        """Read votes or probabilities by name; a table has all names in every row, with None where a row lacks one."""
        inside, outside = np.zeros(len(self.labels)), 0.0
        for name, number in value.items():
            number = as_label_id(number)
            is_number = isinstance(number, Real | Decimal | None) and not isinstance(number, bool)
            if not is_number or not isinstance(name, str):
                raise self.bad(value)
            if not number:
                continue
            if places := self._places(name, of=value):
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
            raise self.bad(value)
        return (vector / total).astype(np.float32)

    def bad(self, value: Any) -> RowError:
        """The error of what is no answer."""
        return RowError(
            f"{self.what} of the task ({shorten(self.labels)}; others by `label_map`), ids 0..{len(self.labels) - 1}, "
            f"{len(self.labels)} probabilities or vote counts, these by name too, or None, '', NaN, -1 or -100 for no "
            f"answer; got {value!r}"
        )


class ColumnTeacher(AnswerReader):
    """Answers that are in a column already: of people, of a language model, of an older system."""

    def __init__(self, teacher: Teacher, labels: Sequence[str]) -> None:
        super().__init__(teacher, labels, f"Answers in column '{teacher.model}' must be label names")
        self.column: str | None = teacher.model
        nothing = dict.fromkeys(("revision", "commit", "preprocessing"))
        self.facts: dict[str, Any] = {"kind": "column", "class": "column", **nothing}

    def prepare(self, cells: Sequence[Any]) -> np.ndarray:
        """Read each cell."""
        return np.fromiter(map(self.read, cells), np.dtype((np.float32, (len(self.labels),))), len(cells))

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        return inputs

    def tell_unmatched(self, cells: Iterable[Any]) -> str:
        """List what cannot be read as an answer, with how often it is there, the most frequent first."""
        unread: Counter[str] = Counter()
        for cell in cells:
            try:
                self.read(cell)
            except RowError:
                text = repr(cell)
                unread[text if len(text) <= _NUM_LETTERS else f"{text[:_NUM_LETTERS]}…"] += 1
        table = ", ".join(f"{text} × {count}" for text, count in unread.most_common(_NUM_TOLD))
        return f"{table}, and {len(unread) - _NUM_TOLD} others" if len(unread) > _NUM_TOLD else table


def answer_finder(teacher: Teacher, labels: Sequence[str]) -> Callable[[str], tuple[int, ...] | None]:
    """Give a function that finds what an answer in words means: as written, or else but for case and punctuation."""
    names = list(dict.fromkeys([*(teacher.label_map or {}), *labels]))
    exact = {name: found for name, found in zip(names, find_targets(teacher, names, labels)) if found is not None}
    tables = [(fold, _alike(exact, fold)) for fold in (str, str.casefold, _words)]

    def find(text: str) -> tuple[int, ...] | None:
        folds = tables[: 2 if _is_number(text) else 3]
        return next((found for fold, table in folds if (found := table.get(fold(text))) is not None), None)

    return find


def fold_name(text: str) -> str:
    """Give what names have in common that are read as one: all but case and punctuation, where there is more."""
    return text.casefold() if _is_number(text) or not (words := _words(text)) else words


def _is_number(text: str) -> bool:
    # It is no word: its sign and its point are punctuation, and mean something.
    return _NUMBER.fullmatch(text.strip()) is not None


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

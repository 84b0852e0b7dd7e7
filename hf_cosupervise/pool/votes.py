"""The door for votes: columns of labelling functions, matrices, long tables of crowds, and WRENCH folders."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset

from ..data.columns import shorten
from ..files import read_json
from ..hierarchy import Teacher, TeacherHierarchy
from ..method.aggregation import AGGREGATORS, Aggregator
from ..method.label_model import LabelModel
from ..method.label_models import LABEL_MODELS, make_label_model
from ..method.votes import VoterFacts, check_votes, voter_facts
from .derived import FEATURE_AGGREGATORS, aggregated_pool, pool_votes, single_teacher_pool
from .pseudolabels import AGGREGATE, ORACLE_LABEL, PseudolabelPool

_NO_VOTE = -1
_IGNORED = -100  # by losses of torch, and so in data sets
_MAX_LABELS = 4
_SPLITS = ("train", "valid", "test")


# ── columns, matrices and tables ────────────────────────────────────────────────────────────────────────────────────


def hierarchy_from_columns(
    dataset: Dataset, prefix: str = "lf_", labels: Sequence[str] | None = None
) -> TeacherHierarchy:
    """Make a teacher of every column of votes, all at level 0.

    Args:
        dataset (`datasets.Dataset`):
            Data with the columns.
        prefix (`str`, *optional*, defaults to `"lf_"`):
            How their names begin.
        labels (`Sequence[str]`, *optional*):
            The task's label names. Defaults to the names that the columns hold, sorted; where they hold label ids, to
            `"0"`, `"1"` and so on up to the greatest.

    Returns:
        `TeacherHierarchy`: for `build_pool` on the same data.

    Raises:
        TypeError: If `dataset` is none.
        ValueError: If no column begins so, or the labels cannot be seen: fewer than two, or names and ids mixed.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"`dataset` must be a `datasets.Dataset`, got {type(dataset).__name__}. Read a file by "
            "`Dataset.from_csv(path)`, a data frame by `Dataset.from_pandas(frame)`, or choose one split."
        )
    names = [name for name in dataset.column_names if name.startswith(prefix)]
    if not names:
        raise ValueError(
            f"Columns of votes begin with {prefix!r}, got the columns {dataset.column_names}. Give their `prefix`."
        )
    if labels is None:
        # `unique` is asked of Arrow: a Python object per kind of vote, not per row and function.
        seen = [value for name in names for value in dataset.unique(name)]
        labels = _seen_labels(seen, f"the columns that begin with {prefix!r}")
    return TeacherHierarchy(labels, [Teacher(name, kind="column") for name in names])


def pool_from_votes(
    matrix: Any,
    names: Sequence[str],
    labels: Sequence[str],
    inputs: Dataset | None = None,
    vectors: Any = None,
) -> PseudolabelPool:
    """Make a pool of a matrix of votes, each column a teacher of level 0."""
    votes = _read_matrix(matrix, labels)
    if votes.ndim != 2 or votes.shape[1] != len(names):
        raise ValueError(
            f"`matrix` must have a column for each of the {len(names)} `names`, got shape {votes.shape}. Name all "
            "voters."
        )
    return _make_pool(votes, names, labels, None, inputs, vectors)


def pool_from_answers(
    table: Any,
    labels: Sequence[str] | None = None,
    inputs: Dataset | None = None,
    *,
    vectors: Any = None,
    item_column: str = "item",
    worker_column: str = "worker",
    label_column: str = "label",
) -> PseudolabelPool:
    """Make a pool of a long table of a crowd's answers, one row for each; every worker is a teacher of level 0."""
    items, workers, answers = (_read_column(table, name) for name in (item_column, worker_column, label_column))
    for name, values in ((item_column, items), (worker_column, workers)):
        # Answers of nobody known would be those of one worker.
        if (row := next((row for row, value in enumerate(values) if _is_empty(value)), None)) is not None:
            raise ValueError(
                f"Every answer needs an item and a worker, got {values[row]!r} as {name!r} in row {row}. Drop such "
                "rows."
            )
    if labels is None:
        labels = _seen_labels(answers, f"the column '{label_column}'")
    # As a matrix of one row, so that a long table and a matrix take the same spellings of a vote.
    codes = _read_matrix([answers], labels)[0]
    if vectors is not None and inputs is None:
        raise ValueError("`vectors` of a table of answers need their items, got none. Give `inputs` with `id`.")
    if inputs is not None and "id" not in inputs.column_names:
        raise ValueError(f"`inputs` need an `id` column of the items, got {inputs.column_names}. Add it.")
    # In the order in which they first appear, and each once: a set would order them anew in each run.
    ids = list(dict.fromkeys(items)) if inputs is None else list(inputs["id"][:])
    rows = {item: row for row, item in enumerate(ids)}
    if unknown := [item for item in dict.fromkeys(items) if item not in rows]:
        raise ValueError(
            f"Every item must be an `id` of the inputs, got {len(unknown)} others such as {unknown[0]!r}. Ids and "
            "items must be of one kind, numbers or texts."
        )
    columns = {worker: column for column, worker in enumerate(dict.fromkeys(workers))}
    votes, even = _most_said(rows, columns, items, workers, codes)
    if even:
        warnings.warn(f"{even} workers' answers to an item contradict each other evenly: they count as no vote.")
    # A crowd's ids may be mail addresses, and names of teachers become folders; the hierarchy refuses equal ones.
    names = [re.sub(r"[^A-Za-z0-9._-]|^[^A-Za-z0-9]", "-", str(worker)).lstrip("-._") for worker in columns]
    return _make_pool(votes, names, labels, ids, inputs, vectors)


def flat_predictions(
    probs: Any, names: Sequence[str] | None, labels: Sequence[str] | None
) -> tuple[TeacherHierarchy, dict[str, np.ndarray]]:
    """Name the teachers of probabilities `(num_rows, num_teachers, num_labels)`, or by name, all of level 0."""
    if labels is None:
        raise ValueError("Predictions need the task's `labels`, got none. Name them in the order of the last axis.")
    if isinstance(probs, Mapping):
        if names is not None and set(names) != set(probs):
            raise ValueError(
                f"`names` must be those of the predictions, {shorten(probs)}, got {shorten(names)}. Leave them out."
            )
        arrays = {name: np.asarray(probs[name]) for name in (probs if names is None else names)}
    else:
        array, names = np.asarray(probs), [] if names is None else list(names)
        if array.ndim != 3 or array.shape[1] != len(names):
            raise ValueError(
                "Predictions must be of shape (num_rows, num_teachers, num_labels), with a name for each teacher, got "
                f"{array.shape} and {len(names)} `names`. Or give them by name, each of (num_rows, num_labels)."
            )
        arrays = {name: array[:, number] for number, name in enumerate(names)}
    hierarchy = TeacherHierarchy(labels, [Teacher(name, kind="column") for name in arrays])
    return hierarchy, dict(zip(hierarchy.names, arrays.values()))


def _most_said(
    rows: Mapping[Any, int], columns: Mapping[Any, int], items: list[Any], workers: list[Any], codes: np.ndarray
) -> tuple[np.ndarray, int]:
    """Votes `(num_rows, num_voters)`, and in how many cells a worker was as often of another opinion."""
    said: dict[tuple[int, int], Counter[int]] = {}
    for item, worker, code in zip(items, workers, codes.tolist()):
        if code >= 0:
            # Counted where there is an answer: counts of every label in every cell of a large crowd would not fit.
            said.setdefault((rows[item], columns[worker]), Counter())[code] += 1
    votes, even = np.full((len(rows), len(columns)), _NO_VOTE), 0
    for cell, counts in said.items():
        # The first two are enough to see whether the first is alone.
        (code, most), *others = counts.most_common(2)
        if others and others[0][1] == most:
            even += 1
        else:
            votes[cell] = code
    return votes, even


def _make_pool(
    votes: np.ndarray,
    names: Sequence[str],
    labels: Sequence[str],
    ids: Sequence[Any] | None,
    inputs: Dataset | None,
    vectors: Any,
) -> PseudolabelPool:
    hierarchy = TeacherHierarchy(labels, [Teacher(name, kind="column") for name in names])
    # The last row is all zero, and -1 for no vote indexes just that one.
    eye = np.concatenate([np.eye(len(labels), dtype=np.float32), np.zeros((1, len(labels)), dtype=np.float32)])
    predictions = {name: eye[votes[:, column]] for column, name in enumerate(hierarchy.names)}
    # One label is all that a vote has: more would store zeros.
    return PseudolabelPool.from_predictions(hierarchy, ids, predictions, inputs=inputs, vectors=vectors, pool_k=1)


def _is_empty(value: Any) -> bool:
    is_nan = isinstance(value, Real) and math.isnan(value)
    return value is None or type(value).__name__ == "NAType" or is_nan or isinstance(value, str) and not value


def _is_missing(value: Any) -> bool:
    # All ways in which tables of labelling functions and pandas spell that nobody voted.
    return _is_empty(value) or value in (_NO_VOTE, _IGNORED)


def _as_label_id(value: Any) -> int | None:
    """A number that is a label id; a column with gaps is read as floats."""
    is_whole = isinstance(value, Real) and not isinstance(value, bool | np.bool_) and float(value).is_integer()
    return int(value) if is_whole and value >= 0 else None


def _seen_labels(values: Sequence[Any], where: str) -> list[str]:
    said = {value for value in values if not _is_missing(value)}
    # Sorted, so that label ids do not hang on the order of rows.
    if all(isinstance(value, str) for value in said):
        labels = sorted(said)
    elif None not in (ids := {_as_label_id(value) for value in said}):
        labels = [str(index) for index in range(max(ids) + 1)]  # type: ignore[type-var, operator]
    else:
        raise ValueError(f"Votes must be all names or all label ids, got {shorten(said)} in {where}. Give `labels`.")
    if len(labels) < 2:
        raise ValueError(f"Votes must name two labels or more, got {labels} in {where}. Give `labels`.")
    return labels


def _read_matrix(matrix: Any, labels: Sequence[str]) -> np.ndarray:
    """Read label ids or names, `(num_rows, num_voters)`, as integers with -1 for no vote."""
    values = np.asarray(matrix)
    # The usual case, without a Python object per vote.
    if values.dtype.kind in "iu":
        values = np.where(values == _IGNORED, _NO_VOTE, values.astype(np.int64))
        return check_votes(values, len(labels)) if values.size else values
    # Anew, for numpy makes text of numbers that stand beside text: 0 would become '0'.
    values = np.asarray(matrix, dtype=object)
    known: dict[Any, int] = {name: index for index, name in enumerate(labels)}

    def read(value: Any) -> int:
        if _is_missing(value):
            return _NO_VOTE
        index = known.get(value) if isinstance(value, str) else _as_label_id(value)
        if index is None or index >= len(labels):
            raise ValueError(
                f"A vote must be one of the labels {shorten(labels)}, a label id 0..{len(labels) - 1}, or -1, -100, "
                f"None, NaN or '' for none, got {value!r}. Correct it, or name all `labels`."
            )
        return index

    return np.array([read(value) for value in values.reshape(-1).tolist()], dtype=np.int64).reshape(values.shape)


def _read_column(table: Any, name: str) -> list[Any]:
    if isinstance(table, os.PathLike | Sequence):
        raise TypeError(
            "A table of answers must be a data frame, a `Dataset` or a dictionary of columns, got "
            f"{type(table).__name__}. Read a file by `pandas.read_csv(path)`, and make a table of rows by "
            "`pandas.DataFrame(rows, columns=['item', 'worker', 'label'])`."
        )
    columns = list(getattr(table, "column_names", table))  # a data frame and a mapping give their names themselves
    if name not in columns:
        raise ValueError(f"A table of answers needs the column {name!r}, got {columns}. Say which one it is.")
    column = table[name]
    return column.tolist() if hasattr(column, "tolist") else list(column)


# ── a label model at the root ───────────────────────────────────────────────────────────────────────────────────────


def with_aggregate(
    pool: PseudolabelPool,
    method: str | Aggregator | LabelModel = "shared_majority",
    name: str | None = None,
    *,
    features: Any = None,
) -> PseudolabelPool:
    """Put a label model at the root of a pool, and move its teachers a level down, where they are its specialists."""
    if isinstance(method, str) and method in LABEL_MODELS:
        method = make_label_model(method)
    elif isinstance(method, str) and method not in (others := [*AGGREGATORS, *FEATURE_AGGREGATORS]):
        known = ", ".join(dict.fromkeys([*LABEL_MODELS, *others]))
        raise ValueError(f"Unknown `method` '{method}'. Choose one of {known}, or give a label model or a function.")
    if isinstance(method, LabelModel):
        title, votes, num_labels = method.name.replace("_", "-"), pool_votes(pool), len(pool.labels)
        # Fitted already, perhaps on another split: then its parameters are kept and only the votes are new.
        if method.num_voters:
            probs = method.predict_proba(votes)
        else:
            probs = method.fit_predict_proba(votes, num_labels, pool.hierarchy.names)
        if probs.shape[1] != num_labels:
            raise ValueError(
                f"The label model must be of the pool's {num_labels} labels, got one of {probs.shape[1]}. Fit it with "
                "`num_labels`."
            )
        root = single_teacher_pool(pool, name or title, probs)
    else:
        root = aggregated_pool(pool, method, name, features=features)
    # All levels move, so that a hierarchy that had several keeps their order below the new root.
    specialists = [replace(teacher, level=teacher.level + 1) for teacher in pool.hierarchy.teachers]
    hierarchy = TeacherHierarchy(pool.labels, [*root.hierarchy.teachers, *specialists])
    # Said of it, for in a pool it looks like a column of somebody's own answers.
    own = {name: {**known, AGGREGATE: True} for name, known in root.facts.items()}
    teachers, facts = {**root.teachers, **pool.teachers}, {**own, **pool.facts}
    return PseudolabelPool(hierarchy, teachers, pool.inputs, facts, pool.source, input_column=pool.input_column)


# ── what is in a pool of votes ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class PoolDescription:
    """What the teachers of a pool said, as a table when it is printed."""

    labels: tuple[str, ...]
    num_rows: int
    coverage: float
    conflicts: float
    voters: tuple[VoterFacts, ...]

    def __str__(self) -> str:
        has_truth = any(voter.accuracy is not None for voter in self.voters)
        header = ["voter", "labels", "coverage", "overlaps", "conflicts"] + ["accuracy"] * has_truth
        lines = [header]
        for voter in self.voters:
            shares = [f"{share:.3f}" for share in (voter.coverage, voter.overlaps, voter.conflicts)]
            accuracy = "–" if voter.accuracy is None else f"{voter.accuracy:.3f}"
            named = ", ".join(self.labels[index] for index in voter.polarity[:_MAX_LABELS]) or "–"
            named += ", …" * (len(voter.polarity) > _MAX_LABELS)
            lines.append([voter.name, named, *shares] + [accuracy] * has_truth)
        columns = []
        for number, column in enumerate(zip(*lines)):
            width = max(map(len, column))
            columns.append([cell.ljust(width) if number < 2 else cell.rjust(width) for cell in column])
        first = f"{self.num_rows} rows, {self.coverage:.1%} with a vote, {self.conflicts:.1%} in conflict"
        return "\n".join([first, *("  ".join(row).rstrip() for row in zip(*columns))])


def describe(pool: PseudolabelPool) -> PoolDescription:
    """Say of every teacher which labels it names, where, with whom and against whom."""
    votes = pool_votes(pool)
    facts = voter_facts(votes, pool.hierarchy.names, pool.oracle_labels)
    kinds = [len(set(row) - {_NO_VOTE}) for row in votes.tolist()]
    num_rows = max(len(votes), 1)
    coverage, conflicts = (sum(kind > least for kind in kinds) / num_rows for least in (0, 1))
    return PoolDescription(pool.labels, len(votes), coverage, conflicts, tuple(facts))


# ── files of others ─────────────────────────────────────────────────────────────────────────────────────────────────


def read_wrench(folder: str | os.PathLike[str]) -> dict[str, PseudolabelPool]:
    """Read a data set of WRENCH: `train.json`, `valid.json` and `test.json` as far as they are there.

    Each file holds `{id: {"label": 0, "weak_labels": [-1, 1], "data": {"text": "…"}}}`; `label.json`, where it is
    there, holds the names of the labels by number. The labels are declared as `oracle_label`, which only what begins
    with `oracle_`, `describe` and evaluation read.

    Args:
        folder (`str` or `os.PathLike`):
            Where the files are.

    Returns:
        `dict[str, PseudolabelPool]`: by split, voters `lf_0`, `lf_1` and so on at level 0, the fields of `data` as
        inputs.

    Raises:
        FileNotFoundError: If none of the three files is there.
        ValueError: If a file is not as said above.

    Source:
        Zhang et al., WRENCH, NeurIPS 2021 (data sets and benchmarks).
    """
    paths = {split: Path(folder) / f"{split}.json" for split in _SPLITS}
    tables = {split: read_json(path) for split, path in paths.items() if path.is_file()}
    if not tables:
        raise FileNotFoundError(f"'{folder}' must hold one of {[f'{name}.json' for name in _SPLITS]}, got none.")
    names_path = Path(folder) / "label.json"
    if names_path.is_file():
        # By number, which need not be the order in which they stand in the file.
        by_number = {str(key): str(value) for key, value in read_json(names_path).items()}
        if set(by_number) != {str(index) for index in range(len(by_number))}:
            raise ValueError(
                f"'{names_path}' must hold a name for each label by its number, counted from 0, got "
                f"{shorten(by_number)}. Number them so."
            )
        labels = [by_number[str(index)] for index in range(len(by_number))]
    else:
        seen = {row.get("label") for table in tables.values() for row in table.values()}
        labels = _seen_labels(list(seen), f"the labels of '{folder}'")
    return {split: _read_wrench_split(table, labels, paths[split]) for split, table in tables.items()}


def _read_wrench_split(table: Mapping[str, Any], labels: Sequence[str], path: Path) -> PseudolabelPool:
    rows = list(table.values())
    fields = {"label", "weak_labels", "data"}
    wrong = [
        key
        for key, row in table.items()
        if not (isinstance(row, Mapping) and fields <= set(row) and isinstance(row["data"], Mapping))
        or not isinstance(row["weak_labels"], list)
    ]
    if wrong or len({len(row["weak_labels"]) for row in rows}) != 1:
        found = f"no such row {wrong[0]!r}" if wrong else "rows of different length, or none"
        raise ValueError(
            f"'{path}' must hold {sorted(fields)} by id, one `weak_labels` for each function, got {found}."
        )
    # Ours last: a field called `id` in the data is not what rows are known by here.
    inputs = Dataset.from_list([{**row["data"], "id": key} for key, row in table.items()])
    truth = [row["label"] for row in rows]
    # A split may come without truth for some rows: `read_labels` would refuse such a column as ground truth.
    if all(isinstance(label, int) and 0 <= label < len(labels) for label in truth):
        inputs = inputs.add_column(ORACLE_LABEL, truth, feature=ClassLabel(names=list(labels)))
    votes = [row["weak_labels"] for row in rows]
    return pool_from_votes(votes, [f"lf_{index}" for index in range(len(votes[0]))], labels, inputs)

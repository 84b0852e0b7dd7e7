"""Run teachers over the rows they have to label, batch by batch, and keep each answer."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from datasets import ClassLabel, Dataset, Image
from PIL.Image import DecompressionBombError
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from tqdm.auto import tqdm

from ..data.columns import shorten
from ..data.inputs import RowError, decode_image
from ..data.keys import cell_digest
from ..data.loading import tell_error
from ..hierarchy import Teacher, TeacherHierarchy
from ..pool.base import TeacherPool
from ..processes import Processes
from .forms import Form
from .kinds.base import ROW, Answers, TeacherModel
from .kinds.column import ColumnTeacher
from .kinds.loading import column_of
from .progress import Part, Progress

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Teachers whose weight files are together at most this large run side by side, so that a row is read once for all.
_MEMORY_BUDGET = 4 * 2**30
# Answers that are in a column already are read in pieces of this many rows, inputs in pieces of `batch_size`.
ROWS_AT_ONCE = 8192
# What decoders make of bytes that are no image; PIL raises SyntaxError for broken PNG files.
DECODE_ERRORS = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, OSError, RuntimeError, SyntaxError, TypeError),
    *(ValueError, DecompressionBombError, struct.error, zlib.error),
)
# How the note on a bug begins that tells whose it is.
BLAMED = "Raised by teacher"


@dataclass(frozen=True)
class Columns:
    """Which column of the data plays which part, and which each teacher reads: None for the inputs."""

    inputs: str | None
    oracle: str | None
    oracle_domain: str | None
    read: Mapping[str, str | None]


def read_names(dataset: Dataset, column: str) -> list[Any]:
    """A column's values, those of a `ClassLabel` as names."""
    return _as_names(dataset.select_columns([column])[:][column], dataset.features[column])


def _as_names(values: list[Any], feature: Any) -> list[Any]:
    """Values of a column, those of a `ClassLabel` as names: its ids need not be those of the task."""
    if not isinstance(feature, ClassLabel):
        return list(values)
    return [None if value is None or value < 0 else feature.int2str(value) for value in values]


# ── the work ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Job:
    """All that one call of `build_pool` has to do."""

    dataset: Dataset
    hierarchy: TeacherHierarchy
    models: Mapping[str, TeacherModel]
    columns: Columns
    ids: Sequence[int] | Sequence[str]
    inputs: Dataset | None
    form: Form
    batch_size: int
    device: torch.device
    precision: str
    num_workers: int
    on_error: str
    disable_tqdm: bool
    processes: Processes
    output_dir: Path | None
    reuse: TeacherPool | None
    reused: frozenset[str]
    source: Mapping[str, Any] | None
    commits: Mapping[str, str | None]

    def autocast(self) -> AbstractContextManager[object]:
        """Mixed precision, where it is wanted."""
        dtype = PRECISIONS[self.precision]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def is_column(self, teacher: Teacher) -> bool:
        """Whether a teacher's answers stand in a column of the data, and in no object instead."""
        return teacher.kind == "column" and teacher.name not in self.models

    @property
    def row_columns(self) -> list[str]:
        """`list[str]`: Columns of a row that a teacher may see whole: all but the ground truth."""
        hidden = (self.columns.oracle, self.columns.oracle_domain)
        return [name for name in self.dataset.column_names if name not in hidden]

    def plan(self) -> dict[str, Any]:
        """What decides the labels, besides the weights of the teachers: work under another plan is not continued."""
        named = [column_of(teacher) for teacher in self.hierarchy.teachers]
        read = [self.columns.inputs, *named, *(self.row_columns if ROW in named else ())]
        known = set(self.dataset.column_names)
        # Other ids would put what was labelled under other examples.
        digest = hashlib.blake2b("\n".join(map(repr, self.ids)).encode("utf-8"), digest_size=8)
        return {
            "hierarchy": self.hierarchy.to_dict(),
            **self.form.plan(),
            "precision": self.precision,
            "num_rows": len(self.dataset),
            "ids": digest.hexdigest(),
            "columns": _sample_columns(self.dataset, [name for name in dict.fromkeys(read) if name and name in known]),
        }

    def disk_needs(self, row_bytes: int) -> int:
        """About how many bytes the work takes: labels as they come, and in the files that are kept."""
        # A digest of 32 digits with its offset, or an `int64`.
        id_bytes = 40 if isinstance(self.ids[0], str) else 8
        num_teachers = len(self.hierarchy.teachers) - len(self.reused)
        # Twice: the journal stays until the pool is whole; and once more for the teacher that is being written.
        labels = len(self.ids) * (num_teachers * (2 * row_bytes + id_bytes) + row_bytes)
        return labels + (self.inputs.data.nbytes if self.output_dir is not None and self.inputs is not None else 0)


def _sample_columns(dataset: Dataset, columns: list[str]) -> dict[str, dict[str, str]]:
    """Types of columns and hashes of a few of their cells: other data are to be noticed without reading all of it."""
    if not columns:
        return {}
    # 16 rows, first and last among them, find other data or another order; `unique` for fewer rows than that.
    rows = np.unique(np.linspace(0, len(dataset) - 1, 16).astype(int))
    few = dataset.select_columns(columns).with_format("arrow")[rows]  # all at once: a row is taken from every column
    features = dataset.features  # a copy of all of them each time
    digests = {name: "".join(map(cell_digest, few.column(name).to_pylist())) for name in columns}
    return {
        name: {"type": str(features[name]), "cells": hashlib.blake2b(digest.encode(), digest_size=8).hexdigest()}
        for name, digest in digests.items()
    }


def group_teachers(
    job: Job, missing: Mapping[str, list[tuple[int, int]]], sizes: Mapping[str, int]
) -> list[list[Teacher]]:
    """Teachers with work left: those that need no model, then models side by side as far as memory allows."""
    teachers = [teacher for teacher in job.hierarchy.teachers if missing.get(teacher.name)]
    groups: list[list[Teacher]] = [[teacher for teacher in teachers if job.is_column(teacher)], []]
    for teacher in teachers:
        if not job.is_column(teacher):
            # What is loaded already takes no more memory, and what is not on this disk yet cannot be known.
            if sum(sizes.get(other.name, 0) for other in [*groups[-1], teacher]) > _MEMORY_BUDGET:
                groups.append([])
            groups[-1].append(teacher)
    return [group for group in groups if group]


# ── running ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Batch:
    """Rows `start` to `stop`, and who labels them."""

    start: int
    stop: int
    names: tuple[str, ...]


def label_group(
    job: Job, progress: Progress, group: Sequence[Teacher], missing: Mapping[str, list[tuple[int, int]]]
) -> None:
    """Load some teachers and run them side by side; their memory is free again before the next ones are loaded."""
    models = {
        teacher.name: job.models[teacher.name]
        if teacher.name in job.models
        else job.form.load(teacher, job.device, job.commits.get(teacher.name))
        for teacher in group
    }
    job.processes.on_first(partial(progress.add_facts, {name: model.facts for name, model in models.items()}))
    # Without a model nothing is gained by small batches.
    is_cheap = all(map(job.is_column, group))
    step = max(ROWS_AT_ONCE, job.batch_size) if is_cheap else job.batch_size * job.form.batches_at_once
    _label_share(job, progress, models, _cut_batches({name: missing[name] for name in models}, len(job.ids), step))
    # Else they would be held here still when CUDA is asked to give memory back.
    del models
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _label_share(job: Job, progress: Progress, models: Mapping[str, TeacherModel], batches: list[_Batch]) -> None:
    """Label this process's share of the batches."""
    # Consecutive shares, so that each process reads its part of the files in order.
    bounds = np.linspace(0, len(batches), job.processes.count + 1).astype(int)
    own = batches[bounds[job.processes.rank] : bounds[job.processes.rank + 1]]
    reader = _Reader(job, models, own)
    with ExitStack() as stack:
        parts = {name: stack.enter_context(closing(progress.start_part(name))) for name in models if own}
        title = f"Teachers {shorten(models, 3)}"
        total = sum(batch.stop - batch.start for batch in own)
        hide = job.disable_tqdm or job.processes.rank > 0
        bar = stack.enter_context(tqdm(total=total, desc=title, disable=hide))
        for batch, (failed, inputs) in zip(own, _load_batches(job, reader)):
            for name in batch.names:
                model, key = models[name], reader.keys[name]
                answers, reasons = _answer(job, reader, batch, name, model, failed[model.column], inputs.get(key))
                _append(job, name, parts[name], batch, answers, reasons)
            bar.update(batch.stop - batch.start)


def _cut_batches(missing: Mapping[str, list[tuple[int, int]]], num_rows: int, step: int) -> list[_Batch]:
    """Cut the rows into batches, each with the teachers that have not labelled it."""
    ends = [edge for gaps in missing.values() for gap in gaps for edge in gap]
    # Edges are multiples of `step`, and where earlier work of another step has begun or ended.
    edges = np.unique(np.concatenate([np.arange(0, num_rows, step), [num_rows], ends]).astype(np.int64))
    lacking = np.zeros((len(missing), len(edges) - 1), dtype=bool)
    for flags, gaps in zip(lacking, missing.values()):
        for start, stop in gaps:
            flags[np.searchsorted(edges, start) : np.searchsorted(edges, stop)] = True
    names = np.array(list(missing), dtype=object)
    return [
        _Batch(int(edges[i]), int(edges[i + 1]), tuple(names[lacking[:, i]]))
        for i in np.flatnonzero(lacking.any(axis=0))
    ]


# Why a row of a batch failed: a sentence that ends with what was got, and the exception where there is one.
_Reasons = dict[int, tuple[str, Exception | None]]


class _Reader(TorchDataset):
    """Batches as models read them: each cell decoded once, and prepared once for all who prepare it alike."""

    def __init__(self, job: Job, models: Mapping[str, TeacherModel], batches: Sequence[_Batch]) -> None:
        self.batches, self.input_column, self.row_columns = batches, job.columns.inputs, job.row_columns
        self.keys: dict[str, tuple[str | None, str]] = {}
        self.sources: dict[tuple[str | None, str], tuple[str, Callable[[Sequence[Any]], Any]]] = {}
        for name, model in models.items():
            # Teachers of equal preprocessing share one tensor; one that tells none shares with nobody.
            key = self.keys[name] = (model.column, model.facts.get("preprocessing") or f"of '{name}' alone")
            self.sources.setdefault(key, (name, model.prepare))
        # All columns in one view: each view of its own would copy what is known of every column of the data.
        self.view = job.dataset.select_columns(sorted({name for key in self.sources for name in self._names(key[0])}))
        self.features = self.view.features
        self.images = {name: Image(mode=kind.mode) for name, kind in self.features.items() if isinstance(kind, Image)}
        for name in self.images:
            # Decoded here, a row at a time: one broken image must not take its batch along.
            self.view = self.view.cast_column(name, Image(decode=False))
        self.last: tuple[_Batch, dict[str, tuple[dict[int, Any], _Reasons]]] | None = None

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[dict[str | None, _Reasons], dict[tuple[str | None, str], Any]]:
        batch = self.batches[index]
        keys = sorted({self.keys[name] for name in batch.names}, key=str)
        read = {column: self.read(column, batch) for column in {column for column, _ in keys}}
        inputs = {}
        for key in keys:
            if cells := list(read[key[0]][0].values()):
                # Where it fails, nothing is given, and the main process finds the row that is at fault.
                name, prepare = self.sources[key]
                with suppress(RowError), _told(name, len(cells)):
                    inputs[key] = prepare(cells)
        return {column: failed for column, (_, failed) in read.items()}, inputs

    def read(self, column: str | None, batch: _Batch) -> tuple[dict[int, Any], _Reasons]:
        """Cells by their place in the batch, and why others cannot be read; column `None` is that of the inputs."""
        if column == ROW:
            return self._read_rows(batch)
        [name] = self._names(column)
        cells, failed = self._decoded(batch)[name]
        if column is None:
            empty = [place for place, cell in cells.items() if cell is None]
            cells = {place: cell for place, cell in cells.items() if cell is not None}
            what = f"Column '{name}' must hold an input in every row, got None"
            failed = {place: failed.get(place, (what, None)) for place in sorted({*failed, *empty})}
        return cells, failed

    def _read_rows(self, batch: _Batch) -> tuple[dict[int, Any], _Reasons]:
        """Rows as dictionaries; without those of which a cell cannot be read."""
        failed: _Reasons = {}
        rows: dict[int, Any] = {place: {} for place in range(batch.stop - batch.start)}
        for name in self.row_columns:
            cells, broken = self._decoded(batch)[name]
            failed = broken | failed
            for place, cell in cells.items():
                rows[place][name] = cell
        return {place: row for place, row in rows.items() if place not in failed}, failed

    def _decoded(self, batch: _Batch) -> dict[str, tuple[dict[int, Any], _Reasons]]:
        """Each column of a batch: once, for one may be read for itself and as a part of rows."""
        if self.last is None or self.last[0] is not batch:
            table = self.view[batch.start : batch.stop]
            self.last = (batch, {name: self._decode(name, values) for name, values in table.items()})
        return self.last[1]

    def _decode(self, name: str, values: list[Any]) -> tuple[dict[int, Any], _Reasons]:
        cells: dict[int, Any] = {}
        failed: _Reasons = {}
        for place, cell in enumerate(_as_names(values, self.features[name])):
            try:
                is_encoded = name in self.images and cell is not None
                cells[place] = decode_image(cell, self.images[name]) if is_encoded else cell
            except DECODE_ERRORS as error:
                failed[place] = f"Column '{name}' must hold images that can be read, got {tell_error(error)}", None
        return cells, failed

    def _names(self, column: str | None) -> list[str]:
        return self.row_columns if column == ROW else [str(self.input_column if column is None else column)]


def _load_batches(job: Job, reader: _Reader) -> DataLoader:
    return DataLoader(
        reader,
        # The reader gives whole batches; the loader would stack rows that are of many sizes.
        batch_size=None,
        num_workers=job.num_workers,
        collate_fn=_as_it_is,
        pin_memory=job.num_workers > 0 and job.device.type == "cuda",
        # Its own generator: the loader draws a number, and labelling must not move anybody's random state.
        generator=torch.Generator(),
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def _answer(
    job: Job, reader: _Reader, batch: _Batch, name: str, model: TeacherModel, failed: _Reasons, inputs: Any
) -> tuple[np.ndarray, _Reasons]:
    """A teacher's answers to a batch, one for each row and nothing where it failed, and why it did."""
    said, reasons = job.form.nothing(batch.stop - batch.start), dict(failed)
    rows = np.setdiff1d(np.arange(len(said)), list(failed))
    if inputs is not None:
        _ask(job, name, model, inputs, rows, said, reasons)
    else:
        cells = [cell for place, cell in reader.read(model.column, batch)[0].items() if place not in failed]
        _ask_parts(job, name, model, cells, rows, said, reasons)
    if wrong := job.form.find_wrong(name, said):
        reasons |= {place: (what, None) for place, what in wrong.items()}
        said[list(wrong)] = job.form.nothing(len(wrong))
    return said, reasons


def _ask(
    job: Job, name: str, model: TeacherModel, inputs: Any, rows: np.ndarray, said: np.ndarray, reasons: _Reasons
) -> None:
    """Put a model's answers into their rows, and of some kinds why rows have none."""
    with _told(name, len(rows)), job.autocast():
        given = model(inputs)
        answers = np.asarray(given.probs if isinstance(given, Answers) else given, dtype=job.form.dtype)
    if answers.shape != (shape := (len(rows), *said.shape[1:])):
        found = f"{job.form.what} of shape {shape}, got {answers.shape}"
        raise ValueError(f"Teacher '{name}' must give {found}. Correct its `__call__`.")
    said[rows] = answers
    if isinstance(given, Answers):
        reasons |= {int(rows[place]): (str(error), error) for place, error in given.errors.items()}


def _ask_parts(
    job: Job, name: str, model: TeacherModel, cells: list[Any], rows: np.ndarray, said: np.ndarray, reasons: _Reasons
) -> None:
    """Do as [`_ask`] does: what cannot be prepared is halved until the rows at fault are alone."""
    if not cells:
        return
    try:
        with _told(name, len(cells)):
            inputs = model.prepare(cells)
    except RowError as error:
        if len(cells) == 1:
            what = f"Teacher '{name}' must be able to read every row, got: {str(error).rstrip('.')}"
            reasons[int(rows[0])] = what, error
            return
    else:
        return _ask(job, name, model, inputs, rows, said, reasons)
    # One row at fault costs about 2 log2 of the batch in calls, not one call per row.
    half = len(cells) // 2
    for part in (slice(0, half), slice(half, None)):
        _ask_parts(job, name, model, cells[part], rows[part], said, reasons)


class _told(AbstractContextManager[None]):  # noqa: N801
    """Say of what a teacher raises, which is no fault of a row, whose it is; and what to do where memory runs out."""

    def __init__(self, name: str, num_rows: int) -> None:
        self.name, self.num_rows = name, num_rows

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if not isinstance(error, Exception) or isinstance(error, RowError):
            return
        # accelerate knows by their text the errors of CUDA and of the CPU's allocator that are no `MemoryError`.
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or should_reduce_batch_size(error):
            raise MemoryError(
                f"A batch of {self.num_rows} rows for teacher '{self.name}' must fit into memory, got: {error} Choose "
                "a smaller `batch_size`."
            ) from error
        error.add_note(f"{BLAMED} '{self.name}' on a batch of {self.num_rows} rows; no row is blamed for it.")


def tell_unmatched(job: Job, name: str) -> str:
    """List what a column of answers holds that is no answer: its rows are too many to be looked through one by one."""
    teacher = job.hierarchy.teachers[job.hierarchy.index(name)]
    if not job.is_column(teacher) or not job.hierarchy.labels:
        return ""
    cells = read_names(job.dataset, teacher.model)
    table = ColumnTeacher(teacher, job.hierarchy.labels).tell_unmatched(cells)
    return f" Such answers, and how often they are there: {table}."


def _append(job: Job, name: str, part: Part, batch: _Batch, answers: np.ndarray, reasons: _Reasons) -> None:
    """Put a batch on disk, or refuse it if a row of it failed and may not be missing."""
    failed_rows = [batch.start + place for place in sorted(reasons)]
    if failed_rows and job.on_error == "raise":
        # The first row of the batch, whatever order they failed in: the sentence is the same in every run.
        what, error = reasons[min(reasons)]
        what_is_lost = "labels" if job.hierarchy.labels else "answers"
        others = len(failed_rows) - 1
        more = f" (and {others} more of the {len(answers)} rows read with it)" if others else ""
        raise ValueError(
            f"{what} in row {failed_rows[0]} (id {job.ids[failed_rows[0]]!r}) for teacher '{name}'{more}. Fix or drop "
            f'that row, or leave such rows without {what_is_lost} by `on_error="missing"`.{tell_unmatched(job, name)}'
        ) from error
    reason = reasons[min(reasons)][0] if reasons else ""
    job.form.append(part, batch.start, answers, failed_rows, reason)

"""The pool that is made of what teachers have labelled: whole or not at all, and what is told of it."""

from __future__ import annotations

import logging
import shutil
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Image, concatenate_datasets

from ..data.columns import is_vector_column
from ..data.inputs import decode_image, to_pil
from ..data.vectors import unreadable_vectors
from ..files import move_file
from ..pool.base import TeacherPool
from ..pool.ids import match_ids
from .progress import Progress, Segment
from .running import DECODE_ERRORS, Job, tell_unmatched

logger = logging.getLogger(__name__)
_MANY = 32  # rows of which a model that tells labels apart would not give the same to each


def finish(job: Job, progress: Progress) -> TeacherPool:
    """Make the pool of what lies in the journal, the same in every process."""
    facts = job.processes.on_first(partial(_write_teachers, job, progress))
    if job.output_dir is not None:
        job.processes.on_first(partial(_save, job, progress, facts))
    pool = _open_pool(job, progress, facts) if job.output_dir is None else job.form.pool.load(job.output_dir)
    job.processes.on_first(partial(_tell_constant, job, pool))
    job.processes.wait()  # everybody has mapped the files before the first process may delete them
    if job.output_dir is None and job.processes.rank == 0:
        progress.drop(*facts)
        weakref.finalize(pool, shutil.rmtree, progress.folder, ignore_errors=True)
    return pool


def _teacher_file(progress: Progress, name: str) -> Path:
    return progress.scratch / "teachers" / name / "data.arrow"


def _write_teachers(job: Job, progress: Progress) -> dict[str, dict[str, Any]]:
    """Put each teacher's labels in the order of the rows into a file; the facts of all teachers."""
    facts: dict[str, dict[str, Any]] = {}
    known = progress.facts
    for teacher in job.hierarchy.teachers:
        name = teacher.name
        if name in job.reused and job.reuse is not None:
            facts[name] = dict(job.reuse.facts.get(name, {}))
            # In the same order the old file serves as it is.
            if not np.array_equal(job.reuse.ids, np.asarray(job.ids)):
                rows = match_ids(job.reuse.ids, np.asarray(job.ids), "`reuse`")
                job.form.write(_teacher_file(progress, name), job.ids, job.form.stored(job.reuse, name, rows))
            continue
        segments = progress.segments(name)
        num_failed = _check_segments(job, progress, name, segments)
        job.form.write(_teacher_file(progress, name), job.ids, progress.rows(segments))
        num_answered = sum(segment.num_answered for segment in segments)
        facts[name] = known[name] | {"precision": job.precision, "num_failed": num_failed, **job.form.facts(segments)}
        if teacher.leaves_labels_out and teacher.has_files:
            num_outside = len(job.ids) - num_answered - num_failed
            facts[name] |= {"num_outside": num_outside, "num_rescaled": num_answered}
    return facts


def _check_segments(job: Job, progress: Progress, name: str, segments: Sequence[Segment]) -> int:
    """Number of rows that a teacher failed on; an error if it is all of them."""
    num_failed = sum(segment.num_failed for segment in segments)
    ids = [job.ids[row] for segment in segments for row in segment.failed_rows]
    reason = next((segment.reason for segment in segments if segment.num_failed), "")
    if num_failed == len(job.ids):
        # Or the same call with a corrected teacher would find all of its rows done.
        progress.drop(name)
        what_is_done = "label" if job.hierarchy.labels else "answer"
        raise ValueError(
            f"Teacher '{name}' must be able to {what_is_done} at least one row, got {num_failed} of {len(job.ids)} "
            f"rows that it failed on, id {ids[0]!r} first: {reason}. Correct the teacher, or the column that it reads."
            f"{tell_unmatched(job, name)}"
        )
    if not num_failed and not any(segment.num_answered for segment in segments):
        logger.warning(
            f"Teacher '{name}' has no answer for any of {len(job.ids)} rows, and tells nothing of them. Correct it, "
            "or leave it out."
        )
    if num_failed:
        first = f"{ids[:5]}{' and others' if num_failed > 5 else ''}"
        logger.warning(
            f"Teacher '{name}' failed on {num_failed} of {len(job.ids)} rows, which are missing in its "
            f"{job.form.pool.answers.lower()}: ids {first}. Of id {ids[0]!r}: {reason}.{tell_unmatched(job, name)}"
        )
    return num_failed


def _tell_constant(job: Job, pool: Any) -> None:
    """Tell of a model that should know several labels and gives each row the same."""
    # Columns and functions may be of one label on purpose, as labelling functions are.
    for teacher in job.hierarchy.teachers if job.hierarchy.labels else ():
        if not teacher.has_files or teacher.name in job.reused or len(teacher.scope or job.hierarchy.labels) < 2:
            continue
        labels = pool.hard_labels(teacher.name)
        said = labels[labels >= 0]
        if len(said) < _MANY or (said != said[0]).any():
            continue
        option = " With option `correct_prior` it is asked what it says of nothing, which is divided out."
        logger.warning(
            f"Teacher '{teacher.name}' gives {job.hierarchy.labels[said[0]]!r} to each of {len(said)} rows, and tells "
            "nothing apart. Correct what it is asked, or its `label_map`, or leave it out."
            f"{option if teacher.kind in ('prompted', 'zero_shot') else ''}"
        )


def _open_pool(job: Job, progress: Progress, facts: Mapping[str, Any]) -> TeacherPool:
    teachers = {
        name: Dataset.from_file(str(path)) if path.is_file() or job.reuse is None else job.reuse.teachers[name]
        for name in job.hierarchy.names
        for path in [_teacher_file(progress, name)]
    }
    pool = job.form.pool(job.hierarchy, teachers, job.inputs, facts, job.source, input_column=job.columns.inputs)
    if (unreadable := _find_unreadable(job, pool)).size and pool.inputs is not None:
        pool.inputs = _empty_cells(pool.inputs, str(job.columns.inputs), unreadable)
    return pool


def _find_unreadable(job: Job, pool: Any) -> np.ndarray:
    """Rows of which the pool would keep what no model can read: an image, where a teacher failed, or a vector."""
    column, readers = job.columns.inputs, [name for name, read in job.columns.read.items() if read is None]
    # Decoding every image again would cost as much as labelling did.
    failed = [name for name in readers if pool.facts[name].get("num_failed")]
    feature = pool.inputs.features.get(column) if pool.inputs is not None else None
    # Vectors are checked by their numbers, which is quick whoever failed.
    if job.on_error == "missing" and feature is not None and is_vector_column(pool.inputs, str(column)):
        return unreadable_vectors(pool.inputs, str(column))
    if not failed or pool.inputs is None or column is None or not isinstance(feature, Image):
        return np.zeros(0, dtype=np.int64)
    rows = np.flatnonzero(np.all([~pool.answered(name) for name in readers], axis=0))
    cells = pool.inputs.select_columns([column]).cast_column(column, Image(decode=False)).select(rows)
    decoder = Image(mode=feature.mode)
    return rows[[not _is_readable(cell[column], decoder) for cell in cells]]


def _is_readable(cell: Any, decoder: Image) -> bool:
    try:
        return cell is None or to_pil(decode_image(cell, decoder)) is not None
    except DECODE_ERRORS:
        return False


def _empty_cells(inputs: Dataset, column: str, rows: np.ndarray) -> Dataset:
    """The same inputs without what is in some rows of a column; nothing but those rows is copied."""
    few = inputs.select_columns([name for name in inputs.column_names if name != column]).select(rows)
    few = few.add_column(column, [None] * len(rows), feature=inputs.features[column])
    # Those rows are taken from behind the end, where their empty twins are.
    order = np.arange(len(inputs))
    order[rows] = len(inputs) + np.arange(len(rows))
    return concatenate_datasets([inputs, few.select_columns(inputs.column_names)]).select(order)


def _save(job: Job, progress: Progress, facts: Mapping[str, Any]) -> None:
    """Save the pool beside the journal, rename it into its place, and throw the journal away."""
    # On the disk of its place, so that one rename makes it whole there.
    finished = progress.scratch / "pool"
    _open_pool(job, progress, facts).save(finished)
    move_file(finished, Path(str(job.output_dir)))
    progress.close()
    shutil.rmtree(progress.folder, ignore_errors=True)

"""Run every teacher over a dataset once: the only place where a teacher runs."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import shutil
import struct
import tempfile
import weakref
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from datasets import (
    ClassLabel,
    Dataset,
    Image,
    IterableDataset,
    Value,
    concatenate_datasets,
)
from PIL.Image import DecompressionBombError
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from tqdm.auto import tqdm

from .files import check_free, explain_full_disk, move_file
from .inputs import (
    RowError,
    as_label_id,
    cell_digest,
    check_column_name,
    find_input_column,
    row_keys,
    shorten,
    to_pil,
)
from .journal import Journal, Part, Segment
from .pool import ORACLE_DOMAIN, ORACLE_LABEL, PseudolabelPool, match_ids
from .pool_files import write_teacher
from .processes import Processes, join_processes
from .sources import DataChoice, find_data, tell_error
from .sparse import SUM_TOLERANCE, default_pool_k, dropped_mass, encode_top_k, label_dtype
from .teacher_models import SKLEARN_FEATURE_KINDS as SKLEARN_FEATURE_KINDS
from .teacher_models import (
    TeacherModel,
    check_teacher_model,
    default_device,
    identify_teacher,
    label_finder,
    load_teacher,
)
from .teacher_models import save_sklearn_teacher as save_sklearn_teacher
from .teachers import Teacher, TeacherHierarchy, is_writable_text

logger = logging.getLogger(__name__)

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
ON_ERROR = ("raise", "missing")
# Teachers whose weight files are together at most this large run side by side, so that a row is read once for all.
_MEMORY_BUDGET = 4 * 2**30
# Answers that are in a column already are read in pieces of this many rows, inputs in pieces of `batch_size`.
_CHUNK = 8192
# Column names that usually hold ground truth. Any `ClassLabel` column is taken for ground truth as well.
_GOLD_NAMES = frozenset(
    ("label", "labels", "target", "targets", "gold", "gold_label", "ground_truth", "class", "y", "coarse_label")
    + ("fine_label", "label_ids", ORACLE_LABEL, ORACLE_DOMAIN)
)
# What decoders make of bytes that are no image; PIL raises SyntaxError for broken PNG files.
_DECODE_ERRORS = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, OSError, RuntimeError, SyntaxError, TypeError),
    *(ValueError, DecompressionBombError, struct.error, zlib.error),
)
T = TypeVar("T")


def build_pool(
    dataset: Dataset | IterableDataset | str,
    hierarchy: TeacherHierarchy,
    *,
    split: str = "train",
    revision: str | None = None,
    config_name: str | None = None,
    streaming: bool = False,
    input_column: str | None = None,
    oracle_column: str | None = None,
    oracle_domain_column: str | None = None,
    pool_k: int | None = None,
    batch_size: int = 64,
    output_dir: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    keep_inputs: bool = True,
    disable_tqdm: bool = False,
    models: Mapping[str, TeacherModel] | None = None,
    precision: str = "float32",
    num_workers: int = 0,
    on_error: str = "raise",
    reuse: PseudolabelPool | None = None,
    source: Mapping[str, str] | None = None,
) -> PseudolabelPool:
    """Label a dataset with every teacher of a hierarchy, each of which is loaded and run once.

    Labels go to disk batch by batch, so memory does not grow with the data. With `output_dir`, a run that was stopped
    goes on where it was when it is started again, on any number of processes, and labels no row twice; until it is
    whole, the work lies in the hidden folder `.NAME.unfinished` beside `output_dir`. Started on several processes
    (`torchrun`, `accelerate launch`), each labels its share of the rows, and every process gets the whole pool.

    Args:
        dataset (`datasets.Dataset`, `datasets.IterableDataset` or `str`):
            Unlabelled data, a folder of `save_to_disk`, or the id of a data set on the Hub. An `id` column of unique
            integers or strings is used if there is one; otherwise ids are hashes of the content.
        hierarchy (`TeacherHierarchy`):
            The teachers.
        split (`str`, *optional*, defaults to `"train"`):
            Which split of a folder or a data set on the Hub.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub. Whichever it is, the pool's `source` records the commit.
        config_name (`str`, *optional*):
            Which configuration of a data set on the Hub that has several.
        streaming (`bool`, *optional*, defaults to `False`):
            Read a data set on the Hub row by row instead of downloading its files first.
        input_column (`str`, *optional*):
            The column that models read. Defaults to the only image column, or `text` and the like.
        oracle_column (`str`, *optional*):
            Column of ground truth, kept as `oracle_label`, which nothing but `oracle_…` functions reads. Ground truth
            that is not declared here is refused.
        oracle_domain_column (`str`, *optional*):
            Column of the true domain, kept as `oracle_domain`.
        pool_k (`int`, *optional*):
            How many labels to keep per row, 1 to `num_labels`. Defaults to `min(16, num_labels)`.
        batch_size (`int`, *optional*, defaults to 64):
            Rows per forward pass.
        output_dir (`str` or `os.PathLike`, *optional*):
            Where to save the pool, whole or not at all; the pool that comes back is then mapped from there. Without
            it, labels lie in a temporary folder for as long as the pool lives.
        device (`str` or `torch.device`, *optional*):
            Where teachers run. Defaults to the first GPU if there is one.
        keep_inputs (`bool`, *optional*, defaults to `True`):
            Whether the pool keeps the input column. Without it, training needs the data as `train_dataset`.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Hide the progress bars.
        models (`Mapping[str, TeacherModel]`, *optional*):
            Teachers that are loaded already, by their names in the hierarchy.
        precision (`str`, *optional*, defaults to `"float32"`):
            `"float32"`, or mixed precision in `"bfloat16"` or `"float16"`. Probabilities are float32 in any case.
        num_workers (`int`, *optional*, defaults to 0):
            Processes that decode and prepare inputs; 0 for this process.
        on_error (`str`, *optional*, defaults to `"raise"`):
            What to do with a row that cannot be read or made into what a teacher reads, or whose answer is no
            distribution: `"raise"` an error that names it, or leave it `"missing"` for the teachers concerned, counted
            as `num_failed` in their facts. An input that no model could read is missing in the pool too. Any other
            error of a teacher is raised in any case.
        reuse (`PseudolabelPool`, *optional*):
            A pool of the same data. Its teachers that are in `hierarchy` too, at any level, are not run again, and
            their files are linked, not copied.
        source (`Mapping[str, str]`, *optional*):
            Where data that are loaded already are from, where you know it: `dataset` (a Hub id) and `commit`, `config`
            or `split`. Of data given by their id it is found out.

    Returns:
        [`PseudolabelPool`]: Its `facts` hold for each teacher, besides those of [`TeacherModel`], `precision`,
        `num_failed` and `dropped_mass`, the mean probability mass of an answered row that `pool_k` left out.

    Raises:
        FileExistsError: If `output_dir` holds something already.
        MemoryError: If a batch does not fit into memory.
        OSError: If the disk is full: what is labelled stays beside `output_dir`. If a data set on the Hub cannot be
            reached, does not exist or may not be read.
        RuntimeError: If another run is labelling into `output_dir`.
        TypeError: If `dataset` is not one split of data, or a column or an object among `models` is none.
        ValueError: If it has no such split or configuration, would need code from the Hub, is empty, holds undeclared
            ground truth or unusable ids, a teacher's answer is not valid, or the work that was begun beside
            `output_dir` is that of another pool.
    """
    _check_arguments(dataset, hierarchy, pool_k, batch_size, output_dir)
    for name, column in (
        ("input_column", input_column), ("oracle_column", oracle_column),
        ("oracle_domain_column", oracle_domain_column),
    ):  # fmt: skip
        check_column_name(column, name)
    if not isinstance(models, Mapping | None):
        raise TypeError(f"`models` must be teacher objects by their names, got {type(models).__name__}. Make a dict.")
    models = dict(models or {})
    _check_options(hierarchy, models, precision, num_workers, on_error)
    processes = _join_processes(output_dir)
    identities, sizes = processes.on_first(partial(_identify, hierarchy, models))
    reused = frozenset[str]() if reuse is None else _find_reused(reuse, hierarchy, identities)
    dataset, found = find_data(dataset, DataChoice(split, revision, config_name, streaming), processes)
    source = dict(source) if source else found
    dataset = dataset.with_format(None)
    if len(dataset) == 0:
        raise ValueError("`dataset` must hold at least one example, got none. Check its split or its filter.")
    columns = _check_columns(dataset, hierarchy, models, reused, input_column, oracle_column, oracle_domain_column)
    ids = _find_ids(dataset, columns.inputs)
    inputs = _pool_inputs(dataset, ids, hierarchy, columns, keep_inputs)
    job = _Job(
        dataset=dataset, hierarchy=hierarchy, models=models, columns=columns, ids=ids, inputs=inputs,
        k=default_pool_k(hierarchy.num_labels) if pool_k is None else pool_k, batch_size=batch_size,
        device=default_device() if device is None else torch.device(device), precision=precision,
        num_workers=num_workers, on_error=on_error, disable_tqdm=disable_tqdm, processes=processes,
        output_dir=None if output_dir is None else Path(output_dir), reuse=reuse, reused=reused, source=source,
        commits={name: identity.get("commit") for name, identity in identities.items()},
    )  # fmt: skip
    return _run(job, identities, sizes)


# ── the dataset ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Columns:
    """Which column of the data plays which part."""

    inputs: str | None
    oracle: str | None
    oracle_domain: str | None


def _check_arguments(
    dataset: Any, hierarchy: Any, pool_k: int | None, batch_size: int, output_dir: str | os.PathLike[str] | None
) -> None:
    """Everything that can be refused before any work."""
    if not isinstance(dataset, Dataset | IterableDataset | str):
        raise TypeError(
            f"`dataset` must be a `datasets.Dataset` or `IterableDataset`, a folder or a Hub id, got "
            f"{type(dataset).__name__}. Choose one split, such as `dataset['train']`."
        )
    if not isinstance(hierarchy, TeacherHierarchy):
        raise TypeError(f"`hierarchy` must be a `TeacherHierarchy`, got {type(hierarchy).__name__}.")
    if pool_k is not None and not 1 <= pool_k <= hierarchy.num_labels:
        raise ValueError(f"`pool_k` must lie in 1..{hierarchy.num_labels} (the number of labels), got {pool_k}.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    if output_dir is not None:
        check_free(Path(output_dir), "Load the pool with `PseudolabelPool.load`, or choose another folder.")


def _check_options(
    hierarchy: TeacherHierarchy,
    models: Mapping[str, TeacherModel],
    precision: str,
    num_workers: int,
    on_error: str,
) -> None:
    if unknown := sorted(set(models) - set(hierarchy.names)):
        raise ValueError(
            f"`models` must be named as teachers of the hierarchy {list(hierarchy.names)}, got {unknown}. Add them to "
            "the hierarchy, or correct the names."
        )
    for name, model in models.items():
        check_teacher_model(model, name)
    for name, value, allowed in (("precision", precision, list(PRECISIONS)), ("on_error", on_error, list(ON_ERROR))):
        if value not in allowed:
            raise ValueError(f"`{name}` must be one of {allowed}, got {value!r}. Choose one of them.")
    if num_workers < 0:
        raise ValueError(f"`num_workers` must be at least 0 (decode in this process), got {num_workers}.")


def _check_columns(
    dataset: Dataset,
    hierarchy: TeacherHierarchy,
    models: Mapping[str, TeacherModel],
    reused: frozenset[str],
    input_column: str | None,
    oracle_column: str | None,
    oracle_domain_column: str | None,
) -> _Columns:
    """Find the input column, and refuse ground truth that nobody declared."""
    read = {teacher.name: teacher.model if teacher.kind == "column" else None for teacher in hierarchy.teachers}
    read |= {name: model.column for name, model in models.items()}
    answers = {column: name for name, column in read.items() if column is not None}
    declared = {"`oracle_column`": oracle_column, "`oracle_domain_column`": oracle_domain_column}
    declared |= {f"`model` of teacher '{name}'": column for column, name in answers.items() if name not in reused}
    for what, column in declared.items():
        if column is not None and column not in dataset.column_names:
            raise ValueError(
                f"{what} must be a column of the data {dataset.column_names}, got {column!r}. Correct the name."
            )
    if oracle_column is not None and oracle_column in answers:
        raise ValueError(
            f"Ground truth must reach no teacher, got column '{oracle_column}' both as `oracle_column` and as "
            f"the answers of teacher '{answers[oracle_column]}'. Leave one of the two out."
        )
    allowed = {*answers, oracle_column, oracle_domain_column, input_column}
    undeclared = [
        name
        for name, feature in dataset.features.items()
        if (name.lower() in _GOLD_NAMES or isinstance(feature, ClassLabel)) and name not in allowed
    ]
    if undeclared:
        raise ValueError(
            f"Data for a pool must hold no undeclared ground truth, got the columns {undeclared}. Keep one for "
            f"analysis with `oracle_column={undeclared[0]!r}`, or drop them with "
            f"`dataset.remove_columns({undeclared})`."
        )
    is_needed = input_column is not None or None in read.values()
    if is_needed or "id" not in dataset.column_names:
        input_column = find_input_column(dataset, input_column)
    return _Columns(input_column, oracle_column, oracle_domain_column)


def _find_ids(dataset: Dataset, input_column: str | None) -> list[int] | list[str]:
    """The ids in the data, or else keys made of the content."""
    if "id" not in dataset.column_names:
        return row_keys(dataset, str(input_column))
    ids = list(dataset["id"])
    wanted = str if isinstance(ids[0], str) else int
    if wrong := [row for row, value in enumerate(ids) if not isinstance(value, wanted) or isinstance(value, bool)]:
        raise ValueError(
            f"Column `id` must hold a string, or else an integer, in every row, got {ids[wrong[0]]!r} in "
            f"row {wrong[0]}. Fill it, or drop the column to have ids made of the content."
        )
    if wanted is str and (wrong := [row for row, value in enumerate(ids) if not is_writable_text(value)]):
        raise ValueError(f"Column `id` must hold no NUL, got {ids[wrong[0]]!r} in row {wrong[0]}. Rename it.")
    if len(set(ids)) < len(ids):
        [(repeated, count)] = Counter(ids).most_common(1)
        raise ValueError(
            f"Column `id` must be unique, got {repeated!r} {count} times. Renumber it, or drop the column to have ids "
            "made of the content."
        )
    return ids


def _pool_inputs(
    dataset: Dataset, ids: Sequence[int | str], hierarchy: TeacherHierarchy, columns: _Columns, keep_inputs: bool
) -> Dataset | None:
    """What the pool keeps of the data: inputs and metadata, ground truth under its `oracle_` names, and ids."""
    # Answers live on as pseudolabels; a column called `label` among the inputs would be taken for ground truth later.
    dropped = {teacher.model for teacher in hierarchy.teachers if teacher.kind == "column"}
    dropped -= {columns.inputs, columns.oracle_domain}
    if not keep_inputs and columns.inputs is not None:
        dropped.add(columns.inputs)
    inputs = dataset.remove_columns(sorted(dropped & set(dataset.column_names)))
    if columns.oracle is not None:
        gold = _oracle_label_ids(dataset, columns.oracle, hierarchy.labels)
        inputs = inputs.remove_columns(columns.oracle)
        inputs = inputs.add_column(ORACLE_LABEL, gold, feature=ClassLabel(names=list(hierarchy.labels)))
    if columns.oracle_domain is not None:
        domains = ["" if value is None else str(value) for value in _read_names(dataset, columns.oracle_domain)]
        inputs = inputs.remove_columns(columns.oracle_domain)
        inputs = inputs.add_column(ORACLE_DOMAIN, domains, feature=Value("string"))
    if "id" not in inputs.column_names:
        inputs = inputs.add_column("id", list(ids)) if inputs.column_names else Dataset.from_dict({"id": list(ids)})
    return inputs if inputs.column_names != ["id"] else None


def _read_names(dataset: Dataset, column: str) -> list[Any]:
    """A column's values, those of a `ClassLabel` as names."""
    return _as_names(dataset.select_columns([column])[:][column], dataset.features[column])


def _as_names(values: list[Any], feature: Any) -> list[Any]:
    """Values of a column, those of a `ClassLabel` as names: its ids need not be those of the task."""
    if not isinstance(feature, ClassLabel):
        return list(values)
    return [None if value is None or value < 0 else feature.int2str(value) for value in values]


def _oracle_label_ids(dataset: Dataset, column: str, labels: Sequence[str]) -> list[int]:
    """Ground truth as label ids of the task, mapped by name where it has names."""
    values = _read_names(dataset, column)
    positions: dict[Any, int | None] = {}
    find = label_finder(labels)
    for value in set(values):
        if isinstance(value, str):
            positions[value] = find(value)
        else:
            label = as_label_id(value)
            positions[value] = label if isinstance(label, int) and 0 <= label < len(labels) else None
    if unknown := [value for value, position in positions.items() if position is None]:
        raise ValueError(
            f"Column '{column}' must hold labels of the task {shorten(labels)} (or their ids) in every row, got "
            f"{unknown[:5]}, first in row {values.index(unknown[0])}. Rename them or drop these rows."
        )
    return [int(positions[value]) for value in values]  # type: ignore[arg-type]


# ── processes ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _join_processes(output_dir: str | os.PathLike[str] | None) -> Processes:
    """Find the processes that label together."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Processes(0, 1)
    if output_dir is None and (local := int(os.environ.get("LOCAL_WORLD_SIZE", count))) < count:
        raise ValueError(
            f"Labelling on several machines needs an `output_dir` that all of them see, got none with {local} of "
            f"{count} processes on this one. Give a folder on a shared disk."
        )
    return join_processes()


# ── the work ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Job:
    """All that one call of `build_pool` has to do."""

    dataset: Dataset
    hierarchy: TeacherHierarchy
    models: Mapping[str, TeacherModel]
    columns: _Columns
    ids: Sequence[int] | Sequence[str]
    inputs: Dataset | None
    k: int
    batch_size: int
    device: torch.device
    precision: str
    num_workers: int
    on_error: str
    disable_tqdm: bool
    processes: Processes
    output_dir: Path | None
    reuse: PseudolabelPool | None
    reused: frozenset[str]
    source: Mapping[str, Any] | None
    commits: Mapping[str, str | None]

    def autocast(self) -> AbstractContextManager[object]:
        """Mixed precision, where it is wanted."""
        dtype = PRECISIONS[self.precision]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def plan(self) -> dict[str, Any]:
        """What decides the labels, besides the weights of the teachers: work under another plan is not continued."""
        read = [self.columns.inputs, *(teacher.model for teacher in self.hierarchy.teachers if _is_column(teacher))]
        known = set(self.dataset.column_names)
        digest = hashlib.blake2b("\n".join(map(repr, self.ids)).encode("utf-8"), digest_size=8)
        return {
            "hierarchy": self.hierarchy.to_dict(),
            "pool_k": self.k,
            "precision": self.precision,
            "num_rows": len(self.dataset),
            "ids": digest.hexdigest(),
            "columns": _sample_columns(self.dataset, [name for name in dict.fromkeys(read) if name and name in known]),
        }

    def disk_needs(self, row_bytes: int) -> int:
        """About how many bytes the work takes: labels as they come, and in the files that are kept."""
        id_bytes = 40 if isinstance(self.ids[0], str) else 8
        num_teachers = len(self.hierarchy.teachers) - len(self.reused)
        labels = len(self.ids) * (num_teachers * (2 * row_bytes + id_bytes) + row_bytes)
        return labels + (self.inputs.data.nbytes if self.output_dir is not None and self.inputs is not None else 0)


def _is_column(teacher: Teacher) -> bool:
    return teacher.kind == "column"


def _sample_columns(dataset: Dataset, columns: list[str]) -> dict[str, dict[str, str]]:
    """Types of columns and hashes of a few of their cells: other data are to be noticed without reading all of it."""
    if not columns:
        return {}
    rows = np.unique(np.linspace(0, len(dataset) - 1, 16).astype(int))
    few = dataset.select_columns(columns).with_format("arrow")[rows]  # all at once: a row is taken from every column
    features = dataset.features  # a copy of all of them each time
    digests = {name: "".join(map(cell_digest, few.column(name).to_pylist())) for name in columns}
    return {
        name: {
            "type": str(features[name]),
            "cells": hashlib.blake2b(digest.encode(), digest_size=8).hexdigest(),
        }
        for name, digest in digests.items()
    }


def _identify(
    hierarchy: TeacherHierarchy, models: Mapping[str, TeacherModel]
) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
    """What is known of each teacher before it is loaded, and its size in bytes."""
    found = {teacher.name: identify_teacher(teacher) for teacher in hierarchy.teachers if teacher.name not in models}
    identities = {name: identity for name, (identity, _) in found.items()}
    sizes = {name: size for name, (_, size) in found.items()}
    return identities | {name: dict(model.facts) for name, model in models.items()}, sizes


def _find_reused(
    reuse: PseudolabelPool, hierarchy: TeacherHierarchy, identities: Mapping[str, Mapping[str, Any]]
) -> frozenset[str]:
    """Teachers that another pool holds already: the same but for their level, and with the same weights."""
    if reuse.labels != hierarchy.labels:
        raise ValueError(
            f"`reuse` must be a pool of the labels {shorten(hierarchy.labels)}, got one of {shorten(reuse.labels)}. "
            "Label the data without it."
        )
    held = {teacher.name: teacher for teacher in reuse.hierarchy.teachers}
    names = set()
    for teacher in hierarchy.teachers:
        identity, facts = identities[teacher.name], reuse.facts.get(teacher.name, {})
        differs = [key for key, value in identity.items() if facts.get(key, value) != value]
        if teacher.name in held and not differs and _is_same(teacher, held[teacher.name], identity, facts):
            names.add(teacher.name)
    return frozenset(names)


def _is_same(one: Teacher, other: Teacher, identity: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
    """Whether two teachers differ at most in their level, and in names of the same weights."""
    known = [key for key in ("commit", "weights") if identity.get(key) is not None and identity[key] == facts.get(key)]
    if "commit" in known:  # a branch and its commit
        one, other = replace(one, revision=None), replace(other, revision=None)
    elif "weights" in known:  # a folder and its copy; a pool on the Hub has no paths
        one = replace(one, model=other.model)
    return replace(one, level=other.level) == other


def _run(job: _Job, identities: Mapping[str, Mapping[str, Any]], sizes: Mapping[str, int]) -> PseudolabelPool:
    """Label what is not labelled yet, and make the pool of it."""
    if job.reuse is not None:
        match_ids(job.reuse.ids, np.asarray(job.ids), "`reuse`")
    processes = job.processes
    with ExitStack() as stack:
        folder = processes.on_first(partial(_work_folder, job.output_dir))
        if job.output_dir is None and processes.rank == 0:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            advice = "Free some space, or choose a larger disk by `output_dir`, where finished work would stay too."
        else:
            advice = "Free some space and run this again: what is labelled stays."
        journal = Journal(folder, len(job.dataset), job.k, label_dtype(job.hierarchy.num_labels))
        stack.callback(journal.close)
        stack.enter_context(explain_full_disk(folder, advice, job.disk_needs(journal.row_bytes)))
        missing = processes.on_first(partial(_open, job, journal, identities))
        for group in _group_teachers(job, missing, sizes):
            _label_group(job, journal, group, missing)
        processes.wait()
        pool = _finish(job, journal)
        journal.close()
        stack.pop_all()
    return pool


def _work_folder(output_dir: Path | None) -> Path:
    """Where work in progress lies: it has a fixed name, so that it is found again."""
    if output_dir is None:
        return Path(tempfile.mkdtemp(prefix="cosupervise-pool-"))
    absolute = Path(os.path.abspath(output_dir))
    return absolute.with_name(f".{absolute.name}.unfinished")


def _open(
    job: _Job, journal: Journal, identities: Mapping[str, Mapping[str, Any]]
) -> dict[str, list[tuple[int, int]]]:
    """Begin or go on: which rows each teacher still has to label."""
    names = [name for name in job.hierarchy.names if name not in job.reused]
    journal.open(job.plan())
    if job.output_dir is not None:  # another run may have ended just now
        check_free(job.output_dir, "Load the pool with `PseudolabelPool.load`, or choose another folder.")
    journal.add_facts({name: identities[name] for name in names})
    missing = {name: journal.missing(name) for name in names}
    if num_done := sum(len(job.ids) - sum(stop - start for start, stop in gaps) for gaps in missing.values()):
        logger.info(f"Going on in '{journal.folder}': {num_done} of {len(job.ids) * len(names)} labels are there.")
    return missing


def _group_teachers(
    job: _Job, missing: Mapping[str, list[tuple[int, int]]], sizes: Mapping[str, int]
) -> Iterator[list[Teacher]]:
    """Teachers with work left: those that need no model, then models side by side as far as memory allows."""
    teachers = [teacher for teacher in job.hierarchy.teachers if missing.get(teacher.name)]
    answers = [teacher for teacher in teachers if _is_column(teacher) and teacher.name not in job.models]
    if answers:
        yield answers
    done = {teacher.name for teacher in answers}
    group: list[Teacher] = []
    for teacher in teachers:
        if teacher.name in done:
            continue
        # What is loaded already takes no more memory, and what is not on this disk yet cannot be known.
        size = sizes.get(teacher.name, 0)
        if group and size + sum(sizes.get(other.name, 0) for other in group) > _MEMORY_BUDGET:
            yield group
            group = []
        group.append(teacher)
    if group:
        yield group


# ── running ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Batch:
    """Rows `start` to `stop`, and who labels them."""

    start: int
    stop: int
    names: tuple[str, ...]


def _label_group(
    job: _Job, journal: Journal, group: Sequence[Teacher], missing: Mapping[str, list[tuple[int, int]]]
) -> None:
    """Load some teachers and run them side by side; their memory is free again before the next ones are loaded."""
    models = {
        teacher.name: job.models[teacher.name]
        if teacher.name in job.models
        else load_teacher(teacher, job.hierarchy.labels, job.device, commit=job.commits.get(teacher.name))
        for teacher in group
    }
    job.processes.on_first(partial(journal.add_facts, {name: model.facts for name, model in models.items()}))
    is_cheap = all(_is_column(teacher) and teacher.name not in job.models for teacher in group)
    step = max(_CHUNK, job.batch_size) if is_cheap else job.batch_size
    _label_share(job, journal, models, _cut_batches({name: missing[name] for name in models}, len(job.ids), step))
    del models
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _label_share(job: _Job, journal: Journal, models: Mapping[str, TeacherModel], batches: list[_Batch]) -> None:
    """Label this process's share of the batches."""
    bounds = np.linspace(0, len(batches), job.processes.count + 1).astype(int)
    own = batches[bounds[job.processes.rank] : bounds[job.processes.rank + 1]]
    reader = _Reader(job, models, own)
    with ExitStack() as stack:
        parts = {name: stack.enter_context(closing(journal.start_part(name))) for name in models if own}
        title = f"Teachers {shorten(models, 3)}"
        total = sum(batch.stop - batch.start for batch in own)
        hide = job.disable_tqdm or job.processes.rank > 0
        progress = stack.enter_context(tqdm(total=total, desc=title, disable=hide))
        for batch, (failed, inputs) in zip(own, _load_batches(job, reader)):
            for name in batch.names:
                model, key = models[name], reader.keys[name]
                probs, reasons = _answer(job, reader, batch, name, model, failed[model.column], inputs.get(key))
                _append(job, name, parts[name], batch, probs, reasons)
            progress.update(batch.stop - batch.start)


def _cut_batches(missing: Mapping[str, list[tuple[int, int]]], num_rows: int, step: int) -> list[_Batch]:
    """Cut the rows into batches, each with the teachers that have not labelled it.

    Cuts lie at multiples of `step` first of all: a run that goes on, and one of several processes, then has the very
    batches of an undisturbed one, and gives the same bits.
    """
    ends = [edge for gaps in missing.values() for gap in gaps for edge in gap]
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

    def __init__(self, job: _Job, models: Mapping[str, TeacherModel], batches: Sequence[_Batch]) -> None:
        self.batches, self.input_column = batches, job.columns.inputs
        self.keys: dict[str, tuple[str | None, str]] = {}
        self.sources: dict[tuple[str | None, str], tuple[str, Callable[[Sequence[Any]], Any]]] = {}
        for name, model in models.items():
            key = self.keys[name] = (model.column, model.facts.get("preprocessing") or f"of '{name}' alone")
            self.sources.setdefault(key, (name, model.prepare))
        # All columns in one view: each view of its own would copy what is known of every column of the data.
        self.view = job.dataset.select_columns(sorted({self._name(column) for column, _ in self.sources}))
        self.features = self.view.features
        self.images = {name: Image(mode=kind.mode) for name, kind in self.features.items() if isinstance(kind, Image)}
        for name in self.images:
            # Decoded here, a row at a time: one broken image must not take its batch along.
            self.view = self.view.cast_column(name, Image(decode=False))
        self.last: tuple[_Batch, dict[str, list[Any]]] | None = None

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
        name = self._name(column)
        decoder = self.images.get(name)
        cells: dict[int, Any] = {}
        failed: _Reasons = {}
        if self.last is None or self.last[0] is not batch:
            self.last = (batch, self.view[batch.start : batch.stop])
        for place, cell in enumerate(_as_names(self.last[1][name], self.features[name])):
            if cell is None and column is None:
                failed[place] = (f"Column '{name}' must hold an input in every row, got None", None)
            elif decoder is None or cell is None:
                cells[place] = cell
            else:
                try:
                    cells[place] = decoder.decode_example(cell)
                except _DECODE_ERRORS as error:
                    failed[place] = (
                        f"Column '{name}' must hold images that can be read, got {tell_error(error)}",
                        None,
                    )
        return cells, failed

    def _name(self, column: str | None) -> str:
        return str(self.input_column if column is None else column)


def _load_batches(job: _Job, reader: _Reader) -> DataLoader:
    return DataLoader(
        reader,
        batch_size=None,
        num_workers=job.num_workers,
        collate_fn=_as_it_is,
        pin_memory=job.num_workers > 0 and job.device.type == "cuda",
        # Its own generator: the loader draws a number, and labelling must not move anybody's random state.
        generator=torch.Generator(),
    )


def _as_it_is(batch: T) -> T:
    return batch


def _answer(
    job: _Job, reader: _Reader, batch: _Batch, name: str, model: TeacherModel, failed: _Reasons, inputs: Any
) -> tuple[np.ndarray, _Reasons]:
    """A teacher's probabilities of a batch, `(num_rows, num_labels)` with zeros where it failed, and why it did."""
    count, reasons = batch.stop - batch.start, dict(failed)
    rows = np.setdiff1d(np.arange(count), list(failed))
    if inputs is not None:
        answers = _ask(job, name, model, inputs, len(rows))
    else:
        cells = [cell for place, cell in reader.read(model.column, batch)[0].items() if place not in failed]
        each = _ask_parts(job, name, model, cells)
        broken = {row: error for row, error in zip(rows.tolist(), each) if isinstance(error, RowError)}
        reasons |= {
            row: (f"Teacher '{name}' must be able to read every row, got: {str(error).rstrip('.')}", error)
            for row, error in broken.items()
        }
        rows = np.setdiff1d(rows, list(broken))
        answers = np.array([answer for answer in each if isinstance(answer, np.ndarray)], dtype=np.float32)
    if len(rows) and not (is_valid := _is_valid(answers)).all():
        reasons |= _tell_invalid(name, answers, rows, ~is_valid)
        answers = np.where(is_valid[:, None], answers, np.float32(0))
    if len(rows) == count:
        return answers, reasons
    probs = np.zeros((count, job.hierarchy.num_labels), dtype=np.float32)
    if len(rows):
        probs[rows] = answers
    return probs, reasons


def _tell_invalid(name: str, answers: np.ndarray, rows: np.ndarray, is_invalid: np.ndarray) -> _Reasons:
    reasons: _Reasons = {}
    for place in np.flatnonzero(is_invalid):
        got = f"{answers[place][:8].tolist()} (sum {answers[place].sum():.4f})"
        what = f"Probabilities of teacher '{name}' must be finite, not negative and sum to 1, got {got}"
        reasons[int(rows[place])] = (what, None)
    return reasons


def _ask(job: _Job, name: str, model: TeacherModel, inputs: Any, num_rows: int) -> np.ndarray:
    """A model's answers."""
    with _told(name, num_rows), job.autocast():
        probs = np.asarray(model(inputs), dtype=np.float32)
    if probs.shape != (num_rows, job.hierarchy.num_labels):
        raise ValueError(
            f"Teacher '{name}' must give probabilities of shape {(num_rows, job.hierarchy.num_labels)}, got "
            f"{probs.shape}. Correct its `__call__`."
        )
    return probs


def _ask_parts(job: _Job, name: str, model: TeacherModel, cells: list[Any]) -> list[np.ndarray | RowError]:
    """An answer or an error for each cell: what cannot be prepared is halved until the rows at fault are alone."""
    if not cells:
        return []
    try:
        with _told(name, len(cells)):
            inputs = model.prepare(cells)
    except RowError as error:
        if len(cells) == 1:
            return [error]
    else:
        return list(_ask(job, name, model, inputs, len(cells)))
    half = len(cells) // 2
    return _ask_parts(job, name, model, cells[:half]) + _ask_parts(job, name, model, cells[half:])


class _told(AbstractContextManager[None]):  # noqa: N801
    """Say of what a teacher raises, which is no fault of a row, whose it is; and what to do where memory runs out."""

    def __init__(self, name: str, num_rows: int) -> None:
        self.name, self.num_rows = name, num_rows

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if not isinstance(error, Exception) or isinstance(error, RowError):
            return
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or should_reduce_batch_size(error):
            raise MemoryError(
                f"A batch of {self.num_rows} rows for teacher '{self.name}' must fit into memory, got: {error} Choose "
                "a smaller `batch_size`."
            ) from error
        error.add_note(f"Raised by teacher '{self.name}' on a batch of {self.num_rows} rows; no row is blamed for it.")


def _is_valid(probs: np.ndarray) -> np.ndarray:
    """Whether each row is a distribution or a missing answer, `(num_rows,)` bool."""
    with np.errstate(invalid="ignore"):
        sums = probs.sum(axis=1)
        return (probs >= 0).all(axis=1) & ((np.abs(sums - 1) <= SUM_TOLERANCE) | (sums == 0))


def _append(job: _Job, name: str, part: Part, batch: _Batch, probs: np.ndarray, reasons: _Reasons) -> None:
    """Put a batch on disk, or refuse it if a row of it failed and may not be missing."""
    failed_rows = [batch.start + place for place in sorted(reasons)]
    if failed_rows and job.on_error == "raise":
        what, error = reasons[min(reasons)]
        raise ValueError(
            f"{what} in row {failed_rows[0]} (id {job.ids[failed_rows[0]]!r}) for teacher '{name}'. Fix or drop that "
            'row, or leave such rows without labels by `on_error="missing"`.'
        ) from error
    label_ids, label_probs = encode_top_k(probs, job.k)
    reason = reasons[min(reasons)][0] if reasons else ""
    part.append(batch.start, label_ids, label_probs, failed_rows, dropped_mass(probs, label_ids), reason)


# ── finishing ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _finish(job: _Job, journal: Journal) -> PseudolabelPool:
    """Make the pool of what lies in the journal, the same in every process."""
    facts = job.processes.on_first(partial(_write_teachers, job, journal))
    if job.output_dir is not None:
        job.processes.on_first(partial(_save, job, journal, facts))
        return PseudolabelPool.load(job.output_dir)
    pool = _open_pool(job, journal, facts)
    job.processes.wait()  # everybody has mapped the files before the first process may delete them
    if job.processes.rank == 0:
        journal.drop(*facts)
        weakref.finalize(pool, shutil.rmtree, journal.folder, ignore_errors=True)
    return pool


def _teacher_file(journal: Journal, name: str) -> Path:
    return journal.scratch / "teachers" / name / "data.arrow"


def _write_teachers(job: _Job, journal: Journal) -> dict[str, dict[str, Any]]:
    """Put each teacher's labels in the order of the rows into a file; the facts of all teachers."""
    facts: dict[str, dict[str, Any]] = {}
    known = journal.facts
    for name in job.hierarchy.names:
        if name in job.reused and job.reuse is not None:
            facts[name] = dict(job.reuse.facts.get(name, {}))
            if not np.array_equal(job.reuse.ids, np.asarray(job.ids)):
                write_teacher(_teacher_file(journal, name), job.ids, _select_rows(job.reuse, name, job.ids))
            continue
        segments = journal.segments(name)
        num_failed = _check_segments(job, journal, name, segments)
        write_teacher(_teacher_file(journal, name), job.ids, journal.rows(segments))
        num_answered = sum(segment.num_answered for segment in segments)
        facts[name] = known[name] | {
            "precision": job.precision,
            "num_failed": num_failed,
            "dropped_mass": math.fsum(segment.dropped for segment in segments) / max(num_answered, 1),
        }
    return facts


def _check_segments(job: _Job, journal: Journal, name: str, segments: Sequence[Segment]) -> int:
    """Number of rows that a teacher failed on; an error if it is all of them."""
    num_failed = sum(segment.num_failed for segment in segments)
    ids = [job.ids[row] for segment in segments for row in segment.failed_rows]
    reason = next((segment.reason for segment in segments if segment.num_failed), "")
    if num_failed == len(job.ids):
        journal.drop(name)
        raise ValueError(
            f"Teacher '{name}' must be able to label at least one row, got {num_failed} of {len(job.ids)} rows that "
            f"it failed on, id {ids[0]!r} first: {reason}. Correct the teacher, or the column that it reads."
        )
    if num_failed:
        first = shorten(ids[:5]) if num_failed <= 5 else f"{shorten(ids[:5])} and others"
        logger.warning(
            f"Teacher '{name}' failed on {num_failed} of {len(job.ids)} rows, which are missing in its pseudolabels: "
            f"ids {first}. Of id {ids[0]!r}: {reason}."
        )
    return num_failed


def _select_rows(
    pool: PseudolabelPool, name: str, ids: Sequence[int] | Sequence[str]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A teacher's labels in a pool, of some of its rows, a piece at a time."""
    rows = match_ids(pool.ids, np.asarray(ids), "`reuse`")
    for start in range(0, len(rows), _CHUNK):
        piece = rows[start : start + _CHUNK]
        yield pool.label_ids(name)[piece], pool.label_probs(name)[piece]


def _open_pool(job: _Job, journal: Journal, facts: Mapping[str, Any]) -> PseudolabelPool:
    teachers = {}
    for name in job.hierarchy.names:
        path = _teacher_file(journal, name)
        if path.is_file() or job.reuse is None:
            teachers[name] = Dataset.from_file(str(path))
        else:
            teachers[name] = job.reuse.teachers[name]
    pool = PseudolabelPool(
        job.hierarchy, teachers, job.inputs, facts, job.source, input_column=job.columns.inputs
    )  # fmt: skip
    if (unreadable := _find_unreadable(job, pool)).size and pool.inputs is not None:
        pool.inputs = _empty_cells(pool.inputs, str(job.columns.inputs), unreadable)
    return pool


def _find_unreadable(job: _Job, pool: PseudolabelPool) -> np.ndarray:
    """Rows of which the pool would keep an image that no model can read; looked for only where a teacher failed."""
    column, models = job.columns.inputs, job.models
    readers = [
        teacher.name
        for teacher in job.hierarchy.teachers
        if (models[teacher.name].column is None if teacher.name in models else not _is_column(teacher))
    ]
    failed = [name for name in readers if pool.facts[name].get("num_failed")]
    feature = pool.inputs.features.get(column) if pool.inputs is not None else None
    if not failed or pool.inputs is None or column is None or not isinstance(feature, Image):
        return np.zeros(0, dtype=np.int64)
    rows = np.flatnonzero(np.all([~pool.answered(name) for name in readers], axis=0))
    cells = pool.inputs.select_columns([column]).cast_column(column, Image(decode=False)).select(rows)
    decoder = Image(mode=feature.mode)
    return rows[[not _is_readable(cell[column], decoder) for cell in cells]]


def _is_readable(cell: Any, decoder: Image) -> bool:
    try:
        return cell is None or to_pil(decoder.decode_example(cell)) is not None
    except _DECODE_ERRORS:
        return False


def _empty_cells(inputs: Dataset, column: str, rows: np.ndarray) -> Dataset:
    """The same inputs without what is in some rows of a column; nothing but those rows is copied."""
    few = inputs.select_columns([name for name in inputs.column_names if name != column]).select(rows)
    few = few.add_column(column, [None] * len(rows), feature=inputs.features[column])
    order = np.arange(len(inputs))
    order[rows] = len(inputs) + np.arange(len(rows))
    return concatenate_datasets([inputs, few.select_columns(inputs.column_names)]).select(order)


def _save(job: _Job, journal: Journal, facts: Mapping[str, Any]) -> None:
    """Save the pool beside the journal, rename it into its place, and throw the journal away."""
    finished = journal.scratch / "pool"
    _open_pool(job, journal, facts).save(finished)
    move_file(finished, Path(str(job.output_dir)))
    journal.close()
    shutil.rmtree(journal.folder, ignore_errors=True)

"""Decide what each teacher has to label, and label it once: what is known already is not labelled again."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset

from ..data.columns import check_column_name, shorten
from ..data.loading import DataChoice, find_data
from ..data.vectors import name_columns
from ..files import check_free, explain_full_disk
from ..hierarchy import Teacher, TeacherHierarchy
from ..pool.base import TeacherPool, check_kind
from ..pool.ids import match_ids
from ..pool.pseudolabels import PseudolabelPool
from ..pool.top_k import default_pool_k
from ..processes import Processes, join_processes
from .finishing import finish
from .forms import Form, PseudolabelForm
from .kinds.base import TeacherModel, check_teacher_model, choose_device
from .kinds.loading import identify_teacher
from .naming import check_meant
from .progress import Progress
from .rows import read_rows
from .running import PRECISIONS, ROWS_AT_ONCE, Job, group_teachers, label_group

logger = logging.getLogger(__name__)
ON_ERROR = ("raise", "missing")


def build_pool(
    dataset: Dataset | IterableDataset | str,
    hierarchy: TeacherHierarchy,
    *,
    split: str = "train",
    revision: str | None = None,
    config_name: str | None = None,
    streaming: bool = False,
    input_column: str | Sequence[str] | None = None,
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
        input_column (`str` or `Sequence[str]`, *optional*):
            The column that models read: images, texts, or vectors. Several columns of numbers, as a list or by commas,
            are read as one vector. Defaults to the only image column, or `text` and the like, or the only vectors.
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
            Teachers that are loaded already, by their names in the hierarchy; for a hierarchy that was read from a
            file, its functions and pipelines.
        precision (`str`, *optional*, defaults to `"float32"`):
            `"float32"`, or mixed precision in `"bfloat16"` or `"float16"`. Probabilities are float32 in any case.
        num_workers (`int`, *optional*, defaults to 0):
            Processes that decode and prepare inputs; 0 for this process.
        on_error (`str`, *optional*, defaults to `"raise"`):
            What to do with a row that cannot be read or made into what a teacher reads, or whose answer is no
            distribution, or that a function fails on: `"raise"` an error that names it, or leave it `"missing"` for
            the teachers concerned, counted as `num_failed` in their facts. An input that no model could read is
            missing in the pool too. Any other error of a teacher is raised in any case.
        reuse (`PseudolabelPool`, *optional*):
            A pool of the same data. Its teachers that are in `hierarchy` too, at any level, are not run again, and
            their files are linked, not copied.
        source (`Mapping[str, str]`, *optional*):
            Where data that are loaded already are from, where you know it: `dataset` (a Hub id) and `commit`, `config`
            or `split`. Of data given by their id it is found out.

    Returns:
        [`PseudolabelPool`]: Its `facts` hold for each teacher, besides those of [`TeacherModel`], `precision`,
        `num_failed` and `dropped_mass`, the mean probability mass of an answered row that `pool_k` left out; of a
        model with labels that the task lacks, in how many rows they left no answer, `num_outside`, or were left out,
        `num_rescaled`.

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
    settings = {name: value for name, value in locals().items() if name != "pool_k"}  # all others, by their names
    check_arguments(dataset, hierarchy, batch_size, output_dir)
    hierarchy.check_labels("`build_pool`", wanted=True)
    check_kind(reuse, PseudolabelPool, "reuse", optional=True)
    if pool_k is not None and not 1 <= pool_k <= hierarchy.num_labels:
        raise ValueError(f"`pool_k` must lie in 1..{hierarchy.num_labels} (the number of labels), got {pool_k}.")
    k = default_pool_k(hierarchy.num_labels) if pool_k is None else pool_k
    pool: PseudolabelPool = ask_teachers(PseudolabelForm(hierarchy.labels, k, ROWS_AT_ONCE), **settings)
    return pool


def ask_teachers(
    form: Form,
    *,
    dataset: Dataset | IterableDataset | str,
    hierarchy: TeacherHierarchy,
    split: str,
    revision: str | None,
    config_name: str | None,
    streaming: bool,
    input_column: str | Sequence[str] | None,
    oracle_column: str | None,
    oracle_domain_column: str | None,
    output_dir: str | os.PathLike[str] | None,
    device: str | torch.device | None,
    keep_inputs: bool,
    models: Mapping[str, TeacherModel] | None,
    reuse: TeacherPool | None,
    source: Mapping[str, str] | None,
    **options: Any,
) -> Any:
    """Ask every teacher about every row, whatever form their answers have, and make a pool of it."""
    named = name_columns(input_column)
    check_column_name(named, "input_column")
    check_column_name(oracle_column, "oracle_column")
    check_column_name(oracle_domain_column, "oracle_domain_column")
    if not isinstance(models, Mapping | None):
        raise TypeError(f"`models` must be teacher objects by their names, got {type(models).__name__}. Make a dict.")
    hierarchy, models = _give_functions(hierarchy, models or {})
    _check_options(hierarchy, models, **options)
    if isinstance(dataset, Dataset | IterableDataset):
        check_meant(hierarchy, dataset.column_names or ())
    processes = _join_processes(output_dir)
    # By one process for all: it asks the Hub, and reads gigabytes to hash them.
    identities, sizes = processes.on_first(partial(_identify, hierarchy, models))
    reused = frozenset[str]() if reuse is None else _find_reused(reuse, hierarchy, identities)
    choice = DataChoice(split, revision, config_name, streaming)
    dataset, found = find_data(dataset, choice, processes)
    source = dict(source) if source else found
    truth = oracle_column, oracle_domain_column
    dataset, columns, ids, inputs = read_rows(dataset, hierarchy, models, reused, named, *truth, keep_inputs)
    job = Job(
        dataset=dataset,
        hierarchy=hierarchy,
        models=models,
        columns=columns,
        ids=ids,
        inputs=inputs,
        form=form,
        device=choose_device(device),
        processes=processes,
        output_dir=None if output_dir is None else Path(output_dir),
        reuse=reuse,
        reused=reused,
        source=source,
        commits={name: identity.get("commit") for name, identity in identities.items()},
        **options,
    )
    return _run(job, identities, sizes)


def check_arguments(
    dataset: Any,
    hierarchy: Any,
    batch_size: int,
    output_dir: str | os.PathLike[str] | None,
    maker: str = "PseudolabelPool",
) -> None:
    """Everything that can be refused before any work."""
    if not isinstance(dataset, Dataset | IterableDataset | str):
        raise TypeError(
            f"`dataset` must be a `datasets.Dataset` or `IterableDataset`, a folder or a Hub id, got "
            f"{type(dataset).__name__}. Choose one split, such as `dataset['train']`."
        )
    if not isinstance(hierarchy, TeacherHierarchy):
        raise TypeError(f"`hierarchy` must be a `TeacherHierarchy`, got {type(hierarchy).__name__}.")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"`batch_size` must be a whole number of at least 1, got {batch_size!r}. Give one.")
    if output_dir is not None:
        check_free(Path(output_dir), f"Load the pool with `{maker}.load`, or choose another folder.")


def _check_options(
    hierarchy: TeacherHierarchy,
    models: Mapping[str, TeacherModel],
    precision: str,
    num_workers: int,
    on_error: str,
    **others: Any,
) -> None:
    if unknown := sorted(set(models) - set(hierarchy.names)):
        raise ValueError(
            f"`models` must be named as teachers of the hierarchy {list(hierarchy.names)}, got {unknown}. Add them to "
            "the hierarchy, or correct the names."
        )
    for name, model in models.items():
        check_teacher_model(model, name)
    for name, value, allowed in (("precision", precision, [*PRECISIONS]), ("on_error", on_error, [*ON_ERROR])):
        if value not in allowed:
            raise ValueError(f"`{name}` must be one of {allowed}, got {value!r}. Choose one of them.")
    if num_workers < 0:
        raise ValueError(f"`num_workers` must be at least 0 (decode in this process), got {num_workers}.")


def _give_functions(
    hierarchy: TeacherHierarchy, models: Mapping[str, Any]
) -> tuple[TeacherHierarchy, dict[str, TeacherModel]]:
    """Put functions into the teachers of their names, which hold none where a hierarchy was read from a file."""
    teachers, left = [], dict(models)
    for teacher in hierarchy.teachers:
        # An object that is a teacher model already needs nothing.
        is_bare = callable(left.get(teacher.name)) and not hasattr(left[teacher.name], "prepare")
        if is_bare and not teacher.has_files:
            given = replace(teacher, model=left[teacher.name])
            if (teacher.kind, teacher.revision) == (given.kind, given.revision):
                teacher = given
                del left[teacher.name]
            elif teacher.kind == given.kind:
                raise ValueError(
                    f"`models[{teacher.name!r}]` must be the {teacher.kind} that the hierarchy names, of version "
                    f"'{teacher.revision}', got version '{given.revision}'. Make the hierarchy anew with it."
                )
        teachers.append(teacher)
    return TeacherHierarchy(hierarchy.labels, teachers), left


def _join_processes(output_dir: str | os.PathLike[str] | None) -> Processes:
    """Find the processes that label together."""
    # By the environment: one process alone needs no group, and must not wait for one.
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


def _identify(
    hierarchy: TeacherHierarchy, models: Mapping[str, TeacherModel]
) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
    """What is known of each teacher before it is loaded, and its size in bytes."""
    identities, sizes = {name: dict(model.facts) for name, model in models.items()}, {}
    for teacher in hierarchy.teachers:
        if teacher.name not in models:
            found = identify_teacher(teacher, writes=not hierarchy.labels)
            identities[teacher.name], sizes[teacher.name] = found
    return identities, sizes


def _find_reused(
    reuse: TeacherPool, hierarchy: TeacherHierarchy, identities: Mapping[str, Mapping[str, Any]]
) -> frozenset[str]:
    """Teachers that another pool holds already: the same but for their level, and with the same weights."""
    if (labels := reuse.hierarchy.labels) != hierarchy.labels:
        raise ValueError(
            f"`reuse` must be a pool of the labels {shorten(hierarchy.labels)}, got one of {shorten(labels)}. Label "
            "the data without it."
        )
    # By name first, for a teacher under another name may be meant to be another one.
    held = {teacher.name: teacher for teacher in reuse.hierarchy.teachers}
    return frozenset(
        teacher.name
        for teacher in hierarchy.teachers
        if teacher.name in held
        and _is_same(teacher, held[teacher.name], identities[teacher.name], reuse.facts.get(teacher.name, {}))
    )


def _is_same(one: Teacher, other: Teacher, identity: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
    """Whether two teachers differ at most in their level, and in names of the same weights."""
    # What an older pool does not tell is taken for the same.
    if any(facts.get(key, value) != value for key, value in identity.items()):
        return False
    known = [key for key in ("commit", "weights") if identity.get(key) is not None and identity[key] == facts.get(key)]
    if "commit" in known:  # a branch and its commit
        one, other = replace(one, revision=None), replace(other, revision=None)
    elif "weights" in known:  # a folder and its copy; a pool on the Hub has no paths
        one = replace(one, model=other.model)
    return replace(one, level=other.level) == other


def _run(job: Job, identities: Mapping[str, Mapping[str, Any]], sizes: Mapping[str, int]) -> Any:
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
        progress = job.form.progress(folder, len(job.dataset))
        stack.callback(progress.close)
        stack.enter_context(explain_full_disk(folder, advice, job.disk_needs(progress.row_bytes)))
        missing = processes.on_first(partial(_open, job, progress, identities))
        for group in group_teachers(job, missing, sizes):
            label_group(job, progress, group, missing)
        processes.wait()
        pool = finish(job, progress)
        progress.close()
        # From here on the pool owns the folder, so that nothing is taken away on leaving.
        stack.pop_all()
    return pool


def _work_folder(output_dir: Path | None) -> Path:
    """Where work in progress lies: it has a fixed name, so that it is found again."""
    if output_dir is None:
        return Path(tempfile.mkdtemp(prefix="cosupervise-pool-"))
    absolute = Path(os.path.abspath(output_dir))
    return absolute.with_name(f".{absolute.name}.unfinished")


def _open(
    job: Job, progress: Progress, identities: Mapping[str, Mapping[str, Any]]
) -> dict[str, list[tuple[int, int]]]:
    """Begin or go on: which rows each teacher still has to label."""
    names = [name for name in job.hierarchy.names if name not in job.reused]
    progress.open(job.plan())
    if job.output_dir is not None:  # another run may have ended just now
        check_free(job.output_dir, f"Load the pool with `{job.form.pool.__name__}.load`, or choose another folder.")
    progress.add_facts({name: identities[name] for name in names})
    missing = {name: progress.missing(name) for name in names}
    if num_done := sum(len(job.ids) - sum(stop - start for start, stop in gaps) for gaps in missing.values()):
        logger.info(f"Going on in '{progress.folder}': {num_done} of {len(job.ids) * len(names)} labels are there.")
    return missing

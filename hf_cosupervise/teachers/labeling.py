"""Decide what each teacher has to label, and label it once: columns, labels that are known, what is kept."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Image, IterableDataset, Value, concatenate_datasets

from ..data.columns import as_label_id, check_column_name, find_input_column, is_vector_column, shorten
from ..data.inputs import check_depth, decode_image, to_pil
from ..data.keys import row_keys
from ..data.loading import DataChoice, find_data
from ..data.vectors import join_columns, name_columns, parts_of, unreadable_vectors
from ..files import check_free, explain_full_disk, move_file
from ..hierarchy import Teacher, TeacherHierarchy, is_writable_text
from ..pool.base import TeacherPool
from ..pool.ids import match_ids
from ..pool.pseudolabels import ORACLE_DOMAIN, ORACLE_LABEL, PseudolabelPool
from ..pool.top_k import default_pool_k
from ..pool.written import ORACLE_ANSWER, find_prompt_column
from ..processes import Processes, join_processes
from .forms import Form, PseudolabelForm
from .kinds.base import ROW, TeacherModel, check_teacher_model, default_device, label_finder
from .kinds.loading import column_of, identify_teacher
from .naming import check_meant
from .progress import Progress, Segment
from .running import (
    DECODE_ERRORS,
    PRECISIONS,
    ROWS_AT_ONCE,
    Columns,
    Job,
    group_teachers,
    label_group,
    read_names,
    tell_unmatched,
)

logger = logging.getLogger(__name__)
ON_ERROR = ("raise", "missing")
_MANY = 32  # rows of which a model that tells labels apart would not give the same to each
# Column names that usually hold ground truth. Any `ClassLabel` column is taken for ground truth as well.
_GOLD_NAMES = frozenset(
    ("label", "labels", "target", "targets", "gold", "gold_label", "ground_truth", "class", "y", "coarse_label")
    + ("fine_label", "label_ids", ORACLE_LABEL, ORACLE_DOMAIN)
)
_GOLD_ANSWERS = frozenset(("answer", "answers", "completion", "reference", "solution", ORACLE_ANSWER))


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
    batch_size: int,
    output_dir: str | os.PathLike[str] | None,
    device: str | torch.device | None,
    keep_inputs: bool,
    disable_tqdm: bool,
    models: Mapping[str, TeacherModel] | None,
    precision: str,
    num_workers: int,
    on_error: str,
    reuse: TeacherPool | None,
    source: Mapping[str, str] | None,
) -> Any:
    """Ask every teacher about every row, whatever form their answers have, and make a pool of it."""
    named = name_columns(input_column)
    for name, column in (
        ("input_column", named),
        ("oracle_column", oracle_column),
        ("oracle_domain_column", oracle_domain_column),
    ):
        check_column_name(column, name)
    if not isinstance(models, Mapping | None):
        raise TypeError(f"`models` must be teacher objects by their names, got {type(models).__name__}. Make a dict.")
    hierarchy, models = _give_functions(hierarchy, models or {})
    _check_options(hierarchy, models, precision, num_workers, on_error)
    if isinstance(dataset, Dataset | IterableDataset):
        check_meant(hierarchy, dataset.column_names or ())
    processes = _join_processes(output_dir)
    # By one process for all: it asks the Hub, and reads gigabytes to hash them.
    identities, sizes = processes.on_first(partial(_identify, hierarchy, models))
    reused = frozenset[str]() if reuse is None else _find_reused(reuse, hierarchy, identities)
    choice = DataChoice(split, revision, config_name, streaming)
    dataset, found = find_data(dataset, choice, processes)
    source = dict(source) if source else found
    # A format such as "torch" would hand out tensors in place of cells.
    dataset = dataset.with_format(None)
    if len(dataset) == 0:
        raise ValueError("`dataset` must hold at least one example, got none. Check its split or its filter.")
    # Before columns are joined: in one vector nobody would see the ground truth any more.
    truth = {oracle_column, oracle_domain_column, *undeclared_truth(dataset, ())}
    if truth := truth.intersection(parts_of(dataset, named)):
        raise ValueError(
            f"Ground truth must reach no student, got {sorted(map(str, truth))} in `input_column`. Leave it out there."
        )
    dataset, named = join_columns(dataset, named)
    columns = _check_columns(dataset, hierarchy, models, reused, named, oracle_column, oracle_domain_column)
    ids = _find_ids(dataset, columns.inputs)
    inputs = _pool_inputs(dataset, ids, hierarchy, columns, keep_inputs)
    job = Job(
        dataset=dataset,
        hierarchy=hierarchy,
        models=models,
        columns=columns,
        ids=ids,
        inputs=inputs,
        form=form,
        batch_size=batch_size,
        device=default_device() if device is None else torch.device(device),
        precision=precision,
        num_workers=num_workers,
        on_error=on_error,
        disable_tqdm=disable_tqdm,
        processes=processes,
        output_dir=None if output_dir is None else Path(output_dir),
        reuse=reuse,
        reused=reused,
        source=source,
        commits={name: identity.get("commit") for name, identity in identities.items()},
    )
    return _run(job, identities, sizes)


# ── the dataset ─────────────────────────────────────────────────────────────────────────────────────────────────────


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
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    if output_dir is not None:
        check_free(Path(output_dir), f"Load the pool with `{maker}.load`, or choose another folder.")


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


def undeclared_truth(
    dataset: Dataset, allowed: Container[str | None], others: frozenset[str] = frozenset()
) -> list[str]:
    """Name the columns that look like ground truth, but for those that are known to be something else."""
    return [
        name
        for name, feature in dataset.features.items()
        if (name.lower() in _GOLD_NAMES | others or isinstance(feature, ClassLabel)) and name not in allowed
    ]


def _check_columns(
    dataset: Dataset,
    hierarchy: TeacherHierarchy,
    models: Mapping[str, TeacherModel],
    reused: frozenset[str],
    input_column: str | None,
    oracle_column: str | None,
    oracle_domain_column: str | None,
) -> Columns:
    """Find the input column, and refuse ground truth that nobody declared."""
    read = {teacher.name: column_of(teacher) for teacher in hierarchy.teachers}
    # An object is read in place of what the hierarchy says, so that its column counts.
    read |= {name: model.column for name, model in models.items()}
    answers = {column: name for name, column in read.items() if column not in (None, ROW)}
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
    writes = not hierarchy.labels
    allowed = {*answers, oracle_column, oracle_domain_column, input_column}
    undeclared = undeclared_truth(dataset, allowed, _GOLD_ANSWERS if writes else frozenset())
    if undeclared:
        raise ValueError(
            f"Data for a pool must hold no undeclared ground truth, got the columns {undeclared}. Keep one for "
            f"analysis with `oracle_column={undeclared[0]!r}`, or drop them with "
            f"`dataset.remove_columns({undeclared})`."
        )
    # Where all answers are in columns nothing is read, unless ids are to be made of it.
    is_needed = input_column is not None or None in read.values()
    if is_needed or "id" not in dataset.column_names:
        # Answers may be lists of numbers too, and are nobody's input unless it is said.
        found_in = dataset if input_column else dataset.remove_columns([*{*answers} & {*dataset.column_names}])
        input_column = (find_prompt_column if writes else find_input_column)(found_in, input_column)
        check_depth(dataset, input_column)
    return Columns(input_column, oracle_column, oracle_domain_column)


def _find_ids(dataset: Dataset, input_column: str | None) -> list[int] | list[str]:
    """The ids in the data, or else keys made of the content."""
    if "id" not in dataset.column_names:
        # From the content, so that the same rows have the same ids in any order.
        return row_keys(dataset, str(input_column))
    ids = list(dataset["id"][:])
    # Of one kind, by which Arrow stores them; True is an integer to Python.
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
    dataset: Dataset, ids: Sequence[int | str], hierarchy: TeacherHierarchy, columns: Columns, keep_inputs: bool
) -> Dataset | None:
    """What the pool keeps of the data: inputs and metadata, ground truth under its `oracle_` names, and ids."""
    # Answers live on as pseudolabels; a column called `label` among the inputs would be taken for ground truth later.
    dropped = {teacher.model for teacher in hierarchy.teachers if teacher.kind == "column"}
    dropped -= {columns.inputs, columns.oracle_domain}
    if not keep_inputs and columns.inputs is not None:
        dropped.add(columns.inputs)
    inputs = dataset.remove_columns(sorted(dropped & set(dataset.column_names)))
    if columns.oracle is not None and not hierarchy.labels:
        inputs = inputs.rename_column(columns.oracle, ORACLE_ANSWER)
    elif columns.oracle is not None:
        gold = _oracle_label_ids(dataset, columns.oracle, hierarchy.labels)
        inputs = inputs.remove_columns(columns.oracle)
        inputs = inputs.add_column(ORACLE_LABEL, gold, feature=ClassLabel(names=list(hierarchy.labels)))
    if columns.oracle_domain is not None:
        domains = ["" if value is None else str(value) for value in read_names(dataset, columns.oracle_domain)]
        inputs = inputs.remove_columns(columns.oracle_domain)
        inputs = inputs.add_column(ORACLE_DOMAIN, domains, feature=Value("string"))
    if "id" not in inputs.column_names:
        inputs = inputs.add_column("id", list(ids)) if inputs.column_names else Dataset.from_dict({"id": list(ids)})
    return inputs if inputs.column_names != ["id"] else None


def _oracle_label_ids(dataset: Dataset, column: str, labels: Sequence[str]) -> list[int]:
    """Ground truth as label ids of the task, mapped by name where it has names."""
    values = read_names(dataset, column)
    positions: dict[Any, int | None] = {}
    find = label_finder(labels)
    # Each value is looked up once: a million rows hold few of them.
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
    found = {
        teacher.name: identify_teacher(teacher, writes=not hierarchy.labels)
        for teacher in hierarchy.teachers
        if teacher.name not in models
    }
    identities = {name: identity for name, (identity, _) in found.items()}
    sizes = {name: size for name, (_, size) in found.items()}
    return identities | {name: dict(model.facts) for name, model in models.items()}, sizes


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
    names = set()
    for teacher in hierarchy.teachers:
        identity, facts = identities[teacher.name], reuse.facts.get(teacher.name, {})
        # What an older pool does not tell is taken for the same.
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
        pool = _finish(job, progress)
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


# ── finishing ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _finish(job: Job, progress: Progress) -> TeacherPool:
    """Make the pool of what lies in the journal, the same in every process."""
    facts = job.processes.on_first(partial(_write_teachers, job, progress))
    if job.output_dir is not None:
        job.processes.on_first(partial(_save, job, progress, facts))
        pool = job.form.pool.load(job.output_dir)
        job.processes.on_first(partial(_tell_constant, job, pool))
        return pool
    pool = _open_pool(job, progress, facts)
    job.processes.on_first(partial(_tell_constant, job, pool))
    job.processes.wait()  # everybody has mapped the files before the first process may delete them
    if job.processes.rank == 0:
        progress.drop(*facts)
        weakref.finalize(pool, shutil.rmtree, progress.folder, ignore_errors=True)
    return pool


def _teacher_file(progress: Progress, name: str) -> Path:
    return progress.scratch / "teachers" / name / "data.arrow"


def _write_teachers(job: Job, progress: Progress) -> dict[str, dict[str, Any]]:
    """Put each teacher's labels in the order of the rows into a file; the facts of all teachers."""
    facts: dict[str, dict[str, Any]] = {}
    known = progress.facts
    for name in job.hierarchy.names:
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
        facts[name] = known[name] | {
            "precision": job.precision,
            "num_failed": num_failed,
            **job.form.facts(segments),
        }
        teacher = job.hierarchy.teachers[job.hierarchy.index(name)]
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
        raise ValueError(
            f"Teacher '{name}' must be able to label at least one row, got {num_failed} of {len(job.ids)} rows that "
            f"it failed on, id {ids[0]!r} first: {reason}. Correct the teacher, or the column that it reads."
            f"{tell_unmatched(job, name)}"
        )
    if not num_failed and not any(segment.num_answered for segment in segments):
        logger.warning(
            f"Teacher '{name}' has no answer for any of {len(job.ids)} rows, and tells nothing of them. Correct it, "
            "or leave it out."
        )
    if num_failed:
        first = shorten(ids[:5]) if num_failed <= 5 else f"{shorten(ids[:5])} and others"
        logger.warning(
            f"Teacher '{name}' failed on {num_failed} of {len(job.ids)} rows, which are missing in its pseudolabels: "
            f"ids {first}. Of id {ids[0]!r}: {reason}.{tell_unmatched(job, name)}"
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
    teachers = {}
    for name in job.hierarchy.names:
        path = _teacher_file(progress, name)
        if path.is_file() or job.reuse is None:
            teachers[name] = Dataset.from_file(str(path))
        else:
            teachers[name] = job.reuse.teachers[name]
    pool = job.form.pool(job.hierarchy, teachers, job.inputs, facts, job.source, input_column=job.columns.inputs)
    if (unreadable := _find_unreadable(job, pool)).size and pool.inputs is not None:
        pool.inputs = _empty_cells(pool.inputs, str(job.columns.inputs), unreadable)
    return pool


def _find_unreadable(job: Job, pool: Any) -> np.ndarray:
    """Rows of which the pool would keep what no model can read: an image, where a teacher failed, or a vector."""
    column, models = job.columns.inputs, job.models
    readers = [
        teacher.name
        for teacher in job.hierarchy.teachers
        if (models[teacher.name].column if teacher.name in models else column_of(teacher)) is None
    ]
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

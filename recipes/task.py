"""What the recipes share: data shared out, a pool, a student, and a folder of a run."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import ClassLabel, Dataset, DatasetDict
from task_arguments import RECIPE_TYPES, DataArguments, StudentArguments

from hf_cosupervise import PseudolabelPool, TeacherHierarchy, build_pool
from hf_cosupervise.arguments import recipe_arguments_to_dict
from hf_cosupervise.data.columns import find_input_column, find_label_column, is_text_column, is_vector_column
from hf_cosupervise.data.keys import cell_digests
from hf_cosupervise.data.loading import load_folder, load_splits
from hf_cosupervise.data.local import is_table, load_images, load_table
from hf_cosupervise.data.vectors import name_columns, parts_of, unreadable_vectors
from hf_cosupervise.files import make_output_dir
from hf_cosupervise.hub.client import is_folder, resolve_commit
from hf_cosupervise.models.source import find_model, hash_files
from hf_cosupervise.pool.files import teacher_dataset
from hf_cosupervise.students.vectors import VECTOR_STUDENTS
from hf_cosupervise.teachers.rows import read_rows, undeclared_truth
from hf_cosupervise.training.config import fields_without

# Where declared labels of one's own are kept: the second if answers of a teacher are called as the first.
TRUTH = ("label", "oracle_label")
# What a run's record says it was made of: data, teachers and student as they were when it was begun.
MADE_OF = "made_of"
_PATHS = ("dataset", "test_dataset", "student", "teachers", "teachers_dir")
# Told by the command, or of no weight for what comes out; where the run lies, its folder tells.
_CHANGE_NOTHING = {"seeds", "resume", "dry_run", "teacher_trusted_types"} | (
    (fields_without("publish") | fields_without("resume")) - {"use_cpu", "metric", "student_revision"}
)


@dataclass
class Split:
    """What one seed makes of the data."""

    labels: list[str]
    teachers: Dataset
    pool: Dataset
    test: Dataset
    commit: str | None
    heldout: Dataset


def load_split(args: DataArguments, seed: int) -> Split:
    """Load the data and share it out."""
    make_folder("prepare", args.prepare_dataset, args.dataset)
    data, commit = load_data(args)
    if not isinstance(data, DatasetDict) or args.train_split not in data:
        raise ValueError(
            f"`dataset` must have a split '{args.train_split}', got {data}. Name another by `train_split`."
        )
    train = data[args.train_split]
    feature = train.features[find_label_column(train)]
    if not isinstance(feature, ClassLabel):
        raise ValueError(f"The label column must be a `ClassLabel`, got {feature}. Use `Dataset.class_encode_column`.")
    generator = torch.Generator().manual_seed(args.split_seed_offset + seed)
    order = torch.randperm(len(train), generator=generator).tolist()
    own, pool, heldout, rest = share_out_rows(order, args)
    test = data[args.test_split] if args.test_split else train.select(rest)
    return Split(feature.names, train.select(own), train.select(pool), test, commit, train.select(heldout))


def share_out_rows(order: list[int], args: DataArguments) -> tuple[list[int], list[int], list[int], list[int]]:
    """Give the rows of teachers, pool and held-out examples, and what is left; held-out examples move nobody else."""
    num_teachers, num_pool, num_heldout = args.num_teacher_examples, args.num_pool_examples, args.num_heldout_examples
    needed, end = num_teachers + num_pool + num_heldout, len(order) - num_heldout
    if needed > len(order):
        who = "Teachers, pool and held-out examples" if num_heldout else "Teachers and pool"
        raise ValueError(f"{who} need {needed} examples together, got {len(order)} in '{args.train_split}'.")
    if args.pool_from_end:
        start = len(order) - num_pool
        return order[:num_teachers], order[start:], order[num_teachers : num_teachers + num_heldout], []
    pool, rest = order[num_teachers : num_teachers + num_pool], order[num_teachers + num_pool : end]
    if num_heldout and not rest and not args.test_split:
        raise ValueError(
            f"`num_heldout_examples` must leave some of the {end - num_teachers - num_pool + num_heldout} examples "
            f"beside teachers and pool to test on, got {num_heldout}. Use fewer, or name a `test_split`."
        )
    return order[:num_teachers], pool, order[end:], rest


def load_data(args: DataArguments) -> tuple[Any, str | None]:
    """Open a folder, or a data set of the Hub at one commit."""
    if is_folder(args.dataset):
        return load_folder(args.dataset), None
    commit = resolve_commit(args.dataset, args.dataset_revision, what="`dataset`", repo_type="dataset")
    with PartialState().main_process_first():
        return load_splits(args.dataset, commit), commit


def make_folder(module: str, function: str | None, folder: str) -> None:
    """Make a folder by a function of a neighbouring script, where it is missing."""
    if function is not None:
        make = find_function(module, function)
        with PartialState().main_process_first():
            if not Path(folder).exists():
                make(folder)


def find_function(module: str, name: str) -> Callable[..., Any]:
    """Find a function of a neighbouring script by its name."""
    found = importlib.import_module(module)
    known = [
        key for key, value in vars(found).items() if callable(value) and value.__module__ == module and key != "main"
    ]
    if name not in known or name.startswith("_"):
        public = [key for key in known if not key.startswith("_")]
        raise ValueError(f"recipes/{module}.py has the functions {public}, got {name!r}.")
    return getattr(found, name)


def say(text: str) -> None:
    """Tell the user what has been done, once."""
    if PartialState().is_local_main_process:
        print(text, flush=True)


def label_data(
    dataset: Dataset,
    hierarchy: TeacherHierarchy,
    folder: Path,
    data_args: DataArguments,
    quiet: bool,
    commit: str | None = None,
) -> PseudolabelPool:
    """Label data once: now, each process its share, or in an earlier run."""
    if folder.exists():
        return PseudolabelPool.load(folder)
    return build_pool(
        dataset,
        hierarchy,
        output_dir=folder,
        oracle_column=find_label_column(dataset),
        oracle_domain_column=data_args.oracle_domain_column,
        batch_size=256,
        disable_tqdm=quiet,
        source=None if commit is None else {"dataset": data_args.dataset, "commit": commit},
    )


def find_student(args: StudentArguments, split: Split, folder: Path, seed: int) -> str:
    """Give the folder or id of the pre-trained student, pre-training one on the pool's inputs where asked for."""
    if args.student is not None:
        make_folder("prepare", args.prepare_student, args.student)
        return args.student
    if args.pretrain is None:
        raise ValueError(
            "A student is needed, got neither `student` nor `pretrain`. Give a folder or Hub id by `student`."
        )
    with PartialState().main_process_first():
        if not folder.exists():
            unlabelled = split.pool.remove_columns([find_label_column(split.pool)])
            find_function("pretrain", args.pretrain)(unlabelled, folder, seed=seed, **args.pretrain_kwargs)
    return str(folder)


def check_run(folder: Path, facts: dict[str, Any], resume: bool = True) -> None:
    """See that a folder holds no other run, and write down which one this is."""
    if not find_run(folder, facts, resume):
        begin_run(folder, facts)


def find_run(folder: Path, facts: dict[str, Any], resume: bool = True) -> bool:
    """Tell whether a folder holds this run, and refuse one that holds anything else."""
    path = folder / "_run" / "config.json"
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"`output_dir` must be a folder, got the file '{folder}'. Choose another one.")
    if not path.is_file():
        if any(found.is_file() for found in folder.rglob("*")):  # folders alone are left by a run that died early
            raise FileExistsError(
                f"'{folder}' must be a run's folder or not exist, got other files. Choose another `output_dir`."
            )
        return False
    if not resume:
        raise FileExistsError(
            f"'{folder}' must not hold a run where `resume` is off, got one. Choose another `output_dir`, or go on "
            "with it by `--resume`."
        )
    # A field that is new since then had its default.
    known = recipe_arguments_to_dict([kind() for kind in RECIPE_TYPES]) | json.loads(path.read_text("utf-8"))
    facts = {key: facts.get(key, value) for key, value in known.items()} | facts
    before, now = known.pop(MADE_OF, None), facts.pop(MADE_OF, None)
    # Of what was noted, the commit counts, and not how it is called.
    pinned = {"dataset_revision", "student_revision"} if before and now else set()
    keys = sorted({*known, *facts} - _CHANGE_NOTHING - pinned)
    different = [key for key in keys if _plain(key, known.get(key)) != _plain(key, facts.get(key))]
    if different:
        changes = ", ".join(f"{key}: {known.get(key)!r} -> {facts.get(key)!r}" for key in different)
        raise FileExistsError(
            f"'{folder}' must hold this run or none, got another one ({changes}). Choose another `output_dir`."
        )
    # A run that was begun before this was noted is gone on with.
    if before and now and (changed := sorted(what for what in {*before, *now} if before.get(what) != now.get(what))):
        raise FileExistsError(
            f"'{folder}' must hold a run on the data, teachers and student that are there now, got one that was begun "
            f"before some changed: {', '.join(changed)}. Choose another `output_dir`, or put back what was there."
        )
    return True


def begin_run(folder: Path, facts: dict[str, Any]) -> None:
    """Write down which run a folder holds."""
    make_output_dir(folder)
    path = folder / "_run" / "config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:  # a run that dies now leaves no file in the folder
        whole = Path(place, path.name)
        whole.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        whole.replace(path)


def _plain(key: str, value: Any) -> Any:
    """A path as anybody writes it, without slashes that say nothing."""
    if isinstance(value, list):
        return [_plain(key, item) for item in value]
    return re.sub("/+", "/", value).rstrip("/") or "/" if key in _PATHS and isinstance(value, str) else value


def tell_data(name: str, revision: str | None, images: Dataset | None = None) -> str:
    """Tell data from others of the same name: by the commit, the content, or names and sizes of images."""
    if not is_table(name) and not is_folder(name):
        return str(resolve_commit(name, revision, what="`dataset`", repo_type="dataset"))
    if images is not None and is_image_folder(name):
        sizes = [(row, Path(name, row).stat().st_size) for row in images["id"]]
        return hashlib.blake2b(json.dumps(sizes).encode(), digest_size=8).hexdigest()
    found = [Path(name)] if is_table(name) else Path(name).rglob("*.arrow")
    return hash_files(sorted(path for path in found if not path.name.startswith("cache-")))  # as `map` leaves there


def tell_student(name: str | None, revision: str | None) -> dict[str, Any]:
    """Tell a student's weights from others of the same name, where it has any."""
    if name is None or name in VECTOR_STUDENTS:
        return {}
    return {"student": find_model(name, what="The student", revision=revision).identity}


def modality_of(pool: PseudolabelPool) -> str | None:
    """Tell what the pool's inputs are, None where it holds none."""
    if pool.inputs is None:
        return None
    column = find_input_column(pool.inputs)
    if is_text_column(pool.inputs, column):
        return "text"
    return "vector" if is_vector_column(pool.inputs, column) else "image"


# ── data of one's own ───────────────────────────────────────────────────────────────────────────────────────────────


def open_own_data(args: DataArguments, answers: Sequence[str]) -> tuple[Dataset, Dataset | None, str | None]:
    """Open the data to be labelled and those to test on, without labels that nobody declared.

    Args:
        args (`DataArguments`):
            Where they are.
        answers (`Sequence[str]`):
            Columns that may hold a teacher's answers.

    Returns:
        `tuple[Dataset, Dataset | None, str | None]`: both, declared labels where [`find_truth`] finds them, and the
        commit on the Hub of the first.
    """
    if args.test_split is not None and args.test_dataset is not None:
        raise ValueError("One of `test_split` and `test_dataset` is needed, got both. Leave one out.")
    data, commit = _open_any(args.dataset, args.dataset_revision, args)
    train = _pick_split(data, args.train_split, "train_split", args.dataset)
    is_tested = args.test_split is not None or args.test_dataset is not None
    # The test alone may be labelled.
    if args.label_column not in (None, *train.column_names) and not is_tested:
        raise ValueError(
            f"`label_column` must be one of the columns {train.column_names} of '{args.dataset}', or of data to test "
            f"on, got {args.label_column!r} and no such data. Correct the name, or leave it out."
        )
    train = keep_labels(train, args.label_column, answers, args.dataset, is_test=False)
    if not is_tested:
        return train, None, commit
    if args.test_dataset is not None:
        data, _ = _open_any(args.test_dataset, None, args)
        split = args.train_split if len(data) > 1 else next(iter(data))
    else:
        split = str(args.test_split)
    where = str(args.test_dataset or args.dataset)
    test = _pick_split(data, split, "test_split", where)
    return train, keep_labels(test, args.label_column, answers, where, is_test=True), commit


def _open_any(name: str, revision: str | None, args: DataArguments) -> tuple[DatasetDict, str | None]:
    """Open a table, a folder of images or of `save_to_disk`, or a data set on the Hub at one commit."""
    if is_table(name):
        return DatasetDict({"train": load_table(name)}), None
    if is_folder(name):
        if not Path(name).is_dir():
            raise FileNotFoundError(
                f"`dataset` must be a file, a folder or an id on the Hub, got no folder '{name}'. Check the path."
            )
        if is_image_folder(name):
            images = load_images(name, with_labels=args.label_column is not None, on_error=args.on_error)
            return DatasetDict({"train": images}), None
        data = load_folder(name)
        return data if isinstance(data, DatasetDict) else DatasetDict({"train": data}), None
    commit = resolve_commit(name, revision, what="`dataset`", repo_type="dataset")
    with PartialState().main_process_first():
        return load_splits(name, commit), commit


def is_image_folder(name: str) -> bool:
    """Tell a folder of images from one of `save_to_disk`."""
    return Path(name).is_dir() and not any(Path(name, file).is_file() for file in ("state.json", "dataset_dict.json"))


def _pick_split(data: DatasetDict, split: str, field: str, where: str) -> Dataset:
    # Nobody asked for the only split by another name than the default.
    is_default = field == "train_split" and split == DataArguments.train_split
    if split not in data and not (is_default and len(data) == 1):
        raise ValueError(f"`{field}` must be one of {list(data)} of '{where}', got {split!r}. Choose one of them.")
    found = data[split] if split in data else data[next(iter(data))]
    if not len(found):
        raise ValueError(f"`dataset` must hold rows, got none in '{where}'. Give others.")
    return found


def keep_labels(data: Dataset, declared: str | None, answers: Sequence[str], where: str, *, is_test: bool) -> Dataset:
    """Keep declared labels where [`find_truth`] finds them, and drop with a word what looks like others."""
    if declared is not None and declared in answers:
        raise ValueError(
            f"Ground truth must reach no teacher, got column '{declared}' both as `label_column` and as a teacher's "
            "answers. Leave one of the two out."
        )
    if declared is not None and declared not in data.column_names and not is_test:
        declared = None
    undeclared = undeclared_truth(data, {*answers, declared})
    if undeclared and not is_test:
        say(
            f"Dropped the columns {undeclared} of '{where}', which may hold ground truth: nothing is trained or "
            "chosen by it. `--label_column` declares one, to measure on."
        )
    data = data.remove_columns(undeclared)
    if declared is None or declared not in data.column_names:
        if is_test:
            raise ValueError(
                f"Data to test on must have labels, got {data.column_names} in '{where}'. Name their column by "
                "`--label_column`."
            )
        return data
    truth = TRUTH[1] if TRUTH[0] in answers else TRUTH[0]
    return data if declared == truth else data.rename_column(declared, truth)


def answer_columns(hierarchy: TeacherHierarchy) -> list[str]:
    """Name the columns of teachers' answers."""
    return [teacher.model for teacher in hierarchy.teachers if teacher.kind == "column"]


def find_truth(data: Dataset, hierarchy: TeacherHierarchy) -> str | None:
    """Name the column of declared labels: what a teacher reads is answers, whatever it is called."""
    answers = answer_columns(hierarchy)
    return next((name for name in TRUTH if name in data.column_names and name not in answers), None)


def to_measure_on(data: Dataset, hierarchy: TeacherHierarchy) -> Dataset:
    """Give data with their declared labels in `label`, where a student that is measured looks for them."""
    if (truth := find_truth(data, hierarchy)) in (None, TRUTH[0]):
        return data
    return data.remove_columns(TRUTH[0]).rename_column(str(truth), TRUTH[0])


def hold_out(data: Dataset, hierarchy: TeacherHierarchy, args: DataArguments) -> tuple[Dataset, Dataset | None]:
    """Share out the data to be learnt from, and labelled ones for the calibration of teachers where any are wanted."""
    if not (num := args.num_heldout_examples):
        return data, None
    if find_truth(data, hierarchy) is None or not 0 < num < len(data):
        raise ValueError(
            f"`num_heldout_examples` must be labelled, and leave some of the {len(data)} examples to be learnt from, "
            f"got {num} with `label_column` {args.label_column!r}. Use fewer, or name the column in '{args.dataset}'."
        )
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(args.split_seed_offset)).tolist()
    return data.select(sorted(order[num:])), data.select(sorted(order[:num]))


def num_seen(test: Dataset, train: Dataset, hierarchy: TeacherHierarchy, input_column: str | None) -> int:
    """Count the rows to test on whose input is among those to be learnt from."""
    inputs = train.remove_columns([*{*answer_columns(hierarchy)} & {*train.column_names}])
    column = input_column or find_input_column(inputs)
    columns = parts_of(train, column) or [column]
    if not {*columns} <= {*test.column_names} & {*train.column_names}:
        return 0  # who reads them says so
    cells = [list(zip(*(cell_digests(data, column) for column in columns))) for data in (test, train)]
    seen = {*cells[1]}
    return sum(cell in seen for cell in cells[0])


def label_own(
    dataset: Dataset,
    hierarchy: TeacherHierarchy,
    folder: Path | None,
    args: DataArguments,
    quiet: bool,
    commit: str | None,
) -> PseudolabelPool:
    """Label data of one's own: now, each process its share, or in an earlier run."""
    if folder is not None and folder.exists():
        return PseudolabelPool.load(folder)
    return build_pool(
        dataset,
        hierarchy,
        output_dir=folder,
        input_column=args.input_column,
        oracle_column=find_truth(dataset, hierarchy),
        on_error=args.on_error,
        disable_tqdm=quiet,
        source=None if commit is None else {"dataset": args.dataset, "commit": commit},
    )


def pool_of_nothing(dataset: Dataset, hierarchy: TeacherHierarchy, args: DataArguments) -> PseudolabelPool:
    """Make the pool of these rows and teachers without asking any: what does not fit shows before the work begins."""
    if "id" not in dataset.column_names:  # which would be made of the content
        dataset = dataset.add_column("id", range(len(dataset)))
    truth = find_truth(dataset, hierarchy)
    named = name_columns(args.input_column)
    _, columns, ids, inputs = read_rows(dataset, hierarchy, {}, frozenset(), named, truth, None)
    size = len(ids), 1
    made_up = teacher_dataset(ids, np.zeros(size, dtype=np.int16), np.ones(size, dtype=np.float16))
    pool = PseudolabelPool(hierarchy, dict.fromkeys(hierarchy.names, made_up), inputs, input_column=columns.inputs)
    if args.on_error == "missing" and columns.inputs and is_vector_column(inputs, columns.inputs):
        return pool.select(np.delete(np.arange(len(ids)), unreadable_vectors(inputs, columns.inputs)))
    return pool

"""Co-supervise a student from end to end, beside the baselines, and write an honest report.

    accelerate launch recipes/train.py                                     # embedded digits, no network
    accelerate launch recipes/train.py --config recipes/configs/fashion_c1.yaml --seeds 0,1,2,3,4
    accelerate launch recipes/train.py --push_to_hub --hub_model_id me/digits       # publish it, then or later

Trains the teachers where they are not there yet, labels the pool once, trains the student by every method with one
recipe, and leaves the student of the first seed in `output_dir` with a model card, `report.json` and figures. Data,
teachers (with `--teachers_revision`) and student may be ids on the Hub; each is pinned to one commit.
"""

from __future__ import annotations

import copy
import importlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import ClassLabel, Dataset, DatasetDict, disable_progress_bars
from train_teachers import CONTROL, TeacherArguments, control_hierarchy, is_on_hub, train_teachers
from transformers.utils import logging as transformers_logging

from hf_cosupervise import CoSupervisedConfig, PseudolabelPool, TeacherHierarchy, build_pool
from hf_cosupervise.cards import model_card, write_card
from hf_cosupervise.config import fields_without
from hf_cosupervise.derived_pools import calibrated_pool
from hf_cosupervise.evaluation import (
    METHODS,
    compare_methods,
    format_report,
    merge_reports,
    save_report,
    teacher_accuracies,
    weak_accuracy,
)
from hf_cosupervise.hub import hub_errors, open_repo, resolve_commit
from hf_cosupervise.inputs import find_input_column, find_label_column, is_text_column
from hf_cosupervise.plotting import plot_pgr, plot_teacher_shares
from hf_cosupervise.processes import join_processes
from hf_cosupervise.publishing import describe_teacher
from hf_cosupervise.script_utils import parse_recipe_args, recipe_arguments_to_dict
from hf_cosupervise.sources import load_folder, load_splits
from hf_cosupervise.students import STORY_FILES, push_student

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "digits.yaml"


@dataclass
class DataArguments:
    """Say which data, and who gets what of it: `permutation(seed)` shares the training split out."""

    dataset: str = field(default="data/digits", metadata={"help": "Folder of `save_to_disk`, or Hub id."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a data set's id."})
    prepare_dataset: str | None = field(
        default=None, metadata={"help": "Function of recipes/prepare.py that makes the folder where it is missing."}
    )
    train_split: str = field(default="train", metadata={"help": "Split that is shared out."})
    test_split: str | None = field(default=None, metadata={"help": "Split to test on. Default: what is left over."})
    num_teacher_examples: int = field(default=400, metadata={"help": "First examples, labelled, for the teachers."})
    num_pool_examples: int = field(default=1000, metadata={"help": "Unlabelled examples for the student."})
    pool_from_end: bool = field(
        default=False, metadata={"help": "Take the pool from the end, not after the teachers'."}
    )
    num_heldout_examples: int = field(
        default=0,
        metadata={"help": "Labelled examples that neither teachers nor pool see; without `test_split` nor the test."},
    )
    split_seed_offset: int = field(default=0, metadata={"help": "Added to the seed of the permutation."})
    oracle_domain_column: str | None = field(
        default=None,
        metadata={"help": "Column with the domain, known to the teachers' training and to analysis only."},
    )


@dataclass
class StudentArguments:
    """Say which strong student."""

    student: str | None = field(default=None, metadata={"help": "Folder or Hub id of a pre-trained model."})
    prepare_student: str | None = field(
        default=None, metadata={"help": "Function of recipes/prepare.py that makes the folder where it is missing."}
    )
    pretrain: str | None = field(
        default=None,
        metadata={"help": "Function of recipes/pretrain.py that makes a student from the unlabelled pool alone."},
    )
    pretrain_kwargs: dict = field(default_factory=dict, metadata={"help": "Its arguments."})


@dataclass
class RecipeArguments:
    """Say what is compared."""

    seeds: str = field(default="0", metadata={"help": "Seeds, separated by commas."})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "What is compared."})
    control: bool = field(default=True, metadata={"help": "Also train on one teacher that saw all the labels."})
    resume: bool = field(
        default=True,
        metadata={"help": "Go on with the run in `output_dir`, where there is one; False: refuse such a folder."},
    )
    calibrate_teachers: bool = field(
        default=False, metadata={"help": "Fit a temperature per teacher to the `num_heldout_examples`."}
    )


RECIPE_TYPES = [DataArguments, TeacherArguments, StudentArguments, RecipeArguments, CoSupervisedConfig]


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
    if Path(args.dataset).is_dir():
        return load_folder(args.dataset), None
    what = {"what": "`dataset`", "repo_type": "dataset"}
    commit = resolve_commit(args.dataset, args.dataset_revision, **what)
    with PartialState().main_process_first(), hub_errors(repo_id=args.dataset, revision=commit, **what):
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
        dataset, hierarchy, output_dir=folder, oracle_column=find_label_column(dataset),
        oracle_domain_column=data_args.oracle_domain_column, batch_size=256, disable_tqdm=quiet,
        source=None if commit is None else {"dataset": data_args.dataset, "commit": commit},
    )  # fmt: skip


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


def run_seed(
    seed: int, data_args: DataArguments, teacher_args: TeacherArguments, student_args: StudentArguments,
    recipe_args: RecipeArguments, config: CoSupervisedConfig,
) -> dict[str, Any]:  # fmt: skip
    """Run everything for one seed, or read what an earlier run of it found."""
    folder = Path(config.output_dir) / "_run" / f"seed-{seed}"
    if (folder / "report.json").is_file():
        return json.loads((folder / "report.json").read_text(encoding="utf-8"))
    started, quiet = time.time(), bool(config.disable_tqdm)
    split = load_split(data_args, seed)
    student = find_student(student_args, split, folder / "student-start", seed)
    teachers_dir = Path(teacher_args.teachers_dir or folder / "teachers")
    with PartialState().main_process_first():
        hierarchy = train_teachers(
            split.teachers, split.labels, teacher_args, teachers_dir, seed,
            data_args.oracle_domain_column if teacher_args.specialize_by == "domain" else None,
        )  # fmt: skip
    say(f"seed {seed}: {hierarchy!r} in {teachers_dir}")
    pool = label_data(split.pool, hierarchy, folder / "pool", data_args, quiet, split.commit)
    test_pool = label_data(split.test, hierarchy, folder / "test_pool", data_args, quiet)
    say(f"seed {seed}: {len(pool)} pool and {len(test_pool)} test examples labelled by every teacher")
    extra = {}
    if recipe_args.control and (teachers_dir / CONTROL).is_dir():
        control = control_hierarchy(hierarchy, teachers_dir)
        extra["one teacher, all labels"] = label_data(split.pool, control, folder / "control_pool", data_args, quiet)
    heldout = (
        label_data(split.heldout, hierarchy, folder / "heldout_pool", data_args, quiet) if len(split.heldout) else None
    )
    if recipe_args.calibrate_teachers and heldout is not None:
        pool = calibrated_pool(pool, heldout)
        for name, own in extra.items():
            labelled = label_data(split.heldout, own.hierarchy, folder / "control_heldout_pool", data_args, quiet)
            extra[name] = calibrated_pool(own, labelled)
    args = copy.copy(config)
    args.seed = args.data_seed = seed
    args.output_dir, args.push_to_hub = str(folder / "student"), False
    args.features_dir = config.features_dir or str(Path(config.output_dir) / "_run" / "features")
    report, trainer = compare_methods(
        student, args, pool, split.test,
        weak=weak_accuracy(test_pool), methods=recipe_args.methods, extra_pools=extra, labelled_pool=heldout,
        resume=True,
        on_trained=lambda method, trainer: say(f"seed {seed}: {method} trained, {trainer.state.global_step} steps"),
    )  # fmt: skip
    report |= {"teachers": teacher_accuracies(test_pool), "runtime": time.time() - started}
    trainer.save_model(str(folder / "model"))
    if config.should_save:
        save_report(report, folder / "report.json")
    PartialState().wait_for_everyone()
    return report


def check_run(folder: Path, facts: dict[str, Any], resume: bool = True) -> None:
    """See that a folder holds no other run, and write down which one this is."""
    path = folder / "_run" / "config.json"
    if path.is_file() and not resume:
        raise FileExistsError(
            f"'{folder}' must not hold a run where `resume` is off, got one. Choose another `output_dir`, or go on "
            "with it by `--resume`."
        )
    if path.is_file():
        # A field that is new since then had its default.
        known = recipe_arguments_to_dict([kind() for kind in RECIPE_TYPES]) | json.loads(path.read_text("utf-8"))
        facts = {key: facts.get(key, value) for key, value in known.items()} | facts
        told_elsewhere = {"seeds", "resume"} | fields_without("publish") - {"use_cpu"}
        different = sorted(
            key for key in {*known, *facts} - told_elsewhere
            if known.get(key) != facts.get(key)
        )  # fmt: skip
        if different:
            changes = ", ".join(f"{key}: {known.get(key)!r} -> {facts.get(key)!r}" for key in different)
            raise FileExistsError(
                f"'{folder}' must hold this run or none, got another one ({changes}). Choose another `output_dir`."
            )
        return
    if any(found.is_file() for found in folder.rglob("*")):  # folders alone are left by a run that died early
        raise FileExistsError(
            f"'{folder}' must be a run's folder or not exist, got other files. Choose another `output_dir`."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:  # a run that dies now leaves no file in the folder
        whole = Path(place, path.name)
        whole.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        whole.replace(path)


def finish(report: dict[str, Any], folder: Path, seed: int, facts: dict[str, Any], arguments: dict[str, Any]) -> None:
    """Put the student of one seed, its history, the report, figures and the card where a user looks for them."""
    seed_dir = folder / "_run" / f"seed-{seed}"
    shutil.copytree(seed_dir / "model", folder, dirs_exist_ok=True)
    history = json.loads((seed_dir / "student" / "_run" / "history.json").read_text(encoding="utf-8"))
    save_report(history, folder / "history.json")
    save_report(report, folder / "report.json")
    plot_pgr(report, folder / "pgr.png")
    plot_teacher_shares(report, folder / "teacher_shares.png")
    pool = PseudolabelPool.load(seed_dir / "pool")
    student, source = history["run"]["student"], history["run"]["source"].get("dataset")
    card = {
        "name": str(facts["hub_model_id"] or folder.name).split("/")[-1],
        "hub_model_id": facts["hub_model_id"],
        "hub_branch": facts["hub_revision"],
        "modality": modality_of(pool),
        "library_name": "timm" if "architecture" in json.loads((folder / "config.json").read_text()) else None,
        "labels": list(pool.labels),
        "num_examples": len(pool),
        "base_model": student.get("model"),
        "base_model_revision": student.get("revision"),
        "base_model_commit": student.get("commit"),
        "student_training": facts["student_training"],
        "has_adapter": (folder / "adapter").is_dir(),
        "teachers": [
            {**teacher.to_dict(), **describe_teacher(pool, name), "accuracy": report["teachers"][name]}
            for name, teacher in zip(pool.hierarchy.names, pool.hierarchy.teachers)
        ],
        "report": report,
        "seed": seed,
        "datasets": [source] if source else [],
        "dataset_name": source or Path(facts["dataset"]).name,
        "dataset_split": facts["test_split"],
        "figure": "pgr.png",
        "files": [
            ("report.json", "every number of every seed"),
            ("history.json", "the levels of this student, and the commits of all that it was made of"),
            ("teacher_shares.png", "which teacher taught how much"),
        ],
        "hyperparameters": arguments,
        "versions": {name: version(name) for name in ("hf_cosupervise", "transformers", "torch", "datasets")},
    }
    write_card(model_card(card), folder)


def modality_of(pool: PseudolabelPool) -> str | None:
    """Tell what the pool's inputs are, None where it holds none."""
    if pool.inputs is None:
        return None
    return "text" if is_text_column(pool.inputs, find_input_column(pool.inputs)) else "image"


def open_target(config: CoSupervisedConfig) -> str | None:
    """See that the student may be pushed, before any work; its id with the user's name."""
    if not config.push_to_hub:
        return config.hub_model_id
    return join_processes().on_first(
        lambda: open_repo(
            config.hub_model_id or Path(config.output_dir).absolute().name,
            what="The student", private=config.hub_private_repo, token=config.hub_token,
        )
    )  # fmt: skip


def main() -> None:
    """Run the recipe."""
    run = parse_recipe_args(RECIPE_TYPES, default_config=DEFAULT_CONFIG)
    recipe_args, config = run[3:]
    facts = recipe_arguments_to_dict(run)
    seeds = [int(seed) for seed in recipe_args.seeds.split(",")]
    if recipe_args.calibrate_teachers and not run[0].num_heldout_examples:
        raise ValueError("`calibrate_teachers` needs labelled examples, got `num_heldout_examples` 0. Give it some.")
    folder = Path(config.output_dir)
    is_new = run[1].teachers_dir and not Path(run[1].teachers_dir, "hierarchy.yaml").is_file()
    if len(seeds) > 1 and is_new and not is_on_hub(run[1]):
        raise ValueError(
            "`teachers_dir` is one folder, and each of several seeds trains teachers of its own: leave it out, or "
            "train the teachers before by train_teachers.py."
        )
    config.device  # noqa: B018  # joins the other processes, on the device that the configuration names
    if config.disable_tqdm:
        transformers_logging.disable_progress_bar()
        disable_progress_bars()
    facts["hub_model_id"] = open_target(config)
    push = {"revision": config.hub_revision, "token": config.hub_token}
    with PartialState().main_process_first():
        check_run(folder, facts, recipe_args.resume)
    report = merge_reports([run_seed(seed, *run) for seed in seeds], seeds)

    def conclude() -> None:
        finish(report, folder, seeds[0], facts, config.changed_arguments())
        say(f"\n{format_report(report)}\n\nStudent, report.json, figures and model card: {folder}")
        if config.push_to_hub:
            story = {name: folder / name for name in STORY_FILES if name != "README.md"}
            say(f"Pushed: {push_student(folder, facts['hub_model_id'], story=story, **push)}")

    join_processes().on_first(conclude)


if __name__ == "__main__":
    main()

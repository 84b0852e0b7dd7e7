"""An experiment of a configuration: teachers that are weak on purpose, baselines, co-supervision, ceiling, seeds.

`train.py` runs it unless teachers are named for data of one's own. It trains the teachers where they are not there
yet, labels the pool once, trains the student by every method with one recipe, and leaves the student of the first seed
in `output_dir` with a model card, `report.json` and figures.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import disable_progress_bars
from task import (
    MADE_OF,
    check_run,
    find_student,
    label_data,
    load_split,
    make_folder,
    modality_of,
    say,
    tell_data,
    tell_student,
)
from task_arguments import DataArguments, RecipeArguments, StudentArguments, TeacherArguments, read_seeds
from train_teachers import CONTROL, control_hierarchy, is_on_hub, train_teachers
from transformers.utils import logging as transformers_logging

from hf_cosupervise import CoSupervisedConfig, PseudolabelPool
from hf_cosupervise.arguments import recipe_arguments_to_dict
from hf_cosupervise.evaluation.comparison import compare_methods
from hf_cosupervise.evaluation.methods import METHODS, teacher_accuracies, weak_accuracy
from hf_cosupervise.evaluation.plots import plot_pgr, plot_teacher_shares
from hf_cosupervise.evaluation.report import format_report, merge_reports, save_report
from hf_cosupervise.hub.cards import model_card, write_card
from hf_cosupervise.hub.client import open_repo
from hf_cosupervise.pool.derived import calibrated_pool
from hf_cosupervise.processes import join_processes
from hf_cosupervise.students.publishing import STORY_FILES, push_student
from hf_cosupervise.training.publishing import made_of


def run_seed(
    seed: int,
    data_args: DataArguments,
    teacher_args: TeacherArguments,
    student_args: StudentArguments,
    recipe_args: RecipeArguments,
    config: CoSupervisedConfig,
) -> dict[str, Any]:
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
            split.teachers,
            split.labels,
            teacher_args,
            teachers_dir,
            seed,
            data_args.oracle_domain_column if teacher_args.specialize_by == "domain" else None,
        )
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
        student,
        args,
        pool,
        split.test,
        weak=weak_accuracy(test_pool, args.metric),
        methods=recipe_args.methods or METHODS,
        extra_pools=extra,
        labelled_pool=heldout,
        resume=True,
        on_trained=lambda method, trainer: say(f"seed {seed}: {method} trained, {trainer.state.global_step} steps"),
    )
    report |= {"teachers": teacher_accuracies(test_pool), "runtime": time.time() - started}
    trainer.save_model(str(folder / "model"))
    if config.should_save:
        save_report(report, folder / "report.json")
    PartialState().wait_for_everyone()
    return report


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
    known = made_of(history["run"], pool)
    teachers = [{**teacher, "accuracy": report["teachers"][teacher["name"]]} for teacher in known["teachers"]]
    card = known | {
        "name": str(facts["hub_model_id"] or folder.name).split("/")[-1],
        "hub_model_id": facts["hub_model_id"],
        "hub_branch": facts["hub_revision"],
        "modality": modality_of(pool),
        "library_name": "timm" if "architecture" in json.loads((folder / "config.json").read_text()) else None,
        "student_training": facts["student_training"],
        "has_adapter": (folder / "adapter").is_dir(),
        "teachers": teachers,
        "report": report,
        "seed": seed,
        "dataset_name": next(iter(known["datasets"]), Path(facts["dataset"]).name),
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


def open_target(config: CoSupervisedConfig) -> str | None:
    """See that the student may be pushed, before any work; its id with the user's name."""
    if not config.push_to_hub:
        return config.hub_model_id
    return join_processes().on_first(
        lambda: open_repo(
            config.hub_model_id or Path(config.output_dir).absolute().name,
            what="The student",
            private=config.hub_private_repo,
            token=config.hub_token,
        )
    )


def tell_made_of(
    data_args: DataArguments, student_args: StudentArguments, config: CoSupervisedConfig
) -> dict[str, Any]:
    """Tell data and student from others of the same name, once they are there; teachers are trained in the run."""
    make_folder("prepare", data_args.prepare_dataset, data_args.dataset)
    if student_args.student is not None:
        make_folder("prepare", student_args.prepare_student, student_args.student)

    def tell() -> dict[str, Any]:
        made_of = {"dataset": tell_data(data_args.dataset, data_args.dataset_revision)}
        return made_of | tell_student(student_args.student, config.student_revision)

    return join_processes().on_first(tell)


def run_experiment(run: tuple[Any, ...]) -> None:
    """Run all seeds, or what is left of them, and put the student of the first one in its place."""
    recipe_args, config = run[3:]
    facts = recipe_arguments_to_dict(run)
    seeds = read_seeds(recipe_args.seeds)
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
    facts[MADE_OF] = tell_made_of(run[0], run[2], config)
    with PartialState().main_process_first():
        check_run(folder, facts, recipe_args.resume)
    report = merge_reports([run_seed(seed, *run) for seed in seeds], seeds)

    def conclude() -> None:
        finish(report, folder, seeds[0], facts, config.changed_arguments())
        say(f"\n{format_report(report)}\n\nStudent, report.json, figures and model card: {folder}")
        if config.push_to_hub:
            story = {name: folder / name for name in STORY_FILES if name != "README.md" and (folder / name).is_file()}
            say(f"Pushed: {push_student(folder, facts['hub_model_id'], story=story, **push)}")

    join_processes().on_first(conclude)

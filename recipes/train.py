"""Co-supervise a student on data of your own, with your teachers and without a label, and give an account of it.

    accelerate launch recipes/train.py --dataset photos/ --teachers 0:org/pets 1:org/cats 1:org/dogs \\
        --student facebook/dinov2-small --output_dir outputs/pets
    accelerate launch recipes/train.py --dataset mine.csv --teachers rater_1 rater_2 org/moods --student org/encoder
    accelerate launch recipes/train.py --dataset table.csv --teachers rule_1 rule_2 --student mlp \\
        --input_column age,income
    accelerate launch recipes/train.py                                     # embedded digits, no network
    accelerate launch recipes/train.py --config recipes/configs/fashion_c1.yaml --seeds 0,1,2,3,4

Labels the data once with every teacher, trains the student, and leaves it in `output_dir` with a model card, what can
be said of it without ground truth (`report.json`, a figure), the label of every example (`labels.parquet`, its rows in
the order of the data) and the hundred that a person should look at first (`to_label.csv`). With labels to test on
(`--test_split`, `--test_dataset`) it is measured beside the baselines too. `--dry_run` says what would be done. The
same command goes on with a run that was cut off, and prints the report of a finished one again; `--push_to_hub`
publishes it, then or later.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset, disable_progress_bars
from experiment import open_target, run_experiment
from task import (
    MADE_OF,
    answer_columns,
    begin_run,
    find_run,
    find_truth,
    hold_out,
    is_image_folder,
    label_own,
    num_seen,
    open_own_data,
    pool_of_nothing,
    say,
    tell_data,
    tell_student,
    to_measure_on,
)
from task_arguments import (
    DEFAULT_CONFIG,
    FOR_EXPERIMENTS,
    RECIPE_TYPES,
    DataArguments,
    TeacherArguments,
    read_seeds,
)
from transformers.utils import logging as transformers_logging

import hf_cosupervise
from hf_cosupervise import CoSupervisedConfig, CoSupervisedTrainer, PseudolabelPool, TeacherHierarchy
from hf_cosupervise.arguments import parse_recipe_args, read_recipe_config, recipe_arguments_to_dict
from hf_cosupervise.data.columns import read_labels
from hf_cosupervise.data.vectors import with_input
from hf_cosupervise.evaluation.comparison import Comparison, Contestant
from hf_cosupervise.evaluation.methods import method_arguments, teacher_accuracies, weak_accuracy
from hf_cosupervise.evaluation.overview import Overview, format_overview, label_agreement, overview
from hf_cosupervise.evaluation.plots import plot_overview
from hf_cosupervise.evaluation.report import add_pgr, format_methods, merge_reports, save_report, say_metric
from hf_cosupervise.hub.cards import model_card, write_card
from hf_cosupervise.models.source import find_model
from hf_cosupervise.pool.derived import calibrated_pool
from hf_cosupervise.processes import join_processes
from hf_cosupervise.students.pooling import default_pooling
from hf_cosupervise.students.publishing import STORY_FILES, push_student
from hf_cosupervise.students.vectors import VECTOR_STUDENTS
from hf_cosupervise.teachers.kinds.base import label_finder
from hf_cosupervise.teachers.kinds.loading import identify_teacher
from hf_cosupervise.teachers.naming import hierarchy_from_names
from hf_cosupervise.teachers.running import BLAMED
from hf_cosupervise.training.checks import check_modality
from hf_cosupervise.training.members import DECIDED_BY_MEMBERS
from hf_cosupervise.training.student_card import is_closed_form

FIGURE = "overview.png"
FILES = [
    ("report.json", "what is known of student and teachers"),
    ("history.json", "the levels of this student, and the commits of all that it was made of"),
]
# Rows that a dry run labels to see how long all of them take, and how many times as many it labels then.
_SAMPLE, _TIMES = 32, 3


@dataclass
class OwnTask:
    """Data of one's own, who labels them, and what is there to measure on."""

    data: Dataset
    heldout: Dataset | None
    commit: str | None
    hierarchy: TeacherHierarchy
    test: Dataset | None

    @property
    def is_labelled(self) -> bool:
        """`bool`: Whether the data to be learnt from have declared labels, for the ceiling."""
        return find_truth(self.data, self.hierarchy) is not None


def parse() -> tuple[tuple[Any, ...], bool]:
    """Read the command line, and tell whether it is about data of one's own; nothing on it means the digits."""
    argv = sys.argv[1:]
    given = {text.split("=")[0].removeprefix("--").replace("-", "_") for text in argv if text.startswith("--")}
    # Whoever says what weak teachers are made of, or where an experiment keeps them, means an experiment.
    of_experiments = {item.name for item in fields(TeacherArguments)} - {"teachers", "teacher_trusted_types"}
    of_experiments |= {"num_teacher_examples"}
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("config", "student", "student_training"):
        finder.add_argument(f"--{name}", f"--{name.replace('_', '-')}", nargs="?")
    found = {name: value for name, value in vars(finder.parse_known_args(argv)[0]).items() if value is not None}
    if (config := found.get("config")) is not None:
        found = read_recipe_config(config, RECIPE_TYPES) | found
        given |= {*found}
        is_own = "teachers" in given and not given & of_experiments
    else:
        is_own = bool(given & {"dataset", "teachers"}) and not given & of_experiments
    # Said before, so that it is checked with the rest.
    decided = decide_training(found, given) if is_own else []
    run = parse_recipe_args(RECIPE_TYPES, [*decided, *argv], default_config=None if is_own else DEFAULT_CONFIG)
    if run[4].eval_strategy != "no":
        raise ValueError(
            f"`eval_strategy` must be 'no', got '{run[4].eval_strategy.value}': levels are not chosen by labels. The "
            "student is measured at the end, by `--test_split` or `--test_dataset`."
        )
    if is_own and (ignored := [name for name in FOR_EXPERIMENTS if {name, f"no_{name}"} & given]):
        raise ValueError(
            f"`{ignored[0]}` is for experiments, whose weak teachers are trained here (`--num_teacher_examples`), got "
            "it with data and teachers of one's own. Leave it out."
        )
    data_args, calibrates = run[0], run[3].calibrate_teachers
    if is_own and calibrates != bool(data_args.num_heldout_examples):
        raise ValueError(
            "`num_heldout_examples` of one's own are for `calibrate_teachers`, which needs them, got "
            f"{data_args.num_heldout_examples} and {calibrates}. Give both, or none."
        )
    return run, is_own


def decide_training(found: dict[str, Any], given: set[str]) -> list[str]:
    """Give the options of how data of one's own are learnt from, where nobody gave them."""
    decided: list[str] = []
    if found.get("student") == "mlp" and "student_training" not in given:
        found = found | {"student_training": "full"}  # there is nothing in it yet to be frozen
        decided += ["--student_training", "full"]
    # One student for everybody: several ways to train it, of which none has to be chosen. Whoever chooses one has it.
    if found.get("student_training", "probe") == "probe" and not given & {"method", *DECIDED_BY_MEMBERS}:
        decided += ["--method", "committee"]
    return decided


def open_task(data_args: DataArguments, teacher_args: TeacherArguments, methods: Sequence[str] | None) -> OwnTask:
    """Open the data and name the teachers, and refuse what cannot be done with them."""
    names = list(teacher_args.teachers)
    if not names:
        raise ValueError(
            "Teachers are needed, got none. Name a hierarchy, or models by their ids or folders, by `--teachers`; or "
            "train weak ones on labelled examples, `--num_teacher_examples` of them."
        )
    answers = [str(name).split(":", 1)[-1] for name in names if isinstance(name, str)]
    answers += [str(name.get("model")) for name in names if isinstance(name, dict)]
    data, test, commit = open_own_data(data_args, answers)
    hierarchy = hierarchy_from_names(names, data, data_args.labels, teacher_args.teacher_trusted_types)
    folders = data.features["label"].names if is_image_folder(data_args.dataset) and "label" in data.features else []
    find = label_finder(hierarchy.labels)
    # Images may lie in folders for another reason than their labels.
    if folders and all(find(name) is None for name in folders):
        data = data.remove_columns("label")
    task = OwnTask(*hold_out(data, hierarchy, data_args), commit, hierarchy, test)
    if methods is not None and "ceiling" in methods and not task.is_labelled:
        raise ValueError(
            "`methods` 'ceiling' is a student of ground truth, got data without. Name its column by `--label_column`, "
            "or leave it out."
        )
    if methods is not None and test is None:
        raise ValueError(
            f"`methods` are compared on labelled examples, got {list(methods)} and none. Give `--test_split` or "
            "`--test_dataset`, or leave them out."
        )
    return task


def tell_plan(task: OwnTask, run: tuple[Any, ...]) -> None:
    """Say what would be done, and how long it takes by a look at a few rows."""
    data_args, _, student_args, recipe_args, config = run
    num_rows, rows = len(task.data), np.linspace(0, len(task.data) - 1, min(len(task.data), _SAMPLE * _TIMES))
    sample = task.data.select(np.unique(rows.astype(int)))
    with tempfile.TemporaryDirectory() as folder:
        started = time.time()
        label_own(sample.select(range(min(_SAMPLE, len(sample)))), task.hierarchy, None, data_args, True, None)
        first, started = time.time() - started, time.time()
        pool = with_root(label_own(sample, task.hierarchy, None, data_args, True, None))
        # The difference of both, or loading the models would count as labelling.
        more = max(time.time() - started - first, 0.0) / max(len(sample) - _SAMPLE, 1)
        own = copy.copy(config)
        own.output_dir, own.push_to_hub, own.method = folder, False, "csl"
        trainer = CoSupervisedTrainer(student_args.student, own, pool=pool)
        size, started = 0, time.time()
        if trainer.student.head is not None:
            size = trainer.pool_features().shape[1]
        features = (time.time() - started) / len(sample)
    models = [teacher for teacher in task.hierarchy.teachers if teacher.has_files]
    weights = sum(identify_teacher(teacher)[1] for teacher in models)
    k = min(16, task.hierarchy.num_labels)
    on_disk = num_rows * (4 * size + 4 * k * len(task.hierarchy.teachers))
    seeds = len(read_seeds(recipe_args.seeds))
    say(
        f"{num_rows} rows, {task.hierarchy!r}: {len(models)} models ({weights / 1e6:.0f} MB) and "
        f"{len(task.hierarchy.teachers) - len(models)} columns; labels {list(task.hierarchy.labels)[:10]}\n"
        f"{num_rows * len(models)} forward passes of teachers, about {tell_time(num_rows * more)}; {num_rows} "
        f"of the student, about {tell_time(num_rows * features)}; {seeds} training(s) by `method` "
        f"'{config.method}' come on top\nabout {on_disk / 1e6:.0f} MB of labels and features on disk in "
        f"'{config.output_dir}'; nothing was written"
    )


def tell_time(seconds: float) -> str:
    """Give a time in words."""
    return f"{seconds / 60:.0f} minutes" if seconds > 120 else f"{seconds:.0f} seconds"


def with_root(pool: PseudolabelPool) -> PseudolabelPool:
    """Put the mean of all teachers above them where nobody said who is a generalist: they become its specialists."""
    is_flat = pool.hierarchy.num_levels == 1 and len(pool.hierarchy.teachers) > 1
    return pool.with_aggregate("mean_probs") if is_flat else pool


def train_seed(
    seed: int, task: OwnTask, run: tuple[Any, ...], pool: PseudolabelPool, test_pool: PseudolabelPool | None
) -> dict[str, Any]:
    """Train the student of one seed, or read what an earlier run found of it."""
    data_args, _, student_args, recipe_args, config = run
    folder = Path(config.output_dir) / "_run" / f"seed-{seed}"
    if (folder / "report.json").is_file():
        return json.loads((folder / "report.json").read_text(encoding="utf-8"))
    args = copy.copy(config)
    args.seed = args.data_seed = seed
    args.output_dir, args.push_to_hub = str(folder / "student"), False
    args.features_dir = config.features_dir or str(Path(config.output_dir) / "_run" / "features")
    trainer = CoSupervisedTrainer(student_args.student, args, pool=pool, input_column=data_args.input_column)
    trainer.train(resume_from_checkpoint=True)
    say(f"seed {seed}: student trained by `method` '{args.method}'")
    seen = overview(trainer)
    report: dict[str, Any] = {"overview": seen.report()}
    if task.test is not None:
        report |= measure(trainer, args, task, pool, test_pool, recipe_args.methods, student_args.student)
    trainer.save_model(str(folder / "model"))
    if config.should_save:
        write_story(trainer, seen, report, folder / "model")
        save_report(trainer.card_facts(), folder / "card.json")
        np.save(folder / "labels.npy", seen.labels)
        save_report(report, folder / "report.json")
    PartialState().wait_for_everyone()
    return report


def measure(
    trainer: CoSupervisedTrainer,
    args: CoSupervisedConfig,
    task: OwnTask,
    pool: PseudolabelPool,
    test_pool: PseudolabelPool | None,
    methods: Sequence[str] | None,
    student: str,
) -> dict[str, Any]:
    """Measure the student on labelled examples, beside what a user would try instead; nothing is chosen by it."""
    assert task.test is not None
    own, test = args.method, to_measure_on(task.test, task.hierarchy)
    if methods is None:
        methods = ["generalist", "ensemble", *(["ceiling"] if task.is_labelled else [])]
    found: dict[str, dict[str, Any]] = {own: {**trainer.student.measure(test)}}
    comparison = Comparison(student, test)
    for name in methods:
        if name != own:
            args_of_all = method_arguments(args, "csl", pool.hierarchy.num_levels)
            if name == "csl":  # beside a committee, whose folder this is
                args_of_all.output_dir = str(Path(args.output_dir, "_run", "methods", name))
            numbers = comparison.run(Contestant.enter(name, name, args_of_all, pool), resume=True)
            found[name] = {key: numbers[key] for key in found[own]}
    report: dict[str, Any] = {"methods": found, "own_method": own, **say_metric(args.metric)}
    if test_pool is not None:
        weak = weak_accuracy(test_pool, args.metric)
        report |= {f"weak_{args.metric}": weak, "teachers": teacher_accuracies(test_pool)}
        if "ceiling" in found:
            add_pgr(weak, found["ceiling"][args.metric], list(found.values()), args.metric)
    return report


def write_story(trainer: CoSupervisedTrainer, seen: Overview, report: dict[str, Any], folder: Path) -> None:
    """Put labels, figure and history beside the model of a seed."""
    seen.save_labels(folder / "labels.parquet")
    seen.save_to_label(folder / "to_label.csv")
    if find_spec("matplotlib") is not None:
        plot_overview(report["overview"], folder / FIGURE)
    save_report(json.loads(trainer.history.to_json()), folder / "history.json")


def columns_lacking(task: OwnTask) -> list[str]:
    """Name the columns of teachers' answers that the test set lacks."""
    return [
        name for name in answer_columns(task.hierarchy) if task.test is not None and name not in task.test.column_names
    ]


def label_test(task: OwnTask, folder: Path, data_args: DataArguments, quiet: bool) -> PseudolabelPool | None:
    """Label the test set by the same teachers, where it holds what they read."""
    if task.test is None:
        return None
    is_new = not folder.exists() and PartialState().is_local_main_process
    if is_new and (num := num_seen(task.test, task.data, task.hierarchy, data_args.input_column)):
        say(
            f"{num} of the {len(task.test)} rows to test on are among those to be learnt from, and tell little of "
            "others. Test on rows that the student does not see."
        )
    if lacking := columns_lacking(task):
        say(f"The test data lack the columns {lacking} of teachers, which are therefore not measured.")
        return None
    return with_root(label_own(task.test, task.hierarchy, folder, data_args, quiet, None))


def finish(
    folder: Path, seeds: Sequence[int], report: dict[str, Any], facts: dict[str, Any], changed: dict[str, Any]
) -> None:
    """Put the student of the first seed where a user looks for it, with the card and the report of all seeds."""
    own = folder / "_run" / f"seed-{seeds[0]}"
    shutil.copytree(own / "model", folder, dirs_exist_ok=True)
    labels = [np.load(folder / "_run" / f"seed-{seed}" / "labels.npy") for seed in seeds]
    report["seed_agreement"] = label_agreement(labels)
    save_report(report, folder / "report.json")
    known = json.loads((own / "card.json").read_text(encoding="utf-8"))
    known |= {
        "name": str(facts["hub_model_id"] or folder.absolute().name).split("/")[-1],
        "hub_model_id": facts["hub_model_id"],
        "hub_branch": facts["hub_revision"],
        "hyperparameters": changed,
        "dataset_name": Path(facts["test_dataset"] or facts["dataset"]).name,
        "dataset_split": facts["test_split"],
        "report": report,
        "seed": seeds[0],
        "figure": FIGURE if (folder / FIGURE).is_file() else None,
        "files": FILES,
    }
    write_card(model_card(known), folder)


def check_models(task: OwnTask, run: tuple[Any, ...]) -> None:
    """See that teachers and student have weights that are read, before anything is begun."""
    student, revision = run[2].student, run[4].student_revision
    models = {
        f"Teacher '{teacher.name}'": {
            "model": teacher.model,
            "revision": teacher.revision,
            "subfolder": teacher.subfolder,
        }
        for teacher in task.hierarchy.teachers
        if teacher.has_files
    }
    if student not in VECTOR_STUDENTS:
        models["The student"] = {"model": student, "revision": revision}
    for what, place in models.items():
        find_model(what=what, **place).check_weights()


def tell_made_of(task: OwnTask, run: tuple[Any, ...]) -> dict[str, Any]:
    """Tell by its content or commit what a run is made of: what changed under the same name makes another one."""
    data_args, _, student_args, _, config = run
    made_of: dict[str, Any] = {"labels": list(task.hierarchy.labels)}
    made_of["dataset"] = tell_data(data_args.dataset, task.commit, task.data)
    if data_args.test_dataset is not None and task.test is not None:
        made_of["test_dataset"] = tell_data(data_args.test_dataset, None, task.test)
    for teacher in task.hierarchy.teachers:
        # Where its files are is said by the arguments; a hierarchy that they name may hold other teachers by now.
        # Trust is often given only when it is asked for, and changes no answer.
        hidden = {"trusted_types", "model"} if teacher.has_files else {"trusted_types"}
        told = {key: value for key, value in teacher.to_dict().items() if key not in hidden}
        made_of[f"teacher '{teacher.name}'"] = told | identify_teacher(teacher)[0]
    made_of |= tell_student(student_args.student, config.student_revision)
    return json.loads(json.dumps(made_of))  # as it is read again, without tuples


def try_out(task: OwnTask, run: tuple[Any, ...]) -> None:
    """Make everything as if the teachers had answered, and let it go: what does not fit is refused for nothing."""
    data_args, _, student_args, recipe_args, config = run
    args = copy.copy(config)
    args.seed = args.data_seed = read_seeds(recipe_args.seeds)[0]
    with tempfile.TemporaryDirectory() as args.output_dir:
        args.push_to_hub, args.features_dir = False, None
        pool = with_root(pool_of_nothing(task.data, task.hierarchy, data_args))
        trainer = CoSupervisedTrainer(student_args.student, args, pool=pool, input_column=data_args.input_column)
        if task.test is not None:
            test = with_input(to_measure_on(task.test, task.hierarchy), trainer.input_column)
            read_labels(test, "label", pool.labels)
            check_modality(trainer.processor, test, trainer.input_column, "data to test on hold")
            if not columns_lacking(task):
                pool_of_nothing(task.test, task.hierarchy, data_args)
        del trainer, pool
    gc.collect()  # a trainer is part of circles, and would hold a second student


def train_on_own(run: tuple[Any, ...]) -> None:
    """Do all of it for data of one's own."""
    data_args, teacher_args, student_args, recipe_args, config = run
    if student_args.student is None:
        raise ValueError("A student is needed, got none. Give a folder or Hub id by `--student`.")
    task = open_task(data_args, teacher_args, recipe_args.methods)
    # On sentences, the mean of the tokens tells a frozen encoder's head more than the pooler does, which was trained
    # for another task or for none.
    if config.student_training == "probe" and config.pooling is None and student_args.student not in VECTOR_STUDENTS:
        source = find_model(student_args.student, what="The student", revision=config.student_revision)
        config.pooling = default_pooling(source.config.get("model_type"))
    if any(teacher.model == student_args.student for teacher in task.hierarchy.teachers):
        say(f"The student '{student_args.student}' is one of the teachers: it begins with a fresh head all the same.")
    check_models(task, run)
    folder, seeds, on_first = Path(config.output_dir), read_seeds(recipe_args.seeds), join_processes().on_first
    # By one process for all: gigabytes of weights are read to hash them.
    facts = recipe_arguments_to_dict(run) | {MADE_OF: on_first(lambda: tell_made_of(task, run))}
    if is_new := not on_first(lambda: find_run(folder, facts, recipe_args.resume)):
        try_out(task, run)
    if recipe_args.dry_run:
        tell_plan(task, run)
        return
    facts["hub_model_id"] = open_target(config)
    if is_new:  # nothing that is wrong with the command is found after this, or the right one would be another run
        on_first(lambda: begin_run(folder, facts))
    quiet = bool(config.disable_tqdm)
    pool = label_own(task.data, task.hierarchy, folder / "_run" / "pool", data_args, quiet, task.commit)
    if task.heldout is not None:
        place = folder / "_run" / "heldout_pool"
        pool = calibrated_pool(pool, label_own(task.heldout, task.hierarchy, place, data_args, quiet, task.commit))
    pool = with_root(pool)
    say(f"{len(pool)} examples labelled by {pool.hierarchy!r}")
    test_pool = label_test(task, folder / "_run" / "test_pool", data_args, quiet)
    reports = [train_seed(seed, task, run, pool, test_pool) for seed in seeds]

    def conclude() -> None:
        once = {key: reports[0][key] for key in ("overview", "own_method") if key in reports[0]}
        measured = [{key: value for key, value in report.items() if key not in once} for report in reports]
        report = merge_reports(measured, seeds) | once
        finish(folder, seeds, report, facts, config.changed_arguments())
        say(f"\n{format_overview(report['overview'])}")
        if report["seed_agreement"] is not None:
            why = ": all are made in closed form, which a seed does not change" if is_closed_form(config) else ""
            say(f"students of {len(seeds)} seeds agree on {100 * report['seed_agreement']:.1f}% of the examples{why}")
        if "methods" in report:
            say(f"\n{format_methods(report)}")
        say(f"\nStudent, model card, report.json, labels.parquet and to_label.csv: {folder}")
        if config.push_to_hub:
            story = {name: folder / name for name in STORY_FILES if name != "README.md" and (folder / name).is_file()}
            push = {"revision": config.hub_revision, "token": config.hub_token}
            say(f"Pushed: {push_student(folder, facts['hub_model_id'], story=story, **push)}")

    join_processes().on_first(conclude)


def main() -> None:
    """Run the recipe."""
    run, is_own = parse()
    config = run[4]
    config.device  # noqa: B018  # joins the other processes, on the device that the configuration names
    if config.disable_tqdm:
        transformers_logging.disable_progress_bar()
        disable_progress_bars()
    try:
        (train_on_own if is_own else run_experiment)(run)
    except KeyboardInterrupt:
        say("\nStopped. What is finished is kept: the same command goes on.")
        raise SystemExit(130) from None


def tell_error(error: Exception) -> str | None:
    """The sentence of an error that was raised on purpose; a bug has none, and keeps its traceback."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    own = (Path(__file__).resolve().parent, Path(hf_cosupervise.__file__).resolve().parent)
    # A bug raises where it is: at no `raise`, or in a library.
    is_ours = any(Path(place.filename).resolve().is_relative_to(folder) for folder in own)
    if is_ours and str(place.line).startswith("raise "):
        return str(error)
    # Errors of the Hub's client keep their own sentence, with a note that says what to do; whose model raised a bug is
    # noted too, and is no advice.
    notes = getattr(error, "__notes__", [])
    return "\n".join([str(error), *notes]) if any(not note.startswith(BLAMED) for note in notes) else None


def run_or_tell(run: Callable[[], object]) -> None:
    """Run a recipe, and end it with the sentence of an error that has one."""
    try:
        run()
    except Exception as error:
        # A launcher adds a traceback of its own, but with `--quiet`.
        if (sentence := tell_error(error)) is None:
            raise
        raise SystemExit(sentence) from None


if __name__ == "__main__":
    run_or_tell(main)

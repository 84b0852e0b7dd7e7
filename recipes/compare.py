"""Compare methods on tasks over seeds, and write one table: every cell is trained once and kept.

    python recipes/compare.py                                                  # recipes/compare.yaml, all of it
    python recipes/compare.py --tasks digits --methods generalist csl --seeds 0,1 --num_workers 1

A task is a configuration of `train.py` with changes, a method is one that `evaluation` knows (or
`one_teacher_all_labels`) with changes to `CoSupervisedConfig`. A cell is one method on one task with one seed, a JSON
file: the same command goes on where it was cut off, a cell that failed is tried again, and other settings are refused.
Teachers, pools and features of a task and seed are made once for all methods. Every method is measured against the
ceiling of its own training settings, a cell too. `output_dir` gets `table.md`, `results.csv`, `results.json` and
`figures/`, of what was asked for and is there.

A task may have `seeds` of its own (`--seeds` wins) and the names of the `methods` that run on it. A method with
`calibrated: true`, and the method `boosting`, use the task's `num_heldout_examples`. A text task with `features:
mean_pooled` is a control: the head is trained and tested on the mean over the tokens of the backbone's last hidden
state, which sentence encoders are made for, but which the exported student, an ordinary model, does not compute.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache, cached_property
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import Dataset, concatenate_datasets, disable_progress_bars
from train import RECIPE_TYPES, check_run, find_student, label_data, load_split, make_folder, say
from train_teachers import CONTROL, control_hierarchy, is_on_hub, train_teachers
from transformers import PrinterCallback
from transformers.utils import logging as transformers_logging

from hf_cosupervise import CoSupervisedConfig, CoSupervisedTrainer, PseudolabelPool, TeacherHierarchy
from hf_cosupervise.config import fields_without
from hf_cosupervise.derived_pools import FEATURE_AGGREGATORS, calibrated_pool
from hf_cosupervise.evaluation import (
    METHODS,
    OTHER_METHODS,
    method_arguments,
    method_loss,
    method_pool,
    save_report,
    teacher_accuracies,
    weak_accuracy,
)
from hf_cosupervise.inputs import find_label_column, read_labels
from hf_cosupervise.metrics import (
    agreement,
    deception_score,
    expected_calibration_error,
    group_accuracies,
    mean_and_spread,
    performance_gap_recovered,
    reliability_curve,
)
from hf_cosupervise.plotting import plot_group_shares, plot_levels, plot_pgr, plot_reliability, plot_teacher_shares
from hf_cosupervise.pool import ORACLE_DOMAIN
from hf_cosupervise.script_utils import parse_recipe_args, read_recipe_config, recipe_arguments_to_dict

DEFAULT_PLAN = Path(__file__).parent / "compare.yaml"
BASELINE, CEILING, TEACHERS = "csl", "ceiling", "_teachers"
# The one method that `evaluation` does not know, because it needs a teacher of its own.
ALL_LABELS = "one_teacher_all_labels"
MEAN_POOLED = "mean_pooled"
# What each key of a task or method is.
_KINDS: dict[str, tuple[type, ...]] = {
    "name": (str,), "config": (str,), "method": (str,), "set": (dict,), "tasks": (list,), "methods": (list,),
    "seeds": (str, int), "features": (str,), "calibrated": (bool,),
}  # fmt: skip
# From this probability on a model counts as sure in the deception score.
SURE = 0.75
# Where something runs or is put, and what is run: not how a cell was made.
_NOT_SETTINGS = {"seeds", "methods", "control", "resume"} | fields_without("compare")
# What a cell says of itself, which no number is.
_FACTS = ("task", "method", "seed", "settings")
_LEVEL_NUMBERS = {
    "consistency/keep_rate": "keep_rate",
    "oracle_selection/precision": "kept_precision",
    "oracle_selection/recall": "kept_recall",
    "oracle_pseudolabels/accuracy": "pseudolabel_accuracy",
    "oracle_assignment/accuracy": "assignment_accuracy",
}


# ── what is compared ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Task:
    """A configuration of train.py (its path counts from the YAML file that names it) and what is changed in it."""

    name: str
    config: str
    set: dict = field(default_factory=dict)
    seeds: str | None = None
    methods: list[str] | None = None
    features: str | None = None


@dataclass(frozen=True)
class Method:
    """A method of `evaluation`, or `ALL_LABELS`, with changes to `CoSupervisedConfig`, on all tasks or some."""

    name: str
    method: str
    set: dict = field(default_factory=dict)
    tasks: list[str] | None = None
    calibrated: bool = False


@dataclass
class Plan:
    """Say what is compared; the keys of the YAML file."""

    tasks: list
    methods: list
    seeds: str = "0"
    output_dir: str = "outputs/compare"
    num_workers: int = 1


def parse_plan(argv: Sequence[str] | None) -> Plan:
    """Read the YAML file, and what the command line picks of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=DEFAULT_PLAN, type=Path, help="YAML file with tasks and methods.")
    parser.add_argument("--tasks", nargs="+", help="Only these tasks.")
    parser.add_argument("--methods", nargs="+", help="Only these methods; their ceilings are added.")
    parser.add_argument("--seeds", help="Seeds, separated by commas.")
    parser.add_argument("--output_dir", help="Where cells, tables and figures go.")
    parser.add_argument("--num_workers", type=int, help="Processes side by side, one thread each; 0: in this one.")
    args = parser.parse_args(argv)
    values = read_recipe_config(args.config, [Plan])
    if missing := [name for name in ("tasks", "methods") if not isinstance(values.get(name), list)]:
        raise ValueError(
            f"'{args.config}' must hold lists of `tasks` and `methods`, got {missing} as "
            f"{[values.get(name) for name in missing]}. Add them."
        )
    plan = Plan(**values)
    for name in ("output_dir", "num_workers"):
        setattr(plan, name, getattr(plan, name) if getattr(args, name) is None else getattr(args, name))
    tasks, methods = [_read(Task, facts) for facts in plan.tasks], [_read(Method, facts) for facts in plan.methods]
    _check(tasks, methods)
    for number, task in enumerate(tasks):
        seeds = next(str(value) for value in (args.seeds, task.seeds, plan.seeds) if value is not None)
        tasks[number] = replace(task, config=str(args.config.parent / task.config), seeds=seeds)
    plan.tasks, plan.methods = _pick("tasks", tasks, args.tasks), _pick("methods", methods, args.methods)
    return plan


def _check(tasks: Sequence[Task], methods: Sequence[Method]) -> None:
    for task in tasks:
        names = [method.name for method in methods]
        if task.methods is not None and (unknown := [name for name in task.methods if name not in names]):
            raise ValueError(f"`methods` of task '{task.name}' must be among {names}, got {unknown}.")
        if task.features not in (None, MEAN_POOLED):
            raise ValueError(f"`features` of task '{task.name}' must be '{MEAN_POOLED}', got {task.features!r}.")
    for method in methods:
        if method.method not in (known := [*METHODS, *OTHER_METHODS, ALL_LABELS]):
            raise ValueError(f"`method` of '{method.name}' must be one of {known}, got {method.method!r}.")
        if unknown := sorted(set(method.set) - {item.name for item in fields(CoSupervisedConfig)}):
            raise ValueError(f"`set` of method '{method.name}' must name fields of CoSupervisedConfig, got {unknown}.")


def _read(kind: type, facts: Any) -> Any:
    names = [item.name for item in fields(kind)]
    if not isinstance(facts, dict) or not {names[0], names[1]} <= set(facts) <= set(names):
        raise ValueError(
            f"A {kind.__name__.lower()} has `{names[0]}`, `{names[1]}` and maybe {names[2:]}, got {facts}."
        )
    for name, value in facts.items():
        kinds = _KINDS[name]
        if not isinstance(value, kinds) or name == "seeds" and isinstance(value, bool):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(
                f"`{name}` of {facts['name']!r} must be {wanted}, got {value!r}. Leave it out, or correct it."
            )
    if not re.fullmatch(r"[A-Za-z0-9][\w ,.+=-]*", facts["name"]):  # names are parts of paths
        raise ValueError(f"A name must be letters, digits, spaces and , . + = - _, got {facts['name']!r}.")
    return kind(**facts)


def _pick(what: str, items: list, wanted: Sequence[str] | None) -> list:
    names = [item.name for item in items]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Names of {what} must be unique, got {repeated} more than once.")
    if unknown := sorted(set(wanted or ()) - set(names)):
        raise ValueError(f"`--{what}` must be among {names}, got {unknown}.")
    return [item for item in items if wanted is None or item.name in wanted]


def methods_of(task: Task, methods: Sequence[Method]) -> list[Method]:
    """Give the methods of a task, the ceilings that they are measured against first."""
    own = [method for method in methods if method.tasks is None or task.name in method.tasks]
    own = [method for method in own if task.methods is None or method.name in task.methods]
    known = {method.name: method for method in own if method.method == CEILING}
    for method in own:
        name = ceiling_of(method, own)
        known.setdefault(name, Method(name, CEILING, _ceiling_settings(method)))
    return [*known.values(), *(method for method in own if method.name not in known)]


def ceiling_of(method: Method, methods: Sequence[Method]) -> str:
    """Name the ceiling of the same training settings: one that the plan names, or one of our own."""
    settings = _ceiling_settings(method)
    for other in methods:
        if other.method == CEILING and _ceiling_settings(other) == settings:
            return other.name
    return ", ".join([CEILING, *(f"{key}={_as_name(value)}" for key, value in sorted(settings.items()))])


def _ceiling_settings(method: Method) -> dict[str, Any]:
    return {key: value for key, value in method.set.items() if key not in fields_without("ceiling")}


def _as_name(value: Any) -> str:
    return re.sub(r"[^\w.+-]+", "-", str(value)).strip("-")


def resolve(task: Task, method: Method | None = None) -> tuple[Any, ...]:
    """Give the arguments of train.py for a task, with the changes of task and method."""
    values = read_recipe_config(task.config, RECIPE_TYPES) | task.set | ({} if method is None else method.set)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{task.name}, {method.name if method else 'set'}.yaml")  # errors name it
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return parse_recipe_args(RECIPE_TYPES, ["--config", str(path)])


def settings_of(run: Sequence[Any]) -> dict[str, Any]:
    """Give what is not as by default, so that a field that is new in a later version changes nothing."""
    return {
        key: value for key, value in recipe_arguments_to_dict(run).items()
        if value != _defaults()[key] and key not in _NOT_SETTINGS
    }  # fmt: skip


def cell_settings(task: Task, method: Method) -> dict[str, Any]:
    """Give all that decides a cell, but for its seed."""
    own: dict[str, Any] = {"method": method.method} | ({"calibrated": True} if method.calibrated else {})
    return own | _features_setting(task) | settings_of(resolve(task, method))


def _features_setting(task: Task) -> dict[str, Any]:
    return {} if task.features is None else {"features": task.features}


@cache
def _defaults() -> dict[str, Any]:
    return recipe_arguments_to_dict([kind() for kind in RECIPE_TYPES])


# ── cells ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Group:
    """The cells of one task and seed, which share teachers, pools and features."""

    task: Task
    methods: list[Method]
    seed: int
    output_dir: str

    @property
    def folder(self) -> Path:
        """Teachers, pools and the rest that the task's cells share, laid out as by train.py."""
        return Path(self.output_dir) / "tasks" / self.task.name

    @property
    def run_dir(self) -> Path:
        """What this seed's cells share."""
        return self.folder / "_run" / f"seed-{self.seed}"

    def cell(self, name: str, suffix: str = ".json") -> Path:
        """The file of a cell; its error, and its predictions on the test set, lie beside it."""
        return self.folder / "cells" / f"seed-{self.seed}" / f"{name}{suffix}"

    def read(self, name: str) -> dict[str, Any] | None:
        """A finished cell, None where there is none."""
        path = self.cell(name)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def predictions(self, name: str) -> dict[str, np.ndarray] | None:
        """What a cell predicts on the test set, None where that was not kept."""
        path = self.cell(name, ".npz")
        if not path.is_file():
            return None
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)

    def unfinished(self) -> list[Method]:
        """The methods that are still to be run."""
        return [method for method in self.methods if not self.cell(method.name).is_file()]

    def fail(self, names: Sequence[str], error: str) -> None:
        """Keep an error for the end."""
        for name in names:
            path = self.cell(name, ".error.txt")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(error, encoding="utf-8")


class Bench:
    """Hold what all methods of one task and seed are trained and measured on."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.data_args, teacher_args, student_args, *_ = resolve(group.task)
        self.split = load_split(self.data_args, group.seed)
        self.student = find_student(student_args, self.split, group.run_dir / "student-start", group.seed)
        self.teachers_dir = Path(teacher_args.teachers_dir or group.run_dir / "teachers")
        domain = self.data_args.oracle_domain_column
        self.hierarchy = train_teachers(
            self.split.teachers, self.split.labels, teacher_args, self.teachers_dir, group.seed,
            domain if teacher_args.specialize_by == "domain" else None,
        )  # fmt: skip
        self.pool = self._label(self.split.pool, "pool", self.hierarchy)
        self.test_pool = self._label(self.split.test, "test_pool", self.hierarchy)
        test, labels = self.split.test, self.split.labels
        self.test_labels = read_labels(test, find_label_column(test), labels)
        self.test_groups = {"class": [labels[index] for index in self.test_labels]}
        self.pool_groups = {"class": [labels[index] for index in self.pool.oracle_labels]}
        if domain is not None:
            self.test_groups["domain"] = [str(value) for value in test[domain]]
            self.pool_groups["domain"] = [str(value) for value in self.pool.column(ORACLE_DOMAIN)]

    def _label(self, data: Dataset, name: str, hierarchy: TeacherHierarchy) -> PseudolabelPool:
        commit = self.split.commit if name == "pool" else None
        return label_data(data, hierarchy, self.group.run_dir / name, self.data_args, True, commit)

    @cached_property
    def control_pool(self) -> PseudolabelPool:
        """What one teacher says that saw every label."""
        if not (self.teachers_dir / CONTROL).is_dir():
            raise FileNotFoundError(f"No teacher with all labels at '{self.teachers_dir / CONTROL}'. Leave it out.")
        return self._label(self.split.pool, "control_pool", control_hierarchy(self.hierarchy, self.teachers_dir))

    @cached_property
    def weak_probs(self) -> np.ndarray:
        """The generalist's probabilities on the test set."""
        root = self.hierarchy.level_indices(0)
        rows = np.arange(len(self.test_pool))
        source = root[0] if len(root) == 1 else len(self.hierarchy.teachers)
        return self.test_pool.pseudolabels(np.full(len(rows), source), rows)

    def heldout_pool(self, name: str, hierarchy: TeacherHierarchy) -> PseudolabelPool:
        """What teachers say about labelled examples that nobody else sees."""
        if not len(self.split.heldout):
            raise ValueError(
                f"Task '{self.group.task.name}' has no labelled examples to spare, got `num_heldout_examples` 0. Set "
                "it in the task, or leave this method out."
            )
        return self._label(self.split.heldout, name, hierarchy)

    def make_trainer(self, method: Method, output_dir: Path) -> CoSupervisedTrainer:
        """Give the trainer of a method."""
        *_, recipe_args, args = resolve(self.group.task, method)
        args.seed = args.data_seed = self.group.seed
        args.output_dir, args.push_to_hub, args.disable_tqdm = str(output_dir), False, True
        if self.group.task.features is not None:
            args.features_dir = str(self.group.run_dir / f"features-{self.group.task.features}")
        args.features_dir = args.features_dir or str(self.group.folder / "_run" / "features")
        has_control = method.method == ALL_LABELS
        pool = self.control_pool if has_control else self.pool
        if method.calibrated or recipe_args.calibrate_teachers:
            name = "control_heldout_pool" if has_control else "heldout_pool"
            pool = calibrated_pool(pool, self.heldout_pool(name, pool.hierarchy))
        own_args = method_arguments(args, "generalist" if has_control else method.method, self.hierarchy.num_levels)
        if has_control:
            return self._trainer(own_args, pool)
        needs: dict[str, Any] = {}
        if method.method in FEATURE_AGGREGATORS:
            needs["features"] = self._trainer(own_args, pool).pool_features()
        if method.method == "boosting":
            needs["labelled_pool"] = self.heldout_pool("heldout_pool", self.hierarchy)
        own_pool = method_pool(pool, method.method, **needs)
        return self._trainer(own_args, own_pool, loss_func=method_loss(own_pool, method.method))

    def _trainer(self, args: CoSupervisedConfig, pool: PseudolabelPool, **kwargs: Any) -> CoSupervisedTrainer:
        trainer = CoSupervisedTrainer(self.student, args, pool=pool, **kwargs)
        trainer.pop_callback(PrinterCallback)
        if self.group.task.features == MEAN_POOLED:
            write_mean_pooled(trainer, [self.split.pool, self.split.test])
        return trainer


def write_mean_pooled(trainer: CoSupervisedTrainer, datasets: Sequence[Dataset]) -> None:
    """Write the mean over each text's tokens in place of what the head reads, once and whole."""
    store, column = trainer.feature_store, trainer.input_column
    if any(store.folder.glob("shard-*")):
        return
    data = concatenate_datasets([dataset.select_columns([column]) for dataset in datasets])
    data = data.select(np.argsort([len(text) for text in data[column]], kind="stable"))  # alike ones need no padding

    def batches(size: int = 64) -> Iterator[np.ndarray]:
        for start in range(0, len(data), size):
            inputs = {
                name: value.to(trainer.args.device)
                for name, value in trainer.processor(data[start : start + size][column]).items()
            }
            with torch.no_grad():
                states = store.model.base_model(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"][:, :, None]
            yield ((states * mask).sum(dim=1) / mask.sum(dim=1)).cpu().numpy()

    store.write(data, column, batches())


def run_group(group: Group) -> None:
    """Run what is missing of a group; an error is kept and stops its own cell only."""
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    todo = group.unfinished()
    try:
        bench = Bench(group)
        save_cell(group, TEACHERS, measure_teachers(bench), probs=bench.weak_probs, labels=bench.test_labels)
    except Exception:  # whatever it is, the other cells go on, and the end of the run tells it
        group.fail([method.name for method in todo], traceback.format_exc())
        return
    for method in todo:
        try:
            numbers = run_cell(bench, method)
            say(f"{group.task.name}, seed {group.seed}: {method.name} {100 * numbers['accuracy']:.1f} %")
        except Exception:
            group.fail([method.name], traceback.format_exc())


def run_cell(bench: Bench, method: Method) -> dict[str, Any]:
    """Train and measure one method, and keep the cell."""
    group, work = bench.group, bench.group.run_dir / "work" / method.name
    shutil.rmtree(work, ignore_errors=True)  # of a run that was cut off
    started = time.time()
    trainer = bench.make_trainer(method, work)
    trainer.train()
    runtime = time.time() - started
    numbers, probs = measure(trainer, bench)
    content = {"settings": cell_settings(group.task, method), **numbers, "runtime": runtime}
    kept = {"probs": probs} if method.method == CEILING else {}
    save_cell(group, method.name, content, predicted=probs.argmax(axis=1).astype(np.int32), **kept)
    shutil.rmtree(work, ignore_errors=True)
    return numbers


def save_cell(group: Group, name: str, content: dict[str, Any], **predictions: np.ndarray) -> None:
    """Write a cell, whole or not at all, and before it what it predicts on the test set."""
    group.cell(name).parent.mkdir(parents=True, exist_ok=True)
    np.savez(group.cell(name, ".npz"), **predictions)
    save_report({"task": group.task.name, "method": name, "seed": group.seed, **content}, group.cell(name))
    group.cell(name, ".error.txt").unlink(missing_ok=True)


def run_side_by_side(groups: Sequence[Group], num_workers: int) -> None:
    """Run every group in a process of its own, some at a time, so that one that dies takes no other with it."""
    if num_workers == 0:
        for group in groups:
            run_group(group)
        return
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    context, waiting = multiprocessing.get_context("spawn"), list(groups)
    running: dict[int, tuple[Any, Group]] = {}
    while waiting or running:
        while waiting and len(running) < num_workers:
            process = context.Process(target=run_group, args=(waiting[0],))
            process.start()
            running[process.sentinel] = process, waiting.pop(0)
        for sentinel in connection.wait(list(running)):
            process, group = running.pop(sentinel)
            process.join()
            if process.exitcode:
                left = [method.name for method in group.unfinished()]
                group.fail(left, f"The process ended with exit code {process.exitcode}: was there enough memory?\n")


def check_cells(groups: Sequence[Group]) -> None:
    """Refuse cells of other settings before anything runs, and write down what each task is made of."""
    settings: dict[tuple[str, str], dict[str, Any]] = {}  # the same for all seeds
    for group in groups:
        for method in group.methods:
            key = group.task.name, method.name
            wanted = settings[key] = settings.get(key) or cell_settings(group.task, method)
            found = group.read(method.name)
            known = wanted if found is None else found["settings"]
            if different := sorted(name for name in {*known, *wanted} if known.get(name) != wanted.get(name)):
                changes = ", ".join(f"{name}: {known.get(name)!r} -> {wanted.get(name)!r}" for name in different)
                raise FileExistsError(
                    f"'{group.cell(method.name)}' must be a cell of these settings, got another one ({changes}; a "
                    "field that is missing has its default). Choose another name or `output_dir`, or delete the cell."
                )
    for group in groups:
        check_run(group.folder, _features_setting(group.task) | settings_of(resolve(group.task)[:3]))


def prepare(group: Group) -> bool:
    """Make the folders of data and student that all seeds share, before processes do it side by side."""
    data_args, teacher_args, student_args, _, _ = resolve(group.task)
    place = teacher_args.teachers_dir
    try:
        if place and not is_on_hub(teacher_args) and not Path(place, "hierarchy.yaml").is_file():
            raise ValueError(
                f"`teachers_dir` must hold teachers, got none in '{place}'. Leave it out: each seed trains its own."
            )
        make_folder("prepare", data_args.prepare_dataset, data_args.dataset)
        if student_args.student is not None:
            make_folder("prepare", student_args.prepare_student, student_args.student)
    except Exception:
        group.fail([method.name for method in group.unfinished()], traceback.format_exc())
        return False
    return True


# ── what is measured ────────────────────────────────────────────────────────────────────────────────────────────────


def measure_teachers(bench: Bench) -> dict[str, Any]:
    """Measure the teachers on the test set; calibration is of what they answered."""
    pool, calibration = bench.test_pool, {}
    for name in bench.hierarchy.names:
        answered = pool.answered(name)
        calibration[name] = calibrate(pool.decode(name, np.flatnonzero(answered)), bench.test_labels[answered])
    return {
        "weak_accuracy": weak_accuracy(pool),
        "teachers": {
            name: {"accuracy": value, **calibration[name]} for name, value in teacher_accuracies(pool).items()
        },
    }


def calibrate(probs: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Give calibration error and reliability diagram, nothing where there are no answers."""
    if not len(labels):
        return {}
    curve = {key: values.tolist() for key, values in reliability_curve(probs, labels).items()}
    return {"ece": expected_calibration_error(probs, labels), "reliability": curve}


def predict_probs(trainer: CoSupervisedTrainer, data: Dataset) -> np.ndarray:
    """Give the student's probabilities `(num_examples, num_labels)`."""
    return np.concatenate([log_probs.exp().numpy() for _, log_probs in trainer.predict_log_probs(data)])


def measure(trainer: CoSupervisedTrainer, bench: Bench) -> tuple[dict[str, Any], np.ndarray]:
    """Measure the student of every level on the test set, and the last one in all ways; its probabilities there."""
    labels, levels = bench.test_labels, {}
    for plan in trainer.plans:
        trainer.load_level(plan.level)
        probs = predict_probs(trainer, bench.split.test)
        record = [record for record in trainer.history.records if record["level"] == plan.level][-1]
        levels[str(plan.level)] = {
            "accuracy": float((probs.argmax(axis=1) == labels).mean()),
            **{name: record[key] for key, name in _LEVEL_NUMBERS.items() if key in record},
            **share_out(plan.assigned_teacher, trainer.pool.source_names, bench.pool_groups),
        }
    predicted, taught = probs.argmax(axis=1), plan.labels >= 0
    numbers = {
        "accuracy": float((predicted == labels).mean()),
        **calibrate(probs, labels),
        "agreement_pseudolabels": agreement(trainer.predict_labels(trainer.pool.inputs)[taught], plan.labels[taught]),
        "levels": levels,
    }
    for what, groups in bench.test_groups.items():
        accuracies = group_accuracies(predicted, labels, groups)
        numbers |= {f"worst_{what}_accuracy": min(accuracies.values()), f"{what}_accuracy": accuracies}
    return numbers, probs


def share_out(assigned: np.ndarray, names: Sequence[str], groups: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Give the share of each teacher, and its share of each class and domain; who is given nothing is left out."""
    used = {name: assigned == index for index, name in enumerate(names) if (assigned == index).any()}
    shares: dict[str, Any] = {"teachers": {name: float(own.mean()) for name, own in used.items()}}
    for what, values in groups.items():
        rows = {value: np.asarray(values) == value for value in sorted(set(values))}
        shares[f"teachers_by_{what}"] = {
            value: {name: float(own[here].mean()) for name, own in used.items()} for value, here in rows.items()
        }
    return shares


# ── tables and figures ──────────────────────────────────────────────────────────────────────────────────────────────


def collect(groups: Sequence[Group]) -> dict[str, Any]:
    """Put the cells of one task side by side: every number becomes a list over seeds, None where it is missing."""
    methods = groups[0].methods
    cells = {method.name: [group.read(method.name) for group in groups] for method in methods}
    teachers = [group.read(TEACHERS) or {} for group in groups]
    weak = [facts.get("weak_accuracy") for facts in teachers]
    report: dict[str, Any] = {"seeds": [group.seed for group in groups], "weak_accuracy": weak}
    report |= _features_setting(groups[0].task)
    report["teachers"] = merge([facts.get("teachers", {}) for facts in teachers])
    report["methods"] = {}
    for method in methods:
        if any(own := cells[method.name]):
            ceiling = ceiling_of(method, methods)
            for group, low, cell, top in zip(groups, weak, own, cells[ceiling]):
                add_pgr(low, cell, top)
                if method.method != CEILING and cell is not None and top is not None:
                    add_deception(cell, *(group.predictions(name) for name in (method.name, TEACHERS, ceiling)))
            merged = merge([cell and {k: v for k, v in cell.items() if k not in _FACTS} for cell in own])
            merged["levels"] = [{"level": int(key), **level} for key, level in merged["levels"].items()]
            report["methods"][method.name] = {"method": method.method, **merged}
    report["levels"] = report["methods"].get(BASELINE, {}).get("levels", [])
    return report


def add_pgr(weak: float | None, cell: dict[str, Any] | None, ceiling: Mapping[str, Any] | None) -> None:
    """Compare a student, and that of every level, with the weak teacher and the ceiling, where all are known."""
    for numbers in [] if cell is None else [cell, *cell["levels"].values()]:
        is_known = weak is not None and ceiling is not None
        numbers["pgr"] = (
            performance_gap_recovered(weak, numbers["accuracy"], ceiling["accuracy"]) if is_known else None
        )


def add_deception(cell: dict[str, Any], own: Any, weak: Any, ceiling: Any) -> None:
    """Say which errors the weak teacher hides from a student, where the predictions of all three were kept."""
    if own and weak and ceiling:
        knows = weak["probs"], ceiling["probs"], weak["labels"]
        cell["deception_score"] = deception_score(own["predicted"], *knows, SURE)


def merge(values: list[Any], missing: float | None = None) -> Any:
    """Make one dictionary of lists from a list of dictionaries.

    What one of them lacks is None, but for the share of a teacher that got nothing with that seed: 0.
    """
    if not any(isinstance(value, dict) for value in values):
        return values
    return {
        key: merge(
            [value.get(key, missing) if isinstance(value, dict) else None for value in values],
            0.0 if key.startswith("teachers") else missing,
        )
        for key in dict.fromkeys(key for value in values if isinstance(value, dict) for key in value)
    }


def tidy_rows(report: Mapping[str, Any], task: str) -> Iterator[list[Any]]:
    """Give `task, method, seed, metric, value` of every number; teachers are the method `teachers`."""
    everything = {"teachers": {"weak_accuracy": report["weak_accuracy"], **report["teachers"]}}
    everything |= {
        name: {**numbers, "levels": {f"level-{level['level']}": level for level in numbers["levels"]}}
        for name, numbers in report["methods"].items()
    }
    for method, numbers in everything.items():
        for metric, values in flatten(numbers):
            for seed, value in zip(report["seeds"], values):
                if _known(value):
                    yield [task, method, seed, metric, value]


def flatten(numbers: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, list[Any]]]:
    """Give `path/to/number` and its values over seeds; diagrams are left out."""
    for key, value in numbers.items():
        if isinstance(value, Mapping) and key != "reliability":
            yield from flatten(value, prefix if key == "levels" else f"{prefix}{key}/")
        elif isinstance(value, list):
            yield f"{prefix}{key}", value


def format_table(report: Mapping[str, Any], task: str) -> str:
    """Write the table of one task in Markdown: percent, mean ± standard deviation over seeds."""
    seeds = ", ".join(str(seed) for seed in report["seeds"])
    has_domains = any("worst_domain_accuracy" in numbers for numbers in report["methods"].values())
    heads = ["method", "accuracy", "PGR", f"PGR against {BASELINE}", "seeds won", "worst class"]
    heads += ["worst domain"] * has_domains + ["calibration error", "deception", "time, s"]
    weak = _percent(report["weak_accuracy"]) or "not measured"
    about = f"Seeds {seeds}; weak teacher {weak}. All in percent, but for the time of pool and training; "
    lines = [f"## {task}", "", f"{about}deception counts a model as sure from {100 * SURE:.0f} % on.", ""]
    if "features" in report:
        lines += [
            "A control: the head reads the mean over a text's tokens. The exported student could not be used so.",
            "",
        ]
    lines += [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    base = report["methods"].get(BASELINE, {}).get("pgr", [])
    for name, numbers in report["methods"].items():
        is_rival = name != BASELINE and numbers["method"] != CEILING
        pairs = [(own, other) for own, other in zip(numbers["pgr"], base) if _known(own) and _known(other)]
        against = [own - other for own, other in pairs if is_rival]
        won = f"{sum(value > 1e-9 for value in against)} of {len(against)}" if against else ""  # a tie is no win
        cells = [_percent(numbers["accuracy"]), _percent(numbers["pgr"]), _percent(against, "+"), won]
        keys = ["worst_class_accuracy", *["worst_domain_accuracy"] * has_domains, "ece", "deception_score"]
        cells += [_percent(numbers.get(key, [])) for key in keys]
        lines.append(f"| {name} | {' | '.join(cells)} | {mean_and_spread(numbers['runtime'])[0]:.1f} |")
    return "\n".join(lines) + "\n"


def _known(value: float | None) -> bool:
    return value is not None and value == value


def _percent(values: Sequence[float | None], sign: str = "") -> str:
    known = [value for value in values if _known(value)]
    if not known:
        return ""
    mean, spread = mean_and_spread(known)
    return f"{100 * mean:{sign}.1f}" + (f" ± {100 * spread:.1f}" if len(known) > 1 else "")


def write_results(reports: Mapping[str, Any], folder: Path) -> str:
    """Write tables and figures of what is there; gives the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "method", "seed", "metric", "value"])
        for task, report in reports.items():
            writer.writerows(tidy_rows(report, task))
    save_report(reports, folder / "results.json")
    text = "\n".join(format_table(report, task) for task, report in reports.items())
    (folder / "table.md").write_text(text, encoding="utf-8")
    for task, report in reports.items():
        draw(report, folder / "figures" / task)
    return text


def draw(report: Mapping[str, Any], folder: Path) -> None:
    """Draw what the cells of a task allow."""
    methods = {name: numbers for name, numbers in report["methods"].items() if numbers["method"] != CEILING}
    report = {**report, "methods": methods}
    if any(_known(value) for numbers in methods.values() for value in numbers["pgr"]):
        plot_pgr(report, folder / "pgr.png")
    if any(len(numbers["levels"]) > 1 for numbers in methods.values()):
        plot_levels(report, folder / "levels.png")
    if len(report["levels"]) > 1:
        plot_teacher_shares(report, folder / "teacher_shares.png")
        by = "domain" if "teachers_by_domain" in report["levels"][0] else "class"
        levels = [{**level, "teachers_by_group": level[f"teachers_by_{by}"]} for level in report["levels"]]
        plot_group_shares({"levels": levels}, folder / f"teacher_shares_by_{by}.png")
    curves = {name: facts["reliability"] for name, facts in report["teachers"].items() if "reliability" in facts}
    if BASELINE in methods:
        curves[BASELINE] = methods[BASELINE]["reliability"]
    if curves:
        plot_reliability({name: pool_curves(curve) for name, curve in curves.items()}, folder / "reliability.png")


def pool_curves(curve: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Put the bins of several seeds together, each seed with as much weight as it has examples there."""
    seeds = [seed for seed, counts in enumerate(curve["count"]) if counts is not None]
    counts = np.array([curve["count"][seed] for seed in seeds], dtype=float)
    total, pooled = counts.sum(axis=0), {"count": counts.sum(axis=0).astype(int).tolist()}
    for key in ("confidence", "accuracy"):
        values = np.array([curve[key][seed] for seed in seeds], dtype=float)  # None becomes NaN
        pooled[key] = (np.nansum(values * counts, axis=0) / np.where(total, total, np.nan)).tolist()
    return pooled


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, and write tables and figures; 1 where a cell failed."""
    plan, started = parse_plan(argv), time.time()
    groups = [
        Group(task, methods_of(task, plan.methods), int(seed), plan.output_dir)
        for task in plan.tasks
        for seed in task.seeds.split(",")
    ]
    check_cells(groups)
    num_missing = count_unfinished(groups)
    todo = [group for group in groups if group.unfinished()]
    run_side_by_side([group for group in todo if prepare(group)], plan.num_workers)
    by_task = {task.name: [group for group in groups if group.task.name == task.name] for task in plan.tasks}
    reports = {name: collect(own) for name, own in by_task.items()}
    say(f"\n{write_results(reports, Path(plan.output_dir))}")
    num_run = num_missing - count_unfinished(groups)
    num_cells = sum(len(group.methods) for group in groups)
    say(f"{num_run} of {num_cells} cells run in {(time.time() - started) / 60:.1f} min.")
    return say_failures(groups)


def count_unfinished(groups: Sequence[Group]) -> int:
    """Count the cells that are still to be run."""
    return sum(len(group.unfinished()) for group in groups)


def say_failures(groups: Sequence[Group]) -> int:
    """Tell which cells failed, those with one cause together; 1 where there are any."""
    failed: dict[tuple[str, int, str], list[Path]] = {}
    for group in groups:
        for method in group.unfinished():
            path = group.cell(method.name, ".error.txt")
            *_, cause = path.read_text(encoding="utf-8").strip().splitlines() if path.is_file() else ["not run"]
            failed.setdefault((group.task.name, group.seed, cause), []).append(path)
    for (task, seed, cause), paths in failed.items():
        names = "; ".join(path.name.removesuffix(".error.txt") for path in paths)
        say(f"Failed: {task}, seed {seed}: {names}: {cause} ({paths[0]})")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

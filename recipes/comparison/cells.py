"""Cells of the comparison: each is trained once, measured and kept."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets, disable_progress_bars
from task import check_run, find_student, label_data, load_split, make_folder, say
from train_teachers import CONTROL, control_hierarchy, is_on_hub, train_teachers
from transformers.utils import logging as transformers_logging

from comparison.plan import (
    ALL_LABELS,
    CEILING,
    MEAN_POOLED,
    TEACHERS,
    Method,
    Task,
    cell_settings,
    features_setting,
    resolve,
    settings_of,
)
from hf_cosupervise import CoSupervisedConfig, CoSupervisedTrainer, PseudolabelPool, TeacherHierarchy
from hf_cosupervise.data.columns import find_label_column, read_labels
from hf_cosupervise.evaluation.comparison import Comparison, Contestant, walk_levels
from hf_cosupervise.evaluation.methods import method_arguments, teacher_accuracies, weak_accuracy, weak_probs
from hf_cosupervise.evaluation.report import ResultFolder, say_metric
from hf_cosupervise.method.metrics import (
    accuracy,
    expected_calibration_error,
    group_accuracies,
    measure_labels,
    reliability_curve,
)
from hf_cosupervise.pool.derived import calibrated_pool
from hf_cosupervise.pool.pseudolabels import ORACLE_DOMAIN

_LEVEL_NUMBERS = {
    "consistency/keep_rate": "keep_rate",
    "oracle_selection/precision": "kept_precision",
    "oracle_selection/recall": "kept_recall",
    "oracle_pseudolabels/accuracy": "pseudolabel_accuracy",
    "oracle_assignment/accuracy": "assignment_accuracy",
}


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

    @property
    def results(self) -> ResultFolder:
        """The cells; the error of one, and its predictions on the test set, lie beside it."""
        return ResultFolder(self.folder / "cells" / f"seed-{self.seed}")

    def unfinished(self) -> list[Method]:
        """The methods that are still to be run."""
        return [method for method in self.methods if not self.results.path(method.name).is_file()]

    def fail(self, names: Sequence[str], error: str) -> None:
        """Keep an error for the end."""
        for name in names:
            self.results.fail(name, error)

    def header(self, name: str) -> dict[str, Any]:
        """What a cell says of itself."""
        return {"task": self.task.name, "method": name, "seed": self.seed}


class Bench(Comparison):
    """Hold what all methods of one task and seed are trained and measured on."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.data_args, teacher_args, student_args, _, args = resolve(group.task)
        self.metric = args.metric
        self.split = load_split(self.data_args, group.seed)
        student = find_student(student_args, self.split, group.run_dir / "student-start", group.seed)
        super().__init__(student, self.split.test, results=group.results)
        self.teachers_dir = Path(teacher_args.teachers_dir or group.run_dir / "teachers")
        domain = self.data_args.oracle_domain_column
        self.hierarchy = train_teachers(
            self.split.teachers,
            self.split.labels,
            teacher_args,
            self.teachers_dir,
            group.seed,
            domain if teacher_args.specialize_by == "domain" else None,
        )
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

    def heldout_pool(self, name: str, hierarchy: TeacherHierarchy) -> PseudolabelPool:
        """What teachers say about labelled examples that nobody else sees."""
        if not len(self.split.heldout):
            raise ValueError(
                f"Task '{self.group.task.name}' has no labelled examples to spare, got `num_heldout_examples` 0. Set "
                "it in the task, or leave this method out."
            )
        return self._label(self.split.heldout, name, hierarchy)

    def enter(self, method: Method, output_dir: Path) -> Contestant:
        """Give a method its configuration and pool."""
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
        if has_control:
            own_args = method_arguments(args, "generalist", self.hierarchy.num_levels)
            return Contestant(method.name, method.method, own_args, pool, pool)
        labelled = self.heldout_pool("heldout_pool", self.hierarchy) if method.method == "boosting" else None
        return Contestant.enter(method.name, method.method, args, pool, labelled)

    def new_trainer(self, args: CoSupervisedConfig, pool: PseudolabelPool, **kwargs: Any) -> CoSupervisedTrainer:
        trainer = super().new_trainer(args, pool, **kwargs)
        if self.group.task.features == MEAN_POOLED:
            write_mean_pooled(trainer, [self.split.pool, self.split.test])
        return trainer

    def measure(
        self, contestant: Contestant, trainer: CoSupervisedTrainer
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        method = next(method for method in self.group.methods if method.name == contestant.name)
        numbers, probs = measure(trainer, self)
        header = {**self.group.header(method.name), "settings": cell_settings(self.group.task, method)}
        # What the ceiling is sure of is asked of all others by the deception score.
        kept = {"probs": probs} if method.method == CEILING else {}
        return header | numbers, {"predicted": probs.argmax(axis=1).astype(np.int32), **kept}


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
        facts, probs = group.header(TEACHERS) | measure_teachers(bench), weak_probs(bench.test_pool)
        group.results.save(TEACHERS, facts, probs=probs, labels=bench.test_labels)
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
    work = bench.group.run_dir / "work" / method.name
    shutil.rmtree(work, ignore_errors=True)  # of a run that was cut off
    numbers = bench.run(bench.enter(method, work))
    shutil.rmtree(work, ignore_errors=True)
    return numbers


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
            found = group.results.read(method.name)
            known = wanted if found is None else found["settings"]
            if different := sorted(name for name in {*known, *wanted} if known.get(name) != wanted.get(name)):
                changes = ", ".join(f"{name}: {known.get(name)!r} -> {wanted.get(name)!r}" for name in different)
                raise FileExistsError(
                    f"'{group.results.path(method.name)}' must be a cell of these settings, got another one "
                    f"({changes}; a field that is missing has its default). Choose another name or "
                    "`output_dir`, or delete the cell."
                )
    for group in groups:
        check_run(group.folder, features_setting(group.task) | settings_of(resolve(group.task)[:3]))


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
        **say_metric(bench.metric),
        **{f"weak_{name}": weak_accuracy(pool, name) for name in ("accuracy", bench.metric)},
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
    for plan, record in walk_levels(trainer):
        probs = predict_probs(trainer, bench.split.test)
        levels[str(plan.level)] = {
            **measure_labels(probs.argmax(axis=1), labels, bench.metric),
            **{name: record[key] for key, name in _LEVEL_NUMBERS.items() if key in record},
            **share_out(plan.assigned_teacher, trainer.pool.source_names, bench.pool_groups),
        }
    if not trainer.plans:  # a committee has no levels, and no pseudolabels of its own
        probs = predict_probs(trainer, bench.split.test)
    predicted = probs.argmax(axis=1)
    numbers = {
        **measure_labels(predicted, labels, bench.metric),
        **calibrate(probs, labels),
        "levels": levels,
    }
    if trainer.plans:
        taught = (wanted := trainer.plans[-1].labels) >= 0
        own = trainer.predict_labels(trainer.pool.inputs)[taught]
        numbers["agreement_pseudolabels"] = accuracy(own, wanted[taught])
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

"""Two processes on CPU: the same E-step for equal weights, nearly the same student, and no waiting forever."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import debug_launcher
from datasets import Dataset
from safetensors.torch import load_file
from test_trainer import make_args, make_pool
from transformers import TrainerCallback

from hf_cosupervise import CoSupervisedTrainer, processes
from hf_cosupervise.students.features import FeatureStore
from hf_cosupervise.training.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


class Stop(Exception):
    """Stands for a crash of all processes."""


class At(TrainerCallback):
    """Does something in each process after a step of a level, and counts the levels that begin."""

    def __init__(self, level: int, step: int, act: Any) -> None:
        self.level, self.step, self.act, self.begun = level, step, act, list[int]()

    def on_level_begin(self, args, state, control, plan, **kwargs):
        self.begun.append(plan.level)

    def on_step_end(self, args, state, control, **kwargs):
        if self.begun and (self.begun[-1], state.global_step) == (self.level, self.step):
            self.act(args)


def raise_stop(args: Any) -> None:
    raise Stop


def run(
    student: str,
    data: Dataset,
    folder: str,
    num_processes: int,
    changes: dict,
    stop: Any = None,
    resume: bool = False,
) -> tuple[CoSupervisedTrainer, At]:
    """Train with the same examples per step in any number of processes; the E-step is cut so that all have some."""
    processes.CHUNK_ROWS = 7
    settings = {"data_seed": 3, "logging_steps": 1} | changes
    args = make_args(Path(folder), per_device_train_batch_size=8 // num_processes, **settings)
    at = At(*(stop or (-1, -1, None)))
    trainer = CoSupervisedTrainer(student, args, pool=make_pool(data), callbacks=[at])
    if args.world_size != num_processes:
        raise RuntimeError(f"{num_processes} processes were wanted, got {args.world_size}.")
    try:
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
    except Stop:
        return trainer, at
    return trainer, at


def run_in_two(*arguments: Any) -> None:
    debug_launcher(run, arguments, num_processes=2)


@pytest.fixture(autouse=True)
def chunks():
    rows = processes.CHUNK_ROWS
    yield
    processes.CHUNK_ROWS = rows


def plan_of(folder: Path, level: int) -> dict[str, np.ndarray]:
    return dict(np.load(folder / "_run" / f"level-{level}" / "plan.npz"))


def history_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "_run" / "history.json").read_text())


def timeless(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "train_runtime"} for record in records]


def assert_same_run(first: Path, second: Path) -> None:
    """To the bit."""
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    for level in range(2):
        own, other = plan_of(first, level), plan_of(second, level)
        assert own.keys() == other.keys() and all(np.array_equal(own[key], other[key]) for key in own)
    assert timeless(history_of(first)["levels"]) == timeless(history_of(second)["levels"])


# ── one process and two ─────────────────────────────────────────────────────────────────────────────────────────────


# 45 examples do not divide evenly: two processes repeat the first ones. A ridge sums in another order.
@pytest.mark.parametrize(
    ("changes", "num_rows", "tolerance"),
    [
        ({}, 48, 1e-5),
        ({"fit_head_on_features": False}, 48, 1e-5),
        ({"student_training": "full"}, 48, 1e-5),
        ({"student_training": "lora"}, 48, 1e-5),
        ({"loss": "early_learning_regularization"}, 48, 1e-5),  # each knows what the other remembers
        ({}, 45, 2e-3),
        ({"fit_head_on_features": False}, 45, 2e-3),
        ({"student_training": "full"}, 45, 2e-3),
        ({"head_solver": "ridge"}, 45, 1e-3),
    ],
    ids=str,
)
def test_two_processes_train_the_student_of_one(tmp_path, tiny_vit, tiny_image_dataset, changes, num_rows, tolerance):
    data = tiny_image_dataset.select(range(num_rows))
    changes = {"optim": "sgd", "learning_rate": 0.05, "rejection": "none", **changes}
    run(tiny_vit, data, str(tmp_path / "one"), 1, changes)
    run_in_two(tiny_vit, data, str(tmp_path / "two"), 2, changes)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        np.testing.assert_allclose(
            one[name].numpy(), two[name].numpy(), atol=tolerance, rtol=1e-4 * (tolerance > 1e-5), err_msg=name
        )
    for level in range(2):
        first, second = plan_of(tmp_path / "one", level), plan_of(tmp_path / "two", level)
        # Both students are equal to a tolerance only, so an example on the edge may go either way.
        for key in first:
            assert (first[key] == second[key]).mean() > 0.95, key
    stories = [history_of(tmp_path / name) for name in ("one", "two")]
    assert [story["run"]["num_processes"] for story in stories] == [1, 2]
    for own, other in zip(*(story["levels"] for story in stories), strict=True):
        assert own["num_steps"] == other["num_steps"] and own.get("head/ridge_alpha") == other.get("head/ridge_alpha")
        assert own["train_loss"] == pytest.approx(other["train_loss"], abs=100 * tolerance)


def test_two_processes_make_the_committee_of_one(tmp_path, tiny_vit, tiny_image_dataset):
    changes = {"optim": "sgd", "learning_rate": 0.05, "rejection": "none", "method": "committee"}
    run(tiny_vit, tiny_image_dataset, str(tmp_path / "one"), 1, changes)
    run_in_two(tiny_vit, tiny_image_dataset, str(tmp_path / "two"), 2, changes)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        np.testing.assert_allclose(one[name].numpy(), two[name].numpy(), atol=2e-3, rtol=1e-3, err_msg=name)
    stories = [history_of(tmp_path / name) for name in ("one", "two")]
    assert stories[0]["run"]["committee"].keys() == stories[1]["run"]["committee"].keys()
    members = [[record["member"] for record in story["levels"]] for story in stories]
    assert members[0] == members[1]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"student_training": "full"},
        {"assignment": "agreement", "agreement_neighbors": 3},
        {"student_training": "lora", "assignment": "agreement", "rejection": ["top_k", "student_entropy"]},
        {"cross_fit_folds": 2, "assignment": "random"},
    ],
    ids=str,
)
def test_equal_weights_choose_the_same_teachers_and_two_go_on_with_the_run_of_one(
    tmp_path, tiny_vit, tiny_image_dataset, changes
):
    changes = {"learning_rate": 1e-2, "rejection_k": 1, **changes}
    run(tiny_vit, tiny_image_dataset, str(tmp_path / "one"), 1, changes)
    shutil.copytree(tmp_path / "one" / "_run", tmp_path / "two" / "_run")
    (tmp_path / "two" / "_run" / "level-1" / "stage.json").unlink()
    stage = tmp_path / "two" / "_run" / "level-0" / "stage.json"
    finished = stage.stat().st_mtime_ns
    run_in_two(tiny_vit, tiny_image_dataset, str(tmp_path / "two"), 2, changes, None, True)
    assert stage.stat().st_mtime_ns == finished
    own, other = plan_of(tmp_path / "one", 1), plan_of(tmp_path / "two", 1)
    assert own.keys() == other.keys() and 0 < own["keep_mask"].mean() < 1
    for key in own:
        np.testing.assert_array_equal(own[key], other[key], err_msg=key)


@pytest.mark.parametrize("fast", [True, False])
def test_two_label_the_same_rows_themselves_as_one(tmp_path, tiny_vit, tiny_image_dataset, fast):
    changes = {"rejection_k": 1, "self_training_rounds": 1, "fit_head_on_features": fast}
    run(tiny_vit, tiny_image_dataset, str(tmp_path / "one"), 1, changes)
    shutil.copytree(tmp_path / "one" / "_run", tmp_path / "two" / "_run")
    (tmp_path / "two" / "_run" / "level-2-round-0" / "stage.json").unlink()
    run_in_two(tiny_vit, tiny_image_dataset, str(tmp_path / "two"), 2, changes, None, True)
    own, other = (dict(np.load(tmp_path / n / "_run" / "level-2-round-0" / "plan.npz")) for n in ("one", "two"))
    assert own.keys() == other.keys() and (own["relabelled"] >= 0).any()
    for key in own:
        np.testing.assert_array_equal(own[key], other[key], err_msg=key)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        np.testing.assert_allclose(one[name].numpy(), two[name].numpy(), atol=1e-3, err_msg=name)
    assert history_of(tmp_path / "one")["run"]["self_training"] == history_of(tmp_path / "two")["run"]["self_training"]


@pytest.mark.parametrize(
    ("changes", "stop"),
    [
        ({}, (1, 1)),
        ({"student_training": "full", "save_strategy": "steps", "save_steps": 2}, (1, 5)),
        ({"student_training": "lora", "lora_dropout": 0.1, "save_strategy": "steps", "save_steps": 2}, (0, 3)),
        ({"fit_head_on_features": False, "save_strategy": "steps", "save_steps": 2, "max_steps": 9}, (1, 8)),
    ],
    ids=str,
)
def test_two_that_are_cut_off_go_on_to_the_same_student(tmp_path, tiny_vit, tiny_image_dataset, changes, stop):
    data = tiny_image_dataset.select(range(45))
    changes = {"learning_rate": 1e-2, **changes}
    run_in_two(tiny_vit, data, str(tmp_path / "whole"), 2, changes)
    run_in_two(tiny_vit, data, str(tmp_path / "cut"), 2, changes, (*stop, raise_stop))
    assert not (tmp_path / "cut" / "_run" / f"level-{stop[0]}" / "stage.json").exists()
    run_in_two(tiny_vit, data, str(tmp_path / "cut"), 2, changes, None, True)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut" / "_run").rglob("*") if path.is_file()}
    run_in_two(tiny_vit, data, str(tmp_path / "cut"), 2, changes, (-1, -1, raise_stop), True)  # it is finished
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut" / "_run").rglob("*") if path.is_file()}
    assert after == before
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    alone, _ = run(tiny_vit, data, str(tmp_path / "cut"), 1, changes, (-1, -1, raise_stop), True)
    assert json.loads(alone.history.to_json()) == history_of(tmp_path / "whole") | {"levels": alone.history.records}


def _tell_refusal(student: str, data: Dataset, folder: str, changes: dict) -> None:
    try:
        run(student, data, folder, 2, changes)
    except FileExistsError as error:
        Path(folder, f"refused-{torch.distributed.get_rank()}").write_text(str(error))


def test_a_second_launch_in_the_same_folder_is_refused(tmp_path, tiny_vit, tiny_image_dataset):
    with RunFolder(tmp_path / "_run").lock():
        debug_launcher(_tell_refusal, (tiny_vit, tiny_image_dataset, str(tmp_path), {}), num_processes=2)
    first, second = ((tmp_path / f"refused-{rank}").read_text() for rank in range(2))
    assert first == second and "another that works in" in first
    run_in_two(tiny_vit, tiny_image_dataset, str(tmp_path), 2, {})


def _see_otherwise(student: str, data: Dataset, folder: str) -> None:
    """The second process looks at a folder of its own, as where disks are not shared."""
    args = make_args(Path(folder), per_device_train_batch_size=4)
    trainer = CoSupervisedTrainer(student, args, pool=make_pool(data))
    if args.process_index == 1:
        trainer.run.folder = RunFolder(Path(folder, "elsewhere"))
    try:
        trainer.train(resume_from_checkpoint=True)
    except FileNotFoundError as error:
        Path(folder, f"told-{args.process_index}").write_text(str(error))


def test_processes_that_see_different_disks_are_told(tmp_path, tiny_vit, tiny_image_dataset):
    run_in_two(tiny_vit, tiny_image_dataset, str(tmp_path), 2, {"data_seed": None, "logging_steps": 2})
    debug_launcher(_see_otherwise, (tiny_vit, tiny_image_dataset, str(tmp_path)), num_processes=2)
    for rank in range(2):
        assert "must see the same levels" in (tmp_path / f"told-{rank}").read_text()
        assert "got [2, 0] finished ones" in (tmp_path / f"told-{rank}").read_text()


def _log_alone(student: str, data: Dataset, folder: str) -> None:
    trainer, _ = run(student, data, folder, 2, {})
    if trainer.is_world_process_zero():
        trainer.log({"mine": 1.0})


def test_one_process_may_log_alone(tmp_path, tiny_vit, tiny_image_dataset):
    debug_launcher(_log_alone, (tiny_vit, tiny_image_dataset, str(tmp_path)), num_processes=2)


def _fill_the_disk(student: str, data: Dataset, folder: str) -> None:
    replace = os.replace

    def full(source, target):
        if str(target).endswith("level-1/plan.npz"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    os.replace = full
    try:
        run(student, data, folder, 2, {})
    except OSError as error:
        Path(folder, f"told-{torch.distributed.get_rank()}").write_text(str(error))


def test_both_processes_learn_that_the_disk_is_full(tmp_path, tiny_vit, tiny_image_dataset):
    debug_launcher(_fill_the_disk, (tiny_vit, tiny_image_dataset, str(tmp_path)), num_processes=2)
    first, second = ((tmp_path / f"told-{rank}").read_text() for rank in range(2))
    assert first == second and "Free some space and call `train(resume_from_checkpoint=True)`" in first
    run_in_two(tiny_vit, tiny_image_dataset, str(tmp_path), 2, {}, None, True)


# ── one of the two dies ─────────────────────────────────────────────────────────────────────────────────────────────


class Die:
    """Kills one process, and notes when."""

    def __init__(self, rank: int, note: str) -> None:
        self.rank, self.note = rank, note

    def __call__(self, args: Any) -> None:
        if args.process_index == self.rank:
            Path(self.note).write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)


SCRIPT = """
import sys
from pathlib import Path

sys.path[:0] = [{tests!r}, {tests!r} + "/training"]
from datasets import load_from_disk
from hf_cosupervise.students.features import FeatureStore
from test_distributed import Die, die_in_features, run

student, data, folder, place, rank = sys.argv[1:]
die = Die(int(rank), folder + "/died")
Path(folder).mkdir(exist_ok=True)
if place == "features":
    die_in_features(die)
run(student, load_from_disk(data), folder, 2, {changes!r}, (1, 3, die) if place == "level" else None)
"""


def die_in_features(die: Die) -> None:
    forward = FeatureStore._forward

    def dying(self, *arguments):
        for number, batch in enumerate(forward(self, *arguments)):
            yield batch
            if number == 1:
                die(type("Args", (), {"process_index": int(os.environ["RANK"])}))

    FeatureStore._forward = dying


@pytest.mark.parametrize(("place", "rank"), [("level", 1), ("level", 0), ("features", 1)])
def test_a_process_that_dies_ends_the_launch_and_a_later_one_goes_on(
    tmp_path, tiny_vit, tiny_image_dataset, place, rank
):
    changes = {"learning_rate": 1e-2, "per_device_eval_batch_size": 4}
    if place == "level":
        changes |= {"student_training": "full", "save_strategy": "steps", "save_steps": 2}
    tiny_image_dataset.save_to_disk(tmp_path / "data")
    run_in_two(tiny_vit, tiny_image_dataset, str(tmp_path / "whole"), 2, changes)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(ROOT / "tests"), changes=changes))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(
        [*command, tiny_vit, str(tmp_path / "data"), str(tmp_path / "cut"), place, str(rank)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0 and "Signal 9 (SIGKILL)" in done.stderr, done.stderr[-3000:]
    assert time.time() - float((tmp_path / "cut" / "died").read_text()) < 60
    run_in_two(tiny_vit, tiny_image_dataset, str(tmp_path / "cut"), 2, changes, None, True)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


# ── the recipe ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_recipe_in_two_processes_makes_one_report_one_model_and_one_card(tmp_path):
    """PGR within 10 points of one process: pre-training and teachers are the same, and steps have equal examples."""
    settings = yaml.safe_load((ROOT / "recipes" / "configs" / "digits_trees.yaml").read_text(encoding="utf-8"))
    settings["pretrain_kwargs"]["steps"] = 60
    settings |= {"num_train_epochs": 10, "seeds": "0", "methods": ["csl", "ceiling"]}
    reports = []
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        settings["per_device_train_batch_size"] = 8 // number
        (folder / "trees.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        command = [sys.executable]
        if number > 1:
            command += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(number)]
            command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        done = subprocess.run(
            [*command, str(ROOT / "recipes" / "train.py"), "--config", "trees.yaml"],
            cwd=folder,
            text=True,
            capture_output=True,
            timeout=600,
            env=os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "CI": "true"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("Student, report.json, figures and model card") == 1
        output = folder / "outputs" / "digits_trees"
        assert [len(list(output.glob(name))) for name in ("report.json", "*.safetensors", "README.md")] == [1, 1, 1]
        assert json.loads((output / "history.json").read_text())["run"]["num_processes"] == number
        reports.append(json.loads((output / "report.json").read_text()))
    one, two = reports
    assert one["weak_accuracy"] == two["weak_accuracy"] and one["teachers"] == two["teachers"]
    for name in one["methods"]:
        assert one["methods"][name]["accuracy"] == pytest.approx(two["methods"][name]["accuracy"], abs=0.02)
    assert one["methods"]["csl"]["pgr"] == pytest.approx(two["methods"]["csl"]["pgr"], abs=0.1)

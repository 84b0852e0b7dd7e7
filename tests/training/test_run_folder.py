"""A run that is cut off anywhere goes on as if nothing had happened."""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import save_tiny_vit
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file
from test_faults import fill, small_disk
from test_trainer import LABELS, make_args, make_pool, weights
from transformers import (
    BertTokenizerFast,
    Dinov2Config,
    Dinov2ForImageClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    TrainerCallback,
    ViTImageProcessor,
)

from hf_cosupervise import CoSupervisedTrainer
from hf_cosupervise.training import checkpointing, level_loss, run_folder
from hf_cosupervise.training.checkpointing import last_checkpoint
from hf_cosupervise.training.run_folder import RunFolder


class Stop(Exception):
    """Stands for a crash."""


class StopAt(TrainerCallback):
    """Cuts a run off after a step of a level."""

    def __init__(self, level: int, step: int) -> None:
        self.level, self.step, self.now = level, step, -1

    def on_level_begin(self, args, state, control, plan, **kwargs):
        self.now = plan.level

    def on_step_end(self, args, state, control, **kwargs):
        if (self.now, state.global_step) == (self.level, self.step):
            raise Stop


def save_dinov2(folder: Path) -> str:
    torch.manual_seed(0)
    config = Dinov2Config(
        image_size=16,
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2,
        num_labels=4,
        id2label=dict(enumerate(LABELS)),
        label2id={name: i for i, name in enumerate(LABELS)},
    )
    Dinov2ForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


def save_distilbert(folder: Path, bert: str) -> str:
    torch.manual_seed(0)
    tokenizer = BertTokenizerFast.from_pretrained(bert)
    config = DistilBertConfig(
        vocab_size=len(tokenizer),
        dim=16,
        n_layers=2,
        n_heads=2,
        hidden_dim=32,
        max_position_embeddings=32,
        num_labels=4,
        id2label=dict(enumerate(LABELS)),
        label2id={name: i for i, name in enumerate(LABELS)},
    )
    DistilBertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def students(tiny_folder, tiny_vit, tiny_timm, tiny_bert) -> dict[str, str]:
    return {
        "vit": tiny_vit,
        "timm": tiny_timm,
        "bert": tiny_bert,
        "dinov2": save_dinov2(tiny_folder / "dinov2"),
        "distilbert": save_distilbert(tiny_folder / "distilbert", tiny_bert),
    }


def assert_same_student(first: CoSupervisedTrainer, second: CoSupervisedTrainer) -> None:
    own, other = weights(first), weights(second)
    assert own.keys() == other.keys()
    for name, value in own.items():
        assert torch.equal(value, other[name]), name


def assert_same_story(first: CoSupervisedTrainer, second: CoSupervisedTrainer) -> None:
    """All that was told but for times."""

    def told(trainer):
        return [
            {key: value for key, value in entry.items() if "runtime" not in key and "per_second" not in key}
            for entry in trainer.state.log_history
        ]

    def levels(trainer):
        return [{k: v for k, v in record.items() if k != "train_runtime"} for record in trainer.history.records]

    assert told(first)[:-1] == told(second)[:-1]  # the last sums up one call of `train`
    assert levels(first) == levels(second) and first.state.global_step == second.state.global_step
    for plan, other in zip(first.plans, second.plans, strict=True):
        np.testing.assert_array_equal(plan.assigned_teacher, other.assigned_teacher)
        np.testing.assert_array_equal(plan.keep_mask, other.keep_mask)


def run(folder, student, data, changes=None, *, stop=None, resume=False, **arguments) -> CoSupervisedTrainer:
    args = make_args(folder, **{"learning_rate": 1e-2, "logging_steps": 1} | (changes or {}))
    callbacks = [] if stop is None else [StopAt(*stop)]
    trainer = CoSupervisedTrainer(student, args, pool=make_pool(data), callbacks=callbacks, **arguments)
    if stop is None:
        trainer.train(resume_from_checkpoint=resume)
    else:
        with pytest.raises(Stop):
            trainer.train(resume_from_checkpoint=resume)
    return trainer


# ── interrupted and gone on with is uninterrupted, bit for bit ──────────────────────────────────────────────────────

CASES = [
    *((name, training) for name in ("vit", "timm", "bert", "dinov2", "distilbert") for training in ("lora", "full")),
    *((name, "probe") for name in ("vit", "timm", "bert", "dinov2", "distilbert")),
]


@pytest.mark.core
@pytest.mark.parametrize("student, training", CASES)
def test_inside_and_between_levels(tmp_path, students, student, training, tiny_image_dataset, tiny_text_dataset):
    data = tiny_text_dataset if "bert" in student else tiny_image_dataset
    changes = {"student_training": training, "save_strategy": "steps", "save_steps": 2, "lora_dropout": 0.1}
    whole = run(tmp_path / "whole", students[student], data, changes)
    for stop in ((0, 3), (1, 5)):  # after checkpoint-2 of the first level, and after checkpoint-4 of the second
        run(tmp_path / "cut", students[student], data, changes, stop=stop, resume=True)
        level, step = stop
        found = last_checkpoint(tmp_path / "cut" / "_run" / f"level-{level}")
        assert found is not None and found.name == f"checkpoint-{step - 1}"
    again = run(tmp_path / "cut", students[student], data, changes, resume=True)
    assert_same_student(again, whole)
    assert_same_story(again, whole)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_vit, tiny_image_dataset) -> Callable[[dict[str, Any]], CoSupervisedTrainer]:
    """Runs that were never cut off, one for each change."""
    known: dict[str, CoSupervisedTrainer] = {}

    def find(changes: dict[str, Any]) -> CoSupervisedTrainer:
        if str(changes) not in known:
            known[str(changes)] = run(tmp_path_factory.mktemp("whole"), tiny_vit, tiny_image_dataset, changes)
        return known[str(changes)]

    return find


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rounds_per_level": 2},
        {"warm_start": True},
        {"head_solver": "ridge"},
        {"head_solver": "ridge", "ridge_alpha": 0.1, "cross_fit_folds": 2},
        {"head_solver": "ridge", "cross_fit_folds": 2},
        {"cross_fit_folds": 2},
        {"agreement_neighbors": 3, "assignment": "agreement"},
        {"loss": "early_learning_regularization"},
        {"relabel_above": 0.3, "rejection_k": 1},
        {"teacher_neighbors": 3},
        {"save_strategy": "steps", "save_steps": 2, "rounds_per_level": 2, "gradient_accumulation_steps": 2},
        {"save_strategy": "steps", "save_steps": 2, "warm_start": True, "num_train_epochs": 1.5, "max_steps": -1},
        {"save_strategy": "steps", "save_steps": 2, "loss": "early_learning_regularization"},
    ],
    ids=str,
)
@pytest.mark.parametrize("stop", [(0, 1), (1, 1), (1, 5)])
def test_with_every_option(tmp_path, tiny_vit, tiny_image_dataset, uninterrupted, changes, stop):
    if changes.get("head_solver") == "ridge" and stop[1] > 1:
        pytest.skip("a closed form has one step")
    whole = uninterrupted(changes)
    run(tmp_path / "cut", tiny_vit, tiny_image_dataset, changes, stop=stop)
    again = run(tmp_path / "cut", tiny_vit, tiny_image_dataset, changes, resume=True)
    assert_same_student(again, whole)
    assert_same_story(again, whole)


def test_what_is_finished_is_not_done_again(tmp_path, tiny_vit, tiny_image_dataset):
    class Count(TrainerCallback):
        def __init__(self):
            self.stages = []

        def on_level_begin(self, args, state, control, plan, **kwargs):
            self.stages.append((plan.level, plan.round))

    changes = {"rounds_per_level": 3}
    count = Count()

    class StopInRound(TrainerCallback):
        def on_level_begin(self, args, state, control, plan, **kwargs):
            if (plan.level, plan.round) == (1, 1):
                raise Stop

    args = make_args(tmp_path / "cut", **changes)
    trainer = CoSupervisedTrainer(tiny_vit, args, pool=make_pool(tiny_image_dataset), callbacks=[StopInRound()])
    with pytest.raises(Stop):
        trainer.train()
    args = make_args(tmp_path / "cut", **changes)
    again = CoSupervisedTrainer(tiny_vit, args, pool=make_pool(tiny_image_dataset), callbacks=[count])
    again.train(resume_from_checkpoint=True)
    assert count.stages == [(1, 1), (1, 2)]
    count.stages = []
    done = CoSupervisedTrainer(tiny_vit, args, pool=make_pool(tiny_image_dataset), callbacks=[count])
    assert done.train(resume_from_checkpoint=True).global_step == 24 and count.stages == []
    assert_same_student(done, again)


def test_nothing_to_go_on_with_is_a_beginning(tmp_path, tiny_vit, tiny_image_dataset):
    whole = run(tmp_path / "whole", tiny_vit, tiny_image_dataset)
    assert_same_student(run(tmp_path / "new", tiny_vit, tiny_image_dataset, resume=True), whole)


# ── which run it is ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "changes, seed, found",
    [
        ({"learning_rate": 2e-2}, 0, r"learning_rate: 0\.01 -> 0\.02"),
        ({"seed": 7}, 0, r"data_seed: 42 -> 7; seed: 42 -> 7; student: '\w+' -> '\w+'"),
        ({"rejection": "none"}, 0, r"rejection: None -> \['none'\]"),
        ({}, 1, r"pool: '\w+' -> '\w+'"),
    ],
)
def test_another_run_is_refused_with_what_differs(tmp_path, tiny_vit, tiny_image_dataset, changes, seed, found):
    run(tmp_path, tiny_vit, tiny_image_dataset, stop=(1, 2))
    args = make_args(tmp_path, **{"learning_rate": 1e-2, "logging_steps": 1} | changes)
    trainer = CoSupervisedTrainer(tiny_vit, args, pool=make_pool(tiny_image_dataset, seed=seed))
    with pytest.raises(ValueError, match=rf"begun, got other settings \({found}\)\. Take them back, or choose"):
        trainer.train(resume_from_checkpoint=True)


def test_a_function_of_ones_own_is_part_of_the_run(tmp_path, tiny_vit, tiny_image_dataset):
    def keep(student, labels):
        return torch.ones(len(labels), dtype=torch.bool)

    run(tmp_path, tiny_vit, tiny_image_dataset, stop=(1, 2), keep_func=keep)
    with pytest.raises(ValueError, match=r"\(keep_func: 'keep' -> None\)"):
        run(tmp_path, tiny_vit, tiny_image_dataset, resume=True)


def test_another_student_is_refused(tmp_path, tiny_vit, tiny_folder, tiny_image_dataset):
    run(tmp_path, tiny_vit, tiny_image_dataset, stop=(1, 2))
    other = save_tiny_vit(tiny_folder / "vit-other", LABELS, seed=9)
    with pytest.raises(ValueError, match=r"\(student: '\w+' -> '\w+'\)"):
        run(tmp_path, other, tiny_image_dataset, resume=True)


def test_what_changes_nothing_may_change(tmp_path, tiny_vit, tiny_image_dataset):
    whole = run(tmp_path / "whole", tiny_vit, tiny_image_dataset)
    run(tmp_path / "cut", tiny_vit, tiny_image_dataset, stop=(1, 2))
    changes = {"logging_steps": 3, "dataloader_num_workers": 0, "features_dir": str(tmp_path / "features")}
    assert_same_student(run(tmp_path / "cut", tiny_vit, tiny_image_dataset, changes, resume=True), whole)


def test_other_versions_are_told_and_go_on(tmp_path, tiny_vit, tiny_image_dataset, caplog):
    run(tmp_path, tiny_vit, tiny_image_dataset, stop=(1, 2))
    path = tmp_path / "_run" / "run.json"
    facts = json.loads(path.read_text())
    facts["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(facts))
    with caplog.at_level(logging.WARNING):
        run(tmp_path, tiny_vit, tiny_image_dataset, resume=True)
    assert f"begun with other versions (torch: '1.0' -> {torch.__version__!r})" in caplog.text


# ── what is spoilt ──────────────────────────────────────────────────────────────────────────────────────────────────


def spoil(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(content[:-30])
    elif how == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["truncated", "flipped", "gone"])
@pytest.mark.parametrize("name", ["student.safetensors", "plan.npz", "folds.safetensors", "stage.json"])
def test_a_spoilt_level_is_named_and_trained_again(tmp_path, tiny_vit, tiny_image_dataset, caplog, name, how):
    changes = {"cross_fit_folds": 2}
    whole = run(tmp_path, tiny_vit, tiny_image_dataset, changes)
    spoil(tmp_path / "_run" / "level-0" / name, how)
    with caplog.at_level(logging.WARNING):
        again = run(tmp_path, tiny_vit, tiny_image_dataset, changes, resume=True)
    if not (name == "stage.json" and how == "gone"):
        assert str(tmp_path / "_run" / "level-0" / name) in caplog.text and "trained again" in caplog.text
    assert_same_student(again, whole)


@pytest.mark.parametrize("how", ["truncated", "flipped", "gone"])
def test_a_spoilt_checkpoint_is_named_and_the_one_before_it_is_taken(
    tmp_path, tiny_vit, tiny_image_dataset, caplog, how
):
    changes = {"student_training": "full", "save_strategy": "steps", "save_steps": 1}
    whole = run(tmp_path / "whole", tiny_vit, tiny_image_dataset, changes)
    run(tmp_path / "cut", tiny_vit, tiny_image_dataset, changes, stop=(1, 4))
    folder = tmp_path / "cut" / "_run" / "level-1"
    names = sorted(path.name for path in (folder / "checkpoint-3").iterdir())
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= set(names)
    spoil(folder / "checkpoint-3" / "optimizer.pt", how)
    with caplog.at_level(logging.WARNING):
        assert last_checkpoint(folder).name == "checkpoint-2"
    assert str(folder / "checkpoint-3" / "optimizer.pt") in caplog.text
    (folder / "checkpoint-2" / "digests.json").unlink()  # it was being written
    assert last_checkpoint(folder).name == "checkpoint-1"
    assert_same_student(run(tmp_path / "cut", tiny_vit, tiny_image_dataset, changes, resume=True), whole)


def test_a_checkpoint_after_the_last_step_is_passed_over(tmp_path, tiny_vit, tiny_image_dataset):
    changes = {"student_training": "full", "save_strategy": "steps", "save_steps": 2}

    class StopAtEnd(TrainerCallback):
        def on_level_end(self, args, state, control, **kwargs):
            raise Stop

    whole = run(tmp_path / "whole", tiny_vit, tiny_image_dataset, changes)
    args = make_args(tmp_path / "cut", **{"learning_rate": 1e-2, "logging_steps": 1} | changes)
    trainer = CoSupervisedTrainer(tiny_vit, args, pool=make_pool(tiny_image_dataset), callbacks=[StopAtEnd()])
    with pytest.raises(Stop):
        trainer.train()
    folder = tmp_path / "cut" / "_run" / "level-0"
    assert (folder / "checkpoint-6").is_dir() and last_checkpoint(folder).name == "checkpoint-4"
    again = run(tmp_path / "cut", tiny_vit, tiny_image_dataset, changes, resume=True)
    assert_same_student(again, whole)
    assert_same_story(again, whole)


# ── what goes wrong on the way ──────────────────────────────────────────────────────────────────────────────────────


def test_two_runs_in_one_folder(tmp_path, tiny_vit, tiny_image_dataset):
    with (
        RunFolder(tmp_path / "_run").lock(),
        pytest.raises(FileExistsError, match=r"one run at a time, got another that works in .* now\. Wait for it"),
    ):
        run(tmp_path, tiny_vit, tiny_image_dataset)
    run(tmp_path, tiny_vit, tiny_image_dataset)  # freed


def test_a_folder_that_cannot_be_written(tmp_path, tiny_vit, tiny_image_dataset):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"`output_dir` must be a folder that can be written, got '.*': Not a directory"):
        CoSupervisedTrainer(tiny_vit, make_args(tmp_path / "file" / "out"), pool=make_pool(tiny_image_dataset))


@pytest.mark.parametrize("training", ["probe", "full"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run(tmp_path, tiny_vit, tiny_image_dataset, training, value):
    calls = iter(range(100))

    def loss(logits, targets, rows):
        return (logits * targets).sum(dim=1) * (value if next(calls) == 9 else -1)

    with pytest.raises(FloatingPointError, match=r"got NaN or infinity by step 4 of level 1\. Lower `learning_rate`"):
        run(tmp_path, tiny_vit, tiny_image_dataset, {"student_training": training}, loss_func=loss)
    stages = sorted(path.parent.name for path in (tmp_path / "_run").glob("level-*/stage.json"))
    assert stages == ["level-0"]
    tensors = load_file(tmp_path / "_run" / "level-0" / "student.safetensors")
    assert all(torch.isfinite(value).all() for value in tensors.values())


def test_a_checkpoint_of_a_loss_that_is_no_number_is_not_kept(tmp_path, tiny_vit, tiny_image_dataset):
    calls = iter(range(100))

    def loss(logits, targets, rows):
        return (logits * targets).sum(dim=1) * (float("nan") if next(calls) == 3 else -1)

    changes = {"student_training": "full", "save_strategy": "steps", "save_steps": 2, "logging_steps": 100}
    with pytest.raises(FloatingPointError):
        run(tmp_path, tiny_vit, tiny_image_dataset, changes, loss_func=loss)
    assert [path.name for path in (tmp_path / "_run" / "level-0").glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: not enough memory"),
    ],
)
def test_too_little_memory_is_said_with_what_to_do(tmp_path, tiny_vit, tiny_image_dataset, error):
    def loss(logits, targets, rows):
        raise error

    message = r"Training level 0 needs less memory, got too little for batches of 8\. Use a smaller `per_device_train"
    with pytest.raises(torch.OutOfMemoryError, match=message):
        run(tmp_path, tiny_vit, tiny_image_dataset, loss_func=loss)


def test_other_errors_pass(tmp_path, tiny_vit, tiny_image_dataset):
    def loss(logits, targets, rows):
        raise RuntimeError("my own")

    with pytest.raises(RuntimeError, match="^my own$"):
        run(tmp_path, tiny_vit, tiny_image_dataset, loss_func=loss)


def test_a_clock_that_jumps(tmp_path, tiny_vit, tiny_image_dataset, monkeypatch):
    whole = run(tmp_path / "whole", tiny_vit, tiny_image_dataset)
    real, calls = time.time, iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: real() - 3600.0 * next(calls))
    run(tmp_path / "cut", tiny_vit, tiny_image_dataset, stop=(1, 2))
    assert_same_student(run(tmp_path / "cut", tiny_vit, tiny_image_dataset, resume=True), whole)


# ── a full disk ─────────────────────────────────────────────────────────────────────────────────────────────────────

FULL = OSError(errno.ENOSPC, "No space left on device")
SAFE = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
TORCH = RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 576 vs 534")  # what `torch.save` says


def fill_up(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, error: Exception, ending: str) -> None:
    """Let one function fail wherever it writes a file whose name ends so."""
    own = getattr(place, name)

    def full(*args, **kwargs):
        names = [arg if isinstance(arg, (str, Path)) else getattr(arg, "name", "") for arg in args]
        if any(fnmatch(str(name), f"*{ending}") for name in names):
            raise error
        return own(*args, **kwargs)

    monkeypatch.setattr(place, name, full)


@pytest.mark.parametrize(
    "training, place, name, error, ending",
    [
        ("probe", os, "replace", FULL, "_run/run.json"),
        ("probe", os, "replace", FULL, "_run/history.json"),
        ("probe", run_folder, "save_file", FULL, "level-1/.student-*.safetensors"),
        ("probe", run_folder, "save_file", SAFE, "level-1/.student-*.safetensors"),
        ("probe", np, "savez", FULL, "level-1/.plan-*.npz"),
        ("probe", os, "replace", FULL, "level-1/stage.json"),
        ("lora", checkpointing, "save_file", SAFE, "level-1/checkpoint-2/buffers.safetensors"),
        ("full", torch, "save", TORCH, "level-0/checkpoint-2/optimizer.pt"),
        ("full", torch, "save", TORCH, "level-1/checkpoint-4/rng_state.pth"),
        ("full", os, "replace", FULL, "level-1/checkpoint-4/digests.json"),
    ],
)
def test_a_full_disk_is_told_and_gone_on_from(
    tmp_path, tiny_vit, tiny_image_dataset, monkeypatch, training, place, name, error, ending
):
    changes = {"student_training": training}
    changes |= {} if training == "probe" else {"save_strategy": "steps", "save_steps": 2}
    whole = run(tmp_path / "whole", tiny_vit, tiny_image_dataset, changes)
    message = (
        r"The disk of '.*/cut/_run' must have room .*, got it full: .* Free some space and call `train\(resume_from"
    )
    with monkeypatch.context() as patch, pytest.raises(OSError, match=message) as caught:
        fill_up(patch, place, name, error, ending)
        run(tmp_path / "cut", tiny_vit, tiny_image_dataset, changes)
    assert caught.value.errno == errno.ENOSPC
    assert not list((tmp_path / "cut").rglob(".*-*"))
    for folder in (tmp_path / "cut").rglob("checkpoint-*"):
        assert (folder / "digests.json").is_file(), folder
    again = run(tmp_path / "cut", tiny_vit, tiny_image_dataset, changes, resume=True)
    assert_same_student(again, whole)
    assert_same_story(again, whole)


@pytest.mark.parametrize("training", ["probe", "full"])
def test_a_disk_that_is_really_full(tmp_path, tiny_vit, tiny_image_dataset, training):
    changes = {"student_training": training}
    changes |= {} if training == "probe" else {"save_strategy": "steps", "save_steps": 2}
    whole = run(tmp_path / "whole", tiny_vit, tiny_image_dataset, changes)
    with small_disk(tmp_path / "disk", 2 << 20) as disk:
        folder, told = disk / "out", 0
        for num_free in (0, 8192, 60000, 120000, 250000, 400000):
            args = make_args(folder, **{"learning_rate": 1e-2, "logging_steps": 1} | changes)
            trainer = CoSupervisedTrainer(tiny_vit, args, pool=make_pool(tiny_image_dataset))
            ballast = fill(disk, num_free)
            try:
                trainer.train(resume_from_checkpoint=True)
            except OSError as error:
                assert error.errno == errno.ENOSPC and f"The disk of '{folder / '_run'}" in str(error), error
                told += 1
            ballast.unlink()
            # Features in progress are gone on with; of every other file there is the whole or nothing.
            assert not [path for path in folder.rglob(".*-*") if not path.name.startswith(".partial-")]
        assert told >= (2 if training == "probe" else 4)
        again = run(folder, tiny_vit, tiny_image_dataset, changes, resume=True)
        assert_same_student(again, whole)
        assert_same_story(again, whole)
        ballast = fill(disk, 8192)
        with pytest.raises(OSError, match=r"The disk of '.*/out' must have room .* space and save it again"):
            again.save_model()
        ballast.unlink()
        assert not list(folder.glob("*.safetensors")) and not list(folder.glob("_student-*"))
        again.save_model()


# ── one trainer, several calls ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("changes", [{}, {"student_training": "full", "save_strategy": "steps", "save_steps": 2}])
def test_the_same_trainer_goes_on_after_a_crash(tmp_path, tiny_vit, tiny_image_dataset, changes):
    whole = run(tmp_path / "whole", tiny_vit, tiny_image_dataset, changes)
    again = run(tmp_path / "cut", tiny_vit, tiny_image_dataset, changes, stop=(1, 3))
    again.pop_callback(StopAt)
    again.train(resume_from_checkpoint=True)
    assert_same_student(again, whole)
    assert_same_story(again, whole)


def test_a_run_that_was_refused_is_not_deleted_afterwards(tmp_path, tiny_vit, tiny_image_dataset):
    run(tmp_path, tiny_vit, tiny_image_dataset)
    args = make_args(tmp_path, learning_rate=5e-2)
    trainer = CoSupervisedTrainer(tiny_vit, args, pool=make_pool(tiny_image_dataset))
    with pytest.raises(ValueError, match="other settings"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(FileExistsError, match="must not hold another run"):
        trainer.train()
    assert (tmp_path / "_run" / "level-1" / "stage.json").is_file()


def test_training_anew_leaves_nothing_of_the_run_before(tmp_path, tiny_vit, tiny_image_dataset):
    args = make_args(tmp_path, rounds_per_level=3, learning_rate=1e-2)
    trainer = CoSupervisedTrainer(tiny_vit, args, pool=make_pool(tiny_image_dataset))
    trainer.train()
    trainer.args.rounds_per_level = 2
    trainer.train()
    names = sorted(path.name for path in (tmp_path / "_run").glob("level-*"))
    assert names == ["level-0", "level-1", "level-1-round-0"]
    again = run(tmp_path, tiny_vit, tiny_image_dataset, {"logging_steps": 2, "rounds_per_level": 2}, resume=True)
    assert_same_student(again, trainer)


def test_a_level_that_is_trained_again_takes_those_below_it_along(tmp_path, tiny_vit, tiny_image_dataset):
    changes = {"student_training": "full", "save_strategy": "steps", "save_steps": 2}
    whole = run(tmp_path, tiny_vit, tiny_image_dataset, changes)
    spoil(tmp_path / "_run" / "level-0" / "student.safetensors", "flipped")
    run(tmp_path, tiny_vit, tiny_image_dataset, changes, stop=(1, 1), resume=True)
    assert not (tmp_path / "_run" / "level-1").exists()
    assert_same_student(run(tmp_path, tiny_vit, tiny_image_dataset, changes, resume=True), whole)


@pytest.mark.parametrize("how", ["gone", "truncated", "a list"])
def test_a_spoilt_history_is_written_anew(tmp_path, tiny_vit, tiny_image_dataset, how):
    run(tmp_path, tiny_vit, tiny_image_dataset)
    path = tmp_path / "_run" / "history.json"
    content = path.read_text()
    path.write_text("3") if how == "a list" else spoil(path, how)
    run(tmp_path, tiny_vit, tiny_image_dataset, resume=True)
    assert path.read_text() == content
    path.chmod(0o444)
    (tmp_path / "_run" / "level-1" / "stage.json").chmod(0o444)
    (tmp_path / "_run" / "level-1" / "student.safetensors").unlink()
    run(tmp_path, tiny_vit, tiny_image_dataset, resume=True)
    assert json.loads(path.read_text())["levels"][0] == json.loads(content)["levels"][0]


def test_the_three_verbs_are_a_run_too(tmp_path, tiny_vit, tiny_image_dataset):
    whole = run(tmp_path / "whole", tiny_vit, tiny_image_dataset)
    args = make_args(tmp_path / "verbs", learning_rate=1e-2, logging_steps=1)
    verbs = CoSupervisedTrainer(tiny_vit, args, pool=make_pool(tiny_image_dataset))
    with pytest.raises(ValueError, match=r"Level 1 must follow a finished level 0 of this trainer, got 0 finished"):
        verbs.prepare_level(1)
    plan = verbs.prepare_level(0)
    verbs.train_level(plan)
    verbs.finish_level(plan)
    with pytest.raises(ValueError, match=r"learning_rate: 0\.01 -> 0\.02"):
        run(tmp_path / "verbs", tiny_vit, tiny_image_dataset, {"learning_rate": 2e-2}, resume=True)
    other = CoSupervisedTrainer(tiny_vit, args, pool=make_pool(tiny_image_dataset))
    for verb in (lambda: other.prepare_level(0), lambda: other.train_level(plan)):
        with pytest.raises(FileExistsError, match="must not hold another run"):
            verb()
    again = run(tmp_path / "verbs", tiny_vit, tiny_image_dataset, resume=True)
    assert_same_student(again, whole)
    assert_same_story(again, whole)


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError()])
def test_a_disk_without_locks_can_be_used(tmp_path, tiny_vit, tiny_image_dataset, monkeypatch, error):
    def refuse(self, *args, **kwargs):
        raise error

    monkeypatch.setattr(FileLock, "acquire", refuse)
    run(tmp_path, tiny_vit, tiny_image_dataset)


def test_each_level_is_pushed_once_whatever_its_rounds(hub, tmp_path, tiny_vit, tiny_image_dataset):
    changes = {"rounds_per_level": 2, "push_to_hub": True, "hub_model_id": "someone/rounds"}
    trainer = run(tmp_path, tiny_vit, tiny_image_dataset, changes | {"hub_strategy": "every_save"})
    trainer.save_model()
    titles = [commit.title for commit in hub.commits("someone/rounds")]
    assert titles[:-1] == ["Co-supervised student", "Student of level 0"]


def test_another_number_of_processes_is_told(tmp_path, caplog):
    facts = {"arguments": {"per_device_train_batch_size": 8, "seed": 1}, "num_processes": 1, "examples_per_step": 8}
    folder = RunFolder(tmp_path)
    folder.begin(facts)
    half = {"arguments": {"per_device_train_batch_size": 4, "seed": 1}, "num_processes": 2, "examples_per_step": 8}
    with caplog.at_level(logging.WARNING):
        folder.check(half)  # another share of the same steps
    assert not caplog.text
    with caplog.at_level(logging.WARNING):
        folder.check({**facts, "num_processes": 2, "examples_per_step": 16})
    assert "begun with 8 examples per step in 1 process(es), and goes on with 16 in 2" in caplog.text
    with pytest.raises(ValueError, match=r"\(per_device_train_batch_size: 8 -> 4\)"):
        folder.check({**half, "num_processes": 1, "examples_per_step": 4})


def test_a_checkpoint_of_another_number_of_processes_is_passed_over(tmp_path, tiny_vit, tiny_image_dataset):
    changes = {"student_training": "full", "save_strategy": "steps", "save_steps": 2}
    run(tmp_path, tiny_vit, tiny_image_dataset, changes, stop=(0, 3))
    folder = tmp_path / "_run" / "level-0"
    assert last_checkpoint(folder) == folder / "checkpoint-2" and last_checkpoint(folder, 2) is None


# ── the best checkpoint ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("student, training", CASES)
def test_the_best_checkpoint_of_each_level_comes_back_whole(
    tmp_path, students, student, training, tiny_image_dataset, tiny_text_dataset
):
    data = tiny_text_dataset if "bert" in student else tiny_image_dataset
    scores, seen = iter([0.1, 0.9, 0.2, 0.3] * 2), []

    class Keep(TrainerCallback):
        def on_evaluate(self, args, state, control, model, **kwargs):
            seen.append({name: value.detach().clone() for name, value in model.state_dict().items()})

    args = make_args(
        tmp_path,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        learning_rate=0.05,
        student_training=training,
        rejection="none",
    )
    trainer = CoSupervisedTrainer(
        students[student],
        args,
        eval_dataset=data,
        pool=make_pool(data),
        callbacks=[Keep()],
        compute_metrics=lambda prediction: {"score": next(scores)},
    )
    trainer.train()
    own = weights(trainer)
    moving = {name for name, value in seen[5].items() if not torch.equal(value, seen[7][name])}
    if student == "timm" and training != "probe":
        assert any("running_mean" in name for name in moving)
    assert moving and all(torch.equal(value, own[name]) for name, value in seen[5].items())
    trainer.load_level(0)
    own = weights(trainer)
    assert all(torch.equal(value, own[name]) for name, value in seen[1].items())


# ── precision ───────────────────────────────────────────────────────────────────────────────────────────────────────

HALF = [
    "bf16",
    pytest.param("fp16", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("training", ["probe", "lora", "full"])
@pytest.mark.parametrize("own_loss", [False, True])
def test_losses_and_e_step_are_float32_at_any_precision(
    tmp_path, tiny_vit, tiny_image_dataset, monkeypatch, precision, training, own_loss
):
    seen, layers = {"loss": set(), "e-step": set()}, set()

    def loss(logits, targets, rows):
        seen["loss"] |= {logits.dtype, targets.dtype, (logits @ targets.T).dtype}
        return -(torch.log_softmax(logits, dim=1) * targets).sum(dim=1)

    def assign(student, teachers, answered):
        seen["e-step"] |= {student.dtype, teachers.dtype, (student @ student.T).dtype}
        return torch.zeros(len(student), dtype=torch.long)

    plain = level_loss.pseudolabel_losses
    monkeypatch.setattr(
        level_loss, "pseudolabel_losses", lambda logits, targets: loss(logits, targets["target_probs"], None)
    )
    args = make_args(
        tmp_path,
        student_training=training,
        learning_rate=1e-2,
        logging_steps=1,
        max_steps=3,
        fit_head_on_features=False,
        use_cpu=precision == "bf16",
        **{precision: True},
    )
    arguments = {"loss_func": loss} if own_loss else {}
    trainer = CoSupervisedTrainer(tiny_vit, args, pool=make_pool(tiny_image_dataset), assign_func=assign, **arguments)
    for layer in trainer.model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(lambda module, inputs, output: layers.add(output.dtype))
    trainer.train()
    assert layers == {torch.bfloat16 if precision == "bf16" else torch.float16}
    assert seen == {"loss": {torch.float32}, "e-step": {torch.float32}} and plain is not None
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6 and np.isfinite(losses).all() and trainer.level_loss.total.dtype is torch.float64
    for _, log_probs in trainer.predict_log_probs(trainer.student.examples):
        assert log_probs.dtype is torch.float32 and torch.isfinite(log_probs).all()
    if precision == "bf16":
        assert len({loss for loss in losses if float(torch.tensor(loss).bfloat16()) != loss}) > 0


@pytest.mark.parametrize("precision", HALF)
def test_features_are_made_in_the_precision_that_is_asked_for(tmp_path, tiny_vit, tiny_image_dataset, precision):
    found, layers = {}, set()
    for name in (precision, "whole"):
        half = {} if name == "whole" else {precision: True}
        args = make_args(tmp_path / name, use_cpu=precision == "bf16", **half)
        trainer = CoSupervisedTrainer(tiny_vit, args, pool=make_pool(tiny_image_dataset))
        for layer in [] if name == "whole" else trainer.student.model.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.register_forward_hook(lambda module, inputs, output: layers.add(output.dtype))
        found[name] = trainer.pool_features()
    assert layers == {torch.bfloat16 if precision == "bf16" else torch.float16}
    assert found[precision].dtype is torch.float32 and not torch.equal(*found.values())
    torch.testing.assert_close(*found.values(), rtol=0.1, atol=0.1)


def test_one_example_alone_in_a_batch_of_a_student_with_batch_normalization(tmp_path, tiny_timm, tiny_image_dataset):
    changes = {"student_training": "full", "per_device_train_batch_size": 47}
    message = (
        r"needs batches of at least 2 examples, got one of 1 among the 48 examples that level 0 keeps\. Set `dataload"
    )
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "a", tiny_timm, tiny_image_dataset, changes)
    changes |= {"dataloader_drop_last": True, "rejection": "none"}
    run(tmp_path / "b", tiny_timm, tiny_image_dataset, changes)
    assert (tmp_path / "b" / "_run" / "level-1" / "stage.json").is_file()


def test_features_lie_beside_the_levels(tmp_path, tiny_vit, tiny_image_dataset):
    run(tmp_path, tiny_vit, tiny_image_dataset)
    assert list((tmp_path / "_run" / "features").glob("*/shard-*"))
    assert not list((tmp_path / "_run").glob("level-*/_run"))

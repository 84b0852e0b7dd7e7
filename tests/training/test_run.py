"""A run on disk, without a model or a trainer: stages, resuming, settings, one story."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerState
from transformers.trainer_utils import TrainOutput

from hf_cosupervise import CoSupervisedConfig, PseudolabelPool, Teacher, TeacherHierarchy
from hf_cosupervise.training.checkpointing import seal_checkpoint
from hf_cosupervise.training.plan import LevelPlan
from hf_cosupervise.training.run import TrainingRun, describe_settings

SETTINGS = {"arguments": {"seed": 42}, "pool": "p", "student": "s"}


def make_run(folder: Path, **changes: Any) -> TrainingRun:
    args = CoSupervisedConfig(output_dir=str(folder), use_cpu=True, **changes)
    return TrainingRun(folder / "_run", args, 3, {"student": {}})


def make_plan(level: int, number: int = 0) -> LevelPlan:
    return LevelPlan(level, number, np.array([level, -1]), np.array([0, -1]), np.array([True, False]), {"x": 1.0})


def train(run: TrainingRun, stage: tuple[int, int], steps: int = 5) -> None:
    """What a trainer does between two stages."""
    plan = make_plan(*stage)
    run.begin_stage(plan, True)
    run.record(
        plan, TrainOutput(steps, 0.5 + stage[0], {"train_runtime": 1.0}), TrainerState(epoch=2.0, total_flos=3.0)
    )
    run.save(plan, {"w": torch.full((2,), float(stage[0] + 10 * stage[1]))}, [])


def test_a_run_goes_through_its_stages_and_sums_them_up(tmp_path):
    run, seen = make_run(tmp_path, rounds_per_level=2), []
    with run.open(lambda: SETTINGS, resume=False) as last:
        assert last is None
        for stage in run.unfinished():
            train(run, stage)
            seen.append(stage)
        output = run.close()
    assert seen == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1)]  # the root has nothing to choose again
    assert [run.is_last(make_plan(*stage)) for stage in seen] == [False] * 4 + [True]
    assert output.global_step == 25 and output.training_loss == pytest.approx(np.mean([0.5, 1.5, 1.5, 2.5, 2.5]))
    assert output.metrics["num_levels"] == 3 and output.metrics["total_flos"] == 15
    assert [(record["level"], record["round"], record["num_steps"]) for record in run.history.records] == [
        (*stage, 5) for stage in seen
    ]
    assert run.story.epoch == 10.0 and len(run.plans) == 3
    assert sorted(path.name for path in run.path.glob("level-*")) == [
        "level-0",
        "level-1",
        "level-1-round-0",
        "level-2",
        "level-2-round-0",
    ]
    torch.testing.assert_close(run.load(1).student["w"], torch.full((2,), 11.0))
    with pytest.raises(FileNotFoundError, match="No student of level 3 in"):
        run.load(3)


def test_what_is_finished_is_not_done_again(tmp_path):
    run = make_run(tmp_path)
    with pytest.raises(KeyboardInterrupt), run.open(lambda: SETTINGS, resume=False):
        for stage in run.unfinished():
            if stage == (1, 0):
                raise KeyboardInterrupt
            train(run, stage)
    again = make_run(tmp_path)
    with again.open(lambda: SETTINGS, resume=True) as last:
        assert last.student["w"].tolist() == [0.0, 0.0] and last.plan.level == 0
        assert again.story.global_step == 5 and len(again.plans) == len(again.history.records) == 1
        stages = []
        for stage in again.unfinished():
            train(again, stage)
            stages.append(stage)
        output = again.close()
    assert stages == [(1, 0), (2, 0)]
    assert output.global_step == 15 and output.training_loss == 2.0  # the mean of what was trained now
    with make_run(tmp_path).open(lambda: SETTINGS, resume=True) as last:
        assert last.plan.level == 2


def test_only_the_stage_that_was_cut_off_has_a_checkpoint_to_go_on_from(tmp_path):
    def checkpoint(level: int) -> Path:
        folder = run.stage_dir(level, 0) / "checkpoint-4"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text('{"global_step": 4, "max_steps": 9}')
        seal_checkpoint(folder, {"log_history": [{"loss": 1}], "loss_sums": [2.5], "num_losses": 4})
        return folder

    run = make_run(tmp_path)
    with run.open(lambda: SETTINGS, resume=False):
        train(run, (0, 0))
        folder = checkpoint(1)
    again = make_run(tmp_path)
    with again.open(lambda: SETTINGS, resume=True):
        stages = again.unfinished()
        assert next(stages) == (1, 0)
        assert again.begin_stage(make_plan(1), True) == str(folder)
        assert again.take_up(str(folder)) == (2.5, 4) and again.story.log_history == [{"loss": 1}]
        assert again.begin_stage(make_plan(1), False) is None and not folder.exists()
        train(again, (1, 0))
        folder = checkpoint(2)
        assert next(stages) == (2, 0)
        assert again.begin_stage(make_plan(2), True) is None and not folder.exists()


def test_a_level_that_is_trained_again_makes_those_after_it_void(tmp_path):
    run = make_run(tmp_path)
    with run.open(lambda: SETTINGS, resume=False):
        for stage in run.unfinished():
            train(run, stage)
        train(run, (1, 0))
    assert [plan.level for plan in run.plans] == [0, 1]
    with pytest.raises(FileNotFoundError):
        run.load(2)


def test_a_folder_has_one_run_at_a_time(tmp_path):
    run = make_run(tmp_path)
    with run.open(lambda: SETTINGS, resume=False):
        train(run, (0, 0))
        with pytest.raises(FileExistsError, match="must be used by one run at a time"):
            make_run(tmp_path).open(lambda: SETTINGS, resume=True).__enter__()
    with pytest.raises(FileExistsError, match="must not hold another run, got one in"):
        make_run(tmp_path).open(lambda: SETTINGS, resume=False).__enter__()
    with pytest.raises(FileExistsError, match="must not hold another run, got one in"):
        make_run(tmp_path).claim(lambda: SETTINGS)
    with pytest.raises(ValueError, match=r"got other settings \(seed: 42 -> 43\)"):
        make_run(tmp_path).open(lambda: SETTINGS | {"arguments": {"seed": 43}}, resume=True).__enter__()
    with run.open(lambda: SETTINGS, resume=False) as last:  # its own may begin anew
        assert last is None and not list(run.path.glob("level-*"))


def test_a_notebook_claims_the_folder_once(tmp_path):
    run, asked = make_run(tmp_path), []
    for _ in range(2):
        run.claim(lambda: asked.append(1) or SETTINGS)
    train(run, (0, 0))
    run.claim(lambda: asked.append(1) or SETTINGS)
    assert asked == [1] and (run.path / "run.json").is_file() and run.load(0).plan.level == 0


def test_settings_leave_out_where_a_run_is_and_how_loudly(tmp_path):
    hierarchy = TeacherHierarchy(["a", "b"], [Teacher("root")])
    pool = PseudolabelPool.from_predictions(hierarchy, [1], {"root": np.array([[0.5, 0.5]])})

    def settings(name: str = "x", **changes: Any) -> dict[str, Any]:
        args = CoSupervisedConfig(output_dir=str(tmp_path / name), use_cpu=True, **changes)
        return describe_settings(args, pool, lambda: "s", {"loss_func": "mine"})

    assert settings() == settings("y", logging_steps=3, features_dir="x", per_device_eval_batch_size=3)
    assert settings(rejection_k=1)["arguments"] == {"seed": 42, "data_seed": 42, "rejection_k": 1}
    assert settings()["functions"] == {"loss_func": "mine"} and settings()["examples_per_step"] == 100

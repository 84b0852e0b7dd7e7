"""Trackers hear one story: it begins once and ends once, however many levels there are."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from transformers import DefaultFlowCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler, ProgressCallback

from hf_cosupervise.hierarchy import Teacher, TeacherHierarchy
from hf_cosupervise.pool.pseudolabels import PseudolabelPool
from hf_cosupervise.training.callbacks import LevelCallbackHandler
from hf_cosupervise.training.config import CoSupervisedConfig
from hf_cosupervise.training.history import LevelHistory
from hf_cosupervise.training.plan import LevelPlan
from hf_cosupervise.training.trainer import CoSupervisedTrainer

Event = tuple[str, dict[str, Any]]


class Tracker(TrainerCallback):
    """Writes down what it hears; knows nothing of levels."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.heard.append("train begin")

    def on_train_end(self, args, state, control, **kwargs):
        self.heard.append("train end")

    def on_step_end(self, args, state, control, **kwargs):
        self.heard.append("step")

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.heard.append("log")


class LevelTracker(Tracker):
    """Knows of levels too."""

    def __init__(self) -> None:
        super().__init__()
        self.plans: list[LevelPlan] = []
        self.metrics: list[dict[str, Any]] = []
        self.steps: list[int] = []

    def on_level_begin(self, args, state, control, plan, **kwargs):
        self.heard.append(f"level {plan.level} begin")
        self.plans.append(plan)

    def on_level_end(self, args, state, control, plan, metrics, **kwargs):
        self.heard.append(f"level {plan.level} end")
        assert plan is self.plans[-1]
        self.metrics.append(metrics)
        self.steps.append(state.global_step)


class Bar(ProgressCallback):
    """A progress bar that draws nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.heard.append("train begin")

    def on_train_end(self, args, state, control, **kwargs):
        self.heard.append("train end")

    def on_step_end(self, args, state, control, **kwargs):
        self.heard.append("step")

    def on_log(self, args, state, control, logs=None, **kwargs):
        pass


@pytest.fixture()
def handler() -> LevelCallbackHandler:
    plain = CallbackHandler(
        [DefaultFlowCallback(), Tracker(), LevelTracker(), Bar()], "model", "processor", "optimizer", "schedule"
    )
    plain.eval_dataloader = "loader"
    return LevelCallbackHandler(plain)


def tell(handler: LevelCallbackHandler, event: str, **kwargs: object) -> TrainerControl:
    return handler.call_event(event, None, TrainerState(), TrainerControl(), **kwargs)


def test_everything_is_taken_over(handler):
    found = handler.model, handler.processing_class, handler.optimizer, handler.lr_scheduler, handler.eval_dataloader
    assert found == ("model", "processor", "optimizer", "schedule", "loader")
    assert [type(callback) for callback in handler.callbacks] == [DefaultFlowCallback, Tracker, LevelTracker, Bar]


def test_begin_and_end_reach_whom_they_concern(handler):
    _, tracker, level_tracker, bar = handler.callbacks
    tell(handler, "on_train_begin")
    for level in range(2):
        handler.in_level = True
        plan = LevelPlan(level, 0, np.zeros(1), np.zeros(1), np.ones(1, dtype=bool), {})
        tell(handler, "on_level_begin", plan=plan)
        tell(handler, "on_train_begin")
        # not the first or last of a level only: whatever else happens reaches everybody
        handler.callbacks[0].on_step_end = lambda *args, **kwargs: None
        tell(handler, "on_step_end")
        tell(handler, "on_train_end")
        handler.in_level = False
        tell(handler, "on_level_end", plan=plan, metrics={"loss": 1.0})
    tell(handler, "on_train_end")
    assert tracker.heard == ["train begin", "step", "step", "train end"]
    assert bar.heard == ["train begin", "step", "train end"] * 2
    assert level_tracker.heard == [
        "train begin",
        "level 0 begin",
        "step",
        "level 0 end",
        "level 1 begin",
        "step",
        "level 1 end",
        "train end",
    ]
    assert level_tracker.metrics == [{"loss": 1.0}] * 2


def test_notebook_bars_are_bars_too():
    # by name: the class itself needs IPython
    class NotebookProgressCallback(Bar):
        pass

    class MyBar(NotebookProgressCallback):
        pass

    handler = LevelCallbackHandler(CallbackHandler([DefaultFlowCallback(), MyBar()], None, None, None, None))
    tell(handler, "on_train_begin")
    assert handler.callbacks[1].heard == []
    handler.in_level = True
    tell(handler, "on_train_begin")
    assert handler.callbacks[1].heard == ["train begin"]


@pytest.mark.parametrize("event", ["on_train_begin", "on_level_begin", "on_step_end"])
def test_callbacks_that_fail_are_not_forgotten(event, handler):
    class Broken(LevelTracker):
        pass

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("the tracker's server is gone")

    setattr(Broken, event, fail)
    handler.add_callback(Broken())
    before = list(handler.callbacks)
    handler.callbacks[0].on_step_end = lambda *args, **kwargs: None
    with pytest.raises(RuntimeError, match="server is gone"):
        tell(handler, event, plan=LevelPlan(0, 0, np.zeros(1), np.zeros(1), np.ones(1, dtype=bool), {}))
    assert handler.callbacks == before


@pytest.mark.parametrize("event", ["on_train_begin", "on_level_begin"])
def test_callbacks_may_add_and_remove_callbacks(event, handler):
    # as they may with the plain handler
    class Changing(LevelTracker):
        pass

    class Late(TrainerCallback):
        pass

    def change(self: object, *args: object, **kwargs: object) -> None:
        handler.add_callback(Late())
        handler.remove_callback(Tracker)

    setattr(Changing, event, change)

    handler.add_callback(Changing())
    tell(handler, event, plan=LevelPlan(0, 0, np.zeros(1), np.zeros(1), np.ones(1, dtype=bool), {}))
    kinds = [type(callback) for callback in handler.callbacks]
    assert kinds == [DefaultFlowCallback, LevelTracker, Bar, Changing, Late]


@pytest.mark.parametrize("event", ["on_train_begin", "on_level_end", "on_log"])
def test_what_callbacks_decide_comes_back(event, handler):
    class Stopping(LevelTracker):
        pass

    def stop(self: object, args: object, state: object, control: TrainerControl, **kwargs: object) -> TrainerControl:
        control.should_training_stop = True
        return control

    setattr(Stopping, event, stop)
    handler.callbacks = [Stopping()]
    assert tell(handler, event, plan=None, metrics={}, logs={}).should_training_stop


# ── in a whole training ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def small_pool(tiny_image_dataset: Dataset, tiny_labels: tuple[str, ...]) -> PseudolabelPool:
    truth = np.eye(4)[tiny_image_dataset["label"]]
    hierarchy = TeacherHierarchy(
        tiny_labels,
        [
            Teacher("t/root"),
            Teacher("t/low", level=1, scope=["ant", "bee"]),
            Teacher("t/high", level=1, scope=["cat", "dog"]),
        ],
    )
    predictions = {"root": 0.75 * truth + 0.0625, "low": truth, "high": 0.5 * truth + 0.125}
    return PseudolabelPool.from_predictions(
        hierarchy, range(48), predictions, inputs=tiny_image_dataset.select_columns(["image"])
    )


@pytest.mark.parametrize("on_features", [True, False])
def test_one_story_of_two_levels(on_features, small_pool, tiny_vit, tmp_path):
    tracker, bar = LevelTracker(), Bar()
    args = CoSupervisedConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        max_steps=2,
        per_device_train_batch_size=16,
        logging_steps=1,
        fit_head_on_features=on_features,
        rejection="none",
        disable_tqdm=True,
        rounds_per_level=2,
    )
    trainer = CoSupervisedTrainer(tiny_vit, args, pool=small_pool, callbacks=[tracker, bar])
    trainer.train()
    told = [word for word in tracker.heard if word != "log"]
    level = ["step", "step"]
    assert told == [
        "train begin",
        "level 0 begin",
        *level,
        "level 0 end",
        "level 1 begin",
        *level,
        "level 1 end",
        "level 1 begin",
        *level,
        "level 1 end",
        "train end",
    ]
    assert bar.heard == ["train begin", "step", "step", "train end"] * 3
    assert [(plan.level, plan.round) for plan in tracker.plans] == [(0, 0), (1, 0), (1, 1)]
    assert tracker.steps == [2, 4, 6]  # steps go on counting from level to level
    assert all(metrics["num_steps"] == 2 and np.isfinite(metrics["train_loss"]) for metrics in tracker.metrics)
    assert json.loads((tmp_path / "_run" / "history.json").read_text())["levels"] == tracker.metrics


# ── the file beside it ──────────────────────────────────────────────────────────────────────────────────────────────


def test_history(tmp_path):
    history = LevelHistory(tmp_path / "deep" / "history.json", {"student": {"model": "someone/student"}})
    assert history.read() == {}
    assert history.records == [] and not history.path.exists()
    history.records += [{"level": 0, "round": 0}, {"level": 1, "round": 0, "loss": float("nan")}]
    history.path.parent.mkdir()
    history.path.write_text(history.to_json())
    assert json.loads(history.path.read_text()) == {
        "run": {"student": {"model": "someone/student"}},
        "levels": [{"level": 0, "round": 0}, {"level": 1, "round": 0, "loss": None}],
    }
    again = LevelHistory(history.path)
    assert again.read() == history.run
    assert [record["level"] for record in again.records] == [0, 1]
    history.clear()
    assert history.records == [] and not history.path.exists()
    history.clear()  # nothing there is no error

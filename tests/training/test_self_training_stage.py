"""Self-training after the last level: what nobody labelled is labelled by the student, whatever happens on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_run_folder import Stop, assert_same_story, assert_same_student
from test_trainer import make_args, make_pool
from transformers import TrainerCallback

from hf_cosupervise import CoSupervisedTrainer, PseudolabelPool, TeacherHierarchy
from hf_cosupervise.evaluation.comparison import compare_methods
from hf_cosupervise.training import self_training

pytestmark = pytest.mark.core
MISSING = tuple(range(0, 48, 3))  # rows that nobody answers
ROUNDS = {"self_training_rounds": 3, "learning_rate": 3e-2, "max_steps": 8, "logging_steps": 1}
LOOP = {"fit_head_on_features": False, "save_strategy": "steps", "save_steps": 2}


class StopAt(TrainerCallback):
    """Cuts a run off after a step of a stage."""

    def __init__(self, level: int, round: int, step: int) -> None:
        self.at, self.stage, self.stages = (level, round, step), (-1, -1), list[tuple[int, int]]()

    def on_level_begin(self, args, state, control, plan, **kwargs):
        self.stage = plan.level, plan.round
        self.stages.append(self.stage)

    def on_step_end(self, args, state, control, **kwargs):
        if (*self.stage, state.global_step) == self.at:
            raise Stop


@pytest.fixture
def make(tmp_path, tiny_vit, tiny_image_dataset):
    def make(
        name: str, pool: PseudolabelPool | None = None, callbacks: Any = (), functions: Any = None, **changes: Any
    ):
        args = make_args(tmp_path / name, **ROUNDS | changes)
        pool = make_pool(tiny_image_dataset, missing=MISSING) if pool is None else pool
        return CoSupervisedTrainer(tiny_vit, args, pool=pool, callbacks=list(callbacks), **(functions or {}))

    return make


@pytest.fixture(autouse=True)
def never_settled(monkeypatch):
    """Few examples and steps: whether labels change by so little is a matter of chance."""
    monkeypatch.setattr(self_training, "why_stop", lambda *known: None)


def rounds(trainer: CoSupervisedTrainer) -> list[dict[str, Any]]:
    return [record for record in trainer.history.records if record["level"] == trainer.pool.hierarchy.num_levels]


def test_what_nobody_labelled_is_trained_on_with_the_students_labels(make):
    # All rows are one chunk; of those that are answered, four are rejected, whatever the student says of them.
    rejects = torch.arange(48) % 8 == 1
    trainer, told = make("own", functions={"keep_func": lambda student, labels: ~rejects}), []

    class Look(TrainerCallback):
        def on_level_begin(self, args, state, control, plan, **kwargs):
            if plan.level == 2:
                told.append((plan, trainer.predict_labels(trainer.student.examples), trainer.level_loss))

    trainer.add_callback(Look())
    before = []
    plan_round = trainer.self_training.plan

    def plan(round: int):
        before.append(trainer.predict_labels(trainer.student.examples))
        return plan_round(round)

    trainer.self_training.plan = plan
    trainer.train()
    last = trainer.plans[1]
    left_out = ~last.keep_mask
    assert left_out[list(MISSING)].all() and left_out.sum() > len(MISSING)  # some are rejected
    assert [(each.level, each.round) for each, _, _ in told] == [(2, 0), (2, 1), (2, 2)]
    for number, (each, _, loss) in enumerate(told):
        labels, added = before[2 * number], each.keep_mask & left_out  # asked whether to stop, and then for the plan
        assert each.keep_mask[last.keep_mask].all() and added.any()
        rows = np.flatnonzero(added)
        np.testing.assert_array_equal(loss.pseudolabels(rows), np.eye(4)[labels[rows]])
        kept = np.flatnonzero(last.keep_mask)
        np.testing.assert_array_equal(
            loss.pseudolabels(kept), trainer.pool.pseudolabels(last.assigned_teacher[kept], kept)
        )
        record = rounds(trainer)[number]
        assert record["self_training/num_added"] == added.sum()
        assert record["self_training/num_left_out"] == left_out.sum()
        assert record["consistency/num_kept"] == each.keep_mask.sum()
    assert trainer.history.run["self_training"] == {"num_rounds": 3, "stopped": "all rounds are done"}
    assert trainer.plans[-1].round == 2


@pytest.mark.parametrize("changes", [{}, {**LOOP, "max_steps": 3}, {"head_solver": "ridge"}], ids=str)
def test_added_rows_are_shared_by_second_opinions(make, changes):
    trainer = make("own", **changes)
    asked: list[tuple[np.ndarray, list[Any]]] = []
    plan_round = trainer.self_training.plan

    def plan(round: int):
        asked.append((trainer.predict_labels(trainer.student.examples), list(trainer.student.folds)))
        return plan_round(round)

    trainer.self_training.plan = plan
    trainer.train()
    labels, heads = asked[-1]
    assert len(heads) == (0 if "save_steps" in changes else 2)
    added = trainer.plans[-1].keep_mask & ~trainer.plans[1].keep_mask
    features = trainer.pool_features()
    for head in heads:
        np.testing.assert_array_equal(head(features).argmax(dim=1).numpy()[added], labels[added])
    if not heads:  # the student of the round before is the second opinion
        before = asked[-3][0]
        np.testing.assert_array_equal(before[added], labels[added])
        assert "self_training/agreement" not in rounds(trainer)[0]
    assert 0 <= rounds(trainer)[-1]["self_training/agreement"] <= 1


def test_ground_truth_changes_nothing(make, tiny_image_dataset):
    pool = make_pool(tiny_image_dataset, missing=MISSING)
    blind = PseudolabelPool(pool.hierarchy, pool.teachers, pool.inputs.remove_columns("oracle_label"))
    first, second = make("known", pool), make("blind", blind)
    first.train(), second.train()
    assert_same_student(first, second)
    assert "oracle_self_training/accuracy" in rounds(first)[0]
    assert not any(key.startswith("oracle") for key in rounds(second)[0])


# ── cut off ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "changes, stop",
    [
        ({}, (1, 0, 3)),
        ({}, (2, 0, 5)),
        ({}, (2, 1, 1)),
        ({"head_solver": "ridge"}, (2, 1, 1)),
        ({"cross_fit_folds": 3}, (2, 0, 5)),
        ({"warm_start": True}, (2, 1, 1)),
        ({**LOOP, "max_steps": 3, "self_training_rounds": 2}, (2, 1, 3)),
        pytest.param(
            {"student_training": "full", **LOOP, "max_steps": 3, "self_training_rounds": 2},
            (2, 0, 3),
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_cut_off_and_gone_on_with_is_the_same_student(make, changes, stop):
    whole = make("whole", **changes)
    whole.train()
    with pytest.raises(Stop):
        make("cut", callbacks=[StopAt(*stop)], **changes).train()
    look = StopAt(-1, -1, -1)
    again = make("cut", callbacks=[look], **changes)
    again.train(resume_from_checkpoint=True)
    assert look.stages[0] == stop[:2]
    assert_same_student(again, whole)
    assert_same_story(again, whole)
    assert again.history.run == whole.history.run


def test_what_stopped_by_itself_stays_stopped_and_is_told(make, monkeypatch, tmp_path):
    reasons = iter([None, None, "only 0.1 % of the labels changed"])
    monkeypatch.setattr(self_training, "why_stop", lambda *known: next(reasons))
    trainer = make("own", self_training_rounds=5)
    trainer.train()
    told = {"num_rounds": 2, "stopped": "only 0.1 % of the labels changed"}
    assert len(rounds(trainer)) == 2
    story = json.loads((tmp_path / "own" / "_run" / "history.json").read_text())
    assert story["run"]["self_training"] == told and len(story["levels"]) == 4
    monkeypatch.setattr(self_training, "why_stop", lambda *known: told["stopped"])
    look = StopAt(-1, -1, -1)
    again = make("own", callbacks=[look], self_training_rounds=5)
    again.train(resume_from_checkpoint=True)
    assert look.stages == [] and again.history.run["self_training"] == told
    assert_same_student(again, trainer)
    trainer.load_level(1)
    assert not torch.equal(trainer.student.head.weight, again.student.head.weight)
    trainer.load_level(2)
    assert_same_student(again, trainer)
    trainer.create_model_card()
    card = (tmp_path / "own" / "README.md").read_text()
    assert "2 (only 0.1 % of the labels changed)" in card and card.count("self-training, ") == 2


def test_other_rounds_are_another_run(make):
    make("own").train()
    with pytest.raises(ValueError, match="self_training_rounds: 3 -> 2"):
        make("own", self_training_rounds=2).train(resume_from_checkpoint=True)


# ── nothing to label ────────────────────────────────────────────────────────────────────────────────────────────────


def test_it_is_refused_where_nothing_can_be_left_out(make, tiny_image_dataset):
    whole = make_pool(tiny_image_dataset)
    sentence = (
        r"no teacher answers or that are rejected, got 3 with 48 examples that are all answered, .* Leave it out"
    )
    with pytest.raises(ValueError, match=sentence):
        make("none", whole, rejection="none")
    root = TeacherHierarchy(whole.labels, whole.hierarchy.levels[0])
    with pytest.raises(ValueError, match=sentence):
        make("root", whole.with_hierarchy(root))
    make("none-of-some", rejection="none")  # of which some are not answered
    make("own", whole, rejection="none", functions={"keep_func": lambda student, labels: student[:, 0] < 0})


def test_where_nothing_was_left_out_it_says_so(make, tiny_image_dataset):
    def keep(student, labels):
        return torch.ones(len(labels), dtype=torch.bool)

    trainer = make("all", make_pool(tiny_image_dataset), functions={"keep_func": keep})
    trainer.train()
    reason = "no example was rejected or without an answer"
    assert rounds(trainer) == [] and trainer.history.run["self_training"] == {"num_rounds": 0, "stopped": reason}


# ── several students ────────────────────────────────────────────────────────────────────────────────────────────────


def test_each_member_of_a_committee_labels_for_itself_where_it_can(make, tiny_image_dataset):
    names = ["csl_ridge", "ensemble_ridge"]
    trainer = make("some", method="committee", members=names)
    trainer.train()
    trained = {record["member"] for record in trainer.history.records if record["level"] == 2}
    assert trained == {"csl_ridge"}
    # All teachers as one are a level of their own: its rounds come after level 0.
    assert [r["round"] for r in trainer.history.records if r["member"] == names[1]] == [0, 0, 1, 2]
    whole = make("all", make_pool(tiny_image_dataset), method="committee", members=names)
    whole.train()
    assert [r["level"] for r in whole.history.records if r["member"] == names[1]] == [0]
    assert set(trainer.history.run["self_training"]) == set(names)
    assert set(whole.history.run["self_training"]) == {"csl_ridge"}
    trainer.create_model_card()
    assert "self-training, " in (Path(trainer.args.output_dir) / "README.md").read_text()


def test_methods_beside_it_train_themselves_where_they_can(tmp_path, tiny_vit, tiny_image_dataset):
    pool = make_pool(tiny_image_dataset)
    args = make_args(tmp_path, **ROUNDS | {"learning_rate": 1e-3, "rejection_k": 1})
    methods = ("csl", "generalist", "ceiling")  # only the first has anything to label
    report, trainer = compare_methods(tiny_vit, args, pool, tiny_image_dataset, weak=0.3, methods=methods)
    assert len(rounds(trainer)) == 3 and [level["level"] for level in report["levels"]] == [0, 1]
    assert report["methods"]["csl"]["accuracy"] == trainer.measure_accuracy(tiny_image_dataset)
    with pytest.raises(ValueError, match="`self_training_rounds` is for examples"):
        compare_methods(
            tiny_vit, make_args(tmp_path / "no", **ROUNDS, rejection="none"), pool, tiny_image_dataset, weak=0
        )

"""What a user adds to the method: a loss, an assignment, a rejection, weights, and help for the E-step."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from test_trainer import LABELS, make_args, make_hierarchy, make_pool, weights

from hf_cosupervise import CoSupervisedTrainer, PseudolabelPool
from hf_cosupervise.method.assignment import NOBODY, agreement_scores, choose_lowest
from hf_cosupervise.method.losses import soft_cross_entropy
from hf_cosupervise.method.neighbors import nearest_neighbors
from hf_cosupervise.method.published_losses import generalized_cross_entropy
from hf_cosupervise.method.rejection import student_entropy


@pytest.fixture
def make_trainer(tmp_path, tiny_vit, tiny_image_dataset):
    """Trainers that write to folders of their own and share features."""
    numbers = iter(range(100))

    def make(pool=None, changes=None, **arguments):
        settings = {"features_dir": str(tmp_path / "features"), "learning_rate": 1e-2} | (changes or {})
        args = make_args(tmp_path / f"run-{next(numbers)}", **settings)
        own = make_pool(tiny_image_dataset) if pool is None else pool
        return CoSupervisedTrainer(tiny_vit, args, pool=own, **arguments)

    return make


def trained(trainer: CoSupervisedTrainer) -> dict[str, torch.Tensor]:
    trainer.train()
    return weights(trainer)


def assert_same(first, second, tolerance=0.0):
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], atol=tolerance, rtol=0)


def differ(first, second) -> bool:
    return any(not torch.equal(value, second[name]) for name, value in first.items())


# ── a loss ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("loss", ["cross_entropy", "generalized_cross_entropy"])
def test_a_loss_of_ones_own_is_the_one_that_it_copies(make_trainer, loss):
    functions = {"cross_entropy": soft_cross_entropy, "generalized_cross_entropy": generalized_cross_entropy}
    by_name = trained(make_trainer(changes={"loss": loss}))
    own = trained(make_trainer(loss_func=lambda logits, targets, rows: functions[loss](logits, targets)))
    assert_same(own, by_name, 1e-5)


LOSSES_WITH_MORE = [
    ({}, {"loss_func": lambda logits, targets, rows: (1 + rows % 3) * soft_cross_entropy(logits, targets)}),
    ({"loss": "early_learning_regularization", "loss_kwargs": {"beta": 0.3}}, {}),
    ({"loss": "evidential", "loss_kwargs": {"gamma": 0.2}}, {}),
    ({"loss": "evidential", "gradient_accumulation_steps": 2, "max_steps": 3}, {}),
]


@pytest.mark.parametrize("changes, arguments", LOSSES_WITH_MORE)
def test_both_loops_minimize_it(make_trainer, changes, arguments):
    fast = trained(make_trainer(changes=changes, **arguments))
    slow = trained(make_trainer(changes=changes | {"fit_head_on_features": False}, **arguments))
    assert_same(fast, slow, 1e-5)
    assert differ(fast, trained(make_trainer()))


def test_a_loss_sees_rows_of_the_pool(make_trainer, tiny_image_dataset):
    pool, seen = make_pool(tiny_image_dataset, missing=(3, 4)), []

    def witness(logits, targets, rows):
        seen.extend(zip(rows.tolist(), targets.tolist(), strict=True))
        return soft_cross_entropy(logits, targets)

    trainer = make_trainer(pool, {"num_train_epochs": 1, "max_steps": -1}, loss_func=witness)
    trainer.train_level(trainer.prepare_level(0))
    assert sorted(row for row, _ in seen) == [row for row in range(len(pool)) if row not in (3, 4)]
    generalist = pool.decode("generalist")
    assert all(np.allclose(target, generalist[row]) for row, target in seen)


def test_early_learning_regularization_begins_anew_at_each_level(make_trainer):
    changes = {"loss": "early_learning_regularization"}
    whole = make_trainer(changes=changes)
    whole.train()
    alone = make_trainer(changes=changes)
    first = alone.prepare_level(0)
    alone.train_level(first)
    assert_same(weights(alone), _after(whole, 0))


def _after(trainer: CoSupervisedTrainer, level: int) -> dict[str, torch.Tensor]:
    trainer.load_level(level)
    return weights(trainer)


# ── weights of examples ─────────────────────────────────────────────────────────────────────────────────────────────


def weighted_pool(data, values) -> PseudolabelPool:
    pool = make_pool(data)
    return PseudolabelPool(pool.hierarchy, pool.teachers, pool.inputs.add_column("weight", values))


@pytest.mark.parametrize("changes", [{}, {"loss": "reverse_kl"}])
def test_weights_count_the_same_in_both_loops_and_however_batches_are_cut(make_trainer, tiny_image_dataset, changes):
    pool = weighted_pool(tiny_image_dataset, np.linspace(0.0, 3.0, 48))
    changes = changes | {"weight_column": "weight", "rejection": "none"}
    fast = trained(make_trainer(pool, changes))
    assert_same(fast, trained(make_trainer(pool, changes | {"fit_head_on_features": False})), 1e-5)
    cut = changes | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert_same(fast, trained(make_trainer(pool, cut)), 1e-5)
    assert differ(fast, trained(make_trainer(pool, changes | {"weight_column": None})))


def test_equal_weights_are_no_weights_and_zero_leaves_an_example_out(make_trainer, tiny_image_dataset):
    plain = trained(make_trainer(changes={"rejection": "none"}))
    changes = {"weight_column": "weight", "rejection": "none"}
    equal = trained(make_trainer(weighted_pool(tiny_image_dataset, np.full(48, 7)), changes))
    assert_same(equal, plain, 1e-6)
    silent = np.arange(48) % 2
    pool, other = (weighted_pool(tiny_image_dataset, silent) for _ in range(2))
    wrong = {name: 1 - pool.decode(name) for name in pool.hierarchy.names}  # where the weight is 0, anything
    wrong = {
        name: np.where(silent[:, None] > 0, pool.decode(name), rows / rows.sum(axis=1, keepdims=True))
        for name, rows in wrong.items()
    }
    other = PseudolabelPool.from_predictions(make_hierarchy(), pool.ids, wrong, inputs=pool.inputs)
    first, second = make_trainer(pool, changes), make_trainer(other, changes)
    first.train_level(first.prepare_level(0))
    second.train_level(second.prepare_level(0))
    assert_same(weights(first), weights(second), 1e-6)


@pytest.mark.parametrize(
    "values, found",
    [
        (np.full(48, -1.0), r"-1\.0\.\.-1\.0"),
        (np.zeros(48), r"0\.0\.\.0\.0"),
        (np.array([np.nan, *[1.0] * 47]), "nan"),
        (["much"] * 48, "values"),
    ],
)
def test_weights_that_are_none(make_trainer, tiny_image_dataset, values, found):
    with pytest.raises(ValueError, match=rf"`weight_column` 'weight' must hold finite numbers .*, got .*{found}"):
        make_trainer(weighted_pool(tiny_image_dataset, values), {"weight_column": "weight"})


# ── an assignment ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_assignment_of_ones_own_is_the_one_that_it_copies(make_trainer):
    by_name = make_trainer(changes={"assignment": "agreement"})
    by_name.train()

    def nearest(student_log_probs, teacher_probs, answered):
        assert student_log_probs.shape[1] == teacher_probs.shape[2] == 4 and answered.dtype is torch.bool
        return choose_lowest(agreement_scores(student_log_probs, teacher_probs, "ce_teacher_student"), answered)

    own = make_trainer(assign_func=nearest)
    own.train()
    np.testing.assert_array_equal(own.plans[1].assigned_teacher, by_name.plans[1].assigned_teacher)
    assert_same(weights(own), weights(by_name))


def test_an_assignment_of_ones_own_needs_no_scopes_and_falls_back(make_trainer, tiny_image_dataset):
    pool = make_pool(tiny_image_dataset, missing=(5,))
    trainer = make_trainer(pool, assign_func=lambda student, teachers, answered: torch.full((len(student),), NOBODY))
    trainer.train()
    assert set(trainer.plans[1].assigned_teacher[np.arange(48) != 5]) == {0}  # the generalist still speaks
    trainer.create_model_card()
    card = Path(trainer.args.output_dir, "README.md").read_text()
    assert re.search(r"^\| 1 \| \S*lambda\S* \|", card, re.MULTILINE) and re.search(r"`assign_func`.*lambda", card)


@pytest.mark.parametrize(
    "function, message",
    [
        (
            lambda student, teachers, answered: torch.zeros(3),
            r"`assign_func` must give a tensor of integers .* \(48,\)",
        ),
        (lambda student, teachers, answered: [0] * 48, "got list"),
        (
            lambda student, teachers, answered: torch.full((48,), 2),
            r"positions of level 1, 0\.\.1, or -1 .* got 2\.\.2",
        ),
        (lambda student, teachers, answered: torch.zeros(48, dtype=torch.long), "1 of 48 rows without .* row 7 first"),
    ],
)
def test_an_assignment_that_cannot_be(make_trainer, tiny_image_dataset, function, message):
    trainer = make_trainer(make_pool(tiny_image_dataset, missing=(7,)), assign_func=function)
    with pytest.raises(ValueError, match=message):
        trainer.train()


# ── a rejection ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_rejection_of_ones_own(make_trainer):
    def is_sure(student_log_probs, pseudolabels):
        torch.testing.assert_close(pseudolabels.sum(dim=1), torch.ones(len(pseudolabels)))
        return (student_entropy(student_log_probs) < 1.35) & (pseudolabels.max(dim=1).values > 0.7)

    trainer = make_trainer(keep_func=is_sure)
    trainer.train()
    kept = trainer.plans[1].keep_mask
    trainer.load_level(0)
    [log_probs] = [part for _, part in trainer.predict_log_probs(trainer.pool.inputs)]
    plan = trainer.plans[1]
    labels = torch.from_numpy(trainer.pool.pseudolabels(plan.assigned_teacher, np.arange(48)))
    np.testing.assert_array_equal(kept, is_sure(log_probs, labels).numpy())
    assert 0 < kept.sum() < 48 and trainer.plans[0].keep_mask.all()


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda student, labels: torch.ones(48), r"`keep_func` must give a tensor of booleans .* got torch\.float32"),
        (lambda student, labels: None, "got NoneType"),
        (
            lambda student, labels: torch.zeros(48, dtype=torch.bool),
            "`keep_func` must keep at least one example of level",
        ),
    ],
)
def test_a_rejection_that_cannot_be(make_trainer, function, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(keep_func=function).train()


# ── what does not go together ───────────────────────────────────────────────────────────────────────────────────────


def some_loss(*args, **kwargs):
    raise AssertionError


@pytest.mark.parametrize(
    "changes, arguments, error, message",
    [
        (
            {"loss": "reverse_kl"},
            {"loss_func": some_loss},
            ValueError,
            "One loss .* got loss_func and loss 'reverse_kl'",
        ),
        (
            {},
            {"loss_func": some_loss, "compute_loss_func": some_loss},
            ValueError,
            "got loss_func and compute_loss_func",
        ),
        (
            {"head_solver": "ridge"},
            {"loss_func": some_loss},
            ValueError,
            "'ridge' has a loss of its own, got `loss_func`",
        ),
        ({}, {"keep_func": 3}, TypeError, "`keep_func` must be a function, got int"),
        ({"weight_column": "oracle_label"}, {"compute_loss_func": some_loss}, ValueError, "sees no `weight_column`"),
        ({"cross_fit_folds": 2, "student_training": "full"}, {}, ValueError, "`cross_fit_folds` needs a linear head"),
        (
            {"teacher_neighbors": 2, "student_training": "full"},
            {},
            ValueError,
            "`teacher_neighbors` needs a linear head",
        ),
        ({"teacher_neighbors": 48}, {}, ValueError, "`teacher_neighbors` must be below the 48 examples"),
        (
            {"teacher_neighbors": -1},
            {},
            ValueError,
            "`teacher_neighbors` must be a whole number of at least 0, got -1",
        ),
        ({"cross_fit_folds": 1}, {}, ValueError, "`cross_fit_folds` must be 0, or at least 2, got 1"),
        ({"cross_fit_folds": 2, "warm_start": True}, {}, ValueError, "needs a fresh head at each level"),
        ({"head_solver": "ridge", "weight_column": "w"}, {}, ValueError, "'ridge' weighs all examples alike"),
        ({"weight_column": "nothing"}, {}, ValueError, "must have a column 'nothing'"),
        ({"loss": "generalized_cross_entropy", "loss_kwargs": {"q": 2}}, {}, ValueError, "`q` must be above 0 and at"),
        ({"loss": "evidential", "loss_kwargs": {"gamma": -1}}, {}, ValueError, "`gamma` must be at least 0"),
    ],
)
def test_refused_before_work_starts(make_trainer, changes, arguments, error, message):
    with pytest.raises(error, match=message):
        make_trainer(changes=changes, **arguments)


# ── the E-step ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("solver", ["steps", "ridge"])
def test_heads_that_did_not_see_an_example_choose_its_teacher(make_trainer, tiny_image_dataset, solver):
    # Of a weaker penalty the rounding of sums in float32 would show: the sums are of the same rows in another order.
    changes = {"cross_fit_folds": 3, "head_solver": solver, "assignment": "agreement", "ridge_alpha": 1.0}
    trainer, plain = make_trainer(changes=changes), make_trainer(changes=changes | {"cross_fit_folds": 0})
    plan = trainer.prepare_level(0)
    trainer.train_level(plan), plain.train_level(plan)
    assert_same(weights(trainer), weights(plain))  # the student is the same, only who is asked differs
    found = torch.cat([part for _, part in trainer.student.judge_examples()])
    pool = make_pool(tiny_image_dataset)
    for fold in range(3):  # each is a student that was trained on the others only
        missing = tuple(range(fold, 48, 3))
        other = make_trainer(make_pool(tiny_image_dataset, missing=missing), changes | {"cross_fit_folds": 0})
        other.train_level(other.prepare_level(0))
        [log_probs] = [part for _, part in other.predict_log_probs(pool.inputs)]
        torch.testing.assert_close(found[fold::3], log_probs[fold::3], atol=1e-5, rtol=0)


def test_cross_fitting_goes_on_after_a_crash(make_trainer, tiny_vit, tiny_image_dataset):
    changes = {"cross_fit_folds": 2, "logging_steps": 1}
    whole, other = make_trainer(changes=changes), make_trainer(changes=changes)
    whole.train()
    plan = other.prepare_level(0)
    other.train_level(plan)
    other.finish_level(plan)
    again = CoSupervisedTrainer(tiny_vit, other.args, pool=make_pool(tiny_image_dataset))
    again.train(resume_from_checkpoint=True)
    assert_same(weights(again), weights(whole))
    np.testing.assert_array_equal(again.plans[1].assigned_teacher, whole.plans[1].assigned_teacher)
    assert [record["num_steps"] for record in whole.history.records] == [6, 6]  # folds are no steps of the story


def test_teachers_that_are_smoothed_over_neighbours(make_trainer, tiny_image_dataset):
    pool = make_pool(tiny_image_dataset, missing=(3,))
    trainer = make_trainer(pool, {"teacher_neighbors": 4, "rejection": "none"})
    trainer.train()
    nearest = nearest_neighbors(trainer.pool_features(), 4).numpy()
    for name in pool.hierarchy.names:
        own, answered = pool.decode(name), pool.answered(name)
        for row in range(48):
            rows = [other for other in (row, *nearest[row]) if answered[other]]
            expected = own[rows].mean(axis=0) if answered[row] else np.zeros(len(LABELS))
            np.testing.assert_allclose(trainer.pool.decode(name)[row], expected, atol=2e-3)
    assert pool.decode("generalist")[0].tolist() != trainer.pool.decode("generalist")[0].tolist()
    plain = make_trainer(trainer.pool, {"rejection": "none"})
    assert_same(weights(trainer), trained(plain))


def test_neighbours_are_found_once_for_all_runs(make_trainer, monkeypatch):
    changes = {"agreement_neighbors": 3, "assignment": "agreement"}
    first = trained(make_trainer(changes=changes))

    def never(*args):
        raise AssertionError("searched again")

    monkeypatch.setattr("hf_cosupervise.students.features.nearest_neighbors", never)
    assert_same(trained(make_trainer(changes=changes)), first)
    with pytest.raises(AssertionError, match="searched again"):
        make_trainer(changes=changes | {"agreement_neighbors": 4}).train()


def test_spoilt_neighbours_are_named_and_found_again(make_trainer, tmp_path, caplog):
    changes = {"agreement_neighbors": 3, "assignment": "agreement"}
    first = trained(make_trainer(changes=changes))
    [path] = (tmp_path / "features").rglob("rows.npy")
    path.write_bytes(path.read_bytes()[:-20])
    assert_same(trained(make_trainer(changes=changes)), first)
    assert str(path) in caplog.text

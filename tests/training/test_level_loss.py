"""The loss of one level, without a student, a trainer or a disk."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hf_cosupervise import CoSupervisedConfig, PseudolabelPool, Teacher, TeacherHierarchy
from hf_cosupervise.method.linear_head import SparseTargets
from hf_cosupervise.processes import Processes
from hf_cosupervise.training import level_loss
from hf_cosupervise.training.level_loss import LevelLoss
from hf_cosupervise.training.plan import LevelPlan

ANSWERS = np.array([[0.75, 0.25], [0.5, 0.5], [0.25, 0.75], [1.0, 0.0]])


@pytest.fixture
def make_loss(tmp_path):
    def make(*, relabelled: np.ndarray | None = None, arguments: dict[str, Any] | None = None, **changes) -> LevelLoss:
        hierarchy = TeacherHierarchy(["a", "b"], [Teacher("root")])
        pool = PseudolabelPool.from_predictions(hierarchy, list(range(4)), {"root": ANSWERS})
        keep_mask = np.array([True, True, True, False])
        plan = LevelPlan(0, 0, np.zeros(4, dtype=int), np.array([0, 0, 1, 0]), keep_mask, {}, relabelled)
        args = CoSupervisedConfig(output_dir=str(tmp_path), use_cpu=True, **changes)
        return LevelLoss(pool, plan, args, **(arguments or {}))

    return make


LOGITS = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
ROWS = torch.arange(3)


def targets_of(loss: LevelLoss, rows: torch.Tensor = ROWS) -> dict[str, torch.Tensor]:
    return {"target_probs": torch.from_numpy(loss.pseudolabels(rows.numpy()))}


@pytest.mark.parametrize("share", [0.0, 0.2])
@pytest.mark.parametrize("hard", [False, True])
def test_a_batch_by_hand(make_loss, share, hard):
    loss = make_loss(pseudolabels="hard" if hard else "soft", label_smoothing_factor=share)
    wanted = np.array([[1, 0], [1, 0], [0, 1]]) if hard else ANSWERS[:3]
    wanted = torch.from_numpy(wanted * (1 - share) + share / 2)
    expected = -(wanted * torch.log_softmax(LOGITS.double(), dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(loss(LOGITS, targets_of(loss), ROWS).double(), expected)
    table = loss.lookup(np.arange(3), torch.device("cpu"))
    torch.testing.assert_close(table(ROWS), wanted.float())


def test_pseudolabels_that_do_not_fit_in_memory_are_decoded_by_batch(make_loss, monkeypatch):
    loss = make_loss(label_smoothing_factor=0.1)
    kept, rows = np.arange(3), torch.tensor([2, 0])
    whole = loss.lookup(kept, torch.device("cpu"))(rows)
    monkeypatch.setattr(level_loss, "_MAX_DECODED_BYTES", 0)
    assert torch.equal(loss.lookup(kept, torch.device("cpu"))(rows), whole)


def test_few_of_many_labels_are_looked_up_as_such(tmp_path):
    hierarchy = TeacherHierarchy([f"l{number}" for number in range(8)], [Teacher("root")])
    answers = np.eye(8)[[3, 5]] * 0.75 + 0.25 / 8
    pool = PseudolabelPool.from_predictions(hierarchy, [0, 1], {"root": answers}, pool_k=2)
    plan = LevelPlan(0, 0, np.zeros(2, dtype=int), np.array([3, 5]), np.ones(2, dtype=bool), {})
    args = CoSupervisedConfig(output_dir=str(tmp_path), use_cpu=True)
    found = LevelLoss(pool, plan, args).lookup(np.arange(2), torch.device("cpu"))(torch.tensor([1]))
    assert isinstance(found, SparseTargets) and found.label_ids[0, 0] == 5
    for arguments in ({"needs_all_labels": True}, {"loss_func": lambda logits, targets, rows: logits.sum(dim=1)}):
        dense = LevelLoss(pool, plan, args, **arguments).lookup(np.arange(2), torch.device("cpu"))(torch.tensor([1]))
        assert dense.shape == (1, 8) and dense[0].argmax() == 5


def test_relabelled_examples_have_the_students_label(make_loss):
    loss = make_loss(relabelled=np.array([-1, 1, -1, -1]))
    np.testing.assert_array_equal(loss.pseudolabels(np.array([0, 1])), [[0.75, 0.25], [0, 1]])


def test_weights_have_a_mean_of_one_over_what_is_kept(make_loss):
    weights = np.array([1.0, 2.0, 3.0, 1000.0])  # the last one is not kept
    loss, plain = make_loss(arguments={"weights": weights}), make_loss()
    each = [plain(LOGITS[row : row + 1], targets_of(plain, ROWS[row : row + 1]), ROWS) for row in range(3)]
    expected = (each[0] * 0.5 + each[1] * 1.0 + each[2] * 1.5) / 3
    torch.testing.assert_close(loss(LOGITS, targets_of(loss), ROWS), expected)
    with pytest.raises(ValueError, match="`weight_column` 'w' must be above 0 somewhere, got 0 for all that level 0"):
        make_loss(arguments={"weights": np.array([0.0, 0.0, 0.0, 1.0])}, weight_column="w")


def test_a_loss_that_remembers_begins_anew_for_another_student(make_loss):
    loss = make_loss(loss="early_learning_regularization")
    first = loss(LOGITS, targets_of(loss), ROWS)
    assert loss(LOGITS, targets_of(loss), ROWS) != first  # it has seen these examples
    loss.forget()
    assert loss(LOGITS, targets_of(loss), ROWS) == first


def test_a_loss_that_changes_on_the_way_is_told_how_far_it_is(make_loss):
    done = [0.0]
    loss = make_loss(loss="confidence")
    loss.fraction_done = lambda: done[0]
    first = loss(LOGITS, targets_of(loss), ROWS)
    done[0] = 1.0
    assert loss(LOGITS, targets_of(loss), ROWS) != first


def test_steps_are_averaged_over_their_batches_and_over_a_crash(make_loss):
    loss = make_loss()
    loss.watch(torch.tensor(1.0), ends_step=False)
    loss.watch(torch.tensor(3.0))
    loss.watch(torch.tensor(4.0))
    assert loss.mean() == 3.0 and loss.count == 2
    again = make_loss()
    again.take_up(float(loss.total), loss.count)
    again.watch(torch.tensor(9.0))
    assert again.mean() == 5.0 and again.total.dtype is torch.float64


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_told(make_loss, value):
    loss = make_loss(arguments={"processes": Processes(0, 1)})
    loss.check("step 0 of level 0", "there")  # nothing was trained
    loss.watch(torch.tensor(1.0))
    loss.check("step 1 of level 0", "there")
    loss.watch(torch.tensor(value))
    with pytest.raises(FloatingPointError) as error:
        loss.check("step 2 of level 0", "there")
    assert str(error.value) == (
        "The loss must be a number, got NaN or infinity by step 2 of level 0. Lower `learning_rate`, or set "
        "`max_grad_norm`, and begin in another folder; what was finished before stays in 'there'."
    )

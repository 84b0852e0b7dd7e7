"""A head fitted on features, without a trainer, a run or a backbone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import nn
from torch.utils.data import BatchSampler, DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from hf_cosupervise import CoSupervisedConfig
from hf_cosupervise.method.linear_head import SparseTargets
from hf_cosupervise.method.ridge import RIDGE_ALPHAS, choose_ridge_alpha
from hf_cosupervise.training.head_fitter import FitEvents, HeadFitter, outside_of_fold, why_not_on_features

FEATURES = torch.from_numpy(np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32))
WANTED = torch.softmax(FEATURES @ torch.from_numpy(np.random.default_rng(1).normal(size=(6, 3))).float(), dim=1)


class Witness(TrainerCallback):
    def __init__(self, stop_at: int = 10**9) -> None:
        self.told, self.stop_at = [], stop_at

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step >= self.stop_at

    def __getattribute__(self, name: str) -> Any:
        if name in ("on_train_begin", "on_epoch_begin", "on_epoch_end", "on_train_end"):
            return lambda *args, **kwargs: self.told.append(name.removeprefix("on_"))
        return super().__getattribute__(name)


def make_args(tmp_path, **changes: Any) -> CoSupervisedConfig:
    settings = {"max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 0.1, "logging_steps": 2}
    return CoSupervisedConfig(output_dir=str(tmp_path), use_cpu=True, **settings | changes)


def make_events(args: CoSupervisedConfig, *callbacks: Any) -> tuple[FitEvents, list[dict[str, float]]]:
    logged: list[dict[str, float]] = []

    def log(numbers: dict[str, float], control: TrainerControl) -> TrainerControl:
        logged.append(numbers)
        control.should_log = False
        return control

    handler = CallbackHandler([DefaultFlowCallback(), *callbacks], None, None, None, None)
    state = TrainerState(max_steps=args.max_steps, num_train_epochs=2)
    state.compute_steps(args, args.max_steps)
    return FitEvents(handler, args, state, TrainerControl(), log), logged


def make_head() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 3)


def loader(kept: np.ndarray, size: int = 8, seed: int = 3) -> DataLoader:
    sampler = SeedableRandomSampler(range(len(kept)), generator=torch.Generator(), data_seed=seed)
    return DataLoader(range(len(kept)), batch_sampler=BatchSampler(sampler, size, False))


def test_steps_are_those_of_a_loop_with_autograd(tmp_path):
    args, kept = make_args(tmp_path), np.arange(0, 40, 2)
    events, logged = make_events(args, witness := Witness())
    head = make_head()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 6)
    seen: list[float] = []
    output = HeadFitter(head, FEATURES, args).fit_by_steps(
        kept,
        WANTED.__getitem__,
        loader(kept),
        optimizer,
        scheduler,
        events,
        watch=lambda loss: seen.append(float(loss)),
    )

    slow, losses = make_head(), []
    optimizer = torch.optim.SGD(slow.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 6)
    batches = loader(kept)
    for epoch in range(2):
        batches.batch_sampler.sampler.set_epoch(epoch)
        for batch in batches.batch_sampler:
            rows = torch.from_numpy(kept[batch])
            loss = -(WANTED[rows] * torch.log_softmax(slow(FEATURES[rows]), dim=1)).sum(dim=1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
    torch.testing.assert_close(head.weight, slow.weight, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(head.bias, slow.bias, atol=1e-6, rtol=1e-5)
    assert output.global_step == 6 and output.training_loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert seen == pytest.approx(losses, rel=1e-5)
    assert [entry["loss"] for entry in logged] == pytest.approx(np.reshape(losses, (3, 2)).mean(axis=1), rel=1e-5)
    assert witness.told == ["train_begin", *["epoch_begin", "epoch_end"] * 2, "train_end"]
    assert events.state.epoch == 2.0


def test_a_callback_may_stop(tmp_path):
    args, kept = make_args(tmp_path), np.arange(40)
    events, logged = make_events(args, Witness(stop_at=3))
    head = make_head()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    output = HeadFitter(head, FEATURES, args).fit_by_steps(
        kept, WANTED.__getitem__, loader(kept), optimizer, scheduler, events
    )
    assert output.global_step == 3 and events.control.should_training_stop


def test_a_ridge_is_a_level_of_one_step(tmp_path):
    args = make_args(tmp_path, head_solver="ridge")
    events, logged = make_events(args, witness := Witness())
    head = make_head()
    output = HeadFitter(head, FEATURES, args).fit_at_once(np.arange(40), WANTED.__getitem__, events)
    expected = -(WANTED * torch.log_softmax(head(FEATURES), dim=1)).sum(dim=1).mean()
    assert output.global_step == 1 and output.training_loss == pytest.approx(float(expected), rel=1e-5)
    assert logged == [{"loss": output.training_loss, "head/ridge_alpha": output.metrics["head/ridge_alpha"]}]
    assert events.state.epoch == 1.0
    assert witness.told == ["train_begin", "epoch_begin", "epoch_end", "train_end"]


def fit_ridge(tmp_path, targets: Any, kept: np.ndarray, **changes: Any) -> tuple[nn.Linear, float]:
    args = make_args(tmp_path, head_solver="ridge", **changes)
    head = make_head()
    output = HeadFitter(head, FEATURES, args).fit_at_once(kept, targets, make_events(args)[0])
    return head, output.metrics["head/ridge_alpha"]


def test_a_ridge_finds_its_penalty(tmp_path):
    kept, found = np.arange(0, 40, 2), []
    for labels in (torch.eye(3)[WANTED.argmax(dim=1)], torch.eye(3)[[1] * 40]):
        head, alpha = fit_ridge(tmp_path, labels.__getitem__, kept)
        rows, origin = torch.from_numpy(kept), FEATURES.mean(dim=0)
        inputs = torch.cat([FEATURES[rows] - origin, torch.ones(len(rows), 1)], dim=1).double()
        cross = inputs.T @ labels[rows].double()
        by_hand = choose_ridge_alpha(FEATURES, labels.__getitem__, rows, inputs.T @ inputs, cross, origin)
        same, _ = fit_ridge(tmp_path, labels.__getitem__, kept, ridge_alpha=alpha)
        assert alpha == by_hand and torch.equal(head.weight, same.weight) and torch.equal(head.bias, same.bias)
        found.append(alpha)
    assert found[0] < found[1] == max(RIDGE_ALPHAS)  # of one label alone the features tell nothing


def test_sparse_pseudolabels_find_the_penalty_of_dense_ones(tmp_path):
    probs, ids = WANTED.topk(2, dim=1)
    rest = 1 - probs.sum(dim=1)
    sparse = fit_ridge(tmp_path, lambda rows: SparseTargets(ids[rows], probs[rows], rest[rows]), np.arange(40))
    dense = fit_ridge(tmp_path, WANTED.__getitem__, np.arange(40))
    assert sparse[1] == dense[1]
    torch.testing.assert_close(sparse[0].weight, dense[0].weight, atol=1e-5, rtol=0)


def test_sums_of_few_kept_rows_are_those_of_many_rejected_ones(tmp_path):
    # the sums over the kept rows are those of all less the rejected ones, or their own: whatever is less work
    fitter = HeadFitter(make_head(), FEATURES, make_args(tmp_path, head_solver="ridge"))
    with_one = np.c_[(FEATURES - FEATURES.mean(dim=0)).double().numpy(), np.ones(40)]
    for num_kept in (1, 10, 19, 20, 21, 35, 40):
        kept = np.sort(np.random.default_rng(num_kept).permutation(40)[:num_kept])
        found = fitter._gram_of(kept).numpy()
        np.testing.assert_allclose(found, with_one[kept].T @ with_one[kept], rtol=1e-5, atol=1e-4)


def test_rows_that_nobody_read_are_in_no_sum(tmp_path, monkeypatch):
    readable, args = np.arange(40) < 30, make_args(tmp_path, head_solver="ridge")
    features = FEATURES * torch.from_numpy(readable[:, None])
    fitter, summed = HeadFitter(make_head(), features, args, readable=readable), []
    monkeypatch.setattr(fitter, "_sum_gram", lambda rows: summed.append(rows) or torch.zeros(7, 7))
    fitter._gram_of(np.arange(25))
    assert [rows.tolist() for rows in summed] == [[*range(30)], [*range(25, 30)]]


def test_steps_and_epochs_are_counted_as_the_trainer_counts(tmp_path):
    args = make_args(tmp_path, max_steps=-1, num_train_epochs=2.5, gradient_accumulation_steps=2)
    fitter = HeadFitter(make_head(), FEATURES, args)
    assert fitter.count_steps(loader(np.arange(40)), 40) == (8, 3)  # 5 batches are 3 steps; 2.5 epochs are 7.5 steps
    with pytest.raises(ValueError, match="at least one whole batch under `dataloader_drop_last`, got 3 examples"):
        fitter.count_steps(DataLoader(range(3), batch_size=8, drop_last=True), 3)


def test_what_a_head_of_a_fold_may_see():
    kept = np.array([0, 1, 2, 4, 7])
    assert [outside_of_fold(kept, fold, 3, level=1).tolist() for fold in range(3)] == [
        [1, 2, 4, 7],
        [0, 2],
        [0, 1, 4, 7],
    ]
    with pytest.raises(ValueError, match="Level 1 must keep examples outside of every fold, got 2 all in fold 0"):
        outside_of_fold(np.array([0, 3]), 0, 3, level=1)


@pytest.mark.parametrize(
    ("changes", "facts", "reason"),
    [
        ({}, {}, None),
        ({"fit_head_on_features": False}, {}, "`fit_head_on_features` is off"),
        ({"save_strategy": "steps"}, {}, "checkpoints within a level are asked for"),
        ({}, {"has_own_loss": True}, "`compute_loss_func` is given"),
        ({}, {"has_own_collator": True}, "the data collator is not ours"),
        ({}, {"is_sharded": True}, "FSDP or DeepSpeed is used"),
    ],
)
def test_what_features_cannot_honour(tmp_path, changes, facts, reason):
    facts = {"has_own_loss": False, "has_own_collator": False, "is_sharded": False} | facts
    assert why_not_on_features(make_args(tmp_path, **changes), make_head(), **facts) == reason
    if reason is None:
        without = why_not_on_features(make_args(tmp_path), None, **facts)
        assert without == "the student is not a linear head on a frozen backbone"

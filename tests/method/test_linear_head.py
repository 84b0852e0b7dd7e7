"""The fast loop for a linear head against the plain one with autograd, on the same batches."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import nn

from hf_cosupervise.method import linear_head
from hf_cosupervise.method.linear_head import (
    SparseTargets,
    feature_origin,
    fit_linear_head,
    fit_ridge_head,
    gram_matrix,
)
from hf_cosupervise.method.published_losses import choose_loss
from hf_cosupervise.pool.top_k import decode_top_k, encode_top_k, scale_top_k

NUM_EXAMPLES, FEATURE_SIZE, NUM_LABELS = 40, 7, 5


@pytest.fixture()
def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(NUM_EXAMPLES, FEATURE_SIZE, generator=generator)
    targets = torch.softmax(2 * torch.randn(NUM_EXAMPLES, NUM_LABELS, generator=generator), dim=1)
    targets[::3] = torch.eye(NUM_LABELS)[torch.randint(NUM_LABELS, (len(targets[::3]),), generator=generator)]
    return features, targets


def new_head(bias: bool = True) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Linear(FEATURE_SIZE, NUM_LABELS, bias=bias)


def draw_steps(num_steps: int, sizes: Sequence[int], seed: int = 0) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randint(NUM_EXAMPLES, (size,), generator=generator) for size in sizes] for _ in range(num_steps)]


def make_optimizer(name: str, head: nn.Linear) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(head.parameters(), lr=0.5, momentum=0.9)
    return torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=0.1 if name == "adamw" else 0.0)


def make_scheduler(optimizer: torch.optim.Optimizer, num_steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / num_steps)))


def fit_by_autograd(
    head: nn.Linear,
    features: torch.Tensor,
    targets: torch.Tensor,
    steps: list[list[torch.Tensor]],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    max_grad_norm: float = 0.0,
) -> list[tuple[float, float]]:
    """What any training script does. Gives loss and norm of the gradient of each step."""
    told = []
    for micro_batches in steps:
        optimizer.zero_grad()
        total = 0.0
        for rows in micro_batches:
            log_probs = nn.functional.log_softmax(head(features[rows]), dim=1)
            loss = -(targets[rows] * log_probs).sum(dim=1).mean() / len(micro_batches)
            loss.backward()
            total += loss.item()
        norm = nn.utils.clip_grad_norm_(head.parameters(), max_grad_norm if max_grad_norm > 0 else math.inf)
        told.append((total, norm.item()))
        optimizer.step()
        scheduler.step()
    return told


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.2, 100.0])
@pytest.mark.parametrize("sizes", [(8,), (4, 4, 4), (1, 7, 2)])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("bias", [True, False])
def test_same_weights_as_autograd(bias, optimizer, sizes, max_grad_norm, data):
    features, targets = data
    steps = draw_steps(30, sizes)
    plain = new_head(bias)
    start, fast = copy.deepcopy(plain), copy.deepcopy(plain)
    first, second = make_optimizer(optimizer, plain), make_optimizer(optimizer, fast)
    expected = fit_by_autograd(plain, features, targets, steps, first, make_scheduler(first, 30), max_grad_norm)
    told: list[tuple[float, float | None]] = []
    fit_linear_head(
        fast,
        features,
        lambda rows: targets[rows],
        steps,
        second,
        make_scheduler(second, 30),
        max_grad_norm=max_grad_norm,
        on_step=lambda loss, norm: told.append((float(loss), norm)),
    )
    torch.testing.assert_close(fast.weight, plain.weight, rtol=0, atol=1e-6 if optimizer != "sgd" else 5e-6)
    if bias:
        torch.testing.assert_close(fast.bias, plain.bias, rtol=0, atol=1e-6 if optimizer != "sgd" else 5e-6)
    assert (fast.weight - start.weight).abs().max() > 0.05
    assert [loss for loss, _ in told] == pytest.approx([loss for loss, _ in expected], abs=2e-5)
    # the norm is the one before clipping, and is not computed where nobody clips
    norms = [norm for _, norm in told]
    assert norms == (pytest.approx([norm for _, norm in expected], abs=2e-5) if max_grad_norm else [None] * 30)
    assert max_grad_norm != 0.2 or max(norms) > 0.2
    assert second.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)  # the schedule went to its end


def test_four_batches_of_two_are_one_of_eight(data):
    features, targets = data
    heads = []
    for sizes in ((8,), (2, 2, 2, 2)):
        head = new_head()
        optimizer = make_optimizer("adam", head)
        steps = [list(torch.cat(step).split(sizes)) for step in draw_steps(25, (8,))]
        fit_linear_head(head, features, lambda rows: targets[rows], steps, optimizer, make_scheduler(optimizer, 25))
        heads.append(head)
    torch.testing.assert_close(heads[0].weight, heads[1].weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(heads[0].bias, heads[1].bias, rtol=0, atol=1e-6)


def test_one_step_by_hand():
    # Two labels, one feature x = 2, weights and bias 0: softmax is (1/2, 1/2) and y = (1, 0), so g = (-1/2, 1/2),
    # dW = g x = (-1, 1), db = g, the loss is log 2 and the norm sqrt(1 + 1 + 1/4 + 1/4).
    head = nn.Linear(1, 2)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    told = []
    fit_linear_head(
        head,
        torch.tensor([[2.0]]),
        lambda rows: torch.tensor([[1.0, 0.0]])[rows],
        [[torch.tensor([0])]],
        optimizer,
        torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
        max_grad_norm=1e9,
        on_step=lambda loss, norm: told.append((float(loss), norm)),
    )
    assert head.weight.flatten().tolist() == pytest.approx([0.1, -0.1])
    assert head.bias.tolist() == pytest.approx([0.05, -0.05])
    assert told == [pytest.approx((math.log(2), math.sqrt(2.5)), rel=1e-6)]


def test_gradients_of_two_processes(data):
    # each process sees half of every batch; averaging their gradients is one process with the whole batch
    features, targets = data
    step = draw_steps(1, (8,))[0][0]
    gradients: list[list[torch.Tensor]] = []
    for half in step.split(4):
        head = new_head()
        optimizer = torch.optim.SGD(head.parameters(), lr=0.0)
        gradients.append([])
        fit_linear_head(
            head,
            features,
            lambda rows: targets[rows],
            [[half]],
            optimizer,
            make_scheduler(optimizer, 1),
            average_gradients=lambda gradient: gradients[-1].append(gradient.clone()),
        )
    means = iter([(first + second) / 2 for first, second in zip(*gradients)])

    def put_mean(gradient: torch.Tensor) -> None:
        gradient.copy_(next(means))

    together, alone = new_head(), new_head()
    for head, rows, average in ((together, step[:4], put_mean), (alone, step, None)):
        optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
        fit_linear_head(
            head,
            features,
            lambda rows: targets[rows],
            [[rows]],
            optimizer,
            make_scheduler(optimizer, 10),
            average_gradients=average,
            max_grad_norm=0.3,
        )
    torch.testing.assert_close(together.weight, alone.weight, rtol=0, atol=1e-7)
    torch.testing.assert_close(together.bias, alone.bias, rtol=0, atol=1e-7)
    assert next(means, None) is None  # weight and bias, each once


def test_only_the_head_changes(data):
    features, targets = data
    before = features.clone(), targets.clone()
    head = new_head()
    optimizer = make_optimizer("adam", head)
    fit_linear_head(
        head, features, lambda rows: targets[rows], draw_steps(5, (8,)), optimizer, make_scheduler(optimizer, 5)
    )
    assert torch.equal(features, before[0]) and torch.equal(targets, before[1])
    assert head.weight.requires_grad and head.weight.grad is None and head.bias.grad is None


def test_steps_are_read_one_at_a_time(data):
    # a callback may stop training: a step must be finished before the next is asked for
    features, targets = data
    head = new_head()
    optimizer = make_optimizer("adam", head)
    events: list[str] = []

    def steps():
        for rows in draw_steps(3, (4,)):
            events.append("ask")
            yield rows

    fit_linear_head(
        head,
        features,
        lambda rows: targets[rows],
        steps(),
        optimizer,
        make_scheduler(optimizer, 3),
        on_step=lambda loss, norm: events.append("done"),
    )
    assert events == ["ask", "done"] * 3


def test_fits_what_a_line_can_separate():
    # a smoke test of the whole: four points, four labels
    features, targets = torch.eye(4), torch.eye(4)
    head = nn.Linear(4, 4)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    steps = [[torch.arange(4)] for _ in range(200)]
    losses = []
    fit_linear_head(
        head,
        features,
        lambda rows: targets[rows],
        steps,
        optimizer,
        make_scheduler(optimizer, 200),
        on_step=lambda loss, norm: losses.append(float(loss)),
    )
    assert losses[-1] < 0.02 < 1.0 < losses[0]
    assert head(features).argmax(dim=1).tolist() == [0, 1, 2, 3]


# ── pseudolabels that name k labels ─────────────────────────────────────────────────────────────────────────────────


def sparse_and_dense(num_labels: int, k: int, num_examples: int = NUM_EXAMPLES) -> tuple[SparseTargets, torch.Tensor]:
    """The same random pseudolabels twice; one in ten is sure."""
    rng = np.random.default_rng([num_labels, k])
    probs = rng.dirichlet(np.full(num_labels, 0.3), size=num_examples)
    probs[::10] = np.eye(num_labels)[rng.integers(num_labels, size=len(probs[::10]))]
    label_ids, stored = encode_top_k(probs, k)
    arrays = (label_ids.astype(np.int64), *scale_top_k(stored, num_labels))
    dense = torch.from_numpy(decode_top_k(label_ids, stored, num_labels))
    return SparseTargets(*(torch.from_numpy(array) for array in arrays)), dense


def pick(targets: SparseTargets, rows: torch.Tensor) -> SparseTargets:
    return SparseTargets(*(values[rows] for values in targets))


def head_of(num_labels: int, bias: bool = True, size: int = FEATURE_SIZE) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Linear(size, num_labels, bias=bias)


@pytest.mark.parametrize("sizes", [(8,), (1, 7, 2)])
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.2])
@pytest.mark.parametrize(("num_labels", "k"), [(2, 1), (5, 5), (40, 4)])
def test_sparse_targets_train_the_same_head(num_labels, k, max_grad_norm, sizes, data):
    features, (sparse, dense) = data[0], sparse_and_dense(num_labels, k)
    steps, found, told = draw_steps(30, sizes), [], []
    for lookup in (lambda rows: pick(sparse, rows), lambda rows: dense[rows]):
        head = head_of(num_labels)
        optimizer = make_optimizer("adamw", head)
        told.append([])
        fit_linear_head(
            head,
            features,
            lookup,
            steps,
            optimizer,
            make_scheduler(optimizer, 30),
            max_grad_norm=max_grad_norm,
            on_step=lambda loss, norm: told[-1].append((float(loss), norm or 0.0)),
        )
        found.append(head)
    torch.testing.assert_close(found[0].weight, found[1].weight, rtol=0, atol=2e-6)
    torch.testing.assert_close(found[0].bias, found[1].bias, rtol=0, atol=2e-6)
    np.testing.assert_allclose(told[0], told[1], atol=2e-5)
    assert (found[0].weight - head_of(num_labels).weight).abs().max() > 0.05


def test_sparse_targets_are_not_changed(data):
    sparse, _ = sparse_and_dense(40, 4)
    before = [values.clone() for values in sparse]
    head = head_of(40)
    optimizer = make_optimizer("adam", head)
    fit_linear_head(head, data[0], lambda rows: sparse, [[torch.arange(40)]], optimizer, make_scheduler(optimizer, 1))
    assert all(torch.equal(*pair) for pair in zip(sparse, before))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_read_as_float32(dtype, data):
    # the same numbers kept in half the space are the same numbers: nothing else is rounded
    features, targets = data[0].to(dtype), data[1]
    found = []
    for values in (features, features.float()):
        head = new_head()
        optimizer = make_optimizer("adam", head)
        fit_linear_head(
            head, values, lambda rows: targets[rows], draw_steps(20, (8, 3)), optimizer, make_scheduler(optimizer, 20)
        )
        found.append(head)
    assert torch.equal(found[0].weight, found[1].weight) and torch.equal(found[0].bias, found[1].bias)
    assert found[0].weight.dtype == torch.float32


# ── at once, in closed form ─────────────────────────────────────────────────────────────────────────────────────────


def ridge_by_numpy(
    features: np.ndarray, targets: np.ndarray, alpha: float, logit_scale: float, bias: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Ridge regression as in a textbook, in float64: weight and bias of the logits."""
    features, targets = features.astype(np.float64), targets.astype(np.float64)
    means, label_means = features.mean(axis=0) * bias, targets.mean(axis=0) * bias
    centred = features - means
    covariance = centred.T @ centred
    penalty = alpha * (centred**2).mean() * len(features)
    weight = np.linalg.solve(covariance + penalty * np.eye(len(covariance)), centred.T @ (targets - label_means))
    return logit_scale * weight.T, logit_scale * (label_means - means @ weight)


def cross_entropy_by_numpy(logits: np.ndarray, targets: np.ndarray) -> float:
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return float(-(targets * log_probs).sum(axis=1).mean())


def fit_ridge(
    features: torch.Tensor,
    targets: torch.Tensor | SparseTargets,
    rows: torch.Tensor | None = None,
    *,
    alpha: float = 0.01,
    logit_scale: float = 10.0,
    bias: bool = True,
    num_labels: int = NUM_LABELS,
) -> tuple[nn.Linear, float]:
    rows = torch.arange(len(features)) if rows is None else rows
    head = head_of(num_labels, bias, features.shape[1])
    lookup = targets.__getitem__ if isinstance(targets, torch.Tensor) else lambda part: pick(targets, part)
    loss = fit_ridge_head(
        head, features, rows, lookup, gram_matrix(features, rows), alpha=alpha, logit_scale=logit_scale
    )
    assert loss.shape == ()
    return head, float(loss)


@pytest.mark.parametrize("num_rows", [0, 1, 30])
def test_gram_matrix_by_numpy(num_rows, data):
    rows = torch.randperm(NUM_EXAMPLES, generator=torch.Generator().manual_seed(0))[:num_rows]
    found = gram_matrix(data[0], rows)
    # counted from the mean of the first features, which is the same whatever rows are summed
    with_one = np.c_[(data[0][rows] - data[0].mean(dim=0)).double().numpy(), np.ones(num_rows)]
    assert found.dtype == torch.float64 and found.shape == (FEATURE_SIZE + 1, FEATURE_SIZE + 1)
    np.testing.assert_allclose(found.numpy(), with_one.T @ with_one, rtol=1e-5, atol=1e-5)
    assert torch.equal(found, found.T) and found[-1, -1] == num_rows


def test_gram_matrices_add_up(data, monkeypatch):
    everything = gram_matrix(data[0], torch.arange(NUM_EXAMPLES))
    kept = torch.tensor([row for row in range(NUM_EXAMPLES) if row % 3])
    rejected = torch.arange(0, NUM_EXAMPLES, 3)
    difference = everything - gram_matrix(data[0], rejected)
    torch.testing.assert_close(difference, gram_matrix(data[0], kept), rtol=1e-6, atol=1e-5)
    assert difference[-1, -1] == len(kept)
    monkeypatch.setattr(linear_head, "_GRAM_ROWS", 7)  # several parts, the last of them smaller
    torch.testing.assert_close(gram_matrix(data[0], torch.arange(NUM_EXAMPLES)), everything, rtol=1e-6, atol=1e-5)
    half = gram_matrix(data[0].half(), kept)
    torch.testing.assert_close(half, gram_matrix(data[0].half().float(), kept), rtol=0, atol=0)


def test_rows_that_nobody_read_do_not_move_the_origin():
    features = torch.tensor([[0.0, 0.0], [4.0, 6.0], [0.0, 0.0], [2.0, 0.0]])
    assert feature_origin(features).tolist() == [3.0, 3.0]
    assert feature_origin(torch.zeros(3, 2)).tolist() == [0.0, 0.0]


def test_ridge_by_hand():
    # One feature x = (-1, 1, 3), mean 1; y = (1, 0, 0) for label 0, mean 1/3. X^T X = 8, X^T y = -2, the mean variance
    # is 8/3, so lambda = 0.5 * 8/3 * 3 = 4 and w = -2 / 12 = -1/6; the bias is 1/3 + 1/6 = 1/2. Logits are 6 times it.
    features, targets = torch.tensor([[-1.0], [1.0], [3.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    head, loss = fit_ridge(features, targets, alpha=0.5, logit_scale=6.0, num_labels=2)
    assert head.weight.flatten().tolist() == pytest.approx([-1.0, 1.0], rel=1e-6)
    assert head.bias.tolist() == pytest.approx([3.0, 3.0], rel=1e-6)
    # logits are (4, 2), (2, 4), (0, 6)
    expected = (2 * math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-6))) / 3
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("alpha", [1e-3, 0.01, 1.0, 100.0])
@pytest.mark.parametrize("logit_scale", [1.0, 10.0])
def test_ridge_by_numpy(logit_scale, alpha, bias, data):
    features, targets = data
    features = features + torch.arange(FEATURE_SIZE) / 2  # means that matter
    rows = torch.arange(0, NUM_EXAMPLES, 2)
    head, loss = fit_ridge(features, targets, rows, alpha=alpha, logit_scale=logit_scale, bias=bias)
    own = features[rows].numpy(), targets[rows].numpy()
    weight, expected_bias = ridge_by_numpy(*own, alpha, logit_scale, bias)
    np.testing.assert_allclose(head.weight.detach().numpy(), weight, rtol=1e-4, atol=1e-5 * logit_scale)
    if bias:
        np.testing.assert_allclose(head.bias.detach().numpy(), expected_bias, rtol=1e-4, atol=1e-5 * logit_scale)
    expected = cross_entropy_by_numpy(own[0] @ weight.T + expected_bias, own[1])
    assert loss == pytest.approx(expected, rel=1e-4)


def test_ridge_is_that_of_scikit_learn(data):
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, targets = (values.numpy() for values in data)
    penalty = 0.3 * features.var(axis=0).mean() * len(features)
    theirs = linear_model.Ridge(alpha=penalty).fit(features, targets)
    head, _ = fit_ridge(*data, alpha=0.3, logit_scale=4.0)
    np.testing.assert_allclose(head(data[0]).detach().numpy(), 4.0 * theirs.predict(features), atol=1e-4)


def test_the_ridge_penalty_is_relative(data):
    # features in other units give the same predictions, and so does every row three times
    features, targets = data
    expected = fit_ridge(features, targets)[0](features)
    head, _ = fit_ridge(1000 * features, targets)
    torch.testing.assert_close(head(1000 * features), expected, rtol=1e-4, atol=1e-4)
    head, _ = fit_ridge(features, targets, torch.arange(NUM_EXAMPLES).repeat(3))
    torch.testing.assert_close(head(features), expected, rtol=1e-4, atol=1e-4)


def test_ridge_does_not_look_at_where_the_head_was(data):
    first, second = (nn.Linear(FEATURE_SIZE, NUM_LABELS) for _ in range(2))
    nn.init.constant_(second.weight, 1e6)
    rows = torch.arange(NUM_EXAMPLES)
    for head in (first, second):
        gram = gram_matrix(data[0], rows)
        fit_ridge_head(head, data[0], rows, data[1].__getitem__, gram, alpha=0.01, logit_scale=10.0)
    assert torch.equal(first.weight, second.weight) and torch.equal(first.bias, second.bias)
    assert first.weight.requires_grad and first.weight.grad is None


@pytest.mark.parametrize(("num_labels", "k"), [(2, 1), (5, 5), (40, 4)])
def test_sparse_targets_give_the_same_ridge(num_labels, k, data, monkeypatch):
    sparse, dense = sparse_and_dense(num_labels, k)
    monkeypatch.setattr(linear_head, "_GRAM_ROWS", 11)
    first, second = (fit_ridge(data[0], targets, num_labels=num_labels) for targets in (sparse, dense))
    torch.testing.assert_close(first[0].weight, second[0].weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first[0].bias, second[0].bias, rtol=1e-5, atol=1e-5)
    assert first[1] == pytest.approx(second[1], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ridge_on_half_precision_features(dtype, data):
    features = data[0].to(dtype)
    first, second = fit_ridge(features, data[1]), fit_ridge(features.float(), data[1])
    assert torch.equal(first[0].weight, second[0].weight) and first[1] == second[1]


def test_fewer_rows_than_features():
    generator = torch.Generator().manual_seed(0)
    features, targets = torch.randn(5, 60, generator=generator), torch.eye(NUM_LABELS)
    head, loss = fit_ridge(features, targets)
    weight, bias = ridge_by_numpy(features.numpy(), targets.numpy(), 0.01, 10.0)
    np.testing.assert_allclose(head.weight.detach().numpy(), weight, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(head.bias.detach().numpy(), bias, rtol=1e-3, atol=1e-4)
    assert head(features).argmax(dim=1).tolist() == [0, 1, 2, 3, 4] and loss < 0.01


@pytest.mark.parametrize("constant", [0.0, 0.1, 7.3])
def test_a_constant_feature_says_nothing(constant, data):
    features = torch.cat([data[0], torch.full((NUM_EXAMPLES, 1), constant)], dim=1)
    head, loss = fit_ridge(features, data[1], alpha=0.08)
    # with one feature more the mean variance is smaller: 7/8 of what it was
    alone, expected = fit_ridge(data[0], data[1], alpha=0.08 * FEATURE_SIZE / (FEATURE_SIZE + 1))
    torch.testing.assert_close(head(features), alone(data[0]), rtol=1e-4, atol=1e-4)
    assert head.weight[:, -1].abs().max() < 1e-4 and loss == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("num_rows", [1, 6])
def test_rows_that_are_all_the_same_give_their_mean_pseudolabel(num_rows):
    # a level may keep one example: no direction says anything, so every example gets the mean pseudolabel
    features = torch.randn(1, 20, generator=torch.Generator().manual_seed(0)).repeat(num_rows, 1)
    targets = torch.eye(NUM_LABELS)[torch.arange(num_rows) % 2]
    head, loss = fit_ridge(features, targets)
    mean = targets.mean(dim=0)
    torch.testing.assert_close(head(features[:1])[0], 10 * mean, rtol=1e-3, atol=1e-3)
    assert loss == pytest.approx(cross_entropy_by_numpy(10 * mean[None].numpy(), mean[None].numpy()), rel=1e-3)


@pytest.mark.parametrize(("mean", "std"), [(10.0, 1.0), (100.0, 0.1)])
def test_features_far_from_zero_are_centred_exactly(mean, std):
    # x^T x is about n mean^2, of which the centred part is (std / mean)^2: one in a million in the second case, more
    # than a sum in float32 keeps
    generator = torch.Generator().manual_seed(0)
    features = mean + std * torch.randn(2000, 12, generator=generator)
    labels = (features[:, :NUM_LABELS] + std * torch.randn(2000, NUM_LABELS, generator=generator)).argmax(dim=1)
    targets = torch.eye(NUM_LABELS)[labels]
    head, _ = fit_ridge(features, targets)
    weight, bias = ridge_by_numpy(features.numpy(), targets.numpy(), 0.01, 10.0)
    error = np.abs(head.weight.detach().numpy() - weight).max() / np.abs(weight).max()
    assert error < 1e-2, f"weights are off by {error:.2g} of the largest"


@pytest.mark.parametrize("parts", [(20, 20), (39, 1), (40, 0)])
def test_ridge_over_two_processes(parts, data):
    # each has some of the rows; what is summed up over both is what one process sees
    features, targets = data
    shares = torch.arange(NUM_EXAMPLES).split(list(parts))
    gram = sum(gram_matrix(features, rows) for rows in shares)
    alone, expected = fit_ridge(features, targets)

    asked: list[list[torch.Tensor]] = []
    for rows in shares:  # once, to hear what each adds to the first sum
        asked.append([])

        def listen(values: torch.Tensor) -> torch.Tensor:
            asked[-1].append(values.clone())
            return values

        fit_ridge_head(
            head_of(NUM_LABELS),
            features,
            rows,
            targets.__getitem__,
            gram,
            alpha=0.01,
            logit_scale=10.0,
            sum_over_processes=listen,
        )
    assert [len(values) for values in asked] == [2, 2]
    losses: list[torch.Tensor] = []
    for rows in shares:  # again, with the first sum put in
        calls = iter(range(2))

        def add(values: torch.Tensor) -> torch.Tensor:
            if next(calls) == 0:  # noqa: B023
                return asked[0][0] + asked[1][0]
            losses.append(values.clone())
            return values

        head = head_of(NUM_LABELS)
        fit_ridge_head(
            head, features, rows, targets.__getitem__, gram, alpha=0.01, logit_scale=10.0, sum_over_processes=add
        )
        torch.testing.assert_close(head.weight, alone.weight, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(head.bias, alone.bias, rtol=1e-5, atol=1e-5)
    assert float(sum(losses)) / NUM_EXAMPLES == pytest.approx(expected, rel=1e-5)


def test_a_larger_scale_makes_a_surer_student(data):
    probs = [
        fit_ridge(*data, logit_scale=scale)[0](data[0]).softmax(dim=1).max(dim=1).values.mean().item()
        for scale in (1.0, 10.0)
    ]
    assert probs[0] < 0.5 < probs[1]


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])  # whose weight decay is another one
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("bias", [True, False])
def test_fused_adam_takes_the_same_steps(bias, weight_decay, kind, data):
    features, targets = data
    steps, found = draw_steps(30, (8, 3)), []
    for fused in (False, True):
        head = new_head(bias)
        optimizer = kind(head.parameters(), lr=1e-2, weight_decay=weight_decay, fused=fused)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step, 5) / 5)  # the first rate is 0
        if fused:
            fit_linear_head(head, features, lambda rows: targets[rows], steps, optimizer, scheduler)
        else:
            fit_by_autograd(head, features, targets, steps, optimizer, scheduler)
        found.append((head, optimizer))
    (plain, expected), (head, optimizer) = found
    for parameter, other in zip(head.parameters(), plain.parameters()):
        torch.testing.assert_close(parameter, other, rtol=0, atol=1e-6)
        for name in ("exp_avg", "exp_avg_sq", "step"):  # what a checkpoint of the optimizer would hold
            torch.testing.assert_close(
                optimizer.state[parameter][name], expected.state[other][name], rtol=1e-3, atol=1e-6
            )


def test_hooks_of_an_optimizer_are_called(data):
    for fused in (False, True):
        head = new_head()
        optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, fused=fused)
        calls: list[str] = []
        optimizer.register_step_pre_hook(lambda *_: calls.append("before"))  # noqa: B023
        optimizer.register_step_post_hook(lambda *_: calls.append("after"))  # noqa: B023
        fit_linear_head(
            head, data[0], lambda rows: data[1][rows], draw_steps(3, (4,)), optimizer, make_scheduler(optimizer, 3)
        )
        assert calls == ["before", "after"] * 3


def test_groups_of_their_own_keep_their_rates(data):
    # the bias learns, the weight does not
    for fused in (False, True):
        head = new_head()
        before = head.weight.detach().clone(), head.bias.detach().clone()
        groups = [{"params": [head.weight], "lr": 0.0}, {"params": [head.bias], "lr": 0.1}]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=fused)
        fit_linear_head(
            head, data[0], lambda rows: data[1][rows], draw_steps(5, (4,)), optimizer, make_scheduler(optimizer, 5)
        )
        assert torch.equal(head.weight, before[0]) and (head.bias - before[1]).abs().min() > 0.01


def test_the_number_of_threads_is_given_back(data):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for num_labels, expected in ((2, 1), (2**16, 2)):  # a small head, and one whose step two threads can share
            head, seen = nn.Linear(2, num_labels), []
            optimizer = torch.optim.SGD(head.parameters(), lr=0.1)

            def targets(rows, num_labels=num_labels, seen=seen):
                seen.append(torch.get_num_threads())
                if len(seen) == 2:
                    raise ZeroDivisionError
                return torch.full((len(rows), num_labels), 1 / num_labels)

            steps = [[torch.tensor([0])], [torch.tensor([1])]]
            with pytest.raises(ZeroDivisionError):
                fit_linear_head(head, torch.zeros(4, 2), targets, steps, optimizer, make_scheduler(optimizer, 2))
            assert seen == [expected] * 2 and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["cross_entropy", "generalized_cross_entropy"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_loss_that_is_given(name, bias, data):
    features, targets = data
    function, loss_and_gradient = choose_loss(name, {}, lambda: 0.0, (NUM_EXAMPLES, NUM_LABELS))
    steps, told = draw_steps(20, (8, 3)), []
    fast, slow = new_head(bias), new_head(bias)
    optimizer = make_optimizer("sgd", fast)
    fit_linear_head(
        fast,
        features,
        lambda rows: targets[rows],
        steps,
        optimizer,
        make_scheduler(optimizer, 20),
        loss=loss_and_gradient,
        on_step=lambda loss, norm: told.append(float(loss)),
    )
    optimizer, means = make_optimizer("sgd", slow), []
    scheduler = make_scheduler(optimizer, 20)
    for batches in steps:  # as any training script does
        optimizer.zero_grad()
        losses = [function(slow(features[rows]), targets[rows], rows).mean() / len(batches) for rows in batches]
        sum(losses).backward()
        means.append(sum(losses).item())
        optimizer.step()
        scheduler.step()
    torch.testing.assert_close(fast.weight, slow.weight, rtol=0, atol=2e-6)
    np.testing.assert_allclose(told, means, atol=2e-6)

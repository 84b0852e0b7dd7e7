"""The fast loop for a linear head against the plain one with autograd, on the same batches."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from hf_cosupervise.heads import fit_linear_head

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
    head: nn.Linear, features: torch.Tensor, targets: torch.Tensor, steps: list[list[torch.Tensor]],
    optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler, max_grad_norm: float = 0.0,
) -> list[tuple[float, float]]:  # fmt: skip
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
        head, torch.tensor([[2.0]]), lambda rows: torch.tensor([[1.0, 0.0]])[rows], [[torch.tensor([0])]], optimizer,
        torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0), max_grad_norm=1e9,
        on_step=lambda loss, norm: told.append((float(loss), norm)),
    )  # fmt: skip
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
            head, features, lambda rows: targets[rows], [[half]], optimizer, make_scheduler(optimizer, 1),
            average_gradients=lambda gradient: gradients[-1].append(gradient.clone()),
        )  # fmt: skip
    means = iter([(first + second) / 2 for first, second in zip(*gradients)])

    def put_mean(gradient: torch.Tensor) -> None:
        gradient.copy_(next(means))

    together, alone = new_head(), new_head()
    for head, rows, average in ((together, step[:4], put_mean), (alone, step, None)):
        optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
        fit_linear_head(
            head, features, lambda rows: targets[rows], [[rows]], optimizer, make_scheduler(optimizer, 10),
            average_gradients=average, max_grad_norm=0.3,
        )  # fmt: skip
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
        head, features, lambda rows: targets[rows], steps(), optimizer, make_scheduler(optimizer, 3),
        on_step=lambda loss, norm: events.append("done"),
    )  # fmt: skip
    assert events == ["ask", "done"] * 3


def test_fits_what_a_line_can_separate():
    # a smoke test of the whole: four points, four labels
    features, targets = torch.eye(4), torch.eye(4)
    head = nn.Linear(4, 4)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    steps = [[torch.arange(4)] for _ in range(200)]
    losses = []
    fit_linear_head(
        head, features, lambda rows: targets[rows], steps, optimizer, make_scheduler(optimizer, 200),
        on_step=lambda loss, norm: losses.append(float(loss)),
    )  # fmt: skip
    assert losses[-1] < 0.02 < 1.0 < losses[0]
    assert head(features).argmax(dim=1).tolist() == [0, 1, 2, 3]

"""The ridge penalty that is found from pseudolabels: closed form against fits, and data that tells nothing."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from hf_cosupervise.method.linear_head import fit_ridge_head, gram_matrix, linear_logits
from hf_cosupervise.method.ridge import (
    MAX_LEFT_OUT,
    RIDGE_ALPHAS,
    choose_ridge_alpha,
    draw_left_out,
    left_out_predictions,
)

NUM_LABELS = 3


def draw(num_rows: int, size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features far from zero, and soft pseudolabels that follow them with noise; float64."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_rows, size, generator=generator, dtype=torch.float64) + 2
    direction = torch.randn(size, NUM_LABELS, generator=generator, dtype=torch.float64)
    noise = torch.randn(num_rows, NUM_LABELS, generator=generator, dtype=torch.float64)
    return features, torch.softmax((features - 2) @ direction + noise, dim=1)


def sums(features: torch.Tensor, targets: torch.Tensor, origin: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Gram matrix and cross products, written down."""
    whole = torch.cat([features - origin, torch.ones(len(features), 1)], dim=1).double()
    return whole.T @ whole, whole.T @ targets.double()


def refit(features: torch.Tensor, targets: torch.Tensor, penalty: torch.Tensor, bias: bool, row: int) -> torch.Tensor:
    """Fit to all other rows, then predict this one."""
    inputs = torch.cat([features, torch.ones(len(features), 1)], dim=1) if bias else features
    others = torch.arange(len(features)) != row
    penalties = torch.full((inputs.shape[1],), float(penalty), dtype=torch.float64)
    if bias:
        penalties[-1] = 0
    own = inputs[others]
    return inputs[row] @ torch.linalg.solve(own.T @ own + penalties.diag(), own.T @ targets[others])


def choose(
    features: torch.Tensor, targets: torch.Tensor, left_out: torch.Tensor | None = None, origin: float = 0.0, **more
) -> float:
    gram, cross = sums(features, targets, origin=origin)
    rows = torch.arange(len(features)) if left_out is None else left_out
    start = torch.full((features.shape[1],), origin)
    return choose_ridge_alpha(features, targets.__getitem__, rows, gram, cross, start, **more)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("num_rows", "size"), [(25, 4), (9, 14), (3, 2)])
def test_closed_form_equals_fits_without_the_row(num_rows, size, bias, hard):
    features, targets = draw(num_rows, size)
    targets = torch.eye(NUM_LABELS).double()[targets.argmax(dim=1)] if hard else targets
    centred = features - (features.mean(dim=0) if bias else 0)
    strength = centred.square().sum(dim=0).mean()
    found = left_out_predictions(features, targets, *sums(features, targets), bias=bias)
    for (number, alpha), row in itertools.product(enumerate(RIDGE_ALPHAS), range(num_rows)):
        expected = refit(features, targets, alpha * strength, bias, row)
        torch.testing.assert_close(found[number, row], expected, rtol=0, atol=1e-8)


def test_a_row_worked_by_hand():
    # Centred: slope 1 / (2 + 1), mean 1/3. Residuals 0, -1/3, 1/3; leverages 2/3, 1/3, 2/3; so 0, -1/2, 1 left out.
    features, targets = torch.tensor([[-1.0], [0.0], [1.0]]).double(), torch.tensor([[0.0], [0.0], [1.0]]).double()
    found = left_out_predictions(features, targets, *sums(features, targets), [0.5])
    torch.testing.assert_close(found.flatten(), torch.tensor([0.0, 0.5, 0.0]).double())


@pytest.mark.parametrize("bias", [True, False])
def test_the_penalty_is_the_heads(bias):
    features, targets = draw(40, 6)
    features, targets = features.float(), targets.float()
    rows, head = torch.arange(40), nn.Linear(6, NUM_LABELS, bias=bias)
    gram = gram_matrix(features, rows)
    fit_ridge_head(head, features, rows, targets.__getitem__, gram, alpha=0.1, logit_scale=10.0)
    fitted = (targets - linear_logits(head, features) / 10).detach()
    [found] = left_out_predictions(features, targets, *sums(features, targets), [0.1], bias=bias)
    # Both residuals of a row differ by one factor, 1 - h, whatever the label.
    assert ((targets - found)[:, :1] * fitted - fitted[:, :1] * (targets - found)).abs().max() < 1e-5
    assert ((targets - found).abs() >= fitted.abs()).all()


def test_all_are_judged_by_fits_to_all_rows_whichever_are_left_out():
    features, targets = draw(30, 5)
    gram, cross = sums(features, targets)
    some = torch.tensor([3, 29, 7])
    whole = left_out_predictions(features, targets, gram, cross)
    torch.testing.assert_close(left_out_predictions(features[some], targets[some], gram, cross), whole[:, some])


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_that_of_fits_and_of_no_order(seed):
    features, targets = draw(20, 12, seed)
    strength = (features - features.mean(dim=0)).square().sum(dim=0).mean()
    errors = []
    for alpha in RIDGE_ALPHAS:
        left_out = [refit(features, targets, alpha * strength, True, row) for row in range(20)]
        errors.append((torch.stack(left_out) - torch.eye(NUM_LABELS)[targets.argmax(dim=1)]).square().sum())
    expected = RIDGE_ALPHAS[torch.stack(errors).argmin()]
    order = torch.randperm(20, generator=torch.Generator().manual_seed(seed))
    assert choose(features, targets) == choose(features[order], targets[order]) == expected


@pytest.mark.parametrize("bias", [True, False])
def test_what_was_taken_off_the_features_changes_nothing(bias):
    features, targets = draw(20, 12)
    found = {choose(features, targets, origin=origin, bias=bias) for origin in (0.0, 1.5)}
    assert len(found) == 1


def clusters(num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features that tell the label almost exactly, these labels, and labels that have nothing to do with them."""
    generator = torch.Generator().manual_seed(0)
    clear, noisy = torch.eye(NUM_LABELS).double()[torch.randint(NUM_LABELS, (2, num_rows), generator=generator)]
    return clear + 1e-3 * torch.randn(num_rows, NUM_LABELS, generator=generator), clear, noisy


def test_noise_wants_a_strong_penalty_and_a_clear_rule_a_weak_one():
    features, clear, noisy = clusters(60)
    assert choose(features, noisy) == max(RIDGE_ALPHAS)
    assert choose(features, clear) == min(RIDGE_ALPHAS)


def test_two_processes_choose_what_one_does():
    features, targets = draw(31, 12)
    shares, parts = torch.arange(31).split(16), {}
    for number, rows in enumerate(shares):
        choose(features, targets, rows, sum_over_processes=lambda own, number=number: parts.setdefault(number, own))
    for rows, other in zip(shares, (parts[1], parts[0])):
        found = choose(features, targets, rows, sum_over_processes=lambda own, other=other: own + other)
        assert found == choose(features, targets)


@pytest.mark.parametrize(
    ("features", "labels"),
    [
        (torch.full((8, 3), 2.0), [0, 1, 2, 0, 1, 2, 0, 1]),  # constant features
        (torch.zeros(8, 3), [0, 1, 2, 0, 1, 2, 0, 1]),
        (torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), [1] * 8),  # one class
        (torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), [0, 1]),  # too few rows
        (torch.randn(1, 3, generator=torch.Generator().manual_seed(0)), [0]),
    ],
)
def test_what_tells_nothing_gets_the_strongest_penalty(features, labels):
    targets = torch.eye(NUM_LABELS)[torch.tensor(labels)]
    assert choose(features, targets) == max(RIDGE_ALPHAS)


def test_left_out_rows_are_drawn_once_and_by_the_seed():
    rows = torch.arange(10_000)[::2]
    drawn = draw_left_out(rows, seed=3)
    assert len(drawn) == len(drawn.unique()) == MAX_LEFT_OUT and (drawn % 2 == 0).all() and (drawn.diff() > 0).all()
    assert drawn.equal(draw_left_out(rows, seed=3)) and not drawn.equal(draw_left_out(rows, seed=4))
    assert draw_left_out(rows[:MAX_LEFT_OUT], seed=3).equal(rows[:MAX_LEFT_OUT])

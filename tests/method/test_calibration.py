"""Temperatures: worked out by hand, found by a slow search, and known before."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_cosupervise.method.calibration import apply_temperature, fit_temperature


def sample(temperature: float, num_examples: int, num_labels: int, seed: int = 0):
    """Labels drawn from softmax(s), and the probabilities of a teacher that says softmax(T s) instead."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(num_examples, num_labels, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
    return (temperature * logits).softmax(dim=1), labels


def slow_loss(probs: np.ndarray, labels: np.ndarray, temperature: float, min_prob: float = 1e-6) -> float:
    total = 0.0
    for row, label in zip(probs, labels):
        powers = [max(p, min_prob) ** (1 / temperature) for p in row]
        total -= math.log(powers[label] / sum(powers))
    return total / len(labels)


# ── by hand ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("row", "labels", "expected"),
    [
        ([0.8, 0.2], [0, 0, 1], 2.0),  # says 4 to 1 and is right 2 to 1: 4 ** (1 / 2)
        ([0.8, 0.2], [0, 0, 0, 0, 1], 1.0),
        ([0.8, 0.2], [0] * 16 + [1], 0.5),  # right 16 to 1: 4 ** 2
        ([0.8, 0.2], [0, 1], 20.0),  # right by chance: infinity, as far as it goes
        ([0.8, 0.2], [1], 20.0),
        ([0.8, 0.2], [0], 0.05),
        ([0.25, 0.25, 0.25, 0.25], [0, 3], 1.0),  # every temperature is as good
        # right on 8 of 9, the two others alike: each of them a ninth of what the first has, 16 ** (1 / T) = 16
        ([16 / 18, 1 / 18, 1 / 18], [0] * 16 + [1, 2], 1.0),
        # one-hot, right 3 times of 4: (1e6) ** (1 / T) = 9 with three labels
        ([1.0, 0.0, 0.0], [0, 0, 0, 1], math.log(1e6) / math.log(6)),
    ],
)
def test_a_row_worked_out_by_hand(row, labels, expected):
    probs = torch.tensor([row], dtype=torch.float64).repeat(20 * len(labels), 1)
    assert fit_temperature(probs, torch.tensor(labels * 20)) == pytest.approx(expected, rel=1e-9)


def test_apply_by_hand():
    probs = torch.tensor([[0.8, 0.2], [0.0, 0.0], [0.5, 0.5]])
    torch.testing.assert_close(apply_temperature(probs, 2.0), torch.tensor([[2 / 3, 1 / 3], [0, 0], [0.5, 0.5]]))
    torch.testing.assert_close(apply_temperature(probs, 0.5), torch.tensor([[16 / 17, 1 / 17], [0, 0], [0.5, 0.5]]))
    torch.testing.assert_close(apply_temperature(probs, 1.0), probs)
    hard = apply_temperature(torch.tensor([[1.0, 0.0]], dtype=torch.float64), 2.0, min_prob=1e-4)
    assert hard.tolist() == [pytest.approx([100 / 101, 1 / 101])]
    assert apply_temperature(probs.half(), 2.0).dtype == torch.float32
    assert apply_temperature(probs[:0], 2.0).shape == (0, 2)


# ── in general ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("num_labels", "temperature", "min_prob"), [(2, 3.0, 1e-6), (5, 0.4, 1e-3), (10, 8.0, 1e-6)])
def test_no_other_temperature_is_better(num_labels, temperature, min_prob):
    probs, labels = sample(temperature, 60, num_labels)
    found = fit_temperature(probs, labels, min_prob=min_prob)
    best = slow_loss(probs.numpy(), labels.numpy(), found, min_prob)
    grid = np.geomspace(0.05, 20, 150)
    losses = [slow_loss(probs.numpy(), labels.numpy(), other, min_prob) for other in grid]
    assert best <= min(losses) + 1e-12
    assert found == pytest.approx(grid[np.argmin(losses)], rel=0.05)
    applied = apply_temperature(probs, found, min_prob)
    assert float(-applied.gather(1, labels[:, None]).log().mean()) == pytest.approx(best)


@pytest.mark.parametrize("num_labels", [2, 10])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_known_temperature_is_found_again(temperature, num_labels):
    probs, labels = sample(temperature, 20_000, num_labels)
    assert fit_temperature(probs, labels, min_prob=1e-12) == pytest.approx(temperature, rel=0.05)


def test_one_hot_rows_get_the_confidence_that_they_deserve():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(4, (200,), generator=generator)
    said = torch.where(torch.arange(200) < 150, truth, (truth + 1) % 4)
    probs = torch.nn.functional.one_hot(said, 4).float()
    softened = apply_temperature(probs, fit_temperature(probs, truth))
    torch.testing.assert_close(softened.amax(dim=1), torch.full((200,), 0.75))
    assert softened.argmax(dim=1).tolist() == said.tolist()


def test_order_does_not_matter_and_precision_little():
    probs, labels = sample(3.0, 100, 5)
    found, order = fit_temperature(probs, labels), torch.randperm(100, generator=torch.Generator().manual_seed(1))
    assert fit_temperature(probs[order], labels[order]) == pytest.approx(found, rel=1e-12)
    assert fit_temperature(probs.float(), labels) == pytest.approx(found, rel=1e-5)
    columns = torch.tensor([3, 0, 4, 1, 2])
    assert fit_temperature(probs[:, columns], columns.argsort()[labels]) == pytest.approx(found, rel=1e-12)


# ── what does not do ────────────────────────────────────────────────────────────────────────────────────────────────


def test_too_few_examples():
    probs, labels = sample(1.0, 9, 3)
    with pytest.raises(ValueError) as error:
        fit_temperature(probs, labels)
    assert str(error.value) == (
        "A temperature needs 10 labelled examples with an answer, got 9. Label more, or leave the probabilities as "
        "they are."
    )


def spoil(probs: torch.Tensor, value: float) -> torch.Tensor:
    probs = probs.clone()
    probs[3, 1] = value
    return probs


def test_what_are_no_probabilities_or_labels():
    probs, labels = sample(1.0, 12, 3)
    for wrong in (spoil(probs, math.nan), spoil(probs, -0.5), 2 * probs, probs * (torch.arange(12) > 0)[:, None]):
        with pytest.raises(ValueError, match="Leave out examples without an answer"):
            fit_temperature(wrong, labels)
    for wrong in (labels + 1, labels - 1):
        with pytest.raises(ValueError, match=r"Labels must lie in 0..2, got "):
            fit_temperature(probs, wrong)
    for wrong in (labels[:5], labels.double(), labels[:, None]):
        with pytest.raises(ValueError, match="Labels must be label ids of shape"):
            fit_temperature(probs, wrong)
    with pytest.raises(ValueError, match="two labels or more"):
        fit_temperature(torch.ones(12, 1), labels * 0)
    for wrong in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"`min_prob` must be in \(0, 1\)"):
            fit_temperature(probs, labels, min_prob=wrong)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_what_is_no_temperature(temperature):
    with pytest.raises(ValueError, match="`temperature` must be a number above 0, got"):
        apply_temperature(torch.tensor([[0.5, 0.5]]), temperature)


def test_apply_refuses_what_are_no_probabilities():
    for wrong in (math.nan, -0.1):
        with pytest.raises(ValueError, match="Give probabilities, not logits"):
            apply_temperature(torch.tensor([[0.5, wrong]]), 2.0)
    with pytest.raises(ValueError, match="`min_prob` must be in"):
        apply_temperature(torch.tensor([[0.5, 0.5]]), 2.0, min_prob=0.0)

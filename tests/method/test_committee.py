"""A committee of linear heads: worked by hand, against a slow version, and what must not change it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_cosupervise.method.committee import (
    average_heads,
    average_share,
    collapsed_members,
    committee_head,
    measure_members,
    member_agreement,
    routing_gain,
)

NUM_ROWS, SIZE, NUM_LABELS, NUM_MEMBERS = 50, 6, 4, 3


@pytest.fixture()
def features() -> torch.Tensor:
    return torch.randn(NUM_ROWS, SIZE, generator=torch.Generator().manual_seed(0)) + 1


@pytest.fixture()
def heads() -> tuple[torch.Tensor, torch.Tensor]:
    """Members whose logits differ in size and have a mean over labels of their own."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.tensor([0.1, 1.0, 30.0])[:, None, None]
    weights = sizes * (torch.randn(NUM_MEMBERS, NUM_LABELS, SIZE, generator=generator) + 0.5)
    return weights, sizes[:, :, 0] * (torch.randn(NUM_MEMBERS, NUM_LABELS, generator=generator) + 3)


def logits_of(features: torch.Tensor, weights: torch.Tensor, biases: torch.Tensor | None) -> torch.Tensor:
    """`(num_members, num_rows, num_labels)`."""
    logits = torch.einsum("nf,mcf->mnc", features, weights)
    return logits if biases is None else logits + biases.unsqueeze(1)


def standardise_slowly(logits: torch.Tensor) -> np.ndarray:
    """The mean of the members, entry by entry."""
    total = np.zeros(logits.shape[1:])
    for member in logits.double().numpy():
        rows = [row - sum(row) / len(row) for row in member]
        entries = [entry for row in rows for entry in row]
        mean = sum(entries) / len(entries)
        deviation = (sum((entry - mean) ** 2 for entry in entries) / len(entries)) ** 0.5
        total += np.array(rows) / deviation
    return total / len(logits)


def test_worked_by_hand():
    # Rows less their mean: (1, -1) and (-2, 2); (3, -3) and (3, -3). Spreads sqrt(10 / 4) and 3.
    logits = torch.tensor([[[2.0, 0.0], [0.0, 4.0]], [[6.0, 0.0], [5.0, -1.0]]])
    spreads, counts = measure_members([logits])
    torch.testing.assert_close(spreads, torch.tensor([2.5**0.5, 3.0], dtype=torch.float64))
    assert counts.tolist() == [[1, 1], [2, 0]]
    weight, bias = average_heads(
        torch.tensor([[[2.0], [0.0]], [[6.0], [0.0]]]), torch.zeros(2, 2), spreads, torch.ones(2)
    )
    torch.testing.assert_close(weight.flatten(), torch.tensor([1.0, -1.0]) * (1 / 2.5**0.5 + 1) / 2)
    assert bias.tolist() == [0, 0]


@pytest.mark.parametrize("bias", [True, False])
def test_one_head_gives_the_mean_of_standardised_logits(features, heads, bias):
    weights, biases = heads[0], heads[1] if bias else None
    logits = logits_of(features, weights, biases)
    spreads, _ = measure_members([logits])
    weight, own_bias = average_heads(weights, biases, spreads, torch.ones(NUM_MEMBERS))
    assert (own_bias is None) is not bias
    found = features @ weight.T if own_bias is None else features @ weight.T + own_bias
    np.testing.assert_allclose(found.numpy(), standardise_slowly(logits), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [1, 7, 50])
def test_chunks_and_their_order_change_nothing(features, heads, size):
    logits = logits_of(features, *heads)
    spreads, counts = measure_members([logits])
    own_spreads, own_counts = measure_members(list(logits.split(size, dim=1))[::-1])
    torch.testing.assert_close(own_spreads, spreads)
    assert own_counts.equal(counts)
    assert counts.equal(torch.stack([torch.bincount(row, minlength=NUM_LABELS) for row in logits.argmax(dim=2)]))


def test_the_order_of_members_and_the_size_of_one_change_no_label(features, heads):
    (weights, biases), features = (values.double() for values in heads), features.double()
    sizes, order = torch.tensor([100.0, 1.0, 0.01]).double(), [2, 0, 1]
    expected = committee_head(weights, biases, features)
    found = committee_head((weights * sizes[:, None, None])[order], (biases * sizes[:, None])[order], features)
    spreads = [one.statistics.spreads[one.speaks].log().mean().exp() for one in (found, expected)]
    for name in ("weight", "bias"):
        torch.testing.assert_close(
            getattr(found, name), spreads[0] / spreads[1] * getattr(expected, name), rtol=1e-5, atol=1e-5
        )
    same = committee_head(5 * weights, 5 * biases, features)
    torch.testing.assert_close(same.weight, 5 * expected.weight, rtol=1e-5, atol=1e-5)


def test_a_committee_is_the_scaled_average_of_those_who_speak(features, heads):
    (weights, biases), features = heads, features - 1
    biases = 0 * biases  # or labels would be rare anyway
    always = torch.zeros(1, NUM_LABELS).index_fill(1, torch.tensor([2]), 50.0)
    weights, biases = torch.cat([weights, 0.01 * weights[:1]]), torch.cat([biases, always])
    logits = logits_of(features, weights, biases)
    found = committee_head(weights, biases, features)
    assert found.speaks.tolist() == [True, True, True, False]
    mean_logits = torch.from_numpy(standardise_slowly(logits[:3]))
    scale = found.statistics.spreads[:3].prod() ** (1 / 3)
    own = features.double() @ found.weight.double().T + found.bias
    torch.testing.assert_close(own, scale * mean_logits, rtol=0, atol=1e-5)


def test_a_committee_of_one_is_that_member(features, heads):
    weights, biases = heads
    found = committee_head(weights[2:], biases[2:], features)
    assert found.weight.equal(weights[2]) and found.bias.equal(biases[2])
    found = committee_head(weights[:1], None, features)
    assert found.weight.equal(weights[0]) and found.bias is None


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([[50, 50], [60, 40], [96, 4]], [False, False, True]),
        ([[50, 50], [60, 40], [95, 5]], [False, False, False]),  # a tenth of a half of 100 is not less
        ([[99, 1], [97, 3], [96, 4]], [False, False, False]),  # a rare label
        ([[99, 1], [97, 3], [50, 50], [50, 50]], [False] * 4),  # half of them: it may be rare
        ([[99, 1], [50, 50]], [False, False]),
        ([[100, 0]], [False]),
        ([[0, 30, 30], [30, 0, 30], [20, 20, 20]], [True, True, False]),
        ([[0, 30, 30], [30, 0, 30], [30, 30, 0]], [False] * 3),
    ],
)
def test_a_member_that_lost_a_label_that_others_have_is_flagged(counts, expected):
    assert collapsed_members(torch.tensor(counts)).tolist() == expected


def test_agreement_counts_pairs():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (40, 5), generator=generator)
    expected = [
        np.mean([row[one] == row[other] for one in range(5) for other in range(one)]) for row in labels.numpy()
    ]
    np.testing.assert_allclose(member_agreement(labels).numpy(), expected, rtol=1e-6)
    assert member_agreement(labels[:, :1]).tolist() == [1.0] * 40


def test_what_did_not_learn_is_refused(features, heads):
    weights, biases = heads
    spreads = torch.ones(NUM_MEMBERS)
    for wrong in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`spreads` must be finite and above 0, got .*Leave out members"):
            average_heads(weights, biases, spreads * torch.tensor([1.0, wrong, 1.0]), spreads)
    logits = logits_of(features, *heads)
    with pytest.raises(ValueError, match="Logits must be finite, got NaN or infinity"):
        measure_members([torch.where(logits > logits.amax() - 1, torch.inf, logits)])


def test_members_count_by_their_shares(features, heads):
    """Against a committee in which one member stands three times."""
    spreads, _ = measure_members([logits_of(features, *heads)])
    shares = torch.tensor([1.0, 3.0, 1.0])
    weight, bias = average_heads(*heads, spreads, shares)
    often = torch.tensor([0, 1, 1, 1, 2])
    own, own_bias = average_heads(heads[0][often], heads[1][often], spreads[often], torch.ones(5))
    torch.testing.assert_close(weight, own)
    torch.testing.assert_close(bias, own_bias)


@pytest.mark.parametrize("num_teachers", [1, 3])
def test_what_is_gained_by_choosing_slowly(num_teachers):
    generator = torch.Generator().manual_seed(num_teachers)

    def draw(*shape: int, lowest: int = -1) -> torch.Tensor:
        return torch.randint(lowest, 3, shape, generator=generator)

    labels, votes, averaged = draw(40, lowest=0), draw(40, num_teachers), draw(40)
    neighbors = torch.stack([torch.randperm(40, generator=generator)[:4] for _ in range(40)])
    found = []
    for row in range(40):
        scores = []
        for teacher in range(num_teachers):
            told = [int(near) for near in neighbors[row] if votes[near, teacher] >= 0]
            right = sum(int(votes[near, teacher]) == int(labels[near]) for near in told)
            scores.append(right / max(len(told), 1) if votes[row, teacher] >= 0 else -1.0)
        if max(scores) < 0:
            continue
        chosen = scores.index(max(scores))
        found.append(int(votes[row, chosen] == labels[row]) - int(averaged[row] == labels[row]))
    assert routing_gain(labels, votes, averaged, neighbors) == pytest.approx(sum(found) / len(found))
    assert routing_gain(labels, torch.full_like(votes, -1), averaged, neighbors) == 0


@pytest.mark.parametrize("is_regional", [True, False])
def test_choosing_pays_where_teachers_are_good_at_regions(is_regional):
    """Teachers that are right in a third of the examples, and by chance elsewhere; or everywhere alike."""
    generator, num_rows = torch.Generator().manual_seed(0), 600
    labels, region = torch.randint(0, 3, (num_rows,), generator=generator), torch.arange(num_rows) * 3 // num_rows
    skill = (
        torch.where(region[:, None] == torch.arange(3), 0.9, 0.1) if is_regional else torch.full((num_rows, 3), 0.6)
    )
    knows = torch.rand(num_rows, 3, generator=generator) < skill
    votes = torch.where(knows, labels[:, None], torch.randint(0, 3, (num_rows, 3), generator=generator))
    averaged = torch.nn.functional.one_hot(votes, 3).sum(dim=1).argmax(dim=1)
    neighbors = (torch.arange(num_rows)[:, None] + torch.arange(1, 11)) % num_rows
    gain = routing_gain(labels, votes, averaged, neighbors)
    assert gain > 0.1 if is_regional else gain < -0.05
    assert average_share(gain) == pytest.approx(1 / 3 if is_regional else 3)

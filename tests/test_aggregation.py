"""Several teachers into one pseudolabel: rows worked out by hand."""

from __future__ import annotations

import pytest
import torch

from hf_cosupervise.aggregation import majority_vote, mean_probs


@pytest.mark.parametrize(
    ("teachers", "answered", "expected"),
    [
        ([[1.0, 0.0], [0.5, 0.5]], [True, True], [0.75, 0.25]),
        ([[1.0, 0.0], [0.0, 0.0]], [True, False], [1.0, 0.0]),  # a missing row does not pull the mean down
        ([[0.0, 0.0], [0.0, 0.0]], [False, False], [0.0, 0.0]),
        ([[0.25, 0.75]], [True], [0.25, 0.75]),  # one teacher is itself
        ([[1.0, 0.0], [0.25, 0.75], [0.25, 0.75]], [True, True, True], [0.5, 0.5]),
    ],
)
def test_mean_probs(teachers, answered, expected):
    found = mean_probs(torch.tensor([teachers]), torch.tensor([answered]))
    assert found.tolist() == [expected]


def test_mean_probs_of_several_rows_sum_to_one_or_zero():
    generator = torch.Generator().manual_seed(0)
    answered = torch.rand(200, 3, generator=generator) < 0.6
    probs = torch.randn(200, 3, 7, generator=generator).softmax(-1) * answered.unsqueeze(-1)
    sums = mean_probs(probs, answered).sum(-1)
    torch.testing.assert_close(sums, answered.any(1).float())
    assert 0 < int(answered.any(1).sum()) < 200


@pytest.mark.parametrize(
    ("labels", "num_labels", "expected"),
    [
        ([2, 1, 2], 3, [0, 0, 1]),
        ([2, 1, 0], 3, [1, 0, 0]),  # a tie of all: the lowest label
        ([2, 1, -1], 3, [0, 1, 0]),  # a tie of two, one missing
        ([2, 2, 1, 1, 0], 3, [0, 1, 0]),
        ([-1, -1, 2], 3, [0, 0, 1]),
        ([-1, -1], 3, [0, 0, 0]),  # nobody: all zero
        ([-1, -1, 0, 1, 1], 2, [0, 1]),  # missing answers are no votes for label 0
        ([1], 2, [0, 1]),
    ],
)
def test_majority_vote(labels, num_labels, expected):
    found = majority_vote(torch.tensor([labels]), num_labels)
    assert found.tolist() == [expected] and found.is_floating_point()


def test_no_examples():
    assert mean_probs(torch.zeros(0, 2, 3), torch.zeros(0, 2, dtype=torch.bool)).shape == (0, 3)
    assert majority_vote(torch.zeros(0, 2, dtype=torch.long), 3).shape == (0, 3)

"""Which rows a student may label itself, by hand-written rows."""

from __future__ import annotations

import pytest
import torch

from hf_cosupervise.method.self_training import growing_share, select_surest, why_stop

ENTROPY = torch.tensor([0.5, 0.1, 0.4, 0.2, 0.3, 0.6])


@pytest.mark.parametrize(
    "labels, candidates, share, chosen",
    [
        ([0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1], 1.0, [0, 1, 2, 3, 4, 5]),
        ([0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1], 0.5, [1, 2, 3, 4]),  # rounded up, so that no label is left out
        ([0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1], 1.0, [1, 3, 4, 5]),  # three of the first are its fair part
        ([0, 0, 0, 0, 0, 1], [1, 0, 1, 0, 1, 0], 1.0, [2, 4]),  # what is no candidate counts nowhere
        ([0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0], 1.0, []),
        ([0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1], 0.0, []),
    ],
)
def test_the_surest_of_each_label_and_no_label_crowds_out_the_others(labels, candidates, share, chosen):
    candidates = torch.tensor(candidates, dtype=torch.bool)
    found = select_surest(ENTROPY, torch.tensor(labels), candidates, share, num_labels=2)
    assert found.nonzero().flatten().tolist() == chosen


def test_ties_go_to_the_first_rows():
    found = select_surest(torch.zeros(5), torch.zeros(5, dtype=torch.long), torch.ones(5, dtype=torch.bool), 0.8, 2)
    assert found.tolist() == [True, True, False, False, False]


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"share": 1.5}, r"`share` must lie in 0\.\.1, got 1\.5\. Use 1 for each label's fair part\."),
        (
            {"labels": torch.zeros(3)},
            r"must have one shape \(num_examples,\), got \[\(6,\), \(3,\), \(6,\)\]\. Give all",
        ),
    ],
)
def test_what_cannot_be_chosen_from_is_refused(change, sentence):
    given = {"labels": torch.zeros(6), "candidates": torch.ones(6, dtype=torch.bool), "share": 1.0, "num_labels": 2}
    with pytest.raises(ValueError, match=sentence):
        select_surest(ENTROPY, **given | change)


@pytest.mark.parametrize(
    "agreement, best, change, stops",
    [
        (0.9, None, None, False),  # the first round has nothing to compare with
        (0.9, 0.92, 0.005, False),
        (0.899, 0.92, 0.5, True),
        (0.99, 0.92, 0.0049, True),
        (None, 0.92, 0.5, False),
    ],
)
def test_it_stops_where_labels_settle_or_opinions_part(agreement, best, change, stops):
    assert (why_stop(agreement, best, change) is not None) is stops


def test_shares_grow_to_all():
    assert [growing_share(round, 5) for round in range(5)] == [0.5, 0.625, 0.75, 0.875, 1.0]

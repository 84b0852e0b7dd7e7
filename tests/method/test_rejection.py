"""Which pseudolabels are kept: rows worked out by hand. Random cases are compared in `test_slow_method.py`."""

from __future__ import annotations

import math

import pytest
import torch

from hf_cosupervise.method.rejection import (
    check_top_k_value,
    default_top_k,
    in_top_k,
    parent_confident,
    pseudolabel_loss,
    select_by_loss_rank,
    select_consistent,
)


def mask(text: str) -> torch.Tensor:
    return torch.tensor([letter == "x" for letter in text], dtype=torch.bool)


# ── k ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("num_labels", "expected"), [(2, 1), (3, 2), (4, 3), (5, 3), (1000, 3)])
def test_default_top_k(num_labels, expected):
    assert default_top_k(num_labels) == expected
    check_top_k_value(expected, num_labels)


@pytest.mark.parametrize(("k", "num_labels"), [(2, 2), (3, 3), (4, 3), (0, 5), (-1, 5)])
def test_k_that_rejects_nothing_is_refused(k, num_labels):
    with pytest.raises(ValueError, match=rf"1\.\.{num_labels - 1}.*got {k}\b.*{default_top_k(num_labels)}"):
        check_top_k_value(k, num_labels)


# ── agreement ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("row", "k", "expected"),
    [
        ([0.1, 0.6, 0.3], 1, [False, True, False]),
        ([0.1, 0.6, 0.3], 2, [False, True, True]),
        ([0.25, 0.5, 0.25], 2, [True, True, False]),  # labels 0 and 2 tie for the second place: the lowest
        ([0.25, 0.25, 0.25, 0.25], 1, [True, False, False, False]),
        ([0.25, 0.25, 0.25, 0.25], 3, [True, True, True, False]),
        ([0.0, 1.0, 0.0], 2, [True, True, False]),
        ([0.5, 0.5], 1, [True, False]),
    ],
)
def test_in_top_k(row, k, expected):
    labels = torch.arange(len(row))
    rows = torch.tensor([row]).expand(len(row), -1)
    assert in_top_k(rows, labels, k).tolist() == expected
    assert in_top_k(rows.log(), labels, k).tolist() == expected  # also with -inf


def test_pseudolabel_loss_reads_the_hard_label():
    log_probs = torch.tensor([[0.25, 0.75], [0.5, 0.5], [1.0, 0.0]]).log()
    found = pseudolabel_loss(log_probs, torch.tensor([0, 1, 1])).tolist()
    assert found == pytest.approx([math.log(4), math.log(2), math.inf])


# ── loss rank ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("losses", "num_keep", "candidates", "expected"),
    [
        ([0.5, 0.1, 0.3], 2, None, ".xx"),
        ([0.1, 0.1, 0.1], 2, None, "xx."),  # ties by row
        ([0.5, 0.1, 0.5, 0.5], 2, None, "xx.."),
        ([0.5, 0.1, 0.3], 2, "x.x", "x.x"),  # the lowest loss is no candidate
        ([0.5, 0.1, 0.3], 0, None, "..."),
        ([0.5, 0.1, 0.3], 3, None, "xxx"),
        ([math.inf, math.inf, 0.1], 2, ".xx", ".xx"),  # an infinite loss is no sign of a row without label
        ([0.2], 1, None, "x"),
        ([], 0, None, ""),
    ],
)
def test_select_by_loss_rank(losses, num_keep, candidates, expected):
    candidates = None if candidates is None else mask(candidates)
    found = select_by_loss_rank(torch.tensor(losses), num_keep, candidates)
    assert found.tolist() == mask(expected).tolist() and found.dtype == torch.bool


def test_ties_by_row_in_a_long_list():
    # an unstable sort passes every short list
    losses = torch.zeros(5000)
    losses[::2] = 1.0
    keep = select_by_loss_rank(losses, 3000)
    assert keep[1::2].all() and keep[::2].nonzero().squeeze(1).tolist() == list(range(500))


@pytest.mark.parametrize(("num_keep", "candidates", "limit"), [(4, None, 3), (3, "x.x", 2), (-1, None, 3)])
def test_num_keep_out_of_range(num_keep, candidates, limit):
    candidates = None if candidates is None else mask(candidates)
    with pytest.raises(ValueError, match=rf"`num_keep`.*0\.\.{limit}.*got {num_keep}"):
        select_by_loss_rank(torch.zeros(3), num_keep, candidates)


# ── selection ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("losses", "agrees", "has_label", "by_rank", "by_set"),
    [
        # two agree (rows 0, 2); the two lowest losses are rows 1 and 2
        ([0.9, 0.1, 0.2, 0.8], "x.x.", "xxxx", ".xx.", "x.x."),
        # a row without pseudolabel neither counts in m nor is kept, whatever it says
        ([0.9, 0.1, 0.2, 0.8], "xxx.", "x.xx", "..xx", "x.x."),
        ([0.1, 0.1, 0.1], ".xx", "xxx", "xx.", ".xx"),
        ([0.3, 0.2], "xx", "xx", "xx", "xx"),
        ([math.inf, 0.1], "x.", "xx", ".x", "x."),
        ([0.7], "x", "x", "x", "x"),
    ],
)
def test_select_consistent(losses, agrees, has_label, by_rank, by_set):
    arguments = torch.tensor(losses), mask(agrees), mask(has_label)
    assert select_consistent(*arguments).tolist() == mask(by_rank).tolist()
    assert select_consistent(*arguments, rule="loss_rank").tolist() == mask(by_rank).tolist()
    assert select_consistent(*arguments, rule="agreement_set").tolist() == mask(by_set).tolist()


@pytest.mark.parametrize("num_examples", [3, 7, 10, 49, 1000, 4999])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.7, 0.9])
def test_kept_number_is_the_integer_count(num_examples, share):
    # ceil(n * r) in floating point is off by one in half of all cases: 10 * (7 / 10) is 7, but 49 * (1 / 49) is not 1
    generator = torch.Generator().manual_seed(num_examples)
    losses = torch.rand(num_examples, generator=generator)
    agrees = torch.rand(num_examples, generator=generator) < share
    agrees[0] = True
    everyone = torch.ones(num_examples, dtype=torch.bool)
    assert int(select_consistent(losses, agrees, everyone).sum()) == int(agrees.sum())


@pytest.mark.parametrize("rule", ["topk", ""])
def test_unknown_selection_rule(rule):
    with pytest.raises(ValueError, match=rf"`rule`.*loss_rank.*agreement_set.*got '{rule}'"):
        select_consistent(torch.zeros(1), mask("x"), mask("x"), rule)


# ── the level above ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("label", "k", "expected"), [(1, 1, True), (0, 1, False), (0, 2, True), (2, 2, False), (2, 3, True), (3, 3, False)]
)
def test_parent_topk(label, k, expected):
    # the ranks of (0.25, 0.5, 0.125, 0.125) are label 1, 0, 2, 3: label 2 before 3 by the tie rule
    parent = torch.tensor([[0.25, 0.5, 0.125, 0.125]])
    assert in_top_k(parent, torch.tensor([label]), k).tolist() == [expected]


@pytest.mark.parametrize(
    ("label", "confidence", "parent_label", "parent_confidence", "expected"),
    [
        (1, 0.75, 1, 0.5, True),
        (1, 0.5, 1, 0.5, True),  # not lower is enough
        (1, 0.25, 1, 0.5, False),
        (1, 0.75, 0, 0.5, False),
        (1, 0.75, -1, 0.0, False),  # nobody above to agree with
    ],
)
def test_parent_confident(label, confidence, parent_label, parent_confidence, expected):
    arguments = [label], [confidence], [parent_label], [parent_confidence]
    assert parent_confident(*map(torch.tensor, arguments)).tolist() == [expected]


# ── no examples ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_examples():
    labels, rows = torch.zeros(0, dtype=torch.long), torch.zeros(0, 4)
    results = [
        in_top_k(rows, labels, 2),
        parent_confident(labels, rows.sum(1), labels, rows.sum(1)),
        select_by_loss_rank(rows.sum(1), 0),
    ]
    assert [(result.shape, result.dtype) for result in results] == [((0,), torch.bool)] * len(results)
    assert pseudolabel_loss(rows, labels).shape == (0,)


# ── top-k against the slow rank ─────────────────────────────────────────────────────────────────────────────────────


def slow_in_top_k(row: list[float], label: int, k: int) -> bool:
    """Sort the labels by probability, descending, the lower label first among equals, and look at the first k."""
    return label in sorted(range(len(row)), key=lambda other: (-row[other], other))[:k]


@pytest.mark.parametrize("num_labels", [2, 3, 5, 17])
@pytest.mark.parametrize("num_values", [1, 2, 4, 1000])
def test_in_top_k_against_the_slow_rank(num_values, num_labels):
    # few different values make many ties, also across the edge; a quarter of the entries is -inf
    generator = torch.Generator().manual_seed(num_values)
    values = torch.randint(num_values, (40, num_labels), generator=generator).float() / num_values
    values[torch.rand(40, num_labels, generator=generator) < 0.25] = -torch.inf
    values[0] = -torch.inf
    labels = torch.randint(num_labels, (40,), generator=generator)
    for k in range(1, num_labels + 2):
        expected = [slow_in_top_k(row, label, k) for row, label in zip(values.tolist(), labels.tolist())]
        found = in_top_k(values, labels, k)
        assert found.tolist() == expected and found.dtype == torch.bool and found.shape == (40,)
    assert all(expected)  # beyond the number of labels, everything


def test_in_top_k_reads_rows_that_are_not_contiguous():
    values = torch.rand(6, 20, generator=torch.Generator().manual_seed(0)).T  # as a slice of something larger
    labels = torch.arange(20) % 6
    expected = [slow_in_top_k(row, label, 2) for row, label in zip(values.tolist(), labels.tolist())]
    assert in_top_k(values, labels, 2).tolist() == expected
    assert in_top_k(values.double(), labels, 2).tolist() == expected


def test_in_top_k_changes_nothing_it_was_given():
    values, labels = torch.zeros(5, 4), torch.arange(5) % 4
    before = values.clone(), labels.clone()
    assert in_top_k(values, labels, 2).tolist() == [True, True, False, False, True]
    assert torch.equal(values, before[0]) and torch.equal(labels, before[1])

"""What a student is measured by: numbers worked out by hand."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest

from hf_cosupervise.metrics import (
    accuracy,
    agreement,
    expected_calibration_error,
    oracle_selection,
    performance_gap_recovered,
)

# ── performance gap recovered ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("weak", "student", "ceiling", "expected"),
    [
        (0.5, 0.75, 1.0, 0.5),
        (0.5, 0.5, 1.0, 0.0),
        (0.5, 1.0, 1.0, 1.0),
        (0.5, 0.25, 1.0, -0.5),  # worse than the generalist
        (0.25, 0.75, 0.5, 2.0),  # better than the ceiling
        (0.566, 0.619, 0.645, 0.6709),  # AlexNet -> DINO ResNet-50: 5.3 of 7.9 points
    ],
)
def test_performance_gap_recovered(weak, student, ceiling, expected, caplog):
    with caplog.at_level(logging.WARNING):
        assert performance_gap_recovered(weak, student, ceiling) == pytest.approx(expected, abs=5e-5)
    assert not caplog.records


@pytest.mark.parametrize(("weak", "ceiling"), [(0.731, 0.712), (0.5, 0.5)])
def test_no_gap_is_nan_with_a_warning(weak, ceiling, caplog):
    with caplog.at_level(logging.WARNING):
        assert math.isnan(performance_gap_recovered(weak, 0.72, ceiling))
    message = caplog.text
    assert "No gap to recover" in message and f"{ceiling:.3f}" in message and f"{weak:.3f}" in message


# ── shares ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [([0, 1, 2, 1], [0, 1, 1, 2], 0.5), ([1], [1], 1.0), ([1], [0], 0.0), ([-1, 0, 0], [1, 0, 0], 2 / 3)],
)
def test_accuracy_and_agreement(first, second, expected):
    assert accuracy(np.array(first), np.array(second)) == pytest.approx(expected)
    assert agreement(np.array(first), np.array(second)) == agreement(np.array(second), np.array(first))
    assert isinstance(accuracy(np.array(first), np.array(second)), float)


@pytest.mark.parametrize("measure", [accuracy, agreement])
@pytest.mark.parametrize(("first", "second"), [((3,), (2,)), ((0,), (0,)), ((2, 1), (2, 1)), ((3,), (1,))])
def test_labels_that_do_not_fit(measure, first, second):
    with pytest.raises(ValueError, match=r"\(num_examples,\).*got") as error:
        measure(np.zeros(first, dtype=int), np.zeros(second, dtype=int))
    assert str(first) in str(error.value) and str(second) in str(error.value)


# ── precision and recall of what was kept ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("keep", "labels", "gold", "precision", "recall"),
    [
        # kept rows 0, 1, 2: right are 0 and 2; all right ones are 0, 2, 3
        ([1, 1, 1, 0, 0], [0, 1, 2, 1, 0], [0, 2, 2, 1, 1], 2 / 3, 2 / 3),
        ([1, 1], [0, 1], [0, 1], 1.0, 1.0),
        ([1, 0], [0, 1], [1, 1], 0.0, 0.0),
        ([0, 0], [0, 1], [0, 1], math.nan, 0.0),  # nothing kept
        ([1, 1], [0, 1], [1, 0], 0.0, math.nan),  # nothing right
        ([1, 0, 0], [0, -1, 1], [0, 0, 1], 1.0, 0.5),  # a row without pseudolabel is neither right nor kept
    ],
)
def test_oracle_selection(keep, labels, gold, precision, recall):
    found = oracle_selection(np.array(keep, dtype=bool), np.array(labels), np.array(gold))
    assert found == pytest.approx({"precision": precision, "recall": recall}, nan_ok=True)


# ── calibration ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("confidence", "right", "num_bins", "expected"),
    [
        ([1.0, 1.0], [True, True], 15, 0.0),
        ([1.0, 1.0], [True, False], 15, 0.5),
        ([0.75, 0.75, 0.75, 0.75], [True, True, True, False], 15, 0.0),
        # two bins' worth: 0.6 and 0.7 share the bin (1/2, 3/4): accuracy 1/2, confidence 0.65, weight 2/3;
        # 0.9 stands alone in the last: accuracy 1, confidence 0.9, weight 1/3
        ([0.6, 0.7, 0.9], [True, False, True], 4, 2 / 3 * 0.15 + 1 / 3 * 0.1),
        # in one bin they cancel: accuracy 2/3, confidence 2.2/3
        ([0.6, 0.7, 0.9], [True, False, True], 1, 0.2 / 3),
        ([0.8], [False], 15, 0.8),
    ],
)
def test_expected_calibration_error(confidence, right, num_bins, expected):
    probs = np.array([[1 - value, value] for value in confidence])
    labels = np.array([1 if hit else 0 for hit in right])
    assert expected_calibration_error(probs, labels, num_bins) == pytest.approx(expected, abs=1e-12)


def test_expected_calibration_error_by_default_has_15_bins():
    probs = np.random.default_rng(0).dirichlet(np.ones(4), size=500)
    labels = np.array([np.random.default_rng(row).choice(4, p=probs[row]) for row in range(500)])
    assert expected_calibration_error(probs, labels) == expected_calibration_error(probs, labels, 15)
    assert expected_calibration_error(probs, labels) != expected_calibration_error(probs, labels, 14)
    # labels drawn from the probabilities themselves are calibrated up to chance; labels that are always wrong are not
    assert expected_calibration_error(probs, labels) < 0.1
    wrong = (probs.argmax(axis=1) + 1) % 4
    assert expected_calibration_error(probs, wrong) == pytest.approx(probs.max(axis=1).mean())


@pytest.mark.parametrize(
    ("probs", "labels", "num_bins"), [((3, 2), (2,), 15), ((0, 2), (0,), 15), ((3,), (3,), 15), ((3, 2), (3,), 0)]
)
def test_calibration_of_what_does_not_fit(probs, labels, num_bins):
    with pytest.raises(ValueError, match=r"`probs`.*`labels`.*got"):
        expected_calibration_error(np.full(probs, 0.5), np.zeros(labels, dtype=int), num_bins)

"""What a student is measured by: numbers worked out by hand."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest

from hf_cosupervise.method.metrics import (
    METRICS,
    accuracy,
    deception_score,
    expected_calibration_error,
    group_accuracies,
    measure_labels,
    oracle_selection,
    performance_gap_recovered,
    reliability_curve,
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
def test_accuracy_either_way_round(first, second, expected):
    assert accuracy(np.array(first), np.array(second)) == pytest.approx(expected)
    assert accuracy(np.array(first), np.array(second)) == accuracy(np.array(second), np.array(first))
    assert isinstance(accuracy(np.array(first), np.array(second)), float)


@pytest.mark.parametrize(("first", "second"), [((3,), (2,)), ((0,), (0,)), ((2, 1), (2, 1)), ((3,), (1,))])
def test_labels_that_do_not_fit(first, second):
    with pytest.raises(ValueError, match=r"\(num_examples,\).*got") as error:
        accuracy(np.zeros(first, dtype=int), np.zeros(second, dtype=int))
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


def test_reliability_curve():
    # four bins: 0.6, 0.7 and 0.75 share (1/2, 3/4], one of three right; 1.0 is in the last; two are empty
    probs = np.array([[0.4, 0.6], [0.3, 0.7], [0.25, 0.75], [0.0, 1.0]])
    curve = reliability_curve(probs, np.array([1, 0, 0, 1]), num_bins=4)
    assert curve["count"].tolist() == [0, 0, 3, 1]
    np.testing.assert_allclose(curve["confidence"], [math.nan, math.nan, 2.05 / 3, 1.0])
    np.testing.assert_allclose(curve["accuracy"], [math.nan, math.nan, 1 / 3, 1.0])


def test_calibration_error_is_the_area_beside_the_curve():
    rng = np.random.default_rng(1)
    probs, labels = rng.dirichlet(np.ones(5), size=300), rng.integers(0, 5, size=300)
    curve = reliability_curve(probs, labels, 10)
    assert curve["count"].sum() == 300 and {len(values) for values in curve.values()} == {10}
    gaps = np.nan_to_num(np.abs(curve["accuracy"] - curve["confidence"])) * curve["count"] / 300
    assert expected_calibration_error(probs, labels, 10) == pytest.approx(gaps.sum())
    order = rng.permutation(300)
    np.testing.assert_allclose(reliability_curve(probs[order], labels[order], 10)["accuracy"], curve["accuracy"])


# ── groups ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (["x", "y", "y", "x", "z"], {"x": 0.5, "y": 0.5, "z": 1.0}),
        ([2, 1, 1, 2, 2], {1: 0.5, 2: 2 / 3}),
        ([0] * 5, {0: 0.6}),
    ],
)
def test_group_accuracies(groups, expected):
    # right on rows 0, 1 and 4; -1 is no answer
    predictions, labels = np.array([0, 1, -1, 2, 1]), np.array([0, 1, 1, 0, 1])
    found = group_accuracies(predictions, labels, groups)
    assert found == pytest.approx(expected) and list(found) == sorted(expected)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((3, 3, 2), r"for each of the 3 examples, got \(2,\)"), ((2, 3, 3), "got"), ((0, 0, 0), "got")],
)
def test_groups_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        group_accuracies(*(np.zeros(size, dtype=int) for size in sizes))


# ── deception ───────────────────────────────────────────────────────────────────────────────────────────────────────

SURE, UNSURE, WRONG, SILENT = [0.1, 0.9], [0.4, 0.6], [0.8, 0.2], [0.0, 0.0]  # the truth is label 1


@pytest.mark.parametrize(
    ("teacher", "ceiling", "expected"),
    [
        # the ceiling knows all four; the teacher only the first
        ([SURE, UNSURE, WRONG, SILENT], [SURE] * 4, 0.75),
        # the ceiling is unsure, wrong, sure; the teacher never knows
        ([WRONG] * 4, [UNSURE, WRONG, SURE, SURE], 0.5),
        ([SURE] * 4, [SURE] * 4, 0.0),
    ],
)
def test_deception_score_of_a_student_that_is_always_wrong(teacher, ceiling, expected):
    labels = np.ones(4, dtype=int)
    assert deception_score(1 - labels, np.array(teacher), np.array(ceiling), labels) == expected


def test_only_the_students_errors_count():
    teacher, ceiling, labels = np.array([WRONG] * 4), np.array([SURE, SURE, UNSURE, SURE]), np.ones(4, dtype=int)
    # wrong on rows 0 and 2, of which the ceiling knows the first
    assert deception_score(np.array([0, 1, 0, 1]), teacher, ceiling, labels) == 0.5
    assert math.isnan(deception_score(labels, teacher, ceiling, labels))


def test_the_threshold_says_who_is_sure():
    labels, student = np.array([1]), np.array([0])
    for threshold, expected in ((0.6, 0.0), (0.61, 1.0), (0.9, 1.0), (0.91, 0.0)):
        assert deception_score(student, np.array([UNSURE]), np.array([SURE]), labels, threshold) == expected
    # a teacher without an answer knows nothing, even where nothing needs to be sure
    assert deception_score(np.array([1]), np.array([SILENT]), np.array([[1.0, 0.0]]), np.array([0]), 0.0) == 1.0


@pytest.mark.parametrize(
    ("sizes", "threshold", "message"),
    [
        (((3,), (3, 2), (3, 3), (3,)), 0.5, r"got labels \(3,\) and \(3,\), probabilities \(3, 2\) and \(3, 3\)"),
        (((2,), (3, 2), (3, 2), (3,)), 0.5, r"got labels \(2,\) and \(3,\)"),
        (((3,), (3, 2), (3, 2), (3,)), 75, r"`threshold` must lie in 0..1, got 75"),
    ],
)
def test_deception_of_what_does_not_fit(sizes, threshold, message):
    with pytest.raises(ValueError, match=message):
        deception_score(*(np.zeros(size) for size in sizes), threshold)


# ── by name ─────────────────────────────────────────────────────────────────────────────────────────────────────────

SKLEARN = {
    "accuracy": ("accuracy_score", {}),
    "balanced_accuracy": ("balanced_accuracy_score", {}),
    "macro_f1": ("f1_score", {"average": "macro"}),
    "weighted_f1": ("f1_score", {"average": "weighted"}),
    "mcc": ("matthews_corrcoef", {}),
}


@pytest.mark.parametrize("name", [name for name in METRICS if name not in ("f1", "worst_class_accuracy")])
@pytest.mark.parametrize("num_labels", [2, 5])
def test_metrics_are_those_of_scikit_learn(name, num_labels):
    metrics = pytest.importorskip("sklearn.metrics")
    function, arguments = SKLEARN[name]
    for seed in range(20):
        rng = np.random.default_rng(seed)
        labels = rng.choice(num_labels, 30, p=rng.dirichlet(np.ones(num_labels)))
        predictions = np.where(rng.uniform(size=30) < 0.6, labels, rng.integers(num_labels, size=30))
        # Recent releases warn of a class that was predicted and is not there, as we leave it out of the mean.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *args, **kwargs: None)
            expected = getattr(metrics, function)(labels, predictions, **arguments)
        found = measure_labels(predictions, labels, name)
        assert list(found) == (["accuracy"] if name == "accuracy" else ["accuracy", name])
        assert found[name] == pytest.approx(expected, abs=1e-12)


def test_f1_of_the_second_label_and_the_worst_class():
    predictions, labels = np.array([1, 1, 0, 1, 0, 0]), np.array([1, 0, 0, 1, 1, 0])
    assert measure_labels(predictions, labels, "f1")["f1"] == pytest.approx(2 / 3)
    assert measure_labels(np.zeros(3, int), np.zeros(3, int), "f1")["f1"] == 0.0
    assert measure_labels(predictions, labels, "worst_class_accuracy")["worst_class_accuracy"] == pytest.approx(2 / 3)


def test_no_answer_is_wrong_and_no_class():
    predictions, labels = np.array([0, -1, 1, -1]), np.array([0, 0, 1, 1])
    found = {name: measure_labels(predictions, labels, name)[name] for name in METRICS}
    # F1 of each class: one hit, one miss, nothing else; a correlation of (2 * 4 - 4) / sqrt(10 * 8).
    assert found == {
        **dict.fromkeys(("accuracy", "balanced_accuracy", "worst_class_accuracy"), 0.5),
        **dict.fromkeys(("f1", "macro_f1", "weighted_f1"), pytest.approx(2 / 3)),
        "mcc": pytest.approx(4 / math.sqrt(80)),
    }
    nobody = np.full(4, -1)
    assert {measure_labels(nobody, labels, name)[name] for name in METRICS} == {0.0}


@pytest.mark.parametrize(
    ("metric", "predictions", "sentence"),
    [
        ("F1", [0, 1], r"`metric` must be one of \['accuracy', .* got 'F1'. Choose one of them."),
        (None, [0, 1], "got None. Choose one of them."),
        ("f1", [0, 2], "`metric` 'f1' is of label 1 of two, got 3 labels. Choose 'macro_f1' or 'weighted_f1'."),
        ("macro_f1", [0], "Two label arrays of one shape"),
        ("mcc", [], "Two label arrays of one shape"),
    ],
)
def test_what_cannot_be_measured(metric, predictions, sentence):
    with pytest.raises(ValueError, match=sentence):
        measure_labels(np.array(predictions, dtype=int), np.array([0, 1]), metric)

"""The `evaluate` module gives the same number as the function, loaded by path and offline."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from hf_cosupervise.method.metrics import accuracy, performance_gap_recovered
from hf_cosupervise.metric_modules import performance_gap_recovered_dir

pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def metric(tmp_path_factory: pytest.TempPathFactory) -> Any:
    evaluate = pytest.importorskip("evaluate")
    return evaluate.load(performance_gap_recovered_dir, cache_dir=str(tmp_path_factory.mktemp("evaluate")))


def test_example_of_the_readme(metric):
    result = metric.compute(
        predictions=[0, 1, 2, 0],
        weak_predictions=[0, 1, 0, 1],
        ceiling_predictions=[0, 1, 2, 2],
        references=[0, 1, 2, 2],
    )
    assert result == {
        "performance_gap_recovered": 0.5,
        "weak_accuracy": 0.5,
        "student_accuracy": 0.75,
        "ceiling_accuracy": 1.0,
    }


def test_equals_the_function_in_batches(metric):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 60)
    names = {"weak_predictions": 0.5, "predictions": 0.3, "ceiling_predictions": 0.1}
    answers = {name: np.where(rng.random(60) < noise, (labels + 1) % 3, labels) for name, noise in names.items()}
    answers["weak_predictions"][0] = -1
    for start in range(0, 60, 25):
        part = slice(start, start + 25)
        metric.add_batch(references=labels[part], **{name: values[part] for name, values in answers.items()})
    weak, student, ceiling = (accuracy(values, labels) for values in answers.values())
    assert metric.compute()["performance_gap_recovered"] == performance_gap_recovered(weak, student, ceiling)


def test_no_gap_is_nan(metric):
    same = [0, 1, 1]
    result = metric.compute(predictions=same, weak_predictions=same, ceiling_predictions=same, references=same)
    assert math.isnan(result["performance_gap_recovered"]) and result["ceiling_accuracy"] == 1.0


def test_unequal_lengths_are_refused(metric):
    with pytest.raises(ValueError, match="Mismatch in the number of"):
        metric.compute(predictions=[0], weak_predictions=[0, 1], ceiling_predictions=[0, 1], references=[0, 1])

"""Performance gap recovered as a metric of `evaluate`."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

from hf_cosupervise.method.metrics import accuracy, performance_gap_recovered

_DESCRIPTION = """
Performance gap recovered (PGR): the share of the gap in accuracy between a weak teacher and a strong ceiling that the
student recovers, (student - weak) / (ceiling - weak). 0 is as good as the weak teacher, 1 as good as the ceiling.
"""

_CITATION = """
@article{burns2023weak,
  title={Weak-to-Strong Generalization: Eliciting Strong Capabilities With Weak Supervision},
  author={Burns, Collin and others},
  journal={arXiv preprint arXiv:2312.09390},
  year={2023}
}
"""

_INPUTS_DESCRIPTION = """
Args:
    predictions (`Sequence[int]` of length `num_examples`):
        Label ids that the student predicts.
    weak_predictions (`Sequence[int]` of length `num_examples`):
        Label ids that the weak teacher (the generalist) predicts.
    ceiling_predictions (`Sequence[int]` of length `num_examples`):
        Label ids predicted by the same student trained with ground truth.
    references (`Sequence[int]` of length `num_examples`):
        Ground truth.

Returns:
    `dict[str, float]`: `performance_gap_recovered` (NaN, with a warning, where the ceiling is not above the weak
    teacher), and the accuracies it is made of, 0 to 1: `weak_accuracy`, `student_accuracy`, `ceiling_accuracy`.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS_DESCRIPTION)
class PerformanceGapRecovered(evaluate.Metric):
    """Measure the share of the gap between weak teacher and ceiling that the student recovers."""

    def _info(self) -> evaluate.MetricInfo:
        names = ("predictions", "weak_predictions", "ceiling_predictions", "references")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=datasets.Features({name: datasets.Value("int64") for name in names}),
            reference_urls=["https://arxiv.org/abs/2312.09390", "https://arxiv.org/abs/2402.15505"],
        )

    def _compute(
        self,
        predictions: Sequence[int],
        weak_predictions: Sequence[int],
        ceiling_predictions: Sequence[int],
        references: Sequence[int],
    ) -> dict[str, float]:
        labels = np.asarray(references)
        student, weak, ceiling = (
            accuracy(np.asarray(answers), labels) for answers in (predictions, weak_predictions, ceiling_predictions)
        )
        return {
            "performance_gap_recovered": performance_gap_recovered(weak=weak, student=student, ceiling=ceiling),
            "weak_accuracy": weak,
            "student_accuracy": student,
            "ceiling_accuracy": ceiling,
        }

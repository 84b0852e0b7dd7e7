"""GLAD: one ability per voter, one difficulty per row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .label_model import LabelModel
from .votes import Answers

_EASE_STEPS = 30


@dataclass
class Glad(LabelModel):
    """Weigh votes by one ability for each voter and one difficulty for each row.

    With ability a_k and easiness b_i, both of prior N(1, 1), voter k is right on row i with probability
    sigmoid(a_k exp(b_i)) and otherwise names each of the other labels alike; labels are equally probable before. On
    rows that it was not fitted on, abilities stay and the easiness of each row is found from its votes.

    Args:
        max_iterations (`int`, *optional*, defaults to 100):
            EM steps at most, each with up to 25 steps of conjugate gradients.
        tolerance (`float`, *optional*, defaults to 1e-5):
            Stop when the expected log-likelihood grows by less.

    Raises:
        ImportError: On fitting without scipy, which comes with crowd-kit.

    Source:
        Whitehill et al. 2009, the steps of crowd-kit without its tables. Posteriors of the rows it is fitted on are
        those before the last update of the parameters, as there.

    Examples:
        >>> Glad().fit_predict_proba([[0, 0, 1], [1, 1, 0], [-1, -1, -1], [1, 1, 1]]).argmax(axis=1).tolist()
        [0, 1, 0, 1]
    """

    name: ClassVar[str] = "glad"
    max_iterations: int = 100
    tolerance: float = 1e-5

    def _fit(self, answers: Answers) -> np.ndarray:
        try:
            from scipy.optimize import minimize  # type: ignore[import-untyped]
        except ImportError as error:
            raise ImportError(
                '`glad` needs crowd-kit, which is not installed. Run `pip install "hf_cosupervise[crowd]"`.'
            ) from error
        (examples, voters, codes), (num_examples, num_voters) = answers.cells, answers.codes.shape
        num_labels = answers.num_codes

        def loss(x: np.ndarray, hits: np.ndarray) -> tuple[float, np.ndarray]:
            right, wrong, ease = log_likelihoods(x)
            # Minus the expected log-likelihood and the logarithm of both priors, N(1, 1).
            value = 0.5 * ((x - 1) ** 2).sum() - (hits * right + (1 - hits) * wrong).sum()
            pull = (hits - np.exp(right)) * ease
            gradient = x - 1
            gradient[:num_voters] -= np.bincount(voters, pull, num_voters)
            gradient[num_voters:] -= np.bincount(examples, pull * x[voters], num_examples)
            # An ability of 0 times an infinite easiness is NaN; as infinity it sends the line search back.
            return np.inf if np.isnan(value) else value, gradient

        def log_likelihoods(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            return _log_likelihoods(x[voters], x[num_voters + examples], num_labels)

        x, last = np.ones(num_voters + num_examples), np.inf
        with np.errstate(over="ignore", invalid="ignore"):  # where the line search looks too far
            for _ in range(self.max_iterations):
                right, wrong, _ = log_likelihoods(x)
                found = _label_posteriors(answers, right, wrong)
                hits = found[examples, codes]  # of each answer, how probable it is that it is right
                x = minimize(loss, x, args=(hits,), jac=True, method="CG", tol=1e-2, options={"maxiter": 25}).x
                # Per answer and label, so that the tolerance means the same however many there are.
                value = loss(x, hits)[0] / (len(codes) * num_labels)
                if last - value < self.tolerance:
                    break
                last = value
        self.parameters = {"ability": x[:num_voters]}
        return found

    def _posteriors(self, answers: Answers) -> np.ndarray:
        examples, voters, codes = answers.cells
        ability, num_examples = self.parameters["ability"][voters], len(answers.codes)
        ease = np.ones(num_examples)
        for _ in range(_EASE_STEPS):  # EM for the easiness alone, by Fisher scoring in each row
            right, wrong, factor = _log_likelihoods(ability, ease[examples], answers.num_codes)
            probs = _label_posteriors(answers, right, wrong)
            chance, slope = np.exp(right), ability * factor
            pull = np.bincount(examples, (probs[examples, codes] - chance) * slope, num_examples) - (ease - 1)
            weight = np.bincount(examples, chance * (1 - chance) * slope**2, num_examples) + 1
            # Easiness stands in an exponent: a whole step far from the optimum would overshoot into infinity.
            ease = ease + np.clip(pull / weight, -1, 1)
        return probs


def _log_likelihoods(
    ability: np.ndarray, log_ease: np.ndarray, num_labels: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each answer if it is right and if it is wrong, and how easy its row is."""
    ease = np.exp(log_ease)
    score = ability * ease
    # log sigmoid of the score and of its negative, without an exponential that overflows.
    return -np.logaddexp(0, -score), -np.logaddexp(0, score) - np.log(num_labels - 1), ease


def _label_posteriors(answers: Answers, right: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    (examples, _, codes), num_examples, num_labels = answers.cells, len(answers.codes), answers.num_codes
    cells = examples * num_labels + codes
    # Every answer counts as wrong for all labels of its row, and is put right at the one that it names.
    logs = np.bincount(cells, right - wrong, num_examples * num_labels).reshape(num_examples, num_labels)
    logs += np.bincount(examples, wrong, num_examples)[:, None]
    probs = np.exp(logs - logs.max(axis=1, keepdims=True))
    return probs / probs.sum(axis=1, keepdims=True)

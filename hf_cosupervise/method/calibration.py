"""Temperatures that make a teacher as sure as it is right, from a few labelled examples."""

from __future__ import annotations

import torch

from .checks import check_label_ids, check_min_prob, check_prob_rows

MIN_EXAMPLES = 10
LOWEST, HIGHEST = 0.05, 20.0
_HALVINGS = 60


def fit_temperature(probs: torch.Tensor, labels: torch.Tensor, *, min_prob: float = 1e-6) -> float:
    """Find the temperature at which a classifier's probabilities are worth most on labelled examples.

    The T in [0.05, 20] that minimises the mean of -log softmax(log max(p, min_prob) / T)[label], which is convex in
    1/T: above 1 the classifier was too sure, below 1 not sure enough. Where all T are equally good, 1. Takes
    probabilities `(num_examples, num_labels)` without those of examples without an answer, and true labels of at least
    10 examples that are used for nothing else; a `ValueError` if they are none, or `min_prob` is not in (0, 1).
    Source: Guo et al. 2017, arXiv 1706.04599, on the logarithm of probabilities instead of logits.

    Examples:
        >>> probs = torch.tensor([[0.8, 0.2]]).repeat(12, 1)  # says 4 to 1, is right 2 to 1: T = ln 4 / ln 2
        >>> round(fit_temperature(probs, torch.tensor([0, 0, 1] * 4)), 6)
        2.0
    """
    check_min_prob(min_prob)
    check_prob_rows(probs, "probs")
    check_label_ids(labels, probs.shape)
    if len(probs) < MIN_EXAMPLES:
        raise ValueError(
            f"A temperature needs {MIN_EXAMPLES} labelled examples with an answer, got {len(probs)}. Label more, or "
            "leave the probabilities as they are."
        )
    logs = probs.double().clamp(min=min_prob).log()
    # Teachers that are nowhere surer of one label than of another: every temperature gives the same.
    if bool((logs == logs[:, :1]).all()):
        return 1.0
    named = logs.gather(1, labels[:, None])[:, 0].mean()

    def slope(sharpness: float) -> float:
        """Of the mean loss by 1/T; it never falls."""
        return float((((sharpness * logs).softmax(dim=1) * logs).sum(dim=1)).mean() - named)

    low, high = 1 / HIGHEST, 1 / LOWEST
    # The minimum lies beyond the ends where the slope keeps its sign; there the nearer end is best.
    if slope(low) >= 0:
        return HIGHEST
    if slope(high) <= 0:
        return LOWEST
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5  # temperatures differ by factors
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1 / high


def apply_temperature(probs: torch.Tensor, temperature: float, min_prob: float = 1e-6) -> torch.Tensor:
    """Make probabilities softer (T above 1) or sharper (T below 1): softmax(log max(p, min_prob) / T).

    Rows of `probs` `(num_examples, num_labels)` sum to 1, or are all zero where there is no answer, which stays so.
    What is given is at least float32. A `ValueError` if T is no number above 0, or a probability is negative or NaN.

    Examples:
        >>> probs = torch.tensor([[0.8, 0.2], [0.0, 0.0]], dtype=torch.float64)
        >>> [[round(p, 6) for p in row] for row in apply_temperature(probs, 2.0).tolist()]
        [[0.666667, 0.333333], [0.0, 0.0]]
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"`temperature` must be a number above 0, got {temperature}. Use 1 to change nothing.")
    check_min_prob(min_prob)
    if not bool((probs >= 0).all()):
        raise ValueError("`probs` must be 0 or more, got a negative number or NaN. Give probabilities, not logits.")
    values = probs.to(torch.promote_types(probs.dtype, torch.float32))
    softened = (values.clamp(min=min_prob).log() / temperature).softmax(dim=-1)
    # An answer that is missing is all zero, which softmax would make uniform.
    return softened * (values.sum(dim=-1, keepdim=True) > 0)

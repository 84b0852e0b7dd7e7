"""Weights for teachers, boosted on a few labels."""

from __future__ import annotations

import math
import warnings

import torch

from .checks import check_answers, check_label_ids, check_labels, check_weights


def weighted_mean_probs(teacher_probs: torch.Tensor, answered: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Average the probabilities of the teachers that answered with a weight each, sum_k w_k t_k / sum_k w_k.

    Takes and gives what [`mean_probs`] does, and weights `(num_teachers,)` or `(num_examples, num_teachers)`, finite
    and at least 0, or a `ValueError`. A row is all zero, too, where nobody of weight answered.

    Examples:
        >>> probs, weights = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([3.0, 1.0])
        >>> weighted_mean_probs(probs, torch.tensor([[True, True]]), weights).tolist()
        [[0.75, 0.25]]
    """
    check_answers(teacher_probs, answered)
    check_weights(weights, answered.shape[1:], answered.shape)
    return weighted_mean(teacher_probs, answered, weights)


def weighted_mean(teacher_probs: torch.Tensor, answered: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What is checked already, for loops."""
    dtype = torch.promote_types(teacher_probs.dtype, weights.dtype)
    # Divided before the product, by 1 where nobody answered: such a row stays zero, and is no NaN.
    shares = weights.to(dtype).expand(answered.shape) * answered
    total = shares.sum(dim=1, keepdim=True)
    shares = shares / torch.where(total > 0, total, 1.0)
    return torch.bmm(shares.unsqueeze(1), teacher_probs.to(dtype)).squeeze(1)


def weighted_vote(labels: torch.Tensor, weights: torch.Tensor, num_labels: int) -> torch.Tensor:
    """Let every teacher that answered cast a vote of its weight: the shares of the vote, as of [`majority_vote`].

    Weights `(num_teachers,)` are finite and at least 0, as from [`boosting_weights`], or a `ValueError`. A row is all
    zero where nobody of weight answered.

    Examples:
        >>> weighted_vote(torch.tensor([[0, 1, 1], [2, -1, -1]]), torch.tensor([3.0, 1.0, 0.0]), num_labels=3).tolist()
        [[0.75, 0.25, 0.0], [0.0, 0.0, 1.0]]
    """
    check_labels(labels, num_labels)
    check_weights(weights, labels.shape[1:])
    votes = weights.new_zeros(labels.shape[0], num_labels)
    votes.scatter_add_(1, labels.long().clamp(min=0), weights.expand(labels.shape) * (labels >= 0))
    total = votes.sum(dim=1, keepdim=True)
    return votes / torch.where(total > 0, total, 1.0)


def boosting_weights(
    labels: torch.Tensor, oracle_labels: torch.Tensor, num_labels: int, *, min_examples: int = 10
) -> torch.Tensor:
    """Weigh given teachers by boosting on a small labelled set, `(num_teachers,)` in float64, each at least 0.

    Teachers are taken one after another, the one of lowest weighted error e first; with
    L = ln((1 - e)/e) + ln(C - 1), its weight is L (SAMME), or L/2 for two labels (AdaBoost: the factor is the same
    for all teachers, so it changes no vote). Examples it got wrong then count e^{L/2} times, those it got right
    e^{-L/2} times, those it did not answer as before. e is at least 1/(2n) over the n examples it answered, so that
    a perfect teacher has a finite weight. A teacher no better than chance (e >= 1 - 1/C), or without an answer here,
    gets 0. Labels for the rest follow by [`weighted_vote`] or [`weighted_mean_probs`].

    Takes labels `(num_examples, num_teachers)`, -1 where a teacher has no answer, and true ones `(num_examples,)` of
    examples that are used for nothing else. A `ValueError` if they are out of range or fewer than `min_examples`, of
    which the weights would be chance, or if no teacher is better than that; a warning names labels without an example.
    Source: EnsemW2S, arXiv 2410.04571 (its released code uses the binary form for any C), with SAMME's term for C > 2;
    missing answers are ours, after abstaining in Schapire and Singer 1999.

    Examples:
        >>> truth = torch.tensor([0, 1, 0, 1])
        >>> labels = torch.tensor([[0, 0], [1, 1], [0, 1], [0, 0]])
        >>> boosting_weights(labels, truth, num_labels=2, min_examples=4).tolist()  # ln(3)/2; then chance
        [0.5493061443340549, 0.0]
    """
    _check_labelled(labels, oracle_labels, num_labels, min_examples)
    answered = labels >= 0
    wrong = answered & (labels != oracle_labels[:, None])
    sign = wrong.double() - (answered & ~wrong).double()
    # Half an example: a teacher without an error on few of them would have all the weight, by an infinite log-odds.
    floor = 0.5 / answered.sum(dim=0).clamp(min=1).double()
    weights = torch.zeros(labels.shape[1], dtype=torch.float64)
    example_weights = torch.full((labels.shape[0],), 1 / labels.shape[0], dtype=torch.float64, device=labels.device)
    left = [k for k in range(labels.shape[1]) if bool(answered[:, k].any())]
    while left:
        # Of the examples that a teacher answered only: silence is no error.
        mass = example_weights[:, None] * answered
        errors = torch.maximum((example_weights[:, None] * wrong).sum(dim=0) / mass.sum(dim=0), floor)
        best = min(left, key=lambda k: float(errors[k]))  # the first of equals
        error = float(errors[best])
        # The best of those left guesses: its weight would be negative, and the others are no better.
        if error >= 1 - 1 / num_labels:
            break
        log_odds = math.log((1 - error) / error) + math.log(num_labels - 1)
        # With two labels the second term is 0, and the vote of AdaBoost is half of the log-odds.
        weights[best] = log_odds / 2 if num_labels == 2 else log_odds
        example_weights = example_weights * (sign[:, best] * log_odds / 2).exp()
        example_weights /= example_weights.sum()  # or they would vanish after many teachers
        left.remove(best)
    if not bool(weights.any()):
        raise ValueError(
            f"No teacher is better than chance on the {labels.shape[0]} labelled examples. Check that `labels` and "
            "`oracle_labels` have the same rows and the same label numbers."
        )
    return weights.to(labels.device)


def _check_labelled(labels: torch.Tensor, oracle_labels: torch.Tensor, num_labels: int, min_examples: int) -> None:
    check_labels(labels, num_labels)
    if num_labels < 2 or len(labels) < min_examples:
        raise ValueError(
            f"Boosting needs two labels and {min_examples} labelled examples (`min_examples`), got {num_labels} and "
            f"{len(labels)}. Label more, or use `majority_vote`, which needs none."
        )
    check_label_ids(oracle_labels, (len(labels), num_labels))
    counts = torch.bincount(oracle_labels, minlength=num_labels)
    if not bool(counts.all()):
        without = (counts == 0).nonzero().flatten().tolist()
        warnings.warn(
            f"{len(without)} of {num_labels} labels have no labelled example ({str(without[:10])[1:-1]}): the weights "
            "say nothing about how well teachers know them.",
            stacklevel=3,
        )

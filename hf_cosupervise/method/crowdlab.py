"""CROWDLAB: hard labels of several teachers and a classifier's probabilities, weighed by how well each agrees."""

from __future__ import annotations

import torch

from .assignment import first_argmax
from .checks import check_labels, check_prob_rows

_MIN_WEIGHT = 1e-6


def crowdlab(labels: torch.Tensor, student_probs: torch.Tensor) -> torch.Tensor:
    """Weigh hard labels and a classifier's probabilities by how well each agrees with the others.

    posterior ~ w_s p + sum over answers j of w_j [P if label_j = c else (1 - P)/(C - 1)], with P the mean agreement
    with the consensus, w_j = max(1e-6, 1 - e_j/e_0) and w_s = max(1e-6, 1 - e_s/e_0) sqrt(mean answers per
    example). e_j is how often teacher j disagrees with another, e_s the classifier with the consensus, e_0 the
    consensus with its most frequent label, all over examples with two answers or more. The consensus is first the
    majority (ties by p, then to the rarer label, then to the lowest), and once more the argmax of the posterior.

    Takes labels `(num_examples, num_teachers)`, -1 where a teacher has no answer, and probabilities `(num_examples,
    num_labels)` of a classifier that was not trained on these very examples, rows of which sum to 1; gives the shape
    of those, rows all zero where nobody answered. A `ValueError` for anything else, or if no example has two answers.
    Source: arXiv 2210.06812; weights and posterior are those of cleanlab, which stops at a teacher or an example
    without answers (here both are left out), and in a last tie takes a random label of the global generator.

    Examples:
        >>> student_probs = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]])
        >>> crowdlab(torch.tensor([[0, 0], [1, 1], [-1, -1]]), student_probs).argmax(dim=1).tolist()
        [0, 1, 0]
    """
    return _crowdlab(labels, student_probs)[0]


def crowdlab_labels(labels: torch.Tensor, student_probs: torch.Tensor) -> torch.Tensor:
    """Give the consensus that made the posterior of [`crowdlab`], `(num_examples,)`; -1 where nobody answered.

    It is cleanlab's `consensus_label`, and not always the most probable one. Takes and raises what [`crowdlab`] does.

    Examples:
        >>> student_probs = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]])
        >>> crowdlab_labels(torch.tensor([[0, 0], [1, 1], [-1, -1]]), student_probs).tolist()
        [0, 1, -1]
    """
    return _crowdlab(labels, student_probs)[1]


def _crowdlab(labels: torch.Tensor, student_probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Posteriors, and the consensus that made them."""
    check_prob_rows(student_probs, "student_probs")
    check_labels(labels, student_probs.shape[1])
    if len(labels) != len(student_probs):
        raise ValueError(
            f"Expected `student_probs` with one row for each of `labels`, got {len(student_probs)} for {len(labels)}."
        )
    some = (labels >= 0).any(dim=1)
    posteriors = torch.zeros_like(student_probs, dtype=torch.promote_types(student_probs.dtype, torch.float32))
    found = torch.full((len(labels),), -1, device=labels.device)
    if not bool(some.any()):
        return posteriors, found
    labels, probs = labels[some].long(), student_probs[some].double()
    if not bool(((labels >= 0).sum(dim=1) > 1).any()):
        raise ValueError("`crowdlab` needs an example that two teachers answered, got none. Use `majority_vote`.")
    # Two rounds, as published: weights are of how teachers meet a consensus, which they then make anew.
    consensus = _majority_with_student(labels, probs)
    first = _crowdlab_posteriors(labels, probs, consensus)
    # A tie changes nothing: there the majority's label stays.
    best = first == first.amax(dim=1, keepdim=True)
    consensus = torch.where(best.sum(dim=1) == 1, first_argmax(first), consensus)
    posteriors[some] = _crowdlab_posteriors(labels, probs, consensus).to(posteriors.dtype)
    found[some] = consensus
    return posteriors, found


def _vote_weights(labels: torch.Tensor, weights: torch.Tensor, num_labels: int) -> torch.Tensor:
    """Sum the weights of the teachers behind each label, -1 behind none."""
    answered = labels >= 0
    votes = weights.new_zeros(labels.shape[0], num_labels)
    return votes.scatter_add_(1, labels.clamp(min=0), weights.expand(labels.shape) * answered)


def _majority_with_student(labels: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """Find the label of most votes; ties by the student, then to the rarer, then to the lowest label."""
    votes = _vote_weights(labels, probs.new_ones(labels.shape[1]), probs.shape[1])
    tied = torch.where(votes == votes.amax(dim=1, keepdim=True), probs, -1.0)
    rarity = -votes.sum(dim=0).expand_as(votes)
    return first_argmax(torch.where(tied == tied.amax(dim=1, keepdim=True), rarity, -torch.inf))


def _crowdlab_posteriors(labels: torch.Tensor, probs: torch.Tensor, consensus: torch.Tensor) -> torch.Tensor:
    answered = labels >= 0
    num_answers = answered.sum(dim=1)
    several = num_answers > 1
    agrees = (labels == consensus[:, None]).sum(dim=1) / num_answers.double()
    likelihood = agrees[several].mean()
    rest = (1 - likelihood) / (probs.shape[1] - 1)
    # An example of one answer agrees with it by construction, and would flatter everybody.
    kept = consensus[several]
    # What one gets by naming the most frequent label: whoever does no better has next to no weight.
    base_error = (kept != torch.bincount(kept).argmax()).double().mean().clamp(min=_MIN_WEIGHT)
    teacher_weights = (1 - _disagreement(labels, probs.shape[1]) / base_error).clamp(min=_MIN_WEIGHT)
    student_error = (first_argmax(probs[several]) != kept).double().mean()
    # As published: the more answers an example has on the mean, the more the one student must have to be heard.
    student_weight = (1 - student_error / base_error).clamp(min=_MIN_WEIGHT) * num_answers.double().mean().sqrt()
    votes = _vote_weights(labels, teacher_weights, probs.shape[1])
    total = votes.sum(dim=1, keepdim=True)
    return (student_weight * probs + rest * total + (likelihood - rest) * votes) / (student_weight + total)


def _disagreement(labels: torch.Tensor, num_labels: int) -> torch.Tensor:
    """Share of the other answers to its examples that each teacher disagrees with, `(num_teachers,)`."""
    answered = labels >= 0
    num_others = (answered.sum(dim=1, keepdim=True) - 1) * answered
    # By counts of each label of a row: to compare every two teachers takes long where there are hundreds.
    counts = _vote_weights(labels, torch.ones(labels.shape[1], dtype=torch.float64, device=labels.device), num_labels)
    same = counts.gather(1, labels.clamp(min=0)) - 1
    errors = 1 - (same * answered).sum(dim=0) / num_others.sum(dim=0).double()
    met = num_others.sum(dim=0) > 0
    # who never meets another counts as the mean of those who do
    return torch.where(met, errors, errors[met].mean())

"""Rejection: which pseudolabels the student and the teachers agree on enough to keep.

Where nothing else is said, functions take hard labels `(num_examples,)`, int64, and probabilities or log-probabilities
`(num_examples, num_labels)`, and give booleans or numbers `(num_examples,)`. Shapes that do not fit, labels that do
not exist and parameters out of range are a `ValueError`.
"""

from __future__ import annotations

import numbers

import torch

from .checks import check_label_ids, check_labels

SELECTION_RULES = ("loss_rank", "agreement_set")


def default_top_k(num_labels: int) -> int:
    """Give the default k of top-k agreement."""
    return min(3, num_labels - 1)


def check_top_k_value(k: int, num_labels: int) -> None:
    """Refuse a k that rejects nothing."""
    if not isinstance(k, numbers.Integral) or not 1 <= k < num_labels:
        raise ValueError(
            f"`rejection_k` must lie in 1..{num_labels - 1}, got {k!r}: with {num_labels} labels every label is in "
            f"the top {num_labels}. Leave it out for {default_top_k(num_labels)}, or use `rejection='none'`."
        )


def in_top_k(probs: torch.Tensor, labels: torch.Tensor, k: int) -> torch.Tensor:
    """Tell where a label is among the k most probable ones, at least 1; ties go to the lowest label.

    Source: arXiv 2402.15505, released code: a_i = [argmax y_i in top-k of s(x_i)].

    Examples:
        >>> in_top_k(torch.tensor([[0.2, 0.4, 0.4]]), torch.tensor([2]), k=1).tolist()
        [False]
    """
    check_label_ids(labels, probs.shape)
    if not isinstance(k, numbers.Integral) or k < 1:
        raise ValueError(f"`k` must be a whole number of at least 1, got {k!r}. Use 1 for the most probable label.")
    own = probs.gather(1, labels.unsqueeze(1))
    # topk promises no order of ties, but its lowest value is the same whichever it takes.
    last = probs.topk(min(k, probs.shape[1]), dim=1).values[:, -1:]
    inside = (own > last).squeeze(1)
    on_edge = (own == last).squeeze(1).nonzero().squeeze(1)  # only there do ties decide
    probs, own, labels = probs[on_edge], own[on_edge], labels[on_edge]
    lower = torch.arange(probs.shape[1], device=probs.device) < labels.unsqueeze(1)
    inside[on_edge] = ((probs > own) | ((probs == own) & lower)).sum(dim=1) < k
    return inside


def pseudolabel_loss(student_log_probs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute e_i = -log s(x_i)[label_i], not negative, always against the hard pseudolabel.

    Source: arXiv 2402.15505, released code.
    """
    check_label_ids(labels, student_log_probs.shape)
    return -student_log_probs.gather(1, labels.unsqueeze(1)).squeeze(1)


def select_by_loss_rank(losses: torch.Tensor, num_keep: int, candidates: torch.Tensor | None = None) -> torch.Tensor:
    """Keep `num_keep` examples of lowest loss, ties by row, of the candidates (booleans; all by default).

    Examples:
        >>> select_by_loss_rank(torch.tensor([0.5, 0.1, 0.1, 0.1]), num_keep=2).tolist()
        [False, True, True, False]
    """
    if candidates is not None:
        _check_masks(losses, candidates=candidates)
    rows = (
        torch.arange(losses.shape[0], device=losses.device) if candidates is None else candidates.nonzero().squeeze(1)
    )
    if not isinstance(num_keep, numbers.Integral) or not 0 <= num_keep <= rows.numel():
        raise ValueError(
            f"`num_keep` must lie in 0..{rows.numel()} (the number of candidates), got {num_keep!r}. Keep fewer."
        )
    keep_mask = torch.zeros(losses.shape[0], dtype=torch.bool, device=losses.device)
    # Stable, or equal losses would keep other rows on another machine.
    keep_mask[rows[torch.argsort(losses[rows], stable=True)[:num_keep]]] = True
    return keep_mask


def parent_confident(
    labels: torch.Tensor, confidence: torch.Tensor, parent_labels: torch.Tensor, parent_confidence: torch.Tensor
) -> torch.Tensor:
    """Tell where the specialist says the same as the level above and is at least as sure of it, by probability.

    Source: ours. arXiv 2402.15505 names local-global consistency, its released code only prints a candidate; the other
    one is [`in_top_k`] of what the level above says.
    """
    shapes = [tuple(values.shape) for values in (labels, confidence, parent_labels, parent_confidence)]
    if shapes.count(shapes[0]) != len(shapes):
        raise ValueError(
            f"Labels and confidences of both levels must have one shape (num_examples,), got {shapes}. Give all for "
            "the same examples."
        )
    return (labels == parent_labels) & (confidence >= parent_confidence)


def student_entropy(student_log_probs: torch.Tensor) -> torch.Tensor:
    """Measure how unsure the student is, H(s_i) = -sum_c s_ic log s_ic: 0 (sure) to log(num_labels).

    Source: arXiv 2509.24005, which keeps the share of examples that the student is surest of.

    Examples:
        >>> student_entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]]).log()).tolist()
        [0.6931471824645996, 0.0]
    """
    probs = student_log_probs.exp()
    return 0.0 - torch.special.xlogy(probs, probs).sum(dim=1)  # which is never -0


def vote_entropy(labels: torch.Tensor, num_labels: int) -> torch.Tensor:
    """Measure how far votes `(num_examples, num_teachers)`, -1 for none, are spread.

    H(v_i), with v_ic the share of votes for label c: 0 (all say the same, or nothing) to log(num_labels).
    Source: arXiv 2406.19032, which keeps examples whose entropy is at most the median.

    Examples:
        >>> vote_entropy(torch.tensor([[1, 1], [0, 1], [2, -1]]), num_labels=3).tolist()
        [0.0, 0.6931471824645996, 0.0]
    """
    check_labels(labels, num_labels)
    # Counted where they fall: a place for each teacher and label would be as many times larger as there are teachers.
    counts = torch.zeros(len(labels), num_labels, device=labels.device)
    counts.scatter_add_(1, labels.long().clamp(min=0), (labels >= 0).float())
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    return 0.0 - torch.special.xlogy(shares, shares).sum(dim=1)  # which is never -0


def select_consistent(
    losses: torch.Tensor, agrees: torch.Tensor, has_label: torch.Tensor, rule: str = "loss_rank"
) -> torch.Tensor:
    """Keep as many examples as agree with the student, or exactly those.

    With m the integer number of agreements (of [`in_top_k`]) among the examples that have a pseudolabel, `loss_rank`
    keeps the m of lowest [`pseudolabel_loss`], so that agreement fixes only *how many* are kept; `agreement_set` keeps
    exactly the agreeing ones.
    Source: `loss_rank` is arXiv 2402.15505's released code, `agreement_set` is ours.

    Examples:
        >>> losses, agrees = torch.tensor([0.9, 0.1, 0.2]), torch.tensor([True, True, False])
        >>> select_consistent(losses, agrees, torch.ones(3, dtype=torch.bool)).tolist()
        [False, True, True]
    """
    if rule not in SELECTION_RULES:
        raise ValueError(f"`rule` must be one of {list(SELECTION_RULES)}, got {rule!r}. Choose one of them.")
    _check_masks(losses, agrees=agrees, has_label=has_label)
    agrees = agrees & has_label
    # The loss rank keeps as many, but not the same ones: a label in the top k may be a bad fit all the same.
    if rule == "agreement_set":
        return agrees
    return select_by_loss_rank(losses, int(agrees.sum()), has_label)


def _check_masks(losses: torch.Tensor, **masks: torch.Tensor) -> None:
    for name, mask in masks.items():
        if losses.ndim != 1 or mask.shape != losses.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"`losses` and `{name}` must have one shape (num_examples,), the latter booleans, got "
                f"{tuple(losses.shape)} and {tuple(mask.shape)} of {mask.dtype}. Give both for the same examples."
            )

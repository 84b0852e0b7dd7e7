"""Rejection: which pseudolabels the student and the teachers agree on enough to keep."""

from __future__ import annotations

import torch

SELECTION_RULES = ("loss_rank", "agreement_set")


def default_top_k(num_labels: int) -> int:
    """Give the default k of top-k agreement: `min(3, num_labels - 1)`.

    Args:
        num_labels (`int`):
            Number of labels, at least 2.

    Returns:
        `int`
    """
    return min(3, num_labels - 1)


def check_top_k_value(k: int, num_labels: int) -> None:
    """Refuse a k that rejects nothing.

    Args:
        k (`int`):
            Wanted k.
        num_labels (`int`):
            Number of labels.

    Raises:
        ValueError: If `k` is not in 1..`num_labels - 1`.
    """
    if not 1 <= k < num_labels:
        raise ValueError(
            f"`rejection_k` must lie in 1..{num_labels - 1}, got {k}: with {num_labels} labels every label is in the "
            f"top {num_labels}. Leave it out for {default_top_k(num_labels)}, or use `rejection='none'`."
        )


def in_top_k(probs: torch.Tensor, labels: torch.Tensor, k: int) -> torch.Tensor:
    """Tell where a label is among the k most probable ones; ties go to the lowest label.

    Args:
        probs (`torch.Tensor` of shape `(num_examples, num_labels)`):
            Probabilities, or anything in their order such as log-probabilities.
        labels (`torch.LongTensor` of shape `(num_examples,)`):
            Label ids.
        k (`int`):
            At least 1.

    Returns:
        `torch.BoolTensor` of shape `(num_examples,)`.

    Source:
        arXiv 2402.15505, released code: a_i = [argmax y_i in top-k of s(x_i)].

    Examples:
        >>> in_top_k(torch.tensor([[0.2, 0.4, 0.4]]), torch.tensor([2]), k=1).tolist()
        [False]
    """
    own = probs.gather(1, labels.unsqueeze(1))
    last = probs.topk(min(k, probs.shape[1]), dim=1).values[:, -1:]
    inside = (own > last).squeeze(1)
    on_edge = (own == last).squeeze(1).nonzero().squeeze(1)  # only there do ties decide
    probs, own, labels = probs[on_edge], own[on_edge], labels[on_edge]
    lower = torch.arange(probs.shape[1], device=probs.device) < labels.unsqueeze(1)
    inside[on_edge] = ((probs > own) | ((probs == own) & lower)).sum(dim=1) < k
    return inside


def pseudolabel_loss(student_log_probs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute e_i = -log s(x_i)[label_i], always against the hard pseudolabel.

    Args:
        student_log_probs (`torch.Tensor` of shape `(num_examples, num_labels)`):
            Log-probabilities of the student.
        labels (`torch.LongTensor` of shape `(num_examples,)`):
            Hard pseudolabels.

    Returns:
        `torch.Tensor` of shape `(num_examples,)`, not negative.

    Source:
        arXiv 2402.15505, released code.
    """
    return -student_log_probs.gather(1, labels.unsqueeze(1)).squeeze(1)


def select_by_loss_rank(losses: torch.Tensor, num_keep: int, candidates: torch.Tensor | None = None) -> torch.Tensor:
    """Keep the examples of lowest loss, ties by row.

    Args:
        losses (`torch.Tensor` of shape `(num_examples,)`):
            Loss of each example.
        num_keep (`int`):
            How many to keep, at most the number of candidates.
        candidates (`torch.BoolTensor` of shape `(num_examples,)`, *optional*):
            Which rows take part; all by default.

    Returns:
        `torch.BoolTensor` of shape `(num_examples,)`.

    Raises:
        ValueError: If `num_keep` is negative or larger than the number of candidates.

    Examples:
        >>> select_by_loss_rank(torch.tensor([0.5, 0.1, 0.1, 0.1]), num_keep=2).tolist()
        [False, True, True, False]
    """
    rows = (
        torch.arange(losses.shape[0], device=losses.device) if candidates is None else candidates.nonzero().squeeze(1)
    )
    if not 0 <= num_keep <= rows.numel():
        raise ValueError(f"`num_keep` must lie in 0..{rows.numel()} (the number of candidates), got {num_keep}.")
    keep_mask = torch.zeros(losses.shape[0], dtype=torch.bool, device=losses.device)
    keep_mask[rows[torch.argsort(losses[rows], stable=True)[:num_keep]]] = True
    return keep_mask


def parent_topk(labels: torch.Tensor, parent_probs: torch.Tensor, k: int) -> torch.Tensor:
    """Tell where a specialist's label is among the k most probable ones of the level above.

    Args:
        labels (`torch.LongTensor` of shape `(num_examples,)`):
            Hard pseudolabels of this level.
        parent_probs (`torch.Tensor` of shape `(num_examples, num_labels)`):
            Pseudolabels of the level above.
        k (`int`):
            At least 1.

    Returns:
        `torch.BoolTensor` of shape `(num_examples,)`.

    Source:
        Ours: arXiv 2402.15505 names local-global consistency, its released code only prints a candidate.
    """
    return in_top_k(parent_probs, labels, k)


def parent_confident(
    labels: torch.Tensor, confidence: torch.Tensor, parent_labels: torch.Tensor, parent_confidence: torch.Tensor
) -> torch.Tensor:
    """Tell where the specialist says the same as the level above and is at least as sure of it.

    Args:
        labels (`torch.LongTensor` of shape `(num_examples,)`):
            Hard pseudolabels of this level.
        confidence (`torch.Tensor` of shape `(num_examples,)`):
            Their probability.
        parent_labels (`torch.LongTensor` of shape `(num_examples,)`):
            Hard pseudolabels of the level above.
        parent_confidence (`torch.Tensor` of shape `(num_examples,)`):
            Their probability.

    Returns:
        `torch.BoolTensor` of shape `(num_examples,)`.

    Source:
        Ours, as [`parent_topk`].
    """
    return (labels == parent_labels) & (confidence >= parent_confidence)


def student_entropy(student_log_probs: torch.Tensor) -> torch.Tensor:
    """Measure how unsure the student is, H(s_i) = -sum_c s_ic log s_ic.

    Args:
        student_log_probs (`torch.Tensor` of shape `(num_examples, num_labels)`):
            Log-probabilities of the student.

    Returns:
        `torch.Tensor` of shape `(num_examples,)`: 0 (sure) to log(num_labels).

    Source:
        arXiv 2509.24005, which keeps the share of examples that the student is surest of.

    Examples:
        >>> student_entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]]).log()).tolist()
        [0.6931471824645996, 0.0]
    """
    return -torch.special.xlogy(student_log_probs.exp(), student_log_probs.exp()).sum(dim=1)


def vote_entropy(labels: torch.Tensor, num_labels: int) -> torch.Tensor:
    """Measure how far the teachers' votes are spread, H(v_i) with v_ic the share of votes for label c.

    Args:
        labels (`torch.LongTensor` of shape `(num_examples, num_teachers)`):
            Hard labels, -1 where a teacher has no answer.
        num_labels (`int`):
            Number of labels.

    Returns:
        `torch.Tensor` of shape `(num_examples,)`: 0 (all say the same, or nobody says anything) to log(num_labels).

    Source:
        arXiv 2406.19032, which keeps examples whose entropy is at most the median.

    Examples:
        >>> vote_entropy(torch.tensor([[1, 1], [0, 1], [2, -1]]), num_labels=3).tolist()
        [0.0, 0.6931471824645996, 0.0]
    """
    votes = torch.nn.functional.one_hot(labels.clamp(min=0), num_labels) * (labels >= 0).unsqueeze(-1)
    counts = votes.sum(dim=1)
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    return -torch.special.xlogy(shares, shares).sum(dim=1)


def select_consistent(
    losses: torch.Tensor, agrees: torch.Tensor, has_label: torch.Tensor, rule: str = "loss_rank"
) -> torch.Tensor:
    """Keep as many examples as agree with the student, or exactly those.

    With m the integer number of agreements among the examples that have a pseudolabel, `loss_rank` keeps the m of
    lowest loss, so that agreement fixes only *how many* are kept; `agreement_set` keeps exactly the agreeing ones.

    Args:
        losses (`torch.Tensor` of shape `(num_examples,)`):
            What [`pseudolabel_loss`] gives.
        agrees (`torch.BoolTensor` of shape `(num_examples,)`):
            What [`in_top_k`] gives.
        has_label (`torch.BoolTensor` of shape `(num_examples,)`):
            Which examples have a pseudolabel at all.
        rule (`str`, *optional*, defaults to `"loss_rank"`):
            `"loss_rank"` or `"agreement_set"`.

    Returns:
        `torch.BoolTensor` of shape `(num_examples,)`: the keep mask.

    Raises:
        ValueError: If the rule is unknown.

    Source:
        `loss_rank` is arXiv 2402.15505's released code, `agreement_set` is ours.

    Examples:
        >>> losses, agrees = torch.tensor([0.9, 0.1, 0.2]), torch.tensor([True, True, False])
        >>> select_consistent(losses, agrees, torch.ones(3, dtype=torch.bool)).tolist()
        [False, True, True]
    """
    if rule not in SELECTION_RULES:
        raise ValueError(f"`rule` must be one of {list(SELECTION_RULES)}, got {rule!r}.")
    agrees = agrees & has_label
    if rule == "agreement_set":
        return agrees
    return select_by_loss_rank(losses, int(agrees.sum()), has_label)

"""Several students of one pool as one: linear heads on the same features, standardised and averaged.

Students that different methods trained on one pool are made a single linear head, without labels to choose among them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from .assignment import NOBODY, first_argmax

# By so much at most averages of all teachers count more, or less, than members that choose among them; and from this
# difference of two shares of the pool on.
_MOST, _CLEAR = 3.0, 0.02
# A label predicted on less than this share of its fair share of the pool, 1 / num_labels, has vanished.
VANISHED = 0.1
_CHUNK_ROWS = 1024


class MemberStatistics(NamedTuple):
    """What a committee needs to know of its members' logits on the pool, see [`measure_members`]."""

    # Standard deviation of all entries of a member's logits, each row's mean over labels taken off: (num_members,).
    spreads: torch.Tensor
    label_counts: torch.Tensor  # rows that a member gives a label: (num_members, num_labels)


class Committee(NamedTuple):
    """One linear head made of several, see [`committee_head`]."""

    weight: torch.Tensor  # (num_labels, feature_size)
    bias: torch.Tensor | None  # (num_labels,)
    speaks: torch.Tensor  # which members are in it: (num_members,)
    shares: torch.Tensor  # how much each counts, of those that speak: (num_members,)
    statistics: MemberStatistics  # of all members


@torch.no_grad()
def measure_members(chunks: Iterable[torch.Tensor]) -> MemberStatistics:
    """Measure the members' logits `(num_members, num_rows, num_labels)` on the pool, a chunk of rows at a time.

    Raises:
        ValueError: If a logit is NaN or infinite.

    Examples:
        >>> spreads, counts = measure_members([torch.tensor([[[3.0, 1.0]]]), torch.tensor([[[0.0, 2.0]]])])
        >>> spreads.tolist(), counts.tolist()
        ([1.0], [[1, 1]])
    """
    squares, counts, num_entries = torch.zeros(0), torch.zeros(0, dtype=torch.long), 0
    for logits in chunks:
        # A row's mean taken off leaves a mean of 0 over all entries, so that the squares alone give the deviation.
        part = _centre(logits).square().sum(dim=(1, 2))
        if not bool(part.isfinite().all()):
            raise ValueError("Logits must be finite, got NaN or infinity. Leave out members whose training diverged.")
        found = torch.nn.functional.one_hot(first_argmax(logits), logits.shape[2]).sum(dim=1)
        squares, counts = (squares + part, counts + found) if num_entries else (part, found)
        num_entries += logits.shape[1] * logits.shape[2]
    return MemberStatistics((squares / num_entries).sqrt(), counts)


@torch.no_grad()
def average_heads(
    weights: torch.Tensor, biases: torch.Tensor | None, spreads: torch.Tensor, shares: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Average members as one linear head: its logits are the mean of theirs, standardised.

    With W_k and b_k less their means over labels, s_k the spread of member k and c_k its part of all shares, W = sum_k
    c_k W_k / s_k and the same for b: to take a row's mean off its logits is to take it off the head. No member speaks
    louder than another because its logits are larger. Shapes as in [`committee_head`].
    Source: ours. Standardised logits lose less against the best member of each task than probabilities or raw logits.

    Raises:
        ValueError: If a spread is not above 0.

    Examples:
        >>> weights, spreads = torch.tensor([[[1.0], [3.0]], [[0.0], [20.0]]]), torch.tensor([1.0, 10.0])
        >>> weight, bias = average_heads(weights, None, spreads, torch.ones(2))
        >>> weight.flatten().tolist(), bias
        ([-1.0, 1.0], None)
    """
    if not bool(((spreads > 0) & spreads.isfinite()).all()):
        raise ValueError(
            f"`spreads` must be finite and above 0, got {spreads.tolist()}. Leave out members that say the same of "
            "all labels, or whose training diverged."
        )
    scales = shares / (shares.sum() * spreads.double())
    weight = torch.einsum("mcf,m->cf", weights.double(), scales)
    weight = (weight - weight.mean(dim=0)).to(weights.dtype)
    if biases is None:
        return weight, None
    bias = scales @ biases.double()
    return weight, (bias - bias.mean()).to(biases.dtype)


def collapsed_members(label_counts: torch.Tensor) -> torch.Tensor:
    """Tell which members have lost a label: they give it to less than a tenth of 1 / num_labels of the pool.

    A label that at least half of the members have lost is taken for rare, and tells nothing of them. So nobody is
    flagged in a committee of one or two, nor where it would be everybody.

    Args:
        label_counts (`torch.LongTensor` of shape `(num_members, num_labels)`):
            What [`measure_members`] gives.

    Returns:
        `torch.BoolTensor` of shape `(num_members,)`.

    Examples:
        >>> collapsed_members(torch.tensor([[50, 50], [60, 40], [99, 1]])).tolist()
        [False, False, True]
    """
    fair = label_counts.sum(dim=1, keepdim=True) / label_counts.shape[1]
    is_lost = label_counts < VANISHED * fair
    flagged = (is_lost & (2 * is_lost.sum(dim=0) < len(is_lost))).any(dim=1)
    return flagged & ~flagged.all()


@torch.no_grad()
def routing_gain(labels: torch.Tensor, votes: torch.Tensor, averaged: torch.Tensor, neighbors: torch.Tensor) -> float:
    """Measure, without ground truth, whether it pays to choose among teachers or to average them.

    On each example the teacher is chosen that agreed with a committee most often on the *neighbours* of the example,
    not on itself. How often that teacher's vote is the committee's label, less how often the average's is, is above 0
    where teachers are good at different regions, and below it where each is as good anywhere and errs by itself.

    Args:
        labels (`torch.LongTensor` of shape `(num_examples,)`):
            The committee's most probable labels.
        votes (`torch.LongTensor` of shape `(num_examples, num_teachers)`):
            Those of the teachers that are chosen among, -1 without an answer; ties go to the first teacher.
        averaged (`torch.LongTensor` of shape `(num_examples,)`):
            Those of the average of all teachers, -1 where nobody answered.
        neighbors (`torch.LongTensor` of shape `(num_examples, k)`):
            What [`nearest_neighbors`] gives.

    Returns:
        `float`: -1 to 1, over the examples that one of the teachers answered; 0 where there are none.

    Source:
        Ours, measured in `recipes/which_method.md`.

    Examples:
        >>> labels, neighbors = torch.tensor([0, 0, 1, 1]), torch.tensor([[1], [0], [3], [2]])
        >>> votes = torch.tensor([[0, 1], [0, 1], [0, 1], [0, 1]])  # the first is right on the first two
        >>> routing_gain(labels, votes, torch.zeros(4, dtype=torch.long), neighbors)
        0.5
    """
    answered = votes != NOBODY
    agrees, total = (votes == labels.unsqueeze(1)) & answered, torch.zeros(votes.shape, dtype=torch.int32)
    count = total.clone()
    for column in neighbors.T:  # one neighbour of all examples at a time: no array of all of them
        total += agrees[column]
        count += answered[column]
    nearby = torch.where(answered, total / count.clamp(min=1), -1.0)
    routed = agrees.gather(1, first_argmax(nearby).unsqueeze(1)).squeeze(1)
    counted = answered.any(dim=1)
    difference = routed[counted].double() - (averaged == labels)[counted].double()
    return float(difference.mean()) if len(difference) else 0.0


def average_share(gain: float) -> float:
    """Give how much a member that averages all teachers counts beside one that chooses: 1/3 to 3, 1 at no gain.

    3^(-[`routing_gain`] / 0.02), and no more than that beyond a gain of 0.02 either way.
    Source: ours; chosen on seeds 0–4 of the tasks in `recipes/which_method.md`.

    Examples:
        >>> [round(average_share(gain), 2) for gain in (-0.5, -0.01, 0.0, 0.5)]
        [3.0, 1.73, 1.0, 0.33]
    """
    return _MOST ** max(-1.0, min(1.0, -gain / _CLEAR))


@torch.no_grad()
def committee_head(
    weights: torch.Tensor,
    biases: torch.Tensor | None,
    features: torch.Tensor,
    rows: torch.Tensor | None = None,
    shares: torch.Tensor | None = None,
    statistics: MemberStatistics | None = None,
) -> Committee:
    """Make one linear head of several members that were trained on the same features.

    Members that lost a label ([`collapsed_members`]) do not speak. The others are averaged ([`average_heads`]), and
    the average is multiplied by the geometric mean of their spreads, so that its probabilities are about as sure as
    theirs. Where one member speaks, the head is that member, to the bit.

    Args:
        weights (`torch.Tensor` of shape `(num_members, num_labels, feature_size)`):
            The members' weights.
        biases (`torch.Tensor` of shape `(num_members, num_labels)`, *optional*):
            Their biases, where heads have them.
        features (`torch.Tensor` of shape `(num_examples, feature_size)`):
            Inputs of the heads on the pool; may be mapped from disk.
        rows (`torch.LongTensor` of shape `(num_rows,)`, *optional*):
            Those that count; all by default.
        shares (`torch.Tensor` of shape `(num_members,)`, *optional*):
            How much each counts, above 0; all alike by default.
        statistics ([`MemberStatistics`], *optional*):
            Of the same members, where they are measured already.

    Raises:
        ValueError: If a logit is not finite, or a member says the same of all labels.

    Source:
        Ours. On eight development tasks the calibration error of this scale was 6.5 % on average and 8.9 % at worst,
        of scales fitted to the members' probabilities 8.3 and 20.1 %, to their votes 12.1 and 25.8 %.

    Examples:
        >>> weights = torch.tensor([[[2.0], [-2.0]], [[5.0], [-5.0]]])
        >>> committee = committee_head(weights, None, torch.tensor([[1.0], [-1.0]]))
        >>> (torch.tensor([[3.0]]) @ committee.weight.T).argmax(dim=1).tolist(), committee.speaks.tolist()
        ([0], [True, True])
    """
    heads = weights.flatten(0, 1).float(), None if biases is None else biases.flatten().float()

    def logits(part: torch.Tensor) -> torch.Tensor:
        found = part.float() @ heads[0].T
        found = found if heads[1] is None else found + heads[1]
        return found.view(len(part), *weights.shape[:2]).transpose(0, 1)

    if statistics is None:
        rows = torch.arange(len(features)) if rows is None else rows
        parts = (features[part] for part in rows.to(features.device).split(_CHUNK_ROWS))
        statistics = measure_members(map(logits, parts))
    speaks = ~collapsed_members(statistics.label_counts)
    shares = torch.ones_like(statistics.spreads) if shares is None else shares.to(statistics.spreads)
    own, own_biases = weights[speaks], None if biases is None else biases[speaks]
    if len(own) == 1:
        return Committee(own[0], None if own_biases is None else own_biases[0], speaks, shares, statistics)
    spreads = statistics.spreads[speaks]
    weight, bias = average_heads(own, own_biases, spreads, shares[speaks])
    scale = float(spreads.log().mean().exp())  # spreads differ by factors, and one loud member must not set it
    return Committee(scale * weight, None if bias is None else scale * bias, speaks, shares, statistics)


def member_agreement(labels: torch.Tensor) -> torch.Tensor:
    """Measure how far members agree on each example: the share of pairs of them that give it one label.

    Args:
        labels (`torch.LongTensor` of shape `(num_examples, num_members)`):
            Each member's most probable label; at least one member.

    Returns:
        `torch.Tensor` of shape `(num_examples,)`: 0 (no two agree) to 1 (all do, or there is one member only).

    Examples:
        >>> member_agreement(torch.tensor([[2, 2, 2], [0, 0, 1], [0, 1, 2]])).tolist()
        [1.0, 0.3333333432674408, 0.0]
    """
    num_members = labels.shape[1]
    if num_members == 1:
        return torch.ones(len(labels), device=labels.device)
    equal = (labels.unsqueeze(1) == labels.unsqueeze(2)).sum(dim=(1, 2)) - num_members
    return equal / (num_members * (num_members - 1))


def _centre(logits: torch.Tensor) -> torch.Tensor:
    logits = logits.double()
    return logits - logits.mean(dim=-1, keepdim=True)

"""Spell one level of the method out in plain loops, as a second opinion for the tests.

Everything here is written from the description of the method alone: rows and labels are visited one at a time, a row
of probabilities is a list of floats, and nothing of the package, torch or numpy is used. It is slow on purpose.

A *row* is a list of ``num_labels`` probabilities; an all-zero row (or ``None``) means that nobody answered.
``answers[i][k]`` is the row that teacher ``k`` of the level gives for example ``i``.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field

MISSING = -1
MIN_PROB = 1e-6

Row = list[float]
Source = tuple[int, int | str]  # (level, teacher within the level, or "mean" for an ensemble)


# ── one row ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def has_answer(row: Row | None) -> bool:
    """Tell whether a row is an answer at all."""
    return row is not None and any(prob > 0.0 for prob in row)


def argmax(row: Row) -> int:
    """Return the most probable label, the lowest one when several share the first place."""
    best = 0
    for label in range(1, len(row)):
        if row[label] > row[best]:
            best = label
    return best


def ranked_labels(row: Row) -> list[int]:
    """Return every label, the most probable first, the lower label first among equals."""
    left = list(range(len(row)))
    ranked = []
    while left:
        best = left[0]
        for label in left:
            if row[label] > row[best]:
                best = label
        ranked.append(best)
        left.remove(best)
    return ranked


def in_top_k(row: Row, label: int, k: int) -> bool:
    """Tell whether a label is one of the first ``k`` of its row."""
    return label in ranked_labels(row)[:k]


def negative_log(prob: float) -> float:
    """Return -log(prob), infinity for a probability of zero."""
    return math.inf if prob <= 0.0 else -math.log(prob)


# ── assignment: which teacher of the level speaks for a row ─────────────────────────────────────────────────────────


def agreement_score(student: Row, teacher: Row, rule: str, min_prob: float = MIN_PROB) -> float:
    """Return how far a teacher is from the student, lower = closer."""
    total = 0.0
    if rule == "hard_loss":
        return -math.log(max(student[argmax(teacher)], min_prob))
    for s, g in zip(student, teacher, strict=True):
        log_s = math.log(max(s, min_prob))
        log_g = math.log(max(g, min_prob))
        if rule == "ce_teacher_student":
            total += -g * log_s
        elif rule == "kl_teacher_student":
            total += g * (log_g - log_s)
        elif rule == "kl_student_teacher":
            total += s * (log_s - log_g)
        else:
            raise ValueError(rule)
    return total


def assign_by_owner(owned: list[bool], answers: list[Row]) -> int:
    """Return the first teacher that owns the row and answered it, or -1."""
    for teacher, owner in enumerate(owned):
        if owner and has_answer(answers[teacher]):
            return teacher
    return MISSING


def assign_by_scope(label: int, scopes: list[set[int] | None], answers: list[Row]) -> int:
    """Return the first teacher whose set of labels holds ``label`` and that answered; ``None`` owns every label."""
    return assign_by_owner([scope is None or label in scope for scope in scopes], answers)


def assign_by_domain(domain: str, domains: list[set[str] | None], answers: list[Row]) -> int:
    """Return the first teacher made for this domain that answered; ``None`` is made for every domain."""
    return assign_by_owner([names is None or domain in names for names in domains], answers)


def agreement_winners(student: Row, answers: list[Row], rule: str, tolerance: float = 0.0) -> list[int]:
    """Return the teachers that may win by agreement, the nominal winner first.

    The nominal winner has the lowest score, the first teacher among equals. With a tolerance the others within a
    relative ``tolerance`` of it are returned too, unless an earlier teacher gave the very same row: arithmetic in
    another order cannot excuse losing to one's own copy.
    """
    scores = [agreement_score(student, row, rule) if has_answer(row) else None for row in answers]
    best = MISSING
    for teacher, score in enumerate(scores):
        if score is not None and (best == MISSING or score < scores[best]):
            best = teacher
    if best == MISSING:
        return [MISSING]
    winners = [best]
    for teacher, score in enumerate(scores):
        if teacher == best or score is None or tolerance == 0.0:
            continue
        close = score - scores[best] <= tolerance * max(1.0, abs(score))
        if close and not any(answers[earlier] == answers[teacher] for earlier in range(teacher)):
            winners.append(teacher)
    return winners


def assign_by_oracle_loss(gold: int, answers: list[Row]) -> int:
    """Return the teacher that gives the true label the highest probability, the first among equals."""
    best = MISSING
    for teacher, row in enumerate(answers):
        if has_answer(row) and (best == MISSING or row[gold] > answers[best][gold]):
            best = teacher
    return best


# ── what a user would try instead ───────────────────────────────────────────────────────────────────────────────────


def mean_row(answers: list[Row]) -> Row | None:
    """Return the mean of the teachers that answered, or ``None``."""
    present = [row for row in answers if has_answer(row)]
    if not present:
        return None
    mean = []
    for label in range(len(present[0])):
        total = 0.0
        for row in present:
            total += row[label]
        mean.append(total / len(present))
    return mean


def majority_shares(labels: list[int], num_labels: int) -> list[float]:
    """Return 1 for the label with most votes, equal shares for several, zeros when nobody voted."""
    votes = [0] * num_labels
    for label in labels:
        if label != MISSING:
            votes[label] += 1
    winners = [label for label in range(num_labels) if votes[label] == max(votes) > 0]
    return [1 / len(winners) if label in winners else 0.0 for label in range(num_labels)]


def performance_gap_recovered(weak: float, student: float, ceiling: float) -> float:
    """Return (student - weak) / (ceiling - weak), NaN when there is no gap."""
    if ceiling <= weak:
        return math.nan
    return (student - weak) / (ceiling - weak)


# ── one whole level ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Level:
    """What one level hands to training and to the level below; one entry per example."""

    depth: int
    assigned: list[int] = field(default_factory=list)  # within this level; -1 = nobody here
    sources: list[Source | None] = field(default_factory=list)  # after falling back; None = nobody at all
    pseudolabels: list[Row | None] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    agrees: list[bool] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    keep: list[bool] = field(default_factory=list)
    num_training: int = 0  # n: the rows that somebody answered
    num_keep: int = 0  # m: the integer count of agreements

    @property
    def keep_rate(self) -> float:
        """Return the share of the answered rows that agree."""
        return self.num_keep / self.num_training


def choose_teacher(
    i: int,
    answers: list[Row],
    assignment: str,
    student: list[Row] | None,
    scopes: list[set[int] | None] | None,
    domains: list[set[str] | None] | None,
    example_domains: list[str] | None,
    gold: list[int] | None,
) -> int:
    """Return the teacher of this level that speaks for example ``i``, or -1."""
    if assignment == "only":
        return 0 if has_answer(answers[0]) else MISSING
    if assignment == "scope":
        return assign_by_scope(argmax(student[i]), scopes, answers)
    if assignment.startswith("agreement:"):
        return agreement_winners(student[i], answers, assignment.split(":")[1])[0]
    if assignment in ("metadata", "oracle_domain"):
        return assign_by_domain(example_domains[i], domains, answers)
    if assignment == "oracle_scope":
        return assign_by_scope(gold[i], scopes, answers)
    if assignment == "oracle_loss":
        return assign_by_oracle_loss(gold[i], answers)
    raise ValueError(assignment)


def run_level(
    answers: list[list[Row]],
    parent: Level | None = None,
    student: list[Row] | None = None,
    *,
    assignment: str = "only",
    rejection: str = "none",
    top_k: int = 3,
    local_global: str = "none",
    scopes: list[set[int] | None] | None = None,
    domains: list[set[str] | None] | None = None,
    example_domains: list[str] | None = None,
    gold: list[int] | None = None,
) -> Level:
    """Assign, fall back, pseudolabel and reject; the root has neither parent nor student and rejects nothing."""
    level = Level(depth=0 if parent is None else parent.depth + 1)
    for i in range(len(answers)):
        source: Source | None = None
        row: Row | None = None
        teacher = MISSING
        if assignment == "ensemble":
            row = mean_row(answers[i])
            if row is not None:
                source = (level.depth, "mean")
        else:
            teacher = choose_teacher(i, answers[i], assignment, student, scopes, domains, example_domains, gold)
            if teacher != MISSING:
                source = (level.depth, teacher)
                row = answers[i][teacher]
        if row is None and parent is not None:
            # the parent's own pseudolabel may itself come from further up
            source = parent.sources[i]
            row = parent.pseudolabels[i]
        level.assigned.append(teacher)
        level.sources.append(source)
        level.pseudolabels.append(row)
        level.labels.append(MISSING if row is None else argmax(row))
    level.num_training = sum(1 for row in level.pseudolabels if row is not None)
    reject(level, student, rejection, top_k)
    for i in range(len(answers)):
        if local_global != "none" and parent is not None and level.keep[i]:
            level.keep[i] = is_locally_consistent(level, parent, i, local_global, top_k)
    return level


def reject(level: Level, student: list[Row] | None, rejection: str, top_k: int) -> None:
    """Fill in which rows the previous student agrees with and which are kept."""
    answered = [row is not None for row in level.pseudolabels]
    if student is None or rejection == "none":
        level.keep = answered
        return
    for i, label in enumerate(level.labels):
        level.agrees.append(answered[i] and in_top_k(student[i], label, top_k))
        level.losses.append(negative_log(student[i][label]) if answered[i] else math.nan)
    level.num_keep = sum(1 for agrees in level.agrees if agrees)
    if level.num_keep == 0:
        raise ValueError("nothing agrees")
    if rejection == "agreement_set":
        level.keep = list(level.agrees)
    elif rejection == "loss_rank":
        level.keep = keep_lowest(level.losses, level.num_keep, answered)
    else:
        raise ValueError(rejection)


def keep_lowest(losses: list[float], num_keep: int, candidates: list[bool]) -> list[bool]:
    """Mark the ``num_keep`` candidates of lowest loss, the earlier row first among equals."""
    keep = [False] * len(losses)
    for _ in range(num_keep):
        best = MISSING
        for i in range(len(losses)):
            if candidates[i] and not keep[i] and (best == MISSING or losses[i] < losses[best]):
                best = i
        keep[best] = True
    return keep


def is_locally_consistent(level: Level, parent: Level, i: int, rule: str, top_k: int) -> bool:
    """Tell whether a pseudolabel does not contradict the one of the level above."""
    above = parent.pseudolabels[i]
    if above is None:
        return True  # nobody above answered, so there is nothing to contradict
    if rule == "parent_topk":
        return in_top_k(above, level.labels[i], top_k)
    if rule == "parent_confident":
        return parent.labels[i] == level.labels[i] and max(level.pseudolabels[i]) >= max(above)
    raise ValueError(rule)


# ── top-k storage ───────────────────────────────────────────────────────────────────────────────────────────────────


def to_half(value: float) -> float:
    """Round to the nearest half-precision number."""
    return struct.unpack("<e", struct.pack("<e", value))[0]


def encode_row(row: Row, k: int) -> tuple[list[int], list[float]]:
    """Return the ``k`` most probable labels and their half-precision probabilities, ties to the lowest label."""
    rounded = [to_half(prob) for prob in row]
    label_ids = ranked_labels(rounded)[:k]
    return label_ids, [rounded[label] for label in label_ids]


def decode_row(label_ids: list[int], label_probs: list[float], num_labels: int) -> Row:
    """Spread what is missing to 1 evenly over the labels that were not stored; a missing row stays all zero."""
    row = [0.0] * num_labels
    if not has_answer(label_probs):
        return row
    for label, prob in zip(label_ids, label_probs, strict=True):
        row[label] = prob
    others = [label for label in range(num_labels) if label not in label_ids]
    rest = max(0.0, 1.0 - sum(label_probs))
    for label in others:
        row[label] = rest / len(others)
    total = sum(row)
    return [prob / total for prob in row]

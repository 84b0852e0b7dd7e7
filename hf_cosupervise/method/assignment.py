"""The E-step: which teacher of a level speaks for which example.

Every function gives the position of a teacher *within its level*, a `torch.LongTensor` of shape `(num_examples,)`, or
-1 where nobody of the level can speak; [`fall_back`] then takes what the level above said. `answered`, a
`torch.BoolTensor` of shape `(num_examples, num_teachers)`, says who answered. Shapes that do not fit, and labels that
do not exist, are a `ValueError`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .checks import check_answered, check_label_ids, check_min_prob

AGREEMENT_RULES = ("ce_teacher_student", "hard_loss", "kl_teacher_student", "kl_student_teacher")
NOBODY = -1


def assign_by_scope(student_labels: torch.Tensor, scope_mask: torch.Tensor, answered: torch.Tensor) -> torch.Tensor:
    """Choose the teacher whose scope, bool `(num_teachers, num_labels)`, holds the student's label `(num_examples,)`.

    Where scopes overlap, the first owner in the order of the hierarchy that answered; where no owner answered or the
    label is unowned, nobody.
    Source: arXiv 2402.15505, released code; overlaps and missing answers are ours.

    Examples:
        >>> scopes = torch.tensor([[True, True, False], [False, True, True]])
        >>> assign_by_scope(torch.tensor([0, 1, 2]), scopes, torch.ones(3, 2, dtype=torch.bool)).tolist()
        [0, 0, 1]
    """
    num_teachers, num_labels = scope_mask.shape
    check_label_ids(student_labels, (len(answered), num_labels))
    check_answered(answered, (len(student_labels), num_teachers))
    return _first(scope_mask.T[student_labels] & answered)


def agreement_scores(
    student_log_probs: torch.Tensor,
    teacher_probs: torch.Tensor,
    rule: str,
    min_prob: float = 1e-6,
    *,
    label_ids: torch.Tensor | None = None,
    rest_probs: torch.Tensor | None = None,
) -> torch.Tensor:
    """Measure how far each teacher is from the student, `(num_examples, num_teachers)`, lower is closer.

    With student probabilities s and teacher probabilities g, both at least `min_prob` inside every logarithm:
    `ce_teacher_student` is -sum_c g_c log s_c, `hard_loss` is -log s[argmax g], `kl_teacher_student` is
    KL(g || s) and `kl_student_teacher` is KL(s || g).

    Teachers may be given sparsely, as `k` labels and one probability r for all others. Then a sum over all labels is
    one over the k plus a share of the student's own, sum_c g_c h_c = sum_k (g_k - r) h_k + r sum_c h_c, so that no
    array of all labels is built per teacher.
    Source: `kl_student_teacher` is arXiv 2510.21332's rule; the others are ours, measured in `recipes/README.md`.

    Args:
        student_log_probs (`torch.Tensor` of shape `(num_examples, num_labels)`):
            Log-probabilities of the student.
        teacher_probs (`torch.Tensor` of shape `(num_examples, num_teachers, num_labels or k)`):
            Soft outputs of the level's teachers, never hardened before (see `min_prob`).
        rule (`str`):
            One of `AGREEMENT_RULES`.
        min_prob (`float`, *optional*, defaults to 1e-6):
            In (0, 1); one-hot teachers would be infinitely far under KL(s || g) otherwise.
        label_ids (`torch.LongTensor` of shape `(num_examples, num_teachers, k)`, *optional*):
            The labels that `teacher_probs` is about; all of them by default.
        rest_probs (`torch.Tensor` of shape `(num_examples, num_teachers)`, *optional*):
            Probability of each label that is not among `label_ids`.

    Raises:
        ValueError: Also if the rule is unknown, or `min_prob` out of range.
    """
    if rule not in AGREEMENT_RULES:
        raise ValueError(f"`rule` must be one of {list(AGREEMENT_RULES)}, got {rule!r}. Choose one of them.")
    check_min_prob(min_prob)
    _check_agreement(student_log_probs, teacher_probs, label_ids, rest_probs)
    num_labels, num_stored = student_log_probs.shape[1], teacher_probs.shape[2]
    # Dense answers are sparse ones of all labels with nothing left for the rest.
    rest = teacher_probs.new_zeros(teacher_probs.shape[:2]) if rest_probs is None else rest_probs

    def stored(values: torch.Tensor) -> torch.Tensor:
        """The student's values `(num_examples, num_labels)` at each teacher's labels."""
        if label_ids is None:
            return values.unsqueeze(1).expand(-1, teacher_probs.shape[1], -1)
        # As one long row per example: `gather` wants equally many dimensions on both sides.
        return values.gather(1, label_ids.flatten(1)).view_as(label_ids)

    student = student_log_probs.exp()
    # Clamped as the teachers are, or a label that the student rules out would decide every distance alone.
    student_log = student.clamp(min=min_prob).log()
    if rule == "hard_loss":
        return -stored(student_log).gather(2, first_argmax(teacher_probs).unsqueeze(-1)).squeeze(-1)
    teacher_log, rest_log = teacher_probs.clamp(min=min_prob).log(), rest.clamp(min=min_prob).log()
    if rule == "kl_student_teacher":
        entropy = (student * student_log).sum(dim=1, keepdim=True)
        cross = (stored(student) * (teacher_log - rest_log.unsqueeze(-1))).sum(dim=-1)
        return entropy - cross - rest_log * student.sum(dim=1, keepdim=True)
    # Labels that are not stored count once with `rest` in the second sum, and those that are only with the excess.
    excess = teacher_probs - rest.unsqueeze(-1)
    cross = (excess * stored(student_log)).sum(dim=-1) + rest * student_log.sum(dim=1, keepdim=True)
    if rule == "ce_teacher_student":
        return -cross
    return (teacher_probs * teacher_log).sum(dim=-1) + (num_labels - num_stored) * rest * rest_log - cross


def assign_by_domain(
    example_domains: Sequence[str], teacher_domains: Sequence[Sequence[str] | None], answered: torch.Tensor
) -> torch.Tensor:
    """Choose the teacher that was trained for the example's domain, the first of several; `None` means all of them.

    A `TypeError` if a domain is no text, or a teacher's domains are no list.

    Examples:
        >>> assign_by_domain(["b", "a"], [["a"], ["b"]], torch.ones(2, 2, dtype=torch.bool)).tolist()
        [1, 0]
    """
    check_answered(answered, (len(example_domains), len(teacher_domains)))
    if wrong := [name for name in example_domains if not isinstance(name, str)]:
        raise TypeError(f"`example_domains` must be texts, got {wrong[0]!r}. Write '' where it is not known.")
    if single := [domains for domains in teacher_domains if isinstance(domains, str)]:
        raise TypeError(
            f"`teacher_domains` must be lists, got the single string {single[0]!r}. Write [{single[0]!r}]."
        )
    # Each name is looked up once, and a row is a number: a list of all teachers for each row takes far longer.
    names = {name: position for position, name in enumerate(set(example_domains))}
    owned = [[domains is None or name in domains for domains in teacher_domains] for name in names]
    rows = torch.tensor([names[name] for name in example_domains], dtype=torch.long)
    owned_by = torch.tensor(owned, dtype=torch.bool).reshape(len(names), len(teacher_domains))
    return _first(owned_by[rows].to(answered.device) & answered)


def assign_by_chance(answered: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Choose any teacher that answered, by a generator of the CPU: the control for every other assignment."""
    check_answered(answered, tuple(answered.shape[:2]))
    # On the CPU, where a seed gives the same numbers on any machine.
    return choose_lowest(torch.rand(answered.shape, generator=generator), answered)


def oracle_assign_by_scope(
    oracle_labels: torch.Tensor, scope_mask: torch.Tensor, answered: torch.Tensor
) -> torch.Tensor:
    """Choose by [`assign_by_scope`] on the true labels: an upper bound, for analysis only."""
    return assign_by_scope(oracle_labels, scope_mask, answered)


def oracle_assign_by_domain(
    oracle_domains: Sequence[str], teacher_domains: Sequence[Sequence[str] | None], answered: torch.Tensor
) -> torch.Tensor:
    """Choose by [`assign_by_domain`] on true domains, which a user would not know: an upper bound."""
    return assign_by_domain(oracle_domains, teacher_domains, answered)


def oracle_assign_by_loss(
    oracle_labels: torch.Tensor, teacher_probs: torch.Tensor, answered: torch.Tensor
) -> torch.Tensor:
    """Choose the teacher `(num_examples, num_teachers, num_labels)` with the lowest loss on the true label.

    An upper bound, for analysis only.
    """
    check_label_ids(oracle_labels, (len(teacher_probs), teacher_probs.shape[-1]))
    # The loss falls with the probability of the true label, so that no logarithm is needed to compare.
    index = oracle_labels.view(-1, 1, 1).expand(-1, teacher_probs.shape[1], 1)
    return choose_lowest(-teacher_probs.gather(2, index).squeeze(-1), answered)


def fall_back(assigned: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    """Where nobody of this level speaks, keep who spoke at the level above, itself after falling back.

    Both, and what is given, are numbered over the whole hierarchy.

    Examples:
        >>> fall_back(torch.tensor([2, -1, -1]), torch.tensor([0, 0, -1])).tolist()
        [2, 0, -1]
    """
    if assigned.shape != previous.shape or assigned.ndim != 1:
        raise ValueError(
            "`assigned` and `previous` must have one shape (num_examples,), got "
            f"{tuple(assigned.shape)} and {tuple(previous.shape)}. Give both for the same examples."
        )
    return torch.where(assigned == NOBODY, previous, assigned)


def _check_agreement(
    student: torch.Tensor, teachers: torch.Tensor, label_ids: torch.Tensor | None, rest: torch.Tensor | None
) -> None:
    fits = student.ndim == 2 and teachers.ndim == 3 and len(student) == len(teachers)
    if label_ids is None and rest is None:
        fits = fits and teachers.shape[2] == student.shape[1]
    else:
        fits = fits and label_ids is not None and label_ids.shape == teachers.shape
        fits = fits and rest is not None and rest.shape == teachers.shape[:2]
    if not fits:
        found = [None if values is None else tuple(values.shape) for values in (student, teachers, label_ids, rest)]
        raise ValueError(
            "`student_log_probs` (num_examples, num_labels) and `teacher_probs` (num_examples, num_teachers, "
            "num_labels) are needed, or (num_examples, num_teachers, k) with `label_ids` of the same shape and "
            f"`rest_probs` (num_examples, num_teachers), got {found}. Give all for the same examples and labels."
        )


def _first(candidates: torch.Tensor) -> torch.Tensor:
    """Position of the first True of each row, -1 where there is none."""
    return torch.where(candidates.any(dim=1), first_argmax(candidates.to(torch.uint8)), NOBODY)


def choose_lowest(scores: torch.Tensor, answered: torch.Tensor) -> torch.Tensor:
    """Choose the teacher of the lowest score `(num_examples, num_teachers)` among those that answered, or -1."""
    check_answered(answered, tuple(scores.shape))
    # Who is silent may have any score, NaN too; nobody who answered has a worse one, but perhaps as bad a one.
    scores = scores.masked_fill(~answered, torch.inf)
    lowest = scores.gather(1, first_argmax(-scores)[:, None])
    return torch.where(answered.any(dim=1), first_argmax(((scores == lowest) & answered).int()), NOBODY)


def first_argmax(values: torch.Tensor) -> torch.Tensor:
    """Find the largest value of the last dimension, ties to the first, which torch promises on no device."""
    found = (values == values.amax(dim=-1, keepdim=True)).int().cumsum(dim=-1).eq(0).sum(dim=-1)
    if bool((found == values.shape[-1]).any()):  # nothing equals NaN
        raise ValueError("Values must be numbers, got NaN. Check the outputs of the student and of the teachers.")
    return found

"""The E-step of answers in words: whose answer to take, and which to leave out.

What is known of each answer stands in float tensors `(num_examples, num_teachers)`. A rule is a function of those that
its parameters name, and gives scores of the same shape of which the lowest wins. They can be

- `student`: mean log-probability of the answer's tokens to the student, which has read the prompt;
- `local`: the same where the student reads but a window before each few tokens;
- `teacher`: mean log-probability of the tokens to the teacher that wrote them, NaN where nobody knows it;
- `same`: booleans, whether the student's own answer is the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

import torch

from .assignment import choose_lowest
from .rejection import select_by_loss_rank


def log_likelihood(student: torch.Tensor) -> torch.Tensor:
    """Score by the student's log-probability per token."""
    return -student


def same_answer(student: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
    """Score as [`log_likelihood`], but where somebody says what the student says, among those alone."""
    return torch.where(same.any(dim=1, keepdim=True) & ~same, torch.inf, -student)


def log_likelihood_and_confidence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Score by the log-probability per token to the student and to the teacher itself, together.

    Where it is not known of one of those that answered, it counts for none of them: any would be more than none.
    """
    is_known = ~(teacher.isnan() & ~student.isnan()).any(dim=1, keepdim=True)
    return -torch.where(is_known, student + teacher, student)


def local_log_likelihood(local: torch.Tensor) -> torch.Tensor:
    """Score by the student's log-probability of few tokens at a time, for long answers.

    Source: After Local Naturalness, arXiv 2510.03988; in windows of tokens, not of steps of reasoning, which is ours.
    """
    return -local


RULES: dict[str, Callable[..., torch.Tensor]] = {
    "log_likelihood": log_likelihood,
    "log_likelihood+confidence": log_likelihood_and_confidence,
    "same_answer": same_answer,
    "local": local_log_likelihood,
}
REJECTIONS = ("none", "loss_rank", "same_answer")


def rule_reads(rule: str) -> tuple[str, ...]:
    """Name what a rule wants to know of answers; a `ValueError` where there is no such rule."""
    if rule not in RULES:
        raise ValueError(f"`rule` must be one of {list(RULES)}, got {rule!r}. Choose one of them.")
    return tuple(inspect.signature(RULES[rule]).parameters)


def choose_teacher(rule: str, known: Mapping[str, torch.Tensor], answered: torch.Tensor) -> torch.Tensor:
    """Choose whose answer to take by a rule: positions `(num_examples,)`, ties to the first, -1 if nobody `answered`.

    `known` holds by name at least what the rule reads; it and `answered` are `(num_examples, num_teachers)`. A
    `ValueError` where there is no such rule, or an answer has no score.

    Examples:
        >>> student = torch.tensor([[-1.0, -2.0], [-3.0, -2.0]])
        >>> choose_teacher("log_likelihood", {"student": student}, torch.ones(2, 2, dtype=torch.bool)).tolist()
        [0, 1]
    """
    reads = rule_reads(rule)  # refuses a rule that there is not
    scores = RULES[rule](**{name: known[name] for name in reads})
    return choose_lowest(scores, answered)


def select_answers(
    rejection: str, losses: torch.Tensor, same: torch.Tensor | None, candidates: torch.Tensor
) -> torch.Tensor:
    """Select what to train on of the answers that were chosen, bool `(num_examples,)`.

    By `"none"`, `"same_answer"` (those that say what the student says) or `"loss_rank"` (as many, of the lowest
    losses, ties by row). Of what was chosen, `(num_examples,)`: `losses`, minus the log-probability per token;
    `same`, whether the student's own answer is the same, which `"none"` need not know; `candidates`, whether there is
    an answer. A `ValueError` if there is no such rejection, or nothing would be kept.

    Source: arXiv 2402.15505, released code, with an answer in the place of a label; `"same_answer"` is the first stage
    of Weak-to-Strong Reasoning, arXiv 2407.13647.
    """
    if rejection not in REJECTIONS:
        raise ValueError(f"`rejection` must be one of {list(REJECTIONS)}, got {rejection!r}. Choose one of them.")
    if rejection == "none" or same is None:
        return candidates.clone()
    agreed = same & candidates
    if candidates.any() and not agreed.any():
        raise ValueError(
            f"`rejection` {rejection!r} keeps as many answers as the student gives itself, got none of "
            f"{int(candidates.sum())}. Use 'none', another `normalize`, more `max_new_tokens`, or a root that "
            "teaches the form of an answer."
        )
    return agreed if rejection == "same_answer" else select_by_loss_rank(losses, int(agreed.sum()), candidates)

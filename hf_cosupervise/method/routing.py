"""The E-step of answers in words: whose answer to take, and which to leave out.

What is known of each answer stands in tensors `(num_examples, num_teachers)`. A rule is a function of those that its
parameters name, and gives scores of the same shape of which the lowest wins. They can be

- `student`: mean log-probability of the answer's tokens to the student, which has read the prompt;
- `local`: the same where the student reads but a window before each few tokens;
- `teacher`: mean log-probability of the tokens to the teacher that wrote them, NaN where nobody knows it;
- `same`: booleans, whether the student's own answer is the same;
- `groups`: integers, which teachers say the same, see [`group_answers`];
- `prompts`: what the student makes of each prompt before any answer, `(num_examples, feature_size)`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

import torch

from .assignment import choose_lowest
from .linear_head import cross_products, gram_matrix
from .rejection import select_by_loss_rank
from .ridge import left_out_predictions

_LEAST = 0.1  # of an even chance: no router is surer than that that a teacher is the wrong one


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
    return -student - _known(student, teacher)


def router(student: torch.Tensor, teacher: torch.Tensor, groups: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
    """Score by the student, by all who say the same, and by a router that learns from prompts who is chosen.

    An answer has the student's log-probability per token, and the logarithm of the sum, over all who say it, of their
    own probability per token (1 where it is not known of all). Whom that chooses, a router learns to tell from the
    prompts, see [`route`]; each teacher's probability is multiplied by what the router finds, and the choice is made
    again. Of those who say what wins, the likeliest speaks.

    Source: Ours; a step of EM for a mixture of experts whose gate is a ridge regression.
    """
    own = _known(student, teacher)
    chosen = choose_lowest(_say(student, own, groups), ~student.isnan())
    return _say(student, own + route(prompts, chosen, student.shape[1]), groups)


def _known(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Log-probability per token to each teacher, 0 to all where it is not known of one of those that answered."""
    is_known = ~(teacher.isnan() & ~student.isnan()).any(dim=1, keepdim=True)
    return torch.where(is_known, teacher, 0)


def _say(student: torch.Tensor, own: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Scores by the student and by each teacher's `own`, of those alone who say what wins by all of them together."""
    answered = ~student.isnan()
    same = (groups[:, :, None] == groups[:, None, :]) & (groups >= 0)[:, :, None] & answered[:, None, :]
    same |= torch.eye(student.shape[1], dtype=torch.bool)  # whom nothing can be compared with speaks for itself
    together = own[:, None, :].masked_fill(~same, -torch.inf).logsumexp(dim=2)
    best = choose_lowest(-student - together, answered).clamp(min=0)
    wins = same[torch.arange(len(same)), best]
    return torch.where(wins, -student - own, torch.inf)


def route(prompts: torch.Tensor, chosen: torch.Tensor, num_teachers: int) -> torch.Tensor:
    """Tell how much likelier each teacher is chosen for a prompt than for any other one, as a logarithm.

    Each prompt is predicted by the ridge regression of all others on standardised features, with the penalty that
    predicts choices best; where it does so no better than the shares of the teachers, by more than a standard error,
    prompts tell nothing, and all is 0. Of `prompts` `(num_examples, feature_size)` and `chosen` `(num_examples,)`, -1
    for none, which counts for nothing; returns float32 `(num_examples, num_teachers)`.

    Examples:
        >>> prompts = torch.tensor([[1.0], [1.1], [0.9], [-1.0], [-1.1], [-0.9]])
        >>> route(prompts, torch.tensor([0, 0, 0, 1, 1, 1]), 2).argmax(dim=1).tolist()
        [0, 0, 0, 1, 1, 1]
    """
    found = torch.zeros(len(prompts), num_teachers)
    rows = (chosen >= 0).nonzero().squeeze(1)
    if len(rows) < 3:  # of two, each is predicted by the other alone
        return found
    features, targets = prompts[rows].float(), torch.nn.functional.one_hot(chosen[rows], num_teachers).float()
    means = features.mean(dim=0, dtype=torch.float64).float()
    spreads = (features := features - means).std(dim=0)
    # What varies by no more than rounding does is as good as constant.
    features = features / spreads.where(spreads > 1e-5 * means.abs() + 1e-30, torch.inf)
    places, origin = torch.arange(len(rows)), torch.zeros(features.shape[1])
    cross = cross_products(features, places, targets.__getitem__, num_teachers, origin)
    predictions = left_out_predictions(features, targets, gram_matrix(features, places, origin), cross)
    usual = (targets.sum(dim=0) - targets) / (len(rows) - 1)  # of all others, as the predictions are
    errors = (predictions - targets).square().sum(dim=2)
    best = errors.sum(dim=1).nan_to_num(nan=torch.inf).argmin()
    gains = (usual - targets).square().sum(dim=1) - errors[best]
    if not gains.mean() > gains.std() / len(rows) ** 0.5:
        return found
    least = _LEAST / num_teachers
    found[rows] = predictions[best].clamp(min=least).log() - usual.clamp(min=least).log()
    return found


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
    "router": router,
}
REJECTIONS = ("none", "loss_rank", "same_answer")


def rule_reads(rule: str) -> tuple[str, ...]:
    """Name what a rule wants to know of answers; a `ValueError` where there is no such rule."""
    if not isinstance(rule, str) or rule not in RULES:
        raise ValueError(f"`rule` must be one of {list(RULES)}, got {rule!r}. Choose one of them.")
    return tuple(inspect.signature(RULES[rule]).parameters)


def choose_teacher(rule: str, known: Mapping[str, torch.Tensor], answered: torch.Tensor) -> torch.Tensor:
    """Choose whose answer to take by a rule: positions `(num_examples,)`, ties to the first, -1 if nobody `answered`.

    `known` holds by name at least what the rule reads; `answered` is `(num_examples, num_teachers)`. A `ValueError`
    where there is no such rule, or an answer has no score.

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

    `rejection` is `"none"`, `"same_answer"` (those that say what the student says) or `"loss_rank"` (as many, of the
    lowest losses, ties by row). Of what was chosen, `(num_examples,)` all, `losses` are minus the student's
    log-probability per token, `same` says whether the student's own answer is the same, which `"none"` need not know,
    and `candidates` whether there is an answer. A `ValueError` if there is no such rejection, or nothing would be
    kept.
    Source: arXiv 2402.15505, released code, with an answer in the place of a label; `"same_answer"` is the first stage
    of Weak-to-Strong Reasoning, arXiv 2407.13647.

    Examples:
        >>> losses, same = torch.tensor([0.3, 0.1, 0.2]), torch.tensor([True, False, True])
        >>> select_answers("loss_rank", losses, same, torch.ones(3, dtype=torch.bool)).tolist()
        [False, True, True]
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

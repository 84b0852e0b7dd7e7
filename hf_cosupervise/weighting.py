"""Weights for teachers: boosted on a few labels, balanced by gradients, or learned beside a student."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import numpy as np
import torch

from .aggregation import check_labels, check_teacher_probs, harden
from .losses import soft_cross_entropy

_RIDGE = 1e-10
_MIN_PROB = 1e-6


def weighted_mean_probs(teacher_probs: torch.Tensor, answered: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Average the probabilities of the teachers that answered with a weight each, sum_k w_k t_k / sum_k w_k.

    Args:
        teacher_probs (`torch.Tensor` of shape `(num_examples, num_teachers, num_labels)`):
            Rows sum to 1, or are all zero where there is no answer.
        answered (`torch.BoolTensor` of shape `(num_examples, num_teachers)`):
            Who answered.
        weights (`torch.Tensor` of shape `(num_teachers,)` or `(num_examples, num_teachers)`):
            At least 0.

    Returns:
        `torch.Tensor` of shape `(num_examples, num_labels)`: rows sum to 1, all zero where nobody of weight answered.

    Raises:
        ValueError: If the shapes do not fit, or a weight is negative, infinite or NaN.

    Examples:
        >>> probs, weights = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([3.0, 1.0])
        >>> weighted_mean_probs(probs, torch.tensor([[True, True]]), weights).tolist()
        [[0.75, 0.25]]
    """
    if teacher_probs.ndim != 3 or answered.shape != teacher_probs.shape[:2] or answered.dtype != torch.bool:
        raise ValueError(
            "Expected `teacher_probs` (num_examples, num_teachers, num_labels) and boolean `answered` (num_examples, "
            f"num_teachers), got {tuple(teacher_probs.shape)} and {tuple(answered.shape)} of {answered.dtype}. Give "
            "both for the same examples."
        )
    is_fit = weights.shape in (answered.shape, answered.shape[1:])
    if not is_fit or not bool(((weights >= 0) & weights.isfinite()).all()):
        raise ValueError(
            f"Expected finite `weights` of shape {tuple(answered.shape[1:])} or {tuple(answered.shape)}, each at "
            f"least 0, got {weights}. Give one for each teacher."
        )
    return _weighted_mean(teacher_probs, answered, weights)


def _weighted_mean(teacher_probs: torch.Tensor, answered: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What is checked already, for loops."""
    dtype = torch.promote_types(teacher_probs.dtype, weights.dtype)
    shares = weights.to(dtype).expand(answered.shape) * answered
    total = shares.sum(dim=1, keepdim=True)
    shares = shares / torch.where(total > 0, total, 1.0)
    return torch.bmm(shares.unsqueeze(1), teacher_probs.to(dtype)).squeeze(1)


def weighted_vote(labels: torch.Tensor, weights: torch.Tensor, num_labels: int) -> torch.Tensor:
    """Let every teacher that answered cast a vote of its weight.

    Args:
        labels (`torch.LongTensor` of shape `(num_examples, num_teachers)`):
            Hard labels, -1 where a teacher has no answer.
        weights (`torch.Tensor` of shape `(num_teachers,)`):
            At least 0, as from [`boosting_weights`].
        num_labels (`int`):
            Number of labels.

    Returns:
        `torch.Tensor` of shape `(num_examples, num_labels)`: shares of the vote, rows sum to 1, all zero where nobody
        of weight answered.

    Raises:
        ValueError: If `labels` or `weights` are not as said above.

    Examples:
        >>> weighted_vote(torch.tensor([[0, 1, 1], [2, -1, -1]]), torch.tensor([3.0, 1.0, 0.0]), num_labels=3).tolist()
        [[0.75, 0.25, 0.0], [0.0, 0.0, 1.0]]
    """
    check_labels(labels, num_labels)
    if weights.shape != labels.shape[1:] or not bool((weights >= 0).all()):
        raise ValueError(f"Expected `weights` of shape {tuple(labels.shape[1:])}, each at least 0, got {weights}.")
    votes = weights.new_zeros(labels.shape[0], num_labels)
    votes.scatter_add_(1, labels.long().clamp(min=0), weights.expand(labels.shape) * (labels >= 0))
    total = votes.sum(dim=1, keepdim=True)
    return votes / torch.where(total > 0, total, 1.0)


def boosting_weights(
    labels: torch.Tensor, oracle_labels: torch.Tensor, num_labels: int, *, min_examples: int = 10
) -> torch.Tensor:
    """Weigh given teachers by boosting on a small labelled set.

    Teachers are taken one after another, the one of lowest weighted error e first; with
    L = ln((1 - e)/e) + ln(C - 1), its weight is L (SAMME), or L/2 for two labels (AdaBoost: the factor is the same
    for all teachers, so it changes no vote). Examples it got wrong then count e^{L/2} times, those it got right
    e^{-L/2} times, those it did not answer as before. e is at least 1/(2n) over the n examples it answered, so that
    a perfect teacher has a finite weight. A teacher no better than chance (e >= 1 - 1/C), or without an answer here,
    gets 0. Labels for the rest follow by [`weighted_vote`] or [`weighted_mean_probs`].

    Args:
        labels (`torch.LongTensor` of shape `(num_examples, num_teachers)`):
            What the teachers say about the labelled examples, -1 where a teacher has no answer.
        oracle_labels (`torch.LongTensor` of shape `(num_examples,)`):
            True labels, of examples that are used for nothing else.
        num_labels (`int`):
            Number of labels C, at least 2. A label without an example among these is allowed, with a warning.
        min_examples (`int`, *optional*, defaults to 10):
            Fewer labelled examples are refused: the weights would be chance.

    Returns:
        `torch.DoubleTensor` of shape `(num_teachers,)`, each at least 0.

    Raises:
        ValueError: If there are too few labelled examples, labels out of range, or no teacher better than chance.

    Source:
        EnsemW2S, arXiv 2410.04571 (its released code uses the binary form for any C), with SAMME's term for C > 2;
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
    floor = 0.5 / answered.sum(dim=0).clamp(min=1).double()
    weights = torch.zeros(labels.shape[1], dtype=torch.float64)
    example_weights = torch.full((labels.shape[0],), 1 / labels.shape[0], dtype=torch.float64, device=labels.device)
    left = [k for k in range(labels.shape[1]) if bool(answered[:, k].any())]
    while left:
        mass = example_weights[:, None] * answered
        errors = torch.maximum((example_weights[:, None] * wrong).sum(dim=0) / mass.sum(dim=0), floor)
        best = min(left, key=lambda k: float(errors[k]))  # the first of equals
        error = float(errors[best])
        if error >= 1 - 1 / num_labels:
            break
        log_odds = math.log((1 - error) / error) + math.log(num_labels - 1)
        weights[best] = log_odds / 2 if num_labels == 2 else log_odds
        example_weights = example_weights * (sign[:, best] * log_odds / 2).exp()
        example_weights /= example_weights.sum()
        left.remove(best)
    if not bool(weights.any()):
        raise ValueError(
            f"No teacher is better than chance on the {labels.shape[0]} labelled examples. Check that `labels` and "
            "`oracle_labels` have the same rows and the same label numbers."
        )
    return weights.to(labels.device)


def _check_labelled(labels: torch.Tensor, oracle_labels: torch.Tensor, num_labels: int, min_examples: int) -> None:
    check_labels(labels, num_labels)
    if oracle_labels.shape != labels.shape[:1]:
        raise ValueError(
            f"Expected `oracle_labels` of shape ({labels.shape[0]},), one for each row of `labels`, got "
            f"{tuple(oracle_labels.shape)}."
        )
    if num_labels < 2 or len(labels) < min_examples:
        raise ValueError(
            f"Boosting needs two labels and {min_examples} labelled examples (`min_examples`), got {num_labels} and "
            f"{len(labels)}. Label more, or use `majority_vote`, which needs none."
        )
    if int(oracle_labels.min()) < 0 or int(oracle_labels.max()) >= num_labels:
        raise ValueError(
            f"`oracle_labels` must be in [0, {num_labels}), got values from {int(oracle_labels.min())} to "
            f"{int(oracle_labels.max())}."
        )
    counts = torch.bincount(oracle_labels, minlength=num_labels)
    if not bool(counts.all()):
        without = (counts == 0).nonzero().flatten().tolist()
        warnings.warn(
            f"{len(without)} of {num_labels} labels have no labelled example ({str(without[:10])[1:-1]}): the weights "
            "say nothing about how well teachers know them.",
            stacklevel=3,
        )


# ── AE-KD ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def min_norm_weights(gradients: torch.Tensor, cap: float = 0.6) -> torch.Tensor:
    """Find the shares of teachers whose mixed gradient is shortest.

    argmin |sum_m w_m g_m|^2 over w_m >= 0, sum_m w_m = 1 and w_m <= cap, by active sets: exact but for a term of
    1e-10 |w|^2 sum_m |g_m|^2, which picks the most even w where several are as good (two equal teachers).

    Args:
        gradients (`torch.Tensor` of shape `(num_teachers, num_directions)`):
            One gradient for each teacher.
        cap (`float`, *optional*, defaults to 0.6):
            The largest share, in [1/num_teachers, 1]. A single teacher has share 1 whatever the cap.

    Returns:
        `torch.DoubleTensor` of shape `(num_teachers,)`, sums to 1.

    Raises:
        ValueError: If the cap leaves no room for a sum of 1, or gradients are not finite.

    Source:
        Du et al., Agree to Disagree, NeurIPS 2020.

    Examples:
        >>> gradients = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> [round(weight, 6) for weight in min_norm_weights(gradients, cap=1.0).tolist()]
        [0.8, 0.2]
        >>> [round(weight, 6) for weight in min_norm_weights(gradients).tolist()]
        [0.6, 0.4]
    """
    if gradients.ndim != 2 or len(gradients) == 0 or not bool(gradients.isfinite().all()):
        raise ValueError(
            "Expected finite `gradients` of shape (num_teachers, num_directions) of one teacher or more, got shape "
            f"{tuple(gradients.shape)}."
        )
    num_teachers = len(gradients)
    if num_teachers == 1:
        return torch.ones(1, dtype=torch.float64, device=gradients.device)
    if not 1 / num_teachers - 1e-12 <= cap <= 1:  # a cap of 1 / 3 is one, however it was rounded
        raise ValueError(
            f"`cap` must be in [1/{num_teachers}, 1] for {num_teachers} teachers, or shares cannot sum to 1, got "
            f"{cap}."
        )
    rows = gradients.detach().double().cpu()
    scale = float(rows.abs().max())
    rows = rows / scale if scale > 0 else rows
    gram = (rows @ rows.T).numpy()
    gram = gram / max(float(np.trace(gram)), 1.0) + _RIDGE * np.eye(num_teachers)  # a trace of 0: no gradient at all
    return torch.from_numpy(_solve_capped(gram, cap)).to(gradients.device)


def _solve_capped(gram: np.ndarray, cap: float) -> np.ndarray:
    """Minimise w G w over the capped simplex, G positive definite: move until a bound blocks, release what pulls."""
    num = len(gram)
    weights, free = np.full(num, 1 / num), np.ones(num, dtype=bool)
    for _ in range(100 * num):  # each pass ends at a new set of bounds; far fewer are met
        goal = _solve_free(gram, weights, free)
        step = goal - weights
        room = np.full(num, np.inf)
        down, up = free & (step < 0), free & (step > 0)
        room[down] = weights[down] / -step[down]
        room[up] = np.maximum(cap - weights[up], 0) / step[up]
        blocking = int(room.argmin())
        if room[blocking] < 1 and free.sum() > 1:  # the last one is where the others leave it, but for rounding
            weights = weights + room[blocking] * step
            weights[blocking] = cap if up[blocking] else 0.0
            free[blocking] = False
            continue
        weights = goal
        slopes = gram @ weights
        level = slopes[free].mean()
        pulls = ~free & np.where(weights > 0, slopes > level + 1e-12, slopes < level - 1e-12)
        if not pulls.any():
            return weights.clip(0, cap)
        free[int(pulls.argmax())] = True  # the first, which cannot go round in circles
    raise ArithmeticError(f"No shares found for {num} teachers; their gradients span too many orders of magnitude.")


def _solve_free(gram: np.ndarray, weights: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Minimise over the free weights while the others stay and the sum is 1."""
    num = int(free.sum())
    system = np.zeros((num + 1, num + 1))
    system[:num, :num] = gram[np.ix_(free, free)]
    system[:num, num] = system[num, :num] = 1.0
    right = np.append(-gram[np.ix_(free, ~free)] @ weights[~free], 1 - weights[~free].sum())
    goal = weights.copy()
    goal[free] = np.linalg.solve(system, right)[:num]
    return goal


def aekd_weights(
    student_logits: torch.Tensor,
    teacher_probs: torch.Tensor,
    answered: torch.Tensor,
    *,
    temperature: float = 4.0,
    cap: float = 0.6,
    min_prob: float = _MIN_PROB,
) -> torch.Tensor:
    """Weigh the teachers of a batch so that their gradients on the student's outputs oppose each other least.

    g_m is the mean over what teacher m answered of the gradient of T^2 KL(softmax(t_m/T) || softmax(s/T)) by s, which
    is T (softmax(s/T) - softmax(t_m/T)); the weights are [`min_norm_weights`] of them. They are made anew for every
    batch, without gradient, and used as

        loss = (weights * T**2 * kl_per_teacher).sum()

    where `kl_per_teacher` is the mean of KL(softmax(t_m/T) || softmax(s/T)) over what teacher m answered. One vector
    serves a whole batch, so a specialist counts alike inside and outside its scope.

    Args:
        student_logits (`torch.Tensor` of shape `(batch, num_labels)`):
            Student logits.
        teacher_probs (`torch.Tensor` of shape `(batch, num_teachers, num_labels)`):
            Rows sum to 1, or are all zero where there is no answer; t is their logarithm.
        answered (`torch.BoolTensor` of shape `(batch, num_teachers)`):
            Who answered.
        temperature (`float`, *optional*, defaults to 4.0):
            T, above 0.
        cap (`float`, *optional*, defaults to 0.6):
            The largest share; raised to 1/m where only m teachers answered in the batch and it leaves no room.
        min_prob (`float`, *optional*, defaults to 1e-6):
            Probabilities are at least this inside the logarithm.

    Returns:
        `torch.Tensor` of shape `(num_teachers,)`, float32: sums to 1, 0 for a teacher without an answer, all zero if
        nobody answered.

    Raises:
        ValueError: If shapes or values are not as said above.

    Source:
        Du et al., Agree to Disagree, NeurIPS 2020; missing answers are ours.

    Examples:
        >>> probs, answered = torch.tensor([[[0.9, 0.1], [0.2, 0.8]]]), torch.tensor([[True, True]])
        >>> [round(w, 3) for w in aekd_weights(torch.zeros(1, 2), probs, answered, temperature=1.0, cap=1.0).tolist()]
        [0.429, 0.571]
    """
    check_teacher_probs(teacher_probs, answered)
    if student_logits.shape != (teacher_probs.shape[0], teacher_probs.shape[2]) or temperature <= 0:
        raise ValueError(
            f"Expected `student_logits` of shape ({teacher_probs.shape[0]}, {teacher_probs.shape[2]}) and a "
            f"`temperature` above 0, got {tuple(student_logits.shape)} and {temperature}."
        )
    student = (student_logits.detach().double() / temperature).softmax(dim=-1)
    weights = torch.zeros(teacher_probs.shape[1], device=teacher_probs.device)
    speakers = answered.any(dim=0).nonzero().flatten().tolist()
    if not speakers:
        return weights
    gradients = []
    for k in speakers:
        rows = answered[:, k]
        teacher = (teacher_probs[rows, k].double().clamp(min=min_prob).log() / temperature).softmax(dim=-1)
        gradients.append(temperature * (student[rows] - teacher).mean(dim=0))
    weights[speakers] = min_norm_weights(torch.stack(gradients), max(cap, 1 / len(speakers))).to(weights.dtype)
    return weights


class AdaptiveEnsembleDistillation:
    """Distil from several teachers at once, with shares of [`aekd_weights`] for every batch.

    The loss of example i is T^2 sum_m w_m KL(softmax(t_im/T) || softmax(s_i/T)) over the teachers that answered it,
    with t the logarithm of their probabilities and w without gradient. Made for
    `CoSupervisedTrainer(loss_func=...)` on a pool of the same examples.

    Args:
        teacher_probs (`torch.Tensor` of shape `(num_examples, num_teachers, num_labels)`):
            Rows sum to 1, or are all zero where there is no answer. All of them stay in memory.
        answered (`torch.BoolTensor` of shape `(num_examples, num_teachers)`):
            Who answered.
        temperature (`float`, *optional*, defaults to 4.0):
            T, above 0.
        cap (`float`, *optional*, defaults to 0.6):
            See [`aekd_weights`].

    Raises:
        ValueError: If shapes or values are not as said above.

    Source:
        Du et al., Agree to Disagree, NeurIPS 2020; missing answers are ours.

    Examples:
        >>> probs, answered = torch.tensor([[[0.9, 0.1], [0.2, 0.8]]]), torch.tensor([[True, True]])
        >>> loss = AdaptiveEnsembleDistillation(probs, answered, temperature=1.0, cap=1.0)
        >>> [round(value, 3) for value in loss(torch.zeros(1, 2), None, torch.tensor([0])).tolist()]
        [0.268]
    """

    def __init__(
        self, teacher_probs: torch.Tensor, answered: torch.Tensor, *, temperature: float = 4.0, cap: float = 0.6
    ) -> None:
        check_teacher_probs(teacher_probs, answered)
        if not (0 < temperature < math.inf and 0 < cap <= 1):
            raise ValueError(
                f"Expected a `temperature` above 0 and a `cap` in (0, 1], got {temperature} and {cap}. Leave them out "
                "for 4 and 0.6."
            )
        self.teacher_probs, self.answered = teacher_probs, answered
        self.temperature, self.cap = temperature, cap

    def __call__(self, logits: torch.Tensor, target_probs: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
        """Give the loss of each example of a batch.

        Args:
            logits (`torch.Tensor` of shape `(batch, num_labels)`):
                Student logits.
            target_probs (`torch.Tensor`, *optional*):
                Not looked at: the teachers are.
            rows (`torch.LongTensor` of shape `(batch,)`):
                Which of the examples these are.

        Returns:
            `torch.Tensor` of shape `(batch,)`: at least 0; 0 where nobody answered.
        """
        rows = rows.to(self.answered.device)
        probs, answered = self.teacher_probs[rows].to(logits.device), self.answered[rows].to(logits.device)
        options = {"temperature": self.temperature, "cap": self.cap, "min_prob": _MIN_PROB}
        weights = aekd_weights(logits, probs, answered, **options) * answered
        teacher = (probs.float().clamp(min=_MIN_PROB).log() / self.temperature).log_softmax(dim=-1)
        student = (logits.float() / self.temperature).log_softmax(dim=-1)
        divergences = (teacher.exp() * (teacher - student.unsqueeze(1))).sum(dim=-1)
        return self.temperature**2 * (weights * divergences).sum(dim=1)


# ── RAVEN ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class RavenFit(NamedTuple):
    """What [`fit_raven`] finds.

    Args:
        weight (`torch.Tensor` of shape `(num_labels, feature_size)`):
            Of the student's head.
        bias (`torch.Tensor` of shape `(num_labels,)`):
            Of the student's head.
        teacher_weights (`torch.Tensor` of shape `(num_teachers,)` or `(num_examples, num_teachers)`):
            Sum to 1 over the teachers that answered; give them to [`weighted_mean_probs`] for the labels.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    teacher_weights: torch.Tensor


def fit_raven(
    features: torch.Tensor,
    teacher_probs: torch.Tensor,
    answered: torch.Tensor,
    *,
    epochs: int = 20,
    easy_epochs: int = 5,
    learning_rate: float = 1e-3,
    weight_learning_rate: float = 1e-3,
    per_example: bool = False,
    batch_size: int = 256,
    seed: int = 0,
) -> RavenFit:
    """Fit a linear student and the weights of its teachers on the same loss.

    The label is y_i = sum_k w_k t_ik over the teachers that answered, the loss the mean cross-entropy of the student
    against y; Adam moves the head (from zero), plain SGD w (from equal shares), and after each step w is clamped from
    below at 1e-6 and normalised. The first `easy_epochs` take only examples on which all answering teachers have the
    same most probable label, and leave w alone. Hard teachers are one-hot rows, like any others; the released code
    raises on them.

    Args:
        features (`torch.Tensor` of shape `(num_examples, feature_size)`):
            Inputs of the head.
        teacher_probs (`torch.Tensor` of shape `(num_examples, num_teachers, num_labels)`):
            Rows sum to 1, or are all zero where there is no answer.
        answered (`torch.BoolTensor` of shape `(num_examples, num_teachers)`):
            Who answered; examples without an answer are left out.
        epochs (`int`, *optional*, defaults to 20):
            Passes over the data, the easy ones included.
        easy_epochs (`int`, *optional*, defaults to 5):
            How many of them are easy.
        learning_rate (`float`, *optional*, defaults to 1e-3):
            Of the head.
        weight_learning_rate (`float`, *optional*, defaults to 1e-3):
            Of w. The loss is a mean over the batch, so a weight per example moves `batch_size` times less.
        per_example (`bool`, *optional*, defaults to `False`):
            Whether each example has weights of its own.
        batch_size (`int`, *optional*, defaults to 256):
            Examples per step.
        seed (`int`, *optional*, defaults to 0):
            For the order of the examples.

    Returns:
        [`RavenFit`], in the precision of the features but at least float32.

    Raises:
        ValueError: If shapes or values are not as said above, or if there is nothing to learn from.

    Source:
        RAVEN, arXiv 2510.21332; missing answers are ours. The loss is linear in w and lowest at the teacher that the
        student follows already, hence the easy start.

    Examples:
        >>> probs = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]]).repeat(50, 1, 1)
        >>> fit = fit_raven(torch.tensor([[1.0], [-1.0]]).repeat(50, 1), probs, torch.ones(100, 2, dtype=torch.bool))
        >>> fit.teacher_weights.tolist()
        [0.5, 0.5]
    """
    _check_raven(features, teacher_probs, answered, (epochs, batch_size), easy_epochs)
    usable = answered.any(dim=1).nonzero().flatten()
    easy = usable[unanimous(teacher_probs, answered)[usable]]
    if len(easy if easy_epochs else usable) == 0:
        raise ValueError(
            f"Nothing to learn from: of {len(features)} examples {len(usable)} have an answer, and on {len(easy)} of "
            "them all teachers agree. Set `easy_epochs=0` to start without agreement."
        )
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    weight = features.new_zeros(teacher_probs.shape[2], features.shape[1]).requires_grad_()
    bias = features.new_zeros(teacher_probs.shape[2]).requires_grad_()
    optimizer = torch.optim.Adam([weight, bias], lr=learning_rate)
    can_speak = answered if per_example else answered.any(dim=0)
    teacher_weights = _project(torch.ones_like(can_speak, dtype=features.dtype), can_speak)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        is_easy = epoch < easy_epochs
        rows = easy if is_easy else usable
        order = torch.randperm(len(rows), generator=generator).to(rows.device)
        for batch in rows[order].split(batch_size):
            current = (teacher_weights[batch] if per_example else teacher_weights).clone().requires_grad_()
            targets = _weighted_mean(teacher_probs[batch], answered[batch], current)
            logits = torch.nn.functional.linear(features[batch], weight, bias)
            optimizer.zero_grad()
            soft_cross_entropy(logits, targets).mean().backward()
            optimizer.step()
            if is_easy or current.grad is None:
                continue
            moved = current.detach() - weight_learning_rate * current.grad
            if per_example:
                teacher_weights[batch] = _project(moved, can_speak[batch])
            else:
                teacher_weights = _project(moved, can_speak)
    return RavenFit(weight.detach(), bias.detach(), teacher_weights)


def _project(weights: torch.Tensor, can_speak: torch.Tensor) -> torch.Tensor:
    """Clamp at 1e-6 and normalise over those who can speak; a row in which nobody can stays zero."""
    weights = weights.clamp(min=1e-6) * can_speak
    total = weights.sum(dim=-1, keepdim=True)
    return weights / torch.where(total > 0, total, 1.0)


def unanimous(teacher_probs: torch.Tensor, answered: torch.Tensor) -> torch.Tensor:
    """Tell where all teachers that answered have the same most probable label.

    Args:
        teacher_probs (`torch.Tensor` of shape `(num_examples, num_teachers, num_labels)`):
            Rows sum to 1, or are all zero where there is no answer.
        answered (`torch.BoolTensor` of shape `(num_examples, num_teachers)`):
            Who answered.

    Returns:
        `torch.BoolTensor` of shape `(num_examples,)`: True where nobody answered, too.

    Examples:
        >>> probs = torch.tensor([[[0.9, 0.1], [0.6, 0.4], [0.0, 0.0]]])
        >>> unanimous(probs, torch.tensor([[True, True, False]])).tolist()
        [True]
    """
    labels = harden(teacher_probs, answered)
    highest = labels.amax(dim=1, keepdim=True)
    return ((labels == highest) | ~answered).all(dim=1)


def _check_raven(
    features: torch.Tensor, teacher_probs: torch.Tensor, answered: torch.Tensor, counts: tuple[int, ...], easy: int
) -> None:
    check_teacher_probs(teacher_probs, answered)
    if features.ndim != 2 or len(features) != len(teacher_probs) or not bool(features.isfinite().all()):
        raise ValueError(
            f"Expected finite `features` of shape ({len(teacher_probs)}, feature_size), got {tuple(features.shape)}."
        )
    if min(counts) < 1 or not 0 <= easy <= counts[0]:
        raise ValueError(
            "Expected `epochs` and `batch_size` of at least 1 and `easy_epochs` from 0 to `epochs`, got "
            f"{counts[0]}, {counts[1]} and {easy}."
        )

"""Published losses for noisy and soft labels, one value per example, each with its gradient.

All take student logits and pseudolabels, `(num_examples, num_labels)` both, and give `(num_examples,)`, where they say
nothing else, and raise `ValueError` if shapes differ or a parameter is out of range.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .losses import (
    MIN_PROB,
    LossAndGradient,
    LossFunction,
    check_number,
    check_pair,
    cross_entropy,
    cross_entropy_gradient,
    soft_cross_entropy,
)

# Arguments of a loss that are not its parameters.
_GIVEN = ("logits", "target_probs", "fraction_done", "num_examples", "num_labels")


def kl_divergence(logits: torch.Tensor, target_probs: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Compute the divergence of the student from the pseudolabel at a temperature above 0, as distillation does.

    loss_i = tau^2 KL(y_tau || p_tau), with p_tau = softmax(s / tau) and y_tau ∝ y^(1 / tau), the softmax of the
    teacher's logits over tau. At tau = 1 it is the cross-entropy less the entropy of y, at least 0 up to rounding.
    Source: arXiv 1503.02531 (Hinton et al.); tau^2 keeps the size of the gradient.

    Examples:
        >>> kl_divergence(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])).tolist()
        [0.6931471824645996]
    """
    logits, targets = check_pair(logits, target_probs)
    log_probs, softened = functional.log_softmax(logits / temperature, dim=-1), _soften(targets, temperature)
    return temperature**2 * (torch.xlogy(softened, softened) - softened * log_probs).sum(dim=-1)


def reverse_kl(logits: torch.Tensor, target_probs: torch.Tensor) -> torch.Tensor:
    """Compute the divergence of the pseudolabel from the student, which forgives labels that the student leaves out.

    loss_i = KL(p || y) = sum_c p_c (log p_c - log y_c), with y at least 1e-6 in the logarithm, as in the E-step, and
    not scaled again: a loss may fall below 0 by 1e-6 per label.
    Source: arXiv 2502.11107; the bound is ours, because a one-hot y is infinitely far from every student.

    Examples:
        >>> [round(loss, 4) for loss in reverse_kl(torch.zeros(1, 2), torch.tensor([[0.2, 0.8]])).tolist()]
        [0.2231]
    """
    logits, targets = check_pair(logits, target_probs)
    log_probs = functional.log_softmax(logits, dim=-1)
    return (log_probs.exp() * (log_probs - targets.clamp_min(MIN_PROB).log())).sum(dim=-1)


def linear_warmup(fraction_done: float, share: float = 0.1, peak: float = 0.5) -> float:
    """Let a weight climb from 0 to its peak over the first steps, and stay there.

    c = peak · min(1, fraction_done / share), all three from 0 to 1; a share of 0 is no climb. OpenAI's release climbs
    to share · peak (0.05) only, and then jumps.
    Source: arXiv 2312.09390, with its values.

    Examples:
        >>> [linear_warmup(done) for done in (0.0, 0.05, 0.1, 1.0)]
        [0.0, 0.25, 0.5, 0.5]
    """
    check_number("fraction_done", fraction_done, "Pass the steps done over all steps.")
    check_number("share", share, "Leave it out for 0.1.")
    check_number("peak", peak, "Leave it out for 0.5.")
    return peak * min(1.0, fraction_done / share) if share else peak


def confidence_targets(logits: torch.Tensor, target_probs: torch.Tensor, weight: float) -> torch.Tensor:
    """Mix the pseudolabel with the student's own prediction, hardened, `(num_examples, num_labels)`.

    target = (1 - c) y + c · onehot(argmax s), ties to the lowest label, without a gradient, c the weight from 0 to 1,
    see [`linear_warmup`]. For any number of labels; the release has two only, and hardens them at a quantile of the
    batch, which is not offered.
    Source: arXiv 2312.09390.

    Examples:
        >>> confidence_targets(torch.tensor([[2.0, 1.0]]), torch.tensor([[0.0, 1.0]]), weight=0.25).tolist()
        [[0.25, 0.75]]
    """
    check_number("weight", weight, "The published value is 0.5 after `linear_warmup`.")
    logits, targets = check_pair(logits, target_probs)
    return ((1 - weight) * targets + weight * _one_hot_argmax(logits)).detach()


def confidence_loss(logits: torch.Tensor, target_probs: torch.Tensor, weight: float) -> torch.Tensor:
    """Compute the cross-entropy `(num_examples,)` against [`confidence_targets`], whose arguments it takes.

    It lets the student trust itself over the teacher. Source: arXiv 2312.09390.

    Examples:
        >>> confidence_loss(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]), weight=0.5).tolist()
        [0.6931471824645996]
    """
    return cross_entropy(logits, confidence_targets(logits, target_probs, weight))


def product_loss(
    logits: torch.Tensor, target_probs: torch.Tensor, alpha: float = 1.0, beta: float = 1.0
) -> torch.Tensor:
    """Compute the cross-entropy against the product of what student and teacher say.

    target ∝ p^beta y^alpha, powers at least 0, rows sum to 1, without a gradient; beta = 0 is plain cross-entropy.
    Source: arXiv 2312.09390.

    Examples:
        >>> logits = torch.tensor([[0.2, 0.8]]).log()  # the target is ∝ 0.2 · 0.8, 0.8 · 0.2: both alike
        >>> [round(loss, 4) for loss in product_loss(logits, torch.tensor([[0.8, 0.2]])).tolist()]
        [0.9163]
    """
    check_number("alpha", alpha, "Leave it out for 1.", math.inf)
    check_number("beta", beta, "Leave it out for 1.", math.inf)
    logits, targets = check_pair(logits, target_probs)
    # xlogy, because y^0 is 1 where y is 0
    scores = beta * functional.log_softmax(logits, dim=-1) + torch.xlogy(alpha, targets)
    return cross_entropy(logits, functional.softmax(scores, dim=-1).detach())


def adapt_conf(logits: torch.Tensor, target_probs: torch.Tensor, temperature: float = 0.5) -> torch.Tensor:
    """Compute a mean of the teacher's and the student's own cross-entropy, weighted by the student's confidence.

    loss_i = (1 - a) CE(s, y) + a CE(s, argmax s), with a = p_y^(1/T) / (p_y^(1/T) + p_max^(1/T)) without a gradient,
    T above 0 and p_y the student's probability of the teacher's most probable label. Mind its direction: a is never
    above one half, and a student that confidently *disagrees* drives it to 0, towards the teacher: the opposite of
    [`confidence_loss`].
    Source: arXiv 2402.03749; for soft pseudolabels, the first cross-entropy over all labels is ours.

    Examples:
        >>> logits = torch.tensor([[0.2, 0.8]]).log()  # a = 0.2² / (0.2² + 0.8²) = 1 / 17
        >>> [round(loss, 4) for loss in adapt_conf(logits, torch.tensor([[1.0, 0.0]])).tolist()]
        [1.5279]
    """
    check_number("temperature", temperature, "Leave it out for 0.5.", math.inf, above=True)
    logits, targets = check_pair(logits, target_probs)
    named, own = _one_hot_argmax(targets), _one_hot_argmax(logits)
    # of the logits, because a ratio of two probabilities needs no sum over the others
    gap = (logits.masked_fill(~named, 0) - logits.masked_fill(~own, 0)).sum(dim=-1, keepdim=True)
    share = torch.sigmoid(gap / temperature)
    # both cross-entropies as one
    return cross_entropy(logits, ((1 - share) * targets + share * own).detach())


def generalized_cross_entropy(logits: torch.Tensor, target_probs: torch.Tensor, q: float = 0.7) -> torch.Tensor:
    """Compute a loss between cross-entropy and mean absolute error, which hurts less where the pseudolabel is wrong.

    loss_i = sum_c y_c (1 - p_c^q) / q, q above 0 and up to 1: cross-entropy for q -> 0, half of sum_c |p_c - y_c| for
    q = 1 and one-hot y.
    Source: arXiv 1805.07836; the mean over soft pseudolabels is ours.

    Examples:
        >>> generalized_cross_entropy(torch.zeros(1, 2), torch.tensor([[0.3, 0.7]]), q=1.0).tolist()
        [0.5]
    """
    check_number("q", q, "Leave it out for 0.7.", above=True)
    logits, targets = check_pair(logits, target_probs)
    # expm1, because 1 - p^q would be lost in rounding for small q
    return -(targets * torch.expm1(q * functional.log_softmax(logits, dim=-1))).sum(dim=-1) / q


# Below this, early-learning regularization's logarithm goes no further down.
_LEAST_OUTSIDE = 1e-4


class EarlyLearningRegularization(nn.Module):
    """Keep the student near what it said early, before it learns the pseudolabels' mistakes by heart.

    loss_i = CE(s_i, y_i) + weight · log(1 - <p_i, m_i>), after m_i <- beta m_i + (1 - beta) p_i without a gradient, m
    from 0. 1 - <p, m> is at least 1e-4 in the logarithm, and a loss may be negative. Each call in training mode moves
    the memory of its rows once, so call it once per step, and `eval()` first to only look. The memory is the buffer
    `memory` `(num_examples, num_labels)`, float32: `state_dict()` and `load_state_dict()` let a run go on.
    Source: arXiv 2007.00151, with the order of its release: the memory moves first.

    Args:
        num_examples, num_labels (`int`):
            Rows and columns of the memory.
        beta (`float`, *optional*, defaults to 0.7):
            Share of the memory that stays, from 0 to 1.
        weight (`float`, *optional*, defaults to 3.0):
            At least 0.

    Examples:
        >>> loss = EarlyLearningRegularization(num_examples=5, num_labels=2, beta=0.5, weight=1.0)
        >>> value = loss(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), torch.tensor([3]))
        >>> round(value.item(), 4)  # log 2 + log 0.75
        0.4055
        >>> loss.memory[3].tolist()
        [0.25, 0.25]
    """

    memory: torch.Tensor

    def __init__(self, num_examples: int, num_labels: int, beta: float = 0.7, weight: float = 3.0) -> None:
        super().__init__()
        for name, size in (("num_examples", num_examples), ("num_labels", num_labels)):
            if not isinstance(size, Integral) or size < 0:
                raise ValueError(f"`{name}` must be a whole number of at least 0, got {size!r}. Give the pool's.")
        check_number("beta", beta, "Leave it out for 0.7.")
        check_number("weight", weight, "Leave it out for 3.", highest=math.inf)
        self.beta, self.weight = beta, weight
        self.register_buffer("memory", torch.zeros(num_examples, num_labels, dtype=torch.float32))

    def forward(self, logits: torch.Tensor, target_probs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Move the memory of a batch, then compute its losses `(batch,)`; `rows` are its examples, each once."""
        logits, targets = check_pair(logits, target_probs)
        num_examples, num_labels = self.memory.shape
        if logits.shape[1] != num_labels or rows.shape != logits.shape[:1]:
            raise ValueError(
                f"Logits of {num_labels} labels and one row each are needed, got {tuple(logits.shape)} and "
                f"{tuple(rows.shape)}. Make the memory for this task, and pass the batch's row numbers."
            )
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < num_examples:
            raise ValueError(
                f"`rows` must lie in 0..{num_examples - 1}, got {rows.min()}..{rows.max()}. Number the training rows "
                "from 0, and make a memory for all of them."
            )
        probs = functional.softmax(logits, dim=-1)
        outside = (1 - (probs * self._remember(probs, rows)).sum(dim=-1)).clamp_min(_LEAST_OUTSIDE)
        return cross_entropy(logits, targets) + self.weight * outside.log()

    def with_gradient(
        self, logits: torch.Tensor, target_probs: torch.Tensor, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the losses and their gradient in the logits: that of the CE, less weight p (m - <p, m>) / outside.

        The memory has no gradient, and where `outside` is at its least, the second part is none.
        """
        logits, targets = check_pair(logits, target_probs)
        # One column per example, as a step has its logits: the softmax is faster so.
        log_probs, targets = functional.log_softmax(logits.T, dim=0), targets.T
        probs = log_probs.exp()
        memory = self._remember(probs.T, rows).T
        inner = (probs * memory).sum(dim=0)
        # By functions and in place: an operator between a number and a tensor takes twice as long.
        rest = torch.rsub(inner, 1)
        outside = rest.clamp_min(_LEAST_OUTSIDE)
        losses = outside.log().mul_(self.weight).sub_((targets * log_probs).sum(dim=0))
        pull = rest.ge(_LEAST_OUTSIDE).mul(self.weight).div_(outside)
        return losses, (inner - memory).mul_(pull).add_(targets.sum(dim=0)).mul_(probs).sub_(targets).T

    def _remember(self, probs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Move the memory of a batch, in its own precision and place: it may be too large for the student's."""
        rows = rows.to(self.memory.device)
        memory = self.memory.index_select(0, rows)
        if self.training:
            memory.mul_(self.beta).add_(probs.detach().to(memory), alpha=1 - self.beta)
            self.memory.index_copy_(0, rows, memory)
        return memory.to(probs)


def evidential_loss(
    logits: torch.Tensor, target_probs: torch.Tensor, fraction_done: float, gamma: float = 0.5
) -> torch.Tensor:
    """Compute a loss on the student's evidence for the pseudolabel, and for what it says itself.

    The student gives a Dirichlet: a = ReLU(s) + 1, S = sum_c a_c. For a label k, L(k) = log S - log a_k +
    fraction_done · KL(Dir(a') || Dir(1)), with a' = a but 1 at k. loss_i = (1 - gamma) sum_k y_k L(k) +
    gamma L(argmax s), both numbers from 0 to 1. Of several teachers, y is the sum. The sum over k stays outside of L;
    a public re-implementation has one factor for all labels, so that soft labels cancel. A row whose logits are all
    negative gets no gradient through ReLU; one that nobody answered, all zero, keeps the student's own part.
    Source: arXiv 2406.03199.

    Examples:
        >>> evidential_loss(torch.zeros(1, 2), torch.tensor([[0.3, 0.7]]), fraction_done=0.0).tolist()
        [0.6931471824645996]
    """
    check_number("fraction_done", fraction_done, "Pass the steps done over all steps.")
    check_number("gamma", gamma, "Leave it out for 0.5.")
    logits, targets = check_pair(logits, target_probs)
    alpha = functional.relu(logits) + 1
    losses = alpha.sum(dim=-1, keepdim=True).log() - alpha.log() + fraction_done * _misplaced_evidence(alpha)
    # not as a matrix product, which autocast would run in half precision
    return (((1 - gamma) * targets + gamma * _one_hot_argmax(logits)) * losses).sum(dim=-1)


# ── one door ────────────────────────────────────────────────────────────────────────────────────────────────────────


_Loss = Callable[..., torch.Tensor]

# By name, what needs nothing but `(logits, target_probs)`.
LOSSES: dict[str, _Loss] = {
    "cross_entropy": soft_cross_entropy,
    "kl_divergence": kl_divergence,
    "reverse_kl": reverse_kl,
    "product": product_loss,
    "adapt_conf": adapt_conf,
    "generalized_cross_entropy": generalized_cross_entropy,
}
# What needs more: where the parameters of these come from.
_OTHERS: dict[str, Callable[..., Any]] = {
    "confidence": linear_warmup,
    "early_learning_regularization": EarlyLearningRegularization,
    "evidential": evidential_loss,
}


def choose_loss(
    loss: str | LossFunction,
    options: Mapping[str, Any],
    fraction_done: Callable[[], float],
    shape: tuple[int, int],
) -> tuple[LossFunction, LossAndGradient]:
    """Give a loss by its name, or one of the user's own, and the same with its gradient in the logits."""
    if not isinstance(loss, str):
        return _with_autograd(_checked(loss))
    known = [*LOSSES, *_OTHERS]
    if loss not in known:
        raise ValueError(f"`loss` must be one of {known}, got {loss!r}.")
    allowed = [key for key in inspect.signature((LOSSES | _OTHERS)[loss]).parameters if key not in _GIVEN]
    if unknown := sorted(set(options) - set(allowed)):
        raise ValueError(f"`loss_kwargs` of {loss!r} must have keys among {allowed}, got {unknown}. Correct them.")
    if loss == "early_learning_regularization":
        regularized = EarlyLearningRegularization(*shape, **options)
        return regularized, regularized.with_gradient
    if loss == "evidential":
        return _with_autograd(
            lambda logits, targets, rows: evidential_loss(logits, targets, fraction_done(), **options)
        )
    if loss == "confidence":
        return _with_autograd(
            lambda logits, targets, rows: confidence_loss(logits, targets, linear_warmup(fraction_done(), **options))
        )
    named, with_gradient = partial(LOSSES[loss], **options), WITH_GRADIENT.get(loss)
    function = lambda logits, targets, rows: named(logits, targets)  # noqa: E731
    if with_gradient is None:
        return _with_autograd(function)
    return function, lambda logits, targets, rows: with_gradient(logits, targets)


def weigh_loss(
    pair: tuple[LossFunction, LossAndGradient], weights: torch.Tensor
) -> tuple[LossFunction, LossAndGradient]:
    """Give every example a weight of its own, by row of the pool."""

    def weights_of(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return weights[rows.to(weights.device)].to(logits.device)

    def with_gradient(
        logits: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        own = weights_of(logits, rows)
        losses, gradient = pair[1](logits, targets, rows)
        return own * losses, own.unsqueeze(1) * gradient

    return lambda logits, targets, rows: weights_of(logits, rows) * pair[0](logits, targets, rows), with_gradient


def _with_autograd(loss: LossFunction) -> tuple[LossFunction, LossAndGradient]:
    def with_gradient(
        logits: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.enable_grad():
            logits = logits.detach().requires_grad_()
            losses = loss(logits, targets, rows)
            if not losses.requires_grad:
                raise ValueError("A loss must depend on the logits, got one without a gradient. Do not detach them.")
            [gradient] = torch.autograd.grad(losses.sum(), logits)
        return losses.detach(), gradient

    return loss, with_gradient


def _checked(function: LossFunction) -> LossFunction:
    """A user's function, the losses of which are looked at."""
    name = getattr(function, "__name__", type(function).__name__)
    if not callable(function):
        raise TypeError(f"`loss` must be a name or a function, got {name}. Names are {[*LOSSES, *_OTHERS]}.")

    def loss(logits: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        losses = function(logits, targets, rows)
        if not isinstance(losses, torch.Tensor) or losses.shape != logits.shape[:1]:
            found = tuple(losses.shape) if isinstance(losses, torch.Tensor) else type(losses).__name__
            raise ValueError(
                f"`{name}` must return one loss per example, shape ({len(logits)},), got {found}. Sum over labels "
                "only."
            )
        return losses

    return loss


# ── pieces ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _one_hot_argmax(values: torch.Tensor) -> torch.Tensor:
    """True at the largest value of each row, ties to the first, which torch promises on no device."""
    largest = values == values.amax(dim=-1, keepdim=True)
    return largest & (largest.int().cumsum(dim=-1) == 1)


def _soften(targets: torch.Tensor, temperature: float) -> torch.Tensor:
    """∝ y^(1 / temperature); scaled to a largest value of 1 before, or a low temperature would leave only zeros."""
    check_number("temperature", temperature, "Leave it out for 1.", math.inf, above=True)
    powers = (targets / targets.amax(dim=-1, keepdim=True)) ** (1 / temperature)
    return powers / powers.sum(dim=-1, keepdim=True)


def _misplaced_evidence(alpha: torch.Tensor) -> torch.Tensor:
    """KL(Dir(alpha') || Dir(1)) for each label `(num_examples, num_labels)`: alpha' is alpha, but 1 at that label."""
    num_labels = alpha.shape[-1]
    parts = (alpha - 1) * torch.digamma(alpha) - torch.lgamma(alpha)
    total = alpha.sum(dim=-1, keepdim=True) - alpha + 1
    others = parts.sum(dim=-1, keepdim=True) - parts  # alpha = 1 has no part
    return torch.lgamma(total) - math.lgamma(num_labels) + others - (total - num_labels) * torch.digamma(total)


# ── gradients without autograd ──────────────────────────────────────────────────────────────────────────────────────


def _reverse_kl_with_gradient(logits: torch.Tensor, target_probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses, and p (log p - log y - KL)."""
    logits, targets = check_pair(logits, target_probs)
    log_probs = functional.log_softmax(logits.T, dim=0)  # one column per example, which is faster
    probs, log_ratio = log_probs.exp(), log_probs - targets.T.clamp_min(MIN_PROB).log()
    losses = (probs * log_ratio).sum(dim=0)
    return losses, (probs * (log_ratio - losses)).T


# By the loss's name: the losses and their gradient `(num_examples, num_labels)` with respect to the logits, where a
# closed form saves a third of the loss's time for few labels; the others go by autograd.
WITH_GRADIENT: dict[str, Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {
    "cross_entropy": lambda logits, targets: (
        soft_cross_entropy(logits, targets),
        cross_entropy_gradient(logits, targets),
    ),
    "reverse_kl": _reverse_kl_with_gradient,
}

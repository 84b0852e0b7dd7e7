"""Fit a linear head on features of a frozen backbone: by steps without autograd, or at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from .losses import LossAndGradient

# Rows per matrix product of a Gram matrix: large enough for full speed, small enough to stay in the cache.
_GRAM_ROWS = 4096
_ORIGIN_ROWS = 1000
# Weights of a head whose step takes about as long on one thread as on two, that wait for each other.
_SMALL_HEAD = 2**16


class SparseTargets(NamedTuple):
    """Pseudolabels that name k labels each, as [`top_k.scale_top_k`] gives them."""

    label_ids: torch.Tensor  # (batch, k)
    label_probs: torch.Tensor  # (batch, k)
    rest_probs: torch.Tensor  # (batch,), of each label that is not named


class FeatureScaling(NamedTuple):
    """What makes features centred and of a mean square of 1, see [`measure_scaling`].

    Args:
        mean (`torch.Tensor` of shape `(feature_size,)`, float32):
            Taken off each row.
        scale (`float`):
            What the rest is multiplied by, one number for all features, so that no direction gains on another.
    """

    mean: torch.Tensor
    scale: float

    def apply(self, features: torch.Tensor) -> torch.Tensor:
        """Centre and scale rows of features, in float32."""
        return features.float().sub(self.mean).mul_(self.scale)


def measure_scaling(features: torch.Tensor, rows: torch.Tensor) -> FeatureScaling:
    """Measure the mean of some rows of features, and their spread about it.

    Args:
        features (`torch.Tensor` of shape `(num_examples, feature_size)`):
            Inputs of the head; may be mapped from disk.
        rows (`torch.LongTensor` of shape `(num_rows,)`):
            Which of them.

    Returns:
        `FeatureScaling`: of the inverse root mean square of the centred entries; 1 where they are all alike.
    """
    origin, num_rows = feature_origin(features), max(len(rows), 1)
    total, square = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device), 0.0
    for part in rows.to(features.device).split(_GRAM_ROWS):
        # Once through the features, about an origin, or those far from zero would drown in rounding.
        inputs = _take(features, part).float() - origin
        total += inputs.sum(dim=0)
        square += float(inputs.square().sum())
    shift = total / num_rows
    variance = square / (num_rows * features.shape[1]) - float(shift.square().mean())
    return FeatureScaling(origin + shift.float(), variance**-0.5 if variance > 1e-12 else 1.0)


def fit_linear_head(
    head: nn.Linear,
    features: torch.Tensor,
    targets: Callable[[torch.Tensor], torch.Tensor | SparseTargets],
    steps: Iterable[Sequence[torch.Tensor]],
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    *,
    loss: LossAndGradient | None = None,
    scaling: FeatureScaling | None = None,
    is_scaled: bool = False,
    max_grad_norm: float = 0.0,
    average_gradients: Callable[[torch.Tensor], None] | None = None,
    on_step: Callable[[torch.Tensor, float | None], None] | None = None,
) -> None:
    """Train a linear head in place on soft targets, by the steps of the `Trainer`'s loop but without autograd.

    With `scaling` they see scaled features (with `is_scaled` all are so already), and the head is for raw ones.
    """
    weight, bias = head.weight, head.bias
    parameters = [weight] if bias is None else [weight, bias]
    # A view of the bias, which the optimizer changes in place: it need not be made again in each step.
    offset = weight.new_zeros(weight.shape[0], 1) if bias is None else bias.detach().unsqueeze(1)
    with _threads_for(weight):
        buffer = features[:0]
        for micro_batches in steps:
            with torch.no_grad():
                sums: Sequence[torch.Tensor] = ()
                for batch in micro_batches:
                    rows, size = batch.to(features.device), len(batch)
                    if len(buffer) != size:  # the first batch, and a last one that is smaller
                        buffer = features.new_empty(size, features.shape[1])
                    inputs = torch.index_select(features, 0, rows, out=buffer).float()
                    if scaling is not None and not is_scaled:
                        inputs = scaling.apply(inputs)
                    logits = torch.addmm(offset, weight, inputs.T)  # one column per example: the softmax is faster so
                    wanted = targets(rows)
                    # Of the mean cross-entropy against y: g = (softmax - y) / batch, dW = g^T x, db = sum g.
                    if loss is None:
                        likelihood, gradient = _likelihood_and_gradient(torch.log_softmax(logits, dim=0), wanted)
                    else:  # over all labels
                        losses, gradient = loss(logits.T, wanted, batch)  # type: ignore[arg-type]
                        likelihood, gradient = -losses.sum(), gradient.T.contiguous()
                    # Micro-batches of a step are averaged as the `Trainer` does under gradient accumulation.
                    scale = 1.0 / (size * len(micro_batches))
                    parts = likelihood.mul_(-scale), gradient.mul_(scale) @ inputs, gradient.sum(dim=1)
                    sums = [old.add_(new) for old, new in zip(sums, parts)] if sums else parts
                mean_loss, *gradients = sums
                # Set by hand, so that clipping and any optimizer of torch find it where they look.
                for parameter, gradient in zip(parameters, gradients):
                    parameter.grad = gradient
                    if average_gradients is not None:
                        average_gradients(gradient)
                norm = _clip_norm(gradients[: len(parameters)], max_grad_norm) if max_grad_norm > 0 else None
            optimizer.step()
            scheduler.step()
            if on_step is not None:
                on_step(mean_loss, norm)
    optimizer.zero_grad(set_to_none=True)
    if scaling is not None:
        with torch.no_grad():
            weight.mul_(scaling.scale)
            if bias is not None:
                bias.sub_(weight @ scaling.mean)


def _clip_norm(gradients: Sequence[torch.Tensor], max_norm: float) -> float:
    """What `clip_grad_norm_` does, to the bit; that one first sorts tensors by device and type, in every step."""
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]))
    factor = (max_norm / (norm + 1e-6)).clamp_(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor)
    return float(norm)


@contextmanager
def _threads_for(weight: torch.Tensor) -> Iterator[None]:
    """One thread for a small head: several meet so often in a step that they mostly wait, above all for other work."""
    threads = torch.get_num_threads()
    if weight.device.type == "cpu" and weight.numel() <= _SMALL_HEAD:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def linear_logits(head: Any, inputs: torch.Tensor) -> torch.Tensor:
    """Run what has `weight` and `bias` in float32: from `(num_rows, feature_size)` to `(num_rows, num_labels)`."""
    logits = inputs.float() @ head.weight.float().T
    return logits if head.bias is None else logits + head.bias


def gram_matrix(features: torch.Tensor, rows: torch.Tensor, origin: torch.Tensor | None = None) -> torch.Tensor:
    """Sum x x^T over rows of features, the mean of the first ones taken off and a 1 appended to each, in float64."""
    # The 1 makes it hold the sum and the number of the rows too; and Gram matrices add up, so that the one of some
    # rows is that of all less that of the others.
    size = features.shape[1]
    gram = torch.zeros(size + 1, size + 1, dtype=torch.float64, device=features.device)
    origin = feature_origin(features) if origin is None else origin
    for part in rows.to(features.device).split(_GRAM_ROWS):
        # Far from zero the products would drown what varies in float32's rounding.
        inputs = _take(features, part).float() - origin
        gram[:size, :size] += inputs.T @ inputs
        gram[size, :size] += inputs.sum(dim=0)
        gram[size, size] += len(inputs)
    gram[:size, size] = gram[size, :size]
    return gram


def cross_products(
    features: torch.Tensor,
    rows: torch.Tensor,
    targets: Callable[[torch.Tensor], torch.Tensor | SparseTargets],
    num_labels: int,
    origin: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum x y^T over rows of features and their pseudolabels, in float64, the features as in [`gram_matrix`]."""
    size, origin = features.shape[1], feature_origin(features) if origin is None else origin
    cross = torch.zeros(size + 1, num_labels, dtype=torch.float64, device=features.device)
    for part in rows.to(features.device).split(_GRAM_ROWS):
        wanted = dense_targets(targets(part), num_labels)
        cross[:size] += (_take(features, part).float() - origin).T @ wanted
        cross[size] += wanted.sum(dim=0)
    return cross


def _take(features: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows of features; where they lie one after another, without copying them."""
    if len(rows) and bool((rows.diff() == 1).all()):
        return features[int(rows[0]) : int(rows[-1]) + 1]
    return features.index_select(0, rows)


def feature_origin(features: torch.Tensor) -> torch.Tensor:
    """Give about the middle of features, the same whichever rows are summed."""
    first = features[:_ORIGIN_ROWS].float()
    read = first[first.any(dim=1)]  # rows of zeros are those that nobody read, and lie far from the others
    return (read if len(read) else first).mean(dim=0)


def dense_targets(wanted: torch.Tensor | SparseTargets, num_labels: int) -> torch.Tensor:
    """Spread pseudolabels over all labels, `(batch, num_labels)`."""
    if isinstance(wanted, torch.Tensor):
        return wanted
    spread = wanted.rest_probs.unsqueeze(1).repeat(1, num_labels)
    return spread.scatter_(1, wanted.label_ids, wanted.label_probs)


def fit_ridge_head(
    head: nn.Linear,
    features: torch.Tensor,
    rows: torch.Tensor,
    targets: Callable[[torch.Tensor], torch.Tensor | SparseTargets],
    gram: torch.Tensor,
    *,
    alpha: float,
    logit_scale: float,
    cross: torch.Tensor | None = None,
    origin: torch.Tensor | None = None,
    sum_over_processes: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
) -> torch.Tensor:
    """Fit a linear head in closed form: regress the pseudolabels on the features, and scale up to logits.

    With centred features X and pseudolabels Y, W = (X^T X + lambda I)^-1 X^T Y and lambda = `alpha` times the mean
    variance of a feature times the number of rows; logits are `logit_scale` times the prediction, which lies near 0..1
    and as logits would make a student that is never sure. Gives the mean cross-entropy on the rows of all processes.
    Source: ridge regression; the scale of the logits is ours, measured in `recipes/README.md`.

    Examples:
        >>> features, pseudolabels, rows = torch.tensor([[1.0], [-1.0]]), torch.eye(2), torch.arange(2)
        >>> head, targets, gram = nn.Linear(1, 2), pseudolabels.__getitem__, gram_matrix(features, rows)
        >>> loss = fit_ridge_head(head, features, rows, targets, gram, alpha=0.01, logit_scale=10.0)
        >>> linear_logits(head, features).argmax(dim=1).tolist()
        [0, 1]
    """
    size, num_labels = features.shape[1], head.weight.shape[0]
    parts = rows.to(features.device).split(_GRAM_ROWS)
    origin = feature_origin(features) if origin is None else origin
    if cross is None:
        cross = sum_over_processes(cross_products(features, rows, targets, num_labels, origin))
    # Features lie about `shift`, which was taken off before they were summed: with a bias it only moves the bias.
    num_rows, shift = gram[size, size], origin.double()
    means, label_means = gram[size, :size] / num_rows, cross[size] / num_rows
    if head.bias is None:  # nothing takes the means up, so features and pseudolabels stay as they are
        moved = gram[size, :size]
        centred = gram[:size, :size] + torch.outer(moved, shift) + torch.outer(shift, moved)
        centred = centred + num_rows * torch.outer(shift, shift)
        products = cross[:size] + torch.outer(shift, cross[size])
    else:
        centred = gram[:size, :size] - num_rows * torch.outer(means, means)
        products = cross[:size] - num_rows * torch.outer(means, label_means)
    # The lower bound is what rounding in float32 leaves of features that do not vary.
    least = 1e-6 * gram.diagonal()[:size].mean() + 1e-12
    centred.diagonal().add_(torch.maximum(alpha * centred.diagonal().mean(), least))
    # Positive definite by the penalty; half the work of a general solver.
    weight = torch.cholesky_solve(products, torch.linalg.cholesky(centred))
    with torch.no_grad():
        head.weight.copy_(logit_scale * weight.T)
        if head.bias is not None:
            head.bias.copy_(logit_scale * (label_means - (means + shift) @ weight))
        # Of the head as it was written, in its own precision: this is what the student will say.
        loss = torch.zeros(1, dtype=torch.float64, device=features.device)
        for part in parts:
            log_probs = torch.log_softmax(linear_logits(head, _take(features, part)), dim=1).T.contiguous()
            loss -= _likelihood_and_gradient(log_probs, targets(part))[0]
    return sum_over_processes(loss)[0] / num_rows


def _likelihood_and_gradient(
    log_probs: torch.Tensor, wanted: torch.Tensor | SparseTargets
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed log-likelihood `()` and the gradient of its negative in the logits, from `(num_labels, batch)`."""
    if isinstance(wanted, torch.Tensor):
        wanted = wanted.T.contiguous()
        return torch.dot(wanted.view(-1), log_probs.view(-1)), log_probs.exp().sub_(wanted)
    label_ids, rest = wanted.label_ids.T, wanted.rest_probs
    # A sum over all labels is one over those that are named, of what they have more than the rest, and the rest's.
    excess = wanted.label_probs.T - rest
    likelihood = (excess * log_probs.gather(0, label_ids)).sum() + torch.dot(rest, log_probs.sum(dim=0))
    return likelihood, log_probs.exp().sub_(rest).scatter_add_(0, label_ids, -excess)

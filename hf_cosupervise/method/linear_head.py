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
    """Pseudolabels that name k labels each, see [`sparse.scale_top_k`].

    Args:
        label_ids (`torch.LongTensor` of shape `(batch, k)`):
            Labels that are named.
        label_probs (`torch.Tensor` of shape `(batch, k)`):
            Their probabilities.
        rest_probs (`torch.Tensor` of shape `(batch,)`):
            Probability of each other label.
    """

    label_ids: torch.Tensor
    label_probs: torch.Tensor
    rest_probs: torch.Tensor


def fit_linear_head(
    head: nn.Linear,
    features: torch.Tensor,
    targets: Callable[[torch.Tensor], torch.Tensor | SparseTargets],
    steps: Iterable[Sequence[torch.Tensor]],
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    *,
    loss: LossAndGradient | None = None,
    max_grad_norm: float = 0.0,
    average_gradients: Callable[[torch.Tensor], None] | None = None,
    on_step: Callable[[torch.Tensor, float | None], None] | None = None,
) -> None:
    """Train a linear head in place on soft targets, without autograd.

    The gradient of the mean cross-entropy of softmax(W x + b) against y is closed-form, g = (softmax - y) / batch,
    dW = g^T x, db = sum g; micro-batches of one step are averaged, as the `Trainer` does under gradient accumulation.

    Args:
        head (`nn.Linear` from `feature_size` to `num_labels`):
            The head, on the device of the features.
        features (`torch.Tensor` of shape `(num_examples, feature_size)`, float32, float16 or bfloat16):
            Inputs of the head; may be mapped from disk.
        targets (`Callable`):
            From row positions `(batch,)` to pseudolabels `(batch, num_labels)`, rows sum to 1, or [`SparseTargets`].
        steps (`Iterable[Sequence[torch.LongTensor]]`):
            Micro-batches of each optimizer step: row positions `(batch,)`.
        optimizer (`torch.optim.Optimizer`):
            Over the head's parameters.
        scheduler (`torch.optim.lr_scheduler.LRScheduler`):
            Stepped after each optimizer step.
        loss (`Callable`, *optional*):
            Losses with their gradient as [`choose_loss`] gives them, with `targets` over all labels. Defaults to the
            cross-entropy.
        max_grad_norm (`float`, *optional*, defaults to 0):
            Largest norm of the gradient; 0 for no clipping.
        average_gradients (`Callable`, *optional*):
            Averages a gradient over processes, in place.
        on_step (`Callable`, *optional*):
            Called after each step with the mean loss (a scalar tensor) and the norm of the gradient before clipping.

    Source:
        Ours: the same optimizer steps as the `Trainer`'s loop (equal weights to 1e-5), minus its overhead per step.
    """
    weight, bias = head.weight, head.bias
    parameters = [weight] if bias is None else [weight, bias]
    offset = weight.new_zeros(weight.shape[0], 1) if bias is None else bias.detach().unsqueeze(1)
    with _threads_for(weight):
        buffer = features[:0]
        for micro_batches in steps:
            with torch.no_grad():
                sums: Sequence[torch.Tensor] = ()
                for batch in micro_batches:
                    rows, size = batch.to(features.device), len(batch)
                    if len(buffer) != size:
                        buffer = features.new_empty(size, features.shape[1])
                    inputs = torch.index_select(features, 0, rows, out=buffer).float()
                    logits = torch.addmm(offset, weight, inputs.T)  # one column per example: the softmax is faster so
                    wanted = targets(rows)
                    if loss is None:
                        likelihood, gradient = _likelihood_and_gradient(torch.log_softmax(logits, dim=0), wanted)
                    else:  # over all labels
                        losses, gradient = loss(logits.T, wanted, batch)  # type: ignore[arg-type]
                        likelihood, gradient = -losses.sum(), gradient.T.contiguous()
                    scale = 1.0 / (size * len(micro_batches))
                    parts = likelihood.mul_(-scale), gradient.mul_(scale) @ inputs, gradient.sum(dim=1)
                    sums = [old.add_(new) for old, new in zip(sums, parts)] if sums else parts
                mean_loss, *gradients = sums
                for parameter, gradient in zip(parameters, gradients):
                    parameter.grad = gradient
                    if average_gradients is not None:
                        average_gradients(gradient)
                norm = float(nn.utils.clip_grad_norm_(parameters, max_grad_norm)) if max_grad_norm > 0 else None
            optimizer.step()
            scheduler.step()
            if on_step is not None:
                on_step(mean_loss, norm)
    optimizer.zero_grad(set_to_none=True)


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
def linear_logits(head: nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
    """Run a linear head without a gradient.

    Args:
        head (`nn.Linear` from `feature_size` to `num_labels`):
            The head.
        inputs (`torch.Tensor` of shape `(num_rows, feature_size)`, any floating type):
            What it reads.

    Returns:
        `torch.Tensor` of shape `(num_rows, num_labels)`, float32.
    """
    logits = inputs.float() @ head.weight.float().T
    return logits if head.bias is None else logits + head.bias


def gram_matrix(features: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Sum x x^T over rows of features, with the mean of the first ones taken off and a 1 appended to each.

    So it holds the sum and the number of the rows too, and features far from zero do not drown in rounding.

    Args:
        features (`torch.Tensor` of shape `(num_examples, feature_size)`):
            Inputs of the head.
        rows (`torch.LongTensor` of shape `(num_rows,)`):
            Which of them.

    Returns:
        `torch.Tensor` of shape `(feature_size + 1, feature_size + 1)`, float64: Gram matrices add up, so that the one
        of some rows is that of all less that of the others.
    """
    size = features.shape[1]
    gram = torch.zeros(size + 1, size + 1, dtype=torch.float64, device=features.device)
    origin = feature_origin(features)
    for part in rows.to(features.device).split(_GRAM_ROWS):
        inputs = features[part].float() - origin
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
) -> torch.Tensor:
    """Sum x y^T over rows of features and their pseudolabels, the features as in [`gram_matrix`].

    Args:
        features (`torch.Tensor` of shape `(num_examples, feature_size)`):
            Inputs of the head.
        rows (`torch.LongTensor` of shape `(num_rows,)`):
            Which of them.
        targets (`Callable`):
            See [`fit_linear_head`].
        num_labels (`int`):
            Outputs of the head.

    Returns:
        `torch.Tensor` of shape `(feature_size + 1, num_labels)`, float64.
    """
    size, origin = features.shape[1], feature_origin(features)
    cross = torch.zeros(size + 1, num_labels, dtype=torch.float64, device=features.device)
    for part in rows.to(features.device).split(_GRAM_ROWS):
        wanted = dense_targets(targets(part), num_labels)
        cross[:size] += (features[part].float() - origin).T @ wanted
        cross[size] += wanted.sum(dim=0)
    return cross


def feature_origin(features: torch.Tensor) -> torch.Tensor:
    """Give about the middle of features, the same whichever rows are summed.

    Args:
        features (`torch.Tensor` of shape `(num_examples, feature_size)`):
            Inputs of the head.

    Returns:
        `torch.Tensor` of shape `(feature_size,)`, float32: what [`gram_matrix`] and [`cross_products`] take off.
    """
    first = features[:_ORIGIN_ROWS].float()
    read = first[first.any(dim=1)]  # rows of zeros are those that nobody read, and lie far from the others
    return (read if len(read) else first).mean(dim=0)


def dense_targets(wanted: torch.Tensor | SparseTargets, num_labels: int) -> torch.Tensor:
    """Spread pseudolabels over all labels.

    Args:
        wanted (`torch.Tensor` of shape `(batch, num_labels)`, or [`SparseTargets`]):
            Pseudolabels.
        num_labels (`int`):
            How many labels there are.

    Returns:
        `torch.Tensor` of shape `(batch, num_labels)`.
    """
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
    sum_over_processes: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
) -> torch.Tensor:
    """Fit a linear head in closed form: regress the pseudolabels on the features, and scale up to logits.

    With centred features X and pseudolabels Y, W = (X^T X + lambda I)^-1 X^T Y and lambda = `alpha` times the mean
    variance of a feature times the number of rows; logits are `logit_scale` times the prediction.

    Args:
        head (`nn.Linear` from `feature_size` to `num_labels`):
            The head, on the device of the features; written in place.
        features (`torch.Tensor` of shape `(num_examples, feature_size)`):
            Inputs of the head; may be mapped from disk.
        rows (`torch.LongTensor` of shape `(num_rows,)`):
            What this process trains on.
        targets (`Callable`):
            See [`fit_linear_head`].
        gram (`torch.Tensor` of shape `(feature_size + 1, feature_size + 1)`, float64):
            What [`gram_matrix`] gives for the rows of all processes.
        alpha (`float`):
            Ridge penalty, above 0, relative to the variance of the features.
        logit_scale (`float`):
            Above 0: predictions lie near 0..1, which as logits would make a student that is never sure.
        cross (`torch.Tensor` of shape `(feature_size + 1, num_labels)`, float64, *optional*):
            What [`cross_products`] gives for the rows of all processes. Summed here where it is left out.
        sum_over_processes (`Callable`, *optional*):
            Adds a tensor up over all processes.

    Returns:
        `torch.Tensor`, a scalar: mean cross-entropy of the fitted head on the rows of all processes.

    Source:
        Ridge regression; the scale of the logits is ours, measured in `recipes/README.md`.

    Examples:
        >>> features, pseudolabels, rows = torch.tensor([[1.0], [-1.0]]), torch.eye(2), torch.arange(2)
        >>> head, targets, gram = nn.Linear(1, 2), pseudolabels.__getitem__, gram_matrix(features, rows)
        >>> loss = fit_ridge_head(head, features, rows, targets, gram, alpha=0.01, logit_scale=10.0)
        >>> linear_logits(head, features).argmax(dim=1).tolist()
        [0, 1]
    """
    size, num_labels = features.shape[1], head.weight.shape[0]
    parts = rows.to(features.device).split(_GRAM_ROWS)
    if cross is None:
        cross = sum_over_processes(cross_products(features, rows, targets, num_labels))
    num_rows, shift = gram[size, size], feature_origin(features).double()
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
    weight = torch.cholesky_solve(products, torch.linalg.cholesky(centred))
    with torch.no_grad():
        head.weight.copy_(logit_scale * weight.T)
        if head.bias is not None:
            head.bias.copy_(logit_scale * (label_means - (means + shift) @ weight))
        loss = torch.zeros(1, dtype=torch.float64, device=features.device)
        for part in parts:
            log_probs = torch.log_softmax(linear_logits(head, features[part]), dim=1).T.contiguous()
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
    excess = wanted.label_probs.T - rest
    likelihood = (excess * log_probs.gather(0, label_ids)).sum() + torch.dot(rest, log_probs.sum(dim=0))
    return likelihood, log_probs.exp().sub_(rest).scatter_add_(0, label_ids, -excess)

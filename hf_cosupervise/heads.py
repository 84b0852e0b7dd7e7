"""Fit a linear head on features of a frozen backbone: by steps at the speed of two matrix products, or at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

# Rows per matrix product of a Gram matrix: large enough for full speed, small enough to stay in the cache.
_GRAM_ROWS = 4096


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
    weight.grad = torch.zeros_like(weight)  # written over in every step: new memory costs more than filling it
    read = _row_reader(features)
    for micro_batches in steps:
        loss, bias_grad = torch.zeros((), device=features.device), weight.new_zeros(len(weight))
        with torch.no_grad():
            for number, batch in enumerate(micro_batches):
                rows = batch.to(features.device)
                inputs = read(rows)
                log_probs = torch.log_softmax(nn.functional.linear(inputs, weight, bias), dim=1)
                scale = 1.0 / (len(batch) * len(micro_batches))
                batch_loss, gradient = _loss_and_gradient(log_probs, targets(rows))
                loss.add_(batch_loss, alpha=scale)
                # Beta 0 writes over what the step before has left.
                weight.grad.addmm_(gradient.T, inputs, alpha=scale, beta=float(number > 0))
                bias_grad.add_(gradient.sum(dim=0), alpha=scale)
        if bias is not None:
            bias.grad = bias_grad
        if average_gradients is not None:
            for parameter in parameters:
                average_gradients(parameter.grad)  # type: ignore[arg-type]
        norm = float(nn.utils.clip_grad_norm_(parameters, max_grad_norm)) if max_grad_norm > 0 else None
        optimizer.step()
        scheduler.step()
        if on_step is not None:
            on_step(loss, norm)
    optimizer.zero_grad(set_to_none=True)


def gram_matrix(features: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Sum x x^T over rows of features, each with a 1 appended, so that it holds their sum and number too.

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
    for part in rows.to(features.device).split(_GRAM_ROWS):
        inputs = features[part].float()
        gram[:size, :size] += inputs.T @ inputs
        gram[size, :size] += inputs.sum(dim=0)
        gram[size, size] += len(inputs)
    gram[:size, size] = gram[size, :size]
    return gram


def fit_ridge_head(
    head: nn.Linear,
    features: torch.Tensor,
    rows: torch.Tensor,
    targets: Callable[[torch.Tensor], torch.Tensor | SparseTargets],
    gram: torch.Tensor,
    *,
    alpha: float,
    logit_scale: float,
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
        sum_over_processes (`Callable`, *optional*):
            Adds a tensor up over all processes.

    Returns:
        `torch.Tensor`, a scalar: mean cross-entropy of the fitted head on the rows of all processes.

    Source:
        Ridge regression; the scale of the logits is ours, measured in `recipes/README.md`.
    """
    size, num_labels = features.shape[1], head.weight.shape[0]
    cross = torch.zeros(size + 1, num_labels, dtype=torch.float64, device=features.device)
    parts = rows.to(features.device).split(_GRAM_ROWS)
    for part in parts:
        wanted = _dense(targets(part), num_labels)
        cross[:size] += features[part].float().T @ wanted
        cross[size] += wanted.sum(dim=0)
    cross = sum_over_processes(cross)
    num_rows = gram[size, size]
    has_bias = float(head.bias is not None)  # without one, nothing takes the means up
    means, label_means = has_bias * gram[size, :size] / num_rows, has_bias * cross[size] / num_rows
    centred = gram[:size, :size] - num_rows * torch.outer(means, means)
    centred.diagonal().add_(alpha * centred.diagonal().mean().clamp(min=1e-12))
    weight = torch.cholesky_solve(
        cross[:size] - num_rows * torch.outer(means, label_means), torch.linalg.cholesky(centred)
    )
    with torch.no_grad():
        head.weight.copy_(logit_scale * weight.T)
        if head.bias is not None:
            head.bias.copy_(logit_scale * (label_means - means @ weight))
        loss = torch.zeros(1, dtype=torch.float64, device=features.device)
        for part in parts:
            log_probs = torch.log_softmax(head(features[part].float()), dim=1)
            loss += _loss_and_gradient(log_probs, targets(part))[0]
    return sum_over_processes(loss)[0] / num_rows


def _row_reader(features: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Read batches of rows as float32, each into the memory of the batch before."""
    buffer = features.new_empty(0, features.shape[1])

    def read(rows: torch.Tensor) -> torch.Tensor:
        nonlocal buffer
        if len(rows) != len(buffer):
            buffer = features.new_empty(len(rows), features.shape[1])
        return torch.index_select(features, 0, rows, out=buffer).float()

    return read


def _loss_and_gradient(
    log_probs: torch.Tensor, wanted: torch.Tensor | SparseTargets
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross-entropy `()` and its gradient in the logits `(batch, num_labels)`."""
    if isinstance(wanted, torch.Tensor):
        return -torch.dot(wanted.view(-1), log_probs.view(-1)), log_probs.exp().sub_(wanted)
    excess, rest = wanted.label_probs - wanted.rest_probs.unsqueeze(1), wanted.rest_probs
    loss = -(excess * log_probs.gather(1, wanted.label_ids)).sum() - rest @ log_probs.sum(dim=1)
    gradient = log_probs.exp().sub_(rest.unsqueeze(1))
    return loss, gradient.scatter_add_(1, wanted.label_ids, -excess)


def _dense(wanted: torch.Tensor | SparseTargets, num_labels: int) -> torch.Tensor:
    """Pseudolabels over all labels `(batch, num_labels)`."""
    if isinstance(wanted, torch.Tensor):
        return wanted
    spread = wanted.rest_probs.unsqueeze(1).repeat(1, num_labels)
    return spread.scatter_(1, wanted.label_ids, wanted.label_probs)

"""Fit a linear head on features of a frozen backbone, at the speed of two matrix products per step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn


def fit_linear_head(
    head: nn.Linear,
    features: torch.Tensor,
    targets: Callable[[torch.Tensor], torch.Tensor],
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
        features (`torch.Tensor` of shape `(num_examples, feature_size)`, float32):
            Inputs of the head.
        targets (`Callable`):
            From row positions `(batch,)` to pseudolabels `(batch, num_labels)`, rows sum to 1.
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
    for micro_batches in steps:
        loss = torch.zeros((), device=features.device)
        weight.grad = torch.zeros_like(weight)
        bias_grad = torch.zeros(weight.shape[0], device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            for batch in micro_batches:
                rows = batch.to(features.device)
                inputs, wanted = features[rows], targets(rows)
                log_probs = torch.log_softmax(nn.functional.linear(inputs, weight, bias), dim=1)
                scale = 1.0 / (len(batch) * len(micro_batches))
                gradient = (log_probs.exp() - wanted) * scale
                weight.grad.addmm_(gradient.T, inputs)
                bias_grad += gradient.sum(dim=0)
                loss -= (wanted * log_probs).sum() * scale
        if bias is not None:
            bias.grad = bias_grad
        if average_gradients is not None:
            for parameter in parameters:
                average_gradients(parameter.grad)  # type: ignore[arg-type]
        norm = float(nn.utils.clip_grad_norm_(parameters, max_grad_norm)) if max_grad_norm > 0 else None
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        if on_step is not None:
            on_step(loss, norm)

"""What schedule, scaler and optimizer hold: whether what was read from a file is of the form of this run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

# Of an optimizer's state, what has the shape of its weight.
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")


def states_of(trainer: Any) -> list[Any]:
    """What a schedule, a scaler and the groups of an optimizer hold beside moments."""
    held = trainer.lr_scheduler, trainer.accelerator.scaler, trainer.optimizer
    states = [None if holder is None else holder.state_dict() for holder in held]
    return [*states[:2], None if states[2] is None else states[2]["param_groups"]]


def fits(own: Any, other: Any) -> bool:
    """Whether a state has the form of another; torch takes over whatever it is given."""
    if own is None or other is None:
        return True
    if isinstance(own, Mapping):
        return isinstance(other, Mapping) and all(key in other and fits(own[key], other[key]) for key in own)
    if isinstance(own, list | tuple):
        is_list = isinstance(other, list | tuple) and (not own or len(own) == len(other))
        return is_list and all(map(fits, own, other))
    if isinstance(own, int | float | torch.Tensor):
        return isinstance(other, int | float | torch.Tensor) and np.shape(own) == np.shape(other)
    return type(own) is type(other)


def moments_fit(optimizer: Any) -> bool:
    """Whether what an optimizer remembers of each weight has the shape of that weight."""
    weights = [] if optimizer is None else [weight for group in optimizer.param_groups for weight in group["params"]]
    return all(
        isinstance(moment, torch.Tensor) and moment.shape == weight.shape
        for weight in weights
        for name, moment in optimizer.state.get(weight, {}).items()
        if name in _MOMENTS and moment is not None
    )

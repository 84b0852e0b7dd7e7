"""What to do where a library's own error does not say it: memory that is used up, and a batch of one example."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .config import CoSupervisedConfig


@contextmanager
def explain_memory(what: str, args: CoSupervisedConfig, name: str) -> Iterator[None]:
    """Say what to do where a batch does not fit."""
    try:
        yield
    # On a CPU, torch tells of a full memory by a RuntimeError.
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        is_full = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "not enough memory" in str(error)
        if not is_full or name in str(error):  # or somebody has said it already
            raise
        more = " with more `gradient_accumulation_steps`" if name == "per_device_train_batch_size" else ""
        raise torch.OutOfMemoryError(
            f"{what} needs less memory, got too little for batches of {getattr(args, name)}. Use a smaller "
            f"`{name}`{more}, or `bf16`; finished levels are kept."
        ) from error


@contextmanager
def explain_lone_example(level: int, num_kept: int) -> Iterator[None]:
    """Say what to do where the examples that a level keeps leave one alone in a batch."""
    try:
        yield
    except ValueError as error:
        # torch has no kind of its own for it.
        if "Expected more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            "A student with batch normalization needs batches of at least 2 examples, got one of 1 among the "
            f"{num_kept} examples that level {level} keeps. Set `dataloader_drop_last`, or another "
            "`per_device_train_batch_size`."
        ) from error

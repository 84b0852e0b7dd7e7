"""Several processes that work together: one does what is to be done once, and all learn how it went."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from PIL.Image import DecompressionBombError
from safetensors import SafetensorError

# What one broken row makes decoders, tokenizers and models raise; PIL raises SyntaxError for broken PNG files.
ROW_ERRORS = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, OSError, RuntimeError, SyntaxError, TypeError),
    *(ValueError, DecompressionBombError, struct.error, zlib.error),
)
T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes of one launch.

    Args:
        rank (`int`): Which one this is, from 0.
        count (`int`): How many there are.
    """

    rank: int
    count: int

    def on_first(self, make: Callable[[], T]) -> T:
        """Do something in the first process; all get its result, or its error instead of waiting forever.

        Args:
            make (`Callable[[], T]`):
                What to do; what it gives or raises must be picklable where there are several processes.

        Returns:
            `T`: What it gave.
        """
        if self.count == 1:
            return make()
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = make()
            except (*ROW_ERRORS, ImportError, MemoryError, SafetensorError) as error:
                outcome[1] = error
        torch.distributed.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def wait(self) -> None:
        """Wait until all are here."""
        if self.count > 1:
            torch.distributed.barrier()


def join_processes() -> Processes:
    """Find the processes of this launch, and join them.

    Returns:
        `Processes`: This one alone, if it was not launched with others.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(0, 1)
    if not torch.distributed.is_initialized():
        # Joins the others. Without `cpu`, accelerate takes a launch on a machine without GPU for single processes.
        PartialState(cpu=not torch.cuda.is_available())
    return Processes(torch.distributed.get_rank(), torch.distributed.get_world_size())

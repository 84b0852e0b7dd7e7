"""Several processes that work together: one does what is to be done once, and all learn how it went."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import PartialState

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
            with (kept := _KeptError()):
                outcome[0] = make()
            outcome[1] = kept.error
        torch.distributed.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def wait(self) -> None:
        """Wait until all are here."""
        if self.count > 1:
            torch.distributed.barrier()


class _KeptError:
    """Hold on to an error, whatever it is: it is raised in every process, where the others would wait forever."""

    error: Exception | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> bool:
        self.error = error if isinstance(error, Exception) else None
        return self.error is not None


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

"""Several processes that work together: one does what is to be done once, and all learn how it went."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import PartialState

# Rows per chunk. Fixed, so that the same student gives the same numbers whatever the number of processes.
CHUNK_ROWS = 1024
T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes of one launch."""

    rank: int
    count: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def on_first(self, make: Callable[[], T]) -> T:
        """Do something in the first process; all get its result, or its error instead of waiting forever."""
        if self.count == 1:
            return make()
        outcome: list[Any] = [None, None, []]
        if self.rank == 0:
            with (kept := _KeptError()):
                outcome[0] = make()
            outcome[1:] = kept.error, getattr(kept.error, "__notes__", [])
        torch.distributed.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            outcome[1].__notes__ = outcome[2]  # the errors of the Hub's client lose them on the way
            raise outcome[1]
        return outcome[0]

    def wait(self) -> None:
        """Wait until all are here."""
        if self.count > 1:
            torch.distributed.barrier()

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Put the tensors of all processes side by side."""
        if self.count == 1:
            return values.unsqueeze(0)
        # On the device by which the processes talk: NCCL takes nothing of the CPU.
        values = values.to(self.device).contiguous()
        found = [torch.empty_like(values) for _ in range(self.count)]
        torch.distributed.all_gather(found, values)
        return torch.stack(found)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Add the tensors of all processes up."""
        if self.count == 1:
            return values
        total = values.to(self.device, copy=True)  # all_reduce writes in place, and the caller keeps its own
        torch.distributed.all_reduce(total)
        return total

    def sum_array(self, values: np.ndarray) -> np.ndarray:
        """Add the arrays of all processes up, each of which has filled its own rows only."""
        return values if self.count == 1 else self.sum(torch.from_numpy(values)).cpu().numpy().astype(values.dtype)

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Give this process's share of what any of them can do, every `count`-th."""
        # Every so manieth, since batches may come in the order of their length.
        return items[self.rank :: self.count]


def row_chunks(num_examples: int) -> list[slice]:
    """Cut rows into the chunks in which a student is asked and a level is planned."""
    return [slice(start, min(start + CHUNK_ROWS, num_examples)) for start in range(0, num_examples, CHUNK_ROWS)]


class _KeptError:
    """Hold on to an error, whatever it is: it is raised in every process, where the others would wait forever."""

    error: Exception | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> bool:
        self.error = error if isinstance(error, Exception) else None
        return self.error is not None


def join_processes() -> Processes:
    """Find the processes of this launch, and join them."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(0, 1)
    if not torch.distributed.is_initialized():
        # Joins the others. Without `cpu`, accelerate takes a launch on a machine without GPU for single processes.
        PartialState(cpu=not torch.cuda.is_available())
    return Processes(torch.distributed.get_rank(), torch.distributed.get_world_size())

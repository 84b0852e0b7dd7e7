"""What answers look like: as arrays while teachers run, as bytes on disk, and in the pool that is made of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch

from ..hierarchy import Teacher
from ..method.metrics import SUM_TOLERANCE
from ..pool.base import TeacherPool
from ..pool.files import write_teacher
from ..pool.pseudolabels import PseudolabelPool
from ..pool.top_k import dropped_mass, encode_top_k, label_dtype
from .kinds.base import TeacherModel
from .kinds.loading import load_teacher
from .progress import Part, Progress, Segment


class Form(Protocol):
    """What has to be known of answers to run teachers, to go on after a stop and to make a pool."""

    pool: ClassVar[type[TeacherPool]]
    what: ClassVar[str]  # for errors
    dtype: ClassVar[Any]  # of the array of answers, one row for each example
    batches_at_once: ClassVar[int]

    def plan(self) -> dict[str, Any]:
        """What decides the answers besides the hierarchy and the data."""

    def load(self, teacher: Teacher, device: torch.device, commit: str | None) -> TeacherModel:
        """Load a teacher."""

    def progress(self, folder: Path, num_rows: int) -> Progress:
        """Where answers lie as they come."""

    def nothing(self, count: int) -> np.ndarray:
        """So many missing answers."""

    def find_wrong(self, name: str, answers: np.ndarray) -> dict[int, str]:
        """Why some answers are none, by their places."""

    def append(self, part: Part, start: int, answers: np.ndarray, failed_rows: Sequence[int], reason: str) -> None:
        """Put a batch on disk."""

    def facts(self, segments: Sequence[Segment]) -> dict[str, Any]:
        """What is known of a teacher's answers when all are there."""

    def write(self, path: Path, ids: Sequence[Any], pieces: Iterable[Any]) -> None:
        """Write a teacher's file of the pool."""

    def stored(self, pool: Any, name: str, rows: np.ndarray) -> Iterator[Any]:
        """Read a teacher's answers from another pool, as pieces that `write` takes."""


@dataclass(frozen=True)
class PseudolabelForm:
    """Probabilities `(num_rows, num_labels)`, of which the greatest are kept."""

    labels: tuple[str, ...]
    k: int
    rows_at_once: int

    pool: ClassVar[type[TeacherPool]] = PseudolabelPool
    what: ClassVar[str] = "probabilities"
    dtype: ClassVar[Any] = np.float32
    batches_at_once: ClassVar[int] = 1

    def plan(self) -> dict[str, Any]:
        """What decides the answers."""
        return {"pool_k": self.k}

    def load(self, teacher: Teacher, device: torch.device, commit: str | None) -> TeacherModel:
        """Load a teacher."""
        return load_teacher(teacher, self.labels, device, commit=commit)

    def progress(self, folder: Path, num_rows: int) -> Progress:
        """Where labels lie as they come."""
        return Progress(folder, num_rows, self.k, label_dtype(len(self.labels)))

    def nothing(self, count: int) -> np.ndarray:
        """Rows of zeros."""
        return np.zeros((count, len(self.labels)), dtype=np.float32)

    def find_wrong(self, name: str, answers: np.ndarray) -> dict[int, str]:
        """Rows that are neither a distribution nor a missing answer."""
        with np.errstate(invalid="ignore"):
            sums = answers.sum(axis=1)
            # NaN fails every comparison, so that it needs no test of its own.
            is_valid = (answers >= 0).all(axis=1) & ((np.abs(sums - 1) <= SUM_TOLERANCE) | (sums == 0))
        return {
            int(place): f"Probabilities of teacher '{name}' must be finite, not negative and sum to 1, got "
            f"{answers[place][:8].tolist()} (sum {answers[place].sum():.4f})"
            for place in np.flatnonzero(~is_valid)
        }

    def append(self, part: Part, start: int, answers: np.ndarray, failed_rows: Sequence[int], reason: str) -> None:
        """Put a batch on disk."""
        # At once, so that what lies on disk is as narrow as in the pool.
        label_ids, label_probs = encode_top_k(answers, self.k)
        part.append(start, label_ids, label_probs, failed_rows, dropped_mass(answers, label_ids), reason)

    def facts(self, segments: Sequence[Segment]) -> dict[str, Any]:
        """Mean probability mass of an answered row that was left out."""
        num_answered = sum(segment.num_answered for segment in segments)
        # Exactly, so that it is the same however the rows were shared out.
        return {"dropped_mass": math.fsum(segment.dropped for segment in segments) / max(num_answered, 1)}

    def write(self, path: Path, ids: Sequence[Any], pieces: Iterable[Any]) -> None:
        """Write a teacher's file of the pool."""
        write_teacher(path, ids, pieces)

    def stored(self, pool: Any, name: str, rows: np.ndarray) -> Iterator[Any]:
        """Read labels from another pool, piece by piece: it may be larger than the memory."""
        for start in range(0, len(rows), self.rows_at_once):
            piece = rows[start : start + self.rows_at_once]
            yield pool.label_ids(name)[piece], pool.label_probs(name)[piece]

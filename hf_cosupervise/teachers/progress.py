"""Work in progress on disk: what each teacher has labelled, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, unquote

import numpy as np
from filelock import FileLock, Timeout

from ..files import differences, load_json, open_work_folder, take_lock, write_all, write_json

_PLAN, _LOCK, _PARTS = "plan.json", "lock", "parts"
_NUM_NOTED, _NUM_LETTERS = 5, 300
_AFRESH = "Delete that folder to start afresh."


@dataclass(frozen=True)
class Segment:
    """Rows `start` to `stop` that one teacher has labelled, and where their bytes lie."""

    path: Path
    offset: int
    size: int
    start: int
    stop: int
    num_answered: int
    num_failed: int
    failed_rows: tuple[int, ...]
    dropped: float
    reason: str


class Progress:
    """A folder of labels of some rows of some teachers, in the order in which they were made."""

    def __init__(self, folder: Path, num_rows: int, k: int, dtype: np.dtype) -> None:
        self.folder, self.num_rows, self.k, self.dtype = Path(folder), num_rows, k, np.dtype(dtype)
        # Label ids and half-precision probabilities, without anything between rows.
        self.row_bytes = k * (self.dtype.itemsize + 2)
        self._lock: FileLock | None = None

    def open(self, plan: Mapping[str, Any]) -> None:
        """Begin the work, or go on with it: one process of one run holds the folder."""
        open_work_folder(self.folder)
        try:
            self._lock = take_lock(self.folder / _LOCK)
        except Timeout as error:
            raise RuntimeError(
                f"'{self.folder}' must be worked on by one run at a time, got another run that is at it. Wait until "
                "it has ended, or stop it; this one can then go on from there."
            ) from error
        # After the lock: a second run must not delete what the first one is writing.
        shutil.rmtree(self.scratch, ignore_errors=True)
        if (self.folder / _PLAN).is_file():
            # Through JSON, as the noted one went: tuples would differ from lists.
            self._check_same(self._read_plan()["plan"], json.loads(json.dumps(plan)))
        else:
            write_json(self.folder / _PLAN, {"plan": plan, "facts": {}})

    def close(self) -> None:
        """Let go of the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    @property
    def scratch(self) -> Path:
        """`pathlib.Path`: Folder for files that are made anew by each run."""
        return self.folder / "scratch"

    @property
    def facts(self) -> dict[str, dict[str, Any]]:
        """`dict[str, dict[str, Any]]`: What is known about each teacher that labels or has labelled here."""
        return self._read_plan()["facts"]

    def add_facts(self, facts: Mapping[str, Mapping[str, Any]]) -> None:
        """Note facts of teachers."""
        # Beside those of the teachers that were loaded before these.
        content = self._read_plan()
        for name, new in json.loads(json.dumps(facts)).items():
            known = content["facts"].setdefault(name, {})
            self._check_same({name: known}, {name: {key: new.get(key, value) for key, value in known.items()}})
            known.update(new)
        write_json(self.folder / _PLAN, content)

    def start_part(self, name: str) -> Part:
        """Open new files to append a teacher's labels to."""
        # New ones in every run: bytes after a torn write would belong to no line.
        return Part(self.folder / _PARTS / name)

    def segments(self, name: str) -> list[Segment]:
        """Read what a teacher has labelled, leaving out what is cut off or damaged."""
        found = []
        for path in sorted((self.folder / _PARTS / name).glob("*.journal")):
            if not path.with_suffix(".data").is_file():
                continue  # a copy of half of it
            with open(path.with_suffix(".data"), "rb") as data:
                # What follows the last line break was cut off.
                for line in path.read_bytes().split(b"\n")[:-1]:
                    if (segment := self._parse(line, data)) is not None:
                        found.append(segment)
        segments: list[Segment] = []
        # Other batch sizes and numbers of processes leave segments that overlap; one that adds no row is left out.
        for segment in sorted(found, key=lambda segment: (segment.start, -segment.stop)):
            if not segments or segment.stop > segments[-1].stop:
                segments.append(segment)
        return segments

    def missing(self, name: str) -> list[tuple[int, int]]:
        """Tell which rows a teacher has not labelled."""
        gaps, done = [], 0
        for segment in self.segments(name):
            if segment.start > done:
                gaps.append((done, segment.start))
            done = segment.stop
        return gaps + ([(done, self.num_rows)] if done < self.num_rows else [])

    def rows(self, segments: Sequence[Segment]) -> Iterator[Any]:
        """Read answers back in the order of the rows, a piece at a time, as [`decode`] gives them."""
        done = 0
        for segment in segments:
            count = segment.stop - segment.start
            with open(segment.path, "rb") as file:
                file.seek(segment.offset)
                data = file.read(segment.size)
            # Rows that an earlier segment has given already are not given twice.
            yield self.decode(data, count, slice(max(done - segment.start, 0), None))
            done = segment.stop

    def decode(self, data: bytes, count: int, rows: slice) -> Any:
        """Read some rows of a batch."""
        size = count * self.k
        label_ids = np.frombuffer(data, self.dtype, size).reshape(count, self.k)
        label_probs = np.frombuffer(data, np.float16, size, size * self.dtype.itemsize).reshape(count, self.k)
        return label_ids[rows], label_probs[rows]

    def fits(self, size: int, count: int) -> bool:
        """Tell whether so many bytes can be those of so many rows."""
        return size == count * self.row_bytes

    def drop(self, *names: str) -> None:
        """Forget teachers and what they have labelled."""
        content = self._read_plan()
        for name in names:
            shutil.rmtree(self.folder / _PARTS / name, ignore_errors=True)
            content["facts"].pop(name, None)
        write_json(self.folder / _PLAN, content)

    def _parse(self, line: bytes, data: BinaryIO) -> Segment | None:
        """The segment that a line tells of, if its bytes are whole."""
        # The checksum stands last, over the line before it and the bytes that it tells of.
        head, _, checksum = line.rpartition(b" ")
        try:
            *numbers, rows, reason, dropped = head.split()
            offset, size, start, stop, num_answered, num_failed = map(int, numbers)
            failed_rows = tuple(int(row) for row in rows.split(b",") if row != b"-")
            expected, mass = int(checksum), float(dropped)
        except ValueError:
            return None
        # Numbers of a damaged line may be anything: checked before so many bytes are read.
        if offset < 0 or not 0 <= start < stop <= self.num_rows or not self.fits(size, stop - start):
            return None
        if offset + size > os.fstat(data.fileno()).st_size:
            return None
        data.seek(offset)
        found = data.read(size)
        if zlib.crc32(found, zlib.crc32(head)) != expected:
            return None
        why = unquote(reason.decode()).removeprefix("-")
        return Segment(Path(data.name), offset, size, start, stop, num_answered, num_failed, failed_rows, mass, why)

    def _check_same(self, old: Any, new: Any) -> None:
        # Trust in types is often given only when it is asked for, and changes no answer.
        changed = [change for change in differences(old, new) if "].trusted_types" not in change[0]]
        if found := [f"{place}: {_shorten(was)} -> {_shorten(now)}" for place, was, now in changed]:
            raise ValueError(
                f"'{self.folder}' must hold the beginning of this pool, got that of another one "
                f"({'; '.join(found)}). Use the old settings to go on with it, or delete that folder to start "
                "afresh."
            )

    def _read_plan(self) -> dict[str, Any]:
        path = self.folder / _PLAN
        try:
            content = load_json(path)
        except ValueError as error:
            raise ValueError(f"'{path}' must be what a run has begun, got no JSON: {error}. {_AFRESH}") from error
        if not isinstance(content, dict) or not all(isinstance(content.get(key), dict) for key in ("plan", "facts")):
            raise ValueError(f"'{path}' must be what a run has begun, got no plan and facts. {_AFRESH}")
        return content


class Part:
    """Files that one process appends one teacher's labels to."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # Processes of one launch write side by side, each to files of its own.
        token = secrets.token_hex(8)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        self._data = os.open(folder / f"{token}.data", flags, 0o644)
        self._journal = os.open(folder / f"{token}.journal", flags, 0o644)
        self._offset = 0

    def append(self, start: int, label_ids: np.ndarray, label_probs: np.ndarray, *known: Any, **facts: Any) -> None:
        """Write a batch of pseudolabels."""
        data, span = label_ids.tobytes() + label_probs.tobytes(), (start, start + len(label_ids))
        self.write(span, data, int(np.count_nonzero(label_probs[:, 0])), *known, **facts)

    def write(
        self,
        span: tuple[int, int],
        data: bytes,
        num_answered: int,
        failed_rows: Sequence[int] = (),
        dropped: float = 0.0,
        reason: str = "",
    ) -> None:
        """Write the bytes of a span of rows, and then the line that makes them count."""
        noted = ",".join(str(row) for row in failed_rows[:_NUM_NOTED]) or "-"
        # Quoted, for blanks part the fields of a line; the dash keeps an empty reason a field.
        why = quote(f"-{reason[:_NUM_LETTERS]}", errors="replace")
        head = f"{self._offset} {len(data)} {span[0]} {span[1]} {num_answered} {len(failed_rows)} {noted} {why} "
        head += repr(dropped)
        checksum = zlib.crc32(data, zlib.crc32(head.encode()))
        # Before its line: a line without its bytes would have to be found out, bytes without a line do no harm.
        write_all(self._data, data)
        write_all(self._journal, f"{head} {checksum}\n".encode())
        self._offset += len(data)

    def close(self) -> None:
        """Close the files."""
        os.close(self._data)
        os.close(self._journal)


def _shorten(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

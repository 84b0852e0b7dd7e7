"""What a frozen backbone feeds its head: computed once per image or text, kept on disk, mapped into memory."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import secrets
import shutil
import tokenize
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Value
from filelock import Timeout
from numpy.lib.format import open_memmap
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.columns import has_input, is_text_column, is_vector_column
from ..data.inputs import InputProcessor, channels_last
from ..data.keys import cell_digests
from ..data.vectors import vector_digests
from ..files import explain_full_disk, file_digest, file_signature, move_file, open_work_folder, take_lock, write_all
from ..method.neighbors import nearest_neighbors
from ..processes import Processes
from .head import hash_weights

logger = logging.getLogger(__name__)

_KEYS, _VALUES, _OWNER, _ROWS, _BATCHES = "keys.npy", "features.npy", "backbone.txt", "rows.npy", "batches.txt"
# Folders in progress: one that a later run goes on with, and one that is of use to its own process only.
_PARTIAL, _PRIVATE, _LOCK = ".partial-", ".private-", ".lock"
_WRITTEN = "-written"
_KEY_DTYPE = np.dtype("S32")
# The key of all rows that hold nothing to read: no digest, so that no content can have it.
_UNREAD = b"unread"
# Rows that do not lie on disk in the order wanted are copied to memory up to this size, beyond it to a file.
_MAX_COPIED_BYTES = 2**30
_CHUNK = 8192
_ALONE = Processes(0, 1)
# What numpy raises for a file that is none of its own, or half of one.
_UNREADABLE = (EOFError, OverflowError, SyntaxError, ValueError, tokenize.TokenError)
# What this process has read and found to be as it was written: a file and its digest, see [`_verify`].
_verified: set[tuple[tuple[int, ...], str]] = set()
# Features of rows that names alone tell, which this process has put in itself, or has told of.
_told: set[Path] = set()


class FeatureStore:
    """Keep the head's inputs of each example, keyed by backbone, preprocessing and content."""

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        head: nn.Linear,
        processor: InputProcessor,
        *,
        precision: str = "float32",
        dtype: str = "float32",
    ) -> None:
        self.model, self.head, self.processor = model, head, processor
        self.dtype = np.dtype(dtype)
        self._half = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision)
        key = backbone_key(model, head, processor, precision)
        self.folder = Path(folder) / (key if dtype == "float32" else f"{key}-{dtype}")

    def features(
        self,
        dataset: Dataset,
        column: str,
        *,
        batch_size: int = 64,
        processes: Processes = _ALONE,
        disable_tqdm: bool = False,
        digests: np.ndarray | None = None,
    ) -> np.ndarray:
        """Give the head's inputs of every row, running the backbone only where they are not known yet."""
        digests = row_digests(dataset, column) if digests is None else digests
        self._check_task(dataset, column, digests)
        # For its check alone: a spoilt file is deleted here, before any process counts what is missing.
        self._load_ordered(digests)
        unknown = np.flatnonzero(self._find(digests).rows < 0)
        _, first = np.unique(digests[unknown], return_index=True)
        num_lacking = int((digests[unknown] != _UNREAD).sum())
        if num_lacking and self.is_written:
            raise ValueError(
                f"'{self.folder}' must hold the features of all {len(digests)} rows, because they are computed "
                f"elsewhere and put in by `write`, got none of {num_lacking}. Put those in too, or give another "
                "`features_dir`."
            )
        # Equal contents are read once: `first` has one row of each.
        processes.wait()  # nobody may write before everybody has seen what is missing or spoilt
        own = np.array_split(unknown[np.sort(first)], processes.count)[processes.rank]
        if len(own):
            self._compute(dataset, column, own, digests[own], batch_size, disable_tqdm)
        processes.wait()
        found = self._find(digests)
        if missing := int((found.rows < 0).sum()):
            raise FileNotFoundError(
                f"'{self.folder}' must hold the features of all {len(digests)} rows, got none of {missing}. Give a "
                "`features_dir` that all processes see."
            )
        self._clean()
        return self._gather(found, digests)

    def write(self, dataset: Dataset, column: str, batches: Iterable[np.ndarray]) -> None:
        """Put features in that were computed elsewhere, so that the backbone need not run for them."""
        digests = row_digests(dataset, column)
        is_named = _may_be_names(dataset, column)
        # Of two features of one row nothing would tell which is meant.
        if num_known := int((self._find(digests).rows >= 0).sum()):
            whose = ", of this task or of another one the rows of which have the same names" if is_named else ""
            advice = "What is there is found by later runs" if is_named else "Give the others only"
            raise ValueError(
                f"Features must be of rows that '{self.folder}' does not hold yet, got {num_known} of {len(digests)} "
                f"that it does{whose}. {advice}, or give another `features_dir`."
            )
        # Images and the like are content, which is the same for every task; names are not.
        name = _name("shard", digests) + (self._task if is_named else "") + _WRITTEN
        with self._unfinished(name, self._num_bytes(len(digests))) as folder:
            _save_array(folder / _KEYS, digests)
            self._write_features(folder, len(digests), lambda done: batches)
        _told.add(self.folder / name)

    @property
    def _task(self) -> str:
        """What the name of a shard tells of the task, where its rows may be told apart by names only."""
        labels = sorted(getattr(self.model.config, "id2label", {}).items())
        return "-for-" + hashlib.blake2b(repr(labels).encode(), digest_size=6).hexdigest()

    def _check_task(self, dataset: Dataset, column: str, digests: np.ndarray) -> None:
        """Refuse features that were put in for another task, the rows of which have the same names."""
        if not _may_be_names(dataset, column):
            return
        for folder, keys in self._keys().items():
            if "-for-" not in folder.name or not np.isin(keys, digests[digests != _UNREAD]).any():
                continue
            if not folder.name.endswith(self._task + _WRITTEN):
                raise ValueError(
                    f"'{self.folder}' must hold features of one task for rows of these names, got some that were put "
                    f"in by `write` for a student with other labels. Give another `features_dir`, or delete "
                    f"'{folder.name}' there."
                )
            if folder not in _told:
                # Two tasks of equal labels and equal names cannot be told apart here, so that the user has to know.
                # Texts are mostly what the features are of, and only now and then names of it.
                level = logging.INFO if is_text_column(dataset, column) else logging.WARNING
                logger.log(
                    level,
                    f"Rows of `{column}` get the features that another run has put in by `write` for the same names "
                    f"and labels, in '{folder}'. If those are of other data, give another `features_dir`, or delete "
                    "that folder.",
                )
                _told.add(folder)

    @property
    def is_written(self) -> bool:
        """`bool`: Whether features of any row were put in, so that the backbone here may be another one's stand-in."""
        return any(len(keys) for folder, keys in self._keys().items() if folder.name.endswith(_WRITTEN))

    def neighbors(
        self,
        dataset: Dataset,
        column: str,
        features: torch.Tensor,
        k: int,
        *,
        processes: Processes = _ALONE,
        digests: np.ndarray | None = None,
    ) -> torch.Tensor:
        """Give each readable row's nearest others, found once for the same rows in the same order."""
        digests = row_digests(dataset, column) if digests is None else digests
        rows = np.flatnonzero(digests != _UNREAD)
        # Neighbours of an older version may be rows that hold nothing.
        what = f"neighbors-{k}" if len(rows) == len(digests) else f"neighbors-{k}-of-{len(rows)}"
        folder, shape = self.folder / _name(what, digests), (len(digests), k)
        if processes.rank == 0 and self._load(folder, _ROWS, np.dtype(np.int32), shape) is None:
            # A row that is not readable is next to nobody, and its neighbours are itself.
            found = np.repeat(np.arange(len(digests), dtype=np.int32)[:, None], k, axis=1)
            own = features if len(rows) == len(digests) else features[rows]
            found[rows] = rows[nearest_neighbors(own, k).numpy()]
            with self._unfinished(folder.name, found.nbytes) as unfinished:
                _save_array(unfinished / _ROWS, found)
        processes.wait()
        loaded = self._load(folder, _ROWS, np.dtype(np.int32), shape)
        if loaded is None:
            raise FileNotFoundError(
                f"'{folder}' must hold the neighbours that the first process found, got none. Give a `features_dir` "
                "that all processes see."
            )
        return torch.from_numpy(loaded.astype(np.int64))

    def _load(self, folder: Path, name: str, dtype: np.dtype, shape: tuple[int, ...] | None) -> np.ndarray | None:
        """Map a file; `None` if it is not there, or is spoilt, after which its folder is not there either."""
        if not folder.is_dir():
            return None
        try:
            _verify(folder / name, self.folder.name)
            # Copy on write: torch wants memory that can be written, though nobody does.
            array = open_memmap(folder / name, mode="c")
            if array.dtype != dtype or shape not in (None, array.shape):
                raise ValueError(f"{array.shape} {array.dtype} instead of {shape} {dtype}")
            return array
        except (FileNotFoundError, *_UNREADABLE) as error:
            fault = f"'{folder / name}' must be as it was written, got {error}."
            if folder.name.endswith(_WRITTEN):
                raise ValueError(
                    f"{fault} These features were put in by `write`: delete that folder, and put them in again."
                ) from error
        logger.warning(f"{fault} Its folder is deleted; what is needed of it is computed again.")
        shutil.rmtree(folder, ignore_errors=True)
        return None

    def _keys(self) -> dict[Path, np.ndarray]:
        """The keys of every shard, in the order of the names."""
        folders = sorted(path for path in self.folder.glob("shard-*") if path.is_dir())
        loaded = {folder: self._load(folder, _KEYS, _KEY_DTYPE, None) for folder in folders}
        return {folder: keys for folder, keys in loaded.items() if keys is not None}

    def _find(self, digests: np.ndarray) -> _Found:
        """Where the features of each digest are, in the first shard that has them whole."""
        # Sorted once, however many shards there are: a run of many processes leaves one of each.
        wanted, places = np.unique(digests, return_inverse=True)
        shards, rows, arrays = np.full(len(wanted), -1), np.full(len(wanted), -1), list[np.ndarray]()
        for folder, keys in self._keys().items():
            known = _match(keys, wanted)
            here, shape = (known >= 0) & (rows < 0), (len(keys), self.head.in_features)
            if here.any() and (values := self._load(folder, _VALUES, self.dtype, shape)) is not None:
                shards[here], rows[here] = len(arrays), known[here]
                arrays.append(values)
        return _Found(shards[places], rows[places], arrays)

    def _gather(self, found: _Found, digests: np.ndarray) -> np.ndarray:
        """The rows that were found as one array."""
        rows = found.rows
        if not len(rows):
            return np.zeros((0, self.head.in_features), dtype=self.dtype)
        # Rows that lie side by side in one shard are given as they are mapped, without a copy.
        if len(found.arrays) == 1 and np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))):
            return found.arrays[0][rows[0] :][: len(rows)]
        if self._num_bytes(len(rows)) <= _MAX_COPIED_BYTES:
            return np.concatenate(list(_pieces(found)))
        if (ordered := self._load_ordered(digests)) is not None:
            return ordered
        folder = self.folder / _name("ordered", digests)
        with self._unfinished(folder.name, self._num_bytes(len(rows))) as unfinished:
            self._write_features(unfinished, len(rows), lambda done: _pieces(found))
        return open_memmap(folder / _VALUES, mode="c")

    def _load_ordered(self, digests: np.ndarray) -> np.ndarray | None:
        """Features that were put in the order of these digests on disk before."""
        shape = len(digests), self.head.in_features
        return self._load(self.folder / _name("ordered", digests), _VALUES, self.dtype, shape)

    def _num_bytes(self, num_rows: int) -> int:
        return num_rows * self.head.in_features * self.dtype.itemsize

    # ── work in progress ────────────────────────────────────────────────────────────────────────────────────────────

    def _compute(
        self, dataset: Dataset, column: str, rows: np.ndarray, keys: np.ndarray, batch_size: int, disable_tqdm: bool
    ) -> None:
        """Run the backbone over rows, or over those that a run before has not got to."""

        def compute(done: int) -> Iterator[np.ndarray]:
            return self._forward(dataset, column, rows[done:], keys[done:] != _UNREAD, batch_size)

        with self._unfinished(_name("shard", keys), self._num_bytes(len(keys)), keep=True) as folder:
            _save_array(folder / _KEYS, keys)
            self._write_features(folder, len(keys), compute, batch_size, disable_tqdm)

    def _write_features(
        self,
        folder: Path,
        num_rows: int,
        batches: Callable[[int], Iterable[np.ndarray]],
        batch_size: int = 1,
        disable_tqdm: bool = True,
    ) -> None:
        """Write features by batches, and after each a line with a checksum; go on where a run before was killed."""
        header, row_bytes = _header((num_rows, self.head.in_features), self.dtype), self._num_bytes(1)
        done, checksum = _read_done(folder, header, num_rows, row_bytes, batch_size)
        with (
            open(folder / _VALUES, "ab", buffering=0) as values,
            open(folder / _BATCHES, "ab", buffering=0) as lines,
            tqdm(total=num_rows, initial=done, desc="Features", disable=disable_tqdm, leave=False) as progress,
        ):
            # Back to the last whole batch: what a killed run wrote after it cannot be trusted. A line has nine bytes.
            lines.truncate(9 * -(-done // batch_size))
            values.truncate(len(header) + done * row_bytes if done else 0)
            if not done:
                write_all(values.fileno(), header)
            for batch in batches(done):
                data = _check_batch(batch, done, self.head.in_features, self.dtype)
                write_all(values.fileno(), data)  # before its line: a line tells that the values are there
                checksum = zlib.crc32(data, checksum)
                write_all(lines.fileno(), b"%08x\n" % checksum)
                done += len(batch)
                progress.update(len(batch))
        if done != num_rows:
            raise ValueError(f"Features must be given for {num_rows} rows, got {done}.")

    @contextmanager
    def _unfinished(self, name: str, num_bytes: int, keep: bool = False) -> Iterator[Path]:
        """A folder that gets its name only when all in it is whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            folder = self.folder / f"{_PARTIAL}{name}"
            if not keep or not stack.enter_context(_held(folder)):
                keep, folder = False, self.folder / f"{_PRIVATE}{name}-{secrets.token_hex(4)}"
                stack.enter_context(_held(folder))  # so that nobody takes it for one that a dead run left
            advice = "What is computed stays." if keep else "Nothing half written is left."
            stack.enter_context(
                explain_full_disk(self.folder, f"{advice} Free some space and run this again.", num_bytes)
            )
            try:
                open_work_folder(folder)
                yield folder
                _seal(folder, self.folder.name)
                _rename(folder, self.folder / name)
                keep = False
            except ValueError:  # the same rows would fail again
                keep = False
                raise
            finally:
                if not keep:
                    shutil.rmtree(folder, ignore_errors=True)

    def _clean(self) -> None:
        """Delete what dead runs left, but for work that a later run may go on with."""
        names = {path.name.removesuffix(_LOCK) for path in self.folder.glob(".p*")}
        for folder in (self.folder / name for name in names if name.startswith((_PARTIAL, _PRIVATE))):
            with _held(folder) as is_held:
                if is_held and not self._is_wanted(folder):
                    shutil.rmtree(folder, ignore_errors=True)
        for path in self.folder.glob(f"shard-*/{_BATCHES}"):  # killed right after it had its name
            with suppress(OSError):
                path.unlink()

    def _is_wanted(self, folder: Path) -> bool:
        """Whether a folder in progress is of rows of which some are not known."""
        try:
            keys = open_memmap(folder / _KEYS, mode="r")
        except (OSError, *_UNREADABLE):
            return False
        if not folder.name.startswith(_PARTIAL) or keys.dtype != _KEY_DTYPE:
            return False
        return not np.isin(keys, np.concatenate([keys[:0], *self._keys().values()])).all()

    def _forward(
        self, dataset: Dataset, column: str, rows: np.ndarray, readable: np.ndarray, batch_size: int
    ) -> Iterator[np.ndarray]:
        captured: list[torch.Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda module, inputs: captured.append(inputs[0].detach()))
        device = self.head.weight.device
        self.model.to(memory_format=torch.channels_last)  # convolutions run faster so, on CPU too
        try:
            for start in range(0, len(rows), batch_size):
                is_there = readable[start : start + batch_size]
                # Rows that are not readable keep their place, with zeros, so that features go by row of the pool.
                values = np.zeros((len(is_there), self.head.in_features), dtype=np.float32)
                if is_there.any():
                    batch = self.processor(dataset[rows[start : start + batch_size][is_there]][column])
                    inputs = {name: channels_last(value.to(device)) for name, value in batch.items()}
                    with torch.no_grad(), torch.autocast(device.type, self._half, enabled=self._half is not None):
                        self.model(**inputs)
                    values[is_there] = captured.pop().float().cpu().numpy()
                yield values
        finally:
            hook.remove()


def row_digests(dataset: Dataset, column: str, readable: np.ndarray | None = None) -> np.ndarray:
    """Key of each row: of its content, and of the whole column where a cell is no content but a number for it."""
    find_digests = vector_digests if is_vector_column(dataset, column) else cell_digests
    digests = np.array(find_digests(dataset, column), dtype=_KEY_DTYPE)
    feature = dataset.features[column]
    if _may_be_names(dataset, column) and feature.dtype not in ("string", "large_string"):
        kind = f"{type(feature).__name__} {feature.dtype} "
        whole = hashlib.blake2b(kind.encode() + np.sort(digests).tobytes(), digest_size=16).digest()
        named = (hashlib.blake2b(digest, key=whole, digest_size=16).hexdigest() for digest in digests.tolist())
        digests = np.array(list(named), dtype=_KEY_DTYPE)
    # One key for all of them, so that a row without an input is never looked up as content.
    is_there = has_input(dataset, column)
    return np.where(is_there if readable is None else is_there & readable, digests, _UNREAD).astype(_KEY_DTYPE)


def _may_be_names(dataset: Dataset, column: str) -> bool:
    """Whether cells may be names of what the features are of: beside those that are put in, no text need be one."""
    feature = dataset.features[column]
    return isinstance(feature, Value | ClassLabel) and feature.dtype not in ("binary", "large_binary")


@dataclass(frozen=True)
class _Found:
    """In which of the arrays each row is, and in which row of it, -1 where it is not known."""

    shards: np.ndarray
    rows: np.ndarray
    arrays: list[np.ndarray]


def _match(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Row of each of some sorted digests among keys, the first of equal ones; -1 where there is none."""
    rows = np.full(len(wanted), -1)
    if len(wanted):
        places = np.minimum(np.searchsorted(wanted, keys), len(wanted) - 1)
        known = np.flatnonzero(wanted[places] == keys)[::-1]  # the last of equal ones is what numpy keeps
        rows[places[known]] = known
    return rows


def _pieces(found: _Found) -> Iterator[np.ndarray]:
    """The rows that were found, some at a time."""
    some = found.arrays[0]
    for begin in range(0, len(found.rows), _CHUNK):
        shards, rows = found.shards[begin : begin + _CHUNK], found.rows[begin : begin + _CHUNK]
        piece = np.empty((len(rows), some.shape[1]), dtype=some.dtype)
        for number in np.unique(shards):
            piece[shards == number] = found.arrays[number][rows[shards == number]]
        yield piece


def _name(what: str, keys: np.ndarray) -> str:
    return f"{what}-" + hashlib.blake2b(keys.tobytes(), digest_size=8).hexdigest()


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """How a `.npy` file begins."""
    file = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, fields)
    return file.getvalue()


def _save_array(path: Path, array: np.ndarray) -> None:
    """Write a `.npy` file; what `np.save` raises on a full disk does not say so."""
    path.write_bytes(_header(array.shape, array.dtype) + array.tobytes())


def _read_done(folder: Path, header: bytes, num_rows: int, row_bytes: int, batch_size: int) -> tuple[int, int]:
    """How many rows lie there in whole batches, cut as they would be now, and the checksum up to there."""
    done, checksum = 0, zlib.crc32(header)
    if not (folder / _VALUES).is_file() or not (folder / _BATCHES).is_file():
        return done, checksum
    with open(folder / _VALUES, "rb") as values:
        is_same = values.read(len(header)) == header
        # What follows the last line break was cut off.
        for line in (folder / _BATCHES).read_bytes().split(b"\n")[:-1] if is_same else []:
            count = min(batch_size, num_rows - done)
            found = zlib.crc32(values.read(count * row_bytes), checksum)
            if count == 0 or line != b"%08x" % found:
                break
            done, checksum = done + count, found
    return done, checksum


def _check_batch(batch: np.ndarray, done: int, size: int, dtype: np.dtype) -> bytes:
    """A batch as it lies on disk."""
    with np.errstate(over="ignore"):  # of float16, which is refused below in a sentence
        values = np.ascontiguousarray(batch, dtype=dtype)
    if values.ndim != 2 or values.shape[1] != size:
        raise ValueError(f"Features must have shape (num_rows, {size}) like the head, got {values.shape}.")
    if not np.isfinite(values).all():
        raise ValueError(
            f"Features must be finite in {dtype}, got others in rows {done}..{done + len(values) - 1}. Check "
            "these inputs, or keep features in float32."
        )
    return values.tobytes()


def _note(path: Path) -> str:
    return f"{path.stat().st_size} {file_digest(path)} {path.name}"


def _seal(folder: Path, backbone: str) -> None:
    """Note what the files of a folder are; the backbone comes last, so that half of the notes tell nothing."""
    notes = {path: _note(path) for path in sorted(folder.glob("*.npy"))}
    (folder / _OWNER).write_text("\n".join([*notes.values(), backbone]), encoding="utf-8")
    _verified.update((file_signature(path), note) for path, note in notes.items())


def _verify(path: Path, backbone: str) -> None:
    """Compare a file with what was noted of it: its size each time, its content once per process."""
    *notes, owner = (path.parent / _OWNER).read_text(encoding="utf-8").split("\n")
    if owner != backbone:
        raise ValueError(f"one of backbone '{owner}' instead of '{backbone}'")
    if not notes:
        return  # from before there were digests
    note = next((note for note in notes if note.endswith(f" {path.name}")), "")
    size, signature = path.stat().st_size, file_signature(path)
    if not note.startswith(f"{size} "):
        raise ValueError(f"{size} bytes instead of {note.partition(' ')[0]}")
    if (signature, note) not in _verified:
        if note != _note(path):
            raise ValueError("other content than its digest tells")
        _verified.add((signature, note))


def _rename(folder: Path, target: Path) -> None:
    try:
        move_file(folder, target)
    except OSError:
        if not target.is_dir():  # else another process was first, with the same content
            raise
    with suppress(OSError):  # needed until now: if this process is killed before, no batch is computed again
        (target / _BATCHES).unlink()


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Hold the lock of a folder in progress, unless another process does; the kernel frees it when one dies."""
    try:
        lock = take_lock(Path(f"{folder}{_LOCK}"))
    except Timeout:
        yield False
        return
    is_held = lock.is_locked  # not on a disk that cannot be written, or has no locks
    try:
        yield is_held
    finally:
        if is_held:
            with suppress(OSError):
                os.unlink(lock.lock_file)
            lock.release()


# Of a configuration: labels, which are the head's, names, and what else changes no number.
_NOT_COMPUTED_WITH = (
    *("id2label", "label2id", "num_labels", "num_classes", "label_names", "problem_type", "finetuning_task"),
    *("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache", "pretrained_cfg"),
    *("output_attentions", "output_hidden_states", "return_dict"),
)


def backbone_key(model: nn.Module, head: nn.Linear, processor: InputProcessor, precision: str) -> str:
    """Hash everything that decides the head's inputs: weights outside the head, preprocessing and precision."""
    # By the weights themselves, not by a name: a fine-tuned backbone under its old id is another one.
    # The head is what is trained: its weights change nothing of what it is fed.
    own = {id(parameter) for parameter in head.parameters()}
    weights = {name: value for name, value in model.state_dict(keep_vars=True).items() if id(value) not in own}
    digest = hashlib.blake2b(digest_size=8)
    # Of one set of weights the mean over tokens is another input of the head than the first token.
    pooling = f" {model.pooling}" if hasattr(model, "pooling") else ""
    digest.update(f"{type(model).__name__} {processor.fingerprint} {precision}{pooling}".encode())
    # The same weights compute something else with another activation, or with more heads of attention.
    config = model.config.to_dict() if isinstance(model, PreTrainedModel) else {}
    told = {name: value for name, value in config.items() if name not in _NOT_COMPUTED_WITH}
    digest.update(json.dumps(told, sort_keys=True, default=str).encode())
    return hash_weights(digest, weights)

"""What a frozen backbone feeds its head: computed once per image or text, kept on disk, mapped into memory."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm

from .inputs import InputProcessor, cell_digests
from .neighbors import nearest_neighbors

_KEYS, _VALUES, _OWNER, _ROWS = "keys.npy", "features.npy", "backbone.txt", "rows.npy"
_KEY_DTYPE = np.dtype("S32")
# Rows that do not lie on disk in the order wanted are copied to memory up to this size, beyond it to a file.
_MAX_COPIED_BYTES = 2**30
_CHUNK = 8192


class FeatureStore:
    """Keep the head's inputs of each example, keyed by backbone, preprocessing and content.

    Rows are found by the digest of their content, so that training sets, test sets, levels, seeds and baselines that
    share examples share their features, whatever the order.

    Args:
        folder (`pathlib.Path`):
            Where all stores live; one sub-folder per backbone and preprocessing.
        model (`nn.Module`):
            The whole student, in `eval()` mode.
        head (`nn.Linear`):
            Its head, the inputs of which are kept.
        processor (`InputProcessor`):
            How cells become model inputs.
        autocast (`Callable`, *optional*):
            Context for mixed precision while the backbone runs.
        precision (`str`, *optional*, defaults to `"float32"`):
            Name of that precision, part of the key.
        dtype (`str`, *optional*, defaults to `"float32"`):
            How features are kept: `"float32"`, or `"float16"` for half the space.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        head: nn.Linear,
        processor: InputProcessor,
        *,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
        precision: str = "float32",
        dtype: str = "float32",
    ) -> None:
        self.model, self.head, self.processor, self.autocast = model, head, processor, autocast
        self.dtype = np.dtype(dtype)
        key = backbone_key(model, head, processor, precision)
        self.folder = Path(folder) / (key if dtype == "float32" else f"{key}-{dtype}")

    def features(
        self, dataset: Dataset, column: str, *, batch_size: int = 64, shard: tuple[int, int] = (0, 1),
        wait: Callable[[], None] = lambda: None, disable_tqdm: bool = False,
    ) -> np.ndarray:  # fmt: skip
        """Give the head's inputs of every row, running the backbone only where they are not known yet.

        Args:
            dataset (`datasets.Dataset`):
                Data.
            column (`str`):
                The column that the model reads.
            batch_size (`int`, *optional*, defaults to 64):
                Rows per forward pass.
            shard (`tuple[int, int]`, *optional*, defaults to `(0, 1)`):
                Number of this process and of all processes, each of which computes its share.
            wait (`Callable`, *optional*):
                Barrier between processes.
            disable_tqdm (`bool`, *optional*, defaults to `False`):
                Hide the progress bar.

        Returns:
            `np.ndarray` of shape `(num_examples, feature_size)`: mapped from disk where the rows lie there in this
            order or are too many for the memory, else in memory.

        Raises:
            FileNotFoundError: If what another process wrote cannot be seen.
            OSError: If the disk is full; nothing half written is left.
            ValueError: If a stored file is of another backbone or not whole.
        """
        digests = np.array(cell_digests(dataset, column), dtype=_KEY_DTYPE)
        unknown = np.flatnonzero(self._find(digests) < 0)
        _, first = np.unique(digests[unknown], return_index=True)
        wait()  # nobody may write before everybody has seen what is missing
        own = np.array_split(unknown[np.sort(first)], shard[1])[shard[0]]
        if len(own):
            self._write_shard(digests[own], self._forward(dataset, column, own, batch_size), disable_tqdm)
        wait()
        rows = self._find(digests)
        if missing := int((rows < 0).sum()):
            raise FileNotFoundError(
                f"'{self.folder}' must hold the features of all {len(rows)} rows, got none of {missing}. Give a "
                "`features_dir` that all processes see."
            )
        return self._gather(rows, digests)

    def write(self, dataset: Dataset, column: str, batches: Iterable[np.ndarray]) -> None:
        """Put features in that were computed elsewhere, so that the backbone need not run for them.

        Args:
            dataset (`datasets.Dataset`):
                Data.
            column (`str`):
                The column that the model reads.
            batches (`Iterable[np.ndarray]`):
                Arrays of shape `(num_rows, feature_size)`: what the head reads, in the order of the data.

        Raises:
            ValueError: If their sizes are not those of the head and the data, a value is not finite, or the features
                of a row are known already.
        """
        digests = np.array(cell_digests(dataset, column), dtype=_KEY_DTYPE)
        if num_known := int((self._find(digests) >= 0).sum()):
            raise ValueError(
                f"Features must be of rows that '{self.folder}' does not hold yet, got {num_known} of {len(digests)} "
                "that it does. Give the others only, or another `features_dir`."
            )
        self._write_shard(digests, batches, disable_tqdm=True)

    def neighbors(
        self, dataset: Dataset, column: str, features: torch.Tensor, k: int, *, is_first: bool = True,
        wait: Callable[[], None] = lambda: None,
    ) -> torch.Tensor:  # fmt: skip
        """Give each row's nearest others among the rows, found once for the same rows in the same order.

        Args:
            dataset (`datasets.Dataset`):
                Data.
            column (`str`):
                The column that the model reads.
            features (`torch.Tensor` of shape `(num_examples, feature_size)`):
                What [`features`] gave for it.
            k (`int`):
                How many.
            is_first (`bool`, *optional*, defaults to `True`):
                Whether this process writes what others read.
            wait (`Callable`, *optional*):
                Barrier between processes.

        Returns:
            `torch.LongTensor` of shape `(num_examples, k)`, see [`nearest_neighbors`].

        Raises:
            ValueError: If a stored file is of other rows or not whole.
        """
        digests = np.array(cell_digests(dataset, column), dtype=_KEY_DTYPE)
        name = f"neighbors-{k}-" + hashlib.blake2b(digests.tobytes(), digest_size=8).hexdigest()
        path = self.folder / name / _ROWS
        if is_first and not path.is_file():
            found = nearest_neighbors(features, k).numpy().astype(np.int32)
            with self._unfinished(name) as folder:
                np.save(folder / _ROWS, found, allow_pickle=False)
        wait()
        try:
            rows = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(
                f"Neighbours in '{path.parent}' must be whole, got: {error}. Delete that folder: they are found again."
            ) from error
        if rows.shape != (len(digests), k) or rows.size and not 0 <= rows.min() <= rows.max() < len(digests):
            raise ValueError(
                f"Neighbours in '{path.parent}' must be {k} of {len(digests)} rows each, got {rows.shape} of others. "
                "Delete that folder: they are found again."
            )
        return torch.from_numpy(rows.astype(np.int64))

    def _shards(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Keys and mapped features of every shard."""
        shards = []
        for path in sorted(path for path in self.folder.glob("shard-*") if path.is_dir()):
            try:
                keys = np.load(path / _KEYS, allow_pickle=False)
                # Copy on write: torch wants memory that can be written, though nobody does.
                values = np.load(path / _VALUES, mmap_mode="c", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise ValueError(
                    f"Features in '{path}' must be whole, got: {error}. Delete that folder: they are computed again."
                ) from error
            owner = (path / _OWNER).read_text(encoding="utf-8") if (path / _OWNER).is_file() else "nobody"
            expected = (len(keys), self.head.in_features), self.dtype, self.folder.name
            if (values.shape, values.dtype, owner) != expected:
                raise ValueError(
                    f"Features in '{path}' must be {expected[0]} {expected[1]} of backbone {expected[2]}, got "
                    f"{values.shape} {values.dtype} of {owner}. Delete that folder: they are computed again."
                )
            shards.append((keys, values))
        return shards

    def _find(self, digests: np.ndarray) -> np.ndarray:
        """Row of each digest, counted through all shards; -1 where it is not known."""
        keys = np.concatenate([np.zeros(0, dtype=_KEY_DTYPE), *(keys for keys, _ in self._shards())])
        if not len(keys):
            return np.full(len(digests), -1)
        order = np.argsort(keys, kind="stable")
        rows = order[np.minimum(np.searchsorted(keys, digests, sorter=order), len(keys) - 1)]
        return np.where(keys[rows] == digests, rows, -1)

    def _gather(self, rows: np.ndarray, digests: np.ndarray) -> np.ndarray:
        """Rows that are counted through all shards, as one array."""
        arrays = [values for _, values in self._shards()]
        if not len(rows):
            return np.zeros((0, self.head.in_features), dtype=self.dtype)
        starts = np.cumsum([0, *(len(values) for values in arrays)])
        number = int(np.searchsorted(starts, rows[0], side="right")) - 1
        if np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))) and rows[-1] < starts[number + 1]:
            return arrays[number][rows[0] - starts[number] :][: len(rows)]
        if len(rows) * self.head.in_features * self.dtype.itemsize <= _MAX_COPIED_BYTES:
            return np.concatenate(list(_pieces(arrays, starts, rows)))
        name = "ordered-" + hashlib.blake2b(digests.tobytes(), digest_size=8).hexdigest()
        if not (self.folder / name).exists():
            with self._unfinished(name) as folder:
                _write_array(
                    folder / _VALUES, _pieces(arrays, starts, rows), len(rows), self.head.in_features, self.dtype
                )
        return np.load(self.folder / name / _VALUES, mmap_mode="c", allow_pickle=False)

    def _write_shard(self, keys: np.ndarray, batches: Iterable[np.ndarray], disable_tqdm: bool) -> None:
        name = "shard-" + hashlib.blake2b(keys.tobytes(), digest_size=8).hexdigest()
        with (
            self._unfinished(name) as folder,
            tqdm(total=len(keys), desc="Features", disable=disable_tqdm, leave=False) as progress,
        ):
            _write_array(
                folder / _VALUES, batches, len(keys), self.head.in_features, self.dtype, on_batch=progress.update
            )
            np.save(folder / _KEYS, keys, allow_pickle=False)
            (folder / _OWNER).write_text(self.folder.name, encoding="utf-8")

    @contextmanager
    def _unfinished(self, name: str) -> Iterator[Path]:
        """A folder that gets its name only when all in it is whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".partial-", dir=self.folder))
        try:
            yield temporary
            try:
                os.replace(temporary, self.folder / name)
            except OSError:
                if not (self.folder / name).is_dir():  # else another process was first, with the same content
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _forward(self, dataset: Dataset, column: str, rows: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
        captured: list[torch.Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda module, inputs: captured.append(inputs[0].detach()))
        device = self.head.weight.device
        self.model.to(memory_format=torch.channels_last)  # convolutions run faster so, on CPU too
        try:
            for start in range(0, len(rows), batch_size):
                cells = dataset[rows[start : start + batch_size]][column]
                inputs = {name: _channels_last(value.to(device)) for name, value in self.processor(cells).items()}
                with torch.no_grad(), self.autocast():
                    self.model(**inputs)
                yield captured.pop().float().cpu().numpy()
        finally:
            hook.remove()


def _pieces(arrays: list[np.ndarray], starts: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Rows that are counted through all arrays, some at a time."""
    for begin in range(0, len(rows), _CHUNK):
        wanted = rows[begin : begin + _CHUNK]
        numbers = np.searchsorted(starts, wanted, side="right") - 1
        piece = np.empty((len(wanted), arrays[0].shape[1]), dtype=arrays[0].dtype)
        for number in np.unique(numbers):
            here = numbers == number
            piece[here] = arrays[number][wanted[here] - starts[number]]
        yield piece


def _write_array(
    path: Path, batches: Iterable[np.ndarray], num_rows: int, size: int, dtype: np.dtype,
    on_batch: Callable[[int], Any] = lambda num_rows: None,
) -> None:  # fmt: skip
    """Write a `.npy` file by plain writes: on a full disk, those to a map would kill the process."""
    done = 0
    with path.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (num_rows, size)}
        np.lib.format.write_array_header_1_0(file, header)
        for batch in batches:
            with np.errstate(over="ignore"):
                values = np.ascontiguousarray(batch, dtype=dtype)
            if values.ndim != 2 or values.shape[1] != size:
                raise ValueError(f"Features must have shape (num_rows, {size}) like the head, got {values.shape}.")
            if not np.isfinite(values).all():
                raise ValueError(
                    f"Features must be finite in {dtype}, got others in rows {done}..{done + len(values) - 1}. Check "
                    "these inputs, or keep features in float32."
                )
            file.write(values.data)
            done += len(values)
            on_batch(len(values))
    if done != num_rows:
        raise ValueError(f"Features must be given for {num_rows} rows, got {done}.")


def _channels_last(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value


def backbone_key(model: nn.Module, head: nn.Linear, processor: InputProcessor, precision: str) -> str:
    """Hash everything that decides the head's inputs: weights outside the head, preprocessing and precision.

    Args:
        model (`nn.Module`):
            The whole student.
        head (`nn.Linear`):
            Its head, left out.
        processor (`InputProcessor`):
            How cells become model inputs.
        precision (`str`):
            Precision in which the backbone runs.

    Returns:
        `str`: 16 hexadecimal digits.
    """
    own = {id(parameter) for parameter in head.parameters()}
    digest = hashlib.blake2b(digest_size=8)
    digest.update(f"{type(model).__name__} {processor.fingerprint} {precision}".encode())
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if id(tensor) not in own:
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

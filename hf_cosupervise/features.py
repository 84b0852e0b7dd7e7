"""What a frozen backbone feeds its head: computed once per image or text, kept on disk, mapped into memory."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm

from .inputs import InputProcessor, cell_digests

_KEYS, _VALUES = "keys.npy", "features.npy"


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
    ) -> None:
        self.model, self.head, self.processor, self.autocast = model, head, processor, autocast
        self.folder = Path(folder) / backbone_key(model, head, processor, precision)

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
            `np.ndarray` of shape `(num_examples, feature_size)`, float32, mapped from disk where rows lie in a row.
        """
        digests = cell_digests(dataset, column)
        known, _ = self._index()
        first_rows: dict[str, int] = {}
        for row, digest in enumerate(digests):
            if digest not in known:
                first_rows.setdefault(digest, row)
        wait()  # nobody may write before everybody has seen what is missing
        own = list(first_rows.values())[shard[0] :: shard[1]]
        if own:
            self._compute(dataset, column, own, [digests[row] for row in own], batch_size, disable_tqdm)
        wait()
        return self._gather(digests)

    def _index(self) -> tuple[dict[str, tuple[int, int]], list[Path]]:
        """Find the shard and row of every digest."""
        shards = sorted(path for path in self.folder.glob("shard-*") if path.is_dir())
        index: dict[str, tuple[int, int]] = {}
        for number, path in enumerate(shards):
            keys = np.load(path / _KEYS, allow_pickle=False)
            index.update((key.decode(), (number, row)) for row, key in enumerate(keys.tolist()))
        return index, shards

    def _gather(self, digests: list[str]) -> np.ndarray:
        index, shards = self._index()
        arrays = [np.load(path / _VALUES, mmap_mode="r", allow_pickle=False) for path in shards]
        places = np.array([index[digest] for digest in digests], dtype=np.int64).reshape(-1, 2)
        if len(set(places[:, 0].tolist())) == 1:
            rows, array = places[:, 1], arrays[places[0, 0]]
            if np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))):
                return array[rows[0] : rows[0] + len(rows)]
            return array[rows]
        features = np.empty((len(digests), self.head.in_features), dtype=np.float32)
        for number, array in enumerate(arrays):
            here = np.flatnonzero(places[:, 0] == number)
            features[here] = array[places[here, 1]]
        return features

    def _compute(
        self, dataset: Dataset, column: str, rows: list[int], keys: list[str], batch_size: int, disable_tqdm: bool
    ) -> None:
        """Write one shard, under its final name only when it is whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = "shard-" + hashlib.blake2b("".join(keys).encode(), digest_size=8).hexdigest()
        temporary = Path(tempfile.mkdtemp(prefix=".partial-", dir=self.folder))
        try:
            shape = (len(rows), self.head.in_features)
            values = np.lib.format.open_memmap(temporary / _VALUES, mode="w+", dtype=np.float32, shape=shape)
            with tqdm(total=len(rows), desc="Features", disable=disable_tqdm, leave=False) as progress:
                done = 0
                for batch in self._forward(dataset, column, rows, batch_size):
                    values[done : done + len(batch)] = batch
                    done += len(batch)
                    progress.update(len(batch))
            values.flush()
            np.save(temporary / _KEYS, np.array(keys, dtype="S32"), allow_pickle=False)
            if not (self.folder / name).exists():
                os.replace(temporary, self.folder / name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _forward(self, dataset: Dataset, column: str, rows: list[int], batch_size: int) -> Iterator[np.ndarray]:
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

"""How a cell of a dataset becomes what a model reads, for teachers and students alike."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import ClassLabel, Dataset, Image, Value
from PIL import Image as PILImage

from .teachers import is_writable_text

logger = logging.getLogger(__name__)

LABEL_NAMES = ("label", "labels", "oracle_label")
INPUT_NAMES = ("image", "img", "pixel_values", "text", "sentence")
_CHUNK = 1000


class RowError(TypeError, ValueError):
    """A row's input cannot be made into what a model reads; a teacher's `prepare` may raise it to say so.

    Nothing else that a teacher raises is taken for the fault of a row.
    """


def find_input_column(dataset: Any, input_column: str | None = None) -> str:
    """Find the column that models read.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            Data with named columns.
        input_column (`str`, *optional*):
            Its name. By default the only image column, else the first of `image`, `img`, `pixel_values`, `text`,
            `sentence` that is there.

    Returns:
        `str`

    Raises:
        TypeError: If it is no name.
        ValueError: If the column does not exist, or none or several could be meant.
    """
    check_column_name(input_column, "input_column")
    columns = list(dataset.column_names or (dataset.features or {}))
    if input_column is not None:
        if input_column not in columns:
            raise ValueError(f"`input_column` must be one of {columns}, got {input_column!r}.")
        return input_column
    images = [name for name, feature in (dataset.features or {}).items() if isinstance(feature, Image)]
    candidates = images or [name for name in INPUT_NAMES if name in columns][:1]
    if len(candidates) != 1:
        raise ValueError(
            f"The column that models read must be an image column or one of {list(INPUT_NAMES)}, got "
            f"{candidates or 'none'} among {columns}. Name it with `input_column`."
        )
    return candidates[0]


def check_column_name(column: Any, what: str) -> None:
    """Refuse what names no single column.

    Args:
        column (`Any`):
            What should be a name, or `None`.
        what (`str`):
            The argument, for the error.

    Raises:
        TypeError: If it is something else.
    """
    if not isinstance(column, str | None):
        advice = "Make pairs one text first: `dataset.map(lambda row: {'text': row['a'] + ' ' + row['b']})`"
        advice = advice if isinstance(column, list | tuple) and what == "input_column" else "Give its name"
        raise TypeError(f"`{what}` must be the name of one column, got {column!r}. {advice}.")


def _check_column(dataset: Dataset, column: str) -> None:
    if column not in dataset.column_names:
        raise ValueError(f"The column must be one of {dataset.column_names}, got {column!r}. Correct the name.")


def is_text_column(dataset: Dataset, column: str) -> bool:
    """Tell whether a column holds text.

    Args:
        dataset (`datasets.Dataset`):
            Data.
        column (`str`):
            Name of a column.

    Returns:
        `bool`

    Raises:
        ValueError: If there is no such column.
    """
    _check_column(dataset, column)
    feature = dataset.features[column]
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def find_label_column(dataset: Dataset) -> str:
    """Find the column with the labels of an evaluation set.

    Args:
        dataset (`datasets.Dataset`):
            Data.

    Returns:
        `str`: `label`, `labels` or `oracle_label`.

    Raises:
        ValueError: If none of them is there.
    """
    for name in LABEL_NAMES:
        if name in dataset.column_names:
            return name
    raise ValueError(
        f"An evaluation set needs labels in a column {list(LABEL_NAMES)}, got {dataset.column_names}. "
        "Rename the column that holds them."
    )


def read_labels(dataset: Dataset, column: str, labels: Sequence[str]) -> np.ndarray:
    """Read a label column as label ids of the task, by name where the data has names.

    Args:
        dataset (`datasets.Dataset`):
            Data.
        column (`str`):
            A column of `ClassLabel`, of label names, or of label ids; whole floats are ids too.
        labels (`Sequence[str]`):
            The task's label names.

    Returns:
        `np.ndarray` of shape `(num_examples,)`, int64.

    Raises:
        ValueError: If there is no such column, or a value is not a label of the task.
    """
    _check_column(dataset, column)
    feature, values = dataset.features[column], list(dataset[column])
    positions = {name: index for index, name in enumerate(labels)}
    if isinstance(feature, ClassLabel):
        values = [feature.names[value] if value is not None and value >= 0 else value for value in values]
    ids = [positions.get(value, -1) if isinstance(value, str) else as_label_id(value) for value in values]
    wrong = [row for row, value in enumerate(ids) if not isinstance(value, int) or not 0 <= value < len(labels)]
    if wrong:
        raise ValueError(
            f"Column `{column}` must hold labels of the task {list(labels)[:8]}, got {values[wrong[0]]!r} in row "
            f"{wrong[0]} ({len(wrong)} such rows)."
        )
    return np.asarray(ids, dtype=np.int64)


def as_label_id(value: Any) -> Any:
    """Give a whole float as an integer: pandas makes 0.0, 1.0 and NaN of label ids of which one is missing.

    Args:
        value (`Any`):
            What a label column holds.

    Returns:
        `Any`: an `int` for a whole number, `None` for NaN, anything else as it is.

    Examples:
        >>> as_label_id(1.0), as_label_id(float("nan")), as_label_id(0.5)
        (1, None, 0.5)
    """
    if isinstance(value, np.generic) and not isinstance(value, np.bool_):
        value = value.item()
    if not isinstance(value, float | Decimal):
        return value
    if math.isnan(value):
        return None
    return int(value) if math.isfinite(value) and value == int(value) else value


def has_input(dataset: Dataset, column: str) -> np.ndarray:
    """Tell which rows hold anything: a pool stores what could not be read as missing.

    Args:
        dataset (`datasets.Dataset`):
            Data.
        column (`str`):
            Name of a column.

    Returns:
        `np.ndarray` of shape `(num_examples,)`, bool.

    Raises:
        ValueError: If there is no such column.
    """
    _check_column(dataset, column)
    is_there = dataset.data.column(column).is_valid().to_numpy()
    return is_there if dataset._indices is None else is_there[dataset._indices.column(0).to_numpy()]


def row_keys(dataset: Dataset, column: str) -> list[str]:
    """Give each row a key that depends on its content only, so that it survives shuffling and selection.

    Args:
        dataset (`datasets.Dataset`):
            Data.
        column (`str`):
            The column that models read.

    Returns:
        `list[str]`: 32 hexadecimal digits of blake2b over the raw cell; the second, third … row of the same content
        gets `-1`, `-2` … appended.
    """
    seen: dict[str, int] = {}
    keys = []
    for digest in cell_digests(dataset, column):
        count = seen[digest] = seen.get(digest, -1) + 1
        keys.append(f"{digest}-{count}" if count else digest)
    return keys


def cell_digests(dataset: Dataset, column: str) -> list[str]:
    """Hash the raw content of each cell; equal cells have equal digests. Of a file that is gone, its name is hashed.

    Args:
        dataset (`datasets.Dataset`):
            Data.
        column (`str`):
            Name of a column.

    Returns:
        `list[str]`: 32 hexadecimal digits each.

    Raises:
        ValueError: If there is no such column.
    """
    _check_column(dataset, column)
    table_view = dataset.select_columns([column]).with_format("arrow")
    digests = []
    for start in range(0, len(dataset), _CHUNK):
        for cell in table_view[start : start + _CHUNK].column(column).to_pylist():
            digests.append(cell_digest(cell))
    return digests


def cell_digest(cell: Any) -> str:
    """Hash the raw content of one cell, as [`cell_digests`] does.

    Args:
        cell (`Any`):
            What Arrow holds, as a Python value.

    Returns:
        `str`: 32 hexadecimal digits.
    """
    return hashlib.blake2b(_cell_bytes(cell), digest_size=16).hexdigest()


def _cell_bytes(cell: Any) -> bytes:
    if isinstance(cell, Mapping) and set(cell) == {"bytes", "path"}:  # an image, encoded or still a file
        if cell["bytes"] is not None:
            return cell["bytes"]
        try:
            return Path(cell["path"] or "").read_bytes()
        except (OSError, ValueError):  # whoever reads the image says so, and names the row
            return f"no file: {cell['path']}".encode()
    if isinstance(cell, str):
        return cell.encode("utf-8")
    if isinstance(cell, bytes):
        return cell
    return json.dumps(cell, sort_keys=True, default=str).encode("utf-8")


class OutsideCellError(ValueError):
    """Data of others name a file or an address in place of a cell."""


def outside_cells(table: pa.Table) -> Iterator[tuple[str, int, str]]:
    """Find cells that do not hold their content but say where it is: files or addresses, at any depth of any column.

    Args:
        table (`pa.Table`):
            Data as `datasets` stores them: an image, a sound, a document is a struct of `bytes` and `path`.

    Returns:
        `Iterator[tuple[str, int, str]]`: Column, row, and the path.
    """
    for column in table.column_names:
        start = 0
        for chunk in table.column(column).chunks:
            for row, path in _outside(chunk):
                yield column, start + row, path
            start += len(chunk)


def _outside(array: pa.Array) -> Iterator[tuple[int, str]]:
    """Positions in an array at which something is a path without its bytes."""
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if pa.types.is_struct(array.type):
        fields = dict(zip((field.name for field in array.type), array.flatten()))
        if {"bytes", "path"} <= fields.keys():
            is_outside = pc.and_(pc.is_null(fields["bytes"]), pc.is_valid(fields["path"]))
            for row in np.flatnonzero(is_outside.to_numpy(zero_copy_only=False)).tolist():
                yield row, str(fields["path"][row].as_py())
        for values in fields.values():
            yield from _outside(values)
    elif pa.types.is_nested(array.type) and not pa.types.is_union(array.type):
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
        rows = np.repeat(np.arange(len(array)), lengths)
        for position, path in _outside(pc.list_flatten(array)):
            yield int(rows[position]), path


def check_cells(
    table: pa.Table, what: str, advice: str, is_own: Callable[[str], bool] = lambda path: False, start: int = 0
) -> None:
    """Refuse data of others that would have us open a file of this machine, or an address, in place of a cell.

    Args:
        table (`pa.Table`):
            What was loaded.
        what (`str`):
            The data, for the error.
        advice (`str`):
            What to do, a sentence.
        is_own (`Callable[[str], bool]`, *optional*):
            Whether a path is one of the data's own files.
        start (`int`, *optional*, defaults to 0):
            Number of the first row, for the error.

    Raises:
        OutsideCellError: If there is a path that is not.
    """
    for column, row, path in outside_cells(table):
        if not is_own(path):
            raise OutsideCellError(
                f"{what} must hold the content of every cell, got the path {path[:200]!r} without content "
                f"in row {start + row} of column '{column}'. It was not opened. {advice}"
            )


def to_pil(cell: Any, mode: str | None = None) -> PILImage.Image:
    """Give an image cell as a PIL image of the wanted mode.

    Args:
        cell (`PIL.Image.Image`, `np.ndarray` or nested `list`):
            A decoded image; arrays are of shape `(height, width)` or `(height, width, channels)`, of uint8 or of other
            whole numbers in 0..255, of uint16, or bool.
        mode (`str`, *optional*):
            PIL mode such as `"RGB"` or `"L"`. The image's own by default.

    Returns:
        `PIL.Image.Image`: of 8 bits per channel. Of 16 bits (PIL's `I;16` and its kin, uint16) the upper 8 stay, as
        PIL does it for colours. Pixels that are floats or 32 bits have no range that is certain: they are refused.

    Raises:
        RowError: If the cell is no image, or one that cannot be made one of 8 bits. It is a `TypeError`.
    """
    if isinstance(cell, PILImage.Image):
        if cell.mode in ("I", "F"):
            raise RowError(
                f"An image must have pixels of 8 or 16 bits, got one of mode {cell.mode!r}, the range of which nobody "
                "can know. Scale it to 0..255 by the range that it has, and make it one of uint8."
            )
        if cell.mode.startswith("I;16"):
            cell = np.asarray(cell)
    if not isinstance(cell, PILImage.Image):
        try:
            array = np.asarray(cell)
        except ValueError:  # rows of different lengths
            array = np.asarray(None)
        array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
        if array.dtype.kind == "b":
            array = array * np.uint8(255)
        elif array.dtype.kind == "u" and array.dtype.itemsize == 2:  # the type decides, not the values of one row
            array = array >> 8
        whole = array.dtype.kind in "iu" and (array.ndim == 2 or array.ndim == 3 and array.shape[2] in (2, 3, 4))
        if not whole or array.size and not 0 <= array.min() <= array.max() <= 255:
            raise RowError(
                f"An image cell must be a PIL image or an array of 8-bit pixels, got {type(cell).__name__}. Give "
                "uint8 of shape (height, width) or (height, width, channels)."
            )
        cell = PILImage.fromarray(array.astype(np.uint8))
    if mode is None or cell.mode == mode:
        return cell
    try:
        return cell.convert(mode)
    except ValueError as error:
        raise RowError(f"An image must be one that PIL can make {mode!r}, got {error}. Convert it first.") from error


class InputProcessor:
    """Turn a list of cells into the tensors of one batch, by a tokenizer or an image processor.

    Args:
        processing_class (`PreTrainedTokenizerBase` or `BaseImageProcessor`):
            What `AutoTokenizer` or `AutoImageProcessor` gives for the model.
        config (`PreTrainedConfig`, *optional*):
            The model's configuration, for the number of channels it reads (3 where it does not tell). Where it names
            no pad token, it gets the tokenizer's; a tokenizer without one pads with its end of a text.
        what (`str`, *optional*):
            Whose it is, for the error.

    Raises:
        TypeError: If `processing_class` can be called neither on text nor on images.
        ValueError: If a tokenizer has no token to pad with.
    """

    def __init__(self, processing_class: Any, config: Any = None, what: str = "`processing_class`") -> None:
        if not callable(processing_class):
            raise TypeError(
                "`processing_class` must be a tokenizer or an image processor, got "
                f"{type(processing_class).__name__}. Load it with `AutoTokenizer` or `AutoImageProcessor`."
            )
        self.processing_class = processing_class
        self.is_text = hasattr(processing_class, "pad") and hasattr(processing_class, "vocab_size")
        self.what = what
        if self.is_text:
            _set_pad_token(processing_class, config, what)
        self.mode = "L" if _num_channels(config) == 1 else "RGB"
        self.max_length = _max_length(processing_class, config) if self.is_text else None
        self.input_names = list(getattr(processing_class, "model_input_names", None) or ["pixel_values"])

    def __call__(self, cells: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Process cells.

        Args:
            cells (`Sequence`):
                Texts, or images as [`to_pil`] takes them.

        Returns:
            `dict[str, torch.Tensor]`: What the model's forward reads, first dimension `len(cells)`.

        Raises:
            RowError: If a cell is no image or no text, or a text has no token: alone it could not be read, and beside
                longer ones it would be all padding.
        """
        if self.is_text:
            batch = self._tokenize(cells)
        else:
            batch = self.processing_class([to_pil(cell, self.mode) for cell in cells], return_tensors="pt")
        return {name: batch[name] for name in self.input_names if name in batch}

    def _tokenize(self, cells: Sequence[Any]) -> Mapping[str, torch.Tensor]:
        for cell in cells:
            if not isinstance(cell, str):
                raise RowError(f"A text must be a string, got {type(cell).__name__}. Convert it first.")
            if not is_writable_text(cell.replace("\0", "")):
                raise RowError(f"A text must hold no halves of characters, got {cell!r}. Correct it.")
        batch = self.processing_class(
            list(cells), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt",
            return_attention_mask=True,
        )  # fmt: skip
        is_empty = batch["attention_mask"].sum(dim=1) == 0
        if bool(is_empty.any()):
            raise RowError(f"A text must have at least one token, got {cells[int(is_empty.nonzero()[0])]!r}.")
        return batch

    def probe(self) -> dict[str, torch.Tensor]:
        """Process two examples that every model of this kind can read: what fails here is no row's fault.

        Returns:
            `dict[str, torch.Tensor]`: As for cells; two texts of different length, or two grey images.

        Raises:
            ValueError: If they cannot be processed.
        """
        if not self.is_text:
            cells: list[Any] = [PILImage.new(self.mode, (64, 64))] * 2
        else:
            cells = [(text := self._find_text()), f"{text} {text}"]
        try:
            return self(cells)
        except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
            kind = "texts" if self.is_text else "images"
            raise ValueError(
                f"{self.what} must be able to prepare {kind}, got {type(error).__name__}: {str(error).rstrip('.')}. "
                "Correct its settings, or save it again by `save_pretrained`."
            ) from error

    def _find_text(self) -> str:
        """A text that has tokens."""
        tokenizer = self.processing_class
        if len(tokenizer("a text")["input_ids"]):
            return "a text"
        special = set(tokenizer.all_special_tokens)
        words = [word for word in tokenizer.get_vocab() if word not in special]
        return tokenizer.convert_tokens_to_string(sorted(words, key=len)[-1:])

    @property
    def fingerprint(self) -> str:
        """`str`: Hash of everything that decides what the model gets to see, 16 hexadecimal digits."""
        processor = self.processing_class
        if self.is_text:
            sides = [getattr(processor, "truncation_side", ""), getattr(processor, "padding_side", "")]
            facts = [_tokenizer_facts(processor), self.max_length, *sides]
        else:
            settings = processor.to_dict() if hasattr(processor, "to_dict") else repr(processor)
            facts = [settings, repr(getattr(processor, "val_transforms", "")), self.mode]
        text = json.dumps([type(processor).__name__, facts], sort_keys=True, default=str)
        return hashlib.blake2b(text.encode("utf-8"), digest_size=8).hexdigest()


def _set_pad_token(tokenizer: Any, config: Any, what: str) -> None:
    """Give a tokenizer and its model one and the same token to pad with: GPT-2, Llama and their kin come without."""
    if getattr(tokenizer, "pad_token_id", None) is None:
        eos, size = getattr(tokenizer, "eos_token_id", None), getattr(config, "vocab_size", None)
        if eos is None or size is not None and eos >= size:
            raise ValueError(
                f"{what} must have a token to pad texts with, got a tokenizer with neither a pad token nor an end of "
                "a text that its model knows. Set its `pad_token` to one of its tokens, and save it again by "
                "`save_pretrained`."
            )
        tokenizer.pad_token = tokenizer.eos_token
        logger.info(f"{what} has no pad token: texts are padded with {tokenizer.eos_token!r}.")
    for owner in (config, config.get_text_config()) if hasattr(config, "get_text_config") else ():
        if getattr(owner, "pad_token_id", None) is None:
            owner.pad_token_id = tokenizer.pad_token_id


def _tokenizer_facts(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return sorted(tokenizer.get_vocab().items())
    facts = json.loads(backend.to_str())
    # These two remember how the tokenizer was last called, not what it is.
    return {key: value for key, value in facts.items() if key not in ("padding", "truncation")}


def _max_length(tokenizer: Any, config: Any) -> int:
    """Length to cut texts to: a tokenizer that knows no limit would let them index past the model's positions."""
    limit = getattr(config, "max_position_embeddings", None)
    if not limit:
        return tokenizer.model_max_length
    # RoBERTa and its kin count positions from the padding id on.
    offset = config.pad_token_id + 1 if "roberta" in config.model_type else 0
    return min(tokenizer.model_max_length, limit - offset)


def _num_channels(config: Any) -> int:
    pretrained_cfg = getattr(config, "pretrained_cfg", None)
    if pretrained_cfg and pretrained_cfg.get("input_size"):
        return int(pretrained_cfg["input_size"][0])
    return int(getattr(config, "num_channels", None) or 3)


def shorten(names: Iterable[Any], limit: int = 20) -> str:
    """Give the first names as a list, and how many more there are: a thousand labels make no readable error.

    Args:
        names (`Iterable`):
            Names, ids or numbers.
        limit (`int`, *optional*, defaults to 20):
            How many to show.

    Returns:
        `str`
    """
    names = list(names)
    return str(names) if len(names) <= limit else f"{names[:limit]} and {len(names) - limit} more"

"""How a cell of a dataset becomes what a model reads, for teachers and students alike."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, Image
from PIL import ExifTags, ImageOps
from PIL import Image as PILImage

from ..hierarchy import is_writable_text
from .columns import has_input, is_text_column
from .vectors import VECTOR_INPUT, VECTOR_MODEL, check_vectors, stack_vectors

logger = logging.getLogger(__name__)
_CHUNK = 1000
# How a picture in PostScript begins, which is a program, and which PIL would have another program run.
_PROGRAMS = (b"%!PS", b"\xc5\xd0\xd3\xc6")
# Of pictures larger than PIL's own limit, those that are nearly nothing but pixels of one colour: photographs of that
# size have a byte for some ten pixels.
_MOST_PIXELS_PER_BYTE = 100


class RowError(TypeError, ValueError):
    """A row's input cannot be made into what a model reads; a teacher's `prepare` may raise it to say so."""


def decode_image(cell: Mapping[str, Any], feature: Image) -> PILImage.Image:
    """Decode a stored image as `datasets` does, unless it is a program, or small but for its pixels."""
    content, path = cell["bytes"], cell["path"]
    if content is None and (path is None or "://" in path):
        return feature.decode_example(cell)  # which says what is wrong, or fetches the user's own
    image: PILImage.Image = PILImage.open(path if content is None else io.BytesIO(content))
    try:
        _check_pixels(image, os.stat(path).st_size if content is None else len(content))
    except ValueError:
        image.close()
        raise
    image.load()  # which closes the file
    if image.getexif().get(ExifTags.Base.Orientation) is not None:
        image = ImageOps.exif_transpose(image)
    return image.convert(feature.mode) if feature.mode and feature.mode != image.mode else image


def _check_pixels(image: PILImage.Image, num_bytes: int) -> None:
    """Refuse what only looks like an image, by what its header tells."""
    if image.format == "EPS":
        raise ValueError("PostScript, which is a program (save it as PNG)")
    num_pixels, limit = image.width * image.height, PILImage.MAX_IMAGE_PIXELS
    if limit is not None and num_pixels > max(limit, num_bytes * _MOST_PIXELS_PER_BYTE):
        raise ValueError(
            f"{image.width:,} × {image.height:,} pixels in {num_bytes:,} bytes, which may fill the memory (if it is "
            "meant so, raise `PIL.Image.MAX_IMAGE_PIXELS`)"
        )


def to_pil(cell: Any, mode: str | None = None) -> PILImage.Image:
    """Give an image cell as a PIL image of the wanted mode."""
    if isinstance(cell, PILImage.Image):
        # Not read yet if it was only opened; what has been read is pixels.
        if cell.format == "EPS" and getattr(cell, "tile", None):
            raise RowError("An image must consist of pixels, got PostScript, which is a program. Save it as PNG.")
        if cell.mode in ("I", "F"):
            raise RowError(
                f"An image must have pixels of 8 or 16 bits, got one of mode {cell.mode!r}, the range of which nobody "
                "can know. Scale it to 0..255 by the range that it has, and make it one of uint8."
            )
        # PIL cuts off above 255 when it converts these; as an array they are scaled below.
        if cell.mode.startswith("I;16"):
            cell = np.asarray(cell)
    if not isinstance(cell, PILImage.Image):
        try:
            array = np.asarray(cell)
        except ValueError:  # rows of different lengths
            array = np.asarray(None)
        # PIL makes no image of one channel in a third dimension.
        array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
        if array.dtype.kind == "b":
            array = array * np.uint8(255)
        elif array.dtype.kind == "u" and array.dtype.itemsize == 2:  # the type decides, not the values of one row
            array = array >> 8
        # Floats are refused, for 0..1 and 0..255 look alike in a dark image.
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


def check_text(cell: Any) -> None:
    """Refuse what no tokenizer reads."""
    if not isinstance(cell, str):
        raise RowError(f"A text must be a string, got {type(cell).__name__}. Convert it first.")
    # A NUL is a character to tokenizers; half a character is an error in Rust that says nothing of the row.
    if not is_writable_text(cell.replace("\0", "")):
        raise RowError(f"A text must hold no halves of characters, got {cell!r}. Correct it.")


def check_depth(dataset: Dataset, column: str) -> None:
    """Refuse a column that makes 8 bits of 16 when it is read: `datasets` cuts off what is above 255."""
    feature = dataset.features[column]
    # Without a mode `datasets` gives what is stored, which `to_pil` scales.
    if not isinstance(feature, Image) or feature.mode is None or feature.mode.startswith(("I", "F")):
        return
    cells = dataset.select_columns([column]).with_format(None).cast_column(column, Image(decode=False))
    for row, cell in enumerate(cells[column]):
        # What is missing has no file; the pixels are decoded when somebody reads them.
        file = cell and (io.BytesIO(cell["bytes"]) if cell["bytes"] else cell["path"])
        if file and (found := read_header(file)[1]).startswith(("I", "F")):
            raise ValueError(
                f"Column '{column}' must give images as they are stored, got `Image(mode={feature.mode!r})`, which "
                f"cuts off what is above 255 in an image of mode {found!r}, row {row} first. Use "
                f"`dataset.cast_column({column!r}, Image())`: 16 bits are then scaled, and what a model reads is "
                "converted for it."
            )


def _check_programs(dataset: Dataset, column: str) -> None:
    """Refuse a column with pictures in PostScript before `datasets` decodes any: PIL would have a program run them."""
    first = 0
    for chunk in dataset.data.column(column).chunks:
        content, paths = (pc.struct_field(chunk, name) for name in ("bytes", "path"))
        found = [pc.starts_with(content, mark).fill_null(False) for mark in _PROGRAMS]
        is_program = np.any([mark.to_numpy(zero_copy_only=False) for mark in found], axis=0)
        for place in np.flatnonzero(pc.and_(content.is_null(), paths.is_valid())).tolist():
            is_program[place] = _begins_as_program(paths[place].as_py())
        if is_program.any():
            raise ValueError(
                f"Column '{column}' must hold images of pixels, got PostScript, which is a program, in the cell "
                f"{first + int(is_program.argmax())} of its table. It was not run; save it as PNG."
            )
        first += len(chunk)


def _begins_as_program(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(4) in _PROGRAMS
    except OSError:  # which whoever decodes it says
        return False


def read_header(file: Any) -> tuple[str, str]:
    """Read format and mode of an image; nothing where they cannot be read, which whoever decodes it says."""
    try:
        with PILImage.open(file) as image:
            return image.format or "", image.mode
    except (OSError, ValueError, SyntaxError, PILImage.DecompressionBombError):
        return "", ""


class InputProcessor:
    """Turn a list of cells into the tensors of one batch, by a tokenizer or an image processor; vectors by neither."""

    def __init__(self, processing_class: Any, config: Any = None, what: str = "`processing_class`") -> None:
        # What standardises vectors is a part of their model, so that nothing prepares them.
        self.num_features = config.num_features if getattr(config, "model_type", None) == VECTOR_MODEL else None
        if self.num_features is None and not callable(processing_class):
            raise TypeError(
                "`processing_class` must be a tokenizer or an image processor, got "
                f"{type(processing_class).__name__}. Load it with `AutoTokenizer` or `AutoImageProcessor`."
            )
        self.processing_class = processing_class
        # By what it can do, since tokenizers of one's own need not be of a class of transformers.
        self.is_text = hasattr(processing_class, "pad") and hasattr(processing_class, "vocab_size")
        self.what = what
        if self.is_text:
            _set_pad_token(processing_class, config, what)
        # A model of one channel would fail on three, and most of three on one.
        self.mode = "L" if _num_channels(config) == 1 else "RGB"
        self.max_length = _max_length(processing_class, config) if self.is_text else None
        self.input_names = list(getattr(processing_class, "model_input_names", None) or ["pixel_values"])

    @property
    def modality(self) -> str:
        """`str`: What it reads, `"vector"`, `"text"` or `"image"`."""
        return "vector" if self.num_features is not None else "text" if self.is_text else "image"

    def __call__(self, cells: Sequence[Any], second: str | None = None) -> dict[str, torch.Tensor]:
        """Process cells; texts as pairs with a second text, where there is one."""
        if self.num_features is not None:
            return {VECTOR_INPUT: torch.from_numpy(stack_vectors(cells, self.num_features))}
        if self.is_text:
            batch = self._tokenize(cells, second)
        else:
            batch = self.processing_class([to_pil(cell, self.mode) for cell in cells], return_tensors="pt")
        # Whatever else a processor gives would reach the model's `forward` as an argument that it does not know.
        return {name: batch[name] for name in self.input_names if name in batch}

    def _tokenize(self, cells: Sequence[Any], second: str | None) -> Mapping[str, torch.Tensor]:
        for cell in cells:
            check_text(cell)
        batch = self.processing_class(
            list(cells),
            None if second is None else [second] * len(cells),
            padding=True,
            truncation=True if second is None else "only_first",
            max_length=self.max_length,
            return_tensors="pt",
            return_attention_mask=True,
        )
        is_empty = batch["attention_mask"].sum(dim=1) == 0
        # A mean over no tokens would be NaN, and so would the whole batch's loss.
        if bool(is_empty.any()):
            raise RowError(f"A text must have at least one token, got {cells[int(is_empty.nonzero()[0])]!r}.")
        return batch

    def find_readable(self, dataset: Dataset, column: str, *, needs_tokens: bool = True) -> np.ndarray:
        """Tell which rows of a column hold an input, and if it is a text, at least one token; see that vectors fit."""
        if self.num_features is not None:
            check_vectors(dataset, column, self.num_features)
        is_readable = has_input(dataset, column)
        if isinstance(dataset.features[column], Image):
            _check_programs(dataset, column)
        # Most tokenizers add tokens of their own, so that no text is without.
        if not (needs_tokens and self.is_text and is_text_column(dataset, column)) or self._num_tokens([""])[0]:
            return is_readable
        texts, rows = dataset.select_columns([column]).with_format(None), np.flatnonzero(is_readable)
        for start in range(0, len(rows), _CHUNK):
            some = rows[start : start + _CHUNK]
            is_readable[some] = np.array(self._num_tokens(texts[some][column])) > 0
        return is_readable

    def _num_tokens(self, texts: Sequence[str]) -> list[int]:
        encoded = self.processing_class(list(texts), truncation=True, max_length=self.max_length)
        return [len(ids) for ids in encoded["input_ids"]]

    def probe(self, second: str | None = None) -> dict[str, torch.Tensor]:
        """Process two examples that every model of this kind can read: what fails here is no row's fault."""
        if self.num_features is not None:
            cells: list[Any] = [np.zeros(self.num_features)] * 2
        elif not self.is_text:
            cells = [PILImage.new(self.mode, (64, 64))] * 2
        else:
            cells = [(text := self._find_text()), f"{text} {text}"]
        try:
            if not (batch := self(cells, second)) or self.is_text and "input_ids" not in batch:
                raise ValueError(f"none of what a model reads, but {self.input_names}")
            return batch
        except (ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
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
        if self.num_features is not None:
            facts: list[Any] = [self.num_features]
        elif self.is_text:
            sides = [getattr(processor, "truncation_side", ""), getattr(processor, "padding_side", "")]
            # `_tokenizer_facts` leaves out how texts are padded and cut, and the sides with it.
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
    # The model reads it from its own part of the configuration, and finds the last token of a text by it.
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
    if not limit or limit < 0:  # XLNet, whose positions are relative, says -1
        return tokenizer.model_max_length
    # RoBERTa and its kin count positions from the padding id on.
    offset = config.pad_token_id + 1 if "roberta" in config.model_type else 0
    return min(tokenizer.model_max_length, limit - offset)


def _num_channels(config: Any) -> int:
    pretrained_cfg = getattr(config, "pretrained_cfg", None)
    if pretrained_cfg and pretrained_cfg.get("input_size"):
        return int(pretrained_cfg["input_size"][0])
    return int(getattr(config, "num_channels", None) or 3)


def channels_last(value: Any) -> Any:
    """Put images into the order in which convolutions run faster, on the CPU too: once for all who share them."""
    is_image = isinstance(value, torch.Tensor) and value.ndim == 4
    return value.contiguous(memory_format=torch.channels_last) if is_image else value

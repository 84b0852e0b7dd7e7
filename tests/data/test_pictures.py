"""Stored pictures: decoded as `datasets` does it, but for those that are programs, or nothing but pixels."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Image
from PIL import EpsImagePlugin, ImageOps
from PIL import Image as PILImage
from transformers import AutoImageProcessor

from hf_cosupervise import Teacher, TeacherHierarchy, build_pool
from hf_cosupervise.data.inputs import InputProcessor, decode_image, to_pil
from hf_cosupervise.data.local import load_images

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
PROGRAMS = {
    "text": POSTSCRIPT,
    # The header of DOS, which says where the program is and where a preview.
    "binary": b"\xc5\xd0\xd3\xc6" + (32).to_bytes(4, "little") + len(POSTSCRIPT).to_bytes(4, "little") + bytes(20),
}
PROGRAMS["binary"] += POSTSCRIPT


def encoded(image: PILImage.Image, kind: str, **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def stored(*contents: bytes, mode: str | None = None) -> Dataset:
    cells = [{"bytes": content, "path": None} for content in contents]
    return Dataset.from_dict({"image": cells, "id": [*range(len(cells))]}).cast_column("image", Image(mode=mode))


def kept(folder: Path, *contents: bytes) -> Dataset:
    """The same in files, of which only their names are in the data."""
    paths = [folder / f"{place}.png" for place in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return Dataset.from_dict({"image": [*map(str, paths)], "id": [*range(len(paths))]}).cast_column("image", Image())


PLAIN = encoded(PILImage.new("RGB", (32, 32), "red"), "PNG")


@pytest.fixture
def was_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """Whether a program was run that reads PostScript."""
    program, told = tmp_path / "gs", tmp_path / "told"
    program.write_text(f"#!/bin/sh\ntouch {told}\n")
    program.chmod(0o755)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", str(program))
    with pytest.raises(OSError):  # it gives no picture
        PILImage.open(io.BytesIO(POSTSCRIPT)).load()
    assert told.exists()
    told.unlink()
    return told.exists


def look(row: dict[str, Any]) -> int:
    return row["image"].width // 32


def label(data: Dataset, **settings: Any) -> Any:
    hierarchy = TeacherHierarchy(["a", "b"], [Teacher(look)])
    return build_pool(data, hierarchy, disable_tqdm=True, **settings)


@pytest.mark.parametrize("make", [stored, kept])
@pytest.mark.parametrize("kind", PROGRAMS)
def test_no_picture_is_run(kind, make, was_run, tmp_path, tiny_vit):
    data = stored(PLAIN, PROGRAMS[kind]) if make is stored else kept(tmp_path, PLAIN, PROGRAMS[kind])
    with pytest.raises(ValueError, match="got ValueError: PostScript, which is a program .* in row 1"):
        label(data)
    assert label(data, on_error="missing").answered("look").tolist() == [True, False]
    processor = InputProcessor(AutoImageProcessor.from_pretrained(tiny_vit))
    with pytest.raises(ValueError, match="Column 'image' must hold images of pixels, got PostScript, which is a prog"):
        processor.find_readable(data.select([1, 0]), "image")
    assert processor.find_readable(stored(PLAIN), "image").tolist() == [True]
    with pytest.raises(ValueError, match="An image must consist of pixels, got PostScript"):
        to_pil(PILImage.open(io.BytesIO(PROGRAMS[kind])), "RGB")
    if make is kept:
        with pytest.raises(ValueError, match=r"1 files in .* that are none: \['1.png'\]"):
            (tmp_path / "gs").rename(tmp_path / ".gs")
            load_images(tmp_path)
    assert not was_run()


def test_small_files_of_many_pixels(monkeypatch, tmp_path):
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 50_000)
    flat, size = PILImage.new("L", (300, 300)), (300, 300)
    contents = {kind: encoded(flat, kind) for kind in ("PNG", "GIF", "WEBP")}
    contents["TIFF"] = encoded(PILImage.new("L", size), "TIFF", compression="tiff_deflate")
    for content in contents.values():
        for data in (stored(content), kept(tmp_path, content)):
            with pytest.raises(
                ValueError, match=r"300 × 300 pixels in [0-9]+ bytes.*raise `PIL.Image.MAX_IMAGE_PIXELS`"
            ):
                label(data)
    noise = PILImage.fromarray(np.random.default_rng(0).integers(0, 255, size, dtype=np.uint8))
    photo = encoded(noise, "JPEG")
    with pytest.warns(PILImage.DecompressionBombWarning):  # PIL's own word, as before
        assert decode_image({"bytes": photo, "path": None}, Image()).size == size
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", None)
    assert decode_image({"bytes": contents["PNG"], "path": None}, Image()).size == size


def test_pictures_are_decoded_as_datasets_decodes_them(tmp_path):
    rng = np.random.default_rng(0)
    photo = PILImage.fromarray(rng.integers(0, 255, (12, 20, 3), dtype=np.uint8))
    turned = PILImage.Exif()
    turned[0x0112] = 6
    pages = {"save_all": True, "append_images": [ImageOps.flip(photo)]}
    contents = [
        *(encoded(photo, "JPEG", exif=turned), encoded(photo, "PNG"), encoded(photo.quantize(), "PNG")),
        *(encoded(photo, "TIFF", **pages), encoded(photo.quantize(), "GIF"), encoded(photo, "WEBP", exif=turned)),
        *(encoded(photo.convert("LA"), "PNG"), encoded(photo.convert("1"), "PNG"), encoded(photo, "PNG", exif=turned)),
    ]
    for mode in (None, "RGB", "L"):
        for data in (stored(*contents, mode=mode), kept(tmp_path, *contents).cast_column("image", Image(mode=mode))):
            cells = data.cast_column("image", Image(decode=False))["image"]
            for cell, theirs in zip(cells, data["image"], strict=True):
                ours = decode_image(cell, data.features["image"])
                assert (ours.mode, ours.size, ours.tobytes()) == (theirs.mode, theirs.size, theirs.tobytes())

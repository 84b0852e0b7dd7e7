"""Inputs: which column is read, what a row's key is, and what a model gets to see of a cell."""

from __future__ import annotations

import copy
import hashlib

import numpy as np
import pytest
import torch
from datasets import Array3D, ClassLabel, Dataset, Features, Image, IterableDataset, Value, concatenate_datasets
from PIL import Image as PILImage
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

from hf_cosupervise.data.columns import (
    find_input_column,
    find_label_column,
    is_text_column,
    read_labels,
)
from hf_cosupervise.data.inputs import InputProcessor, to_pil
from hf_cosupervise.data.keys import cell_digests, row_keys

# ── columns ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def columns(**features: object) -> Dataset:
    return Dataset.from_dict({name: [] for name in features}, features=Features(features))


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        (columns(photo=Image(), label=Value("int64")), "photo"),  # the only image, whatever its name
        (columns(text=Value("string"), photo=Image()), "photo"),  # an image before a known name
        (columns(sentence=Value("string"), text=Value("string")), "text"),  # known names in their order
        (columns(label=Value("int64"), img=Array3D((2, 2, 3), "uint8")), "img"),
        (columns(sentence=Value("string")), "sentence"),
    ],
)
def test_find_input_column(dataset, expected):
    assert find_input_column(dataset) == expected
    assert find_input_column(dataset, dataset.column_names[0]) == dataset.column_names[0]


@pytest.mark.parametrize(
    ("dataset", "found"),
    [
        (columns(a=Value("string"), b=Value("int64")), "none among ['a', 'b']"),
        (columns(left=Image(), right=Image()), "['left', 'right'] among ['left', 'right']"),
    ],
)
def test_no_column_can_be_meant(dataset, found):
    with pytest.raises(ValueError) as error:
        find_input_column(dataset)
    assert str(error.value) == (
        "The column that models read must be an image column or one of ['image', 'img', 'pixel_values', 'text', "
        f"'sentence'], or the only one of vectors, got {found}. Name it, or several of numbers, with `input_column`."
    )


def test_wrong_column():
    with pytest.raises(ValueError) as error:
        find_input_column(columns(text=Value("string")), "words")
    assert str(error.value) == "`input_column` must be one of ['text'], got 'words'."


def test_streams_without_declared_columns():
    # a generator tells its columns only by its features, if at all
    stream = IterableDataset.from_generator(
        lambda: iter([{"text": "a"}]), features=Features({"text": Value("string")})
    )
    assert find_input_column(stream) == "text"


def test_is_text_column():
    dataset = columns(
        a=Value("string"), b=Value("large_string"), c=Value("int64"), d=Image(), e=ClassLabel(names=["x"])
    )
    assert [is_text_column(dataset, name) for name in "abcde"] == [True, True, False, False, False]


def test_find_label_column():
    assert (
        find_label_column(columns(oracle_label=Value("int64"), labels=Value("int64"), label=Value("int64"))) == "label"
    )
    assert find_label_column(columns(oracle_label=Value("int64"), labels=Value("int64"))) == "labels"
    assert find_label_column(columns(oracle_label=Value("int64"))) == "oracle_label"
    with pytest.raises(ValueError) as error:
        find_label_column(columns(target=Value("int64")))
    assert str(error.value) == (
        "An evaluation set needs labels in a column ['label', 'labels', 'oracle_label'], got ['target']. "
        "Rename the column that holds them."
    )


# ── labels ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("values", "feature"),
    [
        ([2, 0, 1], Value("int64")),  # ids of the task
        ([2.0, 0.0, 1.0], Value("float64")),  # as pandas gives them
        (["c", "a", "b"], Value("string")),  # names of the task
        ([0, 2, 1], ClassLabel(names=["c", "b", "a"])),  # the data's own order: names decide, not numbers
        ([0, 3, 2], ClassLabel(names=["c", "x", "b", "a"])),  # a name that no row uses does no harm
    ],
)
def test_read_labels(values, feature):
    dataset = Dataset.from_dict({"label": values}, features=Features({"label": feature}))
    found = read_labels(dataset, "label", ["a", "b", "c"])
    assert found.tolist() == [2, 0, 1] and found.dtype == np.int64


@pytest.mark.parametrize(
    ("values", "feature", "got", "count"),
    [
        ([0, 3, 4], Value("int64"), 3, 2),
        ([0, -1, 1], Value("int64"), -1, 1),
        ([0, None, 1], Value("int64"), None, 1),
        (["a", "b", "d"], Value("string"), "'d'", 1),
        ([0, 1, 1], ClassLabel(names=["a", "z"]), "'z'", 2),
        ([0, -1, 1], ClassLabel(names=["a", "b"]), -1, 1),
        ([0.0, 1.5, 2.0], Value("float64"), 1.5, 1),
        ([0.0, float("nan"), 1.0], Value("float64"), "nan", 1),
    ],
)
def test_read_labels_that_are_not_the_task_s(values, feature, got, count):
    dataset = Dataset.from_dict({"label": values}, features=Features({"label": feature}))
    with pytest.raises(ValueError) as error:
        read_labels(dataset, "label", ["a", "b", "c"])
    row = values.index(next(value for value in values if got == "'z'" and value == 1 or repr(value) == str(got)))
    assert str(error.value) == (
        f"Column `label` must hold labels of the task ['a', 'b', 'c'], got {got} in row {row} ({count} such rows)."
    )


# ── keys ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_keys_by_hand():
    dataset = Dataset.from_dict({"text": ["one", "two", "one", "öne", "one"]})
    one, two, other = (hashlib.blake2b(text.encode(), digest_size=16).hexdigest() for text in ("one", "two", "öne"))
    assert row_keys(dataset, "text") == [one, two, f"{one}-1", other, f"{one}-2"]
    assert cell_digests(dataset, "text") == [one, two, one, other, one]
    assert len(one) == 32


def test_keys_survive_shuffling(tiny_image_dataset, tiny_text_dataset):
    order = np.random.default_rng(0).permutation(48)
    for dataset, column in ((tiny_image_dataset, "image"), (tiny_text_dataset, "text")):
        digests = cell_digests(dataset, column)
        assert len(set(digests)) == 48
        assert cell_digests(dataset.select(order), column) == [digests[row] for row in order]
        assert cell_digests(concatenate_datasets([dataset, dataset]), column) == digests + digests
        assert cell_digests(dataset.select([]), column) == []


def test_more_rows_than_one_chunk():
    texts = [str(row % 1500) for row in range(2500)]
    keys = row_keys(Dataset.from_dict({"text": texts}), "text")
    assert len(set(keys)) == 2500 and keys[1500] == f"{keys[0]}-1"


def test_a_file_and_its_bytes_have_one_key(tmp_path):
    path = tmp_path / "image.png"
    PILImage.fromarray(np.full((4, 4, 3), 200, dtype=np.uint8)).save(path)
    features = Features({"image": Image()})
    file = Dataset.from_dict({"image": [str(path)]}, features=features)
    inside = Dataset.from_dict({"image": [{"bytes": path.read_bytes(), "path": None}]}, features=features)
    assert cell_digests(file, "image") == cell_digests(inside, "image")
    assert cell_digests(file, "image") == [hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()]


def test_other_kinds_of_cells():
    arrays = Dataset.from_dict(
        {"img": np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3).tolist()},
        features=Features({"img": Array3D((2, 2, 3), "uint8")}),
    )
    first, second = cell_digests(arrays, "img")
    assert first != second and cell_digests(arrays.select([1, 0]), "img") == [second, first]
    raw = Dataset.from_dict({"blob": [b"one", b"two"]})
    assert cell_digests(raw, "blob")[0] == hashlib.blake2b(b"one", digest_size=16).hexdigest()


# ── images ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_to_pil():
    colour = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    for cell in (colour, colour.tolist(), colour.astype(np.int64), PILImage.fromarray(colour)):
        assert np.asarray(to_pil(cell)).tolist() == colour.tolist()
    grey = to_pil(np.full((2, 3), 7, dtype=np.uint8))
    assert grey.mode == "L" and grey.size == (3, 2)
    assert np.asarray(to_pil(grey, "RGB")).tolist() == np.full((2, 3, 3), 7).tolist()
    image = PILImage.fromarray(colour)
    assert to_pil(image, "RGB") is image
    assert to_pil(PILImage.new("RGBA", (2, 2)), "RGB").mode == "RGB"


@pytest.mark.parametrize(
    "cell", ["a text", np.zeros((2, 2)), np.zeros(3, dtype=np.uint8), np.zeros((1, 2, 2, 3), dtype=np.uint8), None]
)
def test_what_is_no_image(cell):
    with pytest.raises(TypeError, match="An image cell must be a PIL image or an array of 8-bit pixels, got"):
        to_pil(cell)


@pytest.mark.parametrize("value", [-1, 256, 1000])
def test_pixels_beyond_eight_bits(value):
    # casting would wrap 256 to black without a word
    with pytest.raises((TypeError, ValueError), match="8-bit"):
        to_pil(np.full((2, 2), value))


# ── processors ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture()
def tokenizer(tiny_bert):
    return AutoTokenizer.from_pretrained(tiny_bert)


@pytest.fixture()
def image_processor(tiny_vit):
    return AutoImageProcessor.from_pretrained(tiny_vit)


def test_texts(tokenizer):
    processor = InputProcessor(tokenizer)
    assert processor.is_text
    batch = processor(["the animal hums", "barks"])
    # [CLS] the animal hums [SEP]; [CLS] barks [SEP] and padding
    assert batch["input_ids"].tolist() == [[2, 12, 13, 6, 3], [2, 10, 3, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert set(batch) == set(tokenizer.model_input_names)
    long = processor(["barks " * 100])
    assert long["input_ids"].shape == (1, 32) and long["input_ids"][0, -1] == 3  # cut, and closed


def test_texts_are_cut_to_what_the_model_can_read(tokenizer, tiny_bert):
    # many tokenizers know no limit of their own
    config = AutoConfig.from_pretrained(tiny_bert, max_position_embeddings=6)
    tokenizer.model_max_length = int(1e30)
    assert InputProcessor(tokenizer, config)(["barks " * 100])["input_ids"].shape == (1, 6)


def test_images(image_processor):
    processor = InputProcessor(image_processor)
    assert not processor.is_text
    image = np.full((8, 8, 3), 255, dtype=np.uint8)
    batch = processor([image, PILImage.fromarray(image), np.zeros((8, 8), dtype=np.uint8)])  # the last one is grey
    assert set(batch) == {"pixel_values"} and batch["pixel_values"].shape == (3, 3, 8, 8)
    assert batch["pixel_values"].dtype == torch.float32
    # mean and deviation are 1/2: white is 1, black is -1
    assert batch["pixel_values"][0].unique().tolist() == [1.0] and batch["pixel_values"][2].unique().tolist() == [-1.0]
    assert torch.equal(batch["pixel_values"][0], batch["pixel_values"][1])


def test_images_of_other_sizes_are_resized(image_processor):
    batch = InputProcessor(image_processor)([PILImage.new("RGB", (20, 30)), PILImage.new("L", (3, 3))])
    assert batch["pixel_values"].shape == (2, 3, 8, 8)


def test_models_of_one_channel_get_grey(image_processor, tiny_vit):
    config = AutoConfig.from_pretrained(tiny_vit, num_channels=1)
    processor = InputProcessor(image_processor, config)
    assert processor.mode == "L"
    assert InputProcessor(image_processor).mode == "RGB"


def test_timm_models(tiny_timm):
    processor = InputProcessor(AutoImageProcessor.from_pretrained(tiny_timm), AutoConfig.from_pretrained(tiny_timm))
    batch = processor([PILImage.new("RGB", (16, 16), (255, 255, 255))])
    assert processor.mode == "RGB" and set(batch) == {"pixel_values"} and batch["pixel_values"].shape == (1, 3, 16, 16)


def test_not_a_processor():
    with pytest.raises(TypeError) as error:
        InputProcessor({"do_resize": True})
    assert str(error.value) == (
        "`processing_class` must be a tokenizer or an image processor, got dict. "
        "Load it with `AutoTokenizer` or `AutoImageProcessor`."
    )


def test_fingerprints(tokenizer, image_processor, tiny_bert, tiny_vit, tiny_timm):
    processors = [
        InputProcessor(tokenizer),
        InputProcessor(image_processor),
        InputProcessor(image_processor, AutoConfig.from_pretrained(tiny_vit, num_channels=1)),
        InputProcessor(AutoImageProcessor.from_pretrained(tiny_timm)),
    ]
    for name, value in (("model_max_length", 8), ("padding_side", "left"), ("truncation_side", "left")):
        changed = copy.deepcopy(tokenizer)
        setattr(changed, name, value)
        processors.append(InputProcessor(changed))
    for name, value in (
        ("size", {"height": 9, "width": 9}),
        ("image_mean", [0.1] * 3),
        ("do_normalize", False),
        ("resample", 0),
    ):
        changed = copy.deepcopy(image_processor)
        setattr(changed, name, value)
        processors.append(InputProcessor(changed))
    fingerprints = [processor.fingerprint for processor in processors]
    assert len(set(fingerprints)) == len(fingerprints)
    assert all(len(fingerprint) == 16 for fingerprint in fingerprints)
    # the same when it is loaded again
    assert InputProcessor(AutoTokenizer.from_pretrained(tiny_bert)).fingerprint == fingerprints[0]
    assert InputProcessor(AutoImageProcessor.from_pretrained(tiny_vit)).fingerprint == fingerprints[1]


@pytest.mark.parametrize("kind", ["text", "image"])
def test_fingerprint_survives_a_call(kind, tokenizer, image_processor):
    # a fast tokenizer keeps the padding and truncation of its last call
    processor = InputProcessor(tokenizer if kind == "text" else image_processor)
    before = processor.fingerprint
    processor(["the animal"] if kind == "text" else [PILImage.new("RGB", (8, 8))])
    assert processor.fingerprint == before


def test_fingerprint_survives_saving(tokenizer, image_processor, tmp_path):
    # an exported student's processor must find the same features
    for processing_class, auto in ((tokenizer, AutoTokenizer), (image_processor, AutoImageProcessor)):
        folder = tmp_path / auto.__name__
        processing_class.save_pretrained(folder)
        assert InputProcessor(auto.from_pretrained(folder)).fingerprint == InputProcessor(processing_class).fingerprint

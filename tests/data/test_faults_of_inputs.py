"""What a row, a column, a name, a file or an object may look like: read by one rule, or refused with one sentence."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Callable
from decimal import Decimal
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from hf_cosupervise.data import inputs as inputs_module
from hf_cosupervise.data.columns import has_input, read_labels
from hf_cosupervise.data.inputs import InputProcessor, RowError, to_pil
from hf_cosupervise.data.keys import cell_digest, cell_digests, row_keys
from hf_cosupervise.files import parse_json
from hf_cosupervise.hierarchy import Teacher, TeacherHierarchy
from hf_cosupervise.pool.derived import aggregated_pool
from hf_cosupervise.pool.pseudolabels import PseudolabelPool
from hf_cosupervise.processes import Processes
from hf_cosupervise.strict_yaml import dump_yaml, parse_yaml
from hf_cosupervise.students.features import FeatureStore
from hf_cosupervise.students.head import linear_head
from hf_cosupervise.students.loading import load_student
from hf_cosupervise.teachers.kinds.loading import load_teacher
from hf_cosupervise.teachers.kinds.sklearn import save_sklearn_teacher
from hf_cosupervise.teachers.labeling import build_pool

quiet_pool = partial(build_pool, disable_tqdm=True)
AB = ["a", "b"]


def hierarchy(*teachers: Teacher, labels: Any = AB) -> TeacherHierarchy:
    return TeacherHierarchy(labels, list(teachers))


# ── images ──────────────────────────────────────────────────────────────────────────────────────────────────────────

DEEP = np.array([[0, 255, 256], [25700, 40000, 65535]], dtype=np.uint16)


def as_file(image: PILImage.Image, kind: str) -> PILImage.Image:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return PILImage.open(io.BytesIO(buffer.getvalue()))


@pytest.mark.parametrize(
    "cell",
    [
        DEEP,
        DEEP[..., None],
        DEEP.astype(">u2"),
        PILImage.fromarray(DEEP),
        as_file(PILImage.fromarray(DEEP), "PNG"),
        as_file(PILImage.fromarray(DEEP), "TIFF"),
        PILImage.frombytes("I;16B", (3, 2), DEEP.astype(">u2").tobytes()),
    ],
    ids=["array", "array of one channel", "big-endian array", "PIL", "PNG", "TIFF", "big-endian PIL"],
)
@pytest.mark.parametrize("mode", [None, "L", "RGB"])
def test_sixteen_bits_keep_their_upper_eight(cell: Any, mode: str | None) -> None:
    pixels = np.asarray(to_pil(cell, mode))
    pixels = pixels[..., 0] if mode == "RGB" else pixels
    assert pixels.tolist() == [[0, 0, 1], [100, 156, 255]]  # also where a row has none above 255


def test_colours_of_sixteen_bits_and_bools() -> None:
    assert np.asarray(to_pil(np.stack([DEEP] * 3, axis=-1))).tolist() == np.stack([DEEP >> 8] * 3, axis=-1).tolist()
    bits = np.array([[True, False]])
    assert np.asarray(to_pil(bits, "L")).tolist() == np.asarray(to_pil(PILImage.fromarray(bits), "L")).tolist()


@pytest.mark.parametrize(
    "cell",
    [
        PILImage.new("F", (2, 2), 0.5),
        PILImage.new("I", (2, 2), 7),
        PILImage.new("La", (2, 2)),
        as_file(PILImage.new("F", (2, 2), 200.0), "TIFF"),
        np.full((2, 2), 0.5, np.float16),
        np.full((2, 2), 70000, np.uint32),
        np.full((2, 2), -1, np.int16),
    ],
    ids=["F", "I", "La", "TIFF of floats", "half precision", "beyond 16 bits", "below zero"],
)
def test_pixels_of_no_certain_range_are_refused_whatever_their_values(cell: Any) -> None:
    with pytest.raises(RowError, match="^An image"):
        to_pil(cell, "RGB")


@pytest.mark.parametrize("mode", ["1", "P", "LA", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_other_modes_are_read_as_pil_reads_them(mode: str) -> None:
    image = PILImage.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3) * 20).convert("RGB")
    image = image.convert("L").convert("PA") if mode == "PA" else image.convert(mode)
    assert np.array_equal(np.asarray(to_pil(image, "RGB")), np.asarray(image.convert("RGB")))


def test_the_first_picture_of_several_upright() -> None:
    red, blue = (PILImage.new("RGB", (2, 2), colour) for colour in ("red", "blue"))
    buffer = io.BytesIO()
    red.save(buffer, "GIF", save_all=True, append_images=[blue])
    exif = PILImage.Exif()
    exif[0x0112] = 6  # turned by a quarter
    turned = io.BytesIO()
    PILImage.new("RGB", (4, 2)).save(turned, "JPEG", exif=exif)
    cells = [{"bytes": data.getvalue(), "path": None} for data in (buffer, turned)]
    first, second = Dataset.from_dict({"image": cells}, features=Features({"image": Image()}))["image"]
    assert np.asarray(to_pil(first, "RGB"))[0, 0].tolist() == [255, 0, 0] and to_pil(second).size == (2, 4)


# ── whose fault an error is ─────────────────────────────────────────────────────────────────────────────────────────


class Lengths:
    """A teacher by the length of a text, with a fault where it is told to have one."""

    column = None
    facts: dict[str, Any] = {"kind": "object"}

    def __init__(self, fault: Exception | None = None, where: str = "call") -> None:
        self.fault, self.where = fault, where

    def prepare(self, cells: Any) -> np.ndarray:
        if self.where == "prepare" and self.fault is not None:
            raise self.fault
        return np.array([len(cell) for cell in cells])

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        if self.where == "call" and self.fault is not None:
            raise self.fault
        return np.eye(2, dtype=np.float32)[inputs % 2]


TEXTS = Dataset.from_dict({"id": [10, 11, 12], "text": ["x", "yy", "zzz"]})
BUGS = [
    AttributeError("no such thing"),
    KeyError("k"),
    RuntimeError("shape"),
    ValueError("v"),
    TypeError("t"),
    IndexError("i"),
]  # noqa: E501


@pytest.mark.parametrize("where", ["prepare", "call"])
@pytest.mark.parametrize("on_error", ["raise", "missing"])
@pytest.mark.parametrize("bug", BUGS, ids=repr)
def test_a_bug_of_a_teacher_is_raised_and_named(bug: Exception, where: str, on_error: str) -> None:
    bug = type(bug)(*bug.args)  # without the notes of another test
    with pytest.raises(type(bug)) as caught:
        quiet_pool(TEXTS, hierarchy(Teacher("t")), models={"t": Lengths(bug, where)}, on_error=on_error)
    assert caught.value is bug
    assert bug.__notes__[-1] == "Raised by teacher 't' on a batch of 3 rows; no row is blamed for it."


def test_every_process_learns_of_any_error(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda outcome, src: sent.append(list(outcome)))

    def fail() -> None:
        raise StopIteration  # no list of errors would have named it

    with pytest.raises(StopIteration):
        Processes(0, 2).on_first(fail)
    assert isinstance(sent[0][1], StopIteration)


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ([1.0], "An input must give the 2 numbers of the classifier, got 1"),
        ([1.0, 2.0, 3.0], "An input must give the 2 numbers of the classifier, got 3"),
        ([], "An input must give the 2 numbers of the classifier, got 0"),
        ([1.0, None], "An input must hold finite numbers, got one that is missing or infinite"),
        ([1.0, float("inf")], "An input must hold finite numbers, got one that is missing or infinite"),
    ],
)
def test_a_vector_that_no_classifier_reads_is_its_row_s_fault(
    tmp_path: Path, caplog: Any, cell: list[float | None], reason: str
) -> None:
    pytest.importorskip("skops")
    from sklearn.linear_model import LogisticRegression

    save_sklearn_teacher(LogisticRegression().fit([[0, 1], [1, 0]], [0, 1]), tmp_path / "lr", {"kind": "values"}, AB)
    cells = [[0.0, 1.0], cell, [1.0, 0.0]]
    data = Dataset.from_dict(
        {"v": cells, "id": list("xyz")}, features=Features({"v": List(Value("float64")), "id": Value("string")})
    )  # noqa: E501
    build = partial(quiet_pool, data, hierarchy(Teacher(str(tmp_path / "lr"))), input_column="v")
    with pytest.raises(ValueError, match=f"{re.escape(reason)} in row 1 \\(id 'y'\\) for teacher 'lr'"):
        build()
    assert build(on_error="missing").answered("lr").tolist() == [True, False, True]
    assert caplog.records[-1].message.endswith(
        f"ids ['y']. Of id 'y': Teacher 'lr' must be able to read every row, got: {reason}."
    )  # noqa: E501


# ── rows that are missing, from labelling to training ───────────────────────────────────────────────────────────────


def spoilt(tmp_path: Path) -> tuple[Dataset, list[int]]:
    """Images of which some are cut off, no image, empty, gone, or have no certain range."""

    def encode(image: PILImage.Image, kind: str = "PNG") -> dict[str, Any]:
        buffer = io.BytesIO()
        image.save(buffer, kind)
        return {"bytes": buffer.getvalue(), "path": None}

    cells: list[Any] = [encode(PILImage.new("RGB", (8, 8), (20 * row, 9, 9))) for row in range(10)]
    cells[0]["bytes"] = cells[0]["bytes"][:40]
    cells[3] = {"bytes": None, "path": str(tmp_path / "gone.png")}
    cells[4] = None
    cells[6] = {"bytes": b"no image", "path": None}
    cells[9] = encode(PILImage.new("F", (8, 8), 0.5), "TIFF")
    return Dataset.from_dict({"image": cells}, features=Features({"image": Image()})), [0, 3, 4, 6, 9]


@pytest.mark.parametrize("place", ["memory", "folder"])
def test_what_could_not_be_read_is_missing_in_the_pool_too(
    tmp_path: Path, tiny_vit: str, tiny_labels: tuple[str, ...], place: str
) -> None:
    data, bad = spoilt(tmp_path)
    answers = ["ant"] * 10  # of people, who saw what no model can read
    teachers = hierarchy(Teacher(tiny_vit, name="vit"), Teacher("said", kind="column", level=1), labels=tiny_labels)
    output_dir = tmp_path / "pool" if place == "folder" else None
    pool = quiet_pool(data.add_column("said", answers), teachers, on_error="missing", output_dir=output_dir)
    good = np.setdiff1d(np.arange(10), bad)

    assert np.flatnonzero(~pool.answered("vit")).tolist() == bad and pool.answered("said").all()
    assert pool.inputs is not None and np.flatnonzero(~has_input(pool.inputs, "image")).tolist() == bad
    assert pool.ids.tolist() == row_keys(data, "image") and list(pool.inputs["id"]) == pool.ids.tolist()
    cells = pool.inputs["image"][:]
    assert [cells[row] is None for row in range(10)] == [row in bad for row in range(10)]
    assert has_input(pool.inputs.select([3, 1]), "image").tolist() == [False, True]

    model, processing_class = load_student(tiny_vit, tiny_labels)
    head = linear_head(model)
    assert head is not None
    store = FeatureStore(tmp_path / "features", model.eval(), head, InputProcessor(processing_class, model.config))
    features = store.features(pool.inputs, "image", batch_size=4, disable_tqdm=True)
    assert not features[bad].any() and features[good].any(axis=1).all()


def test_readable_inputs_of_rows_that_nobody_answered_stay(tiny_bert: str, tiny_labels: tuple[str, ...]) -> None:
    data = Dataset.from_dict({"text": ["barks", "purrs"], "said": [None, "cat"]})
    pool = quiet_pool(data, hierarchy(Teacher("said", kind="column"), labels=tiny_labels))
    assert pool.inputs is not None and has_input(pool.inputs, "text").all()


def test_a_file_that_is_gone_has_a_key(tmp_path: Path) -> None:
    cells = [{"bytes": None, "path": str(tmp_path / name)} for name in ("one.png", "two.png", "one.png")]
    data = Dataset.from_dict({"image": cells}, features=Features({"image": Image()}))
    one, two, again = cell_digests(data, "image")
    assert one == again != two and len(set(row_keys(data, "image"))) == 3
    nowhere = [{"bytes": None, "path": path} for path in (None, "", "a\0b", str(tmp_path))]
    assert len({cell_digest(cell) for cell in nowhere}) == 4


# ── texts without tokens, and tokenizers without padding ────────────────────────────────────────────────────────────


def save_gpt2(folder: Path, **tokens: str | None) -> str:
    """A tiny GPT-2 whose tokenizer makes nothing of a text without words; tokens may be left out."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2ForSequenceClassification, PreTrainedTokenizerFast

    words = {word: position for position, word in enumerate(["[PAD]", "[UNK]", "<e>", *"xyzuvw"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    known = {"unk_token": "[UNK]", "eos_token": "<e>", "pad_token": "[PAD]"} | tokens
    known = {name: token for name, token in known.items() if token is not None}
    config = GPT2Config(
        vocab_size=9,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=32,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=None if "pad_token" not in known else 0,
        id2label=dict(enumerate(AB)),
        initializer_range=0.5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        GPT2ForSequenceClassification(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=32, **known).save_pretrained(folder)
    return str(folder)


WORDS = ["", "x y z", "y", "  ", "x", "u v w x y z", "\n", "w w"]


@pytest.mark.parametrize("pad", ["[PAD]", None])
def test_order_and_batch_size_change_nothing(tmp_path: Path, pad: str | None) -> None:
    teachers = hierarchy(Teacher(save_gpt2(tmp_path / "gpt2", pad_token=pad)))
    rng, found = np.random.default_rng(0), []
    for batch_size in (1, 2, 3, 64):
        order = rng.permutation(len(WORDS))
        data = Dataset.from_dict({"id": order, "text": [WORDS[row] for row in order]})
        pool = quiet_pool(data, teachers, batch_size=batch_size, on_error="missing")
        found.append(pool.decode("gpt2")[np.argsort(order)])
        assert pool.facts["gpt2"]["num_failed"] == 3
    for probs in found:
        np.testing.assert_allclose(probs, found[0], atol=2e-3)
    assert (found[0].sum(axis=1) > 0).tolist() == [bool(text.strip()) for text in WORDS]


@pytest.mark.parametrize("text", ["", " ", "\t\n", "\u2003"])
@pytest.mark.parametrize(("place", "batch_size"), [(0, 1), (0, 64), (2, 64), (2, 2)])
def test_a_text_without_tokens_is_one_clear_error(tmp_path: Path, text: str, place: int, batch_size: int) -> None:
    texts = ["x y", "y", "z"]
    texts[place] = text
    with pytest.raises(ValueError) as error:
        quiet_pool(
            Dataset.from_dict({"id": [5, 6, 7], "text": texts}),
            hierarchy(Teacher(save_gpt2(tmp_path / "t"))),
            batch_size=batch_size,
        )
    assert f"A text must have at least one token, got {text!r} in row {place} (id {place + 5})" in str(error.value)


@pytest.mark.parametrize("cell", ["\ud800", "half \udc00", 7, None, ["x"]])
def test_what_is_no_text(tmp_path: Path, tiny_bert: str, cell: Any) -> None:
    from transformers import AutoTokenizer

    with pytest.raises(RowError, match="^A text must "):
        InputProcessor(AutoTokenizer.from_pretrained(tiny_bert))(["barks", cell])


@pytest.mark.parametrize("batch_size", [1, 64])
def test_without_a_pad_token_the_end_of_a_text_pads(tmp_path: Path, caplog: Any, batch_size: int) -> None:
    caplog.set_level(logging.INFO, logger=inputs_module.__name__)
    teachers = hierarchy(Teacher(save_gpt2(tmp_path / "gpt2", pad_token=None)))
    pool = quiet_pool(Dataset.from_dict({"text": ["x y z", "y"]}), teachers, batch_size=batch_size)
    assert pool.answered("gpt2").all()
    assert "Teacher 'gpt2' has no pad token: texts are padded with '<e>'." in caplog.messages


def test_a_model_without_pad_token_gets_the_tokenizer_s(tmp_path: Path) -> None:
    folder = save_gpt2(tmp_path / "gpt2")
    path = tmp_path / "gpt2" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": None}))
    teacher: Any = load_teacher(Teacher(folder), AB, "cpu")
    assert teacher.model.config.pad_token_id == 0
    one, other = teacher(teacher.prepare(["x y z", "y"])), teacher(teacher.prepare(["y"]))
    np.testing.assert_allclose(one[1], other[0], atol=1e-6)


def test_nothing_to_pad_with_is_said_of_the_teacher(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        load_teacher(Teacher(save_gpt2(tmp_path / "gpt2", pad_token=None, eos_token=None)), AB, "cpu")
    assert str(error.value) == (
        "Teacher 'gpt2' must have a token to pad texts with, got a tokenizer with neither a pad token nor an end of a "
        "text that its model knows. Set its `pad_token` to one of its tokens, and save it again by `save_pretrained`."
    )


def test_a_processor_that_can_read_nothing_is_said_of_the_teacher(
    tmp_path: Path, tiny_vit: str, tiny_labels: Any
) -> None:  # noqa: E501
    import shutil

    folder = Path(shutil.copytree(tiny_vit, tmp_path / "vit"))
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [0.5] * 7}))
    with pytest.raises(ValueError, match="^Teacher 'vit' must be able to prepare images, got .*Correct its settings"):
        load_teacher(Teacher(str(folder)), tiny_labels, "cpu")


def test_few_words_are_counted(tmp_path: Path) -> None:
    folder = Path(save_gpt2(tmp_path / "gpt2"))
    path = folder / "tokenizer.json"
    facts = json.loads(path.read_text())
    facts["model"]["vocab"] = {word: i for word, i in facts["model"]["vocab"].items() if word not in "uv"}
    path.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="must come with the vocabulary of its tokenizer, got 4 words besides"):
        load_teacher(Teacher(str(folder)), AB, "cpu")


# ── objects, columns and folders ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (lambda text: "a", "a function without `prepare(cells)`, `column` (a name or None), `facts`"),
        ("org/model", "a str without `__call__(inputs)`, `prepare(cells)`"),
        (Lengths, "the class Lengths. Give an object"),
        (torch.nn.Linear(1, 2), "a Linear without `prepare(cells)`"),
        (None, "a NoneType without"),
        (type("T", (Lengths,), {"facts": {"when": object()}})(), "a T without `facts` (a dictionary of JSON values)."),
        (type("T", (Lengths,), {"facts": [1]})(), "a T without `facts` (a dictionary of JSON values)."),
        (type("T", (Lengths,), {"column": 3})(), "a T without `column` (a name or None)."),
        (type("T", (Lengths,), {"prepare": None})(), "a T without `prepare(cells)`."),
    ],
    ids=["function", "name", "class", "module", "nothing", "facts of objects", "facts as a list", "column", "prepare"],
)
def test_an_object_that_is_no_teacher(model: Any, found: str) -> None:
    with pytest.raises(TypeError) as error:
        quiet_pool(TEXTS, hierarchy(Teacher("t")), models={"t": model})
    start = (
        "`models['t']` must be a teacher object with `prepare(cells)`, `__call__(inputs)`, `column` and `facts`, got "
    )
    assert str(error.value).startswith(start + found)
    with pytest.raises(TypeError, match="`models` must be teacher objects by their names, got list"):
        quiet_pool(TEXTS, hierarchy(Teacher("t")), models=[model])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["input_column", "oracle_column", "oracle_domain_column"])
@pytest.mark.parametrize("column", [["premise", "hypothesis"], ("a", "b"), 3, {"a": "b"}, b"text"])
def test_a_column_is_one_name(name: str, column: Any) -> None:
    is_several = name == "input_column" and isinstance(column, list | tuple)  # of numbers, read as one vector
    with pytest.raises(ValueError if is_several else TypeError) as error:
        quiet_pool(TEXTS, hierarchy(Teacher("t")), models={"t": Lengths()}, **{name: column})
    start = f"`{name}` must be one of " if is_several else f"`{name}` must be the name of one column, got {column!r}. "
    assert str(error.value).startswith(start)


def test_pairs_in_one_cell(tiny_bert: str, tiny_labels: tuple[str, ...]) -> None:
    data = Dataset.from_dict({"text": [["barks", "often"]] * 2})
    with pytest.raises(TypeError, match="given texts, got list. Name .*, and make pairs of texts one text each."):
        quiet_pool(data, hierarchy(Teacher(tiny_bert), labels=tiny_labels))


def test_a_path_is_a_teacher(tiny_bert: str, tiny_labels: tuple[str, ...]) -> None:
    teacher = Teacher(Path(tiny_bert))  # type: ignore[arg-type]
    assert teacher == Teacher(tiny_bert)
    assert TeacherHierarchy.from_dict(json.loads(json.dumps(hierarchy(teacher).to_dict()))).teachers == (teacher,)


def test_a_pool_remembers_its_input_column(tmp_path: Path) -> None:
    data = Dataset.from_dict({"review": ["x", "y"], "place": ["p", "q"], "said": ["a", "b"]})
    teachers = hierarchy(Teacher("said", kind="column"))
    pool = quiet_pool(data, teachers, input_column="review", output_dir=tmp_path / "pool")
    others = [PseudolabelPool.load(tmp_path / "pool"), pool.select([1]), pool.with_hierarchy(pool.hierarchy)]
    others += [
        aggregated_pool(pool, "mean_probs"),
        quiet_pool(data, teachers, input_column="review", keep_inputs=False),
    ]
    assert [other.input_column for other in (pool, *others)] == ["review"] * 6
    path = tmp_path / "pool" / "pool.json"
    header = json.loads(path.read_text())
    assert header["format_version"] == 1 and header.pop("input_column") == "review"
    path.write_text(json.dumps(header))  # as 0.1.0 wrote it
    assert PseudolabelPool.load(tmp_path / "pool").input_column is None
    path.write_text(json.dumps(header | {"input_column": 3}))
    with pytest.raises(ValueError, match="no str as `input_column`"):
        PseudolabelPool.load(tmp_path / "pool")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pd.Series([0, 1, None]), [0, 1, -1]),
        ([0.0, 1.0, float("nan")], [0, 1, -1]),
        ([-1.0, 1.0], [-1, 1]),
        ([Decimal(0), Decimal("1.00"), None], [0, 1, -1]),
        (np.array([0, 1], np.float32), [0, 1]),
        (["a", "", None, "b"], [0, -1, -1, 1]),
    ],
    ids=str,
)
def test_whole_floats_are_label_ids(values: Any, expected: list[int]) -> None:
    data = Dataset.from_pandas(pd.DataFrame({"said": values, "id": range(len(values))}), preserve_index=False)
    assert quiet_pool(data, hierarchy(Teacher("said", kind="column"))).hard_labels("said").tolist() == expected
    if -1 not in expected:
        assert read_labels(data, "said", AB).tolist() == expected
        gold = quiet_pool(data.add_column("t", AB), hierarchy(Teacher("t", kind="column")), oracle_column="said")
        assert gold.oracle_labels is not None and gold.oracle_labels.tolist() == expected


@pytest.mark.parametrize("value", [0.5, 2.0, float("inf"), -2.0, Decimal("0.1"), True, "2", "0.5"])
def test_other_values_are_no_label_ids(value: Any) -> None:
    data = Dataset.from_dict({"said": [value], "id": [0]})
    with pytest.raises(ValueError, match="Answers in column 'said' must be label names .* in row 0"):
        quiet_pool(data, hierarchy(Teacher("said", kind="column")))


# ── names, ids and files ────────────────────────────────────────────────────────────────────────────────────────────

DOORS: list[tuple[str, Callable[[], object], str]] = [
    (
        "an id with NUL",
        lambda: labelled(["x\0", "x"]),
        "Column `id` must hold no NUL, got 'x\\x00' in row 0. Rename it.",
    ),
    (
        "an id with NUL in a pool",
        lambda: predicted(["x\0", "x"]),
        "`ids` must hold no NUL and no halves of characters, got 'x\\x00'. Rename it.",
    ),
    (
        "half of a character as an id",
        lambda: predicted(["\ud83d", "x"]),
        "`ids` must hold no NUL and no halves of characters, got '\\ud83d'. Rename it.",
    ),
    (
        "an id with NUL among the inputs",
        lambda: PseudolabelPool(
            hierarchy(Teacher("t")), predicted(["x", "y"]).teachers, Dataset.from_dict({"id": ["x", "x\0"]})
        ),
        "Ids of the pool must hold no NUL, got 'x\\x00'. Rename it.",
    ),
    ("an empty label", lambda: TeacherHierarchy(["a", ""], [Teacher("t")]), "Labels must not be blank, got '' among"),
    ("a blank label", lambda: TeacherHierarchy(["a", " \t"], [Teacher("t")]), "Labels must not be blank, got ' \\t'"),
    (
        "labels that look alike",
        lambda: TeacherHierarchy(["cat", "cat "], [Teacher("t")]),
        "Labels must be unique, got ['cat', 'cat '] more than once. Rename them.",
    ),
    (
        "labels that look alike in front",
        lambda: TeacherHierarchy(["\u00a0cat", "cat"], [Teacher("t")]),
        "Labels must be unique, got ['cat', '\\xa0cat'] more",
    ),
    (
        "half of a character in a label",
        lambda: TeacherHierarchy(["a", "\udfff"], [Teacher("t")]),
        "`labels` of a hierarchy must hold text without NUL and without halves of characters (lone surrogates), got ",
    ),
    ("NUL in a label", lambda: TeacherHierarchy(["a", "b\0"], [Teacher("t")]), "`labels` of a hierarchy must hold"),
    ("NUL in a scope", lambda: Teacher("t", scope=["a\0"]), "`scope` of teacher 't' must hold text without NUL"),
    ("half of a character in a label map", lambda: Teacher("t", label_map={"\ud800": "a"}), "`label_map` of teacher"),
    ("NUL in a folder", lambda: Teacher("a\0b", name="t"), "A teacher's `model` must be a Hub id, a folder"),
    ("a key twice in JSON", lambda: parse_json(b'{"a": {"b": 1, "b": 2}}'), "the key 'b' twice in one object"),
    ("a key twice in YAML", lambda: parse_yaml("a: 1\nc: 3\na: 2"), "`a` is there twice"),
    *(
        (
            f"{word} in YAML",
            partial(parse_yaml, f"rate: {word}"),
            f"`{word}` means different things to different "
            "readers of YAML; write it in quotes, or as `true`, `false` or a plain decimal number",
        )
        for word in (
            "1:30",
            "-1:30:05",
            "1:30.5",
            "no",
            "Yes",
            "ON",
            "off",
            "0o17",
            "017",
            "08",
            "1_000",
            "1_0.5",
            "0b11",
            "0x_f",
            "2024-01-01",
            "2024-01-01 10:00:00",
        )
    ),
]


def labelled(ids: list[str]) -> PseudolabelPool:
    data = Dataset.from_dict({"id": ids, "said": AB})
    return quiet_pool(data, hierarchy(Teacher("said", kind="column")))


def predicted(ids: list[str]) -> PseudolabelPool:
    return PseudolabelPool.from_predictions(hierarchy(Teacher("t")), ids, {"t": np.eye(2)})


@pytest.mark.parametrize(("make", "sentence"), [pytest.param(*row[1:], id=row[0]) for row in DOORS])
def test_a_name_or_file_of_two_meanings_is_refused(make: Callable[[], object], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value).startswith(sentence)


def test_a_hierarchy_file_with_a_key_twice(tmp_path: Path) -> None:
    path = tmp_path / "teachers.json"
    path.write_text('{"labels": ["a", "b"], "teachers": [{"model": "t/x"}], "labels": ["c", "d"]}')
    sentence = "what is not readable as JSON: the key 'labels' twice in one object. Correct it there."
    with pytest.raises(ValueError, match=sentence):
        TeacherHierarchy.load(path)


def test_what_the_yaml_reader_would_refuse_is_written_in_quotes(tmp_path: Path) -> None:
    names = [
        "no",
        "1:30",
        "0o17",
        "017",
        "1_0",
        "2024-01-01",
        "08",
        "true",
        "1",
        "1.5",
        "null",
        "plain",
        "é",
        "=",
        "<<",
    ]
    teachers = hierarchy(Teacher("t", scope=names[:3], label_map={"on": "no"}), labels=names)
    teachers.save(tmp_path / "teachers.yaml")
    assert TeacherHierarchy.load(tmp_path / "teachers.yaml") == teachers
    values = {"a": [True, 1, 1.5, None, "x: y"], "n": {"b": -3, "c": 1e-7}}
    assert parse_yaml(dump_yaml(values)) == values


@pytest.mark.parametrize("text", ["true", "False", "12", "-3", "0", "0x1F", "1.5", "1e3", ".inf", "~", "1.2.3"])
def test_what_has_one_meaning_is_read(text: str) -> None:
    import yaml

    assert parse_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("scopes", "expected"),
    [
        ([AB, ["b", "a"]], False),
        ([AB, None], False),
        ([None, None], False),
        ([["a"], ["b"]], True),
        ([["a"], AB], True),
        ([["a"], ["a"]], False),
        ([AB], True),
        ([None, None, ["a"]], True),
    ],
    ids=str,
)
def test_scopes_that_tell_nothing(scopes: list[list[str] | None], expected: bool) -> None:
    deep = [Teacher(f"t{i}", level=1, scope=scope) for i, scope in enumerate(scopes)]  # type: ignore[arg-type]
    assert hierarchy(Teacher("root"), *deep).has_distinct_scopes(1) is expected


# ── sizes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _count(self: Dataset, calls: list[int], real: Callable[..., Any], *args: Any, **options: Any) -> Any:
    calls.append(1)
    return real(self, *args, **options)


def test_columns_are_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of selections, each of which copies what is known of every column, does not grow with the columns."""
    counts = []
    for num in (4, 8):
        calls: list[int] = []
        for name in ("select_columns", "select", "cast_column"):
            monkeypatch.setattr(Dataset, name, partialmethod(_count, calls, getattr(Dataset, name)))
        data = Dataset.from_dict({"id": [0, 1], **{f"c{i}": AB for i in range(num)}})
        quiet_pool(data, hierarchy(*(Teacher(f"c{i}", kind="column") for i in range(num))))
        monkeypatch.undo()
        counts.append(len(calls))
    assert counts[0] == counts[1]


def test_labels_are_compared_once_each() -> None:
    """Names of labels are hashed, not compared with all others."""
    compared = [0]

    class Name(str):
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            compared[0] += 1
            return str.__eq__(self, other)  # type: ignore[arg-type]

    from hf_cosupervise.teachers.kinds.base import label_finder

    counts = []
    for num in (200, 400):
        compared[0] = 0
        find = label_finder([Name(f"label {i}") for i in range(num)])
        assert [find(Name(f"LABEL {i}")) for i in range(num)] == list(range(num))
        counts.append(compared[0])
    assert counts[1] <= 4 * 400


@pytest.mark.parametrize("method", ["mean_probs", "mean_logits", "majority_vote"])
def test_aggregation_decodes_a_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    from hf_cosupervise import processes

    rng = np.random.default_rng(0)
    probs = {name: rng.dirichlet(np.ones(5) / 3, size=30).astype(np.float32) for name in ("s", "t")}
    pool = PseudolabelPool.from_predictions(
        hierarchy(Teacher("s"), Teacher("t"), labels=list("abcde")), range(30), probs
    )
    whole = aggregated_pool(pool, method)
    sizes: list[int] = []
    real = PseudolabelPool.decode

    def decode(self: PseudolabelPool, name: str, rows: Any = None) -> np.ndarray:
        found = real(self, name, rows)
        sizes.append(len(found))
        return found

    monkeypatch.setattr(PseudolabelPool, "decode", decode)
    monkeypatch.setattr(processes, "CHUNK_ROWS", 7)
    np.testing.assert_array_equal(
        aggregated_pool(pool, method).label_probs(whole.hierarchy.names[0]),
        whole.label_probs(whole.hierarchy.names[0]),
    )
    assert max(sizes, default=0) <= 7  # a vote is of stored labels: nothing is decoded for it


def test_the_best_label_of_an_aggregate_is_that_of_full_precision() -> None:
    rng = np.random.default_rng(0)
    posteriors = torch.from_numpy(rng.dirichlet(np.full(4, 1e4), size=300))  # nearly uniform: many ties in half
    pool = PseudolabelPool.from_predictions(
        hierarchy(Teacher("t"), labels=list("abcd")), range(300), {"t": np.full((300, 4), 0.25)}
    )
    mine = aggregated_pool(pool, lambda probs, answered: posteriors, "mine")
    expected = posteriors.argmax(dim=1).tolist()
    assert mine.hard_labels("mine").tolist() == mine.decode("mine").argmax(axis=1).tolist() == expected
    direct = PseudolabelPool.from_predictions(pool.hierarchy, range(300), {"t": posteriors.numpy()}, pool_k=1)
    assert direct.hard_labels("t").tolist() == expected

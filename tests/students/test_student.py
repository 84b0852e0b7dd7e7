"""The student: asked, trained anew and put back, without a trainer or levels."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image
from PIL import Image as PILImage
from test_trainer import LABELS

from hf_cosupervise import CoSupervisedConfig, Teacher, TeacherHierarchy, build_pool
from hf_cosupervise.data.inputs import InputProcessor
from hf_cosupervise.method.neighbors import nearest_neighbors
from hf_cosupervise.processes import Processes, row_chunks
from hf_cosupervise.students.student import Student, open_student


@pytest.fixture
def make_student(tmp_path, tiny_vit, tiny_image_dataset):
    def make(model: str = tiny_vit, data: Dataset = tiny_image_dataset, **changes: Any) -> Student:
        means = {name: changes.pop(name) for name in ("processes", "answered") if name in changes}
        args = CoSupervisedConfig(output_dir=str(tmp_path), use_cpu=True, **changes)
        loaded, processing, _ = open_student(model, LABELS, args)
        column = "image" if "image" in data.column_names else "text"
        processor = InputProcessor(processing, loaded.config)
        examples = data.select_columns([column])
        return Student(loaded, processor, examples, column, LABELS, args, tmp_path / "features", **means)

    return make


def shift(student: Student, by: float = 1.0) -> None:
    """Stands for training."""
    student.put_back({name: value + by for name, value in student.tensors().items() if value.is_floating_point()})


def said(student: Student, data: Dataset) -> torch.Tensor:
    return torch.cat([part for _, part in student.predict_log_probs(data)])


@pytest.mark.parametrize("model", ["tiny_vit", "tiny_timm", "tiny_bert"])
@pytest.mark.parametrize("training", ["probe", "lora", "full"])
def test_it_says_what_its_model_says(make_student, request, model, training, tiny_image_dataset, tiny_text_dataset):
    data = tiny_text_dataset if model == "tiny_bert" else tiny_image_dataset
    student = make_student(request.getfixturevalue(model), data, student_training=training)
    assert (student.head is not None) == (training == "probe")
    found = said(student, data)
    with torch.no_grad():
        inputs = student.processor(data[:][student.input_column])
        expected = torch.log_softmax(student.model.eval()(**inputs).logits, dim=1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    labels = student.predict_labels(data)
    assert labels.tolist() == found.argmax(dim=1).tolist()
    assert student.measure_accuracy(data) == (labels == np.array(data["label"])).mean()


@pytest.mark.parametrize("training", ["probe", "lora", "full"])
def test_it_is_put_back_as_it_was(make_student, tiny_timm, training):
    student = make_student(tiny_timm, student_training=training)
    first, digest = {name: value.clone() for name, value in student.model.state_dict().items()}, student.digest()
    before = {name: value.clone() for name, value in student.tensors().items()}
    assert any("running_mean" in name for name in before) == (training != "probe")  # a frozen backbone does not drift
    shift(student)
    kept = {name: value.clone() for name, value in student.tensors().items()}
    assert student.digest() == digest  # which tells students apart, not how far one is
    student.restore(None)
    assert all(torch.equal(value, first[name]) for name, value in student.model.state_dict().items())
    student.restore(SimpleNamespace(student=kept, folds=[]))
    assert all(torch.equal(value, kept[name]) for name, value in student.tensors().items())
    assert set(student.buffers()) == {name for name in kept if "running_" in name or "num_batches" in name}


def test_heads_of_folds_judge_what_they_have_not_seen(make_student, tiny_image_dataset):
    student = make_student()
    plain = said(student, tiny_image_dataset)
    shift(student)
    other = student.copy_head()
    student.start_anew()
    student.folds = [student.copy_head(), other]
    shifted = torch.log_softmax(other(student.features(student.examples)), dim=1).detach()
    found = torch.cat([part for _, part in student.judge_examples()])
    torch.testing.assert_close(found[0::2], plain[0::2])
    torch.testing.assert_close(found[1::2], shifted[1::2], atol=1e-5, rtol=1e-5)
    saved = SimpleNamespace(student=student.tensors(), folds=[dict(tensors) for tensors in student.fold_tensors()])
    again = make_student()
    again.restore(saved)
    assert torch.equal(torch.cat([part for _, part in again.judge_examples()]), found)
    again.restore(None)
    assert again.folds == [] and torch.equal(torch.cat([part for _, part in again.judge_examples()]), plain)


def test_processes_share_the_examples_out(make_student, monkeypatch):
    monkeypatch.setattr("hf_cosupervise.processes.CHUNK_ROWS", 10)
    monkeypatch.setattr(Processes, "wait", lambda self: None)
    alone = make_student()
    alone.features(alone.examples)  # the others find them
    parts: dict[int, torch.Tensor] = {}
    for rank in range(2):
        student = make_student(processes=Processes(rank, 2))
        own = [(part.start, log_probs) for part, log_probs in student.judge_examples()]
        assert [start for start, _ in own] == list(range(10 * rank, 48, 20))
        parts |= dict(own)
    found = torch.cat([parts[part.start] for part in row_chunks(48)])
    assert torch.equal(found, torch.cat([part for _, part in alone.judge_examples()]))


def test_neighbours_are_those_of_its_features(make_student):
    student = make_student(agreement_neighbors=3, assignment="agreement")
    expected = nearest_neighbors(student.features(student.examples), 3)
    assert torch.equal(student.nearest(3), expected) and torch.equal(student.nearest(2), expected[:, :2])
    assert Path(student.store.folder).parent.name == "features"


def test_who_has_no_features_is_told(make_student):
    student = make_student(student_training="full")
    for ask in (lambda: student.store, lambda: student.features(student.examples), student.copy_head):
        with pytest.raises(ValueError, match="Only a linear head on a frozen backbone has features, got another kind"):
            ask()


def test_evaluation_sets_are_reduced_to_inputs_and_labels(make_student, tiny_image_dataset):
    student = make_student()
    data = tiny_image_dataset.add_column("more", list(range(48)))
    found = student.label({"a": data, "b": None})
    assert found["a"].column_names == ["image", "labels"] and found["b"] is None
    assert list(found["a"]["labels"]) == list(data["label"]) and student.label("a") == "a"


# ── rows that are not read ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def bare_bert(tiny_bert, tmp_path) -> str:
    """A tokenizer that adds no tokens of its own, as those of GPT-2 and its kin."""
    folder = Path(shutil.copytree(tiny_bert, tmp_path / "bare"))
    facts = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**facts, "post_processor": None}))
    return str(folder)


def with_rows(data: Dataset, column: str, cells: dict[int, object]) -> Dataset:
    """The same inputs with other cells in some rows, which need not be any that can be read."""
    features = Features({column: data.features[column]})
    raw = data.select_columns([column])
    raw = raw.cast_column(column, Image(decode=False)) if column == "image" else raw
    found = Dataset.from_dict({column: [cells.get(row, cell) for row, cell in enumerate(raw[column])]})
    return found.cast(features)


IMAGES: dict[str, object] = {
    "missing": None,
    "empty": {"bytes": None, "path": None},
    "cut off": {"bytes": b"\xff\xd8\xff\xe0", "path": None},
    "no image": {"bytes": b"text", "path": None},
    "no file": {"bytes": None, "path": "gone.png"},
}
TEXTS: dict[str, object] = {"missing": None, "empty": "", "spaces": "  ", "line": "\n", "tab": "\t "}


@pytest.mark.parametrize("training", ["probe", "lora", "full"])
@pytest.mark.parametrize("rows", [[0], [47], [7, 8, 31], list(range(16)), list(range(1, 48))])
@pytest.mark.parametrize("kind", ["image", "text"])
def test_rows_that_nobody_answered_are_not_read(make_student, request, training, rows, kind):
    data = request.getfixturevalue(f"tiny_{kind}_dataset")
    model = request.getfixturevalue("bare_bert" if kind == "text" else "tiny_vit")
    kinds = list((TEXTS if kind == "text" else IMAGES).values())
    broken = with_rows(data, kind, {row: kinds[number % 5] for number, row in enumerate(rows)})
    answered = ~np.isin(np.arange(48), rows)
    changes: dict[str, Any] = {"student_training": training, "per_device_eval_batch_size": 5}
    whole = make_student(model, data, **changes)
    expected = torch.cat([part for _, part in whole.judge_examples()])
    student = make_student(model, broken, answered=answered, **changes)
    found = torch.cat([part for _, part in student.judge_examples()])
    assert student.readable.tolist() == answered.tolist()
    torch.testing.assert_close(found[answered], expected[answered], atol=1e-5, rtol=1e-5)
    assert torch.equal(found[~answered], torch.full((len(rows), 4), 0.25).log())
    labels = student.predict_labels(student.examples)
    assert (labels == -1).tolist() == (~answered).tolist()


@pytest.mark.parametrize("training", ["probe", "lora", "full"])
@pytest.mark.parametrize("row", [0, 1, 24, 46, 47])
def test_answered_rows_without_input_are_left_out(make_student, bare_bert, training, row, tiny_text_dataset, caplog):
    # another tokenizer may make tokens of what this one makes none of
    broken = with_rows(tiny_text_dataset, "text", {row: list(TEXTS.values())[row % 5]})
    student = make_student(bare_bert, broken, student_training=training)
    assert np.flatnonzero(~student.readable).tolist() == [row]
    assert "1 of 48 examples are answered but hold nothing that the student can read" in caplog.text
    assert student.predict_labels(broken)[row] == -1 and (student.predict_labels(broken) >= 0).sum() == 47


def test_a_tokenizer_that_adds_tokens_reads_every_text(make_student, tiny_bert, tiny_text_dataset):
    student = make_student(tiny_bert, with_rows(tiny_text_dataset, "text", {0: "", 5: None, 9: " "}))
    assert np.flatnonzero(~student.readable).tolist() == [5]


def test_names_beside_features_that_were_put_in_need_no_tokens(make_student, bare_bert, tiny_text_dataset):
    data = with_rows(tiny_text_dataset, "text", {0: " ", 3: None})
    student = make_student(bare_bert, data)
    given = np.random.default_rng(0).normal(size=(48, 16)).astype(np.float32)
    student.store.write(data, "text", [given])
    assert np.flatnonzero(~student.readable).tolist() == [3]
    assert np.array_equal(student.features(student.examples)[:3].numpy(), given[:3])


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
def test_a_column_that_cuts_16_bits_off_is_refused(make_student, tiny_vit, tiny_image_dataset, mode):
    pixels = np.full((8, 8), 40_000, dtype=np.uint16)
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, "PNG")
    data = with_rows(tiny_image_dataset, "image", {9: {"bytes": buffer.getvalue(), "path": None}})
    data = data.add_column("label", tiny_image_dataset["label"])
    cut, student = data.cast_column("image", Image(mode=mode)), make_student()
    for ask in (student.predict_labels, student.label, student.measure_accuracy, student.features):
        with pytest.raises(ValueError) as error:
            ask(cut)
        assert str(error.value) == (
            f"Column 'image' must give images as they are stored, got `Image(mode='{mode}')`, which cuts off what is "
            "above 255 in an image of mode 'I;16', row 9 first. Use `dataset.cast_column('image', Image())`: 16 bits "
            "are then scaled, and what a model reads is converted for it."
        )
    with pytest.raises(ValueError, match="must give images as they are stored, got .* row 9 first. Use `dataset.cast"):
        build_pool(cut.remove_columns("label"), TeacherHierarchy(LABELS, [Teacher(tiny_vit)]))
    assert student.predict_labels(data).min() >= 0
    others = tiny_image_dataset.cast_column("image", Image(mode="RGB"))
    assert np.array_equal(student.predict_labels(others), student.predict_labels(tiny_image_dataset))

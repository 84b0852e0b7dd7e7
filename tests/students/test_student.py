"""The student: asked, trained anew and put back, without a trainer or levels."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from test_trainer import LABELS

from hf_cosupervise import CoSupervisedConfig
from hf_cosupervise.data.inputs import InputProcessor
from hf_cosupervise.method.neighbors import nearest_neighbors
from hf_cosupervise.processes import Processes, row_chunks
from hf_cosupervise.students.student import Student, open_student


@pytest.fixture
def make_student(tmp_path, tiny_vit, tiny_image_dataset):
    def make(model: str = tiny_vit, data: Dataset = tiny_image_dataset, **changes: Any) -> Student:
        processes = changes.pop("processes", None)
        args = CoSupervisedConfig(output_dir=str(tmp_path), use_cpu=True, **changes)
        loaded, processing, _ = open_student(model, LABELS, args)
        column = "image" if "image" in data.column_names else "text"
        processor = InputProcessor(processing, loaded.config)
        examples = data.select_columns([column])
        return Student(loaded, processor, examples, column, LABELS, args, tmp_path / "features", processes=processes)

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

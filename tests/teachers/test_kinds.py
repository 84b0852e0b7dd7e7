"""Loading each kind of teacher, mapping its labels, and writing one of scikit-learn."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import save_tiny_bert, save_tiny_timm, save_tiny_vit
from datasets import Dataset
from safetensors.torch import load_file, save_file

from hf_cosupervise.hierarchy import Teacher
from hf_cosupervise.teachers.kinds.base import TeacherModel
from hf_cosupervise.teachers.kinds.loading import identify_teacher, load_teacher
from hf_cosupervise.teachers.kinds.sklearn import save_sklearn_teacher
from hf_cosupervise.teachers.naming import hierarchy_from_names

pytestmark = pytest.mark.core


def copy_model(folder: str, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def edit_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def drop_tensors(folder: Path, part: str) -> Path:
    path = folder / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if part not in name}
    save_file(kept, path, metadata={"format": "pt"})
    return folder


def label(teacher: TeacherModel, cells: Sequence[Any]) -> np.ndarray:
    return teacher(teacher.prepare(cells))


# ── each kind gives what its own library gives ──────────────────────────────────────────────────────────────────────


def test_transformers_image_teacher_equals_plain_transformers(
    tiny_vit: str, tiny_labels: tuple[str, ...], tiny_image_dataset: Dataset
) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    teacher = load_teacher(Teacher(tiny_vit), tiny_labels, "cpu")
    images = tiny_image_dataset["image"][:5]
    pixel_values = AutoImageProcessor.from_pretrained(tiny_vit)(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = AutoModelForImageClassification.from_pretrained(tiny_vit).eval()(pixel_values=pixel_values).logits

    probs = label(teacher, images)

    assert probs.dtype == np.float32
    np.testing.assert_allclose(probs, logits.softmax(-1).numpy(), atol=1e-6)
    assert teacher.facts["kind"] == "transformers" and teacher.facts["class"] == "ViTForImageClassification"
    assert len(teacher.facts["preprocessing"]) == 16


def test_transformers_text_teacher_equals_plain_transformers(
    tiny_bert: str, tiny_labels: tuple[str, ...], tiny_text_dataset: Dataset
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    texts = tiny_text_dataset["text"][:5]
    inputs = AutoTokenizer.from_pretrained(tiny_bert)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = AutoModelForSequenceClassification.from_pretrained(tiny_bert).eval()(**inputs).logits

    probs = label(load_teacher(Teacher(tiny_bert), tiny_labels, "cpu"), texts)

    np.testing.assert_allclose(probs, logits.softmax(-1).numpy(), atol=1e-6)


def test_a_text_longer_than_the_model_reads_is_cut(
    tiny_labels: tuple[str, ...], tiny_bert: str, tmp_path: Path
) -> None:
    folder = copy_model(tiny_bert, tmp_path / "bert")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("model_max_length")
    path.write_text(json.dumps(settings))

    probs = label(load_teacher(Teacher(str(folder)), tiny_labels, "cpu"), ["often " * 100])

    assert probs.sum() == pytest.approx(1)


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_timm_teacher_equals_plain_timm(
    tiny_timm: str, tiny_labels: tuple[str, ...], tiny_image_dataset: Dataset, prefix: str
) -> None:
    import timm

    model = timm.create_model(f"local-dir:{tiny_timm}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model), is_training=False)
    images = tiny_image_dataset["image"][:5]
    with torch.no_grad():
        expected = model(torch.stack([transform(image) for image in images])).softmax(-1).numpy()

    teacher = load_teacher(Teacher(prefix + tiny_timm, name="t"), tiny_labels, "cpu")

    np.testing.assert_allclose(label(teacher, images), expected, atol=1e-6)
    assert teacher.facts["kind"] == "timm"


def test_timm_folder_loads_as_either_kind(
    tiny_labels: tuple[str, ...], tiny_image_dataset: Dataset, tmp_path: Path
) -> None:
    folder = Path(save_tiny_timm(tmp_path / "timm", tiny_labels))
    # As timm 1.0.31 writes it, which the wrapper of transformers cannot read by itself.
    edit_config(folder, model_args={"num_classes": 4, "in_chans": 3})
    images = tiny_image_dataset["image"][:5]

    by_kind = [load_teacher(Teacher(str(folder), kind=kind), tiny_labels, "cpu") for kind in ("timm", "transformers")]

    np.testing.assert_allclose(*[label(teacher, images) for teacher in by_kind], atol=1e-5)


def test_sklearn_teacher_equals_predict_proba(
    tiny_sklearn: str, tiny_labels: tuple[str, ...], tiny_image_dataset: Dataset
) -> None:
    import skops.io

    images = tiny_image_dataset["image"][:5]
    pixels = np.stack([np.asarray(image).ravel() / 255 for image in images])
    expected = skops.io.load(Path(tiny_sklearn) / "model.skops").predict_proba(pixels)

    teacher = load_teacher(Teacher(tiny_sklearn), tiny_labels)

    np.testing.assert_allclose(label(teacher, images), expected, atol=1e-5)
    assert teacher.facts["kind"] == "sklearn" and teacher.facts["class"] == "LogisticRegression"


def test_sklearn_teacher_on_texts_with_label_names_as_classes(tmp_path: Path, tiny_text_dataset: Dataset) -> None:
    pytest.importorskip("skops")
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.naive_bayes import MultinomialNB
    from sklearn.pipeline import make_pipeline

    texts = list(tiny_text_dataset["text"])
    names = tiny_text_dataset.features["label"].int2str(list(tiny_text_dataset["label"]))
    model = make_pipeline(CountVectorizer(), MultinomialNB()).fit(texts, names)
    save_sklearn_teacher(model, tmp_path / "bayes", {"kind": "text"})
    assert set(hierarchy_from_names([str(tmp_path / "bayes")], tiny_text_dataset).labels) == {*names}

    # The task knows one more label, and in another order.
    probs = label(load_teacher(Teacher(str(tmp_path / "bayes")), ("dog", "emu", "cat", "bee", "ant")), texts)

    assert (probs[:, 1] == 0).all()
    np.testing.assert_allclose(probs[:, [4, 3, 2, 0]], model.predict_proba(texts), atol=1e-6)


def test_images_are_resized_as_the_sklearn_teacher_declares(
    tiny_sklearn: str, tiny_labels: tuple[str, ...], tiny_image_dataset: Dataset
) -> None:
    image = tiny_image_dataset[0]["image"]
    teacher = load_teacher(Teacher(tiny_sklearn), tiny_labels)

    small, large = label(teacher, [image]), label(teacher, [image.resize((16, 16), 0)])

    np.testing.assert_allclose(small, large, atol=0.05)


# ── labels are mapped by name ───────────────────────────────────────────────────────────────────────────────────────


def test_labels_are_mapped_by_name_case_and_map(tmp_path: Path, tiny_image_dataset: Dataset) -> None:
    save_tiny_vit(tmp_path / "plain", ("ant", "bee", "cat", "dog"))
    save_tiny_vit(tmp_path / "other", ("Dog", "wasp", "ANT", "kitten"))
    images = tiny_image_dataset["image"][:5]
    labels = ("ant", "bee", "cat", "dog")
    label_map = {"wasp": "bee", "kitten": "cat"}

    plain = label(load_teacher(Teacher(str(tmp_path / "plain")), labels, "cpu"), images)
    other = label(load_teacher(Teacher(str(tmp_path / "other"), label_map=label_map), labels, "cpu"), images)

    # Both have the same weights, so only the meaning of the outputs differs.
    np.testing.assert_array_equal(other, plain[:, [2, 1, 3, 0]])


def test_probabilities_of_labels_mapped_to_one_add_up(
    tiny_vit: str, tiny_labels: tuple[str, ...], tiny_image_dataset: Dataset
) -> None:
    images = tiny_image_dataset["image"][:5]
    label_map = {"ant": "insect", "bee": "insect", "cat": "pet", "dog": "pet"}

    fine = label(load_teacher(Teacher(tiny_vit), tiny_labels, "cpu"), images)
    coarse = label(load_teacher(Teacher(tiny_vit, label_map=label_map), ("insect", "plant", "pet"), "cpu"), images)

    np.testing.assert_allclose(coarse[:, 0], fine[:, 0] + fine[:, 1], atol=1e-6)
    np.testing.assert_allclose(coarse[:, 2], fine[:, 2] + fine[:, 3], atol=1e-6)
    assert (coarse[:, 1] == 0).all()


def test_teacher_labels_outside_the_task_are_listed(tiny_vit: str) -> None:
    with pytest.raises(ValueError, match=r"must be labels of the task \['ant', 'cow'\], got \['bee', 'cat', 'dog'\]"):
        load_teacher(Teacher(tiny_vit), ("ant", "cow"), "cpu")


def test_placeholder_names_ask_for_a_label_map(tmp_path: Path, tiny_image_dataset: Dataset) -> None:
    placeholders = tuple(f"LABEL_{position}" for position in range(3))
    folder = save_tiny_vit(tmp_path / "vit", placeholders)
    with pytest.raises(ValueError, match=r"got the placeholders \['LABEL_0', 'LABEL_1', 'LABEL_2'\].*label_map"):
        load_teacher(Teacher(folder), ("a", "b", "c"), "cpu")

    label_map = dict(zip(placeholders, "cab", strict=True))
    teacher = load_teacher(Teacher(folder, label_map=label_map), ("a", "b", "c"), "cpu")
    probs = label(teacher, tiny_image_dataset["image"][:2])
    assert probs.shape == (2, 3)


def test_label_map_must_start_from_the_teachers_labels(tiny_vit: str, tiny_labels: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"must start from its own labels .*got \['ants'\]"):
        load_teacher(Teacher(tiny_vit, label_map={"ants": "ant"}), tiny_labels, "cpu")


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["transformers", "timm"])
def test_no_teacher_is_silently_random(
    tiny_vit: str, tiny_timm: str, tiny_labels: tuple[str, ...], tmp_path: Path, kind: str
) -> None:
    folder = copy_model(tiny_vit if kind == "transformers" else tiny_timm, tmp_path / "headless")
    drop_tensors(folder, "classifier" if kind == "transformers" else "fc.")
    with pytest.raises(ValueError, match="never a silently random teacher"):
        load_teacher(Teacher(str(folder)), tiny_labels, "cpu")


def test_a_bare_backbone_is_no_teacher(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
    )
    ViTModel(config).save_pretrained(tmp_path / "backbone")
    with pytest.raises(ValueError, match="never a silently random teacher"):
        load_teacher(Teacher(str(tmp_path / "backbone")), ("LABEL_0", "LABEL_1"), "cpu")


def test_pickled_weights_are_refused(
    tiny_vit: str, tiny_timm: str, tiny_labels: tuple[str, ...], tmp_path: Path
) -> None:
    for name, source in (("vit", tiny_vit), ("timm", tiny_timm)):
        folder = copy_model(source, tmp_path / name)
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        with pytest.raises(ValueError, match=r"in safetensors .*got only \['pytorch_model.bin'\].*convert them"):
            load_teacher(Teacher(str(folder)), tiny_labels, "cpu")


def test_kind_that_shows_nowhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"colour": "red"}')
    with pytest.raises(ValueError, match=r"must show in its files.*got a 'config.json' with \['colour'\]"):
        load_teacher(Teacher(str(tmp_path)), ("a", "b"))


def test_missing_folder_and_missing_config(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"must be a folder, or a model on the Hub \(`user/name`\), got"):
        load_teacher(Teacher(str(tmp_path / "nowhere")), ("a", "b"))
    with pytest.raises(FileNotFoundError, match="must have a 'config.json'"):
        load_teacher(Teacher(str(tmp_path)), ("a", "b"))


def test_regression_and_multi_label_models_are_refused(
    tmp_path: Path, tiny_vit: str, tiny_labels: tuple[str, ...]
) -> None:
    folder = save_tiny_bert(tmp_path / "score", ("score",))
    with pytest.raises(ValueError, match="at least two labels, got 1"):
        load_teacher(Teacher(folder), ("score", "other"), "cpu")
    folder = edit_config(copy_model(tiny_vit, tmp_path / "multi"), problem_type="multi_label_classification")
    with pytest.raises(ValueError, match="must choose one label per example"):
        load_teacher(Teacher(str(folder)), tiny_labels, "cpu")


def test_timm_teacher_without_names_is_refused(tiny_timm: str, tiny_labels: tuple[str, ...], tmp_path: Path) -> None:
    folder = edit_config(copy_model(tiny_timm, tmp_path / "nameless"), label_names=None)
    with pytest.raises(ValueError, match="must tell the names of its 4 labels"):
        load_teacher(Teacher(str(folder)), tiny_labels, "cpu")


def test_untrusted_sklearn_types_must_be_named(tmp_path: Path, tiny_image_dataset: Dataset) -> None:
    pytest.importorskip("skops")
    from sklearn.tree import DecisionTreeClassifier

    labels = tiny_image_dataset.features["label"].names
    pixels = np.stack([np.asarray(image).ravel() / 255 for image in tiny_image_dataset["image"]])
    tree = DecisionTreeClassifier(max_depth=3, random_state=0).fit(pixels, tiny_image_dataset["label"])
    save_sklearn_teacher(tree, tmp_path / "tree", {"kind": "pixels", "mode": "RGB"}, labels)

    with pytest.raises(ValueError, match=r"got \['sklearn.tree._tree.Tree'\].*`trusted_types`"):
        load_teacher(Teacher(str(tmp_path / "tree")), labels)
    trusting = Teacher(str(tmp_path / "tree"), trusted_types=("sklearn.tree._tree.Tree", "something.else"))
    probs = label(load_teacher(trusting, labels), tiny_image_dataset["image"][:5])
    np.testing.assert_allclose(probs, tree.predict_proba(pixels[:5]), atol=1e-6)


def test_save_sklearn_teacher_refuses_what_it_cannot_keep(tmp_path: Path) -> None:
    pytest.importorskip("skops")
    from sklearn.linear_model import LogisticRegression, RidgeClassifier

    data = ([[0.0], [1.0]], [0, 5])
    model = LogisticRegression().fit(*data)
    with pytest.raises(TypeError, match="with `predict_proba`, got RidgeClassifier"):
        save_sklearn_teacher(RidgeClassifier().fit(*data), tmp_path / "ridge", {"kind": "values"}, ["a", "b"])
    with pytest.raises(TypeError, match="or fit it first"):
        save_sklearn_teacher(LogisticRegression(), tmp_path / "unfitted", {"kind": "values"}, ["a", "b"])
    with pytest.raises(ValueError, match=r"must be positions 0..1, got \[5\]"):
        save_sklearn_teacher(model, tmp_path / "five", {"kind": "values"}, ["a", "b"])
    with pytest.raises(ValueError, match=r"`kind` is one of \['pixels', 'values', 'text'\]"):
        save_sklearn_teacher(model, tmp_path / "kind", {"kind": "audio"})
    with pytest.raises(ValueError, match=r"got unknown \['sise'\]"):
        save_sklearn_teacher(model, tmp_path / "key", {"kind": "pixels", "sise": [8, 8]})
    with pytest.raises(ValueError, match=r"`size` of \[height, width\]"):
        save_sklearn_teacher(model, tmp_path / "size", {"kind": "pixels", "size": [8]})
    with pytest.raises(ValueError, match=r"the 1 numbers .* got 3: `size` \[1, 1\] in `mode` 'RGB'. Name those"):
        save_sklearn_teacher(model, tmp_path / "mode", {"kind": "pixels", "size": [1, 1], "mode": "RGB"})
    assert list(tmp_path.iterdir()) == []
    save_sklearn_teacher(model, tmp_path / "good", {"kind": "values"})
    with pytest.raises(FileExistsError, match="must not exist or be empty"):
        save_sklearn_teacher(model, tmp_path / "good", {"kind": "values"})


def test_a_missing_skops_names_its_pip_line(tiny_sklearn: str, tiny_labels: tuple[str, ...], monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "skops", None)
    monkeypatch.setitem(sys.modules, "skops.io", None)
    with pytest.raises(ImportError, match=r'pip install "hf_cosupervise\[sklearn\]"'):
        load_teacher(Teacher(tiny_sklearn), tiny_labels)


# ── answers in a column ─────────────────────────────────────────────────────────────────────────────────────────────


def test_column_answers_in_every_form() -> None:
    labels = ("ant", "bee", "cat")
    read = load_teacher(Teacher("answer", kind="column", label_map={"wasp": "bee"}), labels)

    names = label(read, ["ant", "CAT", "wasp", None, ""])
    ids = label(read, [0, 2, 1, -1, None])
    vectors = label(read, [[1, 0, 0], [0, 0, 1.0], np.array([0, 1, 0]), [0, 0, 0], [None] * 3])

    expected = np.array([[1, 0, 0], [0, 0, 1], [0, 1, 0], [0, 0, 0], [0, 0, 0]], dtype=np.float32)
    for probs in (names, ids, vectors):
        np.testing.assert_array_equal(probs, expected)
    np.testing.assert_allclose(label(read, [[0.25, 0.5, 0.25]]), [[0.25, 0.5, 0.25]])


@pytest.mark.parametrize(
    "value", ["cow", 7, -2, 0.5, True, [0.5, 0.5], [0.5, 0.2, 0.1], [1.5, -0.5, 0.0], [1.0, None, 0.0]]
)
def test_bad_answers_are_named(value: Any) -> None:
    read = load_teacher(Teacher("answer", kind="column"), ("ant", "bee", "cat"))
    with pytest.raises(ValueError) as error:
        label(read, ["ant", value] if isinstance(value, str) else [0, value])
    assert str(error.value).endswith(f"got {value!r}")


# ── which weights these are ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_teacher_retrained_in_place_is_another(tiny_vit: str, tiny_labels: tuple[str, ...], tmp_path: Path) -> None:
    folder = copy_model(tiny_vit, tmp_path / "vit")
    teacher = Teacher(str(folder))
    identity, num_bytes = identify_teacher(teacher)
    facts = load_teacher(teacher, tiny_labels, "cpu").facts
    assert {key: facts[key] for key in identity} == identity and len(identity["weights"]) == 16
    assert num_bytes == (folder / "model.safetensors").stat().st_size
    assert identify_teacher(Teacher(str(copy_model(tiny_vit, tmp_path / "copy"))))[0] == identity

    edit_config(folder, something="new")
    changed = identify_teacher(teacher)[0]["weights"]
    weights = load_file(folder / "model.safetensors")
    save_file({key: value * 2 for key, value in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    assert len({identity["weights"], changed, identify_teacher(teacher)[0]["weights"]}) == 3


def test_answers_in_a_column_have_no_weights() -> None:
    assert identify_teacher(Teacher("answer", kind="column")) == ({}, 0)


def test_a_wrong_column_is_told_from_a_broken_row(tiny_vit: str, tiny_labels: tuple[str, ...]) -> None:
    with pytest.raises(TypeError) as error:
        load_teacher(Teacher(tiny_vit), tiny_labels, "cpu").prepare(["a text"])
    assert type(error.value) is TypeError  # and no `RowError`
    assert str(error.value) == (
        "Teacher 'vit' must be given images or vectors, got str. Name the right column with `input_column`."
    )

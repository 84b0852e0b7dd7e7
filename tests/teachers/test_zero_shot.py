"""Zero-shot teachers against the pipelines of transformers, on tiny models that were trained to do that job."""

from __future__ import annotations

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
from huggingface_hub import hf_hub_download
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2ImageProcessor,
    Siglip2Model,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    pipeline,
)

from hf_cosupervise import (
    PseudolabelPool,
    Teacher,
    TeacherHierarchy,
    build_pool,
    load_hierarchy,
    push_hierarchy,
)
from hf_cosupervise.teachers.kinds.base import TeacherModel
from hf_cosupervise.teachers.kinds.loading import identify_teacher, load_teacher
from hf_cosupervise.teachers.naming import hierarchy_from_names

pytestmark = pytest.mark.core

TOPICS = {"sport": ["goal", "match", "team"], "music": ["song", "guitar", "choir"], "food": ["soup", "bread", "salt"]}
LABELS = tuple(TOPICS)
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220)}
_WORDS = ("this", "example", "is", "about", "a", "photo", "of", "the", ".", "we", "had", "good", "and", "very", "news")

ACROSS = {
    "template": ["a photo of {}.", "{}"],
    "label_texts": {"red": ["red", "very red"], "green": "green", "blue": ["blue"]},
}


def make_tokenizer(words: Sequence[str], ends: str = "[SEP]") -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    vocab = {word: place for place, word in enumerate(("[PAD]", "[UNK]", "[CLS]", ends, *words))}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single=f"[CLS] $A {ends}",
        pair=f"[CLS] $A {ends} $B:1 {ends}:1",
        special_tokens=[("[CLS]", vocab["[CLS]"]), (ends, vocab[ends])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token=ends,
        eos_token=ends,
        model_max_length=24,
    )


def make_texts(num_texts: int, seed: int) -> tuple[list[str], list[int]]:
    rng = np.random.default_rng(seed)
    label_ids = rng.integers(0, len(LABELS), num_texts).tolist()
    texts = [
        " ".join(
            [
                *rng.choice(_WORDS[4:], rng.integers(1, 4)),
                rng.choice(TOPICS[LABELS[label]]),
                *rng.choice(_WORDS[4:], 2),
            ]
        )
        for label in label_ids
    ]
    return texts, label_ids


@pytest.fixture(scope="session")
def nli(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a BERT that has learnt which sentences about topics follow from a text."""
    folder = tmp_path_factory.mktemp("zero_shot") / "nli"
    tokenizer = make_tokenizer([*_WORDS, *LABELS, *(word for words in TOPICS.values() for word in words)])
    names = {0: "Contradiction", 1: "neutral", 2: "ENTAILMENT"}
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.1,
        max_position_embeddings=24,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=names,
        label2id={name: place for place, name in names.items()},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertForSequenceClassification(config)
        embeddings = model.bert.embeddings.word_embeddings.weight.data
        for topic, words in TOPICS.items():  # as pretraining would: what a word is about is known
            embeddings[tokenizer.convert_tokens_to_ids([topic, *words])] = 2 * torch.randn(32)
        asked = [(text, topic, LABELS[label]) for text, label in zip(*make_texts(36, seed=0)) for topic in LABELS]
        sentences = [f"this example is {topic}." for _, topic, _ in asked]
        batch = tokenizer([text for text, _, _ in asked], sentences, padding=True, return_tensors="pt")
        truth = torch.tensor([2 if topic == label else 0 for _, topic, label in asked])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            model(**batch, labels=truth).loss.backward()
            optimizer.step()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_images(num_images: int, seed: int) -> tuple[list[np.ndarray], list[int]]:
    rng = np.random.default_rng(seed)
    label_ids = rng.integers(0, 3, num_images)
    colours = np.array(list(COLOURS.values()))[label_ids][:, None, None]
    images = np.clip(colours + rng.normal(0, 30, (num_images, 8, 8, 3)), 0, 255).astype(np.uint8)
    return list(images), label_ids.tolist()


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a CLIP that has learnt what colours are called."""
    folder = tmp_path_factory.mktemp("zero_shot") / "clip"
    tokenizer = make_tokenizer([*_WORDS, *COLOURS], ends="[EOS]")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 24, "eos_token_id": 3, "pad_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vision = {**sizes, "image_size": 8, "patch_size": 4}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
        processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
        images, label_ids = make_images(256, seed=0)
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        captions = tokenizer([f"a photo of {name}." for name in COLOURS], return_tensors="pt")
        captions = {key: captions[key] for key in ("input_ids", "attention_mask")}
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step in range(60):
            rows = slice(32 * (step % 8), 32 * (step % 8) + 32)
            logits = model(pixel_values=pixels[rows], **captions).logits_per_image
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits, torch.tensor(label_ids[rows])).backward()
            optimizer.step()
    model.eval().save_pretrained(folder)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def save_siglip(folder: Path, is_second: bool) -> str:
    tokenizer = make_tokenizer(["a", "r", "g", "b", "photo"], ends="[EOS]")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 12, "projection_size": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if is_second:
            vision = {**sizes, "patch_size": 4, "num_patches": 4}
            model = Siglip2Model(Siglip2Config(text_config=text, vision_config=vision))
            Siglip2ImageProcessor(patch_size=4, max_num_patches=4).save_pretrained(folder)
        else:
            vision = {**sizes, "image_size": 8, "patch_size": 4}
            model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
            SiglipImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
        for weights in model.parameters():
            torch.nn.init.normal_(weights, std=0.5)
        model.logit_scale.data.fill_(4.0)
    model.save_pretrained(folder)
    tokenizer.model_input_names = ["input_ids"]
    tokenizer.save_pretrained(folder)
    return str(folder)


def label(teacher: TeacherModel, cells: Sequence[Any]) -> np.ndarray:
    probs = teacher(teacher.prepare(cells))
    assert isinstance(probs, np.ndarray)
    return probs


def edit_config(folder: str, target: Path, **changes: Any) -> str:
    shutil.copytree(folder, target)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(target)


def in_order(scores: Any, labels: Sequence[str]) -> list[float]:
    if isinstance(scores, dict):
        return [dict(zip(scores["labels"], scores["scores"]))[name] for name in labels]
    return [{item["label"]: item["score"] for item in scores}[name] for name in labels]


# ── NLI ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_nli_labels_as_the_pipeline_does(nli):
    texts, label_ids = make_texts(40, seed=1)
    asks = pipeline("zero-shot-classification", nli, device="cpu")
    expected = [
        in_order(asks(text, list(LABELS), hypothesis_template="This example is {}."), LABELS) for text in texts
    ]

    probs = label(load_teacher(Teacher(nli, kind="zero_shot"), LABELS, "cpu"), texts)

    np.testing.assert_allclose(probs, expected, atol=1e-5)
    assert np.mean(probs.argmax(axis=1) == label_ids) > 0.9  # it was trained to do that job


def test_nli_teacher_in_a_pool(nli, capsys):
    data = Dataset.from_dict({"text": ["we had a good match", "the choir and the news", "very good soup"]})
    teacher = Teacher(
        nli, kind="zero_shot", label_texts={"sport": "sport", "music": "music", "food": ["food", "food."]}
    )
    pool = build_pool(data, TeacherHierarchy(LABELS, [teacher]), disable_tqdm=True)
    print([LABELS[label] for label in pool.hard_labels("nli")], pool.facts["nli"]["kind"])
    assert capsys.readouterr().out == "['sport', 'music', 'food'] zero_shot\n"


def test_several_texts_of_a_label_are_averaged(nli):
    texts, _ = make_texts(6, seed=2)
    asked = {"sport": ["sport", "a match"], "music": ["music"], "food": ["food", "good food", "salt"]}
    teacher = Teacher(nli, kind="zero_shot", label_texts=asked, options={"template": "this is about {}"})
    tokenizer, model = AutoTokenizer.from_pretrained(nli), BertForSequenceClassification.from_pretrained(nli).eval()
    expected = []
    for text in texts:
        means = []
        for some in asked.values():
            pairs = tokenizer(
                [text] * len(some), [f"this is about {item}" for item in some], padding=True, return_tensors="pt"
            )
            with torch.no_grad():
                means.append(model(**pairs).logits[:, 2].mean())
        expected.append(torch.softmax(torch.stack(means), 0).tolist())
    np.testing.assert_allclose(label(load_teacher(teacher, LABELS, "cpu"), texts), expected, atol=1e-5)


def test_the_prior_is_what_an_empty_text_gets(nli):
    texts, _ = make_texts(8, seed=3)
    plain, corrected = (
        load_teacher(Teacher(nli, kind="zero_shot", options={"correct_prior": value}), LABELS, "cpu")
        for value in (False, True)
    )
    quotient = label(plain, texts) / label(plain, [""])
    np.testing.assert_allclose(label(corrected, texts), quotient / quotient.sum(axis=1, keepdims=True), atol=1e-5)
    np.testing.assert_allclose(label(corrected, [""]), 1 / 3, atol=1e-6)


def test_a_specialist_is_asked_of_its_scope_only(nli):
    texts, _ = make_texts(8, seed=3)
    probs = label(load_teacher(Teacher(nli, kind="zero_shot", scope=["food", "sport"]), LABELS, "cpu"), texts)
    assert (probs[:, 1] == 0).all()
    expected = label(load_teacher(Teacher(nli, kind="zero_shot"), LABELS, "cpu"), texts)[:, [0, 2]]
    np.testing.assert_allclose(probs[:, [0, 2]], expected / expected.sum(axis=1, keepdims=True), atol=1e-5)


def test_a_long_text_is_cut_and_the_sentence_stays(nli):
    teacher = load_teacher(Teacher(nli, kind="zero_shot"), LABELS, "cpu")
    probs = label(teacher, ["good " * 50 + "soup", "the soup"])
    assert probs.shape == (2, 3) and np.isfinite(probs).all()
    with pytest.raises(
        ValueError, match="Texts of labels of teacher 'nli' must have at most 12 tokens, got 13 in 'good "
    ):
        load_teacher(Teacher(nli, kind="zero_shot", options={"template": "good " * 10 + "{}"}), LABELS, "cpu")


# ── images beside texts ─────────────────────────────────────────────────────────────────────────────────────────────


def test_clip_labels_as_the_pipeline_does(clip):
    images, label_ids = make_images(30, seed=1)
    from PIL import Image

    asks = pipeline("zero-shot-image-classification", clip, device="cpu")
    names = list(COLOURS)
    pictures = [Image.fromarray(image) for image in images]
    found = asks(pictures, candidate_labels=names, hypothesis_template="This is a photo of {}.")

    probs = label(load_teacher(Teacher(clip), names, "cpu"), images)

    np.testing.assert_allclose(probs, [in_order(scores, names) for scores in found], atol=1e-5)
    assert np.mean(probs.argmax(axis=1) == label_ids) > 0.9


def test_clip_teacher_in_a_pool(clip, capsys):
    images, label_ids = make_images(4, seed=5)
    captions = {name: [f"a photo of {name}", f"very {name}"] for name in COLOURS}
    hierarchy = TeacherHierarchy(list(COLOURS), [Teacher(clip, label_texts=captions)])
    pool = build_pool(Dataset.from_dict({"image": images}), hierarchy, input_column="image", disable_tqdm=True)
    print([hierarchy.labels[label] for label in pool.hard_labels("clip")], pool.facts["clip"]["class"])
    assert capsys.readouterr().out == f"{[list(COLOURS)[label] for label in label_ids]} CLIPModel\n"


def dual_logits(
    folder: str, images: Sequence[np.ndarray], captions: Sequence[Sequence[str]], full: bool
) -> torch.Tensor:
    """The slow version: every text beside every image, features averaged by hand."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    pixels = AutoImageProcessor.from_pretrained(folder)(list(images), return_tensors="pt")
    means = []
    with torch.no_grad():
        for some in captions:
            padding = {"padding": "max_length", "max_length": 12} if full else {}
            each = [tokenizer(caption, return_tensors="pt", **padding)["input_ids"] for caption in some]
            rows = [model.get_text_features(input_ids=ids).pooler_output[0] for ids in each]
            mean = torch.stack([row / row.norm() for row in rows]).mean(0)
            means.append(mean / mean.norm())
        features = model.get_image_features(**pixels).pooler_output
        features = features / features.norm(dim=1, keepdim=True)
        return features @ torch.stack(means).T * model.logit_scale.exp()


def test_texts_of_a_label_are_averaged_over_templates(clip):
    images, _ = make_images(5, seed=2)
    options = {"template": ACROSS["template"]}
    teacher = load_teacher(Teacher(clip, options=options, label_texts=ACROSS["label_texts"]), list(COLOURS), "cpu")
    captions = [
        ["a photo of red.", "a photo of very red.", "red", "very red"],
        ["a photo of green.", "green"],
        ["a photo of blue.", "blue"],
    ]
    expected = dual_logits(clip, images, captions, full=False).softmax(-1)
    np.testing.assert_allclose(label(teacher, images), expected, atol=1e-5)


@pytest.mark.parametrize("is_second", [False, True])
def test_siglip_is_given_texts_at_full_length(tmp_path, is_second):
    images, _ = make_images(5, seed=2)
    folder = save_siglip(tmp_path / "siglip", is_second)
    # Letters, since the tokenizer of the second kind reads no whole words that it was not trained on.
    captions = [["r"], ["g"], ["b"]]
    teacher = Teacher(folder, label_texts={name: name[0].upper() for name in COLOURS})
    loaded = load_teacher(teacher, list(COLOURS), "cpu")
    expected = dual_logits(folder, images, captions, full=True).softmax(-1)
    np.testing.assert_allclose(label(loaded, images), expected, atol=1e-5)
    assert loaded.facts["kind"] == "zero_shot" and expected.std() > 0.001


def test_mixed_precision_ends_before_similarities(clip, monkeypatch):
    images, _ = make_images(5, seed=2)
    teacher: Any = load_teacher(Teacher(clip), list(COLOURS), "cpu")
    expected = label(teacher, images)
    features = teacher.model.get_image_features(**teacher.prepare(images)).pooler_output.detach()
    # What the encoder gives is the same here, so that nothing but the products could differ.
    monkeypatch.setattr(teacher.model, "get_image_features", lambda **inputs: features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        np.testing.assert_allclose(label(teacher, images), expected, atol=1e-5)


def test_clip_is_corrected_by_a_grey_image(clip):
    images, _ = make_images(5, seed=2)
    plain, corrected = (
        load_teacher(Teacher(clip, options={"correct_prior": value}), list(COLOURS), "cpu") for value in (False, True)
    )
    quotient = label(plain, images) / label(plain, [np.full((224, 224, 3), 127, dtype=np.uint8)])
    np.testing.assert_allclose(label(corrected, images), quotient / quotient.sum(axis=1, keepdims=True), atol=1e-5)


# ── files, versions, the Hub ────────────────────────────────────────────────────────────────────────────────────────


def read_folder(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_by_id_as_from_the_folder(hub: HubServer, nli, clip):
    images, _ = make_images(5, seed=2)
    texts, _ = make_texts(5, seed=2)
    for name, folder, kind, cells, labels in [
        ("org/nli", nli, "zero_shot", texts, LABELS),
        ("org/clip", clip, "auto", images, tuple(COLOURS)),
    ]:
        commit = hub.create(name, read_folder(folder))
        here, there = (load_teacher(Teacher(model, kind=kind), labels, "cpu") for model in (folder, name))
        np.testing.assert_array_equal(label(there, cells), label(here, cells))
        assert there.facts["commit"] == commit and there.facts["kind"] == "zero_shot"


def test_other_texts_are_other_answers(nli, tmp_path):
    texts, _ = make_texts(5, seed=2)
    data = Dataset.from_dict({"text": texts})

    def run(label_texts: Any, **options: Any) -> PseudolabelPool:
        teacher = Teacher(nli, kind="zero_shot", label_texts=label_texts)
        return build_pool(data, TeacherHierarchy(LABELS, [teacher]), disable_tqdm=True, **options)

    first = {"sport": "sport", "music": "music", "food": "food"}
    pool = run(first, output_dir=tmp_path / "pool")
    loaded = PseudolabelPool.load(tmp_path / "pool")
    assert loaded.hierarchy == pool.hierarchy and loaded.hierarchy.teachers[0].label_texts["food"] == ("food",)
    np.testing.assert_array_equal(run(first, reuse=loaded).decode("nli"), pool.decode("nli"))
    other = run(first | {"food": "soup"}, reuse=loaded)
    assert not np.array_equal(other.decode("nli"), pool.decode("nli"))
    assert other.facts["nli"]["asked"] != pool.facts["nli"]["asked"]


def test_a_hierarchy_file_says_how_to_ask(nli, tmp_path):
    (tmp_path / "hierarchy.yaml").write_text(
        f"labels: [sport, music, food]\nteachers:\n- model: {nli}\n  kind: zero_shot\n"
        "  label_texts: {sport: sport, music: [music, a song], food: food}\n"
        "  options: {template: 'this is about {}', correct_prior: true}\n"
    )
    hierarchy = TeacherHierarchy.load(tmp_path / "hierarchy.yaml")
    [teacher] = hierarchy.teachers
    assert teacher.options["template"] == "this is about {}" and teacher.label_texts["music"] == ("music", "a song")
    hierarchy.save(tmp_path / "again.json")
    assert TeacherHierarchy.load(tmp_path / "again.json") == hierarchy
    assert load_teacher(teacher, hierarchy.labels, "cpu").facts["kind"] == "zero_shot"


# ── what does not fit ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"label_texts": {"sport": "a", "music": "a", "food": "b"}}, ValueError, "each be given once, got .'a'. more"),
        ({"label_texts": {"sport": ["a", "a "], "music": "c"}}, ValueError, "each be given once, got .'a'. more"),
        ({"label_texts": {"sport": "", "music": "c"}}, ValueError, "a text, got an empty one for 'sport'"),
        ({"label_texts": {"sport": []}}, ValueError, "a text, got an empty one for 'sport'"),
        ({"label_texts": {"sport": 3}}, TypeError, "`label_texts` of teacher 'nli' must be a list of names, got 3"),
        ({"label_texts": ["sport"]}, TypeError, "must give each label its text or texts, got list"),
        ({"label_texts": {"sports": "a"}}, ValueError, "must be of labels of the task, got unknown .'sports'"),
        ({"label_texts": {"sport": "a"}}, ValueError, "of all of its labels .* got none for .'music', 'food'"),
        ({"scope": ["food"]}, ValueError, "must choose between at least two labels, got .'food'"),
        ({"options": {"template": "about"}}, ValueError, r"must have one slot '\{\}' .* got 'about'"),
        ({"options": {"template": "{} or {}"}}, ValueError, r"must have one slot '\{\}'"),
        ({"options": {"template": ["{}", "{0.x}"]}}, ValueError, r"must have one slot .* got '\{0.x\}'"),
        ({"options": {"template": 3}}, ValueError, "must be a text or a list of texts, got 3"),
        ({"options": {"templates": "{}"}}, ValueError, "kind 'zero_shot' must be among .* got unknown .'templates'"),
        ({"options": {"correct_prior": "yes"}}, ValueError, r"`correct_prior` .* one of \[False, True\], got 'yes'"),
        ({"options": {"entailment": "yes"}}, ValueError, "the one called 'yes' by the option `entailment`, got"),
        ({"options": {"template": {"a", "b"}}}, TypeError, "`options` of teacher 'nli' must be plain values"),
        ({"options": {"x": float("nan")}}, TypeError, "must be plain values .* got nan"),
        ({"options": ["template"]}, TypeError, "must be a mapping of settings of its kind, got list"),
        ({"label_map": {"sports": "sport"}}, ValueError, "`label_map` .* must start from its own labels"),
    ],
)
def test_what_cannot_be_asked(nli, fields, error, message):
    with pytest.raises(error, match=message):
        hierarchy = TeacherHierarchy(LABELS, [Teacher(nli, kind="zero_shot", **fields)])
        load_teacher(hierarchy.teachers[0], LABELS, "cpu")


def test_options_are_checked_before_anything_runs(nli):
    with pytest.raises(ValueError, match="must be among .* got unknown .'templte'"):
        identify_teacher(Teacher(nli, kind="zero_shot", options={"templte": "{}"}))
    with pytest.raises(
        ValueError, match="of labels to have `label_texts`, got kind 'transformers'.*of .'zero_shot', 'prompted', 'pro"
    ):
        identify_teacher(Teacher(nli, label_texts={"a": "b"}))
    message = (
        r"kind 'transformers' must be among \[\], got unknown .*name a `kind` that knows them, of \['zero_shot', 'pro"
    )
    with pytest.raises(ValueError, match=message):
        identify_teacher(Teacher(nli, options={"template": "{}"}))
    with pytest.raises(ValueError, match="NLI. for labels of the task by `kind='zero_shot'`"):
        load_teacher(Teacher(nli), LABELS, "cpu")
    with pytest.raises(ValueError, match=r"of \['prompted'\]"):
        identify_teacher(Teacher(nli, options={"template": "{{ text }}", "chat": True}))


def test_a_model_without_entailment_says_what_was_looked_for(tiny_bert, nli, tmp_path):
    with pytest.raises(ValueError, match="one label of entailment, one whose name begins with 'entail' .*got .'ant'"):
        load_teacher(Teacher(tiny_bert, kind="zero_shot"), LABELS, "cpu")
    placeholders = edit_config(
        nli, tmp_path / "silent", id2label={"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}, label2id={}
    )
    with pytest.raises(ValueError, match=r"got \['LABEL_0', 'LABEL_1', 'LABEL_2'\]. Name its label by `options="):
        load_teacher(Teacher(placeholders, kind="zero_shot"), LABELS, "cpu")
    named = Teacher(placeholders, kind="zero_shot", options={"entailment": "LABEL_2"})
    texts, _ = make_texts(4, seed=0)
    expected = label(load_teacher(Teacher(nli, kind="zero_shot"), LABELS, "cpu"), texts)
    np.testing.assert_array_equal(label(load_teacher(named, LABELS, "cpu"), texts), expected)
    two = edit_config(
        nli, tmp_path / "two", id2label={"0": "entailment", "1": "not_entailment", "2": "Entails"}, label2id={}
    )
    with pytest.raises(ValueError, match="with one label of entailment"):
        load_teacher(Teacher(two, kind="zero_shot"), LABELS, "cpu")


def test_classifiers_of_images_and_models_without_texts_are_refused(tiny_vit, clip, tmp_path, tiny_labels):
    with pytest.raises(ValueError, match="kind 'zero_shot' must be an NLI classifier .* got a classifier of images"):
        load_teacher(Teacher(tiny_vit, kind="zero_shot"), tiny_labels, "cpu")
    with pytest.raises(ValueError, match="`entailment` of teacher 'clip' is for NLI classifiers"):
        load_teacher(Teacher(clip, options={"entailment": "yes"}), list(COLOURS), "cpu")
    with pytest.raises(ValueError, match="must have at most 24 tokens, got 32 in 'a a a"):
        load_teacher(Teacher(clip, options={"template": "a " * 29 + "{}"}), list(COLOURS), "cpu")
    short = edit_config(clip, tmp_path / "clip")
    (tmp_path / "clip" / "tokenizer.json").unlink()
    (tmp_path / "clip" / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="Teacher 'clip' must come with"):
        load_teacher(Teacher(short), list(COLOURS), "cpu")


def test_texts_for_images_and_images_for_texts_are_told(nli, clip):
    with pytest.raises(TypeError, match="Teacher 'nli' must be given texts, got ndarray"):
        load_teacher(Teacher(nli, kind="zero_shot"), LABELS, "cpu").prepare(make_images(1, 0)[0])
    with pytest.raises(TypeError, match="Teacher 'clip' must be given images or vectors, got str"):
        load_teacher(Teacher(clip), list(COLOURS), "cpu").prepare(["red"])


def test_a_model_of_images_and_texts_without_scale_is_refused(nli, tmp_path):
    from transformers import AlignConfig, AlignModel

    text = {"vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {
        **{"image_size": 16, "in_channels": [8], "out_channels": [8], "depthwise_padding": [], "strides": [1]},
        **{"kernel_sizes": [3], "num_block_repeats": [1], "expand_ratios": [1], "width_coefficient": 0.25},
        **{"hidden_dim": 8, "depth_coefficient": 1.0},
    }
    config = AlignConfig(text_config={**text, "intermediate_size": 8}, vision_config=vision, projection_dim=8)
    AlignModel(config).save_pretrained(tmp_path / "align")
    with pytest.raises(ValueError, match="such as CLIP or SigLIP, got AlignModel without `logit_scale`. Use another"):
        load_teacher(Teacher(str(tmp_path / "align")), LABELS, "cpu")


def test_weights_that_are_missing_are_no_teacher(clip, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = edit_config(clip, tmp_path / "clip")
    weights = load_file(Path(folder, "model.safetensors"))
    del weights["text_projection.weight"]
    save_file(weights, Path(folder, "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(ValueError, match="never a silently random teacher.*text_projection"):
        load_teacher(Teacher(folder), list(COLOURS), "cpu")


# ── the same as pipelines, given as objects ─────────────────────────────────────────────────────────────────────────


def test_zero_shot_pipelines_label_as_their_models(nli, clip):
    texts, _ = make_texts(5, seed=4)
    images, _ = make_images(5, seed=4)
    asked = {"sport": "a match", "music": "music", "food": "food"}
    colours = {name: f"very {name}" for name in COLOURS}
    for task, folder, fields, cells in [
        ("zero-shot-classification", nli, {"label_texts": asked}, texts),
        ("zero-shot-image-classification", clip, {"label_texts": colours}, images),
    ]:
        labels, options = list(fields["label_texts"]), {"template": "this is about {}"}
        model = load_teacher(Teacher(folder, kind="zero_shot", options=options, **fields), labels, "cpu")
        pipe = pipeline(task, folder, device="cpu")
        same = load_teacher(Teacher(pipe, options=options, **fields), labels)
        np.testing.assert_allclose(label(same, cells), label(model, cells), atol=1e-5)
        several = {**fields["label_texts"], labels[0]: ["one", "two"]}
        with pytest.raises(
            ValueError, match=f"asks its pipeline of one text for each label, got several for '{labels[0]}'"
        ):
            load_teacher(Teacher(pipe, label_texts=several), labels)
        with pytest.raises(ValueError, match="`template` of teacher .* must have one slot"):
            load_teacher(Teacher(pipe, options={"template": "{} {0.x}"}, **fields), labels)


def test_cards_name_functions_and_what_a_teacher_is_told(hub: HubServer, nli, tmp_path):
    def loud(row: dict[str, Any]) -> str | None:
        return "sport" if "goal" in row["text"] else None

    texts = {"sport": ["sport", "a match | a game"], "music": ["music"], "food": ["food"]}
    asked = Teacher(nli, kind="zero_shot", label_texts=texts, options={"template": "this is about {}"})
    hierarchy = TeacherHierarchy(LABELS, [loud, asked])
    pool = build_pool(Dataset.from_dict({"text": make_texts(5, seed=2)[0]}), hierarchy, disable_tqdm=True)
    pool.push_to_hub("someone/pool")
    push_hierarchy(hierarchy, "someone/teachers")
    for repo, kind in (("someone/pool", "dataset"), ("someone/teachers", "model")):
        card = Path(hf_hub_download(repo, "README.md", repo_type=kind)).read_text(encoding="utf-8")
        assert "this is about {}" in card and r"a match \| a game" in card and str(Path(nli).parent) not in card
        assert repo != "someone/pool" or "function `loud`" in card
    loaded = load_hierarchy("someone/teachers")
    assert loaded.teachers[0] == hierarchy.teachers[0] and loaded.teachers[1].options == asked.options
    again = build_pool(Dataset.from_dict({"text": ["the team"]}), loaded, models={"loud": loud}, disable_tqdm=True)
    assert again.answered("nli").all() and not again.answered("loud").any()


def test_labels_of_teachers_that_are_told_them(nli):
    data = Dataset.from_dict({"text": ["the team"]})
    texts = {"sport": "a match", "food": "food"}
    named = hierarchy_from_names([{"model": nli, "kind": "zero_shot", "label_texts": texts}], data)
    assert named.labels == ("sport", "food")
    with pytest.raises(
        ValueError, match="must be known to a teacher that is told them, got none for 'nli'. Give them by"
    ):
        hierarchy_from_names([{"model": nli, "kind": "zero_shot"}], data)

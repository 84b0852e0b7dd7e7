"""The Hub side as a critical user and an unlucky network see it: faults at every request, odd names, odd contents."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import HF_HOME, TINY_LABELS, save_tiny_vit
from datasets import Dataset, Image
from hub_server import WRITE_TOKEN, HubServer
from huggingface_hub import HfApi, _tree_cache
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from test_hub_students import BACKBONE, STUDENT, logits_of, plain_logits, trained
from test_hub_teachers import read_folder
from test_trainer import LABELS, make_pool
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2Tokenizer,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaTokenizer,
)

from hf_cosupervise import PseudolabelPool, Teacher, TeacherHierarchy, build_pool, load_hierarchy, load_student
from hf_cosupervise.hub.client import UNREACHABLE
from hf_cosupervise.students.publishing import push_student
from hf_cosupervise.teachers.hub import push_hierarchy
from hf_cosupervise.teachers.kinds.loading import load_teacher

POOL, TEACHERS = "someone/pool", "someone/teachers"


def empty_cache() -> None:
    """As on a machine that has downloaded nothing."""
    shutil.rmtree(HF_HOME / "hub", ignore_errors=True)
    _tree_cache._IN_MEMORY_TREE_CACHE.clear()


def assert_no_leak(hub: HubServer, repo_id: str, *secrets: object, repo_type: str = "model") -> None:
    for name, content in hub.files(repo_id, repo_type=repo_type).items():
        for secret in (*secrets, HF_HOME, WRITE_TOKEN):
            assert str(secret).encode() not in content, (name, secret)


# ── faults at every request ─────────────────────────────────────────────────────────────────────────────────────────


def strike_everywhere(
    hub: HubServer, prepare: Callable[[], None], act: Callable[[], Any], state: Callable[[], Any], done: Any
) -> None:
    """Let each request of `act` fail for good, one after another, and then all of it succeed."""
    prepare()
    before = state()
    hub.requests.clear()
    act()
    asked = [f"{request.method} {request.path}" for request in hub.requests]
    assert state() == done
    for number, request in enumerate(asked):
        prepare()
        hub.fault(".", ("drop", 500, "cut", 404)[number % 4], times=40, after=number)
        try:
            act()
        except (ValueError, EntryNotFoundError, *UNREACHABLE) as error:
            assert "someone/" in "".join([str(error), *getattr(error, "__notes__", [])]), (request, error)
            assert state() in (before, done), (request, error)
        hub.clear_faults()
        act()
        assert state() == done, request


def test_a_student_is_pushed_whole_whatever_fails(hub, tmp_path, tiny_vit, tiny_image_dataset):
    trainer = trained(tmp_path, tiny_image_dataset, tiny_vit)

    def prepare() -> None:
        hub.reset()
        empty_cache()
        trainer.hub_model_id = None
        hub.create(STUDENT, {"README.md": b"# Mine\n", "model.safetensors": b"old"})

    def state() -> list[bytes]:
        files = hub.files(STUDENT)
        return [files["model.safetensors"], files.get("config.json", b""), files["README.md"][-80:]]

    prepare()
    trainer.push_to_hub()
    strike_everywhere(hub, prepare, trainer.push_to_hub, state, state())


def test_a_pool_is_pushed_whole_whatever_fails(hub, tiny_image_dataset):
    pool, old = (make_pool(tiny_image_dataset, seed=seed) for seed in (0, 3))

    def prepare() -> None:
        hub.reset()
        empty_cache()
        old.push_to_hub(POOL)

    def push() -> None:
        pool.push_to_hub(POOL)

    prepare()
    push()
    done = hub.files(POOL, repo_type="dataset")
    strike_everywhere(hub, prepare, push, lambda: hub.files(POOL, repo_type="dataset"), done)


def test_teachers_are_fetched_whatever_fails(hub, tiny_vit, tiny_sklearn):
    teachers = [Teacher(tiny_vit, name="all"), Teacher(tiny_sklearn, level=1, name="pixels")]
    push_hierarchy(TeacherHierarchy(TINY_LABELS, teachers), TEACHERS, replace=True)

    def fetch() -> None:
        for teacher in load_hierarchy(TEACHERS).teachers:
            load_teacher(teacher, TINY_LABELS)

    strike_everywhere(hub, empty_cache, fetch, lambda: None, None)


def test_the_cache_may_vanish_between_all_steps(hub, tmp_path, tiny_vit, tiny_image_dataset):
    hub.create(BACKBONE, read_folder(tiny_vit))
    make_pool(tiny_image_dataset).push_to_hub(POOL)
    pool = PseudolabelPool.load(POOL)
    empty_cache()
    trainer = trained(tmp_path, tiny_image_dataset)
    empty_cache()
    trainer.push_to_hub()
    assert pool.push_to_hub(POOL).oid == pool.commit
    pool.push_to_hub("someone/copy")
    assert hub.files("someone/copy", repo_type="dataset").keys() == hub.files(POOL, repo_type="dataset").keys()


# ── names and revisions ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("repo_id", ["Some-One/My.Model_v1.0", "someone/UPPER_case", "tinyvit"])
def test_unusual_ids_are_legal(hub, tiny_vit, repo_id):
    hub.create(repo_id, read_folder(tiny_vit))
    assert load_student(repo_id, LABELS)[0].config._name_or_path == repo_id


@pytest.mark.parametrize("repo_id", ["org/a--b", "someone/a..b", "someone/.x", "someone/x.git", "a b", "x" * 97])
def test_impossible_ids_are_refused_without_a_request(hub, repo_id):
    for load in (lambda: load_student(repo_id, LABELS), lambda: load_hierarchy(repo_id)):
        with pytest.raises(ValueError, match=rf"needs the model '{re.escape(repo_id)}'. Check the id"):
            load()
    assert not hub.requests


def test_revisions_with_a_slash_and_revisions_that_are_none(hub, tiny_vit, tiny_image_dataset):
    commit = hub.create(BACKBONE, read_folder(tiny_vit), branch="feature/x")
    HfApi().create_tag(BACKBONE, tag="v1.0/rc", revision="feature/x")
    for revision in ("feature/x", "v1.0/rc", commit):
        assert load_student(BACKBONE, LABELS, revision=revision)[0].config.num_labels == 4
    for revision in (commit[:7], commit[:39], commit.upper(), "f" * 40, " feature/x", "feature"):
        with pytest.raises(RevisionNotFoundError, match=f"at '{revision}'. Correct the revision"):
            load_student(BACKBONE, LABELS, revision=revision)
    pool = make_pool(tiny_image_dataset)
    pushed = pool.push_to_hub(POOL, revision="feature/y")
    assert PseudolabelPool.load(POOL, revision="feature/y").commit == pushed.oid
    push_hierarchy(TeacherHierarchy(TINY_LABELS, [Teacher(tiny_vit, name="all")]), TEACHERS, revision="feature/z")
    [teacher] = load_hierarchy(TEACHERS, revision="feature/z").teachers
    assert teacher.revision == hub.commits(TEACHERS, revision="feature/z")[0].oid
    with pytest.raises(FileNotFoundError, match="must be a repository with a 'hierarchy.yaml'"):
        load_hierarchy(TEACHERS)


def test_a_repository_that_is_deleted_or_renamed_before_the_push(hub, tmp_path, tiny_vit, tiny_image_dataset):
    trainer = trained(tmp_path, tiny_image_dataset, tiny_vit, push_to_hub=True)
    HfApi().delete_repo(STUDENT)
    with pytest.raises(RepositoryNotFoundError, match=f"The student is pushed to the model '{STUDENT}'"):
        trainer.push_to_hub()
    trainer.init_hf_repo()
    hub.rename(STUDENT, "someone/renamed")
    trainer.push_to_hub()
    assert hub.files("someone/renamed")["model.safetensors"] == (tmp_path / "model.safetensors").read_bytes()


def test_pushes_in_the_background_keep_their_order(hub, tmp_path, tiny_vit, tiny_image_dataset):
    trainer = trained(tmp_path, tiny_image_dataset, tiny_vit)
    futures = []
    for _ in range(2):
        trainer.model.classifier.weight.data += 1
        futures.append(trainer.push_to_hub(blocking=False))
        futures[-1].result()
    assert [commit.oid for commit in hub.commits(STUDENT)][:2] == [future.result().oid for future in futures[::-1]]
    assert hub.files(STUDENT)["model.safetensors"] == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("card", [b"", b"# Mine\n", b"\xef\xbb\xbf---\nlicense: mit\n---\n# T\n"])
def test_any_card_may_be_there_already(hub, tmp_path, tiny_vit, tiny_image_dataset, card):
    hub.create(STUDENT, {"README.md": card})
    trained(tmp_path, tiny_image_dataset, tiny_vit).push_to_hub()
    text = hub.files(STUDENT)["README.md"].decode()
    assert "co-supervised-learning" in text and (f'model="{STUDENT}"' in text) == (card == b"")
    assert ("license: mit" in text) == (b"mit" in card) and text.endswith(card.split(b"---\n")[-1].decode())


# ── models ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def save_text_model(folder: Path, kind: str) -> str:
    """A text classifier with the tokenizer of its kind; GPT-2 with a chat template and a generation configuration."""
    words = ("six", "legs", "hums", "stings", "purrs", "sleeps", "barks", "fetches", "the", "animal", "often")
    characters = [*sorted(set("".join(words))), "Ġ"]
    labels = {"id2label": dict(enumerate(TINY_LABELS)), "label2id": {name: i for i, name in enumerate(TINY_LABELS)}}
    torch.manual_seed(0)
    if kind == "distilbert":
        vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
        tokenizer: Any = DistilBertTokenizer(vocab=vocab, model_max_length=32)
        sizes: dict[str, Any] = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}
        model: Any = DistilBertForSequenceClassification(
            DistilBertConfig(vocab_size=len(vocab), max_position_embeddings=32, **sizes, **labels)
        )
    elif kind == "roberta":
        vocab = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *characters])}
        tokenizer = RobertaTokenizer(vocab=vocab, merges=[], model_max_length=200)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        model = RobertaForSequenceClassification(
            RobertaConfig(vocab_size=len(vocab), max_position_embeddings=202, pad_token_id=1, **sizes, **labels)
        )
    else:
        vocab = {word: i for i, word in enumerate(["<|endoftext|>", *characters])}
        tokenizer = GPT2Tokenizer(vocab=vocab, merges=[], model_max_length=200, pad_token="<|endoftext|>")
        tokenizer.chat_template = "{{ messages }}"
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 200, "pad_token_id": 0}
        model = GPT2ForSequenceClassification(
            GPT2Config(vocab_size=len(vocab), bos_token_id=0, eos_token_id=0, **sizes, **labels)
        )
        model.generation_config = GenerationConfig(max_length=20)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("kind", "training"), [("distilbert", "lora"), ("roberta", "full"), ("gpt2", "probe")])
def test_tokenizers_of_all_kinds_come_back(hub, tmp_path, tiny_text_dataset, kind, training):
    hub.create(BACKBONE, read_folder(save_text_model(tmp_path / "start", kind)))
    trainer = trained(tmp_path / "out", tiny_text_dataset, student_training=training)
    trainer.push_to_hub()
    here = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    published = set(hub.files(STUDENT)) - {".gitattributes", "history.json"}
    assert published == {name for name in here if not name.startswith("_run/")}
    assert_no_leak(hub, STUDENT, tmp_path)
    expected = logits_of(trainer, tiny_text_dataset)
    shutil.rmtree(tmp_path / "start")
    shutil.rmtree(tmp_path / "out")
    empty_cache()
    model, tokenizer = (auto.from_pretrained(STUDENT) for auto in (AutoModelForSequenceClassification, AutoTokenizer))
    np.testing.assert_allclose(plain_logits(model, tokenizer, tiny_text_dataset), expected, atol=1e-5)
    assert tokenizer.chat_template == trainer.processing_class.chat_template


def test_weights_in_several_files(hub, tmp_path, tiny_vit, tiny_image_dataset):
    model = AutoModelForImageClassification.from_pretrained(tiny_vit)
    model.save_pretrained(tmp_path / "parts", max_shard_size="5KB")
    shutil.copy(Path(tiny_vit, "preprocessor_config.json"), tmp_path / "parts")
    parts = read_folder(tmp_path / "parts")
    assert sum(name.endswith(".safetensors") for name in parts) > 1
    hub.create(BACKBONE, parts)
    trainer = trained(tmp_path / "out", tiny_image_dataset)
    assert torch.equal(trainer.model.vit.embeddings.cls_token, model.vit.embeddings.cls_token)
    push_hierarchy(TeacherHierarchy(TINY_LABELS, [Teacher(str(tmp_path / "parts"), name="all")]), TEACHERS)
    assert {name for name in hub.files(TEACHERS) if name.startswith("all/")} == {f"all/{name}" for name in parts}
    # A student in one file takes the place of one in several, and the other way round.
    trainer.push_to_hub()
    push_student(tmp_path / "parts", STUDENT)
    assert set(hub.files(STUDENT)) == {".gitattributes", *parts}
    trainer.push_to_hub()
    assert [name for name in hub.files(STUDENT) if "safetensors" in name] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("key", "message"),
    # Older versions tell where they read the second; nothing opens it.
    [("vocab_file", "must consist of its own files, got `vocab_file`"), ("tokenizer_file", "must come with ")],
)
def test_a_tokenizer_does_not_read_files_of_this_machine(hub, tmp_path, tiny_bert, key, message):
    files = read_folder(tiny_bert)
    (tmp_path / "mine.json").write_bytes(files.pop("tokenizer.json"))
    settings = json.loads(files["tokenizer_config.json"]) | {key: str(tmp_path / "mine.json")}
    hub.create(BACKBONE, files | {"tokenizer_config.json": json.dumps(settings).encode()})
    with pytest.raises(ValueError, match=message):
        load_student(BACKBONE, LABELS)


# ── pools ───────────────────────────────────────────────────────────────────────────────────────────────────────────

TEXTS = Dataset.from_dict({"text": [f"é x {row}\n'\"" for row in range(12)]})
ODD = ["a | b", "```", "🙂 --> x", "[link](http://x)"]


@pytest.mark.parametrize(
    ("labels", "ids", "names", "changes"),
    [
        (["a", "b"], [f"id/{row} ä" for row in range(12)], ["one"], {"inputs": TEXTS}),
        (["0", "1"], list(range(12)), ["1.0", "a.b_c-D"], {}),
        ([f"class {i:03d}" for i in range(300)], list(range(12)), ["one", "two"], {"inputs": TEXTS, "pool_k": 5}),
        (ODD, list(range(12)), ["none"], {"inputs": TEXTS}),
    ],
    ids=["ids that are text", "names like numbers", "300 labels", "odd labels, no answers"],
)
def test_pools_of_all_kinds_come_back_and_their_snippets_run(hub, labels, ids, names, changes):
    rng = np.random.default_rng(0)
    predictions = {name: rng.dirichlet(np.ones(len(labels)), 12) * (name != "none") for name in names}
    hierarchy = TeacherHierarchy(labels, [Teacher(f"org/{name}") for name in names])
    pool = PseudolabelPool.from_predictions(hierarchy, ids, predictions, **changes)
    pushed = pool.push_to_hub(POOL, tags=["a: b", "no"])
    empty_cache()
    loaded = PseudolabelPool.load(POOL, verify=True)
    assert loaded.ids.tolist() == ids and loaded.labels == tuple(labels)
    for name in names:
        np.testing.assert_array_equal(loaded.label_probs(name), pool.label_probs(name))
    card = hub.files(POOL, repo_type="dataset")["README.md"].decode()
    for snippet in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        with redirect_stdout(StringIO()):
            exec(snippet, {})
    assert loaded.push_to_hub(POOL, tags=["a: b", "no"]).oid == pushed.oid
    some = loaded.select([3, 1])
    some.push_to_hub("someone/some")
    assert PseudolabelPool.load("someone/some").ids.tolist() == [ids[3], ids[1]]


def test_where_images_lay_is_not_published(hub, tmp_path, tiny_image_dataset, tiny_vit):
    folder = tmp_path / "a-private-place"
    folder.mkdir()
    for row, image in enumerate(tiny_image_dataset["image"][:8]):
        image.save(folder / f"{row}.png")
    data = Dataset.from_dict({"image": [str(folder / f"{row}.png") for row in range(8)]}).cast_column("image", Image())
    hierarchy = TeacherHierarchy(TINY_LABELS, [Teacher(tiny_vit, name="all")])
    answers = {"all": np.full((8, 4), 0.25)}
    pools = [
        build_pool(data, hierarchy, disable_tqdm=True),
        build_pool(data, hierarchy, disable_tqdm=True, output_dir=tmp_path / "pool"),
        PseudolabelPool.from_predictions(hierarchy, list(range(8)), answers, inputs=data),
    ]
    for number, pool in enumerate(pools):
        pool.push_to_hub(f"someone/pool{number}")
    shutil.rmtree(folder)
    for number in range(len(pools)):
        assert_no_leak(hub, f"someone/pool{number}", tmp_path, folder.name, repo_type="dataset")
        assert PseudolabelPool.load(f"someone/pool{number}").inputs[0]["image"].size == (8, 8)


# ── hierarchies ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_mixed_hierarchy_changes_in_its_repository(hub, tmp_path, tiny_vit, tiny_timm, tiny_sklearn):
    parts = {"low": tiny_vit, "high/x": tiny_timm}
    files = {f"{part}/{name}": data for part in parts for name, data in read_folder(parts[part]).items()}
    commit = hub.create("org/two", files)
    low, high = Teacher("org/two", subfolder="low"), Teacher("org/two", subfolder="high/x", level=1)
    local, answers = Teacher(tiny_sklearn, level=1, name="own"), Teacher("answer", level=1, kind="column")

    def push(*teachers: Teacher) -> set[str]:
        push_hierarchy(TeacherHierarchy(TINY_LABELS, teachers), TEACHERS, replace=True)
        return {name.split("/")[0] for name in hub.files(TEACHERS) if "/" in name}

    assert push(low, high, local, answers) == {"own"}
    loaded = load_hierarchy(TEACHERS).teachers
    assert [teacher.subfolder for teacher in loaded] == ["low", "high/x", "own", None]
    assert {teacher.revision for teacher in loaded[:2]} == {commit}
    assert push(low, replace(local, name="renamed")) == {"renamed"}
    other = save_tiny_vit(tmp_path / "other", TINY_LABELS, seed=3)
    assert push(low, Teacher(other, level=1, name="renamed")) == {"renamed"}
    assert "renamed/model.skops" not in hub.files(TEACHERS)
    inner = load_hierarchy(TEACHERS).teachers[1]
    assert push(low, replace(inner, name="again")) == {"again"}
    empty_cache()
    for teacher in load_hierarchy(TEACHERS).teachers:
        load_teacher(teacher, TINY_LABELS)
    assert push(low) == set() and push(low, answers) == set()

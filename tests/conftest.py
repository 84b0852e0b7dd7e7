"""Tiny models and data, made in milliseconds and kept in one folder of the session: no test touches the network.

Whatever asks the Hub asks the one in `hub_server.py`, which each test process has for itself.
"""

# ruff: noqa: E402 - the server must run before any client is imported
from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from hub_server import WRITE_TOKEN, HubServer

# The clients read their variables when they are imported, so this comes before every other import.
for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING_FACE_", "TRANSFORMERS_OFFLINE"))]:
    del os.environ[name]
HF_HOME = Path(tempfile.mkdtemp(prefix="hf_home_"))
_SERVER = HubServer().start()
os.environ.update(_SERVER.environment(HF_HOME))
for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
    os.environ[name] = _SERVER.url  # it passes nothing on, so a request to another machine fails
_OWNER = os.getpid()
# A forked process leaves this one's folder alone.
atexit.register(lambda: os.getpid() == _OWNER and shutil.rmtree(HF_HOME, ignore_errors=True))
# Models of a few thousand weights gain nothing by threads, and a process forked from one with OpenMP threads hangs.
os.environ["OMP_NUM_THREADS"] = "1"

import gc
import json
import time
import types
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from filelock import FileLock
from PIL import Image as PILImage

TINY_LABELS = ("ant", "bee", "cat", "dog")
_WORDS = ("six", "legs", "hums", "stings", "purrs", "sleeps", "barks", "fetches", "the", "animal", "often")


def pytest_collection_finish() -> None:
    """Leave what lives as long as the session out of every collection: each training begins with a full one."""
    gc.freeze()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """An empty Hub, a client that may write to it and has nothing in its cache, and no waiting between its retries."""
    from huggingface_hub import HfFileSystem, _tree_cache, file_download
    from huggingface_hub.utils import _http

    _SERVER.reset()
    for folder in ("hub", "datasets", "modules"):
        shutil.rmtree(HF_HOME / folder, ignore_errors=True)
    HfFileSystem.clear_instance_cache()  # it remembers repositories and listings
    _tree_cache._IN_MEMORY_TREE_CACHE.clear()
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    impatient = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", impatient)
    yield _SERVER


@pytest.fixture(scope="session")
def tiny_labels() -> tuple[str, ...]:
    """Label names of every tiny model and dataset."""
    return TINY_LABELS


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny models of this session are; each test that changes one copies it first."""
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="session")
def tiny_image_dataset() -> Dataset:
    """48 RGB images of 8 x 8, each label with its own colour, in a mixed order."""
    rng = np.random.default_rng(0)
    label_ids = rng.permutation(np.arange(48) % len(TINY_LABELS))
    colours = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200], [160, 160, 40]])
    pixels = np.clip(colours[label_ids][:, None, None] + rng.normal(0, 40, (48, 8, 8, 3)), 0, 255).astype(np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=list(TINY_LABELS))})
    images = [PILImage.fromarray(image) for image in pixels]
    return Dataset.from_dict({"image": images, "label": label_ids}, features=features)


@pytest.fixture(scope="session")
def tiny_text_dataset() -> Dataset:
    """48 short texts, different from each other, each label with two words of its own."""
    rng = np.random.default_rng(0)
    label_ids = rng.permutation(np.arange(48) % len(TINY_LABELS))
    texts = []
    for row, label in enumerate(label_ids):
        own = _WORDS[2 * label : 2 * label + 2]
        texts.append(" ".join(["the", "animal", *rng.choice(own, 2), *["often"] * (row % 5), *rng.choice(_WORDS, 2)]))
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(TINY_LABELS))})
    return Dataset.from_dict({"text": texts, "label": label_ids}, features=features)


@pytest.fixture(scope="session")
def tiny_vit(tiny_folder: Path) -> str:
    """Folder of a ViT for 8 x 8 RGB images with its image processor."""
    return save_tiny_vit(tiny_folder / "vit", TINY_LABELS)


@pytest.fixture(scope="session")
def tiny_timm(tiny_folder: Path) -> str:
    """Folder of a timm ResNet for 16 x 16 RGB images, saved as timm does."""
    return save_tiny_timm(tiny_folder / "timm", TINY_LABELS)


@pytest.fixture(scope="session")
def tiny_bert(tiny_folder: Path) -> str:
    """Folder of a BERT with a word-level tokenizer for the tiny texts."""
    return save_tiny_bert(tiny_folder / "bert", TINY_LABELS)


@pytest.fixture(scope="session")
def tiny_sklearn(tiny_folder: Path, tiny_image_dataset: Dataset) -> str:
    """Folder of a logistic regression on the pixels of the tiny images."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    from hf_cosupervise.teachers.kinds.sklearn import save_sklearn_teacher

    folder = tiny_folder / "sklearn"
    pixels = np.stack([np.asarray(image).ravel() / 255 for image in tiny_image_dataset["image"]])
    model = linear_model.LogisticRegression(max_iter=200).fit(pixels, tiny_image_dataset["label"])
    save_sklearn_teacher(model, folder, {"kind": "pixels", "size": [8, 8], "mode": "RGB"}, TINY_LABELS)
    return str(folder)


RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def run_recipe(
    folder: Path, *arguments: str, script: str = "train.py", launcher: str = "python"
) -> subprocess.CompletedProcess:
    """Run a recipe as a user does, in a process of its own."""
    start = [sys.executable, "-m", "accelerate.commands.launch"] if launcher == "accelerate" else [sys.executable]
    command = [*start, str(RECIPES / script), *arguments]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=600, env={**os.environ, "CI": "true"}
    )


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """Give a folder that is filled once in this session, by whichever of its processes needs it first."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each has a folder of its own below the session's
        root = root.parent
    folder, unfinished = root / name, root / f"{name}-unfinished"
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(folder)
    return folder


def _run_demo(folder: Path) -> None:
    started = time.time()
    done = run_recipe(folder, launcher="accelerate")
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "printed.json").write_text(json.dumps([done.stdout, time.time() - started]))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, float]:
    """The README's first command, in an empty folder: where it ran, what it printed, how long it took.

    It is run once for all, and each file of tests has a copy that it may change.
    """
    folder = tmp_path_factory.mktemp("demo") / "here"
    shutil.copytree(made_once(tmp_path_factory, "demo", _run_demo), folder)
    return folder, *json.loads((folder / "printed.json").read_text())


def save_tiny_vit(folder: Path, labels: Sequence[str], seed: int = 0) -> str:
    """Save a random ViT whose outputs differ clearly from row to row."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        initializer_range=0.5,  # the usual 0.02 makes every answer of so small a model nearly uniform
        id2label=dict(enumerate(labels)),
        label2id={label: position for position, label in enumerate(labels)},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return str(folder)


def save_tiny_timm(folder: Path, labels: Sequence[str], seed: int = 0) -> str:
    """Save a random timm ResNet that both timm and transformers load."""
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model("test_resnet", pretrained=False, num_classes=len(labels))
        torch.nn.init.normal_(model.get_classifier().weight, std=1.0)
    model.pretrained_cfg.update(input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0)
    timm.models.save_for_hf(model, str(folder), safe_serialization=True, model_config={"label_names": list(labels)})
    # timm >= 1.0.31 writes num_classes here, and transformers 5 then gets it twice.
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.get("model_args", {}).pop("num_classes", None)
    path.write_text(json.dumps(config))
    return str(folder)


def save_tiny_bert(folder: Path, labels: Sequence[str], seed: int = 0) -> str:
    """Save a random BERT and a tokenizer that knows the words of the tiny texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    specials = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    vocab = {word: position for position, word in enumerate((*specials, *_WORDS))}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=32,
    )
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.5,
        id2label=dict(enumerate(labels)),
        label2id={label: position for position, label in enumerate(labels)},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)

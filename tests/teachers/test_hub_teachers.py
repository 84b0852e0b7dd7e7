"""Teachers of every kind on the Hub: pinned, fetched, adapted, refused; and whole hierarchies of them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import HF_HOME, save_tiny_bert, save_tiny_vit
from datasets import Dataset, DatasetDict
from hub_server import OTHER_TOKEN, READ_TOKEN, WRITE_TOKEN, HubServer
from huggingface_hub import ModelCard, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file, save_file

from hf_cosupervise import load_hierarchy, push_hierarchy
from hf_cosupervise.hierarchy import Teacher, TeacherHierarchy
from hf_cosupervise.hub.client import UNREACHABLE
from hf_cosupervise.models import source
from hf_cosupervise.models.source import find_model
from hf_cosupervise.teachers.kinds.base import TeacherModel
from hf_cosupervise.teachers.kinds.loading import identify_teacher, load_teacher

pytestmark = pytest.mark.core


def read_folder(folder: str | Path, under: str = "") -> dict[str, bytes]:
    """A folder's files as the Hub holds them."""
    root = Path(folder)
    return {under + path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def label(teacher: TeacherModel, cells: Sequence[Any]) -> np.ndarray:
    return teacher(teacher.prepare(cells))


def cached_files() -> set[str]:
    """Names of all files that the client has downloaded."""
    root = HF_HOME / "hub"
    return {
        "/".join(path.relative_to(root).parts[3:])
        for path in root.glob("models--*/snapshots/*/**/*")
        if path.is_file()
    }


# ── found, pinned and fetched ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["vit", "bert", "timm", "sklearn"])
def test_a_teacher_of_the_hub_is_the_local_one(
    hub: HubServer,
    request: Any,
    tiny_image_dataset: Dataset,
    tiny_text_dataset: Dataset,
    tiny_labels: tuple[str, ...],
    kind: str,
) -> None:
    folder = request.getfixturevalue(f"tiny_{kind}")
    cells = tiny_text_dataset["text"][:5] if kind == "bert" else tiny_image_dataset["image"][:5]
    commit = hub.create("org/teacher", read_folder(folder))

    local, there = (load_teacher(Teacher(model), tiny_labels, "cpu") for model in (folder, "org/teacher"))

    np.testing.assert_array_equal(label(there, cells), label(local, cells))
    assert there.facts["commit"] == commit and there.facts["revision"] is None and "weights" not in there.facts
    assert {**there.facts, "commit": None} == {key: local.facts[key] for key in there.facts}


def test_branch_tag_and_commit_give_that_version(
    hub: HubServer, tiny_labels: tuple[str, ...], tiny_image_dataset: Dataset, tmp_path: Path
) -> None:
    from huggingface_hub import HfApi

    versions = [save_tiny_vit(tmp_path / str(seed), tiny_labels, seed) for seed in (1, 2)]
    first = hub.create("someone/vit", read_folder(versions[0]))
    HfApi().create_tag("someone/vit", tag="v1")
    HfApi().create_branch("someone/vit", branch="new")
    second = hub.create("someone/vit", read_folder(versions[1]), branch="new")
    images = tiny_image_dataset["image"][:3]
    expected = [label(load_teacher(Teacher(folder), tiny_labels, "cpu"), images) for folder in versions]

    for revision, which, commit in ((None, 0, first), ("v1", 0, first), ("new", 1, second), (second, 1, second)):
        teacher = load_teacher(Teacher("someone/vit", revision=revision), tiny_labels, "cpu")
        np.testing.assert_array_equal(label(teacher, images), expected[which])
        assert (teacher.facts["revision"], teacher.facts["commit"]) == (revision, commit)


def test_a_branch_that_moves_in_between_changes_nothing(
    hub: HubServer, tiny_labels: tuple[str, ...], tmp_path: Path
) -> None:
    first = hub.create("org/vit", read_folder(save_tiny_vit(tmp_path / "1", tiny_labels, 1)))
    teacher = Teacher("org/vit")
    identity, num_bytes = identify_teacher(teacher)
    hub.create("org/vit", read_folder(save_tiny_vit(tmp_path / "2", tiny_labels, 2)))

    assert identity == {"commit": first} and num_bytes == 0
    assert load_teacher(teacher, tiny_labels, "cpu", commit=identity["commit"]).facts["commit"] == first
    assert load_teacher(teacher, tiny_labels, "cpu").facts["commit"] != first


def test_only_what_the_loaders_read_is_downloaded(hub: HubServer, tiny_vit: str, tiny_labels: tuple[str, ...]) -> None:
    other = {
        "low/onnx/model.safetensors": b"x",
        "low/pytorch_model.bin": b"x",
        "low/model.py": b"x",
        "top.json": b"{}",
    }
    hub.create("org/many", read_folder(tiny_vit, "low/") | read_folder(tiny_vit, "high/") | other)

    teacher = Teacher("org/many", subfolder="low")
    identify_teacher(teacher)
    assert cached_files() == {"low/config.json"}
    facts = load_teacher(teacher, tiny_labels, "cpu").facts

    assert teacher.name == facts["subfolder"] == "low"
    assert cached_files() == {"low/config.json", "low/preprocessor_config.json", "low/model.safetensors"}


def test_a_subfolder_of_a_folder(tiny_vit: str, tiny_labels: tuple[str, ...], tmp_path: Path) -> None:
    shutil.copytree(tiny_vit, tmp_path / "a" / "low")
    teacher = Teacher(str(tmp_path), subfolder="a/low")
    facts = load_teacher(teacher, tiny_labels, "cpu").facts
    assert facts["weights"] == load_teacher(Teacher(tiny_vit), tiny_labels, "cpu").facts["weights"]
    with pytest.raises(FileNotFoundError, match=r"must be in a folder 'b' of .*, got none. Correct `subfolder`"):
        identify_teacher(Teacher(str(tmp_path), subfolder="b"))


def test_models_of_the_hub_say_their_id_and_no_path(
    hub: HubServer, tiny_bert: str, tiny_labels: tuple[str, ...], tmp_path: Path
) -> None:
    hub.create("org/bert", read_folder(tiny_bert))
    teacher: Any = load_teacher(Teacher("org/bert"), tiny_labels, "cpu")
    processor = teacher.prepare.make.processing_class
    assert teacher.model.config._name_or_path == teacher.model.name_or_path == processor.name_or_path == "org/bert"

    teacher.model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for path in tmp_path.glob("*.json"):
        assert str(HF_HOME) not in path.read_text()


def test_a_renamed_repository_is_followed(hub: HubServer, tiny_vit: str, tiny_labels: tuple[str, ...]) -> None:
    commit = hub.create("org/old", read_folder(tiny_vit))
    hub.rename("org/old", "org/new")
    assert load_teacher(Teacher("org/old"), tiny_labels, "cpu").facts["commit"] == commit


def test_a_warm_cache_is_enough(
    hub: HubServer, tiny_bert: str, tiny_labels: tuple[str, ...], tiny_text_dataset: Dataset, monkeypatch: Any
) -> None:
    hub.create("org/bert", read_folder(tiny_bert))
    texts = tiny_text_dataset["text"][:3]
    expected = load_teacher(Teacher("org/bert"), tiny_labels, "cpu")
    with hub.down():
        again = load_teacher(Teacher("org/bert"), tiny_labels, "cpu")
        np.testing.assert_array_equal(label(again, texts), label(expected, texts))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_teacher(Teacher("org/bert"), tiny_labels, "cpu").facts == expected.facts


def test_a_cold_or_partial_cache_is_not(
    hub: HubServer, tiny_vit: str, tiny_labels: tuple[str, ...], monkeypatch: Any
) -> None:
    hub.create("org/vit", read_folder(tiny_vit))
    with (
        hub.down(),
        pytest.raises(UNREACHABLE, match=r"Teacher 'vit' needs the model 'org/vit'. Go online"),
    ):
        load_teacher(Teacher("org/vit"), tiny_labels, "cpu")
    identify_teacher(Teacher("org/vit"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UNREACHABLE, match="Go online and try again"):
        load_teacher(Teacher("org/vit"), tiny_labels, "cpu")


def test_a_snapshot_of_unknown_extent_is_not_taken_for_whole(
    hub: HubServer, tiny_vit: str, tiny_labels: tuple[str, ...], monkeypatch: Any
) -> None:
    from huggingface_hub import _tree_cache

    commit = hub.create("org/older", read_folder(tiny_vit))
    identify_teacher(Teacher("org/older"))
    # As an older client leaves it, which does not keep the list of a commit's files.
    for path in (HF_HOME / "hub" / "models--org--older").iterdir():
        if path.name not in ("refs", "snapshots", "blobs"):
            shutil.rmtree(path)
    monkeypatch.setattr(_tree_cache, "_IN_MEMORY_TREE_CACHE", {})
    with hub.down(), pytest.raises(UNREACHABLE, match="Go online and try again"):
        load_teacher(Teacher("org/older", revision=commit), tiny_labels, "cpu")
    # The connection is back before it is asked what is missing.
    checkpoint = find_model("org/older", what="The student")
    monkeypatch.setattr(source, "fetch_files", lambda *args, **options: None)
    with pytest.raises(ConnectionError, match="The student needs all of its files, got a part of 'org/older' only"):
        checkpoint.fetch()


# ── what cannot be found ────────────────────────────────────────────────────────────────────────────────────────────


def test_repositories_that_cannot_be_used_say_why(hub: HubServer, tiny_vit: str, monkeypatch: Any) -> None:
    files = read_folder(tiny_vit)
    hub.create("org/data", {"data.csv": b"1"}, repo_type="dataset")
    hub.create("org/gated", files, gated="manual")
    hub.create("other/private", files, private=True)
    hub.create("org/vit", files)
    cases: list[tuple[Teacher, type[Exception], str]] = [
        (Teacher("org/data"), RepositoryNotFoundError, "needs the model 'org/data'. Check the id"),
        (
            Teacher("org/my vit", name="v"),
            HFValidationError,
            "needs the model 'org/my vit'. Check the id, or the path",
        ),
        (Teacher("org/missing"), RepositoryNotFoundError, "needs the model 'org/missing'. Check the id"),
        (Teacher("other/private"), RepositoryNotFoundError, "if it is private, log in"),
        (Teacher("org/gated"), GatedRepoError, "needs the model 'org/gated' at .* Accept its terms"),
        (Teacher("org/vit", revision="v9"), RevisionNotFoundError, "at 'v9'. Correct the revision"),
        (Teacher("hf-hub:org/vit@v1", name="v", revision="v2"), ValueError, "got 'v1' in `model` and 'v2' as `rev"),
        (Teacher("some/where/else"), FileNotFoundError, "'some/where/else', and there is no such folder"),
        (Teacher("local-dir:org/vit"), FileNotFoundError, "there is no such folder"),
    ]
    for teacher, kind, sentence in cases:
        with pytest.raises(kind, match=f"(?m)^Teacher '{teacher.name}' .*{sentence}"):
            identify_teacher(teacher)
    monkeypatch.setenv("HF_TOKEN", OTHER_TOKEN)
    assert identify_teacher(Teacher("other/private"))[0]["commit"]
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RepositoryNotFoundError, match="if it is private, log in by `hf auth login` or set HF_TOKEN"):
        identify_teacher(Teacher("other/private"))


@pytest.mark.parametrize(
    ("files", "kind", "sentence"),
    [
        ({"config.json": b"{}", "pytorch_model.bin": b"x"}, ValueError, r"only \['pytorch_model.bin'\] in 'org/x'"),
        ({"config.json": b"{}", "notes.txt": b"x"}, FileNotFoundError, r"weights in safetensors .*'notes.txt'"),
        ({"config.json": b"{}", "onnx/model.onnx": b"x"}, FileNotFoundError, "or name the folder .* by `subfolder`"),
        ({"config.json": b"not"}, ValueError, "must have a 'config.json' that is JSON, got: Expecting value"),
        ({"config.json": b"[1]"}, ValueError, "must have a 'config.json' that is a JSON object, got a list"),
        ({"model_index.json": b"{}", "unet/config.json": b"{}"}, ValueError, "got a pipeline of diffusers"),
        ({"low/config.json": b"{}"}, FileNotFoundError, r"got one in the folders \['low'\] of 'org/x' only"),
        ({"hierarchy.yaml": b"", "low/config.json": b"{}"}, ValueError, "got the hierarchy of teachers in 'org/x'"),
        ({"readme.txt": b"x"}, FileNotFoundError, "must have a 'config.json', got .*'readme.txt'.* in 'org/x'. Save"),
    ],
)
def test_repositories_without_a_model_say_what_they_hold(
    hub: HubServer, files: dict[str, bytes], kind: type[Exception], sentence: str
) -> None:
    hub.create("org/x", files)
    with pytest.raises(kind, match=f"^Teacher 'x' .*{sentence}"):
        load_teacher(Teacher("org/x", kind="transformers"), ("a", "b"), "cpu")


def test_lost_parts_of_weights_are_named(tiny_vit: str, tiny_labels: tuple[str, ...], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_vit, tmp_path / "vit"))
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    tensors = list(load_file(folder / "model.safetensors").items())
    for shard, part in zip(shards, (tensors[:3], tensors[3:]), strict=True):
        save_file(dict(part), folder / shard, metadata={"format": "pt"})
    places = {name: shards[position >= 3] for position, (name, _) in enumerate(tensors)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "model.safetensors").unlink()
    assert load_teacher(Teacher(str(folder)), tiny_labels, "cpu").facts["kind"] == "transformers"
    (folder / shards[1]).unlink()
    with pytest.raises(FileNotFoundError, match=r"got '.*vit' without \['model-00002-of-00002.safetensors'\]"):
        load_teacher(Teacher(str(folder)), tiny_labels, "cpu")


def test_a_tokenizer_without_its_vocabulary_is_refused(
    hub: HubServer, tiny_bert: str, tiny_labels: tuple[str, ...]
) -> None:
    files = read_folder(tiny_bert)
    del files["tokenizer.json"]
    hub.create("org/silent", files | {"tokenizer_config.json": b'{"tokenizer_class": "BertTokenizer"}'})
    with pytest.raises(
        ValueError, match="vocabulary of its tokenizer, got 0 words besides its special tokens in 'org/silent'"
    ):
        load_teacher(Teacher("org/silent"), tiny_labels, "cpu")
    hub.create("org/loud", files)
    with pytest.raises(ValueError, match="must come with its tokenizer, and without code .*got in 'org/loud': Couldn"):
        load_teacher(Teacher("org/loud"), tiny_labels, "cpu")


# ── adapters ────────────────────────────────────────────────────────────────────────────────────────────────────────


def save_adapter(base: str, folder: Path, base_name: str, num_labels: int | None = None, **settings: Any) -> Any:
    """Save a random LoRA adapter of a tiny model, and give the adapted model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

    is_text = "bert" in Path(base).name
    auto_model = AutoModelForSequenceClassification if is_text else AutoModelForImageClassification
    changes = {} if num_labels is None else {"num_labels": num_labels, "ignore_mismatched_sizes": True}
    targets = ["query", "value"] if is_text else ["q_proj", "v_proj"]
    config = LoraConfig(r=2, target_modules=settings.pop("targets", targets), init_lora_weights=False, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = get_peft_model(auto_model.from_pretrained(base, **changes), config)
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:  # a trained head
                torch.nn.init.normal_(parameter)
    model.peft_config["default"].base_model_name_or_path = base_name
    model.save_pretrained(str(folder))
    return model.eval()


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_adapter_with_a_head_is_merged_into_its_pinned_base(
    hub: HubServer, tiny_vit: str, tiny_image_dataset: Dataset, tmp_path: Path
) -> None:
    adapted = save_adapter(tiny_vit, tmp_path / "a", "org/base", 3, modules_to_save=["classifier"])
    base = hub.create("org/base", read_folder(tiny_vit))
    change_json(tmp_path / "a" / "adapter_config.json", revision=base)
    hub.create("org/base", {"config.json": b"{}"})
    names = {"0": "red", "1": "green", "2": "blue"}
    commit = hub.create(
        "org/adapter", {**read_folder(tmp_path / "a"), "config.json": json.dumps({"id2label": names}).encode()}
    )
    images = tiny_image_dataset["image"][:5]

    identity, _ = identify_teacher(Teacher("org/adapter"))
    assert not any(name.endswith(".safetensors") for name in cached_files())
    teacher: Any = load_teacher(Teacher("org/adapter"), ("red", "green", "blue"), "cpu")

    with torch.no_grad():
        expected = adapted(**teacher.prepare(images)).logits.softmax(-1).numpy()
    np.testing.assert_allclose(label(teacher, images), expected, atol=1e-5)
    assert identity == {"commit": commit, "base_model": "org/base", "base_commit": base}
    assert {key: teacher.facts[key] for key in identity} == identity
    assert teacher.facts["kind"] == "transformers" and teacher.facts["class"] == "ViTForImageClassification"
    assert teacher.model.config._name_or_path == "org/adapter"


@pytest.mark.parametrize("kind", ["bert", "timm"])
def test_an_adapter_without_a_head_takes_its_base_s(
    hub: HubServer,
    request: Any,
    tiny_labels: tuple[str, ...],
    tiny_text_dataset: Dataset,
    tiny_image_dataset: Dataset,
    tmp_path: Path,
    kind: str,
) -> None:
    base = request.getfixturevalue(f"tiny_{kind}")
    settings: dict[str, Any] = {} if kind == "bert" else {"targets": ["timm_model.conv1.0"]}
    adapted = save_adapter(base, tmp_path / "a", "org/base", **settings)
    hub.create("org/base", read_folder(base))
    hub.create("org/all", read_folder(tmp_path / "a", "a/"))
    cells = tiny_text_dataset["text"][:5] if kind == "bert" else tiny_image_dataset["image"][:5]

    teacher = load_teacher(Teacher("org/all", subfolder="a"), tiny_labels, "cpu")

    with torch.no_grad():
        expected = adapted(**teacher.prepare(cells)).logits.softmax(-1).numpy()
    np.testing.assert_allclose(label(teacher, cells), expected, atol=1e-5)


def test_an_adapter_whose_labels_have_no_names_asks_for_them(hub: HubServer, tiny_bert: str, tmp_path: Path) -> None:
    save_adapter(tiny_bert, tmp_path / "a", "org/base", 2, modules_to_save=["classifier"])
    hub.create("org/base", read_folder(tiny_bert))
    hub.create("org/adapter", read_folder(tmp_path / "a"))
    with pytest.raises(ValueError, match=r"got the placeholders \['LABEL_0', 'LABEL_1'\].*label_map"):
        load_teacher(Teacher("org/adapter"), ("good", "bad"), "cpu")
    label_map = {"LABEL_0": "bad", "LABEL_1": "good"}
    assert label(load_teacher(Teacher("org/adapter", label_map=label_map), ("good", "bad"), "cpu"), ["the"]).shape == (
        1,
        2,
    )


def test_local_adapters_of_local_bases(tiny_vit: str, tiny_labels: tuple[str, ...], tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_vit, tmp_path / "base"))
    save_adapter(tiny_vit, tmp_path / "a", str(base))
    facts = load_teacher(Teacher(str(tmp_path / "a")), tiny_labels, "cpu").facts
    assert facts["base_model"] == "base" and facts["base_commit"] is None and str(tmp_path) not in json.dumps(facts)
    weights = load_file(base / "model.safetensors")
    save_file({key: value * 2 for key, value in weights.items()}, base / "model.safetensors", {"format": "pt"})
    assert identify_teacher(Teacher(str(tmp_path / "a")))[0]["base_weights"] != facts["base_weights"]


def test_adapters_that_do_not_work_say_why(
    hub: HubServer, tiny_vit: str, tiny_labels: tuple[str, ...], tmp_path: Path
) -> None:
    from transformers import ViTModel

    good = tmp_path / "good"
    save_adapter(tiny_vit, good, "org/base", modules_to_save=["classifier"])
    save_adapter(tiny_vit, tmp_path / "plain", "org/backbone")
    ViTModel.from_pretrained(tiny_vit).save_pretrained(tmp_path / "backbone")
    hub.create("org/base", read_folder(tiny_vit))
    hub.create("org/backbone", read_folder(tmp_path / "backbone"))
    tensors = load_file(good / "adapter_model.safetensors")
    lora = [name for name in tensors if "lora" in name]

    def variant(name: str, drop: str | None = None, add: str | None = None, **changes: Any) -> str:
        folder = Path(shutil.copytree(good, tmp_path / name))
        kept = {key: value for key, value in tensors.items() if key != drop}
        save_file(kept | ({add: torch.ones(2, 2)} if add else {}), folder / "adapter_model.safetensors")
        change_json(folder / "adapter_config.json", **changes)
        return str(folder)

    cases = [
        (variant("gone", base_model_name_or_path="org/gone"), OSError, "adapter '.*gone' needs the model 'org/gone'"),
        (variant("none", base_model_name_or_path=None), ValueError, "by its Hub id as `base_model_name_or_path`"),
        (variant("prompt", peft_type="PROMPT_TUNING"), ValueError, "such as LoRA, got 'PROMPT_TUNING'"),
        (variant("x", peft_type="XLORA"), ValueError, "can be merged into its base, such as LoRA, got 'XLORA'"),
        (variant("odd", peft_type="NEW"), ValueError, "can be merged into its base, such as LoRA, got 'NEW'"),
        (variant("mega", megatron_config={"a": 1}), ValueError, "can be merged into its base"),
        (variant("less", drop=lora[0]), ValueError, "fits its base 'org/base', got: .*lora_A.* without counterpart"),
        (variant("more", add="base_model.model.vit.other.lora_A.weight"), ValueError, "got: .*vit.other.* without"),
        (variant("target", target_modules=["nothing"]), ValueError, "'org/base', got: No modules were targeted"),
        (variant("shape", r=3), ValueError, r"fits its base 'org/base', got: Error\(s\) in loading"),
        (str(tmp_path / "plain"), ValueError, "must have all of its weights .*without .*classifier.weight"),
    ]
    for folder, kind, sentence in cases:
        with pytest.raises(kind, match=sentence):
            load_teacher(Teacher(folder), tiny_labels, "cpu")
    shutil.copy(Path(tiny_vit) / "model.safetensors", tmp_path / "more")
    with pytest.raises(ValueError, match="must be a whole model or an adapter, got both"):
        load_teacher(Teacher(str(tmp_path / "more")), tiny_labels, "cpu")
    for path in ("/home/me/bert", f"local-dir://{tiny_vit}"):
        hub.create("org/far", {"adapter_config.json": json.dumps({"base_model_name_or_path": path}).encode()})
        with pytest.raises(ValueError, match=f"must be named by its Hub id .*, got '{path}'"):
            load_teacher(Teacher("org/far"), tiny_labels, "cpu")
    hub.create("org/twice", {"adapter_config.json": json.dumps({"base_model_name_or_path": "org/one"}).encode()})
    hub.create("org/one", {"adapter_config.json": json.dumps({"base_model_name_or_path": "org/base"}).encode()})
    with pytest.raises(ValueError, match="adapter 'org/twice' must be a whole model, got another adapter, 'org/one'"):
        identify_teacher(Teacher("org/twice"))


def test_a_student_may_have_an_adapter_of_a_backbone(hub: HubServer, tiny_vit: str, tmp_path: Path) -> None:
    from transformers import ViTModel

    from hf_cosupervise.models.classifier import load_adapted

    save_adapter(tiny_vit, tmp_path / "a", "org/backbone")
    ViTModel.from_pretrained(tiny_vit).save_pretrained(tmp_path / "backbone")
    hub.create("org/backbone", read_folder(tmp_path / "backbone"))
    checkpoint = find_model(str(tmp_path / "a"), what="The student")
    model, processor_folder = load_adapted(checkpoint, random_head=True)
    assert checkpoint.base is not None and processor_folder == checkpoint.base.folder
    assert not any("lora" in name for name, _ in model.named_parameters())


# ── timm, scikit-learn, and models for other tasks ──────────────────────────────────────────────────────────────────


def test_timm_s_names_of_the_hub(
    hub: HubServer, tiny_timm: str, tiny_labels: tuple[str, ...], tiny_image_dataset: Dataset
) -> None:
    from huggingface_hub import HfApi

    commit = hub.create("someone/net", read_folder(tiny_timm))
    HfApi().create_tag("someone/net", tag="v1")
    images = tiny_image_dataset["image"][:5]
    teachers = [
        load_teacher(teacher, tiny_labels, "cpu")
        for teacher in (Teacher("hf-hub:someone/net@v1", name="t"), Teacher("someone/net", kind="transformers"))
    ]
    assert [teacher.facts["kind"] for teacher in teachers] == ["timm", "transformers"]
    assert [(teacher.facts["revision"], teacher.facts["commit"]) for teacher in teachers] == [
        ("v1", commit),
        (None, commit),
    ]
    np.testing.assert_allclose(*[label(teacher, images) for teacher in teachers], atol=1e-5)


def test_a_wrapped_timm_model_of_transformers_loads_by_timm_too(
    hub: HubServer, tiny_timm: str, tiny_labels: tuple[str, ...], tiny_image_dataset: Dataset, tmp_path: Path
) -> None:
    from transformers import AutoModelForImageClassification

    AutoModelForImageClassification.from_pretrained(tiny_timm).save_pretrained(tmp_path)
    hub.create("org/net", read_folder(tmp_path))
    images = tiny_image_dataset["image"][:5]
    kinds = ("auto", "transformers", "timm")
    probs = [label(load_teacher(Teacher("org/net", kind=kind), tiny_labels, "cpu"), images) for kind in kinds]
    np.testing.assert_allclose(probs[0], probs[1], atol=1e-5)
    np.testing.assert_allclose(probs[1], probs[2], atol=1e-5)


def test_models_for_other_tasks_are_refused(hub: HubServer, tiny_labels: tuple[str, ...], tmp_path: Path) -> None:
    from transformers import BertForMaskedLM, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20, n_positions=8)).save_pretrained(
        tmp_path / "gpt"
    )
    bert = Path(save_tiny_bert(tmp_path / "bert", tiny_labels))
    BertForMaskedLM.from_pretrained(bert).save_pretrained(tmp_path / "mlm")
    BertForSequenceClassification.from_pretrained(bert, problem_type="multi_label_classification").save_pretrained(
        tmp_path / "multi"
    )
    save_tiny_bert(tmp_path / "score", ("score",))
    detector = {"model_type": "yolos", "architectures": ["YolosForObjectDetection"]}
    unknown = {"model_type": "brand_new", "auto_map": {"AutoConfig": "model.Config"}}
    weights = {"model.safetensors": b"\2\0\0\0\0\0\0\0{}"}
    hub.create("org/detector", {"config.json": json.dumps(detector).encode()} | weights)
    hub.create("org/unknown", {"config.json": json.dumps(unknown).encode()} | weights)
    for name in ("gpt", "mlm", "multi", "score"):
        hub.create(f"org/{name}", read_folder(tmp_path / name))
    cases = [
        ("gpt", "must be a classifier of images or of texts, got 'GPT2LMHeadModel', which is for another task"),
        ("mlm", "got 'BertForMaskedLM', which is for another task"),
        ("detector", "got 'YolosForObjectDetection', which is for another task"),
        (
            "unknown",
            "must be of a type that transformers knows, got 'brand_new' .*Code from a repository is never run",
        ),
        ("multi", "must choose one label per example, got `problem_type` 'multi_label_classification'"),
        ("score", r"must give a probability for each of at least two labels, got 1 \(a regression head\)"),
    ]
    for name, sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            load_teacher(Teacher(f"org/{name}"), tiny_labels, "cpu")


def test_sklearn_models_of_skops_own_tools_ask_for_a_feature(hub: HubServer, tiny_sklearn: str) -> None:
    config = {"sklearn": {"model": {"file": "model.skops"}, "task": "tabular-classification"}}
    hub.create("org/tree", {**read_folder(tiny_sklearn), "config.json": json.dumps(config).encode()})
    with pytest.raises(ValueError, match="`feature` in 'config.json' of teacher 'tree' must be a mapping"):
        load_teacher(Teacher("org/tree"), ("a", "b"))


# ── nothing of the Hub is run ───────────────────────────────────────────────────────────────────────────────────────


class Payload:
    """Pickled, it writes a file as soon as it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self.marker)!r}, 'w').close()",)


@pytest.fixture
def marker(tmp_path: Path) -> Any:
    """A file that must not be there in the end."""
    path = tmp_path / "marker"
    yield path
    assert not path.exists()


def pickled(marker: Path, **tensors: torch.Tensor) -> bytes:
    path = marker.with_name("evil.bin")
    torch.save({**tensors, "evil": Payload(marker)}, path)
    return path.read_bytes()


def test_the_payload_is_a_real_one(tmp_path: Path) -> None:
    (tmp_path / "evil.bin").write_bytes(pickled(tmp_path / "marker"))
    torch.load(tmp_path / "evil.bin", weights_only=False)
    assert (tmp_path / "marker").exists()


def test_pickled_weights_are_never_read(
    hub: HubServer, tiny_vit: str, tiny_timm: str, tiny_labels: tuple[str, ...], marker: Path
) -> None:
    evil = {"pytorch_model.bin": pickled(marker)}
    for kind, folder in (("transformers", tiny_vit), ("timm", tiny_timm)):
        files = read_folder(folder)
        hub.create(f"org/{kind}-beside", files | evil)
        assert load_teacher(Teacher(f"org/{kind}-beside"), tiny_labels, "cpu").facts["kind"] == kind
        del files["model.safetensors"]
        hub.create(f"org/{kind}-alone", files | evil)
        with pytest.raises(ValueError, match=r"got only \['pytorch_model.bin'\] .* may hold pickles and are not read"):
            load_teacher(Teacher(f"org/{kind}-alone"), tiny_labels, "cpu")
    assert "pytorch_model.bin" not in cached_files()


@pytest.mark.parametrize("is_local", [False, True])
def test_pickled_adapters_are_never_read(
    hub: HubServer, tiny_vit: str, tiny_labels: tuple[str, ...], tmp_path: Path, marker: Path, is_local: bool
) -> None:
    save_adapter(tiny_vit, tmp_path / "a", "org/base")
    hub.create("org/base", read_folder(tiny_vit))
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    (tmp_path / "a" / "adapter_model.bin").write_bytes(pickled(marker))
    hub.create("org/adapter", read_folder(tmp_path / "a"))
    with pytest.raises(ValueError, match=r"got only \['adapter_model.bin'\] in '.*', which may hold pickles"):
        load_teacher(Teacher(str(tmp_path / "a") if is_local else "org/adapter"), tiny_labels, "cpu")


@pytest.mark.parametrize("is_local", [False, True])
def test_code_of_a_repository_is_never_run(
    hub: HubServer, tiny_bert: str, tiny_labels: tuple[str, ...], tmp_path: Path, marker: Path, is_local: bool
) -> None:
    code = f"open({str(marker)!r}, 'w').close()\n".encode()
    files = {**read_folder(tiny_bert), "model.py": code}
    auto_map = {
        "AutoConfig": "model.A",
        "AutoModelForSequenceClassification": "model.A",
        "AutoTokenizer": ["model.A", None],
    }

    def place(name: str, **changes: dict[str, Any]) -> str:
        edited = {file: json.dumps(json.loads(files[file]) | change).encode() for file, change in changes.items()}
        hub.create(f"org/{name}", files | edited)
        for file, content in (files | edited).items():
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / file).write_bytes(content)
        return str(tmp_path / name) if is_local else f"org/{name}"

    known = place("known", **{"config.json": {"auto_map": auto_map}, "tokenizer_config.json": {"auto_map": auto_map}})
    assert load_teacher(Teacher(known), tiny_labels, "cpu").facts["class"] == "BertForSequenceClassification"
    model = place("model", **{"config.json": {"auto_map": auto_map, "model_type": "evil"}})
    with pytest.raises(ValueError, match="of a type that transformers knows, got 'evil' .* is never run"):
        load_teacher(Teacher(model), tiny_labels, "cpu")
    tokenizer = place("tokenizer", **{"tokenizer_config.json": {"auto_map": auto_map, "tokenizer_class": "Evil"}})
    assert load_teacher(Teacher(tokenizer), tiny_labels, "cpu").prepare(["the animal"])["input_ids"].shape == (1, 4)


def test_types_that_are_not_trusted_are_never_made(
    hub: HubServer, tiny_sklearn: str, tiny_labels: tuple[str, ...], tmp_path: Path, marker: Path
) -> None:
    import io
    import zipfile

    schema = {
        "__class__": "Popen",
        "__module__": "subprocess",
        "__loader__": "ObjectNode",
        "__id__": 1,
        "content": {
            "__class__": "dict",
            "__module__": "builtins",
            "__loader__": "DictNode",
            "__id__": 2,
            "content": {},
            "key_types": {
                "__class__": "list",
                "__module__": "builtins",
                "__id__": 3,
                "__loader__": "ListNode",
                "content": [],
            },
        },
        "protocol": 2,
        "_skops_version": "0.11",
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("schema.json", json.dumps(schema))
    hub.create("org/evil", read_folder(tiny_sklearn) | {"model.skops": buffer.getvalue()})
    with pytest.raises(ValueError, match=r"must hold types that skops or you trust, got \['subprocess.Popen'\]"):
        load_teacher(Teacher("org/evil"), tiny_labels)
    hub.create(
        "org/pickle",
        {key: value for key, value in read_folder(tiny_sklearn).items() if key != "model.skops"}
        | {"model.pkl": pickled(marker)},
    )
    with pytest.raises(ValueError, match=r"got only \['model.pkl'\]"):
        load_teacher(Teacher("org/pickle"), tiny_labels)


# ── hierarchies ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def hierarchy(tiny_vit: str, tiny_timm: str, tiny_sklearn: str, tiny_labels: tuple[str, ...]) -> TeacherHierarchy:
    """Two folders, one model of the Hub and a column, on two levels."""
    return TeacherHierarchy(
        tiny_labels,
        [
            Teacher(tiny_vit, name="all", domains=("day",)),
            Teacher("org/net", level=1, name="net", scope=("ant", "bee")),
            Teacher(tiny_sklearn, level=1, name="pixels"),
            Teacher("answer", level=1, kind="column", label_map={"kitten": "cat"}),
        ],
    )


def push_all(hub: HubServer, hierarchy: TeacherHierarchy, tiny_timm: str, **options: Any) -> str:
    """Push the hierarchy above, with its model of the Hub; the commit of the latter."""
    commit = hub.create("org/net", read_folder(tiny_timm))
    push_hierarchy(hierarchy, "weak", **options)
    return commit


def test_a_hierarchy_goes_to_the_hub_and_comes_back(
    hub: HubServer,
    hierarchy: TeacherHierarchy,
    tiny_timm: str,
    tiny_labels: tuple[str, ...],
    tiny_image_dataset: Dataset,
    tmp_path: Path,
) -> None:
    facts = {"license": "mit", "accuracy": {"all": 0.625}, "datasets": ["org/animals"]}
    net = push_all(hub, hierarchy, tiny_timm, facts=facts)

    [commit, _] = hub.commits("someone/weak")
    assert commit.title == "Hierarchy of teachers"
    assert set(hub.files("someone/weak")) == {
        ".gitattributes",
        "README.md",
        "hierarchy.yaml",
        "all/config.json",
        "all/model.safetensors",
        "all/preprocessor_config.json",
        "pixels/config.json",
        "pixels/model.skops",
    }
    written = yaml.safe_load(hub.files("someone/weak")["hierarchy.yaml"])
    assert [teacher["model"] for teacher in written["teachers"]] == ["all", "org/net", "pixels", "answer"]
    card = ModelCard(hub.files("someone/weak")["README.md"].decode())
    assert card.data.license == "mit" and "weak-to-strong" in card.data.tags and card.data.datasets == ["org/animals"]
    assert "62.5" in card.text and 'load_hierarchy("someone/weak")' in card.text and net[:12] in card.text
    assert str(Path(tiny_timm).parent) not in "".join(
        text.decode() for name, text in hub.files("someone/weak").items() if name.endswith((".md", ".json", ".yaml"))
    )

    loaded = load_hierarchy("someone/weak")
    inner = {"model": "someone/weak", "revision": commit.oid}
    assert loaded == TeacherHierarchy(
        tiny_labels,
        [
            replace(hierarchy.teachers[0], subfolder="all", kind="transformers", **inner),
            replace(hierarchy.teachers[1], revision=net),
            replace(hierarchy.teachers[2], subfolder="pixels", kind="sklearn", **inner),
            hierarchy.teachers[3],
        ],
    )
    images = tiny_image_dataset["image"][:3]
    for before, after in list(zip(hierarchy.teachers, loaded.teachers))[:3]:
        probs = [label(load_teacher(teacher, tiny_labels, "cpu"), images) for teacher in (before, after)]
        np.testing.assert_array_equal(*probs)
    for name in ("hierarchy.json", "hierarchy.yaml"):
        loaded.save(tmp_path / name)
        assert load_hierarchy(tmp_path / name) == loaded
    assert load_hierarchy(tmp_path) == loaded


def test_the_snippet_of_the_card_runs(hub: HubServer, hierarchy: TeacherHierarchy, tiny_timm: str) -> None:
    push_all(hub, hierarchy, tiny_timm)
    snippets = re.findall(r"```python\n(.*?)```", hub.files("someone/weak")["README.md"].decode(), re.DOTALL)
    assert len(snippets) == 2 and "AutoModelForImageClassification" in snippets[1]
    for snippet in snippets:
        exec(snippet, {})


def test_pushing_again_uploads_what_is_new_and_deletes_what_is_gone(
    hub: HubServer, hierarchy: TeacherHierarchy, tiny_timm: str, tiny_vit: str, tiny_labels: tuple[str, ...]
) -> None:
    push_all(hub, hierarchy, tiny_timm)
    first = hub.commits("someone/weak")[0]
    card = hub.files("someone/weak")["README.md"] + b"\n## Mine\n\nBy hand.\n"
    mine = {
        "README.md": card,
        "all/notes.md": b"mine",
        "all/model-00001-of-00002.safetensors": b"old",
        "notes/a": b"b",
    }
    hub.create("someone/weak", mine)

    fewer = TeacherHierarchy(tiny_labels, hierarchy.teachers[:2])
    with pytest.raises(
        ValueError, match=r"must hold every teacher that the one in 'someone/weak' holds, got none called"
    ):
        push_hierarchy(fewer, "weak")  # perhaps somebody else's
    hub.requests.clear()
    push_hierarchy(fewer, "weak", replace=True)

    assert not [request for request in hub.requests if request.method == "PUT"]
    commit = hub.commits("someone/weak")[0]
    assert set(commit.added) == {"README.md", "hierarchy.yaml"}
    assert set(commit.deleted) == {"pixels/config.json", "pixels/model.skops", "all/model-00001-of-00002.safetensors"}
    assert b"By hand." in hub.files("someone/weak")["README.md"]
    assert load_hierarchy("someone/weak", revision=first.oid).names == hierarchy.names
    assert load_hierarchy("someone/weak").names == ("all", "net")

    again = push_hierarchy(fewer, "weak")
    assert hub.commits("someone/weak")[0] == commit and again.oid == commit.oid


def test_a_loaded_hierarchy_is_pushed_onto_itself_and_elsewhere(
    hub: HubServer, hierarchy: TeacherHierarchy, tiny_timm: str, tiny_vit: str, tiny_labels: tuple[str, ...]
) -> None:
    push_all(hub, hierarchy, tiny_timm)
    loaded = load_hierarchy("someone/weak")
    renamed = [replace(loaded.teachers[0], name="root"), *loaded.teachers[1:]]
    push_hierarchy(TeacherHierarchy(tiny_labels, renamed), "weak", replace=True)
    assert "root/model.safetensors" in hub.files("someone/weak") and "all/config.json" not in hub.files("someone/weak")
    assert load_hierarchy("someone/weak").teachers[0].subfolder == "root"

    push_hierarchy(loaded, "copy")
    assert not any(name.endswith(".safetensors") for name in hub.files("someone/copy"))
    elsewhere = load_hierarchy("someone/copy").teachers[0]
    assert elsewhere == loaded.teachers[0]
    assert load_teacher(elsewhere, tiny_labels, "cpu").facts["subfolder"] == "all"


def test_a_branch_of_its_own(hub: HubServer, hierarchy: TeacherHierarchy, tiny_timm: str) -> None:
    push_all(hub, hierarchy, tiny_timm)
    before = hub.commits("someone/weak")
    push_hierarchy(TeacherHierarchy(hierarchy.labels, hierarchy.teachers[:2]), "weak", revision="small", replace=True)
    assert hub.commits("someone/weak") == before
    assert [len(load_hierarchy("someone/weak", revision=name).names) for name in ("main", "small")] == [4, 2]


def test_pushes_that_are_refused_upload_nothing(
    hub: HubServer, tiny_vit: str, tiny_labels: tuple[str, ...], tmp_path: Path, monkeypatch: Any
) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copy(Path(tiny_vit) / "config.json", tmp_path / "empty")
    save_adapter(tiny_vit, tmp_path / "adapter", tiny_vit)
    hub.create("someone/model", read_folder(tiny_vit))
    old = TeacherHierarchy(tiny_labels, [Teacher("old")]).to_dict()
    hub.create("someone/weak", {"docs/a.md": b"a", "notes.txt": b"a", "hierarchy.yaml": yaml.safe_dump(old).encode()})

    def refused(kind: Any, sentence: str, model: str = tiny_vit, repo: str = "new", **fields: Any) -> None:
        hub.requests.clear()
        name = fields.pop("name", "t")
        with pytest.raises(kind, match=sentence):
            push_hierarchy(TeacherHierarchy(tiny_labels, [Teacher(model, name=name)]), repo, **fields)
        assert not [r for r in hub.requests if r.method == "PUT" or "/commit/" in r.path]

    for name in ("README.md", "readme.MD", "hierarchy.yaml"):
        refused(ValueError, rf"names that are free in 'someone/new', got \['{name}'\]", name=name)
    for name in ("docs", "Notes.txt"):
        refused(
            ValueError,
            rf"names that are free in 'someone/weak', got \['{name}'\]",
            repo="weak",
            name=name,
            replace=True,
        )
    refused(ValueError, r"onto another hierarchy, got 'someone/model' with \['config.json'", repo="model")
    refused(FileNotFoundError, "Teacher 't' must have weights in safetensors", model=str(tmp_path / "empty"))
    refused(ValueError, "must be an adapter whose base is on the Hub", model=str(tmp_path / "adapter"))
    refused(RepositoryNotFoundError, "Teacher 't' needs the model 'org/nowhere'", model="org/nowhere")
    refused(ValueError, r"`facts` must have keys among .*, got unknown \['licence'\]", facts={"licence": "mit"})
    refused(ValueError, r"`accuracy` must be named by teachers \['t'\]", facts={"accuracy": {"u": 1.0}})
    refused(HfHubHTTPError, "hierarchy is pushed to the model 'other/weak'. Log in", repo="other/weak")
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    refused(PermissionError, "needs a token")


def test_a_push_that_breaks_off_leaves_the_repository_as_it_was(
    hub: HubServer, hierarchy: TeacherHierarchy, tiny_timm: str, tiny_labels: tuple[str, ...]
) -> None:
    push_all(hub, hierarchy, tiny_timm)
    before = hub.commits("someone/weak")
    hub.fault(r"/commit/", 500, times=10)
    with pytest.raises(HfHubHTTPError, match="The hierarchy is pushed to the model 'someone/weak'"):
        push_hierarchy(TeacherHierarchy(tiny_labels, hierarchy.teachers[:2]), "weak", replace=True)
    assert hub.commits("someone/weak") == before


def test_an_adapter_is_pushed_with_its_base_pinned(
    hub: HubServer, tiny_vit: str, tiny_labels: tuple[str, ...], tiny_image_dataset: Dataset, tmp_path: Path
) -> None:
    base = hub.create("org/base", read_folder(tiny_vit))
    save_adapter(tiny_vit, tmp_path / "a", "org/base")
    teacher = Teacher(str(tmp_path / "a"))
    images = tiny_image_dataset["image"][:3]
    expected = label(load_teacher(teacher, tiny_labels, "cpu"), images)
    push_hierarchy(TeacherHierarchy(tiny_labels, [teacher]), "weak")
    hub.create("org/base", {"config.json": b"{}"})

    [loaded] = load_hierarchy("someone/weak").teachers

    np.testing.assert_array_equal(label(load_teacher(loaded, tiny_labels, "cpu"), images), expected)
    assert json.loads(hub.files("someone/weak")["a/adapter_config.json"])["revision"] == base


def write_hierarchy(hub: HubServer, *teachers: dict[str, Any] | str, **files: bytes) -> None:
    content = {"labels": ["ant", "bee", "cat", "dog"], "teachers": list(teachers)}
    hub.create("org/weak", {"hierarchy.yaml": yaml.safe_dump(content).encode(), **files})


@pytest.mark.parametrize(
    "model",
    [
        "/etc/model",
        "../model",
        "low/../../model",
        "~/model",
        "C:\\model",
        "local-dir:low",
        "hf-hub:/low",
        "a/b/c",
        "./gone",
    ],
)
def test_paths_out_of_the_repository_are_refused(hub: HubServer, model: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").mkdir()
    write_hierarchy(hub, {"model": model, "name": "low"})
    with pytest.raises(
        ValueError, match="Teacher 'low' in the hierarchy 'org/weak' must be a folder of that repository or"
    ):
        load_hierarchy("org/weak")


def test_hierarchies_that_are_none_say_why(hub: HubServer, tiny_vit: str, tmp_path: Path) -> None:
    for teachers, sentence in (
        ([{"model": "a", "name": "a", "subfolder": "../x"}], "`subfolder` of teacher 'a' must be a folder below"),
        ([{"model": "a", "colour": "red"}], r"got unknown \['colour'\]"),
        (["a"], "A teacher must be a mapping"),
        ([{"model": "a", "label_map": ["b"]}], "must map its label names to the task's, got list"),
        ([], "at least one teacher"),
    ):
        write_hierarchy(hub, *teachers)
        with pytest.raises(ValueError, match=f"'hierarchy.yaml' in 'org/weak' must be a hierarchy .*{sentence}"):
            load_hierarchy("org/weak")
    for content in (b"- a", b"a: [", b"\xff\xfe", b"labels: 3\nteachers: 4"):
        hub.create("org/weak", {"hierarchy.yaml": content})
        with pytest.raises(ValueError, match="'hierarchy.yaml' in 'org/weak' must be a hierarchy of teachers, got"):
            load_hierarchy("org/weak")
    hub.create("org/vit", read_folder(tiny_vit))
    with pytest.raises(FileNotFoundError, match="must be a repository with a 'hierarchy.yaml', got none in 'org/vit'"):
        load_hierarchy("org/vit")
    with pytest.raises(RepositoryNotFoundError, match="The hierarchy needs the model 'org/missing'. Check the id"):
        load_hierarchy("org/missing")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "missing.yaml", "missing.json", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="No hierarchy file at"):
            load_hierarchy(path)


def test_what_a_hierarchy_of_the_hub_trusts_does_not_count(hub: HubServer, tiny_sklearn: str, caplog: Any) -> None:
    types = ["sklearn.tree._tree.Tree", "os.system"]
    write_hierarchy(hub, {"model": "low", "name": "low", "trusted_types": types}, **read_folder(tiny_sklearn, "low/"))
    assert load_hierarchy("org/weak").teachers[0].trusted_types == ()
    assert "`load_hierarchy('org/weak', trust_types=['os.system', 'sklearn.tree._tree.Tree'])`" in caplog.text
    caplog.clear()
    assert load_hierarchy("org/weak", trust_types=types).teachers[0].trusted_types == tuple(types)
    assert not caplog.records
    assert load_hierarchy("org/weak", trust_types=types[:1]).teachers[0].trusted_types == tuple(types[:1])
    # A type is trusted by its whole name, and not as a part of another text.
    assert load_hierarchy("org/weak", trust_types="posix.os.system").teachers[0].trusted_types == ()


def test_a_hierarchy_and_its_teachers_work_offline(
    hub: HubServer, hierarchy: TeacherHierarchy, tiny_timm: str, tiny_labels: tuple[str, ...]
) -> None:
    push_all(hub, hierarchy, tiny_timm)
    expected = load_hierarchy("someone/weak")
    facts = load_teacher(expected.teachers[0], tiny_labels, "cpu").facts
    with hub.down():
        assert load_hierarchy("someone/weak") == expected
        assert load_teacher(expected.teachers[0], tiny_labels, "cpu").facts == facts
        with pytest.raises(UNREACHABLE, match="Teacher 'pixels' needs the model 'someone/weak'"):
            load_teacher(expected.teachers[2], tiny_labels, "cpu")


# ── the recipe ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_recipe_pushes_teachers_and_finds_them_again(
    hub: HubServer, tmp_path: Path, monkeypatch: Any, tiny_image_dataset: Dataset
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "recipes"))
    import task_arguments
    import train_teachers

    monkeypatch.chdir(tmp_path)
    labels = tiny_image_dataset.features["label"].names
    DatasetDict({"train": tiny_image_dataset}).save_to_disk("data")
    (tmp_path / "c.yaml").write_text(
        yaml.safe_dump(
            {
                "dataset": "data",
                "output_dir": "out",
                "num_teacher_examples": 20,
                "num_pool_examples": 10,
                "teacher_kind": "sklearn",
                "teacher_model": "linear_model.LogisticRegression",
                "level_sizes": [1, 2],
                "teacher_feature": {"size": [8, 8], "mode": "RGB"},
                "use_cpu": True,
            }
        )
    )

    def main(*options: str) -> None:
        monkeypatch.setattr("sys.argv", ["train_teachers.py", "--config", "c.yaml", "--teachers_dir", "t", *options])
        train_teachers.main()

    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    with pytest.raises(PermissionError, match="needs a token"):
        main("--push_to_hub", "--hub_model_id", "weak")
    assert not (tmp_path / "t").exists()
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    main("--push_to_hub", "--hub_model_id", "weak")

    files = hub.files("someone/weak")
    assert {name.split("/")[0] for name in files if "/" in name} == {"generalist", "level-1-0", "level-1-1"}
    assert "accuracy %" in files["README.md"].decode()
    args = task_arguments.TeacherArguments(teachers_dir="someone/weak", teachers_revision="main")
    found = train_teachers.train_teachers(tiny_image_dataset, labels, args, tmp_path / "unused", 0)
    assert [teacher.subfolder for teacher in found.teachers] == list(found.names)
    assert not (tmp_path / "unused").exists()
    with pytest.raises(ValueError, match="The teachers 'someone/weak' must be of the data's labels"):
        train_teachers.train_teachers(tiny_image_dataset, labels[::-1], args, tmp_path / "unused", 0)

    # Pushed by a later run, whose test examples they may have seen: without a number.
    main("--push_to_hub", "--hub_model_id", "later")
    assert "accuracy %" not in hub.files("someone/later")["README.md"].decode()


@pytest.mark.parametrize(
    ("place", "revision", "expected"),
    [("me/weak", "main", True), ("me/weak", None, False), ("./weak", "main", False), ("a/b/c", "main", False)],
)
def test_which_teachers_dir_is_an_id(place: str, revision: str | None, expected: bool, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "recipes"))
    import task_arguments
    import train_teachers

    assert (
        train_teachers.is_on_hub(task_arguments.TeacherArguments(teachers_dir=place, teachers_revision=revision))
        is expected
    )


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        *[
            (model, "must be a folder of that repository or a Hub id, got `model`")
            for model in ("../mine", "./mine", "/etc", "~/mine", "file:///etc", "http://x.example/y", "hf://org/x")
            + (
                "C:\\x",
                "\\\\x\\y",
                "local-dir:mine",
                "hf-hub:/etc",
                "datasets/org/x",
                ".",
                "a" * 5000,
                "a/" + "é" * 200,
            )
        ],
        *[
            (model, "must be a Hub id, .* and there is a folder of that name here, which was not opened")
            for model in ("mine", "org/mine", "hf-hub:mine")
        ],
    ],
)
def test_a_stranger_s_hierarchy_opens_nothing_here(hub, tmp_path, monkeypatch, tiny_vit, tiny_labels, model, sentence):
    monkeypatch.chdir(tmp_path)
    for folder in ("mine", "org/mine"):
        shutil.copytree(tiny_vit, tmp_path / folder)
    facts = {"labels": list(tiny_labels), "teachers": [{"model": model, "name": "t"}]}
    hub.create("someone/weak", {"hierarchy.json": json.dumps(facts).encode()})
    with pytest.raises(ValueError, match=sentence):
        load_hierarchy("someone/weak")

"""Models that somebody made to do harm: nothing of them runs, and each is one sentence that names the model."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_LABELS
from hub_server import HubServer
from safetensors.torch import load_file, save_file

from hf_cosupervise import Teacher, load_student
from hf_cosupervise.files import parse_json
from hf_cosupervise.models.files import check_config
from hf_cosupervise.teachers.kinds.loading import load_teacher

Spoil = Callable[[Path], Any]
WEIGHTS, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
PART = "model-00001-of-00001.safetensors"


class Payload:
    """What makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def marker(folder: Path) -> Path:
    return folder.parent / "it-ran"


def with_pickle(name: str) -> Spoil:
    return lambda folder: (folder / name).write_bytes(pickle.dumps(Payload(marker(folder))))


def with_bytes(name: str, content: bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(content)


def with_torch(name: str) -> Spoil:
    return lambda folder: torch.save({"a": Payload(marker(folder))}, folder / name)


def with_header(content: bytes) -> Spoil:
    return with_bytes(WEIGHTS, len(content).to_bytes(8, "little") + content)


def with_json(name: str, **changes: Any) -> Spoil:
    """Change the file; `{folder}` in a text is where the model is."""

    def spoil(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text()) if path.is_file() else {}
        added = json.dumps(changes).replace("{folder}", str(folder))
        path.write_text(json.dumps(content | json.loads(added)))

    return spoil


def with_index(names: Any, part: Spoil | None = None) -> Spoil:
    """Weights in one part, and an index that names `names` instead, for every weight."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).rename(folder / PART)
        with_torch("vocab.txt")(folder)
        parts = names if isinstance(names, list) else {} if names is None else dict.fromkeys(tensors, names)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": parts}))
        if part is not None:
            part(folder)

    return spoil


def both(*spoils: Spoil) -> Spoil:
    return lambda folder: [spoil(folder) for spoil in spoils]


def config(**changes: Any) -> Spoil:
    return with_json("config.json", **changes)


def args(**changes: Any) -> Spoil:
    return config(model_args=changes)


def raw(name: str, text: str) -> Spoil:
    """The file with one more entry, as it stands."""
    return lambda folder: (folder / name).write_text(f'{{"zzz": {text}, ' + (folder / name).read_text().strip()[1:])


def with_dtype(dtype: torch.dtype) -> Spoil:
    """The weights as numbers of another kind, of which libraries would make floats."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        save_file({name: value.to(dtype) for name, value in tensors.items()}, folder / WEIGHTS, {"format": "pt"})

    return spoil


def with_value(value: float) -> Spoil:
    """A weight in the middle of the model that is no finite number."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        name = min(name for name in tensors if tensors[name].ndim > 1 and "classifier" not in name)
        tensors[name].view(-1)[-1] = value
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    return spoil


def drop_weights(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({"fc.bias": tensors["fc.bias"]}, folder / WEIGHTS)


DEEP = "[" * 5000 + "]" * 5000
PROCESSOR = "preprocessor_config.json"
DAMAGED_BY = "must have whole weights in '.*', got a damaged file: `.*` in 'model.safetensors' "
DAMAGED = "must have whole weights in '.*', got a damaged file: '{}' is not of the format that its name says"


def sizes(name: str) -> str:
    return f"must be built from sizes and kinds of layers, got `{name}` in `.*model_args` in its 'config.json'"


def elsewhere(name: str, file: str = "config.json") -> str:
    return f"must consist of its own files, got `{name}` in its '{file}': .*, which leads elsewhere"


def kernel(name: str) -> str:
    return f"must run by code that is installed, got `{name}` in its 'config.json': .*, which is not or would be"


def no_json(file: str, reason: str) -> str:
    return f"must have a '{file}' that is JSON, got: {reason}"


# What is wrong, the model that it is wrong in, how, and the sentence.
ROWS: list[tuple[str, str, Spoil, str]] = [
    # ── other bytes than safetensors
    ("timm-pickle", "timm", with_pickle(WEIGHTS), DAMAGED.format(WEIGHTS)),
    ("vit-pickle", "vit", with_pickle(WEIGHTS), DAMAGED.format(WEIGHTS)),
    ("bert-pickle", "bert", with_pickle(WEIGHTS), DAMAGED.format(WEIGHTS)),
    ("timm-torch-archive", "timm", with_torch(WEIGHTS), DAMAGED.format(WEIGHTS)),
    ("vit-torch-archive", "vit", with_torch(WEIGHTS), DAMAGED.format(WEIGHTS)),
    ("vit-nothing", "vit", with_bytes(WEIGHTS, b""), DAMAGED.format(WEIGHTS)),
    ("vit-seven-bytes", "vit", with_bytes(WEIGHTS, b"\2\0\0\0\0\0\0"), DAMAGED.format(WEIGHTS)),
    ("vit-header-without-end", "vit", with_bytes(WEIGHTS, b"\xff" * 8 + b"{}"), DAMAGED.format(WEIGHTS)),
    ("vit-header-is-a-list", "vit", with_header(b"[]"), DAMAGED.format(WEIGHTS)),
    ("vit-header-is-no-json", "vit", with_header(b"no json"), DAMAGED.format(WEIGHTS)),
    ("vit-header-twice", "vit", with_header(b'{"a": 1, "a": 2}'), DAMAGED.format(WEIGHTS) + ": the key 'a' twice"),
    ("vit-header-deep", "vit", with_header(DEEP.encode()), DAMAGED.format(WEIGHTS) + ": .* nested more than 64 deep"),
    ("adapter-pickle", "adapter", with_pickle(ADAPTER), DAMAGED.format(ADAPTER)),
    ("adapter-torch", "adapter", with_torch(ADAPTER), DAMAGED.format(ADAPTER)),
    # ── an index that names other files
    ("index-text", "vit", with_index("vocab.txt"), f"the parts of its weights in '{INDEX}', .* got 'vocab.txt'"),
    ("index-up", "vit", with_index(f"../{PART}"), f"the parts of its weights in '{INDEX}', .* got '../model"),
    ("index-root", "vit", with_index(f"/tmp/{PART}"), f"the parts of its weights in '{INDEX}', .* got '/tmp/model"),
    ("index-bin", "vit", with_index("pytorch_model-00001-of-00001.bin"), "the parts of its .* got 'pytorch_mo"),
    ("index-other", "bert", with_index("other.safetensors"), "the parts of its weights .* got 'other.safetensors'"),
    ("index-line", "bert", with_index(f"{PART}\n"), r"the parts of its weights .* got 'model-.*\\n'"),
    ("index-number", "vit", with_index(7), "the parts of its weights .* got 7. Save"),
    ("index-list", "vit", with_index(["vocab.txt"]), "the parts of its weights .* got none. Save"),
    ("index-empty", "vit", with_index(None), "the parts of its weights .* got none. Save"),
    ("index-lost", "vit", with_index("model-00001-of-00002.safetensors"), "all parts of its weights, got .* without"),
    ("index-pickle", "vit", with_index(PART, with_pickle(PART)), DAMAGED.format(PART)),
    ("index-beside-skops", "vit", with_index("vocab.txt", with_bytes("model.skops", b"")), "parts .* 'vocab.txt'"),
    ("index-deep", "vit", with_index(PART, with_bytes(INDEX, DEEP.encode())), no_json(INDEX, "objects or lists nest")),
    ("no-index", "vit", with_index(PART, lambda folder: (folder / INDEX).unlink()), f"parts of .* without .'{INDEX}'"),
    ("distributed", "vit", with_bytes("shard-00001-model-00001-of-00001.safetensors", b""), "got the distributed"),
    # ── arguments of timm
    (
        "checkpoint",
        "timm",
        both(with_torch("vocab.txt"), args(checkpoint_path="{folder}/vocab.txt")),
        sizes("checkpoint_path"),
    ),
    ("strict", "timm", both(args(pretrained_strict=False), drop_weights), sizes("pretrained_strict")),
    ("pretrained", "timm", args(pretrained=True), sizes("pretrained")),
    ("features", "timm", args(features_only=True), sizes("features_only")),
    ("cache", "timm", args(cache_dir="{folder}"), sizes("cache_dir")),
    ("overlay", "timm", args(pretrained_cfg_overlay={"file": "{folder}/vocab.txt"}), sizes("pretrained_cfg_overlay")),
    ("cfg", "timm", args(pretrained_cfg={"url": "http://x"}), sizes("pretrained_cfg")),
    ("scriptable", "timm", args(scriptable=True), sizes("scriptable")),
    ("new-argument", "timm", args(num_classes=4, of_tomorrow=1), sizes("of_tomorrow")),
    ("value-path", "timm", args(norm_layer="{folder}/vocab.txt"), "numbers and names of layers, got `norm_layer` in"),
    ("value-object", "timm", args(act_layer=[["a/b"]]), "numbers and names of layers, got `act_layer` in .*: 'a/b'"),
    ("arguments-list", "timm", config(model_args=["checkpoint_path"]), "must have a JSON object as `model_args` in"),
    ("architecture-hub", "timm", config(architecture="hf-hub:evil/model"), "an architecture of timm, .* leads else"),
    ("architecture-dir", "timm", config(architecture="local-dir:/tmp"), "an architecture of timm, .* leads elsewhere"),
    (
        "nested-checkpoint",
        "vit",
        config(vision_config={"model_args": {"checkpoint_path": "/tmp/x"}}),
        sizes("checkpoint_path"),
    ),
    (
        "nested-backbone",
        "vit",
        config(backbone_config={"a": [{"backbone": "hf-hub:evil/model"}]}),
        r"architecture of timm, got `backbone_config.a.backbone` in",
    ),
    # ── kernels, that is code, by name
    ("kernel", "vit", config(attn_implementation="evil/kernel"), kernel("attn_implementation")),
    ("kernel-revision", "bert", config(_attn_implementation="evil/kernel@main:f"), kernel("_attn_implementation")),
    ("kernel-internal", "vit", config(_attn_implementation_internal="a/b"), kernel("_attn_implementation_internal")),
    ("kernel-paged", "bert", config(attn_implementation="paged|evil/kernel"), kernel("attn_implementation")),
    ("kernel-timm", "timm", config(attn_implementation="evil/kernel"), kernel("attn_implementation")),
    ("kernel-experts", "bert", config(experts_implementation="sonicmoe"), kernel("experts_implementation")),
    (
        "kernel-nested",
        "vit",
        config(text_config={"a": {"attn_implementation": "a/b"}}),
        kernel("text_config.a.attn_implementation"),
    ),
    (
        "kernel-parts",
        "vit",
        config(attn_implementation={"": "sdpa", "vision_config": "a/b"}),
        kernel("attn_implementation"),
    ),
    ("kernel-flash-missing", "vit", config(attn_implementation="flash_attention_3"), kernel("attn_implementation")),
    ("kernel-number", "vit", config(attn_implementation=1), kernel("attn_implementation")),
    # ── other values that lead to files, repositories or code
    ("quantised", "bert", config(quantization_config={"quant_method": "mxfp4"}), "must have plain weights, .*'mxfp4'"),
    (
        "quantised-inside",
        "vit",
        config(text_config={"quantization_config": {"quant_method": "fp8"}}),
        "must have plain weights, got `text_config.quantization_config` in",
    ),
    (
        "other-config",
        "vit",
        both(with_json("config.4.0.json", attn_implementation="a/b"), config(configuration_files=["config.4.0.json"])),
        elsewhere("configuration_files"),
    ),
    ("other-weights", "vit", config(transformers_weights="adapter_model.bin"), elsewhere("transformers_weights")),
    ("backbone-weights", "vit", config(use_pretrained_backbone=True), elsewhere("use_pretrained_backbone")),
    ("backbone-arguments", "vit", config(backbone_kwargs={"checkpoint_path": "x"}), elsewhere("backbone_kwargs")),
    (
        "tokenizer-auto",
        "bert",
        with_json("tokenizer_config.json", tokenizer_class="AutoTokenizer"),
        "must be read by a class of its own kind, got `tokenizer_class` in its 'tokenizer_config.json': "
        "'AutoTokenizer'",
    ),
    (
        "tokenizer-model",
        "bert",
        with_json("tokenizer_config.json", tokenizer_class="AutoModel"),
        "must be read by a class of its own kind, got `tokenizer_class`",
    ),
    (
        "tokenizer-fast",
        "bert",
        with_json("tokenizer_config.json", tokenizer_class="AutoTokenizerFastFast"),
        "must be read by a class of its own kind, got `tokenizer_class`",
    ),
    ("tokenizer-in-config", "bert", config(tokenizer_class="RagRetriever"), "a class of its own kind, .*'RagRetri"),
    (
        "tokenizer-inputs",
        "bert",
        with_json("tokenizer_config.json", init_inputs=["/etc/passwd"]),
        elsewhere("init_inputs", "tokenizer_config.json"),
    ),
    (
        "tokenizer-files",
        "bert",
        with_json("tokenizer_config.json", fast_tokenizer_files=["../tokenizer.1.0.json"]),
        elsewhere("fast_tokenizer_files", "tokenizer_config.json"),
    ),
    (
        "processor-auto",
        "vit",
        with_json("preprocessor_config.json", image_processor_type="AutoImageProcessor"),
        "must be read by a class of its own kind, got `image_processor_type` in its 'preprocessor_config.json'",
    ),
    (
        "processor-model",
        "vit",
        with_json("preprocessor_config.json", image_processor_type="AutoModel"),
        "must be read by a class of its own kind, got `image_processor_type`",
    ),
    (
        "processor-nested",
        "vit",
        with_json("processor_config.json", image_processor={"feature_extractor_type": "Trainer"}),
        "must be read by a class of its own kind, got `image_processor.feature_extractor_type`",
    ),
    *(
        (
            f"tokenizer-{file[:4]}-{key}",
            "bert",
            with_json(file, **{key: "{folder}/vocab.txt"}),
            elsewhere(key, file),
        )
        for file, keys in {
            "tokenizer_config.json": ("vocab_file", "merges_file", "spm_file", "monolingual_vocab_file"),
            "special_tokens_map.json": ("vocab_file", "tokenizer_file", "merges_file"),
        }.items()
        for key in keys
    ),
    *(
        (f"processor-{key}", "vit", with_json(PROCESSOR, **{key: "{folder}"}), elsewhere(key, PROCESSOR))
        for key in ("repo_path", "class_info_file")
    ),
    *(
        (f"processor-{key}", "vit", with_json(PROCESSOR, size={key: 10**10}), f"at most 67,108,864, got `size.{key}`")
        for key in ("min_pixels", "max_pixels", "shortest_edge", "longest_edge")
    ),
    # ── weights that are none
    *(
        (
            f"{base}-{str(dtype)[6:]}",
            base,
            with_dtype(dtype),
            f"{DAMAGED_BY}holds no floating-point numbers but {name}",
        )
        for base, dtype, name in [
            ("vit", torch.int8, "I8"),
            ("bert", torch.int64, "I64"),
            ("timm", torch.int32, "I32"),
            ("bert", torch.bool, "BOOL"),
            ("vit", torch.complex64, "C64"),
            ("bert", torch.float8_e4m3fn, "F8_E4M3"),
        ]
    ),
    *(
        (f"{base}-{value}", base, with_value(value), "must have finite weights, got NaN or infinity in `")
        for base in ("vit", "bert", "timm")
        for value in (float("nan"), float("inf"))
    ),
    (
        "adapter-cache",
        "adapter",
        with_json("adapter_config.json", corda_config={"cache_file": "{folder}/vocab.txt"}),
        elsewhere("corda_config.cache_file", "adapter_config.json"),
    ),
    (
        "adapter-shadow",
        "adapter",
        with_json("adapter_config.json", shadow_model="evil/model"),
        elsewhere("shadow_model", "adapter_config.json"),
    ),
    ("adapter-kernel", "adapter", with_json("config.json", attn_implementation="a/b"), kernel("attn_implementation")),
    # ── JSON that is no JSON, or without measure
    *(
        (f"{base}-{kind}-{file}", base, raw(file, text), no_json(file, reason))
        for base, file in [
            ("vit", "config.json"),
            ("timm", "config.json"),
            ("vit", "preprocessor_config.json"),
            ("bert", "tokenizer_config.json"),
            ("bert", "tokenizer.json"),
            ("adapter", "adapter_config.json"),
        ]
        for kind, text, reason in [
            ("deep", DEEP, "objects or lists nested more than 64 deep"),
            ("less-deep", "[" * 100 + "]" * 100, "objects or lists nested more than 64 deep"),
            ("digits", "1" * 5000, "a number of 5,000 digits"),
            ("nan", "NaN", "NaN, which is no number"),
            ("infinity", "[-Infinity]", "-Infinity, which is no number"),
            ("large", "1e999", "the number '1e999', which is too large"),
            ("twice", '{"a": 1, "a": 1}', "the key 'a' twice in one object"),
            ("cut", "[1", "Expecting"),
        ]
    ),
    ("json-list", "vit", with_bytes("config.json", b"[1]"), "a 'config.json' that is a JSON object, got a list"),
    ("json-text", "timm", with_bytes("config.json", b'"a"'), "a 'config.json' that is a JSON object, got a str"),
    ("json-latin", "vit", with_bytes("config.json", b'{"a": "\xe9"}'), no_json("config.json", "'utf-8' codec")),
    ("json-vocabulary", "bert", with_bytes("tokenizer.json", b"[]"), "a 'tokenizer.json' that is a JSON object"),
]


def make(base: str, tmp_path: Path, request: pytest.FixtureRequest, spoil: Spoil) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(request.getfixturevalue(f"tiny_{base}"), folder)
    spoil(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_adapter(tmp_path_factory: pytest.TempPathFactory, tiny_vit: str) -> str:
    """Folder of a LoRA adapter for the tiny ViT."""
    folder = tmp_path_factory.mktemp("tiny") / "adapter"
    save_adapter(folder, tiny_vit)
    return str(folder)


def save_adapter(folder: Path, base: str) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(base)
    lora = LoraConfig(r=2, target_modules="all-linear", modules_to_save=["classifier"])
    get_peft_model(model, lora).save_pretrained(str(folder))


def load_low(model: Path | str, **values: Any) -> Any:
    return load_teacher(Teacher(str(model), name="low", **values), TINY_LABELS, "cpu")


def refuses(load: Callable[[], Any], sentence: str, folder: Path) -> None:
    with pytest.raises((OSError, ValueError), match=sentence) as caught:
        load()
    assert not marker(folder).exists()
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(("base", "spoil", "sentence"), [pytest.param(*row[1:], id=row[0]) for row in ROWS])
def test_a_hostile_teacher_is_one_clear_error(base, spoil, sentence, tmp_path, request) -> None:
    folder = make(base, tmp_path, request, spoil)
    refuses(lambda: load_low(folder), f"^Teacher 'low' .*{sentence}", folder)


@pytest.mark.parametrize(("base", "spoil", "sentence"), [pytest.param(*row[1:], id=row[0]) for row in ROWS])
def test_a_hostile_student_is_one_clear_error(base, spoil, sentence, tmp_path, request) -> None:
    folder = make(base, tmp_path, request, spoil)
    refuses(lambda: load_student(folder, TINY_LABELS), f"^The student .*{sentence}", folder)


# ── files that are merely wrong ─────────────────────────────────────────────────────────────────────────────────────


def one(name: str, field: str, *values: Any) -> list[tuple[str, Spoil]]:
    """One entry of a file with a value of the wrong kind, for each of the values."""
    return [(f"{field}-{str(value)[:12]}", with_json(name, **{field: value})) for value in values]


def prepared(field: str, *values: Any) -> list[tuple[str, Spoil]]:
    """One entry of what timm says of its inputs."""

    def spoil(value: Any) -> Spoil:
        def change(folder: Path) -> None:
            content = json.loads((folder / "config.json").read_text())
            content["pretrained_cfg"][field] = value
            (folder / "config.json").write_text(json.dumps(content))

        return change

    return [(f"{field}-{str(value)[:12]}", spoil(value)) for value in values]


HUGE = 10**9
BUILD, KIND = "must have a (model|configuration) that its library can build", "that its library can build, .* '{}'"
WRONG: list[tuple[str, list[tuple[str, Spoil]], str]] = [
    (
        "vit",
        one("config.json", "id2label", 3, "a", [], list(TINY_LABELS), {"a": "b"}, {"-1": "b"}, {"00": "b"}),
        "as `id2label`",
    ),
    *(
        ("vit", one("config.json", field, "16", None, [16.5], {"a": 1}, 1.5), KIND.format(field))
        for field in ("hidden_size", "image_size", "num_hidden_layers", "num_attention_heads")
    ),
    *(
        ("vit", one("config.json", field, 0, -1, -HUGE), f"at (least|most) .*, got `{field}` in its 'config.json'")
        for field in ("hidden_size", "image_size", "num_hidden_layers", "num_attention_heads")
    ),
    ("vit", one("config.json", "num_hidden_layers", HUGE, 10**30, 10_001), "at most 10,000, got `num_hidden_layers`"),
    ("vit", one("config.json", "num_hidden_layers", 1000, 10_000), "parameters .*, for weights of 25 tensors"),
    ("vit", one("config.json", "hidden_size", HUGE, 10**6), "parameters .*, for weights of 25 tensors"),
    ("bert", one("config.json", "vocab_size", HUGE, 10**8), "parameters of .*, for weights of"),
    ("bert", one("config.json", "vocab_size", "16", None, -1, [16], 10**30), BUILD),
    ("bert", one("config.json", "hidden_act", "x", None, -1, [16]), BUILD),
    ("bert", one("config.json", "model_type", "x", None, -1, [16], {"a": 1}), "(of a type that|kind of)"),
    (
        "timm",
        one("config.json", "architecture", "x", None, -1, {"a": 1}),
        "(a model that timm .* knows|config.* 'architecture')",
    ),
    ("timm", one("config.json", "pretrained_cfg", "x", -1, [16], HUGE), "(config|its image proc|object as `pretr)"),
    (
        "timm",
        one("config.json", "num_classes", "x", [16], {"a": 1}, HUGE),
        "(as `label_names`|that its library|at mo)",
    ),
    *(
        ("timm", [(f"{field}-{value}", args(**{field: value})) for value in ("x", -1, [HUGE], HUGE)], sentence)
        for field, sentence in (
            ("layers", "(a model that timm|that its library can build|at most 10,000, got `model_args.layers`)"),
            ("stem_width", "(a model that timm .* knows|that its library can build)"),
        )
    ),
    ("timm", prepared("mean", "x", [16, 1], [16, 1], {"a": 1}), "(preparation|image processor|prepare images)"),
    ("timm", prepared("input_size", "x", -1, [16], {"a": 1}, [3, HUGE, HUGE]), "(preparation|processor|images|size)"),
    *(
        ("adapter", one("adapter_config.json", field, *values), "must be an adapter that (fits|can be merged)")
        for field, values in {
            "r": ("8", None, -1, [3], {"a": "b"}, 3, HUGE),
            "target_modules": (3, None, -1, [3], "x"),
            "lora_alpha": ("8", None, [3], {"a": "b"}),
            "lora_dropout": ("8", None, [3], {"a": "b"}),
            "peft_type": ("x", None, 3, [3], {"a": "b"}),
        }.items()
    ),
    (
        "vit",
        one("preprocessor_config.json", "size", "x", [16], -1, {"a": 1}, None),
        "(image processor|prepare images)",
    ),
    ("vit", one("preprocessor_config.json", "size", HUGE, {"height": HUGE, "width": 8}), "at most 8,192, got `size"),
    ("vit", one("preprocessor_config.json", "image_mean", "x", None, {"a": 1}, [[]]), "(processor|prepare images)"),
    ("vit", one("preprocessor_config.json", "resample", "x", -1, [16], {"a": 1}, HUGE), "(processor|prepare images)"),
    ("bert", one("tokenizer_config.json", "model_max_length", "x", 0, -1, [16], {"a": 1}), "`model_max_length`"),
    ("bert", one("tokenizer.json", "model", "x", None, -1, [16], {"a": 1}), "must come with (its tok|the voc)"),
    (
        "bert",
        one("tokenizer.json", "model", {"type": "BPE", "vocab": {}, "merges": []}, {"type": "Unigram", "vocab": []}),
        "must come with (its tokenizer|the vocabulary)",
    ),
    ("bert", one("tokenizer.json", "added_tokens", "x", -1, [16], {"a": 1}), "must come with its tokenizer"),
]
WRONG_ROWS = [
    pytest.param(base, spoil, sentence, id=f"{base}-{name}")
    for base, spoils, sentence in WRONG
    for name, spoil in spoils
]


@pytest.mark.parametrize("door", ["teacher", "student"])
@pytest.mark.parametrize(("base", "spoil", "sentence"), WRONG_ROWS)
def test_a_wrong_value_is_one_clear_error(base, spoil, sentence, door, tmp_path, request) -> None:
    folder = make(base, tmp_path, request, spoil)
    started = time.monotonic()
    if door == "teacher":
        refuses(lambda: load_low(folder), f"^(Teacher|.* of teacher|The kind of teacher) 'low' .*{sentence}", folder)
    else:
        refuses(lambda: load_student(folder, TINY_LABELS), f"^The (kind of the )?student .*{sentence}", folder)
    assert time.monotonic() - started < 10  # a second alone; this machine may be busy


NAMES = {str(position): name for position, name in enumerate(TINY_LABELS)}
FIRST, SECOND = TINY_LABELS[:2]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"id2label": {"0": "a", "1": "b", "2": "c"}}, r"`classifier.bias` of shape \(4,\) for \(3,\) .* `id2label`"),
        ({"id2label": {**NAMES, "4": "e"}}, r"`classifier.bias` of shape \(4,\) for \(5,\) .* `id2label`"),
        ({"id2label": None}, r"`classifier.bias` of shape \(4,\) for \(2,\) .* `id2label`"),
        ({"num_labels": 7}, r"`classifier.bias` of shape \(4,\) for \(7,\) .* `id2label`"),
        ({"id2label": {}}, "at least two labels, got 0"),
        ({"id2label": dict(zip("1234", TINY_LABELS, strict=True))}, r"labels from 0 to 3 in `id2label`, got .*\[1, 2"),
        ({"id2label": dict(zip("0124", TINY_LABELS, strict=True))}, "labels from 0 to 3 in `id2label`, got .* 4"),
        ({"id2label": {**NAMES, "1": FIRST}}, f"a name of its own, got .'{FIRST}'. more than once"),
        ({"id2label": dict.fromkeys("0123", FIRST)}, f"a name of its own, got .'{FIRST}'. more than once"),
        ({"id2label": {**NAMES, "1": None}}, "name each of its labels in `id2label`, got"),
        ({"id2label": {**NAMES, "1": ["a"]}}, "name each of its labels in `id2label`, got"),
        ({"id2label": {**NAMES, "1": ""}}, "name each of its labels in `id2label`, got"),
        ({"label2id": {FIRST: 1}}, f"got '{FIRST}' as 0 in `id2label` and as 1 in `label2id`"),
        ({"label2id": {FIRST: 0, SECOND: "3"}}, f"got '{SECOND}' as 1 in `id2label` and as '3' in `label2id`"),
    ],
)
def test_names_unlike_the_head_are_one_clear_error(changes, sentence, tmp_path, request) -> None:
    folder = make("vit", tmp_path, request, config(**changes))
    refuses(lambda: load_low(folder), f"^Teacher 'low' must (.* )?{sentence}", folder)


def test_a_layer_that_the_configuration_leaves_out(tmp_path, tiny_vit) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    folder = Path(shutil.copytree(tiny_vit, tmp_path / "model"))
    deeper = ViTConfig.from_pretrained(tiny_vit, num_hidden_layers=3)
    ViTForImageClassification(deeper).save_pretrained(folder)
    load_low(folder)
    config(num_hidden_layers=1)(folder)
    refuses(lambda: load_low(folder), "^Teacher 'low' must be built with all of its layers, got .*1", folder)
    refuses(lambda: load_student(folder, TINY_LABELS), "^The student must be built with all of its layers", folder)


@pytest.mark.parametrize("labels", [{"label2id": {FIRST: "0"}}, {"label2id": {"LABEL_0": 1}}, {"label2id": None}])
def test_other_ways_to_number_labels_are_read(labels, tmp_path, request) -> None:
    load_low(make("vit", tmp_path, request, config(**labels)))


def test_a_student_may_have_had_any_labels(tmp_path, request) -> None:
    folder = make("vit", tmp_path, request, config(id2label={"0": "crane", "1": "crane"}, label2id={"crane": 1}))
    assert load_student(folder, TINY_LABELS)[0].config.id2label == dict(enumerate(TINY_LABELS))


def test_a_name_of_two_labels_may_be_mapped(tmp_path, request) -> None:
    folder = make("vit", tmp_path, request, config(id2label={**NAMES, "0": "crane", "1": "crane"}))
    load_low(folder, label_map={"crane": FIRST})


# ── the other doors ─────────────────────────────────────────────────────────────────────────────────────────────────

DOORS = [row for row in ROWS if row[0] in ("timm-pickle", "checkpoint", "strict", "architecture-hub", "kernel-timm")]


@pytest.mark.parametrize(("base", "spoil", "sentence"), [pytest.param(*row[1:], id=row[0]) for row in DOORS])
def test_a_hostile_model_of_timm_at_every_door(base, spoil, sentence, tmp_path, request, hub: HubServer) -> None:
    folder = make(base, tmp_path, request, spoil)
    hub.create("evil/model", {path.name: path.read_bytes() for path in folder.iterdir()})
    teacher = f"^Teacher 'low' .*{sentence}"
    for kind in ("timm", "transformers"):
        refuses(lambda kind=kind: load_low(folder, kind=kind), teacher, folder)
        refuses(lambda kind=kind: load_low("evil/model", kind=kind), teacher, folder)
    for model in (f"local-dir:{folder}", "hf-hub:evil/model"):
        refuses(lambda model=model: load_low(model), teacher, folder)
        refuses(lambda model=model: load_student(model, TINY_LABELS), f"^The student .*{sentence}", folder)
    refuses(lambda: load_student("evil/model", TINY_LABELS), f"^The student .*{sentence}", folder)


@pytest.mark.parametrize("spoil", [with_pickle(WEIGHTS), config(attn_implementation="a/b"), raw("config.json", DEEP)])
def test_a_hostile_base_of_an_adapter(spoil, tmp_path, tiny_vit) -> None:
    base = Path(shutil.copytree(tiny_vit, tmp_path / "base"))
    save_adapter(tmp_path / "adapter", str(base))
    spoil(base)
    sentence = "^The base model of the adapter '.*adapter' must .*(damaged|installed|nested)"
    refuses(lambda: load_low(tmp_path / "adapter"), sentence, base)
    refuses(lambda: load_student(tmp_path / "adapter", TINY_LABELS), sentence, base)


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("where", ["folder", "hub"])
def test_adapters_that_name_each_other_in_a_circle(where, length, tmp_path, hub: HubServer) -> None:
    names = [f"{tmp_path if where == 'folder' else 'org'}/{number}" for number in range(length)]
    for name, base in zip(names, names[1:] + names[:1], strict=True):
        content = json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}).encode()
        if where == "hub":
            hub.create(name, {"adapter_config.json": content})
        else:
            Path(name).mkdir()
            (Path(name) / "adapter_config.json").write_bytes(content)
    sentence = f"^The base model of the adapter '{names[0]}' must be a whole model, got another adapter, '.*'. Merge"
    refuses(lambda: load_low(names[0]), sentence, tmp_path)
    refuses(lambda: load_student(names[0], TINY_LABELS), sentence, tmp_path)


def test_the_revision_of_a_base_is_a_name(tmp_path, tiny_adapter) -> None:
    shutil.copytree(tiny_adapter, tmp_path / "model")
    with_json("adapter_config.json", revision=["main"])(tmp_path / "model")
    sentence = r"must be at a branch, tag or commit by name, got \['main'\]"
    refuses(lambda: load_low(tmp_path / "model"), sentence, tmp_path)


def empty_archive(folder: Path) -> None:
    with zipfile.ZipFile(folder / "model.skops", "w") as archive:
        archive.writestr("schema.json", "{}")


@pytest.mark.parametrize(
    "spoil",
    [
        with_pickle("model.skops"),
        with_torch("model.skops"),
        with_bytes("model.skops", b""),
        empty_archive,
        lambda folder: zipfile.ZipFile(folder / "model.skops", "w").close(),
    ],
)
def test_a_skops_file_that_is_none(spoil, tmp_path, request) -> None:
    folder = make("sklearn", tmp_path, request, spoil)
    refuses(lambda: load_low(folder), "^Teacher 'low' must have a 'model.skops' that skops wrote, got another", folder)


# ── what is not refused ─────────────────────────────────────────────────────────────────────────────────────────────


def test_what_timm_says_of_its_origin_is_not_followed(tmp_path, tiny_timm, tiny_image_dataset) -> None:
    folder = Path(shutil.copytree(tiny_timm, tmp_path / "model"))
    images = list(tiny_image_dataset["image"][:4])
    plain = load_low(tiny_timm)
    expected = plain(plain.prepare(images))
    described = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    with_pickle("vocab.txt")(folder)
    file = str(folder / "vocab.txt")
    origin = {"file": file, "url": f"file://{file}", "hf_hub_id": "evil/model", "custom_load": True, "source": "file"}
    config(pretrained_cfg=described | origin, model_args={"drop_rate": 0.1})(folder)
    teacher = load_low(folder)
    assert (teacher(teacher.prepare(images)) == expected).all()
    load_student(folder, TINY_LABELS)
    assert not marker(folder).exists()


@pytest.mark.parametrize("change", [{"in_chans": 1}, {"in_chans": 3, "drop_path_rate": 0.1}])
def test_arguments_of_a_timm_model_are_kept(change, tmp_path) -> None:
    import timm

    model = timm.create_model("test_resnet", num_classes=4, **change)
    names = {"label_names": list(TINY_LABELS), "model_args": change}
    timm.models.save_for_hf(model, str(tmp_path / "model"), model_config=names, safe_serialization=True)
    teacher = load_low(tmp_path / "model", kind="timm")
    for name, value in model.state_dict().items():
        assert torch.equal(teacher.model.state_dict()[name], value)
    size = json.loads((tmp_path / "model" / "config.json").read_text())["pretrained_cfg"]["input_size"][1:]
    from PIL import Image

    inputs = teacher.prepare([Image.new("RGB", (20, 20))])
    assert inputs.shape == (1, change["in_chans"], *size)


@pytest.mark.parametrize(
    ("base", "spoil", "sentence"),
    [
        ("bert", config(chunk_size_feed_forward=10**9), "a model that its library can build, .* chunk size"),
        ("bert", config(layer_norm_eps=-1e3), "answer by finite probabilities, got .nan"),
        ("vit", config(layer_norm_eps=-1e3), "answer by finite probabilities, got .nan"),
        ("vit", with_json(PROCESSOR, image_std=[0, 0, 0]), "answer by finite probabilities, got .nan"),
        ("vit", with_json(PROCESSOR, rescale_factor=0), "be able to prepare images, got ZeroDivisionError"),
        ("vit", with_json(PROCESSOR, size={"height": 16, "width": 16}), "a model that its library can build, .*16"),
        ("bert", with_json("tokenizer_config.json", model_input_names="x"), "able to prepare texts, got ValueError"),
        ("bert", with_json("tokenizer_config.json", model_input_names=["token_type_ids"]), "able to prepare texts"),
        ("bert", with_json("tokenizer_config.json", model_max_length=True), "got `model_max_length` True"),
    ],
)
def test_a_fault_of_a_teacher_is_none_of_a_row(base, spoil, sentence, tmp_path, request) -> None:
    folder = make(base, tmp_path, request, spoil)
    refuses(lambda: load_low(folder), f"^Teacher 'low' must (.* )?{sentence}", folder)


def test_answers_are_read_by_their_names_whatever_a_configuration_says(tmp_path, tiny_bert) -> None:
    folder = Path(shutil.copytree(tiny_bert, tmp_path / "model"))
    plain = load_low(tiny_bert)
    config(return_dict=False, output_attentions=True, output_hidden_states=True)(folder)
    texts = ["the animal barks", "six legs"]
    changed = load_low(folder)
    assert (plain(plain.prepare(texts)) == changed(changed.prepare(texts))).all()


def test_a_model_in_parts_loads(tmp_path, tiny_vit, tiny_image_dataset) -> None:
    folder = Path(shutil.copytree(tiny_vit, tmp_path / "model"))
    with_index(PART)(folder)
    plain, parts = load_low(tiny_vit), load_low(folder)
    images = list(tiny_image_dataset["image"][:4])
    assert (plain(plain.prepare(images)) == parts(parts.prepare(images))).all()
    load_student(folder, TINY_LABELS)


@pytest.mark.parametrize(
    "content",
    [
        {"attn_implementation": None, "_attn_implementation": "eager", "_attn_implementation_autoset": True},
        {"attn_implementation": {"": "sdpa", "text_config": "flex_attention"}, "experts_implementation": "grouped_mm"},
        {"cache_implementation": "static", "_name_or_path": "/home/me/model", "name_or_path": "org/model"},
        {"tokenizer_class": "BertTokenizerFast", "tokenizer_file": "/root/tokenizer.json", "init_inputs": []},
        {"tokenizer_class": "TokenizersBackend", "image_processor_type": "ViTImageProcessorFast"},
        {"feature_extractor_type": "ViTFeatureExtractor", "auto_map": {"AutoConfig": "code.Config"}},
        {"quantization_config": None, "transformers_weights": None, "backbone": "resnet50.a1_in1k"},
        {"size": {"shortest_edge": 65536, "longest_edge": 16777216}, "num_experts": 512, "num_labels": 21843},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        {"architecture": "vit_small_patch16_224.augreg", "model_args": {"img_size": [32, 32], "class_token": False}},
        {"peft_type": "LORA", "auto_mapping": {"parent_library": "a.b"}, "loftq_config": {}, "corda_config": None},
    ],
    ids=lambda content: next(iter(content)),
)
def test_what_is_usual_is_accepted(content) -> None:
    check_config({"a": [content], **content}, "Teacher 'low'", "config.json")


def test_numbers_of_a_usual_size_are_read() -> None:
    text = '{"model_max_length": 1000000000000000019884624838656, "a": [[[{"b": -0.5e-12}]]], "\\u00e9": "ü"}'
    assert parse_json(text.encode()) == json.loads(text)

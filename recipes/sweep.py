"""Train every classifier of transformers, and fifty of timm, and see that what is exported answers as it was trained.

    python recipes/sweep.py                                  # all, about twenty minutes on one core
    python recipes/sweep.py --kinds image timm --limit 10    # some
    python recipes/sweep.py --names bert clip levit_128s     # these

Each model is made small, with random weights, from its configuration class, saved, and loaded as a student from its
folder. It is trained for two steps as a probe, by LoRA and in full, exported, and loaded again without this package,
by `AutoModelFor…` or by timm alone. The table says what became of it: it works (the logits are equal to 1e-5
of the largest, also with merged adapters), it is refused in one sentence, or something went wrong inside.
`--output` writes it to a file, beside which another keeps what is done, so that a sweep goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import shutil
import signal
import sys
import tempfile
import textwrap
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import transformers
from datasets import Dataset
from PIL import Image
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ImageGPTImageProcessor,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Siglip2ImageProcessor,
    ViTImageProcessor,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

import hf_cosupervise
from hf_cosupervise import CoSupervisedConfig, CoSupervisedTrainer, PseudolabelPool, Teacher, TeacherHierarchy

KINDS, TRAININGS = ("image", "text", "timm"), ("probe", "lora", "full")
WORKS, REFUSED, WRONG, NOT_MADE = "works", "refused", "wrong", "not made"
LABELS = ("ant", "bee", "cat")
_TOLERANCE, _SECONDS, _NUM_ROWS, _LONGEST = 1e-5, 600, 8, 400
# A configuration that is not made small asks for gigabytes: that is an error of its own then, not the machine's.
_MEMORY = 8 * 2**30
_WORDS = ("the", "animal", "has", "six", "legs", "hums", "stings", "purrs", "often", "sleeps", "at", "night")
_SPECIALS = ("<pad>", "<s>", "</s>", "<unk>", "<mask>")

# What makes a model small, by the names that configurations give to it. The first that is there counts.
_SMALL: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "emb_dim", "dim", "embedding_size", "embed_dim", "projection_dim"), 32
    ),
    **dict.fromkeys(
        (
            *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"),
            *("num_decoder_layers", "num_encoder_layers"),
        ),
        2,
    ),
    **dict.fromkeys(
        (
            *("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"),
            *("decoder_attention_heads", "num_key_value_heads", "num_kv_heads"),
        ),
        4,
    ),
    **dict.fromkeys(
        (
            *("intermediate_size", "ffn_dim", "d_ff", "ffn_hidden_size", "encoder_ffn_dim", "decoder_ffn_dim"),
            *("n_inner", "dff", "d_inner", "feed_forward_size", "moe_intermediate_size"),
            *("shared_expert_intermediate_size",),
        ),
        64,
    ),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token"), 2),
    **{"vocab_size": 64, "image_size": 32, "head_dim": 8, "d_kv": 8},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0},
}
_PACKAGE = Path(hf_cosupervise.__file__).parent
_TITLES = {"image": "Image classifiers of transformers", "text": "Text classifiers of transformers", "timm": "timm"}
_INTRODUCTION = """Written by `sweep.py` on {day} with {versions}: {count} models, each trained as a probe, by LoRA and
in full, exported, and loaded again without this package; {summary}. Numbers in brackets are notes below.

What was exported answers as what was trained: the largest difference of logits, by the largest logit or 1, is
{differences}. Adapters are added to the weights they belong to, which rounds these once more in float32.

Checkpoints in half precision are trained in float32. Quantised ones are refused before they are read: "A student must
have weights that can learn, got quantised ones in … Use the checkpoint that they were made of." What is not made needs
a package that is not installed."""
# What a type needs beside that.
_WINDOWS = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "patch_size": 4}
_LATENT = {
    **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "head_dim": 8, "q_lora_rank": 16},
    **{"kv_lora_rank": 16, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
}
_OWN: dict[str, dict[str, Any]] = {
    "donut-swin": _WINDOWS,
    "swin": _WINDOWS,
    "swinv2": _WINDOWS,
    "hiera": {"image_size": [64, 64], "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2]},
    "mobilevit": {"image_size": 64},
    "mobilevitv2": {"image_size": 128},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320},
    "regnet": {"groups_width": 16},
    "bit": {"num_groups": 8},
    "cvt": {"embed_dim": [64, 192, 384], "depth": [1, 2, 10]},
    "hgnet_v2": {
        "stem_channels": [3, 8, 12],
        "stage_in_channels": [12, 32, 64, 64],
        "stage_mid_channels": [12, 16, 16, 16],
        "stage_out_channels": [32, 64, 64, 64],
        "hidden_sizes": [32, 64, 64, 64],
        "stage_num_blocks": [1, 1, 1, 1],
        "stage_numb_of_layers": [1, 1, 1, 1],
    },
    **dict.fromkeys(("axk1", "deepseek_v2", "deepseek_v3"), _LATENT),
    "mistral4": {**_LATENT, "head_dim": 16},
    "perceiver": {
        **{"num_latents": 4, "d_latents": 16, "d_model": 16, "num_self_attends_per_block": 1, "num_blocks": 1},
        **{"num_self_attention_heads": 2, "num_cross_attention_heads": 2},
    },
    "t5": {"decoder_start_token_id": 0},
    "reformer": {"axial_pos_embds_dim": [8, 24], "axial_pos_shape": [8, 8]},
    "xmod": {"default_language": "en_XX"},
    "esm": {"vocab_size": 64, "mask_token_id": 4, "pad_token_id": 0},
    "longformer": {"attention_window": 8},
    "layoutlmv3": {"coordinate_size": 5, "shape_size": 6, "input_size": 32, "visual_embed": False},
    "lilt": {"hidden_size": 48},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe"), {"head_dim": 8, "moe_topk": 1, "num_experts": 1}),
    "textnet": {"stem_out_channels": 16, "image_size": 64},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "mamba", "hybrid", "hybrid"]},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "hybrid"]},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 4},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": dict.fromkeys(
            ("full_attention", "sliding_attention"), {"rope_type": "default", "rope_theta": 10000.0}
        ),
    },
    "imagegpt": {"vocab_size": 65, "n_positions": 64},
}
# Lists of these are a quarter of what they are, or one layer a stage.
_WIDTHS, _DEPTHS = ("hidden_sizes", "embed_dim", "embed_dims", "stage_out_channels"), ("depths", "depth")
TIMM_NAMES = (
    *("test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_nfnet", "test_mambaout", "test_maxvit"),
    *("test_coatnet", "test_byobnet", "deit_tiny_distilled_patch16_224", "pit_ti_distilled_224", "levit_128s"),
    *("levit_conv_128s", "efficientformer_l1", "efficientformerv2_s0", "swiftformer_xs", "iformer_m_distilled"),
    *("pit_ti_224", "coat_tiny", "convit_tiny", "crossvit_9_240", "dla46_c", "edgenext_xx_small", "efficientvit_b0"),
    *("efficientvit_m0", "fastvit_t8", "ghostnet_050", "hardcorenas_a", "hgnetv2_b0", "lcnet_035", "mixer_s32_224"),
    *("mnasnet_small", "mobilenetv2_035", "mobilenetv3_small_050", "mobilenetv4_conv_small_035", "mobileone_s0"),
    *("mobilevit_xxs", "mobilevitv2_050", "poolformerv2_s12", "pvt_v2_b0", "regnetx_002", "repghostnet_050"),
    *("repvit_m0_9", "resnet10t", "resnetv2_18", "rexnet_100", "selecsls42", "seresnet18", "shvit_s1", "skresnet18"),
    *(
        "starnet_s050",
        "tiny_vit_5m_224",
        "tinynet_e",
        "visformer_tiny",
        "vit_tiny_patch16_224",
        "xcit_nano_12_p16_224",
    ),
)
# Decoders whose configurations take no other than a number.
_WITH_PAD = ("modernbert-decoder",)


@dataclass
class Case:
    """A model, and how it is saved into a folder."""

    kind: str
    name: str
    save: Callable[[Path], None]
    results: dict[str, tuple[str, str]] = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)


# ── models ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def small_settings(config: Any, own: dict[str, Any]) -> dict[str, Any]:
    """Settings that make a configuration small, of those that it has."""
    known = config.to_dict()
    settings = {name: value for name, value in _SMALL.items() if isinstance(known.get(name), int)}
    for name, value in known.items():
        if isinstance(value, list) and name in _WIDTHS:
            settings[name] = [max(8, size // 4) for size in value]
        if isinstance(value, list) and name in _DEPTHS:
            settings[name] = [1] * len(value)
    if isinstance(known.get("embed_dim"), int) and isinstance(known.get("num_heads"), list):
        settings.pop("hidden_size", None)  # which such models compute
    settings |= own
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None and name not in own:
            settings[name] = {**part.to_dict(), **small_settings(part, {})}
    num_layers = settings.get("num_hidden_layers")
    if num_layers and isinstance(known.get("layer_types"), list) and "layer_types" not in own:
        # Of each kind of layer one.
        settings["layer_types"] = [*dict.fromkeys(known["layer_types"]), *known["layer_types"]][:num_layers]
    return settings


def make_config(model_type: str) -> Any:
    """A small configuration of a type."""
    config_class = CONFIG_MAPPING[model_type]
    settings = small_settings(config_class(), _OWN.get(model_type, {}))
    return config_class(**settings, id2label=dict(enumerate(LABELS)), label2id={n: i for i, n in enumerate(LABELS)})


def save_image_model(model_type: str, folder: Path) -> None:
    """Save a small image classifier with its processor."""
    config = make_config(model_type)
    names = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[model_type]
    # Of several classes the first, such as that of Perceiver which learns its positions.
    model_class = getattr(transformers, names[0] if isinstance(names, tuple) else names)
    model_class(config).save_pretrained(folder)
    vision = getattr(config, "vision_config", None) or config
    size = getattr(vision, "image_size", None)
    size = 64 if not size or isinstance(size, dict) else size if isinstance(size, int) else size[0]
    processor = ViTImageProcessor(size={"height": size, "width": size})
    if model_type == "imagegpt":
        clusters = np.random.default_rng(0).uniform(-1, 1, (64, 3)).tolist()
        processor = ImageGPTImageProcessor(clusters=clusters, size={"height": 8, "width": 8})
    elif model_type == "siglip2":
        processor = Siglip2ImageProcessor(patch_size=vision.patch_size, max_num_patches=16)
    processor.save_pretrained(folder)


def save_text_model(model_type: str, folder: Path) -> None:
    """Save a small text classifier with its tokenizer; that of a decoder has no token to pad with, as is usual."""
    config = make_config(model_type)
    is_decoder = (
        model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    )
    is_decoder = is_decoder and not config.is_encoder_decoder and model_type not in _WITH_PAD
    if is_decoder:
        for part in (config, config.get_text_config()):
            part.pad_token_id = None
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    make_tokenizer(has_pad=not is_decoder).save_pretrained(folder)


def make_tokenizer(has_pad: bool) -> PreTrainedTokenizerFast:
    """A tokenizer of words."""
    vocab = {word: position for position, word in enumerate((*_SPECIALS, *_WORDS))}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<s>", vocab["<s>"]), ("</s>", vocab["</s>"])]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>", "unk_token": "<unk>"}
    if has_pad:
        tokens["pad_token"] = "<pad>"
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=32, model_input_names=names, **tokens)


def save_timm_model(name: str, folder: Path) -> None:
    """Save a timm model as timm does, for images as small as it takes."""
    model = timm.create_model(name, pretrained=False, num_classes=len(LABELS))
    if not model.pretrained_cfg.get("fixed_input_size"):
        model.pretrained_cfg.update(input_size=(3, 64, 64))
    folder.mkdir()
    save_config_for_hf(model, str(folder / "config.json"), model_config={"label_names": LABELS})
    # Weights that two layers share are written twice, as those on the Hub are.
    save_file({name: value.clone() for name, value in model.state_dict().items()}, folder / "model.safetensors")


def find_cases(kinds: Sequence[str]) -> Iterator[Case]:
    """All cases of some kinds."""
    if "image" in kinds:
        for name in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
            if name != "timm_wrapper":
                yield Case("image", name, partial(save_image_model, name))
    if "text" in kinds:
        for name in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
            yield Case("text", name, partial(save_text_model, name))
    if "timm" in kinds:
        for name in TIMM_NAMES:
            yield Case("timm", name, partial(save_timm_model, name))


# ── what is done with each ──────────────────────────────────────────────────────────────────────────────────────────


def make_pool(is_text: bool) -> PseudolabelPool:
    """A pool of a few rows, and two teachers."""
    rng = np.random.default_rng(0)
    if is_text:
        inputs = {"text": [" ".join(rng.choice(_WORDS, 3 + row % 5)) for row in range(_NUM_ROWS)]}
    else:
        pixels = rng.integers(0, 256, (_NUM_ROWS, 24, 24, 3), dtype=np.uint8)
        inputs = {"image": [Image.fromarray(image) for image in pixels]}
    probs = {name: rng.dirichlet(np.ones(len(LABELS)), _NUM_ROWS) for name in ("first", "second")}
    hierarchy = TeacherHierarchy(LABELS, [Teacher("first"), Teacher("second", level=1)])
    ids = [str(row) for row in range(_NUM_ROWS)]
    return PseudolabelPool.from_predictions(hierarchy, ids, probs, inputs=Dataset.from_dict(inputs))


def try_training(case: Case, source: Path, training: str, work: Path) -> tuple[str, str]:
    """Train, export, load again and compare: what came of it, and what was said."""
    started = False
    try:
        pool = make_pool(case.kind == "text")
        settings = {
            "max_steps": 2,
            "learning_rate": 0.01,
            "per_device_train_batch_size": 16,
            "report_to": "none",
            "save_strategy": "no",
        }
        args = CoSupervisedConfig(
            str(work), student_training=training, disable_tqdm=True, use_cpu=True, seed=1, **settings
        )
        trainer = CoSupervisedTrainer(str(source), args, pool=pool)
        trainer.remove_callback(PrinterCallback)
        started = True
        trainer.train()
        trainer.save_model()
        difference, expected = compare(trainer, case.kind, work, pool.inputs, torch.float32)
        said = "" if bool(torch.isfinite(expected).all()) else "logits that are no numbers"
        if difference > _TOLERANCE:
            # What kernels round in float32 can be more: with the same weights nothing of it is left.
            said = f"in float64; {difference:.1g} in float32"
            difference, expected = compare(trainer, case.kind, work, pool.inputs, torch.float64)
    except Exception as error:  # whatever it is, it is what the table is about
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        is_told = isinstance(error, ValueError | TypeError | ImportError) and Path(last).is_relative_to(_PACKAGE)
        said = shortened(str(error).replace(str(source), case.name))
        if is_told and not started:
            return REFUSED, said
        return WRONG, f"{type(error).__name__}: {said}"
    case.differences[training] = difference
    if not difference <= _TOLERANCE:
        return WRONG, f"logits that differ by {difference:.1g} {said}"
    return WORKS, said


def compare(
    trainer: CoSupervisedTrainer, kind: str, folder: Path, inputs: Dataset, dtype: torch.dtype
) -> tuple[float, torch.Tensor]:
    """The largest difference between what was trained and what was exported, and the logits of the first."""
    expected, found = trained_logits(trainer, inputs, dtype), loaded_logits(kind, folder, inputs, dtype)
    return float((found - expected).abs().max()) / max(1.0, float(expected.abs().max())), expected


def shortened(said: str) -> str:
    """Give one line of what was said; some errors list all tensors."""
    line = " ".join(said.split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} …"


def cast(batch: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Numbers of inputs, but for ids, in a precision."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}


def trained_logits(trainer: CoSupervisedTrainer, inputs: Dataset, dtype: torch.dtype) -> torch.Tensor:
    """Logits of the student in memory."""
    column = "text" if "text" in inputs.column_names else "image"
    with torch.no_grad():
        return trainer.model.to(dtype).eval()(**cast(trainer.processor(inputs[:][column]), dtype)).logits


def loaded_logits(kind: str, folder: Path, inputs: Dataset, dtype: torch.dtype) -> torch.Tensor:
    """Logits of what was exported, by the library of its kind alone."""
    with torch.no_grad():
        if kind == "text":
            tokenizer = AutoTokenizer.from_pretrained(folder)
            model = AutoModelForSequenceClassification.from_pretrained(folder).to(dtype).eval()
            batch = tokenizer(inputs[:]["text"], padding=True, truncation=True, return_tensors="pt")
            return model(**batch).logits
        images = [image.convert("RGB") for image in inputs[:]["image"]]
        batch = AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt")
        batch = cast(batch, dtype)
        if kind == "timm":
            return timm.create_model(f"local-dir:{folder}", pretrained=True).to(dtype).eval()(batch["pixel_values"])
        answer = AutoModelForImageClassification.from_pretrained(folder).to(dtype).eval()(**batch)
        return answer.logits if "logits" in answer else answer.last_hidden_state  # as PP-LCNet calls them


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Give up after a time."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run_case(case: Case, trainings: Sequence[str] = TRAININGS) -> None:
    """Find out about one model."""
    folder = Path(tempfile.mkdtemp(prefix="sweep-"))
    try:
        torch.manual_seed(0)
        try:
            with within(_SECONDS):
                case.save(folder / "model")
        except Exception as error:
            case.results = dict.fromkeys(trainings, (NOT_MADE, f"{type(error).__name__}: {shortened(str(error))}"))
            return
        for training in trainings:
            try:
                with within(_SECONDS):
                    case.results[training] = try_training(case, folder / "model", training, folder / training)
            except TimeoutError as error:
                case.results[training] = WRONG, str(error)
            shutil.rmtree(folder / training, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ── the table ───────────────────────────────────────────────────────────────────────────────────────────────────────


def write_table(cases: Sequence[Case], trainings: Sequence[str]) -> str:
    """A Markdown table of the results, and under it what was said, numbered."""
    notes: dict[str, int] = {}
    lines = []
    for kind in dict.fromkeys(case.kind for case in cases):
        lines += [
            "",
            f"## {_TITLES[kind]}",
            "",
            f"| model | {' | '.join(trainings)} |",
            "| --- |" + " --- |" * len(trainings),
        ]
        for case in (case for case in cases if case.kind == kind):
            cells = []
            for training in trainings:
                result, said = case.results[training]
                cells.append(f"{result} [{notes.setdefault(said, len(notes) + 1)}]" if said else result)
            lines.append(f"| {case.name} | {' | '.join(cells)} |")
    counts = Counter(result for case in cases for result, _ in case.results.values())
    summary = ", ".join(f"{counts[result]} {result}" for result in (WORKS, REFUSED, WRONG, NOT_MADE))
    said = [f"{number}. {text.replace('|', chr(92) + '|')}" for text, number in notes.items()]
    most = {name: max((case.differences.get(name, 0.0) for case in cases), default=0.0) for name in trainings}
    introduction = _INTRODUCTION.format(
        day=date.today(),
        versions=", ".join(f"{name} {version(name)}" for name in ("transformers", "timm", "peft", "torch")),
        count=len(cases),
        summary=summary,
        differences=", ".join(f"{value:.1g} ({name})" for name, value in most.items()),
    )
    head = ["# Every classifier a student"]
    for paragraph in introduction.split("\n\n"):
        head += ["", textwrap.fill(paragraph, 119)]
    return "\n".join([*head, *lines, *(["", "## What was said", "", *said] if said else []), ""])


def main() -> None:
    """Run the sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="Of which kinds.")
    parser.add_argument("--names", nargs="+", default=[], help="Only these models.")
    parser.add_argument("--limit", type=int, help="At most so many of each kind.")
    parser.add_argument("--trainings", nargs="+", choices=TRAININGS, default=list(TRAININGS), help="Trained how.")
    parser.add_argument("--output", help="Where the table is written; a file beside it keeps what is done already.")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, resource.RLIM_INFINITY))
    cases = list(find_cases(args.kinds))
    if unknown := set(args.names) - {case.name for case in cases}:
        parser.error(f"--names must be models of {args.kinds}, got {sorted(unknown)}. Leave --names out to see all.")
    cases = [case for case in cases if not args.names or case.name in args.names]
    if args.limit is not None:
        cases = [case for kind in args.kinds for case in [c for c in cases if c.kind == kind][: args.limit]]
    kept = Path(f"{args.output}.json") if args.output else None
    known = json.loads(kept.read_text()) if kept and kept.is_file() else {}
    for number, case in enumerate(cases, 1):
        key, start = f"{case.kind} {case.name}", time.monotonic()
        if key in known and set(args.trainings) <= set(known[key]["results"]):
            case.results = {name: tuple(result) for name, result in known[key]["results"].items()}
            case.differences = known[key]["differences"]
            continue
        run_case(case, args.trainings)
        known[key] = {"results": case.results, "differences": case.differences}
        if kept:
            kept.write_text(json.dumps(known, indent=1))
        told = ", ".join(
            f"{name} {result}" + f" ({said[:300]})" * bool(said) for name, (result, said) in case.results.items()
        )
        sys.stdout.write(f"{number}/{len(cases)} {key}: {told} [{time.monotonic() - start:.1f} s]\n")
        sys.stdout.flush()
    table = write_table(cases, args.trainings)
    if args.output:
        Path(args.output).write_text(table, encoding="utf-8")
    else:
        sys.stdout.write(table)


if __name__ == "__main__":
    # Of this process alone: hundreds of models warn of their random weights.
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    main()

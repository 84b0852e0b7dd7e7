"""Files of a model that nobody vouches for: read strictly, and refused where they lead to code or to other files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from ..files import MAX_JSON_BYTES, parse_json, read_json

INDEX_FILE = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_FLOATS = ("F64", "F32", "F16", "BF16")
_CONFIGS = ("preprocessor_config.json", "processor_config.json", "tokenizer_config.json", "special_tokens_map.json")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json", "chat_template.json")

# Lists are made of these numbers before there is any layer to count, and images of those. Nobody publishes as many.
_COUNT = re.compile(r"\w*(layers?|blocks?|depths?|stages?|experts?|labels|classes)")
_PIXELS = re.compile(r"(shortest|longest)_edge|(min|max)_pixels")
_SIDE = re.compile(r"height|width|size|(crop|pad|input|img|image)_size")  # an edge may be a number of pixels
# With fewer of these than one, a model is built all the same, and answers something else.
_AT_LEAST_ONE = ("hidden_size", "image_size", "patch_size", "num_channels", "num_attention_heads", "num_hidden_layers")
_MAX_COUNT, _MAX_LABELS, _MAX_SIDE = 10_000, 1_000_000, 8_192


# ── what a configuration may not say, at any depth ──────────────────────────────────────────────────────────────────


# `attn_implementation` and its kin may name a repository of kernels, which is code. These need no download.
_IMPLEMENTATION = re.compile(r"\w*_implementation(_internal)?")
_INSTALLED = {"eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm"}
_FLASH = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
# transformers looks these up by name among all that it has. An `Auto…` class would begin again, without our arguments,
# and a model would read its own weights. A name that it does not know does no harm.
_CLASSES = {
    "tokenizer_class": re.compile(r"(?!Auto)\w*(Tokenizer|Backend)\w*"),
    "image_processor_type": re.compile(r"(?!Auto)\w*(ImageProcessor|FeatureExtractor)\w*"),
    "feature_extractor_type": re.compile(r"(?!Auto)\w*(ImageProcessor|FeatureExtractor)\w*"),
}
# timm would follow `hf-hub:` and `local-dir:` here too.
_ARCHITECTURES = ("architecture", "backbone")
_BARE_NAME = re.compile(r"[\w.\-]*")
# A configuration to be read in place of this one, other weights, positional arguments of a tokenizer (paths), caches
# that peft opens by `torch.load`, further models, and a repository of which OneFormer reads names of classes.
_OTHER_FILES = (
    *("configuration_files", "transformers_weights", "use_pretrained_backbone", "backbone_kwargs", "init_inputs"),
    *("cache_file", "covariance_file", "shadow_model", "repo_path", "class_info_file"),
)
# Arguments of tokenizers that are paths, of which an entry would take the place of the file that was found.
_TOKENIZER_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")
_FILE_ARGUMENT = re.compile(r"\w*_file")
_TOLD_FILES = ("special_tokens_map_file", "tokenizer_file")  # where older versions read them; these are not opened
# What timm's models may be told: sizes and kinds of layers. `checkpoint_path`, `pretrained_strict`, `features_only`
# and whatever timm adds tomorrow are not here.
_TIMM_ARGS = (
    *("act_layer", "always_partition", "attn_drop_rate", "bn_eps", "bn_momentum", "channels", "class_token", "depth"),
    *("depths", "dims", "distillation", "drop_block_rate", "drop_path_rate", "drop_rate", "dynamic_img_pad"),
    *("dynamic_img_size", "embed_dim", "embed_dims", "expand_ratio", "fc_norm", "final_norm", "fix_init", "fix_stem"),
    *("global_pool", "head_dim", "head_hidden_size", "head_init_scale", "head_norm_first", "img_size", "in_chans"),
    *("init_values", "layer_scale_init_value", "layers", "ls_init_value", "mlp_ratio", "mlp_ratios", "no_embed_class"),
    *("norm_eps", "norm_layer", "num_classes", "num_features", "num_heads", "output_stride", "pad_type"),
    *("patch_drop_rate", "patch_size", "pool_size", "pos_drop_rate", "pos_embed", "pre_norm", "proj_bias"),
    *("proj_drop_rate", "qk_norm", "qkv_bias", "ref_feat_shape", "reg_tokens", "se_layer", "sr_ratios", "stem_type"),
    *("stem_width", "strict_img_size", "use_fc_norm", "weight_init", "width", "widths", "window_ratio", "window_size"),
    *("zero_init_last"),
)


def check_config(config: Mapping[str, Any], what: str, name: str) -> None:
    """See that a configuration names no code, no repository and no file that its libraries would follow."""
    for path, key, value in _entries(config):
        where = f"`{path}` in its '{name}'"
        if path in _AT_LEAST_ONE and isinstance(value, int) and value < 1:
            raise ValueError(f"{what} must have a size of at least 1, got {where}: {value}. Save the model again.")
        # Of a cache, transformers takes a word of its own list and nothing else.
        if key != "cache_implementation" and _IMPLEMENTATION.fullmatch(key):
            for choice in _leaves(value):
                if choice is not None and not _is_installed(choice):
                    raise ValueError(
                        f"{what} must run by code that is installed, got {where}: {short(choice)}, which is not or "
                        "would be downloaded. Set it to 'sdpa' or 'eager', or remove it."
                    )
        elif key in _CLASSES and value is not None:
            if not isinstance(value, str) or _is_other_class(value, _CLASSES[key]):
                raise ValueError(
                    f"{what} must be read by a class of its own kind, got {where}: {short(value)}. Name a class of "
                    "transformers, such as 'BertTokenizer' or 'ViTImageProcessor'."
                )
        elif key in _ARCHITECTURES and isinstance(value, str):
            if not _BARE_NAME.fullmatch(value):
                raise ValueError(
                    f"{what} must name an architecture of timm, got {where}: {short(value)}, which leads elsewhere. "
                    "Use a checkpoint that was saved by timm."
                )
        elif key == "model_args" and value is not None:
            _check_timm_args(value, what, where)
        # Some methods download kernels when the model is built; bitsandbytes is a package that is installed.
        elif key == "quantization_config" and value:
            method = value.get("quant_method") if isinstance(value, Mapping) else value
            if method != "bitsandbytes":
                raise ValueError(
                    f"{what} must have plain weights, got {where} of method {short(method)}, which may need code "
                    "from elsewhere. Save the model again after `dequantize()`."
                )
        elif key == "fast_tokenizer_files" and value:
            if not all(isinstance(file, str) and _BARE_NAME.fullmatch(file) for file in _leaves(value)):
                raise _other_file(what, where, value)
        elif key in _OTHER_FILES and value or _is_path(key, value, name):
            raise _other_file(what, where, value)
        elif _COUNT.fullmatch(key):
            _check_numbers(value, _MAX_LABELS if key.endswith(("labels", "classes")) else _MAX_COUNT, what, where)
        elif _PIXELS.fullmatch(key):
            _check_numbers(value, _MAX_SIDE**2, what, where)
        elif _SIDE.fullmatch(key) and name != "tokenizer_config.json":
            _check_numbers(value, _MAX_SIDE, what, where)


def _is_path(key: str, value: Any, name: str) -> bool:
    """Tell whether an entry is a file that a tokenizer would open."""
    if name not in _TOKENIZER_CONFIGS or not isinstance(value, str) or not _FILE_ARGUMENT.fullmatch(key):
        return False
    return key not in _TOLD_FILES or name != _TOKENIZER_CONFIGS[0]


def _check_numbers(value: Any, largest: int, what: str, where: str) -> None:
    for leaf in () if isinstance(value, Mapping) else _leaves(value):  # an object's entries have names of their own
        if isinstance(leaf, int | float) and not -largest <= leaf <= largest:
            raise ValueError(
                f"{what} must be of a size that can be built, at most {largest:,}, got {where}: {short(leaf)}. "
                "Save the model again."
            )


def _is_installed(implementation: Any) -> bool:
    if not isinstance(implementation, str):
        return False
    return _FLASH[implementation]() if implementation in _FLASH else implementation in _INSTALLED


def _is_other_class(name: str, kind: re.Pattern[str]) -> bool:
    bare = re.sub("(Fast|Pil)*$", "", name)  # endings that transformers drops to find a class
    return not kind.fullmatch(bare) and hasattr(transformers, bare)


def _other_file(what: str, where: str, value: Any) -> ValueError:
    return ValueError(
        f"{what} must consist of its own files, got {where}: {short(value)}, which leads elsewhere. Remove it, or "
        "save the model again by `save_pretrained`."
    )


def _check_timm_args(arguments: Any, what: str, where: str) -> None:
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{what} must have a JSON object as {where}, got {short(arguments)}. Save the model again.")
    if unknown := sorted(set(arguments).difference(_TIMM_ARGS)):
        raise ValueError(
            f"{what} must be built from sizes and kinds of layers, got `{unknown[0]}` in {where}, which is none of "
            "them. Remove it; weights are read from 'model.safetensors' alone."
        )
    for key, value in arguments.items():
        for leaf in _leaves(value):
            if isinstance(leaf, Mapping) or (isinstance(leaf, str) and not _BARE_NAME.fullmatch(leaf)):
                raise ValueError(
                    f"{what} must be built from numbers and names of layers, got `{key}` in {where}: {short(leaf)}. "
                    "Save the model again."
                )


def _entries(content: Any) -> Iterator[tuple[str, str, Any]]:
    """Every entry of every object in JSON content, with the path to it."""
    # No recursion, and no copy: content of others may be nested 64 deep and 256 MB large.
    waiting = [("", content)]
    while waiting:
        prefix, value = waiting.pop()
        if isinstance(value, Mapping):
            for key, item in value.items():
                yield f"{prefix}{key}", key, item
                if isinstance(item, Mapping | list):
                    waiting.append((f"{prefix}{key}.", item))
        else:
            waiting += [(prefix, item) for item in value if isinstance(item, Mapping | list)]


def _leaves(value: Any) -> Iterator[Any]:
    """The value itself, or the values of a list or object, at any depth; an empty object is a leaf."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, list):
            waiting += item
        elif isinstance(item, Mapping) and item:
            waiting += item.values()
        else:
            yield item


def short(value: Any) -> str:
    """Write a value as code, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


# ── what a folder holds ─────────────────────────────────────────────────────────────────────────────────────────────


def read_labels(names: Any, what: str, field: str) -> list[str]:
    """Names of labels in order, from a list or from an object with the keys "0", "1", …."""
    if isinstance(names, Mapping):
        positions = [str(position) for position in range(len(names))]
        # With a gap, answers after it would go to the wrong labels.
        if set(map(str, names)) != set(positions):
            raise ValueError(
                f"{what} must number its labels from 0 to {len(names) - 1} in `{field}`, got the keys "
                f"{short(list(names))}. Correct its 'config.json'."
            )
        by_key = {str(key): name for key, name in names.items()}
        names = [by_key[position] for position in positions]
    if not isinstance(names, list) or not all(isinstance(name, str | int) and name != "" for name in names):
        raise ValueError(
            f"{what} must name each of its labels in `{field}`, got {short(names)}. Correct its 'config.json'."
        )
    return [str(name) for name in names]


def check_processor_files(folder: Path, what: str) -> None:
    """Check what the tokenizer or image processor of a model will be read from."""
    for name in (*_CONFIGS, *_VOCABULARIES):
        if (folder / name).is_file():
            content = read_json(folder / name, what, "Save the model again.")
            # Vocabularies name words, of which any may look like a key that is refused.
            if name in _CONFIGS:
                check_config(content, what, name)


def read_shards(index: Path, what: str) -> set[str]:
    """Read the names of the parts of a model's weights."""
    if not index.is_file():
        return set()
    parts = read_json(index, what, "Save the model again.").get("weight_map")
    names = list(parts.values()) if isinstance(parts, dict) else []
    # Names become paths that are opened.
    strange = [name for name in names if not isinstance(name, str) or not _SHARD.fullmatch(name)]
    if strange or not names:
        raise ValueError(
            f"{what} must name the parts of its weights in '{index.name}', such as "
            f"'model-00001-of-00002.safetensors', got {short(strange[0]) if strange else 'none'}. Save the model "
            "again."
        )
    return set(names)


def check_safetensors(path: Path, *, is_plain: bool = False) -> int:
    """See by its bytes that a file is what its name says, before any library opens it, and count its tensors.

    Of a model that is not quantised, weights are floating-point numbers: libraries make such of any others.
    """
    if not path.is_file():
        raise SafetensorError(f"'{path.name}' is no file")
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_JSON_BYTES, os.fstat(file.fileno()).st_size - 8):
            raise _other_format(path)
        try:
            header = parse_json(file.read(length))
        except ValueError as error:
            raise _other_format(path, f": {error}") from error
    if not isinstance(header, dict):
        raise _other_format(path)
    for name, entry in header.items() if is_plain else ():
        dtype = entry.get("dtype") if isinstance(entry, dict) else None
        if name.endswith((".weight", ".bias")) and dtype not in _FLOATS:
            raise SafetensorError(f"`{name[:80]}` in '{path.name}' holds no floating-point numbers but {dtype}")
    return len(header)


def _other_format(path: Path, why: str = "") -> SafetensorError:
    return SafetensorError(f"'{path.name}' is not of the format that its name says{why}")

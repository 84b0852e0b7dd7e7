"""Classifiers of transformers: configuration, processor, whole weights, and adapters merged into their base."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)
from transformers.utils import logging as transformers_logging

from .files import read_labels, short
from .source import (
    ADAPTER_WEIGHTS,
    BUILDING_ERRORS,
    ModelSource,
    building,
    explained,
    first,
    first_line,
    no_larger_than_weights,
    unknown_to_timm,
    whole_weights,
)

_PROCESSOR_FILES = ("tokenizer_config.json", "tokenizer.json", "preprocessor_config.json", "processor_config.json")
_LEAST_WORDS = 5
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ADAPTED = "base_model.model."  # how peft begins the name of every weight of an adapter


def read_config(source: ModelSource) -> Any:
    """Read the configuration of a classifier of transformers, or of timm in transformers' wrapper."""
    model_type = source.config.get("model_type")
    # Asked here, for `AutoConfig` would advise `trust_remote_code=True`, which is never followed.
    is_known = isinstance(model_type, str) and model_type in CONFIG_MAPPING_NAMES
    if "architecture" not in source.config and not is_known:
        raise ValueError(
            f"{source.what} must be of a type that transformers knows, got {model_type!r} in "
            f"'{source.place}'. Code from a repository is never run: use a model without code of its own, or "
            "update transformers."
        )
    names = source.config.get("id2label")
    if names is not None and not (
        isinstance(names, dict) and all(re.fullmatch("0|[1-9][0-9]*", key) for key in names)
    ):
        raise ValueError(
            f'{source.what} must have an object such as {{"0": "cat", "1": "dog"}} as `id2label`, got '
            f"{short(names)}. Correct its 'config.json'."
        )
    with explained(source, "configuration"):
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
        config.return_dict = True  # answers are read by their names
        if config.model_type == "timm_wrapper" and config.model_args:
            # timm 1.0.31 writes num_classes here, and the wrapper passes it a second time.
            config.model_args = {key: value for key, value in config.model_args.items() if key != "num_classes"}
    if config.model_type == "timm_wrapper":
        import timm

        if not timm.is_model(name := str(source.config.get("architecture"))):
            raise unknown_to_timm(source.what, repr(name))
    return config


def reads_text(config: Any, what: str) -> bool:
    """Tell whether a configuration belongs to a text classifier or to an image classifier."""
    architectures = config.architectures or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise ValueError(
            f"{what} must name its classes as a list of texts in `architectures`, got {architectures!r}. Correct its "
            "'config.json'."
        )
    # First by what was saved: a type alone may have classifiers of both.
    for task, is_text in (("ForSequenceClassification", True), ("ForImageClassification", False)):
        if any(task in architecture for architecture in architectures):
            return is_text
    # A causal model has a mapping to a classifier of its kind, the head of which would be random.
    others = [name for name in architectures if "For" in name or "LMHead" in name]
    # Without architectures the type of the configuration decides.
    if not others and type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        return False
    if not others and type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return True
    found = f"'{others[0]}', which is for another task" if others else f"a model of type '{config.model_type}'"
    raise ValueError(
        f"{what} must be a classifier of images or of texts, got {found}. Use a classifier, or ask a language model "
        "by `kind='prompted'`; the answers of anything else can be put into a column and read by `kind='column'`."
    )


class _WithLogits:
    """What a classifier answers that calls its logits its last hidden state."""

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> ImageClassifierOutputWithNoAttention:
        answer = super().forward(pixel_values, **kwargs)  # type: ignore[misc]
        logits = answer.logits if "logits" in answer else answer.last_hidden_state
        return ImageClassifierOutputWithNoAttention(logits=logits, hidden_states=answer.hidden_states)


def image_class(config: Any) -> Any:
    """The class that loads an image classifier of a configuration, and answers with `logits`."""
    if config.model_type != "pp_lcnet":
        return AutoModelForImageClassification
    plain = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
    # Under its name, which is saved with it and loads without this package.
    return type(plain.__name__, (_WithLogits, plain), {"__module__": plain.__module__})


class _ReadingProcessor:
    """Say of which model a tokenizer or image processor cannot be read."""

    def __init__(self, source: ModelSource, kind: str) -> None:
        self.source, self.kind = source, kind

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        # An `except` could not tell: what tokenizers raises, written in Rust, is of no class of its own.
        if kind is Exception or isinstance(error, (OSError, *BUILDING_ERRORS)):
            raise ValueError(
                f"{self.source.what} must come with its {self.kind}, and without code of its own, which is never run; "
                f"got in '{self.source.place}': {first_line(error)}. Save it there too by `save_pretrained`."
            ) from error


def load_processor(source: ModelSource, folder: Path, is_text: bool) -> Any:
    """Load the tokenizer or image processor of a model."""
    with _ReadingProcessor(source, "tokenizer" if is_text else "image processor"):
        # `False` and not left out: the default asks on the terminal whether to run code.
        processor = (AutoTokenizer if is_text else AutoImageProcessor).from_pretrained(folder, trust_remote_code=False)
    # Without its files, transformers 5 makes a tokenizer that knows its special tokens only, and says nothing.
    if is_text and (num_words := len(processor) - len(set(processor.all_special_tokens))) < _LEAST_WORDS:
        raise ValueError(
            f"{source.what} must come with the vocabulary of its tokenizer, got {num_words} words "
            f"besides its special tokens in '{source.place}'. Save the tokenizer there too by `save_pretrained`."
        )
    most = processor.model_max_length if is_text else 1
    if isinstance(most, bool) or not isinstance(most, int | float) or most < 1:
        raise ValueError(
            f"{source.what} must cut texts to at least one token, got `model_max_length` {most!r} in its "
            "'tokenizer_config.json'. Set it to the number of tokens that the model reads."
        )
    source.name_after(processor)
    return processor


def from_folder(source: ModelSource, model_class: Any, config: Any) -> tuple[Any, Any]:
    """Build a model and read its weights as far as they fit; whoever calls looks at what did not."""
    with quiet_loading(), whole_weights(source), building(source):
        return model_class.from_pretrained(
            source.folder,
            config=config,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )


def load_whole(source: ModelSource, auto_model: Any, config: Any, *, spare: str = "") -> Any:
    """Load a whole model that was fetched, and see that all of its weights are there but those that begin so."""
    model, info = from_folder(source, auto_model, config)
    check_no_layer_left(source, model, info["unexpected_keys"])
    check_shapes(source, info["mismatched_keys"])
    check_no_missing(source.what, [name for name in info["missing_keys"] if not spare or not name.startswith(spare)])
    check_finite(source, model)
    source.name_after(model)
    return model


def load_adapted(source: ModelSource, *, random_head: bool = False) -> tuple[Any, Path]:
    """Load an adapter of peft on its base, merged: an ordinary classifier of transformers."""
    base = source.base
    if base is None:
        raise ValueError(f"{source.what} must be an adapter, got a whole model in '{source.place}'. Load that.")
    _check_mergeable(source)
    folder, base_folder = source.fetch(), base.fetch()
    with whole_weights(source):
        weights = load_file(folder / ADAPTER_WEIGHTS)
    # By the base's own names, under which a saved head is looked for below.
    saved = {name.removeprefix(_ADAPTED): value for name, value in weights.items()}
    config = read_config(base)
    is_text = reads_text(config, base.what)
    auto_model = AutoModelForSequenceClassification if is_text else AutoModelForImageClassification
    names = source.config.get("id2label")
    names = None if names is None else read_labels(names, source.what, "id2label")
    with building(base):
        # Before the base is built: an adapter with a head of its own has another number of labels than its base.
        _set_labels(config, _saved_labels(config, auto_model, saved), names)
    # The base's head may be of other labels; the adapter's takes its place, and the rest is checked here.
    model, loading = from_folder(base, auto_model if is_text else image_class(config), config)
    if not random_head:
        lost = {*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])}
        check_no_missing(base.what, lost - set(saved))
    merged = _merge(model, source, base, folder)
    check_finite(source, merged)
    source.name_after(merged)
    has_processor = any((folder / name).is_file() for name in _PROCESSOR_FILES)
    return merged, folder if has_processor else base_folder


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep transformers from reporting weights that are replaced on purpose; what matters is checked afterwards."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def check_no_missing(what: str, missing: Iterable[str]) -> None:
    """See that a checkpoint lacks no weight of its model."""
    names = sorted(missing)
    if names:
        raise ValueError(
            f"{what} must have all of its weights (never a silently random teacher), got a checkpoint without "
            f"{first(names)}. Train its classifier first, or name a checkpoint that has one."
        )


def check_shapes(source: ModelSource, mismatched: Iterable[tuple[str, Any, Any]]) -> None:
    """See that a checkpoint's weights have the shapes that its configuration asks for."""
    for name, found, wanted in sorted(mismatched):
        raise ValueError(
            f"{source.what} must have weights of the shapes that its 'config.json' describes, got `{name}` of shape "
            f"{tuple(found)} for {tuple(wanted)} in '{source.place}'. Correct the configuration (for a head, "
            "`id2label`), or save the model again."
        )


def check_finite(source: ModelSource, model: torch.nn.Module) -> None:
    """See that weights are numbers: a model would answer NaN to every row, and each row would be blamed for it."""
    learned = {name for name, _ in model.named_parameters()}
    for name, values in model.state_dict().items():
        if values.dtype not in _FLOATS or not values.numel() or values.is_meta:
            continue
        # Without a copy; a mask that is kept beside weights may be infinite.
        ends = torch.stack(values.aminmax())
        if ends.isnan().any() or name in learned and ends.isinf().any():
            raise ValueError(
                f"{source.what} must have finite weights, got NaN or infinity in `{name}` in '{source.place}'. Train "
                "it again with a lower learning rate, or load it again."
            )


def check_no_layer_left(source: ModelSource, model: Any, unexpected: Iterable[str]) -> None:
    """See that a configuration leaves out no layer of those that a checkpoint has."""
    # Names but for their numbers: a layer that is left out is called like those that are built.
    known = {re.sub(r"\d+", "0", name) for name in model.state_dict()}
    left = sorted(name for name in unexpected if re.sub(r"\d+", "0", name) in known)
    if left:
        raise ValueError(
            f"{source.what} must be built with all of its layers, got in '{source.place}' a 'config.json' that leaves "
            f"out {first(left)}. Correct its number of layers, or save the model again."
        )


def _check_mergeable(source: ModelSource) -> None:
    adapter = source.adapter or {}
    if not isinstance(adapter.get("auto_mapping"), dict | None):
        raise ValueError(
            f"{source.what} must have an object as `auto_mapping` in its 'adapter_config.json', got "
            f"{adapter['auto_mapping']!r}. Remove it."
        )
    tuner = {kind.value: tuner for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()}.get(
        str(adapter.get("peft_type"))
    )
    # X-LoRA names further adapters that it would load, and megatron a module that it would import.
    mergeable = hasattr(tuner, "merge_and_unload") and adapter.get("peft_type") not in ("XLORA", "POLY")
    if not mergeable or adapter.get("megatron_config"):
        raise ValueError(
            f"{source.what} must be an adapter that can be merged into its base, such as LoRA, got "
            f"{adapter.get('peft_type')!r} in '{source.place}'. Save a whole model instead."
        )


def _saved_labels(config: Any, auto_model: Any, saved: Mapping[str, torch.Tensor]) -> int | None:
    """For how many labels an adapter has saved a head: the size of what depends on their number."""
    shapes = []
    # Two numbers, both unlikely as a width: what changes with them is the head, in any architecture.
    for num_labels in (3, 5):
        probe = type(config).from_dict(config.to_dict() | {"label_names": None})
        _set_labels(probe, num_labels, None)
        # Without memory: only shapes are asked for, and a base may have gigabytes.
        with init_empty_weights():
            shapes.append({name: value.shape for name, value in auto_model.from_config(probe).named_parameters()})
    outputs = [name for name, shape in shapes[0].items() if shape != shapes[1][name] and name in saved]
    sizes = {saved[name].shape[0] for name in outputs}
    # Several sizes are no head of one classifier; the base's number stays, and loading says what does not fit.
    return sizes.pop() if len(sizes) == 1 else None


def _set_labels(config: Any, num_labels: int | None, names: list[str] | None) -> None:
    """Give a configuration a number of labels and their names, where they are known."""
    num_labels = num_labels or config.num_labels
    if names is not None and len(names) == num_labels:
        config.id2label = dict(enumerate(names))
        config.label2id = {name: position for position, name in enumerate(names)}
    elif num_labels != config.num_labels:
        # Makes names `LABEL_0` and on, for which teachers ask for a `label_map`.
        config.num_labels = num_labels
    # The wrapper keeps numbers and names a second time, and builds timm's head from those.
    if config.model_type == "timm_wrapper":
        config.num_labels, config.label_names = num_labels, [config.id2label[key] for key in range(num_labels)]


def _merge(model: Any, source: ModelSource, base: ModelSource, folder: Path) -> Any:
    """Put an adapter onto its base, see that all of it found its place, and merge."""
    try:
        with no_larger_than_weights(source):
            adapted = PeftModel.from_pretrained(
                model, str(folder), config=PeftConfig.from_pretrained(str(folder)), torch_device="cpu"
            )
        # Only the second loading tells what the first one did.
        loading = adapted.load_adapter(str(folder), "default", torch_device="cpu")
        left = [name.removeprefix(_ADAPTED) for name in (*loading.unexpected_keys, *loading.missing_keys)]
        if left:
            raise ValueError(f"{first(sorted(left))} without counterpart")
        return adapted.merge_and_unload()
    except BUILDING_ERRORS as error:
        raise ValueError(
            f"{source.what} must be an adapter that fits its base '{base.place}', got: "
            f"{first_line(error)}. Train it again on this base, or save a whole model."
        ) from error

"""The head of a student: found, given fresh weights, and made ready for probe, LoRA or full training."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D

logger = logging.getLogger(__name__)

# Of some types there are several, such as those of Perceiver.
_CLASSIFIERS = {
    name
    for names in (
        *MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values(),
        *MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values(),
    )
    for name in ((names,) if isinstance(names, str) else names)
}
# Where a loaded student keeps the names of layers that start at random beside its head, such as a pooler's.
FRESH = "_fresh_modules"
# GPT-2 and its kin keep their linear layers transposed, as `Conv1D`.
_PLAIN_LAYERS = (nn.Linear, Conv1D, nn.Conv2d, nn.Embedding)


def head_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Find the parameters of a classifier that are not its backbone's."""
    if hasattr(model, "timm_model"):
        found: Any = model.timm_model.get_classifier()  # type: ignore[union-attr, operator]
        # A pair in distilled models, which answer with the mean of both unless they are being distilled.
        heads = [found] if isinstance(found, nn.Module) else list(found)
        own = {id(parameter) for head in heads for parameter in head.parameters()}
        return [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) in own]
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and hasattr(model, prefix):
        outside = [(name, value) for name, value in model.named_parameters() if not name.startswith(f"{prefix}.")]
        if outside:
            return outside
    # CLIP and its kin keep the parts of their backbone side by side: there the head is what hangs on the labels.
    sized = _sized_by_labels(model) if type(model).__name__ in _CLASSIFIERS else set()
    if not sized:
        raise ValueError(
            "A student must be a model with a backbone and a classification head, which is what it has outside of its "
            "`base_model_prefix`, or else what hangs on its number of labels in a classifier of transformers, got "
            f"neither in {type(model).__name__}. Load it with `AutoModelForImageClassification` or "
            "`AutoModelForSequenceClassification`."
        )
    return [(name, parameter) for name, parameter in model.named_parameters() if name in sized]


def _sized_by_labels(model: Any) -> set[str]:
    """Names of the parameters whose shapes hang on the number of labels."""
    shapes = []
    # Two numbers that are unlike each other and unlikely as a width.
    for num_labels in (3, 5):
        config = copy.deepcopy(model.config)
        config.num_labels = num_labels
        with torch.device("meta"):  # only shapes are asked for
            shapes.append({name: value.shape for name, value in type(model)(config).named_parameters()})
    return {name for name, shape in shapes[0].items() if shape != shapes[1][name]}


def linear_head(model: nn.Module) -> nn.Linear | None:
    """Find the head of a classifier if it is one linear layer and nothing else."""
    # By identity: names of the head differ from architecture to architecture.
    own = {id(parameter) for _, parameter in head_parameters(model)}
    for module in model.modules():
        if isinstance(module, nn.Linear) and {id(parameter) for parameter in module.parameters()} == own:
            return module
    return None


def head_gives_logits(model: nn.Module, head: nn.Linear, inputs: Mapping[str, torch.Tensor]) -> bool:
    """Tell whether the head's output on one vector per example is what the model answers."""
    # Asked and not read off: between head and answer a model may pool, scale or add up.
    captured: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, arguments: captured.append(arguments[0]))
    try:
        with torch.no_grad():
            logits = model(**inputs).logits
    finally:
        hook.remove()
    if len(captured) != 1 or captured[0].ndim != 2:
        return False
    with torch.no_grad():
        return torch.allclose(head(captured[0]), logits, atol=1e-4)


def hash_weights(digest: Any, weights: Mapping[str, torch.Tensor]) -> str:
    """Add weights to what a digest is of, and give it."""
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return str(digest.hexdigest())


def on_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give tensors as safetensors takes them."""
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


def name_labels(config: Any, labels: Sequence[str]) -> None:
    """Tell a configuration of as many labels what they are called."""
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: index for index, name in enumerate(labels)}
    if config.model_type == "timm_wrapper":
        config.label_names = list(labels)  # timm's own name for them, which wins when it is loaded again


def reset_head(model: nn.Module) -> None:
    """Give every layer of the head fresh weights from torch's global generator."""
    own = {id(parameter) for _, parameter in head_parameters(model)}
    for module in model.modules():
        parameters = {id(parameter) for parameter in module.parameters(recurse=False)}
        if parameters and parameters <= own and hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]


def prepare_student(
    model: PreTrainedModel, training: str, lora: LoraConfig | None = None, *, seed: int = 42
) -> PreTrainedModel | PeftModel:
    """Freeze what is not trained."""
    if training == "lora":
        if isinstance(model, PeftModel):
            _check_adapted(model)
            return model
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise ValueError(
                "A student must hold no adapters before it is given new ones, got some in the "
                f"{type(model).__name__}: peft changes a model in place. Give the `PeftModel` that was made of it, "
                "or load the model again."
            )
        named = [type(m).__name__ for m in model.modules() if hasattr(m, "base_layer")]
        if named:
            raise ValueError(
                "Adapters need a model without a layer that is called `base_layer`, as peft calls what it adapts, got "
                f"one in {named[0]}. Use `student_training` 'probe' or 'full'."
            )
        # A copy, because peft writes into it, and it may be the user's.
        config = copy.deepcopy(lora) if lora is not None else LoraConfig()
        heads = {name.rsplit(".", 1)[0] for name, _ in head_parameters(model)} | {*getattr(model, FRESH, ())}
        config.modules_to_save = sorted(heads)  # a fresh head is trained whole
        if not config.target_modules or config.target_modules == "all-linear":
            config.target_modules = _backbone_layers(model, heads)
        # peft freezes the model in place, and one that is refused goes back as it came.
        learns = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapted = get_peft_model(model, config)
        for _, layer in _adapted(adapted):
            # MobileNet asks its convolutions for these, which peft keeps in the layer that it wraps.
            for name in {"stride", "dilation", "kernel_size"} & {*vars(layer.get_base_layer())}:
                setattr(layer, name, getattr(layer.get_base_layer(), name))
        try:
            _check_adapted(adapted)
        except ValueError:
            for name, parameter in adapted.unload().named_parameters():  # the model is the user's
                parameter.requires_grad_(learns[name])
            raise
        return adapted
    if training == "probe":
        own = {id(parameter) for _, parameter in head_parameters(model)}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in own)
        if linear_head(model) is None:
            logger.warning(
                f"The head of {type(model).__name__} is more than one linear layer and starts at random; it is "
                "trained whole by the standard loop. `student_training='lora'` usually does better here."
            )
    return model


def _adapted(model: PeftModel) -> list[tuple[str, BaseTunerLayer]]:
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)]


def _check_adapted(model: PeftModel) -> None:
    """Refuse adapters on layers that would not be the same layer once they are merged."""
    shared = _shared_weights(model)
    refused = {
        name.removeprefix("base_model.model."): type(layer.get_base_layer()).__name__
        for name, layer in _adapted(model)
        if not _merges_exactly(layer.get_base_layer()) or id(layer.get_base_layer().weight) in shared
    }
    if refused:
        name, kind = next(iter(refused.items()))
        raise ValueError(
            f"Adapters must be of plain layers, which merge exactly, got '{name}' ({kind}; {len(refused)} such in "
            "all), which transforms its weights or inputs, or shares its weights. Leave it out of "
            "`lora_target_modules`, or use `student_training` 'full'."
        )


def _shared_weights(model: nn.Module) -> set[int]:
    """Weights that several layers hold: merged, an adapter of one of these would change the others."""
    held = Counter(id(value) for module in model.modules() for value in module.parameters(recurse=False))
    return {key for key, count in held.items() if count > 1}


def _merges_exactly(layer: nn.Module) -> bool:
    """Whether what an adapter adds to the output is what it adds to the weights."""
    # A subclass may have a forward of its own, and `parametrize` makes one; older ways compute `weight` in a hook.
    if type(layer) not in _PLAIN_LAYERS or "weight" not in dict(layer.named_parameters(recurse=False)):
        return False
    # peft gives its own convolutions neither of these.
    return not isinstance(layer, nn.Conv2d) or layer.padding_mode == "zeros" and set(layer.dilation) == {1}


def _backbone_layers(model: nn.Module, heads: set[str]) -> list[str]:
    """Full names of every linear layer outside the head, or of every plain convolution where there is none."""
    shared = _shared_weights(model)
    outside = [
        (name, module)
        for name, module in model.named_modules()
        if not any(name == head or name.startswith(f"{head}.") for head in heads)
        and _merges_exactly(module)
        and id(module.weight) not in shared
    ]
    # Convolutions beside linear layers mostly cut images into patches, or are depthwise.
    linears = [name for name, module in outside if isinstance(module, nn.Linear | Conv1D)]
    found = linears or [name for name, module in outside if isinstance(module, nn.Conv2d) and module.groups == 1]
    if not found:
        raise ValueError(
            f"Adapters need plain linear or convolution layers in the backbone, got none in {type(model).__name__}. "
            "Use `student_training` 'probe' or 'full'."
        )
    return found

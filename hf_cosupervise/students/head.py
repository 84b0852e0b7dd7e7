"""The head of a student: found, given fresh weights, and made ready for probe, LoRA or full training."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

logger = logging.getLogger(__name__)


def head_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Find the parameters of a classifier that are not its backbone's."""
    if hasattr(model, "timm_model"):
        classifier: nn.Module = model.timm_model.get_classifier()  # type: ignore[union-attr, operator]
        own = {id(parameter) for parameter in classifier.parameters()}
        return [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) in own]
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix or not hasattr(model, prefix):
        raise ValueError(
            f"A student must be a model with a backbone and a classification head, got {type(model).__name__}. "
            "Load it with `AutoModelForImageClassification` or `AutoModelForSequenceClassification`."
        )
    return [(name, parameter) for name, parameter in model.named_parameters() if not name.startswith(f"{prefix}.")]


def linear_head(model: nn.Module) -> nn.Linear | None:
    """Find the head of a classifier if it is one linear layer and nothing else."""
    own = {id(parameter) for _, parameter in head_parameters(model)}
    for module in model.modules():
        if isinstance(module, nn.Linear) and {id(parameter) for parameter in module.parameters()} == own:
            return module
    return None


def head_gives_logits(model: nn.Module, head: nn.Linear, inputs: Mapping[str, torch.Tensor]) -> bool:
    """Tell whether the head's output on one vector per example is what the model answers."""
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


def reset_head(model: nn.Module) -> None:
    """Give every layer of the head fresh weights from torch's global generator."""
    own = {id(parameter) for _, parameter in head_parameters(model)}
    for module in model.modules():
        parameters = list(module.parameters(recurse=False))
        if (
            parameters
            and all(id(parameter) in own for parameter in parameters)
            and hasattr(module, "reset_parameters")
        ):
            module.reset_parameters()  # type: ignore[operator]


def prepare_student(
    model: PreTrainedModel, training: str, lora: LoraConfig | None = None, *, seed: int = 42
) -> PreTrainedModel | PeftModel:
    """Freeze what is not trained."""
    if training == "lora":
        if isinstance(model, PeftModel):
            return model
        config = copy.deepcopy(lora) if lora is not None else LoraConfig()
        heads = {name.rsplit(".", 1)[0] for name, _ in head_parameters(model)}
        config.modules_to_save = sorted(heads)
        if not config.target_modules:
            config.target_modules = _backbone_layers(model, heads)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return get_peft_model(model, config)
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


def _backbone_layers(model: nn.Module, heads: set[str]) -> list[str]:
    """Full names of every linear layer outside the head, or of every plain convolution where there is none."""
    outside = [
        (name, module)
        for name, module in model.named_modules()
        if not any(name == head or name.startswith(f"{head}.") for head in heads)
    ]
    # GPT-2 and its kin keep their linear layers transposed, as `Conv1D`.
    linears = [name for name, module in outside if isinstance(module, nn.Linear | Conv1D)]
    found = linears or [name for name, module in outside if isinstance(module, nn.Conv2d) and module.groups == 1]
    if not found:
        raise ValueError(
            f"Adapters need linear or plain convolution layers in the backbone, got none in {type(model).__name__}. "
            "Name layers by `lora_target_modules`."
        )
    return found

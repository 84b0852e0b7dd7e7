"""Students that are unlike most: layers that are no plain ones, and models that come as they are."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from timm.layers import ScaledStdConv2d, StdConv2d, StdConv2dSame
from torch import nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm
from transformers import (
    AutoImageProcessor,
    BitConfig,
    BitForImageClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d

from hf_cosupervise.students.head import prepare_student
from hf_cosupervise.students.publishing import export_student

pytestmark = pytest.mark.core

LABELS = ("ant", "bee", "cat", "dog")


class _Doubled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, 2 * self.weight, self.bias)


class _Centred(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight - weight.mean()


def _parametrized(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", _Centred())
    return layer


# What stands in the place of a ViT's projection of patches, and of a linear layer.
CONVOLUTIONS: dict[str, Callable[..., nn.Module]] = {
    "BiT": WeightStandardizedConv2d,
    "standardised": StdConv2d,
    "standardised, same": StdConv2dSame,
    "scaled": ScaledStdConv2d,
    "spectral norm": lambda *shape, **kw: spectral_norm(nn.Conv2d(*shape, **kw)),
    "reflecting": lambda *shape, **kw: nn.Conv2d(*shape, **kw, padding=1, padding_mode="reflect"),
    "dilated": lambda *shape, **kw: nn.Conv2d(*shape, **kw, padding=1, dilation=(2, 1)),
}
LINEARS: dict[str, Callable[..., nn.Module]] = {
    "own forward": _Doubled,
    "parametrized": lambda *shape: _parametrized(nn.Linear(*shape)),
    "orthogonal": lambda *shape: parametrizations.orthogonal(nn.Linear(*shape)),
    "weight norm": lambda *shape: parametrizations.weight_norm(nn.Linear(*shape)),
    "weight norm by a hook": lambda *shape: weight_norm(nn.Linear(*shape)),
    "spectral norm by a hook": lambda *shape: spectral_norm(nn.Linear(*shape)),
}


def tiny_model(**changes: Any) -> PreTrainedModel:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: index for index, name in enumerate(LABELS)}}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **shape, **names, **changes))


def unlike(kind: str) -> tuple[PreTrainedModel, str]:
    """A model with one layer that is not plain, and the layer's name."""
    model = tiny_model()
    if kind in CONVOLUTIONS:
        name, layer = "vit.embeddings.patch_embeddings.projection", CONVOLUTIONS[kind](3, 16, kernel_size=4, stride=4)
    else:
        squares = (n for n, p in model.named_parameters() if p.shape == (16, 16) and n.endswith(".weight"))
        name, layer = next(squares).removesuffix(".weight"), LINEARS[kind](16, 16)
    model.set_submodule(name, layer)
    return model, name


def adapted_layers(model: nn.Module) -> set[str]:
    return {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}


@pytest.mark.parametrize("kind", [*CONVOLUTIONS, *LINEARS])
def test_adapters_leave_out_layers_that_do_not_merge(kind):
    model, name = unlike(kind)
    plain = {n for n, layer in tiny_model().named_modules() if isinstance(layer, nn.Linear) and n != "classifier"}
    found = {layer.removeprefix("base_model.model.") for layer in adapted_layers(prepare_student(model, "lora"))}
    assert found == plain - {name}


@pytest.mark.parametrize("kind", [*CONVOLUTIONS, *LINEARS])
@pytest.mark.parametrize("as_regex", [False, True])
def test_layers_that_do_not_merge_are_refused_by_name(kind, as_regex):
    model, name = unlike(kind)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    targets: Any = f".*{re.escape(name)}" if as_regex else [name.split(".", 2)[-1]]
    with pytest.raises(ValueError) as error:
        prepare_student(model, "lora", LoraConfig(r=2, target_modules=targets))
    layer = type(model.get_submodule(name)).__name__
    assert str(error.value) == (
        f"Adapters must be of plain layers, which merge exactly, got '{name}' ({layer}; 1 such in all), which "
        "transforms its weights or inputs. Leave it out of `lora_target_modules`, or use `student_training` 'full'."
    )
    # the model is the user's, and is as it was
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before and not adapted_layers(model)


def test_networks_without_a_plain_layer_are_refused():
    config = BitConfig(embedding_size=32, hidden_sizes=[128, 256], depths=[1, 1], num_labels=4)
    with pytest.raises(ValueError) as error:
        prepare_student(BitForImageClassification(config), "lora")
    assert str(error.value) == (
        "Adapters need plain linear or convolution layers in the backbone, got none in BitForImageClassification. "
        "Use `student_training` 'probe' or 'full'."
    )


def test_all_linear_layers_are_those_of_the_backbone():
    named, found = (
        adapted_layers(prepare_student(tiny_model(), "lora", LoraConfig(r=2, target_modules=targets)))
        for targets in (None, "all-linear")
    )
    assert named == found and len(found) > 3


def test_a_model_that_holds_adapters_is_refused():
    model = tiny_model()
    adapted = prepare_student(model, "lora")
    assert prepare_student(adapted, "lora") is adapted
    with pytest.raises(ValueError, match="must hold no adapters before it is given new ones, got some in the ViTFor"):
        prepare_student(model, "lora")


@pytest.mark.parametrize("kind", ["BiT", "standardised", "scaled", "own forward", "parametrized"])
def test_ready_made_adapters_that_do_not_merge_are_refused(kind):
    model, name = unlike(kind)
    with pytest.raises(ValueError, match=rf"plain layers, which merge exactly, got '{re.escape(name)}' \("):
        prepare_student(get_peft_model(model, LoraConfig(r=2, target_modules=[name])), "lora")


@pytest.mark.parametrize("kind", ["BiT", "reflecting", "own forward", "parametrized", "orthogonal", "weight norm"])
def test_a_student_that_merging_changes_is_not_written(kind, tiny_vit: str, tmp_path: Path):
    """Whatever it is that does not merge: here adapters that nobody refused."""
    model, name = unlike(kind)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[name]))
    processor = AutoImageProcessor.from_pretrained(tiny_vit)
    export_student(adapted, tmp_path / "untrained", processor)  # adapters that are zero merge
    torch.manual_seed(0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    with pytest.raises(ValueError, match=r"must answer as the one that was trained, got logits that differ by \d"):
        export_student(adapted, tmp_path / "out", processor)
    assert not (tmp_path / "out").exists()
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())
    assert adapted.training == model.training

"""Text students whose head reads the mean, the first or the last token of what their backbone says."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
)

from ..files import read_json
from ..models.pooling import pool_tokens
from .ordinary import EVEN_TYPES

POOLINGS = ("mean", "cls", "last")
# What architectures that can choose call it in their `classifier_pooling`.
_OWN_NAMES = {
    "modernbert": {"mean": "mean", "cls": "cls"},
    "ultrabert": {"mean": "mean", "cls": "cls"},
    "eurobert": {"mean": "mean", "cls": "bos"},
}


class _PooledForward:
    """What a classifier of tokens answers where its head reads one vector per text."""

    pooling: str
    head_name: str
    base_model_prefix: str

    def forward(
        self, input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> SequenceClassifierOutput:
        backbone, head = getattr(self, self.base_model_prefix), self.get_submodule(self.head_name)  # type: ignore[attr-defined]
        states = backbone(input_ids, attention_mask=attention_mask, **kwargs)[0]
        pooled = pool_tokens(states, attention_mask, self.pooling)
        dropout = getattr(self, "dropout", None)
        return SequenceClassifierOutput(logits=head(dropout(pooled) if isinstance(dropout, nn.Dropout) else pooled))


def has_pooling(model: Any, pooling: str) -> bool:
    """Tell whether a model was loaded with a pooling."""
    own = _OWN_NAMES.get(model.config.model_type, {}).get(pooling, pooling)
    return getattr(model.config, "classifier_pooling", None) == own


def choose_pooling(config: Any, pooling: str, what: str) -> Any:
    """The class of a text student with a pooling; the configuration is told of it."""
    kind = config.model_type
    if kind in _OWN_NAMES:
        if pooling not in _OWN_NAMES[kind]:
            raise ValueError(
                f"{what} must have a `pooling` that its type '{kind}' knows, one of {list(_OWN_NAMES[kind])}, got "
                f"{pooling!r}. Choose one of these."
            )
        config.classifier_pooling = _OWN_NAMES[kind][pooling]
        return AutoModelForSequenceClassification
    config.classifier_pooling = pooling
    is_decoder = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if pooling == "last" and is_decoder:
        return AutoModelForSequenceClassification  # whose own way it is
    tokens = MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING.get(type(config), None)
    if tokens is None:
        raise ValueError(
            f"{what} must be of a type that has a classifier of tokens to have a `pooling`, got {kind!r} with "
            f"{pooling!r}. Leave `pooling` out for the model's own way, or use another backbone."
        )
    with torch.device("meta"):
        model: Any = tokens(copy.deepcopy(config))
    head = next((name for name in ("classifier", "score") if isinstance(getattr(model, name, None), nn.Linear)), None)
    outside = {name.rsplit(".", 1)[0] for name, _ in model.named_parameters()}
    outside = {name for name in outside if not name.startswith(f"{model.base_model_prefix}.")}
    if outside != {head}:
        raise ValueError(
            f"{what} must have one linear layer on its backbone to have a `pooling`, got {sorted(outside)} in "
            f"{tokens.__name__}. Leave `pooling` out for the model's own way, or use another backbone."
        )
    # Under the name of its architecture: that is what is saved, and what loads without this package.
    names = {"pooling": pooling, "head_name": head, "__module__": tokens.__module__}
    return type(tokens.__name__, (_PooledForward, tokens), names)


def default_pooling(model_type: str | None) -> str | None:
    """What a head on a frozen encoder reads best, where an ordinary classifier of its type can say it."""
    return "mean" if model_type in EVEN_TYPES else None


def exported_pooling(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Tell what users of an exported student must know: how to pool its answers, whether float16 is too narrow."""
    path = Path(folder, "config.json")
    config = read_json(path) if path.is_file() else {}
    pooling = config.get("classifier_pooling")
    if any("ForTokenClassification" in str(name) for name in config.get("architectures") or []):
        return {"token_pooling": pooling}
    if config.get("model_type") == "pp_lcnet":
        return {"logits_name": "last_hidden_state"}
    return {"needs_range": pooling == "mean" and config.get("model_type") in EVEN_TYPES}

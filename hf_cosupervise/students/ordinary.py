"""An ordinary classifier of texts that answers as a student with a pooling does.

No post-norm encoder of transformers has a classifier that reads the mean, and yet one can say it. Attention without
queries and keys is even over all tokens that are not padding: it is their mean. One more layer like that would be
right but for its residual and its norms, and a norm is linear where its input is small beside the square root of its
epsilon. So what goes in is made as small as that, and what comes out as large as it was. In the same way a pooler
with a `tanh` is an identity, and one with a rectifier where all is shifted above 0.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-5
_SMALL, _MUCH = 1e-4, 1e8
# Types the attention of which goes over the whole text, with layers as below.
EVEN_TYPES = (
    *("bert", "roberta", "xlm-roberta", "camembert", "electra", "ernie", "data2vec-text", "roformer", "layoutlm"),
    *("rembert", "roc_bert", "distilbert"),
)
_PARTS = {
    "encoder.layer": {
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "mixed": "attention.output.dense",
        "first_norm": "attention.output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "last_norm": "output.LayerNorm",
    },
    "transformer.layer": {
        "query": "attention.q_lin",
        "key": "attention.k_lin",
        "value": "attention.v_lin",
        "mixed": "attention.out_lin",
        "first_norm": "sa_layer_norm",
        "up": "ffn.lin1",
        "down": "ffn.lin2",
        "last_norm": "output_layer_norm",
    },
}
_HEADS = (
    ("{base}.pooler.dense", "classifier"),
    ("classifier.dense", "classifier.out_proj"),
    ("pre_classifier", "classifier"),
)


def as_ordinary(model: Any, inputs: Mapping[str, torch.Tensor]) -> Any:
    """An ordinary classifier of texts that answers as a student with a pooling does, or the student where none can."""
    if getattr(model, "pooling", None) is None or not inputs:
        return model
    model = copy.deepcopy(model).eval().cpu()
    inputs = {name: value.cpu() for name, value in inputs.items()}
    with torch.no_grad():
        expected = model(**inputs).logits
        for has_rectifier in (False, True):
            plain = _rebuild(model, has_rectifier)
            if plain is None:
                break
            found = plain(**inputs).logits
            if float((found - expected).abs().max()) <= _TOLERANCE * max(1.0, float(expected.abs().max())):
                return plain
    logger.warning(
        f"No classifier of texts of type '{model.config.model_type}' can read '{model.pooling}' of the tokens: the "
        f"student is written as a {type(model).__name__}, the logits of which are to be pooled so, as its card shows."
    )
    return model


def _rebuild(model: Any, has_rectifier: bool) -> Any:
    """The ordinary classifier of a backbone's type, made to answer as a student with a pooling does, if it can."""
    plain_class = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(model.config), None)
    backbone = getattr(model, model.base_model_prefix)
    place = next((place for place in _PARTS if _get(backbone, place) is not None), None)
    is_mean, is_known = model.pooling == "mean", model.config.model_type in EVEN_TYPES
    if plain_class is None or place is None or model.pooling == "last" or not is_known and (is_mean or has_rectifier):
        return None
    config = copy.deepcopy(model.config)
    config.num_hidden_layers += int(is_mean)
    with torch.random.fork_rng(devices=[]):
        plain = plain_class(config).eval()
    own = model.get_submodule(model.head_name)
    heads = [(_get(plain, first.format(base=plain.base_model_prefix)), _get(plain, last)) for first, last in _HEADS]
    first, last = next(
        ((a, b) for a, b in heads if isinstance(a, nn.Linear) and isinstance(b, nn.Linear)), (None, None)
    )
    if first is None or last is None or first.weight.shape[0] != first.weight.shape[1]:
        return None
    target = getattr(plain, plain.base_model_prefix)
    target.load_state_dict(backbone.state_dict(), strict=False)
    weight, bias = own.weight, torch.zeros(len(own.weight)) if own.bias is None else own.bias
    last_norm = _get(_get(target, place)[len(_get(backbone, place)) - 1], _PARTS[place]["last_norm"])
    if is_mean or has_rectifier:
        # What the last norm gives before its weights has no mean over the features, of which a further norm takes
        # nothing away, and is bounded by the root of their number. So the weights go into the head.
        weight, bias = weight * last_norm.weight, bias + weight @ last_norm.bias
        nn.init.ones_(last_norm.weight)
        nn.init.zeros_(last_norm.bias)
    if is_mean:
        added = {role: _get(_get(target, place)[-1], name) for role, name in _PARTS[place].items()}
        _make_mean(last_norm, added)
    # tanh(x) is x for x as small as this; a rectifier of x + shift is x + shift.
    scale, shift = (1.0, len(first.weight) ** 0.5 + 6) if has_rectifier else (_SMALL, 0.0)
    nn.init.eye_(first.weight).mul_(scale)
    nn.init.constant_(first.bias, shift)
    last.weight.copy_(weight / scale)
    last.bias.copy_(bias - shift * last.weight.sum(dim=1))
    return plain


def _make_mean(norm: nn.LayerNorm, added: Mapping[str, Any]) -> None:
    """Make an added layer give the mean over the tokens of what the norm before it gave."""
    linear = added["first_norm"].eps ** 0.5  # by how much a norm divides what is small
    nn.init.constant_(norm.weight, _SMALL * linear / _MUCH)
    for role in ("query", "key", "up", "down"):
        nn.init.zeros_(added[role].weight)
    for role in ("query", "key", "value", "mixed", "up", "down", "first_norm", "last_norm"):
        nn.init.zeros_(added[role].bias)
    nn.init.eye_(added["value"].weight)
    nn.init.eye_(added["mixed"].weight).mul_(_MUCH)  # beside which the residual is nothing
    nn.init.constant_(added["first_norm"].weight, linear)
    nn.init.constant_(added["last_norm"].weight, 1 / _SMALL)


def _get(module: Any, name: str) -> Any:
    """A part of a module, if it has it."""
    for part in name.split("."):
        module = getattr(module, part, None)
    return module

"""Language models, causal or from sequence to sequence: loaded whole, and asked how likely words are."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
)

from .classifier import load_processor, load_whole, read_config
from .source import ModelSource

# How transformers calls what tells how likely the next token is; a "MaskedLM" reads what follows as well.
_ARCHITECTURES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
# Keys, values and scores of all words of a batch at once take memory: beyond this many bytes, counted as if those of
# all layers were held at a time, some words at a time.
_MEMORY_BUDGET = 2**30


def load_language_model(model_source: ModelSource) -> tuple[Any, Any]:
    """Fetch and load a whole language model and its tokenizer."""
    folder = model_source.fetch()
    if model_source.is_adapter:
        raise ValueError(
            f"{model_source.what} must be a whole language model, got an adapter in '{model_source.place}'. Merge it "
            "by `merge_and_unload()`, and save it."
        )
    config = read_config(model_source)
    is_seq2seq = bool(config.is_encoder_decoder)
    mapping = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if is_seq2seq else MODEL_FOR_CAUSAL_LM_MAPPING
    architectures = [str(name) for name in config.architectures or []]
    # Of a classifier all weights but the head would be found, and where that is tied, none would be missed.
    others = [name for name in architectures if not name.endswith(_ARCHITECTURES)]
    if type(config) not in mapping or others:
        found = f"'{others[0]}'" if others else f"a model of type '{config.model_type}'"
        raise ValueError(
            f"{model_source.what} must be a language model, causal or from sequence to sequence, got {found}. Use "
            "one, or another `kind`."
        )
    auto_model = AutoModelForSeq2SeqLM if is_seq2seq else AutoModelForCausalLM
    model = load_whole(model_source, auto_model, config)
    check_places(model, model_source.what)
    return model, load_processor(model_source, folder, is_text=True)


def check_places(model: Any, what: str) -> None:
    """Refuse a decoder that was cut from a whole: it counts the padding before a prompt as words."""
    is_both = all(
        type(model.config) in mapping
        for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING)
    )
    if is_both and not model.config.is_encoder_decoder:
        raise ValueError(
            f"{what} must be a whole model, got {type(model).__name__}, the decoder of one from sequence to sequence. "
            "Load it by `AutoModelForSeq2SeqLM`, or use a causal model."
        )


def make_greedy(model: Any, tokenizer: Any, max_new_tokens: int) -> None:
    """Let a model answer by its most probable tokens, whatever else its files say of how to generate."""
    saved = model.generation_config
    # Not the end that some force upon the last token, which may be one of the answer.
    ids = ("bos_token_id", "decoder_start_token_id", "eos_token_id", "forced_bos_token_id")
    known = {key: getattr(saved, key, None) for key in ids}
    known["eos_token_id"] = tokenizer.eos_token_id if known["eos_token_id"] is None else known["eos_token_id"]
    known |= {"pad_token_id": tokenizer.pad_token_id, "max_new_tokens": max_new_tokens}
    model.generation_config = GenerationConfig(**known, do_sample=False, num_beams=1)


def tokenize(tokenizer: Any, texts: Sequence[str], add_special_tokens: bool = False) -> list[list[int]]:
    """The tokens of each text, whole."""
    if not texts:
        return []
    # Not verbose: the tokenizer would warn of long texts, which are counted afterwards.
    settings = {"add_special_tokens": add_special_tokens, "return_attention_mask": False, "verbose": False}
    tokens: list[list[int]] = tokenizer(list(texts), padding=False, truncation=False, **settings)["input_ids"]
    return tokens


def end_tokens(model: Any) -> list[Any]:
    """The tokens at which a model stops, as its files say."""
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def leading_tokens(tokenizer: Any) -> list[int]:
    """What a tokenizer puts before a text, and nothing of what it puts behind it, such as its end."""
    [plain], [marked] = (tokenize(tokenizer, ["a"], flag) for flag in (False, True))
    starts = range(len(marked) - len(plain) + 1)
    return marked[: next((start for start in starts if marked[start : start + len(plain)] == plain), 0)]


def pad_tokens(rows: Sequence[Sequence[int]], pad_token_id: int, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of tokens as one tensor, and a mask of what is no padding."""
    side, some = "left" if left else "right", [torch.tensor(row, dtype=torch.int64) for row in rows]
    mask = pad_sequence([torch.ones_like(row) for row in some], True, 0, side)
    return pad_sequence(some, True, pad_token_id, side), mask


def generate(model: Any, rows: Sequence[Sequence[int]], pad_token_id: int, **settings: Any) -> torch.Tensor:
    """The tokens that a model writes after each prompt, padded on the right."""
    is_seq2seq = model.config.is_encoder_decoder
    # On the left, so that all answers begin in the same column.
    tokens, mask = pad_tokens(rows, pad_token_id, left=not is_seq2seq)
    whole = model.generate(input_ids=tokens.to(model.device), attention_mask=mask.to(model.device), **settings)
    return whole[:, 1 if is_seq2seq else tokens.shape[1] :].cpu()  # type: ignore[no-any-return]


def score_continuations(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    tokens: torch.Tensor,
    tokens_mask: torch.Tensor,
    owners: torch.Tensor,
    num_at_once: int | None = None,
) -> torch.Tensor:
    """Log-probabilities of the tokens of what follows prompts, float32 `(num_continuations, num_tokens)`, padding 0.

    `tokens` and its mask are padded on the right, and `owners` says whose prompt each continues. Prompts are padded on
    the left, but those of an encoder on the right. A prompt is read once, and its keys and values serve all of its
    continuations, at most `num_at_once` of any prompts in one forward: the shorter they are sorted, the less padding.
    """
    is_seq2seq, accepted = model.config.is_encoder_decoder, inspect.signature(model.forward).parameters
    counts_places = not is_seq2seq and "position_ids" in accepted
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if is_seq2seq:
        inputs["decoder_input_ids"] = input_ids.new_full((len(input_ids), 1), _start_token_id(model))
    if counts_places:
        inputs["position_ids"] = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    # Scores of all tokens of the prompts would be most of the memory.
    few = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
    read = model(**inputs, use_cache=True, **few)
    # transformers renames it, and drops its old name in 5.40.
    name = "cache" if "cache" in accepted else "past_key_values"
    cache = getattr(read, name, None)  # some have none, or another thing in its place
    scores = torch.zeros(tokens.shape, dtype=torch.float32, device=tokens.device)
    # The prompts themselves tell of the first token, so that words of one token need no second forward.
    scores[:, 0] = torch.log_softmax(read.logits[:, -1].float(), dim=-1)[owners, tokens[:, 0]]
    longer = tokens_mask[:, 1:].any(dim=1).nonzero().flatten()
    if not len(longer):
        return scores
    most = _num_at_once(model, cache, len(input_ids), tokens.shape[1])
    for part in longer.split(min(most, num_at_once or most)):
        width = int(tokens_mask[part].sum(dim=1).max())
        before, before_mask = tokens[part, : width - 1], tokens_mask[part, : width - 1]
        mask = attention_mask[owners[part]]
        if is_seq2seq:
            hidden = BaseModelOutput(last_hidden_state=read.encoder_last_hidden_state[owners[part]])
            inputs = {"encoder_outputs": hidden, "attention_mask": mask, "decoder_input_ids": before}
        else:
            inputs = {"input_ids": before, "attention_mask": torch.cat([mask, before_mask], dim=1)}
        if counts_places:
            # Padding stays at the place of the last token, for there may be no further one.
            inputs["position_ids"] = mask.sum(dim=1, keepdim=True) + before_mask.cumsum(dim=1) - 1
        logits = model(**inputs, **{name: _select(cache, owners[part])}, use_cache=True).logits.float()
        log_probs = logits.gather(2, tokens[part, 1:width, None]).squeeze(-1) - logits.logsumexp(dim=2)
        scores[part, 1:width] = log_probs * tokens_mask[part, 1:width]
        del logits  # most of the memory, or they would stand beside the next ones
    return scores


def _select(cache: Any, rows: torch.Tensor) -> Any:
    """Keys and values of some rows, one perhaps several times; the cache itself stays as it is."""
    own = copy.copy(cache)
    if hasattr(cache, "self_attention_cache"):
        own.self_attention_cache = _select(cache.self_attention_cache, rows)
        # Decoders read these where they lie, and never add to them.
        own.cross_attention_cache = copy.copy(cache.cross_attention_cache)
        own.cross_attention_cache.layers = [copy.copy(layer) for layer in cache.cross_attention_cache.layers]
        own.cross_attention_cache.batch_select_indices(rows)
        return own
    own.layers = [_lend(layer, rows) if layer.is_initialized else layer for layer in cache.layers]
    return own


def _lend(layer: Any, rows: torch.Tensor) -> Any:
    """A layer that makes its rows when they are asked for, and keeps nothing: those of all layers are much memory."""
    lent = copy.copy(layer)

    def extend(known: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        # Some rows of what is known, and what is new behind each, copied once.
        room = torch.nn.functional.pad(known, (0, 0, 0, new.shape[-2]))
        whole = room.index_select(0, rows.to(known.device))
        whole[..., known.shape[-2] :, :] = new
        return whole

    lent.update = lambda keys, values, *_, **__: (extend(layer.keys, keys), extend(layer.values, values))
    return lent


def _num_at_once(model: Any, cache: Any, num_rows: int, num_tokens: int) -> int:
    """How many continuations can go on from the same keys and values, of which each gets a copy."""
    both = (cache.self_attention_cache, cache.cross_attention_cache) if model.config.is_encoder_decoder else (cache,)
    layers = [layer for part in both for layer in getattr(part, "layers", [None])]
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        raise ValueError(
            "A language model must keep keys and values that words of several tokens can share, got "
            f"{type(model).__name__} with {type(cache).__name__}. Choose words of one token by `label_texts`, or "
            '`options={"answer": "generate"}`.'
        )
    # Of each row its keys and values, and of each further token scores of 4 bytes, twice.
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers if layer.is_initialized)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    return max(1, _MEMORY_BUDGET // (kept // num_rows + 8 * (num_tokens - 1) * vocabulary))


def _start_token_id(model: Any) -> int:
    """What a decoder reads first."""
    for owner in (model.generation_config, model.config):
        if (token_id := getattr(owner, "decoder_start_token_id", None)) is not None:
            return int(token_id)
    raise ValueError("A decoder must begin with a token, got none as `decoder_start_token_id`. Set it in its files.")

"""A student that writes: what prompts and answers are to it, how likely it finds them, and what it says itself."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.inputs import InputProcessor
from ..models.chat import ChatTemplateError, apply_chat_template
from ..models.language import (
    check_places,
    end_tokens,
    generate,
    leading_tokens,
    load_language_model,
    make_greedy,
    pad_tokens,
    score_continuations,
    tokenize,
)
from ..models.source import find_model, first_line
from ..pool.base import check_kind
from ..processes import Processes
from .head import hash_weights, on_cpu

Prompt = str | list[dict[str, str]]
Tokens = Sequence[int]
Scored = tuple[Tokens, Sequence[Tokens]]  # the tokens of a prompt, and those of what may follow it
MAX_FEATURES = 2048  # of a prompt, unless one layer has more: what a router learns takes the cube of it


class Writer:
    """A language model and its tokenizer, asked as one."""

    def __init__(self, model: Any, tokenizer: Any = None, *, revision: str | None = None) -> None:
        self.origin: dict[str, Any] = {}
        if isinstance(model, (str, os.PathLike)):
            source = find_model(str(model), what="The student", revision=revision)
            model, own = load_language_model(source)
            model, tokenizer = model.float(), own if tokenizer is None else tokenizer
            if not source.is_local:
                self.origin = {"model": source.repo, "revision": source.revision, "commit": source.commit}
        plain: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        is_known = isinstance(plain, PreTrainedModel) and plain.can_generate()
        if not is_known or plain.get_output_embeddings() is None:
            raise TypeError(
                "`student` must be a language model, its Hub id or its folder, got "
                f"{type(model).__name__}. Load one by `AutoModelForCausalLM` or `AutoModelForSeq2SeqLM`."
            )
        check_places(plain, "The student")
        if tokenizer is None:
            raise ValueError("`tokenizer` is needed beside a model object. Load it by `AutoTokenizer`.")
        check_kind(tokenizer, PreTrainedTokenizerBase, "tokenizer")
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "The student must have a token that ends an answer, got a tokenizer without `eos_token`. Set it to "
                "the one that the model knows as its end."
            )
        self.model, self.tokenizer = model, tokenizer
        self.processor = InputProcessor(tokenizer, model.config, "The student")  # sets what texts are padded with
        self.is_seq2seq, self.max_length = bool(model.config.is_encoder_decoder), int(self.processor.max_length or 0)
        self._start = [] if self.is_seq2seq else leading_tokens(tokenizer)

    @property
    def plain(self) -> Any:
        """The model itself, with the layers of its adapters where it has some."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    # --- tokens ------------------------------------------------------------------------------------------------------

    def render(self, prompts: Sequence[Prompt]) -> list[str]:
        """Prompts as texts, messages by the student's own chat template."""
        return [prompt if isinstance(prompt, str) else self._as_text(prompt) for prompt in prompts]

    def _as_text(self, messages: Sequence[Mapping[str, Any]], *, asks: bool = True) -> str:
        try:
            return apply_chat_template(self.tokenizer, messages, asks=asks)
        except ChatTemplateError as error:
            raise ValueError(
                f"The student must have a chat template that takes messages such as {messages[:2]}, got: "
                f"{first_line(error)}. Correct its `chat_template`, or build the pool of texts."
            ) from error

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """The tokens of each prompt, none of one without a word."""
        is_chat, texts = [not isinstance(prompt, str) for prompt in prompts], self.render(prompts)
        rows = tokenize(self.tokenizer, texts, self.is_seq2seq)
        if not self.is_seq2seq:
            rows = [ids if own else self._start + ids for ids, own in zip(rows, is_chat, strict=True)]
        return [ids if _has_words(prompt) else [] for prompt, ids in zip(prompts, rows, strict=True)]

    def encode_answers(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[list[int]]:
        """The tokens of each answer after its prompt, with those that end it."""
        alone = tokenize(self.tokenizer, answers)
        if not self.is_seq2seq:
            texts = self.render(prompts)
            both = [texts, [text + answer for text, answer in zip(texts, answers, strict=True)]]
            stems, whole = (tokenize(self.tokenizer, some) for some in both)
            # As one text where the prompt stays what it is, for many tokens are words with the space before them.
            alone = [
                full[len(stem) :] if full[: len(stem)] == stem else ids
                for stem, full, ids in zip(stems, whole, alone, strict=True)
            ]
        ends = [[self.tokenizer.eos_token_id] if isinstance(p, str) else self._end_of_turn for p in prompts]
        return [ids + end for ids, end in zip(alone, ends, strict=True)]

    @cached_property
    def _end_of_turn(self) -> list[int]:
        """What the chat template puts behind an answer, up to the token at which the model stops."""
        # By writing a turn: nothing but the template itself tells how it ends one.
        asked, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
        before, whole = self._as_text([asked]) + "b", self._as_text([asked, answer], asks=False)
        # The whole turn must begin as the question does, or what follows is no end of it.
        tail = tokenize(self.tokenizer, [whole[len(before) :]])[0] if whole.startswith(before) else []
        ends = {self.tokenizer.eos_token_id, *end_tokens(self.plain)}
        stop = next((place for place, token in enumerate(tail) if token in ends), None)
        return [self.tokenizer.eos_token_id] if stop is None else tail[: stop + 1]

    # --- asking it ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def score(self, items: Sequence[Scored], batch_size: int, processes: Processes, quiet: bool = True) -> np.ndarray:
        """Sum of the log-probabilities of all that follows each prompt, one after another, float32."""
        starts = np.cumsum([0, *(len(following) for _, following in items)])
        sums = np.zeros(starts[-1], dtype=np.float32)
        model = self.plain.eval()
        # The same batches whatever the number of processes.
        for batch in tqdm(processes.share(batches_of(items, batch_size)), "Scoring answers", disable=quiet):
            inputs, places = self.make_batch(items, batch)
            found = score_continuations(model, **inputs, num_at_once=max(batch_size, 16))
            where = [starts[batch[owner]] + number for owner, number in places]
            # In float64: what tells two long answers apart may be little beside their sums.
            sums[where] = found.double().sum(dim=1).float().cpu().numpy()
        sums = processes.sum_array(sums)
        if np.isnan(sums).any():  # which would count as answers that cannot be read
            raise FloatingPointError(
                "How likely the student finds an answer must be a number, got NaN. Check its weights, or load it anew."
            )
        return sums

    def make_batch(
        self, items: Sequence[Scored], batch: Sequence[int]
    ) -> tuple[dict[str, torch.Tensor], list[tuple[int, int]]]:
        """The tensors of some prompts and of all that follows them, short before long; and whose each is."""
        pad = self.tokenizer.pad_token_id
        input_ids, mask = pad_tokens([items[place][0] for place in batch], pad, left=not self.is_seq2seq)
        places = [(owner, number) for owner, place in enumerate(batch) for number in range(len(items[place][1]))]
        # What is scored together is then about as long, and little of it is padding.
        places.sort(key=lambda place: len(items[batch[place[0]]][1][place[1]]))
        tokens, tokens_mask = pad_tokens([items[batch[owner]][1][n] for owner, n in places], pad, left=False)
        inputs = {"input_ids": input_ids, "attention_mask": mask, "tokens": tokens, "tokens_mask": tokens_mask}
        inputs["owners"] = torch.tensor([owner for owner, _ in places])
        return {name: value.to(self.model.device) for name, value in inputs.items()}, places

    @torch.inference_mode()
    def represent(self, prompts: Sequence[Tokens], batch_size: int, processes: Processes) -> np.ndarray:
        """Hidden states of each prompt, their means over its tokens, float32 `(num_prompts, feature_size)`.

        Layers stand side by side, evenly spaced where all are too many; nothing but zeros of a prompt without tokens.
        """
        plain, pad = self.plain.eval(), self.tokenizer.pad_token_id
        model = plain.get_encoder() if self.is_seq2seq else plain.base_model  # without the head

        def means(rows: Sequence[Tokens]) -> np.ndarray:
            input_ids, mask = (value.to(self.model.device) for value in pad_tokens(rows, pad, left=False))
            found = model(input_ids=input_ids, attention_mask=mask, output_hidden_states=True)
            layers = found.hidden_states
            if layers is None or layers[0].shape[:2] != input_ids.shape:  # some keep several states of each token
                layers = (found.last_hidden_state,)
            step = min(-(-len(layers) * layers[0].shape[-1] // MAX_FEATURES), len(layers))
            weights = mask.unsqueeze(2) / mask.sum(dim=1)[:, None, None]
            used = [(layer.float() * weights).sum(dim=1) for layer in layers[step // 2 :: step]]
            return torch.cat(used, dim=1).cpu().numpy()

        batches = _readable_batches(prompts, batch_size)
        # Also for a process whose share is nothing.
        size = means([prompts[batches[0][0]]]).shape[1] if batches else 0
        found = np.zeros((len(prompts), size), dtype=np.float32)
        for batch in processes.share(batches):
            found[batch] = means([prompts[place] for place in batch])
        return processes.sum_array(found)

    @torch.inference_mode()
    def write(
        self, prompts: Sequence[list[int]], max_new_tokens: int, batch_size: int, processes: Processes
    ) -> tuple[list[str], np.ndarray]:
        """The student's own, most probable answer to each prompt in tokens, and whether it has come to its end."""
        # Put back below: the model may be the user's.
        model, saved, pad = self.plain.eval(), self.plain.generation_config, self.tokenizer.pad_token_id
        found = np.zeros((len(prompts), max_new_tokens), dtype=np.int64)
        make_greedy(model, self.tokenizer, max_new_tokens)
        try:
            for batch in processes.share(_readable_batches(prompts, batch_size)):
                rows = [prompts[place] for place in batch]
                # Some models have no positions beyond those that they know.
                room = max_new_tokens if self.is_seq2seq else self.max_length - max(map(len, rows))
                own = generate(model, rows, pad, max_new_tokens=max(1, min(max_new_tokens, room))).numpy()
                found[batch] = pad
                found[np.array(batch)[:, None], np.arange(own.shape[1])] = own
        finally:
            model.generation_config = saved
        found = processes.sum_array(found)  # each has filled in its share
        found[[place for place, ids in enumerate(prompts) if not ids]] = pad
        ends = [pad, self.tokenizer.eos_token_id, *end_tokens(model)]  # what is not written is padding
        is_whole = np.asarray(np.isin(found, ends).any(axis=1))
        return list(self.tokenizer.batch_decode(found, skip_special_tokens=True)), is_whole

    # --- what training changes ---------------------------------------------------------------------------------------

    def prepare(self, training: str, lora: LoraConfig | None, seed: int) -> None:
        """Put adapters on the model where it is trained by them, and remember it as it is before any training."""
        self.model.float()
        if training == "lora" and not isinstance(self.model, PeftModel):
            kind = "SEQ_2_SEQ_LM" if self.is_seq2seq else "CAUSAL_LM"
            # A copy, because peft writes into it, and it may be the user's.
            config = copy.deepcopy(lora) if lora is not None else LoraConfig(target_modules="all-linear")
            config.task_type = config.task_type or kind
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.model = get_peft_model(self.model, config)
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError("A student must have weights that learn, got none. Call `model.requires_grad_(True)`.")
        # On the CPU: a second model on the device would halve what it can hold.
        self._first = {name: value.clone() for name, value in self.tensors().items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Give what training can change."""
        return on_cpu({name: value for name, value in self.model.named_parameters() if value.requires_grad})

    @torch.no_grad()
    def put_back(self, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write over what training changed, by default with what was there before any."""
        own = dict(self.model.named_parameters())
        for name, value in (self._first if tensors is None else tensors).items():
            own[name].copy_(value)

    def digest(self) -> str:
        """Hash all weights, as they were before any training, and what its tokenizer makes of a text."""
        facts = f"{self.processor.fingerprint} {self.tokenizer.chat_template}"
        weights = {name: self._first.get(name, value) for name, value in self.model.state_dict().items()}
        return hash_weights(hashlib.blake2b(facts.encode(), digest_size=8), weights)


WRITER_TRAININGS = ("full", "lora")


def batches_of(items: Sequence[Scored], batch_size: int) -> list[list[int]]:
    """Positions of prompts that are read together, which are about as long, and so is what follows them."""
    order = [place for place, (_, following) in enumerate(items) if following]
    order.sort(key=lambda place: (len(items[place][0]), max(map(len, items[place][1]))))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _readable_batches(prompts: Sequence[Tokens], batch_size: int) -> list[list[int]]:
    """Positions of prompts with tokens that are read together, short before long."""
    order = [place for place in sorted(range(len(prompts)), key=lambda place: len(prompts[place])) if prompts[place]]
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _has_words(prompt: Prompt) -> bool:
    """Whether anything is asked at all."""
    parts = [prompt] if isinstance(prompt, str) else [message.get("content") for message in prompt]
    return any(isinstance(part, str) and part.strip() for part in parts)

"""Teachers that write: language models that go on from a prompt or answer a chat, and columns of ready answers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from ...data.inputs import InputProcessor, RowError, check_text
from ...hierarchy import Teacher, is_writable_text
from ...models.chat import BrokenChatTemplateError, apply_chat_template
from ...models.classifier import load_processor
from ...models.language import load_language_model, make_greedy
from ...models.source import explained, first_line
from .base import Kind, TeacherSource, fingerprint, for_inference, read_options
from .prompted import RENDER_ERRORS, Prompter, compile_template, pad_tokens, tokenizer_identity

OPTIONS: dict[str, Any] = {
    "temperature": 0.0,
    "seed": None,
    "num_answers": 1,
    "max_new_tokens": 256,
    "stop": (),
    "template": None,
    "chat": False,
    "too_long": "raise",
}
_RANGES = {"num_answers": (1, 1000), "max_new_tokens": (1, 100_000), "seed": (0, 2**63 - 1)}
_PLAIN = "{{ text }}"


# A tuple, which JSON writes as it stands.
class Written(NamedTuple):
    """An answer, the sum of its tokens' log-probabilities and their number, how it ended, and all that was sampled."""

    text: str | None
    log_prob: float | None = None
    num_tokens: int = 0
    reason: str = "missing"
    samples: list[str] | None = None


def as_array(answers: Sequence[Written]) -> np.ndarray:
    """Answers as an array of objects `(num_rows,)`."""
    array = np.empty(len(answers), dtype=object)
    # One by one: numpy would make a matrix of records of equal length.
    for place, answer in enumerate(answers):
        array[place] = answer
    return array


class WrittenColumn:
    """Answers in words that are in a column already: from an endpoint, from people, from another tool."""

    def __init__(self, teacher: Teacher) -> None:
        self.column: str | None = teacher.model
        self.facts = {"kind": "column", "class": "column"} | dict.fromkeys(("revision", "commit", "preprocessing"))

    def prepare(self, cells: Sequence[Any]) -> list[Written]:
        """Read each cell: a text, several texts of which the first one counts, or nothing."""
        return [self._read(cell) for cell in cells]

    def __call__(self, inputs: Sequence[Written]) -> np.ndarray:
        return as_array(inputs)

    def _read(self, cell: Any) -> Written:
        given = [text for text in (cell if isinstance(cell, list) else [cell]) if text is not None]
        if wrong := [text for text in given if not isinstance(text, str) or not is_writable_text(text)]:
            raise RowError(
                f"Answers in column '{self.column}' must be texts, lists of texts or None, without NUL and without "
                f"halves of characters, got {wrong[0]!r}"
            )
        texts = [text for text in given if text.strip()]
        samples = texts if isinstance(cell, list) else None
        return Written(texts[0], reason="given", samples=samples) if texts else Written(None, samples=samples)


class WrittenTeacher:
    """A language model, causal or from sequence to sequence, that writes an answer to each prompt."""

    column: str | None = None
    batch_size: int = 16  # whoever asks may set another: no answer hangs on it

    def __init__(self, source: TeacherSource, device: torch.device) -> None:
        self.name, model_source = source.name, source.model_source
        self.options = _check_options(source.teacher)
        folder = model_source.fetch()
        model = load_language_model(model_source)
        tokenizer = load_processor(model_source, folder, is_text=True)
        processor = InputProcessor(tokenizer, model.config, f"Teacher '{self.name}'")
        self.tokenizer, self.is_seq2seq = tokenizer, bool(model.config.is_encoder_decoder)
        # Prompt and answer share the positions of a causal model; a decoder has its own.
        room = 0 if self.is_seq2seq else self.options["max_new_tokens"]
        self.prepare = WrittenPrompter(
            name=self.name,
            tokenizer=tokenizer,
            template=self.options["template"] or _PLAIN,
            labels=(),
            words=(),
            is_seq2seq=self.is_seq2seq,
            max_length=int(processor.max_length or 0) - room,
            options={**self.options, "separator": None},
        )
        if self.prepare.max_length < 1:
            raise ValueError(
                f"Option `max_new_tokens` of teacher '{self.name}' must leave room for a prompt in the "
                f"{processor.max_length} tokens that it reads, got {room}. Give a lower one in its `options`."
            )
        if self.options["chat"]:
            self.prepare.check_chat()
        if self.options["chat"] or self.options["template"]:
            self.prepare.check()
        make_greedy(model, tokenizer, self.options["max_new_tokens"])
        ends = model.generation_config.eos_token_id
        ends, size = ends if isinstance(ends, list) else [ends], model.get_output_embeddings().weight.shape[0]
        # Without an end that it can say, every answer would go on to `max_new_tokens`.
        if not all(type(end) is int for end in ends) or not any(0 <= end < size for end in ends):
            found = "none" if ends in ([], [None]) else f"{ends[:4]} as `eos_token_id` for {size} tokens"
            raise ValueError(
                f"Teacher '{self.name}' must have a token that ends an answer, got {found} in '{model_source.place}'. "
                "Set the tokenizer's `eos_token`, and save it there again."
            )
        self.device = device
        self.model: Any = for_inference(model, device)
        self.ends = torch.tensor(ends, device=device)
        seen = [processor.fingerprint, tokenizer.chat_template, self.prepare.max_length]
        self.facts = source.facts("written", type(model).__name__, fingerprint([*seen, self.options]))
        self.facts |= tokenizer_identity(model_source) | {"dtype": str(model.dtype).removeprefix("torch.")}
        self.facts["generation"] = {**self.options, "stop": list(self.options["stop"])}
        with explained(model_source, "language model"):
            self._write(self.prepare(["a text"]), [0], 1)  # what fails later is a row's fault

    def __call__(self, inputs: Sequence[_Encoded]) -> np.ndarray:
        # Prompts of similar length side by side, so that little is padded.
        order = sorted(range(len(inputs)), key=lambda place: len(inputs[place].tokens))
        answers: list[Any] = [None] * len(inputs)
        count = self.options["num_answers"]
        step = max(1, self.batch_size // count)
        for start in range(0, len(order), step):
            some = order[start : start + step]
            repeated = [inputs[place] for place in some for _ in range(count)]
            found = iter(self._write(repeated, list(range(count)) * len(some), self.options["max_new_tokens"]))
            for place in some:
                own = list(islice(found, count))
                samples = [one.text for one in own if one.text is not None] if count > 1 else None
                # The first that says something, so that `answer` is missing only where all are.
                first = next((one for one in own if one.text is not None), own[0])
                answers[place] = first._replace(samples=samples)
        return as_array(answers)

    def _write(self, rows: Sequence[_Encoded], numbers: Sequence[int], max_new_tokens: int) -> list[Written]:
        # On the left, so that all answers begin in the same column.
        tokens, mask = pad_tokens([row.tokens for row in rows], self.tokenizer.pad_token_id, left=not self.is_seq2seq)
        start = 1 if self.is_seq2seq else tokens.shape[1]
        recorder = _Recorder(self.tokenizer, len(rows), start, self.ends, self.options["stop"])
        seeds = [self._seed(row, number) for row, number in zip(rows, numbers)]
        chooser = _Chooser(recorder, self.options["temperature"], seeds, self.device)
        with torch.inference_mode():
            whole = self.model.generate(
                input_ids=tokens.to(self.device),
                attention_mask=mask.to(self.device),
                max_new_tokens=max_new_tokens,
                logits_processor=LogitsProcessorList([chooser]),
                stopping_criteria=StoppingCriteriaList([recorder]),
            )
        written, log_probs = whole[:, start:].cpu(), recorder.log_probs.cpu().tolist()
        lengths, ended = recorder.lengths.cpu().tolist(), recorder.ended.cpu().tolist()
        return [
            self._read(row, written[place, : lengths[place]], log_probs[place], lengths[place], bool(ended[place]))
            for place, row in enumerate(rows)
        ]

    def _read(self, row: _Encoded, tokens: torch.Tensor, log_prob: float, length: int, has_ended: bool) -> Written:
        """The text of an answer as it goes on from the text of its prompt."""
        text = self._decode(tokens.tolist())
        if not self.is_seq2seq:
            # Some tokenizers drop the blank before a first word, which stands between prompt and answer.
            before, both = self._decode(row.tokens), self._decode([*row.tokens, *tokens.tolist()])
            text = both[len(before) :] if both.startswith(before) else text
        text = text.removeprefix(row.tail) if row.tail else text
        for stop in self.options["stop"]:  # and what its last token has behind it
            text = text.split(stop, 1)[0]
        # What no file holds is no answer to keep; whoever checks the batch says so of its row.
        if not text.strip():
            return Written(None, reason="blank")
        return Written(text, log_prob, length, "stop" if has_ended else "length")

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _seed(self, row: _Encoded, number: int) -> int:
        """Of the prompt and which of its answers it is, so that no batch and no process changes what is drawn."""
        # 63 bits, which is what torch takes.
        key = repr([self.options["seed"], self.name, row.tokens, number]).encode("utf-8")
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


class _Recorder(StoppingCriteria):
    """Sum the log-probability of each answer as it grows, and end those that have said what they should."""

    def __init__(self, tokenizer: Any, num_rows: int, start: int, ends: torch.Tensor, stop: Sequence[str]) -> None:
        self.tokenizer, self.start, self.ends, self.stop = tokenizer, start, ends, stop
        self.all_log_probs = torch.zeros(0)
        self.log_probs = torch.zeros(num_rows, device=ends.device)
        self.lengths = torch.zeros(num_rows, dtype=torch.int64, device=ends.device)
        self.ended = torch.zeros(num_rows, dtype=torch.bool, device=ends.device)
        # A token holds a byte at least, but for special ones.
        self.num_last = max((len(text.encode("utf-8")) for text in stop), default=0) + 4

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        token = input_ids[:, -1:]
        # Rows that have ended go on with padding until the last one has, which is none of their answer.
        self.log_probs += torch.where(self.ended, 0, self.all_log_probs.gather(1, token)[:, 0])
        self.lengths += ~self.ended
        now = torch.isin(token[:, 0], self.ends)
        if self.stop:  # a text may end within a token, so that no token stands for it
            last = input_ids[:, max(self.start, input_ids.shape[1] - self.num_last) :]
            texts = self.tokenizer.batch_decode(last, clean_up_tokenization_spaces=False)
            now |= torch.tensor([any(stop in text for stop in self.stop) for text in texts], device=now.device)
        self.ended |= now
        return self.ended


class _Chooser(LogitsProcessor):
    """Tell the recorder how likely each token is, and let the most likely one win, or one drawn at a temperature."""

    def __init__(self, recorder: _Recorder, temperature: float, seeds: Sequence[int], device: torch.device) -> None:
        self.recorder, self.temperature = recorder, temperature
        # One generator for each answer: what is drawn for one hangs on no other.
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds] if temperature else []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # As the model has it, before any temperature: how sure it is does not hang on how it is asked.
        self.recorder.all_log_probs = torch.log_softmax(scores.float(), dim=-1)
        if not self.temperature:
            return scores
        size, device = scores.shape[1], scores.device
        uniform = torch.stack([torch.rand(size, generator=one, device=device) for one in self.generators])
        # The greatest of logits with Gumbel noise is a draw from their softmax.
        return scores / self.temperature - torch.log(-torch.log(uniform))


# ── prompts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Encoded(NamedTuple):
    """The tokens of a prompt, and the blanks at its end, which are left to the answer's first token."""

    tokens: list[int]
    tail: str


@dataclass(frozen=True)
class WrittenPrompter(Prompter):
    """Turn texts or chat messages into tokens of prompts; kept apart from the weights."""

    def __call__(self, cells: Sequence[Any]) -> list[_Encoded]:  # type: ignore[override]
        # A column is of one type: what the first one is, all are, or are refused.
        is_chat = bool(cells) and not isinstance(cells[0], str)
        for cell in cells:
            (_check_messages if is_chat else _check_prompt)(cell)
        if is_chat and (self.options["chat"] or self.template != _PLAIN):
            raise ValueError(
                f"Options `template` and `chat` of teacher '{self.name}' are for prompts that are texts, got "
                "messages. Leave them out."
            )
        if is_chat:
            self.check_chat()
        encoded = self._encode_chats(cells) if is_chat else [tokens for tokens, _ in self.encode(cells)]
        rows = []
        for cell, tokens in zip(cells, encoded, strict=True):
            if len(tokens) > self.max_length:
                if is_chat and self.options["too_long"] == "cut":
                    raise RowError(
                        f"A prompt of messages must have at most {self.max_length} tokens, got {len(tokens)}; only "
                        "texts are cut. Shorten it"
                    )
                tokens = self._shorten(cell, len(tokens))[0]
            if not tokens:
                raise RowError(f"A prompt must have at least one token, got none for {cell!r}")
            # Tokens begin with the blank before a word: the prompt's last one must be the answer's first.
            has_tail = not (is_chat or self.is_seq2seq or self.options["chat"])
            text = self.render(cell) if has_tail else ""
            rows.append(_Encoded(tokens, text[len(text.rstrip(" ")) :]))
        return rows

    def check_chat(self) -> None:
        """See that there is a chat template, where one is needed."""
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"Teacher '{self.name}' must have a chat template to answer messages, got none. Give prompts that are "
                "texts, and write the whole prompt as option `template`."
            )

    def _encode_chats(self, cells: Sequence[Any]) -> list[list[int]]:
        chats = [[{"role": one["role"], "content": one["content"]} for one in cell] for cell in cells]
        try:
            texts = [apply_chat_template(self.tokenizer, chat) for chat in chats]
        except BrokenChatTemplateError as error:
            raise ValueError(
                f"Teacher '{self.name}' must have a chat template that can be filled in, got one whose fault is this: "
                f"{first_line(error)}. Correct its `chat_template`."
            ) from error
        except RENDER_ERRORS as error:
            raise RowError(
                f"The chat template of teacher '{self.name}' cannot take these messages: {first_line(error)}"
            ) from error
        return self._tokenize(texts, add_special_tokens=False)


def _check_prompt(cell: Any) -> None:
    check_text(cell)
    if not cell.strip():
        raise RowError(f"A prompt must say something, got {cell!r}")


def _check_messages(cell: Any) -> None:
    is_list = isinstance(cell, list) and all(isinstance(one, Mapping) for one in cell)
    if not is_list or not all(isinstance(one.get(key), str) for one in cell for key in ("role", "content")):
        raise RowError(f"A prompt must be a text, or messages with the texts `role` and `content`, got {cell!r}")
    if not cell or cell[-1]["role"] == "assistant" or not cell[-1]["content"].strip():
        raise RowError(f"Messages must end with one that asks for an answer, got {cell[-1:]!r}")
    for message in cell:
        check_text(message["content"])


# ── what is asked for ───────────────────────────────────────────────────────────────────────────────────────────────


def _check_options(teacher: Teacher) -> dict[str, Any]:
    """The options of a teacher, each of a value that it may have."""
    options = read_options(teacher, "written", OPTIONS)
    stop = options["stop"]
    options["stop"] = stop = (stop,) if isinstance(stop, str) else stop

    def check(key: str, is_right: bool, rule: str, advice: str = "Correct it.") -> None:
        if not is_right:
            found = "none" if options[key] is None else repr(options[key])
            raise ValueError(f"Option `{key}` of teacher '{teacher.name}' {rule}, got {found}. {advice}")

    for key, (least, most) in _RANGES.items():
        is_whole = type(options[key]) is int and least <= options[key] <= most
        check(key, is_whole or key == "seed" and options[key] is None, f"must be an integer in {least}..{most}")
    hot, template = options["temperature"], options["template"]
    # 100 makes all tokens about as likely; more would only lose digits.
    is_number = isinstance(hot, int | float) and not isinstance(hot, bool) and 0 <= hot <= 100
    check("temperature", is_number, "must be a number from 0 (the likeliest token) to 100")
    check("seed", not hot or options["seed"] is not None, "is needed with a `temperature`", "Give one.")
    is_drawn = bool(hot) or options["num_answers"] == 1
    check("num_answers", is_drawn, "must be 1 without a `temperature`", "All would be equal.")
    are_texts = isinstance(stop, tuple | list) and all(isinstance(text, str) and text for text in stop)
    check("stop", are_texts, "must be texts that end an answer", "Write ['\\n'].")
    check("chat", type(options["chat"]) is bool, "must be true or false")
    check("too_long", options["too_long"] in ("raise", "cut"), "must be 'raise' or 'cut'")
    check("template", isinstance(template, str | None), "must be a text with a slot `{{ text }}`")
    if template is not None:
        compile_template(template, teacher.name)
    return {**options, "stop": tuple(stop), "temperature": float(hot)}


def _load(source: TeacherSource, labels: Sequence[str], device: torch.device) -> Any:
    return WrittenColumn(source.teacher) if source.files is None else WrittenTeacher(source, device)


def _identify(source: TeacherSource) -> tuple[dict[str, Any], int]:
    if source.files is None:
        return {}, 0
    _check_options(source.teacher)  # before any weights are read
    return source.model_source.identity | tokenizer_identity(source.model_source), source.model_source.num_bytes


KIND = Kind(load=_load, identify=_identify, options=OPTIONS)

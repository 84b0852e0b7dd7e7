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

from ...data.inputs import RowError
from ...hierarchy import Teacher, is_writable_text
from ...models.chat import BrokenChatTemplateError, apply_chat_template
from ...models.language import end_tokens, generate, tokenize
from ...models.source import explained, first_line
from .base import Kind, TeacherSource, check_option, fingerprint, for_inference, read_options
from .prompted import PLAIN, RENDER_ERRORS, Prompter, check_template, load_prompter, tokenizer_identity

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
_ALLOWED: dict[str, Any] = {"num_answers": range(1, 1001), "max_new_tokens": range(1, 100_001)}
_ALLOWED |= {"chat": (False, True), "too_long": ("raise", "cut")}


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
    return np.fromiter(answers, dtype=object, count=len(answers))  # of records of equal length no matrix


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
        self.name, self.options = source.name, _check_options(source.teacher)
        model, self.prepare, seen, known = load_prompter(source, WrittenPrompter, self.options)
        self.tokenizer, self.is_seq2seq = self.prepare.tokenizer, self.prepare.is_seq2seq
        ends, size = end_tokens(model), model.get_output_embeddings().weight.shape[0]
        # Without an end that it can say, every answer would go on to `max_new_tokens`.
        if not all(type(end) is int for end in ends) or not any(0 <= end < size for end in ends):
            raise ValueError(
                f"Teacher '{self.name}' must have a token that ends an answer, got {ends[:4]} as `eos_token_id` for "
                f"{size} tokens in '{source.model_source.place}'. Set the tokenizer's `eos_token`, and save it there "
                "again."
            )
        self.device = device
        self.model: Any = for_inference(model, device)
        self.ends = torch.tensor(ends, device=device)
        asked = fingerprint([*seen, self.prepare.max_length, self.options])
        self.facts = source.facts("written", type(model).__name__, asked) | known
        self.facts["generation"] = {**self.options, "stop": list(self.options["stop"])}
        with explained(source.model_source, "language model"):
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
        prompts = [row.tokens for row in rows]
        start = 1 if self.is_seq2seq else max(map(len, prompts))
        recorder = _Recorder(self.tokenizer, len(rows), start, self.ends, self.options["stop"])
        seeds = [self._seed(row, number) for row, number in zip(rows, numbers)]
        chooser = _Chooser(recorder, self.options["temperature"], seeds, self.device)
        with torch.inference_mode():
            written = generate(
                self.model,
                prompts,
                self.tokenizer.pad_token_id,
                max_new_tokens=max_new_tokens,
                logits_processor=LogitsProcessorList([chooser]),
                stopping_criteria=StoppingCriteriaList([recorder]),
            )
        known = (values.tolist() for values in (recorder.lengths, recorder.log_probs, recorder.ended))
        found = zip(rows, written.tolist(), *known)
        return [self._read(row, tokens[:length], *how) for row, tokens, length, *how in found]

    def _read(self, row: _Encoded, tokens: list[int], log_prob: float, has_ended: bool) -> Written:
        """The text of an answer as it goes on from the text of its prompt."""
        text = self._decode(tokens)
        if not self.is_seq2seq:
            # Some tokenizers drop the blank before a first word, which stands between prompt and answer.
            before, both = self._decode(row.tokens), self._decode([*row.tokens, *tokens])
            text = both[len(before) :] if both.startswith(before) else text
        text = text.removeprefix(row.tail)
        for stop in self.options["stop"]:  # and what its last token has behind it
            text = text.split(stop, 1)[0]
        # What no file holds is no answer to keep; whoever checks the batch says so of its row.
        if not text.strip():
            return Written(None, reason="blank")
        return Written(text, log_prob, len(tokens), "stop" if has_ended else "length")

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

    def __call__(self, cells: Sequence[Any]) -> list[_Encoded]:
        # A column is of one type: what the first one is, all are, or are refused.
        if cells and not isinstance(cells[0], str):
            return self._encode_chats(cells)
        for cell in cells:
            _check_writable(cell)
        if blank := [cell for cell in cells if isinstance(cell, str) and not cell.strip()]:
            raise RowError(f"A prompt must say something, got {blank[0]!r}")
        rows = [tokens for tokens, _ in self.fit(cells)]
        if self.is_seq2seq or self.options["chat"]:
            return [_Encoded(tokens, "") for tokens in rows]
        # Tokens begin with the blank before a word: the prompt's last one must be the answer's first.
        texts = [self.render(cell) for cell in cells]
        return [_Encoded(tokens, text[len(text.rstrip(" ")) :]) for tokens, text in zip(rows, texts)]

    def _encode_chats(self, cells: Sequence[Any]) -> list[_Encoded]:
        for cell in cells:
            _check_messages(cell)
        if self.options["chat"] or self.template != PLAIN:
            raise ValueError(
                f"Options `template` and `chat` of teacher '{self.name}' are for prompts that are texts, got "
                "messages. Leave them out."
            )
        self.check_chat()
        chats = [[{"role": one["role"], "content": one["content"]} for one in cell] for cell in cells]
        try:
            rows = tokenize(self.tokenizer, [apply_chat_template(self.tokenizer, chat) for chat in chats])
        except BrokenChatTemplateError as error:
            raise ValueError(
                f"Teacher '{self.name}' must have a chat template that can be filled in, got one whose fault is this: "
                f"{first_line(error)}. Correct its `chat_template`."
            ) from error
        except RENDER_ERRORS as error:
            raise RowError(
                f"The chat template of teacher '{self.name}' cannot take these messages: {first_line(error)}"
            ) from error
        if wrong := [len(row) for row in rows if not 0 < len(row) <= self.max_length]:
            raise RowError(
                f"Messages must have 1 to {self.max_length} tokens, got {wrong[0]}; only texts are cut. Shorten them"
            )
        return [_Encoded(row, "") for row in rows]


def _check_messages(cell: Any) -> None:
    is_list = isinstance(cell, list) and all(isinstance(one, Mapping) for one in cell)
    if not is_list or not all(isinstance(one.get(key), str) for one in cell for key in ("role", "content")):
        raise RowError(f"A prompt must be a text, or messages with the texts `role` and `content`, got {cell!r}")
    if not cell or cell[-1]["role"] == "assistant" or not cell[-1]["content"].strip():
        raise RowError(f"Messages must end with one that asks for an answer, got {cell[-1:]!r}")
    for message in cell:
        _check_writable(message["role"])
        _check_writable(message["content"])


def _check_writable(text: Any) -> None:
    # What is no text at all has a sentence of its own.
    if isinstance(text, str) and not is_writable_text(text):
        raise RowError(f"A prompt must be text without NUL and without halves of characters, got {text!r}")


# ── what is asked for ───────────────────────────────────────────────────────────────────────────────────────────────


def _check_options(teacher: Teacher) -> dict[str, Any]:
    """The options of a teacher, each of a value that it may have."""
    options = read_options(teacher, "written", OPTIONS)
    for key, allowed in _ALLOWED.items():
        check_option(teacher, options, key, allowed)
    if options["seed"] is not None:
        check_option(teacher, options, "seed", range(2**63))
    if options["template"] is not None:
        check_template(teacher, options["template"])
    hot, stop = options["temperature"], options["stop"]
    options["stop"] = stop = (stop,) if isinstance(stop, str) else stop
    # 100 makes all tokens about as likely; more would only lose digits.
    is_number = isinstance(hot, int | float) and not isinstance(hot, bool) and 0 <= hot <= 100
    are_texts = isinstance(stop, tuple | list) and all(isinstance(text, str) and text for text in stop)
    rules = {
        "temperature": (is_number, "must be a number from 0 (the likeliest token) to 100"),
        "seed": (not hot or options["seed"] is not None, "is needed with a `temperature`"),
        "num_answers": (hot or options["num_answers"] == 1, "must be 1 without a `temperature`"),  # all are equal
        "stop": (are_texts, "must be texts that end an answer"),
    }
    for key, (is_right, rule) in rules.items():
        if not is_right:
            raise ValueError(f"Option `{key}` of teacher '{teacher.name}' {rule}, got {options[key]!r}. Correct it.")
    return {**options, "stop": tuple(stop), "temperature": float(hot)}


def _load(source: TeacherSource, labels: Sequence[str], device: torch.device) -> Any:
    return WrittenColumn(source.teacher) if source.files is None else WrittenTeacher(source, device)


def _identify(source: TeacherSource) -> tuple[dict[str, Any], int]:
    if source.files is None:
        return {}, 0
    _check_options(source.teacher)  # before any weights are read
    return source.model_source.identity | tokenizer_identity(source.model_source), source.model_source.num_bytes


KIND = Kind(load=_load, identify=_identify, options=OPTIONS)

"""Teachers that are language models: a prompt for each row, and the probabilities of words, or an answer in words."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from os.path import commonprefix
from typing import Any, TypeVar

import jinja2
import numpy as np
import torch
from jinja2 import meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ...data.columns import shorten
from ...data.inputs import InputProcessor, RowError, check_text
from ...hierarchy import Teacher
from ...models.chat import apply_chat_template, parse_template
from ...models.language import (
    leading_tokens,
    load_language_model,
    make_greedy,
    pad_tokens,
    score_continuations,
    tokenize,
)
from ...models.source import ModelSource, explained, first_line, hash_files
from .base import (
    Kind,
    Preparation,
    TeacherSource,
    add_up,
    check_option,
    fingerprint,
    fold_answer,
    for_inference,
    label_positions,
    label_texts,
    read_options,
)

logger = logging.getLogger(__name__)
_ALLOWED: dict[str, Any] = {  # of choices the first is the default
    **{"chat": (False, True), "answer": ("words", "generate"), "separator": (None, "", " ")},
    **dict.fromkeys(("length_normalize", "correct_prior"), (False, True)),
    **{"max_new_tokens": range(1, 1001), "too_long": ("raise", "cut")},
}
OPTIONS = {"template": None} | {key: allowed[0] for key, allowed in _ALLOWED.items()} | {"max_new_tokens": 16}
# A template may come with a hierarchy from the Hub. Of Jinja this much can neither call anything nor grow a text
# without bound, nor run for ever.
_NODES = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.Name, nodes.Const, nodes.Filter, nodes.If),
    *(nodes.CondExpr, nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.Getitem, nodes.Slice),
)
_FILTERS = (
    *("capitalize", "first", "join", "last", "length", "lower", "title", "trim"),
    *("truncate", "upper", "wordcount"),
)
_MOST_LETTERS, _MOST_DEPTH = 1 << 16, 50
RENDER_ERRORS = (jinja2.TemplateError, ArithmeticError, AssertionError, LookupError, TypeError, ValueError)
_SAMPLES = ("a text", "another one")
PLAIN = "{{ text }}"  # the template of who is given none
# The words of an answer, without the signs by which a model may set them off.
fold = partial(fold_answer, blanks="PS")
_Encoded = tuple[list[int], list[list[int]]]
P = TypeVar("P", bound="Prompter")


class PromptedTeacher:
    """A language model, causal or from sequence to sequence, which is asked for a label in words."""

    column: str | None = None

    def __init__(self, source: TeacherSource, labels: Sequence[str], device: torch.device) -> None:
        name, self.options = source.name, _check_options(source.teacher)
        texts = label_texts(source.teacher, labels)
        self.by_words = self.options["answer"] == "words"
        self.answers = {} if self.by_words else _fold_all(texts, name)
        words = tuple(word.strip() for words in texts.values() for word in words) if self.by_words else ()
        model, self.prompter, seen, known = load_prompter(source, Prompter, self.options, tuple(labels), words)
        self.own_labels, self.num_labels = list(texts), len(labels)
        self.positions = label_positions(source.teacher, self.own_labels, labels)
        # Which of its own labels each word belongs to.
        self.owners = np.array([own for own, words in enumerate(texts.values()) for _ in words])
        self.device = device
        self.model: Any = for_inference(model, device)
        self.prepare = Preparation(name, True, self.prompter)
        prompt = [words, self.prompter.max_length, self.options, labels]
        self.facts = source.facts("prompted", type(model).__name__, fingerprint([*seen, *prompt]))
        self.facts |= known | {
            # A card shows it, and a template may be pages long.
            "template": fingerprint(self.options["template"]),
            "words": {label: list(words) for label, words in texts.items()},
        }
        self.prior: Any = 0.0
        self._try_out(source)

    def _try_out(self, source: TeacherSource) -> None:
        """Ask of samples, so that what fails later is a row's fault, and of nothing for the prior."""
        self.has_warned = True  # of these nobody wants to hear
        try:
            samples, nothing = self.prepare(_SAMPLES), self.prepare([""]) if self.options["correct_prior"] else None
        except RowError as error:
            raise ValueError(
                f"Teacher '{source.name}' must be able to read any short text by its `template`, got: "
                f"{str(error).rstrip('.')}. Correct the template."
            ) from error
        with explained(source.model_source, "language model"):
            self(samples)
            if nothing is not None and self.by_words:
                self.prior = self._score(nothing)
        self.has_warned = False

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> np.ndarray:
        if not self.by_words:
            return self._generate(inputs)
        scores = self._score(inputs) - self.prior
        probs = np.zeros((len(scores), len(self.own_labels)), dtype=np.float32)
        # Taken away first, or the exponentials of long words would all be 0.
        largest = scores.max(axis=1, keepdims=True)
        # Several words of a label: the probability that it is any of them.
        np.add.at(probs.T, self.owners, np.exp(scores - largest).T)
        return add_up(probs / probs.sum(axis=1, keepdims=True), self.positions, self.num_labels)

    @torch.inference_mode()
    def _score(self, inputs: Mapping[str, torch.Tensor]) -> np.ndarray:
        """Log-probability of each word, or its mean over tokens, float32 `(num_rows, num_words)`."""
        inputs = {key: value.to(self.device, non_blocking=True) for key, value in inputs.items()}
        prompts, words, mask = (inputs["input_ids"], inputs["attention_mask"]), inputs["words"], inputs["words_mask"]
        owners = torch.arange(len(words), device=self.device).repeat_interleave(words.shape[1])
        scores = score_continuations(self.model, *prompts, words.flatten(0, 1), mask.flatten(0, 1), owners)
        scores = scores.sum(dim=1).view(words.shape[:2])
        if self.options["length_normalize"]:
            scores = scores / mask.sum(dim=2)
        return scores.float().cpu().numpy()

    @torch.inference_mode()
    def _generate(self, inputs: Mapping[str, torch.Tensor]) -> np.ndarray:
        """One label with certainty, or none, for each row."""
        inputs = {key: value.to(self.device, non_blocking=True) for key, value in inputs.items()}
        tokens = self.model.generate(**inputs)
        if not self.prompter.is_seq2seq:
            # A causal model gives its prompt back before what it adds.
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
        probs = np.zeros((len(tokens), len(self.own_labels)), dtype=np.float32)
        answers = self.prompter.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        for row, answer in enumerate(answers):
            # What a model adds below its answer, such as a next example, belongs to no label.
            line = next((line for line in answer.splitlines() if line.strip()), "")
            if (label := self.answers.get(fold(line))) is not None:
                probs[row, self.own_labels.index(label)] = 1
        if not probs.any() and not self.has_warned:
            self.has_warned = True
            logger.warning(
                f"Teacher '{self.prompter.name}' must answer by words of labels, got none of them in {len(answers)} "
                f"answers, first {answers[0]!r}. Ask for one word, or add words by `label_texts`."
            )
        return add_up(probs, self.positions, self.num_labels)


# ── prompts and words as tokens ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Prompter:
    """Turn cells into the tokens of their prompts and of the words that may follow; kept apart from the weights."""

    name: str
    tokenizer: Any
    template: str
    labels: tuple[str, ...]
    words: tuple[str, ...]
    is_seq2seq: bool
    max_length: int
    options: Mapping[str, Any]

    def __call__(self, cells: Sequence[Any]) -> Any:
        rows, pad = self.fit(cells), self.tokenizer.pad_token_id
        # Prompts of causal models end where their words begin.
        tokens, mask = pad_tokens([prompt for prompt, _ in rows], pad, left=not self.is_seq2seq)
        batch = {"input_ids": tokens, "attention_mask": mask}
        if self.words:
            tokens, mask = pad_tokens([word for _, words in rows for word in words], pad, left=False)
            shape = (len(rows), len(self.words), -1)
            batch |= {"words": tokens.view(shape), "words_mask": mask.view(shape)}
        return batch

    def fit(self, cells: Sequence[Any]) -> list[_Encoded]:
        """Tokens of each prompt that the model can read, and of each word after it."""
        for cell in cells:
            check_text(cell)
        rows = [
            row if self._length(row) <= self.max_length else self._shorten(cell, self._length(row))
            for cell, row in zip(cells, self.encode(cells), strict=True)
        ]
        if empty := [cell for cell, (prompt, _) in zip(cells, rows, strict=True) if not prompt]:
            raise RowError(f"A prompt must have at least one token, got none for {empty[0]!r}")
        return rows

    def render(self, text: str) -> str:
        """The prompt of a text, as the model reads it."""
        prompt = compile_template(self.template, self.name).render(text=text, labels=self.labels)
        if not self.options["chat"]:
            return prompt
        messages = [{"role": "user", "content": prompt}]
        return apply_chat_template(self.tokenizer, messages)

    def encode(self, cells: Sequence[str]) -> list[_Encoded]:
        """Tokens of each prompt, and of each word after it."""
        try:
            prompts = [self.render(cell) for cell in cells]
        except RENDER_ERRORS as error:
            raise RowError(f"The template of the prompt cannot be filled in: {first_line(error)}") from error
        if self.is_seq2seq:
            # A decoder reads words alone, so that no token reaches over from the prompt.
            words = tokenize(self.tokenizer, self.words)
            return [(prompt, words) for prompt in tokenize(self.tokenizer, prompts, True)]
        # A chat template writes the first token itself.
        before = [] if self.options["chat"] else leading_tokens(self.tokenizer)
        pairs = [self._border(prompt) for prompt in prompts]
        rows = self._encode_by_ends(pairs) if self.words and self._is_local else self._encode_whole(pairs)
        return [(before + prompt, words) for prompt, words in rows]

    def _encode_by_ends(self, pairs: Sequence[tuple[str, str]]) -> list[_Encoded]:
        """What [`_encode_whole`] gives, where mostly the end of a prompt alone bears on the tokens of its words."""
        firsts = tokenize(self.tokenizer, ["".join(pair) + self.words[0] for pair in pairs])
        # Most prompts end alike, so that there are few of these, and they are short.
        ends = [(stem[_last_space(stem) :], border) for stem, border in pairs]
        distinct = list(dict.fromkeys(ends))
        known = dict(zip(distinct, self._encode_whole(distinct), strict=True))
        rows = []
        for pair, first, end in zip(pairs, firsts, ends, strict=True):
            prompt, words = known[end]
            start = len(first) - len(prompt) - len(words[0])
            is_same = start >= 0 and first[start:] == prompt + words[0]
            # The rest are of tokenizers that read the end of a text in another way than the whole.
            rows.append((first[:start] + prompt, words) if is_same else self._encode_whole([pair])[0])
        return rows

    def _encode_whole(self, pairs: Sequence[tuple[str, str]]) -> list[_Encoded]:
        """Tokens of prompts, or of their ends, and of each word after them."""
        stems = tokenize(self.tokenizer, [stem for stem, _ in pairs])
        # Together with its prompt, since tokens may reach over the border: what all of a row have in common is its
        # prompt, and the rest of each is its word.
        texts = [stem + border + word for stem, border in pairs for word in self.words]
        whole, size = tokenize(self.tokenizer, texts), len(self.words)
        rows = []
        for row, stem in enumerate(stems):
            own = whole[row * size : (row + 1) * size]
            shared = len(commonprefix([stem, *own]))
            rows.append((stem[:shared], [word[shared:] for word in own]))
        return rows

    @cached_property
    def _is_local(self) -> bool:
        """Whether what follows a space says nothing of the tokens before it."""
        # Each word is then read by itself. Others read all of a text at once.
        splits = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "pre_tokenizer", None)
        return splits is not None and "Metaspace" not in str(splits)

    def check(self) -> None:
        """See that two texts have two prompts, and that words are told apart by their tokens."""
        what, is_chat = f"Teacher '{self.name}'", self.options["chat"]
        if is_chat:
            self.check_chat()
        try:
            prompts = [self.render(sample) for sample in _SAMPLES]
        except RENDER_ERRORS as error:
            part = "a chat template that takes a message of the user" if is_chat else "a template of Jinja"
            raise ValueError(f"{what} must have {part}, got: {first_line(error)}. Correct it.") from error
        if prompts[0] == prompts[1]:
            raise ValueError(f"{what} must ask about the text, got the same prompt for any: {prompts[0]!r}. Use it.")
        if not self.words:
            return
        words = self.encode(_SAMPLES[:1])[0][1]
        known: dict[tuple[int, ...], str] = {}
        for word, tokens in zip(self.words, words, strict=True):
            # Tokenizers of bytes have no token for what is unknown, and know everything.
            if not tokens or self.tokenizer.unk_token_id in tokenize(self.tokenizer, [word])[0]:
                raise ValueError(
                    f"{what} must have words for labels that its tokenizer knows, got {word!r}, which it does not. "
                    "Choose another by `label_texts`."
                )
            if (other := known.setdefault(tuple(tokens), word)) != word:
                raise ValueError(
                    f"{what} must be able to tell its words for labels apart, got {other!r} and {word!r}, which are "
                    "the same to its tokenizer. Choose others by `label_texts`."
                )

    def check_chat(self) -> None:
        """See that there is a chat template, where one is needed."""
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"Teacher '{self.name}' must have a chat template to answer messages, got none. Write the whole "
                "prompt as option `template`, without `chat`."
            )

    def _border(self, prompt: str) -> tuple[str, str]:
        """The prompt without spaces at its end, and what stands between it and a word: tokens begin with the space."""
        stem = prompt.rstrip(" ")
        if stem != prompt or stem[-1:].isspace() or not stem:
            return stem, prompt[len(stem) :]
        separator = self.options.get("separator")  # of those that write nobody has any
        return stem, ("" if self.options["chat"] else " ") if separator is None else separator

    def _length(self, row: _Encoded) -> int:
        # The last token of a word is never read.
        longest = 0 if self.is_seq2seq else max((len(word) - 1 for word in row[1]), default=0)
        return len(row[0]) + longest

    def _shorten(self, text: str, length: int) -> _Encoded:
        """The prompt of as much of a text as the model can read."""
        fits, best, exceeds = 0, self.encode([""])[0], len(text)
        if self.options["too_long"] == "raise" or self._length(best) > self.max_length:
            cut = "" if self.options["too_long"] == "cut" else ', or `options={"too_long": "cut"}`'
            raise RowError(f"A prompt must have at most {self.max_length} tokens{cut}, got {length}")
        # By halves: how many tokens a text has shows only when it is cut there.
        while exceeds - fits > 1:
            middle = (fits + exceeds) // 2
            row = self.encode([text[:middle]])[0]
            if self._length(row) <= self.max_length:
                fits, best = middle, row
            else:
                exceeds = middle
        return best


def _last_space(text: str) -> int:
    """Where the last space between two words is, or 0."""
    end = len(text)
    while (place := text.rfind(" ", 1, end)) > 0:
        if text[place - 1].isalnum() and text[place + 1 : place + 2].isalnum():
            return place
        end = place
    return 0


def _fold_all(texts: Mapping[str, Sequence[str]], name: str) -> dict[str, str]:
    """The label of each word, as answers are compared; words must be some, and each of one label."""
    answers: dict[str, str] = {}
    for label, words in texts.items():
        for word in words:
            if not (folded := fold(word)):
                raise ValueError(
                    f"Teacher '{name}' must have a word for each label, got {word!r} for '{label}'. Give one by "
                    "`label_texts`."
                )
            if answers.get(folded, label) != label:
                raise ValueError(
                    f"Teacher '{name}' must have words that differ by more than case and punctuation, got {word!r} "
                    f"for '{answers[folded]}' and for '{label}'. Choose others by `label_texts`."
                )
            answers[folded] = label
    return answers


# ── what is asked for ───────────────────────────────────────────────────────────────────────────────────────────────


def _check_options(teacher: Teacher) -> dict[str, Any]:
    """The options of a teacher, each of a value that it may have."""
    options = read_options(teacher, "prompted", OPTIONS)
    for key, allowed in _ALLOWED.items():
        check_option(teacher, options, key, allowed)
    check_template(teacher, options["template"])
    return options


def check_template(teacher: Teacher, template: Any) -> None:
    """See that a template is one that [`compile_template`] takes."""
    if not isinstance(template, str):
        raise ValueError(
            f"Option `template` of teacher '{teacher.name}' must be a text with a slot `{{{{ text }}}}`, got "
            f"{template!r}. Write one, such as 'Review: {{{{ text }}}}\\nSentiment:'."
        )
    compile_template(template, teacher.name)


# Compiled again by each worker that prepares rows, for a compiled template cannot be sent to it.
@lru_cache(maxsize=64)
def compile_template(template: str, name: str) -> jinja2.Template:
    """A template of which nothing is to be feared, with a slot for the text."""
    what = f"Option `template` of teacher '{name}'"
    # A slot that is not there must fail, and a last line break, which Jinja drops by default, may be meant.
    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    try:
        if len(template) > _MOST_LETTERS:
            raise ValueError(f"{len(template):,} letters, more than {_MOST_LETTERS:,}")
        tree = parse_template(environment, template, _MOST_DEPTH)
    except (jinja2.TemplateSyntaxError, RecursionError, ValueError) as error:
        raise ValueError(f"{what} must be a template of Jinja, got: {first_line(error)}. Correct it.") from error
    for node in tree.find_all(nodes.Node):
        if not isinstance(node, _NODES) or isinstance(node, nodes.Filter) and not _is_bounded(node):
            found = f"the filter '{node.name}'" if isinstance(node, nodes.Filter) else f"`{type(node).__name__}`"
            if isinstance(node, nodes.Filter) and node.name == "join":
                found = "`join` of something else than `labels` by a text"
            raise ValueError(
                f"{what} must consist of text, slots, `if`, parts such as `text[:500]`, and the filters "
                f"{list(_FILTERS)}, got {found} in line {node.lineno}. Leave it out, or prepare the column of texts."
            )
    names = meta.find_undeclared_variables(tree)
    if "text" not in names or names - {"text", "labels"}:
        raise ValueError(
            f"{what} must have a slot `{{{{ text }}}}`, and may have `labels` besides, got slots for "
            f"{shorten(sorted(names))}. Correct it."
        )
    return environment.from_string(template)


def _is_bounded(node: nodes.Filter) -> bool:
    """Tell whether a filter can do no more than shorten or rewrite what it is given."""
    if node.name != "join":
        return node.name in _FILTERS
    # Of a text it would put another text between all letters, and so on without bound.
    is_plain = isinstance(node.node, nodes.Name) and node.node.name == "labels" and not node.kwargs
    return is_plain and len(node.args) < 2 and all(isinstance(word, nodes.Const) for word in node.args)


# ── the kind ────────────────────────────────────────────────────────────────────────────────────────────────────────


def load_prompter(
    source: TeacherSource,
    kind: type[P],
    options: Mapping[str, Any],
    labels: tuple[str, ...] = (),
    words: tuple[str, ...] = (),
) -> tuple[Any, P, list[Any], dict[str, Any]]:
    """A model, what turns texts into its prompts, what decides how they are read, and what else is known."""
    model_source, what = source.model_source, f"Teacher '{source.name}'"
    model, tokenizer = load_language_model(model_source)
    processor, is_seq2seq = InputProcessor(tokenizer, model.config, what), bool(model.config.is_encoder_decoder)
    # Prompt and answer share the positions of a causal model; a decoder has its own.
    room = 0 if words or is_seq2seq else options["max_new_tokens"]
    if (length := int(processor.max_length or 0) - room) < 1:
        raise ValueError(
            f"Option `max_new_tokens` of teacher '{source.name}' must leave room for a prompt in the "
            f"{processor.max_length} tokens that it reads, got {room}. Give a lower one in its `options`."
        )
    template = options["template"] or PLAIN
    prompter = kind(source.name, tokenizer, template, labels, words, is_seq2seq, length, options)
    prompter.check()
    if not words:
        make_greedy(model, tokenizer, options["max_new_tokens"])
    known = tokenizer_identity(model_source) | {"dtype": str(model.dtype).removeprefix("torch.")}
    return model, prompter, [processor.fingerprint, tokenizer.chat_template], known


def tokenizer_identity(source: ModelSource) -> dict[str, str]:
    """Tell the files of a folder apart that decide what a prompt is; a commit does of the Hub."""
    if not source.is_local:
        return {}
    files = [path for path in source.folder.iterdir() if path.suffix in (".json", ".jinja", ".model", ".txt")]
    return {"tokenizer": hash_files(sorted(path for path in files if path.is_file()))}


KIND = Kind(
    load=PromptedTeacher,
    identify=lambda source: (
        source.model_source.identity | tokenizer_identity(source.model_source),
        source.model_source.num_bytes,
    ),
    options=OPTIONS,
    reads_label_texts=True,
)

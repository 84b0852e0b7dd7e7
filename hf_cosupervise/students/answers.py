"""What a student makes of teachers' answers: how likely it finds each, what it says itself, what it learns of them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets

from ..pool.answers import AnswerPool
from ..processes import Processes, join_processes, row_chunks
from .writing import Scored, Tokens, Writer

logger = logging.getLogger(__name__)
TOO_LONG = ("raise", "skip", "cut")


@dataclass(frozen=True)
class AnswerScores:
    """What a student thinks of teachers' answers.

    Attributes:
        names (`tuple[str, ...]`):
            The teachers.
        log_probs (`np.ndarray` of shape `(num_examples, num_teachers)`, float32):
            Log-probability of each answer with its end, NaN where there is none that the student can read.
        num_tokens (`np.ndarray` of the same shape, int32):
            Tokens of each answer to the student, with its end; 0 where there is none.
    """

    names: tuple[str, ...]
    log_probs: np.ndarray
    num_tokens: np.ndarray

    @property
    def per_token(self) -> np.ndarray:
        """`np.ndarray` of the same shape: Mean log-probability of the tokens."""
        return self.log_probs / np.maximum(self.num_tokens, 1)


def score_answers(
    student: Any,
    pool: AnswerPool,
    *,
    tokenizer: Any = None,
    teachers: Sequence[str] | None = None,
    window: int | None = None,
    too_long: str = "raise",
    batch_size: int = 16,
    disable_tqdm: bool = True,
) -> AnswerScores:
    """Ask a language model how likely it finds every teacher's answer to every prompt.

    Each prompt is read once, and its keys and values serve all answers to it; equal answers are read once. All
    processes of a launch must call it; each does its share.

    Args:
        student (`PreTrainedModel`, `PeftModel` or `str`):
            The model, causal or from sequence to sequence, its Hub id or its folder.
        pool ([`AnswerPool`]):
            Prompts, or messages for the student's own chat template, and answers.
        tokenizer (*optional*):
            That of a model object; of an id or a folder, its own.
        teachers (`Sequence[str]`, *optional*):
            Names of those whose answers are scored. Defaults to all.
        window (`int`, *optional*):
            Score that many tokens at a time, given as many before them alone (the first ones, given the prompt); of
            causal models.
        too_long (`str`, *optional*, defaults to `"raise"`):
            What to do where prompt and answer are longer than the student can read: `"skip"` counts the answer as
            none, and `"cut"` reads as much of it as fits. A prompt that is too long itself is skipped by both.
        batch_size (`int`, *optional*, defaults to 16):
            Prompts, and then answers, that are read at once. It changes the scores by no more than rounding.
        disable_tqdm (`bool`, *optional*, defaults to `True`):
            Whether to show no progress.

    Returns:
        [`AnswerScores`]: sums of log-probabilities and numbers of tokens.

    Raises:
        TypeError: If `pool` is no [`AnswerPool`], or the student no language model.
        ValueError: If an answer is too long, messages find no chat template, or the tokenizer has no end.
        FloatingPointError: If the student finds an answer likely by NaN.
    """
    check_answer_pool(pool, "score_answers")
    writer = student if isinstance(student, Writer) else Writer(student, tokenizer)
    # What the user has loaded stays where it is.
    if isinstance(student, str) and torch.cuda.is_available():
        writer.model.to("cuda")
    reader = AnswerReader(writer, pool, too_long, batch_size, join_processes(), disable_tqdm)
    return reader.score(pool.hierarchy.names if teachers is None else tuple(teachers), window)


class AnswerReader:
    """Read a pool's prompts and answers as the student's tokens, and ask it about them."""

    def __init__(
        self, writer: Writer, pool: AnswerPool, too_long: str, batch_size: int, processes: Processes, quiet: bool
    ) -> None:
        if too_long not in TOO_LONG:
            raise ValueError(f"`too_long` must be one of {list(TOO_LONG)}, got {too_long!r}. Choose one of them.")
        self.writer, self.pool, self.too_long = writer, pool, too_long
        self.batch_size, self.processes, self.quiet = batch_size, processes, quiet
        # Said once each: a pool is encoded anew for every question.
        self._told: set[str] = set()

    def encode(self, names: Sequence[str]) -> Iterator[tuple[slice, list[list[int]], list[list[list[int] | None]]]]:
        """Tokens of prompts and of each teacher's answers, of some rows at a time; `None` for what is not read."""
        counts = Counter[str]()  # of teachers, and as "" of prompts
        # Some rows at a time, because tokens of a whole pool would not fit into memory.
        for part in row_chunks(len(self.pool)):
            prompts = self.pool.prompts(part)
            before = self.writer.encode(prompts)
            counts[""] += sum(not ids for ids in before)
            yield part, before, [self._encode_answers(name, part, prompts, before, counts) for name in names]
        for name, count in counts.items():  # say once what is not read, or not whole
            if count and name not in self._told:
                self._told.add(name)
                which = f"answers of '{name}' too long for the student" if name in names else "prompts without a word"
                what = "cut, or left out" if name in names and self.too_long == "cut" else "left out"
                logger.warning(f"{count} of {len(self.pool)} {which}: {what}.")

    def _encode_answers(
        self, name: str, part: slice, prompts: Sequence[Any], before: Sequence[list[int]], counts: Counter[str]
    ) -> list[list[int] | None]:
        """A teacher's answers to some prompts; how many of them are too long is counted."""
        texts, rows = self.pool.texts(name, part), list[list[int] | None]([None] * len(prompts))
        # After a prompt without a word nothing is read, whoever answered it.
        there = [row for row, text in enumerate(texts) if text is not None and before[row]]
        own = self.writer.encode_answers([prompts[row] for row in there], [texts[row] or "" for row in there])
        too_long = []
        for row, ids in zip(there, own, strict=True):
            rows[row] = fit = self._fit(before[row], ids)
            if fit is None or len(fit) < len(ids):
                too_long.append((row, len(before[row]) + len(ids)))
        if too_long and self.too_long == "raise":
            row, length = too_long[0]
            raise ValueError(
                f"A prompt and its answer must fit into the {self.writer.max_length} tokens that the student reads, "
                f"got {length} of '{name}' for id {self.pool.ids[part.start + row].item()!r} ({len(too_long)} such "
                f"among {len(prompts)} answers). Shorten it, or set `too_long` to 'skip' or 'cut'."
            )
        counts[name] += len(too_long)
        return rows

    def _fit(self, prompt: list[int], answer: list[int]) -> list[int] | None:
        # A decoder has positions of its own.
        room = self.writer.max_length - (0 if self.writer.is_seq2seq else len(prompt))
        if len(prompt) > self.writer.max_length or len(answer) > room and (self.too_long != "cut" or room < 1):
            return None
        return answer[:room]

    def answered(self, names: Sequence[str]) -> np.ndarray:
        """Tell which answers the student can read, `(num_examples, num_teachers)`."""
        found = np.zeros((len(self.pool), len(names)), dtype=bool)
        for part, _, answers in self.encode(names):
            found[part] = [[ids is not None for ids in row] for row in zip(*answers, strict=True)]
        return found

    def score(self, names: Sequence[str], window: int | None = None) -> AnswerScores:
        """Do what [`score_answers`] says."""
        if window is not None and (self.writer.is_seq2seq or isinstance(window, bool) or window < 1):
            raise ValueError(
                f"`window` must be a number of tokens of at least 1, for a causal student, got {window!r} for "
                f"{type(self.writer.plain).__name__}. Leave it out, or use another `rule` than 'local'."
            )
        if not (self.writer.is_seq2seq or self.pool.is_chat):
            self._tell_blanks(names)
        shape = len(self.pool), len(names)
        log_probs, num_tokens = np.full(shape, np.nan, dtype=np.float32), np.zeros(shape, dtype=np.int32)
        for part, prompts, answers in self.encode(names):
            # What follows each prompt, every text once, and who wants to know of it.
            following: dict[Tokens, dict[Tokens, None]] = {}
            wanted: list[tuple[int, int, tuple[Tokens, Tokens]]] = []
            for column, rows in enumerate(answers):
                for row, (prompt, ids) in enumerate(zip(prompts, rows, strict=True), part.start):
                    if ids is None:
                        continue
                    # Sums begin at 0 where something is read, and stay NaN elsewhere.
                    log_probs[row, column], num_tokens[row, column] = 0, len(ids)
                    for before, piece in _pieces(tuple(prompt), tuple(ids), window):
                        following.setdefault(before, {})[piece] = None
                        wanted.append((row, column, (before, piece)))
            items: list[Scored] = [(before, list(own)) for before, own in following.items()]
            sums = self.writer.score(items, self.batch_size, self.processes, self.quiet)
            known = dict(zip(((before, piece) for before, own in items for piece in own), sums, strict=True))
            for row, column, both in wanted:
                log_probs[row, column] += known[both]
        return AnswerScores(tuple(names), log_probs, num_tokens)

    def _tell_blanks(self, names: Sequence[str]) -> None:
        """Tell where the blank before an answer, and not what it says, would decide who is believed."""
        begins = {name: [text[0].isspace() for text in self.pool.texts(name) if text is not None] for name in names}
        shares = {name: sum(flags) / len(flags) for name, flags in begins.items() if flags}
        # A model goes on from "Answer:" by " yes"; a column mostly holds "yes", which hardly any text goes on by.
        with_blank, without = ([name for name in shares if shares[name] > 0.9], [n for n in shares if shares[n] < 0.1])
        if with_blank and without and not self._told & {*without}:
            self._told |= {*without}
            logger.warning(
                f"Answers of {with_blank} begin with a blank, those of {without} do not: the student finds one of "
                "them likelier for that alone. Put a blank before those, or at the end of every prompt."
            )

    def own_answers(self, max_new_tokens: int) -> list[str]:
        """What the student answers itself."""
        found, num_cut = list[str](), 0
        for part in row_chunks(len(self.pool)):
            # Where no token is left to say, there is no answer either.
            encoded = self.writer.encode(self.pool.prompts(part))
            prompts = [ids if len(ids) < self.writer.max_length else [] for ids in encoded]
            texts, is_whole = self.writer.write(prompts, max_new_tokens, self.batch_size, self.processes)
            found, num_cut = found + texts, num_cut + int((~is_whole).sum())
        if num_cut:
            logger.warning(
                f"{num_cut} of {len(found)} answers of the student itself do not end within `max_new_tokens` "
                f"{max_new_tokens}, and are compared as far as they go."
            )
        return found

    def represent(self) -> np.ndarray:
        """What the student makes of each prompt, see [`Writer.represent`]."""
        parts = []
        for part in row_chunks(len(self.pool)):
            encoded = self.writer.encode(self.pool.prompts(part))
            prompts = [ids if len(ids) <= self.writer.max_length else [] for ids in encoded]
            parts.append(self.writer.represent(prompts, self.batch_size, self.processes))
        size = max(own.shape[1] for own in parts)  # 0 of a part that has nothing to read
        return np.concatenate([own if own.size else np.zeros((len(own), size), np.float32) for own in parts])

    def examples(self, assigned: np.ndarray, kept: np.ndarray) -> Dataset:
        """The tokens that the student learns from: of what it reads, only those of the answer count."""
        names, parts = self.pool.hierarchy.names, []
        used = sorted(set(assigned[kept].tolist()))
        for part, prompts, answers in self.encode([names[place] for place in used]):
            # A causal model reads the answer behind the prompt; what it says of the prompt's own tokens is no matter.
            columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
            for row in np.flatnonzero(kept[part]):
                prompt, ids = prompts[row], answers[used.index(assigned[part][row])][row] or []
                columns["input_ids"].append(prompt if self.writer.is_seq2seq else prompt + ids)
                columns["labels"].append(ids if self.writer.is_seq2seq else [-100] * len(prompt) + ids)
            parts.append(Dataset.from_dict(columns))
        # A part of which nothing is kept has no types of columns to be joined by.
        return concatenate_datasets([part for part in parts if len(part)])


def _pieces(prompt: Tokens, answer: Tokens, window: int | None) -> Iterator[tuple[Tokens, Tokens]]:
    """What is scored of an answer, behind what is read before it."""
    size = window or len(answer)
    yield prompt, answer[:size]
    for start in range(size, len(answer), size):
        yield answer[start - size : start], answer[start : start + size]


def check_answer_pool(pool: Any, function: str) -> None:
    """See that what a function is given holds answers in words."""
    if not isinstance(pool, AnswerPool):
        raise TypeError(
            f"`{function}` needs an `AnswerPool` of answers in words, got {type(pool).__name__}. Ask the teachers by "
            "`build_answers`, or give a pool of labels to `CoSupervisedTrainer`."
        )

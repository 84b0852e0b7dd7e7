"""Pools of answers in words, and the data sets for other trainers that are made of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value

from ..method.answers import (
    NOBODY,
    Normalizer,
    group_answers,
    pair_assigned,
    pair_consistent,
    pair_ranked,
    pair_scored,
    pair_unfamiliar,
)
from .written import BASELINES, Prompt, WrittenPool

PAIRS = ("assigned", "rank", "self_consistency", "score", "unfamiliar")
_MESSAGES = List({"role": Value("string"), "content": Value("string")})


class AnswerPool(WrittenPool):
    """Hold what every teacher writes, see [`TeacherPool`] for the arguments, and export it for other trainers.

    Each teacher has a dataset of `id`, `answer` (`None` for no answer), `log_prob` (the teacher's own, summed over the
    tokens of the answer with the one that ends it; `None` where nobody knows), `num_tokens` (of that sum; 0 where
    nobody knows) and `finish_reason`: `"stop"`, `"length"`, `"given"` in a column, `"blank"`, `"missing"`. Where a
    teacher was asked several times, `answer` is the first of its `samples`.

    `inputs` holds `id` and the prompts: texts, or lists of chat messages with `role` and `content`. Methods that read
    take the `name` of a teacher and as `rows` a slice or positions; `assigned` says who speaks for each prompt, as
    positions in `hierarchy.names`, -1 for nobody.

    Raises:
        ValueError: As [`TeacherPool`], or if a column is of another type, or an answer holds NUL.
        TypeError: As [`TeacherPool`].
    """

    def to_sft(
        self,
        assigned: np.ndarray | str | None = None,
        kept: np.ndarray | None = None,
        weights: np.ndarray | None = None,
        answers: Sequence[str | None] | None = None,
        *,
        messages: bool = False,
    ) -> Dataset:
        """Export one answer to each prompt for supervised fine-tuning; missing ones are left out.

        Args:
            assigned (`np.ndarray` of shape `(num_examples,)` or `str`, *optional*):
                Who speaks for each prompt, or a method of [`assign`]. Without it, all answers of all teachers.
            kept (`np.ndarray` of shape `(num_examples,)`, *optional*):
                Bool, which prompts to keep.
            weights (`np.ndarray` of shape `(num_examples,)`, *optional*):
                Defaults to 1.
            answers (`Sequence[str | None]`, *optional*):
                Texts to export instead of the teachers'.
            messages (`bool`, *optional*, defaults to `False`):
                Export whole conversations as `messages`, of chat prompts.

        Returns:
            `datasets.Dataset`: `prompt` and `completion`, texts or lists of messages, or else `messages`; `weight`,
            `id`, and `teacher_id`, the teacher's name.

        Raises:
            ValueError: If an array is of another shape, or `messages` are wanted of prompts that are texts.
        """
        if messages and not self.is_chat:
            raise ValueError("`messages` need prompts that are messages, got texts. Export `prompt` and `completion`.")
        names, chat = self.hierarchy.names, self.is_chat
        if answers is not None and len(answers) != len(self):
            raise ValueError(f"`answers` must have one entry for each of {len(self)} prompts, got {len(answers)}.")
        speakers = None if assigned is None else self._read_assigned(assigned)
        rows: list[tuple[int, int, str | None]]
        if answers is not None:
            rows = [
                (row, NOBODY if speakers is None else int(speakers[row]), text) for row, text in enumerate(answers)
            ]
        else:
            rows = [
                (row, who, texts[who])
                for row, texts in enumerate(self.answer_rows())
                for who in (range(len(names)) if speakers is None else [int(speakers[row])])
                if who >= 0
            ]
        prompts = self.prompts()
        mask, scale = self._read_mask(kept, prompts), self._read_weights(weights)
        rows = [(row, who, text) for row, who, text in rows if mask[row] and text is not None and text.strip()]
        columns: dict[str, Any] = {
            "weight": [scale[row] for row, _, _ in rows],
            "id": [self.ids[row].item() for row, _, _ in rows],
            "teacher_id": [names[who] if who >= 0 else None for _, who, _ in rows],
        }
        given = [prompts[row] for row, _, _ in rows]
        replies = [_as_reply(str(text), chat) for _, _, text in rows]
        if messages:
            columns["messages"] = [[*prompt, *reply] for prompt, reply in zip(given, replies)]  # type: ignore[misc]
        else:
            columns |= {"prompt": given, "completion": replies}
        return self._export(columns, "answers for supervised fine-tuning")

    def to_routed(self, assigned: np.ndarray | str | None = None, kept: np.ndarray | None = None) -> Dataset:
        """Export which teacher each prompt goes to, as trainers that distil from several teachers ask for.

        Args:
            assigned (`np.ndarray` of shape `(num_examples,)` or `str`, *optional*):
                Who speaks for each prompt; or a method of [`assign`], or a column of the inputs that says it in any
                words. Defaults to the column `teacher_id`.
            kept (`np.ndarray` of shape `(num_examples,)`, *optional*):
                Bool, which prompts to keep.

        Returns:
            `datasets.Dataset`: `prompt`, `teacher_id` (text) and `id`; without the prompts that nobody speaks for.
        """
        assigned = "teacher_id" if assigned is None else assigned
        columns = [] if self.inputs is None else list(self.inputs.column_names)
        if isinstance(assigned, str) and assigned in columns:
            speakers = [None if name is None else str(name) for name in self.column(assigned)]
        elif isinstance(assigned, str) and assigned not in BASELINES:
            raise ValueError(
                f"`assigned` must be positions of teachers, one of {list(BASELINES)}, or a column of the inputs "
                f"{columns}, got {assigned!r}. Give one of them."
            )
        else:
            who = self._read_assigned(assigned)
            speakers = [None if place < 0 else self.hierarchy.names[place] for place in who]
        prompts = self.prompts()
        mask = self._read_mask(kept, prompts)
        rows = [row for row, name in enumerate(speakers) if name is not None and mask[row]]
        columns_of = {"prompt": [prompts[row] for row in rows], "teacher_id": [speakers[row] for row in rows]}
        return self._export(
            {**columns_of, "id": [self.ids[row].item() for row in rows]}, "prompts with their teachers"
        )

    def to_preferences(
        self,
        pairs: str = "assigned",
        assigned: np.ndarray | str | None = None,
        kept: np.ndarray | None = None,
        *,
        normalize: str | Normalizer = "exact",
        scores: np.ndarray | str | None = None,
        ranking: Sequence[str] | None = None,
        student: str | Sequence[Sequence[str]] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Dataset:
        """Export pairs of a better and a worse answer to a prompt, for preference optimisation.

        Answers that `normalize` makes equal, or makes `None`, are never a pair.

        Args:
            pairs (`str`, *optional*, defaults to `"assigned"`):
                `"assigned"`: the assigned teacher's answer, and one of another teacher, drawn with `seed`. `"rank"`:
                the answers of the best and of the worst teacher in `ranking`. `"score"`: those of the highest and of
                the lowest of `scores`. `"unfamiliar"`: of those who agree with the assigned teacher, the answer that
                the student finds least likely (`scores`), and the likeliest of the others. `"self_consistency"`: the
                assigned teacher's answer and the student's samples, by how many of these agree.
            assigned (`np.ndarray` of shape `(num_examples,)` or `str`, *optional*):
                Who speaks for each prompt, or a method of [`assign`]. Defaults to `"majority"`; `"generalist"` for
                `"self_consistency"`.
            kept (`np.ndarray` of shape `(num_examples,)`, *optional*):
                Bool, which prompts to keep.
            normalize (`str` or `Callable`, *optional*, defaults to `"exact"`):
                Which answers are the same, see [`assign`].
            scores (`np.ndarray` of shape `(num_examples, num_teachers)` or `str`, *optional*):
                For `"score"` any numbers, or their column in each teacher's dataset; for `"unfamiliar"` the student's
                mean log-probabilities. NaN where nobody knows.
            ranking (`Sequence[str]`, *optional*):
                All teachers, the best first. Defaults to the order of the hierarchy.
            student (`str` or `Sequence[Sequence[str]]`, *optional*):
                The student's samples for `"self_consistency"`: the teacher of the pool that it is, or a list for each
                prompt.
            seed (`int`, *optional*, defaults to 0):
                For what is drawn.
            options:
                Of `"self_consistency"`: `min_share` (0.6), `min_share_against` (0.8), `max_pairs` (1) of a prompt.

        Returns:
            `datasets.Dataset`: `prompt`, `chosen`, `rejected`, texts or lists of messages, and `id`.

        Raises:
            ValueError: If there is no such kind of pairs, or what it needs is missing or of another shape.
        """
        if pairs not in PAIRS:
            raise ValueError(f"`pairs` must be one of {list(PAIRS)}, got {pairs!r}. Choose one.")
        if options and pairs != "self_consistency":
            raise ValueError(f"`pairs={pairs!r}` has no options, got {sorted(options)}. Leave them out.")
        if assigned is None:
            assigned = "generalist" if pairs == "self_consistency" else "majority"
        speakers, said = self._read_assigned(assigned, normalize, seed), self.answer_rows()
        if pairs == "self_consistency":
            own = [None if who < 0 else row[who] for row, who in zip(said, speakers)]
            found = pair_consistent(own, self._read_samples(student), normalize, seed=seed, **options)
        else:
            groups = group_answers(said, normalize)
            if pairs == "assigned":
                both = pair_assigned(groups, speakers, seed)
            elif pairs == "rank":
                both = pair_ranked(groups, self._read_ranks(ranking))
            elif pairs == "score":
                both = pair_scored(groups, self._read_scores(scores, pairs))
            else:
                both = pair_unfamiliar(groups, speakers, self._read_scores(scores, pairs))
            found = [
                (row, str(said[row][better]), str(said[row][worse]))
                for row, (better, worse) in enumerate(zip(*both))
                if better >= 0 and worse >= 0
            ]
        prompts, chat = self.prompts(), self.is_chat
        mask = self._read_mask(kept, prompts)
        found = [(row, better, worse) for row, better, worse in found if mask[row]]
        columns: dict[str, Any] = {
            "prompt": [prompts[row] for row, _, _ in found],
            "chosen": [_as_reply(better, chat) for _, better, _ in found],
            "rejected": [_as_reply(worse, chat) for _, _, worse in found],
            "id": [self.ids[row].item() for row, _, _ in found],
        }
        return self._export(columns, f"pairs of answers by `{pairs}`")

    def _export(self, columns: Mapping[str, Any], what: str) -> Dataset:
        """A plain dataset that tells whose answers it holds."""
        kinds: dict[str, Any] = dict.fromkeys(columns, Value("string")) | {
            "id": Value("int64"),
            "weight": Value("float32"),
        }
        kinds["id"] = Value("string" if self.ids.dtype.kind == "U" else "int64")
        if self.is_chat:
            kinds |= dict.fromkeys(("prompt", "completion", "chosen", "rejected", "messages"), _MESSAGES)
        dataset = Dataset.from_dict(dict(columns), features=Features({name: kinds[name] for name in columns}))
        # As on the card, where nothing of this machine stands.
        known = json.dumps({**self._card_facts(), "pool": self.repo_id, "commit": self.commit}, sort_keys=True)
        dataset.info.description = (
            f"By hf_cosupervise: {what}, of {len(self.hierarchy.names)} teachers. They are answers of models, not "
            f"ground truth. {known}"
        )
        return dataset

    # ── what the exports are given ──────────────────────────────────────────────────────────────────────────────────

    def _read_assigned(self, assigned: Any, normalize: str | Normalizer = "exact", seed: int = 0) -> np.ndarray:
        """Who speaks for each prompt, int64."""
        if isinstance(assigned, str):
            return self.assign(assigned, normalize, seed=seed)
        places, count = np.asarray(assigned), len(self.hierarchy.names)
        is_whole = places.shape == (len(self),) and (places.dtype.kind in "iu" or not places.size)
        if not is_whole or places.size and not NOBODY <= places.min() <= places.max() < count:
            raise ValueError(
                f"`assigned` must be positions 0..{count - 1} of teachers or -1, integers of shape ({len(self)},), "
                f"got {places.shape} of {places.dtype}. Give one for each prompt, or one of {list(BASELINES)}."
            )
        return places.astype(np.int64)

    def _read_mask(self, kept: Any, prompts: Sequence[Prompt]) -> np.ndarray:
        mask = np.ones(len(self), dtype=bool) if kept is None else np.asarray(kept)
        if mask.shape != (len(self),) or mask.dtype != bool:
            raise ValueError(
                f"`kept` must be booleans of shape ({len(self)},), got {mask.shape} of {mask.dtype}. Say of each "
                "prompt whether to keep it."
            )
        # No trainer can learn an answer to nothing.
        return mask & [bool(prompt and (not isinstance(prompt, str) or prompt.strip())) for prompt in prompts]

    def _read_weights(self, weights: Any) -> list[float]:
        values = np.ones(len(self)) if weights is None else np.asarray(weights)
        if values.shape != (len(self),) or values.dtype.kind not in "fiub" or not (values >= 0).all():
            raise ValueError(
                f"`weights` must be numbers from 0 of shape ({len(self)},), got {values.shape} of {values.dtype}. "
                "Give one for each prompt."
            )
        return [float(value) for value in values]

    def _read_scores(self, scores: Any, pairs: str) -> np.ndarray:
        shape = (len(self), len(self.hierarchy.names))
        if isinstance(scores, str):
            if lacking := [name for name in self.hierarchy.names if scores not in self.teachers[name].column_names]:
                raise ValueError(
                    f"`scores` must be a column of every teacher's dataset, got {scores!r}, which {lacking} lack. Add "
                    "it there, or give an array."
                )
            columns = [self._cells(name, scores, slice(None)) for name in self.hierarchy.names]
            scores = np.array(columns, dtype=np.float64).T.reshape(shape)
        values = np.asarray(scores, dtype=np.float64) if scores is not None else np.zeros(0)
        if values.shape != shape:
            raise ValueError(
                f"`pairs={pairs!r}` needs `scores`, numbers of shape {shape}, got "
                f"{'none' if scores is None else values.shape}. Give one for each prompt and teacher, NaN for unknown."
            )
        return values

    def _read_ranks(self, ranking: Sequence[str] | None) -> np.ndarray:
        names = list(self.hierarchy.names)
        ranking = names if ranking is None else list(ranking)
        if sorted(ranking) != sorted(names):
            raise ValueError(f"`ranking` must name each teacher of {names} once, the best first, got {ranking}.")
        return np.array([ranking.index(name) for name in names])

    def _read_samples(self, student: str | Sequence[Sequence[str]] | None) -> list[list[str]]:
        if isinstance(student, str):
            return self.samples(student)
        if student is None or len(student) != len(self):
            found = "none" if student is None else len(student)
            raise ValueError(
                f'`pairs="self_consistency"` needs as `student` a teacher of the pool that was asked several times, '
                f"or a list of samples for each of {len(self)} prompts, got {found}. Give one of them."
            )
        return [list(some) for some in student]


def _as_reply(text: str, is_chat: bool) -> Prompt:
    """An answer as the exports hold it: text, or the assistant's message."""
    return [{"role": "assistant", "content": text}] if is_chat else text

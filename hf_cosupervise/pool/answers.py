"""Pools of answers in words: what each teacher writes to each prompt, and the data sets that other trainers take."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value

from ..data.columns import is_text_column
from ..hierarchy import Teacher, TeacherHierarchy, is_writable_text
from ..method.answers import (
    NOBODY,
    Normalizer,
    first_answered,
    group_answers,
    longest_agreement,
    majority_vote,
    pair_assigned,
    pair_consistent,
    pair_ranked,
    pair_scored,
    pair_unfamiliar,
    random_answered,
)
from .base import TeacherPool, check_kind
from .ids import check_id_values

PROMPT_NAMES = ("prompt", "messages", "text", "sentence", "question")
ORACLE_ANSWER = "oracle_answer"
BASELINES = ("generalist", "majority", "longest_agreement", "random")
PAIRS = ("assigned", "rank", "self_consistency", "score", "unfamiliar")
GIVEN, MISSING = "given", "missing"  # finish reasons of ready answers, and of none
Prompt = str | list[dict[str, str]]
_MESSAGES = List({"role": Value("string"), "content": Value("string")})


def find_prompt_column(dataset: Dataset, column: str | None = None) -> str:
    """Find the column of prompts."""
    found = [name for name in PROMPT_NAMES if name in dataset.column_names][:1] if column is None else [column]
    if not set(found) & set(dataset.column_names):
        raise ValueError(
            f"Prompts must stand in a column {list(PROMPT_NAMES)}, or one that is named, got "
            f"{column or 'none of them'!r} among {dataset.column_names}. Name it with `input_column`."
        )
    return found[0]


def answer_dataset(
    ids: Sequence[Any] | np.ndarray,
    answers: Sequence[str | None],
    log_probs: Sequence[float] | np.ndarray | None = None,
    num_tokens: Sequence[int] | np.ndarray | None = None,
    reasons: Sequence[str] | None = None,
    samples: Sequence[Sequence[str]] | None = None,
) -> Dataset:
    """Wrap one teacher's answers as a dataset; what is only blanks is no answer."""
    ids = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
    texts = [None if answer is None or not answer.strip() else answer for answer in answers]
    if wrong := [place for place, text in enumerate(texts) if text is not None and not is_writable_text(text)]:
        raise ValueError(
            f"An answer must be text without NUL and without halves of characters, got {texts[wrong[0]]!r} of id "
            f"{ids[wrong[0]]!r} ({len(wrong)} such answers). Correct it, or give None for no answer."
        )
    reasons = [GIVEN] * len(ids) if reasons is None else reasons
    columns: dict[str, Any] = {
        "id": ids,
        "answer": texts,
        "log_prob": [None] * len(ids) if log_probs is None else _with_nulls(log_probs),
        "num_tokens": [0] * len(ids) if num_tokens is None else list(num_tokens),
        "finish_reason": [
            MISSING if text is None and reason == GIVEN else reason for text, reason in zip(texts, reasons)
        ],
    }
    kinds = {"answer": "string", "log_prob": "float32", "num_tokens": "int32", "finish_reason": "string"}
    features = {"id": Value("string" if ids and isinstance(ids[0], str) else "int64")}
    features |= {name: Value(kind) for name, kind in kinds.items()}
    if samples is not None:
        columns["samples"], features["samples"] = [list(some) for some in samples], List(Value("string"))
    return Dataset.from_dict(columns, features=Features(features))


def _with_nulls(values: Sequence[float] | np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in np.asarray(values, dtype=np.float32)]


class AnswerPool(TeacherPool):
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

    columns = ("answer", "log_prob", "num_tokens", "finish_reason")
    maker = "build_answers"
    has_labels = False

    _views: dict[str, tuple[np.ndarray, np.ndarray]]

    @classmethod
    def from_answers(
        cls,
        answers: Mapping[str, Sequence[str | None]],
        prompts: Sequence[Any] | None = None,
        ids: Sequence[Any] | None = None,
        *,
        hierarchy: TeacherHierarchy | None = None,
        inputs: Dataset | None = None,
        log_probs: Mapping[str, Sequence[float]] | None = None,
        num_tokens: Mapping[str, Sequence[int]] | None = None,
        samples: Mapping[str, Sequence[Sequence[str]]] | None = None,
    ) -> AnswerPool:
        """Make a pool of answers that are at hand.

        Args:
            answers (`Mapping[str, Sequence[str | None]]`):
                By teacher name, an answer or `None` for each prompt.
            prompts (`Sequence`, *optional*):
                Texts or lists of messages, unless `inputs` holds them.
            ids (`Sequence[int]` or `Sequence[str]`, *optional*):
                Defaults to those of the inputs, or else to 0, 1 and so on.
            hierarchy (`TeacherHierarchy`, *optional*):
                Defaults to the names as columns of level 0.
            inputs (`datasets.Dataset`, *optional*):
                Prompts and other columns.
            log_probs, num_tokens, samples (`Mapping[str, Sequence]`, *optional*):
                What is known besides, see [`AnswerPool`].

        Raises:
            ValueError: If lengths, ids or answers do not fit.
        """
        check_kind(answers, Mapping, "answers")
        check_kind(inputs, Dataset, "inputs", optional=True)
        if hierarchy is None:
            hierarchy = TeacherHierarchy(teachers=[Teacher(name, kind="column") for name in answers])
        if prompts is not None:
            given = Dataset.from_dict({"prompt": list(prompts)})
            inputs = given if inputs is None else inputs.add_column("prompt", given["prompt"][:])
        if ids is None:
            has_ids = inputs is not None and "id" in inputs.column_names
            ids = inputs["id"][:] if has_ids else range(len(next(iter(answers.values()), ())))  # type: ignore[index]
        ids = list(ids)
        check_id_values(ids)
        lengths = {name: len(some) for name, some in answers.items()}
        lengths |= {} if inputs is None else {"the prompts": len(inputs)}
        if wrong := {name: length for name, length in lengths.items() if length != len(ids)}:
            raise ValueError(
                f"All must have one entry for each of the {len(ids)} ids, got {wrong}. Give None for none."
            )
        known: list[Mapping[str, Any]] = [log_probs or {}, num_tokens or {}]
        teachers = {
            name: answer_dataset(ids, some, known[0].get(name), known[1].get(name), samples=(samples or {}).get(name))
            for name, some in answers.items()
        }
        if inputs is not None and "id" not in inputs.column_names:
            inputs = inputs.add_column("id", ids)
        return cls(hierarchy, teachers, inputs, input_column="prompt" if prompts is not None else None)

    def _read_inputs(self) -> None:
        names = [] if self.inputs is None else self.inputs.column_names
        # A pool may hold none; whoever asks for them is told so.
        if not (found := [name for name in (self.input_column, *PROMPT_NAMES) if name in names]):
            return
        kind = self.inputs.features[found[0]]  # type: ignore[union-attr]
        message = kind.feature if isinstance(kind, List) and isinstance(kind.feature, dict) else {}
        texts = [kind, kind] if not isinstance(kind, List) else [message.get("role"), message.get("content")]
        # Parts of a message, such as images, would be exported as the text by which Python shows them.
        if not all(isinstance(text, Value) and text.dtype in ("string", "large_string") for text in texts):
            raise ValueError(
                "Prompts must be texts, or lists of messages with the texts `role` and `content`, got "
                f"'{found[0]}' of {kind}. Make them so, or name another column with `input_column`."
            )

    def _open(self, name: str, dataset: Dataset) -> None:
        # Beside the ids the two numbers are kept as arrays; texts stay in the file until they are asked for.
        table = dataset.with_format("arrow")[:] if len(dataset) else dataset.data.table
        kinds = {"answer": pa.types.is_string, "log_prob": pa.types.is_floating, "num_tokens": pa.types.is_integer}
        kinds |= {"finish_reason": pa.types.is_string}
        if wrong := [column for column, is_kind in kinds.items() if not is_kind(table.column(column).type)]:
            raise ValueError(
                f"Answers of '{name}' must be texts with numbers beside them, got {table.column(wrong[0]).type} as "
                f"`{wrong[0]}`. Make them with `build_answers` or `AnswerPool.from_answers`."
            )
        texts = [table.column("answer")]
        if "samples" in table.column_names:
            kind = table.column("samples").type
            if not (pa.types.is_list(kind) and pa.types.is_string(kind.value_type)):
                raise ValueError(f"`samples` of '{name}' must be lists of texts, got {kind}. Make the pool again.")
            texts.append(pc.list_flatten(table.column("samples")))
        if any(pc.any(pc.match_substring(column, "\0")).as_py() for column in texts):
            raise ValueError(f"Answers of '{name}' must hold no NUL, got one. Leave it out, or make it None.")
        if (least := pc.min(table.column("num_tokens")).as_py() or 0) < 0:
            raise ValueError(f"`num_tokens` of '{name}' must be at least 0, got {least}. Make the pool again.")
        super()._open(name, dataset)
        log_probs = table.column("log_prob").cast(pa.float32()).to_numpy(zero_copy_only=False)
        num_tokens = pc.fill_null(table.column("num_tokens").cast(pa.int32()), 0).to_numpy(zero_copy_only=False)
        answered = table.column("answer").is_valid().to_numpy()
        views = np.where(answered, log_probs, np.float32(np.nan)), np.where(answered, num_tokens, np.int32(0))
        order = self._orders.get(name, slice(None))
        self._views[name] = views[0][order], views[1][order]

    def _own_card_facts(self, name: str) -> dict[str, Any]:
        return {"answered": float(self.answered(name).mean()) if len(self) else None}

    def _card_facts(self, inputs: bool = True) -> dict[str, Any]:
        return {**super()._card_facts(inputs), "writes": True}

    def __repr__(self) -> str:
        inputs = "none" if self.inputs is None else self.inputs.column_names
        return f"AnswerPool({len(self)} prompts, {self.hierarchy!r}, inputs: {inputs})"

    # ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def prompt_column(self) -> str:
        """`str`: The column of the inputs that holds the prompts."""
        if self.inputs is None:
            raise ValueError("The pool must hold its prompts, got one without inputs. Load one with its inputs.")
        return find_prompt_column(self.inputs, self.input_column)

    @property
    def is_chat(self) -> bool:
        """`bool`: Whether the prompts are lists of messages."""
        return not is_text_column(self.inputs, self.prompt_column)

    def prompts(self, rows: Any = slice(None)) -> list[Prompt]:  # noqa: B008  # a slice cannot change
        """Give the prompts: texts, or lists of messages with `role` and `content`."""
        column, rows = self.prompt_column, self._check_rows(rows)
        cells = list(self.inputs.with_format(None).select_columns([column])[rows][column])  # type: ignore[union-attr]
        if not self.is_chat:
            return cells
        return [[{"role": one["role"], "content": one["content"]} for one in cell or ()] for cell in cells]

    def _cells(self, name: str, column: str, rows: Any) -> list[Any]:
        """A column of a teacher's dataset, in the order of the pool's ids."""
        self.hierarchy.index(name)  # says who is there
        rows, dataset = self._check_rows(rows), self.teachers[name].with_format("arrow")
        if name in self._orders:
            rows = self._orders[name][rows]
        return dataset.select_columns([column])[rows].column(column).to_pylist() if len(self) else []

    def texts(self, name: str, rows: Any = slice(None)) -> list[str | None]:  # noqa: B008
        """Give a teacher's answers, `None` where it has none."""
        return self._cells(name, "answer", rows)

    def finish_reasons(self, name: str, rows: Any = slice(None)) -> list[str]:  # noqa: B008
        """Tell how each answer ended: `"stop"`, `"length"`, `"given"`, `"blank"` or `"missing"`."""
        return self._cells(name, "finish_reason", rows)

    def samples(self, name: str, rows: Any = slice(None)) -> list[list[str]]:  # noqa: B008
        """Give all answers of a teacher to each prompt; where it was asked once, its only one."""
        if "samples" in self.teachers[self.hierarchy.names[self.hierarchy.index(name)]].column_names:
            return [some or [] for some in self._cells(name, "samples", rows)]
        return [[] if answer is None else [answer] for answer in self.texts(name, rows)]

    def log_probs(self, name: str, rows: Any = slice(None)) -> np.ndarray:  # noqa: B008
        """Give the log-probability of each answer by its teacher, float32; NaN where there is none or nobody knows."""
        self.hierarchy.index(name)
        return self._views[name][0][self._check_rows(rows)]

    def num_tokens(self, name: str, rows: Any = slice(None)) -> np.ndarray:  # noqa: B008
        """Give the number of tokens of each answer, int32; 0 where there is none or nobody knows."""
        self.hierarchy.index(name)
        return self._views[name][1][self._check_rows(rows)]

    def answered(self, name: str, rows: Any = slice(None)) -> np.ndarray:  # noqa: B008
        """Tell which prompts a teacher answered, bool `(num_rows,)`."""
        self.hierarchy.index(name)
        dataset = self.teachers[name].select_columns(["answer"]).with_format("arrow")
        is_valid = dataset[:].column("answer").is_valid().to_numpy() if len(self) else np.zeros(0, dtype=bool)
        return is_valid[self._orders.get(name, slice(None))][self._check_rows(rows)]

    @property
    def confidences(self) -> np.ndarray:
        """`np.ndarray` of shape `(num_examples, num_teachers)`: Mean log-probability of a token, NaN if unknown."""
        with np.errstate(invalid="ignore", divide="ignore"):
            means = [np.where(count > 0, total / count, np.nan) for total, count in self._views.values()]
        return np.stack(means, axis=1).astype(np.float32)

    def answer_rows(self) -> list[list[str | None]]:
        """Give what all teachers say, one list for each prompt in the order of `hierarchy.names`."""
        return [list(row) for row in zip(*(self.texts(name) for name in self.hierarchy.names))]

    def assign(self, method: str, normalize: str | Normalizer = "exact", *, seed: int = 0) -> np.ndarray:
        """Choose who speaks for each prompt without a student.

        Args:
            method (`str`):
                `"generalist"` (the first of the hierarchy with an answer), `"majority"` (ties go to the most confident
                teacher), `"longest_agreement"` (for long answers), or `"random"`.
            normalize (`str` or `Callable`, *optional*, defaults to `"exact"`):
                Which answers are the same for `"majority"`: `"exact"`, `"number"`, `"boxed"`, or a function of one.
            seed (`int`, *optional*, defaults to 0):
                For `"random"`.

        Returns:
            `np.ndarray` of shape `(num_examples,)`, int64: positions in `hierarchy.names`, -1 where nobody answered.
        """
        if method not in BASELINES:
            raise ValueError(f"`method` must be one of {list(BASELINES)}, got {method!r}. Choose one.")
        if method == "longest_agreement":
            return longest_agreement(self.answer_rows())
        if method == "majority":
            return majority_vote(group_answers(self.answer_rows(), normalize), self.confidences)[0]
        answered = np.stack([self.answered(name) for name in self.hierarchy.names], axis=1).astype(np.int64) - 1
        return first_answered(answered) if method == "generalist" else random_answered(answered, seed)

    # ── exports ─────────────────────────────────────────────────────────────────────────────────────────────────────

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
        mask, scale = self._read_mask(kept), self._read_weights(weights)
        rows = [(row, who, text) for row, who, text in rows if mask[row] and text is not None and text.strip()]
        prompts = self.prompts()
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
        mask, prompts = self._read_mask(kept), self.prompts()
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
        mask, prompts, chat = self._read_mask(kept), self.prompts(), self.is_chat
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

    def _read_mask(self, kept: Any) -> np.ndarray:
        mask = np.ones(len(self), dtype=bool) if kept is None else np.asarray(kept)
        if mask.shape != (len(self),) or mask.dtype != bool:
            raise ValueError(
                f"`kept` must be booleans of shape ({len(self)},), got {mask.shape} of {mask.dtype}. Say of each "
                "prompt whether to keep it."
            )
        return mask

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

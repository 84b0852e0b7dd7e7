"""What teachers wrote to each prompt: stored, read, and chosen from without a student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value

from ..data.columns import is_text_column
from ..hierarchy import Teacher, TeacherHierarchy, is_writable_text
from ..method.answers import (
    Normalizer,
    first_answered,
    group_answers,
    longest_agreement,
    majority_vote,
    random_answered,
)
from .base import TeacherPool, check_kind
from .ids import check_id_values

PROMPT_NAMES = ("prompt", "messages", "text", "sentence", "question")
ORACLE_ANSWER = "oracle_answer"
BASELINES = ("generalist", "majority", "longest_agreement", "random")
GIVEN, MISSING = "given", "missing"  # finish reasons of ready answers, and of none
Prompt = str | list[dict[str, str]]


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
    if wrong := [place for place, answer in enumerate(answers) if not isinstance(answer, str | None)]:
        raise TypeError(
            f"An answer must be text or None, got {answers[wrong[0]]!r} of id {ids[wrong[0]]!r} ({len(wrong)} such "
            "answers). Write it as text, and None for no answer."
        )
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


class WrittenPool(TeacherPool):
    """Hold what every teacher writes, see [`AnswerPool`]."""

    columns = ("answer", "log_prob", "num_tokens", "finish_reason")
    maker = "build_answers"
    has_labels = False

    _views: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]

    @classmethod
    def from_answers(
        cls,
        answers: Mapping[str, Sequence[str | None]] | Dataset,
        prompts: Sequence[Any] | None = None,
        ids: Sequence[Any] | None = None,
        *,
        hierarchy: TeacherHierarchy | None = None,
        inputs: Dataset | None = None,
        log_probs: Mapping[str, Sequence[float]] | None = None,
        num_tokens: Mapping[str, Sequence[int]] | None = None,
        samples: Mapping[str, Sequence[Sequence[str]]] | None = None,
    ) -> Self:
        """Make a pool of answers that are at hand.

        Args:
            answers (`Mapping[str, Sequence[str | None]]` or `datasets.Dataset`):
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
            TypeError: If an answer is no text.
        """
        if isinstance(answers, Dataset):
            answers = {name: answers[name][:] for name in answers.column_names}
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
        # Beside the ids, numbers are kept as arrays; texts stay in the file until they are asked for.
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
        if np.isposinf(log_probs).any():
            raise ValueError(
                f"`log_prob` of '{name}' must be a logarithm of a probability, got inf. Make the pool again."
            )
        num_tokens = pc.fill_null(table.column("num_tokens").cast(pa.int32()), 0).to_numpy(zero_copy_only=False)
        answered = table.column("answer").is_valid().to_numpy()
        numbers = np.where(answered, log_probs, np.float32(np.nan)), np.where(answered, num_tokens, np.int32(0))
        order = self._orders.get(name, slice(None))
        self._views[name] = numbers[0][order], numbers[1][order], answered[order]

    def _own_card_facts(self, name: str) -> dict[str, Any]:
        return {"answered": float(self.answered(name).mean()) if len(self) else None}

    def _card_facts(self, inputs: bool = True) -> dict[str, Any]:
        return {**super()._card_facts(inputs), "writes": True}

    def __repr__(self) -> str:
        inputs = "none" if self.inputs is None else self.inputs.column_names
        return f"{type(self).__name__}({len(self)} prompts, {self.hierarchy!r}, inputs: {inputs})"

    # ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def prompt_column(self) -> str:
        """`str`: The column of the inputs that holds the prompts."""
        if self.inputs is None:
            raise ValueError(
                "The pool must hold its prompts, got none. Give them to `from_answers`, or load it with inputs."
            )
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

    def _dataset(self, name: str) -> Dataset:
        self.hierarchy.index(name)  # says who is there
        return self.teachers[name]

    def _cells(self, name: str, column: str, rows: Any) -> list[Any]:
        """A column of a teacher's dataset, in the order of the pool's ids."""
        dataset, rows = self._dataset(name).with_format("arrow"), self._check_rows(rows)
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
        if "samples" in self._dataset(name).column_names:
            return [some or [] for some in self._cells(name, "samples", rows)]
        return [[] if answer is None else [answer] for answer in self.texts(name, rows)]

    def _view(self, name: str, place: int, rows: Any) -> np.ndarray:
        self.hierarchy.index(name)  # says who is there
        return self._views[name][place][self._check_rows(rows)]

    def log_probs(self, name: str, rows: Any = slice(None)) -> np.ndarray:  # noqa: B008
        """Give the log-probability of each answer by its teacher, float32; NaN where there is none or nobody knows."""
        return self._view(name, 0, rows)

    def num_tokens(self, name: str, rows: Any = slice(None)) -> np.ndarray:  # noqa: B008
        """Give the number of tokens of each answer, int32; 0 where there is none or nobody knows."""
        return self._view(name, 1, rows)

    def answered(self, name: str, rows: Any = slice(None)) -> np.ndarray:  # noqa: B008
        """Tell which prompts a teacher answered, bool `(num_rows,)`."""
        return self._view(name, 2, rows)

    @property
    def confidences(self) -> np.ndarray:
        """`np.ndarray` of shape `(num_examples, num_teachers)`: Mean log-probability of a token, NaN if unknown."""
        with np.errstate(invalid="ignore", divide="ignore"):
            means = [np.where(count > 0, total / count, np.nan) for total, count, _ in self._views.values()]
        return np.stack(means, axis=1).astype(np.float32)

    def answer_rows(self) -> list[list[str | None]]:
        """Give what all teachers say, one list for each prompt in the order of `hierarchy.names`."""
        return [list(row) for row in zip(*(self.texts(name) for name in self.hierarchy.names))]

    def assign(self, method: str, normalize: str | Normalizer = "exact", *, seed: int = 0) -> np.ndarray:
        """Choose who speaks for each prompt without a student.

        Args:
            method (`str`):
                `"generalist"` (the first of the hierarchy with an answer), `"majority"` (ties go to the most confident
                teacher, see [`majority_vote`]), `"longest_agreement"` (for long answers), or `"random"`.
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

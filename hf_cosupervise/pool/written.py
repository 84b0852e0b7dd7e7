"""What a teacher wrote to each prompt, as a dataset; and which column holds the prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value

from ..hierarchy import is_writable_text

PROMPT_NAMES = ("prompt", "messages", "text", "sentence", "question")
ORACLE_ANSWER = "oracle_answer"


def find_prompt_column(dataset: Dataset, column: str | None = None) -> str:
    """Find the column of prompts."""
    for name in PROMPT_NAMES if column is None else (column,):
        if name in dataset.column_names:
            return name
    raise ValueError(
        f"Prompts must stand in a column {list(PROMPT_NAMES)}, or one that is named, got "
        f"{'none' if column is None else repr(column)} among {dataset.column_names}. Name it with `input_column`."
    )


def check_prompts(column: str, kind: Any) -> None:
    """See that prompts are texts, or messages of texts: an image in one would be exported as Python shows it."""
    message = kind.feature if isinstance(kind, List) and isinstance(kind.feature, dict) else {}
    texts = [message.get("role"), message.get("content")] if isinstance(kind, List) else [kind]
    if not all(isinstance(text, Value) and text.dtype in ("string", "large_string") for text in texts):
        raise ValueError(
            "Prompts must be texts, or lists of messages with the texts `role` and `content`, got "
            f"'{column}' of {kind}. Make them so, or name another column with `input_column`."
        )


def check_texts(texts: Sequence[Any], ids: Sequence[Any], what: str = "An answer") -> None:
    """See that what is given is text that a file can hold, or None."""
    noun = what.split()[-1]
    if wrong := [place for place, text in enumerate(texts) if not isinstance(text, str | None)]:
        raise TypeError(
            f"{what} must be text or None, got {texts[wrong[0]]!r} of id {ids[wrong[0]]!r} ({len(wrong)} such "
            f"{noun}s). Write it as text, and None for no {noun}."
        )
    if wrong := [place for place, text in enumerate(texts) if text is not None and not is_writable_text(text)]:
        raise ValueError(
            f"{what} must be text without NUL and without halves of characters, got {texts[wrong[0]]!r} of id "
            f"{ids[wrong[0]]!r} ({len(wrong)} such {noun}s). Correct it, or give None for no {noun}."
        )


def read_samples(samples: Sequence[Any], ids: Sequence[Any], what: str) -> list[list[str]]:
    """All answers to each prompt, given as a text, a list of texts or None; what is only blanks is none."""
    rows = [[] if own is None else [own] if isinstance(own, str) else own for own in samples]
    if wrong := [
        own for own in rows if not isinstance(own, list | tuple) or not all(isinstance(text, str) for text in own)
    ]:
        raise TypeError(
            f"`{what}` must hold a text, a list of texts or None for each prompt, got {wrong[0]!r} ({len(wrong)} "
            "such). Write answers as texts."
        )
    check_texts([text for some in rows for text in some], [own for own, some in zip(ids, rows) for _ in some])
    return [list(filter(has_text, own)) for own in rows]


def check_prompt_texts(prompts: Sequence[Any], ids: Sequence[Any]) -> None:
    """Do as [`check_texts`], of prompts and of the messages of chats; what is neither is told by its type."""
    check_texts([_unwritable_part(prompt) for prompt in prompts], ids, "A prompt")


def _unwritable_part(prompt: Any) -> str | None:
    """A text of a prompt that no file can hold."""
    messages = [message for message in prompt if isinstance(message, Mapping)] if isinstance(prompt, list) else []
    texts = [prompt, *(text for message in messages for text in message.values())]
    return next((text for text in texts if isinstance(text, str) and not is_writable_text(text)), None)


def has_text(answer: str | None) -> bool:
    """Whether an answer says anything: what is only blanks is none."""
    return answer is not None and bool(answer.strip())


def count_entries(values: Any) -> int | str:
    """How many entries a list of any kind has; of what is none, its type."""
    return len(values) if isinstance(values, Sized) and not isinstance(values, str) else type(values).__name__


def _read_numbers(name: str, values: Any, kinds: str, what: str) -> np.ndarray:
    """A number for each prompt; None is NaN."""
    try:
        found = np.asarray(values)
        found = found.astype(np.float64) if found.dtype == object else found
    except (TypeError, ValueError):
        found = np.array("")  # which is no number either
    if found.ndim != 1 or found.size and found.dtype.kind not in kinds:
        raise ValueError(f"`{name}` must hold {what} for each prompt, got {values!r:.80}. Correct it.")
    return found


def answer_dataset(
    ids: Sequence[Any] | np.ndarray,
    answers: Sequence[str | None],
    log_probs: Sequence[float] | np.ndarray | None = None,
    num_tokens: Sequence[int] | np.ndarray | None = None,
    reasons: Sequence[str] | None = None,
    samples: Sequence[Any] | None = None,
) -> Dataset:
    """Wrap one teacher's answers as a dataset; what is only blanks is no answer."""
    ids = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
    check_texts(answers, ids)
    texts = [answer if has_text(answer) else None for answer in answers]
    reasons = ["given"] * len(ids) if reasons is None else reasons
    # A reason that was given for it, such as a length, is kept.
    reasons = ["missing" if text is None and why == "given" else why for text, why in zip(texts, reasons)]
    sums = _read_numbers("log_probs", [np.nan] * len(ids) if log_probs is None else log_probs, "fiu", "a number")
    counts = _read_numbers("num_tokens", [0] * len(ids) if num_tokens is None else num_tokens, "iu", "an integer")
    columns: dict[str, tuple[Any, Any]] = {
        # Said, or a pool of no rows would have ids of no type.
        "id": (ids, Value("string" if ids and isinstance(ids[0], str) else "int64")),
        "answer": (texts, Value("string")),
        # NaN would be a number to whoever reads the column, and spoil every mean; so would what is no probability.
        "log_prob": (
            [None if np.isnan(value) or value == -np.inf else float(value) for value in sums],
            Value("float32"),
        ),
        "num_tokens": (counts.tolist(), Value("int32")),
        "finish_reason": (reasons, Value("string")),
    }
    if samples is not None:
        columns["samples"] = read_samples(samples, ids, "samples"), List(Value("string"))
    features = Features({name: kind for name, (_, kind) in columns.items()})
    return Dataset.from_dict({name: values for name, (values, _) in columns.items()}, features=features)


def check_answers(name: str, table: pa.Table) -> None:
    """See that a teacher's table holds answers, whoever made it."""
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
    # Where numpy ends a text, so that two of them would be one.
    if any(pc.any(pc.match_substring(column, "\0")).as_py() for column in texts):
        raise ValueError(f"Answers of '{name}' must hold no NUL, got one. Leave it out, or make it None.")
    if (least := pc.min(table.column("num_tokens")).as_py() or 0) < 0:
        raise ValueError(f"`num_tokens` of '{name}' must be at least 0, got {least}. Make the pool again.")
    ends = pc.min_max(table.column("log_prob").cast(pa.float32())).as_py()
    for value in filter(None, ends.values()):
        if value > 1e-3 or value == -np.inf:  # more than rounding makes of 0
            raise ValueError(
                f"`log_prob` of '{name}' must be the logarithm of a probability, finite and at most 0, got {value:g}. "
                "Give sums of log-probabilities, and None where nobody knows."
            )

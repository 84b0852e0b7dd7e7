"""Ask teachers that write for their answers, once: with the same work folder, processes and facts as pseudolabels."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset, IterableDataset

from ..hierarchy import Teacher, TeacherHierarchy, is_writable_text
from ..pool.answers import AnswerPool
from ..pool.base import TeacherPool, check_kind
from ..pool.files import write_arrow
from ..pool.written import answer_dataset
from .kinds.base import TeacherModel
from .kinds.loading import load_teacher
from .kinds.written import Written, WrittenTeacher, as_array
from .labeling import ask_teachers, check_arguments
from .progress import Part, Progress, Segment

_ABOUT_BYTES = 512  # of an answer, for the disk that is needed


def build_answers(
    dataset: Dataset | IterableDataset | str,
    hierarchy: TeacherHierarchy,
    *,
    split: str = "train",
    revision: str | None = None,
    config_name: str | None = None,
    streaming: bool = False,
    input_column: str | None = None,
    oracle_column: str | None = None,
    oracle_domain_column: str | None = None,
    batch_size: int = 16,
    output_dir: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    disable_tqdm: bool = False,
    models: Mapping[str, TeacherModel] | None = None,
    precision: str = "float32",
    num_workers: int = 0,
    on_error: str = "raise",
    reuse: AnswerPool | None = None,
    source: Mapping[str, str] | None = None,
) -> AnswerPool:
    """Ask every teacher of a hierarchy without labels for an answer to every prompt.

    A teacher is a language model in a folder or on the Hub, causal or from sequence to sequence, or a column of ready
    answers (`kind="column"`: texts, lists of samples, `None`). Its `options` are `temperature` (0: the likeliest
    token; else with `seed`), `num_answers` (of which the first is the answer), `max_new_tokens` (256), `stop` (texts
    that end an answer and are cut off), `template` (Jinja with `{{ text }}`) and `chat` (as a user's message) for
    prompts that are texts, and `too_long` (`"raise"`, or `"cut"` the end of a text). What is drawn hangs on the
    prompt, the teacher's name and the seed alone, whatever the batches and processes.

    Everything else, and every argument that is not told of here, is as in [`build_pool`]: a run that was stopped goes
    on, several processes share the rows, and a pool can be reused.

    Args:
        hierarchy (`TeacherHierarchy`):
            `TeacherHierarchy(teachers=[...])`, without labels.
        input_column (`str`, *optional*):
            The prompts: texts, or lists of messages with `role` and `content`. Defaults to `prompt`, `messages`,
            `text`, `sentence` or `question`.
        oracle_column (`str`, *optional*):
            Column of true answers, kept as `oracle_answer`. Columns called `answer`, `solution` and the like that are
            not declared here are refused.
        batch_size (`int`, *optional*, defaults to 16):
            Answers that are written side by side; eight batches are on disk at once.
        models (`Mapping[str, TeacherModel]`, *optional*):
            As in [`build_pool`]; what they are called for is an array of objects `Written`.
        on_error (`str`, *optional*, defaults to `"raise"`):
            For empty prompts, prompts longer than the model reads, and prompts and answers that hold NUL: `"raise"`,
            or leave them `"missing"`, counted as `num_failed` in the teacher's facts.
        reuse (`AnswerPool`, *optional*):
            Answers of the same teachers with the same options, precision aside, which are not asked again.

    Returns:
        [`AnswerPool`]: Its `facts` hold for each teacher its `generation` settings and `num_failed`.

    Raises:
        ValueError: If the hierarchy has labels, an option is not usable, or as [`build_pool`].
        FileExistsError, MemoryError, OSError, RuntimeError, TypeError: As [`build_pool`].
    """
    settings = dict(locals())  # all that is asked for, by its name
    check_arguments(dataset, hierarchy, batch_size, output_dir, "AnswerPool")
    hierarchy.check_labels("`build_answers`", wanted=False)
    check_kind(reuse, AnswerPool, "reuse", optional=True)
    check_kind(input_column, str, "input_column", optional=True)
    pool: AnswerPool = ask_teachers(AnswerForm(batch_size), keep_inputs=True, **settings)
    return pool


@dataclass(frozen=True)
class AnswerForm:
    """Texts with what is known of them, as an array of [`Written`] and as lines of JSON on disk."""

    batch_size: int

    pool: ClassVar[type[TeacherPool]] = AnswerPool
    what: ClassVar[str] = "answers"
    dtype: ClassVar[Any] = object
    batches_at_once: ClassVar[int] = 8  # so that prompts of similar length can stand side by side

    def plan(self) -> dict[str, Any]:
        """Settings are options of teachers, which are in the hierarchy."""
        return {"answers": "written"}

    def load(self, teacher: Teacher, device: torch.device, commit: str | None) -> TeacherModel:
        """Load a teacher."""
        model: Any = load_teacher(teacher, (), device, commit=commit)
        if isinstance(model, WrittenTeacher):  # a column has nothing to write
            model.batch_size = self.batch_size
        return model

    def progress(self, folder: Path, num_rows: int) -> Progress:
        """Where answers lie as they come."""
        return _AnswerProgress(folder, num_rows)

    def nothing(self, count: int) -> np.ndarray:
        """Missing answers."""
        return as_array([Written(None)] * count)

    def find_wrong(self, name: str, answers: np.ndarray) -> dict[int, str]:
        """Answers that no file can hold, or that are none."""
        wrong = {}
        for place, answer in enumerate(answers):
            if not isinstance(answer, Written):  # of somebody's own model, which `models` brought
                wrong[place] = f"be a `Written`, got {type(answer).__name__}"
            elif any(not is_writable_text(text) for text in (answer.text or "", *(answer.samples or ()))):
                wrong[place] = f"hold no NUL and no halves of characters, got {answer.text!r}"
        return {place: f"An answer of teacher '{name}' must {rule}" for place, rule in wrong.items()}

    def append(self, part: Part, start: int, answers: np.ndarray, failed_rows: Sequence[int], reason: str) -> None:
        """Put a batch on disk."""
        data = json.dumps(answers.tolist()).encode("utf-8")  # of any length, so that no array can hold them
        num_answered = sum(answer.text is not None for answer in answers)
        part.write((start, start + len(answers)), data, num_answered, failed_rows, 0.0, reason)

    def facts(self, segments: Sequence[Segment]) -> dict[str, Any]:
        """Nothing that is not seen in the answers."""
        return {}

    def write(self, path: Path, ids: Sequence[Any], pieces: Iterable[Sequence[Written]]) -> None:
        """Write a teacher's file of the pool."""
        texts, log_probs, num_tokens, reasons, samples = zip(*(answer for piece in pieces for answer in piece))
        # Of a teacher that was asked once there is no such column, and no row where it was not asked at all.
        sampled = [some or [] for some in samples] if any(some is not None for some in samples) else None
        write_arrow(answer_dataset(ids, texts, log_probs, num_tokens, reasons, sampled), path)

    def stored(self, pool: Any, name: str, rows: np.ndarray) -> Iterator[list[Written]]:
        """Read answers from another pool."""
        has_samples = "samples" in pool.teachers[name].column_names
        columns = [pool.texts(name, rows), pool.log_probs(name, rows).tolist(), pool.num_tokens(name, rows).tolist()]
        columns += [pool.finish_reasons(name, rows), pool.samples(name, rows) if has_samples else [None] * len(rows)]
        yield list(map(Written, *columns))


class _AnswerProgress(Progress):
    """Answers of some rows of some teachers: batches of any number of bytes."""

    def __init__(self, folder: Path, num_rows: int) -> None:
        super().__init__(folder, num_rows, 1, np.dtype(np.uint8))
        self.row_bytes = _ABOUT_BYTES

    def fits(self, size: int, count: int) -> bool:
        """Tell whether so many bytes can be those of so many rows."""
        return size > 0  # texts are of any length; JSON itself says whether they are whole

    def decode(self, data: bytes, count: int, rows: slice) -> list[Written]:
        """Read some rows of a batch."""
        return [Written(*answer) for answer in json.loads(data)[rows]]

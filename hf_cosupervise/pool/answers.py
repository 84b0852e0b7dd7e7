"""Pools of answers in words: read, chosen from without training, and exported for other trainers."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence, Sized
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value

from ..data.columns import is_text_column
from ..hierarchy import Teacher, TeacherHierarchy
from ..method.answers import (
    NOBODY,
    Normalizer,
    first_answered,
    follow_student,
    group_answers,
    longest_agreement,
    majority_vote,
    pair_assigned,
    pair_consistent,
    pair_scored,
    pair_unfamiliar,
    random_answered,
)
from .base import TeacherPool, check_kind
from .ids import check_id_values
from .written import (
    PROMPT_NAMES,
    answer_dataset,
    check_answers,
    check_prompt_texts,
    check_prompts,
    check_texts,
    count_entries,
    find_prompt_column,
    has_text,
    read_samples,
)

logger = logging.getLogger(__name__)
METHODS = ("generalist", "majority", "longest_agreement", "random", "same_answer")
PAIRS = ("assigned", "rank", "self_consistency", "score", "unfamiliar")
Prompt = str | list[dict[str, str]]
Samples = str | Sequence[str | Sequence[str] | None]  # a student's answers
# Said of exports, because a dataset of no rows cannot tell what its columns would hold.
_MESSAGES = List({"role": Value("string"), "content": Value("string")})


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
    has_labels = False  # nothing is matched by name here: a hierarchy with labels is meant for the other pool

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
            ValueError: If lengths, ids, answers or prompts do not fit.
            TypeError: If an answer is no text.
        """
        if isinstance(answers, Dataset):
            answers = {name: answers[name][:] for name in answers.column_names}
        check_kind(answers, Mapping, "answers")
        check_kind(inputs, Dataset, "inputs", optional=True)
        if hierarchy is None:
            hierarchy = TeacherHierarchy(teachers=[Teacher(name, kind="column") for name in answers])
        has_ids = inputs is not None and "id" in inputs.column_names
        if ids is None:
            ids = inputs["id"][:] if has_ids else range(len(next(iter(answers.values()), ())))  # type: ignore[index]
        ids = list(ids)
        check_id_values(ids)
        lengths: dict[str, int | str] = {name: count_entries(some) for name, some in answers.items()}
        lengths |= {} if inputs is None else {"the inputs": len(inputs)}
        prompts = None if prompts is None else list(prompts)
        lengths |= {} if prompts is None else {"the prompts": len(prompts)}
        known = dict[str, dict[str, Any]]()
        for what, own in {"log_probs": log_probs, "num_tokens": num_tokens, "samples": samples}.items():
            check_kind(own, Mapping, what, optional=True)
            if foreign := set(own or {}) - set(answers):
                raise ValueError(
                    f"`{what}` must be by names of `answers`, {list(answers)}, got {sorted(foreign)}. Correct them."
                )
            known[what] = {name: some for name, some in (own or {}).items() if some is not None}
            lengths |= {f"`{what}` of '{name}'": count_entries(some) for name, some in known[what].items()}
        if lonely := sorted(known["log_probs"].keys() - known["num_tokens"].keys()):
            raise ValueError(f"`log_probs` are sums over `num_tokens`, got none of these for {lonely}. Give both.")
        if wrong := {name: length for name, length in lengths.items() if length != len(ids)}:
            raise ValueError(
                f"All must have one entry for each of the {len(ids)} ids, got {wrong}. Give None for none."
            )
        if prompts is not None:
            check_prompt_texts(prompts, ids)
            given = Dataset.from_dict({"prompt": prompts})  # tells by its type whether they are chats
            inputs = given if inputs is None else inputs.add_column("prompt", given["prompt"][:])
        teachers = {
            name: answer_dataset(ids, some, **{what: own.get(name) for what, own in known.items()})
            for name, some in answers.items()
        }
        if inputs is not None and not has_ids:
            inputs = inputs.add_column("id", ids)
        return cls(hierarchy, teachers, inputs, input_column="prompt" if prompts is not None else None)

    def _read_inputs(self) -> None:
        kinds = {} if self.inputs is None else self.inputs.features
        # A pool may hold none; whoever asks for them is told so.
        for name in [name for name in (self.input_column, *PROMPT_NAMES) if name in kinds][:1]:
            check_prompts(str(name), kinds[name])

    def _open(self, name: str, dataset: Dataset) -> None:
        # Beside the ids, numbers are kept as arrays; texts stay in the file until they are asked for.
        table = dataset.with_format("arrow")[:] if len(dataset) else dataset.data.table
        check_answers(name, table)
        super()._open(name, dataset)
        answered, order = table.column("answer").is_valid().to_numpy(), self._orders.get(name, slice(None))
        log_probs = table.column("log_prob").cast(pa.float32()).to_numpy(zero_copy_only=False)
        num_tokens = pc.fill_null(table.column("num_tokens").cast(pa.int32()), 0).to_numpy(zero_copy_only=False)
        numbers = np.where(answered, log_probs, np.float32(np.nan)), np.where(answered, num_tokens, np.int32(0))
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
        # Texts and lists, whatever format a dataset was given for training; and no other column is read.
        cells = list(self.inputs.with_format(None).select_columns([column])[rows][column])  # type: ignore[union-attr]
        if not self.is_chat:
            return cells
        return [[{"role": one["role"], "content": one["content"]} for one in cell or ()] for cell in cells]

    def _cells(self, name: str, column: str, rows: Any) -> list[Any]:
        """A column of a teacher's dataset, in the order of the pool's ids."""
        self.hierarchy.index(name)  # says who is there
        # As Arrow has it: a dataset of Python objects would decode every other column too.
        dataset, rows = self.teachers[name].with_format("arrow"), self._check_rows(rows)
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
        self.hierarchy.index(name)
        # Only who was asked several times has them, and perhaps one teacher of the pool.
        if "samples" in self.teachers[name].column_names:
            return [some or [] for some in self._cells(name, "samples", rows)]
        return [[] if answer is None else [answer] for answer in self.texts(name, rows)]

    def _view(self, name: str, place: int, rows: Any) -> np.ndarray:
        self.hierarchy.index(name)
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
        # A sum of which the tokens are not counted says nothing.
        with np.errstate(invalid="ignore", divide="ignore"):
            means = [np.where(count > 0, total / count, np.nan) for total, count, _ in self._views.values()]
        return np.stack(means, axis=1).astype(np.float32)

    def answer_rows(self) -> list[list[str | None]]:
        """Give what all teachers say, one list for each prompt in the order of `hierarchy.names`."""
        return [list(row) for row in zip(*(self.texts(name) for name in self.hierarchy.names))]

    def group_with(self, own: Sequence[Sequence[str]], normalize: str | Normalizer) -> tuple[np.ndarray, np.ndarray]:
        """Number all answers of teachers, and those of a student to each prompt with them, see [`group_answers`]."""
        count, most = len(self.hierarchy.names), max(map(len, own), default=0)
        rows = [
            [*said, *mine, *[None] * (most - len(mine))] for said, mine in zip(self.answer_rows(), own, strict=True)
        ]
        groups = group_answers(rows, normalize).reshape(len(self), count + most)
        return groups[:, :count], groups[:, count:]

    def assign(
        self, method: str, normalize: str | Normalizer = "exact", *, seed: int = 0, student: Samples | None = None
    ) -> np.ndarray:
        """Choose who speaks for each prompt without asking a student.

        Args:
            method (`str`):
                `"generalist"` (the first of the hierarchy with an answer), `"majority"` (ties go to the most confident
                teacher, see [`majority_vote`]), `"longest_agreement"` (for long answers), `"random"`, or
                `"same_answer"`: who says what a student that was asked elsewhere says, see [`follow_student`].
            normalize (`str` or `Callable`, *optional*, defaults to `"exact"`):
                Which answers are the same: `"exact"`, `"number"`, `"boxed"`, or a function of one.
            seed (`int`, *optional*, defaults to 0):
                For `"random"`.
            student (`str` or `Sequence[str | Sequence[str] | None]`, *optional*):
                What the student answers itself, for `"same_answer"`: for each prompt a text, a list of texts, perhaps
                empty, or `None`; or the teacher of the pool that it is, who does not speak then.

        Returns:
            `np.ndarray` of shape `(num_examples,)`, int64: positions in `hierarchy.names`, -1 where nobody answered.
        """
        if method not in METHODS:
            raise ValueError(f"`method` must be one of {list(METHODS)}, got {method!r}. Choose one.")
        if student is not None and method != "same_answer":
            raise ValueError(
                f"`method` {method!r} asks no student, got `student`. Leave it out, or choose 'same_answer'."
            )
        if method == "longest_agreement":
            return longest_agreement(self.answer_rows())
        if method == "majority":
            return majority_vote(group_answers(self.answer_rows(), normalize), self.confidences)[0]
        if method == "same_answer":
            own = self._read_samples(student, '`assign("same_answer")`')
            said, mine = self.group_with(own, normalize)
            if isinstance(student, str):
                said[:, self.hierarchy.index(student)] = NOBODY
            return follow_student(said, mine, self.confidences)
        # As if all had said the same: who has an answer is all that counts here.
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
            `teacher_id`, the teacher's name, and `id`.

        Raises:
            ValueError: If an array is of another shape, `messages` are wanted of prompts that are texts, or one of
                `answers` holds NUL or half a character.
            TypeError: If one of `answers` is no text.
        """
        if messages and not self.is_chat:
            raise ValueError("`messages` need prompts that are messages, got texts. Export `prompt` and `completion`.")
        if answers is not None and len(answers) != len(self):
            raise ValueError(f"`answers` must have one entry for each of {len(self)} prompts, got {len(answers)}.")
        names = [*self.hierarchy.names, None]  # at -1, nobody
        speakers = None if assigned is None else self._read_assigned(assigned).tolist()
        if answers is not None:
            check_texts(answers, self.ids.tolist())
            said = list(zip(range(len(self)), speakers or [NOBODY] * len(self), answers))  # row, who says it, what
        else:
            each = [range(len(names) - 1) if speakers is None else {speakers[row]} - {-1} for row in range(len(self))]
            said = [(row, who, texts[who]) for row, texts in enumerate(self.answer_rows()) for who in each[row]]
        scale = self._one_each("weights", weights, "fiub", "numbers from 0")
        # Blank ones are among `answers` of the user's alone: a pool holds none.
        said = [(row, who, text) for row, who, text in said if has_text(text)]
        rows = [row for row, _, _ in said]
        columns: dict[str, Any] = {"completion": [text for _, _, text in said]}
        columns |= {"weight": [float(scale[row]) for row in rows], "teacher_id": [names[who] for _, who, _ in said]}
        return self._export("answers for supervised fine-tuning", kept, rows, columns, messages)

    def to_routed(self, assigned: np.ndarray | str | None = None, kept: np.ndarray | None = None) -> Dataset:
        """Export which teacher each prompt goes to, as trainers that distil from several teachers ask for.

        Args:
            assigned (`np.ndarray` of shape `(num_examples,)` or `str`, *optional*):
                As in [`to_sft`]; or a column of the inputs that says it in any words, by default `teacher_id`.
            kept (`np.ndarray` of shape `(num_examples,)`, *optional*):
                Bool, which prompts to keep.

        Returns:
            `datasets.Dataset`: `prompt`, `teacher_id` (text) and `id`; without the prompts that nobody speaks for.
        """
        assigned = "teacher_id" if assigned is None else assigned
        # A column of the user's own wins over a method of the same name.
        columns = [] if self.inputs is None else list(self.inputs.column_names)
        if isinstance(assigned, str) and assigned in columns:
            speakers = [None if name is None else str(name) for name in self.column(assigned)]
        elif isinstance(assigned, str) and assigned not in METHODS:
            raise ValueError(
                f"`assigned` must be positions of teachers, one of {list(METHODS)}, or a column of the inputs "
                f"{columns}, got {assigned!r}. Give one of them."
            )
        else:
            speakers = [None if who < 0 else self.hierarchy.names[who] for who in self._read_assigned(assigned)]
        rows = [row for row, name in enumerate(speakers) if name is not None]
        return self._export("prompts with their teachers", kept, rows, {"teacher_id": [speakers[row] for row in rows]})

    def to_preferences(
        self,
        pairs: str = "assigned",
        assigned: np.ndarray | str | None = None,
        kept: np.ndarray | None = None,
        *,
        normalize: str | Normalizer = "exact",
        scores: np.ndarray | str | None = None,
        ranking: Sequence[str] | None = None,
        student: Samples | None = None,
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
            assigned, kept (*optional*):
                As in [`to_sft`], but `assigned` defaults to `"majority"`; to `"generalist"` for `"self_consistency"`.
            normalize, seed (*optional*):
                As in [`assign`]; the seed is that of all that is drawn.
            scores (`np.ndarray` of shape `(num_examples, num_teachers)` or `str`, *optional*):
                For `"score"` any numbers, or their column in each teacher's dataset; for `"unfamiliar"` the student's
                mean log-probabilities. NaN where nobody knows.
            ranking (`Sequence[str]`, *optional*):
                All teachers, the best first. Defaults to the order of the hierarchy.
            student (`str` or `Sequence[str | Sequence[str] | None]`, *optional*):
                The student's own answers for `"self_consistency"` and for `assigned="same_answer"`, see [`assign`].
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
        # Samples that the pairs are made of are no business of a method that asks no student.
        is_asked = pairs != "self_consistency" or isinstance(assigned, str) and assigned == "same_answer"
        speakers = self._read_assigned(assigned, normalize, seed, student if is_asked else None)
        said = self.answer_rows()
        if pairs == "self_consistency":
            own = [None if who < 0 else row[who] for row, who in zip(said, speakers)]
            samples = self._read_samples(student, '`pairs="self_consistency"`')
            found = pair_consistent(own, samples, normalize, seed=seed, **options)
        else:
            groups = group_answers(said, normalize)
            if pairs == "assigned":
                both = pair_assigned(groups, speakers, seed)
            elif pairs == "unfamiliar":
                both = pair_unfamiliar(groups, speakers, self._read_scores(scores, pairs))
            else:
                by_rank = pairs == "rank"
                both = pair_scored(groups, self._read_ranks(ranking) if by_rank else self._read_scores(scores, pairs))
            # As they were written: what `normalize` makes of them only tells them apart.
            each = enumerate(zip(said, *both))
            found = [(row, str(text[one]), str(text[two])) for row, (text, one, two) in each if min(one, two) >= 0]
        columns = {"chosen": [better for _, better, _ in found], "rejected": [worse for _, _, worse in found]}
        return self._export(f"pairs of answers by `{pairs}`", kept, [row for row, _, _ in found], columns)

    def _export(
        self, what: str, kept: Any, rows: Sequence[int], columns: Mapping[str, Sequence[Any]], messages: bool = False
    ) -> Dataset:
        """A plain dataset of those of some prompts that are kept, which tells whose answers it holds."""
        prompts, mask = self.prompts(), self._one_each("kept", kept, "b", "booleans")
        # No trainer can learn an answer to nothing.
        mask = mask & [bool(text and (not isinstance(text, str) or text.strip())) for text in prompts]
        used = [place for place, row in enumerate(rows) if mask[row]]
        if not used:
            logger.warning(f"No prompt gives {what}: the dataset is empty.")
        whole: dict[str, Any] = {"prompt": [prompts[rows[place]] for place in used]}
        whole |= {name: [values[place] for place in used] for name, values in columns.items()}
        whole["id"] = [self.ids[rows[place]].item() for place in used]
        if self.is_chat:
            for name in whole.keys() & {"completion", "chosen", "rejected"}:
                whole[name] = [[{"role": "assistant", "content": text}] for text in whole[name]]
        if messages:
            both = zip(whole.pop("prompt"), whole.pop("completion"))
            whole = {"messages": [[*prompt, *reply] for prompt, reply in both], **whole}
        kinds: dict[str, Any] = dict.fromkeys(whole, _MESSAGES if self.is_chat else Value("string"))
        kinds |= {"id": Value("string" if self.ids.dtype.kind == "U" else "int64")}
        kinds |= {"teacher_id": Value("string"), "weight": Value("float32")}
        dataset = Dataset.from_dict(whole, features=Features({name: kinds[name] for name in whole}))
        # As on the card, where nothing of this machine stands.
        known = json.dumps({**self._card_facts(), "pool": self.repo_id, "commit": self.commit}, sort_keys=True)
        dataset.info.description = (
            f"By hf_cosupervise: {what}, of {len(self.hierarchy.names)} teachers. They are answers of models, not "
            f"ground truth. {known}"
        )
        return dataset

    # ── what is given ───────────────────────────────────────────────────────────────────────────────────────────────

    def _one_each(
        self, name: str, values: Any, kinds: str, what: str, within: tuple[float, float] = (0, np.inf)
    ) -> np.ndarray:
        """A number for each prompt, by default 1."""
        values, (least, most) = np.ones(len(self), bool) if values is None else np.asarray(values), within
        # NaN fails both comparisons, and a list of nothing is of floats.
        is_right = values.shape == (len(self),) and (values.dtype.kind in kinds or not values.size)
        if not is_right or not ((least <= values) & (values <= most)).all():
            raise ValueError(
                f"`{name}` must be {what} of shape ({len(self)},), got {values.shape} of {values.dtype}. Give one for "
                "each prompt."
            )
        return values

    def _read_assigned(
        self, assigned: Any, normalize: str | Normalizer = "exact", seed: int = 0, student: Samples | None = None
    ) -> np.ndarray:
        """Who speaks for each prompt, int64."""
        if isinstance(assigned, str):
            return self.assign(assigned, normalize, seed=seed, student=student)
        last = len(self.hierarchy.names) - 1
        what = f"positions 0..{last} of teachers or -1, integers"
        return self._one_each("assigned", assigned, "iu", what, (NOBODY, last)).astype(np.int64)

    def _read_scores(self, scores: Any, pairs: str) -> np.ndarray:
        names, shape = self.hierarchy.names, (len(self), len(self.hierarchy.names))
        if isinstance(scores, str):
            if lacking := [name for name in names if scores not in self.teachers[name].column_names]:
                raise ValueError(
                    f"`scores` must be a column of every teacher's dataset, got {scores!r}, which {lacking} lack. Add "
                    "it there, or give an array."
                )
            # None of a teacher without a score becomes NaN.
            columns = [self._cells(name, scores, slice(None)) for name in names]
            scores = np.array(columns, dtype=np.float64).T.reshape(shape)
        values = np.asarray(() if scores is None else scores)
        if values.shape != shape or values.dtype.kind not in "fiub":
            found = "none" if scores is None else values.shape or type(scores).__name__
            raise ValueError(
                f"`pairs={pairs!r}` needs `scores`, numbers of shape {shape}, got {found}. Give one for each prompt "
                "and teacher, NaN for unknown, such as `score_answers(…).per_token`."
            )
        return values.astype(np.float64)

    def _read_ranks(self, ranking: Sequence[str] | None) -> np.ndarray:
        names = list(self.hierarchy.names)
        ranking = names if ranking is None else list(ranking)
        if sorted(ranking) != sorted(names):
            raise ValueError(f"`ranking` must name each teacher of {names} once, the best first, got {ranking}.")
        return np.array([-ranking.index(name) for name in names])  # by teacher, not by rank

    def _read_samples(self, student: Samples | None, what: str) -> list[list[str]]:
        """What a student answers to each prompt."""
        if isinstance(student, str):
            return [list(filter(has_text, own)) for own in self.samples(student)]  # an older pool may hold blank ones
        # Of a dictionary the keys would be taken for answers.
        is_list = isinstance(student, Sized) and not isinstance(student, Mapping)
        found = "none" if student is None else len(student) if is_list else type(student).__name__
        if student is None or found != len(self):
            raise ValueError(
                f"{what} needs as `student` its own answers: a text, a list of texts or None for each of {len(self)} "
                f"prompts, or the name of a teacher of the pool, got {found}. Give one of them."
            )
        return read_samples(student, self.ids.tolist(), "student")

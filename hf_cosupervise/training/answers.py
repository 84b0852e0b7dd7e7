"""Co-supervision of a student that writes: whose answer to each prompt it learns from, level by level."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from huggingface_hub import CommitInfo
from peft import LoraConfig
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from ..files import explain_full_disk, write_text
from ..hub.cards import model_card, write_card
from ..hub.client import open_repo
from ..method.answers import Normalizer, find_normalizer
from ..method.assignment import NOBODY, fall_back
from ..method.routing import REJECTIONS, choose_teacher, rule_reads, select_answers
from ..pool.answers import AnswerPool
from ..processes import Processes, join_processes, row_chunks
from ..students.publishing import export_student
from ..students.writing import WRITER_TRAININGS, Scored, Writer
from .checkpointing import GO_ON, explain_checkpoint, find_checkpoint, read_back, seal_checkpoint
from .config import fields_without
from .history import LevelHistory
from .inherited import check_amounts, default_of
from .plan import LevelPlan
from .publishing import describe_run, made_of, push
from .run import RUN_DIR
from .run_folder import RunFolder, Stage, versions

logger = logging.getLogger(__name__)
TOO_LONG = ("raise", "skip", "cut")


# ── how likely the student finds each answer ────────────────────────────────────────────────────────────────────────


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
    """
    _check_pool(pool, "score_answers")
    writer = student if isinstance(student, Writer) else Writer(student, tokenizer)
    if isinstance(student, str) and torch.cuda.is_available():
        writer.model.to("cuda")
    reader = _Reader(writer, pool, too_long, batch_size, join_processes(), disable_tqdm)
    return reader.score(pool.hierarchy.names if teachers is None else tuple(teachers), window)


class _Reader:
    """Read a pool's prompts and answers as the student's tokens, and ask it about them."""

    def __init__(
        self, writer: Writer, pool: AnswerPool, too_long: str, batch_size: int, processes: Processes, quiet: bool
    ) -> None:
        if too_long not in TOO_LONG:
            raise ValueError(f"`too_long` must be one of {list(TOO_LONG)}, got {too_long!r}. Choose one of them.")
        self.writer, self.pool, self.too_long = writer, pool, too_long
        self.batch_size, self.processes, self.quiet = batch_size, processes, quiet
        self._told: set[str] = set()

    def encode(self, names: Sequence[str]) -> Iterator[tuple[slice, list[list[int]], list[list[list[int] | None]]]]:
        """Tokens of prompts and of each teacher's answers, of some rows at a time; `None` for what is not read."""
        counts: dict[str, int] = {}
        for part in row_chunks(len(self.pool)):
            prompts = self.pool.prompts(part)
            before = self.writer.encode(prompts)
            counts["prompts"] = counts.get("prompts", 0) + sum(not ids for ids in before)
            answers = []
            for name in names:
                rows: list[list[int] | None] = [None] * len(prompts)
                texts = self.pool.texts(name, part)
                there = [row for row, text in enumerate(texts) if text is not None and before[row]]
                own = self.writer.encode_answers([prompts[row] for row in there], [texts[row] or "" for row in there])
                for row, ids in zip(there, own, strict=True):
                    rows[row] = fitting = self._fit(before[row], ids)
                    if fitting is None or len(fitting) < len(ids):
                        counts[name] = counts.get(name, 0) + 1
                        if self.too_long == "raise":
                            raise self._does_not_fit(name, part.start + row, len(before[row]) + len(ids))
                answers.append(rows)
            yield part, before, answers
        self._tell(counts)

    def _fit(self, prompt: list[int], answer: list[int]) -> list[int] | None:
        most = self.writer.max_length
        room = most - (0 if self.writer.is_seq2seq else len(prompt))
        if len(answer) <= room and len(prompt) <= most:
            return answer
        return answer[:room] if self.too_long == "cut" and room > 0 and len(prompt) <= most else None

    def _does_not_fit(self, name: str, row: int, length: int) -> ValueError:
        return ValueError(
            f"A prompt and its answer must fit into the {self.writer.max_length} tokens that the student reads, got "
            f"{length} of '{name}' for id {self.pool.ids[row].item()!r}. Shorten it, or set `too_long` to 'skip' or "
            "'cut'."
        )

    def _tell(self, counts: Mapping[str, int]) -> None:
        """Say once what is not read, or not whole."""
        for name, count in counts.items():
            if count and name not in self._told:
                self._told.add(name)
                what = "left out" if self.too_long == "skip" or name == "prompts" else "cut, or left out"
                why = "without a word" if name == "prompts" else f"of '{name}' too long for the student"
                kind = "prompts" if name == "prompts" else "answers"
                logger.warning(f"{count} of {len(self.pool)} {kind} {why}: {what}.")

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
        shape = len(self.pool), len(names)
        log_probs, num_tokens = np.full(shape, np.nan, dtype=np.float32), np.zeros(shape, dtype=np.int32)
        for part, prompts, answers in self.encode(names):
            # What follows each prompt, every text once, and who wants to know of it.
            following: dict[tuple[int, ...], dict[tuple[int, ...], int]] = {}
            wanted = []
            for column, rows in enumerate(answers):
                for row, ids in enumerate(rows):
                    if ids is None:
                        continue
                    log_probs[part.start + row, column], num_tokens[part.start + row, column] = 0, len(ids)
                    for before, piece in self._pieces(prompts[row], ids, window):
                        own = following.setdefault(before, {})
                        own.setdefault(piece, len(own))
                        wanted.append((part.start + row, column, before, piece))
            items: list[Scored] = [(list(before), [*map(list, own)]) for before, own in following.items()]
            sums = self.writer.score(items, self.batch_size, self.processes, self.quiet)
            starts = dict(zip(following, np.cumsum([0, *map(len, following.values())])))
            for row, column, before, piece in wanted:
                log_probs[row, column] += sums[starts[before] + following[before][piece]]
        return AnswerScores(tuple(names), log_probs, num_tokens)

    def _pieces(
        self, prompt: list[int], answer: list[int], window: int | None
    ) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """What is scored of an answer, and what is read before it."""
        size = window or len(answer)
        yield tuple(prompt), tuple(answer[:size])
        for start in range(size, len(answer), size):
            yield tuple(answer[start - size : start]), tuple(answer[start : start + size])

    def own_answers(self, max_new_tokens: int) -> list[str]:
        """What the student answers itself."""
        found = []
        for part in row_chunks(len(self.pool)):
            prompts = [
                ids if len(ids) < self.writer.max_length else [] for ids in self.writer.encode(self.pool.prompts(part))
            ]
            found += self.writer.write(prompts, max_new_tokens, self.batch_size, self.processes)
        return found

    def examples(self, assigned: np.ndarray, kept: np.ndarray) -> Dataset:
        """The tokens that the student learns from: of what it reads, only those of the answer count."""
        names, parts = self.pool.hierarchy.names, []
        used = sorted(set(assigned[kept].tolist()))
        for part, prompts, answers in self.encode([names[place] for place in used]):
            columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
            for row in np.flatnonzero(kept[part]):
                prompt, ids = prompts[row], answers[used.index(assigned[part][row])][row] or []
                columns["input_ids"].append(prompt if self.writer.is_seq2seq else prompt + ids)
                columns["labels"].append(ids if self.writer.is_seq2seq else [-100] * len(prompt) + ids)
            parts.append(Dataset.from_dict(columns))
        return concatenate_datasets([part for part in parts if len(part)])


# ── the algorithm ───────────────────────────────────────────────────────────────────────────────────────────────────

MakeTrainer = Callable[[Any, Dataset, TrainingArguments], Trainer]


@dataclass(frozen=True)
class _Options:
    """What decides whose answers a student learns from, and how."""

    rule: str
    rejection: str
    normalize: str | Normalizer
    window: int
    max_new_tokens: int
    too_long: str
    student_training: str

    def check(self) -> None:
        """Refuse what there is not."""
        rule_reads(self.rule)
        find_normalizer(self.normalize)
        known = {"rejection": REJECTIONS, "too_long": TOO_LONG, "student_training": WRITER_TRAININGS}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"`{name}` must be one of {list(values)}, got {getattr(self, name)!r}. Choose one.")
        for name in ("window", "max_new_tokens"):
            if not isinstance(value := getattr(self, name), int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}. Correct it.")

    def told(self) -> dict[str, Any]:
        """The same as JSON holds it; a function by its name."""
        return {**asdict(self), "normalize": getattr(self.normalize, "__name__", self.normalize)}


@dataclass
class CoSupervisedWriter:
    """A language model that was co-supervised, and whose answers it learnt from.

    Attributes:
        model (`PreTrainedModel` or `PeftModel`), tokenizer:
            The student after the last level.
        assigned, kept (`list[np.ndarray]`, each of shape `(num_examples,)`):
            Of each level, whose answer to each prompt was chosen, as a position in `pool.hierarchy.names` (-1 where
            nobody has one), and whether it was trained on.
        history ([`LevelHistory`]):
            Records of all levels.
    """

    model: Any
    tokenizer: Any
    assigned: list[np.ndarray]
    kept: list[np.ndarray]
    history: LevelHistory
    output_dir: str
    _facts: dict[str, Any] = field(repr=False, default_factory=dict)
    _processes: Processes = field(repr=False, default_factory=lambda: Processes(0, 1))

    def save_model(self, folder: str | None = None, **facts: Any) -> None:
        """Write an ordinary model, adapters merged, with its tokenizer and a card, to `output_dir` or elsewhere.

        What else is known, such as a `report` or a `license`, goes to the card, see [`model_card`].
        """
        self._facts |= facts
        self._processes.on_first(partial(self._save, folder or self.output_dir))

    def _save(self, folder: str, name: str | None = None) -> None:
        with explain_full_disk(Path(folder), "Free some space and save it again: the trained levels are kept."):
            export_student(self.model, folder, self.tokenizer)
        own = {"name": (name or Path(folder).absolute().name).split("/")[-1], "hub_model_id": name}
        write_card(model_card(self._facts | own), folder)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None, revision: str | None = None
    ) -> CommitInfo | None:
        """Write the model to `output_dir` and publish it with its card and history in one commit."""
        name = self._processes.on_first(partial(open_repo, repo_id, what="The student", private=private, token=token))
        self.save_model()
        card = partial(self._save, self.output_dir, name)
        options: dict[str, Any] = {"revision": revision, "token": token}
        return push(self.output_dir, name, self.history, card, self._processes, **options)  # type: ignore[return-value]


def co_supervise_answers(
    student: Any,
    pool: AnswerPool,
    args: TrainingArguments,
    *,
    tokenizer: Any = None,
    rule: str = "log_likelihood+confidence",
    rejection: str = "none",
    normalize: str | Normalizer = "exact",
    window: int = 32,
    max_new_tokens: int = 64,
    too_long: str = "raise",
    student_training: str = "full",
    peft_config: LoraConfig | None = None,
    make_trainer: MakeTrainer | None = None,
    student_revision: str | None = None,
    resume_from_checkpoint: bool = False,
) -> CoSupervisedWriter:
    """Train a language model on the answers of many teachers, and find out by itself whose answer to trust where.

    A root alone speaks for all prompts. At every further level the student so far scores the level's answers and
    chooses one for each prompt, and a fresh student, as it was pre-trained, learns what was chosen. Of several roots,
    the student as it was pre-trained chooses.

    Args:
        student (`PreTrainedModel`, `PeftModel` or `str`):
            The model, causal or from sequence to sequence, its Hub id or its folder. It is trained in place.
        pool ([`AnswerPool`]):
            Prompts, or messages for the student's own chat template, and teachers' answers.
        args (`TrainingArguments`):
            Of each level. `num_train_epochs` is divided by a level's keep rate, so that the number of steps stays
            about the same. Finished levels are kept below `output_dir`, and the checkpoints of one that is not.
        tokenizer (*optional*):
            That of a model object; of an id or a folder, its own.
        rule (`str`, *optional*, defaults to `"log_likelihood+confidence"`):
            One of `hf_cosupervise.method.routing.RULES`.
        rejection (`str`, *optional*, defaults to `"none"`):
            Below the root, `"loss_rank"` or `"same_answer"`, see [`select_answers`].
        normalize (`str` or `Callable`, *optional*, defaults to `"exact"`):
            When two answers are the same: `"exact"`, `"number"`, `"boxed"`, or a function.
        window (`int`, *optional*, defaults to 32):
            Of rule `"local"`, the tokens that are scored at a time.
        max_new_tokens (`int`, *optional*, defaults to 64):
            Of the student's own answers, where a rule or a rejection compares with them.
        too_long (`str`, *optional*, defaults to `"raise"`):
            See [`score_answers`].
        student_training (`str`, *optional*, defaults to `"full"`):
            `"full"` or `"lora"`, by `peft_config` or adapters on all linear layers.
        make_trainer (`Callable`, *optional*):
            Gives a trainer of a model, a data set as `pool.to_sft` makes it and arguments: any subclass of
            `transformers.Trainer`, such as one of TRL's. By default a plain `Trainer` that learns the answers alone.
        student_revision (`str`, *optional*):
            Branch, tag or commit of a student on the Hub.
        resume_from_checkpoint (`bool`, *optional*, defaults to `False`):
            Go on where an earlier run in this `output_dir` was cut off, or begin where there is none.

    Returns:
        [`CoSupervisedWriter`]: the student, and of each level, who was chosen.

    Raises:
        FileExistsError: If `output_dir` holds another run, or another process works there.
        TypeError: If `pool` is no [`AnswerPool`], `args` no `TrainingArguments`, or the student no language model.
        ValueError: If an option does not exist, nobody answers anything, an answer is too long, or the run that is
            gone on with was begun otherwise.

    Source:
        arXiv 2402.15505; answers in place of labels are ours.
    """
    _check_pool(pool, "co_supervise_answers")
    if not isinstance(args, TrainingArguments):
        raise TypeError(f"`args` must be `TrainingArguments`, got {type(args).__name__}. Make some first.")
    check_amounts(args)
    options = _Options(rule, rejection, normalize, window, max_new_tokens, too_long, student_training)
    options.check()
    if own := [teacher.name for teacher in pool.hierarchy.teachers if str(student) == teacher.model]:
        logger.warning(f"The student is the teacher {own[0]!r} too, whose answers it will find likely.")
    writer = Writer(student, tokenizer, revision=student_revision)
    writer.prepare(student_training, peft_config, args.seed)
    return _Levels(writer, pool, args, options, make_trainer).go(resume_from_checkpoint)


class _Levels:
    """Go down the levels of a hierarchy of teachers that write."""

    def __init__(
        self,
        writer: Writer,
        pool: AnswerPool,
        args: TrainingArguments,
        options: _Options,
        make_trainer: MakeTrainer | None,
    ) -> None:
        self.writer, self.pool, self.args, self.options, self.make_trainer = writer, pool, args, options, make_trainer
        self.processes = Processes(args.process_index, args.world_size, args.device)
        quiet = bool(args.disable_tqdm) or args.process_index > 0
        size = args.per_device_eval_batch_size
        self.reader = _Reader(writer, pool, options.too_long, size, self.processes, quiet)
        self.folder = RunFolder(Path(args.output_dir) / RUN_DIR)
        run = describe_run(writer.origin, pool, args.world_size)
        self.history = LevelHistory(self.folder.path / "history.json", run)

    def go(self, resume: bool) -> CoSupervisedWriter:
        """Train all levels that are not finished."""
        plans: list[LevelPlan] = []
        with self._only_one():
            self._open(resume)
            self.writer.model.to(self.args.device)
            self.writer.put_back()
            for level in range(self.pool.hierarchy.num_levels):
                folder = self.folder.stage_dir(level, 0, is_last=True)
                stage = self.folder.load_stage(folder) if resume and len(plans) == level else None
                if stage is not None:
                    self._forget_checkpoints(folder)
                    self.writer.put_back(stage.student)
                    self.history.records.append(stage.record)
                    plans.append(stage.plan)
                    continue
                plan = self.plan(level, plans[-1].assigned_teacher if plans else None)
                record = self.train(plan, folder, resume)
                resume = False  # only one level can have been cut off, and what comes after it was made of another
                plans.append(plan)
                self.history.add(record, write=False)
                self.processes.on_first(partial(self._keep, folder, plan, record))
        assigned, kept = [plan.assigned_teacher for plan in plans], [plan.keep_mask for plan in plans]
        facts = self._card_facts()
        found = self.writer.model, self.writer.tokenizer, assigned, kept, self.history, str(self.args.output_dir)
        return CoSupervisedWriter(*found, facts, self.processes)

    # --- the run -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _only_one(self) -> Iterator[None]:
        with ExitStack() as stack:
            self.processes.on_first(lambda: None if stack.enter_context(self.folder.lock()) else None)
            yield

    def _open(self, resume: bool) -> None:
        facts = self._facts()

        def open_folder() -> None:
            is_there = self.history.path.is_file() or any(self.folder.path.glob("level-*"))
            if is_there and not resume:
                raise FileExistsError(
                    f"`output_dir` must not hold another run, got one in '{self.folder.path}'. Choose another folder, "
                    "delete that one, or go on with `resume_from_checkpoint=True`."
                )
            if resume:
                self.folder.check(facts)
            if not is_there:
                with explain_full_disk(self.folder.path, GO_ON):
                    self.folder.begin(facts)

        self.processes.on_first(open_folder)

    def _facts(self) -> dict[str, Any]:
        """What must be the same for a run to be gone on with."""
        args = self.args
        return {
            "arguments": {"seed": args.seed, **_changed(args, "resume"), **self.options.told()},
            "functions": {} if self.make_trainer is None else {"make_trainer": "given"},
            "pool": _pool_digest(self.pool),
            "student": self.writer.digest(),
            "num_processes": args.world_size,
            "examples_per_step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "versions": versions(),
        }

    def _keep(self, folder: Path, plan: LevelPlan, record: dict[str, Any]) -> None:
        with explain_full_disk(self.folder.path, GO_ON):
            self.folder.save_stage(folder, Stage(plan, self.writer.tensors(), [], record, {}))
            write_text(self.history.path, self.history.to_json())
        self._forget_checkpoints(folder)

    def _forget_checkpoints(self, folder: Path) -> None:
        if self.processes.rank == 0:  # of a level that is kept, they only take room
            self.folder.forget(folder.glob("checkpoint-*"))

    def _card_facts(self) -> dict[str, Any]:
        levels = [
            {
                "level": record["level"],
                "assignment": record["rule"],
                "keep_rate": record["consistency/keep_rate"],
                "num_kept": record["consistency/num_kept"],
                "teachers": {name: record.get(f"assignment/{name}") for name in self.pool.hierarchy.names},
            }
            for record in self.history.records
        ]
        return made_of(self.history.run, self.pool) | {
            "labels": [],
            "modality": None if self.writer.is_seq2seq else "language",
            "is_language": True,
            "library_name": "transformers",
            "has_adapter": self.options.student_training == "lora",
            "student_training": self.options.student_training,
            "levels": levels,
            "hyperparameters": _changed(self.args, "publish") | self.options.told(),
        }

    # --- one level ---------------------------------------------------------------------------------------------------

    def plan(self, level: int, previous: np.ndarray | None) -> LevelPlan:
        """Choose whose answer to take, and which to leave out."""
        hierarchy, options = self.pool.hierarchy, self.options
        places = [place for place, teacher in enumerate(hierarchy.teachers) if teacher.level == level]
        names, own = [hierarchy.names[place] for place in places], None
        above = np.full(len(self.pool), NOBODY) if previous is None else previous
        rule, rejection = (options.rule, options.rejection) if level else (options.rule, "none")
        if level == 0 and len(names) == 1:
            rule = "the root"
            answered = torch.from_numpy(self.reader.answered(names))
            chosen = torch.where(answered[:, 0], 0, NOBODY)
        else:
            reads = rule_reads(rule)
            if "same" in reads or rejection != "none":
                own = self.reader.own_answers(options.max_new_tokens)
            scores = self.reader.score(names, options.window if reads == ("local",) else None)
            answered = torch.from_numpy(~np.isnan(scores.log_probs))
            chosen = choose_teacher(rule, self._known(names, scores, own, answered), answered)
        position = torch.where(chosen == NOBODY, NOBODY, torch.tensor(places)[chosen.clamp(min=0)])
        assigned = fall_back(position, torch.from_numpy(above.astype(np.int64)))
        if not (has_answer := assigned >= 0).any():
            raise ValueError(
                f"No teacher up to level {level} has an answer that the student can read to any of the "
                f"{len(self.pool)} prompts. Check their answers."
            )
        kept = self._select(rejection, assigned, has_answer, own)
        plan = LevelPlan(level, 0, assigned.numpy().astype(np.int32), has_answer.int().numpy() - 1, kept.numpy(), {})
        shares = {f"assignment/{name}": float((assigned == at).sum()) for at, name in enumerate(hierarchy.names)}
        shares = {name: count / int(has_answer.sum()) for name, count in shares.items() if count}
        plan.metrics |= {"rule": rule, **shares, "consistency/keep_rate": plan.keep_rate}  # type: ignore[dict-item]
        plan.metrics["consistency/num_kept"] = float(plan.keep_mask.sum())
        return plan

    def _known(
        self, names: Sequence[str], scores: AnswerScores, own: Sequence[str] | None, answered: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """What a rule may want to know of answers."""
        per_token = torch.from_numpy(scores.per_token)
        known = {"student": per_token, "local": per_token}
        places = [self.pool.hierarchy.index(name) for name in names]
        known["teacher"] = torch.from_numpy(self.pool.confidences[:, places])
        if "teacher" in rule_reads(self.options.rule):
            unknown = int((known["teacher"].isnan() & answered).any(dim=1).sum())
            if unknown:
                logger.warning(
                    f"{unknown} of {len(self.pool)} prompts have an answer of which it is not known how likely its "
                    "teacher finds it: they are routed by the student's log-likelihood alone."
                )
        if own is not None:
            known["same"] = torch.from_numpy(np.stack([self._same(self.pool.texts(name), own) for name in names], 1))
        return known

    def _same(self, texts: Sequence[str | None], own: Sequence[str]) -> np.ndarray:
        normalize = find_normalizer(self.options.normalize)
        mine = [normalize(answer) for answer in own]
        theirs = [None if text is None else normalize(text) for text in texts]
        return np.array([a is not None and a == b for a, b in zip(theirs, mine, strict=True)], dtype=bool)

    def _select(
        self, rejection: str, assigned: torch.Tensor, has_answer: torch.Tensor, own: Sequence[str] | None
    ) -> torch.Tensor:
        losses, same = torch.zeros(len(self.pool)), None
        if own is not None and rejection != "none":
            names, at = self.pool.hierarchy.names, assigned.clamp(min=0).numpy()
            used = sorted(set(at.tolist()))
            rows, column = np.arange(len(self.pool)), np.searchsorted(used, at)
            found = np.stack([self._same(self.pool.texts(names[place]), own) for place in used], axis=1)
            same = torch.from_numpy(found[rows, column])
            if rejection == "loss_rank":
                scores = self.reader.score([names[place] for place in used])
                losses = -torch.from_numpy(scores.per_token[rows, column])
        return select_answers(rejection, losses, same, has_answer)

    def train(self, plan: LevelPlan, folder: Path, resume: bool) -> dict[str, Any]:
        """Train a fresh student on what was chosen."""
        checkpoint = find_checkpoint(folder, plan.level, self.processes) if resume else None
        if checkpoint is None:
            self.processes.on_first(lambda: self.folder.forget([folder]))
        self.writer.put_back()
        args = copy.copy(self.args)
        args.output_dir, args.push_to_hub = str(folder), False
        args.num_train_epochs = args.num_train_epochs / plan.keep_rate
        # Without a seed of its own the shuffle order would hang on whatever used torch's global generator before.
        args.data_seed = args.seed if args.data_seed is None else args.data_seed
        if self.make_trainer is None:
            dataset = self.reader.examples(plan.assigned_teacher, plan.keep_mask)
            collator = DataCollatorForSeq2Seq(self.writer.tokenizer)
            settings = {"processing_class": self.writer.tokenizer, "data_collator": collator}
            trainer = Trainer(self.writer.model, args, train_dataset=dataset, **settings)
        else:
            dataset = self.pool.to_sft(assigned=plan.assigned_teacher, kept=plan.keep_mask)
            trainer = self.make_trainer(self.writer.model, dataset, args)
        trainer.add_callback(_Checkpoints(self.writer, self.processes, checkpoint))
        path = None if checkpoint is None else str(checkpoint)
        with explain_checkpoint(path):
            output = trainer.train(resume_from_checkpoint=path)
        # Half precision leaves its mark on `forward`, and the next question is asked without it.
        self.writer.model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        losses = self.processes.gather(torch.tensor(output.training_loss))  # each has seen examples of its own
        numbers = {"num_steps": output.global_step, "train_loss": float(losses.mean())}
        numbers["train_runtime"] = output.metrics.get("train_runtime")
        return {"level": plan.level, "round": plan.round, **plan.metrics, **numbers}


class _Checkpoints(TrainerCallback):
    """Seal checkpoints when they are whole, and see that one is read back without losing a weight."""

    def __init__(self, writer: Writer, processes: Processes, checkpoint: Path | None) -> None:
        self.writer, self.processes, self.checkpoint = writer, processes, checkpoint

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Load by `from_pretrained`: the Trainer passes over names that it does not find, with a line in the log."""
        if self.checkpoint is not None and (self.checkpoint / "config.json").is_file():
            read_back(self.writer.model, self.checkpoint, lambda: None, is_sharded=False)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the digests of what was saved."""
        self.processes.wait()  # each writes its own random state
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if self.processes.rank == 0 and folder.is_dir():
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that nobody reads, with the user's token
            seal_checkpoint(folder, {"num_processes": self.processes.count})


# ── what is given ───────────────────────────────────────────────────────────────────────────────────────────────────


def _check_pool(pool: Any, function: str) -> None:
    if not isinstance(pool, AnswerPool):
        raise TypeError(
            f"`{function}` needs an `AnswerPool` of answers in words, got {type(pool).__name__}. Ask the teachers by "
            "`build_answers`, or give a pool of labels to `CoSupervisedTrainer`."
        )


def _changed(args: TrainingArguments, purpose: str) -> dict[str, Any]:
    """Arguments that are not what they are by default, and count for a purpose."""
    plain = (bool, int, float, str, list, dict, type(None))
    values = {
        item.name: getattr(args, item.name)
        for item in fields(args)
        if item.init and item.name not in fields_without(purpose) and getattr(args, item.name) != default_of(item)
    }
    return {name: value if isinstance(value, plain) else str(value) for name, value in values.items()}


def _pool_digest(pool: AnswerPool) -> str:
    """Hash what is learnt from: ids, prompts, teachers and all that they wrote."""
    teachers = [(teacher.name, teacher.level) for teacher in pool.hierarchy.teachers]
    digest = hashlib.blake2b(json.dumps(teachers).encode(), digest_size=8)
    for part in row_chunks(len(pool)):
        rows = [pool.ids[part].tolist(), pool.prompts(part)]
        for name in pool.hierarchy.names:
            rows += [pool.texts(name, part), pool.log_probs(name, part).tolist(), pool.num_tokens(name, part).tolist()]
        digest.update(json.dumps(rows).encode())
    return digest.hexdigest()

"""Co-supervision of a student that writes: whose answer to each prompt it learns from, level by level."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from huggingface_hub import CommitInfo
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from ..hierarchy import Teacher
from ..hub.cards import model_card, write_card
from ..hub.client import open_repo
from ..method.answers import Normalizer, find_normalizer, group_answers
from ..method.assignment import NOBODY, fall_back
from ..method.routing import REJECTIONS, RULES, choose_teacher, rule_reads, select_answers
from ..pool.answers import AnswerPool
from ..pool.base import check_kind
from ..processes import Processes, row_chunks
from ..students.answers import TOO_LONG, AnswerReader, check_answer_pool
from ..students.writing import WRITER_TRAININGS, Writer
from .checkpointing import explain_checkpoint, read_back, seal_checkpoint
from .config import CoSupervisedConfig, fields_without
from .history import LevelHistory
from .inherited import check_amounts, default_of
from .plan import LevelPlan
from .publishing import describe_run, export, made_of, push
from .run import RUN_DIR, OneRound, TrainingRun, settings_of

logger = logging.getLogger(__name__)
MakeTrainer = Callable[[Any, Dataset, TrainingArguments], Trainer]


def _check_options(options: Mapping[str, Any]) -> None:
    """Refuse what there is not."""
    rule_reads(options["rule"])
    find_normalizer(options["normalize"])
    choices = {"rejection": REJECTIONS, "too_long": TOO_LONG, "student_training": WRITER_TRAININGS}
    for name, values in choices.items():
        if options[name] not in values:
            raise ValueError(f"`{name}` must be one of {list(values)}, got {options[name]!r}. Choose one.")
    for name in ("window", "max_new_tokens"):
        if type(options[name]) is not int or options[name] < 1:
            raise ValueError(f"`{name}` must be an integer of at least 1, got {options[name]!r}. Correct it.")


def _check_arguments(args: Any, make_trainer: Any) -> None:
    """Refuse arguments that would be passed over, or stop the first level."""
    # A configuration for labels has a method, an assignment and more of its own, of which nobody would hear here.
    if not isinstance(args, TrainingArguments) or isinstance(args, CoSupervisedConfig):
        raise TypeError(
            f"`args` must be `TrainingArguments`, or those of a trainer of TRL, got {type(args).__name__}. Make some "
            "first."
        )
    check_amounts(args)
    if make_trainer is not None and (isinstance(make_trainer, type) or not callable(make_trainer)):
        raise TypeError(
            f"`make_trainer` must be a function of a model, a data set and arguments, got {make_trainer!r}. Write "
            "`lambda model, dataset, args: SFTTrainer(model, args=args, train_dataset=dataset)`."
        )
    if args.eval_strategy != "no" and make_trainer is None:
        raise ValueError(
            f"`eval_strategy` must be 'no', got '{args.eval_strategy.value}': there are no data to evaluate a level "
            "on. Leave it out, or give them to a trainer of your own by `make_trainer`."
        )
    if args.push_to_hub:
        raise ValueError(
            "`push_to_hub` must be False, got True: no level is published. Call `push_to_hub` of what is returned."
        )


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
    _facts: dict[str, Any]
    _processes: Processes

    def __repr__(self) -> str:
        return f"CoSupervisedWriter({type(self.model).__name__}, {len(self.assigned)} levels, in '{self.output_dir}')"

    def save_model(self, folder: str | None = None, **facts: Any) -> None:
        """Write an ordinary model, adapters merged, with its tokenizer and a card, to `output_dir` or elsewhere.

        What else is known, such as a `report` or a `license`, goes to the card, see [`model_card`].
        """
        self._facts |= facts
        folder = folder or self.output_dir
        export(self.model, folder, self.tokenizer, self._processes)
        self._processes.on_first(partial(self._write_card, folder))

    def _write_card(self, folder: str, name: str | None = None) -> None:
        own = {"name": (name or Path(folder).absolute().name).split("/")[-1], "hub_model_id": name}
        write_card(model_card(self._facts | own), folder)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None, revision: str | None = None
    ) -> CommitInfo | None:
        """Write the model to `output_dir` and publish it with its card and history in one commit."""
        name = self._processes.on_first(partial(open_repo, repo_id, what="The student", private=private, token=token))
        self.save_model()
        card = partial(self._write_card, self.output_dir, name)
        options: dict[str, Any] = {"revision": revision, "token": token}
        return push(self.output_dir, name, self.history, card, self._processes, **options)  # type: ignore[return-value]


def co_supervise_answers(
    student: Any,
    pool: AnswerPool,
    args: TrainingArguments,
    *,
    tokenizer: Any = None,
    rule: str = "router",
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
        student, pool, tokenizer:
            As in [`score_answers`]. A model object is trained in place.
        args (`TrainingArguments`):
            Of each level. `num_train_epochs` is divided by a level's keep rate, so that the number of steps stays
            about the same. Finished levels are kept below `output_dir`, and the checkpoints of one that is not.
        rule (`str`, *optional*, defaults to `"router"`):
            One of `hf_cosupervise.method.routing.RULES`.
        rejection (`str`, *optional*, defaults to `"none"`):
            Below the root, `"loss_rank"` or `"same_answer"`, see [`select_answers`].
        normalize (`str` or `Callable`, *optional*, defaults to `"exact"`):
            When two answers are the same, see [`AnswerPool.assign`].
        window (`int`, *optional*, defaults to 32):
            Of rule `"local"`, see [`score_answers`].
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
        FloatingPointError: If the student's weights are no longer numbers.
        TypeError: If `pool` is no [`AnswerPool`], `args` no `TrainingArguments`, or the student no language model.
        ValueError: If an option does not exist, nobody answers anything, an answer is too long, or the run that is
            gone on with was begun otherwise.

    Source:
        arXiv 2402.15505; answers in place of labels are ours.
    """
    check_answer_pool(pool, "co_supervise_answers")
    _check_arguments(args, make_trainer)
    if peft_config is not None and student_training != "lora":
        raise ValueError(
            f"`peft_config` is for `student_training='lora'`, got {student_training!r}. Give both, or neither."
        )
    options = {"rule": rule, "rejection": rejection, "normalize": normalize, "window": window, "too_long": too_long}
    options |= {"max_new_tokens": max_new_tokens, "student_training": student_training}
    _check_options(options)
    check_kind(peft_config, PeftConfig, "peft_config", optional=True)
    place = _place(student)
    if own := [one.name for one in pool.hierarchy.teachers if one.has_files and _place_of(one) == place]:
        logger.warning(f"The student is the teacher {own[0]!r} too, whose answers it will find likely.")
    writer = Writer(student, tokenizer, revision=student_revision)
    if writer.is_seq2seq and "local" in rule_reads(rule):
        raise ValueError(
            f"`rule` {rule!r} needs a causal student, which reads an answer behind any words, got "
            f"{type(writer.plain).__name__}. Choose another rule."
        )
    writer.prepare(student_training, peft_config, args.seed)
    return _Levels(writer, pool, args, options, make_trainer).go(resume_from_checkpoint)


def _place(model: Any) -> str:
    """Where a model is or was loaded from, spelt in one way."""
    if not isinstance(model, str | os.PathLike):
        plain = model.get_base_model() if isinstance(model, PeftModel) else model
        model = getattr(getattr(plain, "config", None), "_name_or_path", "")
    return os.path.realpath(model) if os.path.isdir(model) else str(model)


def _place_of(teacher: Teacher) -> str:
    """Do as [`_place`], of a teacher's model."""
    return _place(os.path.join(str(teacher.model), teacher.subfolder or "").rstrip("/"))


class _Levels:
    """Go down the levels of a hierarchy of teachers that write."""

    def __init__(
        self,
        writer: Writer,
        pool: AnswerPool,
        args: TrainingArguments,
        options: dict[str, Any],
        make_trainer: MakeTrainer | None,
    ) -> None:
        self.writer, self.pool, self.args, self.options, self.make_trainer = writer, pool, args, options, make_trainer
        # As JSON holds them; a function by its name.
        self._told = {**options, "normalize": getattr(options["normalize"], "__name__", options["normalize"])}
        self.processes = Processes(args.process_index, args.world_size, args.device)
        quiet = bool(args.disable_tqdm) or args.process_index > 0
        size = args.per_device_eval_batch_size
        self.reader = AnswerReader(writer, pool, options["too_long"], size, self.processes, quiet)
        path, facts = Path(args.output_dir) / RUN_DIR, describe_run(writer.origin, pool, args.world_size)
        self.run = TrainingRun(path, OneRound(), pool.hierarchy.num_levels, facts, self.processes)

    def go(self, resume: bool) -> CoSupervisedWriter:
        """Train all levels that are not finished."""
        with self.run.open(self._settings, resume) as last:
            self.writer.model.to(self.args.device)
            # The last student that is finished chooses for the level that is next.
            self.writer.put_back(None if last is None else last.student)
            self.processes.on_first(self._forget_checkpoints)  # a kill may have come between a level and this
            # Now, and not when levels above have been trained.
            if self.options["too_long"] == "raise":
                self.reader.answered(self.pool.hierarchy.names)
            if {"groups", "same"} & {*rule_reads(self.options["rule"])} or self.options["rejection"] != "none":
                _ = self._groups  # refuses what `normalize` gives
            for level, _ in self.run.unfinished():
                plan = self.plan(level)
                self.train(plan)
                self.run.save(plan, self.writer.tensors(), [])
                self.processes.on_first(self._forget_checkpoints)
        chosen = [plan.assigned_teacher for plan in self.run.plans], [plan.keep_mask for plan in self.run.plans]
        folder, story = str(self.args.output_dir), (self._card_facts(), self.processes)
        return CoSupervisedWriter(self.writer.model, self.writer.tokenizer, *chosen, self.run.history, folder, *story)

    def _forget_checkpoints(self) -> None:
        for plan in self.run.plans:  # of a level that is kept, they only take room
            self.run.folder.forget(self.run.stage_dir(plan.level, plan.round).glob("checkpoint-*"))

    def _settings(self) -> dict[str, Any]:
        """What must be the same for a run to be gone on with."""
        # A lambda has no name that would tell it from another one.
        functions = {} if self.make_trainer is None else {"make_trainer": "given"}
        arguments = _changed(self.args, "resume") | self._told
        return settings_of(self.args, arguments, _pool_digest(self.pool), self.writer.digest(), functions)

    def _card_facts(self) -> dict[str, Any]:
        history, training = self.run.history, self.options["student_training"]
        names, defaults = self.pool.hierarchy.names, inspect.signature(co_supervise_answers).parameters
        levels = [
            {
                "level": record["level"],
                "assignment": record["rule"],
                **{name: record[f"consistency/{name}"] for name in ("keep_rate", "num_kept")},
                "teachers": {name: record.get(f"assignment/{name}") for name in names},
            }
            for record in history.records
        ]
        changed = {name: value for name, value in self._told.items() if value != defaults[name].default}
        return made_of(history.run, self.pool) | {
            "modality": None if self.writer.is_seq2seq else "language",
            "is_language": True,
            "has_adapter": training == "lora",
            "student_training": training,
            "rejects": self.options["rejection"] != "none",
            "levels": levels,
            "hyperparameters": _changed(self.args, "publish") | changed,
        }

    # --- one level ---------------------------------------------------------------------------------------------------

    def plan(self, level: int) -> LevelPlan:
        """Choose whose answer to take, and which to leave out."""
        hierarchy, rows = self.pool.hierarchy, np.arange(len(self.pool))
        places = [place for place, teacher in enumerate(hierarchy.teachers) if teacher.level == level]
        above = self.run.plans[-1].assigned_teacher if level else np.full(len(self.pool), NOBODY)
        # Before any training the student knows nothing of the task that could tell a wrong answer.
        rejection = self.options["rejection"] if level else "none"
        rule = "the root" if level == 0 and len(places) == 1 else self.options["rule"]
        asks = rejection != "none" or rule in RULES and "same" in rule_reads(rule)
        same = self._same() if asks else None
        chosen = torch.tensor([*places, NOBODY])[self._choose(rule, places, same)]  # at -1, nobody
        assigned = fall_back(chosen, torch.from_numpy(above.astype(np.int64)))
        if not (has_answer := assigned >= 0).any():
            raise ValueError(
                f"No teacher up to level {level} has an answer that the student can read to any of the "
                f"{len(self.pool)} prompts. Check their answers."
            )
        at, losses = assigned.clamp(min=0).numpy(), torch.zeros(len(self.pool))
        if rejection == "loss_rank":
            used = np.unique(at)
            scores = self.reader.score([hierarchy.names[place] for place in used])
            losses = -torch.from_numpy(scores.per_token[rows, np.searchsorted(used, at)])
        kept = select_answers(rejection, losses, None if same is None else same[rows, at], has_answer)
        # -1 as the label of what nobody answered, as a plan of labels has it.
        plan = LevelPlan(level, 0, assigned.numpy().astype(np.int32), has_answer.int().numpy() - 1, kept.numpy(), {})
        plan.metrics["rule"] = rule  # type: ignore[assignment]
        shares = torch.bincount(assigned[has_answer]).double() / has_answer.sum()
        for place in shares.nonzero().flatten().tolist():
            plan.metrics[f"assignment/{hierarchy.names[place]}"] = float(shares[place])
        plan.metrics |= {"consistency/keep_rate": plan.keep_rate, "consistency/num_kept": float(kept.sum())}
        return plan

    def _choose(self, rule: str, places: list[int], same: torch.Tensor | None) -> torch.Tensor:
        """Which teacher of a level speaks for each prompt, as a position in `places`, -1 for none."""
        names = [self.pool.hierarchy.names[place] for place in places]
        if rule not in RULES:
            return torch.from_numpy(self.reader.answered(names)[:, 0].astype(np.int64) - 1)
        reads = rule_reads(rule)
        windows = {"student": None, "local": self.options["window"]}
        asked = {name: self.reader.score(names, window) for name, window in windows.items() if name in reads}
        known = {name: torch.from_numpy(scores.per_token) for name, scores in asked.items()}
        some = next(iter(asked.values()), None)
        answered = torch.from_numpy(self.reader.answered(names) if some is None else ~np.isnan(some.log_probs))
        known["teacher"] = torch.from_numpy(self.pool.confidences[:, places])
        if same is not None:
            known["same"] = same[:, places]
        if "groups" in reads:
            known["groups"] = self._groups[:, places]
        if "prompts" in reads:
            known["prompts"] = torch.from_numpy(self.reader.represent())
        unknown = int((known["teacher"].isnan() & answered).any(dim=1).sum())
        if unknown and "teacher" in reads:
            logger.warning(
                f"{unknown} of {len(self.pool)} prompts have an answer of which it is not known how likely its "
                "teacher finds it: that counts for no answer to these prompts."
            )
        return choose_teacher(rule, known, answered)

    @cached_property
    def _groups(self) -> torch.Tensor:
        """Which teachers say the same, of all levels."""
        return torch.from_numpy(group_answers(self.pool.answer_rows(), self.options["normalize"]))

    def _same(self) -> torch.Tensor:
        """Which teachers say what the student says itself, bool `(num_examples, num_teachers)`."""
        own = [[answer] for answer in self.reader.own_answers(self.options["max_new_tokens"])]
        said, mine = self.pool.group_with(own, self.options["normalize"])
        return torch.from_numpy((said == mine) & (mine >= 0))

    def train(self, plan: LevelPlan) -> None:
        """Train a fresh student on what was chosen."""
        checkpoint = self.run.begin_stage(plan, can_resume=True)
        self.writer.put_back()
        args = copy.copy(self.args)
        # A level is published by nobody: the whole is, in the end.
        args.output_dir, args.push_to_hub = str(self.run.stage_dir(plan.level, plan.round)), False
        args.num_train_epochs = args.num_train_epochs / plan.keep_rate  # as many steps on fewer examples
        # Without a seed of its own the shuffle order would hang on whatever used torch's global generator before.
        args.data_seed = args.seed if args.data_seed is None else args.data_seed
        if self.make_trainer is None:
            dataset, tokenizer = self.reader.examples(plan.assigned_teacher, plan.keep_mask), self.writer.tokenizer
            # The one that pads labels too, for causal models as well.
            collator = DataCollatorForSeq2Seq(tokenizer)
            trainer = Trainer(self.writer.model, args, collator, dataset, processing_class=tokenizer)
        else:
            dataset = self.pool.to_sft(assigned=plan.assigned_teacher, kept=plan.keep_mask)
            trainer = self.make_trainer(self.writer.model, dataset, args)
            self._check_trainer(trainer)
        forward = vars(self.writer.model).get("forward")
        trainer.add_callback(_Checkpoints(self.writer, self.processes, checkpoint))
        with explain_checkpoint(checkpoint):
            output = trainer.train(resume_from_checkpoint=checkpoint)
        self.writer.model = trainer.accelerator.unwrap_model(trainer.model)
        # Questions are asked without half precision; and the accelerator of the next level would take a model with
        # this mark for its own, and leave half precision out.
        for name in ("_is_accelerate_prepared", "_original_forward", "forward"):
            vars(self.writer.model).pop(name, None)
        if forward is not None:
            self.writer.model.forward = forward
        self._check_weights(plan.level)
        losses = self.processes.gather(torch.tensor(output.training_loss))  # each has seen examples of its own
        self.run.record(plan, output._replace(training_loss=float(losses.mean())), trainer.state)

    def _check_weights(self, level: int) -> None:
        """Refuse a student of NaN, to which no answer is likely: a level of it must not count as finished."""
        if not all(bool(value.isfinite().all()) for value in self.writer.tensors().values()):
            raise FloatingPointError(
                f"The student's weights must be numbers, got NaN or infinity by the end of level {level}. Lower "
                "`learning_rate`, or set `max_grad_norm`, and begin in another folder; what was finished before stays "
                f"in '{self.run.path}'."
            )

    def _check_trainer(self, trainer: Any) -> None:
        """See that what `make_trainer` gives trains the student, as it is."""
        if not isinstance(trainer, Trainer):
            raise TypeError(
                f"`make_trainer` must give a `transformers.Trainer`, got {type(trainer).__name__}. Return it, "
                "not yet trained."
            )
        # One that puts adapters on, or wraps it, would train weights that no level is kept or exported of.
        given, own = (set(dict(model.named_parameters())) for model in (self.writer.model, trainer.model))
        if given - own:
            raise ValueError(
                f"`make_trainer` must train the student as it is, got one without {len(given - own)} of its weights, "
                f"such as '{min(given - own)}'. For adapters, use `student_training='lora'` and `peft_config` here."
            )


class _Checkpoints(TrainerCallback):
    """Seal checkpoints when they are whole, and see that one is read back without losing a weight."""

    def __init__(self, writer: Writer, processes: Processes, checkpoint: str | None) -> None:
        self.writer, self.processes, self.checkpoint = writer, processes, checkpoint

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Load by `from_pretrained`: the Trainer passes over names that it does not find, with a line in the log."""
        if self.checkpoint is not None and Path(self.checkpoint, "config.json").is_file():
            read_back(self.writer.model, self.checkpoint, lambda: None, is_sharded=False)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the digests of what was saved."""
        self.processes.wait()  # each writes its own random state
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if self.processes.rank == 0 and folder.is_dir():
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that nobody reads, with the user's token
            seal_checkpoint(folder, {"num_processes": self.processes.count})


# ── what makes a run what it is ─────────────────────────────────────────────────────────────────────────────────────


def _changed(args: TrainingArguments, purpose: str) -> dict[str, Any]:
    """Arguments that are not what they are by default, and count for a purpose."""
    known = {item.name: default_of(item) for item in fields(args) if item.init}
    # What nobody gave becomes a list, or settings, when arguments are made; some classes of TRL need more for that.
    with suppress(TypeError, ValueError):
        known |= vars(type(args)(args.output_dir, use_cpu=args.use_cpu))
    names = {item.name for item in fields(args) if item.init} - fields_without(purpose)
    return {name: getattr(args, name) for name in sorted(names) if getattr(args, name) != known[name]}


def _pool_digest(pool: AnswerPool) -> str:
    """Hash what is learnt from: ids, prompts, teachers and all that they wrote."""
    teachers = [(teacher.name, teacher.level) for teacher in pool.hierarchy.teachers]
    digest = hashlib.blake2b(json.dumps(teachers).encode(), digest_size=8)
    # In parts, because a pool may be larger than memory.
    for part in row_chunks(len(pool)):
        rows = [pool.ids[part].tolist(), pool.prompts(part)]
        for name in pool.hierarchy.names:
            rows += [pool.texts(name, part), pool.log_probs(name, part).tolist(), pool.num_tokens(name, part).tolist()]
        digest.update(json.dumps(rows).encode())
    return digest.hexdigest()

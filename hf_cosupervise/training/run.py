"""One run, from its first stage to its last, over as many processes and crashes as it takes.

A stage is a level, or a round of it. What is finished lies on disk; what is asked for is compared with how the run was
begun; and the numbers of all stages become one story. Models are only dictionaries of tensors here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput, speed_metrics

from ..files import explain_full_disk, without_nan, write_text
from ..pool.pseudolabels import PseudolabelPool
from ..processes import Processes
from .checkpointing import GO_ON, find_checkpoint, read_story
from .config import CoSupervisedConfig, fields_without
from .history import LevelHistory
from .plan import LevelPlan
from .run_folder import MEMBERS_DIR, RunFolder, Stage, versions

logger = get_logger(__name__)

RUN_DIR = "_run"
# What of the story is kept with each stage.
_STORY = ("global_step", "epoch", "total_flos", "log_history")


@dataclass(frozen=True)
class OneRound:
    """What a run is told whose levels are trained once, and nothing beside them."""

    rounds_per_level: int = 1
    self_training_rounds: int = 0
    cross_fit_folds: int = 0


class TrainingRun:
    """Go through the stages of a run, keep what is finished, and know what is not."""

    def __init__(
        self,
        path: Path,
        args: CoSupervisedConfig | OneRound,
        num_levels: int,
        facts: dict[str, Any],
        processes: Processes | None = None,
        new_story: Callable[[], TrainerState] = TrainerState,
    ) -> None:
        self.folder = RunFolder(path)
        self.args, self.num_levels, self.processes = args, num_levels, processes or Processes(0, 1)
        self.history = LevelHistory(path / "history.json", facts)
        self.plans: list[LevelPlan] = []
        self._new_story = new_story
        self.story = new_story()
        self._is_own = False  # whether what is in the folder was begun, or is gone on with, by this object
        self._resuming = False  # whether the next stage may have been begun before, and cut off
        self._started, self._outputs = time.time(), list[TrainOutput]()

    @property
    def path(self) -> Path:
        """`pathlib.Path`: The folder."""
        return self.folder.path

    # --- stages ------------------------------------------------------------------------------------------------------

    def num_rounds(self, level: int) -> int:
        """Tell how often a level is trained."""
        if level == self.num_levels:  # self-training, which comes after the last level
            return self.args.self_training_rounds
        return self.args.rounds_per_level if level else 1  # the root has nothing to choose again

    def stages(self) -> list[tuple[int, int]]:
        """Give all levels and their rounds, in order, self-training last; a committee's members have their own."""
        levels = range(self.num_levels + 1) if self.num_levels else ()
        return [(level, number) for level in levels for number in range(self.num_rounds(level))]

    def unfinished(self, why_stop: Callable[[int], str | None] = lambda round: None) -> Iterator[tuple[int, int]]:
        """Give what is still to be done; a round of self-training only where there is no reason to stop before."""
        reason = "all rounds are done"
        for level, number in self.stages()[len(self.history.records) :]:
            if level == self.num_levels and (found := why_stop(number)) is not None:
                reason = found
                break
            yield level, number
            self._resuming = False  # only the first of them can have been cut off
        if self.num_levels and self.args.self_training_rounds:
            num_rounds = sum(record["level"] == self.num_levels for record in self.history.records)
            self.conclude({"self_training": {"num_rounds": num_rounds, "stopped": reason}})
            logger.info(f"Self-training stopped after {num_rounds} rounds: {reason}.")

    def num_folds(self, plan: LevelPlan) -> int:
        """Tell how many heads are fitted beside the student of a stage: to judge by, or as second opinions."""
        if self.is_last(plan):
            return 0
        trains_itself = self.args.self_training_rounds > 0 and plan.level >= self.num_levels - 1
        return self.args.cross_fit_folds or (2 if trains_itself else 0)

    def stage_dir(self, level: int, round: int) -> Path:
        """Give the folder of a stage."""
        # Which round of self-training is the last is not known before.
        is_last = level < self.num_levels and round == self.num_rounds(level) - 1
        return self.path / (f"level-{level}" if is_last else f"level-{level}-round-{round}")

    def is_last(self, plan: LevelPlan) -> bool:
        """Tell whether nothing comes after a stage."""
        return (plan.level, plan.round) == self.stages()[-1]

    # --- begin, or go on ---------------------------------------------------------------------------------------------

    @contextmanager
    def open(self, settings: Callable[[], Mapping[str, Any]], resume: bool) -> Iterator[Stage | None]:
        """Begin the run, or go on with the one in this folder, and see that nobody else works there meanwhile."""
        with ExitStack() as stack:
            # By the first of all processes; all of them learn that it is taken.
            self.processes.on_first(lambda: None if stack.enter_context(self.folder.lock()) else None)
            is_there = self._find(resume)  # after the lock, or another process could begin one in between
            self.story, self.plans, self._resuming = self._new_story(), [], resume
            last, facts = None, settings()
            if resume and is_there:
                self.processes.on_first(lambda: self._check(facts))
                self._is_own = True
                last = self._read_stages()
            else:
                self._begin(facts)
            self._started, self._outputs = time.time(), []  # what an earlier process trained is not in its speed
            yield last

    def claim(self, settings: Callable[[], Mapping[str, Any]]) -> None:
        """Begin the run of a notebook that goes from stage to stage by itself, at its first stage."""
        if not self._is_own:
            self._find(resume=False)
            self._begin(settings())

    def _find(self, resume: bool) -> bool:
        """Tell whether a run is in this folder; one that is not gone on with must be this object's own."""
        # A committee has a history of its own from its first finished member on, whose stages may be finished before.
        stages = "level-*", f"{MEMBERS_DIR}/*/{RUN_DIR}/level-*"
        found = self.processes.on_first(
            lambda: self.history.path.is_file() or any(any(self.path.glob(stage)) for stage in stages)
        )
        if found and not resume and not self._is_own:
            raise FileExistsError(
                f"`output_dir` must not hold another run, got one in '{self.path}'. Choose another folder, delete "
                "that one, or go on with `resume_from_checkpoint=True`."
            )
        return found

    def _begin(self, facts: Mapping[str, Any]) -> None:
        def begin() -> None:
            with explain_full_disk(self.path, GO_ON):
                self.history.clear()
                self.folder.begin(facts)

        self.history.records = []
        self.processes.on_first(begin)
        self._is_own = True

    def _check(self, facts: Mapping[str, Any]) -> None:
        """See that the run that was begun here is this one, of the same commit of a student of the Hub."""
        try:
            known, own = self.history.read().get("student", {}), self.history.run["student"]
        except (ValueError, AttributeError, RecursionError) as error:
            # Stages are what counts, and tell all of it again.
            logger.warning(f"'{self.history.path}' cannot be read ({error}): it is written anew.")
        else:
            # The branch may have moved on since: its name alone does not tell that the weights are the same.
            pinned = ("model", "commit", "base_commit")
            if self.history.records and any(known.get(key) != own.get(key) for key in pinned):
                raise ValueError(
                    f"The run in '{self.path}' must go on with the student that it was begun with, {known}, got "
                    f"{own}. Name its commit by `student_revision`, or choose another folder."
                )
        self.folder.check(facts)

    def _read_stages(self) -> Stage | None:
        """Read the finished stages of this folder back; gives the last of them."""
        self.history.records = []
        last = None
        for level, number in self.stages():
            stage = self.folder.load_stage(self.stage_dir(level, number))
            if stage is None:
                break  # what comes after it was made from another student
            last = stage
            # One per level: a later round takes the place of an earlier.
            self.plans = [*self.plans[:level], stage.plan]
            self.history.records.append(stage.record)
        self._check_same_everywhere(len(self.history.records))
        self.history.run["num_processes"] = self.processes.on_first(self._repair_history)
        for name, value in last.story.items() if last is not None else ():
            setattr(self.story, name, value)
        return last

    def _check_same_everywhere(self, finished: int) -> None:
        """See that all processes read the same stages: they would wait for each other forever."""
        counts = self.processes.gather(torch.tensor(finished)).tolist()
        if len(set(counts)) > 1:
            raise FileNotFoundError(
                f"All processes must see the same levels in '{self.path}', got {counts} finished ones. Choose an "
                "`output_dir` that they share."
            )

    def _repair_history(self) -> int:
        """Write the history anew where it does not tell of the stages that are there; gives who trains, or trained."""
        known, run = LevelHistory(self.history.path), dict[str, Any]()
        try:
            run = known.read()
        except (ValueError, AttributeError, RecursionError):
            known.records = []
        # Compared as JSON reads them: NaN and tuples do not come back as they went in.
        if known.records[: len(self.history.records)] != json.loads(json.dumps(without_nan(self.history.records))):
            self._write_history()
        # Whoever publishes what is finished has not trained it.
        is_over = len(self.history.records) == len(self.stages()) or "self_training" in run
        return int(run.get("num_processes") or self.processes.count) if is_over else self.processes.count

    # --- one stage ---------------------------------------------------------------------------------------------------

    def check_turn(self, level: int) -> None:
        """See that the level above is finished."""
        if not self.num_levels:
            raise ValueError(
                f"Level {level} must be of a hierarchy that one student goes down, got `method` 'committee': each of "
                "its members does. Call `train()`, or use `method` 'csl'."
            )
        if len(self.plans) < level:
            raise ValueError(
                f"Level {level} must follow a finished level {level - 1} of this trainer, got {len(self.plans)} "
                "finished. Prepare, train and finish those above, or call `train(resume_from_checkpoint=True)`."
            )

    def follow(self, other: TrainingRun) -> None:
        """Go on with the steps and logs of another run: those of a committee's members are one story."""
        story = other.story
        self._new_story = lambda: replace(story, log_history=list(story.log_history))

    def take_over(self, member: TrainingRun, name: str) -> None:
        """Take the story, the records and what was trained of a finished run as part of this one."""
        self.story = member.story
        self._outputs += member._outputs
        if (told := member.history.run.get("self_training")) is not None:
            self.history.run.setdefault("self_training", {})[name] = told
        self.history.records += [{"member": name, **record} for record in member.history.records]
        self.processes.on_first(self._write_history)

    def conclude(self, facts: Mapping[str, Any]) -> None:
        """Write down what a run came to, beside what it was made of."""
        self.history.run |= facts
        self.processes.on_first(self._write_history)

    def check_trained(self) -> None:
        """Refuse to publish a student that has learnt nothing, before a repository is made for it."""
        if not self.history.records:
            raise RuntimeError(
                "A student must be trained before it is pushed, got one without a finished level. Call `train()`, or "
                "`train(resume_from_checkpoint=True)` where it was trained in another process."
            )

    def begin_stage(self, plan: LevelPlan, can_resume: bool) -> str | None:
        """Make room for a stage, or find where it was cut off."""
        folder = self.stage_dir(plan.level, plan.round)
        checkpoint = None
        if self._resuming and can_resume:
            checkpoint = find_checkpoint(folder, plan.level, self.processes)
        if checkpoint is None:
            # Checkpoints of an attempt that nobody goes on with must not pass for those of this one.
            self.processes.on_first(lambda: self.folder.forget([folder]))
        return None if checkpoint is None else str(checkpoint)

    def take_up(self, checkpoint: str) -> tuple[float, int]:
        """Go on with the story where a checkpoint left it."""
        # A sum of losses for each process: they have seen different examples, and only their mean is told.
        story = read_story(Path(checkpoint))
        self.story.log_history = story["log_history"]
        return story["loss_sums"][self.processes.rank], story["num_losses"]

    def record(self, plan: LevelPlan, output: TrainOutput, state: TrainerState) -> dict[str, Any]:
        """Count the steps of a trained stage, and write its numbers down."""
        self.story.global_step += output.global_step
        self.story.epoch = (self.story.epoch or 0.0) + (state.epoch or 0.0)  # None before the first step
        self.story.total_flos += state.total_flos
        record = {
            "level": plan.level,
            "round": plan.round,
            **plan.metrics,
            "num_steps": output.global_step,
            "train_loss": output.training_loss,
            "train_runtime": output.metrics["train_runtime"],
            **{name: value for name, value in output.metrics.items() if name.startswith("head/")},
        }
        self._outputs.append(output)
        # All processes hold the record, one of them writes.
        self.history.records.append(record)
        self.processes.on_first(self._write_history)
        return record

    def save(self, plan: LevelPlan, student: dict[str, torch.Tensor], folds: list[dict[str, torch.Tensor]]) -> None:
        """Keep a trained stage: the next one, or another process, goes on from here."""
        self.plans = [*self.plans[: plan.level], plan]
        own = plan.level, plan.round

        def save() -> None:
            # What comes after was made from another student of this level.
            self.folder.forget(self.stage_dir(*stage) for stage in self.stages() if stage > own)
            story = {name: getattr(self.story, name) for name in _STORY}
            with explain_full_disk(self.path, GO_ON):
                stage = Stage(plan, student, folds, self.history.records[-1], story)
                self.folder.save_stage(self.stage_dir(*own), stage)

        self.processes.on_first(save)

    def load(self, level: int) -> Stage:
        """Read a finished level."""
        number = self.num_rounds(level) - 1
        if level == self.num_levels:  # it may have stopped before
            number = sum(record["level"] == level for record in self.history.records) - 1
        stage = self.folder.load_stage(self.stage_dir(level, number))
        if stage is None:
            raise FileNotFoundError(f"No student of level {level} in '{self.path}'. Call `train()` first.")
        return stage

    def _write_history(self) -> None:
        content = self.history.to_json()
        with explain_full_disk(self.path, GO_ON):
            write_text(self.history.path, content)

    # --- the end -----------------------------------------------------------------------------------------------------

    def close(self) -> TrainOutput:
        """Sum up what was trained since the run was opened."""
        # A mean over steps, not over levels, of which some are longer.
        steps = sum(output.global_step for output in self._outputs)
        loss = sum(output.training_loss * output.global_step for output in self._outputs) / max(steps, 1)
        metrics = speed_metrics("train", self._started, num_steps=steps)
        metrics |= {"total_flos": self.story.total_flos, "train_loss": loss, "num_levels": float(len(self.plans))}
        return TrainOutput(self.story.global_step, loss, metrics)


def describe_settings(
    args: CoSupervisedConfig, pool: PseudolabelPool, student: Callable[[], str], functions: Mapping[str, str]
) -> dict[str, Any]:
    """Tell what must be the same for a run of labels to be gone on with."""
    changed = {name: value for name, value in args.changed_arguments().items() if name not in fields_without("resume")}
    return settings_of(args, {"data_seed": args.data_seed, **changed}, pool.digest, student(), functions)


def settings_of(
    args: TrainingArguments, changed: Mapping[str, Any], pool: str, student: str, functions: Mapping[str, str]
) -> dict[str, Any]:
    """Tell what must be the same for a run to be gone on with, of digests and of what was chosen."""
    # They are compared with what JSON gives back: an enum or a class is written as its text.
    plain = (bool, int, float, str, list, dict, type(None))
    arguments = {name: value if isinstance(value, plain) else str(value) for name, value in changed.items()}
    return {
        "arguments": {"seed": args.seed, **arguments},
        "functions": dict(functions),
        "pool": pool,
        "student": student,
        "num_processes": args.world_size,
        "examples_per_step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "versions": versions(),
    }

"""The folder of a run: which run it is, that nobody else works in it, and what of it is finished."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.logging import get_logger
from filelock import Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .. import __version__
from ..files import (
    differences,
    file_digest,
    is_as_written,
    make_output_dir,
    read_json,
    take_lock,
    whole_file,
    without_nan,
    write_json,
)
from .plan import LevelPlan

logger = get_logger(__name__)

_RUN, _STAGE, DIGESTS = "run.json", "stage.json", "digests.json"
MEMBERS_DIR = "members"  # runs of a committee's members, each in a folder of its own
_PLAN, _STUDENT, _FOLDS = "plan.npz", "student.safetensors", "folds.safetensors"
_ARRAYS = ("assigned_teacher", "labels", "keep_mask", "relabelled")
_DAMAGED = (SafetensorError, zipfile.BadZipFile, EOFError, RecursionError)
_UNREADABLE = (KeyError, TypeError, ValueError, AttributeError, *_DAMAGED)
_PER_PROCESS = ("per_device_train_batch_size", "gradient_accumulation_steps")


@dataclass
class Stage:
    """One trained round of a level, as it lies on disk."""

    plan: LevelPlan
    student: dict[str, torch.Tensor]
    folds: list[dict[str, torch.Tensor]]
    record: dict[str, Any]
    story: dict[str, Any]


class RunFolder:
    """Keep what a run needs to go on, below `output_dir`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def lock(self) -> Iterator[None]:
        """See that no other process works here; a process that dies frees the folder."""
        make_output_dir(self.path)
        try:
            lock = take_lock(self.path / ".lock")
        except Timeout as error:
            # Two runs would write each other's stages and checkpoints.
            raise FileExistsError(
                f"`output_dir` must be used by one run at a time, got another that works in '{self.path}' now. Wait "
                "for it, or choose another folder."
            ) from error
        try:
            yield
        finally:
            lock.release()

    # --- which run it is ---------------------------------------------------------------------------------------------

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Write down which run this is, and forget all stages of the one before."""
        # They were trained by other settings, and would be taken for this run's.
        self.forget(path for path in self.path.glob("level-*") if path.is_dir())
        shutil.rmtree(self.path / MEMBERS_DIR, ignore_errors=True)
        write_json(self.path / _RUN, dict(facts))

    def forget(self, folders: Iterable[Path]) -> None:
        """Delete stages and their checkpoints, which are about to be made anew or come after one that is."""
        for folder in folders:
            # What makes them count goes first, so that nothing counts of which a part is gone.
            for path in (folder / _STAGE, *folder.glob(f"checkpoint-*/{DIGESTS}")):
                path.unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)

    def check(self, facts: Mapping[str, Any]) -> None:
        """See that the run that was begun here is this one."""
        if not (self.path / _RUN).is_file():  # stages alone are gone on with: they tell all that is needed
            return
        try:
            known = read_json(self.path / _RUN)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"'{self.path / _RUN}' must be what the run wrote there, got no JSON ({error}). Choose another "
                "`output_dir`."
            ) from error
        own = json.loads(json.dumps(without_nan(dict(facts))))
        # Other versions give about the same student: told, not refused.
        versions = _tell_differences(known.pop("versions", {}), own.pop("versions", {}))
        self._compare_processes(known, own)
        if different := _tell_differences(known, own):
            raise ValueError(
                f"The run in '{self.path}' must be gone on with as it was begun, got other settings ({different}). "
                "Take them back, or choose another `output_dir`."
            )
        if versions:
            logger.warning(f"The run in '{self.path}' was begun with other versions ({versions}).")

    def _compare_processes(self, known: dict[str, Any], own: dict[str, Any]) -> None:
        """Tell of another number of processes, and take out what depends on it."""
        before, now = (
            (facts.pop("num_processes", None), facts.pop("examples_per_step", None)) for facts in (known, own)
        )
        if None in before or before == now:
            return
        tell = logger.warning
        # The same examples meet in a step, so that the student is the same but for rounding.
        if before[1] == now[1]:
            tell = logger.info
            for facts in (known, own):
                facts["arguments"] = {
                    name: value for name, value in facts["arguments"].items() if name not in _PER_PROCESS
                }
        tell(
            f"The run in '{self.path}' was begun with {before[1]} examples per step in {before[0]} process(es), and "
            f"goes on with {now[1]} in {now[0]}. Finished levels are kept."
        )

    def _mark(self) -> str | None:
        """What tells this run from others; nothing where stages alone are left of it."""
        path = self.path / _RUN
        return file_digest(path) if path.is_file() else None

    # --- what is finished --------------------------------------------------------------------------------------------

    def save_stage(self, folder: Path, stage: Stage) -> None:
        """Write a finished round; it counts from the moment when all of it is there."""
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {name: getattr(stage.plan, name) for name in _ARRAYS if getattr(stage.plan, name) is not None}
        with whole_file(folder / _PLAN) as path:
            np.savez(path, **arrays)  # type: ignore[arg-type]
        tensors = {_STUDENT: stage.student}
        if stage.folds:
            folds = enumerate(stage.folds)
            tensors[_FOLDS] = {f"{fold}.{name}": value for fold, own in folds for name, value in own.items()}
        for name, content in tensors.items():
            with whole_file(folder / name) as path:
                save_file(content, path)
        facts = {
            "run": self._mark(),
            "level": stage.plan.level,
            "round": stage.plan.round,
            "record": stage.record,
            "story": stage.story,
            "files": {name: file_digest(folder / name) for name in (_PLAN, *tensors)},
        }
        # The digest must be of what will be read, and JSON changes keys, tuples and NaN.
        facts = json.loads(json.dumps(without_nan(facts)))
        # Last: a stage counts from when this file is there, and it knows the digests of all others. Nobody reads the
        # log of all steps in it, and `json` indents slowly.
        write_json(folder / _STAGE, {**facts, "digest": _json_digest(facts)}, indent=None)

    def load_stage(self, folder: Path) -> Stage | None:
        """Read a finished round."""
        if not (folder / _STAGE).is_file():
            return None
        try:
            facts = read_json(folder / _STAGE)
            if facts.pop("digest") != _json_digest(facts):
                logger.warning(f"'{folder / _STAGE}' is not as it was written: this round is trained again.")
                return None
            # Whole, and yet of another run, of another member, or of another level.
            own = facts.get("run") in (None, self._mark() or facts["run"])
            if not own or folder.name.split("-round-")[0] != f"level-{facts['level']}":
                logger.warning(f"'{folder / _STAGE}' is of another run or level: this round is trained again.")
                return None
            # By digests, because a file that was cut off or exchanged may still be read.
            for name, digest in facts["files"].items():
                if not is_as_written(folder, name, digest):
                    logger.warning(f"'{folder / name}' is not as it was written: this round is trained again.")
                    return None
            # Without pickles, which arrays of objects would be: a folder may have been handed on.
            with np.load(folder / _PLAN, allow_pickle=False) as saved:
                arrays = {name: saved[name] for name in _ARRAYS if name in saved}
            saved_folds = load_file(folder / _FOLDS) if _FOLDS in facts["files"] else {}
            # Names begin with the number of their fold.
            folds: list[dict[str, torch.Tensor]] = [{} for _ in {key.split(".")[0] for key in saved_folds}]
            for key, value in saved_folds.items():
                fold, _, name = key.partition(".")
                folds[int(fold)][name] = value
            plan = LevelPlan(facts["level"], facts["round"], metrics={}, **arrays)
            return Stage(plan, load_file(folder / _STUDENT), folds, facts["record"], facts["story"])
        except _UNREADABLE as error:
            logger.warning(f"'{folder / _STAGE}' cannot be read ({error!r}): this round is trained again.")
            return None


# ── fingerprints ────────────────────────────────────────────────────────────────────────────────────────────────────


def versions() -> dict[str, str]:
    """Tell the versions that a student hangs on."""
    return {"hf_cosupervise": __version__, "transformers": transformers.__version__, "torch": torch.__version__}


def _tell_differences(known: Any, own: Any) -> str:
    found = differences(known, own)
    return "; ".join(f"{place.split('.')[-1]}: {before!r} -> {now!r}" for place, before, now in found)


def _json_digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()

"""Checkpoints inside a level: sealed when they are whole, and read back without losing a weight."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.logging import get_logger
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ..files import explain_full_disk, file_digest, is_as_written, read_json, write_json
from ..processes import Processes
from .run_folder import DIGESTS

logger = get_logger(__name__)

GO_ON = "Free some space and call `train(resume_from_checkpoint=True)`: what was finished is kept."
_BUFFERS, _STORY = "buffers.safetensors", "story.json"
# What a run may read of a checkpoint; other files that somebody leaves there do no harm.
_READ = (".bin", ".json", ".pt", ".pth", ".safetensors")
_NO_TENSORS = (UnpicklingError, SafetensorError)
# What the parent raises for a file of another form, and nowhere else while it reads one.
_FOREIGN = (AttributeError, EOFError, LookupError, OverflowError, RuntimeError, TypeError, ValueError, *_NO_TENSORS)

# Of an optimizer's state, what has the shape of its weight.
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")


def seal_checkpoint(folder: Path, story: Mapping[str, Any]) -> None:
    """Write down the digests of a checkpoint's files, last: one without them is not whole."""
    write_json(folder / _STORY, dict(story))  # before the digests, to have one too
    write_json(folder / DIGESTS, {name: file_digest(folder / name) for name in _files_of(folder)})


def _files_of(folder: Path) -> list[str]:
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return [name for name in names if name != DIGESTS]


def read_story(folder: Path) -> dict[str, Any]:
    """Read what was told to [`seal_checkpoint`]."""
    return read_json(folder / _STORY)


def last_checkpoint(folder: Path, num_processes: int = 1) -> Path | None:
    """Find the last whole checkpoint of a round that is not finished."""
    # By number: as text, checkpoint-9 would come after checkpoint-10.
    paths = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    for path in sorted(paths, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        if not (path / DIGESTS).is_file():
            continue  # it was being written
        try:
            digests = read_json(path / DIGESTS)
            spoilt = [name for name, digest in digests.items() if not is_as_written(path, name, digest)]
            if spoilt:
                logger.warning(f"'{path / spoilt[0]}' is not as it was written: the checkpoint before it is taken.")
                continue
            added = [name for name in _files_of(path) if name.endswith(_READ) and name not in digests]
            if added:
                logger.warning(f"'{path / added[0]}' was not written by the run: the checkpoint before it is taken.")
                continue
            # `transformers` writes NaN and infinity as JSON has no words for them
            state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            if (own := read_story(path).get("num_processes", 1)) != num_processes:
                logger.info(f"'{path}' is of {own} process(es), not of {num_processes}: it is passed over.")
            # Gone on from its last step, the parent would make one more.
            elif state["global_step"] < state["max_steps"]:
                return path
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            logger.warning(f"'{path}' cannot be read ({error!r}): the checkpoint before it is taken.")
    return None


@contextmanager
def sealing(
    folder: Path, story: Mapping[str, Any], buffers: Mapping[str, torch.Tensor] | None, processes: Processes
) -> Iterator[None]:
    """Seal what is written meanwhile, so that a spoilt or half written checkpoint is never gone on from."""
    try:
        with explain_full_disk(folder.parent.parent, GO_ON):
            yield
            processes.wait()  # each writes its own random state
            if processes.rank == 0 and folder.is_dir():
                if buffers is not None:
                    save_file(dict(buffers), folder / _BUFFERS)
                seal_checkpoint(folder, story)
    except OSError:  # half of it would only take room
        shutil.rmtree(folder, ignore_errors=True)
        raise


def find_checkpoint(folder: Path, level: int, processes: Processes) -> Path | None:
    """Find where a level that was cut off is gone on with."""
    # Older releases look for tensors on a device `cpu:0`, which there is none of.
    release = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if processes.count > 1 and processes.device.type == "cpu" and release < (5, 23):
        logger.warning(
            f"Level {level} is begun anew: on CPU several processes go on inside a level with transformers 5.23 or "
            "later only."
        )
        return None
    return processes.on_first(lambda: last_checkpoint(folder, processes.count))


@contextmanager
def explain_checkpoint(checkpoint: str | None, kinds: tuple[type[Exception], ...] = _NO_TENSORS) -> Iterator[None]:
    """Name the checkpoint of which a file holds something else: the parent refuses it, but tells how to run it."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except kinds as error:
        if checkpoint is None:
            raise
        raise ValueError(
            f"'{checkpoint}' must hold the tensors that the run wrote, got a file of something else, which was not "
            "loaded. Delete that folder: the checkpoint before it is taken."
        ) from error


def explained(load: Callable[[Any, str | None], None]) -> Callable[[Any, str | None], None]:
    """Let the parent read optimizer, schedule, scaler or random numbers only where they are of this run's form."""

    def read(trainer: Any, checkpoint: str | None) -> None:
        if checkpoint is None or trainer._is_sharded:
            load(trainer, checkpoint)
            return
        own = _states_of(trainer)
        with explain_checkpoint(checkpoint, _FOREIGN):
            load(trainer, checkpoint)
            if not _fits(own, _states_of(trainer)) or not _moments_fit(trainer.optimizer):
                raise TypeError("the state of something else")

    return read


def _states_of(trainer: Any) -> list[Any]:
    """What a schedule, a scaler and the groups of an optimizer hold beside moments."""
    held = trainer.lr_scheduler, trainer.accelerator.scaler, trainer.optimizer
    states = [None if holder is None else holder.state_dict() for holder in held]
    return [*states[:2], None if states[2] is None else states[2]["param_groups"]]


def _fits(own: Any, other: Any) -> bool:
    """Whether a state has the form of another; torch takes over whatever it is given."""
    if own is None or other is None:
        return True
    if isinstance(own, Mapping):
        return isinstance(other, Mapping) and all(key in other and _fits(own[key], other[key]) for key in own)
    if isinstance(own, list | tuple):
        is_list = isinstance(other, list | tuple) and (not own or len(own) == len(other))
        return is_list and all(map(_fits, own, other))
    if isinstance(own, int | float | torch.Tensor):
        return isinstance(other, int | float | torch.Tensor) and np.shape(own) == np.shape(other)
    return type(own) is type(other)


def _moments_fit(optimizer: Any) -> bool:
    """Whether what an optimizer remembers of each weight has the shape of that weight."""
    weights = [] if optimizer is None else [weight for group in optimizer.param_groups for weight in group["params"]]
    return all(
        isinstance(moment, torch.Tensor) and moment.shape == weight.shape
        for weight in weights
        for name, moment in optimizer.state.get(weight, {}).items()
        if name in _MOMENTS and moment is not None
    )


# ── weights ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_back(
    model: Any, folder: str | Path, by_parent: Callable[[], None], *, is_sharded: bool
) -> dict[str, torch.Tensor]:
    """Read a checkpoint's weights back through `from_pretrained`, where that is possible."""
    if is_sharded or not isinstance(model, PreTrainedModel):
        by_parent()
        # What training changed without a gradient, which an adapter leaves out.
        path = Path(folder, _BUFFERS)
        return load_file(path) if path.is_file() else {}
    # The Trainer loads by raw names and passes over those that it does not find: of ViT 32 tensors of 40, which
    # `save_pretrained` writes under older names, would stay as they are with a line in the log.
    saved = type(model).from_pretrained(folder, config=model.config, use_safetensors=True)
    model.load_state_dict(saved.state_dict())
    return {}

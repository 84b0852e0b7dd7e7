"""The story of the levels, told to trackers once and kept on disk."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

from .files import write_text
from .metrics import without_nan

# They draw one bar per level, so they must hear of every beginning and end. By name: the notebook's needs IPython.
_PER_LEVEL = {"ProgressCallback", "NotebookProgressCallback"}


class LevelCallbackHandler(CallbackHandler):
    """Tell callbacks of one training although the `Trainer` trains once per level.

    Trackers open a run at `on_train_begin` and close it at `on_train_end`; both come once per call of `train()`.
    Callbacks may have `on_level_begin(args, state, control, plan=…, **kwargs)` and
    `on_level_end(args, state, control, plan=…, metrics=…, **kwargs)` of their own.

    Args:
        handler (`CallbackHandler`):
            What the `Trainer` made; its callbacks are taken over.
    """

    def __init__(self, handler: CallbackHandler) -> None:
        super().__init__(
            handler.callbacks, handler.model, handler.processing_class, handler.optimizer, handler.lr_scheduler
        )
        self.eval_dataloader = handler.eval_dataloader
        self.in_level = False
        self._known: list[TrainerCallback] = []
        self._concerned: dict[tuple[str, bool], list[TrainerCallback]] = {}

    def call_event(self, event: str, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Pass an event on to the callbacks that it concerns.

        Args:
            event (`str`):
                Name of the method to call.
            args (`TrainingArguments`):
                Of the trainer.
            state (`TrainerState`):
                Of the trainer.
            control (`TrainerControl`):
                Of the trainer.
            kwargs (`Any`):
                Passed on.

        Returns:
            `TrainerControl`
        """
        if self.callbacks != self._known:  # a callback may add or remove others
            self._known, self._concerned = list(self.callbacks), {}
        key = (event, self.in_level)
        if key not in self._concerned:
            self._concerned[key] = [callback for callback in self._known if self._concerns(event, callback)]
        for callback in self._concerned[key]:
            result = getattr(callback, event)(
                args, state, control, model=self.model, processing_class=self.processing_class,
                optimizer=self.optimizer, lr_scheduler=self.lr_scheduler, train_dataloader=self.train_dataloader,
                eval_dataloader=self.eval_dataloader, **kwargs,
            )  # fmt: skip
            control = control if result is None else result
        return control

    def silent(self) -> LevelCallbackHandler:
        """Give a handler that tells nobody, for what is no part of the story.

        Returns:
            `LevelCallbackHandler`
        """
        quiet = copy.copy(self)
        quiet.callbacks = []
        return quiet

    def _concerns(self, event: str, callback: TrainerCallback) -> bool:
        if event in ("on_train_begin", "on_train_end"):
            return _draws_bars(callback) == self.in_level
        # The events of levels are ours: most callbacks do not know them. Most do nothing at most others either, which
        # counts where a step takes a tenth of a millisecond.
        method = getattr(callback, event, None)
        return method is not None and getattr(method, "__func__", method) is not getattr(TrainerCallback, event, None)


def _draws_bars(callback: TrainerCallback) -> bool:
    return any(kind.__name__ in _PER_LEVEL for kind in type(callback).__mro__)


class LevelHistory:
    """Keep what a run was made of, and the numbers of every finished level, in one JSON file.

    The file holds `run`, a dictionary, and `levels`, a list of records.

    Args:
        path (`str` or `os.PathLike`):
            The file, made at the first record.
        run (`dict[str, Any]`, *optional*):
            Student, teachers and data at the commits that they were pinned to, JSON values.
    """

    def __init__(self, path: str | os.PathLike[str], run: dict[str, Any] | None = None) -> None:
        self.path = Path(path)
        self.run: dict[str, Any] = dict(run or {})
        self.records: list[dict[str, Any]] = []

    def read(self) -> dict[str, Any]:
        """Read the records of an earlier run, none where there is no file.

        Returns:
            `dict[str, Any]`: What that run was made of, empty where nothing is known.
        """
        content = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {}
        content = {"levels": content} if isinstance(content, list) else content  # of a version before 0.2
        self.records = content.get("levels", [])
        return content.get("run", {})

    def clear(self) -> None:
        """Forget all records, on disk too."""
        self.records = []
        self.path.unlink(missing_ok=True)

    def to_json(self) -> str:
        """Give the content of the file.

        Returns:
            `str`: JSON; it ends with a line break.
        """
        return json.dumps(without_nan({"run": self.run, "levels": self.records}), indent=2) + "\n"

    def add(self, record: dict[str, Any], *, write: bool = True) -> None:
        """Add the record of a finished level.

        Args:
            record (`dict[str, Any]`):
                JSON values; `level` and `round` among them.
            write (`bool`, *optional*, defaults to `True`):
                Write the file too, whole or not at all. One process of several does.
        """
        self.records.append(record)
        if write:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, self.to_json())

"""The story of the levels, told to trackers once, and one Trainer for all of them."""

from __future__ import annotations

import copy
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

# They draw one bar per level, so they must hear of every beginning and end. By name: the notebook's needs IPython.
_PER_LEVEL = {"ProgressCallback", "NotebookProgressCallback"}


class LevelCallbackHandler(CallbackHandler):
    """Tell callbacks of one training although the `Trainer` trains once per level."""

    def __init__(self, handler: CallbackHandler) -> None:
        self.__dict__.update(vars(handler))
        self.in_level = False
        self._is_member = False
        self._known: list[TrainerCallback] = []
        self._concerned: dict[tuple[str, bool], list[TrainerCallback]] = {}

    def call_event(self, event: str, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Pass an event on to the callbacks that it concerns."""
        if self.callbacks != self._known:  # a callback may add or remove others
            self._known, self._concerned = list(self.callbacks), {}
        key = (event, self.in_level)
        if key not in self._concerned:
            self._concerned[key] = [callback for callback in self._known if self._concerns(event, callback)]
        for callback in self._concerned[key]:  # as the parent does with all, twice in every step
            result = getattr(callback, event)(
                args,
                state,
                control,
                model=self.model,
                processing_class=self.processing_class,
                optimizer=self.optimizer,
                lr_scheduler=self.lr_scheduler,
                train_dataloader=self.train_dataloader,
                eval_dataloader=self.eval_dataloader,
                **kwargs,
            )
            control = control if result is None else result
        return control

    def silent(self) -> LevelCallbackHandler:
        """Give a handler that tells nobody, for what is no part of the story."""
        quiet = copy.copy(self)
        quiet.callbacks = []
        return quiet

    def of_member(self) -> LevelCallbackHandler:
        """Give a handler for a member of a committee, whose beginning and end are none of the training."""
        own = copy.copy(self)
        own._is_member, own._known, own._concerned = True, [], {}
        return own

    def _concerns(self, event: str, callback: TrainerCallback) -> bool:
        # The parent sends both once per level, and the trainer once for all of them: bars want the former, trackers,
        # which would begin another run, the latter.
        if event in ("on_train_begin", "on_train_end"):
            draws_bars = any(kind.__name__ in _PER_LEVEL for kind in type(callback).__mro__)
            return self.in_level if draws_bars else not (self.in_level or self._is_member)
        # The events of levels are ours: most callbacks do not know them. Most do nothing at most others either, which
        # counts where a step takes a tenth of a millisecond.
        if event == "on_log" and self._is_member and not self.in_level:
            return False  # its own summary
        method = getattr(callback, event, None)
        return method is not None and getattr(method, "__func__", method) is not getattr(TrainerCallback, event, None)

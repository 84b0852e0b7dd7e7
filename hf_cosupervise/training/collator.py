"""From examples to a batch: inputs by the student's processor, pseudolabels from the pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..data.inputs import InputProcessor

ROW, ROWS = "cosupervise_row", "target_rows"  # of an example, of a batch
TARGETS = ("target_ids", "target_probs", "target_rest")


def split_batch(batch: dict[str, Any]) -> tuple[dict[str, torch.Tensor], Any, Any]:
    """Take out of a batch what is no input of a model: some models refuse what they do not know."""
    targets = {name: batch.pop(name) for name in TARGETS if name in batch}
    return targets, batch.pop("labels", None), batch.pop(ROWS, None)


@dataclass
class DataCollatorForCoSupervision:
    """Make a batch of model inputs and pseudolabels.

    An example of the pool carries its row in `cosupervise_row` and gets its pseudolabel: `target_rows`, and
    `target_probs` over all labels, or over those in `target_ids` with `target_rest` for each other one. An example of
    an evaluation set carries `labels` and keeps them; any other example gets inputs only.

    Args:
        processor (`InputProcessor`):
            The student's tokenizer or image processor.
        input_column (`str`):
            The column that the student reads.
        pseudolabels (`Callable`, *optional*):
            From rows of the pool `(batch,)` to probabilities `(batch, num_labels)`, or to what
            [`PseudolabelPool.sparse_pseudolabels`] gives; set by the trainer for each level.
    """

    processor: InputProcessor
    input_column: str
    pseudolabels: Callable[[np.ndarray], np.ndarray | tuple[np.ndarray, np.ndarray, np.ndarray]] | None = None

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate examples."""
        self._check_examples(examples)
        batch = self.processor([example[self.input_column] for example in examples])
        if ROW in examples[0] and self.pseudolabels is not None:
            rows = np.array([example[ROW] for example in examples])
            targets = self.pseudolabels(rows)
            # Over all labels there are neither ids nor a rest.
            names = TARGETS if isinstance(targets, tuple) else TARGETS[1:2]
            arrays = targets if isinstance(targets, tuple) else (targets,)
            if any(len(array) != len(rows) for array in arrays):
                raise ValueError(
                    f"`pseudolabels` must give one row for each of {len(rows)} rows, got "
                    f"{[np.shape(array) for array in arrays]}. Look each row up."
                )
            batch |= {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}
            batch[ROWS] = torch.from_numpy(rows)
        elif "labels" in examples[0]:
            batch["labels"] = torch.tensor([example["labels"] for example in examples], dtype=torch.long)
        return batch

    def _check_examples(self, examples: Sequence[dict[str, Any]]) -> None:
        if not examples:
            raise ValueError("A batch must hold at least one example, got none. Leave empty batches out.")
        # The first tells what kind of examples these are, and the others must be of it.
        for name in (self.input_column, *({ROW, "labels"} & set(examples[0]))):
            if lacking := [example for example in examples if name not in example]:
                raise KeyError(
                    f"Every example must have the column {name!r}, got one with {sorted(lacking[0])}. Keep the "
                    "columns by `remove_unused_columns=False`, or correct `input_column`."
                )
        wrong = [
            example["labels"] for example in examples if not isinstance(example.get("labels", 0), int | np.integer)
        ]
        if wrong:
            raise ValueError(f"`labels` must be label ids, got {wrong[0]!r}. Number the labels from 0, and fill gaps.")

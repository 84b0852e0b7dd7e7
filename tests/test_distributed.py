"""Two processes on CPU: the same E-step for equal weights, and the same student within a tolerance."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from accelerate import debug_launcher
from datasets import Dataset
from safetensors.torch import load_file
from test_trainer import make_args, make_pool

from hf_cosupervise import CoSupervisedTrainer


def _run(student: str, data: Dataset, folder: str, num_processes: int, changes: dict) -> None:
    args = make_args(Path(folder), per_device_train_batch_size=8 // num_processes, data_seed=3, **changes)
    trainer = CoSupervisedTrainer(student, args, pool=make_pool(data))
    if args.world_size != num_processes:
        raise RuntimeError(f"{num_processes} processes were wanted, got {args.world_size}.")
    trainer.train()
    trainer.save_model()


def _plan(folder: Path, level: int) -> dict[str, np.ndarray]:
    return dict(np.load(folder / "_run" / f"level-{level}" / "plan.npz"))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"fit_head_on_features": False}, {"student_training": "full"}], ids=str)
def test_two_processes_train_the_student_of_one(tmp_path, tiny_vit, tiny_image_dataset, changes):
    data = tiny_image_dataset.select(range(45))  # does not divide evenly
    changes = {"optim": "sgd", "learning_rate": 0.05, "rejection": "none", **changes}
    _run(tiny_vit, data, str(tmp_path / "one"), 1, changes)
    debug_launcher(_run, (tiny_vit, data, str(tmp_path / "two"), 2, changes), num_processes=2)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        np.testing.assert_allclose(one[name].numpy(), two[name].numpy(), atol=2e-3, err_msg=name)
    for level in range(2):
        first, second = _plan(tmp_path / "one", level), _plan(tmp_path / "two", level)
        # Both students are equal to a tolerance only, so an example on the edge may go either way.
        for key in first:
            assert (first[key] == second[key]).mean() > 0.95, key
    stories = [json.loads((tmp_path / name / "_run" / "history.json").read_text()) for name in ("one", "two")]
    records = [story["levels"] for story in stories]
    assert [record["num_steps"] for record in records[0]] == [record["num_steps"] for record in records[1]]

"""Compare methods on tasks over seeds, and write one table: every cell is trained once and kept.

    python recipes/compare.py                                                  # recipes/compare.yaml, all of it
    python recipes/compare.py --tasks digits --methods generalist csl --seeds 0,1 --num_workers 1

A task is a configuration of `train.py` with changes, a method is one that `evaluation` knows (or
`one_teacher_all_labels`) with changes to `CoSupervisedConfig`. A cell is one method on one task with one seed, a JSON
file: the same command goes on where it was cut off, a cell that failed is tried again, and other settings are refused.
Teachers, pools and features of a task and seed are made once for all methods. Every method is measured against the
ceiling of its own training settings, a cell too; where those differ, against the task's own besides. `output_dir` gets
`table.md`, `results.csv`, `results.json` and `figures/`, of what was asked for and is there.

A task may have `seeds` of its own (`--seeds` wins) and the names of the `methods` that run on it. A method with
`calibrated: true`, and the method `boosting`, use the task's `num_heldout_examples`. A text task with `features:
mean_pooled` is a control: the head is trained and tested on the mean over the tokens of the backbone's last hidden
state, which sentence encoders are made for, but which the exported student, an ordinary model, does not compute.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from comparison.cells import Group, check_cells, prepare, run_side_by_side
from comparison.plan import methods_of, parse_plan
from comparison.tables import collect, write_results
from task import say
from task_arguments import read_seeds


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, and write tables and figures; 1 where a cell failed."""
    plan, started = parse_plan(argv, __doc__), time.time()
    groups = [
        Group(task, methods_of(task, plan.methods), seed, plan.output_dir)
        for task in plan.tasks
        for seed in read_seeds(task.seeds)
    ]
    check_cells(groups)
    num_missing = count_unfinished(groups)
    todo = [group for group in groups if group.unfinished()]
    run_side_by_side([group for group in todo if prepare(group)], plan.num_workers)
    by_task = {task.name: [group for group in groups if group.task.name == task.name] for task in plan.tasks}
    reports = {name: collect(own) for name, own in by_task.items()}
    say(f"\n{write_results(reports, Path(plan.output_dir))}")
    num_run = num_missing - count_unfinished(groups)
    num_cells = sum(len(group.methods) for group in groups)
    say(f"{num_run} of {num_cells} cells run in {(time.time() - started) / 60:.1f} min.")
    return say_failures(groups)


def count_unfinished(groups: Sequence[Group]) -> int:
    """Count the cells that are still to be run."""
    return sum(len(group.unfinished()) for group in groups)


def say_failures(groups: Sequence[Group]) -> int:
    """Tell which cells failed, those with one cause together; 1 where there are any."""
    failed: dict[tuple[str, int, str], list[Path]] = {}
    for group in groups:
        for method in group.unfinished():
            path = group.results.path(method.name, ".error.txt")
            *_, cause = path.read_text(encoding="utf-8").strip().splitlines() if path.is_file() else ["not run"]
            failed.setdefault((group.task.name, group.seed, cause), []).append(path)
    for (task, seed, cause), paths in failed.items():
        names = "; ".join(path.name.removesuffix(".error.txt") for path in paths)
        say(f"Failed: {task}, seed {seed}: {names}: {cause} ({paths[0]})")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

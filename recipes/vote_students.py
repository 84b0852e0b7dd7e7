"""Measure the students of label models on vectors: over seeds, with settings that the validation part chooses.

    python recipes/vote_students.py youtube.npz [--seeds 0 1 2 3 4 5 6 7 8 9] [--choose_seeds 0 1 2]
    python recipes/vote_students.py youtube.npz --remove_votes 0.6 0 [--seeds 100 101 102 103 104]

The file holds `train_votes`, `train_features`, `train_labels` and the same of `valid` and `test`; -1 is no vote.

The first form prints the label models, of which the one with most right labels on validation rows is at the root of
the co-supervised student and of the committee. Every student has the setting of `GRID` with the highest mean
validation accuracy over `--choose_seeds`, of equals the first; beside it stands `START`, the defaults. The second form
removes all votes of a share of the rows at random, by the seed, and prints students without and with self-training, at
`START` and at `LONGER`, where students learn the errors of their labels; at a share of 0, rows without a vote are left
out instead, so that only rejected rows are left for it. Labels of the training part are read for the first table,
those of the test for the columns that say so, and for nothing else.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset, disable_progress_bars
from label_models import right_percent

from hf_cosupervise import (
    LABEL_MODELS,
    CoSupervisedConfig,
    CoSupervisedTrainer,
    PseudolabelPool,
    TeacherHierarchy,
    make_label_model,
)

Setting = dict[str, Any]
PLAIN: Setting = {"loss": "cross_entropy", "pseudolabels": "soft"}
ROBUST: Setting = {"loss": "early_learning_regularization", "pseudolabels": "hard"}
NUM_ROUNDS = 5
# What one gets without setting anything.
START: Setting = {"learning_rate": 1e-3, "num_train_epochs": 20, "per_device_train_batch_size": 100, **PLAIN}
LONGER: Setting = {"learning_rate": 1e-2, "num_train_epochs": 30, "per_device_train_batch_size": 32, **PLAIN}
GRID: list[Setting] = [
    START,
    *(
        {"learning_rate": rate, "num_train_epochs": epochs, "per_device_train_batch_size": 32, **loss}
        for loss, rate, epochs in product((PLAIN, ROBUST), (1e-3, 1e-2), (10, 30))
    ),
]


@dataclass
class Task:
    """Votes, vectors and labels of the parts."""

    parts: dict[str, np.ndarray]
    num_labels: int = field(init=False)

    def __post_init__(self) -> None:
        needed = {f"{part}_{what}" for part in ("train", "valid", "test") for what in ("votes", "features", "labels")}
        if missing := needed - {"test_votes"} - set(self.parts):
            raise ValueError(f"The file must hold {', '.join(sorted(missing))} too, got {', '.join(self.parts)}.")
        self.num_labels = int(max(self.parts["train_votes"].max(), self.parts["valid_labels"].max())) + 1

    @property
    def votes(self) -> np.ndarray:
        return self.parts["train_votes"].astype(np.int64)

    def pool(self, votes: np.ndarray, rows: np.ndarray) -> PseudolabelPool:
        """Pool of some of the training rows."""
        names, labels = [f"lf_{k}" for k in range(votes.shape[1])], [f"label {c}" for c in range(self.num_labels)]
        vectors = self.parts["train_features"].astype(np.float32)[rows]
        return PseudolabelPool.from_votes(votes[rows], names, labels, vectors=vectors)

    def examples(self, part: str) -> Dataset:
        """A part to measure on."""
        vectors, labels = self.parts[f"{part}_features"].astype(np.float32), self.parts[f"{part}_labels"]
        return Dataset.from_dict({"vector": vectors.tolist(), "label": labels.astype(np.int64).tolist()})


def train(task: Task, pool: PseudolabelPool, seed: int, **settings: Any) -> tuple[float, float]:
    """Right % of a linear student on the validation and test parts."""
    with tempfile.TemporaryDirectory() as folder:
        config = CoSupervisedConfig(
            folder, seed=seed, disable_tqdm=True, report_to="none", save_strategy="no", use_cpu=True, **settings
        )
        trainer = CoSupervisedTrainer("linear", config, pool=pool)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        valid, test = (100 * trainer.measure_accuracy(task.examples(part)) for part in ("valid", "test"))
    return valid, test


def root_alone(pool: PseudolabelPool) -> PseudolabelPool:
    """The pool without its specialists."""
    return pool.with_hierarchy(TeacherHierarchy(pool.labels, pool.hierarchy.teachers[:1]))


def spread(values: np.ndarray) -> str:
    """Mean and standard deviation."""
    return f"{values.mean():.1f} ± {values.std(ddof=1) if len(values) > 1 else 0:.1f}"


def print_students(task: Task, seeds: list[int], choose_seeds: list[int], only: list[str] | None) -> None:
    """Print the label models and all students."""
    every = np.arange(len(task.votes))
    pool, found = task.pool(task.votes, every), {}
    valid = task.parts["valid_votes"].astype(np.int64), task.parts["valid_labels"].astype(np.int64)
    print("| label model | right % of covered training rows | of validation rows |\n| --- | --- | --- |")
    for name in LABEL_MODELS:
        model = make_label_model(name)
        probs = model.fit_predict_proba(task.votes, task.num_labels)
        on_valid = right_percent(model.predict_proba(valid[0]), *valid)
        found[name] = model, on_valid
        print(f"| {name} | {right_percent(probs, task.votes, task.parts['train_labels']):.1f} | {on_valid:.1f} |")
    chosen = max(found, key=lambda name: found[name][1])
    print(f"\nChosen on validation rows: {chosen}.\n")
    print("| student | chosen rate, batch, epochs, labels | validation | test | test at START |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    students = {f"of {name}": root_alone(pool.with_aggregate(model)) for name, (model, _) in found.items()}
    students |= {f"{kind}, root {chosen}": pool.with_aggregate(found[chosen][0]) for kind in ("csl", "committee")}
    if only:
        students = {name: own for name, own in students.items() if name.split(",")[0].removeprefix("of ") in only}
    for name, own in students.items():
        committee: Setting = {"method": "committee"} if name.startswith("committee") else {}
        # a committee has losses of its own
        grid = [
            {key: value for key, value in setting.items() if key != "loss" or not committee}
            for setting in GRID
            if setting["pseudolabels"] == "soft" or not committee
        ]
        measure = partial(train, task, own, **committee)
        means = [np.mean([measure(seed, **setting)[0] for seed in choose_seeds]) for setting in grid]
        best = grid[int(np.argmax(means))]
        rows = np.array([measure(seed, **best) for seed in seeds])
        start = rows if best is grid[0] else np.array([measure(seed, **grid[0]) for seed in seeds])
        keys = ("learning_rate", "per_device_train_batch_size", "num_train_epochs", "pseudolabels")
        told = ", ".join(str(best[key]) for key in keys)
        told += " labels" + (", ELR" if "early" in best.get("loss", "") else "")
        cells = spread(rows[:, 0]), spread(rows[:, 1]), spread(start[:, 1])
        print(f"| {name} | {told} | {' | '.join(cells)} |", flush=True)


def print_self_training(task: Task, shares: list[float], seeds: list[int], label_model: str) -> None:
    """Print students without and with self-training where votes are removed."""
    print(f"Root: {label_model}. Test % over {len(seeds)} seeds.\n")
    print(
        "| votes removed | student | rate | without | with self-training | difference | above in |\n|" + " --- |" * 7
    )
    for share, setting in product(shares, (START, LONGER)):
        results: dict[str, list[tuple[float, float]]] = {}
        for seed in seeds:
            votes, rows = task.votes, np.arange(len(task.votes))
            if share:
                votes[np.random.default_rng(seed).permutation(len(votes))[: round(share * len(votes))]] = -1
            else:
                rows = rows[(votes >= 0).any(axis=1)]
            pool = task.pool(votes, rows).with_aggregate(label_model)
            # a student of the root alone rejects nothing, so that whole coverage leaves nothing to label
            students = {"csl": pool} | ({f"of {label_model}": root_alone(pool)} if share else {})
            for name, own in students.items():
                without, with_own = (
                    train(task, own, seed, self_training_rounds=rounds, **setting)[1] for rounds in (0, NUM_ROUNDS)
                )
                results.setdefault(name, []).append((without, with_own))
        for name, pairs in results.items():
            without, with_own = np.array(pairs).T
            told = f"{100 * share:.0f} % of the rows'" if share else "none, all rows covered"
            cells = [spread(values) for values in (without, with_own, with_own - without)]
            cells = [
                told,
                name,
                str(setting["learning_rate"]),
                *cells,
                f"{(with_own > without).sum()} of {len(seeds)}",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="file of arrays")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)), help="of the students")
    parser.add_argument("--choose_seeds", type=int, nargs="+", default=[0, 1, 2], help="that settings are chosen by")
    parser.add_argument("--only", nargs="+", help="students: names of label models, `csl`, `committee`; default: all")
    parser.add_argument("--remove_votes", type=float, nargs="+", help="shares of the rows; measures self-training")
    parser.add_argument("--label_model", default="shared_majority", choices=LABEL_MODELS, help="root of self-training")
    args = parser.parse_args()
    if any(not 0 <= share < 1 for share in args.remove_votes or []):
        parser.error(f"`--remove_votes` must be shares from 0 to below 1, got {args.remove_votes}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    with np.load(args.data) as arrays:
        task = Task(dict(arrays))
    if args.remove_votes:
        print_self_training(task, args.remove_votes, args.seeds, args.label_model)
    else:
        print_students(task, args.seeds, args.choose_seeds, args.only)


if __name__ == "__main__":
    main()

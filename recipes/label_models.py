"""Measure the label models on data with ground truth, beside other packages where these are installed.

    python recipes/label_models.py DATA_DIR [--seeds 0 1 2]

Read are `NAME__label.csv` (item, worker, label) with `NAME__truth.csv` (item, truth), which is how the sets of
"Truth Inference at Scale" come; `*.npz` with `train_votes` and `train_labels`, and `valid_…` where there is one; and
folders of WRENCH. Printed: right labels in % of the covered rows with ground truth, a tie by its share, and the
processor time of crowd-kit (the same model), cleanlab and snorkel's `LabelModel` (each of ours) as a multiple of
ours, in one process. A package that is not installed is left out with a line: `pip install -e ".[rivals]"`. What this
printed is in label_models.md.
"""

from __future__ import annotations

import argparse
import csv
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_cosupervise import LABEL_MODELS, PseudolabelPool, read_wrench
from hf_cosupervise.method.crowdlab import crowdlab_labels
from hf_cosupervise.method.votes import best_labels, count_votes, share_out
from hf_cosupervise.pool.votes import pool_votes

_PACKAGES = ("crowdkit", "cleanlab", "snorkel")
# Its default, and what its tutorials set.
_SNORKEL_EPOCHS = (100, 500)
_OTHERS = {"dawid_skene": "DawidSkene", "glad": "GLAD", "mace": "MACE"}


@dataclass
class VoteSet:
    """Votes `(num_rows, num_voters)`, ground truth `(num_rows,)` with -1 where it is unknown, a validation part."""

    name: str
    votes: np.ndarray
    truth: np.ndarray
    num_labels: int
    valid: tuple[np.ndarray, np.ndarray] | None = None


def read_crowd(path: Path) -> VoteSet:
    """Read a pair of CSV files."""
    with path.open(newline="", encoding="utf-8") as file:
        answers = list(csv.DictReader(file))
    with Path(str(path).replace("__label.csv", "__truth.csv")).open(newline="", encoding="utf-8") as file:
        truth = {row["item"]: row["truth"] for row in csv.DictReader(file)}
    labels = sorted({row["label"] for row in answers} | set(truth.values()))
    table = {key: [row[key] for row in answers] for key in ("item", "worker", "label")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # workers that contradict themselves
        pool = PseudolabelPool.from_answers(table, labels)
    known = np.array([labels.index(truth[item]) if item in truth else -1 for item in pool.ids.tolist()])
    return VoteSet(path.name.removesuffix("__label.csv").split("__")[-1], pool_votes(pool), known, len(labels))


def read_npz(path: Path) -> VoteSet:
    """Read arrays of votes and labels."""
    with np.load(path) as arrays:
        parts = {name: arrays[name].astype(np.int64) for name in arrays if name.endswith(("_votes", "_labels"))}
    valid = (parts["valid_votes"], parts["valid_labels"]) if "valid_votes" in parts else None
    votes, truth = parts["train_votes"], parts["train_labels"]
    return VoteSet(path.stem, votes, truth, int(max(votes.max(), truth.max())) + 1, valid)


def read_wrench_folder(folder: Path) -> VoteSet:
    """Read the training part of a data set of WRENCH, and its validation part."""
    pools = read_wrench(folder)
    found = {
        split: (pool_votes(pool), np.full(len(pool), -1) if pool.oracle_labels is None else pool.oracle_labels)
        for split, pool in pools.items()
    }
    return VoteSet(folder.name, *found["train"], len(pools["train"].labels), found.get("valid"))


def read_sets(folder: Path) -> list[VoteSet]:
    """Read all that is there."""
    sets = [read_crowd(path) for path in sorted(folder.rglob("*__label.csv"))]
    sets += [read_npz(path) for path in sorted(folder.rglob("*.npz"))]
    return sets + [read_wrench_folder(path.parent) for path in sorted(folder.rglob("train.json"))]


def right_percent(probs: np.ndarray, votes: np.ndarray, truth: np.ndarray) -> float:
    """Right labels in % of the covered rows whose label is known."""
    rows = np.flatnonzero((votes >= 0).any(axis=1) & (truth >= 0))
    return 100 * float(best_labels(probs)[rows, truth[rows]].mean())


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """What a function gives, and the processor time it took."""
    started = time.process_time()
    result = function()
    return result, time.process_time() - started


def time_crowd_kit(name: str, votes: np.ndarray) -> float:
    """Processor time of crowd-kit's model with our number of steps and starts."""
    import pandas
    from crowdkit.aggregation import classification

    rows, voters = np.nonzero(votes >= 0)
    frame = pandas.DataFrame({"task": rows, "worker": voters, "label": votes[rows, voters]})
    settings: dict[str, Any] = {"n_iter": 100}
    if name == "mace":
        settings = {"n_iter": 50, "n_restarts": 3, "random_state": np.random.RandomState(0)}
    return timed(lambda: getattr(classification, _OTHERS[name])(**settings).fit_predict_proba(frame))[1]


def compare_cleanlab(votes: np.ndarray, num_labels: int) -> str:
    """Equal labels and the ratio of processor times, with vote shares and noise for a classifier."""
    from cleanlab.multiannotator import get_label_quality_multiannotator

    votes = votes[(votes >= 0).any(axis=1)]
    votes = votes[:, (votes >= 0).any(axis=0)]
    noise = np.random.default_rng(0).dirichlet(np.ones(num_labels), len(votes))
    student = 0.5 * share_out(count_votes(votes, num_labels)) + 0.5 * noise
    own, seconds = timed(lambda: crowdlab_labels(torch.from_numpy(votes), torch.from_numpy(student)))
    given = np.where(votes >= 0, votes, np.nan)
    other, theirs = timed(lambda: get_label_quality_multiannotator(given, student, verbose=False))
    same = (own.numpy() == other["label_quality"]["consensus_label"].to_numpy()).mean()
    return f"{100 * same:.1f} % equal labels, {theirs / max(seconds, 1e-3):.0f} ×"


def compare_snorkel(data: VoteSet, seconds: dict[str, float], num_epochs: int) -> str:
    """How right snorkel's label model is, and its processor time as a multiple of each of ours."""
    from snorkel.labeling.model import LabelModel

    def fit(num_epochs: int) -> np.ndarray:
        model = LabelModel(cardinality=data.num_labels, verbose=False)
        model.fit(data.votes, n_epochs=num_epochs, seed=0, progress_bar=False)
        return model.predict_proba(data.votes)

    fit(1)  # what is loaded at the first call is nobody's speed
    probs, theirs = timed(partial(fit, num_epochs))
    ratios = ", ".join(
        f"{name} {theirs / max(own, 1e-3):.{0 if theirs > 10 * own else 1}f} ×" for name, own in seconds.items()
    )
    return f"{right_percent(probs, data.votes, data.truth):.1f} % right, {theirs:.2f} s: {ratios}"


def main() -> None:
    """Print a table of accuracies and one of times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path, help="folder with the sets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="for the models that draw random starts")
    parser.add_argument("--only", nargs="+", help="names of sets; default: all")
    parser.add_argument("--skip", nargs="+", default=[], choices=_PACKAGES, help="packages to leave out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    means: list[list[float]] = []
    times: list[tuple[str, str, float | str]] = []
    others = set()
    for package in _PACKAGES:
        if find_spec(package) is None:
            print(f"{package} is not installed: left out.")
        elif package not in args.skip:
            others.add(package)
    for kind in LABEL_MODELS.values():  # what is loaded at the first call is nobody's speed
        kind().fit([[0, 1, 1], [1, 1, 0], [0, 0, 0]])
    print(f"| set | {' | '.join(LABEL_MODELS)} |\n| --- |{' --- |' * len(LABEL_MODELS)}")
    for data in read_sets(args.data_dir):
        if args.only and data.name not in args.only:
            continue
        cells, on_valid, seconds = [], [], {}
        for name, kind in LABEL_MODELS.items():
            seeds = args.seeds if name in ("mace", "ebcc") else [None]
            models = [kind() if seed is None else kind(seed=seed) for seed in seeds]
            found = [timed(partial(model.fit_predict_proba, data.votes, data.num_labels)) for model in models]
            seconds[name] = float(np.mean([taken for _, taken in found]))
            right = [right_percent(probs, data.votes, data.truth) for probs, _ in found]
            spread = f" ({min(right):.1f} to {max(right):.1f})" if len(right) > 1 else ""
            cells.append(f"{np.mean(right):.1f}{spread}, {seconds[name]:.2f} s")
            if data.valid is not None:
                probs = models[0].predict_proba(data.valid[0])
                on_valid.append(f"{right_percent(probs, *data.valid):.1f}")
            if name in _OTHERS and "crowdkit" in others:
                times.append((data.name, name, time_crowd_kit(name, data.votes) / max(found[0][1], 1e-3)))
        print(f"| {data.name} | {' | '.join(cells)} |", flush=True)
        if on_valid:
            print(f"| {data.name}, validation | {' | '.join(on_valid)} |", flush=True)
        if "cleanlab" in others and ((data.votes >= 0).sum(axis=1) > 1).any():
            times.append((data.name, "crowdlab", compare_cleanlab(data.votes, data.num_labels)))
        if "snorkel" in others:
            for num_epochs in _SNORKEL_EPOCHS:
                times.append((data.name, f"snorkel, {num_epochs} epochs", compare_snorkel(data, seconds, num_epochs)))
        means.append([float(cell.split()[0].rstrip(",")) for cell in cells])
    if not means:
        parser.error(f"no set to measure in {args.data_dir}; give a folder with `NAME__label.csv` and its truth")
    print(f"| mean | {' | '.join(f'{mean:.1f}' for mean in np.mean(means, axis=0))} |")
    print("\n| set | model | other package's processor time |\n| --- | --- | --- |")
    for name, model, ratio in times:
        print(f"| {name} | {model} | {ratio if isinstance(ratio, str) else f'{ratio:.0f} ×'} |")


if __name__ == "__main__":
    main()

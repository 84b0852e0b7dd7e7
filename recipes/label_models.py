"""Measure the label models on data with ground truth, beside other packages where these are installed.

    python recipes/label_models.py DATA_DIR [--seeds 0 1 2] [--repeats 3]

Read are `NAME__label.csv` (item, worker, label) with `NAME__truth.csv` (item, truth), which is how the sets of
"Truth Inference at Scale" come; `*.npz` with `train_votes` and `train_labels`, and `valid_…` where there is one; and
folders of WRENCH. Printed: right labels in % of the covered rows with ground truth, a tie by its share, and the
processor time of crowd-kit (the same model), cleanlab and snorkel's `LabelModel` (each of ours) as a multiple of
ours, in one process and one thread; with `--repeats`, all in turns so often, and the median with the least and the
greatest. A package that is not installed is left out with a line: `pip install -e ".[rivals]"`. What this printed is
in label_models.md.
"""

from __future__ import annotations

import argparse
import csv
import sys
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
from hf_cosupervise.pool.derived import pool_votes

_PACKAGES = ("crowdkit", "cleanlab", "snorkel")
# Its default, and what its tutorials set.
_SNORKEL_EPOCHS = (100, 500)
# A tick of the clock is no speed.
_LEAST_SECONDS = 1e-3
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


def compare_cleanlab(votes: np.ndarray, num_labels: int) -> tuple[float, float]:
    """Equal labels in % and the ratio of processor times, with vote shares and noise for a classifier."""
    from cleanlab.multiannotator import get_label_quality_multiannotator

    votes = votes[(votes >= 0).any(axis=1)]
    votes = votes[:, (votes >= 0).any(axis=0)]
    noise = np.random.default_rng(0).dirichlet(np.ones(num_labels), len(votes))
    student = 0.5 * share_out(count_votes(votes, num_labels)) + 0.5 * noise
    own, seconds = timed(lambda: crowdlab_labels(torch.from_numpy(votes), torch.from_numpy(student)))
    given = np.where(votes >= 0, votes, np.nan)
    other, theirs = timed(lambda: get_label_quality_multiannotator(given, student, verbose=False))
    same = (own.numpy() == other["label_quality"]["consensus_label"].to_numpy()).mean()
    return 100 * float(same), theirs / max(seconds, _LEAST_SECONDS)


def run_snorkel(data: VoteSet, num_epochs: int) -> tuple[float, float]:
    """How right snorkel's label model is, in %, and its processor time."""
    from snorkel.labeling.model import LabelModel

    def fit() -> np.ndarray:
        model = LabelModel(cardinality=data.num_labels, verbose=False)
        model.fit(data.votes, n_epochs=num_epochs, seed=0, progress_bar=False)
        return model.predict_proba(data.votes)

    probs, seconds = timed(fit)
    return right_percent(probs, data.votes, data.truth), seconds


def measure_times(data: VoteSet, others: set[str], repeats: int) -> dict[str, list[float]]:
    """Ratios of processor times by what is compared, and how right or equal others are, once per repeat."""
    found: dict[str, list[float]] = {}
    for _ in range(repeats):
        own = {
            name: max(timed(partial(kind().fit_predict_proba, data.votes, data.num_labels))[1], _LEAST_SECONDS)
            for name, kind in LABEL_MODELS.items()
        }
        if "crowdkit" in others:
            for name in _OTHERS:
                found.setdefault(f"crowd-kit, {name}", []).append(time_crowd_kit(name, data.votes) / own[name])
        if "cleanlab" in others and ((data.votes >= 0).sum(axis=1) > 1).any():
            equal, ratio = compare_cleanlab(data.votes, data.num_labels)
            found.setdefault("cleanlab", []).append(ratio)
            found.setdefault("cleanlab, % equal labels", []).append(equal)
        for num_epochs in _SNORKEL_EPOCHS if "snorkel" in others else ():
            right, seconds = run_snorkel(data, num_epochs)
            title = f"snorkel, {num_epochs} epochs"
            found.setdefault(f"{title}, % right", []).append(right)
            for name, taken in own.items():
                if name != "shared_majority":
                    found.setdefault(f"{title}, to {name}", []).append(seconds / taken)
    return found


def told(values: list[float], is_percent: bool = False) -> str:
    """The median, and the least and the greatest where these differ."""
    some = np.median(values), min(values), max(values)
    texts = [f"{value:.0f}" if value >= 10 and not is_percent else f"{value:.1f}" for value in some]
    return texts[0] if texts[1] == texts[2] else f"{texts[0]} ({texts[1]} to {texts[2]})"


def main() -> None:
    """Print a table of accuracies and one of times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path, help="folder with the sets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="for the models that draw random starts")
    parser.add_argument("--repeats", type=int, default=1, help="how often all are timed, in turns")
    parser.add_argument("--only", nargs="+", help="names of sets; default: all")
    parser.add_argument("--skip", nargs="+", default=[], choices=_PACKAGES, help="packages to leave out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    means: list[list[float]] = []
    times: dict[str, dict[str, list[float]]] = {}
    others = set()
    for package in _PACKAGES:
        if find_spec(package) is None:
            print(f"{package} is not installed: left out.")
        elif package not in args.skip:
            others.add(package)
    few = np.array([[0, 1, 1], [1, 1, 0], [0, 0, 0], [1, 0, 1]])
    measure_times(VoteSet("few", few, few[:, 0], 2), others, 1)  # what is loaded at the first call is nobody's speed
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
        print(f"| {data.name} | {' | '.join(cells)} |", flush=True)
        if on_valid:
            print(f"| {data.name}, validation | {' | '.join(on_valid)} |", flush=True)
        times[data.name] = measure_times(data, others, args.repeats)
        done = ", ".join(f"{what} {told(values, '%' in what)}" for what, values in times[data.name].items())
        print(f"{data.name}: {done}", file=sys.stderr, flush=True)  # it may take minutes until the table
        means.append([float(cell.split()[0].rstrip(",")) for cell in cells])
    if not means:
        parser.error(f"no set to measure in {args.data_dir}; give a folder with `NAME__label.csv` and its truth")
    print(f"| mean | {' | '.join(f'{mean:.1f}' for mean in np.mean(means, axis=0))} |")
    print(f"\n| times ours | {' | '.join(times)} |\n| --- |{' --- |' * len(times)}")
    for what in dict.fromkeys(what for found in times.values() for what in found):
        texts = [told(found[what], is_percent="%" in what) if what in found else "–" for found in times.values()]
        print(f"| {what} | {' | '.join(texts)} |")


if __name__ == "__main__":
    main()

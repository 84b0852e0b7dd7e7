"""From votes in a CSV file to a student: what the voters say, all label models, their students, and the committee.

    python recipes/weak_supervision.py --votes votes.csv --student sentence-transformers/all-MiniLM-L6-v2 \\
        --output_dir outputs/votes --validation valid.csv --test test.csv --oracle_column label

The file has an input column such as `text`, and a column of votes per labelling function or worker, whose names begin
with `lf_`: label names or ids; nothing, NaN or -1 is no vote. For `--student linear` the input is a vector: numbers in
several columns (`--input_column age,income`), or in a Parquet file a column of lists. With labels in another file
(`--validation`), the label model with most right labels on its covered rows is at the root of the co-supervised
student; without, `--label_model`. Accuracy on `--test` is printed where it is given, and read for nothing else. With
`--self_training_rounds 5` a further co-supervised student labels itself, after its last level, the rows that no
function labelled, and those rejected. Each student is left in a folder of its name, as `pipeline` loads it.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from hf_cosupervise import (
    LABEL_MODELS,
    CoSupervisedConfig,
    CoSupervisedTrainer,
    PseudolabelPool,
    TeacherHierarchy,
    build_pool,
    hierarchy_from_columns,
    make_label_model,
)
from hf_cosupervise.arguments import parse_recipe_args
from hf_cosupervise.data.local import load_table
from hf_cosupervise.method.label_model import LabelModel
from hf_cosupervise.method.votes import best_labels, information
from hf_cosupervise.pool.derived import pool_votes


@dataclass
class VoteArguments:
    """Say where the votes are, and what is to learn from them."""

    votes: str = field(metadata={"help": "CSV or Parquet file with an input column and columns of votes."})
    student: str = field(metadata={"help": "Hub id or folder of the student; `linear` or `mlp` for vectors."})
    prefix: str = field(default="lf_", metadata={"help": "How the names of the columns of votes begin."})
    labels: list[str] | None = field(default=None, metadata={"help": "Label names. Default: those that are voted."})
    input_column: str | None = field(default=None, metadata={"help": "Column that the student reads. Default: found."})
    oracle_column: str | None = field(default=None, metadata={"help": "Column of ground truth, where files have one."})
    validation: str | None = field(default=None, metadata={"help": "Such a file with ground truth to choose by."})
    test: str | None = field(default=None, metadata={"help": "Such a file with ground truth to measure students on."})
    label_model: str = field(default="ebcc", metadata={"help": "At the root, without `--validation`."})


def read_table(path: str) -> Dataset:
    """Read a file; in a CSV file "NaN" and its kin are no votes."""
    return Dataset.from_csv(path) if path.endswith(".csv") else load_table(path)


def read_pool(args: VoteArguments, path: str, hierarchy: TeacherHierarchy | None = None) -> PseudolabelPool:
    """Read one file of votes; ground truth counts where the file has it."""
    data = read_table(path)
    oracle = args.oracle_column if args.oracle_column in data.column_names else None
    hierarchy = hierarchy or hierarchy_from_columns(data, args.prefix, args.labels)
    return build_pool(data, hierarchy, input_column=args.input_column, oracle_column=oracle, disable_tqdm=True)


def right_share(probs: np.ndarray, pool: PseudolabelPool) -> float:
    """Share of right labels among the covered rows, ties by their share; NaN without ground truth."""
    covered = np.flatnonzero(probs.any(axis=1))
    if pool.oracle_labels is None or not len(covered):
        return float("nan")
    return float(best_labels(probs)[covered, pool.oracle_labels[covered]].mean())


def tell_share(share: float) -> str:
    """Write a share in percent, a dash where nobody knows it."""
    return "–" if np.isnan(share) else f"{100 * share:.1f}"


def fit_label_models(pool: PseudolabelPool, valid: PseudolabelPool | None) -> dict[str, tuple[LabelModel, float]]:
    """Fit every label model and print what it makes of the votes; those that cannot use them say so."""
    votes, found = pool_votes(pool), {}
    print(
        "\n| label model | information (nats) | right % | right % on the validation file |\n| --- | --- | --- | --- |"
    )
    for name in LABEL_MODELS:
        model = make_label_model(name)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                probs = model.fit_predict_proba(votes, len(pool.labels), pool.hierarchy.names)
            except (ImportError, ValueError) as error:
                print(f"| {name} | {error} | | |")
                continue
        on_valid = float("nan") if valid is None else right_share(model.predict_proba(pool_votes(valid)), valid)
        told, right = information(probs[probs.any(axis=1)]), right_share(probs, pool)
        print(f"| {name} | {told:.3f} | {tell_share(right)} | {tell_share(on_valid)} |")
        found[name] = model, on_valid
        for warning in caught:
            print(f"({warning.message})")
    return found


def train_student(
    args: VoteArguments, config: CoSupervisedConfig, pool: PseudolabelPool, name: str, self_training_rounds: int = 0
) -> torch.Tensor:
    """Train one student, and give its log-probabilities on the test file `(num_rows, num_labels)`."""
    own = copy.copy(config)
    own.self_training_rounds = self_training_rounds
    own.output_dir = str(Path(config.output_dir, name))
    trainer = CoSupervisedTrainer(args.student, own, pool=pool)
    trainer.train()
    trainer.save_model()
    if args.test is None:
        return torch.zeros(0, len(pool.labels))
    return torch.cat([log_probs.cpu() for _, log_probs in trainer.predict_log_probs(read_table(args.test))])


def standardize(log_probs: torch.Tensor) -> torch.Tensor:
    """Subtract the mean of each row, and divide by the deviation of all: students count alike in a committee."""
    centred = log_probs - log_probs.mean(dim=1, keepdim=True)
    return centred / centred.std().clamp(min=1e-6)


def main() -> None:
    """Print the tables, and leave the students in folders."""
    args, config = parse_recipe_args([VoteArguments, CoSupervisedConfig])
    if (config.method, config.student_training, config.head_solver) == ("csl", "probe", "steps"):
        config.standardize_features = not config.warm_start  # else some hundred rows move a head by steps too little
    pool = read_pool(args, args.votes)
    valid = None if args.validation is None else read_pool(args, args.validation, pool.hierarchy)
    test = None if args.test is None else read_pool(args, args.test, pool.hierarchy)
    print(pool.describe())
    models = fit_label_models(pool, valid)
    chosen = args.label_model if valid is None else max(models, key=lambda name: models[name][1])
    predictions = {}
    for name, (model, _) in models.items():
        with_root = pool.with_aggregate(model)
        root = TeacherHierarchy(pool.labels, with_root.hierarchy.teachers[:1])
        predictions[f"student of {name}"] = train_student(args, config, with_root.with_hierarchy(root), name)
    co_supervised = pool.with_aggregate(models[chosen][0])
    predictions[f"co-supervised from {chosen}"] = train_student(args, config, co_supervised, "co-supervised")
    if rounds := config.self_training_rounds:
        name = f"co-supervised from {chosen}, self-trained"
        predictions[name] = train_student(args, config, co_supervised, "self-trained", rounds)
    print(f"\nStudents: the folders in {config.output_dir}; `co-supervised` learns from all voters.")
    if test is None or test.oracle_labels is None:
        return
    predictions["committee of all"] = torch.stack([standardize(each) for each in predictions.values()]).mean(dim=0)
    print("\n| | right % on the test file |\n| --- | --- |")
    for name, log_probs in predictions.items():
        right = (log_probs.argmax(dim=1).numpy() == test.oracle_labels).mean()
        print(f"| {name} | {100 * right:.1f} |")


if __name__ == "__main__":
    main()

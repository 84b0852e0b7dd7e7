"""The rows that are labelled: what models read of them, their ids, and ground truth, which none of them sees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from typing import Any

from datasets import ClassLabel, Dataset, Value

from ..data.columns import as_label_id, find_input_column, shorten
from ..data.inputs import check_depth
from ..data.keys import row_keys
from ..data.vectors import join_columns, parts_of
from ..hierarchy import TeacherHierarchy, is_writable_text
from ..pool.pseudolabels import ORACLE_DOMAIN, ORACLE_LABEL
from ..pool.written import ORACLE_ANSWER, find_prompt_column
from .kinds.base import ROW, TeacherModel, label_finder
from .kinds.loading import column_of
from .running import Columns, read_names

# Column names that usually hold ground truth. Any `ClassLabel` column is taken for ground truth as well.
_GOLD_NAMES = frozenset(
    ("label", "labels", "target", "targets", "gold", "gold_label", "ground_truth", "class", "y", "coarse_label")
    + ("fine_label", "label_ids", ORACLE_LABEL, ORACLE_DOMAIN)
)
_GOLD_ANSWERS = frozenset(("answer", "answers", "completion", "reference", "solution", ORACLE_ANSWER))


def undeclared_truth(
    dataset: Dataset, allowed: Container[str | None], others: frozenset[str] = frozenset()
) -> list[str]:
    """Name the columns that look like ground truth, but for those that are known to be something else."""
    return [
        name
        for name, feature in dataset.features.items()
        if (name.lower() in _GOLD_NAMES | others or isinstance(feature, ClassLabel)) and name not in allowed
    ]


def read_rows(
    dataset: Dataset,
    hierarchy: TeacherHierarchy,
    models: Mapping[str, TeacherModel],
    reused: frozenset[str],
    input_column: str | None,
    oracle_column: str | None,
    oracle_domain_column: str | None,
    keep_inputs: bool = True,
) -> tuple[Dataset, Columns, list[int] | list[str], Dataset | None]:
    """Give data with the column that models read, which columns are read, the ids, and what the pool keeps."""
    # A format such as "torch" would hand out tensors in place of cells.
    dataset = dataset.with_format(None)
    if len(dataset) == 0:
        raise ValueError("`dataset` must hold at least one example, got none. Check its split or its filter.")
    # Before columns are joined: in one vector nobody would see the ground truth any more.
    truth = {oracle_column, oracle_domain_column, *undeclared_truth(dataset, ())}
    if truth := truth.intersection(parts_of(dataset, input_column)):
        raise ValueError(
            f"Ground truth must reach no student, got {sorted(map(str, truth))} in `input_column`. Leave it out there."
        )
    dataset, input_column = join_columns(dataset, input_column)
    columns = check_columns(dataset, hierarchy, models, reused, input_column, oracle_column, oracle_domain_column)
    ids = find_ids(dataset, columns.inputs)
    return dataset, columns, ids, pool_inputs(dataset, ids, hierarchy, columns, keep_inputs)


def check_columns(
    dataset: Dataset,
    hierarchy: TeacherHierarchy,
    models: Mapping[str, TeacherModel],
    reused: frozenset[str],
    input_column: str | None,
    oracle_column: str | None,
    oracle_domain_column: str | None,
) -> Columns:
    """Find the input column, and refuse ground truth that nobody declared."""
    read = {teacher.name: column_of(teacher) for teacher in hierarchy.teachers}
    # An object is read in place of what the hierarchy says, so that its column counts.
    read |= {name: model.column for name, model in models.items()}
    answers = {column: name for name, column in read.items() if column not in (None, ROW)}
    declared = {"`oracle_column`": oracle_column, "`oracle_domain_column`": oracle_domain_column}
    declared |= {f"`model` of teacher '{name}'": column for column, name in answers.items() if name not in reused}
    for what, column in declared.items():
        if column is not None and column not in dataset.column_names:
            raise ValueError(
                f"{what} must be a column of the data {dataset.column_names}, got {column!r}. Correct the name."
            )
    if oracle_column is not None and oracle_column in answers:
        raise ValueError(
            f"Ground truth must reach no teacher, got column '{oracle_column}' both as `oracle_column` and as "
            f"the answers of teacher '{answers[oracle_column]}'. Leave one of the two out."
        )
    writes = not hierarchy.labels
    allowed = {*answers, oracle_column, oracle_domain_column, input_column}
    undeclared = undeclared_truth(dataset, allowed, _GOLD_ANSWERS if writes else frozenset())
    if undeclared:
        raise ValueError(
            f"Data for a pool must hold no undeclared ground truth, got the columns {undeclared}. Keep one for "
            f"analysis with `oracle_column={undeclared[0]!r}`, or drop them with "
            f"`dataset.remove_columns({undeclared})`."
        )
    # Where all answers are in columns nothing is read, unless ids are to be made of it.
    is_needed = input_column is not None or None in read.values()
    if is_needed or "id" not in dataset.column_names:
        # Answers may be lists of numbers too, and are nobody's input unless it is said.
        found_in = dataset if input_column else dataset.remove_columns([*{*answers} & {*dataset.column_names}])
        input_column = (find_prompt_column if writes else find_input_column)(found_in, input_column)
        check_depth(dataset, input_column)
    return Columns(input_column, oracle_column, oracle_domain_column, read)


def find_ids(dataset: Dataset, input_column: str | None) -> list[int] | list[str]:
    """The ids in the data, or else keys made of the content."""
    if "id" not in dataset.column_names:
        # From the content, so that the same rows have the same ids in any order.
        return row_keys(dataset, str(input_column))
    ids = list(dataset["id"][:])
    # Of one kind, by which Arrow stores them; True is an integer to Python.
    wanted = str if isinstance(ids[0], str) else int
    if wrong := [row for row, value in enumerate(ids) if not isinstance(value, wanted) or isinstance(value, bool)]:
        raise ValueError(
            f"Column `id` must hold a string, or else an integer, in every row, got {ids[wrong[0]]!r} in "
            f"row {wrong[0]}. Fill it, or drop the column to have ids made of the content."
        )
    if wanted is str and (wrong := [row for row, value in enumerate(ids) if not is_writable_text(value)]):
        raise ValueError(f"Column `id` must hold no NUL, got {ids[wrong[0]]!r} in row {wrong[0]}. Rename it.")
    if len(set(ids)) < len(ids):
        [(repeated, count)] = Counter(ids).most_common(1)
        raise ValueError(
            f"Column `id` must be unique, got {repeated!r} {count} times. Renumber it, or drop the column to have ids "
            "made of the content."
        )
    return ids


def pool_inputs(
    dataset: Dataset, ids: Sequence[int | str], hierarchy: TeacherHierarchy, columns: Columns, keep_inputs: bool
) -> Dataset | None:
    """What the pool keeps of the data: inputs and metadata, ground truth under its `oracle_` names, and ids."""
    # Answers live on as pseudolabels; a column called `label` among the inputs would be taken for ground truth later.
    dropped = {teacher.model for teacher in hierarchy.teachers if teacher.kind == "column"}
    dropped -= {columns.inputs, columns.oracle_domain}
    if not keep_inputs and columns.inputs is not None:
        dropped.add(columns.inputs)
    inputs = dataset.remove_columns(sorted(dropped & set(dataset.column_names)))
    if columns.oracle is not None and not hierarchy.labels:
        inputs = inputs.rename_column(columns.oracle, ORACLE_ANSWER)
    elif columns.oracle is not None:
        gold = _oracle_label_ids(dataset, columns.oracle, hierarchy.labels)
        inputs = inputs.remove_columns(columns.oracle)
        inputs = inputs.add_column(ORACLE_LABEL, gold, feature=ClassLabel(names=list(hierarchy.labels)))
    if columns.oracle_domain is not None:
        domains = ["" if value is None else str(value) for value in read_names(dataset, columns.oracle_domain)]
        inputs = inputs.remove_columns(columns.oracle_domain)
        inputs = inputs.add_column(ORACLE_DOMAIN, domains, feature=Value("string"))
    if "id" not in inputs.column_names:
        inputs = inputs.add_column("id", list(ids)) if inputs.column_names else Dataset.from_dict({"id": list(ids)})
    return inputs if inputs.column_names != ["id"] else None


def _oracle_label_ids(dataset: Dataset, column: str, labels: Sequence[str]) -> list[int]:
    """Ground truth as label ids of the task, mapped by name where it has names."""
    values = read_names(dataset, column)
    positions: dict[Any, int | None] = {}
    find = label_finder(labels)
    # Each value is looked up once: a million rows hold few of them.
    for value in set(values):
        if isinstance(value, str):
            positions[value] = find(value)
        else:
            label = as_label_id(value)
            positions[value] = label if isinstance(label, int) and 0 <= label < len(labels) else None
    if unknown := [value for value, position in positions.items() if position is None]:
        raise ValueError(
            f"Column '{column}' must hold labels of the task {shorten(labels)} (or their ids) in every row, got "
            f"{unknown[:5]}, first in row {values.index(unknown[0])}. Rename them or drop these rows."
        )
    return [int(positions[value]) for value in values]  # type: ignore[arg-type]

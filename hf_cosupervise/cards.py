"""Facts become a model card or a data-set card; what is not known is left out."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import (
    CardData,
    DatasetCard,
    DatasetCardData,
    EvalResult,
    ModelCard,
    ModelCardData,
    RepoCard,
)

TAGS = ("co-supervised-learning", "weak-to-strong")
PIPELINE_TAGS = {"image": "image-classification", "text": "text-classification"}
_TEMPLATES = Path(__file__).parent / "templates"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_MAX_NAMES = 6
_MAX_LABELS = 100


def model_card(facts: Mapping[str, Any]) -> str:
    """Write the model card of a student.

    Every fact is optional; one that is absent, `None` or NaN is left out of the card, never guessed. Numbers marked
    (s) are one number or a list with one per seed; accuracies, rates and PGR are fractions and printed in percent.

    Args:
        facts (`Mapping[str, Any]`):
            - `name`, `hub_model_id`, `license`, `language` (`str`);
            - `modality` (`"image"` or `"text"`), which decides `pipeline_tag` and the snippet;
            - `library_name` (`str`, default `"transformers"`), `tags` and `datasets` (`list[str]`, Hub ids);
            - `base_model`, `base_model_revision`, `student_training`, `pool` (`str`), `has_adapter` (`bool`);
            - `labels` (`list[str]`), `num_examples` (`int`, in the pool);
            - `teachers` (`list[dict]`): `name`, `model`, `kind`, `revision`, `level`, `scope`, `domains` as in
              [`Teacher`], `accuracy` (s);
            - `levels` (`list[dict]`): `level`, `assignment`, `keep_rate` (s), `num_kept` (s), `accuracy` (s),
              `pgr` (s), `teachers` (shares (s) by name); by default those of the report;
            - `report` (`dict`): `weak_accuracy` (s), `methods` (`accuracy` (s) and `pgr` (s) by method, of which `csl`
              is this student and `ceiling` the one with ground truth), `seeds`, `levels`, see [`plot_pgr`];
            - `seed` (`int`): which of the seeds this student is;
            - `dataset_name`, `dataset_type`, `dataset_split` (`str`, what the report was measured on);
            - `figure` (`str`, path in the repo), `hyperparameters` (`dict`, those that are not defaults; folders and
              secrets are left out) and `versions` (`dict`).

    Returns:
        `str`: Markdown with a YAML header; it ends with a line break.

    Raises:
        ValueError: If `modality` is neither `"image"` nor `"text"`.
    """
    facts = _known(facts)
    report = facts.get("report", {})
    name = _escape(facts.get("name") or facts.get("hub_model_id", "Co-supervised student").split("/")[-1])
    body = {
        "name": name,
        "modality": facts.get("modality"),
        "num_labels": len(facts.get("labels", [])),
        "base_model_text": _model_text(facts.get("base_model"), facts.get("base_model_revision")),
        "student_training": facts.get("student_training"),
        "num_examples": _count(facts.get("num_examples")),
        "pool_text": _model_text(facts.get("pool"), prefix="datasets/"),
        "usage": _usage(facts),
        "has_adapter": facts.get("has_adapter"),
        "labels_text": _label_list(facts.get("labels", [])),
        "evaluation_intro": _evaluation_intro(facts, report),
        "evaluation_table": _evaluation_table(report),
        "pgr_text": _pgr_text(report),
        "figure": facts.get("figure"),
        "teachers_table": _teachers_table(facts.get("teachers", [])),
        "levels_table": _levels_table(facts.get("levels") or report.get("levels", [])),
        "hyperparameters_table": _hyperparameters_table(facts.get("hyperparameters", {})),
        "versions_text": _versions_text(facts.get("versions", {})),
    }
    return _render(ModelCard, _model_metadata(facts, name), "model_card.md", body)


def pool_card(facts: Mapping[str, Any]) -> str:
    """Write the data-set card of a pool, with one configuration per teacher for `datasets.load_dataset`.

    Every fact but `teachers` is optional; one that is absent or `None` is left out, never guessed.

    Args:
        facts (`Mapping[str, Any]`):
            - `teachers` (`list[dict]`, not empty): `name` (the folder `teachers/<name>`), `model`, `kind`, `revision`,
              `level`, `scope`, `domains`, `pool_k`, `dropped_mass` (mean mass left out, 0 to 1), `answered` (share of
              the examples, 0 to 1), `accuracy`;
            - `name`, `hub_dataset_id`, `license`, `source_dataset` (`str`), `tags` (`list[str]`);
            - `modality` (`"image"` or `"text"`), `labels` (`list[str]`), `num_examples` (`int`);
            - `input_columns` (`list[str]`): columns of `inputs`, absent where the pool holds no inputs;
            - `versions` (`dict`).

    Returns:
        `str`: Markdown with a YAML header; it ends with a line break.

    Raises:
        ValueError: If there is no teacher, one is named `inputs`, or `modality` is not known.
    """
    facts = _known(facts)
    teachers, columns = facts.get("teachers", []), facts.get("input_columns", [])
    names = [teacher["name"] for teacher in teachers]
    if not names or "inputs" in names:
        raise ValueError(f"A pool needs teachers, none of them named 'inputs', got {names}. Rename the teacher.")
    oracle = [f"`{column}`" for column in columns if column.startswith("oracle_")]
    body = {
        "name": _escape(facts.get("name") or facts.get("hub_dataset_id", "Pool of pseudolabels").split("/")[-1]),
        "num_teachers_text": "one teacher" if len(names) == 1 else f"{len(names)} teachers",
        "num_examples": _count(facts.get("num_examples")),
        "source_text": _model_text(facts.get("source_dataset"), prefix="datasets/"),
        "has_inputs": bool(columns),
        "hub_dataset_id": facts.get("hub_dataset_id"),
        "first_teacher": names[0],
        "oracle_columns": " and ".join(oracle),
        "many_oracle_columns": len(oracle) > 1,
        "labels_text": _label_list(facts.get("labels", [])),
        "teachers_table": _teachers_table(teachers),
        "versions_text": _versions_text(facts.get("versions", {})),
    }
    return _render(DatasetCard, _pool_metadata(facts, names), "pool_card.md", body)


def write_card(text: str, folder: str | os.PathLike[str]) -> Path:
    """Write a card as the `README.md` of a folder, whole or not at all.

    Args:
        text (`str`):
            What [`model_card`] or [`pool_card`] gave.
        folder (`str` or `os.PathLike`):
            An existing folder; an older card is replaced.

    Returns:
        `pathlib.Path`: The card.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"`folder` must exist, got '{folder}'. Save the model or pool there first.")
    temporary = folder / ".README.md.tmp"
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, folder / "README.md")
    return folder / "README.md"


def _render(kind: type[RepoCard], metadata: CardData, template: str, body: Mapping[str, Any]) -> str:
    card = kind.from_template(metadata, template_path=str(_TEMPLATES / template), **body)
    return str(card).rstrip() + "\n"


# ── headers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _model_metadata(facts: Mapping[str, Any], name: str) -> ModelCardData:
    base_model = facts.get("base_model")
    results = _eval_results(facts)
    return ModelCardData(
        language=facts.get("language"),
        license=facts.get("license"),
        library_name=facts.get("library_name", "transformers"),
        tags=[*TAGS, *facts.get("tags", [])],
        base_model=base_model if base_model and _is_hub_id(base_model) else None,
        datasets=[dataset for dataset in facts.get("datasets", []) if _is_hub_id(dataset)] or None,
        pipeline_tag=_pipeline_tag(facts),
        model_name=name if results else None,
        eval_results=results or None,
        metrics=["accuracy"] if results else None,
    )


def _eval_results(facts: Mapping[str, Any]) -> list[EvalResult]:
    """The student's measured accuracy; the Hub wants to know on what."""
    report = facts.get("report", {})
    values = report.get("methods", {}).get("csl", {}).get("accuracy")
    if facts.get("seed") in report.get("seeds", []):
        values = values[report["seeds"].index(facts["seed"])]  # of this student, not of all of them
    numbers, dataset, task = _numbers(values), facts.get("dataset_name"), _pipeline_tag(facts)
    if not len(numbers) or not dataset or not task:
        return []
    return [
        EvalResult(
            task_type=task,
            dataset_type=facts.get("dataset_type", dataset),
            dataset_name=dataset,
            dataset_split=facts.get("dataset_split"),
            metric_type="accuracy",
            metric_name="Accuracy" if len(numbers) == 1 else f"Accuracy (mean of {len(numbers)} seeds)",
            metric_value=round(float(numbers.mean()), 4),
        )
    ]


def _pool_metadata(facts: Mapping[str, Any], names: Sequence[str]) -> DatasetCardData:
    inputs = {"config_name": "inputs", "data_files": "inputs/data.arrow", "default": True}
    teachers = [{"config_name": name, "data_files": f"teachers/{name}/data.arrow"} for name in names]
    task, num_examples = _pipeline_tag(facts), facts.get("num_examples")
    source = facts.get("source_dataset")
    return DatasetCardData(
        license=facts.get("license"),
        task_categories=[task] if task else None,
        size_categories=[_size_category(num_examples)] if num_examples else None,
        source_datasets=[source] if source and _is_hub_id(source) else None,
        tags=[*TAGS, "pseudolabels", *facts.get("tags", [])],
        configs=[inputs, *teachers] if facts.get("input_columns") else teachers,
    )


def _pipeline_tag(facts: Mapping[str, Any]) -> str | None:
    modality = facts.get("modality")
    if modality is not None and modality not in PIPELINE_TAGS:
        raise ValueError(
            f"`modality` must be one of {list(PIPELINE_TAGS)}, got {modality!r}. Leave out what does not fit."
        )
    return PIPELINE_TAGS.get(str(modality))


def _size_category(num_examples: int) -> str:
    """The Hub's word for a number of rows."""
    bounds = [(10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M")]
    return next((name for bound, name in bounds if num_examples < bound), "n>10M")


# ── sentences and tables ────────────────────────────────────────────────────────────────────────────────────────────


def _usage(facts: Mapping[str, Any]) -> str:
    """A snippet that runs as printed: by the Hub id, or in the model's folder."""
    task, model = _pipeline_tag(facts), facts.get("hub_model_id", ".")
    if task is None:
        return ""
    where = "" if "hub_model_id" in facts else "  # this folder, or its id on the Hub"
    load = f'classifier = pipeline("{task}", model="{model}"){where}'
    if facts["modality"] == "text":
        return f'from transformers import pipeline\n\n{load}\nprint(classifier("A text to classify."))'
    lines = ["from PIL import Image", "from transformers import pipeline", "", load]
    lines.append('image = Image.new("RGB", (224, 224))  # or Image.open("photo.jpg")')
    return "\n".join([*lines, "print(classifier(image))"])


def _evaluation_intro(facts: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    where = "the test set"
    if "dataset_name" in facts:
        split = f" ({_escape(facts['dataset_split'])})" if "dataset_split" in facts else ""
        where = f"{_escape(facts['dataset_name'])}{split}"
    seeds = report.get("seeds", [])
    over = f", mean ± standard deviation over seeds {_join(seeds)}" if len(seeds) > 1 else ""
    one = f", seed {seeds[0]}" if len(seeds) == 1 else ""
    this = f" This repository holds the student of seed {facts['seed']}." if len(seeds) > 1 and "seed" in facts else ""
    return f"Accuracy on {where}{over}{one}. Every method trains the same student by the same recipe.{this}"


def _evaluation_table(report: Mapping[str, Any]) -> str:
    rows: list[dict[str, Any]] = [{"method": "weak teacher", "accuracy": report.get("weak_accuracy")}]
    for name, numbers in report.get("methods", {}).items():
        title = {"csl": "**co-supervised (this model)**", "ceiling": "ceiling (ground truth)"}.get(name, _escape(name))
        # The ceiling recovers all of the gap by definition.
        rows.append({"method": title, **numbers} | ({"pgr": None} if name == "ceiling" else {}))
    cells = [[row["method"], _percent(row.get("accuracy")), _percent(row.get("pgr"))] for row in rows]
    return _table(["method", "accuracy %", "PGR %"], [row for row in cells if any(row[1:])])


def _pgr_text(report: Mapping[str, Any]) -> str:
    """PGR with the three numbers that it is made of."""
    methods = report.get("methods", {})
    weak, ceiling = _percent(report.get("weak_accuracy")), _percent(methods.get("ceiling", {}).get("accuracy"))
    student, pgr = (_percent(methods.get("csl", {}).get(name)) for name in ("accuracy", "pgr"))
    if not all((weak, ceiling, student, pgr)):
        return ""
    return (
        f"Performance gap recovered (PGR) = (student - weak) / (ceiling - weak) = **{pgr} %**, with student "
        f"{student} %, weak teacher {weak} % and ceiling {ceiling} %; the ceiling is the same student trained with "
        "ground truth."
    )


def _teachers_table(teachers: Sequence[Mapping[str, Any]]) -> str:
    headers = ["level", "teacher", "model", "revision", "scope", "domains", "kept labels", "mass left out %"]
    headers += ["answered %", "accuracy %"]
    rows = []
    for teacher in map(_known, teachers):
        revision = str(teacher.get("revision", ""))
        rows.append([
            str(teacher.get("level", "")),
            f"`{_escape(teacher['name'])}`" if "name" in teacher else "",
            _teacher_model_text(teacher),
            f"`{revision[:12] if re.fullmatch('[0-9a-f]{40}', revision) else _escape(revision)}`" if revision else "",
            _short_list(teacher.get("scope")),
            _short_list(teacher.get("domains")),
            str(teacher.get("pool_k", "")),
            _percent(teacher.get("dropped_mass") or None),
            _percent(teacher.get("answered")),
            _percent(teacher.get("accuracy")),
        ])  # fmt: skip
    return _table(headers, rows)


def _levels_table(levels: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for level in map(_known, levels):
        shares = {_escape(name): _percent(share, spread=False) for name, share in level.get("teachers", {}).items()}
        rows.append([
            str(level.get("level", "")),
            _escape(level.get("assignment", "")),
            ", ".join(f"{name} {share}" for name, share in shares.items() if share),
            _percent(level.get("keep_rate")),
            _count(level.get("num_kept")),
            _percent(level.get("accuracy")),
            _percent(level.get("pgr")),
        ])  # fmt: skip
    headers = ["level", "assignment", "examples per teacher %", "keep rate %", "kept examples", "accuracy %", "PGR %"]
    return _table(headers, rows)


def _hyperparameters_table(values: Mapping[str, Any]) -> str:
    # A card tells how a model was trained, not where, and keeps no secrets.
    shown = {name: value for name, value in values.items() if not name.endswith(("_dir", "token"))}
    rows = [[f"`{_escape(name)}`", f"`{_escape(value)}`"] for name, value in shown.items() if not _is_absolute(value)]
    return _table(["argument", "value"], rows)


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table without the columns that nothing is known about; empty without rows."""
    used = [column for column in range(len(headers)) if any(row[column] for row in rows)]
    shown = [[row[column] for column in used] for row in [headers, *rows]]
    lines = ["".join(f"| {cell} " if cell else "| " for cell in cells) + "|" for cells in shown]
    return "\n".join([lines[0], "| --- " * len(used) + "|", *lines[1:]]) if used else ""


# ── words and numbers ───────────────────────────────────────────────────────────────────────────────────────────────


def _known(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if value is not None}


def _numbers(value: Any) -> np.ndarray:
    """What is known of one number or a list of them."""
    values = value if isinstance(value, list | tuple) else [value]
    numbers = np.array([np.nan if item is None else float(item) for item in values])
    return numbers[~np.isnan(numbers)]


def _percent(value: Any, *, spread: bool = True) -> str:
    numbers = 100 * _numbers(value)
    if not len(numbers):
        return ""
    return f"{numbers.mean():.1f}" + (f" ± {numbers.std(ddof=1):.1f}" if spread and len(numbers) > 1 else "")


def _count(value: Any) -> str:
    numbers = _numbers(value)
    return f"{numbers.mean():,.0f}" if len(numbers) else ""


def _escape(value: Any) -> str:
    """Text that neither leaves its table cell nor its inline code."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("`", "'")


def _join(values: Sequence[Any]) -> str:
    return ", ".join(_escape(value) for value in values)


def _short_list(values: Sequence[str] | None) -> str:
    if not values:
        return ""
    rest = len(values) - _MAX_NAMES
    return _join(values) if rest <= 0 else f"{len(values)}: {_join(values[:_MAX_NAMES])} …"


def _label_list(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - _MAX_LABELS} more" if len(labels) > _MAX_LABELS else ""
    return ", ".join(f"`{_escape(label)}`" for label in labels[:_MAX_LABELS]) + more


def _is_hub_id(model: str) -> bool:
    return _HUB_ID.fullmatch(model) is not None and not Path(model).exists()


def _is_absolute(value: Any) -> bool:
    return isinstance(value, str) and Path(value).is_absolute()


def _model_text(model: str | None, revision: str | None = None, *, prefix: str = "") -> str:
    """A link for a Hub id; of a folder only its name, for the rest is nobody's business."""
    if model is None:
        return ""
    if not _is_hub_id(model):
        return f"`{_escape(Path(model).name)}`"
    at = f" at `{_escape(revision)[:12]}`" if revision else ""
    return f"[{_escape(model)}](https://huggingface.co/{prefix}{model}){at}"


def _teacher_model_text(teacher: Mapping[str, Any]) -> str:
    if teacher.get("kind") == "column" and "model" in teacher:
        return f"column `{_escape(teacher['model'])}`"
    return _model_text(teacher.get("model"))


def _versions_text(versions: Mapping[str, Any]) -> str:
    return ", ".join(f"{_escape(name)} {_escape(version)}" for name, version in _known(versions).items())

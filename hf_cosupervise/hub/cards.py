"""Facts become a model card or a data-set card; what is not known is left out."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any
from unicodedata import category
from urllib.parse import quote

import jinja2
import numpy as np
from huggingface_hub import CardData, DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData, RepoCard

from ..files import write_text
from .card_merging import merge_into, sign_card
from .client import is_folder

TAGS = ("co-supervised-learning", "weak-to-strong")
PIPELINE_TAGS = {
    "image": "image-classification",
    "text": "text-classification",
    "vector": "tabular-classification",
    "language": "text-generation",
}
_AUTO_CLASSES = {
    "image": ("processor", "AutoImageProcessor", "AutoModelForImageClassification"),
    "text": ("tokenizer", "AutoTokenizer", "AutoModelForSequenceClassification"),
}
_TEMPLATES = Path(__file__).parents[1] / "templates"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_COMMIT = re.compile("[0-9a-f]{40}")
_ADDRESS = re.compile(r"://|www\.|mailto:|xmpp:|\w@\w", re.IGNORECASE)
# Controls, signs that turn text round, and halves of characters.
_UNSEEN = ("Cc", "Cf", "Cs")
# Metrics by our name: the Hub's, and as people call them.
_METRICS = {
    "accuracy": ("accuracy", "Accuracy"),
    "balanced_accuracy": ("balanced_accuracy", "Balanced accuracy"),
    "f1": ("f1", "F1"),
    "macro_f1": ("f1", "Macro F1"),
    "weighted_f1": ("f1", "Weighted F1"),
    "mcc": ("matthews_correlation", "Matthews correlation"),
    "worst_class_accuracy": ("accuracy", "Accuracy of the worst class"),
}
_MAX_NAMES = 6
_MAX_TRUSTED = 3
_quote = partial(quote, errors="replace")  # a path in an address
_MAX_LABELS = 100


def model_card(facts: Mapping[str, Any]) -> str:
    """Write the model card of a student."""
    facts = _known(facts)
    report = facts.get("report", {})
    name = _title(facts, "hub_model_id", "Co-supervised student")
    # The commit where it is known: a branch has moved on by the time that somebody reads this.
    base_model_at = facts.get("base_model_commit") or facts.get("base_model_revision", facts.get("student_revision"))
    body = {
        "name": _escape(name),
        "is_language": facts.get("is_language"),
        "answers": "answers" if facts.get("is_language") else "pseudolabels",
        "rejects": facts.get("rejects", True),
        "base_model_text": _repo_text(facts.get("base_model"), base_model_at),
        "student_training": _escape(facts.get("student_training", "")),
        "num_examples": _count(facts.get("num_examples")),
        "source_text": _repo_text(facts.get("source_dataset"), facts.get("source_revision"), prefix="datasets/"),
        "pool_text": _repo_text(facts.get("pool"), facts.get("pool_revision"), prefix="datasets/"),
        "usage": _usage(facts),
        "has_adapter": facts.get("has_adapter"),
        "files_text": _files_text(facts.get("files", [])),
        "metric": _METRICS[_metric(report)][1],
        "dataset": _escape(facts["dataset_name"]) if "dataset_name" in facts else None,
        "split": _escape(facts["dataset_split"]) if "dataset_split" in facts else None,
        "seeds": [_escape(seed) for seed in report.get("seeds", [])],
        "own_seed": _escape(facts["seed"]) if "seed" in facts else None,
        "evaluation_table": _evaluation_table(report),
        "gap": _gap(report),
        "overview_table": _overview_table(report.get("overview", {})),
        "overview_text": _overview_text(report, is_closed_form=facts.get("is_closed_form", False)),
        "figure": _quote(_in_repo(facts.get("figure", ""))),
        "teachers_table": _teachers_table(facts.get("teachers", [])),
        "levels_of": _code(facts["levels_of"]) if "levels_of" in facts else None,
        "levels_table": _levels_table(
            _join_levels(facts.get("levels", []), report.get("levels", [])), _metric(report)
        ),
        "hyperparameters_table": _hyperparameters_table(facts.get("hyperparameters", {})),
    }
    return _render(ModelCard, _model_metadata(facts, name), "model_card.md", body, facts)


def pool_card(facts: Mapping[str, Any]) -> str:
    """Write the data-set card of a pool, with one configuration per teacher for `datasets.load_dataset`."""
    facts = _known(facts)
    teachers, columns = facts.get("teachers", []), facts.get("input_columns", [])
    names = [teacher["name"] for teacher in teachers]
    # The configuration with what the models read has that name.
    if not names or "inputs" in names:
        raise ValueError(f"A pool needs teachers, none of them named 'inputs', got {names}. Rename the teacher.")
    oracle = [_code(column) for column in columns if column.startswith("oracle_")]
    repo_id, writes = _own_id(facts, "hub_dataset_id"), bool(facts.get("writes"))
    source = _repo_text(facts.get("source_dataset"), facts.get("source_revision"), prefix="datasets/")
    body = {
        "name": _escape(_title(facts, "hub_dataset_id", "Pool of answers" if writes else "Pool of pseudolabels")),
        "writes": writes,
        "pool_class": "AnswerPool" if writes else "PseudolabelPool",
        "num_teachers_text": "one teacher" if len(names) == 1 else f"{len(names)} teachers",
        "num_examples": _count(facts.get("num_examples")),
        "source_text": source
        + (f" (split {_code(facts['source_split'])})" if source and "source_split" in facts else ""),
        "has_inputs": bool(columns),
        "repo_id": repo_id and _literal(repo_id),
        "pool_place": _literal(repo_id or ".") + _at_branch(facts),
        "at_branch": _at_branch(facts),
        "first_teacher": _literal(names[0]),
        "oracle_columns": " and ".join(oracle),
        "many_oracle_columns": len(oracle) > 1,
        "teachers_table": _teachers_table(teachers),
        "has_license": "license" in facts,
    }
    return _render(DatasetCard, _pool_metadata(facts, names), "pool_card.md", body, facts)


def hierarchy_card(facts: Mapping[str, Any]) -> str:
    """Write the model card of a repository that holds a hierarchy of teachers."""
    facts = _known(facts)
    teachers = [_known(teacher) for teacher in facts.get("teachers", [])]
    if not teachers:
        raise ValueError("A hierarchy needs teachers, got none. Give at least one.")
    repo_id = _own_id(facts, "hub_model_id")
    metadata = ModelCardData(
        license=facts.get("license"),
        tags=[*TAGS, "teachers", *facts.get("tags", [])],
        datasets=_dataset_ids(facts.get("datasets", [])),
        pipeline_tag=_pipeline_tag(facts),
    )
    body = {
        "name": _escape(_title(facts, "hub_model_id", "Hierarchy of teachers")),
        "num_teachers": len(teachers),
        "num_levels": len({teacher.get("level") for teacher in teachers}),
        "place": _literal(repo_id or ".") + _at_branch(facts),
        "is_local": repo_id is None,
        "teacher_usage": _teacher_usage(teachers, facts.get("modality"), repo_id or ".", facts.get("hub_branch")),
        "teachers_table": _teachers_table(teachers, with_kind=True),
    }
    return _render(ModelCard, metadata, "hierarchy_card.md", body, facts)


def write_card(text: str, folder: str | os.PathLike[str]) -> Path:
    """Write a card as the `README.md` of a folder, whole or not at all."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"`folder` must exist, got '{folder}'. Save the model or pool there first.")
    path = folder / "README.md"
    if path.exists():
        text = merge_into(path.read_bytes(), text, f"'{path}'")
    write_text(path, text, newline="")  # the line ends are those of the card that was there
    return path


def _render(
    kind: type[RepoCard], metadata: CardData, template: str, body: Mapping[str, Any], facts: Mapping[str, Any]
) -> str:
    labels, versions = facts.get("labels", []), _versions_text(facts.get("versions", {}))
    known = {"modality": facts.get("modality"), "num_labels": len(labels), "labels_text": _label_list(labels)}
    # But for results, which are objects, of texts that were cleaned where they were made.
    metadata.__dict__.update(_yaml({key: value for key, value in metadata.__dict__.items() if key != "eval_results"}))
    # The client reads a template by the encoding of the machine, so it gets the text.
    card = kind.from_template(metadata, template_str=_read_template(template), versions_text=versions, **known, **body)
    return sign_card(str(card))


def _read_template(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


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
        datasets=_dataset_ids([*facts.get("datasets", []), facts.get("source_dataset"), facts.get("pool")]),
        pipeline_tag=_pipeline_tag(facts),
        # The Hub's client refuses results without a name, and shows no name without results.
        model_name=name if results else None,
        eval_results=results or None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
    )


def _dataset_ids(names: Sequence[str | None]) -> list[str] | None:
    return list(dict.fromkeys(name for name in names if name and _is_hub_id(name))) or None


def _eval_results(facts: Mapping[str, Any]) -> list[EvalResult]:
    """The student's measured accuracy, and what else it was measured by; the Hub wants to know on what."""
    report, task = facts.get("report", {}), _pipeline_tag(facts)
    dataset, kind, split = (_yaml(facts.get(f"dataset_{key}")) for key in ("name", "type", "split"))
    found = []
    for metric in dict.fromkeys(("accuracy", _metric(report))):
        values = report.get("methods", {}).get(_own_method(report), {}).get(metric)
        if values is not None and facts.get("seed") in report.get("seeds", []):
            values = values[report["seeds"].index(facts["seed"])]  # of this student, not of all of them
        numbers, (metric_type, title) = _numbers(values), _METRICS[metric]
        if not len(numbers) or not dataset or not task:
            continue
        found.append(
            EvalResult(
                task_type=task,
                # The Hub's client wants both; its type is the id of the data set where there is one.
                dataset_type=kind or dataset,
                dataset_name=dataset,
                dataset_split=split,
                metric_type=metric_type,
                metric_name=title if len(numbers) == 1 else f"{title} (mean of {len(numbers)} seeds)",
                metric_value=round(float(numbers.mean()), 4),
            )
        )
    return found


def _pool_metadata(facts: Mapping[str, Any], names: Sequence[str]) -> DatasetCardData:
    # What the Hub's viewer shows first.
    inputs = {"config_name": "inputs", "data_files": "inputs/data.arrow", "default": True}
    teachers = [{"config_name": name, "data_files": f"teachers/{name}/data.arrow"} for name in names]
    task, num_examples = _pipeline_tag(facts), facts.get("num_examples")
    source = facts.get("source_dataset")
    return DatasetCardData(
        license=facts.get("license"),
        task_categories=[task] if task else None,
        size_categories=[_size_category(num_examples)] if num_examples else None,
        source_datasets=[source] if source and _is_hub_id(source) else None,
        tags=[*TAGS, "generated-answers" if facts.get("writes") else "pseudolabels", *facts.get("tags", [])],
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
    task, repo_id = _pipeline_tag(facts), _own_id(facts, "hub_model_id")
    if task is None or facts["modality"] == "vector" and "vectors" not in facts:
        return ""
    known = {
        "modality": facts["modality"],
        "task": _literal(task),
        "place": _literal(repo_id or "."),
        "at_branch": _at_branch(facts),
        "is_local": repo_id is None,
        **{key: facts.get(key) for key in ("token_pooling", "needs_range")},
        "logits_name": facts.get("logits_name") if facts["modality"] == "image" else None,
    }
    if facts["modality"] == "image" and facts.get("library_name") == "timm":
        # timm reads a branch behind an `@`, and has no argument for it.
        branch = f"@{facts['hub_branch']}" if "hub_branch" in facts else ""
        known["timm_place"] = _literal(f"hf-hub:{repo_id}{branch}" if repo_id else "local-dir:.")
    if facts["modality"] == "vector":
        known |= _describe_layers(facts["vectors"], len(facts.get("labels", [])))
    template = jinja2.Template(_read_template("student_usage.jinja"), trim_blocks=True, lstrip_blocks=True)
    return template.render(known).strip()


def _describe_layers(vectors: Mapping[str, Any], num_labels: int) -> dict[str, Any]:
    """What the snippet for a student of vectors builds it of."""
    sizes = [vectors["num_features"], *vectors["hidden_sizes"]]
    hidden = ", ".join(f"nn.Linear({size}, {next_size}), nn.ReLU()" for size, next_size in zip(sizes, sizes[1:]))
    # Under the names of our class, so that its weights load as they are.
    layers = [f"backbone=nn.Sequential({hidden})"] if hidden else []
    names = vectors.get("feature_names")
    return {
        "num_features": sizes[0],
        "layers": ", ".join([*layers, f"classifier=nn.Linear({sizes[-1]}, {num_labels})"]),
        "feature_names": _literal(", ".join(names)) if names else None,
        "has_sklearn": vectors.get("has_sklearn"),
    }


def _at_branch(facts: Mapping[str, Any]) -> str:
    """What a call of the snippet needs where the files are not on the main branch."""
    return f", revision={_literal(facts['hub_branch'])}" if "hub_branch" in facts else ""


def _teacher_usage(teachers: Sequence[Mapping[str, Any]], modality: str | None, place: str, branch: str | None) -> str:
    """How the first transformers teacher is loaded without this package."""
    for teacher in teachers:
        model, at = teacher.get("model"), teacher.get("commit") or teacher.get("revision")
        # A folder of somebody cannot be loaded by others, and other kinds need this package.
        if modality is None or teacher.get("kind") != "transformers" or (model and not _is_hub_id(model)):
            continue
        arguments = _literal(model or place)
        at = at if model else branch  # of another repository, or of this one
        arguments += f", revision={_literal(at)}" if at else ""
        arguments += f", subfolder={_literal(teacher['subfolder'])}" if "subfolder" in teacher else ""
        reader, auto_reader, auto_model = _AUTO_CLASSES[modality]
        return (
            f"from transformers import {', '.join(sorted([auto_reader, auto_model]))}\n\n"
            f"{reader} = {auto_reader}.from_pretrained({arguments})\n"
            f"model = {auto_model}.from_pretrained({arguments})"
        )
    return ""


def _evaluation_table(report: Mapping[str, Any]) -> str:
    metric = _metric(report)
    titles = {_own_method(report): "**co-supervised (this model)**", "ceiling": "ceiling (ground truth)"}
    rows = [{"method": "weak teacher", _percent_of(metric): _percent(report.get(f"weak_{metric}")), "PGR %": ""}]
    for name, numbers in report.get("methods", {}).items():
        # The ceiling recovers all of the gap by definition.
        recovered = "" if name == "ceiling" else _percent(numbers.get("pgr"))
        measured = {_percent_of(metric): _percent(numbers.get(metric)), "PGR %": recovered}
        rows.append({"method": titles.get(name, _escape(name)), **measured})
    return _table([row for row in rows if row[_percent_of(metric)] or row["PGR %"]])


def _gap(report: Mapping[str, Any]) -> dict[str, str]:
    """PGR with the three numbers that it is made of, where all are known."""
    methods, metric = report.get("methods", {}), _metric(report)
    own, ceiling = methods.get(_own_method(report), {}), methods.get("ceiling", {})
    found = {"weak": report.get(f"weak_{metric}"), "ceiling": ceiling.get(metric)}
    found |= {"student": own.get(metric), "pgr": own.get("pgr")}
    shown = {name: _percent(value) for name, value in found.items()}
    return shown if all(shown.values()) else {}


def _metric(report: Mapping[str, Any]) -> str:
    """What was measured, and recovered."""
    return metric if (metric := report.get("metric")) in _METRICS else "accuracy"


def _percent_of(metric: str) -> str:
    """The head of a column of a metric."""
    name = _METRICS[metric][1]
    return f"{name[0].lower()}{name[1:]} %" if metric != "f1" else "F1 %"


def _own_method(report: Mapping[str, Any]) -> str:
    """By which method the student of the card was trained."""
    return report.get("own_method", "csl")


def _overview_table(overview: Mapping[str, Any]) -> str:
    """What is known of each teacher without ground truth."""
    heads = {"answered": "answered %", "trusted": "trusted %", "agrees_with_student": "agrees with the student %"}
    heads["agrees_with_others"] = "with the other teachers %"
    return _table(
        [
            {"teacher": _code(name)}
            | {head: _percent(teacher.get(key)) for key, head in heads.items()}
            | {"trusted most on %": _most_trusted(teacher.get("trusted_by_label", {}))}
            for name, teacher in overview.get("teachers", {}).items()
        ]
    )


def _most_trusted(shares: Mapping[str, float | None]) -> str:
    """The labels of the student on which a teacher spoke most."""
    known = sorted(((share, name) for name, share in shares.items() if share), key=lambda pair: -pair[0])
    return ", ".join(f"{_escape(name)} {_percent(share)}" for share, name in known[:_MAX_TRUSTED])


def _overview_text(report: Mapping[str, Any], *, is_closed_form: bool) -> str:
    """What is known of the student, of the members that it was made of, and of students of other seeds."""
    overview = report.get("overview", {})
    shares = overview.get("student", {}).get("class_shares", {})
    said = []
    if 0 < len(shares) <= _MAX_LABELS:
        said.append(f"It labels {_join([f'{_escape(name)} {_percent(share)} %' for name, share in shares.items()])}.")
    members = {name: _percent(member["agrees_with_student"]) for name, member in overview.get("members", {}).items()}
    if members:
        listed = _join([f"{_code(name)} ({share} % as the whole)" for name, share in members.items()])
        # None of a single member, which agrees with itself.
        agreement = _percent(overview.get("member_agreement"))
        said.append(f"It is a committee of {listed}; two members agree on {agreement or 100} % of the examples.")
    if agreement := _percent(report.get("seed_agreement")):
        tail = ": all are made in closed form, which a seed does not change" if is_closed_form else ""
        said.append(
            f"Students of seeds {_join(report.get('seeds', []))} agree on {agreement} % of the examples{tail}."
        )
    return " ".join([*said, *map(_escape, overview.get("warnings", []))])


def _teachers_table(teachers: Sequence[Mapping[str, Any]], *, with_kind: bool = False) -> str:
    rows = []
    for teacher in map(_known, teachers):
        model, subfolder = teacher.get("model"), teacher.get("subfolder")
        at = teacher.get("commit") or teacher.get("revision")
        # What is no model on the Hub is named by its kind: a column, a function.
        is_named = teacher.get("kind") in ("column", "function", "pipeline") and model is not None
        rows.append(
            {
                "level": _escape(teacher.get("level", "")),
                "teacher": _code(teacher["name"]) if "name" in teacher else "",
                "kind": _escape(teacher["kind"]) if with_kind and teacher.get("kind", "auto") != "auto" else "",
                "folder": _code(_in_repo(subfolder)) if subfolder and model is None else "",
                "model": f"{teacher['kind']} {_code(model)}" if is_named else _repo_link(model, at, subfolder),
                "revision": _code(_short(at)) if at else "",
                "scope": _short_list(teacher.get("scope")),
                "domains": _short_list(teacher.get("domains")),
                "asked with": _asked_with(teacher),
                "kept labels": _escape(teacher.get("pool_k", "")),
                # Where nothing was left out there is nothing to tell.
                "mass left out %": _percent(teacher.get("dropped_mass") or None),
                "rows outside the task": _escape(teacher.get("num_outside", "")),
                "rows scaled to it": _escape(teacher.get("num_rescaled", "")),
                "answered %": _percent(teacher.get("answered")),
                "accuracy %": _percent(teacher.get("accuracy")),
            }
        )
    return _table(rows)


def _asked_with(teacher: Mapping[str, Any]) -> str:
    """What a teacher is asked with that reads words: a template by its digest, and the words of each label."""
    template, texts = teacher.get("template"), teacher.get("label_texts") or {}
    words = [f"{_code(label)}: {_short_list(some)}" for label, some in list(texts.items())[:_MAX_NAMES]]
    words += ["…"] if len(texts) > _MAX_NAMES else []
    return "; ".join(([f"template {_code(template)}"] if template else []) + words)


def _join_levels(own: Sequence[Mapping[str, Any]], measured: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The levels of this student, the last round of each with what the report knows beside."""
    by_level = {level.get("level"): _known(level) for level in measured}
    # From the end, so that the last round of a level takes what is known of the level.
    rows = [by_level.pop(level.get("level"), {}) | _known(level) for level in reversed(own)]
    return [*reversed(rows), *by_level.values()]


def _levels_table(levels: Sequence[Mapping[str, Any]], metric: str) -> str:
    rows = []
    for level in map(_known, levels):
        # Without spreads: one cell lists the shares of all teachers.
        shares = {_escape(name): _percent(share, spread=False) for name, share in level.get("teachers", {}).items()}
        rows.append(
            {
                "level": _escape(level.get("level", "")),
                "assignment": _escape(level.get("assignment", "")),
                "examples per teacher %": ", ".join(f"{name} {share}" for name, share in shares.items() if share),
                "keep rate %": _percent(level.get("keep_rate")),
                "kept examples": _count(level.get("num_kept")),
                _percent_of(metric): _percent(level.get(metric)),
                "PGR %": _percent(level.get("pgr")),
            }
        )
    return _table(rows)


def _hyperparameters_table(values: Mapping[str, Any]) -> str:
    # A card tells how a model was trained, not where, and keeps no secrets.
    shown = {name: value for name, value in values.items() if not name.endswith(("_dir", "token"))}
    known = {name: value for name, value in shown.items() if not _names_folder(value)}
    return _table([{"argument": _code(name), "value": _code(value)} for name, value in known.items()])


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    """A Markdown table of cells by the head of their column, without columns of which nothing is known."""
    heads = [head for head in (rows[0] if rows else ()) if any(row[head] for row in rows)]
    shown = [heads, *([row[head] for head in heads] for row in rows)]
    lines = ["".join(f"| {cell} " if cell else "| " for cell in cells) + "|" for cells in shown]
    return "\n".join([lines[0], "| --- " * len(heads) + "|", *lines[1:]]) if heads else ""


# ── words and numbers ───────────────────────────────────────────────────────────────────────────────────────────────


def _known(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if value is not None}


def _numbers(value: Any) -> np.ndarray:
    """What is known of one number or a list of them."""
    # Of one seed a number, of several a list with a gap where a run failed.
    values = value if isinstance(value, list | tuple) else [value]
    numbers = np.array([np.nan if item is None else float(item) for item in values])
    return numbers[~np.isnan(numbers)]


def _percent(value: Any, *, spread: bool = True) -> str:
    numbers = 100 * _numbers(value)
    if not len(numbers):
        return ""
    # Of a sample: a few seeds stand for all.
    return f"{numbers.mean():.1f}" + (f" ± {numbers.std(ddof=1):.1f}" if spread and len(numbers) > 1 else "")


def _count(value: Any) -> str:
    numbers = _numbers(value)
    return f"{numbers.mean():,.0f}" if len(numbers) else ""


# Each place in a card has one function through which all values go: text and table cells, inline code, Python, YAML.
def _one_line(value: Any) -> str:
    """Text on one line."""
    # A line break would end a row of a table, or begin a heading.
    return _visible(" ".join(str(value).split()))


def _visible(text: str) -> str:
    """Text in which nothing is hidden or turned round; joiners are not seen either, but some scripts need them."""
    is_hidden = {char for char in set(text) if category(char) in _UNSEEN and char not in "\n\t\u200c\u200d"}
    return "".join("\ufffd" if char in is_hidden else char for char in text)


def _escape(value: Any) -> str:
    """Text that starts no link, comment or tag, is not set off, and does not leave its table cell."""
    if _ADDRESS.search(str(value)):  # links by itself wherever it stands, but for code
        return _code(value)
    text = re.sub(r"([\\|\[\]*~]|(?<!\w)_|_(?!\w))", r"\\\1", _one_line(value))
    # What looks like the name of a character would be shown as that character.
    return re.sub(r"&(?=#?\w+;)", "&amp;", text).replace("<", "&lt;").replace("`", "'")


def _code(value: Any) -> str:
    """Inline code; a pipe is escaped, by an odd number of backslashes, to stay in its table cell."""
    text = re.sub(r"(\\*)\|", r"\1\1\\|", _one_line(value)).replace("`", "'")
    # Two backticks with nothing between them are none to Markdown.
    return f"`{text or ' '}`"


def _literal(text: str) -> str:
    """Python that gives exactly this text, on one line and in characters that can be seen."""
    # Quotes as the formatter of this code would write them; else as Python's own, in ASCII.
    is_plain = text.isprintable() and not {'"', "\\"} & set(text)
    return f'"{text}"' if is_plain else ascii(text)


def _yaml(value: Any) -> Any:
    """A value for the header, which the YAML library quotes as it needs."""
    if isinstance(value, Mapping):
        return {_yaml(key): _yaml(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_yaml(item) for item in value]
    return _visible(value) if isinstance(value, str) else value


def _join(values: Sequence[Any]) -> str:
    return ", ".join(_escape(value) for value in values)


def _short_list(values: Sequence[str] | None) -> str:
    if not values:
        return ""
    rest = len(values) - _MAX_NAMES
    return _join(values) if rest <= 0 else f"{len(values)}: {_join(values[:_MAX_NAMES])} …"


def _label_list(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - _MAX_LABELS} more" if len(labels) > _MAX_LABELS else ""
    return ", ".join(_code(label) for label in labels[:_MAX_LABELS]) + more


def _is_hub_id(model: str) -> bool:
    return _HUB_ID.fullmatch(model) is not None and not is_folder(model)


def _names_folder(value: Any) -> bool:
    """Whether a value says where something lies on this machine, itself or in one of its parts."""
    if isinstance(value, Mapping):
        return any(map(_names_folder, value.values()))
    if isinstance(value, list | tuple | set):
        return any(map(_names_folder, value))
    if not isinstance(value, str | PurePath):
        return False
    text = str(value)
    # Of either system, since a run may have been written on another one.
    return text.startswith(("~", "file:")) or any(
        kind(text).is_absolute() for kind in (PurePosixPath, PureWindowsPath)
    )


def _in_repo(path: str) -> str:
    return PureWindowsPath(path).name if _names_folder(path) else path


def _title(facts: Mapping[str, Any], own_id: str, default: str) -> str:
    return _one_line(facts.get("name") or facts.get(own_id, default).split("/")[-1])


def _own_id(facts: Mapping[str, Any], key: str) -> str | None:
    """The Hub id of the card's own repository; what cannot be one is not printed into code."""
    return facts[key] if _HUB_ID.fullmatch(facts.get(key, "")) else None


def _short(revision: str) -> str:
    return revision[:12] if _COMMIT.fullmatch(revision) else revision


def _repo_link(repo: str | None, at: str | None = None, subfolder: str | None = None, *, prefix: str = "") -> str:
    """A link to a Hub repository at its commit; of a folder only its name, for the rest is nobody's business."""
    if repo is None:
        return ""
    if not _is_hub_id(repo):
        return _code(PureWindowsPath(repo).name)  # knows both kinds of slashes
    url, text = f"https://huggingface.co/{prefix}{repo}", repo
    # Only a commit will still be there: of a branch the text names it, and the link goes to the repository.
    if subfolder or (at and _COMMIT.fullmatch(at)):
        url += f"/tree/{_quote(at or 'main').replace('/', '%2F')}"
    if subfolder:
        url, text = f"{url}/{_quote(subfolder)}", f"{repo}/{subfolder}"
    return f"[{_escape(text)}]({url})"


def _repo_text(repo: str | None, at: str | None = None, *, prefix: str = "") -> str:
    is_pinned = repo is not None and at and _is_hub_id(repo)
    return _repo_link(repo, at, prefix=prefix) + (f" at {_code(_short(at))}" if is_pinned and at else "")


def _files_text(files: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{_code(_in_repo(path))} ({_escape(what)})" for path, what in files)


def _versions_text(versions: Mapping[str, Any]) -> str:
    return ", ".join(f"{_escape(name)} {_escape(version)}" for name, version in _known(versions).items())

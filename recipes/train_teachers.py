"""Train a hierarchy of weak teachers, each on few labels of its own part of the task, and keep them as folders.

    python recipes/train_teachers.py --config recipes/configs/digits.yaml --seeds 0 --teachers_dir outputs/teachers
    python recipes/train_teachers.py --teachers_dir outputs/teachers --push_to_hub --hub_model_id me/digits-teachers

Every teacher is an ordinary model: a transformers classifier built from a configuration, or a scikit-learn classifier
kept by skops. `hierarchy.yaml` in the folder names them all; the folder, and the repository that it is pushed to, is
what `load_hierarchy` reads.
"""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL.Image import Resampling, getmodebase
from task_arguments import TeacherArguments
from torch.nn import functional

from hf_cosupervise import CoSupervisedConfig, Teacher, TeacherHierarchy, build_pool, load_hierarchy, push_hierarchy
from hf_cosupervise.data.columns import find_input_column, find_label_column, is_text_column, read_labels
from hf_cosupervise.data.inputs import InputProcessor, to_pil
from hf_cosupervise.evaluation.methods import teacher_accuracies
from hf_cosupervise.hub.client import open_repo
from hf_cosupervise.teachers.kinds.sklearn import save_sklearn_teacher

CONTROL = "all-labels"
# Images that tell whether a data set is in colour.
_NUM_LOOKED_AT = 100


def train_teachers(
    data: Dataset,
    labels: Sequence[str],
    args: TeacherArguments,
    folder: Path,
    seed: int,
    domain_column: str | None = None,
) -> TeacherHierarchy:
    """Train all teachers that are not there yet, and a control that sees every label that any of them saw.

    Args:
        data (`datasets.Dataset`):
            Labelled examples.
        labels (`Sequence[str]`):
            The task's label names.
        args (`TeacherArguments`):
            What to train.
        folder (`pathlib.Path`):
            Where they go; left alone where it is complete, and where `args` names teachers, here or on the Hub.
        seed (`int`):
            Decides which examples each teacher sees, and its first weights.
        domain_column (`str`, *optional*):
            Column with each example's domain, for `specialize_by="domain"`.

    Returns:
        `TeacherHierarchy`: without the control, which is the folder `all-labels` beside the teachers.
    """
    if args.teachers:
        return _read_teachers(args, labels)
    if is_on_hub(args):
        return _load_from_hub(args, labels)
    if not (folder / "hierarchy.yaml").is_file():
        targets = read_labels(data, find_label_column(data), labels)
        domains = None if domain_column is None else np.array([str(value) for value in data[domain_column]])
        parts = sorted(set(domains.tolist())) if domains is not None else []
        teachers, known = plan_teachers(labels, args, parts, seed)
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            _train_all(data, targets, domains, labels, teachers, known, args, partial, seed)
            TeacherHierarchy(labels, teachers).save(partial / "hierarchy.yaml")
            os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return TeacherHierarchy.load(folder / "hierarchy.yaml")


def _read_teachers(args: TeacherArguments, labels: Sequence[str]) -> TeacherHierarchy:
    if args.teachers_dir is not None:
        raise ValueError(
            f"Either `teachers` or `teachers_dir` says which teachers, got both ({len(args.teachers)} teachers and "
            f"'{args.teachers_dir}'). Leave one out."
        )
    return TeacherHierarchy.from_dict({"labels": list(labels), "teachers": args.teachers})


def is_on_hub(args: TeacherArguments) -> bool:
    """Tell whether teachers are named by an id on the Hub: `user/name`, a revision, and no such folder here."""
    place = args.teachers_dir
    if place is None or args.teachers_revision is None or Path(place).exists():
        return False
    return place.count("/") == 1 and not place.startswith((".", "/", "~"))


def _load_from_hub(args: TeacherArguments, labels: Sequence[str]) -> TeacherHierarchy:
    hierarchy = load_hierarchy(
        str(args.teachers_dir), revision=args.teachers_revision, trust_types=args.teacher_trusted_types
    )
    if hierarchy.labels != tuple(labels):
        raise ValueError(
            f"The teachers '{args.teachers_dir}' must be of the data's labels {list(labels)[:8]}, got "
            f"{list(hierarchy.labels)[:8]}. Name other teachers, or other data."
        )
    return hierarchy


def plan_teachers(
    labels: Sequence[str], args: TeacherArguments, domains: Sequence[str], seed: int
) -> tuple[list[Teacher], dict[str, tuple[str, ...]]]:
    """Share labels or domains out among the teachers of each level; gives the labels of each too, told or not."""
    if args.specialize_by not in ("label", "domain", "examples"):
        raise ValueError(
            f"`specialize_by` must be 'label', 'domain' or 'examples', got {args.specialize_by!r}. Choose one of them."
        )
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    trusted = tuple(args.teacher_trusted_types)
    kind = "sklearn" if args.teacher_kind == "sklearn" else "transformers"
    teachers, known = [], {}
    for level, size in enumerate(args.level_sizes):
        shares = np.array_split(np.array(domains if args.specialize_by == "domain" else labels, dtype=object), size)
        for number, own in enumerate(shares):
            name = "generalist" if (level, size) == (0, 1) else f"level-{level}-{number}"
            told: dict[str, Any] = {}
            if size > 1 and args.specialize_by == "domain":
                told = {"domains": tuple(own)}
            elif size > 1 and args.specialize_by == "label" and args.labels_per_teacher is None:
                told = {"scope": tuple(own)}
            if size > 1 and args.labels_per_teacher is not None:
                start = number * len(labels) // size
                known[name] = tuple(labels[order[(start + k) % len(labels)]] for k in range(args.labels_per_teacher))
            elif "scope" in told:
                known[name] = told["scope"]
            teachers.append(Teacher(name, level=level, name=name, kind=kind, trusted_types=trusted, **told))
    return teachers, known


def _train_all(
    data: Dataset,
    targets: np.ndarray,
    domains: np.ndarray | None,
    labels: Sequence[str],
    teachers: Sequence[Teacher],
    known: Mapping[str, Sequence[str]],
    args: TeacherArguments,
    folder: Path,
    seed: int,
) -> None:
    seen: set[int] = set()
    rows_of = {}
    # One order for all: a teacher sees the first labels of its scope, so that a specialist's are not all its own.
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).numpy()
    for teacher in teachers:
        own = np.ones(len(data), dtype=bool)
        if teacher.name in known:
            own &= np.isin(targets, [list(labels).index(name) for name in known[teacher.name]])
        if teacher.domains is not None and domains is not None:
            own &= np.isin(domains, teacher.domains)
        rows = order[own[order]]
        if args.specialize_by == "examples" and args.teacher_num_examples is not None:  # each has examples of its own
            rows = rows[len(rows_of) * args.teacher_num_examples :]
        rows_of[teacher.name] = rows[: args.teacher_num_examples]
        seen.update(rows_of[teacher.name].tolist())
    rows_of[CONTROL] = np.array(sorted(seen))
    train = {"sklearn": _sklearn_trainer, "transformers": _transformers_trainer}[args.teacher_kind](
        data, targets, labels, args
    )
    for number, (name, rows) in enumerate(rows_of.items()):
        train(rows, folder / name, 1000 * seed + number)


def _sklearn_trainer(
    data: Dataset, targets: np.ndarray, labels: Sequence[str], args: TeacherArguments
) -> Callable[[np.ndarray, Path, int], None]:
    from sklearn.pipeline import make_pipeline

    column = find_input_column(data)
    is_text = is_text_column(data, column)
    feature = {"kind": "text"} if is_text else {"kind": "pixels", "size": None, "divide_by": 255.0}
    if not is_text:  # written down, so that labelling reads images as training does
        feature["mode"] = _image_mode(data[:_NUM_LOOKED_AT][column])
    feature |= args.teacher_feature
    if is_text and args.teacher_vectorizer is None:
        raise ValueError(
            "A scikit-learn teacher of texts needs `teacher_vectorizer`, got None. Name a class such as "
            "'feature_extraction.text.TfidfVectorizer'."
        )

    def train(rows: np.ndarray, folder: Path, seed: int) -> None:
        inputs = data[rows.tolist()][column]
        model = _make_estimator(args.teacher_model, args.teacher_kwargs, seed)
        if is_text:
            vectorizer = _make_estimator(str(args.teacher_vectorizer), args.teacher_vectorizer_kwargs, seed)
            model = make_pipeline(vectorizer, model)
        else:
            inputs = np.stack([_read_pixels(cell, feature) for cell in inputs]) / feature["divide_by"]
        save_sklearn_teacher(model.fit(inputs, targets[rows]), folder, feature, labels)

    return train


def _image_mode(cells: Sequence[Any]) -> str:
    """Grey, or colour where any of the images has some."""
    return "L" if all(getmodebase(to_pil(cell).mode) == "L" for cell in cells) else "RGB"


def _read_pixels(cell: Any, feature: dict[str, Any]) -> np.ndarray:
    image = to_pil(cell, feature["mode"])
    if feature["size"] is not None:
        height, width = feature["size"]  # PIL names the width first
        image = image if image.size == (width, height) else image.resize((width, height), Resampling.BILINEAR)
    return np.asarray(image, dtype=np.float32).ravel()


def _make_estimator(path: str, keywords: dict, seed: int) -> Any:
    module, _, name = f"sklearn.{path}".rpartition(".")
    estimator = getattr(importlib.import_module(module), name)
    defaults = estimator().get_params()
    # YAML has no tuples, and scikit-learn takes no list where it wants one (`ngram_range`).
    keywords = {
        key: tuple(value) if isinstance(defaults.get(key), tuple) else value for key, value in keywords.items()
    }
    return estimator(**keywords | ({"random_state": seed} if "random_state" in defaults else {}))


def _transformers_trainer(
    data: Dataset, targets: np.ndarray, labels: Sequence[str], args: TeacherArguments
) -> Callable[[np.ndarray, Path, int], None]:
    import transformers

    id2label = dict(enumerate(labels))
    config = transformers.AutoConfig.for_model(
        args.teacher_model,
        num_labels=len(labels),
        id2label=id2label,
        label2id={v: k for k, v in id2label.items()},
        **args.teacher_kwargs,
    )
    settings = dict(args.teacher_processor)
    processing_class = getattr(transformers, settings.pop("class"))(**settings)
    processor, column = InputProcessor(processing_class, config), find_input_column(data)

    def train(rows: np.ndarray, folder: Path, seed: int) -> None:
        pixel_values = processor(data[rows.tolist()][column])["pixel_values"]
        torch.manual_seed(seed)
        model = transformers.AutoModelForImageClassification.from_config(config)
        fit_classifier(
            model, pixel_values, torch.from_numpy(targets[rows]), args.teacher_steps, args.teacher_learning_rate
        )
        model.save_pretrained(folder)
        processing_class.save_pretrained(folder)

    return train


def fit_classifier(
    model: torch.nn.Module, pixel_values: torch.Tensor, targets: torch.Tensor, steps: int, learning_rate: float
) -> None:
    """Fit a small network to few images: every step sees all of them."""
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    model.train()
    for _ in range(steps):
        loss = functional.cross_entropy(model(pixel_values=pixel_values).logits, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def control_hierarchy(hierarchy: TeacherHierarchy, folder: Path) -> TeacherHierarchy:
    """Give the control, one teacher that saw every label that any teacher saw, as a hierarchy of its own."""
    teacher = replace(hierarchy.teachers[0], model=str(folder / CONTROL), name=CONTROL, scope=None, domains=None)
    return TeacherHierarchy(hierarchy.labels, [teacher])


def measure(test: Dataset, hierarchy: TeacherHierarchy, domain_column: str | None) -> dict[str, float]:
    """Accuracy of each teacher on data that none of them was trained on."""
    pool = build_pool(
        test,
        hierarchy,
        oracle_column=find_label_column(test),
        oracle_domain_column=domain_column,
        batch_size=256,
        disable_tqdm=True,
    )
    return teacher_accuracies(pool)


def publish(
    hierarchy: TeacherHierarchy, repo_id: str, config: CoSupervisedConfig, dataset: str, accuracy: dict[str, float]
) -> str:
    """Push the teachers with a card."""
    facts = {"accuracy": accuracy, "datasets": [] if Path(dataset).exists() else [dataset]}
    return push_hierarchy(
        hierarchy,
        repo_id,
        private=config.hub_private_repo,
        token=config.hub_token,
        revision=config.hub_revision,
        facts=facts,
    ).commit_url


def main() -> None:
    """Train the teachers of the first seed of a recipe."""
    from task import load_split
    from task_arguments import DEFAULT_CONFIG, RECIPE_TYPES

    from hf_cosupervise.arguments import parse_recipe_args

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RuntimeError("Teachers are trained by one process, got several. Start it by `python`.")
    data_args, args, _, recipe_args, config = parse_recipe_args(RECIPE_TYPES, default_config=DEFAULT_CONFIG)
    if args.teachers_dir is None or is_on_hub(args):
        raise ValueError(
            f"`teachers_dir` must be the folder to write, got {args.teachers_dir!r}. Give it by `--teachers_dir`."
        )
    folder = Path(args.teachers_dir)
    # Access is checked before the work, not after it.
    repo_id = config.hub_model_id or folder.absolute().name
    if config.push_to_hub:
        repo_id = open_repo(repo_id, what="The teachers", private=config.hub_private_repo, token=config.hub_token)
    seed = int(recipe_args.seeds.split(",")[0])
    split = load_split(data_args, seed)
    domain_column = data_args.oracle_domain_column if args.specialize_by == "domain" else None
    # Teachers of an earlier run may have seen what this seed keeps for the test.
    is_new = not (folder / "hierarchy.yaml").is_file()
    hierarchy = train_teachers(split.teachers, split.labels, args, folder, seed, domain_column)
    print(f"{hierarchy} in {args.teachers_dir}")
    if config.push_to_hub:
        accuracy = measure(split.test, hierarchy, data_args.oracle_domain_column) if is_new else {}
        print(f"Pushed: {publish(hierarchy, repo_id, config, data_args.dataset, accuracy)}")


if __name__ == "__main__":
    main()

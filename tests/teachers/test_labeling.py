"""Building a pool: what is labelled by whom, once, wherever it stops, and what is refused."""

from __future__ import annotations

import errno
import os
import resource
import signal
import tempfile
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from safetensors.torch import load_file, save_file
from test_kinds import copy_model, label

from hf_cosupervise.data.inputs import RowError
from hf_cosupervise.hierarchy import Teacher, TeacherHierarchy
from hf_cosupervise.pool.pseudolabels import PseudolabelPool
from hf_cosupervise.teachers import forms, progress, running
from hf_cosupervise.teachers.kinds.loading import load_teacher
from hf_cosupervise.teachers.kinds.sklearn import save_sklearn_teacher
from hf_cosupervise.teachers.labeling import build_pool
from hf_cosupervise.teachers.progress import Progress

pytestmark = pytest.mark.core

quiet_pool = partial(build_pool, disable_tqdm=True)


def column_hierarchy(labels: tuple[str, ...], column: str = "answer", **fields: Any) -> TeacherHierarchy:
    return TeacherHierarchy(labels, [Teacher(column, kind="column", **fields)])


# ── answers in a column ─────────────────────────────────────────────────────────────────────────────────────────────


def test_class_label_answers_are_read_by_name(tiny_text_dataset: Dataset) -> None:
    labels = ("dog", "cat", "bee", "ant")  # not the order of the column
    pool = quiet_pool(tiny_text_dataset, column_hierarchy(labels, "label", name="crowd"))

    names = tiny_text_dataset.features["label"].int2str(list(tiny_text_dataset["label"]))
    assert [labels[label] for label in pool.hard_labels("crowd")] == names
    # Old answers are pseudolabels now; nothing called `label` stays among the inputs.
    assert pool.inputs is not None and set(pool.inputs.column_names) == {"text", "id"}


def test_unanswered_rows_stay_unanswered(tiny_labels: tuple[str, ...]) -> None:
    dataset = Dataset.from_dict({"id": [3, 1, 2], "answer": ["ant", None, "dog"]})
    pool = quiet_pool(dataset, column_hierarchy(tiny_labels))
    assert pool.answered("answer").tolist() == [True, False, True]
    assert pool.hard_labels("answer").tolist() == [0, -1, 3]
    assert pool.ids.tolist() == [3, 1, 2] and pool.inputs is None


def test_a_bad_answer_is_found_far_down(tiny_labels: tuple[str, ...], monkeypatch: Any) -> None:
    monkeypatch.setattr(running, "ROWS_AT_ONCE", 4)
    dataset = Dataset.from_dict({"id": list(range(11)), "answer": ["ant"] * 10 + ["cow"]})
    with pytest.raises(ValueError, match="got 'cow' in row 10"):
        quiet_pool(dataset, column_hierarchy(tiny_labels))


def test_sklearn_teacher_on_vectors(tmp_path: Path) -> None:
    pytest.importorskip("skops")
    from sklearn.linear_model import LogisticRegression

    vectors = [[0.0, 1.0], [1.0, 0.0], [0.5, 2.0]]
    model = LogisticRegression().fit(vectors, [0, 1, 0])
    save_sklearn_teacher(model, tmp_path / "lr", {"kind": "values"}, ["low", "high"])
    dataset = Dataset.from_dict({"vector": vectors})

    hierarchy = TeacherHierarchy(["high", "low"], [Teacher(str(tmp_path / "lr"))])
    pool = quiet_pool(dataset, hierarchy, input_column="vector")

    np.testing.assert_allclose(pool.decode("lr"), model.predict_proba(vectors)[:, ::-1], atol=1e-3)


# ── the pool ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def hierarchy(tiny_vit: str, tiny_timm: str, tiny_sklearn: str, tiny_labels: tuple[str, ...]) -> TeacherHierarchy:
    teachers = [
        Teacher(tiny_vit, name="vit"),
        Teacher(tiny_timm, level=1, name="timm", scope=("ant", "bee")),
        Teacher(tiny_sklearn, level=1, name="sklearn"),
    ]
    return TeacherHierarchy(tiny_labels, teachers)


def test_pool_holds_what_each_teacher_says(hierarchy: TeacherHierarchy, tiny_image_dataset: Dataset) -> None:
    pool = quiet_pool(tiny_image_dataset, hierarchy, oracle_column="label", batch_size=7, device="cpu")

    images = tiny_image_dataset["image"][:]
    for teacher in hierarchy.teachers:
        expected = label(load_teacher(teacher, hierarchy.labels, "cpu"), images)
        np.testing.assert_allclose(pool.decode(teacher.name), expected, atol=2e-3)
    assert pool.oracle_labels is not None
    assert pool.oracle_labels.tolist() == list(tiny_image_dataset["label"])
    assert pool.inputs is not None and set(pool.inputs.column_names) == {"id", "image", "oracle_label"}
    assert set(pool.facts) == {"vit", "timm", "sklearn"}
    known = {"kind", "revision", "commit", "weights", "class", "preprocessing"}
    assert set(pool.facts["vit"]) == known | {"precision", "num_failed", "dropped_mass"}
    assert pool.facts["vit"]["num_failed"] == pool.facts["vit"]["dropped_mass"] == 0


def test_batch_size_does_not_change_the_pool(hierarchy: TeacherHierarchy, tiny_image_dataset: Dataset) -> None:
    unlabelled = tiny_image_dataset.remove_columns("label")
    one, other = (quiet_pool(unlabelled, hierarchy, batch_size=size) for size in (5, 64))
    for name in hierarchy.names:
        np.testing.assert_allclose(one.decode(name), other.decode(name), atol=2e-3)


def test_ids_follow_the_content(hierarchy: TeacherHierarchy, tiny_image_dataset: Dataset) -> None:
    unlabelled = tiny_image_dataset.remove_columns("label")
    order = np.random.default_rng(1).permutation(len(unlabelled))
    pool, shuffled = quiet_pool(unlabelled, hierarchy), quiet_pool(unlabelled.select(order), hierarchy)
    assert shuffled.ids.tolist() == pool.ids[order].tolist()


def test_each_teacher_is_loaded_once_and_alone_where_memory_is_short(
    hierarchy: TeacherHierarchy, tiny_image_dataset: Dataset, monkeypatch: Any
) -> None:
    real: Any = load_teacher
    loaded, models = [], []

    def watching(teacher: Teacher, *args: Any, **keywords: Any) -> Any:
        assert all(model() is None for model in models), "the teacher before still takes memory"
        loaded.append(teacher.name)
        answer = real(teacher, *args, **keywords)
        models.append(weakref.ref(answer.model))
        return answer

    monkeypatch.setattr(forms, "load_teacher", watching)
    monkeypatch.setattr(running, "_MEMORY_BUDGET", 0)
    quiet_pool(tiny_image_dataset.remove_columns("label"), hierarchy)
    assert loaded == ["vit", "timm", "sklearn"]


def test_saved_pool_comes_back_from_its_folder(
    hierarchy: TeacherHierarchy, tiny_image_dataset: Dataset, tmp_path: Path
) -> None:
    folder = tmp_path / "pool"
    pool = quiet_pool(tiny_image_dataset, hierarchy, oracle_column="label", output_dir=folder)
    again = PseudolabelPool.load(folder)
    assert pool.facts == again.facts and pool.ids.tolist() == again.ids.tolist()
    assert again.inputs is not None and again.inputs[0]["image"].size == (8, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["pool"]

    with pytest.raises(FileExistsError, match="Load the pool with `PseudolabelPool.load`, or choose another folder"):
        quiet_pool(tiny_image_dataset, hierarchy, oracle_column="label", output_dir=folder)


@pytest.mark.parametrize("with_features", [True, False])
def test_streamed_data_gives_the_same_pool(
    hierarchy: TeacherHierarchy, tiny_image_dataset: Dataset, with_features: bool
) -> None:
    from datasets import IterableDataset

    unlabelled = tiny_image_dataset.remove_columns("label")
    if with_features:
        stream = unlabelled.to_iterable_dataset(num_shards=2)
    else:
        stream = IterableDataset.from_generator(lambda: iter(unlabelled))
    pool, streamed = quiet_pool(unlabelled, hierarchy), quiet_pool(stream, hierarchy)
    assert streamed.inputs is not None and streamed.inputs.features["image"] == unlabelled.features["image"]
    for name in hierarchy.names:
        np.testing.assert_array_equal(pool.label_probs(name), streamed.label_probs(name))


def test_two_processes_give_the_pool_of_one(
    hierarchy: TeacherHierarchy, tiny_image_dataset: Dataset, tmp_path: Path
) -> None:
    from accelerate import debug_launcher

    few = tiny_image_dataset.remove_columns("label").select(range(13))  # shares of 6 and 7
    debug_launcher(_build_in_process, (few, hierarchy, tmp_path / "pool"), num_processes=2)

    alone, together = quiet_pool(few, hierarchy, device="cpu"), PseudolabelPool.load(tmp_path / "pool")
    assert alone.ids.tolist() == together.ids.tolist()
    for name in hierarchy.names:
        np.testing.assert_allclose(alone.decode(name), together.decode(name), atol=2e-3)


def _build_in_process(dataset: Dataset, hierarchy: TeacherHierarchy, folder: Path) -> None:
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    pool = quiet_pool(dataset, hierarchy, output_dir=folder, batch_size=4)
    if len(pool) != len(dataset):
        raise RuntimeError(f"This process got {len(pool)} of {len(dataset)} rows.")


def test_undeclared_ground_truth_is_refused(hierarchy: TeacherHierarchy, tiny_image_dataset: Dataset) -> None:
    with pytest.raises(ValueError, match=r"no undeclared ground truth, got the columns \['label'\].*oracle_column="):
        quiet_pool(tiny_image_dataset, hierarchy)
    for name in ("oracle_label", "Target", "anything"):  # the last one by its feature alone
        with pytest.raises(ValueError, match=f"undeclared ground truth, got the columns \\['{name}'\\]"):
            quiet_pool(tiny_image_dataset.rename_column("label", name), hierarchy)
    numbers = tiny_image_dataset.remove_columns("label").add_column("gold", list(range(48)))
    with pytest.raises(ValueError, match="undeclared ground truth"):
        quiet_pool(numbers, hierarchy)


def test_ground_truth_is_mapped_by_name(tiny_labels: tuple[str, ...]) -> None:
    hierarchy = column_hierarchy(tiny_labels)
    data = {"id": [0, 1, 2], "answer": ["ant"] * 3}
    other_order = Dataset.from_dict(data | {"label": [0, 1, 2]})
    other_order = other_order.cast_column("label", ClassLabel(names=["dog", "Ant", "bee"]))
    for dataset in (
        other_order,
        Dataset.from_dict(data | {"label": ["dog", "ant", "bee"]}),
        Dataset.from_dict(data | {"label": [3, 0, 1]}),
    ):
        pool = quiet_pool(dataset, hierarchy, oracle_column="label")
        assert pool.oracle_labels is not None and pool.oracle_labels.tolist() == [3, 0, 1]

    for wrong in (["dog", "cow", "bee"], [3, 4, 1], [3, None, 1], [3, -1, 1]):
        with pytest.raises(ValueError, match="first in row 1"):
            quiet_pool(Dataset.from_dict(data | {"label": wrong}), hierarchy, oracle_column="label")


def test_ground_truth_is_no_teacher(tiny_text_dataset: Dataset, tiny_labels: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="Ground truth must reach no teacher"):
        quiet_pool(tiny_text_dataset, column_hierarchy(tiny_labels, "label"), oracle_column="label")


def test_oracle_domain_and_metadata_are_kept(tiny_labels: tuple[str, ...]) -> None:
    data = {"text": ["a", "b"], "answer": ["ant", "bee"], "domain": [1, 0], "source": ["x", "y"]}
    dataset = Dataset.from_dict(data).cast_column("domain", ClassLabel(names=["photo", "sketch"]))
    pool = quiet_pool(dataset, column_hierarchy(tiny_labels), oracle_domain_column="domain")
    assert pool.inputs is not None
    assert list(pool.inputs["oracle_domain"]) == ["sketch", "photo"]
    assert list(pool.inputs["source"]) == ["x", "y"]

    light = quiet_pool(dataset, column_hierarchy(tiny_labels), oracle_domain_column="domain", keep_inputs=False)
    assert light.inputs is not None and "text" not in light.inputs.column_names
    assert list(light.inputs["oracle_domain"]) == ["sketch", "photo"]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 2, 2], "must be unique, got 2 2 times"),
        (["a", None, "b"], "got None in row 1"),
        ([1.5, 2.0, 3.0], "got 1.5 in row 0"),
    ],
)
def test_unusable_ids_are_refused(ids: list[Any], message: str, tiny_labels: tuple[str, ...]) -> None:
    dataset = Dataset.from_dict({"id": ids, "answer": ["ant"] * 3})
    with pytest.raises(ValueError, match=message):
        quiet_pool(dataset, column_hierarchy(tiny_labels))


def test_unusable_data_is_refused(
    hierarchy: TeacherHierarchy, tiny_image_dataset: Dataset, tiny_text_dataset: Dataset, tiny_labels: tuple[str, ...]
) -> None:
    with pytest.raises(TypeError, match="Choose one split"):
        quiet_pool(DatasetDict({"train": tiny_image_dataset}), hierarchy)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one example, got none"):
        quiet_pool(tiny_image_dataset.select([]), hierarchy)
    with pytest.raises(ValueError, match=r"`pool_k` must lie in 1..4"):
        quiet_pool(tiny_image_dataset, hierarchy, pool_k=5)
    with pytest.raises(ValueError, match="`oracle_column` must be a column of the data"):
        quiet_pool(tiny_image_dataset, hierarchy, oracle_column="gold")
    with pytest.raises(ValueError, match="`model` of teacher 'crowd' must be a column"):
        quiet_pool(tiny_text_dataset, column_hierarchy(tiny_labels, "votes", name="crowd"))
    with pytest.raises(TypeError, match="must be given images or vectors, got str"):
        quiet_pool(tiny_text_dataset, hierarchy, oracle_column="label")
    unlabelled = tiny_image_dataset.remove_columns("label")
    holes = Dataset.from_dict({"image": [unlabelled[0]["image"], None]}, features=unlabelled.features)
    with pytest.raises(ValueError, match="got None in row 1"):
        quiet_pool(holes.add_column("id", [0, 1]), hierarchy)


def test_broken_weights_name_teacher_and_tensor(
    tiny_vit: str, tiny_labels: tuple[str, ...], tiny_image_dataset: Dataset, tmp_path: Path
) -> None:
    folder = copy_model(tiny_vit, tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.bias"][1] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    hierarchy = TeacherHierarchy(tiny_labels, [Teacher(str(folder))])
    with pytest.raises(ValueError, match=r"Teacher 'broken' must have finite weights, got NaN .* `classifier\.bias`"):
        quiet_pool(tiny_image_dataset, hierarchy, oracle_column="label")


# ── stopped anywhere ────────────────────────────────────────────────────────────────────────────────────────────────


class MeanColour:
    """A teacher that knows the mean colour, counts the images it has seen, and stops or breaks where it is told to."""

    column = None

    def __init__(self, scale: float, stop_at: int = -1, **facts: Any) -> None:
        self.facts = {"kind": "object", "preprocessing": "mean", **facts}
        self.scale, self.stop_at, self.batches = scale, stop_at, 0
        self.seen: list[bytes] = []

    def prepare(self, cells: Any) -> np.ndarray:
        return np.stack([np.asarray(cell, dtype=np.float32).mean(axis=(0, 1)) for cell in cells])

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        if self.batches == self.stop_at:
            raise KeyboardInterrupt
        self.batches += 1
        self.seen += [row.tobytes() for row in inputs]
        logits = np.concatenate([inputs, inputs[:, :1] * 0 + 100], axis=1) / self.scale
        probs = np.exp(logits - logits.max(axis=1, keepdims=True))
        return probs / probs.sum(axis=1, keepdims=True)


@pytest.fixture
def two(tiny_labels: tuple[str, ...]) -> TeacherHierarchy:
    return TeacherHierarchy(tiny_labels, [Teacher("a"), Teacher("b", level=1)])


@pytest.fixture
def images(tiny_image_dataset: Dataset) -> Dataset:
    return tiny_image_dataset.remove_columns("label")


def make_models(**stops: int) -> dict[str, MeanColour]:
    return {name: MeanColour(30 + 10 * (name == "b"), stops.get(name, -1)) for name in "ab"}


def assert_same(one: PseudolabelPool, other: PseudolabelPool) -> None:
    assert one.ids.tolist() == other.ids.tolist() and one.facts == other.facts
    for name in one.hierarchy.names:
        np.testing.assert_array_equal(one.label_ids(name), other.label_ids(name))
        np.testing.assert_array_equal(one.label_probs(name), other.label_probs(name))


@pytest.mark.parametrize("stops", [{"a": 0}, {"b": 0}, {"a": 3}, {"b": 9}], ids=str)
def test_stopped_and_gone_on_is_undisturbed_and_labels_no_row_twice(
    images: Dataset, two: TeacherHierarchy, tmp_path: Path, stops: dict[str, int]
) -> None:
    build = partial(quiet_pool, images, two, batch_size=5, pool_k=2)
    whole = build(models=make_models())
    first, second = make_models(**stops), make_models()
    with pytest.raises(KeyboardInterrupt):
        build(models=first, output_dir=tmp_path / "pool")
    assert [path.name for path in tmp_path.iterdir()] == [".pool.unfinished"]

    pool = build(models=second, output_dir=tmp_path / "pool")

    assert_same(pool, whole)
    assert [path.name for path in tmp_path.iterdir()] == ["pool"]
    for name in "ab":
        seen = first[name].seen + second[name].seen
        assert len(seen) == len(set(seen)) == len(images)
    assert second["a"].batches == 10 - first["a"].batches


def test_killed_at_any_batch_and_gone_on_is_undisturbed(
    images: Dataset, two: TeacherHierarchy, tmp_path: Path
) -> None:
    build = partial(quiet_pool, images, two, batch_size=4)
    rng = np.random.default_rng(0)
    for number in range(4):
        folder, num_left = tmp_path / str(number), 12
        for last in rng.integers(6, size=3).tolist():
            child = os.fork()
            if child == 0:
                # The batch in which it dies is not on disk yet: that one may be labelled twice, and no other.
                models = make_models()
                models["a"].prepare = partial(_die_after, last, [0])  # type: ignore[method-assign]
                build(models=models, output_dir=folder)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL)
            if folder.exists():
                break
            unfinished = Progress(tmp_path / f".{number}.unfinished", 48, 4, np.dtype(np.uint8))
            left = sum(stop - start for start, stop in unfinished.missing("b")) // 4
            assert left == num_left - last
            num_left = left
        models = make_models()
        pool = PseudolabelPool.load(folder) if folder.exists() else build(models=models, output_dir=folder)
        assert models["b"].batches == (num_left if models["b"].seen else 0)
        assert_same(pool, build(models=make_models()))


def _die_after(last: int, done: list[int], cells: Any) -> np.ndarray:
    if done[0] == last:
        os.kill(os.getpid(), signal.SIGKILL)
    done[0] += 1
    return MeanColour(1).prepare(cells)


def test_a_damaged_batch_is_labelled_again_and_no_other(
    images: Dataset, two: TeacherHierarchy, tmp_path: Path
) -> None:
    build = partial(quiet_pool, images, two, batch_size=8, output_dir=tmp_path / "pool")
    with pytest.raises(KeyboardInterrupt):
        build(models=make_models(b=4))
    (path,) = (tmp_path / ".pool.unfinished" / "parts" / "a").glob("*.data")
    damaged = bytearray(path.read_bytes())
    damaged[8 * 4 * 3 + 1] ^= 1  # in the second batch: a row is four label ids and four float16
    path.write_bytes(damaged)

    models = make_models()
    pool = build(models=models)

    assert models["a"].batches == 2 and models["b"].batches == 2  # `a`: that batch and the last one
    assert_same(pool, quiet_pool(images, two, batch_size=8, models=make_models()))


def test_another_batch_size_goes_on_too(images: Dataset, two: TeacherHierarchy, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        quiet_pool(images, two, batch_size=7, output_dir=tmp_path / "pool", models=make_models(b=2))
    models = make_models()
    pool = quiet_pool(images, two, batch_size=10, output_dir=tmp_path / "pool", models=models)
    assert [len(models[name].seen) for name in "ab"] == [48 - 21, 48 - 14]
    assert_same(pool, quiet_pool(images, two, models=make_models()))


def test_work_of_another_pool_is_refused(
    tiny_vit: str, tiny_labels: tuple[str, ...], images: Dataset, tmp_path: Path
) -> None:
    folder = copy_model(tiny_vit, tmp_path / "vit")
    hierarchy = TeacherHierarchy(tiny_labels, [Teacher(str(folder)), Teacher("b")])
    dataset = images.add_column("id", list(range(48)))
    build = partial(quiet_pool, output_dir=tmp_path / "pool", batch_size=8)
    with pytest.raises(KeyboardInterrupt):
        build(dataset, hierarchy, models={"b": MeanColour(1, 1)})

    def refused(data: Dataset, teachers: TeacherHierarchy, **changes: Any) -> str:
        with pytest.raises(ValueError) as error:
            build(data, teachers, **{"models": {"b": MeanColour(1)}, **changes})
        start = f"'{tmp_path / '.pool.unfinished'}' must hold the beginning of this pool, got that of another one ("
        stop = "Use the old settings to go on with it, or delete that folder to start afresh."
        assert str(error.value).startswith(start) and str(error.value).endswith(stop)
        return str(error.value)

    assert "(pool_k: 4 -> 2)" in refused(dataset, hierarchy, pool_k=2)
    assert '(precision: "float32" -> "bfloat16")' in refused(dataset, hierarchy, precision="bfloat16")
    assert "(b.preprocessing:" in refused(dataset, hierarchy, models={"b": MeanColour(1, preprocessing="new")})
    other = TeacherHierarchy(tiny_labels, [hierarchy.teachers[0], Teacher("b", scope=["ant"])])
    assert '(hierarchy.teachers[1].scope: null -> ["ant"])' in refused(dataset, other)
    assert "ids:" in refused(dataset.select(range(47, -1, -1)), hierarchy)
    assert "num_rows: 48 -> 47)" in refused(dataset.select(range(47)), hierarchy)
    same_ids = images.select(range(47, -1, -1)).add_column("id", list(range(48)))
    assert "(columns.image.cells:" in refused(same_ids, hierarchy)
    weights = load_file(folder / "model.safetensors")
    save_file({key: value * 2 for key, value in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    assert "(vit.weights:" in refused(dataset, hierarchy)


def test_a_second_run_in_the_same_folder_is_refused(images: Dataset, two: TeacherHierarchy, tmp_path: Path) -> None:
    models = make_models()
    refused = []

    def prepare(cells: Any) -> np.ndarray:
        with pytest.raises(RuntimeError, match="by one run at a time, got another run that is at it. Wait until"):
            quiet_pool(images, two, models=make_models(), output_dir=tmp_path / "pool")
        refused.append(len(cells))
        return MeanColour(1).prepare(cells)

    models["a"].prepare = prepare  # type: ignore[method-assign]
    quiet_pool(images, two, models=models, output_dir=tmp_path / "pool")
    assert refused == [48]


def test_a_teacher_that_has_finished_is_not_loaded_again(
    tiny_vit: str, tiny_labels: tuple[str, ...], images: Dataset, tmp_path: Path, monkeypatch: Any
) -> None:
    hierarchy = TeacherHierarchy(tiny_labels, [Teacher(tiny_vit), Teacher("b")])
    monkeypatch.setattr(running, "_MEMORY_BUDGET", 0)
    build = partial(quiet_pool, images, hierarchy, output_dir=tmp_path / "pool")
    with pytest.raises(KeyboardInterrupt):
        build(models={"b": MeanColour(30, 0)})
    monkeypatch.setattr(forms, "load_teacher", None)
    pool = build(models={"b": MeanColour(30)})
    assert pool.facts["vit"]["class"] == "ViTForImageClassification"


def test_another_number_of_processes_goes_on_bit_by_bit(
    images: Dataset, two: TeacherHierarchy, tmp_path: Path
) -> None:
    from accelerate import debug_launcher

    build = partial(quiet_pool, images, two, batch_size=5)
    with pytest.raises(KeyboardInterrupt):
        build(models=make_models(b=3), output_dir=tmp_path / "pool")
    debug_launcher(_go_on, (images, two, tmp_path / "pool"), num_processes=2)
    assert_same(PseudolabelPool.load(tmp_path / "pool"), build(models=make_models()))


def _go_on(images: Dataset, hierarchy: TeacherHierarchy, folder: Path) -> None:
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    models = make_models()
    quiet_pool(images, hierarchy, batch_size=5, models=models, output_dir=folder)
    if models["b"].batches not in (3, 4):
        raise RuntimeError(f"The 7 batches that are left must be shared by two, got {models['b'].batches} here.")


def test_two_processes_without_a_folder_both_get_the_pool(images: Dataset, two: TeacherHierarchy) -> None:
    from accelerate import debug_launcher

    # Two rows are one batch: the second process has nothing to do.
    debug_launcher(
        _compare,
        (
            images.select(range(2)),
            two,
            quiet_pool(images.select(range(2)), two, models=make_models()).label_probs("b").tolist(),
        ),
        num_processes=2,
    )


def _compare(images: Dataset, hierarchy: TeacherHierarchy, expected: list[list[float]]) -> None:
    torch.set_num_threads(1)
    pool = quiet_pool(images, hierarchy, models=make_models())
    if pool.label_probs("b").tolist() != expected:
        raise RuntimeError("This process got another pool.")


def test_several_machines_need_a_shared_folder(images: Dataset, two: TeacherHierarchy, monkeypatch: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ValueError) as error:
        quiet_pool(images, two, models=make_models())
    assert str(error.value) == (
        "Labelling on several machines needs an `output_dir` that all of them see, got none with 8 of 16 processes on "
        "this one. Give a folder on a shared disk."
    )


def test_without_a_folder_the_labels_live_as_long_as_the_pool(
    images: Dataset, two: TeacherHierarchy, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    pool = quiet_pool(images, two, models=make_models())
    assert len(list(tmp_path.iterdir())) == 1
    probs = pool.label_probs("a").copy()
    view = pool.label_probs("a")
    del pool
    assert list(tmp_path.iterdir()) == []
    np.testing.assert_array_equal(view, probs)  # what is mapped stays
    with pytest.raises(KeyboardInterrupt):
        quiet_pool(images, two, models=make_models(a=0))
    assert list(tmp_path.iterdir()) == []


# ── rows that fail ──────────────────────────────────────────────────────────────────────────────────────────────────


def break_rows(images: Dataset, tmp_path: Path) -> Dataset:
    """Row 3 is cut off, row 5 is no image, row 8 is empty, and the file of row 11 does not exist."""
    cells = images.cast_column("image", Image(decode=False))["image"][:]
    cells[3] = {"bytes": cells[3]["bytes"][:90], "path": None}
    cells[5] = {"bytes": b"text", "path": None}
    cells[8] = None
    cells[11] = {"bytes": None, "path": str(tmp_path / "gone.png")}
    features = Features({"image": Image(), "id": Value("string")})
    return Dataset.from_dict({"image": cells, "id": [f"row-{row}" for row in range(len(cells))]}, features=features)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (3, "Column 'image' must hold images that can be read, got "),
        (5, "Column 'image' must hold images that can be read, got UnidentifiedImageError: "),
        (8, "Column 'image' must hold an input in every row, got None in row 0 (id 'row-8')"),
        (11, "Column 'image' must hold images that can be read, got FileNotFoundError: "),
    ],
)
def test_a_row_that_cannot_be_read_is_named(
    images: Dataset, two: TeacherHierarchy, tmp_path: Path, row: int, message: str
) -> None:
    broken = break_rows(images, tmp_path).select(range(row, 12))
    with pytest.raises(ValueError) as error:
        quiet_pool(broken, two, models=make_models(), keep_inputs=False)
    assert str(error.value).startswith(message)
    others = sum(other > row for other in (3, 5, 8, 11))
    more = f" (and {others} more of the {12 - row} rows read with it)" if others else ""
    assert str(error.value).endswith(
        f" in row 0 (id 'row-{row}') for teacher 'a'{more}. Fix or drop that row, or leave such rows without labels "
        'by `on_error="missing"`.'
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_rows_that_cannot_be_read_are_missing_where_that_is_wanted(
    images: Dataset, two: TeacherHierarchy, tmp_path: Path, caplog: Any, num_workers: int
) -> None:
    broken = break_rows(images, tmp_path)
    pool = quiet_pool(
        broken, two, models=make_models(), on_error="missing", batch_size=4, keep_inputs=False, num_workers=num_workers
    )
    whole = quiet_pool(images, two, models=make_models(), batch_size=4)
    failed = np.isin(np.arange(48), [3, 5, 8, 11])
    for name in "ab":
        np.testing.assert_array_equal(pool.answered(name), ~failed)
        np.testing.assert_array_equal(pool.label_probs(name)[~failed], whole.label_probs(name)[~failed])
        assert pool.facts[name]["num_failed"] == 4
    assert [record.message.partition("got ")[0] for record in caplog.records] == [
        f"Teacher '{name}' failed on 4 of 48 rows, which are missing in its pseudolabels: "
        "ids ['row-3', 'row-5', 'row-8', 'row-11']. Of id 'row-3': Column 'image' must hold images that can be read, "
        for name in "ab"
    ]


class Moody(MeanColour):
    """A teacher that some images break, each in its own way."""

    def __init__(self, moods: dict[bytes, str]) -> None:
        super().__init__(30, preprocessing=None)
        self.moods = moods

    def prepare(self, cells: Any) -> np.ndarray:
        inputs = super().prepare(cells)
        if "raise" in [self.moods.get(row.tobytes(), "") for row in inputs]:
            raise RowError("no such colour.")
        return inputs

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        moods = [self.moods.get(row.tobytes(), "") for row in inputs]
        if "memory" in moods:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        probs = super().__call__(inputs)
        probs[[mood == "nan" for mood in moods]] = np.nan
        probs[[mood == "sum" for mood in moods]] *= 2
        return probs


def make_moody(images: Dataset, moods: dict[int, str]) -> dict[str, Any]:
    keys = MeanColour(1).prepare(images["image"][:])
    return {"a": MeanColour(30), "b": Moody({keys[row].tobytes(): mood for row, mood in moods.items()})}


@pytest.mark.parametrize(
    ("mood", "message"),
    [
        ("raise", "Teacher 'b' must be able to read every row, got: no such colour in row 13 (id 13)"),
        ("nan", "must be finite, not negative and sum to 1, got [nan, nan, nan, nan] (sum nan) in row 13 (id 13)"),
        ("sum", "(sum 2.0000) in row 13 (id 13)"),
    ],
)
def test_a_row_that_breaks_a_teacher_is_named_or_missing_for_it_alone(
    images: Dataset, two: TeacherHierarchy, mood: str, message: str
) -> None:
    dataset = images.add_column("id", list(range(48)))
    models = make_moody(images, {13: mood, 40: mood})
    with pytest.raises(ValueError) as error:
        quiet_pool(dataset, two, models=models)
    assert message in str(error.value)

    pool = quiet_pool(dataset, two, models=models, on_error="missing")
    assert np.flatnonzero(~pool.answered("b")).tolist() == [13, 40] and pool.answered("a").all()
    assert [pool.facts[name]["num_failed"] for name in "ab"] == [0, 2]


def test_a_teacher_that_fails_on_every_row_is_an_error(images: Dataset, two: TeacherHierarchy, tmp_path: Path) -> None:
    dataset = images.select(range(3)).add_column("id", list(range(3)))
    build = partial(quiet_pool, dataset, two, on_error="missing", output_dir=tmp_path / "pool")
    with pytest.raises(ValueError) as error:
        build(models=make_moody(images, dict.fromkeys(range(3), "raise")))
    assert str(error.value) == (
        "Teacher 'b' must be able to label at least one row, got 3 of 3 rows that it failed on, id 0 first: Teacher "
        "'b' must be able to read every row, got: no such colour. Correct the teacher, or the column that it reads."
    )
    # Its failures are forgotten, so that a repaired one can go on.
    assert build(models=make_models()).answered("b").all()


def test_memory_that_runs_out_is_no_missing_row(images: Dataset, two: TeacherHierarchy) -> None:
    with pytest.raises(MemoryError) as error:
        quiet_pool(images, two, models=make_moody(images, {1: "memory"}), on_error="missing")
    assert str(error.value) == (
        "A batch of 48 rows for teacher 'b' must fit into memory, got: CUDA out of memory. Choose a smaller "
        "`batch_size`."
    )


# ── the same, however it is run ─────────────────────────────────────────────────────────────────────────────────────


def test_each_image_is_decoded_and_prepared_once_for_all_teachers(
    images: Dataset, tiny_labels: tuple[str, ...], monkeypatch: Any
) -> None:
    names = [f"t{number}" for number in range(5)]
    decoded, prepared = [], []
    real = running.decode_image
    monkeypatch.setattr(running, "decode_image", lambda *given: decoded.append(1) or real(*given))
    models = {name: MeanColour(30) for name in names}
    models["t4"].facts["preprocessing"] = "another"
    for model in models.values():
        model.prepare = lambda cells: prepared.extend(cells) or MeanColour(1).prepare(cells)  # type: ignore
    hierarchy = TeacherHierarchy(tiny_labels, [Teacher(name) for name in names])
    quiet_pool(images, hierarchy, models=models, batch_size=5)
    assert (len(decoded), len(prepared)) == (48, 2 * 48)


def test_workers_give_the_same_pool(hierarchy: TeacherHierarchy, images: Dataset) -> None:
    alone, helped = (quiet_pool(images, hierarchy, batch_size=10, num_workers=number) for number in (0, 2))
    assert_same(alone, helped)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_labelling_leaves_the_random_state_alone(images: Dataset, two: TeacherHierarchy, num_workers: int) -> None:
    state = torch.random.get_rng_state()
    quiet_pool(images, two, models=make_models(), num_workers=num_workers)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(("precision", "atol"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_mixed_precision_is_close(hierarchy: TeacherHierarchy, images: Dataset, precision: str, atol: float) -> None:
    exact, mixed = quiet_pool(images, hierarchy), quiet_pool(images, hierarchy, precision=precision)
    for name in hierarchy.names:
        np.testing.assert_allclose(exact.decode(name), mixed.decode(name), atol=atol)
        assert mixed.facts[name]["precision"] == precision
    assert (exact.label_probs("vit") != mixed.label_probs("vit")).any()


def test_the_smallest_pool(images: Dataset) -> None:
    hierarchy = TeacherHierarchy(["dark", "bright"], [Teacher("a")])

    class Brightness(MeanColour):
        def __call__(self, inputs: np.ndarray) -> np.ndarray:
            bright = inputs.mean(axis=1, keepdims=True) / 255
            return np.concatenate([1 - bright, bright], axis=1)

    pool = quiet_pool(images.select([7]), hierarchy, models={"a": Brightness(1)}, pool_k=1)
    bright = np.asarray(images[7]["image"]).mean() / 255
    assert len(pool) == 1 and pool.facts["a"]["dropped_mass"] == pytest.approx(min(bright, 1 - bright), abs=1e-6)


def test_dropped_mass_is_what_was_not_kept(images: Dataset, two: TeacherHierarchy) -> None:
    whole, part = (quiet_pool(images, two, models=make_models(), pool_k=k) for k in (4, 2))
    kept = np.sort(whole.decode("a"), axis=1)[:, -2:].sum(axis=1)
    assert whole.facts["a"]["dropped_mass"] == 0
    assert part.facts["a"]["dropped_mass"] == pytest.approx((1 - kept).mean(), abs=1e-3)


def test_unusable_options_are_refused(images: Dataset, two: TeacherHierarchy) -> None:
    refused = [
        ({"models": {"c": MeanColour(1)}}, r"`models` must be named as teachers of the hierarchy \['a', 'b'\], got"),
        ({"precision": "int8"}, r"`precision` must be one of \['float32', 'bfloat16', 'float16'\], got 'int8'"),
        ({"precision": ["int8"]}, r"`precision` must be one of .* got \['int8'\]"),
        ({"on_error": "skip"}, r"`on_error` must be one of \['raise', 'missing'\], got 'skip'"),
        ({"num_workers": -1}, "`num_workers` must be at least 0"),
        (
            {"models": make_models() | {"b": lambda_teacher()}},
            r"must give probabilities of shape \(48, 4\), got \(48,",
        ),
    ]
    for options, message in refused:
        with pytest.raises(ValueError, match=message):
            quiet_pool(images, two, **({"models": make_models()} | options))


def lambda_teacher() -> Any:
    teacher = MeanColour(1)
    teacher.__class__ = type("Wide", (MeanColour,), {"__call__": lambda self, inputs: np.ones((len(inputs), 9)) / 9})
    return teacher


# ── disks ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("where", ["journal", "pool", "inputs"])
def test_a_full_disk_loses_nothing(
    images: Dataset, two: TeacherHierarchy, tmp_path: Path, monkeypatch: Any, where: str
) -> None:
    build = partial(quiet_pool, images, two, batch_size=6, output_dir=tmp_path / "pool")
    calls = []

    def full(*args: Any) -> None:
        calls.append(1)
        if where != "journal" or len(calls) > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    place, name = {
        "journal": (progress, "write_all"),
        "pool": (forms, "write_teacher"),
        "inputs": (PseudolabelPool, "save"),
    }[where]
    real = getattr(place, name)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="room for about .* MB in all") as error:
        patch.setattr(place, name, full)
        build(models=make_models())
    assert str(error.value).endswith("Free some space and run this again: what is labelled stays.")
    models = make_models()
    assert_same(build(models=models), quiet_pool(images, two, batch_size=6, models=make_models()))
    assert models["a"].batches == (3 if where == "journal" else 0)
    assert [path.name for path in tmp_path.iterdir()] == ["pool"]


def test_a_limit_on_files_is_one_clear_error(images: Dataset, two: TeacherHierarchy, tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # a plan fits, and the labels of some of the rows
        message = ""
        try:
            quiet_pool(images, two, batch_size=1, models=make_models(), output_dir=tmp_path / "pool")
        except OSError as error:
            message = str(error)
        os._exit(0 if "room for about" in message else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    models = make_models()
    quiet_pool(images, two, batch_size=1, models=models, output_dir=tmp_path / "pool")
    assert 0 < models["a"].batches < 48


def test_a_pool_loads_from_a_folder_that_cannot_be_written(
    images: Dataset, two: TeacherHierarchy, tmp_path: Path
) -> None:
    pool = quiet_pool(images, two, models=make_models(), output_dir=tmp_path / "pool")
    before = sorted(tmp_path.rglob("*"))
    for path in (tmp_path, *before):
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert_same(PseudolabelPool.load(tmp_path / "pool"), pool)
    assert sorted(tmp_path.rglob("*")) == before
    for path in (tmp_path, *before):
        path.chmod(0o755)


# ── teachers of another pool ────────────────────────────────────────────────────────────────────────────────────────


def test_adding_a_teacher_runs_and_copies_none_of_the_others(
    tiny_vit: str, tiny_labels: tuple[str, ...], images: Dataset, tmp_path: Path, monkeypatch: Any
) -> None:
    vit = Teacher(tiny_vit)
    old = quiet_pool(images, TeacherHierarchy(tiny_labels, [vit]), output_dir=tmp_path / "old")
    wider = TeacherHierarchy(tiny_labels, [Teacher("b"), replace(vit, level=1)])
    monkeypatch.setattr(forms, "load_teacher", None)
    models = {"b": MeanColour(30)}

    new = quiet_pool(images, wider, models=models, output_dir=tmp_path / "new", reuse=old)

    files = [tmp_path / name / "teachers" / "vit" / "data.arrow" for name in ("old", "new")]
    assert files[0].stat().st_ino == files[1].stat().st_ino
    np.testing.assert_array_equal(new.label_probs("vit"), old.label_probs("vit"))
    assert new.facts["vit"] == old.facts["vit"] and len(models["b"].seen) == 48
    assert (tmp_path / "new" / "teachers" / "b" / "data.arrow").stat().st_nlink == 1

    without = quiet_pool(images, wider, models=models, reuse=old)
    assert_same(without, new)


def test_reused_teachers_are_matched_by_id(images: Dataset, two: TeacherHierarchy, tmp_path: Path) -> None:
    old = quiet_pool(images, two, models=make_models(), output_dir=tmp_path / "old")
    order = np.random.default_rng(0).permutation(48)[:40]

    models = make_models()
    new = quiet_pool(images.select(order), two, models=models, output_dir=tmp_path / "new", reuse=old)

    assert models["a"].seen == models["b"].seen == []
    np.testing.assert_array_equal(new.label_ids("b"), old.label_ids("b")[order])
    np.testing.assert_array_equal(PseudolabelPool.load(tmp_path / "new").label_probs("a"), old.label_probs("a")[order])
    few = quiet_pool(images.select(range(9)), two, models=make_models())
    with pytest.raises(ValueError, match="`reuse` must hold every id of the other side, got 39 missing of 48"):
        quiet_pool(images, two, models=make_models(), reuse=few)
    with pytest.raises(ValueError, match=r"`reuse` must be a pool of the labels \['a', 'b'\], got one of \['ant',"):
        quiet_pool(images, TeacherHierarchy("ab", [Teacher("a")]), models={"a": MeanColour(1)}, reuse=few)


def test_a_teacher_that_is_another_now_is_run_again(
    tiny_vit: str, tiny_labels: tuple[str, ...], images: Dataset, tmp_path: Path
) -> None:
    folder = copy_model(tiny_vit, tmp_path / "vit")
    hierarchy = TeacherHierarchy(tiny_labels, [Teacher(str(folder))])
    old = quiet_pool(images, hierarchy)
    weights = load_file(folder / "model.safetensors")
    save_file({key: value * 2 for key, value in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    new = quiet_pool(images, hierarchy, reuse=old)
    assert new.facts["vit"]["weights"] != old.facts["vit"]["weights"]
    assert (new.label_probs("vit") != old.label_probs("vit")).any()


def test_a_model_that_says_one_thing_of_everything_is_told_of(tmp_path: Path, caplog: Any) -> None:
    from sklearn.dummy import DummyClassifier

    data = Dataset.from_dict({"values": np.random.default_rng(0).random((32, 2)).tolist()})
    model = DummyClassifier(strategy="prior").fit(np.zeros((3, 2)), ["a", "b", "a"])
    save_sklearn_teacher(model, tmp_path / "same", {"kind": "values"})
    same = Teacher(str(tmp_path / "same"), trusted_types=["sklearn.dummy.DummyClassifier"])
    pool = quiet_pool(data, TeacherHierarchy(["a", "b"], [same]))
    assert "Teacher 'same' gives 'a' to each of 32 rows, and tells nothing apart. Correct what" in caplog.text
    caplog.clear()
    # With few rows it may be right, and what another pool holds was told of when it was labelled.
    quiet_pool(data.select(range(31)), TeacherHierarchy(["a", "b"], [same]), output_dir=tmp_path / "pool")
    quiet_pool(data, TeacherHierarchy(["a", "b"], [same]), reuse=pool)
    assert not caplog.text

"""Features: the head's real inputs, computed once per content, found again whatever the order."""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value, concatenate_datasets
from filelock import FileLock
from PIL import Image as PILImage
from torch import nn

from hf_cosupervise.data.inputs import InputProcessor
from hf_cosupervise.method.neighbors import nearest_neighbors
from hf_cosupervise.students import features as features_module
from hf_cosupervise.students.features import FeatureStore, backbone_key, row_digests
from hf_cosupervise.students.head import linear_head
from hf_cosupervise.students.loading import load_student

LABELS = ["ant", "bee", "cat", "dog"]


def as_process(rank: int, count: int, wait: Callable[[], Any]) -> Any:
    return SimpleNamespace(rank=rank, count=count, wait=wait)


class Counter:
    """A student with everything a store needs, that counts the rows its backbone has seen."""

    def __init__(self, folder: str, path: Path) -> None:
        self.model, processing_class = load_student(folder, LABELS)
        self.model.eval()
        self.head = linear_head(self.model)
        self.processor = InputProcessor(processing_class, self.model.config)
        self.path = path
        self.batches: list[int] = []
        self.model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: nn.Module, args: tuple[()], kwargs: dict[str, torch.Tensor]) -> None:
        self.batches.append(len(next(iter(kwargs.values()))))

    def store(self, **options: Any) -> FeatureStore:
        return FeatureStore(self.path, self.model, self.head, self.processor, **options)

    def direct(self, cells: list[Any]) -> np.ndarray:
        """The head's inputs, row by row, by another way than the store's."""
        rows: list[torch.Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0]))
        with torch.no_grad():
            for cell in cells:
                self.model(**self.processor([cell]))
        hook.remove()
        self.batches.clear()
        return torch.cat(rows).numpy()


@pytest.fixture()
def vit(tiny_vit, tmp_path) -> Counter:
    return Counter(tiny_vit, tmp_path / "features")


@pytest.fixture()
def bert(tiny_bert, tmp_path) -> Counter:
    return Counter(tiny_bert, tmp_path / "features")


def test_images(vit, tiny_image_dataset):
    dataset = tiny_image_dataset.select(range(20))
    features = vit.store().features(dataset, "image", batch_size=8, disable_tqdm=True)
    assert vit.batches == [8, 8, 4]
    assert features.shape == (20, 16) and features.dtype == np.float32
    np.testing.assert_allclose(features, vit.direct(dataset["image"]), atol=1e-5)
    # through the head they give the model's own logits
    inputs = vit.processor(dataset["image"])
    with torch.no_grad():
        torch.testing.assert_close(
            vit.head(torch.from_numpy(np.array(features))), vit.model(**inputs).logits, atol=1e-5, rtol=0
        )


def test_texts_of_unequal_length(bert, tiny_text_dataset):
    # rows are padded to the longest of their batch; that must not show in the features
    dataset = tiny_text_dataset.select(range(20))
    features = bert.store().features(dataset, "text", batch_size=7, disable_tqdm=True)
    assert bert.batches == [7, 7, 6]
    np.testing.assert_allclose(features, bert.direct(dataset["text"]), atol=1e-5)


def test_timm_convolutions(tiny_timm, tiny_image_dataset, tmp_path):
    # the backbone runs in another memory layout, which must not change what it says
    student = Counter(tiny_timm, tmp_path)
    dataset = tiny_image_dataset.select(range(6))
    expected = student.direct(dataset["image"])
    features = student.store().features(dataset, "image", batch_size=4, disable_tqdm=True)
    np.testing.assert_allclose(features, expected, atol=1e-4)
    assert np.abs(features).max() > 0.01


def test_known_rows_need_no_forward_pass(vit, tiny_image_dataset):
    store = vit.store()
    order = np.random.default_rng(0).permutation(48)
    features = np.array(store.features(tiny_image_dataset, "image", disable_tqdm=True))
    vit.batches.clear()
    again = store.features(tiny_image_dataset, "image", disable_tqdm=True)
    shuffled = store.features(tiny_image_dataset.select(order), "image", disable_tqdm=True)
    # another store, as a later run makes it; another name of the column; a part of the rows, one of them twice
    renamed = tiny_image_dataset.rename_column("image", "picture").select([5, 3, 5])
    later = vit.store().features(renamed, "picture", disable_tqdm=True)
    assert vit.batches == []
    assert np.array_equal(again, features)
    assert np.array_equal(shuffled, features[order])
    assert np.array_equal(later, features[[5, 3, 5]])


def test_known_texts_need_no_forward_pass(bert, tiny_text_dataset):
    # a tokenizer keeps the padding of its last call: that must not make it another tokenizer
    features = np.array(bert.store().features(tiny_text_dataset, "text", batch_size=48, disable_tqdm=True))
    assert bert.batches == [48]
    assert np.array_equal(bert.store().features(tiny_text_dataset, "text", disable_tqdm=True), features)
    assert bert.batches == [48]


def test_rows_in_order_are_mapped_from_disk(vit, tiny_image_dataset):
    store = vit.store()
    features = store.features(tiny_image_dataset, "image", disable_tqdm=True)
    assert isinstance(features, np.memmap) and features.mode == "c"  # writing to it does not reach the disk
    part = store.features(tiny_image_dataset.select(range(10, 20)), "image", disable_tqdm=True)
    assert isinstance(part, np.memmap) and np.array_equal(part, features[10:20])


def test_only_what_is_new_is_computed(vit, tiny_image_dataset):
    store = vit.store()
    first = np.array(store.features(tiny_image_dataset.select(range(10)), "image", batch_size=100, disable_tqdm=True))
    features = store.features(tiny_image_dataset.select(range(4, 30)), "image", batch_size=100, disable_tqdm=True)
    assert vit.batches == [10, 20]
    assert np.array_equal(features[:6], first[4:])
    expected = vit.direct(tiny_image_dataset.select(range(4, 30))["image"])
    np.testing.assert_allclose(features, expected, atol=1e-5)


def test_equal_rows_are_computed_once(vit, tiny_image_dataset):
    few = tiny_image_dataset.select([0, 1, 0, 0, 2, 1])
    features = vit.store().features(concatenate_datasets([few, few]), "image", disable_tqdm=True)
    assert vit.batches == [3]
    assert np.array_equal(features[:6], features[6:]) and np.array_equal(features[0], features[3])
    assert not np.array_equal(features[0], features[1])


def test_no_rows(vit, tiny_image_dataset):
    features = vit.store().features(tiny_image_dataset.select([]), "image", disable_tqdm=True)
    assert features.shape == (0, 16) and vit.batches == []


def test_content_not_place_decides(vit, tiny_image_dataset, tmp_path):
    # the same bytes as a file on disk or inside the dataset; other bytes under the same name are another image
    cell = tiny_image_dataset.cast_column("image", Image(decode=False))[0]["image"]
    path = tmp_path / "image.png"
    path.write_bytes(cell["bytes"])
    store = vit.store()
    inside = np.array(store.features(tiny_image_dataset.select([0]), "image", disable_tqdm=True))
    files = Dataset.from_dict({"image": [str(path)]}, features=Features({"image": Image()}))
    assert np.array_equal(store.features(files, "image", disable_tqdm=True), inside) and vit.batches == [1]
    PILImage.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(path)
    other = store.features(files, "image", disable_tqdm=True)
    assert vit.batches == [1, 1] and not np.allclose(other, inside, atol=1e-3)


# ── what a store belongs to ─────────────────────────────────────────────────────────────────────────────────────────


def test_head_does_not_matter(vit, tiny_image_dataset):
    before = vit.store().folder
    with torch.no_grad():
        vit.head.weight += 1
        vit.head.bias -= 1
    assert vit.store().folder == before
    assert backbone_key(vit.model, vit.head, vit.processor, "float32") == before.name
    vit.model.requires_grad_(False)
    vit.model.train()
    assert vit.store().folder == before


def test_same_backbone_with_another_head_shares(tiny_vit, vit):
    # two label sets, one backbone
    model, processing_class = load_student(tiny_vit, ["x", "y"], seed=9)
    assert (
        backbone_key(model, linear_head(model), InputProcessor(processing_class, model.config), "float32")
        == vit.store().folder.name
    )


@pytest.mark.parametrize("what", ["weight", "buffer", "precision", "mean", "size", "mode"])
def test_another_backbone_or_preprocessing_is_another_store(what, vit, tiny_timm, tmp_path):
    student = Counter(tiny_timm, tmp_path) if what == "buffer" else vit
    before, options = student.store().folder, {}
    if what == "weight":
        with torch.no_grad():
            next(student.model.parameters()).view(-1)[0] += 1e-3
    elif what == "buffer":
        name, buffer = next((name, value) for name, value in student.model.named_buffers() if "running_mean" in name)
        buffer.view(-1)[0] += 1e-3
    elif what == "precision":
        options["precision"] = "bfloat16"
    elif what == "mode":
        student.processor.mode = "L"
    else:
        student.processor = copy.deepcopy(student.processor)
        changed = {"mean": ("image_mean", [0.1, 0.2, 0.3]), "size": ("size", {"height": 12, "width": 12})}[what]
        setattr(student.processor.processing_class, *changed)
    after = student.store(**options).folder
    assert after != before and after.parent == before.parent


def test_another_tokenizer_is_another_store(bert):
    before = bert.store().folder
    tokenizer = copy.deepcopy(bert.processor.processing_class)
    tokenizer.model_max_length = 8
    bert.processor = InputProcessor(tokenizer, bert.model.config)
    assert bert.store().folder != before
    tokenizer = copy.deepcopy(bert.processor.processing_class)
    tokenizer.add_tokens(["badger"])
    bert.processor = InputProcessor(tokenizer, bert.model.config)
    assert bert.store().folder != before


def test_precision_of_the_forward_pass(vit, tiny_image_dataset):
    dataset = tiny_image_dataset.select(range(8))
    exact = np.array(vit.store().features(dataset, "image", disable_tqdm=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = vit.store(precision="bfloat16").features(dataset, "image", disable_tqdm=True)
    assert vit.batches == [8, 8] and features.dtype == np.float32
    np.testing.assert_allclose(features, exact, atol=0.2)
    assert not np.array_equal(features, exact)


# ── writing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def left_over(path: Path) -> list[str]:
    return sorted(
        str(item.relative_to(path)) for item in path.rglob("*") if not item.is_dir() or not any(item.iterdir())
    )


class StopError(Exception):
    """What an interrupted run raises, instead of a `KeyboardInterrupt` that would end the tests."""


def interrupt(student: Counter, dataset: Dataset, batch_size: int, num_batches: int, column: str = "image") -> None:
    """Compute features, and stop in the batch after so many."""
    store, calls = student.store(), []

    def prepare(cells: list[Any]) -> dict[str, torch.Tensor]:
        calls.append(len(cells))
        if len(calls) > num_batches:
            raise StopError
        return student.processor(cells)

    store.processor = prepare
    with pytest.raises(StopError):
        store.features(dataset, column, batch_size=batch_size, disable_tqdm=True)
    assert student.batches == [batch_size] * num_batches
    assert not student.head._forward_pre_hooks  # which would keep every later batch
    student.batches.clear()


def bits_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("num_batches", [0, 1, 4])
def test_interrupted_work_is_gone_on_with(vit, bert, tiny_image_dataset, tiny_text_dataset, tmp_path, num_batches):
    # texts are padded to the longest of their batch, so only batches that are cut alike give the same bits
    for student, data, column in ((vit, tiny_image_dataset, "image"), (bert, tiny_text_dataset, "text")):
        student.path = tmp_path / f"whole-{column}"
        student.store().features(data, column, batch_size=10, disable_tqdm=True)
        student.batches.clear()
        whole, student.path = bits_in(student.path), tmp_path / f"interrupted-{column}"
        interrupt(student, data, 10, num_batches, column)
        (name,) = names_in(student.store().folder)
        assert name.startswith(".partial-shard-")
        student.store().features(data, column, batch_size=10, disable_tqdm=True)
        assert student.batches == [10, 10, 10, 10, 8][num_batches:]
        assert bits_in(student.path) == whole
        student.batches.clear()


@pytest.mark.parametrize(
    ("damage", "num_left"),
    [
        ("none", 3),
        ("last row", 4),
        ("last line", 4),
        ("second line", 4),
        ("second batch", 4),
        ("header", 5),
        ("no lines", 5),
        ("no values", 5),
        ("keys", 3),
        ("more rows", 3),
        ("longer lines", 3),
    ],
)
def test_only_whole_batches_are_kept(vit, tiny_image_dataset, tmp_path, damage, num_left):
    vit.path = tmp_path / "whole"
    vit.store().features(tiny_image_dataset, "image", batch_size=10, disable_tqdm=True)
    vit.batches.clear()
    whole, vit.path = bits_in(vit.path), tmp_path / "interrupted"
    interrupt(vit, tiny_image_dataset, 10, 2)
    (folder,) = vit.store().folder.glob(".partial-*")
    values, lines = folder / "features.npy", folder / "batches.txt"
    if damage == "last row":
        os.truncate(values, values.stat().st_size - 5)
    elif damage == "last line":
        os.truncate(lines, lines.stat().st_size - 1)
    elif damage in ("second line", "second batch", "header"):
        path, place = {"second line": (lines, 12), "second batch": (values, 128 + 900), "header": (values, 60)}[damage]
        flip(path, place)
    elif damage in ("no lines", "no values", "keys"):
        {"no lines": lines, "no values": values, "keys": folder / "keys.npy"}[damage].unlink()
    elif damage != "none":
        with open(values if damage == "more rows" else lines, "ab") as file:
            file.write(b"0" * 70)
    interrupt(vit, tiny_image_dataset, 10, 1)  # what comes after the damage is found again, too
    vit.store().features(tiny_image_dataset, "image", batch_size=10, disable_tqdm=True)
    assert len(vit.batches) == num_left - 1 and bits_in(vit.path) == whole


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_another_batch_size_or_other_rows_begin_again(vit, tiny_image_dataset):
    interrupt(vit, tiny_image_dataset, 10, 2)
    part = vit.store().features(tiny_image_dataset.select(range(5, 48)), "image", batch_size=9, disable_tqdm=True)
    assert vit.batches == [9, 9, 9, 9, 7] and len(names_in(vit.store().folder)) == 2
    vit.batches.clear()
    features = vit.store().features(tiny_image_dataset, "image", batch_size=16, disable_tqdm=True)
    # 43 rows are known; what the first run began is of rows that all are known now, so it is gone
    assert vit.batches == [5] and np.array_equal(features[5:], part)
    assert all(name.startswith("shard-") for name in names_in(vit.store().folder))
    np.testing.assert_allclose(features, vit.direct(tiny_image_dataset["image"]), atol=1e-5)


def test_another_batch_size_alone_begins_again(vit, tiny_image_dataset, tmp_path):
    interrupt(vit, tiny_image_dataset, 10, 2)
    features = vit.store().features(tiny_image_dataset, "image", batch_size=20, disable_tqdm=True)
    assert vit.batches == [20, 20, 8]
    vit.path = tmp_path / "whole"
    assert np.array_equal(
        vit.store().features(tiny_image_dataset, "image", batch_size=20, disable_tqdm=True), features
    )


def test_progress_starts_where_it_goes_on(vit, tiny_image_dataset, monkeypatch):
    interrupt(vit, tiny_image_dataset, 10, 3)
    bars = []
    real = features_module.tqdm
    monkeypatch.setattr(features_module, "tqdm", lambda **options: bars.append(options) or real(**options))
    vit.store().features(tiny_image_dataset, "image", batch_size=10, disable_tqdm=True)
    assert [(bar["initial"], bar["total"]) for bar in bars] == [(30, 48)]


def test_two_runs_at_once_do_not_write_one_folder(vit, tiny_vit, tiny_image_dataset, tmp_path):
    # the second begins while the first computes, and ends before it
    first, second = vit.store(), Counter(tiny_vit, vit.path)
    seen, found = [], []

    def prepare(cells: list[Any]) -> dict[str, torch.Tensor]:
        seen.append(names_in(first.folder))
        if len(seen) == 3:
            store, whole = second.store(), second.processor
            store.processor = lambda cells: seen.append(names_in(first.folder)) or whole(cells)
            found.append(np.array(store.features(tiny_image_dataset, "image", batch_size=16, disable_tqdm=True)))
        return vit.processor(cells)

    first.processor = prepare
    features = first.features(tiny_image_dataset, "image", batch_size=10, disable_tqdm=True)
    assert vit.batches == [10, 10, 10, 10, 8] and second.batches == [16, 16, 16]
    # beside each folder in progress is its lock; from the fourth batch of the first on, there is the second's shard
    kinds = [[name.split("-")[0] for name in names if not name.endswith(".lock")] for names in seen]
    assert kinds == [[".partial"]] * 3 + [[".partial", ".private"]] * 3 + [[".partial", "shard"]] * 2
    assert np.array_equal(features, found[0])  # who ends first is right for both
    (name,) = names_in(first.folder)
    assert name.startswith("shard-")


def test_what_dead_runs_left_is_deleted_but_for_work_to_go_on_with(vit, tiny_image_dataset):
    folder = vit.store().folder
    interrupt(vit, tiny_image_dataset.select(range(20)), 10, 1)
    (kept,) = names_in(folder)
    for name in (
        ".private-shard-0123456789abcdef-01234567",
        ".private-ordered-0-0",
        ".partial-broken",
        ".partial-old",
    ):
        shutil.copytree(folder / kept, folder / name)
    (folder / ".partial-broken" / "keys.npy").write_bytes(b"no keys")
    np.save(folder / ".partial-old" / "keys.npy", np.zeros(3))
    (folder / f"{kept}.lock").touch()
    (folder / ".partial-gone.lock").touch()
    vit.store().features(tiny_image_dataset.select(range(30, 40)), "image", disable_tqdm=True)
    first, second = names_in(folder)
    assert first == kept and second.startswith("shard-")


def test_a_disk_without_locks(vit, tiny_image_dataset, monkeypatch):
    def refuse(lock: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr(FileLock, "acquire", refuse)
    vit.store().features(tiny_image_dataset, "image", disable_tqdm=True)
    (name,) = names_in(vit.store().folder)
    assert name.startswith("shard-")


def test_a_shard_that_another_run_adds_meanwhile_moves_no_row(vit, tiny_image_dataset, monkeypatch):
    # its name may come first, so that every row would be counted from another place
    given = draw_features(48)
    for number, (own, others) in enumerate([(range(24), range(24, 48)), (range(24, 48), range(24))]):
        store = vit.store(precision=f"try-{number}")
        store.write(tiny_image_dataset.select(own), "image", [given[list(own)]])

        def add(self: FeatureStore, store: Any = store, others: Any = others) -> None:
            store.write(tiny_image_dataset.select(others), "image", [given[list(others)]])

        monkeypatch.setattr(FeatureStore, "_clean", add)
        found = store.features(tiny_image_dataset.select(own[::-1]), "image", disable_tqdm=True)
        assert np.array_equal(found, given[list(own)[::-1]])


def test_a_configuration_that_computes_otherwise_has_another_key(vit, tmp_path, tiny_vit):
    def key_with(**changes: Any) -> str:
        folder = tmp_path / "-".join(["vit", *changes])
        shutil.copytree(tiny_vit, folder)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return Counter(str(folder), tmp_path).store().folder.name

    own = vit.store().folder.name
    changes = [{"hidden_act": "relu"}, {"layer_norm_eps": 0.5}, {"num_attention_heads": 1}]
    keys = {key_with(**change) for change in changes}
    assert len(keys) == len(changes) and own not in keys
    assert key_with() == key_with(problem_type=None, id2label=dict(enumerate("wxyz")), label2id={}) == own


def test_half_written_folder_is_not_read(vit, tiny_image_dataset):
    # what a killed process leaves has another name than a finished shard
    store = vit.store()
    (store.folder / ".partial-abc").mkdir(parents=True)
    np.save(store.folder / ".partial-abc" / "features.npy", np.zeros((48, 16), dtype=np.float32))
    features = store.features(tiny_image_dataset, "image", disable_tqdm=True)
    assert sum(vit.batches) == 48 and np.abs(features).max() > 0.01


def test_files_hold_no_pickles(vit, tiny_image_dataset):
    store = vit.store()
    store.features(tiny_image_dataset, "image", disable_tqdm=True)
    files = left_over(store.folder)
    assert sorted(Path(name).name for name in files) == ["backbone.txt", "features.npy", "keys.npy"]
    for name in files:
        if name.endswith(".npy"):
            np.load(store.folder / name, allow_pickle=False)


def test_hook_is_taken_off(vit, tiny_image_dataset):
    vit.store().features(tiny_image_dataset.select(range(3)), "image", disable_tqdm=True)
    assert not vit.head._forward_pre_hooks


@pytest.mark.parametrize("num_processes", [2, 3])
def test_several_processes_share_the_work(tiny_vit, tiny_image_dataset, num_processes, tmp_path):
    # 5 different images, 3 of them twice: with 3 processes 2 + 2 + 1 forward passes, and the same features for all
    dataset = tiny_image_dataset.select([0, 1, 2, 3, 4, 2, 1, 0])
    students = [Counter(tiny_vit, tmp_path / "features") for _ in range(num_processes)]
    barrier = threading.Barrier(num_processes, timeout=20)
    found: dict[int, np.ndarray] = {}

    def work(process: int) -> None:
        store, own = students[process].store(), as_process(process, num_processes, barrier.wait)
        found[process] = np.array(store.features(dataset, "image", batch_size=1, processes=own, disable_tqdm=True))

    threads = [threading.Thread(target=work, args=(process,)) for process in range(num_processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(student.batches) for student in students] == ([3, 2] if num_processes == 2 else [2, 2, 1])
    expected = students[0].direct(dataset["image"])
    for features in found.values():
        np.testing.assert_allclose(features, expected, atol=1e-5)
    # one process that comes later finds all of it
    alone = students[1].store().features(dataset, "image", disable_tqdm=True)
    assert np.array_equal(alone, found[0])
    assert sum(len(student.batches) for student in students[1:]) == (2 if num_processes == 2 else 3)


def test_barriers_stand_around_the_writing(vit, tiny_image_dataset):
    # every process calls both, also one that has nothing to compute: else the others would wait for ever
    calls: list[str] = []

    def features(wait: Callable[[], None], shard: tuple[int, int]) -> None:
        processes = as_process(*shard, wait)
        vit.store().features(tiny_image_dataset.select([0]), "image", processes=processes, disable_tqdm=True)

    with pytest.raises(FileNotFoundError, match="must hold the features of all 1 rows, got none of 1. Give a `fea"):
        features(lambda: calls.append("wait"), (1, 2))  # the other process never wrote what this one needs
    assert calls == ["wait", "wait"] and vit.batches == []
    features(lambda: calls.append("wait"), (0, 2))
    assert calls == ["wait"] * 4 and vit.batches == [1]


def test_nothing_of_the_student_changes(vit, tiny_image_dataset):
    before = {name: value.clone() for name, value in vit.model.state_dict().items()}
    vit.store().features(tiny_image_dataset.select(range(4)), "image", disable_tqdm=True)
    after = vit.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not vit.model.training


# ── features computed elsewhere, or kept in half the space ──────────────────────────────────────────────────────────


def draw_features(num_examples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num_examples, 16)).astype(np.float32)


def names_in(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir()) if folder.is_dir() else []


@pytest.mark.parametrize("sizes", [[48], [20, 20, 8], [1] * 48, [47, 0, 1]])
def test_written_features_are_read_without_the_backbone(sizes, vit, tiny_image_dataset):
    given = draw_features(48)
    edges = np.cumsum([0, *sizes])
    vit.store().write(
        tiny_image_dataset, "image", (given[low:high] for low, high in zip(edges, edges[1:]))
    )  # a generator: nothing needs all batches at once
    found = vit.store().features(tiny_image_dataset, "image", disable_tqdm=True)
    assert np.array_equal(found, given) and isinstance(found, np.memmap)
    order = np.random.default_rng(1).permutation(48)
    assert np.array_equal(vit.store().features(tiny_image_dataset.select(order), "image"), given[order])
    assert vit.batches == []


@pytest.mark.parametrize(
    "given, wanted, num_lacking",
    [
        (range(20), range(48), 28),
        (range(47), range(48), 1),
        (range(20), range(20, 40), 20),
        (range(20), [5, 47, 5], 1),
        ([3], [2], 1),
        (range(1, 48), range(3), 1),
    ],
)
def test_rows_that_lack_among_written_ones_are_refused(given, wanted, num_lacking, vit, tiny_image_dataset):
    # the backbone here may be a stand-in for the one that the features are of
    vit.store().write(tiny_image_dataset.select(given), "image", [draw_features(len(given))])
    with pytest.raises(ValueError) as error:
        vit.store().features(tiny_image_dataset.select(wanted), "image", disable_tqdm=True)
    assert str(error.value) == (
        f"'{vit.store().folder}' must hold the features of all {len(wanted)} rows, because they are computed "
        f"elsewhere and put in by `write`, got none of {num_lacking}. Put those in too, or give another "
        "`features_dir`."
    )
    assert vit.batches == []


def test_features_may_be_written_beside_computed_ones(vit, tiny_image_dataset):
    first, given = tiny_image_dataset.select(range(20)), draw_features(28)
    computed = np.array(vit.store().features(first, "image", batch_size=100, disable_tqdm=True))
    vit.store().write(tiny_image_dataset.select(range(20, 48)), "image", [given])
    found = vit.store().features(tiny_image_dataset, "image", disable_tqdm=True)
    assert vit.batches == [20] and np.array_equal(found, np.concatenate([computed, given]))


def test_a_row_without_an_input_needs_no_written_features(vit, tiny_image_dataset):
    given = draw_features(4)
    vit.store().write(tiny_image_dataset.select(range(4)), "image", [given])
    cells = tiny_image_dataset.cast_column("image", Image(decode=False))[:4]["image"]
    missing = Dataset.from_dict({"image": [None, *cells, {"bytes": None, "path": None}]})
    missing = missing.cast_column("image", Image())
    found = vit.store().features(missing, "image", disable_tqdm=True)
    assert np.array_equal(found, np.concatenate([np.zeros((1, 16)), given, np.zeros((1, 16))]).astype(np.float32))
    silent = np.array([True, True, False, True, True])  # a row that nobody answered is not looked up either
    moved = missing.select([1, 2, 3, 4, 0])
    digests = row_digests(moved, "image", silent)
    found = vit.store().features(moved, "image", digests=digests, disable_tqdm=True)
    assert np.array_equal(found[:4], given * silent[:4, None]) and vit.batches == []


HANDLES = {
    "int64": Dataset.from_dict({"row": [0, 1, 2]}),
    "int32": Dataset.from_dict({"row": [0, 1, 2]}, features=Features({"row": Value("int32")})),
    "float": Dataset.from_dict({"row": [0.0, 1.0, 2.0]}),
    "bool": Dataset.from_dict({"row": [False, True]}),
    "label": Dataset.from_dict({"row": [0, 1, 2]}, features=Features({"row": ClassLabel(names=["a", "b", "c"])})),
    "more": Dataset.from_dict({"row": [0, 1, 2, 3]}),
    "others": Dataset.from_dict({"row": [0, 1, 7]}),
    "text": Dataset.from_dict({"row": ["0", "1", "2"]}),
}


def test_numbers_that_name_rows_are_of_one_data_set(vit):
    # 0, 1, 2 are the rows of any task: what one put in is not what another reads
    given = {name: draw_features(len(data), seed) for seed, (name, data) in enumerate(HANDLES.items())}
    for name, data in HANDLES.items():
        if name != "int64":  # the first one
            with pytest.raises(ValueError, match=f"put in by `write`, got none of {len(data)}. Put"):
                vit.store().features(data, "row", disable_tqdm=True)
        vit.store().write(data, "row", [given[name]])
    for name, data in HANDLES.items():
        back = data.select(range(len(data))[::-1])  # in whatever order
        assert np.array_equal(vit.store().features(back, "row", disable_tqdm=True), given[name][::-1])
    with pytest.raises(ValueError, match="all 2 rows, because .* got none of 2. Put those in too"):
        vit.store().features(HANDLES["int64"].select([0, 1]), "row", disable_tqdm=True)


NAMES = {
    "texts": Dataset.from_dict({"row": ["a0", "a1", "a2"]}),
    **{name: HANDLES[name] for name in ("int64", "int32", "float", "bool", "label", "text")},
}


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_the_same_names_are_not_read_for_another_task(name, tiny_vit, tmp_path):
    data = NAMES[name]
    given, other = draw_features(len(data)), draw_features(len(data), seed=1)
    first, second = (Counter(tiny_vit, tmp_path) for _ in range(2))
    second.model.config.id2label = {0: "no", 1: "yes", 2: "more", 3: "less"}
    first.store().write(data, "row", [given])
    with pytest.raises(ValueError, match="one task for rows of these names, got some that were put in by `write` for"):
        second.store().features(data, "row", disable_tqdm=True)
    for store in (first.store(), second.store()):
        with pytest.raises(ValueError, match="of this task or of another one the rows of which have the same names"):
            store.write(data.select([1, 0]) if name in ("text", "texts") else data, "row", [other])
    assert np.array_equal(first.store().features(data, "row", disable_tqdm=True), given)
    more = Dataset.from_dict({"row": ["z0", "z1"]})
    second.store().write(more, "row", [other[:2]])
    assert np.array_equal(second.store().features(more, "row", disable_tqdm=True), other[:2])


@pytest.mark.parametrize("name", NAMES)
def test_names_and_labels_of_another_run_are_told_of_once(name, tiny_vit, tmp_path, monkeypatch, caplog):
    # two tasks of the same names and labels: nothing tells whether the second one has put in any of its own
    data = NAMES[name]
    Counter(tiny_vit, tmp_path).store().write(data, "row", [given := draw_features(len(data))])
    with caplog.at_level(logging.INFO):
        Counter(tiny_vit, tmp_path).store().features(data, "row", disable_tqdm=True)
        assert not caplog.records  # this process has put them in itself
        monkeypatch.setattr(features_module, "_told", set())  # as in another process
        for _ in range(2):
            store = Counter(tiny_vit, tmp_path).store()
            assert np.array_equal(store.features(data, "row", disable_tqdm=True), given)
    (record,) = caplog.records
    assert record.levelno == (logging.INFO if name in ("text", "texts") else logging.WARNING)
    (folder,) = store.folder.iterdir()
    assert record.getMessage() == (
        "Rows of `row` get the features that another run has put in by `write` for the same names and labels, in "
        f"'{folder}'. If those are of other data, give another `features_dir`, or delete that folder."
    )


def test_images_that_another_run_put_in_are_not_worth_a_word(
    tiny_vit, tmp_path, tiny_image_dataset, monkeypatch, caplog
):
    Counter(tiny_vit, tmp_path).store().write(tiny_image_dataset, "image", [draw_features(48)])
    monkeypatch.setattr(features_module, "_told", set())
    with caplog.at_level(logging.INFO):
        Counter(tiny_vit, tmp_path).store().features(tiny_image_dataset, "image", disable_tqdm=True)
    assert not caplog.records


def test_what_was_put_in_for_images_serves_every_task(tiny_vit, tmp_path, tiny_image_dataset):
    first, second = (Counter(tiny_vit, tmp_path) for _ in range(2))
    second.model.config.id2label = {0: "no", 1: "yes", 2: "more", 3: "less"}
    first.store().write(tiny_image_dataset, "image", [given := draw_features(48)])
    assert np.array_equal(second.store().features(tiny_image_dataset, "image", disable_tqdm=True), given)


def test_neighbours_are_readable_rows(vit, tiny_image_dataset):
    readable = np.ones(48, dtype=bool)
    readable[[0, 5, 47]] = False
    features, own = torch.from_numpy(draw_features(48)), np.flatnonzero(readable)
    digests = row_digests(tiny_image_dataset, "image", readable)
    found = vit.store().neighbors(tiny_image_dataset, "image", features, 3, digests=digests)
    assert torch.equal(found[own], torch.from_numpy(own)[nearest_neighbors(features[own], 3)])
    assert found[~readable].tolist() == [[row] * 3 for row in (0, 5, 47)]
    whole = vit.store().neighbors(tiny_image_dataset, "image", features, 3)
    assert torch.equal(whole, nearest_neighbors(features, 3))


def test_written_texts_and_other_dtypes(bert, tiny_text_dataset):
    given = draw_features(48)
    bert.store().write(tiny_text_dataset, "text", [given[:30].astype(np.float64), given[30:]])
    found = bert.store().features(tiny_text_dataset, "text", disable_tqdm=True)
    assert found.dtype == np.float32 and np.array_equal(found, given) and bert.batches == []


def test_equal_rows_may_be_written_twice(vit, tiny_image_dataset):
    dataset = tiny_image_dataset.select([0, 1, 0])
    given = draw_features(2)
    vit.store().write(dataset, "image", [given[[0, 1, 0]]])
    assert np.array_equal(vit.store().features(dataset, "image", disable_tqdm=True), given[[0, 1, 0]])
    assert vit.batches == []


def test_no_rows_may_be_written(vit, tiny_image_dataset):
    vit.store().write(tiny_image_dataset.select([]), "image", [])
    given = draw_features(3)
    vit.store().write(tiny_image_dataset.select(range(3)), "image", [given])
    assert np.array_equal(vit.store().features(tiny_image_dataset.select(range(3)), "image"), given)


@pytest.mark.parametrize(
    ("batches", "dtype", "sentence"),
    [
        (
            [np.zeros((5, 15))],
            "float32",
            "Features must have shape (num_rows, 16) like the head, got (5, 15).",
        ),
        ([np.zeros(16)], "float32", "Features must have shape (num_rows, 16) like the head, got (16,)."),
        (
            [np.zeros((3, 16)), np.zeros((2, 4, 4))],
            "float32",
            "Features must have shape (num_rows, 16) like the head, got (2, 4, 4).",
        ),
        ([np.zeros((4, 16))], "float32", "Features must be given for 5 rows, got 4."),
        ([np.zeros((4, 16)), np.zeros((3, 16))], "float32", "Features must be given for 5 rows, got 7."),
        ([], "float16", "Features must be given for 5 rows, got 0."),
        (
            [np.zeros((2, 16)), np.full((3, 16), np.nan)],
            "float32",
            "Features must be finite in float32, got others in rows 2..4. Check these inputs, or keep features in "
            "float32.",
        ),
        (
            [np.full((5, 16), -np.inf)],
            "float32",
            "Features must be finite in float32, got others in rows 0..4. Check these inputs, or keep features in "
            "float32.",
        ),
        (  # the largest half-precision number is 65504
            [np.full((5, 16), 70000.0)],
            "float16",
            "Features must be finite in float16, got others in rows 0..4. Check these inputs, or keep features in "
            "float32.",
        ),
    ],
)
def test_features_that_do_not_fit_are_refused(batches, dtype, sentence, vit, tiny_image_dataset):
    dataset, store = tiny_image_dataset.select(range(5)), vit.store(dtype=dtype)
    with pytest.raises(ValueError) as error:
        store.write(dataset, "image", batches)
    assert str(error.value) == sentence
    assert names_in(store.folder) == []  # nothing left behind, and a second try works
    given = draw_features(5)
    store.write(dataset, "image", [given])
    assert np.array_equal(store.features(dataset, "image", disable_tqdm=True), given.astype(dtype))


def test_overflow_of_the_backbone_itself(vit, tiny_image_dataset):
    # a feature of 1e5 is fine in float32, and no number in float16
    store = vit.store(dtype="float16")
    store.model.vit.layernorm.weight.data.fill_(1e5)
    with pytest.raises(ValueError, match=r"must be finite in float16, got others in rows 0\.\.3\. Check these"):
        store.features(tiny_image_dataset.select(range(8)), "image", batch_size=4, disable_tqdm=True)
    assert names_in(store.folder) == [] and not vit.head._forward_pre_hooks


def test_half_precision_is_half_the_space(vit, tiny_image_dataset):
    exact = np.array(vit.store().features(tiny_image_dataset, "image", disable_tqdm=True))
    store = vit.store(dtype="float16")
    assert store.folder != vit.store().folder and store.folder.parent == vit.store().folder.parent
    half = store.features(tiny_image_dataset, "image", disable_tqdm=True)
    assert half.dtype == np.float16 and half.shape == (48, 16) and isinstance(half, np.memmap)
    np.testing.assert_allclose(half, exact, rtol=1e-3, atol=1e-4)
    assert np.array_equal(half, exact.astype(np.float16))
    (path,) = store.folder.glob("shard-*/features.npy")
    assert path.stat().st_size < 48 * 16 * 2 + 200
    # rows in another order, and none at all, are of that type too
    order = np.arange(47, -1, -1)
    shuffled = store.features(tiny_image_dataset.select(order), "image", disable_tqdm=True)
    assert shuffled.dtype == np.float16 and np.array_equal(shuffled, half[order])
    assert store.features(tiny_image_dataset.select([]), "image", disable_tqdm=True).dtype == np.float16
    assert vit.batches == [48, 48]


# ── rows from several shards, and more of them than the memory takes ────────────────────────────────────────────────


@pytest.fixture()
def three_shards(vit, tiny_image_dataset) -> np.ndarray:
    """Features of all 48 rows, written in three shards of unequal size."""
    given = draw_features(48)
    for rows in (range(30, 48), range(0, 7), range(7, 30)):
        vit.store().write(tiny_image_dataset.select(rows), "image", [given[list(rows)]])
    assert len(list(vit.store().folder.glob("shard-*"))) == 3
    return given


@pytest.mark.parametrize("limit", [2**30, 0])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_of_several_shards_in_any_order(limit, dtype, vit, tiny_image_dataset, monkeypatch):
    monkeypatch.setattr(features_module, "_MAX_COPIED_BYTES", limit)
    monkeypatch.setattr(features_module, "_CHUNK", 10)
    given, store = draw_features(48).astype(dtype), vit.store(dtype=dtype)
    for rows in (range(30, 48), range(0, 7), range(7, 30)):
        store.write(tiny_image_dataset.select(rows), "image", [given[list(rows)]])
    rng = np.random.default_rng(0)
    for rows in (
        np.arange(48),
        np.arange(47, -1, -1),
        rng.permutation(48),
        rng.integers(48, size=60),
        np.array([5]),
        np.array([7, 6]),
        np.arange(8, 29),
        np.arange(6, 8),
    ):
        found = store.features(tiny_image_dataset.select(rows), "image", disable_tqdm=True)
        assert np.array_equal(found, given[rows]) and found.dtype == np.dtype(dtype), rows
    assert vit.batches == []


def test_rows_are_found_as_fast_in_many_shards_as_in_one(vit, monkeypatch):
    numbers = np.random.default_rng(0).permutation(30_000).tolist()
    keys = np.array([f"{number:08x}" * 4 for number in numbers], dtype="S32")
    store, times = vit.store(), {}
    monkeypatch.setattr(store, "_load", lambda folder, name, dtype, shape: np.zeros(shape, dtype=dtype))
    for count in (1, 24):
        parts = dict(enumerate(np.array_split(keys, count)))
        monkeypatch.setattr(store, "_keys", lambda parts=parts: parts)
        for _ in range(3):
            started = time.process_time()
            found = store._find(keys)
            times[count] = min(times.get(count, np.inf), time.process_time() - started)
        starts = np.cumsum([0, *map(len, parts.values())])
        assert np.array_equal(starts[found.shards] + found.rows, np.arange(len(keys)))
    assert times[24] < 3 * times[1]


def test_rows_within_one_shard_are_mapped(three_shards, vit, tiny_image_dataset):
    for low, high in ((30, 48), (31, 40), (0, 7), (29, 30)):
        found = vit.store().features(tiny_image_dataset.select(range(low, high)), "image", disable_tqdm=True)
        assert isinstance(found, np.memmap) and np.array_equal(found, three_shards[low:high])


def test_too_many_rows_for_the_memory_are_put_in_order_on_disk(three_shards, vit, tiny_image_dataset, monkeypatch):
    store, order = vit.store(), np.random.default_rng(3).permutation(48)
    monkeypatch.setattr(features_module, "_MAX_COPIED_BYTES", 48 * 16 * 4)
    found = store.features(tiny_image_dataset.select(order), "image", disable_tqdm=True)
    assert not isinstance(found, np.memmap) and not list(store.folder.glob("ordered-*"))
    monkeypatch.setattr(features_module, "_MAX_COPIED_BYTES", 48 * 16 * 4 - 1)
    found = store.features(tiny_image_dataset.select(order), "image", disable_tqdm=True)
    assert isinstance(found, np.memmap) and np.array_equal(found, three_shards[order])
    (folder,) = store.folder.glob("ordered-*")
    assert names_in(folder) == ["backbone.txt", "features.npy"]
    before = (folder / "features.npy").stat().st_mtime_ns
    again = vit.store().features(tiny_image_dataset.select(order), "image", disable_tqdm=True)
    assert np.array_equal(again, three_shards[order])
    assert (folder / "features.npy").stat().st_mtime_ns == before  # written once
    found[:] = 0  # copy on write: the file stays
    assert np.array_equal(vit.store().features(tiny_image_dataset.select(order), "image"), three_shards[order])


def test_rows_in_order_on_disk_are_those_that_were_asked_for(vit, tiny_image_dataset, monkeypatch):
    # Two data sets of one size, each asked for in reverse order. Their shards stand in the order of their names, so
    # the second may stand before the first: the rows of the one are then counted as those of the other were.
    monkeypatch.setattr(features_module, "_MAX_COPIED_BYTES", 0)
    reverse = np.arange(11, -1, -1)
    parts = [tiny_image_dataset.select(range(low, low + 12)) for low in (0, 12)]
    for number, (first, second) in enumerate((parts, parts[::-1])):  # in one of both orders that is so
        store = vit.store(precision=f"try-{number}")
        for seed, dataset in enumerate((first, second)):
            given = draw_features(12, seed)
            store.write(dataset, "image", [given])
            found = store.features(dataset.select(reverse), "image", disable_tqdm=True)
            assert np.array_equal(found, given[reverse]), (number, seed)


# ── files that are not what they should be ──────────────────────────────────────────────────────────────────────────


IN_KEYS = ("owner", "no owner", "half an owner", "keys", "truncated keys", "no keys")  # which are read first
DAMAGES = {
    "owner": lambda folder: (folder / "backbone.txt").write_text("0123456789abcdef"),
    "no owner": lambda folder: (folder / "backbone.txt").unlink(),
    "half an owner": lambda folder: os.truncate(folder / "backbone.txt", 90),
    "a digest": lambda folder: flip(folder / "backbone.txt", 12),
    "a size": lambda folder: flip(folder / "backbone.txt", 1),
    "width": lambda folder: np.save(folder / "features.npy", np.zeros((48, 15), dtype=np.float32)),
    "rows": lambda folder: np.save(folder / "features.npy", np.zeros((47, 16), dtype=np.float32)),
    "dtype": lambda folder: np.save(folder / "features.npy", np.zeros((48, 8), dtype=np.float64)),
    "values": lambda folder: np.save(folder / "features.npy", np.zeros((48, 16), dtype=np.float32)),
    "a bit": lambda folder: flip(folder / "features.npy", 1234),
    "header": lambda folder: flip(folder / "features.npy", 40),
    "truncated": lambda folder: os.truncate(folder / "features.npy", 2000),
    "empty": lambda folder: os.truncate(folder / "features.npy", 0),
    "longer": lambda folder: (folder / "features.npy").open("ab").write(b"0"),
    "no features": lambda folder: (folder / "features.npy").unlink(),
    "keys": lambda folder: flip(folder / "keys.npy", 200),
    "truncated keys": lambda folder: os.truncate(folder / "keys.npy", 300),
    "no keys": lambda folder: (folder / "keys.npy").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_spoilt_shard_is_named_and_computed_again(damage, vit, tiny_image_dataset, caplog):
    whole = np.array(vit.store().features(tiny_image_dataset, "image", batch_size=16, disable_tqdm=True))
    (shard,) = vit.store().folder.iterdir()
    DAMAGES[damage](shard)
    vit.batches.clear()
    again = vit.store().features(tiny_image_dataset, "image", batch_size=16, disable_tqdm=True)
    assert np.array_equal(again, whole) and vit.batches == [16, 16, 16]
    (record,) = caplog.records
    file = "keys.npy" if damage in IN_KEYS else "features.npy"
    assert record.message.startswith(f"'{shard / file}' must be as it was written, got ")
    assert record.message.endswith(" Its folder is deleted; what is needed of it is computed again.")
    vit.store().features(tiny_image_dataset, "image", disable_tqdm=True)
    assert len(caplog.records) == 1 and len(vit.batches) == 3


@pytest.mark.parametrize("damage", DAMAGES)
def test_spoilt_features_that_were_put_in_are_an_error(damage, vit, tiny_image_dataset):
    store = vit.store()
    store.write(tiny_image_dataset, "image", [draw_features(48)])
    (shard,) = store.folder.glob("shard-*")
    DAMAGES[damage](shard)
    file = shard / ("keys.npy" if damage in IN_KEYS else "features.npy")
    for _ in range(2):  # nothing is lost by the first try
        with pytest.raises(ValueError) as error:
            vit.store().features(tiny_image_dataset, "image", disable_tqdm=True)
        assert str(error.value).startswith(f"'{file}' must be as it was written, got ")
        assert str(error.value).endswith(
            " These features were put in by `write`: delete that folder, and put them in again."
        )
    faults = {
        "owner": f"got one of backbone '0123456789abcdef' instead of '{store.folder.name}'.",
        "truncated": "got 2000 bytes instead of 3200.",
        "a bit": "got other content than its digest tells.",
    }
    assert faults.get(damage, "") in str(error.value)
    assert vit.batches == []


def test_other_shards_are_left_alone(vit, tiny_image_dataset, caplog):
    parts = [tiny_image_dataset.select(range(low, low + 16)) for low in (0, 16, 32)]
    for part in parts:
        vit.store().features(part, "image", disable_tqdm=True)
    for path in vit.store().folder.glob("shard-*/features.npy"):
        flip(path, 500)
    vit.batches.clear()
    vit.store().features(parts[1].select(range(3)), "image", batch_size=2, disable_tqdm=True)
    # only rows that are asked for are computed, and only shards that hold them are read
    assert vit.batches == [2, 1] and len(caplog.records) == 1 and len(names_in(vit.store().folder)) == 3


def test_shards_from_before_there_were_digests(vit, tiny_image_dataset, caplog):
    store = vit.store()
    whole = np.array(store.features(tiny_image_dataset, "image", disable_tqdm=True))
    (shard,) = store.folder.iterdir()
    (shard / "backbone.txt").write_text(store.folder.name)
    vit.batches.clear()
    assert np.array_equal(store.features(tiny_image_dataset, "image", disable_tqdm=True), whole)
    assert vit.batches == [] and not caplog.records
    os.truncate(shard / "features.npy", 3000)
    assert np.array_equal(store.features(tiny_image_dataset, "image", disable_tqdm=True), whole)
    assert vit.batches == [48] and len(caplog.records) == 1


def test_each_file_is_read_once_per_process(vit, tiny_image_dataset, monkeypatch):
    read = []
    real = features_module.file_digest
    monkeypatch.setattr(features_module, "file_digest", lambda path: read.append(path.name) or real(path))
    for _ in range(3):
        vit.store().features(tiny_image_dataset, "image", disable_tqdm=True)
    assert sorted(read) == ["features.npy", "keys.npy"]  # when they were written
    read.clear()
    monkeypatch.setattr(features_module, "_verified", set())  # as in another process
    for _ in range(3):
        vit.store().features(tiny_image_dataset, "image", disable_tqdm=True)
    assert sorted(read) == ["features.npy", "keys.npy"]


def test_spoilt_rows_in_order_and_neighbours_are_made_again(
    three_shards, vit, tiny_image_dataset, monkeypatch, caplog
):
    monkeypatch.setattr(features_module, "_MAX_COPIED_BYTES", 0)
    order, folder = np.arange(47, -1, -1), vit.store().folder
    given = torch.from_numpy(three_shards)
    for damage in (lambda path: flip(path, 300), lambda path: os.truncate(path, 200), Path.unlink):
        for _ in range(2):
            found = vit.store().features(tiny_image_dataset.select(order), "image", disable_tqdm=True)
            near = vit.store().neighbors(tiny_image_dataset, "image", given, 5)
            assert np.array_equal(found, three_shards[::-1])
            assert torch.equal(near, nearest_neighbors(given, 5))
        for path in (*folder.glob("ordered-*/features.npy"), *folder.glob("neighbors-*/rows.npy")):
            damage(path)
    assert len(caplog.records) == 4 and vit.batches == []


def test_spoilt_rows_in_order_are_gone_before_anybody_writes(three_shards, vit, tiny_image_dataset, monkeypatch):
    # else a slow process would delete what a quick one has just made again
    monkeypatch.setattr(features_module, "_MAX_COPIED_BYTES", 0)
    order, seen = tiny_image_dataset.select(np.arange(47, -1, -1)), []
    vit.store().features(order, "image", disable_tqdm=True)
    (path,) = vit.store().folder.glob("ordered-*/features.npy")
    flip(path, 300)
    processes = as_process(0, 1, lambda: seen.append(path.exists()))
    vit.store().features(order, "image", processes=processes, disable_tqdm=True)
    assert seen == [False, False] and path.exists()


def test_neighbours_that_the_first_process_did_not_write(vit, tiny_image_dataset):
    with pytest.raises(FileNotFoundError, match="must hold the neighbours that the first process found, got none. G"):
        second = as_process(1, 2, lambda: None)
        vit.store().neighbors(tiny_image_dataset, "image", torch.from_numpy(draw_features(48)), 5, processes=second)


def limited(num_bytes: int) -> Any:
    """Files may grow to so many bytes only, as if the disk were full then."""
    resource = pytest.importorskip("resource")  # not on Windows

    @contextmanager
    def limit() -> Iterator[None]:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return limit()


def test_a_full_disk_keeps_what_is_whole_and_a_second_try_works(vit, tiny_image_dataset):
    store = vit.store()
    with limited(2048), pytest.raises(OSError, match="must have room for about 0.0 MB") as error:
        store.features(tiny_image_dataset, "image", batch_size=10, disable_tqdm=True)
    assert f"The disk of '{store.folder}' must" in str(error.value)
    assert str(error.value).endswith("What is computed stays. Free some space and run this again.")
    assert [name[:15] for name in names_in(store.folder)] == [".partial-shard-"] and not vit.head._forward_pre_hooks
    vit.batches.clear()
    with limited(2048), pytest.raises(OSError, match="Nothing half written is left. Free some space and run this ag"):
        store.write(tiny_image_dataset, "image", [draw_features(48)])
    found = store.features(tiny_image_dataset, "image", batch_size=10, disable_tqdm=True)
    assert vit.batches == [10, 8]  # 30 rows of 64 bytes had room
    np.testing.assert_allclose(found, vit.direct(tiny_image_dataset["image"]), atol=1e-5)


@pytest.mark.parametrize("num_bytes", [0, 50, 200, 1000])
def test_a_disk_that_is_full_from_the_start(vit, tiny_image_dataset, num_bytes):
    with limited(num_bytes), pytest.raises(OSError, match="must have room for about"):
        vit.store().features(tiny_image_dataset, "image", batch_size=10, disable_tqdm=True)
    assert vit.batches == []  # even the keys do not fit: the backbone need not run
    found = vit.store().features(tiny_image_dataset, "image", disable_tqdm=True)
    np.testing.assert_allclose(found, vit.direct(tiny_image_dataset["image"]), atol=1e-5)


def test_a_full_disk_while_rows_are_put_in_order(three_shards, vit, tiny_image_dataset, monkeypatch):
    monkeypatch.setattr(features_module, "_MAX_COPIED_BYTES", 0)
    order, before = tiny_image_dataset.select(np.arange(47, -1, -1)), names_in(vit.store().folder)
    with limited(2048), pytest.raises(OSError, match="must have room for about"):
        vit.store().features(order, "image", disable_tqdm=True)
    with limited(100), pytest.raises(OSError, match="must have room for about"):
        vit.store().neighbors(order, "image", torch.from_numpy(three_shards), 5)
    assert names_in(vit.store().folder) == before
    found = vit.store().features(order, "image", disable_tqdm=True)
    assert isinstance(found, np.memmap) and np.array_equal(found, three_shards[::-1])


@pytest.mark.parametrize("what", ["shard", "ordered"])
def test_another_process_may_finish_the_same_file_first(what, three_shards, vit, tiny_image_dataset, monkeypatch):
    # Several processes put the same rows in order, and runs that share a folder compute the same rows. Each writes its
    # own copy; whoever comes second, even by a hair, finds the name taken, and the file behind it as good as its own.
    store = vit.store() if what == "ordered" else vit.store(precision="other")
    dataset = tiny_image_dataset.select(np.arange(47, -1, -1)) if what == "ordered" else tiny_image_dataset
    monkeypatch.setattr(features_module, "_MAX_COPIED_BYTES", 0)
    replace, raced = os.replace, []

    def come_second(source: Path, target: Path) -> None:
        if not raced:
            raced.append(target)
            shutil.copytree(source, target)
        replace(source, target)

    monkeypatch.setattr(features_module.os, "replace", come_second)
    found = store.features(dataset, "image", disable_tqdm=True)
    monkeypatch.undo()
    assert len(raced) == 1 and what in str(raced[0].name)
    if what == "ordered":
        assert np.array_equal(found, three_shards[::-1])
    assert not [name for name in names_in(store.folder) if name.startswith(".p")]

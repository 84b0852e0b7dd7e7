"""Features: the head's real inputs, computed once per content, found again whatever the order."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, concatenate_datasets
from PIL import Image as PILImage
from torch import nn

from hf_cosupervise.features import FeatureStore, backbone_key
from hf_cosupervise.inputs import InputProcessor
from hf_cosupervise.students import linear_head, load_student

LABELS = ["ant", "bee", "cat", "dog"]


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
    mixed = vit.store(autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16), precision="bfloat16")
    features = mixed.features(dataset, "image", disable_tqdm=True)
    assert vit.batches == [8, 8] and features.dtype == np.float32
    np.testing.assert_allclose(features, exact, atol=0.2)
    assert not np.array_equal(features, exact)


# ── writing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def left_over(path: Path) -> list[str]:
    return sorted(
        str(item.relative_to(path)) for item in path.rglob("*") if not item.is_dir() or not any(item.iterdir())
    )


def test_interrupted_writing_leaves_nothing(vit, tiny_image_dataset):
    store, whole = vit.store(), vit.processor
    calls = []

    def die_in_the_third_batch(cells: list[Any]) -> dict[str, torch.Tensor]:
        calls.append(len(cells))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(cells)

    store.processor = die_in_the_third_batch
    with pytest.raises(KeyboardInterrupt):
        store.features(tiny_image_dataset, "image", batch_size=10, disable_tqdm=True)
    assert calls == [10, 10, 10] and list(store.folder.iterdir()) == []
    assert not vit.head._forward_pre_hooks  # nor a hook that would keep every later batch
    store.processor = whole
    vit.batches.clear()
    features = store.features(tiny_image_dataset, "image", batch_size=100, disable_tqdm=True)
    assert vit.batches == [48]
    np.testing.assert_allclose(features, vit.direct(tiny_image_dataset["image"]), atol=1e-5)


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
        found[process] = np.array(
            students[process]
            .store()
            .features(
                dataset, "image", batch_size=1, shard=(process, num_processes), wait=barrier.wait, disable_tqdm=True
            )
        )

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
        vit.store().features(tiny_image_dataset.select([0]), "image", shard=shard, wait=wait, disable_tqdm=True)

    with pytest.raises(FileNotFoundError, match="must hold the features of all 1 rows, got none of 1. Give a `fea"):
        features(lambda: calls.append("wait"), (1, 2))  # the other process never wrote what this one needs
    assert calls == ["wait", "wait"] and vit.batches == []
    features(lambda: calls.append("wait"), (0, 2))
    assert calls == ["wait"] * 4 and vit.batches == [1]


def test_nothing_of_the_student_changes(vit, tiny_image_dataset):
    before = {name: value.clone() for name, value in vit.model.state_dict().items()}
    vit.store(autocast=nullcontext).features(tiny_image_dataset.select(range(4)), "image", disable_tqdm=True)
    after = vit.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not vit.model.training

"""The collator: inputs for every example, pseudolabels for rows of the pool, labels for an evaluation set."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoImageProcessor, AutoTokenizer

from hf_cosupervise.data.inputs import InputProcessor
from hf_cosupervise.hierarchy import Teacher, TeacherHierarchy
from hf_cosupervise.pool.pseudolabels import PseudolabelPool
from hf_cosupervise.training.collator import ROW, ROWS, TARGETS, DataCollatorForCoSupervision


@pytest.fixture()
def text_processor(tiny_bert):
    return InputProcessor(AutoTokenizer.from_pretrained(tiny_bert))


def look_up(rows: np.ndarray) -> np.ndarray:
    assert isinstance(rows, np.ndarray) and rows.dtype.kind == "i"
    return np.stack([rows / 10, 1 - rows / 10], axis=1).astype(np.float32)


def test_rows_of_the_pool(text_processor):
    collator = DataCollatorForCoSupervision(text_processor, "text", look_up)
    batch = collator([{"text": "barks", ROW: 3}, {"text": "the animal", ROW: 0}, {"text": "barks", ROW: 3}])
    assert set(batch) == {*text_processor.input_names, "target_probs", ROWS} and batch[ROWS].tolist() == [3, 0, 3]
    assert batch["input_ids"].tolist() == [[2, 10, 3, 0], [2, 12, 13, 3], [2, 10, 3, 0]]
    assert batch["target_probs"].dtype == torch.float32
    torch.testing.assert_close(batch["target_probs"], torch.tensor([[0.3, 0.7], [0.0, 1.0], [0.3, 0.7]]))
    assert "labels" not in batch and ROW not in batch


def test_rows_come_before_labels(text_processor):
    # the pool's own labels, if any came along, are not trained on
    batch = DataCollatorForCoSupervision(text_processor, "text", look_up)([{"text": "barks", ROW: 1, "labels": 0}])
    assert "labels" not in batch and batch["target_probs"].shape == (1, 2)


def test_evaluation_set(text_processor):
    batch = DataCollatorForCoSupervision(text_processor, "text", look_up)(
        [{"text": "a", "labels": 2}, {"text": "b", "labels": np.int64(0)}]
    )
    assert batch["labels"].tolist() == [2, 0] and batch["labels"].dtype == torch.long
    assert "target_probs" not in batch


def test_inputs_only(text_processor):
    # an unlabelled example, or rows of the pool before any level has begun
    assert set(DataCollatorForCoSupervision(text_processor, "text")([{"text": "a", ROW: 1}])) == set(
        text_processor.input_names
    )
    batch = DataCollatorForCoSupervision(text_processor, "text", look_up)([{"text": "a", "label": 1, "other": "x"}])
    assert set(batch) == set(text_processor.input_names)


def test_images_and_the_pool_itself(tiny_vit, tiny_image_dataset):
    hierarchy = TeacherHierarchy(["a", "b"], [Teacher("t/one")])
    probs = np.tile([[0.25, 0.75], [1.0, 0.0], [0.5, 0.5]], (16, 1))
    pool = PseudolabelPool.from_predictions(hierarchy, range(48), {"one": probs})
    dataset = tiny_image_dataset.select_columns(["image"]).add_column(ROW, np.arange(48))
    collator = DataCollatorForCoSupervision(
        InputProcessor(AutoImageProcessor.from_pretrained(tiny_vit)),
        "image",
        lambda rows: pool.pseudolabels(np.zeros(len(rows), dtype=int), rows),
    )
    order = [7, 0, 47]
    batch = collator([dataset[row] for row in order])
    assert batch["pixel_values"].shape == (3, 3, 8, 8)
    assert batch["target_probs"].tolist() == probs[order].tolist()
    assert torch.equal(
        batch["pixel_values"], collator.processor(tiny_image_dataset.select(order)["image"])["pixel_values"]
    )


def test_missing_column(text_processor):
    with pytest.raises(KeyError, match="text"):
        DataCollatorForCoSupervision(text_processor, "text")([{"sentence": "a"}])


def test_dataset_rows_as_the_loader_gives_them(text_processor):
    dataset = Dataset.from_dict({"text": ["barks", "hums"], ROW: [4, 2]})
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=2, collate_fn=DataCollatorForCoSupervision(text_processor, "text", look_up)
    )
    (batch,) = loader
    torch.testing.assert_close(batch["target_probs"], torch.tensor([[0.4, 0.6], [0.2, 0.8]]))


# ── pseudolabels that name some of the labels ───────────────────────────────────────────────────────────────────────


def sparse_look_up(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ids = np.stack([rows, rows + 1], axis=1).astype(np.int64)
    probs = np.stack([1 - rows / 10, rows / 20], axis=1).astype(np.float32)
    return ids, probs, (rows / 100).astype(np.float32)


def test_sparse_pseudolabels(text_processor):
    collator = DataCollatorForCoSupervision(text_processor, "text", sparse_look_up)
    batch = collator([{"text": "barks", ROW: 3}, {"text": "the animal", ROW: 0}, {"text": "barks", ROW: 3}])
    assert TARGETS == ("target_ids", "target_probs", "target_rest")
    assert set(batch) == {*text_processor.input_names, *TARGETS, ROWS}
    assert [batch[name].dtype for name in TARGETS] == [torch.long, torch.float32, torch.float32]
    assert batch["target_ids"].tolist() == [[3, 4], [0, 1], [3, 4]]
    torch.testing.assert_close(batch["target_probs"], torch.tensor([[0.7, 0.15], [1.0, 0.0], [0.7, 0.15]]))
    torch.testing.assert_close(batch["target_rest"], torch.tensor([0.03, 0.0, 0.03]))
    assert "labels" not in batch and ROW not in batch


def test_sparse_rows_come_before_labels(text_processor):
    collator = DataCollatorForCoSupervision(text_processor, "text", sparse_look_up)
    assert "labels" not in collator([{"text": "barks", ROW: 1, "labels": 0}])
    assert not set(TARGETS) & set(collator([{"text": "barks", "labels": 0}]))


@pytest.mark.parametrize("hard", [False, True])
def test_sparse_pseudolabels_of_a_pool(hard, text_processor):
    hierarchy = TeacherHierarchy([f"l{label}" for label in range(9)], [Teacher("one"), Teacher("two", level=1)])
    rng = np.random.default_rng(0)
    predictions = {name: rng.dirichlet(np.ones(9), size=6) for name in hierarchy.names}
    pool = PseudolabelPool.from_predictions(hierarchy, range(6), predictions, pool_k=2)
    sources = np.array([0, 1, 1, 0, 1, 0])
    collator = DataCollatorForCoSupervision(
        text_processor, "text", lambda rows: pool.sparse_pseudolabels(sources[rows], rows, hard=hard)
    )
    batch = collator([{"text": "barks", ROW: row} for row in (4, 0, 5, 4)])
    dense = batch["target_rest"].unsqueeze(1).repeat(1, 9)
    dense.scatter_(1, batch["target_ids"], batch["target_probs"])
    rows = np.array([4, 0, 5, 4])
    torch.testing.assert_close(dense, torch.from_numpy(pool.pseudolabels(sources[rows], rows, hard=hard)))
    assert batch["target_ids"].shape == (4, 1 if hard else 2)


def test_a_tuple_of_another_length_is_an_error(text_processor):
    collator = DataCollatorForCoSupervision(text_processor, "text", lambda rows: sparse_look_up(rows)[:2])
    with pytest.raises(ValueError):
        collator([{"text": "barks", ROW: 1}])

"""Top-k soft labels: what is stored, what is read back, what is refused."""

from __future__ import annotations

import re

import numpy as np
import pytest

from hf_cosupervise.sparse import check_top_k, decode_top_k, default_pool_k, encode_top_k, label_dtype


def softmax_rows(num_examples: int, num_labels: int, scale: float = 3.0, seed: int = 0) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(scale=scale, size=(num_examples, num_labels))
    probs = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (probs / probs.sum(axis=1, keepdims=True)).astype(np.float32)


# ── sizes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("num_labels", "expected"),
    [(2, "uint8"), (256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "int32"), (10**6, "int32")],
)
def test_label_dtype(num_labels, expected):
    # 256 labels have ids up to 255
    assert label_dtype(num_labels) == np.dtype(expected)
    assert np.iinfo(label_dtype(num_labels)).max >= num_labels - 1


@pytest.mark.parametrize(("num_labels", "expected"), [(2, 2), (15, 15), (16, 16), (17, 16), (1000, 16)])
def test_default_pool_k(num_labels, expected):
    assert default_pool_k(num_labels) == expected


@pytest.mark.parametrize("num_labels", [2, 256, 257, 65536, 65537])
def test_last_label_survives_the_smallest_integer(num_labels):
    probs = np.zeros((1, num_labels), dtype=np.float32)
    probs[0, -1] = 1.0
    label_ids, label_probs = encode_top_k(probs, 1)
    assert label_ids.dtype == label_dtype(num_labels) and label_probs.dtype == np.float16
    assert label_ids.tolist() == [[num_labels - 1]]
    assert decode_top_k(label_ids, label_probs, num_labels).tolist() == probs.tolist()


# ── rows worked out by hand ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("row", "k", "ids", "stored", "decoded"),
    [
        ([0.25, 0.5, 0.25], 2, [1, 0], [0.5, 0.25], [0.25, 0.5, 0.25]),  # a tie: the lower label is stored
        ([0.25, 0.5, 0.25], 1, [1], [0.5], [0.25, 0.5, 0.25]),
        ([0.125, 0.5, 0.375], 1, [1], [0.5], [0.25, 0.5, 0.25]),  # the rest, 0.5, goes evenly to two labels
        ([0.125, 0.5, 0.375], 3, [1, 2, 0], [0.5, 0.375, 0.125], [0.125, 0.5, 0.375]),  # nothing left out
        ([0.5, 0.25, 0.125, 0.125, 0.0], 2, [0, 1], [0.5, 0.25], [0.5, 0.25, 0.25 / 3, 0.25 / 3, 0.25 / 3]),
        ([0.25, 0.25, 0.25, 0.25], 2, [0, 1], [0.25, 0.25], [0.25, 0.25, 0.25, 0.25]),  # uniform
        ([0.0, 0.0, 1.0], 2, [2, 0], [1.0, 0.0], [0.0, 0.0, 1.0]),  # one-hot: the rest is nothing
        ([0.5, 0.5], 1, [0], [0.5], [0.5, 0.5]),
        ([0.25, 0.75], 2, [1, 0], [0.75, 0.25], [0.25, 0.75]),
    ],
)
def test_one_row(row, k, ids, stored, decoded):
    label_ids, label_probs = encode_top_k(np.array([row], dtype=np.float32), k)
    assert (label_ids.tolist(), label_probs.tolist()) == ([ids], [stored])
    found = decode_top_k(label_ids, label_probs, len(row))
    assert found.dtype == np.float32
    assert found[0].tolist() == pytest.approx(decoded, rel=1e-6, abs=0)
    assert found.sum() == pytest.approx(1.0, abs=1e-6)


def test_order_is_by_the_stored_probability():
    # In half precision numbers near 0.4 are 2 ** -12 = 0.00024 apart: 0.40001 and 0.40002 are stored as one number, a
    # tie that the lower label wins, though label 2 was a little ahead.
    label_ids, label_probs = encode_top_k(np.array([[0.19997, 0.40001, 0.40002]], dtype=np.float32), 2)
    assert label_probs[0, 0] == label_probs[0, 1]
    assert label_ids.tolist() == [[1, 2]]


def test_missing_rows_stay_missing():
    probs = np.array([[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]], dtype=np.float32)
    label_ids, label_probs = encode_top_k(probs, 2)
    assert label_probs[1].tolist() == [0.0, 0.0]
    decoded = decode_top_k(label_ids, label_probs, 3)
    assert decoded[1].tolist() == [0.0, 0.0, 0.0]  # neither uniform nor NaN
    assert decoded[0].sum() == pytest.approx(1.0)
    check_top_k(label_ids, label_probs, 3, "t")


# ── the round trip ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("num_labels", [2, 5, 10, 100, 1000])
@pytest.mark.parametrize("scale", [0.0, 0.01, 3.0, 30.0])
def test_round_trip(num_labels, scale):
    probs = softmax_rows(60, num_labels, scale)
    probs[::7] = 0.0
    answered = probs.any(axis=1)
    for k in sorted({1, default_pool_k(num_labels), num_labels}):
        label_ids, label_probs = encode_top_k(probs, k)
        check_top_k(label_ids, label_probs, num_labels, "t")
        assert label_ids.shape == label_probs.shape == (60, k)
        assert label_probs.astype(np.float64).sum(axis=1).max() <= 1 + 2e-3
        assert (np.diff(label_probs.astype(np.float32), axis=1) <= 0).all()
        decoded = decode_top_k(label_ids, label_probs, num_labels)
        assert decoded.min() >= 0.0
        np.testing.assert_allclose(decoded.sum(axis=1), answered.astype(float), atol=1e-5)
        # what was stored is read back to half precision (2 ** -11 for rounding, as much again for scaling to sum 1)
        rows = np.flatnonzero(answered)[:, None]
        kept = probs[rows, label_ids[answered]]
        np.testing.assert_allclose(decoded[rows, label_ids[answered]], kept, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 3, 16])
@pytest.mark.parametrize("num_labels", [2, 3, 5, 10, 100, 1000])
@pytest.mark.parametrize("scale", [0.0, 0.001, 0.01, 3.0])
def test_argmax_is_preserved(num_labels, scale, k):
    # Nearly uniform rows are the hard ones: rounding may lift a label that was left out to one that was kept.
    probs = softmax_rows(200, num_labels, scale)
    label_ids, label_probs = encode_top_k(probs, min(k, num_labels))
    first = label_ids[:, 0].astype(int)
    assert first.tolist() == probs.astype(np.float16).argmax(axis=1).tolist()
    decoded = decode_top_k(label_ids, label_probs, num_labels).argmax(axis=1)
    wrong = np.flatnonzero(decoded != first)
    assert wrong.size == 0, (
        f"{wrong.size} rows, such as {label_ids[wrong[0]]}, {label_probs[wrong[0]]}: {decoded[wrong[0]]}"
    )


@pytest.mark.parametrize("k", [1, 2, 3])
def test_argmax_is_preserved_when_a_lower_label_is_left_out(k):
    # Label 0 is the least probable. Half precision stores the others as 0.25 each (numbers there are 0.0001 to 0.0002
    # apart), which leaves a rest of 0.25 for every label left out: label 0 must not win that tie.
    label_ids, label_probs = encode_top_k(np.array([[0.24985, 0.25005, 0.25005, 0.25005]], dtype=np.float32), k)
    assert label_ids.tolist() == [[1, 2, 3][:k]] and label_probs.tolist() == [[0.25] * k]
    assert decode_top_k(label_ids, label_probs, 4).argmax() == 1


def test_tiny_probabilities_of_many_labels_are_no_missing_answer():
    # 1 / 50000 is below the smallest normal half-precision number (6e-5)
    probs = np.full((1, 50000), 1 / 50000, dtype=np.float32)
    label_ids, label_probs = encode_top_k(probs, 16)
    assert decode_top_k(label_ids, label_probs, 50000).sum() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("total", [1.0 - 1e-3, 1.0 + 1e-3])
def test_sums_within_tolerance_are_scaled_to_one(total):
    probs = np.array([[0.5, 0.3, 0.2]], dtype=np.float32) * np.float32(total)
    label_ids, label_probs = encode_top_k(probs, 3)
    check_top_k(label_ids, label_probs, 3, "t")
    found = decode_top_k(label_ids, label_probs, 3)
    assert found[0].tolist() == pytest.approx([0.5, 0.3, 0.2], abs=1e-3)
    assert found.sum() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("num_labels", [3, 18])
def test_what_is_taken_can_be_stored(num_labels):
    # a row may sum to 1.002 at most, before and after rounding: refused at once, or valid for good
    num_stored = 0
    for total in (1.0, 1.0015, 1.0019):
        for row in softmax_rows(100, num_labels, 1.0) * np.float32(total):
            try:
                label_ids, label_probs = encode_top_k(row[None], num_labels)
            except ValueError as error:
                assert "sum" in str(error)
                continue
            check_top_k(label_ids, label_probs, num_labels, "t")
            num_stored += 1
    assert num_stored >= 100


def test_input_is_not_changed():
    probs = softmax_rows(5, 4)
    before = probs.copy()
    decode_top_k(*encode_top_k(probs, 2), 4)
    assert np.array_equal(probs, before)


@pytest.mark.parametrize("num_examples", [0, 1])
def test_few_examples(num_examples):
    probs = softmax_rows(num_examples, 5)
    label_ids, label_probs = encode_top_k(probs, 3)
    assert label_ids.shape == label_probs.shape == (num_examples, 3)
    assert label_ids.dtype == np.uint8 and label_probs.dtype == np.float16
    check_top_k(label_ids, label_probs, 5, "t")
    assert decode_top_k(label_ids, label_probs, 5).shape == (num_examples, 5)


def test_float64_and_float16_are_taken_too():
    row = [[0.125, 0.5, 0.375]]
    results = [encode_top_k(np.array(row, dtype=kind), 2) for kind in (np.float64, np.float32, np.float16)]
    assert [(ids.tolist(), stored.tolist()) for ids, stored in results] == [([[1, 2]], [[0.5, 0.375]])] * 3


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ([np.nan, 0.5, 0.5], "finite"),
        ([np.inf, 0.0, 0.0], "finite"),
        ([-0.25, 0.75, 0.5], "negative"),
        ([0.5, 0.5, 0.01], "sum"),
        ([1.0, 1.0, 1.0], "sum"),
    ],
)
def test_bad_rows_are_refused(row, what):
    probs = np.array([[0.5, 0.25, 0.25], row], dtype=np.float32)
    with pytest.raises(ValueError, match=rf"(?s){what}.*row 1.*got") as error:
        encode_top_k(probs, 2)
    assert "1 such row" in str(error.value)
    order = np.argsort(-np.nan_to_num(probs), axis=1)
    with pytest.raises(ValueError, match=rf"(?s)'org/t'.*{what}.*row 1"):
        check_top_k(order.astype(np.uint8), np.take_along_axis(probs, order, axis=1), 3, "org/t")


@pytest.mark.parametrize("k", [0, -1, 4])
def test_bad_k_is_refused(k):
    with pytest.raises(ValueError, match=rf"`k`.*1\.\.3.*got {k}"):
        encode_top_k(np.full((2, 3), 1 / 3), k)


@pytest.mark.parametrize("shape", [(3,), (1, 1, 3)])
def test_bad_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"\(num_examples, num_labels\).*got " + re.escape(str(shape))):
        encode_top_k(np.full(shape, 1 / 3), 1)


@pytest.mark.parametrize(
    ("ids", "stored", "what"),
    [
        ([[0, 3]], [[0.5, 0.25]], r"0\.\.2.*got"),  # a label that does not exist
        ([[-1, 0]], [[0.5, 0.25]], r"0\.\.2.*got"),
        ([[1, 1]], [[0.5, 0.25]], "repeated|twice|once"),
        ([[1, 0]], [[0.25, 0.5]], "descending"),
        ([[0, 1, 2, 3]], [[0.25, 0.25, 0.25, 0.25]], r"k in 1\.\.3"),
        ([[0, 1]], [[0.5]], r"one shape.*\(1, 2\).*\(1, 1\)"),
        ([0, 1], [0.5, 0.5], r"\(num_examples, k\)"),
    ],
)
def test_bad_storage_is_refused(ids, stored, what):
    with pytest.raises(ValueError, match=rf"(?s)'org/t'.*({what})"):
        check_top_k(np.array(ids, dtype=np.int64), np.array(stored, dtype=np.float16), 3, "org/t")

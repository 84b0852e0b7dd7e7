"""Top-k soft labels: what is stored, what is read back, what is refused."""

from __future__ import annotations

import re

import numpy as np
import pytest

from hf_cosupervise.pool.top_k import check_top_k, decode_top_k, default_pool_k, encode_top_k, label_dtype, scale_top_k


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


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_best_label_is_that_of_the_full_precision(k):
    # In half precision numbers near 0.4 are 2 ** -12 = 0.00024 apart: 0.40001 and 0.40002 would be stored as one
    # number, a tie that the lower label wins, though label 2 is a little ahead. It gets the next larger number.
    label_ids, label_probs = encode_top_k(np.array([[0.19997, 0.40001, 0.40002]], dtype=np.float32), k)
    assert label_ids.tolist() == [[2, 1, 0][:k]]
    assert label_probs[:, 0] == np.nextafter(np.float16(0.40001), np.float16(1))
    check_top_k(label_ids, label_probs, 3, "t")
    again = encode_top_k(decode_top_k(label_ids, label_probs, 3), k)
    assert again[0].tolist() == label_ids.tolist()


def test_float64_decides_where_float32_cannot():
    # 1e-12 is nothing beside 0.5 in single precision
    label_ids, _ = encode_top_k(np.array([[0.5 - 1e-12, 0.5 + 1e-12], [0.5, 0.5]]), 1)
    assert label_ids.tolist() == [[1], [0]]


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
    assert first.tolist() == probs.argmax(axis=1).tolist()
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


# ── against a slow version ───────────────────────────────────────────────────────────────────────────────────────────


def draw_kind(kind: str, num_examples: int, num_labels: int, seed: int) -> np.ndarray:
    """Rows of one kind, float32; the last of several has no answer."""
    rng = np.random.default_rng([seed, num_labels])
    if kind == "one-hot":
        probs = np.zeros((num_examples, num_labels), dtype=np.float32)
        probs[np.arange(num_examples), rng.integers(num_labels, size=num_examples)] = 1.0
    elif kind == "uniform":
        probs = np.full((num_examples, num_labels), 1 / num_labels, dtype=np.float32)
    elif kind == "tied":  # multiples of 1/8, at few labels: many equal probabilities, and many zeros
        shares = np.full(min(num_labels, 12), 1 / min(num_labels, 12))
        probs = np.zeros((num_examples, num_labels), dtype=np.float32)
        for row in probs:
            row[rng.choice(num_labels, len(shares), replace=False)] = rng.multinomial(8, shares) / 8
    elif kind == "subnormal":  # one sure label; all others between nothing and the smallest normal half (6.1e-5)
        probs = rng.uniform(0, min(5e-5, 0.5 / num_labels), size=(num_examples, num_labels)).astype(np.float32)
        sure = rng.integers(num_labels, size=num_examples)
        probs[np.arange(num_examples), sure] = 0.0
        probs[np.arange(num_examples), sure] = 1 - probs.sum(axis=1)
    else:
        logits = rng.normal(scale=3.0, size=(num_examples, num_labels))
        probs = np.exp(logits - logits.max(axis=1, keepdims=True))
        probs = (probs / probs.sum(axis=1, keepdims=True)).astype(np.float32)
    if num_examples > 1:
        probs[-1] = 0.0
    return probs


def slow_encode(row: np.ndarray, k: int) -> tuple[list[int], list[float]]:
    """Sort one row by its stored probability, descending, ties to the lowest label; the best one leads."""
    total = row.astype(np.float64).sum()
    if total == 0:
        return [0] * k, [0.0] * k
    # one float32 division, as rounding twice from float64 may give the other neighbour
    stored = [float(np.float16(np.float32(prob) / np.float32(total))) for prob in row]
    best = int(row.argmax())
    if stored.index(max(stored)) != best:
        stored[best] = float(np.nextafter(np.float16(stored[best]), np.float16(2)))
    ranked = sorted(range(len(row)), key=lambda label: (-stored[label], label))[:k]
    return ranked, [stored[label] for label in ranked]


@pytest.mark.parametrize("kind", ["random", "one-hot", "uniform", "tied", "subnormal"])
@pytest.mark.parametrize("num_labels", [1, 2, 3, 9, 256, 257])
def test_against_a_slow_version(num_labels, kind):
    for seed in range(3):
        probs = draw_kind(kind, 8, num_labels, seed)
        for k in sorted({1, 2, 5, num_labels - 1, num_labels} & set(range(1, num_labels + 1))):
            label_ids, label_probs = encode_top_k(probs, k)
            assert label_ids.dtype == label_dtype(num_labels) and label_probs.dtype == np.float16
            for row, ids, stored in zip(probs, label_ids.tolist(), label_probs.tolist()):
                slow_ids, slow_stored = slow_encode(row, k)
                # the sum of a row may differ in its last bit, and with it a probability by one half-precision step
                assert stored == pytest.approx(slow_stored, rel=2**-10, abs=2**-24), (seed, k)
                if stored == slow_stored:
                    assert ids == slow_ids, (seed, k)
                else:
                    assert kind in ("random", "subnormal")
            check_top_k(label_ids, label_probs, num_labels, "t")


@pytest.mark.parametrize("kind", ["one-hot", "tied", "uniform", "random"])
@pytest.mark.parametrize("num_labels", [65536, 65537, 70000])
def test_labels_beyond_16_bits_against_a_slow_version(num_labels, kind):
    probs = draw_kind(kind, 2, num_labels, seed=1)
    for k in (1, 4, 16):
        label_ids, label_probs = encode_top_k(probs, k)
        slow_ids, slow_stored = slow_encode(probs[0], k)
        assert label_ids[0].tolist() == slow_ids
        assert label_probs[0].tolist() == pytest.approx(slow_stored, rel=2**-10, abs=2**-24)
        assert not label_ids[1].any() and not label_probs[1].any()
        decoded = decode_top_k(label_ids, label_probs, num_labels)
        assert decoded[0].argmax() == slow_ids[0] and decoded[0].sum(dtype=np.float64) == pytest.approx(1, abs=1e-4)


def test_the_highest_labels_of_a_large_task_keep_their_ids():
    # 70000 labels: ids 65536 and above need the 17th bit, and a tie between 69998 and 69999 goes to the lower
    probs = np.zeros((1, 70000), dtype=np.float32)
    probs[0, [65535, 65536, 69998, 69999]] = [0.125, 0.375, 0.25, 0.25]
    label_ids, label_probs = encode_top_k(probs, 5)
    assert label_ids.tolist() == [[65536, 69998, 69999, 65535, 0]] and label_ids.dtype == np.int32
    assert label_probs.tolist() == [[0.375, 0.25, 0.25, 0.125, 0.0]]


def test_negative_zero_is_zero():
    # -0.0 is not negative: it ties with 0.0, and the tie goes to the lower label
    label_ids, label_probs = encode_top_k(np.array([[-0.0, 1.0, 0.0]], dtype=np.float32), 2)
    assert label_ids.tolist() == [[1, 0]] and label_probs.tolist() == [[1.0, 0.0]]


def test_a_sum_at_the_very_edge_is_refused_or_stored():
    # Sums of 1.002 up to the last bits: however a library adds them up, a row is stored or refused with a sentence.
    rng = np.random.default_rng(0)
    for _ in range(300):
        row = rng.dirichlet(np.ones(7)).astype(np.float32)
        row = row / row.sum() * np.float32(1.002)
        row[row.argmax()] += np.float32(1.2e-7) * rng.integers(-3, 4)
        try:
            label_ids, label_probs = encode_top_k(row[None], 3)
        except ValueError as error:
            assert "sum" in str(error)
        else:
            check_top_k(label_ids, label_probs, 7, "t")


def test_a_row_that_sums_to_too_little_is_named():
    probs = np.array([[0.5, 0.5], [0.0, 0.0], [0.5, 0.25]], dtype=np.float32)
    with pytest.raises(ValueError) as error:
        encode_top_k(probs, 1)
    assert str(error.value) == "Rows of `probs` must sum to 1 or be all zero, got 0.7500 in row 2."


def test_rows_that_cannot_be_written_are_read_all_the_same():
    probs = np.asfortranarray(softmax_rows(6, 5))[::2]  # strided and read-only, as a slice of a mapped file
    probs.flags.writeable = False
    expected = encode_top_k(np.ascontiguousarray(probs), 2)
    for found, wanted in zip(encode_top_k(probs, 2), expected):
        assert np.array_equal(found, wanted)


# ── what stored rows mean ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("stored", "num_labels", "probs", "rest"),
    [
        ([0.5], 3, [0.5], 0.25),
        ([0.5, 0.25], 4, [0.5, 0.25], 0.125),
        ([1.0], 4, [1.0], 0.0),
        ([1.0, 0.0], 4, [1.0, 0.0], 0.0),  # nothing is left, and nothing could go below a stored 0
        ([0.75, 0.25], 2, [0.75, 0.25], 0.0),  # all labels are stored: there are no others
        ([0.5, 0.25], 2, [2 / 3, 1 / 3], 0.0),  # what was lost by rounding goes to everybody in proportion
        ([0.0, 0.0], 4, [0.0, 0.0], 0.0),  # no answer
        # 0.25 is left for one other label, but what was left out may not pass the last stored 0.125: sum 7/8
        ([0.5, 0.125, 0.125], 4, [4 / 7, 1 / 7, 1 / 7], 1 / 7),
    ],
)
def test_meaning_of_a_stored_row(stored, num_labels, probs, rest):
    found, found_rest = scale_top_k(np.array([stored], dtype=np.float16), num_labels)
    assert found.dtype == found_rest.dtype == np.float32
    assert found.shape == (1, len(stored)) and found_rest.shape == (1,)
    assert found[0].tolist() == pytest.approx(probs, rel=1e-6) and found_rest[0] == pytest.approx(rest, rel=1e-6)


@pytest.mark.parametrize("kind", ["random", "one-hot", "uniform", "tied", "subnormal"])
@pytest.mark.parametrize("num_labels", [1, 2, 5, 256, 257, 65537])
def test_meaning_is_a_distribution_in_the_stored_order(num_labels, kind):
    probs = draw_kind(kind, 4, num_labels, seed=2)
    for k in sorted({1, 2, 16, num_labels} & set(range(1, min(num_labels, 300) + 1))):
        label_ids, stored = encode_top_k(probs, k)
        scaled, rest = scale_top_k(stored, num_labels)
        total = scaled.astype(np.float64).sum(axis=1) + (num_labels - k) * rest.astype(np.float64)
        np.testing.assert_allclose(total, probs.any(axis=1).astype(float), atol=1e-5)
        assert (np.diff(scaled, axis=1) <= 0).all() and (rest >= 0).all()
        if k < num_labels:
            assert (rest <= scaled[:, -1]).all()  # a label that was left out is never above one that was kept
            answered = scaled[:, 0] > 0
            assert (rest[answered] < scaled[answered, 0]).all()  # nor beside the first
        # all that was said holds for the full vectors: stored labels at their places, all others at the rest
        decoded = decode_top_k(label_ids, stored, num_labels)
        for row in np.flatnonzero(scaled[:, 0]):
            others = np.ones(num_labels, dtype=bool)
            others[label_ids[row]] = False
            assert decoded[row, label_ids[row]].tolist() == scaled[row].tolist()
            assert (decoded[row, others] == rest[row]).all()
            assert decoded[row].argmax() == label_ids[row, 0]
        assert not decoded[scaled[:, 0] == 0].any()


def test_meaning_of_no_rows():
    probs, rest = scale_top_k(np.zeros((0, 3), dtype=np.float16), 5)
    assert probs.shape == (0, 3) and rest.shape == (0,)

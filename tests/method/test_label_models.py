"""Label models: rows worked out by hand, slow versions, other packages, and votes that are unusual."""

from __future__ import annotations

import json
import sys
import warnings
from importlib.util import find_spec

import numpy as np
import pytest

from hf_cosupervise import LABEL_MODELS, load_label_model, make_label_model
from hf_cosupervise.method.dawid_skene import DawidSkene
from hf_cosupervise.method.ebcc import Ebcc
from hf_cosupervise.method.glad import Glad
from hf_cosupervise.method.label_model import SharedMajority
from hf_cosupervise.method.mace import Mace
from hf_cosupervise.method.votes import (
    best_labels,
    check_votes,
    information,
    one_sided_voters,
    silence_speaks,
    voter_facts,
)

needs_crowd_kit = pytest.mark.skipif(find_spec("crowdkit") is None, reason="needs crowd-kit")
NAMES = [pytest.param(name, marks=needs_crowd_kit if name == "glad" else ()) for name in LABEL_MODELS]
LEARNED = [param for param in NAMES if param.values[0] != "shared_majority"]
QUICK = {"mace": {"num_restarts": 2}, "ebcc": {"num_restarts": 3}}


def make(name: str):
    return make_label_model(name, **QUICK.get(name, {}))


def make_votes(num_rows=200, num_labels=3, accuracies=(0.9, 0.8, 0.6, 0.7), missing=0.3, seed=0):
    """Voters that err at random, and rows and voters that were not asked at random."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(num_labels, size=num_rows)
    shape = num_rows, len(accuracies)
    votes = np.where(rng.random(shape) < accuracies, truth[:, None], rng.integers(num_labels, size=shape))
    return truth, np.where(rng.random(shape) < missing, -1, votes)


def make_functions(num_rows=600, seed=0, hit=0.5, slip=0.1):
    """Labelling functions: each says one label or nothing, three of them for either label."""
    rng = np.random.default_rng(seed)
    truth, says = rng.integers(2, size=num_rows), np.array([0, 0, 0, 1, 1, 1])
    speaks = rng.random((num_rows, 6)) < np.where(truth[:, None] == says, hit, slip)
    return truth, np.where(speaks, says, -1)


def accuracy(probs: np.ndarray, truth: np.ndarray) -> float:
    """Share of right labels among the covered rows, a tie by its share."""
    some = probs.any(axis=1)
    return float(best_labels(probs)[some, truth[some]].mean())


# ── votes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_ties_are_shared():
    votes = [[0, 1, 2, -1], [2, 2, 1, 1], [-1, 1, -1, -1], [-1] * 4, [2, 2, 0, 1]]
    third, half = 1 / 3, 0.5
    expected = [[third] * 3, [0, half, half], [0, 1, 0], [0, 0, 0], [0, 0, 1]]
    found = SharedMajority().fit_predict_proba(votes)
    np.testing.assert_allclose(found, expected, rtol=1e-15)
    assert SharedMajority().fit(votes).predict(votes).tolist() == found.tolist()


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        (5 * [[0, 1]], [True, True]),  # 0.5^5
        (4 * [[0, 1]], [False, False]),  # 0.5^4 = 0.06: chance
        (5 * [[0, 1]] + [[1, 1]], [False, True]),
        (9 * [[0, 0, 0]] + [[0, 0, 1]], [False, False, False]),  # 0.97^10: label 0 is what everybody says
        (9 * [[0, 0]], [False, False]),  # only one label is ever named
        (5 * [[0, 1, -1]], [True, True, False]),
    ],
)
def test_one_sided_voters(votes, expected):
    assert one_sided_voters(np.array(votes)).tolist() == expected


def test_silence_speaks_where_most_votes_are_one_sided():
    _, functions = make_functions()
    _, crowd = make_votes(missing=0.7)
    assert silence_speaks(functions) and not silence_speaks(crowd)
    assert not silence_speaks(np.array(9 * [[0, 1]]))  # nobody is ever silent
    assert not silence_speaks(np.full((3, 2), -1)) and not silence_speaks(crowd[:0])
    mixed = np.concatenate([functions, np.repeat(np.arange(600)[:, None] % 2, 9, axis=1)], axis=1)
    assert not silence_speaks(mixed)  # nine voters that name both labels have most of the votes


def test_voter_facts_by_hand():
    votes = np.array([[0, 0, -1], [1, 0, -1], [1, -1, -1], [-1, -1, -1], [0, 0, -1]])
    first, second, silent = voter_facts(votes, ["a", "b", "c"], np.array([0, 1, 0, 0, -1]))
    assert (first.polarity, first.coverage, first.overlaps, first.conflicts) == ((0, 1), 0.8, 0.6, 0.2)
    assert first.accuracy == pytest.approx(2 / 3) and second.accuracy == 0.5  # row 4 has no ground truth
    assert (second.polarity, second.coverage, second.conflicts) == ((0,), 0.6, 0.2)
    assert (silent.polarity, silent.coverage, silent.accuracy) == ((), 0.0, None)
    assert voter_facts(votes, ["a", "b", "c"])[0].accuracy is None
    assert voter_facts(votes[:0], ["a", "b", "c"])[0].coverage == 0.0


def test_information_by_hand():
    assert information(np.eye(4)) == pytest.approx(np.log(4))
    assert information(np.array([[1.0, 0.0], [1.0, 0.0]])) == 0.0
    expected = np.log(2) + 0.75 * np.log(0.75) + 0.25 * np.log(0.25)
    assert information(np.array([[0.75, 0.25], [0.25, 0.75]])) == pytest.approx(expected)


# ── slow versions ───────────────────────────────────────────────────────────────────────────────────────────────────


def slow_ebcc(votes: list[list[int]], num_labels: int, kinds: int, start: np.ndarray, steps: int):
    """Mean-field inference, one number at a time, and the bound as its expectations by definition."""
    from scipy.special import digamma, gammaln

    rows, voters = range(len(votes)), range(len(votes[0]))
    shares = np.array([[row.count(c) / sum(v >= 0 for v in row) for c in range(num_labels)] for row in votes])
    joint, prior = start.copy(), shares.sum(axis=0)

    def log_mean(counts):
        return digamma(counts) - digamma(sum(counts))

    for _ in range(steps):
        nu = [prior[c] + joint[:, c].sum() for c in range(num_labels)]
        eta = [[0.1 / kinds + joint[:, c, m].sum() for m in range(kinds)] for c in range(num_labels)]
        mu = np.zeros((len(voters), num_labels, kinds, num_labels))
        for k in voters:
            for c in range(num_labels):
                for m in range(kinds):
                    for label in range(num_labels):
                        said = sum(joint[i, c, m] for i in rows if votes[i][k] == label)
                        mu[k, c, m, label] = (4 if label == c else 1) + said
        joint = np.zeros_like(joint)
        for i in rows:
            for c in range(num_labels):
                for m in range(kinds):
                    logit = log_mean(nu)[c] + log_mean(eta[c])[m]
                    for k in voters:
                        if votes[i][k] >= 0:
                            logit += log_mean(mu[k, c, m])[votes[i][k]]
                    joint[i, c, m] = logit
            joint[i] = np.exp(joint[i] - joint[i].max())
            joint[i] /= joint[i].sum()

    def negative_divergence(counts, alpha):  # E_q[log p] - E_q[log q]
        counts, alpha = np.asarray(counts, dtype=float), np.asarray(alpha, dtype=float)

        def mean_log_density(a):
            return gammaln(a.sum()) - gammaln(a).sum() + ((a - 1) * log_mean(counts)).sum()

        return mean_log_density(alpha) - mean_log_density(counts)

    bound = negative_divergence(nu, prior)
    for c in range(num_labels):
        bound += negative_divergence(eta[c], [0.1 / kinds] * kinds)
        for k in voters:
            for m in range(kinds):
                bound += negative_divergence(mu[k, c, m], [4 if label == c else 1 for label in range(num_labels)])
    for i in rows:
        for c in range(num_labels):
            for m in range(kinds):
                q = joint[i, c, m]
                if q > 0:
                    logit = log_mean(nu)[c] + log_mean(eta[c])[m] - np.log(q)
                    logit += sum(log_mean(mu[k, c, m])[votes[i][k]] for k in voters if votes[i][k] >= 0)
                    bound += q * logit
    return joint.sum(axis=2), bound


@needs_crowd_kit  # for scipy
@pytest.mark.parametrize(("kinds", "steps"), [(1, 1), (1, 3), (3, 1), (3, 4)])
def test_ebcc_equals_a_slow_version(kinds, steps):
    import torch

    from hf_cosupervise.method.ebcc import _infer
    from hf_cosupervise.method.votes import Answers, count_votes, share_out

    _, votes = make_votes(25, 3, seed=3)
    votes = votes[(votes >= 0).any(axis=1)]
    shares = share_out(count_votes(votes, 3))
    start = np.random.default_rng(1).dirichlet(np.ones(kinds), shares.shape) * shares[:, :, None]
    tensor, answers = torch.from_numpy(shares), Answers(votes, 3)
    found = _infer(answers, tensor, tensor.sum(dim=0), torch.from_numpy(start), steps)
    labels, bound = slow_ebcc(votes.tolist(), 3, kinds, start, steps)
    np.testing.assert_allclose(found.labels, labels, atol=1e-10)
    assert found.bound == pytest.approx(bound, abs=1e-8)


def test_more_steps_raise_the_bound_of_ebcc():
    import torch

    from hf_cosupervise.method.ebcc import _infer
    from hf_cosupervise.method.votes import Answers, count_votes, share_out

    _, votes = make_votes(60, 3, missing=0.0)
    shares = torch.from_numpy(share_out(count_votes(votes, 3)))
    start = torch.from_numpy(np.random.default_rng(0).dirichlet(np.ones(4), tuple(shares.shape))) * shares[:, :, None]
    bounds = [_infer(Answers(votes, 3), shares, shares.sum(dim=0), start, steps).bound for steps in range(1, 30)]
    assert np.diff(bounds).min() > -1e-8 and bounds[-1] > bounds[0] + 1


def test_ebcc_sees_who_errs_together():
    """Three voters that err alike on a fifth of the rows, each nearly always with the two others, and six others."""
    rng = np.random.default_rng(0)
    truth, hard = rng.integers(4, size=800), rng.random(800) < 0.2

    def vote(opinion, error):
        return np.where(rng.random(800) < error, (opinion + rng.integers(1, 4, size=800)) % 4, opinion)

    alike = np.where(hard, (truth + 1) % 4, truth)
    votes = np.stack([vote(alike, 0.03) for _ in range(3)] + [vote(truth, 0.25) for _ in range(6)], axis=1)
    found, plain = Ebcc().fit_predict_proba(votes), SharedMajority().fit_predict_proba(votes)
    assert accuracy(found, truth) > accuracy(plain, truth) + 0.02
    assert accuracy(found, truth) > accuracy(DawidSkene().fit_predict_proba(votes), truth) + 0.01


def test_ebcc_takes_as_many_kinds_as_memory_bears_and_says_so(monkeypatch):
    from hf_cosupervise.method import ebcc

    votes = np.random.default_rng(0).integers(2, size=(60, 4))
    few = Ebcc(num_kinds=3, num_restarts=4).fit_predict_proba(votes)
    monkeypatch.setattr(ebcc, "_MAX_CELLS", 3 * 2 * (60 + 4 * 2))
    with pytest.warns(
        UserWarning, match="`ebcc` has 3 instead of 10 kinds .* 60 rows, 4 voters and 2 labels more would"
    ):
        np.testing.assert_array_equal(Ebcc(num_restarts=4).fit_predict_proba(votes), few)
    monkeypatch.setattr(ebcc, "_MAX_CELLS", 1)  # one is always there
    with pytest.warns(UserWarning, match="1 instead of 10 kinds"):
        Ebcc().fit_predict_proba(votes)


def test_many_silences_do_not_overrule_the_votes_of_ebcc():
    """Functions of three labels of which every fourth copies another: read as independent signs, silences run away."""
    rng = np.random.default_rng(200)
    truth, votes = rng.choice(3, 2000, p=[0.5, 0.35, 0.15]), np.full((2000, 12), -1)
    for voter in range(12):
        speaks = rng.random(2000) < np.where(truth == voter % 3, rng.uniform(0.25, 0.6), rng.uniform(0.02, 0.1))
        votes[speaks, voter] = voter % 3
    for voter in range(0, 12, 4):
        copied = rng.random(2000) < 0.8
        votes[copied, voter] = votes[copied, (voter + 3) % 12]
    covered = (votes >= 0).any(axis=1)
    model = Ebcc(num_kinds=1).fit(votes)
    right = {
        "heeded": model.predict_proba(votes),
        "signs": Ebcc(num_kinds=1, abstention="answer").fit_predict_proba(votes),
        "majority": SharedMajority().fit_predict_proba(votes),
    }
    right = {name: accuracy(probs[covered], truth[covered]) for name, probs in right.items()}
    assert right["heeded"] > max(right["signs"] + 0.03, right["majority"] - 0.03)
    np.testing.assert_allclose(model.fit_predict_proba(votes), model.predict_proba(votes), atol=1e-9)


def slow_silence(votes: np.ndarray, steps: int, is_sign: bool) -> np.ndarray:
    """Dawid-Skene of two labels and three answers, the third of them silence; rows without a vote start nowhere."""
    answers = np.where(votes < 0, 2, votes)
    q = np.stack([(votes == c).sum(axis=1) for c in (0, 1)], axis=1).astype(float)
    q /= np.maximum(q.sum(axis=1, keepdims=True), 1)
    shares = q
    for _ in range(steps):
        joint = np.tile(np.maximum(q.sum(axis=0) / q.sum(), 1e-10), (len(votes), 1))
        for k in range(votes.shape[1]):
            said = sorted(set(answers[:, k].tolist()))
            counts = np.array([[max(q[answers[:, k] == s, c].sum(), 1e-10) for s in said] for c in (0, 1)])
            table = counts / counts.sum(axis=1, keepdims=True)
            if not is_sign and 2 in said:
                table[:, said.index(2)] = 1
            joint *= np.array([table[:, said.index(answer)] for answer in answers[:, k].tolist()])
        q = joint / joint.sum(axis=1, keepdims=True)
        if not is_sign:
            q = np.where(shares.any(axis=1, keepdims=True), (q + shares) / 2, q)
    return q


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("abstention", ["auto", "answer"])
def test_silence_of_voters_equals_a_slow_version(steps, abstention):
    truth, votes = make_functions(80)
    model = DawidSkene(max_iterations=steps, tolerance=-np.inf, abstention=abstention)
    found, some = model.fit_predict_proba(votes), (votes >= 0).any(axis=1)
    assert model.silence_is_answer and not some.all()
    np.testing.assert_allclose(found, slow_silence(votes, steps, abstention == "answer") * some[:, None], atol=1e-8)
    np.testing.assert_allclose(model.predict_proba(votes), found, atol=1e-12)


def make_theme_functions(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows have one theme of their label; a function knows one theme, and errs at a rate of its own elsewhere."""
    rng = np.random.default_rng(seed)
    truth, theme = rng.choice(2, 800, p=rng.dirichlet([8, 8])), rng.integers(6, size=800)
    votes = np.full((800, 10), -1)
    for voter in range(10):
        label, error = voter % 2, rng.choice([0.01, 0.05, 0.15, 0.35], p=[0.4, 0.3, 0.2, 0.1])
        knows = (truth == label) & (theme == rng.integers(6))
        speaks = rng.random(800) < np.where(knows, 0.75, error)
        votes[speaks, voter] = label
    return truth, votes


def test_functions_that_exclude_each_other_are_no_worse_than_their_majority():
    """Read as independent signs, their silences outweigh their votes."""
    gains = {"auto": [], "answer": []}
    for seed in range(8):
        truth, votes = make_theme_functions(seed)
        majority = accuracy(make("shared_majority").fit_predict_proba(votes), truth)
        for abstention, found in gains.items():
            found.append(accuracy(DawidSkene(abstention=abstention).fit_predict_proba(votes), truth) - majority)
    assert np.mean(gains["auto"]) > 0.01 > np.mean(gains["answer"]) and min(gains["auto"]) > min(gains["answer"])


# ── other packages ──────────────────────────────────────────────────────────────────────────────────────────────────


@needs_crowd_kit
@pytest.mark.parametrize(("num_labels", "missing"), [(2, 0.2), (4, 0.5)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The given NumPy array is not writable")
def test_models_equal_crowd_kit(num_labels, missing):
    import pandas
    from crowdkit.aggregation import GLAD, MACE
    from crowdkit.aggregation import DawidSkene as CrowdKitDawidSkene

    _, votes = make_votes(120, num_labels, (0.9, 0.6, 0.5, 0.7, 0.8), missing, seed=num_labels)
    rows, voters = np.nonzero(votes >= 0)
    frame = pandas.DataFrame({"task": rows, "worker": voters, "label": votes[rows, voters]})
    for own, other, tolerance in (
        (DawidSkene(), CrowdKitDawidSkene(n_iter=100), 1e-6),
        (Glad(), GLAD(), 1e-6),
        (Mace(), MACE(n_restarts=3, n_iter=50, random_state=np.random.RandomState(0)), 0.1),  # other starts
    ):
        found, expected = own.fit_predict_proba(votes, num_labels), np.zeros((120, num_labels))
        reference = other.fit_predict_proba(frame)
        expected[np.ix_(reference.index, reference.columns)] = reference / reference.sum(axis=1).to_numpy()[:, None]
        np.testing.assert_allclose(found, expected, atol=tolerance)


# ── every model ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", NAMES)
def test_a_model_learns_and_says_the_same_of_other_rows(name):
    truth, votes = make_votes(400)
    model = make(name)
    fitted = model.fit_predict_proba(votes[:300], 3)
    again = model.predict_proba(votes[:300])
    # GLAD finds the difficulty of a row anew
    np.testing.assert_allclose(again, fitted, atol=0.1 if name == "glad" else 1e-12)
    assert accuracy(model.predict_proba(votes[300:]), truth[300:]) > 0.8
    order = np.random.default_rng(0).permutation(100)
    np.testing.assert_allclose(model.predict_proba(votes[300:][order]), model.predict_proba(votes[300:])[order])
    np.testing.assert_allclose(model.predict_proba(votes[300:301]), model.predict_proba(votes[300:])[:1], atol=1e-12)
    assert model.predict_proba(votes[:0]).shape == (0, 3)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_the_same_when_it_is_read_again(name, tmp_path):
    _, votes = make_votes(60)
    model = make(name).fit(votes, 4, names=["a", "b", "c", "d"])
    model.save(tmp_path / "model.json")
    read = load_label_model(tmp_path / "model.json")
    assert type(read) is type(model) and read == model and read.voter_names == ("a", "b", "c", "d")
    assert read.predict_proba(votes).tolist() == model.predict_proba(votes).tolist()
    assert read.to_dict() == model.to_dict() == json.loads((tmp_path / "model.json").read_text(encoding="utf-8"))
    untouched = load_label_model(_saved(make(name), tmp_path / "new.json"))
    with pytest.raises(ValueError, match=f"`{name}` must be fitted before it predicts"):
        untouched.predict_proba(votes)


def _saved(model, path):
    model.save(path)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_rows_sum_to_one_or_zero_and_silent_voters_change_nothing(name):
    _, votes = make_votes(80)
    votes[:5] = -1
    found = make(name).fit_predict_proba(votes, 5)
    np.testing.assert_allclose(found.sum(axis=1), (votes >= 0).any(axis=1), atol=1e-12)
    assert found[:, 3:].tolist() == [[0, 0]] * 80  # labels nobody names
    silent = np.insert(votes, 2, -1, axis=1)
    np.testing.assert_allclose(make(name).fit_predict_proba(silent, 5), found, atol=1e-12)
    np.testing.assert_allclose(make(name).fit_predict_proba(votes[5:], 5), found[5:], atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_order_of_voters_rows_and_labels_does_not_matter(name):
    truth, votes = make_votes(150, accuracies=(0.9, 0.8, 0.85, 0.7, 0.8))
    expected = make(name).fit_predict_proba(votes, 3)
    voters, rows, labels = (np.random.default_rng(1).permutation(size) for size in (5, 150, 3))
    close = {"atol": 0.05 if name in ("mace", "ebcc") else 2e-3}  # the starts are drawn for one order
    np.testing.assert_allclose(make(name).fit_predict_proba(votes[:, voters], 3), expected, **close)
    np.testing.assert_allclose(make(name).fit_predict_proba(votes[rows], 3), expected[rows], **close)
    renamed = np.where(votes >= 0, labels[votes], -1)
    np.testing.assert_allclose(make(name).fit_predict_proba(renamed, 3)[:, labels], expected, **close)
    assert accuracy(expected, truth) > 0.85


@pytest.mark.parametrize("name", NAMES)
def test_what_was_never_there_has_no_say(name):
    _, votes = make_votes(100, 3)
    votes = np.insert(votes, 0, -1, axis=1)  # a voter that is silent, and label 3 that nobody names
    model = make(name).fit(votes, 4)
    assert model.predict_proba([[3, -1, -1, -1, -1], [-1, 3, -1, -1, -1], [-1] * 5]).tolist() == [[0] * 4] * 3
    known = np.array([[-1, 1, 1, -1, 2]])
    heard = np.array([[2, 1, 1, -1, 2]])
    assert model.predict_proba(heard).tolist() == model.predict_proba(known).tolist()


@pytest.mark.parametrize("name", NAMES)
def test_votes_of_one_label_and_no_votes(name):
    assert make(name).fit_predict_proba([[2, 2, -1], [2, 2, 2], [-1] * 3], 4).argmax(axis=1).tolist() == [2, 2, 0]
    model = make(name)
    assert model.fit_predict_proba(np.full((3, 4), -1), 2).tolist() == [[0, 0]] * 3
    assert model.predict_proba([[0, 1, 1, 1]]).tolist() == [[0, 0]]
    assert make(name).fit_predict_proba(np.zeros((0, 3), dtype=int), 2).shape == (0, 2)


@pytest.mark.parametrize("name", LEARNED)
def test_fewer_than_three_voters_are_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` needs at least three teachers that answered, got 2"):
        make(name).fit([[0, 1, -1], [0, 0, -1]])
    with pytest.raises(ValueError, match="got 1: from fewer, nothing tells"):
        make(name).fit([[0], [1]])


def test_a_majority_of_one_voter_is_that_voter():
    assert SharedMajority().fit_predict_proba([[0], [1], [-1]]).tolist() == [[1, 0], [0, 1], [0, 0]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(5))
def test_posteriors_are_probabilities_whatever_is_voted(name, seed):
    rng = np.random.default_rng(seed)
    num_labels, num_voters = int(rng.integers(2, 6)), int(rng.integers(3, 7))
    votes = rng.integers(-1, num_labels, size=(int(rng.integers(4, 40)), num_voters))
    votes[:num_labels] = np.arange(num_labels)[:, None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args: None)  # votes at random tell nothing, and that may be said
        found = make(name).fit_predict_proba(votes, num_labels)
    assert np.isfinite(found).all() and found.min() >= 0
    np.testing.assert_allclose(found.sum(axis=1), (votes >= 0).any(axis=1), atol=1e-9)


# ── voters that name one label or nothing ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["dawid_skene", "ebcc"])
def test_silence_of_labelling_functions_is_heard(name):
    truth, votes = make_functions()
    model = make(name)
    assert accuracy(model.fit_predict_proba(votes), truth) > 0.85 and model.silence_is_answer
    deaf = make_label_model(name, abstention="missing")
    message = f"`{name}` learns nothing from voters that name one label only .* got only such: '0', '1', '2', '3'"
    with pytest.raises(ValueError, match=message):
        deaf.fit(votes, names=list("012345"))
    many = np.repeat(votes, 2, axis=1)
    with pytest.raises(ValueError, match="got only such: 0, 1, 2, 3, 4, 5, 6, 7 and 4 more. Set `abstention"):
        deaf.fit(many)


def test_a_crowd_keeps_its_silence():
    truth, votes = make_votes(missing=0.6)
    auto, missing = DawidSkene().fit_predict_proba(votes), DawidSkene(abstention="missing").fit_predict_proba(votes)
    assert auto.tolist() == missing.tolist()
    forced = DawidSkene(abstention="answer")
    assert forced.fit_predict_proba(votes).tolist() != auto.tolist() and forced.silence_is_answer


@pytest.mark.parametrize("abstention", ["auto", "missing"])
def test_mace_of_labelling_functions_is_sharp_enough_to_train_on(abstention):
    truth, votes = make_functions()
    model = Mace(abstention=abstention)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = model.fit_predict_proba(votes, names=list("abcdef"))
    if abstention == "missing":  # nothing but what it always says is known of a voter
        assert "finds no voter that knows more" in str(caught[0].message)
        assert "one label only: 'a', 'b', 'c', 'd', 'e', 'f'. Compare" in str(caught[0].message)
    some, best = found.any(axis=1), found.argmax(axis=1)
    counts = np.stack([(votes == c).sum(axis=1) for c in (0, 1)], axis=1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    rows = np.arange(len(votes))[some]  # half way from the share of the votes behind a label to 1
    np.testing.assert_allclose(found[rows, best[rows]], (1 + shares[rows, best[rows]]) / 2)
    assert accuracy(found, truth) > 0.85 and information(found[some]) > 0.3
    np.testing.assert_allclose(model.predict_proba(votes), found, atol=1e-12)  # as sure on other rows


def make_rare(num_rows: int = 1500, share: float = 0.03):
    """Voters of two labels, one of which is rare, who are asked at random."""
    rng = np.random.default_rng(0)
    truth, right = (rng.random(num_rows) < share).astype(int), rng.uniform(0.75, 0.95, size=7)
    votes = np.where(rng.random((num_rows, 7)) < right, truth[:, None], 1 - truth[:, None])
    return truth, np.where(rng.random(votes.shape) < 0.5, -1, votes)


def test_mace_finds_that_a_label_is_rare():
    truth, votes = make_rare()
    model = Mace()
    found = model.fit_predict_proba(votes)
    assert accuracy(found, truth) > 0.95 > accuracy(SharedMajority().fit_predict_proba(votes), truth)
    assert model.parameters["prior"][1] < 0.25  # 0.5 before
    np.testing.assert_allclose(
        Mace.from_dict(json.loads(json.dumps(model.to_dict()))).predict_proba(votes), found, atol=1e-12
    )


@pytest.mark.filterwarnings("ignore:`mace` finds")
@pytest.mark.parametrize("make_some", [make_votes, make_functions, lambda: make_rare(60, 0.4)])
def test_mace_takes_labels_as_equally_frequent_without_a_sign(make_some):
    _, votes = make_some()  # rows of as many labels, functions whose silence is an answer, too few rows to know
    model = Mace().fit(votes)
    assert set(model.parameters["prior"].tolist()) == {1 / model.parameters["spam"].shape[1]}


def test_a_model_that_learns_nothing_says_so():
    rng = np.random.default_rng(0)
    silent = np.where(rng.random((300, 6)) < 0.5, np.array([0, 0, 0, 1, 1, 1]), -1)
    silent[:, 0] = np.where(rng.random(300) < 0.02, 1, silent[:, 0])  # one voter has a second label: not all one-sided
    with pytest.warns(UserWarning, match="`dawid_skene` learns next to nothing .* one label only: 1, 2, 3, 4, 5"):
        DawidSkene(abstention="missing").fit(silent)


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("votes", "message"),
    [
        (np.zeros((2, 2)), "whole numbers of shape"),
        (np.zeros(3, dtype=int), "whole numbers of shape"),
        (np.zeros((3, 0), dtype=int), "with a voter"),
        (np.array([[0, -2]]), "got values from -2 to 0"),
        (np.array([[0, 3]]), "labels from 0 below 3, or -1 for no vote, got values from 0 to 3"),
    ],
)
def test_votes_are_checked(votes, message):
    with pytest.raises(ValueError, match=message):
        check_votes(votes, 3)


def test_settings_and_files_are_checked(tmp_path):
    with pytest.raises(ValueError, match="Unknown label model 'best'. Choose one of shared_majority, dawid_skene, "):
        make_label_model("best")
    with pytest.raises(ValueError, match=r"`mace` has the settings \['max_iterations', .*\], got \['restarts'\]. C"):
        make_label_model("mace", restarts=3)
    with pytest.raises(ValueError, match="`abstention` must be one of auto, answer, missing, got 'ask'"):
        DawidSkene(abstention="ask")
    for key in ("num_kinds", "num_restarts", "max_iterations"):
        with pytest.raises(ValueError, match=f"`{key}` must be at least 1, got 0"):
            Ebcc(**{key: 0})
    model = SharedMajority().fit([[0, 1]])
    with pytest.raises(ValueError, match="knows 2 voters, got votes of 1"):
        model.predict_proba([[0]])
    with pytest.raises(ValueError, match="`names` must be one per voter, got 1 of 2"):
        model.fit([[0, 1]], names=["a"])
    with pytest.raises(ValueError, match="`num_labels` must be a whole number of at least 1, got 0"):
        model.fit([[0, 1]], 0)
    with pytest.raises(FileNotFoundError, match="There is no label model"):
        load_label_model(tmp_path / "none.json")
    for text, message in (("{", "as JSON, got"), ("[]", "got None"), ('{"model": "best"}', "got 'best'")):
        (tmp_path / "bad.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            load_label_model(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="must have the fields"):
        SharedMajority.from_dict({"model": "shared_majority"})
    with pytest.raises(ValueError, match="Expected a label model `mace`, got 'shared_majority'"):
        Mace.from_dict(model.to_dict())


def test_glad_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match="`glad` needs crowd-kit"):
        Glad().fit([[0, 1, 1]])

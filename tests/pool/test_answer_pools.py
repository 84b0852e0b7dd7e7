"""Pools of answers: reading, baselines, exports worked out by hand, the Hub, TRL's trainers, and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hub_server import HubServer
from test_prompted import save_language_model

from hf_cosupervise import (
    AnswerPool,
    CoSupervisedConfig,
    CoSupervisedTrainer,
    PseudolabelPool,
    Teacher,
    TeacherHierarchy,
)

PROMPTS = ["2+2", "3+3", "3+4", "1+1"]
ANSWERS = {"all": ["4", "5 ", None, " "], "sums": ["4", "6", "7", None], "odd": ["5", "6", "8", None]}
LOG_PROBS = {"all": [-1, -2, 0, 0], "sums": [-3, -1, -0.5, 0]}
NUM_TOKENS = {"all": [1, 2, 0, 0], "sums": [2, 2, 1, 0]}
HIERARCHY = TeacherHierarchy(
    teachers=[
        Teacher("org/all", revision="main"),
        Teacher("org/sums", level=1),
        Teacher("odd", level=1, kind="column"),
    ]
)
NAN = np.nan


def make_pool(chat: bool = False, **settings: Any) -> AnswerPool:
    prompts: list[Any] = [[{"role": "user", "content": text}] for text in PROMPTS] if chat else PROMPTS
    numbers: dict[str, Any] = {"log_probs": LOG_PROBS, "num_tokens": NUM_TOKENS}
    return AnswerPool.from_answers(ANSWERS, prompts, [7, 8, 9, 10], hierarchy=HIERARCHY, **{**numbers, **settings})


def assert_same(pool: AnswerPool, other: AnswerPool) -> None:
    for name in other.hierarchy.names:
        assert pool.texts(name) == other.texts(name) and pool.samples(name) == other.samples(name)
        np.testing.assert_array_equal(pool.log_probs(name), other.log_probs(name))
    assert pool.prompts() == other.prompts() and pool.ids.tolist() == other.ids.tolist()


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_reading(tmp_path: Path) -> None:
    pool = make_pool()
    assert pool.prompts([2, 0]) == ["3+4", "2+2"] and pool.prompts(slice(1, 2)) == ["3+3"]
    assert pool.texts("all") == ["4", "5 ", None, None] and pool.texts("sums", [2, 1]) == ["7", "6"]
    np.testing.assert_array_equal(pool.log_probs("all"), np.array([-1, -2, NAN, NAN], dtype=np.float32))
    np.testing.assert_array_equal(pool.num_tokens("sums", [2, 3]), np.array([1, 0], dtype=np.int32))
    assert np.isnan(pool.log_probs("odd")).all() and pool.num_tokens("odd").dtype == np.int32
    np.testing.assert_array_equal(pool.confidences[:3, :2], [[-1, -1.5], [-1, -0.5], [NAN, -0.5]])
    assert pool.answered("all").tolist() == [True, True, False, False] and pool.answered("all", [2, 0])[1]
    assert pool.finish_reasons("all") == ["given", "given", "missing", "missing"]
    pool.save(tmp_path / "pool")
    assert_same(AnswerPool.load(tmp_path / "pool", verify=True), pool)
    part = pool.select([2, 0])
    assert (
        part.texts("odd") == ["8", "5"]
        and part.log_probs("sums").tolist() == [-0.5, -3]
        and part.prompts() == [*("3+4", "2+2")]
    )
    card = (tmp_path / "pool" / "README.md").read_text()
    assert "AnswerPool.load" in card and "| `finish_reason` |" in card and "label_probs" not in card


def test_each_kind_of_pool_names_the_other(tmp_path: Path) -> None:
    make_pool().save(tmp_path / "answers")
    votes = TeacherHierarchy(["x", "y"], [Teacher("a", kind="column")])
    PseudolabelPool.from_predictions(votes, [0, 1], {"a": np.eye(2, dtype=np.float32)}).save(tmp_path / "labels")
    with pytest.raises(ValueError, match=r"^`PseudolabelPool.load` of '.*' needs a hierarchy with .* `AnswerPool`\.$"):
        PseudolabelPool.load(tmp_path / "answers")
    with pytest.raises(ValueError, match=r"^`AnswerPool.load` of '.*'"):
        AnswerPool.load(tmp_path / "labels")


def test_columns_of_a_table() -> None:
    table = Dataset.from_dict({"question": PROMPTS, **ANSWERS})
    pool = AnswerPool.from_answers(table.select_columns([*ANSWERS]), inputs=table.select_columns(["question"]))
    assert pool.hierarchy.names == (*ANSWERS,) and pool.texts("sums") == ANSWERS["sums"] and pool.prompts() == PROMPTS


def test_teachers_in_another_order_are_joined_by_id() -> None:
    pool = make_pool()
    turned = pool.teachers["sums"].select([3, 1, 2, 0])
    joined = AnswerPool(HIERARCHY, {**pool.teachers, "sums": turned}, pool.inputs)
    assert_same(joined, pool)
    assert joined.texts("sums", [1]) == ["6"] and joined.answered("sums").tolist() == [True, True, True, False]
    fewer = pool.with_hierarchy(TeacherHierarchy(teachers=[Teacher("odd", kind="column")]))
    assert fewer.texts("odd") == ANSWERS["odd"]


def test_a_pool_on_the_hub(hub: HubServer) -> None:
    commit = make_pool().push_to_hub("someone/answers")
    loaded = AnswerPool.load("someone/answers", verify=True)
    assert_same(loaded, make_pool())
    assert loaded.commit == commit.oid
    assert json.loads(loaded.to_sft("majority").info.description.split("truth. ")[1])["commit"] == commit.oid


def test_baselines() -> None:
    pool = make_pool()
    assert pool.assign("generalist").tolist() == [0, 0, 1, -1]
    # 4 by the more confident of two; 6 by the one that knows how sure it is; 7 before 8, of which nobody knows
    assert pool.assign("majority").tolist() == [0, 1, 1, -1]
    assert pool.assign("majority", lambda answer: "even" if int(answer) % 2 == 0 else "odd").tolist() == [0, 1, 1, -1]
    assert pool.assign("longest_agreement").tolist() == [0, 1, 1, -1]
    # 5; 6, which is said twice; nobody: the last one has said what the student says in 2 of 2, the others in 1 of 2
    student = ["5", ["5", "6", "6 "], None, "1"]
    assert pool.assign("same_answer", student=student).tolist() == [2, 1, 2, -1]
    assert pool.assign("same_answer", "number", student=["so 5", "it is 6", [], []]).tolist() == [2, 1, 2, -1]
    assert pool.assign("same_answer", student="sums").tolist() == [0, 2, 2, -1]  # it does not speak for itself
    sampled = make_pool(samples={"sums": [["4", "5", "5"], ["5"], [], []]})
    assert sampled.assign("same_answer", student="sums").tolist() == [2, 0, 2, -1]
    pairs = pool.to_preferences(assigned="same_answer", student=student)
    assert [tuple(pair.values()) for pair in pairs] == [
        ("2+2", "5", "4", 7),
        ("3+3", "6", "5 ", 8),
        ("3+4", "8", "7", 9),
    ]
    drawn = pool.assign("random", seed=3)
    assert drawn[3] == -1 and drawn[2] in (1, 2) and np.array_equal(drawn, pool.assign("random", seed=3))


# ── exports ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_sft() -> None:
    pool = make_pool()
    rows = pool.to_sft(np.array([1, 0, 0, -1]), weights=np.array([1, 0.5, 1, 1]))
    assert rows.to_list() == [
        {"weight": 1.0, "id": 7, "teacher_id": "sums", "prompt": "2+2", "completion": "4"},
        {"weight": 0.5, "id": 8, "teacher_id": "all", "prompt": "3+3", "completion": "5 "},
    ]
    assert pool.to_sft()["teacher_id"][:] == ["all", "sums", "odd"] * 2 + ["sums", "odd"]
    kept = np.array([False, True, True, True])
    assert pool.to_sft("majority", kept)["id"][:] == [8, 9]
    # Answers that a student gave again take the place of the assigned teachers', and only the kept ones are left.
    again = pool.to_sft(np.array([1, 0, 2, -1]), kept, answers=["four", "six", "seven", "two"])
    assert again.to_list() == [
        {"weight": 1.0, "id": 8, "teacher_id": "all", "prompt": "3+3", "completion": "six"},
        {"weight": 1.0, "id": 9, "teacher_id": "odd", "prompt": "3+4", "completion": "seven"},
        {"weight": 1.0, "id": 10, "teacher_id": None, "prompt": "1+1", "completion": "two"},
    ]
    assert pool.to_sft(kept=kept, answers=["a", None, " ", "b"])["completion"][:] == ["b"]
    own = pool.to_sft(answers=["a", None, " ", "b"])
    assert own["completion"][:] == ["a", "b"] and own["teacher_id"][:] == [None, None]
    nothing = AnswerPool.from_answers({"a": ["1", "2", "3"], "b": ["4", "5", "6"]}, ["q", None, " "])
    assert nothing.to_sft("generalist")["prompt"][:] == nothing.to_routed("generalist")["prompt"][:] == ["q"]
    assert nothing.to_preferences()["prompt"][:] == ["q"]


def test_chats() -> None:
    pool = make_pool(chat=True)
    user, assistant = {"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}
    first = pool.to_sft("majority")[0]
    assert first["prompt"] == [user] and first["completion"] == [assistant]
    assert pool.to_sft("majority", messages=True)[0]["messages"] == [user, assistant]
    pair = pool.to_preferences("rank")[0]
    assert pair == {"prompt": [user], "chosen": [assistant], "rejected": [assistant | {"content": "5"}], "id": 7}
    assert pool.to_routed("generalist")[0]["prompt"] == [user]


def test_routed() -> None:
    pool = make_pool()
    routed = pool.to_routed(np.array([0, -1, 2, 1]))
    assert routed.to_list() == [
        {"prompt": "2+2", "teacher_id": "all", "id": 7},
        {"prompt": "3+4", "teacher_id": "odd", "id": 9},
        {"prompt": "1+1", "teacher_id": "sums", "id": 10},
    ]
    inputs = Dataset.from_dict({"prompt": PROMPTS, "id": [7, 8, 9, 10], "domain": ["math", None, "code", "math"]})
    named = AnswerPool.from_answers(ANSWERS, hierarchy=HIERARCHY, inputs=inputs)
    assert named.to_routed("domain")["teacher_id"][:] == ["math", "code", "math"]
    assert named.to_routed("domain", np.array([True, True, False, False]))["id"][:] == [7]
    with pytest.raises(ValueError, match=r"`assigned` must be .*or a column of the inputs .*got 'teacher_id'"):
        named.to_routed()


def test_preferences(caplog: pytest.LogCaptureFixture) -> None:
    pool = make_pool()

    def pairs(kind: str, **settings: Any) -> list[tuple[Any, ...]]:
        return [(row["id"], row["chosen"], row["rejected"]) for row in pool.to_preferences(kind, **settings)]

    # the assigned teacher's answer against the only other one; the fourth prompt has no answer
    assert pairs("assigned") == [(7, "4", "5"), (8, "6", "5 "), (9, "7", "8")]
    assert pairs("assigned", assigned=np.array([2, -1, 0, 0])) == [(7, "5", "4")]
    assert pairs("rank") == [(7, "4", "5"), (8, "5 ", "6"), (9, "7", "8")]
    assert pairs("rank", ranking=["odd", "sums", "all"]) == [(7, "5", "4"), (8, "6", "5 "), (9, "8", "7")]
    scores = np.array([[1, 3, 2], [NAN, 2, 2], [9, 1, 2], [1, 2, 3]])
    assert pairs("score", scores=scores) == [(7, "4", "5"), (9, "8", "7")]
    known = np.array([[-1, -2, -3], [-9, -2, -3], [NAN, -4, -2], [NAN] * 3])
    assert pairs("unfamiliar", scores=known) == [(7, "4", "5"), (8, "6", "5 "), (9, "7", "8")]
    own = [["4"] * 8 + ["3"] * 2, ["6"] * 8 + ["7"] * 2, ["7"] * 10, []]
    assert pairs("self_consistency", student=own) == [(7, "4", "3"), (8, "6", "5 ")]
    assert pairs("rank", kept=np.array([False, True, False, True])) == [(8, "5 ", "6")]
    assert not caplog.records
    assert pairs("self_consistency", student=own, min_share=0.9) == []
    assert pairs("rank", kept=np.zeros(4, dtype=bool)) == []
    assert "No prompt gives pairs of answers by `rank`: the dataset is empty." in caplog.text


def test_samples_that_say_nothing_are_in_no_pair() -> None:
    pool = AnswerPool.from_answers({"a": ["4"]}, ["2+2"], samples={"a": [["4", " ", "5"]]})
    assert pool.samples("a") == [["4", "5"]]
    for given in (["4", "4", "4", " "], ["4", "4", "4", "I do not know"]):
        assert len(pool.to_preferences("self_consistency", student=[given], normalize="number")) == 0
    blank = AnswerPool.from_answers({"a": ["x"]}, ["good"])
    # Nor does a function of one's own see a blank one.
    for normalize in ("exact", str.lower):
        assert len(blank.to_preferences("self_consistency", student=[["x", "x", "x", " "]], normalize=normalize)) == 0
    pair = blank.to_preferences("self_consistency", student=[["x", "x", "x", " ", "y"]])[0]
    assert (pair["chosen"], pair["rejected"]) == ("x", "y")


@pytest.mark.parametrize("text", ["x\0", "x\ud800"])
def test_texts_that_no_file_holds_are_told_wherever_they_are_given(text: str) -> None:
    pool, chat = make_pool(), [{"role": "user", "content": text}]

    def one(prompts: Any = ("p",), **given: Any) -> AnswerPool:
        return AnswerPool.from_answers({"a": ["x"]}, list(prompts), [7], **given)

    rule = r" must be text without NUL and without halves of characters, got 'x\\\w+' of id 7 \(1 such {}s\)\. Correct"
    for call in (
        lambda: one(samples={"a": [["x", text]]}),
        lambda: pool.to_sft(answers=[text, "4", None, None]),
        lambda: pool.to_preferences("self_consistency", student=[["4", text], [], [], []]),
        lambda: pool.assign("same_answer", student=[text, None, None, None]),
    ):
        with pytest.raises(ValueError, match="^An answer" + rule.format("answer")):
            call()
    for prompt in (text, chat, [{"role": text, "content": "x"}]):
        with pytest.raises(ValueError, match="^A prompt" + rule.format("prompt")):
            one([prompt])


def test_answers_of_the_user_must_be_texts() -> None:
    with pytest.raises(TypeError, match=r"^An answer must be text or None, got 3 of id 8 \(1 such answers\)"):
        make_pool().to_sft(answers=["a", 3, None, None])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"^`samples` must hold a text, a list of .*, got \['x', 3\] \(1 such\)"):
        AnswerPool.from_answers({"a": ["x"]}, samples={"a": [["x", 3]]})  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("known", "error", "message"),
    [
        (
            {"log_probs": {"b": [-1.0, -2.0]}},
            ValueError,
            r"`log_probs` must be by names of `answers`, \['a'\], got \['b'\]",
        ),
        ({"log_probs": [-1.0, -2.0]}, TypeError, "`log_probs` must be a `Mapping`, got list"),
        (
            {"log_probs": {"a": [0.9, 0.8]}, "num_tokens": {"a": [1, 1]}},
            ValueError,
            "`log_prob` of 'a' must be the logarithm of a .*, got 0.8",
        ),
        ({"log_probs": {"a": [-1, -2]}}, ValueError, r"sums over `num_tokens`, got none of these for \['a'\]"),
        ({"num_tokens": {"a": [1.5, 2]}}, ValueError, r"`num_tokens` must hold an integer .*, got \[1.5, 2\]"),
        ({"log_probs": {"a": ["x", 2]}, "num_tokens": {"a": [1, 1]}}, ValueError, "`log_probs` must hold a number"),
        ({"samples": {"a": "xy"}}, ValueError, "one entry for each of the 2 ids, got .*'str'"),
        ({"num_tokens": {"a": [1]}}, ValueError, "one entry for each of the 2 ids, got .*`num_tokens` of 'a'.: 1"),
        ({"samples": {"a": [["x"], 3]}}, TypeError, "`samples` must hold a text, a list of texts or None .*, got 3"),
    ],
)
def test_what_is_known_besides_must_fit(known: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AnswerPool.from_answers({"a": ["x", "y"]}, ["p", "q"], **known)


def test_samples_may_be_a_text_or_none() -> None:
    pool = AnswerPool.from_answers({"a": ["x", "y"], "b": ["x", "y"]}, samples={"a": ["x", None], "b": None})  # type: ignore[dict-item]
    assert pool.samples("a") == [["x"], []] and pool.samples("b") == [["x"], ["y"]]


def test_scores_and_samples_in_the_pool() -> None:
    samples = {"sums": [["4", "4", "9"], ["6", "6", "6"], ["7"], []]}
    pool = make_pool(samples=samples)
    assert pool.samples("sums", [0]) == [["4", "4", "9"]] and pool.samples("all") == [["4"], ["5 "], [], []]
    pairs = pool.to_preferences("self_consistency", student="sums")
    assert pairs["chosen"][:] == ["4", "6"] and pairs["rejected"][:] == ["9", "5 "]
    scored = {
        name: data.add_column("exam", [float(place), 1.0, float(place), 0.0])
        for place, (name, data) in enumerate(pool.teachers.items())
    }
    pool = AnswerPool(HIERARCHY, scored, pool.inputs)
    assert pool.to_preferences("score", scores="exam")["chosen"][:] == ["5", "8"]


def test_an_export_tells_whose_answers_it_holds() -> None:
    description = make_pool().to_sft("majority").info.description
    facts = json.loads(description.split("ground truth. ")[1])
    assert [teacher["name"] for teacher in facts["teachers"]] == ["all", "sums", "odd"] and "3 teachers" in description
    assert facts["teachers"][0]["model"] is None  # it was never loaded, and may be a folder


# ── bad input ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pool: pool.assign("vote"), r"`method` must be one of \['generalist', .*got 'vote'"),
        (
            lambda pool: pool.to_sft(np.array([0, 1])),
            r"`assigned` must be positions 0\.\.2 .* shape \(4,\), got \(2,\)",
        ),
        (lambda pool: pool.to_sft(np.array([0, 1, 3, 0])), r"`assigned` must be positions 0\.\.2 of teachers or -1"),
        (lambda pool: pool.to_sft(kept=np.ones(4)), r"`kept` must be booleans of shape \(4,\), got \(4,\) of float64"),
        (lambda pool: pool.to_sft(weights=-np.ones(4)), "`weights` must be numbers from 0"),
        (lambda pool: pool.to_sft(answers=["a"]), "`answers` must have one entry for each of 4 prompts, got 1"),
        (lambda pool: pool.to_sft(messages=True), "`messages` need prompts that are messages, got texts"),
        (lambda pool: pool.to_preferences("best"), r"`pairs` must be one of \['assigned', .*got 'best'"),
        (lambda pool: pool.to_preferences("score"), r"needs `scores`, numbers of shape \(4, 3\), got none"),
        (
            lambda pool: pool.to_preferences("score", scores=object()),
            r"got object\. .*\(…\)\.per_token`",
        ),
        (lambda pool: pool.to_preferences("score", scores="exam"), "`scores` must be a column of every teacher's"),
        (lambda pool: pool.to_preferences("rank", ranking=["all"]), "`ranking` must name each teacher"),
        (
            lambda pool: pool.to_preferences("self_consistency"),
            r'pairs="self_.* needs as `student` .*for each.* got none',
        ),
        (
            lambda pool: pool.assign("same_answer"),
            "needs as `student` its own answers: a text, .* for each of 4 .*got none",
        ),
        (
            lambda pool: pool.assign("same_answer", student=["4"]),
            r"prompts, or the name of a teacher .*, got 1\. Give",
        ),
        (lambda pool: pool.assign("same_answer", student=dict.fromkeys(PROMPTS, "4")), "got dict"),
        (lambda pool: pool.assign("same_answer", student=len), "got builtin_function_or_method"),
        (
            lambda pool: pool.assign("same_answer", student=["4", NAN, [1], None]),
            r"text, .*, got nan \(2 such\)\. Write",
        ),
        (lambda pool: pool.assign("same_answer", student="none"), "No teacher is called 'none'"),
        (
            lambda pool: pool.assign("majority", student=["4"] * 4),
            "`method` 'majority' asks no student, got `student`",
        ),
        (lambda pool: pool.to_sft("same_answer"), r"`assign\(\"same_answer\"\)` needs as `student` .* got none"),
        (lambda pool: pool.to_preferences(student=["4"] * 4), "`method` 'majority' asks no student"),
        (lambda pool: pool.to_preferences("rank", min_share=1), r"has no options, got \['min_share'\]"),
        (lambda pool: pool.texts("none"), "No teacher is called 'none'"),
        (lambda pool: AnswerPool.from_answers({"a": ["x\0"]}, ["p"]), "without NUL .* got 'x.x00' of id 0"),
        (lambda pool: AnswerPool.from_answers({"a": ["\ud800"]}, ["p"]), "halves of characters"),
        (
            lambda pool: AnswerPool.from_answers({"a": ["x", NAN, 4]}),
            r"text or None, got nan of id 1 \(2 such",
        ),
        (
            lambda pool: AnswerPool.from_answers({"a": ["x"]}, ["p", "q"]),
            r"for each of the 1 ids, got {'the prompts': 2}",
        ),
        (lambda pool: AnswerPool(pool.hierarchy, pool.teachers).prompts(), "must hold its prompts, got none"),
    ],
)
def test_bad_calls(call: Any, message: str) -> None:
    with pytest.raises((ValueError, KeyError, TypeError), match=message):
        call(make_pool())


def test_a_damaged_pool() -> None:
    pool = make_pool()
    numbers = pool.teachers["odd"].remove_columns("answer").add_column("answer", [1, 2, 3, 4])
    with pytest.raises(
        ValueError, match="Answers of 'odd' must be texts with numbers beside them, got int64 as `answer`"
    ):
        AnswerPool(HIERARCHY, {**pool.teachers, "odd": numbers}, pool.inputs)
    odd = pool.teachers["odd"].remove_columns("answer").add_column("answer", ["a", "b\0", "c", None])
    with pytest.raises(ValueError, match="Answers of 'odd' must hold no NUL"):
        AnswerPool(HIERARCHY, {**pool.teachers, "odd": odd}, pool.inputs)


def test_the_trainer_of_classifiers_refuses_words(tmp_path: Path) -> None:
    args = CoSupervisedConfig(output_dir=str(tmp_path))
    with pytest.raises(TypeError, match="must be a `PseudolabelPool`, got AnswerPool, whose teachers write"):
        CoSupervisedTrainer("student", args, pool=make_pool())  # type: ignore[arg-type]


@pytest.mark.parametrize("pool", ["folder", ["folder"], None])
def test_the_trainer_wants_a_pool_that_is_loaded(pool: Any, tmp_path: Path) -> None:
    args = CoSupervisedConfig(output_dir=str(tmp_path))
    found = type(pool).__name__
    with pytest.raises(TypeError, match=rf"^`pool` must be a `PseudolabelPool`, got {found}\. Load one by `Pseudola"):
        CoSupervisedTrainer("student", args, pool=pool)


# ── TRL ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("chat", [False, True])
def test_trl_trains_on_the_exports(chat: bool, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = save_language_model(tmp_path / "student", "llama", "chat" if chat else "")
    pool = make_pool(chat)
    common: dict[str, Any] = {"max_steps": 1, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True}
    common |= {"save_strategy": "no", "output_dir": str(tmp_path / "out"), "disable_tqdm": True, "max_length": 64}
    runs = [
        (trl.SFTTrainer, trl.SFTConfig(**common), pool.to_sft("majority")),
        (trl.DPOTrainer, trl.DPOConfig(**common, loss_type="sigmoid_norm"), pool.to_preferences("rank")),
    ]
    if chat:
        runs.append((trl.SFTTrainer, trl.SFTConfig(**common), pool.to_sft("majority", messages=True)))
    for trainer_class, args, data in runs:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        trainer = trainer_class(model=model, args=args, train_dataset=data, processing_class=tokenizer)
        assert np.isfinite(trainer.train().training_loss)
        assert any(not value.equal(before[name]) for name, value in trainer.model.state_dict().items())

"""Teachers that write: answers against a slow loop, what is drawn, stops, kills, processes, and bad input."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from hub_server import HubServer
from test_prompted import open_plain, save_language_model

from hf_cosupervise import (
    AnswerPool,
    PseudolabelPool,
    Teacher,
    TeacherHierarchy,
    build_answers,
    build_pool,
    load_hierarchy,
    push_hierarchy,
)
from hf_cosupervise.teachers.kinds.written import Written, WrittenTeacher, as_array

PROMPTS = ("good", "a very bad film", "it was not so good as the book", "fine", "é, 12 times", "of the book ")
MESSAGES = [[{"role": "user", "content": text}] for text in PROMPTS]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    folders: dict[str, str] = {}
    root = tmp_path_factory.mktemp("writers")

    def make(kind: str) -> str:
        if kind not in folders:
            folders[kind] = save_language_model(root / kind, *kind.split("-"))
        return folders[kind]

    return make


def writers(*teachers: Teacher) -> TeacherHierarchy:
    return TeacherHierarchy(teachers=teachers)


def writer(model: str, name: str = "w", level: int = 0, **options: Any) -> Teacher:
    return Teacher(model, name=name, level=level, options={"max_new_tokens": 5} | options)


def build(hierarchy: TeacherHierarchy | Teacher, prompts: Any = PROMPTS, **settings: Any) -> AnswerPool:
    data = prompts if isinstance(prompts, Dataset) else Dataset.from_dict({"prompt": list(prompts)})
    hierarchy = writers(hierarchy) if isinstance(hierarchy, Teacher) else hierarchy
    return build_answers(data, hierarchy, disable_tqdm=True, device="cpu", **settings)


def assert_same(pool: AnswerPool, other: AnswerPool) -> None:
    assert pool.hierarchy.names == other.hierarchy.names
    for name in pool.hierarchy.names:
        assert pool.texts(name) == other.texts(name) and pool.samples(name) == other.samples(name)
        assert pool.finish_reasons(name) == other.finish_reasons(name)
        np.testing.assert_array_equal(pool.num_tokens(name), other.num_tokens(name))
        np.testing.assert_allclose(pool.log_probs(name), other.log_probs(name), atol=1e-4)


def slow_answer(folder: str, prompt: str, count: int) -> tuple[list[int], float, bool]:
    """The likeliest token again and again: one row, without cache and padding."""
    model, tokenizer = open_plain(folder)
    start = tokenizer(prompt.rstrip(" ") if not model.config.is_encoder_decoder else prompt, return_tensors="pt")
    own = start["input_ids"]
    if not model.config.is_encoder_decoder and not folder.endswith("bart"):
        own = own if own[0, -1] != tokenizer.eos_token_id else own[:, :-1]
    answer, total = list[int](), 0.0
    while len(answer) < count:
        with torch.no_grad():
            if model.config.is_encoder_decoder:
                decoder = torch.tensor([[model.config.decoder_start_token_id, *answer]])
                logits = model(input_ids=own, decoder_input_ids=decoder).logits[0, -1]
            else:
                logits = model(input_ids=torch.cat([own, torch.tensor([answer], dtype=torch.int64)], 1)).logits[0, -1]
        token = int(logits.argmax())
        total += float(logits.log_softmax(-1)[token])
        answer.append(token)
        if token == tokenizer.eos_token_id:
            return answer, total, True
    return answer, total, False


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_greedy_answers_are_those_of_a_slow_loop(folder_of: Callable[[str], str], kind: str) -> None:
    folder = folder_of(kind)
    pool = build(writer(folder), batch_size=2)
    tokenizer = open_plain(folder)[1]
    for row, prompt in enumerate(PROMPTS):
        tokens, log_prob, ended = slow_answer(folder, prompt, 5)
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        if prompt.endswith(" ") and kind != "t5":
            text = text.removeprefix(" ")
        assert pool.texts("w")[row] == (text if text.strip() else None)
        if text.strip():
            assert pool.finish_reasons("w")[row] == ("stop" if ended else "length")
            assert pool.num_tokens("w")[row] == len(tokens)
            assert pool.log_probs("w")[row] == pytest.approx(log_prob, abs=1e-4)
    facts = pool.facts["w"]
    assert facts["generation"]["max_new_tokens"] == 5 and facts["dtype"] == "float32" and facts["num_failed"] == 0


def test_what_is_drawn_hangs_on_prompt_name_and_seed_alone(folder_of: Callable[[str], str]) -> None:
    drawn = partial(writer, folder_of("llama"), temperature=1.0, num_answers=3)
    pool = build(drawn(seed=1))
    assert_same(pool, build(drawn(seed=1), batch_size=1))
    assert [len(some) for some in pool.samples("w")] == [3] * len(PROMPTS)
    assert [some[0] for some in pool.samples("w")] == pool.texts("w")
    assert len({text for some in pool.samples("w") for text in some}) > 2 * len(PROMPTS)
    assert pool.texts("w") != build(drawn(seed=2)).texts("w") != build(drawn("v", seed=2)).texts("v")
    last = build(drawn(seed=1), PROMPTS[::-1])
    assert last.texts("w") == pool.texts("w")[::-1]
    cold = build(writer(folder_of("llama"), temperature=1e-4, seed=0))
    assert cold.texts("w") == build(writer(folder_of("llama"))).texts("w")


def test_frequencies_of_what_is_drawn(folder_of: Callable[[str], str]) -> None:
    folder = folder_of("llama")
    teacher = writer(folder, temperature=0.5, seed=0, num_answers=400, max_new_tokens=1)
    pool = build(teacher, ["good"])
    model, tokenizer = open_plain(folder)
    with torch.no_grad():
        probs = (model(**tokenizer("good", return_tensors="pt")).logits[0, -1] / 0.5).softmax(-1)
    best = tokenizer.decode(int(probs.argmax()))
    share = np.mean([text == best for text in pool.samples("w")[0]])
    assert share == pytest.approx(float(probs.max()), abs=0.08)


def test_stop_texts_end_an_answer_and_are_cut_off(folder_of: Callable[[str], str]) -> None:
    whole = build(writer(folder_of("llama"), max_new_tokens=8), ["good"])
    [text] = whole.texts("w")
    stop = text[2]
    cut = build(writer(folder_of("llama"), max_new_tokens=8, stop=[stop]), ["good"])
    assert cut.texts("w") == [text[: text.index(stop)]] and cut.finish_reasons("w") == ["stop"]
    assert 0 < cut.num_tokens("w")[0] < whole.num_tokens("w")[0]
    assert cut.log_probs("w")[0] > whole.log_probs("w")[0]


def test_templates_and_chats(folder_of: Callable[[str], str]) -> None:
    plain, chat = folder_of("llama"), folder_of("llama-chat")
    asked = build(writer(plain, template="Review: {{ text }}\nSentiment:"))
    assert asked.texts("w") == build(writer(plain), [f"Review: {text}\nSentiment:" for text in PROMPTS]).texts("w")
    talked = build(writer(chat, chat=True))
    messages = build(writer(chat), MESSAGES)
    written = build(writer(chat), [f"<|user|>{text}</s><|assistant|>" for text in PROMPTS])
    assert talked.texts("w") == messages.texts("w")
    assert messages.prompts() == MESSAGES and messages.is_chat and not talked.is_chat
    assert messages.texts("w")[0] is not None and written.num_tokens("w").any()


def test_columns_of_ready_answers() -> None:
    data = Dataset.from_dict(
        {"prompt": ["a", "b", "c"], "one": ["x", None, "  "], "many": [["y", "z"], [], None], "topic": ["m", "n", "o"]}
    )
    pool = build(writers(Teacher("one", kind="column"), Teacher("many", kind="column")), data)
    assert pool.texts("one") == ["x", None, None] and pool.finish_reasons("one") == ["given", "missing", "missing"]
    assert pool.texts("many") == ["y", None, None] and pool.samples("many") == [["y", "z"], [], []]
    assert pool.inputs is not None and set(pool.inputs.column_names) == {"id", "prompt", "topic"}
    assert pool.column("topic") == ["m", "n", "o"]


def test_true_answers_are_declared(folder_of: Callable[[str], str]) -> None:
    data = Dataset.from_dict({"prompt": ["a", "b"], "said": ["x", "y"], "answer": ["1", "2"]})
    hierarchy = writers(Teacher("said", kind="column"))
    with pytest.raises(ValueError, match=r"no undeclared ground truth, got the columns \['answer'\]"):
        build(hierarchy, data)
    assert build(hierarchy, data, oracle_column="answer").column("oracle_answer") == ["1", "2"]


class Scripted:
    """Answers that are made up, and counted."""

    column: str | None = None
    answer: str | None = None

    def __init__(self, stop_at: int | None = None, how: Any = None) -> None:
        self.facts: dict[str, Any] = {"kind": "scripted"}
        self.seen, self.stop_at, self.how = list[str](), stop_at, how

    def prepare(self, cells: Any) -> Any:
        return list(cells)

    def __call__(self, inputs: Any) -> np.ndarray:
        if self.stop_at is not None and len(self.seen) >= self.stop_at:
            self.how()
        self.seen += inputs
        texts = [f"{text}!" if self.answer is None else self.answer for text in inputs]
        return as_array([Written(text, -float(len(text)), len(text), "stop", [text, "é\n"]) for text in texts])


def test_stopped_and_gone_on_is_undisturbed_and_asks_for_no_row_twice(tmp_path: Path) -> None:
    prompts, hierarchy = [f"prompt {number}" for number in range(50)], writers(Teacher("a"), Teacher("b", level=1))
    again = partial(build, hierarchy, prompts, batch_size=1)
    whole = again(models={"a": Scripted(), "b": Scripted()})
    assert whole.texts("b") == [f"{text}!" for text in prompts] and whole.samples("a")[3] == ["prompt 3!", "é\n"]

    def interrupt() -> None:
        raise KeyboardInterrupt

    first, second = {"a": Scripted(), "b": Scripted(17, interrupt)}, {"a": Scripted(), "b": Scripted()}
    with pytest.raises(KeyboardInterrupt):
        again(models=first, output_dir=tmp_path / "pool")
    assert_same(again(models=second, output_dir=tmp_path / "pool"), whole)
    for name in "ab":
        seen = first[name].seen + second[name].seen
        assert len(seen) == len(set(seen)) == 50
    with pytest.raises(FileExistsError, match="Load the pool"):
        again(models=second, output_dir=tmp_path / "pool")


def test_killed_at_any_batch_and_gone_on_is_undisturbed(tmp_path: Path) -> None:
    prompts, hierarchy = [f"prompt {number}" for number in range(40)], writers(Teacher("a"))
    again = partial(build, hierarchy, prompts, batch_size=1, output_dir=tmp_path / "pool")
    for stop_at in (8, 16, 0):
        if (child := os.fork()) == 0:
            again(models={"a": Scripted(stop_at, lambda: os.kill(os.getpid(), signal.SIGKILL))})
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    last = Scripted()
    pool = again(models={"a": last})
    assert last.seen == prompts[24:]  # the rows of three batches of eight were there
    assert_same(pool, build(hierarchy, prompts, models={"a": Scripted()}))


def test_other_options_are_another_pool(folder_of: Callable[[str], str], tmp_path: Path) -> None:
    hierarchy = writers(writer(folder_of("llama")))
    with pytest.raises(KeyboardInterrupt):
        build(hierarchy, models={"w": Scripted(0, partial(_raise, KeyboardInterrupt))}, output_dir=tmp_path / "pool")
    other = writers(writer(folder_of("llama"), max_new_tokens=4))
    with pytest.raises(ValueError, match=r"got that of another one \(.*max_new_tokens: 5 -> 4"):
        build(other, models={"w": Scripted()}, output_dir=tmp_path / "pool")


def _raise(kind: type[BaseException]) -> None:
    raise kind


def test_answers_are_reused_where_teacher_and_options_are_the_same(
    folder_of: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = build(writers(writer(folder_of("llama")), writer(folder_of("gpt2"), "v", temperature=1.0, seed=0)))
    asked = []
    real = WrittenTeacher.__call__
    monkeypatch.setattr(WrittenTeacher, "__call__", lambda self, rows: asked.append(self.name) or real(self, rows))
    new = writers(writer(folder_of("llama"), level=0), writer(folder_of("gpt2"), "v", 1, temperature=1.0, seed=1))
    order = Dataset.from_dict({"prompt": PROMPTS[::-1]})
    pool = build(new, order, reuse=old)
    assert asked == ["v"] and pool.texts("w") == old.texts("w")[::-1]
    np.testing.assert_array_equal(pool.log_probs("w"), old.log_probs("w")[::-1])
    assert pool.finish_reasons("w") == old.finish_reasons("w")[::-1]


def _build_in_process(folder: str, place: Path) -> None:
    pool = build(_two(folder), output_dir=place, batch_size=1)
    pool.texts("w")


def _two(folder: str) -> TeacherHierarchy:
    return writers(writer(folder), writer(folder, "v", 1, temperature=1.0, seed=0, num_answers=2))


@pytest.mark.slow
def test_two_processes_give_the_pool_of_one(folder_of: Callable[[str], str], tmp_path: Path) -> None:
    from accelerate import debug_launcher

    folder = folder_of("llama")
    debug_launcher(_build_in_process, (folder, tmp_path / "pool"), num_processes=2)
    pool, alone = AnswerPool.load(tmp_path / "pool", verify=True), build(_two(folder), batch_size=1)
    assert_same(pool, alone)
    for name in "wv":
        assert pool.log_probs(name).tobytes() == alone.log_probs(name).tobytes()


# ── bad input ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (
            ["a", "  "],
            {},
            r"A prompt must say something, got '  ' in row 1 \(id .*\) for teacher 'w'.* such rows without answers by",
        ),
        (["a", None], {}, r"Column 'prompt' must hold an input in every row, got None in row 1"),
        (
            ["a", "b " * 80, "c", "b " * 90],
            {},
            r"A prompt must have at most 59 tokens, or .*too_long.*, got 81 in row 1 \(id .*\) for teacher 'w' "
            r"\(and 1 more of the 4 rows read with it\)\. Fix",
        ),
        (
            ["a", "b\0"],
            {},
            r"A prompt must be text without NUL and without halves of characters, got 'b\\x00' in row 1",
        ),
        (
            [[{"role": "user", "content": "a"}]],
            {},
            "Teacher 'w' must have a chat template to answer messages, got none",
        ),
        (["a"], {"chat": True}, "Teacher 'w' must have a chat template"),
        (["a"], {"temperature": 0.5}, "Option `seed` of teacher 'w' is needed with a `temperature`, got None"),
        (["a"], {"num_answers": 2}, "Option `num_answers` of teacher 'w' must be 1 without a `temperature`, got 2"),
        (["a"], {"temperature": -1}, "Option `temperature` of teacher 'w' must be a number from 0 .* got -1"),
        (["a"], {"max_new_tokens": 64}, "must leave room for a prompt in the 64 tokens that it reads, got 64"),
        (["a"], {"max_new_tokens": 0}, r"`max_new_tokens` of teacher 'w' must be an integer in 1\.\.100000, got 0"),
        (["a"], {"stop": [""]}, r"Option `stop` of teacher 'w' must be texts that end an answer, got \(''"),
        (["a"], {"stops": ["b"]}, r"must be among .*'temperature', 'template', 'too_long'\], got unknown \['stops'\]"),
        (["a"], {"template": "no slot"}, "must have a slot"),
        (["a"], {"too_long": "drop"}, r"one of \['raise', 'cut'\], got 'drop'"),
    ],
)
def test_bad_prompts_and_options(
    folder_of: Callable[[str], str], prompts: list[Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(writer(folder_of("llama"), **options), prompts)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "user", "content": " "}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": "a\0"}],
    ],
)
def test_bad_messages(folder_of: Callable[[str], str], messages: list[Any]) -> None:
    rule = "Messages must end with one that asks|messages with the texts|A prompt must be text without NUL"
    with pytest.raises(ValueError, match=rf"({rule}).* in row 1"):
        build(writer(folder_of("llama-chat")), [MESSAGES[0], messages])
    with pytest.raises(ValueError, match="`template` and `chat` of teacher 'w' are for prompts that are texts"):
        build(writer(folder_of("llama-chat"), chat=True), MESSAGES)


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "it takes more than 10 sec",
        ),
        ("{% for %}", "Expected an expression"),
        ("{{ 10**(10**9) }}", "one operation makes 4,000,000,000"),
    ],
)
def test_a_broken_chat_template_is_no_fault_of_a_row(
    folder_of: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, fault: str
) -> None:
    from hf_cosupervise.models import chat

    monkeypatch.setattr(chat, "_MOST_SECONDS", 0.2)
    folder = shutil.copytree(folder_of("llama-chat"), tmp_path / "broken")
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=f"^Teacher 'w' must have a chat template .* this: {fault}") as caught:
        build(writer(str(folder)), MESSAGES, on_error="missing")
    assert any("no row is blamed" in note for note in caught.value.__notes__)


def test_rows_without_answer_are_counted_or_cut(
    folder_of: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    prompts = ["good", "", "b " * 80]
    pool = build(writer(folder_of("llama")), prompts, on_error="missing")
    assert "failed on 2 of 3 rows, which are missing in its answers: ids" in caplog.text
    with pytest.raises(ValueError, match="Teacher 'w' must be able to answer at least one row, got 1 of 1 rows that"):
        build(writer(folder_of("llama")), ["b " * 80], on_error="missing")
    assert pool.facts["w"]["num_failed"] == 2 and pool.finish_reasons("w")[1:] == ["missing"] * 2
    assert pool.texts("w") == [*build(writer(folder_of("llama")), ["good"]).texts("w"), None, None]
    cut = build(writer(folder_of("llama"), too_long="cut"), ["b " * 80])
    assert cut.num_tokens("w")[0] > 0


def test_answers_that_no_file_holds() -> None:
    for text in ("a\0b", "\ud800"):
        model = Scripted(0, lambda: None)
        model.answer = text
        with pytest.raises(ValueError, match="must hold no NUL and no halves of characters, got .* in row 0"):
            build(writers(Teacher("a")), ["x"], models={"a": model})
    stream = IterableDataset.from_generator(lambda: iter([{"prompt": "\ud800", "said": "x"}]))
    with pytest.raises(ValueError, match=r"^A text must hold no halves of characters, got '\\ud800'\. Correct it\.$"):
        build_answers(stream, writers(Teacher("said", kind="column")))
    data = Dataset.from_dict({"prompt": ["a"], "said": ["x\0"]})
    with pytest.raises(ValueError, match="Answers in column 'said' must be texts.* without NUL .* in row 0"):
        build(writers(Teacher("said", kind="column")), data)
    with pytest.raises(ValueError, match="Answers in column 'n' must be texts, lists of texts or None, .* got 3"):
        build(writers(Teacher("n", kind="column")), Dataset.from_dict({"prompt": ["a"], "n": [3]}))


def test_a_tokenizer_without_an_end(folder_of: Callable[[str], str], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    def without(pad: str | None) -> Teacher:
        folder = shutil.copytree(folder_of("llama"), tmp_path / str(pad))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.eos_token, tokenizer.pad_token = None, pad
        tokenizer.save_pretrained(folder)
        for name in ("config.json", "generation_config.json"):
            path = folder / name
            path.write_text(path.read_text().replace('"eos_token_id": 1', '"eos_token_id": null'))
        return writer(str(folder))

    with pytest.raises(ValueError, match="Teacher 'w' must have a token to pad texts with"):
        build(without(None))
    with pytest.raises(ValueError, match="must have a token that ends an answer, got .. as `eos_token_id`"):
        build(without("<s>"))


def test_labels_and_words_are_kept_apart(folder_of: Callable[[str], str], tmp_path: Path) -> None:
    data, teacher = Dataset.from_dict({"text": ["a", "b"], "said": ["x", "y"]}), Teacher("said", kind="column")
    with pytest.raises(ValueError, match="`build_answers` needs teachers that write, .* got one of 2 labels"):
        build_answers(data, TeacherHierarchy(["x", "y"], [teacher]))
    with pytest.raises(
        ValueError, match=r"`build_pool` needs a hierarchy with `labels`, got teachers that write \(said\)"
    ):
        build_pool(data, writers(teacher))
    with pytest.raises(ValueError, match="which writes, must be 'auto' .* got 'timm'"):
        build_answers(data, writers(Teacher("a/b", kind="timm")))
    answers = build_answers(data, writers(teacher), disable_tqdm=True)
    labels = build_pool(data, TeacherHierarchy(["x", "y"], [teacher]), disable_tqdm=True)
    with pytest.raises(TypeError, match=r"^`reuse` must be a `PseudolabelPool`, got AnswerPool\. Make one first\.$"):
        build_pool(data, TeacherHierarchy(["x", "y"], [teacher]), reuse=answers)  # type: ignore[arg-type]
    answers.save(tmp_path / "answers")
    labels.save(tmp_path / "labels")
    with pytest.raises(ValueError, match="^`PseudolabelPool.load` of .* needs a hierarchy with `labels`"):
        PseudolabelPool.load(tmp_path / "answers")
    with pytest.raises(ValueError, match="^`AnswerPool.load` of .* needs teachers that write"):
        AnswerPool.load(tmp_path / "labels")
    with pytest.raises(TypeError, match="`reuse` must be an `AnswerPool`, got PseudolabelPool"):
        build_answers(data, writers(teacher), reuse=labels)  # type: ignore[arg-type]
    for size in (0, "8"):
        with pytest.raises(ValueError, match=f"`batch_size` must be a whole number of at least 1, got {size!r}"):
            build_answers(data, writers(teacher), batch_size=size)
    with pytest.raises(FileExistsError, match="Load the pool with `AnswerPool.load`"):
        build_answers(data, writers(teacher), output_dir=tmp_path / "answers")
    writers(teacher).save(tmp_path / "writers.yaml")
    assert TeacherHierarchy.load(tmp_path / "writers.yaml") == writers(teacher)


def test_a_hierarchy_on_the_hub(folder_of: Callable[[str], str], hub: HubServer) -> None:
    hierarchy = writers(writer(folder_of("llama")))
    commit = push_hierarchy(hierarchy, "someone/writers")
    loaded = load_hierarchy("someone/writers")
    pool = build(loaded)
    assert pool.texts("w") == build(hierarchy).texts("w") and pool.facts["w"]["commit"] == commit.oid
    pool.push_to_hub("someone/answers")
    assert AnswerPool.load("someone/answers").hierarchy == loaded

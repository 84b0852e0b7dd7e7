"""Language models as teachers: words scored against a slow loop without cache and padding, answers, and bad input."""

from __future__ import annotations

import json
import pickle
import shutil
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hub_server import HubServer
from test_hub_teachers import read_folder
from test_kinds import label
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import ByteLevel

from hf_cosupervise import PseudolabelPool, Teacher, TeacherHierarchy, build_pool
from hf_cosupervise.data.inputs import RowError
from hf_cosupervise.models import language
from hf_cosupervise.teachers.kinds.loading import load_teacher
from hf_cosupervise.teachers.kinds.prompted import OPTIONS, PromptedTeacher, Prompter, fold

LABELS = ("negative", "neutral", "positive")
TEMPLATE = "Review: {{ text }}\nSentiment:"
CHAT = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}<|assistant|>"
TEXTS = ("good", "a very bad film", "it was not so good as the book that it is made of", "fine", "é, 12 times")
CAUSAL = ("llama", "gpt2", "mistral")
SEQ2SEQ = ("t5", "bart")


def make_tokenizer(kind: str) -> Any:
    """Byte-level BPE of few merges, so that words have several tokens and some begin with the same one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    backend.train_from_iterator([*TEXTS, "Review:\nSentiment: negative neutral positive nice bad"] * 3, trainer)
    single = "<s> $A" if kind in CAUSAL else "$A </s>"
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=64
    )


def save_language_model(folder: Path, kind: str, change: str = "") -> str:
    """A random language model whose answers differ clearly from row to row."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "decoder_start_token_id": 1}
    layers = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    settings: dict[str, dict[str, Any]] = {
        "llama": layers | {"num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.5},
        "mistral": layers | {"num_key_value_heads": 1, "sliding_window": 8, "initializer_range": 0.5},
        "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.5},
        "t5": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "initializer_factor": 3.0},
        "bart": {
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "init_std": 0.5,
        }
        | {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64},
    }
    tokenizer = make_tokenizer(kind)
    config = CONFIG_MAPPING[kind](vocab_size=len(tokenizer), **ids, **settings[kind])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        auto_model = AutoModelForSeq2SeqLM if kind in SEQ2SEQ else AutoModelForCausalLM
        auto_model.from_config(config).save_pretrained(folder)
    tokenizer.chat_template = CHAT if change == "chat" else None
    if change == "bare":
        tokenizer.backend_tokenizer.post_processor = ByteLevel()
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    folders: dict[str, str] = {}
    root = tmp_path_factory.mktemp("language")

    def make(kind: str) -> str:
        if kind not in folders:
            folders[kind] = save_language_model(root / kind, *kind.split("-"))
        return folders[kind]

    return make


def prompted(model: str, label_texts: Mapping[str, Any] | None = None, **options: Any) -> Teacher:
    options = {"template": TEMPLATE} | options
    return Teacher(model, name="lm", kind="prompted", label_texts=label_texts, options=options)


def load(model: str, label_texts: Mapping[str, Any] | None = None, **options: Any) -> Any:
    return load_teacher(prompted(model, label_texts, **options), LABELS, "cpu")


def open_plain(folder: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    kind = json.loads((Path(folder) / "config.json").read_text())["model_type"]
    auto_model = AutoModelForSeq2SeqLM if kind in SEQ2SEQ else AutoModelForCausalLM
    return auto_model.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def slow_log_prob(model: Any, tokenizer: Any, prompt: str, word: str) -> tuple[float, int]:
    """Log-probability of a whole text, or of a word as the target of a prompt: one row, no cache, no padding."""
    if model.config.is_encoder_decoder:
        target = tokenizer(word, add_special_tokens=False, return_tensors="pt")["input_ids"]
        inputs = tokenizer(prompt, return_tensors="pt")["input_ids"]
        before = torch.cat([torch.tensor([[1]]), target[:, :-1]], dim=1)
        with torch.no_grad():
            log_probs = model(input_ids=inputs, decoder_input_ids=before).logits.log_softmax(dim=-1)
    else:
        whole = tokenizer(f"{prompt} {word}", return_tensors="pt")["input_ids"]
        target = whole[:, 1:]
        with torch.no_grad():
            log_probs = model(input_ids=whole).logits[:, :-1].log_softmax(dim=-1)
    return float(log_probs.gather(2, target.unsqueeze(-1)).sum()), target.shape[1]


def slow_probs(folder: str, texts: Sequence[str], words: Sequence[Sequence[str]]) -> np.ndarray:
    """What of all whole texts, each prompt with each word, is each label's share."""
    model, tokenizer = open_plain(folder)
    rows = []
    for text in texts:
        prompt = f"Review: {text}\nSentiment:"
        own = [[slow_log_prob(model, tokenizer, prompt, word)[0] for word in some] for some in words]
        rows.append([torch.logsumexp(torch.tensor(some, dtype=torch.float64), dim=0) for some in own])
    return torch.softmax(torch.tensor(rows), dim=1).numpy()


# ── words ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", [*CAUSAL, *SEQ2SEQ])
def test_probabilities_are_those_of_whole_texts(folder_of: Callable[[str], str], kind: str) -> None:
    # Several tokens, the same first ones, one word that begins another one, and several words of a label.
    words = (("negative", "neg"), ("neutral",), ("positive", "pos", "nice"))

    teacher = load(folder_of(kind), dict(zip(LABELS, words, strict=True)))
    probs = label(teacher, TEXTS)

    assert probs.dtype == np.float32 and len({tuple(row) for row in probs.tolist()}) == len(TEXTS)
    np.testing.assert_allclose(probs, slow_probs(folder_of(kind), TEXTS, words), atol=1e-5)
    np.testing.assert_allclose(probs[:1], label(teacher, TEXTS[:1]), atol=1e-6)
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


@pytest.mark.parametrize("template", [TEMPLATE, "{{ text }}", "Q: {{ text }} Answer is "])
@pytest.mark.parametrize("splits", [True, False])
def test_the_end_of_a_prompt_has_the_tokens_that_it_has_in_the_whole(
    template: str, splits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_tokenizer("llama")
    if not splits:  # then a merge may reach over any space
        tokenizer.backend_tokenizer.pre_tokenizer = Metaspace(prepend_scheme="never", split=False)
    texts = [*TEXTS, "", " ", "don't\tgo  there ", "it's a 3,5 .", "so it was\n", "日本 12 a"]
    words = ("negative", "neg", "don't", "nice")
    prompter = Prompter("lm", tokenizer, template, LABELS, words, False, 500, OPTIONS)
    pairs = [prompter._border(prompter.render(text)) for text in texts]
    expected = [([0, *prompt], ends) for prompt, ends in prompter._encode_whole(pairs)]
    assert prompter.encode(texts) == expected
    assert prompter._is_local == splits
    own, seen = Prompter._encode_whole, []
    monkeypatch.setattr(Prompter, "_encode_whole", lambda self, some: seen.append(some) or own(self, some))
    prompter._encode_by_ends(pairs)
    assert len(seen) <= 1 + len(pairs) - 3  # all ends at once, and few texts as a whole


def test_words_of_one_token_and_names_of_labels(folder_of: Callable[[str], str], monkeypatch: Any) -> None:
    folder = folder_of("llama")

    np.testing.assert_allclose(
        label(load(folder, dict(zip(LABELS, "abc", strict=True))), TEXTS),
        slow_probs(folder, TEXTS, ["a", "b", "c"]),
        atol=1e-5,
    )
    by_name = label(load(folder), TEXTS)
    np.testing.assert_allclose(by_name, slow_probs(folder, TEXTS, [[name] for name in LABELS]), atol=1e-5)
    # With memory for one word at a time only.
    monkeypatch.setattr(language, "_MEMORY_BUDGET", 1)
    teacher, made = load(folder), list[Any]()

    def look(model: Any, args: Any, output: Any) -> None:
        # Behind the prompts' own, the scores of one forward are gone before the next ones come.
        assert all(ref() is None for ref in made[1:])
        made.append(weakref.ref(output.logits))

    teacher.model.register_forward_hook(look)
    np.testing.assert_allclose(label(teacher, TEXTS), by_name, atol=1e-6)
    assert len(made) > len(TEXTS)


def test_scores_are_sums_or_means_over_tokens(folder_of: Callable[[str], str]) -> None:
    folder = folder_of("llama")
    model, tokenizer = open_plain(folder)
    prompt = "Review: good\nSentiment:"
    length = len(tokenizer(prompt)["input_ids"]) - 1

    teacher = load(folder, length_normalize=True)
    sums = torch.from_numpy(load(folder)._score(teacher.prepare(["good"]))[0])
    counts = teacher.prepare(["good"])["words_mask"].sum(dim=2)[0]

    whole = [slow_log_prob(model, tokenizer, prompt, word) for word in LABELS]
    np.testing.assert_allclose(sums - sums[0], [log_prob - whole[0][0] for log_prob, _ in whole], atol=1e-4)
    assert counts.tolist() == [count - length for _, count in whole] and len(set(counts.tolist())) > 1
    np.testing.assert_allclose(label(teacher, ["good"])[0], torch.softmax(sums / counts, dim=0), atol=1e-6)


def test_a_prior_is_what_an_empty_text_makes_of_the_words(folder_of: Callable[[str], str]) -> None:
    plain, corrected = (load(folder_of("llama"), correct_prior=flag) for flag in (False, True))

    np.testing.assert_allclose(label(corrected, [""]), np.full((1, 3), 1 / 3), atol=1e-6)
    expected = label(plain, TEXTS) / label(plain, [""])
    np.testing.assert_allclose(label(corrected, TEXTS), expected / expected.sum(axis=1, keepdims=True), atol=1e-5)


@pytest.mark.parametrize(
    ("template", "border", "options"),
    [
        ("{{ text }} is ", " ", {}),
        ("{{ text }}:\n", "", {}),
        ("{{ text }}", "", {"separator": ""}),  # a token may reach over the border
        ("{{ text }}", " ", {"separator": " "}),
    ],
)
def test_a_word_follows_its_prompt_as_one_text(
    folder_of: Callable[[str], str], template: str, border: str, options: dict[str, Any]
) -> None:
    folder = folder_of("llama")
    model, tokenizer = open_plain(folder)
    texts = ["so goo", "bad"]
    teacher = load(folder, {"negative": "d", "neutral": "f", "positive": "ddf"}, template=template, **options)

    log_probs = []
    for text in texts:
        stem = template.replace("{{ text }}", text).rstrip(" ") + border
        rows = [tokenizer(stem + word, return_tensors="pt")["input_ids"] for word in ("d", "f", "ddf")]
        with torch.no_grad():
            found = [model(row).logits[0, :-1].log_softmax(-1).gather(1, row[0, 1:, None]).sum() for row in rows]
        log_probs.append(torch.stack(found))

    np.testing.assert_allclose(label(teacher, texts), torch.stack(log_probs).softmax(dim=1), atol=1e-5)
    if options == {"separator": ""}:
        goo, good = (tokenizer(text)["input_ids"] for text in ("so goo", "so good"))
        assert good[: len(goo)] != goo  # else nothing reaches over the border here


def test_a_specialist_is_asked_about_its_labels_alone(folder_of: Callable[[str], str]) -> None:
    folder = folder_of("llama")
    teacher = Teacher(folder, name="lm", kind="prompted", scope=LABELS[:2], options={"template": TEMPLATE})

    probs = label(load_teacher(teacher, LABELS, "cpu"), TEXTS)

    np.testing.assert_allclose(probs[:, :2], slow_probs(folder, TEXTS, [[name] for name in LABELS[:2]]), atol=1e-5)
    assert not probs[:, 2].any()


def test_a_chat_template_is_put_around_the_message(folder_of: Callable[[str], str]) -> None:
    folder = folder_of("llama-chat")

    chat = load(folder, template="{{ text | trim }}? {{ labels | join(', ') }}", chat=True)
    by_hand = load(folder, template="<|user|>{{ text }}? negative, neutral, positive</s><|assistant|>", separator="")

    assert chat.prepare.make.render(" good ") == "<|user|>good? negative, neutral, positive</s><|assistant|>"
    # The template by hand is read as a text, which begins with its first token; a chat brings its own.
    first, second = (teacher.prepare(["good"])["input_ids"][0].tolist() for teacher in (chat, by_hand))
    assert second == [0, *first]


# ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["llama-chat", "t5"])
def test_an_answer_is_looked_up_or_missing(folder_of: Callable[[str], str], kind: str, monkeypatch: Any) -> None:
    teacher = load(
        folder_of(kind),
        {"negative": "bad", "neutral": "so-so", "positive": ["good", "Very good"]},
        answer="generate",
        max_new_tokens=3,
    )
    said = ["\n  BAD!\nReview: good", "so so.", "“very  Good”", "it is good", ""]

    tokens = teacher.model.generate(**teacher.prepare(TEXTS))
    width = 1 if kind == "t5" else teacher.prepare(TEXTS)["input_ids"].shape[1]
    assert tokens.shape == (5, width + 3) and not teacher.model.generation_config.do_sample
    monkeypatch.setattr(type(teacher.prepare.make.tokenizer), "batch_decode", lambda *args, **kwargs: said)
    probs = label(teacher, TEXTS)

    np.testing.assert_array_equal(probs, np.float32([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0]]))


@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_an_answer_is_the_greedy_one(folder_of: Callable[[str], str], kind: str) -> None:
    folder = folder_of(kind)
    model, tokenizer = open_plain(folder)
    inputs = tokenizer("Review: good\nSentiment:", return_tensors="pt")["input_ids"]
    tokens = torch.tensor([[1]]) if kind == "bart" else inputs
    start = tokens.shape[1]
    for _ in range(4):
        with torch.no_grad():
            logits = (model(inputs, decoder_input_ids=tokens) if kind == "bart" else model(tokens)).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(dim=-1)], dim=1)
    answer = tokenizer.decode(tokens[0, start:], skip_special_tokens=True)
    words = {"negative": answer, "neutral": "neutral", "positive": "positive"}
    assert fold(answer) and "\n" not in answer.strip()

    probs = label(load(folder, words, answer="generate", max_new_tokens=4), ["good"])

    assert probs.tolist() == [[1, 0, 0]]


def test_answers_that_are_no_words_are_told_of_once(folder_of: Callable[[str], str], caplog: Any) -> None:
    teacher = load(folder_of("llama"), answer="generate", max_new_tokens=2)
    assert not caplog.records

    for _ in range(2):
        assert not label(teacher, TEXTS).any()

    [record] = caplog.records
    assert "must answer by words of labels, got none of them in 5 answers, first '" in record.getMessage()


def test_another_label_of_the_task_may_be_meant(folder_of: Callable[[str], str]) -> None:
    folder, map_to = folder_of("llama"), {"neutral": None, "negative": "positive"}
    teacher = Teacher(folder, name="lm", kind="prompted", label_map=map_to, options={"template": TEMPLATE})

    probs = label(load_teacher(teacher, LABELS, "cpu"), TEXTS)

    np.testing.assert_allclose(probs, [[0, 0, 1]] * len(TEXTS), atol=1e-6)


def test_generation_is_greedy_whatever_the_files_say(tmp_path: Path, folder_of: Callable[[str], str]) -> None:
    folder = Path(shutil.copytree(folder_of("llama"), tmp_path / "lm"))
    wild = {"do_sample": True, "temperature": 9.0, "num_beams": 3, "repetition_penalty": 9.0, "max_length": 7}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, **wild}))

    first, second = (load(str(path), answer="generate") for path in (folder_of("llama"), folder))

    inputs = first.prepare(TEXTS)
    assert torch.equal(first.model.generate(**inputs), second.model.generate(**inputs))


# ── pools ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def data() -> Dataset:
    return Dataset.from_dict({"text": list(TEXTS)})


def hierarchy(teacher: Teacher) -> TeacherHierarchy:
    return TeacherHierarchy(LABELS, [teacher])


def build(teacher: Teacher, **settings: Any) -> PseudolabelPool:
    return build_pool(data(), hierarchy(teacher), device="cpu", disable_tqdm=True, **settings)


def test_a_pool_keeps_how_it_was_asked(folder_of: Callable[[str], str], tmp_path: Path) -> None:
    teacher = prompted(folder_of("llama"), {"negative": "bad", "neutral": "so-so", "positive": ["good", "fine"]})

    pool = build(teacher, output_dir=tmp_path / "pool", batch_size=2, num_workers=1)

    again = PseudolabelPool.load(tmp_path / "pool")
    expected = label(load_teacher(teacher, LABELS, "cpu"), TEXTS)
    np.testing.assert_allclose(pool.decode("lm"), expected, atol=1e-3)
    assert again.hierarchy.teachers[0].label_texts == teacher.label_texts
    assert again.hierarchy.teachers[0].options == teacher.options
    facts = again.facts["lm"]
    assert facts["kind"] == "prompted" and facts["class"] == "LlamaForCausalLM" and facts["dtype"] == "float32"
    assert facts["words"]["positive"] == ["good", "fine"] and len(facts["template"]) == 16
    card = (tmp_path / "pool" / "README.md").read_text(encoding="utf-8")
    assert f"| template `{facts['template']}`; `negative`: bad; `neutral`: so-so; `positive`: good, fine |" in card


def test_another_way_to_ask_is_another_teacher(folder_of: Callable[[str], str], tmp_path: Path) -> None:
    folder = str(shutil.copytree(folder_of("llama-chat"), tmp_path / "lm"))
    first = prompted(folder, template="{{ text }}?", chat=True)
    pool = build(first)
    calls: list[int] = []
    called = PromptedTeacher.__call__

    def count(self: PromptedTeacher, inputs: Any) -> np.ndarray:
        calls.append(len(inputs["input_ids"]))
        return called(self, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PromptedTeacher, "__call__", count)
        build(first, reuse=pool)
        assert not calls
        build(prompted(folder, template="{{ text }}!", chat=True), reuse=pool)
        build(prompted(folder, {"negative": "no", "neutral": "so", "positive": "yes"}, chat=True), reuse=pool)
        assert calls == [2, 5, 2, 5]
        # The chat template is a file of the model, which is the same otherwise.
        (Path(folder) / "chat_template.jinja").write_text(CHAT.replace("</s>", "</s></s>"))
        build(first, reuse=pool)
        assert calls == [2, 5, 2, 5, 2, 5]


def test_work_is_not_continued_with_another_template(folder_of: Callable[[str], str], tmp_path: Path) -> None:
    class Stopped(RuntimeError):
        pass

    def stop(self: PromptedTeacher, inputs: Any) -> np.ndarray:
        if inputs["input_ids"].shape[0] == 1:  # the last batch of three
            raise Stopped("power cut")
        return called(self, inputs)

    called = PromptedTeacher.__call__
    settings: dict[str, Any] = {"output_dir": tmp_path / "pool", "batch_size": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PromptedTeacher, "__call__", stop)
        with pytest.raises(Stopped):
            build(prompted(folder_of("llama")), **settings)

    with pytest.raises(ValueError, match="hierarchy"):
        build(prompted(folder_of("llama"), template="{{ text }}:"), **settings)
    pool = build(prompted(folder_of("llama")), **settings)
    np.testing.assert_array_equal(pool.decode("lm"), build(prompted(folder_of("llama")), batch_size=2).decode("lm"))


def test_workers_are_sent_no_weights(folder_of: Callable[[str], str]) -> None:
    teacher = load(folder_of("llama-chat"), chat=True)

    sent = pickle.dumps(teacher.prepare)

    inputs = pickle.loads(sent)(TEXTS)
    assert all(torch.equal(value, inputs[key]) for key, value in teacher.prepare(TEXTS).items())


def test_half_precision_is_near(folder_of: Callable[[str], str]) -> None:
    full, half = (build(prompted(folder_of("llama")), precision=name) for name in ("float32", "bfloat16"))

    difference = np.abs(full.decode("lm") - half.decode("lm")).max()
    assert 0 < difference < 0.1 and half.facts["lm"]["precision"] == "bfloat16"


def test_by_id_it_is_the_local_one(hub: HubServer, folder_of: Callable[[str], str]) -> None:
    commit = hub.create("org/lm", read_folder(folder_of("llama-chat")))

    local, there = (load(model, chat=True) for model in (folder_of("llama-chat"), "org/lm"))

    np.testing.assert_array_equal(label(there, TEXTS), label(local, TEXTS))
    assert there.facts["commit"] == commit and "weights" not in there.facts and "tokenizer" not in there.facts
    assert {**there.facts, "commit": None} == {key: local.facts[key] for key in there.facts}


# ── bad input ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("kind", "label_texts", "options", "sentence"),
    [
        ("llama", None, {"template": None}, r"must be a text with a slot `\{\{ text \}\}`, got None"),
        ("llama", None, {"template": "What is it?"}, r"must have a slot `\{\{ text \}\}`.* got slots for \[\]"),
        ("llama", None, {"template": "{{ text }} {{ rating }}"}, r"got slots for \['rating', 'text'\]"),
        ("llama", None, {"template": "{{ text "}, "must be a template of Jinja, got: unexpected end of template"),
        ("llama", None, {"template": "{{ text.__class__ }}"}, "got `Getattr` in line 1"),
        ("llama", None, {"template": "{{ text }}\n{% include 'x' %}"}, "got `Include` in line 2"),
        ("llama", None, {"template": "{{ text * 10 }}"}, "got `Mul` in line 1"),
        ("llama", None, {"template": "{% for a in text %}{{ a }}{% endfor %}"}, "got `For` in line 1"),
        ("llama", None, {"template": "{{ text | pprint }}"}, "got the filter 'pprint' in line 1"),
        ("llama", None, {"template": "{% if text == '' %}{{ text }}{% endif %}"}, "got the same prompt for any: ''"),
        ("llama", None, {"template": "{{ text['a'] }}"}, "must have a template of Jinja, got: 'str object' has no at"),
        ("llama", None, {"tempalte": "x"}, r"must be among \[.*'template'.*\], got unknown \['tempalte'\]"),
        ("llama", None, {"answer": "sample"}, r"`answer` .* must be one of \['words', 'generate'\], got 'sample'"),
        ("llama", None, {"chat": 1}, r"`chat` .* must be one of \[False, True\], got 1"),
        ("llama", None, {"max_new_tokens": 0}, r"must be an integer in 1\.\.1000, got 0"),
        ("llama", None, {"chat": True}, "must have a chat template to answer messages, got none"),
        ("llama", {"negative": "bad"}, {}, r"must be of all of its labels .*, got none for \['neutral', 'positive'\]"),
        (
            "llama",
            {"negative": "bad", "neutral": "bad ", "positive": "good"},
            {},
            r"must each be given once, got \['bad'\] more than once",
        ),
        (
            "llama",
            {"negative": "Bad", "neutral": "bad!", "positive": "good"},
            {"answer": "generate"},
            "must have words that differ by more than case and punctuation, got 'bad!' for 'negative' and",
        ),
        (
            "llama",
            {"negative": "-", "neutral": "so", "positive": "good"},
            {"answer": "generate"},
            "must have a word for each label, got '-' for 'negative'",
        ),
        ("llama", None, {"label_map": {"bad": "negative"}}, r"must be among .* got unknown \['label_map'\]"),
        ("bert", None, {}, "must be a language model, causal or .* got 'BertForSequenceClassification'"),
        ("masked", None, {}, "must be a language model, causal or .* got 'BertForMaskedLM'. Use one, or another"),
        ("words", None, {}, r"must have words for labels that its tokenizer knows, got 'negative', which it does not"),
        ("lower", {"negative": "Bad", "neutral": "bad", "positive": "good"}, {}, "got 'Bad' and 'bad', which are the"),
        ("chat", None, {"chat": True}, "must have a chat template that takes a message of the user, got: no users"),
        ("adapter", None, {}, "must be a whole language model, got an adapter in"),
        ("partial", None, {}, r"never a silently random teacher\), got a checkpoint without \['lm_head.weight'\]"),
    ],
)
def test_bad_input_is_one_clear_sentence(
    folder_of: Callable[[str], str],
    tiny_bert: str,
    tmp_path: Path,
    kind: str,
    label_texts: dict[str, Any] | None,
    options: dict[str, Any],
    sentence: str,
) -> None:
    folder = Path(tiny_bert) if kind == "bert" else spoil(folder_of, tmp_path / "lm", kind)

    with pytest.raises((TypeError, ValueError), match=sentence):
        load(str(folder), label_texts, **options)


def spoil(folder_of: Callable[[str], str], target: Path, kind: str) -> Path:
    """A language model with one fault."""
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    folder = Path(shutil.copytree(folder_of("llama"), target))
    if kind == "masked":
        config = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
        (folder / "config.json").write_text(json.dumps(config))
    elif kind == "words":
        backend = Tokenizer(models.WordLevel({"[UNK]": 0, **{word: i for i, word in enumerate("abcdef", 1)}}, "[UNK]"))
        PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="a").save_pretrained(folder)
    elif kind == "lower":
        tokenizer = make_tokenizer("llama")
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.save_pretrained(folder)
    elif kind == "chat":
        (folder / "chat_template.jinja").write_text("{{ raise_exception('no users') }}")
    elif kind == "adapter":
        (folder / "config.json").unlink()
        adapter = {"peft_type": "LORA", "base_model_name_or_path": folder_of("llama"), "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(adapter))
        (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    elif kind == "partial":
        kept = {
            name: value for name, value in load_file(folder / "model.safetensors").items() if "lm_head" not in name
        }
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_prompt_that_is_too_long_is_said_or_cut(folder_of: Callable[[str], str]) -> None:
    long = "good " * 100
    with pytest.raises(RowError, match=r'at most 64 tokens, or `options=\{"too_long": "cut"\}`, got \d+$'):
        load(folder_of("llama")).prepare(["good", long])

    cut = load(folder_of("llama"), too_long="cut")
    inputs = cut.prepare([long])
    longest = int(inputs["words_mask"].sum(dim=2).max()) - 1
    assert 60 <= inputs["input_ids"].shape[1] + longest <= 64
    assert cut.prepare.make.tokenizer.decode(inputs["input_ids"][0]).endswith("\nSentiment:")
    assert np.isfinite(label(cut, [long, "good"])).all()
    with pytest.raises(
        ValueError, match="any short text by its `template`, got: A prompt must have at most 64 tokens"
    ):
        load(folder_of("llama"), too_long="cut", template="x" * 200 + "{{ text }}:")
    pool = build_pool(
        Dataset.from_dict({"text": ["good", long]}), hierarchy(prompted(folder_of("llama"))), on_error="missing"
    )
    assert pool.answered("lm").tolist() == [True, False] and pool.facts["lm"]["num_failed"] == 1


def test_rows_that_are_no_texts_are_named(folder_of: Callable[[str], str]) -> None:
    teacher = load(folder_of("llama"))
    with pytest.raises(RowError, match="A text must be a string, got int"):
        teacher.prepare(["good", 3])
    with pytest.raises(RowError, match="no halves of characters"):
        teacher.prepare(["good", "\ud800"])
    with pytest.raises(TypeError, match="must be given texts, got float"):
        teacher.prepare([0.5])
    with pytest.raises(ValueError, match="at least one token, got none for ''"):
        load(folder_of("llama-bare"), template="{{ text }}").prepare([""])

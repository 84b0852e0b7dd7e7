"""Answers scored, routed and learnt: against slow loops, by hand, after kills and in two processes."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import debug_launcher
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    BartConfig,
    BartForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    XLNetConfig,
    XLNetLMHeadModel,
    pipeline,
)

from hf_cosupervise import CoSupervisedConfig, Teacher, TeacherHierarchy, co_supervise_answers, score_answers
from hf_cosupervise.method.answers import group_answers
from hf_cosupervise.method.routing import RULES, choose_teacher
from hf_cosupervise.pool.answers import AnswerPool
from hf_cosupervise.processes import Processes
from hf_cosupervise.students import writing
from hf_cosupervise.training import answers as module

CHARS = "abcdefgh "
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(chat: bool = False, **names: str | None) -> PreTrainedTokenizerFast:
    """A tokenizer of letters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    vocab = {char: place for place, char in enumerate([*specials, *CHARS, *"<>usrint"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    known = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | names
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=64, **{key: value for key, value in known.items() if value}
    )
    tokenizer.chat_template = CHAT if chat else None
    return tokenizer


def make_model(kind: str = "llama", seed: int = 0) -> Any:
    """A language model of random weights, whose opinions differ clearly."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ends = {"vocab_size": 21, "pad_token_id": 0, "eos_token_id": 2}
        if kind == "t5":
            sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "initializer_factor": 5.0}
            return T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **sizes, **ends)).eval()
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = LlamaConfig(bos_token_id=1, max_position_embeddings=64, initializer_range=0.4, **sizes, **ends)
        return LlamaForCausalLM(config).eval()


def make_pool(num: int = 24, levels: tuple[int, ...] = (0, 1, 1), seed: int = 0, chat: bool = False) -> AnswerPool:
    """Prompts of letters: the teacher of level 1 whose letter begins the prompt repeats it, the others make it up."""
    rng = random.Random(seed)
    rows = [["".join(rng.choice("ab") for _ in range(rng.randint(1, 9)))][0] for _ in range(num)]
    names = [f"t{place}" for place in range(len(levels))]
    teachers = [Teacher(f"x/{name}", name=name, level=level) for name, level in zip(names, levels, strict=True)]
    answers: dict[str, list[str | None]] = {}
    counts: dict[str, list[int]] = {}
    sums: dict[str, list[float]] = {}
    for place, name in enumerate(names):
        texts: list[str | None] = [
            row[: 1 + place] + rng.choice("cd") * rng.randint(0, 6) if rng.random() < 0.9 or not place else None
            for row in rows
        ]
        texts[1] = rows[1] if place != 1 else None  # equal answers are scored once
        answers[name] = texts
        counts[name] = [0 if text is None else len(text) + 1 for text in texts]
        sums[name] = [np.nan if text is None else -rng.random() * len(text) for text in texts]
    prompts: list[Any] = [[{"role": "user", "content": row}] for row in rows] if chat else rows
    hierarchy = TeacherHierarchy(teachers=teachers)
    return AnswerPool.from_answers(answers, prompts, hierarchy=hierarchy, log_probs=sums, num_tokens=counts)


def changed(pool: AnswerPool, answers: dict[str, list[str | None]] = {}, **options: Any) -> AnswerPool:  # noqa: B006
    """The pool with other prompts or answers, or without what some teachers think of themselves."""
    unknown, prompts = options.get("unknown", ()), options.get("prompts", pool.prompts())
    names = pool.hierarchy.names
    known = {name: answers.get(name, pool.texts(name)) for name in names}
    numbers = {
        "log_probs": {name: pool.log_probs(name) for name in names if name not in unknown},
        "num_tokens": {name: pool.num_tokens(name) for name in names if name not in unknown},
    }
    return AnswerPool.from_answers(known, prompts, hierarchy=pool.hierarchy, **numbers)  # type: ignore[arg-type]


def root_of(pool: AnswerPool) -> AnswerPool:
    return pool.with_hierarchy(TeacherHierarchy(teachers=pool.hierarchy.teachers[:1]))


def make_args(folder: Path, **changed: Any) -> TrainingArguments:
    known = {"per_device_train_batch_size": 4, "num_train_epochs": 1, "learning_rate": 0.01, "use_cpu": True}
    known |= {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "seed": 3, "per_device_eval_batch_size": 4}
    return TrainingArguments(str(folder), **known | changed)


def slow_score(model: Any, tokenizer: Any, prompt: Any, answer: str) -> tuple[float, int]:
    """Log-probability of one answer after one prompt, all of it read at once."""
    target = tokenizer(answer, add_special_tokens=False)["input_ids"] + [2]
    if isinstance(prompt, list):
        text = "".join(f"<{message['role']}>{message['content']}</s>" for message in prompt) + "<assistant>"
        before = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        before = tokenizer(prompt)["input_ids"]
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            logits = model(torch.tensor([before]), decoder_input_ids=torch.tensor([[0, *target[:-1]]])).logits[0]
        else:
            logits = model(torch.tensor([before + target])).logits[0, len(before) - 1 : -1]
    log_probs = logits.double().log_softmax(dim=1)
    return float(log_probs[range(len(target)), target].sum()), len(target)


def slow_represent(model: Any, prompts: Any) -> np.ndarray:
    """Means over its tokens of all hidden states of each prompt, read alone."""
    rows = []
    for prompt in prompts:
        ids = torch.tensor([make_tokenizer()(prompt)["input_ids"]])
        asked = model.encoder if model.config.is_encoder_decoder else model
        with torch.no_grad():
            rows.append(torch.cat([own[0].mean(dim=0) for own in asked(ids, output_hidden_states=True).hidden_states]))
    return torch.stack(rows).numpy()


# ── scores ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["llama", "t5", "chat"])
def test_scores_are_those_of_each_answer_alone(kind: str) -> None:
    model, tokenizer, pool = make_model(kind), make_tokenizer(kind == "chat"), make_pool(chat=kind == "chat")

    scores = score_answers(model, pool, tokenizer=tokenizer, batch_size=5)

    assert scores.names == ("t0", "t1", "t2") and scores.log_probs.dtype == np.float32
    for column, name in enumerate(scores.names):
        for row, (prompt, text) in enumerate(zip(pool.prompts(), pool.texts(name), strict=True)):
            found = scores.log_probs[row, column], scores.num_tokens[row, column]
            if text is None:
                assert np.isnan(found[0]) and found[1] == 0
            else:
                expected, count = slow_score(model, tokenizer, prompt, text)
                assert found[1] == count and found[0] == pytest.approx(expected, rel=1e-5, abs=1e-5)
    np.testing.assert_allclose(scores.per_token, scores.log_probs / np.maximum(scores.num_tokens, 1))


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_prompts_are_represented_by_all_that_their_tokens_become(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = make_model(kind), [*make_pool().prompts(), " "]
    writer = module.Writer(model, make_tokenizer())
    encoded = writer.encode(prompts)

    found = writer.represent(encoded, 5, Processes(0, 1))

    expected = slow_represent(model, prompts[:-1])
    np.testing.assert_allclose(found[:-1], expected, rtol=1e-5, atol=1e-5)
    assert not found[-1].any()  # nothing is asked there
    # Where all layers are too many, those in the middle of equal parts; of a wide model, the one in its middle.
    layers = np.split(expected, len(expected[0]) // 16, axis=1)
    for most, used in ((len(expected[0]) - 1, layers[1::2]), (5, [layers[len(layers) // 2]])):
        monkeypatch.setattr(writing, "MAX_FEATURES", most)
        few = writer.represent(encoded, 100, Processes(0, 1))
        np.testing.assert_allclose(few[:-1], np.hstack(used), rtol=1e-5, atol=1e-5)
    assert writer.represent([[], []], 5, Processes(0, 1)).shape == (2, 0)
    # Some keep several states of each token; what they come to is the last.
    asked = model.encoder if kind == "t5" else model.model
    read = asked.forward

    def read_twice(**inputs: Any) -> Any:
        found = read(**inputs)
        found.hidden_states = tuple(torch.stack([own, own]) for own in found.hidden_states)
        return found

    monkeypatch.setattr(asked, "forward", read_twice)
    last = writer.represent(encoded, 5, Processes(0, 1))[:-1]
    np.testing.assert_allclose(last, expected[:, -16:], rtol=1e-5, atol=1e-5)


def test_neither_order_nor_batches_change_a_score() -> None:
    model, tokenizer, pool = make_model(), make_tokenizer(), make_pool()
    rows = np.random.default_rng(0).permutation(len(pool))

    whole = score_answers(model, pool, tokenizer=tokenizer)
    for size in (1, 3, 100):
        other = score_answers(model, pool.select(rows), tokenizer=tokenizer, batch_size=size, teachers=["t2", "t0"])
        np.testing.assert_allclose(other.log_probs, whole.log_probs[rows][:, [2, 0]], atol=1e-5)


def test_a_prompt_and_equal_answers_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, pool = make_model(), make_tokenizer(), make_pool()
    seen = []
    own = module.Writer.score
    monkeypatch.setattr(
        module.Writer, "score", lambda self, items, *args: (seen.extend(items), own(self, items, *args))[1]
    )

    score_answers(model, pool, tokenizer=tokenizer)

    texts = [pool.texts(name) for name in pool.hierarchy.names]
    pairs = {
        (prompt, text) for row in texts for prompt, text in zip(pool.prompts(), row, strict=True) if text is not None
    }
    assert len(seen) == len(set(pool.prompts())) < len(pool)
    assert sum(len(following) for _, following in seen) == len(pairs)


def test_windows_read_few_tokens_before_each_few() -> None:
    model, tokenizer, pool = make_model(), make_tokenizer(), make_pool(4, levels=(0,))

    scores = score_answers(model, pool, tokenizer=tokenizer, window=2)

    for row, (prompt, text) in enumerate(zip(pool.prompts(), pool.texts("t0"), strict=True)):
        target = tokenizer(text, add_special_tokens=False)["input_ids"] + [2]
        total, before = 0.0, tokenizer(prompt)["input_ids"]
        for start in range(0, len(target), 2):
            piece = target[start : start + 2]
            with torch.no_grad():
                logits = model(torch.tensor([before + piece])).logits[0, len(before) - 1 : -1]
            total, before = total + float(logits.log_softmax(1)[range(len(piece)), piece].sum()), piece
        assert scores.log_probs[row, 0] == pytest.approx(total, rel=1e-5, abs=1e-5)


def test_blanks_that_would_decide_who_is_believed_are_told(caplog: pytest.LogCaptureFixture) -> None:
    prompts, plain = ["a", "b", "c", "d"], ["ab", "ba", "ca", "da"]
    marked = [f" {text}" for text in plain]
    told = r"Answers of ['x'] begin with a blank, those of ['y'] do not: the student finds one of them likelier"
    for x, y, is_told in ((marked, plain, True), (marked, marked, False), (plain, [" ab", *plain[1:]], False)):
        caplog.clear()
        score_answers(make_model(), AnswerPool.from_answers({"x": x, "y": y}, prompts), tokenizer=make_tokenizer())
        assert any(text.startswith(told) for text in caplog.messages) is is_told


def test_answers_beyond_the_context(caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer, pool = make_model(), make_tokenizer(), make_pool(5, levels=(0,))
    pool = changed(pool, {"t0": [*pool.texts("t0")[:3], "ab" * 40, pool.texts("t0")[4]]})

    with pytest.raises(
        ValueError, match=r"into the 64 tokens .* got \d+ of 't0' for id 3 \(1 such among 5 .*`too_long`"
    ):
        score_answers(model, pool, tokenizer=tokenizer)
    skipped = score_answers(model, pool, tokenizer=tokenizer, too_long="skip")
    cut = score_answers(model, pool, tokenizer=tokenizer, too_long="cut")

    assert np.isnan(skipped.log_probs[3, 0]) and not np.isnan(np.delete(skipped.log_probs, 3)).any()
    prompt_length = len(pool.prompts()[3]) + 1
    assert cut.num_tokens[3, 0] == 64 - prompt_length and cut.log_probs[3, 0] < 0
    assert [record.getMessage()[:40] for record in caplog.records] == ["1 of 5 answers of 't0' too long for the "] * 2


# ── students ────────────────────────────────────────────────────────────────────────────────────────────────────────


def run(folder: Path, **options: Any) -> Any:
    args = make_args(folder, **options.pop("args", {}))
    model, tokenizer = options.pop("model", None) or make_model(), make_tokenizer()
    return co_supervise_answers(model, options.pop("pool", None) or make_pool(), args, tokenizer=tokenizer, **options)


def weights(result: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in result.model.state_dict().items()}


def same_weights(first: Any, second: Any) -> bool:
    first, second = weights(first), weights(second)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_each_level_learns_what_the_student_before_chose(tmp_path: Path) -> None:
    pool, seen = make_pool(), []

    def make_trainer(model: Any, dataset: Dataset, args: TrainingArguments) -> Trainer:
        """What a plain trainer learns of texts, as any other trainer would."""
        seen.append((copy.deepcopy(model), dataset))
        tokenizer = make_tokenizer()
        data = dataset.map(
            lambda row: {
                "input_ids": tokenizer(row["prompt"])["input_ids"]
                + tokenizer(row["completion"])["input_ids"][1:]
                + [2],
                "labels": [-100] * (len(row["prompt"]) + 1) + tokenizer(row["completion"])["input_ids"][1:] + [2],
            }
        ).select_columns(["input_ids", "labels"])
        from transformers import DataCollatorForSeq2Seq

        return Trainer(model, args, train_dataset=data, data_collator=DataCollatorForSeq2Seq(tokenizer))

    result = run(tmp_path / "own", pool=pool, make_trainer=make_trainer)
    plain = run(tmp_path / "plain", pool=pool)

    # The plain trainer learns the same tokens, so that both students are the same.
    assert same_weights(result, plain)
    assert all(torch.equal(a, b) for model, _ in seen for a, b in zip(model.parameters(), make_model().parameters()))
    assert result.assigned[0].tolist() == [0] * 24
    assert set(result.assigned[1].tolist()) == {1, 2} and all(kept.all() for kept in result.kept)
    # Level 1 was chosen by the student of level 0, by the sum of what it and the teachers think, and by prompts.
    first = run(tmp_path / "first", pool=root_of(pool))
    scores = score_answers(first.model, pool, tokenizer=make_tokenizer())
    own = np.stack([pool.log_probs(name) / np.maximum(pool.num_tokens(name), 1) for name in ("t1", "t2")], axis=1)
    total = np.where(np.isnan(scores.log_probs[:, 1:]), -np.inf, scores.per_token[:, 1:] + own)
    summed = run(tmp_path / "summed", pool=pool, rule="log_likelihood+confidence")
    assert summed.assigned[1].tolist() == (1 + total.argmax(axis=1)).tolist()
    said = zip(pool.texts("t1"), pool.texts("t2"), strict=True)
    known = {"student": scores.per_token[:, 1:], "teacher": own, "groups": group_answers([list(row) for row in said])}
    known["prompts"] = slow_represent(first.model, pool.prompts())
    tensors = {name: torch.from_numpy(values) for name, values in known.items()}
    routed = choose_teacher("router", tensors, ~tensors["student"].isnan())
    assert result.assigned[1].tolist() == (1 + routed).tolist()
    texts = [pool.texts(pool.hierarchy.names[at])[row] for row, at in enumerate(result.assigned[1])]
    assert seen[1][1]["completion"] == texts
    record = result.history.records[1]
    assert record["rule"] == "router" and record["consistency/keep_rate"] == 1.0
    assert record["assignment/t1"] == pytest.approx(np.mean(result.assigned[1] == 1))


@pytest.mark.parametrize("training", ["full", "lora"])
def test_an_ordinary_model_is_left(tmp_path: Path, training: str) -> None:
    result = run(tmp_path / "out", student_training=training, args={"num_train_epochs": 3})
    result.save_model()

    writer = pipeline("text-generation", str(tmp_path / "out"))
    said = writer("ab", return_full_text=False, max_new_tokens=4, do_sample=False)[0]["generated_text"]
    tokens = result.model.generate(torch.tensor([[1, 4, 5]]), max_new_tokens=4, do_sample=False)[0, 3:]
    assert said == result.tokenizer.decode(tokens, skip_special_tokens=True)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "A language model, trained by" in card and "pipeline_tag: text-generation" in card
    assert "and trains the student on their answers." in card and "rejects" not in card
    assert "router" in card.split("## Levels")[1] and (training == "lora") == (tmp_path / "out" / "adapter").is_dir()
    assert str(tmp_path) not in card and "| `learning_rate` | `0.01` |" in card
    table = card.split("## Training arguments")[1].split("\n## ")[0]
    rows = {line.split("`")[1] for line in table.splitlines() if line.startswith("| `")}
    given = {"learning_rate", "seed", "save_strategy", "per_device_train_batch_size", "per_device_eval_batch_size"}
    lora = {"student_training"} if training == "lora" else set()
    assert rows - {"disable_tqdm"} == given | lora  # what somebody has set, and nothing else
    assert repr(result) == f"CoSupervisedWriter({type(result.model).__name__}, 2 levels, in '{tmp_path / 'out'}')"


def test_a_sequence_to_sequence_student(tmp_path: Path) -> None:
    result = run(tmp_path / "out", model=make_model("t5"), student_training="lora", rule="same_answer")
    result.save_model()
    assert T5ForConditionalGeneration.from_pretrained(tmp_path / "out").config.d_model == 16
    assert "A language model, trained by" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("rejection", ["loss_rank", "same_answer"])
def test_rejection_keeps_as_many_as_agree(tmp_path: Path, rejection: str, caplog: pytest.LogCaptureFixture) -> None:
    pool, made = make_pool(), []

    def normalize(text: str) -> str:
        made.append(text)
        return text[:1]

    options = {"normalize": normalize, "max_new_tokens": 2, "args": {"num_train_epochs": 8}}
    result = run(tmp_path / "out", pool=pool, rejection=rejection, **options)

    kept, num_steps = result.kept[1], [record["num_steps"] for record in result.history.records]
    assert 0 < kept.sum() < len(pool) and result.kept[0].all()
    assert num_steps[0] == 48 and abs(num_steps[1] - 48) <= 8  # about as many of fewer examples
    assert any("of the student itself do not end within `max_new_tokens` 2, " in text for text in caplog.messages)
    if rejection == "loss_rank":
        student = run(tmp_path / "first", pool=root_of(pool), args={"num_train_epochs": 8}).model
        per_token = score_answers(student, pool, tokenizer=make_tokenizer()).per_token
        losses = -per_token[np.arange(len(pool)), result.assigned[1]]
        assert set(np.flatnonzero(kept)) == set(np.argsort(losses, kind="stable")[: kept.sum()])


class Killed(BaseException):
    """What a crash is to a test."""


def test_a_kill_at_any_point_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    often = {"args": {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 1}}
    whole = run(tmp_path / "whole", **often)
    folder, killed = tmp_path / "cut", 0
    for count in range(1, 60, 3):
        calls = 0
        own = os.replace

        def die(*args: Any, count: int = count, own: Callable = own, **kwargs: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == count:
                raise Killed
            own(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", die)
            try:
                result = run(folder, resume_from_checkpoint=killed > 0, **often)
                break
            except Killed:
                killed += 1
    assert killed > 2 and same_weights(result, whole)
    assert [at.tolist() for at in result.assigned] == [at.tolist() for at in whole.assigned]
    assert not list(folder.rglob("checkpoint-*"))
    strip = [
        {k: v for k, v in record.items() if k not in ("train_runtime", "train_loss")}
        for record in whole.history.records
    ]
    told = json.loads((folder / "_run" / "history.json").read_text())["levels"]
    assert [{k: v for k, v in record.items() if k not in ("train_runtime", "train_loss")} for record in told] == strip


def test_a_level_goes_on_from_its_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    often = {"args": {"save_strategy": "steps", "save_steps": 2}, "student_training": "lora"}
    whole, steps = run(tmp_path / "whole", **copy.deepcopy(often)), []

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        steps.append(state.global_step)
        if len(steps) == 11:  # the fifth step of level 1
            raise Killed

    monkeypatch.setattr(module._Checkpoints, "on_step_end", stop)
    with pytest.raises(Killed):
        run(tmp_path / "cut", **copy.deepcopy(often))
    result = run(tmp_path / "cut", resume_from_checkpoint=True, **copy.deepcopy(often))

    assert steps == [*range(1, 7), *range(1, 6), 5, 6] and same_weights(result, whole)


def test_trl_trains_every_level_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trl = pytest.importorskip("trl")
    tokenizer, pool, steps = make_tokenizer(), make_pool(), []

    def train(folder: Path, **options: Any) -> Any:
        args = make_args(folder, save_strategy="steps", save_steps=2)
        return co_supervise_answers(
            make_model(),
            pool,
            args,
            tokenizer=tokenizer,
            make_trainer=lambda model, dataset, args: trl.SFTTrainer(
                model, args=args, train_dataset=dataset, processing_class=tokenizer
            ),
            **options,
        )

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        steps.append(state.global_step)
        if len(steps) == 11:  # the fifth step of level 1
            raise Killed

    whole = train(tmp_path / "whole")
    monkeypatch.setattr(module._Checkpoints, "on_step_end", stop)
    with pytest.raises(Killed):
        train(tmp_path / "cut")
    result = train(tmp_path / "cut", resume_from_checkpoint=True)

    assert steps == [*range(1, 7), *range(1, 6), 5, 6] and same_weights(result, whole)
    # It learns the answers alone, with their end, as the plain trainer does.
    plain = run(tmp_path / "plain", pool=pool)
    assert [at.tolist() for at in result.assigned] == [at.tolist() for at in plain.assigned]
    for name, value in weights(result).items():
        torch.testing.assert_close(value, weights(plain)[name], rtol=1e-3, atol=1e-4)


def test_every_level_is_trained_in_half_precision_and_asked_without(tmp_path: Path) -> None:
    model, seen = make_model(), []
    model.model.layers[0].mlp.down_proj.register_forward_hook(
        lambda layer, inputs, output: seen.append((layer.training, output.dtype))
    )
    run(tmp_path, model=model, args={"bf16": True})
    assert set(seen) == {(True, torch.bfloat16), (False, torch.float32)}
    assert seen.count((True, torch.bfloat16)) == 12  # six steps of either level


@pytest.mark.parametrize(
    ("make_trainer", "message"),
    [
        (Trainer, r"`make_trainer` must be a function of a model, a data set and arguments, got <class "),
        (lambda model, dataset, args: None, r"must give a `transformers\.Trainer`, got NoneType\. Return it"),
        (lambda model, dataset, args: Trainer(torch.nn.Linear(2, 2), args), r"the student as it is, got .*lm_head"),
    ],
)
def test_makers_of_trainers_that_give_none(tmp_path: Path, make_trainer: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        run(tmp_path, make_trainer=make_trainer)


def test_of_several_roots_the_student_as_it_came_chooses(tmp_path: Path) -> None:
    pool = make_pool(levels=(0, 0, 0))
    result = run(tmp_path, pool=pool, rule="log_likelihood", rejection="loss_rank")
    scores = score_answers(make_model(), pool, tokenizer=make_tokenizer()).per_token
    assert result.assigned[0].tolist() == np.where(np.isnan(scores), -np.inf, scores).argmax(axis=1).tolist()
    assert len(result.assigned) == 1 and result.kept[0].all()  # nothing is rejected at the root


def test_a_student_on_the_hub(tmp_path: Path, hub: Any) -> None:
    result = run(tmp_path / "out")
    commit = result.push_to_hub("someone/lemmas")

    again = co_supervise_answers("someone/lemmas", make_pool(), make_args(tmp_path / "again"))
    assert commit is not None and again.history.run["student"]["commit"] == commit.oid
    assert LlamaForCausalLM.from_pretrained("someone/lemmas").config.hidden_size == 16
    card = (tmp_path / "out" / "README.md").read_text()
    assert "someone/lemmas" in card


def test_normalizers_windows_and_the_students_own_answers_reach_their_teachers(tmp_path: Path) -> None:
    pool, tokenizer, names = make_pool(40, levels=(0, 1, 1)), make_tokenizer(), ["t1", "t2"]
    first = run(tmp_path / "first", pool=root_of(pool)).model
    answered = torch.from_numpy(np.stack([pool.answered(name) for name in names], axis=1))
    whole = score_answers(first, pool, tokenizer=tokenizer, teachers=names).per_token
    windowed = score_answers(first, pool, tokenizer=tokenizer, teachers=names, window=2).per_token
    said = [list(row) for row in zip(*(pool.texts(name) for name in names), strict=True)]
    own = module.AnswerReader(module.Writer(first, tokenizer), pool, "raise", 4, Processes(0, 1), True).own_answers(3)
    known = {
        "student": whole,
        "local": windowed,
        "teacher": pool.confidences[:, 1:],
        "groups": group_answers(said, lambda text: text[:1]),
        "prompts": slow_represent(first, pool.prompts()),
        "same": np.array(
            [[text is not None and text[:1] == mine[:1] for text in row] for row, mine in zip(said, own)]
        ),
    }
    tensors = {name: torch.from_numpy(values) for name, values in known.items()}
    for rule in ("local", "router", "same_answer"):
        options = {"rule": rule, "window": 2, "max_new_tokens": 3, "normalize": lambda text: text[:1]}
        found = run(tmp_path / rule, pool=pool, **options).assigned[1]
        expected = choose_teacher(rule, tensors, answered).numpy()
        assert found[expected >= 0].tolist() == (1 + expected[expected >= 0]).tolist()
    assert len({tuple(choose_teacher(rule, tensors, answered).tolist()) for rule in ("local", "log_likelihood")}) == 2


def test_prompts_that_are_too_long_are_not_represented() -> None:
    pool = AnswerPool.from_answers({"a": ["a", "b", "c"]}, ["ab", "a" * 80, "b"])
    reader = module.AnswerReader(module.Writer(make_model(), make_tokenizer()), pool, "skip", 4, Processes(0, 1), True)
    assert reader.represent().any(axis=1).tolist() == [True, False, True]


def _in_two(folder: str) -> None:
    routed = run(Path(f"{folder}/routed"))
    rank = routed._processes.rank
    np.save(f"{folder}/routed-{rank}.npy", np.stack(routed.assigned))
    writer = module.Writer(make_model(), make_tokenizer())
    reader = module.AnswerReader(writer, make_pool(), "raise", 4, routed._processes, True)
    np.save(f"{folder}/read-{rank}.npy", reader.represent())
    result = run(Path(folder), args={"per_device_train_batch_size": 2}, rule="same_answer")
    result.save_model(f"{folder}/model")
    np.save(f"{folder}/assigned-{result._processes.rank}.npy", np.stack(result.assigned))


@pytest.mark.slow
def test_two_processes_choose_the_same(tmp_path: Path) -> None:
    alone = run(tmp_path / "alone", rule="same_answer")
    debug_launcher(_in_two, (str(tmp_path / "two"),), num_processes=2)
    # The root's student is trained on other batches there; what it chooses is the same in both.
    routed = [np.load(tmp_path / "two" / f"routed-{rank}.npy") for rank in (0, 1)]
    assert np.array_equal(*routed)
    for rank in (0, 1):  # each has read its share, and knows all
        read = np.load(tmp_path / "two" / f"read-{rank}.npy")
        np.testing.assert_allclose(read, slow_represent(make_model(), make_pool().prompts()), rtol=1e-5, atol=1e-5)
    for rank in (0, 1):
        assert np.array_equal(np.load(tmp_path / "two" / f"assigned-{rank}.npy"), np.stack(alone.assigned))


# ── bad input ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "likely"}, r"`rule` must be one of .*, got 'likely'\. Choose one of them\."),
        ({"rejection": "topk"}, r"`rejection` must be one of .*, got 'topk'\."),
        ({"too_long": "drop"}, r"`too_long` must be one of .*, got 'drop'\."),
        ({"student_training": "probe"}, r"`student_training` must be one of .*, got 'probe'\."),
        ({"max_new_tokens": 0}, r"`max_new_tokens` must be an integer of at least 1, got 0\."),
        ({"window": True}, r"`window` must be an integer of at least 1, got True\."),
        ({"rule": ["router"]}, r"`rule` must be one of .*, got \['router'\]\."),
        ({"normalize": "upper"}, r"`normalize` must be one of .*, got 'upper'\."),
        ({"peft_config": LoraConfig()}, r"`peft_config` is for `student_training='lora'`, got 'full'\. Give both"),
        ({"args": {"eval_strategy": "epoch"}}, r"`eval_strategy` must be 'no', got 'epoch': there are no data"),
        ({"args": {"push_to_hub": True}}, r"`push_to_hub` must be False, got True: no level is published\. Call"),
    ],
)
def test_options_that_do_not_exist(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **options)


def test_a_student_that_cannot_read_or_write(tmp_path: Path) -> None:
    pool, args = make_pool(4), make_args(tmp_path)
    with pytest.raises(ValueError, match=r"must have a chat template that takes messages such as .*, got: Cannot use"):
        co_supervise_answers(make_model(), make_pool(4, chat=True), args, tokenizer=make_tokenizer())
    with pytest.raises(ValueError, match=r"must have a token that ends an answer, got a tokenizer without"):
        co_supervise_answers(make_model(), pool, args, tokenizer=make_tokenizer(eos_token=None))
    with pytest.raises(TypeError, match=r"`student` must be a language model, .* got Linear\. Load one by"):
        co_supervise_answers(torch.nn.Linear(2, 2), pool, args, tokenizer=make_tokenizer())
    with pytest.raises(ValueError, match=r"`tokenizer` is needed beside a model object"):
        score_answers(make_model(), pool)
    for wrong in ({}, CoSupervisedConfig(str(tmp_path))):
        with pytest.raises(TypeError, match=r"`args` must be `TrainingArguments`, or .*, got (dict|CoSup.*)\. Make"):
            co_supervise_answers(make_model(), pool, wrong, tokenizer=make_tokenizer())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`tokenizer` must be a `PreTrainedTokenizerBase`, got str\. Make"):
        score_answers(make_model(), pool, tokenizer="folder")
    for window, model in ((0, make_model()), (2, make_model("t5"))):
        with pytest.raises(ValueError, match=r"`window` must be a number of tokens of at least 1, for a causal"):
            score_answers(model, pool, tokenizer=make_tokenizer(), window=window)


def test_rules_that_cannot_work_are_told_before_any_level_is_trained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`rule` 'local' needs a causal student, .*, got T5ForConditionalGeneration"):
        run(tmp_path / "t5", model=make_model("t5"), rule="local")
    for normalize, message in (
        (lambda text: [text], r"must make a text or None of an answer, got \['"),
        (len, r"got \d"),
    ):
        with pytest.raises(TypeError, match=message):
            run(tmp_path / "out", normalize=normalize, resume_from_checkpoint=True)
        assert not list((tmp_path / "out").rglob("level-*"))
    with pytest.raises(TypeError, match="`peft_config` must be a `PeftConfig`, got dict"):
        run(tmp_path / "lora", student_training="lora", peft_config={"r": 4})
    with pytest.raises(ValueError, match="The student must be a whole model, got BartForCausalLM, the decoder of one"):
        sizes = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
        run(tmp_path / "bart", model=BartForCausalLM(BartConfig(vocab_size=21, max_position_embeddings=64, **sizes)))


def test_a_rule_of_ones_own_reads_windows_beside_all_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool()
    monkeypatch.setitem(RULES, "both", lambda local, student, teacher: -local)
    monkeypatch.setitem(RULES, "alone", lambda teacher: -teacher)
    windowed, both = (run(tmp_path / rule, pool=pool, rule=rule, window=2) for rule in ("local", "both"))
    assert windowed.assigned[1].tolist() == both.assigned[1].tolist()
    alone = run(tmp_path / "alone", pool=pool, rule="alone").assigned[1]
    surest = np.where(np.isnan(pool.confidences), -np.inf, pool.confidences)[:, 1:].argmax(axis=1) + 1
    assert alone.tolist() == surest.tolist()


def test_what_a_level_cannot_read_is_said_before_any_is_trained(tmp_path: Path) -> None:
    pool = make_pool()
    pool = changed(pool, {"t2": ["ab" * 40, *pool.texts("t2")[1:]]})
    with pytest.raises(ValueError, match=r"got \d+ of 't2' for id 0 \(1 such among 24 answers\)"):
        run(tmp_path, pool=pool)
    assert not list(tmp_path.rglob("level-*"))


def test_a_student_that_cannot_score_is_told_so() -> None:
    model = make_model()
    model.lm_head.weight.data[3] = np.nan
    with pytest.raises(FloatingPointError, match="How likely the student finds an answer must be a number, got NaN"):
        score_answers(model, make_pool(), tokenizer=make_tokenizer())
    sizes = {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32, "vocab_size": 21}
    recurrent = XLNetLMHeadModel(XLNetConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    with pytest.raises(ValueError, match="must keep keys and values that .*, got XLNetLMHeadModel with NoneType"):
        score_answers(recurrent, make_pool(), tokenizer=make_tokenizer())


def test_a_student_of_nan_is_no_finished_level(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"got NaN or infinity by the end of level 0\. Lower `learning_rate`"):
        run(tmp_path, args={"learning_rate": 1e37})
    assert not list(tmp_path.rglob("stage.json"))


def test_a_pool_of_the_other_kind(tmp_path: Path, tiny_vit: str) -> None:
    from hf_cosupervise import CoSupervisedTrainer

    with pytest.raises(TypeError, match=r"`score_answers` needs an `AnswerPool` .*, got list\."):
        score_answers(make_model(), [], tokenizer=make_tokenizer())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got AnswerPool, whose .*`co_supervise_answers`"):
        CoSupervisedTrainer(tiny_vit, CoSupervisedConfig(str(tmp_path)), pool=make_pool(4))  # type: ignore[arg-type]


def test_empty_prompts_are_left_out_and_padding_is_set(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pool = make_pool(8)
    pool = changed(pool, prompts=[" " if row in (2, 5) else prompt for row, prompt in enumerate(pool.prompts())])

    tokenizer = make_tokenizer(pad_token=None)
    result = co_supervise_answers(make_model(), pool, make_args(tmp_path), tokenizer=tokenizer)

    assert all(np.flatnonzero(at < 0).tolist() == [2, 5] for at in result.assigned)
    assert not result.kept[1][[2, 5]].any() and tokenizer.pad_token == "</s>"
    assert "2 of 8 prompts without a word: left out." in [record.getMessage() for record in caplog.records]


def test_what_a_teacher_thinks_of_itself_may_be_unknown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pool = changed(make_pool(), unknown=["t1"])

    routed = run(tmp_path / "both", pool=pool, rule="log_likelihood+confidence")
    plain = run(tmp_path / "plain", pool=make_pool(), rule="log_likelihood")

    answered = [text is not None for text in pool.texts("t1")]
    assert routed.assigned[1][answered].tolist() == plain.assigned[1][answered].tolist()
    said = [record.getMessage() for record in caplog.records]
    assert any(
        text.startswith(f"{sum(answered)} of 24 prompts have an answer of which it is not known") for text in said
    )


def test_another_run_is_not_gone_on_with(tmp_path: Path) -> None:
    run(tmp_path / "out")
    with pytest.raises(FileExistsError, match=r"`output_dir` must not hold another run, got one in .*`resume_from_"):
        run(tmp_path / "out")
    with pytest.raises(ValueError, match=r"got other settings \(rule: 'router' -> 'local'\)"):
        run(tmp_path / "out", rule="local", resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"got other settings \(pool: "):
        run(tmp_path / "out", pool=make_pool(seed=1), resume_from_checkpoint=True)
    again = run(tmp_path / "out", resume_from_checkpoint=True)
    assert len(again.assigned) == 2


def test_a_student_from_a_folder_that_is_a_teacher_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "lm"
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    pool = make_pool()
    teachers = [Teacher(str(folder), name="t0"), *pool.hierarchy.teachers[1:]]
    pool = pool.with_hierarchy(TeacherHierarchy(teachers=teachers))

    result = co_supervise_answers(str(folder), pool, make_args(tmp_path / "out"))

    assert same_weights(result, run(tmp_path / "other", pool=pool))
    told = "The student is the teacher 't0' too, whose answers it will find likely."
    assert told in caplog.messages
    # Spelt otherwise, or loaded from there.
    (tmp_path / "link").symlink_to(folder)
    for number, same in enumerate([f"{folder}/", tmp_path / "link", LlamaForCausalLM.from_pretrained(folder)]):
        caplog.clear()
        args = make_args(tmp_path / f"again-{number}", max_steps=1)
        co_supervise_answers(same, pool, args, tokenizer=make_tokenizer())
        assert told in caplog.messages
    caplog.clear()
    run(tmp_path / "another", pool=pool)
    assert told not in caplog.messages

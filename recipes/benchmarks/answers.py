"""Section `answers`: a student that scores what teachers wrote, against loops by hand."""

from __future__ import annotations

import copy
import inspect
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.kinds import WORDS, save_tokenizer
from benchmarks.task import Bench, Row, Target, column
from hf_cosupervise import Teacher, TeacherHierarchy, score_answers
from hf_cosupervise.pool.answers import AnswerPool
from hf_cosupervise.students.writing import Writer, batches_of

BATCH = 16
NUM_TEACHERS = 5


def make_student(bench: Bench) -> tuple[LlamaForCausalLM, Any]:
    """A Llama of random weights, 6 layers and 512 wide, and a tokenizer of whole words."""
    folder = bench.new_folder()
    num_words = save_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=256)
    sizes = {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 1376}
    config = LlamaConfig(vocab_size=num_words, max_position_embeddings=256, eos_token_id=3, pad_token_id=0, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval().to(bench.device), tokenizer


def make_pool(num_prompts: int) -> AnswerPool:
    """Prompts of 36 to 60 words, and answers of 12 to 20 words, each another one."""
    rng = np.random.default_rng(0)

    def texts(least: int, most: int) -> list[str]:
        return [" ".join(rng.choice(WORDS, rng.integers(least, most + 1))) for _ in range(num_prompts)]

    teachers = [Teacher(f"teacher-{number}", kind="column") for number in range(NUM_TEACHERS)]
    answers = {teacher.name: texts(12, 20) for teacher in teachers}
    return AnswerPool.from_answers(answers, texts(36, 60), hierarchy=TeacherHierarchy(teachers=teachers))


def forward_plainly(writer: Writer, items: Sequence[Any]) -> None:
    """The model's forward alone, over the padded batches that `score_answers` reads."""
    # transformers renames it, and drops its old name in 5.40.
    name = "cache" if "cache" in inspect.signature(writer.model.forward).parameters else "past_key_values"
    with torch.inference_mode():
        for batch in batches_of(items, BATCH):
            inputs, _ = writer.make_batch(items, batch)
            mask = inputs["attention_mask"]
            read = writer.model(input_ids=inputs["input_ids"], attention_mask=mask, use_cache=True, logits_to_keep=1)
            for part in torch.arange(len(inputs["tokens"]), device=mask.device).split(BATCH):
                cache, owners = copy.deepcopy(getattr(read, name)), inputs["owners"][part]
                cache.batch_select_indices(owners)
                width = int(inputs["tokens_mask"][part].sum(dim=1).max()) - 1
                both = torch.cat([mask[owners], inputs["tokens_mask"][part, :width]], dim=1)
                tokens = inputs["tokens"][part, :width]
                writer.model(input_ids=tokens, attention_mask=both, use_cache=True, **{name: cache})


def score_plainly(writer: Writer, pool: AnswerPool) -> np.ndarray:
    """The loop by hand: every prompt with every answer is a text of its own, sorted by length."""
    prompts, tokenizer, model = pool.prompts(), writer.tokenizer, writer.model
    pairs = [(row, name) for row in range(len(pool)) for name in range(NUM_TEACHERS)]
    texts = [pool.texts(name) for name in pool.hierarchy.names]
    before = [[2, *ids] for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]]
    after = [[*ids, 3] for some in texts for ids in tokenizer(some, add_special_tokens=False)["input_ids"]]
    rows = [(before[row], after[name * len(pool) + row]) for row, name in pairs]
    order = sorted(range(len(rows)), key=lambda place: sum(map(len, rows[place])))
    found = np.zeros(len(rows), dtype=np.float32)
    with torch.inference_mode():
        for start in range(0, len(order), BATCH):
            some = [rows[place] for place in order[start : start + BATCH]]
            width = max(len(prompt) + len(answer) for prompt, answer in some)
            ids = torch.tensor([[*p, *a] + [0] * (width - len(p) - len(a)) for p, a in some], device=model.device)
            ask = torch.tensor(
                [[0] * len(p) + [1] * len(a) + [0] * (width - len(p) - len(a)) for p, a in some], device=model.device
            )
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(dim=2)
            log_probs = logits.gather(2, ids[:, 1:, None]).squeeze(2) * ask[:, 1:]
            found[order[start : start + BATCH]] = log_probs.sum(dim=1).cpu().numpy()
    return found.reshape(len(pool), NUM_TEACHERS)


def measure_answers(bench: Bench) -> list[Row]:
    """Measure `score_answers` against the forward over the same batches, and against whole texts."""
    pool = make_pool(bench.scaled(48, least=16))
    writer = Writer(*make_student(bench))
    prompts, names = writer.encode(pool.prompts()), pool.hierarchy.names
    own = [writer.encode_answers(pool.prompts(), pool.texts(name)) for name in names]
    items = [(prompt, [some[row] for some in own]) for row, prompt in enumerate(prompts)]
    num_tokens = sum(len(prompt) + sum(map(len, following)) for prompt, following in items)
    contestants = {
        "ours": lambda: score_answers(writer.model, pool, tokenizer=writer.tokenizer, batch_size=BATCH).log_probs,
        "bare": lambda: forward_plainly(writer, items),
        "naive": lambda: score_plainly(writer, pool),
    }
    bench.race(contestants, 0)  # warms the kernels up
    seconds, results = [], dict[str, Any]()
    for repeat in range(bench.args.repeats):
        took, results = bench.race(contestants, repeat)
        seconds.append(took)
    ours, difference = column(seconds, "ours"), float(np.abs(results["ours"] - results["naive"]).max())
    numbers = {"largest_difference": difference, "ours_tokens_per_s": num_tokens / statistics.median(ours)}
    what = f"{len(pool)} prompts x {NUM_TEACHERS} teachers, a Llama of 6 layers"
    note = "prompts three times as long as answers; ours reads the pool and makes tokens too"
    rivals = [
        ("the forward alone over the same batches", "bare", 0.95),
        ("every answer with its prompt", "naive", 1.5),
    ]
    return [
        Row(f"{what}, {how}", ours, column(seconds, name), target=Target(low=low), note=note, numbers=numbers)
        for how, name, low in rivals
    ]

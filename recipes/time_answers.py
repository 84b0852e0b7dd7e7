"""Time how long a language model takes to answer 200 prompts, offline.

    python recipes/time_answers.py --model data/smollm2

Without `--model`, SmolLM2-135M-Instruct is fetched and converted once by `prepare.py`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import prepare
from datasets import Dataset
from train import run_or_tell

from hf_cosupervise import AnswerPool, Teacher, TeacherHierarchy, build_answers
from hf_cosupervise.method.answers import normalize_number


def make_prompts(count: int, seed: int = 0) -> Dataset:
    """Make word problems of one step, with their true answers."""
    rng = np.random.default_rng(seed)
    first, second = rng.integers(2, 50, (2, count))
    prompts = [
        f"Tom has {a} apples and buys {b} more. How many apples has he? Answer in a number."
        for a, b in zip(first, second)
    ]
    return Dataset.from_dict(
        {"id": list(range(count)), "prompt": prompts, "truth": [str(a + b) for a, b in zip(first, second)]}
    )


def time_answers(model: str | Path, count: int = 200, max_new_tokens: int = 32, batch_size: int = 16) -> AnswerPool:
    """Ask a model about that many prompts, and print how long it took and how much of it was right."""
    teacher = Teacher(model, name="smollm2", options={"chat": True, "max_new_tokens": max_new_tokens})
    prompts = make_prompts(count)
    started = time.perf_counter()
    pool = build_answers(
        prompts, TeacherHierarchy(teachers=[teacher]), oracle_column="truth", batch_size=batch_size, device="cpu"
    )
    seconds, tokens = time.perf_counter() - started, int(pool.num_tokens("smollm2").sum())
    said = [normalize_number(text or "") for text in pool.texts("smollm2")]
    right = np.mean([own == true for own, true in zip(said, pool.column("oracle_answer"))])
    print(
        f"{count} prompts, {tokens} tokens in {seconds:.1f} s with loading: {count / seconds:.2f} prompts and "
        f"{tokens / seconds:.1f} tokens per second; {100 * right:.1f} % of the answers end with the true number."
    )
    return pool


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id of a chat model")
    parser.add_argument("--num-prompts", type=int, default=200)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    options = parser.parse_args()
    run_or_tell(
        lambda: time_answers(
            options.model or prepare.smollm2(Path("data") / "smollm2"),
            options.num_prompts,
            options.max_new_tokens,
            options.batch_size,
        )
    )

"""Word problems: three models' answers, routed by what a stronger model says, which was asked elsewhere.

    git clone --depth 1 https://github.com/GAIR-NLP/weak-to-strong-reasoning
    python recipes/word_problems.py --folder weak-to-strong-reasoning

The answers to 7,000 problems, and those that Llama-2-70B gave itself, were published with Weak-to-Strong Reasoning
(arXiv 2407.13647). It was asked three times, each time with examples by one of the models, and what it said was kept
only where it agreed with that model. Nothing is trained, and the truth is read by the last lines alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from hf_cosupervise import AnswerPool
from hf_cosupervise.method.answers import normalize_number

MODELS = ("gemma_2b", "llama2_7b", "mistral_7b")


def read(folder: Path, name: str) -> list[tuple[str, str]]:
    """Prompts and answers of a file."""
    path = folder / "data" / "llama_factory" / "gsm8k" / f"train_gsm8k_{name}.json"
    if not path.is_file():
        raise FileNotFoundError(f"`--folder` must be a clone of that repository, got no '{path}'. Clone it.")
    return [(row["content"], row["output"]) for row in json.loads(path.read_text(encoding="utf-8"))]


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the answers, route them, and print what is right."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    folder = parser.parse_args(arguments).folder
    given = {model: read(folder, f"{model}_full_weak") for model in MODELS}
    prompts = [prompt for prompt, _ in given[MODELS[0]]]
    # Of each problem up to three, for it was asked once with examples by each model.
    student: dict[str, list[str]] = {}
    for prompt, answer in [pair for model in MODELS for pair in read(folder, f"{model}_iter1_icl")]:
        student.setdefault(prompt, []).append(answer)
    own = [student.get(prompt, []) for prompt in prompts]
    pool = AnswerPool.from_answers({model: [said for _, said in rows] for model, rows in given.items()}, prompts)
    speakers = {"majority": pool.assign("majority", "number")}
    speakers["same_answer"] = pool.assign("same_answer", "number", student=own)
    # Only now, when everybody has spoken, the truth is read.
    with (folder / "data" / "test" / "gsm8k_train_2.jsonl").open(encoding="utf-8") as lines:
        truth = [normalize_number(json.loads(line)["answer"]) for line in lines]
    right = [[normalize_number(text or "") == gold for text in row] for row, gold in zip(pool.answer_rows(), truth)]
    table = {model: [row[place] for row in right] for place, model in enumerate(MODELS)}
    table |= {name: [row[place] for row, place in zip(right, chosen)] for name, chosen in speakers.items()}
    # Whoever is right, if anybody is: what no choice among these answers can be better than.
    table["oracle"] = [any(row) for row in right]
    print(f"{len(prompts)} problems, {sum(map(bool, own))} of them with an answer of the student")
    for name, flags in table.items():
        print(f"{name:12} {100 * sum(flags) / len(flags):.1f} %")


if __name__ == "__main__":
    main()

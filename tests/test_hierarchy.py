"""Teachers and their hierarchy: order, masks, files, and every way of not fitting together."""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
import json
import os
import pickle

import pytest
import torch
import yaml

from hf_cosupervise.hierarchy import Teacher, TeacherHierarchy

LABELS = ("cat", "dog", "eel")


def make_hierarchy() -> TeacherHierarchy:
    return TeacherHierarchy(
        LABELS,
        [
            Teacher("org/sea", level=1, scope=("eel",)),
            Teacher("org/all", revision="v1"),
            Teacher("org/pets", level=1, scope=("cat", "dog"), label_map={"tabby": "cat", "husky": "dog"}),
            Teacher("old_label", level=2, kind="column", name="people", domains=("night",)),
            Teacher("models/tree", level=2, name="tree", kind="sklearn", trusted_types=("my.Type",)),
        ],
    )


# ── one teacher ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("model", "expected"),
    [("org/resnet-18", "resnet-18"), ("resnet", "resnet"), ("a/b/c.v1", "c.v1"), ("folder/model/", "model")],
)
def test_name_is_the_last_part_of_the_model(model, expected):
    assert Teacher(model).name == expected


def test_what_type_checkers_are_told_is_what_a_teacher_takes():
    [told] = [
        node
        for node in ast.walk(ast.parse(inspect.getsource(Teacher)))
        if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    ]
    taken = {
        name: parameter.default for name, parameter in inspect.signature(Teacher).parameters.items() if name != "model"
    }
    defaults = [ast.literal_eval(default) for default in told.args.defaults]
    assert dict(zip([argument.arg for argument in told.args.args][2:], defaults, strict=True)) == taken


def test_a_subfolder_names_the_teacher_and_travels():
    teacher = Teacher("org/many", subfolder="level-1/cats")
    assert teacher.name == "cats" and teacher.to_dict()["subfolder"] == "level-1/cats"
    assert pickle.loads(pickle.dumps(teacher)) == teacher and Teacher("org/one").to_dict().keys().isdisjoint(
        {"subfolder"}
    )


@pytest.mark.parametrize(
    "subfolder", ["", "/low", "low/", "../low", "a/../low", "./low", "a//low", "~/low", "a\\low", "C:low", 3]
)
def test_a_subfolder_leads_nowhere_else(subfolder):
    with pytest.raises(ValueError, match="`subfolder` of teacher 't' must be a folder below `model`"):
        Teacher("org/many", name="t", subfolder=subfolder)


def test_defaults():
    teacher = Teacher("org/t")
    facts = {field.name: getattr(teacher, field.name) for field in dataclasses.fields(teacher)}
    assert facts == {
        "model": "org/t",
        "level": 0,
        "name": "t",
        "kind": "auto",
        "revision": None,
        "scope": None,
        "domains": None,
        "label_map": None,
        "trusted_types": (),
        "subfolder": None,
        "max_outside_mass": None,
        "label_texts": None,
        "options": None,
        "function": None,
    }


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Teacher)])
def test_teachers_are_frozen(field):
    teacher = Teacher("org/t", scope=["cat"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(teacher, field, "other")


def test_what_was_passed_in_may_change_afterwards():
    scope, label_map = ["cat"], {"tabby": "cat"}
    teacher = Teacher("org/t", scope=scope, label_map=label_map)
    scope.append("dog")
    label_map["husky"] = "dog"
    assert teacher.scope == ("cat",) and dict(teacher.label_map) == {"tabby": "cat"}
    with pytest.raises(TypeError):
        teacher.label_map["husky"] = "dog"


@pytest.mark.parametrize("name", ["", "a", "A1", "0", "a.b-c_d"])
def test_good_names(name):
    assert Teacher("org/t", name=name).name == (name or "t")


@pytest.mark.parametrize("name", ["-a", ".a", "_a", "a b", "a/b", "ä", "a\n"])
def test_bad_names(name):
    with pytest.raises(ValueError, match="`name`.*got"):
        Teacher("org/t", name=name)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": ""}, ValueError, "`model`.*got ''"),
        ({"kind": "keras"}, ValueError, "`kind`.*'t'.*transformers.*column.*got 'keras'"),
        ({"level": -1}, ValueError, "`level`.*'t'.*got -1"),
        ({"level": 1.5}, ValueError, "`level`.*'t'.*got 1.5"),
        ({"scope": "cat"}, TypeError, "`scope`.*'t'.*list.*got.*'cat'"),
        ({"domains": "day"}, TypeError, "`domains`.*'t'.*list.*got.*'day'"),
        ({"scope": ()}, ValueError, "`scope`.*'t'.*empty"),
        ({"scope": ("cat", "cat")}, ValueError, "`scope`.*'t'.*twice.*cat"),
    ],
)
def test_bad_teachers(options, error, message):
    with pytest.raises(error, match=message):
        Teacher(**{"model": "org/t"} | options)


@pytest.mark.parametrize("teacher", make_hierarchy().teachers, ids=lambda teacher: teacher.name)
def test_teachers_can_be_copied_compared_and_hashed(teacher):
    for other in (copy.deepcopy(teacher), pickle.loads(pickle.dumps(teacher)), dataclasses.replace(teacher)):
        assert other == teacher and hash(other) == hash(teacher)
    assert dataclasses.replace(teacher, revision="other") != teacher


# ── a hierarchy ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_teachers_are_sorted_by_level_and_keep_their_order():
    hierarchy = make_hierarchy()
    assert hierarchy.names == ("all", "sea", "pets", "people", "tree")
    assert [teacher.name for teacher in hierarchy.teachers] == list(hierarchy.names)
    assert [[teacher.name for teacher in level] for level in hierarchy.levels] == [
        ["all"],
        ["sea", "pets"],
        ["people", "tree"],
    ]
    assert (hierarchy.num_levels, hierarchy.num_labels, hierarchy.labels) == (3, 3, LABELS)
    assert [list(hierarchy.level_indices(level)) for level in range(3)] == [[0], [1, 2], [3, 4]]
    assert [hierarchy.index(name) for name in hierarchy.names] == [0, 1, 2, 3, 4]


def test_scope_mask():
    hierarchy = make_hierarchy()
    assert hierarchy.scope_mask(0).tolist() == [[True, True, True]]
    assert hierarchy.scope_mask(1).tolist() == [[False, False, True], [True, True, False]]
    assert hierarchy.scope_mask(2).dtype == torch.bool and hierarchy.scope_mask(2).all()


def test_scope_order_does_not_matter():
    mask = TeacherHierarchy(LABELS, [Teacher("t", scope=("eel", "cat"))]).scope_mask(0)
    assert mask.tolist() == [[True, False, True]]


def test_lists_are_taken_as_well_as_tuples():
    labels, teachers = list(LABELS), [Teacher("t")]
    hierarchy = TeacherHierarchy(labels, teachers)
    labels.append("fox")
    teachers.clear()
    assert hierarchy.labels == LABELS and len(hierarchy.teachers) == 1
    assert isinstance(hierarchy.teachers, tuple)


@pytest.mark.parametrize(
    ("labels", "teachers", "message"),
    [
        (LABELS, [], "at least one teacher.*got none"),
        (
            LABELS,
            [Teacher("a"), Teacher("b", level=2)],
            r"(?i)every level.*0 to 2.*none at level \[1\].*(add|renumber)",
        ),
        (LABELS, [Teacher("a", level=1)], r"(?i)every level.*none at level \[0\]"),
        (LABELS, [Teacher("x/a"), Teacher("y/a")], r"(?i)names must be unique.*\['a'\]"),
        (LABELS, [Teacher("x/a"), Teacher("b", level=1, name="a")], r"(?i)names must be unique.*\['a'\]"),
        (("cat", "dog", "cat"), [Teacher("a")], r"(?i)labels must be unique.*\['cat'\]"),
        (("cat",), [Teacher("a")], r"at least two labels.*got \['cat'\]"),
        (LABELS, [Teacher("a", scope=("cat", "fox"))], r"`scope`.*'a'.*unknown \['fox'\].*cat.*dog.*eel"),
        (LABELS, [Teacher("a", label_map={"x": "fox", "y": "cat"})], r"`label_map`.*'a'.*unknown \['fox'\].*cat.*dog"),
    ],
)
def test_teachers_that_do_not_fit_together(labels, teachers, message):
    with pytest.raises(ValueError, match=message):
        TeacherHierarchy(labels, teachers)


@pytest.mark.parametrize("level", [-1, 3])
def test_level_that_does_not_exist(level):
    with pytest.raises(IndexError, match=rf"`level`.*0\.\.2.*got {level}"):
        make_hierarchy().level_indices(level)


def test_name_that_does_not_exist():
    with pytest.raises(KeyError, match="'nobody'.*pets"):
        make_hierarchy().index("nobody")


# ── to a file and back ──────────────────────────────────────────────────────────────────────────────────────────────


def test_dict_round_trip_through_json_text():
    hierarchy = make_hierarchy()
    facts = json.loads(json.dumps(hierarchy.to_dict()))
    assert TeacherHierarchy.from_dict(facts) == hierarchy
    assert TeacherHierarchy.from_dict(facts).teachers == hierarchy.teachers


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml"])
def test_file_round_trip(suffix, tmp_path):
    hierarchy, path = make_hierarchy(), tmp_path / f"teachers{suffix}"
    hierarchy.save(path)
    assert TeacherHierarchy.load(path) == hierarchy
    assert TeacherHierarchy.load(str(path)).teachers == hierarchy.teachers
    assert os.listdir(tmp_path) == [path.name]  # nothing half written beside it


@pytest.mark.parametrize("change", [{"level": 1, "name": "extra"}, {"name": "other"}])
def test_hierarchies_differ(change):
    hierarchy = make_hierarchy()
    assert hierarchy != TeacherHierarchy(LABELS, [*hierarchy.teachers, Teacher("org/x", **change)])
    assert hierarchy != "hierarchy"


def test_yaml_written_by_hand(tmp_path):
    path = tmp_path / "teachers.yaml"
    path.write_text(
        "labels: [cat, dog, eel]\n"
        "teachers:\n"
        "- model: org/all\n"
        "- {model: org/pets, level: 1, scope: [cat, dog], label_map: {tabby: cat}}\n"
    )
    hierarchy = TeacherHierarchy.load(path)
    assert hierarchy.names == ("all", "pets")
    assert hierarchy.teachers[1].scope == ("cat", "dog") and hierarchy.teachers[1].label_map == {"tabby": "cat"}


def test_relative_folders_are_resolved_against_the_file(tmp_path, monkeypatch):
    home = tmp_path / "home"
    (home / "models" / "tree").mkdir(parents=True)
    (home / "old_label").mkdir()  # a column of that name is no folder
    hierarchy = make_hierarchy()
    hierarchy.save(home / "teachers.yaml")
    monkeypatch.chdir(tmp_path)
    for path in (home / "teachers.yaml", os.path.join("home", "teachers.yaml")):
        models = {teacher.name: teacher.model for teacher in TeacherHierarchy.load(path).teachers}
        assert os.path.isdir(models["tree"]) and os.path.samefile(models["tree"], home / "models" / "tree")
        assert (models["all"], models["people"]) == ("org/all", "old_label")  # Hub ids and columns stay


def test_absolute_folders_stay(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "files").mkdir()
    TeacherHierarchy(LABELS, [Teacher(str(tmp_path / "model"))]).save(tmp_path / "files" / "teachers.json")
    loaded = TeacherHierarchy.load(tmp_path / "files" / "teachers.json")
    assert loaded.teachers[0].model == str(tmp_path / "model") and loaded.names == ("model",)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json.*save"):
        TeacherHierarchy.load(tmp_path / "nowhere.json")


def test_another_suffix(tmp_path):
    with pytest.raises(ValueError, match=r"'\.json'.*'\.yaml'.*got 'teachers\.toml'"):
        make_hierarchy().save(tmp_path / "teachers.toml")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("name", "text"), [("t.json", "{not json"), ("t.yaml", "a: [1, 2")])
def test_an_unreadable_file(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name}.*not readable"):
        TeacherHierarchy.load(tmp_path / name)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ([], r"labels.*teachers.*got list"),
        ({"labels": ["a", "b"]}, r"labels.*teachers.*got \['labels'\]"),
        ({"labels": ["a", "b"], "teachers": [], "lables": []}, "got.*lables"),
        ({"labels": ["a", "b"], "teachers": [{"model": "t", "lvl": 1}]}, r"fields.*level.*unknown \['lvl'\]"),
        ({"labels": ["a", "b"], "teachers": [{"level": 0}]}, "needs `model`"),
        ({"labels": ["a", "b"], "teachers": ["t"]}, r"A teacher must be a mapping of .*, got 't'"),
        ({"labels": ["a", "b"], "teachers": [{"model": "t", "scope": ["c"]}]}, "`scope`.*'t'"),
    ],
)
@pytest.mark.parametrize("dump", [json.dumps, yaml.safe_dump])
def test_facts_that_are_no_hierarchy(facts, message, dump, tmp_path):
    path = tmp_path / ("t.json" if dump is json.dumps else "t.yaml")
    path.write_text(dump(facts))
    with pytest.raises(ValueError, match=message):
        TeacherHierarchy.load(path)
    with pytest.raises(ValueError, match=message):
        TeacherHierarchy.from_dict(facts)


def test_a_hierarchy_in_one_line():
    hierarchy = TeacherHierarchy(["a", "b"], [Teacher("t/x"), Teacher("t/y", level=1), Teacher("t/z", level=1)])
    assert repr(hierarchy) == "TeacherHierarchy(1-2 teachers, 2 labels)"

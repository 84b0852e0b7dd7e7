"""A committee at the public door: several students in one head, whatever happens on the way."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_trainer import LABELS, make_args, make_pool
from transformers import AutoModelForImageClassification, TrainerCallback

from hf_cosupervise import CoSupervisedConfig, CoSupervisedTrainer, Teacher, TeacherHierarchy, build_pool
from hf_cosupervise.evaluation.overview import Overview, format_overview, label_agreement, overview
from hf_cosupervise.method.committee import average_share
from hf_cosupervise.students import features as feature_store
from hf_cosupervise.training.members import DEFAULT_MEMBERS, MEMBERS

pytestmark = pytest.mark.core


@pytest.fixture
def train(tmp_path, tiny_vit, tiny_image_dataset):
    def make(name: str, resume: bool = False, callbacks: Any = (), pool: Any = None, **changes: Any):
        args = make_args(tmp_path / name, **changes)
        pool = make_pool(tiny_image_dataset) if pool is None else pool
        trainer = CoSupervisedTrainer(tiny_vit, args, pool=pool, callbacks=list(callbacks))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return make


def head(trainer: CoSupervisedTrainer) -> torch.Tensor:
    return torch.cat([trainer.student.head.weight, trainer.student.head.bias[:, None]], dim=1).detach().clone()


def features(trainer: CoSupervisedTrainer) -> torch.Tensor:
    return trainer.pool_features().double()


@pytest.fixture
def committee(train):
    return train("committee", method="committee")


def test_the_average_of_standardised_logits_is_one_head(committee):
    """Against the average itself, computed slowly."""
    members = [member.head for member in committee.committee.members]
    logits = [features(committee) @ own.weight.double().T + own.bias.double() for own in members]
    logits = [values - values.mean(dim=1, keepdim=True) for values in logits]
    spreads = torch.stack([values.square().mean().sqrt() for values in logits])
    speaks = committee.committee.committee.speaks
    shares = committee.committee.committee.shares
    standardised = torch.stack([values / spread for values, spread in zip(logits, spreads)])
    mean = torch.einsum("m,mnc->nc", shares[speaks] / shares[speaks].sum(), standardised[speaks])
    scale = spreads[speaks].log().mean().exp()
    weight = head(committee).double()
    found = features(committee) @ weight[:, :-1].T + weight[:, -1]
    assert torch.allclose(found, scale * mean, atol=1e-5)
    assert [member.name for member in committee.committee.members] == list(DEFAULT_MEMBERS)


def test_averages_count_as_the_routes_of_teachers_say(committee, train):
    told = committee.history.run
    share = average_share(told["routing_gain"])
    assert {name: facts["share"] for name, facts in told["committee"].items()} == {
        name: pytest.approx(1.0 if MEMBERS[name].aggregator is None else share) for name in DEFAULT_MEMBERS
    }
    assert share != 1.0
    alike = train("alike", method="committee", members=["csl_ridge", "ensemble_ridge"])  # nobody has neighbours
    assert "routing_gain" not in alike.history.run
    assert {facts["share"] for facts in alike.history.run["committee"].values()} == {1.0}


@pytest.mark.parametrize("name", MEMBERS)
def test_a_committee_of_one_is_that_method_alone(train, name):
    alone = train("one", method="committee", members=[name])
    arguments = dict(MEMBERS[name].arguments)
    if "assignment" in arguments:
        arguments["assignment"] = ["auto", "agreement"]
    pool = None if MEMBERS[name].aggregator is None else alone.pool
    if pool is not None:
        from hf_cosupervise import aggregated_pool

        pool = aggregated_pool(pool, MEMBERS[name].aggregator)
    assert torch.equal(head(alone), head(train("plain", pool=pool, **arguments)))


def test_members_share_what_is_the_same_for_all(train, monkeypatch):
    from hf_cosupervise.students import student
    from hf_cosupervise.training import head_fitter

    calls = {"head_gives_logits": 0, "fit_ridge_head": 0}

    def counted(module: Any, name: str) -> Any:
        found = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return found(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    counted(student, "head_gives_logits")
    counted(head_fitter, "fit_ridge_head")
    train("ridges", method="committee", members=["csl_ridge", "neighbors_ridge"])
    # The model is asked once; and of two members with two levels the roots are one.
    assert calls == {"head_gives_logits": 1, "fit_ridge_head": 3}
    train("alone", head_solver="ridge")  # later students ask again: the model may have changed since
    assert calls == {"head_gives_logits": 2, "fit_ridge_head": 5}


def test_it_goes_on_with_the_member_that_was_cut_off(train, committee):
    class Stop(Exception):
        pass

    class At(TrainerCallback):
        def __init__(self, number: int) -> None:
            self.left = number

        def on_step_end(self, *args, **kwargs):
            self.left -= 1
            if self.left == 0:
                raise Stop

    class Count(TrainerCallback):
        def __init__(self) -> None:
            self.levels = 0

        def on_level_begin(self, *args, **kwargs):
            self.levels += 1

    for step in (1, 2, 9, 20, 28):
        count = Count()
        with pytest.raises(Stop):
            train(f"cut-{step}", method="committee", callbacks=[At(step)])
        own = train(f"cut-{step}", resume=True, method="committee", callbacks=[count])
        assert torch.equal(head(own), head(committee))
        whole = len(committee.history.records)
        assert count.levels < whole if step > 1 else count.levels == whole
        timeless = [{k: v for k, v in record.items() if k != "train_runtime"} for record in own.history.records]
        assert timeless == [
            {k: v for k, v in record.items() if k != "train_runtime"} for record in committee.history.records
        ]


@pytest.mark.parametrize("change", ["swapped", "of-another-level", "of-another-run", "linked", "cut-off", "no-plan"])
def test_a_member_that_is_not_its_own_is_trained_again(train, committee, tmp_path, caplog, change):
    shutil.copytree(tmp_path / "committee", tmp_path / change)
    first, second = (
        tmp_path / change / "_run" / "members" / name / "_run" for name in ("csl_ridge", "neighbors_ridge")
    )
    if change == "swapped":
        shutil.copytree(second / "level-1", first / "level-1", dirs_exist_ok=True)
    elif change == "of-another-level":
        shutil.copytree(first / "level-0", first / "level-1", dirs_exist_ok=True)
    elif change == "of-another-run":
        other = train("other", method="committee", members=["csl_ridge"], ridge_alpha=7.0)
        place = other.run.path / "members" / "csl_ridge" / "_run" / "level-1"
        shutil.copytree(place, first / "level-1", dirs_exist_ok=True)
    elif change == "linked":
        shutil.rmtree(first / "level-1")
        (first / "level-1").symlink_to(second / "level-1")
    elif change == "cut-off":
        path = first / "level-1" / "student.safetensors"
        path.write_bytes(path.read_bytes()[:-8])
    else:
        (first / "level-1" / "plan.npz").unlink()
    caplog.clear()
    again = train(change, resume=True, method="committee")
    assert "this round is trained again" in caplog.text and torch.equal(head(again), head(committee))


def test_a_finished_one_is_read_back_and_another_list_of_members_is_refused(train, committee):
    again = train("committee", resume=True, method="committee")
    assert torch.equal(head(again), head(committee))
    with pytest.raises(ValueError, match="must be gone on with as it was begun, got other settings .*members"):
        train("committee", resume=True, method="committee", members=["csl"])
    with pytest.raises(FileExistsError, match="must not hold another run"):
        train("committee", method="committee")


def test_trackers_hear_of_one_training(train):
    class Witness(TrainerCallback):
        def __init__(self) -> None:
            self.begun, self.ended, self.steps = 0, 0, []

        def on_train_begin(self, *args, **kwargs):
            self.begun += 1

        def on_train_end(self, *args, **kwargs):
            self.ended += 1

        def on_log(self, args, state, control, **kwargs):
            self.steps.append(state.global_step)

    witness = Witness()
    trainer = train("told", method="committee", callbacks=[witness])
    assert (witness.begun, witness.ended) == (1, 1)
    assert witness.steps == sorted(witness.steps) and witness.steps[-1] == trainer.state.global_step
    assert trainer.state.global_step == sum(record["num_steps"] for record in trainer.history.records)
    assert {record["member"] for record in trainer.history.records} == set(DEFAULT_MEMBERS)


def test_it_is_saved_as_an_ordinary_model_with_a_card(train, committee, tmp_path, tiny_image_dataset):
    committee.save_model()
    committee.create_model_card()
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "committee").eval()
    log_probs = torch.cat([part for _, part in committee.predict_log_probs(committee.student.examples)])
    inputs = committee.processor(tiny_image_dataset[:8]["image"])
    with torch.no_grad():
        found = torch.log_softmax(model(**inputs).logits, dim=1)
    assert torch.allclose(found, log_probs[:8], atol=1e-5)
    card = (tmp_path / "committee" / "README.md").read_text()
    lead = [record for record in committee.history.records if record["member"] == "csl_ridge"]
    assert "These are the levels of `csl_ridge`, one member of the committee." in card
    found = ", ".join(str(record["head/ridge_alpha"]) for record in lead)
    assert f"`ridge_alpha` | `auto: {found} (of csl_ridge)` |" in card


def test_inputs_that_are_given_beside_the_pool_serve_all_members(tmp_path, tiny_vit, tiny_image_dataset, committee):
    pool = make_pool(tiny_image_dataset, inputs=False)
    args = make_args(tmp_path / "beside", method="committee")
    trainer = CoSupervisedTrainer(tiny_vit, args, pool=pool, train_dataset=tiny_image_dataset)
    trainer.train()
    assert torch.equal(head(trainer), head(committee))


def test_a_flat_hierarchy_and_rows_without_an_answer_work(train, tiny_image_dataset):
    pool = make_pool(tiny_image_dataset, missing=(0, 3))
    flat = TeacherHierarchy(LABELS, [Teacher(name) for name in pool.hierarchy.names])
    trainer = train("flat", method="committee", pool=pool.with_hierarchy(flat))
    assert torch.isfinite(head(trainer)).all()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"loss": "reverse_kl"}, "`loss` is decided by each of the `members`, got 'reverse_kl' beside `method` 'comm"),
        ({"head_solver": "ridge"}, "`head_solver` is decided by each of the `members`, got 'ridge'"),
        ({"assignment": ["agreement"]}, r"`assignment` is decided by each of the `members`, got \['agreement'\]"),
        ({"warm_start": True}, "`warm_start` is decided by each of the `members`, got True"),
        ({"student_training": "lora"}, "averages linear heads on one frozen backbone, got `student_training` 'lora'"),
        ({"student_training": "full"}, "Use `method` 'csl' for it"),
        ({"members": ["nobody"]}, r"`members` must be one of \['csl', .*got 'nobody'"),
        ({"members": []}, r"`members` must name members once each, and at least one, got \[\]"),
        ({"members": ["csl", "csl"]}, "`members` must name members once each"),
        ({"save_strategy": "steps"}, "`method` 'committee' needs linear heads on features, but checkpoints within"),
    ],
)
def test_what_members_decide_is_refused(tmp_path, tiny_vit, tiny_image_dataset, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        args = make_args(tmp_path / "out", **{"method": "committee", **changes})
        CoSupervisedTrainer(tiny_vit, args, pool=make_pool(tiny_image_dataset))


def test_functions_of_ones_own_and_single_levels_are_refused(tmp_path, tiny_vit, tiny_image_dataset):
    args, pool = make_args(tmp_path / "out", method="committee"), make_pool(tiny_image_dataset)
    with pytest.raises(ValueError, match="`keep_func` cannot be given to a committee"):
        CoSupervisedTrainer(tiny_vit, args, pool=pool, keep_func=lambda log_probs, targets: log_probs[:, 0] < 0)
    trainer = CoSupervisedTrainer(tiny_vit, args, pool=pool)
    with pytest.raises(ValueError, match="Level 0 must be of a hierarchy that one student goes down, got `method`"):
        trainer.prepare_level(0)


# ── features that are centred and scaled ────────────────────────────────────────────────────────────────────────────


def test_standardised_steps_are_those_of_a_head_on_scaled_features():
    """The head for the features as they are says what the head on scaled features would."""
    from hf_cosupervise.method.linear_head import fit_linear_head, measure_scaling

    torch.manual_seed(0)
    raw = 50 + 7 * torch.randn(64, 5)
    targets = torch.softmax(torch.randn(64, 3), dim=1)
    scaling = measure_scaling(raw, torch.arange(64))
    scaled = (raw - raw.mean(dim=0)) / (raw - raw.mean(dim=0)).square().mean().sqrt()
    assert torch.allclose((raw - scaling.mean) * scaling.scale, scaled, atol=1e-4)
    batches = [[torch.arange(64)[i::4]] for _ in range(5) for i in range(4)]

    def fit(features: torch.Tensor, **kwargs: Any) -> torch.nn.Linear:
        torch.manual_seed(1)
        own = torch.nn.Linear(5, 3)
        optimizer = torch.optim.Adam(own.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        fit_linear_head(own, features, targets.__getitem__, batches, optimizer, schedule, **kwargs)
        return own

    found = fit(raw, scaling=scaling)
    assert torch.allclose(found(raw), fit(scaled)(scaled), atol=1e-3)
    # Scaled once for all steps, they are the same to the bit.
    assert torch.equal(fit(scaling.apply(raw), scaling=scaling, is_scaled=True).weight, found.weight)


def test_cells_are_hashed_once_for_all_members(tmp_path, tiny_vit, tiny_image_dataset, monkeypatch):
    hashed = []
    own = feature_store.cell_digests
    monkeypatch.setattr(feature_store, "cell_digests", lambda *given: hashed.append(given) or own(*given))
    CoSupervisedTrainer(tiny_vit, make_args(tmp_path, method="committee"), pool=make_pool(tiny_image_dataset)).train()
    assert len(hashed) == 1


def test_features_too_large_for_a_scaled_copy_are_scaled_batch_by_batch(
    tmp_path, tiny_vit, tiny_image_dataset, monkeypatch
):
    heads = []
    for name, most in (("copy", 2**28), ("batches", 0)):
        monkeypatch.setattr("hf_cosupervise.training.head_fitter._MAX_SCALED_BYTES", most)
        args = make_args(tmp_path / name, standardize_features=True)
        trainer = CoSupervisedTrainer(tiny_vit, args, pool=make_pool(tiny_image_dataset))
        trainer.train()
        heads.append(trainer.student.copy_head())
        assert ("scaled" in trainer.student.known) == bool(most)
    assert torch.equal(heads[0].weight, heads[1].weight) and torch.equal(heads[0].bias, heads[1].bias)


def test_standardised_features_are_for_fresh_heads_by_steps(tmp_path):
    with pytest.raises(ValueError, match="`standardize_features` is for fresh heads fitted by steps"):
        CoSupervisedConfig(str(tmp_path), standardize_features=True, head_solver="ridge")


# ── what is known without labels ────────────────────────────────────────────────────────────────────────────────────


def test_an_account_without_labels(train, committee, tmp_path, tiny_image_dataset):
    """Counted by hand from what teachers, members and student say."""
    from datasets import Dataset

    seen, pool = overview(committee), committee.pool
    report = seen.report()
    votes = {name: pool.hard_labels(name) for name in pool.hierarchy.names}
    assert report["teachers"]["insects"]["agrees_with_student"] == np.mean(votes["insects"] == seen.labels)
    others = [np.mean(votes["insects"] == votes[name]) for name in ("generalist", "pets")]
    assert report["teachers"]["insects"]["agrees_with_others"] == pytest.approx(np.mean(others))
    index = pool.hierarchy.index("pets")
    plans = [member.plan for member in committee.committee.members if member.plan is not None]
    trusted = np.mean([plan.assigned_teacher == index for plan in plans])
    assert report["teachers"]["pets"]["trusted"] == pytest.approx(trusted)
    assert sum(report["student"]["class_shares"].values()) == pytest.approx(1)
    members = list(seen.members.values())
    pairs = [np.mean(a == b) for i, a in enumerate(members) for b in members[i + 1 :]]
    assert report["member_agreement"] == pytest.approx(np.mean(pairs)) == pytest.approx(label_agreement(members))
    assert "generalist" in format_overview(report)

    seen.save_labels(tmp_path / "labels.parquet")
    labels = Dataset.from_parquet(str(tmp_path / "labels.parquet"))
    assert labels["id"][:3] == list(pool.ids[:3]) and len(labels) == len(pool)
    assert [LABELS.index(name) for name in labels["label"]] == seen.labels.tolist()

    rows = seen.to_label(12)
    scores = seen.disagreement()
    per_label = {label: [row for row in rows if seen.labels[row] == label] for label in set(seen.labels.tolist())}
    most = max(map(len, per_label.values()))
    for label, own in per_label.items():  # in turn, as long as there are some
        assert len(own) >= min(int((seen.labels == label).sum()), most - 1)
    for label, own in per_label.items():  # the most disputed of each label
        best = np.sort(scores[seen.labels == label])[::-1][: len(own)]
        assert np.allclose(np.sort(scores[own])[::-1], best)
    seen.save_to_label(tmp_path / "to_label.csv", 12)
    lines = Path(tmp_path / "to_label.csv").read_text().splitlines()
    assert len(lines) == 13 and lines[0].startswith("id,label,probability,trusted_teacher,kept,teacher generalist")


def test_a_label_that_no_teacher_gives_is_a_warning(train, tiny_image_dataset):
    data = tiny_image_dataset.remove_columns("label").add_column("says", ["ant"] * len(tiny_image_dataset))
    teachers = [Teacher("says", kind="column", name=name, level=level) for level, name in enumerate(("one", "two"))]
    pool = build_pool(data, TeacherHierarchy(LABELS, teachers), input_column="image", disable_tqdm=True)
    seen = overview(train("collapsed", method="committee", pool=pool))
    (warning,) = seen.report()["warnings"]
    others = [label for label in LABELS if label != "ant"]
    assert warning.startswith(f"No teacher gives {others} to any of 48 examples, so that the student cannot know it.")


FORMULAS = [
    "=1+1",
    "+1",
    "-1+1",
    "@SUM(A1)",
    "\t=1",
    " =1",
    "\n=1",
    "\uff1d1",
    '=HYPERLINK("http://x")',
    "=cmd|' /C calc'!A0",
]


@pytest.mark.parametrize("text", FORMULAS)
def test_no_cell_of_a_table_for_people_is_a_formula(tmp_path, text):
    from datasets import Dataset

    data = Dataset.from_dict({"id": [text, "b"], "text": [text, "plain"], "says": [text, "="]})
    hierarchy = TeacherHierarchy([text, "=" if text != "=" else "-"], [Teacher("says", kind="column")])
    pool = build_pool(data, hierarchy, input_column="text", disable_tqdm=True)
    seen = Overview(pool, pool.hard_labels("says"), np.array([0.5, 0.25]), {}, {text: np.array([0, 1])})
    seen.save_to_label(tmp_path / "to_label.csv")
    with open(tmp_path / "to_label.csv", newline="") as file:
        rows = list(csv.reader(file))
    cells = [cell for row in rows for cell in row]
    assert f"'{text}" in cells and "plain" in cells and "0.5" in cells
    assert not [cell for cell in cells if cell.lstrip()[:1] in ("=", "+", "-", "@", "\uff1d")]


def test_a_label_that_vanished_is_a_warning(committee):
    seen = overview(committee)
    seen.labels = np.where(seen.labels == 1, 0, seen.labels)
    assert any("gives 'bee' to 0.0%" in warning for warning in seen.report()["warnings"])
    assert not any("'ant'" in warning for warning in seen.report()["warnings"])

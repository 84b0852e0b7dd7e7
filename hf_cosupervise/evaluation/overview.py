"""What can be said of a student without ground truth: whom it trusted, where all disagree, and what it lost."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ..data.columns import is_text_column, shorten
from ..files import whole_file, write_text
from ..method.committee import member_agreement
from ..pool.pseudolabels import AGGREGATE, PseudolabelPool
from ..training.plan import LevelPlan
from ..training.trainer import CoSupervisedTrainer

# A label that the student gives to less than this share of what its teachers give it has vanished.
_VANISHED = 0.1
# Of a label that teachers hardly ever give, nothing is missed.
_RARE = 0.2
NUM_TO_LABEL = 100
_FORMULAS = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # the last four are wide ones of these


@dataclass
class Overview:
    """A student beside its teachers, row by row."""

    pool: PseudolabelPool
    labels: np.ndarray  # the student's `(num_examples,)`, -1 where there is nothing that it can read
    probs: np.ndarray  # of these
    plans: Mapping[str, LevelPlan]  # the last of each member that chose among teachers, or of the student alone
    members: Mapping[str, np.ndarray]  # labels of each member of a committee

    @cached_property
    def _votes(self) -> dict[str, np.ndarray]:
        """The teachers' labels, `(num_examples,)` each, read once for all that is asked of them."""
        return {name: self.pool.hard_labels(name) for name in self.pool.hierarchy.names}

    @cached_property
    def _opinions(self) -> dict[str, np.ndarray]:
        """The labels of teachers that are not made of the others; of all where there is nobody else."""
        facts = self.pool.facts
        own = {name: votes for name, votes in self._votes.items() if not facts.get(name, {}).get(AGGREGATE)}
        return own or self._votes

    def report(self) -> dict[str, Any]:
        """Sum up what can be known without labels as JSON values; shares are None where there is nothing to count."""
        teachers = self._describe_teachers()
        own = self._class_shares(self.labels)
        return {
            "num_examples": len(self.pool),
            "student": {
                "class_shares": own,
                "mean_probability": _mean(self.probs[self.labels >= 0]),
                "unread": _mean(self.labels < 0),
            },
            "teachers": teachers,
            "kept": {name: plan.keep_rate for name, plan in self.plans.items()},
            # Of what all of these plans let a teacher say, or had a pseudolabel for.
            "kept_by_teacher": {
                name: self._kept([self._spoken(plan, index) for plan in self.plans.values()])
                for index, name in enumerate(self.pool.hierarchy.names)
            },
            "kept_by_label": {
                label: self._kept([(plan.labels >= 0) & (self.labels == number) for plan in self.plans.values()])
                for number, label in enumerate(self.pool.labels)
            },
            "members": {
                name: {"agrees_with_student": self._agreement(labels), "class_shares": self._class_shares(labels)}
                for name, labels in self.members.items()
            },
            "member_agreement": label_agreement(list(self.members.values())),
            "warnings": self._find_vanished(own, teachers),
        }

    def _describe_teachers(self) -> dict[str, Any]:
        pool, votes, found = self.pool, self._votes, {}
        last = {plan.level for plan in self.plans.values()}
        for index, (name, teacher) in enumerate(zip(pool.hierarchy.names, pool.hierarchy.teachers)):
            trusted = self._trust(index)
            # Who is of another level and was not fallen back to could not be chosen, which is not to be distrusted.
            was_there = teacher.level in last or bool(trusted.any())
            # Where two have answered no row in common, nothing is known of them; and an average is of all others.
            others = [
                _agreement(votes[name], labels)
                for other, labels in self._opinions.items()
                if other != name and name in self._opinions
            ]
            found[name] = {
                "level": teacher.level,
                "answered": _mean(votes[name] >= 0),
                "trusted": _mean(trusted) if was_there else None,
                "trusted_by_label": {
                    label: _mean(trusted[self.labels == number]) if was_there else None
                    for number, label in enumerate(pool.labels)
                },
                "agrees_with_student": self._agreement(votes[name]),
                "agrees_with_others": _mean(np.array([value for value in others if value is not None])),
                "class_shares": self._class_shares(votes[name]),
            }
        return found

    def _trust(self, index: int) -> np.ndarray:
        """How many of the plans let a teacher speak for each example, as a share, alone or as one of its level."""
        share = np.zeros(len(self.pool))
        for plan in self.plans.values():
            share += self._spoken(plan, index)
        return share / max(len(self.plans), 1)

    def _spoken(self, plan: LevelPlan, index: int) -> np.ndarray:
        """For which examples a plan lets a teacher speak: 1 alone, a part as one of its level, 0 not at all."""
        hierarchy = self.pool.hierarchy
        level = hierarchy.teachers[index].level
        together = plan.assigned_teacher == len(hierarchy.names) + level
        answered = self._votes[hierarchy.names[index]] >= 0
        return (plan.assigned_teacher == index) + (together & answered) / len(hierarchy.levels[level])

    def _kept(self, counted: Sequence[np.ndarray]) -> float | None:
        """Of examples that are counted in each plan, maybe in part, the share that the plans keep."""
        kept = sum(float(own[plan.keep_mask].sum()) for plan, own in zip(self.plans.values(), counted))
        total = sum(float(own.sum()) for own in counted)
        return kept / total if total else None

    def _agreement(self, labels: np.ndarray) -> float | None:
        return _agreement(labels, self.labels)

    def _class_shares(self, labels: np.ndarray) -> dict[str, float | None]:
        counts, given = np.bincount(labels[labels >= 0], minlength=len(self.pool.labels)), int((labels >= 0).sum())
        return {name: int(count) / given if given else None for name, count in zip(self.pool.labels, counts)}

    def _find_vanished(self, own: Mapping[str, float | None], teachers: Mapping[str, Any]) -> list[str]:
        """Labels that teachers give and the student does not: the likeliest sign that its training collapsed."""
        said, unknown = list[str](), list[str]()
        for name in self.pool.labels:
            given = [teacher["class_shares"][name] for teacher in teachers.values()]
            if not any(given):
                unknown.append(name)
            # Of those that know the label: specialists of others give it to nothing.
            usual = _mean(np.array([share for share in given if share])) or 0.0
            if usual >= _RARE / len(self.pool.labels) and (own[name] or 0.0) < _VANISHED * usual:
                said.append(
                    f"The student gives '{name}' to {own[name] or 0.0:.1%} of the examples, teachers that know it to "
                    f"{usual:.1%}: it may have lost that label. Look at its rows in to_label.csv."
                )
        if unknown:
            said.append(
                f"No teacher gives {shorten(unknown, 5)} to any of {len(self.pool)} examples, so that the student "
                "cannot know it. Add a teacher that does, or leave it out of the task."
            )
        return said

    def disagreement(self) -> np.ndarray:
        """Score each example, 0 to 3, by how far others contradict the student and how unsure it is; -1 if unread."""
        contradicted = self._contradicted(self._opinions.values()) + self._contradicted(self.members.values())
        # What it cannot read comes last, for there is nothing to look at.
        return np.where(self.labels >= 0, contradicted + 1 - self.probs, -1.0)

    def _contradicted(self, opinions: Iterable[np.ndarray]) -> np.ndarray:
        against, given = np.zeros(len(self.pool)), np.zeros(len(self.pool))
        for labels in opinions:
            given += labels >= 0
            against += (labels >= 0) & (labels != self.labels)
        return against / np.maximum(given, 1)

    def to_label(self, num_rows: int = NUM_TO_LABEL) -> np.ndarray:
        """Choose the examples that a person should look at first: the most disputed, in turn of each label."""
        scores = self.disagreement()
        order = np.argsort(-scores, kind="stable")
        order = order[self.labels[order] >= 0]
        turn = np.zeros(len(self.pool), dtype=np.int64)  # the how-manieth of its label each row is
        for number in range(len(self.pool.labels)):
            own = order[self.labels[order] == number]
            turn[own] = np.arange(len(own))
        # By turns, and within a turn by scores: numpy sorts by its last key first.
        return order[np.lexsort((-scores[order], turn[order]))][:num_rows]

    # --- files -------------------------------------------------------------------------------------------------------

    def save_labels(self, path: Path) -> None:
        """Write `id`, `label`, `probability`, `trusted_teacher` and `kept` as Parquet, in the order of the data.

        A row has one cell for its teacher: of several members, it names whom most of them trusted (of equally many,
        the first one's choice), and keeps what half of them kept. The shares of [`report`] are means over members, so
        that counts of this file come close to them and need not be equal.
        """
        with whole_file(path) as temporary:
            Dataset.from_dict(self._columns(np.arange(len(self.pool)))).to_parquet(str(temporary))

    def save_to_label(self, path: Path, num_rows: int = NUM_TO_LABEL) -> None:
        """Write the examples that a person should look at first, with what everybody says of them, as CSV."""
        rows = self.to_label(num_rows)
        columns = self._columns(rows)
        inputs, column = self.pool.inputs, str(self.pool.input_column)
        # A cell cannot show an image or a vector, and its id leads there.
        if inputs is not None and column in inputs.column_names and is_text_column(inputs, column):
            columns[column] = list(inputs.select(rows)[column])
        for name in self.pool.hierarchy.names:
            columns[f"teacher {name}"] = self._names(self._votes[name][rows])
        columns |= {f"member {name}": self._names(labels[rows]) for name, labels in self.members.items()}
        text = io.StringIO()
        # Else it ends lines as Windows does, on all systems.
        writer = csv.writer(text, lineterminator="\n")
        for row in (columns, *zip(*columns.values())):
            writer.writerow(map(_as_text, row))
        write_text(path, text.getvalue())

    @cached_property
    def _consensus(self) -> tuple[np.ndarray, np.ndarray]:
        """Whom most plans let speak for each example, else the first of equals, and whether half of them keep it."""
        if not self.plans:
            return np.full(len(self.pool), -1), np.zeros(len(self.pool), dtype=bool)
        chosen = np.stack([plan.assigned_teacher for plan in self.plans.values()])
        backed = np.stack([(chosen == own).sum(axis=0) for own in chosen])
        kept = np.mean([plan.keep_mask for plan in self.plans.values()], axis=0)
        return chosen[backed.argmax(axis=0), np.arange(len(self.pool))], kept >= 0.5

    def _columns(self, rows: np.ndarray) -> dict[str, Any]:
        speakers, kept = self._consensus
        names = [*self.pool.source_names, None]
        return {
            "id": [self.pool.ids[row] for row in rows.tolist()],
            "label": self._names(self.labels[rows]),
            "probability": [float(value) for value in self.probs[rows]],
            "trusted_teacher": [names[index] for index in speakers[rows].tolist()],
            "kept": [bool(value) for value in kept[rows]],
        }

    def _names(self, labels: np.ndarray) -> list[str | None]:
        names = [*self.pool.labels, None]  # of -1
        return [names[number] for number in labels.tolist()]


def _as_text(value: Any) -> Any:
    """A cell that a spreadsheet takes for what it is: a text of others may begin as a formula does."""
    return f"'{value}" if isinstance(value, str) and value.lstrip().startswith(_FORMULAS) else value


def overview(trainer: CoSupervisedTrainer) -> Overview:
    """Look at a trained student beside its teachers, without any label."""
    labels, probs = np.full(len(trainer.pool), -1), np.zeros(len(trainer.pool), dtype=np.float32)
    # Some rows at a time: of a million, over a thousand labels, all would be 4 GB.
    for rows, log_probs in trainer.predict_log_probs(trainer.student.examples):
        best = log_probs.max(dim=1)
        readable = trainer.student.readable[rows]
        labels[rows] = np.where(readable, best.indices.numpy(), -1)
        probs[rows] = np.where(readable, torch.exp(best.values).numpy(), 0.0)
    return Overview(trainer.pool, labels, probs, *_opinions(trainer))


def _opinions(trainer: CoSupervisedTrainer) -> tuple[dict[str, LevelPlan], dict[str, np.ndarray]]:
    """The last plans of all that chose among the teachers, and the labels of a committee's members."""
    if trainer.committee is None:
        # Not the plan of self-training, in which no teacher is chosen.
        return {"student": trainer.plans[trainer.pool.hierarchy.num_levels - 1]}, {}
    plans = {member.name: member.plan for member in trainer.committee.members if member.plan is not None}
    return plans, trainer.committee.labels(trainer.student.example_features(), trainer.student.readable)


def format_overview(report: Mapping[str, Any]) -> str:
    """Print what can be said without labels as a table of teachers, and a line for each other thing."""
    lines = [f"{'teacher':<25}{'level':<8}{'answered':<12}{'trusted':<12}{'like student':<15}like others"]
    for name, teacher in report["teachers"].items():
        shares = [
            _percent(teacher[key]) for key in ("answered", "trusted", "agrees_with_student", "agrees_with_others")
        ]
        cells = f"{teacher['level']:<8}{shares[0]:<12}{shares[1]:<12}{shares[2]:<15}{shares[3]}"
        lines.append(f"{name:<25}{cells}")
    lines.append("")
    kept = ", ".join(f"{name} {_percent(share)}" for name, share in report["kept"].items())
    lines.append(f"pseudolabels kept at the last level: {kept}")
    lines += _most_rejected(report)
    if report["members"]:
        agreement = ", ".join(
            f"{name} {_percent(member['agrees_with_student'])}" for name, member in report["members"].items()
        )
        lines.append(
            f"members that agree with the student: {agreement}; with each other {_percent(report['member_agreement'])}"
        )
    own = ", ".join(f"{name} {_percent(share)}" for name, share in report["student"]["class_shares"].items())
    lines.append(f"labels of the student: {own}")
    lines += [f"warning: {warning}" for warning in report["warnings"]]
    return "\n".join(line.rstrip() for line in lines)


def _most_rejected(report: Mapping[str, Any]) -> list[str]:
    """Say of which teacher and of which label least was kept, in one line or in none."""
    found = []
    for what, key in (("teacher", "kept_by_teacher"), ("label", "kept_by_label")):
        known = {name: share for name, share in report.get(key, {}).items() if share is not None}
        if known:
            name = min(known, key=known.__getitem__)
            found.append(f"of {what} '{name}' {_percent(1 - known[name])}")
    return [f"rejected most: {', '.join(found)}"] if found else []


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}%"


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _agreement(first: np.ndarray, second: np.ndarray) -> float | None:
    both = (first >= 0) & (second >= 0)
    return _mean(first[both] == second[both])


def label_agreement(opinions: Sequence[np.ndarray]) -> float | None:
    """Measure on how many examples two sets of labels agree, on average over all pairs; None for fewer than two."""
    if len(opinions) < 2:
        return None
    labels = np.stack(opinions, axis=1)
    labels = labels[(labels >= 0).all(axis=1)]
    return float(member_agreement(torch.from_numpy(labels)).double().mean()) if len(labels) else None

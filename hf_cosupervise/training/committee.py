"""Train a committee: each member by a trainer of its own, in a folder of its own; then all heads as one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from ..method.committee import Committee, average_share, committee_head, routing_gain
from ..method.linear_head import linear_logits
from ..pool.derived import aggregated_pool
from ..pool.pseudolabels import PseudolabelPool
from ..processes import row_chunks
from ..students.student import Student
from .callbacks import LevelCallbackHandler
from .config import CoSupervisedConfig
from .members import DEFAULT_MEMBERS, MEMBERS
from .plan import LevelPlan
from .run import TrainingRun
from .run_folder import MEMBERS_DIR
from .self_training import without_idle_rounds


@dataclass(frozen=True)
class TrainedMember:
    """What is left of a member: its head, and its last plan where it chose among the teachers of the pool."""

    name: str
    head: nn.Linear
    plan: LevelPlan | None


@dataclass(frozen=True)
class KnownRoutes:
    """What tells whether to choose among teachers or to average them, see [`routing_gain`]."""

    votes: np.ndarray
    averaged: np.ndarray
    neighbors: torch.Tensor


class TrainedCommittee:
    """Members that were trained on the same features, and the one head that they make."""

    def __init__(
        self,
        members: list[TrainedMember],
        features: torch.Tensor,
        readable: np.ndarray,
        routes: KnownRoutes | None = None,
    ) -> None:
        self.members = members
        self.routing_gain: float | None = None  # where there is nothing to compare
        heads, rows = [member.head for member in members], torch.from_numpy(np.flatnonzero(readable))
        weights = torch.stack([head.weight.detach() for head in heads])
        biases = None if heads[0].bias is None else torch.stack([head.bias.detach() for head in heads])
        self.committee: Committee = committee_head(weights, biases, features, rows)
        averages = torch.tensor([MEMBERS[member.name].aggregator is not None for member in members])
        statistics, speaks = self.committee.statistics, self.committee.speaks.cpu()
        num_averages = int((averages & speaks).sum())
        if routes is None or num_averages in (0, int(speaks.sum())):
            return
        # They are judged by a committee of which each kind is one half, or the larger half would find itself right.
        half = torch.where(averages, (int(speaks.sum()) - num_averages) / num_averages, 1.0)
        judge = committee_head(weights, biases, features, rows, half, statistics)
        own = np.where(readable, _labels(judge, features), -1)
        labels, votes, averaged = (torch.from_numpy(array) for array in (own, routes.votes, routes.averaged))
        self.routing_gain = gain = routing_gain(labels, votes, averaged, routes.neighbors)
        shares = torch.where(averages, average_share(gain), 1.0)
        self.committee = committee_head(weights, biases, features, rows, shares, statistics)

    @torch.no_grad()
    def put_into(self, head: nn.Linear) -> None:
        """Make a head the committee's."""
        head.weight.copy_(self.committee.weight)
        if self.committee.bias is not None:
            head.bias.copy_(self.committee.bias)

    def labels(self, features: torch.Tensor, readable: np.ndarray) -> dict[str, np.ndarray]:
        """Give the most probable label of each example by each member, `(num_examples,)`, -1 where it is not read."""
        found = {}
        for member in self.members:
            labels = _labels(member.head, features)
            found[member.name] = np.where(readable, labels, -1)
        return found

    def facts(self) -> dict[str, dict[str, Any]]:
        """Tell of each member whether it speaks, how loud it was before all were made alike, and what it counts."""
        committee = self.committee
        numbers = committee.speaks.tolist(), committee.statistics.spreads.tolist(), committee.shares.tolist()
        return {
            member.name: {"speaks": is_heard, "spread": spread, "share": share}
            for member, is_heard, spread, share in zip(self.members, *numbers)
        }


@torch.no_grad()
def _labels(head: nn.Linear | Committee, features: torch.Tensor) -> np.ndarray:
    """Give the most probable label of each example by a head, a chunk of rows at a time."""
    labels = np.full(len(features), -1, dtype=np.int64)
    for rows in row_chunks(len(features)):
        labels[rows] = linear_logits(head, features[rows]).cpu().numpy().argmax(axis=1)
    return labels


def train_members(
    new_trainer: Callable[..., Any],
    args: CoSupervisedConfig,
    pool: PseudolabelPool,
    given: Dataset | None,
    input_column: str,
    student: Student,
    run: TrainingRun,
    callbacks: LevelCallbackHandler,
    *,
    resume: bool,
) -> TrainedCommittee:
    """Train every member by a trainer and in a folder of its own, and make the student all of them."""
    inputs = None if given is None else given.add_column("id", pool.ids.tolist())
    place = pool.hierarchy.num_levels, len(pool), run.path, student.features_dir
    members: list[TrainedMember] = []
    averaged, neighbors = None, None
    with student.holding_still():
        for name in args.members:
            student.start_anew()  # they share the model, and each begins with the same head
            own_pool, own_args = member_pool(pool, name), member_arguments(args, name, *place)
            own_args = without_idle_rounds(own_args, own_pool)
            # Inputs are given as they came, for a pool of one teacher holds the same rows.
            trainer = new_trainer(own_args, pool=own_pool, train_dataset=inputs, input_column=input_column)
            trainer.callback_handler = callbacks.of_member()
            trainer.student.share(student)
            trainer.run.follow(run)
            trainer.train(resume)
            run.take_over(trainer.run, name)
            student.share(trainer.student)
            if own_pool is not pool:
                averaged = own_pool.hard_labels(own_pool.hierarchy.names[0]) if averaged is None else averaged
            elif own_args.agreement_neighbors:
                neighbors = trainer.student.nearest(own_args.agreement_neighbors)
            # Of another pool, or of self-training, it tells nothing of the teachers.
            plan = trainer.plans[pool.hierarchy.num_levels - 1] if own_pool is pool else None
            members.append(TrainedMember(name, trainer.student.copy_head(), plan))
    routes = None
    if averaged is not None and neighbors is not None:
        names, last = pool.hierarchy.names, pool.hierarchy.level_indices(pool.hierarchy.num_levels - 1)
        votes = np.stack([pool.hard_labels(names[index]) for index in last], axis=1)
        routes = KnownRoutes(votes, averaged, neighbors)
    committee = TrainedCommittee(members, student.example_features(), student.readable, routes)
    committee.put_into(student.head)  # type: ignore[arg-type]  # there is one
    gain = {} if committee.routing_gain is None else {"routing_gain": committee.routing_gain}
    run.conclude({"committee": committee.facts(), **gain})
    return committee


def member_pool(pool: PseudolabelPool, name: str) -> PseudolabelPool:
    """Give what a member trains on: the pool, or all of its teachers as one."""
    aggregator = MEMBERS[name].aggregator
    return pool if aggregator is None else aggregated_pool(pool, aggregator)


def member_arguments(
    args: CoSupervisedConfig, name: str, num_levels: int, num_examples: int, run_dir: Path, features_dir: Path
) -> CoSupervisedConfig:
    """Give the configuration by which a member is trained, alone or in a committee."""
    own, member = copy.copy(args), MEMBERS[name]
    # What a member is does not hang on who else is in the committee.
    own.method, own.members, own.push_to_hub = "csl", list(DEFAULT_MEMBERS), False
    for field, value in member.arguments.items():
        setattr(own, field, copy.copy(value))
    if own.assignment == ["agreement"]:  # below the root, which has nobody to choose by
        own.assignment = ["auto"] + ["agreement"] * (num_levels - 1)
    own.agreement_neighbors = min(own.agreement_neighbors, num_examples - 1) if num_levels > 1 else 0
    own.output_dir, own.features_dir = str(run_dir / MEMBERS_DIR / name), str(features_dir)
    return own

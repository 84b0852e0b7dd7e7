"""What every label model can do: learn from votes, give posteriors on any votes, be written down and read again."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from .votes import (
    Answers,
    best_labels,
    check_votes,
    count_votes,
    information,
    name_voters,
    one_sided_voters,
    share_out,
    silence_speaks,
)

# Posteriors that tell less than this share of what the plain vote shares tell are called flat.
_FLAT = 0.1
ABSTENTIONS = ("auto", "answer", "missing")


@dataclass
class LabelModel:
    """Learn from votes alone how to make one label of them.

    A model is of the voters it was fitted on, in their order. A voter or a label that was never there has no say
    later, and no label gets probability that nobody named. A setting out of its range is a `ValueError`.
    """

    name: ClassVar[str] = ""
    min_voters: ClassVar[int] = 3
    needs_several_labels: ClassVar[bool] = False  # of some voter, or else that silence is an answer
    abstention = "missing"  # a setting of those models for which silence may be an answer

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            if setting.name.startswith(("max_", "num_")) and value < 1:
                raise ValueError(f"`{setting.name}` must be at least 1, got {value}. Give more.")
        if self.abstention not in ABSTENTIONS:
            raise ValueError(
                f"`abstention` must be one of {', '.join(ABSTENTIONS)}, got {self.abstention!r}. Choose one."
            )
        self.num_labels = 0
        self.num_voters = 0
        self.voter_names: tuple[str, ...] | None = None
        self.named = np.zeros(0, dtype=np.int64)
        self.speakers = np.zeros(0, dtype=np.int64)
        self.silence_is_answer = False
        self.parameters: dict[str, np.ndarray] = {}

    def fit(self, votes: Any, num_labels: int | None = None, names: Sequence[str] | None = None) -> Self:
        """Learn from votes, as [`fit_predict_proba`] does; gives the model itself."""
        self.fit_predict_proba(votes, num_labels, names)
        return self

    def fit_predict_proba(
        self, votes: Any, num_labels: int | None = None, names: Sequence[str] | None = None
    ) -> np.ndarray:
        """Learn from votes, and give the posteriors of the same rows.

        Args:
            votes (`np.ndarray` of shape `(num_rows, num_voters)`, integers):
                Labels, -1 for no vote. A `ValueError` if they are not usable, or too few voters voted for this model.
            num_labels (`int`, *optional*):
                Defaults to the greatest vote and one.
            names (`Sequence[str]`, *optional*):
                Of the voters, for what is said about them.

        Returns:
            `np.ndarray` of shape `(num_rows, num_labels)`: rows sum to 1, or to 0 without a vote.
        """
        if num_labels is not None and (not isinstance(num_labels, Integral) or num_labels < 1):
            raise ValueError(
                f"`num_labels` must be a whole number of at least 1, got {num_labels!r}. Give the task's."
            )
        votes = check_votes(votes, num_labels)
        if names is not None and len(names) != votes.shape[1]:
            raise ValueError(f"`names` must be one per voter, got {len(names)} of {votes.shape[1]}. Name them all.")
        self.__post_init__()  # what was learned before is gone
        self.num_labels = int(votes.max(initial=-1)) + 1 if num_labels is None else int(num_labels)
        self.num_voters, self.voter_names = votes.shape[1], None if names is None else tuple(names)
        # Labels that nobody names and voters that never speak cost memory and teach nothing: all below is of the rest.
        self.named = np.unique(votes[votes >= 0])
        self.speakers = np.flatnonzero((votes >= 0).any(axis=0))
        if 0 < len(self.speakers) < self.min_voters:
            raise ValueError(
                f"`{self.name}` needs at least three teachers that answered, got {len(self.speakers)}: from fewer, "
                "nothing tells whose answers are better. Use `mean_probs` or `majority_vote`."
            )
        self.silence_is_answer = self._choose_silence(votes)
        # With one label there is nothing to weigh: each row with a vote has it.
        if len(self.named) < 2:
            return self.predict_proba(votes)
        # A row in which all are silent tells something where silence is an answer, and is left out elsewhere.
        used = np.ones(len(votes), dtype=bool) if self.silence_is_answer else (votes >= 0).any(axis=1)
        answers = self._answers(votes[used])
        posteriors = self._fit(answers)
        heard = (votes[used] >= 0).any(axis=1)  # it gets no label for all that
        posteriors[heard] = self._finish(answers.codes[heard], posteriors[heard], votes)
        probs = np.zeros((len(votes), self.num_labels))
        probs[np.ix_(np.flatnonzero(used)[heard], self.named)] = posteriors[heard]
        return probs

    def predict_proba(self, votes: Any) -> np.ndarray:
        """Give posteriors `(num_rows, num_labels)` on any rows of the same voters, as [`fit_predict_proba`] does.

        A row sums to 0 without a vote that the model knows. A `ValueError` if the model is not fitted, or the votes
        are not those of its voters.
        """
        if not self.num_voters:
            raise ValueError(f"`{self.name}` must be fitted before it predicts, got a new one. Call `fit` first.")
        votes = check_votes(votes, self.num_labels)
        if votes.shape[1] != self.num_voters:
            raise ValueError(
                f"`{self.name}` knows {self.num_voters} voters, got votes of {votes.shape[1]}. Give the columns it "
                "was fitted on, in their order."
            )
        # By the numbers of the fit, whatever labels these rows name.
        answers = self._answers(votes)
        # The greatest code may be silence, which alone is no vote.
        heard = ((answers.codes >= 0) & (answers.codes < len(self.named))).any(axis=1)
        probs = np.zeros((len(votes), self.num_labels))
        if len(self.named) == 1:
            probs[heard, self.named[0]] = 1.0
        elif len(self.named) > 1 and heard.any():
            probs[np.ix_(heard, self.named)] = self._posteriors(Answers(answers.codes[heard], answers.num_codes))
        return probs

    def predict(self, votes: Any) -> np.ndarray:
        """Give the most probable label of rows: 1 at the label, 1/m at each of m that are equally probable.

        Takes and raises what [`predict_proba`] does, and gives the same shape, all zero without a vote.
        """
        return best_labels(self.predict_proba(votes))

    def _answers(self, votes: np.ndarray) -> Answers:
        """Number the labels that were named from 0; silence is the number after them where it is an answer."""
        codes = np.full(max(self.num_labels, 1) + 1, -1)  # one more: the place of -1
        codes[self.named] = np.arange(len(self.named))
        codes[-1] = len(self.named) if self.silence_is_answer else -1
        return Answers(codes[votes[:, self.speakers]], len(self.named) + self.silence_is_answer)

    def _choose_silence(self, votes: np.ndarray) -> bool:
        """Whether no vote is an answer for this model."""
        if self.abstention == "missing" and self.needs_several_labels:
            only, spoke = one_sided_voters(votes), (votes >= 0).any(axis=0)
            if spoke.any() and bool((only | ~spoke).all()):
                raise ValueError(
                    f"`{self.name}` learns nothing from voters that name one label only unless their silence is an "
                    f'answer, got only such: {name_voters(only, self.voter_names)}. Set `abstention="answer"`, or use '
                    "`shared_majority`."
                )
        return self.abstention == "answer" or self.abstention == "auto" and silence_speaks(votes)

    def _finish(self, codes: np.ndarray, posteriors: np.ndarray, votes: np.ndarray) -> np.ndarray:
        """Say so where nothing was learned."""
        advice = "Use `shared_majority`, or another model."
        self._is_flat(codes, posteriors, votes, "learns next to nothing from these votes", advice)
        return posteriors

    def _is_flat(
        self, codes: np.ndarray, posteriors: np.ndarray, votes: np.ndarray, finding: str, advice: str
    ) -> bool:
        """Whether posteriors tell next to nothing about the label, which a warning says."""
        found, possible = information(posteriors), information(self._vote_shares(codes))
        if found >= _FLAT * possible:
            return False
        only = name_voters(one_sided_voters(votes), self.voter_names)
        warnings.warn(
            f"`{self.name}` {finding}: its posteriors tell {found:.2g} nats about the label, the shares of the votes "
            f"{possible:.2g}. {f'Voters that name one label only: {only}. ' if only else ''}{advice}"
        )
        return True

    def _vote_shares(self, codes: np.ndarray) -> np.ndarray:
        return share_out(count_votes(np.where(codes < len(self.named), codes, -1), len(self.named)))

    def _fit(self, answers: Answers) -> np.ndarray:
        """Learn `parameters`, and give posteriors `(num_rows, num_named)` of the rows."""
        raise NotImplementedError

    def _posteriors(self, answers: Answers) -> np.ndarray:
        """Posteriors `(num_rows, num_named)` of rows with an answer."""
        raise NotImplementedError

    # ── written down ────────────────────────────────────────────────────────────────────────────────────────────────

    def to_dict(self) -> dict[str, Any]:
        """Give all of the model as plain JSON values, which [`from_dict`] reads."""
        return {
            "model": self.name,
            "settings": asdict(self),
            "num_labels": self.num_labels,
            "num_voters": self.num_voters,
            "voter_names": None if self.voter_names is None else list(self.voter_names),
            "named": self.named.tolist(),
            "speakers": self.speakers.tolist(),
            "silence_is_answer": self.silence_is_answer,
            "parameters": {key: value.tolist() for key, value in self.parameters.items()},
        }

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> Self:
        """Make a model of what [`to_dict`] gave; a `ValueError` if something is missing, or it is of another kind."""
        keys = {"model", "settings", "num_labels", "num_voters", "voter_names", "named", "speakers"}
        keys |= {"silence_is_answer", "parameters"}
        if not isinstance(facts, Mapping) or keys - set(facts):
            found = sorted(facts) if isinstance(facts, Mapping) else type(facts).__name__
            raise ValueError(f"A label model must have the fields {sorted(keys)}, got {found}. Save it again.")
        if facts["model"] != cls.name:
            raise ValueError(f"Expected a label model `{cls.name}`, got {facts['model']!r}. Use `load_label_model`.")
        model = cls(**facts["settings"])
        # After the constructor, which has made an unfitted model of the settings.
        model.num_labels, model.num_voters = int(facts["num_labels"]), int(facts["num_voters"])
        model.voter_names = None if facts["voter_names"] is None else tuple(facts["voter_names"])
        model.named = np.asarray(facts["named"], dtype=np.int64)
        model.speakers = np.asarray(facts["speakers"], dtype=np.int64)
        model.silence_is_answer = bool(facts["silence_is_answer"])
        model.parameters = {key: np.asarray(value, dtype=np.float64) for key, value in facts["parameters"].items()}
        return model

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model as JSON, which `load_label_model` reads."""
        Path(path).write_text(json.dumps(self.to_dict()) + "\n", encoding="utf-8")


@dataclass
class SharedMajority(LabelModel):
    """Let every voter cast one vote, and share a tie among the labels that have most.

    Examples:
        >>> SharedMajority().fit_predict_proba([[0, 1, 1], [0, 1, -1], [-1, -1, -1]]).tolist()
        [[0.0, 1.0], [0.5, 0.5], [0.0, 0.0]]
    """

    name: ClassVar[str] = "shared_majority"
    min_voters: ClassVar[int] = 1

    def _fit(self, answers: Answers) -> np.ndarray:
        return self._posteriors(answers)

    def _posteriors(self, answers: Answers) -> np.ndarray:
        return best_labels(count_votes(answers.codes, len(self.named)))

    def _finish(self, codes: np.ndarray, posteriors: np.ndarray, votes: np.ndarray) -> np.ndarray:
        return posteriors

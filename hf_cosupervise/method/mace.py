"""MACE: who knows the label, and what those say who do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch

from .label_model import LabelModel
from .votes import Answers, best_labels, silence_speaks

_TRUST_PRIOR, _SPAM_PRIOR = 0.5, 10.0


class _Parameters(NamedTuple):
    """`(num_voters, 2)` that a voter guesses or knows, `(num_voters, num_labels)` what it guesses, and of labels."""

    trust: np.ndarray
    spam: np.ndarray
    prior: np.ndarray


@dataclass
class Mace(LabelModel):
    """Weigh votes by how often each voter knows the label, and by what it says when it does not.

    Voter k knows the label of a row with probability r_k and gives it, else it names label l with probability
    xi_k(l): p(vote_ik | c) = r_k [vote_ik = c] + (1 - r_k) xi_k(vote_ik). Variational EM with prior Beta(0.5, 0.5) on
    r and Dirichlet(10) on xi, from random starts, of which the most likely stays. Labels are equally frequent
    beforehand; from there EM goes on with frequencies pi_c = (1 + sum_i q_ic) / (C + n), at first those of the votes.
    They stay where they make the votes of n rows more probable by more than (C - 1) / 2 ln n nats: without them, a
    rare label would get most of what is disputed. Where silence is an answer, they are never asked for.

    Where voters name one label only, xi explains all votes and r falls to 0. The order of the labels of a row still
    weighs votes by r / xi, but their posteriors are nearly equal: how sure to be is not known. There q is the mean of
    the first label of that order and the vote shares. A warning says so where the posteriors told nothing.

    Args:
        max_iterations (`int`, *optional*, defaults to 50):
            EM steps, all of which are done.
        num_restarts (`int`, *optional*, defaults to 3):
            Random starts.
        seed (`int`, *optional*, defaults to 0):
            For the starts: the same seed gives the same answer.
        abstention (`str`, *optional*, defaults to `"auto"`):
            `"missing"`: no vote tells nothing. `"answer"`: it is an answer, and what a voter that knows says where a
            row shows no label; posteriors are of the labels, given that there is one. `"auto"`: an answer where most
            votes are from voters that name one label only.

    Source:
        Hovy et al. 2013, with the priors of its authors. Frequencies by the Bayesian information criterion (Schwarz
        1978), silence as an answer and the mean are ours.

    Examples:
        >>> votes = [[0, 0, 1], [1, 1, 0], [0, 0, -1], [1, 1, 1]]
        >>> Mace(num_restarts=1).fit(votes).predict(votes).argmax(axis=1).tolist()
        [0, 1, 0, 1]
    """

    name: ClassVar[str] = "mace"
    max_iterations: int = 50
    num_restarts: int = 3
    seed: int = 0
    abstention: str = "auto"

    def _fit(self, answers: Answers) -> np.ndarray:
        random, shape = np.random.RandomState(self.seed), (answers.codes.shape[1], answers.num_codes)

        def start() -> _Parameters:
            trust, spam = (1 + 1.5 * random.uniform(size=size) for size in ((shape[0], 2), shape))  # guesses, knows
            return _Parameters(_shares(trust), _shares(spam), np.full(shape[1], 1 / shape[1]))

        # The likelihood has several peaks, of which the first that is found is rarely the highest.
        climbs = (self._climb(answers, start()) for _ in range(self.num_restarts))
        evidence, probs, parameters = max(climbs, key=lambda climb: climb[0])
        # Where silence is an answer, votes tell what voters look for, and little of how frequent a label is.
        if not self.silence_is_answer:
            voted = _shares(self._vote_shares(answers.codes).sum(axis=0) + 1)
            freed = self._climb(answers, parameters._replace(prior=voted), is_prior_free=True)
            if freed[0] - evidence > (shape[1] - 1) / 2 * np.log(len(probs)):
                _, probs, parameters = freed
        self.parameters = parameters._asdict() | {"is_order": np.zeros(1)}
        return self._given_a_label(probs)

    def _climb(
        self, answers: Answers, parameters: _Parameters, is_prior_free: bool = False
    ) -> tuple[float, np.ndarray, _Parameters]:
        """EM from some parameters: the log-likelihood of all votes, posteriors, and the parameters that gave them."""
        for _ in range(self.max_iterations):
            probs, _ = _label_posteriors(answers, parameters)
            prior = _shares(probs.sum(axis=0) + 1) if is_prior_free else parameters.prior
            parameters = _Parameters(*_step(answers, parameters, probs), prior)
        # Once more, of the parameters that are kept: the last step made its posteriors before it changed them.
        probs, evidence = _label_posteriors(answers, parameters)
        return evidence, probs, parameters

    def _posteriors(self, answers: Answers) -> np.ndarray:
        known = _Parameters(*(self.parameters[key] for key in _Parameters._fields))
        probs = self._given_a_label(_label_posteriors(answers, known)[0])
        return self._sure_as_votes(answers.codes, probs) if self.parameters["is_order"].any() else probs

    def _given_a_label(self, probs: np.ndarray) -> np.ndarray:
        """Leave out that a row shows no label, where silence is an answer."""
        probs = probs[:, : len(self.named)]
        return probs / probs.sum(axis=1, keepdims=True)

    def _finish(self, codes: np.ndarray, posteriors: np.ndarray, votes: np.ndarray) -> np.ndarray:
        finding = "finds no voter that knows more than what it always says"
        advice = "Compare with `shared_majority`: the shares and the best label are averaged."
        if not self._is_flat(codes, posteriors, votes, finding, advice) and not silence_speaks(votes):
            return posteriors
        self.parameters["is_order"] = np.ones(1)
        return self._sure_as_votes(codes, posteriors)

    def _sure_as_votes(self, codes: np.ndarray, probs: np.ndarray) -> np.ndarray:
        """Keep of posteriors which label is first, and be as sure of it as votes are behind it, half way to 1."""
        return (best_labels(probs) + self._vote_shares(codes)) / 2


def _step(answers: Answers, parameters: _Parameters, probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One step of variational EM: expected logarithms of the new trust and spam, as weights."""
    rows, voters, codes = answers.cells
    trust, spam, _ = parameters
    guess, known = trust[voters, 0] * spam[voters, codes], trust[voters, 1]
    # How probable it is that a voter knew: that its answer is the label, times its share of what could have made it.
    knows = probs[rows, codes] * known / (guess + known)
    num_voters, num_labels = spam.shape
    new_trust = np.stack([np.bincount(voters, part, num_voters) for part in (1 - knows, knows)], axis=1)
    new_spam = np.bincount(voters * num_labels + codes, 1 - knows, num_voters * num_labels).reshape(spam.shape)
    return _log_mean_weights(new_trust + _TRUST_PRIOR), _log_mean_weights(new_spam + _SPAM_PRIOR)


def _label_posteriors(answers: Answers, parameters: _Parameters) -> tuple[np.ndarray, float]:
    """Posteriors `(num_rows, num_labels)`, and the log-likelihood of all votes."""
    (rows, voters, codes), num_rows, num_labels = answers.cells, len(answers.codes), answers.num_codes
    trust, spam, prior = parameters
    guess, known = trust[voters, 0] * spam[voters, codes], trust[voters, 1]
    # log1p: what a voter hardly knows still tells which label is before another
    logs = np.bincount(rows * num_labels + codes, np.log1p(known / guess), num_rows * num_labels)
    logits = logs.reshape(num_rows, num_labels) + np.bincount(rows, np.log(guess), num_rows)[:, None] + np.log(prior)
    top = logits.max(axis=1, keepdims=True)
    # Less the greatest, because hundreds of voters make sums of logarithms that exp cannot hold.
    probs = np.exp(logits - top)
    total = probs.sum(axis=1, keepdims=True)
    return probs / total, float((top + np.log(total)).sum())


def _shares(values: np.ndarray) -> np.ndarray:
    return values / values.sum(axis=-1, keepdims=True)


def _log_mean_weights(counts: np.ndarray) -> np.ndarray:
    """exp of the expected logarithm under a Dirichlet distribution."""
    values = torch.from_numpy(counts)
    return (values.digamma() - values.sum(dim=1, keepdim=True).digamma()).exp().numpy()

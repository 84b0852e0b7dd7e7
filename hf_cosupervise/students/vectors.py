"""A student that reads vectors: standardised, through hidden layers where it has any, to a logit for each label."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from ..data.columns import find_input_column, shorten
from ..data.vectors import VECTOR_INPUT, VECTOR_MODEL, check_vectors, join_columns, measure_vectors, name_columns
from ..models.source import ModelSource, explained

logger = logging.getLogger(__name__)

# What is asked for by a word in place of an id: the sizes of its hidden layers.
VECTOR_STUDENTS: Mapping[str, tuple[int, ...]] = {"linear": (), "mlp": (64,)}
SKLEARN_FILE = "model.skops"
# A spread below this is rounding, or one whose square float32 cannot hold: the number tells nothing.
_LEAST_SPREAD = 1e-18
# Of a spread, what may be lost where float32 rounds numbers far from zero.
_MOST_ROUNDING = 1e-3


class VectorClassifierConfig(PretrainedConfig):
    """Configure [`VectorClassifier`].

    Args:
        num_features (`int`, *optional*, defaults to 1):
            How many numbers a vector holds.
        hidden_sizes (`Sequence[int]`, *optional*, defaults to `()`):
            Sizes of the hidden layers, with a ReLU behind each; none for a linear classifier.
        feature_names (`Sequence[str]`, *optional*):
            What the numbers are, where it is known.
        kwargs: Passed on to [`~transformers.PretrainedConfig`], such as `id2label`.

    Raises:
        ValueError: If a size is no whole number of at least 1, or there are not as many names as features.
    """

    model_type = VECTOR_MODEL

    def __init__(
        self,
        num_features: int = 1,
        hidden_sizes: Sequence[int] = (),
        feature_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        is_list = isinstance(hidden_sizes, list | tuple)
        sizes: list[Any] = [num_features, *(hidden_sizes if is_list else ())]
        if not is_list or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes):
            raise ValueError(
                "`num_features` and `hidden_sizes` must be a whole number of at least 1 and a list of such, empty for "
                f"a linear classifier, got {num_features!r} and {hidden_sizes!r}. Correct them."
            )
        if feature_names is not None and len(feature_names) != num_features:
            raise ValueError(
                f"`feature_names` must name each of the {num_features} features, got {len(feature_names)} names. Name "
                "all, or leave them out."
            )
        self.num_features = num_features
        self.hidden_sizes = list(hidden_sizes)
        self.feature_names = None if feature_names is None else [str(name) for name in feature_names]
        self.feature = {"kind": "values"}  # by which its scikit-learn form is read as a teacher
        super().__init__(**kwargs)


class _Body(nn.Sequential):
    """Standardise, and go through the hidden layers."""

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, num_features: int, layers: Sequence[nn.Module]) -> None:
        super().__init__(*layers)
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("scale", torch.ones(num_features))

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Give what the classifier reads."""
        # Not as a weight and a bias, in which numbers far from zero would drown.
        return super().forward((vectors - self.mean) / self.scale)


class VectorClassifier(PreTrainedModel):
    """Classify vectors by a linear layer on standardised numbers, or by a small network.

    What `save_model` leaves of it loads without this package too: `model.safetensors` holds the weights of a plain
    `torch.nn.Sequential` beside mean and scale, and `model.skops` the same as a pipeline of scikit-learn.

    Args:
        config (`VectorClassifierConfig`):
            Sizes, and the labels.

    Examples:
        >>> config = VectorClassifierConfig(num_features=2, hidden_sizes=[4], id2label={0: "no", 1: "yes"})
        >>> VectorClassifier(config)(torch.zeros(3, 2)).logits.shape
        torch.Size([3, 2])
    """

    backbone: _Body
    config_class = VectorClassifierConfig
    base_model_prefix = "backbone"
    main_input_name = VECTOR_INPUT
    config: VectorClassifierConfig

    def __init__(self, config: VectorClassifierConfig) -> None:
        super().__init__(config)
        sizes = [config.num_features, *config.hidden_sizes]
        layers: list[nn.Module] = []
        for size, next_size in zip(sizes, sizes[1:]):
            layers += [nn.Linear(size, next_size), nn.ReLU()]
        self.backbone = _Body(config.num_features, layers)
        self.classifier = nn.Linear(sizes[-1], config.num_labels)
        self.is_fresh = False  # whether hidden layers are random, and frozen would stay so
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.reset_parameters()

    def forward(self, vectors: torch.Tensor, labels: torch.Tensor | None = None) -> SequenceClassifierOutput:
        """Give logits.

        Args:
            vectors (`torch.Tensor` of shape `(batch, num_features)`):
                As they are in the data: they are standardised here.
            labels (`torch.LongTensor` of shape `(batch,)`, *optional*):
                Label ids, for the cross-entropy as `loss`.

        Returns:
            [`~transformers.modeling_outputs.SequenceClassifierOutput`]: `logits` of shape `(batch, num_labels)`.
        """
        logits = self.classifier(self.backbone(vectors))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def predict_proba(self, vectors: Any) -> np.ndarray:
        """Give the probability of each label, as scikit-learn does.

        Args:
            vectors (`np.ndarray` of shape `(num_rows, num_features)`):
                As they are in the data.

        Returns:
            `np.ndarray` of shape `(num_rows, num_labels)`, float32: rows sum to 1.

        Raises:
            ValueError: If the vectors are of another shape.
        """
        values = np.asarray(vectors, dtype=np.float32)
        if values.ndim != 2 or values.shape[1] != self.config.num_features:
            raise ValueError(
                f"`vectors` must be of shape (num_rows, {self.config.num_features}), got {values.shape}. Give a row "
                "for each example."
            )
        logits = self.eval()(torch.from_numpy(values).to(self.device)).logits
        return logits.float().softmax(dim=1).cpu().numpy()

    @classmethod
    def for_data(
        cls,
        dataset: Dataset,
        column: str | Sequence[str] | None,
        labels: Sequence[str],
        *,
        hidden_sizes: Sequence[int] = (),
        seed: int = 42,
    ) -> VectorClassifier:
        """Make a fresh classifier that standardises as fits some data; no label is read.

        Args:
            dataset (`datasets.Dataset`):
                The data to learn from.
            column (`str` or `Sequence[str]`, *optional*):
                The column of vectors, or several columns of numbers. Found where only one can be meant.
            labels (`Sequence[str]`):
                The task's label names.
            hidden_sizes (`Sequence[int]`, *optional*, defaults to `()`):
                See [`VectorClassifierConfig`].
            seed (`int`, *optional*, defaults to 42):
                Seed of the weights.

        Returns:
            [`VectorClassifier`]

        Raises:
            ValueError: If vectors are of different lengths or not finite, or `hidden_sizes` are no sizes.
            TypeError: If columns do not hold numbers.
        """
        dataset, name = join_columns(dataset, name_columns(column))
        name = find_input_column(dataset, name)
        if not (num_features := check_vectors(dataset, name)):
            raise ValueError(f"Column '{name}' must hold a vector in some row, got none. Name another column.")
        parts = name.split(", ")
        config = VectorClassifierConfig(
            num_features,
            hidden_sizes,
            parts if len(parts) == num_features > 1 else None,
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
        )
        # The user's own random numbers stay as they are.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(config)
        model.is_fresh = bool(config.hidden_sizes)
        mean, spread = measure_vectors(dataset, name)
        rounding = np.abs(mean) * np.finfo(np.float32).eps
        is_constant = spread <= np.maximum(rounding / 2, _LEAST_SPREAD)
        lost = np.flatnonzero(~is_constant & (rounding > _MOST_ROUNDING * spread))
        if len(lost):
            places = [parts[place] if config.feature_names else place for place in lost.tolist()]
            logger.warning(
                f"Numbers at {shorten(places)} of '{name}' lie so far from zero that float32, in which they are read, "
                "rounds away a part of what they vary by. Subtract about their mean from them first."
            )
        model.backbone.mean.copy_(torch.from_numpy(mean))
        model.backbone.scale.copy_(torch.from_numpy(np.where(is_constant, 1.0, spread)))
        return model

    def card_facts(self) -> dict[str, Any]:
        """Give what a card needs to show how it is loaded."""
        return {
            "num_features": self.config.num_features,
            "hidden_sizes": list(self.config.hidden_sizes),
            "feature_names": self.config.feature_names,
            "has_sklearn": find_spec("skops") is not None,
        }


def read_vector_config(source: ModelSource) -> VectorClassifierConfig:
    """Read the configuration of a saved classifier of vectors: sizes and names, and nothing else of a stranger's."""
    # The rest of that file, names of labels too, is set by who loads it.
    known: dict[str, Any] = {
        name: source.config.get(name) for name in ("num_features", "hidden_sizes", "feature_names")
    }
    with explained(source, "configuration"):
        return VectorClassifierConfig(**known)


def save_for_sklearn(model: VectorClassifier, folder: Path) -> None:
    """Write the same classifier as a pipeline of scikit-learn, kept by skops; a word where they are not installed."""
    try:
        import skops.io
        from sklearn.linear_model import LogisticRegression
        from sklearn.neural_network import MLPClassifier
        from sklearn.pipeline import Pipeline
        from sklearn.preprocessing import LabelBinarizer, StandardScaler
    except ImportError:
        logger.info(f"'{SKLEARN_FILE}' is not written: it takes `pip install \"hf_cosupervise[sklearn]\"`.")
        return
    classes = np.array([model.config.id2label[index] for index in range(model.config.num_labels)])
    # As scikit-learn computes.
    weights = {name: value.detach().cpu().double().numpy() for name, value in model.state_dict().items()}
    scaler = StandardScaler()
    scaler.mean_, scaler.scale_ = weights["backbone.mean"], weights["backbone.scale"]
    # What `fit` would set besides, so that it counts as fitted.
    scaler.var_, scaler.n_features_in_, scaler.n_samples_seen_ = scaler.scale_**2, len(scaler.mean_), 1
    layers = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
    coefs = [weights[f"{layer}.weight"].T for layer in layers]
    biases = [weights[f"{layer}.bias"] for layer in layers]
    if is_binary := len(classes) == 2:  # for which scikit-learn has one output, of the second label
        coefs[-1], biases[-1] = coefs[-1][:, 1:] - coefs[-1][:, :1], biases[-1][1:] - biases[-1][:1]
    if not model.config.hidden_sizes:
        last: Any = LogisticRegression()
        last.coef_, last.intercept_, last.n_iter_ = coefs[0].T.copy(), biases[0], np.array([0])
    else:
        last = MLPClassifier(tuple(model.config.hidden_sizes))
        last.coefs_, last.intercepts_, last.n_layers_ = coefs, biases, len(coefs) + 1
        last.n_outputs_, last.out_activation_ = len(biases[-1]), "logistic" if is_binary else "softmax"
        # Not by `fit`, which sorts: labels stand in the order of the logits.
        last._label_binarizer = binarizer = LabelBinarizer()
        binarizer.classes_, binarizer.sparse_input_ = classes, False
        binarizer.y_type_ = "binary" if is_binary else "multiclass"
    last.classes_, last.n_features_in_ = classes, len(scaler.mean_)
    skops.io.dump(Pipeline([("scaler", scaler), ("classifier", last)]), folder / SKLEARN_FILE)

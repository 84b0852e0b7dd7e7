"""The model that learns: asked about any examples, trained anew, and put back as it was."""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import EvalPrediction

from ..data.columns import LABEL_NAMES, find_label_column, read_labels
from ..data.inputs import InputProcessor, check_depth
from ..data.vectors import with_input
from ..method.linear_head import linear_logits
from ..method.metrics import check_metric, measure_labels
from ..models.source import first_line
from ..processes import Processes, row_chunks
from .features import FeatureStore, row_digests
from .head import hash_weights, head_gives_logits, linear_head, name_labels, on_cpu, prepare_student
from .loading import load_pinned_student
from .pooling import has_pooling
from .vectors import VECTOR_STUDENTS, VectorClassifier

logger = logging.getLogger(__name__)
# Students that hold their backbone still, by their model: another student of the same model need not ask it again.
_STILL: dict[nn.Module, Student] = {}


def open_student(
    model: Any,
    labels: tuple[str, ...],
    args: Any,
    processing_class: Any = None,
    peft_config: LoraConfig | None = None,
    inputs: Dataset | None = None,
) -> tuple[PreTrainedModel | PeftModel, Any, dict[str, Any]]:
    """Load a student where it is named, or make it for its inputs, see that it fits the task, and freeze the rest."""
    origin: dict[str, Any] = {}
    if isinstance(model, str) and model in VECTOR_STUDENTS and inputs is not None:
        sizes = VECTOR_STUDENTS[model]
        model = VectorClassifier.for_data(inputs, inputs.column_names[0], labels, hidden_sizes=sizes, seed=args.seed)
    if isinstance(model, (str, os.PathLike)):
        revision, training = args.student_revision, args.student_training
        model, loaded, origin = load_pinned_student(
            model, labels, revision=revision, seed=args.seed, training=training, pooling=args.pooling
        )
        processing_class = loaded if processing_class is None else processing_class
    elif args.pooling is not None and not has_pooling(model, args.pooling):
        raise ValueError(
            f"`pooling` is for a student that is named, got {args.pooling!r} beside a {type(model).__name__}. Load it "
            f"with `load_student(model, pool.labels, pooling={args.pooling!r})`."
        )
    _check_weights(model)
    check_student(model, labels)
    if isinstance(model, VectorClassifier):
        _check_vector_training(model, args.student_training)
    elif processing_class is None:
        raise ValueError(
            "`processing_class` (the student's tokenizer or image processor) is needed beside a model object."
        )
    adapters = peft_config or LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=list(args.lora_target_modules) or None,
    )
    student = prepare_student(model, args.student_training, adapters, seed=args.seed)
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ValueError(
            f"`student_training` {args.student_training!r} needs weights that learn, got a {type(model).__name__} all "
            "of which are frozen. Call `model.requires_grad_(True)`, or load adapters with `is_trainable=True`."
        )
    if isinstance(student, PeftModel) and origin:
        # Or the adapter alone would be put on whatever the base's main branch is by then.
        student.peft_config[student.active_adapter].revision = origin["commit"]
    return student, processing_class, origin


def _check_vector_training(model: VectorClassifier, training: str) -> None:
    if training == "lora":
        raise ValueError(
            "A student of vectors is small and is trained itself, got `student_training` 'lora'. Use 'full', or "
            "'probe' where it is linear."
        )
    if training == "probe" and model.is_fresh:
        raise ValueError(
            "A new student with hidden layers must be trained as a whole, got `student_training` 'probe', which would "
            f"leave the layers {model.config.hidden_sizes} random. Use 'full', or a student 'linear'."
        )


def _check_weights(model: Any) -> None:
    """See that a model has weights that can be trained, and train them in float32, as those of an id."""
    if not isinstance(model, (PreTrainedModel, PeftModel)):
        raise TypeError(
            "`model` must be a Hub id, a folder, a `PreTrainedModel` or a `PeftModel`, got "
            f"{type(model).__name__}. Save a model of your own as one that transformers loads."
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"A student must have its weights in memory, got a {type(model).__name__} on the device 'meta'. Load it "
            "with `from_pretrained`."
        )
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    # Quantised weights stay as they are, beside adapters that learn.
    if dtypes != {torch.float32} and not getattr(model, "is_quantized", False):
        found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes - {torch.float32}))
        logger.warning(
            f"The weights of {type(model).__name__} are changed from {found} to float32, in which students are "
            "trained. For half precision use `bf16=True`."
        )
        model.float()


def check_answers(model: Any, processor: InputProcessor, num_labels: int) -> None:
    """See that a model object answers with a logit for each label, whatever its class."""
    if model in _STILL:
        return
    # It is the user's own object: it is asked, and left in the mode in which it came.
    was_training = model.training
    inputs = {name: value.to(model.device) for name, value in processor.probe().items()}
    model.eval()
    try:
        with torch.no_grad():
            logits = getattr(model(**inputs), "logits", None)
        found = "an answer without `logits`" if logits is None else f"logits of shape {tuple(logits.shape)}"
        shape = None if logits is None else tuple(logits.shape)
    # What a model's own code may raise for inputs that it does not take.
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        found, shape = f"{type(error).__name__}: {first_line(error)}", None
    finally:
        model.train(was_training)
    wanted = (2, num_labels)
    if shape != wanted:
        plain = model.get_base_model() if isinstance(model, PeftModel) else model
        raise ValueError(
            f"A student must answer two examples with logits of shape {wanted}, got {found} from "
            f"{type(plain).__name__}. Load a classifier with `load_student(model, pool.labels)`."
        )


def check_student(model: Any, labels: tuple[str, ...]) -> None:
    """See that the head fits the task, and name its labels."""
    num_labels = int(model.config.num_labels)
    if model.config.model_type == "reformer":
        raise ValueError(
            "A student must answer alike whenever it is asked, and learn from texts of any length, got a Reformer, "
            "which hashes at random and is trained on one length only. Use another encoder of long texts, such as "
            "Longformer or BigBird."
        )
    if num_labels != len(labels):
        raise ValueError(
            f"The student must have {len(labels)} labels like the pool, got {num_labels}. "
            "Load it with `load_student(model, pool.labels)`."
        )
    # Names that transformers made up say nothing of an order; names of a task do.
    names = [str(model.config.id2label[index]) for index in range(num_labels)]
    generic = [f"LABEL_{index}" for index in range(num_labels)]
    if names not in (generic, list(labels)):
        raise ValueError(
            f"The student's labels must be those of the pool in the same order, {list(labels)[:8]}, got {names[:8]}. "
            "Load it with `load_student(model, pool.labels)`."
        )
    name_labels(model.config, labels)


class Student:
    """Ask the model that learns, and put it back as it was at another time."""

    def __init__(
        self,
        model: Any,
        processor: InputProcessor,
        examples: Dataset,
        input_column: str,
        labels: tuple[str, ...],
        args: Any,
        features_dir: Path,
        *,
        answered: np.ndarray | None = None,
        processes: Processes | None = None,
        prepare_inputs: Callable[[dict[str, Any]], dict[str, Any]] = lambda inputs: inputs,
        disable_tqdm: bool = True,
    ) -> None:
        self.model, self.processor, self.labels = model, processor, labels
        self.examples, self.input_column = examples, input_column
        self._answered = np.ones(len(examples), dtype=bool) if answered is None else answered
        self.args, self.disable_tqdm = args, disable_tqdm
        self.features_dir = Path(args.features_dir) if args.features_dir else features_dir
        self.processes = processes or Processes(0, 1)
        self._prepare_inputs = prepare_inputs
        self.folds: list[nn.Linear] = []
        # On the CPU: a second model on the device would halve what it can hold.
        self._first = {name: value.detach().cpu().clone() for name, value in self._trained().items()}
        self.head = self._find_head() if args.student_training == "probe" else None
        self._features: torch.Tensor | None = None
        self._neighbors: torch.Tensor | None = None
        self.known: dict[str, Any] = {}  # what was found out about the examples and their features
        # Both hash all weights: who trains members of a committee knows that none of them changes the backbone.
        self._digest: str | None = None
        self._store: FeatureStore | None = None

    def _find_head(self) -> nn.Linear | None:
        """Find the head if the rest of the student can be replaced by its features."""
        if (other := _STILL.get(self.model)) is not None:
            return other.head
        head = linear_head(self.model.eval())
        if head is None or not len(self.examples):
            return None
        inputs = self._prepare_inputs(self.processor.probe())  # not a row: the first one may be missing
        return head if head_gives_logits(self.model, head, inputs) else None

    # --- what training changes ---------------------------------------------------------------------------------------

    def _trained(self) -> dict[str, torch.Tensor]:
        """What training can change: parameters that learn, and buffers where the backbone is not frozen."""
        tensors: dict[str, torch.Tensor] = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        # Running means of a frozen backbone stand still, for it is never in training mode.
        return tensors if self.args.student_training == "probe" else tensors | dict(self.model.named_buffers())

    def tensors(self) -> dict[str, torch.Tensor]:
        """Give what training can change."""
        return on_cpu(self._trained())

    def buffers(self) -> dict[str, torch.Tensor]:
        """Give what training changes without a gradient, such as running means, which adapters leave out."""
        return on_cpu({name: value for name, value in self._trained().items() if not value.requires_grad})

    @torch.no_grad()
    def put_back(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write over what training changed."""
        own = self._trained()
        # Into the tensors that are there: an optimizer and a hook hold these, not their names.
        for name, value in tensors.items():
            own[name].copy_(value)

    def start_anew(self) -> None:
        """Be as it was before any training: every level starts from the same fresh head."""
        self.put_back(self._first)

    def restore(self, saved: Any) -> None:
        """Be as at the end of a finished stage, with its `student` and `folds`, or as before the first one."""
        self.folds = []
        if saved is None:
            self.start_anew()
            return
        self.put_back(saved.student)
        # Folds of a run with another kind of student cannot be asked by this one.
        for tensors in saved.folds if self.head is not None else []:
            self.folds.append(self.copy_head())
            self.folds[-1].load_state_dict(tensors)

    def fold_tensors(self) -> list[dict[str, torch.Tensor]]:
        """Give the heads of the folds."""
        return [on_cpu(head.state_dict()) for head in self.folds]

    def copy_head(self) -> nn.Linear:
        """Copy the head of a frozen backbone as it is now."""
        return copy.deepcopy(self._linear_head())

    def _linear_head(self) -> nn.Linear:
        if self.head is None:
            raise ValueError("Only a linear head on a frozen backbone has features, got another kind of student.")
        return self.head

    def digest(self) -> str:
        """Hash all weights, as they were before any training."""
        if self._digest is not None:
            return self._digest
        # The same at any time: a run that is gone on with compares it.
        weights = {name: self._first.get(name, value) for name, value in self.model.state_dict().items()}
        return hash_weights(hashlib.blake2b(digest_size=8), weights)

    # --- asking it ---------------------------------------------------------------------------------------------------

    @cached_property
    def readable(self) -> np.ndarray:
        """`np.ndarray` of shape `(num_examples,)`: Which examples it can read and somebody answered."""
        is_readable = self._holds_input(self.examples)
        if num_lost := int((self._answered & ~is_readable).sum()):
            logger.warning(
                f"{num_lost} of {len(is_readable)} examples are answered but hold nothing that the student can read: "
                "no input, or a text without a token. They are left out."
            )
        # What nobody answered is read too where the student is to label it itself.
        return is_readable & (self._answered | bool(getattr(self.args, "self_training_rounds", 0)))

    def _find_readable(self, dataset: Dataset) -> np.ndarray:
        # Known already, and its warning is given once.
        if dataset is self.examples:
            return self.readable
        check_depth(dataset, self.input_column)
        return self._holds_input(dataset)

    def _holds_input(self, dataset: Dataset) -> np.ndarray:
        # What stands beside features that were put in may be a name only.
        needs_tokens = self.head is None or not self.store.is_written
        return self.processor.find_readable(dataset, self.input_column, needs_tokens=needs_tokens)

    @torch.no_grad()
    def predict_log_probs(self, dataset: Dataset, *, share: bool = False) -> Iterator[tuple[slice, torch.Tensor]]:
        """Stream log-probabilities, a chunk of rows at a time; of what it cannot read, all labels are alike."""
        dataset = with_input(dataset, self.input_column)
        chunks = self.processes.share(row_chunks(len(dataset))) if share else row_chunks(len(dataset))
        yield from self._log_probs(dataset, self._find_readable(dataset), chunks)

    def _log_probs(
        self, dataset: Dataset, readable: np.ndarray, chunks: Iterable[slice]
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        if self.head is not None:
            # Before the loop: every process takes part in making them, also one without a chunk of its own.
            features = self._read_features(dataset, readable)
            for chunk in chunks:
                log_probs = torch.log_softmax(linear_logits(self.head, features[chunk]), dim=1).cpu()
                yield chunk, self._without(~readable[chunk], log_probs)
            return
        self.model.eval()  # training leaves it in another mode
        for chunk in chunks:
            rows, size = chunk.start + np.flatnonzero(readable[chunk]), self.args.per_device_eval_batch_size
            logits = [self._logits(dataset[rows[start : start + size]]) for start in range(0, len(rows), size)]
            # Batches never reach over the end of a chunk, so that results do not hang on the number of processes.
            log_probs = torch.zeros(chunk.stop - chunk.start, len(self.labels))
            if logits:
                log_probs[rows - chunk.start] = torch.log_softmax(torch.cat(logits), dim=1).cpu()
            yield chunk, self._without(~readable[chunk], log_probs)

    def _without(self, unreadable: np.ndarray, log_probs: torch.Tensor) -> torch.Tensor:
        log_probs[torch.from_numpy(unreadable)] = -math.log(len(self.labels))
        return log_probs

    def _logits(self, examples: dict[str, list[Any]]) -> torch.Tensor:
        inputs = self._prepare_inputs(self.processor(examples[self.input_column]))
        return self.model(**inputs).logits.float()

    def judge_examples(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Stream what it says of this process's share of the examples that it learns from."""
        if not self.folds:
            yield from self.predict_log_probs(self.examples, share=True)
            return
        features, num_folds = self.example_features(), len(self.folds)
        for chunk in self.processes.share(row_chunks(len(self.examples))):
            logits = torch.empty(chunk.stop - chunk.start, len(self.labels))
            for fold, head in enumerate(self.folds):
                # Each by the head that has not learned from it, or it would only tell what it was told.
                first = (fold - chunk.start) % num_folds  # example i is in fold i modulo their number
                logits[first::num_folds] = linear_logits(head, features[chunk][first::num_folds]).cpu()
            yield chunk, self._without(~self.readable[chunk], torch.log_softmax(logits, dim=1))

    def predict_labels(self, dataset: Dataset) -> np.ndarray:
        """Give the most probable label of each example, -1 where there is nothing that it can read."""
        dataset = with_input(dataset, self.input_column)
        readable, labels = self._find_readable(dataset), np.full(len(dataset), -1, dtype=np.int64)
        with torch.no_grad():
            for chunk, log_probs in self._log_probs(dataset, readable, row_chunks(len(dataset))):
                # By numpy, which gives a tie to the first label; torch promises that on no device.
                labels[chunk] = np.where(readable[chunk], log_probs.numpy().argmax(axis=1), -1)
        return labels

    def measure(self, dataset: Dataset, metric: str | None = None) -> dict[str, float]:
        """Measure accuracy and the configuration's `metric`, or another one, on labelled data."""
        labels = read_labels(dataset, find_label_column(dataset), self.labels)
        check_metric(metric := self.args.metric if metric is None else metric, len(self.labels))
        return measure_labels(self.predict_labels(dataset), labels, metric)

    def measure_accuracy(self, dataset: Dataset) -> float:
        """Measure the accuracy on labelled data."""
        return self.measure(dataset, "accuracy")["accuracy"]

    def label(self, dataset: Any) -> Any:
        """Reduce an evaluation set, or several by name, to inputs and label ids of the task."""
        return label_inputs(dataset, self.input_column, self.labels, self.processor)

    def label_or_check(self, dataset: Any) -> Any:
        """Reduce a data set as [`label`] does where it has labels, and see that it can be read where it has none."""
        if any(name in dataset.column_names for name in LABEL_NAMES):
            return self.label(dataset)
        dataset = with_input(dataset, self.input_column)
        _check_inputs(dataset, self.input_column, self.processor)
        return dataset

    # --- features, where it is a linear head on a frozen backbone ----------------------------------------------------

    @property
    def store(self) -> FeatureStore:
        """[`FeatureStore`]: Where the head's inputs are kept; features computed elsewhere can be put there."""
        head = self._linear_head()
        # Features are those of a backbone without dropout, whose running means stand still.
        self.model.eval()
        if self._store is not None:
            return self._store
        # Part of the key: features of another precision are other numbers.
        precision = "bfloat16" if self.args.bf16 else "float16" if self.args.fp16 else "float32"
        kept = self.features_dir, self.model, head, self.processor
        return FeatureStore(*kept, precision=precision, dtype=self.args.features_dtype)

    def features(self, dataset: Dataset) -> torch.Tensor:
        """Give the head's inputs."""
        dataset = with_input(dataset, self.input_column)
        return self._read_features(dataset, self._find_readable(dataset))

    def _read_features(self, dataset: Dataset, readable: np.ndarray) -> torch.Tensor:
        if dataset is self.examples and self._features is not None:
            return self._features
        values = self.store.features(
            dataset,
            self.input_column,
            batch_size=self.args.per_device_eval_batch_size,
            processes=self.processes,
            disable_tqdm=self.disable_tqdm,
            digests=self._digests(dataset, readable),
        )
        features = torch.from_numpy(values).to(self.args.device)
        if dataset is self.examples:  # every level and every question needs them again
            self._features = features
        return features

    def _digests(self, dataset: Dataset, readable: np.ndarray) -> np.ndarray:
        """Hash what the rows hold; of the examples, which may be many large images, once for all members and uses."""
        if dataset is not self.examples:
            return row_digests(dataset, self.input_column, readable)
        if "digests" not in self.known:
            self.known["digests"] = row_digests(dataset, self.input_column, readable)
        return self.known["digests"]

    def example_features(self) -> torch.Tensor:
        """Give the head's inputs for each example that it learns from."""
        return self.features(self.examples)

    def share(self, other: Student) -> None:
        """Know what another student on the same backbone has found out about the same examples."""
        # Before anybody asks for it: a cached property that is set is never computed.
        self.readable = other.readable
        self._features, self._neighbors, self.known = other._features, other._neighbors, other.known
        self._digest, self._store = other._digest, other._store

    @contextmanager
    def holding_still(self) -> Iterator[None]:
        """Ask the model and hash its weights once, while nobody changes those of the backbone."""
        self._digest, self._store = self.digest(), self.store
        _STILL[self.model] = self
        try:
            yield
        finally:
            self._digest = self._store = None
            del _STILL[self.model]

    def nearest(self, k: int) -> torch.Tensor:
        """Give each example's neighbours in the features: the backbone is frozen, so they are found once."""
        if self._neighbors is None or self._neighbors.shape[1] < k:
            # The nearest few of many are the nearest few: both uses share one search.
            most = max(self.args.agreement_neighbors, self.args.teacher_neighbors)
            asked = self.examples, self.input_column, self.example_features(), most
            digests = self._digests(self.examples, self.readable)
            self._neighbors = self.store.neighbors(*asked, processes=self.processes, digests=digests)
        return self._neighbors[:, :k]


def label_inputs(dataset: Any, input_column: str, labels: tuple[str, ...], processor: InputProcessor) -> Any:
    """Reduce an evaluation set, or several by name, to inputs and label ids."""
    if dataset is None or isinstance(dataset, str):
        return dataset
    if isinstance(dataset, dict):
        return {name: label_inputs(part, input_column, labels, processor) for name, part in dataset.items()}
    ids = read_labels(dataset, find_label_column(dataset), labels)
    dataset = with_input(dataset, input_column)
    _check_inputs(dataset, input_column, processor)
    return dataset.select_columns([input_column]).add_column("labels", ids)


def _check_inputs(dataset: Dataset, column: str, processor: InputProcessor) -> None:
    """Refuse rows that a model cannot read before it reads the first one."""
    check_depth(dataset, column)
    unreadable = np.flatnonzero(~processor.find_readable(dataset, column))
    if len(unreadable):
        raise ValueError(
            f"Column `{column}` must hold what the student can read in every row, got no input, or a text without a "
            f"token, in row {unreadable[0]} ({len(unreadable)} such rows). Leave these rows out."
        )


def prediction_measure(metric: str) -> Callable[[EvalPrediction], dict[str, float]]:
    """Give the default of the `Trainer`'s `compute_metrics`."""
    return lambda found: measure_labels(found.predictions.argmax(axis=1), found.label_ids, metric)

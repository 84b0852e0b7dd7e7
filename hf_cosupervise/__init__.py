"""Co-supervised learning: many weak teachers, one strong student, no ground truth."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_EXPORTS = {
    "functions": ["labeling_function"],
    "hierarchy": ["Teacher", "TeacherHierarchy"],
    "teachers.hub": ["load_hierarchy", "push_hierarchy"],
    "pool.answers": ["AnswerPool"],
    "pool.pseudolabels": ["PseudolabelPool"],
    "pool.votes": ["hierarchy_from_columns", "read_wrench"],
    "method.label_models": ["LABEL_MODELS", "load_label_model", "make_label_model"],
    "pool.derived": ["aggregated_pool", "boosted_pool", "calibrated_pool", "smoothed_pool"],
    "teachers.kinds.prototypes": ["prototype_teacher"],
    "teachers.answers": ["build_answers"],
    "teachers.labeling": ["build_pool"],
    "training.collator": ["DataCollatorForCoSupervision"],
    "training.config": ["CoSupervisedConfig"],
    "students.answers": ["score_answers"],
    "students.loading": ["load_student"],
    "students.vectors": ["VectorClassifier", "VectorClassifierConfig"],
    "training.trainer": ["CoSupervisedTrainer"],
    "training.answers": ["co_supervise_answers"],
    "method.metrics": ["performance_gap_recovered"],
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = [
    "AnswerPool",
    "CoSupervisedConfig",
    "CoSupervisedTrainer",
    "DataCollatorForCoSupervision",
    "LABEL_MODELS",
    "PseudolabelPool",
    "Teacher",
    "TeacherHierarchy",
    "VectorClassifier",
    "VectorClassifierConfig",
    "__version__",
    "aggregated_pool",
    "boosted_pool",
    "build_answers",
    "build_pool",
    "calibrated_pool",
    "co_supervise_answers",
    "hierarchy_from_columns",
    "labeling_function",
    "load_hierarchy",
    "load_label_model",
    "load_student",
    "make_label_model",
    "performance_gap_recovered",
    "prototype_teacher",
    "push_hierarchy",
    "read_wrench",
    "score_answers",
    "smoothed_pool",
]

if TYPE_CHECKING:
    from .functions import labeling_function
    from .hierarchy import Teacher, TeacherHierarchy
    from .method.label_models import LABEL_MODELS, load_label_model, make_label_model
    from .method.metrics import performance_gap_recovered
    from .pool.answers import AnswerPool
    from .pool.derived import aggregated_pool, boosted_pool, calibrated_pool, smoothed_pool
    from .pool.pseudolabels import PseudolabelPool
    from .students.answers import score_answers
    from .students.loading import load_student
    from .students.vectors import VectorClassifier, VectorClassifierConfig
    from .teachers.answers import build_answers
    from .teachers.hub import load_hierarchy, push_hierarchy
    from .teachers.kinds.prototypes import prototype_teacher
    from .teachers.labeling import build_pool
    from .training.answers import co_supervise_answers
    from .training.collator import DataCollatorForCoSupervision
    from .training.config import CoSupervisedConfig
    from .training.trainer import CoSupervisedTrainer


def __getattr__(name: str) -> Any:
    # Importing the trainer takes seconds; a script that only opens a pool should not pay for it.
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__

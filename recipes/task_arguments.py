"""Arguments that the recipes share, each a field of YAML and of the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_cosupervise import CoSupervisedConfig
from hf_cosupervise.evaluation.methods import METHODS

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "digits.yaml"


@dataclass
class DataArguments:
    """Say which data; in an experiment also who gets what of it: `permutation(seed)` shares the training split out."""

    dataset: str = field(
        default="data/digits",
        metadata={
            "help": "Hub id, folder of `save_to_disk`, folder of images, or CSV, TSV, JSON-lines or Parquet file."
        },
    )
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a data set's id."})
    prepare_dataset: str | None = field(
        default=None, metadata={"help": "Function of recipes/prepare.py that makes the folder where it is missing."}
    )
    train_split: str = field(default="train", metadata={"help": "Split that is shared out."})
    test_split: str | None = field(
        default=None,
        metadata={"help": "Labelled split to test on. Default: none; in an experiment what is left over."},
    )
    test_dataset: str | None = field(
        default=None, metadata={"help": "Labelled data to test on, given like `dataset`, instead of `test_split`."}
    )
    input_column: str | None = field(
        default=None,
        metadata={
            "help": "Column that the student reads, or several of numbers with commas, read as one vector. Default: "
            "found where only one can be meant."
        },
    )
    label_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of ground truth in data of one's own, for the test and the ceiling alone. Undeclared ones "
            "are dropped. For a folder of images: `label`, the name of each image's own folder."
        },
    )
    labels: list[str] | None = field(
        default=None, metadata={"help": "The task's labels. Default: those that the teachers name."}
    )
    on_error: str = field(
        default="raise", metadata={"help": "Rows of one's own that cannot be read: 'raise', or leave them 'missing'."}
    )
    num_teacher_examples: int = field(
        default=400, metadata={"help": "First examples of an experiment, labelled, for its weak teachers."}
    )
    num_pool_examples: int = field(
        default=1000, metadata={"help": "Unlabelled examples for the student of an experiment."}
    )
    pool_from_end: bool = field(
        default=False, metadata={"help": "Take the pool from the end, not after the teachers'."}
    )
    num_heldout_examples: int = field(
        default=0,
        metadata={
            "help": "Labelled examples that neither teachers nor pool see; without `test_split` nor the test. In data "
            "of one's own, with `label_column`: the first of a seeded order, for `calibrate_teachers`."
        },
    )
    split_seed_offset: int = field(default=0, metadata={"help": "Added to the seed of the permutation."})
    oracle_domain_column: str | None = field(
        default=None,
        metadata={"help": "Column with the domain, known to the teachers' training and to analysis only."},
    )


@dataclass
class StudentArguments:
    """Say which strong student."""

    student: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of a pre-trained model; `linear` or `mlp` for data of vectors."},
    )
    prepare_student: str | None = field(
        default=None, metadata={"help": "Function of recipes/prepare.py that makes the folder where it is missing."}
    )
    pretrain: str | None = field(
        default=None,
        metadata={"help": "Function of recipes/pretrain.py that makes a student from the unlabelled pool alone."},
    )
    pretrain_kwargs: dict = field(default_factory=dict, metadata={"help": "Its arguments."})


@dataclass
class RecipeArguments:
    """Say what is compared."""

    seeds: str = field(default="0", metadata={"help": "Seeds, separated by commas."})
    methods: list[str] | None = field(
        default=None,
        metadata={
            "help": f"What is compared on labelled examples. Default: {', '.join(METHODS)}; with data of one's own "
            "the student beside generalist and ensemble, and the ceiling where the data have labels."
        },
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Only say what would be done with data of one's own, and how long it takes."}
    )
    control: bool = field(default=True, metadata={"help": "Also train on one teacher that saw all the labels."})
    resume: bool = field(
        default=True,
        metadata={"help": "Go on with the run in `output_dir`, where there is one; False: refuse such a folder."},
    )
    calibrate_teachers: bool = field(
        default=False, metadata={"help": "Fit a temperature per teacher to the `num_heldout_examples`."}
    )

    def __post_init__(self) -> None:
        read_seeds(self.seeds)


@dataclass
class TeacherArguments:
    """Say what kind of teachers are trained, how weak, and who knows what."""

    teacher_kind: str = field(
        default="transformers",
        metadata={"help": "'transformers' (from a configuration) or 'sklearn' (kept by skops)."},
    )
    teacher_model: str = field(
        default="resnet",
        metadata={
            "help": "A model type of transformers such as 'resnet', or a class such as 'tree.DecisionTreeClassifier'."
        },
    )
    teacher_kwargs: dict = field(
        default_factory=dict, metadata={"help": "Arguments of the configuration or of the scikit-learn class."}
    )
    teacher_vectorizer: str | None = field(
        default=None,
        metadata={"help": "Class that makes a text's features, such as 'feature_extraction.text.TfidfVectorizer'."},
    )
    teacher_vectorizer_kwargs: dict = field(default_factory=dict, metadata={"help": "Its arguments."})
    teacher_num_examples: int | None = field(
        default=None, metadata={"help": "Labelled examples per teacher, drawn from its scope. Default: all of them."}
    )
    teacher_steps: int = field(default=300, metadata={"help": "Optimizer steps of a transformers teacher."})
    teacher_learning_rate: float = field(default=1e-2, metadata={"help": "Adam's learning rate for such a teacher."})
    teacher_processor: dict = field(
        default_factory=dict, metadata={"help": "Arguments of such a teacher's image processor, `class` among them."}
    )
    teacher_feature: dict = field(
        default_factory=dict,
        metadata={"help": "How an example becomes a scikit-learn teacher's features: kind, size …"},
    )
    teacher_trusted_types: list[str] = field(
        default_factory=list, metadata={"help": "Types in a skops file that you trust beyond those that skops does."}
    )
    level_sizes: list[int] = field(
        default_factory=lambda: [1, 2, 5],
        metadata={"help": "Teachers per level; each level shares the task out evenly."},
    )
    specialize_by: str = field(
        default="label",
        metadata={
            "help": "Share out the 'label's, the 'domain's, or the 'examples', so that all teachers know everything."
        },
    )
    labels_per_teacher: int | None = field(
        default=None,
        metadata={
            "help": "Let each specialist know so many neighbouring labels of a seeded order, which overlap with those "
            "of the next, and tell nobody. Default: a share of its own of the labels, told as `scope`."
        },
    )
    teachers: list[Any] = field(
        default_factory=list,
        metadata={
            "help": "Teachers that need no training: a hierarchy by its path or Hub id, or single ones by theirs, or "
            "by a column of the data, with a level in front (`1:org/cats`); in YAML the fields of `Teacher` too."
        },
    )
    teachers_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder where the teachers are, or are put; with `teachers_revision` a hierarchy's id on the Hub. "
            "Default: in the run."
        },
    )
    teachers_revision: str | None = field(
        default=None, metadata={"help": "Branch (such as 'main'), tag or commit of teachers on the Hub."}
    )


# What says nothing of data of one's own with teachers of one's own.
FOR_EXPERIMENTS = (
    *("prepare_dataset", "num_pool_examples", "pool_from_end", "oracle_domain_column"),
    *("prepare_student", "pretrain", "pretrain_kwargs", "control"),
)
RECIPE_TYPES = [DataArguments, TeacherArguments, StudentArguments, RecipeArguments, CoSupervisedConfig]


def read_seeds(text: str) -> list[int]:
    """Read seeds that are separated by commas."""
    seeds = [int(part) if part.strip().isdecimal() else -1 for part in str(text).split(",")]
    if len({*seeds}) < len(seeds) or not all(0 <= seed < 2**32 for seed in seeds):
        raise ValueError(
            "`seeds` must be different whole numbers from 0 to 2**32 - 1 with commas between them, got "
            f"{text!r}. Write 0,1,2 or leave it out for 0."
        )
    return seeds

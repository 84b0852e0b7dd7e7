"""Arguments that the recipes share, each a field of YAML and of the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from hf_cosupervise import CoSupervisedConfig
from hf_cosupervise.evaluation.methods import METHODS

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "digits.yaml"


@dataclass
class DataArguments:
    """Say which data, and who gets what of it: `permutation(seed)` shares the training split out."""

    dataset: str = field(default="data/digits", metadata={"help": "Folder of `save_to_disk`, or Hub id."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a data set's id."})
    prepare_dataset: str | None = field(
        default=None, metadata={"help": "Function of recipes/prepare.py that makes the folder where it is missing."}
    )
    train_split: str = field(default="train", metadata={"help": "Split that is shared out."})
    test_split: str | None = field(default=None, metadata={"help": "Split to test on. Default: what is left over."})
    num_teacher_examples: int = field(default=400, metadata={"help": "First examples, labelled, for the teachers."})
    num_pool_examples: int = field(default=1000, metadata={"help": "Unlabelled examples for the student."})
    pool_from_end: bool = field(
        default=False, metadata={"help": "Take the pool from the end, not after the teachers'."}
    )
    num_heldout_examples: int = field(
        default=0,
        metadata={"help": "Labelled examples that neither teachers nor pool see; without `test_split` nor the test."},
    )
    split_seed_offset: int = field(default=0, metadata={"help": "Added to the seed of the permutation."})
    oracle_domain_column: str | None = field(
        default=None,
        metadata={"help": "Column with the domain, known to the teachers' training and to analysis only."},
    )


@dataclass
class StudentArguments:
    """Say which strong student."""

    student: str | None = field(default=None, metadata={"help": "Folder or Hub id of a pre-trained model."})
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
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "What is compared."})
    control: bool = field(default=True, metadata={"help": "Also train on one teacher that saw all the labels."})
    resume: bool = field(
        default=True,
        metadata={"help": "Go on with the run in `output_dir`, where there is one; False: refuse such a folder."},
    )
    calibrate_teachers: bool = field(
        default=False, metadata={"help": "Fit a temperature per teacher to the `num_heldout_examples`."}
    )


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
    specialize_by: str = field(default="label", metadata={"help": "Share out the 'label's or the 'domain's."})
    teachers: list[dict] = field(
        default_factory=list,
        metadata={
            "help": "Teachers that need no training: the fields of `Teacher` of each, `kind: column` for people."
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


RECIPE_TYPES = [DataArguments, TeacherArguments, StudentArguments, RecipeArguments, CoSupervisedConfig]

"""Where a model's files are: a folder, or a repository of the Hub pinned to one commit; and adapters on their base."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import HfApi
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)
from transformers.utils import logging as transformers_logging

from .hub import fetch_files, hub_errors, resolve_commit
from .model_files import (
    INDEX_FILE,
    check_config,
    check_processor_files,
    check_safetensors,
    read_json,
    read_shards,
)

# Everything that the loaders read, and nothing that could hold a pickle or code.
LOADED_FILES = (
    *("*.json", "*.txt", "*.model", "*.jinja", "model.safetensors", "model-*-of-*.safetensors"),
    *("adapter_model.safetensors", "model.skops"),
)
# What a model consists of, to be published: nothing else that lies beside it. Names, not patterns of all JSON files.
MODEL_FILES = (
    *("config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors"),
    *("model.safetensors.index.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt"),
    *("merges.txt", "*.model", "chat_template.jinja", "chat_template.json"),
)
_MODEL_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.skops")
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_WEIGHT_PATTERNS = ("*.safetensors", "*.skops")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".h5", ".msgpack")
_TIMM_PREFIXES = ("hf-hub:", "local-dir:")
_PROCESSOR_FILES = ("tokenizer_config.json", "tokenizer.json", "preprocessor_config.json", "processor_config.json")
_LEAST_WORDS = 5
_ADAPTED = "base_model.model."  # how peft begins the name of every weight of an adapter


@dataclass(frozen=True)
class Checkpoint:
    """A model's files, in a folder or at one commit of the Hub. [`find_checkpoint`] makes it.

    Args:
        what (`str`): How errors name it: `"Teacher 'low'"`.
        repo (`str`): Folder or Hub id, without a prefix of timm.
        revision (`str`, *optional*): Branch, tag or commit that was asked for.
        commit (`str`, *optional*): 40 hexadecimal digits; `None` for a folder.
        subfolder (`str`, *optional*): Where in the folder or repository.
        folder (`pathlib.Path`): Where on this machine the files are; of the Hub, in the client's cache.
        config (`dict[str, Any]`): Content of `config.json`, empty where an adapter has none.
        adapter (`dict[str, Any]`, *optional*): Content of `adapter_config.json`.
        base (`Checkpoint`, *optional*): The model that an adapter was trained on.
    """

    what: str
    repo: str
    revision: str | None
    commit: str | None
    subfolder: str | None
    folder: Path
    config: dict[str, Any]
    adapter: dict[str, Any] | None = None
    base: Checkpoint | None = None

    @property
    def is_local(self) -> bool:
        """`bool`: Whether it is a folder."""
        return self.commit is None

    @property
    def is_adapter(self) -> bool:
        """`bool`: Whether it is an adapter of peft, which needs its base."""
        return self.adapter is not None

    @property
    def weight_files(self) -> list[Path]:
        """`list[pathlib.Path]`: Files of weights that are on this machine."""
        return sorted(path for pattern in _WEIGHT_PATTERNS for path in self.folder.glob(pattern))

    @property
    def identity(self) -> dict[str, Any]:
        """`dict[str, Any]`: What tells these weights from others: the commit, or a hash of a folder's files."""
        base = {} if self.base is None else {f"base_{key}": value for key, value in self.base.identity.items()}
        if self.base is not None:
            # Where a folder lies on this machine concerns nobody.
            base["base_model"] = Path(self.base.repo).name if self.base.is_local else self.base.repo
        if not self.is_local:
            return {"commit": self.commit, **base}
        configs = [path for name in ("config.json", "adapter_config.json") if (path := self.folder / name).is_file()]
        stats = [(path, path.stat()) for path in (*configs, *self.weight_files)]
        files = tuple((str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats)
        return {"commit": None, "weights": _hash_files(files), **base}

    def fetch(self) -> Path:
        """Download everything that the loaders read and that is not here yet.

        Of a repository it is the one folder, without folders in it: safetensors and skops, configurations and
        vocabularies, never a pickle or code.

        Returns:
            `pathlib.Path`: The folder to load from.

        Raises:
            OSError: If the Hub refuses it or cannot be reached, or there are no weights.
            ValueError: If its weights are kept in another format.
        """
        if self.commit is not None:
            fetch_files(
                self.repo, self.commit, _within(self.subfolder, LOADED_FILES), what=self.what,
                ignore=_within(self.subfolder, ["*/*"]),
            )  # fmt: skip
        if not self.folder.is_dir():
            raise FileNotFoundError(
                f"{self.what} must be in '{self.folder}', got nothing there: it was deleted meanwhile. Load it again."
            )
        names = {path.name for path in self.folder.iterdir()}
        has_model = any(fnmatch.filter(names, pattern) for pattern in _MODEL_WEIGHTS)
        if not (_ADAPTER_WEIGHTS in names if self.is_adapter else has_model):
            raise self._without_weights()
        if self.is_adapter and has_model:
            raise ValueError(
                f"{self.what} must be a whole model or an adapter, got both in '{self.place}'. Keep them "
                "in two folders."
            )
        self._check_files(names)
        return self.folder

    def _check_files(self, names: set[str]) -> None:
        """See that what the libraries will open is what they take it for."""
        if spread := fnmatch.filter(names, "shard-*-model-*-of-*.safetensors"):
            raise ValueError(
                f"{self.what} must be saved as one model, got the distributed checkpoint '{spread[0]}' in "
                f"'{self.place}'. Save it again by `save_pretrained`."
            )
        if self.is_adapter:
            weights = {_ADAPTER_WEIGHTS}
        elif "model.safetensors" in names:
            weights = {"model.safetensors"}
        else:
            weights = read_shards(self.folder / INDEX_FILE, self.what)
            if not weights and "model.skops" not in names:
                weights = {INDEX_FILE}  # which is missing
        if lost := sorted(weights - names):
            raise FileNotFoundError(
                f"{self.what} must have all parts of its weights, got '{self.place}' without {lost[:3]}. Save it "
                "again."
            )
        with whole_weights(self):
            for name in sorted(weights):
                check_safetensors(self.folder / name)
        check_processor_files(self.folder, self.what)

    @property
    def place(self) -> str:
        """`str`: Folder or id, and the folder in it."""
        return self.repo if self.subfolder is None else f"{self.repo}/{self.subfolder}"

    def file(self, name: str) -> Path:
        """Give the path of one file, after [`~Checkpoint.fetch`].

        Args:
            name (`str`):
                Its name.

        Returns:
            `pathlib.Path`

        Raises:
            FileNotFoundError: If there is none.
        """
        path = self.folder / name
        if not path.is_file():
            raise FileNotFoundError(
                f"{self.what} must have a file '{name}', got none in '{self.place}'. Save the model again in that "
                "format."
            )
        return path

    def name_after(self, *loaded: Any) -> None:
        """Let models and processors of the Hub say their id, not the folder of the cache that they were read from.

        Args:
            loaded (`PreTrainedModel`, `PreTrainedTokenizerBase` …):
                What was loaded from [`~Checkpoint.fetch`], changed in place.
        """
        if self.is_local:
            return
        for item in loaded:
            if hasattr(item, "name_or_path"):
                item.name_or_path = self.repo
            if hasattr(item, "config"):
                item.config._name_or_path = self.repo
            if "name_or_path" in getattr(item, "init_kwargs", {}):
                item.init_kwargs["name_or_path"] = self.repo

    def _without_weights(self) -> Exception:
        """The error of a place without weights that are read, by what is there instead."""
        names = _list_files(self.what, self.repo, self.commit, self.subfolder)
        here = [name for name in names if "/" not in name]
        wanted = (_ADAPTER_WEIGHTS,) if self.is_adapter else _MODEL_WEIGHTS
        if not self.is_local and any(fnmatch.filter(here, pattern) for pattern in wanted):
            return ConnectionError(
                f"{self.what} needs all of its files, got a part of '{self.place}' only: the download was cut off. Go "
                "online and try again; what has arrived is kept."
            )
        if pickled := [name for name in here if name.endswith(_PICKLED) and name != "training_args.bin"]:
            return ValueError(
                f"{self.what} must have its weights in safetensors (scikit-learn: skops), got only {pickled[:5]} in "
                f"'{self.place}', which may hold pickles and are not read. If you trust them, load them and "
                "`save_pretrained`, or convert them at https://huggingface.co/spaces/safetensors/convert."
            )
        return FileNotFoundError(
            f"{self.what} must have weights in safetensors (scikit-learn: 'model.skops'), got {_first(here)} in "
            f"'{self.place}'. Save the model again, or name the folder that holds it by `subfolder`."
        )


def find_checkpoint(
    model: str,
    *,
    what: str,
    revision: str | None = None,
    subfolder: str | None = None,
    commit: str | None = None,
    is_base: bool = False,
) -> Checkpoint:
    """Find a model and pin it: only its configuration is read.

    Args:
        model (`str`):
            Folder, or Hub id; also as timm writes them (`hf-hub:user/name@v1`, `local-dir:folder`).
        what (`str`):
            Who needs it, for errors: `"Teacher 'low'"`.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub. Defaults to the main branch.
        subfolder (`str`, *optional*):
            Folder in it that holds the model.
        commit (`str`, *optional*):
            The commit, where it is known already; the Hub is then not asked for it again.
        is_base (`bool`, *optional*, defaults to `False`):
            Whether an adapter needs it as its base, so that it may not be an adapter itself.

    Returns:
        [`Checkpoint`]

    Raises:
        OSError: If the model is not there, or the Hub refuses it or cannot be reached.
        ValueError: If the id or a configuration is not usable, or two revisions are named.
    """
    repo, revision = _split_model(model, revision, what)
    if Path(repo).is_dir():
        if revision is not None:
            raise ValueError(
                f"{what} must be on the Hub to have a revision, got {revision!r} for the folder '{repo}'. Leave it "
                "out."
            )
        folder, commit = Path(repo, subfolder or ""), None
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{what} must be in a folder '{subfolder}' of '{repo}', got none. Correct `subfolder`."
            )
    else:
        if model.startswith("local-dir:") or _is_path(repo):
            raise FileNotFoundError(
                f"{what} must be a folder, or a model on the Hub (`user/name`), got '{model}', and there is no such "
                "folder. Check the path."
            )
        commit = commit or resolve_commit(repo, revision, what=what)
        names = _within(subfolder, ["config.json", "adapter_config.json"])
        folder = fetch_files(repo, commit, names, what=what) / (subfolder or "")
    config, adapter = (_read_config(folder / name, what) for name in ("config.json", "adapter_config.json"))
    if config is None and adapter is None:
        raise _without_config(what, repo, commit, subfolder)
    if is_base and adapter is not None:
        # Before its own base is looked for: adapters may name each other in a circle.
        raise ValueError(f"{what} must be a whole model, got another adapter, '{model}'. Merge that one first.")
    base = None if adapter is None else _find_base(adapter, repo, is_local=commit is None)
    return Checkpoint(what, repo, revision, commit, subfolder, folder, config or {}, adapter, base)


def find_kind(checkpoint: Checkpoint, model: str) -> str:
    """Tell by its files which library reads a model.

    Args:
        checkpoint ([`Checkpoint`]):
            What [`find_checkpoint`] gave.
        model (`str`):
            As it was asked for: one with a prefix of timm is timm's.

    Returns:
        `str`: `"transformers"` (adapters of peft too), `"timm"` or `"sklearn"`.

    Raises:
        ValueError: If it does not show.
    """
    if checkpoint.is_adapter:
        return "transformers"
    if model.startswith(_TIMM_PREFIXES):
        return "timm"
    if "model_type" in checkpoint.config:
        return "transformers"
    if "architecture" in checkpoint.config:
        return "timm"
    has_skops = any(checkpoint.folder.glob("*.skops"))
    # The tools of skops for the Hub write `sklearn`, ours `library_name`.
    if has_skops or "sklearn" in (checkpoint.config.get("library_name"), *checkpoint.config):
        return "sklearn"
    raise ValueError(
        f"The kind of {checkpoint.what[0].lower()}{checkpoint.what[1:]} must show in its files: a 'config.json' with "
        "`model_type` (transformers) or `architecture` (timm), or a 'model.skops' (scikit-learn); got a 'config.json' "
        f"with {sorted(checkpoint.config)}. Name it with `kind`."
    )


def _split_model(model: str, revision: str | None, what: str) -> tuple[str, str | None]:
    """Folder or id without a prefix of timm, and the revision that timm writes behind an id."""
    repo = model
    for prefix in _TIMM_PREFIXES:
        repo = repo.removeprefix(prefix)
    if not model.startswith("hf-hub:") or "@" not in repo or Path(repo).is_dir():
        return repo, revision
    repo, named = repo.rsplit("@", 1)
    if revision not in (None, named):
        raise ValueError(
            f"{what} must be at one revision, got '{named}' in `model` and '{revision}' as `revision`. Drop one."
        )
    return repo, named


def _is_path(repo: str) -> bool:
    return repo.startswith((".", "~", "/")) or "\\" in repo or ":" in repo or repo.count("/") > 1


def _within(subfolder: str | None, patterns: Iterable[str]) -> list[str]:
    return [f"{glob.escape(subfolder)}/{pattern}" if subfolder else pattern for pattern in patterns]


def _read_config(path: Path, what: str) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    config = read_json(path, what)
    check_config(config, what, path.name)
    return config


def _find_base(adapter: Mapping[str, Any], repo: str, is_local: bool) -> Checkpoint:
    """The model that an adapter names as its base."""
    name, what = adapter.get("base_model_name_or_path"), f"The base model of the adapter '{repo}'"
    if not isinstance(name, str) or not name or (not is_local and _is_path(name)):
        raise ValueError(
            f"{what} must be named by its Hub id as `base_model_name_or_path`, got {name!r}. Correct its "
            "'adapter_config.json', or save the merged model instead."
        )
    revision = adapter.get("revision")
    if not isinstance(revision, str | None):
        raise ValueError(f"{what} must be at a branch, tag or commit by name, got {revision!r}. Correct `revision`.")
    return find_checkpoint(name, what=what, revision=revision, is_base=True)


def _list_files(what: str, repo: str, commit: str | None, subfolder: str | None) -> list[str]:
    """Names of all files in a folder or repository, those of the Hub as it knows them."""
    if commit is None:
        folder = Path(repo, subfolder or "")
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    with hub_errors(what, repo, revision=commit):
        names = HfApi().list_repo_files(repo, revision=commit)
    prefix = f"{subfolder}/" if subfolder else ""
    return sorted(name.removeprefix(prefix) for name in names if name.startswith(prefix))


def _without_config(what: str, repo: str, commit: str | None, subfolder: str | None) -> Exception:
    """The error of a place without a configuration, by what is there instead."""
    names = _list_files(what, repo, commit, subfolder)
    place = f"{repo}/{subfolder}" if subfolder else repo
    if {"hierarchy.yaml", "hierarchy.json"} & set(names):
        return ValueError(
            f"{what} must be one model, got the hierarchy of teachers in '{place}'. Use `load_hierarchy`, or name one "
            "of its folders by `subfolder`."
        )
    if "model_index.json" in names:
        return ValueError(f"{what} must be a classifier, got a pipeline of diffusers in '{place}'. Use a classifier.")
    if folders := sorted(name.removesuffix("/config.json") for name in names if name.endswith("/config.json")):
        return FileNotFoundError(
            f"{what} must have a 'config.json', got one in the folders {_first(folders)} of '{place}' only. Name one "
            "by `subfolder`."
        )
    return FileNotFoundError(
        f"{what} must have a 'config.json', got {_first(names)} in '{place}'. Save it with `save_pretrained`, "
        "`timm.models.save_for_hf` or `save_sklearn_teacher`."
    )


def _first(names: list[str]) -> str:
    return "no file" if not names else str(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


@lru_cache(maxsize=256)
def _hash_files(files: tuple[tuple[str, int, int], ...]) -> str:
    """Hash of files given as path, size and time of change: gigabytes of weights are read once a run."""
    digest = hashlib.blake2b(digest_size=8)
    for path, size, _ in files:
        digest.update(f"{Path(path).name} {size} ".encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


# ── classifiers of transformers ─────────────────────────────────────────────────────────────────────────────────────


def read_config(checkpoint: Checkpoint) -> Any:
    """Read the configuration of a classifier of transformers, or of timm in transformers' wrapper.

    Args:
        checkpoint ([`Checkpoint`]):
            A model that is no adapter.

    Returns:
        `PreTrainedConfig`

    Raises:
        ValueError: If transformers does not know the type of model.
    """
    model_type = checkpoint.config.get("model_type")
    if "architecture" not in checkpoint.config and model_type not in CONFIG_MAPPING_NAMES:
        raise ValueError(
            f"{checkpoint.what} must be of a type that transformers knows, got {model_type!r} in "
            f"'{checkpoint.place}'. Code from a repository is never run: use a model without code of its own, or "
            "update transformers."
        )
    config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
    if config.model_type == "timm_wrapper" and config.model_args:
        # timm 1.0.31 writes num_classes here, and the wrapper passes it a second time.
        config.model_args = {key: value for key, value in config.model_args.items() if key != "num_classes"}
    return config


def reads_text(config: Any, what: str) -> bool:
    """Tell whether a configuration belongs to a text classifier or to an image classifier.

    Args:
        config (`PreTrainedConfig`):
            Of the model. Its architecture decides; where it names none, what its type can be.
        what (`str`):
            Who asks, for the error.

    Returns:
        `bool`: `True` for texts.

    Raises:
        ValueError: If it is neither.
    """
    architectures = config.architectures or []
    for task, is_text in (("ForSequenceClassification", True), ("ForImageClassification", False)):
        if any(task in architecture for architecture in architectures):
            return is_text
    others = [name for name in architectures if "For" in name or "LMHead" in name]
    if not others and type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        return False
    if not others and type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return True
    found = f"'{others[0]}', which is for another task" if others else f"a model of type '{config.model_type}'"
    raise ValueError(
        f"{what} must be a classifier of images or of texts, got {found}. Use a classifier; the answers of anything "
        "else can be put into a column and read by `kind='column'`."
    )


def load_processor(checkpoint: Checkpoint, folder: Path, is_text: bool) -> Any:
    """Load the tokenizer or image processor of a model.

    Args:
        checkpoint ([`Checkpoint`]):
            Whose it is.
        folder (`pathlib.Path`):
            Where it is: what [`~Checkpoint.fetch`] gave, or [`load_adapted`].
        is_text (`bool`):
            Whether it is a tokenizer.

    Returns:
        `PreTrainedTokenizerBase` or `BaseImageProcessor`

    Raises:
        ValueError: If there is none, its vocabulary is missing, or it would need code of the repository.
    """
    kind = "tokenizer" if is_text else "image processor"
    try:
        processor = (AutoTokenizer if is_text else AutoImageProcessor).from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{checkpoint.what} must come with its {kind}, and without code of its own, which is never run; got in "
            f"'{checkpoint.place}': {_first_line(error)}. Save it there too by `save_pretrained`."
        ) from error
    # Without its files, transformers 5 makes a tokenizer that knows its special tokens only, and says nothing.
    if is_text and (num_words := len(processor) - len(set(processor.all_special_tokens))) < _LEAST_WORDS:
        raise ValueError(
            f"{checkpoint.what} must come with the vocabulary of its tokenizer, got {num_words} words "
            f"besides its special tokens in '{checkpoint.place}'. Save the tokenizer there too by `save_pretrained`."
        )
    checkpoint.name_after(processor)
    return processor


def _first_line(error: BaseException) -> str:
    return next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def whole_weights(checkpoint: Checkpoint) -> Iterator[None]:
    """Say of which model a file of weights is damaged.

    Args:
        checkpoint ([`Checkpoint`]):
            What is loaded inside.

    Raises:
        ValueError: If a file of weights is cut off or no such file.
    """
    try:
        yield
    except SafetensorError as error:
        files = [str(path.resolve()) for path in checkpoint.weight_files]
        raise ValueError(
            f"{checkpoint.what} must have whole weights in '{checkpoint.place}', got a damaged file: {error}. Delete "
            f"it ({', '.join(files)}) and load it again."
        ) from error


def load_adapted(checkpoint: Checkpoint, *, random_head: bool = False) -> tuple[Any, Path]:
    """Load an adapter of peft on its base, merged: an ordinary classifier of transformers.

    The base comes from its own folder or commit. It gets as many labels as the head that the adapter has saved
    (`modules_to_save`), and its own head where there is none. Names of labels are those of the adapter's `config.json`
    if it has one, else the base's if they are as many, else `LABEL_0` …

    Args:
        checkpoint ([`Checkpoint`]):
            One with `is_adapter`.
        random_head (`bool`, *optional*, defaults to `False`):
            Allow a head that neither the adapter nor the base has: of a student, whose head is replaced anyway.

    Returns:
        `tuple[PreTrainedModel, pathlib.Path]`: the model, on the CPU; and the folder to load its tokenizer or image
        processor from, the adapter's where it has one, else the base's.

    Raises:
        OSError: If files are missing, or the Hub refuses them or cannot be reached.
        ValueError: If the adapter cannot be merged, does not fit its base, or weights would be random.
    """
    base = checkpoint.base
    if base is None:
        raise ValueError(
            f"{checkpoint.what} must be an adapter, got a whole model in '{checkpoint.place}'. Load that."
        )
    _check_mergeable(checkpoint)
    folder, base_folder = checkpoint.fetch(), base.fetch()
    with whole_weights(checkpoint):
        weights = load_file(folder / _ADAPTER_WEIGHTS)
    saved = {name.removeprefix(_ADAPTED): value for name, value in weights.items()}
    config = read_config(base)
    is_text = reads_text(config, base.what)
    auto_model = AutoModelForSequenceClassification if is_text else AutoModelForImageClassification
    _set_labels(config, _saved_labels(config, auto_model, saved), checkpoint.config.get("id2label"))
    with quiet_loading(), whole_weights(base):
        model, loading = auto_model.from_pretrained(
            base_folder, config=config, use_safetensors=True, trust_remote_code=False, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    lost = {item[0] if isinstance(item, tuple) else item for kind in ("missing", "mismatched")
            for item in loading[f"{kind}_keys"]}  # fmt: skip
    if not random_head:
        check_no_missing(base.what, lost - set(saved))
    merged = _merge(model, checkpoint, base, folder)
    checkpoint.name_after(merged)
    has_processor = any((folder / name).is_file() for name in _PROCESSOR_FILES)
    return merged, folder if has_processor else base_folder


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep transformers from reporting weights that are replaced on purpose; what matters is checked afterwards."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def check_no_missing(what: str, missing: Iterable[str]) -> None:
    """See that a checkpoint lacks no weight of its model.

    Args:
        what (`str`):
            Whose it is, for the error.
        missing (`Iterable[str]`):
            Names of weights without a value.

    Raises:
        ValueError: If there is one.
    """
    names = sorted(missing)
    if names:
        raise ValueError(
            f"{what} must have all of its weights (never a silently random teacher), got a checkpoint without "
            f"{_first(names)}. Train its classifier first, or name a checkpoint that has one."
        )


def _check_mergeable(checkpoint: Checkpoint) -> None:
    adapter = checkpoint.adapter or {}
    tuner = {kind.value: tuner for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()}.get(
        str(adapter.get("peft_type"))
    )
    # X-LoRA names further adapters that it would load, and megatron a module that it would import.
    mergeable = hasattr(tuner, "merge_and_unload") and adapter.get("peft_type") not in ("XLORA", "POLY")
    if not mergeable or adapter.get("megatron_config"):
        raise ValueError(
            f"{checkpoint.what} must be an adapter that can be merged into its base, such as LoRA, got "
            f"{adapter.get('peft_type')!r} in '{checkpoint.place}'. Save a whole model instead."
        )


def _saved_labels(config: Any, auto_model: Any, saved: Mapping[str, torch.Tensor]) -> int | None:
    """For how many labels an adapter has saved a head: the size of what depends on their number."""
    shapes = []
    for num_labels in (3, 5):
        probe = type(config).from_dict(config.to_dict() | {"label_names": None})
        _set_labels(probe, num_labels, None)
        with init_empty_weights():
            shapes.append({name: value.shape for name, value in auto_model.from_config(probe).named_parameters()})
    outputs = [name for name, shape in shapes[0].items() if shape != shapes[1][name] and name in saved]
    sizes = {saved[name].shape[0] for name in outputs}
    return sizes.pop() if len(sizes) == 1 else None


def _set_labels(config: Any, num_labels: int | None, id2label: Any) -> None:
    """Give a configuration a number of labels and their names, where they are known."""
    names = [str(id2label[key]) for key in sorted(id2label, key=int)] if isinstance(id2label, Mapping) else []
    num_labels = num_labels or config.num_labels
    if len(names) == num_labels:
        config.id2label = dict(enumerate(names))
        config.label2id = {name: position for position, name in enumerate(names)}
    elif num_labels != config.num_labels:
        config.num_labels = num_labels
    if config.model_type == "timm_wrapper":
        config.num_labels, config.label_names = num_labels, [config.id2label[key] for key in range(num_labels)]


def _merge(model: Any, checkpoint: Checkpoint, base: Checkpoint, folder: Path) -> Any:
    """Put an adapter onto its base, see that all of it found its place, and merge."""
    try:
        adapted = PeftModel.from_pretrained(
            model, str(folder), config=PeftConfig.from_pretrained(str(folder)), torch_device="cpu"
        )
        # Only the second loading tells what the first one did.
        loading = adapted.load_adapter(str(folder), "default", torch_device="cpu")
        left = [name.removeprefix(_ADAPTED) for name in (*loading.unexpected_keys, *loading.missing_keys)]
        if left:
            raise ValueError(f"{_first(sorted(left))} without counterpart")
        return adapted.merge_and_unload()
    except (AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{checkpoint.what} must be an adapter that fits its base '{base.place}', got: "
            f"{_first_line(error)}. Train it again on this base, or save a whole model."
        ) from error

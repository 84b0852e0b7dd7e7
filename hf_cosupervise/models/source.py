"""Where a model's files are: a folder, or a repository of the Hub pinned to one commit; and adapters on their base."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch.nn.modules.module import register_module_parameter_registration_hook

from ..files import read_json
from ..hub.client import UNREACHABLE, fetch_files, hub_errors, is_folder, is_unreachable, resolve_commit
from .files import INDEX_FILE, check_config, check_processor_files, check_safetensors, read_shards

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
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_WEIGHT_PATTERNS = ("*.safetensors", "*.skops")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".h5", ".msgpack")
_MOST_LISTED = 1000
TIMM_PREFIXES = ("hf-hub:", "local-dir:")


@dataclass(frozen=True)
class ModelSource:
    """A model's files, in a folder or at one commit of the Hub."""

    what: str
    repo: str
    revision: str | None
    commit: str | None
    subfolder: str | None
    folder: Path
    config: dict[str, Any]
    adapter: dict[str, Any] | None = None
    base: ModelSource | None = None

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
    def num_bytes(self) -> int:
        """`int`: Size of its weights on this machine."""
        return sum(path.stat().st_size for path in self.weight_files)

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
        return {"commit": None, "weights": hash_files([*configs, *self.weight_files]), **base}

    def fetch(self) -> Path:
        """Download everything that the loaders read and that is not here yet."""
        if self.commit is not None:
            fetch_files(
                self.repo,
                self.commit,
                _within(self.subfolder, LOADED_FILES),
                what=self.what,
                # Patterns match across slashes: '*.json' would fetch those of every folder below.
                ignore=_within(self.subfolder, ["*/*"]),
            )
        if not self.folder.is_dir():
            raise FileNotFoundError(
                f"{self.what} must be in '{self.folder}', got nothing there: it was deleted meanwhile. Load it again."
            )
        # Of what is here now: the client takes a snapshot that was cut off for a whole one when it is offline.
        names = {path.name for path in self.folder.iterdir()}
        if not self._has_weights(names):
            raise self._without_weights()
        if self.is_adapter and any(fnmatch.filter(names, pattern) for pattern in _MODEL_WEIGHTS):
            raise ValueError(
                f"{self.what} must be a whole model or an adapter, got both in '{self.place}'. Keep them "
                "in two folders."
            )
        self._check_files(names)
        return self.folder

    def check_weights(self) -> None:
        """See that there are weights to load, before any work and without fetching them."""
        try:
            listed = self._list_files()
        except UNREACHABLE as error:
            if not is_unreachable(error):
                raise
            return  # what is in the cache may do
        if not self._has_weights(listed):
            raise self._without_weights()

    def _has_weights(self, names: Iterable[str]) -> bool:
        here = [name for name in names if "/" not in name]
        wanted = (ADAPTER_WEIGHTS,) if self.is_adapter else _MODEL_WEIGHTS
        return any(fnmatch.filter(here, pattern) for pattern in wanted)

    def _check_files(self, names: set[str]) -> None:
        """See that what the libraries will open is what they take it for."""
        if spread := fnmatch.filter(names, "shard-*-model-*-of-*.safetensors"):
            raise ValueError(
                f"{self.what} must be saved as one model, got the distributed checkpoint '{spread[0]}' in "
                f"'{self.place}'. Save it again by `save_pretrained`."
            )
        if self.is_adapter:
            weights = {ADAPTER_WEIGHTS}
        elif "model.safetensors" in names:
            # One file counts more than parts, as for transformers.
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
                # Before any library opens it, by a reader that knows no other format.
                check_safetensors(self.folder / name, is_plain="quantization_config" not in self.config)
        check_processor_files(self.folder, self.what)

    @property
    def place(self) -> str:
        """`str`: Folder or id, and the folder in it."""
        return self.repo if self.subfolder is None else f"{self.repo}/{self.subfolder}"

    def file(self, name: str) -> Path:
        """Give the path of one file, after [`~Checkpoint.fetch`]."""
        path = self.folder / name
        if not path.is_file():
            raise FileNotFoundError(
                f"{self.what} must have a file '{name}', got none in '{self.place}'. Save the model again in that "
                "format."
            )
        return path

    def name_after(self, *loaded: Any) -> None:
        """Let models and processors of the Hub say their id, not the folder of the cache that they were read from."""
        if self.is_local:
            return
        for item in loaded:
            if hasattr(item, "name_or_path"):
                item.name_or_path = self.repo
            if hasattr(item, "config"):
                item.config._name_or_path = self.repo
            if "name_or_path" in getattr(item, "init_kwargs", {}):
                item.init_kwargs["name_or_path"] = self.repo

    def _list_files(self) -> list[str]:
        """Names of all files in the folder or repository, those of the Hub as it knows them."""
        if self.is_local:
            # Enough for a sentence: it may be the root of all folders.
            files = islice((path for path in self.folder.rglob("*") if path.is_file()), _MOST_LISTED)
            return sorted(path.relative_to(self.folder).as_posix() for path in files)
        with hub_errors(self.what, self.repo, revision=self.commit):
            names = HfApi().list_repo_files(self.repo, revision=self.commit)
        prefix = f"{self.subfolder}/" if self.subfolder else ""
        return sorted(name.removeprefix(prefix) for name in names if name.startswith(prefix))

    def without_config(self) -> Exception:
        """The error of a place without a configuration, by what is there instead."""
        names = self._list_files()
        if {"hierarchy.yaml", "hierarchy.json"} & set(names):
            return ValueError(
                f"{self.what} must be one model, got the hierarchy of teachers in '{self.place}'. Use "
                "`load_hierarchy`, or name one of its folders by `subfolder`."
            )
        if "model_index.json" in names:
            return ValueError(
                f"{self.what} must be a classifier, got a pipeline of diffusers in '{self.place}'. Use a classifier."
            )
        if folders := sorted(name.removesuffix("/config.json") for name in names if name.endswith("/config.json")):
            return FileNotFoundError(
                f"{self.what} must have a 'config.json', got one in the folders {first(folders)} of '{self.place}' "
                "only. Name one by `subfolder`."
            )
        return FileNotFoundError(
            f"{self.what} must have a 'config.json', got {first(names)} in '{self.place}'. Save it with "
            "`save_pretrained`, `timm.models.save_for_hf(…, safe_serialization=True)` or `save_sklearn_teacher`."
        )

    def _without_weights(self) -> Exception:
        """The error of a place without weights that are read, by what is there instead."""
        # Asked anew, for files that are not loaded are not downloaded either, and the sentence is about those.
        here = [name for name in self._list_files() if "/" not in name]
        if not self.is_local and self._has_weights(here):
            return ConnectionError(
                f"{self.what} needs all of its files, got a part of '{self.place}' only: the download was cut off. Go "
                "online and try again; what has arrived is kept."
            )
        # A Trainer puts its `training_args.bin` beside any weights.
        if pickled := [name for name in here if name.endswith(_PICKLED) and name != "training_args.bin"]:
            way = "and `save_pretrained`"
            if "architecture" in self.config and "model_type" not in self.config:
                way = "by timm and `timm.models.save_for_hf(…, safe_serialization=True)`"
            return ValueError(
                f"{self.what} must have its weights in safetensors (scikit-learn: skops), got only {pickled[:5]} in "
                f"'{self.place}', which may hold pickles and are not read. If you trust them, load them {way}, "
                "or convert them at https://huggingface.co/spaces/safetensors/convert."
            )
        return FileNotFoundError(
            f"{self.what} must have weights in safetensors (scikit-learn: 'model.skops'), got {first(here)} in "
            f"'{self.place}'. Save the model again, or name the folder that holds it by `subfolder`."
        )


def find_model(
    model: str,
    *,
    what: str,
    revision: str | None = None,
    subfolder: str | None = None,
    commit: str | None = None,
    is_base: bool = False,
) -> ModelSource:
    """Find a model and pin it: only its configuration is read."""
    repo, revision = _split_model(model, revision, what)
    if model.startswith("local-dir:") or is_folder(repo):
        if not Path(repo).is_dir():
            raise FileNotFoundError(
                f"{what} must be a folder, or a model on the Hub (`user/name`), got '{model}', and there is no such "
                "folder. Check the path."
            )
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
        commit = commit or resolve_commit(repo, revision, what=what)
        names = _within(subfolder, ["config.json", "adapter_config.json"])
        # A few kilobytes, by which a model is refused before its weights are fetched.
        folder = fetch_files(repo, commit, names, what=what) / (subfolder or "")
    config, adapter = (_read_config(folder / name, what) for name in ("config.json", "adapter_config.json"))
    source = ModelSource(what, repo, revision, commit, subfolder, folder, config or {}, adapter)
    if config is None and adapter is None:
        raise source.without_config()
    if is_base and adapter is not None:
        # Before its own base is looked for: adapters may name each other in a circle.
        raise ValueError(f"{what} must be a whole model, got another adapter, '{model}'. Merge that one first.")
    return source if adapter is None else replace(source, base=_find_base(adapter, repo, is_local=commit is None))


def _split_model(model: str, revision: str | None, what: str) -> tuple[str, str | None]:
    """Folder or id without a prefix of timm, and the revision that timm writes behind an id."""
    repo = model
    for prefix in TIMM_PREFIXES:
        repo = repo.removeprefix(prefix)
    # An `@` in a folder's name belongs to the name.
    if not model.startswith("hf-hub:") or "@" not in repo or is_folder(repo):
        return repo, revision
    repo, named = repo.rsplit("@", 1)
    if revision not in (None, named):
        raise ValueError(
            f"{what} must be at one revision, got '{named}' in `model` and '{revision}' as `revision`. Drop one."
        )
    return repo, named


def _within(subfolder: str | None, patterns: Iterable[str]) -> list[str]:
    return [f"{glob.escape(subfolder)}/{pattern}" if subfolder else pattern for pattern in patterns]


def _read_config(path: Path, what: str) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    config = read_json(path, what, "Save the model again.")
    check_config(config, what, path.name)
    return config


def _find_base(adapter: Mapping[str, Any], repo: str, is_local: bool) -> ModelSource:
    """The model that an adapter names as its base."""
    name, what = adapter.get("base_model_name_or_path"), f"The base model of the adapter '{repo}'"
    # A drive or an address, or a folder that happens to be here, is not what a stranger's adapter was made on.
    if not isinstance(name, str) or not name or (not is_local and (":" in name or is_folder(name))):
        raise ValueError(
            f"{what} must be named by its Hub id as `base_model_name_or_path`, got {name!r}. Correct its "
            "'adapter_config.json', or save the merged model instead."
        )
    # Of the base, as peft writes it: without it, the base's main branch is pinned from now on.
    revision = adapter.get("revision")
    if not isinstance(revision, str | None):
        raise ValueError(f"{what} must be at a branch, tag or commit by name, got {revision!r}. Correct `revision`.")
    return find_model(name, what=what, revision=revision, is_base=True)


def first(names: list[str]) -> str:
    """Name the first eight of some files."""
    return "no file" if not names else str(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def hash_files(paths: Iterable[Path]) -> str:
    """Hash files by their names, sizes and content."""
    # Size and time are part of the key of the cache: a folder that was retrained in place is hashed again.
    stats = [(path, path.stat()) for path in paths]
    return _hash_files(tuple((str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats))


@lru_cache(maxsize=256)
def _hash_files(files: tuple[tuple[str, int, int], ...]) -> str:
    """Hash of files given as path, size and time of change: gigabytes of weights are read once a run."""
    digest = hashlib.blake2b(digest_size=8)
    for path, size, _ in files:
        # Name and size, or two files would hash as one that holds both; no folder, for weights may lie anywhere.
        digest.update(f"{Path(path).name} {size} ".encode())
        with open(path, "rb") as file:
            # A megabyte at a time: weights may be larger than the memory.
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


# What libraries say of a configuration that no model can be built from; `StrictDataclassError` is none of Python's.
BUILDING_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError),
    StrictDataclassError,
)


@contextmanager
def no_larger_than_weights(source: ModelSource) -> Iterator[None]:
    """Stop building at the first parameter that the files of weights cannot fill."""
    read = (*_MODEL_WEIGHTS, ADAPTER_WEIGHTS)
    files = [path for path in source.weight_files if any(fnmatch.fnmatch(path.name, name) for name in read)]
    with whole_weights(source):
        num_tensors = sum(check_safetensors(path) for path in files if path.suffix == ".safetensors")
    # Loading puts in every parameter twice; some were packed two to a byte, or several into one tensor.
    most, most_values = 4 * num_tensors + 1_000, 4 * sum(path.stat().st_size for path in files) + (1 << 24)
    count = values = 0

    def watch(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> None:
        nonlocal count, values
        count, values = count + 1, values + parameter.numel()
        if count > most or values > most_values:
            raise ValueError(
                f"{count:,} parameters of {values:,} values and more to build, for weights of {num_tensors:,} tensors"
            )

    # At every registration, because ten billion parameters fill the memory before any check that follows.
    handle = register_module_parameter_registration_hook(watch)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def building(source: ModelSource) -> Iterator[None]:
    """Build a model that its weights can fill, or say what is wrong with its configuration."""
    with explained(source, "model"), no_larger_than_weights(source):
        yield


@contextmanager
def explained(source: ModelSource, part: str) -> Iterator[None]:
    """Say of which model a configuration is wrong that a library cannot build from."""
    try:
        yield
    except BUILDING_ERRORS as error:
        # Of a context within this one.
        if isinstance(error, ValueError) and str(error).startswith(source.what):
            raise  # it says so already
        raise ValueError(
            f"{source.what} must have a {part} that its library can build, got in '{source.place}': "
            f"{type(error).__name__}: {first_line(error)}. Correct its 'config.json', or save it again."
        ) from error


def unknown_to_timm(what: str, found: str) -> ValueError:
    """The error of an architecture that timm cannot make."""
    known = f"a model that timm {version('timm')} knows"
    return ValueError(f"{what} must be {known}, got architecture {found}. Update timm, or save the model again.")


def first_line(error: BaseException | None) -> str:
    """What an error says, as a part of a sentence."""
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    # "Validation error for field 'x':", and then the reason
    return " ".join(lines[:2]) if lines and lines[0].endswith(":") else lines[0] if lines else type(error).__name__


@contextmanager
def whole_weights(source: ModelSource) -> Iterator[None]:
    """Say of which model a file of weights is damaged."""
    try:
        yield
    except SafetensorError as error:
        files = [str(path.resolve()) for path in source.weight_files]
        raise ValueError(
            f"{source.what} must have whole weights in '{source.place}', got a damaged file: {error}. Delete "
            f"it ({', '.join(files)}) and load it again."
        ) from error

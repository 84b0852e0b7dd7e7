"""The data to be labelled: as they are given, or by the name of a folder or of a data set on the Hub, pinned."""

from __future__ import annotations

import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import (
    Dataset,
    DatasetBuilder,
    DatasetDict,
    Features,
    IterableDataset,
    config,
    load_dataset_builder,
    load_from_disk,
)
from datasets.arrow_writer import ArrowWriter
from datasets.exceptions import DatasetsError
from datasets.table import embed_table_storage, table_cast
from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError
from huggingface_hub.file_download import repo_folder_name

from ..files import is_inside, read_json
from ..hub.client import UNREACHABLE, hub_errors, is_folder, is_unreachable, resolve_commit
from ..processes import Processes
from .cells import OutsideCellError, check_cells, outside_cells
from .columns import shorten

# Files that run code when they are read; `datasets` reads none of them.
_PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib")
_HUB_FILE = re.compile(r"hf://datasets/([^@/]+(?:/[^@/]+)?)@([0-9a-f]{40})/")
# How `datasets` lists the configurations where the one that is wanted is not there.
_CONFIGS = re.compile(r"(?:Available|available configs): (\[.*?\])", re.DOTALL)
# How a file in an archive begins where archives are read as they are.
_IN_ARCHIVE = re.compile(r"(zip|tar|gzip|bz2|xz|zstd|lz4)://")


@dataclass(frozen=True)
class DataChoice:
    """Which part of a data set that is given by its name."""

    split: str
    revision: str | None
    config_name: str | None
    streaming: bool


def find_data(
    dataset: Dataset | IterableDataset | str, choice: DataChoice, processes: Processes
) -> tuple[Dataset, dict[str, Any] | None]:
    """Give the data, and where they came from as far as it is certain."""
    is_hub_id = isinstance(dataset, str) and not (is_folder(dataset) or Path(dataset).is_file())
    # Refused, not ignored: who gives a revision believes that these data are pinned.
    given = [name for name in ("revision", "config_name", "streaming") if getattr(choice, name)]
    if given and not is_hub_id:
        what = f"the folder '{dataset}'" if isinstance(dataset, str) else "data that are loaded already"
        raise ValueError(f"`{given[0]}` is for data sets on the Hub, got it for {what}. Leave it out.")
    if isinstance(dataset, str):
        return _load_from_hub(dataset, choice, processes) if is_hub_id else _load_folder(dataset, choice.split)
    if choice.split != "train":
        raise ValueError(
            f"`split` is for data that are given by name, got {choice.split!r} for data that are loaded already. Give "
            "that split itself."
        )
    source = _find_source(dataset)
    return _materialise(dataset) if isinstance(dataset, IterableDataset) else dataset, source


def _load_folder(folder: str, split: str) -> tuple[Dataset, dict[str, Any] | None]:
    data = load_folder(folder)
    splits = ["train"] if isinstance(data, Dataset) else list(data)
    if split not in splits:
        raise ValueError(f"`split` must be one of {splits} of '{folder}', got {split!r}. Choose one of them.")
    data = data if isinstance(data, Dataset) else data[split]
    return data, _find_source(data)


def load_folder(folder: str) -> Dataset | DatasetDict:
    """Open a folder that may be from anybody: all that it names must lie in it."""
    # The files that `load_from_disk` would follow, read before it does: it opens whatever they name.
    splits = _listed(Path(folder, "dataset_dict.json"), "splits")
    for part in (Path(folder), *(Path(folder, str(split)) for split in splits)):
        names = [
            entry.get("filename") for entry in _listed(part / "state.json", "_data_files") if isinstance(entry, dict)
        ]
        for path in (part, part / "state.json", part / "dataset_info.json", *(part / str(name) for name in names)):
            if not is_inside(path, Path(folder)):
                raise ValueError(
                    f"`dataset` must be a folder that holds all of its files itself, got '{folder}', which leads to "
                    f"'{path}'. It was not opened; copy the whole folder without links."
                )
    try:
        data = load_from_disk(folder)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"`dataset` must be a folder that `save_to_disk` wrote, got '{folder}': {tell_error(error)}. Load the "
            "data by `datasets.load_dataset`, and give them or save them."
        ) from error
    for part in [data] if isinstance(data, Dataset) else data.values():
        check_cells(
            part.data.table,
            f"The data in '{folder}'",
            "If the files are yours, give the data themselves, loaded by "
            "`datasets`; `save_to_disk` reads in files of this machine.",
        )
    return data


def _listed(path: Path, key: str) -> list[Any]:
    """A list in a JSON file; an empty one where there is none, for the loader to say so."""
    try:
        found = read_json(path)[key]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return []
    return found if isinstance(found, list) else []


def _find_source(dataset: Dataset | IterableDataset) -> dict[str, Any] | None:
    """The commit on the Hub that all files of a data set are from, where `datasets` has noted it (5.0 does not)."""
    found = [_HUB_FILE.match(url) for url in dataset.info.download_checksums or ()]
    # A file from anywhere else is `None` among them, and makes two: then nothing is certain.
    origins = {match and match.groups() for match in found}
    if len(origins) != 1 or (origin := origins.pop()) is None:
        return None
    return {"dataset": origin[0], "commit": origin[1]}


def _load_from_hub(repo_id: str, choice: DataChoice, processes: Processes) -> tuple[Dataset, dict[str, Any]]:
    """Pin a data set on the Hub to one commit, the same in every process, and load it."""
    commit = processes.on_first(partial(_pin, repo_id, choice.revision))
    if processes.count > 1 and not choice.streaming:
        processes.on_first(lambda: _download(repo_id, commit, choice).hash)  # the others find it in the cache
    builder = _download(repo_id, commit, choice)
    # The commit that was loaded, which is one of the cache where the Hub could not be asked.
    source = {"dataset": repo_id, "config": builder.config.name, "split": choice.split, "commit": builder.hash}
    if not choice.streaming:
        return _hold(builder.as_dataset(split=choice.split), builder, repo_id), source
    with _explained(repo_id, commit, choice.config_name, ()):
        stream = builder.as_streaming_dataset(split=choice.split)
        return _read_in(_checked_tables(stream, builder, repo_id), stream.features), source


def _checked_tables(stream: IterableDataset, builder: DatasetBuilder, repo_id: str) -> Iterator[pa.Table]:
    """The rows as they come, none of them opened before it is looked at."""
    # Not decoded, for decoding an image opens the file that its cell names.
    as_stored, start = stream if stream.features is None else stream.decode(False), 0
    for table in as_stored.with_format("arrow").iter(batch_size=1000):
        yield _check_hub(table, builder, repo_id, start)
        start += len(table)


def load_splits(repo_id: str, commit: str | None) -> DatasetDict:
    """Load all splits of a data set on the Hub, as [`find_data`] loads one."""
    builder = _download(repo_id, commit, DataChoice(split="all", revision=commit, config_name=None, streaming=False))
    return DatasetDict({name: _hold(split, builder, repo_id) for name, split in builder.as_dataset().items()})


def _hold(dataset: Dataset, builder: DatasetBuilder, repo_id: str) -> Dataset:
    """Data of the Hub that hold every cell, but for plain image files of the repository, which stay in the cache."""
    _check_hub(dataset.data.table, builder, repo_id)
    # A cell in an archive or on the Hub would be fetched at every reading; a plain file in the cache stays.
    if not any("://" in path for _, _, path in outside_cells(dataset.data.table)):
        return dataset
    return _read_in(dataset.with_format("arrow").iter(1000), dataset.features)


def _check_hub(table: pa.Table, builder: DatasetBuilder, repo_id: str, start: int = 0) -> pa.Table:
    """Refuse data in which anything but a folder of image files names its files."""
    # What is in the cache already is loaded by a builder that only knows the one that made it.
    name = (builder.info.builder_name if builder.name == "cache" else builder.name) or ""
    roots = [
        Path(HF_HUB_CACHE, repo_folder_name(repo_id=repo_id, repo_type="dataset")),
        Path(config.EXTRACTED_DATASETS_PATH),
    ]

    def is_own(path: str) -> bool:
        *archives, file = path.split("::")
        # `imagefolder` and its kin list files themselves; in Parquet or JSON a path is what somebody has written.
        if not name.endswith("folder") or len(archives) > 1 or not all(map(_IN_ARCHIVE.match, archives)):
            return False
        if (hub_file := _HUB_FILE.match(file)) is not None:
            return hub_file[2] == builder.hash
        return "://" not in file and any(is_inside(Path(file), root) for root in roots)

    check_cells(
        table,
        f"The data set '{repo_id}'",
        "Ask its author for the content (`push_to_hub` puts it in), or give the data themselves.",
        is_own,
        start,
    )
    return table


def _pin(repo_id: str, revision: str | None) -> str | None:
    try:
        return resolve_commit(repo_id, revision, what="`dataset`", repo_type="dataset")
    except UNREACHABLE as error:
        if revision is not None or not is_unreachable(error):
            raise
        return None  # `datasets` may have one in a cache of its own


def _download(repo_id: str, commit: str | None, choice: DataChoice) -> DatasetBuilder:
    """Fetch a data set into the cache of `datasets`, or refuse it before."""
    with hub_errors("`dataset`", repo_id, revision=commit, repo_type="dataset"):
        files_there = _list_files(repo_id, commit)
    with _explained(repo_id, commit, choice.config_name, files_there):
        builder = load_dataset_builder(repo_id, choice.config_name, revision=commit)
        # Whatever goes wrong, `datasets` takes the newest data of that name in its cache, of any commit.
        if commit is not None and builder.hash != commit:
            raise DatasetsError(f"it cannot be read, and only commit {builder.hash} is in the cache")
        # The card of a repository may name files of any other place, this machine's too.
        files = [str(file) for listed in (builder.config.data_files or {}).values() for file in listed]
        # Later versions of `datasets` see to this themselves.
        if elsewhere := [file for file in files if (_HUB_FILE.match(file) or [""] * 3)[2] != builder.hash]:
            raise DatasetsError(f"its card names data that are not in it: {elsewhere[0]}")
    _check_split(builder, choice)
    if not choice.streaming:
        with _explained(repo_id, commit, choice.config_name, files_there):
            builder.download_and_prepare()
    return builder


def _list_files(repo_id: str, commit: str | None) -> Sequence[str] | Exception:
    """See that this user may read a data set, and what is in it; why not where the Hub gives no answer."""
    try:
        # Anybody may ask for the commit of gated data, and `datasets` takes older ones of its cache for them.
        HfApi().auth_check(repo_id, repo_type="dataset")
        return [file.rfilename for file in HfApi().dataset_info(repo_id, revision=commit).siblings or ()]
    except UNREACHABLE as error:
        if not is_unreachable(error):
            raise
        return error  # what is in the cache may do


@contextmanager
def _explained(
    repo_id: str, commit: str | None, config_name: str | None, files: Sequence[str] | Exception
) -> Iterator[None]:
    """Turn what `datasets` raises into one sentence."""
    with hub_errors("`dataset`", repo_id, revision=commit, repo_type="dataset"):
        try:
            yield
        except (HfHubHTTPError, LocalEntryNotFoundError, OutsideCellError):
            raise
        except (DatasetsError, FileNotFoundError, ValueError, RuntimeError) as error:
            if isinstance(error.__cause__, HTTPError | ConnectionError | TimeoutError):  # it is no fault of the data
                # Its own type, by which callers tell a cut connection from wrong data.
                raise error.__cause__ from None
            if isinstance(files, Exception):
                raise files from error
            raise _explain(error, repo_id, config_name, files) from error


def _check_split(builder: DatasetBuilder, choice: DataChoice) -> None:
    """Refuse a split that does not exist before anything is downloaded."""
    known = list(builder.info.splits or builder.config.data_files or ())
    # Only data in the cache can be cut and joined as in 'train[:10%]+test'.
    parts = [choice.split] if choice.streaming else [part.split("[")[0] for part in choice.split.split("+")]
    if known and not {part.strip() for part in parts} <= {*known, "all"}:
        raise ValueError(f"`split` must be one of {known}, got {choice.split!r}. Choose one of them.")


def _explain(error: Exception, repo_id: str, config_name: str | None, files: Sequence[str]) -> ValueError:
    """Why `datasets` could not load what is on the Hub, from its words and the files that are there."""
    if f"{repo_id.split('/')[-1]}.py" in files:
        return ValueError(
            f"`dataset` must consist of data files, got '{repo_id}', which is loaded by a script: no code from the "
            "Hub is run. Ask its author for Parquet files, or give the data themselves."
        )
    if files and isinstance(error, FileNotFoundError):
        pickles = [name for name in files if name.endswith(_PICKLES)]
        why = "which could run code when they are read" if pickles else "none of which holds data"
        return ValueError(
            f"`dataset` must consist of data files such as Parquet, CSV or JSON, got '{repo_id}' with "
            f"{shorten(pickles or files)}, {why}. Choose another data set, or give the data themselves."
        )
    if known := _CONFIGS.search(str(error)):
        return ValueError(f"`config_name` must be one of {known[1]} of '{repo_id}', got {config_name!r}. Choose one.")
    return ValueError(
        f"`dataset` must be data that `datasets` can read, got '{repo_id}': "
        f"{' '.join(tell_error(error.__cause__ or error).split())}. Check it by `datasets.load_dataset`."  # type: ignore[arg-type]
    )


def _materialise(stream: IterableDataset) -> Dataset:
    """Write a stream to a temporary Arrow file and map it: teachers walk over the data one after another."""

    def fill(writer: ArrowWriter) -> None:
        for batch in stream.with_format(None).iter(batch_size=1000):
            try:
                writer.write_batch(batch)
            except UnicodeEncodeError as error:
                what = "A text must hold no halves of characters"
                raise ValueError(f"{what}, got {error.object!r}. Correct it.") from error

    return _map_written(stream.features, fill)


def _read_in(tables: Iterable[pa.Table], features: Features | None) -> Dataset:
    """Write data to a temporary file with the content of every cell."""

    def fill(writer: ArrowWriter) -> None:
        for table in tables:
            table = table if features is None else table_cast(table, features.arrow_schema)
            writer.write_table(embed_table_storage(table))

    return _map_written(features, fill)


def _map_written(features: Features | None, fill: Callable[[ArrowWriter], None]) -> Dataset:
    folder = tempfile.mkdtemp(prefix="cosupervise-stream-")
    path = Path(folder) / "data.arrow"
    with ArrowWriter(path=str(path), features=features, embed_local_files=True) as writer:
        fill(writer)
        num_examples, _ = writer.finalize()
    dataset = Dataset.from_file(str(path)) if num_examples else Dataset.from_dict({})
    weakref.finalize(dataset.data, shutil.rmtree, folder, ignore_errors=True)
    return dataset


def tell_error(error: BaseException) -> str:
    """Give an error as words that fit into another one."""
    return f"{type(error).__name__}: {str(error).rstrip('.')}"

"""The pool: one plain dataset per teacher beside the inputs, joined on `id`. It knows no labels."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from datasets import Dataset
from huggingface_hub import CommitInfo

from ..data.columns import shorten
from ..files import check_free, file_digest, file_signature, link_file, whole_folder, write_text
from ..hierarchy import Teacher, TeacherHierarchy
from ..hub.cards import pool_card, write_card
from ..hub.client import is_folder
from ..processes import join_processes
from .files import (
    FORMAT_VERSION,
    HEADER,
    INPUTS,
    dump_header,
    file_names,
    find_own_file,
    ids_digest,
    map_file,
    open_folder,
    write_arrow,
)
from .hub import fetch_pool, push_pool
from .ids import match_ids, read_ids

P = TypeVar("P", bound="TeacherPool")
# Facts may hold anything that a teacher's maker noted, paths too: only these are fit for a card.
_FOR_CARDS = ("kind", "revision", "commit", "dropped_mass", "num_outside", "num_rescaled", "template")


class TeacherPool:
    """Hold what every teacher says about every example, as `datasets.Dataset`s that map files from disk.

    What is said is a matter of the kind of pool: a subclass names the `columns` that each teacher's dataset must have
    beside `id`, and may check them in `_open`. Here they are only stored, joined on `id`, selected and published.

    Args:
        hierarchy (`TeacherHierarchy`):
            The teachers, each of which has a dataset.
        teachers (`Mapping[str, datasets.Dataset]`):
            Dataset of each teacher by its name.
        inputs (`datasets.Dataset`, *optional*):
            `id` and the inputs. Without it, training needs a `train_dataset` with the same ids.
        facts (`Mapping[str, Any]`, *optional*):
            What is known about each teacher's run, JSON values by teacher name.
        source (`Mapping[str, Any]`, *optional*):
            Where the data came from, as far as it is certain: `dataset` (a Hub id) and its `commit`, and if the pool
            is of all rows of them, `config` and `split`.
        input_column (`str`, *optional*):
            The column of the data that models read, where it is known: `inputs` may hold others, or not hold it.

    Attributes:
        repo_id, commit (`str` or `None`):
            The data set on the Hub that the pool was loaded from, and its commit, 40 hexadecimal digits.

    Raises:
        ValueError: If a teacher of the hierarchy is missing, ids are repeated, missing or differ between datasets, or
            a teacher's dataset is not of this kind of pool. A `TypeError` if an argument is of another kind.
    """

    # A pool of written answers names other columns; what is stored, joined and pushed stays the same code.
    columns: ClassVar[tuple[str, ...]] = ()
    answers: ClassVar[str] = "Answers"  # what is held, for errors
    maker: ClassVar[str] = "build_pool"
    has_labels: ClassVar[bool | None] = None  # whether its hierarchy must have some; `None` for any

    def __init__(
        self,
        hierarchy: TeacherHierarchy,
        teachers: Mapping[str, Dataset],
        inputs: Dataset | None = None,
        facts: Mapping[str, Any] | None = None,
        source: Mapping[str, Any] | None = None,
        *,
        input_column: str | None = None,
    ) -> None:
        check_kind(hierarchy, TeacherHierarchy, "hierarchy")
        check_kind(inputs, Dataset, "inputs", optional=True)
        check_kind(input_column, str, "input_column", optional=True)
        if self.has_labels is not None:
            hierarchy.check_labels(f"`{type(self).__name__}`", wanted=self.has_labels)
        self.hierarchy = hierarchy
        self.input_column = input_column
        self.inputs = inputs
        self.facts: dict[str, Any] = dict(facts or {})
        self.source = None if source is None else dict(source)
        self.repo_id: str | None = None
        self.commit: str | None = None
        # Files that were mapped, and their digests where the header had them: gigabytes are not hashed twice.
        self._inputs_file: tuple[Dataset, Path] | None = None
        self._digests: dict[tuple[int, ...], str | None] = {}
        self._check_teachers(teachers)
        # In the order of the hierarchy, and none that it does not name: positions in `source_names` follow from it.
        self.teachers = {name: teachers[name] for name in hierarchy.names}
        # Without inputs the root's first teacher gives the examples and their order; the others are joined to it.
        self.ids = read_ids(inputs if inputs is not None else self.teachers[hierarchy.names[0]], "the pool")
        # Positions in a teacher's dataset of the pool's ids, where they stand in another order there.
        self._orders: dict[str, np.ndarray] = {}
        self._views: dict[str, Any] = {}  # what a kind of pool keeps of each teacher
        for name, dataset in self.teachers.items():
            self._open(name, dataset)
        self._read_inputs()

    def _check_teachers(self, teachers: Mapping[str, Dataset]) -> None:
        check_kind(teachers, Mapping, "teachers")
        if missing := [name for name in self.hierarchy.names if name not in teachers]:
            levels = sorted({self.hierarchy.teachers[self.hierarchy.index(name)].level for name in missing})
            raise ValueError(
                f"The pool must hold {self.answers.lower()} of every teacher of the hierarchy, got none of {missing} "
                f"(level {levels}). Label the data with them by `{self.maker}`."
            )
        needed = ("id", *self.columns)
        for name, dataset in teachers.items():
            check_kind(dataset, Dataset, f"teachers[{name!r}]")
            if lacking := [column for column in needed if column not in dataset.column_names]:
                listed = f"{', '.join(needed[:-1])} and {needed[-1]}" if len(needed) > 1 else needed[0]
                raise ValueError(f"{self.answers} of '{name}' must have the columns {listed}, got no {lacking}.")

    def _open(self, name: str, dataset: Dataset) -> None:
        """Find what a teacher says of each of the pool's ids; it may know more examples."""
        ids = read_ids(dataset, f"'{name}'")
        # Pools that `build_pool` made stand in one order: then no positions are kept, and views stay without a copy.
        if not np.array_equal(ids, self.ids):
            self._orders[name] = match_ids(ids, self.ids, f"{self.answers} of '{name}'")

    def _read_inputs(self) -> None:
        """Look at what a kind of pool must know of the inputs at once."""

    def __len__(self) -> int:
        return len(self.ids)

    def column(self, name: str, rows: slice = slice(None)) -> list[Any]:  # noqa: B008  # a slice cannot change
        """Give a metadata column of the inputs, of all rows by default; a `ValueError` where there is none."""
        columns = [] if self.inputs is None else self.inputs.column_names
        if self.inputs is None or name not in columns:
            raise ValueError(
                f"The pool's inputs must have a column {name!r}, got {columns}. Build the pool from data with it."
            )
        return list(self.inputs.select_columns([name])[rows][name])

    # Numpy would count negative rows from the end and read booleans as a mask: other examples, and no error.
    def _check_rows(self, rows: Any) -> Any:
        """Refuse rows that numpy would take for others, or for a mask."""
        if isinstance(rows, slice):
            return rows
        rows = np.asarray(rows)
        if rows.ndim != 1 or rows.size and rows.dtype.kind not in "iu":
            raise ValueError(
                f"`rows` must be positions of examples, integers of shape (num_rows,), got {rows.shape} of "
                f"{rows.dtype}. Of a mask, take `np.flatnonzero`."
            )
        if rows.size and not 0 <= rows.min() <= rows.max() < len(self):
            raise ValueError(
                f"`rows` must lie in 0..{len(self) - 1}, got {rows.min()}..{rows.max()}. Count from 0, in this pool."
            )
        # Unsigned 64-bit rows would become floats as soon as they meet signed ones.
        return rows.astype(np.int64, copy=False)

    def with_hierarchy(self: P, hierarchy: TeacherHierarchy) -> P:
        """Give the same answers under another hierarchy: fewer teachers, or other levels. Nothing is copied.

        A `ValueError` if the labels differ or a teacher is not in the pool.
        """
        check_kind(hierarchy, TeacherHierarchy, "hierarchy")
        if hierarchy.labels != self.hierarchy.labels:
            raise ValueError(
                f"Both hierarchies must have the labels {shorten(self.hierarchy.labels)}, got "
                f"{shorten(hierarchy.labels)}."
            )
        pool = type(self)(
            hierarchy, self.teachers, self.inputs, self.facts, self.source, input_column=self.input_column
        )
        # The ids are the same, so a push of this pool must still see what it would overtake there.
        pool.repo_id, pool.commit = self.repo_id, self.commit
        pool._inputs_file, pool._digests = self._inputs_file, self._digests
        return pool

    def select(self: P, rows: Sequence[int] | np.ndarray) -> P:
        """Give the pool of some examples by position; one twice, or one that is not there, is a `ValueError`."""
        rows = self._check_rows(np.asarray(rows))
        teachers = {
            # `rows` are positions among the pool's ids, which in this teacher's dataset may stand elsewhere.
            name: dataset.select(self._orders[name][rows] if name in self._orders else rows)
            for name, dataset in self.teachers.items()
        }
        inputs = None if self.inputs is None else self.inputs.select(rows)
        return type(self)(self.hierarchy, teachers, inputs, self.facts, self.source, input_column=self.input_column)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the pool to a new folder, whole or not at all; a `FileExistsError` if there is something already.

        It holds `pool.json`, `inputs/data.arrow`, `teachers/<name>/data.arrow` and a data-set card.
        """
        folder = Path(folder)
        check_free(folder, "Load it, or choose another folder.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Killed at any point, this leaves a hidden folder and never half a pool under the wanted name.
        with whole_folder(folder) as temporary:
            files, digests = self._write(temporary)
            for path, file in files.items():
                link_file(file, temporary / path)
            write_card(pool_card(self._card_facts()), temporary)
            # Last, because it holds the digests of the files above.
            write_text(temporary / HEADER, dump_header(self._header() | {"files": digests}))

    def _write(self, folder: Path, inputs: bool = True) -> tuple[dict[str, Path], dict[str, Any]]:
        """Write what is not on disk yet: where each file is now, and its size and digest for the header."""
        # What lies in a pool already is linked or uploaded from there: adding a teacher must not copy the others.
        datasets = {
            f"teachers/{name}/data.arrow": (dataset, find_own_file(dataset, name))
            for name, dataset in self.teachers.items()
        }
        if inputs and self.inputs is not None:
            datasets[INPUTS] = self.inputs, self._own_inputs()
        files, digests = {}, {}
        for path, (dataset, own) in datasets.items():
            if own is None:
                write_arrow(dataset, folder / path)
            files[path] = file = own or folder / path
            # A size is compared at every load, at no cost; the digest only where `verify` asks for it.
            digests[path] = [file.stat().st_size, self._digests.get(file_signature(file)) or file_digest(file)]
        return files, digests

    def _own_inputs(self) -> Path | None:
        """The file of a pool that holds the inputs as they are, if it is still the one that was mapped."""
        if self._inputs_file is None:
            return None
        dataset, path = self._inputs_file
        # Another file may have taken its place since: not the name, but the signature must be one that was mapped.
        return path if dataset is self.inputs and path.is_file() and file_signature(path) in self._digests else None

    def _header(self, inputs: bool = True) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "num_examples": len(self),
            # What a push compares with the pool that is there, without downloading any of its data.
            "ids_digest": ids_digest(self.ids),
            "has_inputs": inputs and self.inputs is not None,
            **self._own_header(),
            "hierarchy": self.hierarchy.to_dict(),
            "facts": self.facts,
            # Left out, not null, which `read_header` refuses as it refuses any other kind of value.
            **({} if self.source is None else {"source": self.source}),
            **({} if self.input_column is None else {"input_column": self.input_column}),
        }

    def _own_header(self) -> dict[str, Any]:
        """What the header of this kind of pool holds besides."""
        return {}

    def _card_facts(self, inputs: bool = True) -> dict[str, Any]:
        teachers = [
            {
                **self._own_card_facts(teacher.name),
                **teacher.to_dict(),
                "model": self.published_model(teacher),
                **{key: value for key, value in self.facts.get(teacher.name, {}).items() if key in _FOR_CARDS},
            }
            for teacher in self.hierarchy.teachers
        ]
        source = self.source or {}
        return {
            "teachers": teachers,
            "labels": list(self.hierarchy.labels),
            "num_examples": len(self),
            "input_columns": self.inputs.column_names if inputs and self.inputs is not None else None,
            "source_dataset": source.get("dataset"),
            "source_revision": source.get("commit"),
            "source_split": source.get("split"),
        }

    def _own_card_facts(self, name: str) -> dict[str, Any]:
        """What the card of this kind of pool tells of a teacher besides."""
        return {}

    def published_model(self, teacher: Teacher) -> str | None:
        """Tell where others find a teacher: its Hub id or column, `None` where it is not known to be on the Hub."""
        # Only a commit proves that a teacher is on the Hub: an id that looks like one may be a folder of this machine.
        is_known = not teacher.has_files or self.facts.get(teacher.name, {}).get("commit") is not None
        return teacher.model if is_known else None

    def _published_hierarchy(self) -> dict[str, Any]:
        """The hierarchy for others: of a teacher in a folder only the last name, the rest is nobody's business."""
        hierarchy = self.hierarchy.to_dict()
        for teacher, known in zip(hierarchy["teachers"], self.hierarchy.teachers):
            # One that was labelled here and has no commit was in a folder, whether that still exists or not.
            is_local = "commit" in self.facts.get(known.name, {}) or is_folder(known.model)
            if is_local and self.published_model(known) is None:
                teacher["model"] = f"./{Path(known.model).name}"
        return hierarchy

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload pool",
        inputs: bool = True,
        replace: bool = False,
        license: str | None = None,
        source_dataset: str | None = None,
        tags: Sequence[str] = (),
    ) -> CommitInfo:
        """Put the pool on the Hub as a data set, in one commit: all of it is there afterwards, or nothing.

        Pushed again with another teacher, only that teacher's file is uploaded. A card that was edited by hand is
        kept. Teachers in folders of this machine are named without their path. All processes of a launch must call
        it; the first one pushes.

        Args:
            repo_id (`str`):
                `name` or `user/name`; made where there is none, `private` as the owner's setting is by default.
            private (`bool`, *optional*), token (`str`, *optional*), commit_message (`str`, *optional*):
                As in `huggingface_hub`.
            revision (`str`, *optional*):
                Branch to push to, made where it does not exist. Defaults to the main branch.
            inputs (`bool`, *optional*, defaults to `True`):
                Whether the inputs go along. Without them, training needs the data as `train_dataset`; inputs of an
                earlier push are deleted, though its commit still holds them.
            replace (`bool`, *optional*, defaults to `False`):
                Delete what the repository's pool has and this one has not, teachers or the inputs; and overwrite what
                was pushed there since this pool was loaded.
            license (`str`, *optional*):
                Licence for the card, as the Hub names it (`"cc-by-4.0"`). This, `source_dataset` and `tags` stay as
                they were in a push before where they are not given.
            source_dataset (`str`, *optional*):
                Hub id of the data, for the card. Defaults to that of `source`.
            tags (`Sequence[str]`, *optional*):
                More tags for the card.

        Returns:
            `CommitInfo`: The commit; the last one, where nothing has changed.

        Raises:
            HfHubHTTPError: If the Hub refuses the push, also because somebody else pushed at the same moment; errors
                of `huggingface_hub` stay what they are, with a note on what to do.
            PermissionError: If the token may only read.
            ValueError: If the id cannot be one, or the repository holds something else that would be lost.
        """
        card = {"license": license, "source_dataset": source_dataset, "tags": list(tags)}
        # What is not given stays as an earlier push set it; an empty value would delete it there.
        card = {key: value for key, value in card.items() if value}

        def push() -> CommitInfo:
            return push_pool(
                repo_id,
                self._header(inputs) | {"hierarchy": self._published_hierarchy()},
                self._card_facts(inputs),
                partial(self._write, inputs=inputs),
                lacks_inputs=inputs and self.inputs is None,
                origin=(self.repo_id, self.commit),
                card=card,
                private=private,
                token=token,
                revision=revision,
                replace=replace,
                message=commit_message,
            )

        # Several pushes at once would refuse each other by their parent commit.
        return join_processes().on_first(push)

    @classmethod
    def load(
        cls: type[P],
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | None = None,
        verify: bool = False,
    ) -> P:
        """Open a pool that [`save`] or [`push_to_hub`] wrote; files are mapped, not read.

        Args:
            source (`str` or `os.PathLike`):
                Its folder, or the id of a data set on the Hub, of which only the pool's files are downloaded.
            revision (`str`, *optional*):
                Branch, tag or commit on the Hub. Defaults to the main branch.
            token (`str`, *optional*):
                Instead of the token of the environment.
            verify (`bool`, *optional*, defaults to `False`):
                Read every file and compare it with the digest in the header; sizes are always compared.

        Returns:
            `PseudolabelPool`: Its `repo_id` and `commit` say where on the Hub it is from.

        Raises:
            RevisionResolutionError: If the Hub cannot be reached and the cache does not hold the pool; this and other
                errors of `huggingface_hub` stay what they are, with a note on what to do.
            FileNotFoundError: If there is no pool, or a file of it is missing.
            RepositoryNotFoundError: If the repository is not there, is private or is gated.
            ValueError: If it was written by a newer version, a file is damaged, or its content is not valid.
        """
        # A folder wins over an id of the same name, as everywhere in the library.
        if is_folder(source):
            if revision is not None:
                raise ValueError(f"`revision` is for pools on the Hub, got {revision!r} for '{source}'. Leave it out.")
            folder = Path(source)
            header = open_folder(folder)
            return cls._map_files(
                folder, header, verify, f"'{folder}'", "Label the data again, or copy the whole folder."
            )
        repo_id = str(source)
        folder, header, commit = fetch_pool(repo_id, revision, token)
        pool = cls._map_files(folder, header, verify, f"'{repo_id}' at {commit[:12]}", "Go online and load it again.")
        pool.repo_id, pool.commit = repo_id, commit
        return pool

    @classmethod
    def _map_files(cls: type[P], folder: Path, header: dict[str, Any], verify: bool, what: str, advice: str) -> P:
        """Map the files of a pool that are all there by now."""
        if verify and not set(file_names(header)) <= set(header.get("files", {})):
            raise ValueError(
                f"Pool {what} must have digests to be verified, got one of an older version. Save it again."
            )
        hierarchy = TeacherHierarchy.from_dict(header["hierarchy"])
        if cls.has_labels is not None:  # before its files: a pool of the other kind is whole
            hierarchy.check_labels(f"`{cls.__name__}.load` of {what}", wanted=cls.has_labels)
        datasets, digests = {}, {}
        # The header says which files there must be; whatever else lies in the folder is not opened.
        for path in file_names(header):
            size, digest = header.get("files", {}).get(path, (None, None))
            datasets[path] = map_file(folder, path, size, digest, verify, what, advice)
            # By signature, so that the digest no longer counts for a file that changes after this.
            digests[file_signature(folder / path)] = digest
        teachers = {name: datasets[f"teachers/{name}/data.arrow"] for name in hierarchy.names}
        try:
            pool = cls(
                hierarchy,
                teachers,
                datasets.get(INPUTS),
                header["facts"],
                header.get("source"),
                input_column=header.get("input_column"),
            )
        except ValueError as error:
            raise ValueError(f"Pool {what} must be as it was saved, got: {error} {advice}") from error
        if len(pool) != header["num_examples"]:
            raise ValueError(
                f"Pool {what} must hold {header['num_examples']} examples, got {len(pool)}. Label the data again."
            )
        pool._digests = digests
        if pool.inputs is not None:
            # The dataset itself tells later whether `inputs` was replaced on this object.
            pool._inputs_file = (pool.inputs, folder / INPUTS)
        return pool


def check_kind(value: Any, kind: type, name: str, *, optional: bool = False) -> None:
    """Refuse an argument of another kind."""
    if not (isinstance(value, kind) or optional and value is None):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise TypeError(f"`{name}` must be {article} `{kind.__name__}`, got {type(value).__name__}. Make one first.")

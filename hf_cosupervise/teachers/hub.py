"""Hierarchies of teachers in one repository of the Hub: load one by its id, push one with its card."""

from __future__ import annotations

import dataclasses
import fnmatch
import glob
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo

from ..files import read_json
from ..hierarchy import Teacher, TeacherHierarchy, is_inner_folder, read_hierarchy
from ..hub.cards import hierarchy_card
from ..hub.client import CARD, fetch_files, is_folder, list_files, open_repo, publish, resolve_commit
from ..models.source import MODEL_FILES, ModelSource, find_model
from ..strict_yaml import dump_yaml
from .kinds.loading import find_kind

logger = logging.getLogger(__name__)

HIERARCHY_FILES = ("hierarchy.yaml", "hierarchy.json")
_TEACHER_FILES = (*MODEL_FILES, "model.skops", "adapter_config.json", "adapter_model.safetensors")
_WHAT = "The hierarchy"
_OF_ANY_REPO = (CARD, ".gitattributes", ".gitignore", "LICENSE", "LICENSE.md", "LICENSE.txt")
_FACTS = ("name", "license", "tags", "datasets", "modality", "accuracy", "versions")


def load_hierarchy(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    trust_types: Sequence[str] = (),
) -> TeacherHierarchy:
    """Load a hierarchy of teachers: a file, a folder that holds `hierarchy.yaml`, or such a repository of the Hub.

    Teachers that lie in the repository are pinned to its commit, and load from it one by one. Other Hub ids stay as
    they are written there.

    Args:
        source (`str` or `os.PathLike`):
            File, folder or Hub id of a model repository.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        token (`str`, *optional*):
            Instead of the token of the environment, for the hierarchy itself; teachers are loaded with the latter.
        trust_types (`Sequence[str]`, *optional*):
            Types in scikit-learn files that you trust. What a hierarchy of the Hub trusts by itself is somebody else's
            word and does not count.

    Returns:
        `TeacherHierarchy`

    Raises:
        FileNotFoundError: If it is not there; errors of `huggingface_hub` stay what they are, with a note on what
            to do.
        ValueError: If it is no hierarchy, or a teacher of the Hub's is named by a path out of its repository.

    Examples:
        >>> hierarchy = load_hierarchy("user/weak-teachers", revision="v1")  # doctest: +SKIP
    """
    path = Path(source)
    # By its suffix where it does not exist: no id ends so, and the sentence then speaks of a file.
    is_file = path.is_file() or path.suffix in (".json", ".yaml", ".yml")
    if is_file or is_folder(source):
        if revision is not None:
            raise ValueError(
                f"`revision` is for hierarchies on the Hub, got {revision!r} for '{source}', which is here. Leave it "
                "out."
            )
        found = [path / name for name in HIERARCHY_FILES if (path / name).is_file()]
        return TeacherHierarchy.load(path if is_file else [*found, path / HIERARCHY_FILES[0]][0])
    repo_id = str(source)
    commit = resolve_commit(repo_id, revision, what=_WHAT, token=token)
    hierarchy, folder = _read_from_hub(repo_id, commit, token)
    teachers = [_take(teacher, folder, repo_id, commit) for teacher in hierarchy.teachers]
    return TeacherHierarchy(hierarchy.labels, _keep_trusted(teachers, repo_id, trust_types))


def _read_from_hub(repo_id: str, commit: str, token: str | None) -> tuple[TeacherHierarchy, Path]:
    """The hierarchy as it is written, and the folder of the cache that shows which teachers are with it."""
    # Configurations only show which folders are teachers; weights come when a teacher is loaded.
    wanted = [*HIERARCHY_FILES, "*/config.json", "*/adapter_config.json"]
    folder = fetch_files(repo_id, commit, wanted, what=_WHAT, token=token)
    found = [folder / name for name in HIERARCHY_FILES if (folder / name).is_file()]
    if not found:
        raise FileNotFoundError(
            f"{_WHAT} must be a repository with a '{HIERARCHY_FILES[0]}', got none in '{repo_id}'. Push one with "
            "`push_hierarchy`; a single model is named in a `Teacher`."
        )
    return read_hierarchy(found[0], f"'{found[0].name}' in '{repo_id}'"), folder


def _take(teacher: Teacher, folder: Path, repo_id: str, commit: str) -> Teacher:
    """A teacher as it is meant in a repository: a folder of it, or another repository."""
    if not teacher.has_files:
        return teacher
    inner = teacher.model.removeprefix("./")
    if is_inner_folder(inner) and (folder / inner).is_dir():
        within = inner if teacher.subfolder is None else f"{inner}/{teacher.subfolder}"
        # By the commit, not the branch: a teacher that is loaded later must be the one that was listed.
        return dataclasses.replace(teacher, model=repo_id, subfolder=within, revision=commit)
    other = teacher.model.removeprefix("hf-hub:").split("@")[0]
    # A path in a file of others would load a model of this machine under the name of a teacher.
    if not is_inner_folder(other) or other.count("/") > 1:
        raise ValueError(
            f"Teacher '{teacher.name}' in the hierarchy '{repo_id}' must be a folder of that repository or a Hub id, "
            f"got `model` {teacher.model[:200]!r}. Correct it there."
        )
    # A folder of that name in the working directory would be taken for it later.
    if is_folder(other):
        raise ValueError(
            f"Teacher '{teacher.name}' in the hierarchy '{repo_id}' must be a Hub id, got `model` {teacher.model!r}, "
            "and there is a folder of that name here, which was not opened. Work in another folder, or rename it."
        )
    return teacher


def _keep_trusted(teachers: Sequence[Teacher], repo_id: str, trust_types: Sequence[str]) -> list[Teacher]:
    """Drop the types that a hierarchy of the Hub trusts and the user does not."""
    # A trusted type is code that may run when a file is read: only who runs it can say so.
    trusted = set(trust_types)
    names = [teacher.name for teacher in teachers if not trusted.issuperset(teacher.trusted_types)]
    if types := sorted({item for one in teachers for item in one.trusted_types} - trusted):
        logger.warning(
            f"'{repo_id}' trusts types in scikit-learn files of the teachers {names}, which is its author's "
            f"word and not followed. If you trust its origin: `load_hierarchy({repo_id!r}, trust_types={types})`."
        )
    return [
        dataclasses.replace(one, trusted_types=tuple(item for item in one.trusted_types if item in trusted))
        for one in teachers
    ]


def push_hierarchy(
    hierarchy: TeacherHierarchy,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Hierarchy of teachers",
    replace: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> CommitInfo:
    """Push a hierarchy as one model repository, in one commit: `hierarchy.yaml`, a folder per teacher, and a card.

    Teachers that are folders are uploaded, only the files that loading reads. Teachers of the Hub stay where they are,
    pinned to the commit that they are at now. Other files in the repository stay, and so does what was edited by hand
    in the card.

    Args:
        hierarchy (`TeacherHierarchy`):
            What to push.
        repo_id (`str`):
            `name` or `user/name`; made where it does not exist.
        private (`bool`, *optional*), token (`str`, *optional*), revision (`str`, *optional*), commit_message (`str`):
            As in [`PseudolabelPool.push_to_hub`]; teachers of the Hub are read with the token of the environment.
        replace (`bool`, *optional*, defaults to `False`):
            Delete the teachers of the repository that are not in this hierarchy, with their folders.
        facts (`Mapping[str, Any]`, *optional*):
            For the card: `name`, `license`, `modality` (`str`), `tags`, `datasets` (`list[str]`), `versions` (`dict`),
            and `accuracy` (`dict[str, float]`, by name of the teacher; only where it was measured on data that the
            teacher was not trained on).

    Returns:
        `CommitInfo`: The commit; the last one, where nothing has changed.

    Raises:
        FileNotFoundError: If a teacher has no weights.
        HfHubHTTPError: If the Hub refuses the push, also because somebody else pushed at the same moment; errors of
            `huggingface_hub` stay what they are, with a note on what to do.
        TypeError: If `hierarchy` is no [`TeacherHierarchy`].
        ValueError: If the repository holds something else, a teacher cannot be shared, or its name is taken there.
    """
    if not isinstance(hierarchy, TeacherHierarchy):
        raise TypeError(f"`hierarchy` must be a `TeacherHierarchy`, got {type(hierarchy).__name__}. Make one first.")
    facts = _check_facts(facts or {}, hierarchy)
    found = {
        teacher.name: find_model(
            teacher.model, what=f"Teacher '{teacher.name}'", revision=teacher.revision, subfolder=teacher.subfolder
        )
        for teacher in hierarchy.teachers
        if teacher.has_files
    }
    for source in found.values():
        _check_shareable(source)
    repo_id = open_repo(repo_id, what=_WHAT, private=private, token=token)
    # A teacher that is in this repository already goes on living in it.
    inner = {name: item for name, item in found.items() if item.is_local or item.repo == repo_id}
    # After the repository was made and before any upload: its commit is the parent of the push.
    stale, parent = _check_repo(repo_id, hierarchy, inner, revision, token, replace)
    files: dict[str, str | Path | bytes] = {}
    for name, source in inner.items():
        files |= {f"{name}/{file}": content for file, content in _files_of(source).items()}
    written = [_write(one, found.get(one.name), one.name in inner, hierarchy) for one in hierarchy.teachers]
    files[HIERARCHY_FILES[0]] = dump_yaml(TeacherHierarchy(hierarchy.labels, written).to_dict()).encode("utf-8")
    facts["hub_branch"] = revision
    files[CARD] = hierarchy_card(_card_facts(hierarchy, repo_id, found, inner, facts)).encode("utf-8")
    return publish(
        files,
        repo_id,
        what=_WHAT,
        message=commit_message,
        revision=revision,
        token=token,
        parent=parent,
        # Names that may hold `[`; and a file that is pushed anew must not be deleted in the same commit.
        replaced=[glob.escape(name) for name in stale if name not in files],
    )


def _check_facts(facts: Mapping[str, Any], hierarchy: TeacherHierarchy) -> dict[str, Any]:
    if unknown := sorted(set(facts) - set(_FACTS)):
        raise ValueError(f"`facts` must have keys among {list(_FACTS)}, got unknown {unknown}. Drop them.")
    if unknown := sorted(set(facts.get("accuracy") or {}) - set(hierarchy.names)):
        raise ValueError(
            f"`accuracy` must be named by teachers {list(hierarchy.names)}, got unknown {unknown}. Correct the names."
        )
    return dict(facts)


def _check_shareable(source: ModelSource) -> None:
    """See that a folder can be loaded by others, before anything is uploaded."""
    if not source.is_local:
        return
    source.fetch()
    # Its path would mean another model, or none, to everybody else.
    if source.base is not None and source.base.is_local:
        raise ValueError(
            f"{source.what} must be an adapter whose base is on the Hub, got one on the folder "
            f"'{source.base.repo}', which nobody else has. Push the base first, or save the merged model."
        )


def _check_repo(
    repo_id: str,
    hierarchy: TeacherHierarchy,
    inner: Iterable[str],
    revision: str | None,
    token: str | None,
    replace: bool,
) -> tuple[list[str], str]:
    """See that nothing else would be lost; the files that the hierarchy there leaves behind, and its commit."""
    names, commit = list_files(repo_id, what=_WHAT, revision=revision, token=token)
    held = [name for name in names if name in HIERARCHY_FILES]
    if not held and (others := sorted(set(names) - set(_OF_ANY_REPO))):
        raise ValueError(
            f"{_WHAT} must be pushed to a new repository or onto another hierarchy, got '{repo_id}' with "
            f"{others[:8]}. Choose another `repo_id`."
        )
    old = _read_from_hub(repo_id, commit, token)[0].teachers if held else ()
    if (lost := [teacher.name for teacher in old if teacher.name not in hierarchy.names]) and not replace:
        raise ValueError(
            f"{_WHAT} must hold every teacher that the one in '{repo_id}' holds, got none called {lost}. Add them, or "
            "delete them there by `replace=True`."
        )
    folders = {teacher.model.removeprefix("./").rstrip("/") for teacher in old if teacher.has_files}
    # Without case, since some disks would put two such folders into one.
    taken = {name.split("/")[0].casefold() for name in names if not name.startswith(tuple(f"{f}/" for f in folders))}
    if clashing := sorted(name for name in inner if name.casefold() in taken | {CARD.casefold(), *HIERARCHY_FILES}):
        raise ValueError(
            f"Teachers must have names that are free in '{repo_id}', got {clashing}, which are files or folders of "
            "another use there. Rename them by `name`."
        )
    # The file there was written by anybody: a `model` such as '.' must not delete the whole repository.
    gone = [folder for folder in folders - set(inner) if is_inner_folder(folder)]
    stale = [name for name in names if name.startswith(tuple(f"{folder}/" for folder in gone))]
    # Of a teacher that stays, parts of earlier weights would mislead the loaders; other files are its owner's.
    stale += [
        name
        for name in names
        if name.rpartition("/")[0] in inner and any(fnmatch.fnmatch(name.split("/")[1], p) for p in _TEACHER_FILES)
    ]
    return [*stale, *(name for name in held if name != HIERARCHY_FILES[0])], commit


def _files_of(source: ModelSource) -> dict[str, Path | bytes]:
    """What of a teacher's folder is uploaded: the model and nothing that lies beside it."""
    folder = source.fetch()
    files: dict[str, Path | bytes] = {
        path.name: path for pattern in _TEACHER_FILES for path in sorted(folder.glob(pattern)) if path.is_file()
    }
    # Paths of this machine concern nobody; the folder itself stays as it is, only the uploaded text changes.
    for name in {"config.json", "tokenizer_config.json"} & set(files):
        content = read_json(folder / name, advice="Save the model again.")
        if {"_name_or_path", "name_or_path"} & set(content):  # so transformers 4 kept where a model was read from
            content = {key: value for key, value in content.items() if key not in ("_name_or_path", "name_or_path")}
            files[name] = (json.dumps(content, indent=2) + "\n").encode("utf-8")
    if source.base is not None:
        # An adapter on a base that moves on is another model tomorrow.
        pinned = {**(source.adapter or {}), "revision": source.base.commit}
        files["adapter_config.json"] = (json.dumps(pinned, indent=2) + "\n").encode("utf-8")
    return files


def _kind(teacher: Teacher, source: ModelSource, hierarchy: TeacherHierarchy) -> str:
    # Who writes is a language model, of whatever kind its files are.
    is_open = teacher.kind == "auto" and bool(hierarchy.labels)
    return find_kind(source, teacher.model) if is_open else teacher.kind


def _write(teacher: Teacher, source: ModelSource | None, is_inner: bool, hierarchy: TeacherHierarchy) -> Teacher:
    """A teacher as the hierarchy file of the repository names it."""
    if source is None:
        return teacher
    if is_inner:
        # The kind as found: who loads it need not have the files to find it by.
        kind = _kind(teacher, source, hierarchy)
        return dataclasses.replace(teacher, model=teacher.name, kind=kind, revision=None, subfolder=None)
    # Kept, for a kind may be told by it.
    prefix = "hf-hub:" if teacher.model.startswith("hf-hub:") else ""
    return dataclasses.replace(teacher, model=prefix + source.repo, revision=source.commit)


def _card_facts(
    hierarchy: TeacherHierarchy,
    repo_id: str,
    found: Mapping[str, ModelSource],
    inner: Mapping[str, ModelSource],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    teachers = []
    for teacher in hierarchy.teachers:
        record = {key: getattr(teacher, key) for key in ("name", "level", "scope", "domains", "kind", "label_texts")}
        record["template"] = (teacher.options or {}).get("template")
        record["accuracy"] = (facts.get("accuracy") or {}).get(teacher.name)
        if (source := found.get(teacher.name)) is not None:
            record["kind"] = "adapter" if source.is_adapter else _kind(teacher, source, hierarchy)
            record["subfolder"] = teacher.name if teacher.name in inner else teacher.subfolder
            if teacher.name not in inner:
                record |= {"model": source.repo, "revision": source.revision, "commit": source.commit}
        teachers.append(record)
    # Named where all are alike: a card has one task.
    modalities = {_modality(source) for source in found.values()} if hierarchy.labels else set()
    return {
        "modality": modalities.pop() if len(modalities) == 1 else None,
        "versions": {name: version(name) for name in ("hf_cosupervise", "transformers", "torch")},
        **{key: value for key, value in facts.items() if key != "accuracy"},
        "hub_model_id": repo_id,
        "labels": list(hierarchy.labels),
        "teachers": teachers,
    }


def _modality(source: ModelSource) -> str | None:
    """What a model reads, where its configuration tells."""
    config = (source.base or source).config
    feature, classes = config.get("feature"), str(config.get("architectures"))
    read = feature.get("kind") if isinstance(feature, Mapping) else None
    # A configuration of timm names an architecture, and timm has models of images only.
    is_image = read == "pixels" or "architecture" in config or "vision_config" in config
    if is_image or read != "text" and "ForImageClassification" in classes:
        return "image"
    return "text" if read == "text" or "ForSequenceClassification" in classes else None

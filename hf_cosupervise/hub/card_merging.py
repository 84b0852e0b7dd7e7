"""A card that people edited takes in a new one: their text and their metadata stay, what is ours is renewed.

A card starts with an invisible marker: the digests of its text and of each metadata key as we wrote them. What has
another digest, or none, was written by a person.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, NamedTuple

import yaml

logger = logging.getLogger(__name__)
_HEADER_START = re.compile(r"\s*---[ \t]*\n")
_HEADER = re.compile(_HEADER_START.pattern + r"(.*?)^---[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)
_MARKER = re.compile(r"\s*<!-- hf_cosupervise (\{.*\}) -->[ \t]*(?:\n|\Z)")
_DESCRIBED = ("configs", "model-index")  # say what the files and numbers are: never a matter of taste
_NAME_LISTS = ("tags", "datasets", "language", "metrics")  # take names of both sides


class MergedCard(NamedTuple):
    """What [`merge_card`] gives."""

    text: str
    kept: tuple[str, ...]


class _Card(NamedTuple):
    header: str
    metadata: dict[Any, Any]
    marker: dict[str, Any] | None
    body: str


def merge_card(existing: str, new: str) -> MergedCard:
    """Bring a new card into one that may have been edited by hand."""
    theirs, ours = _read(existing), _read(new)
    # Without a marker nothing there is ours: every key and the text count as a person's.
    known, marker = theirs.marker or _mark({}, ""), ours.marker or _mark(ours.metadata, ours.body)
    metadata, kept = _merge_metadata(theirs.metadata, ours.metadata, known["metadata"] if theirs.metadata else {})
    # Compared with what we wrote last time, not with what we would write now: that differs with every result.
    is_ours = not theirs.body or _digest(theirs.body) == known["body"]
    # Told only if there was something new to say that the kept text now lacks.
    if not is_ours and theirs.body != ours.body and known["body"] != marker["body"]:
        kept = ["text", *kept]
    same = [card.header for card in (ours, theirs) if card.metadata == metadata]  # with its comments and quotes
    text = _write(same[0] if same else _dump(metadata), marker, ours.body if is_ours else theirs.body)
    # An editor on Windows has saved it so; to change every line would show as a rewrite in the card's history.
    is_crlf = "\r\n" in existing and existing.count("\r\n") == existing.count("\n")
    return MergedCard(text.replace("\n", "\r\n") if is_crlf else text, tuple(kept))


def merge_into(existing: bytes, new: str, where: str) -> str:
    """Bring a new card into a file that is somewhere, and tell what was kept there."""
    try:
        merged = merge_card(existing.decode("utf-8"), new)
    except ValueError as error:  # a UnicodeDecodeError is one too
        found = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"{where} must be a card to merge into, got: {found}. Correct or delete it.") from error
    if merged.kept:
        logger.warning(f"{where}: edited by hand and kept: {', '.join(merged.kept)}. For a fresh card, delete it.")
    return merged.text


def sign_card(text: str) -> str:
    """Add the marker that tells what we wrote."""
    card = _read(text)
    return _write(card.header, _mark(card.metadata, card.body), card.body)


def _merge_metadata(
    theirs: Mapping[Any, Any], ours: Mapping[Any, Any], known: Mapping[Any, Any]
) -> tuple[dict[Any, Any], list[str]]:
    """Our values renewed beside those that a person set or deleted, and the keys in which a new one was refused."""
    # Of another value than we wrote, or a key that we never wrote.
    edited = {key: value for key, value in theirs.items() if known.get(key) != _digest(value)}
    merged = {
        key: _join(key, edited[key], value) if key in edited else value
        for key, value in ours.items()
        # A key that we wrote and that is gone was deleted by a person, and stays so.
        if key in theirs or key not in known or key in _DESCRIBED
    }
    mine = ours.keys() - {*_DESCRIBED, *_NAME_LISTS}
    kept = [
        key for key in ours if key in mine and merged.get(key) != ours[key] and known.get(key) != _digest(ours[key])
    ]
    # Keys of ours first, in our order; what a person added follows.
    return {**merged, **{key: edited[key] for key in edited if key not in ours}}, [f"metadata {key}" for key in kept]


def _join(key: Any, theirs: Any, ours: Any) -> Any:
    """What becomes of a person's value where we have one too."""
    if key == "model-index" and isinstance(theirs, list) and isinstance(ours, list):
        own = [entry.get("name") for entry in ours if isinstance(entry, dict)]
        others = [entry for entry in theirs if isinstance(entry, dict) and entry.get("name") not in own]
        return [*others, *ours]  # theirs first, for the Hub's library names all results after the last
    if key in _NAME_LISTS:
        old, new = ([value] if isinstance(value, str) else value for value in (theirs, ours))
        if all(isinstance(value, list) and all(isinstance(name, str) for name in value) for value in (old, new)):
            # Their order where nothing is new, so that an unchanged card makes no commit.
            return theirs if set(new) <= set(old) else list(dict.fromkeys([*old, *new]))
    return ours if key in _DESCRIBED else theirs


def _mark(metadata: Mapping[Any, Any], body: str) -> dict[str, Any]:
    return {"body": _digest(body), "metadata": {str(key): _digest(value) for key, value in metadata.items()}}


def _digest(value: Any) -> str:
    # Of the value as YAML and not of its text, so that other quotes or line breaks are no edit.
    return blake2b(_dump(value).encode(), digest_size=8).hexdigest()


def _dump(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=float("inf")) if value != {} else ""


def _read(text: str) -> _Card:
    # The byte order mark and line ends of Windows, which would hide the first '---'.
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    found = _HEADER.match(text)
    if found is None and _HEADER_START.match(text):
        raise _header_error("no second line '---'")
    header, body = (found[1], text[found.end() :]) if found else ("", text)
    try:
        metadata = yaml.safe_load(header) or {}
    except (yaml.YAMLError, ValueError) as error:  # an impossible date is a ValueError
        raise _header_error(" ".join(str(error).split())) from error
    if not isinstance(metadata, dict):
        raise _header_error(f"{type(metadata).__name__} {str(metadata)[:40]!r}")
    if "language" in metadata:
        metadata["language"] = yaml.load(header, yaml.BaseLoader)["language"]  # `no` is a language, not `False`
    marker = _MARKER.match(body)
    return _Card(header, metadata, marker and _read_marker(marker[1]), body[marker.end() if marker else 0 :].strip())


def _read_marker(text: str) -> dict[str, Any] | None:
    """What the marker says; None where somebody made it unreadable."""
    try:
        marker = json.loads(text)
    except (ValueError, RecursionError):
        return None
    # `_MARKER` lets objects only through, so there is a `get`.
    return marker if isinstance(marker.get("body"), str) and isinstance(marker.get("metadata"), dict) else None


def _header_error(found: str) -> ValueError:
    return ValueError(
        "A card's YAML header must be `key: value` lines between two lines '---' at its top, "
        f"got {found}. Repair the header, or delete it."
    )


def _write(header: str, marker: Mapping[str, Any], body: str) -> str:
    top = f"---\n{header}---\n" if header else ""
    return f"{top}<!-- hf_cosupervise {json.dumps(marker)} -->\n\n{body}\n"

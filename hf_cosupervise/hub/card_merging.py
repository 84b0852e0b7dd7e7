"""A card that people edited takes in a new one: what they wrote stays, what is ours is renewed.

Each card ends with an invisible comment that records a hash of every metadata key and section as we wrote it. What
still has that hash is ours and is replaced; what has another, or none, was written by a person.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from hashlib import blake2b
from typing import Any, NamedTuple

import yaml

from ..files import parse_json

NAME_LISTS = ("tags", "datasets", "language", "metrics")  # take names of both sides
DESCRIBED = ("configs", "model-index")  # say what the files and numbers are: never a matter of taste
_HEADER_START = re.compile(r"\s*---[ \t]*\n")
_HEADER = re.compile(_HEADER_START.pattern + r"(.*?)^---[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)
# A key with its value, and the comments above it; the last one takes the comments below, too.
_COMMENTS = r"(?:(?:#[^\n]*|[ \t]*)\n)*"
_BLOCK = re.compile(rf"{_COMMENTS}[\w'\"].*\n(?:{_COMMENTS}(?:-|[ \t]+\S).*\n)*(?:{_COMMENTS}\Z)?")
_DRESS = re.compile(rf"^({_COMMENTS})(.*?)^({_COMMENTS})\Z", re.DOTALL | re.MULTILINE)
# Code and comments are matched whole, to their end or to that of the text, so that no heading is found in them.
_MARKS = re.compile(
    r"^[ \t]*(?P<fence>`{3,}(?=[^`\n]*$)|~{3,}(?!~))(?:.*?^[ \t]*(?P=fence)[`~]*[ \t]*$|(?P<code>.*))"
    r"|^ {0,3}<!--(?:.*?-->|(?P<comment>.*))"
    r"|^##[ \t]+(?P<title>\S[^\n]*?)(?:[ \t]+#+)?[ \t]*$",
    re.DOTALL | re.MULTILINE,
)
_RECORD = re.compile(r"^<!-- hf_cosupervise (\{.*\}) -->[ \t]*\n?", re.MULTILINE)


class _Record(NamedTuple):
    metadata: dict[Any, str]  # hash of what we wrote, by key
    sections: dict[str, str]  # by title


class MergedCard(NamedTuple):
    """What [`merge_card`] gives."""

    text: str
    kept: tuple[str, ...]


class _Card(NamedTuple):
    metadata: dict[Any, str]  # the lines of each key
    sections: list[tuple[str, str]]  # title and text; the first is what stands before the first title
    record: _Record | None


def merge_card(existing: str, new: str) -> MergedCard:
    """Bring a new card into one that may have been edited by hand."""
    theirs, ours = _read(existing), _read(new)
    known, written = theirs.record or _Record({}, {}), ours.record or _record_of(ours)
    sections = list(theirs.sections)
    if theirs.record is None and not sections[0][1]:
        sections[0] = ours.sections[0]  # a card that starts with a title has no introduction of its own
    section_marks = None if theirs.record is None else known.sections
    sections, kept_sections = _merge_items(
        sections, dict(ours.sections), section_marks, written.sections, hash_of=_section_hash
    )
    key_marks = None if theirs.record is None else known.metadata
    metadata, kept_keys = _merge_metadata(theirs.metadata, ours.metadata, key_marks, written.metadata)
    if not theirs.metadata or not metadata:  # a header that was cut off whole is no decision about each of its keys
        metadata, kept_keys, key_marks = list(ours.metadata.items()), [], None
    record = _Record(
        _with_deleted(written.metadata, key_marks, [*theirs.metadata, *dict(metadata)]),
        _with_deleted(written.sections, section_marks, [*dict(theirs.sections), *dict(sections)]),
    )
    text = _write(dict(metadata), sections, record)
    kept = [title or "introduction" for title in kept_sections] + [f"metadata {key}" for key in kept_keys]
    is_crlf = "\r\n" in existing and existing.count("\r\n") == existing.count("\n")
    return MergedCard(text.replace("\n", "\r\n") if is_crlf else text, tuple(kept))


def sign_card(text: str) -> str:
    """Add the comment that records what we wrote."""
    card = _read(text)
    return _write(card.metadata, card.sections, _record_of(card))


# ── what is whose ───────────────────────────────────────────────────────────────────────────────────────────────────


def _merge_items(
    existing: list[tuple[Any, str]],
    new: Mapping[Any, str],
    record: Mapping[Any, str] | None,
    written: Mapping[Any, str],
    *,
    hash_of: Callable[[str], str],
) -> tuple[list[tuple[Any, str]], list[Any]]:
    """Items in their order with ours renewed, and keys of ours that a hand edit kept out; no record: all theirs."""
    known, ours = record or {}, {key: hash_of(text) for key, text in new.items()}
    is_ours = [hash_of(text) in (known.get(key), ours.get(key), written.get(key)) for key, text in existing]
    places: dict[Any, int] = {}
    for place in sorted(range(len(existing)), key=lambda place: not is_ours[place]):
        places.setdefault(existing[place][0], place)  # of two sections with one title, ours is the unedited one
    merged, taken = [], set()
    for place, (key, text) in enumerate(existing):
        if places[key] != place or not is_ours[place]:
            merged.append((key, text))
        elif key in new:
            merged.append((key, new[key]))
            taken.add(key)
    after = 0
    for key, text in new.items():
        present = [place for place, item in enumerate(merged) if item[0] == key]
        if present:
            after = present[-1] + 1
        elif key not in places and key not in known:
            after = len(merged) if record is None else after
            merged.insert(after, (key, text))
            taken.add(key)
            after += 1
    return merged, [key for key in new if key not in taken and ours[key] != known.get(key)]


def _merge_metadata(
    theirs: Mapping[Any, str], ours: Mapping[Any, str], record: Mapping[Any, str] | None, written: Mapping[Any, str]
) -> tuple[list[tuple[Any, str]], list[Any]]:
    """As other items, but for the keys that take something of both sides: these are settled on both beforehand."""
    theirs, ours, known = dict(theirs), dict(ours), dict(record or {})
    settled = {key for key in DESCRIBED if key in ours}
    for key in NAME_LISTS:
        if key in theirs and key in ours and _value_hash(theirs[key]) not in (known.get(key), written.get(key)):
            union = _union(key, theirs[key], ours[key])
            ours.update({key: union} if union else {})
            settled |= {key} if union else set()
    if "model-index" in theirs:
        marks = (known.get("model-index"), written.get("model-index"))
        results = _join_results(theirs["model-index"], ours.get("model-index"), marks)
        ours.update(results)
        settled |= results.keys()
    ours.update({key: _dress(ours[key], theirs[key]) for key in ours.keys() & theirs.keys()})
    theirs.update({key: ours[key] for key in settled & theirs.keys()})
    for key in settled & set(DESCRIBED):
        known.pop(key, None)  # also where a person deleted it
    return _merge_items(list(theirs.items()), ours, None if record is None else known, written, hash_of=_value_hash)


def _dress(ours: str, theirs: str) -> str:
    """Our lines of a key between the comments that are around theirs."""
    above, _, below = _DRESS.findall(theirs)[0]
    return f"{above}{_DRESS.findall(ours)[0][1]}{below}"


def _union(key: str, theirs: str, ours: str) -> str | None:
    """The lines of a list with the names of both, theirs first; None where one is no list of names."""
    left, right = _names(theirs), _names(ours)
    if left is None or right is None:
        return None
    if set(right) <= set(left):
        return theirs
    return ours if set(left) <= set(right) else _dump(key, list(dict.fromkeys([*left, *right])))


def _names(block: str) -> list[str] | None:
    (value,) = yaml.load(block, yaml.BaseLoader).values()  # all strings: the language `no` is not `False`
    names = [value] if isinstance(value, str) and value else value or []
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _join_results(theirs: str, ours: str | None, marks: tuple[str | None, ...]) -> dict[str, str]:
    """Results of other people beside ours; theirs first, for the Hub's library names all of them after the last."""
    found, own = _value(theirs), _value(ours) if ours else []
    if not isinstance(found, list) or not isinstance(own, list):
        return {}
    names = [_entry_name(entry) for entry in own]
    others = [entry for entry in found if _hash_json([entry]) not in marks and _entry_name(entry) not in names]
    if not others:
        return {}
    joined = [*others, *own]
    return {"model-index": theirs if joined == found else _dump("model-index", joined)}


def _entry_name(entry: Any) -> Any:
    return entry.get("name") if isinstance(entry, dict) else entry


# ── hashes ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _record_of(card: _Card) -> _Record:
    return _Record(
        {key: _value_hash(block) for key, block in card.metadata.items()},
        {title: _section_hash(text) for title, text in card.sections},
    )


def _with_deleted(
    written: Mapping[Any, str], marks: Mapping[Any, str] | None, present: Collection[Any]
) -> dict[Any, str]:
    """What we wrote, and once wrote and a person deleted: it stays away, also when a card without it came between."""
    gone = {key: mark for key, mark in (marks or {}).items() if key not in present and key not in written}
    return {**written, **gone}


def _section_hash(text: str) -> str:
    return blake2b(" ".join(text.split()).encode(), digest_size=4).hexdigest()


def _value_hash(block: str) -> str:
    return _hash_json(_value(block))


def _hash_json(value: Any) -> str:
    try:
        return _section_hash(json.dumps(value, sort_keys=True, default=str))
    except (TypeError, ValueError):
        return ""  # YAML that is no JSON is never ours


# ── reading and writing ─────────────────────────────────────────────────────────────────────────────────────────────


def _read(text: str) -> _Card:
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    header = _HEADER.match(text)
    if header is None and _HEADER_START.match(text):
        raise _header_error("no second line '---'")
    body = text[header.end() :] if header else text
    records = _RECORD.findall(body)
    metadata = _split_header(header[1]) if header else {}
    return _Card(metadata, _split_body(_RECORD.sub("", body)), _read_record(records[-1]) if records else None)


def _read_record(text: str) -> _Record | None:
    """What the comment says; None where somebody made it unreadable."""
    try:
        record = parse_json(text.encode("utf-8"))
    except ValueError:
        return None
    metadata, sections = record.get("metadata"), record.get("sections")
    return _Record(metadata, sections) if isinstance(metadata, dict) and isinstance(sections, dict) else None


def _split_header(header: str) -> dict[Any, str]:
    """The lines of each key as they were written, with quotes and comments."""
    try:
        values = yaml.safe_load(header) or {}
    except (yaml.YAMLError, ValueError) as error:  # an impossible date is a ValueError
        raise _header_error(" ".join(str(error).split())) from error
    if not isinstance(values, dict):
        raise _header_error(f"{type(values).__name__} {str(values)[:40]!r}")
    blocks = _BLOCK.findall(header)
    try:
        parts = [yaml.safe_load(block) for block in blocks]
    except yaml.YAMLError:
        parts = []
    if "".join(blocks) == header and [item for part in parts for item in part.items()] == list(values.items()):
        return dict(zip(values, blocks))
    return {key: _dump(key, value) for key, value in values.items()}  # one key's lines need another's, or braces


def _header_error(found: str) -> ValueError:
    return ValueError(
        "A card's YAML header must be `key: value` lines between two lines '---' at its top, "
        f"got {found}. Repair the header, or delete it."
    )


def _split_body(body: str) -> list[tuple[str, str]]:
    every = list(_MARKS.finditer(body))
    if every and every[-1]["code"] is not None:  # never ended: what is put behind it would be code, too
        body = f"{body.rstrip()}\n{every[-1]['fence']}"
    elif every and every[-1]["comment"] is not None:
        body = f"{body.rstrip()}\n-->"
    marks = [mark for mark in every if mark["title"]]
    edges = [0, *(mark.start() for mark in marks), len(body)]
    titles = ["", *(mark["title"] for mark in marks)]
    return [(title, body[start:end].strip("\n").rstrip()) for title, start, end in zip(titles, edges, edges[1:])]


def _value(block: str) -> Any:
    (value,) = yaml.safe_load(block).values()
    return value


def _dump(key: Any, value: Any) -> str:
    return yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True, width=float("inf"))


def _write(metadata: Mapping[Any, str], sections: list[tuple[str, str]], record: _Record) -> str:
    header = ["---\n" + "".join(metadata.values()) + "---"] if metadata else []
    safe = json.dumps(record._asdict()).replace("--", r"\u002d\u002d")  # two hyphens could end the comment
    comment = f"<!-- hf_cosupervise {safe} -->"
    return "\n\n".join([*header, *(text for _, text in sections if text), comment]) + "\n"

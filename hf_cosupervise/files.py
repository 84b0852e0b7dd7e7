"""How anything is written: under a name that nobody can guess, then renamed; and never through somebody's link."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import secrets
import shutil
import stat
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

logger = logging.getLogger(__name__)

# Full disk, used-up quota, and a limit on the size of a file.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# The largest that anybody publishes, a `tokenizer.json`, has 40 MB; configurations are nested ten deep, and the
# largest number in them is the int(1e30) by which tokenizers say that they read texts of any length.
MAX_JSON_BYTES, _MAX_DEPTH, _MAX_DIGITS = 256 << 20, 64, 64


# ── whole or not at all ─────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give an empty file of a new name to write to, which gets its own name when the block ends well."""
    temporary = _new_name(path)
    # With the rights that any new file gets, and only if nothing is there, not even a link.
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        # After a rename nothing is there any more; after an error only what was begun, never the old file.
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a new, empty folder to fill, which gets its own name when the block ends well."""
    temporary = _new_name(path)
    temporary.mkdir()
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        # Errors are ignored, for they would take the place of the one that stopped the work.
        shutil.rmtree(temporary, ignore_errors=True)


def _new_name(path: Path) -> Path:
    """A hidden name beside a path, too long to guess and short enough for every disk."""
    # Beside the path, because a rename cannot cross disks; the suffix stays, by which some writers choose a format.
    return path.with_name(f".{path.stem[:40]}-{secrets.token_hex(8)}{path.suffix[-20:]}")


def write_text(path: Path, text: str, newline: str | None = None) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline=newline)


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write a JSON file, whole or not at all; its folder is made, and what is no finite number becomes null."""
    # Before the folder is made: a value that is no JSON must leave nothing behind.
    text = json.dumps(without_nan(value), indent=indent) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def write_all(file: int, data: bytes) -> None:
    """Write bytes to a file descriptor."""
    rest = memoryview(data)
    while rest:
        # `os.write` may write less than it is given, as on a disk that is nearly full, and only its number says so.
        rest = rest[os.write(file, rest) :]


def move_file(source: Path, target: Path) -> None:
    """Give a whole file, or a whole folder, another name on the same disk; what has that name is replaced."""
    os.replace(source, target)


def link_file(source: Path, path: Path) -> None:
    """Put a file at another path without a copy, where the disk allows it: files of a pool are never changed."""
    if source == path:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    source = source.resolve()  # in the Hub's cache, a name is a symbolic link to the content
    try:
        os.link(source, path)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, path)


# ── JSON that anybody may have written ──────────────────────────────────────────────────────────────────────────────


def read_json(path: Path, what: str = "", advice: str = "Copy or write it again.") -> dict[str, Any]:
    """Read a JSON object, with a sentence that names the file where it is none."""
    subject = f"{what} must have a '{path.name}' that is" if what else f"'{path}' must be"
    try:
        # A `UnicodeDecodeError` is a `ValueError` too; what the disk says (no file, no rights) stays what it is.
        content = load_json(path)
    except ValueError as error:
        raise ValueError(f"{subject} JSON, got: {error}. {advice}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{subject} a JSON object, got a {type(content).__name__}. {advice}")
    return content


def load_json(path: Path) -> Any:
    """Read JSON of any kind, by [`parse_json`]."""
    # Before it is read: a file of others may be larger than the memory.
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(f"{size:,} bytes, more than {MAX_JSON_BYTES:,}")
    return parse_json(path.read_bytes())


def parse_json(content: bytes) -> Any:
    """Read JSON strictly, with one sentence where it is none: what is valid here means the same to every reader."""
    try:
        value = json.loads(
            # `json.loads` would guess UTF-16 or 32 from bytes, where other readers see garbage.
            content.decode("utf-8"),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_no_number,
        )
        is_too_deep = _depth(value) > _MAX_DEPTH
    except RecursionError:  # Python's own reader gives up at about a thousand levels
        is_too_deep = True
    if is_too_deep:
        raise ValueError(f"objects or lists nested more than {_MAX_DEPTH} deep")
    return value


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    # Level by level: a call for each of millions of numbers takes longer than to read them.
    while level := [
        item
        for outer in level
        if isinstance(outer, dict | list)
        for item in (outer.values() if isinstance(outer, dict) else outer)
    ]:
        depth += 1
    return depth


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    # Readers do not agree which of two equal keys counts: what is checked could be another value than what is used.
    if len(values) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice[:80]!r} twice in one object")
    return values


def _integer(text: str) -> int:
    # `int` takes time that grows with the square of the digits, and Python stops at 4,300 with an error of its own.
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(text):,} digits")
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:80]!r}, which is too large")
    return value


def _no_number(text: str) -> float:
    raise ValueError(f"{text}, which is no number of JSON")


# ── where to write, and from where to read ──────────────────────────────────────────────────────────────────────────


def check_free(folder: Path, advice: str) -> None:
    """Refuse to write where something is already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"'{folder}' must not exist or be empty, got files there. {advice}")


def make_output_dir(path: Path, name: str = "output_dir") -> None:
    """Make a folder that a run writes to; `name` is what the option is called."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Tried and not asked: what `os.access` tells is not what network disks and containers allow.
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OSError(
            f"`{name}` must be a folder that can be written, got '{path}': {error.strerror or error}. Choose "
            "another one."
        ) from error


def open_work_folder(path: Path) -> None:
    """Make a folder of a fixed name for work in progress, or see that the one there is of a run of this user."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir()
        return
    except FileExistsError:
        # The name is known to everybody, so that another user of the machine may have been there first.
        found = _what_is_wrong(path)
    if found:
        raise FileExistsError(
            f"'{path}' must be a folder in which a run of yours has left its work, got {found}. See what it is, and "
            "delete it."
        )


def take_lock(path: Path) -> FileLock:
    """Take the lock of a path, or raise `filelock.Timeout` where another run has it; it frees itself by `release`."""
    # The kernel gives it back when this process ends, however it ends: no crash leaves one behind.
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise
    except (OSError, NotImplementedError) as error:  # some network file systems have no locks
        logger.info(f"'{path.parent}' cannot be locked ({error}): use it by one run at a time.")
    return lock


def _what_is_wrong(path: Path) -> str:
    """Why a folder cannot be gone on in; empty where it can."""
    # Not `stat`, which would look at what a link leads to.
    known = path.lstat()
    if stat.S_ISLNK(known.st_mode):
        return "a symbolic link"
    if not stat.S_ISDIR(known.st_mode):
        return "a file"
    with tempfile.TemporaryFile(dir=path) as file:  # some network disks call us by another number than the system does
        if os.fstat(file.fileno()).st_uid != known.st_uid:
            return "a folder of another user"
    # A link inside would be written through when work goes on, just as one in place of the folder.
    for folder, folders, files in os.walk(path):
        if links := [name for name in (*folders, *files) if Path(folder, name).is_symlink()]:
            return f"the symbolic link '{Path(folder, links[0]).relative_to(path)}' in it"
    return ""


def is_inside(path: Path, folder: Path) -> bool:
    """Tell whether a path leads into a folder when all links on the way are followed."""
    folder = folder.resolve()
    # The Hub's cache keeps contents in `blobs`, beside the `snapshots` whose files are links to them.
    snapshots = [parent for parent in folder.parents if parent.name == "snapshots"]
    return any(
        path.resolve().is_relative_to(root) for root in (folder, *(found.parent / "blobs" for found in snapshots))
    )


# ── a full disk ─────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def explain_full_disk(folder: Path, advice: str, num_bytes: int | None = None) -> Iterator[None]:
    """Say in one sentence that a disk is full, whatever the writer of a file makes of it."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, OSError):
            is_full = error.errno in _FULL
        elif isinstance(error, SafetensorError):
            # Safetensors is written in Rust: its errors have no number but in their text.
            is_full = any(f"(os error {number})" in str(error) for number in _FULL)
        else:  # how `torch.save` says that less was written than it gave
            is_full = "inline_container.cc" in str(error) or "iostream error" in str(error)
        if not is_full:
            raise
        # Whoever handles a full disk by `errno` finds it, whichever library has written.
        number = error.errno if isinstance(error, OSError) else errno.ENOSPC
        needs, free = "what is kept there", ""
        if num_bytes is not None:
            needs = f"about {num_bytes / 1e6:.1f} MB in all"
            free = f" ({shutil.disk_usage(folder).free / 1e6:.1f} MB free now)"
        raise OSError(
            number, f"The disk of '{folder}' must have room for {needs}, got it full{free}: {error}. {advice}"
        ) from error


# ── comparing ───────────────────────────────────────────────────────────────────────────────────────────────────────


def file_signature(path: Path) -> tuple[int, ...]:
    """Give what tells a file from another one that took its place."""
    found = path.stat()
    # Device and inode tell a file that took the place of another with its size and time.
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def file_digest(path: Path) -> str:
    """Hash a file as the Hub does."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_as_written(folder: Path, name: str, digest: str) -> bool:
    """Whether a file is in a folder, not behind a link or a path that leads out of it, and is the one noted."""
    path = folder / name
    # In this order: a path that leads out is not opened, whatever it holds.
    return is_inside(path, folder) and path.is_file() and file_digest(path) == digest


def differences(old: Any, new: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Find what differs between two JSON values: the place, what was there and what is there now."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted(old.keys() | new.keys()):
            # A key that one side lacks counts as null: records of older versions leave out what they did not know.
            yield from differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    # Of lists of two lengths no item has a partner: they differ as a whole.
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (before, after) in enumerate(zip(old, new)):
            yield from differences(before, after, f"{where}[{index}]")
    elif old != new:
        yield where, old, new


def without_nan(value: Any) -> Any:
    """Give numbers as JSON can hold them, for which NaN and infinity are none."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):  # most values, which a `Mapping` is asked for slowly
        return value
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    return [without_nan(item) for item in value] if isinstance(value, list | tuple) else value

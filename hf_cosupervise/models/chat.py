"""Chat templates, which come with a tokenizer and may be from anybody: rendered in bounded time and memory."""

from __future__ import annotations

import ctypes
import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import datetime
from functools import lru_cache, update_wrapper
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as LoopControls
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from .source import first_line

_MOST_SECONDS, _MOST_BYTES = 10.0, 1 << 30
_STATM = Path("/proc/self/statm")  # of Linux: pages that the process has, and those of them in memory
_TOO_LONG = f"it takes more than {_MOST_SECONDS:g} seconds, or a gigabyte of memory"
_stopped: set[str] = set()  # templates that took too long once: the next row need not wait for that
# One operation in C can be stopped by nobody: it makes at most so many letters or items, and numbers of so many bits.
# The longest chats have some millions of letters, and the longest templates 20,000, nested 30 deep.
_MOST_MADE, _MOST_BITS, _MOST_LETTERS, _MOST_DEPTH = 1 << 24, 1 << 12, 1 << 18, 100
# What makes more than it is given, of texts, numbers and lists; of filters, what Jinja has by these names.
_GROWING_METHODS = {"center", "expandtabs", "format", "format_map", "join", "ljust", "replace", "rjust", "to_bytes"}
_GROWING_METHODS |= {"translate", "zfill"}
_GROWING_FILTERS = {"batch", "center", "format", "indent", "join", "pprint", "replace", "round", "slice", "tojson"}
_GROWING_FILTERS |= {"string"}
# These search by expressions that take time that grows with the square of a text; no chat needs them.
_SLOW = {"striptags", "urlize", "wordwrap", "lipsum", "xmlattr"}
_NUMBER = re.compile(r"[0-9]+")


class ChatTemplateError(jinja2.TemplateError):
    """A chat template cannot be filled in, or not within bounds."""


class BrokenChatTemplateError(ChatTemplateError):
    """It is the template's fault, whatever messages it is given."""


def apply_chat_template(tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, asks: bool = True) -> str:
    """Write messages as one text, with what begins an answer if it `asks` for one."""
    try:
        template = tokenizer.get_chat_template()
        if template in _stopped:
            raise BrokenChatTemplateError(_TOO_LONG)
        told = {"messages": [dict(message) for message in messages], "tools": None, "documents": None}
        told |= {"add_generation_prompt": asks} | tokenizer.special_tokens_map
        return _render(lambda: _compile(template).render(told))
    except TimeoutError as error:
        _stopped.add(template)
        raise BrokenChatTemplateError(_TOO_LONG) from error
    except (MemoryError, RecursionError, SyntaxError) as error:
        raise BrokenChatTemplateError(f"it calls itself, or takes too much memory ({first_line(error)})") from error
    except (jinja2.TemplateSyntaxError, jinja2.TemplateNotFound, SecurityError) as error:
        raise BrokenChatTemplateError(first_line(error)) from error
    except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ChatTemplateError(first_line(error)) from error


def _render(render: Callable[[], Any]) -> str:
    """Render in a thread of its own: what may loop for ever can be stopped there."""
    before, start = _num_bytes(), time.monotonic()
    with ThreadPoolExecutor(1) as pool:  # at its end the thread is waited for
        ident, future = pool.submit(threading.get_ident).result(), pool.submit(render)
        try:
            while not wait([future], timeout=0.01).done:
                if time.monotonic() - start > _MOST_SECONDS or _num_bytes() - before > _MOST_BYTES:
                    raise TimeoutError
        finally:
            if not future.done():
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(TimeoutError))
    return str(future.result())


def _num_bytes() -> int:
    """How much memory the process has, where the system tells."""
    try:
        return int(_STATM.read_text().split()[1]) * 4096
    except OSError:
        return 0


# ── templates of which no operation makes more than some millions of letters ────────────────────────────────────────


def parse_template(
    environment: jinja2.Environment, template: str, most_letters: int, most_depth: int
) -> nodes.Template:
    """Read a template, or say by a `ValueError` why it cannot be read in little time."""
    if len(template) > most_letters:
        raise ValueError(f"{len(template):,} letters, more than {most_letters:,}")
    tree = environment.parse(template)
    # Before it is compiled: Python's parser takes time that grows exponentially with nested brackets.
    level: list[nodes.Node] = [tree]
    depth = 0
    while level := [child for node in level for child in node.iter_child_nodes()]:
        if (depth := depth + 1) > most_depth:
            raise ValueError(f"something nested more than {most_depth} deep")
    return tree


@lru_cache(maxsize=64)
def _compile(template: str) -> jinja2.Template:
    """What a tokenizer of transformers would fill in, with operations that look at what they are given."""
    environment = _Bounded(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControls])
    try:
        tree = parse_template(environment, template, _MOST_LETTERS, _MOST_DEPTH)
    except ValueError as error:
        raise SecurityError(str(error)) from error
    return environment.from_string(_Checked().visit(tree))


class _Bounded(ImmutableSandboxedEnvironment):
    """Jinja as transformers has it for chats, of which no single operation takes much memory or time."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, finalize=_checked)
        self.filters |= {"tojson": _tojson}
        self.filters = {name: _bounded_filter(name, make) for name, make in self.filters.items() if name not in _SLOW}
        self.filters |= {"checked": _checked, "joined": _joined}
        self.globals |= {"raise_exception": _raise, "strftime_now": _now, "dict": _Dict(), "namespace": _Namespace}
        del self.globals["lipsum"]

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:  # type: ignore[override]
        """Join what was written, of which each piece may be the same long one."""
        texts = list(pieces)
        _limit(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Do `left operator right` if what it makes is small."""
        for value in (left, right):
            if isinstance(value, int):
                _checked(value)
        if operator == "*" and not (isinstance(left, int | float) and isinstance(right, int | float)):
            _limit(math.prod(_size(value, counts=isinstance(value, int)) for value in (left, right)))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _limit(left.bit_length() * abs(right), _MOST_BITS)
        elif operator == "%" and isinstance(left, str):
            _limit(_size_formatted(left, right))
        return _checked(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902
        """Call what a template calls, if what it makes is small."""
        name, owner = getattr(__obj, "__name__", ""), _owner(__obj)
        if name in _SLOW:
            raise SecurityError(f"`{name}` is not for chats")
        if name in _GROWING_METHODS and not isinstance(owner, Mapping):
            _limit(_size_made(name, owner, [*args, *kwargs.values()]))
        for value in (*args, *kwargs.values()):
            _checked(value)
        return _checked(super().call(__context, __obj, *args, **kwargs))


class _Generation(Extension):
    """What a model has said in a chat, marked for others; here it is what stands in it."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """Give what is between `generation` and `endgeneration`."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Checked(NodeTransformer):
    """Let lists and joined texts be looked at where they are made: each part may be the same long one."""

    def visit_List(self, node: nodes.List) -> nodes.Node:
        """Check a list, an object, or a tuple that is no target."""
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load":
            return node
        return nodes.Filter(node, "checked", [], [], None, None, lineno=node.lineno)

    visit_Tuple = visit_Dict = visit_List  # noqa: N815

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """Join texts within bounds."""
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, "joined", [], [], None, None, lineno=node.lineno)


class _Dict:
    """What a template knows as `dict`, without the attributes of a class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As of `dict`."""
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """What a template knows as `namespace`, without names that are Python's own."""

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace has no attribute {name!r}")
        super().__setitem__(name, value)


def _raise(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _bounded_filter(name: str, make: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that does not begin where it would make much."""
    place = 1 if hasattr(make, "jinja_pass_arg") else 0  # the first may be what Jinja gives by itself

    def run(*args: Any, **kwargs: Any) -> Any:
        value, given = args[place], [*args[place + 1 :], *kwargs.values()]
        if name in _GROWING_FILTERS:
            _limit(_size_made(name, value, given))
        elif name == "sum" and any(isinstance(item, list | tuple) for item in given):
            _limit(_size(value) ** 2)  # for lists are joined one by one
        return _checked(make(*args, **kwargs))

    return update_wrapper(run, make)


def _joined(pieces: Iterable[Any]) -> str:
    return _Bounded.concat([str(_checked(piece)) for piece in pieces])


def _checked(value: Any) -> Any:
    if isinstance(value, str):
        _limit(len(value))
    elif isinstance(value, int):
        _limit(value.bit_length(), _MOST_BITS)
    elif isinstance(value, bytes | list | tuple | Mapping):
        _limit(_size(value))
    return value


def _limit(size: int, most: int = _MOST_MADE) -> None:
    if size > most:
        raise SecurityError(f"one operation makes {size:,} letters, items or bits, more than {most:,}")


def _size(value: Any, known: dict[int, int] | None = None, *, counts: bool = False) -> int:
    """How many letters and items a value has when it is written out; with `counts`, a number stands for so many."""
    if isinstance(value, str | bytes):
        return len(value) + 1
    if isinstance(value, int):
        return 1 + (abs(value) if counts else value.bit_length() // 3)
    if not isinstance(value, Mapping | list | tuple | set):
        return 1
    # The same list may be in another one often, and that one in a third: each is looked at once.
    known = {} if known is None else known
    if id(value) not in known:
        parts = [part for pair in value.items() for part in pair] if isinstance(value, Mapping) else value
        known[id(value)] = 1 + sum(_size(part, known, counts=counts) for part in parts)
    return known[id(value)]


def _size_made(name: str, value: Any, given: Sequence[Any]) -> int:
    """How many letters or items a method or filter makes at most."""
    if name.startswith("format"):
        return _size_formatted(value, given)
    if name == "replace" and isinstance(value, str) and all(isinstance(text, str) for text in given[:2]):
        return len(value) + value.count(*given[:1]) * _size(given[1:2])
    return _size(value) * (1 + sum(_size(item, counts=True) for item in given))


def _size_formatted(text: Any, given: Any) -> int:
    """How many letters a text has at most when it is filled in."""
    if not isinstance(text, str | bytes):
        return 0
    text = text if isinstance(text, str) else text.decode("latin-1")
    widths = sum(int(number[:18]) for number in _NUMBER.findall(text))
    return len(text) + widths + (text.count("%") + text.count("{")) * _size(given, counts=True)


def _owner(function: Any) -> Any:
    # Jinja puts its own function in place of `format`.
    function = getattr(function, "__wrapped__", function)
    return getattr(function, "__self__", None)

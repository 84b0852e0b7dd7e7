"""Chat templates, which come with a tokenizer and may be from anybody: filled in within some time and memory."""

from __future__ import annotations

import ctypes
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from transformers.utils import chat_template_utils

from .source import first_line

_MOST_SECONDS, _MOST_BYTES = 10.0, 1 << 30
_STATM = Path("/proc/self/statm")  # of Linux: pages that the process has, and those of them in memory
_TOO_LONG = f"it takes more than {_MOST_SECONDS:g} seconds, or a gigabyte of memory"
_stopped: set[str] = set()  # templates that took too long once: the next row need not wait for that
# The longest chats have some millions of letters, and the longest templates are nested 30 deep.
_MOST_MADE, _MOST_BITS, _MOST_DEPTH = 1 << 24, 1 << 12, 100


class ChatTemplateError(jinja2.TemplateError):
    """A chat template cannot be filled in, or not within bounds."""


class BrokenChatTemplateError(ChatTemplateError):
    """It is the template's fault, whatever messages it is given."""


def apply_chat_template(tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, asks: bool = True) -> str:
    """Write messages as one text, with what begins an answer if it `asks` for one."""
    try:
        template = tokenizer.get_chat_template()
        if template in _stopped:
            raise TimeoutError
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
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


class _Bounded(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with bounds on the operators that grow most: nobody can stop one while it runs."""

    # These are done here only, and not while Jinja compiles either, where it would compute constants.
    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Do `left * right` or `left ** right` if what it makes is small."""
        size, most = 0, _MOST_MADE
        if isinstance(left, int) and isinstance(right, int):
            bits, most = (left.bit_length(), right.bit_length()), _MOST_BITS
            size = bits[0] * abs(right) if operator == "**" else sum(bits)
        elif isinstance(left, Sized) or isinstance(right, Sized):  # a text or a list, and how often
            size = math.prod(len(value) if isinstance(value, Sized) else value for value in (left, right))
        if size > most:
            raise SecurityError(f"one operation makes {size:,} letters, items or bits, more than {most:,}")
        return super().call_binop(context, operator, left, right)


@lru_cache(maxsize=64)
def _compile(template: str) -> jinja2.Template:
    """Read a template as transformers does, whose environment says what chats have besides Jinja."""
    theirs = chat_template_utils._compile_jinja_template("").environment
    extensions = [type(extension) for extension in theirs.extensions.values()]
    environment = _Bounded(trim_blocks=theirs.trim_blocks, lstrip_blocks=theirs.lstrip_blocks, extensions=extensions)
    environment.filters, environment.globals = theirs.filters, theirs.globals
    try:
        parse_template(environment, template, _MOST_DEPTH)
    except ValueError as error:
        raise SecurityError(str(error)) from error
    return environment.from_string(template)


def parse_template(environment: jinja2.Environment, template: str, most_depth: int) -> nodes.Template:
    """Read a template; a `ValueError` if it is nested too deep."""
    tree = environment.parse(template)
    # Before it is compiled: Python's parser takes time that grows exponentially with nested brackets.
    level: list[nodes.Node] = [tree]
    depth = 0
    while level := [child for node in level for child in node.iter_child_nodes()]:
        if (depth := depth + 1) > most_depth:
            raise ValueError(f"something nested more than {most_depth} deep")
    return tree

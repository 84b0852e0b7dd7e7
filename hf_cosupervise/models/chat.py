"""Chat templates, which come with a tokenizer and may be from anybody: rendered in bounded time and memory."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError

from .source import first_line

_MOST_SECONDS, _MOST_BYTES = 10.0, 1 << 30
_STATM = Path("/proc/self/statm")  # of Linux: pages that the process has, and those of them in memory
_TOO_LONG = f"it takes more than {_MOST_SECONDS:g} seconds, or a gigabyte of memory"
_stopped: set[str] = set()  # templates that took too long once: the next row need not wait for that


class ChatTemplateError(jinja2.TemplateError):
    """A chat template cannot be filled in, or not within bounds."""


class BrokenChatTemplateError(ChatTemplateError):
    """It is the template's fault, whatever messages it is given."""


def apply_chat_template(tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, asks: bool = True) -> str:
    """Write messages as one text, with what begins an answer if it `asks` for one."""
    known = getattr(tokenizer, "chat_template", None)
    templates = [text for text in (known.values() if isinstance(known, Mapping) else [known]) if isinstance(text, str)]
    for template in templates:
        _check_powers(template)
    if not _stopped.isdisjoint(templates):
        raise BrokenChatTemplateError(_TOO_LONG)
    settings = {"tokenize": False, "add_generation_prompt": asks}
    try:
        return _render(partial(tokenizer.apply_chat_template, list(messages), **settings))
    except TimeoutError as error:
        _stopped.update(templates)
        raise BrokenChatTemplateError(_TOO_LONG) from error
    except (MemoryError, RecursionError, SyntaxError) as error:
        raise BrokenChatTemplateError(f"it calls itself, or takes too much memory ({first_line(error)})") from error
    except (jinja2.TemplateSyntaxError, jinja2.TemplateNotFound, SecurityError) as error:
        raise BrokenChatTemplateError(first_line(error)) from error
    except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ChatTemplateError(first_line(error)) from error


@lru_cache(maxsize=64)
def _check_powers(template: str) -> None:
    """Refuse the one operation that nothing can stop while it runs."""
    try:
        found = any(kind == "operator" and text == "**" for _, kind, text in jinja2.Environment().lex(template))
    except jinja2.TemplateSyntaxError:
        return  # as whoever fills it in will say
    if found:
        raise BrokenChatTemplateError("it computes powers (`**`), which may take for ever")


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

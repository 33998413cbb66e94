"""Texts that others chose, on our terminals and in our logs.

A peer's words, an exception's text, a model's tokens: each may hold escape sequences, line ends, characters that turn
the direction of what follows.

Rules. A text of that kind is shown by `one_line` in errors, reports and logs, by `for_terminal` where it is the result
itself. Every logger of fastsplit comes from `get_logger`, so no log call has to think of it; nor of tracebacks, which
are text by the time a handler gets them: a record that is kept holds no frames, and no tensors in them.
"""

from __future__ import annotations

import logging
import re
import traceback
import unicodedata

__all__ = ["MAX_LINE", "for_terminal", "get_logger", "one_line", "trace"]

MAX_LINE = 1000
_ACTING = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
"""Unicode's categories of characters that do something instead of being seen: controls (C0, DEL, C1), formats (those of
the direction of text, zero-width ones, tags), surrogates, separators of lines and of paragraphs."""
_ALLOWED = frozenset("\n\t\u200c\u200d")
"""The two controls that a text needs, and the joiners, without which some scripts and emoji are other ones."""
_FRAME = re.compile(r'[ |]*File "')


def one_line(text: str, limit: int | None = MAX_LINE) -> str:
    """`text` as one line of printable characters, all others escaped; of one that would be longer than `limit`
    characters the beginning, and how long it is. `limit` None: all of it."""
    shown = text[:limit]
    if not shown.isprintable():
        shown = "".join(c if c.isprintable() else _escaped(c) for c in shown)
    return (
        shown
        if limit is None or max(len(text), len(shown)) <= limit
        else f"{shown[:limit]}... ({len(text)} characters)"
    )


def for_terminal(text: str) -> str:
    """`text` with what a terminal would act upon escaped, newlines and tabs excepted. Each character by itself: a text
    may come in pieces."""
    if text.isprintable():
        return text
    return "".join(c if c in _ALLOWED or unicodedata.category(c) not in _ACTING else _escaped(c) for c in text)


def trace(error: BaseException) -> str:
    """The error's traceback, in which the text of each exception is one line of printable characters."""
    lines: list[str] = []
    for part in traceback.format_exception(type(error), error, error.__traceback__):
        part = part.strip("\n")
        lines += map(one_line, part.split("\n") if _FRAME.match(part) else (part,))
    return "\n".join(lines)


def get_logger(name: str) -> logging.Logger:
    """The logger of that name, all of whose records are printable: the message is one line, so is the text of each
    exception. A record's `exc_text` has the traceback, its `exc_info` is None."""
    logger = logging.getLogger(name)
    logger.addFilter(_make_printable)
    return logger


def _make_printable(record: logging.LogRecord) -> bool:
    record.msg, record.args = one_line(record.getMessage()), None
    if record.exc_info and record.exc_info[1] is not None:
        record.exc_text, record.exc_info = trace(record.exc_info[1]), None  # handlers take it instead of their own
    return True


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode()

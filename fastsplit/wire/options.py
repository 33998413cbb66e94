"""The options of channels and servers: what each is called, its default, its check, and one sentence about it.

An option stands here once: as a field of one of the classes below, and as a key of the TypedDict beside it, for type
checkers. Constructors take `**options` and build the class with `of`, which checks every value; their docstrings and
signatures are made of the fields (`documented`).

Rules. Options never change. Each check takes the option's name, so that its error names the option, what came and what
was expected. A key that no field has is Python's own TypeError.
"""

# ruff: noqa: RUF009 (`_option` makes a dataclass field)

from __future__ import annotations

import inspect
import numbers
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from functools import partial
from typing import Any, Self, TypedDict, TypeVar

import numpy as np

from ..errors import SettingError, shown
from ..schema.limits import Limits, parse_limits
from ..tensors import Arrays, parse_arrays
from ..tensors.pool import Pool, pool
from .compression import THRESHOLD_NBYTES, Codec, parse_cast, parse_codec
from .shm.segment import Hook
from .transport.spin import choose_spin_us

__all__ = [
    "MAX_QUEUED_NBYTES",
    "MAX_TIMEOUT_S",
    "AioClientKeywords",
    "AioClientOptions",
    "AioServerKeywords",
    "AioServerOptions",
    "BlockingClientKeywords",
    "BlockingClientOptions",
    "BlockingServerKeywords",
    "BlockingServerOptions",
    "ClientOptions",
    "LinkOptions",
    "ServerOptions",
    "documented",
    "parse_count",
    "parse_flag",
    "parse_timeout",
]

MAX_TIMEOUT_S = 1e6
"""Eleven days; beyond, poll's milliseconds and the header's nanoseconds would run out."""
MAX_QUEUED_NBYTES = 64 * 1024**2

_Made = TypeVar("_Made", bound=type)


# ---- checks: each takes the argument's name and its value, and gives the value that is used -------------------------


def parse_timeout(name: str, seconds: Any) -> float:
    """Seconds given as the argument `name`. Raises SettingError."""
    is_number = isinstance(seconds, numbers.Real)
    if is_number and 0 <= seconds <= MAX_TIMEOUT_S:  # NaN is not, either
        return float(seconds)
    raise SettingError(f"{name}: {shown(seconds)}, expected 0 to {MAX_TIMEOUT_S:g} seconds, as a number")


def parse_count(name: str, count: Any, min_count: int, max_count: int | None = None) -> int:
    """A whole number given as the argument `name`. Raises SettingError."""
    is_number = isinstance(count, numbers.Integral)
    if is_number and min_count <= count and (max_count is None or count <= max_count):
        return int(count)
    expected = f"{min_count} or more" if max_count is None else f"{min_count} to {max_count}"
    raise SettingError(f"{name}: {shown(count)}, expected {expected}, as an int")


def parse_flag(name: str, value: Any) -> bool:
    """A bool given as the argument `name`. Raises SettingError for anything else: the string "no" would be true."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise SettingError(f"{name}: {shown(value)}, expected True or False")


def _parse_pool(name: str, value: Any) -> Any:
    if not callable(getattr(value, "allocate", None)):
        raise SettingError(f"{name}: {shown(value)}, expected a fastsplit.memory.Pool")
    return value


def _parse_hook(name: str, value: Any) -> Any:
    if value is not None and not callable(value):
        raise SettingError(f"{name}: {shown(value)}, expected None or a function of an address and a size")
    return value


def _parse_call_timeout(name: str, seconds: Any) -> float | None:
    return None if seconds is None else parse_timeout(name, seconds)


def _unnamed(parse: Callable[[Any], Any]) -> Callable[[str, Any], Any]:
    """A check that names its argument itself."""
    return lambda _, value: parse(value)


def _option(default: Any, parse: Callable[[str, Any], Any], text: str) -> Any:
    return field(metadata={"default": default, "parse": parse, "text": text})


def _count(min_count: int) -> Callable[[str, Any], int]:
    return partial(parse_count, min_count=min_count)


# ---- the options -----------------------------------------------------------------------------------------------------


class LinkKeywords(TypedDict, total=False):
    arrays: str | Arrays
    limits: Limits | None
    pool: Pool
    on_segment: Hook | None
    codec: str
    codec_threshold_nbytes: int


@dataclass(frozen=True, slots=True)
class LinkOptions:
    """What both ends of a connection are given."""

    arrays: Arrays = _option(
        "auto",
        _unnamed(parse_arrays),
        'Kind of the tensors that calls give: "torch", "numpy", or "auto" (torch where it is installed).',
    )
    limits: Limits = _option(None, _unnamed(parse_limits), "Caps on what is accepted from the peer.")
    pool: Pool = _option(pool, _parse_pool, "Memory that tensors outside shared memory are received into.")
    on_segment: Hook | None = _option(
        None,
        _parse_hook,
        "Called with (address, nbytes) of each segment of shared memory that is mapped; it may return a function to "
        "call before that segment is unmapped.",
    )
    codec: Codec = _option(
        "auto",
        _unnamed(parse_codec),
        'Compression of large tensors: "zlib", "lz4", "zstd" or "blosc2" on every link without shared memory, "off", '
        'or "auto": if the measured link is so slow that a sample of the tensor says that compressing pays. "auto" '
        "means off on unix sockets, and on loopback unless a round trip takes 2 ms or more (a relay).",
    )
    codec_threshold_nbytes: int = _option(
        THRESHOLD_NBYTES, _count(1), "Smallest tensor that is compressed, in bytes (1 MiB)."
    )

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """The options of a constructor's keywords, checked. Raises SettingError, MissingExtraError, TypeError."""
        known = fields(cls)
        given = dict(options)
        values = {one.name: _parsed(one, given.pop(one.name, one.metadata["default"])) for one in known}
        return cls(**values, **given)  # what is left has no field: a TypeError


def _parsed(one: Field[Any], value: Any) -> Any:
    return one.metadata["parse"](one.name, value)


class ClientKeywords(LinkKeywords, total=False):
    timeout_s: float
    call_timeout_s: float | None
    wire_dtype: str | None


@dataclass(frozen=True, slots=True)
class ClientOptions(LinkOptions):
    """What every channel is given."""

    timeout_s: float = _option(10.0, parse_timeout, "Seconds for connecting and the handshake.")
    call_timeout_s: float | None = _option(
        300.0, _parse_call_timeout, "Seconds for each call that has no timeout_s of its own, None for no deadline."
    )
    wire_dtype: int = _option(
        None,
        _unnamed(parse_cast),
        'Type that float32 tensors travel as, both ways: "bfloat16", "float16", or None (float32). They are float32 '
        'again where they arrive. With "float16" a tensor whose numbers are too large for it travels as bfloat16 '
        "(counted in stats.casts_widened).",
    )


class BlockingClientKeywords(ClientKeywords, total=False):
    spin_us: float | None
    overlap: bool


@dataclass(frozen=True, slots=True)
class BlockingClientOptions(ClientOptions):
    """What a blocking channel is given."""

    spin_us: float = _option(
        None,
        _unnamed(choose_spin_us),
        "Microseconds that a caller spins for its reply before it sleeps (FASTSPLIT_SPIN_US, or 50; 0 on one core).",
    )
    overlap: bool = _option(
        False,
        parse_flag,
        "Whether two threads of the channel read and send, so that bytes travel while the caller computes; then "
        "`submit` returns before its bytes are out, and its tensors must not change before the result is in.",
    )


class AioClientKeywords(ClientKeywords, total=False):
    max_queued_nbytes: int


@dataclass(frozen=True, slots=True)
class AioClientOptions(ClientOptions):
    """What a channel on an event loop is given."""

    max_queued_nbytes: int = _option(
        MAX_QUEUED_NBYTES,
        _count(1),
        "Bytes that may wait for the server to read them: calls wait before they add to more (64 MiB). One request may "
        "have more than that by itself.",
    )


class ServerKeywords(LinkKeywords, total=False):
    workers: int
    max_connections: int
    handshake_timeout_s: float
    send_timeout_s: float
    insecure: bool


@dataclass(frozen=True, slots=True)
class ServerOptions(LinkOptions):
    """What every server is given. `codec` is that of replies where the client does not say."""

    workers: int = _option(0, _count(0), "")  # each front says what it means
    max_connections: int = _option(128, _count(0), "Clients at a time; more are told so, and refused.")
    handshake_timeout_s: float = _option(10.0, parse_timeout, "Seconds that a client may take for its handshake.")
    send_timeout_s: float = _option(600.0, parse_timeout, "Seconds that a client may take to read a reply.")
    insecure: bool = _option(
        False,
        parse_flag,
        "Whether the server may listen where others than this host's users reach it: they can call, and read along.",
    )


class BlockingServerKeywords(ServerKeywords, total=False):
    spin_us: float | None


@dataclass(frozen=True, slots=True)
class BlockingServerOptions(ServerOptions):
    """What a blocking server is given."""

    workers: int = _option(
        0,
        _count(0),
        "0 runs the requests of each connection one after another on its own thread, N runs all in N threads.",
    )
    spin_us: float = _option(
        None,
        _unnamed(choose_spin_us),
        "Microseconds that a connection's thread spins for the next request before it sleeps (FASTSPLIT_SPIN_US, or "
        "50); it never spins with workers, nor while there are as many clients as cores.",
    )


class AioServerKeywords(ServerKeywords, total=False):
    max_queued_nbytes: int


@dataclass(frozen=True, slots=True)
class AioServerOptions(ServerOptions):
    """What a server on an event loop is given."""

    workers: int = _option(0, _count(0), "0 runs plain functions on the loop, N runs them in N threads.")
    max_queued_nbytes: int = _option(
        MAX_QUEUED_NBYTES,
        _count(1),
        "Bytes of replies that may wait for a client to read them, and of requests that wait for plain handlers; with "
        "more, the server stops reading from that client (64 MiB).",
    )


# ---- what people see of them -----------------------------------------------------------------------------------------


def documented(options: type[LinkOptions]) -> Callable[[_Made], _Made]:
    """Decorates a class whose constructor takes these `**options`: adds them to its docstring and its signature."""

    def document(made: _Made) -> _Made:
        lines = [f"{one.name}: {one.metadata['text']}" for one in fields(options)]
        wrapped = [textwrap.fill(line, 116, initial_indent="    ", subsequent_indent="        ") for line in lines]
        made.__doc__ = "\n".join([inspect.cleandoc(made.__doc__ or ""), "", "Options:", *wrapped])
        signature = inspect.signature(made.__init__)  # type: ignore[misc]
        plain = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
        named = [
            inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=one.metadata["default"])
            for one in fields(options)
        ]
        # of the constructor, not of the class: a subclass may have a constructor of its own
        made.__init__.__signature__ = inspect.Signature([*plain, *named])  # type: ignore[misc]
        return made

    return document

"""Which functions may be handlers, and how a failing handler is logged, also where no logging is set up."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import re
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aio_front import Front

import fastsplit
from fastsplit.errors import CancelledError, PeerLostError, RemoteOpError, SettingError

REPOSITORY = Path(__file__).resolve().parents[2]


async def _coroutine(call: fastsplit.Call) -> Any:
    return call.tensors


class _Async:
    async def __call__(self, call: fastsplit.Call) -> Any:
        return call.tensors

    async def method(self, call: fastsplit.Call) -> Any:
        return call.tensors


async def _generator(call: fastsplit.Call) -> Any:
    yield call.tensors


COROUTINES = {
    "function": _coroutine,
    "object": _Async(),
    "method": _Async().method,
    "partial": functools.partial(_coroutine),
    "partial of a partial of an object": functools.partial(functools.partial(_Async())),
}


@pytest.mark.parametrize("name", COROUTINES)
def test_coroutine_functions_are_for_an_event_loop(unix_uri: str, front: Front, name: str) -> None:
    handlers = {"f": COROUTINES[name]}
    if front.name == "blocking":
        with pytest.raises(
            SettingError, match=r"^handlers, 'f': a coroutine function, expected a plain one; fastsplit.a"
        ):
            front.Server(unix_uri, handlers)
        return
    with front.Server(unix_uri, handlers) as server, front.connect(server.uri, arrays="numpy") as channel:
        assert channel.call("f", np.ones(2))[0].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("handlers", "text"),
    [
        (None, "handlers: None, expected a mapping of op names to functions of a Call"),
        ([("f", _coroutine)], r"handlers: \[.*\], expected a mapping"),
        ({5: len}, "handlers: an op named 5, expected a string that is not empty"),
        ({"": len}, "handlers: an op named '', expected a string that is not empty"),
        ({"f": 5}, "handlers, 'f': 5, expected a function of a Call"),
        ({"f": None}, "handlers, 'f': None, expected"),
        ({"f": _coroutine(None)}, "handlers, 'f': <coroutine object .*>, expected a function of a Call"),
        ({"f": _generator}, "handlers, 'f': an async generator function, expected one that returns its result"),
        ({"f": functools.partial(_generator)}, "handlers, 'f': an async generator function"),
    ],
)
@pytest.mark.filterwarnings("ignore:coroutine '_coroutine' was never awaited")
def test_what_is_no_handler_is_refused_when_the_server_is_made(
    unix_uri: str, front: Front, handlers: Any, text: str
) -> None:
    with pytest.raises(SettingError, match=f"^{text}"):
        front.Server(unix_uri, handlers)


class _Held:
    """What a handler's frame holds."""


def _fails(make: Callable[[], BaseException], held: list[weakref.ref[_Held]]) -> Callable[[Any], Any]:
    def fail_on_purpose(call: fastsplit.Call) -> Any:
        local = _Held()
        held.append(weakref.ref(local))
        raise make()

    return fail_on_purpose


@pytest.mark.parametrize(
    ("make", "level", "has_trace"),
    [
        (lambda: ValueError("bad\nvalue\x1b"), logging.ERROR, True),
        (lambda: SystemExit(3), logging.ERROR, True),
        (lambda: SettingError("layer: 99,\n expected 0"), logging.WARNING, False),
        (lambda: PeerLostError("of another connection"), logging.WARNING, False),
        (lambda: CancelledError("given up"), logging.DEBUG, False),
    ],
    ids=["ValueError", "SystemExit", "SettingError", "PeerLostError", "CancelledError"],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_handlers_failure_is_logged(
    socket_uri: str,
    front: Front,
    caplog: pytest.LogCaptureFixture,
    workers: int,
    make: Callable[[], BaseException],
    level: int,
    has_trace: bool,
) -> None:
    caplog.set_level(logging.DEBUG, "fastsplit.server")
    held: list[weakref.ref[_Held]] = []
    with front.Server(socket_uri, {"a\nb": _fails(make, held)}, workers=workers) as server:
        with front.connect(server.uri) as channel, pytest.raises(RemoteOpError):
            channel.call("a\nb")
    (record,) = (record for record in caplog.records if "the handler of" in record.getMessage())
    assert record.name == "fastsplit.server"
    assert record.levelno == level
    peer = r"127\.0\.0\.1:\d+" if socket_uri.startswith("tcp") else f"process {os.getpid()}"
    uri = re.escape(server.uri)
    assert re.match(
        rf"^{uri}: the handler of 'a\\nb' failed for {peer}: {type(make()).__name__}: ", record.getMessage()
    )
    assert record.getMessage().isprintable()
    lines = (record.exc_text or "").split("\n")
    assert all(line.isprintable() for line in lines)
    assert ("Traceback (most recent call last):" in lines) == has_trace
    assert any("in fail_on_purpose" in line for line in lines) == has_trace
    assert record.exc_info is None
    assert held[0]() is None  # with all that is in the frame


def test_a_handler_that_finds_its_client_gone_is_no_news(
    unix_uri: str, front: Front, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "fastsplit.server")

    entered = threading.Event()

    def give_up(call: fastsplit.Call) -> None:
        entered.set()
        while not call.cancelled:
            time.sleep(0.001)
        raise PeerLostError("of this one")

    def records() -> list[logging.LogRecord]:
        return [record for record in caplog.records if "the handler of" in record.getMessage()]

    with front.Server(unix_uri, {"f": give_up}, workers=1) as server:
        with fastsplit.connect(server.uri) as channel:
            channel.submit("f")
            assert entered.wait(5)
        deadline = time.monotonic() + 5
        while not records() and time.monotonic() < deadline:
            time.sleep(0.001)
    assert [record.levelno for record in records()] == [logging.DEBUG]


def test_a_coroutine_that_is_cancelled_from_within_is_no_news(unix_uri: str, caplog: pytest.LogCaptureFixture) -> None:
    def cancel(call: fastsplit.Call) -> None:
        raise asyncio.CancelledError

    front = Front("aio")
    try:
        with front.Server(unix_uri, {"f": cancel}) as server, front.connect(server.uri) as channel:
            with pytest.raises(RemoteOpError, match="CancelledError"):
                channel.call("f")
    finally:
        front.close()
    assert not [record for record in caplog.records if "the handler of" in record.getMessage()]


SCRIPT = """
import sys, fastsplit

def fail(call):
    raise ZeroDivisionError("of the handler")

def refuse(call):
    raise fastsplit.SettingError("layer: 99, expected 0")

with fastsplit.Server(sys.argv[1], {"fail": fail, "refuse": refuse}, arrays="numpy") as server:
    with fastsplit.connect(server.uri, arrays="numpy") as channel:
        for op in ("fail", "refuse"):
            try:
                channel.call(op)
            except fastsplit.RemoteOpError:
                pass
"""


def test_without_logging_set_up_it_is_on_stderr(unix_uri: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, unix_uri], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    first, *trace, last = done.stderr.strip().split("\n")
    assert re.match(rf"^{unix_uri}: the handler of 'fail' failed for process \d+: ZeroDivisionError: of the h", first)
    assert trace[0] == "Traceback (most recent call last):"
    assert trace[-1] == "ZeroDivisionError: of the handler"
    assert re.match(rf"^{unix_uri}: the handler of 'refuse' failed for process \d+: SettingError: layer: 99, exp", last)

"""Whatever a handler raises is its caller's RemoteOpError, on every kind of server, and the connection lives on."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from aio_front import Front

import fastsplit
from fastsplit.errors import CancelledError, RemoteOpError


class Unprintable(Exception):
    def __str__(self) -> str:
        raise SystemExit(1)


class Odd(BaseException):
    pass


ERRORS: dict[str, Callable[[], BaseException]] = {
    "KeyError: 'x'": lambda: KeyError("x"),
    "SystemExit: 3": lambda: SystemExit(3),
    "GeneratorExit: ": GeneratorExit,
    "KeyboardInterrupt: ": KeyboardInterrupt,  # not in the main thread: it is the handler's own
    "CancelledError: asyncio's": lambda: asyncio.CancelledError("asyncio's"),
    "CancelledError: concurrent's": lambda: concurrent.futures.CancelledError("concurrent's"),
    "CancelledError: ours": lambda: CancelledError("ours"),
    "StopIteration: ": StopIteration,
    "Odd: x": lambda: Odd("x"),
    "BaseExceptionGroup: two (2 sub-exceptions)": lambda: BaseExceptionGroup("two", [Odd(), ValueError()]),
    "Unprintable": Unprintable,
}


def _raising(make: Callable[[], BaseException], kind: str) -> Callable[[Any], Any]:
    def plain(call: fastsplit.Call) -> Any:
        raise make()

    async def coroutine(call: fastsplit.Call) -> Any:
        await asyncio.sleep(0)
        raise make()

    def awaitable(call: fastsplit.Call) -> Any:
        return coroutine(call)

    return {"plain": plain, "coroutine": coroutine, "awaitable": awaitable}[kind]


KINDS = {
    "blocking": ("blocking", "plain", 0),
    "blocking, workers": ("blocking", "plain", 2),
    "aio, on the loop": ("aio", "plain", 0),
    "aio, workers": ("aio", "plain", 2),
    "aio, coroutine": ("aio", "coroutine", 0),
    "aio, a function that returns one": ("aio", "awaitable", 0),
    "aio, a worker that returns one": ("aio", "awaitable", 2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_a_handler_raises(socket_uri: str, kind: str) -> None:
    name, handler, workers = KINDS[kind]
    front = Front(name)
    handlers = {text: _raising(make, handler) for text, make in ERRORS.items()}
    try:
        with front.Server(socket_uri, {**handlers, "one": lambda call: np.ones(1)}, workers=workers) as server:
            with fastsplit.connect(server.uri, arrays="numpy", call_timeout_s=10) as channel:
                for text in ERRORS:
                    with pytest.raises(RemoteOpError) as caught:
                        channel.call(text)
                    if "StopIteration" in text and handler != "plain":
                        text = "RuntimeError: coroutine raised StopIteration"
                    assert caught.value.message == text
                    assert channel.call("one")[0] == 1
    finally:
        front.close()


@pytest.mark.parametrize("name", ["blocking", "aio"])
def test_what_is_wrong_with_a_reply(socket_uri: str, name: str) -> None:
    """The same for what a handler returns."""

    class Exits:
        @property
        def __array_interface__(self) -> Any:
            raise SystemExit(4)

    def attrs(call: fastsplit.Call) -> None:
        call.reply_attrs = [1]  # type: ignore[assignment]

    front = Front(name)
    handlers = {
        "object": lambda call: object(),
        "exits": lambda call: Exits(),
        "attrs": attrs,
        "one": lambda call: np.ones(1),
    }
    try:
        with front.Server(socket_uri, handlers) as server:
            with fastsplit.connect(server.uri, arrays="numpy", call_timeout_s=10) as channel:
                for op, text in (("object", "expected a"), ("exits", "4"), ("attrs", r"attributes: \[1\], expected a")):
                    with pytest.raises(RemoteOpError, match=text):
                        channel.call(op)
                    assert channel.call("one")[0] == 1
    finally:
        front.close()


@pytest.mark.parametrize("error", [KeyError, SystemExit, GeneratorExit])
def test_what_is_to_run_at_a_connections_end(
    unix_uri: str, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    """One that fails is logged, and the others run."""
    ran: list[int] = []

    def fail() -> None:
        raise error("x")

    def handler(call: fastsplit.Call) -> None:
        call.client.on_end(fail)
        call.client.on_end(lambda: ran.append(1))

    with fastsplit.Server(unix_uri, {"f": handler}) as server:
        with fastsplit.connect(server.uri) as channel:
            channel.call("f")
    assert ran == [1]
    assert error.__name__ in caplog.text
    assert server.connections == 0
    caplog.clear()

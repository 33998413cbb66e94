"""The asyncio front in the clothes of the blocking one, so that the same tests run on both.

Client and server have a loop each, in threads of their own: a handler that blocks its loop must not stop the clock of
its callers. What is here only hands over: every name means what the blocking one of that name means.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any

import fastsplit

__all__ = ["Front", "Loop"]


class Loop:
    """An event loop in a thread. `run` waits for a coroutine there, `start` does not."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.start(coroutine).result(60)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        left = asyncio.all_tasks(self.loop)
        self.loop.close()
        assert not left, f"tasks left behind: {left}"


class _Server:
    def __init__(self, loop: Loop, uri: str, handlers: dict[str, Any], options: dict[str, Any]) -> None:
        self._loop = loop
        self._server = loop.run(_open(fastsplit.aio.serve(uri, handlers, **options)))

    def __enter__(self) -> _Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._server, name)

    def close(self, timeout_s: float = 5.0) -> None:
        self._loop.run(self._server.close(timeout_s))


_SETTINGS = ("call_timeout_s", "codec", "wire_dtype")


class _Channel:
    def __init__(self, loop: Loop, uri: str, options: dict[str, Any]) -> None:
        self._loop = loop
        self._channel = loop.run(_open(fastsplit.aio.connect(uri, **options)))

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _SETTINGS:
            setattr(self._channel, name, value)
        else:
            super().__setattr__(name, value)

    def __enter__(self) -> _Channel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)

    def submit(self, op: str, /, *tensors: Any, **options: Any) -> Future[Any]:
        async def submitted() -> Any:
            return await self._channel.submit(op, *tensors, **options)

        return self._loop.start(submitted())

    def call(self, op: str, /, *tensors: Any, **options: Any) -> Any:
        return self._loop.run(self._channel.call(op, *tensors, **options))

    def measure(self, *args: Any, **options: Any) -> Any:
        return self._loop.run(self._channel.measure(*args, **options))

    def empty(self, shape: Any, dtype: Any = "float32", *, timeout_s: float | None = None) -> Any:
        return self._loop.run(self._channel.allocate(shape, dtype, timeout_s=timeout_s))

    def close(self, drain_s: float = 0.0) -> None:
        self._loop.run(self._channel.close(drain_s))


async def _open(what: Any) -> Any:
    return await what


class Front:
    """`Server` and `connect`, of one front: "blocking" or "aio"."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._loops = (Loop(), Loop()) if name == "aio" else None

    def Server(self, uri: str, handlers: dict[str, Any], **options: Any) -> Any:  # as fastsplit.Server
        if self._loops is None:
            return fastsplit.Server(uri, handlers, **options)
        return _Server(self._loops[0], uri, handlers, options)

    def connect(self, uri: str, **options: Any) -> Any:
        if self._loops is None:
            return fastsplit.connect(uri, **options)
        return _Channel(self._loops[1], uri, options)

    def close(self) -> None:
        for loop in self._loops or ():
            loop.close()

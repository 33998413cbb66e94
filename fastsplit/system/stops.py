"""Signals that end a server: Ctrl-C and SIGTERM, while `serve_forever` runs in the main thread.

Rules. Handlers that the program has set are left alone, and so is a signal that it ignores. The previous handlers are
restored before the server closes, so that a second signal ends the program at once.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio

__all__ = ["LoopStops", "Stops"]

_USUAL: dict[int, Any] = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
"""The handlers that Python installs: only these are replaced."""


class Stops:
    """In this context SIGTERM and Ctrl-C raise KeyboardInterrupt in the main thread."""

    def __init__(self) -> None:
        self.in_main_thread = threading.current_thread() is threading.main_thread()
        self._taken: list[int] = []
        self._is_held = self._came = False

    def __enter__(self) -> Stops:
        if self.in_main_thread:
            for number, usual in _USUAL.items():
                if signal.getsignal(number) is usual:
                    self._taken.append(number)
                    signal.signal(number, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """For a short section that must not be interrupted: a signal that comes in it is raised at its end."""
        self._is_held = True
        yield
        self._is_held = False
        if self._came:
            raise KeyboardInterrupt

    def restore(self) -> None:
        """Ends what the context began. Idempotent."""
        while self._taken:
            number = self._taken.pop()
            signal.signal(number, _USUAL[number])

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._came = True
        if not self._is_held:
            raise KeyboardInterrupt


class LoopStops:
    """In this context SIGTERM and Ctrl-C complete `stopped`, if the running `loop` is the main thread's."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.stopped: asyncio.Future[bool] = loop.create_future()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> LoopStops:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                handler = signal.getsignal(number)
                if handler is _USUAL[number] or _is_of_asyncio_run(handler):
                    with contextlib.suppress(NotImplementedError):  # the loop has no signal handlers
                        self._loop.add_signal_handler(number, self._stop)
                        self._before[number] = handler
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def restore(self) -> None:
        """Ends what the context began. Idempotent."""
        while self._before:
            number, handler = self._before.popitem()
            self._loop.remove_signal_handler(number)
            signal.signal(number, handler)

    def _stop(self) -> None:
        if not self.stopped.done():
            self.stopped.set_result(True)


def _is_of_asyncio_run(handler: Any) -> bool:
    """Whether a handler is the one that asyncio.run sets for Ctrl-C, which cancels the main task."""
    return getattr(getattr(handler, "func", None), "__module__", None) == "asyncio.runners"

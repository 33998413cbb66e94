"""Threads that run what they are given, and never hold up the end of the program.

Why not concurrent.futures. At its exit the interpreter waits for the threads of a ThreadPoolExecutor. One that sends to
a peer that has stalled comes back at its deadline, minutes later.

Rules. What was submitted and has not run when the interpreter ends does not run. What runs handles its own errors.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from ..printable import get_logger
from .shortage import start

__all__ = ["Workers", "call_safely", "is_interrupt", "only_one"]

_logger = get_logger("fastsplit.threads")

Task = Callable[[], object]


def is_interrupt(error: BaseException) -> bool:
    """Whether an error is the end of the program (Ctrl-C), and not one like any other of a handler or a callback.

    Signals' handlers run in the main thread alone.
    """
    return isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread()


def call_safely(what: str, callback: Callable[..., object], *args: Any) -> None:
    """Calls a callback, and logs any exception that it raises except an interrupt."""
    try:
        callback(*args)
    except BaseException as error:
        if is_interrupt(error):
            raise
        _logger.exception("%s failed", what)


class Workers:
    """`count` threads that run what is submitted, in the order in which it comes. Raises ResourceError without them."""

    _ended = True

    def __init__(self, count: int, name: str) -> None:
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        self._pid = os.getpid()
        self._lock = threading.RLock()  # so that nothing is submitted behind the end, which a finalizer may bring
        self.threads = [
            threading.Thread(target=_work, args=(self._tasks,), name=f"{name} {index}", daemon=True)
            for index in range(count)
        ]
        self._ended = False
        try:
            for thread in self.threads:
                start(thread)
        except BaseException:
            self.shutdown(wait=False)
            raise

    def __del__(self) -> None:
        if not self._ended and self._pid == os.getpid():  # a forked child has none of the threads
            self.shutdown(wait=False)

    def submit(self, task: Task) -> bool:
        """Has a thread call `task`. False after `shutdown`."""
        with self._lock:
            if not self._ended:
                self._tasks.put(task)
            return not self._ended

    def shutdown(self, *, wait: bool = True) -> None:
        """Ends the threads when they have run what was submitted; returns then, if it is to `wait`. Idempotent.

        May be called from one of the threads, which goes on to its own end.
        """
        with self._lock:
            if not self._ended:
                self._ended = True
                for _ in self.threads:
                    self._tasks.put(None)
        for thread in self.threads if wait else ():
            if thread is not threading.current_thread():
                thread.join()


def only_one(workers: Workers | None) -> list[int]:
    """The worker's thread, if there is just one: what it waits for, no other can do."""
    threads = [] if workers is None else workers.threads
    return [thread.ident or 0 for thread in threads] if len(threads) == 1 else []


def _work(tasks: SimpleQueue[Task | None]) -> None:
    while (task := tasks.get()) is not None:
        try:
            task()
        except BaseException:
            _logger.exception("a bug: a task failed")
        del task  # what it holds must not live until the next one comes

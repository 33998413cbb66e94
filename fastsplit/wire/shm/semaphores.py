"""Binary semaphores in shared memory: libc's spin locks, posted by unlocking and taken by trying to lock.

No call here waits. Posting releases and taking acquires, so that the fences are right on every processor. libc's sem_t
would not do: its sem_post makes a system call with an operation that it reads from the shared memory, so that a hostile
peer could end this process, or worse.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Any

__all__ = ["STRIDE", "SpinLocks", "at", "load", "semaphores"]

STRIDE = 64
"""Bytes from one semaphore to the next: a cache line each."""


class SpinLocks:
    """libc's functions. PyDLL keeps the interpreter's lock during a call, which is faster: none of them waits."""

    def __init__(self) -> None:
        library = ctypes.PyDLL(None)
        self.init = library.pthread_spin_init
        self.post = library.pthread_spin_unlock
        self.trywait = library.pthread_spin_trylock
        self.barrier = ctypes.byref(ctypes.c_int())
        """A semaphore of this process alone that is never posted: trying to take it is a fence on x86."""
        self.format(self.barrier)

    def format(self, semaphore: Any) -> None:
        """Makes memory a semaphore that is not posted."""
        if self.init(semaphore, 1) != 0 or self.trywait(semaphore) != 0:
            raise OSError("pthread_spin_init failed")


def _load() -> SpinLocks | None:
    try:
        return SpinLocks()
    except (AttributeError, OSError):
        return None


_loaded = _load()


def load() -> SpinLocks:
    """This process's semaphores. Only where `semaphores` names them."""
    assert _loaded is not None
    return _loaded


def at(memory: mmap.mmap, offset: int, count: int) -> list[Any]:
    """`count` semaphores from `offset` on, as the functions take them."""
    # byref needs no conversion at each call: 105 instead of 127 ns
    return [ctypes.byref(ctypes.c_int.from_buffer(memory, offset + STRIDE * index)) for index in range(count)]


def semaphores() -> str:
    """The name of the semaphores that this process has: equal names work together. Empty if none are known.

    The values of a lock are its libc's own: what glibc takes for locked, musl may take for free.
    """
    if _loaded is None:
        return ""
    try:
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        known = name == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 21)
    except ValueError:
        known = False
    libc = "glibc-2.21" if known else _other_libc()
    return f"{libc}-{8 * ctypes.sizeof(ctypes.c_void_p)}" if libc else ""


def _other_libc() -> str:
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            return "musl" if "/ld-musl-" in maps.read() else ""
    except OSError:
        return ""

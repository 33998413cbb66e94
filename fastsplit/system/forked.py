"""Forks: a child's copies of its parent's channels and servers are closed, and say where they were made.

Why. A child has the same descriptors and the same shared memory. If it used them it would take the parent's replies,
and end the parent's connection. So every descriptor is closed in the child at the moment of the fork. The peer does not
notice, shared memory is left unchanged, and every use raises ClosedError.

Rules. An object with a descriptor is watched from the moment it has one. `leave` runs in the child, in its only thread.
The fork may have come anywhere: a lock may be held by a thread that does not exist here (`renew`), any method may be
under way.
"""

from __future__ import annotations

import os
import weakref
from typing import Any, Protocol

__all__ = ["Inherited", "renew", "watch"]


class Inherited(Protocol):
    """What must be left to the process that made it."""

    def leave(self, why: str) -> None:
        """In the child: closes descriptors, and nothing else. From now on every use is a ClosedError that says `why`.
        Must not raise."""


_watched: weakref.WeakSet[Inherited] = weakref.WeakSet()
_pids = [os.getpid()]  # the last one is this process


def watch(made: Inherited) -> None:
    """Sees to it that a child leaves `made` to this process."""
    _watched.add(made)


def renew(*locks: Any) -> None:
    """Makes locks and conditions free again, unless the thread that forked holds them: it will release them."""
    for lock in locks:
        if not (hasattr(lock, "_is_owned") and lock._is_owned()):  # a plain lock does not know its holder
            lock._at_fork_reinit()  # as the standard library does with its own


def _leave_all() -> None:
    parent, here = _pids[-1], os.getpid()
    why = f"made in process {parent}, of which this one, {here}, is a fork: connect or serve anew here"
    for made in list(_watched):
        made.leave(why)
    _watched.clear()
    _pids.append(here)


os.register_at_fork(after_in_child=_leave_all)

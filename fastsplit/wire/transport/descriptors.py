"""Descriptors that came along with a socket's bytes, until they are taken.

The kernel drops a descriptor that comes while this process has none left. Its place in the order is kept, and taking it
raises ResourceError: the shortage is ours, and no fault of the peer's.
"""

from __future__ import annotations

import array
import os
import socket
from collections import deque

from ...errors import RemoteProtocolError, ResourceError
from ...system.shortage import no_descriptor

__all__ = ["ANCILLARY_NBYTES", "CUT_OFF", "Descriptors", "ancillary"]

_MAX_DESCRIPTORS = 4
"""In one message; fastsplit sends one at a time. What is more is the peer's fault."""
_MAX_UNCLAIMED = 128
"""Descriptors whose announcements have not been read yet: those of many segments may come at once."""
_DROPPED = -1
"""In the place of a descriptor that came while there was none left here."""
CUT_OFF = int(socket.MSG_CTRUNC)
"""The flag of a message whose descriptors did not all fit."""
ANCILLARY_NBYTES = socket.CMSG_SPACE(4 * _MAX_DESCRIPTORS)


def ancillary(fd: int) -> list[tuple[int, int, array.array[int]]]:
    """What `sendmsg` takes along to send a descriptor."""
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]


class Descriptors:
    """The descriptors of one socket, in the order in which they came. Owns them."""

    __slots__ = ("_fds",)

    def __init__(self) -> None:
        self._fds: deque[int] = deque()

    def __len__(self) -> int:
        return len(self._fds)

    def keep(self, came_along: list[tuple[int, int, bytes]], message_flags: int) -> None:
        """Keeps what `recvmsg` gave. Raises RemoteProtocolError for more than a peer may send."""
        count = 0
        for level, kind, data in came_along:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
                self._fds.extend(fds)
                count += len(fds)
        if message_flags & CUT_OFF:
            if count >= _MAX_DESCRIPTORS:
                raise RemoteProtocolError(f"descriptors: more than {_MAX_DESCRIPTORS} in one message, expected one")
            self._fds.append(_DROPPED)  # the message had room for it, but this process had no descriptor left
        if len(self._fds) > _MAX_UNCLAIMED:
            raise RemoteProtocolError(f"descriptors: {len(self._fds)} without a SEGMENT, expected one for each")

    def take(self) -> int | None:
        """The next one, the caller's to close; None if there is none. Raises ResourceError for one that was dropped."""
        if not self._fds:
            return None
        fd = self._fds.popleft()
        if fd == _DROPPED:
            raise ResourceError(f"a descriptor that came cannot be taken: {no_descriptor()}")
        return fd

    def close(self) -> None:
        """Closes all of them. Idempotent."""
        while self._fds:
            fd = self._fds.popleft()
            if fd != _DROPPED:
                os.close(fd)

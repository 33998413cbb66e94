"""`unix:///path`: a socket with a file of mode 0600, for processes of this host's same user.

Descriptors cross it, so that shared memory needs no names. A client of another user is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import socket
import stat
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import SplitResult

from ...errors import AddressError
from .scheme import SHM_AUTO, SocketAddress, shm_query

__all__ = ["UnixAddress"]

_MAX_PATH_NBYTES = 107
_SNDBUF_NBYTES = 2 * 1024**2
"""With the default of 208 KiB the two sides take turns; with 2 MiB they overlap, and large messages are a third faster
(docs/notes.md). tcp tunes its own buffers, and setting them would turn that off."""


@dataclass(frozen=True)
class UnixAddress(SocketAddress):
    """`inode`: of the file that a listener has bound; 0 for an address without a listener."""

    path: str
    shm: str = SHM_AUTO
    inode: int = dataclasses.field(default=0, compare=False, repr=False)

    is_local = True
    passes_descriptors = True

    def __str__(self) -> str:
        return f"unix://{self.path}{shm_query(self.shm)}"

    @classmethod
    def parse(cls, uri: str, parts: SplitResult, shm: str) -> Self:
        path = parts.netloc + parts.path
        if not path.startswith("/"):
            raise AddressError(f"address {uri!r}: path {path!r}, expected an absolute one, as in unix:///run/demo.sock")
        try:
            encoded = os.fsencode(path)
        except UnicodeEncodeError:
            encoded = b"\0"
        if b"\0" in encoded:
            raise AddressError(f"address {uri!r}: path {path!r}, which no file can have")
        if len(encoded) > _MAX_PATH_NBYTES:
            raise AddressError(f"address {uri!r}: a path of {len(encoded)} bytes, expected at most {_MAX_PATH_NBYTES}")
        return cls(path, shm)

    def unlink(self) -> None:
        """Removes the socket's file if it is still the one that was bound."""
        with contextlib.suppress(FileNotFoundError):
            if os.stat(self.path).st_ino == self.inode:
                os.unlink(self.path)

    def _targets(self) -> list[tuple[int, Any]]:
        return [self._to_bind()]

    def _to_bind(self) -> tuple[int, Any]:
        return socket.AF_UNIX, self.path

    def _to_listen_on(self, insecure: bool) -> Self:
        self._remove_stale()
        return self

    def _remove_stale(self) -> None:
        """Removes a socket's file without a listener. One in use, or no socket, stays: bind then fails."""
        try:
            if not stat.S_ISSOCK(os.stat(self.path).st_mode):
                return
        except OSError:
            return
        probe = self._new_socket(socket.AF_UNIX)
        try:
            probe.settimeout(1)
            probe.connect(self.path)
        except ConnectionRefusedError:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EAGAIN):  # the file is gone; or the listener's queue is full
                raise
        finally:
            probe.close()

    def _bind(self, sock: socket.socket, raw: Any) -> None:
        os.fchmod(sock.fileno(), 0o600)  # before bind: the file never exists with a wider mode
        sock.bind(raw)
        os.chmod(self.path, 0o600)  # where the kernel ignores the mode of an unbound socket

    def _bound(self, sock: socket.socket) -> Self:
        return dataclasses.replace(self, inode=os.stat(self.path).st_ino)

    def _tune(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SNDBUF_NBYTES)

    def _check_peer(self, sock: socket.socket) -> None:
        if hasattr(socket, "SO_PEERCRED"):
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            uid = int.from_bytes(credentials[4:8], "little")
            if uid not in (os.getuid(), 0):
                raise PermissionError(f"{self}: a peer of uid {uid}, expected {os.getuid()}")

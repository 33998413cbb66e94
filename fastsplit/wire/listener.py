"""Where a server listens: one socket, its file, and a descriptor in reserve. The same for both servers.

Rules. Nothing here waits: a front waits until `fileno` is readable and then asks `accept`. What `bind` has made is gone
with `close`, the file of a unix socket included, unless another server has put its own there.
"""

from __future__ import annotations

from typing import Any

from ..errors import ResourceError
from .transport.address import Reserve, parse_address
from .transport.scheme import End

__all__ = ["PAUSE_S", "Listener"]

PAUSE_S = 0.01
"""Seconds to wait after an `accept` that failed: there may be a descriptor again."""


class Listener:
    """Listens on `uri`, which later is where it really listens: with the port that the system chose, for port 0.

    `insecure`: whether others than this host's users may reach it. Raises AddressError.
    """

    def __init__(self, uri: str, *, insecure: bool) -> None:
        self.address = parse_address(uri)
        self.uri = uri
        self._insecure = insecure
        self._socket: Any = None
        self._holds_file = False
        self._reserve: Reserve | None = None

    @property
    def is_bound(self) -> bool:
        """Whether `bind` has succeeded, also when it is closed again."""
        return self._socket is not None

    def bind(self) -> None:
        """Takes the address; clients that connect wait in the kernel. Idempotent.

        Raises ListenError if it is in use, AddressError if it must not be listened on, ResourceError without a
        descriptor.
        """
        if self._socket is not None:
            return
        self._socket, self.address = self.address.listen(insecure=self._insecure)
        self.uri = str(self.address)
        self._holds_file = True

    def hold_descriptor(self) -> None:
        """Takes a descriptor in reserve: `accept` may be called when the listener is bound, too. Raises
        ResourceError."""
        if self._reserve is None:
            self._reserve = Reserve()

    def release_descriptor(self) -> None:
        """Releases the descriptor in reserve. Idempotent."""
        reserve, self._reserve = self._reserve, None
        if reserve is not None:
            reserve.close()

    def fileno(self) -> int:
        """The descriptor that is readable while a client waits to be accepted."""
        assert self._socket is not None
        descriptor: int = self._socket.fileno()
        return descriptor

    def accept(self) -> tuple[End, ResourceError | None] | None:
        """The end of the next client, and why it must be refused, None if it need not; None if no client waits.

        After a refusal call `restore`, when the socket is closed. Raises OSError for a client that could not be
        accepted, or that is another user's; nothing has changed then.
        """
        assert self._socket is not None and self._reserve is not None
        try:
            return self._reserve.accept(self._socket, self.address)
        except BlockingIOError:
            return None

    def restore(self) -> None:
        """Takes the descriptor in reserve again, if it was used."""
        if self._reserve is not None:
            self._reserve.restore()

    def close(self) -> None:
        """Stops listening, and removes the file of a unix socket. Idempotent."""
        holds_file = self._holds_file  # once: another server's file may have the same number by then
        self.leave()
        if holds_file:
            self.address.unlink()

    def leave(self) -> None:
        """For a forked child: see system/forked.py. Closes the descriptors; the parent goes on to listen."""
        self._holds_file = False
        self.release_descriptor()
        if self._socket is not None:
            self._socket.close()

"""Addresses: the registry of URI schemes, and the parser of URIs.

    unix:///path            unix.py     a socket's file, for this host's same user
    tcp://host:port         tcp.py      loopback, or `insecure`
    vsock://cid:port        vsock.py    between a virtual machine and its host

Each may say `?shm=off` (no shared memory), `?shm=/dev/shm/NAME` (segments with names that start so), or `?shm=auto`.

Where would TLS go? Into one file, tls.py, and one line of `SCHEMES`. The file has a class `TlsAddress(TcpAddress)`: its
`connect` does TLS's handshake; its `accept` must not wait, so the server's handshake is part of the first read of the
Transport (base.py) that its `transport` makes, within `handshake_timeout_s`; its `_to_listen_on` may allow listeners
that other hosts can reach, and its `carries_ring` is False. No other module of the package names a scheme. Where would
a token go? Into the handshake that the session checks (`open` in session.py, HELLO in docs/protocol.md), under the same
deadline. `_check_peer` of a scheme is for checks that do not wait, such as unix.py's comparison of user ids.
(tests/memory_transport.py is a complete scheme in one file.)
"""

from __future__ import annotations

import contextlib
import os
from typing import Any
from urllib.parse import urlsplit

from ...errors import AddressError, ResourceError, shown
from ...system.shortage import shortage
from .scheme import Address, End, check_shortage, parse_shm
from .tcp import TcpAddress
from .unix import UnixAddress
from .vsock import VsockAddress

__all__ = ["SCHEMES", "Address", "Reserve", "TcpAddress", "UnixAddress", "VsockAddress", "parse_address"]

SCHEMES: dict[str, type[Address]] = {
    "unix": UnixAddress,
    "tcp": TcpAddress,
    "vsock": VsockAddress,
}


def parse_address(uri: str) -> Address:
    """The address of a URI. Raises AddressError, naming the part that is wrong."""
    if not isinstance(uri, str):
        raise AddressError(f"address {shown(uri)}, expected a string such as unix:///run/demo.sock")
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise AddressError(f"address {uri!r}: {error}") from None
    if parts.fragment:
        raise AddressError(f"address {uri!r}: fragment {parts.fragment!r}, expected none")
    shm = parse_shm(uri, parts.query)
    scheme = SCHEMES.get(parts.scheme)
    if scheme is None:
        *names, last = SCHEMES
        raise AddressError(f"address {uri!r}: scheme {parts.scheme!r}, expected {', '.join(names)} or {last}")
    return scheme.parse(uri, parts, shm)


class Reserve:
    """A descriptor that is kept for the moment when there is none left.

    A client that waits can then still be accepted, read why it cannot stay, and be closed. Without the reserve it would
    wait for a handshake until its deadline.
    """

    def __init__(self) -> None:
        """Raises ResourceError."""
        self._fd: int | None = None
        try:
            self._open()
        except OSError as error:
            check_shortage("a descriptor in reserve", error)
            raise

    def _open(self) -> None:
        self._fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def accept(self, listener: Any, address: Address) -> tuple[End, ResourceError | None]:
        """The next connection; and if it took the place of the reserve, why it is to be refused: call `restore` when it
        is closed. Raises what `Address.accept` does."""
        try:
            return address.accept(listener), None
        except OSError as error:
            short = shortage(error)
            self.restore()
            if short is None or self._fd is None:
                raise
        self.close()
        try:
            end = address.accept(listener)
        except OSError:
            self.restore()
            raise
        return end, ResourceError(f"the server accepts no more connections: {short}")

    def restore(self) -> None:
        """Takes a descriptor again, if there is one."""
        if self._fd is None:
            with contextlib.suppress(OSError):  # another thread was faster: the next try may have more luck
                self._open()

    def close(self) -> None:
        """Lets the descriptor go. Idempotent."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            os.close(fd)

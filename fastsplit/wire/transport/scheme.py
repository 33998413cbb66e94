"""Schemes: what an address can do. One class for each URI scheme; the registry of them is address.py.

`Address` is the interface. Its class attributes say what the scheme is good for, its methods parse, connect, listen and
accept, and make a Transport of the end that these give. `SocketAddress` has what all schemes over kernel sockets share.

Rules. Links are neither authenticated nor encrypted. So a listener may only be where other users and other hosts cannot
reach it: unix sockets (mode 0600), loopback tcp, the local vsock cid. `listen` refuses every other address before it
binds it, unless `insecure` is set, which states that the network itself keeps strangers out.
"""

from __future__ import annotations

import contextlib
import re
import socket
import time
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self
from urllib.parse import SplitResult

from ...errors import AddressError, ConnectError, DeadlineError, ListenError, ResourceError
from ...system.shortage import shortage
from .base import Transport
from .stream import Stream

__all__ = [
    "SHM_AUTO",
    "SHM_DIRECTORY",
    "SHM_OFF",
    "Address",
    "End",
    "SocketAddress",
    "check_prefix",
    "check_shortage",
    "is_u32",
    "parse_shm",
    "shm_query",
]

SHM_AUTO, SHM_OFF = "auto", "off"
SHM_DIRECTORY = "/dev/shm"
_TRY_AGAIN_S = 0.005

End = socket.socket | Transport
"""One end of a new connection. Its owner calls `close`, or hands it to `Address.transport`."""


class Address(ABC):
    """Where a server listens, or a client connects to: an immutable value. `shm`: "auto", "off" or a path, see
    `parse_shm`. `str` gives the URI."""

    is_local: ClassVar[bool] = False
    """Whether both ends are always on this host: the link is then not measured, and tensors are not coded."""
    passes_descriptors: ClassVar[bool] = False
    """Whether descriptors can cross, so that segments need no names."""
    carries_ring: ClassVar[bool] = False
    """Whether a ring can be put beside it: its transport is a Stream, which carries the bell."""

    @property
    @abstractmethod
    def shm(self) -> str: ...

    @classmethod
    @abstractmethod
    def parse(cls, uri: str, parts: SplitResult, shm: str) -> Address:
        """The address of a URI of this scheme. Raises AddressError, naming the part that is wrong."""

    @abstractmethod
    def connect(self, timeout_s: float) -> End:
        """A connected end. May wait, for name resolution longer than `timeout_s`.

        Raises ConnectError without a listener there, AddressError for what cannot be connected to, DeadlineError after
        `timeout_s` seconds, ResourceError without a descriptor.
        """

    @abstractmethod
    def listen(self, backlog: int = 128, *, insecure: bool = False) -> tuple[Any, Address]:
        """A listener, and the address that it really has (port 0 picks a free one).

        The listener has `fileno`, readable when a client waits, and `close`. Raises AddressError if others than this
        host's users could reach it and it is not `insecure`, ListenError if the address is in use or not permitted,
        ResourceError without a descriptor.
        """

    @abstractmethod
    def accept(self, listener: Any) -> End:
        """The next connection, without waiting. Raises OSError as a socket's accept does (BlockingIOError: no client
        waits), PermissionError for a client that may not connect."""

    def unlink(self) -> None:  # noqa: B027 (a default)
        """Removes what the listener of this address has left in the file system. Call it after the listener's close."""

    @abstractmethod
    def transport(self, end: Any) -> Transport:
        """The transport of an end that `connect` or `accept` gave, which it owns from now on."""

    def is_peer_local(self, end: Any) -> bool:
        """Whether the peer of an end is on this host, as far as its address says: a relay may be there, too.

        This is the one answer that shared memory, `near` and the choice of a codec rest on. A peer whose address cannot
        be had counts as remote: its connection is about to fail, and until then shared memory is not offered to a host
        that nothing is known of.
        """
        return self.is_local


class SocketAddress(Address):
    """A scheme over kernel sockets. What differs is in the methods from `_targets` to `_check_peer`."""

    carries_ring = True

    def connect(self, timeout_s: float) -> socket.socket:
        deadline = time.monotonic() + timeout_s
        try:
            sock = self._connect_to_any(self._targets(), deadline)
        except TimeoutError:
            raise DeadlineError(f"{self}: no connection within {timeout_s} s") from None
        except OSError as error:
            check_shortage(f"{self}: cannot connect", error)
            raise ConnectError(f"{self}: cannot connect: {error.strerror or error}") from None
        try:
            self._check_connected(sock)
            sock.settimeout(None)
            self._tune(sock)
            return sock
        except BaseException:
            sock.close()
            raise

    def listen(self, backlog: int = 128, *, insecure: bool = False) -> tuple[socket.socket, Address]:
        try:
            address = self._to_listen_on(insecure)
            family, raw = address._to_bind()
            sock = address._new_socket(family)
            try:
                address._bind(sock, raw)
                sock.listen(backlog)
                sock.setblocking(False)  # a client may be gone again between poll and accept
                return sock, address._bound(sock)
            except BaseException:
                sock.close()
                raise
        except OSError as error:
            raise ListenError(error.errno, f"{self}: cannot listen: {error.strerror or error}") from None

    def accept(self, listener: socket.socket) -> socket.socket:
        sock, _ = listener.accept()
        try:
            sock.settimeout(None)
            self._tune(sock)
            self._check_peer(sock)
            return sock
        except BaseException:
            sock.close()
            raise

    def transport(self, end: socket.socket) -> Transport:
        return Stream(end)

    def _connect_to_any(self, targets: list[tuple[int, Any]], deadline: float) -> socket.socket:
        """A socket that is connected to the first target that takes it. Each has its share of the time that is left."""
        for count in range(len(targets), 1, -1):
            now = time.monotonic()
            with contextlib.suppress(OSError):
                return self._connect_to(*targets[-count], now + (deadline - now) / count)
        return self._connect_to(*targets[-1], deadline)

    def _connect_to(self, family: int, raw: Any, deadline: float) -> socket.socket:
        sock = self._new_socket(family)
        try:
            while True:
                sock.settimeout(max(deadline - time.monotonic(), 0.001))
                try:
                    sock.connect(raw)
                    return sock
                except BlockingIOError:  # a unix socket's queue is full, and does not say when there is room
                    if time.monotonic() >= deadline:
                        raise TimeoutError from None
                time.sleep(_TRY_AGAIN_S)
        except BaseException:
            sock.close()
            raise

    # ---- what differs ----

    @abstractmethod
    def _targets(self) -> list[tuple[int, Any]]:
        """Where it may be reached: socket families, and what `connect` takes. Raises OSError, AddressError."""

    @abstractmethod
    def _to_listen_on(self, insecure: bool) -> Self:
        """The address to bind, checked and resolved. Raises AddressError if it must not be listened on."""

    @abstractmethod
    def _to_bind(self) -> tuple[int, Any]:
        """A socket family, and what `bind` takes."""

    def _new_socket(self, family: int) -> socket.socket:
        try:
            return socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:
            check_shortage(f"{self}: no socket", error)
            raise

    def _bind(self, sock: socket.socket, raw: Any) -> None:
        sock.bind(raw)

    def _bound(self, sock: socket.socket) -> Self:
        """The address that a listening socket really has."""
        return self

    def _tune(self, sock: socket.socket) -> None:
        """Sets a new connection's options."""

    def _check_connected(self, sock: socket.socket) -> None:
        """Raises ConnectError for a connection that is none."""

    def _check_peer(self, sock: socket.socket) -> None:
        """Raises PermissionError for a client that may not connect."""


def check_shortage(what: str, error: OSError) -> None:
    """Raises ResourceError if a system call failed because something is short here."""
    short = shortage(error)
    if short is not None:
        raise ResourceError(f"{what}: {short}") from None


def is_u32(text: str) -> bool:
    """Whether a text is a number of 32 bits."""
    return text.isascii() and text.isdigit() and int(text) < 2**32


# ---- the option `shm` of a URI ----


def parse_shm(uri: str, query: str) -> str:
    """ "auto", "off" (no shared memory), or the path that the names of segments start with. Raises AddressError."""
    if not query:
        return SHM_AUTO
    key, _, value = query.partition("=")
    if key != "shm":
        raise AddressError(f"address {uri!r}: option {query!r}, expected shm=auto, shm=off or shm=/dev/shm/NAME")
    if value in (SHM_AUTO, SHM_OFF):
        return value
    try:
        return check_prefix(value)
    except AddressError as error:
        raise AddressError(f"address {uri!r}: {error}, or off, or auto") from None


def shm_query(shm: str) -> str:
    """The end of a URI that says so."""
    return "" if shm == SHM_AUTO else f"?shm={shm}"


def check_prefix(prefix: str) -> str:
    """A path that names of segments may start with, unchanged. Raises AddressError for any other text."""
    directory, _, name = prefix.rpartition("/")
    if directory != SHM_DIRECTORY or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise AddressError(f"shm: {prefix!r}, expected {SHM_DIRECTORY}/NAME with letters, digits and . _ - in NAME")
    return prefix

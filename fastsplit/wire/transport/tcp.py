"""`tcp://host:port`: a listener is on loopback, unless it is `insecure`.

`tcp://*:port` is every IPv4 and IPv6 address of this host: its listener must be `insecure`.

Shared memory is offered where both ends are on this host and the client's URI asks for it.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import SplitResult

from ...errors import AddressError, ConnectError
from .scheme import SHM_AUTO, SocketAddress, check_shortage, shm_query

__all__ = ["TcpAddress"]

_EVERY = "*"
"""The host of a listener on all addresses."""


@dataclass(frozen=True)
class TcpAddress(SocketAddress):
    host: str
    port: int
    shm: str = SHM_AUTO

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{self.port}{shm_query(self.shm)}"

    @classmethod
    def parse(cls, uri: str, parts: SplitResult, shm: str) -> Self:
        if parts.path or "@" in parts.netloc:
            raise AddressError(f"address {uri!r}: expected {parts.scheme}://host:port and nothing else")
        try:
            port = parts.port
        except ValueError:
            port = None
        if port is None or not parts.hostname:
            raise AddressError(f"address {uri!r}: expected {parts.scheme}://host:port with a port from 0 to 65535")
        return cls(parts.hostname, port, shm)

    def is_peer_local(self, end: Any) -> bool:
        try:
            return _is_loopback(end.getpeername()[0])
        except (OSError, ValueError):  # the peer is gone already
            return False

    def _targets(self) -> list[tuple[int, Any]]:
        if self.host == _EVERY:
            raise AddressError(f"{self}: cannot connect: expected one host, such as 127.0.0.1 for a server on this one")
        return [(family, raw) for family, _, _, _, raw in self._resolve()]

    def _resolve(self) -> list[Any]:
        """What getaddrinfo finds. Raises OSError."""
        try:
            return socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except UnicodeError:  # a label of the name is empty or too long
            raise OSError(errno.EINVAL, "the name is not a valid host name") from None

    def _check_connected(self, sock: socket.socket) -> None:
        if sock.getsockname() == sock.getpeername():
            # Without a listener there, the kernel may pick that very port for our own end, and connect it to itself.
            raise ConnectError(f"{self}: cannot connect: Connection refused")

    def _to_listen_on(self, insecure: bool) -> Self:
        """The same address with its host as a number, if that is a loopback one, or any if `insecure`.

        For a name with IPv4 and IPv6 addresses (localhost) it is an IPv4 one: clients that use the name try all of
        them, and clients that use 127.0.0.1 reach it, too.
        """
        if self.host == _EVERY:
            hosts = ["every address of this host"]
            is_loopback = False
        else:
            try:
                found = self._resolve()
            except OSError as error:
                check_shortage(f"{self}: cannot resolve the host", error)
                raise AddressError(f"{self}: cannot resolve the host: {error.strerror}") from None
            hosts = sorted((str(info[4][0]) for info in found), key=lambda host: ":" in host)
            is_loopback = all(map(_is_loopback, hosts))
        if not insecure and not is_loopback:
            raise AddressError(
                f"{self}: refused to listen: links are not authenticated, so a listener may only be on loopback "
                f"(127.0.0.0/8 or ::1), unless it is said to be insecure, and this is {', '.join(hosts)}"
            )
        return self if self.host == _EVERY else type(self)(hosts[0], self.port, self.shm)

    def _to_bind(self) -> tuple[int, Any]:
        if self.host == _EVERY:
            return (socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET), ("", self.port)
        return (socket.AF_INET6 if ":" in self.host else socket.AF_INET), (self.host, self.port)

    def _bind(self, sock: socket.socket, raw: Any) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if self.host == _EVERY and sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # accept IPv4, too
        sock.bind(raw)

    def _bound(self, sock: socket.socket) -> Self:
        return type(self)(self.host, sock.getsockname()[1], self.shm)

    def _tune(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def _is_loopback(host: str) -> bool:
    """Whether a numeric host is a loopback address. IPv4 comes as ::ffff:127.0.0.1 through a socket for both kinds."""
    ip = ipaddress.ip_address(host.partition("%")[0])
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback

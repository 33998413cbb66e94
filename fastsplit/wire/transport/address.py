"""Addresses: `unix:///path`, `tcp://host:port`, `vsock://cid:port`, and sockets that are bound or connected to them.

Each may say `?shm=off` (no shared memory), `?shm=/dev/shm/NAME` (segments with names that start so), or `?shm=auto`.

Rules. Links are neither authenticated nor encrypted. So a listener may only be where nobody but this host's own users
can reach it: unix sockets (mode 0600), loopback tcp, the local vsock cid. Everything else is refused before it is
bound, unless whoever listens says `insecure`: that the network itself keeps strangers out. `tcp://*:port`, every IPv4
and IPv6 address of this host, needs that, too.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import stat
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ...errors import AddressError, ConnectError, DeadlineError, ListenError, ResourceError, shown
from ...system.shortage import shortage
from ..shm.segment import check_prefix

__all__ = [
    "SHM_AUTO",
    "SHM_OFF",
    "Address",
    "Reserve",
    "TcpAddress",
    "UnixAddress",
    "VsockAddress",
    "connect_socket",
    "listen_socket",
    "parse_address",
]

_VMADDR_CID_LOCAL = 1
_UNIX_SNDBUF_NBYTES = 2 * 1024**2
"""A unix socket's default buffer (208 KiB) makes the two sides take turns; 2 MiB lets them overlap. Measured here, for
messages of 8 MiB: 4.5 -> 6 GB/s. (tcp tunes its own buffers, and setting them would turn that off.)"""


_TRY_AGAIN_S = 0.005

_EVERY = "*"
"""The host of a listener on all addresses."""

SHM_AUTO, SHM_OFF = "auto", "off"


@dataclass(frozen=True)
class UnixAddress:
    path: str
    shm: str = SHM_AUTO

    def __str__(self) -> str:
        return f"unix://{self.path}{_query(self.shm)}"


@dataclass(frozen=True)
class TcpAddress:
    host: str
    port: int
    shm: str = SHM_AUTO

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{self.port}{_query(self.shm)}"


@dataclass(frozen=True)
class VsockAddress:
    cid: int
    port: int
    shm: str = SHM_AUTO

    def __str__(self) -> str:
        return f"vsock://{self.cid}:{self.port}{_query(self.shm)}"


Address = UnixAddress | TcpAddress | VsockAddress


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
    shm = _parse_shm(uri, parts.query)
    if parts.scheme == "unix":
        path = parts.netloc + parts.path
        if not path.startswith("/"):
            raise AddressError(f"address {uri!r}: path {path!r}, expected an absolute one, as in unix:///run/demo.sock")
        try:
            encoded = os.fsencode(path)
        except UnicodeEncodeError:
            encoded = b"\0"
        if b"\0" in encoded:
            raise AddressError(f"address {uri!r}: path {path!r}, which no file can have")
        if len(encoded) > 107:
            raise AddressError(f"address {uri!r}: a path of {len(encoded)} bytes, expected at most 107")
        return UnixAddress(path, shm)
    if parts.scheme not in ("tcp", "vsock"):
        raise AddressError(f"address {uri!r}: scheme {parts.scheme!r}, expected unix, tcp or vsock")
    if parts.path or "@" in parts.netloc:
        raise AddressError(f"address {uri!r}: expected {parts.scheme}://host:port and nothing else")
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.scheme == "vsock":
        host, _, port_text = parts.netloc.rpartition(":")
        if not (_is_u32(host) and _is_u32(port_text)):
            raise AddressError(f"address {uri!r}: expected vsock://cid:port with two numbers of 32 bits")
        return VsockAddress(int(host), int(port_text), shm)
    if port is None or not parts.hostname:
        raise AddressError(f"address {uri!r}: expected tcp://host:port with a port from 0 to 65535")
    return TcpAddress(parts.hostname, port, shm)


def _parse_shm(uri: str, query: str) -> str:
    """The option `shm`: "auto", "off", or the path that named segments start with."""
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


def _query(shm: str) -> str:
    return "" if shm == SHM_AUTO else f"?shm={shm}"


def _is_u32(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text) < 2**32


def _tune(sock: socket.socket, address: Address) -> None:
    if isinstance(address, TcpAddress):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    elif isinstance(address, UnixAddress):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_SNDBUF_NBYTES)


def connect_socket(address: Address, timeout_s: float) -> socket.socket:
    """A connected, blocking socket.

    Raises ConnectError without a listener there, AddressError for the host `*`, DeadlineError after `timeout_s`
    seconds, ResourceError without a descriptor.
    """
    deadline = time.monotonic() + timeout_s
    try:
        sock = _connect_to_any(address, _targets(address), deadline)
    except TimeoutError:
        raise DeadlineError(f"{address}: no connection within {timeout_s} s") from None
    except OSError as error:
        _check_shortage(f"{address}: cannot connect", error)
        raise ConnectError(f"{address}: cannot connect: {error.strerror or error}") from None
    if isinstance(address, TcpAddress) and sock.getsockname() == sock.getpeername():
        # Nobody listens, and the kernel picked that very port for our own end: tcp then connects a socket to itself.
        sock.close()
        raise ConnectError(f"{address}: cannot connect: Connection refused")
    sock.settimeout(None)
    _tune(sock, address)
    return sock


def _targets(address: Address) -> list[tuple[int, Any]]:
    """Where an address may be reached: socket families, and what `connect` takes."""
    if not isinstance(address, TcpAddress):
        return [(_family(address), _raw(address))]
    if address.host == _EVERY:
        raise AddressError(f"{address}: cannot connect: expected one host, such as 127.0.0.1 for a server on this one")
    return [(family, raw) for family, _, _, _, raw in _resolve(address)]


def _resolve(address: TcpAddress) -> list[Any]:
    """What getaddrinfo finds. Raises OSError."""
    try:
        return socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except UnicodeError:  # a label of the name is empty or too long
        raise OSError(errno.EINVAL, "the name is not a valid host name") from None


def _connect_to_any(address: Address, targets: list[tuple[int, Any]], deadline: float) -> socket.socket:
    """A socket that is connected to the first target that takes it. Each has its share of the time that is left."""
    for count in range(len(targets), 1, -1):
        now = time.monotonic()
        with contextlib.suppress(OSError):
            return _connect_to(address, *targets[-count], now + (deadline - now) / count)
    return _connect_to(address, *targets[-1], deadline)


def _connect_to(address: Address, family: int, raw: Any, deadline: float) -> socket.socket:
    sock = _new_socket(address, family)
    try:
        while True:
            sock.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                sock.connect(raw)
                return sock
            except BlockingIOError:  # of a unix socket: too many wait to be accepted, and nothing says when one is
                if time.monotonic() >= deadline:
                    raise TimeoutError from None
            time.sleep(_TRY_AGAIN_S)
    except BaseException:
        sock.close()
        raise


def listen_socket(address: Address, backlog: int = 128, *, insecure: bool = False) -> tuple[socket.socket, Address]:
    """A listening socket, and the address it really has (port 0 picks a free one). `insecure`: anywhere.

    Raises AddressError if others than this host's users could reach it, ListenError if it is in use or not permitted,
    ResourceError without a descriptor.
    """
    try:
        return _listen(address, backlog, insecure)
    except OSError as error:
        raise ListenError(error.errno, f"{address}: cannot listen: {error.strerror or error}") from None


def _listen(address: Address, backlog: int, insecure: bool) -> tuple[socket.socket, Address]:
    if isinstance(address, UnixAddress):
        _remove_stale(address)
    elif isinstance(address, TcpAddress):
        address = _resolved(address, insecure)
    elif address.cid != _VMADDR_CID_LOCAL and not insecure:
        raise AddressError(
            f"{address}: refused to listen: links are not authenticated, so a vsock listener may only be local "
            f"(cid {_VMADDR_CID_LOCAL}), unless it is said to be insecure"
        )
    sock = _new_socket(address, _family(address))
    try:
        if isinstance(address, TcpAddress):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if address.host == _EVERY and sock.family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # accept IPv4, too
        elif isinstance(address, UnixAddress):
            os.fchmod(sock.fileno(), 0o600)  # before bind: the file never exists with a wider mode
        sock.bind(_raw(address))
        if isinstance(address, UnixAddress):
            os.chmod(address.path, 0o600)  # where the kernel ignores the mode of an unbound socket
        sock.listen(backlog)
        if isinstance(address, TcpAddress):
            address = TcpAddress(address.host, sock.getsockname()[1], address.shm)
        elif isinstance(address, VsockAddress):
            cid, port = sock.getsockname()
            address = VsockAddress(cid, port, address.shm)
        return sock, address
    except BaseException:
        sock.close()
        raise


def accept_socket(listener: socket.socket, address: Address) -> socket.socket:
    """The next connection, tuned. Raises OSError as accept does, PermissionError for another user's process."""
    sock, _ = listener.accept()
    try:
        sock.settimeout(None)
        _tune(sock, address)
        if isinstance(address, UnixAddress) and hasattr(socket, "SO_PEERCRED"):
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            uid = int.from_bytes(credentials[4:8], "little")
            if uid not in (os.getuid(), 0):
                raise PermissionError(f"{address}: a peer of uid {uid}, expected {os.getuid()}")
        return sock
    except BaseException:
        sock.close()
        raise


class Reserve:
    """A descriptor that is kept for the moment when there is none left: a client that waits can then still be accepted,
    told why it cannot stay, and refused, instead of waiting for a handshake until its deadline."""

    def __init__(self) -> None:
        """Raises ResourceError."""
        self._fd: int | None = None
        try:
            self._open()
        except OSError as error:
            _check_shortage("a descriptor in reserve", error)
            raise

    def _open(self) -> None:
        self._fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def accept(self, listener: socket.socket, address: Address) -> tuple[socket.socket, ResourceError | None]:
        """The next connection; and if it took the place of the reserve, why it is to be refused: `restore` when that is
        closed. Raises what `accept_socket` does: BlockingIOError if nobody waits."""
        try:
            return accept_socket(listener, address), None
        except OSError as error:
            short = shortage(error)
            self.restore()
            if short is None or self._fd is None:
                raise
        self.close()
        try:
            sock = accept_socket(listener, address)
        except OSError:
            self.restore()
            raise
        return sock, ResourceError(f"the server accepts no more connections: {short}")

    def restore(self) -> None:
        """Takes the descriptor again, if there is one."""
        if self._fd is None:
            with contextlib.suppress(OSError):  # another thread was faster: the next try may have more luck
                self._open()

    def close(self) -> None:
        if self._fd is not None:
            fd, self._fd = self._fd, None
            os.close(fd)


def remove_socket_file(path: str, inode: int) -> None:
    """Removes a unix socket's file if it is still the one that was bound."""
    with contextlib.suppress(FileNotFoundError):
        if os.stat(path).st_ino == inode:
            os.unlink(path)


def _check_shortage(what: str, error: OSError) -> None:
    """Raises ResourceError if a system call failed since something is short here."""
    short = shortage(error)
    if short is not None:
        raise ResourceError(f"{what}: {short}") from None


def _family(address: Address) -> int:
    if isinstance(address, UnixAddress):
        return socket.AF_UNIX
    if isinstance(address, TcpAddress):
        is_ipv6 = socket.has_dualstack_ipv6() if address.host == _EVERY else ":" in address.host
        return socket.AF_INET6 if is_ipv6 else socket.AF_INET
    if not hasattr(socket, "AF_VSOCK"):
        raise AddressError(f"{address}: this system has no vsock")
    return socket.AF_VSOCK


def _new_socket(address: Address, family: int) -> socket.socket:
    try:
        return socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        _check_shortage(f"{address}: no socket", error)
        if isinstance(address, (UnixAddress, TcpAddress)):
            raise
        raise AddressError(f"{address}: this system has no vsock: {error.strerror}") from None


def _raw(address: Address) -> Any:
    if isinstance(address, UnixAddress):
        return address.path
    if isinstance(address, TcpAddress):
        return ("" if address.host == _EVERY else address.host), address.port
    return address.cid, address.port


def _resolved(address: TcpAddress, insecure: bool) -> TcpAddress:
    """The same address with its host as a number, if that is a loopback one, or any if `insecure`.

    For a name with IPv4 and IPv6 addresses (localhost) it is an IPv4 one: clients that use the name try all of them,
    and clients that use 127.0.0.1 reach it, too.
    """
    if address.host == _EVERY:
        hosts = ["every address of this host"]
        is_loopback = False
    else:
        try:
            found = _resolve(address)
        except OSError as error:
            _check_shortage(f"{address}: cannot resolve the host", error)
            raise AddressError(f"{address}: cannot resolve the host: {error.strerror}") from None
        hosts = sorted((str(info[4][0]) for info in found), key=lambda host: ":" in host)
        is_loopback = all(ipaddress.ip_address(host.partition("%")[0]).is_loopback for host in hosts)
    if not insecure and not is_loopback:
        raise AddressError(
            f"{address}: refused to listen: links are not authenticated, so a listener may only be on loopback "
            f"(127.0.0.0/8 or ::1), unless it is said to be insecure, and this is {', '.join(hosts)}"
        )
    return address if address.host == _EVERY else TcpAddress(hosts[0], address.port, address.shm)


def _remove_stale(address: UnixAddress) -> None:
    """Removes a socket file that nobody listens on any more. One in use, or no socket, stays: bind will say so."""
    try:
        if not stat.S_ISSOCK(os.stat(address.path).st_mode):
            return
    except OSError:
        return
    probe = _new_socket(address, socket.AF_UNIX)
    try:
        probe.settimeout(1)
        probe.connect(address.path)
    except ConnectionRefusedError:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(address.path)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EAGAIN):  # gone; or there are so many that it accepts none at once
            raise
    finally:
        probe.close()

"""URIs, and where one may listen: nobody but this host's own users may reach a listener."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import re
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SHM_PREFIX

import fastsplit
from fastsplit.errors import AddressError, ConnectError, DeadlineError, ListenError, fresh
from fastsplit.wire.shm.negotiation import offer
from fastsplit.wire.transport.address import TcpAddress, UnixAddress, VsockAddress, parse_address


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        ("unix:///run/demo.sock", UnixAddress("/run/demo.sock")),
        ("unix:///with space/ä", UnixAddress("/with space/ä")),
        ("tcp://127.0.0.1:9000", TcpAddress("127.0.0.1", 9000)),
        ("tcp://[::1]:0", TcpAddress("::1", 0)),
        ("tcp://localhost:65535", TcpAddress("localhost", 65535)),
        ("vsock://1:4294967295", VsockAddress(1, 4294967295)),
    ],
)
def test_parse(uri: str, address: object) -> None:
    assert parse_address(uri) == address
    assert str(address) == uri


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("unix://demo.sock", "path 'demo.sock', expected an absolute one"),
        ("unix:///" + "x" * 107, "a path of 108 bytes, expected at most 107"),
        ("unix:///a?shm=1", "shm: '1', expected /dev/shm/NAME with letters, digits and . _ - in NAME, or off, or auto"),
        ("unix:///a?shm=/dev/shm/../x", "shm: '/dev/shm/../x', expected /dev/shm/NAME"),
        ("tcp://h:1?token=x", "option 'token=x', expected shm=auto, shm=off or shm=/dev/shm/NAME"),
        ("tcp://h:1?shm=off&shm=auto", "shm: 'off&shm=auto', expected /dev/shm/NAME"),
        ("tcp://127.0.0.1", "expected tcp://host:port with a port from 0 to 65535"),
        ("tcp://:80", "expected tcp://host:port"),
        ("tcp://h:65536", "expected tcp://host:port with a port from 0 to 65535"),
        ("tcp://h:x", "expected tcp://host:port"),
        ("tcp://h:1/path", "expected tcp://host:port and nothing else"),
        ("unix:///a\0b", "path '/a.x00b', which no file can have"),
        ("unix:///\ud800", "path '/.ud800', which no file can have"),
        ("tcp://u@h:1", "expected tcp://host:port and nothing else"),
        ("tcp://[::1:1", "address 'tcp://.::1:1'"),
        ("vsock://1", "expected vsock://cid:port with two numbers of 32 bits"),
        ("vsock://1:4294967296", "expected vsock://cid:port with two numbers of 32 bits"),
        ("vsock://x:1", "expected vsock://cid:port"),
        ("ipc:///tmp/x", "scheme 'ipc', expected unix, tcp or vsock"),
        ("", "scheme '', expected unix, tcp or vsock"),
        ("/tmp/x", "scheme '', expected unix, tcp or vsock"),
    ],
)
def test_parse_names_what_is_wrong(uri: str, text: str) -> None:
    with pytest.raises(AddressError, match=text) as caught:
        parse_address(uri)
    assert repr(uri) in str(caught.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "192.0.2.1", "10.0.0.1"])
def test_a_listener_off_loopback_is_refused(host: str) -> None:
    with pytest.raises(AddressError, match="refused to listen: links are not authenticated, so a listener may only"):
        parse_address(f"tcp://{host}:0").listen()


def test_a_vsock_listener_for_others_is_refused() -> None:
    with pytest.raises(AddressError, match=r"vsock://2:5: refused to listen: .* may only be local \(cid 1\)"):
        parse_address("vsock://2:5").listen()


def test_a_host_that_does_not_exist() -> None:
    with pytest.raises(AddressError, match="cannot resolve the host"):
        parse_address("tcp://name.invalid:1").listen()
    with pytest.raises(ConnectError, match=r"tcp://name\.invalid:1: cannot connect"):
        parse_address("tcp://name.invalid:1").connect(5)


def test_localhost_becomes_a_number_and_port_zero_a_port() -> None:
    sock, address = parse_address("tcp://localhost:0").listen()
    with sock:
        assert address.host in ("127.0.0.1", "::1") and address.port > 0
        address.connect(5).close()


def test_unix_socket_is_private(unix_uri: str) -> None:
    address = parse_address(unix_uri)
    before = os.umask(0)
    try:
        sock, _ = address.listen()
    finally:
        os.umask(before)
    with sock:
        assert stat.S_IMODE(os.stat(address.path).st_mode) == 0o600


def test_a_stale_socket_file_is_replaced_and_a_live_one_is_not(unix_uri: str) -> None:
    address = parse_address(unix_uri)
    address.listen()[0].close()  # as a crash leaves it
    assert Path(address.path).is_socket()
    sock, _ = address.listen()
    with sock:
        with pytest.raises(OSError, match="cannot listen: Address already in use"):
            address.listen()
        address.connect(5).close()  # the live one still listens


def test_what_is_no_socket_is_never_removed(unix_uri: str) -> None:
    address = parse_address(unix_uri)
    Path(address.path).write_text("precious")
    with pytest.raises(OSError, match="cannot listen"):
        address.listen()
    assert Path(address.path).read_text() == "precious"


def test_a_port_in_use() -> None:
    sock, address = parse_address("tcp://127.0.0.1:0").listen()
    with sock, pytest.raises(OSError, match=f"{address}: cannot listen: Address already in use"):
        address.listen()


def test_a_directory_that_does_not_exist() -> None:
    with pytest.raises(OSError, match="unix:///nowhere/s: cannot listen: No such file or directory"):
        parse_address("unix:///nowhere/s").listen()


def test_only_the_own_socket_file_is_removed(unix_uri: str) -> None:
    address = parse_address(unix_uri)
    sock, bound = address.listen()
    with sock:
        assert bound.inode == os.stat(address.path).st_ino
        dataclasses.replace(bound, inode=bound.inode + 1).unlink()
        address.unlink()  # has bound nothing
        assert Path(address.path).exists()
        bound.unlink()
        assert not Path(address.path).exists()
        bound.unlink()  # gone already: fine


@pytest.mark.parametrize("uri", ["unix:///nowhere/s", "tcp://127.0.0.1:1", "tcp://[::1]:1"])
def test_nobody_there(uri: str) -> None:
    with pytest.raises(ConnectError, match="cannot connect"):
        parse_address(uri).connect(5)


def test_a_socket_that_was_connected_to_itself_is_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connecting to a free port of the range that the kernel picks its own from can do that, once in many times."""

    def to_itself(*_: object) -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.bind(("127.0.0.1", 0))
        sock.connect(sock.getsockname())
        return sock

    monkeypatch.setattr(TcpAddress, "_connect_to_any", to_itself)
    with pytest.raises(ConnectError, match="cannot connect: Connection refused"):
        TcpAddress("127.0.0.1", 40_000).connect(5)


@contextlib.contextmanager
def _full_listener(family: int, address: object) -> Iterator[socket.socket]:
    """One that accepts nobody, and has no room for others to wait."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(family))
        listener.bind(address)
        listener.listen(0)
        for _ in range(3):
            client = stack.enter_context(socket.socket(family))
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield listener


def test_all_addresses_of_a_host_share_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with _full_listener(socket.AF_INET, ("127.0.0.1", 0)) as stalled, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", stalled.getsockname())] * 3
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        started_s = time.monotonic()
        with pytest.raises(DeadlineError, match="no connection within"):
            TcpAddress("several.example", 1).connect(0.3)
        assert time.monotonic() - started_s < 0.8
        found[-1] = (*found[-1][:4], listener.getsockname())
        TcpAddress("several.example", 1).connect(0.3).close()  # one that stalls leaves time for the others


def test_a_unix_socket_where_too_many_wait(unix_uri: str) -> None:
    """The kernel refuses at once who is too many: that is no reason to say that nobody listens."""
    address = parse_address(unix_uri)
    with _full_listener(socket.AF_UNIX, address.path) as listener:
        with pytest.raises(DeadlineError, match="no connection within"):
            address.connect(0.1)
        with pytest.raises(OSError, match="cannot listen: Address already in use"):
            address.listen()
        timer = threading.Timer(0.05, lambda: listener.accept()[0].close())  # noqa: PLW0108 (it accepts when it is time)
        timer.start()
        address.connect(5).close()
        timer.join()


def test_sockets_are_tuned(socket_uri: str) -> None:
    listener, address = parse_address(socket_uri).listen()
    with listener:
        listener.setblocking(True)
        made: list[socket.socket] = []
        thread = threading.Thread(target=lambda: made.append(address.accept(listener)))
        thread.start()
        with address.connect(5) as client:
            thread.join()
            with made[0] as server:
                for sock in (client, server):
                    assert sock.getblocking() and not sock.get_inheritable()
                    if isinstance(address, TcpAddress):
                        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                    else:
                        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) >= 2**18


@pytest.mark.parametrize(("peer_uid", "welcome"), [(4242, True), (0, True), (4243, False)])
def test_peers_of_other_users(unix_uri: str, monkeypatch: pytest.MonkeyPatch, peer_uid: int, welcome: bool) -> None:
    class Claims(socket.socket):
        def getsockopt(self, level: int, option: int, size: int = 0) -> bytes:
            assert option == socket.SO_PEERCRED
            return struct.pack("=iII", 1, peer_uid, 1)

    class Listener:
        @staticmethod
        def accept() -> tuple[socket.socket, None]:
            ends = socket.socketpair()
            ends[1].close()
            return Claims(fileno=ends[0].detach()), None

    monkeypatch.setattr(os, "getuid", lambda: 4242)
    if welcome:
        parse_address(unix_uri).accept(Listener()).close()
    else:
        with pytest.raises(PermissionError, match="a peer of uid 4243, expected 4242"):
            parse_address(unix_uri).accept(Listener())


def test_an_insecure_listener_may_be_anywhere() -> None:
    sock, address = parse_address("tcp://0.0.0.0:0").listen(insecure=True)
    with sock:
        assert str(address) == f"tcp://0.0.0.0:{sock.getsockname()[1]}"


# ---- all addresses, and names ----------------------------------------------------------------------------------------


def _reachable(port: int) -> set[str]:
    """Which loopback addresses a listener is found on."""
    found = set()
    for host in ("127.0.0.1", "::1", "localhost"):
        with contextlib.suppress(ConnectError):
            TcpAddress(host, port).connect(5).close()
            found.add(host)
    return found


def test_a_star_is_every_address_of_both_kinds() -> None:
    sock, address = parse_address("tcp://*:0").listen(insecure=True)
    with sock:
        assert str(address) == f"tcp://*:{sock.getsockname()[1]}"  # what was asked for, with the real port
        ipv6 = {"::1"} if socket.has_dualstack_ipv6() else set()
        assert _reachable(address.port) == {"127.0.0.1", "localhost"} | ipv6
        with pytest.raises(
            AddressError, match=rf"^tcp://\*:{address.port}: cannot connect: expected one host, such as"
        ):
            address.connect(5)


def test_a_star_where_there_is_no_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    sock, address = parse_address("tcp://*:0").listen(insecure=True)
    with sock:
        assert sock.getsockname() == ("0.0.0.0", address.port)
        assert _reachable(address.port) == {"127.0.0.1", "localhost"}


def test_a_star_is_off_loopback() -> None:
    with pytest.raises(
        AddressError, match=r"^tcp://\*:0: refused to listen: .*, and this is every address of this host$"
    ):
        parse_address("tcp://*:0").listen()


def test_a_client_of_a_star_is_as_near_as_one_of_its_address(serve: Callable[..., Any]) -> None:
    """Though a socket for both kinds shows an IPv4 address as ::ffff:127.0.0.1."""
    server = serve("tcp://*:0", {"echo": lambda call: call.tensors}, insecure=True)
    with fastsplit.connect(f"tcp://127.0.0.1:{parse_address(server.uri).port}") as channel:
        assert channel.call("echo") == ()
        (client,) = server._service.clients
        assert client.connection.is_peer_local
        assert re.fullmatch(r"127\.0\.0\.1:\d+", client.connection.transport.peer_name())


class _Connected:
    """A socket whose peer has an address, or none any more."""

    def __init__(self, *address: object) -> None:
        self._address = address

    def getpeername(self) -> tuple[object, ...]:
        if not self._address:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        return self._address


@pytest.mark.parametrize(
    ("uri", "peer", "is_local"),
    [
        ("unix:///s", _Connected(), True),  # it cannot be elsewhere, whatever became of it
        ("tcp://h:1", _Connected("127.0.0.1", 5), True),
        ("tcp://h:1", _Connected("127.3.4.5", 5), True),
        ("tcp://h:1", _Connected("::1", 5, 0, 0), True),
        ("tcp://h:1", _Connected("::ffff:127.0.0.1", 5, 0, 0), True),
        ("tcp://h:1", _Connected("192.0.2.7", 5), False),
        ("tcp://h:1", _Connected("::ffff:192.0.2.7", 5, 0, 0), False),
        ("tcp://h:1", _Connected("fe80::1%eth0", 5, 0, 2), False),
        ("tcp://h:1", _Connected(), False),
        ("vsock://1:1", _Connected(1, 5), False),
    ],
)
def test_whether_the_peer_is_on_this_host(uri: str, peer: _Connected, is_local: bool) -> None:
    """One answer, for shared memory, `near` and codecs. A peer that is gone is nowhere: nothing is offered to it."""
    address = parse_address(uri)
    assert address.is_peer_local(peer) is is_local
    made = offer(address, address.is_peer_local(peer), is_client=False)
    assert bool(made.kinds) is is_local and (is_local or made.note == "the two sides may be on different hosts")


def test_shared_memory_for_a_client_of_a_star(serve: Callable[..., Any]) -> None:
    """Its server sees ::ffff:127.0.0.1, and shares memory with that as with 127.0.0.1."""
    server = serve(f"tcp://*:0?shm={SHM_PREFIX}", {"echo": lambda call: call.tensors}, insecure=True)
    with fastsplit.connect(f"tcp://127.0.0.1:{parse_address(server.uri).port}?shm={SHM_PREFIX}") as channel:
        assert channel.shm and channel.near and channel.call("echo") == ()


@pytest.mark.parametrize("order", [1, -1])
def test_a_name_of_both_kinds_is_its_ipv4_address(monkeypatch: pytest.MonkeyPatch, order: int) -> None:
    """Clients that are given the name try both."""
    kinds = [(socket.AF_INET6, 1, 6, "", ("::1", 0, 0, 0)), (socket.AF_INET, 1, 6, "", ("127.0.0.1", 0))]
    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", lambda *_, **__: kinds[::order])
        sock, address = parse_address("tcp://localhost:0").listen()
    with sock:
        assert address.host == "127.0.0.1"
        assert _reachable(address.port) == {"127.0.0.1", "localhost"}


@pytest.mark.parametrize("host", ["a..b", "x" * 64 + ".example"])
def test_names_that_no_host_can_have(host: str) -> None:
    address = parse_address(f"tcp://{host}:1")
    with pytest.raises(AddressError, match="cannot resolve the host: the name is not a valid host name"):
        address.listen()
    with pytest.raises(ConnectError, match="cannot connect: the name is not a valid host name"):
        address.connect(5)


@pytest.mark.parametrize(
    ("listen", "code"),
    [
        (lambda taken: taken.listen(), errno.EADDRINUSE),
        (lambda taken: parse_address("unix:///nowhere/s").listen(), errno.ENOENT),
        (lambda taken: parse_address("unix:///proc/s").listen(), None),
        (lambda taken: parse_address("tcp://192.0.2.1:0").listen(insecure=True), errno.EADDRNOTAVAIL),
    ],
    ids=["in use", "no directory", "not permitted", "no address of this host"],
)
def test_what_cannot_be_listened_on_now(unix_uri: str, listen: Callable[[Any], Any], code: int | None) -> None:
    sock, taken = parse_address(unix_uri).listen()
    with sock, pytest.raises(ListenError) as caught:
        listen(taken)
    error = caught.value
    assert isinstance(error, fastsplit.FastsplitError) and isinstance(error, OSError)
    assert code in (None, error.errno)
    assert re.match(r"^(unix|tcp)://\S+: cannot listen: [A-Z]", str(error)), "with no [Errno ...] before it"
    assert error.exit_code == 1
    assert (str(fresh(error)), fresh(error).errno) == (str(error), error.errno)

"""What two sides agree on: a table of offers, read from both ends."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable
from typing import Any

import pytest
from conftest import SHM_PREFIX

import fastsplit
from fastsplit.errors import RemoteProtocolError
from fastsplit.wire.shm import negotiation as sharing
from fastsplit.wire.shm.negotiation import Offer, agree, offer
from fastsplit.wire.shm.segment import Memfd, Named
from fastsplit.wire.transport.address import parse_address

TOKENS = ("0" * 16, "f" * 16)
A, B = "/dev/shm/a", "/dev/shm/b"
GLIBC = "glibc-2.21-64"


def _client(kinds: str, prefix: str = "", note: str = "", semaphores: str = GLIBC) -> Offer:
    return Offer(tuple(kinds.split()), prefix, note, semaphores, TOKENS[0])


def _server(kinds: str, prefix: str = "", note: str = "", semaphores: str = GLIBC) -> Offer:
    return Offer(tuple(kinds.split()), prefix, note, semaphores, TOKENS[1])


TABLE: list[tuple[Offer, Offer, str | None, bool, str]] = [
    # client, server, kind of segments and their prefix, ring, reason
    (_client("memfd named"), _server("memfd named"), "memfd", True, "memfd segments, control in a ring"),
    (
        _client("memfd named"),
        _server("memfd named", semaphores="musl-64"),
        "memfd",
        False,
        "memfd segments, control over the socket: semaphores are glibc-2.21-64 and musl-64",
    ),
    (
        _client("memfd named", semaphores=""),
        _server("memfd named", semaphores=""),
        "memfd",
        False,
        "memfd segments, control over the socket: semaphores are none that are known and none that are known",
    ),
    (_client("named", A), _server("memfd named"), A, True, f"segments named {A}-..., control in a ring"),
    (_client("memfd named"), _server("named", A), A, True, f"segments named {A}-..., control in a ring"),
    (_client("named", A), _server("named", A), A, True, f"segments named {A}-..., control in a ring"),
    (_client("named", A), _server("named"), A, True, f"segments named {A}-..., control in a ring"),
    (
        _client("named", A),
        _server("named", B),
        None,
        False,
        f"off: the client wants named {A}, the server named {B}",
    ),
    (
        _client("memfd named"),
        _server("named"),
        None,
        False,
        "off: the client wants memfd or named, the server named",
    ),
    (
        _client("memfd", ""),
        _server("named", B),
        None,
        False,
        f"off: the client wants memfd, the server named {B}",
    ),
    (_client("", note="the client's reason"), _server("memfd named"), None, False, "off: the client's reason"),
    (_client("memfd named"), _server("", note="the server's reason"), None, False, "off: the server's reason"),
    (_client("", note="one"), _server("", note="two"), None, False, "off: one"),
    (_client("memfd"), _server(""), None, False, "off: a side has no shared memory"),
    (_client("tape memfd"), _server("memfd named"), "memfd", True, "memfd segments, control in a ring"),
]


@pytest.mark.parametrize(("client", "server", "kind", "ring", "reason"), TABLE, ids=[row[4] for row in TABLE])
def test_agree(client: Offer, server: Offer, kind: str | None, ring: bool, reason: str) -> None:
    """Both sides come to the same, and each has the other's token for what it makes."""
    for is_client in (True, False):
        result = agree(client, server, is_client=is_client)
        assert (result.ring, result.reason) == (ring, reason)
        if kind is None:
            assert result.factory is None
        elif kind == "memfd":
            assert type(result.factory) is Memfd
        else:
            assert isinstance(result.factory, Named) and result.factory.prefix == kind
            tokens = (result.factory._own_token, result.factory._peer_token)
            assert tokens == (TOKENS if is_client else TOKENS[::-1])


@pytest.mark.parametrize("row", TABLE, ids=[row[4] for row in TABLE])
def test_offers_cross_the_wire_as_they_are(row: tuple[Offer, Offer, Any, Any, Any]) -> None:
    for made in row[:2]:
        assert Offer.of(made.attrs()) == made


def test_a_hello_without_an_offer() -> None:
    assert Offer.of({"software": "other"}) == Offer((), "", "", "", "")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"shm": 1}, r"hello, shm: \[1, '', '', 'x', '0{16}'\], expected strings"),
        ({"semaphores": b"x"}, "hello, shm: .*, expected strings"),
        ({"shm_prefix": "/etc/x"}, "hello, shm: '/etc/x', expected /dev/shm/NAME with letters"),
        ({"shm_prefix": "/dev/shm/../etc/x"}, "hello, shm: '/dev/shm/../etc/x', expected /dev/shm/NAME"),
        ({"shm_token": ""}, "hello, shm_token: '', expected 16 hexadecimal digits"),
        ({"shm_token": "0" * 15 + "/"}, "hello, shm_token: '0{15}/', expected 16 hexadecimal digits"),
        ({"shm_token": "0" * 16 + "\n"}, r"hello, shm_token: '0{16}\\n', expected 16 hexadecimal digits"),
        ({"shm_token": "A" * 16}, "hello, shm_token: 'A{16}', expected 16 hexadecimal digits"),
    ],
)
def test_offers_that_are_refused(changes: dict[str, Any], text: str) -> None:
    attrs = {**Offer(("memfd", "named"), "", "", "x", TOKENS[0]).attrs(), **changes}
    with pytest.raises(RemoteProtocolError, match=text):
        Offer.of(attrs)


# ---- what a side offers ----------------------------------------------------------------------------------------------


def _unix() -> tuple[socket.socket, ...]:
    return socket.socketpair()


def _tcp() -> tuple[socket.socket, ...]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        return client, listener.accept()[0]


OFFERS: list[tuple[Callable[[], tuple[socket.socket, ...]], str, bool, str, str, str]] = [
    # socket, URI, whether the client's, kinds, prefix, note
    (_unix, "unix:///s", True, "memfd named", "", ""),
    (_unix, "unix:///s", False, "memfd named", "", ""),
    (_unix, "unix:///s?shm=off", True, "", "", "the client's URI says shm=off"),
    (_unix, "unix:///s?shm=off", False, "", "", "the server's URI says shm=off"),
    (_unix, f"unix:///s?shm={A}", True, "named", A, ""),
    (_unix, f"unix:///s?shm={A}", False, "named", A, ""),
    (_tcp, "tcp://127.0.0.1:1", True, "", "", "over tcp it must be asked for, with ?shm=/dev/shm/NAME"),
    (_tcp, "tcp://127.0.0.1:1", False, "named", "", ""),  # whatever the client asks for
    (_tcp, f"tcp://127.0.0.1:1?shm={A}", True, "named", A, ""),
    (_tcp, f"tcp://127.0.0.1:1?shm={A}", False, "named", A, ""),
    (_tcp, "tcp://127.0.0.1:1?shm=off", False, "", "", "the server's URI says shm=off"),
    (_unix, "vsock://1:1", True, "", "", "the two sides may be on different hosts"),
    (_unix, f"vsock://1:1?shm={A}", False, "", "", "the two sides may be on different hosts"),
]


@pytest.mark.parametrize(("make", "uri", "is_client", "kinds", "prefix", "note"), OFFERS)
def test_offer(make: Any, uri: str, is_client: bool, kinds: str, prefix: str, note: str) -> None:
    sockets = make()
    address = parse_address(uri)
    made = offer(address, address.is_peer_local(sockets[0]), is_client=is_client)
    assert (" ".join(made.kinds), made.prefix, made.note) == (kinds, prefix, note)
    assert bool(made.semaphores) == bool(kinds)
    assert re.fullmatch("[0-9a-f]{16}", made.token)
    for sock in sockets:
        sock.close()


def test_a_tcp_peer_that_is_not_on_this_host() -> None:
    made = offer(parse_address(f"tcp://192.0.2.7:5?shm={A}"), False, is_client=True)
    assert made.kinds == () and made.note == "the two sides may be on different hosts"


def test_a_system_without_memfd_still_has_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "why_no_memfd", lambda: "this system has no memfd_create")
    made = offer(parse_address("unix:///s"), True, is_client=True)
    assert (made.kinds, made.note) == (("named",), "this system has no memfd_create")


# ---- over a real connection ------------------------------------------------------------------------------------------

NAMED = f"segments named {SHM_PREFIX}-..., control in a ring"
SITUATIONS = [
    ("", "", "memfd segments, control in a ring"),
    ("?shm=off", "", "off: the server's URI says shm=off"),
    ("", "?shm=off", "off: the client's URI says shm=off"),
    ("?shm=off", "?shm=off", "off: the client's URI says shm=off"),
    ("", f"?shm={SHM_PREFIX}", NAMED),
    (f"?shm={SHM_PREFIX}", "", NAMED),
    (f"?shm={SHM_PREFIX}", f"?shm={SHM_PREFIX}", NAMED),
    (
        f"?shm={SHM_PREFIX}",
        f"?shm={SHM_PREFIX}-2",
        f"off: the client wants named {SHM_PREFIX}-2, the server named {SHM_PREFIX}",
    ),
    ("?shm=auto", "?shm=auto", "memfd segments, control in a ring"),
]


@pytest.mark.parametrize(("server_query", "client_query", "reason"), SITUATIONS)
def test_shm_and_its_reason(unix_uri: str, server_query: str, client_query: str, reason: str) -> None:
    with fastsplit.Server(unix_uri + server_query, {"echo": lambda call: call.tensors}, arrays="numpy") as server:
        with fastsplit.connect(unix_uri + client_query, arrays="numpy") as channel:
            assert (channel.shm, channel.shm_reason) == (not reason.startswith("off"), reason)
            x = channel.empty(1000, "uint8")
            x[:] = 3
            (y,) = channel.call("echo", x)
            assert (y == 3).all() and (y.ctypes.data == x.ctypes.data) == channel.shm
            (client,) = server._service.clients
            assert client.connection.shm_reason == reason
            assert not [name for name in os.listdir("/dev/shm") if name.startswith(SHM_PREFIX.rpartition("/")[2])]


@pytest.mark.parametrize("asks", ["client", "server", "both", "neither"])
def test_over_tcp_the_client_must_ask(asks: str) -> None:
    query = f"?shm={SHM_PREFIX}"
    uri = "tcp://127.0.0.1:0" + (query if asks in ("server", "both") else "")
    with fastsplit.Server(uri, {"echo": lambda call: call.tensors}, arrays="numpy") as server:
        to = server.uri.partition("?")[0] + (query if asks in ("client", "both") else "")
        with fastsplit.connect(to, arrays="numpy") as channel:
            assert channel.shm == (asks in ("client", "both"))
            assert channel.shm_reason == (
                NAMED if channel.shm else "off: over tcp it must be asked for, with ?shm=/dev/shm/NAME"
            )
            x = channel.empty(10)
            x[:] = 1
            assert channel.call("echo", x)[0].sum() == 10

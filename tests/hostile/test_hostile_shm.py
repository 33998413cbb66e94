"""Peers that lie about shared memory, and in it: each gets one clear error, or harms nobody but itself.

The hostile side speaks the protocol by hand (raw_peer.py). Whatever it does, this process lives on, no call outlasts
its deadline, nothing is left behind (conftest.py looks), and the server goes on serving everybody else.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import random
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from raw_peer import (
    ABORT,
    ATTACHED,
    ERROR,
    FLOAT32,
    HELLO,
    REPLY,
    REQUEST,
    RETIRE,
    RETURN,
    SEGMENT,
    RawPeer,
    RawRing,
    connected,
    frame,
    memfd,
    segment,
    serving,
    shm_hello,
)

import fastsplit
from fastsplit.errors import DeadlineError, FastsplitError, PeerLostError, RemoteProtocolError

pytestmark = pytest.mark.matrix(one_in=3)

UINT8 = 2
KIB = 1024
NBYTES = 64 * KIB
CAPS = fastsplit.Limits(max_segments=3, max_shared_nbytes=1024 * KIB)
FALLOC_FL_PUNCH_HOLE_KEEP_SIZE = 3


# ---- both sides ------------------------------------------------------------------------------------------------------


@pytest.fixture
def kept() -> list[Any]:
    return []


@pytest.fixture
def server(unix_uri: str, kept: list[Any]) -> Iterator[fastsplit.Server]:
    def keep(call: fastsplit.Call) -> None:
        kept.extend(call.tensors)

    handlers = {
        "sum": lambda call: np.array(sum(float(x.sum()) for x in call.tensors)),
        "echo": lambda call: call.tensors,
        "keep": keep,
        "slow": lambda call: np.array([float(call.tensors[0].sum()) for _ in range(50)]),
    }
    with fastsplit.Server(unix_uri, handlers, arrays="numpy", limits=CAPS, send_timeout_s=1.0) as server:
        yield server
        kept.clear()


@pytest.fixture
def bystander(server: fastsplit.Server) -> Iterator[None]:
    """Somebody who was connected before, and somebody who comes after, are both served, in shared memory."""
    with fastsplit.connect(server.uri, arrays="numpy", call_timeout_s=10) as before:
        assert before.shm
        yield
        assert before.call("sum", np.ones(5))[0] == 5
    with fastsplit.connect(server.uri, arrays="numpy", call_timeout_s=10) as after:
        assert after.call("sum", np.ones(7))[0] == 7


def _left(server: fastsplit.Server) -> None:
    deadline = time.monotonic() + 5
    while server.connections > 1:
        assert time.monotonic() < deadline
        time.sleep(0.005)


@contextlib.contextmanager
def _mapped(nbytes: int = NBYTES) -> Iterator[tuple[int, mmap.mmap]]:
    with memfd(nbytes) as fd:
        yield fd, mmap.mmap(fd, nbytes)


@contextlib.contextmanager
def _doing(work: Callable[[], None]) -> Iterator[None]:
    """Does something over and over in a thread of its own."""
    done = threading.Event()

    def run() -> None:
        while not done.is_set():
            work()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(10)
    assert not thread.is_alive()


def _hostile_server(uri: str, act: Callable[[RawPeer], None], ring: bool) -> tuple[Any, list[str]]:
    """A server that acts on the first request; what the client says to it is taken note of."""
    aborts: list[str] = []

    def script(peer: RawPeer) -> None:
        peer.greet_shm(is_client=False, ring=ring)
        peer.expect(REQUEST)
        act(peer)
        aborts.append(peer.expect_abort())

    return serving(uri, script), aborts


# ---- announcements ---------------------------------------------------------------------------------------------------

# Each says with `own` (the first id of the hostile side's) what it announces.
Announcement = Callable[[RawPeer, int], None]


def _announce(
    nbytes: int = NBYTES, announced: int | None = None, *, seals: int = fcntl.F_SEAL_SHRINK, reserved: bool = True
) -> Announcement:
    def act(peer: RawPeer, own: int) -> None:
        with memfd(nbytes, seals=seals, reserved=reserved) as fd:
            peer.announce(own, nbytes if announced is None else announced, fd)

    return act


def _pipe(peer: RawPeer, own: int) -> None:
    ends = os.pipe()
    peer.announce(own, NBYTES, ends[0])
    for end in ends:
        os.close(end)


def _five_descriptors(peer: RawPeer, own: int) -> None:
    with memfd(NBYTES) as fd:
        peer.send_fds(segment(own, NBYTES) if peer.ring is None else b"d", *[fd] * 5)


def _with_ids(*steps: int) -> Announcement:
    """Announces a segment for each step, whose id is so much more than the hostile side's first."""

    def act(peer: RawPeer, own: int) -> None:
        with memfd(NBYTES) as fd:
            for step in steps:
                peer.announce(own + step, NBYTES, fd)

    return act


def _too_much_together(peer: RawPeer, own: int) -> None:
    for nth in range(2):
        with memfd(600 * KIB) as fd:
            peer.announce(own + 2 * nth, 600 * KIB, fd)


def _without_a_number(peer: RawPeer, own: int) -> None:
    peer.send(frame(SEGMENT, attrs={"id": own, "name": ""}))


def _with_a_name(peer: RawPeer, own: int) -> None:
    peer.send(segment(own, NBYTES, "/etc/passwd"))


def _retire_unknown(peer: RawPeer, own: int) -> None:
    peer.send(frame(RETIRE, attrs={"id": own}))


def _id(step: int, text: str) -> Callable[[int], str]:
    return lambda own: f"segment, id: {own + step}, {text}"


def _says(text: str) -> Callable[[int], str]:
    return lambda own: text


NEW_ID = "expected a new one of the peer's"
ANNOUNCEMENTS: dict[str, tuple[Announcement, Callable[[int], str]]] = {
    "a pipe": (_pipe, _says("segment, descriptor: Invalid argument, expected a memfd")),
    "not sealed": (_announce(seals=0), _says("segment, seals: 0x0, expected one against shrinking")),
    "sealed otherwise": (
        _announce(seals=fcntl.F_SEAL_GROW),
        _says("segment, seals: 0x4, expected one against shrinking"),
    ),
    "too small": (
        _announce(NBYTES, 2 * NBYTES),
        _says("segment, size: 65536 bytes, expected 131072, as announced"),
    ),
    "larger than announced": (
        _announce(2 * NBYTES, NBYTES),
        _says("segment, size: 131072 bytes, expected 65536, as announced"),
    ),
    "sparse": (_announce(reserved=False), _says("segment, size: 0 bytes are reserved, expected 65536")),
    "no descriptor": (
        lambda peer, own: peer.send(segment(own, NBYTES)),
        _says("segment: no descriptor came with it, expected one"),
    ),
    "five at once": (_five_descriptors, _says("descriptors: more than 4 in one message, expected one")),
    "a name": (_with_a_name, _says("segment: no descriptor came with it, expected one")),
    "an id of the other's": (_with_ids(1), _id(1, NEW_ID)),
    "an id twice": (_with_ids(0, 0), _id(0, NEW_ID)),
    "an id of 33 bits": (_with_ids(2**32), _id(2**32, NEW_ID)),
    "a negative id": (_with_ids(-(2**20)), _id(-(2**20), NEW_ID)),
    "too many": (_with_ids(0, 2, 4, 6), _says("segment: 4 of them, expected 3")),
    "too large": (
        _announce(NBYTES, 2**62),
        _says(f"segment, nbytes: {2**62}, {2**62} with the others, expected at most 1048576"),
    ),
    "too large together": (
        _too_much_together,
        _says("segment, nbytes: 614400, 1228800 with the others, expected at most 1048576"),
    ),
    "of no size": (_announce(NBYTES, 0), _says("segment, nbytes: 0, 0 with the others, expected at most 1048576")),
    "of negative size": (
        _announce(NBYTES, -1),
        _says("segment, nbytes: -1, -1 with the others, expected at most 1048576"),
    ),
    "without its size": (_without_a_number, _says("SEGMENT, nbytes: None, expected int")),
    "retired, and never there": (_retire_unknown, _id(0, "expected one of the peer's that is mapped")),
}


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("ring", [False, True], ids=["socket", "ring"])
@pytest.mark.parametrize(("act", "text"), ANNOUNCEMENTS.values(), ids=ANNOUNCEMENTS)
def test_clients_that_announce(
    server: fastsplit.Server, act: Announcement, text: Callable[[int], str], ring: bool
) -> None:
    with connected(server.uri) as peer:
        peer.greet_shm(is_client=True, ring=ring)
        act(peer, 1)
        assert peer.expect_abort() == text(1)
    _left(server)


@pytest.mark.parametrize("ring", [False, True], ids=["socket", "ring"])
@pytest.mark.parametrize(("act", "text"), ANNOUNCEMENTS.values(), ids=ANNOUNCEMENTS)
def test_servers_that_announce(unix_uri: str, act: Announcement, text: Callable[[int], str], ring: bool) -> None:
    serving_it, aborts = _hostile_server(unix_uri, lambda peer: act(peer, 2), ring)
    with serving_it as uri, fastsplit.connect(uri, arrays="numpy", limits=CAPS) as channel:
        with pytest.raises(RemoteProtocolError) as caught:
            channel.call("f", timeout_s=10)
        assert str(caught.value) == text(2)
        assert channel.closed
    assert aborts == [text(2)]


@pytest.mark.usefixtures("bystander")
def test_memory_that_cannot_be_written_ends_the_connection(server: fastsplit.Server) -> None:
    with connected(server.uri) as peer:
        peer.greet_shm(is_client=True, ring=False)
        _announce(seals=fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE)(peer, 1)
        reason = f"segment, descriptor: Operation not permitted, expected {NBYTES} bytes that can be mapped"
        assert peer.expect_abort() == reason
    _left(server)


@pytest.mark.usefixtures("bystander")
def test_descriptors_that_nobody_asked_for(server: fastsplit.Server) -> None:
    """Never claimed: too many end the connection, few are closed with it."""
    with connected(server.uri) as peer, memfd(NBYTES) as fd:
        peer.greet_shm(is_client=True)
        peer.send_fds(b"d", fd)
        peer.send_fds(b"d", fd, fd)
    with connected(server.uri) as peer, memfd(NBYTES) as fd:
        peer.greet_shm(is_client=True)
        with contextlib.suppress(BrokenPipeError):
            for _ in range(200):
                peer.send_fds(b"d", fd)
        assert peer.expect_abort().startswith("descriptors: ")
    _left(server)


@pytest.mark.usefixtures("bystander")
def test_descriptors_that_wake_a_server_for_a_request(server: fastsplit.Server) -> None:
    """It serves the request before it takes note of the descriptor. They count all the same, and are closed."""
    with connected(server.uri) as peer, memfd(NBYTES) as fd:
        peer.greet_shm(is_client=True)
        ring = peer.ring
        assert ring is not None
        answers = 0
        came = None
        while answers < 400 and (came is None or came.kind == REPLY):
            answers += 1
            soon = time.monotonic() + 1  # it may have sent its ABORT, and sleeps no more
            while not ring.memory[RawRing.ASLEEP_AT[1]] and time.monotonic() < soon:
                time.sleep(0.0002)
            with contextlib.suppress(OSError):
                ring.put(frame(REQUEST, answers, "keep"), ring_bell=False)
                peer.send_fds(b"d", fd)
            came = peer.receive()
        assert came is not None and came.kind == ABORT, f"{answers} answers"
        assert came.message.attrs["text"] == "descriptors: 129 without a SEGMENT, expected one for each"
    _left(server)


def test_any_id_is_answered(server: fastsplit.Server) -> None:
    """Also by a fast path, which the later requests go through."""
    with connected(server.uri) as peer:
        peer.greet_shm(is_client=True)
        for request_id in (1, 0, 2**63 - 1, 2**63, 2**64 - 1):
            peer.send(frame(REQUEST, request_id, "keep"))
            came = peer.receive()
            assert came is not None and (came.kind, came.request_id) == (REPLY, request_id), came


@pytest.mark.usefixtures("bystander")
def test_shared_memory_that_was_not_agreed_on(server: fastsplit.Server) -> None:
    for data in (segment(1, NBYTES), frame(RETIRE, attrs={"id": 1}), frame(RETURN, attrs={"wanted": 1})):
        with connected(server.uri) as peer:
            peer.greet()
            peer.send(data)
            kind = {8: "SEGMENT", 10: "RETIRE", 11: "RETURN"}[data[5]]
            assert peer.expect_abort() == f"a {kind} frame, expected none: no shared memory was agreed on"
    for data, text in (
        (
            frame(REQUEST, 1, "echo", [(UINT8, (8,))], placements=(1, 0, 8)),
            "placement: in shared memory, expected in the payload: none was agreed on",
        ),
        (frame(REQUEST, 1, "echo", returns=(1, 0)), "returns: expected none, since no shared memory was agreed on"),
    ):
        with connected(server.uri) as peer:
            peer.greet()
            peer.send(data)
            assert peer.expect_abort() == text
    _left(server)


HELLOS: dict[str, tuple[dict[str, Any], str]] = {
    "a number": ({"shm": 5}, "hello, shm: [5, '', '', '', '0000000000000000'], expected strings"),
    "another directory": (
        {"shm": "named", "shm_prefix": "/etc/x"},
        "hello, shm: '/etc/x', expected /dev/shm/NAME with letters, digits and . _ - in NAME",
    ),
    "a way out": (
        {"shm": "named", "shm_prefix": "/dev/shm/../etc/x"},
        "hello, shm: '/dev/shm/../etc/x', expected /dev/shm/NAME with letters, digits and . _ - in NAME",
    ),
    "a short token": (
        {"shm": "named", "shm_prefix": "/dev/shm/x", "shm_token": "0a"},
        "hello, shm_token: '0a', expected 16 hexadecimal digits",
    ),
    "a token with a way out": (
        {"shm": "named", "shm_prefix": "/dev/shm/x", "shm_token": "/../../etc/../aa"},
        "hello, shm_token: '/../../etc/../aa', expected 16 hexadecimal digits",
    ),
}


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize(("changes", "text"), HELLOS.values(), ids=HELLOS)
def test_offers_that_lie(server: fastsplit.Server, changes: dict[str, Any], text: str) -> None:
    with connected(server.uri) as peer:
        peer.send(shm_hello(False, **changes))
        assert peer.expect_abort() == text
    _left(server)


def test_a_peer_cannot_have_files_removed(server: fastsplit.Server) -> None:
    """Old names are only swept where this side's own address says so, not where the peer does."""
    path = f"/dev/shm/other-{os.getpid()}-{secrets.token_hex(16)}"
    with open(path, "wb"):
        os.utime(path, (1, 1))
    try:
        with connected(server.uri) as peer:
            peer.send(shm_hello(False, shm="named", shm_prefix=f"/dev/shm/other-{os.getpid()}"))
            peer.expect(HELLO)
            peer.send(frame(REQUEST, 1, "echo"))
            peer.expect(REPLY)
        assert os.path.exists(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


# ---- names -----------------------------------------------------------------------------------------------------------

PREFIX = f"/dev/shm/fastsplit-test-{os.getpid()}"
OWN = os.geteuid()
FILE = f"expected a file of uid {OWN} with mode 0600"
Naming = Callable[[str], tuple[str, str]]


def _file(mode: int = 0o600, nbytes: int = NBYTES) -> Naming:
    def make(start: str) -> tuple[str, str]:
        name = start + "ab" * 8
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
        os.fchmod(fd, mode)
        os.posix_fallocate(fd, 0, nbytes)
        os.close(fd)
        return name, name

    return make


def _link(start: str) -> tuple[str, str]:
    os.symlink("/etc/hostname", start + "ab" * 8)
    return start + "ab" * 8, start + "ab" * 8


def _fifo(start: str) -> tuple[str, str]:
    os.mkfifo(start + "ab" * 8, 0o600)
    return start + "ab" * 8, start + "ab" * 8


NAMES: dict[str, tuple[Naming, str]] = {
    "none": (lambda start: ("", ""), "segment, name: '', expected {start} and 16 hexadecimal digits"),
    "another directory": (
        lambda start: ("/etc/hostname", ""),
        "segment, name: '/etc/hostname', expected {start} and 16 hexadecimal digits",
    ),
    "a way out": (
        lambda start: (f"{start}/../../etc/passwd", ""),
        "segment, name: '{start}/../../etc/passwd', expected {start} and 16 hexadecimal digits",
    ),
    "somebody else's token": (
        lambda start: (start[:-16] + "0" * 32, ""),
        f"segment, name: '{PREFIX}-{'0' * 32}', expected {{start}} and 16 hexadecimal digits",
    ),
    "a line more": (
        lambda start: (start + "ab" * 8 + "\n", ""),
        "segment, name: '{start}abababababababab\\n', expected {start} and 16 hexadecimal digits",
    ),
    "nothing there": (
        lambda start: (start + "ab" * 8, ""),
        "segment, name: '{start}abababababababab': No such file or directory",
    ),
    "a symlink": (_link, "segment, name: '{start}abababababababab': Too many levels of symbolic links"),
    "a fifo": (
        _fifo,
        f"segment, name: '{{start}}abababababababab' is of uid {OWN} with mode 0o10600, {FILE}",
    ),
    "others may read it": (
        _file(0o644),
        f"segment, name: '{{start}}abababababababab' is of uid {OWN} with mode 0o100644, {FILE}",
    ),
    "too small": (_file(nbytes=KIB), "segment, size: 1024 bytes, expected 65536, as announced"),
}


@pytest.mark.parametrize(("make", "text"), NAMES.values(), ids=NAMES)
def test_names_that_lie(unix_uri: str, make: Naming, text: str) -> None:
    with fastsplit.Server(f"{unix_uri}?shm={PREFIX}", {"f": lambda call: None}) as server:
        with connected(server.uri) as peer:
            peer.send(shm_hello(False, shm="named", shm_prefix=PREFIX))
            token = peer.expect(HELLO).message.attrs["shm_token"]
            start = f"{PREFIX}-{token}"
            name, made = make(start)
            try:
                peer.send(segment(1, NBYTES, name))
                assert peer.expect_abort() == text.format(start=start)
            finally:
                if made:
                    with contextlib.suppress(FileNotFoundError):  # taken, and found wanting
                        os.unlink(made)
        with fastsplit.connect(server.uri) as channel:
            assert channel.shm
            assert channel.call("f") == ()


def test_a_descriptor_where_names_were_agreed_on(unix_uri: str) -> None:
    with fastsplit.Server(f"{unix_uri}?shm={PREFIX}", {}) as server, connected(server.uri) as peer:
        peer.send(shm_hello(False, shm="named", shm_prefix=PREFIX))
        peer.expect(HELLO)
        with memfd(NBYTES) as fd:
            peer.send_fds(segment(1, NBYTES), fd)
        assert peer.expect_abort().startswith("segment, name: '', expected ")


# ---- placements and returns ------------------------------------------------------------------------------------------

# Of frames by a side whose segment 1 (2 for the server) is mapped, and who holds a loan at {offset} of segment {lent}.
REFERENCES: dict[str, tuple[Callable[[int, int, int], dict[str, Any]], str]] = {
    "outside": (
        lambda own, lent, offset: {"placements": (own, NBYTES - 4, 8)},
        "placement: 8 bytes at 65532 of segment {own}, expected them within its 65536 bytes",
    ),
    "far outside": (
        lambda own, lent, offset: {"placements": (own, 2**64 - 4, 8)},
        "placement: 8 bytes at 18446744073709551612 of segment {own}, expected them within its 65536 bytes",
    ),
    "a segment that is not there": (
        lambda own, lent, offset: {"placements": (own + 2, 0, 8)},
        "placement: offset 0 of segment {other}, expected a place that was lent",
    ),
    "the ring": (
        lambda own, lent, offset: {"placements": (2**32 - 1, 0, 8)},
        "placement: offset 0 of segment 4294967295, expected a place that was lent",
    ),
    "not aligned": (
        lambda own, lent, offset: {"placements": (own, 2, 8)},
        "placement, offset: 2, expected a multiple of the item size 4",
    ),
    "larger than its tensor": (
        lambda own, lent, offset: {"placements": (own, 0, 12)},
        "metadata, tensor 0 (segment, codec, offset, nbytes): ({own}, 0, 0, 12), expected ({own}, 0, 0, 8)",
    ),
    "with a codec": (
        lambda own, lent, offset: {"placements": (own + 2**32, 0, 8)},
        "metadata, tensor 0 (segment, codec, offset, nbytes): ({own}, 1, 0, 8), expected ({own}, 0, 0, 8)",
    ),
    "ours, and not lent": (
        lambda own, lent, offset: {"placements": (lent, 1024 * KIB - 64, 8)},
        "placement: offset 1048512 of segment {lent}, expected a place that was lent",
    ),
    "ours, beyond its end": (
        lambda own, lent, offset: {"placements": (lent, 2**40, 8)},
        "placement: offset 1099511627776 of segment {lent}, expected a place that was lent",
    ),
    "ours, beyond the loan": (
        lambda own, lent, offset: {"placements": (lent, offset + 60, 8)},
        "placement: 8 bytes at {beyond} of segment {lent}, expected them within one loan",
    ),
    "returned, and not lent": (
        lambda own, lent, offset: {"returns": (lent, 1024 * KIB - 64)},
        "returns: offset 1048512 of segment {lent}, expected a place that was lent",
    ),
    "returned, and not ours": (
        lambda own, lent, offset: {"returns": (own, 0)},
        "returns: offset 0 of segment {own}, expected a place that was lent",
    ),
    "returned twice": (
        lambda own, lent, offset: {"returns": (lent, offset) * 2},
        "returns: offset {offset} of segment {lent}, expected a place that was lent",
    ),
    "returned to nobody": (
        lambda own, lent, offset: {"returns": (0, 0)},
        "metadata, returns, segment: 0, expected a segment's number and zero padding",
    ),
    "returned, and 33 bits": (
        lambda own, lent, offset: {"returns": (2**32 + 1, 0)},
        "metadata, returns, segment: 4294967297, expected a segment's number and zero padding",
    ),
}


def _lie(kind: int, request_id: int, fields: dict[str, Any]) -> bytes:
    if "placements" in fields:
        fields = {"op": "echo" if kind == REQUEST else "", "tensors": [(FLOAT32, (2,))], "payload_nbytes": 0, **fields}
    return frame(kind, request_id, **fields)


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("ring", [False, True], ids=["socket", "ring"])
@pytest.mark.parametrize(("make", "text"), REFERENCES.values(), ids=REFERENCES)
def test_clients_that_refer(
    server: fastsplit.Server, make: Callable[[int, int, int], dict[str, Any]], text: str, ring: bool
) -> None:
    with connected(server.uri) as peer, memfd(NBYTES) as fd:
        peer.greet_shm(is_client=True, ring=ring)
        peer.announce(1, NBYTES, fd)
        peer.send(frame(REQUEST, 1, "sum", [(FLOAT32, (2,))], placements=(1, 0, 8)))
        reply = peer.expect(REPLY)  # of 8 bytes in a block of 64, which are the server's
        lent, offset, _ = reply.message.placements
        assert lent == 2
        peer.send(_lie(REQUEST, 2, make(1, lent, offset)))
        assert peer.expect_abort() == text.format(own=1, other=3, lent=lent, offset=offset, beyond=offset + 60)
    _left(server)


@pytest.mark.parametrize("ring", [False, True], ids=["socket", "ring"])
@pytest.mark.parametrize(("make", "text"), REFERENCES.values(), ids=REFERENCES)
def test_servers_that_refer(
    unix_uri: str, make: Callable[[int, int, int], dict[str, Any]], text: str, ring: bool
) -> None:
    said: list[str] = []

    def script(peer: RawPeer) -> None:
        peer.greet_shm(is_client=False, ring=ring)
        request = peer.expect(REQUEST)
        lent, offset, _ = request.message.placements
        with memfd(NBYTES) as fd:
            peer.announce(2, NBYTES, fd)
        peer.send(_lie(REPLY, request.request_id, make(2, lent, offset)))
        said.append(text.format(own=2, other=4, lent=lent, offset=offset, beyond=offset + 60))
        said.append(peer.expect_abort())

    with serving(unix_uri, script) as uri, fastsplit.connect(uri, arrays="numpy") as channel:
        with pytest.raises(RemoteProtocolError) as caught:
            channel.call("f", np.ones(2, np.float32), timeout_s=10)
    assert said == [str(caught.value)] * 2


@pytest.mark.usefixtures("bystander")
def test_a_segment_that_is_retired_while_it_is_in_use(server: fastsplit.Server, kept: list[Any]) -> None:
    with connected(server.uri) as peer:
        peer.greet_shm(is_client=True)
        with _mapped() as (fd, memory):
            memory[:8] = bytes(range(8))
            peer.announce(1, NBYTES, fd)
        peer.send(frame(REQUEST, 1, "keep", [(UINT8, (8,))], placements=(1, 0, 8)))
        peer.expect(REPLY)
        peer.send(frame(RETIRE, attrs={"id": 1}))
        with memfd(NBYTES) as fd:
            peer.announce(1, NBYTES, fd)  # its number may be used again
        peer.send(frame(REQUEST, 2, "sum", [(UINT8, (8,))], placements=(1, 0, 8)))
        peer.expect(REPLY)
        assert kept[0].tolist() == list(range(8))
    _left(server)
    kept[0][:] = 7  # and after the end, too
    assert kept[0].sum() == 56


# ---- what lies in the memory -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("ring", [False, True], ids=["socket", "ring"])
def test_a_payload_that_changes_while_it_is_read(server: fastsplit.Server, ring: bool) -> None:
    """Wrong numbers, and nothing else."""
    with connected(server.uri) as peer, _mapped(512 * KIB) as (fd, memory):
        peer.greet_shm(is_client=True, ring=ring)
        peer.announce(1, 512 * KIB, fd)

        def scribble() -> None:
            np.frombuffer(memory, np.uint32)[:] = random.getrandbits(32)
            time.sleep(0)

        with _doing(scribble):
            for n in range(1, 6):
                peer.send(frame(REQUEST, n, "slow", [(UINT8, (512 * KIB,))], placements=(1, 0, 512 * KIB)))
                assert peer.expect(REPLY).message.tensors[0].shape == (50,)


@pytest.mark.usefixtures("bystander")
def test_memory_that_is_taken_away_is_zeros(server: fastsplit.Server) -> None:
    """Holes cannot be sealed against, and are only zeros (and memory again, once they are touched)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
    with connected(server.uri) as peer, _mapped() as (fd, memory):
        peer.greet_shm(is_client=True, ring=False)
        memory[:] = b"\1" * NBYTES
        peer.announce(1, NBYTES, fd)
        sums = []
        for n in (1, 2):
            peer.send(frame(REQUEST, n, "sum", [(UINT8, (NBYTES,))], placements=(1, 0, NBYTES)))
            where = peer.expect(REPLY)
            lent = np.frombuffer(mmap.mmap(peer.fds[0], 1024 * KIB), np.float64, 1, where.message.placements[1])
            sums.append(lent[0])
            assert libc.fallocate(fd, FALLOC_FL_PUNCH_HOLE_KEEP_SIZE, 0, NBYTES) == 0
        assert sums == [NBYTES, 0]


# ---- the ring --------------------------------------------------------------------------------------------------------

CONTROL = range(RawRing.ASLEEP_AT[0], RawRing.SLOTS_AT)  # all of it but for the header


def _ring_lie(nbytes: int, announced: int, header: bytes) -> Callable[[RawPeer], None]:
    def act(peer: RawPeer) -> None:
        with memfd(nbytes) as fd:
            if nbytes:
                mmap.mmap(fd, nbytes)[: len(header)] = header
            peer.announce(0, announced, fd)

    return act


RING = RawRing.NBYTES
EXPECTED_RING = f"expected {RING} bytes and (b'FSPLRING', 1, 64, 1024)"
RINGS: dict[str, tuple[Callable[[RawPeer], None], str]] = {
    "not formatted": (
        _ring_lie(RING, RING, b""),
        f"ring: {RING} bytes, header (b'\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00', 0, 0, 0), {EXPECTED_RING}",
    ),
    "of another version": (
        _ring_lie(RING, RING, RawRing.HEADER.replace(b"G\1", b"G\2")),
        f"ring: {RING} bytes, header (b'FSPLRING', 2, 64, 1024), {EXPECTED_RING}",
    ),
    "too small": (
        _ring_lie(4096, 4096, RawRing.HEADER),
        f"ring: 4096 bytes, header (b'FSPLRING', 1, 64, 1024), {EXPECTED_RING}",
    ),
    "smaller than announced": (_ring_lie(4096, RING, RawRing.HEADER), f"segment, size: 4096 bytes, expected {RING}"),
    "of no size": (_ring_lie(0, 0, b""), "segment, size: 0 bytes, expected 0, as announced"),
    "of negative size": (_ring_lie(4096, -4096, b""), "segment, size: 4096 bytes, expected -4096, as announced"),
    "without a descriptor": (
        lambda peer: peer.send(segment(0, RING)),
        "segment: no descriptor came with it, expected one",
    ),
}


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize(("act", "text"), RINGS.values(), ids=RINGS)
def test_rings_that_lie(server: fastsplit.Server, act: Callable[[RawPeer], None], text: str) -> None:
    with connected(server.uri) as peer:
        peer.send(shm_hello())
        peer.expect(HELLO)
        act(peer)
        assert peer.expect_abort().startswith(text)
    _left(server)


@pytest.mark.usefixtures("bystander")
def test_a_second_ring(server: fastsplit.Server) -> None:
    for first in (True, False):  # which is one too many where none was agreed on, either
        with connected(server.uri) as peer, memfd(RING) as fd:
            peer.greet_shm(is_client=True, ring=first)
            peer.announce(0, RING, fd)
            assert peer.expect_abort() == "SEGMENT, id: 0, expected no ring, or no other one"
    _left(server)


def test_servers_whose_answer_to_the_ring_lies(unix_uri: str) -> None:
    def attached(peer: RawPeer) -> None:
        peer.send(shm_hello())
        peer.expect(HELLO)
        peer.receive()
        peer.send(frame(ATTACHED, attrs={"text": 5}))
        assert peer.expect_abort() == "ATTACHED, text: 5, expected str"

    with serving(unix_uri, attached) as uri:
        with pytest.raises(RemoteProtocolError, match="ATTACHED, text: 5, expected str"):
            fastsplit.connect(uri)


SLOTS: dict[str, tuple[Callable[[RawRing], None], str]] = {
    "garbage": (lambda ring: ring.put(b"garbage" * 100), "header, magic: b'garb', expected b'FSPL'"),
    "more than was written": (
        lambda ring: [ring.post(ring.item(ring.out, slot)) for slot in range(64)] and ring.ring_bell(),
        "header, magic: b'",
    ),
    "a payload": (
        lambda ring: ring.send(frame(RETURN, attrs={"wanted": 0}, payload_nbytes=8)),
        "header, payload_nbytes: 8 in a ring, expected 0",
    ),
    "metadata that is too long": (
        lambda ring: ring.send(frame(RETURN, attrs={"wanted": 0}, metadata_nbytes=2**20)),
        "header, metadata_nbytes: 1048576, expected at most 65536",
    ),
    "a frame that ends in another slot": (
        lambda ring: [ring.put(frame(RETURN, metadata_nbytes=1500)) for _ in range(2)] and None,
        "RETURN, wanted: None, expected int",
    ),
}


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize(("act", "text"), SLOTS.values(), ids=SLOTS)
def test_clients_that_write_nonsense(server: fastsplit.Server, act: Callable[[RawRing], None], text: str) -> None:
    with connected(server.uri) as peer:
        peer.greet_shm(is_client=True)
        assert peer.ring is not None
        act(peer.ring)
        assert peer.expect_abort().startswith(text)
    _left(server)


@pytest.mark.parametrize(("act", "text"), SLOTS.values(), ids=SLOTS)
def test_servers_that_write_nonsense(unix_uri: str, act: Callable[[RawRing], None], text: str) -> None:
    serving_it, aborts = _hostile_server(unix_uri, lambda peer: act(peer.ring), True)  # type: ignore[arg-type]
    with serving_it as uri, fastsplit.connect(uri) as channel:
        with pytest.raises(RemoteProtocolError) as caught:
            channel.call("f", timeout_s=10)
        assert str(caught.value).startswith(text)
    assert aborts == [str(caught.value)]


@pytest.mark.usefixtures("bystander")
def test_a_slot_that_changes_after_it_was_read(server: fastsplit.Server) -> None:
    """A slot is copied out once: its length is what it was then."""
    long = frame(REQUEST, 1, "echo", attrs={"text": "x" * 1500})
    with connected(server.uri) as peer:
        peer.greet_shm(is_client=True)
        ring = peer.ring
        assert ring is not None
        ring.put(long[:1024])
        deadline = time.monotonic() + 5
        while (
            ring.memory[ring.ITEMS_AT[0] : ring.ITEMS_AT[0] + 4]
            != ring.memory[ring.ITEMS_AT[0] + ring.STRIDE : ring.ITEMS_AT[0] + ring.STRIDE + 4]
        ):  # until it is taken, like the next one, which was never posted
            assert time.monotonic() < deadline
        time.sleep(0.02)
        at = ring.slot_at(0, 0)
        ring.memory[at : at + 1024] = b"\xff" * 1024
        ring.put(long[1024:])
        peer.expect(REPLY)


@pytest.mark.usefixtures("bystander")
def test_a_header_that_changes_after_the_handshake(server: fastsplit.Server) -> None:
    with connected(server.uri) as peer:
        peer.greet_shm(is_client=True)
        assert peer.ring is not None
        peer.ring.memory[:64] = b"\xff" * 64
        for n in range(1, 200):
            peer.send(frame(REQUEST, n, "echo"))
            peer.expect(REPLY)


@pytest.mark.usefixtures("bystander")
def test_space_that_is_not_there(server: fastsplit.Server) -> None:
    """The server overwrites what the client has not read, which is the client's own loss."""
    with connected(server.uri) as peer:
        peer.greet_shm(is_client=True)
        ring = peer.ring
        assert ring is not None
        for n in range(1, 1001):
            while ring._libc.pthread_spin_trylock(ring.spaces()[(n - 1) // 32 % 2]) and n > 64 and n % 32 == 1:
                time.sleep(0.0001)
            for lock in ring.spaces()[2:]:
                ring.post(lock)
            ring.send(frame(REQUEST, n, "echo"))
        peer.sock.settimeout(10)
        deadline = time.monotonic() + 10
        while server.stats.calls < 1000:
            assert time.monotonic() < deadline
            time.sleep(0.005)


POISONS: dict[str, Callable[[], bytes]] = {
    "zeros": lambda: bytes(len(CONTROL)),
    "ones": lambda: b"\xff" * len(CONTROL),
    "0x7f": lambda: b"\x7f" * len(CONTROL),
    "small numbers": lambda: (b"\1" + bytes(3)) * (len(CONTROL) // 4),
    "noise": lambda: random.randbytes(len(CONTROL)),
}


@pytest.mark.parametrize("spin_us", [0.0, 1e5], ids=["asleep", "spinning"])
@pytest.mark.parametrize("poison", POISONS.values(), ids=POISONS)
def test_servers_that_overwrite_semaphores(unix_uri: str, poison: Callable[[], bytes], spin_us: float) -> None:
    """Whatever stands there, the process lives, and every call ends by its deadline. A sem_t would have ended it."""

    def script(peer: RawPeer) -> None:
        peer.greet_shm(is_client=False)
        ended.wait(20)

    ended = threading.Event()
    with serving(unix_uri, script) as uri, fastsplit.connect(uri, spin_us=spin_us) as channel:
        ring = channel._connection.transport._memory  # the same memory

        def overwrite() -> None:
            ring[CONTROL.start : CONTROL.stop] = poison()
            time.sleep(0.0001)

        try:
            with _doing(overwrite):
                for _ in range(10):
                    started = time.monotonic()
                    with pytest.raises(FastsplitError):
                        channel.call("f", np.ones(3), timeout_s=0.02)
                    assert time.monotonic() - started < 2
        finally:
            ended.set()


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("poison", POISONS.values(), ids=POISONS)
def test_clients_that_overwrite_semaphores(server: fastsplit.Server, poison: Callable[[], bytes]) -> None:
    for wait_s in (0, 0.0005, 0.01):  # while the server answers, spins, and sleeps
        with connected(server.uri) as peer:
            peer.greet_shm(is_client=True)
            ring = peer.ring
            assert ring is not None
            for n in range(1, 30):
                with contextlib.suppress(OSError):
                    ring.put(frame(REQUEST, n, "echo"))
                    time.sleep(wait_s)
                    ring.memory[CONTROL.start : CONTROL.stop] = poison()
                    ring.ring_bell()
    _left(server)


@pytest.mark.usefixtures("bystander")
def test_an_asleep_byte_that_is_toggled_all_the_time(server: fastsplit.Server) -> None:
    """For nothing rung, or not at all where nobody sleeps: what is sent still arrives."""
    with fastsplit.connect(server.uri, arrays="numpy", call_timeout_s=10) as channel:
        ring = channel._connection.transport._memory

        def toggle() -> None:
            ring[RawRing.ASLEEP_AT[0]] = 1  # the client's: the server rings for nothing
            time.sleep(0)

        with _doing(toggle):
            for n in range(500):
                assert channel.call("sum", np.full(3, n))[0] == 3 * n


@pytest.mark.usefixtures("bystander")
def test_a_client_that_never_reads_its_ring(server: fastsplit.Server) -> None:
    with connected(server.uri) as peer:
        peer.greet_shm(is_client=True)
        for n in range(1, 65):
            peer.send(frame(REQUEST, n, "echo", attrs={"n": n}))
        time.sleep(0.05)
        peer.send(frame(REQUEST, 65, "echo"))  # its answer has no slot
        started = time.monotonic()
        _left(server)
        assert time.monotonic() - started < 3  # the server's send_timeout_s is 1


def test_a_server_that_never_reads_its_ring(unix_uri: str) -> None:
    done = threading.Event()

    def script(peer: RawPeer) -> None:
        peer.greet_shm(is_client=False)
        done.wait(10)

    with serving(unix_uri, script) as uri, fastsplit.connect(uri) as channel:
        try:
            futures = [channel.submit("f", timeout_s=5) for _ in range(64)]
            started = time.monotonic()
            with pytest.raises(DeadlineError, match=r"f: not sent within 0\.2 s$"):
                channel.submit("f", timeout_s=0.2)
            assert time.monotonic() - started < 1
            with pytest.raises(DeadlineError, match=r"f: no reply within 0\.05 s"):
                futures[0].result(0.05)
            assert not channel.closed
        finally:
            done.set()
    assert all(isinstance(future.exception(5), FastsplitError) for future in futures)


def test_bytes_for_ever_instead_of_a_descriptor(unix_uri: str) -> None:
    """The client looks for the descriptor among bytes that say nothing, but not for ever."""
    ended = threading.Event()

    def script(peer: RawPeer) -> None:
        peer.greet_shm(is_client=False)
        peer.expect(REQUEST)

        def flood() -> None:
            with contextlib.suppress(OSError):
                peer.sock.send(b"w" * 2**20, socket.MSG_NOSIGNAL)

        with _doing(flood):
            time.sleep(0.05)
            peer.send(segment(2, NBYTES))
            ended.wait(10)

    with serving(unix_uri, script) as uri, fastsplit.connect(uri) as channel:
        started = time.monotonic()
        try:
            with pytest.raises(RemoteProtocolError, match="segment: no descriptor came with it, expected one"):
                channel.call("f", timeout_s=3)
            assert time.monotonic() - started < 5
        finally:
            ended.set()


@pytest.mark.usefixtures("bystander")
def test_a_client_that_breaks_the_protocol_while_a_handler_waits_for_memory(unix_uri: str, socket_dir: Any) -> None:
    """The handler fails, and the client is told why before anything else of it is read."""
    handlers = {"grow": lambda call: call.empty(512 * KIB, "uint8")}
    with fastsplit.Server(f"unix://{socket_dir}/t", handlers, arrays="numpy", send_timeout_s=5) as server:
        with connected(server.uri) as peer:
            peer.send(shm_hello(False, max_shared_nbytes=600 * KIB))
            peer.expect(HELLO)
            for n in (1, 2):  # the second has no room: the first reply is never given back
                peer.send(frame(REQUEST, n, "grow"))
            peer.expect(REPLY)
            peer.send(b"x" * 100)
            error = peer.expect(ERROR)
            assert error.message.attrs["text"].startswith("RemoteProtocolError: header, magic: b'xxxx'")
            assert peer.expect_abort().startswith("header, magic: b'xxxx'")


def test_what_a_lost_peer_had_lent_stays_readable(unix_uri: str) -> None:
    def script(peer: RawPeer) -> None:
        peer.greet_shm(is_client=False, ring=False)
        request = peer.expect(REQUEST)
        with _mapped() as (fd, memory):
            memory[:8] = bytes(range(8))
            peer.announce(2, NBYTES, fd)
        peer.send(frame(REPLY, request.request_id, "", [(UINT8, (8,))], placements=(2, 0, 8)))

    with serving(unix_uri, script) as uri, fastsplit.connect(uri, arrays="numpy") as channel:
        (x,) = channel.call("f", timeout_s=10)
        with pytest.raises(PeerLostError):
            channel.call("f", timeout_s=10)
    assert x.tolist() == list(range(8))

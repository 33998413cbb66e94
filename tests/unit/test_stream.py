"""Blocking I/O on one socket: short reads and writes, deadlines, the peer's death."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from fastsplit.errors import DeadlineError, PeerLostError, SettingError
from fastsplit.wire.transport import spin as spin_module
from fastsplit.wire.transport.base import remaining_s
from fastsplit.wire.transport.spin import choose_spin_us, cores, spin_us_beside
from fastsplit.wire.transport.stream import Stream


@pytest.fixture
def ends() -> Iterator[tuple[Stream, socket.socket]]:
    ours, theirs = socket.socketpair()
    link = Stream(ours)
    with theirs:
        yield link, theirs
    link.close()


def _soon(seconds: float = 0.05) -> float:
    return time.monotonic() + seconds


def _read_all(sock: socket.socket, nbytes: int, out: bytearray) -> None:
    while len(out) < nbytes:
        part = sock.recv(65_537)
        if not part:
            return
        out += part


def test_all_buffers_arrive_in_order_however_they_are_cut(ends: tuple[Stream, socket.socket]) -> None:
    """More buffers than one system call takes, of every kind that is sent, more bytes than the socket takes at once."""
    link, theirs = ends
    rng = np.random.default_rng(3)
    buffers = [bytearray(b"head"), *(rng.integers(0, 256, n * 997, np.uint8) for n in range(1, 150))]
    buffers += [np.float32(1) * np.ones((3, 5)), np.ones((2, 2), np.complex64), np.array(7, np.int16)]
    buffers += [np.ones((700, 900), np.complex128), np.ones(300_001, np.bool_), np.ones((500, 500), np.float16)]
    expected = b"".join(memoryview(buffer).cast("B") for buffer in buffers)
    out = bytearray()
    thread = threading.Thread(target=_read_all, args=(theirs, len(expected), out))
    thread.start()
    link.send_all(buffers, _soon(20))
    thread.join()
    assert out == expected and link.bytes_sent == len(expected)


def test_send_returns_what_is_left(ends: tuple[Stream, socket.socket]) -> None:
    link, theirs = ends
    data = np.arange(5_000_000, dtype=np.uint8)
    left = link.send([b"ab", data], 2 + data.nbytes)
    assert left and link.bytes_sent == 2 + data.nbytes - sum(memoryview(part).nbytes for part in left)
    left = link.send(left)  # full: nothing waits, and nothing is lost
    assert link.bytes_sent == 2 + data.nbytes - sum(memoryview(part).nbytes for part in left)
    out = bytearray()
    thread = threading.Thread(target=_read_all, args=(theirs, 2 + data.nbytes, out))
    thread.start()
    link.send_all(left, _soon(20))
    thread.join()
    assert out == b"ab" + data.tobytes()


def test_reads_go_straight_into_the_buffers(ends: tuple[Stream, socket.socket]) -> None:
    link, theirs = ends
    theirs.sendall(b"abcdefghij")
    first, second = bytearray(4), bytearray(20)
    assert link.receive_into([memoryview(first), memoryview(second)], _soon()) == 10
    assert first == b"abcd" and second[:6] == b"efghij" and link.bytes_received == 10
    many = [bytearray(1) for _ in range(100)]
    theirs.sendall(bytes(range(100)))
    got = link.receive_into([memoryview(part) for part in many], _soon())
    assert 1 <= got <= 100 and b"".join(many[:got]) == bytes(range(got))


@pytest.mark.parametrize("timeout_s", [-1.0, 0.0, 1e-9, 0.05, 1.2])
def test_a_read_has_a_deadline_and_loses_nothing(ends: tuple[Stream, socket.socket], timeout_s: float) -> None:
    link, theirs = ends
    started = time.monotonic()
    with pytest.raises(DeadlineError):
        link.receive_into([memoryview(bytearray(10))], started + timeout_s)
    assert max(timeout_s, 0) * 0.95 <= time.monotonic() - started < max(timeout_s, 0) + 0.3
    theirs.sendall(b"late")
    target = bytearray(10)
    assert link.receive_into([memoryview(target)], started + timeout_s) == 4  # what is there is read, late or not


def test_a_read_that_does_not_wait(ends: tuple[Stream, socket.socket]) -> None:
    link, _ = ends
    with pytest.raises(DeadlineError, match="nothing to read"):
        link.receive_into([memoryview(bytearray(1))], None, blocking=False)


def test_a_write_has_a_deadline(ends: tuple[Stream, socket.socket]) -> None:
    link, _ = ends
    started = time.monotonic()
    with pytest.raises(DeadlineError, match="the peer took too long to read"):
        link.send_all([bytes(20_000_000)], _soon())
    assert time.monotonic() - started < 1


def test_a_descriptor_goes_with_the_first_byte(ends: tuple[Stream, socket.socket]) -> None:
    link, theirs = ends
    frame = bytes(range(256)) * 20_000  # more than the socket takes at once
    left = link.send_with_descriptor(frame, 0, _soon(5))
    sent = len(frame) - len(left[0])
    assert 0 < sent == link.bytes_sent
    assert link.send_with_descriptor_now(frame, 0) == (False, [frame])
    with pytest.raises(DeadlineError):
        link.send_with_descriptor(frame, 0, _soon())
    data, ancillary, _, _ = theirs.recvmsg(len(frame), socket.CMSG_SPACE(64))
    assert frame.startswith(data) and len(ancillary) == 1
    (fd,) = struct.unpack("i", ancillary[0][2])
    os.close(fd)
    out = bytearray(data)
    thread = threading.Thread(target=_read_all, args=(theirs, len(frame), out))
    thread.start()
    link.send_all(left, _soon(20))
    thread.join()
    assert out == frame


def test_wait_tells_reading_from_writing(ends: tuple[Stream, socket.socket]) -> None:
    link, theirs = ends
    assert link.wait(_soon(), reading=True) == (False, True)
    theirs.sendall(b"x")
    assert link.wait(_soon(), reading=True) == (True, True)
    assert link.wait(_soon(), reading=False) == (False, True)
    while not link.send([bytes(100_000)]):
        pass
    assert link.wait(_soon(), reading=True) == (True, False)
    with pytest.raises(DeadlineError):
        link.wait(_soon(), reading=False)


def test_the_peers_end_and_its_death(ends: tuple[Stream, socket.socket]) -> None:
    link, theirs = ends
    assert not link.peer_left()
    theirs.sendall(b"last")
    theirs.shutdown(socket.SHUT_WR)
    assert link.peer_left()  # noticed before what it sent was read
    target = memoryview(bytearray(10))
    assert link.receive_into([target], None) == 4
    assert link.receive_into([target], None) == 0
    theirs.close()
    with pytest.raises(PeerLostError, match="the connection is lost: Broken pipe"):
        link.send_all([b"x"], _soon())


def test_a_reset_is_a_lost_peer() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    with listener:
        link = Stream(socket.create_connection(listener.getsockname()))
        theirs, _ = listener.accept()
        link.send([b"unread"])
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        theirs.close()
        with pytest.raises(PeerLostError, match="the connection is lost: Connection reset by peer"):
            link.receive_into([memoryview(bytearray(1))], _soon(5))
        link.close()


@pytest.mark.parametrize("method", ["shutdown", "shutdown_reading"])
def test_shutdown_wakes_a_reader(ends: tuple[Stream, socket.socket], method: str) -> None:
    link, _ = ends
    got: list[int] = []
    thread = threading.Thread(target=lambda: got.append(link.receive_into([memoryview(bytearray(1))], None)))
    thread.start()
    time.sleep(0.05)
    getattr(link, method)()
    thread.join(5)
    assert got == [0]


def test_what_was_sent_last_survives_bytes_that_nobody_read() -> None:
    """Closing with unread bytes resets a tcp connection; the peer would lose what it has not received yet."""
    listener = socket.create_server(("127.0.0.1", 0))
    with listener:
        theirs = socket.create_connection(listener.getsockname())
        link = Stream(listener.accept()[0])
        theirs.sendall(bytes(100_000))
        time.sleep(0.05)
        link.send([b"last words"])
        link.shutdown()
        link.close()
        with theirs:
            assert theirs.recv(100) == b"last words"
            assert theirs.recv(100) == b""  # the end, not a reset


def test_linger_reads_on_until_the_peer_is_done(ends: tuple[Stream, socket.socket]) -> None:
    link, theirs = ends
    out: list[bytes] = []

    def peer() -> None:
        theirs.sendall(bytes(3_000_000))  # more than the socket holds: blocks until somebody reads
        out.append(theirs.recv(100))
        theirs.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=peer)
    thread.start()
    link.send([b"why"])
    link.linger(_soon(10))
    thread.join(5)
    assert out == [b"why"]


def test_linger_has_a_deadline(ends: tuple[Stream, socket.socket]) -> None:
    link, theirs = ends
    stop = threading.Event()

    def flood() -> None:
        while not stop.is_set():
            try:
                theirs.send(b"x")
            except OSError:
                return

    thread = threading.Thread(target=flood)
    thread.start()
    started = time.monotonic()
    link.linger(_soon(0.1))
    assert time.monotonic() - started < 1
    stop.set()
    link.shutdown()
    thread.join(5)


def test_everything_on_a_closed_link_says_so() -> None:
    ours, theirs = socket.socketpair()
    link = Stream(ours)
    with theirs:
        link.close()
        link.close()
        link.shutdown()
        link.shutdown_reading()
        assert link.peer_left()
        for call in (
            lambda: link.send([b"x"]),
            lambda: link.receive_into([memoryview(bytearray(1))], None),
            lambda: link.receive_into([memoryview(bytearray(1))], _soon()),
        ):
            with pytest.raises(PeerLostError):
                call()


def test_a_lost_peer_is_no_signal() -> None:
    """Programs that restored SIGPIPE's default must not die of a peer that went away."""
    program = (
        "import signal, socket; signal.signal(signal.SIGPIPE, signal.SIG_DFL)\n"
        "from fastsplit.wire.transport.stream import Stream; from fastsplit.errors import PeerLostError\n"
        "ours, theirs = socket.socketpair(); theirs.close()\n"
        "try:\n    Stream(ours).send([b'x'])\nexcept PeerLostError:\n    raise SystemExit(42)\n"
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    assert subprocess.run([sys.executable, "-c", program], cwd=root, timeout=60).returncode == 42


def test_remaining_s() -> None:
    assert remaining_s(None) is None
    assert remaining_s(time.monotonic() - 5) == 0.0
    assert 4 < (remaining_s(time.monotonic() + 5) or 0) <= 5


def test_a_reader_spins_before_it_sleeps_but_not_for_a_slow_peer() -> None:
    ours, theirs = socket.socketpair()
    link = Stream(ours, spin_us=2000)
    looks = _Looks(link)
    buffer = memoryview(bytearray(8))
    with theirs:
        theirs.send(b"x")
        assert link.receive_into([buffer], _soon()) == 1
        assert looks.take() == 1, "bytes that are there are seen at the first look"
        for _ in range(spin_module._MAX_MISSES):
            with pytest.raises(DeadlineError):
                link.receive_into([buffer], _soon(0.01))
            assert looks.take() > 1
        for _ in range(spin_module._RETRY_AFTER - 1):
            with pytest.raises(DeadlineError):
                link.receive_into([buffer], _soon(0.0))
        assert looks.take() == 0, "the peer is slow: nothing is spent on it"
        theirs.send(b"x")
        assert link.receive_into([buffer], _soon()) == 1
        assert looks.take() == 1, "now and then it is given another chance"
        theirs.send(b"x")
        assert link.receive_into([buffer], _soon()) == 1
        assert looks.take() == 1, "and has used it"
    link.close()


class _Looks:
    """Counts how often a link looks for bytes."""

    def __init__(self, link: Stream) -> None:
        self._poll = link._readable
        self._count = 0
        link._readable = self  # type: ignore[assignment]

    def poll(self, timeout: int) -> list[tuple[int, int]]:
        self._count += 1
        return self._poll.poll(timeout)

    def take(self) -> int:
        count, self._count = self._count, 0
        return count


def test_a_link_that_must_not_spin_does_not(ends: tuple[Stream, socket.socket]) -> None:
    link, theirs = ends
    looks = _Looks(link)
    theirs.send(b"x")
    assert link.receive_into([memoryview(bytearray(8))], _soon()) == 1
    assert looks.take() == 0


def test_how_long_to_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTSPLIT_SPIN_US", raising=False)
    assert choose_spin_us(7) == 7.0
    assert choose_spin_us(None) == (spin_module._SPIN_US if cores() > 1 else 0.0)
    monkeypatch.setattr(spin_module, "cores", lambda: 1)
    assert choose_spin_us(None) == 0.0, "on one core it would only keep the peer from working"
    monkeypatch.setenv("FASTSPLIT_SPIN_US", "12.5")
    assert choose_spin_us(None) == 12.5
    assert choose_spin_us(0) == 0.0
    for wrong in ("much", "-1", "nan", "2e6"):
        monkeypatch.setenv("FASTSPLIT_SPIN_US", wrong)
        with pytest.raises(SettingError, match="expected"):
            choose_spin_us(None)


@pytest.mark.parametrize("count", [1, 2, 8])
def test_how_long_to_spin_beside_threads_that_compute(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Not at all if they have all cores; as long as ever if one is left, or if it is not for us to say."""
    monkeypatch.delenv("FASTSPLIT_SPIN_US", raising=False)
    monkeypatch.setattr(spin_module, "cores", lambda: count)
    for threads in range(count):
        assert spin_us_beside(threads) is None
    for threads in (count, count + 1, 1000):
        assert spin_us_beside(threads) == 0.0
        assert choose_spin_us(spin_us_beside(threads)) == 0.0
    for said in ("0", "50", "much"):  # whoever asks for it is told what is wrong with it
        monkeypatch.setenv("FASTSPLIT_SPIN_US", said)
        assert [spin_us_beside(threads) for threads in (0, count, count + 1)] == [None] * 3
    monkeypatch.setenv("FASTSPLIT_SPIN_US", "12.5")
    assert choose_spin_us(spin_us_beside(count)) == 12.5


def test_how_long_a_link_spins_may_change(ends: tuple[Stream, socket.socket]) -> None:
    link, theirs = ends
    looks = _Looks(link)
    link.spin.spin_us = 2000.0
    with pytest.raises(DeadlineError):
        link.receive_into([memoryview(bytearray(8))], _soon(0.01))
    assert looks.take() > 1
    link.spin.spin_us = 0.0
    theirs.send(b"x")
    assert link.receive_into([memoryview(bytearray(8))], _soon()) == 1
    assert looks.take() == 0

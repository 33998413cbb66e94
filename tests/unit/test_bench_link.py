"""The relay that benchmarks measure through: all bytes in order, never sooner than stated, and nothing left behind.

Only lower bounds on time: bench_link.py measures how exact it is, on a machine that does nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benches.link import LINKS, relay, relay_arguments, through
from fastsplit.wire.transport.address import TcpAddress, parse_address

_TIMEOUT_S = 20.0


@contextmanager
def _listening() -> Iterator[tuple[socket.socket, str]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(_TIMEOUT_S)
        yield listener, f"tcp://127.0.0.1:{listener.getsockname()[1]}"


def _connect(uri: str) -> socket.socket:
    address = parse_address(uri)
    assert isinstance(address, TcpAddress)
    return socket.create_connection((address.host, address.port), _TIMEOUT_S)


def _accept(listener: socket.socket) -> socket.socket:
    sock, _ = listener.accept()
    sock.settimeout(_TIMEOUT_S)
    return sock


@contextmanager
def _linked(rate_bit_per_s: float = 0.0, delay_s: float = 0.0) -> Iterator[tuple[socket.socket, socket.socket]]:
    """The two ends of a connection through a relay."""
    with _listening() as (listener, target), relay(target, rate_bit_per_s, delay_s) as uri:
        with _connect(uri) as near, _accept(listener) as far:
            yield near, far


def _send_in_pieces(sock: socket.socket, sent: bytes, seed: int) -> None:
    pieces = random.Random(seed)
    left = memoryview(sent)
    while left:
        nbytes = pieces.choice((1, 64, 1500, 70_000))
        sock.sendall(left[:nbytes])
        left = left[nbytes:]
    sock.shutdown(socket.SHUT_WR)


def _receive_all(sock: socket.socket) -> bytes:
    received = bytearray()
    while block := sock.recv(100_000):
        received += block
    return bytes(received)


@pytest.mark.parametrize(("rate_bit_per_s", "delay_s"), [(0.0, 0.0), (0.0, 0.004), (80e6, 0.004)])
def test_all_bytes_arrive_in_order_both_ways_at_once_and_never_too_soon(rate_bit_per_s: float, delay_s: float) -> None:
    there, back = random.Random(1).randbytes(2_000_000), random.Random(2).randbytes(1_500_000)
    with _linked(rate_bit_per_s, delay_s) as (near, far):
        began_at = time.monotonic()
        senders = [
            threading.Thread(target=_send_in_pieces, args=arguments) for arguments in ((near, there, 3), (far, back, 4))
        ]
        receiver_there: list[bytes] = []
        receiver = threading.Thread(target=lambda: receiver_there.append(_receive_all(far)))
        for thread in (*senders, receiver):
            thread.start()
        received_back = _receive_all(near)
        for thread in (*senders, receiver):
            thread.join()
        taken_s = time.monotonic() - began_at
    assert hashlib.sha256(receiver_there[0]).digest() == hashlib.sha256(there).digest()
    assert hashlib.sha256(received_back).digest() == hashlib.sha256(back).digest()
    assert taken_s >= delay_s + (len(there) * 8 / rate_bit_per_s if rate_bit_per_s else 0)


def test_the_end_of_one_direction_is_passed_on_and_the_other_goes_on() -> None:
    with _linked(8e6, 0.01) as (near, far):
        near.sendall(b"question")
        near.shutdown(socket.SHUT_WR)
        assert _receive_all(far) == b"question"
        far.sendall(b"answer")
        assert near.recv(100) == b"answer"
        far.close()
        assert near.recv(100) == b""


def test_a_reset_is_passed_on() -> None:
    with _linked() as (near, far):
        near.sendall(b"x")
        assert far.recv(1) == b"x"
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        far.close()
        with pytest.raises(ConnectionResetError):
            near.recv(1)


def test_a_target_that_refuses_resets_the_connection_and_the_relay_goes_on(capfd: pytest.CaptureFixture[str]) -> None:
    with _listening() as (listener, target):
        with relay(target) as uri:
            listener.close()
            for _ in range(2):
                with pytest.raises(ConnectionResetError), _connect(uri) as near:
                    near.recv(1)
    assert "refused" in capfd.readouterr().err


def test_a_message_takes_the_delay_each_way() -> None:
    with _linked(delay_s=0.02) as (near, far):
        for _ in range(3):
            began_at = time.monotonic()
            near.sendall(b"x")
            far.recv(1)
            arrived_at = time.monotonic()
            far.sendall(b"y")
            near.recv(1)
            assert arrived_at - began_at >= 0.02
            assert time.monotonic() - arrived_at >= 0.02


def test_two_connections_share_the_rate() -> None:
    nbytes, rate_bit_per_s = 200_000, 16e6
    with _listening() as (listener, target), relay(target, rate_bit_per_s) as uri:
        with _connect(uri) as first, _accept(listener) as first_far:
            with _connect(uri) as second, _accept(listener) as second_far:
                began_at = time.monotonic()
                for near in (first, second):
                    threading.Thread(target=_send_in_pieces, args=(near, bytes(nbytes), 5)).start()
                assert len(_receive_all(first_far)) == len(_receive_all(second_far)) == nbytes
                assert time.monotonic() - began_at >= 2 * nbytes * 8 / rate_bit_per_s


def test_a_full_link_stops_its_sender() -> None:
    with _linked(1e6, 0.001) as (near, _far):
        near.setblocking(False)
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)
        accepted = 0
        with contextlib.suppress(BlockingIOError):
            while accepted < 4_000_000:
                accepted += near.send(bytes(64 * 1024))
        assert accepted < 2_000_000


def test_the_process_ends_with_its_stdin() -> None:
    with _listening() as (listener, target):
        command = [sys.executable, "-m", "benches.link", *relay_arguments(target, 1e9, 0.001)]
        root = Path(__file__).resolve().parents[2]
        with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
            assert running.stdin is not None and running.stdout is not None
            ready = running.stdout.readline().split()
            with _connect(ready[1]) as near, _accept(listener) as far:
                near.sendall(b"x")
                assert far.recv(1) == b"x"
                running.stdin.close()
                assert running.wait(_TIMEOUT_S) == 0
                assert far.recv(1) == b""


def test_the_loopback_link_is_no_relay_and_options_of_the_address_are_kept() -> None:
    with through(LINKS["loopback"], "tcp://127.0.0.1:7?shm=off") as uri:
        assert uri == "tcp://127.0.0.1:7?shm=off"
    with through(LINKS["1g"], "tcp://127.0.0.1:7?shm=off") as uri:
        assert uri.startswith("tcp://127.0.0.1:") and uri.endswith("?shm=off")
        assert uri != "tcp://127.0.0.1:7?shm=off"

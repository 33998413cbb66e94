"""Listener: it binds once, accepts without waiting, keeps a descriptor in reserve, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import select
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastsplit.errors import AddressError, ListenError, ResourceError
from fastsplit.wire.listener import Listener
from fastsplit.wire.transport.address import parse_address


@pytest.fixture
def listener(unix_uri: str) -> Iterator[Listener]:
    made = Listener(unix_uri, insecure=False)
    yield made
    made.close()


def _path(uri: str) -> Path:
    return Path(uri.removeprefix("unix://"))


def _connected(uri: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(_path(uri)))
    return sock


@contextlib.contextmanager
def _no_descriptor_left() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))), hard))
    try:
        filled = []
        with contextlib.suppress(OSError):
            while True:
                filled.append(os.dup(0))
        yield
    finally:
        for fd in filled:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_binding(listener: Listener, unix_uri: str) -> None:
    assert not listener.is_bound and listener.uri == unix_uri
    listener.bind()
    fd = listener.fileno()
    listener.bind()
    assert listener.fileno() == fd and listener.is_bound and listener.uri == unix_uri
    assert stat.S_IMODE(_path(unix_uri).stat().st_mode) == 0o600
    with pytest.raises(ListenError, match="cannot listen: Address already in use"):
        Listener(unix_uri, insecure=False).bind()


def test_a_port_that_the_system_chooses() -> None:
    listener = Listener("tcp://127.0.0.1:0", insecure=False)
    listener.bind()
    assert parse_address(listener.uri) == listener.address and not listener.uri.endswith(":0")
    listener.close()


@pytest.mark.parametrize("uri", ["tcp://0.0.0.0:0", "tcp://[::]:0", "vsock://3:9"])
def test_addresses_that_others_reach(uri: str) -> None:
    listener = Listener(uri, insecure=False)
    with pytest.raises(AddressError, match="refused to listen: links are not authenticated"):
        listener.bind()
    assert not listener.is_bound
    listener.close()
    with pytest.raises(AddressError):
        Listener("nonsense", insecure=True)


def test_accepting(listener: Listener, unix_uri: str) -> None:
    listener.bind()
    listener.hold_descriptor()
    assert listener.accept() is None  # it does not wait
    clients = [_connected(unix_uri) for _ in range(3)]
    for client in clients:
        assert select.select([listener], [], [], 5)[0]
        came = listener.accept()
        assert came is not None and came[1] is None
        client.send(b"x")
        assert came[0].recv(1) == b"x"
        came[0].close()
        client.close()
    assert listener.accept() is None


def test_a_forked_child_leaves_the_file_to_the_parent(listener: Listener, unix_uri: str) -> None:
    listener.bind()
    listener.leave()
    listener.close()
    assert _path(unix_uri).exists()
    _path(unix_uri).unlink()


def test_without_a_descriptor_a_client_is_accepted_to_be_refused(listener: Listener, unix_uri: str) -> None:
    listener.bind()
    listener.hold_descriptor()
    first, second, third = (_connected(unix_uri) for _ in range(3))
    with _no_descriptor_left():
        came = listener.accept()
        assert came is not None and isinstance(came[1], ResourceError)
        assert str(came[1]).startswith("the server accepts no more connections: Too many open files: no file descript")
        with pytest.raises(OSError, match="Too many open files") as error:
            listener.accept()  # the reserve is used
        assert error.value.errno == errno.EMFILE
        came[0].close()
        listener.restore()
        came = listener.accept()
        assert came is not None and isinstance(came[1], ResourceError)
        came[0].close()
        listener.restore()
    came = listener.accept()
    assert came is not None and came[1] is None
    for sock in (came[0], first, second, third):
        sock.close()


def test_without_a_descriptor_there_is_no_reserve(listener: Listener) -> None:
    with _no_descriptor_left(), pytest.raises(ResourceError, match="a descriptor in reserve: Too many open files"):
        listener.hold_descriptor()
    listener.restore()  # there is none: nothing to restore
    listener.hold_descriptor()
    listener.hold_descriptor()
    listener.release_descriptor()
    listener.release_descriptor()


def test_closing(listener: Listener, unix_uri: str) -> None:
    listener.close()  # before anything
    listener.bind()
    listener.hold_descriptor()
    listener.close()
    assert not _path(unix_uri).exists() and listener.is_bound
    successor = Listener(unix_uri, insecure=False)
    successor.bind()
    listener.close()
    assert _path(unix_uri).exists()
    successor.close()


def test_the_file_of_a_successor_is_left_alone(listener: Listener, unix_uri: str) -> None:
    listener.bind()
    _path(unix_uri).unlink()
    with socket.socket(socket.AF_UNIX) as successor:
        successor.bind(str(_path(unix_uri)))
    listener.close()
    assert _path(unix_uri).exists()


def test_a_forked_child_closes_descriptors_alone(listener: Listener, unix_uri: str) -> None:
    before = set(os.listdir("/proc/self/fd"))
    listener.bind()
    listener.hold_descriptor()
    listener.leave()
    assert set(os.listdir("/proc/self/fd")) == before
    assert _path(unix_uri).exists()

"""What all tests share: links to listen on, servers and channels that end with the test, and a watch for leaks.

Rules. Every test is checked for what it leaves behind: descriptors, Python threads, child processes, names in shared
memory. What a fixture of a wider scope opened before the test does not count. Threads of native libraries (OpenMP) are
not seen, since they are nobody's to join.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fastsplit

if importlib.util.find_spec("torch") is not None:
    import torch  # noqa: F401  (here, so that what its import opens is no test's leak)

_SETTLING_S = 3.0
_VSOCK_ANY_PORT = 0xFFFFFFFF


# ---- leaks -----------------------------------------------------------------------------------------------------------


def _descriptors() -> set[tuple[int, str]]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the directory's own descriptor is gone by now
            found.add((int(name), os.readlink(f"/proc/self/fd/{name}")))
    return found


def _threads() -> set[threading.Thread]:
    # tqdm keeps one thread for as long as the process lives, by design
    return {thread for thread in threading.enumerate() if type(thread).__name__ != "TMonitor"}


def _children() -> set[int]:
    found = set()
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):
            found.update(map(int, Path(f"/proc/self/task/{task}/children").read_text().split()))
    return found


def _shared_names() -> set[str]:
    # other programs use /dev/shm too: only what is named after us or this process is ours
    with contextlib.suppress(OSError):
        return {name for name in os.listdir("/dev/shm") if "fastsplit" in name or str(os.getpid()) in name}
    return set()


_WATCHED: dict[str, Callable[[], set[Any]]] = {
    "descriptors": _descriptors,
    "threads": _threads,
    "child processes": _children,
    "names in /dev/shm": _shared_names,
}


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Fails a test that leaves something behind."""
    before = {what: look() for what, look in _WATCHED.items()}
    yield
    deadline = time.monotonic() + _SETTLING_S
    while True:
        left = {what: look() - before[what] for what, look in _WATCHED.items()}
        left = {what: things for what, things in left.items() if things}
        if not left:
            return
        if time.monotonic() > deadline:
            break
        gc.collect()
        time.sleep(0.02)
    pytest.fail("left behind: " + "; ".join(f"{what} {sorted(map(str, things))}" for what, things in left.items()))


# ---- links -----------------------------------------------------------------------------------------------------------


def _why_no_tcp6() -> str | None:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as sock:
            sock.bind(("::1", 0))
    except OSError as error:
        return f"this host has no IPv6 loopback: {error}"
    return None


def _why_no_vsock() -> str | None:
    try:
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as sock:
            sock.bind((1, _VSOCK_ANY_PORT))
    except (AttributeError, OSError) as error:
        return f"this kernel has no vsock loopback (cid 1): {error}"
    return None


_WHY_NOT: dict[str, Callable[[], str | None]] = {"tcp6": _why_no_tcp6, "vsock": _why_no_vsock}
LINKS = ("unix", "tcp4", "tcp6", "vsock")


@pytest.fixture
def socket_dir() -> Iterator[Path]:
    """A directory with a short name: a unix socket's path has 107 bytes at most."""
    path = Path(tempfile.mkdtemp(prefix="fs-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def unix_uri(socket_dir: Path) -> str:
    return f"unix://{socket_dir}/s"


def _uri(link: str, socket_dir: Path) -> str:
    reason = _WHY_NOT[link]() if link in _WHY_NOT else None
    if reason is not None:
        pytest.skip(reason)
    return {
        "unix": f"unix://{socket_dir}/s",
        "tcp4": "tcp://127.0.0.1:0",
        "tcp6": "tcp://[::1]:0",
        "vsock": f"vsock://1:{_VSOCK_ANY_PORT}",
    }[link]


@pytest.fixture(params=LINKS)
def uri(request: pytest.FixtureRequest, socket_dir: Path) -> str:
    """Where to listen, once for each link. A server's own `uri` says where it really is."""
    return _uri(request.param, socket_dir)


@pytest.fixture(params=("unix", "tcp4"))
def socket_uri(request: pytest.FixtureRequest, socket_dir: Path) -> str:
    """The same for tests of what happens above the link: the two kinds of kernel sockets whose behaviour differs."""
    return _uri(request.param, socket_dir)


# ---- both ends -------------------------------------------------------------------------------------------------------


@pytest.fixture
def serve() -> Iterator[Callable[..., fastsplit.Server]]:
    """`serve(uri, handlers, ...)`: a started server, closed with the test."""
    with contextlib.ExitStack() as stack:

        def start(uri: str, handlers: dict[str, Any], **options: Any) -> fastsplit.Server:
            return stack.enter_context(fastsplit.Server(uri, handlers, **options))

        yield start


@pytest.fixture
def connect() -> Iterator[Callable[..., fastsplit.Channel]]:
    """`connect(uri, ...)`: a channel, closed with the test (use it after `serve`, so that it is closed first)."""
    with contextlib.ExitStack() as stack:

        def start(uri: str, **options: Any) -> fastsplit.Channel:
            return stack.enter_context(fastsplit.connect(uri, **options))

        yield start

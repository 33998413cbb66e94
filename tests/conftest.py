"""What all tests share: links to listen on, servers and channels that end with the test, and a watch for leaks.

Rules. Every test is checked for what it leaves behind: descriptors, Python threads, child processes, names in shared
memory. What a fixture of a wider scope opened before the test does not count. Threads of native libraries (OpenMP) are
not seen, since they are nobody's to join.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import itertools
import os
import re
import shutil
import signal
import socket
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

import amount
import pytest
from aio_front import Front

import fastsplit
from fastsplit.wire.blocking import channel, replies
from fastsplit.wire.shm import negotiation as sharing
from fastsplit.wire.shm import ring, slots

if importlib.util.find_spec("torch") is not None:
    import torch  # noqa: F401  (here, so that what its import opens is no test's leak)

_SETTLING_S = 3.0
_VSOCK_ANY_PORT = 0xFFFFFFFF


# ---- leaks -----------------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="every combination of what is marked `matrix`")


def pytest_configure(config: pytest.Config) -> None:
    amount.exhaustive = config.getoption("--exhaustive")  # before the tests are imported


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a test that is marked `matrix` a sample of its combinations runs by default, always the same: one in eight (or
    in `one_in`), and as many more as it takes that each value of each parameter is among them (unless `each=False`: a
    parameter that is itself a list of combinations). `one_in=0`: none. `make exhaustive` runs all of them."""
    if config.getoption("--exhaustive"):
        return
    groups: dict[tuple[str, bool, int, bool], list[pytest.Item]] = {}
    for item in items:
        markers = list(item.iter_markers("matrix"))
        if markers:
            runs = item.get_closest_marker("skip") is None  # else it is on a link that this host lacks
            # the nearest that says something: the test's own mark, its module's, not that of a link or a front (below)
            said = {key: value for marker in reversed(markers) for key, value in marker.kwargs.items()}
            name = item.nodeid.partition("[")[0]
            groups.setdefault((name, runs, said.get("one_in", 8), said.get("each", True)), []).append(item)
    left_out: set[pytest.Item] = set()
    for (_, _, one_in, each), group in groups.items():
        left_out.update(set(group) - _sample(group, one_in, each=each))
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


def pytest_make_parametrize_id(val: object) -> str | None:
    """A test has the same name in every process, whatever that one's number is."""
    return val.replace(SHM_PREFIX, "SHM_PREFIX") if isinstance(val, str) and SHM_PREFIX in val else None


def _sample(group: list[pytest.Item], one_in: int, *, each: bool) -> set[pytest.Item]:
    """One in `one_in` of a test's combinations, with `each` more until each value of each parameter occurs. Each time
    the one that has most values that did not occur yet, then most pairs of values, is added."""
    if not one_in:
        return set()
    values = {item: frozenset(_values(item)) for item in group}
    pairs = {item: frozenset(itertools.combinations(_values(item), 2)) for item in group}
    left = sorted(group, key=lambda item: zlib.crc32(item.name.encode()))
    new_values = set().union(*values.values())
    new_pairs = set().union(*pairs.values())
    sample: set[pytest.Item] = set()
    while left and ((each and new_values) or len(sample) * one_in < len(group)):
        best = left[0]
        if new_pairs:
            best = max(left, key=lambda item: (len(new_values & values[item]), len(new_pairs & pairs[item])))
        left.remove(best)
        sample.add(best)
        new_values -= values[best]
        new_pairs -= pairs[best]
    return sample


def _values(item: pytest.Item) -> tuple[Hashable, ...]:
    """A combination's values, each with its parameter. One that cannot be hashed is itself alone."""
    found: list[Hashable] = []
    callspec = getattr(item, "callspec", None)
    for name, value in () if callspec is None else callspec.params.items():
        try:
            hash(value)
        except TypeError:
            value = id(value)
        found.append((name, type(value), value))
    return tuple(found)


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
    found: set[int] = set()
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # takes nothing, and costs a hundredth of a look
    except ChildProcessError:
        return found
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):
            found.update(map(int, Path(f"/proc/self/task/{task}/children").read_text().split()))
    return found


def _shared_names() -> set[str]:
    # other programs use /dev/shm too: ours is what is named after this process or us, unless a test or a benchmark that
    # runs beside this one put its own number into the name, and lives
    found = set()
    with contextlib.suppress(OSError):
        for name in os.listdir("/dev/shm"):
            owner = re.match(r"fastsplit[-_][a-z]+[-_](\d+)", name)
            others = owner is not None and int(owner[1]) not in (os.getpid(), *_children()) and _lives(owner[1])
            if str(os.getpid()) in name or ("fastsplit" in name and not others):
                found.add(name)
    return found


def _lives(pid: str) -> bool:
    return os.path.exists(f"/proc/{pid}")


_WATCHED: dict[str, Callable[[], set[Any]]] = {
    "descriptors": _descriptors,
    "threads": _threads,
    "child processes": _children,
    "names in /dev/shm": _shared_names,
}


@pytest.fixture(scope="module", autouse=True)
def short_collections() -> None:
    """What is alive before a module's own fixtures (imported modules, the tests themselves) is so to the end: no
    collection has to look at it again. Each would take some 100 ms, and tests ask for hundreds."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Fails a test that leaves something behind."""
    before = {what: look() for what, look in _WATCHED.items()}
    yield
    deadline = time.monotonic() + _SETTLING_S
    pause_s = 0.001  # most of what is still there is a thread on its last lines
    while True:
        left = {what: look() - before[what] for what, look in _WATCHED.items()}
        left = {what: things for what, things in left.items() if things}
        if not left:
            return
        if time.monotonic() > deadline:
            break
        gc.collect()
        time.sleep(pause_s)
        pause_s = min(pause_s * 2, 0.02)
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


_WHY_NOT = {
    "tcp6": _why_no_tcp6(),
    "vsock": _why_no_vsock(),
    "shm-mixed": None if fastsplit.native else "the compiled core is not in use here",
}
SOCKET_LINKS = ("unix", "unix-python", "tcp4", "tcp6", "vsock")
"""unix-python: without the fast path on either side."""
RING_LINKS = ("shm", "shm-named", "shm-mixed", "shm-weak")
"""Shared memory with control in a ring: memfd segments; named ones; memfd ones between a client with the compiled core
and a server without; memfd ones without it on either side, as on a weakly ordered processor."""
LINKS = (*SOCKET_LINKS, *RING_LINKS, "shm-socket")
"""The last one shares memory, but control goes over the socket, as between two kinds of libc."""
SHM_PREFIX = f"/dev/shm/fastsplit-test-{os.getpid()}"


@pytest.fixture
def socket_dir() -> Iterator[Path]:
    """A directory with a short name: a unix socket's path has 107 bytes at most."""
    path = Path(tempfile.mkdtemp(prefix="fs-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def unix_uri(socket_dir: Path) -> str:
    return f"unix://{socket_dir}/s"


def _without_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (channel, replies):
        monkeypatch.setattr(module, "add_fast_path", lambda *_, **__: None)


@pytest.fixture
def without_fast_path(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on no connection of the blocking front gets a fast path."""
    return functools.partial(_without_fast_path, monkeypatch)


def _uri(link: str, socket_dir: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if link == "shm-socket":
        monkeypatch.setattr(sharing, "semaphores", lambda: "")
    elif link == "shm-mixed":
        compiled = ring.Slots
        monkeypatch.setattr(
            ring,
            "Slots",
            lambda memory, *, is_client: (compiled if is_client else slots.Slots)(memory, is_client=is_client),
        )
    elif link == "unix-python":
        _without_fast_path(monkeypatch)
    elif link == "shm-weak":
        monkeypatch.setattr(ring, "Slots", slots.Slots)
        monkeypatch.setattr(slots, "_STRONGLY_ORDERED", False)
    return {
        "unix": f"unix://{socket_dir}/s?shm=off",
        "unix-python": f"unix://{socket_dir}/s?shm=off",
        "shm": f"unix://{socket_dir}/s",
        "shm-named": f"tcp://127.0.0.1:0?shm={SHM_PREFIX}",
        "shm-mixed": f"unix://{socket_dir}/s",
        "shm-weak": f"unix://{socket_dir}/s",
        "shm-socket": f"unix://{socket_dir}/s",
        "tcp4": "tcp://127.0.0.1:0",
        "tcp6": "tcp://[::1]:0",
        "vsock": f"vsock://1:{_VSOCK_ANY_PORT}",
    }[link]


def _link(link: str) -> Any:
    reason = _WHY_NOT.get(link)
    return pytest.param(link, marks=[pytest.mark.matrix, *([] if reason is None else [pytest.mark.skip(reason)])])


@pytest.fixture(params=map(_link, LINKS))
def link(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def uri(link: str, socket_dir: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where to listen, once for each link. A server's own `uri` says where it really is."""
    return _uri(link, socket_dir, monkeypatch)


@pytest.fixture(params=map(_link, ("unix", "unix-python", "tcp4", "shm")))
def socket_uri(request: pytest.FixtureRequest, socket_dir: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same for tests of what happens above the link: two kinds of kernel sockets that differ, one of them without
    the fast path, too, and a ring."""
    return _uri(request.param, socket_dir, monkeypatch)


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.matrix) for name in ("blocking", "aio")])
def front(request: pytest.FixtureRequest) -> Iterator[Front]:
    """The blocking front and the one for asyncio: `front.Server(...)` and `front.connect(...)`, used alike."""
    front = Front(request.param)
    yield front
    front.close()


@pytest.fixture
def sigint() -> Iterator[None]:
    """SIGINT is KeyboardInterrupt in this test, and ends the processes that it starts: a test run that is started with
    SIGINT ignored (nohup, a shell's background job) hands that on to its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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

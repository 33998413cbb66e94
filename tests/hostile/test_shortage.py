"""A side that has run out of something (descriptors, memory, threads) says so itself, at once, and names the limit; the
other side is told. It is never called the peer's fault.
"""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import re
import resource
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aio_front import Front
from conftest import SHM_PREFIX
from raw_peer import (
    ABORT,
    ATTACHED,
    FLOAT32,
    HELLO,
    REPLY,
    REQUEST,
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
from fastsplit.errors import ArenaFull, ClosedError, PeerLostError, RemoteOpError, RemoteProtocolError, ResourceError
from fastsplit.schema.coding import CODECS
from fastsplit.system import shortage
from fastsplit.tensors.pool import Memory, Pool
from fastsplit.wire import codecs as codec
from fastsplit.wire.shm.segment import Memfd, Named

pytestmark = pytest.mark.matrix(one_in=3)

MIB = 1024**2
UINT8 = 2
NOFILE = r"no file descriptor left: RLIMIT_NOFILE is \d+"
AT_ONCE_S = 3.0  # far below every deadline here, of which the shortest is 10 s
SHM_LINKS = ("unix", "named")


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """Until the end of it, this process gets no descriptor."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < AT_ONCE_S


@pytest.fixture(params=SHM_LINKS)
def shm_uri(request: pytest.FixtureRequest, unix_uri: str) -> str:
    return unix_uri if request.param == "unix" else f"{unix_uri}?shm={SHM_PREFIX}"


def _until(there: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 5
    while not there():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.002)


def _logged(caplog: pytest.LogCaptureFixture, text: str) -> bool:
    return any(text in record.getMessage() for record in caplog.records)


# ---- descriptors: connecting -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", ["unix", "tcp"])
def test_a_client_that_cannot_be_accepted_is_told_at_once(
    link: str, unix_uri: str, front: Front, caplog: pytest.LogCaptureFixture
) -> None:
    uri = unix_uri if link == "unix" else "tcp://127.0.0.1:0"
    with front.Server(uri, {"echo": lambda call: call.tensors}) as server:
        with front.connect(server.uri) as before:
            socks = [socket.socket(socket.AF_UNIX if link == "unix" else socket.AF_INET) for _ in range(3)]
            with no_descriptors(), at_once():
                for sock in socks:
                    sock.connect(
                        unix_uri.removeprefix("unix://")
                        if link == "unix"
                        else ("127.0.0.1", int(server.uri[-5:].lstrip(":")))
                    )
                    peer = RawPeer(sock)
                    came = peer.receive()
                    assert came is not None and came.kind == ABORT
                    text = str(came.message.attrs["text"])
                    assert text.startswith("the server accepts no more connections: Too many open files: no file descr")
                    assert f"RLIMIT_NOFILE is {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}" in text
                    assert came.message.attrs["code"] == "shortage"
                    assert peer.receive() is None
                time.sleep(0.1)
                refused = [record for record in caplog.records if "was not accepted" in record.getMessage()]
                assert len(refused) == len(socks)  # and the log does not fill while nobody waits
            for sock in socks:
                sock.close()
            assert before.call("echo", np.ones(3))[0].shape == (3,)
        with front.connect(server.uri) as after:
            assert after.call("echo", np.ones(3))[0].shape == (3,)


@pytest.mark.parametrize("uri", ["unix", "tcp://127.0.0.1:9", "tcp://localhost:9"])
def test_connecting_and_listening_without_a_descriptor(uri: str, unix_uri: str, front: Front) -> None:
    uri = unix_uri if uri == "unix" else uri
    for open_it in (lambda: front.connect(uri), lambda: front.Server(uri, {}).start()):
        with no_descriptors(), at_once(), pytest.raises(ResourceError, match=NOFILE):
            open_it()


def test_a_server_that_gets_only_some_descriptors_leaves_none(unix_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """no_leaks looks."""

    def fail() -> tuple[int, int]:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "pipe", fail)
    server = fastsplit.Server(unix_uri, {})
    with pytest.raises(ResourceError, match=rf"a pipe: Too many open files: {NOFILE}"):
        server.start()
    monkeypatch.undo()
    with fastsplit.Server(unix_uri, {}):  # the address is free
        pass


def test_what_the_refused_client_raises(unix_uri: str, front: Front) -> None:
    def script(peer: RawPeer) -> None:
        peer.send(frame(ABORT, attrs={"text": "no file descriptor left", "code": "shortage"}))
        peer.receive()

    with serving(unix_uri, script) as uri, at_once():
        with pytest.raises(PeerLostError, match=r"^the peer ended the connection: no file descriptor left$"):
            front.connect(uri)


# ---- descriptors: segments -------------------------------------------------------------------------------------------


def test_a_ring_that_cannot_be_taken_leaves_the_socket(unix_uri: str, front: Front) -> None:
    with front.Server(unix_uri, {"echo": lambda call: call.tensors}) as server:
        with connected(server.uri) as peer, memfd(RawRing.NBYTES) as fd:
            peer.send(shm_hello())
            peer.expect(HELLO)
            with no_descriptors():
                peer.announce(0, RawRing.NBYTES, fd)
                text = str(peer.expect(ATTACHED).message.attrs["text"])
            assert text.startswith(
                "the server cannot map the ring: a descriptor that came cannot be taken: no file descr"
            )
            peer.send(frame(REQUEST, 1, "echo", [(FLOAT32, (1,))], {}, b"1234"))
            assert peer.expect(REPLY).message.tensors[0].shape == (1,)


@pytest.mark.parametrize("ring", [False, True])
def test_a_segment_that_the_server_cannot_take(
    unix_uri: str, front: Front, ring: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with front.Server(unix_uri, {}) as server:
        with connected(server.uri) as peer, memfd(MIB) as fd:
            peer.greet_shm(is_client=True, ring=ring)
            with no_descriptors(), at_once():
                peer.announce(1, MIB, fd)
                came = peer.receive()
            assert came is not None and came.kind == ABORT and came.message.attrs["code"] == "shortage"
            reason = str(came.message.attrs["text"])
            assert reason.startswith(
                "a descriptor that came cannot be taken: no file descriptor left: RLIMIT_NOFILE is"
            )
        _until(lambda: _logged(caplog, reason))


@pytest.mark.parametrize("ring", [False, True])
def test_a_segment_that_the_client_cannot_take(unix_uri: str, front: Front, ring: bool) -> None:
    told: list[Any] = []
    limited = threading.Event()

    def script(peer: RawPeer) -> None:
        with memfd(MIB) as fd:
            peer.greet_shm(is_client=False, ring=ring)
            peer.expect(REQUEST)
            assert limited.wait(5)
            peer.announce(2, MIB, fd)
            peer.send(frame(REPLY, 1, "", [(UINT8, (MIB,))], placements=(2, 0, MIB)))
            told.append(peer.receive())

    with serving(unix_uri, script) as uri:
        with front.connect(uri) as channel:
            future = channel.submit("get")
            with no_descriptors(), at_once():
                limited.set()
                with pytest.raises(ResourceError, match=f"^a descriptor that came cannot be taken: {NOFILE}"):
                    future.result()
                _until(lambda: told)
            with pytest.raises(ClosedError, match="a descriptor that came cannot be taken"):
                channel.call("get")
    assert told[0].kind == ABORT and told[0].message.attrs["code"] == "shortage"
    assert "RLIMIT_NOFILE" in told[0].message.attrs["text"]


def test_too_many_descriptors_are_still_the_peers_fault(unix_uri: str, front: Front) -> None:
    with front.Server(unix_uri, {}) as server:
        with connected(server.uri) as peer, memfd(MIB) as fd:
            peer.greet_shm(is_client=True, ring=False)
            peer.send_fds(segment(1, MIB), *[fd] * 5)
            assert peer.expect_abort() == "descriptors: more than 4 in one message, expected one"


def test_named_segments_without_a_descriptor() -> None:
    """Opening one takes a descriptor, and so does mapping it (mmap keeps one of its own before Python 3.13)."""
    made = Named(SHM_PREFIX, "0" * 16, "1" * 16)
    taker = Named(SHM_PREFIX, "1" * 16, "0" * 16)
    memory, _, name = made.create(MIB)
    with no_descriptors(), pytest.raises(OSError, match="Too many open files"):
        taker.attach(None, name, MIB)
    taker.attach(None, name, MIB)[0] = 1
    assert memory[0] == 1
    made.close()


def test_shared_memory_that_cannot_be_made_for_a_request(shm_uri: str, front: Front) -> None:
    """At once, although there is a segment already, of which something might come back; then the connection goes on."""
    with front.Server(shm_uri, {"echo": lambda call: call.tensors}) as server:
        with front.connect(server.uri, arrays="numpy") as channel:
            kept = channel.call("echo", np.ones(MIB // 2, np.uint8))
            factory = channel._connection.arena.factory
            if isinstance(factory, Named):
                factory._settle()  # else the descriptor of the name that was taken is one that can be had again
            with no_descriptors(), at_once(), pytest.raises(ArenaFull, match=f"no shared memory .*: {NOFILE}"):
                channel.call("echo", np.ones(8 * MIB, np.uint8))
            with no_descriptors(), at_once(), pytest.raises(ArenaFull, match=NOFILE):
                channel.empty(8 * MIB, "uint8")
            assert channel.call("echo", np.ones(8 * MIB, np.uint8))[0].nbytes == 8 * MIB
            assert kept[0].all()


@pytest.mark.parametrize("is_coroutine", [False, True])
def test_shared_memory_that_cannot_be_made_for_a_reply(shm_uri: str, front: Front, is_coroutine: bool) -> None:
    limit = contextlib.ExitStack()

    def large(call: Any) -> Any:
        result = np.ones(8 * MIB, np.uint8)
        if call.attrs["limited"]:
            limit.enter_context(no_descriptors())
        return result

    async def later(call: Any) -> Any:
        return large(call)

    with front.Server(shm_uri, {"get": later if is_coroutine and front.name == "aio" else large}) as server:
        with front.connect(server.uri) as channel:
            with at_once(), pytest.raises(RemoteOpError, match=f"get: ArenaFull: no shared memory .*: {NOFILE}"):
                channel.call("get", limited=1)
            limit.close()
            assert channel.call("get", limited=0)[0].nbytes == 8 * MIB


def test_descriptors_under_way(unix_uri: str, front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel says of a user who sends more of them than are taken."""
    with front.Server(unix_uri, {"echo": lambda call: call.tensors}) as server:
        with front.connect(server.uri) as channel:
            socks = channel._connection.transport.link
            real = socks._sock

            class Full:
                def sendmsg(self, buffers: Any, ancillary: Any = (), *flags: Any) -> int:
                    if ancillary:
                        raise OSError(109, "Too many references: cannot splice")
                    return real.sendmsg(buffers, ancillary, *flags)

                def __getattr__(self, name: str) -> Any:
                    return getattr(real, name)

            socks._sock = Full()
            with (
                at_once(),
                pytest.raises((ResourceError, ClosedError), match=f"a descriptor cannot be sent: .*{NOFILE}"),
            ):
                channel.call("echo", np.ones(MIB, np.uint8))


# ---- threads ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    yield
    monkeypatch.undo()


NO_THREAD = "no thread left: can't start new thread: RLIMIT_NPROC is "


def test_a_channel_that_gets_no_threads(unix_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with fastsplit.Server(f"{unix_uri}?shm=off", {"echo": lambda call: call.tensors}) as server:
        start = threading.Thread.start
        ours = {"fastsplit-serve"}

        def fail(thread: threading.Thread) -> None:
            if thread.name.split()[0] not in ours:
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", fail)
        for let in ((), ("fastsplit-watch",)):
            ours.update(let)
            with pytest.raises(ResourceError, match=NO_THREAD):
                fastsplit.connect(server.uri, overlap=True)
        with fastsplit.connect(server.uri, arrays="numpy") as channel:  # the server reads nothing ahead, then
            futures = [channel.submit("echo", np.full(MIB, value, np.uint8)) for value in range(6)]
            assert [future.result()[0][0] for future in futures] == list(range(6))


def test_a_server_that_gets_no_thread(unix_uri: str, no_threads: None) -> None:
    with pytest.raises(ResourceError, match=NO_THREAD):
        fastsplit.Server(unix_uri, {}).start()


def test_a_pool_of_workers_that_gets_no_thread(unix_uri: str, front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def fail(thread: threading.Thread) -> None:
        if thread.name == "fastsplit-worker 1":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fail)
    with pytest.raises(ResourceError, match=NO_THREAD), front.Server(unix_uri, {}, workers=2):
        pass


# ---- memory ----------------------------------------------------------------------------------------------------------


class SmallPool(Pool):
    """Has no large blocks."""

    def allocate(self, nbytes: int) -> Memory:
        if nbytes > 2 * MIB:
            raise ArenaFull(f"no memory for a tensor of {nbytes} bytes: Cannot allocate memory")
        return super().allocate(nbytes)


class Broken(Pool):
    """As whoever raises what Python does."""

    def allocate(self, nbytes: int) -> Memory:
        if nbytes > 2 * MIB:
            raise MemoryError
        return super().allocate(nbytes)


def _uri(link: str, unix_uri: str) -> str:
    return {"unix": f"{unix_uri}?shm=off", "tcp": "tcp://127.0.0.1:0"}[link]


@pytest.mark.parametrize("link", ["unix", "tcp"])
@pytest.mark.parametrize("made", [SmallPool, Broken])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_request_that_the_server_has_no_memory_for(
    unix_uri: str, front: Front, link: str, made: type[Pool], workers: int
) -> None:
    """Its bytes are read and dropped, it gets its answer, others theirs, and the connection lives on."""
    handlers = {"echo": lambda call: call.tensors}
    with front.Server(_uri(link, unix_uri), handlers, pool=made(), workers=workers) as server:
        with front.connect(server.uri, arrays="numpy") as channel:
            large, small = np.ones(8 * MIB, np.uint8), np.arange(1000)
            for _ in range(2):
                futures = [channel.submit("echo", tensor) for tensor in (small, large, small)]
                with pytest.raises(RemoteOpError, match=r"^echo: ArenaFull: no memory for a tensor"):
                    futures[1].result()
                for future in (futures[0], futures[2]):
                    assert np.array_equal(future.result()[0], small)


@pytest.mark.parametrize("link", ["unix", "tcp"])
@pytest.mark.parametrize("made", [SmallPool, Broken])
def test_a_reply_that_the_client_has_no_memory_for(unix_uri: str, front: Front, link: str, made: type[Pool]) -> None:
    handlers = {"get": lambda call: np.ones(call.attrs["n"], np.uint8)}
    with front.Server(_uri(link, unix_uri), handlers) as server:
        with front.connect(server.uri, pool=made()) as channel:
            futures = [channel.submit("get", n=n) for n in (MIB, 8 * MIB, MIB)]
            with pytest.raises(ArenaFull, match="no memory for a tensor"):
                futures[1].result()
            assert [futures[index].result()[0].nbytes for index in (0, 2)] == [MIB, MIB]
            assert channel.call("get", n=5)[0].nbytes == 5


@pytest.mark.parametrize("name", codec.installed())
@pytest.mark.parametrize("side", ["request", "reply"])
def test_a_tensor_that_there_is_no_memory_to_unpack(unix_uri: str, front: Front, name: str, side: str) -> None:
    """What came fits, what it is does not."""
    data = np.random.default_rng(0).integers(0, 2, 8 * MIB, np.uint8)
    options = {"codec": name, "arrays": "numpy"}
    with front.Server(
        f"{unix_uri}?shm=off",
        {"echo": lambda call: call.tensors, "get": lambda call: data},
        **{"pool": SmallPool()} if side == "request" else {},
    ) as server:
        with front.connect(server.uri, **options, **{"pool": SmallPool()} if side == "reply" else {}) as channel:
            if name == "zlib" and side == "request":
                channel._connection.coder._allocate = Pool().allocate
            if side == "request":
                with pytest.raises(RemoteOpError, match=r"^echo: ArenaFull: no memory for a tensor"):
                    channel.call("echo", data)
            else:
                with pytest.raises(ArenaFull, match="no memory for a tensor"):
                    channel.call("get")
            assert channel.call("echo", np.ones(5))[0].shape == (5,)


def _packed(name: str) -> tuple[memoryview, memoryview]:
    data = np.random.default_rng(0).integers(0, 2, 4 * MIB, np.uint8)
    packed = codec.compress(CODECS[name], data.data, 1, Pool().allocate)
    assert packed is not None
    return memoryview(bytes(packed)), memoryview(bytearray(4 * MIB))


@pytest.mark.parametrize("name", codec.installed())
def test_a_codec_without_memory_is_not_corrupt_data(name: str) -> None:
    """In a child, whose memory is limited and used up to the last page."""
    packed, out = _packed(name)
    codec.decompress(CODECS[name], packed, out, 1)
    gc.collect()
    pid = os.fork()
    if pid == 0:
        code = 3
        try:
            codec._local.__dict__.clear()  # or the thread's own context needs no more
            with open("/proc/self/statm") as file:
                used = int(file.read().split()[0]) * mmap.PAGESIZE
            resource.setrlimit(resource.RLIMIT_AS, (used, resource.RLIM_INFINITY))
            kept: list[Any] = []
            for size in (MIB, 64 * 1024, 4096):
                with contextlib.suppress(MemoryError):
                    while True:
                        kept.append(bytearray(size))
            try:
                codec.decompress(CODECS[name], packed, out, 1)
            except MemoryError:  # an ArenaFull, if there was memory to say so
                code = 0
            except RemoteProtocolError:
                code = 1
            else:
                code = 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize("name", codec.installed())
def test_corrupt_data_is_still_the_peers_fault(name: str) -> None:
    packed, out = _packed(name)
    broken = bytearray(packed)
    broken[len(broken) // 2 :] = bytes(len(broken) - len(broken) // 2)
    with pytest.raises(RemoteProtocolError, match=f"compressed tensor, {name}"):
        codec.decompress(CODECS[name], memoryview(broken), out, 1)


@pytest.mark.skipif("blosc2" not in codec.installed(), reason="no blosc2")
@pytest.mark.parametrize("block_nbytes", [-1, -(2**31), 2**31 - 1])
def test_blocks_of_a_size_that_the_peer_made_up(block_nbytes: int) -> None:
    """A chunk of zeros has no blocks. To see whether memory is short, no more is tried out than the tensor needs."""
    packed = codec.compress(CODECS["blosc2"], memoryview(bytes(4 * MIB)), 1, Pool().allocate)
    assert packed is not None and packed.nbytes == 32
    broken = bytearray(packed)
    struct.pack_into("<i", broken, 8, block_nbytes)
    with contextlib.suppress(RemoteProtocolError):
        codec.decompress(CODECS["blosc2"], memoryview(broken), memoryview(bytearray(4 * MIB)), 1)


def test_words_of_libraries_that_have_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, out = _packed("zlib")

    def fail(*_: object) -> None:
        raise zlib.error("Error -4 while decompressing data")

    monkeypatch.setitem(codec.ROWS, "zlib", codec.ROWS["zlib"]._replace(decompress=fail))
    with pytest.raises(
        ArenaFull, match=f"^no memory to unpack a tensor of {4 * MIB} bytes, zlib: Cannot allocate memory"
    ):
        codec.decompress(CODECS["zlib"], packed, out, 1)


def test_no_memory_for_a_frame_at_all(unix_uri: str, front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whatever else in reading: then the connection cannot go on, and both sides know why."""
    with front.Server(f"{unix_uri}?shm=off", {}) as server:
        with connected(server.uri) as peer:
            peer.greet()

            def fail(*_: object) -> None:
                raise MemoryError("none")

            monkeypatch.setattr("fastsplit.wire.session.Decoder.decode", fail)
            peer.send(frame(REQUEST, 1, "echo"))
            monkeypatch.setattr("fastsplit.schema.decoder.Decoder.decode", fail)
            head = peer.sock.recv(4096)
            monkeypatch.undo()
            assert b"no memory to read a frame: none" in head and b"shortage" in head


def test_a_segment_that_there_is_no_memory_to_map(
    shm_uri: str, front: Front, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> Any:
        raise OSError(12, "Cannot allocate memory")

    wrong = "a segment of 1048576 bytes of the peer's cannot be mapped: Cannot allocate memory"
    handlers = {"get": lambda call: np.ones(MIB, np.uint8)}
    for side in ("request", "reply"):
        with front.Server(shm_uri, handlers) as server, front.connect(server.uri) as channel:
            with monkeypatch.context() as patch, at_once():
                patch.setattr("fastsplit.wire.shm.segment._map_checked", fail)
                if side == "reply":
                    with pytest.raises(ResourceError, match=f"^{wrong}"):
                        channel.call("get")
                    _until(lambda: _logged(caplog, f"the peer ended the connection: {wrong}"))
                else:
                    with pytest.raises(PeerLostError, match=f"^the peer ended the connection: {wrong}"):
                        channel.call("get", np.ones(MIB, np.uint8))
                    _until(lambda: _logged(caplog, f"a connection ended: {wrong}"))


# ---- shared memory that is full --------------------------------------------------------------------------------------


def test_a_full_file_system_says_so(socket_dir: Path) -> None:
    program = (
        "from fastsplit.wire.shm.segment import Named\n"
        "from fastsplit.errors import ArenaFull\n"
        "try:\n"
        "    Named('/dev/shm/fastsplit-full', '0' * 16, '1' * 16).create(4 * 1024**2)\n"
        "except ArenaFull as full:\n"
        "    print(full)\n"
    )
    (socket_dir / "program.py").write_text(program)
    mount = "mount -t tmpfs -o size=2m fastsplit /dev/shm || exit 77"
    run = subprocess.run(
        ["unshare", "-m", "sh", "-c", f"{mount}; exec {sys.executable} {socket_dir}/program.py"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(fastsplit.__file__).parents[1])},
    )
    if run.returncode in (77, 1) and "ermi" in run.stderr:
        pytest.skip(f"a file system cannot be mounted here: {run.stderr.strip()}")
    expected = (
        rf"no shared memory for a segment of {4 * MIB} bytes: No space left on device: "
        rf"/dev/shm is full: \d+ of its {2 * MIB} bytes are free\n"
    )
    assert re.fullmatch(expected, run.stdout), run.stderr


@pytest.mark.parametrize("kind", ["memfd", "named"])
def test_pages_that_cannot_be_filled(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel calls a bad address is a lack of memory."""

    def fail(*_: object) -> None:
        raise OSError(14, "Bad address")

    monkeypatch.setattr("fastsplit.wire.shm.segment._populate", fail)
    factory = Memfd() if kind == "memfd" else Named(SHM_PREFIX, "0" * 16, "1" * 16)
    with pytest.raises(
        ArenaFull, match=f"^no shared memory for a segment of {MIB} bytes: No space left on device: "
    ) as caught:
        factory.create(MIB)
    assert ("/dev/shm is full: " if kind == "named" else "the system has no memory left") in str(caught.value)
    factory.close()


# ---- how it is said --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (24, r"^Too many open files: no file descriptor left: RLIMIT_NOFILE is \d+ \(ulimit -n\)$"),
        (23, r"^Too many open files in system: the system has no file descriptor left: fs.file-max is \d+$"),
        (12, "^Cannot allocate memory$"),
        (109, "^Too many references: cannot splice: too many descriptors under way: no file descriptor left: "),
    ],
)
def test_limits_are_named(code: int, text: str) -> None:
    with pytest.raises(ResourceError, match=text):
        raise ResourceError(shortage.shortage(OSError(code, os.strerror(code))))


def test_what_is_no_shortage() -> None:
    for error in (OSError(2, "No such file"), socket.gaierror(-2, "Name or service not known")):
        assert shortage.shortage(error) is None

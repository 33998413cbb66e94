"""One suite over every link and both fronts, through the public names alone: the same call works, and costs the same.

Byte counts are exact. Over sockets a frame is a 40-byte header, its metadata and its payload; the metadata of a message
is a multiple of 8 bytes and the same for every message of one shape, so what a second call of the same shape costs is
known from the first one's counts. Where memory is shared no tensor's byte goes through a socket: what does not lie in
shared memory is copied into it, once, and what does is not copied at all. With control in a ring the sockets carry at
most a byte a call each way, to wake a sleeper.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from aio_front import Front
from conftest import SHM_PREFIX

import fastsplit

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.matrix(one_in=2)

HEADER_NBYTES = 40
MAX_WAKES = 2  # bytes that a call may send through the socket beside a ring: for its frame, and for room in the ring


def _scale(call: fastsplit.Call) -> Any:
    tensor = call.tensors[0]
    tensor *= call.attrs["by"]
    return tensor


def _echo(call: fastsplit.Call) -> Any:
    call.reply_attrs.update(call.attrs)
    return call.tensors


def _fresh(call: fastsplit.Call) -> Any:
    out = call.empty(call.attrs["shape"], call.attrs["dtype"])
    out[...] = 7
    return out


def _fail(call: fastsplit.Call) -> Any:
    raise KeyError(call.attrs["what"])


def _nothing(call: fastsplit.Call) -> None:
    return None


def _slow(call: fastsplit.Call) -> Any:
    time.sleep(call.attrs["seconds"])
    return call.tensors


def _held(call: fastsplit.Call) -> Any:
    assert _let_go.wait(20)
    return call.tensors


_let_go = threading.Event()
HANDLERS = {
    "scale": _scale,
    "echo": _echo,
    "fresh": _fresh,
    "fail": _fail,
    "nothing": _nothing,
    "slow": _slow,
    "held": _held,
}


@pytest.fixture
def server(uri: str, front: Front) -> Iterator[fastsplit.Server]:
    with front.Server(uri, HANDLERS) as server:
        yield server


@pytest.fixture(params=["torch", "numpy"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def channel(server: fastsplit.Server, kind: str, front: Front) -> Iterator[fastsplit.Channel]:
    with front.connect(server.uri, arrays=kind, call_timeout_s=30) as channel:
        yield channel


def _make(kind: str, values: Any) -> Any:
    return torch.from_numpy(values) if kind == "torch" else values


def _address(tensor: Any) -> int:
    return int(tensor.data_ptr() if isinstance(tensor, torch.Tensor) else tensor.ctypes.data)


def _in_ring(channel: fastsplit.Channel) -> bool:
    return "control in a ring" in channel.shm_reason


def _copied(channel: fastsplit.Channel, *tensors: Any) -> int:
    """What sending contiguous tensors that are not in shared memory copies."""
    return sum(int(tensor.nbytes) for tensor in tensors) if channel.shm else 0


def _counts(channel: fastsplit.Channel) -> tuple[int, int, int]:
    stats = channel.stats
    return stats.bytes_sent, stats.bytes_received, stats.bytes_copied


def _cost(channel: fastsplit.Channel, call: Callable[[], Any]) -> tuple[int, int, int]:
    before = _counts(channel)
    call()
    return tuple(after - start for start, after in zip(before, _counts(channel), strict=True))  # type: ignore[return-value]


def test_call(channel: fastsplit.Channel, kind: str) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    (y,) = channel.call("scale", _make(kind, x), by=2.0, timeout_s=5)
    assert isinstance(y, torch.Tensor if kind == "torch" else np.ndarray)
    assert np.array_equal(np.asarray(y), np.arange(6, dtype=np.float32).reshape(2, 3) * 2)


@pytest.mark.matrix(one_in=16)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (5, 7), (300, 500), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "int64", "uint8", "bool", "complex64", "float16"])
def test_round_trip(channel: fastsplit.Channel, kind: str, shape: tuple[int, ...], dtype: str) -> None:
    rng = np.random.default_rng(1)
    x = rng.integers(0, 2 if dtype == "bool" else 100, shape).astype(dtype)
    (y,) = channel.call("echo", _make(kind, x))
    assert tuple(y.shape) == shape
    assert str(y.dtype).removeprefix("torch.") == dtype
    assert np.array_equal(np.asarray(y), x)
    assert channel.stats.bytes_copied == _copied(channel, x)
    assert channel.stats.bytes_shared == 2 * _copied(channel, x)  # there and back


@pytest.mark.matrix(one_in=8)
@pytest.mark.parametrize("nbytes", [1, 63, 64, 513, 3900, 4096, 65536, 65537, 5_000_001])
def test_what_arrives_is_writable_aligned_and_the_callers_own(
    channel: fastsplit.Channel, kind: str, nbytes: int
) -> None:
    x = np.full(nbytes, 3, np.uint8)
    (first,) = channel.call("echo", _make(kind, x))
    assert _address(first) % 64 == 0
    first[...] = 9  # writable
    (second,) = channel.call("echo", _make(kind, x))
    assert bool((second == 3).all())
    assert bool((first == 9).all())  # the second reply did not land in the first one's memory
    assert bool((x == 3).all())


def test_sizes_that_cross_every_buffer(channel: fastsplit.Channel, kind: str) -> None:
    for nbytes in [0, 1, 39, 40, 41, 3000, *range(3900, 4110, 7), 4095, 4096, 4097, 8191, 70_000, 3_000_000]:
        x = np.arange(nbytes, dtype=np.uint32).astype(np.uint8)
        (y,) = channel.call("echo", _make(kind, x))
        assert np.array_equal(np.asarray(y), x), nbytes


def test_contiguous_tensors_are_not_copied_and_every_byte_is_counted(channel: fastsplit.Channel, kind: str) -> None:
    small, large = (_make(kind, np.zeros(n, np.float32)) for n in (1000, 1001))
    if channel.shm:
        for _ in range(2):  # a segment is announced; then the server has something to give back with each reply
            channel.call("echo", small, small)
        heads = _cost(channel, lambda: channel.call("echo", small, small))
        assert heads[2] == 8000 == _copied(channel, small, small)
        if _in_ring(channel):
            assert max(heads[:2]) <= MAX_WAKES
            assert max(_cost(channel, lambda: channel.call("echo", large, large))[:2]) <= MAX_WAKES
            return
        assert min(heads[:2]) > HEADER_NBYTES and heads[0] % 8 == heads[1] % 8 == 0 and max(heads[:2]) < 400
        assert _cost(channel, lambda: channel.call("echo", small, small)) == heads
        assert _cost(channel, lambda: channel.call("echo", large, large)) == (*heads[:2], 8008)
        return
    heads = _cost(channel, lambda: channel.call("echo", small, small))
    assert heads[0] > 8000 + HEADER_NBYTES and (heads[0] - 8000 - HEADER_NBYTES) % 8 == 0
    assert heads[1] > 8000 + HEADER_NBYTES and (heads[1] - 8000 - HEADER_NBYTES) % 8 == 0
    # the same shape costs the same; four bytes more in each tensor cost exactly these, there and back
    assert _cost(channel, lambda: channel.call("echo", small, small)) == heads
    assert _cost(channel, lambda: channel.call("echo", large, large)) == (heads[0] + 8, heads[1] + 8, 0)


def test_what_is_not_contiguous_is_copied_once_and_counted_exactly(channel: fastsplit.Channel, kind: str) -> None:
    base = _make(kind, np.arange(3000, dtype=np.float64).reshape(50, 60))
    whole = base[:, :30] + 0
    heads = _cost(channel, lambda: channel.call("echo", whole))
    assert heads[2] == _copied(channel, whole)
    strided = base[:, ::2]
    cost = _cost(channel, lambda: channel.call("echo", strided))
    assert cost[2] == 50 * 30 * 8
    assert channel.shm or cost[:2] == heads[:2]
    (y,) = channel.call("echo", base.T)
    assert np.array_equal(np.asarray(y), np.asarray(base).T)
    assert channel.stats.bytes_copied == 50 * 30 * 8 + 3000 * 8 + _copied(channel, whole)


def test_attributes_come_back_as_they_went(channel: fastsplit.Channel) -> None:
    attrs = {
        "i": -(2**63),
        "j": 2**63 - 1,
        "f": 0.1,
        "inf": float("-inf"),
        "s": "Ünïcode \0 text",
        "e": "",
        "b": b"\x00\xff",
        "ints": [1, -2, 2**62],
        "names": ["a", "", "ß"],
        "none": [],
    }
    for shift in range(3):  # the later ones go the cached way
        sent = {**attrs, "i": attrs["i"] + shift, "f": 0.1 + shift}
        result = channel.call("echo", **sent)
        assert result == ()
        assert result.attrs == sent
        assert {name: type(value) for name, value in result.attrs.items()} == {n: type(v) for n, v in sent.items()}


def test_many_tensors(channel: fastsplit.Channel, kind: str) -> None:
    tensors = [_make(kind, np.full((n % 5, n), n, np.int16)) for n in range(64)]
    result = channel.call("echo", *tensors)
    assert len(result) == 64
    for sent, came in zip(tensors, result, strict=True):
        assert np.array_equal(np.asarray(sent), np.asarray(came)) and came.shape == sent.shape


def test_empty_on_both_sides(channel: fastsplit.Channel, kind: str) -> None:
    x = channel.empty((3, 5), dtype="float32")
    assert isinstance(x, torch.Tensor if kind == "torch" else np.ndarray)
    assert _address(x) % 64 == 0 and tuple(x.shape) == (3, 5)
    x[...] = 2
    (y,) = channel.call("scale", x, by=3.0)
    assert bool((y == 6).all()) and channel.stats.bytes_copied == 0
    # where memory is shared the handler worked in place, on the caller's own tensor; elsewhere on one of its own
    assert (_address(x) == _address(y)) == channel.shm
    assert bool((x == (6 if channel.shm else 2)).all())
    (z,) = channel.call("fresh", shape=[4, 4], dtype="int32")
    assert bool((z == 7).all()) and tuple(z.shape) == (4, 4) and _address(z) % 64 == 0
    assert channel.stats.bytes_shared == (60 + 60 + 64 if channel.shm else 0)
    assert channel.stats.bytes_copied == 0


def test_a_tensor_goes_back_and_forth_without_a_copy(
    channel: fastsplit.Channel, server: fastsplit.Server, kind: str
) -> None:
    """The server's memory or ours, whole or a part of it: what came is worked on and sent back as it lies."""
    (x,) = channel.call("fresh", shape=[40, 50], dtype="float64")
    before = channel.stats.bytes_sent
    for turn in range(5):
        (y,) = channel.call("scale", x[10:20], by=2.0)
        assert tuple(y.shape) == (10, 50)
        if not channel.shm:
            x[10:20] = y
        assert bool((x[10:20] == 7 * 2 ** (turn + 1)).all()) and bool((x[20:] == 7).all())
    assert channel.stats.bytes_copied == 0 and server.stats.bytes_copied == 0
    if channel.shm:
        assert channel.stats.bytes_shared == server.stats.bytes_shared == 40 * 50 * 8 + 5 * 2 * 10 * 50 * 8
        assert channel.stats.bytes_sent - before < 5 * 400
    else:
        assert channel.stats.bytes_shared == 0 and channel.stats.bytes_sent - before > 5 * 10 * 50 * 8


def test_which_memory_is_shared(channel: fastsplit.Channel, link: str) -> None:
    assert channel.shm == link.startswith("shm")
    assert (
        channel.shm_reason
        == {
            "unix": "off: the client's URI says shm=off",
            "unix-python": "off: the client's URI says shm=off",
            "tcp4": "off: over tcp it must be asked for, with ?shm=/dev/shm/NAME",
            "tcp6": "off: over tcp it must be asked for, with ?shm=/dev/shm/NAME",
            "vsock": "off: the two sides may be on different hosts",
            "shm": "memfd segments, control in a ring",
            "shm-mixed": "memfd segments, control in a ring",
            "shm-weak": "memfd segments, control in a ring",
            "shm-named": f"segments named {SHM_PREFIX}-..., control in a ring",
            "shm-socket": "memfd segments, control over the socket: "
            "semaphores are none that are known and none that are known",
        }[link]
    )


def test_submit_many(channel: fastsplit.Channel, kind: str) -> None:
    futures = [channel.submit("scale", _make(kind, np.full(1000, n, np.float32)), by=2.0) for n in range(50)]
    for n, future in reversed(list(enumerate(futures))):
        (y,) = future.result(timeout=10)
        assert bool((y == 2 * n).all())
    assert channel.stats.calls == 50


def test_no_tensors_at_all(channel: fastsplit.Channel) -> None:
    assert channel.call("nothing") == ()
    assert channel.call("nothing").attrs == {}


def test_a_failing_handler_costs_only_its_call(channel: fastsplit.Channel) -> None:
    with pytest.raises(fastsplit.RemoteOpError, match="fail: KeyError: 'x'") as caught:
        channel.call("fail", what="x")
    assert caught.value.op == "fail" and caught.value.message == "KeyError: 'x'"
    with pytest.raises(fastsplit.RemoteOpError, match="no such operation here; there are: echo, fail, fresh"):
        channel.call("absent")
    assert channel.call("nothing") == ()


def test_a_deadline_costs_only_its_call(channel: fastsplit.Channel) -> None:
    _let_go.clear()
    started = time.monotonic()
    with pytest.raises(fastsplit.DeadlineError, match=r"held: no reply within its deadline of 0\.1 s"):
        channel.call("held", timeout_s=0.1)
    assert time.monotonic() - started < 0.35
    _let_go.set()
    assert channel.call("nothing", timeout_s=5) == ()  # the late reply was read and dropped


def test_stats_of_one_call(channel: fastsplit.Channel, kind: str) -> None:
    channel.call("slow", _make(kind, np.zeros(10, np.float32)), seconds=0.05)
    stats = channel.stats
    assert stats.calls == 1
    assert 0.05 <= stats.remote_s <= stats.wait_s < 5
    assert 0 < stats.serialization_s < 0.05
    assert 0 <= stats.communication_s == stats.wait_s - stats.remote_s
    assert stats.as_dict()["bytes_copied"] == (40 if channel.shm else 0)


def test_many_clients(server: fastsplit.Server, front: Front) -> None:
    failures = []

    def work(number: int) -> None:
        try:
            with front.connect(server.uri, arrays="numpy", call_timeout_s=30) as channel:
                for step in range(20):
                    (y,) = channel.call("scale", np.full(5000, number, np.int64), by=step)
                    assert (y == number * step).all()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_server_gone(channel: fastsplit.Channel, server: fastsplit.Server) -> None:
    assert channel.call("nothing") == ()
    server.close()
    with pytest.raises((fastsplit.PeerLostError, fastsplit.ClosedError)):
        channel.call("nothing")
    assert channel.closed
    with pytest.raises(fastsplit.ClosedError):
        channel.call("nothing")


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.matrix(one_in=2, each=False)
@pytest.mark.parametrize("shm", [False, True], ids=["unix", "shm"])
def test_more_than_two_gibibytes(unix_uri: str, shm: bool) -> None:
    """One read, one write, one length of 32 bits or of int: each would break on this. So would one placement.

    Of the blocking front only: both read and write through the same links, and each time takes seconds and gigabytes.
    """
    nbytes = 2**31 + 12_345
    marks = [0, 1, 2**31 - 1, 2**31, nbytes - 1]

    def check(call: fastsplit.Call) -> Any:
        (x,) = call.tensors
        assert x.shape == (nbytes,) and [int(x[at]) for at in marks] == [1, 2, 3, 4, 5]
        x[marks] = [5, 4, 3, 2, 1]
        return x

    uri = unix_uri if shm else f"{unix_uri}?shm=off"
    with fastsplit.Server(uri, {"check": check}, arrays="numpy") as server:
        with fastsplit.connect(server.uri, arrays="numpy") as channel:
            x = channel.empty(nbytes, "uint8") if shm else np.zeros(nbytes, np.uint8)
            x[marks] = [1, 2, 3, 4, 5]
            (y,) = channel.call("check", x)
            assert [int(y[at]) for at in marks] == [5, 4, 3, 2, 1]
            if shm:
                assert y.ctypes.data == x.ctypes.data and channel.stats.bytes_sent < 4096
            else:
                assert channel.stats.bytes_sent > nbytes and channel.stats.bytes_received > nbytes
            assert channel.stats.bytes_copied == 0
            del x, y
    fastsplit.tensors.pool.pool.trim()

"""Properties of codings: what is coded decodes to what a cast alone would give, and no lie gets past the checks."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest
from amount import times
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastsplit.errors import RemoteProtocolError
from fastsplit.schema.coding import CASTS, CODECS
from fastsplit.schema.descriptor import TensorDesc
from fastsplit.schema.dtypes import BY_CODE
from fastsplit.schema.limits import Limits
from fastsplit.tensors.pool import Pool
from fastsplit.wire import codecs
from fastsplit.wire.compression import Coder
from fastsplit.wire.events import Failed, Request
from fastsplit.wire.rules import CODES
from fastsplit.wire.session import Session

pytestmark = pytest.mark.matrix

modest = settings(max_examples=times(80, 2), deadline=None, suppress_health_check=[HealthCheck.too_slow])
LIMITS = Limits(max_message_nbytes=2**16)
DTYPES = ("float32", "float64", "float16", "int8", "int32", "int64", "bool", "complex64")


def _session(*, is_client: bool, allocate: Any) -> tuple[Session, Coder]:
    coder = Coder(Pool(), 1)
    capabilities = CODES | Coder.capabilities()
    coder.agree(capabilities)
    made = Session(is_client=is_client, allocate=allocate, limits=LIMITS, capabilities=capabilities, codings=coder)
    return made, coder


def _feed(session: Session, data: bytes, cuts: list[int]) -> list[Any]:
    events: list[Any] = []
    turn = at = 0
    while at < len(data):
        target = session.receive_buffers()[0]
        size = min(len(target), cuts[turn % len(cuts)], len(data) - at)
        target[:size] = data[at : at + size]
        events += session.received(size)
        at, turn = at + size, turn + 1
        if events and isinstance(events[-1], Failed):
            break
    return events


@st.composite
def arrays(draw: st.DrawFn) -> Any:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 12), max_size=3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    values = rng.standard_normal(shape) * draw(st.sampled_from([0, 1e-6, 1, 100, 1e9]))
    with np.errstate(invalid="ignore", over="ignore"):
        array = values.astype(dtype)
    return array.T if draw(st.booleans()) else array


@modest
@given(
    st.lists(arrays(), max_size=4),
    st.sampled_from([0, *CASTS.values()]),
    st.sampled_from([0, *(CODECS[name] for name in codecs.installed())]),
    st.lists(st.integers(1, 5000), min_size=1, max_size=5),
)
def test_round_trips(tensors: list[Any], cast: int, codec: int, cuts: list[int]) -> None:
    allocated = 0

    def allocate(nbytes: int) -> Any:
        nonlocal allocated
        allocated += nbytes
        return np.empty(nbytes, np.uint8)

    client, sending = _session(is_client=True, allocate=allocate)
    server, receiving = _session(is_client=False, allocate=allocate)
    _feed(server, bytes(client.hello()), [4096])
    _feed(client, bytes(server.hello()), [4096])
    out = sending.collect("op", tensors, cast, codec, None)
    plain = Coder(Pool()).collect("op", tensors, cast, 0, None)
    raw_nbytes = sum(tensor.nbytes for tensor in tensors)
    assert out.nbytes <= plain.nbytes <= raw_nbytes
    _, head = client.request("op", out.descs, {}, out.nbytes, 0, None, out.placements)
    data = bytes(head) + b"".join(bytes(memoryview(buffer).cast("B")) for buffer in out.buffers)
    (event,) = _feed(server, data, cuts)
    assert isinstance(event, Request)
    assert allocated <= raw_nbytes  # as it came in; what it is decoded to is allocated by the coder
    casts = [placement >> 36 for placement in plain.placements[::3]] or [0] * len(tensors)
    for tensor, buffer, desc, used in zip(tensors, event.buffers, event.message.tensors, casts):
        assert (desc.dtype.name, desc.shape) == (str(tensor.dtype), tensor.shape)
        came = np.frombuffer(bytes(buffer), tensor.dtype).reshape(tensor.shape)
        wanted = tensor
        if used == CASTS["float16"]:
            wanted = tensor.astype(np.float16).astype(np.float32)
        elif used:
            bits = np.ascontiguousarray(tensor).view(np.uint32).astype(np.uint64) if tensor.size else tensor
            bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
            wanted = bits.astype(np.uint32).view(np.float32).reshape(tensor.shape)
        assert came.tobytes() == np.ascontiguousarray(wanted).tobytes()
    assert {name: counted.wire_nbytes for name, counted in receiving.stats.items()} == {
        name: counted.wire_nbytes for name, counted in sending.stats.items() if counted.wire_nbytes
    }


@modest
@given(st.sampled_from(codecs.installed()), st.integers(2, 2000), st.binary(max_size=400), st.integers(0, 400))
def test_arbitrary_compressed_bytes(name: str, size: int, data: bytes, flip: int) -> None:
    """They unpack to what is expected, or are our own error: in damaged streams, and in any bytes at all."""
    source = memoryview(bytes(size))
    packed = codecs.compress(CODECS[name], source, 1, lambda nbytes: np.empty(nbytes, np.uint8))
    damaged = bytearray(packed or b"")
    if damaged:
        damaged[flip % len(damaged)] ^= 1 + flip % 255
    coder = Coder(Pool())
    coder.agree(CODES | Coder.capabilities())
    (uint8,) = (row for row in BY_CODE.values() if row.name == "uint8")
    for bad in (data, bytes(damaged), zlib.compress(data)):
        if 0 < len(bad) < size:
            try:
                memory = coder.decode(CODECS[name], np.frombuffer(bad, np.uint8).copy(), TensorDesc.of(uint8, (size,)))
            except RemoteProtocolError:
                continue
            assert memory.nbytes == size


def test_a_cast_of_nothing_is_none() -> None:
    coder = Coder(Pool(), 1)
    coder.agree(CODES | Coder.capabilities())
    out = coder.collect("op", [np.zeros((0, 3), np.float32)], CASTS["bfloat16"], CODECS["zlib"], None)
    assert (out.buffers, out.placements, out.nbytes) == ([], (), 0)
    with pytest.raises(RemoteProtocolError):
        coder.decode(CODECS["zlib"], np.zeros(3, np.uint8), TensorDesc.of(BY_CODE[12], (1,)))

"""Tensors that travel in fewer bytes: casts, compression, and when which of it happens."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from aio_front import Front
from raw_peer import FLOAT32, HELLO, REPLY, REQUEST, RawPeer, connected, frame, hello, serving

import fastsplit
from fastsplit.errors import RemoteOpError, SettingError
from fastsplit.schema.coding import CASTS, CODECS, cast_bit, codec_bit
from fastsplit.tensors import collect_cast, widen
from fastsplit.tensors.pool import Pool
from fastsplit.wire import codecs
from fastsplit.wire import compression as coder
from fastsplit.wire.compression import Coder
from fastsplit.wire.rules import CODES
from fastsplit.wire.transport.meter import Meter

torch = pytest.importorskip("torch")

Serve = Callable[..., fastsplit.Server]
Connect = Callable[..., fastsplit.Channel]
BF16, FP16 = CASTS["bfloat16"], CASTS["float16"]
TCP = "tcp://127.0.0.1:0"


def _allocate(nbytes: int) -> Any:
    return np.empty(nbytes, np.uint8)


@pytest.fixture(autouse=True)
def small_tensors_are_cast_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coder, "MIN_CAST_NBYTES", 0)


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")


def _numbers(size: int = 100_003) -> Any:
    """Float32 bits of all kinds, finite."""
    bits = np.random.default_rng(7).integers(0, 2**32, size, np.uint32)
    bits[: 2**16] = np.arange(2**16, dtype=np.uint32) << 15 | 0x20000000  # ties, both ways
    bits[(bits & 0x7F800000) == 0x7F800000] &= np.uint32(0x807FFFFF)
    bits[:8] = [0, 0x80000000, 1, 0x80000001, 0x007FFFFF, 0x7F7F0000, 0xFF7F0000, 0x3F808000]
    return bits.view(np.float32)


def _small_numbers(size: int = 100_003) -> Any:
    """What float16 can hold: its subnormals, ties, its largest number, and what is rounded to that."""
    rng = np.random.default_rng(8)
    values = (rng.standard_normal(size) * 2.0 ** rng.integers(-30, 13, size)).astype(np.float32)
    values[:6] = [0.0, -0.0, 65504.0, -65519.99, 2.0**-24, 2.0**-25]
    values[6:70] = 1 + np.arange(64, dtype=np.float32) * 2.0**-11
    return values


VARIANTS: dict[str, Callable[[Any], Any]] = {
    "flat": lambda x: x,
    "matrix": lambda x: x[:99_000].reshape(300, 330),
    "transposed": lambda x: x[:99_000].reshape(300, 330).T,
    "strided": lambda x: x[::3],
    "permuted": lambda x: x[:99_000].reshape(3, 1000, 33).transpose(1, 2, 0) if isinstance(x, np.ndarray) else x,
    "scalar": lambda x: x[7].reshape(()),
    "empty": lambda x: x[:0].reshape(0, 3),
}


def _sent(value: Any, cast: int) -> tuple[Any, int]:
    """What is sent of a tensor, and as what."""
    found = collect_cast([value], cast, _allocate)
    assert found.descs == [(FLOAT32, tuple(value.shape))]
    return found.buffers[0], found.casts[0]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("kind", ["torch", "numpy", "numpy big-endian", "torch with a gradient"])
@pytest.mark.matrix
def test_a_cast_rounds_as_torch_does(kind: str, cast: str, variant: str) -> None:
    numbers = (_numbers if cast == "bfloat16" else _small_numbers)()
    value = VARIANTS[variant](torch.from_numpy(numbers) if kind.startswith("torch") else numbers)
    wanted = (
        torch.from_numpy(np.array(np.asarray(value))).to(getattr(torch, cast)).contiguous().view(torch.int16).numpy()
    )
    if kind == "numpy big-endian":
        value = value.astype(">f4")
    elif kind == "torch with a gradient":
        value = value.detach().requires_grad_()
    data, used = _sent(value, CASTS[cast])
    assert used == (CASTS[cast] if data.nbytes else 0)
    assert data.nbytes == 2 * wanted.size
    assert np.array_equal(data.view(np.int16), wanted.reshape(-1))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cast", CASTS)
def test_without_torch_the_bits_are_the_same(cast: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value = VARIANTS[variant]((_numbers if cast == "bfloat16" else _small_numbers)())
    data, used = _sent(value, CASTS[cast])
    wide = np.empty(value.nbytes, np.uint8)
    if used:
        widen(data, used, wide)
    monkeypatch.delitem(sys.modules, "torch")
    bare, also_used = _sent(value, CASTS[cast])
    assert (used, data.tobytes()) == (also_used, bare.tobytes())
    if used:
        bare_wide = np.empty(value.nbytes, np.uint8)
        widen(bare, used, bare_wide)
        assert wide.tobytes() == bare_wide.tobytes()
        back = torch.from_numpy(np.array(value)).to(getattr(torch, cast)).float().numpy()
        assert np.array_equal(wide.view(np.float32), back.reshape(-1))


@pytest.mark.parametrize("has_torch", [True, False])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf, 65520.0, -7e4, 3e38])
def test_what_float16_cannot_hold_goes_as_bfloat16(
    value: float, has_torch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = np.ones(1000, np.float32)
    numbers[777] = value
    source = torch.from_numpy(numbers) if has_torch else numbers
    if not has_torch:
        monkeypatch.delitem(sys.modules, "torch")
    found = collect_cast([np.ones(3, np.float32), source, np.zeros((0,), np.float32)], FP16, _allocate)
    assert (found.casts, found.too_large) == ([FP16, BF16, 0], 1)
    wide = np.empty(4000, np.uint8)
    widen(found.buffers[1], BF16, wide)
    came = wide.view(np.float32)[777]
    assert np.isnan(came) if np.isnan(value) else np.isinf(came) == np.isinf(value)
    assert np.sign(came) == np.sign(np.float32(value)) or np.isnan(value)


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FBFFFFF, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000])
def test_no_nan_becomes_an_infinity(bits: int, without_torch: None) -> None:
    data, used = _sent(np.full(5, bits, np.uint32).view(np.float32), BF16)
    wide = np.empty(20, np.uint8)
    widen(data, used, wide)
    assert np.isnan(wide.view(np.float32)).all()


@pytest.mark.parametrize("dtype", ["int32", "float64", "float16", "uint8", "bool", "complex64"])
def test_other_dtypes_are_not_cast(dtype: str) -> None:
    for value in (np.ones((3, 4), dtype), torch.ones(3, 4, dtype=getattr(torch, dtype))):
        found = collect_cast([value], BF16, _allocate)
        assert (found.casts, found.buffers[0].nbytes) == ([0], value.nbytes)


def test_others_have_no_buffer_of_their_own() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for value in (torch.ones(3, dtype=torch.bfloat16), np.ones(3, ml_dtypes.bfloat16)):
        found = collect_cast([value], FP16, _allocate)
        assert (found.casts, found.buffers[0].nbytes) == ([0], 6)


# ---- on a connection -------------------------------------------------------------------------------------------------


HANDLERS: dict[str, Any] = {"echo": lambda call: call.tensors, "nothing": lambda call: None}


@pytest.fixture
def pair(serve: Serve, front: Front) -> Iterator[Callable[..., tuple[fastsplit.Server, Any]]]:
    """A server, and a channel of either front."""
    with contextlib.ExitStack() as stack:

        def make(uri: str = TCP, server: dict[str, Any] | None = None, **options: Any) -> Any:
            made = serve(uri, HANDLERS, arrays="numpy", **(server or {}))
            return made, stack.enter_context(front.connect(made.uri, **{"arrays": "numpy", **options}))

        yield make


def _settled(stats: Callable[[], Any]) -> dict[str, tuple[int, int, int]]:
    return {name: (c.tensors, c.raw_nbytes, c.wire_nbytes) for name, c in stats().codecs.items()}


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("wire_dtype", CASTS)
def test_a_cast_halves_the_bytes_exactly(pair: Any, wire_dtype: str, kind: str) -> None:
    server, channel = pair(arrays=kind)
    x = np.linspace(-3, 3, 5000, dtype=np.float32).reshape(50, 100)
    ids = np.arange(7)
    tensors = (x, ids) if kind == "numpy" else (torch.from_numpy(x), torch.from_numpy(ids))
    channel.call("echo", *tensors)
    before = channel.stats.bytes_sent, channel.stats.bytes_received
    channel.call("echo", *tensors)
    plain = channel.stats.bytes_sent - before[0], channel.stats.bytes_received - before[1]
    assert channel.stats.codecs == {}

    before = channel.stats.bytes_sent, channel.stats.bytes_received
    result = channel.call("echo", *tensors, wire_dtype=wire_dtype)
    cast = channel.stats.bytes_sent - before[0], channel.stats.bytes_received - before[1]
    assert (plain[0] - cast[0], plain[1] - cast[1]) == (10_000, 10_000)
    wanted = torch.from_numpy(x).to(getattr(torch, wire_dtype)).float()
    assert str(result[0].dtype).endswith("float32")
    assert torch.equal(torch.as_tensor(result[0]), wanted)
    assert np.array_equal(np.asarray(result[1]), ids)
    assert _settled(lambda: channel.stats) == {wire_dtype: (2, 40_000, 20_000)}  # there and back
    assert _settled(lambda: server.stats) == {wire_dtype: (2, 40_000, 20_000)}
    assert channel.stats.casts_widened == 0
    assert channel.stats.bytes_copied == 0


def test_too_large_numbers_are_counted(pair: Any) -> None:
    server, channel = pair(wire_dtype="float16")
    x = np.array([1.0, 1e6], np.float32)
    (y,) = channel.call("echo", x)
    assert np.array_equal(y, torch.from_numpy(x).bfloat16().float().numpy())
    assert (channel.stats.casts_widened, server.stats.casts_widened) == (1, 1)
    assert _settled(lambda: channel.stats) == {"bfloat16": (2, 16, 8)}


@pytest.mark.parametrize("wire_dtype", [None, *CASTS])
@pytest.mark.parametrize("codec", codecs.installed())
@pytest.mark.matrix
def test_codecs_change_nothing_and_count_exactly(pair: Any, codec: str, wire_dtype: str | None) -> None:
    server, channel = pair(codec=codec, wire_dtype=wire_dtype, codec_threshold_nbytes=1000)
    x = np.repeat(np.arange(250, dtype=np.float32), 40)
    small = np.zeros(499 if wire_dtype else 249, np.float32)  # just below the threshold
    y, z = channel.call("echo", x, small)
    assert np.array_equal(x, y)
    assert np.array_equal(small, z)
    counted = channel.stats.codecs[codec]
    raw = x.nbytes // 2 if wire_dtype else x.nbytes
    assert (counted.tensors, counted.raw_nbytes) == (1, raw)  # the server's own threshold is a mebibyte
    assert 0 < counted.wire_nbytes < raw
    assert _settled(lambda: server.stats)[codec] == (1, raw, counted.wire_nbytes)
    if wire_dtype:
        assert _settled(lambda: channel.stats)[wire_dtype] == (
            4,
            2 * (x.nbytes + small.nbytes),
            x.nbytes + small.nbytes,
        )


def test_what_cannot_be_compressed_goes_as_it_is(pair: Any) -> None:
    _, channel = pair(codec="zlib", codec_threshold_nbytes=1)
    noise = np.frombuffer(np.random.default_rng(1).bytes(5000), np.uint8)
    for x in (noise, np.zeros((0, 4), np.float32), np.float32(3.0), np.zeros(1, np.uint8)):
        assert np.array_equal(channel.call("echo", x)[0], x)
    assert channel.stats.codecs["zlib"].wire_nbytes == channel.stats.codecs["zlib"].raw_nbytes == 0


def test_replies_come_as_the_call_wants(pair: Any) -> None:
    server, channel = pair(server={"codec": "zlib", "codec_threshold_nbytes": 100})
    x = np.zeros(1000, np.float32)
    channel.call("echo", x)  # on a link that is fast: the server's own choice is made for the reply alone
    assert channel.stats.codecs["zlib"].tensors == 1
    channel.call("echo", x, codec="off")
    assert channel.stats.codecs["zlib"].tensors == 1
    channel.codec = "off"
    channel.call("echo", x)
    assert channel.stats.codecs["zlib"].tensors == 1
    channel.call("echo", x, codec="lz4" if "lz4" in codecs.installed() else "zlib")
    assert sum(c.tensors for c in channel.stats.codecs.values()) == 2
    assert server.stats.calls == 4


def test_setters(pair: Any) -> None:
    _, channel = pair()
    assert (channel.wire_dtype, channel.codec) == (None, "auto")
    channel.wire_dtype, channel.codec = "bfloat16", "zlib"
    assert (channel.wire_dtype, channel.codec) == ("bfloat16", "zlib")
    x = np.float32([1 / 3])
    assert channel.call("echo", x)[0][0] == np.float32(0.333984375)
    assert channel.call("echo", x, wire_dtype=None)[0][0] == x[0]  # this call alone
    channel.wire_dtype, channel.codec = None, "off"
    assert (channel.wire_dtype, channel.codec) == (None, "off")
    assert channel.call("echo", x)[0][0] == x[0]


def test_settings_that_are_none(pair: Any, front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    server, channel = pair()
    x = np.zeros(1)
    for wrong in ("float8", "fp16", "float32", ""):
        for set_it in (
            functools.partial(setattr, channel, "wire_dtype", wrong),
            functools.partial(channel.call, "echo", x, wire_dtype=wrong),
            functools.partial(front.connect, server.uri, wire_dtype=wrong),
        ):
            with pytest.raises(SettingError, match=f"wire_dtype: '{wrong}', expected None, 'bfloat16' or 'float16'"):
                set_it()
    for set_it in (
        lambda: setattr(channel, "codec", "gzip"),
        lambda: channel.call("echo", x, codec="gzip"),
        lambda: front.connect(server.uri, codec="gzip"),
        lambda: fastsplit.Server(TCP, {}, codec="gzip"),
    ):
        with pytest.raises(SettingError, match="codec: 'gzip', expected 'auto', 'off', 'zlib'"):
            set_it()
    for threshold in (0, -1):
        with pytest.raises(SettingError, match="codec_threshold_nbytes"):
            front.connect(server.uri, codec_threshold_nbytes=threshold)
        with pytest.raises(SettingError, match="codec_threshold_nbytes"):
            fastsplit.Server(TCP, {}, codec_threshold_nbytes=threshold)
    monkeypatch.setattr(codecs, "installed", lambda: ("zlib",))
    with pytest.raises(SettingError, match="codec: 'zstd', which is not installed here: pip install"):
        channel.codec = "zstd"
    assert (channel.wire_dtype, channel.codec) == (None, "auto")
    channel.call("echo", x)


def test_a_peer_that_has_less(front: Front) -> None:
    names = [name for name in codecs.installed() if name != "zlib"]
    capabilities = CODES | cast_bit(FP16) | codec_bit(CODECS["zlib"])

    def script(peer: RawPeer) -> None:
        peer.send(hello(capabilities=capabilities))
        while peer.receive() is not None:
            pass

    with serving(TCP, script, clients=1 + len(names[:1]) + 1) as uri:
        with front.connect(uri) as channel:
            channel.wire_dtype = "float16"
            with pytest.raises(SettingError, match="wire_dtype: 'bfloat16', which the peer does not know"):
                channel.wire_dtype = "bfloat16"
            assert channel.wire_dtype == "float16"
        with pytest.raises(SettingError, match="wire_dtype: 'bfloat16'"):
            front.connect(uri, wire_dtype="bfloat16")
        for name in names[:1]:
            with pytest.raises(SettingError, match=f"codec: '{name}', which the peer does not have; both have: zlib"):
                front.connect(uri, codec=name)


@pytest.mark.parametrize("capabilities", [0, CODES, CODES | cast_bit(BF16)])
def test_a_servers_own_codec_is_left_where_a_client_has_it_not(serve: Serve, capabilities: int) -> None:
    server = serve(TCP, HANDLERS, arrays="numpy", codec="zlib", codec_threshold_nbytes=1)
    with connected(server.uri) as peer:
        peer.send(hello(capabilities=capabilities))
        assert peer.expect(HELLO)
        zeros = bytes(4000)
        peer.send(frame(REQUEST, 1, "echo", [(FLOAT32, (1000,))], payload=zeros))
        came = peer.expect(REPLY)
        assert (came.payload, came.message.placements) == (zeros, ())
        if capabilities:  # flags may be sent, if there is nothing they could name
            peer.send(frame(REQUEST, 2, "echo", [(FLOAT32, (1000,))], payload=zeros, flags=0xF0))
            assert peer.expect(REPLY).payload == zeros
    assert server.stats.codecs == {}


def test_nothing_is_coded_where_memory_is_shared(unix_uri: str, pair: Any) -> None:
    server, channel = pair(unix_uri, wire_dtype="bfloat16", codec="zlib", codec_threshold_nbytes=1)
    assert channel.shm
    x = np.float32([1 / 3] * 1000)
    assert np.array_equal(channel.call("echo", x)[0], x)
    assert np.array_equal(channel.call("echo", x, wire_dtype="float16", codec="off")[0], x)
    assert channel.stats.codecs == server.stats.codecs == {}
    assert channel.link == (None, None, None)
    assert channel.measure() == (None, None, None)


# ---- auto ------------------------------------------------------------------------------------------------------------


def _slow(meter: Meter | None, bytes_per_s: float, rtt_s: float) -> None:
    assert meter is not None
    meter.peer_bytes_per_s = bytes_per_s
    meter._rtts.clear()
    meter._rtts.append(rtt_s)


def _codings(channel: fastsplit.Channel) -> int:
    return sum(counted.wire_nbytes > 0 for counted in channel.stats.codecs.values())


def test_auto_is_off_on_unix_sockets_and_loopback(unix_uri: str, pair: Any) -> None:
    x = np.zeros(2**19, np.float32)
    _, channel = pair(f"{unix_uri}?shm=off", codec_threshold_nbytes=1)
    assert channel._connection.meter is None
    channel.call("nothing", x)
    assert _codings(channel) == 0
    _, channel = pair(codec_threshold_nbytes=1)
    _slow(channel._connection.meter, 1e6, 0.0001)
    channel.call("nothing", x)
    assert _codings(channel) == 0


def test_auto_is_on_where_the_meter_says_slow(pair: Any) -> None:
    _, channel = pair()
    _slow(channel._connection.meter, 1e6, 0.02)  # a relay on this host
    channel.call("nothing", np.zeros(2**18 - 1, np.float32))  # below the threshold
    assert channel.stats.codecs == {}
    channel.call("nothing", np.zeros(2**18, np.float32))
    assert _codings(channel) == 1
    _slow(channel._connection.meter, 1e6, 0.02)
    sent = channel.stats.codecs.copy()
    channel.call("nothing", np.zeros(2**18, np.float32), codec="off")
    assert {name: c.tensors for name, c in channel.stats.codecs.items()} == {n: c.tensors for n, c in sent.items()}


def test_auto_asks_a_sample_whether_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    probed: list[int] = []
    real = codecs.probe

    def probe(number: int, data: Any, itemsize: int) -> Any:
        probed.append(number)
        return real(number, data, itemsize)

    monkeypatch.setattr(codecs, "probe", probe)
    coder = Coder(Pool(), 1000)
    coder.agree(CODES | Coder.capabilities())
    noise = np.frombuffer(np.random.default_rng(1).bytes(2**20), np.uint8)
    for _ in range(17):
        out = coder.collect("op", [noise], 0, None, 1e6)
        assert (out.placements, out.nbytes) == ((), 2**20)
    assert len(probed) == 2 * len(codecs.installed())  # once for 16 messages
    zeros = np.zeros(2**20, np.uint8)
    out = coder.collect("other", [zeros], 0, None, 1e6)
    assert out.nbytes < 2**17
    assert out.placements[0] >> 32 in coder.accepted
    assert coder.collect("third", [zeros], 0, None, 1e15).placements == ()  # no codec is as fast
    assert coder.collect("third", [zeros], 0, None, 0.0).placements == ()
    assert coder.collect("third", [zeros], 0, None, None).placements == ()


def test_what_is_remembered_is_bounded() -> None:
    coder = Coder(Pool(), 1)
    coder.agree(CODES | codec_bit(CODECS["zlib"]))
    for number in range(600):
        coder.collect(f"op{number}", [np.zeros(100, np.uint8)], 0, None, 1e6)
        assert len(coder._known) <= 256


def test_a_handler_that_returns_what_cannot_be_cast(pair: Any) -> None:
    server, channel = pair(wire_dtype="float16")
    server.handlers["bad"] = lambda call: [1.0]
    with pytest.raises(RemoteOpError, match="TensorError"):
        channel.call("bad")
    with pytest.raises(fastsplit.errors.TensorError):
        channel.call("echo", [1.0])
    with pytest.raises(fastsplit.errors.TensorError):
        channel.call("echo", torch.empty(3, device="meta"))
    channel.call("echo", np.ones(3, np.float32))


def test_what_is_small_is_not_cast(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coder, "MIN_CAST_NBYTES", 64 * 1024)
    _, channel = pair(wire_dtype="float16")
    small, large = np.full(2**14 - 1, 1 / 3, np.float32), np.full(2**14, 1 / 3, np.float32)
    same, cast = channel.call("echo", small, large)
    assert np.array_equal(small, same) and np.array_equal(cast, large.astype(np.float16).astype(np.float32))
    counted = channel.stats.codecs["float16"]
    assert (counted.tensors, counted.raw_nbytes) == (2, 2 * large.nbytes)

"""The contestants of benches/bench_serialization.py: that each brings a message over, and is what it says it is."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from benches.bench_serialization import MESSAGES, check, merge, stored, table  # noqa: E402 (what needs torch)
from benches.serializers import FLOOR, SERIALIZERS, Message, Serializer, open_serializer  # noqa: E402
from benches.serializers.arrays import offset_in, tensor_over  # noqa: E402
from benches.serializers.fastsplit_frames import Frames  # noqa: E402
from benches.serializers.floor import Memcpy  # noqa: E402
from benches.serializers.serializer import wire_nbytes  # noqa: E402

DTYPES = ("float32", "bfloat16")
SMALL = {name: tuple(tuple(min(dim, 24) for dim in shape) for shape in shapes) for name, shapes in MESSAGES.items()}


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """What a library opens when it is imported, and keeps, is no test's leak."""
    for name in SERIALIZERS:
        with contextlib.suppress(ImportError):
            open_serializer(name)


@pytest.fixture(params=SERIALIZERS)
def serializer(request: pytest.FixtureRequest) -> Serializer:
    try:
        return open_serializer(request.param)
    except ImportError as error:
        pytest.skip(f"{request.param}: {error}")


@pytest.fixture(autouse=True)
def _nothing_read_only() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of memory that must not be written to
        yield


def message(shapes: tuple[tuple[int, ...], ...], dtype: str = "float32") -> Message:
    generator = torch.Generator().manual_seed(11)
    tensors = [torch.randn(shape, generator=generator).to(getattr(torch, dtype)) for shape in shapes]
    return Message("linear", 3, 0.125, tensors)


def bytes_of(buffer: Any) -> Any:
    return np.frombuffer(buffer, np.uint8)


def writable_parts(received: Any) -> list[Any]:
    """The memory that a receiver has read into, where it may be written to."""
    parts = received if isinstance(received, (list, tuple)) else [received]
    flat = itertools.chain.from_iterable(part if isinstance(part, list) else [part] for part in parts)
    return [bytes_of(part) for part in flat if isinstance(part, (bytearray, np.ndarray))]


def shares(tensor: Any, parts: list[Any]) -> bool:
    return any(np.shares_memory(tensor.reshape(-1).view(torch.uint8).numpy(), part) for part in parts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SMALL)
def test_a_message_arrives_as_it_was_and_can_be_written_to(serializer: Serializer, name: str, dtype: str) -> None:
    sent = message(SMALL[name], dtype)
    for _ in range(2):  # the second time with what is kept between messages
        wire = serializer.encode(sent)
        assert wire_nbytes(wire) >= sum(tensor.nbytes for tensor in sent.tensors)
        arrived = serializer.decode(serializer.receive(wire))
        assert check(serializer, sent, arrived)["writable"]


def test_messages_of_other_shapes_follow_each_other(serializer: Serializer) -> None:
    for name in (*SMALL, *SMALL):
        sent = message(SMALL[name])
        check(serializer, sent, serializer.decode(serializer.receive(serializer.encode(sent))))


def test_who_says_that_nothing_is_copied_uses_the_same_memory(serializer: Serializer) -> None:
    sent = message(((64, 1024), (512, 128)))
    wire = serializer.encode(sent)
    outgoing = [bytes_of(buffer) for buffer in wire]
    for tensor in sent.tensors:
        assert shares(tensor, outgoing) == (serializer.copies_encode == 0)
    received = serializer.receive(wire)
    for tensor in sent.tensors:
        assert not shares(tensor, writable_parts(received))  # what arrived is never the sender's own
    for tensor in serializer.decode(received).tensors:
        assert shares(tensor, writable_parts(received)) == (serializer.copies_decode == 0)


def test_buffers_fit_a_socket(serializer: Serializer) -> None:
    for buffer in serializer.encode(message(SMALL["qkv"])):
        view = memoryview(buffer)
        assert view.contiguous
        assert view.nbytes


def shortened(received: Any) -> Any:
    """The same, with half of its bytes at its end missing."""
    if isinstance(received, (bytes, bytearray)):
        return received[: len(received) // 2]
    head, *others = received
    if isinstance(others[-1], list):
        buffers = others[-1]
        return (head, *others[:-1], [*buffers[:-1], buffers[-1][: len(buffers[-1]) // 2]])
    return None


def test_who_says_that_it_is_safe_refuses_what_is_cut_off(serializer: Serializer) -> None:
    if not serializer.safe.startswith("yes") or isinstance(serializer, Memcpy | Frames):
        return  # it does not say so, or reads nothing (memcpy), or has a test of its own (fastsplit)
    received = serializer.receive(serializer.encode(message(((24, 24), (8, 8)))))
    serializer.decode(received)
    with pytest.raises(Exception, match=r".*"):
        serializer.decode(shortened(received))


def test_fastsplit_refuses_a_frame_whose_sizes_do_not_agree() -> None:
    serializer = open_serializer("fastsplit")
    first, frame_nbytes, buffers = serializer.receive(serializer.encode(message(((24, 24),))))
    payload_nbytes = (24 * 24 * 4).to_bytes(8, "little")
    assert payload_nbytes in first[:40]
    lying = first.replace(payload_nbytes, (24 * 24 * 4 + 4).to_bytes(8, "little"), 1)
    with pytest.raises(Exception, match="payload_nbytes"):
        serializer.decode((lying, frame_nbytes, buffers))


@pytest.mark.parametrize("name", ["fastsplit", "fastsplit, new shape"])
def test_a_new_shape_is_one_that_neither_side_remembers(name: str) -> None:
    serializer = open_serializer(name)
    for rows in (2, 3, 4):
        serializer.decode(serializer.receive(serializer.encode(message(((rows, 8),)))))
    is_new = "new shape" in name
    encoder, decoder = serializer._client.encoder, serializer._server.decoder
    for known in (encoder._templates, decoder._known, *filter(None, (encoder.compiled, decoder.compiled))):
        assert (len(known) == 1) == is_new


def test_no_tensor_lies_outside_of_what_arrived() -> None:
    arrived = bytearray(64)
    assert offset_in(memoryview(arrived)[16:24].toreadonly(), arrived) == 16
    with pytest.raises(ValueError, match="outside"):
        offset_in(bytes(8), arrived)
    with pytest.raises(ValueError, match="at -8"):
        tensor_over(arrived, "float32", [2], -8, 8)
    with pytest.raises((TypeError, ValueError)):
        tensor_over(arrived, "float32", [2], 60, 8)


def test_a_compressed_arrow_batch_is_refused() -> None:
    pa = pytest.importorskip("pyarrow")
    serializer = open_serializer("arrow batch")
    batch = serializer._batch(message(((64, 64),)))
    stream = pa.BufferOutputStream()
    with pa.ipc.new_stream(stream, batch.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_batch(batch)
    with pytest.raises(ValueError, match="outside"):
        serializer.decode(bytearray(stream.getvalue()))


def test_a_negative_dimension_is_refused() -> None:
    sent = message(((4, 4),))
    npy = open_serializer("npy, out-of-band")
    headers, buffers = npy.receive(npy.encode(sent))
    with pytest.raises(ValueError, match="plain rows"):
        npy.decode((headers.replace(b"(4, 4)", b"(-1,4)"), buffers))
    pytest.importorskip("msgspec")
    structs = open_serializer("msgspec")
    received = structs.receive(structs.encode(sent))
    assert b"\x92\x04\x04" in received  # a list of 4 and 4
    with pytest.raises(ValueError, match=">= 0"):
        structs.decode(received.replace(b"\x92\x04\x04", b"\x92\xff\x04", 1))


def test_a_contestant_that_is_wrong_fails() -> None:
    sent = message(((3, 4),))
    floor = open_serializer(FLOOR)
    with pytest.raises(AssertionError, match="other values"):
        check(floor, sent, Message("", 0, 0.0, [sent.tensors[0] + 1]))
    with pytest.raises(AssertionError):
        check(floor, sent, Message("", 0, 0.0, [sent.tensors[0].view(4, 3)]))
    with pytest.raises(AssertionError, match="op and attributes"):
        check(open_serializer("fastsplit"), sent, Message("other", 3, 0.125, sent.tensors))


def test_every_module_has_its_contestants_in_the_list() -> None:
    folder = Path(__file__).resolve().parents[2] / "benches" / "serializers"
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__", "serializer", "arrays"}
    assert modules == {target.partition(".")[0] for target in SERIALIZERS.values()}


def stats(median: float) -> dict[str, Any]:
    spread = {"min": median / 2, "max": 2 * median, "mean": median, "stddev": 0.1, "total": 2 * median}
    return spread | {"median": median, "rounds": 2, "iterations": 5, "outliers": "0;0", "iqr": 0.1, "data": [median]}


def document(medians: dict[str, float]) -> dict[str, Any]:
    measured = {"message": "row", "dtype": "float32", "task": "both", "wire_nbytes": 9, "writable": True}
    measured["payload_nbytes"] = 8
    said = {"how": "best", "general": True, "copies_encode": 0, "copies_decode": 1, "safe": "yes: really", "note": ""}
    return {
        "machine_info": {"node": "", "cpu": {}},
        "environment": {"date": "today"},
        **dict.fromkeys(("version", "datetime", "commit_info"), ""),
        "benchmarks": [
            {
                "fullname": name,
                "name": name,
                "group": "row float32: both",
                "param": "",
                "stats": stats(median),
                "extra_info": measured | said | {"serializer": name},
            }
            for name, median in medians.items()
        ],
    }


def test_passes_become_one_document() -> None:
    passes = [document({FLOOR: floor, "pickle 4": 2 * floor}) for floor in (3e-6, 1e-6, 2e-6)]
    merged = merge(passes)
    floor, _ = merged["benchmarks"]
    assert floor["stats"]["median"] == 2e-6
    assert (floor["stats"]["min"], floor["stats"]["max"]) == (0.5e-6, 6e-6)
    assert (floor["stats"]["rounds"], floor["stats"]["iterations"]) == (6, 5)
    assert "data" not in floor["stats"]
    lines = table(merged).splitlines()
    assert [line.split()[0] for line in lines if line.startswith((FLOOR, "pickle"))] == [FLOOR, "pickle"]
    assert "4.0    2.00" in next(line for line in lines if line.startswith("pickle 4"))
    kept = stored(merged)
    assert kept["serializers"]["pickle 4"] == kept["serializers"][FLOOR]
    assert kept["benchmarks"][1]["extra_info"]["serializer"] == "pickle 4"
    assert kept["benchmarks"][1]["stats"]["median"] == 4e-6

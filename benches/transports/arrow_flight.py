"""Arrow Flight: record batches of one column, float32, which is the tensor's own memory.

Round trips: DoExchange, one stream for all messages of a run; its descriptor says how many will come, and whether to
look at them. One way: DoPut, and one message of metadata from the server when it has all. Batches are made anew for
each message and sent out of the array's memory. What arrives is an array in Arrow's memory without another copy,
read-only. Only sleeping: Flight's threads, which are gRPC's, move the bytes and wake the callers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight

from . import Bytes, KeepingClient, Peer, Run, bytes_of

__all__ = ["FlightClient", "FlightPeer"]

_SCHEMA = pa.schema([("tensor", pa.float32())])


def _batch_of(array: np.ndarray[Any, Any]) -> Any:
    column = pa.Array.from_buffers(pa.float32(), array.size, [None, pa.py_buffer(array)])
    return pa.RecordBatch.from_arrays([column], schema=_SCHEMA)


def _array_of(chunk: Any) -> np.ndarray[Any, Any]:
    chunk.data.validate()
    array: np.ndarray[Any, Any] = chunk.data.column(0).to_numpy()
    return array


def _descriptor(mark: bool, count: int) -> Any:
    return pyarrow.flight.FlightDescriptor.for_command(json.dumps([mark, count]))


class _Server(pyarrow.flight.FlightServerBase):  # type: ignore[misc]
    def __init__(self, location: str, peer: FlightPeer) -> None:
        super().__init__(location)
        self._peer = peer

    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        """Ends with the last message that will come, since `shutdown` waits for streams that are open."""
        mark, count = json.loads(descriptor.command)
        writer.begin(_SCHEMA)
        for _ in range(count):
            array = _array_of(reader.read_chunk())
            if mark:
                array = (bytes_of(array) + np.uint8(1)).view(np.float32)
            writer.write_batch(_batch_of(array))

    def do_put(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        peer = self._peer
        for chunk in reader:
            peer.last = _array_of(chunk)
            peer.taken += 1
        writer.write(str(peer.taken).encode())


class FlightPeer(Peer):
    def __init__(self, directory: Path, link: str) -> None:
        location = f"grpc+unix://{directory}/flight.sock" if link == "unix" else "grpc+tcp://127.0.0.1:0"
        self._server = _Server(location, self)
        self.address = location if link == "unix" else f"grpc+tcp://127.0.0.1:{self._server.port}"

    def close(self) -> None:
        self._server.shutdown()


class FlightClient(KeepingClient):
    modes = ("sleeping",)
    copies = "1: the received pieces put together"
    writable = "no: Arrow's memory is read-only"
    safe = "partly: no limit on the size"
    most_nbytes = 2**31 - 1 - 64 * 1024  # of a message of Flight's

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self._client = pyarrow.flight.FlightClient(address)
        self._stream: tuple[Any, Any] | None = None

    def _exchange(self, mark: bool, count: int) -> tuple[Any, Any]:
        self._end()
        self._stream = writer, reader = self._client.do_exchange(_descriptor(mark, count))
        writer.begin(_SCHEMA)
        return writer, reader

    def _end(self) -> None:
        if self._stream is not None:
            writer, _ = self._stream
            self._stream = None
            writer.close()

    def trip(self, run: Run) -> Callable[[], object]:
        writer, reader = self._exchange(False, run.count)
        write, read, message = writer.write_batch, reader.read_chunk, self._messages[run.nbytes]

        def once() -> object:
            write(_batch_of(message))
            return _array_of(read())

        return once

    def marked(self, run: Run, message: Bytes) -> Bytes:
        writer, reader = self._exchange(True, 1)
        writer.write_batch(_batch_of(message.view(np.float32)))
        reply = bytes_of(_array_of(reader.read_chunk())).copy()
        self._end()
        return reply

    def push(self, run: Run, message: Bytes) -> None:
        array = message.view(np.float32)
        writer, replies = self._client.do_put(_descriptor(run.mark, run.count), _SCHEMA)
        for _ in range(run.count):
            writer.write_batch(_batch_of(array))
        writer.done_writing()
        taken = int(replies.read().to_pybytes())
        writer.close()
        if taken != run.count:
            raise ConnectionError(f"{taken} of {run.count} messages came")

    def release(self, nbytes: int) -> None:
        self._end()
        super().release(nbytes)

    def close(self) -> None:
        super().close()
        with suppress(pa.ArrowException, OSError):
            self._end()
        self._client.close()

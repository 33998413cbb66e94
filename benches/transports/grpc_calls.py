"""gRPC: one stream for all messages, and a call with a protobuf message for each.

    Stream    plain bytes: `tobytes()` out, since gRPC takes nothing else, and `np.frombuffer` of what came, read-only.
              One way a stream to the server, held back by HTTP/2's flow control; its only reply says how many came
    Unary     a call for each message and its reply, each a protobuf message of dtype, shape and data: `tobytes()` in,
              `np.frombuffer(...).copy()` out. One way the reply is empty, and calls are made one at a time

Both ends are the synchronous API without limits on lengths, and only sleep: gRPC's threads move the bytes. Stream's two
options were the quickest of nine settings, `grpc.aio` included, that were tried over unix sockets.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from . import Bytes, KeepingClient, Peer, Run, bytes_of

__all__ = ["StreamClient", "StreamPeer", "UnaryClient", "UnaryPeer"]

_SERVICE = "fastsplit.bench.Tensors"
_UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
_TUNED = [*_UNLIMITED, ("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 64 * 1024**2)]
_THREADS = 4  # a stream occupies one of them for as long as it is open
_CLOSING_S = 5.0


def _message_classes() -> tuple[Any, Any]:
    """Of Tensor {string dtype = 1; repeated int64 shape = 2; bytes data = 3;} and of Empty {}."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="fastsplit_bench_grpc.proto", package="fastsplit.bench.grpc_calls")
    file.syntax = "proto3"
    tensor = file.message_type.add(name="Tensor")
    tensor.field.add(name="dtype", number=1, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    tensor.field.add(name="shape", number=2, type=field.TYPE_INT64, label=field.LABEL_REPEATED)
    tensor.field.add(name="data", number=3, type=field.TYPE_BYTES, label=field.LABEL_OPTIONAL)
    file.message_type.add(name="Empty")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    named = (pool.FindMessageTypeByName(f"{file.package}.{name}") for name in ("Tensor", "Empty"))
    tensor_class, empty_class = (message_factory.GetMessageClass(descriptor) for descriptor in named)
    return tensor_class, empty_class


_Tensor, _Empty = _message_classes()


def _message_of(array: np.ndarray[Any, Any]) -> Any:
    return _Tensor(dtype=array.dtype.str, shape=array.shape, data=array.tobytes())


def _array_of(message: Any) -> np.ndarray[Any, Any]:
    return np.frombuffer(message.data, message.dtype).reshape(message.shape).copy()


def _count(context: grpc.ServicerContext) -> int:
    """Of the messages that will come: the stream ends with the last, or the server could not close without a noise."""
    return int(dict(context.invocation_metadata())["count"])


def _marked(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (bytes_of(array) + np.uint8(1)).view(np.float32)


class _GrpcPeer(Peer):
    options: list[tuple[str, int]]

    def __init__(self, directory: Path, link: str) -> None:
        self._pool = ThreadPoolExecutor(_THREADS)
        self._server = grpc.server(self._pool, options=self.options)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, self._handlers()),))
        self.address = f"unix:{directory}/grpc.sock" if link == "unix" else "127.0.0.1:0"
        port = self._server.add_insecure_port(self.address)
        if link != "unix":
            self.address = f"127.0.0.1:{port}"
        self._server.start()

    def _handlers(self) -> dict[str, Any]:
        raise NotImplementedError

    def close(self) -> None:
        self._server.stop(_CLOSING_S).wait()  # no call is open, so that it does not take as long
        self._pool.shutdown()


class _GrpcClient(KeepingClient):
    modes = ("sleeping",)
    options: list[tuple[str, int]]

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self._channel = grpc.insecure_channel(address, options=self.options)

    def close(self) -> None:
        super().close()
        self._channel.close()


class StreamPeer(_GrpcPeer):
    options = _TUNED

    def _handlers(self) -> dict[str, Any]:
        return {
            "Echo": grpc.stream_stream_rpc_method_handler(self._echo),
            "Mark": grpc.stream_stream_rpc_method_handler(self._mark),
            "Take": grpc.stream_unary_rpc_method_handler(self._take),
        }

    def _echo(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        for message in islice(messages, _count(context)):
            np.frombuffer(message, np.float32)  # as who does something with it would have it
            yield message

    def _mark(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        for message in islice(messages, _count(context)):
            yield _marked(np.frombuffer(message, np.float32)).tobytes()

    def _take(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        for message in messages:
            self.last = np.frombuffer(message, np.float32)
            self.taken += 1
        return str(self.taken).encode()


class StreamClient(_GrpcClient):
    options = _TUNED
    copies = "4: tobytes, one into gRPC's memory, two out of it"
    writable = "no: bytes are read-only"
    safe = "partly: no limit on the size, and nothing says what comes"

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self._sending: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def _stream(self, method: str, count: int, messages: Iterator[bytes]) -> Iterator[bytes]:
        call = self._channel.stream_stream(f"/{_SERVICE}/{method}")
        replies: Iterator[bytes] = call(messages, metadata=(("count", str(count)),))
        return replies

    def trip(self, run: Run) -> Callable[[], object]:
        self._sending.put(None)
        self._sending = queue.SimpleQueue()
        replies = self._stream("Echo", run.count, iter(self._sending.get, None))
        send, message = self._sending.put, self._messages[run.nbytes]
        frombuffer, float32 = np.frombuffer, np.float32

        def once() -> object:
            send(message.tobytes())
            return frombuffer(next(replies), float32)

        return once

    def marked(self, run: Run, message: Bytes) -> Bytes:
        (reply,) = self._stream("Mark", 1, iter([message.tobytes()]))
        return np.frombuffer(reply, np.uint8).copy()

    def push(self, run: Run, message: Bytes) -> None:
        take = self._channel.stream_unary(f"/{_SERVICE}/Take")
        taken = int(take(message.tobytes() for _ in range(run.count)))
        if taken != run.count:
            raise ConnectionError(f"{taken} of {run.count} messages came")

    def close(self) -> None:
        self._sending.put(None)
        super().close()


class UnaryPeer(_GrpcPeer):
    options = _UNLIMITED

    def _handlers(self) -> dict[str, Any]:
        behaviours = {"Echo": self._echo, "Mark": self._mark, "Take": self._take}
        return {
            name: grpc.unary_unary_rpc_method_handler(
                behaviour,
                request_deserializer=_Tensor.FromString,
                response_serializer=lambda message: message.SerializeToString(),
            )
            for name, behaviour in behaviours.items()
        }

    def _echo(self, message: Any, context: grpc.ServicerContext) -> Any:
        return _message_of(_array_of(message))

    def _mark(self, message: Any, context: grpc.ServicerContext) -> Any:
        return _message_of(_marked(_array_of(message)))

    def _take(self, message: Any, context: grpc.ServicerContext) -> Any:
        self.last = _array_of(message)
        self.taken += 1
        return _Empty()


class UnaryClient(_GrpcClient):
    options = _UNLIMITED
    how = "common"
    copies = "10: tobytes, three of protobuf, one into gRPC's memory, two out of it, two of protobuf, copy"
    safe = "partly: no limit on the size"
    most_nbytes = 2**31 - 1 - 64 * 1024  # of a protobuf message

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self._calls = {
            name: self._channel.unary_unary(
                f"/{_SERVICE}/{name}",
                request_serializer=_Tensor.SerializeToString,
                response_deserializer=reply.FromString,
            )
            for name, reply in (("Echo", _Tensor), ("Mark", _Tensor), ("Take", _Empty))
        }

    def trip(self, run: Run) -> Callable[[], object]:
        call, message = self._calls["Echo"], self._messages[run.nbytes]
        return lambda: _array_of(call(_message_of(message)))

    def marked(self, run: Run, message: Bytes) -> Bytes:
        return bytes_of(_array_of(self._calls["Mark"](_message_of(message.view(np.float32)))))

    def push(self, run: Run, message: Bytes) -> None:
        call, array = self._calls["Take"], message.view(np.float32)
        for _ in range(run.count):
            call(_message_of(array))

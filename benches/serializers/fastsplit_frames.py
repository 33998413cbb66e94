"""fastsplit over a stream, with everything but the socket: sessions that have shaken hands, as a connection has them.

Encoding is `collect` and `Session.request`: out go the frame's head and each tensor's own memory. Decoding is
`Session.received`: header and metadata are checked, a place is asked for each tensor, and it becomes what a handler
gets. Of messages of one shape a connection encodes and checks the first in full (NewShape), the others by a template
with other numbers (Frames). The first read brings the head and up to 4 KiB of the payload, which is copied over into
the tensors (`staged_nbytes`), in our time; the rest lies where it was read to.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastsplit.tensors import collect, parse_arrays
from fastsplit.tensors.pool import pool
from fastsplit.wire.events import Failed, Request
from fastsplit.wire.session import STAGING_NBYTES, Session

from .serializer import Message, Serializer, joined

__all__ = ["Frames", "NewShape"]


class Frames(Serializer):
    copies_encode = 0
    copies_decode = 0
    safe = "yes: every length, offset and count is checked before memory is asked for"
    note = "what arrives within 4 KiB of the head is copied once"

    def __init__(self) -> None:
        self._buffers: Iterator[Any] = iter(())
        self._client = Session(is_client=True, allocate=pool.allocate)
        self._server = Session(is_client=False, allocate=lambda nbytes: next(self._buffers))
        self._view = parse_arrays("torch").view
        for sender, receiver in ((self._client, self._server), (self._server, self._client)):
            hello = sender.hello()
            receiver.receive_buffers()[0][: len(hello)] = hello
            receiver.received(len(hello))

    def encode(self, message: Message) -> list[Any]:
        outgoing = collect(message.tensors)
        attrs = {"layer": message.layer, "scale": message.scale}
        request_id, frame = self._client.request(message.op, outgoing.descs, attrs, outgoing.nbytes)
        self._client.discard(request_id)  # nobody will answer
        return [frame, *outgoing.buffers]

    def receive(self, wire: list[Any]) -> tuple[bytes, int, list[Any]]:
        """The first read, how many bytes the whole frame has, and the tensors' memory."""
        buffers = []
        for buffer in wire[1:]:
            data = memoryview(buffer).cast("B")
            memory = pool.allocate(data.nbytes)
            memoryview(memory)[:] = data
            buffers.append(memory)
        frame = joined(wire)
        return bytes(memoryview(frame)[:STAGING_NBYTES]), len(frame), buffers

    def decode(self, received: tuple[bytes, int, list[Any]]) -> Message:
        first, frame_nbytes, buffers = received
        session = self._server
        self._buffers = iter(buffers)
        session.receive_buffers()[0][: len(first)] = first
        events = session.received(len(first))
        if not events:
            events = session.received(frame_nbytes - len(first))
        (event,) = events
        if isinstance(event, Failed):
            raise event.error
        assert isinstance(event, Request)
        message = event.message
        tensors = tuple(map(self._view, event.buffers, message.tensors))
        return Message(message.op, message.attrs["layer"], message.attrs["scale"], tensors)


class NewShape(Frames):
    """A message of a shape that neither side remembers. To empty what they know takes some 50 ns of each."""

    def encode(self, message: Message) -> list[Any]:
        self._client.encoder.forget()
        return super().encode(message)

    def decode(self, received: tuple[bytes, int, list[Any]]) -> Message:
        self._server.decoder.forget()
        return super().decode(received)

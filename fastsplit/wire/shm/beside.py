"""What a transport in shared memory leaves to the socket beside it: the bell, descriptors, and the end of the peer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..transport.base import Transport
from ..transport.stream import Stream

__all__ = ["Beside"]

_DESCRIPTOR = b"d"  # the byte that a descriptor travels with; the peer drops it as it drops a bell


class Beside(Transport):
    """A transport whose frames go through shared memory. Takes over the socket's Stream, and owns it."""

    whole_frames = True

    def __init__(self, link: Stream) -> None:
        self.link = link
        self._bell = memoryview(bytearray(64))
        self.passes_descriptors = link.passes_descriptors
        self.spin = link.spin

    @property
    def bytes_sent(self) -> int:
        """Bytes through the socket."""
        return self.link.bytes_sent

    @property
    def bytes_received(self) -> int:
        """Bytes through the socket."""
        return self.link.bytes_received

    def send_with_descriptor(self, frame: Any, fd: int, deadline: float | None) -> Sequence[Any]:
        """Sends the descriptor through the socket, waiting for room in that; all of `frame` is left."""
        self.link.send_with_descriptor(_DESCRIPTOR, fd, deadline)
        return [frame]

    def send_descriptor_now(self, fd: int) -> bool:
        """Sends a descriptor through the socket. False if there is no room for it now. Raises PeerLostError."""
        return self.link.send_with_descriptor_now(_DESCRIPTOR, fd)[0]

    def take_descriptor(self) -> int | None:
        if not self.link.descriptors:
            self.link.receive_descriptors(self._bell)
        return self.link.take_descriptor()

    def fileno(self) -> int:
        """The socket's descriptor; -1 once it is closed."""
        return self.link.fileno()

    def drain(self) -> bool:
        """Silences the bell. Raises PeerLostError, RemoteProtocolError."""
        return self.link.drain()

    def peer_name(self) -> str:
        return self.link.peer_name()

    def peer_left(self) -> bool:
        return self.link.peer_left()

    def shutdown_writing(self) -> None:
        self.link.shutdown_writing()

    def shutdown_reading(self) -> None:
        self.link.shutdown_reading()

    def shutdown(self) -> None:
        self.link.shutdown()

    def linger(self, deadline: float) -> None:
        """Ends the writing direction. What was written stays readable, whatever becomes of the socket."""
        self.link.linger(deadline)

    def close(self) -> None:
        self.link.close()

    def leave(self) -> None:
        self.link.leave()

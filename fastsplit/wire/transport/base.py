"""Transports: how the bytes of one connection move. The interface, and what all implementations share.

A transport is one end of a connection. `Stream` (a kernel socket) and `Ring` (shm/ring.py, in shared memory beside a
socket) are the two that fastsplit has; a new one derives from `Transport`, fills in the abstract methods and inherits
the rest. The other modules of wire use only what stands here.

The contract, for every implementation.

Threads. One thread receives while another sends. `wait(reading=True)` counts as both. `shutdown`, `shutdown_reading`
and `shutdown_writing` may come from any thread at any time; `close` comes when no other thread is in a method.

Ownership. A transport owns its descriptors and those that the peer sent, until `take_descriptor` hands one to the
caller. Buffers that are sent belong to the caller, who must not change them until nothing of them is left.

Errors. PeerLostError: nothing can be sent or received any more. DeadlineError: nothing was lost. RemoteProtocolError:
the peer sent what no peer may send. ResourceError: this process is short of something, and nothing was sent or taken.
An OSError never leaves a transport.

Deadlines are `time.monotonic()` seconds; None waits for as long as it takes. A deadline that has passed ends a wait
even if the peer goes on sending. A `send_all` that ends so may have sent a part of a frame: its caller then ends the
connection.

`send` never waits: it returns what is left of its buffers, the very same object if nothing was sent. `wait` returns
(readable, writable), readable only if `reading`; "readable" includes the end of the stream. `send_with_descriptor_now`
never waits either: it returns whether the descriptor went, and what is left of the frame. `send_with_descriptor` waits
until the descriptor has gone, and returns what is left of the frame. The descriptor stays the caller's.

`receive` reads once, hands what it read to the sink, and returns the sink's events: None at the end of the stream. With
`blocking=False` it raises DeadlineError where there is nothing to read. A read that an exception of a signal's handler
ended is made again, and goes on where it was: what was taken is noted in the sink in the same step (session.py).

Sleeping. A side that is about to sleep on `fileno` calls `prepare_to_sleep` first: it returns how many seconds the side
may sleep (None: until the descriptor is readable; 0: not at all, there is something to do). `awake` undoes it. `drain`
drops what made the descriptor readable, never waits, and returns False at the end of the stream. `wake_early` tells a
sleeping peer that a frame will follow in a moment.

The end. `shutdown_writing`: the peer reads what was sent, then the end. `shutdown_reading`: this side reads the end.
`shutdown`: both; a thread that waits wakes up. `linger`: `shutdown_writing`, then waits at most until the deadline for
the peer to take what was sent. `close`: lets everything go; idempotent. `leave`: the same in a forked child, and the
parent's connection goes on. Each of them is silent about a peer that is gone.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

from ...errors import PeerLostError
from .meter import Meter
from .spin import Spin

__all__ = ["Sink", "Transport", "lost", "remaining_s"]


def remaining_s(deadline: float | None) -> float | None:
    """Seconds until a deadline, at least 0; None for none."""
    return None if deadline is None else max(deadline - time.monotonic(), 0.0)


def lost(error: OSError) -> PeerLostError:
    """What a failed system call on a connection's descriptor means."""
    return PeerLostError(f"the connection is lost: {error.strerror or error}")


class Sink(Protocol):
    """What a transport hands bytes to: a Session, whose documentation says what each of these means."""

    arrived: int
    unfinished: bool
    slot: bytes | None
    payload_left: int

    def receive_buffers(self) -> list[memoryview]: ...
    def received(self, nbytes: int, events: list[Any] | None = None) -> list[Any]: ...
    def received_slot(self, slot: bytes, events: list[Any] | None = None) -> list[Any]: ...


class Transport(ABC):
    """One end of a connection. The module's docstring is the contract."""

    whole_frames = False
    """A frame is one buffer, since its tensors lie in shared memory. `fileno` is then only a bell: it becomes readable
    when the peer has sent something or made room, `drain` silences it, and `has_bytes` says what there is."""

    passes_descriptors = False
    """Whether descriptors cross, and those that come are collected."""

    needs_retry = False
    """Whether the last descriptor found no room, and no event will tell of room for it: to be tried again soon."""

    meter: Meter | None = None
    """Measures how fast payloads come in."""

    spin: Spin
    """How long a blocking `receive` spins before it sleeps."""

    # ---- out ----

    @property
    @abstractmethod
    def bytes_sent(self) -> int:
        """Bytes that the kernel, or whatever carries them, has taken."""

    @abstractmethod
    def send(self, buffers: Sequence[Any], nbytes: int = -1) -> Sequence[Any]:
        """Sends what there is room for now, and returns what is left. `nbytes`: of all buffers, where it is known."""

    def send_all(self, buffers: Sequence[Any], deadline: float | None) -> None:
        """Sends everything, waiting if it must. Raises PeerLostError, DeadlineError (then the stream is in doubt)."""
        left = self.send(buffers)
        while left:
            self.wait(deadline, reading=False)
            left = self.send(left)

    def send_with_descriptor(self, frame: Any, fd: int, deadline: float | None) -> Sequence[Any]:
        """Sends a descriptor, waiting if it must, and as much of `frame` as there is room for. Returns what is left."""
        sent, left = self.send_with_descriptor_now(frame, fd)
        while not sent:
            self.wait(deadline, reading=False)
            sent, left = self.send_with_descriptor_now(frame, fd)
        return left

    def send_with_descriptor_now(self, frame: Any, fd: int) -> tuple[bool, Sequence[Any]]:
        """The same without waiting: whether the descriptor went, and what is left of `frame`."""
        raise NotImplementedError(f"{type(self).__name__} passes no descriptors")

    @abstractmethod
    def wait(self, deadline: float | None, *, reading: bool) -> tuple[bool, bool]:
        """Waits until this end is (readable, writable), readable only if `reading`. Raises DeadlineError, also where
        the deadline has passed and the end is ready."""

    # ---- in ----

    @property
    @abstractmethod
    def bytes_received(self) -> int:
        """Bytes that were read."""

    @abstractmethod
    def receive(
        self, sink: Sink, deadline: float | None, *, blocking: bool = True, events: list[Any] | None = None
    ) -> list[Any] | None:
        """Reads once. Returns `events`, a new list by default, with what that completed at its end; None at the end of
        the stream. Raises PeerLostError, DeadlineError (nothing is lost: another read may go on)."""

    @abstractmethod
    def has_bytes(self) -> bool:
        """Whether there is something to read, or the end of the stream."""

    def take_descriptor(self) -> int | None:
        """The next descriptor that came, the caller's to close; None if there is none.

        Raises ResourceError if one came while this process had none left for it.
        """
        return None

    # ---- sleeping ----

    @abstractmethod
    def fileno(self) -> int:
        """The descriptor to sleep on; -1 once it is closed."""

    @abstractmethod
    def drain(self) -> bool:
        """Drops what can be read now, or some of it; descriptors are collected. False at the end of the stream."""

    def prepare_to_sleep(self, *, for_items: bool, for_space: bool) -> float | None:
        """Seconds that this side may sleep on `fileno`. A socket's is readable whenever there is something to read."""
        return None

    def awake(self) -> None:  # noqa: B027 (a default)
        """This side looks for itself, until it prepares to sleep again."""

    def wake_early(self) -> None:  # noqa: B027 (a default)
        """A frame will follow in a moment. A socket's sleeper can only be woken by the frame itself."""

    # ---- the peer ----

    @abstractmethod
    def peer_name(self) -> str:
        """The peer's name for logs."""

    @abstractmethod
    def peer_left(self) -> bool:
        """Whether the peer has ended its writing direction, or is gone. Reads nothing."""

    # ---- the end ----

    @abstractmethod
    def shutdown_writing(self) -> None: ...

    @abstractmethod
    def shutdown_reading(self) -> None: ...

    def shutdown(self) -> None:
        """Ends both directions."""
        self.shutdown_writing()
        self.shutdown_reading()

    def linger(self, deadline: float) -> None:
        """Ends the writing direction and sees to it that the peer can read what was sent. Here: what was sent stays
        readable whatever becomes of this end."""
        self.shutdown_writing()

    @abstractmethod
    def close(self) -> None: ...

    def leave(self) -> None:
        """For a forked child: closes the descriptors, and leaves the connection to the parent."""
        self.close()

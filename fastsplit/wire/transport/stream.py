"""Blocking I/O on one connected socket: short reads and writes, deadlines, and the peer's death.

Rules. Deadlines are `time.monotonic()` seconds, None for none. A read that times out loses nothing: what arrived is in
the session. A write that times out in the middle of a frame leaves the stream in doubt; the caller must end the
connection. A deadline that has passed ends a wait, whatever the peer does meanwhile: it may go on talking for ever.
Every OSError becomes PeerLostError here, and only here. One thread may read while another writes.

On a unix socket that may bring shared memory, reads take descriptors along: a plain read would drop them.

Why the socket is blocking and still written with MSG_DONTWAIT: a read is one system call (SO_RCVTIMEO gives it its
deadline), and a write never blocks, so that its caller can read meanwhile; two peers that both only write would wait
for ever.

A descriptor that comes while this process has none left is dropped by the kernel. Its place is kept among those that
came, so that whoever takes it says so: that is no fault of the peer's.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import select
import socket
import struct
import termios
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from ...errors import (
    DeadlineError,
    FastsplitError,
    PeerLostError,
    RemoteProtocolError,
    ResourceError,
)
from ...system.forked import renew
from ...system.shortage import no_descriptor, shortage
from ..session import Event, Session
from .base import remaining_s
from .meter import MIN_NBYTES, Meter
from .spin import Spin

__all__ = [
    "SEND_FLAGS",
    "Stream",
    "lost",
]

_MAX_IOVECS = 64  # of 1024 that Linux takes; a message has at most a few
_DONTWAIT = int(socket.MSG_DONTWAIT)  # socket's own constants are enums, slow to combine
SEND_FLAGS = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)  # a peer that is gone is an error, never a signal
_TICKS_S = (16.0, 1.0)
"""A read's SO_RCVTIMEO, when its deadline is further away: setting it for each call would cost a system call a call."""
_DISCARD_NBYTES = 64 * 1024
_DISCARDED = memoryview(bytearray(_DISCARD_NBYTES))  # everybody's: what is in it says nothing
_MAX_DISCARDS = 64
_MAX_DESCRIPTORS = 4
"""Descriptors in one message; fastsplit sends one at a time. What is more is the peer's fault."""
_MAX_UNCLAIMED = 128
"""Descriptors whose announcements have not been read yet: those of many segments may come at once."""
_DROPPED = -1
"""In the place of a descriptor that came while there was none left here."""
_CUT_OFF = int(socket.MSG_CTRUNC)
_ANCILLARY_NBYTES = socket.CMSG_SPACE(4 * _MAX_DESCRIPTORS)
_CLOSE_ON_EXEC = int(getattr(socket, "MSG_CMSG_CLOEXEC", 0))


class Stream:
    """One connected socket. Owns it. `spin_us`: how long a blocking read spins before it sleeps, see `_spin_for_bytes`.

    `with_descriptors`: the peer may send descriptors; they are collected in `descriptors`, whose owner closes them.
    `meter`: is told how fast payloads come in.
    """

    whole_frames = False
    """A frame's bytes may be sent in parts, and several frames together."""
    passes_descriptors = True

    def __init__(
        self,
        sock: socket.socket,
        spin_us: float = 0.0,
        *,
        with_descriptors: bool = False,
        meter: Meter | None = None,
    ) -> None:
        self.meter = meter
        self.descriptors: deque[int] = deque()
        self._with_descriptors = with_descriptors
        self.spin = Spin(spin_us)
        self._readable = select.poll()
        self._readable.register(sock, select.POLLIN)
        self._sock = sock
        self.send_now = sock.send
        """The system call itself, with its OSErrors."""
        self._timeout_s = 0.0
        self._writable = select.poll()
        self._writable.register(sock, select.POLLOUT)
        self._either = select.poll()
        self._either.register(sock, select.POLLIN | select.POLLOUT)
        self._close_lock = threading.RLock()  # a signal's handler may close in the middle of a close
        self._message: Any = ()  # what recvmsg gave, until note was taken of it
        self.arrived = 0  # of reads that are for no session
        self.bytes_sent = 0
        self.bytes_received = 0

    def send(self, buffers: Sequence[Any], nbytes: int = -1) -> Sequence[Any]:
        """Sends what the kernel takes now, in one system call, and returns what is left of `buffers`.

        `nbytes`, where the caller knows it: all bytes of the buffers, which then need not be added up. The buffers must
        not change until all of them are sent. Raises PeerLostError.
        """
        try:
            sent = self._sock.sendmsg(buffers if len(buffers) <= _MAX_IOVECS else buffers[:_MAX_IOVECS], (), SEND_FLAGS)
        except BlockingIOError:
            return buffers
        except OSError as error:
            raise lost(error) from None
        self.bytes_sent += sent
        if sent == nbytes:
            return ()
        for index, buffer in enumerate(buffers):
            size = memoryview(buffer).nbytes
            if sent < size:
                rest = memoryview(buffer).cast("B")[sent:] if sent else buffer
                return [rest, *buffers[index + 1 :]]
            sent -= size
        return ()

    def send_all(self, buffers: Sequence[Any], deadline: float | None) -> None:
        """Sends everything, waiting if it must. Raises PeerLostError, DeadlineError (then the stream is in doubt)."""
        left = self.send(buffers)
        while left:
            self.wait(deadline, reading=False)
            left = self.send(left)

    def send_with_descriptor(self, data: Any, fd: int, deadline: float | None) -> None:
        """Sends `data`, and with its first byte a descriptor. Raises PeerLostError, DeadlineError."""
        sent, left = self.send_with_descriptor_now(data, fd)
        while not sent:
            self.wait(deadline, reading=False)
            sent, left = self.send_with_descriptor_now(data, fd)
        if left:
            self.send_all(left, deadline)

    def send_with_descriptor_now(self, data: Any, fd: int) -> tuple[bool, Sequence[Any]]:
        """Sends as much of `data` as the kernel takes now, and with its first byte a descriptor. Returns whether the
        descriptor went, and what is left of `data`.

        Raises PeerLostError, ResourceError (nothing was sent: too many descriptors are under way).
        """
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        try:
            sent = self._sock.sendmsg([data], ancillary, SEND_FLAGS)
        except BlockingIOError:
            return False, [data]
        except OSError as error:
            if error.errno == errno.ETOOMANYREFS:
                raise ResourceError(f"a descriptor cannot be sent: {shortage(error)}") from None
            raise lost(error) from None
        self.bytes_sent += sent
        return True, [memoryview(data)[sent:]] if sent < len(data) else ()

    def wait(self, deadline: float | None, *, reading: bool) -> tuple[bool, bool]:
        """Waits until the socket is (readable, writable); readable only if `reading`. Raises DeadlineError, also where
        the deadline has passed and the socket is ready."""
        timeout_s = remaining_s(deadline)
        if timeout_s == 0.0:
            raise DeadlineError("the peer took too long to read")
        poll = self._either if reading else self._writable
        ready = poll.poll(None if timeout_s is None else timeout_s * 1000)
        if not ready:
            raise DeadlineError("the peer took too long to read")
        events = ready[0][1]
        # an error or a hang-up counts as both: the next read or write says what it is
        return reading and bool(events & ~select.POLLOUT), bool(events & ~select.POLLIN)

    def receive(
        self, session: Session, deadline: float | None, *, blocking: bool = True, events: list[Event] | None = None
    ) -> list[Event] | None:
        """Reads once and gives it to the session; returns `events`, a new list by default, with what that completed at
        its end; None at the end of the stream.

        Raises PeerLostError, DeadlineError (nothing is lost, another read may go on).
        """
        if session.unfinished or session.arrived:  # another one was interrupted
            return session.received(session.arrived, events)
        if blocking and self.spin.spin_us:
            self._spin_for_bytes()
        received = self._receive_into(session.receive_buffers(), deadline, 0 if blocking else _DONTWAIT, session)
        if not received:
            return None
        if self.meter is None:
            return session.received(received, events)
        before = session.payload_left
        if before and before == received:
            self.meter.payload_ended()  # before it is decoded
        events = session.received(received, events)
        if session.payload_left >= MIN_NBYTES and not before:
            self.meter.payload_begins(session.payload_left, self._waiting_nbytes())
        return events

    def _waiting_nbytes(self) -> int:
        """What has arrived and was not read yet; very many where the system does not say."""
        waiting = array.array("i", [0])
        try:
            fcntl.ioctl(self._sock, termios.FIONREAD, waiting)
        except OSError:  # vsock of older kernels
            return 2**62
        return waiting[0]

    def receive_bell(self, scratch: memoryview, deadline: float | None) -> bool:
        """Sleeps until the peer sends a byte, which says nothing. False at the end of the stream.

        Raises PeerLostError, DeadlineError.
        """
        try:
            return self._receive_into([scratch], deadline, 0) > 0
        except PeerLostError:
            return False

    def has_bytes(self) -> bool:
        """Whether something to read is there (or the end of the stream). Takes a system call."""
        return bool(self._readable.poll(0))

    def wake_early(self) -> None:
        """A socket's sleeper is only woken by bytes of a frame."""

    def prepare_to_sleep(self, *, for_items: bool, for_space: bool) -> float | None:
        """As Ring.prepare_to_sleep: a socket is readable when there is something to read."""
        return None

    def awake(self) -> None:
        """As Ring.awake."""

    def take_descriptor(self) -> int | None:
        """The next descriptor that came, the caller's to close; None if there is none.

        Raises ResourceError if one came, but this process had none left for it.
        """
        if not self.descriptors:
            return None
        fd = self.descriptors.popleft()
        if fd == _DROPPED:
            raise ResourceError(f"a descriptor that came cannot be taken: {no_descriptor()}")
        return fd

    def receive_descriptors(self, scratch: memoryview) -> None:
        """Collects what is there already: descriptors, and bytes that say nothing."""
        with contextlib.suppress(DeadlineError, PeerLostError):
            for _ in range(_MAX_DISCARDS):  # a peer may send bytes for ever
                if self.descriptors or not self._receive_into([scratch], None, _DONTWAIT):
                    break

    def drain(self) -> bool:
        """Drops bytes that are there, some of them; descriptors are collected. False at the end of the stream.

        Never waits. Raises PeerLostError, RemoteProtocolError.
        """
        try:
            return self._receive_into([_DISCARDED], None, _DONTWAIT) > 0
        except DeadlineError:
            return True

    def receive_into(self, buffers: Sequence[memoryview], deadline: float | None, *, blocking: bool = True) -> int:
        """Reads at least one byte into the buffers, in order; returns how many, 0 at the end of the stream.

        Raises PeerLostError, DeadlineError (nothing is lost, another read may go on).
        """
        if blocking and self.spin.spin_us:
            self._spin_for_bytes()
        return self._receive_into(buffers, deadline, 0 if blocking else _DONTWAIT)

    def _receive_into(
        self, buffers: Sequence[memoryview], deadline: float | None, flags: int, sink: Session | Stream | None = None
    ) -> int:
        """Reads, and returns how many bytes; they are `sink.arrived` in the moment they have been read (session.py)."""
        sink = self if sink is None else sink
        while True:
            if not flags:
                self._arm(deadline)
            try:
                if len(buffers) == 1 and not self._with_descriptors:
                    if flags:
                        (sink.arrived,) = map(self._sock.recv_into, buffers, (0,), (flags,))
                    else:
                        (sink.arrived,) = map(self._sock.recv_into, buffers)
                else:
                    if not self._message:
                        ancillary_nbytes = _ANCILLARY_NBYTES if self._with_descriptors else 0
                        parameters = (buffers[:_MAX_IOVECS],), (ancillary_nbytes,), (flags | _CLOSE_ON_EXEC,)
                        (self._message,) = map(self._sock.recvmsg_into, *parameters)
                    _, ancillary, message_flags, _ = self._message
                    if ancillary or message_flags & _CUT_OFF:
                        try:
                            self._keep_descriptors(ancillary, message_flags)
                        except RemoteProtocolError:
                            self._message = ()
                            raise
                    sink.arrived, self._message = self._message[0], ()
            except BlockingIOError:
                if flags:
                    raise DeadlineError("nothing to read") from None
                if deadline is not None and time.monotonic() >= deadline:
                    raise DeadlineError("nothing came from the peer") from None
            except OSError as error:
                raise lost(error) from None
            else:
                received = sink.arrived
                self.bytes_received += received
                return received

    def _keep_descriptors(self, ancillary: list[tuple[int, int, bytes]], message_flags: int) -> None:
        came = 0
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
                self.descriptors.extend(fds)
                came += len(fds)
        if message_flags & _CUT_OFF:
            if came >= _MAX_DESCRIPTORS:
                raise RemoteProtocolError(f"descriptors: more than {_MAX_DESCRIPTORS} in one message, expected one")
            self.descriptors.append(_DROPPED)  # there was room for it in the message, but no descriptor left here
        if len(self.descriptors) > _MAX_UNCLAIMED:
            raise RemoteProtocolError(f"descriptors: {len(self.descriptors)} without a SEGMENT, expected one for each")

    def linger(self, deadline: float) -> None:
        """Ends the writing direction, and drops what the peer still sends until it closes or the deadline passes.

        Closing at once, with bytes unread, would reset the connection and could take our last frame with it.
        """
        scratch = memoryview(bytearray(64 * 1024))
        try:
            self._sock.shutdown(socket.SHUT_WR)
            while self.receive_into([scratch], deadline) and time.monotonic() < deadline:
                pass
        except (OSError, FastsplitError):
            return  # it is gone, or does not go, or sends nonsense: either way we have done what we could

    def fileno(self) -> int:
        """The socket's descriptor, for an event loop to watch; -1 once it is closed."""
        return self._sock.fileno()

    def shutdown_writing(self) -> None:
        """Ends only the writing direction: the peer reads what was sent, then the end."""
        with self._close_lock, contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def shutdown(self) -> None:
        """Ends both directions; a thread that waits in a read or a write wakes up with the end of the stream."""
        with self._close_lock, contextlib.suppress(OSError):  # not connected any more, or closed: what was wanted
            self._sock.shutdown(socket.SHUT_RDWR)

    def shutdown_reading(self) -> None:
        """Ends only the reading direction, as if the peer had sent its last byte."""
        with self._close_lock, contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RD)

    def leave(self) -> None:
        """For a forked child: closes the descriptors, and leaves the stream to the parent."""
        renew(self._close_lock)
        self._sock.close()
        self._close_descriptors()

    def close(self) -> None:
        """Closes the socket. Call `shutdown` first if another thread may be in a read or a write."""
        with self._close_lock:
            # Bytes that nobody read would reset the connection, and the peer could lose what we sent last.
            with contextlib.suppress(OSError):
                for _ in range(_MAX_DISCARDS):
                    if not self._sock.recv(_DISCARD_NBYTES, _DONTWAIT):
                        break
            self._sock.close()
            self._close_descriptors()

    def _close_descriptors(self) -> None:
        while self.descriptors:
            fd = self.descriptors.popleft()
            if fd != _DROPPED:
                os.close(fd)

    def peer_name(self) -> str:
        """The peer's name for logs: `127.0.0.1:4567`, or `process 123` on a unix socket."""
        try:
            if self._sock.family == socket.AF_UNIX:
                pid = int.from_bytes(self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 4), "little")
                return f"process {pid}"
            host, port = self._sock.getpeername()[:2]
        except OSError:  # gone already
            return "a client that has left"
        host = str(host).removeprefix("::ffff:")
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def peer_left(self) -> bool:
        """Whether the peer has ended its writing direction, or is gone. Takes a system call; reads nothing."""
        poll = select.poll()
        try:
            poll.register(self._sock, select.POLLRDHUP)
        except (OSError, ValueError):  # closed
            return True
        return bool(poll.poll(0))

    def _spin_for_bytes(self) -> None:
        """Looks for bytes again and again, for `spin_us` at most; for nothing while the peer is slower than that.

        A sleep that ends at once costs more than it saves: the wake-up itself, an idle core's way back, and caches that
        have gone cold (all Python code is then two to three times slower). Measured on two cores, a call with a
        64-byte tensor over a unix socket: 90 us -> 27 us with numpy arrays, 109 us -> 31 us with torch's.
        """
        if not self.spin.begin():
            return
        poll = self._readable.poll
        end_ns = time.perf_counter_ns() + int(self.spin.spin_us * 1e3)
        while not poll(0):
            if time.perf_counter_ns() >= end_ns:
                self.spin.miss()
                return
        self.spin.hit()

    def _arm(self, deadline: float | None) -> None:
        if deadline is None:
            timeout_s = 0.0
        else:
            timeout_s = deadline - time.monotonic()
            if timeout_s >= _TICKS_S[0]:
                timeout_s = _TICKS_S[0]
            elif timeout_s >= _TICKS_S[1]:
                timeout_s = _TICKS_S[1]
            elif timeout_s <= 0.0:
                timeout_s = 1e-6
        if timeout_s != self._timeout_s:
            seconds = int(timeout_s)
            micros = int((timeout_s - seconds) * 1e6) or (0 if seconds or not timeout_s else 1)
            try:
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", seconds, micros))
            except OSError as error:
                raise lost(error) from None
            self._timeout_s = timeout_s


def lost(error: OSError) -> PeerLostError:
    """What an error of the system's means for a connection."""
    return PeerLostError(f"the connection is lost: {error.strerror or error}")

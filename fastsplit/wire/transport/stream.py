"""A transport over one connected kernel socket: short reads and writes, deadlines, and the end of the peer.

The interface and its contract are in base.py. This module adds:

The socket is blocking, and is still written with MSG_DONTWAIT. A read is one system call: SO_RCVTIMEO gives it its
deadline. A write never blocks, so that its caller can read meanwhile: two peers that both only write would wait for
ever. A read that times out loses nothing: what arrived is in the sink.

On a socket that passes descriptors, reads take them along: a plain read would drop them.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import select
import socket
import struct
import termios
import threading
import time
from collections.abc import Sequence
from typing import Any

from ...errors import DeadlineError, FastsplitError, PeerLostError, RemoteProtocolError, ResourceError
from ...system.forked import renew
from ...system.shortage import shortage
from .base import Sink, Transport, lost, remaining_s
from .descriptors import ANCILLARY_NBYTES, CUT_OFF, Descriptors, ancillary
from .meter import MIN_NBYTES, Meter
from .spin import Spin

__all__ = ["SEND_FLAGS", "Stream"]

_MAX_IOVECS = 64  # of 1024 that Linux takes; a message has at most a few
_DONTWAIT = int(socket.MSG_DONTWAIT)  # socket's own constants are enums, slow to combine
SEND_FLAGS = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)  # a peer that is gone is an error, never a signal
_TICKS_S = (16.0, 1.0)
"""A read's SO_RCVTIMEO, when its deadline is further away: setting it for each call would cost a system call a call."""
_DISCARD_NBYTES = 64 * 1024
_DISCARDED = memoryview(bytearray(_DISCARD_NBYTES))  # padding of all streams goes here; it is never read
_MAX_DISCARDS = 64
_CLOSE_ON_EXEC = int(getattr(socket, "MSG_CMSG_CLOEXEC", 0))


class Stream(Transport):
    """One connected socket, which it owns. `spin_us`: how long a blocking read spins before it sleeps.

    `passes_descriptors`: the peer may send descriptors. `meter` measures how fast payloads come in. Both may be set
    until the peer's HELLO is read.
    """

    bytes_sent = 0
    bytes_received = 0

    def __init__(
        self,
        sock: socket.socket,
        spin_us: float = 0.0,
        *,
        passes_descriptors: bool = False,
        meter: Meter | None = None,
    ) -> None:
        self.meter = meter
        self.passes_descriptors = passes_descriptors
        self.descriptors = Descriptors()
        self.spin = Spin(spin_us)
        self._readable = select.poll()
        self._readable.register(sock, select.POLLIN)
        self._sock = sock
        self.send_now = sock.send
        """The system call itself, with its OSErrors."""
        self.timeout_s = 0.0
        """The socket's SO_RCVTIMEO, 0 for none; below 0 once it is closed."""
        self.failure: OSError | None = None
        """What a read of the fast path's got."""
        self._writable = select.poll()
        self._writable.register(sock, select.POLLOUT)
        self._either = select.poll()
        self._either.register(sock, select.POLLIN | select.POLLOUT)
        self._close_lock = threading.RLock()  # a signal's handler may close in the middle of a close
        self._message: Any = ()  # what recvmsg gave, until note was taken of it
        self.arrived = 0  # of reads that are for no sink

    def send(self, buffers: Sequence[Any], nbytes: int = -1) -> Sequence[Any]:
        """Sends what the kernel takes now, in one system call, and returns what is left of `buffers`.

        `nbytes`: of all buffers; where the caller knows it, they need not be added up. Raises PeerLostError.
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

    def send_with_descriptor_now(self, frame: Any, fd: int) -> tuple[bool, Sequence[Any]]:
        """Sends as much of `frame` as the kernel takes now, and with its first byte the descriptor.

        Raises PeerLostError, ResourceError (nothing was sent: too many descriptors are under way).
        """
        try:
            sent = self._sock.sendmsg([frame], ancillary(fd), SEND_FLAGS)
        except BlockingIOError:
            return False, [frame]
        except OSError as error:
            if error.errno == errno.ETOOMANYREFS:
                raise ResourceError(f"a descriptor cannot be sent: {shortage(error)}") from None
            raise lost(error) from None
        self.bytes_sent += sent
        return True, [memoryview(frame)[sent:]] if sent < len(frame) else ()

    def wait(self, deadline: float | None, *, reading: bool) -> tuple[bool, bool]:
        """Waits until the socket is (readable, writable). Raises DeadlineError."""
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
        self, sink: Sink, deadline: float | None, *, blocking: bool = True, events: list[Any] | None = None
    ) -> list[Any] | None:
        """Reads once into the sink's buffers. Returns the sink's events; None at the end of the stream.

        Raises PeerLostError, DeadlineError, RemoteProtocolError.
        """
        if sink.unfinished:  # an earlier read was interrupted
            return sink.received(sink.arrived, events)
        received = sink.arrived  # of one that was interrupted, or of the fast path's
        if not received:
            if self.failure is not None:
                raise lost(self.failure) from None
            if blocking and self.spin.spin_us:
                self._spin_for_bytes()
            received = self._receive_into(sink.receive_buffers(), deadline, 0 if blocking else _DONTWAIT, sink)
        if not received:
            return None
        meter = self.meter  # a HELLO may take it away meanwhile
        if meter is None:
            return sink.received(received, events)
        before = sink.payload_left
        if before and before == received:
            meter.payload_ended()  # before it is decoded
        events = sink.received(received, events)
        if sink.payload_left >= MIN_NBYTES and not before:
            meter.payload_begins(sink.payload_left, self._waiting_nbytes())
        return events

    def _waiting_nbytes(self) -> int:
        """Bytes that have arrived and were not read yet; 2**62 where the system does not say."""
        waiting = array.array("i", [0])
        try:
            fcntl.ioctl(self._sock, termios.FIONREAD, waiting)
        except OSError:  # vsock of older kernels
            return 2**62
        return waiting[0]

    def receive_bell(self, scratch: memoryview, deadline: float | None) -> bool:
        """Sleeps until the peer rings the bell, whose byte goes to `scratch`. False at the end of the stream.

        Raises DeadlineError, RemoteProtocolError.
        """
        try:
            return self._receive_into([scratch], deadline, 0) > 0
        except PeerLostError:
            return False

    def has_bytes(self) -> bool:
        """Whether there is something to read, or the end of the stream. Takes a system call."""
        return bool(self._readable.poll(0))

    def take_descriptor(self) -> int | None:
        return self.descriptors.take()

    def receive_descriptors(self, scratch: memoryview) -> None:
        """Reads bells until a descriptor came along or there is nothing to read."""
        with contextlib.suppress(DeadlineError, PeerLostError):
            for _ in range(_MAX_DISCARDS):  # a peer may send bytes for ever
                if self.descriptors or not self._receive_into([scratch], None, _DONTWAIT):
                    break

    def drain(self) -> bool:
        """Drops up to 64 KiB that can be read now. Raises PeerLostError, RemoteProtocolError."""
        try:
            return self._receive_into([_DISCARDED], None, _DONTWAIT) > 0
        except DeadlineError:
            return True

    def receive_into(self, buffers: Sequence[memoryview], deadline: float | None, *, blocking: bool = True) -> int:
        """Reads at least one byte into the buffers, in order. Returns how many; 0 at the end of the stream.

        Raises PeerLostError, DeadlineError, RemoteProtocolError.
        """
        if blocking and self.spin.spin_us:
            self._spin_for_bytes()
        return self._receive_into(buffers, deadline, 0 if blocking else _DONTWAIT)

    def _receive_into(
        self, buffers: Sequence[memoryview], deadline: float | None, flags: int, sink: Sink | Stream | None = None
    ) -> int:
        """Reads, and returns how many bytes. The same step that reads them notes their number in `sink.arrived`."""
        sink = self if sink is None else sink
        while True:
            if not flags:
                self.arm(deadline)
            try:
                if len(buffers) == 1 and not self.passes_descriptors:
                    if flags:
                        (sink.arrived,) = map(self._sock.recv_into, buffers, (0,), (flags,))
                    else:
                        (sink.arrived,) = map(self._sock.recv_into, buffers)
                else:
                    if not self._message:
                        ancillary_nbytes = ANCILLARY_NBYTES if self.passes_descriptors else 0
                        parameters = (buffers[:_MAX_IOVECS],), (ancillary_nbytes,), (flags | _CLOSE_ON_EXEC,)
                        (self._message,) = map(self._sock.recvmsg_into, *parameters)
                    _, came_along, message_flags, _ = self._message
                    if came_along or message_flags & CUT_OFF:
                        try:
                            self.descriptors.keep(came_along, message_flags)
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

    def linger(self, deadline: float) -> None:
        """Ends the writing direction, and drops what the peer still sends until it closes or the deadline passes.

        Closing at once, with bytes unread, would reset the connection, and the peer could lose our last frame.
        """
        scratch = memoryview(bytearray(64 * 1024))
        try:
            self._sock.shutdown(socket.SHUT_WR)
            while self.receive_into([scratch], deadline) and time.monotonic() < deadline:
                pass
        except (OSError, FastsplitError):
            return  # the peer is gone, stays, or sends nonsense: nothing more can be done for our last frame

    def fileno(self) -> int:
        """The socket's descriptor; -1 once it is closed."""
        return self._sock.fileno()

    def shutdown_writing(self) -> None:
        with self._close_lock, contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def shutdown(self) -> None:
        """Ends both directions. A thread that waits in a read or a write wakes up with the end of the stream."""
        with self._close_lock, contextlib.suppress(OSError):  # no longer connected, or closed already
            self._sock.shutdown(socket.SHUT_RDWR)

    def shutdown_reading(self) -> None:
        with self._close_lock, contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RD)

    def leave(self) -> None:
        renew(self._close_lock)
        self.timeout_s = -1.0
        self._sock.close()
        self._close_descriptors()

    def _close_descriptors(self) -> None:
        message, self._message = self._message, ()
        if message:  # of a read that was interrupted, or of a fast path's
            with contextlib.suppress(RemoteProtocolError):
                self.descriptors.keep(message[1], message[2])
        self.descriptors.close()

    def close(self) -> None:
        """Closes the socket. Call `shutdown` first if another thread may be in a read or a write."""
        with self._close_lock:
            self.timeout_s = -1.0
            # Unread bytes would reset the connection, and the peer could lose what was sent last.
            with contextlib.suppress(OSError):
                for _ in range(_MAX_DISCARDS):
                    if not self._sock.recv(_DISCARD_NBYTES, _DONTWAIT):
                        break
            self._sock.close()
            self._close_descriptors()

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
        """Polls for bytes until some come, for `spin_us` at most; not at all while the peer is slower than that.

        A sleep that ends at once costs a wake-up, an idle core's way back, and caches that have gone cold: spinning
        makes a small call over a unix socket about three times faster (docs/notes.md).
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

    def arm(self, deadline: float | None) -> None:
        """Has a blocking read end at the deadline, or before: the reader looks again then."""
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
        if timeout_s != self.timeout_s:
            seconds = int(timeout_s)
            micros = int((timeout_s - seconds) * 1e6) or (0 if seconds or not timeout_s else 1)
            try:
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", seconds, micros))
            except OSError as error:
                raise lost(error) from None
            self.timeout_s = timeout_s

"""One end of a connection: transport, session, outbox and shared memory. What a Channel and a Server have in common.

Rules. `sending` covers the transport's writing side, the session's outgoing side and the outbox; the caller of a
method that sends holds it. The arena exists from the peer's HELLO on, if both sides agreed on one; the ring replaces
the transport during the handshake, before any request.

`close` releases at once what the connection holds. A half-received frame is dropped, even if an error's traceback still
leads to it. A connection that is not closed is freed by its reference count alone: the session and the arena call back
through weak references, so there is no cycle.
"""

from __future__ import annotations

import inspect
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ..errors import (
    ArenaFull,
    ClosedError,
    LimitError,
    RemoteProtocolError,
    ResourceError,
)
from ..schema.limits import Limits
from ..system.forked import renew, watch
from ..system.shortage import why as why_failed
from ..tensors import Outgoing, collect, share
from ..tensors.pool import Memory, Tenant
from .compression import AUTO, OFF, Codec, Coder
from .events import Probe, RingOffered
from .options import LinkOptions
from .outbox import Outbox
from .rules import CODES, MAX_PADDING_NBYTES, PROBES, SHARES, TYPES
from .session import Session
from .shm.arena import Arena
from .shm.negotiation import Offer, Sharing, agree, offer
from .shm.ring import RING_NBYTES, Ring
from .shm.segment import Memfd
from .stats import Stats
from .transport.meter import LinkEstimate, Meter
from .transport.scheme import Address, End

if TYPE_CHECKING:
    from .transport.stream import Stream

__all__ = ["Connection", "greeting", "weakly"]


_clients: weakref.WeakValueDictionary[str, Connection] = weakref.WeakValueDictionary()
"""The client sides of this process, by their tokens."""
greeting: set[int] = set()
"""Threads of servers that wait for the HELLO of an unknown client. Only a finalizer can call from there."""

_Callback = TypeVar("_Callback", bound=Callable[..., Any])
_PADDING = os.urandom(MAX_PADDING_NBYTES // 16)  # nothing on the way can compress it, but by its repetition


def _padding(nbytes: int) -> bytes:
    """Padding of a probe."""
    return (_PADDING * -(-nbytes // len(_PADDING)))[:nbytes]


def weakly(method: _Callback) -> _Callback:
    """The same bound method of an object that calls it only while it lives, without keeping that alive."""
    if not inspect.ismethod(method):
        return method
    reference = weakref.WeakMethod(method)

    def call(*args: Any) -> Any:
        found = reference()
        assert found is not None
        return found(*args)

    return call  # type: ignore[return-value]


class Connection:
    """Owns `end`, which `address` gave, also if the constructor fails. `on_memory_pressure(deadline)`: see Arena."""

    def __init__(
        self,
        end: End,
        address: Address,
        options: LinkOptions,
        *,
        is_client: bool,
        spin_us: float,
        on_memory_pressure: Callable[[float | None], None],
    ) -> None:
        try:
            can_code = Coder.capabilities()
        except ResourceError:
            end.close()
            raise
        self.is_client = is_client
        self._memory = Tenant(options.pool)
        self.arena: Arena | None = None
        self.shm_reason = "off: not agreed on yet"
        self.sending = threading.Lock()
        self.inside: set[int] = set()
        """Client: threads that must not call now, since they would wait for themselves. They read or send for this
        connection, or they are the server's thread of this very connection."""
        self.left: str | None = None
        """In a forked child: why this connection cannot be used."""
        self.lent_nbytes = 0
        """Tensor bytes that went out by reference. The sender counts them."""
        self.fast_path: Any = None
        """See fastpath.py; None if it has none."""
        self._on_memory_pressure = weakly(on_memory_pressure)
        self._hook = options.on_segment
        self._sharing: Sharing | None = None
        self.coder = Coder(self._memory, options.codec_threshold_nbytes)
        self.meter = None if address.is_local else Meter()
        """Measures the link, where it may lead to another host and nothing is shared."""
        self.is_peer_local = address.is_peer_local(end)
        self._offer = offer(address, self.is_peer_local, is_client=is_client)
        transport = self.transport = address.transport(end)
        transport.spin.spin_us = spin_us
        transport.meter = self.meter
        transport.passes_descriptors = Memfd.kind in self._offer.kinds
        self.session = Session(
            is_client=is_client,
            allocate=self._memory.allocate,
            limits=options.limits,
            capabilities=(SHARES if self._offer.kinds else 0)
            | (PROBES if self.meter is not None else 0)
            | (CODES | can_code | TYPES),
            codings=self.coder,
            offer=self._offer.attrs(),
            on_hello=weakly(self._on_hello),
        )
        self.outbox = Outbox(self.session, self.transport)
        if is_client:
            _clients[self._offer.token] = self
        self._inside_there: set[int] | None = None  # server: the client side's `inside`, if that is in this process
        self._serving: set[int] = set()
        watch(self)

    def serves_in(self, *threads: int) -> None:
        """Server: adds threads that answer this connection's requests, beside the one that reads the HELLO. They must
        not call through the connection's other end, if that is in this process: they would wait for themselves."""
        self._serving.update(threads)
        if self._inside_there is not None:
            self._inside_there.update(self._serving)

    def serves_no_longer_in(self, thread: int) -> None:
        """Server: a thread ends, whose number may be given to another one."""
        self._serving.discard(thread)
        if self._inside_there is not None:
            self._inside_there.discard(thread)

    # ---- memory ----

    def allocate(self, nbytes: int, deadline: float | None = None) -> Memory:
        """Memory that this connection sends from fastest, flat uint8. Raises ArenaFull, at the deadline if shared,
        ClosedError in a forked child."""
        if self.left is not None:
            raise ClosedError(self.left)
        arena = self.arena
        if arena is not None and not arena.closed:
            try:
                return arena.allocate(nbytes, deadline)
            except ArenaFull:
                if not arena.closed:  # else the connection ended meanwhile
                    raise
        return self._memory.allocate(nbytes)

    def prepare(
        self, op: str, tensors: Sequence[Any], deadline: float | None, cast: int = 0, codec: Codec = OFF
    ) -> Outgoing:
        """What is needed to send tensors. Where memory is shared, they are not coded.

        Raises TensorError, LimitError, ArenaFull at the deadline, ClosedError in a forked child.
        """
        if self.left is not None:
            raise ClosedError(self.left)
        arena, limits = self.arena, self.session.peer_limits
        assert limits is not None  # nothing is sent before the handshake
        try:
            if arena is not None:
                return share(tensors, arena, deadline, limits)
            if not cast and codec == OFF:
                return collect(tensors, limits)
            bytes_per_s = 0.0
            if codec is AUTO and self.meter is not None and not self.is_near:
                bytes_per_s = self.meter.peer_bytes_per_s
            if not cast and codec is AUTO and not bytes_per_s:
                return collect(tensors, limits)
            return self.coder.collect(op, tensors, cast, codec, bytes_per_s, limits)
        except LimitError as error:
            raise LimitError(f"{op!r}, {error}") from None

    @property
    def is_near(self) -> bool:
        """Whether the peer is on this host. Loopback round trips of 2 ms or more mean a relay: False."""
        return self.meter is None or (self.is_peer_local and self.meter.is_near)

    @property
    def can_code(self) -> bool:
        """Whether codings were agreed on, and flags that ask for them."""
        return bool(self.coder.accepted)

    @property
    def estimate(self) -> LinkEstimate:
        """What is known of the link; nothing where it cannot lead to another host."""
        return LinkEstimate() if self.meter is None else self.meter.estimate()

    def probe(self, nbytes: int) -> tuple[int, list[Any]]:
        """Client: a probe's number and its frame, with `nbytes` each way, or as many as both sides accept.
        The caller holds `sending`, and sends it now."""
        meter, session = self.meter, self.session
        assert meter is not None and session.peer_limits is not None
        number = meter.next_probe()
        nbytes = min(nbytes, session.peer_limits.max_message_nbytes, session.limits.max_message_nbytes)
        head = session.probe(number, nbytes, nbytes, meter.received_bytes_per_s, meter.rtt_s or 0.0)
        return number, [head, _padding(nbytes)] if nbytes else [head]

    def probe_answer(self, probe: Probe) -> list[Any]:
        """Server: the answer to a probe, a frame. The caller holds `sending`, and sends it now."""
        meter = self.meter
        assert meter is not None
        head = self.session.probe_answer(probe.number, probe.wanted, meter.received_bytes_per_s)
        return [head, _padding(probe.wanted)] if probe.wanted else [head]

    @property
    def is_probe_due(self) -> bool:
        return (
            self.meter is not None
            and bool(self.session.capabilities & PROBES)
            and self.meter.is_probe_due(sum(self._sent_and_received()))
        )

    def fill(self, stats: Stats) -> None:
        """Writes what the transport, the session, the arena and the fast path count into `stats`."""
        stats.bytes_sent, stats.bytes_received = self._sent_and_received()
        stats.bytes_staged = self.session.staged_nbytes
        stats.casts_widened, stats.codecs = self.coder.too_large, self.coder.stats
        stats.bytes_shared = self.lent_nbytes + (0 if self.arena is None else self.arena.shared_nbytes)
        if self.fast_path is not None:
            stats.bytes_staged += self.fast_path.staged_nbytes
            stats.bytes_shared += self.fast_path.lent_nbytes + self.fast_path.shared_nbytes

    def _sent_and_received(self) -> tuple[int, int]:
        sent, received = self.transport.bytes_sent, self.transport.bytes_received
        if self.fast_path is None:
            return sent, received
        return sent + self.fast_path.sent_nbytes, received + self.fast_path.received_nbytes

    # ---- the handshake ----

    def _on_hello(self, attrs: dict[str, Any], peer_limits: Limits) -> Arena | None:
        peer = Offer.of(attrs)
        client, server = (self._offer, peer) if self.is_client else (peer, self._offer)
        sharing = self._sharing = agree(client, server, is_client=self.is_client)
        if not self.is_client:
            twin = _clients.get(peer.token)
            self._inside_there = None if twin is None else twin.inside
            self.serves_in(threading.get_ident())
            greeting.discard(threading.get_ident())  # a request may have come with the HELLO, and its handler may call
        self.shm_reason = sharing.reason
        if sharing.factory is None:
            self.transport.passes_descriptors = False
            if self.session.capabilities & CODES:
                self.coder.agree(self.session.capabilities)
            return None
        self.meter = None
        self.transport.meter = None
        if not isinstance(sharing.factory, Memfd) and self._offer.prefix:  # not where the peer says
            sharing.factory.sweep()
        self.arena = Arena(
            is_client=self.is_client,
            factory=sharing.factory,
            take_descriptor=weakly(self._take_descriptor),
            on_memory_pressure=self._on_memory_pressure,
            limits=self.session.limits,
            peer_limits=peer_limits,
            hook=self._hook,
        )
        self.outbox.arena = self.arena
        return self.arena

    def _take_descriptor(self) -> int | None:
        return self.transport.take_descriptor()  # of the transport that is there by then

    def offer_ring(self, deadline: float | None) -> Callable[[str], None] | None:
        """Client: makes the ring and announces it. Returns what to call with the server's answer; None for no ring."""
        sharing, transport = self._sharing, self.transport
        if sharing is None or sharing.factory is None or not sharing.ring or transport.whole_frames:
            return None
        try:
            memory, fd, name = sharing.factory.create(RING_NBYTES)
        except ArenaFull as error:
            self._without_ring(str(error))
            return None
        try:
            Ring.format(memory)
            frame = self.session.segment(0, RING_NBYTES, name)
            if fd is None:
                transport.send_all([frame], deadline)
            else:
                left = transport.send_with_descriptor(frame, fd, deadline)
                if left:
                    transport.send_all(left, deadline)
        except ResourceError as error:  # nothing was sent
            self._without_ring(str(error))
            return None
        finally:
            if fd is not None:
                os.close(fd)

        def on_attached(text: str) -> None:
            if text:
                self._without_ring(text)
            else:
                self._use(Ring(cast("Stream", transport), memory, is_client=True))

        return on_attached

    def attach_ring(self, event: RingOffered, deadline: float | None) -> None:
        """Server: maps the client's ring and says so; if that fails, says why, and both go on with the socket.

        Raises RemoteProtocolError.
        """
        sharing, transport = self._sharing, self.transport
        if sharing is None or sharing.factory is None or not sharing.ring or transport.whole_frames:
            raise RemoteProtocolError("SEGMENT, id: 0, expected no ring, or no other one")
        try:
            fd = transport.take_descriptor() if not event.name else None
            memory = sharing.factory.attach(fd, event.name, event.nbytes)
        except (OSError, ResourceError) as error:
            reason = why_failed(error) if isinstance(error, OSError) else error
            why = f"the server cannot map the ring: {reason}"
            self._without_ring(why)
            transport.send_all([self.session.attached(why)], deadline)
            return
        ring = Ring(cast("Stream", transport), memory, is_client=False)
        transport.send_all([self.session.attached("")], deadline)
        self._use(ring)

    def _use(self, ring: Ring) -> None:
        self.transport = self.outbox.transport = ring

    def _without_ring(self, why: str) -> None:
        self.shm_reason = f"{self.shm_reason.partition(',')[0]}, control over the socket: {why}"

    # ---- the end ----

    def leave(self, why: str) -> None:
        """For a forked child: see system/forked.py."""
        if self.left is None:
            self.left = why
            self.inside.clear()
            self.sending = threading.Lock()  # a new one: this very thread may hold the old one, and will release it
            renew(self.coder.lock)
            self.outbox.close()
            self.transport.leave()
            if self.arena is not None:
                self.arena.leave()

    def close(self) -> None:
        """Closes the transport, and releases half-received frames and shared memory; tensors in it live on.

        No thread may be sending or reading. Idempotent.
        """
        self.transport.close()
        self.outbox.close()
        self.session.close()
        if self.arena is not None:
            self.arena.close()
        self._memory.close()

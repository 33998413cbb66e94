"""The client: calls, futures, and the one thread that reads for all.

How waiting works. A hand-over between threads costs more than a round trip, so a caller that waits for a reply reads
the socket, for itself and for all others; the others sleep until their reply is in or the reader leaves and one of them
takes over. A sender that finds the socket full reads too, so that two sides that both send large messages never wait
for each other. While requests are in flight and no caller reads, a thread of the channel does (watcher.py). At the
peer's limit of requests in flight a caller waits for its turn, in order, as it waits for a reply: by reading.

Callbacks run in a thread that has just read or sent, when it has stopped doing so: a callback may do all that other
code may, calls included. One thread runs one callback at a time. A finalizer, which the collector may run anywhere, and
a signal's handler may find their thread in the middle of a call; then a call of theirs is a ReentrantCallError, at
once.

Interrupts (session.py). A signal's handler that raises while a call waits (Ctrl-C) ends that call alone: it is
cancelled. One that raises while a frame is sent, or takes effect, ends the connection. Each lock is taken, and noted as
taken, in one step: `(held,) = map(acquire, ...)`; it is released first thing in a `finally`.

Rules. A deadline that passes while waiting costs only that call: a CANCEL goes out and the answer is dropped when it
comes. One that passes in the middle of a send, and any other error there, ends the connection, as does any error of the
peer's; then every call in flight gets that error. All public methods are thread-safe.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from threading import get_ident
from time import monotonic, perf_counter_ns
from typing import Any

from ... import tensors
from ...errors import (
    ArenaFull,
    ClosedError,
    DeadlineError,
    FastsplitError,
    PeerLostError,
    ReentrantCallError,
    RemoteProtocolError,
    ResourceError,
    TensorError,
    fresh,
)
from ...printable import get_logger
from ...schema.attrs import call_attrs
from ...schema.coding import CAST_NAMES, CODEC_NAMES
from ...schema.header import reply_flags
from ...schema.limits import Limits, parse_limits
from ...system.forked import renew, watch
from ...system.threads import Workers, call_safely
from ...tensors import Arrays, Outgoing, parse_expect
from ...tensors.pool import Pool, pool
from ..compression import THRESHOLD_NBYTES, parse_cast, parse_codec
from ..connection import Connection, greeting
from ..events import Attached, Error, Event, Failed, Goodbye, Hello, Probe, Reply, ReturnsWanted
from ..frames import MAX_RETURNS
from ..future import CallTimeout, Future, Result, remote_error, warn_of_discarded, why_closed
from ..options import _parse_hook, _parse_pool, parse_count, parse_flag, parse_timeout
from ..outbox import Frame
from ..rules import MAX_PADDING_NBYTES, PROBES
from ..shm.segment import Hook
from ..stats import Stats
from ..transport.address import parse_address
from ..transport.base import remaining_s
from ..transport.meter import HANDSHAKE_PADDING_NBYTES, LinkEstimate
from ..transport.spin import choose_spin_us
from .flush import ask_for_returns, flush_in, send_returns, send_small, wait_for_room
from .watcher import Watcher

__all__ = ["Channel", "Future", "Result"]

_logger = get_logger("fastsplit.channel")

_RELIEF_S = 0.005  # how soon a sender that found another thread reading looks again whether it must read itself
_LOOK_EVERY_S = 1.0  # how often who waits for the reader looks whether there is one: an interrupted one may say nothing
_LAST_WORDS_S = 0.5  # how long a failed sender waits for another thread to read why
_UNSET: Any = object()
_LINGER_S = 0.5  # how long an aborted peer's bytes are read and dropped, so that it can read why
_LOOK_FOR_TURN_S = 0.02  # how often a request that waits for its turn looks whether another thread has made room
_JOIN_S = 1.0  # how long `close` waits for a callback that runs in the channel's own thread


class _Turn:
    """A request that waits until the peer accepts one more. Waited for like a Future."""

    __slots__ = ("_done",)

    def __init__(self) -> None:
        self._done = False


class Channel(CallTimeout):
    """A connection to a server. `fastsplit.connect` is this class; usable as a context manager.

    `arrays`: what calls give, "torch", "numpy" or "auto" (torch where it is installed). `timeout_s`: for connecting and
    the handshake. `call_timeout_s`: for each call that says nothing else, None for no deadline. `limits`: what is
    accepted from the server. `spin_us`: how long a caller spins for its reply before it sleeps (FASTSPLIT_SPIN_US, or
    50; 0 on one core). `pool`: where tensors that are not in shared memory take theirs. `on_segment(address, nbytes)`:
    called for each segment of shared memory that is mapped; it may give a function to call before that is unmapped.

    `wire_dtype`: "bfloat16" or "float16" has float32 tensors travel as that, both ways, and be float32 again where they
    arrive; with "float16" one whose numbers are too large for that travels as bfloat16 (stats.casts_widened). `codec`:
    how tensors of `codec_threshold_nbytes` or more are compressed: "zlib", "lz4", "zstd" or "blosc2" wherever bytes
    travel, "off", or "auto": if the link, as measured, is so slow that a sample says it pays; never on unix sockets, on
    loopback only where a round trip takes 2 ms (a relay). Where memory is shared nothing travels, and nothing is coded.

    `overlap`: two threads of the channel's own read and send, so that bytes travel while the caller computes. Then
    `submit` returns before its bytes are out: its tensors must not change before the result is in. Without it, the
    first `submit` starts a thread that reads when no caller does.

    On a unix socket memory is shared unless the URI says `?shm=off`; see `shm`, `shm_reason` and docs/protocol.md.

    Raises AddressError, ConnectError if nobody listens there, DeadlineError if there is no handshake in time, and
    RemoteProtocolError if what listens there is no fastsplit.
    """

    def __init__(
        self,
        uri: str,
        *,
        arrays: str | Arrays = "auto",
        timeout_s: float = 10.0,
        call_timeout_s: float | None = 300.0,
        limits: Limits | None = None,
        spin_us: float | None = None,
        pool: Pool = pool,
        on_segment: Hook | None = None,
        wire_dtype: str | None = None,
        codec: str = "auto",
        codec_threshold_nbytes: int = THRESHOLD_NBYTES,
        overlap: bool = False,
    ) -> None:
        timeout_s = parse_timeout("timeout_s", timeout_s)
        limits = parse_limits(limits)
        overlap = parse_flag("overlap", overlap)
        pool, on_segment = _parse_pool("pool", pool), _parse_hook("on_segment", on_segment)
        self.uri = uri
        self.call_timeout_s = call_timeout_s
        self._arrays = tensors.parse_arrays(arrays)
        self._cast, self._codec = parse_cast(wire_dtype), parse_codec(codec)
        self._sender: Workers | None = None
        self._watcher: Watcher | None = None
        self._watching = False  # the watcher waits for bytes, and leaves the reading to any caller
        self._events: list[Event] = []  # that came in, and were not handled yet
        self._callbacks: deque[tuple[Callable[[Future], object], Future]] = deque()  # of futures that are done
        self._calling_back: set[int] = set()  # threads that are in one of these
        self._probes: set[int] = set()  # those that somebody waits for
        self._stats = Stats()
        self._futures: dict[int, Future] = {}
        self._lock = threading.RLock()  # what a finalizer does in the middle of it may need it again
        self._changed = threading.Condition(self._lock)  # `_lock` guards the next four, and the futures' outcomes
        self._reading = 0  # the thread that does, 0 if none does
        self._followers = 0
        self._turns: deque[_Turn] = deque()  # requests that wait until the peer takes more
        self._most_inflight = 0  # as the peer says
        self._refusing = False  # closed, or about to be
        self._error: FastsplitError | None = None
        self._closed = False
        self._has_hello = False
        self._answers: list[Attached] = []  # the one to the ring that was offered
        deadline = time.monotonic() + timeout_s
        spin_us = choose_spin_us(spin_us)
        codec_threshold_nbytes = parse_count("codec_threshold_nbytes", codec_threshold_nbytes, 1)
        address = parse_address(uri)
        connection = self._connection = Connection(
            address.connect(timeout_s),
            address,
            is_client=True,
            limits=limits,
            spin_us=spin_us,
            pool=pool,
            on_memory_pressure=self._on_memory_pressure,
            hook=on_segment,
            codec_threshold_nbytes=codec_threshold_nbytes,
        )
        self._sending = connection.sending
        self._inside = connection.inside
        self._session = connection.session
        try:
            with contextlib.suppress(PeerLostError):  # refused at once: what the server said is still to be read
                connection.transport.send_all([self._session.hello()], deadline)
            self._read_until(lambda: self._has_hello, deadline)
            answered = connection.offer_ring(deadline)
            if answered is not None:
                self._read_until(lambda: bool(self._answers), deadline)
                answered(self._answers[0].text)
            if not self.shm:
                connection.coder.check(self._cast, self._codec)
            if self._session.capabilities & PROBES:
                self._measure(HANDSHAKE_PADDING_NBYTES, timeout_s, deadline)
            assert self._session.peer_limits is not None
            self._most_inflight = self._session.peer_limits.max_inflight
            if overlap and not self.shm:
                connection.coder.overlaps = True
                self._hire(keeps=True)
                self._sender = Workers(1, f"fastsplit-send {uri}")
            watch(self)
        except DeadlineError:
            self._end(ClosedError("the handshake failed"))
            raise DeadlineError(f"{uri}: connected, but no handshake within {timeout_s} s") from None
        except BaseException:
            self._end(ClosedError("the handshake failed"))
            raise

    def _read_until(self, condition: Callable[[], bool], deadline: float) -> None:
        """Reads for the handshake: nobody else uses the channel yet."""
        while not condition():
            self._read_once(deadline)
            if self._error is not None:
                raise fresh(self._error)
            _check_clock(deadline)

    def __repr__(self) -> str:
        return f"<Channel to {self.uri}, {'closed' if self.closed else 'open'}>"

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        """Whether the connection has ended, on either side, as far as this side has noticed."""
        return self._closed

    @property
    def stats(self) -> Stats:
        """Counts and times since the connection was made. The same object each time; its numbers go on growing."""
        self._connection.fill(self._stats)
        return self._stats

    @property
    def spin_us(self) -> float:
        """How long a caller spins for its reply before it sleeps. May be set at any time: 0 where the server computes
        on the very cores that a caller would spin on."""
        return self._connection.transport.spin.spin_us

    @spin_us.setter
    def spin_us(self, spin_us: float) -> None:
        self._connection.transport.spin.spin_us = choose_spin_us(spin_us)

    @property
    def shm(self) -> bool:
        """Whether tensors cross in shared memory on this connection."""
        return self._connection.arena is not None

    @property
    def shm_reason(self) -> str:
        """Which shared memory is used, or why none is; for people to read."""
        return self._connection.shm_reason

    @property
    def wire_dtype(self) -> str | None:
        """What float32 tensors travel as, None for what they are. May be set at any time; a call may say otherwise."""
        return CAST_NAMES.get(self._cast)

    @wire_dtype.setter
    def wire_dtype(self, wire_dtype: str | None) -> None:
        self._cast = self._checked(wire_dtype, _UNSET)[0]

    @property
    def codec(self) -> str:
        """How tensors are compressed: "auto", "off" or a name. May be set at any time; a call may say otherwise."""
        return "auto" if self._codec is None else CODEC_NAMES.get(self._codec, "off")

    @codec.setter
    def codec(self, codec: str) -> None:
        self._codec = self._checked(_UNSET, codec)[1]

    def _checked(self, wire_dtype: Any, codec: Any) -> tuple[int, int | None]:
        cast = self._cast if wire_dtype is _UNSET else parse_cast(wire_dtype)
        number = self._codec if codec is _UNSET else parse_codec(codec)
        if not self.shm:
            self._connection.coder.check(cast, number)
        return cast, number

    @property
    def link(self) -> LinkEstimate:
        """What is known of the link: measured when the connection was made, and as calls go on. Nothing where memory is
        shared, and on unix sockets."""
        return self._connection.estimate

    @property
    def near(self) -> bool:
        """Whether the peer is on this host, as far as can be said: on a unix socket, or on a loopback address unless no
        round trip took less than 2 ms, as through a relay."""
        return self._connection.is_near

    def measure(self, nbytes: int = 1024**2, timeout_s: float = 10.0) -> LinkEstimate:
        """Measures the link now: a round trip, then `nbytes` each way (4 MiB at most). Returns what `link` says then.

        For when nothing else is in flight: what is shares the link with it. Raises DeadlineError, and what ends the
        connection.
        """
        nbytes = parse_count("nbytes", nbytes, 0, MAX_PADDING_NBYTES)
        deadline = time.monotonic() + parse_timeout("timeout_s", timeout_s)
        if self._closed:
            raise ClosedError(why_closed(self._error))
        if self._session.capabilities & PROBES:
            self._measure(nbytes, timeout_s, deadline)
        return self.link

    def _measure(self, nbytes: int, timeout_s: float, deadline: float) -> None:
        self._ask(0, timeout_s, deadline)
        self._ask(nbytes, timeout_s, deadline)
        self._ask(0, timeout_s, deadline)  # the answer says how fast the second one's bytes came in there

    def _ask(self, nbytes: int, timeout_s: float, deadline: float) -> None:
        """One probe with bytes each way, and its answer."""
        ident = self._check_entry("measure")
        held = False
        sending = self._sending  # a forked child has another one
        try:
            self._inside.add(ident)
            (held,) = map(sending.acquire, (True,), (max(deadline - time.monotonic(), 0.0),))
            if not held:
                raise DeadlineError("the link was not measured: others were sending")
            if self._error is not None:  # in the handshake: why the server left
                raise fresh(self._error)
            number, frame = self._connection.probe(nbytes)
            self._probes.add(number)
            self._send_control_frames("a probe", timeout_s, deadline, frame)
        finally:
            try:
                if held:
                    sending.release()
            finally:
                self._inside.discard(ident)
        try:
            while number in self._probes:
                if not self._read_a_while(deadline):
                    time.sleep(0.0002)  # somebody else reads
                if self._error is not None:
                    raise fresh(self._error)
                if time.monotonic() >= deadline:
                    raise DeadlineError("the link was not measured: no answer")
        finally:
            self._probes.discard(number)

    def empty(self, shape: int | Sequence[int], dtype: Any = "float32", *, timeout_s: float | None = None) -> Any:
        """A tensor of undefined content, in the memory that this link sends from fastest; the caller's own.

        `dtype`: a name such as "bfloat16", or a torch or numpy dtype. Where memory is shared, it lies there: it goes by
        reference, and whoever gets it works on the same bytes. `timeout_s`: how long to wait for room there, the
        channel's `call_timeout_s` if None. Raises TensorError for another dtype and for a shape that no array can have,
        ArenaFull if there is no room, in shared memory or in the system's.
        """
        deadline = self._deadline(timeout_s)[1]
        return self._arrays.empty(shape, dtype, lambda nbytes: self._connection.allocate(nbytes, deadline))

    def trim(self) -> int:
        """Gives shared memory that is not in use back to the system. Returns its bytes.

        What has not been used for half a minute is given back without this, as calls go on.
        """
        arena = self._connection.arena
        return 0 if arena is None else arena.trim(0.0)

    def call(
        self,
        op: str,
        /,
        *tensors: Any,
        timeout_s: float | None = None,
        expect: Sequence[tuple[Any, Sequence[int]]] | None = None,
        wire_dtype: str | None = _UNSET,
        codec: str = _UNSET,
        attrs: Mapping[str, Any] | None = None,
        **keywords: Any,
    ) -> Result:
        """Runs `op` on the server and returns the tensors of its reply: writable, the caller's own.

        `tensors`: torch tensors or numpy arrays; they are sent out of their own memory and must not change until the
        call returns. Those that lie in shared memory go by reference: what the handler changes in them has changed
        here. `keywords`: attributes; these are ints, bools, floats, strings, bytes, lists of ints, of bools, of floats
        or of strings. numpy's scalars and other numbers count as these, and a list of ints and floats as one of floats,
        if each int is exactly a float. A peer whose version does not know bools gets them as ints, and lists of floats
        are refused. `attrs`: more attributes, which may have the names of arguments. `timeout_s`: seconds for the whole
        call, the channel's `call_timeout_s` if None. `expect`: (dtype, shape) of each tensor that the reply must hold;
        a peer that sends anything else has broken the protocol, and nothing is allocated for it. `wire_dtype`, `codec`:
        for this request and its reply, the channel's if not given.

        Raises RemoteOpError if the handler failed, DeadlineError, TensorError for a tensor that cannot be sent,
        SettingError for another argument or attribute that cannot be, LimitError over a cap of the server's, ArenaFull,
        PeerLostError, ClosedError, RemoteProtocolError, ReentrantCallError in a finalizer or a signal's handler. What
        such a handler raises while the call waits (KeyboardInterrupt) cancels the call, and the channel lives on; while
        the request is being sent it ends the connection.
        """
        named = keywords if attrs is None else call_attrs(attrs, keywords)
        timeout_s, deadline = self._deadline(timeout_s)
        future = self._start(op, tensors, timeout_s, deadline, expect, wire_dtype, codec, named)
        if future is None:
            again = partial(self._start, op, tensors, timeout_s, deadline, expect, wire_dtype, codec, named)
            future = self._start_in_turn(again, op, timeout_s, deadline)
        try:
            return future.result()
        finally:
            if not future._done:  # interrupted, and nobody else has the future
                future.cancel()
            del future  # else an error keeps this frame, and with it the future, which keeps the error: and tensors

    def submit(
        self,
        op: str,
        /,
        *tensors: Any,
        timeout_s: float | None = None,
        expect: Sequence[tuple[Any, Sequence[int]]] | None = None,
        wire_dtype: str | None = _UNSET,
        codec: str = _UNSET,
        attrs: Mapping[str, Any] | None = None,
        **keywords: Any,
    ) -> Future:
        """Sends a request as `call` does, and returns a Future of its reply, which is read even if no caller waits.

        Any number may be in flight; at the peer's limit (1024 by default) it waits until the peer accepts one more.
        When it returns, the tensors are sent and may change; but those that lie in shared memory are the server's, too,
        until it is done with them, and with `overlap` they are the channel's until the result is in.

        Raises what `call` does before a reply, and ResourceError if the channel's thread cannot be started.
        """
        named = keywords if attrs is None else call_attrs(attrs, keywords)
        timeout_s, deadline = self._deadline(timeout_s)
        watcher = self._watcher
        if watcher is None or not watcher.runs:
            self._hire()  # before anything is sent: there may be no thread left
        future = self._start(op, tensors, timeout_s, deadline, expect, wire_dtype, codec, named)
        if future is None:
            again = partial(self._start, op, tensors, timeout_s, deadline, expect, wire_dtype, codec, named)
            future = self._start_in_turn(again, op, timeout_s, deadline)
        self._attend(deadline)
        return future

    def _start(
        self,
        op: str,
        tensors: tuple[Any, ...],
        timeout_s: float | None,
        deadline: float | None,
        expect: Sequence[tuple[Any, Sequence[int]]] | None,
        wire_dtype: str | None,
        codec: str,
        attrs: dict[str, Any],
        turn: _Turn | None = None,
    ) -> Future | None:
        """Sends a request. None, and nothing has happened, if it has to wait for its turn."""
        started_ns = perf_counter_ns()
        session = self._session
        if (self._turns and turn is None) or len(session.requests) >= self._most_inflight:
            if self._refusing:
                raise ClosedError(why_closed(self._error))
            return None
        if wire_dtype is _UNSET and codec is _UNSET:
            cast, number = self._cast, self._codec
        else:
            cast, number = self._checked(wire_dtype, codec)
        try:
            out = self._connection.prepare(op, tensors, deadline, cast, number)
        except ArenaFull:
            if self._closed:
                raise ClosedError(why_closed(self._error)) from None
            raise
        expected = None if expect is None else parse_expect(expect)
        time_ns = 0 if timeout_s is None else max(int(timeout_s * 1e9), 1)
        ident = self._check_entry(op)
        future: Future | None = None
        held = handed_over = False
        next_id = 0  # of this request, as soon as there may be one
        sending = self._sending  # a forked child has another one
        try:
            self._inside.add(ident)
            (held,) = map(sending.acquire, (False,))
            if not held:
                (held,) = map(sending.acquire, (True,), (-1 if deadline is None else max(deadline - monotonic(), 0.0),))
            if not held:
                raise DeadlineError(f"{op}: not sent within {timeout_s} s, since other calls were")
            if self._refusing:
                raise ClosedError(why_closed(self._error))
            if len(session.requests) >= self._most_inflight:  # another thread was faster
                return None
            connection = self._connection
            connection.transport.wake_early()  # after the copies, which may take longer than the server spins
            arena = connection.arena
            if arena is not None and (arena.has_pending or len(arena.returns) > MAX_RETURNS):
                self._send_control_frames(op, timeout_s, deadline)
            if connection.is_probe_due:
                self._send_control_frames(op, timeout_s, deadline, connection.probe(0)[1])
            flags = reply_flags(cast, number) if connection.can_code else 0
            next_id = session.next_id
            request_id, head = session.request(
                op, out.descs, attrs, out.nbytes, time_ns, expected, out.placements, flags
            )
            encoded_ns = perf_counter_ns()
            future = Future(self, request_id, op, deadline, timeout_s, encoded_ns)
            self._futures[request_id] = future
            stats = self._stats
            stats.calls += 1
            stats.bytes_copied += out.copied_nbytes
            connection.lent_nbytes += out.shared_nbytes
            stats.serialization_s += (encoded_ns - started_ns) * 1e-9
            if self._sender is not None:
                handed_over = self._send_behind(self._sender, future, out, head, deadline)
            else:
                self._send(future, out, head, deadline)
            stats.wait_s += (perf_counter_ns() - encoded_ns) * 1e-9
        except BaseException:
            if next_id and (future is None or not future._begun):
                self._forget(next_id)
            raise
        finally:
            try:
                if held and not handed_over:
                    sending.release()
            finally:
                self._inside.discard(ident)
            if self._closed:
                if future is not None:  # the thread that ended the connection may not have seen it
                    self._settle(future, self._fail(ClosedError("the channel was closed")))
                self._close_when_unused()
            if self._callbacks:
                self._call_back()
        return future

    def _start_in_turn(
        self, start: Callable[..., Future | None], op: str, timeout_s: float | None, deadline: float | None
    ) -> Future:
        """Calls `start`, which is `_start` with its arguments, when it is this request's turn."""
        turn = _Turn()
        future: Future | None = None
        try:
            with self._lock:
                self._turns.append(turn)
            while future is None:
                self._let_in()
                self._wait_for_turn(turn, op, timeout_s, deadline)
                turn._done = False
                future = start(turn=turn)
        finally:
            with self._lock, contextlib.suppress(ValueError):
                self._turns.remove(turn)
            self._let_in()
            if self._watcher is not None or self._events or self._callbacks:
                self._leave_to_watcher()
        return future

    def _wait_for_turn(self, turn: _Turn, op: str, timeout_s: float | None, deadline: float | None) -> None:
        ident = self._check_entry(op)
        started_ns = perf_counter_ns()
        decoded_ns = self._session.decode_ns
        try:
            while True:
                soon = monotonic() + _LOOK_FOR_TURN_S
                try:
                    self._wait_until_done(turn, soon if deadline is None else min(soon, deadline), ident)
                    return
                except DeadlineError:
                    if deadline is not None and monotonic() >= deadline:
                        raise DeadlineError(
                            f"{op}: not sent within {timeout_s} s: the peer takes {self._most_inflight} requests "
                            "at a time, and that many were in flight"
                        ) from None
        finally:
            decoded_ns = self._session.decode_ns - decoded_ns
            waited_ns = perf_counter_ns() - started_ns - decoded_ns
            self._stats.wait_s += waited_ns * 1e-9
            self._stats.serialization_s += decoded_ns * 1e-9

    def _let_in(self) -> None:
        """Gives their turn to as many requests as the peer accepts, in order; after the end to all, which then fail."""
        with self._lock:
            count = len(self._turns) if self._closed else max(self._most_inflight - self._session.inflight, 0)
            for turn in itertools.islice(self._turns, count):
                turn._done = True
            if self._followers:
                self._changed.notify_all()

    def _forget(self, request_id: int) -> None:
        """A request of which not a byte was sent: the stream is as it was."""
        self._futures.pop(request_id, None)
        self._session.discard(request_id)
        if self._turns:
            self._let_in()

    # ---- the channel's own reader ----

    def _hire(self, *, keeps: bool = False) -> None:
        """Starts the watcher, unless there is one or the channel has ended. Raises ResourceError."""
        with self._lock:
            if self._closed or (self._watcher is not None and self._watcher.alive):
                return
            if self._watcher is not None:  # interrupted before it ran
                self._watcher.close(0.0)
            watcher = self._watcher = Watcher(self, keeps=keeps)
            try:
                watcher.start()
            except ResourceError:
                watcher.close(0.0)
                self._watcher = None
                raise

    def _attend(self, deadline: float | None = None) -> None:
        """Requests are in flight that the calling thread does not wait for; one has this deadline."""
        watcher = self._watcher
        if watcher is None:  # it has ended at this moment, or what is in flight is a call that was given up
            try:
                self._hire()
            except ResourceError as error:
                _logger.warning("%s: no thread reads until a caller waits: %s", self.uri, str(error))
            watcher = self._watcher
        if watcher is not None:
            watcher.attend(deadline)

    def close(self, drain_s: float = 0.0) -> None:
        """Ends the connection: the server is told, and calls in flight fail with ClosedError. Idempotent.

        `drain_s`: seconds to wait for the replies of calls in flight; meanwhile new calls are refused. Calls still in
        flight after that are discarded; a warning gives their number for each operation.
        """
        drain_s = parse_timeout("drain_s", drain_s)
        inside = get_ident() in self._inside  # in the middle of a call
        if drain_s and not self._closed and not inside:
            self._drain(drain_s)
        watcher = self._watcher
        own = () if self._sender is None else self._sender.threads
        # in a callback of a thread of ours
        inside = inside or threading.current_thread() in (*own, None if watcher is None else watcher.thread)
        with self._lock:
            first = not self._closed
            self._closed = self._refusing = True
            if self._error is None:  # now, so that it comes before the server's answer to the goodbye
                self._error = ClosedError("the channel was closed")
            discarded = [future.op for future in list(self._futures.values()) if not future._done] if first else ()
        if first:
            held = False
            sending = self._sending
            try:
                (held,) = map(sending.acquire, (True,), (0.0 if inside else 0.1,))
                if held:  # if a send is stuck, the end of the stream must do
                    with contextlib.suppress(FastsplitError):
                        self._connection.transport.send([self._session.goodbye()])
            finally:
                if held:
                    self._release(sending)
        self._end(ClosedError("the channel was closed"))
        if self._sender is not None:
            self._sender.shutdown(wait=not inside)
        if watcher is not None and not inside:
            watcher.close(_JOIN_S)
        self._call_back()
        warn_of_discarded(self.uri, discarded)

    def _drain(self, drain_s: float) -> None:
        until = time.monotonic() + drain_s
        self._refusing = True
        for future in list(self._futures.values()):
            with contextlib.suppress(FastsplitError):  # the future keeps it
                self._wait_for(future, max(until - time.monotonic(), 0.0))

    def leave(self, why: str) -> None:
        """For a forked child: see forked.py."""
        renew(self._lock, self._changed)
        self._connection.leave(why)
        self._sending = self._connection.sending
        self._calling_back.clear()
        for _, future in self._callbacks:
            future._leave()
        self._callbacks.clear()
        self._reading = 0
        if self._watcher is not None:
            self._watcher.leave()
        self._sender = self._watcher = None
        self._watching = False
        self._closed = self._refusing = True
        if self._error is None:
            self._error = ClosedError(why)
        for future in self._futures.values():
            if not future._done:
                future._error, future._done, future._callbacks = self._error, True, None
            future._leave()
        self._futures.clear()

    # ---- sending ----

    def _send(self, future: Future, out: Outgoing, head: bytearray, deadline: float | None) -> None:
        """Sends a frame, reading meanwhile if there is no room for it. The caller holds `_sending`."""
        outbox = self._connection.outbox
        frame: Frame | None = None
        try:
            future._begun = True
            if out.placements and self._connection.arena is not None:
                self._connection.arena.lend(out.placements)
            frame = outbox.send([head, *out.buffers], len(head) + out.nbytes, out)
            if frame is not None:
                while not outbox.idle:
                    self._send_rest(deadline)
        except DeadlineError:
            if frame is not None and outbox.discard(frame, future._id):
                self._forget(future._id)
                raise DeadlineError(f"{future.op}: not sent within {future._timeout_s} s") from None
            raise self._end(
                DeadlineError(f"{future.op}: not sent within {future._timeout_s} s; the connection is closed")
            ) from None
        except FastsplitError as error:
            # The peer may have said why it left: its last words are still to be read.
            self._read_last_words(future)
            raise self._end(error) from None
        except BaseException:
            self._end(ClosedError("the connection was closed: a send was interrupted"))
            raise

    def _send_behind(
        self, sender: Workers, future: Future, out: Outgoing, head: bytearray, deadline: float | None
    ) -> bool:
        """Has the sender's thread send what the kernel does not take at once; then that thread releases `_sending`:
        frames stay whole, and at most one waits. Returns whether it was handed over."""
        outbox, sending = self._connection.outbox, self._sending
        try:
            future._begun = True
            frame = outbox.send([head, *out.buffers], len(head) + out.nbytes, out)
        except FastsplitError as error:
            self._read_last_words(future)
            raise self._end(error) from None
        except BaseException:
            self._end(ClosedError("the connection was closed: a send was interrupted"))
            raise
        if frame is None:
            return False

        def sent(failure: FastsplitError | None) -> None:
            try:
                if isinstance(failure, DeadlineError):
                    late = f"{future.op}: not sent within {future._timeout_s} s"
                    if outbox.discard(frame, future._id):
                        self._forget(future._id)
                        self._settle(future, DeadlineError(late))
                    else:
                        self._end(DeadlineError(f"{late}; the connection is closed"))
                elif failure is not None:
                    self._read_last_words(future)
                    self._end(failure)
            finally:
                self._release(sending)
            watcher = self._watcher
            if watcher is None:  # the channel has ended
                self._call_back()
            elif self._callbacks:  # not here: a callback may call, and wait for what this thread is to send
                watcher.step_aside()

        if not flush_in(sender, outbox, deadline, sent):  # closed at this moment
            raise self._end(ClosedError("the channel was closed"))
        return True

    def _send_control_frames(
        self, op: str, timeout_s: float | None, deadline: float | None, probe: Sequence[Any] = ()
    ) -> None:
        """Sends what must go before the next frame: a probe, or all that the outbox knows of. The caller holds
        `_sending`."""
        outbox = self._connection.outbox
        try:
            if probe:
                outbox.put(probe, sum(map(len, probe)))
            else:
                outbox.put_control_frames()
            outbox.flush()
            while not outbox.idle:
                self._send_rest(deadline)
        except DeadlineError:
            late = DeadlineError(
                f"{op}: what goes before it was not sent within {timeout_s} s; the connection is closed"
            )
            raise self._end(late) from None
        except FastsplitError as error:
            raise self._end(error) from None
        except BaseException:
            self._end(ClosedError("the connection was closed: a send was interrupted"))
            raise

    def _send_rest(self, deadline: float | None) -> None:
        """Waits until there is room for what waits to be sent, reads meanwhile, and sends some of it."""
        outbox = self._connection.outbox
        writable = False
        try:
            reading = self._take_reading()
            soon = None if reading else time.monotonic() + _RELIEF_S
            try:
                until = deadline if soon is None or (deadline is not None and deadline < soon) else soon
                readable, writable = wait_for_room(outbox, until, reading=reading)
            except DeadlineError:
                if soon is None or (deadline is not None and time.monotonic() >= deadline):
                    raise
                return
            if readable:
                with contextlib.suppress(DeadlineError):  # nothing to read after all
                    self._read_once(deadline, blocking=False)
                if self._error is not None:
                    raise fresh(self._error)
        finally:
            self._leave_reading()
        if writable:
            outbox.flush()

    def _read_last_words(self, future: Future) -> None:
        """Reads what is there already, or lets the thread that reads do so. What ends the connection is kept."""
        end = time.monotonic() + _LAST_WORDS_S
        with contextlib.suppress(DeadlineError):
            try:
                if self._take_reading(future, end):
                    while self._error is None and time.monotonic() < end:
                        self._read_once(None, blocking=False)
            finally:
                self._leave_reading()

    def _give_up(self, future: Future, error: FastsplitError) -> bool:
        with self._lock:
            if future._done:
                return False
            self._futures.pop(future._id, None)
            self._finish(future, error)
        if self._session.mark_cancelled(future._id):
            # Best effort: the server may save some work; an answer that comes all the same is dropped.
            try:
                outbox = self._connection.outbox
                self._send_if_free(lambda: send_small(outbox, self._session.cancel(future._id)))
            except FastsplitError as lost:
                self._end(lost)
            self._attend()  # for the answer
        self._call_back()
        return True

    def _send_if_free(self, send: Callable[[], object]) -> None:
        """Calls `send` unless another thread sends at this moment, or the connection has ended."""
        held = False
        sending = self._sending
        try:
            (held,) = map(sending.acquire, (False,))
            if held and not self._closed:
                send()
        finally:
            if held:
                self._release(sending)

    # ---- waiting and reading ----

    def _wait_for(self, future: Future, timeout: float | None) -> None:
        ident = self._check_entry(future.op)
        started_ns = perf_counter_ns()
        decoded_ns = self._session.decode_ns
        deadline = future._deadline
        limit = None if timeout is None else time.monotonic() + timeout
        own = limit is None or (deadline is not None and deadline <= limit)
        until = deadline if own else limit
        try:
            self._wait_until_done(future, until, ident)
        except DeadlineError:
            if not own:
                raise DeadlineError(f"{future.op}: no reply within {timeout} s") from None
            self._give_up(future, future._late())
        finally:
            decoded_ns = self._session.decode_ns - decoded_ns
            waited_ns = perf_counter_ns() - started_ns - decoded_ns
            self._stats.wait_s += waited_ns * 1e-9
            self._stats.serialization_s += decoded_ns * 1e-9
            if self._watcher is not None or self._events or self._callbacks:
                self._leave_to_watcher()

    def _leave_to_watcher(self) -> None:
        """Called by a thread that has read, or waited for the reader: the watcher takes over if no caller does."""
        if self._expects and not self._reading and not self._followers:
            self._attend()

    @property
    def _expects(self) -> bool:
        """Whether a reply is expected, or an interrupted reader has left events or callbacks."""
        return bool(self._session.inflight or self._events or self._callbacks)

    def _wait_until_done(self, waiter: Future | _Turn, until: float | None, ident: int) -> None:
        """Reads, or waits for the thread that does. Raises DeadlineError at `until`."""
        while not waiter._done:
            try:
                self._inside.add(ident)
                if self._take_reading(waiter, until):
                    self._read_once(until)
                    while not self._callbacks and not waiter._done:
                        _check_clock(until)  # a peer may dribble for ever
                        self._read_once(until)
            finally:
                left = self._reading == ident
                if left:
                    self._reading = 0
                self._inside.discard(ident)
                if left:
                    self._left_reading()
            if self._callbacks:
                self._call_back()
                if not waiter._done:
                    _check_clock(until)

    def _check_entry(self, op: str) -> int:
        """This thread's number, which is put among `_inside` while it reads or sends.

        Raises ReentrantCallError where it is there already.
        """
        ident = get_ident()
        if ident in self._inside or ident in greeting:
            raise ReentrantCallError(
                f"{op}: this thread is in the middle of a call on this channel, or serves its requests, and would wait "
                "for itself; a finalizer or a signal's handler notes what is to be done, for later"
            )
        return ident

    def _take_reading(self, waiter: Future | _Turn | None = None, until: float | None = None) -> bool:
        """Makes this thread the reader. With a waiter: waits for that, and returns False when the waiter is done first.

        Without one, returns False at once if another thread reads. Raises DeadlineError at `until`. The caller leaves
        reading in a `finally`, even if this was interrupted.
        """
        with self._lock:
            while self._reading:
                if waiter is None or waiter._done:
                    return False
                self._followers += 1
                try:
                    left_s = remaining_s(until)
                    self._changed.wait(_LOOK_EVERY_S if left_s is None else min(left_s, _LOOK_EVERY_S))
                    if self._reading and not waiter._done:
                        _check_clock(until)
                except BaseException:
                    if not self._lock._is_owned():  # type: ignore[attr-defined]  # interrupted as it let go of the lock
                        self._lock.acquire()
                    raise
                finally:
                    self._followers -= 1
            if waiter is not None and waiter._done:
                return False
            self._reading = get_ident()
            if self._watching:
                self._watching = False
                self._connection.transport.awake()
                assert self._watcher is not None
                self._watcher.step_aside()
            return True

    def _leave_reading(self) -> None:
        """Ends this thread's reading, if it reads."""
        if self._reading == get_ident():
            self._reading = 0
            self._left_reading()

    def _left_reading(self) -> None:
        with self._lock:
            if self._followers:
                self._changed.notify_all()
        if self._closed:
            self._close_when_unused()

    def _read_a_while(self, deadline: float) -> bool:
        """Reads once, and waits for that until the deadline. False if another thread reads."""
        ident = self._check_entry("waiting")
        reads = False
        try:
            self._inside.add(ident)
            reads = self._take_reading()
            if reads:
                with contextlib.suppress(DeadlineError):
                    self._read_once(deadline)
        finally:  # as in `_wait_for`, and not a method for both: an interrupt at its call would leave this undone
            left = self._reading == ident
            if left:
                self._reading = 0
            self._inside.discard(ident)
            if left:
                self._left_reading()
        self._call_back()
        if self._watcher is not None:
            self._leave_to_watcher()
        return reads

    def _read_once(self, deadline: float | None, *, blocking: bool = True) -> None:
        """Reads once and hands out what that completed. Only the reader calls it.

        Raises DeadlineError; anything else that goes wrong ends the connection, and with it every future.
        """
        session, events = self._session, self._events
        try:
            # what an interrupted read left comes first
            if (
                not events
                and self._connection.transport.receive(session, deadline, blocking=blocking, events=events) is None
            ):
                self._end(session.end_of_stream())
                return
            while events:
                self._handle(events[0])
                del events[0]
            if self._turns:
                self._let_in()
        except DeadlineError:
            raise
        except RemoteProtocolError as error:  # the link's, which no session was told
            self._abort(error)
            self._end(error)
        except BaseException as error:
            if isinstance(error, FastsplitError) and not isinstance(error, ReentrantCallError):
                self._end(error)
                return
            # a signal's handler raised it
            if session.in_doubt:
                self._end(ClosedError("the connection was closed: a read was interrupted"))
            raise

    def _handle(self, event: Event) -> None:
        """Acts on what came in. Interrupted, it is called with the same event again."""
        if isinstance(event, Reply):
            future = self._futures.get(event.request_id)
            if future is None:
                return
            started_ns = perf_counter_ns()
            try:
                result = Result.of(event, self._arrays, started_ns - future._sent_ns)
            except (ResourceError, TensorError) as error:
                self._settle(future, fresh(error))
                return
            self._stats.remote_s += result.remote_s
            self._session.decode_ns += perf_counter_ns() - started_ns
            with self._lock:
                if not future._done:  # else it was given up at this moment
                    future._outcome = result
                    self._done(future)
            self._futures.pop(event.request_id, None)
        elif isinstance(event, Error):
            future = self._futures.get(event.request_id)
            if future is not None:
                self._settle(future, remote_error(future.op, event))
        elif isinstance(event, Hello):
            self._has_hello = True
        elif isinstance(event, Attached):
            self._answers.append(event)
        elif isinstance(event, ReturnsWanted):
            self._send_returns()
        elif isinstance(event, Probe):
            meter = self._connection.meter
            if meter is not None and not meter.on_answer(event.number, event.bytes_per_s):
                _logger.debug("%s: an answer to probe %d, which nobody waits for", self.uri, event.number)
            self._probes.discard(event.number)
        elif isinstance(event, Goodbye):
            self._end(PeerLostError("the server closed the connection"))
        elif isinstance(event, Failed):
            if event.tell:
                self._abort(event.error)
            self._end(event.error)

    def _settle(self, future: Future, error: BaseException) -> None:
        with self._lock:
            if not future._done:  # else it was given up at this moment
                self._finish(future, error)
        self._futures.pop(future._id, None)

    def _finish(self, future: Future, error: BaseException) -> None:
        """Ends a future that has no outcome. The caller holds `_lock`."""
        future._error = error
        self._done(future)

    def _done(self, future: Future) -> None:
        """A future has its outcome. The caller holds `_lock`.

        Between `_done = True` and the call that queues the callbacks nothing is called, so that no interrupt comes
        between the two.
        """
        if future._callbacks is None:
            future._done = True
            if future._waited_for is not None:
                self._callbacks.appendleft((Future._tell_waiters, future))
        else:
            steps: list[Callable[[Any], object]] = [self._callbacks.extend, self._callbacks.appendleft]
            entries = zip(future._callbacks, itertools.repeat(future)), (Future._tell_waiters, future)
            queue = map(operator.call, steps, entries)
            future._done = True
            future._callbacks = None
            if future._waited_for is None:
                del steps[1]
            deque(queue, 0)  # waiters first: a callback may block
        if self._followers:
            self._changed.notify_all()

    def _call_back(self) -> None:
        """Runs the callbacks of futures that are done. In the middle of something else of this thread it does nothing:
        they run at the end of that. Within a callback it leaves them to the watcher."""
        ident = get_ident()
        if ident in self._inside:
            return
        if ident in self._calling_back:
            while self._tell_next():
                pass
            if self._callbacks and self._watcher is not None:
                self._watcher.attend()
            return
        try:
            self._calling_back.add(ident)
            while self._callbacks:
                if self._tell_next():
                    continue
                with contextlib.suppress(IndexError):  # another thread took the last one
                    callback, future = self._callbacks.popleft()
                    call_safely(f"a callback of {future!r}", callback, future)
        finally:
            self._calling_back.discard(ident)

    def _tell_next(self) -> bool:
        """Notifies the concurrent.futures waiters of a future, if they are next. If interrupted it is called again: the
        entry is removed when all are notified."""
        with contextlib.suppress(IndexError, ValueError):  # another thread took it
            tell, future = first = self._callbacks[0]
            if tell is not Future._tell_waiters:
                return False
            call_safely(f"the end of {future!r}", tell, future)
            self._callbacks.remove(first)
            return True
        return bool(self._callbacks)

    # ---- shared memory ----

    def _send_returns(self) -> None:
        """The server is short of memory. Whoever sends at this moment takes returns along anyway."""
        self._send_if_free(partial(send_returns, self._connection.outbox))

    def _on_memory_pressure(self, deadline: float | None) -> None:
        """Our own memory is full: asks the server for returns, and reads for a moment if nobody else does."""
        self._send_if_free(partial(ask_for_returns, self._connection.outbox))
        soon = time.monotonic() + _RELIEF_S
        if not self._read_a_while(soon if deadline is None else min(soon, deadline)):
            time.sleep(0.001)
        if self._error is not None:
            raise fresh(self._error)

    # ---- ending ----

    def _abort(self, error: FastsplitError) -> None:
        """The peer broke the protocol, or something is short here: tell it, if that is possible at once. Only the
        reader calls it."""
        self._fail(error)
        held = False
        sending = self._sending
        try:
            (held,) = map(sending.acquire, (False,))
            if held:
                with contextlib.suppress(FastsplitError):
                    self._connection.transport.send([self._session.abort(error)])
        finally:
            if held:
                self._release(sending)
        if held:
            self._connection.transport.linger(time.monotonic() + _LINGER_S)

    def _fail(self, error: FastsplitError) -> FastsplitError:
        """Nothing can be called any more, and every future gets the error; the first error stays. Returns that, to be
        raised."""
        with self._lock:
            if self._error is None:
                self._error = fresh(error)
            self._closed = self._refusing = True
            if self._turns:
                self._let_in()
            for future in list(self._futures.values()):
                if not future._done:
                    self._finish(future, fresh(self._error))
            self._futures.clear()  # last: interrupted, the next one to end the channel goes on
        return fresh(self._error)

    def _end(self, error: FastsplitError) -> FastsplitError:
        """Ends the connection. Returns the error that did so first."""
        error = self._fail(error)
        self._connection.transport.shutdown()
        self._close_when_unused()
        return error

    def _release(self, sending: threading.Lock) -> None:
        sending.release()
        if self._closed:
            self._close_when_unused()

    def _close_when_unused(self) -> None:
        """Closes the descriptor once nobody can be in a system call on it (its number may be given to another file).

        Whoever sends or reads calls this again when it is done.
        """
        sending = self._sending
        while True:
            held = False
            try:
                (held,) = map(sending.acquire, (False,))
                with self._lock:
                    if held and not self._is_in_use:
                        self._connection.close()
                        return
            finally:
                if held:
                    sending.release()
            if not held or self._is_in_use:
                return
            # A reader that left just now came here too, and found `_sending` taken by us: look again for both.

    @property
    def _is_in_use(self) -> bool:
        return bool(self._reading) or (self._watcher is not None and self._watcher.polling)


def _check_clock(until: float | None) -> None:
    if until is not None and time.monotonic() >= until:
        raise DeadlineError("no reply")

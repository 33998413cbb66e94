"""The client: calls, futures, and the one thread that reads for all.

How waiting works. There is no background thread: a hand-over between threads would cost more than a round trip. Whoever
waits for a reply reads the socket, for itself and for everybody else; the others sleep until their reply is in or the
reader leaves and one of them takes over. Whoever sends and finds the socket full reads too, so that two sides that both
send large messages never wait for each other.

Rules. A deadline that passes while waiting costs only that call: a CANCEL goes out and the answer is dropped when it
comes. One that passes in the middle of a send, and any other error there, ends the connection, as does any error of the
peer's; then every call in flight gets that error. All public methods are thread-safe.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from time import perf_counter_ns
from typing import Any

from .. import tensors
from ..errors import (
    CancelledError,
    ClosedError,
    DeadlineError,
    FastsplitError,
    PeerLostError,
    RemoteOpError,
    RemoteProtocolError,
    SettingError,
    TensorError,
)
from ..memory import Pool, pool
from ..schema.limits import Limits
from ..tensors import Arrays, collect, dtype_of
from .address import connect_socket, parse_address
from .link import Link, choose_spin_us, remaining_s
from .session import CAPABILITIES, Error, Event, Failed, Goodbye, Hello, Reply, Session
from .stats import Stats

__all__ = ["Channel", "Future", "Result"]

_logger = logging.getLogger("fastsplit.channel")

MAX_TIMEOUT_S = 1e6  # eleven days; beyond, poll's milliseconds and the header's nanoseconds would run out
_RELIEF_S = 0.005  # how soon a sender that found another thread reading looks again whether it must read itself
_LAST_WORDS_S = 0.5  # how long a failed sender waits for another thread to read why
_LINGER_S = 0.5  # how long an aborted peer's bytes are read and dropped, so that it can read why


class Result(tuple):  # type: ignore[type-arg]
    """The tensors of a reply: a tuple, with what else the reply said.

    The tensors are writable and the caller's own. `attrs`: the reply's attributes. `remote_s`: seconds in the handler,
    as the server says, but never more than this side waited. `wait_s`: seconds from the end of encoding the request to
    the reply.
    """

    attrs: dict[str, Any]
    remote_s: float
    wait_s: float


class Future:
    """A call in flight. Made by `Channel.submit`."""

    __slots__ = (
        "__weakref__",
        "_callbacks",
        "_channel",
        "_deadline",
        "_done",
        "_error",
        "_id",
        "_result",
        "_sent_ns",
        "_timeout_s",
        "op",
    )

    def __init__(
        self, channel: Channel, request_id: int, op: str, deadline: float | None, timeout_s: float | None, sent_ns: int
    ) -> None:
        self.op = op
        self._channel = channel
        self._id = request_id
        self._deadline = deadline
        self._timeout_s = timeout_s
        self._sent_ns = sent_ns
        self._done = False
        self._result: Result | None = None
        self._error: BaseException | None = None
        self._callbacks: list[Callable[[Future], object]] | None = None

    def __repr__(self) -> str:
        state = "pending" if not self._done else "failed" if self._error is not None else "done"
        return f"<Future of {self.op!r}, {state}>"

    def done(self) -> bool:
        """Whether the reply (or an error) is in. Does not read: only somebody's `result` or `call` does."""
        return self._done

    def cancelled(self) -> bool:
        """Whether `cancel` came before the reply."""
        return isinstance(self._error, CancelledError)

    def result(self, timeout: float | None = None) -> Result:
        """Waits for the reply's tensors, `timeout` seconds at most. Returns the same object each time.

        Raises DeadlineError when `timeout` passes (the call goes on) or the call's own deadline does (it is cancelled),
        and what `Channel.call` raises.
        """
        if not self._done:
            self._channel._wait_for(self, timeout)
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Waits like `result`, and returns the call's error, None if it has none."""
        if not self._done:
            self._channel._wait_for(self, timeout)
        return self._error

    def cancel(self) -> bool:
        """Gives the call up: False if its reply was in already. The server is told; a handler at work may go on."""
        return self._channel._give_up(self, CancelledError(f"{self.op}: cancelled"))

    def add_done_callback(self, callback: Callable[[Future], object]) -> None:
        """Calls `callback(future)` when the call is done: at once if it is, otherwise from the thread that reads."""
        with self._channel._lock:
            if not self._done:
                self._callbacks = [*(self._callbacks or ()), callback]
                return
        callback(self)


class Channel:
    """A connection to a server. `fastsplit.connect` is this class; usable as a context manager.

    `arrays`: what calls give, "torch", "numpy" or "auto" (torch where it is installed). `timeout_s`: for connecting and
    the handshake. `call_timeout_s`: for each call that says nothing else, None for no deadline. `limits`: what is
    accepted from the server. `spin_us`: how long a caller spins for its reply before it sleeps (FASTSPLIT_SPIN_US, or
    50; 0 on one core). `pool`: where received tensors and `empty` take their memory.

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
    ) -> None:
        for name, value in (("timeout_s", timeout_s), ("call_timeout_s", call_timeout_s)):
            if value is not None and not 0 <= value <= MAX_TIMEOUT_S:
                raise SettingError(f"{name}: {value!r}, expected 0 to {MAX_TIMEOUT_S:g}")
        self.uri = uri
        self.call_timeout_s = call_timeout_s
        self._pool = pool
        self._arrays = tensors.arrays(arrays)
        self._stats = Stats()
        self._session = Session(is_client=True, allocate=pool.allocate, limits=limits, capabilities=CAPABILITIES)
        self._futures: dict[int, Future] = {}
        self._sending = threading.Lock()  # the link's writing side and the session's outgoing side
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)  # `_lock` guards the next four, and the futures' outcomes
        self._reading = False
        self._followers = 0
        self._error: FastsplitError | None = None
        self._closed = False
        self._greeted = False
        deadline = time.monotonic() + timeout_s
        spin_us = choose_spin_us(spin_us)
        self._link = Link(connect_socket(parse_address(uri), timeout_s), spin_us)
        try:
            with contextlib.suppress(PeerLostError):  # refused at once: what the server said is still to be read
                self._link.send_all([self._session.hello()], deadline)
            while not self._greeted:
                self._read_once(deadline)
                if self._error is not None:
                    raise self._error
        except DeadlineError:
            self._end(ClosedError("the handshake failed"))
            raise DeadlineError(f"{uri}: connected, but no handshake within {timeout_s} s") from None
        except BaseException:
            self._end(ClosedError("the handshake failed"))
            raise

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
        stats, link = self._stats, self._link
        stats.bytes_sent, stats.bytes_received = link.bytes_sent, link.bytes_received
        stats.bytes_staged = self._session.staged_nbytes
        return stats

    @property
    def shm(self) -> bool:
        """Whether tensors cross in shared memory on this connection."""
        return False

    def empty(self, shape: int | Sequence[int], dtype: Any = "float32") -> Any:
        """A tensor of undefined content, in the memory that this link sends from fastest; the caller's own.

        `dtype`: a name such as "bfloat16", or a torch or numpy dtype. Raises TensorError for another.
        """
        return self._arrays.empty(shape, dtype, self._pool)

    def call(
        self,
        op: str,
        /,
        *tensors: Any,
        timeout_s: float | None = None,
        expect: Sequence[tuple[Any, Sequence[int]]] | None = None,
        **attrs: Any,
    ) -> Result:
        """Runs `op` on the server and returns the tensors of its reply: writable, the caller's own.

        `tensors`: torch tensors or numpy arrays; they are sent out of their own memory and must not change until the
        call returns. `attrs`: ints, floats, strings, bytes, lists of ints or of strings. `timeout_s`: seconds for the
        whole call, the channel's `call_timeout_s` if None. `expect`: (dtype, shape) of each tensor that the reply must
        hold; a peer that sends anything else has broken the protocol, and nothing is allocated for it.

        Raises RemoteOpError if the handler failed, DeadlineError, TensorError for a tensor that cannot be sent,
        LimitError over a cap of the server's, PeerLostError, ClosedError, RemoteProtocolError.
        """
        return self._start(op, tensors, timeout_s, expect, attrs).result()

    def submit(
        self,
        op: str,
        /,
        *tensors: Any,
        timeout_s: float | None = None,
        expect: Sequence[tuple[Any, Sequence[int]]] | None = None,
        **attrs: Any,
    ) -> Future:
        """Sends a request as `call` does, and returns a Future of its reply. Any number may be in flight.

        When it returns, the tensors are sent and may change.
        """
        return self._start(op, tensors, timeout_s, expect, attrs)

    def _start(
        self,
        op: str,
        tensors: tuple[Any, ...],
        timeout_s: float | None,
        expect: Sequence[tuple[Any, Sequence[int]]] | None,
        attrs: dict[str, Any],
    ) -> Future:
        started_ns = perf_counter_ns()
        if timeout_s is None:
            timeout_s = self.call_timeout_s
        elif not 0 <= timeout_s <= MAX_TIMEOUT_S:  # NaN is not, either
            raise SettingError(f"timeout_s: {timeout_s!r}, expected 0 to {MAX_TIMEOUT_S:g}")
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        descs, buffers, nbytes, copied_nbytes = collect(tensors)
        expected = None if expect is None else [(dtype_of(dtype).code, tuple(shape)) for dtype, shape in expect]
        time_ns = 0 if timeout_s is None else max(int(timeout_s * 1e9), 1)
        if not self._sending.acquire(timeout=-1 if timeout_s is None else timeout_s):
            raise DeadlineError(f"{op}: not sent within {timeout_s} s, since other calls were")
        try:
            if self._closed:
                raise ClosedError(f"the channel is closed: {self._error}")
            request_id, head = self._session.request(op, descs, attrs, nbytes, time_ns, expected)
            encoded_ns = perf_counter_ns()
            future = Future(self, request_id, op, deadline, timeout_s, encoded_ns)
            self._futures[request_id] = future
            stats = self._stats
            stats.calls += 1
            stats.bytes_copied += copied_nbytes
            stats.serialization_s += (encoded_ns - started_ns) * 1e-9
            self._send(future, [head, *buffers], len(head) + nbytes, deadline)
            stats.wait_s += (perf_counter_ns() - encoded_ns) * 1e-9
        finally:
            self._release_sending()
        return future

    def close(self) -> None:
        """Ends the connection: the server is told, and calls in flight fail with ClosedError. Idempotent."""
        with self._lock:
            first = not self._closed
            self._closed = True
            if self._error is None:  # now, so that it comes before the server's answer to the goodbye
                self._error = ClosedError("the channel was closed")
        if first and self._sending.acquire(timeout=0.1):  # not if a send is stuck: then the end says enough
            try:
                with contextlib.suppress(FastsplitError):
                    self._link.send([self._session.goodbye()])
            finally:
                self._release_sending()
        self._end(ClosedError("the channel was closed"))

    # ---- sending ----

    def _send(self, future: Future, buffers: list[Any], nbytes: int, deadline: float | None) -> None:
        """Sends a frame, reading meanwhile if the socket is full. The caller holds `_sending`."""
        left: Sequence[Any] = buffers
        try:
            left = self._link.send(buffers, nbytes)
            while left:
                left = self._send_rest(left, deadline)
        except DeadlineError:
            if left is buffers:  # not a byte of it: the stream is as it was
                self._futures.pop(future._id, None)
                self._session.retract(future._id)
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

    def _send_rest(self, left: Sequence[Any], deadline: float | None) -> Sequence[Any]:
        reading = self._take_reading()
        try:
            soon = None if reading else time.monotonic() + _RELIEF_S
            try:
                readable, writable = self._link.wait(
                    deadline if soon is None or (deadline is not None and deadline < soon) else soon, reading=reading
                )
            except DeadlineError:
                if soon is None or (deadline is not None and time.monotonic() >= deadline):
                    raise
                return left
            if readable:
                with contextlib.suppress(DeadlineError):  # nothing to read after all
                    self._read_once(deadline, blocking=False)
                if self._error is not None:
                    raise self._error
        finally:
            if reading:
                self._leave_reading()
        return self._link.send(left) if writable else left

    def _read_last_words(self, future: Future) -> None:
        """Reads what is there already, or lets the thread that reads do so. What ends the connection is kept."""
        with contextlib.suppress(DeadlineError):
            if self._take_reading(future, time.monotonic() + _LAST_WORDS_S):
                try:
                    while self._error is None:
                        self._read_once(None, blocking=False)
                finally:
                    self._leave_reading()

    def _give_up(self, future: Future, error: FastsplitError) -> bool:
        with self._lock:
            if future._done:
                return False
            self._futures.pop(future._id, None)
            self._finish(future, None, error)
        self._call_back(future)
        if self._session.abandon(future._id) and self._sending.acquire(blocking=False):
            # Best effort: the server may save some work; an answer that comes all the same is dropped.
            try:
                if not self._closed:
                    frame = self._session.cancel(future._id)
                    left = self._link.send([frame])
                    if left and len(left[0]) < len(frame):
                        self._link.send_all(left, time.monotonic() + _RELIEF_S)
            except FastsplitError as lost:
                self._end(lost)
            finally:
                self._release_sending()
        return True

    # ---- waiting and reading ----

    def _wait_for(self, future: Future, timeout: float | None) -> None:
        started_ns = perf_counter_ns()
        decoded_ns = self._session.decode_ns
        deadline = future._deadline
        limit = None if timeout is None else time.monotonic() + timeout
        own = limit is None or (deadline is not None and deadline <= limit)
        until = deadline if own else limit
        try:
            while not future._done:
                if self._take_reading(future, until):
                    try:
                        self._read_once(until)
                        while not future._done:
                            if until is not None and time.monotonic() >= until:  # a peer may dribble for ever
                                raise DeadlineError("no reply")
                            self._read_once(until)
                    finally:
                        self._leave_reading()
        except DeadlineError:
            if not own:
                raise DeadlineError(f"{future.op}: no reply within {timeout} s") from None
            late = DeadlineError(f"{future.op}: no reply within its deadline of {future._timeout_s} s")
            self._give_up(future, late)
        finally:
            decoded_ns = self._session.decode_ns - decoded_ns
            waited_ns = perf_counter_ns() - started_ns - decoded_ns
            self._stats.wait_s += waited_ns * 1e-9
            self._stats.serialization_s += decoded_ns * 1e-9

    def _take_reading(self, future: Future | None = None, until: float | None = None) -> bool:
        """Makes this thread the reader. With a future: waits for that, and returns False when the future is done first.

        Without one, returns False at once if another thread reads. Raises DeadlineError at `until`.
        """
        with self._lock:
            while self._reading:
                if future is None or future._done:
                    return False
                self._followers += 1
                try:
                    if not self._changed.wait(remaining_s(until)) and not future._done:
                        raise DeadlineError("no reply")
                finally:
                    self._followers -= 1
            if future is not None and future._done:
                return False
            self._reading = True
            return True

    def _leave_reading(self) -> None:
        with self._lock:
            self._reading = False
            if self._followers:
                self._changed.notify_all()
        if self._closed:
            self._close_when_unused()

    def _read_once(self, deadline: float | None, *, blocking: bool = True) -> None:
        """Reads once and hands out what that completed. Only the reader calls it.

        Raises DeadlineError; anything else that goes wrong ends the connection, and with it every future.
        """
        session = self._session
        try:
            received = self._link.receive_into(session.receive_buffers(), deadline, blocking=blocking)
            if received == 0:
                self._end(session.end_of_stream())
                return
            for event in session.received(received):
                self._handle(event)
        except DeadlineError:
            raise
        except FastsplitError as error:
            self._end(error)
        except BaseException:
            self._end(ClosedError("the connection was closed: a read was interrupted"))
            raise

    def _handle(self, event: Event) -> None:
        if isinstance(event, Reply):
            future = self._futures.pop(event.request_id, None)
            if future is None:
                return
            started_ns = perf_counter_ns()
            try:
                result = Result(map(self._arrays.view, event.buffers, event.message.tensors))
            except TensorError as error:
                self._settle(future, None, error)
                return
            result.attrs = event.message.attrs
            # The peer's word: it cannot have worked longer than we have waited.
            waited_ns = started_ns - future._sent_ns
            result.remote_s = min(event.time_ns, waited_ns) * 1e-9
            result.wait_s = waited_ns * 1e-9
            self._stats.remote_s += result.remote_s
            self._session.decode_ns += perf_counter_ns() - started_ns
            self._settle(future, result, None)
        elif isinstance(event, Error):
            future = self._futures.pop(event.request_id, None)
            if future is not None:
                self._settle(future, None, _remote_error(future, event))
        elif isinstance(event, Hello):
            self._greeted = True
        elif isinstance(event, Goodbye):
            self._end(PeerLostError("the server closed the connection"))
        elif isinstance(event, Failed):
            if event.tell:
                self._abort(event.error)
            self._end(event.error)

    def _settle(self, future: Future, result: Result | None, error: BaseException | None) -> None:
        with self._lock:
            if future._done:  # given up at this moment
                return
            self._finish(future, result, error)
        if future._callbacks is not None:
            self._call_back(future)

    def _finish(self, future: Future, result: Result | None, error: BaseException | None) -> None:
        """Sets the outcome of a future that has none. The caller holds `_lock`, and calls back after it."""
        future._result, future._error = result, error
        future._done = True
        if self._followers:
            self._changed.notify_all()

    @staticmethod
    def _call_back(future: Future) -> None:
        callbacks, future._callbacks = future._callbacks, None
        for callback in callbacks or ():
            try:
                callback(future)
            except Exception:
                _logger.exception("a callback of %r failed", future)

    # ---- ending ----

    def _abort(self, error: RemoteProtocolError) -> None:
        """The peer broke the protocol: tell it how, if that is possible at once. Only the reader calls it."""
        self._fail(error)
        if self._sending.acquire(blocking=False):
            try:
                with contextlib.suppress(FastsplitError):
                    self._link.send([self._session.abort(str(error))])
            finally:
                self._release_sending()
            self._link.linger(time.monotonic() + _LINGER_S)

    def _fail(self, error: FastsplitError) -> FastsplitError:
        """Nothing can be called any more, and every future gets the error; the first error stays. Returns that."""
        with self._lock:
            if self._error is None:
                self._error = error
            self._closed = True
            futures = list(self._futures.values())
            self._futures.clear()
            for future in futures:
                self._finish(future, None, self._error)
        for future in futures:
            self._call_back(future)
        return self._error

    def _end(self, error: FastsplitError) -> FastsplitError:
        """Ends the connection. Returns the error that did so first."""
        error = self._fail(error)
        self._link.shutdown()
        self._close_when_unused()
        return error

    def _release_sending(self) -> None:
        self._sending.release()
        if self._closed:
            self._close_when_unused()

    def _close_when_unused(self) -> None:
        """Closes the descriptor once nobody can be in a system call on it (its number may be given to another file).

        Whoever sends or reads calls this again when it is done.
        """
        while self._sending.acquire(blocking=False):
            try:
                with self._lock:
                    if not self._reading:
                        self._link.close()
                        return
            finally:
                self._sending.release()
            if self._reading:
                return
            # A reader that left just now came here too, and found `_sending` taken by us: look again for both.


def _remote_error(future: Future, event: Error) -> FastsplitError:
    if event.code == "deadline":
        return DeadlineError(f"{future.op}: {event.text}")
    if event.code == "cancelled":
        return CancelledError(f"{future.op}: {event.text}")
    return RemoteOpError(future.op, event.text)

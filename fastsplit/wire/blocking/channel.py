"""The client that blocks: a Channel, whose callers wait in threads of their own.

A channel is made of parts, each of which knows only those before it: the core (client.py), which has no I/O; the reader
(reader.py), of which there is one at a time; the sender (sender.py); and the calls (calls.py).

Rules. All public methods are thread-safe. A deadline that passes while waiting costs only that call: a CANCEL goes out
and the answer is dropped when it comes. One that passes in the middle of a send, and any other error there, ends the
connection, as does any error of the peer's; then every call in flight gets that error.

Interrupts (session.py). A signal's handler that raises while a call waits (Ctrl-C) ends that call alone: it is
cancelled. One that raises while a frame is sent, or takes effect, ends the connection.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from threading import get_ident
from time import monotonic, sleep
from typing import Any, Unpack

from ...errors import ClosedError, DeadlineError, FastsplitError, PeerLostError
from ...schema.attrs import call_attrs
from ...system.forked import watch
from ...system.threads import Workers
from ...tensors import parse_expect
from ..client import UNSET, ClientCore, ClientFront, probe_sizes
from ..connection import Connection
from ..fastpath import add_fast_path
from ..options import BlockingClientKeywords, BlockingClientOptions, documented, parse_count, parse_timeout
from ..result import Result, warn_of_discarded
from ..rules import MAX_PADDING_NBYTES
from ..transport.address import parse_address
from ..transport.meter import HANDSHAKE_PADDING_NBYTES, LinkEstimate
from ..transport.spin import choose_spin_us
from .calls import Calls
from .future import Future
from .reader import Reader
from .sender import Sender

__all__ = ["Channel", "Future", "Result"]

_NAP_S = 0.001
_JOIN_S = 1.0  # how long `close` waits for a callback that runs in the channel's own thread


@documented(BlockingClientOptions)
class Channel(ClientFront):
    """A connection to a server. `fastsplit.connect` is this class; usable as a context manager.

    On a unix socket memory is shared unless the URI says `?shm=off`; see `shm`, `shm_reason` and docs/protocol.md.
    Codings (`wire_dtype`, `codec`) apply where bytes travel: with shared memory nothing is coded.

    With `overlap` the tensors of `submit` must not change before the result is in. Without it, the first `submit`
    starts a thread that reads while no caller does.

    Raises AddressError, ConnectError if no server listens there, DeadlineError if there is no handshake in time,
    RemoteProtocolError if what listens there is no fastsplit, and SettingError for an option that cannot be.
    """

    def __init__(self, uri: str, **options: Unpack[BlockingClientKeywords]) -> None:
        chosen = BlockingClientOptions.of(options)
        core = ClientCore(uri, chosen)
        super().__init__(core)
        deadline = monotonic() + chosen.timeout_s
        address = parse_address(uri)
        reader = self._reader = Reader(core)
        reader.open(
            Connection(
                address.connect(chosen.timeout_s),
                address,
                chosen,
                is_client=True,
                spin_us=chosen.spin_us,
                on_memory_pressure=reader.on_memory_pressure,
            )
        )
        self._sender = Sender(reader)
        self._calls = Calls(reader, self._sender)
        try:
            self._shake_hands(deadline, chosen)
            watch(reader)
            watch(self._sender)
            add_fast_path(
                core.connection, core.arrays, core.stats, future_type=Future, send_rest=self._sender.send_rest
            )
        except DeadlineError:
            reader.end(ClosedError("the handshake failed"))
            raise DeadlineError(f"{uri}: connected, but no handshake within {chosen.timeout_s} s") from None
        except BaseException:
            reader.end(ClosedError("the handshake failed"))
            raise

    def _shake_hands(self, deadline: float, options: BlockingClientOptions) -> None:
        core, connection = self._core, self._core.connection
        with contextlib.suppress(PeerLostError):  # refused at once: what the server said is still to be read
            connection.transport.send_all([core.session.hello()], deadline)
        self._read_until(lambda: core.has_hello, deadline)
        core.on_attached = connection.offer_ring(deadline)
        self._read_until(lambda: core.on_attached is None, deadline)
        core.check_coding()
        if core.measures:
            self._measure(HANDSHAKE_PADDING_NBYTES, options.timeout_s, deadline)
        if options.overlap and not core.has_shm:
            connection.coder.overlaps = True
            self._reader.start_watcher(keeps=True)
            self._sender.workers = Workers(1, f"fastsplit-send {self.uri}")

    def _read_until(self, condition: Callable[[], bool], deadline: float) -> None:
        """Reads for the handshake: no other thread uses the channel yet."""
        while not condition():
            self._reader.read_once(deadline)
            self._core.raise_error()
            if monotonic() >= deadline:
                raise DeadlineError("no reply")

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def spin_us(self) -> float:
        """Microseconds that a caller spins for its reply before it sleeps. May be set at any time: 0 where the server
        computes on the very cores that a caller would spin on."""
        return self._connection.transport.spin.spin_us

    @spin_us.setter
    def spin_us(self, spin_us: float) -> None:
        self._connection.transport.spin.spin_us = choose_spin_us(spin_us)

    def measure(self, nbytes: int = 1024**2, timeout_s: float = 10.0) -> LinkEstimate:
        """Measures the link now: a round trip, then `nbytes` each way (4 MiB at most). Returns what `link` says then.

        For when nothing else is in flight: what is shares the link with it. Raises DeadlineError, SettingError, and
        what ends the connection.
        """
        nbytes = parse_count("nbytes", nbytes, 0, MAX_PADDING_NBYTES)
        deadline = monotonic() + parse_timeout("timeout_s", timeout_s)
        self._core.check_connected()
        if self._core.measures:
            self._measure(nbytes, timeout_s, deadline)
        return self.link

    def _measure(self, nbytes: int, timeout_s: float, deadline: float) -> None:
        for size in probe_sizes(nbytes):
            self._sender.probe(size, timeout_s, deadline)

    def empty(self, shape: int | Sequence[int], dtype: Any = "float32", *, timeout_s: float | None = None) -> Any:
        """A tensor of undefined content, in the memory that this link sends from fastest; the caller's own.

        `dtype`: a name such as "bfloat16", or a torch or numpy dtype. Where memory is shared, it lies there: it goes by
        reference, and the handler that gets it works on the same bytes. `timeout_s`: seconds to wait for room there,
        the channel's `call_timeout_s` if None. Raises TensorError for another dtype and for a shape that no array can
        have, ArenaFull if there is no room, in shared memory or in the system's.
        """
        deadline = self._deadline(timeout_s)[1]
        return self._core.arrays.empty(shape, dtype, lambda nbytes: self._connection.allocate(nbytes, deadline))

    def call(
        self,
        op: str,
        /,
        *tensors: Any,
        timeout_s: float | None = None,
        expect: Sequence[tuple[Any, Sequence[int]]] | None = None,
        wire_dtype: str | None = UNSET,
        codec: str = UNSET,
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
        future: Future | None = None
        fast_path = self._reader.connection.fast_path
        if fast_path is not None and wire_dtype is UNSET and codec is UNSET:
            seconds = self._call_timeout_s if timeout_s is None else parse_timeout("timeout_s", timeout_s)
            expected = expect if expect is None else parse_expect(expect)
            answer = fast_path.call(self._reader, op, tensors, named, seconds, expected)
            if type(answer) is Result:
                return answer
            future = answer
        if future is None:
            timeout_s, deadline = self._deadline(timeout_s)
            asked = (op, tensors, timeout_s, deadline, expect, wire_dtype, codec, named)
            future = self._calls.start(asked) or self._calls.start_in_turn(asked)
        try:
            return future.result()
        finally:
            if not future._done:  # interrupted, and nothing else has the future
                future.cancel()
            del future  # else an error keeps this frame, and with it the future, which keeps the error: and tensors

    def submit(
        self,
        op: str,
        /,
        *tensors: Any,
        timeout_s: float | None = None,
        expect: Sequence[tuple[Any, Sequence[int]]] | None = None,
        wire_dtype: str | None = UNSET,
        codec: str = UNSET,
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
        watcher = self._reader.watcher
        if watcher is None or not watcher.runs:
            self._reader.start_watcher()  # before anything is sent: there may be no thread left
        fast_path = self._reader.connection.fast_path
        if fast_path is not None and wire_dtype is UNSET and codec is UNSET:
            future: Future | None = fast_path.submit(self._reader, op, tensors, named, timeout_s, parse_expect(expect))
            if future is not None:
                self._reader.attend(future._deadline)
                return future
        asked = (op, tensors, timeout_s, deadline, expect, wire_dtype, codec, named)
        future = self._calls.start(asked) or self._calls.start_in_turn(asked)
        self._reader.attend(deadline)
        return future

    def close(self, drain_s: float = 0.0) -> None:
        """Ends the connection: the server is told, and calls in flight fail with ClosedError. Idempotent.

        `drain_s`: seconds to wait for the replies of calls in flight; meanwhile new calls are refused. Calls still in
        flight after that are discarded; a warning gives their number for each operation.
        """
        drain_s = parse_timeout("drain_s", drain_s)
        core, reader, workers = self._core, self._reader, self._sender.workers
        fast_path = core.connection.fast_path
        inside = get_ident() in reader.inside  # in the middle of a call
        if drain_s and not core.closed and not inside:
            self._drain(drain_s)
        watcher = reader.watcher
        own = () if workers is None else workers.threads
        # in a callback of a thread of ours
        inside = inside or threading.current_thread() in (*own, None if watcher is None else watcher.thread)
        with reader.lock:
            first = not core.closed
            core.closed = core.refusing = True
            if core.error is None:  # now, so that it comes before the server's answer to the goodbye
                core.error = ClosedError("the channel was closed")
            discarded = [future.op for future in list(core.calls.values()) if not future._done] if first else []
            if first and fast_path is not None and fast_path.op is not None:
                discarded.append(fast_path.op)
        if first:
            held = False
            sending = core.connection.sending
            try:
                (held,) = map(sending.acquire, (True,), (0.0 if inside else 0.1,))
                if held:  # if a send is stuck, the end of the stream must do
                    with contextlib.suppress(FastsplitError):
                        core.connection.transport.send([core.session.goodbye()])
            finally:
                if held:
                    reader.release(sending)
        reader.end(ClosedError("the channel was closed"))
        if workers is not None:
            workers.shutdown(wait=not inside)
        if watcher is not None and not inside:
            watcher.close(_JOIN_S)
        reader.call_back()
        warn_of_discarded(self.uri, discarded)

    def _drain(self, drain_s: float) -> None:
        until = monotonic() + drain_s
        self._core.refusing = True
        for future in list(self._core.calls.values()):
            with contextlib.suppress(FastsplitError):  # the future keeps it
                self._reader.wait_for(future, max(until - monotonic(), 0.0))
        fast_path = self._core.connection.fast_path
        while fast_path is not None and fast_path.op is not None and monotonic() < until:
            sleep(_NAP_S)  # another thread waits for its call there

"""What a call gives: a Result now, or a Future of one, or an error. The channel sets the outcome and does all waiting.

Rules. A future's outcome is set once, under the channel's lock. A result's tensors are the caller's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import CancelledError, DeadlineError, FastsplitError, RemoteOpError, fresh
from ..tensors import Arrays
from .session import Error, Reply
from .threads import call_safely

if TYPE_CHECKING:
    from .channel import Channel

__all__ = ["Future", "Result", "remote_error"]


class Result(tuple):  # type: ignore[type-arg]
    """The tensors of a reply: a tuple, with what else the reply said.

    The tensors are writable and the caller's own. `attrs`: the reply's attributes. `remote_s`: seconds in the handler,
    as the server says, but never more than this side waited. `wait_s`: seconds from the end of encoding the request to
    the reply.
    """

    attrs: dict[str, Any]
    remote_s: float
    wait_s: float

    @classmethod
    def of(cls, event: Reply, arrays: Arrays, waited_ns: int) -> Result:
        """What a reply gives. Raises TensorError for a tensor that arrays of this kind cannot be, ResourceError if
        there was no memory for it."""
        if event.refusal is not None:
            raise fresh(event.refusal)
        result = cls(map(arrays.view, event.buffers, event.message.tensors))
        result.attrs = event.message.attrs
        # The peer's word: it cannot have worked longer than we have waited.
        result.remote_s = min(event.time_ns, waited_ns) * 1e-9
        result.wait_s = waited_ns * 1e-9
        return result


def remote_error(op: str, event: Error) -> FastsplitError:
    """What an ERROR frame means for the call that it answers."""
    if event.code == "deadline":
        return DeadlineError(f"{op}: {event.text}")
    if event.code == "cancelled":
        return CancelledError(f"{op}: {event.text}")
    return RemoteOpError(op, event.text)


class Future:
    """A call in flight. Made by `Channel.submit`."""

    __slots__ = (
        "__weakref__",
        "_begun",
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
        self._begun = False  # whether a byte of the request may have been sent
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
            try:
                raise fresh(self._error)  # else the future keeps the frames of those who asked, and their tensors
            finally:
                del self
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
        """Calls `callback(future)` when the call is done: at once if it is, otherwise in the thread that has read the
        reply, when that is neither reading nor sending: it may call and submit. What it raises is logged."""
        with self._channel._lock:
            if not self._done:
                self._callbacks = [*(self._callbacks or ()), callback]
                return
        call_safely(f"a callback of {self!r}", callback, self)

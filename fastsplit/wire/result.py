"""What a call gives: a Result, or an error that says what the server or the channel said.

Rules. A result's tensors are the caller's own. An error's text begins with the operation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from ..errors import CancelledError, DeadlineError, FastsplitError, RemoteOpError, fresh
from ..printable import get_logger
from ..tensors import Arrays
from .events import Error, Reply

__all__ = ["Result", "remote_error", "warn_of_discarded", "why_closed"]

_logger = get_logger("fastsplit.channel")


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


def why_closed(error: FastsplitError | None) -> str:
    """Why calls are refused. `error`: what has ended the connection, None if it is about to be closed."""
    return "the channel is being closed" if error is None else f"the channel is closed: {error}"


def warn_of_discarded(uri: str, ops: Iterable[str]) -> None:
    """Logs which calls were in flight when their channel was closed."""
    counts = Counter(ops)
    if counts:
        named = ", ".join(f"{count} of {op!r}" for op, count in counts.most_common())
        _logger.warning("%s: closed with calls in flight, whose results are lost: %s", uri, named)

"""How a blocking end sends what waits in an outbox: by waiting for room, in the calling thread or in a sender's.

The caller holds `Connection.sending` for each of these, except while a sender's thread has taken that over.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ...errors import DeadlineError, FastsplitError, PeerLostError, fresh
from ...system.threads import Workers
from ..outbox import Outbox

__all__ = ["ask_for_returns", "flush", "flush_in", "send_returns", "send_small", "wait_for_room"]

_SMALL_S = 0.005  # how long the rest of a small frame may take that the socket took only a part of
_NAP_S = 0.001


def wait_for_room(outbox: Outbox, deadline: float | None, *, reading: bool) -> tuple[bool, bool]:
    """Waits until the transport is (readable, writable), readable only if `reading`. Raises DeadlineError."""
    if outbox.needs_retry:
        time.sleep(_NAP_S)
    return outbox.transport.wait(deadline, reading=reading)


def flush(outbox: Outbox, deadline: float | None) -> None:
    """Sends all that waits. Raises PeerLostError, DeadlineError."""
    while not outbox.idle:
        wait_for_room(outbox, deadline, reading=False)
        outbox.flush()


def flush_in(
    sender: Workers, outbox: Outbox, deadline: float | None, done: Callable[[FastsplitError | None], object]
) -> bool:
    """Has the sender's thread send all that waits, and then call `done` with the error that ended that, or None.

    False if the sender has been shut down: nothing happens then.
    """

    def flush_behind() -> None:
        failure: FastsplitError | None = None
        try:
            flush(outbox, deadline)
        except FastsplitError as error:
            failure = fresh(error)
        finally:
            done(failure)

    return sender.submit(flush_behind)


def send_small(outbox: Outbox, head: bytearray) -> bool:
    """Sends a frame if there is room for it now; False if it was discarded. Raises PeerLostError."""
    sent = outbox.send_small(head)
    _finish(outbox)
    return sent


def send_returns(outbox: Outbox) -> None:
    """Sends all returns, as far as there is room for them now. Raises PeerLostError."""
    outbox.send_returns()
    _finish(outbox)


def ask_for_returns(outbox: Outbox) -> None:
    """Asks the peer for its returns, now and then. Raises PeerLostError."""
    head = outbox.ask(time.monotonic())
    if head is not None:
        send_small(outbox, head)


def _finish(outbox: Outbox) -> None:
    try:
        flush(outbox, time.monotonic() + _SMALL_S)
    except DeadlineError:
        outbox.transport.shutdown()  # nothing can follow the part
        raise PeerLostError("the connection is lost: the peer took only a part of a frame") from None

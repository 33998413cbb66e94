"""How good a link is: its round trip, and how many bytes a second it carries each way.

How it is measured. A PROBE asks the server to answer at once: that is a round trip, at the handshake and now and then
later. Both sides time how fast payloads come in, and tell each other. The part of a payload that is timed arrives after
its head was read: the rest was waiting in the kernel by then, and tells nothing of the link.

Rules. Estimates only decide how something is sent, never whether. What a peer says about its own speed is believed: it
could just as well be that slow. Payloads over loopback have arrived before they can be timed: then nothing is known,
which is treated as infinitely fast.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from time import perf_counter
from typing import NamedTuple

__all__ = ["HANDSHAKE_PADDING_NBYTES", "MIN_NBYTES", "LinkEstimate", "Meter"]

HANDSHAKE_PADDING_NBYTES = 64 * 1024
"""Each way, when a connection is made: 5 ms at 100 Mbit/s. A first guess, since an idle link takes some round trips to
come up to its speed; larger payloads correct it."""

MIN_NBYTES = 32 * 1024
"""Of a payload's timed part: the time of a smaller one depends on wake-ups more than on the link."""
_WINDOW_NBYTES = 32 * 1024**2
_ROUND_TRIPS = 8
_NEAR_S = 0.002
"""On a busy host one round trip over loopback may take longer, but hardly eight in a row."""
_PROBE_EVERY_S = 1.0
_PROBE_EVERY_NBYTES = 4 * 1024**2


class LinkEstimate(NamedTuple):
    """What is known of a link. None: not measured, or too fast to measure."""

    rtt_s: float | None = None
    """A round trip of a small frame."""
    send_bytes_per_s: float | None = None
    receive_bytes_per_s: float | None = None


class Meter:
    """What one side of a connection has measured. Its reader reports payloads; every thread may ask."""

    def __init__(self) -> None:
        self.peer_bytes_per_s = 0.0
        """How fast the peer receives, as it reports; 0 if it does not know."""
        self._samples: deque[tuple[int, float]] = deque()
        self._nbytes = 0
        self._seconds = 0.0
        self._started_s: float | None = None
        self._timed_nbytes = 0
        self._rtts: deque[float] = deque(maxlen=_ROUND_TRIPS)
        self._asked: dict[int, float] = {}
        self._lock = threading.Lock()  # guards `_asked` and `_number`
        self._number = 0
        self._probed_at: tuple[float, int] = (0.0, 0)

    @property
    def received_bytes_per_s(self) -> float:
        """How fast payloads came in lately; 0 if it is not known."""
        return self._nbytes / self._seconds if self._seconds else 0.0

    @property
    def is_near(self) -> bool:
        """Whether the peer answers as soon as one on this host does. True if no round trip is known."""
        return (self.rtt_s or 0.0) < _NEAR_S

    @property
    def rtt_s(self) -> float | None:
        """The shortest of the last round trips; None if none is known."""
        return min(list(self._rtts), default=None)

    def estimate(self) -> LinkEstimate:
        return LinkEstimate(self.rtt_s, self.peer_bytes_per_s or None, self.received_bytes_per_s or None)

    # ---- payloads ----

    def payload_begins(self, left: int, waiting: int) -> None:
        """`left` bytes of a payload are still to be read, of which `waiting` have arrived."""
        self._started_s = perf_counter()
        self._timed_nbytes = left - waiting

    def payload_waits(self) -> None:
        """This side pauses reading: the payload that is under way is not timed."""
        self._started_s = None

    def payload_ended(self) -> None:
        if self._started_s is None:
            return
        elapsed_s = perf_counter() - self._started_s
        self._started_s = None
        if self._timed_nbytes < MIN_NBYTES or elapsed_s <= 0.0:
            return
        self._samples.append((self._timed_nbytes, elapsed_s))
        self._nbytes += self._timed_nbytes
        self._seconds += elapsed_s
        # Samples before the last few megabytes are old, and those at the start were small.
        while len(self._samples) > 1 and self._nbytes - self._samples[0][0] >= min(
            _WINDOW_NBYTES, 4 * self._samples[-1][0]
        ):
            nbytes, seconds = self._samples.popleft()
            self._nbytes -= nbytes
            self._seconds = max(self._seconds - seconds, 1e-9)

    # ---- probes ----

    def on_probe(self, bytes_per_s: float, rtt_s: float) -> None:
        """Server: what the client reports with a probe; 0 for what it does not know."""
        self.peer_bytes_per_s = bytes_per_s
        if rtt_s:
            self._rtts.append(rtt_s)

    def next_probe(self) -> int:
        """The number of a probe that is sent now."""
        with self._lock:
            self._number += 1
            number = self._number
            while len(self._asked) >= _ROUND_TRIPS:  # the peer has not answered these
                del self._asked[next(iter(self._asked))]
            self._asked[number] = perf_counter()
        return number

    def on_answer(self, number: int, bytes_per_s: float) -> bool:
        """The answer to a probe came in. False if no probe of that number waits for one."""
        with self._lock:
            asked_s = self._asked.pop(number, math.inf)
        if asked_s == math.inf:
            return False
        self._rtts.append(perf_counter() - asked_s)
        self.peer_bytes_per_s = bytes_per_s
        return True

    def is_probe_due(self, total_nbytes: int) -> bool:
        """Whether enough time and bytes have passed since the last True. `total_nbytes`: of the connection so far."""
        now = perf_counter()
        then, before = self._probed_at
        if total_nbytes - before < _PROBE_EVERY_NBYTES or now - then < _PROBE_EVERY_S:
            return False
        self._probed_at = (now, total_nbytes)
        return True

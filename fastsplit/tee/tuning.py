"""How a pass is best divided for the link that there is: plans, lanes, blocks of scores, a cast for the wire.

    link = look(channel, timeout_s)
    choice = choose(model.config, model.dtype, rows, link=link, threads=model.threads)
    runner = Runner(model, channel, choice=choice)

Where both sides share memory, or are near each other, nothing of this matters, and things are as `auto` always had
them. On a link that takes time the plan is the one with the fewest calls and the fewest bytes, `linear`, if the model
can have it. And there are four who can work at the same time: the bytes' way up, the executor, the bytes' way down, and
this side. So a prompt goes in several stretches, lanes, each of which is at another of the four.

The model of time (`prefill_s`). A pass moves U bytes up and D down in R calls one after another (`ops.traffic`).
One stretch: the sum, U / up + D / down + R * (round trip + what a call costs). N lanes: whatever takes longest, one of
the two directions, max(U / up, D / down), or the way of one stretch through its R calls, with its share of the bytes;
and the way of the first call before anything overlaps. What the two sides compute is the same in any case, and left
out.

Rules. Everything but `look` is pure: numbers in, a `Choice` out. What the user asks for is what is chosen, as far as
the model can have it. A measured link is the peer's word: it may make things slow, and nothing else. Each decision has
its reason, one line for people.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ..errors import SettingError
from ..models import ModelConfig
from ..split.ops import MAX_LANES, PLANS, Traffic, choose_plan, traffic
from ..wire.transport.address import parse_address

if TYPE_CHECKING:
    from ..wire.blocking.channel import Channel
    from ..wire.transport.meter import LinkEstimate

__all__ = [
    "ASKED_FOR",
    "CASTS",
    "MIN_STRETCH_ROWS",
    "Choice",
    "Link",
    "choose",
    "look",
    "may_overlap",
    "prefill_s",
]

CASTS = ("auto", "off", "bfloat16", "float16")
"""What float32 may travel as; see `choose`."""

ASKED_FOR = "asked for"
"""The reason of whatever the user decided."""

MIN_STRETCH_ROWS = 64
"""Into smaller stretches nothing is cut: below, products take no less time for having fewer rows."""

_LANES = (4, 6, 8)
"""How many lanes there may be on a link that takes time, if nobody says: one at each of the four who work, or more,
where round trips take longer than bytes."""

_WORTH = 0.95
"""More lanes than before must save a twentieth: they make stretches smaller, which the model of time does not know."""

_CALL_S = 3e-4
"""What a call costs beside the link: both sides' Python, waking up, products with fewer rows."""

_NEAR_RTT_S, _NEAR_BYTES_PER_S = 1.5e-4, 1e9
"""A faster link is as good as one within the host: loopback takes 30 to 100 us and 1 to 3 GB/s."""

_CAST_BYTES_PER_S = 1e9
"""How many float32 bytes a second are cast, there and back, on both sides together. Half of them need not travel then:
a cast pays where 0.5 / speed > 1 / this, below 500 MB/s."""

_SMALL_BLOCKS = (250e6, 32)
_BLOCK_ROWS = MIN_STRETCH_ROWS
"""Rows in a block of scores on a link that takes time; and (bytes a second, rows) where it is slower than that. Of a
square of n x n scores (1 + block / n) / 2 travels; the products of smaller blocks are less efficient."""

_TYPICAL_ROWS = 512

_PROBE_NBYTES, _PROBE_S, _PROBE_TIMEOUT_S = 2**20, 0.5, 60.0
"""What `look` sends each way at most, how long that should take, and when it gives up."""


class Link(NamedTuple):
    """What a link takes: seconds a round trip, and seconds a byte in each direction."""

    rtt_s: float
    up_s: float
    down_s: float

    @classmethod
    def of(cls, estimate: LinkEstimate) -> Link:
        """Of what was measured; what is not known costs nothing."""
        speeds = (estimate.send_bytes_per_s, estimate.receive_bytes_per_s)
        return cls(estimate.rtt_s or 0.0, *(1 / speed if speed else 0.0 for speed in speeds))

    @property
    def near(self) -> bool:
        return self.rtt_s < _NEAR_RTT_S and max(self.up_s, self.down_s) < 1 / _NEAR_BYTES_PER_S

    @property
    def byte_s(self) -> float:
        """Seconds a byte, of as many up as down."""
        return (self.up_s + self.down_s) / 2

    def __str__(self) -> str:
        speeds = ["unlimited" if not each else f"{1e-6 / each:.4g} MB/s" for each in (self.up_s, self.down_s)]
        both = f"{speeds[0]} both ways" if speeds[0] == speeds[1] else f"{speeds[0]} up and {speeds[1]} down"
        return f"{both}, {self.rtt_s * 1e3:.3g} ms a round trip"


@dataclass(frozen=True)
class Choice:
    """What a Runner runs with. Reasons are for people."""

    plan: str
    """A key of ops.PLANS."""
    plan_reason: str
    lanes: int
    lanes_reason: str
    block_rows: int | None = None
    """Rows in a block of scores; None: what `choose_block_rows` says."""
    block_rows_reason: str = ""
    cast: str | None = None
    """What float32 travels as, None: float32."""
    cast_reason: str = ""

    def lines(self) -> list[str]:
        """Plan, lanes and cast with their reasons, a line each."""
        found = [f"plan {self.plan}: {self.plan_reason}", f"lanes {self.lanes}: {self.lanes_reason}"]
        if self.block_rows is not None:
            found.append(f"blocks of {self.block_rows} rows: {self.block_rows_reason}")
        return [*found, f"cast {self.cast or 'off'}: {self.cast_reason}"]


def look(channel: Channel, timeout_s: float | None = None) -> LinkEstimate | None:
    """What the link of a channel can do, measured now; None within a host: over shared memory and unix sockets.

    Takes a few round trips and up to half a second for bytes, going by what the handshake found. Raises DeadlineError,
    and what ends the connection.
    """
    if channel.shm or parse_address(channel.uri).is_local:
        return None
    speeds = [speed for speed in channel.link[1:] if speed]
    nbytes = int(min([_PROBE_NBYTES, *(_PROBE_S / 2 * speed for speed in speeds)]))
    return channel.measure(nbytes, _PROBE_TIMEOUT_S if timeout_s is None else timeout_s)


def may_overlap(uri: str, lanes: int | None = None) -> bool:
    """Whether a connection to `uri` should have threads of its own that send and receive, as far as that can be said
    before the link has been measured: there may be several lanes, and it leads off this host.

    Raises AddressError.
    """
    if lanes is not None:
        return lanes > 1
    return not parse_address(uri).is_local


def choose(
    config: ModelConfig,
    dtype: str,
    rows: int | None = None,
    *,
    batch: int = 1,
    link: LinkEstimate | None = None,
    shm: bool = False,
    near: bool = False,
    threads: int = 1,
    plan: str = "auto",
    lanes: int | None = None,
    block_rows: int | None = None,
    cast: str = "auto",
    wire_dtype: str | None = None,
) -> Choice:
    """The choice for prompts of `rows` tokens (None: a typical length) in `batch` sequences, and steps after them.

    `dtype`: the executor's. `link`: None, or all of it None: not known. `shm`: memory is shared. `near`: the peer is on
    this host, whatever was measured while it was busy. `threads`: how many
    cores the executor computes with, 0 on a device of its own. `plan`, `lanes`, `block_rows`, `cast`, `wire_dtype`:
    what the user asks for; "auto" or None: nothing.

    Raises SettingError for a plan, a cast, or a number of lanes that there is not.
    """
    if cast not in CASTS:
        raise SettingError(f"cast {cast!r}, expected one of {', '.join(CASTS)}")
    if lanes is not None and not 1 <= lanes <= MAX_LANES:
        raise SettingError(f"lanes: {lanes}, expected 1 to {MAX_LANES}")
    rows = min(rows or _TYPICAL_ROWS, config.max_position_embeddings)
    travels = wire_dtype or dtype
    dtypes = (dtype, travels)
    speed = None if link is None or link == (None, None, None) else Link.of(link)
    near = near or (speed is not None and speed.near)
    kind, cast_reason = _cast(cast, travels, shm, near, speed)
    if shm or speed is None or near:
        where = "shared memory" if shm else "a link of unknown speed" if speed is None else f"{speed}: within a host"
        chosen, reason = choose_plan(plan, config, dtypes)
        if not reason:
            reason = f"{where}: linear is for links that take time" if plan == "auto" else ASKED_FOR
        count, lanes_reason = _near_lanes(lanes, threads)
        blocks_reason = "" if block_rows is None else ASKED_FOR
        return Choice(chosen, reason, count, lanes_reason, block_rows, blocks_reason, kind, cast_reason)
    block_rows, blocks_reason = _block_rows(block_rows, speed)
    itemsize = 2 if kind is not None or travels != "float32" else 4
    chosen, reason = choose_plan("linear" if plan == "auto" else plan, config, dtypes)
    if not reason and plan == "auto":
        ours, other = (
            _moved_text(traffic(config, each, itemsize, 0, rows, batch=batch, block_rows=block_rows))
            for each in (chosen, "folded")
        )
        reason = f"{speed}: {ours[0]} round trips and {ours[1]}, folded {other[0]} and {other[1]}"

    def time_of(count: int) -> float:
        return prefill_s(config, chosen, itemsize, rows, speed, lanes=count, batch=batch, block_rows=block_rows)

    count, lanes_reason = _far_lanes(lanes, rows, [(each, time_of(each)) for each in (1, *_LANES)], threads)
    return Choice(chosen, reason or ASKED_FOR, count, lanes_reason, block_rows, blocks_reason, kind, cast_reason)


def prefill_s(
    config: ModelConfig,
    plan: str,
    itemsize: int,
    rows: int,
    link: Link,
    *,
    lanes: int = 1,
    batch: int = 1,
    block_rows: int | None = None,
) -> float:
    """Seconds that a prompt of `rows` tokens spends on the link; the module's text has the formula."""
    pieces = min(lanes, max(rows // MIN_STRETCH_ROWS, 1))
    up_s = down_s = 0.0
    start = 0
    for piece in range(pieces):
        end = rows * (piece + 1) // pieces
        moved = traffic(
            config,
            plan,
            itemsize,
            start,
            end - start,
            batch=batch,
            block_rows=block_rows,
            last=piece == pieces - 1,
        )
        up_s += moved.sent * link.up_s
        down_s += moved.received * link.down_s
        start = end
    calls = _calls(config, plan)
    trips_s = calls * (link.rtt_s + _CALL_S)
    if pieces == 1:
        return up_s + down_s + trips_s
    one_s = (up_s + down_s) / pieces + trips_s
    return max(up_s, down_s, one_s, pieces * calls * _CALL_S) + (up_s + down_s) / pieces / calls


def _calls(config: ModelConfig, plan: str) -> int:
    per_layer, once = PLANS[plan]
    return per_layer * config.num_hidden_layers + once


def _moved_text(moved: Traffic) -> tuple[int, str]:
    """The calls, and the bytes of both ways."""
    nbytes = moved.sent + moved.received
    return moved.calls, f"{nbytes / 1e9:.3g} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.3g} MB"


def _near_lanes(wanted: int | None, threads: int) -> tuple[int, str]:
    """How many lanes where the link takes no time, and why."""
    if wanted is not None:
        return wanted, ASKED_FOR
    if threads:
        return 1, "the executor computes with cores, maybe ours"
    return 2, "the executor computes beside our cores"


def _far_lanes(wanted: int | None, rows: int, times: Sequence[tuple[int, float]], threads: int) -> tuple[int, str]:
    """How many lanes on a link that takes time, and why. `times`: (lanes, seconds on the link), of one lane first."""
    if wanted is not None:
        return _near_lanes(wanted, threads)
    most = rows // MIN_STRETCH_ROWS
    if most < 2:
        return 1, f"{rows} rows: not cut below {2 * MIN_STRETCH_ROWS}"
    (_, one_s), (best, best_s), *more = times
    for count, time_s in more:
        if count <= most and time_s < _WORTH * best_s:
            best, best_s = count, time_s
    if best_s >= one_s:  # all that is known to take time is the calls
        return _near_lanes(wanted, threads)
    found = min(best, most)
    return found, f"{one_s:.3g} s on the link one after another, {best_s:.3g} s at once"


def _block_rows(wanted: int | None, link: Link) -> tuple[int, str]:
    if wanted is not None:
        return wanted, ASKED_FOR
    bytes_per_s, rows = _SMALL_BLOCKS
    if link.byte_s > 1 / bytes_per_s:
        return rows, f"below {bytes_per_s / 1e6:g} MB/s: fewer scores behind the diagonal travel"
    return _BLOCK_ROWS, "fewer scores behind the diagonal travel"


def _cast(wanted: str, travels: str, shm: bool, near: bool, link: Link | None) -> tuple[str | None, str]:
    """What float32 travels as, and why. Over what cannot be measured nothing is cast unless it is asked for."""
    if shm:
        return None, "shared memory: nothing travels"
    if travels != "float32":
        return None, f"{travels} travels: nothing to cast"
    if wanted == "off":
        return None, ASKED_FOR
    if wanted != "auto":
        return wanted, ASKED_FOR
    if link is None:
        return None, "a link of unknown speed"
    if near:
        return None, "within a host"
    limit = _CAST_BYTES_PER_S / 2e6
    if link.byte_s > 2 / _CAST_BYTES_PER_S:
        return "float16", f"below {limit:g} MB/s half the bytes pay for two casts"
    return None, f"above {limit:g} MB/s two casts take longer than half the bytes"

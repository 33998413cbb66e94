"""Settings of a split for the link that it has: plan, lanes, rows in a block of scores, cast.

    link = measure_link(channel, timeout_s)
    tuning = tune(model.config, model.dtype, rows, link=link, shm=channel.shm, near=channel.near, threads=model.threads)
    runner = Runner(model, channel, choice=tuning)

`tee/open.py` makes these calls for the script, for `SplitModelForCausalLM` and for any program.

A near link (shared memory, the same host) gets the plan `folded`, one or two lanes, and no cast. A remote link gets the
plan with the fewest calls and bytes that the model allows. Either gets `tee-attention` instead where the model of time
says that it is faster. On a remote link four resources can be busy at the same time: the link's two directions, the
executor and the TEE side. A prompt is therefore cut into chunks, one for each lane.

The model of time (`prefill_s`). A pass sends U bytes and receives D bytes in R consecutive calls (`traffic`). One chunk
takes the sum, U / up + D / down + R * (round trip + overhead of a call). N lanes take the longest of four: U / up;
D / down; one chunk's way through its R calls with its share of the bytes; the overhead of all chunks' calls. The first
call is added, since nothing overlaps with it. The time of computing is the same for all settings and left out, with one
exception: where attention is computed. In the TEE its products take time that an executor with a device would save
(`attention_s`). An executor on cores takes that time as well, and both sides write and read the
scores besides (`scores_s`).

Rules. All functions except `measure_link` are pure: they map numbers to a `Tuning`. A setting that the user gives is
used, as far as the model allows it. A measured link comes from the peer and is untrusted: it can make a run slow and
has no other effect. Each setting has a reason of one line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ..errors import SettingError
from ..models import LINEARS, ModelConfig
from ..split.contract import MAX_LANES, Traffic, traffic
from ..split.plan import PLANS, Plan, choose_plan
from ..wire.transport.address import parse_address
from .chunks import MIN_CHUNK_ROWS

if TYPE_CHECKING:
    from ..wire.blocking.channel import Channel
    from ..wire.transport.meter import LinkEstimate

__all__ = [
    "ASKED_FOR",
    "CASTS",
    "Link",
    "Tuning",
    "may_overlap",
    "measure_link",
    "prefill_s",
    "tune",
]

_MINIMAL, _TEE_ATTENTION = "minimal", "tee-attention"

CASTS = ("auto", "off", "bfloat16", "float16")
"""dtypes that float32 tensors may have on the link; "auto" and "off": see `tune`."""

ASKED_FOR = "asked for"
"""The reason of a setting that the user gave."""

_REMOTE_LANES = (4, 6, 8)
"""Numbers of lanes to consider on a remote link: one for each of the four resources, or more if round trips take longer
than bytes."""

_MAX_TIME_RATIO = 0.95
"""More lanes must save at least 5 % of the time: smaller chunks have costs that the model of time leaves out."""

_CALL_S = 3e-4
"""Overhead of a call apart from the link: Python on both sides, wake-ups, products with fewer rows."""

_NEAR_RTT_S, _NEAR_BYTES_PER_S = 1.5e-4, 1e9
"""A link that is faster than both counts as near. Loopback has 30 to 100 us and 1 to 3 GB/s."""

_CAST_BYTES_PER_S = 1e9
"""Speed of casting float32 on one side and back on the other. A cast halves the bytes, so it pays where
0.5 / speed > 1 / this, below 500 MB/s."""

_BLOCK_ROWS = MIN_CHUNK_ROWS
_SMALL_BLOCKS = (250e6, 32)
"""Rows in a block of scores on a remote link, and (bytes/s, rows) of slower links. Of n x n scores (1 + block / n) / 2
travel; products of smaller blocks are less efficient."""

_TYPICAL_ROWS = 512

_FLOPS_PER_S = 1e11
"""Floating-point operations of a core in a second, about."""

_SCORE_PASSES, _MEMORY_BYTES_PER_S = 5, 1e10
"""How often a score is written or read between its product and the next one, and how quickly."""

_MIN_SAVED_SHARE, _MIN_SAVED_S = 0.1, 0.1
"""On a near link tee-attention must save this share of a prompt's time, and this many seconds."""

_PROBE_NBYTES, _PROBE_S, _PROBE_TIMEOUT_S = 2**20, 0.5, 60.0
"""`measure_link`: maximum bytes in each direction, intended seconds for both, default deadline."""


class Link(NamedTuple):
    """The costs of a link: seconds for a round trip, and seconds for a byte in each direction."""

    rtt_s: float
    up_s: float
    down_s: float

    @classmethod
    def of(cls, estimate: LinkEstimate) -> Link:
        """The costs that an estimate states; an unknown one is 0."""
        speeds = (estimate.send_bytes_per_s, estimate.receive_bytes_per_s)
        return cls(estimate.rtt_s or 0.0, *(1 / speed if speed else 0.0 for speed in speeds))

    @property
    def near(self) -> bool:
        return self.rtt_s < _NEAR_RTT_S and max(self.up_s, self.down_s) < 1 / _NEAR_BYTES_PER_S

    @property
    def byte_s(self) -> float:
        """Seconds for a byte, the average of both directions."""
        return (self.up_s + self.down_s) / 2

    def __str__(self) -> str:
        speeds = ["unlimited" if not each else f"{1e-6 / each:.4g} MB/s" for each in (self.up_s, self.down_s)]
        both = f"{speeds[0]} both ways" if speeds[0] == speeds[1] else f"{speeds[0]} up and {speeds[1]} down"
        return f"{both}, {self.rtt_s * 1e3:.3g} ms a round trip"


@dataclass(frozen=True)
class Tuning:
    """The settings of a Runner. Each `_reason` is one line for people."""

    plan: str
    """A key of PLANS."""
    plan_reason: str
    lanes: int
    lanes_reason: str
    block_rows: int | None = None
    """Rows in a block of scores; None: the default of `choose_block_rows`."""
    block_rows_reason: str = ""
    cast: str | None = None
    """dtype of float32 tensors on the link; None: float32."""
    cast_reason: str = ""

    def lines(self) -> list[str]:
        """Plan, lanes, block rows if set, and cast, each with its reason."""
        found = [f"plan {self.plan}: {self.plan_reason}", f"lanes {self.lanes}: {self.lanes_reason}"]
        if self.block_rows is not None:
            found.append(f"blocks of {self.block_rows} rows: {self.block_rows_reason}")
        return [*found, f"cast {self.cast or 'off'}: {self.cast_reason}"]


def measure_link(channel: Channel, timeout_s: float | None = None) -> LinkEstimate | None:
    """The speed of the channel's link, measured now; None over shared memory and unix sockets, which are near.

    Takes a few round trips, and up to half a second for bytes by the speed that the handshake found. `timeout_s`: None
    for 60 s. Raises DeadlineError, and any error that ends the connection.
    """
    if channel.shm or parse_address(channel.uri).is_local:
        return None
    speeds = [speed for speed in channel.link[1:] if speed]
    nbytes = int(min([_PROBE_NBYTES, *(_PROBE_S / 2 * speed for speed in speeds)]))
    return channel.measure(nbytes, _PROBE_TIMEOUT_S if timeout_s is None else timeout_s)


def may_overlap(uri: str, lanes: int | None = None) -> bool:
    """Whether a connection to `uri` needs threads that send and receive (`connect(overlap=)`): with several lanes.

    `lanes`: None if `tune` will choose them; then a connection off this host may get several. Raises AddressError.
    """
    if lanes is not None:
        return lanes > 1
    return not parse_address(uri).is_local


def tune(
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
    tee_threads: int = 1,
    has_embedding: bool = False,
) -> Tuning:
    """The settings for prompts of `rows` tokens (None: a typical length) in `batch` sequences, and steps after them.

    `dtype`: the executor's. `link`: None, or all of it None, if unknown. `shm`: memory is shared. `near`: the peer is
    on this host; measured speeds are then ignored. `threads`: cores that the executor computes with, 0 on a device of
    its own. `plan`, `lanes`, `block_rows`, `cast`, `wire_dtype`: the user's settings; "auto" or None leaves them to
    this function. `tee_threads`: cores that the TEE side computes with. `has_embedding`: whether it has the
    embedding's weights.

    Raises SettingError for an unknown plan or cast, and for lanes outside of 1 to MAX_LANES.
    """
    if cast not in CASTS:
        raise SettingError(f"cast {cast!r}, expected one of {', '.join(CASTS)}")
    if lanes is not None and not 1 <= lanes <= MAX_LANES:
        raise SettingError(f"lanes: {lanes}, expected 1 to {MAX_LANES}")
    rows = min(rows or _TYPICAL_ROWS, config.max_position_embeddings)
    link_dtype = wire_dtype or dtype
    speed = None if link is None or link == (None, None, None) else Link.of(link)
    near = near or (speed is not None and speed.near)
    kind, cast_reason = _cast(cast, link_dtype, shm, near, speed)
    itemsize = 2 if kind is not None or link_dtype != "float32" else 4
    dtypes = (dtype, link_dtype)
    if shm or speed is None or near:
        prompt = _Prompt(config, dtypes, has_embedding, itemsize, rows, batch, block_rows)
        chosen, plan_reason = _near_plan(plan, prompt, shm, speed, threads)
        count, lanes_reason = _near_lanes(lanes, threads)
        blocks_reason = "" if block_rows is None else ASKED_FOR
        return Tuning(chosen, plan_reason, count, lanes_reason, block_rows, blocks_reason, kind, cast_reason)
    block_rows, blocks_reason = _remote_block_rows(block_rows, speed)
    prompt = _Prompt(config, dtypes, has_embedding, itemsize, rows, batch, block_rows)
    chosen, plan_reason = _remote_plan(plan, prompt, speed, lanes, threads, tee_threads)
    count, lanes_reason = _remote_lanes(lanes, prompt.plan(chosen), speed, prompt, threads)
    return Tuning(chosen, plan_reason, count, lanes_reason, block_rows, blocks_reason, kind, cast_reason)


def prefill_s(
    config: ModelConfig,
    plan: Plan,
    itemsize: int,
    rows: int,
    link: Link,
    *,
    lanes: int = 1,
    batch: int = 1,
    block_rows: int | None = None,
) -> float:
    """Seconds that a prompt of `rows` tokens spends on the link; the module's text has the formula."""
    chunks = min(lanes, max(rows // MIN_CHUNK_ROWS, 1))
    up_s = down_s = 0.0
    start = 0
    for chunk in range(chunks):
        end = rows * (chunk + 1) // chunks
        moved = traffic(
            config,
            plan,
            itemsize,
            start,
            end - start,
            batch=batch,
            block_rows=block_rows,
            wants_logits=chunk == chunks - 1,
        )
        up_s += moved.sent * link.up_s
        down_s += moved.received * link.down_s
        start = end
    calls = plan.calls(config.num_hidden_layers)
    trips_s = calls * (link.rtt_s + _CALL_S)
    if chunks == 1:
        return up_s + down_s + trips_s
    chunk_s = (up_s + down_s) / chunks + trips_s
    return max(up_s, down_s, chunk_s, chunks * calls * _CALL_S) + (up_s + down_s) / chunks / calls


class _Prompt(NamedTuple):
    """What decides how much a prompt moves and computes."""

    config: ModelConfig
    dtypes: tuple[str, str]
    has_embedding: bool
    itemsize: int
    rows: int
    batch: int
    block_rows: int | None

    def plan(self, name: str) -> Plan:
        return PLANS[name].form(self.config, self.dtypes, has_embedding=self.has_embedding)

    def traffic(self, plan: Plan) -> Traffic:
        return traffic(self.config, plan, self.itemsize, 0, self.rows, batch=self.batch, block_rows=self.block_rows)

    def link_s(self, plan: Plan, link: Link, lanes: int) -> float:
        return prefill_s(
            self.config,
            plan,
            self.itemsize,
            self.rows,
            link,
            lanes=lanes,
            batch=self.batch,
            block_rows=self.block_rows,
        )

    def linear_s(self, threads: int) -> float:
        """Seconds of the layers' linear operations on `threads` cores."""
        config = self.config
        weights = sum(config.in_features(name) * config.out_features(name) for name in LINEARS)
        return 2 * self.batch * self.rows * weights * config.num_hidden_layers / (threads * _FLOPS_PER_S)

    def attention_s(self, threads: int) -> float:
        """Seconds of the attention's products on so many cores: two, of half a square of scores."""
        return 2 * self._scores * self.config.head_dim * 2 / (threads * _FLOPS_PER_S)

    def scores_s(self) -> float:
        """Seconds of writing and reading scores that a fused attention does not write."""
        return self._scores * 4 * _SCORE_PASSES / _MEMORY_BYTES_PER_S

    @property
    def _scores(self) -> float:
        config = self.config
        seen = (min(config.window(layer) or self.rows, self.rows) for layer in range(config.num_hidden_layers))
        return sum(self.batch * config.num_attention_heads * self.rows * columns / 2 for columns in seen)


def _near_plan(wanted: str, prompt: _Prompt, shm: bool, link: Link | None, threads: int) -> tuple[str, str]:
    """The plan on a near link, and its reason."""
    chosen, reason = choose_plan(wanted, prompt.config, prompt.dtypes)
    if wanted != "auto":
        return chosen, reason or ASKED_FOR
    if threads:
        saved_s, rest_s = prompt.scores_s(), prompt.linear_s(threads) + prompt.attention_s(threads)
        if saved_s > max(_MIN_SAVED_S, _MIN_SAVED_SHARE * rest_s):
            text = f"the executor computes with cores, too: fused attention here saves {saved_s:.2g} s of scores"
            return _TEE_ATTENTION, f"{text}, for {prompt.rows} rows"
    if reason:
        return chosen, reason
    where = "shared memory" if shm else "a link of unknown speed" if link is None else f"{link}: within a host"
    return chosen, f"{where}: {_MINIMAL} is for links that take time"


def _remote_plan(
    wanted: str, prompt: _Prompt, link: Link, lanes: int | None, threads: int, tee_threads: int
) -> tuple[str, str]:
    """The plan on a remote link, and its reason."""
    chosen, reason = choose_plan(_MINIMAL if wanted == "auto" else wanted, prompt.config, prompt.dtypes)
    if wanted != "auto":
        return chosen, reason or ASKED_FOR
    plan, here = prompt.plan(chosen), prompt.plan(_TEE_ATTENTION)
    seconds, here_s = (
        prompt.link_s(each, link, _remote_lanes(lanes, each, link, prompt, threads)[0]) for each in (plan, here)
    )
    if threads:
        seconds += prompt.scores_s()
    else:
        here_s += prompt.attention_s(tee_threads)
    (calls, nbytes), (here_calls, here_nbytes) = (_shown(prompt.traffic(each)) for each in (plan, here))
    if here_s < _MAX_TIME_RATIO * seconds:
        text = f"{link}: {here_calls} round trips and {here_nbytes}, {here_s:.3g} s; {chosen} {calls} and {nbytes}"
        return _TEE_ATTENTION, f"{text}, {seconds:.3g} s"
    if reason:
        return chosen, reason
    other_calls, other_nbytes = _shown(prompt.traffic(prompt.plan("folded")))
    return chosen, f"{link}: {calls} round trips and {nbytes}, folded {other_calls} and {other_nbytes}"


def _shown(moved: Traffic) -> tuple[int, str]:
    """The calls, and the bytes of both directions as text."""
    nbytes = moved.sent + moved.received
    return moved.calls, f"{nbytes / 1e9:.3g} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.3g} MB"


def _near_lanes(wanted: int | None, threads: int) -> tuple[int, str]:
    """The lanes where the link takes no time, and the reason."""
    if wanted is not None:
        return wanted, ASKED_FOR
    if threads:
        return 1, "the executor computes on cores, which both sides may share"
    return 2, "the executor has a device of its own"


def _remote_lanes(wanted: int | None, plan: Plan, link: Link, prompt: _Prompt, threads: int) -> tuple[int, str]:
    """The lanes on a remote link, and the reason."""
    if wanted is not None:
        return wanted, ASKED_FOR
    max_lanes = prompt.rows // MIN_CHUNK_ROWS
    if max_lanes < 2:
        return 1, f"{prompt.rows} rows: not cut below {2 * MIN_CHUNK_ROWS}"
    one_s = prompt.link_s(plan, link, 1)
    best = _REMOTE_LANES[0]
    best_s = prompt.link_s(plan, link, best)
    for count in _REMOTE_LANES[1:]:
        time_s = prompt.link_s(plan, link, count)
        if count <= max_lanes and time_s < _MAX_TIME_RATIO * best_s:
            best, best_s = count, time_s
    if best_s >= one_s:  # only calls take time: there are no bytes to overlap
        return _near_lanes(None, threads)
    return min(best, max_lanes), f"{one_s:.3g} s on the link one after another, {best_s:.3g} s at once"


def _remote_block_rows(wanted: int | None, link: Link) -> tuple[int, str]:
    """The rows in a block of scores on a remote link, and the reason."""
    if wanted is not None:
        return wanted, ASKED_FOR
    bytes_per_s, rows = _SMALL_BLOCKS
    if link.byte_s > 1 / bytes_per_s:
        return rows, f"below {bytes_per_s / 1e6:g} MB/s: fewer scores behind the diagonal travel"
    return _BLOCK_ROWS, "fewer scores behind the diagonal travel"


def _cast(wanted: str, link_dtype: str, shm: bool, near: bool, link: Link | None) -> tuple[str | None, str]:
    """The dtype of float32 tensors on the link (None: float32), and the reason."""
    if shm:
        return None, "shared memory: nothing travels"
    if link_dtype != "float32":
        return None, f"{link_dtype} travels: nothing to cast"
    if wanted != "auto":
        return None if wanted == "off" else wanted, ASKED_FOR
    if link is None:
        return None, "a link of unknown speed"
    if near:
        return None, "within a host"
    limit = _CAST_BYTES_PER_S / 2e6
    if link.byte_s > 2 / _CAST_BYTES_PER_S:
        return "float16", f"below {limit:g} MB/s half the bytes pay for two casts"
    return None, f"above {limit:g} MB/s two casts take longer than half the bytes"

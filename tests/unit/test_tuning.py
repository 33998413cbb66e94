"""How a pass is divided: for each kind of link and model, what is chosen, and that there is a reason."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from fastsplit.models import PRESETS, ModelConfig
from fastsplit.split.blocks import choose_block_rows, packed_elements, row_blocks
from fastsplit.split.contract import Traffic, traffic
from fastsplit.split.plan import PLAN_ALIASES, PLANS
from fastsplit.tee.tuning import ASKED_FOR, MIN_CHUNK_ROWS, Link, may_overlap, measure_link, prefill_s, tune


class Estimate(NamedTuple):
    """As wire/transport/meter.py has it."""

    rtt_s: float | None = None
    send_bytes_per_s: float | None = None
    receive_bytes_per_s: float | None = None


LLAMA = PRESETS["tinyllama-1.1b"]
GEMMA, QWEN = PRESETS["tiny-gemma2"], PRESETS["tiny-qwen3"]
LOOPBACK = Estimate(5e-5, 2e9, None)
LAN = Estimate(2e-4, 1.25e9, 1.25e9)
METRO = Estimate(5e-3, 125e6, 125e6)
WAN = Estimate(2e-2, 12.5e6, 12.5e6)
FAR = {"10 Gbit/s": LAN, "1 Gbit/s": METRO, "100 Mbit/s": WAN}
NEAR: dict[str, dict[str, Any]] = {
    "shared memory": {"shm": True},
    "not measured": {},
    "unknown": {"link": Estimate()},
    "loopback": {"link": LOOPBACK},
    "shared memory, whatever was measured": {"shm": True, "link": WAN},
}


def pick(config: ModelConfig = LLAMA, rows: int = 1024, dtype: str = "float32", **options: Any) -> Any:
    tuning = tune(config, dtype, rows, **options)
    reasons = [tuning.plan_reason, tuning.lanes_reason, tuning.cast_reason]
    if tuning.block_rows is not None:
        reasons.append(tuning.block_rows_reason)
    for reason in reasons:
        assert reason and "\n" not in reason
    lines = tuning.lines()
    assert [line.split()[0] for line in lines if line.split()[0] in ("plan", "lanes", "cast")] == [
        "plan",
        "lanes",
        "cast",
    ]
    assert all(": " in line for line in lines)
    return tuning


# ---- links -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NEAR)
@pytest.mark.parametrize(("threads", "lanes"), [(0, 2), (1, 1), (8, 1)])
def test_within_a_host_things_are_as_auto_always_had_them(name: str, threads: int, lanes: int) -> None:
    for rows in (1, 30, 1024):
        tuning = pick(rows=rows, threads=threads, **NEAR[name])
        assert (tuning.plan, tuning.lanes) == ("folded", lanes)
        assert (tuning.block_rows, tuning.cast) == (None, None)


@pytest.mark.parametrize("name", FAR)
@pytest.mark.parametrize("threads", [0, 8])
def test_on_a_link_that_takes_time_the_plan_is_linear_in_several_lanes(name: str, threads: int) -> None:
    tuning = pick(link=FAR[name], threads=threads)
    assert tuning.plan == "linear"
    assert 4 <= tuning.lanes <= 8
    assert tuning.block_rows == {"10 Gbit/s": 64, "1 Gbit/s": 32, "100 Mbit/s": 32}[name]
    assert tuning.cast == {"10 Gbit/s": None, "1 Gbit/s": "float16", "100 Mbit/s": "float16"}[name]


@pytest.mark.parametrize(("cast", "gigabytes"), [("off", (4.72, 5.13)), ("float16", (2.36, 2.56))])
def test_the_reason_for_linear_is_fewer_calls_and_fewer_bytes(cast: str, gigabytes: tuple[float, float]) -> None:
    reason = pick(link=Estimate(5.3e-3, 125e6, 125e6), cast=cast).plan_reason
    link, _, numbers = reason.partition(": ")
    assert link == "125 MB/s both ways, 5.3 ms a round trip"
    assert numbers == f"45 round trips and {gigabytes[0]} GB, folded 67 and {gigabytes[1]} GB"
    sizes = [sum(traffic(LLAMA, plan, 4, 0, 1, block_rows=32)[1:]) / 1e6 for plan in ("linear", "folded")]
    reason = pick(rows=1, link=Estimate(0.1, 1e6, 2e6), cast="off").plan_reason
    link, _, numbers = reason.partition(": ")
    assert link == "1 MB/s up and 2 MB/s down, 100 ms a round trip"
    assert numbers == f"45 round trips and {sizes[0]:.3g} MB, folded 67 and {sizes[1]:.3g} MB"


@pytest.mark.parametrize("name", FAR)
def test_a_prompt_that_is_not_cut_has_one_lane(name: str) -> None:
    for rows in (1, 10, 127):
        tuning = pick(rows=rows, link=FAR[name])
        assert (tuning.plan, tuning.lanes) == ("linear", 1)
        assert tuning.lanes_reason == f"{rows} rows: not cut below 128"


@pytest.mark.parametrize("name", FAR)
@pytest.mark.parametrize("rows", [128, 200, 256, 500, 2048])
def test_stretches_have_64_rows_or_more(name: str, rows: int) -> None:
    tuning = pick(rows=rows, link=FAR[name])
    assert 1 <= tuning.lanes <= max(rows // MIN_CHUNK_ROWS, 1)


@pytest.mark.parametrize("plan", ["auto", "folded"])
def test_the_longer_a_round_trip_the_more_lanes(plan: str) -> None:
    links = [Estimate(rtt_s, 125e6, 125e6) for rtt_s in (1e-3, 1e-2, 0.1)]
    lanes = [pick(rows=512, link=link, plan=plan).lanes for link in links]
    assert lanes == sorted(lanes)
    assert lanes[0] == 4 < lanes[-1] <= 8


def test_a_link_of_which_only_the_round_trip_is_known_to_take_time() -> None:
    """There are no bytes to overlap: only calls."""
    for threads, lanes in ((0, 2), (4, 1)):
        tuning = pick(link=Estimate(0.01), threads=threads)
        assert (tuning.plan, tuning.lanes, tuning.cast) == ("linear", lanes, None)


def test_speeds_that_are_no_number_to_divide_by_cost_nothing() -> None:
    assert Link.of(Estimate(0.1, 0.0, None)) == (0.1, 0.0, 0.0)


@pytest.mark.parametrize(
    ("up", "down", "cast"),
    [(450e6, 450e6, "float16"), (550e6, 550e6, None), (100e6, None, "float16"), (None, 5e9, None), (1e9, 400e6, None)],
)
def test_a_cast_pays_where_half_the_bytes_take_longer(up: float | None, down: float | None, cast: str | None) -> None:
    assert pick(link=Estimate(1e-3, up, down)).cast == cast


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAR)
def test_families_without_linear_have_lanes_all_the_same(name: str) -> None:
    for config, plan in ((GEMMA, "fused"), (QWEN, "folded"), (replace(LLAMA, attention_bias=True), "folded")):
        tuning = pick(config, 256, link=FAR[name])
        assert tuning.plan == plan
        assert tuning.lanes >= 1
    assert pick(replace(LLAMA, attention_bias=True), link=FAR[name]).lanes >= 4
    assert "gemma2: norms after attention" in pick(GEMMA, link=FAR[name]).plan_reason
    assert pick(QWEN, link=FAR[name]).plan_reason == "qwen3: norms of q and k come between the products"


@pytest.mark.parametrize("dtypes", [("float16", None), ("float32", "float16")])
def test_float16_in_executor_or_wire_is_fused(dtypes: tuple[str, str | None]) -> None:
    tuning = pick(dtype=dtypes[0], wire_dtype=dtypes[1], link=METRO)
    assert (tuning.plan, tuning.cast) == ("fused", None)
    assert tuning.plan_reason == "float16: the residual stream may leave its range"


@pytest.mark.parametrize("dtypes", [("bfloat16", None), ("float32", "bfloat16"), ("float16", None)])
@pytest.mark.parametrize("cast", ["auto", "float16", "bfloat16", "off"])
def test_what_travels_in_16_bits_is_not_cast(dtypes: tuple[str, str | None], cast: str) -> None:
    tuning = pick(dtype=dtypes[0], wire_dtype=dtypes[1], link=WAN, cast=cast)
    assert (tuning.cast, tuning.cast_reason) == (None, f"{dtypes[1] or dtypes[0]} travels: nothing to cast")


def test_wide_wires_of_narrow_executors_are_cast() -> None:
    assert pick(dtype="bfloat16", wire_dtype="float32", link=WAN).cast == "float16"


def test_a_length_that_is_not_known_is_a_typical_one_that_the_model_has() -> None:
    assert tune(LLAMA, "float32", link=WAN) == tune(LLAMA, "float32", 512, link=WAN)
    assert tune(replace(LLAMA, max_position_embeddings=100), "float32", link=WAN).lanes == 1


# ---- what is asked for -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", [None, METRO, WAN])
@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_that_is_asked_for(link: Estimate | None, plan: str) -> None:
    tuning = pick(link=link, plan=plan)
    assert (tuning.plan, tuning.plan_reason) == (plan, ASKED_FOR)
    assert tuning.lanes == (1 if link is None else 4)


@pytest.mark.parametrize("link", [None, METRO])
@pytest.mark.parametrize("alias", PLAN_ALIASES)
def test_another_name_of_a_plan(link: Estimate | None, alias: str) -> None:
    tuning = pick(link=link, plan=alias)
    assert (tuning.plan, tuning.plan_reason) == (PLAN_ALIASES[alias], ASKED_FOR)


@pytest.mark.parametrize("link", [None, METRO])
def test_a_plan_that_the_model_cannot_have_is_replaced_with_the_models_reason(link: Estimate | None) -> None:
    tuning = pick(QWEN, link=link, plan="linear")
    assert tuning.plan == "folded"
    assert tuning.plan_reason == "qwen3: norms of q and k come between the products"


@pytest.mark.parametrize("link", [None, LOOPBACK, METRO, WAN])
@pytest.mark.parametrize("lanes", [1, 3, 16])
def test_lanes_that_are_asked_for(link: Estimate | None, lanes: int) -> None:
    for rows in (40, 1024):
        tuning = pick(rows=rows, link=link, lanes=lanes)
        assert (tuning.lanes, tuning.lanes_reason) == (lanes, ASKED_FOR)
        assert tuning.plan == ("linear" if link in (METRO, WAN) else "folded")
    assert pick(link=link, lanes=lanes, plan="linear").lanes == lanes


@pytest.mark.parametrize("link", [None, LOOPBACK, LAN, WAN])
@pytest.mark.parametrize("cast", ["off", "bfloat16", "float16"])
def test_a_cast_that_is_asked_for(link: Estimate | None, cast: str) -> None:
    tuning = pick(link=link, cast=cast)
    assert (tuning.cast, tuning.cast_reason) == (None if cast == "off" else cast, ASKED_FOR)
    tuning = pick(link=link, cast=cast, shm=True)
    assert (tuning.cast, tuning.cast_reason) == (None, "shared memory: nothing travels")


@pytest.mark.parametrize("link", [None, WAN])
def test_blocks_that_are_asked_for(link: Estimate | None) -> None:
    tuning = pick(link=link, block_rows=100)
    assert (tuning.block_rows, tuning.block_rows_reason) == (100, ASKED_FOR)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"cast": "float32"}, "cast 'float32', expected one of auto, off, bfloat16, float16"),
        ({"cast": ""}, "cast ''"),
        ({"lanes": 0}, "lanes: 0, expected 1 to 16"),
        ({"lanes": 17}, "lanes: 17, expected 1 to 16"),
        ({"plan": "best"}, "plan 'best', expected one of auto"),
    ],
)
def test_what_there_is_not(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        pick(**options)


# ---- the model of time -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("plan", "calls"), [("folded", 67), ("linear", 45)])
def test_one_lane_takes_the_sum_and_several_the_slowest_part(plan: str, calls: int) -> None:
    link = Link(1e-4, 1e-8, 2e-8)
    moved = traffic(LLAMA, plan, 4, 0, 1024)
    one_s = prefill_s(LLAMA, plan, 4, 1024, link)
    assert one_s == pytest.approx(moved.sent * 1e-8 + moved.received * 2e-8 + calls * 4e-4)
    four_s = prefill_s(LLAMA, plan, 4, 1024, link, lanes=4)
    assert four_s == pytest.approx(moved.received * 2e-8, rel=0.1), "down takes the longest, and up is beside it"


@pytest.mark.parametrize(("plan", "calls"), [("folded", 67), ("linear", 45)])
def test_where_round_trips_take_the_longest_the_calls_of_one_stretch_do(plan: str, calls: int) -> None:
    link = Link(0.5, 1e-9, 1e-9)
    assert prefill_s(LLAMA, plan, 4, 512, link, lanes=8) == pytest.approx(calls * 0.5, rel=0.1)


def test_a_stretch_of_linear_that_ends_early_moves_scales_in_place_of_q_and_k() -> None:
    rows, inter, hidden, vocab = 256, LLAMA.intermediate_size, LLAMA.hidden_size, LLAMA.vocab_size
    whole, part = (traffic(LLAMA, "linear", 4, 0, rows, last=last) for last in (True, False))
    scores = packed_elements(1, LLAMA.num_attention_heads, row_blocks(1, rows, 1))
    assert whole.calls - part.calls == 1
    assert whole.sent - part.sent == 4 * (scores + inter) + 8, "weights, h, and which row goes on"
    assert whole.received - part.received == 4 * (scores + hidden + 2 * inter + hidden + vocab)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_half_the_itemsize_is_half_the_bytes(plan: str, itemsize: int) -> None:
    other = 4 // itemsize * 2
    found, twice = (traffic(LLAMA, plan, size, 0, 300) for size in (itemsize, other))
    ratio = other / itemsize
    assert twice.received == ratio * found.received
    assert twice.sent == pytest.approx(ratio * found.sent, rel=1e-2), "ids and scales are what they are"
    assert twice.calls == found.calls


def test_a_batch_moves_what_its_sequences_do() -> None:
    one, three = (traffic(LLAMA, "folded", 4, 0, 256, batch=batch) for batch in (1, 3))
    assert Traffic(one.calls, 3 * one.sent, 3 * one.received) == three


def test_smaller_blocks_move_less() -> None:
    sent = [traffic(LLAMA, "folded", 4, 0, 1024, block_rows=rows).sent for rows in (32, 64, 128, None, 1024)]
    assert sent == sorted(sent)
    assert sent[2] == sent[3]
    assert choose_block_rows(10_000, 32) == 157, "no more than a message may have"


# ---- channels --------------------------------------------------------------------------------------------------------


class _Channel:
    """What `measure_link` asks of a channel."""

    def __init__(self, uri: str, shm: bool = False, link: Estimate = METRO) -> None:
        self.uri, self.shm, self.link = uri, shm, link
        self.measured: list[tuple[int, float]] = []

    def measure(self, nbytes: int, timeout_s: float) -> Estimate:
        self.measured.append((nbytes, timeout_s))
        return WAN


@pytest.mark.parametrize(
    ("uri", "shm", "looks"),
    [
        ("unix:///x", True, False),
        ("unix:///x?shm=off", False, False),
        ("tcp://127.0.0.1:9?shm=/dev/shm/x", True, False),
        ("tcp://10.0.0.2:9", False, True),
        ("vsock://3:9", False, True),
    ],
)
def test_a_link_within_the_host_is_not_measured(uri: str, shm: bool, looks: bool) -> None:
    channel: Any = _Channel(uri, shm)
    assert measure_link(channel, 7.0) == (WAN if looks else None)
    assert channel.measured == ([(2**20, 7.0)] if looks else [])


def test_a_slow_link_is_measured_with_fewer_bytes() -> None:
    channel: Any = _Channel("tcp://10.0.0.2:9", link=Estimate(0.1, None, 1e6))
    measure_link(channel)
    assert channel.measured == [(250_000, 60.0)]


@pytest.mark.parametrize(
    ("uri", "lanes", "overlap"),
    [
        ("unix:///x", None, False),
        ("unix:///x?shm=off", 2, True),
        ("tcp://10.0.0.2:9", None, True),
        ("vsock://3:9", 4, True),
        ("tcp://10.0.0.2:9", 1, False),
    ],
)
def test_bytes_travel_beside_the_computing_where_there_may_be_lanes(uri: str, lanes: int | None, overlap: bool) -> None:
    assert may_overlap(uri, lanes) is overlap


def test_nothing_is_asked_of_a_channel_but_what_is_here() -> None:
    channel: Any = SimpleNamespace(shm=True)
    assert measure_link(channel) is None

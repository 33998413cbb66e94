"""The meter: what it makes of payloads and probes. The clock is the test's."""

from __future__ import annotations

import itertools

import pytest

from fastsplit.wire.transport import meter as estimate
from fastsplit.wire.transport.meter import MIN_NBYTES, LinkEstimate, Meter

MIB = 1024**2


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(estimate, "perf_counter", clock)
    return clock


def _payload(meter: Meter, clock: Clock, nbytes: int, seconds: float, waiting: int = 0) -> None:
    meter.payload_begins(nbytes, waiting)
    clock.now += seconds
    meter.payload_ended()


def test_nothing_is_known_at_first() -> None:
    meter = Meter()
    assert meter.estimate() == LinkEstimate(None, None, None)
    assert meter.received_bytes_per_s == 0.0
    assert meter.is_near
    meter.payload_ended()  # which never began
    assert meter.received_bytes_per_s == 0.0


def test_payloads_are_timed(clock: Clock) -> None:
    meter = Meter()
    _payload(meter, clock, MIB, 0.1)
    assert meter.received_bytes_per_s == pytest.approx(10 * MIB)
    _payload(meter, clock, MIB, 0.3)
    assert meter.received_bytes_per_s == pytest.approx(5 * MIB)
    assert meter.estimate().receive_bytes_per_s == pytest.approx(5 * MIB)


def test_what_waited_already_does_not_count(clock: Clock) -> None:
    meter = Meter()
    _payload(meter, clock, MIB, 0.001, waiting=MIB - MIN_NBYTES + 1)
    _payload(meter, clock, MIB, 0.001, waiting=2**62)  # the system does not say
    _payload(meter, clock, MIB, 0.0)  # the clock did not move
    assert meter.received_bytes_per_s == 0.0
    _payload(meter, clock, MIB, 0.1, waiting=MIB // 2)
    assert meter.received_bytes_per_s == pytest.approx(5 * MIB)


def test_what_is_old_or_small_is_forgotten(clock: Clock) -> None:
    meter = Meter()
    _payload(meter, clock, MIN_NBYTES, 10.0)
    _payload(meter, clock, MIB, 0.1)  # four times as much as this is kept
    assert meter.received_bytes_per_s == pytest.approx((MIB + MIN_NBYTES) / 10.1)
    for _ in range(4):
        _payload(meter, clock, MIB, 0.1)
    assert meter.received_bytes_per_s == pytest.approx(10 * MIB)
    for _ in range(5):
        _payload(meter, clock, MIB, 1.0)
    assert meter.received_bytes_per_s == pytest.approx(MIB)
    _payload(meter, clock, 64 * MIB, 1.0)  # larger than the window
    _payload(meter, clock, 64 * MIB, 2.0)
    assert meter.received_bytes_per_s == pytest.approx(32 * MIB)


def test_round_trips_and_the_peers_word(clock: Clock) -> None:
    meter = Meter()
    for seconds, rate in ((0.05, 0.0), (0.02, 7e6), (0.03, 8e6)):
        number = meter.next_probe()
        clock.now += seconds
        assert meter.on_answer(number, rate)
    assert meter.estimate() == LinkEstimate(pytest.approx(0.02), 8e6, None)
    assert not meter.is_near
    number = meter.next_probe()
    clock.now += 0.001
    assert meter.on_answer(number, 0.0)
    assert meter.is_near
    assert meter.estimate().send_bytes_per_s is None  # it does not know any more
    for _ in range(8):  # a short one is forgotten, too
        number = meter.next_probe()
        clock.now += 0.004
        meter.on_answer(number, 0.0)
    assert not meter.is_near


def test_answers_that_were_not_asked_for(clock: Clock) -> None:
    meter = Meter()
    assert not meter.on_answer(1, 5.0)
    number = meter.next_probe()
    assert meter.on_answer(number, 1.0)
    assert not meter.on_answer(number, 5.0)  # twice
    assert meter.peer_bytes_per_s == 1.0
    numbers = [meter.next_probe() for _ in range(20)]
    assert len(set(numbers)) == 20
    assert [meter.on_answer(number, 1.0) for number in numbers] == [False] * 12 + [True] * 8


def test_when_a_probe_is_due(clock: Clock) -> None:
    meter = Meter()
    assert not meter.is_probe_due(4 * MIB - 1)
    assert meter.is_probe_due(4 * MIB)
    assert not meter.is_probe_due(4 * MIB)
    clock.now += 5.0
    assert not meter.is_probe_due(8 * MIB - 1)
    assert meter.is_probe_due(8 * MIB)
    clock.now += 0.99
    assert not meter.is_probe_due(20 * MIB)
    clock.now += 0.02
    assert meter.is_probe_due(20 * MIB)


def test_seconds_never_become_zero(clock: Clock) -> None:
    meter = Meter()
    for nbytes, seconds in itertools.product((MIN_NBYTES, 40 * MIB), (1e-9, 1e3)):
        for _ in range(3):
            _payload(meter, clock, nbytes, seconds)
            assert 0.0 < meter.received_bytes_per_s < float("inf")

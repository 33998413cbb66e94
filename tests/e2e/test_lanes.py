"""Long prompts in chunks, one after another or several under way at once: the same logits, in memory that stays
flat, in an order that the caches can rely on."""

from __future__ import annotations

import contextlib
import gc
import math
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
from lazy_driver import LazyDriver
from split import (
    Named,
    cut_as_with_scores,
    named_models,
    random_ids,
    relative_error,
    split,
)

import fastsplit
from fastsplit.errors import RemoteOpError
from fastsplit.executor.cuda import Cuda
from fastsplit.executor.device import Cpu
from fastsplit.executor.service import Executor
from fastsplit.models import Model
from fastsplit.split.contract import MAX_LANES
from fastsplit.split.plan import PLANS
from fastsplit.tee.masks import GeometryMaker, _corner
from fastsplit.tee.remote import RemoteModel
from fastsplit.tee.runner import Runner
from fastsplit.wire.call import Client
from fastsplit.wire.stats import Stats

pytestmark = pytest.mark.matrix(each=False)

VOCAB = 97
LIMIT = 512
"""Positions of the small models."""
SCORE_NBYTES = 6 * 4
"""One row's scores of one position, of all heads."""
TOLERANCE = 2e-5
FAMILIES: dict[str, tuple[str, ...]] = {
    "grouped heads": tuple(PLANS),
    "everything at once": ("folded",),
    "dynamic rope": ("minimal",),
    "mistral": ("folded", "minimal", "tee-attention"),
    "qwen2 with windows": ("fused", "folded"),
    "qwen3": ("folded",),
    "gemma2": ("fused", "tee-attention"),
    "gemma3": ("fused",),
    "phi3": ("fused", "minimal", "tee-attention"),
}
"""The plans that are tested: one family has all, the others those that differ in what they have of their own."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Named]:
    return named_models(tmp_path_factory)


@pytest.fixture(scope="module")
def llama(models: Callable[[str], Named]) -> Named:
    return models("grouped heads")


def hf_logits(reference: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    if mask is None:
        mask = torch.ones_like(ids)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    logits: torch.Tensor = reference(ids, attention_mask=mask.long(), position_ids=positions, use_cache=False).logits
    return logits


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert relative_error(ours, theirs) <= TOLERANCE


# ---- chunks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "plan"), [(family, plan) for family, plans in FAMILIES.items() for plan in plans])
def test_a_prompt_as_long_as_the_model_goes_in_many_chunks(
    models: Callable[[str], Named], unix_uri: str, family: str, plan: str
) -> None:
    model, reference = models(family)
    ids = random_ids(1, LIMIT)
    expected = hf_logits(reference, ids)
    with split(model, unix_uri, plan=plan, scores_nbytes=SCORE_NBYTES * 9000) as (runner, _):
        assert runner.plan == plan and len(runner._cutter.cut(1, 0, LIMIT)) > 15
        with runner.new_cache(1, LIMIT) as cache:
            logits = runner.forward(ids, cache, keep="all")
            assert cache.length == LIMIT
        with runner.new_cache() as cache:
            last = runner.forward(ids, cache)
    assert_same(logits, expected)
    assert_same(last, expected[:, -1:])
    with split(model, unix_uri, plan=plan) as (runner, _), runner.new_cache() as cache:
        assert runner._cutter.cut(1, 0, LIMIT) == [LIMIT]
        assert_same(runner.forward(ids, cache, keep="all"), logits)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("scores_nbytes", [0, SCORE_NBYTES * 3 * 50])
def test_however_little_memory_there_is_at_least_one_row_goes(
    llama: Named, unix_uri: str, plan: str, scores_nbytes: int
) -> None:
    model, reference = llama
    ids = random_ids(3, 20)
    mask = torch.arange(20) >= torch.tensor([[0], [7], [19]])
    keep = torch.tensor([5, 13, 19])
    with split(model, unix_uri, plan=plan, scores_nbytes=scores_nbytes) as (runner, _):
        assert max(runner._cutter.cut(3, 0, 20)) <= 7
        with runner.new_cache(3) as cache:
            logits = runner.forward(ids, cache, mask=mask, keep=keep)
        with runner.new_cache(3) as cache:
            whole = runner.forward(ids, cache, mask=mask, keep="all")
    expected = hf_logits(reference, ids, mask)
    assert_same(logits[:, 0], expected[torch.arange(3), keep])
    assert_same(whole[mask], expected[mask])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("lanes", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 1, 100, 10_000])
def test_chunks_are_all_rows_and_fit_the_memory(
    llama: Named, unix_uri: str, batch: int, lanes: int, start: int
) -> None:
    nbytes = SCORE_NBYTES * 300_000
    with split(llama[0], unix_uri, plan="auto", lanes=lanes, scores_nbytes=nbytes) as (runner, _):
        for rows in (1, 2, 127, 128, 129, 1000, 4096):
            counts = runner._cutter.cut(batch, start, rows)
            assert sum(counts) == rows and min(counts) >= 1
            at = start
            for count in counts:
                assert count == 1 or batch * count * (at + count) * SCORE_NBYTES <= nbytes
                at += count
            if lanes > 1 and rows >= 256:
                assert len(counts) >= 2, "something for each side to do"


@pytest.mark.parametrize("block_rows", [9, 128, 1000])
@pytest.mark.parametrize("plan", PLANS)
def test_blocks_of_any_size_are_the_same(
    models: Callable[[str], Named], unix_uri: str, plan: str, block_rows: int
) -> None:
    model, reference = models("mistral")
    ids = random_ids(2, 150)
    mask = torch.arange(150) >= torch.tensor([[0], [61]])
    for given in (None, mask):
        expected = hf_logits(reference, ids, given)
        real = mask if given is not None else torch.ones_like(mask)
        with split(model, unix_uri, plan=plan, block_rows=block_rows) as (runner, _), runner.new_cache(2) as cache:
            logits = runner.forward(ids[:, :100], cache, mask=None if given is None else given[:, :100], keep="all")
            logits = torch.cat([logits, runner.forward(ids[:, 100:], cache, keep="all")], dim=1)
        assert_same(logits[real], expected[real])


@pytest.mark.parametrize("rows", [129, 257])
@pytest.mark.parametrize("plan", PLANS)
def test_the_last_block_may_have_one_row(llama: Named, unix_uri: str, plan: str, rows: int) -> None:
    model, reference = llama
    ids = random_ids(1, rows)
    with split(model, unix_uri, plan=plan) as (runner, _), runner.new_cache() as cache:
        logits = runner.forward(ids, cache, keep="all")
    assert_same(logits, hf_logits(reference, ids))


# ---- memory ----------------------------------------------------------------------------------------------------------


class _Reply(tuple):  # type: ignore[type-arg]
    attrs: dict[str, Any]


class LocalBackend:
    """An executor's handlers, called directly; knows how much of its memory is alive. What lies there is NaN before."""

    def __init__(self, model: Model, device: Any = None) -> None:
        self.stats = Stats()
        self.alive_nbytes = 0
        self.most_nbytes = 0
        self.in_flight = 0
        self.most_in_flight = 0
        self.requests: list[tuple[str, int, int, int]] = []
        """steps, lane, layer, start; of those that belong to a lane."""
        self._client = Client()
        self._handlers = Executor(model, device=device).handlers

    def empty(self, shape: Sequence[int], dtype: Any) -> torch.Tensor:
        kind: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        nbytes = math.prod(shape) * kind.itemsize
        memory = np.full(nbytes, 255, np.uint8)
        self.alive_nbytes += nbytes
        self.most_nbytes = max(self.most_nbytes, self.alive_nbytes)
        weakref.finalize(memory, self._freed, nbytes)
        return torch.from_numpy(memory).view(kind).view(tuple(shape))

    def _freed(self, nbytes: int) -> None:
        self.alive_nbytes -= nbytes

    def call(self, op: str, /, *tensors: torch.Tensor, expect: Any = None, **attrs: Any) -> Any:
        if "lane" in attrs:
            self.requests.append((attrs["steps"], attrs["lane"], attrs["layer"], attrs["start"]))
        attrs = {name: list(value) if isinstance(value, tuple) else value for name, value in attrs.items()}
        call: Any = SimpleNamespace(
            op=op, tensors=tensors, attrs=attrs, reply_attrs={}, empty=self.empty, client=self._client
        )
        del tensors
        result = self._handlers[op](call)
        call.tensors = ()
        reply = _Reply(() if result is None else result if isinstance(result, (tuple, list)) else (result,))
        reply.attrs = call.reply_attrs
        if expect is not None:
            assert [(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for tensor in reply] == list(expect)
        return reply

    def submit(self, op: str, /, *tensors: torch.Tensor, **options: Any) -> Any:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        replies = [self.call(op, *tensors, **options)]

        def result() -> Any:
            self.in_flight -= 1
            return replies.pop()

        return SimpleNamespace(result=result)

    def runner(self, model: Model, plan: str, **options: Any) -> Runner:
        runner = Runner(RemoteModel.fetch(self, model), self, plan, **options)
        return cut_as_with_scores(runner, options.get("scores_nbytes"))


@pytest.mark.parametrize(
    ("plan", "lanes", "padding"),
    [
        *((plan, 1, False) for plan in PLANS),
        ("fused", 3, False),
        ("folded", 3, False),
        ("fused", 1, True),
        ("minimal", 1, True),
        ("minimal", 3, False),
        ("minimal", 3, True),
        ("folded", 3, True),
    ],
)
def test_memory_that_tensors_travel_in_stays_flat(llama: Named, plan: str, lanes: int, padding: bool) -> None:
    """However long the prompt: of scores there is what was allowed, and of everything else what a chunk takes."""
    model, _ = llama
    most = {}
    for rows, scores_nbytes in ((512, 2**19), (1024, 2**19), (1026, 2**30)):
        backend = LocalBackend(model)
        runner = backend.runner(model, plan, lanes=lanes, scores_nbytes=scores_nbytes)
        mask = torch.arange(rows)[None] >= 20 if padding else None
        with torch.inference_mode():
            cache = runner.new_cache(1, rows)
            logits = runner.forward(random_ids(1, rows), cache, mask=mask)
            del logits
        gc.collect()
        most[rows] = backend.most_nbytes
        assert backend.alive_nbytes <= scores_nbytes, "what the lanes keep"
    assert most[1024] <= 1.1 * most[512]
    assert most[512] <= lanes * (2**19 + 2**19)
    if lanes == 1:
        assert most[1024] < most[1026] / 2, "in one chunk it is more"


@pytest.mark.parametrize("plan", ["folded", "tee-attention"])
@pytest.mark.parametrize("padding", [False, True])
def test_memory_for_masks_stays_flat(llama: Named, monkeypatch: pytest.MonkeyPatch, padding: bool, plan: str) -> None:
    """What says which scores are masked has as many elements as they have, for each head's."""
    model, _ = llama
    alive: dict[int, int] = {}
    most = 0
    masked_of = GeometryMaker._masked

    def masked(self: GeometryMaker, *args: Any) -> Any:
        nonlocal most
        parts = masked_of(self, *args)
        for _, mask in parts:
            if id(mask) not in alive:  # some are kept, and come again
                alive[id(mask)] = mask.nbytes
                weakref.finalize(mask, alive.pop, id(mask))
            most = max(most, sum(alive.values()))
        return parts

    monkeypatch.setattr(GeometryMaker, "_masked", masked)
    found = []
    for rows in (256, 1024):
        backend = LocalBackend(model)
        runner = backend.runner(model, plan, scores_nbytes=2**19)
        most = 0
        with torch.inference_mode():
            runner.forward(
                random_ids(1, rows), runner.new_cache(1), mask=torch.arange(rows)[None] >= 20 if padding else None
            )
        _corner.cache_clear()
        assert not alive, "nothing is left behind"
        found.append(most)
    assert found[1] <= 4 * found[0]


# ---- lanes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "lanes"),
    [*((plan, 3) for plan in PLANS), *((plan, lanes) for plan in ("fused", "folded") for lanes in (2, MAX_LANES))],
)
@pytest.mark.parametrize("keep", ["last", "all"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_lanes_give_what_one_gives(llama: Named, unix_uri: str, plan: str, lanes: int, keep: str, padding: str) -> None:
    model, reference = llama
    ids, mask = padded_long(padding)
    batch, rows = mask.shape
    given = None if padding == "none" else mask
    with split(model, unix_uri, plan=plan, lanes=lanes, scores_nbytes=LONG_NBYTES) as (runner, _):
        assert runner.lanes == lanes
        assert len(runner._cutter.cut(batch, 0, rows)) > 3
        with runner.new_cache(batch) as cache:
            logits = runner.forward(ids[:, :rows], cache, mask=given, keep=keep)
            after = runner.forward(ids[:, rows:], cache, keep="all")
    whole = torch.cat([mask, mask.new_ones(batch, 4)], dim=1)
    expected = hf_logits(reference, ids, whole)
    assert_same(after, expected[:, rows:])
    expected = expected[:, :rows]
    if keep == "all":
        assert_same(logits[mask], expected[mask])
    elif padding != "right":
        assert_same(logits[:, 0], expected[:, -1])


LONG_NBYTES = SCORE_NBYTES * 2 * 270 * 60


def padded_long(padding: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sequences of 274, and which of the first 270 are tokens."""
    mask = torch.ones(2, 270, dtype=torch.bool)
    if padding != "none":
        mask[1, slice(0, 133) if padding == "left" else slice(140, None)] = False
    return random_ids(2, 274), mask


ROWS = [(3, 139), (3, 269), (200, 133), (139, 269)]
"""Of chunks 0 and 1, 0 and 3, 1 and 1, 1 and 3."""


@pytest.mark.parametrize(
    ("plan", "lanes"),
    [
        ("per-op", 3),
        *((plan, lanes) for plan in ("fused", "folded", "minimal", "tee-attention") for lanes in (1, 2, 3)),
    ],
)
@pytest.mark.parametrize("rows", ROWS)
def test_rows_of_different_chunks(llama: Named, unix_uri: str, plan: str, lanes: int, rows: tuple[int, int]) -> None:
    model, reference = llama
    ids, mask = padded_long("left")
    ids, keep = ids[:, :270], torch.tensor(rows)
    with split(model, unix_uri, plan=plan, lanes=lanes, scores_nbytes=LONG_NBYTES) as (runner, _):
        assert len(runner._cutter.cut(2, 0, 270)) == 4
        with runner.new_cache(2) as cache:
            logits = runner.forward(ids, cache, mask=mask, keep=keep)
    assert_same(logits[:, 0], hf_logits(reference, ids, mask)[torch.arange(2), keep])


@pytest.mark.parametrize(
    ("family", "plan"),
    [
        ("everything at once", "folded"),
        ("mistral", "fused"),
        ("mistral", "folded"),
        ("qwen2", "folded"),
        ("gemma3", "fused"),
        ("phi3", "folded"),
        ("phi3", "minimal"),
        ("granite", "fused"),
        ("granite", "folded"),
        ("granite", "minimal"),
        ("gemma2", "tee-attention"),
        ("qwen3", "tee-attention"),
    ],
)
def test_lanes_of_other_families(models: Callable[[str], Named], unix_uri: str, family: str, plan: str) -> None:
    model, reference = models(family)
    ids = random_ids(1, LIMIT)
    with split(model, unix_uri, plan=plan, lanes=3) as (runner, _), runner.new_cache() as cache:
        assert (runner.plan, runner.lanes) == (plan, 3)
        logits = runner.forward(ids, cache, keep="all")
    assert_same(logits, hf_logits(reference, ids))


@pytest.mark.parametrize("plan", PLANS)
def test_lanes_on_a_device_that_computes_later(llama: Named, unix_uri: str, plan: str) -> None:
    model, reference = llama
    ids = random_ids(1, 300)
    with split(model, unix_uri, plan=plan, device=Cuda(LazyDriver())) as (runner, _), runner.new_cache() as cache:
        assert runner.lanes == 2, "it computes beside our cores"
        logits = runner.forward(ids, cache, keep="all")
    assert_same(logits, hf_logits(reference, ids))


class _Beside(Cpu):
    """Says that it leaves the cores free."""

    asynchronous = True


@pytest.mark.parametrize(("device", "lanes"), [(Cpu(), 1), (_Beside(), 2)])
def test_how_many_lanes_there_are_if_nobody_says(llama: Named, unix_uri: str, device: Any, lanes: int) -> None:
    with split(llama[0], unix_uri, plan="auto", device=device) as (runner, _):
        assert runner.lanes == lanes


@pytest.mark.parametrize("lanes", [-1, 0, MAX_LANES + 1])
def test_lanes_out_of_range(llama: Named, unix_uri: str, lanes: int) -> None:
    with pytest.raises(ValueError, match=f"^lanes: {lanes}, expected 1 to {MAX_LANES}$"):
        with split(llama[0], unix_uri, plan="auto", lanes=lanes):
            pass


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("lanes", [2, 3, 5])
def test_no_chunk_is_ever_ahead_of_one_before_it(llama: Named, plan: str, lanes: int) -> None:
    model, _ = llama
    backend = LocalBackend(model)
    runner = backend.runner(model, plan, lanes=lanes, scores_nbytes=SCORE_NBYTES * 300 * 30)
    with torch.inference_mode():
        runner.forward(random_ids(1, 300), runner.new_cache())
    starts: dict[tuple[str, int], list[int]] = {}
    numbers: dict[int, set[int]] = {}
    for steps, lane, layer, start in backend.requests:
        starts.setdefault((steps, layer), []).append(start)
        numbers.setdefault(lane, set()).add(start)
    chunks = max(map(len, starts.values()))
    assert chunks > lanes
    for (steps, layer), found in starts.items():
        assert found == sorted(found), f"{steps} of layer {layer}"
    assert runner.lanes == lanes and sorted(numbers) == list(range(lanes))
    assert backend.most_in_flight == lanes and backend.in_flight == 0
    # whoever writes a layer's keys and values has done so before anybody behind it reads them
    for layer in range(model.config.num_hidden_layers):
        first_seen = list(dict.fromkeys(start for _, _, at, start in backend.requests if at == layer))
        assert first_seen == sorted(first_seen)


def test_requests_of_two_lanes_are_on_their_way_at_once(llama: Named, unix_uri: str) -> None:
    """Seen from the executor: while it works, the next request has been sent."""
    executor = Executor(llama[0])
    sent: list[int] = []
    worked: list[int] = []

    def slow(handler: Callable[..., Any]) -> Callable[..., Any]:
        def handle(call: fastsplit.Call) -> Any:
            time.sleep(0.002)
            worked.append(channel.stats.calls)
            return handler(call)

        return handle

    handlers = {op: slow(handler) for op, handler in executor.handlers.items()}
    with (
        fastsplit.Server(unix_uri, handlers, arrays="torch") as server,
        fastsplit.connect(server.uri, arrays="torch") as channel,
        torch.inference_mode(),
    ):
        for lanes in (1, 2, 3):
            runner = Runner(RemoteModel.fetch(channel, None), channel, "folded", lanes=lanes, scores_nbytes=2**19)
            with runner.new_cache() as cache:
                before = channel.stats.calls
                worked.clear()
                runner.forward(random_ids(1, 300), cache)
                # requests that had been sent when each handler was at work, less those that it had answered
                ahead = [calls - before - answered for answered, calls in enumerate(worked)]
            sent.append(max(ahead))
    assert sent == [1, 2, 3]


@contextlib.contextmanager
def failing_at(model: Model, uri: str, plan: str, lanes: int) -> Iterator[tuple[Runner, fastsplit.Channel, list[int]]]:
    """The third one: how many calls are still to come before one fails."""
    executor = Executor(model)
    left: list[int] = []

    def wrapped(handler: Callable[..., Any]) -> Callable[..., Any]:
        def handle(call: fastsplit.Call) -> Any:
            if left:
                left[0] -= 1
                if left[0] < 0:
                    left.clear()
                    raise RuntimeError("on purpose")
            return handler(call)

        return handle

    handlers = {op: wrapped(handler) for op, handler in executor.handlers.items()}
    with (
        fastsplit.Server(uri, handlers, arrays="torch") as server,
        fastsplit.connect(server.uri, arrays="torch") as channel,
        torch.inference_mode(),
    ):
        runner = Runner(
            RemoteModel.fetch(channel, None), channel, plan, lanes=lanes, scores_nbytes=SCORE_NBYTES * 60 * 10
        )
        yield cut_as_with_scores(runner, SCORE_NBYTES * 60 * 10), channel, left


@pytest.mark.parametrize(
    ("plan", "lanes", "shm"), [*((plan, 3, "on") for plan in PLANS), ("fused", 2, "off"), ("folded", 2, "off")]
)
def test_an_error_in_one_lane_ends_the_pass_and_nothing_else(
    llama: Named, socket_dir: Path, plan: str, lanes: int, shm: str
) -> None:
    ids = random_ids(1, 60)
    uri = f"unix://{socket_dir}/s" + ("?shm=off" if shm == "off" else "")
    with failing_at(llama[0], uri, plan, lanes) as (runner, channel, left), runner.new_cache() as cache:
        before = channel.stats.calls
        expected = runner.forward(ids, cache, keep="all")
        calls = channel.stats.calls - before
        assert len(runner._cutter.cut(1, 0, 60)) > lanes
        for number in (0, 1, 2, 3, 7, calls // 2, calls - 5, calls - 1):
            cache.truncate(0)
            left[:] = [number]
            with pytest.raises(RemoteOpError, match="on purpose"):
                runner.forward(ids, cache, keep="all")
            assert cache.length == 0
            assert len(channel._core.calls) < lanes, "what else was on its way"
            assert torch.equal(runner.forward(ids, cache, keep="all"), expected), f"call {number}"
            assert not channel._core.calls, "nobody waits for anything any more"

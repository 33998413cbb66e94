"""The layer loop on a backend in this process: where what it sends lies, how much it keeps, what it believes."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastsplit.errors import RemoteProtocolError, VerificationError
from fastsplit.executor.service import Executor
from fastsplit.models import open_model
from fastsplit.split.blocks import choose_block_rows, packed_elements, row_blocks
from fastsplit.split.contract import CONTRACT
from fastsplit.split.plan import PLANS
from fastsplit.tee import runner as runner_module
from fastsplit.tee.open import share_cores
from fastsplit.tee.remote import RemoteModel
from fastsplit.tee.runner import Runner
from fastsplit.tee.sampling import check_finite
from fastsplit.tee.tuning import Tuning
from fastsplit.wire.call import Client
from fastsplit.wire.stats import Stats
from fastsplit.wire.transport import spin

MODEL = open_model("random:tiny")
LOGITS = ("lm_head", "down add norm lm_head")


class Reply(list[torch.Tensor]):
    """Tensors, and attributes."""

    def __init__(self, tensors: Sequence[torch.Tensor], attrs: dict[str, Any]) -> None:
        super().__init__(tensors)
        self.attrs = attrs


class LocalBackend:
    """An Executor's handlers, called directly. All tensors of both sides are in memory of its own, as in an arena.

    Whatever is sent must be contiguous and lie in that memory, or it would have to be copied. Counts what is alive.
    Memory is NaN until it is written to.
    """

    def __init__(self, dtype: str = "float32") -> None:
        self.stats = Stats()
        self.alive_nbytes = 0
        self.most_nbytes = 0
        self.private_nbytes = 0
        self.calls: list[str] = []
        """Operations; of `run`, the steps."""
        self.before: Callable[[str], object] = lambda op: None
        """Called before each operation, and after it."""
        self.after: Callable[[str, list[torch.Tensor]], object] = lambda op, results: None
        self.executor = Executor(MODEL, dtype=dtype)
        self._client = Client()
        self._spans: set[tuple[int, int]] = set()

    def empty(self, shape: Sequence[int], dtype: Any = "float32") -> torch.Tensor:
        kind: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        nbytes = math.prod(shape) * kind.itemsize
        memory = np.full(nbytes, 255, np.uint8)  # NaN, as a floating-point number
        span = (memory.ctypes.data, memory.ctypes.data + nbytes)
        self._spans.add(span)
        self.alive_nbytes += nbytes
        self.most_nbytes = max(self.most_nbytes, self.alive_nbytes)
        weakref.finalize(memory, self._freed, span)
        return torch.from_numpy(memory).view(kind).view(tuple(shape))

    def _freed(self, span: tuple[int, int]) -> None:
        self._spans.discard(span)
        self.alive_nbytes -= span[1] - span[0]

    def call(self, op: str, /, *tensors: torch.Tensor, expect: Any = None, **attrs: Any) -> Reply:
        what = attrs.get("steps", op)
        self.calls.append(what)
        self.before(what)
        for tensor in tensors:
            assert tensor.is_contiguous()
            start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
            if not any(first <= start and end <= last for first, last in self._spans):
                self.private_nbytes += tensor.nbytes
        attrs = {key: list(value) if isinstance(value, tuple) else value for key, value in attrs.items()}
        call: Any = SimpleNamespace(tensors=tensors, attrs=attrs, reply_attrs={}, empty=self.empty, client=self._client)
        results = self.executor.handlers[op](call)
        results = [] if results is None else [results] if isinstance(results, torch.Tensor) else list(results)
        if expect is not None:
            assert [(str(each.dtype)[6:], tuple(each.shape)) for each in results] == list(expect)
        self.after(what, results)
        return Reply(results, call.reply_attrs)

    def submit(self, op: str, /, *tensors: torch.Tensor, expect: Any = None, **attrs: Any) -> Any:
        reply = self.call(op, *tensors, expect=expect, **attrs)
        return SimpleNamespace(result=lambda: reply)


def make_runner(
    backend: LocalBackend, plan: str = "batched", dtype: str = "float32", *, trusted: bool = False, **options: Any
) -> Runner:
    """`trusted`: with a trusted copy, from which tee-attention takes the embedding's weights."""
    remote = RemoteModel("tiny", MODEL.config, dtype, MODEL.tee_weights(), trusted=MODEL if trusted else None)
    return Runner(remote, backend, plan, **options)


FORMS = [*((plan, False) for plan in PLANS), ("tee-attention", True)]
"""Plans, and whether with a trusted copy: where that is the same, without."""


def row(*ids: int) -> torch.Tensor:
    return torch.tensor([ids])


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.matrix(one_in=4)
@pytest.mark.parametrize(("plan", "trusted"), FORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("keep", ["last", "all"])
@pytest.mark.parametrize("lanes", [1, 2])
def test_only_token_ids_and_selected_rows_are_sent_from_private_memory(
    plan: str, trusted: bool, dtype: str, keep: str, lanes: int
) -> None:
    """No ids where the embedding's weights are here; and a selected row only where the residual stream is there."""
    backend = LocalBackend(dtype)
    runner = make_runner(backend, plan, dtype, lanes=lanes, trusted=trusted)
    each = 0 if trusted and plan == "tee-attention" else 8
    with torch.inference_mode(), runner.new_cache() as cache:  # it has to grow, twice
        for ids in (torch.arange(150), torch.tensor([7]), torch.arange(160)):
            runner.forward(ids.unsqueeze(0), cache, keep=keep)
            folds = PLANS[plan].folds and dtype != "float16"
            wanted = 8 if folds and keep == "last" and len(ids) > 1 else 0
            assert backend.private_nbytes == each * len(ids) + wanted
            backend.private_nbytes = 0


@pytest.mark.parametrize(("plan", "trusted"), FORMS)
@pytest.mark.parametrize("tee", ["float32", "bfloat16"])
@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
def test_what_is_cast_is_sent_from_shared_memory_too(plan: str, trusted: bool, tee: str, wire: str) -> None:
    backend = LocalBackend()
    runner = make_runner(backend, plan, tee_dtype=tee, wire_dtype=wire, trusted=trusted)
    with torch.inference_mode(), runner.new_cache() as cache:
        for ids in (torch.arange(150), torch.tensor([7])):
            logits = runner.forward(ids.unsqueeze(0), cache)
            assert logits.dtype == torch.float32
            assert bool(logits.isfinite().all())
        ids_nbytes = 0 if trusted and plan == "tee-attention" else 8 * 151
        assert backend.private_nbytes == ids_nbytes + (8 if PLANS[plan].folds else 0)


def _most(plan: str, rows: int) -> int:
    """Bytes alive at the worst moment of a pass: what one call is sent and gives, and what lives beside it.

    Where the residual stream is with the executor there are two of it while it grows: the old one and the new one.
    """
    config = MODEL.config
    hidden, inter = rows * config.hidden_size, rows * config.intermediate_size
    q, kv = rows * config.out_features("q"), rows * config.out_features("k")
    blocks = row_blocks(rows, rows, choose_block_rows(rows))
    scores = packed_elements(1, config.num_attention_heads, blocks)
    tables = rows * config.head_dim
    norm = 2 * hidden  # the residual stream, and what norms write to
    if plan in ("per-op", "batched"):
        return 4 * max(norm + q + 2 * kv + scores, norm + scores + kv + q, norm + 2 * inter + hidden)
    if plan == "fused":
        return 4 * max(norm + q + kv + scores, norm + scores + hidden, norm + 2 * inter + hidden)
    scales = rows  # of the norms
    if rows == 20 and plan != "minimal":
        scales += q + kv  # small replies are one block, all of which stays as long as the residual stream in it
    if plan == "tee-attention":  # q, k and v, which go to the cache, and what attention wrote
        return 4 * (2 * hidden + max(q + 2 * kv + q, 2 * inter + max(q, q + 2 * kv)) + scales)
    own = tables if plan == "minimal" else 0
    return 4 * (own + 2 * hidden + 2 * inter + max(scores, 0 if plan == "minimal" else q + kv) + scales)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("rows", [20, 300])
def test_what_is_not_needed_is_let_go_within_the_layer(plan: str, rows: int) -> None:
    backend = LocalBackend()
    runner = make_runner(backend, plan)
    with torch.inference_mode(), runner.new_cache(1, rows) as cache:
        logits = runner.forward(torch.arange(rows).unsqueeze(0) % 256, cache)
        assert logits.shape == (1, 1, 256)
        assert backend.alive_nbytes == 0, "no lane has anything of a pass that is over, nor its rotary tables"
        assert backend.most_nbytes <= _most(plan, rows)
        assert backend.most_nbytes >= 0.8 * _most(plan, rows), "and the formula says something"


@pytest.mark.parametrize("plan", PLANS)
def test_chunks_keep_memory_flat(plan: str) -> None:
    """Twice the prompt in chunks takes hardly more."""
    most = []
    for rows in (1536, 3072):
        backend = LocalBackend()
        scores_nbytes = 4 * MODEL.config.num_attention_heads * 128 * 3072
        runner = make_runner(backend, plan, scores_nbytes=scores_nbytes)
        with torch.inference_mode(), runner.new_cache(1, rows) as cache:
            runner.forward(torch.arange(rows).unsqueeze(0) % 256, cache)
        most.append(backend.most_nbytes)
    assert most[1] <= 1.25 * most[0]


# ---- casts and tunings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("cast", [None, "float16"])
def test_a_cast_is_asked_for_in_each_call_of_a_pass_and_nowhere_else(cast: str | None, lanes: int) -> None:
    backend = LocalBackend()
    seen: list[tuple[str, Any]] = []
    call = backend.call

    def watch(op: str, /, *tensors: torch.Tensor, **options: Any) -> Any:
        seen.append((op, options.pop("wire_dtype", None)))
        return call(op, *tensors, **options)

    backend.call = watch  # type: ignore[method-assign]
    runner = make_runner(backend, "folded", cast=cast, lanes=lanes)
    with torch.inference_mode(), runner.new_cache() as cache:
        runner.forward(torch.arange(256).unsqueeze(0), cache)
    assert {how for op, how in seen if op not in ("open", "close")} == {cast}
    assert {how for op, how in seen if op in ("open", "close")} == {None}


def test_a_tuning_stands_for_the_single_options() -> None:
    tuning = Tuning("folded", "", 3, "", block_rows=32, cast="bfloat16")
    runner = make_runner(LocalBackend(), "per-op", lanes=7, choice=tuning)
    assert (runner.plan, runner.lanes, runner.cast) == ("folded", 3, "bfloat16")
    assert runner._cutter.cut(1, 0, 200) == [64, 64, 72]
    assert runner.tuning is runner.choice is tuning
    assert make_runner(LocalBackend()).tuning is None


# ---- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS)
def test_a_cache_that_grows_keeps_what_was_in_it(plan: str) -> None:
    ids = torch.arange(200).unsqueeze(0)
    with torch.inference_mode():
        runner = make_runner(LocalBackend(), plan)
        with runner.new_cache(1, 200) as cache:
            whole = runner.forward(ids, cache, keep="all")
        with runner.new_cache() as cache:
            parts = [runner.forward(part, cache, keep="all") for part in ids.split(37, dim=1)]
            assert cache.length == 200
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("lost", ["the request", "the reply"])
def test_after_an_error_the_cache_is_as_before(plan: str, lost: str) -> None:
    """At each call of a step, and of a prompt: what follows gives what it would have given."""
    per_layer, once = PLANS[plan].call_counts
    calls = per_layer * MODEL.config.num_hidden_layers + once
    with torch.inference_mode():
        backend = LocalBackend()
        runner = make_runner(backend, plan)
        ids, more = torch.arange(20).unsqueeze(0), row(1, 2, 3)
        with runner.new_cache() as cache:
            expected = [runner.forward(part, cache, keep="all") for part in (ids, more)]
        for rows in (row(9), row(9, 8, 7, 6)):
            with runner.new_cache() as cache:
                first = runner.forward(ids, cache, keep="all")
                for index in range(calls):
                    left = [index]

                    def fail(*_: Any, left: list[int] = left) -> None:
                        left[0] -= 1
                        if left[0] < 0:
                            raise ConnectionError

                    if lost == "the request":
                        backend.before = fail
                    else:
                        backend.after = fail
                    with pytest.raises(ConnectionError):
                        runner.forward(rows, cache)
                    backend.before, backend.after = (lambda op: None), (lambda op, results: None)
                    assert cache.length == 20
                second = runner.forward(more, cache, keep="all")
            assert torch.equal(first, expected[0])
            assert torch.equal(second, expected[1])


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "another dtype": ({"ids": torch.zeros(1, 3)}, r"ids: torch.float32 \[1, 3\], expected int64 \[1, 1 or more\]"),
    "one dimension": ({"ids": torch.arange(3)}, "ids: "),
    "another batch": ({"ids": torch.zeros(2, 3, dtype=torch.int64)}, "ids: "),
    "nothing": ({"ids": torch.zeros(1, 0, dtype=torch.int64)}, "ids: "),
    "a mask of new slots only": ({"mask": torch.ones(1, 3, dtype=torch.bool)}, r"mask: .*expected bool \[1, 8\]"),
    "a mask of numbers": ({"mask": torch.ones(1, 8)}, "mask: torch.float32"),
    "positions of another shape": ({"positions": torch.zeros(1, 8, dtype=torch.int64)}, "positions: "),
    "negative positions": ({"positions": torch.full((1, 3), -1)}, "positions: "),
    "a row that is not there": ({"keep": torch.tensor([3])}, r"keep: .*expected int64 \[1\], each below 3"),
    "no row": ({"keep": torch.tensor([-1])}, "keep: "),
    "a word": ({"keep": "first"}, "keep: 'first', expected 'last', 'all' or an int64 tensor"),
}


@pytest.mark.parametrize("name", BAD)
def test_arguments_that_do_not_fit_are_refused_before_anything_is_sent(name: str) -> None:
    arguments, text = dict(BAD[name][0]), BAD[name][1]
    backend = LocalBackend()
    runner = make_runner(backend)
    with torch.inference_mode(), runner.new_cache() as cache:
        runner.forward(row(1, 2, 3, 4, 5), cache)
        backend.calls.clear()
        with pytest.raises(ValueError, match=text):
            runner.forward(arguments.pop("ids", row(1, 2, 3)), cache, **arguments)
        assert (backend.calls, cache.length) == ([], 5)
        cache.close()
        with pytest.raises(ValueError, match="cache: it was closed"):
            runner.forward(row(1), cache)


@pytest.mark.parametrize("plan", ["batched", "minimal", "tee-attention"])
@pytest.mark.parametrize("lanes", [-1, 0, 17])
def test_a_number_of_lanes_that_there_is_not(lanes: int, plan: str) -> None:
    with pytest.raises(ValueError, match=f"^lanes: {lanes}, expected 1 to 16$"):
        make_runner(LocalBackend(), plan, lanes=lanes)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("threads", "lanes"), [(0, 2), (1, 1), (8, 1)])
def test_two_lanes_where_the_executor_computes_beside_us(threads: int, lanes: int, plan: str) -> None:
    model = RemoteModel("x", MODEL.config, "float32", MODEL.tee_weights(), threads)
    assert Runner(model, LocalBackend(), plan).lanes == lanes
    assert Runner(model, LocalBackend(), plan, lanes=3).lanes == 3


def test_one_lane_is_the_default_for_a_model_of_which_nothing_else_is_known() -> None:
    remote = RemoteModel("tiny", MODEL.config, "float32", MODEL.tee_weights())
    assert (remote.threads, make_runner(LocalBackend()).lanes) == (1, 1)


# ---- trust -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["batched", "folded", "tee-attention"])
def test_what_is_sampled_is_what_was_found_finite(monkeypatch: pytest.MonkeyPatch, plan: str) -> None:
    """The peer changes what it sent whenever it likes: here as a token is drawn, and as logits are looked at."""
    shared: list[torch.Tensor] = []
    seen: list[torch.Tensor] = []
    backend = LocalBackend()
    backend.after = lambda op, results: shared.extend(results) if op in LOGITS else None

    def spoil() -> None:
        for tensor in shared:
            tensor.fill_(torch.nan)

    def look(logits: torch.Tensor) -> torch.Tensor:
        spoil()
        return check_finite(logits)

    def sample(logits: torch.Tensor, *rest: Any) -> int:
        spoil()
        assert bool(logits.isfinite().all())
        return int(logits.argmax())

    monkeypatch.setattr(runner_module, "check_finite", look)
    monkeypatch.setattr(runner_module, "sample", sample)
    with torch.inference_mode():
        tokens = list(make_runner(backend, plan).generate(torch.arange(5), 3, on_prefill=seen.append))
        assert len(tokens) == 3
        assert int(seen[0].argmax()) == tokens[0]
        assert len(shared) == 3 * (1 if plan == "batched" else 2)


@pytest.mark.parametrize("plan", PLANS)
def test_logits_are_the_callers_own(plan: str) -> None:
    backend = LocalBackend()
    kept: list[torch.Tensor] = []
    backend.after = lambda op, results: kept.extend(results)
    runner = make_runner(backend, plan)
    with torch.inference_mode(), runner.new_cache() as cache:
        logits = runner.forward(row(1, 2, 3), cache, keep="all")
        before = logits.clone()
        for tensor in kept:
            tensor.zero_()
        assert torch.equal(logits, before)


class _Channel:
    """An executor's answers to `describe` and `tee_weights`, out of memory that it can change."""

    def __init__(self) -> None:
        self.weights = {name: weight.clone() for name, weight in MODEL.tee_weights().items()}
        self.described: dict[str, Any] = {
            "config": MODEL.config.to_json(),
            "contract": CONTRACT,
            "dtype": "float32",
            "name": "tiny",
            "threads": 2,
        }

    def call(self, op: str, **_: Any) -> Any:
        if op == "tee_weights":
            return tuple(self.weights.values())
        return SimpleNamespace(attrs=self.described)


@pytest.mark.parametrize("trusted", [None, MODEL], ids=["no copy", "a trusted copy"])
def test_norm_weights_stay_as_they_came(trusted: Any) -> None:
    channel: Any = _Channel()
    model = RemoteModel.fetch(channel, trusted)
    for weight in channel.weights.values():
        weight.zero_()
    assert model.config == MODEL.config
    assert {name: weight.tolist() for name, weight in model.weights.items()} == {
        name: weight.tolist() for name, weight in MODEL.tee_weights().items()
    }
    with pytest.raises(VerificationError, match="norm weights: 5 of 5 differ"):
        RemoteModel.fetch(channel, MODEL)


@pytest.mark.parametrize("trusted", [None, MODEL], ids=["no copy", "a trusted copy"])
@pytest.mark.parametrize("threads", [0, 1, 64])
def test_how_many_cores_the_executor_computes_with_is_what_it_says(threads: int, trusted: Any) -> None:
    channel: Any = _Channel()
    channel.described["threads"] = threads
    assert RemoteModel.fetch(channel, trusted).threads == threads


@pytest.mark.parametrize("trusted", [None, MODEL], ids=["no copy", "a trusted copy"])
@pytest.mark.parametrize("said", [None, -1, "1", 1.0, True, [2], "9" * 1000], ids=lambda said: str(said)[:9])
def test_threads_that_are_no_number(said: Any, trusted: Any) -> None:
    channel: Any = _Channel()
    channel.described["threads"] = said
    with pytest.raises(RemoteProtocolError, match=r"^describe, threads: .{1,30}, expected an int of 0 or more$"):
        RemoteModel.fetch(channel, trusted)
    del channel.described["threads"]
    with pytest.raises(RemoteProtocolError, match=r"^describe, threads: None, "):
        RemoteModel.fetch(channel, trusted)


@pytest.mark.parametrize(
    ("threads", "shm", "env", "expected"),
    [
        (2, True, None, 0.0),
        (3, True, None, 0.0),
        (1, True, None, 50.0),
        (0, True, None, 50.0),
        (2, False, None, 50.0),
        (2, True, "20", 50.0),
    ],
    ids=["all cores", "more", "a core is left", "a device", "another host", "the user's word"],
)
def test_callers_sleep_at_once_where_the_executor_needs_all_cores(
    monkeypatch: pytest.MonkeyPatch, threads: int, shm: bool, env: str | None, expected: float
) -> None:
    monkeypatch.setattr(spin, "cores", lambda: 2)
    monkeypatch.delenv("FASTSPLIT_SPIN_US", raising=False)
    if env is not None:
        monkeypatch.setenv("FASTSPLIT_SPIN_US", env)
    channel: Any = SimpleNamespace(shm=shm, spin_us=50.0)
    share_cores(channel, RemoteModel("x", MODEL.config, "float32", {}, threads))
    assert channel.spin_us == expected


@pytest.mark.parametrize("trusted", [None, MODEL], ids=["no copy", "a trusted copy"])
@pytest.mark.parametrize("version", [None, CONTRACT - 1, CONTRACT + 1, str(CONTRACT), [CONTRACT]], ids=str)
def test_an_executor_of_another_version(version: Any, trusted: Any) -> None:
    channel: Any = _Channel()
    channel.described["contract"] = version
    with pytest.raises(RemoteProtocolError, match=r"^describe, contract: .*, expected 2: .* of another version$"):
        RemoteModel.fetch(channel, trusted)
    del channel.described["contract"]
    with pytest.raises(RemoteProtocolError, match=r"^describe, contract: None, "):
        RemoteModel.fetch(channel, trusted)


@pytest.mark.parametrize("dtype", [None, "int8", 5])
def test_a_dtype_that_is_none(dtype: Any) -> None:
    channel: Any = _Channel()
    channel.described["dtype"] = dtype
    with pytest.raises(RemoteProtocolError, match="describe, dtype: "):
        RemoteModel.fetch(channel, MODEL)


def test_a_configuration_is_data_not_an_order() -> None:
    channel: Any = _Channel()
    channel.described["config"] = json.dumps({**asdict(MODEL.config), "hidden_size": 0})
    with pytest.raises(RemoteProtocolError, match="describe, config"):
        RemoteModel.fetch(channel, MODEL)

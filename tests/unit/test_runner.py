"""The layer loop on a backend in this process: where what it sends lies, how much it keeps, what it believes."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Sequence
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastsplit import runner as runner_module
from fastsplit.errors import VerificationError
from fastsplit.executor import Executor
from fastsplit.models import open_model
from fastsplit.ops import RowBlock, choose_block_rows, row_blocks
from fastsplit.runner import PLANS, RemoteModel, Runner
from fastsplit.wire.stats import Stats

MODEL = open_model("random:tiny")


class LocalBackend:
    """An Executor's handlers, called directly. All tensors of both sides are in memory of its own, as in an arena.

    Whatever is sent must be contiguous and lie in that memory, or it would have to be copied. Counts what is alive.
    """

    def __init__(self, dtype: str = "float32") -> None:
        self.stats = Stats()
        self.alive_nbytes = 0
        self.most_nbytes = 0
        self.private_nbytes = 0
        self._executor = Executor(MODEL, dtype=dtype)
        self._spans: set[tuple[int, int]] = set()

    def empty(self, shape: Sequence[int], dtype: Any) -> torch.Tensor:
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

    def _call(self, op: str, *tensors: torch.Tensor, **attrs: Any) -> Any:
        for tensor in tensors:
            assert tensor.is_contiguous()
            start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
            if not any(first <= start and end <= last for first, last in self._spans):
                self.private_nbytes += tensor.nbytes
        call: Any = SimpleNamespace(tensors=tensors, attrs=attrs, reply_attrs={}, empty=self.empty)
        return self._executor.handlers[op](call)

    def embedding(self, ids: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self._call("embedding", ids)
        return result

    def linear(self, layer: int, names: tuple[str, ...], x: torch.Tensor) -> Sequence[torch.Tensor]:
        results: Sequence[torch.Tensor] = self._call("linear", x, layer=layer, names=list(names))
        return results

    def scores(self, q: torch.Tensor, k: torch.Tensor, blocks: list[RowBlock]) -> Sequence[torch.Tensor]:
        results: Sequence[torch.Tensor] = self._call("scores", q, k, block_rows=blocks[0].rows)
        return results

    def values(self, blocks: Sequence[torch.Tensor], v: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self._call("values", *blocks, v)
        return result

    def lm_head(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self._call("lm_head", x)
        return result


def make_runner(backend: LocalBackend, plan: str = "batched", dtype: str = "float32") -> Runner:
    norms = MODEL.norms().to(getattr(torch, dtype))
    return Runner(RemoteModel("tiny", MODEL.config, dtype, norms), backend, plan)


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("all_logits", [False, True])
def test_only_token_ids_are_sent_from_private_memory(plan: str, dtype: str, all_logits: bool) -> None:
    backend = LocalBackend(dtype)
    runner = make_runner(backend, plan, dtype)
    cache = runner.new_cache(100)  # it has to grow, twice
    with torch.inference_mode():
        for ids in (torch.arange(150), torch.tensor([7]), torch.arange(160)):
            runner.forward(ids, cache, all_logits=all_logits)
            assert backend.private_nbytes == 8 * len(ids), "the ids"
            backend.private_nbytes = 0


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("rows", [20, 300])
def test_what_is_not_needed_is_let_go_within_the_layer(plan: str, rows: int) -> None:
    backend, config = LocalBackend(), MODEL.config
    runner = make_runner(backend, plan)
    with torch.inference_mode():
        cache = runner.new_cache(rows)
        cache_nbytes = backend.alive_nbytes
        logits = runner.forward(torch.arange(rows) % 256, cache)
    assert cache_nbytes == 4 * 2 * config.num_hidden_layers * rows * config.num_key_value_heads * config.head_dim
    assert backend.alive_nbytes == cache_nbytes + logits.nbytes
    # Beside the residual stream and what the norm wrote, the most that is alive is scores and weighted values, or, with
    # few rows, gate and up.
    hidden = rows * config.hidden_size
    blocks = row_blocks(rows, rows, choose_block_rows(rows))
    scores = config.num_attention_heads * sum(block.rows * block.columns for block in blocks)
    most = 2 * hidden + max(scores + hidden, 2 * rows * config.intermediate_size)
    assert backend.most_nbytes == cache_nbytes + 4 * most


def test_a_cache_that_grows_keeps_what_was_in_it() -> None:
    backend = LocalBackend()
    ids = torch.arange(40)
    with torch.inference_mode():
        runner = make_runner(backend)
        whole = runner.forward(ids, runner.new_cache(40), all_logits=True)
        cache = runner.new_cache(1)
        parts = [runner.forward(part, cache, all_logits=True) for part in ids.split(7)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)
    assert cache.length == 40


# ---- trust -----------------------------------------------------------------------------------------------------------


def test_what_is_sampled_is_what_was_found_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer changes its logits whenever it likes: here as soon as a token is drawn, and as they are looked at."""
    shared: list[torch.Tensor] = []
    seen: list[torch.Tensor] = []

    class Backend(LocalBackend):
        def lm_head(self, x: torch.Tensor) -> torch.Tensor:
            shared.append(super().lm_head(x))
            return shared[-1]

    def sample(logits: torch.Tensor, *rest: Any) -> int:
        shared[-1].fill_(torch.nan)
        assert bool(logits.isfinite().all())
        return int(logits.argmax())

    monkeypatch.setattr(runner_module, "sample", sample)
    with torch.inference_mode():
        tokens = list(make_runner(Backend()).generate(torch.arange(5), 3, on_prefill=seen.append))
        assert len(tokens) == 3
        assert int(seen[0].argmax()) == tokens[0]


class _Channel:
    """An executor's answers to `describe` and `norms`, out of memory that it can change."""

    def __init__(self, norms: torch.Tensor) -> None:
        self.norms = norms

    def call(self, op: str, **_: Any) -> Any:
        if op == "norms":
            return (self.norms,)
        described = {"config": json.dumps(asdict(MODEL.config)), "dtype": "float32", "name": "tiny"}
        return SimpleNamespace(attrs=described)


@pytest.mark.parametrize("trusted", [None, MODEL], ids=["no copy", "a trusted copy"])
def test_norm_weights_stay_as_they_came(trusted: Any) -> None:
    channel: Any = _Channel(MODEL.norms())
    model = RemoteModel.fetch(channel, trusted)
    channel.norms.zero_()
    assert torch.equal(model.norms, MODEL.norms())
    with pytest.raises(VerificationError, match="norm weights: 5 of 5 differ"):
        RemoteModel.fetch(channel, MODEL)

"""A guard's place: it sees every product of every plan exactly once, and can check and change what travels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from split import CONFIGS, make_model, split

from fastsplit.models import Model, linear_name, norm_names
from fastsplit.split.contract import Shapes
from fastsplit.split.plan import PLANS, Call
from fastsplit.tee.program import Chunk

FAMILIES = ("grouped heads", "everything at once", "qwen3", "gemma2", "granite")
OF_STEP = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
PRODUCTS = ("q", "k", "v", "scores", "values", "o", "gate", "up", "down")


class Accountant:
    """Counts the products of each layer and chunk, and checks what the calls carry."""

    def __init__(self, model: Model) -> None:
        self.products: Counter[tuple[int, int, str]] = Counter()  # chunk's start, layer, product
        self.calls = 0
        self.open: dict[int, Call] = {}  # lane -> its call under way
        self._shapes = Shapes(model.config, "float32")

    def before(self, call: Call, chunk: Chunk, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        assert chunk.lane not in self.open
        self.open[chunk.lane] = call
        named = [name for name in call.inputs if name != "scale" or chunk.batch * chunk.rows > 1]
        assert len(named) == len(tensors)
        for name, tensor in zip(named, tensors):
            if name not in ("weights", "cos", "sin"):
                assert tensor.shape == self._shapes.shape(name, chunk.batch, chunk.rows, call.selected, ())
        return tensors

    def after(
        self, call: Call, chunk: Chunk, sent: tuple[torch.Tensor, ...], reply: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor]:
        assert self.open.pop(chunk.lane) is call and len(reply) == len(call.outputs)
        self.calls += 1
        layer = call.layer
        for step in call.steps:
            for product in OF_STEP.get(step, (step,)):
                if product in (*PRODUCTS, "embed", "lm_head"):
                    self.products[chunk.start, layer, product] += 1
            layer += step == "down"
        return reply


@pytest.mark.matrix(one_in=3)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_product_of_every_plan_passes_a_guard_once(tmp_path: Path, unix_uri: str, family: str, plan: str) -> None:
    """Also with several chunks, of which only the last gives logits, and in a step with one row."""
    model = make_model(tmp_path / "model", CONFIGS[family])
    layers = model.config.num_hidden_layers
    guard = Accountant(model)
    with (
        split(model, unix_uri, plan=plan, lanes=3, block_rows=32, guard=guard) as (runner, channel),
        runner.new_cache(2) as cache,
    ):
        before = channel.stats.calls
        unguarded = []
        for rows in (200, 1):
            ids = torch.arange(2 * rows).view(2, rows) % model.config.vocab_size
            runner.guard = guard
            guard.products.clear()
            logits = runner.forward(ids, cache)
            starts = sorted({start for start, _, _ in guard.products})
            assert len(starts) == (3 if rows == 200 else 1) and not guard.open
            here = ("scores", "values") if runner.plan == "tee-attention" else ()
            for start in starts:
                for layer in range(layers):
                    ends = layer == layers - 1 and start != starts[-1]  # nothing but its keys and values is wanted
                    found = {product for at, where, product in guard.products if (at, where) == (start, layer)}
                    wanted = set(PRODUCTS[:3] if ends else PRODUCTS) - set(here)
                    edges = {"embed"} if layer == 0 and runner.plan != "tee-attention" else set()
                    edges |= {"lm_head"} if layer == layers - 1 and not ends and runner.plan not in FOLDING else set()
                    assert found - {"lm_head"} == (wanted | edges) - {"lm_head"}
            assert set(guard.products.values()) == {1}
            assert sum(product == "lm_head" for _, _, product in guard.products) == 1
            cache.truncate(cache.length - rows)
            runner.guard = None
            unguarded.append(runner.forward(ids, cache))
            assert torch.equal(logits, unguarded[-1]), "a guard that changes nothing changes nothing"
        assert 2 * guard.calls == channel.stats.calls - before - (0 if here else 2)  # and two that truncate


FOLDING = [name for name, plan in PLANS.items() if plan.folds]


class Checker:
    """Recomputes every linear product in fp64 from the trusted weights and from what the TEE sees alone."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._norms = norm_names(model.config)
        self._x: dict[int, torch.Tensor] = {}  # lane -> the residual stream, where that is on the executor
        self.checked: Counter[str] = Counter()
        self.worst = 0.0

    def before(self, call: Call, chunk: Chunk, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.clone() for tensor in tensors)  # private: the executor cannot change what is compared

    def after(
        self, call: Call, chunk: Chunk, sent: tuple[torch.Tensor, ...], reply: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor]:
        own = [tensor.clone() for tensor in reply]
        named = [name for name in call.inputs if name != "scale" or chunk.batch * chunk.rows > 1]
        values = {**dict(zip(named, sent)), **dict(zip(call.outputs, own))}
        layer, eps = call.layer, self._model.config.rms_norm_eps
        folds = "norm" in call.steps
        before = self._x.pop(chunk.lane, None)
        if before is not None and "select" in call.steps and "o" in call.steps:
            before = before.gather(1, values["selected"].view(-1, 1, 1).expand(-1, 1, before.shape[2]))
        if folds:
            x = values["x"].double()
            self._x[chunk.lane] = x
        elif before is not None:
            self._x[chunk.lane] = before
        for step in call.steps:
            if step in ("o", "down") and step + "_in" not in values:
                source = "attended" if step == "o" else "gated"
                if source not in values:
                    continue  # weighted values that never left the executor: a chain with `values`
                delta = values["delta"].double() if "delta" in values else x - before  # type: ignore[operator]
                self._compare(step, layer, values[source], delta, biased=True)
                layer += step == "down"
            for product in OF_STEP.get(step, (step,)):
                if product in ("q", "k", "v", "gate", "up"):
                    if folds:
                        norm = self._norms[2 * layer + (product in ("gate", "up"))]
                        source_x = x * self._model.load(norm).double()
                    else:
                        source_x = values["normed"].double()
                    found = self._output(values, product)
                    if found is not None:
                        self._compare(product, layer, source_x, found.flatten(2), biased=not folds)
            if step == "lm_head":
                weight = self._model.load("lm_head.weight").double()
                source_x = x * self._model.load(self._norms[-1]).double() if folds else values["normed"].double()
                self._note("lm_head", values["logits"].double(), source_x @ weight.mT)
        assert eps
        return own

    def _output(self, values: dict[str, torch.Tensor], product: str) -> torch.Tensor | None:
        heads = self._model.config.num_attention_heads
        if product in values:
            return values[product]
        if product in ("q", "k") and "qk" in values:
            return values["qk"][:, :, :heads] if product == "q" else values["qk"][:, :, heads:]
        if product in ("gate", "up"):
            return values["gate_up"][int(product == "up")]
        return None  # v, where it stays on the executor

    def _compare(self, product: str, layer: int, x: torch.Tensor, found: torch.Tensor, *, biased: bool) -> None:
        name = linear_name(layer, product)
        expected = x.double() @ self._model.load(f"{name}.weight").double().mT
        if biased and self._model.config.has_bias(product):
            expected += self._model.load(f"{name}.bias").double()
        self._note(product, found.double(), expected * 1.0)

    def _note(self, product: str, found: torch.Tensor, expected: torch.Tensor) -> None:
        self.checked[product] += 1
        self.worst = max(self.worst, float((found - expected).abs().max() / expected.abs().max()))


@pytest.mark.parametrize("plan", [name for name, plan in PLANS.items() if plan.verifiable])
def test_a_guard_can_check_linear_products_from_what_the_tee_sees(tmp_path: Path, unix_uri: str, plan: str) -> None:
    model = make_model(tmp_path / "model", CONFIGS["grouped heads"])
    layers = model.config.num_hidden_layers
    guard = Checker(model)
    with split(model, unix_uri, plan=plan, guard=guard) as (runner, _), runner.new_cache(2) as cache:
        runner.forward(torch.arange(60).view(2, 30), cache)
    assert guard.worst < 1e-5
    stays = runner.plan in ("fused", "folded")  # v and the weighted values, which a chain of products covers
    for product in ("q", "k", "gate", "up", "down"):
        assert guard.checked[product] == (layers if product != "down" or runner.plan != "x" else 0)
    assert guard.checked["v"] == guard.checked["o"] == (0 if stays else layers)
    assert guard.checked["lm_head"] == 1


def test_a_guard_notices_a_wrong_product(tmp_path: Path, unix_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path / "model", CONFIGS["grouped heads"])
    guard = Checker(model)
    with split(model, unix_uri, plan="tee-attention", guard=guard) as (runner, channel), runner.new_cache() as cache:
        call = channel.call

        def lie(op: str, /, *tensors: torch.Tensor, **options: Any) -> Any:
            reply = call(op, *tensors, **options)
            if options.get("steps") == "o add norm gate_up" and options["layer"] == 1:
                reply[1][0, 0, 3, 7] *= 1.001
            return reply

        monkeypatch.setattr(channel, "call", lie)
        runner.forward(torch.arange(30)[None], cache)
    assert 1e-5 < guard.worst < 1e-2


def test_what_a_guard_returns_is_sent_and_used(tmp_path: Path, unix_uri: str) -> None:
    """Blinding in small: what is sent is off by a constant, what comes back is corrected by its product."""
    model = make_model(tmp_path / "model", CONFIGS["grouped heads"])
    shift = 0.25

    class Shift:
        calls = 0

        def before(self, call: Call, chunk: Chunk, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            if call.text != "o":
                return tensors
            self.calls += 1
            return (tensors[0] + shift,)

        def after(
            self, call: Call, chunk: Chunk, sent: tuple[torch.Tensor, ...], reply: Sequence[torch.Tensor]
        ) -> Sequence[torch.Tensor]:
            if call.text != "o":
                return reply
            weight = model.load(f"{linear_name(call.layer, 'o')}.weight")
            return [reply[0] - shift * weight.sum(1)]

    guard = Shift()
    with split(model, unix_uri, plan="batched") as (runner, _), runner.new_cache() as cache:
        ids = torch.arange(30)[None]
        expected = runner.forward(ids, cache)
        cache.truncate(0)
        runner.guard = guard
        found = runner.forward(ids, cache)
    assert guard.calls == model.config.num_hidden_layers
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5

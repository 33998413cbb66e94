"""The engine: runs one call's steps (split/plan.py) on tensors.

It takes a `Job`, whose arguments were checked before (arguments.py), a device's `Work`, and a function that gives
reply memory. It knows no connection: a process that has a Job and weights can run it. Each step is a method of
`_Steps`, which is one call under way. What depends on the list of steps alone is looked up once for each list
(`Routine`).

Rules. Values travel in the cache's link dtype and are computed with in the engine's own. Where the two are one, nothing
is cast, and a value that goes back is computed straight into the reply's memory; every other value is computed into
scratch memory of the device.

Products that follow each other are fused where that saves passes over memory: `o add` and `down add` are one product
that adds to the residual stream; q, k and v (or gate and up) of a single row are one product. Norms within a call are
folded: x is multiplied by the norm's weight, and dividing by its length is left to the TEE side. So biases behind a
folded norm are the TEE side's to add, except v's, which `scale_v` adds when the length is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

from ..errors import SettingError
from ..extras import torch
from ..models import LINEARS, ModelConfig
from ..split.blocks import Block, packed_elements
from ..split.contract import Shapes
from ..split.functional import rotary_
from ..split.plan import STEP_LISTS, STEPS, crosses, obstacle, signature
from . import attention
from .device import Work
from .kv_cache import KVCache, Lane
from .weights import LayerWeights, Linear, Weights

__all__ = ["Allocate", "Engine", "Job", "Reply", "Routine"]

_SMALL_ELEMENTS = 2**14
"""The values of a reply of at most this many elements share one allocation, which costs as much as a small product."""

_NORMS = {"qkv": "attention_norm", "gate_up": "mlp_norm", "lm_head": "final_norm"}
"""The step behind a norm -> which norm it is."""

Allocate = Callable[[Sequence[int], str], torch.Tensor]
"""`allocate(shape, dtype)`: memory of the host for a value of the reply, contiguous, of undefined content."""


class Reply(NamedTuple):
    """What a call will reply, known before anything is computed."""

    shapes: tuple[tuple[int, ...], ...]
    """In the order of `Routine.outputs`."""
    elements: int
    """Of all values together."""
    slots: tuple[tuple[str, tuple[int, ...], tuple[int, ...], int], ...]
    """Name, shape, strides and first element of each value, where all share one block; else empty."""
    block: tuple[int]
    """That block's shape."""


class Routine:
    """What an executor looks up once for a list of steps."""

    def __init__(self, steps: tuple[str, ...], config: ModelConfig) -> None:
        self.steps = steps
        self.inputs, self.outputs = signature(steps, joined=False)
        self.joined_inputs, _ = signature(steps, joined=True)
        """The same where q and k lie together in one tensor."""
        self.folds = "norm" in steps
        self.rotates = "rope" in steps
        self.crosses = crosses(steps)
        """Whether the last steps belong to the next layer."""
        self.ends = steps[-1] == "lm_head" or steps in (("scale_kv",), ("store_k", "scale_v"))
        """Whether a pass ends with it, so that nothing stays in the lane."""
        self.refusal = ""
        """Why this model has no such call; "" if it has."""
        # float16 is the TEE side's to refuse: it knows the dtypes of both sides
        reason = obstacle(config, (), folds=self.folds, rotates=self.rotates)
        if reason:
            self.refusal = f"steps: {' '.join(steps)!r}, which this model cannot have; {reason}"
        self.run = tuple(_compiled(steps))


class Job(NamedTuple):
    """The arguments of one call, checked. Ids and indices are private copies; the peer may write to other tensors."""

    routine: Routine
    inputs: dict[str, torch.Tensor]
    """Tensors of the host by name; q and k alone, or together as `qk`."""
    cache: KVCache
    lane: Lane
    layer: int
    """That of the first step."""
    start: int
    """The position of the chunk's first row."""
    rows: int
    """Rows of each sequence in this call."""
    scale: float | None
    """The factor that a folded norm left, if there is one row; for more rows it is a tensor of `inputs`."""
    blocks: list[Block]
    """Those of the scores that are asked for."""
    reply: Reply


class Engine:
    """Computes with the weights of one model, in one dtype, on the device where the weights are."""

    def __init__(self, config: ModelConfig, weights: Weights, dtype: torch.dtype) -> None:
        self.config = config
        self.weights = weights
        self.dtype = dtype
        self.routines = {text: Routine(steps, config) for text, steps in STEP_LISTS.items()}
        """Every list of steps that some plan has, by its text."""
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.v_width = config.out_features("v")
        self.qkv_width = config.out_features("q") + config.out_features("k") + self.v_width
        # rounded as HF rounds it
        self.embedding_multiplier = float(torch.tensor(config.embedding_multiplier, dtype=dtype, device="cpu"))
        self._shape = Shapes(config, "").shape
        self._reply = lru_cache(1024)(self._make_reply)

    def reply(self, routine: Routine, batch: int, rows: int, blocks: Sequence[Block]) -> Reply:
        """What a call will reply."""
        return self._reply(routine, batch, rows, packed_elements(batch, self.heads, blocks) if blocks else 0)

    def _make_reply(self, routine: Routine, batch: int, rows: int, packed: int) -> Reply:
        shapes, slots, elements, start = [], [], 0, 0
        for name in routine.outputs:
            shape = (packed,) if name == "scores" else self._shape(name, batch, rows, False, ())
            shapes.append(shape)
            if batch * rows == 1 and "qkv" in routine.steps and name in ("qk", "v"):
                if name == "v":
                    continue  # one product: v lies behind q and k
                shape = (1, self.qkv_width)
            strides = tuple(math.prod(shape[index + 1 :]) for index in range(len(shape)))
            slots.append((name, shape, strides, start))
            elements += math.prod(shape)
            start += math.prod(shape) + 63 & -64
        shares = len(slots) > 1 and elements <= _SMALL_ELEMENTS
        return Reply(tuple(shapes), elements, tuple(slots) if shares else (), (start,))

    def run(self, job: Job, work: Work, allocate: Allocate) -> list[torch.Tensor]:
        """Runs the steps. The results, in the order of `Job.reply`, are complete when the work ends.

        Raises SettingError where cache or lane lack something, LimitError where the cache has no room.
        """
        routine = job.routine
        steps = _Steps(self, job, work, allocate)
        for step in routine.run:
            step(steps)
        if routine.ends:
            job.lane.clear()
        return [steps.replies[name] for name in routine.outputs]


class _Steps:
    """One call under way: a method for each step, and the values that one step makes for another."""

    __slots__ = (
        *("allocate", "cache", "engine", "inputs", "job", "lane", "layer", "link", "made", "qk", "queries", "replies"),
        *("same", "scale", "slots", "weights", "work"),
    )

    def __init__(self, engine: Engine, job: Job, work: Work, allocate: Allocate) -> None:
        self.engine, self.job, self.work, self.allocate = engine, job, work, allocate
        self.cache, self.lane, self.inputs = job.cache, job.lane, job.inputs
        self.link = job.cache.link_name
        self.same = job.cache.link_dtype == engine.dtype
        """Whether values travel as they are computed."""
        self.layer = job.layer
        self.weights: LayerWeights = engine.weights.layers[job.layer]
        self.made: dict[str, torch.Tensor] = {}
        self.qk: torch.Tensor | None = None
        self.queries: torch.Tensor | None = None
        self.scale: torch.Tensor | float | None = job.scale
        self.replies: dict[str, torch.Tensor] = {}
        self.slots: dict[str, torch.Tensor] = {}
        if job.reply.slots:
            block = allocate(job.reply.block, self.link)
            for name, shape, strides, start in job.reply.slots:
                self.slots[name] = block.as_strided(shape, strides, start)

    # ---- the residual stream ----

    def embed(self) -> None:
        engine, job = self.engine, self.job
        hidden, multiplier = engine.config.hidden_size, engine.embedding_multiplier
        table, ids = engine.weights.embedding, self.work.take(self.inputs["ids"].view(-1))

        def compute(out: torch.Tensor) -> None:
            torch.index_select(table, 0, ids, out=out.view(-1, hidden))
            if multiplier != 1:
                out.mul_(multiplier)

        x = self.give("x", (self.cache.batch, job.rows, hidden), compute)
        if job.routine.folds:
            self.lane.x, self.lane.blocks = x, None

    def residual(self) -> None:
        x = self.work.take(self.inputs["x"])
        own = self.work.empty(x.shape, x.dtype)  # it stays; the caller's memory may change
        self.work.run(lambda: own.copy_(x))
        self.lane.x, self.lane.blocks = own, None

    def norm(self, which: str) -> None:
        """The residual stream times a norm's weight; dividing by its length is left to the TEE side."""
        x = self.lane.x
        if x is None:
            raise SettingError("lane: no residual stream there, expected `embed` before")
        norm = self.engine.weights.final_norm if which == "final_norm" else getattr(self.weights, which)
        assert norm is not None  # Routine.refusal
        normed = self.work.empty((x.shape[0] * x.shape[1], x.shape[2]), self.engine.dtype)
        self.work.run(lambda: torch.mul(_rows(x), norm, out=normed))
        self.made["normed"] = normed

    def add(self, name: str) -> None:
        """`o add` or `down add`: the residual stream, with the product of what came before, goes to the reply and into
        the lane."""
        before, engine = self.lane.x, self.engine
        x = self.value(STEPS[name].takes[0])
        if before is None or before.shape[:2] != x.shape[:2]:
            have = None if before is None else list(before.shape[:2])
            raise SettingError(f"{list(x.shape[:2])} rows, expected {have}, of the residual stream in this lane")
        linear, rows = self.weights.linears[name], _rows(x)
        multiplier, hidden, same = engine.config.residual_multiplier, engine.config.hidden_size, self.same

        def compute(out: torch.Tensor) -> None:
            if same:
                flat = out.view(-1, hidden)
                torch.addmm(before.view(-1, hidden), rows, linear.weight, alpha=multiplier, out=flat)
                if linear.bias is not None:
                    flat.add_(linear.bias, alpha=multiplier)
            else:  # the residual stream is of the link's dtype
                delta = rows.new_empty((rows.shape[0], hidden))
                linear(rows, delta)
                torch.add(before, delta.view(before.shape), alpha=multiplier, out=out)

        reply = self.memory("x", (x.shape[0], x.shape[1], hidden))
        self.replies["x"] = reply
        self.lane.x = self.work.give(reply, compute)
        if self.job.routine.crosses:
            self.layer += 1
            self.weights = engine.weights.layers[self.layer]

    def select(self) -> None:
        """Leaves one row of each sequence in the residual stream, and of q where it is here."""
        index = self.work.take(self.inputs["selected"])
        assert self.lane.x is not None  # arguments.py
        self.lane.x = self.selected(self.lane.x, index)
        if self.queries is not None:
            self.queries = self.selected(self.queries, index)

    # ---- linear ----

    def linear(self, name: str) -> None:
        """One linear operation, whose result goes back."""
        linear, rows = self.weights.linears[name], _rows(self.value(STEPS[name].takes[0]))
        output, shape = STEPS[name].gives[0], self.job.reply.shapes[0]
        self.give(output, shape, lambda out: linear(rows, out.view(rows.shape[0], -1)))

    def qkv(self) -> None:
        engine, job, linears = self.engine, self.job, self.weights.linears
        batch, rows = self.cache.batch, job.rows
        head_dim, width, v_width = engine.config.head_dim, engine.qkv_width, engine.v_width
        heads = engine.heads + engine.kv_heads
        x = _rows(self.value("normed"))
        together = self.bare(linears["q", "k", "v"])
        if job.routine.rotates:  # nothing of it leaves
            own = self.work.empty((batch * rows, width), engine.dtype)
            self.work.run(lambda: together(x, own))
            parts = own.view(batch, rows, -1, head_dim)
            self.qk, self.made["v"] = parts[:, :, :heads], parts[:, :, heads:]
        elif batch * rows == 1:  # one product; where v stays, its part of the reply's memory travels unseen
            found = self.memory("qk", (1, width))
            own = self.into(found, lambda out: together(x, out))
            self.replies["qk"] = found.narrow(1, 0, width - v_width).view(1, 1, heads, head_dim)
            self.replies["v"] = found.narrow(1, width - v_width, v_width).view(1, 1, -1, head_dim)
            self.made["v"] = own.narrow(1, width - v_width, v_width).view(1, 1, -1, head_dim)
        else:
            qk, v = self.bare(linears["q", "k"]), self.bare(linears["v"])
            self.give("qk", (batch, rows, heads, head_dim), lambda out: qk(x, out.view(batch * rows, -1)))
            v_shape = (batch, rows, engine.kv_heads, head_dim)
            self.made["v"] = self.give("v", v_shape, lambda out: v(x, out.view(batch * rows, -1)))

    def gate_up(self) -> None:
        batch, rows, width = self.cache.batch, self.job.rows, self.engine.config.intermediate_size
        x = _rows(self.value("normed"))
        linears, shape = self.weights.linears, (2, batch, rows, width)
        if batch * rows == 1:
            both = self.bare(linears["gate", "up"])
            self.give("gate_up", shape, lambda out: both(x, out.view(1, 2 * width)))
            return
        gate, up = self.bare(linears["gate"]), self.bare(linears["up"])

        def compute(out: torch.Tensor) -> None:
            gate(x, out[0].view(-1, width))
            up(x, out[1].view(-1, width))

        self.give("gate_up", shape, compute)

    def lm_head(self) -> None:
        x = _rows(self.value("normed"))
        lm_head = self.engine.weights.lm_head
        shape = self.job.reply.shapes[-1]
        self.give("logits", shape, lambda out: lm_head(x, out.view(x.shape[0], -1)))

    # ---- attention ----

    def tables(self) -> None:
        lane, rows = self.lane, self.job.rows
        lane.cos, lane.sin = (
            self.value(name).view(-1, rows, 1, self.inputs[name].shape[-1]) for name in ("cos", "sin")
        )

    def rope(self) -> None:
        cos, sin, qk = self.lane.cos, self.lane.sin, self.qk
        if cos is None or sin is None or qk is None or cos.shape[1] != qk.shape[1]:
            raise SettingError("lane: no rotary tables of this pass there, expected `tables` before")
        rotated = qk[..., : 2 * cos.shape[-1]]
        self.work.run(lambda: rotary_(rotated, cos, sin))
        self.queries = qk[:, :, : self.engine.heads]

    def store_v(self) -> None:
        self.cache.store_values(self.work, self.layer, self.job.start, self.value("v"))

    def store_k(self) -> None:
        if self.qk is None and "qk" in self.inputs:
            self.qk = self.value("qk")
            self.queries = self.qk[:, :, : self.engine.heads]
        keys = self.qk[:, :, self.engine.heads :] if self.qk is not None else self.value("k")
        self.cache.store_keys(self.work, self.layer, self.job.start, keys)
        self.lane.rows = keys.shape[1]
        self.lane.blocks = None

    def scale_v(self) -> None:
        """What a folded norm left for v, now that it is known; then the bias, which could not come before."""
        bias = self.weights.linears["v"].bias
        if bias is not None:
            bias = bias.view(-1, 1, self.engine.config.head_dim)
        self.multiply(self.cache.values(self.layer), bias)

    def scale_kv(self) -> None:
        """The same for the rows that came last, whose keys and values were stored without it."""
        self.multiply(self.cache.keys(self.layer))
        self.scale_v()

    def scores(self) -> None:
        cache, blocks, scale = self.cache, self.job.blocks, self.engine.config.scale
        queries = self.queries if self.queries is not None else self.value("q")
        _check_filled("keys", cache.keys_filled[self.layer], blocks)
        keys = cache.keys(self.layer)
        self.lane.blocks = blocks
        self.give("scores", self.job.reply.shapes[-1], lambda out: attention.scores(queries, keys, blocks, scale, out))

    def values(self) -> None:
        cache, blocks, config = self.cache, self.lane.blocks, self.engine.config
        self.lane.blocks = None  # scores come back once
        if blocks is None:
            raise SettingError("lane: no scores of this lane are with the caller, expected some before")
        values, packed = cache.values(self.layer), self.value("weights")
        _check_filled("values", cache.values_filled[self.layer], blocks)
        shape = (cache.batch, self.job.rows, self.engine.heads * config.head_dim)
        self.made["attended"] = self.give(
            "attended", shape, lambda out: attention.weighted_values(packed, values, blocks, out)
        )

    # ---- parts of steps ----

    def memory(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """Reply memory for a value."""
        slot = self.slots.get(name)
        return self.allocate(shape, self.link) if slot is None else slot

    def give(self, name: str, shape: Sequence[int], compute: Callable[[torch.Tensor], object]) -> torch.Tensor:
        """Computes a value into the reply if it goes back, else into scratch memory. Returns it, as the device has
        it."""
        if name in self.job.routine.outputs:
            reply = self.replies[name] = self.memory(name, shape)
            return self.into(reply, compute)
        own = self.work.empty(shape, self.engine.dtype)
        self.work.run(lambda: compute(own))
        return own

    def into(self, reply: torch.Tensor, compute: Callable[[torch.Tensor], object]) -> torch.Tensor:
        if self.same:
            return self.work.give(reply, compute)
        own = self.work.empty(reply.shape, self.engine.dtype)
        self.work.run(lambda: compute(own))
        self.work.give(reply, lambda out: out.copy_(own))
        return own

    def bare(self, linear: Linear) -> Linear:
        """The linear without its bias if the call folds norms: the bias is added after the factor."""
        if linear.bias is None or not self.job.routine.folds:
            return linear
        return Linear(linear.weight, None)

    def value(self, name: str) -> torch.Tensor:
        """What an earlier step made, or a value of the request; on the device, in the engine's dtype."""
        made = self.made.get(name)
        if made is not None:
            return made
        taken = self.work.take(self.inputs[name])
        if taken.dtype == self.engine.dtype:
            return taken
        own = self.work.empty(taken.shape, self.engine.dtype)
        self.work.run(lambda: own.copy_(taken))
        return own

    def selected(self, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """[B, n, ...] -> [B, 1, ...]: of each sequence the row that `index` [B] names."""
        found = self.work.empty((rows.shape[0], 1, *rows.shape[2:]), rows.dtype)
        where = index.view(-1, 1, *[1] * (rows.dim() - 2)).expand(found.shape)
        self.work.run(lambda: torch.gather(rows, 1, where, out=found))
        return found

    def multiply(self, cached: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Multiplies the lane's rows of a layer's keys or values by the scale, and adds [kv_heads, 1, head_dim]."""
        start, rows, scale = self.job.start, self.lane.rows, self.scale
        if scale is None:
            scale = self.scale = self.work.take(self.inputs["scale"])
        if isinstance(scale, float) and bias is None:
            row = cached.select(1, start)
            self.work.run(lambda: row.mul_(scale))
            return
        part = cached.view(self.cache.batch, -1, *cached.shape[1:]).narrow(2, start, rows)
        by_row = scale if isinstance(scale, float) else scale[:, None, :, None]

        def compute() -> None:
            part.mul_(by_row)
            if bias is not None:
                part.add_(bias)

        self.work.run(compute)


def _compiled(steps: tuple[str, ...]) -> list[Callable[[_Steps], None]]:
    """The methods that run a list of steps, products that add to the residual stream as one."""
    run: list[Callable[[_Steps], None]] = []
    for step, following in zip(steps, (*steps[1:], "")):
        if following == "add":
            run.append(partial(_Steps.add, name=step))
        elif step == "norm":
            run.append(partial(_Steps.norm, which=_NORMS[following]))
        elif step in LINEARS:
            run.append(partial(_Steps.linear, name=step))
        elif step != "add":
            run.append(getattr(_Steps, step))
    return run


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[B, n, width] -> [B * n, width]."""
    return x.view(-1, x.shape[-1])


def _check_filled(what: str, filled: int, blocks: Sequence[Block]) -> None:
    """Raises SettingError where a block has columns of which nothing is stored."""
    end = blocks[0].end if len(blocks) == 1 else max(block.end for block in blocks)
    if end > filled:
        raise SettingError(f"layer: {filled} {what} there, expected {end}")

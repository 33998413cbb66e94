"""The contract between the two sides: operations, their arguments, the shapes of what travels.

    operation      attributes                      tensors in          tensors out
    describe       -                               -                   - (attributes name, config, dtype, threads,
                                                                       contract)
    tee_weights    -                               -                   ModelConfig.tee_weight_shapes, float32
    open           batch, capacity, dtype          -                   - (attribute session)
    truncate       session, length                 -                   -
    reorder        session                         indices [B'] int64  -
    close          session                         -                   -
    run            session, lane, layer, start,    Call.inputs         Call.outputs
                   steps; scale; blocks, or first
                   and last

`run` is one call of a plan (plan.py). B sequences; n rows of each in this call, r rows of each that go on (n, or 1
where rows were selected); H query heads, G kv heads, D the head's length, I the MLP's width.

Attributes. `session`: a KV cache's number. `lane`: one chunk of a forward pass on its way through the layers. `layer`:
that of the call's first step. `start`: the position of the chunk's first row. `steps`: the call's steps, with spaces
between. `scale`: the float that a folded norm leaves where there is one row; for more rows it is a tensor. `blocks`:
those of the scores that are asked for (blocks.py).

Values that travel, by name:

    ids           [B, n] int64           x                [B, n or r, hidden]     the residual stream
    cos, sin      [1 or B, n, half] f32  normed           [B, n or r, hidden]     a norm's output
    q             [B, r, H, D]           k, v             [B, n, G, D]
    qk            [B, n, H + G, D]       scores, weights  packed (blocks.py)
    attended      [B, r, H * D]          delta            [B, r, hidden]          what is added to the residual stream
    gate, up, gated  [B, r, I]           gate_up          [2, B, r, I]
    logits        [B, r, vocab]          scale            [B, n] float32
    selected      [B] int64              the only row of each sequence that goes on

Rules. All values are of the link's dtype ("link dtype") except ids, selected, cos, sin and scale. kv heads are never
repeated: query head h belongs to kv head h // (H / G). The executor multiplies q by the attention's scale. What a reply
must look like follows from our own configuration, never from the peer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..models import ModelConfig
from .blocks import Block, choose_block_rows, packed_elements, row_blocks
from .plan import Call, Plan

__all__ = ["CONTRACT", "MAX_LANES", "Expected", "Shapes", "Traffic", "tee_weights_expected", "traffic"]

CONTRACT = 2
"""The version of this page. `describe` has it; the TEE side refuses another one."""

MAX_LANES = 16
"""Lanes of one KV cache."""

Expected = list[tuple[str, tuple[int, ...]]]
"""(dtype, shape) of each tensor of a reply."""

_OWN_DTYPES = {"ids": "int64", "selected": "int64", "cos": "float32", "sin": "float32", "scale": "float32"}


def tee_weights_expected(config: ModelConfig) -> Expected:
    """What `tee_weights` replies."""
    return [("float32", shape) for shape in config.tee_weight_shapes().values()]


class Shapes:
    """Shapes and dtypes of the values of one model in one link dtype."""

    def __init__(self, config: ModelConfig, dtype: str) -> None:
        self._config = config
        self._dtype = dtype

    def dtype(self, value: str) -> str:
        return _OWN_DTYPES.get(value, self._dtype)

    def shape(self, value: str, batch: int, rows: int, selected: bool, blocks: Sequence[Block]) -> tuple[int, ...]:
        """A value's shape in a chunk of `rows` rows of `batch` sequences. `selected`: whether one row of each sequence
        goes on. `blocks`: those of the layer's scores."""
        config = self._config
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        left = 1 if selected else rows
        match value:
            case "x" | "normed" | "delta":
                return (batch, left, config.hidden_size)
            case "qk":
                return (batch, rows, heads + kv_heads, head_dim)
            case "scores" | "weights":
                return (packed_elements(batch, heads, blocks),)
            case "gate_up":
                return (2, batch, left, config.intermediate_size)
            case "gate" | "up" | "gated":
                return (batch, left, config.intermediate_size)
            case "k" | "v":
                return (batch, rows, kv_heads, head_dim)
            case "q":
                return (batch, left, heads, head_dim)
            case "attended":
                return (batch, left, heads * head_dim)
            case "logits":
                return (batch, left, config.vocab_size)
            case "ids" | "scale":
                return (batch, rows)
            case "cos" | "sin":
                return (1, rows, config.rope.rotary_dim(config.head_dim) // 2)
            case "selected":
                return (batch,)
        raise AssertionError(value)

    def reply(self, call: Call, batch: int, rows: int, blocks: Sequence[Block]) -> Expected:
        """What a call's reply must hold."""
        return [(self._dtype, self.shape(value, batch, rows, call.selected, blocks)) for value in call.outputs]


class Traffic(NamedTuple):
    """Calls, and the bytes of the tensors in their requests and replies."""

    calls: int
    sent: int
    received: int


def traffic(
    config: ModelConfig,
    plan: Plan,
    itemsize: int,
    start: int,
    rows: int,
    *,
    batch: int = 1,
    block_rows: int | None = None,
    wants_logits: bool = True,
) -> Traffic:
    """What one chunk of a pass moves, from sizes alone: `rows` rows of `batch` sequences without padding, after `start`
    positions, in a link dtype of `itemsize` bytes.

    `wants_logits`: the last row's logits of each sequence are wanted; else the chunk ends with its keys and values.
    """
    shapes = Shapes(config, "")
    total = start + rows
    by_window: dict[tuple[int, bool], list[Block]] = {}

    def blocks_of(layer: int, selected: bool) -> list[Block]:
        key = (config.window(layer), selected)
        if key not in by_window:
            left = 1 if selected else rows
            by_window[key] = row_blocks(left, total, choose_block_rows(left, block_rows), key[0])
        return by_window[key]

    def nbytes(value: str, selected: bool, layer: int, scores_selected: bool) -> int:
        if value == "scale" and batch * rows == 1:
            return 0  # an attribute
        blocks = blocks_of(layer, scores_selected) if value in ("scores", "weights") else ()
        shape = shapes.shape(value, batch, rows, selected, blocks)
        own = shapes.dtype(value)
        return math.prod(shape) * ({"int64": 8, "float32": 4}[own] if own else itemsize)

    calls = sent = received = 0
    known: dict[tuple[Any, ...], tuple[int, int]] = {}
    for stage in plan.schedule(config.num_hidden_layers, wants_logits=wants_logits, selects=rows > 1):
        if isinstance(stage, Call):
            calls += 1
            layer, one_row = stage.end_layer, stage.selected or "select" in stage.steps
            key = (stage.text, stage.selected, config.window(layer))
            if key not in known:
                known[key] = (
                    sum(nbytes(value, stage.selected, layer, one_row) for value in stage.inputs),
                    sum(nbytes(value, stage.selected, layer, one_row) for value in stage.outputs),
                )
            sent += known[key][0]
            received += known[key][1]
    return Traffic(calls, sent, received)

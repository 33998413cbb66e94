"""The layer loop, once for each way to divide it into calls: what the TEE does between one call and the next.

A program is a generator: it yields a `Request`, gets its reply, and returns the logits, so that whoever runs it decides
whether it waits for each reply or lets several programs take turns (runner.py). There are three:

    split     per-op, batched and fused: norms are applied here, the residual stream is here
    folded    norms are folded into the matrices behind them: W(norm(x)) = inverse_rms(x) * (W diag(g)) x. The residual
              stream is there and comes along; here each row of what came back is scaled
    linear    folded, and the rotary embedding is applied there, too: a linear map that depends on positions alone. The
              scale of q's and k's rows is applied to the scores

Rules. Tensors that arrive are ours: rotary, softmax, SiLU and the residual work in place on them and send the same
memory back. Everything else that is sent lies in memory of the backend's. So where both sides share memory nothing but
token ids is copied to be sent. What is not needed any more is let go at once, so that its memory serves again within
the layer. Shapes and counts come from our own configuration; replies are checked against them before memory is
allocated (`expect`).

Memory that is shared can be changed by the untrusted side at any moment, also after it was sent or received. For
arithmetic that is no more than an executor that computes wrongly. But what is decided upon, the logits, is copied to
private memory first.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..extras import torch
from ..models import ModelConfig
from ..split.functional import Scale, gated_, head_norm_, inverse_rms, rms_norm, rotary_, softcap_, softmax_
from ..split.ops import Block, Expected, Shapes
from .remote import Backend
from .report import Recorder

__all__ = ["Attention", "Layers", "Program", "Progress", "Stretch"]


_GROUPS: dict[str, tuple[tuple[tuple[str, ...], ...], tuple[tuple[str, ...], ...]]] = {
    "per-op": ((("q",), ("k",), ("v",)), (("gate",), ("up",))),
    "batched": ((("q", "k", "v"),), (("gate", "up"),)),
    "fused": ((), (("gate", "up"),)),
}
"""Which linear operations of the attention's input, and of the MLP's, go in one call."""


class Request(NamedTuple):
    """One call. `name` and `ops`: what it counts as in the report, and how many of that."""

    name: str
    ops: int
    op: str
    tensors: tuple[torch.Tensor, ...]
    attrs: dict[str, Any]
    expect: Expected


Program = Generator[Request, Any, "torch.Tensor | None"]


class Attention(NamedTuple):
    """What the attention of some layers has in common within a stretch."""

    cos: torch.Tensor
    """[1 or B, n, 1, half]: of the rows' positions."""
    sin: torch.Tensor
    blocks: list[Block]
    block_attrs: dict[str, Any]
    """The blocks as a request has them."""
    hidden: list[list[tuple[slice, torch.Tensor]]]
    """For each block what its rows do not see; see `softmax_`."""
    turn: torch.Tensor | None
    """`rotary_matrix`, for a single row: one product takes 20 us less than what it stands for, in each layer."""
    last: Attention | None
    """The same where only one row of each sequence goes on."""


@dataclass
class Progress:
    """How far a stretch of the plan `linear` is, for those behind it: its keys at the executor have the scale that the
    norm leaves only when its weighted values are asked for, and scores with them lack it until then."""

    start: int
    rows: int
    scaled: int = -1
    """The last layer whose keys were given their scale."""
    scales: dict[int, Scale] = field(default_factory=dict)
    """Of the last layers. Who asks for scores later gets them later, and finds the scale here by then."""


@dataclass
class Stretch:
    """Some rows of each sequence on their way through the layers."""

    ids: torch.Tensor
    """[B, n] int64."""
    session: int
    lane: int
    start: int
    """The position of the first row."""
    attention: list[Attention]
    """For each layer."""
    keep: torch.Tensor | None
    """[B] int64: the only row of each sequence whose logits are wanted."""
    progress: Progress
    earlier: Sequence[Progress] = ()
    """Of the stretches before it in this pass."""
    last: bool = True
    """Whether logits are wanted; else the pass ends when the last layer's keys and values are stored."""

    @property
    def batch(self) -> int:
        return self.ids.shape[0]

    @property
    def rows(self) -> int:
        return self.ids.shape[1]

    def at(self, layer: int) -> dict[str, Any]:
        """The attributes that say where in the session a call is."""
        return {"session": self.session, "lane": self.lane, "layer": layer, "start": self.start}


class Layers:
    """The programs of one model. `weights`: `ModelConfig.tee_weight_shapes`. `dtype`: what is computed in here, `wire`:
    what travels."""

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, torch.Tensor],
        backend: Backend,
        recorder: Recorder,
        dtype: torch.dtype,
        wire: str,
    ) -> None:
        self.recorder = recorder
        self._config = config
        self._backend = backend
        self._dtype = dtype
        self._wire: torch.dtype = getattr(torch, wire)
        self._cast = dtype != self._wire
        self._shapes = Shapes(config, wire)
        self._eps = config.rms_norm_eps
        self._heads = config.num_attention_heads
        self._kv_heads = config.num_key_value_heads
        self._norms = list(weights["norms"])
        self._per_layer = config.norms_per_layer
        layers, head_dim = config.num_hidden_layers, config.head_dim
        q, k = self._heads, self._kv_heads
        self._head_norms: list[torch.Tensor] = []
        if config.qk_norm:
            for own_q, own_k in weights["head_norms"].view(layers, 2, head_dim):
                self._head_norms.append(torch.cat([own_q.expand(q, -1), own_k.expand(k, -1)]))
        self._qk_bias: list[torch.Tensor] = []
        if config.attention_bias:
            self._qk_bias = [bias[: (q + k) * head_dim].view(q + k, head_dim) for bias in weights["attention_bias"]]
        self._mlp_bias: list[torch.Tensor] = []
        if config.mlp_bias:
            self._mlp_bias = list(weights["mlp_bias"].view(layers, 2, -1))

    def program(self, plan: str, stretch: Stretch) -> Program:
        """What runs a stretch; it returns the TEE's own fp32 logits [B, n or 1, vocab], None where none are wanted."""
        if plan == "folded":
            return self._folded(stretch)
        if plan == "linear":
            return self._linear(stretch)
        return self._split(plan, stretch)

    # ---- per-op, batched, fused ----

    def _split(self, plan: str, stretch: Stretch) -> Program:
        config, shapes, lap = self._config, self._shapes, self.recorder.lap
        attention_groups, mlp_groups = _GROUPS[plan]
        fused = plan == "fused"
        batch, rows = stretch.batch, stretch.rows
        last_layer = config.num_hidden_layers - 1
        # What every norm of this pass writes into: once a call has returned, nobody reads what it was sent any more.
        normed = self._backend.empty((batch, rows, config.hidden_size), self._wire)
        expect = shapes.hidden(batch, rows)
        (x,) = yield Request("embedding", 1, "embedding", (stretch.ids,), stretch.at(0), expect)
        x = self._in(x)
        for layer in range(last_layer + 1):
            h = self._norm(x, layer, 0, normed)
            attention = stretch.attention[layer]
            v: torch.Tensor | None = None
            k: torch.Tensor | None
            if fused:
                expect = shapes.qk(batch, rows)
                (q,) = yield Request("linear", 3, "qkv", (h,), stretch.at(layer), expect)
                k = None  # they are together
            else:
                outs = []
                for names in attention_groups:
                    outs += yield self._apply(layer, names, h)
                q, k, v = (out.view(batch, rows, -1, config.head_dim) for out in outs)
                del outs
            q, k = self._turned(layer, stretch, q, k, None)
            if layer == last_layer and not stretch.last:
                k = self._sent(q[:, :, self._heads :], self._wire) if k is None else self._out(k)
                yield self._scores_request(stretch, layer, None, (k,))
                if v is not None:
                    yield Request("matmul", 0, "values", (v,), stretch.at(layer), [])
                return None
            if layer == last_layer and stretch.keep is not None:
                # What the other rows would become is only read by layers that do not exist.
                if k is None:
                    q, k = q[:, :, : self._heads], self._sent(q[:, :, self._heads :], self._wire)
                q, x = self._sent(_kept(q, stretch.keep), self._wire), _kept(x, stretch.keep)
                rows, normed = 1, self._backend.empty((batch, 1, config.hidden_size), self._wire)
                assert attention.last is not None
                attention = attention.last
            tensors = (self._out(q),) if k is None else (self._out(q), self._out(k))
            del q, k, h
            lap("rotary")
            (packed,) = yield self._scores_request(stretch, layer, attention, tensors)
            del tensors
            self._softmax(packed, attention, batch)
            if fused:
                expect = shapes.hidden(batch, rows)
                (h,) = yield Request("matmul+linear", 1, "values_o", (packed,), stretch.at(layer), expect)
                del packed
            else:
                expect = shapes.values(batch, rows)
                assert v is not None
                (h,) = yield Request("matmul", 1, "values", (packed, v), stretch.at(layer), expect)
                del packed, v
                (h,) = yield self._apply(layer, ("o",), h)
            x = self._add(x, h, layer, 1)
            h = self._norm(x, layer, self._per_layer // 2, normed)
            outs = []
            for names in mlp_groups:
                outs += yield self._apply(layer, names, h)
            gate, up = outs
            del outs
            h = self._gated(gate, up, None, None)
            del gate, up
            (h,) = yield self._apply(layer, ("down",), h)
            x = self._add(x, h, layer, 3)
        h = self._norm(x, last_layer + 1, 0, normed)
        (logits,) = yield Request("lm_head", 1, "lm_head", (h,), {}, shapes.logits(batch, rows))
        return self._logits(logits, None)

    # ---- folded ----

    def _folded(self, stretch: Stretch) -> Program:
        config, shapes = self._config, self._shapes
        batch, rows = stretch.batch, stretch.rows
        last_layer = config.num_hidden_layers - 1
        expect = shapes.hidden(batch, rows) + shapes.qk(batch, rows)
        x, qk = yield Request("embedding+linear", 1, "embedding_qkv", (stretch.ids,), stretch.at(0), expect)
        for layer in range(last_layer + 1):
            scale = self._inverse_rms(x)
            del x
            request, attention = self._folded_scores(stretch, layer, qk, scale)
            del qk
            reply = yield request
            if attention is None:
                return None
            (packed,) = reply
            del request, reply
            rows = attention.blocks[-1].start + attention.blocks[-1].rows
            self._softmax(packed, attention, batch)
            expect = shapes.hidden(batch, rows) + shapes.gate_up(batch, rows)
            x, gate_up = yield Request("matmul+linear", 1, "values_gate_up", (packed,), stretch.at(layer), expect)
            del packed
            scale = self._inverse_rms(x)
            h = self._gated(gate_up[0], gate_up[1], scale, layer)
            del x, gate_up
            if layer < last_layer:
                expect = shapes.hidden(batch, rows) + shapes.qk(batch, rows)
                x, qk = yield Request("linear", 4, "down_qkv", (h,), stretch.at(layer + 1), expect)  # noqa: RUF059
                del h
        expect = shapes.hidden(batch, rows) + shapes.logits(batch, rows)
        x, logits = yield Request("linear+lm_head", 1, "down_lm_head", (h,), stretch.at(last_layer), expect)
        del h
        return self._logits(logits, self._inverse_rms(x))

    def _folded_scores(
        self, stretch: Stretch, layer: int, qk: torch.Tensor, scale: Scale
    ) -> tuple[Request, Attention | None]:
        """The call for a layer's scores, and what it asks for; None where only keys and values are to be stored."""
        q, _ = self._turned(layer, stretch, qk, None, scale)
        attrs: dict[str, Any] = {}
        if isinstance(scale, float):
            attrs["scale"] = scale
            rest: tuple[torch.Tensor, ...] = ()
        else:
            rest = (self._sent(scale.squeeze(-1)),)
        attention: Attention | None = stretch.attention[layer]
        tensors: tuple[torch.Tensor, ...] = (self._out(q),)
        if layer == self._config.num_hidden_layers - 1:
            keys = q[:, :, self._heads :]
            if not stretch.last:
                attention = None
                tensors = (self._sent(keys, self._wire),)
            elif stretch.keep is not None:
                assert attention is not None
                attention = attention.last
                kept = _kept(q[:, :, : self._heads], stretch.keep)
                tensors = (self._sent(kept, self._wire), self._sent(keys, self._wire))
                rest = (*rest, stretch.keep)
        self.recorder.lap("rotary")
        return self._scores_request(stretch, layer, attention, (*tensors, *rest), **attrs), attention

    # ---- linear ----

    def _linear(self, stretch: Stretch) -> Program:
        config, shapes = self._config, self._shapes
        batch, rows = stretch.batch, stretch.rows
        last_layer = config.num_hidden_layers - 1
        attention, keep = self._linear_attention(stretch, 0)
        if attention is None:
            stretch.progress.scaled = last_layer
            return (yield from self._folded(stretch))
        tables = [self._sent(table.squeeze(2).float()) for table in (attention.cos, attention.sin)]
        expect = shapes.hidden(batch, rows) + shapes.packed(batch, attention.blocks)
        attrs = {**stretch.at(0), **attention.block_attrs}
        progress, unscaled = stretch.progress, self._unscaled(stretch, 0)
        x, packed = yield Request(
            "embedding+linear+matmul", 1, "embedding_scores", (stretch.ids, *tables, *keep), attrs, expect
        )
        for layer in range(last_layer + 1):
            scale = self._inverse_rms(x)
            del x
            progress.scales[layer] = scale
            progress.scales.pop(layer - 2, None)
            attrs = stretch.at(layer)
            tensors: tuple[torch.Tensor, ...] = ()
            if isinstance(scale, float):
                attrs["scale"] = scale
            else:
                tensors = (self._sent(scale.squeeze(-1)),)
            progress.scaled = layer
            if attention is None:  # only this layer's keys and values are still wanted
                yield Request("matmul", 0, "values_gate_up", tensors, attrs, [])
                return None
            self._scale_scores(packed, attention, scale, stretch, bool(keep))
            self._scale_columns(packed, attention, [(each, each.scales[layer]) for each in unscaled], batch)
            self._softmax(packed, attention, batch)
            rows = attention.blocks[-1].start + attention.blocks[-1].rows
            tensors = (packed, *tensors)
            expect = shapes.hidden(batch, rows) + shapes.gate_up(batch, rows)
            x, gate_up = yield Request("matmul+linear", 1, "values_gate_up", tensors, attrs, expect)
            del packed, tensors
            scale = self._inverse_rms(x)
            h = self._gated(gate_up[0], gate_up[1], scale, layer)
            del x, gate_up
            if layer < last_layer:
                attention, keep = self._linear_attention(stretch, layer + 1)
                attrs = stretch.at(layer + 1)
                expect = shapes.hidden(batch, rows)
                unscaled = self._unscaled(stretch, layer + 1)
                if attention is None:
                    (x,) = yield Request("linear", 4, "down_scores", (h,), attrs, expect)
                else:
                    expect += shapes.packed(batch, attention.blocks)
                    attrs.update(attention.block_attrs)
                    x, packed = yield Request("linear+matmul", 1, "down_scores", (h, *keep), attrs, expect)  # noqa: RUF059
                del h
        expect = shapes.hidden(batch, rows) + shapes.logits(batch, rows)
        x, logits = yield Request("linear+lm_head", 1, "down_lm_head", (h,), stretch.at(last_layer), expect)
        del h
        return self._logits(logits, self._inverse_rms(x))

    @staticmethod
    def _unscaled(stretch: Stretch, layer: int) -> list[Progress]:
        """Those of the earlier stretches whose keys have no scale yet in scores that are asked for now."""
        return [each for each in stretch.earlier if each.scaled < layer]

    def _linear_attention(self, stretch: Stretch, layer: int) -> tuple[Attention | None, tuple[torch.Tensor, ...]]:
        """What scores to ask for in a layer, None for none; and which rows to keep from it on, if not all."""
        if layer < self._config.num_hidden_layers - 1:
            return stretch.attention[layer], ()
        if not stretch.last:
            return None, ()
        if stretch.keep is None:
            return stretch.attention[layer], ()
        return stretch.attention[layer].last, (stretch.keep,)

    def _scale_scores(
        self, packed: torch.Tensor, attention: Attention, scale: Scale, stretch: Stretch, kept: bool
    ) -> None:
        """The rows' scales, for q; and the new columns', for k: earlier ones have theirs already."""
        start = stretch.start
        if not isinstance(scale, float):
            by_row = scale.unsqueeze(1)  # [B, 1, n, 1]
            by_column = by_row.transpose(2, 3)
            if kept:
                assert stretch.keep is not None
                by_row = _kept(scale, stretch.keep).unsqueeze(1)
        for block, scores in self._unpacked(packed, attention, stretch.batch):
            first = max(start, block.first)
            new = scores[..., first - block.first :]
            if isinstance(scale, float):
                scores.mul_(scale)
                new.mul_(scale)
            else:
                scores.mul_(by_row[:, :, block.start : block.start + block.rows])
                new.mul_(by_column[..., first - start : block.last - start])
        self.recorder.lap("rmsnorm")

    def _scale_columns(
        self, packed: torch.Tensor, attention: Attention, scales: Sequence[tuple[Progress, Scale]], batch: int
    ) -> None:
        """The columns of stretches that are under way at once, for their keys."""
        if not scales:
            return
        for block, scores in self._unpacked(packed, attention, batch):
            for (start, end), scale in (((each.start, each.start + each.rows), scale) for each, scale in scales):
                first, last = max(start, block.first), min(end, block.last)
                if first < last:
                    part = scores[..., first - block.first : last - block.first]
                    part.mul_(
                        scale if isinstance(scale, float) else scale.mT.unsqueeze(1)[..., first - start : last - start]
                    )
        self.recorder.lap("rmsnorm")

    # ---- parts ----

    def _apply(self, layer: int, names: tuple[str, ...], x: torch.Tensor) -> Request:
        expect = self._shapes.linear(names, x.shape[0], x.shape[1])
        return Request("linear", len(names), "linear", (x,), {"layer": layer, "names": names}, expect)

    def _scores_request(
        self, stretch: Stretch, layer: int, attention: Attention | None, tensors: tuple[torch.Tensor, ...], **attrs: Any
    ) -> Request:
        blocks = [] if attention is None else attention.blocks
        attrs.update(stretch.at(layer))
        if attention is not None:
            attrs.update(attention.block_attrs)
        expect = self._shapes.packed(stretch.batch, blocks) if blocks else []
        return Request("matmul", 1, "scores", tensors, attrs, expect)

    def _turned(
        self, layer: int, stretch: Stretch, q: torch.Tensor, k: torch.Tensor | None, scale: Scale | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """q and k as the scores need them: scaled, with their bias, normalised, turned. Where k is None, q is both."""
        cos, sin = stretch.attention[layer].cos, stretch.attention[layer].sin
        matrix = stretch.attention[layer].turn
        width = 2 * cos.shape[-1]
        by_row = None if scale is None else scale if isinstance(scale, float) else scale.unsqueeze(-1)
        bias = self._qk_bias[layer] if self._qk_bias and by_row is not None else None
        norms = self._head_norms[layer] if self._head_norms else None
        on_tables = bias is None and norms is None and matrix is None
        if by_row is not None and on_tables:  # they are smaller
            cos, sin = (cos * by_row).to(self._dtype), (sin * by_row).to(self._dtype)

        def turn(x: torch.Tensor, heads: slice) -> torch.Tensor:
            x = self._in(x)
            if by_row is not None:
                if not on_tables:
                    x.mul_(by_row)
                elif width < x.shape[-1]:
                    x[..., width:].mul_(by_row)
            if bias is not None:
                x.add_(bias[heads])
            if norms is not None:
                head_norm_(x, norms[heads], self._eps)
            if matrix is not None:
                rows = x.view(-1, x.shape[-1])
                rows.copy_(rows @ matrix)
            else:
                rotary_(x[..., :width], cos, sin)
            return x

        if k is None:
            return turn(q, slice(None)), None
        return turn(q, slice(self._heads)), turn(k, slice(self._heads, None))

    def _softmax(self, packed: torch.Tensor, attention: Attention, batch: int) -> None:
        """Of all blocks, in place."""
        cap = self._config.attention_softcap
        for (_, scores), hidden in zip(self._unpacked(packed, attention, batch), attention.hidden):
            wide = scores.to(self._dtype)  # itself, where nothing is cast
            if cap:
                softcap_(wide, cap)
            softmax_(wide, hidden)
            if wide is not scores:
                scores.copy_(wide)
        self.recorder.lap("softmax")

    def _unpacked(
        self, packed: torch.Tensor, attention: Attention, batch: int
    ) -> Generator[tuple[Block, torch.Tensor], None, None]:
        """Each block's scores [B, heads, rows, columns], views."""
        offset = 0
        for block in attention.blocks:
            _, rows, first, last = block
            size = batch * self._heads * rows * (last - first)
            yield block, packed[offset : offset + size].view(batch, self._heads, rows, last - first)
            offset += size

    def _gated(self, gate: torch.Tensor, up: torch.Tensor, scale: Scale | None, layer: int | None) -> torch.Tensor:
        """What goes into the MLP's last linear operation [B, n, intermediate], in the memory of `gate`."""
        width = gate.shape[-1]
        flat = None if scale is None else scale if isinstance(scale, float) else scale.view(-1, 1)
        bias = self._mlp_bias[layer] if layer is not None and self._mlp_bias else None
        wide = self._in(gate)
        gated_(self._config.hidden_act, wide.view(-1, width), self._in(up).view(-1, width), flat, bias)
        if wide is not gate:
            gate.copy_(wide)
        self.recorder.lap("silu")
        return gate

    def _norm(self, x: torch.Tensor, layer: int, which: int, out: torch.Tensor) -> torch.Tensor:
        h = rms_norm(x, self._norms[self._per_layer * layer + which], self._eps, out)
        self.recorder.lap("rmsnorm")
        return h

    def _add(self, x: torch.Tensor, h: torch.Tensor, layer: int, which: int) -> torch.Tensor:
        """The residual stream with h added, in the memory of h. `which`: the norm that h goes through before, if
        any."""
        h = self._in(h)
        if self._config.post_norms:
            rms_norm(h, self._norms[self._per_layer * layer + which], self._eps, h)
            self.recorder.lap("rmsnorm")
        multiplier = self._config.residual_multiplier
        x = h.add_(x) if multiplier == 1 else h.mul_(multiplier).add_(x)
        self.recorder.lap("residual")
        return x

    def _inverse_rms(self, x: torch.Tensor) -> Scale:
        scale = inverse_rms(x, self._eps)
        self.recorder.lap("rmsnorm")
        return scale

    def _logits(self, logits: torch.Tensor, scale: Scale | None) -> torch.Tensor:
        # A private copy before anything is decided by them: in shared memory the peer could still change them.
        own = logits.to(torch.float32, copy=True)
        if scale is not None:
            own.mul_(scale)
        config = self._config
        if config.logits_divisor != 1:
            own.div_(config.logits_divisor)
        if config.logits_softcap:
            softcap_(own, config.logits_softcap)
        return own

    def _in(self, tensor: torch.Tensor) -> torch.Tensor:
        """In the TEE's own dtype: itself, where that is the wire's."""
        return tensor.to(self._dtype) if self._cast else tensor

    def _out(self, tensor: torch.Tensor) -> torch.Tensor:
        """In the wire's dtype: itself, where that is the TEE's."""
        if not self._cast:
            return tensor
        sent: torch.Tensor = self._backend.empty(tensor.shape, self._wire)
        return sent.copy_(tensor)

    def _sent(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A copy in memory that is sent as it lies."""
        sent: torch.Tensor = self._backend.empty(tensor.shape, dtype or tensor.dtype)
        return sent.copy_(tensor)


def _kept(rows: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """[B, n, ...] -> [B, 1, ...]: the row of each sequence that `keep` [B] names."""
    where = keep.view(-1, 1, *[1] * (rows.dim() - 2)).expand(len(rows), 1, *rows.shape[2:])
    return rows.gather(1, where)

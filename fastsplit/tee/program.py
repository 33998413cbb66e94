"""The interpreter of plans: what the TEE does between one call and the next.

A program is a generator: it yields a `Request`, gets its reply, and returns the logits. The runner decides whether it
waits for each reply, or lets the programs of several chunks take turns. What a program does stands in the plan
(split/plan.py); here are the TEE's steps, each a method of `Interpreter`, and how values get into requests and out of
replies.

Where a plan folds norms, a reply carries the residual stream x, and its rows' rms(x)^-1 are applied here: to q and k
before the rotation, to v before it is stored, to gate and up, to the logits. Where q and k never leave the executor,
the factor is applied to the scores, and the executor's stored keys and values get it with the next call.

Rules. Tensors that arrive are ours: rotary, softmax, activation and residual work in place on them and send the same
memory back. All other values are written into memory of the backend. So with shared memory the only copies are token
ids, indices of selected rows, and what the TEE's attention and embedding write. A value is released as soon as it is
sent: its memory is used again within the layer. Shapes and counts come from our own
configuration; replies are checked against them before memory is allocated (`expect`).

The untrusted side can change shared memory at any moment, also after a tensor was sent or received. In arithmetic this
is the same as a wrong product. Logits decide which token follows, so they are copied to private memory first; a guard
(guard.py) that checks values copies them, too.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..extras import torch
from ..models import ModelConfig
from ..split.blocks import Block
from ..split.contract import Expected, Shapes
from ..split.functional import Scale, embedding, gated_, head_norm_, inverse_rms, rms_norm, rotary_, softcap_, softmax_
from ..split.kv_cache import HostMemory, KVStore
from ..split.plan import Call, Local, Plan
from .attention import attend
from .guard import Guard
from .masks import Geometry, selected_rows
from .remote import Backend
from .report import Recorder

__all__ = ["Chunk", "Interpreter", "Program", "Progress", "Request"]


class Request(NamedTuple):
    """One call. `kind` and `products`: what it counts as in the report, and how many of that."""

    kind: str
    products: int
    tensors: tuple[torch.Tensor, ...]
    attrs: dict[str, Any]
    expect: Expected


Program = Generator[Request, Any, "torch.Tensor | None"]


@dataclass
class Progress:
    """How far a chunk is. Later chunks read this in a plan that rotates on the executor: there a chunk's keys get their
    factor with the call for its weighted values, and scores with these keys lack the factor until then."""

    start: int
    rows: int
    scaled: int = -1
    """The last layer whose keys were given their factor."""
    scales: dict[int, Scale] = field(default_factory=dict)
    """Factors of the last two layers, by layer. Chunks take turns in order, so a later chunk finds what it needs."""


@dataclass(slots=True)
class Chunk:
    """Some rows of each sequence on their way through the layers."""

    ids: torch.Tensor
    """[B, n] int64."""
    cache: int
    """The number of the executor's KV cache."""
    store: KVStore | None
    """Keys and values, where they are in the TEE."""
    lane: int
    start: int
    """The position of the first row."""
    geometry: list[Geometry]
    """For each layer."""
    selected: torch.Tensor | None
    """[B] int64: the only row of each sequence whose logits are wanted."""
    progress: Progress
    earlier: Sequence[Progress] = ()
    """Of the chunks before it in this pass."""
    wants_logits: bool = True
    """False: the pass ends when the last layer's keys and values are stored."""

    @property
    def batch(self) -> int:
        return self.ids.shape[0]

    @property
    def rows(self) -> int:
        return self.ids.shape[1]


class _State:
    """A chunk under way. `values`: by the names of split/contract.py; `scale`: rms(x)^-1 of the last x."""

    __slots__ = ("attrs", "batch", "chunk", "normed", "rows", "scale", "selected", "unscaled", "values")

    def __init__(self, chunk: Chunk) -> None:
        self.chunk = chunk
        self.attrs = {"session": chunk.cache, "lane": chunk.lane, "layer": 0, "start": chunk.start, "steps": ""}
        self.batch = chunk.batch
        self.rows = chunk.rows
        self.values: dict[str, torch.Tensor] = {"ids": chunk.ids}
        self.scale: Scale = 1.0
        self.selected = False
        """Whether one row of each sequence has been selected."""
        self.normed: torch.Tensor | None = None
        """The output memory of all norms. It can be reused: the executor reads a request only until it replies."""
        self.unscaled: Sequence[Progress] = ()

    def geometry(self, layer: int, *, selects: bool = False) -> Geometry:
        """That of a layer's scores. `selects`: whether a row of each sequence is being selected in the same call."""
        geometry = self.chunk.geometry[layer]
        if self.selected or selects:
            assert geometry.selected is not None
            return geometry.selected
        return geometry


_Stage = tuple[Call | None, "Callable[[_State, int, int], None] | None", int, int]
"""(call, None, layer, 0), or (None, method of a TEE step, layer, `nth`)."""


class Interpreter:
    """Runs a plan for one model. `weights`: `ModelConfig.tee_weight_shapes`. `embedding_table` [vocab, hidden] in the
    executor's dtype: for a plan that embeds here. `dtype`: what is computed in here; `link_dtype`: what travels."""

    def __init__(
        self,
        plan: Plan,
        config: ModelConfig,
        weights: dict[str, torch.Tensor],
        backend: Backend,
        recorder: Recorder,
        dtype: torch.dtype,
        link_dtype: str,
        *,
        embedding_table: torch.Tensor | None = None,
        guard: Guard | None = None,
    ) -> None:
        self.plan = plan
        self.recorder = recorder
        self.guard = guard
        self._config = config
        self._backend = backend
        self._embedding = embedding_table
        self._dtype = dtype
        self._link_dtype: torch.dtype = getattr(torch, link_dtype)
        self._casts = dtype != self._link_dtype
        self._shapes = Shapes(config, link_dtype)
        self._memory = HostMemory()
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
        self._attention_bias: list[torch.Tensor] = []  # [q, k and v heads, head_dim] of each layer
        if config.attention_bias and plan.folds:
            self._attention_bias = [bias.view(q + 2 * k, head_dim) for bias in weights["attention_bias"]]
        self._mlp_bias: list[torch.Tensor] = []
        if config.mlp_bias and plan.folds:
            self._mlp_bias = list(weights["mlp_bias"].view(layers, 2, -1))
        self._stages: dict[tuple[bool, bool], list[_Stage]] = {}

    def program(self, chunk: Chunk) -> Program:
        """The generator that runs a chunk. Returns private fp32 logits [B, n or 1, vocab], None if not wanted."""
        state = _State(chunk)
        guard = self.guard
        for call, step, layer, nth in self._schedule(chunk):
            if step is not None:
                step(state, layer, nth)
                continue
            assert call is not None
            request = self._request(state, call)
            if guard is None:
                reply = yield request
            else:
                sent = guard.before(call, chunk, request.tensors)
                reply = yield request._replace(tensors=sent)
                reply = guard.after(call, chunk, sent, reply)
                del sent
            del request
            self._take(state, call, reply)
            del reply
        return self._logits(state) if chunk.wants_logits else None

    def _schedule(self, chunk: Chunk) -> list[_Stage]:
        key = (chunk.wants_logits, chunk.selected is not None)
        stages = self._stages.get(key)
        if stages is None:
            stages = self._stages[key] = []
            layers = self._config.num_hidden_layers
            for stage in self.plan.schedule(layers, wants_logits=key[0], selects=key[1]):
                if isinstance(stage, Local):
                    stages.append((None, getattr(self, f"_{stage.step}"), stage.layer, stage.nth))
                else:
                    stages.append((stage, None, stage.layer, 0))
        return stages

    # ---- requests and replies ----

    def _request(self, state: _State, call: Call) -> Request:
        chunk, values = state.chunk, state.values
        attrs = state.attrs.copy()
        attrs["layer"] = call.layer
        attrs["steps"] = call.text
        tensors = []
        for name in call.inputs:
            if name == "normed":
                tensors.append(values[name])  # may be sent again; the next norm writes to the same memory
            elif name == "scale":
                if isinstance(state.scale, float):
                    attrs["scale"] = state.scale
                else:
                    tensors.append(self._sent(state.scale.squeeze(-1)))
                chunk.progress.scaled = call.layer
            elif name == "selected":
                assert chunk.selected is not None
                tensors.append(chunk.selected)
            elif name == "k" and "qk" in values:
                tensors.append(self._sent(values.pop("qk")[:, :, self._heads :], self._link_dtype))
            elif name in ("cos", "sin"):
                tensors.append(self._sent(getattr(chunk.geometry[0], name).squeeze(2).float()))
            elif name == "ids":
                tensors.append(values.pop(name))
            else:
                tensors.append(self._out(values.pop(name)))
        blocks: Sequence[Block] = ()
        if "scores" in call.outputs:
            layer = call.end_layer
            geometry = state.geometry(layer, selects="select" in call.steps)
            attrs.update(geometry.block_attrs)
            blocks = geometry.blocks
            if self.plan.rotates:
                state.unscaled = [each for each in chunk.earlier if each.scaled < layer]
        expect = self._shapes.reply(call, state.batch, state.rows, blocks)
        return Request(call.kind, call.products, tuple(tensors), attrs, expect)

    def _take(self, state: _State, call: Call, reply: Sequence[torch.Tensor]) -> None:
        """Puts a reply's tensors where the next steps find them."""
        values = state.values
        for name, tensor in zip(call.outputs, reply):
            if name != "x":
                values[name] = tensor
            elif self.plan.folds:
                self._rms(state, tensor)
            else:
                values[name] = self._in(tensor)
        if self.plan.rotates and "rope" in call.steps:
            scales, layer = state.chunk.progress.scales, call.end_layer
            scales[layer] = state.scale
            scales.pop(layer - 2, None)

    def _rms(self, state: _State, x: torch.Tensor) -> None:
        state.scale = inverse_rms(x, self._eps)
        self.recorder.lap("rmsnorm")

    def _logits(self, state: _State) -> torch.Tensor:
        # A private copy before anything is decided by them: in shared memory the peer could still change them.
        own = state.values.pop("logits").to(torch.float32, copy=True)
        if self.plan.folds:
            own.mul_(state.scale)
        config = self._config
        if config.logits_divisor != 1:
            own.div_(config.logits_divisor)
        if config.logits_softcap:
            softcap_(own, config.logits_softcap)
        return own

    # ---- the TEE's steps: `nth` says which one of its name in the layer it is ----

    def _embed(self, state: _State, layer: int, nth: int) -> None:
        assert self._embedding is not None
        rows = embedding(self._embedding, state.chunk.ids, self._config.embedding_multiplier)
        x = self._sent(rows, self._link_dtype)
        self.recorder.lap("embedding")
        if self.plan.folds:
            state.values["x"] = x
            self._rms(state, x)
        else:
            state.values["x"] = self._in(x)

    def _norm(self, state: _State, layer: int, nth: int) -> None:
        index = self._per_layer * layer + (self._per_layer // 2 if nth > 0 else self._per_layer if nth < 0 else 0)
        x = state.values["x"]
        out = state.normed
        if out is None:
            out = state.normed = self._backend.empty(x.shape, self._link_dtype)
        state.values["normed"] = rms_norm(x, self._norms[index], self._eps, out)
        self.recorder.lap("rmsnorm")

    def _rope(self, state: _State, layer: int, nth: int) -> None:
        """q and k as the scores need them: scaled, with their bias, normalized, rotated."""
        values, chunk = state.values, state.chunk
        geometry = chunk.geometry[layer]
        cos, sin, matrix = geometry.cos, geometry.sin, geometry.rotation
        width = 2 * cos.shape[-1]
        scale = state.scale if self.plan.folds else None
        by_row = scale.unsqueeze(-1) if isinstance(scale, torch.Tensor) else scale
        bias = self._attention_bias[layer] if self._attention_bias else None
        norms = self._head_norms[layer] if self._head_norms else None
        on_tables = bias is None and norms is None and matrix is None
        if by_row is not None and on_tables:  # they are smaller than q and k
            cos, sin = (cos * by_row).to(self._dtype), (sin * by_row).to(self._dtype)

        def rotated(x: torch.Tensor, heads: slice) -> torch.Tensor:
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

        if "qk" in values:
            values["qk"] = rotated(values.pop("qk"), slice(self._heads + self._kv_heads))
        else:
            values["q"] = rotated(values.pop("q"), slice(self._heads))
            values["k"] = rotated(values.pop("k"), slice(self._heads, self._heads + self._kv_heads))
        self.recorder.lap("rotary")

    def _select(self, state: _State, layer: int, nth: int) -> None:
        """One row of each sequence goes on."""
        values, selected = state.values, state.chunk.selected
        assert selected is not None
        state.selected = True
        state.normed = None
        if self.plan.rotates:
            return
        if "qk" in values:
            qk = values.pop("qk")
            values["q"], values["k"] = qk[:, :, : self._heads], qk[:, :, self._heads :]
            if not self.plan.cache_in_tee:
                values["k"] = self._sent(values["k"], self._link_dtype)
        values["q"] = selected_rows(values["q"], selected)
        if not self.plan.cache_in_tee:
            values["q"] = self._sent(values["q"], self._link_dtype)
        if not self.plan.folds:
            values["x"] = selected_rows(values["x"], selected)
        self.recorder.lap("rotary", 0)

    def _store(self, state: _State, layer: int, nth: int) -> None:
        """Keys and values go to the KV cache in the TEE."""
        values, chunk = state.values, state.chunk
        assert chunk.store is not None
        v = self._in(values.pop("v"))
        if self.plan.folds:
            v.mul_(state.scale.unsqueeze(-1) if isinstance(state.scale, torch.Tensor) else state.scale)
            if self._attention_bias:
                v.add_(self._attention_bias[layer][self._heads + self._kv_heads :])
        k = values["qk"][:, :, self._heads :] if "qk" in values else values.pop("k")
        chunk.store.store_keys(self._memory, layer, chunk.start, k)
        chunk.store.store_values(self._memory, layer, chunk.start, v)
        self.recorder.lap("kv_cache")

    def _attention(self, state: _State, layer: int, nth: int) -> None:
        values, config = state.values, self._config
        store = state.chunk.store
        assert store is not None
        q = values.pop("qk")[:, :, : self._heads] if "qk" in values else values.pop("q")
        keys, vals = (
            cache.view(state.batch, self._kv_heads, -1, config.head_dim)
            for cache in (store.keys(layer), store.values(layer))
        )
        found = attend(q, keys, vals, state.geometry(layer), config.scale, config.attention_softcap)
        values["attended"] = self._sent(found, self._link_dtype)
        self.recorder.lap("attention")

    def _softmax(self, state: _State, layer: int, nth: int) -> None:
        """Of all blocks, in place."""
        packed = state.values.pop("scores")
        geometry = state.geometry(layer)
        if self.plan.rotates:
            self._scale_scores(state, packed, geometry)
            self._scale_columns(state, packed, geometry, layer)
        cap = self._config.attention_softcap
        for (_, scores), masked in zip(self._unpacked(state, packed, geometry), geometry.masked):
            wide = self._in(scores)
            if cap:
                softcap_(wide, cap)
            softmax_(wide, masked)
            if wide is not scores:
                scores.copy_(wide)
        state.values["weights"] = packed
        self.recorder.lap("softmax")

    def _act(self, state: _State, layer: int, nth: int) -> None:
        """The input of the MLP's last product [B, n, intermediate], in the memory of gate."""
        values = state.values
        gate, up = values.pop("gate_up") if "gate_up" in values else (values.pop("gate"), values.pop("up"))
        scale = state.scale if self.plan.folds else None
        flat = scale.view(-1, 1) if isinstance(scale, torch.Tensor) else scale
        bias = self._mlp_bias[layer] if self._mlp_bias else None
        width = gate.shape[-1]
        wide = self._in(gate)
        gated_(self._config.hidden_act, wide.view(-1, width), self._in(up).view(-1, width), flat, bias)
        if wide is not gate:
            gate.copy_(wide)
        values["gated"] = gate
        self.recorder.lap("silu")

    def _add(self, state: _State, layer: int, nth: int) -> None:
        """The residual stream goes on, in the memory of what is added."""
        values, config = state.values, self._config
        delta = self._in(values.pop("delta"))
        if config.post_norms:
            rms_norm(delta, self._norms[self._per_layer * layer + (3 if nth else 1)], self._eps, delta)
            self.recorder.lap("rmsnorm")
        x = values["x"]
        multiplier = config.residual_multiplier
        values["x"] = delta.add_(x) if multiplier == 1 else delta.mul_(multiplier).add_(x)
        self.recorder.lap("residual")

    # ---- parts ----

    def _scale_scores(self, state: _State, packed: torch.Tensor, geometry: Geometry) -> None:
        """Multiplies scores by the factors of q (rows) and of k (new columns; earlier ones have theirs)."""
        start, scale = state.chunk.start, state.scale
        if not isinstance(scale, float):
            by_row = scale.unsqueeze(1)  # [B, 1, n, 1]
            by_column = by_row.transpose(2, 3)
            if state.selected:
                assert state.chunk.selected is not None
                by_row = selected_rows(scale, state.chunk.selected).unsqueeze(1)
        for block, scores in self._unpacked(state, packed, geometry):
            first = max(start, block.first)
            new = scores[..., first - block.first :]
            if isinstance(scale, float):
                scores.mul_(scale)
                new.mul_(scale)
            else:
                scores.mul_(by_row[:, :, block.start : block.start + block.rows])
                new.mul_(by_column[..., first - start : block.end - start])
        self.recorder.lap("rmsnorm")

    def _scale_columns(self, state: _State, packed: torch.Tensor, geometry: Geometry, layer: int) -> None:
        """Multiplies the columns of earlier chunks whose keys had no factor yet when these scores were requested."""
        if not state.unscaled:
            return
        scales = [(each.start, each.start + each.rows, each.scales[layer]) for each in state.unscaled]
        for block, scores in self._unpacked(state, packed, geometry):
            for start, stop, scale in scales:
                first, end = max(start, block.first), min(stop, block.end)
                if first < end:
                    part = scores[..., first - block.first : end - block.first]
                    part.mul_(
                        scale if isinstance(scale, float) else scale.mT.unsqueeze(1)[..., first - start : end - start]
                    )
        self.recorder.lap("rmsnorm")

    def _unpacked(
        self, state: _State, packed: torch.Tensor, geometry: Geometry
    ) -> Iterator[tuple[Block, torch.Tensor]]:
        """Each block's scores [B, heads, rows, columns], views."""
        offset = 0
        for block in geometry.blocks:
            size = state.batch * self._heads * block.rows * block.columns
            yield block, packed[offset : offset + size].view(state.batch, self._heads, block.rows, block.columns)
            offset += size

    def _in(self, tensor: torch.Tensor) -> torch.Tensor:
        """In the TEE's own dtype: itself, where that is the link's."""
        return tensor.to(self._dtype) if self._casts else tensor

    def _out(self, tensor: torch.Tensor) -> torch.Tensor:
        """In the link's dtype: itself, where that is the TEE's."""
        return self._sent(tensor, self._link_dtype) if tensor.dtype != self._link_dtype else tensor

    def _sent(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A copy in memory that is sent where it lies."""
        sent: torch.Tensor = self._backend.empty(tensor.shape, dtype or tensor.dtype)
        return sent.copy_(tensor)

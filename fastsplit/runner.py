"""The TEE side: the layer loop. Linear algebra goes to a backend, everything else happens here.

A plan says what goes in one call: `per-op` sends q, k, v, gate and up one by one (9 calls a layer and 2), `batched`
sends linear operations of the same input together (6 a layer and 2). The KV cache is here in both.

Rules. Shapes and counts come from our own configuration; the backend's replies are checked against them before memory
is allocated (`expect`). Tensors that arrive are ours: rotary, softmax, SiLU and the residual work in place on them
and send the same memory back. Everything else that is sent lies in memory of the backend's (`Backend.empty`): the KV
cache and what RMSNorm writes. So where both sides share memory nothing but token ids is copied to be sent. What is not
needed any more is let go at once, so that its memory serves again within the layer. Every stretch of time is recorded
(report.py).

Memory that is shared can be changed by the untrusted side at any moment, also after it was sent or received. For
arithmetic that is no more than an executor that computes wrongly. But what is checked and then used, or decided upon,
is copied to private memory first and only the copy is looked at: norm weights, logits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .errors import ModelError, RemoteProtocolError, VerificationError
from .llama import causal_softmax_, rms_norm, rotary_, rotary_table, silu_mul_
from .models import DTYPES, Model, ModelConfig, Rope
from .ops import Expected, RowBlock, Shapes, choose_block_rows, row_blocks
from .report import Recorder
from .wire.channel import Channel
from .wire.stats import Stats

__all__ = ["PLANS", "Backend", "KVCache", "RemoteBackend", "RemoteModel", "Runner", "Sampling", "sample"]

PLANS: dict[str, tuple[tuple[tuple[str, ...], ...], tuple[tuple[str, ...], ...]]] = {
    "per-op": ((("q",), ("k",), ("v",)), (("gate",), ("up",))),
    "batched": ((("q", "k", "v"),), (("gate", "up"),)),
}
"""Which linear operations of the attention's input, and of the MLP's, go in one call."""


class Backend(Protocol):
    """Who computes linear algebra for a Runner. ops.py says what each operation takes and gives."""

    @property
    def stats(self) -> Stats: ...

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory of undefined content from which tensors are sent fastest, views of it included; the caller's own."""

    def embedding(self, ids: torch.Tensor) -> torch.Tensor: ...

    def linear(self, layer: int, names: tuple[str, ...], x: torch.Tensor) -> Sequence[torch.Tensor]: ...

    def scores(self, q: torch.Tensor, k: torch.Tensor, blocks: list[RowBlock]) -> Sequence[torch.Tensor]: ...

    def values(self, blocks: Sequence[torch.Tensor], v: torch.Tensor) -> torch.Tensor: ...

    def lm_head(self, x: torch.Tensor) -> torch.Tensor: ...


class RemoteBackend:
    """An executor at the other end of a channel."""

    def __init__(self, channel: Channel, config: ModelConfig, dtype: str) -> None:
        self._channel = channel
        self._shapes = Shapes(config, dtype)

    @property
    def stats(self) -> Stats:
        return self._channel.stats

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        tensor: torch.Tensor = self._channel.empty(shape, dtype)
        return tensor

    def embedding(self, ids: torch.Tensor) -> torch.Tensor:
        return self._one("embedding", self._shapes.embedding(len(ids)), ids)

    def linear(self, layer: int, names: tuple[str, ...], x: torch.Tensor) -> Sequence[torch.Tensor]:
        expect = self._shapes.linear(names, len(x))
        return self._channel.call("linear", x, expect=expect, layer=layer, names=names)

    def scores(self, q: torch.Tensor, k: torch.Tensor, blocks: list[RowBlock]) -> Sequence[torch.Tensor]:
        return self._channel.call("scores", q, k, expect=self._shapes.scores(blocks), block_rows=blocks[0].rows)

    def values(self, blocks: Sequence[torch.Tensor], v: torch.Tensor) -> torch.Tensor:
        rows = sum(block.shape[1] for block in blocks)
        return self._one("values", self._shapes.values(rows), *blocks, v)

    def lm_head(self, x: torch.Tensor) -> torch.Tensor:
        return self._one("lm_head", self._shapes.lm_head(len(x)), x)

    def _one(self, op: str, expect: Expected, *tensors: torch.Tensor) -> torch.Tensor:
        (result,) = self._channel.call(op, *tensors, expect=expect)
        tensor: torch.Tensor = result
        return tensor


@dataclass(frozen=True)
class RemoteModel:
    """What a TEE side needs to know of the executor's model. `norms`: [2 * layers + 1, hidden], in `dtype`."""

    name: str
    config: ModelConfig
    dtype: str
    norms: torch.Tensor

    @classmethod
    def fetch(cls, channel: Channel, trusted: Model | None) -> RemoteModel:
        """Asks the executor, and checks it against the trusted copy if there is one; then all that is used is the
        copy's.

        Raises VerificationError where the two differ, RemoteProtocolError for an answer that makes no sense.
        """
        described = channel.call("describe", expect=()).attrs
        config = _parse_config(described.get("config"))
        dtype = described.get("dtype")
        if dtype not in DTYPES:
            raise RemoteProtocolError(f"describe, dtype: {dtype!r}, expected one of {', '.join(DTYPES)}")
        if trusted is not None:
            _compare(trusted.config, config)
            config = trusted.config
        (received,) = channel.call("norms", expect=Shapes(config, dtype).norms())
        norms = received.clone()  # the peer may change what is in shared memory between a comparison and its use
        if trusted is not None:
            own = trusted.norms().to(norms.dtype)
            if not torch.equal(own, norms):
                rows = (own != norms).any(dim=1).sum()
                raise VerificationError(f"norm weights: {int(rows)} of {len(own)} differ from the trusted copy")
            norms = own
        name = str(described.get("name")) if trusted is None else trusted.name
        return cls(name, config, dtype, norms)


def _parse_config(text: Any) -> ModelConfig:
    try:
        values = json.loads(text)
        return ModelConfig(
            **{**values, "rope": Rope(**values["rope"]), "eos_token_ids": tuple(values["eos_token_ids"])}
        )
    except ModelError as error:
        raise RemoteProtocolError(f"describe, {error}") from None
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise RemoteProtocolError(f"describe, config: {error}, expected a model's configuration as JSON") from None


def _compare(own: ModelConfig, theirs: ModelConfig) -> None:
    differences = [
        f"{name}: {getattr(theirs, name)!r}, expected {getattr(own, name)!r}"
        for name in own.__dataclass_fields__
        if getattr(theirs, name) != getattr(own, name) and name != "eos_token_ids"
    ]
    if differences:
        raise VerificationError(f"the executor's model is not the trusted one: {'; '.join(differences)}")


class KVCache:
    """Keys and values of all positions so far, token-major: a prefix is contiguous and is sent as it lies.

    Each layer has memory of its own, from the backend: growing takes one layer's old and new memory at a time, not the
    whole cache's twice.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, capacity: int, backend: Backend) -> None:
        self._row = (config.num_key_value_heads, config.head_dim)
        self._dtype = dtype
        self._backend = backend
        self._keys = [self._allocate(capacity) for _ in range(config.num_hidden_layers)]
        self._values = [self._allocate(capacity) for _ in range(config.num_hidden_layers)]
        self.length = 0

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds [n, kv_heads, head_dim] after the `length` positions before, and returns all: views of the cache."""
        return self._append(self._keys, layer, k), self._append(self._values, layer, v)

    def _append(self, layers: list[torch.Tensor], layer: int, rows: torch.Tensor) -> torch.Tensor:
        end = self.length + len(rows)
        memory = layers[layer]
        if end > len(memory):
            grown = self._allocate(max(end, 2 * len(memory)))
            grown[: self.length] = memory[: self.length]
            memory = layers[layer] = grown
        memory[self.length : end] = rows
        return memory[:end]

    def _allocate(self, capacity: int) -> torch.Tensor:
        return self._backend.empty((capacity, *self._row), self._dtype)


class Runner:
    """One model, one plan, one backend. Not thread-safe."""

    def __init__(self, model: RemoteModel, backend: Backend, plan: str = "batched", recorder: Recorder | None = None):
        if plan not in PLANS:
            raise ValueError(f"plan {plan!r}, expected one of {', '.join(PLANS)}")
        self.config = model.config
        self.plan = plan
        self.recorder = recorder or Recorder()
        self._backend = backend
        self._norms = list(model.norms)
        self._dtype: torch.dtype = getattr(torch, model.dtype)
        self._tables: tuple[torch.Tensor, ...] = ()

    def new_cache(self, capacity: int) -> KVCache:
        """Room for `capacity` positions; it grows if there are more."""
        return KVCache(self.config, self._dtype, capacity, self._backend)

    def forward(self, ids: torch.Tensor, cache: KVCache, *, all_logits: bool = False) -> torch.Tensor:
        """Logits for the ids [n] int64 after what is in the cache, which grows by n: [1, vocab], or [n, vocab].

        Without `all_logits` only the last row goes through what follows the last layer's keys and values. The logits
        are as they came, in memory that the executor may share: copy them before anything is decided by them.
        """
        config, recorder = self.config, self.recorder
        rows = len(ids)
        positions = cache.length + rows
        cos, sin, q_cos, q_sin = (table[cache.length : positions] for table in self._rotary(positions))
        attention_groups, mlp_groups = PLANS[self.plan]
        # What every norm of this pass writes into: once a call has returned, nobody reads what it was sent any more.
        normed = self._backend.empty((rows, config.hidden_size), self._dtype)
        x = self._call("embedding", self._backend.embedding, ids)
        for layer in range(config.num_hidden_layers):
            h = self._norm(x, 2 * layer, normed)
            q, k, v = (out.view(rows, -1, config.head_dim) for out in self._linear(layer, attention_groups, h))
            if layer == config.num_hidden_layers - 1 and not all_logits and rows > 1:
                # What the earlier rows would become is only read by layers that do not exist.
                q, q_cos, q_sin, x, rows = q[-1:], q_cos[-1:], q_sin[-1:], x[-1:].clone(), 1
                normed = normed[:1]
            rotary_(q, q_cos, q_sin)
            rotary_(k, cos, sin)
            recorder.lap("rotary")
            keys, values = cache.append(layer, k, v)
            del k, v
            recorder.lap("kv_cache")
            blocks = row_blocks(rows, positions, choose_block_rows(rows))
            scores = self._call("matmul", self._backend.scores, q, keys, blocks)
            del q, keys
            for block in scores:
                causal_softmax_(block)
            recorder.lap("softmax")
            h = self._call("matmul", self._backend.values, scores, values)
            del scores, block, values
            (h,) = self._linear(layer, (("o",),), h)
            x = self._add(x, h)
            gate, up = self._linear(layer, mlp_groups, self._norm(x, 2 * layer + 1, normed))
            h = silu_mul_(gate, up)
            del gate, up
            recorder.lap("silu")
            (h,) = self._linear(layer, (("down",),), h)
            x = self._add(x, h)
        cache.length = positions
        h = self._norm(x, 2 * config.num_hidden_layers, normed)
        logits: torch.Tensor = self._call("lm_head", self._backend.lm_head, h)
        return logits

    def generate(
        self,
        ids: torch.Tensor,
        max_new_tokens: int,
        *,
        sampling: Sampling | None = None,
        on_prefill: Callable[[torch.Tensor], object] | None = None,
        ignore_eos: bool = False,
    ) -> Iterator[int]:
        """New token ids one by one, after the prompt's [n] int64; an end-of-sequence token is the last one given.

        `on_prefill(logits)` gets the prompt's last row, [vocab] fp32. With 0 new tokens only the prompt is run.
        """
        recorder = self.recorder
        sampling = sampling or Sampling()
        generator = torch.Generator().manual_seed(sampling.seed)
        cache = self.new_cache(len(ids) + max_new_tokens)
        with recorder.phase("prefill"):
            logits = self._last_logits(ids, cache)
            token = sample(logits, sampling, generator) if max_new_tokens else None
            recorder.lap("sampling")
        if on_prefill is not None:
            on_prefill(logits)
        for count in range(1, max_new_tokens + 1):
            assert token is not None
            yield token
            if count == max_new_tokens or (token in self.config.eos_token_ids and not ignore_eos):
                return
            with recorder.phase("decode"):
                logits = self._last_logits(torch.tensor([token]), cache)
                token = sample(logits, sampling, generator)
                recorder.lap("sampling")

    def _last_logits(self, ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """[vocab] fp32. Raises RemoteProtocolError if they are not finite: nothing can be chosen by them."""
        # A private copy before anything is checked: in shared memory the peer could change what was found to be finite.
        logits = self.forward(ids, cache)[-1].to(torch.float32, copy=True)
        if not bool(logits.isfinite().all()):
            raise RemoteProtocolError("lm_head, logits: NaN or infinite, expected finite numbers")
        return logits

    def _call(self, name: str, work: Callable[..., Any], *args: Any, ops: int = 1) -> Any:
        return self.recorder.call(name, ops, self._backend.stats, work, *args)

    def _linear(self, layer: int, groups: tuple[tuple[str, ...], ...], x: torch.Tensor) -> list[torch.Tensor]:
        outs: list[torch.Tensor] = []
        for names in groups:
            outs += self._call("linear", self._backend.linear, layer, names, x, ops=len(names))
        return outs

    def _norm(self, x: torch.Tensor, index: int, out: torch.Tensor) -> torch.Tensor:
        h = rms_norm(x, self._norms[index], self.config.rms_norm_eps, out)
        self.recorder.lap("rmsnorm")
        return h

    def _add(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        x = h.add_(x)
        self.recorder.lap("residual")
        return x

    def _rotary(self, positions: int) -> tuple[torch.Tensor, ...]:
        """cos, sin, and both times the attention's scale for the queries; for at least `positions` positions, kept."""
        if not self._tables or len(self._tables[0]) < positions:
            config = self.config
            cos, sin = rotary_table(max(positions, 512, 2 * positions), config.head_dim, config.rope, torch.float32)
            scale = config.head_dim**-0.5
            self._tables = tuple(table.to(self._dtype) for table in (cos, sin, cos * scale, sin * scale))
        return self._tables


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy; `top_k` 0 and `top_p` 1 leave everything in."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


def sample(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token's id from finite logits [vocab] fp32: the greatest, or drawn as HF does (temperature, top-k,
    top-p)."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    # From the greatest, so that no temperature makes it infinite; 1e-30 is a number in fp32.
    logits = (logits - logits.max()) / max(sampling.temperature, 1e-30)
    if 0 < sampling.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort()
        removed = ordered.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        removed[-1] = False  # the most likely one always stays
        logits = logits.index_fill(0, order[removed], -torch.inf)
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))

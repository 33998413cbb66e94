"""The GPU side: holds the weights, and computes what the TEE asks for.

Rules. Stateless: a request holds all that it needs, so any number of clients may take turns. Arguments are checked
against the configuration before they are used; what is wrong with them is the caller's error, by name. What is checked
is private to us (descriptions), or copied first (token ids): tensors may lie in memory that the caller can write to.
Where inputs are read and results are computed is the device's business (devices.py); a handler returns when its results
are complete, so that the time it took is the time the work took.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from .devices import Cpu, Device, Work
from .errors import LimitError, ModelError, TensorError
from .models import DTYPES, LINEARS, Model, linear_name, norm_names
from .ops import MAX_BLOCKS, Expected, Shapes, row_blocks
from .schema.limits import Limits
from .wire.segment import Hook
from .wire.server import Call, Handler

__all__ = ["Executor"]


class Executor:
    """One model's weights on one device. `handlers` and `on_segment` are what a `Server` takes."""

    def __init__(
        self,
        model: Model,
        *,
        device: Device | None = None,
        dtype: str = "float32",
        progress: Callable[[Any, int], Any] | None = None,
        max_reply_nbytes: int = Limits().max_message_nbytes,
    ) -> None:
        """Loads all weights. `device`: the CPU if None. `progress(items, total)` wraps the iteration over the weights.

        Raises ModelError. What would make a reply of more than `max_reply_nbytes` is refused before it is computed.
        """
        if dtype not in DTYPES:
            raise ModelError(f"dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
        self.name = model.name
        self.config = model.config
        self.device: Device = Cpu() if device is None else device
        self.dtype = dtype
        self._torch_dtype: torch.dtype = getattr(torch, dtype)
        self._shapes = Shapes(model.config, dtype)
        self._max_reply_nbytes = max_reply_nbytes
        total = len(model.config.weight_shapes())
        items = model.items() if progress is None else progress(model.items(), total)
        self._weights = {name: weight.to(self.device.torch_device, self._torch_dtype) for name, weight in items}
        if model.config.tie_word_embeddings:
            self._weights["lm_head.weight"] = self._weights["model.embed_tokens.weight"]
        self.handlers: dict[str, Handler] = {
            "describe": self._describe,
            "norms": self._norms,
            "embedding": self._embedding,
            "linear": self._linear,
            "scores": self._scores,
            "values": self._values,
            "lm_head": self._lm_head,
        }

    @property
    def on_segment(self) -> Hook | None:
        """What must be told of shared memory that is mapped, None if nothing."""
        return self.device.on_segment

    # ---- set-up ----

    def _describe(self, call: Call) -> None:
        call.reply_attrs["config"] = json.dumps(asdict(self.config))
        call.reply_attrs["dtype"] = self.dtype
        call.reply_attrs["name"] = self.name

    def _norms(self, call: Call) -> torch.Tensor:
        rows = [self._weights[name] for name in norm_names(self.config.num_hidden_layers)]
        (shape,) = self._reply_shapes(self._shapes.norms())
        with self.device.work() as work:
            return self._into_reply(call, work, shape, lambda out: torch.stack(rows, out=out))

    # ---- compute ----

    def _embedding(self, call: Call) -> torch.Tensor:
        (ids,) = _take(call, 1)
        if ids.dtype != torch.int64 or ids.dim() != 1:
            raise TensorError(f"ids: {ids.dtype} {list(ids.shape)}, expected int64 [n]")
        ids = ids.clone()  # the caller may change shared memory between the check and the look-up, and what is looked
        # up by an id out of range is memory of ours
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.config.vocab_size:
            raise ValueError(f"ids: {int(ids.min())} to {int(ids.max())}, expected 0 to {self.config.vocab_size - 1}")
        (shape,) = self._reply_shapes(self._shapes.embedding(len(ids)))
        table = self._weights["model.embed_tokens.weight"]
        with self.device.work() as work:
            ids = work.take(ids)
            return self._into_reply(call, work, shape, lambda out: torch.index_select(table, 0, ids, out=out))

    def _linear(self, call: Call) -> list[torch.Tensor]:
        (x,) = _take(call, 1)
        layer, names = call.attrs.get("layer"), call.attrs.get("names")
        if not isinstance(layer, int) or not 0 <= layer < self.config.num_hidden_layers:
            raise ValueError(f"layer: {layer!r}, expected 0 to {self.config.num_hidden_layers - 1}")
        if not isinstance(names, list) or not names or any(name not in LINEARS for name in names):
            raise ValueError(f"names: {names!r}, expected a list of {', '.join(LINEARS)}")
        self._check("x", x, (None, self.config.in_features(names[0])))
        if len(set(names)) < len(names):
            raise ValueError(f"names: {names!r}, expected each once")
        if any(self.config.in_features(name) != x.shape[1] for name in names):
            raise ValueError(f"names: {names!r}, expected linear operations of the same input")
        shapes = self._reply_shapes(self._shapes.linear(tuple(names), len(x)))
        with self.device.work() as work:
            x = work.take(x)
            return [self._apply(call, work, x, linear_name(layer, name), shape) for name, shape in zip(names, shapes)]

    def _lm_head(self, call: Call) -> torch.Tensor:
        (x,) = _take(call, 1)
        self._check("x", x, (None, self.config.hidden_size))
        (shape,) = self._reply_shapes(self._shapes.lm_head(len(x)))
        with self.device.work() as work:
            return self._apply(call, work, work.take(x), "lm_head", shape)

    def _scores(self, call: Call) -> list[torch.Tensor]:
        q, k = _take(call, 2)
        config = self.config
        self._check("q", q, (None, config.num_attention_heads, config.head_dim))
        self._check("k", k, (None, config.num_key_value_heads, config.head_dim))
        block_rows = call.attrs.get("block_rows")
        if not isinstance(block_rows, int) or block_rows < 1:
            raise ValueError(f"block_rows: {block_rows!r}, expected an int of 1 or more")
        rows, positions = len(q), len(k)
        if not 1 <= rows <= positions:
            raise ValueError(f"q: {rows} rows, expected 1 to k's {positions}")
        count = -(-rows // block_rows)
        if count > MAX_BLOCKS:
            raise ValueError(f"block_rows: {block_rows}, which makes {count} blocks, expected at most {MAX_BLOCKS}")
        blocks = row_blocks(rows, positions, block_rows)
        shapes = self._reply_shapes(self._shapes.scores(blocks))
        with self.device.work() as work:
            q, k = work.take(q), work.take(k)
            keys = k.permute(1, 2, 0)  # [kv_heads, head_dim, t]
            replies = []
            for block, shape in zip(blocks, shapes):
                queries = q[block.start : block.start + block.rows]
                compute = partial(self._products, queries, keys[:, :, : block.columns])
                replies.append(self._into_reply(call, work, shape, compute))
            return replies

    def _values(self, call: Call) -> torch.Tensor:
        if len(call.tensors) < 2:
            raise ValueError(f"{len(call.tensors)} tensors, expected row blocks and v")
        *probabilities, v = call.tensors
        config = self.config
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self._check("v", v, (None, kv_heads, head_dim))
        rows = 0
        for index, block in enumerate(probabilities):
            self._check(f"row block {index}", block, (heads, None, None))
            if not 1 <= block.shape[2] <= len(v):
                raise ValueError(f"row block {index}: {block.shape[2]} columns, expected 1 to v's {len(v)}")
            rows += block.shape[1]
        (shape,) = self._reply_shapes(self._shapes.values(rows))
        reply: torch.Tensor = call.empty(shape, self.dtype)
        with self.device.work() as work:
            values = work.take(v).transpose(0, 1)  # [kv_heads, t, head_dim]
            start = 0
            for block in probabilities:  # one by one: a device computes with one while the next is on its way
                count, columns = block.shape[1:]
                compute = partial(self._weighted, work.take(block), values[:, :columns])
                work.give(reply[start : start + count], compute)
                start += count
        return reply

    @staticmethod
    def _products(q: torch.Tensor, keys: torch.Tensor, out: torch.Tensor) -> None:
        """[n, heads, head_dim], [kv_heads, head_dim, t] -> [heads, n, t]: a kv head's queries as one matrix."""
        rows, heads, head_dim = q.shape
        kv_heads = len(keys)
        by_kv_head = q.view(rows, kv_heads, heads // kv_heads, head_dim).permute(1, 2, 0, 3)
        torch.bmm(by_kv_head.reshape(kv_heads, -1, head_dim), keys, out=out.view(kv_heads, -1, keys.shape[2]))

    @staticmethod
    def _weighted(probabilities: torch.Tensor, values: torch.Tensor, out: torch.Tensor) -> None:
        """[heads, n, t], [kv_heads, t, head_dim] -> [n, heads * head_dim]."""
        heads, rows, columns = probabilities.shape
        kv_heads, _, head_dim = values.shape
        weighted = torch.bmm(probabilities.view(kv_heads, -1, columns), values)
        by_token = weighted.view(kv_heads, heads // kv_heads, rows, head_dim).permute(2, 0, 1, 3)
        out.view(by_token.shape).copy_(by_token)

    def _apply(self, call: Call, work: Work, x: torch.Tensor, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        weight = self._weights[f"{name}.weight"].t()
        bias = self._weights.get(f"{name}.bias")
        if bias is None:
            return self._into_reply(call, work, shape, lambda out: torch.mm(x, weight, out=out))
        return self._into_reply(call, work, shape, lambda out: torch.addmm(bias, x, weight, out=out))

    # ---- memory and checks ----

    def _reply_shapes(self, expected: Expected) -> list[tuple[int, ...]]:
        """The shapes of a reply's tensors. Raises LimitError if it would be too large: some operations give far more
        than they take."""
        nbytes = sum(math.prod(shape) for _, shape in expected) * self._torch_dtype.itemsize
        if nbytes > self._max_reply_nbytes:
            raise LimitError(f"a reply of {nbytes} bytes, expected at most {self._max_reply_nbytes}")
        return [shape for _, shape in expected]

    def _into_reply(
        self, call: Call, work: Work, shape: Sequence[int], compute: Callable[[torch.Tensor], Any]
    ) -> torch.Tensor:
        """The reply's memory, with what `compute(out)` writes by the time the work is over."""
        reply: torch.Tensor = call.empty(shape, self.dtype)
        work.give(reply, compute)
        return reply

    def _check(self, name: str, tensor: torch.Tensor, shape: tuple[int | None, ...]) -> None:
        fits = tensor.dim() == len(shape) and all(want in (None, have) for want, have in zip(shape, tensor.shape))
        if tensor.dtype != self._torch_dtype or not fits:
            wanted = ", ".join("n" if dim is None else str(dim) for dim in shape)
            came = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            raise TensorError(f"{name}: {came}, expected {self.dtype} [{wanted}]")


def _take(call: Call, count: int) -> tuple[torch.Tensor, ...]:
    if len(call.tensors) != count:
        raise ValueError(f"{len(call.tensors)} tensors, expected {count}")
    return call.tensors

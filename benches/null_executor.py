"""An executor that computes nothing: replies of the right shapes at once, so that what is measured is the link.

    python -m benches.null_executor --model random:tinyllama-1.1b

What for. With a real executor on the CPU a prefill is mostly arithmetic, and what a link costs drowns in it. Here the
TEE side does all of its own work, requests and replies are as large as the real ones, and nothing else takes time.
The logits mean nothing.

How it replies. The shapes follow from a request and the configuration, as fastsplit/ops.py has them; sessions and
lanes are kept, as far as shapes depend on them. The numbers are normally distributed, of scale 1: nothing that
compresses or casts better than a model's own. They are made once for each dtype, and each reply is the next piece of
them: there is no work for a reply but to send it, and two replies after another are not the same bytes. Nothing
changes that memory, since a socket gives the receiver a copy. So this is for sockets: where memory is shared, each
reply is copied into it first, which a real executor's is not. No weights are made but what the TEE side gets.

It serves what benches.rivals.executor does: fastsplit over tcp and a unix socket, and the rivals. It says what the
addresses are in one line `READY {"fastsplit-tcp": "tcp://...", ...}` on stdout, and ends when its stdin does.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from math import prod
from pathlib import Path
from typing import Any

import torch

from fastsplit import Server
from fastsplit.executor.device import Cpu
from fastsplit.models import DTYPES, Model, open_model
from fastsplit.split.ops import Block, packed_elements, parse_blocks
from fastsplit.wire.call import Call, Handler

from .counts import MODELS, counted_model
from .rivals.executor import RIVALS
from .rivals.service import RivalService

__all__ = ["NullExecutor", "NullRivalService", "main", "null_model"]

_POOL_ELEMENTS = 3 * 2**24
"""More than the largest reply of a prefill of 1024 tokens with 32 heads: the original's square of scores, 2**25."""

_ALIGNED = 1024  # elements: where a piece begins


class _Numbers:
    """Normally distributed numbers of one dtype, handed out piece by piece, round and round."""

    def __init__(self, dtype: torch.dtype, elements: int) -> None:
        self._dtype = dtype
        self._next = 0
        self._numbers = self._made(elements)

    def take(self, shape: Sequence[int]) -> torch.Tensor:
        """A view: not to be changed."""
        size = prod(shape)
        if size > len(self._numbers):
            self._numbers = self._made(size)  # takes a while, once
        if self._next + size > len(self._numbers):
            self._next = 0
        piece = self._numbers[self._next : self._next + size].view(tuple(shape))
        self._next += -(-size // _ALIGNED) * _ALIGNED
        return piece

    def _made(self, elements: int) -> torch.Tensor:
        return torch.randn(elements, generator=torch.Generator().manual_seed(0)).to(self._dtype)


@dataclass
class _Session:
    batch: int
    dtype: torch.dtype
    lanes: dict[int, list[Block]] = field(default_factory=dict)
    """The blocks of the scores that are with the caller."""


class NullExecutor:
    """Behaves like a `fastsplit.executor.service.Executor` as far as a TEE side and a `RivalService` can tell."""

    on_segment = None

    def __init__(
        self, model: Model, *, dtype: str = "float32", elements: int = _POOL_ELEMENTS, threads: int = 0
    ) -> None:
        """`elements`: how many numbers to make beforehand. `threads`: of the TEE side's cores that it says it uses; 0
        is what a GPU would say."""
        self.name = model.name
        self.config = model.config
        self.device = Cpu()
        self.dtype = dtype
        self._threads = threads
        self._elements = elements
        self._tee_weights = list(model.tee_weights().values())
        self._sessions: dict[int, _Session] = {}
        self._numbers: dict[torch.dtype, _Numbers] = {}
        self._opened = count(1)
        self.numbers(getattr(torch, dtype))
        self.handlers: dict[str, Handler] = {
            "describe": self._describe,
            "tee_weights": lambda call: self._tee_weights,
            "open": self._open,
            "truncate": self._truncate,
            "reorder": self._reorder,
            "close": self._close,
            "embedding": lambda call: self._replies(call, self._hidden(call)),
            "linear": self._linear,
            "qkv": lambda call: self._replies(call, self._qk(call)),
            "scores": self._scores,
            "values": self._values,
            "values_o": self._values_o,
            "lm_head": lambda call: self._like(call.tensors[0], self._logits(call)),
            "embedding_qkv": lambda call: self._replies(call, self._hidden(call), self._qk(call)),
            "embedding_scores": lambda call: self._residual_and_scores(call, 3),
            "values_gate_up": self._values_gate_up,
            "down_qkv": lambda call: self._replies(call, self._hidden(call), self._qk(call)),
            "down_scores": lambda call: self._residual_and_scores(call, 1),
            "down_lm_head": lambda call: self._replies(call, self._hidden(call), self._logits(call)),
        }

    def numbers(self, dtype: torch.dtype) -> _Numbers:
        """Those of a dtype, made if they are the first of it."""
        found = self._numbers.get(dtype)
        if found is None:
            found = self._numbers[dtype] = _Numbers(dtype, self._elements)
        return found

    # ---- set-up ----

    def _describe(self, call: Call) -> None:
        call.reply_attrs.update(config=self.config.to_json(), dtype=self.dtype, name=self.name, threads=self._threads)

    def _open(self, call: Call) -> None:
        attrs: Any = call.attrs
        dtype = getattr(torch, attrs["dtype"])
        self.numbers(dtype)
        number = next(self._opened)
        self._sessions[number] = _Session(attrs["batch"], dtype)
        call.reply_attrs["session"] = number

    def _truncate(self, call: Call) -> None:
        self._session(call)

    def _reorder(self, call: Call) -> None:
        self._session(call).batch = len(call.tensors[0])

    def _close(self, call: Call) -> None:
        attrs: Any = call.attrs
        del self._sessions[attrs["session"]]

    # ---- operations ----

    def _linear(self, call: Call) -> list[torch.Tensor]:
        attrs: Any = call.attrs
        (x,) = call.tensors
        return [self._like(x, (*x.shape[:2], self.config.out_features(name))) for name in attrs["names"]]

    def _scores(self, call: Call) -> list[torch.Tensor]:
        # qk, or q and k, or k; then what is no tensor of heads: scales, keep
        heads = [tensor for tensor in call.tensors if tensor.dim() == 4]
        together = heads[0].shape[2] == self.config.num_attention_heads + self.config.num_key_value_heads
        queries = heads[0].shape[1] if together or len(heads) == 2 else 0
        return self._products(call, queries, heads[-1].shape[1])

    def _values(self, call: Call) -> list[torch.Tensor]:
        if len(call.tensors) == 1:
            return []
        width = self.config.num_attention_heads * self.config.head_dim
        return self._replies(call, (self._session(call).batch, self._rows_after(call), width))

    def _values_o(self, call: Call) -> list[torch.Tensor]:
        shape = (self._session(call).batch, self._rows_after(call), self.config.hidden_size)
        return self._replies(call, shape)

    def _values_gate_up(self, call: Call) -> list[torch.Tensor]:
        if not call.tensors or call.tensors[0].dim() == 2:  # the scale of a stretch that goes no further
            return []
        batch, rows = self._session(call).batch, self._rows_after(call)
        gate_up = (2, batch, rows, self.config.intermediate_size)
        return self._replies(call, (batch, rows, self.config.hidden_size), gate_up)

    def _residual_and_scores(self, call: Call, inputs: int) -> list[torch.Tensor]:
        """`inputs`: tensors before `keep`, if that comes."""
        rows = call.tensors[0].shape[1]
        kept = len(call.tensors) > inputs
        return self._replies(call, self._hidden(call)) + self._products(call, 1 if kept else rows, rows)

    # ---- shapes ----

    def _hidden(self, call: Call) -> tuple[int, ...]:
        return (*call.tensors[0].shape[:2], self.config.hidden_size)

    def _logits(self, call: Call) -> tuple[int, ...]:
        return (*call.tensors[0].shape[:2], self.config.vocab_size)

    def _qk(self, call: Call) -> tuple[int, ...]:
        heads = self.config.num_attention_heads + self.config.num_key_value_heads
        return (*call.tensors[0].shape[:2], heads, self.config.head_dim)

    def _products(self, call: Call, queries: int, rows: int) -> list[torch.Tensor]:
        """Packed scores of `queries` rows, the last of those up to which `rows` new ones go."""
        attrs: Any = call.attrs
        session = self._session(call)
        blocks = parse_blocks(attrs, queries, attrs["start"] + rows) if "blocks" in attrs or "last" in attrs else []
        session.lanes[attrs["lane"]] = blocks
        if not blocks:
            return []
        return self._replies(call, (packed_elements(session.batch, self.config.num_attention_heads, blocks),))

    def _rows_after(self, call: Call) -> int:
        attrs: Any = call.attrs
        last = self._session(call).lanes.pop(attrs["lane"])[-1]
        return last.start + last.rows

    # ---- replies ----

    def _session(self, call: Call) -> _Session:
        attrs: Any = call.attrs
        return self._sessions[attrs["session"]]

    def _replies(self, call: Call, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
        numbers = self.numbers(self._session(call).dtype)
        return [numbers.take(shape) for shape in shapes]

    def _like(self, x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        return self.numbers(x.dtype).take(shape)


class NullRivalService(RivalService):
    """A rival's GPU side without arithmetic."""

    def _compute(self, op: str, attrs: dict[str, Any], tensors: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        if op not in ("scores", "values"):
            return super()._compute(op, attrs, tensors)
        executor: Any = self._executor
        left, right = tensors
        if op == "scores":  # [n, heads, head_dim], [t, heads, head_dim] -> [heads, n, t]
            shape = (left.shape[1], left.shape[0], right.shape[0])
        else:  # [heads, n, t], [t, heads, head_dim] -> [n, heads * head_dim]
            shape = (left.shape[1], left.shape[0] * right.shape[2])
        return [executor.numbers(left.dtype).take(shape)]


def null_model(name: str) -> Model:
    """A model by a name as everywhere; or by a shape's that benches.counts has, with norms of one."""
    return counted_model(name, MODELS[name]) if name in MODELS else open_model(name)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benches.null_executor", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--model", default="random:tiny", help=f"a HF directory, random:PRESET[@SEED], or {', '.join(MODELS)}"
    )
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--threads", type=int, default=0, help="torch's threads; 0: one for each core")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    with ExitStack() as stack:
        executor: Any = NullExecutor(null_model(args.model), dtype=args.dtype)
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastsplit-bench-")))
        addresses = {}
        for system, uri in (("fastsplit-unix", f"unix://{directory}/gpu.sock"), ("fastsplit-tcp", "tcp://127.0.0.1:0")):
            addresses[system] = stack.enter_context(Server(uri, executor.handlers)).uri
        for system, way in RIVALS.items():
            address = "tcp://127.0.0.1:*" if system.endswith("tcp") else f"ipc://{directory}/{system}.sock"
            addresses[system] = stack.enter_context(NullRivalService(address, way, executor)).address
        print("READY", json.dumps(addresses), flush=True)
        sys.stdin.read()
    return 0


if __name__ == "__main__":
    sys.exit(main())

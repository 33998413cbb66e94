"""The rivals' TEE side: one zmq REQ socket, one call at a time, the KV cache in here.

fastsplit keeps keys and values in the executor's KV caches; a rival keeps them here, and sends them whole, their heads
repeated. `rival_runner` makes the Runner so that a prompt is one chunk and its scores one block: the whole square.

Rules. Counted and timed as fastsplit's channel does it: `serialization_s` is this side's work on messages, repeating
the kv heads included; `wait_s` is sending and waiting, `remote_s` what the executor says that it computed. Filling the
KV cache is the TEE's own work. What comes is not compared with `expect`: the original trusted its executor.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter_ns
from typing import Any, NoReturn

import torch
import zmq

from fastsplit.errors import DeadlineError, RemoteOpError
from fastsplit.models import ModelConfig
from fastsplit.split.plan import Plan
from fastsplit.tee.remote import RemoteModel
from fastsplit.tee.report import Recorder
from fastsplit.tee.runner import Runner
from fastsplit.wire.stats import Stats

from .messages import MESSAGES

__all__ = ["Reply", "RivalBackend", "rival_runner"]

_WHOLE = 2**30
"""More rows than there are: one block."""


class Reply(list[torch.Tensor]):
    """A reply's tensors, and its attributes."""

    def __init__(self, tensors: Sequence[torch.Tensor] = (), **attrs: Any) -> None:
        super().__init__(tensors)
        self.attrs = attrs


class _KVCache:
    """Keys and values of one sequence, token-major: for each layer [capacity, kv_heads, head_dim]."""

    def __init__(self, config: ModelConfig, capacity: int, dtype: torch.dtype) -> None:
        shape = (max(capacity, 1), config.num_key_value_heads, config.head_dim)
        self.keys = [torch.empty(shape, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.values = [torch.empty(shape, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.block = (0, 0, 0)
        """Rows of the last scores, and from where to where their columns went: all, but where a sliding window leaves
        the first out."""

    def put(self, layers: list[torch.Tensor], layer: int, start: int, rows: torch.Tensor) -> torch.Tensor:
        """Puts [n, kv_heads, head_dim] at positions `start` and on. Returns all up to there, a view."""
        end, memory = start + len(rows), layers[layer]
        if end > len(memory):
            grown = memory.new_empty((max(end, 2 * len(memory)), *memory.shape[1:]))
            grown[:start] = memory[:start]
            memory = layers[layer] = grown
        memory[start:end] = rows
        return memory[:end]


class RivalBackend:
    """A `fastsplit.tee.remote.Backend` that talks to a `RivalService`. `way`: "original" or "tuned".

    `recorder`: the Runner's, for the time that the KV cache takes; without one it counts as communication.
    """

    def __init__(self, address: str, way: str, config: ModelConfig, timeout_s: float = 600.0) -> None:
        self.stats = Stats()
        self.recorder: Recorder | None = None
        self._address = address
        self._timeout_s = timeout_s
        self._config = config
        self._heads_per_kv_head = config.num_attention_heads // config.num_key_value_heads
        self._caches: dict[int, _KVCache] = {}
        self._opened = 0
        self._messages = MESSAGES[way]()
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.REQ)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDTIMEO, int(timeout_s * 1000))
        self._socket.setsockopt(zmq.RCVTIMEO, int(timeout_s * 1000))
        self._socket.connect(address)

    def close(self) -> None:
        self._socket.close()
        self._context.term()

    def __enter__(self) -> RivalBackend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- Backend ----

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype)

    def submit(self, op: str, /, *tensors: torch.Tensor, expect: Any = None, **attrs: Any) -> NoReturn:
        raise NotImplementedError(f"{op}: a REQ socket has one call at a time")

    def call(self, op: str, /, *tensors: torch.Tensor, expect: Any = None, **attrs: Any) -> Reply:
        """The operations that the original's plans have, for one sequence."""
        if op == "run":
            steps = attrs.pop("steps")
            if steps.startswith("store_"):
                return (self._scores if steps.startswith("store_k") else self._values)(*tensors, **attrs)
            (x,) = tensors
            return Reply([result.unsqueeze(0) for result in self._call(steps, [x[0]], layer=attrs["layer"])])
        if op == "open":
            return self._open(**attrs)
        if op == "close":
            del self._caches[attrs["session"]]
        elif op != "truncate":  # forgetting takes nothing: the caller's `start` says what counts
            raise NotImplementedError(f"{op}: not among what the original had")
        return Reply()

    def _open(self, *, batch: int, capacity: int, dtype: str) -> Reply:
        if batch != 1:
            raise NotImplementedError(f"batch: {batch}, the original had one sequence")
        self._opened += 1
        self._caches[self._opened] = _KVCache(self._config, capacity, getattr(torch, dtype))
        return Reply(session=self._opened)

    def _scores(self, *tensors: torch.Tensor, first: int = 0, last: int = 0, **at: int) -> Reply:
        """q [1, r, heads, head_dim] and k, or k alone -> all scores, nothing behind them: one block, the whole
        square."""
        cache = self._caches[at["session"]]
        keys = self._kept(cache, cache.keys, at, tensors[-1])
        if len(tensors) == 1:
            return Reply()
        cache.block = tensors[0].shape[1], first, last
        (scores,) = self._call("scores", [tensors[0][0], self._repeat_kv(keys[first:last])])
        return Reply([scores.view(-1)])

    def _values(self, *tensors: torch.Tensor, **at: int) -> Reply:
        """packed and v, or v alone -> [1, r, heads * head_dim]."""
        cache = self._caches[at["session"]]
        values = self._kept(cache, cache.values, at, tensors[-1])
        if len(tensors) == 1:
            return Reply()
        rows, first, last = cache.block
        weights = tensors[0].view(self._config.num_attention_heads, rows, last - first)
        repeated = self._repeat_kv(values[first:last])
        return Reply([result.unsqueeze(0) for result in self._call("values", [weights, repeated])])

    # ---- the call ----

    def _kept(
        self, cache: _KVCache, layers: list[torch.Tensor], at: dict[str, int], rows: torch.Tensor
    ) -> torch.Tensor:
        kept = cache.put(layers, at["layer"], at["start"], rows[0])
        if self.recorder is not None:
            self.recorder.lap("kv_cache")
        return kept

    def _repeat_kv(self, heads: torch.Tensor) -> torch.Tensor:
        """[t, kv_heads, head_dim] -> [t, heads, head_dim]: each kv head as often as query heads share it."""
        started_ns = perf_counter_ns()
        repeated = heads.repeat_interleave(self._heads_per_kv_head, dim=1)
        self.stats.bytes_copied += repeated.nbytes
        self.stats.serialization_s += (perf_counter_ns() - started_ns) * 1e-9
        return repeated

    def _call(self, op: str, tensors: Sequence[torch.Tensor], **attrs: Any) -> list[torch.Tensor]:
        stats, messages, socket = self.stats, self._messages, self._socket
        copied_nbytes = messages.copied_nbytes
        started_ns = perf_counter_ns()
        frames = messages.encode({"op": op, "attrs": attrs}, tensors)
        stats.bytes_sent += sum(memoryview(frame).nbytes for frame in frames)
        encoded_ns = perf_counter_ns()
        try:
            socket.send_multipart(frames, copy=messages.zmq_copies)
            del frames
            replies = socket.recv_multipart(0, messages.zmq_copies)
        except zmq.Again:
            raise DeadlineError(f"{op}: no reply from {self._address} within {self._timeout_s} s") from None
        received_ns = perf_counter_ns()
        stats.bytes_received += sum(len(reply) for reply in replies)
        head, results = messages.decode(replies)
        stats.calls += 1
        stats.bytes_copied += messages.copied_nbytes - copied_nbytes
        stats.wait_s += (received_ns - encoded_ns) * 1e-9
        stats.serialization_s += (encoded_ns - started_ns + perf_counter_ns() - received_ns) * 1e-9
        if "error" in head:
            raise RemoteOpError(op, head["error"])
        stats.remote_s += head["compute_s"]
        return results


_BATCHED = Plan(
    "batched",
    "[embed] | norm [q k v] rope [store_k scores] softmax [store_v values] [o] add norm [gate up] act [down] add"
    " | norm [lm_head]",
)
"""As the original had it: each result is a tensor of its own."""


def rival_runner(model: RemoteModel, backend: RivalBackend, plan: str = "batched") -> Runner:
    """The Runner as the original was: plan "batched", before that "per-op"; a prompt in one chunk, all scores."""
    form = _BATCHED if plan == "batched" else plan
    return Runner(model, backend, form, lanes=1, block_rows=_WHOLE, scores_nbytes=2**62)

"""The rivals' TEE side: one zmq REQ socket, one call at a time.

Rules. Counted and timed as fastsplit's channel does it: `serialization_s` is what this side spends on making messages
of tensors and tensors of messages, repeating the kv heads included; `wait_s` is sending and waiting, `remote_s` what
the executor says that it computed. The executor's own (de)serialization is neither, so the report has it under
communication, for all systems.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter_ns
from typing import Any

import torch
import zmq

from fastsplit.errors import DeadlineError, RemoteOpError
from fastsplit.models import ModelConfig
from fastsplit.ops import RowBlock
from fastsplit.wire.stats import Stats

from .messages import MESSAGES

__all__ = ["RivalBackend"]


class RivalBackend:
    """A `fastsplit.runner.Backend` that talks to a `RivalService`. `way`: "original" or "tuned"."""

    def __init__(self, address: str, way: str, config: ModelConfig, timeout_s: float = 600.0) -> None:
        self.stats = Stats()
        self._address = address
        self._timeout_s = timeout_s
        self._heads_per_kv_head = config.num_attention_heads // config.num_key_value_heads
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

    def embedding(self, ids: torch.Tensor) -> torch.Tensor:
        return self._call("embedding", [ids])[0]

    def linear(self, layer: int, names: tuple[str, ...], x: torch.Tensor) -> Sequence[torch.Tensor]:
        return self._call("linear", [x], layer=layer, names=list(names))

    def scores(self, q: torch.Tensor, k: torch.Tensor, blocks: list[RowBlock]) -> Sequence[torch.Tensor]:
        return self._call("scores", [q, self._repeat_kv(k)])  # one block: the whole square

    def values(self, blocks: Sequence[torch.Tensor], v: torch.Tensor) -> torch.Tensor:
        return self._call("values", [*blocks, self._repeat_kv(v)])[0]

    def lm_head(self, x: torch.Tensor) -> torch.Tensor:
        return self._call("lm_head", [x])[0]

    # ---- the call ----

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

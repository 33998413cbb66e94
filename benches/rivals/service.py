"""The rivals' GPU side: a zmq REP socket in a thread, computing with an Executor's own weights.

Rules. Embedding, linear operations and lm_head are the Executor's own steps, so the arithmetic is the same; what is
added here is their batch dimension and a KV cache that they ask for. Scores and values are computed here,
since the rivals send all heads and the whole square. One request at a time, as REP has it. A reply says how long its
computation took; a failed one says why.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from time import perf_counter_ns
from typing import Any

import torch
import zmq

from fastsplit.executor.service import Executor
from fastsplit.wire.call import Client

from .messages import MESSAGES

__all__ = ["RivalService"]

_POLL_MS = 100  # how often a service that waits looks whether it is to end


class _Call:
    """What an Executor's handler needs of a `fastsplit.Call`."""

    def __init__(self, client: Client, tensors: Sequence[torch.Tensor], attrs: dict[str, Any]) -> None:
        self.client = client
        self.tensors = tuple(tensors)
        self.attrs = attrs
        self.reply_attrs: dict[str, Any] = {}

    def empty(self, shape: Sequence[int], dtype: str) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=getattr(torch, dtype))


class RivalService:
    """Serves on a zmq `address` ("tcp://127.0.0.1:*", "ipc:///path") until closed. `way`: "original" or "tuned"."""

    def __init__(self, address: str, way: str, executor: Executor) -> None:
        self._executor = executor
        self._client = Client()
        opening: Any = _Call(self._client, (), {"batch": 1, "capacity": 0, "dtype": executor.dtype})
        executor.handlers["open"](opening)
        self._session: int = opening.reply_attrs["session"]
        self._messages = MESSAGES[way]()
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVTIMEO, _POLL_MS)
        self._socket.bind(address)
        endpoint: Any = self._socket.getsockopt(zmq.LAST_ENDPOINT)
        self.address: str = endpoint.decode()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, name=f"rival {way} {self.address}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        self._socket.close()
        self._context.term()
        closing: Any = _Call(self._client, (), {"session": self._session})
        self._executor.handlers["close"](closing)

    def __enter__(self) -> RivalService:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self) -> None:
        messages, socket = self._messages, self._socket
        while not self._closing.is_set():
            try:
                frames = socket.recv_multipart(0, messages.zmq_copies)
            except zmq.Again:
                continue
            socket.send_multipart(self._answer(frames), copy=messages.zmq_copies)

    def _answer(self, frames: list[Any]) -> list[Any]:
        try:
            head, tensors = self._messages.decode(frames)
            started_ns = perf_counter_ns()
            results = self._compute(head["op"], head["attrs"], tensors)
            compute_s = (perf_counter_ns() - started_ns) * 1e-9
        except Exception as error:  # noqa: BLE001 - whatever it was, the caller waits for an answer
            return self._messages.encode({"error": f"{type(error).__name__}: {error}"}, [])
        return self._messages.encode({"compute_s": compute_s}, results)

    def _compute(self, op: str, attrs: dict[str, Any], tensors: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        if op in ("scores", "values"):
            left, right = (tensor.to(self._executor.device.torch_device) for tensor in tensors)
            product = _values(left, right) if op == "values" else _scores(left, right, self._executor.config.scale)
            return [product.cpu()]
        (x,) = tensors
        if len(x) == 1 and op in _TOGETHER:  # one product for all
            return _TOGETHER[op](*self._run(_JOINED[op], attrs, x), self._executor.config.num_attention_heads)
        return [result.squeeze(0) for step in op.split() for result in self._run(step, attrs, x)]

    def _run(self, steps: str, attrs: dict[str, Any], x: torch.Tensor) -> list[torch.Tensor]:
        at = {"session": self._session, "lane": 0, "start": 0, "steps": steps}
        call: Any = _Call(self._client, [x.unsqueeze(0)], {**at, **attrs})
        results: list[torch.Tensor] = self._executor.handlers["run"](call)
        return results


_JOINED = {"q k v": "qkv", "gate up": "gate_up"}
_TOGETHER: dict[str, Any] = {
    "q k v": lambda qk, v, heads: [qk[0, :, :heads], qk[0, :, heads:], v[0]],
    "gate up": lambda gate_up, heads: [gate_up[0, 0], gate_up[1, 0]],
}
"""Steps in one call of the original's -> how the Executor's joined results of one row fall apart; views."""


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """[n, heads, head_dim], [t, heads, head_dim] -> [heads, n, t], what the mask will hide included. The scale is the
    product's own factor, and costs nothing."""
    left, right = q.transpose(0, 1), k.permute(1, 2, 0)
    nothing = left.new_empty(1).expand(len(left), left.shape[1], right.shape[2])  # not read with beta=0
    return torch.baddbmm(nothing, left, right, beta=0, alpha=scale)


def _values(probabilities: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[heads, n, t], [t, heads, head_dim] -> [n, heads * head_dim]."""
    return torch.bmm(probabilities, v.transpose(0, 1)).transpose(0, 1).reshape(probabilities.shape[1], -1)

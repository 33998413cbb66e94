"""What a TEE side has at an executor: its model, checked, and KV caches.

Rules. Everything that is said about the model comes from an untrusted peer: it is validated, compared with the trusted
copy if there is one, and from then on only the copy is used. What is compared is private memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

from ..errors import ClosedError, ModelError, PeerLostError, RemoteProtocolError, SettingError, VerificationError
from ..extras import torch
from ..models import DTYPES, Model, ModelConfig
from ..split.ops import Shapes
from ..wire.blocking.channel import Channel
from ..wire.stats import Stats
from ..wire.transport.spin import spin_us_beside

__all__ = ["Backend", "Cache", "RemoteModel", "share_cores"]


class Backend(Protocol):
    """Who computes for a Runner: a `Channel`, or what behaves like one. ops.py says what operations there are."""

    @property
    def stats(self) -> Stats: ...

    def empty(self, shape: Sequence[int], dtype: Any) -> Any:
        """Memory of undefined content from which tensors are sent fastest, views of it included; the caller's own."""

    def call(self, op: str, /, *tensors: torch.Tensor, expect: Any = None, **attrs: Any) -> Any: ...

    def submit(self, op: str, /, *tensors: torch.Tensor, expect: Any = None, **attrs: Any) -> Any: ...


@dataclass(frozen=True)
class RemoteModel:
    """What a TEE side needs to know of the executor's model. `weights`: `ModelConfig.tee_weight_shapes`, fp32."""

    name: str
    config: ModelConfig
    dtype: str
    weights: dict[str, torch.Tensor]
    threads: int = 1
    """How many of its machine's cores the executor computes with; 0 where it has a device, and it pays to overlap."""

    @classmethod
    def fetch(cls, backend: Backend, trusted: Model | None) -> RemoteModel:
        """Asks the executor, and checks it against the trusted copy if there is one; then all that is used is the
        copy's.

        Raises VerificationError where the two differ, RemoteProtocolError for an answer that makes no sense.
        """
        described = backend.call("describe", expect=()).attrs
        try:
            config = ModelConfig.from_json(described.get("config"))
        except ModelError as error:
            raise RemoteProtocolError(f"describe, {error}") from None
        dtype = described.get("dtype")
        if dtype not in DTYPES:
            raise RemoteProtocolError(f"describe, dtype: {dtype!r}, expected one of {', '.join(DTYPES)}")
        if trusted is not None:
            _compare(trusted.config, config)
            config = trusted.config
        replies = backend.call("tee_weights", expect=Shapes(config, dtype).tee_weights())
        # The peer may change what is in shared memory between a comparison and its use.
        weights = {name: reply.clone() for name, reply in zip(config.tee_weight_shapes(), replies)}
        if trusted is not None:
            for name, own in trusted.tee_weights().items():
                # by their bits: a NaN of the checkpoint's is one on both sides
                different = own.view(torch.int32) != weights[name].view(torch.int32)
                if bool(different.any()):
                    rows = different.any(dim=1).sum()
                    what = {"norms": "norm weights"}.get(name, name)
                    raise VerificationError(f"{what}: {int(rows)} of {len(own)} differ from the trusted copy")
                weights[name] = own
        name = str(described.get("name")) if trusted is None else trusted.name
        threads = described.get("threads")
        if type(threads) is not int or threads < 0:
            raise RemoteProtocolError(f"describe, threads: {threads!r:.30}, expected an int of 0 or more")
        return cls(name, config, dtype, weights, threads)


def share_cores(channel: Channel, model: RemoteModel) -> None:
    """Has callers sleep at once where the executor computes on this machine's cores, with all of them."""
    spin_us = spin_us_beside(model.threads) if channel.shm else None
    if spin_us is not None:
        channel.spin_us = spin_us


def _compare(own: ModelConfig, theirs: ModelConfig) -> None:
    differences = [
        f"{name}: {getattr(theirs, name)!r}, expected {getattr(own, name)!r}"
        for name in own.__dataclass_fields__
        if getattr(theirs, name) != getattr(own, name) and name != "eos_token_ids"
    ]
    if differences:
        raise VerificationError(f"the executor's model is not the trusted one: {'; '.join(differences)}")


class Cache:
    """Keys and values of `batch` sequences, in a session on the executor; here is only how far it is filled.

    Made by `Runner.new_cache`. Close it, or use it in a `with`; what is still open goes with the connection.
    """

    def __init__(self, backend: Backend, batch: int, capacity: int, dtype: str) -> None:
        self.batch = batch
        self.length = 0
        """Positions that are filled; with padding, padding included."""
        self.mask: torch.Tensor | None = None
        """[batch, length] bool, which of them hold a token; None if all do."""
        self.closed = False
        self._backend = backend
        number = backend.call("open", expect=(), batch=batch, capacity=capacity, dtype=dtype).attrs.get("session")
        if type(number) is not int:
            raise RemoteProtocolError(f"open, session: {number!r:.30}, expected an int")
        self.number = number

    def truncate(self, length: int, *, wait: bool = True) -> None:
        """Forgets what is behind `length` positions. Raises SettingError if there are fewer. `wait`: for the executor's
        answer; a later operation comes after it all the same."""
        if not 0 <= length <= self.length:
            raise SettingError(f"length: {length}, expected 0 to {self.length}")
        self._tell("truncate", wait, length=length)
        self.length = length
        if self.mask is not None:
            self.mask = self.mask[:, :length]

    def reorder(self, indices: torch.Tensor) -> None:
        """Sequence i becomes the old sequence indices[i]. [batch'] int64; `batch'` may be more or less than `batch`."""
        if indices.dtype != torch.int64 or indices.dim() != 1 or not len(indices):
            raise SettingError(f"indices: {indices.dtype} {list(indices.shape)}, expected int64 [1 or more]")
        self._backend.call("reorder", indices, expect=(), session=self.number)
        self.batch = len(indices)
        if self.mask is not None:
            self.mask = self.mask[indices]

    def close(self, *, wait: bool = True) -> None:
        """Gives the executor's memory back. Idempotent; does nothing where the connection has ended. `wait`: for the
        executor's answer. After an error do not: it may be stalled, and would cost a second deadline."""
        if not self.closed:
            self.closed = True
            with contextlib.suppress(ClosedError, PeerLostError):  # with the connection the session has gone, too
                self._tell("close", wait)

    def _tell(self, op: str, wait: bool, **attrs: int) -> None:
        (self._backend.call if wait else self._backend.submit)(op, expect=(), session=self.number, **attrs)

    def __enter__(self) -> Cache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(wait=kind is None or kind is GeneratorExit)

"""The executor's model as the TEE side knows it, checked, and the TEE side's handles of KV caches on the executor.

Rules. The description of the model comes from an untrusted peer: it is validated, and compared with the trusted copy if
there is one; afterwards only the copy is used. Comparisons read private memory, which the peer cannot change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

from ..errors import (
    ClosedError,
    LimitError,
    ModelError,
    PeerLostError,
    RemoteProtocolError,
    SettingError,
    VerificationError,
)
from ..extras import torch
from ..models import DTYPES, Model, ModelConfig
from ..models.checkpoint import EMBEDDING
from ..split.contract import CONTRACT, tee_weights_expected
from ..split.kv_cache import HostMemory, KVStore
from ..wire.stats import Stats

__all__ = ["Backend", "Cache", "RemoteModel"]


class Backend(Protocol):
    """The executor of a Runner: a `Channel`, or an object like one. split/contract.py has the operations."""

    @property
    def stats(self) -> Stats: ...

    def empty(self, shape: Sequence[int], dtype: Any) -> Any:
        """Memory of undefined content that the caller owns. Tensors in it, views included, are sent fastest."""

    def call(self, op: str, /, *tensors: torch.Tensor, expect: Any = None, **attrs: Any) -> Any: ...

    def submit(self, op: str, /, *tensors: torch.Tensor, expect: Any = None, **attrs: Any) -> Any: ...


@dataclass(frozen=True)
class RemoteModel:
    """The part of the executor's model that the TEE side needs. `weights`: `ModelConfig.tee_weight_shapes`, fp32."""

    name: str
    config: ModelConfig
    dtype: str
    weights: dict[str, torch.Tensor]
    threads: int = 1
    """Cores of its machine that the executor computes with; 0 on a device of its own, where overlapping pays."""
    trusted: Model | None = None
    """The trusted copy, where there is one."""

    def embedding(self) -> torch.Tensor:
        """The embedding's weights [vocab, hidden] from the trusted copy, rounded to the executor's dtype; new memory.

        Raises ModelError if they cannot be read.
        """
        assert self.trusted is not None
        return self.trusted.load(EMBEDDING).to(getattr(torch, self.dtype))

    @classmethod
    def fetch(cls, backend: Backend, trusted: Model | None) -> RemoteModel:
        """Fetches the executor's model. With a trusted copy, compares the two and returns the copy's values.

        Raises VerificationError where the two differ, RemoteProtocolError for a malformed answer.
        """
        described = backend.call("describe", expect=()).attrs
        contract = described.get("contract")
        if contract != CONTRACT:
            raise RemoteProtocolError(
                f"describe, contract: {contract!r:.30}, expected {CONTRACT}: the executor is of another version"
            )
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
        replies = backend.call("tee_weights", expect=tee_weights_expected(config))
        # Private copies: the peer can change shared memory between a comparison and a use.
        weights = {name: reply.clone() for name, reply in zip(config.tee_weight_shapes(), replies)}
        if trusted is not None:
            for name, own in trusted.tee_weights().items():
                # bits, because a NaN in the checkpoint must equal itself
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
        return cls(name, config, dtype, weights, threads, trusted)


def _compare(own: ModelConfig, theirs: ModelConfig) -> None:
    differences = [
        f"{name}: {getattr(theirs, name)!r}, expected {getattr(own, name)!r}"
        for name in own.__dataclass_fields__
        if getattr(theirs, name) != getattr(own, name) and name != "eos_token_ids"
    ]
    if differences:
        raise VerificationError(f"the executor's model is not the trusted one: {'; '.join(differences)}")


class Cache:
    """A KV cache of `batch` sequences: on the executor, or in `store` where the plan computes attention in the TEE.

    Made by `Runner.new_cache`. Close it, or use it in a `with`; the end of the connection closes all caches.
    """

    def __init__(self, backend: Backend, batch: int, capacity: int, dtype: str, store: KVStore | None = None) -> None:
        self.batch = batch
        self.length = 0
        """Filled positions, padding included."""
        self.mask: torch.Tensor | None = None
        """[batch, length] bool, True for positions that hold a token; None if all do."""
        self.closed = False
        self.store = store
        self._backend = backend
        number = backend.call("open", expect=(), batch=batch, capacity=capacity, dtype=dtype).attrs.get("session")
        if type(number) is not int:
            raise RemoteProtocolError(f"open, session: {number!r:.30}, expected an int")
        self.number = number

    def truncate(self, length: int, *, wait: bool = True) -> None:
        """Cuts the cache back to `length` positions. Raises SettingError if it has fewer. `wait`: wait for the answer;
        later operations run after it in any case."""
        if not 0 <= length <= self.length:
            raise SettingError(f"length: {length}, expected 0 to {self.length}")
        if self.store is not None:
            self.store.truncate(length)  # the executor has nothing of it
        else:
            self._send("truncate", wait, length=length)
        self.length = length
        if self.mask is not None:
            self.mask = self.mask[:, :length]

    def reorder(self, indices: torch.Tensor) -> None:
        """Sequence i becomes the old sequence indices[i]. [batch'] int64; `batch'` may be more or less than `batch`.

        Raises SettingError for other indices, LimitError over `max_cache_nbytes`; after either nothing has changed.
        """
        if indices.dtype != torch.int64 or indices.dim() != 1 or not len(indices):
            raise SettingError(f"indices: {indices.dtype} {list(indices.shape)}, expected int64 [1 or more]")
        if self.store is not None and not 0 <= int(indices.min()) <= int(indices.max()) < self.batch:
            raise SettingError(f"indices: {int(indices.min())} to {int(indices.max())}, expected 0 to {self.batch - 1}")
        self._backend.call("reorder", indices, expect=(), session=self.number)
        if self.store is not None:
            try:
                self.store.reorder(HostMemory(), indices)
            except LimitError:  # nothing has changed here; the executor's cache is empty, but has a number of sequences
                self._backend.call(
                    "reorder", torch.zeros(self.batch, dtype=torch.int64, device="cpu"), expect=(), session=self.number
                )
                raise
        self.batch = len(indices)
        if self.mask is not None:
            self.mask = self.mask[indices]

    def close(self, *, wait: bool = True) -> None:
        """Releases the executor's memory. Idempotent; does nothing after the connection's end. `wait`: wait for the
        answer. Pass False after an error: a stalled executor would cost a second deadline."""
        if not self.closed:
            self.closed = True
            if self.store is not None:
                self.store.close()
            with contextlib.suppress(ClosedError, PeerLostError):  # the connection's end has closed the cache
                self._send("close", wait)

    def _send(self, op: str, wait: bool, **attrs: int) -> None:
        (self._backend.call if wait else self._backend.submit)(op, expect=(), session=self.number, **attrs)

    def __enter__(self) -> Cache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(wait=kind is None or kind is GeneratorExit)

"""Keys and values of the sequences that are under way: how they are stored, and what limits them.

The side that computes attention has them: the executor, or the TEE side under the plan tee-attention. For each layer
the keys are one tensor [B * kv_heads, capacity, head_dim], the values another, in order of position.

Rules. Memory comes as it is needed, twice as much each time, and is counted against a `Budget` before it is made; what
is refused changes nothing. Memory comes undefined, possibly with another client's keys in it: how far each layer is
filled is kept, positions are filled without gaps, and nothing beyond is ever read. A store needs a lock around it if
several threads use it; `close` needs none.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from .. import tensors
from ..errors import LimitError, SettingError
from ..extras import torch
from ..models import ModelConfig
from ..tensors.pool import pool

__all__ = ["Budget", "HostMemory", "KVStore", "Memory"]

_MIN_POSITIONS = 64
_ARRAYS = tensors.parse_arrays("torch")
_SMALL_NBYTES = 2**18
"""Smaller blocks come from the C library, which is faster; for larger ones fresh pages would cost more than what is
computed into them."""


class Memory(Protocol):
    """Where keys and values lie, and how something is computed there."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory of undefined content for `compute` functions to write to; the caller's own."""

    def run(self, compute: Callable[[], object]) -> None:
        """Runs `compute()`; its results stay where the memory is. All that is run is in order."""


class HostMemory:
    """The host's memory; large blocks come from the pool (tensors/pool.py)."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        if math.prod(shape) * dtype.itemsize < _SMALL_NBYTES:
            return torch.empty(tuple(shape), dtype=dtype, device="cpu")
        tensor: torch.Tensor = _ARRAYS.empty(shape, dtype, pool.allocate)
        return tensor

    def run(self, compute: Callable[[], object]) -> None:
        compute()


class Budget:
    """The bytes that all stores of one side may hold together. Thread-safe."""

    def __init__(self, max_nbytes: int) -> None:
        self.max_nbytes = max_nbytes
        self.nbytes = 0
        """Bytes of all stores now; a cache that is being moved counts twice."""
        self._lock = threading.Lock()

    def add(self, store: KVStore, nbytes: int) -> None:
        """Adds to what the store holds; does nothing for a closed one. Raises LimitError, and then nothing is added."""
        with self._lock:
            if store.closed:
                return
            if nbytes > 0 and self.nbytes + nbytes > self.max_nbytes:
                raise LimitError(
                    f"KV caches of {self.nbytes + nbytes} bytes in all, expected at most {self.max_nbytes}"
                )
            self.nbytes += nbytes
            store.nbytes += nbytes

    def close(self, store: KVStore) -> None:
        """Marks the store closed, which holds nothing from then on. Idempotent."""
        with self._lock:
            store.closed = True
            self.nbytes -= store.nbytes
            store.nbytes = 0


class KVStore:
    """Keys and values of `batch` sequences of one model."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, batch: int, capacity: int, budget: Budget) -> None:
        """`dtype`: of what is stored. `capacity`: positions that each layer gets room for with its first row."""
        layers = config.num_hidden_layers
        self.batch = batch
        self.keys_filled = [0] * layers
        """For each layer, how many positions have keys."""
        self.values_filled = [0] * layers
        self.nbytes = 0
        """Bytes of all layers. Changed by the budget alone."""
        self.closed = False
        """Set by the budget alone."""
        self._dtype = dtype
        self._capacity = max(capacity, 1)
        self._heads = config.num_key_value_heads
        self._head_dim = config.head_dim
        self._budget = budget
        self._keys: list[torch.Tensor | None] = [None] * layers
        self._values: list[torch.Tensor | None] = [None] * layers

    def store_keys(self, memory: Memory, layer: int, start: int, rows: torch.Tensor) -> None:
        """Puts [B, n, kv_heads, head_dim] at positions `start` and on; what was behind them is forgotten.

        Raises SettingError if that leaves a gap, LimitError if the budget has no room.
        """
        self._store(memory, self._keys, self.keys_filled, layer, start, rows)

    def store_values(self, memory: Memory, layer: int, start: int, rows: torch.Tensor) -> None:
        self._store(memory, self._values, self.values_filled, layer, start, rows)

    def keys(self, layer: int) -> torch.Tensor:
        """[B * kv_heads, capacity, head_dim], of which the first `keys_filled[layer]` positions are defined.

        Raises SettingError if none is.
        """
        return self._held(self._keys, layer)

    def values(self, layer: int) -> torch.Tensor:
        return self._held(self._values, layer)

    def truncate(self, length: int) -> None:
        """Forgets what is behind `length` positions. The memory stays: it will be filled again."""
        self.check_open()
        self.keys_filled = [min(filled, length) for filled in self.keys_filled]
        self.values_filled = [min(filled, length) for filled in self.values_filled]

    def reorder(self, memory: Memory, indices: torch.Tensor) -> None:
        """Sequence i becomes the old sequence indices[i]. [B'] int64, readable where the memory is; B' may be more or
        less than B.

        Raises LimitError, and then nothing has changed. After any other error the store is closed.
        """
        self.check_open()
        batch = len(indices)
        held = [cache for cache in (*self._keys, *self._values) if cache is not None]
        # All at once before any is moved: a refusal halfway would leave layers of two batches.
        more = sum(cache.nbytes for cache in held) // self.batch * batch
        self._budget.add(self, more)
        try:
            for layers, filled in ((self._keys, self.keys_filled), (self._values, self.values_filled)):
                for layer, old in enumerate(layers):
                    if old is not None:
                        shape = (batch * self._heads, *old.shape[1:])
                        layers[layer] = self._copied(memory, old, shape, filled[layer], indices)
        except BaseException:
            self.close()  # no memory: neither the old order nor the new one is complete
            raise
        self._budget.add(self, -sum(cache.nbytes for cache in held))
        self.batch = batch

    def check_open(self) -> None:
        """Raises SettingError if it was closed since it was found."""
        if self.closed:
            raise SettingError("session: it was closed meanwhile")

    def close(self) -> None:
        """Releases all memory. A thread that is using the store goes on in the memory that it has."""
        self._budget.close(self)
        self._keys = [None] * len(self._keys)
        self._values = [None] * len(self._values)
        self.keys_filled = [0] * len(self._keys)
        self.values_filled = [0] * len(self._values)

    @staticmethod
    def _held(layers: list[torch.Tensor | None], layer: int) -> torch.Tensor:
        cache = layers[layer]
        if cache is None:
            raise SettingError(f"layer: {layer}, of which the session holds nothing yet")
        return cache

    def _store(
        self,
        memory: Memory,
        layers: list[torch.Tensor | None],
        filled: list[int],
        layer: int,
        start: int,
        rows: torch.Tensor,
    ) -> None:
        if not 0 <= start <= filled[layer]:
            raise SettingError(f"start: {start}, expected 0 to the {filled[layer]} positions that layer {layer} has")
        count = rows.shape[1]
        end = start + count
        cache = layers[layer]
        if cache is None or end > cache.shape[1]:
            capacity = max(end, _MIN_POSITIONS, self._capacity if cache is None else 2 * cache.shape[1])
            cache = layers[layer] = self._grown(memory, cache, capacity, start)
        if count == 1:
            target = cache.select(1, start).view(self.batch, self._heads, self._head_dim)
            source = rows.select(1, 0)
        else:
            target = cache.view(self.batch, self._heads, -1, self._head_dim).narrow(2, start, count)
            source = rows.transpose(1, 2)
        memory.run(lambda: target.copy_(source))
        filled[layer] = end

    def _grown(self, memory: Memory, old: torch.Tensor | None, capacity: int, filled: int) -> torch.Tensor:
        """More memory, with the first `filled` positions of `old`."""
        shape = (self.batch * self._heads, capacity, self._head_dim)
        nbytes = math.prod(shape) * self._dtype.itemsize
        self._budget.add(self, nbytes)
        try:
            new = self._copied(memory, old, shape, filled, None)
        except BaseException:
            self._budget.add(self, -nbytes)
            raise
        if old is not None:
            self._budget.add(self, -old.nbytes)
        return new

    def _copied(
        self,
        memory: Memory,
        old: torch.Tensor | None,
        shape: tuple[int, ...],
        filled: int,
        indices: torch.Tensor | None,
    ) -> torch.Tensor:
        """Memory of that shape with the first `filled` positions of `old`; those of the sequences at `indices`."""
        new = memory.empty(shape, self._dtype)
        if old is not None and filled:
            source, target = old.narrow(1, 0, filled), new.narrow(1, 0, filled)
            if indices is None:
                memory.run(lambda: target.copy_(source))
            else:
                by_sequence = source.view(-1, self._heads, *source.shape[1:])
                memory.run(lambda: target.copy_(by_sequence.index_select(0, indices).flatten(0, 1)))
        return new

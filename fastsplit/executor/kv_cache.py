"""The executor's KV caches: each belongs to one client, under a number, the attribute `session` on the wire.

Rules. A cache is found by its number and its client: a client reaches its own alone. Caches are limited in number for
each client and in bytes over all clients (`split.kv_cache.Budget`), and closed with their client's connection. A lane's
state is not counted: it is bounded by the requests of one pass, and cleared by `truncate`, `reorder`, `close` and after
every error.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import LimitError, SettingError
from ..extras import torch
from ..models import ModelConfig
from ..split.blocks import Block
from ..split.contract import MAX_LANES
from ..split.kv_cache import Budget, KVStore, Memory

if TYPE_CHECKING:
    from ..wire.call import Client

__all__ = ["KVCache", "KVCaches", "Lane"]


class Lane:
    """The state of one chunk of a forward pass on its way through the layers."""

    __slots__ = ("blocks", "cos", "rows", "sin", "x")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """No pass is under way here."""
        self.x: torch.Tensor | None = None
        """The residual stream [B, rows, hidden], where the plan keeps it here."""
        self.rows = 0
        """Rows of the last keys stored, those included that were not selected to go on."""
        self.blocks: list[Block] | None = None
        """The blocks of the scores that the caller has."""
        self.cos: torch.Tensor | None = None
        """Rotary tables of the rows [1 or B, rows, 1, half], where the plan keeps them here."""
        self.sin: torch.Tensor | None = None


class KVCache(KVStore):
    """A store with its lanes. Hold `lock` for everything but `close`. Made and found by `KVCaches`.

    `link_dtype`: the dtype that the client sends and gets; `link_name` is its name.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        batch: int,
        capacity: int,
        budget: Budget,
        link_dtype: torch.dtype,
    ) -> None:
        super().__init__(config, dtype, batch, capacity, budget)
        self.lock = threading.Lock()
        self.link_dtype = link_dtype
        self.link_name = str(link_dtype).removeprefix("torch.")
        self.lanes: dict[int, Lane] = {}

    def lane(self, number: object) -> Lane:
        """The lane of that number, made if there is none. Raises SettingError."""
        if type(number) is not int or not 0 <= number < MAX_LANES:
            raise SettingError(f"lane: {number!r:.30}, expected an int from 0 to {MAX_LANES - 1}")
        lane = self.lanes.get(number)
        if lane is None:
            lane = self.lanes[number] = Lane()
        return lane

    def truncate(self, length: int) -> None:
        super().truncate(length)
        self.lanes.clear()

    def reorder(self, memory: Memory, indices: torch.Tensor) -> None:
        super().reorder(memory, indices)
        self.lanes.clear()

    def close(self) -> None:
        super().close()
        self.lanes.clear()


class KVCaches:
    """All KV caches of an executor. `max_caches`: of one client. `max_nbytes`: of all clients together. Thread-safe."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, max_caches: int, max_nbytes: int) -> None:
        self.max_caches = max_caches
        self._config = config
        self._dtype = dtype
        self._budget = Budget(max_nbytes)
        self._lock = threading.Lock()
        self._by_client: dict[Client, dict[int, KVCache]] = {}
        self._opened = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all caches; one that is being moved counts twice."""
        return self._budget.nbytes

    def __len__(self) -> int:
        with self._lock:
            return sum(map(len, self._by_client.values()))

    def open(self, client: Client, batch: int, capacity: int, link_dtype: torch.dtype) -> int:
        """A new cache's number. Its memory comes as it is filled. Raises LimitError."""
        cache = KVCache(self._config, self._dtype, batch, capacity, self._budget, link_dtype)
        with self._lock:
            own = self._by_client.get(client)
            first = own is None
            if own is None:
                own = self._by_client[client] = {}
            if len(own) >= self.max_caches:
                raise LimitError(f"{len(own)} sessions open, expected at most {self.max_caches} a client")
            self._opened += 1
            number = self._opened
            own[number] = cache
        if first:
            client.on_end(self._dropping(client))
        return number

    def find(self, client: Client, number: object) -> KVCache:
        """The client's cache. Raises SettingError."""
        cache = self._by_client.get(client, {}).get(number) if type(number) is int else None
        if cache is None:
            raise SettingError(f"session: {number!r:.30}, which is not open on this connection")
        return cache

    def close(self, client: Client, number: int) -> None:
        """Raises SettingError if the client has no such cache."""
        cache = self.find(client, number)
        with self._lock:
            self._by_client[client].pop(number, None)
        with cache.lock:
            cache.close()

    def _dropping(self, client: Client) -> Callable[[], None]:
        def drop() -> None:
            with self._lock:
                caches = self._by_client.pop(client, {}).values()
            for cache in caches:
                cache.close()  # without its lock: must not block; a handler at work with it keeps what it uses

        return drop

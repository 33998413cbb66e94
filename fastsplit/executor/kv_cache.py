"""The executor's KV caches: each in a session that belongs to one client.

Rules. A session is found by its number and its client: nobody reaches another's. Its memory is counted before it is
made, over all clients, and given back when it is closed or its connection ends. Nothing is read that was not written:
memory comes undefined, maybe with another client's keys in it, so how far each layer is filled is kept and asked.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

from ..errors import LimitError, SettingError
from ..extras import torch
from ..models import ModelConfig
from ..split.ops import MAX_LANES, Block
from ..wire.call import Client
from .device import Device, Work

__all__ = ["Lane", "Session", "Sessions"]

_MIN_POSITIONS = 64


class Lane:
    """One stretch of a forward pass on its way through the layers."""

    __slots__ = ("blocks", "cos", "rows", "sin", "x")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Nothing is under way here."""
        self.x: torch.Tensor | None = None
        """The residual stream [B, rows, hidden], where the plan keeps it here."""
        self.rows = 0
        """Rows of the last `scores`, those included that `keep` left out."""
        self.blocks: list[Block] | None = None
        """Of the scores that are with the caller."""
        self.cos: torch.Tensor | None = None
        self.sin: torch.Tensor | None = None


class Session:
    """Keys and values of B sequences, for each layer [B * kv_heads, capacity, head_dim], on the device.

    Hold `lock` for everything. Made and found by `Sessions`.
    """

    def __init__(self, sessions: Sessions, batch: int, capacity: int, dtype: torch.dtype) -> None:
        config = sessions.config
        layers = config.num_hidden_layers
        self.lock = threading.Lock()
        self.batch = batch
        self.dtype = dtype
        self.lanes: dict[int, Lane] = {}
        self._sessions = sessions
        self._capacity = max(capacity, 1)
        self._heads = config.num_key_value_heads
        self._head_dim = config.head_dim
        self._keys: list[torch.Tensor | None] = [None] * layers
        self._values: list[torch.Tensor | None] = [None] * layers
        self.keys_filled = [0] * layers
        self.values_filled = [0] * layers
        self.nbytes = 0
        self.closed = False

    def lane(self, number: object) -> Lane:
        """The lane of that number, made if there is none. Raises SettingError."""
        if type(number) is not int or not 0 <= number < MAX_LANES:
            raise SettingError(f"lane: {number!r:.30}, expected an int from 0 to {MAX_LANES - 1}")
        lane = self.lanes.get(number)
        if lane is None:
            lane = self.lanes[number] = Lane()
        return lane

    def store_keys(self, work: Work, layer: int, start: int, rows: torch.Tensor) -> None:
        """Puts [B, n, kv_heads, head_dim] at positions `start` and on. Raises SettingError if that leaves a gap."""
        self._store(work, self._keys, self.keys_filled, layer, start, rows)

    def store_values(self, work: Work, layer: int, start: int, rows: torch.Tensor) -> None:
        self._store(work, self._values, self.values_filled, layer, start, rows)

    def keys(self, layer: int) -> torch.Tensor:
        """[B * kv_heads, capacity, head_dim], of which `keys_filled[layer]` positions hold something.

        Raises SettingError if none does.
        """
        return self._held(self._keys, layer)

    def values(self, layer: int) -> torch.Tensor:
        return self._held(self._values, layer)

    def truncate(self, length: int) -> None:
        """Forgets what is behind `length` positions. The memory is kept: it will be filled again."""
        self.check_open()
        self.keys_filled = [min(filled, length) for filled in self.keys_filled]
        self.values_filled = [min(filled, length) for filled in self.values_filled]
        self.lanes.clear()

    def reorder(self, work: Work, indices: torch.Tensor) -> None:
        """Sequence i becomes the old sequence indices[i], of which there may be more or fewer. [B'], on the device.

        Raises LimitError, and then nothing has changed.
        """
        self.check_open()
        batch = len(indices)
        held = [cache for cache in (*self._keys, *self._values) if cache is not None]
        # All at once before any is moved: what is refused halfway would be of two batches.
        more = sum(cache.nbytes for cache in held) // self.batch * batch
        self._sessions._count(self, more)
        try:
            for layers, filled in ((self._keys, self.keys_filled), (self._values, self.values_filled)):
                for layer, old in enumerate(layers):
                    if old is not None:
                        shape = (batch * self._heads, *old.shape[1:])
                        layers[layer] = self._copied(work, old, shape, filled[layer], indices)
        except BaseException:
            self.close()  # no memory: neither the old order nor the new one is whole
            raise
        self._sessions._count(self, -sum(cache.nbytes for cache in held))
        self.batch = batch
        self.lanes.clear()

    def check_open(self) -> None:
        """Raises SettingError if it was closed since it was found."""
        if self.closed:
            raise SettingError("session: it was closed meanwhile")

    def close(self) -> None:
        """Gives all memory back. What is at work with it goes on in it."""
        self._sessions._count(self, None)
        self._keys = [None] * len(self._keys)
        self._values = [None] * len(self._values)
        self.keys_filled = [0] * len(self._keys)
        self.values_filled = [0] * len(self._values)
        self.lanes.clear()

    @staticmethod
    def _held(layers: list[torch.Tensor | None], layer: int) -> torch.Tensor:
        cache = layers[layer]
        if cache is None:
            raise SettingError(f"layer: {layer}, of which the session holds nothing yet")
        return cache

    def _store(
        self,
        work: Work,
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
            cache = layers[layer] = self._grown(work, cache, capacity, start)
        if count == 1:
            target = cache.select(1, start).view(self.batch, self._heads, self._head_dim)
            source = rows.select(1, 0)
        else:
            target = cache.view(self.batch, self._heads, -1, self._head_dim).narrow(2, start, count)
            source = rows.transpose(1, 2)
        work.run(lambda: target.copy_(source))
        filled[layer] = end

    def _grown(self, work: Work, old: torch.Tensor | None, capacity: int, filled: int) -> torch.Tensor:
        """More memory, with the first `filled` positions of `old`."""
        shape = (self.batch * self._heads, capacity, self._head_dim)
        nbytes = math.prod(shape) * self._sessions.dtype.itemsize
        self._sessions._count(self, nbytes)
        try:
            new = self._copied(work, old, shape, filled, None)
        except BaseException:
            self._sessions._count(self, -nbytes)
            raise
        if old is not None:
            self._sessions._count(self, -old.nbytes)
        return new

    def _copied(
        self,
        work: Work,
        old: torch.Tensor | None,
        shape: tuple[int, ...],
        filled: int,
        indices: torch.Tensor | None,
    ) -> torch.Tensor:
        """Memory of that shape with the first `filled` positions of `old`; those of the sequences at `indices`."""
        new = work.empty(shape, self._sessions.dtype)
        if old is not None and filled:
            source, target = old.narrow(1, 0, filled), new.narrow(1, 0, filled)
            if indices is None:
                work.run(lambda: target.copy_(source))
            else:
                by_sequence = source.view(-1, self._heads, *source.shape[1:])
                work.run(lambda: target.copy_(by_sequence.index_select(0, indices).flatten(0, 1)))
        return new


class Sessions:
    """All sessions of an executor. `max_sessions`: of one client. `max_nbytes`: of all. Thread-safe."""

    def __init__(
        self, config: ModelConfig, device: Device, dtype: torch.dtype, max_sessions: int, max_nbytes: int
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.max_sessions = max_sessions
        self.max_nbytes = max_nbytes
        self._device = device
        self._lock = threading.Lock()
        self._by_client: dict[Client, dict[int, Session]] = {}
        self._opened = 0
        self._nbytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all caches, those being moved counted twice."""
        return self._nbytes

    def __len__(self) -> int:
        with self._lock:
            return sum(map(len, self._by_client.values()))

    def open(self, client: Client, batch: int, capacity: int, dtype: torch.dtype) -> int:
        """A new session's number. Its memory comes as it is filled. Raises LimitError."""
        session = Session(self, batch, capacity, dtype)
        with self._lock:
            own = self._by_client.get(client)
            first = own is None
            if own is None:
                own = self._by_client[client] = {}
            if len(own) >= self.max_sessions:
                raise LimitError(f"{len(own)} sessions open, expected at most {self.max_sessions} a client")
            self._opened += 1
            number = self._opened
            own[number] = session
        if first:
            client.on_end(self._dropping(client))
        return number

    def find(self, client: Client, number: object) -> Session:
        """The client's session. Raises SettingError."""
        session = self._by_client.get(client, {}).get(number) if type(number) is int else None
        if session is None:
            raise SettingError(f"session: {number!r:.30}, which is not open on this connection")
        return session

    def close(self, client: Client, number: int) -> None:
        """Raises SettingError if the client has no such session."""
        session = self.find(client, number)
        with self._lock:
            self._by_client[client].pop(number, None)
        with session.lock:
            session.close()

    def _dropping(self, client: Client) -> Callable[[], None]:
        def drop() -> None:
            with self._lock:
                sessions = self._by_client.pop(client, {}).values()
            for session in sessions:
                session.close()  # without its lock: must not block; whoever is at work with it keeps what it uses

        return drop

    def _count(self, session: Session, nbytes: int | None) -> None:
        """Adds to what the session holds; None: it holds nothing any more, and never will. Raises LimitError."""
        with self._lock:
            if session.closed:
                return
            if nbytes is None:
                session.closed = True
                nbytes = -session.nbytes
            elif nbytes > 0 and self._nbytes + nbytes > self.max_nbytes:
                raise LimitError(
                    f"KV caches of {self._nbytes + nbytes} bytes in all, expected at most {self.max_nbytes}"
                )
            self._nbytes += nbytes
            session.nbytes += nbytes

"""`past_key_values` of a split model: the keys and values are in KV caches on the executor.

Rules. A KV cache is closed by `SplitCache.close`, or some time after the last reference to the SplitCache is gone: a
destructor may run in any thread and in the middle of a call, so it only registers the KV cache, and the next call or
the end of `generate` closes it. Calls from several threads take turns. A call that fails leaves the cache unchanged.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

from ..errors import FastsplitError
from ..extras import torch, transformers  # noqa: F401 (first: a missing one raises an error that says how to get it)

# isort: split
from transformers.cache_utils import Cache as TransformersCache

from ..split.functional import int64_range
from ..system.forked import renew, watch
from ..tee.remote import Cache
from ..tee.runner import Runner

__all__ = ["CacheRegister", "SplitCache"]

_SPARE_POSITIONS = 256
"""Room in a new KV cache beyond its first input. `max_length` may be far above what is generated."""


class CacheRegister:
    """The KV caches that a runner has on its executor, and the lock under which it is used."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.lock = threading.RLock()
        self._unused: deque[Cache] = deque()
        watch(self)

    def leave(self, why: str) -> None:
        """For a forked child: see system/forked.py."""
        renew(self.lock)
        self._unused.clear()

    def close_after(self, holder: object, cache: Cache) -> weakref.finalize[..., object]:
        """Has `close_unused` close the cache once the holder is gone. Detach the result to prevent that."""
        finalizer = weakref.finalize(holder, self._unused.append, cache)
        finalizer.atexit = False  # the connection is gone by then, and the caches with it
        return finalizer

    def close_unused(self, *, wait: bool = True) -> None:
        """Closes the caches whose holders are gone. `wait`: see `Cache.close`."""
        with self.lock:
            while self._unused:
                # A lost connection has ended its caches, and raises at its next use.
                with contextlib.suppress(FastsplitError):
                    self._unused.popleft().close(wait=wait)


class SplitCache(TransformersCache):
    """Keys and values on the executor, as a cache of transformers. Made by `SplitModelForCausalLM`.

    The first input opens a KV cache on the executor. Operations: append (by `forward`), crop, reorder, repeat and
    select. The contents cannot be read or copied.
    """

    def __init__(self, caches: CacheRegister, expected: int | None) -> None:
        super().__init__(layers=[])
        self._caches = caches
        self._expected = expected
        self._kv_cache: Cache | None = None
        self._finalizer: weakref.finalize[..., object] | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}(batch={self.batch_size}, length={self.get_seq_length()})"

    def __len__(self) -> int:
        return self._caches.runner.config.num_hidden_layers

    def __copy__(self) -> SplitCache:
        raise TypeError("a SplitCache cannot be copied: what it holds is on the executor; crop it to use it again")

    def __deepcopy__(self, memo: Any) -> SplitCache:
        return self.__copy__()

    @property
    def batch_size(self) -> int:
        """Number of sequences; -1 before the first input."""
        return -1 if self._kv_cache is None else self._kv_cache.batch

    @property
    def is_initialized(self) -> bool:
        return self._kv_cache is not None

    @property
    def _has_padding(self) -> bool:
        """Whether some of its positions are padding, which later rows do not see."""
        return self._kv_cache is not None and self._kv_cache.mask is not None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Filled positions, padding included."""
        return 0 if self._kv_cache is None else self._kv_cache.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: it grows."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Raises TypeError: only `SplitModelForCausalLM.forward` adds to it."""
        raise TypeError("a SplitCache takes no keys and values: they are on the executor")

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` positions. A positive number is the new length, as before transformers
        5.23."""
        length = self.get_seq_length()
        self._truncate(length + tokens_to_remove if tokens_to_remove <= 0 else min(tokens_to_remove, length))

    def _truncate(self, length: int, *, wait: bool = True) -> None:
        if self._kv_cache is not None and length < self._kv_cache.length:
            with self._caches.lock:
                self._kv_cache.truncate(max(length, 0), wait=wait)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Makes sequence i the former `beam_idx[i]`, [new batch] integers."""
        if self._kv_cache is None:
            return
        indices = beam_idx.to("cpu", torch.int64)
        if not torch.equal(indices, int64_range(0, self._kv_cache.batch)):
            with self._caches.lock:
                self._kv_cache.reorder(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence `repeats` times, side by side."""
        self.reorder_cache(int64_range(0, max(self.batch_size, 0)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the sequences `indices`, integers or [batch] bool."""
        self.reorder_cache(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def reset(self) -> None:
        """Empties it; the next input may have a batch of any size."""
        self.close()

    def close(self) -> None:
        """Closes the KV cache on the executor; idempotent. The next input opens a new one."""
        kv_cache, self._kv_cache = self._kv_cache, None
        if kv_cache is not None:
            assert self._finalizer is not None
            self._finalizer.detach()
            with self._caches.lock:
                kv_cache.close()

    def _open(self, batch: int, rows: int) -> Cache:
        """The KV cache on the executor for an input [batch, rows], opened if there is none yet. For `forward`."""
        if self._kv_cache is not None and not self._kv_cache.length and self._kv_cache.batch != batch:
            self.close()
        if self._kv_cache is None:
            capacity = rows + _SPARE_POSITIONS
            if self._expected is not None:
                capacity = min(capacity, max(self._expected, rows))
            self._kv_cache = self._caches.runner.new_cache(batch=batch, capacity=capacity)
            self._finalizer = self._caches.close_after(self, self._kv_cache)
        return self._kv_cache

    @contextlib.contextmanager
    def _unchanged_by_failure(self) -> Iterator[None]:
        """Restores the cache if the block raises: its length, or that it has no KV cache. For `forward`."""
        length = self.get_seq_length()
        try:
            yield
        except BaseException:
            if length:
                # If that fails too, the connection is lost.
                with contextlib.suppress(FastsplitError):
                    self._truncate(length, wait=False)
            elif self._finalizer is not None:
                self._kv_cache = None
                self._finalizer()
            raise

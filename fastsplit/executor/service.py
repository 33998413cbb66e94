"""The GPU side's service: operations of split/contract.py, from a Call to its result.

It holds the weights and the KV caches. `run` is checked by arguments.py and computed by engine.py; what stays between
calls belongs to a KV cache of one client (kv_cache.py). Any number of clients may take turns.

Rules. A handler returns when its results are complete (device.py), so that the time it took is the time that the work
took. After an error of `run` its lane is cleared: the rest of a pass that went wrong is of no use.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

from ..errors import ModelError, SettingError, TensorError
from ..extras import torch
from ..models import DTYPES, Model
from ..schema.limits import Limits
from ..split.contract import CONTRACT
from ..wire.call import Call, Handler
from .arguments import Arguments, checked_indices, checked_int
from .device import Cpu, Device
from .engine import Engine
from .kv_cache import KVCaches
from .weights import Weights

if TYPE_CHECKING:
    from ..wire.shm.segment import Hook

__all__ = ["Executor"]

_MAX_SEQUENCES = 2**16


class Executor:
    """One model's weights on one device. `handlers` and `on_segment` are what a `Server` takes."""

    def __init__(
        self,
        model: Model,
        *,
        device: Device | None = None,
        dtype: str = "float32",
        progress: Callable[[Any, int], Any] | None = None,
        max_reply_nbytes: int = Limits().max_message_nbytes,
        max_sessions: int = 64,
        max_cache_nbytes: int = 8 * 2**30,
    ) -> None:
        """Loads all weights. `device`: the CPU if None. `progress(items, total)` wraps the iteration over the weights.

        A call whose reply would be of more than `max_reply_nbytes` is refused before it is computed. `max_sessions`:
        KV caches of one client; `max_cache_nbytes`: of all clients together. Raises ModelError.
        """
        if dtype not in DTYPES:
            raise ModelError(f"dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
        self.name = model.name
        self.config = model.config
        self.device: Device = Cpu() if device is None else device
        self.dtype = dtype
        torch_dtype: torch.dtype = getattr(torch, dtype)
        weights, self._tee_weights = self._loaded(model, torch_dtype, progress)
        self._engine = Engine(model.config, weights, torch_dtype)
        self._arguments = Arguments(self._engine, max_reply_nbytes)
        self.sessions = KVCaches(model.config, torch_dtype, max_sessions, max_cache_nbytes)
        self.handlers: dict[str, Handler] = {
            "describe": self._describe,
            "tee_weights": self._send_tee_weights,
            "open": self._open,
            "truncate": self._truncate,
            "reorder": self._reorder,
            "close": self._close,
            "run": self._run,
        }

    def _loaded(
        self, model: Model, dtype: torch.dtype, progress: Callable[[Any, int], Any] | None
    ) -> tuple[Weights, list[torch.Tensor]]:
        stopped = threading.Event()

        def until_stopped(items: Iterable[Any], total: int) -> Iterator[Any]:
            for item in items if progress is None else progress(items, total):
                if stopped.is_set():
                    raise ModelError(f"{model.name}: loading was interrupted")
                yield item

        def load() -> tuple[Weights, list[torch.Tensor]]:
            weights = Weights(model, self.device.torch_device, dtype, until_stopped)
            return weights, list(model.tee_weights().values())

        # In a thread that ends: GNU's OpenMP keeps workers for each thread that ever computed, and with more of them
        # than cores none spins between two operations, which costs a third of a token's time.
        with ThreadPoolExecutor(1, "fastsplit-load") as loading:
            try:
                loaded = loading.submit(load)
                while not loaded.done():  # a signal for another thread is noticed between two waits
                    wait([loaded], timeout=0.1)
                return loaded.result()
            except BaseException:  # an interrupt must not wait for the other weights
                stopped.set()
                raise

    @property
    def on_segment(self) -> Hook | None:
        """The hook for shared memory that is mapped; None if the device needs none."""
        return self.device.on_segment

    def _describe(self, call: Call) -> None:
        call.reply_attrs["config"] = self.config.to_json()
        call.reply_attrs["contract"] = CONTRACT
        call.reply_attrs["dtype"] = self.dtype
        call.reply_attrs["name"] = self.name
        # of this machine's cores, which may be the caller's, too
        call.reply_attrs["threads"] = 0 if self.device.asynchronous else torch.get_num_threads()

    def _send_tee_weights(self, call: Call) -> list[torch.Tensor]:
        return self._tee_weights

    # ---- KV caches ----

    def _open(self, call: Call) -> None:
        batch = checked_int(call.attrs, "batch", 1, _MAX_SEQUENCES)
        capacity = checked_int(call.attrs, "capacity", 0, 2**31)
        dtype = call.attrs.get("dtype")
        if dtype not in DTYPES:
            raise SettingError(f"dtype: {dtype!r:.30}, expected one of {', '.join(DTYPES)}")
        call.reply_attrs["session"] = self.sessions.open(call.client, batch, capacity, getattr(torch, dtype))

    def _truncate(self, call: Call) -> None:
        length = checked_int(call.attrs, "length", 0, 2**31)
        cache = self.sessions.find(call.client, call.attrs.get("session"))
        with cache.lock:
            cache.truncate(length)

    def _reorder(self, call: Call) -> None:
        if len(call.tensors) != 1:
            raise SettingError(f"{len(call.tensors)} tensors, expected indices")
        cache = self.sessions.find(call.client, call.attrs.get("session"))
        with cache.lock, self.device.work(cache) as work:
            indices = checked_indices("indices", call.tensors[0], cache.batch)
            if not 1 <= len(indices) <= _MAX_SEQUENCES:
                raise TensorError(f"indices: {len(indices)} of them, expected 1 to {_MAX_SEQUENCES}")
            cache.reorder(work, work.take(indices))

    def _close(self, call: Call) -> None:
        self.sessions.close(call.client, checked_int(call.attrs, "session", 0, 2**62))

    # ---- a plan's call ----

    def _run(self, call: Call) -> list[torch.Tensor]:
        attrs = call.attrs
        routine, layer, start = self._arguments.find(attrs)
        cache = self.sessions.find(call.client, attrs.get("session"))
        # inference mode is a thread's own, and makes each operation faster
        with torch.inference_mode(), cache.lock, self.device.work(cache) as work:
            cache.check_open()
            lane = cache.lane(attrs.get("lane"))
            try:
                job = self._arguments.check(routine, layer, start, attrs, call.tensors, cache, lane)
                return self._engine.run(job, work, call.empty)
            except BaseException:
                lane.clear()
                raise

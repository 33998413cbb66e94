"""The processes that have a model's weights: executors, and HF's own class undivided (benches/rivals).

    real   benches.rivals.executor: fastsplit and the rivals out of one copy of the weights
    null   benches.null_executor: the same without arithmetic
    hf     benches.rivals.hf

Rules. OpenMP's idle threads wait in an executor as in the GPU side's script, in HF's process as torch has it. None
outlives who started it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fastsplit.gpu_side import SPIN_COUNT

from . import UNTOUCHED
from .processes import Process
from .rounds import progress

__all__ = ["EXECUTORS", "Workers", "executor_process"]

EXECUTORS = {"null": "benches.null_executor", "real": "benches.rivals.executor"}


class Workers:
    """Those of one model in one dtype at a time: they stay for whoever asks for the same next.

    `threads`: torch's in each; 0: one for each core. `device`: of the real executor.
    """

    def __init__(self, threads: int = 0, device: str = "cpu") -> None:
        self._threads = threads
        self._device = device
        self._of: tuple[str, str] | None = None
        self._running: dict[str, Process] = {}

    def get(self, model: str, dtype: str, *kinds: str) -> list[Process]:
        """One of each kind, listening: `ready` has its address, an executor's all of them as JSON."""
        if self._of != (model, dtype):
            self.close()
            self._of = model, dtype
        missing = [kind for kind in kinds if kind not in self._running]
        if missing:
            progress(f"starting: {', '.join(missing)}, {dtype}")
        for kind in missing:
            self._running[kind] = self._start(kind, model, dtype)
        for kind in missing:  # which have been loading side by side
            self._running[kind].wait_ready()
        return [self._running[kind] for kind in kinds]

    def close(self) -> None:
        while self._running:
            self._running.popitem()[1].close()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, kind: str, model: str, dtype: str) -> Process:
        options = ["--model", model, "--dtype", dtype, "--threads", str(self._threads)]
        if kind == "hf":
            return Process("benches.rivals.hf", *options, environment=UNTOUCHED, wait=False)
        if kind == "real":
            options += ["--device", self._device]
        waiting = {"GOMP_SPINCOUNT": str(SPIN_COUNT)} if UNTOUCHED["OMP_WAIT_POLICY"] is None else {}  # as in gpu_side
        return Process(EXECUTORS[kind], *options, environment=waiting, wait=False)


@contextmanager
def executor_process(kind: str, model: str, dtype: str, threads: int) -> Iterator[Process]:
    """One executor alone, "null" or "real"."""
    with Workers(threads) as workers:
        yield workers.get(model, dtype, kind)[0]

"""Where a benchmark's processes run: each end on a core of its own, where there are two."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["on_cpu", "separate_cpus"]


def separate_cpus() -> tuple[int, int] | None:
    """Two CPUs that this process may use, on two cores where there are two. None if there is only one."""
    cpus = sorted(os.sched_getaffinity(0))
    by_core = {}
    for cpu in reversed(cpus):
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            core = ((topology / "physical_package_id").read_text(), (topology / "core_id").read_text())
        except OSError:
            core = ("", str(cpu))
        by_core[core] = cpu
    chosen = sorted(by_core.values()) if len(by_core) > 1 else cpus
    return (chosen[0], chosen[1]) if len(chosen) > 1 else None


@contextlib.contextmanager
def on_cpu(cpu: int | None) -> Iterator[None]:
    """This thread on one CPU meanwhile; None leaves it where it is."""
    before = os.sched_getaffinity(0)
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)

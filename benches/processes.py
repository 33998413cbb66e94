"""A benchmark's other processes: starting and ending them, their cores and memory, and the CPU that others used.

Rules. Nothing is left running: a process ends with its stdin, and is killed if it does not within 10 seconds. What
cannot be read (another system than Linux, a hidden /proc) is None, never an error: it is only reported.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

__all__ = ["OthersCpu", "Process", "memory", "on_cpu", "process", "reset_peak_rss", "separate_cpus"]


class Process:
    """A module run as a process of its own, up to its READY line. It ends when we close its stdin, or end ourselves.

    `environment`: variables beside our own, None for those not to have. `wait`: whether to wait for READY now; if not,
    `wait_ready` does, so that several can start at a time.
    """

    ready: str
    """What stands behind READY."""

    def __init__(
        self, module: str, *arguments: str, environment: Mapping[str, str | None] | None = None, wait: bool = True
    ) -> None:
        root = Path(__file__).resolve().parents[1]
        self._module = module
        self._popen = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=root,
            env={name: value for name, value in {**os.environ, **(environment or {})}.items() if value is not None},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._popen.pid
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        """Raises RuntimeError if it ended or wrote anything else."""
        line = self.read_line()
        if line.split()[:1] != ["READY"]:
            self.close()
            raise RuntimeError(f"{self._module} did not start: it wrote {line!r}, expected READY")
        self.ready = line.removeprefix("READY").strip()

    def write_line(self, line: str) -> None:
        assert self._popen.stdin is not None
        self._popen.stdin.write(line + "\n")
        self._popen.stdin.flush()

    def read_line(self) -> str:
        """The next line of its stdout, empty if it has ended."""
        assert self._popen.stdout is not None
        return self._popen.stdout.readline()

    def kill(self) -> None:
        self._popen.kill()

    def close(self) -> None:
        assert self._popen.stdin is not None and self._popen.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._popen.stdin.close()
        try:
            self._popen.wait(10)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        self._popen.stdout.close()


@contextmanager
def process(module: str, *arguments: str, environment: Mapping[str, str | None] | None = None) -> Iterator[Process]:
    started = Process(module, *arguments, environment=environment)
    try:
        yield started
    finally:
        started.close()


def _machine_cpu_s() -> float:
    """CPU time that all programs have used since the start, interrupts left out (they are charged to nobody)."""
    fields = Path("/proc/stat").read_text().split(maxsplit=4)
    return sum(map(int, fields[1:4])) / os.sysconf("SC_CLK_TCK")


def _process_cpu_s(pid: int) -> float:
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, after_name[11:13])) / os.sysconf("SC_CLK_TCK")


class OthersCpu:
    """How much CPU time programs other than `pids` have used since this was made: what spoils a measurement."""

    def __init__(self, *pids: int) -> None:
        self._pids = pids
        self._before_s = self._now_s()

    def _now_s(self) -> float | None:
        try:
            return _machine_cpu_s() - sum(map(_process_cpu_s, self._pids))
        except (OSError, ValueError, IndexError):  # not Linux, or hidden from us
            return None

    def seconds(self) -> float | None:
        now_s = self._now_s()
        return None if now_s is None or self._before_s is None else max(now_s - self._before_s, 0.0)


def reset_peak_rss(pid: int) -> None:
    with contextlib.suppress(OSError):  # a kernel without it: then the peak is that of the whole run so far
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def memory(pid: int, prefix: str) -> dict[str, int]:
    """The most that a process held, and what it holds now, in bytes. PSS counts shared memory by halves, so that two
    processes' PSS add up to what both really take. Empty where the system does not say."""
    found = {}
    with contextlib.suppress(OSError):
        for file, key, name in (("status", "VmHWM:", "peak_rss"), ("smaps_rollup", "Pss:", "pss")):
            for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
                if line.startswith(key):
                    found[f"{prefix}_{name}_bytes"] = int(line.split()[1]) * 1024
    return found


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


@contextmanager
def on_cpu(cpu: int | None) -> Iterator[None]:
    """This thread on one CPU meanwhile; None leaves it where it is."""
    before = os.sched_getaffinity(0)
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)

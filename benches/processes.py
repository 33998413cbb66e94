"""A benchmark's other processes: starting and ending them, their memory, and who else used the machine meanwhile.

Rules. What cannot be read (another system than Linux, a hidden /proc) is None, never an error: it is only reported.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["OthersCpu", "Process", "peak_rss_bytes", "process", "reset_peak_rss"]


class Process:
    """A module run as a process of its own, up to its READY line. It ends when we close its stdin, or end ourselves."""

    def __init__(self, module: str, *arguments: str) -> None:
        root = Path(__file__).resolve().parents[1]
        self._popen = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._popen.pid
        assert self._popen.stdout is not None
        line = self._popen.stdout.readline()
        if not line.startswith("READY "):
            self.close()
            raise RuntimeError(f"{module} did not start: it wrote {line!r}, expected READY")
        self.ready = line.removeprefix("READY ").strip()

    def close(self) -> None:
        assert self._popen.stdin is not None and self._popen.stdout is not None
        self._popen.stdin.close()
        try:
            self._popen.wait(10)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        self._popen.stdout.close()


@contextmanager
def process(module: str, *arguments: str) -> Iterator[Process]:
    started = Process(module, *arguments)
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


def peak_rss_bytes(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None

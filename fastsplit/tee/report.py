"""The report of a run's time: a stopwatch, a text table, JSON, a Chrome trace.

How time is counted. The TEE side's clock never stops. Each interval, when it ends, is assigned to one operation, so the
parts add up to the wall clock. The interval of a call has three parts: serialization (measured by the channel), the
executor's work (from its reply, at most the time waited), and communication (the rest). Intervals of the TEE side
between its named operations are "other".

Rules. Every number comes from the run. `_s` are seconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter_ns
from typing import Any

from ..wire.stats import Stats

__all__ = ["GPU_OPS", "TEE_OPS", "Op", "Recorder", "chrome_trace", "codec_counts", "table"]

GPU_OPS = ("embedding", "linear", "matmul", "lm_head")
TEE_OPS = ("rmsnorm", "rotary", "softmax", "silu", "residual", "kv_cache", "sampling", "other")


@dataclass
class Op:
    """Runs of one operation, and their total time."""

    side: str
    count: int = 0
    total_ns: int = 0


@dataclass
class Recorder:
    """Times one run. Not thread-safe: one runner, one recorder."""

    keep_spans: bool = False
    ops: dict[str, Op] = field(default_factory=dict)
    spans: list[tuple[str, str, int, int]] = field(default_factory=list)
    """(track, name, start, duration) in ns; empty without `keep_spans`."""
    wall_ns: int = 0
    phases_ns: dict[str, int] = field(default_factory=dict)
    communication_ns: int = 0
    serialization_ns: int = 0
    rpc_calls: int = 0
    _running: bool = False
    _since_ns: int = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Runs the clock in the block and adds its time to a phase, "prefill" or "decode"."""
        started_ns = self._since_ns = perf_counter_ns()
        self._running = True
        try:
            yield
        finally:
            self.lap("other")
            self._running = False
            elapsed_ns = self._since_ns - started_ns
            self.wall_ns += elapsed_ns
            self.phases_ns[name] = self.phases_ns.get(name, 0) + elapsed_ns

    def lap(self, name: str, count: int = 1) -> None:
        """Assigns the time since the last mark to the TEE operation `name`, as `count` of them."""
        if self._running:
            self._count("tee", name, self._mark(name), 0 if name == "other" else count)

    def sending(self, stats: Stats, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs `work(*args, **kwargs)`, which sends a request; a later `call` waits for its reply."""
        self.lap("other")
        serialization_s = stats.serialization_s
        result = work(*args, **kwargs)
        if self._running:
            elapsed_ns = self._mark("sending", "calls")
            serialization_ns = min(int((stats.serialization_s - serialization_s) * 1e9), elapsed_ns)
            self.serialization_ns += serialization_ns
            self.communication_ns += elapsed_ns - serialization_ns
        return result

    def call(self, name: str, ops: int, stats: Stats, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs `work(*args, **kwargs)`, one call to the executor, or the wait for its reply.

        `name`: the operation, or several joined by +. `ops`: number of operations in the call. `stats`: the
        connection's counts, whose growth divides the call's time.
        """
        self.lap("other")
        serialization_s, remote_s = stats.serialization_s, stats.remote_s
        result = work(*args, **kwargs)
        if self._running:
            started_ns = self._since_ns
            elapsed_ns = self._mark(name, "calls")
            serialization_ns = min(int((stats.serialization_s - serialization_s) * 1e9), elapsed_ns)
            remote_ns = min(int((stats.remote_s - remote_s) * 1e9), elapsed_ns - serialization_ns)
            self.rpc_calls += 1
            self.serialization_ns += serialization_ns
            self.communication_ns += elapsed_ns - serialization_ns - remote_ns
            self._count("gpu", name, remote_ns, ops)
            if self.keep_spans:  # drawn in the middle of the call: the start of the work is not known
                self.spans.append(("gpu", name, started_ns + (elapsed_ns - remote_ns) // 2, remote_ns))
        return result

    def side_ns(self, side: str) -> int:
        """Total compute time of one side, "gpu" or "tee"."""
        return sum(op.total_ns for op in self.ops.values() if op.side == side)

    def as_dict(self) -> dict[str, Any]:
        """The times and counts, by their keys in the JSON document."""
        return {
            "rpc_calls": self.rpc_calls,
            "wall_s": self.wall_ns * 1e-9,
            "prefill_s": self.phases_ns.get("prefill", 0) * 1e-9,
            "decode_s": self.phases_ns.get("decode", 0) * 1e-9,
            "serialization_s": self.serialization_ns * 1e-9,
            "communication_s": self.communication_ns * 1e-9,
            "gpu_compute_s": self.side_ns("gpu") * 1e-9,
            "tee_compute_s": self.side_ns("tee") * 1e-9,
            "ops": {
                name: {"side": op.side, "count": op.count, "total_s": op.total_ns * 1e-9}
                for name, op in self.ops.items()
            },
        }

    def _mark(self, name: str, track: str = "tee") -> int:
        now_ns = perf_counter_ns()
        elapsed_ns = now_ns - self._since_ns
        if self.keep_spans:
            self.spans.append((track, name, self._since_ns, elapsed_ns))
        self._since_ns = now_ns
        return elapsed_ns

    def _count(self, side: str, name: str, elapsed_ns: int, count: int) -> None:
        op = self.ops.get(name)
        if op is None:
            op = self.ops[name] = Op(side)
        op.count += count
        op.total_ns += elapsed_ns


def codec_counts(stats: Stats) -> dict[str, dict[str, float]]:
    """For each codec of a connection: tensors, bytes before and after, their ratio, seconds on this side."""
    return {
        name: {
            "tensors": used.tensors,
            "raw_nbytes": used.raw_nbytes,
            "wire_nbytes": used.wire_nbytes,
            "ratio": used.raw_nbytes / used.wire_nbytes if used.wire_nbytes else 0.0,
            "encode_s": used.encode_s,
            "decode_s": used.decode_s,
        }
        for name, used in list(stats.codecs.items())
        if used.tensors
    }


def table(report: dict[str, Any]) -> str:
    """The report as text. `report`: the JSON document of the TEE side."""
    wall_s = report["wall_s"]
    ops = report["ops"]
    lines = [f"{'operation':<22}{'count':>8}{'total s':>12}{'average ms':>13}{'percent':>9}"]

    def row(name: str, count: int | None, total_s: float) -> None:
        average = f"{total_s / count * 1e3:13.3f}" if count else " " * 13
        percent = f"{100 * total_s / wall_s:8.1f}%" if wall_s else " " * 9
        lines.append(f"{name:<22}{count if count is not None else '':>8}{total_s:12.4f}{average}{percent}")

    def group(title: str, names: tuple[str, ...], side: str, total_s: float) -> None:
        lines.append(title)
        for name in (*names, *sorted(set(ops) - set(names))):  # then the names that a plan has joined
            if name in ops and ops[name]["side"] == side:
                row(f"  {name}", ops[name]["count"] or None, ops[name]["total_s"])
        row("  total", None, total_s)

    overhead_s = report["communication_s"] + report["serialization_s"]
    lines.append("communication")
    row("  RPC calls", report["rpc_calls"], report["communication_s"])
    row("  serialization", report["rpc_calls"], report["serialization_s"])
    row("  total overhead", None, overhead_s)
    group("GPU operations", GPU_OPS, "gpu", report["gpu_compute_s"])
    group("TEE operations", TEE_OPS, "tee", report["tee_compute_s"])
    row("total", None, wall_s)
    lines.append("")
    lines.append(
        f"prefill {report['prefill_s']:.3f} s ({report['prompt_tokens']} tokens), decode {report['decode_s']:.3f} s "
        f"({report['new_tokens']} new tokens), plan {report['plan']}, {report['uri']}"
    )
    lines.append(
        f"bytes: sent {_nbytes(report['bytes_sent'])}, received {_nbytes(report['bytes_received'])}, "
        f"shared {_nbytes(report['bytes_shared'])}, copied {_nbytes(report['bytes_copied'])}"
    )
    lines += _setting_lines(report)
    lines.append(f"shared memory: {'yes' if report['shm'] else 'no'}, {_plain(report['shm_reason'])}")
    lines.append(f"compiled core: {'yes' if report['native'] else 'no'}")
    if report.get("codecs"):
        titles = ("tensors", "before", "travelled", "ratio", "encode s", "decode s")
        lines.append("{:<10}{:>10}{:>12}{:>12}{:>8}{:>10}{:>10}".format("codec", *titles))
        lines += [
            f"{_plain(name):<10}{used['tensors']:>10}{_nbytes(used['raw_nbytes']):>12}"
            f"{_nbytes(used['wire_nbytes']):>12}{used['ratio']:8.2f}{used['encode_s']:10.3f}{used['decode_s']:10.3f}"
            for name, used in report["codecs"].items()
        ]
    if wall_s and overhead_s > 0.5 * wall_s:
        lines.append(
            f"communication is {100 * overhead_s / wall_s:.0f} % of the wall clock: "
            + (
                f"plan {report['plan']} needs many calls; auto takes the one with the fewest that this model can have"
                if report["plan"] in ("per-op", "batched")
                else "unix:// is the fastest link on one host; between hosts, auto chooses plan and lanes by the link"
            )
        )
    return "\n".join(lines)


def _setting_lines(report: dict[str, Any]) -> list[str]:
    """Plan, lanes and cast with their reasons, like `Tuning.lines`."""
    lines = []
    plan, wanted, reason = report["plan"], report.get("plan_wanted", "auto"), report.get("plan_reason")
    if reason:
        instead = "" if wanted == "auto" else f" instead of {wanted}"
        lines.append(f"plan {plan}{instead}: {_plain(reason)}")
    if report.get("lanes_reason"):
        lines.append(f"lanes {report['lanes']}: {_plain(report['lanes_reason'])}")
    if report.get("cast_reason"):
        lines.append(f"cast {report['cast']}: {_plain(report['cast_reason'])}")
    return lines


def chrome_trace(recorder: Recorder, path: Path) -> None:
    """Writes the spans as a trace for chrome://tracing and Perfetto. Tracks: TEE operations, calls, executor."""
    tracks = {"tee": 1, "calls": 2, "gpu": 3}
    events: list[dict[str, Any]] = [
        {"name": "thread_name", "ph": "M", "pid": 1, "tid": tid, "args": {"name": track}}
        for track, tid in tracks.items()
    ]
    events += [
        {"name": name, "ph": "X", "pid": 1, "tid": tracks[track], "ts": start_ns / 1e3, "dur": duration_ns / 1e3}
        for track, name, start_ns, duration_ns in recorder.spans
    ]
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")


def _plain(text: str) -> str:
    """One short printable line. Part of `text` may come from the peer."""
    return "".join(char if char.isprintable() else "?" for char in text[:200])


def _nbytes(count: int) -> str:
    if count < 1000:
        return f"{count} B"
    power = min((len(str(count)) - 1) // 3, 4)
    return f"{count / 1000**power:.1f} {'kMGT'[power - 1]}B"

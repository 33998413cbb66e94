"""A prefill by every system of benches.split_systems: how long it takes, and where that goes.

What the columns are. wall, comm, serial, gpu, tee: seconds, the first being the sum of the others; serialization is
this side's, the executor's own is within communication. comm %: communication and serialization, of the wall. /sdpa,
/eager: the wall over that of HF in the same round. sent+recv: bytes through the socket. shared: bytes of tensors that
crossed by reference, in shared memory. copied: bytes of tensors that this side's code copied to send or receive them.
staged: fastsplit's bytes that came in the same read as a frame's head. floor: how long a bare sendall / recv_into loop
over the same kind of socket, measured in this run, needs for those bytes (8 MiB messages out of and into 128 MiB, so
that no cache flatters it), and how many times that the communication took. RSS: the most memory while the system ran,
of this process and of the one with the weights, which both keep buffers from one run to the next, also those of other
systems; shared memory counts in both. PSS: the same right after the run, with what is shared counted once, by halves:
the sum is what both really hold, to be compared with HF's. Memory of one system alone: --only its name. others: CPU
seconds that other programs used meanwhile, more than a few tenths of which spoil the row. error: the last row's logits
against those of HF's eager in the same dtype, max |difference| / max |logit|. Below the table: seconds by operation,
and what each connection really had, and why.

HF runs with `use_cache=True` and `logits_to_keep=1`, as the split fills its KV cache and computes one row of logits; in
inference mode, with as many threads and the same weights, in the dtype as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .measurements import Columns, Measurement
from .rivals.raw_socket import one_way_bytes_per_s
from .rounds import progress
from .rungs import FEW_MESSAGES
from .split_systems import CIRCUMSTANCES, Phase, System
from .splits import Split

__all__ = ["HF", "Prefill"]

HF = ("hf-eager", "hf-sdpa")
_REFERENCE = "hf-eager"

_WARM_UP_TOKENS = 64
"""At most: an eighth of what is measured."""
_COUNTERS = ("calls", "bytes_sent", "bytes_received", "bytes_shared", "bytes_copied", "bytes_staged")


class Prefill(Phase):
    """One forward pass over `ids`, the last row's logits. `quick`: a shorter look at the raw sockets."""

    name = "prefill"
    ops_key = "ops"
    ops_unit = ("s", 1.0)
    columns: Columns = (
        ("wall s", 9, lambda m: f"{m['wall_s']:.3f}"),
        ("comm s", 9, lambda m: f"{m['communication_s']:.3f}"),
        ("serial s", 10, lambda m: f"{m['serialization_s']:.4f}"),
        ("gpu s", 9, lambda m: f"{m['gpu_compute_s']:.3f}"),
        ("tee s", 8, lambda m: f"{m['tee_compute_s']:.3f}"),
        ("comm %", 8, lambda m: f"{100 * m['communication_share']:.1f}"),
        ("/sdpa", 8, lambda m: f"{m['wall_to_sdpa']:.3f}"),
        ("/eager", 8, lambda m: f"{m['wall_to_eager']:.3f}"),
        ("RPCs", 6, lambda m: f"{m['rpc_calls']}"),
        ("sent+recv MB", 14, lambda m: f"{(m['bytes_sent'] + m['bytes_received']) / 1e6:.1f}"),
        ("shared MB", 11, lambda m: f"{m['bytes_shared'] / 1e6:.1f}"),
        ("copied MB", 11, lambda m: f"{m['bytes_copied'] / 1e6:.1f}"),
        ("staged kB", 11, lambda m: f"{m['bytes_staged'] / 1e3:.1f}"),
        ("floor s", 15, lambda m: f"{m['socket_floor_s']:.3f} ({m['communication_to_floor']:.2f}x)"),
        *CIRCUMSTANCES,
        ("error", 9, lambda m: f"{m['logits_error']:.1e}"),
    )

    def __init__(self, ids: torch.Tensor, *, quick: bool = False) -> None:
        self.size = {"tokens": len(ids)}
        self.raw_socket_bytes_per_s: dict[str, float] = {}
        """By kind of socket; "cached" is one 8 MiB buffer over and over, which no prefill can have."""
        self._ids = ids
        self._quick = quick
        self._logits: dict[str, torch.Tensor] = {}

    def look_at_sockets(self) -> None:
        """Measures raw sockets. The floor belongs to a run as a whole: asked before and after, the better counts; of a
        quick one, before."""
        if self._quick and self.raw_socket_bytes_per_s:
            return
        progress("raw sockets")
        counts = FEW_MESSAGES if self._quick else {}
        for kind in ("unix", "tcp"):
            rates = {
                kind: one_way_bytes_per_s(kind, **counts),
                f"{kind} cached": one_way_bytes_per_s(kind, buffers=1, **counts),
            }
            for name, rate in rates.items():
                self.raw_socket_bytes_per_s[name] = max(rate, self.raw_socket_bytes_per_s.get(name, 0.0))

    def warm_up(self, system: System) -> None:
        _run(system, self._ids[: min(_WARM_UP_TOKENS, max(len(self._ids) // 8, 1))])

    def run(self, system: System) -> Measurement:
        measured, self._logits[system.name] = _run(system, self._ids)
        return measured

    def compare(self, measured: Mapping[str, Measurement]) -> None:
        for name, one in measured.items():
            for hf in HF:
                if hf in measured:
                    one[f"wall_to_{hf.removeprefix('hf-')}"] = one["wall_s"] / measured[hf]["wall_s"]
            if _REFERENCE in measured:
                logits, reference = self._logits[name], self._logits[_REFERENCE]
                one["logits_error"] = float((logits - reference).abs().max() / reference.abs().max())
                one["same_top_token"] = bool(logits.argmax() == reference.argmax())

    def summary(self, row: Mapping[str, Any]) -> Measurement:
        found = super().summary(row)
        rate = self.raw_socket_bytes_per_s.get(row["link"] or "")
        if rate is not None:  # neither shared memory nor a rival's sockets: these have buffers of their own
            found["socket_floor_s"] = (found["bytes_sent"] + found["bytes_received"]) / rate
            found["communication_to_floor"] = found["communication_s"] / found["socket_floor_s"]
        return found


def _run(system: System, ids: torch.Tensor) -> tuple[Measurement, torch.Tensor]:
    if system.split is not None:
        return _run_split(system.split, ids)
    assert system.hf is not None
    reply = system.hf.call("prefill", ids, attention=system.name.removeprefix("hf-"))
    return {"wall_s": reply.attrs["wall_s"]}, reply[0].clone()


def _run_split(split: Split, ids: torch.Tensor) -> tuple[Measurement, torch.Tensor]:
    with split.runner.new_cache(1, len(ids)) as cache:
        before = split.backend.stats.as_dict()
        recorder = split.record()
        with recorder.phase("prefill"):
            logits = split.runner.forward(ids[None], cache)[0, -1]
        after = split.backend.stats.as_dict()
    measured = {**recorder.as_dict(), **{key: after[key] - before[key] for key in _COUNTERS}}
    overhead_s = measured["communication_s"] + measured["serialization_s"]
    measured["communication_share"] = overhead_s / measured["wall_s"]
    return measured, logits

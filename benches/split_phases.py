"""A prefill and decoding by every system of split_systems.py: how long they take, and where that goes.

What the columns are. comm, serial, gpu, tee: communication, this side's serialization (the executor's own is within
communication), the executor's handlers, this side's computing; together they are the wall. /sdpa, /eager, /loop: over
HF in the same round. sent+recv: bytes through the socket. shared: bytes of tensors that crossed by reference. copied:
bytes of tensors that this side's code copied to send or receive them. PSS: memory of both processes right after, what
is shared counted once. others: CPU seconds of other programs; more than a few tenths spoil the row. Below a row: ms by
operation, and what its connection had, and why.

Prefill. One forward pass, the last row's logits; HF has `use_cache=True` and `logits_to_keep=1`, as the split fills its
KV cache and computes one row of logits. floor: the time that a bare sendall / recv_into loop over the same kind of
socket, measured in this run, takes for these bytes, and how many times that the communication took. error: the last
row's logits against HF's eager in the same dtype, max |difference| / max |logit|.

Decode. Batch 1, greedy; no token ends the sequence. Figures are those of a token after the first: the run's without its
prefill's. hf-sdpa and hf-eager are `generate` with its cache; hf-loop is the model's forward (sdpa) in a loop with its
cache, which leaves out the work of `generate` beside the model. same: whether the tokens are those of HF.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import perf_counter_ns
from typing import Any

import torch

from .rounds import Columns, Measurement, progress
from .split_systems import Phase, System
from .splits import Split
from .transports.pair import raw_bytes_per_s

__all__ = ["Decode", "Prefill", "run_prefill"]

_PARTS = (("comm", "communication"), ("serial", "serialization"), ("gpu", "gpu_compute"), ("tee", "tee_compute"))
_WARM_UP_ROWS, _WARM_UP_TOKENS = 64, 8  # at most
_COUNTERS = ("bytes_sent", "bytes_received", "bytes_shared", "bytes_copied")


def _part_columns(prefix: str, unit: str, scale: float) -> Columns:
    return tuple(
        (f"{title} {unit}", 11, lambda m, key=f"{prefix}{part}_s": f"{m[key] * scale:.3f}") for title, part in _PARTS
    )


def run_prefill(split: Split, ids: torch.Tensor) -> tuple[Measurement, torch.Tensor]:
    """One pass over `ids`: what it took, and the last row's logits."""
    with split.runner.new_cache(1, len(ids)) as cache:
        before = split.backend.stats.as_dict()
        recorder = split.record()
        with recorder.phase("prefill"):
            logits = split.runner.forward(ids[None], cache)[0, -1]
        after = split.backend.stats.as_dict()
    measured = {**recorder.as_dict(), **{key: after[key] - before[key] for key in _COUNTERS}}
    del measured["prefill_s"], measured["decode_s"]
    return measured, logits.clone()


class Prefill(Phase):
    """One forward pass over `ids`. `quick`: a shorter look at the raw sockets."""

    name = "prefill"
    HF = ("hf-eager", "hf-sdpa")
    columns: Columns = (
        ("wall s", 9, lambda m: f"{m['wall_s']:.3f}"),
        *_part_columns("", "s", 1.0),
        ("/sdpa", 8, lambda m: f"{m['wall_to_sdpa']:.3f}"),
        ("/eager", 8, lambda m: f"{m['wall_to_eager']:.3f}"),
        ("calls", 7, lambda m: f"{m['rpc_calls']}"),
        ("sent+recv MB", 14, lambda m: f"{(m['bytes_sent'] + m['bytes_received']) / 1e6:.1f}"),
        ("shared MB", 11, lambda m: f"{m['bytes_shared'] / 1e6:.1f}"),
        ("copied MB", 11, lambda m: f"{m['bytes_copied'] / 1e6:.1f}"),
        ("floor s", 15, lambda m: f"{m['socket_floor_s']:.3f} ({m['communication_to_floor']:.2f}x)"),
        ("error", 9, lambda m: f"{m['logits_error']:.1e}"),
    )

    def __init__(self, ids: torch.Tensor, *, quick: bool = False) -> None:
        self.size, self.rows = {"tokens": len(ids)}, len(ids)
        self.raw_socket_bytes_per_s: dict[str, float] = {}
        self._ids = ids
        self._quick = quick
        self._logits: dict[str, torch.Tensor] = {}

    def look_at_sockets(self) -> None:
        """Measures raw sockets, before and after the systems: the better counts. A quick run does it once."""
        if self._quick and self.raw_socket_bytes_per_s:
            return
        progress("raw sockets")
        for kind in ("unix", "tcp"):
            rate = raw_bytes_per_s(kind, quick=self._quick)
            self.raw_socket_bytes_per_s[kind] = max(rate, self.raw_socket_bytes_per_s.get(kind, 0.0))

    def warm_up(self, system: System) -> None:
        self._run(system, self._ids[: min(_WARM_UP_ROWS, max(len(self._ids) // 8, 1))])

    def run(self, system: System) -> Measurement:
        measured, self._logits[system.name] = self._run(system, self._ids)
        return measured

    @staticmethod
    def _run(system: System, ids: torch.Tensor) -> tuple[Measurement, torch.Tensor]:
        if system.split is not None:
            return run_prefill(system.split, ids)
        assert system.hf is not None
        reply = system.hf.call("prefill", ids, attention=system.name.removeprefix("hf-"))
        return {"wall_s": reply.attrs["wall_s"]}, reply[0].clone()

    def compare(self, measured: Mapping[str, Measurement]) -> None:
        for name, one in measured.items():
            for hf in self.HF:
                if hf in measured:
                    one[f"wall_to_{hf.removeprefix('hf-')}"] = one["wall_s"] / measured[hf]["wall_s"]
            if "hf-eager" in measured:
                logits, reference = self._logits[name], self._logits["hf-eager"]
                one["logits_error"] = float((logits - reference).abs().max() / reference.abs().max())

    def summary(self, row: Mapping[str, Any], rounds: Sequence[Measurement]) -> Measurement:
        found = super().summary(row, rounds)
        rate = self.raw_socket_bytes_per_s.get(row["link"] or "")
        if rate is not None:  # neither shared memory nor a rival's sockets: these have buffers of their own
            found["socket_floor_s"] = (found["bytes_sent"] + found["bytes_received"]) / rate
            found["communication_to_floor"] = found["communication_s"] / found["socket_floor_s"]
        return found


class Decode(Phase):
    """`new_tokens` after a prompt of `ids`."""

    name = "decode"
    HF = ("hf-sdpa", "hf-eager", "hf-loop")
    columns: Columns = (
        ("wall s", 9, lambda m: f"{m['wall_s']:.3f}"),
        ("ms/token", 10, lambda m: f"{m['step_s'] * 1e3:.3f}"),
        ("tok/s", 8, lambda m: f"{m['tokens_per_s']:.1f}"),
        ("/sdpa", 8, lambda m: f"{m['step_to_sdpa']:.3f}"),
        ("/eager", 8, lambda m: f"{m['step_to_eager']:.3f}"),
        ("/loop", 8, lambda m: f"{m['step_to_loop']:.3f}"),
        *_part_columns("step_", "ms", 1e3),
        ("calls", 7, lambda m: f"{m['calls_per_token']:.0f}"),
        ("kB/token", 10, lambda m: f"{(m['step_bytes_sent'] + m['step_bytes_received']) / 1e3:.1f}"),
        ("same", 6, lambda m: "yes" if m["same_tokens"] else "no"),
    )

    def __init__(self, ids: torch.Tensor, new_tokens: int) -> None:
        self.size, self.rows = {"prompt_tokens": len(ids), "tokens": new_tokens}, len(ids)
        self._ids = ids
        self._new_tokens = new_tokens
        self._tokens: dict[str, list[int]] = {}

    def warm_up(self, system: System) -> None:
        self._run(system, min(_WARM_UP_TOKENS, self._new_tokens))

    def run(self, system: System) -> Measurement:
        self._tokens[system.name], measured = self._run(system, self._new_tokens)
        measured["step_s"] = measured["decode_s"] / (self._new_tokens - 1)
        measured["tokens_per_s"] = 1 / measured["step_s"]
        return measured

    def compare(self, measured: Mapping[str, Measurement]) -> None:
        reference = next((hf for hf in self.HF if hf in measured), None)
        for name, one in measured.items():
            for hf in self.HF:
                if hf in measured:
                    one[f"step_to_{hf.removeprefix('hf-')}"] = one["step_s"] / measured[hf]["step_s"]
            if reference is not None:
                one["same_tokens"] = self._tokens[name] == self._tokens[reference]

    def _run(self, system: System, new_tokens: int) -> tuple[list[int], Measurement]:
        if system.split is not None:
            return self._run_split(system.split, new_tokens)
        assert system.hf is not None
        attention, by = (
            ("sdpa", "forward") if system.name == "hf-loop" else (system.name.removeprefix("hf-"), "generate")
        )
        reply = system.hf.call("generate", self._ids, attention=attention, by=by, new_tokens=new_tokens)
        return reply[0].tolist(), {name: reply.attrs[name] for name in ("wall_s", "decode_s")}

    def _run_split(self, split: Split, new_tokens: int) -> tuple[list[int], Measurement]:
        recorder, steps = split.record(), new_tokens - 1
        marks: list[tuple[dict[str, Any], dict[str, Any]]] = []

        def mark(_: object = None) -> None:
            marks.append((recorder.as_dict(), split.backend.stats.as_dict()))

        started_ns = perf_counter_ns()
        tokens = list(split.runner.generate(self._ids, new_tokens, ignore_eos=True, on_prefill=mark))
        wall_s = (perf_counter_ns() - started_ns) * 1e-9
        mark()
        (first, sent_first), (last, sent_last) = marks
        measured: Measurement = {"wall_s": wall_s, "decode_s": last["decode_s"]}
        for _, part in _PARTS:
            measured[f"step_{part}_s"] = (last[f"{part}_s"] - first[f"{part}_s"]) / steps
        for key in ("bytes_sent", "bytes_received"):
            measured[f"step_{key}"] = (sent_last[key] - sent_first[key]) / steps
        measured["calls_per_token"] = (last["rpc_calls"] - first["rpc_calls"]) / steps
        before = {name: first["ops"].get(name, {"total_s": 0.0})["total_s"] for name in last["ops"]}
        measured["step_ops"] = {
            name: {"side": op["side"], "total_s": (op["total_s"] - before[name]) / steps}
            for name, op in last["ops"].items()
        }
        return tokens, measured

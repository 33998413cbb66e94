"""Decoding by every system of benches.split_systems: milliseconds for each token after the first, and where they go.

How it is measured. Batch 1, greedy, as many new tokens as asked for: no token ends the sequence. hf-sdpa and hf-eager
are `generate` with its cache; hf-loop is the model's forward (sdpa) called in a loop with its cache, which leaves out
what `generate` does beside the model. Ratios are to all three. The numbers of a decode step are the run's without its
prefill's.

What the columns are. wall s: the whole run, prompt, opening and closing of the cache included. decode s: the part after
the first token. ms/token: of that part, for each further token. tok/s: its inverse. /sdpa, /eager, /loop: ms/token over
HF's in the same round. Then where a decode step's ms/token go: comm, serial (this side's serialization), gpu (the
executor's handlers), tee. calls: for each token. RSS, PSS, others: as in split_prefill. same: whether the tokens are
those of HF in the same attention as the ratios' first (hf-sdpa, else hf-eager, hf-loop). Below the table: ms/token by
operation, and what each connection really had, and why.
"""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter_ns
from typing import Any

import torch

from .measurements import Columns, Measurement
from .split_systems import CIRCUMSTANCES, Phase, System
from .splits import Split

__all__ = ["HF", "Decode"]

HF = {"hf-sdpa": ("sdpa", "generate"), "hf-eager": ("eager", "generate"), "hf-loop": ("sdpa", "forward")}
"""System -> attention, and what generates."""

_WARM_UP_TOKENS = 8
_PARTS = ("communication_s", "serialization_s", "gpu_compute_s", "tee_compute_s")


class Decode(Phase):
    """`new_tokens` after a prompt of `ids`."""

    name = "decode"
    ops_key = "step_ops"
    ops_unit = ("ms/token", 1e3)
    columns: Columns = (
        ("wall s", 9, lambda m: f"{m['wall_s']:.3f}"),
        ("decode s", 10, lambda m: f"{m['decode_s']:.3f}"),
        ("ms/token", 10, lambda m: f"{m['step_s'] * 1e3:.3f}"),
        ("tok/s", 8, lambda m: f"{m['tokens_per_s']:.1f}"),
        ("/sdpa", 8, lambda m: f"{m['step_to_sdpa']:.3f}"),
        ("/eager", 8, lambda m: f"{m['step_to_eager']:.3f}"),
        ("/loop", 8, lambda m: f"{m['step_to_loop']:.3f}"),
        ("comm ms", 9, lambda m: f"{m['step_communication_s'] * 1e3:.3f}"),
        ("serial ms", 11, lambda m: f"{m['step_serialization_s'] * 1e3:.3f}"),
        ("gpu ms", 8, lambda m: f"{m['step_gpu_compute_s'] * 1e3:.3f}"),
        ("tee ms", 8, lambda m: f"{m['step_tee_compute_s'] * 1e3:.3f}"),
        ("calls", 7, lambda m: f"{m['calls_per_token']:.0f}"),
        *CIRCUMSTANCES,
        ("same", 6, lambda m: "yes" if m["same_tokens"] else "no"),
    )

    def __init__(self, ids: torch.Tensor, new_tokens: int) -> None:
        self.size = {"prompt_tokens": len(ids), "tokens": new_tokens}
        self._ids = ids
        self._new_tokens = new_tokens
        self._tokens: dict[str, list[int]] = {}

    def warm_up(self, system: System) -> None:
        _run(system, self._ids, min(_WARM_UP_TOKENS, self._new_tokens))

    def run(self, system: System) -> Measurement:
        self._tokens[system.name], measured = _run(system, self._ids, self._new_tokens)
        measured["step_s"] = measured["decode_s"] / (self._new_tokens - 1)
        measured["tokens_per_s"] = 1 / measured["step_s"]
        return measured

    def compare(self, measured: Mapping[str, Measurement]) -> None:
        reference = next((hf for hf in HF if hf in measured), None)
        for name, one in measured.items():
            for hf in HF:
                if hf in measured:
                    one[f"step_to_{hf.removeprefix('hf-')}"] = one["step_s"] / measured[hf]["step_s"]
            if reference is not None:
                ours, theirs = self._tokens[name], self._tokens[reference]
                one["same_tokens"] = ours == theirs
                one["first_other_token"] = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), None)


def _run(system: System, ids: torch.Tensor, new_tokens: int) -> tuple[list[int], Measurement]:
    if system.split is not None:
        return _run_split(system.split, ids, new_tokens)
    assert system.hf is not None
    attention, by = HF[system.name]
    reply = system.hf.call("generate", ids, attention=attention, by=by, new_tokens=new_tokens)
    return reply[0].tolist(), {name: reply.attrs[name] for name in ("wall_s", "decode_s")}


def _run_split(split: Split, ids: torch.Tensor, new_tokens: int) -> tuple[list[int], Measurement]:
    recorder = split.record()
    prefill: dict[str, Any] = {}

    def keep_prefill(_: object) -> None:
        prefill.update(recorder.as_dict())

    started_ns = perf_counter_ns()
    tokens = list(split.runner.generate(ids, new_tokens, ignore_eos=True, on_prefill=keep_prefill))
    wall_s = (perf_counter_ns() - started_ns) * 1e-9
    steps = new_tokens - 1
    report = recorder.as_dict()
    measured: Measurement = {"wall_s": wall_s, "decode_s": report["decode_s"]}
    for part in _PARTS:
        measured[f"step_{part}"] = (report[part] - prefill[part]) / steps
    measured["calls_per_token"] = (report["rpc_calls"] - prefill["rpc_calls"]) / steps
    nothing = {"total_s": 0.0}
    measured["step_ops"] = {
        name: {"side": op["side"], "total_s": (op["total_s"] - prefill["ops"].get(name, nothing)["total_s"]) / steps}
        for name, op in report["ops"].items()
    }
    return tokens, measured

"""A prefill, side by side: fastsplit, both rivals, and HF in one process, on the same weights in the same run.

    python -m benches.bench_prefill                      TinyLlama-1.1B's shape, 1024 tokens, fp32: about 15 minutes
    python -m benches.bench_prefill --model random:tiny --prefill 200 --rounds 1
    python -m benches.bench_prefill --plan folded fused --only shm hf        those whose names have that in them

How it is measured. Three processes: this one is the TEE side and drives one `Runner` a system; one executor serves
fastsplit and the rivals out of one copy of the weights; one runs HF. Only one system is at work at any moment. Every
system first runs a short prompt untimed; then come the rounds, each with every system once, every other round in the
reverse order, so that what drifts on the machine does not favour one of them. The table shows medians; the JSON has
every round.

Fastsplit's systems are named by link and plan: over a unix socket with shared memory (shm-folded, one for each of
--plan) and without (unix-), and over tcp (tcp-), these two with the first of --plan. Below the table stands what each
of them really had, and why.

What the columns are. wall, comm, serial, gpu, tee: seconds, the first being the sum of the others; serialization is
this side's, the executor's own is within communication. comm %: communication and serialization, of the wall. /sdpa,
/eager: the wall over that of HF in the same round; the median of these ratios. sent+recv: bytes through the socket.
shared: bytes of tensors that crossed by reference, in shared memory. copied: bytes of tensors that this side's code
copied to send or receive them. staged: fastsplit's bytes that came in the same read as a frame's head. floor: how long
a bare sendall / recv_into loop over the same kind of socket, measured in this run, needs for those bytes (8 MiB
messages out of and into 128 MiB, so that no cache flatters it), and how many times that the communication took. RSS:
the most memory while the system ran, of this process and of the one with the weights, which both keep buffers from one
run to the next, also those of other systems; shared memory counts in both. PSS: the same right after the run, with what
is shared counted once, by halves: the sum is what both really hold, to be compared with HF's. Memory of one system
alone: --only its name. others: CPU seconds that other programs used meanwhile, more than a few tenths of which spoil
the row. error: the last row's logits against HF's eager, max |difference| / max |logit|.

HF runs with `use_cache=True` and `logits_to_keep=1`, as the split fills its KV cache and computes one row of logits; in
inference mode, with as many threads and the same weights, in the dtype as it is.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import fastsplit
from fastsplit.models import DTYPES, open_model
from fastsplit.ops import PLANS

from . import UNTOUCHED
from .environment import save
from .processes import OthersCpu, peak_rss_bytes, process, reset_peak_rss
from .rivals.raw_socket import one_way_bytes_per_s
from .rounds import progress
from .splits import LINKS, RIVALS, Split, environment, memory, open_splits

__all__ = ["SYSTEMS", "main", "systems_of"]

REFERENCE = "hf-eager"
HF = (REFERENCE, "hf-sdpa")
DEFAULT_PLANS = ("folded",)


def systems_of(plans: Sequence[str]) -> list[str]:
    """The names of all systems, fastsplit's over shared memory in each of these plans."""
    others = [f"{link}-{plans[0]}" for link in LINKS if link != "shm"]
    return [*(f"shm-{plan}" for plan in plans), *others, *RIVALS, *HF]


SYSTEMS = tuple(systems_of(DEFAULT_PLANS))

_WARM_UP_TOKENS = 64
_COUNTERS = ("calls", "bytes_sent", "bytes_received", "bytes_shared", "bytes_copied", "bytes_staged")

Measurement = dict[str, Any]
"""One prefill: seconds, counts and bytes by name."""


@dataclass
class System:
    """One way to run a prefill. `run` returns what it measured, and the last position's logits [vocab] fp32."""

    name: str
    run: Callable[[torch.Tensor], tuple[Measurement, torch.Tensor]]
    worker_pid: int
    shm: bool | None = None
    """Whether tensors crossed in shared memory; None where that is no question."""
    shm_reason: str = ""
    rounds: list[Measurement] = field(default_factory=list)


# ---- systems ---------------------------------------------------------------------------------------------------------


def _split_system(split: Split) -> System:
    def run(ids: torch.Tensor) -> tuple[Measurement, torch.Tensor]:
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

    return System(split.name, run, split.worker_pid, split.shm, split.shm_reason)


def _hf_system(name: str, channel: fastsplit.Channel, worker_pid: int) -> System:
    def run(ids: torch.Tensor) -> tuple[Measurement, torch.Tensor]:
        reply = channel.call("prefill", ids, attention=name.removeprefix("hf-"))
        return {"wall_s": reply.attrs["wall_s"]}, reply[0].clone()

    return System(name, run, worker_pid)


def _open_systems(stack: ExitStack, names: list[str], args: argparse.Namespace) -> list[System]:
    systems: list[System] = []
    split_names = [name for name in names if name not in HF]
    if split_names:
        progress("starting the executor")
        splits = open_splits(stack, split_names, args.model, args.dtype, threads=args.threads, device=args.device)
        systems += map(_split_system, splits)
    if len(split_names) < len(names):
        progress("starting HF")
        options = ["--model", args.model, "--dtype", args.dtype, "--threads", str(args.threads)]
        hf = stack.enter_context(process("benches.rivals.hf", *options, environment=UNTOUCHED))
        channel = stack.enter_context(fastsplit.connect(hf.ready, call_timeout_s=600))
        systems += [_hf_system(name, channel, hf.pid) for name in names if name in HF]
    return systems


# ---- measuring -------------------------------------------------------------------------------------------------------


def _measure(systems: list[System], ids: torch.Tensor, rounds: int) -> None:
    for system in systems:
        progress(f"warming up {system.name}")
        system.run(ids[:_WARM_UP_TOKENS])
    for number in range(rounds):
        logits = {}
        for system in systems if number % 2 == 0 else reversed(systems):
            gc.collect()
            for pid in (os.getpid(), system.worker_pid):
                reset_peak_rss(pid)
            others = OthersCpu(os.getpid(), system.worker_pid)
            measured, logits[system.name] = system.run(ids)
            measured["others_cpu_s"] = others.seconds()
            measured["tee_peak_rss_bytes"] = None if system.name.startswith("hf-") else peak_rss_bytes(os.getpid())
            measured["worker_peak_rss_bytes"] = peak_rss_bytes(system.worker_pid)
            measured.update(memory(system.worker_pid, "worker"))
            if not system.name.startswith("hf-"):
                measured.update(memory(os.getpid(), "tee"))
            system.rounds.append(measured)
            progress(f"round {number + 1} of {rounds}: {system.name} {measured['wall_s']:.2f} s")
        walls = {system.name: system.rounds[-1]["wall_s"] for system in systems}
        for system in systems:
            for name in HF:
                if name in walls:
                    ratio = walls[system.name] / walls[name]
                    system.rounds[-1][f"wall_to_{name.removeprefix('hf-')}"] = ratio
            if REFERENCE in logits:
                reference = logits[REFERENCE]
                error = (logits[system.name] - reference).abs().max() / reference.abs().max()
                system.rounds[-1]["logits_error"] = float(error)
                system.rounds[-1]["same_top_token"] = bool(logits[system.name].argmax() == reference.argmax())


def _median(rounds: list[Measurement]) -> Measurement:
    """The median of each number; of what is nested (ops) and not a number, nothing."""
    return {
        key: statistics.median(measured[key] for measured in rounds)
        for key, value in rounds[0].items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _raw_sockets() -> dict[str, float]:
    """Bytes per second by kind of socket; "cached" is one 8 MiB buffer over and over, which no prefill can have."""
    rates = {}
    for kind in ("unix", "tcp"):
        rates[kind] = one_way_bytes_per_s(kind)
        rates[f"{kind} cached"] = one_way_bytes_per_s(kind, buffers=1)
    return rates


def _with_floor(name: str, median: Measurement, raw_bytes_per_s: dict[str, float]) -> Measurement:
    kind = name.partition("-")[0]
    if kind not in raw_bytes_per_s:
        return median
    floor_s = (median["bytes_sent"] + median["bytes_received"]) / raw_bytes_per_s[kind]
    return {
        **median,
        "socket_floor_s": floor_s,
        "communication_to_floor": median["communication_s"] / floor_s,
    }


# ---- the table -------------------------------------------------------------------------------------------------------

_COLUMNS: tuple[tuple[str, int, Callable[[Measurement], str | None]], ...] = (
    ("wall s", 9, lambda m: f"{m['wall_s']:.3f}"),
    ("comm s", 9, lambda m: f"{m['communication_s']:.3f}"),
    ("serial s", 10, lambda m: f"{m['serialization_s']:.4f}"),
    ("gpu s", 9, lambda m: f"{m['gpu_compute_s']:.3f}"),
    ("tee s", 8, lambda m: f"{m['tee_compute_s']:.3f}"),
    ("comm %", 8, lambda m: f"{100 * m['communication_share']:.1f}"),
    ("/sdpa", 8, lambda m: f"{m['wall_to_sdpa']:.3f}"),
    ("/eager", 8, lambda m: f"{m['wall_to_eager']:.3f}"),
    ("RPCs", 6, lambda m: f"{m['rpc_calls']:.0f}"),
    ("sent+recv MB", 14, lambda m: f"{(m['bytes_sent'] + m['bytes_received']) / 1e6:.1f}"),
    ("shared MB", 11, lambda m: f"{m['bytes_shared'] / 1e6:.1f}"),
    ("copied MB", 11, lambda m: f"{m['bytes_copied'] / 1e6:.1f}"),
    ("staged kB", 11, lambda m: f"{m['bytes_staged'] / 1e3:.1f}"),
    ("floor s", 15, lambda m: f"{m['socket_floor_s']:.3f} ({m['communication_to_floor']:.2f}x)"),
    ("RSS GB", 12, lambda m: f"{m.get('tee_peak_rss_bytes', 0) / 1e9:.1f}+{m['worker_peak_rss_bytes'] / 1e9:.1f}"),
    ("PSS GB", 12, lambda m: f"{m.get('tee_pss_bytes', 0) / 1e9:.1f}+{m['worker_pss_bytes'] / 1e9:.1f}"),
    ("others s", 10, lambda m: f"{m['others_cpu_s']:.1f}"),
    ("error", 9, lambda m: f"{m['logits_error']:.1e}"),
)


def _table(medians: dict[str, Measurement]) -> str:
    lines = [f"{'system':<15}" + "".join(f"{title:>{width}}" for title, width, _ in _COLUMNS)]
    for name, median in medians.items():
        cells = []
        for _, width, text_of in _COLUMNS:
            try:
                text = text_of(median)
            except KeyError:  # HF has no communication, the rivals no floor
                text = "-"
            cells.append(f"{text:>{width}}")
        lines.append(f"{name:<15}" + "".join(cells))
    return "\n".join(lines)


# ---- the command -----------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m benches.bench_prefill", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="random:tinyllama-1.1b", help="a HF directory, or random:PRESET[@SEED]")
    parser.add_argument("--prefill", type=int, default=1024, metavar="N", help="how many random ids (default: 1024)")
    parser.add_argument("--seed", type=int, default=0, help="of the ids")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--device", default="cpu", help="the executor's: auto, cpu or cuda:N; HF is on the CPU")
    parser.add_argument("--threads", type=int, default=0, help="torch's, in every process; 0: one for each core")
    parser.add_argument(
        "--plan", nargs="+", default=list(DEFAULT_PLANS), choices=PLANS, help="fastsplit's; the rivals are batched"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="systems with TEXT in their names")
    parser.add_argument("--output", type=Path, help="the JSON file (default: benches/results/prefill-...json)")
    args = parser.parse_args(argv)
    if args.prefill < 1 or args.rounds < 1:
        parser.error("--prefill and --rounds must be 1 or more")
    known = systems_of(list(dict.fromkeys(args.plan)))
    names = [name for name in known if not args.only or any(text in name for text in args.only)]
    if not names:
        parser.error(f"--only {' '.join(args.only)}: no such system, of {', '.join(known)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    circumstances = environment("benches.bench_prefill", argv)
    vocab_size = open_model(args.model).config.vocab_size
    ids = torch.randint(0, vocab_size, (args.prefill,), generator=torch.Generator().manual_seed(args.seed))
    raw_before = _raw_sockets()
    with torch.inference_mode(), ExitStack() as stack:
        systems = _open_systems(stack, names, args)
        _measure(systems, ids, args.rounds)
    # The floor belongs to the run as a whole: before and after, the better of the two.
    raw_bytes_per_s = {name: max(rate, raw_before[name]) for name, rate in _raw_sockets().items()}
    medians = {system.name: _with_floor(system.name, _median(system.rounds), raw_bytes_per_s) for system in systems}
    circumstances["load_average_after"] = os.getloadavg()
    result = {
        "environment": circumstances,
        "options": {name: value for name, value in vars(args).items() if name != "output"},
        "raw_socket_bytes_per_s": raw_bytes_per_s,
        "links": {system.name: {"shm": system.shm, "reason": system.shm_reason} for system in systems},
        "medians": medians,
        "rounds": {system.name: system.rounds for system in systems},
    }
    output = save("prefill", result, args.output)
    print(_table(medians))
    rates = ", ".join(f"{kind} {rate / 1e9:.2f} GB/s" for kind, rate in raw_bytes_per_s.items())
    print()
    for system in systems:
        if system.shm is not None:
            print(f"{system.name}, shared memory: {system.shm_reason}")
    print(f"\n{args.model}, {args.prefill} tokens, {args.dtype}, medians of {args.rounds}; raw socket: {rates}")
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())

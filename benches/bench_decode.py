"""Decoding, side by side: fastsplit in its plans over shared memory, and HF in one process, on the same weights.

    python -m benches.bench_decode                      SmolLM2-135M, 32 tokens and 128 new ones, fp32: about 5 minutes
    python -m benches.bench_decode --model random:tiny --new-tokens 16 --rounds 1
    python -m benches.bench_decode --dtype float32 bfloat16 --plan folded linear --only shm hf-sdpa

The default model is the demo's, out of its package (see demo/smollm2.py).

How it is measured. For each dtype three processes: this one is the TEE side and drives one `Runner` a plan, all over
one connection; one is the executor; one runs HF. Only one system is at work at any moment. Every system first generates
a few tokens untimed; then come the rounds, each with every system once, every other round in the reverse order. Batch
1, greedy, as many new tokens as asked for: no token ends the sequence. The table shows medians; the JSON has every
round.

hf-sdpa and hf-eager are `generate` with its cache; hf-loop is the model's forward (sdpa) called in a loop with its
cache, which leaves out what `generate` does beside the model. Ratios are to all three.

What the columns are. wall s: the whole run, prompt, opening and closing of the cache included. decode s: the part after
the first token. ms/token: of that part, for each further token. tok/s: its inverse. /sdpa, /eager, /loop: ms/token over
HF's in the same round; the median of these ratios. Then where a decode step's ms/token go: comm, serial (this side's
serialization), gpu (the executor's handlers), tee. calls: for each token. same: whether the tokens are those of HF in
the same attention as the ratios' first (hf-sdpa, else hf-eager, hf-loop). Below the table: ms/token by operation. The
numbers of a decode step are the run's without its prefill's.

--spin-us is FASTSPLIT_SPIN_US for both sides: how long whoever waits spins before it sleeps. --tee-threads 1 leaves the
cores to the executor: OpenMP's threads spin for a while after each parallel region, also where there is no work left,
and with as many threads as cores on either side they do so on the other side's core. OMP_WAIT_POLICY and the like are
inherited by all processes, and stand in the JSON.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import torch

import fastsplit
from fastsplit.models import DTYPES, open_model
from fastsplit.ops import PLANS

from . import UNTOUCHED
from .environment import save
from .processes import OthersCpu, process
from .rounds import progress
from .splits import LINKS, RIVALS, Split, environment, open_splits

__all__ = ["main"]

HF = {"hf-sdpa": ("sdpa", "generate"), "hf-eager": ("eager", "generate"), "hf-loop": ("sdpa", "forward")}
"""System -> attention, and what generates."""

_WARM_UP_TOKENS = 8
_PARTS = ("communication_s", "serialization_s", "gpu_compute_s", "tee_compute_s")

Measurement = dict[str, Any]


@dataclass
class System:
    """One way to generate. `run(ids, new_tokens)` returns the tokens and what it measured."""

    name: str
    run: Callable[[torch.Tensor, int], tuple[list[int], Measurement]]
    worker_pid: int
    plan_reason: str = ""
    rounds: list[Measurement] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


# ---- systems ---------------------------------------------------------------------------------------------------------


def _split_system(split: Split) -> System:
    def run(ids: torch.Tensor, new_tokens: int) -> tuple[list[int], Measurement]:
        recorder = split.record()
        prefill: dict[str, Any] = {}
        started_ns = perf_counter_ns()
        tokens = list(
            split.runner.generate(
                ids, new_tokens, ignore_eos=True, on_prefill=lambda _: prefill.update(recorder.as_dict())
            )
        )
        wall_s = (perf_counter_ns() - started_ns) * 1e-9
        steps = max(new_tokens - 1, 1)
        report = recorder.as_dict()
        measured: Measurement = {"wall_s": wall_s, "decode_s": report["decode_s"]}
        for part in _PARTS:
            measured[f"step_{part}"] = (report[part] - prefill[part]) / steps
        measured["calls_per_token"] = (report["rpc_calls"] - prefill["rpc_calls"]) / steps
        measured["step_ops"] = {
            name: {
                "side": op["side"],
                "seconds": (op["total_s"] - prefill["ops"].get(name, {"total_s": 0.0})["total_s"]) / steps,
            }
            for name, op in report["ops"].items()
        }
        return tokens, measured

    return System(split.name, run, split.worker_pid, split.runner.plan_reason)


def _hf_system(name: str, channel: fastsplit.Channel, worker_pid: int) -> System:
    attention, by = HF[name]

    def run(ids: torch.Tensor, new_tokens: int) -> tuple[list[int], Measurement]:
        reply = channel.call("generate", ids, attention=attention, by=by, new_tokens=new_tokens)
        return reply[0].tolist(), {name: reply.attrs[name] for name in ("wall_s", "decode_s")}

    return System(name, run, worker_pid)


def _open_systems(stack: ExitStack, names: list[str], dtype: str, args: argparse.Namespace) -> list[System]:
    systems: list[System] = []
    split_names = [name for name in names if name not in HF]
    if split_names:
        progress(f"starting the executor, {dtype}")
        splits = open_splits(stack, split_names, args.model, dtype, threads=args.threads, device=args.device)
        systems += map(_split_system, splits)
    if len(split_names) < len(names):
        progress(f"starting HF, {dtype}")
        options = ["--model", args.model, "--dtype", dtype, "--threads", str(args.threads)]
        hf = stack.enter_context(process("benches.rivals.hf", *options, environment=UNTOUCHED))
        channel = stack.enter_context(fastsplit.connect(hf.ready, call_timeout_s=600))
        systems += [_hf_system(name, channel, hf.pid) for name in names if name in HF]
    return systems


# ---- measuring -------------------------------------------------------------------------------------------------------


def _measure(systems: list[System], ids: torch.Tensor, new_tokens: int, rounds: int) -> None:
    for system in systems:
        progress(f"warming up {system.name}")
        system.run(ids, min(_WARM_UP_TOKENS, new_tokens))
    for number in range(rounds):
        for system in systems if number % 2 == 0 else reversed(systems):
            others = OthersCpu(os.getpid(), system.worker_pid)
            system.tokens, measured = system.run(ids, new_tokens)
            measured["others_cpu_s"] = others.seconds()
            measured["step_s"] = measured["decode_s"] / max(new_tokens - 1, 1)
            measured["tokens_per_s"] = 1 / measured["step_s"] if new_tokens > 1 else 0.0
            system.rounds.append(measured)
            progress(f"round {number + 1} of {rounds}: {system.name} {measured['step_s'] * 1e3:.2f} ms/token")
        by_name = {system.name: system for system in systems}
        reference = next((by_name[name] for name in HF if name in by_name), None)
        for system in systems:
            measured = system.rounds[-1]
            for name in HF:
                if name in by_name:
                    ratio = measured["step_s"] / by_name[name].rounds[-1]["step_s"]
                    measured[f"step_to_{name.removeprefix('hf-')}"] = ratio
            if reference is not None:
                pairs = list(zip(system.tokens, reference.tokens))
                measured["same_tokens"] = system.tokens == reference.tokens
                measured["first_other_token"] = next(
                    (i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), None
                )


def _median(rounds: list[Measurement]) -> Measurement:
    """The median of each number; whether all tokens were the same; by operation the medians, too."""
    median: Measurement = {}
    for key, value in rounds[0].items():
        values = [measured[key] for measured in rounds]
        if isinstance(value, bool):
            median[key] = all(values)
        elif isinstance(value, float):
            median[key] = statistics.median(values)
        elif isinstance(value, dict):
            median[key] = {
                name: {**op, "seconds": statistics.median(ops[name]["seconds"] for ops in values)}
                for name, op in value.items()
            }
    return median


# ---- the table -------------------------------------------------------------------------------------------------------

_COLUMNS: tuple[tuple[str, int, Callable[[Measurement], str]], ...] = (
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
    ("others s", 10, lambda m: f"{m['others_cpu_s']:.1f}"),
    ("same", 6, lambda m: "yes" if m["same_tokens"] else "no"),
)


def _table(medians: dict[str, Measurement]) -> str:
    lines = [f"{'system':<14}" + "".join(f"{title:>{width}}" for title, width, _ in _COLUMNS)]
    for name, median in medians.items():
        cells = []
        for _, width, text_of in _COLUMNS:
            try:
                text = text_of(median)
            except (KeyError, TypeError):  # HF has no communication; without HF there are no ratios
                text = "-"
            cells.append(f"{text:>{width}}")
        lines.append(f"{name:<14}" + "".join(cells))
    return "\n".join(lines)


def _by_operation(medians: dict[str, Measurement]) -> str:
    lines = []
    for name, median in medians.items():
        ops = median.get("step_ops", {})
        for side in ("tee", "gpu"):
            parts = sorted(((op["seconds"], of) for of, op in ops.items() if op["side"] == side), reverse=True)
            if parts:
                text = ", ".join(f"{of} {seconds * 1e3:.3f}" for seconds, of in parts)
                lines.append(f"{name}, {side}, ms/token: {text}")
    return "\n".join(lines)


# ---- the command -----------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benches.bench_decode", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a HF directory, or random:PRESET[@SEED] (default: the demo's)")
    parser.add_argument("--prompt-tokens", type=int, default=32, metavar="N", help="how many random ids (default: 32)")
    parser.add_argument("--new-tokens", type=int, default=128, metavar="N", help="default: 128")
    parser.add_argument("--seed", type=int, default=0, help="of the ids")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=DTYPES, help="one after another")
    parser.add_argument("--device", default="cpu", help="the executor's: auto, cpu or cuda:N; HF is on the CPU")
    parser.add_argument("--threads", type=int, default=0, help="torch's, in every process; 0: one for each core")
    parser.add_argument("--tee-threads", type=int, metavar="N", help="those of this process, if not --threads")
    parser.add_argument("--plan", nargs="+", default=["folded", "fused", "linear", "batched"], choices=PLANS)
    parser.add_argument("--link", nargs="+", default=["shm"], choices=LINKS)
    parser.add_argument("--rivals", action="store_true", help=f"also {', '.join(RIVALS)}")
    parser.add_argument("--spin-us", type=float, metavar="US", help="FASTSPLIT_SPIN_US of both sides")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="systems with TEXT in their names")
    parser.add_argument("--output", type=Path, help="the JSON file (default: benches/results/decode-...json)")
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    args = parser.parse_args(argv)
    if args.prompt_tokens < 1 or args.new_tokens < 2 or args.rounds < 1:
        parser.error("--prompt-tokens and --rounds must be 1 or more, --new-tokens 2 or more")
    known = [f"{link}-{plan}" for link in args.link for plan in dict.fromkeys(args.plan)]
    known += [*(RIVALS if args.rivals else ()), *HF]
    names = [name for name in known if not args.only or any(text in name for text in args.only)]
    if not names:
        parser.error(f"--only {' '.join(args.only)}: no such system, of {', '.join(known)}")
    if args.spin_us is not None:
        os.environ["FASTSPLIT_SPIN_US"] = str(args.spin_us)  # the other processes inherit it
    own_threads = args.threads if args.tee_threads is None else args.tee_threads
    if own_threads:
        torch.set_num_threads(own_threads)
    if args.model is None:
        from demo.smollm2 import model_dir

        args.model = str(model_dir())
    circumstances = environment("benches.bench_decode", argv)
    circumstances["spin_us"] = os.environ.get("FASTSPLIT_SPIN_US")
    model = open_model(args.model)
    generator = torch.Generator().manual_seed(args.seed)
    ids = torch.randint(0, model.config.vocab_size, (args.prompt_tokens,), generator=generator)
    results: dict[str, dict[str, Any]] = {}
    for dtype in dict.fromkeys(args.dtype):
        with torch.inference_mode(), ExitStack() as stack:
            systems = _open_systems(stack, names, dtype, args)
            _measure(systems, ids, args.new_tokens, args.rounds)
        medians = {system.name: _median(system.rounds) for system in systems}
        results[dtype] = {
            "medians": medians,
            "plan_reasons": {system.name: system.plan_reason for system in systems if system.plan_reason},
            "rounds": {system.name: system.rounds for system in systems},
            "tokens": {system.name: system.tokens for system in systems},
        }
        print(
            f"{Path(args.model).name}, {dtype}, {args.prompt_tokens} + {args.new_tokens} tokens, {args.rounds} rounds"
        )
        print(_table(medians))
        print(_by_operation(medians))
        for name, reason in results[dtype]["plan_reasons"].items():
            print(f"{name}: {reason}")
        print()
    circumstances["load_average_after"] = os.getloadavg()
    options = {name: value for name, value in vars(args).items() if name not in ("output", "model")}
    result = {"environment": circumstances, "options": {**options, "model": Path(args.model).name}, "dtypes": results}
    print(save("decode", result, args.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())

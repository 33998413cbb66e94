"""What a TEE/GPU split of a model really costs: beside HF in one process, and beside two rivals.

    python -m benches.bench_split                       both parts: half an hour on two cores, 11 GB
    python -m benches.bench_split --quick               the same contestants, fewer tokens, one round: 3 minutes
    python -m benches.bench_split prefill --rounds 2    one part
    python -m benches.bench_split decode --links shm --plans folded minimal --only shm hf-sdpa --output-dir /tmp
    python -m benches.bench_split decode --through 1g   every split over tcp, through a relay (link.py)

    prefill   1024 random ids, TinyLlama-1.1B's shape: fastsplit's plans over shared memory, unix sockets and tcp, the
              rivals, HF's eager and sdpa; in float32 and bfloat16
    decode    48 tokens after 32, SmolLM2-135M as the demo has it: the same, with HF's bare loop; the rivals in float32
              alone

split_systems.py says how systems are measured, split_phases.py what the columns are, ladder.py has the steps from the
original to this one. Each part writes split-PART.json (split-PART-LINK.json through a relay), after every measurement.

--tee-threads 1 leaves the cores to the executor: OpenMP's threads spin for a while after each parallel region, and with
as many threads as cores on either side they do so on the other side's core. OMP_WAIT_POLICY, FASTSPLIT_SPIN_US and the
like are inherited by all processes, and stand in the JSON.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from typing import Any

import torch

from fastsplit.models import DTYPES, open_model

from .environment import add_output, describe, keep_whole
from .link import LINKS as RELAYS
from .split_phases import Decode, Prefill
from .split_systems import DEFAULT_PLANS, Document, Setting, Workers, measure, system_names
from .splits import LINKS, PLAN_NAMES

__all__ = ["PARTS", "main"]

PARTS = {"prefill": Prefill, "decode": Decode}
_KEPT_OPTIONS = ("quick", "plans", "links", "only", "through", "threads", "tee_threads", "device")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benches.bench_split", description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer tokens, one round, float32; decode over shm alone")
    parser.add_argument(
        "--model", help="a HF directory, or random:PRESET[@SEED] (default: random:tinyllama-1.1b; decode: the demo's)"
    )
    parser.add_argument("--tokens", type=int, metavar="N", help="of a prefill (default: 1024; --quick: 256)")
    parser.add_argument("--prompt-tokens", type=int, default=32, metavar="N", help="before decoding (default: 32)")
    parser.add_argument("--new-tokens", type=int, metavar="N", help="of decoding (default: 48; --quick: 16)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="one after another (default: float32 bfloat16)")
    parser.add_argument("--plans", nargs="+", choices=PLAN_NAMES, help="fastsplit's (default: shm all, else some)")
    parser.add_argument("--links", nargs="+", choices=LINKS, help=f"fastsplit's (default: {' '.join(DEFAULT_PLANS)})")
    parser.add_argument("--through", choices=RELAYS, help="tcp alone, all plans, through a link that is relayed")
    parser.add_argument("--rounds", type=int, metavar="N", help="default: 3; --quick: 1")
    parser.add_argument("--once-over", type=float, default=25.0, metavar="S", help="one round is enough (default: 25)")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="systems with TEXT in their names")
    parser.add_argument("--threads", type=int, default=0, help="torch's, in every process; 0: one for each core")
    parser.add_argument("--tee-threads", type=int, metavar="N", help="those of this process, if not --threads")
    parser.add_argument("--device", default="cpu", help="the executor's: auto, cpu or cuda:N; HF is on the CPU")
    add_output(parser, "split-PART.json")
    return parser


def _names(args: argparse.Namespace, part: str, dtype: str) -> list[str]:
    """Of the part's systems those that are asked for."""
    hf = PARTS[part].HF
    if args.through:
        known = [f"tcp-{plan}" for plan in args.plans or PLAN_NAMES] + ["original-tcp", "tuned-tcp"]
    else:
        links = args.links or (["shm"] if args.quick and part == "decode" else list(DEFAULT_PLANS))
        known = system_names(links, args.plans, hf, rivals=part == "prefill" or dtype == "float32")
    return [name for name in known if not args.only or any(text in name for text in args.only)]


def _run(part: str, names: dict[str, list[str]], args: argparse.Namespace, argv: list[str], workers: Workers) -> None:
    """Measures one part. `names`: of the systems, by dtype."""
    model = args.model or "random:tinyllama-1.1b"
    if part == "decode" and args.model is None:
        from demo.smollm2 import model_dir

        model = str(model_dir())
    relay = RELAYS[args.through] if args.through else None
    setting = Setting(model, args.rounds or (1 if args.quick else 3), args.once_over, relay)
    tokens = args.prompt_tokens if part == "decode" else args.tokens or (256 if args.quick else 1024)
    vocab_size = open_model(model).config.vocab_size
    ids = torch.randint(0, vocab_size, (tokens,), generator=torch.Generator().manual_seed(0))
    phase: Any = Prefill(ids, quick=args.quick)
    if part == "decode":
        phase = Decode(ids, args.new_tokens or (16 if args.quick else 48))
    environment = describe(["python", "-m", "benches.bench_split", *argv])
    environment["spin_us"] = os.environ.get("FASTSPLIT_SPIN_US")
    options = {"part": part, "model": setting.model_name, **phase.size, "dtype": list(names), "rounds": setting.rounds}
    options |= {"once_over_s": setting.once_over_s} | {name: getattr(args, name) for name in _KEPT_OPTIONS}
    more: dict[str, Any] = {} if relay is None else {"relay": vars(relay)}
    document = Document(_path(args, part), environment, options, **more)
    look = phase.look_at_sockets if part == "prefill" else lambda: None
    look()
    for dtype, those in names.items():
        print("\n".join(measure(phase, those, dtype, setting, document, workers, finish=look)), end="\n\n")
    if part == "prefill":
        rates = document.content["raw_socket_bytes_per_s"] = phase.raw_socket_bytes_per_s
        print("raw socket:", ", ".join(f"{kind} {rate / 1e9:.2f} GB/s" for kind, rate in rates.items()))
    document.close()


def _path(args: argparse.Namespace, part: str) -> Any:
    return args.output_dir / (f"split-{part}" + (f"-{args.through}" if args.through else "") + ".json")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    args = parser.parse_args(argv)
    parts = list(dict.fromkeys(args.parts)) or list(PARTS)
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"{' '.join(unknown)}: expected {', '.join(PARTS)}")
    paths = [_path(args, part) for part in parts]
    keep_whole(parser, args, ("quick", "only", "links", "plans", "dtype"), paths)
    counts = {"tokens": 1, "prompt_tokens": 1, "new_tokens": 2, "rounds": 1}
    if short := [name for name, least in counts.items() if (getattr(args, name) or least) < least]:
        parser.error(f"--{short[0].replace('_', '-')} must be {counts[short[0]]} or more")
    dtypes = args.dtype or (["float32"] if args.quick or args.through else ["float32", "bfloat16"])
    asked = {part: {dtype: _names(args, part, dtype) for dtype in dict.fromkeys(dtypes)} for part in parts}
    asked = {part: {dtype: names for dtype, names in by.items() if names} for part, by in asked.items()}
    if not any(asked.values()):
        parser.error(f"--only {' '.join(args.only)}: nothing of that name")
    own_threads = args.threads if args.tee_threads is None else args.tee_threads
    if own_threads:
        torch.set_num_threads(own_threads)
    gc.freeze()  # what was imported need not be looked through before every round
    with Workers(args.threads, args.device) as workers:
        for part, names in asked.items():
            if names:
                _run(part, names, args, argv, workers)
    return 0


if __name__ == "__main__":
    sys.exit(main())

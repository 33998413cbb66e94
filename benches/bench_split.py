"""What a TEE/GPU split of a model really costs: beside HF in one process, beside two rivals, step by step.

    python -m benches.bench_split                       everything: three quarters of an hour on two cores, 11 GB
    python -m benches.bench_split --quick               the same contestants, fewer tokens, one round: 4 minutes
    python -m benches.bench_split prefill --rounds 2    one part
    python -m benches.bench_split decode --links shm --plans folded linear --only shm hf-sdpa --output-dir /tmp
    python -m benches.bench_split --model random:tiny --quick --output-dir /tmp

    prefill   1024 random ids, TinyLlama-1.1B's shape: fastsplit's plans over shared memory, unix sockets and tcp, the
              rivals, HF's eager and sdpa; in float32 and bfloat16      (split_prefill.py: what the columns are)
    decode    48 tokens after 32, SmolLM2-135M as the demo has it: the same, with HF's bare loop; the rivals in float32
              alone                                                     (split_decode.py)
    ladder    the steps from the original system to this one, one row each, on loopback and at 1 Gbit/s, beside what
              was predicted of them, in float32                         (split_ladder.py)

split_systems.py has how systems are measured. Each part writes split-PART.json, into build/bench/ or --output-dir, and
after every measurement, so that who ends it keeps what there is; a part that is measured again begins anew. In the
table are medians, in the JSON also every round.

--spin-us is FASTSPLIT_SPIN_US for both sides: how long whoever waits spins before it sleeps. --tee-threads 1 leaves the
cores to the executor: OpenMP's threads spin for a while after each parallel region, also where there is no work left,
and with as many threads as cores on either side they do so on the other side's core. OMP_WAIT_POLICY and the like are
inherited by all processes, and stand in the JSON.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastsplit.models import DTYPES, open_model
from fastsplit.split.ops import PLANS

from .environment import add_output_dir, describe, keep_whole
from .split_decode import HF as DECODE_HF
from .split_decode import Decode
from .split_ladder import EXECUTOR_OF, STEPS, climb
from .split_prefill import HF as PREFILL_HF
from .split_prefill import Prefill
from .split_systems import DEFAULT_PLANS, Document, Setting, measure, system_names
from .splits import LINKS
from .workers import Workers

__all__ = ["PARTS", "main"]

PARTS = ("prefill", "decode", "ladder")

_KEPT_OPTIONS = ("plans", "links", "only", "seed", "threads", "tee_threads", "device")
_MODEL = "random:tinyllama-1.1b"
_QUICK_LADDER_TOKENS = 192
"""The fewest of which two stretches can be under way at once."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benches.bench_split", description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer tokens, one round, float32; decode over shm alone")
    parser.add_argument(
        "--model", help=f"a HF directory, or random:PRESET[@SEED] (default: {_MODEL}; decode: the demo's)"
    )
    parser.add_argument(
        "--tokens", type=int, metavar="N", help="of a prefill (default: 1024; --quick: 256, ladder 192)"
    )
    parser.add_argument("--prompt-tokens", type=int, default=32, metavar="N", help="before decoding (default: 32)")
    parser.add_argument("--new-tokens", type=int, metavar="N", help="of decoding (default: 48; --quick: 16)")
    parser.add_argument("--seed", type=int, default=0, help="of the ids")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="one after another (default: float32 bfloat16)")
    parser.add_argument("--plans", nargs="+", choices=PLANS, help="fastsplit's (default: shm all, else some)")
    parser.add_argument("--links", nargs="+", choices=LINKS, help=f"fastsplit's (default: {' '.join(DEFAULT_PLANS)})")
    parser.add_argument("--rounds", type=int, metavar="N", help="default: 3; --quick: 1")
    parser.add_argument("--once-over", type=float, default=25.0, metavar="S", help="one round is enough (default: 25)")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="systems and rows with TEXT in their names")
    parser.add_argument("--threads", type=int, default=0, help="torch's, in every process; 0: one for each core")
    parser.add_argument("--tee-threads", type=int, metavar="N", help="those of this process, if not --threads")
    parser.add_argument("--spin-us", type=float, metavar="US", help="FASTSPLIT_SPIN_US of both sides")
    parser.add_argument("--device", default="cpu", help="the executor's: auto, cpu or cuda:N; HF is on the CPU")
    add_output_dir(parser, "split-PART.json")
    return parser


class _Bench:
    """What was asked for."""

    def __init__(self, args: argparse.Namespace, argv: Sequence[str], workers: Workers) -> None:
        self._args = args
        self._workers = workers
        self._argv = argv
        self._quick: bool = args.quick
        self._dtypes: list[str] = list(
            dict.fromkeys(args.dtype or (["float32"] if args.quick else ["float32", "bfloat16"]))
        )
        self._output_dir: Path = args.output_dir

    def names(self, part: str, dtype: str = "float32") -> list[str]:
        """Of the part's systems or rows those that are asked for."""
        args = self._args
        if part == "ladder":
            known = list(STEPS)
        else:
            links = args.links or (["shm"] if self._quick and part == "decode" else list(DEFAULT_PLANS))
            hf = PREFILL_HF if part == "prefill" else list(DECODE_HF)
            known = system_names(links, args.plans, hf, rivals=part == "prefill" or dtype == "float32")
        return [name for name in known if not args.only or any(text in name for text in args.only)]

    def run(self, part: str) -> None:
        """Measures one part; does nothing where --only leaves nothing of it."""
        dtypes = {dtype: names for dtype in self._dtypes if (names := self.names(part, dtype))}
        if dtypes:
            {"prefill": self._prefill, "decode": self._decode, "ladder": self._ladder}[part](dtypes)

    def _prefill(self, dtypes: dict[str, list[str]]) -> None:
        setting = self._setting(self._args.model or _MODEL)
        tokens = self._args.tokens or (256 if self._quick else 1024)
        phase = Prefill(self._ids(setting, tokens), quick=self._quick)
        phase.look_at_sockets()
        document = self._document("prefill", setting, dtypes, phase.size)
        document.content["raw_socket_bytes_per_s"] = phase.raw_socket_bytes_per_s
        for dtype, names in dtypes.items():
            lines = measure(phase, names, dtype, setting, document, self._workers, finish=phase.look_at_sockets)
            print("\n".join(lines), end="\n\n")
        rates = ", ".join(f"{kind} {rate / 1e9:.2f} GB/s" for kind, rate in phase.raw_socket_bytes_per_s.items())
        print(f"raw socket: {rates}")
        document.close()

    def _decode(self, dtypes: dict[str, list[str]]) -> None:
        model = self._args.model
        if model is None:
            from demo.smollm2 import model_dir

            model = str(model_dir())
        setting = self._setting(model)
        new_tokens = self._args.new_tokens or (16 if self._quick else 48)
        phase = Decode(self._ids(setting, self._args.prompt_tokens), new_tokens)
        document = self._document("decode", setting, dtypes, phase.size)
        document.content["raw_socket_bytes_per_s"] = {}  # no step has bytes enough for it to matter
        for dtype, names in dtypes.items():
            print("\n".join(measure(phase, names, dtype, setting, document, self._workers)), end="\n\n")
        document.close()

    def _ladder(self, dtypes: dict[str, list[str]]) -> None:
        setting = self._setting(self._args.model or _MODEL)
        tokens = dict.fromkeys(EXECUTOR_OF, self._args.tokens or (_QUICK_LADDER_TOKENS if self._quick else 1024))
        dtype, names = next(iter(dtypes.items()))
        document = self._document("ladder", setting, [dtype], {"tokens": tokens})
        print("\n".join(climb(names, tokens, dtype, setting, document, self._workers, quick=self._quick)))
        document.close()

    def _setting(self, model: str) -> Setting:
        args = self._args
        rounds = args.rounds or (1 if self._quick else 3)
        return Setting(model, rounds, args.once_over)

    def _ids(self, setting: Setting, count: int) -> torch.Tensor:
        vocab_size = open_model(setting.model).config.vocab_size
        return torch.randint(0, vocab_size, (count,), generator=torch.Generator().manual_seed(self._args.seed))

    def _document(self, part: str, setting: Setting, dtypes: Iterable[str], tokens: Mapping[str, Any]) -> Document:
        args = self._args
        circumstances = describe(["python", "-m", "benches.bench_split", *self._argv])
        circumstances["spin_us"] = os.environ.get("FASTSPLIT_SPIN_US")
        options = {
            "part": part,
            "quick": self._quick,
            "model": setting.model_name,
            **tokens,
            "dtype": list(dtypes),
            "rounds": setting.rounds,
            "once_over_s": setting.once_over_s,
            **{name: getattr(args, name) for name in _KEPT_OPTIONS},
        }
        return Document(self._output_dir / f"split-{part}.json", circumstances, options)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    args = parser.parse_args(argv)
    parts = list(dict.fromkeys(args.parts)) or list(PARTS)
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"{' '.join(unknown)}: expected {', '.join(PARTS)}")
    files = [args.output_dir / f"split-{part}.json" for part in parts]
    keep_whole(parser, args, ("quick", "only", "links", "plans", "dtype"), files)
    counts = {"tokens": 1, "prompt_tokens": 1, "new_tokens": 2, "rounds": 1}
    if short := [name for name, least in counts.items() if (getattr(args, name) or least) < least]:
        parser.error(f"--{short[0].replace('_', '-')} must be {counts[short[0]]} or more")
    if args.spin_us is not None:
        os.environ["FASTSPLIT_SPIN_US"] = str(args.spin_us)  # the other processes inherit it
    own_threads = args.threads if args.tee_threads is None else args.tee_threads
    if own_threads:
        torch.set_num_threads(own_threads)
    gc.freeze()  # what was imported need not be looked through before every round
    with Workers(args.threads, args.device) as workers:
        bench = _Bench(args, argv, workers)
        if not any(bench.names(part) for part in parts):
            parser.error(f"--only {' '.join(args.only)}: nothing of that name")
        for part in parts:
            bench.run(part)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Shared memory by itself: a copy into it, what two sides cost that only wait, where a round trip's time goes.

    python -m benches.bench_shm                 all three: about a minute
    python -m benches.bench_shm profile         one of them

Round trips beside those of others are bench_transport.py's.

copies. A torch tensor outside the arena, sent to a handler that returns nothing, less the same call with one inside:
the copy alone. Beside it numpy's copyto between two private arrays that are warm. The share is fastsplit's rate to
numpy's: 1 is a copy as fast as there is one.

idle. Two connected sides that have just called, left alone for ten seconds: the CPU time of each. And a matrix product
in one thread, not pinned, alone and beside two connections: one whose caller pauses between calls, one whose handler
takes its time, so that both sides of both have something to spin for. The ratio is what their spinning costs others.

profile. Each step of a 64-byte round trip by itself, beside a whole one: shm_profile.py says how.

Systems take turns in every round, in changing order, and the result is the median of the rounds. Nothing else may run
meanwhile.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import ExitStack
from typing import Any

from benches import shm_profile
from benches.environment import add_output, describe, keep_whole, save
from benches.placement import on_cpu, separate_cpus
from benches.shm_costs import copy_table, idle_table, measure_copies, measure_idle, measure_matmul
from benches.transports.pair import Pair, open_pairs

__all__ = ["main"]

PARTS = ("copies", "idle", "profile")
SIZES = {"8 MiB": 8 * 1024**2, "128 MiB": 128 * 1024**2}
OURS = "shm: fastsplit"
IDLE_S = 10.0


def _open(stack: ExitStack, cpu: int | None) -> Pair:
    pairs, left_out = open_pairs(stack, [OURS], cpu, 0)
    if OURS not in pairs:
        raise SystemExit(left_out[OURS])
    return pairs[OURS]


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m benches.bench_shm", description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), metavar="SIZE", help="of copies")
    add_output(parser, "shm.json", parts=True)
    args = parser.parse_args(argv)
    keep_whole(parser, args, ("parts", "sizes"), [args.output])
    if args.rounds < 1 or not set(args.parts) <= set(PARTS):
        parser.error(f"--rounds must be 1 or more, PART one of {', '.join(PARTS)}")
    parts = args.parts or PARTS
    near, far = separate_cpus() or (None, None)
    result: dict[str, Any] = {
        "environment": describe(["python", "-m", "benches.bench_shm", *argv]),
        "placement": "not pinned" if near is None else f"client on CPU {near}, peer on CPU {far}; idle not pinned",
        "parameters": {"rounds": args.rounds, "idle_s": IDLE_S},
    }
    if "copies" in parts:
        with on_cpu(near), ExitStack() as stack:
            sizes = {size: SIZES[size] for size in args.sizes}
            result["copies"] = measure_copies(_open(stack, far), sizes, args.rounds)
        print(copy_table(result["copies"]), flush=True)
    if "idle" in parts:
        with ExitStack() as stack:
            result["idle"] = measure_idle(_open(stack, None), IDLE_S)
        result["matmul"] = measure_matmul(args.rounds)
        print(idle_table(result["idle"], result["matmul"]), flush=True)
    if "profile" in parts:
        with on_cpu(near):
            result["profile"] = shm_profile.measure(args.rounds, far)
        print(shm_profile.table(result["profile"]))
    result["environment"]["load_average_after"] = os.getloadavg()
    print(save(result, args.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Shared memory beside its rivals: round trips of any size, what a copy into it costs, and what waiting costs.

    python -m benches.bench_shm                 round trips and copies: about 3 minutes
    python -m benches.bench_shm --only iceoryx2 "fastsplit shm" --sizes "64 B"
    python -m benches.bench_shm --idle          what two connected sides cost that have nothing to do
    python -m benches.bench_shm --profile       where the microseconds of one round trip go

Round trips. A tensor of 64 B, 8 MiB or 128 MiB there and one of the same size back, by fastsplit and by its rivals,
each at its best: echoes/ says what each of them does and does not do, and how their bytes are checked. "spinning": both
ends ask again and again; "sleeping": both wait in the kernel. Each end is a process of its own, on a core of its own
where there are two. A rival that is not installed, or finds no room in /dev/shm, is left out and says why.

Copies. A torch tensor outside the arena, sent to a handler that returns nothing, less the same call with one inside:
the copy alone. Beside it numpy's copyto between two private arrays that are warm. The share is fastsplit's rate to
numpy's: 1 is a copy as fast as there is one.

Idle. Two connected sides that have just called, left alone for ten seconds: the CPU time of each. And a matrix product
in one thread, not pinned, alone and beside two connections: one whose caller pauses between calls, one whose handler
takes its time, so that both sides of both have something to spin for. The ratio is what their spinning costs others.

In all of them systems take turns in every round, in changing order, and the result is the median of the rounds. Nothing
else may run meanwhile.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benches.echoes import ECHOES
from benches.echoes.pair import Pair, open_pairs
from benches.environment import RESULTS, describe, save
from benches.placement import on_cpu, separate_cpus
from benches.processes import OthersCpu
from benches.rounds import interleaved
from benches.shm_costs import copy_table, idle_table, measure_copies, measure_idle, measure_matmul

__all__ = ["main"]

SIZES = {"64 B": 64, "8 MiB": 8 * 1024**2, "128 MiB": 128 * 1024**2}
MODES = ("spinning", "sleeping")
OURS = "fastsplit shm, torch"
ROUND_S = 0.1  # how long each system's trips take in one round, about ...
MAX_TRIPS = 2000  # ... but never more than so many, and never less than one
IDLE_S = 10.0


# ---- round trips -----------------------------------------------------------------------------------------------------


@dataclass
class Figures:
    """One system's round trips of one size in one mode; microseconds a trip, by round."""

    size: str
    mode: str
    system: str
    trips: int
    round_trip_us: list[float] = field(default_factory=list)
    client_cpu_us: list[float] = field(default_factory=list)
    peer_cpu_us: list[float] = field(default_factory=list)

    @property
    def median_us(self) -> float:
        return statistics.median(self.round_trip_us)

    @property
    def cpu_us(self) -> float:
        """Of both ends."""
        return statistics.median(self.client_cpu_us) + statistics.median(self.peer_cpu_us)


def _measure_echoes(pairs: dict[str, Pair], sizes: list[str], rounds: int) -> list[Figures]:
    figures = []
    for size in sizes:
        nbytes = SIZES[size]
        taking = [pair for pair in pairs.values() if any(pair.takes(nbytes, mode) for mode in MODES)]
        for pair in taking:
            pair.prepare(nbytes)
        for mode in MODES:
            group = []
            for pair in taking:
                if pair.takes(nbytes, mode):
                    pair.check(nbytes, mode)
                    group.append(Figures(size, mode, pair.name, _trips_a_round(pair, nbytes, mode)))
            for one in interleaved([group], rounds, f"{size}, {mode}"):
                wall_s, client_cpu_s, peer_cpu_s = pairs[one.system].run(nbytes, mode, one.trips)
                one.round_trip_us.append(wall_s / one.trips * 1e6)
                one.client_cpu_us.append(client_cpu_s / one.trips * 1e6)
                one.peer_cpu_us.append(peer_cpu_s / one.trips * 1e6)
            figures += group
        for pair in taking:
            pair.release(nbytes)
    return figures


def _trips_a_round(pair: Pair, nbytes: int, mode: str) -> int:
    """As many as ROUND_S has room for; pages, caches and templates are warm then."""
    pair.run(nbytes, mode, 1)
    trips, wall_s = 1, pair.run(nbytes, mode, 1)[0]
    while wall_s < ROUND_S / 4 and trips < MAX_TRIPS:
        trips = min(max(int(ROUND_S / 2 / wall_s * trips), 2 * trips), 10 * trips, MAX_TRIPS)
        wall_s = pair.run(nbytes, mode, trips)[0]
    return min(max(int(ROUND_S / wall_s * trips), 1), MAX_TRIPS)


def _echo_table(figures: list[Figures]) -> str:
    sizes = list(dict.fromkeys(one.size for one in figures))
    lines = []
    for mode in MODES:
        rows = [one for one in figures if one.mode == mode]
        median_us = {(one.system, one.size): one.median_us for one in rows}
        socket_us = median_us.get(("unix socket", "64 B"))
        header = f"{'us':>11}{'x iox2':>8}{'x unix':>8}{'CPU us':>10}"
        lines += ["", f"{'round trips, ' + mode:<30}" + "".join(f"{size:>{len(header)}}" for size in sizes)]
        lines += [f"{'':<30}" + header * len(sizes)]
        for system in dict.fromkeys(one.system for one in rows):
            by_size = {one.size: one for one in rows if one.system == system}
            cells = [
                _echo_cells(by_size[size], median_us.get(("iceoryx2", size)), socket_us)
                if size in by_size
                else " " * len(header)
                for size in sizes
            ]
            lines.append(f"{system:<30}" + "".join(cells).rstrip())
    return "\n".join(
        [
            *lines,
            "",
            "x iox2: times iceoryx2 of that size; x unix: times 64 bytes through a unix socket; CPU: both ends'.",
        ]
    )


def _echo_cells(one: Figures, iceoryx_us: float | None, socket_us: float | None) -> str:
    times_iceoryx = "-" if iceoryx_us is None else _short(one.median_us / iceoryx_us)
    times_socket = "-" if socket_us is None else _short(one.median_us / socket_us)
    return f"{_short(one.median_us):>11}{times_iceoryx:>8}{times_socket:>8}{_short(one.cpu_us):>10}"


def _short(figure: float) -> str:
    """Three digits, or as many as stand before the point."""
    return f"{figure:.{max(2 - len(str(int(figure))) + 1, 0)}f}"


def _echo_json(figures: list[Figures]) -> list[dict[str, Any]]:
    reference_us = {(one.mode, one.size, one.system): one.median_us for one in figures}
    described = []
    for one in figures:
        iceoryx_us = reference_us.get((one.mode, one.size, "iceoryx2"))
        socket_us = reference_us.get((one.mode, "64 B", "unix socket"))
        described.append(
            {
                **asdict(one),
                "median_us": one.median_us,
                "cpu_us": one.cpu_us,
                "times_iceoryx2": None if iceoryx_us is None else one.median_us / iceoryx_us,
                "times_unix_socket": None if socket_us is None else one.median_us / socket_us,
            }
        )
    return described


# ---- the command -----------------------------------------------------------------------------------------------------


_SYSTEMS_HELP = f"systems with TEXT in their names, of {', '.join(ECHOES)}"


def _chosen(only: list[str] | None) -> list[str]:
    return [name for name in ECHOES if not only or any(text in name for text in only)]


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m benches.bench_shm", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", metavar="TEXT", help=_SYSTEMS_HELP)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), metavar="SIZE", help=", ".join(SIZES))
    parser.add_argument("--not-pinned", action="store_true", help="both ends where the scheduler puts them")
    parser.add_argument("--idle", action="store_true", help="what waiting costs, instead")
    parser.add_argument("--profile", action="store_true", help="where the time of a round trip goes, instead")
    parser.add_argument("--output", type=Path, help="the JSON file (default: benches/results/bench_shm.json)")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error("--rounds must be 1 or more")
    if not _chosen(args.only):
        parser.error(f"--only {' '.join(args.only)}: no such system")
    kind = "-idle" if args.idle else "-profile" if args.profile else ""
    result: dict[str, Any] = {"environment": describe(["python", "-m", "benches.bench_shm", *argv])}
    cpus = None if args.not_pinned or args.idle else separate_cpus()
    near, far = cpus or (None, None)
    result["placement"] = "not pinned" if cpus is None else f"client on CPU {near}, peer on CPU {far}"
    if args.profile:
        from benches import shm_profile

        with on_cpu(near):
            result["profile"] = shm_profile.measure(args.rounds, far)
        print(shm_profile.table(result["profile"]))
    elif args.idle:
        with ExitStack() as stack:
            pairs, _ = open_pairs(stack, [OURS], None, 0)
            if OURS not in pairs:
                return 1
            result["idle"] = measure_idle(pairs[OURS], IDLE_S)
        result["matmul"] = measure_matmul(args.rounds)
        print(idle_table(result["idle"], result["matmul"]))
    else:
        with on_cpu(near), ExitStack() as stack:
            pairs, result["left_out"] = open_pairs(
                stack, _chosen(args.only), far, max(SIZES[size] for size in args.sizes)
            )
            result["notes"] = {name: pair.client.note for name, pair in pairs.items() if pair.client.note}
            others = OthersCpu(os.getpid(), *(pair.pid for pair in pairs.values()))
            figures = _measure_echoes(pairs, args.sizes, args.rounds)
            result["round_trips"] = _echo_json(figures)
            print(_echo_table(figures), flush=True)
            result["others_cpu_s"] = others.seconds()
            if result["others_cpu_s"] is not None:
                print(f"Other programs used {result['others_cpu_s']:.1f} s of CPU meanwhile.")
            large = {size: SIZES[size] for size in args.sizes if SIZES[size] > 1024**2}
            if OURS in pairs and large:
                result["copies"] = measure_copies(pairs[OURS], large, args.rounds)
                print(copy_table(result["copies"]))
    result["environment"]["load_average_after"] = os.getloadavg()
    result["parameters"] = {"rounds": args.rounds, "round_s": ROUND_S, "max_trips": MAX_TRIPS}
    print(save("shm", result, args.output or RESULTS / f"bench_shm{kind}.json"))
    return 0


if __name__ == "__main__":
    sys.exit(main())

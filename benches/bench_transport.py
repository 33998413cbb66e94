"""Transports, side by side: round trips and one-way throughput, 64 bytes to 128 MiB, over shared memory, unix and tcp.

    python -m benches.bench_transport                            everything
    python -m benches.bench_transport --quick                    three sizes, three short rounds: every transport
    python -m benches.bench_transport --links shm --sizes 64 8388608 --only iceoryx2 fastsplit

transports/ has fastsplit, what one would use instead, and references: a bare socket, a copy within one process. It says
what each of them does and does not do, what a round trip and one way are, and how the bytes are checked.

How it is measured. Each end is a process of its own, on a core of its own where there are two, with all of its threads;
`--not-pinned` leaves both to the scheduler. Transports of one link take turns in every round, in changing order; only
one is at work at any moment. A round takes about as long for all of them; the first messages are not timed. A transport
that fails, or does not answer within a minute, is left out from there on, and the JSON says so.

What the columns are. p50, p99, p99.9: of all single round trips, the first by round and the median of these, the others
of all rounds together; of a pipelined transport what a call adds. GB/s: messages of that size one way, until the sender
knows that all have arrived. CPU: of both ends together, in us a message. x floor: times the quicker bare socket of that
link in the same mode, on shm times a copy there and back.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from benches.environment import add_output, describe, keep_whole, save
from benches.processes import OthersCpu, on_cpu, separate_cpus
from benches.rounds import interleaved, progress, table
from benches.stored import bytes_text
from benches.transports import LINKS, TRANSPORTS, Bytes
from benches.transports.pair import Figures, Pair, answering, open_pairs

__all__ = ["SIZES_NBYTES", "main"]

SIZES_NBYTES = (64, 1024, 8 * 1024, 64 * 1024, 1024**2, 8 * 1024**2, 128 * 1024**2)
QUICK_SIZES_NBYTES = (64, 64 * 1024, 8 * 1024**2)
MODES = ("spinning", "sleeping")
ROUND_TRIP, ONE_WAY = "round trip", "one way"
MAX_COUNT = 2000  # messages a round, however quick they are ...
MIN_ONE_WAY = 4  # ... and never fewer than so many one way: the first one has nobody to overlap with
_FLOORS = {
    "shm": ("shm: memcpy",),
    "unix": ("unix: raw socket", "unix: raw socket, 2 MiB buffer"),
    "tcp": ("tcp: raw socket",),
}


@dataclass
class Series:
    """One transport's messages of one size, in one mode; by round, microseconds a message."""

    what: str
    link: str
    system: str
    nbytes: int
    mode: str
    count: int
    mean_us: list[float] = field(default_factory=list)
    p50_us: list[float] = field(default_factory=list)
    p99_us: list[float] = field(default_factory=list)
    client_cpu_us: list[float] = field(default_factory=list)
    peer_cpu_us: list[float] = field(default_factory=list)
    trips_us: list[float] = field(default_factory=list)
    """All of them, of all rounds, for p99."""

    def add(self, figures: Figures) -> None:
        self.mean_us.append(figures.wall_s / self.count * 1e6)
        self.client_cpu_us.append(figures.client_cpu_s / self.count * 1e6)
        self.peer_cpu_us.append(figures.peer_cpu_s / self.count * 1e6)
        if figures.trips_ns:
            trips_us = np.asarray(figures.trips_ns) / 1e3
            self.p50_us.append(float(np.percentile(trips_us, 50)))
            self.p99_us.append(float(np.percentile(trips_us, 99)))
            self.trips_us += trips_us.tolist()

    def median(self) -> dict[str, float | None]:
        mean_us = statistics.median(self.mean_us)
        return {
            "p50_us": statistics.median(self.p50_us) if self.p50_us else None,
            "p99_us": float(np.percentile(self.trips_us, 99)) if self.trips_us else None,
            "p999_us": float(np.percentile(self.trips_us, 99.9)) if self.trips_us else None,
            "mean_us": mean_us,
            "cpu_us": statistics.median(self.client_cpu_us) + statistics.median(self.peer_cpu_us),
            "gbytes_per_s": self.nbytes / mean_us / 1e3,
        }

    def as_dict(self) -> dict[str, Any]:
        about = {name: getattr(self, name) for name in ("what", "link", "system", "nbytes", "mode", "count")}
        return {**about, "median": self.median()}


# ---- measuring -------------------------------------------------------------------------------------------------------


class _Link:
    """All transports of one link, as far as they answer."""

    def __init__(self, link: str, pairs: dict[str, Pair], left_out: dict[str, str], args: argparse.Namespace) -> None:
        self._link = link
        self._pairs = pairs
        self._left_out = left_out
        self._args = args

    def measure(self, nbytes: int) -> list[Series]:
        message = np.frombuffer(bytearray(np.random.default_rng(nbytes).bytes(nbytes)), np.uint8)
        for name in list(self._pairs):
            if any(self._pairs[name].takes(nbytes, mode) for mode in MODES):
                self._try(name, lambda pair: pair.prepare(nbytes))
        found: list[Series] = []
        for mode in MODES:
            found += self._compare(ROUND_TRIP, nbytes, mode, message)
        found += self._compare(ONE_WAY, nbytes, "", message)
        for name in list(self._pairs):
            if any(self._pairs[name].takes(nbytes, mode) for mode in MODES):
                self._try(name, lambda pair: pair.release(nbytes))
        return found

    def _compare(self, what: str, nbytes: int, mode: str, message: Bytes) -> list[Series]:
        series = []
        for name in list(self._pairs):
            one_way = what == ONE_WAY
            its_mode = mode or self._pairs[name].client.modes[0]
            if self._pairs[name].takes(nbytes, its_mode, one_way):
                one = Series(what, self._link, name, nbytes, its_mode, 1)
                if self._try(name, lambda pair, one=one: self._settle(pair, one, message)):
                    series.append(one)
        group = [one.system for one in series]
        by_system = {one.system: one for one in series}
        for name in interleaved(
            [group], self._args.rounds, f"{self._link}, {bytes_text(nbytes, binary=True)}, {what} {mode}".rstrip()
        ):
            if name in self._pairs:
                self._try(name, lambda pair, one=by_system[name]: one.add(_run(pair, one, one.count, message)))
        return [one for one in series if len(one.mean_us) == self._args.rounds]

    def _settle(self, pair: Pair, one: Series, message: Bytes) -> None:
        """Looks at the bytes, warms up, and finds how many messages a round has."""
        if one.what == ONE_WAY:
            pair.push(message, one.mode, 2, mark=True)
        else:
            pair.check(one.nbytes, one.mode)
        least = MIN_ONE_WAY if one.what == ONE_WAY else 1
        count, wall_s = least, _run(pair, one, least, message).wall_s
        while wall_s < self._args.round_s / 2 and count < MAX_COUNT:
            count = min(max(int(self._args.round_s / 2 / wall_s * count), 2 * count), 10 * count, MAX_COUNT)
            wall_s = _run(pair, one, count, message).wall_s
        one.count = min(max(int(self._args.round_s / wall_s * count), least), MAX_COUNT)

    def _try(self, name: str, do: Callable[[Pair], object]) -> bool:
        """Whether it went well; if not, this transport is out."""
        try:
            with answering(self._pairs[name]):
                do(self._pairs[name])
        except Exception as error:  # noqa: BLE001 - zmq, gRPC, Arrow: each has errors of its own
            self._left_out[name] = f"{type(error).__name__}: {error}"
            progress(f"left out from here on: {name}: {self._left_out[name]}")
            self._pairs.pop(name).kill()
            return False
        return True


def _run(pair: Pair, one: Series, count: int, message: Bytes) -> Figures:
    if one.what == ONE_WAY:
        return pair.push(message, one.mode, count)
    return pair.run(one.nbytes, one.mode, count)


# ---- tables ----------------------------------------------------------------------------------------------------------


def _table(series: Sequence[Series]) -> str:
    medians = {(one.what, one.system, one.mode, one.nbytes): one.median() for one in series}
    shown = []
    for link, what in itertools.product(dict.fromkeys(one.link for one in series), (ROUND_TRIP, ONE_WAY)):
        rows: dict[str, dict[Any, Any]] = {}
        for (kind, system, mode, nbytes), found in medians.items():
            if kind == what and TRANSPORTS[system].link == link:
                floor_mode = "sleeping" if link == "shm" else mode
                floors = [medians.get((what, name, floor_mode, nbytes)) for name in _FLOORS[link]]
                floor_us = min((floor["p50_us"] for floor in floors if floor and floor["p50_us"]), default=None)
                label = TRANSPORTS[system].label + ", sleeping" * (mode == "sleeping")
                rows.setdefault(label, {})[nbytes] = {**found, "floor_us": floor_us}
        columns: list[Any] = []
        for nbytes in sorted({one.nbytes for one in series}):
            size = bytes_text(nbytes, binary=True)
            if what == ROUND_TRIP:
                columns.append((f"{size}: p50 us", 17, lambda row, n=nbytes: _short(row[n]["p50_us"])))
                columns.append(("x floor", 8, lambda row, n=nbytes: _short(row[n]["p50_us"] / row[n]["floor_us"])))
                columns.append(("p99", 9, lambda row, n=nbytes: _short(row[n]["p99_us"])))
                columns.append(("p99.9", 9, lambda row, n=nbytes: _short(row[n]["p999_us"])))
            else:
                columns.append((f"{size}: GB/s", 17, lambda row, n=nbytes: _short(row[n]["gbytes_per_s"])))
            columns.append(("CPU", 8, lambda row, n=nbytes: _short(row[n]["cpu_us"])))
        shown.append(table(f"{link}, {what}", columns, rows, {}))
    return "\n\n".join(shown)


def _short(figure: float) -> str:
    """Three digits, or as many as stand before the point."""
    return f"{figure:.3g}" if figure < 100 else f"{figure:.0f}"


# ---- the command -----------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benches.bench_transport", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="three sizes, and three short rounds")
    parser.add_argument("--links", nargs="+", choices=LINKS, default=list(LINKS))
    parser.add_argument(
        "--sizes", nargs="+", type=int, metavar="NBYTES", help="multiples of 4 (default: 64 to 128 MiB)"
    )
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="transports with TEXT in their names")
    parser.add_argument("--rounds", type=int, help="default: 5, with --quick 3")
    parser.add_argument("--round-s", type=float, help="how long a transport's round is, about (default: 0.1, 0.03)")
    parser.add_argument("--not-pinned", action="store_true", help="both ends where the scheduler puts them")
    add_output(parser, "transport.json")
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    args = parser.parse_args(argv)
    keep_whole(parser, args, ("quick", "only", "links", "sizes"), [args.output])
    args.rounds = args.rounds or (3 if args.quick else 5)
    args.round_s = args.round_s or (0.03 if args.quick else 0.1)
    args.sizes = sorted(args.sizes or (QUICK_SIZES_NBYTES if args.quick else SIZES_NBYTES))
    if args.rounds < 1 or args.round_s <= 0 or any(nbytes < 4 or nbytes % 4 for nbytes in args.sizes):
        parser.error("--rounds must be 1 or more, --round-s above 0, --sizes multiples of 4")
    chosen = [name for name in TRANSPORTS if not args.only or any(text in name for text in args.only)]
    names = {link: [name for name in chosen if TRANSPORTS[name].link == link] for link in args.links}
    if not any(names.values()):
        parser.error(f"--only {' '.join(args.only)}: no such transport, of {', '.join(TRANSPORTS)}")
    cpus = None if args.not_pinned else separate_cpus()
    if cpus is not None:
        torch.set_num_threads(1)  # there is one core for them
    environment = describe(["python", "-m", "benches.bench_transport", *argv])
    near, far = cpus or (None, None)
    series: list[Series] = []
    systems: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    others_cpu_s: dict[str, float | None] = {}
    result = {
        "environment": environment,
        "placement": "not pinned" if cpus is None else f"client on CPU {near}, peer on CPU {far}",
        "parameters": {"rounds": args.rounds, "round_s": args.round_s, "sizes_nbytes": args.sizes},
        "others_cpu_s": others_cpu_s,
        "left_out": left_out,
        "systems": systems,
    }
    for link in args.links:
        with on_cpu(near), ExitStack() as stack:
            pairs, missing = open_pairs(stack, names[link], far, max(args.sizes))
            left_out.update(missing)
            systems.update({name: _described(name, pair) for name, pair in pairs.items()})
            others = OthersCpu(os.getpid(), *(pair.pid for pair in pairs.values()))
            measured = _Link(link, pairs, left_out, args)
            for nbytes in args.sizes:
                series += measured.measure(nbytes)
            others_cpu_s[link] = others.seconds()
        environment["load_average_after"] = os.getloadavg()
        save({**result, "rows": [one.as_dict() for one in series]}, args.output)
    print(_table(series))
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}")
    used = ", ".join(f"{link} {seconds:.1f} s" for link, seconds in others_cpu_s.items() if seconds is not None)
    print(f"CPU time of other programs meanwhile: {used}")
    print(args.output)
    return 0


def _described(name: str, pair: Pair) -> dict[str, Any]:
    client = pair.client
    about = {"link": TRANSPORTS[name].link, "label": TRANSPORTS[name].label, "floor": client.how == "floor"}
    about |= {"latency": client.is_latency, "how": client.how, "copies": client.copies}
    return about | {"writable": client.writable, "safe": client.safe}


if __name__ == "__main__":
    sys.exit(main())

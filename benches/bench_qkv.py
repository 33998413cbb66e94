"""q, k and v of the same rows: one call after the other, three at once with asyncio, or one call for all three.

    python -m benches.bench_qkv                     half a minute

How it is measured. TinyLlama-1.1B's layer in fp32 (2048 in; 2048, 256 and 256 out), 1 and 1024 rows, on each link of
benches/link.py. The executor (benches.null_executor, a process of its own, blocking) answers with the right shapes and
computes nothing, so that what differs is the link: three at once send x three times as one after the other does, and
save two round trips; one call for all sends it once. Medians of interleaved rounds, milliseconds for all three.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import torch

import fastsplit

from .environment import add_output, describe, keep_whole, save
from .link import LINKS, through
from .processes import process
from .rounds import interleaved

NAMES = ("q", "k", "v")
ROWS = (1, 1024)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benches.bench_qkv", description=__doc__.partition("\n")[0])
    parser.add_argument("--links", nargs="+", choices=LINKS, default=list(LINKS))
    parser.add_argument("--rounds", type=int, default=5)
    add_output(parser, "qkv.json", parts=True)
    args = parser.parse_args(argv)
    keep_whole(parser, args, ("links",), [args.output])
    results = []
    print(f"{'link':<10}{'rows':>6}{'in turn ms':>12}{'at once ms':>12}{'one call ms':>13}")
    with process("benches.null_executor", "--model", "random:tinyllama-1.1b") as executor:
        address = json.loads(executor.ready)["fastsplit-tcp"]
        for link in args.links:
            with through(LINKS[link], address) as uri:
                for rows in ROWS:
                    times = asyncio.run(_measure(uri, rows, args.rounds))
                    results.append({"link": link, "rows": rows, "seconds": times})
                    cells = [f"{times[way] * 1e3:.2f}" for way in ("in turn", "at once", "one call")]
                    print(f"{link:<10}{rows:>6}{cells[0]:>12}{cells[1]:>12}{cells[2]:>13}")
    environment = describe(["python", "-m", "benches.bench_qkv", *(sys.argv[1:] if argv is None else argv)])
    print(save({"environment": environment, "results": results}, args.output))
    return 0


async def _measure(uri: str, rows: int, rounds: int) -> dict[str, float]:
    async with fastsplit.aio.connect(uri, arrays="torch", codec="off") as channel:
        x = torch.randn(1, rows, 2048)

        async def call(*names: str) -> Any:
            return await channel.call("linear", x, layer=0, names=list(names))

        async def in_turn() -> None:
            for name in NAMES:
                await call(name)

        async def at_once() -> None:
            await asyncio.gather(*map(call, NAMES))

        async def one_call() -> None:
            await call(*NAMES)

        ways: dict[str, Callable[[], Awaitable[None]]] = {"in turn": in_turn, "at once": at_once, "one call": one_call}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for run in ways.values():
            await run()  # warm
        for name in interleaved([list(ways)], rounds, f"{rows} rows"):
            started_s = time.perf_counter()
            await ways[name]()
            times[name].append(time.perf_counter() - started_s)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


if __name__ == "__main__":
    sys.exit(main())

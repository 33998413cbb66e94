"""A thousand calls in flight from one connection and from fifty: throughput, memory, fairness; half of them cancelled.

    python -m benches.bench_inflight            about 2 minutes
    python -m benches.bench_inflight --links shm --sizes "64 B"

The client is fastsplit.aio in one thread; the server, in a process of its own, fastsplit.aio (coroutine handlers) or
the blocking one with four workers. A thousand tasks, shared out over the connections, each make one call after the
other for SECONDS_A_ROUND; a call sends a tensor and gets it back. In each round all combinations take turns.

Fairness: calls that each connection completed, the least and the most of them as shares of the mean, and Jain's index
of them all: (sum x)^2 / (n sum x^2), 1 where all are equal, 1/n where one has everything.

Memory: resident bytes of each side before the connections are made, with all of it in flight, and after they are
closed; where memory is shared, each side counts the segments that it has touched.

Cancelling (aio servers): a thousand calls that the server holds, every other one cancelled, the rest released. Then
nothing may be left: no request, no task, no block of shared memory, no descriptor beyond those of before.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from typing import Any

import numpy as np

import fastsplit
from benches.environment import add_output, describe, keep_whole, save
from benches.inflight_peer import WORKERS, state
from benches.processes import OthersCpu, Process, process
from benches.rounds import interleaved

__all__ = ["main"]

LINKS = ("unix", "shm", "tcp")
SIZES = {"64 B": 64, "64 KiB": 64 * 1024}
CONNECTIONS = (1, 50)
CALLS = 1000
SECONDS_A_ROUND = 0.5
WARM_UP_S = 0.2


class Combination:
    """A server, a link, a number of connections, a size; and what was measured of it."""

    def __init__(self, server: str, link: str, connections: int, size: str) -> None:
        self.server, self.link, self.connections, self.size = server, link, connections, size
        self.calls_per_s: list[float] = []
        self.shares: list[tuple[float, float, float]] = []  # least, most, Jain's index
        self.memory: list[dict[str, int]] = []

    def json(self) -> dict[str, Any]:
        return {
            "server": self.server,
            "link": self.link,
            "connections": self.connections,
            "size": self.size,
            "calls_per_s": statistics.median(self.calls_per_s),
            "calls_per_s_rounds": self.calls_per_s,
            "least_share": min(share[0] for share in self.shares),
            "most_share": max(share[1] for share in self.shares),
            "jain": min(share[2] for share in self.shares),
            **{name: statistics.median(memory[name] for memory in self.memory) for name in self.memory[0]},
        }


def _uri(link: str, directory: str, server: str) -> str:
    if link == "tcp":
        return "tcp://127.0.0.1:0"
    return f"unix://{directory}/{server}-{link}.sock" + ("?shm=off" if link == "unix" else "")


def _ask(peer: Process) -> dict[str, int]:
    peer.write_line("state")
    answer: dict[str, int] = json.loads(peer.read_line())
    return answer


async def _connect(uri: str, count: int) -> list[fastsplit.aio.Channel]:
    return [await fastsplit.aio.connect(uri, arrays="numpy", call_timeout_s=60) for _ in range(count)]


def _arenas(channels: list[fastsplit.aio.Channel]) -> list[Any]:
    return [channel._connection.arena for channel in channels]


# ---- throughput ------------------------------------------------------------------------------------------------------


async def _measure(one: Combination, peer: Process) -> None:
    before = (state([])["rss_nbytes"], _ask(peer)["rss_nbytes"])
    channels = await _connect(peer.ready, one.connections)
    completed = [0] * one.connections
    x = np.arange(SIZES[one.size], dtype=np.uint8)
    counting = False
    ending = False

    async def work(number: int, channel: fastsplit.aio.Channel) -> None:
        while not ending:
            await channel.call("echo", x)
            if counting:
                completed[number] += 1

    tasks = [asyncio.ensure_future(work(n % one.connections, channels[n % one.connections])) for n in range(CALLS)]
    await asyncio.sleep(WARM_UP_S)
    counting = True
    started = time.perf_counter()
    await asyncio.sleep(SECONDS_A_ROUND)
    counting = False
    wall_s = time.perf_counter() - started
    memory = (state([])["rss_nbytes"], _ask(peer)["rss_nbytes"])
    ending = True
    await asyncio.gather(*tasks)
    tasks.clear()
    for channel in channels:
        await channel.close()
    del channels, channel
    await asyncio.sleep(0.05)
    after = (state([])["rss_nbytes"], _ask(peer)["rss_nbytes"])
    total, mean = sum(completed), sum(completed) / one.connections
    one.calls_per_s.append(total / wall_s)
    jain = total**2 / (one.connections * sum(count**2 for count in completed)) if total else 0.0
    one.shares.append((min(completed) / mean, max(completed) / mean, jain) if total else (0.0, 0.0, 0.0))
    one.memory.append(
        {
            "client_rss_before": before[0],
            "client_rss_in_flight": memory[0],
            "client_rss_after": after[0],
            "server_rss_before": before[1],
            "server_rss_in_flight": memory[1],
            "server_rss_after": after[1],
        }
    )


# ---- cancelling ------------------------------------------------------------------------------------------------------


async def _cancel_half(link: str, connections: int, size: str, peer: Process) -> dict[str, Any]:
    """Raises RuntimeError if anything is left."""
    channels = await _connect(peer.ready, connections)
    x = np.arange(SIZES[size], dtype=np.uint8)
    for _ in range(2):
        await asyncio.gather(*(channel.call("echo", x) for channel in channels for _ in range(CALLS // connections)))
    before = (state([]), _ask(peer))
    tasks_before = len(asyncio.all_tasks())
    calls = [asyncio.ensure_future(channels[n % connections].call("hold", x)) for n in range(CALLS)]
    while (held := _ask(peer))["holding"] < CALLS:
        await asyncio.sleep(0.01)
    started = time.perf_counter()
    for call in calls[::2]:
        call.cancel()
    while _ask(peer)["holding"] > CALLS // 2:
        await asyncio.sleep(0.001)
    cancelled_s = time.perf_counter() - started
    await channels[0].call("release")
    results = await asyncio.gather(*calls, return_exceptions=True)
    answered = sum(isinstance(result, fastsplit.Result) for result in results)
    cancelled = sum(isinstance(result, asyncio.CancelledError) for result in results)
    del results, calls, call
    deadline = time.monotonic() + 5
    while True:
        for channel in channels:
            channel._pump.send_returns()
        await asyncio.sleep(0.01)
        after = (state(_arenas(channels)), _ask(peer))
        left = {
            "requests": sum(channel.inflight for channel in channels) + after[1]["inflight"],
            "tasks": len(asyncio.all_tasks()) - tasks_before + after[1]["holding"],
            "arena_nbytes": after[0]["arena_in_use_nbytes"] + after[1]["arena_in_use_nbytes"],
            "descriptors": sum(max(now["descriptors"] - then["descriptors"], 0) for then, now in zip(before, after)),
        }
        if not any(left.values()) or time.monotonic() > deadline:
            break
    for channel in channels:
        await channel.close()
    await asyncio.sleep(0.05)
    if any(left.values()) or (answered, cancelled) != (CALLS // 2, CALLS // 2):
        raise RuntimeError(f"{link}, {connections} connections, {size}: {answered}, {cancelled}; left behind: {left}")
    return {
        "link": link,
        "connections": connections,
        "size": size,
        "answered": answered,
        "cancelled": cancelled,
        "cancelled_after_ms": cancelled_s * 1e3,
        "held_arena_nbytes": held["arena_in_use_nbytes"],
        "left": left,
        "client_descriptors": (before[0]["descriptors"], after[0]["descriptors"]),
        "server_descriptors": (before[1]["descriptors"], after[1]["descriptors"]),
    }


# ---- tables ----------------------------------------------------------------------------------------------------------


def _table(rows: list[dict[str, Any]]) -> str:
    heads = ("calls/s", "least", "most", "Jain", "client MB", "server MB")
    lines = [
        "{:<9} {:<5} {:>5} {:>7} {:>9} {:>6} {:>6} {:>6} {:>14} {:>14}".format(
            "server", "link", "conns", "size", *heads
        )
    ]
    for row in rows:
        client, server = (
            " ".join(f"{row[f'{side}_rss_{when}'] / 1e6:4.0f}" for when in ("before", "in_flight", "after"))
            for side in ("client", "server")
        )
        lines.append(
            f"{row['server']:<9} {row['link']:<5} {row['connections']:>5} {row['size']:>7} {row['calls_per_s']:>9.0f}"
            f" {row['least_share']:>6.2f} {row['most_share']:>6.2f} {row['jain']:>6.3f} {client:>14} {server:>14}"
        )
    return "\n".join(lines)


def _cancel_table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'link':<5} {'conns':>5} {'size':>7} {'answered':>9} {'cancelled':>10} {'ms':>6} {'left behind':>12}"]
    for row in rows:
        left = sum(row["left"].values())
        lines.append(
            f"{row['link']:<5} {row['connections']:>5} {row['size']:>7} {row['answered']:>9} {row['cancelled']:>10}"
            f" {row['cancelled_after_ms']:>6.1f} {left or 'nothing':>12}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m benches.bench_inflight", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--links", nargs="+", choices=LINKS, default=list(LINKS))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), metavar="SIZE", help=", ".join(SIZES))
    add_output(parser, "inflight.json", parts=True)
    args = parser.parse_args(argv)
    keep_whole(parser, args, ("links", "sizes"), [args.output])
    if args.rounds < 1:
        parser.error("--rounds must be 1 or more")
    result: dict[str, Any] = {"environment": describe(["python", "-m", "benches.bench_inflight", *argv])}
    with tempfile.TemporaryDirectory(prefix="fastsplit-bench-") as directory, contextlib.ExitStack() as stack:
        peers = {
            (server, link): stack.enter_context(process("benches.inflight_peer", server, _uri(link, directory, server)))
            for server in ("aio", "blocking")
            for link in args.links
        }
        groups = [
            [Combination(server, link, connections, size) for server in ("aio", "blocking") for link in args.links]
            for size in args.sizes
            for connections in CONNECTIONS
        ]
        others = OthersCpu(os.getpid(), *(peer.pid for peer in peers.values()))
        for one in interleaved(groups, args.rounds, "in flight"):
            asyncio.run(_measure(one, peers[one.server, one.link]))
        result["throughput"] = [one.json() for group in groups for one in group]
        print(_table(result["throughput"]), flush=True)
        result["others_cpu_s"] = others.seconds()
        if result["others_cpu_s"] is not None:
            print(f"Other programs used {result['others_cpu_s']:.1f} s of CPU meanwhile.")
        result["cancelled"] = [
            asyncio.run(_cancel_half(link, connections, size, peers["aio", link]))
            for link in args.links
            for connections in CONNECTIONS
            for size in args.sizes
        ]
        print(_cancel_table(result["cancelled"]))
    result["environment"]["load_average_after"] = os.getloadavg()
    result["parameters"] = {
        "rounds": args.rounds,
        "calls_in_flight": CALLS,
        "seconds_a_round": SECONDS_A_ROUND,
        "workers_of_blocking": WORKERS,
    }
    print(save(result, args.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The other end of bench_inflight.py: a server in a process of its own, which says what it holds when it is asked.

    python -m benches.inflight_peer aio|blocking URI

Prints `READY URI`, then answers each line of its stdin with one of JSON (`state`), and ends when its stdin does.
Handlers: "echo" sends back what came. "hold" waits until "release" is called or its call is cancelled; the blocking
server's looks whether it is, every millisecond, in one of WORKERS threads.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import fastsplit

__all__ = ["WORKERS", "main", "state"]

WORKERS = 4


def state(arenas: list[Any]) -> dict[str, int]:
    """What this process holds: bytes of memory, descriptors, threads, bytes of shared memory in use."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "rss_nbytes": pages * os.sysconf("SC_PAGE_SIZE"),
        "descriptors": len(os.listdir("/proc/self/fd")) - 1,
        "threads": threading.active_count(),
        "arena_in_use_nbytes": sum(arena.in_use_nbytes for arena in arenas if arena is not None),
    }


async def _serve_aio(uri: str) -> None:
    released = asyncio.Event()
    holding = 0

    async def echo(call: fastsplit.aio.Call) -> Any:
        return call.tensors

    async def hold(call: fastsplit.aio.Call) -> Any:
        nonlocal holding
        holding += 1
        try:
            await released.wait()
        finally:
            holding -= 1
        return call.tensors

    async def release(call: fastsplit.aio.Call) -> None:
        released.set()

    handlers = {"echo": echo, "hold": hold, "release": release}
    async with fastsplit.aio.serve(uri, handlers, arrays="numpy", limits=_LIMITS) as server:
        print("READY", server.uri, flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            released.clear()
            for client in server._service.clients:
                client.pump.send_returns()
            arenas = [client.connection.arena for client in server._service.clients]
            print(json.dumps({**state(arenas), "holding": holding, "inflight": server.inflight}), flush=True)


def _serve_blocking(uri: str) -> None:
    handlers = {"echo": lambda call: call.tensors, "release": lambda call: None}
    with fastsplit.Server(uri, handlers, arrays="numpy", workers=WORKERS, limits=_LIMITS) as server:
        print("READY", server.uri, flush=True)
        while sys.stdin.readline():
            arenas = [client.connection.arena for client in server._service.clients]
            print(json.dumps(state(arenas)), flush=True)


_LIMITS = fastsplit.Limits(max_inflight=1024)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benches.inflight_peer", description=__doc__.partition("\n")[0])
    parser.add_argument("server", choices=("aio", "blocking"))
    parser.add_argument("uri")
    args = parser.parse_args(argv)
    if args.server == "aio":
        asyncio.run(_serve_aio(args.uri))
    else:
        _serve_blocking(args.uri)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The process with an echo's answering end.

    python -m benches.echoes.peer "iceoryx2" [--cpu N]

Prints `READY` and its address as JSON. Then for each line on stdin, a `Run` as JSON, prints `go`, serves it, waits for
the line "end", and prints {"cpu_s": ...}: what this process used between the two. Ends when stdin does, and with who
started it, even if that is killed while this one spins.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from . import ECHOES, Run, load

__all__ = ["main"]

_PR_SET_PDEATHSIG = 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benches.echoes.peer", description=__doc__.partition("\n")[0])
    parser.add_argument("echo", choices=ECHOES)
    parser.add_argument("--cpu", type=int, help="the only CPU to run on")
    args = parser.parse_args(argv)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if args.cpu is not None:
        os.sched_setaffinity(0, {args.cpu})  # before any thread starts: they inherit it
    with tempfile.TemporaryDirectory(prefix="fastsplit-bench-") as directory:
        try:
            peer = load(args.echo, "Peer")(Path(directory))
        except (ImportError, OSError) as error:
            print("UNABLE", error, flush=True)
            return 1
        print("READY", json.dumps(peer.address), flush=True)
        try:
            for line in sys.stdin:
                run = Run(**json.loads(line))
                peer.prepare(run)
                started_s = time.process_time()
                print("go", flush=True)
                peer.serve(run)
                sys.stdin.readline()
                print(json.dumps({"cpu_s": time.process_time() - started_s}), flush=True)
        finally:
            peer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The process with a transport's other end.

    python -m benches.transports.peer "shm: iceoryx2" [--cpu N]

Prints `READY` and its address as JSON. Then for each line on stdin, a `Run` as JSON, prints `go`, serves it, waits for
the line "end", and prints {"cpu_s": ..., "taken": ..., "crc32": ...}: what this process used between the two, how many
messages came one way, and the checksum of the last if the run says to look. Ends when stdin does, and with who started
it, even if that is killed while this one spins.
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
import zlib
from pathlib import Path

from . import TRANSPORTS, Run, bytes_of, load

__all__ = ["main"]

_PR_SET_PDEATHSIG = 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benches.transports.peer", description=__doc__.partition("\n")[0])
    parser.add_argument("transport", choices=TRANSPORTS)
    parser.add_argument("--cpu", type=int, help="the only CPU to run on")
    args = parser.parse_args(argv)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if args.cpu is not None:
        os.sched_setaffinity(0, {args.cpu})  # before any thread starts: they inherit it
    with tempfile.TemporaryDirectory(prefix="fastsplit-bench-") as directory:
        try:
            peer = load(args.transport, "Peer")(Path(directory), TRANSPORTS[args.transport].link)
        except (ImportError, OSError) as error:
            print("UNABLE", error, flush=True)
            return 1
        if args.cpu is not None and "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)  # it has asked how many cores there are before
        print("READY", json.dumps(peer.address), flush=True)
        try:
            for line in sys.stdin:
                run = Run(**json.loads(line))
                peer.taken, peer.last = 0, None
                peer.prepare(run)
                started_s = time.process_time()
                print("go", flush=True)
                if run.one_way:
                    peer.take(run)
                else:
                    peer.serve(run)
                sys.stdin.readline()
                said = {"cpu_s": time.process_time() - started_s, "taken": peer.taken}
                if run.mark and peer.last is not None:
                    said["crc32"] = zlib.crc32(bytes_of(peer.last))
                print(json.dumps(said), flush=True)
        finally:
            peer.last = None
            peer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())

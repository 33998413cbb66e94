"""Connections that mostly wait: the company that bench_shm.py idle measures a matrix product in.

    python -m benches.idle_peer serve           prints `READY URI`
    python -m benches.idle_peer call URI        prints `READY`; after the line "go" it calls, and answers "going", until
                                                the line "stop", which it answers with {"cpu_s": ..., "calls": ...}

The caller has two connections, each with a thread: one pauses between calls, one waits for a handler that takes its
time. Both end when their stdin does.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time

import fastsplit

__all__ = ["main"]

PAUSE_S = 0.002


def _serve() -> None:
    handlers = {"quick": lambda call: call.tensors, "slow": lambda call: time.sleep(PAUSE_S)}
    with (
        tempfile.TemporaryDirectory(prefix="fastsplit-bench-") as directory,
        fastsplit.Server(f"unix://{directory}/idle.sock", handlers, arrays="numpy") as server,
    ):
        print("READY", server.uri, flush=True)
        sys.stdin.read()


class _Caller:
    def __init__(self, uri: str, op: str, pause_s: float) -> None:
        self.calls = 0
        self._op = op
        self._pause_s = pause_s
        self._channel = fastsplit.connect(uri, arrays="numpy")
        self._going = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def go(self) -> None:
        self.calls = 0
        self._going.set()

    def stop(self) -> None:
        self._going.clear()

    def _run(self) -> None:
        tensor = self._channel.empty((16,))
        while True:
            self._going.wait()
            self._channel.call(self._op, tensor)
            self.calls += 1
            if self._pause_s:
                time.sleep(self._pause_s)


def _call(uri: str) -> None:
    callers = [_Caller(uri, "quick", PAUSE_S), _Caller(uri, "slow", 0.0)]
    print("READY", flush=True)
    started_s = 0.0
    for line in sys.stdin:
        if line.strip() == "go":
            started_s = time.process_time()
            for caller in callers:
                caller.go()
            print("going", flush=True)
        else:
            for caller in callers:
                caller.stop()
            calls = sum(caller.calls for caller in callers)
            print(json.dumps({"cpu_s": time.process_time() - started_s, "calls": calls}), flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benches.idle_peer", description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("serve", "call"))
    parser.add_argument("uri", nargs="?", help="where to call")
    args = parser.parse_args(argv)
    if args.what == "serve":
        _serve()
    elif args.uri is None:
        parser.error("call needs a URI")
    else:
        _call(args.uri)
    return 0


if __name__ == "__main__":
    sys.exit(main())

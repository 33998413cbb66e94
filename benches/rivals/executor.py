"""The executor's process for benchmarks: fastsplit and all rivals out of one copy of the weights.

    python -m benches.rivals.executor --model random:tiny

Prints one line `READY {"fastsplit-unix": "unix:///...", ...}` on stdout when all sockets listen, and ends when its
stdin does, so that it never outlives who started it. A service that nobody calls sleeps.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch

from fastsplit import Server
from fastsplit.executor.device import open_device
from fastsplit.executor.service import Executor
from fastsplit.models import DTYPES, open_model
from fastsplit.wire.transport.spin import spin_us_beside

from .service import RivalService

__all__ = ["RIVALS", "main"]

RIVALS = {"original-tcp": "original", "tuned-tcp": "tuned", "tuned-ipc": "tuned"}
"""The rivals' systems, and which way each sends tensors."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benches.rivals.executor", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="random:tiny", help="a HF directory, or random:PRESET[@SEED]")
    parser.add_argument("--device", default="cpu", help="auto, cpu or cuda:N")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--threads", type=int, default=0, help="torch's threads; 0: one for each core")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    with ExitStack() as stack:
        executor = Executor(open_model(args.model), device=open_device(args.device), dtype=args.dtype)
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastsplit-bench-")))
        addresses = {}
        for system, uri in (("fastsplit-unix", f"unix://{directory}/gpu.sock"), ("fastsplit-tcp", "tcp://127.0.0.1:0")):
            spin_us = spin_us_beside(0 if executor.device.asynchronous else torch.get_num_threads())
            server = Server(uri, executor.handlers, on_segment=executor.on_segment, spin_us=spin_us)
            addresses[system] = stack.enter_context(server).uri
        for system, way in RIVALS.items():
            address = "tcp://127.0.0.1:*" if system.endswith("tcp") else f"ipc://{directory}/{system}.sock"
            addresses[system] = stack.enter_context(RivalService(address, way, executor)).address
        print("READY", json.dumps(addresses), flush=True)
        sys.stdin.read()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The GPU side as a script: loads a model, serves it, and prints `READY uri=...` when clients can connect.

    python -m fastsplit.gpu_side --model DIR|random:PRESET[@SEED] [--listen URI] [--device auto|cpu|cuda:N]

Rules. stdout has the READY line alone. SIGTERM and SIGINT end it cleanly, with exit code 0 once it serves.
"""

from __future__ import annotations

import os
import sys

if __package__ in (None, ""):  # run by path: this folder must not be where imports are looked for
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import signal
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from fastsplit import cli
from fastsplit.models import DTYPES, PRESETS, open_model
from fastsplit.wire.blocking.server import Server
from fastsplit.wire.transport.spin import spin_us_beside

__all__ = ["SPIN_COUNT", "main"]

_PROGRAM = "gpu_side"
SPIN_COUNT = 100_000
"""Spin count of OpenMP's threads: about the time between two calls of a generation. Tokens take a fifth less time than
with the default of `calm_openmp`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code (cli.py lists them)."""
    return cli.run_main(_PROGRAM, lambda: _parser().parse_args(argv), _serve, SPIN_COUNT)


def _parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(_PROGRAM, "Serves a model's linear algebra to TEE sides.")
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR|random:PRESET[@SEED]",
        help=f"a Hugging Face directory, or a public model's shape with seeded random weights: {', '.join(PRESETS)}",
    )
    parser.add_argument(
        "--listen",
        metavar="URI",
        default=f"unix://{tempfile.gettempdir()}/fastsplit-{os.getpid()}.sock",
        help="unix:///path, tcp://host:port (port 0: any free one) or vsock://cid:port; on this host, see --insecure",
    )
    parser.add_argument(
        "--insecure",
        action="store_true",
        help="listen on addresses off loopback, too: any host that reaches them can call and read",
    )
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda:N", help="device of the weights")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="dtype of weights, KV caches and products")
    parser.add_argument("--max-connections", type=cli.positive_int, default=128, metavar="N", help="clients at a time")
    parser.add_argument("--max-sessions", type=cli.positive_int, default=64, metavar="N", help="KV caches of a client")
    parser.add_argument(
        "--max-cache-mib", type=cli.positive_int, default=8192, metavar="N", help="memory for KV caches, of all clients"
    )
    return parser


@contextmanager
def _stop_signals() -> Iterator[int]:
    """SIGTERM and SIGINT raise KeyboardInterrupt in the block; they also end a read of the descriptor that it yields.

    The system may deliver a signal to any thread, and a main thread that waits for a lock would not notice it.
    """
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    handlers = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGINT)}
    before = signal.set_wakeup_fd(wake)
    try:
        yield woken
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(woken)
        os.close(wake)


def _serve(args: argparse.Namespace) -> int:
    with _stop_signals() as stopped:
        return _serve_until(stopped, args)


def _serve_until(stopped: int, args: argparse.Namespace) -> int:
    model = open_model(args.model)  # before torch is imported: a wrong name fails at once
    from fastsplit.executor.device import open_device
    from fastsplit.executor.service import Executor
    from fastsplit.extras import torch

    cli.set_threads(args.threads)
    device = open_device(args.device)
    # Bound before the weights are loaded: a port in use fails at once.
    server = Server(
        args.listen,
        {},
        arrays="torch",
        max_connections=args.max_connections,
        on_segment=device.on_segment,
        insecure=args.insecure,
        spin_us=spin_us_beside(0 if device.asynchronous else torch.get_num_threads()),
    )
    server.bind()
    try:
        executor = Executor(
            model,
            device=device,
            dtype=args.dtype,
            progress=lambda items, total: cli.progress(items, total, "loading weights"),
            max_sessions=args.max_sessions,
            max_cache_nbytes=args.max_cache_mib * 2**20,
        )
        server.handlers.update(executor.handlers)
        server.start()
        cli.write(f"READY uri={server.uri}\n")
        os.read(stopped, 1)
    except KeyboardInterrupt:
        if not server.started:
            raise
    finally:
        cli.ignore_stops()  # _stop_signals restores the handlers
        server.close()
    if device.summary is not None:
        cli.tell(_PROGRAM, device.summary)
    return 0


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    code = main()
    cli.ignore_stops()
    sys.exit(code)

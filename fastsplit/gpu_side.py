"""The GPU side as a script: loads a model, serves it, prints `READY uri=...` when clients may come.

    python -m fastsplit.gpu_side --model DIR|random:PRESET[@SEED] [--listen URI] [--device auto|cpu|cuda:N]

Rules. stdout has the READY line and nothing else. SIGTERM and SIGINT end it cleanly, with exit code 0 once it serves.
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
"""For OpenMP's threads: about the time that a TEE side takes between two calls of a generation. SmolLM2 in fp32, both
sides on two cores, plan folded, a token: 67 ms, with 10,000 86 ms."""


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
        help="listen on other addresses than loopback too: whoever reaches them can call, and read along",
    )
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda:N", help="where the weights are")
    parser.add_argument(
        "--dtype", default="float32", choices=DTYPES, help="what the weights are cast to and products are computed in"
    )
    parser.add_argument("--max-connections", type=cli.positive_int, default=128, metavar="N", help="clients at a time")
    parser.add_argument("--max-sessions", type=cli.positive_int, default=64, metavar="N", help="KV caches of a client")
    parser.add_argument(
        "--max-cache-mib", type=cli.positive_int, default=8192, metavar="N", help="memory for KV caches, of all clients"
    )
    return parser


@contextmanager
def _stop_signals() -> Iterator[int]:
    """SIGTERM and SIGINT raise KeyboardInterrupt in here; a read of the descriptor it gives ends when one comes.

    The system may hand a signal to any thread; waiting for a lock, the main thread would never notice.
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
    model = open_model(args.model)  # before torch is imported: a wrong name is answered at once
    from fastsplit.executor.device import open_device
    from fastsplit.executor.service import Executor
    from fastsplit.extras import torch

    cli.set_threads(args.threads)
    device = open_device(args.device)
    # The address comes before the weights: a port in use is no reason to wait for them.
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
        cli.ignore_stops()  # _stop_signals puts back what was before
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

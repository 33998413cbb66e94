"""What the two scripts share: usage, progress, threads, exit codes.

Rules. A script's `main(argv)` returns its exit code: 0 ok, 1 failed, 2 usage, 3 cannot connect or timed out or peer
lost, 4 protocol or authentication, 5 verification, 130 interrupted. An error that fastsplit raises on purpose is one
line on stderr; anything else is a bug and shows its traceback. Only results go to stdout.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

from . import __version__
from .errors import FastsplitError
from .printable import MAX_LINE, for_terminal, one_line, trace

__all__ = [
    "Usage",
    "calm_openmp",
    "ignore_stops",
    "make_parser",
    "positive_int",
    "progress",
    "retold",
    "run_main",
    "set_threads",
    "tell",
    "write",
]


_MAX_THREADS = 1024
_MAX_RETOLD_NBYTES = 2**16


class Usage(FastsplitError):
    """Flags that do not go together."""

    exit_code = 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(one_line(message))  # it has flags in it as they came


def make_parser(module: str, description: str) -> argparse.ArgumentParser:
    """A parser with the flags that both scripts have."""
    parser = _Parser(
        prog=f"python -m fastsplit.{module}",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--threads", type=_thread_count, metavar="N", help="threads for torch (its own choice if not given)"
    )
    parser.add_argument("--verbose", action="store_true", help="log what happens on the connection to stderr")
    parser.add_argument("--version", action="version", version=f"fastsplit {__version__}")
    return parser


def positive_int(text: str) -> int:
    """An argparse type: a number of 1 or more."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}, expected 1 or more")
    return value


def _thread_count(text: str) -> int:
    value = positive_int(text)
    if value > _MAX_THREADS:
        raise argparse.ArgumentTypeError(f"{value}, expected {_MAX_THREADS} at most")
    return value


def calm_openmp(spin_count: int = 10_000) -> None:
    """Makes torch's threads sleep soon after a job. Call before torch is imported; the user's own settings win.

    They would spin for some milliseconds, on the cores that the other process needs now. Measured with both sides on
    two cores, TinyLlama's shape in fp32, 1024-token prefill: 8.5 s by default, 8.0 s if they sleep at once, 7.7 s so.
    `spin_count`: how often they look before; some 10 us for a thousand.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", str(spin_count))  # GNU's own, and for it the one that counts


def set_threads(count: int | None) -> None:
    if count is not None:
        from .extras import torch

        torch.set_num_threads(count)


def progress(items: Iterable[Any], total: int, description: str) -> Iterable[Any]:
    """`items` with a progress bar on stderr, where that is a terminal and tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:  # a convenience of the extras, not of the core
        return items
    bar: Iterable[Any] = tqdm(
        items, total=total, desc=description, unit="tensor", file=sys.stderr, disable=None, leave=False
    )
    return bar


def run_main(
    program: str,
    parse: Callable[[], argparse.Namespace],
    work: Callable[[argparse.Namespace], int],
    spin_count: int = 10_000,
) -> int:
    """Parses, works, and turns what goes wrong into a line and an exit code. `spin_count`: see `calm_openmp`."""
    try:
        args = parse()
    except SystemExit as stop:  # argparse has said what there is to say
        return stop.code if isinstance(stop.code, int) else 2
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(f"{program}: %(message)s"))
    logging.basicConfig(level=logging.DEBUG if args.verbose else logging.WARNING, handlers=[handler])
    calm_openmp(spin_count)
    try:
        return work(args)
    except FastsplitError as error:
        tell(program, f"{_kind(error)}{error}")
        return error.exit_code
    except (OSError, MemoryError) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        name = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        tell(program, f"{name}{text}")
        return 1
    except KeyboardInterrupt:
        tell(program, "interrupted")
        return 130


def ignore_stops() -> None:
    """For what is done anyway, and is done soon: closing, and the interpreter's end. A second Ctrl-C would only leave
    things behind, or a traceback out of torch's last steps."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def tell(program: str, text: str) -> None:
    """Says something on stderr, in one line of printable characters."""
    print(f"{program}: {one_line(text)}", file=sys.stderr, flush=True)


def write(text: str) -> None:
    """Writes a part of the result to stdout. On a terminal control characters are escaped, newlines and tabs excepted;
    elsewhere only characters that the encoding lacks are."""
    stream = sys.stdout
    if stream is None:  # closed from the start, as by `>&-`
        return
    encoding = stream.encoding or "utf-8"
    shown = for_terminal(text) if stream.isatty() else text
    print(shown.encode(encoding, "backslashreplace").decode(encoding), end="", flush=True)


@contextlib.contextmanager
def retold(program: str) -> Iterator[None]:
    """What is written to stdout and stderr in here is told afterwards, as lines of printable characters on stderr;
    where this ends with an error, the error alone.

    For the code of others that is at work on a model's files: it warns with their texts as they are, and native code,
    which asks for no `sys.stdout`, prints wherever it likes, a panic of Rust's with its backtrace.
    """
    with contextlib.ExitStack() as stack:
        said = stack.enter_context(open(os.memfd_create("said"), "r+b", buffering=0))
        copies = {}
        for number, stream in ((1, sys.__stdout__), (2, sys.__stderr__)):
            if stream is not None:  # else it was closed from the start, and may be anything now
                copies[number] = os.dup(number)
                stack.callback(os.close, copies[number])
        _flush()
        try:
            for number in copies:
                os.dup2(said.fileno(), number)
            yield
            _flush()
        finally:
            for number, copy in copies.items():
                os.dup2(copy, number)
        said.seek(0)
        text = said.read(_MAX_RETOLD_NBYTES).decode(errors="backslashreplace")
    for line in filter(None, text.split("\n")):
        tell(program, line)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


class _Formatter(logging.Formatter):
    """For the records of other packages: fastsplit's own are printable already, and of MAX_LINE characters."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return one_line(super().formatMessage(record), 2 * MAX_LINE)

    def formatException(self, ei: Any) -> str:
        return super().formatException(ei) if ei[1] is None else trace(ei[1])


def _kind(error: FastsplitError) -> str:
    kinds = {3: "connection: ", 4: "protocol: ", 5: "verification: "}
    return kinds.get(error.exit_code, "")

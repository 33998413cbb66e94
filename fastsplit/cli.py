"""Shared parts of the two scripts: usage, progress, threads, exit codes.

Rules. A script's `main(argv)` returns its exit code: 0 ok, 1 failed, 2 usage, 3 cannot connect or timed out or peer
lost, 4 protocol or authentication, 5 verification, 130 interrupted. A FastsplitError is one line on stderr; any other
error is a bug and shows its traceback. Only results go to stdout.
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
        super().error(one_line(message))  # the message holds flags as the user typed them


def make_parser(module: str, description: str) -> argparse.ArgumentParser:
    """A parser with the flags of both scripts."""
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
    """An argparse type: an integer of 1 or more."""
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

    By default they spin for some milliseconds, on cores that the other process needs. A prefill with both sides on the
    same cores takes a tenth less time. `spin_count`: polls before a thread sleeps, about 10 us for a thousand.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", str(spin_count))  # read by GNU's OpenMP, which ignores the other


def set_threads(count: int | None) -> None:
    if count is not None:
        from .extras import torch

        torch.set_num_threads(count)


def progress(items: Iterable[Any], total: int, description: str) -> Iterable[Any]:
    """`items` with a progress bar on stderr, where that is a terminal and tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:  # tqdm belongs to an extra
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
    """Parses, works, and turns errors into a line and an exit code. `spin_count`: see `calm_openmp`."""
    try:
        args = parse()
    except SystemExit as stop:  # argparse has printed the message
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
    """Ignores SIGINT and SIGTERM. For the short work at the end: closing, and the interpreter's exit. A second Ctrl-C
    there would leave files behind, or print a traceback from torch's exit."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def tell(program: str, text: str) -> None:
    """Prints `text` on stderr, as one line of printable characters."""
    print(f"{program}: {one_line(text)}", file=sys.stderr, flush=True)


def write(text: str) -> None:
    """Writes a part of the result to stdout. On a terminal, control characters except newline and tab are escaped;
    elsewhere only characters that the encoding lacks."""
    stream = sys.stdout
    if stream is None:  # closed from the start, as by `>&-`
        return
    encoding = stream.encoding or "utf-8"
    shown = for_terminal(text) if stream.isatty() else text
    print(shown.encode(encoding, "backslashreplace").decode(encoding), end="", flush=True)


@contextlib.contextmanager
def retold(program: str) -> Iterator[None]:
    """Captures what the block writes to stdout and stderr, native code included, and prints it afterwards on stderr as
    lines of printable characters. If the block raises, the output is dropped.

    For libraries that read a model's files: their warnings contain text of these files, and native code, for example a
    panic in Rust, writes to the descriptors directly.
    """
    with contextlib.ExitStack() as stack:
        said = stack.enter_context(open(os.memfd_create("said"), "r+b", buffering=0))
        copies = {}
        for number, stream in ((1, sys.__stdout__), (2, sys.__stderr__)):
            if stream is not None:  # else it was closed at the start, and its number may belong to another file
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
    """For records of other packages; fastsplit's own are printable and have at most MAX_LINE characters."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return one_line(super().formatMessage(record), 2 * MAX_LINE)

    def formatException(self, ei: Any) -> str:
        return super().formatException(ei) if ei[1] is None else trace(ei[1])


def _kind(error: FastsplitError) -> str:
    kinds = {3: "connection: ", 4: "protocol: ", 5: "verification: "}
    return kinds.get(error.exit_code, "")

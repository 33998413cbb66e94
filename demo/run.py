"""Runs the split as it is meant to run: two processes, one model, one prompt. `make demo` calls this.

Starts the GPU side, waits for its READY line, runs the TEE side against it, and stops the GPU side whatever happened:
an error, Ctrl-C, SIGTERM. The socket lies in a private directory that is removed with it. The text goes to stdout,
progress and the report to stderr, and the exit code is the TEE side's own (the GPU side's, if that is what failed).

    python -m demo.run --prompt "Why is the sky blue?" [--max-new-tokens 64] [--plan folded]
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from fastsplit.printable import one_line

from .smollm2 import ConversionError, model_dir

__all__ = ["DemoError", "main", "start_gpu_side", "stop"]

_READY = "READY uri="
_READY_TIMEOUT_S = 120.0  # a cold disk and a slow import of torch; usually it takes seconds
_STOP_TIMEOUT_S = 10.0


class DemoError(Exception):
    """The GPU side did not come up. `exit_code` is what the demo should exit with."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m demo.run", description="Completes a prompt with a split model.")
    parser.add_argument("--prompt", default="Why is the sky blue?", metavar="TEXT")
    parser.add_argument("--max-new-tokens", default="64", metavar="N")
    parser.add_argument("--plan", default="folded", help="attention's products on the GPU side, if not given")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, _interrupt)
    try:
        return _run(args.prompt, args.max_new_tokens, args.plan)
    except (DemoError, ConversionError) as error:
        _say(str(error))
        return getattr(error, "exit_code", 1)
    except KeyboardInterrupt:
        _say("interrupted")
        return 130


def start_gpu_side(
    model: Path, socket_path: Path, timeout_s: float = _READY_TIMEOUT_S
) -> tuple[subprocess.Popen[bytes], str]:
    """A GPU side that is ready, and the URI it listens on. Raises DemoError if it ends first, or takes too long."""
    command = [sys.executable, "-m", "fastsplit.gpu_side", "--model", str(model), "--listen", f"unix://{socket_path}"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    try:
        line = _read_line(process, time.monotonic() + timeout_s)
        if line is None:
            raise DemoError(f"the GPU side was not ready within {timeout_s:g} s")
        if not line.startswith(_READY):
            process.wait(_STOP_TIMEOUT_S)
            said = f", and said {line!r}" if line else ""
            raise DemoError(f"the GPU side ended with exit code {process.returncode}{said}", process.returncode or 1)
    except BaseException:
        stop(process)
        raise
    return process, line.removeprefix(_READY)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a process: SIGTERM, and SIGKILL for one that does not listen. Returns when it is gone."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _run(prompt: str, max_new_tokens: str, plan: str) -> int:
    model = model_dir()
    with tempfile.TemporaryDirectory(prefix="fastsplit-demo-") as directory:
        _say("starting the GPU side")
        gpu_side, uri = start_gpu_side(model, Path(directory, "demo.sock"))
        try:
            _say(f"the GPU side is ready at {uri}; starting the TEE side")
            _say(f"prompt: {prompt}")
            command = [sys.executable, "-m", "fastsplit.tee_side", "--connect", uri, "--model", str(model), "--chat"]
            command += ["--prompt", prompt, "--max-new-tokens", max_new_tokens, "--plan", plan]
            tee_side = subprocess.Popen(command, stdin=subprocess.DEVNULL)
            try:
                code = tee_side.wait()
            finally:
                stop(tee_side)
        finally:
            stop(gpu_side)
    return code if code >= 0 else 128 - code  # as a shell says it of a process that a signal ended


def _read_line(process: subprocess.Popen[bytes], deadline: float) -> str | None:
    """The first line of a process's output, what there was of it if the process ended, None at the deadline."""
    assert process.stdout is not None
    fd, data = process.stdout.fileno(), b""
    while b"\n" not in data:
        ready, _, _ = select.select([fd], [], [], max(deadline - time.monotonic(), 0.0))
        if not ready:
            return None
        chunk = os.read(fd, 4096)
        if not chunk:
            break
        data += chunk
    return data.partition(b"\n")[0].decode(errors="replace")


def _say(text: str) -> None:
    print(f"demo: {one_line(text)}", file=sys.stderr, flush=True)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())

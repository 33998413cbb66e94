"""python -m fuzz: see the package. `--inputs` of each target, or `--seconds` for all of them together."""

from __future__ import annotations

import argparse
import faulthandler
import time
from pathlib import Path

from . import fuzz
from .targets import TARGETS

_HANGS_S = 300.0  # between two reports, which are some seconds apart

parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
parser.add_argument("targets", nargs="*", default=list(TARGETS), metavar="target", help=", ".join(TARGETS))
parser.add_argument("--inputs", type=int, default=10**12)
parser.add_argument("--seconds", type=float, default=1e9)
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--last", type=Path, help="a directory for the inputs under way")
arguments = parser.parse_args()

print(f"{'target':10}{'inputs':>12}{'1/s':>10}{'kept':>8}{'edges':>8}{'blocks':>8}", flush=True)
for name in arguments.targets:
    last = None if arguments.last is None else arguments.last / f"last-{name}"
    seconds, told_at = arguments.seconds / len(arguments.targets), time.monotonic()
    faulthandler.dump_traceback_later(_HANGS_S, exit=True)
    for report in fuzz(TARGETS[name], arguments.seed, arguments.inputs, seconds, last):
        line = f"{name:10}{report.inputs:12}{report.per_s:10.0f}{report.kept:8}{report.edges:8}{report.blocks:8}"
        faulthandler.dump_traceback_later(_HANGS_S, exit=True)
        if time.monotonic() - told_at > 15:
            told_at = time.monotonic()
            print(line, flush=True)
    print(f"{line}  done", flush=True)

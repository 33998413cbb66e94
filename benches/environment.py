"""Under what circumstances something was measured, and where the result goes: the same for all benchmarks.

Rules. A result goes to build/bench/ unless `--output` says otherwise; benches/results/, which the pages are written out
of, is only written by that. A part of a run does not take the place of a whole one there, unless `--force` says so.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import fastsplit

__all__ = ["OUTPUT", "RESULTS", "add_output", "add_output_dir", "describe", "keep_whole", "save"]

RESULTS = Path(__file__).resolve().parent / "results"
OUTPUT = Path(__file__).resolve().parents[1] / "build" / "bench"
_PACKAGES = (
    "numpy",
    "flatbuffers",
    "torch",
    "transformers",
    "safetensors",
    "msgpack",
    "pyzmq",
    "iceoryx2",
    "grpcio",
    "protobuf",
    "pyarrow",
    "msgspec",
    "pycapnp",
)


def describe(command: Sequence[str]) -> dict[str, Any]:
    """This machine and this checkout. `command`: what was run, to run it again."""
    root = Path(__file__).resolve().parents[1]
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.join(command),
        "git_revision": _output(["git", "-C", str(root), "rev-parse", "HEAD"]),
        "git_changed_files": len((_output(["git", "-C", str(root), "status", "--porcelain"]) or "").splitlines()),
        "cpu": _first_value("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        # how OpenMP's idle threads wait decides how much of another process's core they take
        "openmp": {key: value for key, value in os.environ.items() if key.startswith(("OMP_", "GOMP_", "KMP_"))},
        "memory": _first_value("/proc/meminfo", "MemTotal"),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {"fastsplit": fastsplit.__version__, **{name: _version(name) for name in _PACKAGES}},
        "load_average": os.getloadavg(),
    }


def add_output(parser: argparse.ArgumentParser, file: str, *, parts: bool = False) -> None:
    """`--output`, which is build/bench/FILE if not given. `parts`: there is `--force`, too, for `keep_whole`."""
    text = f"the JSON file (default: build/bench/{file})"
    parser.add_argument("--output", type=Path, metavar="FILE", default=OUTPUT / file, help=text)
    if parts:
        _add_force(parser)


def add_output_dir(parser: argparse.ArgumentParser, files: str) -> None:
    """`--output-dir`, the same for several files, and `--force`."""
    text = f"of {files} (default: build/bench)"
    parser.add_argument("--output-dir", type=Path, metavar="DIR", default=OUTPUT, help=text)
    _add_force(parser)


def _add_force(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="replace a file of benches/results/ by a part of a run")


def keep_whole(
    parser: argparse.ArgumentParser, args: argparse.Namespace, narrowing: Iterable[str], paths: Iterable[Path]
) -> None:
    """Ends with a usage error if only a part is run and would replace one of `paths` in benches/results/.

    `narrowing`: the arguments that leave something out. Call this before anything changes `args`.
    """
    given = [name for name in narrowing if (value := getattr(args, name)) and value != parser.get_default(name)]
    for path in paths if given and not args.force else ():
        if path.exists() and path.resolve().is_relative_to(RESULTS):
            parser.error(
                f"{path} has a whole run, and with {', '.join(given).replace('_', '-')} this is a part of one: choose "
                "where else it goes, or give --force"
            )


def save(result: dict[str, Any], path: Path) -> Path:
    """Writes a result as JSON; returns where it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def _output(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _first_value(path: str, key: str) -> str | None:
    with contextlib.suppress(OSError):
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

"""Under what circumstances something was measured, and where the result goes: the same for all benchmarks.

Rules. A result is JSON with statistics and no raw samples, in six digits. It goes to build/bench/ unless `--output`
says otherwise; only with `--output` it goes to benches/results/, from which the pages are written. A part of a run
replaces a whole one there only with `--force`.
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
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import fastsplit

__all__ = ["OUTPUT", "RESULTS", "ROOT", "add_output", "describe", "keep_whole", "save"]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benches" / "results"
OUTPUT = ROOT / "build" / "bench"
_PACKAGES = (
    *("fastsplit", "numpy", "flatbuffers", "torch", "transformers", "safetensors", "msgpack", "pyzmq"),
    *("iceoryx2", "grpcio", "protobuf", "pyarrow", "msgspec", "pycapnp"),
)


def describe(command: Sequence[str]) -> dict[str, Any]:
    """This machine and this checkout. `command`: what was run, to run it again."""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.join(command),
        "git_revision": _output("rev-parse", "HEAD"),
        "git_changed_files": len((_output("status", "--porcelain") or "").splitlines()),
        "cpu": _first_value("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        # how OpenMP's idle threads wait decides how much of another process's core they take
        "openmp": {key: value for key, value in os.environ.items() if key.startswith(("OMP_", "GOMP_", "KMP_"))},
        "memory": _first_value("/proc/meminfo", "MemTotal"),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES} | {"fastsplit": fastsplit.__version__},
        "load_average": os.getloadavg(),
    }


def add_output(parser: argparse.ArgumentParser, file: str) -> None:
    """`--output FILE` (`--output-dir DIR` where `file` ends with PART.json), by default in build/bench; and
    `--force`."""
    if file.endswith("PART.json"):
        parser.add_argument("--output-dir", type=Path, metavar="DIR", default=OUTPUT, help=f"of {file} (build/bench)")
    else:
        text = f"the JSON file (default: build/bench/{file})"
        parser.add_argument("--output", type=Path, metavar="FILE", default=OUTPUT / file, help=text)
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


def save(result: Mapping[str, Any], path: Path) -> Path:
    """Writes JSON beside `path`, one row a line, then puts it there: an interrupted run leaves the file of before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    lines = [f" {json.dumps(key)}: {_rows(_rounded(value))}" for key, value in result.items()]
    unfinished.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return unfinished.replace(path)


def _rows(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
    if isinstance(value, dict) and value and all(isinstance(one, dict) for one in value.values()):
        return "{\n  " + ",\n  ".join(f"{json.dumps(key)}: {json.dumps(one)}" for key, one in value.items()) + "\n }"
    return json.dumps(value)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, (list, tuple)) else value


def _output(*command: str) -> str | None:
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git = ["git", "-C", str(ROOT), *command]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    return None


def _first_value(path: str, key: str) -> str | None:
    with contextlib.suppress(OSError):
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return None


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None

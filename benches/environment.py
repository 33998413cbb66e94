"""Under what circumstances something was measured, and where the result goes: the same fields for all benchmarks."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fastsplit

__all__ = ["RESULTS", "describe", "save"]

RESULTS = Path(__file__).resolve().parent / "results"
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


def save(name: str, result: dict[str, Any], path: Path | None = None) -> Path:
    """Writes a result as JSON, into benches/results/ if no path is given; returns where it is."""
    if path is None:
        path = RESULTS / f"{name}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.json"
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

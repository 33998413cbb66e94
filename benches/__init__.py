"""Benchmarks. Each is a module with a docstring that says how it is measured.

OpenMP's threads wait in here as in the TEE side's script; the executors' wait as in the GPU side's, and HF's as torch
has them (`UNTOUCHED`). It has to be said before torch is imported, so it is said here.
"""

import os

from fastsplit.cli import calm_openmp

_NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")

UNTOUCHED: dict[str, str | None] = {name: os.environ.get(name) for name in _NAMES}
"""The variables as the user has them, None for those that are not set."""

calm_openmp()

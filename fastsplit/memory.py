"""The pool of memory that tensors are received into, under its public name; it is tensors/pool.py."""

from __future__ import annotations

from .tensors.pool import Pool, pool

__all__ = ["Pool", "pool"]

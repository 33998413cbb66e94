"""Arrays of torch and numpy, in and out of memory that tensors travel from and arrive in. Knows no link."""

from __future__ import annotations

from .outgoing import (
    Arrays,
    Cast,
    Desc,
    Outgoing,
    SharedMemory,
    collect,
    collect_cast,
    dtype_of,
    nbytes_of,
    parse_arrays,
    parse_expect,
    parse_shape,
    share,
    widen,
)
from .pool import Lease, Memory, Pool, Slab, Tenant

__all__ = [
    "Arrays",
    "Cast",
    "Desc",
    "Lease",
    "Memory",
    "Outgoing",
    "Pool",
    "SharedMemory",
    "Slab",
    "Tenant",
    "collect",
    "collect_cast",
    "dtype_of",
    "nbytes_of",
    "parse_arrays",
    "parse_expect",
    "parse_shape",
    "share",
    "widen",
]

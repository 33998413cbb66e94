"""Arrays of torch and numpy, in and out of memory: how they are described, sent, cast, and made of received memory.

The package's face: other rooms import from here, and from `pool` what concerns memory. It knows no connection.
"""

from __future__ import annotations

from .arrays import Arrays, Desc, dtype_of, parse_arrays, parse_expect, parse_shape
from .casts import Cast, collect_cast, widen
from .outgoing import Outgoing, SharedMemory, check_memory, collect, copy_in, nbytes_of, share
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
    "check_memory",
    "collect",
    "collect_cast",
    "copy_in",
    "dtype_of",
    "nbytes_of",
    "parse_arrays",
    "parse_expect",
    "parse_shape",
    "share",
    "widen",
]

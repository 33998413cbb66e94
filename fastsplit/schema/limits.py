"""The caps on what one side accepts from the other.

Rules. Each side states its own caps in the handshake and enforces them on what comes in; it keeps to the peer's on what
goes out. Both sides use the functions here, so that a receiver accepts what a sender lets pass. A cap is checked before
memory is allocated. Handshakes and errors must always fit: two caps have a minimum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from ..errors import LimitError, SettingError, shown

__all__ = ["ARRAYS", "MAX_DIMS", "Excess", "Limits", "over", "parse_limits"]

MAX_DIMS = 64 if int(np.__version__.partition(".")[0]) >= 2 else 32
"""The most dimensions that an array of numpy can have: it bounds `Limits.max_dims`."""
_MIN = {"max_metadata_nbytes": 4096, "max_attrs": 16}
_MAX = {"max_metadata_nbytes": 2**32 - 1}  # the header's field has 32 bits

Excess = Callable[[str, str, str], Exception]
"""`excess(field, came, accepted)`: the error for a value over a cap."""


@dataclass(frozen=True)
class Limits:
    """What one side accepts. Every value is an inclusive maximum; SettingError for one out of range."""

    max_metadata_nbytes: int = 64 * 1024
    """Bytes of FlatBuffers metadata in one frame."""
    max_message_nbytes: int = 4 * 1024**3
    """Bytes of all tensors of one message together. Memory is touched only as the bytes arrive."""
    max_tensors: int = 64
    """Tensors in one message."""
    max_dims: int = 8
    """Dimensions of one tensor. Values beyond 64 (32 with numpy 1) count as 64."""
    max_attrs: int = 64
    """Attributes of one message."""
    max_inflight: int = 1024
    """Requests on one connection without an answer."""
    max_segments: int = 64
    """Segments of the peer's shared memory that are mapped at the same time."""
    max_shared_nbytes: int = 8 * 1024**3
    """Bytes of all these segments together. They are the peer's memory, and address space here."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            low, high = _MIN.get(field.name, 1), _MAX.get(field.name, 2**63 - 1)
            if not isinstance(value, int) or not low <= value <= high:
                raise SettingError(f"{field.name}: {shown(value)}, expected an int from {low} to {high}")

    # Each check raises what `excess` returns. They are in the order of a reader, which knows the counts first.

    def check_tensors(self, count: int, excess: Excess) -> None:
        """Tensors of one message."""
        if count > self.max_tensors:
            raise excess("tensors", str(count), f"at most {self.max_tensors}")

    def check_attrs(self, count: int, excess: Excess) -> None:
        """Attributes of one message."""
        if count > self.max_attrs:
            raise excess("attrs", str(count), f"at most {self.max_attrs}")

    def check_dims(self, field: str, count: int, excess: Excess) -> None:
        """Dimensions of the tensor `field`."""
        max_dims = min(self.max_dims, MAX_DIMS)
        if count > max_dims:
            raise excess(f"{field} dimensions", str(count), f"at most {max_dims}")

    def check_shape(self, field: str, shape: Sequence[int], itemsize: int, excess: Excess) -> None:
        """The bytes of the tensor `field` by its shape. A dimension of 0 counts as 1, since numpy and torch bound the
        other dimensions of an empty tensor too."""
        nbytes = math.prod([dim or 1 for dim in shape]) * itemsize
        if nbytes > self.max_message_nbytes:
            raise excess(
                f"{field} shape", f"{shown(list(shape))}, {nbytes} bytes", f"at most {self.max_message_nbytes} bytes"
            )

    def check_nbytes(self, nbytes: int, excess: Excess) -> None:
        """Bytes of all tensors of one message together."""
        if nbytes > self.max_message_nbytes:
            raise excess("bytes of all tensors", str(nbytes), f"at most {self.max_message_nbytes}")

    def check_metadata(self, field: str, nbytes: int, excess: Excess) -> None:
        """Bytes of one frame's metadata, or of the part `field`."""
        if nbytes > self.max_metadata_nbytes:
            raise excess(field, f"{nbytes} bytes", f"at most {self.max_metadata_nbytes} bytes")


def parse_limits(limits: Any) -> Limits:
    """The argument `limits`; None stands for the defaults. Raises SettingError."""
    if limits is None:
        return Limits()
    if not isinstance(limits, Limits):
        raise SettingError(f"limits: {shown(limits)}, expected None or fastsplit.Limits")
    return limits


ARRAYS = Limits(max_dims=2**63 - 1, max_message_nbytes=2**63 - 1)
"""What numpy and torch can hold, without regard to a peer."""


def over(field: str, came: str, accepted: str) -> LimitError:
    """An Excess for messages of ours: the error for a value over a cap of the peer."""
    return LimitError(f"{field}: {came}, the peer accepts {accepted}")

"""The caps on what one side accepts from the other.

Rules: each side states its own caps in the handshake and enforces them on what comes in; it honours the peer's on what
goes out. Both do so by the same functions here, so that what a sender lets pass a receiver accepts. A cap is checked
before anything is allocated. Handshakes and errors must always fit, so two caps have a floor.
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
"""No array of numpy's has more, whatever `Limits.max_dims` says."""
_LEAST = {"max_metadata_nbytes": 4096, "max_attrs": 16}
_MOST = {"max_metadata_nbytes": 2**32 - 1}  # the header's field has 32 bits

Excess = Callable[[str, str, str], Exception]
"""Makes the error for what is over a cap, of a field, what came, and what is accepted."""


@dataclass(frozen=True)
class Limits:
    """What this side accepts. Every value is an inclusive maximum."""

    max_metadata_nbytes: int = 64 * 1024
    """Bytes of FlatBuffers metadata in one frame."""
    max_message_nbytes: int = 4 * 1024**3
    """Bytes of all tensors of one message together. Memory is only touched as the bytes really arrive."""
    max_tensors: int = 64
    """Tensors in one message."""
    max_dims: int = 8
    """Dimensions of one tensor. Beyond 64 (32 with numpy 1) it is as if it were 64."""
    max_attrs: int = 64
    """Attributes of one message."""
    max_inflight: int = 1024
    """Requests on one connection that have no reply yet."""
    max_segments: int = 64
    """Segments of the peer's shared memory that are mapped at the same time."""
    max_shared_nbytes: int = 8 * 1024**3
    """Bytes of all these segments together. It is the peer's memory: what counts here is address space."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least, most = _LEAST.get(field.name, 1), _MOST.get(field.name, 2**63 - 1)
            if not isinstance(value, int) or not least <= value <= most:
                raise SettingError(f"{field.name}: {shown(value)}, expected an int from {least} to {most}")

    # Each raises what `excess` makes. The order is that of a reader, which knows the counts first.

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
        most = min(self.max_dims, MAX_DIMS)
        if count > most:
            raise excess(f"{field} dimensions", str(count), f"at most {most}")

    def check_shape(self, field: str, shape: Sequence[int], itemsize: int, excess: Excess) -> None:
        """The extent of the tensor `field`, in bytes. Zero counts as one: the other dimensions of an empty tensor must
        not overflow what numpy and torch can hold."""
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
        """Bytes of one frame's metadata, or of a part of it."""
        if nbytes > self.max_metadata_nbytes:
            raise excess(field, f"{nbytes} bytes", f"at most {self.max_metadata_nbytes} bytes")


def parse_limits(limits: Any) -> Limits:
    """The argument `limits`, None for the usual ones. Raises SettingError."""
    if limits is None:
        return Limits()
    if not isinstance(limits, Limits):
        raise SettingError(f"limits: {shown(limits)}, expected None or fastsplit.Limits")
    return limits


ARRAYS = Limits(max_dims=2**63 - 1, max_message_nbytes=2**63 - 1)
"""What numpy and torch can hold, whatever a peer accepts."""


def over(field: str, came: str, accepted: str) -> LimitError:
    """The error for a message of ours that is over a cap of the peer's: an Excess."""
    return LimitError(f"{field}: {came}, the peer accepts {accepted}")

"""The caps on what one side accepts from the other.

Rules: each side states its own caps in the handshake and enforces them on what comes in; it honours the peer's on what
goes out. A cap is checked before anything is allocated.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

__all__ = ["Limits"]


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
    """Dimensions of one tensor."""
    max_attrs: int = 64
    """Attributes of one message."""
    max_inflight: int = 1024
    """Requests on one connection that have no reply yet."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or not 1 <= value < 2**63:
                raise ValueError(f"{field.name}: {value!r}, expected an int from 1 to 2**63 - 1")

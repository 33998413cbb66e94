"""The caps on what one side accepts from the other.

Rules: each side states its own caps in the handshake and enforces them on what comes in; it honours the peer's on what
goes out. A cap is checked before anything is allocated. Handshakes and errors must always fit, so two caps have a
floor.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

__all__ = ["Limits"]

_LEAST = {"max_metadata_nbytes": 4096, "max_attrs": 16}
_MOST = {"max_metadata_nbytes": 2**32 - 1}  # the header's field has 32 bits


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
    max_segments: int = 64
    """Segments of the peer's shared memory that are mapped at the same time."""
    max_shared_nbytes: int = 8 * 1024**3
    """Bytes of all these segments together. It is the peer's memory: what counts here is address space."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least, most = _LEAST.get(field.name, 1), _MOST.get(field.name, 2**63 - 1)
            if not isinstance(value, int) or not least <= value <= most:
                raise ValueError(f"{field.name}: {value!r}, expected an int from {least} to {most}")

"""What one end of a connection counted and timed. Plain numbers: reading them costs nothing and locks nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

__all__ = ["Stats"]


@dataclass
class Stats:
    """Counts since the connection was made. `_s` are seconds, everything else is a count or bytes."""

    calls: int = 0
    """Requests sent."""
    bytes_sent: int = 0
    """Bytes through the socket, frames' heads included."""
    bytes_received: int = 0
    bytes_shared: int = 0
    """Tensor bytes that crossed by reference, in shared memory, both ways."""
    bytes_copied: int = 0
    """Tensor bytes that fastsplit had to copy to send them. Over a socket: not contiguous, not little-endian, or on
    another device. Where memory is shared: all that did not lie in it."""
    bytes_staged: int = 0
    """Tensor bytes that arrived in the same read as their frame's head (at most 4 KiB a frame) and were copied over."""
    serialization_s: float = 0.0
    """Describing, encoding, decoding, validating, making tensors of received memory."""
    wait_s: float = 0.0
    """The callers' time in sending and waiting for replies."""
    remote_s: float = 0.0
    """Time in the peer's handlers, as it says. Calls in flight together may overlap in it."""

    @property
    def communication_s(self) -> float:
        """The callers' wait that was not the peer's work."""
        return max(self.wait_s - self.remote_s, 0.0)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "communication_s": self.communication_s}

    def add(self, other: Stats) -> Stats:
        """Adds another connection's counts and times. Returns itself."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
        return self

"""What one end of a connection counted and timed. Plain numbers: reading them costs nothing and locks nothing."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

__all__ = ["Coded", "Stats"]


@dataclass
class Coded:
    """What one coding did, both ways: `raw_nbytes` of tensors became `wire_nbytes`. The times are this side's."""

    tensors: int = 0
    raw_nbytes: int = 0
    wire_nbytes: int = 0
    encode_s: float = 0.0
    decode_s: float = 0.0


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
    """Tensor bytes that arrived in the same read as their frame's head and were copied over: at most 4 KiB a frame, 68
    where the compiled core reads."""
    serialization_s: float = 0.0
    """Describing, encoding, decoding, validating, making tensors of received memory."""
    wait_s: float = 0.0
    """The callers' time in sending and waiting for replies."""
    remote_s: float = 0.0
    """Time in the peer's handlers, as it says. Calls in flight together may overlap in it."""
    casts_widened: int = 0
    """Tensors that were to travel as float16 and held what only bfloat16 can, so that they travelled as that."""
    codecs: dict[str, Coded] = field(default_factory=dict)
    """By name, such as "float16" or "zstd" (a tensor may be both): what travelled otherwise than it is in memory. Its
    encoding and decoding is part of `serialization_s`; what a cast writes does not count as copied."""

    @property
    def communication_s(self) -> float:
        """The callers' wait that was not the peer's work."""
        return max(self.wait_s - self.remote_s, 0.0)

    def as_dict(self) -> dict[str, Any]:
        """All numbers; what is counted by codec is not among them."""
        numbers = {known.name: getattr(self, known.name) for known in fields(self) if known.name != "codecs"}
        return {**numbers, "communication_s": self.communication_s}

    def add(self, other: Stats) -> Stats:
        """Adds another connection's counts and times. Returns itself."""
        for known in fields(self):
            if known.name != "codecs":
                setattr(self, known.name, getattr(self, known.name) + getattr(other, known.name))
        for name, coded in list(other.codecs.items()):
            own = self.codecs.setdefault(name, Coded())
            for known in fields(coded):
                setattr(own, known.name, getattr(own, known.name) + getattr(coded, known.name))
        return self

"""A guard's place: what may look at every call of a forward pass, and change what is sent and what is used.

A guard that checks products, or hides what is sent, stands here; without one nothing is done.

Rules. `before` and `after` are called once for each call, in order within a chunk; the calls of chunks in different
lanes interleave. The inputs of a call's inner steps are not known before the reply: a guard that needs them works in
`after`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from ..extras import torch
from ..split.plan import Call

if TYPE_CHECKING:
    from .program import Chunk

__all__ = ["Guard"]


class Guard(Protocol):
    """Stands around every call of a `Runner`. `call` says which steps it has, and the names of what it carries
    (split/contract.py has their shapes); `chunk` which rows of which cache it is for."""

    def before(self, call: Call, chunk: Chunk, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """What is sent: `tensors`, or others of the same shapes. `tensors`: those of `call.inputs`, without the scale
        of a single row, which is a number."""

    def after(
        self, call: Call, chunk: Chunk, sent: tuple[torch.Tensor, ...], reply: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor]:
        """What is used: `reply`, or others of the same shapes. `sent`: what `before` returned. Memory that is shared
        can be changed by the executor at any moment: a guard that decides by a tensor copies it first, and returns the
        copy."""

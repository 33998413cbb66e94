"""The steps of a call's path that can be compiled: one name for each, and its contract.

The modules of wire/ take these names from here, so that another implementation can stand behind them: a small C
extension, built where there is a compiler. Now each name is the Python class or function itself, bound at import, which
costs a call nothing. The Python code stays the reference, and all tests of the protocol run over every implementation.

Why here. All that call these names are in wire/, and what they name is in schema/ and tensors/, of which schema/ knows
nothing of tensors/. The module imports nothing else of wire/, so that shm/ may use it too. How a slot of the ring is
written, awaited and read is the interface of a transport (transport/base.py): a compiled ring is another transport.

    Encoder       `encode` finds a message's template by op, dtypes and shapes, patches its numbers, and returns the
                  metadata behind `headroom` zero bytes, and how many bytes at its end vary
    pack_header   writes a frame's header into the first 40 bytes of what `encode` returned
    parse_header  returns a frame's header as a tuple of ints, checked in full against the limits
    Decoder       `decode` compares metadata with what came before, and returns the message, validated in full
    share         finds the places of tensors in shared memory, copies those that lie elsewhere into it, and returns
                  descriptions and placements
    Lease         is a buffer over a part of shared memory; at the death of its last view, `token` goes to `home`
    parse_arrays  returns what makes tensors: `view(memory, desc)` over received memory or a Lease, without a copy
"""

from __future__ import annotations

from ..schema.decoder import Decoder
from ..schema.encoder import Encoder
from ..schema.header import pack_header, parse_header
from ..tensors import Lease, parse_arrays, share

__all__ = ["Decoder", "Encoder", "Lease", "pack_header", "parse_arrays", "parse_header", "share"]

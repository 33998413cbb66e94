"""What each row of a chunk sees, and by how much it is rotated.

A `Geometry` holds the rotary tables, the row blocks and the masks of some layers within a chunk: layers with the same
rotary embedding and window share one.

Rules. What a row sees is decided by slots, the positions of the KV cache, as in HF: padding takes a slot and is masked.
Positions, which the rotary embedding rotates by, count tokens. A row of padding sees itself: something that is finite.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from ..extras import torch
from ..models import ModelConfig, Rope
from ..split.blocks import Block, block_attrs, choose_block_rows, row_blocks
from ..split.functional import int64_range, rotary_matrix
from ..split.rope import cos_sin

__all__ = ["Geometry", "GeometryMaker", "Masked", "selected_rows"]

_MIN_TABLE = 512

Masked = list[tuple[slice, torch.Tensor]]
"""What the rows of a block do not see: columns, and a mask [B or 1, 1, rows, these columns] or one that broadcasts to
it; True is masked."""


@dataclass(slots=True)
class Geometry:
    """What the attention of some layers has in common within a chunk of n rows."""

    cos: torch.Tensor
    """[1 or B, n, 1, half]: of the rows' positions."""
    sin: torch.Tensor
    start: int
    """The slot of the chunk's first row."""
    blocks: list[Block]
    block_attrs: dict[str, Any]
    """The blocks as a request has them."""
    masked: list[Masked]
    """For each block."""
    causal: bool
    """Whether a row sees all slots up to its own: no window, no padding."""
    rotation: torch.Tensor | None = None
    """`rotary_matrix`, for a single row: one product instead of six operations."""
    selected: Geometry | None = None
    """The same where one row of each sequence goes on."""
    biases: list[torch.Tensor | None] | None = None
    """The masks as `fused_attention` needs them; made at first use."""


class GeometryMaker:
    """Makes the geometries of one model. `dtype`: of the rotary tables. `block_rows`: rows in a block of scores; None:
    the default."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, block_rows: int | None) -> None:
        self._config = config
        self._dtype = dtype
        self._block_rows = block_rows
        self._tables: dict[Rope, tuple[int, torch.Tensor, torch.Tensor]] = {}

    def layers(
        self,
        start: int,
        rows: int,
        mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        length: int,
        selected: torch.Tensor | None,
    ) -> list[Geometry]:
        """For each layer the geometry of a chunk of `rows` rows after `start` slots.

        `mask` [B, start + rows] bool: which slots hold a token; None: all do. `positions` [B, rows] int64; None: the
        slots. `length`: positions that the whole sequence has. `selected` [B] int64: the row of each sequence that goes
        on in the last layer; None: all do.
        """
        config = self._config
        by_kind: dict[tuple[Rope, int], Geometry] = {}
        layers = []
        for layer in range(config.num_hidden_layers):
            kind = (config.rope_of(layer), config.window(layer))
            geometry = by_kind.get(kind)
            if geometry is None:
                geometry = by_kind[kind] = self._make(*kind, start, rows, mask, positions, length, selected)
            layers.append(geometry)
        return layers

    def _make(
        self,
        rope: Rope,
        window: int,
        start: int,
        rows: int,
        mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        length: int,
        selected: torch.Tensor | None,
    ) -> Geometry:
        cos, sin = self._rotary(rope, length)
        if positions is None:
            cos, sin = (table[start : start + rows].view(1, rows, 1, -1) for table in (cos, sin))
        else:
            cos, sin = (table[positions].unsqueeze(2) for table in (cos, sin))
        total = start + rows
        blocks = row_blocks(rows, total, choose_block_rows(rows, self._block_rows), window)
        slots = [int64_range(start + block.start, start + block.start + block.rows)[None] for block in blocks]
        masked = [self._masked(block, window, mask, at, start) for block, at in zip(blocks, slots)]
        causal = mask is None and (not window or window >= total)
        geometry = Geometry(cos, sin, start, blocks, block_attrs(blocks), masked, causal)
        if selected is not None:
            first = max(start + int(selected.min()) + 1 - window, 0) if window else 0
            block = Block(0, 1, first, total)
            masked = [self._masked(block, window, mask, (selected + start)[:, None], None)]
            geometry.selected = Geometry(cos, sin, start, [block], block_attrs([block]), masked, False)
        if rows == 1 and len(cos) == 1 and mask is None:
            geometry.rotation = rotary_matrix(cos.flatten(), sin.flatten(), self._config.head_dim)
        return geometry

    def _masked(
        self, block: Block, window: int, mask: torch.Tensor | None, slots: torch.Tensor, start: int | None
    ) -> Masked:
        """What a block's rows do not see. `slots` [B or 1, rows]: those of its rows. `start`: the chunk's, whose rows
        the block's are one after another; None if they may be any."""
        _, rows, first, end = block
        if mask is None and start is not None:
            # Only the corners: the rest is seen by all rows.
            masked: Masked = []
            if rows > 1:
                masked.append((slice(end - rows - first, None), _corner(rows)))
                oldest = start + block.start + 1 - window  # the first slot that the block's first row sees
                if window and oldest + rows > 1:
                    count = min(rows - 1, end - first)
                    columns = int64_range(first, first + count)
                    behind = columns[None] < int64_range(oldest, oldest + rows)[:, None]
                    masked.append((slice(0, count), behind))
            return masked
        columns = int64_range(first, end)
        at = slots.unsqueeze(-1)  # [B or 1, rows, 1]
        seen = columns <= at
        if window:
            seen &= columns > at - window
        if mask is not None:
            seen = seen & mask[:, None, first:end]
            seen |= (columns == at) & ~seen.any(-1, keepdim=True)
        if bool(seen.all()):
            return []
        return [(slice(None), ~seen.unsqueeze(1))]

    def _rotary(self, rope: Rope, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [at least `length`, half], kept for later chunks."""
        have = self._tables.get(rope)
        if have is not None and (have[0] == length if rope.depends_on_length else have[0] >= length):
            return have[1:]
        size = length if rope.depends_on_length else max(_MIN_TABLE, 2 * length)
        cos, sin = (table.to(self._dtype) for table in cos_sin(rope, self._config.head_dim, size))
        self._tables[rope] = (size, cos, sin)
        return cos, sin


@functools.lru_cache(16)
def _corner(rows: int) -> torch.Tensor:
    """What a block's last columns mask from its rows: [rows, rows] bool, not to be changed."""
    return torch.ones(rows, rows, dtype=torch.bool, device="cpu").triu_(1)


def selected_rows(rows: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
    """[B, n, ...] -> [B, 1, ...], a copy: the row of each sequence that `selected` [B] names."""
    where = selected.view(-1, 1, *[1] * (rows.dim() - 2)).expand(len(rows), 1, *rows.shape[2:])
    return rows.gather(1, where)

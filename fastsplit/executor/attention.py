"""The executor's two products of attention, on packed blocks of a score matrix: pure functions of tensors.

B sequences, r rows of each; H query heads, G kv heads, D the head's length. Query head h belongs to kv head
h // (H / G). kv heads are never repeated: the query heads of one kv head are rows of one product. packed: the scores
[B, H, rows, columns] of all blocks one after another.

Each function has a form of its own for one row, which needs no copy: about 20 us less in each, for every layer of every
token.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..extras import torch
from ..split.blocks import Block

__all__ = ["scores", "weighted_values"]


def scores(
    queries: torch.Tensor, keys: torch.Tensor, blocks: Sequence[Block], scale: float, packed: torch.Tensor
) -> None:
    """Writes the products of queries * scale with the blocks' keys to `packed`; zeros behind them.

    queries [B, r, H, D], keys [B * G, capacity, D], packed flat, of `packed_elements` or more.
    """
    batch, count, heads, head_dim = queries.shape
    group = batch * heads // keys.shape[0]
    per_row = batch * heads
    if count == 1:
        _, _, first, end = blocks[0]
        columns = end - first
        offset = per_row * columns
        scaled = queries.reshape(-1, group, head_dim).mul(scale)
        target = packed.narrow(0, 0, offset).view(-1, group, columns)
        torch.bmm(scaled, keys.narrow(1, first, columns).transpose(1, 2), out=target)
    else:
        by_kv_head = queries.reshape(batch, count, -1, group, head_dim).permute(0, 2, 3, 1, 4)
        offset = 0
        for start, rows, first, end in blocks:
            columns = end - first
            # the scale costs nothing here: a kv head's queries must be gathered in any case
            own = by_kv_head.narrow(3, start, rows)
            scaled = torch.mul(own, scale, out=own.new_empty(own.shape)).view(keys.shape[0], -1, head_dim)
            size = per_row * rows * columns
            target = packed.narrow(0, offset, size).view(keys.shape[0], -1, columns)
            torch.bmm(scaled, keys.narrow(1, first, columns).transpose(1, 2), out=target)
            offset += size
    if offset < packed.shape[0]:  # memory that may have been another client's
        packed.narrow(0, offset, packed.shape[0] - offset).zero_()


def weighted_values(packed: torch.Tensor, values: torch.Tensor, blocks: Sequence[Block], out: torch.Tensor) -> None:
    """Writes the products of the weights in `packed` with the blocks' values to `out`.

    values [B * G, capacity, D], out [B, r, H * D], contiguous.
    """
    batch, count, width = out.shape
    head_dim = values.shape[2]
    per_row = batch * width // head_dim
    group = per_row // values.shape[0]
    if count == 1:
        _, _, first, end = blocks[0]
        columns = end - first
        weights = packed.narrow(0, 0, per_row * columns).view(-1, group, columns)
        torch.bmm(weights, values.narrow(1, first, columns), out=out.view(-1, group, head_dim))
        return
    by_kv_head = out.view(batch, count, -1, group, head_dim).permute(0, 2, 3, 1, 4)
    offset = 0
    for start, rows, first, end in blocks:
        columns = end - first
        size = per_row * rows * columns
        weights = packed.narrow(0, offset, size).view(values.shape[0], -1, columns)
        weighted = torch.bmm(weights, values.narrow(1, first, columns))
        target = by_kv_head.narrow(3, start, rows)
        target.copy_(weighted.view(target.shape))
        offset += size

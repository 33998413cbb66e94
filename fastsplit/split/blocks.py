"""Row blocks of causal scores: which columns each block of rows has, and how a message carries them.

A score matrix is cut into blocks of rows. A block's columns stop at the diagonal of its last row, and begin where the
window of its first row does. All blocks of a call travel in one tensor, one after another (`packed_elements`).

Rules. Which columns a row may see is the TEE side's business: the executor computes the blocks that it is told. A
request's blocks are checked by `parse_blocks` before they are used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import SettingError

__all__ = ["MAX_BLOCKS", "Block", "block_attrs", "choose_block_rows", "packed_elements", "parse_blocks", "row_blocks"]

MAX_BLOCKS = 64
"""Row blocks in one message."""

_BLOCK_ROWS = 128
_PACKED_MULTIPLE = 1024


class Block(NamedTuple):
    """Rows `start` to `start + rows` of a score matrix, and the columns that they have of it: `first` to `end`."""

    start: int
    rows: int
    first: int
    end: int

    @property
    def columns(self) -> int:
        return self.end - self.first


def choose_block_rows(rows: int, wanted: int | None = None) -> int:
    """Rows in a block for a score matrix of `rows` rows: `wanted` (None: 128), or more, to keep the message within
    MAX_BLOCKS."""
    return max(wanted or _BLOCK_ROWS, -(-rows // MAX_BLOCKS))


def row_blocks(rows: int, positions: int, block_rows: int, window: int = 0) -> list[Block]:
    """The blocks of a score matrix whose `rows` rows are the last of `positions` positions. `window`: positions that a
    row sees, itself included; 0: all."""
    past = positions - rows
    blocks = []
    for start in range(0, rows, block_rows):
        count = min(block_rows, rows - start)
        first = max(past + start + 1 - window, 0) if window else 0
        blocks.append(Block(start, count, first, past + start + count))
    return blocks


def block_attrs(blocks: Sequence[Block]) -> dict[str, Any]:
    """The attributes by which a request names its blocks.

    The columns of a single block are two numbers: a list belongs to the message's shape, which must not be a new one
    with each token.
    """
    if len(blocks) == 1:
        return {"first": blocks[0].first, "last": blocks[0].end}
    return {"blocks": [number for block in blocks for number in block]}


def parse_blocks(attrs: Mapping[str, Any], rows: int, positions: int) -> list[Block]:
    """The blocks that a request's attributes name; none without such an attribute.

    Raises SettingError unless they are all of `rows` rows, in order, and have columns below `positions`.
    """
    values = attrs.get("blocks")
    if values is None and "last" in attrs:
        values = [0, rows, attrs.get("first"), attrs["last"]]
    elif values is None:
        values = []
    if not isinstance(values, list) or len(values) % 4 or len(values) > 4 * MAX_BLOCKS:
        raise SettingError(f"blocks: {values!r:.100}, expected 4 ints for each of at most {MAX_BLOCKS} blocks")
    blocks = [Block(*values[index : index + 4]) for index in range(0, len(values), 4)]
    rows_seen = 0
    for block in blocks:
        start, count, first, end = block
        if any(type(number) is not int for number in block):
            raise SettingError(f"blocks: {list(block)!r:.100}, expected ints")
        if start != rows_seen or count < 1 or not 0 <= first < end <= positions:
            raise SettingError(
                f"blocks: {list(block)}, expected [{rows_seen}, 1 or more, columns within 0 to {positions}]"
            )
        rows_seen += count
    if rows_seen != rows:
        raise SettingError(f"blocks: {rows_seen} rows, expected {rows}")
    return blocks


def packed_elements(batch: int, heads: int, blocks: Sequence[Block]) -> int:
    """Elements of the tensor that scores travel in: those of all blocks, then padding to a multiple of 1024.

    Without padding each token of a generation would make messages of a new shape, whose metadata take about a hundred
    times as long to encode (docs/notes.md).
    """
    elements = batch * heads * sum(rows * (end - first) for _, rows, first, end in blocks)
    return -(-elements // _PACKED_MULTIPLE) * _PACKED_MULTIPLE

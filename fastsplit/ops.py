"""The op contract that both sides share: names, arguments, results, shapes.

    op          attributes            tensors in                                  tensors out
    describe    -                     -                                           - (attributes name, config, dtype)
    norms       -                     -                                           norms [2 * layers + 1, hidden]
    embedding   -                     ids [n] int64                               hidden states [n, hidden]
    linear      layer, names          x [n, in]                                   one [n, out] for each name
    scores      block_rows            q [n, heads, head_dim],                     row blocks, each
                                      k [t, kv_heads, head_dim]                   [heads, rows, columns]
    values      -                     row blocks, v [t, kv_heads, head_dim]       [n, heads * head_dim]
    lm_head     -                     x [n, hidden]                               logits [n, vocab]

Rules. All tensors but ids are of the executor's dtype. kv heads travel unrepeated: query head h belongs to kv head
h // (heads / kv_heads). q is scaled already. The n rows are the last n of the t positions, and a row block's columns
stop at its last row's diagonal (`row_blocks`), so nothing above it is computed or sent but the block's own corner.
What a reply must look like follows from the configuration alone, never from the peer.
"""

from __future__ import annotations

from typing import NamedTuple

from .models import ModelConfig

__all__ = ["MAX_BLOCKS", "Expected", "RowBlock", "Shapes", "choose_block_rows", "row_blocks"]

MAX_BLOCKS = 48
"""Row blocks in one message; below the wire's cap on tensors, with room for v."""

_BLOCK_ROWS = 128

Expected = list[tuple[str, tuple[int, ...]]]
"""(dtype, shape) of each tensor of a reply."""


class RowBlock(NamedTuple):
    """Rows `start` to `start + rows` of a score matrix, and how many columns of them there are."""

    start: int
    rows: int
    columns: int


def choose_block_rows(rows: int) -> int:
    """Rows in a block for a score matrix of `rows` rows: 128, or as many more as keep the message within MAX_BLOCKS."""
    return max(_BLOCK_ROWS, -(-rows // MAX_BLOCKS))


def row_blocks(rows: int, positions: int, block_rows: int) -> list[RowBlock]:
    """The blocks of a score matrix whose `rows` rows are the last of `positions` positions."""
    past = positions - rows
    blocks = []
    for start in range(0, rows, block_rows):
        count = min(block_rows, rows - start)
        blocks.append(RowBlock(start, count, past + start + count))
    return blocks


class Shapes:
    """What each op's reply must hold, for one model in one dtype."""

    def __init__(self, config: ModelConfig, dtype: str) -> None:
        self._config = config
        self._dtype = dtype

    def embedding(self, rows: int) -> Expected:
        return [(self._dtype, (rows, self._config.hidden_size))]

    def linear(self, names: tuple[str, ...], rows: int) -> Expected:
        return [(self._dtype, (rows, self._config.out_features(name))) for name in names]

    def scores(self, blocks: list[RowBlock]) -> Expected:
        return [(self._dtype, (self._config.num_attention_heads, block.rows, block.columns)) for block in blocks]

    def values(self, rows: int) -> Expected:
        return [(self._dtype, (rows, self._config.num_attention_heads * self._config.head_dim))]

    def lm_head(self, rows: int) -> Expected:
        return [(self._dtype, (rows, self._config.vocab_size))]

    def norms(self) -> Expected:
        return [(self._dtype, (2 * self._config.num_hidden_layers + 1, self._config.hidden_size))]

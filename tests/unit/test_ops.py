"""The op contract: blocks cover exactly what is needed, and messages stay within the wire's caps."""

from __future__ import annotations

import pytest

from fastsplit.models import PRESETS
from fastsplit.ops import MAX_BLOCKS, Shapes, choose_block_rows, row_blocks
from fastsplit.schema.limits import Limits


@pytest.mark.parametrize(("rows", "positions", "block"), [(1, 1, 128), (1, 500, 128), (300, 300, 128), (7, 20, 3)])
def test_blocks_stop_at_the_diagonal(rows: int, positions: int, block: int) -> None:
    blocks = row_blocks(rows, positions, block)
    assert [row for start, count, _ in blocks for row in range(start, start + count)] == list(range(rows))
    for start, count, columns in blocks:
        assert columns == positions - rows + start + count
    assert blocks[-1].columns == positions


@pytest.mark.parametrize("rows", [1, 128, 1024, 8192, 131072])
def test_a_message_never_has_too_many_blocks(rows: int) -> None:
    assert len(row_blocks(rows, rows, choose_block_rows(rows))) <= MAX_BLOCKS < Limits().max_tensors


def test_causal_blocks_nearly_halve_the_scores() -> None:
    blocks = row_blocks(1024, 1024, choose_block_rows(1024))
    assert sum(block.rows * block.columns for block in blocks) / 1024**2 == 0.5625


def test_shapes_follow_from_the_configuration() -> None:
    shapes = Shapes(PRESETS["tinyllama-1.1b"], "bfloat16")
    assert shapes.linear(("q", "k", "down"), 3) == [
        ("bfloat16", (3, 2048)),
        ("bfloat16", (3, 256)),
        ("bfloat16", (3, 2048)),
    ]
    assert shapes.scores(row_blocks(3, 5, 2)) == [("bfloat16", (32, 2, 4)), ("bfloat16", (32, 1, 5))]
    assert shapes.values(3) == [("bfloat16", (3, 2048))]
    assert shapes.lm_head(1) == [("bfloat16", (1, 32000))]
    assert shapes.norms() == [("bfloat16", (45, 2048))]

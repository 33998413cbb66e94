"""Row blocks: they cover exactly what is needed, and messages stay small."""

from __future__ import annotations

from typing import Any

import pytest

from fastsplit.split.blocks import (
    MAX_BLOCKS,
    Block,
    block_attrs,
    choose_block_rows,
    packed_elements,
    parse_blocks,
    row_blocks,
)


@pytest.mark.parametrize("window", [0, 1, 2, 4, 100])
@pytest.mark.parametrize(
    ("rows", "positions", "block"), [(1, 1, 128), (1, 500, 128), (300, 300, 128), (7, 20, 3), (9, 9, 4)]
)
def test_blocks_have_what_their_rows_see_and_no_column_more(rows: int, positions: int, block: int, window: int) -> None:
    blocks = row_blocks(rows, positions, block, window)
    past = positions - rows
    assert [row for start, count, _, _ in blocks for row in range(start, start + count)] == list(range(rows))
    for start, count, first, last in blocks:
        seen = [
            column
            for row in range(start, start + count)
            for column in range(max(past + row + 1 - window, 0) if window else 0, past + row + 1)
        ]
        assert (first, last) == (min(seen), max(seen) + 1)


def test_a_blocks_columns() -> None:
    assert Block(0, 2, 3, 10).columns == 7


@pytest.mark.parametrize("rows", [1, 128, 1024, 8192, 131072])
def test_a_message_never_has_too_many_blocks(rows: int) -> None:
    blocks = row_blocks(rows, rows, choose_block_rows(rows))
    assert len(blocks) <= MAX_BLOCKS
    assert parse_blocks(block_attrs(blocks), rows, rows) == blocks


def test_causal_blocks_nearly_halve_the_scores() -> None:
    blocks = row_blocks(1024, 1024, choose_block_rows(1024))
    assert sum(block.rows * block.columns for block in blocks) / 1024**2 == 0.5625
    assert packed_elements(3, 4, blocks) == 12 * 0.5625 * 1024**2


def test_a_window_makes_scores_grow_with_the_rows_alone() -> None:
    counts = [sum(block.rows * block.columns for block in row_blocks(rows, rows, 128, 100)) for rows in (2048, 4096)]
    assert counts[1] / counts[0] == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize(("columns", "elements"), [(1, 1024), (256, 1024), (257, 2048), (512, 2048)])
def test_scores_travel_in_a_round_number_of_elements(columns: int, elements: int) -> None:
    """So that a generation's messages keep their shape for many tokens."""
    assert packed_elements(1, 4, [Block(0, 1, 0, columns)]) == elements


@pytest.mark.parametrize("blocks", [[], [Block(0, 5, 2, 9)], row_blocks(7, 20, 3), row_blocks(7, 20, 3, 4)])
def test_blocks_come_out_of_their_attributes_as_they_went_in(blocks: list[Block]) -> None:
    attrs = block_attrs(blocks)
    rows = sum(block.rows for block in blocks)
    assert parse_blocks(attrs, rows, 20) == blocks
    assert all(type(value) is int for value in attrs.values()) == (len(blocks) == 1)


def test_one_blocks_attributes_are_numbers_that_do_not_change_a_messages_shape() -> None:
    assert block_attrs([Block(0, 1, 0, 41)]) == {"first": 0, "last": 41}
    assert parse_blocks({"first": 3, "last": 41}, 1, 50) == [Block(0, 1, 3, 41)]
    assert parse_blocks({}, 0, 50) == []


@pytest.mark.parametrize(
    ("attrs", "text"),
    [
        ({}, "0 rows, expected 2"),
        ({"blocks": "x"}, "blocks: 'x'"),
        ({"blocks": [0, 2, 0]}, "4 ints for each of at most 64"),
        ({"blocks": [0, 2, 0, 2] * 65}, "4 ints for each of at most 64"),
        ({"blocks": [0, 2, 0, 2.0]}, "expected ints"),
        ({"blocks": [0, 2, 0, True]}, "expected ints"),
        ({"blocks": ["a", 2, 0, 2]}, "expected ints"),
        ({"blocks": [1, 1, 0, 2]}, r"expected \[0, 1 or more"),
        ({"blocks": [0, 1, 0, 2]}, "1 rows, expected 2"),
        ({"blocks": [0, 1, 0, 2, 0, 1, 0, 2]}, r"expected \[1, 1 or more"),
        ({"blocks": [0, 3, 0, 2]}, "3 rows, expected 2"),
        ({"blocks": [0, 0, 0, 2, 0, 2, 0, 2]}, "1 or more"),
        ({"blocks": [0, -1, 0, 2]}, "1 or more"),
        ({"blocks": [0, 2, -1, 2]}, "columns within 0 to 2"),
        ({"blocks": [0, 2, 2, 2]}, "columns within 0 to 2"),
        ({"blocks": [0, 2, 0, 3]}, "columns within 0 to 2"),
        ({"first": 0, "last": 3}, "columns within 0 to 2"),
        ({"last": 2}, "expected ints"),
        ({"first": 0.0, "last": 2}, "expected ints"),
        ({"first": 0, "last": "x"}, "expected ints"),
    ],
)
def test_blocks_that_make_no_sense_are_refused(attrs: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        parse_blocks(attrs, 2, 2)

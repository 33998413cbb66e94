"""How a prompt is cut: whole blocks, within the memory, and about the same to move for each lane."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastsplit.models import PRESETS
from fastsplit.split.contract import traffic
from fastsplit.split.plan import PLANS, Plan
from fastsplit.tee.chunks import MIN_CHUNK_ROWS, Cutter

CONFIG = PRESETS["tiny"]
MUCH = 2**28


def cutter(
    plan: str = "batched",
    *,
    lanes: int = 1,
    block_rows: int | None = None,
    scores_nbytes: int = MUCH,
    itemsize: int = 4,
) -> Cutter:
    return Cutter(CONFIG, PLANS[plan], itemsize, lanes, block_rows, scores_nbytes)


@pytest.mark.parametrize("scores_nbytes", [1, 10**5, 10**6, 10**9])
@pytest.mark.parametrize("start", [0, 77])
@pytest.mark.parametrize("lanes", [1, 2])
def test_chunks_are_whole_blocks_within_the_memory_for_scores(scores_nbytes: int, start: int, lanes: int) -> None:
    cuts = cutter(scores_nbytes=scores_nbytes, lanes=lanes)
    for batch in (1, 3):
        for rows in (1, 127, 128, 129, 1000):
            counts = cuts.cut(batch, start, rows)
            assert sum(counts) == rows
            at = start
            for count in counts:
                nbytes = 4 * batch * CONFIG.num_attention_heads * count * (at + count)
                assert count == 1 or nbytes <= scores_nbytes
                assert count < 128 or count % 128 == 0 or count == counts[-1]
                at += count
            if lanes == 2 and rows == 1000 and scores_nbytes == 10**9:
                assert len(counts) >= 2


@pytest.mark.parametrize("nbytes", [1, 10**5, 10**6, 10**9])
@pytest.mark.parametrize("start", [0, 77, 10_000])
@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_without_scores_chunks_are_whole_blocks_within_the_memory_for_masks_and_messages(
    nbytes: int, start: int, lanes: int, itemsize: int
) -> None:
    """Memory stays flat, however long the prompt."""
    cuts = cutter("tee-attention", scores_nbytes=nbytes, lanes=lanes, itemsize=itemsize)
    widest = CONFIG.hidden_size + 2 * CONFIG.intermediate_size  # the residual stream, gate and up
    for batch in (1, 3):
        for rows in (1, 127, 128, 129, 1000, 5000):
            counts = cuts.cut(batch, start, rows)
            assert sum(counts) == rows and min(counts) >= 1
            at = start
            for count in counts:
                assert count == 1 or itemsize * batch * count * max(widest, at + count) <= nbytes
                assert count < 128 or count % 128 == 0 or count == counts[-1]
                at += count
            if lanes == 1 and nbytes == 10**9 and rows <= 1000:
                assert counts == [rows]


@pytest.mark.parametrize("lanes", [2, 3, 4, 8])
@pytest.mark.parametrize("block_rows", [32, 64, None])
@pytest.mark.parametrize("start", [0, 500])
@pytest.mark.parametrize("plan", ["folded", "tee-attention"])
def test_each_lane_has_a_chunk_and_all_of_them_about_the_same_to_move(
    lanes: int, block_rows: int | None, start: int, plan: str
) -> None:
    cuts = cutter(plan, lanes=lanes, block_rows=block_rows)
    for rows in (512, 1000, 1024, 2048):
        counts = cuts.cut(1, start, rows)
        grain = block_rows or 128
        assert len(counts) == min(lanes, rows // grain) or (grain == 128 and len(counts) <= lanes)
        assert min(counts) >= MIN_CHUNK_ROWS == 64
        assert all(count % grain == 0 for count in counts[:-1])
        if rows >= 4 * lanes * grain:
            moved, at = [], start
            for count in counts:
                part = traffic(CONFIG, PLANS[plan], 4, at, count, block_rows=block_rows)
                moved.append(part.sent + part.received)
                at += count
            assert max(moved) <= 1.5 * min(moved)


def test_where_no_scores_travel_all_chunks_have_as_many_rows() -> None:
    assert cutter("tee-attention", lanes=4, block_rows=32).cut(1, 0, 1024) == [256] * 4
    with_scores = cutter("folded", lanes=4, block_rows=32).cut(1, 0, 1024)
    assert with_scores == sorted(with_scores, reverse=True) and with_scores[0] > with_scores[-1]


@pytest.mark.parametrize("plan", ["folded", "tee-attention"])
def test_a_prompt_with_lanes_that_is_short_is_not_cut(plan: str) -> None:
    cuts = cutter(plan, lanes=4, block_rows=32)
    assert [cuts.cut(1, 0, rows) for rows in (1, 64, 100, 127)] == [[1], [64], [100], [127]]
    assert cuts.cut(1, 0, 128) == [64, 64]


@pytest.mark.parametrize("plan", PLANS)
def test_a_model_of_any_shape_is_cut_into_all_rows(plan: str) -> None:
    form: Plan = PLANS[plan]
    config = replace(PRESETS["tinyllama-1.1b"], num_attention_heads=1, num_key_value_heads=1, head_dim=8)
    for nbytes in (0, 10**4, 10**8):
        for start in (0, 1, 9999):
            for lanes in (1, 5, 16):
                cuts = Cutter(config, form, 2, lanes, 7, nbytes)
                assert [sum(cuts.cut(2, start, rows)) for rows in (1, 2, 63, 500)] == [1, 2, 63, 500]

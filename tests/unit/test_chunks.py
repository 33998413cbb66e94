"""How passes are cut where attention is computed in the TEE."""

from __future__ import annotations

from fastsplit.models import PRESETS
from fastsplit.split.plan import PLANS
from fastsplit.tee.chunks import Cutter

CONFIG = PRESETS["tinyllama-1.1b"]
PLAN = PLANS["tee-attention"]


def test_masks_and_calls_of_a_long_prompt_stay_within_the_memory_for_scores() -> None:
    nbytes = 2**28
    cutter = Cutter(CONFIG, PLAN, 4, 1, None, nbytes)
    width = CONFIG.hidden_size + 2 * CONFIG.intermediate_size
    for batch in (1, 8):
        for rows in (100, 8192, 32768):
            counts, at = cutter.cut(batch, 0, rows), 0
            assert sum(counts) == rows
            for count in counts:
                assert 4 * batch * count * (at + count) <= nbytes, "the mask, which has no heads"
                assert 4 * batch * count * width <= nbytes, "the residual stream, gate and up"
                at += count


def test_a_prompt_of_some_thousand_tokens_is_one_chunk() -> None:
    assert Cutter(CONFIG, PLAN, 4, 1, None, 2**28).cut(1, 0, 4096) == [4096]

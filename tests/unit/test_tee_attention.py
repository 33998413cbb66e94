"""Attention in the TEE against the same in plain steps, in fp64: masks, windows, grouped heads, soft caps, padding."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fastsplit.models import PRESETS
from fastsplit.tee.attention import attend
from fastsplit.tee.masks import GeometryMaker, selected_rows

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def plainly(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, masked: torch.Tensor, scale: float, softcap: float
) -> torch.Tensor:
    """[B, r, H * D]; `masked` [B, r, slots]."""
    q, k, v = (tensor.double() for tensor in (q, k, v))
    k, v = (tensor.repeat_interleave(HEADS // KV_HEADS, 1) for tensor in (k, v))
    scores = q.transpose(1, 2) @ k.transpose(2, 3) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(masked[:, None], -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("window", [0, 3, 1000])
@pytest.mark.parametrize(("start", "rows"), [(0, 1), (9, 1), (0, 150), (70, 140)])
def test_attention(start: int, rows: int, window: int, padded: bool, softcap: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(start + rows + window)
    config = replace(
        PRESETS["tiny"], sliding_window=window, sliding_layers=(True, True) if window else (), attention_softcap=softcap
    )
    total = start + rows
    batch = 2

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    qk = random(batch, rows, HEADS + KV_HEADS, HEAD_DIM)
    q = qk[:, :, :HEADS]  # strided, as it is in a reply
    keys, values = (random(batch, KV_HEADS, total + 5, HEAD_DIM) for _ in range(2))
    mask = None
    if padded:
        mask = torch.ones(batch, total, dtype=torch.bool)
        mask[0, : min(4, total - 1)] = False
    slots = torch.arange(total)
    at = torch.arange(start, total)[:, None]
    seen = slots <= at
    if window:
        seen = seen & (slots > at - window)
    seen = seen.expand(batch, rows, total).clone()
    if mask is not None:
        seen &= mask[:, None]
        seen |= (slots == at) & ~seen.any(-1, keepdim=True)
    selected = torch.tensor([rows - 1, rows // 2])
    maker = GeometryMaker(config, dtype, None)
    geometry = maker.layers(start, rows, mask, None, total, selected)[0]
    for _ in range(2):  # masks are kept for the next layer
        found = attend(q, keys, values, geometry, 0.3, softcap)
        expected = plainly(q, keys[:, :, :total], values[:, :, :total], ~seen, 0.3, softcap)
        assert found.dtype == dtype and found.shape == (batch, rows, HEADS * HEAD_DIM)
        assert float((found - expected).abs().max()) < TOLERANCES[dtype]
    assert geometry.selected is not None
    found = attend(selected_rows(q, selected), keys, values, geometry.selected, 0.3, softcap)
    assert float((found - selected_rows(expected, selected)).abs().max()) < TOLERANCES[dtype]

"""What the rows of a chunk see and by how much they are rotated: against the rule itself, slot by slot."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from test_runner import LocalBackend, make_runner

from fastsplit.models import PRESETS, ModelConfig, Rope
from fastsplit.tee.masks import Geometry, GeometryMaker, selected_rows

LLAMA = PRESETS["tiny"]


def windowed(window: int) -> ModelConfig:
    """The second layer of two has a window."""
    return replace(LLAMA, sliding_window=window, sliding_layers=(False, True))


def seen_by(geometry: Geometry, rows: int, total: int, batch: int) -> torch.Tensor:
    """[B, rows, total]: which slots the geometry's blocks and masks leave to each row."""
    seen = torch.zeros(batch, 1, rows, total, dtype=torch.bool)
    for block, masked in zip(geometry.blocks, geometry.masked, strict=True):
        part = torch.ones(batch, 1, block.rows, block.columns, dtype=torch.bool)
        for columns, mask in masked:
            part[..., columns] &= ~mask
        seen[:, :, block.start : block.start + block.rows, block.first : block.end] = part
    return seen[:, 0]


def rule(at: torch.Tensor, total: int, window: int, mask: torch.Tensor | None) -> torch.Tensor:
    """[B, rows, total]: a row at slot s sees tokens at s - window + 1 to s, and itself if there is none. `at`: the
    rows' slots [B, rows]."""
    slots = torch.arange(total)
    seen = slots <= at[..., None]
    if window:
        seen &= slots > at[..., None] - window
    if mask is not None:
        seen = seen & mask[:, None, :total]
        seen |= (slots == at[..., None]) & ~seen.any(-1, keepdim=True)
    return seen


@pytest.mark.parametrize("padding", ["none", "left", "between"])
@pytest.mark.parametrize("block_rows", [7, None])
@pytest.mark.parametrize("window", [0, 1, 5, 40, 1000])
@pytest.mark.parametrize(("start", "rows"), [(0, 1), (0, 30), (13, 1), (13, 30), (60, 200)])
def test_what_each_row_sees(start: int, rows: int, window: int, block_rows: int | None, padding: str) -> None:
    total, batch = start + rows, 2
    mask = None
    if padding != "none":
        mask = torch.ones(batch, total, dtype=torch.bool)
        mask[0, : total // 3] = padding != "left"
        mask[1, total // 2 : total - 1] = padding != "between"
    selected = torch.tensor([rows - 1, rows // 2])
    maker = GeometryMaker(windowed(window) if window else LLAMA, torch.float32, block_rows)
    layers = maker.layers(start, rows, mask, None, total, selected)
    assert len(layers) == LLAMA.num_hidden_layers
    for geometry, width in zip(layers, (0, window)):
        at = torch.arange(start, total).expand(batch, rows)
        assert torch.equal(
            seen_by(geometry, rows, total, batch), rule(at, total, width, mask).expand(batch, rows, total)
        )
        assert geometry.start == start
        assert geometry.causal == (mask is None and (not width or width >= total))
        one = geometry.selected
        assert one is not None and len(one.blocks) == 1
        found = seen_by(one, 1, total, batch)
        assert torch.equal(found, rule((selected + start)[:, None], total, width, mask).expand(batch, 1, total))
    if not window:
        assert layers[0] is layers[1], "layers of a kind share one"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_tables_are_of_the_rows_positions(dtype: torch.dtype) -> None:
    maker = GeometryMaker(LLAMA, dtype, None)
    slots = maker.layers(10, 5, None, None, 15, None)[0]
    assert slots.cos.shape == slots.sin.shape == (1, 5, 1, LLAMA.head_dim // 2) and slots.cos.dtype == dtype
    positions = torch.tensor([[10, 11, 12, 13, 14], [3, 3, 700, 0, 14]])
    own = maker.layers(10, 5, None, positions, 701, None)[0]
    assert own.cos.shape == (2, 5, 1, LLAMA.head_dim // 2)
    assert torch.equal(own.cos[0], slots.cos[0]) and torch.equal(own.sin[0], slots.sin[0])
    assert torch.equal(own.sin[1, 4], slots.sin[0, 4]) and bool((own.cos[1, 3] == 1).all())
    inverse = LLAMA.rope.theta ** (-torch.arange(0, LLAMA.head_dim, 2) / LLAMA.head_dim)
    expected = (700 * inverse.double()).cos()
    assert float((own.cos[1, 2, 0].double() - expected).abs().max()) < (1e-4 if dtype == torch.float32 else 1e-2)


def test_a_single_row_is_rotated_by_one_matrix_unless_its_sequences_differ() -> None:
    maker = GeometryMaker(LLAMA, torch.float32, None)
    assert maker.layers(9, 1, None, None, 10, None)[0].rotation is not None
    assert maker.layers(9, 2, None, None, 11, None)[0].rotation is None
    assert maker.layers(9, 1, None, torch.tensor([[9], [4]]), 10, None)[0].rotation is None


def test_tables_grow_and_those_that_depend_on_the_length_are_made_anew() -> None:
    maker = GeometryMaker(LLAMA, torch.float32, None)
    short = maker.layers(0, 5, None, None, 5, None)[0].cos.clone()
    long = maker.layers(5000, 5, None, None, 5005, None)[0].cos
    assert float((long - short).abs().max()) > 0.1
    assert torch.equal(maker.layers(0, 5, None, None, 5, None)[0].cos, short)
    dynamic = replace(LLAMA, rope=Rope("dynamic", factor=2.0, max_position_embeddings=100))
    assert dynamic.rope.depends_on_length
    maker = GeometryMaker(dynamic, torch.float32, None)
    tables = [maker.layers(0, 90, None, None, length, None)[0].cos.clone() for length in (90, 900, 90)]
    assert not torch.equal(tables[0], tables[1]) and torch.equal(tables[0], tables[2])


def test_selected_rows_are_a_copy() -> None:
    rows = torch.arange(24.0).view(2, 3, 4)
    found = selected_rows(rows, torch.tensor([2, 0]))
    assert found.tolist() == [rows[0, 2:].tolist(), rows[1, :1].tolist()]
    found.zero_()
    assert float(rows[0, 2, 0]) == 8.0


@pytest.mark.parametrize("plan", ["batched", "tee-attention"])
@pytest.mark.parametrize("lanes", [1, 2])
def test_masks_are_made_when_their_chunk_starts(monkeypatch: pytest.MonkeyPatch, lanes: int, plan: str) -> None:
    """Those of a long prompt would not fit all at once."""
    backend = LocalBackend()
    nbytes = 4 * LLAMA.num_attention_heads * 128 * 1024
    runner = make_runner(backend, plan, scores_nbytes=nbytes if plan == "batched" else nbytes // 5, lanes=lanes)
    counts = runner._cutter.cut(1, 0, 1024)
    assert len(counts) > 3
    calls: list[int] = []
    layers = runner._geometry.layers
    first = "embed" if plan == "batched" else "embed norm qkv"

    def watch(*args: Any) -> Any:
        calls.append(backend.calls.count(first))
        return layers(*args)

    monkeypatch.setattr(runner._geometry, "layers", watch)
    with torch.inference_mode(), runner.new_cache() as cache:
        runner.forward(torch.arange(1024).unsqueeze(0) % 256, cache)
    assert calls == list(range(len(counts))), "each after the chunk before it has started, none before"
    started = [index for index, steps in enumerate(backend.calls) if steps == first]
    if lanes == 1:
        per_chunk = [end - start for start, end in pairwise(started)]
        least = 2 * LLAMA.num_hidden_layers if plan == "batched" else 2
        assert min(per_chunk) > least, "the one before is over then"

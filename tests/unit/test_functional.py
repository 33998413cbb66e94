"""The TEE's arithmetic against plain formulas in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fastsplit.split.blocks import row_blocks

torch = pytest.importorskip("torch")
functional = pytest.importorskip("fastsplit.split.functional")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDED = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Relative error of a formula whose result is rounded once; in fp32 of one with a few operations."""
CHAINED = {torch.float32: 4e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}
"""The same where results between are rounded, too."""
EPS = 1e-5


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _close(ours: torch.Tensor, exact: torch.Tensor, tolerance: float) -> None:
    """Within `tolerance` of the greatest number: what is left of a difference of large ones is no better."""
    assert exact.dtype == torch.float64
    assert float((ours.double() - exact).abs().max()) <= tolerance * float(exact.abs().max())


def _inverse_rms(x: torch.Tensor) -> torch.Tensor:
    return 1 / (x.double().square().mean(-1, keepdim=True) + EPS).sqrt()


# ---- embeddings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("multiplier", [1, 3.3])
def test_embedding_is_rows_of_the_table_times_a_rounded_number(dtype: torch.dtype, multiplier: float) -> None:
    table = torch.randn(9, 4).to(dtype)
    before = table.clone()
    ids = torch.tensor([[0, 8, 8], [3, 0, 1]])
    found = functional.embedding(table, ids, multiplier)
    assert found.shape == (2, 3, 4) and found.dtype == dtype
    assert torch.equal(found, table[ids] * torch.tensor(multiplier, dtype=dtype))
    found.zero_()
    assert torch.equal(table, before), "new memory"
    for wrong in (-1, 9, 2**40):
        with pytest.raises(ValueError, match=f"ids: {min(wrong, 3)} to {max(wrong, 3)}, expected 0 to 8"):
            functional.embedding(table, torch.tensor([[3, wrong]]), multiplier)


# ---- norms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 48), (3, 5, 48), (2, 1, 48)])
@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_inverse_rms_of_rows_is_a_tensor(dtype: torch.dtype, shape: tuple[int, ...], size: float) -> None:
    x = (torch.randn(shape) * size).to(dtype)
    before = x.clone()
    scale = functional.inverse_rms(x, EPS)
    assert (scale.dtype, scale.shape) == (torch.float32, (*shape[:-1], 1))
    torch.testing.assert_close(scale.double(), _inverse_rms(x), rtol=1e-6, atol=0)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(48,), (1, 48), (1, 1, 48)])
def test_inverse_rms_of_one_row_is_the_same_number_as_a_float(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).to(dtype)
    scale = functional.inverse_rms(x, EPS)
    assert type(scale) is float
    assert scale == pytest.approx(float(_inverse_rms(x)), rel=1e-6)
    both = functional.inverse_rms(x.expand(2, *shape), EPS)
    assert scale == pytest.approx(float(both.flatten()[0]), rel=2e-7)


@pytest.mark.parametrize("rows", [1, 2])
def test_inverse_rms_of_zeros_is_what_eps_leaves_and_nan_stays(rows: int) -> None:
    def first(scale: Any) -> float:
        return float(scale if isinstance(scale, float) else scale.flatten()[0])

    assert first(functional.inverse_rms(torch.zeros(rows, 48), EPS)) == pytest.approx(EPS**-0.5)
    assert first(functional.inverse_rms(torch.full((rows, 48), math.inf), EPS)) == 0
    assert math.isnan(first(functional.inverse_rms(torch.full((rows, 48), math.nan), EPS)))


def test_inverse_rms_of_large_fp16_rows_is_finite() -> None:
    """Squares of them are not."""
    x = torch.full((2, 64), 60000.0, dtype=torch.float16)
    torch.testing.assert_close(functional.inverse_rms(x, EPS), torch.full((2, 1), 1 / 60000.0), rtol=1e-3, atol=0)
    assert functional.inverse_rms(x[:1], EPS) == pytest.approx(1 / 60000, rel=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 7])
def test_rms_norm_writes_where_it_is_told(dtype: torch.dtype, rows: int) -> None:
    x = torch.randn(rows, 48).to(dtype)
    weight = torch.randn(48)
    before = x.clone()
    memory = torch.full((rows + 2, 48), torch.nan, dtype=dtype)
    out = functional.rms_norm(x, weight, EPS, memory[1:-1])
    assert out.data_ptr() == memory[1:].data_ptr()
    assert bool(memory[0].isnan().all() and memory[-1].isnan().all())
    _close(out, x.double() * _inverse_rms(x) * weight.double(), ROUNDED[dtype])
    assert torch.equal(x, before), "the residual stream is still needed"
    assert torch.equal(functional.rms_norm(x, weight, EPS, x), out), "into itself"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 6, 16), (2, 5, 6, 16)])
def test_head_norm_in_place_has_a_weight_for_each_head(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).to(dtype)
    weight = torch.randn(6, 16)
    exact = x.double() * _inverse_rms(x) * weight.double()
    address = x.data_ptr()
    assert functional.head_norm_(x, weight, EPS).data_ptr() == address
    _close(x, exact, ROUNDED[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_head_norm_of_a_part_leaves_the_rest_alone(dtype: torch.dtype) -> None:
    whole = torch.randn(3, 8, 16).to(dtype)
    part, rest = whole[:, :6], whole[:, 6:].clone()
    exact = part.double() * _inverse_rms(part)
    functional.head_norm_(part, torch.ones(6, 16), EPS)
    _close(part, exact, ROUNDED[dtype])
    assert torch.equal(whole[:, 6:], rest)


# ---- rotary ----------------------------------------------------------------------------------------------------------


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Pair by pair: (a, b) becomes (a cos - b sin, b cos + a sin)."""
    x, cos, sin = x.double(), cos.double(), sin.double()
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    for i in range(half):
        a, b = x[..., i], x[..., half + i]
        out[..., i] = a * cos[..., i] - b * sin[..., i]
        out[..., half + i] = b * cos[..., i] + a * sin[..., i]
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("own_tables", [False, True], ids=["one table", "a table for each sequence"])
def test_rotary_turns_pairs_in_place(dtype: torch.dtype, batch: int, own_tables: bool) -> None:
    x = torch.randn(batch, 5, 3, 16).to(dtype)
    angles = torch.randn(batch if own_tables else 1, 5, 1, 8) * 3
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    exact = _turned(x, cos, sin)
    address = x.data_ptr()
    assert functional.rotary_(x, cos, sin).data_ptr() == address
    _close(x, exact, CHAINED[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_of_part_of_each_head_and_with_a_scale(dtype: torch.dtype) -> None:
    """A view that is not contiguous; tables times a number turn and scale at once."""
    whole = torch.randn(1, 4, 3, 16).to(dtype)
    angles = torch.randn(1, 4, 1, 6)
    scale = torch.rand(1, 4, 1, 1) + 0.5
    cos, sin = (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)
    rest = whole[..., 12:].clone()
    exact = _turned(whole[..., :12], cos, sin)
    functional.rotary_(whole[..., :12], cos, sin)
    _close(whole[..., :12], exact, CHAINED[dtype])
    assert torch.equal(whole[..., 12:], rest)


# ---- softmax ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize(("rows", "past", "block"), [(1, 0, 128), (1, 9, 128), (6, 0, 4), (7, 5, 3), (5, 2, 5)])
def test_softmax_of_blocks_in_place_is_the_masked_one(
    dtype: torch.dtype, rows: int, past: int, block: int, window: int
) -> None:
    positions = past + rows
    scores = torch.randn(2, 3, rows, positions).to(dtype)
    mask = torch.ones(rows, positions, dtype=torch.bool).tril(past)
    if window:
        mask &= torch.ones(rows, positions, dtype=torch.bool).triu(past - window + 1)
    exact = scores.double().masked_fill(~mask, -math.inf).softmax(-1)
    for start, count, first, last in row_blocks(rows, positions, block, window):
        own = slice(start, start + count), slice(first, last)
        part = scores[:, :, own[0], own[1]].clone()
        address = part.data_ptr()
        hidden = [(slice(None), ~mask[own][None, None])]
        assert functional.softmax_(part, hidden).data_ptr() == address
        _close(part, exact[:, :, own[0], own[1]], ROUNDED[dtype])
        outside = exact[:, :, own[0]].clone()
        outside[..., own[1]] = 0
        assert not outside.any(), "nothing that a block leaves out has any weight"


def test_softmax_hides_corners_and_masks_of_each_sequence() -> None:
    scores = torch.randn(2, 3, 4, 6)
    corner = torch.ones(4, 4, dtype=torch.bool).triu(1)
    padding = torch.tensor([[1, 0, 0], [0, 0, 0]], dtype=torch.bool)[:, None, None].expand(2, 1, 4, 3)
    hidden = torch.zeros(2, 1, 4, 6, dtype=torch.bool)
    hidden[..., 2:] |= corner
    hidden[..., :3] |= padding
    exact = scores.double().masked_fill(hidden, -math.inf).softmax(-1)
    _close(functional.softmax_(scores, [(slice(2, None), corner), (slice(0, 3), padding)]), exact, 2e-6)


@pytest.mark.parametrize("columns", [1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 1000, 1024, 4096])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_into_its_own_input_is_exact(dtype: torch.dtype, rows: int, columns: int) -> None:
    scores = (torch.randn(1, 3, rows, columns) * 5).to(dtype)
    assert torch.equal(functional.softmax_(scores.clone(), []), scores.softmax(-1))
    odd = torch.randn(3 * rows * columns + 1)[1:].to(dtype).view(1, 3, rows, columns)  # not aligned
    assert torch.equal(functional.softmax_(odd.clone(), []), odd.softmax(-1))


def test_softmax_of_huge_scores_is_finite() -> None:
    scores = torch.tensor([[[[3e38, -3e38, 3e38, 0.0]]]])
    assert functional.softmax_(scores, []).flatten().tolist() == [0.5, 0, 0.5, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_softcap_bends_large_numbers_in_place(dtype: torch.dtype) -> None:
    x = (torch.randn(3, 40) * 100).to(dtype)
    exact = 50 * torch.tanh(x.double() / 50)
    address = x.data_ptr()
    assert functional.softcap_(x, 50.0).data_ptr() == address
    _close(x, exact, CHAINED[dtype])


# ---- the MLP's activation --------------------------------------------------------------------------------------------


def _gated(act: str, gate: torch.Tensor, up: torch.Tensor, scale: Any, bias: Any) -> torch.Tensor:
    gate, up = gate.double(), up.double()
    if scale is not None:
        scale = scale if isinstance(scale, float) else scale.double()
        gate, up = gate * scale, up * scale
    if bias is not None:
        gate, up = gate + bias[0].double(), up + bias[1].double()
    if act == "silu":
        return gate / (1 + torch.exp(-gate)) * up
    if act == "gelu":
        return gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2))) * up
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    return gate * 0.5 * (1 + torch.tanh(inner)) * up


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("scaling", ["none", "one", "rows"])
def test_gated_is_the_formula_in_place(dtype: torch.dtype, act: str, with_bias: bool, scaling: str) -> None:
    gate, up = torch.randn(4, 8).to(dtype), torch.randn(4, 8).to(dtype)
    bias = torch.randn(2, 8) if with_bias else None
    scale = {"none": None, "one": 0.7, "rows": torch.rand(4, 1) + 0.5}[scaling]
    exact = _gated(act, gate, up, scale, bias)
    address = gate.data_ptr()
    assert functional.gated_(act, gate, up, scale, bias).data_ptr() == address
    _close(gate, exact, CHAINED[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("nbytes", [1, 100, 64 * 4 * 3])
def test_pieces_give_what_the_whole_does(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, act: str, nbytes: int
) -> None:
    gate, up = torch.randn(11, 64).to(dtype), torch.randn(11, 64).to(dtype)
    scale, bias = torch.rand(11, 1), torch.randn(2, 64)
    whole = functional.gated_(act, gate.clone(), up.clone(), scale, bias)
    monkeypatch.setattr(functional, "_PIECE_NBYTES", nbytes)
    assert torch.equal(functional.gated_(act, gate, up, scale, bias), whole)


@pytest.mark.parametrize("value", [-1e4, 1e4])
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh"])
def test_gated_of_numbers_far_out_is_finite(act: str, value: float) -> None:
    gate = torch.full((1, 8), value)
    assert functional.gated_(act, gate, torch.ones(1, 8)).flatten().tolist() == [max(value, 0)] * 8

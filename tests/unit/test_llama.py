"""The TEE's arithmetic against torch's and HF's own."""

from __future__ import annotations

import pytest

from fastsplit.models import Rope
from fastsplit.ops import row_blocks

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("transformers.models.llama.modeling_llama")
llama = pytest.importorskip("fastsplit.llama")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_is_hf(dtype: torch.dtype) -> None:
    x = torch.randn(7, 48).to(dtype)
    norm = hf.LlamaRMSNorm(48, eps=1e-5).to(dtype)
    norm.weight.data.normal_(1, 0.3)
    before = x.clone()
    memory = torch.full((9, 48), torch.nan, dtype=dtype)
    out = llama.rms_norm(x, norm.weight.data, 1e-5, memory[1:8])
    assert out.data_ptr() == memory[1:].data_ptr()
    assert bool(memory[0].isnan().all() and memory[8].isnan().all())
    torch.testing.assert_close(out, norm(x), rtol=1e-6 if dtype is torch.float32 else 2**-7, atol=1e-6)
    assert torch.equal(x, before), "the residual stream is still needed"


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_is_hf_and_in_place(dtype: torch.dtype) -> None:
    q = torch.randn(5, 3, 16).to(dtype)
    cos, sin = llama.rotary_table(9, 16, Rope(), dtype)
    full_cos, full_sin = (torch.cat([t, t], dim=-1)[4:9, 0][None] for t in (cos, sin))
    expected, _ = hf.apply_rotary_pos_emb(q.transpose(0, 1)[None], q.transpose(0, 1)[None], full_cos, full_sin)
    address = q.data_ptr()
    out = llama.rotary_(q, cos[4:9], sin[4:9])
    assert out.data_ptr() == address
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(out, expected[0].transpose(0, 1), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "rope",
    [
        Rope(theta=5e5),
        Rope("linear", 1e4, factor=4.0),
        Rope("llama3", 5e5, 8.0, 1.0, 4.0, 64),
    ],
    ids=lambda rope: rope.kind,
)
def test_frequencies_are_hf(rope: Rope) -> None:
    parameters = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        parameters["factor"] = rope.factor
    if rope.kind == "llama3":
        parameters |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_position_embeddings,
        }
    config = transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=2, head_dim=64, max_position_embeddings=512, rope_parameters=parameters
    )
    expected = hf.LlamaRotaryEmbedding(config).inv_freq
    torch.testing.assert_close(llama.inverse_frequencies(64, rope), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "past", "block"), [(1, 0, 128), (1, 9, 128), (6, 0, 4), (7, 5, 3), (5, 2, 5)])
def test_causal_softmax_in_place_is_the_masked_one(dtype: torch.dtype, rows: int, past: int, block: int) -> None:
    positions = past + rows
    scores = torch.randn(2, rows, positions).to(dtype)
    mask = torch.ones(rows, positions, dtype=torch.bool).tril(past)
    expected = scores.float().masked_fill(~mask, -torch.inf).softmax(-1).to(dtype)
    for start, count, columns in row_blocks(rows, positions, block):
        part = scores[:, start : start + count, :columns].clone()
        address = part.data_ptr()
        out = llama.causal_softmax_(part)
        assert out.data_ptr() == address
        torch.testing.assert_close(out, expected[:, start : start + count, :columns], rtol=1e-2, atol=1e-6)
        assert not expected[:, start : start + count, columns:].any(), "nothing that a block leaves out has any weight"


@pytest.mark.parametrize("columns", [1, 2, 15, 16, 17, 1000, 1024, 4096])
def test_softmax_into_its_own_input_is_exact(columns: int) -> None:
    scores = torch.randn(3, 1, columns) * 5
    assert torch.equal(llama.causal_softmax_(scores.clone()), scores.softmax(-1))


def test_silu_mul_in_place() -> None:
    gate, up = torch.randn(4, 8), torch.randn(4, 8)
    expected = torch.nn.functional.silu(gate) * up
    address = gate.data_ptr()
    out = llama.silu_mul_(gate, up)
    assert out.data_ptr() == address
    torch.testing.assert_close(out, expected)

"""Rotary frequencies and tables against transformers' own, for each kind, below and beyond the original context."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fastsplit.errors import ModelError
from fastsplit.models import PRESETS, Rope

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
llama = pytest.importorskip("transformers.models.llama.modeling_llama")
phi3 = pytest.importorskip("transformers.models.phi3.modeling_phi3")
gemma3 = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
rotary = pytest.importorskip("fastsplit.split.rope")

CONTEXT, ORIGINAL = 96, 32
LENGTHS = [1, 7, ORIGINAL, ORIGINAL + 1, CONTEXT, CONTEXT + 1, 150]

SHORT = tuple(1 + 0.05 * i for i in range(8))
LONG = tuple(1.5 + i for i in range(8))

ROPES = {
    "default": Rope(theta=5e5),
    "linear": Rope("linear", 1e4, factor=4.0),
    "dynamic": Rope("dynamic", 1e4, factor=2.0, max_position_embeddings=CONTEXT),
    "dynamic, a factor that fp32 rounds": Rope("dynamic", 5e5, factor=1.3, max_position_embeddings=CONTEXT),
    "yarn": Rope("yarn", 1e4, 3.0, original_max_position_embeddings=ORIGINAL),
    "yarn, all of it": Rope(
        "yarn",
        1e6,
        40.0,
        original_max_position_embeddings=ORIGINAL,
        beta_fast=16.0,
        beta_slow=0.5,
        mscale=0.7,
        mscale_all_dim=1.2,
        truncate=False,
    ),
    "yarn, its own temperature": Rope(
        "yarn", 1e4, 3.0, original_max_position_embeddings=ORIGINAL, attention_factor=0.8
    ),
    "yarn, no room for its ramp": Rope(
        "yarn", 1e4, 3.0, original_max_position_embeddings=ORIGINAL, beta_fast=2.0, beta_slow=2.0, truncate=False
    ),
    "longrope": Rope(
        "longrope", 1e4, 3.0, original_max_position_embeddings=ORIGINAL, short_factor=SHORT, long_factor=LONG
    ),
    "longrope, its own temperature": Rope(
        "longrope",
        1e4,
        3.0,
        original_max_position_embeddings=ORIGINAL,
        attention_factor=1.4,
        short_factor=SHORT,
        long_factor=LONG,
    ),
    "llama3": Rope("llama3", 5e5, 8.0, 1.0, 4.0, ORIGINAL),
    "proportional": Rope("proportional", 1e4, 2.0, partial=0.4),
}


def hf_config(rope: Rope) -> Any:
    """A llama's configuration with such frequencies, as transformers reads it."""
    config = replace(PRESETS["tiny"], rope=rope, max_position_embeddings=CONTEXT)
    return transformers.LlamaConfig(**{**config.to_hf(), "model_type": "llama"})


def hf_tables(module: Any, length: int, *layer_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [length, rotary_dim / 2] of one of transformers' modules, whose tables have all twice."""
    cos, sin = module(torch.zeros(1), torch.arange(length)[None], *layer_type)
    half = cos.shape[-1] // 2
    assert torch.equal(cos[..., :half], cos[..., half:])
    return cos[0, :, :half], sin[0, :, :half]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", ROPES)
def test_tables_are_those_of_transformers_bit_for_bit(name: str, length: int) -> None:
    rope = ROPES[name]
    cos, sin = rotary.cos_sin(rope, 16, length)
    expected_cos, expected_sin = hf_tables(llama.LlamaRotaryEmbedding(hf_config(rope)), length)
    assert cos.shape == (length, rotary.rotary_dim(rope, 16) // 2)
    assert cos.dtype == sin.dtype == torch.float32
    assert torch.equal(cos, expected_cos)
    assert torch.equal(sin, expected_sin)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", [name for name in ROPES if name != "default"])
def test_frequencies_are_those_of_transformers_functions(name: str, length: int) -> None:
    rope = ROPES[name]
    compute = rope_utils.ROPE_INIT_FUNCTIONS[rope.kind]
    expected, expected_factor = compute(hf_config(rope), None, seq_len=torch.tensor(length))
    frequencies, factor = rotary.inverse_frequencies(rope, 16, length)
    torch.testing.assert_close(frequencies, expected, rtol=1e-6, atol=0)
    assert factor == expected_factor


@pytest.mark.parametrize("name", ROPES)
def test_only_two_kinds_depend_on_the_length(name: str) -> None:
    rope = ROPES[name]
    short, long = rotary.cos_sin(rope, 16, 5), rotary.cos_sin(rope, 16, 2 * CONTEXT)
    assert torch.equal(short[1], long[1][:5]) == (not rope.depends_on_length)
    assert rope.depends_on_length == (rope.kind in ("dynamic", "longrope"))


@pytest.mark.parametrize("length", [5, 64, 65, 200])
def test_a_part_of_each_head_as_in_phi3(length: int) -> None:
    config = PRESETS["tiny-phi3"]
    module = phi3.Phi3RotaryEmbedding(transformers.Phi3Config(**config.to_hf()))
    found, expected = rotary.cos_sin(config.rope, config.head_dim, length), hf_tables(module, length)
    assert found[0].shape == (length, 6)
    assert all(torch.equal(*pair) for pair in zip(found, expected))
    partial = replace(config, rope=Rope(partial=0.25))
    module = phi3.Phi3RotaryEmbedding(transformers.Phi3Config(**partial.to_hf()))
    found, expected = rotary.cos_sin(partial.rope, 16, length), hf_tables(module, length)
    assert all(torch.equal(*pair) for pair in zip(found, expected))


def test_the_layers_of_gemma3_have_one_of_two() -> None:
    config = PRESETS["tiny-gemma3"]
    module = gemma3.Gemma3RotaryEmbedding(transformers.Gemma3TextConfig(**config.to_hf()))
    for layer in range(config.num_hidden_layers):
        found = rotary.cos_sin(config.rope_of(layer), config.head_dim, 40)
        expected = hf_tables(module, 40, "sliding_attention" if config.window(layer) else "full_attention")
        assert all(torch.equal(*pair) for pair in zip(found, expected))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no such kind": ({"kind": "mrope"}, "rope_type: 'mrope'"),
    "a list as kind": ({"kind": ["yarn"]}, "rope_type"),
    "theta": ({"theta": 0}, "theta: 0"),
    "theta, NaN": ({"theta": float("nan")}, "theta: nan"),
    "factor": ({"factor": float("inf")}, "factor: inf"),
    "a flag as factor": ({"factor": True}, "factor: True"),
    "truncate": ({"truncate": 1}, "truncate: 1"),
    "mscale": ({"mscale": -1.0}, r"mscale: -1\.0"),
    "more than all of it": ({"partial": 1.5}, r"partial: 1\.5"),
    "a list of factors": ({"short_factor": [1.0]}, "short_factor"),
    "a million factors": ({"long_factor": (1.0,) * 10**6}, "long_factor: 1000000 values"),
    "one factor": ({"long_factor": (1.0, 0.0)}, r"long_factor\[1\]: 0\.0"),
    "llama3 without a context": ({"kind": "llama3"}, "original_max_position_embeddings: 0"),
    "llama3, no room to go over": (
        {"kind": "llama3", "original_max_position_embeddings": 8, "low_freq_factor": 4.0},
        "low_freq_factor: 4",
    ),
    "yarn without a context": ({"kind": "yarn"}, "original_max_position_embeddings: 0"),
    "yarn, divided by log 1": ({"kind": "yarn", "original_max_position_embeddings": 8, "theta": 1.0}, "theta: 1"),
    "longrope, divided by log 1": (
        {"kind": "longrope", "original_max_position_embeddings": 1},
        "original_max_position_embeddings: 1",
    ),
    "dynamic without a context": ({"kind": "dynamic"}, "max_position_embeddings: 0"),
    "dynamic, a negative base": ({"kind": "dynamic", "max_position_embeddings": 8, "factor": 0.5}, r"factor: 0\.5"),
}


@pytest.mark.parametrize("name", WRONG)
def test_parameters_that_make_no_sense(name: str) -> None:
    parameters, text = WRONG[name]
    with pytest.raises(ModelError, match=f"^config, {text}"):
        Rope(**parameters)


@pytest.mark.parametrize(
    ("rope", "text"),
    [
        (Rope(partial=0.32), "head_dim: 16, of which 5"),
        (Rope(partial=0.01), "head_dim: 16, of which 0"),
        (Rope("dynamic", partial=0.125, max_position_embeddings=8), "of which 2 .* at least 4"),
        (replace(ROPES["longrope"], short_factor=SHORT[1:]), "short_factor: 7 numbers, expected 8"),
        (replace(ROPES["longrope"], partial=0.5), "short_factor: 8 numbers, expected 4"),
    ],
)
def test_heads_that_cannot_be_rotated_like_this(rope: Rope, text: str) -> None:
    with pytest.raises(ModelError, match=text):
        replace(PRESETS["tiny"], rope=rope)
    with pytest.raises(ModelError, match=text):
        replace(PRESETS["tiny-gemma3"], local_rope=rope)


@pytest.mark.parametrize("extreme", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("kind", ["default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional"])
def test_whatever_is_allowed_can_be_computed(kind: str, extreme: float) -> None:
    rope = Rope(
        kind,
        theta=max(extreme, 1.1) if kind == "yarn" else extreme,
        factor=max(extreme, 1.0) if kind == "dynamic" else extreme,
        low_freq_factor=1e-30,
        high_freq_factor=max(extreme, 1e-29),
        original_max_position_embeddings=2,
        beta_fast=extreme,
        beta_slow=extreme,
        short_factor=(extreme,) * 8,
        long_factor=(extreme,) * 8,
        max_position_embeddings=2,
    )
    rope.check(16)
    for length in (1, 3, 40):
        assert rotary.cos_sin(rope, 16, length)[0].shape == (length, 8)

"""Shapes of public models, and a small one of each family with all that is special about it."""

from __future__ import annotations

from dataclasses import replace

from .config import ModelConfig, Rope

__all__ = ["PRESETS"]

_TINY_MODEL = ModelConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
)

_TINY_GEMMA = replace(
    _TINY_MODEL,
    num_hidden_layers=4,
    rms_norm_eps=1e-6,
    hidden_act="gelu_tanh",
    post_norms=True,
    norm_offset=1.0,
    embedding_multiplier=8.0,
    attention_scale=24**-0.5,
    sliding_window=16,
    sliding_layers=(True, False, True, False),
    tie_word_embeddings=True,
)

PRESETS: dict[str, ModelConfig] = {
    "tinyllama-1.1b": ModelConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2048,
    ),
    "llama-3.2-1b": ModelConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rope=Rope("llama3", 500000.0, 32.0, 1.0, 4.0, 8192),
        tie_word_embeddings=True,
    ),
    "tiny": _TINY_MODEL,
    "tiny-mistral": replace(
        _TINY_MODEL, model_type="mistral", sliding_window=16, sliding_layers=(True, True), rope=Rope(theta=1e6)
    ),
    "tiny-qwen2": replace(
        _TINY_MODEL,
        model_type="qwen2",
        attention_bias=True,
        sliding_window=16,
        sliding_layers=(False, True),
        rope=Rope("dynamic", 1e6, 2.0, max_position_embeddings=512),
        tie_word_embeddings=True,
    ),
    "tiny-qwen3": replace(
        _TINY_MODEL,
        model_type="qwen3",
        head_dim=32,
        qk_norm=True,
        rope=Rope("yarn", 1e6, 4.0, original_max_position_embeddings=128),
    ),
    "tiny-gemma2": replace(
        _TINY_GEMMA,
        model_type="gemma2",
        attention_softcap=5.0,
        logits_softcap=3.0,
    ),
    "tiny-gemma3": replace(
        _TINY_GEMMA,
        model_type="gemma3_text",
        qk_norm=True,
        rope=Rope("linear", 1e6, 8.0),
        local_rope=Rope(),
        sliding_layers=(True, True, True, False),
    ),
    "tiny-phi3": replace(
        _TINY_MODEL,
        model_type="phi3",
        sliding_window=100,
        sliding_layers=(True, True),
        rope=Rope(
            "longrope",
            factor=8.0,
            original_max_position_embeddings=64,
            short_factor=(1.0, 1.0, 1.05, 1.1, 1.25, 1.5),
            long_factor=(1.0, 1.2, 2.0, 4.5, 9.0, 16.0),
            partial=0.75,
        ),
    ),
    "tiny-granite": replace(
        _TINY_MODEL,
        model_type="granite",
        mlp_bias=True,
        attention_bias=True,
        output_bias=True,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        logits_divisor=8.0,
        attention_scale=0.125,
        tie_word_embeddings=True,
    ),
}
"""Preset's name -> configuration."""

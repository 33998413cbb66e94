"""Each family against transformers: configurations of both its generations, checkpoints that it wrote, and a plain
forward pass that knows nothing of a family but its fields."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastsplit.errors import ModelError
from fastsplit.models import LINEARS, PRESETS, Model, ModelConfig, Rope, linear_name, norm_names, open_model
from fastsplit.models.families import FAMILIES

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
rotary = pytest.importorskip("fastsplit.split.rope")

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": [3, 5],
    "pad_token_id": None,
}

PLAIN = ModelConfig(61, 48, 40, 4, 6, 2, 8, 256, rms_norm_eps=1e-6, eos_token_ids=(3, 5))

GEMMA = replace(
    PLAIN,
    head_dim=16,
    hidden_act="gelu_tanh",
    post_norms=True,
    norm_offset=1.0,
    embedding_multiplier=48**0.5,
    attention_scale=1 / 16,
    sliding_window=7,
    sliding_layers=(True, False, True, False),
    tie_word_embeddings=True,
)

FACTORS = {"short_factor": [1.0, 1.1, 1.3], "long_factor": [1.5, 3.0, 8.0]}

NAMES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3",
    "phi3": "Phi3",
    "granite": "Granite",
}
"""What transformers' classes begin with."""

MODELS: dict[str, tuple[str, dict[str, Any], ModelConfig]] = {
    "llama": ("llama", {}, PLAIN),
    "llama, all of it": (
        "llama",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "hidden_act": "gelu",
            "tie_word_embeddings": True,
            "head_dim": 12,
            "rms_norm_eps": 1e-3,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0},
        },
        replace(
            PLAIN,
            attention_bias=True,
            output_bias=True,
            mlp_bias=True,
            hidden_act="gelu",
            tie_word_embeddings=True,
            head_dim=12,
            rms_norm_eps=1e-3,
            rope=Rope("dynamic", 500.0, 2.0, max_position_embeddings=256),
        ),
    ),
    "mistral": (
        "mistral",
        {"sliding_window": 7},
        replace(PLAIN, model_type="mistral", sliding_window=7, sliding_layers=(True,) * 4),
    ),
    "mistral that sees everything": ("mistral", {"sliding_window": None}, replace(PLAIN, model_type="mistral")),
    "qwen2": ("qwen2", {}, replace(PLAIN, model_type="qwen2", attention_bias=True)),
    "qwen2 with a window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 3},
        replace(
            PLAIN,
            model_type="qwen2",
            attention_bias=True,
            sliding_window=7,
            sliding_layers=(False, False, False, True),
        ),
    ),
    "qwen3": (
        "qwen3",
        {"head_dim": 16, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}},
        replace(
            PLAIN,
            model_type="qwen3",
            head_dim=16,
            qk_norm=True,
            rope=Rope("yarn", 1e6, 4.0, original_max_position_embeddings=256),
        ),
    ),
    "qwen3, all of it": (
        "qwen3",
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
        },
        replace(
            PLAIN,
            model_type="qwen3",
            head_dim=16,
            qk_norm=True,
            attention_bias=True,
            output_bias=True,
            sliding_window=7,
            sliding_layers=(True, False, False, True),
        ),
    ),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 16,
            "sliding_window": 7,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 1.5,
        },
        replace(
            GEMMA,
            model_type="gemma2",
            attention_softcap=2.0,
            logits_softcap=1.5,
        ),
    ),
    "gemma2 without caps": (
        "gemma2",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "layer_types": ["full_attention"] * 4,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
        replace(
            GEMMA,
            model_type="gemma2",
            attention_scale=24**-0.5,
            sliding_window=0,
            sliding_layers=(),
            attention_bias=True,
            output_bias=True,
            tie_word_embeddings=False,
        ),
    ),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 16,
            "sliding_window": 7,
            "final_logit_softcapping": 1.5,
            "sliding_window_pattern": 3,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
            },
        },
        replace(
            GEMMA,
            model_type="gemma3_text",
            qk_norm=True,
            logits_softcap=1.5,
            sliding_layers=(True, True, False, True),
            rope=Rope("linear", 1e6, 8.0),
            local_rope=Rope(theta=5000.0),
        ),
    ),
    "phi3": ("phi3", {}, replace(PLAIN, model_type="phi3", rms_norm_eps=1e-5)),
    "phi3, all of it": (
        "phi3",
        {
            "sliding_window": 7,
            "original_max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "longrope", "partial_rotary_factor": 0.75, **FACTORS},
        },
        replace(
            PLAIN,
            model_type="phi3",
            rms_norm_eps=1e-5,
            sliding_window=7,
            sliding_layers=(True,) * 4,
            rope=Rope(
                "longrope",
                factor=16.0,
                original_max_position_embeddings=16,
                short_factor=(1.0, 1.1, 1.3),
                long_factor=(1.5, 3.0, 8.0),
                partial=0.75,
            ),
        ),
    ),
    "granite": (
        "granite",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        },
        replace(
            PLAIN,
            model_type="granite",
            attention_bias=True,
            output_bias=True,
            mlp_bias=True,
            embedding_multiplier=12.0,
            attention_scale=0.3,
            residual_multiplier=0.22,
            logits_divisor=8.0,
        ),
    ),
}


def make(model_type: str, options: dict[str, Any]) -> Any:
    """A small random model of transformers, with norms and biases that are not trivial."""
    torch.manual_seed(0)
    name = NAMES[model_type]
    text = "Text" if name == "Gemma3" else ""
    config = getattr(transformers, f"{name}{text}Config")(**{**SIZES, **options})
    config._attn_implementation = "eager"
    model = getattr(transformers, FAMILIES[model_type].architecture)(config).eval()
    around = 0.0 if "Gemma" in name else 1.0
    with torch.no_grad():
        for key, weight in model.named_parameters():
            weight.normal_(around if "norm" in key else 0.0, 0.2)
    return model


def unfused(config: ModelConfig, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' weights by our names."""
    state = dict(state)
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    for name in list(state):
        for fused, linears in FAMILIES[config.model_type].fused.items():
            if fused in name:
                parts = state.pop(name).split([config.out_features(linear) for linear in linears])
                state |= {name.replace(fused, LINEARS[linear]): part for linear, part in zip(linears, parts)}
    return state


def forward(model: Model, ids: torch.Tensor) -> torch.Tensor:
    """Logits [n, vocab] fp32 of ids [n], as plainly as the fields say it."""
    config, length = model.config, len(ids)
    weights = {name: weight.float() for name, weight in model.items()}
    tee = model.tee_weights()
    norms = iter(tee["norms"])

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.rms_norm_eps) * weight

    def linear(layer: int, name: str, x: torch.Tensor) -> torch.Tensor:
        full = linear_name(layer, name)
        return torch.nn.functional.linear(x, weights[f"{full}.weight"], weights.get(f"{full}.bias"))

    def cap(x: torch.Tensor, most: float) -> torch.Tensor:
        return torch.tanh(x / most) * most if most else x

    def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        turning, rest = x[..., : 2 * cos.shape[-1]], x[..., 2 * cos.shape[-1] :]
        a, b = turning.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)

    def act(x: torch.Tensor) -> torch.Tensor:
        if config.hidden_act == "silu":
            return torch.nn.functional.silu(x)
        return torch.nn.functional.gelu(x, approximate="tanh" if config.hidden_act == "gelu_tanh" else "none")

    x = weights["model.embed_tokens.weight"][ids] * config.embedding_multiplier
    row, column = torch.arange(length)[:, None], torch.arange(length)[None]
    for layer in range(config.num_hidden_layers):
        h = norm(x, next(norms))
        q, k, v = (linear(layer, name, h).view(length, -1, config.head_dim).transpose(0, 1) for name in "qkv")
        if config.qk_norm:
            q, k = norm(q, tee["head_norms"][2 * layer]), norm(k, tee["head_norms"][2 * layer + 1])
        cos, sin = rotary.cos_sin(config.rope_of(layer), config.head_dim, length)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (t.repeat_interleave(len(q) // len(t), dim=0) for t in (k, v))
        scores = cap(q @ k.transpose(1, 2) * config.scale, config.attention_softcap)
        seen = (column <= row) & (column > row - (config.window(layer) or length))
        h = (scores.masked_fill(~seen, -math.inf).softmax(-1) @ v).transpose(0, 1).reshape(length, -1)
        h = linear(layer, "o", h)
        x = x + config.residual_multiplier * (norm(h, next(norms)) if config.post_norms else h)
        h = norm(x, next(norms))
        h = linear(layer, "down", act(linear(layer, "gate", h)) * linear(layer, "up", h))
        x = x + config.residual_multiplier * (norm(h, next(norms)) if config.post_norms else h)
    head = weights["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    return cap(norm(x, next(norms)) @ head.T / config.logits_divisor, config.logits_softcap)


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_of_transformers(tmp_path: Path, name: str) -> None:
    model_type, options, expected = MODELS[name]
    theirs = make(model_type, options)
    theirs.save_pretrained(tmp_path)
    model = open_model(str(tmp_path))
    assert model.config == expected
    weights = dict(model.items())
    state = unfused(model.config, theirs.state_dict())
    assert weights.keys() == state.keys()
    assert all(torch.equal(weights[key], state[key]) for key in state)

    found = model.tee_weights()
    assert {key: tuple(value.shape) for key, value in found.items()} == model.config.tee_weight_shapes()
    offset = model.config.norm_offset
    assert torch.equal(found["norms"], torch.stack([state[key] for key in norm_names(model.config)]) + offset)

    for length in (5, 30):  # below and beyond the windows, and longrope's original context
        ids = torch.randint(61, (length,), generator=torch.Generator().manual_seed(length))
        with torch.inference_mode():
            logits = theirs(ids[None]).logits[0]
        torch.testing.assert_close(forward(model, ids), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PRESETS)
def test_transformers_reads_what_we_write(tmp_path: Path, name: str) -> None:
    config = PRESETS[name]
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    assert ModelConfig.from_hf(read.to_dict()) == config
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(read)
    assert type(theirs).__name__ == FAMILIES[config.model_type].architecture
    state = unfused(config, theirs.state_dict())
    assert {key: tuple(weight.shape) for key, weight in state.items()} == config.weight_shapes()


def test_a_fused_weight_in_shards(tmp_path: Path) -> None:
    theirs = make("phi3", {})
    theirs.save_pretrained(tmp_path, max_shard_size="20kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model = open_model(str(tmp_path))
    state = unfused(model.config, theirs.state_dict())
    assert all(torch.equal(weight, state[name]) for name, weight in model.items())


def test_a_fused_weight_of_another_shape(tmp_path: Path) -> None:
    make("phi3", {}).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "num_key_value_heads": 3}))
    model = open_model(str(tmp_path))
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.qkv_proj\.weight' of shape \[80, 48\], expected \[96"):
        model.load("model.layers.1.self_attn.k_proj.weight")


# ---- what transformers 4 wrote ---------------------------------------------------------------------------------------

LLAMA3 = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}

OLD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama-3.2": (
        {"model_type": "llama", "rope_theta": 500000.0, "rope_scaling": LLAMA3, "attention_dropout": 0.1},
        {"rope": Rope("llama3", 500000.0, 32.0, 1.0, 4.0, 64)},
    ),
    "yarn, of the first generation": (
        {
            "model_type": "llama",
            "rope_scaling": {
                "type": "yarn",
                "factor": 16.0,
                "original_max_position_embeddings": 32,
                "finetuned": True,
                "beta_fast": 0,
            },
        },
        {"rope": Rope("yarn", 10000.0, 16.0, original_max_position_embeddings=32)},
    ),
    "mistral": (
        {"model_type": "mistral", "sliding_window": 4096, "rope_theta": 10000.0},
        {"model_type": "mistral", "sliding_window": 4096, "sliding_layers": (True,) * 4},
    ),
    "qwen2.5": (
        {
            "model_type": "qwen2",
            "rope_theta": 1000000.0,
            "max_window_layers": 2,
            "sliding_window": 32768,
            "use_sliding_window": False,
        },
        {"model_type": "qwen2", "attention_bias": True, "rope": Rope(theta=1e6)},
    ),
    "qwen2 with yarn": (
        {
            "model_type": "qwen2",
            "rope_theta": 1000000.0,
            "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 64, "type": "yarn"},
        },
        {
            "model_type": "qwen2",
            "attention_bias": True,
            "rope": Rope("yarn", 1e6, 4.0, original_max_position_embeddings=64),
        },
    ),
    "qwen3": (
        {"model_type": "qwen3", "head_dim": 16, "rope_theta": 1000000, "rope_scaling": None, "attention_bias": False},
        {"model_type": "qwen3", "head_dim": 16, "qk_norm": True, "rope": Rope(theta=1e6)},
    ),
    "qwen3, a head's size left out": (
        {"model_type": "qwen3"},
        {"model_type": "qwen3", "head_dim": 128, "qk_norm": True},
    ),
    "phi-3-mini-128k": (
        {
            "model_type": "phi3",
            "attention_bias": False,
            "original_max_position_embeddings": 16,
            "rope_theta": 10000.0,
            "rope_scaling": {"type": "su", "short_factor": [1, 1, 1, 1], "long_factor": [1, 2, 3, 4.5]},
        },
        {
            "model_type": "phi3",
            "rms_norm_eps": 1e-5,
            "rope": Rope(
                "longrope",
                factor=16.0,
                original_max_position_embeddings=16,
                short_factor=(1, 1, 1, 1),
                long_factor=(1, 2, 3, 4.5),
            ),
        },
    ),
    "phi-4-mini": (
        {
            "model_type": "phi3",
            "lm_head_bias": False,
            "original_max_position_embeddings": 16,
            "partial_rotary_factor": 0.75,
            "tie_word_embeddings": True,
            "sliding_window": 262144,
            "rope_scaling": {"type": "longrope", **FACTORS},
        },
        {
            "model_type": "phi3",
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "sliding_window": 262144,
            "sliding_layers": (True,) * 4,
            "rope": Rope(
                "longrope",
                factor=16.0,
                original_max_position_embeddings=16,
                short_factor=(1.0, 1.1, 1.3),
                long_factor=(1.5, 3.0, 8.0),
                partial=0.75,
            ),
        },
    ),
    "granite": (
        {
            "model_type": "granite",
            "rope_theta": 5000000.0,
            "embedding_multiplier": 12,
            "logits_scaling": 8,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.0625,
        },
        {
            "model_type": "granite",
            "rope": Rope(theta=5e6),
            "embedding_multiplier": 12,
            "logits_divisor": 8,
            "residual_multiplier": 0.22,
            "attention_scale": 0.0625,
        },
    ),
}

OLD_GEMMA: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma-2": (
        {
            "model_type": "gemma2",
            "hidden_act": "gelu_pytorch_tanh",
            "cache_implementation": "hybrid",
            "sliding_window": 4096,
            "query_pre_attn_scalar": 224,
        },
        {
            "model_type": "gemma2",
            "attention_scale": 224**-0.5,
            "attention_softcap": 50.0,
            "logits_softcap": 30.0,
        },
    ),
    "gemma-3-1b": (
        {
            "model_type": "gemma3_text",
            "rope_local_base_freq": 10000,
            "rope_theta": 1000000,
            "rope_scaling": None,
            "sliding_window_pattern": 2,
        },
        {
            "model_type": "gemma3_text",
            "qk_norm": True,
            "rope": Rope(theta=1e6),
            "local_rope": Rope(),
        },
    ),
    "gemma-3-4b's text": (
        {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
        {
            "model_type": "gemma3_text",
            "qk_norm": True,
            "rope": Rope("linear", 1e6, 8.0),
            "local_rope": Rope(),
            "sliding_layers": (True,) * 4,
        },
    ),
}


@pytest.mark.parametrize("name", [*OLD, *OLD_GEMMA])
def test_configurations_of_transformers_4(tmp_path: Path, name: str) -> None:
    values, expected = {**OLD, **OLD_GEMMA}[name]
    base = PLAIN
    if name in OLD_GEMMA:
        base = replace(GEMMA, head_dim=256, sliding_window=4096)
    config = ModelConfig.from_hf({**SIZES, **values})
    assert config == replace(base, **expected)
    if name == "phi-3-mini-128k":
        return  # transformers 5 itself no longer reads "su"
    (tmp_path / "config.json").write_text(json.dumps({**SIZES, **values}))
    assert ModelConfig.from_hf(transformers.AutoConfig.from_pretrained(tmp_path).to_dict()) == config


# ---- refusals --------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no family": ({}, "model_type: None, expected one of llama, mistral, qwen2, qwen3, gemma2, gemma3_text, phi3, gr"),
    "another family": ({"model_type": "gpt2"}, "model_type: 'gpt2', expected one of llama, "),
    "experts": ({"model_type": "mixtral"}, "model_type: 'mixtral'"),
    "pictures": ({"model_type": "gemma3", "text_config": {}}, "model_type: 'gemma3' .* expected its text model"),
    "activation": ({"model_type": "llama", "hidden_act": "relu"}, "hidden_act: 'relu', expected one of silu"),
    "gemma's activation": ({"model_type": "gemma2", "hidden_activation": "relu"}, "hidden_activation: 'relu'"),
    "quantized": ({"model_type": "qwen2", "quantization_config": {"bits": 4}}, "quantization_config"),
    "both directions": ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_atten"),
    "a window for llama": ({"model_type": "llama", "sliding_window": 8}, "sliding_window: 8, expected None"),
    "biases for mistral": ({"model_type": "mistral", "attention_bias": True}, "attention_bias: True, expected False"),
    "a bias for the logits": ({"model_type": "phi3", "lm_head_bias": True}, "lm_head_bias: True"),
    "a cap that transformers ignores": (
        {"model_type": "gemma3_text", "attn_logit_softcapping": 50.0},
        "attn_logit_softcapping: 50.0, expected None",
    ),
    "a cap of 0": ({"model_type": "gemma2", "final_logit_softcapping": 0.0}, "final_logit_softcapping: 0.0"),
    "a scale of 0": ({"model_type": "granite", "attention_multiplier": 0}, "attention_multiplier: 0"),
    "a window of 0": ({"model_type": "mistral", "sliding_window": 0}, "sliding_window: 0"),
    "no window for layers that slide": ({"model_type": "gemma2", "sliding_window": None}, "sliding_window: None"),
    "a window that is off": (
        {"model_type": "qwen2", "layer_types": ["sliding_attention"] * 4},
        "sliding_window: None",
    ),
    "layers of other types": ({"model_type": "qwen3", "layer_types": ["linear_attention"] * 4}, "layer_types: "),
    "too few layers": ({"model_type": "qwen3", "layer_types": ["full_attention"]}, "layer_types: .* expected 4 of "),
    "layers that transformers ignores": (
        {"model_type": "mistral", "layer_types": ["full_attention"] * 4},
        "layer_types: .* expected 'sliding_attention' in all layers",
    ),
    "a pattern of 0": ({"model_type": "gemma3_text", "sliding_window_pattern": 0}, "modulo"),
    "kinds that phi3 does not have": (
        {"model_type": "phi3", "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        "rope_type: 'linear', expected one of default, longrope",
    ),
    "a kind that is no text": ({"model_type": "llama", "rope_scaling": {"rope_type": [1]}}, r"rope_type: \[1\]"),
    "factors for other heads": (
        {"model_type": "phi3", "rope_scaling": {"rope_type": "longrope", **FACTORS}},
        "short_factor: 3 numbers, expected 4",
    ),
    "by layer type": (
        {"model_type": "qwen2", "rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "rope_parameters: 'full_attention'",
    ),
    "not by layer type": (
        {"model_type": "gemma3_text", "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        "rope_parameters: 'rope_type', expected objects in full_attention, sliding_attention",
    ),
    "a list by layer type": ({"model_type": "gemma3_text", "rope_parameters": {"full_attention": [1]}}, "expected obj"),
    "a billion layers": ({"model_type": "mistral", "num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_computed_here_is_refused_by_name(name: str) -> None:
    values, text = REFUSED[name]
    with pytest.raises(ModelError, match=f"^config.*{text}"):
        ModelConfig.from_hf({**SIZES, **values})


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize(
    "name", [*SIZES, "rope_parameters", "rope_scaling", "layer_types", "head_dim", "sliding_window"]
)
def test_values_of_odd_types_are_errors_of_ours(model_type: str, name: str) -> None:
    for value in ("x", [[]], {"a": 1}, -1, 10**400, math.nan, True):
        try:
            ModelConfig.from_hf({**SIZES, "model_type": model_type, name: value})
        except ModelError as error:
            assert str(error).startswith("config")  # noqa: PT017 (some of them are fine for some)

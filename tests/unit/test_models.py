"""Configurations in and out, weights from directories and presets, and every way in which they can be wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastsplit.errors import ModelError
from fastsplit.models import LINEARS, PRESETS, ModelConfig, Rope, linear_name, norm_names, open_model

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

BASE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_the_hf_form(name: str) -> None:
    assert ModelConfig.from_hf(PRESETS[name].to_hf()) == PRESETS[name]


def test_sizes_that_are_left_out_follow_from_the_others() -> None:
    config = ModelConfig.from_hf({key: value for key, value in BASE.items() if key != "num_key_value_heads"})
    assert (config.num_key_value_heads, config.head_dim) == (4, 4)


@pytest.mark.parametrize(
    ("extra", "rope"),
    [
        ({"rope_theta": 5e5}, Rope(theta=5e5)),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2}}, Rope("linear", 1e4, 2.0)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, Rope(theta=7.0)),
        (
            {
                "rope_theta": 5e5,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8,
                    "low_freq_factor": 1,
                    "high_freq_factor": 4,
                    "original_max_position_embeddings": 32,
                },
            },
            Rope("llama3", 5e5, 8.0, 1.0, 4.0, 32),
        ),
    ],
    ids=["v4 default", "v4 linear", "v5", "v4 llama3"],
)
def test_rope_of_both_transformers_generations(extra: dict[str, Any], rope: Rope) -> None:
    assert ModelConfig.from_hf({**BASE, **extra}).rope == rope


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model_type": "gpt2"}, "model_type: 'gpt2'"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"hidden_act": "relu"}, "hidden_act: 'relu'"),
        ({"sliding_window": 128}, "sliding_window: 128"),
        ({"rope_parameters": {"rope_type": "mrope", "factor": 2}}, "rope_type: 'mrope'"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1, 2]}}, "rope_parameters: 'mrope_section'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2, "attention_factor": 0}}, "attention_factor: 0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"is_causal": False}, "is_causal: False"),
        ({"num_hidden_layers": 2**30}, "num_hidden_layers"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2}}, "low_freq_factor: missing"),
        ({"num_attention_heads": 3}, "num_attention_heads: 3"),
        ({"hidden_size": 0, "head_dim": 4}, "hidden_size: 0"),
        ({"head_dim": 5}, "head_dim: 5"),
        ({"vocab_size": "many"}, "vocab_size: 'many'"),
        ({"vocab_size": None}, "vocab_size: None"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_is_not_supported_is_refused_by_name(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ModelError, match=text):
        ModelConfig.from_hf({**BASE, **change})


def _json(change: dict[str, Any], name: str = "tiny-gemma3") -> str:
    return json.dumps({**json.loads(PRESETS[name].to_json()), **change})


@pytest.mark.parametrize("name", PRESETS)
def test_a_configuration_goes_over_the_wire_as_it_is(name: str) -> None:
    assert ModelConfig.from_json(PRESETS[name].to_json()) == PRESETS[name]


LIES: dict[str, tuple[Any, str]] = {
    "not a text": (5, "expected a model's configuration"),
    "nested": ("[" * 100000, "expected a model's configuration"),
    "a list": ("[]", "expected a model's configuration"),
    "nothing": ("{}", "rope: missing"),
    "a field of no configuration": (_json({"magic": 1}), "magic"),
    "family": (_json({"model_type": "gpt2"}), "model_type: 'gpt2'"),
    "family in a list": (_json({"model_type": ["llama"]}), r"model_type: \('llama',\)"),
    "activation": (_json({"hidden_act": "relu"}), "hidden_act: 'relu'"),
    "activation of no type": (_json({"hidden_act": {}}), "hidden_act"),
    "a flag as size": (_json({"vocab_size": True}), "vocab_size: True"),
    "a size that is too large": (_json({"intermediate_size": 2**30}), "intermediate_size"),
    "a number as flag": (_json({"post_norms": 1}), "post_norms: 1"),
    "a text as flag": (_json({"qk_norm": "no"}), "qk_norm: 'no'"),
    "offset": (_json({"norm_offset": 2.0}), "norm_offset"),
    "scale": (_json({"attention_scale": -1.0}), "attention_scale"),
    "multiplier": (_json({"embedding_multiplier": 0}), "embedding_multiplier: 0"),
    "divisor": (_json({"logits_divisor": 0.0}), "logits_divisor"),
    "NaN": (_json({"residual_multiplier": math.nan}), "residual_multiplier: nan"),
    "infinity": (_json({"attention_softcap": math.inf}), "attention_softcap: inf"),
    "a number beyond all floats": (_json({"logits_softcap": 10**400}), "logits_softcap"),
    "window": (_json({"sliding_window": -1}), "sliding_window: -1"),
    "no window for layers that slide": (_json({"sliding_window": 0}), "sliding_window: 0"),
    "a window for no layers": (_json({"sliding_layers": []}), "sliding_window: 16"),
    "layers that do not slide": (_json({"sliding_window": 0, "sliding_layers": [False] * 4}), "sliding_layers: 4"),
    "too few layers": (_json({"sliding_layers": [True]}), "sliding_layers: 1 values, expected 4"),
    "too many layers": (_json({"sliding_layers": [True] * 10**5}), "sliding_layers: 100000 values"),
    "layers of no type": (_json({"sliding_layers": [1, 0, 1, 0]}), "sliding_layers"),
    "layers that are none": (_json({"sliding_layers": "abcd"}), "sliding_layers: 'abcd'"),
    "a rope that is none": (_json({"rope": None}), "rope: None"),
    "a text as rope": (_json({"rope": "default"}), "expected a model's configuration"),
    "a number as the other rope": (_json({"local_rope": 5}), "expected a model's configuration"),
    "the other rope's kind": (_json({"local_rope": {"kind": "x"}}), "rope_type: 'x'"),
    "a field of no rope": (_json({"local_rope": {"magic": 1}}), "magic"),
    "factors": (_json({"rope": {"short_factor": [1.0, "x"]}}), r"short_factor\[1\]: 'x'"),
    "end": (_json({"eos_token_ids": 5}), "eos_token_id: 5"),
    "ends": (_json({"eos_token_ids": [1.5]}), r"eos_token_id: 1\.5"),
    "too many ends": (_json({"eos_token_ids": [1] * 2000}), "eos_token_id: 2000 values"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_peer_may_send_anything(name: str) -> None:
    text, expected = LIES[name]
    with pytest.raises(ModelError, match=f"^config.*{expected}"):
        ModelConfig.from_json(text)


def test_what_differs_from_layer_to_layer() -> None:
    config = PRESETS["tiny-gemma3"]
    assert [config.window(layer) for layer in range(4)] == [16, 16, 16, 0]
    assert [config.rope_of(layer) for layer in range(4)] == [config.local_rope] * 3 + [config.rope]
    assert config.scale == 24**-0.5
    plain = PRESETS["tiny-mistral"]
    assert plain.rope_of(1) == plain.rope
    assert plain.scale == 16**-0.5
    assert PRESETS["tiny"].window(1) == 0


def check_tee_weights(config: ModelConfig, found: dict[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> None:
    """What the TEE computes with, put together from all of the model's weights, one after the other."""
    shapes = config.tee_weight_shapes()
    assert list(found) == list(shapes)
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        assert tuple(tensor.shape) == shapes[name]
    names = norm_names(config)
    assert len(names) == config.norms_per_layer * config.num_hidden_layers + 1
    for row, name in zip(found["norms"], names):
        assert torch.equal(row, weights[name].float() + config.norm_offset)
    for layer in range(config.num_hidden_layers):

        def bias(*linears: str, layer: int = layer) -> torch.Tensor:
            return torch.cat([weights[f"{linear_name(layer, linear)}.bias"].float() for linear in linears])

        if config.qk_norm:
            for index, which in enumerate(("q_norm", "k_norm")):
                expected = weights[f"model.layers.{layer}.self_attn.{which}.weight"].float() + config.norm_offset
                assert torch.equal(found["head_norms"][2 * layer + index], expected)
        if config.attention_bias:
            assert torch.equal(found["attention_bias"][layer], bias("q", "k", "v"))
        if config.mlp_bias:
            assert torch.equal(found["mlp_bias"][layer], bias("gate", "up"))


@pytest.mark.parametrize("name", [name for name in PRESETS if "tiny-" in name])
def test_random_models_of_each_family(name: str) -> None:
    model = open_model(f"random:{name}")
    weights = dict(model.items())
    assert {key: tuple(weight.shape) for key, weight in weights.items()} == model.config.weight_shapes()
    found = model.tee_weights()
    check_tee_weights(model.config, found, weights)
    assert abs(float(found["norms"].mean()) - 1) < 0.05, "norms are around 1 whatever the checkpoint's are relative to"


def test_biases_have_flags_of_their_own() -> None:
    config = PRESETS["tiny-qwen2"]
    assert [linear for linear in LINEARS if config.has_bias(linear)] == ["q", "k", "v"]
    assert "model.layers.0.self_attn.o_proj.bias" not in config.weight_shapes()


def test_a_family_without_such_a_model_has_no_hf_form() -> None:
    with pytest.raises(ModelError, match="model_type: 'llama', expected a family that has all of"):
        replace(PRESETS["tiny"], qk_norm=True).to_hf()


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ModelError, match="hidden_size: missing"):
        ModelConfig.from_hf({key: value for key, value in BASE.items() if key != "hidden_size"})


def test_random_weights_depend_on_seed_and_name_alone() -> None:
    one, same, other = (open_model(f"random:tiny@{seed}") for seed in (1, 1, 2))
    name = "model.layers.1.mlp.up_proj.weight"
    dict(same.items())  # the order in which they are made does not matter
    assert torch.equal(one.load(name), same.load(name))
    assert not torch.equal(one.load(name), other.load(name))
    assert not torch.equal(one.load(name), one.load(name.replace("up", "gate")))
    assert torch.equal(one.tee_weights()["norms"][-1], one.load("model.norm.weight"))
    default, zero = (open_model(spec).tee_weights() for spec in ("random:tiny", "random:tiny@0"))
    assert torch.equal(default["norms"], zero["norms"])


@pytest.mark.parametrize("spec", ["random:huge", "random:tiny@x", "random:tiny@-1", "random:"])
def test_bad_presets(spec: str) -> None:
    with pytest.raises(ModelError, match="expected"):
        open_model(spec)


def _write(directory: Path, config: dict[str, Any], shards: int = 1) -> dict[str, torch.Tensor]:
    weights = {name: torch.randn(shape) for name, shape in ModelConfig.from_hf(config).weight_shapes().items()}
    (directory / "config.json").write_text(json.dumps(config))
    if shards == 1:
        safetensors_torch.save_file(weights, directory / "model.safetensors")
        return weights
    weight_map = {name: f"model-{index % shards}.safetensors" for index, name in enumerate(weights)}
    for file in set(weight_map.values()):
        part = {name: weights[name] for name in weights if weight_map[name] == file}
        safetensors_torch.save_file(part, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weights


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("extra", [{}, {"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}])
def test_directories_whole_and_in_shards(tmp_path: Path, shards: int, extra: dict[str, Any]) -> None:
    weights = _write(tmp_path, {**BASE, **extra}, shards)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    model = open_model(str(tmp_path))
    assert model.config.eos_token_ids == (3, 4)
    found = dict(model.items())
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    check_tee_weights(model.config, model.tee_weights(), weights)


def test_directories_that_are_wrong(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such directory"):
        open_model(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match=r"no config\.json"):
        open_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    with pytest.raises(ModelError, match=r"neither model\.safetensors"):
        open_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json"):
        open_model(str(tmp_path))


def test_weights_that_are_wrong(tmp_path: Path) -> None:
    weights = _write(tmp_path, BASE)
    weights["model.norm.weight"] = torch.zeros(17)
    del weights["lm_head.weight"]
    safetensors_torch.save_file(weights, tmp_path / "model.safetensors")
    model = open_model(str(tmp_path))
    with pytest.raises(ModelError, match=r"'model\.norm\.weight' of shape \[17\], expected \[16\]"):
        model.tee_weights()
    with pytest.raises(ModelError, match=r"'lm_head\.weight'"):
        model.load("lm_head.weight")
    with pytest.raises(ModelError, match="no weight 'nonsense'"):
        model.load("nonsense")
    (tmp_path / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(ModelError, match="embed_tokens"):
        model.load("model.embed_tokens.weight")


def test_an_index_cannot_name_a_file_elsewhere(tmp_path: Path) -> None:
    _write(tmp_path, BASE, shards=2)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../secret.safetensors"}}))
    with pytest.raises(ModelError, match=r"index\.json: it names '\.\./secret\.safetensors', expected a file in this"):
        open_model(str(tmp_path))


def _relabel(path: Path, name: str, **changes: Any) -> None:
    """Changes what a safetensors file says about a weight, and nothing else in it."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header[name] |= changes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


@pytest.mark.parametrize("dtype", ["I32", "U32", "F8_E4M3", "F4", "BOOL", "C64", "I64"])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"])
def test_weights_relabelled_as_another_dtype(tmp_path: Path, name: str, dtype: str) -> None:
    """transformers casts whatever comes: of 0.5 read as I32 it makes 1056964608."""
    weights = _write(tmp_path, BASE)
    count, bits = weights[name].numel(), {"F8_E4M3": 8, "F4": 4, "BOOL": 8, "C64": 64, "I64": 64}.get(dtype, 32)
    weights[name] = torch.zeros(count * bits // 8, dtype=torch.uint8)
    safetensors_torch.save_file(weights, tmp_path / "model.safetensors")
    _relabel(tmp_path / "model.safetensors", name, dtype=dtype, shape=ModelConfig.from_hf(BASE).weight_shapes()[name])
    with pytest.raises(ModelError, match=f"weight '{name}' of dtype {dtype}, expected one of F64, F32, F16, BF16"):
        open_model(str(tmp_path)).load(name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_any_floating_point_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = {name: weight.to(dtype) for name, weight in _write(tmp_path, BASE).items()}
    safetensors_torch.save_file(weights, tmp_path / "model.safetensors")
    model = open_model(str(tmp_path))
    assert all(torch.equal(weight, weights[name]) for name, weight in model.items())
    check_tee_weights(model.config, model.tee_weights(), weights)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"short",
        b"\xff" * 64,
        (2**40).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"\xff\xfe",
        (2).to_bytes(8, "little") + b"{}" + b"more",
        (100000).to_bytes(8, "little") + b'{"a":' * 20000,
        (66).to_bytes(8, "little") + b'{"model.norm.weight":{"dtype":"X","shape":[],"data_offsets":[0,0]}}'[:66],
    ],
    ids=["empty", "short", "noise", "long", "a list", "no text", "uncovered", "nested", "dtype"],
)
def test_a_file_that_is_no_safetensors(tmp_path: Path, data: bytes) -> None:
    _write(tmp_path, BASE)
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match=r"model\.safetensors: header: "):
        open_model(str(tmp_path)).load("model.norm.weight")


def test_end_tokens_are_generation_configs_where_there_is_one(tmp_path: Path) -> None:
    """As in transformers: config.json's count only without generation_config.json."""
    _write(tmp_path, {**BASE, "eos_token_id": 2})
    assert open_model(str(tmp_path)).config.eos_token_ids == (2,)
    for text, expected in (('{"eos_token_id": [3, 4]}', (3, 4)), ("{}", ()), ('{"eos_token_id": null}', ())):
        (tmp_path / "generation_config.json").write_text(text)
        assert open_model(str(tmp_path)).config.eos_token_ids == expected

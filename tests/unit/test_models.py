"""Configurations in and out, weights from directories and presets, and every way in which they can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastsplit.errors import ModelError
from fastsplit.models import PRESETS, ModelConfig, Rope, norm_names, open_model

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
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ({"sliding_window": 128}, "sliding_window: 128"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2}}, "rope_type: 'yarn'"),
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
    assert torch.equal(one.norms()[-1], one.load("model.norm.weight"))
    assert torch.equal(open_model("random:tiny").norms(), open_model("random:tiny@0").norms())


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
    assert torch.equal(model.norms(), torch.stack([weights[name] for name in norm_names(1)]))


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
        model.norms()
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
    with pytest.raises(ModelError, match=r"model\.norm\.weight"):
        open_model(str(tmp_path)).load("model.norm.weight")

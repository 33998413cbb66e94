"""What a model is: its configuration, its weights, where both come from.

A model is named by a Hugging Face directory (config.json and safetensors) or by `random:PRESET[@SEED]`: the shape of
a public model with seeded random weights. Both sides read the same names, so a TEE side with the same directory or
preset has a trusted copy of configuration and norm weights without loading the rest.

Rules. A configuration is refused if any part of it asks for something that is not computed here: no silent
approximation. A weight's shape is checked against the configuration before it is read. Random weights depend only on
seed and name, so that either side can make any one of them alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .errors import ModelError

if TYPE_CHECKING:
    import torch

__all__ = ["LINEARS", "PRESETS", "Model", "ModelConfig", "Rope", "linear_name", "norm_names", "open_model"]

DTYPES = ("float32", "bfloat16", "float16")
"""What an executor computes in."""

LINEARS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
"""A layer's linear operations: our short name -> the name in a checkpoint."""


_MOST = {
    "hidden_size": 2**18,
    "num_hidden_layers": 2**10,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**12,
}
"""Far beyond any model there is: a TEE side without a trusted copy sizes its own memory by these."""


@dataclass(frozen=True)
class Rope:
    """How rotary frequencies are made. The fields after `theta` belong to the kind's formula, named as HF does."""

    kind: str = "default"  # default, linear, llama3
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("default", "linear", "llama3"):
            raise ModelError(f"config, rope_type: {self.kind!r}, expected default, linear or llama3")
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 < value <= 1e30:
                raise ModelError(f"config, {name}: {value!r}, expected a number over 0")
        context = self.original_max_position_embeddings
        if type(context) is not int or not int(self.kind == "llama3") <= context <= 2**31:
            raise ModelError(f"config, original_max_position_embeddings: {context!r}, expected an int of 1 or more")
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ModelError(
                f"config, low_freq_factor: {self.low_freq_factor}, expected less than high_freq_factor, "
                f"{self.high_freq_factor}"
            )


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Llama-family model. Sizes in elements; names as in HF's configurations."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope: Rope = Rope()
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            value, most = getattr(self, field.name), _MOST.get(field.name, 2**31)
            if field.type == "int" and (type(value) is not int or not 1 <= value <= most):
                raise ModelError(f"config, {field.name}: {value!r}, expected an int from 1 to {most}")
            if field.type == "bool" and not isinstance(value, bool):
                raise ModelError(f"config, {field.name}: {value!r}, expected true or false")
        eps: Any = self.rms_norm_eps
        if not isinstance(eps, (int, float)) or not 0 <= eps <= 1:
            raise ModelError(f"config, rms_norm_eps: {eps!r}, expected a number from 0 to 1")
        if any(type(token) is not int for token in self.eos_token_ids):
            raise ModelError(f"config, eos_token_id: {list(self.eos_token_ids)!r}, expected token ids")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ModelError(
                f"config, num_attention_heads: {self.num_attention_heads}, expected a multiple of "
                f"num_key_value_heads, {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ModelError(f"config, head_dim: {self.head_dim}, expected an even number, for rotary embedding")

    def out_features(self, linear: str) -> int:
        """The length of a row that a layer's linear operation gives."""
        return {
            "q": self.num_attention_heads * self.head_dim,
            "k": self.num_key_value_heads * self.head_dim,
            "v": self.num_key_value_heads * self.head_dim,
            "o": self.hidden_size,
            "gate": self.intermediate_size,
            "up": self.intermediate_size,
            "down": self.hidden_size,
        }[linear]

    def in_features(self, linear: str) -> int:
        """The length of a row that a layer's linear operation takes."""
        if linear == "o":
            return self.num_attention_heads * self.head_dim
        return self.intermediate_size if linear == "down" else self.hidden_size

    def has_bias(self, linear: str) -> bool:
        return self.mlp_bias if linear in ("gate", "up", "down") else self.attention_bias

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight of the model by its checkpoint name. A tied lm_head is not among them."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        for layer in range(self.num_hidden_layers):
            for linear in LINEARS:
                name = linear_name(layer, linear)
                shapes[f"{name}.weight"] = (self.out_features(linear), self.in_features(linear))
                if self.has_bias(linear):
                    shapes[f"{name}.bias"] = (self.out_features(linear),)
        for name in norm_names(self.num_hidden_layers):
            shapes[name] = (self.hidden_size,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    @classmethod
    def from_hf(cls, values: dict[str, Any], eos_token_ids: tuple[int, ...] = ()) -> ModelConfig:
        """The configuration in a config.json of transformers 4 or 5. Raises ModelError for what is not supported."""
        kind = values.get("model_type")
        if kind != "llama":
            raise ModelError(f"config, model_type: {kind!r}, expected 'llama'; other families are not supported yet")
        for name, allowed in (
            ("hidden_act", ("silu", None)),
            ("sliding_window", (None,)),
            ("partial_rotary_factor", (None, 1, 1.0)),
        ):
            if values.get(name) not in allowed:
                raise ModelError(f"config, {name}: {values[name]!r}, expected {allowed[0]!r}")
        try:
            heads = values["num_attention_heads"]
            return cls(
                vocab_size=values["vocab_size"],
                hidden_size=values["hidden_size"],
                intermediate_size=values["intermediate_size"],
                num_hidden_layers=values["num_hidden_layers"],
                num_attention_heads=heads,
                num_key_value_heads=values.get("num_key_value_heads") or heads,
                head_dim=values.get("head_dim") or values["hidden_size"] // heads,
                max_position_embeddings=values.get("max_position_embeddings", 2048),
                rms_norm_eps=float(values.get("rms_norm_eps", 1e-6)),
                rope=_rope_from_hf(values),
                attention_bias=bool(values.get("attention_bias", False)),
                mlp_bias=bool(values.get("mlp_bias", False)),
                tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
                eos_token_ids=eos_token_ids or _token_ids(values.get("eos_token_id")),
            )
        except KeyError as error:
            raise ModelError(f"config, {error.args[0]}: missing") from None
        except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
            raise ModelError(f"config: {error}") from None

    def to_hf(self) -> dict[str, Any]:
        """The same as a HF config.json of transformers 5."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        rope, eos = values.pop("rope"), values.pop("eos_token_ids")
        parameters = {"rope_type": rope.kind, "rope_theta": rope.theta}
        if rope.kind != "default":
            parameters["factor"] = rope.factor
        if rope.kind == "llama3":
            for name in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
                parameters[name] = getattr(rope, name)
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_act": "silu",
            **values,
            "rope_parameters": parameters,
            "eos_token_id": list(eos) or None,
        }


def linear_name(layer: int, linear: str) -> str:
    """A linear operation's name in a checkpoint, without `.weight` or `.bias`."""
    return f"model.layers.{layer}.{LINEARS[linear]}"


def norm_names(num_hidden_layers: int) -> list[str]:
    """The RMSNorm weights in the order in which a forward pass uses them: 2 a layer, and the last."""
    names = []
    for layer in range(num_hidden_layers):
        names.append(f"model.layers.{layer}.input_layernorm.weight")
        names.append(f"model.layers.{layer}.post_attention_layernorm.weight")
    return [*names, "model.norm.weight"]


def _token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)  # ModelConfig checks what they are


def _rope_from_hf(values: dict[str, Any]) -> Rope:
    # transformers 5 has it all in rope_parameters; 4 has rope_theta and, unless it is the default kind, rope_scaling
    parameters = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    theta = float(parameters.get("rope_theta") or values.get("rope_theta") or 10000.0)
    if parameters.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ModelError(f"config, partial_rotary_factor: {parameters['partial_rotary_factor']!r}, expected 1")
    if kind == "default":
        return Rope(theta=theta)
    if kind == "linear":
        return Rope("linear", theta, float(parameters["factor"]))
    if kind == "llama3":
        return Rope(
            "llama3",
            theta,
            float(parameters["factor"]),
            float(parameters["low_freq_factor"]),
            float(parameters["high_freq_factor"]),
            int(parameters.get("original_max_position_embeddings") or values["max_position_embeddings"]),
        )
    raise ModelError(f"config, rope_type: {kind!r}, expected default, linear or llama3")


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
    "tiny": ModelConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
    ),
}


# ---- weights ---------------------------------------------------------------------------------------------------------


class _Weights(Protocol):
    def load(self, name: str, shape: tuple[int, ...]) -> torch.Tensor: ...


@dataclass(frozen=True)
class Model:
    """A model that can be read: configuration now, weights one by one when they are asked for."""

    name: str
    config: ModelConfig
    directory: Path | None
    _weights: _Weights

    def load(self, name: str) -> torch.Tensor:
        """One weight by its checkpoint name, on the CPU, in the dtype in which it is stored; the caller's own.

        Raises ModelError if it is missing or its shape is not what the configuration says.
        """
        shape = self.config.weight_shapes().get(name)
        if shape is None:
            raise ModelError(f"{self.name}: no weight {name!r} in this configuration")
        return self._weights.load(name, shape)

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All weights, one at a time."""
        for name, shape in self.config.weight_shapes().items():
            yield name, self._weights.load(name, shape)

    def norms(self) -> torch.Tensor:
        """All RMSNorm weights, [2 * layers + 1, hidden], in the order of `norm_names`."""
        import torch

        return torch.stack([self.load(name) for name in norm_names(self.config.num_hidden_layers)])


def open_model(spec: str) -> Model:
    """The model that `spec` names: a directory, or `random:PRESET[@SEED]` (seed 0). Raises ModelError."""
    if spec.startswith("random:"):
        preset, _, seed = spec.removeprefix("random:").partition("@")
        if preset not in PRESETS:
            raise ModelError(f"model {spec!r}: preset {preset!r}, expected one of {', '.join(PRESETS)}")
        if seed and not (seed.isascii() and seed.isdigit() and len(seed) < 20):
            raise ModelError(f"model {spec!r}: seed {seed!r}, expected a number of less than 20 digits")
        return Model(spec, PRESETS[preset], None, _RandomWeights(int(seed or 0)))
    directory = Path(spec)
    if not directory.is_dir():
        raise ModelError(f"model {spec!r}: no such directory (expected one with config.json, or random:PRESET)")
    values = _read_json(directory / "config.json")
    if values is None:
        raise ModelError(f"model {spec!r}: no config.json in it")
    generation = _read_json(directory / "generation_config.json") or {}
    config = ModelConfig.from_hf(values, _token_ids(generation.get("eos_token_id")))
    return Model(spec, config, directory, _SafetensorsWeights(directory))


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise ModelError(f"{path}: a {type(values).__name__}, expected a JSON object")
    return values


class _SafetensorsWeights:
    """Weights in one `model.safetensors` or in the shards that `model.safetensors.index.json` lists."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        index = _read_json(directory / "model.safetensors.index.json")
        self._shards: dict[str, str] | None = None if index is None else index.get("weight_map")
        if index is None and not (directory / "model.safetensors").is_file():
            raise ModelError(f"model {str(directory)!r}: neither model.safetensors nor its index in it")
        if index is not None and not isinstance(self._shards, dict):
            raise ModelError(f"{directory / 'model.safetensors.index.json'}: no weight_map in it")

    def load(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        from safetensors import SafetensorError, safe_open

        file = "model.safetensors" if self._shards is None else self._shards.get(name)
        if not isinstance(file, str) or Path(file).name != file:
            raise ModelError(f"{self._directory}: no weight {name!r} in the index")
        path = self._directory / file
        try:
            with safe_open(path, "pt") as weights:
                found = tuple(weights.get_slice(name).get_shape())
                if found != shape:
                    raise ModelError(f"{path}: weight {name!r} of shape {list(found)}, expected {list(shape)}")
                tensor: torch.Tensor = weights.get_tensor(name)
                return tensor
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path}: weight {name!r}: {error}") from None


class _RandomWeights:
    """Seeded weights: matrices and biases N(0, 0.02) as HF initialises them, norms N(1, 0.1) so that they matter."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def load(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        import torch

        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        weight = torch.empty(shape)
        if "norm" in name:
            return weight.normal_(1.0, 0.1, generator=generator)
        return weight.normal_(0.0, 0.02, generator=generator)

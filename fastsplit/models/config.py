"""A model's configuration: the shape of a Llama-family model, and what both sides compute by it.

Which families there are, and how they differ in Hugging Face's form, is in families.py; here they differ in their
fields alone.

Rules. A configuration is refused if any part of it asks for something that is not computed here: no silent
approximation. Every field is checked when a configuration is made, since one may come from a peer that is not trusted;
nothing is allocated by a number that has not been checked.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ..errors import ModelError
from .checkpoint import EMBEDDING, LM_HEAD
from .families import ACTIVATIONS, FAMILIES, ROPE_FIELDS, fields_from_hf, hf_from_fields

__all__ = ["DTYPES", "LINEARS", "ModelConfig", "Rope", "head_norm_names", "linear_name", "norm_names"]


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
"""A layer's linear operations: our short name -> its own name, which is the checkpoint's too unless that fuses some."""


_MOST = {
    "hidden_size": 2**18,
    "intermediate_size": 2**20,
    "num_hidden_layers": 2**10,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**12,
}
"""Far beyond any model there is: a TEE side without a trusted copy sizes its own memory by these."""

_TINY, _HUGE = 1e-30, 1e30
"""What a factor may be: a number in fp32, and so is its inverse."""

_FLOATS = {
    "rms_norm_eps": (0, 1),
    "norm_offset": (0, 1),
    "attention_scale": (0, _HUGE),
    "attention_softcap": (0, _HUGE),
    "logits_softcap": (0, _HUGE),
    "attention_factor": (0, _HUGE),
    "mscale": (0, _HUGE),
    "mscale_all_dim": (0, _HUGE),
    "partial": (_TINY, 1),
}
"""From where to where a float goes, if not from _TINY to _HUGE."""


def _check_choice(name: str, value: Any, known: Collection[str]) -> None:
    if not isinstance(value, str) or value not in known:
        raise ModelError(f"config, {name}: {value!r}, expected one of {', '.join(known)}")


def _check_number(name: str, value: Any, least: float, most: float) -> None:
    if type(value) not in (int, float) or not least <= value <= most:
        raise ModelError(f"config, {name}: {value!r}, expected a number from {least:g} to {most:g}")


def _check_int(name: str, value: Any, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise ModelError(f"config, {name}: {value!r}, expected an int from {least} to {most}")


def _check_tuple(name: str, value: Any, most: int) -> None:
    if not isinstance(value, tuple) or len(value) > most:
        found = f"{len(value)} values" if isinstance(value, tuple) else repr(value)
        raise ModelError(f"config, {name}: {found}, expected a list of at most {most}")


def _check_scalars(of: Rope | ModelConfig, optional: tuple[str, ...]) -> None:
    """Type and range of all int, float and bool fields; the `optional` ints may be 0."""
    for each in fields(of):
        name, value = each.name, getattr(of, each.name)
        if each.type == "int":
            _check_int(name, value, int(name not in optional), _MOST.get(name, 2**31))
        elif each.type == "float":
            _check_number(name, value, *_FLOATS.get(name, (_TINY, _HUGE)))
        elif each.type == "bool" and type(value) is not bool:
            raise ModelError(f"config, {name}: {value!r}, expected true or false")


@dataclass(frozen=True)
class Rope:
    """How rotary frequencies are made. Which fields after `theta` matter depends on the kind's formula, in rope.py;
    they are named as HF does, and 0 is what HF's null is."""

    kind: str = "default"  # a key of families.ROPE_FIELDS
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    attention_factor: float = 0.0  # 0: from the formula
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    partial: float = 1.0  # which part of each head is rotated
    max_position_embeddings: int = 0  # the model's, for `dynamic` alone

    def __post_init__(self) -> None:
        _check_choice("rope_type", self.kind, ROPE_FIELDS)
        _check_scalars(self, optional=("original_max_position_embeddings", "max_position_embeddings"))
        for name in ("short_factor", "long_factor"):
            values = getattr(self, name)
            _check_tuple(name, values, _MOST["head_dim"] // 2)
            for index, value in enumerate(values):
                _check_number(f"{name}[{index}]", value, _TINY, _HUGE)
        if "original_max_position_embeddings" in ROPE_FIELDS[self.kind]:
            # longrope divides by its logarithm
            least = 2 if self.kind == "longrope" else 1
            _check_int("original_max_position_embeddings", self.original_max_position_embeddings, least, 2**31)
        if self.kind == "dynamic":
            _check_int("max_position_embeddings", self.max_position_embeddings, 1, 2**31)
            _check_number("factor", self.factor, 1, _HUGE)  # or the base would become negative
        if self.kind == "yarn":
            _check_number("theta", self.theta, 1 + 1e-6, _HUGE)  # divided by its logarithm
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ModelError(
                f"config, low_freq_factor: {self.low_freq_factor}, expected less than high_freq_factor, "
                f"{self.high_freq_factor}"
            )

    @property
    def depends_on_length(self) -> bool:
        """Whether a longer sequence has other frequencies, for all of its positions."""
        return self.kind in ("dynamic", "longrope")

    def rotary_dim(self, head_dim: int) -> int:
        """How many elements of a head are rotated: the first ones."""
        return head_dim if self.kind == "proportional" else int(head_dim * self.partial)

    def check(self, head_dim: int) -> None:
        """Raises ModelError if heads of this size cannot be rotated like this."""
        rotated = self.rotary_dim(head_dim)
        least = 4 if self.kind == "dynamic" else 2  # dynamic has an exponent of d / (d - 2)
        if rotated % 2 or rotated < least:
            raise ModelError(
                f"config, head_dim: {head_dim}, of which {rotated} are rotated, expected an even number of at least "
                f"{least}"
            )
        if self.kind == "longrope":
            for name in ("short_factor", "long_factor"):
                if len(getattr(self, name)) != rotated // 2:
                    raise ModelError(f"config, {name}: {len(getattr(self, name))} numbers, expected {rotated // 2}")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Llama-family model. Sizes in elements; names as in HF's configurations where they mean that."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    model_type: str = "llama"  # a key of families.FAMILIES
    rms_norm_eps: float = 1e-5
    hidden_act: str = "silu"  # a key of families.ACTIVATIONS
    rope: Rope = Rope()
    local_rope: Rope | None = None  # that of the sliding layers, where it is another (Gemma 3)
    attention_bias: bool = False  # of q, k and v
    output_bias: bool = False  # of o
    mlp_bias: bool = False
    qk_norm: bool = False  # an RMSNorm for each head of q and k, before the rotation
    post_norms: bool = False  # norms also after attention and after the MLP, before the residual (Gemma)
    norm_offset: float = 0.0  # what the checkpoint's norm weights are relative to (Gemma: 1)
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    attention_scale: float = 0.0  # 0: head_dim ** -0.5
    attention_softcap: float = 0.0  # 0: none
    logits_softcap: float = 0.0  # 0: none
    sliding_window: int = 0  # how many positions a row sees, itself among them; 0: all
    sliding_layers: tuple[bool, ...] = ()  # which layers have the window; () if none
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_choice("model_type", self.model_type, FAMILIES)
        _check_choice("hidden_act", self.hidden_act, ACTIVATIONS)
        _check_scalars(self, optional=("sliding_window",))
        _check_tuple("eos_token_id", self.eos_token_ids, 2**10)
        for token in self.eos_token_ids:
            _check_int("eos_token_id", token, -(2**31), 2**31)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ModelError(
                f"config, num_attention_heads: {self.num_attention_heads}, expected a multiple of "
                f"num_key_value_heads, {self.num_key_value_heads}"
            )
        ropes: list[Any] = [self.rope] if self.local_rope is None else [self.rope, self.local_rope]
        for rope in ropes:
            if not isinstance(rope, Rope):
                raise ModelError(f"config, rope: {rope!r}, expected an object")
            rope.check(self.head_dim)
        _check_tuple("sliding_layers", self.sliding_layers, self.num_hidden_layers)
        sliding = any(self.sliding_layers)
        if any(type(slides) is not bool for slides in self.sliding_layers):
            raise ModelError("config, sliding_layers: expected true or false for each layer")
        if len(self.sliding_layers) != (self.num_hidden_layers if sliding else 0):
            raise ModelError(
                f"config, sliding_layers: {len(self.sliding_layers)} values, expected {self.num_hidden_layers}, "
                "or none if no layer slides"
            )
        if sliding != bool(self.sliding_window):
            raise ModelError(
                f"config, sliding_window: {self.sliding_window}, expected a size if and only if some layers slide"
            )

    @property
    def scale(self) -> float:
        """What the scores are multiplied by."""
        return self.attention_scale or self.head_dim**-0.5

    @property
    def norms_per_layer(self) -> int:
        """How many RMSNorms over the hidden size a layer has."""
        return 4 if self.post_norms else 2

    def window(self, layer: int) -> int:
        """How many positions a row of this layer sees at most, itself among them; 0: all before it."""
        return self.sliding_window if self.sliding_layers and self.sliding_layers[layer] else 0

    def rope_of(self, layer: int) -> Rope:
        return self.local_rope if self.local_rope is not None and self.window(layer) else self.rope

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
        if linear == "o":
            return self.output_bias
        return self.attention_bias if linear in ("q", "k", "v") else self.mlp_bias

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight of the model by its name, no two of them fused. A tied lm_head is not among them."""
        shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (self.vocab_size, self.hidden_size)}
        for layer in range(self.num_hidden_layers):
            for linear in LINEARS:
                name = linear_name(layer, linear)
                shapes[f"{name}.weight"] = (self.out_features(linear), self.in_features(linear))
                if self.has_bias(linear):
                    shapes[f"{name}.bias"] = (self.out_features(linear),)
        for name in head_norm_names(self):
            shapes[name] = (self.head_dim,)
        for name in norm_names(self):
            shapes[name] = (self.hidden_size,)
        if not self.tie_word_embeddings:
            shapes[LM_HEAD] = (self.vocab_size, self.hidden_size)
        return shapes

    def tee_weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """The few weights that the TEE computes with, all fp32, in this order, those that the model has:

        - norms [norms_per_layer * layers + 1, hidden], in the order of `norm_names`, the offset added;
        - head_norms [2 * layers, head_dim], q's and k's of each layer, the offset added;
        - attention_bias [layers, (heads + 2 * kv_heads) * head_dim], q's, k's and v's one after the other;
        - mlp_bias [layers, 2 * intermediate], gate's and up's.
        """
        layers = self.num_hidden_layers
        shapes: dict[str, tuple[int, ...]] = {"norms": (self.norms_per_layer * layers + 1, self.hidden_size)}
        if self.qk_norm:
            shapes["head_norms"] = (2 * layers, self.head_dim)
        if self.attention_bias:
            shapes["attention_bias"] = (layers, sum(self.out_features(linear) for linear in "qkv"))
        if self.mlp_bias:
            shapes["mlp_bias"] = (layers, 2 * self.intermediate_size)
        return shapes

    @classmethod
    def from_hf(cls, values: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelConfig:
        """The configuration in a config.json of transformers 4 or 5. Raises ModelError for what is not supported.

        `generation`: what is in generation_config.json. Where there is one, end-of-sequence tokens are its own, as in
        transformers, even if it has none.
        """
        try:
            known = fields_from_hf(values)
            ropes = {name: Rope(**known.pop(name)) for name in ("rope", "local_rope") if known.get(name) is not None}
            ids = _token_ids((values if generation is None else generation).get("eos_token_id"))
            return cls(**{**known, **ropes, "eos_token_ids": ids})
        except KeyError as error:
            raise ModelError(f"config, {error.args[0]}: missing") from None
        except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
            raise ModelError(f"config: {error}") from None

    def to_hf(self) -> dict[str, Any]:
        """The same as a HF config.json of transformers 5. Raises ModelError if the family has no such model."""
        values = hf_from_fields(asdict(self))
        found = ModelConfig.from_hf(values)
        if replace(found, attention_scale=found.scale) != replace(self, attention_scale=self.scale):
            raise ModelError(f"config, model_type: {self.model_type!r}, expected a family that has all of {self}")
        return values

    def to_json(self) -> str:
        """For `from_json` on the other side."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: Any) -> ModelConfig:
        """The configuration that `to_json` gave, from a peer who may have sent anything. Raises ModelError."""
        try:
            values = json.loads(text)
            for name in ("rope", "local_rope"):
                if values[name] is not None:
                    values[name] = Rope(**_with_tuples(values[name]))
            return cls(**_with_tuples(values))
        except KeyError as error:
            raise ModelError(f"config, {error.args[0]}: missing") from None
        except (TypeError, ValueError, ArithmeticError, AttributeError, RecursionError) as error:
            raise ModelError(f"config: {error}, expected a model's configuration as JSON") from None


def linear_name(layer: int, linear: str) -> str:
    """A linear operation's name, without `.weight` or `.bias`."""
    return f"model.layers.{layer}.{LINEARS[linear]}"


def norm_names(config: ModelConfig) -> list[str]:
    """The RMSNorm weights over the hidden size in the order in which a forward pass uses them: those before attention,
    after it (with post_norms), before the MLP, after it (with post_norms); the last one before the logits."""
    # Without post_norms, HF's post_attention_layernorm is the one before the MLP.
    kinds = ["input_layernorm", "post_attention_layernorm"]
    if config.post_norms:
        kinds += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    names = [f"model.layers.{layer}.{kind}.weight" for layer in range(config.num_hidden_layers) for kind in kinds]
    return [*names, "model.norm.weight"]


def head_norm_names(config: ModelConfig) -> list[str]:
    layers = range(config.num_hidden_layers if config.qk_norm else 0)
    return [f"model.layers.{layer}.self_attn.{name}_norm.weight" for layer in layers for name in "qk"]


def _token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)  # ModelConfig checks what they are


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}

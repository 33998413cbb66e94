"""The model families: how each one's config.json in HF's form becomes the fields of a `models.ModelConfig`, and back.

An entry of `FAMILIES` is all that the package knows of a family: what transformers takes for a value that is left out,
which options are not computed here, what its flags mean, and which weights lie fused in its checkpoints. Everything
else only looks at the fields.

Rules. Dicts in, dicts out: this module needs nothing but the errors, and `ModelConfig` checks every field that comes
out of it. What transformers 5 computes for a configuration is the truth, for the files that transformers 4 wrote too.
An option that asks for something else than what is computed here is refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..errors import ModelError

__all__ = ["ACTIVATIONS", "FAMILIES", "ROPE_FIELDS", "Family", "fields_from_hf", "hf_from_fields"]

Values = dict[str, Any]
"""A config.json, or the fields of a ModelConfig by name."""

ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu"}
"""The MLP's activations: our name -> HF's."""

ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "longrope": ("factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "proportional": ("factor",),
}
"""The kinds of rotary frequencies, and which parameters each one's formula takes beside theta."""

_ROPE_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}

_ROPE_KEYS = {
    *(name for names in ROPE_FIELDS.values() for name in names),
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "max_position_embeddings", "finetuned"),
}
"""What may stand in HF's rope parameters, of whichever kind: a parameter that the kind does not use means nothing."""

_LAYER_TYPES = ("full_attention", "sliding_attention")

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
)
"""Fields whose names and values are HF's own."""

_COMMON: Values = {
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
}
"""What stands for a value that is left out, unless the family says otherwise."""

_NO = (None, False)

_NEVER: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "per_layer_config": (None,),
    "fusion_config": (None,),
    "text_config": (None,),
    "configuration_files": (None,),
    "use_bidirectional_attention": _NO,
    "is_causal": (None, True),
}
"""Options that no family has here -> what they may be all the same."""


@dataclass(frozen=True)
class Family:
    """One family. `read` gives the fields that its own options stand for, `write` the options for such fields."""

    architecture: str
    read: Callable[[Values], Values]
    write: Callable[[Values], Values]
    defaults: Values = field(default_factory=dict)
    allowed: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """Options that other families have and this one does not -> what they may be all the same."""
    activation: str = "hidden_act"
    """The name of the option that says which activation is used."""
    partial_rotary: bool = False
    """Whether only a part of each head may be rotated."""
    rope_kinds: tuple[str, ...] = tuple(ROPE_FIELDS)
    rope_aliases: dict[str, str] = field(default_factory=dict)
    """Other names for a kind in old checkpoints."""
    fused: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """A fused linear's name in a checkpoint -> our short names of its parts, in the order of its rows."""


def fields_from_hf(values: Values) -> Values:
    """The fields of a ModelConfig, `rope` and `local_rope` as dicts of a Rope's, but for `eos_token_ids`.

    Raises ModelError for what is not supported, and KeyError (the missing value's name), TypeError, ValueError,
    ArithmeticError or AttributeError for values that make no sense.
    """
    model_type = values.get("model_type")
    if model_type == "gemma3":
        raise ModelError(
            "config, model_type: 'gemma3' is the multimodal model, expected its text model: a checkpoint of "
            "Gemma3ForCausalLM, whose config.json says 'gemma3_text'"
        )
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ModelError(f"config, model_type: {model_type!r}, expected one of {', '.join(FAMILIES)}")
    for name, allowed in {**_NEVER, **family.allowed}.items():
        if values.get(name) not in allowed:
            raise ModelError(f"config, {name}: {values[name]!r}, expected {allowed[-1]!r} in a {model_type} model")
    values = {**_COMMON, **family.defaults, **values}
    heads = values["num_attention_heads"]
    fields = {name: values[name] for name in _SIZES}
    if fields["num_key_value_heads"] is None:
        fields["num_key_value_heads"] = heads
    if fields["head_dim"] is None:
        fields["head_dim"] = values["hidden_size"] // heads
    activation = values[family.activation]
    names = {**{theirs: ours for ours, theirs in ACTIVATIONS.items()}, "swish": "silu"}
    if activation not in names:
        raise ModelError(f"config, {family.activation}: {activation!r}, expected one of {', '.join(names)}")
    fields |= {"model_type": model_type, "hidden_act": names[activation], **family.read(values)}
    if "rope" not in fields:
        fields["rope"] = _rope_from_hf(values, _rope_parameters(values), family)
    return fields


def hf_from_fields(fields: Values) -> Values:
    """A config.json of transformers 5, from all fields of a ModelConfig (dataclasses.asdict)."""
    family = FAMILIES[fields["model_type"]]
    return {
        "model_type": fields["model_type"],
        "architectures": [family.architecture],
        family.activation: ACTIVATIONS[fields["hidden_act"]],
        **{name: fields[name] for name in _SIZES},
        "rope_parameters": _rope_to_hf(fields["rope"]),
        "eos_token_id": list(fields["eos_token_ids"]) or None,
        "pad_token_id": None,  # a family's own default can lie outside of a small vocabulary
        **family.write(fields),
    }


# ---- rotary frequencies ----------------------------------------------------------------------------------------------


def _rope_parameters(values: Values) -> Values:
    # transformers 5 has it all in rope_parameters; 4 has rope_theta and, unless it is the default kind, rope_scaling
    parameters = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(parameters, dict):
        raise ModelError(f"config, rope_parameters: {parameters!r}, expected an object")
    return parameters


def _rope_from_hf(values: Values, parameters: Values, family: Family) -> Values:
    """The fields of a Rope from HF's flat rope parameters."""
    for name in parameters:
        if name not in _ROPE_KEYS:
            raise ModelError(f"config, rope_parameters: {name!r}, expected only {', '.join(sorted(_ROPE_KEYS))}")
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if isinstance(kind, str):
        kind = family.rope_aliases.get(kind, kind)
    if kind not in family.rope_kinds:
        raise ModelError(f"config, rope_type: {kind!r}, expected one of {', '.join(family.rope_kinds)}")
    partial = parameters.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    partial = 1.0 if partial is None else partial
    if partial != 1 and not family.partial_rotary and kind != "proportional":
        raise ModelError(f"config, partial_rotary_factor: {partial!r}, expected 1 in a {values['model_type']} model")
    for name in _ROPE_REQUIRED.get(kind, ()):
        if parameters.get(name) is None:
            raise KeyError(name)
    if parameters.get("attention_factor") == 0:  # a Rope's 0 is what HF's null is: from the formula
        raise ModelError("config, attention_factor: 0, expected a number over 0")
    fields: Values = {"kind": kind, "theta": parameters.get("rope_theta") or values["rope_theta"], "partial": partial}
    for name in ROPE_FIELDS[kind]:
        value = parameters.get(name)
        if value is not None and not (value == 0 and name in ("beta_fast", "beta_slow")):  # there, 0 is the default
            fields[name] = tuple(value) if isinstance(value, list) else value
    context = values["max_position_embeddings"]
    if "original_max_position_embeddings" in ROPE_FIELDS[kind]:
        original = values.get("original_max_position_embeddings")
        if original is None:
            original = fields.get("original_max_position_embeddings", context)
        fields["original_max_position_embeddings"] = original
        if "factor" not in fields:
            fields["factor"] = context / original
    if kind == "dynamic":
        fields["max_position_embeddings"] = context
    return fields


def _rope_to_hf(rope: Values) -> Values:
    parameters = {"rope_type": rope["kind"], "rope_theta": rope["theta"]}
    if rope["partial"] != 1:
        parameters["partial_rotary_factor"] = rope["partial"]
    for name in ROPE_FIELDS[rope["kind"]]:
        value = rope[name]
        if value != 0 or name not in ("attention_factor", "mscale", "mscale_all_dim"):  # there, our 0 is HF's null
            parameters[name] = list(value) if isinstance(value, tuple) else value
    return parameters


# ---- layers that slide -----------------------------------------------------------------------------------------------


def _sliding(values: Values, slides: Callable[[int], bool], *, by_layer: bool) -> Values:
    """The window's fields. `slides` says which layers do where there are no layer_types, or, unless the family goes
    `by_layer`, in any case."""
    count, window, types = values["num_hidden_layers"], values["sliding_window"], values.get("layer_types")
    if type(count) is not int or not 0 < count <= 2**16:
        return {}  # ModelConfig refuses it; nothing is made by a number that is not checked yet
    layers = tuple(bool(slides(layer)) for layer in range(count))
    if types is not None:
        if not isinstance(types, list) or len(types) != count or any(kind not in _LAYER_TYPES for kind in types):
            raise ModelError(f"config, layer_types: {types!r}, expected {count} of {', '.join(_LAYER_TYPES)}")
        found = tuple(kind == "sliding_attention" for kind in types)
        if not by_layer and found != layers:
            raise ModelError(
                f"config, layer_types: {types!r}, expected {_LAYER_TYPES[layers[0]]!r} in all layers of a "
                f"{values['model_type']} model with sliding_window: {window!r}"
            )
        layers = found
    return {"sliding_window": window, "sliding_layers": layers} if any(layers) else {}


def _layer_types(fields: Values) -> list[str]:
    sliding = fields["sliding_layers"] or (False,) * fields["num_hidden_layers"]
    return [_LAYER_TYPES[slides] for slides in sliding]


def _flag(values: Values, name: str) -> Any:
    value = values.get(name)
    return False if value is None else value


def _over_0(values: Values, name: str) -> float:
    """A value for which our 0 would mean something else than HF's."""
    value: float = values[name]
    if not value > 0:
        raise ModelError(f"config, {name}: {value!r}, expected a number over 0")
    return value


# ---- the families ----------------------------------------------------------------------------------------------------


def _llama(values: Values) -> Values:
    bias = _flag(values, "attention_bias")
    return {"attention_bias": bias, "output_bias": bias, "mlp_bias": _flag(values, "mlp_bias")}


def _to_llama(fields: Values) -> Values:
    return {"attention_bias": fields["attention_bias"], "mlp_bias": fields["mlp_bias"]}


def _mistral(values: Values) -> Values:
    return _sliding(values, lambda layer: values["sliding_window"] is not None, by_layer=False)


def _to_mistral(fields: Values) -> Values:
    return {"sliding_window": fields["sliding_window"] or None}


def _qwen_window(values: Values) -> Values:
    window = values["sliding_window"] if _flag(values, "use_sliding_window") else None
    last = values["max_window_layers"]
    return _sliding(
        {**values, "sliding_window": window}, lambda layer: window is not None and layer >= last, by_layer=True
    )


def _qwen2(values: Values) -> Values:
    return {"attention_bias": True, **_qwen_window(values)}


def _qwen3(values: Values) -> Values:
    bias = _flag(values, "attention_bias")
    return {"attention_bias": bias, "output_bias": bias, "qk_norm": True, **_qwen_window(values)}


def _to_qwen2(fields: Values) -> Values:
    window = fields["sliding_window"]
    return {"use_sliding_window": window > 0, "sliding_window": window or None, "layer_types": _layer_types(fields)}


def _to_qwen3(fields: Values) -> Values:
    return {"attention_bias": fields["attention_bias"], **_to_qwen2(fields)}


def _gemma(values: Values) -> Values:
    bias = _flag(values, "attention_bias")
    fields = {
        "attention_bias": bias,
        "output_bias": bias,
        "post_norms": True,
        "norm_offset": 1.0,
        "embedding_multiplier": values["hidden_size"] ** 0.5,
        "attention_scale": _over_0(values, "query_pre_attn_scalar") ** -0.5,
    }
    for ours, theirs in (
        ("attention_softcap", "attn_logit_softcapping"),
        ("logits_softcap", "final_logit_softcapping"),
    ):
        if values[theirs] is not None:
            fields[ours] = _over_0(values, theirs)
    return fields


def _to_gemma(fields: Values) -> Values:
    # Rounded, since transformers wants an int, and the way through the scale and back leaves the last digits behind.
    scalar = round(fields["attention_scale"] ** -2, 6) if fields["attention_scale"] else fields["head_dim"]
    return {
        "attention_bias": fields["attention_bias"],
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "attn_logit_softcapping": fields["attention_softcap"] or None,
        "final_logit_softcapping": fields["logits_softcap"] or None,
        "sliding_window": fields["sliding_window"] or 4096,  # transformers makes that mask even if no layer uses it
        "layer_types": _layer_types(fields),
    }


def _gemma2(values: Values) -> Values:
    return {**_gemma(values), **_sliding(values, lambda layer: layer % 2 == 0, by_layer=True)}


def _gemma3(values: Values) -> Values:
    pattern = values["sliding_window_pattern"]
    fields = {**_gemma(values), "qk_norm": True}
    fields |= _sliding(values, lambda layer: (layer + 1) % pattern != 0, by_layer=True)
    # By layer type in transformers 5; in 4, rope_theta and rope_scaling are those of the layers that see everything.
    nested = values.get("rope_parameters") or {}
    for layer_type, parameters in nested.items():
        if layer_type not in _LAYER_TYPES or not isinstance(parameters, (dict, type(None))):
            raise ModelError(f"config, rope_parameters: {layer_type!r}, expected objects in {', '.join(_LAYER_TYPES)}")
    family = FAMILIES["gemma3_text"]
    whole = {**(nested.get("full_attention") or {}), **(values.get("rope_scaling") or {})}
    local = {**values, "rope_theta": values.get("rope_local_base_freq") or 10000.0}
    rope = _rope_from_hf(values, whole, family)
    local_rope = _rope_from_hf(local, nested.get("sliding_attention") or {}, family)
    return {
        **fields,
        "rope": rope,
        "local_rope": local_rope if "sliding_layers" in fields and local_rope != rope else None,
    }


def _to_gemma3(fields: Values) -> Values:
    whole, local = fields["rope"], fields["local_rope"] or fields["rope"]
    parameters = {"full_attention": _rope_to_hf(whole), "sliding_attention": _rope_to_hf(local)}
    return {**_to_gemma(fields), "rope_parameters": parameters}


def _to_phi3(fields: Values) -> Values:
    # transformers reads it from here alone
    original = fields["rope"]["original_max_position_embeddings"] or fields["max_position_embeddings"]
    return {**_to_mistral(fields), "original_max_position_embeddings": original}


def _granite(values: Values) -> Values:
    return {
        **_llama(values),
        "embedding_multiplier": values["embedding_multiplier"],
        "residual_multiplier": values["residual_multiplier"],
        "logits_divisor": values["logits_scaling"],
        "attention_scale": _over_0(values, "attention_multiplier"),
    }


def _to_granite(fields: Values) -> Values:
    return {
        **_to_llama(fields),
        "embedding_multiplier": fields["embedding_multiplier"],
        "residual_multiplier": fields["residual_multiplier"],
        "logits_scaling": fields["logits_divisor"],
        "attention_multiplier": fields["attention_scale"] or fields["head_dim"] ** -0.5,
    }


_QWEN: Values = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

_GEMMA: Values = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}

_NO_WINDOW: dict[str, tuple[Any, ...]] = {"sliding_window": (None,), "layer_types": (None,)}
_NO_BIAS: dict[str, tuple[Any, ...]] = {"attention_bias": _NO, "mlp_bias": _NO}

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", _llama, _to_llama, allowed=_NO_WINDOW),
    "mistral": Family(
        "MistralForCausalLM",
        _mistral,
        _to_mistral,
        {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        _NO_BIAS,
    ),
    "qwen2": Family("Qwen2ForCausalLM", _qwen2, _to_qwen2, _QWEN, {"mlp_bias": _NO}),
    "qwen3": Family("Qwen3ForCausalLM", _qwen3, _to_qwen3, {**_QWEN, "head_dim": 128}, {"mlp_bias": _NO}),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _gemma2,
        _to_gemma,
        {
            **_GEMMA,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        {"mlp_bias": _NO},
        activation="hidden_activation",
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _gemma3,
        _to_gemma3,
        {
            **_GEMMA,
            "max_position_embeddings": 131072,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "sliding_window_pattern": 6,
            "rope_theta": 1000000.0,
        },
        # transformers has the option and does not look at it
        {"mlp_bias": _NO, "attn_logit_softcapping": (None,)},
        activation="hidden_activation",
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        _mistral,
        _to_phi3,
        {
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
        },
        {**_NO_BIAS, "lm_head_bias": _NO},
        partial_rotary=True,
        rope_kinds=("default", "longrope"),
        rope_aliases={"su": "longrope", "yarn": "longrope"},
        fused={"self_attn.qkv_proj": ("q", "k", "v"), "mlp.gate_up_proj": ("gate", "up")},
    ),
    "granite": Family(
        "GraniteForCausalLM",
        _granite,
        _to_granite,
        {
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
            "attention_multiplier": 1.0,
        },
        _NO_WINDOW,
    ),
}
"""model_type -> the family."""

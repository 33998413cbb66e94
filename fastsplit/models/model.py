"""Where a model comes from: a Hugging Face directory, or `random:PRESET[@SEED]`, a shape with seeded random weights.

Both sides read the same names, so a TEE side with the same directory or preset has a trusted copy of configuration and
norm weights without loading the rest.

Rules. A weight's shape is checked against the configuration before it is read. Random weights depend on seed and name
alone, so that either side can make any one of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import ModelError
from .checkpoint import EMBEDDING, LM_HEAD, Checkpoint, Part, read_json
from .config import ModelConfig, head_norm_names, linear_name, norm_names
from .families import FAMILIES
from .presets import PRESETS

if TYPE_CHECKING:
    import torch

__all__ = ["Model", "open_model"]


class _Weights(Protocol):
    @property
    def has_lm_head(self) -> bool:
        """Whether there is an lm_head beside the embedding, even if the configuration says that they are tied."""

    def load(self, name: str, shape: tuple[int, ...]) -> torch.Tensor: ...


@dataclass(frozen=True)
class Model:
    """A model that can be read: configuration now, weights one by one when they are asked for."""

    name: str
    config: ModelConfig
    directory: Path | None
    _weights: _Weights

    @cached_property
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight that `items` gives: the configuration's, and an lm_head that is stored although tied."""
        shapes = self.config.weight_shapes()
        if self.config.tie_word_embeddings and self._weights.has_lm_head:
            shapes[LM_HEAD] = shapes[EMBEDDING]
        return shapes

    def load(self, name: str) -> torch.Tensor:
        """One weight by its name, on the CPU, in the dtype in which it is stored; the caller's own.

        Raises ModelError if it is missing, its shape is not what the configuration says, or its dtype is no
        floating-point one.
        """
        shape = self.weight_shapes.get(name)
        if shape is None:
            raise ModelError(f"{self.name}: no weight {name!r} in this configuration")
        return self._weights.load(name, shape)

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All weights, one at a time."""
        for name, shape in self.weight_shapes.items():
            yield name, self._weights.load(name, shape)

    def tee_weights(self) -> dict[str, torch.Tensor]:
        """What the TEE computes with, fp32, as `ModelConfig.tee_weight_shapes` says."""
        from ..extras import torch

        config, weights = self.config, {}
        for kind, shape in config.tee_weight_shapes().items():
            # Row after row, the names of what lies in it.
            if kind == "norms":
                rows = norm_names(config)
            elif kind == "head_norms":
                rows = head_norm_names(config)
            else:
                linears = ("q", "k", "v") if kind == "attention_bias" else ("gate", "up")
                layers = range(config.num_hidden_layers)
                rows = [f"{linear_name(layer, linear)}.bias" for layer in layers for linear in linears]
            weights[kind] = torch.cat([self.load(name).float() for name in rows]).view(shape)
            if "norms" in kind:
                weights[kind] += config.norm_offset
        return weights


def open_model(spec: str) -> Model:
    """The model that `spec` names: a directory, or `random:PRESET[@SEED]` (seed 0). Raises ModelError."""
    if spec.startswith("random:"):
        preset, _, seed = spec.removeprefix("random:").partition("@")
        if preset not in PRESETS:
            raise ModelError(f"model {spec!r}: preset {preset!r}, expected one of {', '.join(PRESETS)}")
        if seed and not (seed.isascii() and seed.isdigit() and len(seed) < 20):
            raise ModelError(f"model {spec!r}: seed {seed!r}, expected a number of less than 20 digits")
        config = PRESETS[preset]
        return Model(spec, config, None, _RandomWeights(int(seed or 0), 1.0 - config.norm_offset))
    directory = Path(spec)
    if not directory.is_dir():
        raise ModelError(f"model {spec!r}: no such directory (expected one with config.json, or random:PRESET)")
    values = read_json(directory / "config.json")
    if values is None:
        raise ModelError(f"model {spec!r}: no config.json in it")
    config = ModelConfig.from_hf(values, read_json(directory / "generation_config.json"))
    return Model(spec, config, directory, _StoredWeights(directory, config, values.get("transformers_weights")))


def _fused_parts(config: ModelConfig) -> dict[str, Part]:
    """Of the weights that a checkpoint of this family has fused with others, which rows of which one they are."""
    parts = {}
    for fused, linears in FAMILIES[config.model_type].fused.items():
        sizes = [config.out_features(linear) for linear in linears]
        for layer in range(config.num_hidden_layers):
            for index, linear in enumerate(linears):
                name = f"model.layers.{layer}.{fused}.weight"
                part = Part(name, sum(sizes[:index]), sizes[index], sum(sizes))
                parts[f"{linear_name(layer, linear)}.weight"] = part
    return parts


class _StoredWeights:
    """Weights in a directory."""

    def __init__(self, directory: Path, config: ModelConfig, file: Any) -> None:
        self._parts = _fused_parts(config)
        names = {self._parts[name].name if name in self._parts else name for name in config.weight_shapes()}
        self._checkpoint = Checkpoint(directory, names, tied=config.tie_word_embeddings, file=file)

    @property
    def has_lm_head(self) -> bool:
        return self._checkpoint.has_lm_head

    def load(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self._checkpoint.load(self._parts.get(name) or Part(name, 0, shape[0], shape[0]), shape)


class _RandomWeights:
    """Seeded weights: matrices and biases N(0, 0.02) as HF initialises them, norms N(1, 0.1) so that they matter, or
    around what is 1 with the family's offset."""

    has_lm_head = False

    def __init__(self, seed: int, norm: float) -> None:
        self._seed = seed
        self._norm = norm

    def load(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        from ..extras import torch

        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "little"))
        weight = torch.empty(shape, dtype=torch.float32, device="cpu")
        if "norm" in name:
            return weight.normal_(self._norm, 0.1, generator=generator)
        return weight.normal_(0.0, 0.02, generator=generator)

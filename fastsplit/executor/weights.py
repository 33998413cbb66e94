"""A model's weights as the executor computes with them.

Weights of the same input lie side by side in one matrix (q, k, v; gate, up): a single row takes one product for all of
them, and each alone is a view.

Rules. A matrix is stored [in, out] on the CPU in fp32, and [out, in] elsewhere: the order in which a product with a
single row is faster. Every weight is held once. Norm weights are held for the plans that fold them into the next
product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from ..extras import torch
from ..models import LINEARS, Model, ModelConfig, linear_name, norm_names
from ..models.checkpoint import EMBEDDING, LM_HEAD

__all__ = ["GROUPS", "LayerWeights", "Linear", "Weights"]

GROUPS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
"""The linear operations of a layer; those in one tuple have the same input."""


class Linear(NamedTuple):
    """x @ weight + bias. `weight` [in, out], of any strides."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """[rows, in] -> `out` [rows, out]."""
        if self.bias is None:
            torch.mm(x, self.weight, out=out)
        else:
            torch.addmm(self.bias, x, self.weight, out=out)


class LayerWeights:
    """One layer. `linears`: by name, and by tuple of names for several together: ("q", "k"), ("q", "k", "v"),
    ("gate", "up")."""

    def __init__(self) -> None:
        self.linears: dict[str | tuple[str, ...], Linear] = {}
        self.attention_norm: torch.Tensor | None = None
        """The weight of the norm before q, k, v [hidden]; None where norms cannot be folded."""
        self.mlp_norm: torch.Tensor | None = None


class Weights:
    """The weights of all layers, on one device, in one dtype."""

    def __init__(
        self,
        model: Model,
        device: torch.device,
        dtype: torch.dtype,
        progress: Callable[[Iterable[Any], int], Iterable[Any]],
    ) -> None:
        """Reads all weights, one at a time; `progress(items, total)` wraps the iteration. Raises ModelError."""
        config = model.config
        self._transposed = device.type == "cpu" and dtype == torch.float32
        self._device, self._dtype = device, dtype
        self.layers = [LayerWeights() for _ in range(config.num_hidden_layers)]
        places: dict[str, torch.Tensor] = {}
        for layer in range(config.num_hidden_layers):
            places.update(self._places(config, layer))
        norms: dict[str, torch.Tensor] = {}
        lm_head: torch.Tensor | None = None
        for name, weight in progress(model.items(), len(model.weight_shapes)):
            if name in places:
                places[name].copy_(weight)
            elif name == EMBEDDING:
                self.embedding = weight.to(device, dtype)
            elif name == LM_HEAD:
                lm_head = weight.to(device, dtype)
            else:
                norms[name] = weight
        # A tied lm_head that the checkpoint stores is mostly equal to the embedding: then it is held once.
        if lm_head is None or (config.tie_word_embeddings and torch.equal(lm_head, self.embedding)):
            lm_head = self.embedding
        self.lm_head = Linear(lm_head.t(), None)
        used = norm_names(config)
        self.final_norm = self._norm(config, norms[used[-1]])
        for layer, weights in enumerate(self.layers):
            if not config.post_norms:  # otherwise no norm can be folded
                before_attention, before_mlp = used[2 * layer : 2 * layer + 2]
                weights.attention_norm = self._norm(config, norms[before_attention])
                weights.mlp_norm = self._norm(config, norms[before_mlp])

    def _norm(self, config: ModelConfig, weight: torch.Tensor) -> torch.Tensor:
        return (weight.float() + config.norm_offset).to(self._device, self._dtype)

    def _places(self, config: ModelConfig, layer: int) -> list[tuple[str, torch.Tensor]]:
        """Makes the memory of a layer's linear operations. Returns (name in the checkpoint, where it goes, as it lies
        there)."""
        places = []
        linears = self.layers[layer].linears
        for names in GROUPS:
            widths = [config.out_features(name) for name in names]
            shape = (config.in_features(names[0]), sum(widths))
            if self._transposed:
                packed = self._empty(shape)
            else:
                packed = self._empty(shape[::-1]).t()
            has_bias = config.has_bias(names[0])
            bias = self._empty(shape[1:]) if has_bias else None
            start = 0
            for name, width in zip(names, widths):
                columns = slice(start, start + width)
                part = Linear(packed[:, columns], None if bias is None else bias[columns])
                linears[name] = part
                places.append((f"{linear_name(layer, name)}.weight", part.weight.t()))
                if part.bias is not None:
                    places.append((f"{linear_name(layer, name)}.bias", part.bias))
                start += width
            if len(names) > 1:
                linears[names] = Linear(packed, bias)
            if len(names) == 3:
                columns = slice(0, start - widths[-1])
                linears[names[:2]] = Linear(packed[:, columns], None if bias is None else bias[columns])
        return places

    def _empty(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(shape, dtype=self._dtype, device=self._device)


assert {name for group in GROUPS for name in group} == set(LINEARS)

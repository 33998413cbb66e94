"""What a model is: configuration, families, presets, weights. Nothing here imports torch before a weight is read."""

from .config import DTYPES, LINEARS, ModelConfig, Rope, head_norm_names, linear_name, norm_names
from .model import Model, open_model
from .presets import PRESETS

__all__ = [
    "DTYPES",
    "LINEARS",
    "PRESETS",
    "Model",
    "ModelConfig",
    "Rope",
    "head_norm_names",
    "linear_name",
    "norm_names",
    "open_model",
]

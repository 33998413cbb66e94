"""Rotary frequencies: from a `models.Rope` to tables of cos and sin.

Rules. Bit for bit what transformers computes on a CPU: the order of the operations is transformers' own, and so is what
is computed in Python's floats and what in fp32. Nothing is kept here: who asks for a table keeps it, and asks again as
the sequence grows where `Rope.depends_on_length` says that it becomes another.
"""

from __future__ import annotations

import math

from ..extras import torch
from ..models import Rope

__all__ = ["cos_sin", "inverse_frequencies", "rotary_dim"]


def rotary_dim(rope: Rope, head_dim: int) -> int:
    """How many elements of a head are rotated, the first ones; the others stay as they are. An even number."""
    return rope.rotary_dim(head_dim)


def inverse_frequencies(rope: Rope, head_dim: int, length: int) -> tuple[torch.Tensor, float]:
    """Frequencies in radians per position, [rotary_dim / 2] fp32, and what cos and sin are multiplied by.

    `length`: how many positions the sequence has now. The kinds:

    - default: theta^(-2i / d) (Su et al., 2021, arXiv:2104.09864).
    - linear: all divided by the factor (Chen et al., 2023, arXiv:2306.15595).
    - dynamic: theta grows with the length, once it is over max_position_embeddings (NTK-aware scaling, bloc97 and
      emozilla, 2023; Peng et al., 2023, arXiv:2309.00071, appendix B.1).
    - yarn: low frequencies divided, high ones kept, a ramp in between, and a temperature (Peng et al., 2023,
      arXiv:2309.00071); two mscales as in DeepSeek-V2 (arXiv:2405.04434).
    - longrope: each frequency divided by a factor of its own, one list up to original_max_position_embeddings and
      another beyond (Ding et al., 2024, arXiv:2402.13753).
    - llama3: like yarn, with another ramp (Llama 3.1's reference code).
    - proportional: only the highest `partial` of the frequencies, the others are 0; all divided (transformers).
    """
    dim, theta = rope.rotary_dim(head_dim), rope.theta
    if rope.kind == "proportional":
        turning = int(rope.partial * head_dim // 2)
        frequencies = torch.zeros(head_dim // 2, dtype=torch.float32, device="cpu")
        frequencies[:turning] = 1.0 / (theta ** (_range(0, 2 * turning, 2) / head_dim))
        return frequencies / rope.factor, 1.0
    exponents = _range(0, dim, 2) / dim
    if rope.kind == "dynamic":
        return 1.0 / (_dynamic_base(rope, dim, length) ** exponents), 1.0
    if rope.kind == "longrope":
        factors = rope.long_factor if length > rope.original_max_position_embeddings else rope.short_factor
        divisors = torch.tensor(factors, dtype=torch.float32, device="cpu")
        return 1.0 / (divisors * theta**exponents), _longrope_attention(rope)
    wavelengths = theta**exponents
    frequencies = 1.0 / wavelengths
    if rope.kind == "linear":
        return frequencies / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, frequencies), 1.0
    if rope.kind == "yarn":
        kept = 1 - _yarn_ramp(rope, dim)
        return 1.0 / (rope.factor * wavelengths) * (1 - kept) + frequencies * kept, _yarn_attention(rope)
    return frequencies, 1.0


def cos_sin(rope: Rope, head_dim: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of positions 0 to `length` - 1 of a sequence that has `length` positions now, each
    [length, rotary_dim / 2] fp32, the attention factor multiplied in."""
    frequencies, attention_factor = inverse_frequencies(rope, head_dim, length)
    angles = torch.outer(_range(0, length, 1), frequencies)
    return angles.cos().mul_(attention_factor), angles.sin_().mul_(attention_factor)


def _range(first: int, last: int, step: int) -> torch.Tensor:
    return torch.arange(first, last, step, dtype=torch.float32, device="cpu")


def _dynamic_base(rope: Rope, dim: int, length: int) -> torch.Tensor | float:
    context = rope.max_position_embeddings
    if length <= context:
        return rope.theta * math.pow(rope.factor - (rope.factor - 1), dim / (dim - 2))
    length_fp32 = torch.tensor(length, dtype=torch.float32, device="cpu")  # as in transformers
    growth = rope.factor * length_fp32 / context - (rope.factor - 1)
    base: torch.Tensor = rope.theta * growth ** (dim / (dim - 2))
    return base


def _longrope_attention(rope: Rope) -> float:
    if rope.attention_factor:
        return rope.attention_factor
    if rope.factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position_embeddings))


def _llama3(rope: Rope, frequencies: torch.Tensor) -> torch.Tensor:
    context = rope.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    smooth = (context / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    between = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    scaled = torch.where(wavelengths > context / rope.low_freq_factor, frequencies / rope.factor, between)
    return torch.where(wavelengths < context / rope.high_freq_factor, frequencies, scaled)


def _yarn_ramp(rope: Rope, dim: int) -> torch.Tensor:
    """How much of each frequency is divided by the factor: 0 where it turns `beta_fast` times and more in the original
    context, 1 where it turns `beta_slow` times and less. [dim / 2] fp32."""

    def turning(times: float) -> float:
        context = rope.original_max_position_embeddings
        return (dim * math.log(context / (times * 2 * math.pi))) / (2 * math.log(rope.theta))

    low, high = turning(rope.beta_fast), turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    return ((_range(0, dim // 2, 1) - low) / (high - low)).clamp(0, 1)


def _yarn_attention(rope: Rope) -> float:
    def temperature(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.attention_factor:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return temperature(rope.mscale) / temperature(rope.mscale_all_dim)
    return temperature(1.0)

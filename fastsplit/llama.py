"""What the TEE computes: RMSNorm, rotary embedding, causal softmax, SiLU. Pure functions of tensors.

Rules. Tensors are token-major: [tokens, heads, head_dim], so that a prefix of a KV cache is contiguous. Whatever can
work in place does, on memory that the caller owns, and says so; what cannot writes to memory that the caller gives
(`out`), so that the caller decides where lies what it is about to send. Norms, softmax and frequencies are computed in
fp32 and rounded to the tensor's dtype where HF's Llama rounds.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .models import Rope

__all__ = ["causal_softmax_", "inverse_frequencies", "rms_norm", "rotary_", "rotary_table", "silu_mul_"]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, written to `out`, which is not x. [n, hidden].

    Zhang and Sennrich, 2019 (arXiv:1910.07467). The normalised rows are rounded to x's dtype before the weight, as in
    HF. Two passes over x and one over `out`; F.rms_norm, which has no `out`, takes 1.7 times as long without the copy.
    """
    wide = x.float()  # x itself, where that is fp32
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    if wide is x:
        torch.mul(x, scale, out=out)
    else:
        out.copy_(wide.mul_(scale))
    return out.mul_(weight)


def inverse_frequencies(head_dim: int, rope: Rope) -> torch.Tensor:
    """Rotary frequencies in radians per position, [head_dim / 2], fp32.

    theta^(-2i / head_dim) (Su et al., 2021, arXiv:2104.09864); `linear` divides by the factor; `llama3` divides the
    long wavelengths, keeps the short ones and goes over smoothly in between (Llama 3.1's reference code).
    """
    frequencies = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        context = rope.original_max_position_embeddings
        wavelengths = 2 * math.pi / frequencies
        smooth = (context / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        between = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
        scaled = torch.where(wavelengths > context / rope.low_freq_factor, frequencies / rope.factor, between)
        return torch.where(wavelengths < context / rope.high_freq_factor, frequencies, scaled)
    return frequencies


def rotary_table(positions: int, head_dim: int, rope: Rope, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin for positions 0 to `positions` - 1: two [positions, 1, head_dim / 2] of `dtype`, computed in fp32."""
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), inverse_frequencies(head_dim, rope))
    return angles.cos().to(dtype).unsqueeze(1), angles.sin().to(dtype).unsqueeze(1)


def rotary_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates each head's pairs (i, i + head_dim / 2), in place; HF's "rotate half" order. [n, heads, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    before = first.clone()
    first.mul_(cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(before, sin)
    return x


def causal_softmax_(scores: torch.Tensor) -> torch.Tensor:
    """Softmax over the columns, in place, where each row sees one column more than the row above and the last sees all.

    [heads, rows, columns], columns >= rows: a row block that stops at the diagonal, or a whole square matrix.
    """
    rows = scores.shape[-2]
    if rows > 1:
        above = torch.ones(rows, rows, dtype=torch.bool).triu_(1)
        scores[..., -rows:].masked_fill_(above, -math.inf)
    # Safe in place: each row's maximum is taken before any of it is written; tests/unit/test_llama.py holds it to that.
    return torch.softmax(scores, dim=-1, out=scores)


def silu_mul_(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, in place in `gate`. [n, intermediate]."""
    return F.silu(gate, inplace=True).mul_(up)

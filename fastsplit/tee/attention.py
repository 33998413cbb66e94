"""Attention in the TEE, for plans whose KV cache is here: softmax(q k^T) v with torch's fused kernel.

`torch.nn.functional.scaled_dot_product_attention` computes blocks of scores in a core's cache and never writes them
(Dao et al., 2022, arXiv:2205.14135). Scores with a soft cap need arithmetic between the products, which the kernel does
not have: these are computed block by block here.

Rules. kv heads are not repeated. Nothing here writes to keys or values.
"""

from __future__ import annotations

from ..extras import torch
from ..split.blocks import Block
from ..split.functional import softcap_, softmax_
from .masks import Geometry, Masked

__all__ = ["attend"]

_fused = torch.nn.functional.scaled_dot_product_attention


def attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, geometry: Geometry, scale: float, softcap: float
) -> torch.Tensor:
    """The attention's output [B, r, H * D], new memory.

    `q` [B, r, H, D], of any strides. `keys`, `values` [B, G, slots, D], at least the geometry's slots of them. `scale`:
    what scores are multiplied by. `softcap`: 0 for none.
    """
    batch, rows, heads, head_dim = q.shape
    if softcap:
        out = torch.empty(batch, rows, heads, head_dim, dtype=q.dtype, device="cpu")
        for block, masked in zip(geometry.blocks, geometry.masked):
            _capped(q, keys, values, block, masked, scale, softcap, out)
        return out.flatten(2)
    by_head = q.transpose(1, 2)  # [B, H, r, D]
    if rows == 1 and len(geometry.blocks) == 1:
        # One row: the heads that share keys are the rows of one product.
        (block,) = geometry.blocks
        k, v = (cache[:, :, block.first : block.end] for cache in (keys, values))
        (bias,) = _biases(geometry, q.dtype)
        grouped = q.reshape(batch, keys.shape[1], -1, head_dim)
        return _fused(grouped, k, v, attn_mask=bias, scale=scale).reshape(batch, 1, -1)
    if geometry.causal and geometry.start == 0:
        k, v = keys[:, :, :rows], values[:, :, :rows]
        return _joined(_fused(by_head, k, v, is_causal=True, scale=scale, enable_gqa=True))
    parts = []
    for block, bias in zip(geometry.blocks, _biases(geometry, q.dtype)):
        k, v = (cache[:, :, block.first : block.end] for cache in (keys, values))
        part = by_head[:, :, block.start : block.start + block.rows]
        parts.append(_joined(_fused(part, k, v, attn_mask=bias, scale=scale, enable_gqa=True)))
    return torch.cat(parts, dim=1)


def _joined(by_head: torch.Tensor) -> torch.Tensor:
    """[B, H, r, D] -> [B, r, H * D]; a view of what the fused kernel gives."""
    return by_head.transpose(1, 2).flatten(2)


def _biases(geometry: Geometry, dtype: torch.dtype) -> list[torch.Tensor | None]:
    """For each block what is added to its scores: 0, or -inf where masked, [B or 1, 1, rows, columns]; None: nothing.
    The same for all layers of the geometry."""
    if geometry.biases is None or any(bias is not None and bias.dtype != dtype for bias in geometry.biases):
        geometry.biases = [_bias(*each, dtype) for each in zip(geometry.blocks, geometry.masked)]
    return geometry.biases


def _bias(block: Block, masked: Masked, dtype: torch.dtype) -> torch.Tensor | None:
    if not masked:
        return None
    batch = max(mask.shape[0] if mask.dim() == 4 else 1 for _, mask in masked)
    bias = torch.zeros(batch, 1, block.rows, block.columns, dtype=dtype, device="cpu")
    for columns, mask in masked:
        bias[..., columns].masked_fill_(mask, -torch.inf)
    return bias


def _capped(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block: Block,
    masked: Masked,
    scale: float,
    softcap: float,
    out: torch.Tensor,
) -> None:
    """One block's rows of `out` [B, r, H, D], with soft-capped scores."""
    batch, _, heads, head_dim = q.shape
    kv_heads = keys.shape[1]
    rows = slice(block.start, block.start + block.rows)
    k, v = (cache[:, :, block.first : block.end] for cache in (keys, values))
    grouped = q[:, rows].view(batch, block.rows, kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4)
    scores = torch.matmul(grouped.reshape(batch, kv_heads, -1, head_dim) * scale, k.transpose(2, 3))
    scores = scores.view(batch, heads, block.rows, block.columns)
    softmax_(softcap_(scores, softcap), masked)
    weighted = torch.matmul(scores.view(batch, kv_heads, -1, block.columns), v)
    out[:, rows] = weighted.view(batch, heads, block.rows, head_dim).transpose(1, 2)

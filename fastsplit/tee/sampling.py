"""Sampling: the choice of the next token.

Rules. Logits are finite and private: the caller copies what an executor could still change.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import RemoteProtocolError
from ..extras import torch

__all__ = ["Sampling", "check_finite", "sample"]


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling. Temperature 0 is greedy; `top_k` 0 and `top_p` 1 keep all tokens."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


def check_finite(logits: torch.Tensor) -> torch.Tensor:
    """Returns `logits`. Raises RemoteProtocolError if one is NaN or infinite."""
    if not bool(logits.isfinite().all()):
        raise RemoteProtocolError("lm_head, logits: NaN or infinite, expected finite numbers")
    return logits


def sample(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token's id. `logits`: [vocab] fp32, finite. Temperature 0 takes the largest; else the token is drawn
    after temperature, top-k and top-p, in HF's order."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    # relative to the largest, so that no temperature makes them infinite; fp32 can represent 1e-30
    logits = (logits - logits.max()) / max(sampling.temperature, 1e-30)
    if 0 < sampling.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort()
        removed = ordered.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        removed[-1] = False  # the most likely token stays
        logits = logits.index_fill(0, order[removed], -torch.inf)
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))

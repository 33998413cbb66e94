"""How the next token is chosen. Rules. Only private, finite logits are looked at: what an executor can still change is
copied first."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import RemoteProtocolError
from ..extras import torch

__all__ = ["Sampling", "check_finite", "sample"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy; `top_k` 0 and `top_p` 1 leave everything in."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


def check_finite(logits: torch.Tensor) -> torch.Tensor:
    """The same. Raises RemoteProtocolError if they are not finite: nothing can be chosen by them."""
    if not bool(logits.isfinite().all()):
        raise RemoteProtocolError("lm_head, logits: NaN or infinite, expected finite numbers")
    return logits


def sample(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token's id from finite logits [vocab] fp32: the greatest, or drawn as HF does (temperature, top-k,
    top-p)."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    # From the greatest, so that no temperature makes it infinite; 1e-30 is a number in fp32.
    logits = (logits - logits.max()) / max(sampling.temperature, 1e-30)
    if 0 < sampling.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort()
        removed = ordered.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        removed[-1] = False  # the most likely one always stays
        logits = logits.index_fill(0, order[removed], -torch.inf)
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))

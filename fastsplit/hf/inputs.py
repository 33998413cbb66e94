"""The inputs of a `forward` of transformers as a Runner takes them: mask, positions, selected rows, distinct sequences.

Rules. Positions are what transformers makes them: the given ones, else counted from the cache's length, whatever the
mask says. All results are on the CPU. An input that does not fit raises SettingError with its name and shape.
"""

from __future__ import annotations

from typing import Any

from ..errors import SettingError
from ..extras import torch
from ..split.functional import int64, int64_range

__all__ = [
    "at",
    "check_ids",
    "distinct_sequences",
    "parse_mask",
    "parse_positions",
    "select_logits",
    "selected_rows",
]


def check_ids(input_ids: torch.Tensor | None) -> torch.Tensor:
    """`input_ids` unchanged, [batch, n] integers. Raises SettingError for any other input."""
    if input_ids is None or input_ids.ndim != 2 or not input_ids.numel():
        found = "none" if input_ids is None else list(input_ids.shape)
        raise SettingError(f"input_ids: {found}, expected [batch, n], one token or more")
    _refuse_fractions("input_ids", input_ids)
    return input_ids


def parse_mask(attention_mask: torch.Tensor | None, batch: int, length: int) -> torch.Tensor | None:
    """[batch, length] bool, True for tokens; None if nothing is padding."""
    if attention_mask is None:
        return None
    if attention_mask.shape != (batch, length):
        raise SettingError(
            f"attention_mask: {list(attention_mask.shape)}, expected {[batch, length]}: all tokens, those in the cache "
            "too"
        )
    mask = attention_mask.to("cpu") != 0
    return None if bool(mask.all()) else mask


def parse_positions(
    position_ids: torch.Tensor | None, batch: int, past: int, rows: int, masked: bool
) -> torch.Tensor | None:
    """[batch, rows] int64; None where the runner would count the same positions. `masked`: there is padding."""
    counted = int64_range(past, past + rows)
    if position_ids is None:
        return counted.repeat(batch, 1) if masked else None
    if position_ids.shape not in ((batch, rows), (1, rows)):
        raise SettingError(f"position_ids: {list(position_ids.shape)}, expected {[batch, rows]} or {[1, rows]}")
    _refuse_fractions("position_ids", position_ids)
    positions = position_ids.to("cpu", torch.int64)
    if int(positions.min()) < 0:
        raise SettingError(f"position_ids: {int(positions.min())}, expected 0 or more")
    if not masked and bool((positions == counted).all()):
        return None
    return positions.expand(batch, rows).contiguous()


def selected_rows(logits_to_keep: int | torch.Tensor, batch: int, rows: int) -> tuple[str | torch.Tensor, int]:
    """The runner's `keep` for `logits_to_keep`, and how many leading tokens to run first, without their logits."""
    if isinstance(logits_to_keep, int):
        if logits_to_keep < 0:
            raise SettingError(f"logits_to_keep: {logits_to_keep}, expected 0 or more")
        count = min(logits_to_keep or rows, rows)
        return ("last", 0) if count == 1 else ("all", rows - count)
    if logits_to_keep.ndim not in (1, 2):
        raise SettingError(f"logits_to_keep: {list(logits_to_keep.shape)}, expected [positions] or [batch, positions]")
    if logits_to_keep.dtype == torch.bool or logits_to_keep.shape[-1] != 1:
        return "all", 0
    chosen = logits_to_keep.to("cpu", torch.int64).reshape(-1).expand(batch)
    if not bool(((-rows <= chosen) & (chosen < rows)).all()):
        raise SettingError(f"logits_to_keep: {chosen.tolist()}, expected positions of {rows} tokens")
    return chosen % rows, 0


def select_logits(logits: torch.Tensor, logits_to_keep: int | torch.Tensor, keep: str | torch.Tensor) -> torch.Tensor:
    """The rows of `logits` that `logits_to_keep` selects, as in transformers; all of them where the runner's `keep` has
    selected them already."""
    if isinstance(logits_to_keep, int) or isinstance(keep, torch.Tensor):
        return logits
    logits_to_keep = logits_to_keep.to("cpu")
    if logits_to_keep.ndim == 1:
        return logits[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return logits[logits_to_keep]
    return logits.take_along_dim(logits_to_keep[..., None], dim=1)


def distinct_sequences(*inputs: torch.Tensor | str | None) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Indices [distinct] of the sequences that differ in any of the inputs [batch, ...], and for each sequence which of
    them it equals, [batch]; None if all differ."""
    tensors = [item.to(torch.int64).reshape(len(item), -1) for item in inputs if isinstance(item, torch.Tensor)]
    seen: dict[bytes, int] = {}
    rows = torch.cat(tensors, dim=1)
    which = [seen.setdefault(row.numpy().tobytes(), len(seen)) for row in rows]
    if len(seen) == len(which):
        return None
    first = [which.index(sequence) for sequence in range(len(seen))]
    return int64(first), int64(which)


def at(tensor: torch.Tensor | None, index: Any) -> torch.Tensor | None:
    """`tensor[index]`, None for None."""
    return None if tensor is None else tensor[index]


def _refuse_fractions(name: str, numbers: torch.Tensor) -> None:
    if numbers.is_floating_point() or numbers.is_complex():
        raise SettingError(f"{name}: {numbers.dtype}, expected integers")

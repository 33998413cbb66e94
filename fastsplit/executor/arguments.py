"""The arguments of `run`, checked: from a request's attributes and tensors to the engine's `Job`.

Everything in a request comes from a peer. Attributes are private to us; tensors may lie in memory that the peer can
still write to. So ids and indices are copied before they are checked, and only the copy is used; values of other
tensors are never decided upon. Shapes and dtypes follow from the configuration (split/contract.py), counts of rows from
one tensor of the request or from the lane, and all others must agree.

Rules. An error is the caller's, and names the argument. Nothing is computed or changed before all checks have passed.
What depends on how far the cache is filled is checked once more where it is read (engine.py, split/kv_cache.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from ..errors import LimitError, SettingError, TensorError
from ..extras import torch
from ..models import ModelConfig
from ..split.blocks import Block, packed_elements, parse_blocks
from ..split.contract import Shapes
from .engine import Engine, Job, Routine
from .kv_cache import KVCache, Lane

__all__ = ["Arguments", "checked_indices", "checked_int"]

_PRIMARY = ("ids", "x", "normed", "qk", "k", "attended", "gated")
"""The values that say how many rows a call has."""

_CHECKED_APART = ("cos", "sin", "selected")


class Arguments:
    """Checks the arguments of an engine's calls, and refuses calls whose reply would exceed `max_reply_nbytes`."""

    def __init__(self, engine: Engine, max_reply_nbytes: int) -> None:
        config: ModelConfig = engine.config
        self._engine = engine
        self._routines = engine.routines
        self._max_reply_nbytes = max_reply_nbytes
        self._layers = config.num_hidden_layers
        self._vocab_size = config.vocab_size
        shapes = Shapes(config, "")
        self._shape = lru_cache(1024)(shapes.shape)
        self._heads = config.num_attention_heads
        self._own_dtypes = {
            name: getattr(torch, shapes.dtype(name)) for name in ("ids", "selected", "cos", "sin", "scale")
        }
        assert all(self._own_dtypes.values())

    def find(self, attrs: Mapping[str, Any]) -> tuple[Routine, int, int]:
        """What to run, layer and start. Raises SettingError."""
        text, layer, start = attrs.get("steps"), attrs.get("layer"), attrs.get("start")
        routine = self._routines.get(text) if type(text) is str else None
        if routine is None:
            raise SettingError(f"steps: {text!r:.100}, expected the steps of one call of a plan")
        end = self._layers - routine.crosses
        if type(layer) is not int or not 0 <= layer < end:
            raise SettingError(f"layer: {layer!r:.30}, expected 0 to {end - 1}")
        if type(start) is not int or not 0 <= start < 2**31:
            raise SettingError(f"start: {start!r:.30}, expected an int of 0 or more")
        if routine.refusal:
            raise SettingError(routine.refusal)
        return routine, layer, start

    def check(
        self,
        routine: Routine,
        layer: int,
        start: int,
        attrs: Mapping[str, Any],
        tensors: Sequence[torch.Tensor],
        cache: KVCache,
        lane: Lane,
    ) -> Job:
        """Everything else. Raises SettingError, TensorError, LimitError."""
        steps, batch = routine.steps, cache.batch
        scale = attrs.get("scale") if "scale" in routine.inputs else None
        inputs = self._named(routine, tensors, scale is not None)
        blocks = self._blocks_back(lane) if "weights" in inputs else []
        rows = blocks[-1].start + blocks[-1].rows if blocks else self._rows(inputs, lane)
        scale_rows = lane.rows if "scale_kv" in steps else rows
        for name, tensor in inputs.items():
            if name == "q":  # the rows that go on
                free = "select" not in steps
                count = tensor.shape[1] if free and tensor.dim() > 1 else 1
                self._check(name, tensor, cache, count, blocks, free=free)
            elif name == "v" or name == "scale":
                self._check(name, tensor, cache, lane.rows if name == "v" else scale_rows, blocks, free=False)
            elif name not in _CHECKED_APART:
                self._check(name, tensor, cache, rows, blocks, free=name in _PRIMARY)
        if "cos" in inputs:
            self._check_tables(inputs["cos"], inputs["sin"], rows, batch)
        self._check_stream(routine, lane, batch, rows)
        if scale is not None and (not isinstance(scale, float) or batch * scale_rows != 1):
            raise SettingError(f"scale: {scale!r:.30} for {batch * scale_rows} rows, expected a float and one row")
        if "scale_v" in steps and start + rows > cache.values_filled[layer]:
            raise SettingError(f"start: {start}, expected where this lane's values were put")
        if "scale_kv" in steps:
            end = start + lane.rows
            if end > cache.keys_filled[layer] or end > cache.values_filled[layer]:
                raise SettingError(f"start: {start}, expected where this lane's rows were put")
        if "ids" in inputs:
            inputs["ids"] = self._checked_ids(inputs["ids"])
        if "selected" in inputs:
            limit = lane.x.shape[1] if lane.x is not None and "embed" not in steps else rows
            inputs["selected"] = checked_indices("selected", inputs["selected"], limit, batch)
        if "scores" in steps:
            asked = 1 if "select" in steps else inputs["q"].shape[1] if "q" in inputs else rows
            blocks = parse_blocks(attrs, asked, start + rows)
        reply = self._engine.reply(routine, batch, rows, blocks)
        nbytes = reply.elements * cache.link_dtype.itemsize
        if nbytes > self._max_reply_nbytes:
            raise LimitError(f"a reply of {nbytes} bytes, expected at most {self._max_reply_nbytes}")
        return Job(routine, inputs, cache, lane, layer, start, rows, scale, blocks, reply)

    @staticmethod
    def _named(routine: Routine, tensors: Sequence[torch.Tensor], has_scale: bool) -> dict[str, torch.Tensor]:
        """The tensors by name: q and k together or alone, the scale among them unless it is an attribute."""
        names = routine.inputs
        if len(tensors) + has_scale != len(names) and "select" not in routine.steps:
            names = routine.joined_inputs
        if has_scale:
            names = tuple(name for name in names if name != "scale")
        if len(tensors) != len(names):
            raise SettingError(f"{len(tensors)} tensors, expected {', '.join(names)}")
        return dict(zip(names, tensors))

    @staticmethod
    def _rows(inputs: dict[str, torch.Tensor], lane: Lane) -> int:
        """The rows of each sequence in this call; 0 if its tensor has no such dimension."""
        for name in _PRIMARY:
            if name in inputs:
                tensor = inputs[name]
                return tensor.shape[1] if tensor.dim() > 1 else 0
        return lane.rows

    @staticmethod
    def _blocks_back(lane: Lane) -> list[Block]:
        """The blocks of the scores that the caller has, and sends back as weights."""
        if lane.blocks is None:
            raise SettingError("lane: no scores of this lane to answer, expected a call with `scores` before")
        return lane.blocks

    def _check(
        self, name: str, tensor: torch.Tensor, cache: KVCache, rows: int, blocks: Sequence[Block], *, free: bool
    ) -> None:
        """`free`: the tensor itself says how many rows there are, 1 or more."""
        dtype = self._own_dtypes.get(name, cache.link_dtype)
        if name == "weights":
            shape: tuple[int, ...] = (packed_elements(cache.batch, self._heads, blocks),)
        else:
            shape = self._shape(name, cache.batch, rows, False, ())
        if tensor.dtype != dtype or tensor.shape != shape:
            wanted = (*shape[:1], None, *shape[2:]) if free else shape
            raise TensorError(_expected(name, tensor, dtype, wanted))
        if rows < 1:
            raise TensorError(f"{name}: {list(tensor.shape)}, expected no dimension of 0")

    def _check_tables(self, cos: torch.Tensor, sin: torch.Tensor, rows: int, batch: int) -> None:
        """Rotary tables, of all sequences together or of each alone."""
        dtype = self._own_dtypes["cos"]
        shape = self._shape("cos", batch, rows, False, ())
        if cos.dtype != dtype or cos.shape not in (shape, (batch, *shape[1:])):
            raise TensorError(_expected("cos", cos, dtype, (batch, *shape[1:])))
        if sin.shape != cos.shape or sin.dtype != dtype:
            raise TensorError(_expected("sin", sin, dtype, tuple(cos.shape)))

    @staticmethod
    def _check_stream(routine: Routine, lane: Lane, batch: int, rows: int) -> None:
        """What the lane must have: the residual stream, and rotary tables."""
        steps, before = routine.steps, lane.x
        if "embed" not in steps:
            if "select" in steps and "down" not in steps:
                fits = before is not None and ("k" not in routine.inputs or before.shape[1] == rows)
                if not fits or ("add" in steps and rows != 1):
                    raise SettingError(f"selected: {rows} rows, expected those of the residual stream in this lane")
            elif "add" in steps and (before is None or before.shape[:2] != (batch, rows)):
                have = None if before is None else list(before.shape[:2])
                raise SettingError(f"{[batch, rows]} rows, expected {have}, of the residual stream in this lane")
        if routine.rotates and "tables" not in steps and (lane.cos is None or lane.cos.shape[1] != rows):
            raise SettingError("lane: no rotary tables of this pass there, expected `tables` before")

    def _checked_ids(self, ids: torch.Tensor) -> torch.Tensor:
        # An id out of range would look up memory of ours.
        ids = ids.clone()
        if not 0 <= int(ids.min()) <= int(ids.max()) < self._vocab_size:
            raise SettingError(f"ids: {int(ids.min())} to {int(ids.max())}, expected 0 to {self._vocab_size - 1}")
        return ids


def checked_int(attrs: Mapping[str, Any], name: str, low: int, high: int) -> int:
    """An attribute. Raises SettingError."""
    value = attrs.get(name)
    if type(value) is not int or not low <= value <= high:
        raise SettingError(f"{name}: {value!r:.30}, expected an int from {low} to {high}")
    return value


def checked_indices(name: str, indices: torch.Tensor, limit: int, count: int | None = None) -> torch.Tensor:
    """A private copy of indices below `limit`. Raises TensorError, SettingError."""
    if indices.dtype != torch.int64 or indices.dim() != 1 or (count is not None and len(indices) != count):
        raise TensorError(_expected(name, indices, torch.int64, (count,)))
    indices = indices.clone()
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < limit:
        raise SettingError(f"{name}: {int(indices.min())} to {int(indices.max())}, expected 0 to {limit - 1}")
    return indices


def _expected(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int | None, ...]) -> str:
    wanted = ", ".join("n" if dim is None else str(dim) for dim in shape)
    have, want = (str(each).removeprefix("torch.") for each in (tensor.dtype, dtype))
    return f"{name}: {have} {list(tensor.shape)}, expected {want} [{wanted}]"

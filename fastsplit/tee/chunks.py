"""How the rows of a pass are cut into chunks.

One chunk for each lane, of about equal bytes on the link; more of them where memory asks for it: that of the
scores, or, where attention is computed here, of the masks and of the largest message. All lanes are under way at once,
and the longest way of a chunk through a layer is then the shortest that it can be.

Rules. A chunk has whole blocks of rows, and at least MIN_CHUNK_ROWS of them unless the prompt or the memory has less.
"""

from __future__ import annotations

from ..models import ModelConfig
from ..split.blocks import choose_block_rows
from ..split.plan import Plan

__all__ = ["MIN_CHUNK_ROWS", "Cutter"]

MIN_CHUNK_ROWS = 64
"""Smaller chunks gain nothing: their products take no less time for having fewer rows."""


class Cutter:
    """Cuts the passes of one model and plan. `scores_nbytes`: memory that a chunk's scores may take in the link's dtype
    of `itemsize` bytes; without scores, its masks and its largest message each. `block_rows`: rows in a
    block of scores; None: the default."""

    def __init__(
        self, config: ModelConfig, plan: Plan, itemsize: int, lanes: int, block_rows: int | None, scores_nbytes: int
    ) -> None:
        self._heads = 1 if plan.cache_in_tee else config.num_attention_heads  # masks are the same for all heads
        self._itemsize = itemsize
        self._lanes = lanes
        self._scores_nbytes = scores_nbytes
        self._message_width = config.hidden_size + 2 * config.intermediate_size if plan.cache_in_tee else 0
        self._grain = min(choose_block_rows(1, block_rows), choose_block_rows(1))
        # Elements of a row that travel in a layer, both ways; of a score, both ways.
        self._row_width = 2 * config.hidden_size + 3 * config.intermediate_size
        if not plan.rotates:
            self._row_width += 2 * (config.out_features("q") + config.out_features("k"))
        self._score_width = 0 if plan.cache_in_tee else 2 * config.num_attention_heads

    def cut(self, batch: int, start: int, rows: int) -> list[int]:
        """The rows of each chunk of a pass of `rows` rows of `batch` sequences after `start` positions."""
        grain = self._grain
        least = max(grain, -(-MIN_CHUNK_ROWS // grain) * grain)
        left = self._lanes
        counts = []
        while rows:
            count = rows
            if left > 1:
                share = self._rows_of_weight(start, self._weight(start, rows) / left)
                spare = rows - (left - 1) * MIN_CHUNK_ROWS  # leaves something for the others
                count = max(least, min(round(share / grain), spare // grain) * grain)
                if rows - count < MIN_CHUNK_ROWS:
                    count = rows
            # count * (start + count) scores at most
            elements = self._scores_nbytes // (batch * self._itemsize)
            fitting = max(int((start * start / 4 + elements // self._heads) ** 0.5 - start / 2), 1)
            if self._message_width:
                fitting = min(fitting, max(elements // self._message_width, 1))
            if count > fitting:
                count = fitting - fitting % grain if fitting > grain else fitting
            counts.append(count)
            start += count
            rows -= count
            left = max(left - 1, 1)
        return counts

    def _weight(self, start: int, rows: int) -> float:
        """Elements of a sequence that travel in a layer, both ways."""
        return rows * (self._row_width + self._score_width * (start + rows / 2))

    def _rows_of_weight(self, start: int, weight: float) -> float:
        """How many rows from `start` on have that weight: `_weight`, solved."""
        slope = self._score_width / 2
        offset = self._weight(start, 1) - slope
        if not slope:
            return weight / offset
        return float(((offset * offset + 4 * slope * weight) ** 0.5 - offset) / (2 * slope))

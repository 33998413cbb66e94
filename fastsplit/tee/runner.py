"""The TEE side: runs a model's forward passes and generates tokens. Linear algebra goes to a backend.

What happens between two calls is a program's business (plans.py). A Runner cuts a pass into stretches of rows that fit
the memory for scores, says what each row may see, and runs a program for each stretch: one after another, or several
in turn, so that the executor computes for one, and another's bytes travel, while this side works for a third.

Rules. What a row sees is decided by slots, the positions of the cache, as in HF: padding takes a slot and is hidden.
Positions, which the rotary embedding turns by, count tokens. A cache is the same whatever plans filled it. Every
stretch of time is recorded (report.py).
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

from ..errors import SettingError
from ..extras import torch
from ..models import Rope
from ..split.functional import int64, int64_range, rotary_matrix
from ..split.ops import MAX_LANES, Block, block_attrs, choose_block_rows, choose_plan, row_blocks
from ..split.rope import cos_sin
from .program import Attention, Layers, Program, Progress, Stretch
from .remote import Backend, Cache, RemoteModel
from .report import Recorder
from .sampling import Sampling, check_finite, sample
from .tuning import MIN_STRETCH_ROWS, Choice

__all__ = ["Runner"]

_SCORES_NBYTES = 256 * 2**20
"""How much memory the scores of one stretch may take, in the wire's dtype."""

_MIN_TABLE = 512

_FEW_ROWS = 8
"""Up to so many rows one thread is faster in here: to wake another takes longer than what it would help with, and it
goes on to spin on a core that the executor needs. SmolLM2 in fp32, both sides on two cores: softmax of a token 1 ms
instead of 6 to 30."""

_Active = tuple[int, int, Program, str, int, Any]
"""A program whose request is on its way: its index, its lane, itself, what the request counts as, its future."""


class Runner:
    """One model, one backend, one plan. Not thread-safe. Run it under `torch.inference_mode()` or `torch.no_grad()`.

    `plan`: one of ops.PLANS, or "auto"; `self.plan` is the one that runs, `self.plan_reason` says why if it is another.
    `tee_dtype`, `wire_dtype`: what is computed in here, and what the executor sends and gets; the executor's if None.
    `lanes`: how many stretches are under way at once; if None 2 where the executor computes beside our cores, else 1.
    `block_rows`: rows in a block of scores, chosen if None. `cast`: "bfloat16" or "float16", what float32 tensors
    travel as on the link alone; None: as they are. `scores_nbytes`: what the scores of a stretch may take.

    `choice`: what choice.py decided; it stands for `plan`, `lanes`, `block_rows` and `cast`.
    """

    def __init__(
        self,
        model: RemoteModel,
        backend: Backend,
        plan: str = "auto",
        recorder: Recorder | None = None,
        *,
        tee_dtype: str | None = None,
        wire_dtype: str | None = None,
        lanes: int | None = None,
        block_rows: int | None = None,
        cast: str | None = None,
        choice: Choice | None = None,
        scores_nbytes: int = _SCORES_NBYTES,
    ) -> None:
        if choice is not None:
            plan, lanes, block_rows, cast = choice.plan, choice.lanes, choice.block_rows, choice.cast
        wire_dtype = wire_dtype or model.dtype
        self.plan, self.plan_reason = choose_plan(plan, model.config, (model.dtype, wire_dtype))
        self.choice = choice
        self.config = model.config
        self.cast = cast
        self.wire_dtype = wire_dtype
        self.tee_dtype = tee_dtype or wire_dtype
        if lanes is not None and not 1 <= lanes <= MAX_LANES:
            raise SettingError(f"lanes: {lanes}, expected 1 to {MAX_LANES}")
        self.lanes = lanes if lanes is not None else 1 if model.threads else 2
        self._dtype: torch.dtype = getattr(torch, self.tee_dtype)
        self._wire_itemsize = getattr(torch, wire_dtype).itemsize
        self._backend = backend
        self._how: dict[str, Any] = {} if cast is None else {"wire_dtype": cast}
        self._block_rows = block_rows
        self._scores_nbytes = scores_nbytes
        self._recorder = recorder or Recorder()
        self._layers = Layers(model.config, model.weights, backend, self._recorder, self._dtype, wire_dtype)
        self._tables: dict[Rope, tuple[int, torch.Tensor, torch.Tensor]] = {}
        self._warned_of_length = False

    @property
    def recorder(self) -> Recorder:
        """Where the time goes; another may be set between passes."""
        return self._recorder

    @recorder.setter
    def recorder(self, recorder: Recorder) -> None:
        self._recorder = self._layers.recorder = recorder

    def new_cache(self, batch: int = 1, capacity: int = 0) -> Cache:
        """Keys and values of `batch` sequences, with room for `capacity` positions; it grows if there are more.

        Raises RemoteOpError over the executor's limits.
        """
        return Cache(self._backend, batch, capacity, self.wire_dtype)

    def forward(
        self,
        ids: torch.Tensor,
        cache: Cache,
        *,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        keep: str | torch.Tensor = "last",
    ) -> torch.Tensor:
        """Logits for the ids [B, n] int64 after what is in the cache, which grows by n.

        `mask` [B, cache.length + n] bool: which slots hold a token; None: all that are new do. `positions` [B, n]:
        None: counted by the mask. `keep`: "last" gives logits [B, 1, vocab] of the last row, "all" [B, n, vocab], an
        int64 tensor [B] those of one row of each sequence, [B, 1, vocab]. They are fp32 and the caller's own; those of
        padding mean nothing. Long prompts go in stretches, so that memory stays flat. Positions beyond the model's
        max_position_embeddings are computed, after one UserWarning per runner.

        Raises SettingError for shapes that do not fit, and what `Channel.call` does; after that the cache is as before.
        """
        batch, rows = self._check(ids, cache, mask, positions)
        start, total = cache.length, cache.length + rows
        whole = self._whole_mask(cache, mask, rows)
        if positions is None and whole is not None:
            positions = (whole.cumsum(1) - 1).clamp_(min=0)[:, start:]
        length = total if positions is None else int(positions.max()) + 1
        wanted = self._wanted_rows(keep, batch, rows)
        self._warn_of_length(length)
        counts = self._stretch_rows(batch, start, rows)
        offsets = list(accumulate(counts, initial=0))
        started: list[Progress] = []

        def program(index: int, lane: int) -> Program:
            """Made when its turn comes: masks take memory."""
            offset, end = offsets[index], offsets[index + 1]
            kept, last = self._kept(wanted, offset, end)
            attention = self._attention(
                start + offset,
                end - offset,
                None if whole is None else whole[:, : start + end],
                None if positions is None else positions[:, offset:end],
                length,
                kept,
            )
            progress = Progress(start + offset, end - offset)
            stretch = Stretch(
                ids[:, offset:end], cache.number, lane, start + offset, attention, kept, progress, tuple(started), last
            )
            started.append(progress)
            return self._layers.program(self.plan, stretch)

        with _serial() if batch * rows <= _FEW_ROWS else contextlib.nullcontext(), _without_autocast():
            results = self._run(len(counts), program)
        cache.length = total
        cache.mask = whole
        return self._joined(offsets, results, wanted)

    def generate(
        self,
        ids: torch.Tensor,
        max_new_tokens: int,
        *,
        sampling: Sampling | None = None,
        on_prefill: Callable[[torch.Tensor], object] | None = None,
        ignore_eos: bool = False,
    ) -> Iterator[int]:
        """New token ids one by one, after the prompt's [n] int64; an end-of-sequence token is the last one given.

        `on_prefill(logits)` gets the prompt's last row, [vocab] fp32. With 0 new tokens only the prompt is run.
        """

        def on_prefill_batch(logits: torch.Tensor) -> None:
            if on_prefill is not None:
                on_prefill(logits[0])

        steps = self.generate_batch(
            [ids], max_new_tokens, sampling=sampling, on_prefill=on_prefill_batch, ignore_eos=ignore_eos
        )
        for step in steps:
            yield step[0]

    def generate_batch(
        self,
        prompts: Sequence[torch.Tensor],
        max_new_tokens: int,
        *,
        sampling: Sampling | None = None,
        on_prefill: Callable[[torch.Tensor], object] | None = None,
        ignore_eos: bool = False,
    ) -> Iterator[dict[int, int]]:
        """For each step the new token of each prompt that is not done yet: {index of the prompt: token id}.

        `prompts`: [n] int64 each, of any lengths of 1 or more. A sequence ends with an end-of-sequence token and leaves
        the batch, which costs nothing from then on. `on_prefill(logits)` gets each prompt's last row, [B, vocab] fp32.
        Each sequence draws from a generator of its own, seeded by `sampling.seed` plus its index.
        """
        recorder = self._recorder
        sampling = sampling or Sampling()
        generators = [torch.Generator("cpu").manual_seed(sampling.seed + index) for index in range(len(prompts))]
        ids, mask = _left_padded(prompts)
        running = list(range(len(prompts)))
        with self.new_cache(len(prompts), ids.shape[1] + max_new_tokens) as cache:
            with recorder.phase("prefill"):
                logits = check_finite(self.forward(ids, cache, mask=mask)[:, 0])
                if max_new_tokens:
                    tokens = [sample(row, sampling, generators[index]) for row, index in zip(logits, running)]
                recorder.lap("sampling")
            if on_prefill is not None:
                on_prefill(logits)
            for count in range(1, max_new_tokens + 1):
                step = dict(zip(running, tokens))
                yield step
                if not ignore_eos:
                    left = [row for row, token in enumerate(tokens) if token not in self.config.eos_token_ids]
                    if left and len(left) < len(running):
                        cache.reorder(int64(left))
                    running, tokens = [running[row] for row in left], [tokens[row] for row in left]
                if count == max_new_tokens or not running:
                    return
                with recorder.phase("decode"):
                    logits = check_finite(self.forward(int64(tokens).unsqueeze(1), cache)[:, 0])
                    tokens = [sample(row, sampling, generators[index]) for row, index in zip(logits, running)]
                    recorder.lap("sampling")

    # ---- running programs ----

    def _run(self, count: int, program: Callable[[int, int], Program]) -> list[torch.Tensor | None]:
        """What `count` programs return, each made by `program(index, lane)` when it starts. They start and take turns
        in order: none is ever ahead of one before it."""
        if self.lanes == 1 or count == 1:
            return [self._run_alone(program(index, 0)) for index in range(count)]
        recorder, stats = self._recorder, self._backend.stats
        results: list[torch.Tensor | None] = [None] * count
        waiting = iter(range(count))
        free = list(range(self.lanes))
        active: deque[_Active] = deque()
        while True:
            while free and (index := next(waiting, None)) is not None:
                lane = free.pop()
                self._advance(active, free, results, index, lane, program(index, lane), None)
            if not active:
                return results
            index, lane, running, name, ops, future = active.popleft()
            reply = recorder.call(name, ops, stats, future.result)
            self._advance(active, free, results, index, lane, running, reply)
            del reply

    def _advance(
        self,
        active: deque[_Active],
        free: list[int],
        results: list[torch.Tensor | None],
        index: int,
        lane: int,
        program: Program,
        reply: Any,
    ) -> None:
        """Takes a program to its next request, which is sent, or to its end."""
        try:
            name, ops, op, tensors, attrs, expect = program.send(reply)
        except StopIteration as end:
            results[index] = end.value
            free.append(lane)
            return
        backend = self._backend
        attrs = {**self._how, **attrs}
        future = self._recorder.sending(backend.stats, backend.submit, op, *tensors, expect=expect, **attrs)
        active.append((index, lane, program, name, ops, future))

    def _run_alone(self, program: Program) -> torch.Tensor | None:
        recorder, backend = self._recorder, self._backend
        reply = None
        try:
            while True:
                name, ops, op, tensors, attrs, expect = program.send(reply)
                del reply
                reply = recorder.call(
                    name, ops, backend.stats, backend.call, op, *tensors, expect=expect, **self._how, **attrs
                )
                del tensors
        except StopIteration as end:
            logits: torch.Tensor | None = end.value
            return logits

    # ---- stretches ----

    def _stretch_rows(self, batch: int, start: int, rows: int) -> list[int]:
        """How many rows each stretch has: one stretch for each lane, about equal in what travels for them, in whole
        blocks; more of them where the scores' memory asks for it.

        All are under way at once then, and the longest way through a layer is the shortest that it can be.
        """
        most = self._scores_nbytes // (batch * self.config.num_attention_heads * self._wire_itemsize)
        grain = min(choose_block_rows(1, self._block_rows), choose_block_rows(1))
        least = max(grain, -(-MIN_STRETCH_ROWS // grain) * grain)
        left = self.lanes
        counts = []
        while rows:
            count = rows
            if left > 1:
                share = self._rows_of_weight(start, self._weight(start, rows) / left)
                spare = rows - (left - 1) * MIN_STRETCH_ROWS  # so that something is left for the others
                count = max(least, min(round(share / grain), spare // grain) * grain)
                if rows - count < MIN_STRETCH_ROWS:
                    count = rows
            # count * (start + count) scores at most
            fitting = max(int((start * start / 4 + most) ** 0.5 - start / 2), 1)
            if count > fitting:
                count = fitting - fitting % grain if fitting > grain else fitting
            counts.append(count)
            start += count
            rows -= count
            left = max(left - 1, 1)
        return counts

    def _weight(self, start: int, rows: int) -> float:
        """What travels in a layer, in elements of a sequence, both ways: rows of operands, and scores."""
        config = self.config
        width = 2 * config.hidden_size + 3 * config.intermediate_size
        if self.plan != "linear":
            width += 2 * (config.out_features("q") + config.out_features("k"))
        return rows * (width + 2 * config.num_attention_heads * (start + rows / 2))

    def _rows_of_weight(self, start: int, weight: float) -> float:
        """How many rows from `start` on have that weight: `_weight`, solved."""
        slope = self.config.num_attention_heads
        offset = self._weight(start, 1) - slope
        return float(((offset * offset + 4 * slope * weight) ** 0.5 - offset) / (2 * slope))

    def _attention(
        self,
        start: int,
        rows: int,
        mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        length: int,
        keep: torch.Tensor | None,
    ) -> list[Attention]:
        """For each layer what its attention needs; layers of one kind share it."""
        config = self.config
        by_kind: dict[tuple[Rope, int], Attention] = {}
        layers = []
        for layer in range(config.num_hidden_layers):
            kind = (config.rope_of(layer), config.window(layer))
            attention = by_kind.get(kind)
            if attention is None:
                attention = by_kind[kind] = self._attention_of(*kind, start, rows, mask, positions, length, keep)
            layers.append(attention)
        return layers

    def _attention_of(
        self,
        rope: Rope,
        window: int,
        start: int,
        rows: int,
        mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        length: int,
        keep: torch.Tensor | None,
    ) -> Attention:
        cos, sin = self._rotary(rope, length)
        if positions is None:
            cos, sin = (table[start : start + rows].view(1, rows, 1, -1) for table in (cos, sin))
        else:
            cos, sin = (table[positions].unsqueeze(2) for table in (cos, sin))
        total = start + rows
        blocks = row_blocks(rows, total, choose_block_rows(rows, self._block_rows), window)
        rows_at = [int64_range(start + block.start, start + block.start + block.rows) for block in blocks]
        hidden = [self._hidden(block, window, mask, at[None], start) for block, at in zip(blocks, rows_at)]
        last = None
        if keep is not None:
            first = max(start + int(keep.min()) + 1 - window, 0) if window else 0
            block = Block(0, 1, first, total)
            only = (keep + start)[:, None]
            hidden_last = [self._hidden(block, window, mask, only, None)]
            last = Attention(cos, sin, [block], block_attrs([block]), hidden_last, None, None)
        turn = None
        if rows == 1 and len(cos) == 1 and mask is None:
            turn = rotary_matrix(cos.flatten(), sin.flatten(), self.config.head_dim)
        return Attention(cos, sin, blocks, block_attrs(blocks), hidden, turn, last)

    def _hidden(
        self, block: Block, window: int, mask: torch.Tensor | None, rows_at: torch.Tensor, start: int | None
    ) -> list[tuple[slice, torch.Tensor]]:
        """What a block's rows do not see. `rows_at` [B or 1, rows]: the slots of its rows. `start`: of the stretch,
        whose rows the block's are one after another; None if they may be any."""
        _, rows, first, last = block
        if mask is None and start is not None:
            # Only the corners: the rest is seen by all rows.
            hidden = []
            if rows > 1:
                hidden.append((slice(last - rows - first, None), _corner(rows)))
                oldest = start + block.start + 1 - window  # what the block's first row sees, if there are so many
                if window and oldest + rows > 1:
                    hidden_count = min(rows - 1, last - first)
                    columns = int64_range(first, first + hidden_count)
                    behind = columns[None] < int64_range(oldest, oldest + rows)[:, None]
                    hidden.append((slice(0, hidden_count), behind))
            return hidden
        columns = int64_range(first, last)
        at = rows_at.unsqueeze(-1)  # [B or 1, rows, 1]
        seen = columns <= at
        if window:
            seen &= columns > at - window
        if mask is not None:
            seen = seen & mask[:, None, first:last]
            seen |= (columns == at) & ~seen.any(-1, keepdim=True)  # padding sees itself: something that is finite
        if bool(seen.all()):
            return []
        return [(slice(None), ~seen.unsqueeze(1))]

    def _rotary(self, rope: Rope, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [at least `length`, half], kept."""
        have = self._tables.get(rope)
        if have is not None and (have[0] == length if rope.depends_on_length else have[0] >= length):
            return have[1:]
        size = length if rope.depends_on_length else max(_MIN_TABLE, 2 * length)
        cos, sin = (table.to(self._dtype) for table in cos_sin(rope, self.config.head_dim, size))
        self._tables[rope] = (size, cos, sin)
        return cos, sin

    # ---- arguments and results ----

    def _check(
        self, ids: torch.Tensor, cache: Cache, mask: torch.Tensor | None, positions: torch.Tensor | None
    ) -> tuple[int, int]:
        if ids.dtype != torch.int64 or ids.dim() != 2 or ids.shape[0] != cache.batch or not ids.numel():
            raise SettingError(f"ids: {ids.dtype} {list(ids.shape)}, expected int64 [{cache.batch}, 1 or more]")
        if cache.closed:
            raise SettingError("cache: it was closed")
        batch, rows = ids.shape
        shape = (batch, cache.length + rows)
        if mask is not None and (mask.dtype != torch.bool or mask.shape != shape):
            raise SettingError(f"mask: {mask.dtype} {list(mask.shape)}, expected bool {list(shape)}")
        if positions is not None and (
            positions.dtype != torch.int64 or positions.shape != ids.shape or int(positions.min()) < 0
        ):
            raise SettingError(
                f"positions: {positions.dtype} {list(positions.shape)}, expected int64 {list(ids.shape)}"
            )
        return batch, rows

    def _warn_of_length(self, length: int) -> None:
        """Warns once per runner of positions beyond max_position_embeddings."""
        most = self.config.max_position_embeddings
        if length > most and not self._warned_of_length:
            self._warned_of_length = True
            warnings.warn(
                f"{length} positions, the model was made for {most} (max_position_embeddings): what it computes for "
                "later ones may mean nothing",
                stacklevel=3,  # the caller of forward
            )

    @staticmethod
    def _whole_mask(cache: Cache, mask: torch.Tensor | None, rows: int) -> torch.Tensor | None:
        """[B, all slots], None if all of them hold a token."""
        if mask is None:
            if cache.mask is None:
                return None
            return torch.cat([cache.mask, cache.mask.new_ones(cache.batch, rows)], dim=1)
        return None if bool(mask.all()) else mask

    @staticmethod
    def _wanted_rows(keep: str | torch.Tensor, batch: int, rows: int) -> torch.Tensor | None:
        """[B]: the one row of each sequence whose logits are wanted; None if it is all of them."""
        if isinstance(keep, str):
            if keep not in ("last", "all"):
                raise SettingError(f"keep: {keep!r}, expected 'last', 'all' or an int64 tensor")
            return None if keep == "all" else torch.full((batch,), rows - 1, dtype=torch.int64, device="cpu")
        if keep.dtype != torch.int64 or keep.shape != (batch,) or not 0 <= int(keep.min()) <= int(keep.max()) < rows:
            raise SettingError(f"keep: {keep.dtype} {list(keep.shape)}, expected int64 [{batch}], each below {rows}")
        return keep

    @staticmethod
    def _kept(wanted: torch.Tensor | None, offset: int, end: int) -> tuple[torch.Tensor | None, bool]:
        """Which row of each sequence to keep in a stretch, None for all; and whether any is wanted of it."""
        if wanted is None:
            return None, True
        inside = (wanted >= offset) & (wanted < end)
        if not bool(inside.any()):
            return None, False
        if end - offset == 1:
            return None, True
        return (wanted - offset).clamp(0, end - offset - 1), True

    @staticmethod
    def _joined(offsets: list[int], results: list[torch.Tensor | None], wanted: torch.Tensor | None) -> torch.Tensor:
        """The logits of all stretches that have some. `offsets`: of the stretches' first rows, and the end."""
        found = [(index, result) for index, result in enumerate(results) if result is not None]
        if len(found) == 1:
            return found[0][1]
        if wanted is None:
            return torch.cat([result for _, result in found], dim=1)
        joined = found[0][1]
        for index, result in found:  # each sequence's from the stretch that its row was in
            inside = (wanted >= offsets[index]) & (wanted < offsets[index + 1])
            joined = torch.where(inside[:, None, None], result, joined)
        return joined


@functools.lru_cache(16)
def _corner(rows: int) -> torch.Tensor:
    """What a block's last columns hide from its rows: [rows, rows] bool, not to be changed."""
    return torch.ones(rows, rows, dtype=torch.bool, device="cpu").triu_(1)


@contextlib.contextmanager
def _serial() -> Iterator[None]:
    """torch with one thread. Where that is so already, this does nothing."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _without_autocast() -> contextlib.AbstractContextManager[object]:
    """The caller's autocast would compute products in a dtype of its own."""
    return torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else contextlib.nullcontext()


def _left_padded(prompts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """ids [B, longest], and which of them are tokens; None if all are."""
    if not prompts or any(prompt.dim() != 1 or not len(prompt) for prompt in prompts):
        raise SettingError(
            f"prompts: {[list(prompt.shape) for prompt in prompts]}, expected one or more of [1 or more]"
        )
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64, device="cpu")
    mask = torch.zeros(len(prompts), longest, dtype=torch.bool, device="cpu")
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = True
    return ids, None if bool(mask.all()) else mask

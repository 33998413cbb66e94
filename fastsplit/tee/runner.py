"""The TEE side: runs a model's forward passes and generates tokens. Linear algebra goes to a backend.

What happens between two calls is the interpreter's business (program.py). A Runner cuts a pass into chunks of rows
(chunks.py), says what each row sees (masks.py), and runs a program for each chunk: one after another, or several in
turn, so that the executor computes for one, and another's bytes travel, while this side works for a third.

Rules. A cache is the same whatever plan filled it, among those whose keys and values are on the same side. All time is
recorded (report.py).
"""

from __future__ import annotations

import contextlib
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

from ..errors import SettingError
from ..extras import torch
from ..split.contract import MAX_LANES
from ..split.functional import int64
from ..split.kv_cache import Budget, KVStore
from ..split.plan import PLANS, Plan, choose_plan
from .chunks import Cutter
from .guard import Guard
from .masks import GeometryMaker
from .program import Chunk, Interpreter, Program, Progress
from .remote import Backend, Cache, RemoteModel
from .report import Recorder
from .sampling import Sampling, check_finite, sample
from .tuning import Tuning

__all__ = ["MAX_CACHE_NBYTES", "Runner"]

_SCORES_NBYTES = 256 * 2**20
"""Memory that the scores of one chunk may take, in the link's dtype."""

MAX_CACHE_NBYTES = 8 * 2**30
"""Default limit of keys and values in the TEE, in bytes."""

_FEW_ROWS = 8
"""A pass of at most this many rows is computed by one thread: waking a second one costs more than it saves, and that
one would spin on a core that the executor needs."""

_Active = tuple[int, int, Program, str, int, Any]
"""A program whose request is on its way: its index, its lane, itself, what the request counts as, its future."""


class Runner:
    """One model, one backend, one plan. Not thread-safe. Run it under `torch.inference_mode()` or `torch.no_grad()`.

    `plan`: a name in `split.plan.PLANS`, or "auto"; `self.plan` is the one that runs, `self.plan_reason` says why if it
    is another. A `Plan` of your own runs as it is: the backend must have its steps. `tee_dtype`, `wire_dtype`: what is
    computed in here, and what the executor sends and gets; the executor's if None. `lanes`: chunks under way at once;
    None: 2 if the executor has a device of its own, else 1. `block_rows`: rows in a block of scores; None: the
    default. `cast`: "bfloat16" or "float16", what float32 tensors travel as on the link alone; None: as they are.
    `scores_nbytes`: what the scores of a chunk may take (chunks.py). `max_cache_nbytes`: what keys and values in the
    TEE may take, of all caches of this runner. `guard`: stands around every call (guard.py).

    `choice`: the settings of `tune`, in place of `plan`, `lanes`, `block_rows` and `cast`; `self.tuning` afterwards,
    and `self.choice`, its older name.
    """

    def __init__(
        self,
        model: RemoteModel,
        backend: Backend,
        plan: str | Plan = "auto",
        recorder: Recorder | None = None,
        *,
        tee_dtype: str | None = None,
        wire_dtype: str | None = None,
        lanes: int | None = None,
        block_rows: int | None = None,
        cast: str | None = None,
        choice: Tuning | None = None,
        scores_nbytes: int = _SCORES_NBYTES,
        max_cache_nbytes: int = MAX_CACHE_NBYTES,
        guard: Guard | None = None,
    ) -> None:
        if choice is not None:
            plan, lanes, block_rows, cast = choice.plan, choice.lanes, choice.block_rows, choice.cast
        wire_dtype = wire_dtype or model.dtype
        dtypes = (model.dtype, wire_dtype)
        if isinstance(plan, Plan):
            self.plan, self.plan_reason, self._plan = plan.name, "", plan
        else:
            self.plan, self.plan_reason = choose_plan(plan, model.config, dtypes)
            self._plan = PLANS[self.plan].form(model.config, dtypes, has_embedding=model.trusted is not None)
        if self._plan.embeds_in_tee and model.trusted is None:
            raise SettingError(f"plan {self.plan!r}: it looks ids up in the TEE, which takes the trusted copy")
        self.tuning = self.choice = choice
        self.config = model.config
        self.cast = cast
        self.wire_dtype = wire_dtype
        self.tee_dtype = tee_dtype or wire_dtype
        if lanes is not None and not 1 <= lanes <= MAX_LANES:
            raise SettingError(f"lanes: {lanes}, expected 1 to {MAX_LANES}")
        self.lanes = lanes if lanes is not None else 1 if model.threads else 2
        self._dtype: torch.dtype = getattr(torch, self.tee_dtype)
        self._backend = backend
        self._how: dict[str, Any] = {} if cast is None else {"wire_dtype": cast}
        self._recorder = recorder or Recorder()
        self._interpreter = Interpreter(
            self._plan,
            model.config,
            model.weights,
            backend,
            self._recorder,
            self._dtype,
            wire_dtype,
            embedding_table=model.embedding() if self._plan.embeds_in_tee else None,
            guard=guard,
        )
        # Blocks of scores that do not travel need not be small for the link.
        self._geometry = GeometryMaker(model.config, self._dtype, None if self._plan.cache_in_tee else block_rows)
        self._cutter = Cutter(
            model.config, self._plan, getattr(torch, wire_dtype).itemsize, self.lanes, block_rows, scores_nbytes
        )
        self._budget = Budget(max_cache_nbytes)
        self._warned_of_length = False

    @property
    def recorder(self) -> Recorder:
        """Where the time goes; another may be set between passes."""
        return self._recorder

    @recorder.setter
    def recorder(self, recorder: Recorder) -> None:
        self._recorder = self._interpreter.recorder = recorder

    @property
    def guard(self) -> Guard | None:
        """What stands around every call; another may be set between passes."""
        return self._interpreter.guard

    @guard.setter
    def guard(self, guard: Guard | None) -> None:
        self._interpreter.guard = guard

    def new_cache(self, batch: int = 1, capacity: int = 0) -> Cache:
        """Keys and values of `batch` sequences, with room for `capacity` positions; it grows if there are more.

        They are where the plan computes attention. Raises RemoteOpError over the executor's limits; where they are in
        the TEE, `forward` raises LimitError over `max_cache_nbytes`.
        """
        store = None
        if self._plan.cache_in_tee:
            store = KVStore(self.config, self._dtype, batch, capacity, self._budget)
            capacity = 0
        return Cache(self._backend, batch, capacity, self.wire_dtype, store)

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
        padding mean nothing. Long prompts go in chunks, so that memory stays flat. Positions beyond the model's
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
        counts = self._cutter.cut(batch, start, rows)
        offsets = list(accumulate(counts, initial=0))
        started: list[Progress] = []

        def program(index: int, lane: int) -> Program:
            """Made when its turn comes: masks take memory."""
            offset, end = offsets[index], offsets[index + 1]
            selected, wants_logits = self._selected(wanted, offset, end)
            geometry = self._geometry.layers(
                start + offset,
                end - offset,
                None if whole is None else whole[:, : start + end],
                None if positions is None else positions[:, offset:end],
                length,
                selected,
            )
            progress = Progress(start + offset, end - offset)
            chunk = Chunk(
                ids[:, offset:end],
                cache.number,
                cache.store,
                lane,
                start + offset,
                geometry,
                selected,
                progress,
                tuple(started),
                wants_logits,
            )
            started.append(progress)
            return self._interpreter.program(chunk)

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
        """Runs `count` programs in lanes and returns their results. `program(index, lane)` makes each when it starts.
        Programs start and continue in order: none overtakes an earlier one."""
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
            index, lane, running, kind, products, future = active.popleft()
            reply = recorder.call(kind, products, stats, future.result)
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
        """Runs a program up to its next request, which is sent, or to its end."""
        try:
            kind, products, tensors, attrs, expect = program.send(reply)
        except StopIteration as end:
            results[index] = end.value
            free.append(lane)
            return
        backend = self._backend
        future = self._recorder.sending(
            backend.stats, backend.submit, "run", *tensors, expect=expect, **self._how, **attrs
        )
        active.append((index, lane, program, kind, products, future))

    def _run_alone(self, program: Program) -> torch.Tensor | None:
        recorder, backend = self._recorder, self._backend
        reply = None
        try:
            while True:
                kind, products, tensors, attrs, expect = program.send(reply)
                del reply
                reply = recorder.call(
                    kind, products, backend.stats, backend.call, "run", *tensors, expect=expect, **self._how, **attrs
                )
                del tensors
        except StopIteration as end:
            logits: torch.Tensor | None = end.value
            return logits

    # ---- arguments and results ----

    def _check(
        self, ids: torch.Tensor, cache: Cache, mask: torch.Tensor | None, positions: torch.Tensor | None
    ) -> tuple[int, int]:
        if ids.dtype != torch.int64 or ids.dim() != 2 or ids.shape[0] != cache.batch or not ids.numel():
            raise SettingError(f"ids: {ids.dtype} {list(ids.shape)}, expected int64 [{cache.batch}, 1 or more]")
        if cache.closed:
            raise SettingError("cache: it was closed")
        if (cache.store is not None) != self._plan.cache_in_tee:
            where = "in the TEE" if self._plan.cache_in_tee else "on the executor"
            raise SettingError(f"cache: made for another plan, expected one whose keys and values are {where}")
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
        limit = self.config.max_position_embeddings
        if length > limit and not self._warned_of_length:
            self._warned_of_length = True
            warnings.warn(
                f"{length} positions, the model was made for {limit} (max_position_embeddings): what it computes for "
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
    def _selected(wanted: torch.Tensor | None, offset: int, end: int) -> tuple[torch.Tensor | None, bool]:
        """Which row of each sequence goes on in a chunk, None for all; and whether logits are wanted of it."""
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
        """The logits of all chunks that have some. `offsets`: of the chunks' first rows, and the end."""
        found = [(index, result) for index, result in enumerate(results) if result is not None]
        if len(found) == 1:
            return found[0][1]
        if wanted is None:
            return torch.cat([result for _, result in found], dim=1)
        joined = found[0][1]
        for index, result in found:  # each sequence's from the chunk that its row was in
            inside = (wanted >= offsets[index]) & (wanted < offsets[index + 1])
            joined = torch.where(inside[:, None, None], result, joined)
        return joined


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

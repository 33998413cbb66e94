"""The GPU side: holds the weights and the KV caches, and computes what the TEE asks for (ops.py says what that is).

Rules. Any number of clients may take turns; what is kept between calls belongs to a session of one client
(sessions.py). Arguments are checked against the configuration before they are used; what is wrong with them is the
caller's error, by name. What is checked is private to us (descriptions), or copied first (ids, indices): tensors may
lie in memory that the caller can write to. Where inputs are read and results are computed is the device's business
(devices.py); a handler returns when its results are complete, so that the time it took is the time the work took.

Tensors travel in the session's dtype and are computed with in the executor's own. Where the two are one, nothing is
cast, and a result is computed into the reply's memory.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import accumulate
from typing import Any, NamedTuple

from ..errors import LimitError, ModelError, SettingError, TensorError
from ..extras import torch
from ..models import DTYPES, LINEARS, Model
from ..schema.limits import Limits
from ..split.functional import rotary_
from ..split.ops import Block, packed_elements, parse_blocks
from ..wire.call import Call, Handler
from ..wire.shm.segment import Hook
from .attention import scores, weighted_values
from .device import Cpu, Device, Work
from .kv_cache import KVCache, KVCaches, Lane
from .weights import Linear, Weights

__all__ = ["Executor"]

_WIRE_DTYPES = {getattr(torch, name): name for name in DTYPES}
_MAX_SEQUENCES = 2**16
_SMALL_ELEMENTS = 2**14
"""Up to so many, a reply's tensors share a block: to make one takes 20 us while weights go through the caches."""

_Compute = Callable[[torch.Tensor], object]


class _At(NamedTuple):
    """Where in a session a call is."""

    lane: Lane
    layer: int
    start: int


class Executor:
    """One model's weights on one device. `handlers` and `on_segment` are what a `Server` takes."""

    def __init__(
        self,
        model: Model,
        *,
        device: Device | None = None,
        dtype: str = "float32",
        progress: Callable[[Any, int], Any] | None = None,
        max_reply_nbytes: int = Limits().max_message_nbytes,
        max_sessions: int = 64,
        max_cache_nbytes: int = 8 * 2**30,
    ) -> None:
        """Loads all weights. `device`: the CPU if None. `progress(items, total)` wraps the iteration over the weights.

        What would make a reply of more than `max_reply_nbytes` is refused before it is computed. `max_sessions`: KV
        caches of one client; `max_cache_nbytes`: of all clients together. Raises ModelError.
        """
        if dtype not in DTYPES:
            raise ModelError(f"dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
        self.name = model.name
        self.config = model.config
        self.device: Device = Cpu() if device is None else device
        self.dtype = dtype
        self._torch_dtype: torch.dtype = getattr(torch, dtype)
        self._max_reply_nbytes = max_reply_nbytes
        # In a thread that ends: GNU's OpenMP keeps a pool of workers for each thread that ever used it, and as soon as
        # there are more of them than cores, none spins between two operations any more. SmolLM2, a token: 49 ms of
        # handlers instead of 34.
        stopped = threading.Event()
        with ThreadPoolExecutor(1, "fastsplit-load") as loading:
            try:
                loaded = loading.submit(self._load, model, progress, stopped)
                while not loaded.done():  # a signal that another thread was given is noticed between two waits
                    wait([loaded], timeout=0.1)
                self._weights, self._tee_weights = loaded.result()
            except BaseException:  # an interrupt comes here, and should not wait for the rest
                stopped.set()
                raise
        self._qkv_width = sum(self.config.out_features(name) for name in ("q", "k", "v"))
        # rounded as HF rounds it
        multiplier = torch.tensor(self.config.embedding_multiplier, dtype=self._torch_dtype, device="cpu")
        self._embedding_multiplier = float(multiplier)
        self.sessions = KVCaches(self.config, self._torch_dtype, max_sessions, max_cache_nbytes)
        self.handlers: dict[str, Handler] = {
            "describe": self._describe,
            "tee_weights": self._send_tee_weights,
            "open": self._open,
            "truncate": self._truncate,
            "reorder": self._reorder,
            "close": self._close,
            "linear": self._linear,
            "lm_head": self._lm_head,
            **{
                name: self._in_session(handler)
                for name, handler in (
                    ("embedding", self._embedding),
                    ("qkv", self._qkv),
                    ("scores", self._scores),
                    ("values", self._values),
                    ("values_o", self._values_o),
                    ("embedding_qkv", self._embedding_qkv),
                    ("embedding_scores", self._embedding_scores),
                    ("values_gate_up", self._values_gate_up),
                    ("down_qkv", self._down_qkv),
                    ("down_scores", self._down_scores),
                    ("down_lm_head", self._down_lm_head),
                )
            },
        }

    def _load(
        self, model: Model, progress: Callable[[Any, int], Any] | None, stopped: threading.Event
    ) -> tuple[Weights, list[torch.Tensor]]:
        def until_stopped(items: Iterable[Any], total: int) -> Iterator[Any]:
            for item in items if progress is None else progress(items, total):
                if stopped.is_set():
                    raise ModelError(f"{model.name}: loading was interrupted")
                yield item

        weights = Weights(model, self.device.torch_device, self._torch_dtype, until_stopped)
        return weights, list(model.tee_weights().values())

    @property
    def on_segment(self) -> Hook | None:
        """What must be told of shared memory that is mapped, None if nothing."""
        return self.device.on_segment

    # ---- set-up ----

    def _describe(self, call: Call) -> None:
        call.reply_attrs["config"] = self.config.to_json()
        call.reply_attrs["dtype"] = self.dtype
        call.reply_attrs["name"] = self.name
        # of this machine's cores; it may be the caller's, too
        call.reply_attrs["threads"] = 0 if self.device.asynchronous else torch.get_num_threads()

    def _send_tee_weights(self, call: Call) -> list[torch.Tensor]:
        return self._tee_weights

    def _open(self, call: Call) -> None:
        batch = _int(call, "batch", 1, _MAX_SEQUENCES)
        capacity = _int(call, "capacity", 0, 2**31)
        dtype = call.attrs.get("dtype")
        if dtype not in DTYPES:
            raise SettingError(f"dtype: {dtype!r:.30}, expected one of {', '.join(DTYPES)}")
        number = self.sessions.open(call.client, batch, capacity, getattr(torch, dtype))
        call.reply_attrs["session"] = number

    def _truncate(self, call: Call) -> None:
        length = _int(call, "length", 0, 2**31)
        session = self.sessions.find(call.client, call.attrs.get("session"))
        with session.lock:
            session.truncate(length)

    def _reorder(self, call: Call) -> None:
        (indices,) = _take(call, 1)
        session = self.sessions.find(call.client, call.attrs.get("session"))
        with session.lock, self.device.work(session) as work:
            indices = _indices("indices", indices, session.batch)
            if not 1 <= len(indices) <= _MAX_SEQUENCES:
                raise TensorError(f"indices: {len(indices)} of them, expected 1 to {_MAX_SEQUENCES}")
            session.reorder(work, work.take(indices))

    def _close(self, call: Call) -> None:
        self.sessions.close(call.client, _int(call, "session", 0, 2**62))

    def _in_session(self, handler: Callable[[Call, Work, KVCache, _At], Any]) -> Handler:
        layers = self.config.num_hidden_layers

        def handle(call: Call) -> Any:
            attrs = call.attrs
            layer, start = attrs.get("layer"), attrs.get("start")
            if type(layer) is not int or not 0 <= layer < layers:
                raise SettingError(f"layer: {layer!r:.30}, expected 0 to {layers - 1}")
            if type(start) is not int or not 0 <= start < 2**31:
                raise SettingError(f"start: {start!r:.30}, expected an int of 0 or more")
            session = self.sessions.find(call.client, attrs.get("session"))
            # inference mode is a thread's own: each operation on a tensor is the faster for it
            with torch.inference_mode(), session.lock, self.device.work(session) as work:
                session.check_open()
                lane = session.lane(attrs.get("lane"))
                try:
                    return handler(call, work, session, _At(lane, layer, start))
                except BaseException:
                    lane.clear()  # what it has of a pass that went wrong is of no use, and not counted anywhere
                    raise

        return handle

    # ---- a layer's operations, one by one ----

    def _embedding(self, call: Call, work: Work, session: KVCache, at: _At) -> torch.Tensor:
        (ids,) = _take(call, 1)
        return self._embed(call, work, session, ids)[0]

    def _linear(self, call: Call) -> list[torch.Tensor]:
        (x,) = _take(call, 1)
        layer, names = _int(call, "layer", 0, self.config.num_hidden_layers - 1), call.attrs.get("names")
        if not isinstance(names, list) or not names or any(name not in LINEARS for name in names):
            raise SettingError(f"names: {names!r:.100}, expected a list of {', '.join(LINEARS)}")
        if len(set(names)) < len(names):
            raise SettingError(f"names: {names!r}, expected each once")
        width = self.config.in_features(names[0])
        if any(self.config.in_features(name) != width for name in names):
            raise SettingError(f"names: {names!r}, expected linear operations of the same input")
        wire = self._check("x", x, (None, None, width))
        batch, rows, _ = x.shape
        linears = self._weights.layers[layer].linears
        widths = [self.config.out_features(name) for name in names]
        self._check_reply(batch * rows * sum(widths), wire)
        with self.device.work(call.client) as work:
            x = self._inward(work, x).view(batch * rows, width)
            together = linears.get(tuple(names))
            if batch * rows == 1 and together is not None:
                reply, _ = self._give(call, work, (1, sum(widths)), wire, lambda out: together(x, out))
                return [part.view(1, 1, -1) for part in torch.split(reply, widths, dim=1)]
            return [
                self._apply(call, work, x, linears[name], (batch, rows, out_width), wire)[0]
                for name, out_width in zip(names, widths)
            ]

    def _lm_head(self, call: Call) -> torch.Tensor:
        (x,) = _take(call, 1)
        wire = self._check("x", x, (None, None, self.config.hidden_size))
        self._check_reply(x.shape[0] * x.shape[1] * self.config.vocab_size, wire)
        with self.device.work(call.client) as work:
            shape = (*x.shape[:2], self.config.vocab_size)
            return self._apply(call, work, _rows(self._inward(work, x)), self._weights.lm_head, shape, wire)[0]

    def _qkv(self, call: Call, work: Work, session: KVCache, at: _At) -> torch.Tensor:
        (x,) = _take(call, 1)
        self._check_own("x", x, (session.batch, None, self.config.hidden_size), session)
        return self._project(call, work, session, at, self._inward(work, x), biased=True)

    def _scores(self, call: Call, work: Work, session: KVCache, at: _At) -> torch.Tensor | None:
        config = self.config
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        layer, start = at.layer, at.start
        lane = at.lane
        tensors = list(call.tensors)
        keep = tensors.pop() if tensors and tensors[-1].dim() == 1 else None
        scales = tensors.pop() if tensors and tensors[-1].dim() == 2 else None
        if len(tensors) == 1 and tensors[0].dim() == 4 and tensors[0].shape[2] == heads + kv_heads:
            self._check_own("qk", tensors[0], (session.batch, None, heads + kv_heads, head_dim), session)
            qk = self._inward(work, tensors[0])
            queries, keys = qk[:, :, :heads], qk[:, :, heads:]
        elif 1 <= len(tensors) <= 2:
            self._check_own("k", tensors[-1], (session.batch, None, kv_heads, head_dim), session)
            keys = self._inward(work, tensors[-1])
            if len(tensors) == 2:
                self._check_own("q", tensors[0], (session.batch, None, heads, head_dim), session)
                queries = self._inward(work, tensors[0])
            else:
                queries = keys[:, :0]
        else:
            raise SettingError(f"{len(tensors)} tensors, expected qk, or q and k, or k")
        rows = keys.shape[1]
        if rows < 1:
            raise SettingError("k: no rows, expected 1 or more")
        blocks = parse_blocks(call.attrs, queries.shape[1], start + rows)
        if keep is not None:
            if lane.x is None or lane.x.shape[1] != rows:
                raise SettingError(f"keep: {rows} rows, expected those of the residual stream in this lane")
            keep = _indices("keep", keep, rows, session.batch)
        self._check_reply(packed_elements(session.batch, heads, blocks), session.link_dtype)
        scale = self._scale(call, scales, session.batch, rows)
        session.store_keys(work, layer, start, keys)
        # taken late: keys are stored while it is on its way
        self._scale_values(
            work, session, layer, start, rows, work.take(scale) if isinstance(scale, torch.Tensor) else scale
        )
        lane.rows = rows
        if keep is not None:
            self._keep(work, lane, keep)
        if not blocks:
            lane.blocks = None
            return None
        return self._products(call, work, session, layer, lane, queries, blocks)

    def _values(self, call: Call, work: Work, session: KVCache, at: _At) -> torch.Tensor | None:
        if not 1 <= len(call.tensors) <= 2:
            raise SettingError(f"{len(call.tensors)} tensors, expected packed and v, or v")
        config = self.config
        lane = at.lane
        v = call.tensors[-1]
        self._check_own("v", v, (session.batch, lane.rows, config.num_key_value_heads, config.head_dim), session)
        session.store_values(work, at.layer, at.start, self._inward(work, v))
        if len(call.tensors) == 1:
            return None
        blocks = self._blocks(lane)
        packed = self._check_packed(work, call.tensors[0], session, blocks)
        count = blocks[-1].start + blocks[-1].rows
        width = config.num_attention_heads * config.head_dim
        self._check_reply(session.batch * count * width, session.link_dtype)
        shape = (session.batch, count, width)
        attend = self._attending(session, at.layer, blocks, packed)
        return self._give(call, work, shape, session.link_dtype, attend)[0]

    def _values_o(self, call: Call, work: Work, session: KVCache, at: _At) -> torch.Tensor:
        (packed,) = _take(call, 1)
        lane = at.lane
        blocks = self._blocks(lane)
        attended = self._attended(work, session, at.layer, blocks, self._check_packed(work, packed, session, blocks))
        shape = (session.batch, attended.shape[1], self.config.hidden_size)
        self._check_reply(math.prod(shape), session.link_dtype)
        linear = self._weights.layers[at.layer].linears["o"]
        return self._apply(call, work, _rows(attended), linear, shape, session.link_dtype)[0]

    # ---- with the residual stream kept, norms folded into what follows them ----

    def _embedding_qkv(self, call: Call, work: Work, session: KVCache, at: _At) -> tuple[torch.Tensor, ...]:
        (ids,) = _take(call, 1)
        lane = at.lane
        reply, lane.x = self._embed(call, work, session, ids)
        lane.blocks = None
        return reply, self._project_folded(call, work, session, at, lane)

    def _embedding_scores(self, call: Call, work: Work, session: KVCache, at: _At) -> tuple[torch.Tensor, ...]:
        if not 3 <= len(call.tensors) <= 4:
            raise SettingError(f"{len(call.tensors)} tensors, expected ids, cos, sin, and maybe keep")
        ids, cos, sin = call.tensors[:3]
        lane = at.lane
        reply, lane.x = self._embed(call, work, session, ids)
        half = self._check_rotary(cos, sin, ids.shape[1], session.batch)
        shape = (-1, ids.shape[1], 1, half)
        lane.cos, lane.sin = self._inward(work, cos).view(shape), self._inward(work, sin).view(shape)
        return (reply, *self._scores_folded(call, work, session, at, lane, call.tensors[3:]))

    def _values_gate_up(self, call: Call, work: Work, session: KVCache, at: _At) -> tuple[torch.Tensor, ...]:
        tensors = list(call.tensors)
        scales = tensors.pop() if tensors and tensors[-1].dim() == 2 else None
        if len(tensors) > 1:
            raise SettingError(f"{len(call.tensors)} tensors, expected packed, and maybe scales")
        config = self.config
        layer, start = at.layer, at.start
        lane = at.lane
        scale = self._scale(call, scales, session.batch, lane.rows)
        if not tensors and scale is None:
            raise SettingError("no tensors, expected packed, or scales, or both")
        blocks = self._blocks(lane) if tensors else []
        packed = self._check_packed(work, tensors[0], session, blocks) if tensors else None
        if scale is not None:  # of the rows that came last, which `scores` had to take as they were
            if start + lane.rows > session.keys_filled[layer]:
                raise SettingError(f"start: {start}, expected where this lane's rows were put")
            if isinstance(scale, torch.Tensor):
                scale = work.take(scale)
            self._multiply(work, session, session.keys(layer), start, lane.rows, scale)
            self._scale_values(work, session, layer, start, lane.rows, scale)
        if packed is None:  # the pass ends here for this lane
            lane.clear()
            return ()
        attended = self._attended(work, session, layer, blocks, packed)
        weights = self._weights.layers[layer]
        batch, rows, _ = attended.shape
        width = config.intermediate_size
        self._check_reply(2 * batch * rows * width, session.link_dtype)
        shapes = ((batch, rows, config.hidden_size), (2, batch, rows, width))
        reply, gate_up = self._replies(call, session.link_dtype, *shapes)
        self._continue(work, session, lane, attended, weights.linears["o"], reply)
        normed = self._normed(work, lane, weights.mlp_norm)
        gate, up, both = (weights.linears[name] for name in ("gate", "up", ("gate", "up")))

        def compute(out: torch.Tensor) -> None:
            # without their biases, which must not be scaled: they are the caller's to add
            if batch * rows == 1:
                torch.mm(normed, both.weight, out=out.view(1, 2 * width))
            else:
                torch.mm(normed, gate.weight, out=out[0].view(batch * rows, width))
                torch.mm(normed, up.weight, out=out[1].view(batch * rows, width))

        return reply, self._give(call, work, shapes[1], session.link_dtype, compute, gate_up)[0]

    def _down_qkv(self, call: Call, work: Work, session: KVCache, at: _At) -> tuple[torch.Tensor, ...]:
        (h,) = _take(call, 1)
        lane = at.lane
        more = [(1, self._qkv_width)] if session.batch == 1 and h.dim() == 3 and h.shape[1] == 1 else []
        reply, *qkv = self._down(call, work, session, at.layer - 1, lane, h, *more)
        return reply, self._project_folded(call, work, session, at, lane, *qkv)

    def _down_scores(self, call: Call, work: Work, session: KVCache, at: _At) -> tuple[torch.Tensor, ...]:
        if not 1 <= len(call.tensors) <= 2:
            raise SettingError(f"{len(call.tensors)} tensors, expected h, and maybe keep")
        lane = at.lane
        (reply,) = self._down(call, work, session, at.layer - 1, lane, call.tensors[0])
        return (reply, *self._scores_folded(call, work, session, at, lane, call.tensors[1:], may_end=True))

    def _down_lm_head(self, call: Call, work: Work, session: KVCache, at: _At) -> tuple[torch.Tensor, ...]:
        (h,) = _take(call, 1)
        lane = at.lane
        (reply,) = self._down(call, work, session, at.layer, lane, h)
        shape = (*reply.shape[:2], self.config.vocab_size)
        self._check_reply(math.prod(shape), session.link_dtype)
        normed = self._normed(work, lane, self._weights.final_norm)
        lane.clear()  # the pass is over
        return reply, self._apply(call, work, normed, self._weights.lm_head, shape, session.link_dtype)[0]

    # ---- parts ----

    def _embed(self, call: Call, work: Work, session: KVCache, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x in reply memory, and where the device has it."""
        config = self.config
        if ids.dtype != torch.int64 or ids.dim() != 2 or ids.shape[0] != session.batch:
            raise TensorError(f"ids: {ids.dtype} {list(ids.shape)}, expected int64 [{session.batch}, n]")
        ids = ids.clone()  # the caller may change shared memory between the check and the look-up, and what is looked
        # up by an id out of range is memory of ours
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < config.vocab_size:
            raise SettingError(f"ids: {int(ids.min())} to {int(ids.max())}, expected 0 to {config.vocab_size - 1}")
        self._check_reply(ids.numel() * config.hidden_size, session.link_dtype)
        flat = work.take(ids.view(-1))
        table, multiplier = self._weights.embedding, self._embedding_multiplier

        def compute(out: torch.Tensor) -> None:
            torch.index_select(table, 0, flat, out=out.view(-1, config.hidden_size))
            if multiplier != 1:
                out.mul_(multiplier)

        return self._give(call, work, (*ids.shape, config.hidden_size), session.link_dtype, compute)

    def _project(
        self,
        call: Call,
        work: Work,
        session: KVCache,
        at: _At,
        x: torch.Tensor,
        *,
        biased: bool,
        reply: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """q and k of x [B, n, hidden] in reply memory; v goes into the session. `reply`: memory for one row,
        [1, q, k and v]."""
        config = self.config
        batch, rows, _ = x.shape
        x = _rows(x)
        heads = config.num_attention_heads + config.num_key_value_heads
        shape = (batch, rows, heads, config.head_dim)
        width = config.out_features("v")
        linears = self._weights.layers[at.layer].linears
        self._check_reply(batch * rows * self._qkv_width, session.link_dtype)
        if batch * rows == 1:  # one product; what of it is v travels along, unseen
            together = _bare(linears[("q", "k", "v")], biased)
            found, own = self._give(
                call, work, (1, self._qkv_width), session.link_dtype, lambda out: together(x, out), reply
            )
            qk = found.narrow(1, 0, self._qkv_width - width).view(shape)
            values = own.narrow(1, self._qkv_width - width, width)
        else:
            qk, _ = self._apply(call, work, x, _bare(linears[("q", "k")], biased), shape, session.link_dtype)
            v = _bare(linears["v"], biased)
            values = work.empty((batch * rows, width), self._torch_dtype)
            work.run(lambda: v(x, values))
        session.store_values(work, at.layer, at.start, values.view(batch, rows, -1, config.head_dim))
        return qk

    def _project_folded(
        self, call: Call, work: Work, session: KVCache, at: _At, lane: Lane, reply: torch.Tensor | None = None
    ) -> torch.Tensor:
        normed = self._normed(work, lane, self._weights.layers[at.layer].attention_norm)
        assert lane.x is not None
        return self._project(call, work, session, at, normed.view(lane.x.shape), biased=False, reply=reply)

    def _scores_folded(
        self,
        call: Call,
        work: Work,
        session: KVCache,
        at: _At,
        lane: Lane,
        rest: Sequence[torch.Tensor],
        may_end: bool = False,
    ) -> tuple[torch.Tensor, ...]:
        """From the residual stream to scores: q, k and v stay here. What the norm leaves is for the caller to apply to
        the scores, and comes back with `values_gate_up` for what was stored. `may_end`: nothing more may be wanted."""
        config = self.config
        layer, start = at.layer, at.start
        cos, sin = lane.cos, lane.sin
        if lane.x is None or cos is None or sin is None or cos.shape[1] != lane.x.shape[1]:
            raise SettingError("lane: no rotary tables of this pass there, expected `embedding_scores` before")
        batch, rows, _ = lane.x.shape
        keep = None if not rest else _indices("keep", rest[0], rows, batch)
        count = rows if keep is None else 1
        ends = may_end and "blocks" not in call.attrs and "last" not in call.attrs
        blocks = [] if ends else parse_blocks(call.attrs, count, start + rows)
        linear = self._weights.layers[layer].linears[("q", "k", "v")]
        if linear.bias is not None or config.qk_norm:
            raise SettingError("this model's q and k cannot stay here: expected `down_qkv` and `scores`")
        normed = self._normed(work, lane, self._weights.layers[layer].attention_norm)
        qkv = work.empty((batch * rows, linear.weight.shape[1]), self._torch_dtype)
        parts = qkv.view(batch, rows, -1, config.head_dim)
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        turned = parts[:, :, : heads + kv_heads, : 2 * cos.shape[-1]]

        def compute() -> None:
            torch.mm(normed, linear.weight, out=qkv)
            rotary_(turned, cos, sin)

        work.run(compute)
        session.store_keys(work, layer, start, parts[:, :, heads : heads + kv_heads])
        session.store_values(work, layer, start, parts[:, :, heads + kv_heads :])
        lane.rows = rows
        queries = parts[:, :, :heads]
        if keep is not None:
            queries = self._kept(work, queries, self._keep(work, lane, keep))
        if not blocks:
            lane.blocks = None
            return ()
        return (self._products(call, work, session, layer, lane, queries, blocks),)

    def _products(
        self,
        call: Call,
        work: Work,
        session: KVCache,
        layer: int,
        lane: Lane,
        queries: torch.Tensor,
        blocks: list[Block],
    ) -> torch.Tensor:
        """[B, r, heads, head_dim] -> packed scores."""
        scale = self.config.scale
        elements = packed_elements(queries.shape[0], queries.shape[2], blocks)
        self._check_reply(elements, session.link_dtype)
        keys = session.keys(layer)
        lane.blocks = blocks
        return self._give(
            call,
            work,
            (elements,),
            session.link_dtype,
            lambda out: scores(queries, keys, blocks, scale, out),
        )[0]

    def _attending(
        self, session: KVCache, layer: int, blocks: list[Block], packed: torch.Tensor
    ) -> Callable[[torch.Tensor], None]:
        """What writes the weighted values to `out` [B, r, heads * head_dim]."""
        values = session.values(layer)
        if blocks[-1].last > session.values_filled[layer]:
            raise SettingError(f"layer: {session.values_filled[layer]} values there, expected {blocks[-1].last}")
        return lambda out: weighted_values(packed, values, blocks, out)

    def _attended(
        self, work: Work, session: KVCache, layer: int, blocks: list[Block], packed: torch.Tensor
    ) -> torch.Tensor:
        """The weighted values [B, r, heads * head_dim], on the device."""
        config = self.config
        count = blocks[-1].start + blocks[-1].rows
        width = config.num_attention_heads * config.head_dim
        compute = self._attending(session, layer, blocks, packed)
        out = work.empty((session.batch, count, width), self._torch_dtype)
        work.run(lambda: compute(out))
        return out

    def _continue(
        self, work: Work, session: KVCache, lane: Lane, x: torch.Tensor, linear: Linear, reply: torch.Tensor
    ) -> None:
        """The residual stream, with linear(x) added, goes to `reply` and into the lane."""
        before = lane.x
        if before is None or before.shape[:2] != x.shape[:2]:
            have = None if before is None else list(before.shape[:2])
            raise SettingError(f"{list(x.shape[:2])} rows, expected {have}, of the residual stream in this lane")
        multiplier = self.config.residual_multiplier
        width = self.config.hidden_size
        same = session.link_dtype == self._torch_dtype

        def compute(out: torch.Tensor) -> None:
            if same:
                flat = out.view(-1, width)
                torch.addmm(before.view(-1, width), _rows(x), linear.weight, alpha=multiplier, out=flat)
                if linear.bias is not None:
                    flat.add_(linear.bias, alpha=multiplier)
            else:  # the residual stream is of the wire's dtype
                more = x.new_empty((x.shape[0] * x.shape[1], width))
                linear(_rows(x), more)
                torch.add(before, more.view(before.shape), alpha=multiplier, out=out)

        lane.x = work.give(reply, compute)

    def _down(
        self, call: Call, work: Work, session: KVCache, layer: int, lane: Lane, h: torch.Tensor, *more: Sequence[int]
    ) -> list[torch.Tensor]:
        """Reply memory: for the residual stream, which goes on after a layer's MLP, and of the shapes `more`."""
        if layer < 0:
            raise SettingError("layer: 0, expected 1 or more: what comes after a layer's MLP")
        config = self.config
        self._check_own("h", h, (session.batch, None, config.intermediate_size), session)
        shape = (session.batch, h.shape[1], config.hidden_size)
        self._check_reply(math.prod(shape), session.link_dtype)
        replies = self._replies(call, session.link_dtype, shape, *more)
        linear = self._weights.layers[layer].linears["down"]
        self._continue(work, session, lane, self._inward(work, h), linear, replies[0])
        return replies

    def _normed(self, work: Work, lane: Lane, norm: torch.Tensor | None) -> torch.Tensor:
        """The residual stream times a norm's weight [rows, hidden]; dividing by its length is left to the caller."""
        x = lane.x
        if x is None:
            raise SettingError("lane: no residual stream there, expected an embedding before")
        if norm is None:
            raise SettingError("this model's norms cannot be folded: expected `qkv` and `linear`")
        normed = work.empty((x.shape[0] * x.shape[1], x.shape[2]), self._torch_dtype)
        work.run(lambda: torch.mul(_rows(x), norm, out=normed))
        return normed

    def _scale_values(
        self, work: Work, session: KVCache, layer: int, start: int, rows: int, scale: torch.Tensor | float | None
    ) -> None:
        """What a folded norm left for v, now that it is known; and then the bias, which could not come before."""
        if scale is None:
            return
        if start + rows > session.values_filled[layer]:
            raise SettingError(f"start: {start}, expected where this lane's values were put")
        bias = self._weights.layers[layer].linears["v"].bias
        if bias is not None:
            bias = bias.view(-1, 1, self.config.head_dim)
        self._multiply(work, session, session.values(layer), start, rows, scale, bias)

    def _multiply(
        self,
        work: Work,
        session: KVCache,
        cache: torch.Tensor,
        start: int,
        rows: int,
        scale: torch.Tensor | float,
        bias: torch.Tensor | None = None,
    ) -> None:
        """Multiplies some rows of a cache by a number each, [B, rows], and adds [kv_heads, 1, head_dim]."""
        if isinstance(scale, float) and bias is None:
            one = cache.select(1, start)
            work.run(lambda: one.mul_(scale))
            return
        part = cache.view(session.batch, -1, *cache.shape[1:]).narrow(2, start, rows)
        by_row = scale if isinstance(scale, float) else scale[:, None, :, None]

        def compute() -> None:
            part.mul_(by_row)
            if bias is not None:
                part.add_(bias)

        work.run(compute)

    def _keep(self, work: Work, lane: Lane, keep: torch.Tensor) -> torch.Tensor:
        """Leaves one row of each sequence in the lane. Returns `keep`, on the device."""
        assert lane.x is not None
        index = work.take(keep)
        lane.x = self._kept(work, lane.x, index)
        return index

    def _kept(self, work: Work, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """[B, n, ...] -> [B, 1, ...]: of each sequence the row that `index` [B] names."""
        kept = work.empty((rows.shape[0], 1, *rows.shape[2:]), rows.dtype)
        where = index.view(-1, 1, *[1] * (rows.dim() - 2)).expand(kept.shape)
        work.run(lambda: torch.gather(rows, 1, where, out=kept))
        return kept

    # ---- memory and checks ----

    def _apply(
        self, call: Call, work: Work, x: torch.Tensor, linear: Linear, shape: Sequence[int], wire: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._give(call, work, shape, wire, lambda out: linear(x, out.view(len(x), -1)))

    def _replies(self, call: Call, wire: torch.dtype, *shapes: Sequence[int]) -> list[torch.Tensor]:
        """Memory for several tensors of a reply: small ones next to each other, large ones so that each can be given
        back alone."""
        sizes = [math.prod(shape) for shape in shapes]
        if sum(sizes) > _SMALL_ELEMENTS:
            return [call.empty(shape, _WIRE_DTYPES[wire]) for shape in shapes]
        starts = list(accumulate((size + 63 & -64 for size in sizes), initial=0))
        memory: torch.Tensor = call.empty((starts[-1],), _WIRE_DTYPES[wire])
        return [memory.narrow(0, start, size).view(shape) for start, size, shape in zip(starts, sizes, shapes)]

    def _give(
        self,
        call: Call,
        work: Work,
        shape: Sequence[int],
        wire: torch.dtype,
        compute: _Compute,
        reply: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Reply memory, with what `compute(out)` writes by the time the work is over, and `out`."""
        if reply is None:
            reply = self._replies(call, wire, shape)[0]
        if wire == self._torch_dtype:
            return reply, work.give(reply, compute)
        own = work.empty(shape, self._torch_dtype)
        work.run(lambda: compute(own))
        work.give(reply, lambda out: out.copy_(own))
        return reply, own

    def _inward(self, work: Work, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device, in the executor's dtype."""
        taken = work.take(tensor)
        if taken.dtype == self._torch_dtype:
            return taken
        own = work.empty(taken.shape, self._torch_dtype)
        work.run(lambda: own.copy_(taken))
        return own

    def _check_reply(self, elements: int, wire: torch.dtype) -> None:
        """Raises LimitError if a reply would be too large: some operations give far more than they take."""
        nbytes = elements * wire.itemsize
        if nbytes > self._max_reply_nbytes:
            raise LimitError(f"a reply of {nbytes} bytes, expected at most {self._max_reply_nbytes}")

    def _check(self, name: str, tensor: torch.Tensor, shape: tuple[int | None, ...]) -> torch.dtype:
        """The tensor's dtype, one of those that may travel."""
        if tensor.dtype not in _WIRE_DTYPES or not _fits(tensor, shape):
            raise TensorError(_expected(name, tensor, "a floating-point", shape))
        return tensor.dtype

    def _check_own(self, name: str, tensor: torch.Tensor, shape: tuple[int | None, ...], session: KVCache) -> None:
        if tensor.dtype != session.link_dtype or not _fits(tensor, shape):
            raise TensorError(_expected(name, tensor, _WIRE_DTYPES[session.link_dtype], shape))
        if 0 in tensor.shape:
            raise TensorError(f"{name}: {list(tensor.shape)}, expected no dimension of 0")

    def _check_packed(self, work: Work, packed: torch.Tensor, session: KVCache, blocks: list[Block]) -> torch.Tensor:
        elements = packed_elements(session.batch, self.config.num_attention_heads, blocks)
        self._check_own("packed", packed, (elements,), session)
        return self._inward(work, packed)

    def _blocks(self, lane: Lane) -> list[Block]:
        """The blocks of the scores that are with the caller, who sends them back once."""
        blocks, lane.blocks = lane.blocks, None
        if blocks is None:
            raise SettingError("lane: no scores of this lane are with the caller, expected some before")
        return blocks

    def _scale(self, call: Call, scales: torch.Tensor | None, batch: int, rows: int) -> torch.Tensor | float | None:
        """A folded norm's scale: a number for one row, [B, n] for more, as it came; None without."""
        if scales is None:
            scale = call.attrs.get("scale")
            if scale is None:
                return None
            if not isinstance(scale, float) or batch * rows != 1:
                raise SettingError(f"scale: {scale!r:.30} for {batch * rows} rows, expected a float and one row")
            return scale
        if scales.dtype != torch.float32 or scales.shape != (batch, rows):
            raise TensorError(_expected("scales", scales, "float32", (batch, rows)))
        return scales

    def _check_rotary(self, cos: torch.Tensor, sin: torch.Tensor, rows: int, batch: int) -> int:
        """Half of how many of a head's elements are turned."""
        half = cos.shape[-1] if cos.dim() else 0
        fits = cos.dim() == 3 and cos.shape[0] in (1, batch) and cos.shape[1] == rows
        if not fits or not 1 <= half <= self.config.head_dim // 2 or cos.dtype != torch.float32:
            shape = (batch, rows, self.config.head_dim // 2)
            raise TensorError(_expected("cos", cos, "float32", shape))
        if sin.shape != cos.shape or sin.dtype != cos.dtype:
            raise TensorError(_expected("sin", sin, "float32", tuple(cos.shape)))
        return half


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[B, n, width] -> [B * n, width]."""
    return x.view(-1, x.shape[-1])


def _bare(linear: Linear, biased: bool) -> Linear:
    return linear if biased or linear.bias is None else Linear(linear.weight, None)


def _take(call: Call, count: int) -> tuple[torch.Tensor, ...]:
    if len(call.tensors) != count:
        raise SettingError(f"{len(call.tensors)} tensors, expected {count}")
    return call.tensors


def _int(call: Call, name: str, low: int, high: int) -> int:
    value = call.attrs.get(name)
    if type(value) is not int or not low <= value <= high:
        raise SettingError(f"{name}: {value!r:.30}, expected an int from {low} to {high}")
    return value


def _indices(name: str, indices: torch.Tensor, limit: int, count: int | None = None) -> torch.Tensor:
    """A private copy of indices below `limit`. Raises TensorError, SettingError."""
    if indices.dtype != torch.int64 or indices.dim() != 1 or (count is not None and len(indices) != count):
        raise TensorError(_expected(name, indices, "int64", (count,)))
    indices = indices.clone()
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < limit:
        raise SettingError(f"{name}: {int(indices.min())} to {int(indices.max())}, expected 0 to {limit - 1}")
    return indices


def _fits(tensor: torch.Tensor, shape: tuple[int | None, ...]) -> bool:
    have = tensor.shape
    return len(have) == len(shape) and not any(want is not None and want != dim for want, dim in zip(shape, have))


def _expected(name: str, tensor: torch.Tensor, dtype: str, shape: tuple[int | None, ...]) -> str:
    wanted = ", ".join("n" if dim is None else str(dim) for dim in shape)
    return f"{name}: {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}, expected {dtype} [{wanted}]"

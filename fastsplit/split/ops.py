"""Temporary: the contract of before, until all users have moved to plan.py, contract.py and blocks.py.

The op contract that both sides share: names, arguments, results, shapes.

B sequences, n rows of each in this call, r rows of each that go on (n, or 1 where `keep` says which); H query heads, G
kv heads, D the head's length, I the MLP's.

    op                attributes         tensors in                                  tensors out
    describe          -                  -                                           - (attributes name, config, ...)
    tee_weights       -                  -                                           ModelConfig.tee_weight_shapes, fp32
    open              batch, capacity,   -                                           - (session)
                      dtype
    truncate          session, length    -                                           -
    reorder           session            indices [B'] int64                          -
    close             session            -                                           -
  a layer's operations, one by one
    embedding         at                 ids [B, n] int64                            x [B, n, hidden]
    linear            layer, names       x [B, n, in]                                one [B, n, out] for each name
    qkv               at                 x [B, n, hidden]                            qk [B, n, H + G, D]; v is kept
    scores            at, blocks, scale  qk, or q [B, r, H, D] and k [B, n, G, D],   packed
                                         or k alone; scales; keep
    values            at                 packed, v [B, n, G, D]; or v alone          [B, r, H * D]
    values_o          at                 packed                                      [B, r, hidden]
    lm_head           -                  x [B, r, hidden]                            logits [B, r, vocab]
  the same, with the residual stream x kept, norms folded into what follows them
    embedding_qkv     at                 ids                                         x, qk
    embedding_scores  at, blocks         ids, cos, sin, keep                         x, packed
    values_gate_up    at, scale          packed, scales; or scales alone             x [B, r, hidden], [2, B, r, I]
    down_qkv          at                 h [B, n, I]                                 x, qk
    down_scores       at, blocks         h, keep                                     x, packed if there are blocks
    down_lm_head      at                 h [B, r, I]                                 x, logits

Attributes. `at`: session, lane, layer, start; a lane is one stretch of a forward pass on its way through the layers,
`start` the position of its first row. `blocks`: of the scores, 4 ints each (`Block`); or first, last: the columns of a
single one. packed: all blocks' scores [B, H, rows, columns] one after another, and what is behind them
(`packed_elements`). `names`: of linear operations
with the same input. `scale`, or scales [B, n] float32: what a folded norm leaves to be multiplied by, one for each row;
the former if there is one row. `keep` [B] int64: the only row of each sequence that goes on.

Rules. All tensors but ids, keep and scales are of the session's dtype ("wire dtype"; `linear` and `lm_head` give what
they get). kv heads are never repeated: query head h belongs to kv head h // (H / G). The executor multiplies q by the
attention's scale. Which columns a row may see is the caller's business: the executor computes the blocks that it is
told, and no row ever needs more. What a reply must look like follows from the configuration alone, never from the
peer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import SettingError
from ..models import ModelConfig

__all__ = [
    "MAX_BLOCKS",
    "MAX_LANES",
    "PLANS",
    "Block",
    "Expected",
    "Shapes",
    "Traffic",
    "block_attrs",
    "choose_block_rows",
    "choose_plan",
    "packed_elements",
    "parse_blocks",
    "row_blocks",
    "traffic",
]

PLANS = {"per-op": (9, 2), "batched": (6, 2), "fused": (5, 2), "folded": (3, 1), "linear": (2, 1)}
"""Plan -> calls for each layer of a forward pass, and calls beside them."""

MAX_BLOCKS = 64
"""Row blocks in one message."""

MAX_LANES = 16
"""Lanes of one session."""

_BLOCK_ROWS = 128
_PACKED_MULTIPLE = 1024

Expected = list[tuple[str, tuple[int, ...]]]
"""(dtype, shape) of each tensor of a reply."""


class Block(NamedTuple):
    """Rows `start` to `start + rows` of a score matrix, and the columns that they have of it: `first` to `last`."""

    start: int
    rows: int
    first: int
    last: int

    @property
    def columns(self) -> int:
        return self.last - self.first


def choose_block_rows(rows: int, wanted: int | None = None) -> int:
    """Rows in a block for a score matrix of `rows` rows: `wanted`, or 128, or as many more as keep the message within
    MAX_BLOCKS."""
    return max(wanted or _BLOCK_ROWS, -(-rows // MAX_BLOCKS))


def row_blocks(rows: int, positions: int, block_rows: int, window: int = 0) -> list[Block]:
    """The blocks of a score matrix whose `rows` rows are the last of `positions` positions.

    A block's columns stop at its last row's diagonal, and begin where its first row's `window` does (0: at 0).
    """
    past = positions - rows
    blocks = []
    for start in range(0, rows, block_rows):
        count = min(block_rows, rows - start)
        first = max(past + start + 1 - window, 0) if window else 0
        blocks.append(Block(start, count, first, past + start + count))
    return blocks


def block_attrs(blocks: Sequence[Block]) -> dict[str, Any]:
    """The attributes by which a request names its blocks.

    A single block's columns are numbers of their own: what is a list belongs to a message's shape, which must not be a
    new one with each token.
    """
    if len(blocks) == 1:
        return {"first": blocks[0].first, "last": blocks[0].last}
    return {"blocks": [number for block in blocks for number in block]}


def parse_blocks(attrs: Mapping[str, Any], rows: int, positions: int) -> list[Block]:
    """The blocks that a request's attributes name, none if there is no such attribute.

    Raises SettingError unless they are all of `rows` rows, in order, and have columns below `positions`.
    """
    values = attrs.get("blocks")
    if values is None and "last" in attrs:
        values = [0, rows, attrs.get("first"), attrs["last"]]
    elif values is None:
        values = []
    if not isinstance(values, list) or len(values) % 4 or len(values) > 4 * MAX_BLOCKS:
        raise SettingError(f"blocks: {values!r:.100}, expected 4 ints for each of at most {MAX_BLOCKS} blocks")
    blocks = [Block(*values[index : index + 4]) for index in range(0, len(values), 4)]
    end = 0
    for block in blocks:
        start, count, first, last = block
        if any(type(number) is not int for number in block):
            raise SettingError(f"blocks: {list(block)!r:.100}, expected ints")
        if start != end or count < 1 or not 0 <= first < last <= positions:
            raise SettingError(f"blocks: {list(block)}, expected [{end}, 1 or more, columns within 0 to {positions}]")
        end += count
    if end != rows:
        raise SettingError(f"blocks: {end} rows, expected {rows}")
    return blocks


def packed_elements(batch: int, heads: int, blocks: Sequence[Block]) -> int:
    """Elements of the tensor that scores travel in: those of all blocks, and some of no meaning behind them.

    Without these each token of a generation would make messages of new shapes, which take ten times as long to encode.
    """
    elements = batch * heads * sum(rows * (last - first) for _, rows, first, last in blocks)
    return -(-elements // _PACKED_MULTIPLE) * _PACKED_MULTIPLE


def choose_plan(wanted: str, config: ModelConfig, dtypes: Sequence[str]) -> tuple[str, str]:
    """The plan to run where `wanted` (a plan, or "auto") is asked for, and why it is another one ("" if it is not).

    `dtypes`: those of executor and wire. Raises SettingError for a name that is no plan.
    """
    if wanted not in (*PLANS, "auto"):
        raise SettingError(f"plan {wanted!r}, expected one of auto, {', '.join(PLANS)}")
    if wanted not in ("auto", "folded", "linear"):
        return wanted, ""
    if config.post_norms:
        return "fused", f"{config.model_type}: norms after attention and MLP stand between what folding puts together"
    if "float16" in dtypes:
        return "fused", "float16: the residual stream may leave its range"
    if wanted == "linear" and (config.qk_norm or config.attention_bias):
        what = "norms" if config.qk_norm else "biases"
        return "folded", f"{config.model_type}: {what} of q and k come between the products"
    return ("folded" if wanted == "auto" else wanted), ""


class Traffic(NamedTuple):
    """Calls, and the bytes of the tensors in their requests and replies."""

    calls: int
    sent: int
    received: int


_GROUPED = {"per-op": (3, 2), "batched": (1, 1), "fused": (1, 1)}
"""Plan -> how often the attention's input travels, and the MLP's."""

_BEHIND_KEYS = {"per-op": 5, "batched": 4, "fused": 4, "folded": 2, "linear": 1}
"""Plan -> calls of a pass that come after the last layer's keys and values are stored."""


def traffic(
    config: ModelConfig,
    plan: str,
    itemsize: int,
    start: int,
    rows: int,
    *,
    batch: int = 1,
    block_rows: int | None = None,
    last: bool = True,
) -> Traffic:
    """What one stretch of a pass moves, from sizes alone: `rows` rows of `batch` sequences without padding, after
    `start` positions, in a wire dtype of `itemsize` bytes.

    `last`: the last row's logits are wanted of each sequence; else the stretch ends with its keys and values. The
    formula is that of the table above and of docs/design.md; benches/counts.py compares it with what is counted.
    """
    hidden, inter, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    heads, q, kv = config.num_attention_heads, config.out_features("q"), config.out_features("k")
    total, count = start + rows, batch * rows
    sent = received = 0  # elements
    other_sent = 8 * count  # bytes of what has a dtype of its own: ids
    kept = 8 * batch if rows > 1 and last else 0  # which row goes on
    scales = 4 * count if count > 1 else 0  # one alone is an attribute
    by_window: dict[int, int] = {}  # elements of a layer's scores
    calls, once = PLANS[plan]
    for layer in range(layers):
        final = layer == layers - 1
        ends = final and not last
        after = batch if final and last else count  # rows that go on
        window = config.window(layer)
        if final and last:
            scores = packed_elements(batch, heads, row_blocks(1, total, 1, window))
        else:
            if window not in by_window:
                blocks = row_blocks(rows, total, choose_block_rows(rows, block_rows), window)
                by_window[window] = packed_elements(batch, heads, blocks)
            scores = by_window[window]
        if plan in _GROUPED:
            attention, mlp = _GROUPED[plan]
            v_travels = plan != "fused"
            sent += attention * count * hidden + count * kv + (count * kv if v_travels else 0)
            received += count * (q + kv) + (count * kv if v_travels else 0)
            if not ends:
                sent += after * q + scores + mlp * after * hidden + after * inter
                received += scores + after * (2 * hidden + 2 * inter)
                if v_travels:
                    sent += after * q
                    received += after * q
            continue
        other_sent += scales + (kept if final else 0)
        if plan == "folded" or (ends and layers == 1):  # q and k come here to be turned
            sent += count * kv + (0 if ends else after * q)
            received += count * (q + kv)
        if not ends:
            sent += scores
            received += scores + after * (hidden + 2 * inter)
        if not final:  # what comes before the next layer's scores
            sent += count * inter
            received += count * hidden
    received += count * hidden  # the embedding
    if last and plan in _GROUPED:
        sent += batch * hidden
        received += batch * config.vocab_size
    elif last:
        sent += batch * inter
        received += batch * (hidden + config.vocab_size)
    if plan == "linear" and (last or layers > 1):
        other_sent += 4 * rows * config.rope.rotary_dim(config.head_dim)  # cos and sin
    calls = calls * layers + once - (0 if last else _BEHIND_KEYS[plan])
    return Traffic(calls, other_sent + sent * itemsize, received * itemsize)


class Shapes:
    """What each op's reply must hold, for one model and one wire dtype."""

    def __init__(self, config: ModelConfig, dtype: str) -> None:
        self._config = config
        self._dtype = dtype

    def tee_weights(self) -> Expected:
        return [("float32", shape) for shape in self._config.tee_weight_shapes().values()]

    def hidden(self, batch: int, rows: int) -> Expected:
        return [(self._dtype, (batch, rows, self._config.hidden_size))]

    def linear(self, names: Sequence[str], batch: int, rows: int) -> Expected:
        return [(self._dtype, (batch, rows, self._config.out_features(name))) for name in names]

    def qk(self, batch: int, rows: int) -> Expected:
        config = self._config
        heads = config.num_attention_heads + config.num_key_value_heads
        return [(self._dtype, (batch, rows, heads, config.head_dim))]

    def packed(self, batch: int, blocks: Sequence[Block]) -> Expected:
        return [(self._dtype, (packed_elements(batch, self._config.num_attention_heads, blocks),))]

    def values(self, batch: int, rows: int) -> Expected:
        return [(self._dtype, (batch, rows, self._config.num_attention_heads * self._config.head_dim))]

    def gate_up(self, batch: int, rows: int) -> Expected:
        return [(self._dtype, (2, batch, rows, self._config.intermediate_size))]

    def logits(self, batch: int, rows: int) -> Expected:
        return [(self._dtype, (batch, rows, self._config.vocab_size))]

"""Clients that misuse what an executor keeps for them, and an executor that lies to its TEE side: one clear error that
names the field, and the next generation on the same connection is what it should be."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "e2e"))
from split import CONFIGS, load_hf, make_model

import fastsplit
from fastsplit.errors import RemoteOpError, RemoteProtocolError
from fastsplit.executor.service import Executor
from fastsplit.models import Model, ModelConfig, open_model
from fastsplit.split.blocks import MAX_BLOCKS, Block, block_attrs, packed_elements
from fastsplit.split.contract import MAX_LANES, Shapes
from fastsplit.split.plan import PLANS, STEP_LISTS, STEPS, signature
from fastsplit.split.plan import Call as PlanCall
from fastsplit.tee.remote import RemoteModel
from fastsplit.tee.runner import Runner

pytestmark = pytest.mark.matrix

PROMPT = torch.tensor([5, 17, 96, 0, 33, 8])
TOKENS = 3
FAMILIES = ("grouped heads", "attention bias", "qwen3", "gemma2")


QKV = "qkv store_v"
SCORES = "store_k scores"
SCALED_SCORES = "store_k scale_v scores"
LAST_SCORES = "store_k scale_v select scores"
GATE_UP = "values o add norm gate_up"
SCALED_GATE_UP = "scale_kv values o add norm gate_up"
EMBED_QKV = "embed norm qkv store_v"
DOWN_QKV = "down add norm qkv store_v"
DOWN_LOGITS = "down add norm lm_head"
FIRST = "embed tables norm qkv store_v rope store_k scores"
FIRST_SELECTS = "embed tables norm qkv store_v rope store_k select scores"
NEXT = "down add norm qkv store_v rope store_k scores"
NEXT_SELECTS = "down add norm qkv store_v rope store_k select scores"


UNEVEN = [0, 1, 0, 3, 1, 2, 0, 1]
"""Blocks, the last of which has fewer columns than another."""


class Known:
    """A model, its executor, and the tokens that HF generates."""

    def __init__(self, directory: Path, family: str) -> None:
        make_model(directory, CONFIGS[family])
        self.model: Model = open_model(str(directory))
        self.executor = Executor(self.model, max_cache_nbytes=2**24)
        with torch.inference_mode():
            tokens = load_hf(directory).generate(
                PROMPT[None], attention_mask=torch.ones_like(PROMPT)[None], max_new_tokens=TOKENS, do_sample=False
            )
        self.tokens = tokens[0, len(PROMPT) :].tolist()


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Known]:
    made: dict[str, Known] = {}

    def get(family: str) -> Known:
        if family not in made:
            made[family] = Known(tmp_path_factory.mktemp("hostile") / "model", family)
        return made[family]

    return get


class Peer:
    """A client with a session of two sequences, and what fits it."""

    def __init__(self, known: Known, channel: fastsplit.Channel) -> None:
        self.known = known
        self.channel = channel
        self.config: ModelConfig = known.model.config
        self.session = self.open()

    def open(self, batch: int = 2, capacity: int = 0, dtype: str = "float32") -> int:
        return int(self.channel.call("open", batch=batch, capacity=capacity, dtype=dtype).attrs["session"])

    def at(self, lane: int = 0, layer: int = 0, start: int = 0, session: int | None = None) -> dict[str, Any]:
        return {"session": session or self.session, "lane": lane, "layer": layer, "start": start}

    def ids(self, rows: int = 3, batch: int = 2) -> torch.Tensor:
        return torch.zeros(batch, rows, dtype=torch.int64)

    def x(self, rows: int = 3, batch: int = 2) -> torch.Tensor:
        return torch.ones(batch, rows, self.config.hidden_size)

    def h(self, rows: int = 3, batch: int = 2) -> torch.Tensor:
        return torch.ones(batch, rows, self.config.intermediate_size)

    def heads(self, count: int, rows: int = 3, batch: int = 2) -> torch.Tensor:
        return torch.ones(batch, rows, count, self.config.head_dim)

    def q(self, rows: int = 3) -> torch.Tensor:
        return self.heads(self.config.num_attention_heads, rows)

    def k(self, rows: int = 3, batch: int = 2) -> torch.Tensor:
        return self.heads(self.config.num_key_value_heads, rows, batch)

    def qk(self, rows: int = 3) -> torch.Tensor:
        return self.heads(self.config.num_attention_heads + self.config.num_key_value_heads, rows)

    def table(self, rows: int = 3, batch: int = 1) -> torch.Tensor:
        return torch.ones(batch, rows, self.config.head_dim // 2)

    def packed(self, rows: int = 3, positions: int = 3) -> torch.Tensor:
        blocks = [Block(0, rows, 0, positions)]
        return torch.ones(packed_elements(2, self.config.num_attention_heads, blocks))

    def packed_of(self, blocks: list[int]) -> torch.Tensor:
        found = [Block(*blocks[index : index + 4]) for index in range(0, len(blocks), 4)]
        return torch.ones(packed_elements(2, self.config.num_attention_heads, found))

    def attended(self, rows: int = 3) -> torch.Tensor:
        return self.heads(self.config.num_attention_heads, rows).flatten(2)

    def behind_keys(self) -> None:
        """Three keys and two values; scores of which an earlier block has more columns than the last one."""
        self.run(QKV, self.x(2))
        self.run("store_k", self.k(1), lane=1)
        self.run(SCORES, self.qk(3), lane=1, blocks=UNEVEN)

    def scores(self, rows: int = 3, positions: int = 3, **at: int) -> None:
        """What is right: keys, values and scores at a layer."""
        start = at.setdefault("start", positions - rows)
        assert start == positions - rows
        self.run("qkv store_v", self.x(rows), **at)
        self.run("store_k scores", self.qk(rows), **at, first=0, last=positions)

    def residual(self, rows: int = 3, lane: int = 0) -> None:
        """The residual stream in a lane."""
        self.run("embed norm qkv store_v", self.ids(rows), lane=lane)

    def minimal(self, rows: int = 3) -> None:
        """The first call of the minimal plan."""
        self.run(FIRST, self.ids(rows), self.table(rows), self.table(rows), first=0, last=rows)

    def run(self, steps: str, *tensors: torch.Tensor, **attrs: Any) -> Any:
        return self.channel.call("run", *tensors, **{**self.at(), **attrs}, steps=steps)

    def works(self) -> None:
        with torch.inference_mode():
            runner = Runner(RemoteModel.fetch(self.channel, self.known.model), self.channel)
            assert list(runner.generate(PROMPT, TOKENS)) == self.known.tokens


@pytest.fixture
def make_peer(
    known: Callable[[str], Known], unix_uri: str, serve: Callable[..., Any], connect: Callable[..., Any]
) -> Callable[..., Peer]:
    def make(family: str = "grouped heads", query: str = "") -> Peer:
        server = serve(unix_uri + query, known(family).executor.handlers, arrays="torch")
        return Peer(known(family), connect(server.uri, arrays="torch", call_timeout_s=20))

    return make


Request = tuple[str, tuple[torch.Tensor, ...], dict[str, Any]]
Case = Callable[[Peer], Request]


def given(steps: str, make: Callable[[Peer], tuple[torch.Tensor, ...]], **attrs: Any) -> Case:
    return lambda peer: (steps, make(peer), {**peer.at(), **attrs})


def simple(steps: str, *tensors: torch.Tensor, **attrs: Any) -> Case:
    return given(steps, lambda peer: tensors, **attrs)


def after(prepare: Callable[[Peer], object], case: Case) -> Case:
    def prepared(peer: Peer) -> Request:
        prepare(peer)
        return case(peer)

    return prepared


def after_qkv(steps: str, make: Callable[[Peer], tuple[torch.Tensor, ...]], **attrs: Any) -> Case:
    return after(lambda peer: peer.run(QKV, peer.x()), given(steps, make, **attrs))


def blocked(blocks: Any, rows: int = 3) -> Case:
    return given(SCORES, lambda peer: (peer.qk(rows),), blocks=blocks)


def selecting(values: Any, dtype: torch.dtype = torch.int64, **attrs: Any) -> Case:
    """In a lane whose residual stream has these rows, unless another one is named."""
    tensors = torch.ones(2, 3), torch.tensor(values, dtype=dtype)
    scores = given(LAST_SCORES, lambda peer: (peer.q(1), peer.k(), *tensors), first=0, last=3, **attrs)
    return after(Peer.residual, scores)


def scaled(scales: torch.Tensor) -> Case:
    return after_qkv(SCALED_SCORES, lambda peer: (peer.qk(), scales), first=0, last=3)


def minimal_selecting(selected: torch.Tensor) -> Case:
    return given(FIRST_SELECTS, lambda peer: (peer.ids(), peer.table(), peer.table(), selected), first=0, last=3)


def tables(cos: Callable[[Peer], torch.Tensor], sin: Callable[[Peer], torch.Tensor] | None = None) -> Case:
    return given(FIRST, lambda peer: (peer.ids(), cos(peer), (sin or cos)(peer)), first=0, last=3)


EMPTY = torch.zeros(0)

CASES: dict[str, tuple[str, Case]] = {
    # the columns
    "blocks: half a one": ("blocks: ", blocked([0, 3])),
    "blocks: strings": ("blocks: ", blocked(["0", "3", "0", "3"])),
    "blocks: floats": ("blocks: ", blocked([0.0, 3.0, 0.0, 3.0])),
    "blocks: bools": ("blocks: ", blocked([False, True, False, True], 1)),
    "blocks: a number": ("blocks: ", blocked(5)),
    "blocks: a word": ("blocks: ", blocked("abcd")),
    "blocks: rows twice": ("blocks: ", blocked([0, 2, 0, 3, 1, 2, 0, 3])),
    "blocks: rows left out": ("blocks: ", blocked([0, 1, 0, 3, 2, 1, 0, 3])),
    "blocks: rows left out at the end": ("blocks: 2 rows, expected 3", blocked([0, 2, 0, 3])),
    "blocks: none for the rows": ("blocks: 0 rows, expected 3", blocked([])),
    "blocks: beyond the positions": ("blocks: ", blocked([0, 3, 0, 4])),
    "blocks: far beyond": ("blocks: ", blocked([0, 3, 0, 2**62])),
    "blocks: too many rows": ("blocks: ", blocked([0, 2**40, 0, 3])),
    "blocks: no columns": ("blocks: ", blocked([0, 3, 3, 3])),
    "blocks: columns the wrong way round": ("blocks: ", blocked([0, 3, 2, 1])),
    "blocks: negative columns": ("blocks: ", blocked([0, 3, -1, 3])),
    "blocks: no rows": ("blocks: ", blocked([0, 0, 0, 3] * 2 + [0, 3, 0, 3])),
    "blocks: negative rows": ("blocks: ", blocked([0, -1, 0, 3])),
    "blocks: too many": ("blocks: ", blocked([n for row in range(MAX_BLOCKS + 1) for n in (row, 1, 0, 3)], 65)),
    "last: beyond": ("blocks: ", simple(SCORES, torch.ones(2, 3, 8, 8), first=0, last=4)),
    "last: alone": ("blocks: ", simple(SCORES, torch.ones(2, 3, 8, 8), last=3)),
    "last: a word": ("blocks: ", simple(SCORES, torch.ones(2, 3, 8, 8), first=0, last="3")),
    "first: a fraction": ("blocks: ", simple(SCORES, torch.ones(2, 3, 8, 8), first=0.5, last=3)),
    "first: a bool": ("blocks: ", simple(SCORES, torch.ones(2, 3, 8, 8), first=False, last=3)),
    "first: behind last": ("blocks: ", simple(SCORES, torch.ones(2, 3, 8, 8), first=3, last=2)),
    "first: negative": ("blocks: ", simple(SCORES, torch.ones(2, 3, 8, 8), first=-1, last=2)),
    "minimal, blocks: beyond": (
        "blocks: ",
        given(FIRST, lambda p: (p.ids(), p.table(), p.table()), last=9),
    ),
    "minimal, blocks: none": ("blocks: ", given(FIRST, lambda p: (p.ids(), p.table(), p.table()))),
    # where rows go
    "start: a gap": ("start: 1, expected 0 to the 0 positions", given(QKV, lambda p: (p.x(),), start=1)),
    "start: a gap behind some": (
        "start: 4, expected 0 to the 3 positions",
        after(Peer.scores, given(QKV, lambda p: (p.x(),), start=4)),
    ),
    "start: keys alone, a gap": ("start: 7, expected 0 to the 0", given("store_k", lambda p: (p.k(),), start=7)),
    "start: values alone, a gap": (
        "start: 9, expected 0 to the 3",
        after(Peer.scores, given("store_v", lambda p: (p.k(),), start=9)),
    ),
    # tensors
    "scores: nothing": ("0 tensors, expected qk", simple(SCORES)),
    "keys: nothing": ("0 tensors, expected k", simple("store_k")),
    "scores: four": ("expected qk", given(SCORES, lambda p: (p.q(), p.k(), p.k()))),
    "scores: no rows": ("no dimension of 0", given("store_k", lambda p: (p.k(0),))),
    "scores: keys alone": ("qk: ", given(SCORES, lambda p: (p.k(),), first=0, last=3)),
    "scores: another batch": ("k: ", given("store_k", lambda p: (p.k(3, 1),))),
    "scores: another dtype": ("qk?: bfloat16", given(SCORES, lambda p: (p.qk().bfloat16(),), first=0, last=3)),
    "scores: a scalar": ("k: ", simple(SCORES, torch.tensor(1.0))),
    "keys: a scalar": ("k: ", simple("store_k", torch.tensor(1.0))),
    "q: other heads": ("q: ", given(SCORES, lambda p: (p.heads(5), p.k()), first=0, last=3)),
    "qkv: two": ("2 tensors, expected normed", given(QKV, lambda p: (p.x(), p.x()))),
    "x: another batch": ("normed: ", given(QKV, lambda p: (p.x(3, 1),))),
    "x: no rows": ("normed: ", given(QKV, lambda p: (p.x(0),))),
    "x: another width": ("normed: ", given(QKV, lambda p: (p.h(),))),
    "x: two dimensions": ("normed: ", given(QKV, lambda p: (p.x()[0],))),
    "x: another dtype": ("normed: bfloat16", given(QKV, lambda p: (p.x().bfloat16(),))),
    "x: ints": ("normed: int64", given(QKV, lambda p: (p.x().long(),))),
    "ids: floats": ("ids: ", given("embed", lambda p: (p.ids().float(),))),
    "ids: another batch": ("ids: ", given("embed", lambda p: (p.ids(3, 1),))),
    "ids: one dimension": ("ids: ", given(EMBED_QKV, lambda p: (p.ids()[0],))),
    "ids: negative": ("ids: -1", given(EMBED_QKV, lambda p: (p.ids() - 1,))),
    "ids: no such word": ("ids: 97", given("embed", lambda p: (p.ids() + 97,))),
    "ids: huge": ("ids: ", given(EMBED_QKV, lambda p: (p.ids() + 2**62,))),
    # scores that come back
    "packed: before any scores": ("lane: no scores", given("values o", lambda p: (p.packed(),))),
    "packed: before any scores, folded": ("lane: no scores", given(GATE_UP, lambda p: (p.packed(),))),
    "packed: of another lane": (
        "lane: no scores",
        after(Peer.scores, given("values o", lambda p: (p.packed(),), lane=1)),
    ),
    "packed: too small": ("weights: ", after(Peer.scores, given("values o", lambda p: (p.packed()[:-1],)))),
    "packed: too large": ("weights: ", after(Peer.scores, given("values o", lambda p: (p.packed().repeat(2),)))),
    "packed: empty": ("weights: ", after(Peer.scores, simple("values o", EMPTY))),
    "packed: two dimensions": ("weights: ", after(Peer.scores, given("values o", lambda p: (p.packed()[None],)))),
    "packed: another dtype": (
        "weights: float16",
        after(Peer.scores, given("values o", lambda p: (p.packed().half(),))),
    ),
    "packed: two": ("2 tensors, expected weights", after(Peer.scores, given("values o", lambda p: (p.packed(),) * 2))),
    "packed: at a layer without values": (
        "layer: 1, of which the session holds nothing",
        after(Peer.scores, given("values o", lambda p: (p.packed(),), layer=1)),
    ),
    "packed: without a residual stream": (
        "rows, expected None, of the residual stream",
        after(Peer.scores, given(GATE_UP, lambda p: (p.packed(),))),
    ),
    "values: nothing": ("0 tensors, expected weights, v", simple("store_v values")),
    "values: before any scores": ("lane: no scores", given("store_v values", lambda p: (p.packed(), p.k()))),
    "values: alone, before any keys": ("v: ", given("store_v", lambda p: (p.k(),))),
    "values: none, before any keys": ("no dimension of 0", given("store_v", lambda p: (p.k(0),))),
    "values: other rows than the scores": (
        "v: ",
        after(Peer.scores, given("store_v values", lambda p: (p.packed(), p.k(2)))),
    ),
    "values: too small": (
        "weights: ",
        after(Peer.scores, given("store_v values", lambda p: (p.packed()[1:], p.k()))),
    ),
    "values: fewer than a block that is not the last one": (
        "layer: 2 values there, expected 3",
        after(lambda p: p.behind_keys(), given("values o", lambda p: (p.packed_of(UNEVEN),), lane=1)),
    ),
    # one row of each
    "selected: beyond": ("selected: 0 to 3, expected 0 to 2", selecting([0, 3])),
    "selected: negative": ("selected: -1 to 2", selecting([-1, 2])),
    "selected: huge": ("selected: ", selecting([0, 2**62])),
    "selected: too few": ("selected: ", selecting([1])),
    "selected: int32": ("selected: int32", selecting([1, 2], torch.int32)),
    "selected: floats": ("selected: float32", selecting([1, 2], torch.float32)),
    "selected: without a residual stream": (
        "selected: 3 rows, expected those of the residual stream in this lane",
        after_qkv(LAST_SCORES, lambda p: (p.q(1), p.k(), torch.ones(2, 3), torch.tensor([0, 1])), first=0, last=3),
    ),
    "selected: of another lane": (
        "selected: 3 rows, expected those of the residual stream in this lane",
        selecting([0, 1], lane=1),
    ),
    "selected: all rows of q": (
        "q: ",
        after(
            Peer.residual,
            given(LAST_SCORES, lambda p: (p.q(), p.k(), torch.ones(2, 3), torch.tensor([0, 1])), first=0, last=3),
        ),
    ),
    "selected: q and k together": (
        "3 tensors, expected q, k, scale, selected",
        after(
            Peer.residual,
            given(LAST_SCORES, lambda p: (p.qk(), torch.ones(2, 3), torch.tensor([0, 1])), first=0, last=3),
        ),
    ),
    "selected: more rows than one go on": (
        "selected: 3 rows, expected those of the residual stream in this lane",
        after(
            Peer.residual,
            given("select o add norm gate_up", lambda p: (p.attended(), torch.tensor([0, 1]))),
        ),
    ),
    "selected: before attention in the TEE, beyond": (
        "selected: 0 to 3, expected 0 to 2",
        after(
            Peer.residual,
            given("select o add norm gate_up", lambda p: (p.attended(1), torch.tensor([0, 3]))),
        ),
    ),
    "minimal, selected: beyond": ("selected: ", minimal_selecting(torch.tensor([0, 3]))),
    "minimal, selected: two dimensions": ("selected: ", minimal_selecting(torch.tensor([[0, 1]]))),
    "minimal, selected: floats": ("selected: ", minimal_selecting(torch.tensor([0.0, 1.0]))),
    "selected: all rows asked for": (
        "blocks: ",
        after(Peer.minimal, given(NEXT_SELECTS, lambda p: (p.h(), p.ids()[:, 0]), first=0, last=9)),
    ),
    # what a norm left
    "scales: another dtype": ("scale: float64", scaled(torch.ones(2, 3, dtype=torch.float64))),
    "scales: other rows": ("scale: ", scaled(torch.ones(2, 2))),
    "scales: another batch": ("scale: ", scaled(torch.ones(1, 3))),
    "scale: for many rows": (
        "scale: 1.0 for 6 rows",
        after_qkv(SCALED_SCORES, lambda p: (p.qk(),), first=0, last=3, scale=1.0),
    ),
    "scale: a word": ("scale: 'x'", after_qkv(SCALED_SCORES, lambda p: (p.qk(),), first=0, last=3, scale="x")),
    "scale: a bool": ("scale: True ", after_qkv(SCALED_SCORES, lambda p: (p.qk(),), first=0, last=3, scale=True)),
    "scale: an int": ("scale: 1 ", after_qkv(SCALED_SCORES, lambda p: (p.qk(),), first=0, last=3, scale=1)),
    "scales: of no values": (
        "start: 0, expected where this lane's values were put",
        given(SCALED_SCORES, lambda p: (p.qk(), torch.ones(2, 3)), first=0, last=3),
    ),
    "scales: of fewer values": (
        "start: 0, expected where this lane's values were put",
        after_qkv(SCALED_SCORES, lambda p: (p.qk(5), torch.ones(2, 5)), first=0, last=5),
    ),
    "scales: minimal, other rows": (
        "scale: ",
        after(Peer.minimal, given(SCALED_GATE_UP, lambda p: (p.packed(), torch.ones(2, 1)))),
    ),
    "scales: minimal, elsewhere": (
        "start: 3, expected where this lane's rows were put",
        after(Peer.minimal, given(SCALED_GATE_UP, lambda p: (p.packed(), torch.ones(2, 3)), start=3)),
    ),
    "scales: none": ("1 tensors, expected qk, scale", after_qkv(SCALED_SCORES, lambda p: (p.qk(),), first=0, last=3)),
    "scales: both": (
        "q: ",
        after_qkv(SCALED_SCORES, lambda p: (p.qk(), torch.ones(2, 3)), first=0, last=3, scale=1.0),
    ),
    # the residual stream
    "h: without a residual stream": ("residual stream in this lane", given(DOWN_QKV, lambda p: (p.h(),))),
    "h: other rows": (
        "rows, expected .2, 3., of the residual",
        after(Peer.residual, given(DOWN_QKV, lambda p: (p.h(2),))),
    ),
    "h: of another lane": (
        "residual stream in this lane",
        after(Peer.residual, given(DOWN_LOGITS, lambda p: (p.h(),), lane=1)),
    ),
    "h: another batch": ("gated: ", after(Peer.residual, given(DOWN_LOGITS, lambda p: (p.h(3, 1),)))),
    "h: another width": ("gated: ", after(Peer.residual, given(DOWN_QKV, lambda p: (p.x(),)))),
    "h: another dtype": ("gated: float16", after(Peer.residual, given(DOWN_QKV, lambda p: (p.h().half(),)))),
    "h: behind the last layer": (
        "layer: 2, expected 0 to 1",
        after(Peer.residual, given(DOWN_QKV, lambda p: (p.h(),), layer=2)),
    ),
    "h: nothing": ("0 tensors, expected gated", after(Peer.residual, simple(DOWN_QKV))),
    "h: three": ("3 tensors, expected gated", given(NEXT, lambda p: (p.h(),) * 3)),
    "h: no rotary tables": (
        "lane: no rotary tables",
        after(Peer.residual, given(NEXT, lambda p: (p.h(),), first=0, last=3)),
    ),
    # rotary tables
    "cos: too wide": ("cos: ", tables(lambda p: torch.ones(1, 3, p.config.head_dim // 2 + 1))),
    "cos: no width": ("cos: ", tables(lambda p: torch.ones(1, 3, 0))),
    "cos: other rows": ("cos: ", tables(lambda p: p.table(2))),
    "cos: another batch": ("cos: ", tables(lambda p: p.table(3, 3))),
    "cos: two dimensions": ("cos: ", tables(lambda p: p.table()[0])),
    "cos: a scalar": ("cos: ", tables(lambda p: torch.tensor(1.0))),
    "cos: another dtype": ("cos: bfloat16", tables(lambda p: p.table().bfloat16())),
    "sin: another shape": ("sin: ", tables(lambda p: p.table(), lambda p: p.table(3, 2))),
    "sin: another dtype": ("sin: float64", tables(lambda p: p.table(), lambda p: p.table().double())),
    "sin: missing": ("2 tensors, expected ids, cos, sin", given(FIRST, lambda p: (p.ids(), p.table()))),
}


def fails(peer: Peer, text: str, op: str, tensors: tuple[torch.Tensor, ...], attrs: dict[str, Any]) -> None:
    with pytest.raises(RemoteOpError, match=f"^{op}: (SettingError|TensorError|LimitError): .*{text}") as error:
        peer.channel.call(op, *tensors, **attrs)
    assert len(str(error.value)) < 400


def refused(peer: Peer, text: str, steps: Any, tensors: tuple[torch.Tensor, ...], attrs: dict[str, Any]) -> None:
    fails(peer, text, "run", tensors, attrs if steps is None else {**attrs, "steps": steps})


@pytest.mark.parametrize("name", CASES)
def test_what_does_not_fit_is_refused_by_name(make_peer: Callable[..., Peer], name: str) -> None:
    peer = make_peer()
    text, case = CASES[name]
    refused(peer, text, *case(peer))
    peer.works()
    peer.channel.call("truncate", session=peer.session, length=0)
    peer.scores()  # the session itself can be used, too
    peer.run("values o", peer.packed())


NUMBERS: list[Any] = [None, -1, 2**40, 2**62, "0", "", 0.0, [0], ["0"], [], b"0", math.nan, True, False, [0.5], [True]]


@pytest.mark.parametrize("steps", ["embed", QKV, SCORES, "store_k", "gate_up", SCALED_GATE_UP, NEXT, "lm_head"])
@pytest.mark.parametrize("field", ["session", "lane", "layer", "start"])
def test_where_it_is_about_is_checked(make_peer: Callable[..., Peer], steps: str, field: str) -> None:
    peer = make_peer()
    layers = 2 if steps == NEXT else 3
    bounds = {"session": [0, peer.session + 1], "lane": [MAX_LANES], "layer": [layers], "start": [2**31]}
    for value in [*NUMBERS, *bounds[field]]:
        attrs = {**peer.at(), field: value}
        if value is None:
            del attrs[field]
        refused(peer, f"{field}: ", steps, (peer.ids(),), attrs)
    assert peer.known.executor.sessions.nbytes == 0
    peer.works()


@pytest.mark.parametrize("field", ["session", "length"])
def test_truncating_to_what_is_no_length(make_peer: Callable[..., Peer], field: str) -> None:
    peer = make_peer()
    for value in NUMBERS:
        attrs = {"session": peer.session, "length": 0, field: value}
        if value is None:
            del attrs[field]
        fails(peer, f"{field}: ", "truncate", (), attrs)
        if field == "session" and value is not None:
            fails(peer, "session: ", "close", (), {"session": value})
    peer.works()


INDICES: dict[str, tuple[str, tuple[torch.Tensor, ...]]] = {
    "negative": ("indices: -1 to 0", (torch.tensor([0, -1]),)),
    "beyond": ("indices: 2 to 2", (torch.tensor([2]),)),
    "huge": ("indices: ", (torch.tensor([2**62]),)),
    "int32": ("indices: int32", (torch.tensor([0], dtype=torch.int32),)),
    "floats": ("indices: float32", (torch.tensor([0.0]),)),
    "two dimensions": ("indices: ", (torch.tensor([[0]]),)),
    "none": ("indices: 0 of them", (torch.zeros(0, dtype=torch.int64),)),
    "far too many": ("indices: 65537 of them", (torch.zeros(2**16 + 1, dtype=torch.int64),)),
    "more than there is memory for": ("KV caches of ", (torch.zeros(2**16, dtype=torch.int64),)),
    "nothing": ("0 tensors, expected indices", ()),
    "two": ("2 tensors, expected indices", (torch.tensor([0]),) * 2),
}


@pytest.mark.parametrize("name", INDICES)
def test_reordering_to_what_is_not_there(make_peer: Callable[..., Peer], name: str) -> None:
    peer = make_peer()
    peer.scores()
    text, tensors = INDICES[name]
    nbytes = peer.known.executor.sessions.nbytes
    fails(peer, text, "reorder", tensors, {"session": peer.session})
    assert peer.known.executor.sessions.nbytes == nbytes
    peer.scores(start=3, positions=6)
    peer.works()


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("batch", [*NUMBERS, 0, 2**16 + 1]),
        ("capacity", [value for value in NUMBERS if value != 0] + [2**31 + 1]),
        ("dtype", ["float64", "int8", "", None, 0, ["float32"], b"float32", "FLOAT32"]),
    ],
)
def test_opening_what_makes_no_sense(make_peer: Callable[..., Peer], field: str, values: list[Any]) -> None:
    peer = make_peer()
    for value in values:
        attrs = {"batch": 1, "capacity": 0, "dtype": "float32", field: value}
        if value is None:
            del attrs[field]
        fails(peer, f"{field}: ", "open", (), attrs)
    assert len(peer.known.executor.sessions) == 1
    peer.works()


@pytest.mark.parametrize(("batch", "capacity"), [(2**16, 2**31), (1, 2**31), (2**16, 0), (2, 2**20)])
def test_nothing_is_allocated_on_a_peers_word(
    make_peer: Callable[..., Peer], monkeypatch: pytest.MonkeyPatch, batch: int, capacity: int
) -> None:
    peer = make_peer()
    number = peer.open(batch, capacity)
    asked: list[int] = []
    work = type(peer.known.executor.device.work().__enter__())
    empty = work.empty

    def counting(self: Any, shape: Any, dtype: torch.dtype) -> torch.Tensor:
        asked.append(math.prod(shape) * dtype.itemsize)
        return empty(self, shape, dtype)

    monkeypatch.setattr(work, "empty", counting)
    refused(peer, "KV caches of .* expected at most", QKV, (peer.x(1, batch),), peer.at(session=number))
    refused(peer, "KV caches of .* expected at most", "store_k", (peer.k(1, batch),), peer.at(session=number))
    assert max(asked, default=0) <= 4 * batch * peer.config.hidden_size
    assert peer.known.executor.sessions.nbytes == 0
    monkeypatch.undo()
    peer.works()


def test_scores_may_be_asked_for_twice_and_come_back_once(make_peer: Callable[..., Peer]) -> None:
    peer = make_peer()
    peer.scores()
    peer.scores(2, 5)
    refused(peer, "weights: ", "values o", (peer.packed(900, 5),), peer.at())
    peer.scores(2, 5)
    peer.run("values o", peer.packed(2, 5))
    refused(peer, "lane: no scores", "values o", (peer.packed(2, 5),), peer.at())
    peer.works()


def test_scores_of_what_was_truncated_do_not_come_back(make_peer: Callable[..., Peer]) -> None:
    peer = make_peer()
    for forget in (
        lambda: peer.channel.call("truncate", session=peer.session, length=1),
        lambda: peer.channel.call("reorder", torch.tensor([1, 0]), session=peer.session),
    ):
        peer.scores(start=0)
        forget()
        refused(peer, "lane: no scores", "values o", (peer.packed(),), peer.at())
    peer.scores(100, 100)
    peer.run(QKV, peer.x(1), lane=1)  # from the start again: there is one value now
    refused(peer, "layer: 1 values there, expected 100", "values o", (peer.packed(100, 100),), peer.at())
    peer.works()


@pytest.mark.parametrize("again", [False, True])
def test_rows_are_only_kept_of_a_residual_stream_that_has_them(make_peer: Callable[..., Peer], again: bool) -> None:
    """On a GPU an index out of range ends the process's use of it, for all clients."""
    peer = make_peer()
    peer.residual(3 if again else 2)
    peer.run(QKV, peer.x(3))
    tensors = peer.q(1), peer.k(), torch.ones(2, 3), torch.tensor([2, 2])
    attrs = {"blocks": [0, 1, 0, 3]}
    if again:
        peer.run(LAST_SCORES, *tensors, **attrs)
    text = "selected: 3 rows, expected those of the residual stream in this lane"
    refused(peer, text, LAST_SCORES, tensors, {**peer.at(), **attrs})
    peer.works()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_only_the_sessions_own_dtype_is_taken(make_peer: Callable[..., Peer], dtype: str) -> None:
    peer = make_peer()
    at = peer.at(session=peer.open(2, 0, dtype))
    for other in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8):
        if other == getattr(torch, dtype):
            (qk,) = peer.run(QKV, peer.x().to(other), **at)
            assert qk.dtype == other
        else:
            name = str(other).removeprefix("torch.")
            refused(peer, f"normed: {name} .*, expected {dtype}", QKV, (peer.x().to(other),), at)
    peer.works()


@pytest.mark.parametrize("family", ["attention bias", "qwen3", "gemma2"])
@pytest.mark.parametrize("steps", [text for text, steps in STEP_LISTS.items() if "norm" in steps])
def test_operations_that_a_model_does_not_have(make_peer: Callable[..., Peer], family: str, steps: str) -> None:
    """Refused before anything is looked at, and nothing is changed."""
    if family != "gemma2" and "rope" not in steps:
        pytest.skip("this model has them")
    peer = make_peer(family)
    text = "stand between what folding puts together" if family == "gemma2" else "of q and k come between"
    peer.scores()
    nbytes = peer.known.executor.sessions.nbytes
    for tensors in ((), (peer.ids(),), (peer.packed(),), (peer.h(),)):
        refused(peer, text, steps, tensors, {**peer.at(), "first": 0, "last": 3})
    assert peer.known.executor.sessions.nbytes == nbytes
    peer.run("values o", peer.packed())
    peer.works()


# ---- every list of steps ---------------------------------------------------------------------------------------------

NO_STEPS: list[Any] = [
    *(None, "", " ", "embed ", " embed", "embed  norm qkv", "EMBED", "embed\n", "embed,norm", "attention", "softmax"),
    *(
        "norm",
        "add",
        "rope",
        "select",
        "tables",
        "scores",
        "values",
        "residual",
        "store",
        "describe",
        "run",
        "__init__",
    ),
    *("embed embed", "qkv store_v store_v", "store_k store_k scores", "down add add norm lm_head"),
    *("scores store_k", "o values", "norm embed qkv", "lm_head norm add down", "store_v qkv"),
    *("embed norm lm_head", "embed norm gate_up", "down add norm gate_up", "o add norm lm_head"),
    *(" ".join(STEPS), "embed " * 100, "x" * 2**15),
    *(["embed"], ["embed", "norm", "qkv", "store_v"], [], [1], 0, 1, 1.5, True, b"embed", b""),
]


@pytest.mark.parametrize("value", NO_STEPS, ids=lambda value: repr(value)[:30])
def test_what_is_no_list_of_steps(make_peer: Callable[..., Peer], value: Any) -> None:
    peer = make_peer()
    refused(peer, "steps: ", value, (peer.ids(),), peer.at())
    peer.works()


def test_steps_in_an_order_that_no_plan_has(make_peer: Callable[..., Peer]) -> None:
    peer = make_peer()
    lists = {" ".join(pair) for pair in itertools.product(STEPS, repeat=2)}
    lists |= {
        " ".join(order) for text in STEP_LISTS.values() if len(text) < 5 for order in itertools.permutations(text)
    }
    lists |= {" ".join(text[:-1]) for text in STEP_LISTS.values()} | {
        " ".join(text[1:]) for text in STEP_LISTS.values()
    }
    for text in lists - set(STEP_LISTS) - {""}:
        refused(peer, "steps: ", text, (peer.ids(),), peer.at())
    peer.works()


def valid(peer: Peer, text: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors by name, and attributes, with which a list of steps runs behind the minimal plan's first call."""
    steps, config, rows = STEP_LISTS[text], peer.config, 3
    shapes, blocks = Shapes(config, "float32"), [Block(0, rows, 0, rows)]
    tensors = {}
    for name in signature(steps, joined=False)[0]:
        shape = shapes.shape(name, 2, rows, "select" in steps and name in ("q", "attended"), blocks)
        dtype = getattr(torch, shapes.dtype(name))
        tensors[name] = torch.zeros(shape, dtype=dtype) if dtype == torch.int64 else torch.ones(shape, dtype=dtype)
    return tensors, {**peer.at(), **({"first": 0, "last": rows} if "scores" in steps else {})}


def renew(peer: Peer) -> None:
    peer.channel.call("truncate", session=peer.session, length=0)
    peer.minimal()


@pytest.mark.matrix(one_in=4, each=False)
@pytest.mark.parametrize("text", STEP_LISTS)
def test_every_list_of_steps_takes_what_the_contract_says_and_nothing_else(
    make_peer: Callable[..., Peer], text: str
) -> None:
    peer = make_peer()
    renew(peer)
    tensors, attrs = valid(peer, text)
    names = list(tensors)
    replies = peer.channel.call("run", *tensors.values(), **attrs, steps=text)
    assert len(replies) == len(signature(STEP_LISTS[text], joined=False)[1])
    wrong: list[tuple[str, list[torch.Tensor]]] = []
    for index, (name, tensor) in enumerate(tensors.items()):
        own = {torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8} - {tensor.dtype}
        changed = [tensor.to(dtype) for dtype in own]
        changed += [tensor[None], tensor[0], tensor.flatten()[:0], tensor.new_zeros(())]
        if tensor.dim() > 1:
            changed.append(tensor.flatten())
        for dim in range(tensor.dim()):
            if dim == 1 and name not in ("v", "scale", "selected", "cos", "sin"):
                changed.append(tensor.narrow(1, 0, 0))  # how many rows there are may be free
            else:
                changed.append(torch.cat([tensor, tensor.narrow(dim, 0, 1)], dim))
                changed.append(tensor.narrow(dim, 1, tensor.shape[dim] - 1))
        before, after_it = list(tensors.values())[:index], list(tensors.values())[index + 1 :]
        wrong += [(name, [*before, each.contiguous(), *after_it]) for each in changed]
    for name, given in wrong:
        renew(peer)
        field = (
            "(q|qk|k|v|sin|cos|selected|scale|weights|attended|lane|start|ids|[0-9]|.2, )" if len(names) > 1 else name
        )
        refused(peer, field, text, tuple(given), attrs)
    for count in {0, len(names) - 1, len(names) + 1, len(names) + 5} - {len(names)}:
        renew(peer)
        given = ([*tensors.values()] * 3 + [torch.ones(1)] * 6)[:count]
        refused(peer, "", text, tuple(given), attrs)
    for name, value in (("ids", 97), ("ids", -1), ("ids", 2**62), ("selected", 3), ("selected", -1)):
        if name in names:
            renew(peer)
            given = [tensor.clone().fill_(value) if each == name else tensor for each, tensor in tensors.items()]
            refused(peer, f"{name}: ", text, tuple(given), attrs)
    for value in (0.5, "x", True, 1, b"1", [1.0]):
        if "scale" in names:  # of six rows
            renew(peer)
            given = [tensor for name, tensor in tensors.items() if name != "scale"]
            refused(peer, "scale: ", text, tuple(given), {**attrs, "scale": value})
    renew(peer)
    peer.channel.call("run", *tensors.values(), **attrs, steps=text)
    peer.works()


STATE = {"values", "add", "select", "scale_v", "scale_kv"}


@pytest.mark.parametrize("text", STEP_LISTS)
def test_steps_need_what_a_lane_has(make_peer: Callable[..., Peer], text: str) -> None:
    """In a session where nothing was done, and in a lane where nothing was done."""
    peer = make_peer()
    steps = set(STEP_LISTS[text])
    tensors, attrs = valid(peer, text)
    if ("embed" in steps or not steps & STATE) and text != "store_v":
        peer.channel.call("run", *tensors.values(), **attrs, steps=text)
        return
    state = "(lane|start|v|scale): |rows, expected"
    refused(peer, state, text, tuple(tensors.values()), attrs)
    renew(peer)
    if steps != {"store_k", "scale_v", "scores"} and steps != {"store_k", "scale_v"}:  # values are the session's
        refused(peer, state, text, tuple(tensors.values()), {**attrs, "lane": 1})
    peer.channel.call("run", *tensors.values(), **attrs, steps=text)
    peer.works()


@pytest.mark.parametrize("text", [text for text, steps in STEP_LISTS.items() if "scores" in steps])
def test_every_list_with_scores_needs_blocks(make_peer: Callable[..., Peer], text: str) -> None:
    peer = make_peer()
    for blocks in (
        {},
        {"last": 3},
        {"blocks": []},
        {"blocks": [0, 2, 0, 3]},
        {"first": 0, "last": 99},
        {"blocks": "x"},
    ):
        renew(peer)
        tensors, attrs = valid(peer, text)
        del attrs["first"], attrs["last"]
        refused(peer, "blocks: ", text, tuple(tensors.values()), {**attrs, **blocks})
    peer.works()


def test_many_wrong_requests_on_one_connection(make_peer: Callable[..., Peer]) -> None:
    peer = make_peer()
    for turn, (text, case) in enumerate(CASES.values()):
        peer.session = peer.open()
        refused(peer, text, *case(peer))
        peer.channel.call("close", session=peer.session)
        if turn % 20 == 0:
            peer.works()
    peer.works()
    assert peer.known.executor.sessions.nbytes == 0


@pytest.mark.parametrize("query", ["", "?shm=off"], ids=["shm", "socket"])
def test_what_is_behind_the_scores_is_nobody_elses(
    make_peer: Callable[..., Peer], connect: Callable[..., Any], query: str
) -> None:
    """A message of scores has some elements of no meaning at its end, in memory that others' tensors were in before."""
    peer = make_peer(query=query)
    other = Peer(peer.known, connect(peer.channel.uri, arrays="torch"))
    secret, rows = 12345.0, 61
    elements = 2 * other.config.num_attention_heads * rows * rows
    sent = packed_elements(2, other.config.num_attention_heads, [Block(0, rows, 0, rows)])
    assert sent > elements
    other.run(QKV, other.x(rows))
    for _ in range(5):
        refused(peer, "session: ", "values o", (torch.full((sent,), secret),), peer.at(session=2**40))
        (packed,) = other.run(SCORES, other.qk(rows), first=0, last=rows)
        assert packed.shape == (sent,)
        assert not bool(packed[elements:].any())
    peer.works()


# ---- executors that lie ----------------------------------------------------------------------------------------------

OPS = {
    name: list(
        dict.fromkeys(
            stage.text for stage in plan.with_embedding.schedule(3, selects=True) if isinstance(stage, PlanCall)
        )
    )
    for name, plan in PLANS.items()
}
"""Plan -> the steps of its calls for a prompt, where the TEE side has a trusted copy."""
CALLS = [(plan, steps) for plan, calls in OPS.items() for steps in calls]


@pytest.fixture
def lied_to(
    known: Callable[[str], Known], unix_uri: str, serve: Callable[..., Any], connect: Callable[..., Any]
) -> Iterator[Callable[..., Runner]]:
    """A runner whose executor changes its replies by `lie(call, reply)` for an operation, or the calls of `run` with
    some steps."""
    numbers = itertools.count()
    with torch.inference_mode():

        def make(plan: str, op: str, lie: Callable[[fastsplit.Call, list[torch.Tensor]], Any]) -> Runner:
            truth = known("grouped heads")
            handlers = dict(truth.executor.handlers)
            steps, op = (op, "run") if op in STEP_LISTS else (None, op)
            honest = handlers[op]

            def lying(call: fastsplit.Call) -> Any:
                with torch.inference_mode():  # as the executor's own handlers, whose tensors are changed here
                    reply = honest(call)
                    if call.attrs.get("steps") != steps:
                        return reply
                    tensors = list(reply) if isinstance(reply, (tuple, list)) else [] if reply is None else [reply]
                    return lie(call, tensors)

            handlers[op] = lying
            server = serve(f"{unix_uri}{next(numbers)}", handlers, arrays="torch")
            channel = connect(server.uri, arrays="torch", call_timeout_s=20)
            return Runner(RemoteModel.fetch(channel, truth.model), channel, plan)

        yield make


@pytest.mark.parametrize("number", ["1", "", 1.0, [1], b"1", None, True, [True]])
def test_a_session_that_has_no_number(lied_to: Callable[..., Runner], number: Any) -> None:
    def lie(call: fastsplit.Call, reply: list[torch.Tensor]) -> None:
        del call.reply_attrs["session"]
        if number is not None:
            call.reply_attrs["session"] = number

    with pytest.raises(RemoteProtocolError, match=r"open, session: .*, expected an int"):
        lied_to("auto", "open", lie).new_cache()


LIES: dict[str, Callable[[fastsplit.Call, list[torch.Tensor]], Any]] = {
    "nothing": lambda call, reply: None,
    "one too many": lambda call, reply: [*reply, reply[0]],
    "one too few": lambda call, reply: reply[1:],
    "another dtype": lambda call, reply: [tensor.double() for tensor in reply],
    "a row less": lambda call, reply: [tensor[..., 1:].contiguous() for tensor in reply],
    "flat": lambda call, reply: [tensor[None] for tensor in reply],
    "the other way round": lambda call, reply: [tensor.transpose(0, -1).contiguous()[None] for tensor in reply],
}


@pytest.mark.matrix(one_in=4, each=False)
@pytest.mark.parametrize(("plan", "op"), CALLS)
def test_replies_of_the_wrong_shape(lied_to: Callable[..., Runner], plan: str, op: str) -> None:
    for name, lie in LIES.items():
        steps = lied_to(plan, op, lie).generate(PROMPT, 3)
        try:
            text = f"token {next(steps)}"
        except RemoteProtocolError as error:
            text = str(error)
        assert "a reply" in text, name


@pytest.mark.parametrize("op", ["open", "truncate", "reorder", "close"])
def test_tensors_that_nobody_asked_for(lied_to: Callable[..., Runner], op: str) -> None:
    runner = lied_to("auto", op, lambda call, reply: torch.ones(5))

    def use() -> None:
        with runner.new_cache(2) as cache:
            cache.truncate(0)
            cache.reorder(torch.tensor([0]))

    with pytest.raises(RemoteProtocolError, match="a reply"):
        use()


@pytest.mark.parametrize("plan", OPS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers(lied_to: Callable[..., Runner], plan: str, value: float) -> None:
    calls = 0

    def lie(call: fastsplit.Call, reply: list[torch.Tensor]) -> list[torch.Tensor]:
        nonlocal calls
        calls += 1
        if calls == 3:
            reply[-1][..., 7] = value
        return reply

    runner = lied_to(plan, OPS[plan][-1], lie)
    steps = runner.generate(PROMPT, 5)
    assert len([next(steps), next(steps)]) == 2
    with pytest.raises(RemoteProtocolError, match="logits: NaN or infinite"):
        next(steps)


@pytest.mark.matrix(one_in=4, each=False)
@pytest.mark.parametrize(("plan", "op"), CALLS)
def test_numbers_out_of_all_measure_are_tokens_or_one_clear_error(
    lied_to: Callable[..., Runner], plan: str, op: str
) -> None:
    value: float | None = None

    def lie(call: fastsplit.Call, reply: list[torch.Tensor]) -> list[torch.Tensor]:
        return reply if value is None else [tensor.fill_(value) for tensor in reply]

    runner = lied_to(plan, op, lie)
    honest = list(runner.generate(PROMPT, 3))
    for value in (math.nan, math.inf, -math.inf, 3e38, 1e-45, 0.0):
        try:
            tokens = list(runner.generate(PROMPT, 3))
        except RemoteProtocolError as error:
            tokens, text = [], str(error)
        else:
            text = "no error"
        assert ("logits: NaN or infinite" in text) if not tokens else len(tokens) == 3, value
        assert all(0 <= token < 97 for token in tokens)
    value = None
    assert list(runner.generate(PROMPT, 3)) == honest, "nothing stays behind"


def test_plans_are_all_lied_to() -> None:
    assert set(OPS) == set(PLANS)
    assert block_attrs([Block(0, 3, 0, 3)]) == {"first": 0, "last": 3}, "as these tests send them"

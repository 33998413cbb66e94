"""What a forward pass moves, call by call: steps and bytes are those of a formula (split.py), in every plan; in
tee-attention in all of its four forms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import fastsplit
from fastsplit.split.blocks import choose_block_rows
from fastsplit.split.plan import PLANS
from fastsplit.tee.remote import RemoteModel
from fastsplit.tee.runner import Runner
from fastsplit.wire.stats import Stats

pytest.importorskip("transformers")
from split import CONFIGS, PACKED_MULTIPLE, Message, cut_as_with_scores, make_model, messages, split

pytestmark = pytest.mark.matrix(one_in=4, each=False)

HEAD_NBYTES = 600
"""More than a message's head and metadata take, where it has few blocks of scores."""
SETUP_CALLS = 2
"""describe, tee_weights; then every cache has an open and a close."""
PROMPTS = [1, 2, 40, 200]
"""One row, a block, and several."""
SMALL = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 3, "num_key_value_heads": 1}


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return f"unix://{tmp_path}/split.sock"


class Watched:
    """A backend that writes down what goes through it."""

    def __init__(self, channel: fastsplit.Channel) -> None:
        self.seen: list[Message] = []
        self.dtypes: list[str] = []
        """Of all tensors that were sent."""
        self._channel = channel

    @property
    def stats(self) -> Stats:
        return self._channel.stats

    def empty(self, shape: Sequence[int], dtype: Any) -> Any:
        return self._channel.empty(shape, dtype)

    def call(self, op: str, /, *tensors: torch.Tensor, expect: Any = None, **attrs: Any) -> Any:
        sent = sum(tensor.nbytes for tensor in tensors)
        reply = self._channel.call(op, *tensors, expect=expect, **attrs)
        self.seen.append(Message(attrs.get("steps", op), sent, sum(tensor.nbytes for tensor in reply)))
        self.dtypes += [str(tensor.dtype).removeprefix("torch.") for tensor in tensors]
        return reply

    def submit(self, op: str, /, *tensors: torch.Tensor, expect: Any = None, **attrs: Any) -> Any:
        raise AssertionError("one lane waits for each reply")

    def taken(self) -> list[Message]:
        """What was seen since the last time."""
        seen, self.seen = self.seen, []
        return seen


def _formula(*args: Any, **options: Any) -> list[Message]:
    return [message._replace(private=0) for message in messages(*args, **options)]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    "name", ["grouped heads", "one kv head for all", "head_dim is not hidden / heads", "mistral", "qwen3", "phi3"]
)
def test_every_call_moves_what_the_formula_says_and_nothing_else(
    tmp_path: Path, uri: str, name: str, plan: str
) -> None:
    model = make_model(tmp_path / "model", CONFIGS[name])
    with split(model, uri, plan=plan) as (first, channel):
        backend = Watched(channel)
        runner = Runner(RemoteModel.fetch(channel, model), backend, plan)
        assert runner.plan == first.plan
        for prompt in PROMPTS:
            for keep in ("last", "all"):
                with runner.new_cache(1, prompt + 3) as cache:
                    backend.taken()
                    for rows in (prompt, 1, 1, 7):
                        expected = _formula(model.config, runner.plan, rows=rows, start=cache.length, keep=keep)
                        runner.forward(torch.arange(rows).unsqueeze(0) % 97, cache, keep=keep)
                        assert backend.taken() == expected


@pytest.mark.parametrize("name", ["grouped heads", "attention bias", "qwen3", "gemma2", "gemma3"])
@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_form_of_attention_in_the_tee_moves_what_the_formula_says(
    tmp_path: Path, uri: str, name: str, trusted: bool, dtype: str
) -> None:
    """Token ids go to the executor only where the TEE has no copy of the embedding's weights; and rows of the last
    layer only where one of them goes on."""
    model = make_model(tmp_path / "model", CONFIGS[name])
    exact = name.startswith("gemma") or dtype == "float16"
    itemsize = 4 if dtype == "float32" else 2
    with split(model, uri, plan="tee-attention", dtype=dtype) as (_, channel):
        backend = Watched(channel)
        runner = Runner(RemoteModel.fetch(channel, model if trusted else None), backend, "tee-attention")
        for prompt in (1, 40):
            for keep in ("last", "all"):
                with runner.new_cache(1, prompt + 3) as cache:
                    backend.taken()
                    backend.dtypes.clear()
                    for rows in (prompt, 1, 7):
                        expected = _formula(
                            model.config,
                            "tee-attention",
                            rows=rows,
                            start=cache.length,
                            keep=keep,
                            itemsize=itemsize,
                            with_embedding=trusted,
                            exact=exact,
                        )
                        runner.forward(torch.arange(rows).unsqueeze(0) % 97, cache, keep=keep)
                        assert backend.taken() == expected
                    selected = 0 if exact or keep == "all" else (prompt > 1) + 1
                    assert backend.dtypes.count("int64") == (0 if trusted else 3) + selected
                    assert set(backend.dtypes) <= {dtype, "int64"}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_batch_moves_what_its_sequences_do(tmp_path: Path, uri: str, dtype: str, plan: str) -> None:
    model = make_model(tmp_path / "model", {})
    with split(model, uri, plan=plan, dtype=dtype) as (_, channel):
        backend = Watched(channel)
        runner = Runner(RemoteModel.fetch(channel, model), backend, plan)
        itemsize = 2 if dtype == "bfloat16" else 4
        with runner.new_cache(3) as cache:
            for rows in (30, 1, 4):
                backend.taken()
                expected = _formula(
                    model.config, runner.plan, rows=rows, start=cache.length, batch=3, itemsize=itemsize
                )
                runner.forward(torch.arange(3 * rows).view(3, rows) % 97, cache)
                assert backend.taken() == expected


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("layers", [1, 3, 22, 30])
def test_calls_of_prefill_and_of_each_step(tmp_path: Path, uri: str, layers: int, plan: str) -> None:
    """And all bytes through the socket: tensors, and a bounded head for each message."""
    model = make_model(tmp_path / "model", {**SMALL, "num_hidden_layers": layers})
    prompt, steps = 20, 3
    per_layer, once = PLANS[plan].call_counts
    calls = per_layer * layers + once
    with split(model, f"{uri}?shm=off", plan=plan) as (runner, channel):
        assert runner.plan == plan
        before = channel.stats.as_dict()
        assert before["calls"] == SETUP_CALLS
        opened = 1
        for step, _ in enumerate(runner.generate(torch.arange(prompt), 1 + steps)):
            after = channel.stats.as_dict()
            grown = {key: after[key] - before[key] for key in after}
            rows, start = (prompt, 0) if step == 0 else (1, prompt + step - 1)
            expected = messages(model.config, plan, rows=rows, start=start)
            assert len(expected) == calls
            assert grown["calls"] == calls + opened
            for way, nbytes in (
                ("bytes_sent", sum(message.sent for message in expected)),
                ("bytes_received", sum(message.received for message in expected)),
            ):
                assert 0 < grown[way] - nbytes < HEAD_NBYTES * (calls + opened)
            assert grown["bytes_copied"] == 0
            before, opened = after, 0
        assert channel.stats.calls == SETUP_CALLS + 1 + (1 + steps) * calls + 1
        assert runner.recorder.rpc_calls == (1 + steps) * calls


@pytest.mark.parametrize("plan", PLANS)
def test_heads_do_not_grow_with_the_prompt_but_for_its_blocks(tmp_path: Path, uri: str, plan: str) -> None:
    model = make_model(tmp_path / "model", {})
    rows = 500
    with split(model, f"{uri}?shm=off", plan=plan) as (runner, channel), runner.new_cache(1, rows) as cache:
        before = channel.stats.as_dict()
        runner.forward(torch.arange(rows).unsqueeze(0) % 97, cache, keep="all")
        after = channel.stats.as_dict()
    expected = messages(model.config, plan, rows=rows, keep="all")
    block_nbytes = 4 * 8 * -(-rows // choose_block_rows(rows))
    sent, received = (
        after[key] - before[key] - sum(nbytes)
        for key, nbytes in (
            ("bytes_sent", [message.sent for message in expected]),
            ("bytes_received", [message.received for message in expected]),
        )
    )
    assert 0 < sent < (HEAD_NBYTES + block_nbytes) * len(expected)
    assert 0 < received < HEAD_NBYTES * len(expected)


@pytest.mark.parametrize("plan", ["fused", "folded", "minimal"])
def test_v_and_the_cache_never_travel(tmp_path: Path, uri: str, plan: str) -> None:
    """Whatever is in the cache, a step moves the same bytes, but for scores."""
    model = make_model(tmp_path / "model", {"max_position_embeddings": 2048})
    config = model.config
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    with split(model, f"{uri}?shm=off", plan=plan) as (_, channel):
        backend = Watched(channel)
        runner = Runner(RemoteModel.fetch(channel, model), backend, plan)
        sizes = {}
        for past in (5, 1023, 2047):
            with runner.new_cache(1, past + 1) as cache:
                runner.forward(torch.arange(past).unsqueeze(0) % 97, cache)
                backend.taken()
                runner.forward(torch.tensor([[3]]), cache)
                seen = backend.taken()
                sizes[past] = (sum(message.sent for message in seen), sum(message.received for message in seen))
    scores_nbytes = 4 * 1024 * heads * layers
    assert [more - less for less, more in zip(sizes[1023], sizes[2047])] == [scores_nbytes, scores_nbytes]
    less_nbytes = scores_nbytes - 4 * PACKED_MULTIPLE * layers  # 6 * 6 scores are rounded up
    assert [more - less for less, more in zip(sizes[5], sizes[1023])] == [less_nbytes, less_nbytes]


def test_steps_move_the_same_whatever_is_in_the_cache_where_the_cache_is_in_the_tee(tmp_path: Path, uri: str) -> None:
    """No scores: not even these grow."""
    model = make_model(tmp_path / "model", {"max_position_embeddings": 2048})
    with split(model, uri, plan="tee-attention") as (_, channel):
        backend = Watched(channel)
        runner = Runner(RemoteModel.fetch(channel, model), backend, "tee-attention")
        seen = []
        for past in (5, 1023, 2047):
            with runner.new_cache(1, past + 1) as cache:
                runner.forward(torch.arange(past).unsqueeze(0) % 97, cache)
                backend.taken()
                runner.forward(torch.tensor([[3]]), cache)
                seen.append(backend.taken())
    assert seen[0] == seen[1] == seen[2] == _formula(model.config, "tee-attention", rows=1)


@pytest.mark.parametrize("plan", PLANS)
def test_a_chunk_without_a_wanted_row_ends_with_its_keys_and_values(tmp_path: Path, uri: str, plan: str) -> None:
    layers, rows = 3, 300
    model = make_model(tmp_path / "model", {})
    config = model.config
    saved = {"per-op": 5, "batched": 4, "fused": 4, "folded": 2, "minimal": 1, "tee-attention": 2}[plan]
    per_layer, once = PLANS[plan].call_counts
    with split(model, uri, plan=plan) as (_, channel):
        backend = Watched(channel)
        scores_nbytes = 4 * config.num_attention_heads * 128 * 300
        runner = Runner(RemoteModel.fetch(channel, model), backend, plan, scores_nbytes=scores_nbytes)
        cut_as_with_scores(runner, scores_nbytes)
        counts = runner._cutter.cut(1, 0, rows)
        assert len(counts) > 1
        ids = torch.arange(rows).unsqueeze(0) % 97
        with runner.new_cache(1, rows) as cache:
            backend.taken()
            chunked = runner.forward(ids, cache)
            expected, start = [], 0
            for count in counts:
                wanted = start + count == rows
                own = _formula(config, plan, rows=count, start=start, wants_logits=wanted)
                assert len(own) == per_layer * layers + once - (0 if wanted else saved)
                expected += own
                start += count
            assert backend.taken() == expected
        whole = Runner(RemoteModel.fetch(channel, model), channel, plan)
        with whole.new_cache(1, rows) as cache:
            torch.testing.assert_close(chunked, whole.forward(ids, cache), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("plan", PLANS)
def test_a_chunk_that_stores_only_of_a_model_with_one_layer(tmp_path: Path, uri: str, plan: str) -> None:
    model = make_model(tmp_path / "model", {"num_hidden_layers": 1})
    with split(model, uri, plan=plan) as (_, channel):
        backend = Watched(channel)
        runner = Runner(RemoteModel.fetch(channel, model), backend, plan, scores_nbytes=4 * 6 * 100 * 100)
        cut_as_with_scores(runner, 4 * 6 * 100 * 100)
        counts = runner._cutter.cut(1, 0, 200)
        with runner.new_cache(1, 200) as cache:
            backend.taken()
            runner.forward(torch.arange(200).unsqueeze(0) % 97, cache)
        expected, start = [], 0
        for count in counts:
            expected += _formula(model.config, plan, rows=count, start=start, wants_logits=start + count == 200)
            start += count
        assert backend.taken()[:-1] == expected
    assert len(counts) > 1

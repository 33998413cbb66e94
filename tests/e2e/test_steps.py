"""What is chosen for a link that takes time runs, with HF's logits; caches go on by other plans than filled them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("transformers")
from split import Named, named_models, random_ids, relative_error, split

from fastsplit.split.contract import traffic
from fastsplit.split.plan import PLANS
from fastsplit.tee.remote import RemoteModel
from fastsplit.tee.runner import Runner
from fastsplit.tee.tuning import Link, Tuning, tune
from fastsplit.wire.transport.meter import LinkEstimate

TOLERANCE = 2e-5
SLOW = LinkEstimate(0.02, 12.5e6, 12.5e6)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Named]:
    return named_models(tmp_path_factory)


@pytest.mark.parametrize(("plan", "lanes"), [("minimal", 3), ("minimal", 1), ("folded", 3), ("fused", 3)])
def test_a_cache_goes_on_by_another_plan_than_filled_it(
    models: Callable[[str], Named], unix_uri: str, plan: str, lanes: int
) -> None:
    """Of two sequences, one with padding: more of the prompt, and steps, by each of the others in turn."""
    model, reference = models("grouped heads")
    ids = random_ids(2, 280, seed=3)
    mask = torch.arange(280) >= torch.tensor([[0], [61]])
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    expected = reference(ids, attention_mask=mask.long(), position_ids=positions, use_cache=False).logits
    with split(model, unix_uri, plan=plan, lanes=lanes, block_rows=32) as (first, channel), first.new_cache(2) as cache:
        found = [first.forward(ids[:, :230], cache, mask=mask[:, :230], keep="all")]
        for other in (each for each in PLANS if each != plan and not PLANS[each].cache_in_tee):
            runner = Runner(RemoteModel.fetch(channel, model), channel, other)
            for rows in (1, 9):
                end = cache.length + rows
                found.append(runner.forward(ids[:, cache.length : end], cache, mask=mask[:, :end], keep="all"))
        found.append(first.forward(ids[:, cache.length :], cache, mask=mask, keep="all"))
    assert relative_error(torch.cat(found, dim=1)[mask], expected[mask]) <= TOLERANCE


def test_a_cache_in_the_tee_goes_on_by_another_form_of_its_plan(models: Callable[[str], Named], unix_uri: str) -> None:
    """By one that sends token ids, since it has no copy of the embedding's weights; by another number of lanes."""
    model, reference = models("grouped heads")
    ids = random_ids(2, 280, seed=3)
    mask = torch.arange(280) >= torch.tensor([[0], [61]])
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    expected = reference(ids, attention_mask=mask.long(), position_ids=positions, use_cache=False).logits
    found: list[torch.Tensor] = []
    with split(model, unix_uri, plan="tee-attention", lanes=3) as (first, channel), first.new_cache(2) as cache:
        second = Runner(RemoteModel.fetch(channel, None), channel, "tee-attention", block_rows=32)
        for runner, rows in ((first, 230), (second, 1), (second, 9), (first, 1), (second, 30), (first, 9)):
            end = cache.length + rows
            found.append(runner.forward(ids[:, cache.length : end], cache, mask=mask[:, :end], keep="all"))
    assert cache.length == 280
    assert relative_error(torch.cat(found, dim=1)[mask], expected[mask]) <= TOLERANCE


@pytest.mark.parametrize("plan", ["minimal", "tee-attention"])
@pytest.mark.parametrize("rows", [100, 300])
def test_a_tuning_is_what_runs(models: Callable[[str], Named], unix_uri: str, rows: int, plan: str) -> None:
    model, reference = models("grouped heads")
    tuning = tune(model.config, "float32", rows, link=SLOW, cast="off", plan=plan)
    saved = {"minimal": 1, "tee-attention": 2}[plan]
    ids = random_ids(1, rows + 1, seed=3)
    expected = reference(ids).logits
    with split(model, unix_uri, plan="per-op", choice=tuning) as (runner, channel), runner.new_cache() as cache:
        assert (runner.plan, runner.lanes) == (tuning.plan, tuning.lanes) == (plan, 1 if rows == 100 else 4)
        before = channel.stats.calls
        logits = runner.forward(ids[:, :rows], cache)
        layers, chunks = model.config.num_hidden_layers, tuning.lanes
        per_layer, once = PLANS[tuning.plan].call_counts
        calls = chunks * (per_layer * layers + once) - saved * (chunks - 1)
        assert channel.stats.calls - before == calls, "a chunk for each lane, and all but the last end early"
        before = channel.stats.calls
        step = runner.forward(ids[:, rows:], cache)
        assert channel.stats.calls - before == per_layer * layers + once
    assert relative_error(logits[:, 0], expected[:, rows - 1]) <= TOLERANCE
    assert relative_error(step[:, 0], expected[:, rows]) <= TOLERANCE


@pytest.mark.parametrize("cast", ["bfloat16", "float16"])
@pytest.mark.parametrize(("plan", "rows", "lanes"), [("minimal", 140, 2), ("tee-attention", 400, 1)])
def test_what_is_cast_on_the_link_alone_is_near(
    models: Callable[[str], Named], cast: str, plan: str, rows: int, lanes: int
) -> None:
    """Tensors that are large enough: without scores it takes more rows for that."""
    model, reference = models("grouped heads")
    ids = random_ids(1, rows, seed=3)
    expected = reference(ids).logits
    tuning = tune(model.config, "float32", rows, link=SLOW, cast=cast, plan=plan, lanes=lanes)
    sizes = {}
    for how in (tuning, Tuning(tuning.plan, "", lanes, "")):
        with split(model, "tcp://127.0.0.1:0", plan="auto", choice=how) as (runner, channel):
            before = channel.stats.as_dict()
            with runner.new_cache() as cache:
                logits = runner.forward(ids[:, : rows - 1], cache)
                step = runner.forward(ids[:, rows - 1 :], cache)
            after = channel.stats.as_dict()
        sizes[how.cast] = sum(after[key] - before[key] for key in ("bytes_sent", "bytes_received"))
        error = max(relative_error(logits[:, 0], expected[:, -2]), relative_error(step[:, 0], expected[:, -1]))
        assert error <= (TOLERANCE if how.cast is None else 5e-2 if cast == "bfloat16" else 5e-3)
        assert logits.dtype == torch.float32
    assert sizes[cast] < 0.6 * sizes[None]


@pytest.mark.parametrize("plan", PLANS)
def test_the_model_of_time_counts_what_the_runner_sends(
    models: Callable[[str], Named], unix_uri: str, plan: str
) -> None:
    """All chunks, up to what their messages say beside the tensors."""
    model, _ = models("mistral")
    rows = 300
    with split(model, f"{unix_uri}?shm=off", plan=plan, block_rows=32, lanes=3) as (runner, channel):
        counts = runner._cutter.cut(1, 0, rows)
        assert len(counts) == runner.lanes
        with runner.new_cache(1, rows) as cache:
            before = channel.stats.as_dict()
            runner.forward(random_ids(1, rows, seed=3), cache)
            after = channel.stats.as_dict()
    form = PLANS[plan].form(model.config, ("float32",), has_embedding=True)
    parts, start = [], 0
    for count in counts:
        parts.append(traffic(model.config, form, 4, start, count, block_rows=32, wants_logits=start + count == rows))
        start += count
    assert after["calls"] - before["calls"] == sum(part.calls for part in parts)
    sent, received = sum(part.sent for part in parts), sum(part.received for part in parts)
    assert 0 < after["bytes_sent"] - before["bytes_sent"] - sent < 2000 * sum(part.calls for part in parts)
    assert 0 < after["bytes_received"] - before["bytes_received"] - received < 500 * sum(part.calls for part in parts)
    assert Link.of(SLOW).up_s * sent > 0

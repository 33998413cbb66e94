"""The plan tee-attention: keys and values in the TEE. Tokens are HF's, alone, padded and with beams; the cache in the
TEE grows, is limited, truncated and reordered like one on the executor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from split import Named, named_models, random_ids, relative_error, split

import fastsplit
from fastsplit.errors import LimitError, RemoteOpError, SettingError
from fastsplit.executor.service import Executor
from fastsplit.hf import SplitModelForCausalLM
from fastsplit.split.plan import PLANS
from fastsplit.tee.remote import RemoteModel
from fastsplit.tee.runner import Runner

PLAN = "tee-attention"
VOCAB = 97
TOLERANCE = 2e-5
FAMILIES = ["grouped heads", "attention bias", "mistral", "qwen3", "gemma2", "phi3"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Named]:
    return named_models(tmp_path_factory)


@pytest.fixture(scope="module")
def llama(models: Callable[[str], Named]) -> Named:
    return models("grouped heads")


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert relative_error(ours, theirs) <= TOLERANCE


# ---- against HF ------------------------------------------------------------------------------------------------------


@pytest.mark.matrix(one_in=3, each=False)
@pytest.mark.parametrize("family", FAMILIES)
def test_64_tokens_of_padded_sequences_are_hf(models: Callable[[str], Named], unix_uri: str, family: str) -> None:
    """Past the windows; for phi3 up to where its frequencies change."""
    model, reference = models(family)
    count = 64 if family != "phi3" else 64 - 12
    prompts = [random_ids(1, length, seed=length)[0] for length in (12, 5)]
    expected = [
        reference.generate(
            prompt[None], attention_mask=torch.ones_like(prompt)[None], max_new_tokens=count, do_sample=False
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    with split(model, unix_uri, plan=PLAN) as (runner, _):
        assert runner.plan == PLAN
        assert list(runner.generate(prompts[0], count)) == expected[0]
        steps = list(runner.generate_batch(prompts, count))
    assert [[step[index] for step in steps] for index in range(2)] == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trusted", [False, True])
def test_logits_with_and_without_the_embeddings_weights_are_hf(
    models: Callable[[str], Named], unix_uri: str, family: str, trusted: bool
) -> None:
    """In chunks, two at a time, of two sequences one of which is padded; of all rows, and of one of each."""
    model, reference = models(family)
    ids = random_ids(2, 150)
    mask = torch.arange(150) >= torch.tensor([[0], [61]])
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    expected = reference(ids, attention_mask=mask.long(), position_ids=positions, use_cache=False).logits
    options = {"lanes": 2, "block_rows": 64, "scores_nbytes": 2 * 6 * 4 * 150 * 64}
    with split(model, unix_uri, plan=PLAN, trusted=trusted, **options) as (runner, _):
        assert runner._plan.embeds_in_tee == trusted and len(runner._cutter.cut(2, 0, 150)) >= 2
        with runner.new_cache(2) as cache:
            assert_same(runner.forward(ids, cache, mask=mask, keep="all")[mask], expected[mask])
        selected = torch.tensor([149, 70])
        with runner.new_cache(2) as cache:
            logits = runner.forward(ids, cache, mask=mask, keep=selected)
        assert_same(logits[:, 0], expected[torch.arange(2), selected])


MODES: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 4, "num_return_sequences": 3},
    "sampling, several of each": {"do_sample": True, "num_return_sequences": 3},
    "no cache": {"use_cache": False, "max_new_tokens": 6},
    "prefill in chunks": {"prefill_chunk_size": 4},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
}


@pytest.fixture(params=["everything at once", "gemma2"])
def served(
    request: pytest.FixtureRequest, models: Callable[[str], Named], unix_uri: str
) -> Iterator[tuple[SplitModelForCausalLM, Any, Executor]]:
    """Ours, HF's, and the executor of ours."""
    model, reference = models(request.param)
    executor = Executor(model)
    with fastsplit.Server(unix_uri, executor.handlers, arrays="torch") as server:
        with SplitModelForCausalLM.connect(server.uri, model.name, plan=PLAN) as ours:
            yield ours, reference, executor


@pytest.mark.matrix(one_in=2, each=False)
@pytest.mark.parametrize("mode", MODES)
def test_generate_of_transformers_is_hf(served: tuple[SplitModelForCausalLM, Any, Executor], mode: str) -> None:
    """Caches are reordered, repeated and cropped."""
    ours, reference, executor = served
    ids = random_ids(3, 11)
    mask = (torch.arange(11) >= torch.tensor([[0], [7], [10]])).long()
    if mode == "prompt lookup":
        ids, mask = random_ids(1, 6).repeat(1, 3), torch.ones(1, 18, dtype=torch.int64)
    options = {"max_new_tokens": 20, "do_sample": False, **MODES[mode]}
    found = []
    for model in (ours, reference):
        torch.manual_seed(7)
        found.append(model.generate(ids, attention_mask=mask, **options))
    assert torch.equal(*found)
    assert ours.runner.plan == PLAN
    assert executor.sessions.nbytes == 0, "nothing of keys and values is there"


# ---- the cache -------------------------------------------------------------------------------------------------------


def test_a_cache_grows_is_limited_and_is_as_before_after_a_refusal(llama: Named, unix_uri: str) -> None:
    """Each layer doubles; a refusal anywhere in a pass leaves what was there before, and other caches go on."""
    model, reference = llama
    config = model.config
    position = 2 * 4 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    ids = random_ids(1, 200)
    expected = reference(ids).logits
    with split(model, unix_uri, plan=PLAN, max_cache_nbytes=(64 + 128) * position) as (runner, _):
        cache = runner.new_cache()
        assert cache.store is not None and runner._budget.nbytes == 0
        found = [runner.forward(ids[:, :60], cache, keep="all")]
        assert runner._budget.nbytes == cache.store.nbytes == 64 * position
        with runner.new_cache() as large:
            with pytest.raises(LimitError, match=rf"KV caches of .* expected at most {192 * position}"):
                runner.forward(random_ids(1, 160), large)
            assert (large.length, runner._budget.nbytes <= 192 * position) == (0, True)
            runner.forward(random_ids(1, 20), large)  # a smaller one fits
        assert runner._budget.nbytes == 64 * position
        found.append(runner.forward(ids[:, 60:70], cache, keep="all"))  # it grows: for a moment it is there twice
        assert runner._budget.nbytes == 128 * position
        with pytest.raises(LimitError, match="KV caches of"):
            runner.forward(ids[:, 70:], cache)
        with pytest.raises(LimitError, match="KV caches of"):
            cache.reorder(torch.tensor([0, 0, 0]))
        assert (cache.length, cache.batch) == (70, 1)
        found.append(runner.forward(ids[:, 70:128], cache, keep="all"))
        cache.truncate(100)
        found[-1] = found[-1][:, :30]
        found.append(runner.forward(ids[:, 100:110], cache, keep="all"))
        cache.close()
        assert runner._budget.nbytes == 0
    assert_same(torch.cat(found, dim=1), expected[:, :110])


def test_a_cache_of_another_kind_of_plan_is_refused(llama: Named, unix_uri: str) -> None:
    model, _ = llama
    ids = random_ids(1, 5)
    with split(model, unix_uri, plan=PLAN) as (here, channel):
        there = Runner(RemoteModel.fetch(channel, model), channel, "folded")
        with here.new_cache() as own, there.new_cache() as other:
            expected = here.forward(ids, own), there.forward(ids, other)
            calls = channel.stats.calls
            with pytest.raises(SettingError, match=r"cache: made for another plan, expected one .* are in the TEE"):
                here.forward(ids, other)
            with pytest.raises(SettingError, match=r"cache: made for another plan, expected one .* on the executor"):
                there.forward(ids, own)
            assert (channel.stats.calls, own.length, other.length) == (calls, 5, 5)
            own.truncate(0)
            other.truncate(0)
            assert torch.equal(here.forward(ids, own), expected[0])
            assert torch.equal(there.forward(ids, other), expected[1])


def test_indices_out_of_range_are_refused_here(llama: Named, unix_uri: str) -> None:
    """What is in the TEE is not left to the executor to check; no order is half changed."""
    with split(llama[0], unix_uri, plan=PLAN) as (runner, channel), runner.new_cache(2) as cache:
        runner.forward(random_ids(2, 5), cache)
        calls = channel.stats.calls
        for wrong in ([2], [0, -1], [0, 2**40]):
            with pytest.raises(SettingError, match=r"^indices: .*expected 0 to 1$"):
                cache.reorder(torch.tensor(wrong))
        assert (channel.stats.calls, cache.batch) == (calls, 2)


@pytest.mark.parametrize("wrong", [[[VOCAB]], [[-1]], [[3, 2**40]]], ids=str)
@pytest.mark.parametrize("trusted", [False, True])
def test_ids_out_of_range_are_refused_on_either_side(
    llama: Named, unix_uri: str, wrong: list[list[int]], trusted: bool
) -> None:
    with split(llama[0], unix_uri, plan=PLAN, trusted=trusted) as (runner, _), runner.new_cache() as cache:
        first = runner.forward(random_ids(1, 3), cache)
        with pytest.raises(SettingError if trusted else RemoteOpError, match=r"ids: .*expected 0 to 96"):
            runner.forward(torch.tensor(wrong), cache)
        assert cache.length == 3
        cache.truncate(0)
        assert torch.equal(runner.forward(random_ids(1, 3), cache), first)


def test_no_ids_and_no_attention_are_sent(llama: Named, unix_uri: str) -> None:
    """What the executor gets of a prompt and of steps with a trusted copy: no ids, and no call that has anything of
    attention in it. The only whole numbers are those of the selected rows."""
    model, _ = llama
    executor = Executor(model)
    seen: list[tuple[str, tuple[torch.dtype, ...]]] = []

    def watch(call: fastsplit.Call) -> Any:
        seen.append((call.attrs["steps"], tuple(tensor.dtype for tensor in call.tensors)))
        return executor.handlers["run"](call)

    with (
        fastsplit.Server(unix_uri, {**executor.handlers, "run": watch}, arrays="torch") as server,
        fastsplit.connect(server.uri, arrays="torch") as channel,
        torch.inference_mode(),
    ):
        runner = Runner(RemoteModel.fetch(channel, model), channel, PLAN)
        tokens = list(runner.generate(random_ids(1, 30)[0], 4))
        used = dict.fromkeys(seen)
        assert all(dtypes == (torch.float32, *((torch.int64,) if "select" in steps else ())) for steps, dtypes in used)
        words = {word for steps, _ in used for word in steps.split()}
        assert not words & {"embed", "store_k", "store_v", "scores", "values", "rope", "tables"}
        assert executor.sessions.nbytes == 0
        seen.clear()
        other = Runner(RemoteModel.fetch(channel, None), channel, PLAN)
        assert list(other.generate(random_ids(1, 30)[0], 4)) == tokens
        assert [dtypes for steps, dtypes in seen if "embed" in steps.split()] == [(torch.int64,)] * 4


def test_every_plan_has_a_place_for_its_cache() -> None:
    assert [name for name, plan in PLANS.items() if plan.cache_in_tee] == [PLAN]

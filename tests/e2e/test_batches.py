"""Batches: sequences side by side, padded on either side or of one length, are what Hugging Face's model gives for
them, in every plan; and what is done with a cache in between changes nothing."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from split import CONFIGS, Named, load_hf, make_model, named_models, random_ids, relative_error, split

import fastsplit
from fastsplit.errors import DeadlineError, RemoteOpError, SettingError
from fastsplit.executor.service import Executor
from fastsplit.models import open_model
from fastsplit.split.blocks import Block, packed_elements
from fastsplit.split.plan import PLANS
from fastsplit.tee.remote import Cache, RemoteModel
from fastsplit.tee.runner import Runner

pytestmark = pytest.mark.matrix(each=False)

VOCAB = 97
TOLERANCE = 2e-5
FAMILIES: dict[str, tuple[str, ...]] = {
    "grouped heads": tuple(PLANS),
    "everything at once": ("fused", "folded"),
    "mistral": ("folded", "minimal", "tee-attention"),
    "qwen2 with windows": ("fused", "folded"),
    "qwen3": ("folded", "tee-attention"),
    "gemma2": ("fused", "tee-attention"),
    "gemma3": ("fused",),
    "phi3": ("fused", "minimal", "tee-attention"),
    "granite": ("fused", "folded", "minimal"),
}
"""The plans that are tested: one family has all, the others those that differ in what they have of their own."""
LENGTHS = [57, 1, 33, 52]
"""Longer than every window, and, with what comes after, short enough for phi3's frequencies to stay the same."""
STEPS = (1, 1, 4)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Named]:
    return named_models(tmp_path_factory)


@pytest.fixture(scope="module")
def llama(models: Callable[[str], Named]) -> Named:
    return models("grouped heads")


def padded(lengths: list[int], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """ids, with anything where the padding is, and which of them are tokens."""
    width = max(lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return random_ids(len(lengths), width), mask.flip(1) if side == "left" else mask


def hf_logits(reference: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """All rows, without a cache."""
    if mask is None:
        mask = torch.ones_like(ids)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    logits: torch.Tensor = reference(ids, attention_mask=mask.long(), position_ids=positions, use_cache=False).logits
    return logits


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert relative_error(ours, theirs) <= TOLERANCE


# ---- against HF ------------------------------------------------------------------------------------------------------


@pytest.mark.matrix(each=True)
@pytest.mark.parametrize(("family", "plan"), [(family, plan) for family, plans in FAMILIES.items() for plan in plans])
@pytest.mark.parametrize("side", ["equal", "left", "right"])
def test_a_batch_and_the_steps_after_it_are_hf(
    models: Callable[[str], Named], unix_uri: str, family: str, plan: str, side: str
) -> None:
    model, reference = models(family)
    ids, mask = padded([57] * 3 if side == "equal" else LENGTHS, side)
    given = None if side == "equal" else mask
    batch = len(ids)
    with split(model, unix_uri, plan=plan) as (runner, _), runner.new_cache(batch) as cache:
        assert runner.plan == plan
        logits = runner.forward(ids, cache, mask=given, keep="all")
        assert_same(logits[mask], hf_logits(reference, ids, mask)[mask])
        for count in STEPS:
            ids = torch.cat([ids, random_ids(batch, count, seed=ids.shape[1])], dim=1)
            mask = torch.cat([mask, mask.new_ones(batch, count)], dim=1)
            logits = runner.forward(ids[:, -count:], cache, keep="all")
            assert_same(logits, hf_logits(reference, ids, mask)[:, -count:])
        assert cache.length == ids.shape[1]
        assert cache.mask is None if side == "equal" else torch.equal(cache.mask, mask)


@pytest.mark.parametrize(
    ("family", "plan"),
    [
        ("everything at once", "folded"),
        ("qwen2 with windows", "fused"),
        ("qwen2 with windows", "folded"),
        ("gemma2", "fused"),
        *(("granite", plan) for plan in PLANS),
    ],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_rows_that_are_kept_are_those_of_all_of_them(
    models: Callable[[str], Named], unix_uri: str, family: str, plan: str, side: str
) -> None:
    model, reference = models(family)
    ids, mask = padded(LENGTHS, side)
    expected = hf_logits(reference, ids, mask)
    lengths = torch.tensor(LENGTHS)
    last = lengths - 1 if side == "right" else torch.full_like(lengths, max(LENGTHS) - 1)
    rows = torch.arange(len(ids))
    with split(model, unix_uri, plan=plan) as (runner, _):
        for keep in (last, last - lengths + 1, last - lengths // 2):  # the last token, the first, one between
            with runner.new_cache(len(ids)) as cache:
                logits = runner.forward(ids, cache, mask=mask, keep=keep)
                assert logits.shape == (len(ids), 1, VOCAB)
                assert_same(logits[:, 0], expected[rows, keep])
                # what was left out is there for whoever comes after
                more = random_ids(len(ids), 1, seed=5)
                whole = torch.cat([mask, mask.new_ones(len(ids), 1)], dim=1)
                step = runner.forward(more, cache)
                assert_same(step[:, 0], hf_logits(reference, torch.cat([ids, more], dim=1), whole)[:, -1])
        if side == "left":
            with runner.new_cache(len(ids)) as cache:
                assert_same(runner.forward(ids, cache, mask=mask)[:, 0], expected[:, -1])


@pytest.mark.parametrize("plan", PLANS)
def test_padding_may_come_between_and_with_every_step(llama: Named, unix_uri: str, plan: str) -> None:
    """A mask for each call: sequences that grow by different numbers of tokens."""
    model, reference = llama
    generator = torch.Generator().manual_seed(3)
    ids, mask = random_ids(3, 0), torch.zeros(3, 0, dtype=torch.bool)
    with split(model, unix_uri, plan=plan) as (runner, _), runner.new_cache(3) as cache:
        for count in (9, 1, 5, 1, 12):
            ids = torch.cat([ids, random_ids(3, count, seed=count)], dim=1)
            new = torch.rand(3, count, generator=generator) < 0.6
            mask = torch.cat([mask, new], dim=1)
            mask[0, 0] = mask[1, 1] = mask[2, 3] = True
            logits = runner.forward(ids[:, -count:], cache, mask=mask, keep="all")
            real = mask[:, -count:]
            assert_same(logits[real], hf_logits(reference, ids, mask)[:, -count:][real])


@pytest.mark.parametrize("plan", PLANS)
def test_what_the_padding_holds_makes_no_difference(llama: Named, unix_uri: str, plan: str) -> None:
    ids, mask = padded([9, 4, 1], "left")
    with split(llama[0], unix_uri, plan=plan) as (runner, _):
        results = []
        for fill in (0, 96):
            with runner.new_cache(3) as cache:
                results.append(runner.forward(ids.where(mask, fill), cache, mask=mask))
                results[-1] = torch.cat([results[-1], runner.forward(random_ids(3, 1), cache)])
    assert torch.equal(*results)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("rows", [1, 6])
def test_explicit_positions_are_hf(llama: Named, unix_uri: str, plan: str, rows: int) -> None:
    model, reference = llama
    ids = random_ids(2, 8 + rows)
    positions = torch.stack([torch.arange(8 + rows) + 31, torch.arange(8 + rows).flip(0) * 2])
    expected = reference(ids, position_ids=positions, attention_mask=torch.ones_like(ids), use_cache=False).logits
    with split(model, unix_uri, plan=plan) as (runner, _), runner.new_cache(2) as cache:
        first = runner.forward(ids[:, :8], cache, positions=positions[:, :8], keep="all")
        second = runner.forward(ids[:, 8:], cache, positions=positions[:, 8:], keep="all")
    assert_same(torch.cat([first, second], dim=1), expected)


# ---- generating ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ending(tmp_path_factory: pytest.TempPathFactory) -> Named:
    """A model whose sequences end now and then."""
    directory = tmp_path_factory.mktemp("ending") / "model"
    make_model(directory, {**CONFIGS["grouped heads"], "eos_token_id": list(range(14)), "pad_token_id": 0})
    return open_model(str(directory)), load_hf(directory)


def hf_alone(reference: Any, prompt: torch.Tensor, count: int, **options: Any) -> list[int]:
    tokens = reference.generate(
        prompt[None], attention_mask=torch.ones_like(prompt)[None], max_new_tokens=count, do_sample=False, **options
    )
    return [int(token) for token in tokens[0, len(prompt) :]]


PROMPTS = [random_ids(1, length, seed=length)[0] for length in (5, 40, 1, 12, 13, 2)]


@pytest.mark.parametrize("plan", PLANS)
def test_every_sequence_of_a_batch_is_hf_generating_it_alone(ending: Named, unix_uri: str, plan: str) -> None:
    model, reference = ending
    expected = [hf_alone(reference, prompt, 20) for prompt in PROMPTS]
    lengths = list(map(len, expected))
    assert min(lengths) < 20 and len(set(lengths)) > 2, "some end, at different steps"
    found: list[list[int]] = [[] for _ in PROMPTS]
    prefill: list[torch.Tensor] = []
    with split(model, unix_uri, plan=plan) as (runner, _):
        for step in runner.generate_batch(PROMPTS, 20, on_prefill=prefill.append):
            for index, token in step.items():
                found[index].append(token)
    assert found == expected
    for prompt, logits in zip(PROMPTS, prefill[0]):
        assert_same(logits, reference(prompt[None]).logits[0, -1])


@pytest.mark.parametrize("family", ["everything at once", "mistral", "qwen2 with windows", "gemma3"])
def test_families_generate_as_hf_does_past_their_windows(
    models: Callable[[str], Named], unix_uri: str, family: str
) -> None:
    model, reference = models(family)
    expected = [hf_alone(reference, prompt, 18) for prompt in PROMPTS]
    with split(model, unix_uri, plan="auto") as (runner, _):
        steps = list(runner.generate_batch(PROMPTS, 18))
    assert [[step[index] for step in steps] for index in range(len(PROMPTS))] == expected


@pytest.mark.parametrize("plan", PLANS)
def test_who_is_done_costs_nothing_from_then_on(ending: Named, socket_dir: Path, plan: str) -> None:
    model, _ = ending
    each, besides = PLANS[plan].call_counts
    calls = each * model.config.num_hidden_layers + besides
    with split(model, f"unix://{socket_dir}/s?shm=off", plan=plan) as (runner, channel):
        stats, costs, sizes = channel.stats, [], []
        before = (0, 0)
        for step in runner.generate_batch(PROMPTS, 20):
            now = (channel.stats.calls, stats.bytes_sent + stats.bytes_received)
            costs.append((now[0] - before[0], now[1] - before[1]))
            sizes.append(len(step))
            before = now
    assert len(set(sizes)) > 2 and sizes == sorted(sizes, reverse=True)

    def besides_scores(step: int) -> int:
        """Bytes, without those of scores: they are rounded up, and grow with each position."""
        blocks = [Block(0, 1, 0, max(map(len, PROMPTS)) + step)]
        scores = packed_elements(sizes[step], model.config.num_attention_heads, blocks)
        return costs[step][1] - 2 * model.config.num_hidden_layers * 4 * scores

    for step in range(2, len(sizes)):
        size, had = sizes[step], sizes[step - 1]
        assert costs[step][0] == calls + (size < had), "one more tells the executor who stays"
        if size < had:
            assert besides_scores(step) < besides_scores(step - 1) * (size + 0.75) / had


def test_ends_are_ignored_where_that_is_wanted(ending: Named, unix_uri: str) -> None:
    model, reference = ending
    with split(model, unix_uri, plan="auto") as (runner, _):
        steps = list(runner.generate_batch(PROMPTS, 9, ignore_eos=True))
    assert len(steps) == 9 and all(sorted(step) == list(range(len(PROMPTS))) for step in steps)
    for index, prompt in enumerate(PROMPTS):
        assert [step[index] for step in steps] == hf_alone(reference, prompt, 9, eos_token_id=None)


def test_a_generation_that_is_given_up_gives_its_cache_back(llama: Named, unix_uri: str) -> None:
    executor = Executor(llama[0])
    with served(executor, unix_uri) as (runner, _):
        steps = runner.generate_batch(PROMPTS, 20)
        next(steps)
        next(steps)
        assert len(executor.sessions) == 1
        steps.close()
        assert (len(executor.sessions), executor.sessions.nbytes) == (0, 0)
        assert list(runner.generate_batch(PROMPTS, 0)) == []
        assert len(executor.sessions) == 0


@pytest.mark.parametrize("prompts", [[], [torch.arange(0)], [torch.arange(3), torch.arange(0)], [random_ids(1, 3)]])
def test_prompts_that_are_none(llama: Named, unix_uri: str, prompts: list[torch.Tensor]) -> None:
    with split(llama[0], unix_uri, plan="auto") as (runner, _), pytest.raises(ValueError, match="prompts: "):
        next(runner.generate_batch(prompts, 3))


# ---- caches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("length", [0, 20, 40])
def test_going_on_after_truncating_is_as_if_the_rest_had_never_been(
    llama: Named, unix_uri: str, plan: str, length: int
) -> None:
    model, reference = llama
    ids, mask = padded([40, 25, 38], "left")
    mask[:, 0] = True  # every sequence has something, however short it becomes
    more = random_ids(3, 6, seed=8)
    with split(model, unix_uri, plan=plan) as (runner, _), runner.new_cache(3) as cache:
        runner.forward(ids, cache, mask=mask)
        runner.forward(random_ids(3, 1), cache)
        cache.truncate(length)
        assert cache.length == length
        logits = runner.forward(more, cache, keep="all")
        with runner.new_cache(3) as fresh:
            if length:
                runner.forward(ids[:, :length], fresh, mask=mask[:, :length])
            assert_same(logits, runner.forward(more, fresh, keep="all"))
    whole = torch.cat([mask[:, :length], mask.new_ones(3, 6)], dim=1)
    assert_same(logits, hf_logits(reference, torch.cat([ids[:, :length], more], dim=1), whole)[:, length:])


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("indices", [[2, 0, 1], [1, 1, 0], [2], [0, 0, 1, 2, 2]], ids=str)
def test_reordering_is_hf_selecting_sequences(llama: Named, unix_uri: str, plan: str, indices: list[int]) -> None:
    model, reference = llama
    ids, mask = padded([20, 7, 13], "left")
    chosen = torch.tensor(indices)
    with split(model, unix_uri, plan=plan) as (runner, _), runner.new_cache(3) as cache:
        runner.forward(ids, cache, mask=mask)
        cache.reorder(chosen)
        assert (cache.batch, cache.length) == (len(indices), 20)
        ids, mask = ids[chosen], mask[chosen]
        for count in (1, 5):
            ids = torch.cat([ids, random_ids(len(indices), count, seed=count)], dim=1)
            mask = torch.cat([mask, mask.new_ones(len(indices), count)], dim=1)
            logits = runner.forward(ids[:, -count:], cache, keep="all")
            assert_same(logits, hf_logits(reference, ids, mask)[:, -count:])


@pytest.mark.parametrize("plan", ["auto", "tee-attention"])
def test_wrong_lengths_and_indices_leave_the_cache_as_it_was(llama: Named, unix_uri: str, plan: str) -> None:
    ids = random_ids(2, 9)
    with split(llama[0], unix_uri, plan=plan) as (runner, channel), runner.new_cache(2) as cache:
        expected = runner.forward(ids, cache, keep="all")
        calls = channel.stats.calls
        for length in (-1, 10, 2**40):
            with pytest.raises(ValueError, match=f"^length: {length}, expected 0 to 9$"):
                cache.truncate(length)
        for indices in (torch.tensor([], dtype=torch.int64), torch.tensor([0.0]), torch.tensor([[0]]), torch.tensor(0)):
            with pytest.raises(ValueError, match=r"^indices: "):
                cache.reorder(indices)
        assert channel.stats.calls == calls
        for wrong in ([2], [0, -1], [0, 2**40]):
            with pytest.raises((RemoteOpError, SettingError), match="indices: "):
                cache.reorder(torch.tensor(wrong))
        assert (cache.batch, cache.length) == (2, 9)
        cache.truncate(4)
        assert_same(runner.forward(ids[:, 4:], cache, keep="all"), expected[:, 4:])


WRONG: dict[str, tuple[torch.Tensor, dict[str, Any]]] = {
    "ids: int32": (torch.zeros(2, 3, dtype=torch.int32), {}),
    "ids: one dimension": (torch.arange(3), {}),
    "ids: three dimensions": (random_ids(2, 3)[None], {}),
    "ids: another batch": (random_ids(3, 3), {}),
    "ids: none": (random_ids(2, 0), {}),
    "mask: only the new": (random_ids(2, 3), {"mask": torch.ones(2, 3, dtype=torch.bool)}),
    "mask: ints": (random_ids(2, 3), {"mask": torch.ones(2, 8, dtype=torch.int64)}),
    "mask: another batch": (random_ids(2, 3), {"mask": torch.ones(1, 8, dtype=torch.bool)}),
    "positions: floats": (random_ids(2, 3), {"positions": torch.ones(2, 3)}),
    "positions: of all": (random_ids(2, 3), {"positions": torch.ones(2, 8, dtype=torch.int64)}),
    "positions: negative": (random_ids(2, 3), {"positions": torch.tensor([[0, 1, 2], [0, -1, 2]])}),
    "keep: a word": (random_ids(2, 3), {"keep": "first"}),
    "keep: int32": (random_ids(2, 3), {"keep": torch.zeros(2, dtype=torch.int32)}),
    "keep: too many": (random_ids(2, 3), {"keep": torch.zeros(3, dtype=torch.int64)}),
    "keep: beyond": (random_ids(2, 3), {"keep": torch.tensor([0, 3])}),
    "keep: negative": (random_ids(2, 3), {"keep": torch.tensor([-1, 2])}),
}


@pytest.mark.parametrize("plan", ["fused", "folded", "minimal", "tee-attention"])
def test_wrong_arguments_name_themselves_send_nothing_and_leave_the_cache_as_it_was(
    llama: Named, unix_uri: str, plan: str
) -> None:
    model, reference = llama
    ids = random_ids(2, 8)
    with split(model, unix_uri, plan=plan) as (runner, channel), runner.new_cache(2) as cache:
        runner.forward(ids[:, :5], cache)
        calls = channel.stats.calls
        for name, (wrong, options) in WRONG.items():
            with pytest.raises(ValueError, match=f"^{name.split(':')[0]}: "):
                runner.forward(wrong, cache, **options)
            assert (cache.length, cache.mask, channel.stats.calls) == (5, None, calls), name
        with pytest.raises((RemoteOpError, SettingError), match=r"ids: .*expected 0 to 96"):
            runner.forward(torch.full((2, 3), VOCAB), cache)
        assert (cache.length, cache.mask) == (5, None)
        assert_same(runner.forward(ids[:, 5:], cache, keep="all"), hf_logits(reference, ids)[:, 5:])
    with split(model, unix_uri, plan=plan) as (runner, channel):
        cache = runner.new_cache()
        cache.close()
        cache.close()
        with pytest.raises(ValueError, match=r"^cache: it was closed$"):
            runner.forward(ids[:1], cache)


# ---- calls that fail -------------------------------------------------------------------------------------------------


class _Failing:
    """An executor's handlers, one call of which fails."""

    def __init__(self, executor: Executor) -> None:
        self.handlers = {op: self._wrapped(handler) for op, handler in executor.handlers.items()}
        self.count = 0
        self.fails_at: int | None = None
        self.after = False
        """Whether it did its work before."""
        self.waits_for: threading.Event | None = None
        """What the failing call waits for instead of failing."""

    def _wrapped(self, handler: Callable[..., Any]) -> Callable[..., Any]:
        def handle(call: fastsplit.Call) -> Any:
            number, self.count = self.count, self.count + 1
            fails = number == self.fails_at
            if fails and self.waits_for is not None:
                self.waits_for.wait(20)
            elif fails and not self.after:
                raise RuntimeError("on purpose")
            result = handler(call)
            if fails and self.waits_for is None:
                raise RuntimeError("on purpose")
            return result

        return handle


@contextlib.contextmanager
def served(
    executor: Executor, uri: str, handlers: Any = None, plan: str = "auto", **options: Any
) -> Iterator[tuple[Runner, fastsplit.Channel]]:
    with (
        fastsplit.Server(uri, handlers or executor.handlers, arrays="torch") as server,
        fastsplit.connect(server.uri, arrays="torch") as channel,
        torch.inference_mode(),
    ):
        yield Runner(RemoteModel.fetch(channel, None), channel, plan, **options), channel


def prepared(runner: Runner) -> tuple[Cache, torch.Tensor]:
    """A cache with something in it, and what comes next."""
    ids, mask = padded([9, 4], "left")
    cache = runner.new_cache(2)
    runner.forward(ids, cache, mask=mask)
    return cache, random_ids(2, 5, seed=4)


@pytest.mark.parametrize(
    ("plan", "count", "after"),
    [
        ("per-op", 5, True),
        ("batched", 1, False),
        *(
            (plan, count, after)
            for plan in ("fused", "folded", "minimal", "tee-attention")
            for count in (5, 1)
            for after in (False, True)
        ),
    ],
)
def test_whichever_call_fails_the_same_ids_can_be_given_again(
    llama: Named, unix_uri: str, plan: str, after: bool, count: int
) -> None:
    executor = Executor(llama[0])
    failing = _Failing(executor)
    failing.after = after
    each, besides = PLANS[plan].call_counts
    with served(executor, unix_uri, failing.handlers, plan) as (runner, _):
        cache, ids = prepared(runner)
        ids = ids[:, :count]
        expected = runner.forward(ids, cache)
        cache.close()
        for number in range(each * runner.config.num_hidden_layers + besides):
            cache, _ = prepared(runner)
            failing.count, failing.fails_at = 0, number
            with pytest.raises(RemoteOpError, match="on purpose"):
                runner.forward(ids, cache)
            failing.fails_at = None
            assert cache.length == 9 and cache.mask is not None and cache.mask.shape == (2, 9)
            assert torch.equal(runner.forward(ids, cache), expected), f"call {number}"
            cache.close()


@pytest.mark.parametrize("plan", PLANS)
def test_a_deadline_in_the_middle_of_a_pass_costs_only_that_pass(llama: Named, unix_uri: str, plan: str) -> None:
    executor = Executor(llama[0])
    failing = _Failing(executor)
    with served(executor, unix_uri, failing.handlers, plan) as (runner, channel):
        cache, ids = prepared(runner)
        expected = runner.forward(ids, cache)
        cache.truncate(9)
        for number in (0, 4, 6):
            failing.waits_for = threading.Event()
            failing.count, failing.fails_at = 0, number
            channel.call_timeout_s = 0.1
            with pytest.raises(DeadlineError, match="no reply within its deadline"):
                runner.forward(ids, cache)
            failing.waits_for.set()  # only now it does its work, and what it stores nobody knows of
            channel.call_timeout_s = 20
            failing.fails_at = None
            assert torch.equal(runner.forward(ids, cache), expected)
            cache.truncate(9)


def test_a_cache_over_the_limit_fails_and_the_others_go_on(llama: Named, unix_uri: str) -> None:
    config = llama[0].config
    position = 4 * config.num_key_value_heads * config.head_dim
    executor = Executor(llama[0], max_cache_nbytes=2 * config.num_hidden_layers * 3 * 64 * position)
    ids = random_ids(1, 70)
    with served(executor, unix_uri) as (runner, _), runner.new_cache() as cache:
        expected = runner.forward(ids[:, :60], cache)
        with runner.new_cache() as large:
            with pytest.raises(RemoteOpError, match="LimitError: KV caches of"):
                runner.forward(random_ids(1, 200), large)
            assert large.length == 0
        cache.truncate(0)
        assert torch.equal(runner.forward(ids[:, :60], cache), expected)
        runner.forward(ids[:, 60:], cache)  # it grows
        assert cache.length == 70

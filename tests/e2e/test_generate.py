"""The split as a causal LM of transformers: what `generate` and `forward` give is what HF's own model gives."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from split import CONFIGS, load_hf, make_model
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList, set_seed
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_utils import slice_logits_to_keep

import fastsplit
from fastsplit.errors import ClosedError, ModelError, VerificationError
from fastsplit.executor.service import Executor
from fastsplit.hf import SplitCache, SplitModelForCausalLM
from fastsplit.models import open_model
from fastsplit.split.plan import PLANS

pytestmark = pytest.mark.matrix(each=False)

VOCAB = 97
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("generate") / "model"
    make_model(path, CONFIGS["everything at once"])
    return path


@pytest.fixture(scope="module")
def reference(directory: Path) -> Any:
    return load_hf(directory)


@pytest.fixture(scope="module")
def executor(directory: Path) -> Executor:
    return Executor(open_model(str(directory)))


@pytest.fixture(scope="module")
def server(executor: Executor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[fastsplit.Server]:
    with fastsplit.Server(f"unix://{tmp_path_factory.mktemp('uri')}/s", executor.handlers, arrays="torch") as server:
        yield server


@pytest.fixture
def ours(server: fastsplit.Server, directory: Path) -> Iterator[SplitModelForCausalLM]:
    with SplitModelForCausalLM.connect(server.uri, directory) as model:
        yield model


def _ids(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def _padded(lengths: list[int], side: str, seed: int = 2) -> dict[str, torch.Tensor]:
    """Sequences of these lengths, padded with 0 to the longest."""
    width = max(lengths)
    rows = _ids(len(lengths), width, seed)
    real = torch.arange(width) < torch.tensor(lengths)[:, None]
    real = real.flip(1) if side == "left" else real
    return {"input_ids": rows.where(real, 0), "attention_mask": real.long()}


def _generate(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    set_seed(7)
    return model.generate(ids, **{"max_new_tokens": 24, "do_sample": False, **options})


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.9},
    "sampling, several of each": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4, "num_return_sequences": 3},
    "beams that end": {"num_beams": 4, "eos_token_id": list(range(20, 40)), "pad_token_id": 0, "length_penalty": 0.5},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "processors": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "bad_words_ids": [[5], [7, 8]]},
    "not before": {"min_new_tokens": 9, "eos_token_id": list(range(50)), "pad_token_id": 0},
    "ends": {"eos_token_id": list(range(15)), "pad_token_id": 0},
    "no cache": {"use_cache": False, "max_new_tokens": 6},
    "no cache, beams": {"use_cache": False, "max_new_tokens": 6, "num_beams": 3},
    "prefill in chunks": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize(
    ("lengths", "mode"),
    [
        *(pytest.param([11], mode, id=f"one-{mode}") for mode in MODES),
        *(pytest.param([6, 6, 6], mode, id=f"batch-{mode}") for mode in ("greedy", "beams", "ends")),
        *(pytest.param([4, 11, 1, 7], mode, id=f"padded on the left-{mode}") for mode in MODES),
    ],
)
def test_tokens_are_hf(ours: SplitModelForCausalLM, reference: Any, lengths: list[int], mode: str) -> None:
    inputs = _padded(lengths, "left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    expected = _generate(reference, ids, attention_mask=mask, **MODES[mode])
    assert torch.equal(_generate(ours, ids, attention_mask=mask, **MODES[mode]), expected)
    assert len(expected) == len(lengths) * MODES[mode].get("num_return_sequences", 1)


def test_a_seed_decides(ours: SplitModelForCausalLM) -> None:
    ids = _ids(2, 5)
    first = _generate(ours, ids, do_sample=True)
    assert torch.equal(first, _generate(ours, ids, do_sample=True))
    set_seed(8)
    assert not torch.equal(first, ours.generate(ids, do_sample=True, max_new_tokens=24))


@pytest.mark.parametrize("mode", ["greedy", "sampling", "beams", "processors"])
def test_scores_and_logits_are_hf(ours: SplitModelForCausalLM, reference: Any, mode: str) -> None:
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    found, expected = (_generate(model, _ids(2, 9), **MODES[mode], **wanted) for model in (ours, reference))
    assert torch.equal(found.sequences, expected.sequences)
    for name in ("scores", "logits"):
        assert len(found[name]) == len(expected[name]) == 24
        for ours_now, theirs_now in zip(found[name], expected[name]):
            torch.testing.assert_close(ours_now, theirs_now, rtol=TOLERANCE, atol=TOLERANCE)


class _Collector(BaseStreamer):
    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.seen.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_a_streamer_sees_every_token_as_it_comes(ours: SplitModelForCausalLM) -> None:
    collector = _Collector()
    tokens = _generate(ours, _ids(1, 6), streamer=collector)[0].tolist()
    assert collector.seen == [tokens[:6], *([token] for token in tokens[6:])]
    assert collector.ended


class _After(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_stopping_criteria_and_changes_in_place(ours: SplitModelForCausalLM, reference: Any) -> None:
    def only_even(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, 1::2] = -torch.inf
        return scores

    options = {"stopping_criteria": StoppingCriteriaList([_After(13)]), "logits_processor": [only_even]}
    found, expected = (_generate(model, _ids(2, 6), **options) for model in (ours, reference))
    assert torch.equal(found, expected)
    assert found.shape == (2, 13) and not (found[:, 6:] % 2).any()


@pytest.mark.parametrize("lengths", [[7], [3, 7, 5]], ids=["one", "padded on the left"])
def test_going_on_with_the_cache_that_came_back(
    ours: SplitModelForCausalLM, reference: Any, lengths: list[int]
) -> None:
    inputs = _padded(lengths, "left")
    results = []
    for model in (ours, reference):
        first = _generate(
            model,
            inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            return_dict_in_generate=True,
            max_new_tokens=8,
        )
        more = torch.cat([first.sequences, _ids(len(lengths), 3, seed=9)], dim=1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(len(lengths), 11, dtype=torch.int64)], dim=1)
        assert first.past_key_values.get_seq_length() == 14
        second = _generate(
            model,
            more,
            attention_mask=mask,
            past_key_values=first.past_key_values,
            return_dict_in_generate=True,
            max_new_tokens=70,  # more than there was room for
        )
        assert second.past_key_values is first.past_key_values
        results.append(second.sequences)
    assert torch.equal(*results)


@pytest.mark.parametrize("mode", ["greedy", "sampling"])
@pytest.mark.parametrize("role", ["it is helped", "it helps"])
def test_assisted_generation(ours: SplitModelForCausalLM, reference: Any, tmp_path: Path, mode: str, role: str) -> None:
    make_model(tmp_path / "other", CONFIGS["everything at once"])
    other = load_hf(tmp_path / "other")  # the same weights with some noise: it often guesses right, and often wrong
    with torch.no_grad():
        for weight in other.parameters():
            weight += 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    pairs = [(ours, other), (reference, other)] if role == "it is helped" else [(other, ours), (other, reference)]
    results = []
    for model, assistant in pairs:
        assistant.generation_config.num_assistant_tokens = 5
        results.append(_generate(model, _ids(1, 9), assistant_model=assistant, **MODES[mode], max_new_tokens=40))
    assert torch.equal(*results)


def test_prompt_lookup(ours: SplitModelForCausalLM, reference: Any) -> None:
    ids = _ids(1, 6).repeat(1, 3)
    found, expected = (_generate(model, ids, prompt_lookup_num_tokens=4) for model in (ours, reference))
    assert torch.equal(found, expected)


FAMILIES = ["dynamic rope", "mistral", "qwen2 with windows", "qwen3", "gemma2", "gemma3", "phi3", "granite"]


@pytest.mark.parametrize("family", FAMILIES)
def test_families_with_windows_and_switches(socket_dir: Path, tmp_path: Path, family: str) -> None:
    """Each goes beyond its window, or past where its rotary embedding changes, at a step."""
    executor = Executor(make_model(tmp_path / "model", CONFIGS[family]))
    reference = load_hf(tmp_path / "model")
    inputs = _padded([12, 45, 55], "left")
    modes: dict[str, dict[str, Any]] = {
        "greedy": inputs,
        "beams": {**inputs, "num_beams": 3},
        "no cache": {**inputs, "use_cache": False, "max_new_tokens": 12},
        "prompt lookup": {"input_ids": _ids(1, 11).repeat(1, 5), "prompt_lookup_num_tokens": 4},
    }
    if family == "phi3":
        del modes["prompt lookup"]  # HF's own fails: it cannot crop the window of the cache that it starts anew
    with fastsplit.Server(f"unix://{socket_dir}/s", executor.handlers, arrays="torch") as server:
        with SplitModelForCausalLM.connect(server.uri, tmp_path / "model") as model:
            for name, options in modes.items():
                settings = {"max_new_tokens": 30, "do_sample": False, **options}
                assert torch.equal(model.generate(**settings), reference.generate(**settings)), name


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan(server: fastsplit.Server, directory: Path, reference: Any, plan: str) -> None:
    inputs = _padded([4, 40, 7], "left")
    with SplitModelForCausalLM.connect(server.uri, directory, plan=plan) as model:
        for options in ({}, {"num_beams": 3, "num_return_sequences": 2}):
            found, expected = (
                each.generate(**inputs, **options, max_new_tokens=12, do_sample=False) for each in (model, reference)
            )
            assert torch.equal(found, expected)


def test_a_pipeline_takes_it(ours: SplitModelForCausalLM, reference: Any) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast, pipeline

    words = Tokenizer(WordLevel({f"w{index}": index for index in range(VOCAB)}, unk_token="w1"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", padding_side="left")
    prompts = ["w5 w17 w9", "w30", "w8 w7 w6 w5 w4"]
    found, expected = (
        pipeline("text-generation", model=model, tokenizer=tokenizer)(
            prompts, batch_size=2, max_new_tokens=9, do_sample=False
        )
        for model in (ours, reference)
    )
    assert found == expected
    for prompt, result in zip(prompts, found):
        assert result[0]["generated_text"].startswith(f"{prompt}w")


# ---- forward ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_padded_sequences_are_hf(ours: SplitModelForCausalLM, reference: Any, side: str) -> None:
    inputs = _padded([9, 150, 1, 40], side)
    found, expected = ours(**inputs), reference(**inputs)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found.logits[real], expected.logits[real], rtol=TOLERANCE, atol=TOLERANCE)
    assert found.logits.isfinite().all()
    step = {
        "input_ids": _ids(4, 2, seed=5),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones(4, 2, dtype=torch.int64)], dim=1),
        "position_ids": torch.tensor([[9, 10], [150, 151], [1, 2], [40, 41]]),
    }
    for changes in ({}, {"attention_mask": None}):  # without a mask what was padding is seen
        options = {**step, **changes}
        theirs = reference(**options, past_key_values=expected.past_key_values).logits
        again = ours(**options, past_key_values=found.past_key_values).logits
        if changes:
            real = torch.tensor([1])  # the others now see padding, whose keys are not defined
            again, theirs = again[real], theirs[real]
        torch.testing.assert_close(again, theirs, rtol=TOLERANCE, atol=TOLERANCE)
        found.past_key_values.crop(-2)
        expected.past_key_values.crop(-2)


KEEPS: dict[str, int | torch.Tensor] = {
    "all": 0,
    "the last": 1,
    "the last three": 3,
    "more than there are": 30,
    "one": torch.tensor([-4]),
    "two": torch.tensor([1, 7]),
    "one of each": torch.tensor([[1], [2], [8]]),
    "two of each": torch.tensor([[1, 3], [2, 2], [8, 0]]),
    "where": torch.eye(3, 9).bool(),
}


@pytest.mark.parametrize("keep", KEEPS)
def test_logits_to_keep(ours: SplitModelForCausalLM, reference: Any, keep: str) -> None:
    ids = _ids(2, 9)[[0, 1, 0]]  # two that are the same
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[1, :2] = 0
    found, expected = (model(ids, logits_to_keep=KEEPS[keep]).logits for model in (ours, reference))
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    found, expected = (
        model(ids, logits_to_keep=KEEPS[keep], attention_mask=mask).logits for model in (ours, reference)
    )
    real = slice_logits_to_keep(mask.bool()[:, :, None], KEEPS[keep])[..., 0]
    torch.testing.assert_close(found[real], expected[real], rtol=TOLERANCE, atol=TOLERANCE)
    assert found.shape == expected.shape


def test_positions_that_are_given_are_used(ours: SplitModelForCausalLM, reference: Any) -> None:
    ids, positions = _ids(2, 6), torch.tensor([[0, 1, 5, 6, 300, 301], [7, 8, 9, 10, 11, 12]])
    found, expected = (model(ids, position_ids=positions).logits for model in (ours, reference))
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert not torch.allclose(found, ours(ids).logits, atol=0.01)


def test_the_loss_is_hf(ours: SplitModelForCausalLM, reference: Any) -> None:
    ids = _ids(2, 9)
    labels = ids.masked_fill(torch.arange(9) < 3, -100)
    found, expected = ours(ids, labels=labels), reference(ids, labels=labels)
    torch.testing.assert_close(found.loss, expected.loss, rtol=TOLERANCE, atol=TOLERANCE)
    loss, logits = ours(ids, labels=labels, use_cache=False, return_dict=False)
    assert torch.equal(loss, found.loss) and torch.equal(logits, found.logits)


def test_logits_are_the_callers_own(ours: SplitModelForCausalLM) -> None:
    logits = ours(_ids(1, 4)).logits
    assert logits.dtype == torch.float32 and not logits.is_inference() and not logits.requires_grad
    logits.zero_()


# ---- the cache -------------------------------------------------------------------------------------------------------


def test_crop_reorder_repeat_and_select(ours: SplitModelForCausalLM, reference: Any) -> None:
    first, step = _ids(2, 8), _ids(4, 2, seed=4)
    results = []
    for model in (ours, reference):
        cache = model(first).past_key_values
        cache.crop(0)
        cache.crop(-3)
        assert cache.get_seq_length() == 5
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.batch_repeat_interleave(3)
        cache.batch_select_indices(torch.tensor([0, 2, 3, 5]))
        assert cache.get_seq_length() == 5
        results.append(model(step, past_key_values=cache).logits)
        cache.batch_select_indices(torch.tensor([True, False, False, True]))
        results.append(model(step[:2], past_key_values=cache).logits)
        cache.reset()
        assert cache.get_seq_length() == 0
        results.append(model(step[:3], past_key_values=cache).logits)
    for found, expected in zip(results[:3], results[3:]):
        torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_what_a_cache_cannot_do_is_said(ours: SplitModelForCausalLM) -> None:
    import copy

    cache = ours(_ids(2, 8)).past_key_values
    assert isinstance(cache, SplitCache) and repr(cache) == "SplitCache(batch=2, length=8)"
    assert len(cache) == ours.config.num_hidden_layers and cache.is_initialized and not cache.is_compileable
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(cache)
    with pytest.raises(TypeError, match="takes no keys and values"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)
    with pytest.raises(ValueError, match="3 sequences, those in past_key_values are 2"):
        ours(_ids(3, 1), past_key_values=cache)
    cache.crop(-8)
    assert ours(_ids(3, 1), past_key_values=cache).past_key_values.batch_size == 3, "an empty one is as good as new"
    cache.close()
    cache.close()
    assert (cache.batch_size, cache.get_seq_length()) == (-1, 0)


@pytest.fixture
def idle(executor: Executor) -> None:
    """Until what earlier tests' connections had open is gone: the server hears of their end a little later."""
    deadline = time.monotonic() + 5
    while len(executor.sessions) and time.monotonic() < deadline:
        time.sleep(0.01)


def test_a_cache_is_closed_when_generate_ends_or_nobody_holds_it(
    idle: None, ours: SplitModelForCausalLM, executor: Executor
) -> None:
    ids = _ids(2, 4)
    for options in ({}, {"num_beams": 2}, {"use_cache": False}, {"prompt_lookup_num_tokens": 2}):
        _generate(ours, ids[:1], **options)
        assert len(executor.sessions) == 0
    kept = _generate(ours, ids, return_dict_in_generate=True)
    assert len(executor.sessions) == 1
    other = ours(ids).past_key_values
    assert len(executor.sessions) == 2
    kept.past_key_values.close()
    assert len(executor.sessions) == 1
    calls = ours.channel.stats.calls
    thread = threading.Thread(target=lambda held: held.clear(), args=([other],))
    del other
    thread.start()
    thread.join()
    del thread
    assert (len(executor.sessions), ours.channel.stats.calls) == (1, calls), "a destructor sends nothing"
    ours(ids, use_cache=False)
    assert len(executor.sessions) == 0
    for _ in range(70):  # more than a client may have open at once
        ours(ids[:, :1])
    assert len(executor.sessions) == 1


def test_a_failing_generate_leaves_nothing_open(idle: None, ours: SplitModelForCausalLM, executor: Executor) -> None:
    def fail(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        _generate(ours, _ids(1, 4), logits_processor=[fail])
    ours(_ids(1, 1), use_cache=False)
    assert len(executor.sessions) == 0
    ours(_ids(1, 1))
    assert len(executor.sessions) == 1
    ours.close()


@pytest.mark.parametrize("calls", [0, 1], ids=["at once", "in the middle"])
@pytest.mark.parametrize("past", [0, 6])
def test_a_failing_call_leaves_the_cache_as_it_was(
    ours: SplitModelForCausalLM, monkeypatch: pytest.MonkeyPatch, calls: int, past: int
) -> None:
    ids = _ids(2, 6 + past)
    cache = ours.new_cache()
    if past:
        ours(ids[:, :past], past_key_values=cache)
    forward, left = ours.runner.forward, [calls]

    def fail(*args: Any, **kwargs: Any) -> torch.Tensor:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return forward(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ours.runner, "forward", fail)
        with pytest.raises(KeyboardInterrupt):
            ours(ids[:, past:], past_key_values=cache, logits_to_keep=3)
    assert cache.get_seq_length() == past
    again = ours(ids[:, past:], past_key_values=cache, logits_to_keep=3).logits
    torch.testing.assert_close(again, ours(ids).logits[:, -3:], rtol=TOLERANCE, atol=TOLERANCE)


def test_sequences_that_are_the_same_are_run_once(ours: SplitModelForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    forward = ours.runner.forward

    def count(ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        shapes.append(tuple(ids.shape))
        return forward(ids, *args, **kwargs)

    monkeypatch.setattr(ours.runner, "forward", count)
    for options in ({"num_beams": 4}, {"do_sample": True, "num_return_sequences": 4}):
        _generate(ours, _ids(2, 9), max_new_tokens=3, **options)
        assert shapes == [(2, 9), (8, 1), (8, 1)]
        shapes.clear()


# ---- what is refused -------------------------------------------------------------------------------------------------


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "embeddings": ({"inputs_embeds": torch.zeros(1, 2, 48)}, ValueError, "inputs_embeds: not supported"),
    "attentions": ({"output_attentions": True}, ValueError, "output_attentions: not supported"),
    "hidden states": ({"output_hidden_states": True}, ValueError, "output_hidden_states: not supported"),
    "no ids": ({"input_ids": None}, ValueError, r"input_ids: none, expected \[batch, n\]"),
    "flat ids": ({"input_ids": torch.zeros(4, dtype=torch.int64)}, ValueError, r"input_ids: \[4\], expected"),
    "empty ids": ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, ValueError, r"input_ids: \[1, 0\], expected"),
    "a mask of its own": ({"attention_mask": torch.ones(1, 1, 4, 4)}, ValueError, r"\[1, 1, 4, 4\], expected \[1, 4\]"),
    "a short mask": ({"attention_mask": torch.ones(1, 3)}, ValueError, r"attention_mask: \[1, 3\], expected \[1, 4\]"),
    "too many positions": ({"position_ids": torch.zeros(1, 5)}, ValueError, r"position_ids: \[1, 5\], expected"),
    "ids that are no integers": (
        {"input_ids": torch.full((1, 4), 5.5)},
        ValueError,
        "input_ids: torch.float32, expected",
    ),
    "half positions": (
        {"position_ids": torch.tensor([[0.0, 0.5, 1.0, 1.5]])},
        ValueError,
        "position_ids: torch.float32, expected integers",
    ),
    "negative positions": ({"position_ids": torch.tensor([[-1, 0, 1, 2]])}, ValueError, "position_ids: -1"),
    "sequences packed into one": (
        {"position_ids": torch.tensor([[0, 1, 0, 1]]), "use_cache": False},
        ValueError,
        "position_ids: not one after the other",
    ),
    "another cache": ({"past_key_values": DynamicCache()}, TypeError, "past_key_values: a DynamicCache"),
    "keeping less than none": ({"logits_to_keep": -1}, ValueError, "logits_to_keep: -1"),
    "keeping what is not there": ({"logits_to_keep": torch.tensor([4])}, ValueError, "expected positions of 4"),
    "a typo": ({"atention_mask": torch.ones(1, 4)}, TypeError, "atention_mask: not supported"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_refused_by_name(ours: SplitModelForCausalLM, case: str) -> None:
    inputs, error, text = REFUSED[case]
    with pytest.raises(error, match=text):
        ours(**{"input_ids": _ids(1, 4), **inputs})


def test_what_generate_cannot_do_is_refused_by_name(ours: SplitModelForCausalLM) -> None:
    ids = _ids(1, 4)
    with pytest.raises(ValueError, match="cache_implementation: 'static'"):
        _generate(ours, ids, cache_implementation="static")
    with pytest.raises(ValueError, match="output_attentions: not supported"):
        _generate(ours, ids, output_attentions=True, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="inputs_embeds: not supported"):
        ours.generate(inputs_embeds=torch.zeros(1, 2, 48), max_new_tokens=2)
    with pytest.raises(ValueError, match="atention_mask"):
        _generate(ours, ids, atention_mask=torch.ones(1, 4))
    with pytest.raises(NotImplementedError, match="use generate"):
        ours.generate_batch([[1, 2]])
    with pytest.raises(NotImplementedError, match="cannot be trained"):
        ours.train()
    with pytest.raises(NotImplementedError, match="nothing to save"):
        ours.save_pretrained("anywhere")
    with pytest.raises(NotImplementedError, match=r"connect\(uri, model_dir\)"):
        SplitModelForCausalLM.from_pretrained("anywhere")


# ---- connecting ------------------------------------------------------------------------------------------------------


def test_generation_settings_are_those_in_the_directory(server: fastsplit.Server, directory: Path) -> None:
    settings = GenerationConfig(max_new_tokens=3, eos_token_id=[96, 95], pad_token_id=94, repetition_penalty=1.5)
    reference = load_hf(directory)
    settings.save_pretrained(directory)
    try:
        reference.generation_config = GenerationConfig.from_pretrained(directory)
        with SplitModelForCausalLM.connect(server.uri, directory) as model:
            assert model.generation_config.to_dict() == reference.generation_config.to_dict()
            assert torch.equal(model.generate(_ids(2, 4)), reference.generate(_ids(2, 4)))
    finally:
        (directory / "generation_config.json").unlink()
    with SplitModelForCausalLM.connect(server.uri, str(directory), plan="batched", threads=1) as model:
        assert model.generation_config.max_new_tokens is None
        assert model.can_generate() and model.num_parameters() == 0 and not model.training
        assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
        assert repr(model) == f"SplitModelForCausalLM('{server.uri}', plan='batched')"
    model.close()
    with pytest.raises(ClosedError):
        model(_ids(1, 2))


def test_the_directory_is_what_counts(server: fastsplit.Server, tmp_path: Path) -> None:
    make_model(tmp_path / "norms", CONFIGS["everything at once"], seed=1)
    make_model(tmp_path / "vocab", {"vocab_size": 98})
    (tmp_path / "empty").mkdir()
    with pytest.raises(VerificationError, match="norm weights"):
        SplitModelForCausalLM.connect(server.uri, tmp_path / "norms")
    with SplitModelForCausalLM.connect(server.uri, tmp_path / "norms", trusted=False) as model:
        assert model(_ids(1, 2)).logits.shape == (1, 2, VOCAB)
    with pytest.raises(VerificationError, match="the executor's model has 97 tokens"):
        SplitModelForCausalLM.connect(server.uri, tmp_path / "vocab", trusted=False)
    for trusted in (True, False):
        with pytest.raises(ModelError, match=r"no config\.json"):
            SplitModelForCausalLM.connect(server.uri, tmp_path / "empty", trusted=trusted)
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "nobody knows"}')
    with pytest.raises(ModelError, match=r"ValueError: .*nobody knows"):
        SplitModelForCausalLM.connect(server.uri, tmp_path / "empty", trusted=False)


def test_a_random_model_has_its_presets_configuration(socket_dir: Path) -> None:
    executor = Executor(open_model("random:tiny"))
    with fastsplit.Server(f"unix://{socket_dir}/s", executor.handlers, arrays="torch") as server:
        with SplitModelForCausalLM.connect(server.uri, "random:tiny") as model:
            assert model.config.hidden_size == 64 and model.config.model_type == "llama"
            assert _generate(model, _ids(2, 3)).shape == (2, 27)


def test_two_threads_take_turns(ours: SplitModelForCausalLM, reference: Any) -> None:
    prompts = [_ids(1, 5 + index, seed=index) for index in range(2)]
    found: dict[int, torch.Tensor] = {}

    def work(index: int) -> None:
        found[index] = ours.generate(prompts[index], max_new_tokens=10, do_sample=False)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, prompt in enumerate(prompts):
        assert torch.equal(found[index], reference.generate(prompt, max_new_tokens=10, do_sample=False))

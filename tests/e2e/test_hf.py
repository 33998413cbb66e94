"""The split against Hugging Face's own model on the same weights: logits, tokens, and how many calls it took."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lazy_driver import STREAMS, LazyDriver

from fastsplit.devices import Cuda
from fastsplit.errors import RemoteOpError, VerificationError
from fastsplit.models import open_model
from fastsplit.ops import choose_block_rows, row_blocks
from fastsplit.runner import PLANS, RemoteModel, Runner, Sampling, sample

pytest.importorskip("transformers")
import itertools

from split import CONFIGS, LLAMA3_ROPE, decode_elements, load_hf, make_model, relative_error, split

CALLS = {"per-op": (9, 2), "batched": (6, 2)}
FP32_TOLERANCE = 1e-5


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return f"unix://{tmp_path}/split.sock"


def _calls(plan: str, layers: int) -> int:
    per_layer, once = CALLS[plan]
    return per_layer * layers + once


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_greedy_tokens_are_hf(tmp_path: Path, uri: str, name: str, plan: str) -> None:
    model = make_model(tmp_path / "model", CONFIGS[name])
    reference = load_hf(tmp_path / "model")
    ids = torch.randint(0, 97, (150,), generator=torch.Generator().manual_seed(1))  # more than one row block
    with split(model, uri, plan=plan) as (runner, _):
        cache = runner.new_cache(8)  # it has to grow
        logits = runner.forward(ids, cache, all_logits=True)
        assert relative_error(logits, reference(ids[None]).logits[0]) <= FP32_TOLERANCE
        step = runner.forward(torch.tensor([5]), cache)
        both = torch.cat([ids, torch.tensor([5])])
        assert relative_error(step[0], reference(both[None]).logits[0, -1]) <= FP32_TOLERANCE
        tokens = list(runner.generate(ids[:11], 32))
        expected = reference.generate(ids[None, :11], max_new_tokens=32, do_sample=False)[0, 11:].tolist()
        assert tokens == expected


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["grouped heads", "everything at once"])
def test_low_precision_is_as_close_to_fp32_as_hf_is(tmp_path: Path, uri: str, name: str, dtype: str, plan: str) -> None:
    model = make_model(tmp_path / "model", CONFIGS[name])
    ids = torch.randint(0, 97, (70,), generator=torch.Generator().manual_seed(1))
    reference = load_hf(tmp_path / "model")(ids[None]).logits[0]
    theirs = relative_error(load_hf(tmp_path / "model", dtype)(ids[None]).logits[0], reference)
    with split(model, uri, plan=plan, dtype=dtype) as (runner, _):
        ours = relative_error(runner.forward(ids, runner.new_cache(70), all_logits=True), reference)
    assert ours <= 1.5 * theirs
    assert theirs < 0.1, "the reference itself makes sense"


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("eager", [(), STREAMS], ids=["as late as possible", "as soon as possible"])
def test_the_cuda_path_gives_the_same(tmp_path: Path, uri: str, plan: str, eager: tuple[str, ...]) -> None:
    model = make_model(tmp_path / "model", CONFIGS["everything at once"])
    reference = load_hf(tmp_path / "model")
    ids = torch.randint(0, 97, (150,), generator=torch.Generator().manual_seed(1))
    with split(model, uri, plan=plan, device=Cuda(LazyDriver(eager))) as (runner, _):
        logits = runner.forward(ids, runner.new_cache(150), all_logits=True)
        assert relative_error(logits, reference(ids[None]).logits[0]) <= FP32_TOLERANCE
        expected = reference.generate(ids[None, :11], max_new_tokens=8, do_sample=False)[0, 11:].tolist()
        assert list(runner.generate(ids[:11], 8)) == expected


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("prompt", [1, 40, 200])
def test_exact_counts_of_prefill_and_each_step(tmp_path: Path, uri: str, plan: str, prompt: int) -> None:
    model = make_model(tmp_path / "model", {})
    config = model.config
    ids = torch.arange(prompt) % 97
    with split(model, f"{uri}?shm=off", plan=plan) as (runner, channel):
        counts, sent, received = [], [], []
        for _ in runner.generate(ids, 4):
            counts.append(channel.stats.calls)
            sent.append(channel.stats.bytes_sent)
            received.append(channel.stats.bytes_received)
        assert channel.stats.bytes_copied == 0
        setup = 2
        assert counts[0] - setup == _calls(plan, config.num_hidden_layers)
        assert [b - a for a, b in itertools.pairwise(counts)] == [_calls(plan, config.num_hidden_layers)] * 3
        assert runner.recorder.rpc_calls == 4 * _calls(plan, config.num_hidden_layers)
        out, back = decode_elements(config, plan, prompt + 1)
        heads_nbytes = 600 * _calls(plan, config.num_hidden_layers)  # header and metadata of each message
        assert 0 < sent[1] - sent[0] - 4 * out - 8 < heads_nbytes
        assert 0 < received[1] - received[0] - 4 * back < heads_nbytes


def test_prefill_moves_only_what_is_below_the_diagonal(tmp_path: Path, uri: str) -> None:
    model = make_model(tmp_path / "model", {"num_hidden_layers": 1})
    ids = torch.zeros(300, dtype=torch.int64)
    elements = sum(block.rows * block.columns for block in row_blocks(300, 300, choose_block_rows(300)))
    with split(model, f"{uri}?shm=off", plan="batched") as (runner, channel):
        runner.forward(ids, runner.new_cache(300), all_logits=True)
        whole = channel.stats.bytes_received
        runner.forward(ids, runner.new_cache(300))
        last_row = channel.stats.bytes_received - whole
    assert elements < 0.75 * 300 * 300
    assert whole - last_row > 4 * (6 * elements + 299 * 97), "the last layer continues with one row only"


def test_report_adds_up_and_counts_operations(tmp_path: Path, uri: str) -> None:
    layers = 3
    model = make_model(tmp_path / "model", {})
    with split(model, uri, plan="batched") as (runner, _):
        list(runner.generate(torch.arange(20), 3))
        report = runner.recorder.as_dict()
    parts = ("serialization_s", "communication_s", "gpu_compute_s", "tee_compute_s")
    assert sum(report[part] for part in parts) == pytest.approx(report["wall_s"], rel=0.02)
    assert report["prefill_s"] + report["decode_s"] == pytest.approx(report["wall_s"], rel=1e-6)
    assert all(report[part] > 0 for part in parts)
    counts = {name: op["count"] / 3 for name, op in report["ops"].items() if op["count"]}
    assert counts == {
        "embedding": 1,
        "linear": 7 * layers,
        "matmul": 2 * layers,
        "lm_head": 1,
        "rmsnorm": 2 * layers + 1,
        "rotary": layers,
        "softmax": layers,
        "silu": layers,
        "residual": 2 * layers,
        "kv_cache": layers,
        "sampling": 1,
    }


def test_sampling_draws_from_hf_distribution(tmp_path: Path) -> None:
    from transformers.generation.logits_process import (
        LogitsProcessorList,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = torch.randn(50, generator=torch.Generator().manual_seed(3)) * 3
    sampling = Sampling(temperature=0.7, top_k=12, top_p=0.8, seed=5)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.7), TopKLogitsWarper(12), TopPLogitsWarper(0.8)])
    expected = warpers(torch.zeros(1, 1, dtype=torch.int64), logits[None])[0].softmax(-1)
    generator = torch.Generator().manual_seed(5)
    draws = torch.tensor([sample(logits, sampling, generator) for _ in range(20000)])
    found = torch.bincount(draws, minlength=50) / len(draws)
    assert not found[expected == 0].any(), "nothing that the warpers removed is ever drawn"
    assert (found - expected).abs().max() < 0.02


def test_generation_is_repeatable_by_seed_and_stops_at_eos(tmp_path: Path, uri: str) -> None:
    model = make_model(tmp_path / "model", {})
    with split(model, uri, plan="batched") as (runner, _):
        hot = Sampling(temperature=1.0, seed=9)
        first = list(runner.generate(torch.arange(5), 12, sampling=hot))
        assert first == list(runner.generate(torch.arange(5), 12, sampling=hot))
        assert first != list(runner.generate(torch.arange(5), 12, sampling=Sampling(temperature=1.0, seed=10)))
        greedy = list(runner.generate(torch.arange(5), 12))
        assert list(runner.generate(torch.arange(5), 0)) == []
        calls = runner.recorder.rpc_calls
        list(runner.generate(torch.arange(5), 1))
        assert runner.recorder.rpc_calls - calls == _calls("batched", 3), "one token needs no decode step"
    stop = greedy[2]
    changed = {"eos_token_id": stop}
    model = make_model(tmp_path / "eos", changed)
    with split(model, uri, plan="batched") as (runner, _):
        assert list(runner.generate(torch.arange(5), 12)) == greedy[: greedy.index(stop) + 1]
        assert list(runner.generate(torch.arange(5), 12, ignore_eos=True)) == greedy


def test_the_trusted_copy_is_what_counts(tmp_path: Path, uri: str) -> None:
    model = make_model(tmp_path / "model", {})
    other_norms = make_model(tmp_path / "norms", {}, seed=1)
    other_shape = make_model(tmp_path / "shape", {"rms_norm_eps": 1e-3, "rope_parameters": LLAMA3_ROPE})
    with split(model, uri, plan="batched") as (_, channel):
        assert RemoteModel.fetch(channel, None).config == model.config
        with pytest.raises(VerificationError, match="norm weights: 7 of 7"):
            RemoteModel.fetch(channel, other_norms)
        with pytest.raises(VerificationError, match=r"rms_norm_eps: 1e-06, expected 0\.001"):
            RemoteModel.fetch(channel, other_shape)


BAD_REQUESTS = {
    "embedding of floats": ("embedding", lambda: [torch.zeros(3)], {}, "ids: "),
    "ids out of range": ("embedding", lambda: [torch.tensor([97])], {}, "ids: 97 to 97"),
    "negative ids": ("embedding", lambda: [torch.tensor([-1])], {}, "ids: -1"),
    "no tensor": ("linear", list, {"layer": 0, "names": ["q"]}, "0 tensors"),
    "no such layer": ("linear", lambda: [torch.zeros(1, 48)], {"layer": 3, "names": ["q"]}, "layer: 3"),
    "no such linear": ("linear", lambda: [torch.zeros(1, 48)], {"layer": 0, "names": ["qq"]}, "names: "),
    "mixed inputs": ("linear", lambda: [torch.zeros(1, 48)], {"layer": 0, "names": ["q", "down"]}, "same input"),
    "wrong width": ("linear", lambda: [torch.zeros(1, 47)], {"layer": 0, "names": ["q"]}, r"x: float32 \[1, 47\]"),
    "wrong dtype": ("lm_head", lambda: [torch.zeros(1, 48).half()], {}, "x: float16"),
    "no block rows": ("scores", lambda: [torch.zeros(2, 6, 8), torch.zeros(2, 2, 8)], {}, "block_rows: None"),
    "more rows than keys": (
        "scores",
        lambda: [torch.zeros(3, 6, 8), torch.zeros(2, 2, 8)],
        {"block_rows": 8},
        "q: 3 rows",
    ),
    "too many blocks": (
        "scores",
        lambda: [torch.zeros(60, 6, 8), torch.zeros(60, 2, 8)],
        {"block_rows": 1},
        "60 blocks",
    ),
    "more columns than values": (
        "values",
        lambda: [torch.zeros(6, 1, 3), torch.zeros(2, 2, 8)],
        {},
        "row block 0: 3 columns",
    ),
}


def test_bad_requests_are_answered_by_name_and_change_nothing(tmp_path: Path, uri: str) -> None:
    model = make_model(tmp_path / "model", {})
    with split(model, uri, plan="batched") as (runner, channel):
        before = list(runner.generate(torch.arange(5), 4))
        for op, tensors, attrs, text in BAD_REQUESTS.values():
            with pytest.raises(RemoteOpError, match=text):
                channel.call(op, *tensors(), **attrs)
        assert list(runner.generate(torch.arange(5), 4)) == before


def test_an_unknown_plan_is_refused(tmp_path: Path) -> None:
    model = open_model("random:tiny")
    remote = RemoteModel("tiny", model.config, "float32", model.norms())
    with pytest.raises(ValueError, match="plan 'best', expected one of per-op, batched"):
        Runner(remote, None, "best")  # type: ignore[arg-type]

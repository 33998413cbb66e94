"""A GPU side that lies, clients that ask for too much: one clear line and the documented exit code, nothing else."""

from __future__ import annotations

import itertools
import json
import math
import re
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import fastsplit
from fastsplit import SplitModelForCausalLM, tee_side
from fastsplit.errors import LimitError, ModelError, RemoteOpError
from fastsplit.executor.service import Executor
from fastsplit.models import ModelConfig, open_model
from fastsplit.split.contract import CONTRACT
from fastsplit.split.plan import STEP_LISTS
from fastsplit.tee.remote import RemoteModel
from fastsplit.tee.runner import Runner
from fastsplit.tee.sampling import Sampling, sample

pytest.importorskip("transformers")
from split import make_model  # (one thread for torch)

MODEL = open_model("random:tiny")


@pytest.fixture(scope="module")
def executor() -> Executor:
    return Executor(MODEL)


def config(rope: dict[str, Any] | None = None, **changes: Any) -> str:
    """The tiny model's configuration as an executor describes it, with changes."""
    values = asdict(MODEL.config)
    values["rope"].update(rope or {})
    return json.dumps({**values, **changes})


def lying(executor: Executor, lies: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """An executor's handlers with others in their place, for operations or for the steps of `run`."""
    by_steps = {name: lie for name, lie in lies.items() if name not in executor.handlers}
    assert set(by_steps) <= set(STEP_LISTS)

    def run(call: fastsplit.Call) -> Any:
        return by_steps.get(call.attrs["steps"], executor.handlers["run"])(call)

    return {**executor.handlers, "run": run, **{op: lie for op, lie in lies.items() if op not in by_steps}}


def tee(executor: Executor, lies: dict[str, Callable[..., Any]], *flags: str) -> int:
    """`lies`: handlers, by the operation or the steps of `run` that they answer."""
    with fastsplit.Server("tcp://127.0.0.1:0", lying(executor, lies), arrays="torch") as server:
        return tee_side.main(["--connect", server.uri, *(flags or ("--prefill", "5", "--max-new-tokens", "2"))])


def describe(text: Any, **changes: Any) -> dict[str, Callable[..., Any]]:
    said = {"config": text, "contract": CONTRACT, "dtype": "float32", "name": "x", "threads": 1, **changes}
    said = {name: value for name, value in said.items() if value is not None}
    return {"describe": lambda call: call.reply_attrs.update(said)}


def last_line(capfd: pytest.CaptureFixture[str]) -> str:
    """The line that says what went wrong: the only one but for the warning that nothing is checked, and what was chosen
    for the link."""
    out, err = capfd.readouterr()
    assert out == ""
    told = re.compile("tee_side: (warning: configuration|plan|lanes|blocks|cast) ")
    lines = [line for line in err.split("\n") if line and not told.match(line)]
    assert len(lines) == 1, err
    assert lines[0].isprintable()
    assert len(lines[0]) < 1100
    return lines[0]


LIES = {
    "nested JSON": "[" * 60000,
    "not a string": 5,
    "null": "null",
    "a huge number": config(rms_norm_eps=10**400),
    "a text as size": config(vocab_size="a"),
    "a boolean as size": config(vocab_size=True),
    "negative": config(hidden_size=-1),
    "a million layers": config(num_hidden_layers=10**6),
    "heads that fill the memory": config(num_attention_heads=2**20, num_key_value_heads=2**20),
    "frequencies that fill the memory": config(head_dim=2**20),
    "heads that do not divide": config(num_attention_heads=3),
    "epsilon": config(rms_norm_eps="x"),
    "NaN": config(rms_norm_eps=math.nan),
    "infinite end": config(eos_token_ids=[math.inf]),
    "end in a list": config(eos_token_ids=[[1]]),
    "flag": config(attention_bias="no"),
    "rope of no kind": config({"kind": "yarn"}),
    "rope, theta": config({"theta": "x"}),
    "rope, huge theta": config({"theta": 10**400}),
    "rope, division by zero": config({"kind": "llama3", "low_freq_factor": 0, "original_max_position_embeddings": 8}),
    "terminal escapes": config(**{"\x1b[2J\n": 1}),
}


@pytest.mark.parametrize("name", LIES)
def test_a_configuration_that_makes_no_sense(executor: Executor, capfd: pytest.CaptureFixture[str], name: str) -> None:
    for flags in ((), ("--model", "random:tiny")):
        assert tee(executor, describe(LIES[name]), "--prefill", "2", *flags) == 4
        assert "protocol: describe, config" in last_line(capfd)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("contract", None),
        ("contract", CONTRACT + 1),
        ("contract", "\x1b[2J" * 9),
        ("contract", [CONTRACT]),
        ("threads", "\x1b[2J"),
        ("threads", -1),
        ("threads", 1.5),
        ("threads", True),
        ("dtype", "\x1b[2J"),
        ("dtype", 5),
    ],
)
def test_a_description_that_makes_no_sense(
    executor: Executor, capfd: pytest.CaptureFixture[str], name: str, value: Any
) -> None:
    for flags in ((), ("--model", "random:tiny")):
        assert tee(executor, describe(config(), **{name: value}), "--prefill", "2", *flags) == 4
        assert f"protocol: describe, {name}: " in last_line(capfd)


@pytest.mark.parametrize("threads", [0, 1, 2**62])
def test_threads_are_a_hint_and_no_more(executor: Executor, capfd: pytest.CaptureFixture[str], threads: int) -> None:
    """However many the GPU side says that it has: tokens are the same."""
    found = []
    for said in (1, threads):
        flags = ("--prefill", "40", "--max-new-tokens", "3", "--format", "json", "--model", "random:tiny")
        assert tee(executor, describe(config(), threads=said), *flags) == 0
        found.append(json.loads(capfd.readouterr().out))
    assert found[0]["tokens"] == found[1]["tokens"]
    assert [each["lanes"] for each in found] == [1, 1 if threads else 2]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("plan", ["batched", "folded", "tee-attention"])
@pytest.mark.parametrize("flags", [("0",), ("2",), ("2", "--temperature", "1"), ("0", "--format", "json")])
def test_logits_that_are_not_finite(
    executor: Executor, capfd: pytest.CaptureFixture[str], value: float, plan: str, flags: tuple[str, ...]
) -> None:
    logits = torch.zeros(1, 1, 256)
    logits[0, 0, 7] = value
    lies = {"lm_head": lambda call: logits, "down add norm lm_head": lambda call: (torch.ones(1, 1, 64), logits)}
    assert tee(executor, lies, "--prefill", "2", "--plan", plan, "--max-new-tokens", *flags) == 4
    assert "lm_head, logits" in last_line(capfd)


@pytest.mark.parametrize("plan", ["folded", "minimal", "tee-attention"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, 1e38])
def test_a_residual_stream_that_makes_no_sense(
    executor: Executor, capfd: pytest.CaptureFixture[str], value: float, plan: str
) -> None:
    """Its length is what everything is scaled by: whatever it is, nothing is chosen by numbers that are none."""
    lies = {"down add norm lm_head": lambda call: (torch.full((1, 1, 64), value), torch.ones(1, 1, 256))}
    code = tee(executor, lies, "--prefill", "2", "--plan", plan, "--max-new-tokens", "1", "--format", "json")
    if value == value:
        assert code == 0
        assert all(math.isfinite(logit) for _, logit in json.loads(capfd.readouterr().out)["top_logits"])
    else:
        assert code == 4
        assert "lm_head, logits" in last_line(capfd)


@pytest.mark.parametrize("plan", ["per-op", "folded", "minimal", "tee-attention"])
@pytest.mark.parametrize("rows", ["1", "3"])
def test_a_residual_stream_of_zeros_and_no_epsilon(
    executor: Executor, capfd: pytest.CaptureFixture[str], rows: str, plan: str
) -> None:
    """It has no length: one row or many, what comes of it is no number, and nothing is chosen by it."""
    lies = {
        **describe(config(rms_norm_eps=0.0)),
        "embed": lambda call: torch.zeros(1, int(rows), 64),
        "down add norm lm_head": lambda call: (torch.zeros(1, 1, 64), torch.ones(1, 1, 256)),
    }
    assert tee(executor, lies, "--prefill", rows, "--plan", plan, "--max-new-tokens", "1") == 4
    assert "lm_head, logits" in last_line(capfd)


@pytest.mark.parametrize("text", ["\x1b[2J\x07\r\nline\nline\u202e", "A" * 5_000_000])
def test_the_text_of_an_error_is_one_plain_line(
    executor: Executor, capfd: pytest.CaptureFixture[str], text: str
) -> None:
    def fail(call: fastsplit.Call) -> None:
        raise RuntimeError(text)

    assert tee(executor, {"run": fail}) == 1
    assert last_line(capfd).startswith("tee_side: run: RuntimeError: ")


REPLIES: dict[str, Callable[..., Any]] = {
    "nothing": lambda call: None,
    "too many": lambda call: [torch.ones(1, 5, 64)] * 3,
    "another dtype": lambda call: torch.ones(1, 5, 64, dtype=torch.float64),
    "another shape": lambda call: torch.ones(1, 64, 5),
    "another rank": lambda call: torch.ones(5, 64),
    "gigabytes": lambda call: torch.ones(1, 1, 1).expand(1, 2**14, 2**12),
}


FOLDED_START, MINIMAL_START = "embed norm qkv store_v", "embed tables norm qkv store_v rope store_k scores"
HOME = ("--model", "random:tiny")
OPS: dict[str, tuple[str, ...]] = {
    "describe": ("auto",),
    "tee_weights": ("auto",),
    "open": ("auto",),
    **dict.fromkeys(("q", "k", "v", "gate", "up"), ("per-op",)),
    **dict.fromkeys(("embed", "qkv", "store_k scores", "store_v values", "o", "gate_up", "down"), ("batched",)),
    "lm_head": ("batched",),
    "qkv store_v": ("fused",),
    "values o": ("fused",),
    FOLDED_START: ("folded",),
    "store_k scale_v scores": ("folded",),
    "store_k scale_v select scores": ("folded",),
    "values o add norm gate_up": ("folded",),
    "down add norm qkv store_v": ("folded",),
    "down add norm lm_head": ("folded",),
    MINIMAL_START: ("minimal",),
    "scale_kv values o add norm gate_up": ("minimal",),
    "down add norm qkv store_v rope store_k select scores": ("minimal",),
    "embed norm qkv": ("tee-attention",),
    "residual norm qkv": ("tee-attention", *HOME),
    "o add norm gate_up": ("tee-attention",),
    "select o add norm gate_up": ("tee-attention", *HOME),
    "down add norm qkv": ("tee-attention",),
}
"""Each operation, and the steps of each call, whose reply is needed; a plan that has it, and flags."""


@pytest.mark.parametrize(
    ("op", "name"),
    [
        *((op, "another shape") for op in list(OPS)[3:]),
        *(("down add norm qkv store_v", name) for name in REPLIES if name != "another shape"),
    ],
)
def test_a_reply_that_was_not_asked_for(
    executor: Executor, capfd: pytest.CaptureFixture[str], op: str, name: str
) -> None:
    assert tee(executor, {op: REPLIES[name]}, "--prefill", "5", "--plan", *OPS[op]) == 4
    assert "protocol: a reply" in last_line(capfd)


@pytest.mark.parametrize("number", [None, "1", 2**63 - 1])
def test_a_session_that_is_none(executor: Executor, capfd: pytest.CaptureFixture[str], number: Any) -> None:
    """What is no number is the peer's fault; one that it does not know is its own affair, and comes back as such."""

    def lie(call: fastsplit.Call) -> None:
        if number is not None:
            call.reply_attrs["session"] = number

    code = tee(executor, {"open": lie})
    assert code == (1 if isinstance(number, int) else 4)
    assert "session: " in last_line(capfd)


@pytest.mark.parametrize("op", OPS)
def test_a_gpu_side_that_leaves(executor: Executor, capfd: pytest.CaptureFixture[str], op: str) -> None:
    leave = {op: lambda call: call._served.core.connection.transport.shutdown()}
    assert tee(executor, leave, "--prefill", "5", "--plan", *OPS[op]) == 3
    assert "connection: " in last_line(capfd)


def test_a_gpu_side_that_leaves_at_the_very_end(executor: Executor, capfd: pytest.CaptureFixture[str]) -> None:
    """All tokens are there, and the session has gone with the connection: nothing is lost."""
    leave = {"close": lambda call: call._served.core.connection.transport.shutdown()}
    assert tee(executor, leave, "--prefill", "5", "--max-new-tokens", "3", "--format", "json") == 0
    assert json.loads(capfd.readouterr().out)["new_tokens"] == 3


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--prompt-ids", "9" * 30), "prompt ids"),
        (("--prompt-ids", "-1"), "prompt ids"),
        (("--prefill", "1" + "0" * 15), "512 positions"),
        (("--prefill", "1" + "0" * 30), "512 positions"),
    ],
)
def test_prompts_beyond_all_measure(
    executor: Executor, capfd: pytest.CaptureFixture[str], flags: tuple[str, str], text: str
) -> None:
    assert tee(executor, {}, *flags) == 2
    assert text in last_line(capfd)


def test_a_trace_that_cannot_be_written_costs_only_the_trace(
    executor: Executor, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ("--prefill", "2", "--max-new-tokens", "1", "--format", "json", "--trace", "/nowhere/trace.json")
    assert tee(executor, {}, *flags) == 1
    out, err = capfd.readouterr()
    assert json.loads(out)["new_tokens"] == 1
    assert "/nowhere/trace.json: No such file or directory" in err


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-6, 1e300, math.inf])
def test_every_temperature_draws(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([-3e38, 1.0, 3e38, 2.0]) if temperature < 1 else torch.tensor([0.0, 1.0, 2.0, 3.0])
    token = sample(logits, Sampling(temperature), generator)
    assert token == 2 if temperature < 1 else 0 <= token < 4


def test_requests_that_would_make_a_large_reply_are_refused() -> None:
    executor = Executor(MODEL, max_reply_nbytes=40_000)
    ids = torch.zeros(1, 200, dtype=torch.int64)
    some = ids[:, :130]
    tables = torch.zeros(1, 130, 8)
    with (
        fastsplit.Server("tcp://127.0.0.1:0", executor.handlers, arrays="torch") as server,
        fastsplit.connect(server.uri, arrays="torch") as channel,
        fastsplit.connect(server.uri, arrays="torch") as other,
    ):
        number = channel.call("open", batch=1, capacity=0, dtype="float32").attrs["session"]
        at = {"session": number, "lane": 0, "layer": 0, "start": 0}
        for steps, tensors, attrs in (
            ("embed", (ids,), {}),
            (FOLDED_START, (ids,), {}),
            (FOLDED_START, (ids[:, :150],), {}),  # the embedding alone is not too large
            (MINIMAL_START, (some, tables, tables), {"first": 0, "last": 130}),
            ("gate", (torch.zeros(1, 80, 64),), {}),
            ("gate_up", (torch.zeros(1, 50, 64),), {}),
            ("lm_head", (torch.zeros(1, 40, 64),), {}),
            ("qkv", (torch.zeros(1, 120, 64),), {}),
            ("qkv store_v", (torch.zeros(1, 120, 64),), {}),
            ("store_k scores", (torch.zeros(1, 60, 6, 16),), {"first": 0, "last": 60}),
            ("residual norm qkv", (torch.zeros(1, 120, 64),), {}),
            ("residual norm qkv", (torch.zeros(1, 60, 64),), None),
            ("o add norm gate_up", (torch.zeros(1, 60, 64),), {}),
        ):
            if attrs is None:
                channel.call("run", *tensors, steps=steps, **at)  # what the next one needs
                continue
            with pytest.raises(RemoteOpError, match=f"{LimitError.__name__}: a reply of .* bytes, expected at most"):
                channel.call("run", *tensors, steps=steps, **at, **attrs)
        own = other.call("open", batch=1, capacity=0, dtype="float32").attrs["session"]
        assert other.call("run", ids[:, :9], steps="embed", **{**at, "session": own})[0].shape == (1, 9, 64)
        with pytest.raises(RemoteOpError, match="not open on this connection"):
            other.call("run", ids[:, :9], steps="embed", **at)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 0},
        {"eos_token_id": "x"},
        {"rope_parameters": [1]},
        {"rope_parameters": {"rope_type": "linear", "factor": 0}},
        {"hidden_size": None},
    ],
)
def test_config_json_of_odd_types(changes: dict[str, Any]) -> None:
    values = {**MODEL.config.to_hf(), "head_dim": None, **changes}
    with pytest.raises(ModelError, match="config"):
        ModelConfig.from_hf(values)


@pytest.mark.parametrize("text", ["garbage", "{}", "[]"])
def test_a_tokenizer_that_is_none(capfd: pytest.CaptureFixture[str], tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    flags = ("--connect", "unix:///nowhere.sock", "--tokenizer", str(tmp_path), "--prompt", "a")
    assert tee_side.main(flags) == 1
    assert "tee_side: tokenizer " in last_line(capfd)


# ---- the executor's log ----------------------------------------------------------------------------------------------


def test_a_hostile_client_fills_no_log_with_tracebacks(
    executor: Executor, unix_uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What is wrong with a request is one line."""
    failed = 0
    with fastsplit.Server(unix_uri, executor.handlers, arrays="torch") as server:
        with fastsplit.connect(server.uri, arrays="torch") as channel:
            session = channel.call("open", batch=1, capacity=4, dtype="float32").attrs["session"]
            attributes: list[dict[str, Any]] = [
                {},
                {"session": 99, "layer": 0, "start": 0},
                {"session": session, "lane": 0, "layer": 0, "start": 0, "length": -1, "blocks": [1, 2, 3]},
                {"session": session, "lane": 99, "layer": 0, "start": 10**6},
                {"session": "x", "layer": -1, "start": 1.5, "batch": 1, "capacity": -1, "dtype": "int8"},
            ]
            tensors = [(), (torch.ones(3),), (torch.full((1, 1, 1), 10**6),) * 3, (torch.full((1, 1), -1),)]
            ops = sorted(set(executor.handlers) - {"describe", "tee_weights", "close", "run"})
            wrong = [*((op, {}) for op in ops), *(("run", {"steps": steps}) for steps in (5, "q k", *STEP_LISTS))]
            for (op, steps), attrs, given in itertools.product(wrong, attributes, tensors):
                with pytest.raises(RemoteOpError):
                    channel.call(op, *given, **steps, **attrs)
                failed += 1
    records = [record for record in caplog.records if record.name == "fastsplit.server"]
    assert len(records) == failed
    assert {record.levelname for record in records} == {"WARNING"}
    assert not any(record.exc_text for record in records)


# ---- an executor that stalls -----------------------------------------------------------------------------------------


def _stalled(directory: Path, after: int) -> tuple[dict[str, Any], threading.Event]:
    """An executor's handlers that wait at the `after`th call for scores, and from then on, until they are let go."""
    go_on = threading.Event()
    handlers = dict(Executor(open_model(str(directory))).handlers)
    run, calls = handlers["run"], itertools.count(1)

    def stalls(call: Any) -> Any:
        if call.attrs["steps"] == "store_k scores" and next(calls) >= after:
            go_on.wait(20)
        return run(call)

    return {**handlers, "run": stalls}, go_on


@pytest.mark.parametrize(("query", "after"), [("", 4), ("?shm=off", 1)])
def test_a_stalled_executor_costs_one_deadline_and_the_error_names_the_call(
    tmp_path: Path, unix_uri: str, query: str, after: int
) -> None:
    make_model(tmp_path, {})
    handlers, go_on = _stalled(tmp_path, after)
    with fastsplit.Server(unix_uri + query, handlers, arrays="torch") as server:
        with fastsplit.connect(server.uri, call_timeout_s=0.5) as channel:
            runner = Runner(RemoteModel.fetch(channel, None), channel, "fused")
            started = time.monotonic()
            with torch.inference_mode(), pytest.raises(fastsplit.DeadlineError, match=r"^run: no reply within"):
                list(runner.generate(torch.arange(5), 3))
            assert time.monotonic() - started < 0.9
        with SplitModelForCausalLM.connect(server.uri, tmp_path, plan="fused", call_timeout_s=0.5) as model:
            started = time.monotonic()
            with pytest.raises(fastsplit.DeadlineError, match=r"^run: no reply within"):
                model.generate(torch.arange(5)[None], max_new_tokens=3, do_sample=False, pad_token_id=0)
            assert time.monotonic() - started < 0.9
        go_on.set()

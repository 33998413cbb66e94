"""The ladder's parts: names of rows, floors, an executor that computes nothing, and files that keep what they have."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zmq.utils.garbage

from benches import ladder, rungs
from benches.ladder import ROWS, main
from benches.measurements import median, table
from benches.null_executor import NullExecutor, NullRivalService
from benches.rivals.backend import RivalBackend, rival_runner
from benches.rungs import floors
from benches.splits import Rung, parse_rung
from fastsplit import Server, connect
from fastsplit.models import open_model
from fastsplit.split.ops import PLANS
from fastsplit.tee.remote import RemoteModel
from fastsplit.tee.runner import Runner


@pytest.fixture(autouse=True)
def no_zmq_thread() -> Any:
    """pyzmq starts a thread at the first send without a copy, and keeps it; here it ends with the test."""
    yield
    zmq.utils.garbage.gc.stop()


@pytest.fixture(scope="module")
def null() -> Any:
    return NullExecutor(open_model("random:tiny"), elements=2**20)


def test_a_row_is_what_its_name_says() -> None:
    assert parse_rung("folded+zstd+bfloat16+lanes4+blocks64") == Rung(
        "folded+zstd+bfloat16+lanes4+blocks64", None, "folded", "zstd", "bfloat16", 4, 64
    )
    assert parse_rung("original") == Rung("original", "original", "per-op", lanes=1)
    assert parse_rung("tuned-batched").service == "tuned-tcp"
    assert parse_rung("auto").auto
    assert len({parse_rung(name) for name in ROWS}) == len(ROWS)


@pytest.mark.parametrize("name", ["", "folded+", "folded+lanes", "folded+lanes0", "folded+lz4+zlib", "original-fused"])
def test_what_is_no_row_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"expected one of|two of a kind"):
        parse_rung(name)


def test_floors() -> None:
    measured = {"bytes_sent": 100, "bytes_received": 300, "rpc_calls": 8, "chain_calls": 4, "asynchronous": False}
    assert floors(measured, 100, 0.5) == {
        "floor_blocking_s": 4 + 8 * 0.5,
        "floor_overlapped_s": 3 + 0.5,
        "floor_added_s": 3 + 4 * 0.5,
        "floor_s": 8.0,
    }
    several = {**measured, "asynchronous": True}
    assert floors(several, 100, 0.5)["floor_s"] == 3.5
    assert floors(several, 100, 2.0)["floor_s"] == 8.0  # the bytes hide behind the round trips


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("plan", PLANS)
def test_the_null_executor_has_the_shapes_that_a_runner_expects(null: Any, plan: str, lanes: int) -> None:
    ids = torch.zeros(2, 200, dtype=torch.int64)
    with (
        torch.inference_mode(),
        Server("tcp://127.0.0.1:0", null.handlers) as server,
        connect(server.uri) as channel,
    ):
        runner = Runner(RemoteModel.fetch(channel, open_model("random:tiny")), channel, plan, lanes=lanes)
        with runner.new_cache(2) as cache:
            logits = runner.forward(ids, cache)
            assert logits.shape == (2, 1, null.config.vocab_size)
            assert logits.isfinite().all()
            cache.reorder(torch.tensor([1]))
            assert runner.forward(ids[:1, :1], cache, keep="all").shape == (1, 1, null.config.vocab_size)


@pytest.mark.parametrize("plan", ["per-op", "batched"])
def test_a_rival_has_as_many_calls_of_it_as_the_plan_says(null: Any, plan: str) -> None:
    known = RemoteModel("null", null.config, "float32", open_model("random:tiny").tee_weights())
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        service = stack.enter_context(NullRivalService("tcp://127.0.0.1:*", "original", null))
        backend = stack.enter_context(RivalBackend(service.address, "original", null.config))
        runner = rival_runner(known, backend, plan)
        cache = stack.enter_context(runner.new_cache(1))
        assert runner.forward(torch.zeros(1, 20, dtype=torch.int64), cache).isfinite().all()
    a, b = PLANS[plan]
    assert backend.stats.calls == a * null.config.num_hidden_layers + b


def test_numbers_are_neither_zeros_nor_the_same_twice(null: Any) -> None:
    numbers = null.numbers(torch.float32)
    first, second = (numbers.take((300, 700)) for _ in range(2))
    assert 0.99 < float(first.std()) < 1.01
    assert not torch.equal(first, second)
    assert numbers.take((2**20 + 1,)).shape == (2**20 + 1,)  # more than there were


def test_medians_of_what_is_a_number() -> None:
    rounds = [
        {"wall_s": 1.0, "calls": 7, "same": True, "ops": {"a": {"total_s": 3.0, "side": "tee"}}, "said": None},
        {"wall_s": 4.0, "calls": 9, "same": False, "ops": {"a": {"total_s": 5.0, "side": "tee"}}, "said": ["x"]},
    ]
    assert median(rounds) == {
        "wall_s": 2.5,
        "calls": 7,
        "same": False,
        "ops": {"a": {"total_s": 4.0, "side": "tee"}},
        "said": ["x"],
    }
    assert median([{"wall_s": 1.0}, {"wall_s": 3.0, "ratio": 2.0}]) == {"wall_s": 2.0, "ratio": 2.0}


def test_a_table_has_dashes_for_what_a_row_lacks() -> None:
    columns = (("wall s", 8, lambda m: f"{m['wall_s']:.1f}"), ("calls", 7, lambda m: str(m["calls"])))
    shown = table("row", columns, {"a": {"wall_s": 1.0, "calls": 7}, "longer": {"wall_s": None}}, {"a": ["why"]})
    assert shown.splitlines() == [
        "row       wall s  calls",
        "a            1.0      7",
        "    why",
        "longer         -      -",
    ]


@contextmanager
def executor_in_here(null: Any) -> Iterator[Any]:
    """An executor's addresses, without a process of its own."""
    with ExitStack() as stack:
        tcp = stack.enter_context(Server("tcp://127.0.0.1:0", null.handlers)).uri
        original = stack.enter_context(NullRivalService("tcp://127.0.0.1:*", "original", null)).address
        addresses = {"fastsplit-unix": tcp, "fastsplit-tcp": tcp, "original-tcp": original}
        yield SimpleNamespace(ready=json.dumps(addresses), pid=os.getpid())


def test_a_file_keeps_the_rows_of_earlier_runs(
    null: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rungs, "one_way_bytes_per_s", lambda *_, **__: 3e9)  # which is measured for two seconds
    monkeypatch.setattr(ladder, "executor_process", lambda *_: executor_in_here(null))
    options = ["--model", "random:tiny", "--prefill", "130", "--links", "loopback", "--output-dir", str(tmp_path)]
    main([*options, "--rows", "folded", "original", "--rounds", "2"])
    main([*options, "--rows", "linear", "folded", "--rounds", "1"])
    content = json.loads((tmp_path / "ladder-loopback.json").read_text())
    assert {name: (row["run"], len(row["rounds"])) for name, row in content["rows"].items()} == {
        "original": (0, 2),
        "folded": (1, 1),
        "linear": (1, 1),
    }
    assert list(content["rows"]) == ["original", "folded", "linear"]  # in the ladder's order
    assert content["rows"]["linear"]["median"]["times_fewer_bytes"] > 1
    assert len(content["runs"]) == 2
    shown = capsys.readouterr().out
    main([*options, "--table"])
    assert capsys.readouterr().out in shown
    with pytest.raises(SystemExit):
        main([*options, "--prefill", "131", "--rows", "folded"])

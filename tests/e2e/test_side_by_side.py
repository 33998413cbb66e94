"""The rivals through the very same Runner: HF's logits and tokens, the same count of calls; and the commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import amount
import pytest
import torch
import zmq
import zmq.utils.garbage

import fastsplit
from benches import counts, split_systems
from benches.ladder import STEPS
from benches.processes import process
from benches.rivals.backend import RivalBackend, rival_runner
from benches.rivals.executor import RIVALS
from benches.rivals.hf import load
from benches.split_systems import Document, Phase, Setting, System, Workers, measure
from benches.splits import PLAN_NAMES
from fastsplit.models import Model, open_model
from fastsplit.split.plan import PLANS
from fastsplit.tee.remote import RemoteModel
from fastsplit.tee.runner import Runner

SPEC = "random:tiny@7"
ROOT = Path(__file__).resolve().parents[2]
SOME_PLANS = ("folded", "minimal", "batched")
SPLITS = [*(("shm", plan) for plan in PLAN_NAMES), *((link, plan) for link in ("unix", "tcp") for plan in SOME_PLANS)]
HF = ("hf-eager", "hf-sdpa")
SOME_SYSTEMS = ("shm-folded", "hf-eager", "hf-sdpa")
"""Which `make test` measures; `make exhaustive` measures all."""


@pytest.fixture(scope="module")
def model() -> Model:
    return open_model(SPEC)


@pytest.fixture(scope="module")
def hf(model: Model) -> Any:
    return load(model, "float32")


@pytest.fixture(scope="module")
def addresses() -> Iterator[dict[str, str]]:
    """One executor process, and where it serves each system."""
    with process("benches.rivals.executor", "--model", SPEC, "--threads", "1") as executor:
        yield json.loads(executor.ready)


@pytest.fixture(params=sorted(RIVALS))
def runner(request: pytest.FixtureRequest, model: Model, addresses: dict[str, str]) -> Iterator[Runner]:
    """The Runner on a rival's backend, in the plan that the original has."""
    with fastsplit.connect(addresses["fastsplit-unix"]) as channel:
        known = RemoteModel.fetch(channel, model)
    with RivalBackend(addresses[request.param], RIVALS[request.param], model.config, timeout_s=60) as backend:
        with torch.inference_mode():
            yield rival_runner(known, backend)
    zmq.utils.garbage.gc.stop()  # pyzmq's thread for sends without a copy


def test_a_rival_gives_hfs_logits(runner: Runner, hf: Any) -> None:
    ids = torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(1))
    expected = hf(ids[None]).logits[0]
    with runner.new_cache(1, len(ids)) as cache:
        ours = runner.forward(ids[None], cache, keep="all")[0]
    assert float((ours - expected).abs().max() / expected.abs().max()) <= 1e-4


def test_a_rival_gives_hfs_tokens_in_6_calls_a_layer_and_2(runner: Runner, model: Model, hf: Any) -> None:
    prompt = torch.randint(0, 256, (20,), generator=torch.Generator().manual_seed(2))
    new_tokens = 12
    expected = hf.generate(
        prompt[None],
        attention_mask=torch.ones(1, 20, dtype=torch.long),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    assert list(runner.generate(prompt, new_tokens)) == expected
    calls_a_step = 6 * model.config.num_hidden_layers + 2
    assert runner.recorder.rpc_calls == new_tokens * calls_a_step
    report = runner.recorder.as_dict()
    parts = ("serialization_s", "communication_s", "gpu_compute_s", "tee_compute_s")
    assert sum(report[part] for part in parts) == pytest.approx(report["wall_s"], rel=0.02)


@dataclass
class Ran:
    """What commands wrote: each its results into `directory`, bench_split also its tables."""

    directory: Path
    tables: str


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The commands, all at once: they mostly wait for imports, and for a link of 5 ms."""
    directory = tmp_path_factory.mktemp("results")
    quick = ["--quick", "--model", SPEC, "--tokens", "150", "--threads", "1"]
    some = [] if amount.exhaustive else ["prefill", "--only", *SOME_SYSTEMS]
    commands = {
        "bench_split": [*some, *quick, "--new-tokens", "6", "--output-dir", str(directory)],
        "ladder": [*quick, "--tokens", "192", "--output", str(directory / "split-ladder.json")],
    }
    if not amount.exhaustive:
        del commands["ladder"]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", f"benches.{module}", *options],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for module, options in commands.items()
    ]
    written = []
    for running in started:
        stdout, stderr = running.communicate(timeout=100)
        assert running.returncode == 0, stderr
        written.append(stdout)
    return Ran(directory, written[0])


def split_result(directory: Path, part: str, module: str = "bench_split") -> Any:
    result = json.loads((directory / f"split-{part}.json").read_text())
    assert result["environment"]["command"].startswith(f"python -m benches.{module}")
    assert {"date", "git_revision", "cpu", "cores", "kernel", "packages", "threads"} <= set(result["environment"])
    assert result["options"]["model"] == SPEC
    return result


def test_one_command_measures_a_prefill_by_those_that_are_named(ran: Ran) -> None:
    rows = {row["system"]: row for row in split_result(ran.directory, "prefill")["rows"]}
    assert set(SOME_SYSTEMS) <= set(rows)
    for system, row in rows.items():
        assert system in ran.tables
        assert row["median"]["logits_error"] <= 1e-4


@pytest.mark.matrix(one_in=0)
def test_one_command_measures_a_prefill_by_every_system(ran: Ran) -> None:
    prefill = split_result(ran.directory, "prefill")
    assert {row["system"] for row in prefill["rows"]} == {*(f"{link}-{plan}" for link, plan in SPLITS), *RIVALS, *HF}
    for row in prefill["rows"]:
        median = row["median"]
        assert row["system"] in ran.tables
        assert (row["phase"], row["dtype"], row["tokens"], row["rounds"]) == ("prefill", "float32", 150, 1)
        assert median["logits_error"] <= 1e-4
        assert median["wall_to_sdpa"] > 0 and median["wall_to_eager"] > 0
        assert (
            (row["link"], row["plan"]) in SPLITS if row["kind"] == "fastsplit" else row["link"] is row["plan"] is None
        )
        if row["kind"] != "hf":
            assert median["rpc_calls"] == PLANS[row["plan"] or "batched"].calls(2)
        if row["kind"] == "fastsplit":
            assert row["shm"] is (row["link"] == "shm") and row["reason"]
            assert (median["bytes_shared"] > 2**19) is row["shm"]
        if row["system"] in ("unix-folded", "tcp-folded"):
            assert median["bytes_copied"] == 0
            assert median["communication_to_floor"] > 0
    assert all(rate > 0 for rate in prefill["raw_socket_bytes_per_s"].values())


@pytest.mark.matrix(one_in=0)
def test_it_measures_decoding_by_every_system(ran: Ran) -> None:
    decode = split_result(ran.directory, "decode")
    systems = {row["system"] for row in decode["rows"]}
    assert systems == {*(f"shm-{plan}" for plan in PLAN_NAMES), *RIVALS, *HF, "hf-loop"}
    for row in decode["rows"]:
        assert (row["phase"], row["prompt_tokens"], row["tokens"]) == ("decode", 32, 6)
        assert row["median"]["same_tokens"]
        assert row["median"]["step_to_sdpa"] > 0
        if row["kind"] != "hf":
            assert row["median"]["calls_per_token"] == PLANS[row["plan"] or "batched"].calls(2)


@pytest.mark.matrix(one_in=0)
def test_the_ladder_measures_each_step_on_each_link(ran: Ran) -> None:
    ladder = split_result(ran.directory, "ladder", "ladder")
    assert [row["row"] for row in ladder["rows"]] == list(STEPS)
    assert {link: about["executor"] for link, about in ladder["links"].items()} == {"loopback": "real", "1g": "real"}
    first = ladder["rows"][0]
    assert first["predicted"] == {"calls": 200, "seconds": 40.0, "speed_up": 1.0}
    for row in ladder["rows"]:
        for link, measured in row["measured"].items():
            assert measured["rounds"] == 1
            ratio = first["measured"][link]["wall_s"] / measured["wall_s"]
            assert measured["speed_up"] == pytest.approx(ratio, rel=1e-4)
            assert measured["wall_s"] > measured["floor_s"] > 0
            assert measured["logits_error"] <= 1e-3


class FakePhase(Phase):
    """Takes as long as it is told."""

    name = "prefill"
    size: ClassVar[dict[str, int]] = {"tokens": 1}
    columns = (("wall s", 9, lambda m: f"{m['wall_s']:.3f}"),)
    rows = 1

    def __init__(self, walls_s: dict[str, float]) -> None:
        self.walls_s = walls_s
        self.order: list[str] = []

    def warm_up(self, system: System) -> None:
        pass

    def run(self, system: System) -> dict[str, Any]:
        self.order.append(system.name)
        return {"wall_s": self.walls_s[system.name]}

    def compare(self, measured: Any) -> None:
        for one in measured.values():
            one["of"] = len(measured)


def test_a_slow_system_has_one_round_and_what_was_measured_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = FakePhase({"shm-folded": 1.0, "original-tcp": 30.0, "hf-sdpa": 30.0})
    hf: Any = object()
    connected = []

    @contextmanager
    def connect(name: str, *_: Any) -> Iterator[System]:
        connected.append(name)
        assert connected == [name], "one at a time"
        yield System(name, os.getpid(), hf=hf if name.startswith("hf") else None)
        connected.clear()

    monkeypatch.setattr(split_systems, "_connected", connect)
    monkeypatch.setattr(Workers, "get", lambda *_: {})
    monkeypatch.setattr(split_systems.gc, "collect", lambda: 0)  # half a second each, with all that tests import
    document = Document(tmp_path / "split.json", {}, {})
    kept = []
    write = document.write

    def write_and_read() -> None:
        write()
        kept.append(json.loads(document.path.read_text())["rows"])

    monkeypatch.setattr(document, "write", write_and_read)
    measure(phase, list(phase.walls_s), "float32", Setting("random:tiny", 3, once_over_s=25.0), document, Workers())
    turn = ["shm-folded", "original-tcp", "hf-sdpa"]
    assert phase.order == [*turn, "hf-sdpa", "shm-folded", "shm-folded", "hf-sdpa"]
    assert [row["rounds"] for row in kept[-1]] == [3, 1, 3]
    assert [row["median"]["of"] for row in kept[-1]] == [2, 3, 2]
    assert [sum(row["rounds"] for row in rows) for rows in kept] == [1, 2, 3, 4, 5, 6, 7, 7]


def test_counts_are_written(tmp_path: Path) -> None:
    assert counts.main(["--prefill", "150", "--output", str(tmp_path / "counts.json")]) == 0
    result = json.loads((tmp_path / "counts.json").read_text())
    assert {row["plan"] for row in result["counts"]} == set(PLAN_NAMES)

"""The rivals through the very same Runner: HF's logits and tokens, the same count of calls; and the command itself."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq
import zmq.utils.garbage

import fastsplit
from benches.bench_prefill import SYSTEMS
from benches.processes import process
from benches.rivals.backend import RivalBackend, rival_runner
from benches.rivals.executor import RIVALS
from benches.rivals.hf import load
from fastsplit.models import Model, open_model
from fastsplit.remote import RemoteModel
from fastsplit.runner import Runner

SPEC = "random:tiny@7"
ROOT = Path(__file__).resolve().parents[2]


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


def test_one_command_measures_every_system(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    options = ["--model", SPEC, "--prefill", "150", "--rounds", "2", "--threads", "1", "--output", str(output)]
    run = subprocess.run(
        [sys.executable, "-m", "benches.bench_prefill", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(output.read_text())
    assert set(result["medians"]) == set(SYSTEMS)
    for system in SYSTEMS:
        assert system in run.stdout
        assert len(result["rounds"][system]) == 2
        assert result["medians"][system]["logits_error"] <= 1e-4
        if not system.startswith("hf-"):
            calls = 3 * 2 + 1 if system.endswith("folded") else 6 * 2 + 2
            assert result["medians"][system]["rpc_calls"] == calls
        assert result["medians"][system]["wall_to_sdpa"] > 0
    for system in ("unix-folded", "tcp-folded"):
        assert result["medians"][system]["bytes_copied"] == 0
        assert result["medians"][system]["communication_to_floor"] > 0
    for key in ("date", "command", "git_revision", "cpu", "cores", "kernel", "packages", "threads"):
        assert key in result["environment"]


@pytest.mark.parametrize(
    ("module", "options"),
    [
        ("bench_decode", ["--model", SPEC, "--new-tokens", "6", "--rounds", "1", "--threads", "1", "--rivals"]),
        ("bench_overlap", ["--layers", "1", "--prefill", "256", "--lanes", "1", "2", "--rounds", "1"]),
        ("counts", ["--prefill", "150", "--link"]),
    ],
)
def test_the_other_commands_end_well(tmp_path: Path, module: str, options: list[str]) -> None:
    output = tmp_path / "result.json"
    run = subprocess.run(
        [sys.executable, "-m", f"benches.{module}", *options, "--output", str(output)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(output.read_text())
    assert result["environment"]["command"].startswith(f"python -m benches.{module}")
    if module == "bench_decode":
        assert all(median["same_tokens"] for median in result["dtypes"]["float32"]["medians"].values())
    if module == "counts":
        assert all(one["counted"] == one["formula"] for one in result["counts"])

"""Setting up a split: what is passed on, that every error closes the channel, and that all users get one tuning."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastsplit
from fastsplit import tee_side
from fastsplit.errors import ClosedError, SettingError, VerificationError
from fastsplit.executor.service import Executor
from fastsplit.models import open_model
from fastsplit.split.plan import PLAN_ALIASES
from fastsplit.tee import Split, open_split
from fastsplit.tee import open as open_module
from fastsplit.tee.remote import RemoteModel
from fastsplit.tee.report import Recorder
from fastsplit.wire.transport.meter import LinkEstimate

MODEL = open_model("random:tiny")
WAN = LinkEstimate(2e-2, 12.5e6, 12.5e6)


class _Channel(fastsplit.Channel):
    made: list[_Channel]

    def __init__(self, uri: str, **options: Any) -> None:
        super().__init__(uri, **options)
        self.made.append(self)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[_Channel]:
    """The channels that `open_split` makes."""
    channels: list[_Channel] = []
    monkeypatch.setattr(_Channel, "made", channels, raising=False)
    monkeypatch.setattr(open_module, "Channel", _Channel)
    return channels


@pytest.fixture(params=["unix", "tcp"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    listen = f"unix://{tmp_path}/s" if request.param == "unix" else "tcp://127.0.0.1:0"
    with fastsplit.Server(listen, Executor(MODEL).handlers, arrays="torch") as server:
        yield server.uri


def test_a_split_is_ready_to_run_and_closes_its_channel(uri: str, made: list[_Channel]) -> None:
    recorder = Recorder()
    with open_split(uri, MODEL, rows=3, plan="fused", tee_dtype="bfloat16", recorder=recorder) as split:
        assert isinstance(split, Split)
        assert made == [split.channel]
        assert (split.link is None) == uri.startswith("unix")
        assert split.runner.tuning is split.tuning
        assert (split.tuning.plan, split.runner.plan, split.runner.tee_dtype) == ("fused", "fused", "bfloat16")
        assert split.runner.recorder is recorder
        with torch.inference_mode():
            assert len(list(split.runner.generate(torch.tensor([1, 2, 3]), 4, ignore_eos=True))) == 4
    with pytest.raises(ClosedError):
        split.channel.call("describe")
    split.close()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"trusted": open_model("random:tiny@1")}, VerificationError),
        ({"plan": "best"}, SettingError),
        ({"cast": "int8"}, SettingError),
        ({"lanes": 17}, SettingError),
        ({"rows": lambda model: {}[model.name]}, KeyError),
    ],
    ids=["model", "plan", "cast", "lanes", "refused"],
)
def test_every_error_closes_the_channel(
    uri: str, made: list[_Channel], options: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        open_split(uri, **{"trusted": MODEL, **options})
    (channel,) = made
    with pytest.raises(ClosedError):
        channel.call("describe")


def test_rows_may_depend_on_the_fetched_model(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[RemoteModel] = []
    given: list[int | None] = []
    tune = open_module.tune

    def watched(config: Any, dtype: str, rows: int | None, **options: Any) -> Any:
        given.append(rows)
        return tune(config, dtype, rows, **options)

    monkeypatch.setattr(open_module, "tune", watched)
    with open_split(uri, MODEL, rows=lambda model: seen.append(model) or 77) as split:
        assert (seen, given) == ([split.model], [77])
    for rows in (5, None):
        with open_split(uri, None, rows=rows):
            assert given.pop() == rows


def test_a_model_that_was_fetched_before_is_used_as_it_is(uri: str) -> None:
    with open_split(uri, MODEL) as first, open_split(uri, first.model) as second:
        assert second.model is first.model
        assert second.channel.stats.calls == 0


@pytest.mark.parametrize("near", [True, False])
def test_a_peer_on_this_host_is_near_whatever_was_measured(monkeypatch: pytest.MonkeyPatch, near: bool) -> None:
    monkeypatch.setattr(open_module, "measure_link", lambda *_: WAN)
    monkeypatch.setattr(_Channel, "near", property(lambda _: near))
    monkeypatch.setattr(_Channel, "made", [], raising=False)
    monkeypatch.setattr(open_module, "Channel", _Channel)
    with fastsplit.Server("tcp://127.0.0.1:0", Executor(MODEL).handlers, arrays="torch") as server:
        with open_split(server.uri, MODEL, rows=256) as split:
            plan = "folded" if near else "minimal"
            assert (split.tuning.plan, split.tuning.cast) == (plan, None if near else "float16")
            assert split.link == WAN


@pytest.mark.parametrize("alias", PLAN_ALIASES)
def test_the_script_takes_another_name_of_a_plan(alias: str, capsys: pytest.CaptureFixture[str]) -> None:
    with fastsplit.Server("tcp://127.0.0.1:0", Executor(MODEL).handlers, arrays="torch") as server:
        flags = ["--prefill", "3", "--max-new-tokens", "1", "--format", "json", "--plan", alias]
        assert tee_side.main(["--connect", server.uri, "--model", "random:tiny", *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["plan"], report["plan_wanted"], report["plan_reason"]) == (*2 * (PLAN_ALIASES[alias],), "")


@pytest.mark.parametrize("remote", [True, False])
def test_script_model_of_transformers_and_library_get_the_same_tuning(
    uri: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], remote: bool
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(open_module, "Channel", _Channel)
    monkeypatch.setattr(_Channel, "made", [], raising=False)
    monkeypatch.setattr(open_module, "measure_link", lambda *_: WAN if remote else None)
    if remote:
        monkeypatch.setattr(_Channel, "near", False)
        monkeypatch.setattr(_Channel, "shm", False)
    rows = min(512, MODEL.config.max_position_embeddings)
    flags = ["--prefill", str(rows), "--max-new-tokens", "0", "--format", "json"]
    assert tee_side.main(["--connect", uri, "--model", "random:tiny", *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    with (
        open_split(uri, MODEL) as split,
        fastsplit.SplitModelForCausalLM.connect(uri, "random:tiny") as model,
    ):
        tuning = split.tuning
        assert model.runner.tuning == tuning
    assert tuning.plan == ("minimal" if remote else "folded")
    for name in ("plan", "plan_reason", "lanes", "lanes_reason", "block_rows", "cast_reason"):
        assert report[name] == getattr(tuning, name)
    assert report["cast"] == (tuning.cast or "off")

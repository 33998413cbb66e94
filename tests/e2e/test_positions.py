"""More positions than a model was made for are computed, and said once, before anything is computed for them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("transformers")
from transformers.generation import MaxLengthCriteria, StoppingCriteriaList, stopping_criteria

import fastsplit
from fastsplit.executor.service import Executor
from fastsplit.hf import SplitModelForCausalLM
from fastsplit.models import open_model
from fastsplit.tee.remote import RemoteModel
from fastsplit.tee.runner import Runner

MOST = open_model("random:tiny").config.max_position_embeddings


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[fastsplit.Server]:
    handlers = Executor(open_model("random:tiny")).handlers
    with fastsplit.Server(f"unix://{tmp_path_factory.mktemp('uri')}/s", handlers, arrays="torch") as server:
        yield server


@pytest.fixture
def runner(server: fastsplit.Server) -> Iterator[Runner]:
    with fastsplit.connect(server.uri, arrays="torch") as channel, torch.inference_mode():
        yield Runner(RemoteModel.fetch(channel, open_model("random:tiny")), channel)


def _said(caught: list[warnings.WarningMessage]) -> list[str]:
    return [f"{each.category.__name__}: {each.message}" for each in caught]


def _text(positions: int) -> str:
    return (
        f"UserWarning: {positions} positions, the model was made for {MOST} (max_position_embeddings): what it "
        "computes for later ones may mean nothing"
    )


def _ids(length: int) -> torch.Tensor:
    return 1 + torch.arange(length).unsqueeze(0) % 90


def test_a_runner_warns_once(runner: Runner) -> None:
    with warnings.catch_warnings(record=True) as caught, runner.new_cache() as cache:
        warnings.simplefilter("always")
        runner.forward(_ids(MOST - 1), cache)
        runner.forward(_ids(1), cache)
        assert _said(caught) == []
        runner.forward(_ids(1), cache)
        assert _said(caught) == [_text(MOST + 1)]
        assert caught[0].filename == __file__
        runner.forward(_ids(1), cache)
        list(runner.generate(_ids(MOST + 9)[0], 2))
        assert len(caught) == 1


def test_it_is_said_before_anything_is_computed(runner: Runner) -> None:
    channel = runner._backend
    with runner.new_cache() as cache:
        calls = channel.stats.calls
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match=f"^{MOST + 88} positions, "):
                runner.forward(_ids(MOST + 88), cache)
        assert (channel.stats.calls, cache.length) == (calls, 0)


def test_padding_has_no_positions(runner: Runner) -> None:
    with warnings.catch_warnings(record=True) as caught, runner.new_cache() as cache:
        warnings.simplefilter("always")
        mask = (torch.arange(MOST + 40) >= 40).unsqueeze(0)
        runner.forward(_ids(MOST + 40), cache, mask=mask)
        assert _said(caught) == []
        runner.forward(_ids(1), cache)
        assert _said(caught) == [_text(MOST + 1)]


def test_generate_of_transformers_says_it_once(server: fastsplit.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    reminders: list[str] = []
    monkeypatch.setattr(stopping_criteria.logger, "warning_once", reminders.append)
    given = MaxLengthCriteria(MOST + 20, MOST + 10)
    with (
        SplitModelForCausalLM.connect(server.uri, "random:tiny") as model,
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        options = {"do_sample": False, "pad_token_id": 0}
        model.generate(_ids(MOST - 3), max_new_tokens=4, **options)
        assert (_said(caught), reminders) == ([], [])
        model.generate(_ids(MOST - 3), max_new_tokens=8, **options)
        assert (_said(caught), reminders) == ([_text(MOST + 1)], [])
        model.generate(_ids(MOST + 3), max_new_tokens=2, stopping_criteria=StoppingCriteriaList([given]), **options)
        assert [text for text in _said(caught) if "positions" in text] == [_text(MOST + 1)]
        assert given.max_position_embeddings == MOST + 10, "a criterion of the caller's own stays as it is"

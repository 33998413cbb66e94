"""The split over shared memory: next to nothing is copied, nothing but control goes through the socket."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fastsplit
from fastsplit.executor.service import Executor
from fastsplit.models import open_model
from fastsplit.split.plan import PLANS
from fastsplit.tee.remote import RemoteModel
from fastsplit.tee.runner import Runner

pytest.importorskip("transformers")
from split import cut_as_with_scores, load_hf, make_model, messages, relative_error

FP32_TOLERANCE = 1e-5
MAX_CONTROL_NBYTES = 4096
"""Of each call, both ways: heads, metadata, leases that go back."""


@pytest.mark.matrix(one_in=4)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("prompt", [1, 300])
@pytest.mark.parametrize("capacity", [1, 400], ids=["a cache that grows", "a cache with room"])
def test_only_token_ids_and_rows_to_keep_are_copied(tmp_path: Path, plan: str, prompt: int, capacity: int) -> None:
    """8 bytes for each token, where ids go to the executor; and in folded, minimal and tee-attention 8 for the row of a
    prompt whose logits are wanted."""
    model = make_model(tmp_path / "model", {})
    reference = load_hf(tmp_path / "model")
    executor = Executor(model)
    ids = torch.randint(0, 97, (1, prompt), generator=torch.Generator().manual_seed(1))
    with (
        fastsplit.Server(f"unix://{tmp_path}/gpu.sock", executor.handlers, arrays="torch") as server,
        fastsplit.connect(server.uri, arrays="torch") as channel,
        torch.inference_mode(),
    ):
        assert channel.shm is True, channel.shm_reason
        runner = Runner(RemoteModel.fetch(channel, model), channel, plan)
        weights_nbytes = sum(weight.nbytes for weight in model.tee_weights().values())
        assert server.stats.bytes_copied == weights_nbytes, "the TEE's own weights, once for each connection"
        cache = runner.new_cache(1, capacity)
        before = channel.stats.as_dict()
        everything, new = ids, ids
        for step in range(4):
            logits = runner.forward(new, cache)
            after = channel.stats.as_dict()
            grown = {key: after[key] - before[key] for key in after}
            rows = new.shape[1]
            expected = messages(model.config, plan, rows=rows, start=everything.shape[1] - rows)
            private = sum(message.private for message in expected)
            ids_nbytes = 0 if plan == "tee-attention" else 8 * rows
            assert private == ids_nbytes + (8 if PLANS[plan].folds and rows > 1 else 0)
            assert relative_error(logits[0, 0], reference(everything).logits[0, -1]) <= FP32_TOLERANCE, step
            assert grown["calls"] == len(expected)
            assert grown["bytes_copied"] == private
            assert grown["bytes_sent"] + grown["bytes_received"] < MAX_CONTROL_NBYTES * len(expected)
            # what was copied lies in shared memory then
            assert grown["bytes_shared"] == sum(message.sent + message.received for message in expected)
            before = after
            new = logits[0, 0].argmax().view(1, 1)
            everything = torch.cat([everything, new], dim=1)
        cache.close()
        assert server.stats.bytes_copied == weights_nbytes


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
def test_what_is_cast_or_padded_is_written_into_shared_memory_too(tmp_path: Path, plan: str, wire: str) -> None:
    """A batch of three whose masks and positions differ, chunks, another dtype on the wire, and a new order."""
    model = make_model(tmp_path / "model", {})
    executor = Executor(model)
    rows = 300
    with (
        fastsplit.Server(f"unix://{tmp_path}/gpu.sock", executor.handlers, arrays="torch") as server,
        fastsplit.connect(server.uri, arrays="torch") as channel,
        torch.inference_mode(),
    ):
        remote = RemoteModel.fetch(channel, model)
        runner = Runner(
            remote, channel, plan, tee_dtype="float32", wire_dtype=wire, scores_nbytes=4 * 3 * 6 * 200 * 200
        )
        cut_as_with_scores(runner, 4 * 3 * 6 * 200 * 200)
        counts = runner._cutter.cut(3, 0, rows)
        assert len(counts) > 1
        mask = torch.ones(3, rows, dtype=torch.bool)
        mask[0, :7] = mask[2, :100] = False
        with runner.new_cache(3) as cache:
            copied = channel.stats.bytes_copied
            runner.forward(torch.arange(3 * rows).view(3, rows) % 97, cache, mask=mask)
            each = 0 if plan == "tee-attention" else 8  # a token id
            selected = 8 * 3 if PLANS[plan].folds and counts[-1] > 1 else 0
            assert channel.stats.bytes_copied - copied == each * 3 * rows + selected
            cache.reorder(torch.tensor([2, 0]))
            runner.forward(torch.tensor([[5], [6]]), cache)
            assert channel.stats.bytes_copied - copied == each * 3 * rows + selected + 8 * 2 + each * 2


def test_many_segments_at_once(tmp_path: Path) -> None:
    """Whoever asks for much memory gets several segments before the first of them is ever named in a call."""
    executor = Executor(open_model("random:tiny"))
    ids = torch.arange(5).unsqueeze(0)
    with fastsplit.Server(f"unix://{tmp_path}/gpu.sock", executor.handlers, arrays="torch") as server:
        for _ in range(10):
            with fastsplit.connect(server.uri, arrays="torch") as channel:
                cache = [channel.empty((1041, 4, 64)) for _ in range(44)]
                number = channel.call("open", batch=1, capacity=5, dtype="float32").attrs["session"]
                (rows,) = channel.call("run", ids, steps="embed", session=number, lane=0, layer=0, start=0)
                assert rows.shape == (1, 5, 64)
                del cache, rows


@pytest.mark.parametrize("plan", PLANS)
def test_generating_leaves_no_memory_behind(tmp_path: Path, plan: str) -> None:
    """Blocks come back: a second and a third run need no more memory than the first, and sessions are closed."""
    model = make_model(tmp_path / "model", {})
    executor = Executor(model)
    with (
        fastsplit.Server(f"unix://{tmp_path}/gpu.sock", executor.handlers, arrays="torch") as server,
        fastsplit.connect(server.uri, arrays="torch") as channel,
        torch.inference_mode(),
    ):
        assert channel.shm is True, channel.shm_reason
        runner = Runner(RemoteModel.fetch(channel, model), channel, plan)
        copied = server.stats.bytes_copied
        runs = [list(runner.generate(torch.arange(40), 6)) for _ in range(3)]
        assert runs[1:] == runs[:1] * 2
        ids_nbytes = 0 if plan == "tee-attention" else 8 * (40 + 5)
        assert channel.stats.bytes_copied == 3 * (ids_nbytes + (8 if PLANS[plan].folds else 0))
        assert server.stats.bytes_copied == copied
        assert (len(executor.sessions), executor.sessions.nbytes) == (0, 0)

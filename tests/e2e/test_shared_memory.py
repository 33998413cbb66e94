"""The split over shared memory: nothing but token ids is copied, nothing but control goes through the socket."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fastsplit
from fastsplit.executor import Executor
from fastsplit.models import open_model
from fastsplit.runner import PLANS, RemoteBackend, RemoteModel, Runner

pytest.importorskip("transformers")
from split import decode_elements, load_hf, make_model, relative_error

CALLS = {"per-op": (9, 2), "batched": (6, 2)}
FP32_TOLERANCE = 1e-5
MOST_CONTROL_NBYTES = 4096
"""Of each call, both ways: heads, metadata, leases that go back."""
TOKEN_NBYTES = 8


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("prompt", [1, 300])
@pytest.mark.parametrize("capacity", [1, 400], ids=["a cache that grows", "a cache with room"])
def test_only_token_ids_are_copied(tmp_path: Path, plan: str, prompt: int, capacity: int) -> None:
    model = make_model(tmp_path / "model", {})
    reference = load_hf(tmp_path / "model")
    executor = Executor(model)
    per_layer, once = CALLS[plan]
    calls = per_layer * model.config.num_hidden_layers + once
    ids = torch.randint(0, 97, (prompt,), generator=torch.Generator().manual_seed(1))
    with (
        fastsplit.Server(f"unix://{tmp_path}/gpu.sock", executor.handlers, arrays="torch") as server,
        fastsplit.connect(server.uri, arrays="torch") as channel,
        torch.inference_mode(),
    ):
        assert channel.shm is True, channel.shm_reason
        remote = RemoteModel.fetch(channel, model)
        assert server.stats.bytes_copied == 0, "the norms are computed into shared memory, too"
        runner = Runner(remote, RemoteBackend(channel, remote.config, remote.dtype), plan)
        cache = runner.new_cache(capacity)
        before = channel.stats.as_dict()
        everything, new = ids, ids
        for step in range(4):
            logits = runner.forward(new, cache)
            after = channel.stats.as_dict()
            grown = {key: after[key] - before[key] for key in after}
            assert relative_error(logits[-1], reference(everything[None]).logits[0, -1]) <= FP32_TOLERANCE, step
            assert grown["calls"] == calls
            assert grown["bytes_copied"] == TOKEN_NBYTES * len(new)
            assert grown["bytes_sent"] + grown["bytes_received"] < MOST_CONTROL_NBYTES * calls
            if step:
                elements = sum(decode_elements(model.config, plan, len(everything)))
                assert grown["bytes_shared"] == 4 * elements + TOKEN_NBYTES, "and nothing that was not needed"
            before = after
            new = logits[-1].argmax().view(1)
            everything = torch.cat([everything, new])
        assert server.stats.bytes_copied == 0


def test_many_segments_at_once(tmp_path: Path) -> None:
    """A large model's KV cache needs several segments before the first of them is ever named in a call."""
    executor = Executor(open_model("random:tiny"))
    ids = torch.arange(5)
    with fastsplit.Server(f"unix://{tmp_path}/gpu.sock", executor.handlers, arrays="torch") as server:
        for _ in range(10):
            with fastsplit.connect(server.uri, arrays="torch") as channel:
                cache = [channel.empty((1041, 4, 64)) for _ in range(44)]
                (rows,) = channel.call("embedding", ids)
                assert rows.shape == (5, 64)
                del cache, rows


def test_generating_leaves_no_memory_behind(tmp_path: Path) -> None:
    """Blocks come back: a second and a third run need no more memory than the first."""
    model = make_model(tmp_path / "model", {})
    executor = Executor(model)
    with (
        fastsplit.Server(f"unix://{tmp_path}/gpu.sock", executor.handlers, arrays="torch") as server,
        fastsplit.connect(server.uri, arrays="torch") as channel,
        torch.inference_mode(),
    ):
        assert channel.shm is True, channel.shm_reason
        remote = RemoteModel.fetch(channel, model)
        runner = Runner(remote, RemoteBackend(channel, remote.config, remote.dtype), "batched")
        runs = [list(runner.generate(torch.arange(40), 6)) for _ in range(3)]
        assert runs[1:] == runs[:1] * 2
        assert channel.stats.bytes_copied == 3 * TOKEN_NBYTES * (40 + 5)
        assert server.stats.bytes_copied == 0

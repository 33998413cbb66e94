"""The engine: steps on tensors without a connection, and the shapes of replies by the contract."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastsplit
from fastsplit.executor.device import Cpu
from fastsplit.executor.engine import Engine, Job
from fastsplit.executor.kv_cache import KVCache
from fastsplit.executor.weights import Weights
from fastsplit.models import open_model
from fastsplit.split.blocks import Block
from fastsplit.split.contract import Shapes
from fastsplit.split.kv_cache import Budget
from fastsplit.split.plan import PLANS, STEP_LISTS, Call

PACKAGE = Path(fastsplit.__file__).parent
MODEL = open_model("random:tiny")
CONFIG = MODEL.config

ALONE = """
import sys, types
package = types.ModuleType("fastsplit")  # its __init__ imports the library's front
package.__path__ = [{path!r}]
sys.modules["fastsplit"] = package
import torch
from fastsplit.executor.device import Cpu
from fastsplit.executor.engine import Engine, Job
from fastsplit.executor.kv_cache import KVCache
from fastsplit.executor.weights import Weights
from fastsplit.models import open_model
from fastsplit.split.kv_cache import Budget
model = open_model("random:tiny")
weights = Weights(model, torch.device("cpu"), torch.float32, lambda items, total: items)
engine = Engine(model.config, weights, torch.float32)
cache = KVCache(model.config, torch.float32, 1, 0, Budget(2**30), torch.float32)
routine, lane = engine.routines["embed norm qkv store_v"], cache.lane(0)
inputs = {{"ids": torch.tensor([[3, 5]])}}
job = Job(routine, inputs, cache, lane, 0, 0, 2, None, [], engine.reply(routine, 1, 2, []))
with Cpu().work() as work:
    x, qk = engine.run(job, work, lambda shape, dtype: torch.empty(tuple(shape), dtype=getattr(torch, dtype)))
assert torch.equal(x[0], model.load("model.embed_tokens.weight")[[3, 5]]) and lane.x is x
print(*(name for name in sys.modules if name.startswith("fastsplit.wire")))
"""


def test_a_process_without_a_connection_runs_steps(tmp_path: Path) -> None:
    code = ALONE.format(path=str(PACKAGE))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


@pytest.fixture(scope="module")
def engine() -> Engine:
    weights = Weights(MODEL, torch.device("cpu"), torch.float32, lambda items, total: items)
    return Engine(CONFIG, weights, torch.float32)


def allocate(shape: Any, dtype: str) -> Any:
    return torch.full(tuple(shape), torch.nan, dtype=getattr(torch, dtype))


def test_there_is_a_routine_for_every_list_of_steps(engine: Engine) -> None:
    assert engine.routines.keys() == STEP_LISTS.keys()
    assert all(routine.refusal == "" for routine in engine.routines.values())


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("plan", PLANS)
def test_replies_are_what_the_contract_says(engine: Engine, plan: str, rows: int) -> None:
    shapes, blocks = Shapes(CONFIG, "float32"), [Block(0, rows, 0, rows)]
    for stage in PLANS[plan].schedule(CONFIG.num_hidden_layers):
        if isinstance(stage, Call):
            reply = engine.reply(engine.routines[stage.text], 1, rows, blocks if "scores" in stage.outputs else [])
            assert [("float32", shape) for shape in reply.shapes] == shapes.reply(stage, 1, rows, blocks)


@pytest.mark.parametrize("rows", [1, 2])
def test_small_values_of_a_reply_share_a_block_and_do_not_overlap(engine: Engine, rows: int) -> None:
    cache = KVCache(CONFIG, torch.float32, 1, 0, Budget(2**30), torch.float32)
    routine = engine.routines["embed norm qkv"]
    asked: list[int] = []

    def counted(shape: Any, dtype: str) -> Any:
        asked.append(int(torch.Size(shape).numel()))
        return allocate(shape, dtype)

    ids = torch.arange(rows)[None]
    job = Job(routine, {"ids": ids}, cache, cache.lane(0), 0, 0, rows, None, [], engine.reply(routine, 1, rows, []))
    with Cpu().work() as work:
        replies = engine.run(job, work, counted)
    assert len(asked) == 1 and asked[0] <= sum(reply.numel() for reply in replies) + 3 * 63
    assert not any(bool(reply.isnan().any()) for reply in replies)
    assert all(reply.is_contiguous() for reply in replies)
    ends = [(reply.data_ptr(), reply.data_ptr() + reply.nbytes) for reply in replies]
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))

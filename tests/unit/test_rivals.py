"""The benchmarks' rivals: tensors get there and back whole, copies are counted, errors and silence are answers.

What a rival may not be is worse than it has to be, or wrong: a comparison is worth as much as its rival.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zmq
import zmq.utils.garbage

from benches.processes import Process
from benches.rivals.backend import RivalBackend, rival_runner
from benches.rivals.messages import MESSAGES, Messages
from benches.rivals.service import RivalService
from benches.rounds import interleaved
from benches.transports import TRANSPORTS
from benches.transports import pair as pair_module
from benches.transports.pair import Pair, open_pairs
from fastsplit import Server, connect
from fastsplit.errors import DeadlineError, RemoteOpError
from fastsplit.executor.service import Executor
from fastsplit.models import open_model
from fastsplit.tee.remote import RemoteModel
from fastsplit.tee.runner import Runner

WAYS = sorted(MESSAGES)


@pytest.fixture(autouse=True)
def no_zmq_thread() -> Iterator[None]:
    """pyzmq starts a thread at the first send without a copy, and keeps it; here it ends with the test."""
    yield
    zmq.utils.garbage.gc.stop()


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def executor() -> Executor:
    return Executor(open_model("random:tiny@5"))


@pytest.fixture
def backend(way: str, executor: Executor) -> Iterator[RivalBackend]:
    with (
        RivalService("tcp://127.0.0.1:*", way, executor) as service,
        RivalBackend(service.address, way, executor.config) as backend,
    ):
        yield backend


def send(messages: Messages, head: dict[str, Any], tensors: list[Any]) -> tuple[list[Any], int]:
    """The frames as the other end gets them, and their bytes; through a real socket."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as near, context.socket(zmq.PAIR) as far:
        near.bind("inproc://messages")
        far.connect("inproc://messages")
        near.send_multipart(messages.encode(head, tensors), copy=messages.zmq_copies)
        frames = far.recv_multipart(copy=messages.zmq_copies)
    return frames, sum(map(len, frames))


# ---- messages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int64", "uint8"])
@pytest.mark.parametrize("shape", [(3, 5), (), (0, 4), (2, 1, 7)])
def test_a_tensor_arrives_as_it_was(way: str, dtype: str, shape: tuple[int, ...]) -> None:
    tensor = (torch.rand(shape) * 100).to(getattr(torch, dtype))
    frames, _ = send(MESSAGES[way](), {"op": "x", "attrs": {"layer": 3}}, [tensor])
    head, (arrived,) = MESSAGES[way]().decode(frames)
    assert head == {"op": "x", "attrs": {"layer": 3}}
    assert arrived.dtype == tensor.dtype
    assert arrived.shape == tensor.shape
    assert torch.equal(arrived, tensor)


def test_what_arrives_is_writable(way: str) -> None:
    frames, _ = send(MESSAGES[way](), {}, [torch.zeros(64 * 1024), torch.zeros(3)])
    for arrived in MESSAGES[way]().decode(frames)[1]:
        arrived += 1  # a read-only array would have made torch warn, which is an error here
        assert bool((arrived == 1).all())


def test_the_original_copies_on_the_way_out_and_on_the_way_in() -> None:
    near, far = MESSAGES["original"](), MESSAGES["original"]()
    frames, _ = send(near, {}, [torch.zeros(10, 10), torch.zeros(5)])
    far.decode(frames)
    assert (near.copied_nbytes, far.copied_nbytes) == (420, 420)


def test_the_tuned_one_copies_only_what_is_not_contiguous() -> None:
    near, far = MESSAGES["tuned"](), MESSAGES["tuned"]()
    strided = torch.arange(12.0).view(3, 4).t()
    frames, _ = send(near, {}, [torch.zeros(10, 10), strided])
    _, (_, arrived) = far.decode(frames)
    assert torch.equal(arrived, strided)
    assert (near.copied_nbytes, far.copied_nbytes) == (48, 0)


def test_the_tuned_one_sends_and_uses_memory_where_it_lies() -> None:
    tensor = torch.zeros(1000)
    _, out = MESSAGES["tuned"]().encode({}, [tensor])
    assert out.ctypes.data == tensor.data_ptr()
    frames, _ = send(MESSAGES["tuned"](), {}, [tensor])
    _, (arrived,) = MESSAGES["tuned"]().decode(frames)
    assert arrived.numpy().__array_interface__["data"][0] == _address(frames[1])


def _address(frame: Any) -> int:
    return int(np.frombuffer(frame.buffer, np.uint8).ctypes.data)


# ---- service and backend ---------------------------------------------------------------------------------------------


def opened(backend: RivalBackend, capacity: int = 0) -> int:
    return int(backend.call("open", batch=1, capacity=capacity, dtype="float32").attrs["session"])


def at(session: int, layer: int = 0, start: int = 0) -> dict[str, int]:
    return {"session": session, "lane": 0, "layer": layer, "start": start}


def test_scores_are_one_square_of_all_heads(backend: RivalBackend, executor: Executor) -> None:
    config = executor.config
    q = torch.rand(1, 7, config.num_attention_heads, config.head_dim)
    k = torch.rand(1, 9, config.num_key_value_heads, config.head_dim)
    session = opened(backend)
    backend.call("run", k[:, :2], steps="store_k", **at(session, layer=1))
    assert backend.stats.calls == 0  # keys alone stay here
    (scores,) = backend.call(
        "run", q, k[:, 2:], steps="store_k scores", **at(session, layer=1, start=2), first=0, last=9
    )
    repeats = config.num_attention_heads // config.num_key_value_heads
    expected = torch.einsum("nhd,thd->hnt", q[0], k[0].repeat_interleave(repeats, dim=1)) * config.scale
    torch.testing.assert_close(scores, expected.reshape(-1))


def test_values_are_token_major(backend: RivalBackend, executor: Executor) -> None:
    config = executor.config
    session = opened(backend, 9)
    q = torch.rand(1, 7, config.num_attention_heads, config.head_dim)
    k = torch.rand(1, 9, config.num_key_value_heads, config.head_dim)
    backend.call("run", q, k, steps="store_k scores", **at(session), first=0, last=9)
    weights = torch.rand(config.num_attention_heads, 7, 9)
    v = torch.rand(1, 9, config.num_key_value_heads, config.head_dim)
    repeats = config.num_attention_heads // config.num_key_value_heads
    expected = torch.einsum("hnt,thd->nhd", weights, v[0].repeat_interleave(repeats, dim=1)).reshape(1, 7, -1)
    (values,) = backend.call("run", weights.view(-1), v, steps="store_v values", **at(session))
    torch.testing.assert_close(values, expected)


def test_a_cache_is_forgotten_when_it_is_closed(backend: RivalBackend, executor: Executor) -> None:
    first, second = opened(backend), opened(backend)
    assert first != second
    backend.call("truncate", session=first, length=0)
    backend.call("close", session=first)
    with pytest.raises(KeyError):
        backend.call("run", torch.zeros(1, 1, 1, 1), steps="store_v values", **at(first))
    backend.call("close", session=second)
    assert backend.stats.calls == 0


def test_every_byte_is_counted(backend: RivalBackend, executor: Executor) -> None:
    x = torch.rand(1, 6, executor.config.hidden_size)
    q, k = backend.call("run", x, steps="q k", layer=0)
    assert q.shape == (1, 6, executor.config.num_attention_heads, executor.config.head_dim)
    stats = backend.stats
    payload_in = q.nbytes + k.nbytes
    assert stats.calls == 1
    assert x.nbytes < stats.bytes_sent < x.nbytes + 200
    assert payload_in < stats.bytes_received < payload_in + 300
    assert 0 < stats.remote_s < stats.wait_s
    assert stats.serialization_s > 0


def test_repeated_kv_heads_are_counted_as_copied(executor: Executor) -> None:
    config = executor.config
    with (
        RivalService("tcp://127.0.0.1:*", "tuned", executor) as service,
        RivalBackend(service.address, "tuned", config) as backend,
    ):
        q = torch.rand(1, 4, config.num_attention_heads, config.head_dim)
        k = torch.rand(1, 4, config.num_key_value_heads, config.head_dim)
        backend.call("run", q, k, steps="store_k scores", **at(opened(backend)), first=0, last=4)
        assert backend.stats.bytes_copied == q.nbytes  # k has as many heads as q by then


def test_a_failed_operation_says_why_and_the_next_one_works(backend: RivalBackend, executor: Executor) -> None:
    x = torch.rand(1, 2, executor.config.hidden_size)
    with pytest.raises(RemoteOpError, match=r"q: SettingError: layer: 99"):
        backend.call("run", x, steps="q", layer=99)
    assert len(backend.call("run", x, steps="q", layer=0)) == 1


def test_what_the_original_did_not_have_is_refused(backend: RivalBackend) -> None:
    with pytest.raises(NotImplementedError, match="batch: 2"):
        backend.call("open", batch=2, capacity=0, dtype="float32")
    with pytest.raises(NotImplementedError, match="reorder"):
        backend.call("reorder", torch.tensor([0]), session=1)
    with pytest.raises(NotImplementedError, match="one call at a time"):
        backend.submit("run", torch.tensor([[1]]))


def test_nobody_there_is_a_deadline(way: str, executor: Executor) -> None:
    with RivalBackend("tcp://127.0.0.1:9", way, executor.config, timeout_s=0.1) as backend:
        with pytest.raises(DeadlineError, match=r"embed: no reply from tcp://127.0.0.1:9 within 0.1 s"):
            backend.call("run", torch.tensor([[1]]), steps="embed", layer=0)


# ---- through the Runner ----------------------------------------------------------------------------------------------


def known(executor: Executor) -> RemoteModel:
    model = open_model("random:tiny@5")
    return RemoteModel(model.name, model.config, executor.dtype, model.tee_weights())


def test_a_forward_pass_moves_and_copies_what_the_original_did(
    backend: RivalBackend, way: str, executor: Executor
) -> None:
    """Whole squares, repeated heads, the last layer with one row: in bytes, beside what the messages say in words."""
    config = executor.config
    rows = 200
    runner = rival_runner(known(executor), backend)
    with torch.inference_mode(), runner.new_cache() as cache:
        recorder = runner.recorder
        with recorder.phase("prefill"):
            runner.forward(torch.arange(rows)[None], cache)
    layers, hidden, inter = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    q, kv = config.out_features("q"), config.out_features("k")
    square = config.num_attention_heads * rows * rows
    sent = received = 0
    for layer in range(layers):
        n = rows if layer < layers - 1 else 1  # rows that go on
        scores = square // rows * n
        sent += rows * hidden + (n * q + rows * q) + (scores + rows * q) + n * (q + hidden + inter)
        received += rows * (q + 2 * kv) + scores + n * (q + hidden + 2 * inter + hidden)
    sent = 4 * (sent + hidden) + 8 * rows
    received = 4 * (received + rows * hidden + config.vocab_size)
    stats = backend.stats
    calls = 6 * layers + 2
    assert stats.calls == recorder.rpc_calls == calls
    assert sent < stats.bytes_sent < sent + 200 * calls
    assert received < stats.bytes_received < received + 300 * calls
    repeated = 4 * layers * 2 * rows * q
    assert stats.bytes_copied == repeated + (sent + received if way == "original" else 0)


def test_tokens_through_a_rival_are_fastsplits(backend: RivalBackend, executor: Executor) -> None:
    prompt = torch.randint(0, 256, (20,), generator=torch.Generator().manual_seed(2))
    runner = rival_runner(known(executor), backend)
    with (
        Server("tcp://127.0.0.1:0", executor.handlers) as server,
        connect(server.uri) as channel,
        torch.inference_mode(),
    ):
        ours = Runner(known(executor), channel, "folded")
        backend.recorder = runner.recorder
        assert list(runner.generate(prompt, 12)) == list(ours.generate(prompt, 12))
    assert runner.recorder.ops["kv_cache"].side == "tee"


# ---- transports ------------------------------------------------------------------------------------------------------

RIVAL_TRANSPORTS = [name for name in TRANSPORTS if "fastsplit" not in name]
_BY_CLASS = {(TRANSPORTS[name].module, TRANSPORTS[name].prefix): name for name in RIVAL_TRANSPORTS}


def run_python(*arguments: str) -> str:
    """What it wrote to stderr."""
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run([sys.executable, *arguments], cwd=root, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    return run.stderr


def shm_names() -> set[str]:
    """What the rivals may have in /dev/shm."""
    prefixes = ("fastsplit_bench_", "psm_", "torch_", "sem.mp-")
    return {path.name for path in Path("/dev/shm").iterdir() if path.name.startswith(prefixes)}


def assert_nothing_left(before: set[str]) -> None:
    deadline = time.monotonic() + 5
    while left := shm_names() - before:  # torch and multiprocessing have a process of their own for that
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


@contextmanager
def connected(name: str, nbytes: int) -> Iterator[Pair]:
    pair = Pair(name, None)
    try:
        pair.connect()
        pair.prepare(nbytes)
        yield pair
    finally:
        pair.close()


def ones(nbytes: int) -> Any:
    return np.ones(nbytes, np.uint8)


@pytest.mark.slow
@pytest.mark.matrix(one_in=0)
def test_every_rival_brings_the_bytes_there_and_back_and_leaves_nothing_behind(tmp_path: Path) -> None:
    before, output = shm_names(), tmp_path / "result.json"
    options = ["--rounds", "1", "--quick", "--round-s", "0.01", "--sizes", "64", "65536", "--output", str(output)]
    # each of them over one kind of link; torch's own, which take long to start, are in the next test
    names = [name for name in _BY_CLASS.values() if TRANSPORTS[name].module != "torch_tensors"]
    wrote = run_python("-m", "benches.bench_transport", *options, "--only", *names)
    result = json.loads(output.read_text())
    assert all("No module" in reason or "bytes free" in reason for reason in result["left_out"].values()), wrote
    rows = {(row["what"], row["system"], row["nbytes"]): row for row in result["rows"]}
    for name in names:
        if name not in result["left_out"]:
            for nbytes in (64, 65536):
                assert ("round trip", name, nbytes) in rows or ("one way", name, nbytes) in rows, name
    for row in rows.values():
        assert (row["median"]["p50_us"] is not None) == (row["what"] == "round trip")
        assert 0 < row["median"]["mean_us"] < 1e6
        assert row["link"] == row["system"].partition(":")[0]
    assert_nothing_left(before)


KILLED = """
import os, signal, sys, threading
import numpy as np
from benches.transports.pair import Pair

for name in sys.argv[1:]:
    try:
        pair = Pair(name, None)
    except ImportError:
        continue
    try:
        pair.connect()
        pair.prepare(4096)
        mode = pair.client.modes[0]
        pair.check(4096, mode)
        pair.push(np.ones(4096, np.uint8), mode, 30, mark=True)  # more than there are slots of any kind
        os.kill(pair.pid, signal.SIGKILL)
    finally:
        pair.close()
    assert threading.active_count() == 1, name
"""


@pytest.mark.slow
@pytest.mark.matrix(one_in=0)
def test_a_peer_that_is_killed_leaves_nothing_behind_either() -> None:
    before = shm_names()
    names = [name for name in RIVAL_TRANSPORTS if name.startswith("shm: ")]
    run_python("-c", KILLED, *names)
    assert_nothing_left(before)


def test_a_rival_that_brings_other_bytes_back_ends_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    with connected("unix: raw socket", 64) as pair:
        pair.check(64, "sleeping")
        pair.check(64, "spinning")
        figures = pair.run(64, "sleeping", 50)
        assert len(figures.trips_ns) == 50
        assert 0 < sum(figures.trips_ns) / 1e9 <= figures.wall_s
        assert figures.client_cpu_s >= 0
        assert figures.peer_cpu_s >= 0
        honest = pair.client.marked
        monkeypatch.setattr(pair.client, "marked", lambda run, message: honest(run, message)[::-1])
        message = "unix: raw socket, 64 bytes, sleeping: the reply is not what it should be"
        with pytest.raises(SystemExit, match=message):
            pair.check(64, "sleeping")


def test_a_rival_that_brings_others_one_way_ends_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    with connected("unix: multiprocessing Pipe", 64) as pair:
        pair.push(ones(64), "sleeping", 3, mark=True)
        honest = pair.client.push
        monkeypatch.setattr(pair.client, "push", lambda run, message: honest(run, message + np.uint8(1)))
        pair.push(ones(64), "sleeping", 3)  # nobody looks
        with pytest.raises(SystemExit, match="64 bytes one way: what came is not what was sent"):
            pair.push(ones(64), "sleeping", 3, mark=True)


def test_a_rival_that_loses_a_message_ends_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    with connected("shm: memcpy", 64) as pair:
        run_of = pair._run
        monkeypatch.setattr(
            pair, "_run", lambda nbytes, mode, count, **options: run_of(nbytes, mode, count - 1, **options)
        )
        with pytest.raises(SystemExit, match="shm: memcpy, one way: 2 messages came, expected 3"):
            pair.push(ones(64), "sleeping", 3)


@pytest.mark.parametrize("where", ["starting", "connecting"])
def test_a_rival_that_blocks_while_it_starts_is_left_out(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ready = "print('READY', '0', flush=True)" if where == "connecting" else ""
    (tmp_path / "blocks.py").write_text(f"import time; {ready}\ntime.sleep(60)\n")
    started: list[Process] = []

    def start(module: str, *arguments: str, wait: bool) -> Process:
        started.append(Process("blocks", environment={"PYTHONPATH": str(tmp_path)}, wait=wait))
        return started[-1]

    class Blocked:
        def __init__(self, address: str) -> None:
            time.sleep(60)

    monkeypatch.setattr(pair_module, "Process", start)
    monkeypatch.setattr(pair_module, "load", lambda name, end: Blocked)
    names = ["unix: raw socket", "tcp: raw socket"]
    began_s, handler = time.monotonic(), signal.getsignal(signal.SIGALRM)
    with ExitStack() as stack:
        pairs, left_out = open_pairs(stack, names, None, 64, within_s=0.5)
        assert (pairs, left_out) == ({}, dict.fromkeys(names, "no answer within 0.5 s"))
        for process in started:
            assert process._popen.wait(5) == -signal.SIGKILL
    assert time.monotonic() - began_s < 10
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(" ")[2] for line in said] == [f"left out: {name}: no answer within 0.5 s" for name in names]
    assert signal.getsignal(signal.SIGALRM) == handler


def test_systems_take_turns_at_being_first() -> None:
    assert list(interleaved([["a", "b", "c"], ["x"]], 2, "turns")) == [*"abc", "x", *"bca", "x"]

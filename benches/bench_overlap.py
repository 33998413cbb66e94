"""How much of an executor's time the TEE's work hides behind, with several stretches of a prompt under way: without a
GPU, against an executor that takes its time and leaves the arithmetic out.

    python -m benches.bench_overlap                     1024 tokens, 8 layers of TinyLlama's shape: about a minute
    python -m benches.bench_overlap --layers 1 --prefill 256 --lanes 1 2 --rounds 1
    python -m benches.bench_overlap --delay-ms 5        every call takes 5 ms, however many rows it has
    python -m benches.bench_overlap --cpu               a real executor on the CPU: what lanes cost where nothing is won

What the executor is. fastsplit's own `Executor`, with its sessions, checks and replies, on a device of its own kind: it
is `asynchronous`, and of every call's arithmetic it does nothing but fill the reply with finite numbers. Then it sleeps
until the call has taken as long as it should: --delay-ms, or --us-per-row for the rows of a layer's linear operations,
divided among the layer's calls by the weights that each of them meets, so that all plans take as long. Filling is
within that time, as the transfers of a real device are within its own (a call that has nothing else to do takes as long
as filling does), and takes a core and memory bandwidth meanwhile; how much it was is reported. The logits mean nothing.
The TEE has one thread (--threads), so that each side has a core of its own on the smallest machine. One call is at work
at a time: a stretch's call waits while another's runs.

How it is measured. Two processes, over a unix socket with shared memory. Each plan and number of lanes is a system;
after a whole prompt untimed come the rounds, each with every system once, every other round in the reverse order.
Medians; the JSON has every round.

What the columns are. wall: seconds of a prefill. gpu: seconds in the executor's handlers, by its own clock, of the same
run. tee: the TEE's own computing, from the plan's run with one lane, where nothing else goes on beside it. comm: what
is left of that one lane's wall. sum: gpu + tee + comm, which is that run's wall for one lane. max: the greater of gpu
and tee, less than which no overlap can take. wall/max: 1 is perfect. hidden: of what could be hidden at most (sum -
max), how much was; not with --cpu, where nothing can be. /1 lane: the wall over that of one lane in the same round,
median of the ratios. filling: of gpu, the part in which replies were filled. calls: more stretches have more.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from time import perf_counter_ns
from typing import Any

import torch

import fastsplit
from fastsplit.executor.device import Cpu, Work
from fastsplit.executor.service import Executor
from fastsplit.models import LINEARS, Model, ModelConfig
from fastsplit.split.ops import MAX_LANES, PLANS
from fastsplit.tee.remote import RemoteModel
from fastsplit.tee.report import Recorder
from fastsplit.tee.runner import Runner
from fastsplit.wire.call import Call, Handler

from .environment import add_output, describe, save
from .processes import OthersCpu, process
from .rounds import progress

__all__ = ["main"]

_HIDDEN, _INTERMEDIATE, _VOCAB = 2048, 5632, 1024
_FINITE = 0.01

Measurement = dict[str, Any]


# ---- the model -------------------------------------------------------------------------------------------------------


class _Constant:
    """Weights of no meaning, which cost nothing to make: a product's time does not depend on its numbers."""

    has_lm_head = False

    def load(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.full(shape, 1.0 if "norm" in name else 0.01)


def _model(layers: int) -> Model:
    """TinyLlama's shape, but for the number of layers and the vocabulary, which is no part of a layer."""
    config = ModelConfig(
        vocab_size=_VOCAB,
        hidden_size=_HIDDEN,
        intermediate_size=_INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2**16,
    )
    return Model(f"tinyllama's shape, {layers} layers", config, None, _Constant())


# ---- the executor's process ------------------------------------------------------------------------------------------


class _SleepingWork:
    """Fills results instead of computing them."""

    def __init__(self, device: _Sleeping) -> None:
        self._device = device
        self._cpu: Any = device.cpu_work

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def give(self, result: torch.Tensor, compute: Callable[[torch.Tensor], object]) -> torch.Tensor:
        started_ns = perf_counter_ns()
        result.fill_(_FINITE)
        self._device.filling_ns += perf_counter_ns() - started_ns
        return result

    def run(self, compute: Callable[[], object]) -> None:
        pass

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        tensor: torch.Tensor = self._cpu.empty(shape, dtype)
        return tensor


class _Sleeping(Cpu):
    """A device on which one call is at work at a time, for as long as `delay_s` says when its work begins."""

    asynchronous = True

    def __init__(self) -> None:
        self.delay_s = 0.0
        self.filling_ns = 0
        self._at_work = threading.Lock()
        with super().work() as work:
            self.cpu_work = work

    @contextlib.contextmanager
    def work(self, key: object = None) -> Iterator[Work]:
        with self._at_work:
            until_ns = perf_counter_ns() + int(self.delay_s * 1e9)
            yield _SleepingWork(self)
            left_ns = until_ns - perf_counter_ns()
            if left_ns > 0:
                time.sleep(left_ns * 1e-9)


_LINEARS_OF: dict[str, tuple[str, ...]] = {
    "qkv": ("q", "k", "v"),
    "values_o": ("o",),
    "embedding_qkv": ("q", "k", "v"),
    "embedding_scores": ("q", "k", "v"),
    "values_gate_up": ("o", "gate", "up"),
    "down_qkv": ("down", "q", "k", "v"),
    "down_scores": ("down", "q", "k", "v"),
    "down_lm_head": ("down",),
}
"""What an operation meets of a layer's weights; `linear` says so itself."""

_TIMED = (*_LINEARS_OF, "embedding", "linear", "scores", "values", "lm_head")


class _Timing:
    """How long each call is to take."""

    def __init__(self, executor: Executor, delay_ms: float, us_per_row: float) -> None:
        self._executor = executor
        self._delay_s = delay_ms * 1e-3
        self._s_per_row = us_per_row * 1e-6
        config = executor.config
        sizes = {name: config.in_features(name) * config.out_features(name) for name in LINEARS}
        self._shares = {name: size / sum(sizes.values()) for name, size in sizes.items()}

    def wrap(self, op: str, handler: Handler) -> Handler:
        device: Any = self._executor.device

        def handle(call: Call) -> Any:
            device.delay_s = self._delay_s + self._s_per_row * self._rows(op, call) * self._share(op, call)
            return handler(call)

        return handle

    def _share(self, op: str, call: Call) -> float:
        names: Any = call.attrs["names"] if op == "linear" else _LINEARS_OF.get(op, ())
        return sum(self._shares[name] for name in names)

    def _rows(self, op: str, call: Call) -> int:
        """Rows that the call's linear operations have, of all sequences."""
        first = call.tensors[0]
        if first.dim() > 1:
            return int(first.shape[0] * first.shape[1])
        # packed scores do not say it; the blocks that they were made of do
        attrs: Any = call.attrs
        session = self._executor.sessions.find(call.client, attrs["session"])
        blocks = session.lane(attrs["lane"]).blocks
        rows: int = 0 if not blocks else blocks[-1].start + blocks[-1].rows
        return int(session.batch) * rows


def _serve(args: argparse.Namespace) -> int:
    """The executor's process: READY, and until its stdin ends."""
    device = Cpu() if args.cpu else _Sleeping()
    executor = Executor(_model(args.layers), device=device, dtype=args.dtype)
    handlers = dict(executor.handlers)
    if isinstance(device, _Sleeping):
        timing = _Timing(executor, args.delay_ms, args.us_per_row)
        handlers.update((op, timing.wrap(op, handlers[op])) for op in _TIMED)

    def filling(call: Call) -> None:
        call.reply_attrs["seconds"] = getattr(device, "filling_ns", 0) * 1e-9

    handlers["filling"] = filling
    with (
        tempfile.TemporaryDirectory(prefix="fastsplit-bench-") as directory,
        fastsplit.Server(f"unix://{directory}/gpu.sock", handlers) as server,
    ):
        print("READY", server.uri, flush=True)
        sys.stdin.read()
    return 0


# ---- measuring -------------------------------------------------------------------------------------------------------


def _run(runner: Runner, channel: fastsplit.Channel, ids: torch.Tensor) -> Measurement:
    before_filling: Any = channel.call("filling").attrs["seconds"]
    with runner.new_cache(1, ids.shape[1]) as cache:
        stats, remote_s = channel.stats, channel.stats.remote_s
        recorder = runner.recorder = Recorder()
        with recorder.phase("prefill"):
            runner.forward(ids, cache)
        remote_s = stats.remote_s - remote_s
    filling_s: Any = channel.call("filling").attrs["seconds"]
    report = recorder.as_dict()
    return {
        "wall_s": report["wall_s"],
        "gpu_s": remote_s,
        "filling_s": filling_s - before_filling,
        "tee_beside_s": report["tee_compute_s"],
        "communication_s": report["communication_s"] + report["serialization_s"],
        "rpc_calls": report["rpc_calls"],
        "ops": report["ops"],
    }


def _measure(
    runners: dict[tuple[str, int], Runner], channel: fastsplit.Channel, worker_pid: int, ids: torch.Tensor, rounds: int
) -> dict[tuple[str, int], list[Measurement]]:
    measured: dict[tuple[str, int], list[Measurement]] = {key: [] for key in runners}
    for (plan, lanes), runner in runners.items():
        progress(f"warming up {plan}, {lanes} lanes")
        _run(runner, channel, ids)
    for number in range(rounds):
        for key in runners if number % 2 == 0 else reversed(runners):
            others = OthersCpu(os.getpid(), worker_pid)
            one = _run(runners[key], channel, ids)
            one["others_cpu_s"] = others.seconds()
            measured[key].append(one)
            progress(f"round {number + 1} of {rounds}: {key[0]}, {key[1]} lanes, {one['wall_s']:.3f} s")
    return measured


def _summary(measured: dict[tuple[str, int], list[Measurement]], asynchronous: bool) -> list[dict[str, Any]]:
    """Medians for each system, and what follows from them."""
    rows = []
    for (plan, lanes), rounds in measured.items():
        median = {
            key: statistics.median(one[key] for one in rounds)
            for key, value in rounds[0].items()
            if isinstance(value, (int, float))
        }
        row: dict[str, Any] = {"plan": plan, "lanes": lanes, **median}
        alone = measured.get((plan, 1))
        if alone is not None:
            row["tee_s"] = statistics.median(one["tee_beside_s"] for one in alone)
            row["one_lane_communication_s"] = statistics.median(one["communication_s"] for one in alone)
            row["sum_s"] = row["gpu_s"] + row["tee_s"] + row["one_lane_communication_s"]
            row["max_s"] = max(row["gpu_s"], row["tee_s"])
            row["wall_to_max"] = row["wall_s"] / row["max_s"]
            if asynchronous:
                row["hidden"] = (row["sum_s"] - row["wall_s"]) / (row["sum_s"] - row["max_s"])
            row["wall_to_one_lane"] = statistics.median(
                one["wall_s"] / first["wall_s"] for one, first in zip(rounds, alone)
            )
        rows.append(row)
    return rows


# ---- the table -------------------------------------------------------------------------------------------------------

_COLUMNS: tuple[tuple[str, int, Callable[[dict[str, Any]], str]], ...] = (
    ("plan", 9, lambda m: str(m["plan"])),
    ("lanes", 7, lambda m: str(m["lanes"])),
    ("wall s", 9, lambda m: f"{m['wall_s']:.3f}"),
    ("gpu s", 9, lambda m: f"{m['gpu_s']:.3f}"),
    ("tee s", 9, lambda m: f"{m['tee_s']:.3f}"),
    ("comm s", 9, lambda m: f"{m['one_lane_communication_s']:.3f}"),
    ("sum s", 9, lambda m: f"{m['sum_s']:.3f}"),
    ("max s", 9, lambda m: f"{m['max_s']:.3f}"),
    ("wall/max", 10, lambda m: f"{m['wall_to_max']:.3f}"),
    ("hidden", 8, lambda m: f"{100 * m['hidden']:.0f} %"),
    ("/1 lane", 9, lambda m: f"{m['wall_to_one_lane']:.3f}"),
    ("filling s", 11, lambda m: f"{m['filling_s']:.3f}"),
    ("calls", 7, lambda m: f"{m['rpc_calls']:.0f}"),
    ("others s", 10, lambda m: f"{m['others_cpu_s']:.1f}"),
)


def _table(rows: list[dict[str, Any]]) -> str:
    lines = ["".join(f"{title:>{width}}" for title, width, _ in _COLUMNS)]
    for row in rows:
        cells = []
        for _, width, text_of in _COLUMNS:
            try:
                text = text_of(row)
            except (KeyError, TypeError):  # without one lane there is nothing to compare with
                text = "-"
            cells.append(f"{text:>{width}}")
        lines.append("".join(cells))
    return "\n".join(lines)


# ---- the command -----------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benches.bench_overlap", description=__doc__.partition(":")[0].replace("\n", " ")
    )
    parser.add_argument("--layers", type=int, default=8, metavar="N")
    parser.add_argument("--prefill", type=int, default=1024, metavar="N", help="tokens (default: 1024)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--plan", nargs="+", default=["folded", "fused"], choices=PLANS)
    parser.add_argument("--lanes", nargs="+", type=int, default=[1, 2, 3, 4], metavar="N")
    parser.add_argument("--delay-ms", type=float, default=0.0, metavar="MS", help="of each call")
    parser.add_argument("--us-per-row", type=float, metavar="US", help="of a layer's linear operations (default: 40)")
    parser.add_argument("--cpu", action="store_true", help="a real executor on the CPU instead; all threads")
    parser.add_argument("--threads", type=int, help="torch's, of both sides; 0: one for each core (default: 1)")
    parser.add_argument("--rounds", type=int, default=5)
    add_output(parser, "overlap.json")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    args = parser.parse_args(argv)
    if min(args.layers, args.prefill, args.rounds, *args.lanes) < 1 or max(args.lanes) > MAX_LANES:
        parser.error(f"--layers, --prefill and --rounds must be 1 or more, --lanes 1 to {MAX_LANES}")
    if args.us_per_row is None:
        args.us_per_row = 0.0 if args.delay_ms else 40.0
    if args.threads is None:
        args.threads = 0 if args.cpu else 1
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.serve:
        return _serve(args)
    circumstances = describe(["python", "-m", "benches.bench_overlap", *argv])
    options = ["--serve", "--layers", str(args.layers), "--dtype", args.dtype, "--threads", str(args.threads)]
    options += ["--delay-ms", str(args.delay_ms), "--us-per-row", str(args.us_per_row), *(["--cpu"] * args.cpu)]
    ids = torch.randint(0, _VOCAB, (1, args.prefill), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), ExitStack() as stack:
        executor = stack.enter_context(process("benches.bench_overlap", *options))
        channel = stack.enter_context(fastsplit.connect(executor.ready))
        known = RemoteModel.fetch(channel, _model(args.layers))
        runners = {
            (plan, lanes): Runner(known, channel, plan, lanes=lanes)
            for plan in dict.fromkeys(args.plan)
            for lanes in dict.fromkeys(args.lanes)
        }
        measured = _measure(runners, channel, executor.pid, ids, args.rounds)
        link = {"shm": channel.shm, "reason": channel.shm_reason}
    rows = _summary(measured, not args.cpu)
    circumstances["load_average_after"] = os.getloadavg()
    result = {
        "environment": circumstances,
        "options": {name: value for name, value in vars(args).items() if name not in ("output", "serve")},
        "model": known.config.to_hf(),
        "link": link,
        "medians": rows,
        "rounds": [{"plan": plan, "lanes": lanes, "rounds": rounds} for (plan, lanes), rounds in measured.items()],
    }
    output = save(result, args.output)
    print(_table(rows))
    what = "a real executor on the CPU" if args.cpu else f"{args.delay_ms:g} ms a call, {args.us_per_row:g} us a row"
    print(f"\n{known.name}, {args.prefill} tokens, {args.dtype}, {what}, medians of {args.rounds}")
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())

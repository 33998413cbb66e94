"""What each plan has to move: calls and bytes of a prefill and of a decode step, counted beside the formula.

    python -m benches.counts                            22 and 30 layers, prefill of 1024, fp32: 10 seconds
    python -m benches.counts --prefill 200 --dtype bfloat16 --model tinyllama-1.1b

How it is counted. The real Runner runs against a backend that computes nothing: it counts each request's tensors, and
replies with zeros of the shapes that the Runner says it expects. Nothing is timed, and weights are only norms of one,
so that the real shapes of TinyLlama-1.1B (22 layers) and SmolLM2-135M (30 layers) take seconds. --link runs them once
more with tiny layers over a unix socket, shared memory and a real executor, and compares what the channel counted.

What the columns are. RPCs: counted, and by the formula of ops.PLANS: a * layers + b. sent, received: tensor bytes of
all requests and replies, counted, and by a formula of sizes alone (`ops.traffic`). The command fails if any two differ.
KV cache: what a cache on the TEE side would have had to send beside that, as the original's does, heads not repeated.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

import fastsplit
from fastsplit.executor.service import Executor
from fastsplit.models import DTYPES, PRESETS, Model, ModelConfig
from fastsplit.split.ops import PLANS, traffic
from fastsplit.tee.remote import RemoteModel
from fastsplit.tee.runner import Runner
from fastsplit.wire.stats import Stats

from .environment import add_output, describe, keep_whole, save

__all__ = ["MODELS", "Counted", "count", "counted_model", "formula", "main"]

SMOLLM2 = ModelConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)
MODELS = {"tinyllama-1.1b": PRESETS["tinyllama-1.1b"], "smollm2-135m": SMOLLM2}


@dataclass(frozen=True)
class Counted:
    """Requests, and the bytes of their tensors."""

    calls: int = 0
    sent: int = 0
    received: int = 0

    def __sub__(self, other: Counted) -> Counted:
        return Counted(self.calls - other.calls, self.sent - other.sent, self.received - other.received)


class _Reply(list[torch.Tensor]):
    def __init__(self, tensors: Sequence[torch.Tensor], attrs: dict[str, Any]) -> None:
        super().__init__(tensors)
        self.attrs = attrs


class _CountingBackend:
    """A `fastsplit.tee.remote.Backend` that replies with zeros."""

    def __init__(self) -> None:
        self.stats = Stats()
        self.counted = Counted()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype)

    def call(self, op: str, /, *tensors: torch.Tensor, expect: Any = None, **attrs: Any) -> _Reply:
        if op in ("open", "close", "truncate"):
            return _Reply([], {"session": 1})
        replies = [torch.zeros(shape, dtype=getattr(torch, dtype)) for dtype, shape in expect]
        counted = self.counted
        self.counted = Counted(
            counted.calls + 1,
            counted.sent + sum(tensor.nbytes for tensor in tensors),
            counted.received + sum(reply.nbytes for reply in replies),
        )
        return _Reply(replies, {})

    def submit(self, op: str, /, *tensors: torch.Tensor, expect: Any = None, **attrs: Any) -> _Reply:
        raise NotImplementedError("counted with one lane")


class _Ones:
    has_lm_head = False

    def load(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.ones(shape)


def counted_model(name: str, config: ModelConfig) -> Model:
    return Model(name, config, None, _Ones())


def count(config: ModelConfig, plan: str, dtype: str, prefill: int) -> tuple[Counted, Counted]:
    """What a prefill moves, and the decode step after it. Raises ValueError where the model has another plan."""
    model = counted_model("counted", config)
    backend = _CountingBackend()
    runner = Runner(
        RemoteModel(model.name, config, dtype, model.tee_weights()), backend, plan, lanes=1, scores_nbytes=2**62
    )
    if runner.plan != plan:
        raise ValueError(f"plan {plan}: {runner.plan_reason}")
    with torch.inference_mode(), runner.new_cache(1, prefill + 1) as cache:
        runner.forward(torch.zeros(1, prefill, dtype=torch.int64), cache)
        first = backend.counted
        runner.forward(torch.zeros(1, 1, dtype=torch.int64), cache)
    return first, backend.counted - first


def formula(config: ModelConfig, plan: str, dtype: str, start: int, rows: int) -> Counted:
    """The same from sizes: `rows` rows of one sequence after `start`, in one stretch, the last row's logits."""
    return Counted(*traffic(config, plan, getattr(torch, dtype).itemsize, start, rows))


def _over_a_link(config: ModelConfig, plan: str, dtype: str, prefill: int) -> dict[str, int]:
    """What the channel counted in a prefill with a real executor: calls, and bytes by reference and copied."""
    model = counted_model("tiny", config)
    executor = Executor(model, dtype=dtype)
    with (
        tempfile.TemporaryDirectory(prefix="fastsplit-bench-") as directory,
        fastsplit.Server(f"unix://{directory}/gpu.sock", executor.handlers) as server,
        fastsplit.connect(server.uri) as channel,
        torch.inference_mode(),
    ):
        runner = Runner(RemoteModel.fetch(channel, model), channel, plan, lanes=1)
        with runner.new_cache(1, prefill) as cache:
            before = channel.stats.as_dict()
            runner.forward(torch.zeros(1, prefill, dtype=torch.int64), cache)
            after = channel.stats.as_dict()
    return {key: after[key] - before[key] for key in ("calls", "bytes_shared", "bytes_copied", "bytes_sent")}


def _cache_nbytes(config: ModelConfig, dtype: str, positions: int) -> int:
    """All keys and values so far."""
    rows = 2 * config.num_hidden_layers * positions
    return rows * config.out_features("k") * int(getattr(torch, dtype).itemsize)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m benches.counts", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--plan", nargs="+", default=list(PLANS), choices=PLANS)
    parser.add_argument("--prefill", type=int, default=1024, metavar="N", help="tokens (default: 1024)")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--link", action="store_true", help="also over a real link, with tiny layers")
    add_output(parser, "counts.json", parts=True)
    args = parser.parse_args(argv)
    keep_whole(parser, args, ("model", "plan"), [args.output])
    rows = []
    wrong = []
    print(
        f"{'model':<16}{'plan':<9}{'pass':<9}{'RPCs':>6}{'formula':>16}{'sent MB':>12}{'formula':>12}"
        f"{'received MB':>13}{'formula':>12}{'KV cache MB':>13}"
    )
    for name in dict.fromkeys(args.model):
        config = MODELS[name]
        for plan in dict.fromkeys(args.plan):
            counted = count(config, plan, args.dtype, args.prefill)
            for what, start, new, found in (
                ("prefill", 0, args.prefill, counted[0]),
                ("decode", args.prefill, 1, counted[1]),
            ):
                expected = formula(config, plan, args.dtype, start, new)
                a, b = PLANS[plan]
                text = f"{a}*{config.num_hidden_layers}+{b} = {expected.calls}"
                cache_nbytes = _cache_nbytes(config, args.dtype, start + new)
                numbers = [
                    f"{count_of / 1e6:.3f}"
                    for count_of in (found.sent, expected.sent, found.received, expected.received)
                ]
                print(
                    f"{name:<16}{plan:<9}{what:<9}{found.calls:>6}{text:>16}{numbers[0]:>12}{numbers[1]:>12}"
                    f"{numbers[2]:>13}{numbers[3]:>12}{cache_nbytes / 1e6:>13.3f}"
                )
                rows.append(
                    {
                        "model": name,
                        "layers": config.num_hidden_layers,
                        "plan": plan,
                        "pass": what,
                        "start": start,
                        "rows": new,
                        "counted": vars(found),
                        "formula": vars(expected),
                        "kv_cache_bytes": cache_nbytes,
                    }
                )
                if found != expected:
                    wrong.append(f"{name}, {plan}, {what}: {found}, expected {expected}")
            if args.link:
                tiny = replace(PRESETS["tiny"], num_hidden_layers=config.num_hidden_layers)
                tokens = min(args.prefill, 200)
                link = _over_a_link(tiny, plan, args.dtype, tokens)
                tensors = formula(tiny, plan, args.dtype, 0, tokens)
                rows[-2]["link"] = {"tokens": tokens, **link, "formula": vars(tensors)}
                print(
                    f"{'':<16}{f'over a link, tiny layers, {tokens} tokens:':<40}{link['calls']} calls, "
                    f"{link['bytes_shared']} bytes by reference, {link['bytes_copied']} copied to be; "
                    f"formula {tensors.sent + tensors.received}"
                )
                if link["calls"] != tensors.calls or link["bytes_shared"] != tensors.sent + tensors.received:
                    wrong.append(f"{name}, {plan}, over a link: {link}, expected {tensors}")
    result = {
        "environment": describe(["python", "-m", "benches.counts", *argv]),
        "options": {key: value for key, value in vars(args).items() if key not in ("output", "force")},
        "plans": {plan: list(PLANS[plan]) for plan in PLANS},
        "counts": rows,
    }
    print(save(result, args.output))
    for line in wrong:
        print(f"not as the formula has it: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

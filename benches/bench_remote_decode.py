"""Decoding over a link with 5 ms of round trip: tokens per second in each plan, beside what the round trips allow.

    python -m benches.bench_remote_decode                   the shapes of SmolLM2-135M and TinyLlama-1.1B: 15 minutes
    python -m benches.bench_remote_decode --model random:tiny --new-tokens 8 --rounds 1 --output /tmp/decode.json
    python -m benches.bench_remote_decode --link 100m --plan folded linear

A token's messages are small, so that it costs as many round trips as it has calls: what a plan is worth is how few.

How it is measured. As in benches.ladder: the TEE side, an executor that computes nothing (or --executor real), and the
link between them; each row has a connection of its own, over which a few tokens are generated first, untimed. A prompt
of --prompt-tokens is not counted either: tokens are those after the first one. Batch 1, greedy. As many tokens as take
about --seconds, at most --new-tokens and at least 8. Rounds take turns; the table has medians, the JSON every round.
"auto" chooses by itself, with a connection that casts and compresses as it thinks best; all others send what they have.

What the columns are. tok/s: tokens per second. ms/token: its inverse. calls: of a token. floor: ms/token that the round
trips alone take, calls * round trip, and how many times that it was; tok/s at most: its inverse. + bytes: the floor
with what a token sends and receives, (up + down) / bandwidth. up, down: kB of a token. tee, serial: ms/token of this
side's computing and of its work on messages.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack
from time import perf_counter_ns
from typing import Any

import torch

import fastsplit
from fastsplit.models import DTYPES
from fastsplit.split.ops import PLANS
from fastsplit.tee.remote import RemoteModel

from .environment import add_output, describe, keep_whole, save
from .link import LINKS, LinkKind, through
from .null_executor import null_model
from .rounds import interleaved, progress
from .splits import Rung, Split, open_rung, parse_rung
from .workers import EXECUTORS, executor_process

__all__ = ["main"]

_MODELS = ("smollm2-135m", "tinyllama-1.1b")
_ROWS = ("original", "original-batched", *PLANS, "auto")
_WARM_UP_TOKENS = 3
_LEAST_TOKENS = 8

Measurement = dict[str, Any]


def _generate(split: Split, ids: torch.Tensor, new_tokens: int) -> Measurement:
    """What a token took, after the first one."""
    recorder = split.record()
    stats = split.backend.stats
    marks: list[tuple[int, dict[str, Any], dict[str, Any]]] = []

    def mark(_: object = None) -> None:
        marks.append((perf_counter_ns(), recorder.as_dict(), stats.as_dict()))

    for count, _ in enumerate(split.runner.generate(ids, new_tokens, ignore_eos=True)):
        if count in (0, new_tokens - 1):
            mark()
    (first_ns, first, sent_first), (last_ns, last, sent_last) = marks
    steps = new_tokens - 1
    measured: Measurement = {
        "plan": split.runner.plan,
        "steps": steps,
        "step_s": (last_ns - first_ns) * 1e-9 / steps,
        "calls": (last["rpc_calls"] - first["rpc_calls"]) / steps,
    }
    for key in ("communication_s", "serialization_s", "tee_compute_s", "gpu_compute_s"):
        measured[f"step_{key}"] = (last[key] - first[key]) / steps
    for key in ("bytes_sent", "bytes_received"):
        measured[f"step_{key}"] = (sent_last[key] - sent_first[key]) / steps
    return measured


def _measure(
    rung: Rung, uri: str, known: RemoteModel, worker_pid: int, ids: torch.Tensor, kind: LinkKind, args: Any
) -> Measurement:
    with ExitStack() as stack:
        split = open_rung(stack, rung, uri, known, worker_pid, len(ids))
        warm = _generate(split, ids, _WARM_UP_TOKENS)
        wanted = min(args.new_tokens, int(args.seconds / warm["step_s"]))
        measured = _generate(split, ids, max(wanted, _LEAST_TOKENS))
    measured["tokens_per_s"] = 1 / measured["step_s"]
    measured["floor_s"] = measured["calls"] * kind.round_trip_s
    nbytes = measured["step_bytes_sent"] + measured["step_bytes_received"]
    bytes_s = nbytes / (kind.rate_bit_per_s / 8) if kind.rate_bit_per_s else 0.0
    measured["floor_with_bytes_s"] = measured["floor_s"] + bytes_s
    return measured


def _median(rounds: list[Measurement]) -> Measurement:
    return {
        key: statistics.median(measured[key] for measured in rounds) if isinstance(value, (int, float)) else value
        for key, value in rounds[-1].items()
    }


_COLUMNS: tuple[tuple[str, int, Callable[[Measurement], str]], ...] = (
    ("tok/s", 9, lambda m: f"{m['tokens_per_s']:.2f}"),
    ("at most", 9, lambda m: f"{1 / m['floor_s']:.2f}"),
    ("ms/token", 10, lambda m: f"{m['step_s'] * 1e3:.1f}"),
    ("calls", 7, lambda m: f"{m['calls']:.0f}"),
    ("floor ms", 17, lambda m: f"{m['floor_s'] * 1e3:.1f} ({m['step_s'] / m['floor_s']:.3f}x)"),
    ("+ bytes ms", 17, lambda m: f"{m['floor_with_bytes_s'] * 1e3:.1f} ({m['step_s'] / m['floor_with_bytes_s']:.3f}x)"),
    ("up kB", 9, lambda m: f"{m['step_bytes_sent'] / 1e3:.1f}"),
    ("down kB", 9, lambda m: f"{m['step_bytes_received'] / 1e3:.1f}"),
    ("serial ms", 11, lambda m: f"{m['step_serialization_s'] * 1e3:.2f}"),
    ("tee ms", 9, lambda m: f"{m['step_tee_compute_s'] * 1e3:.2f}"),
    ("tokens", 8, lambda m: f"{m['steps']:.0f}"),
)


def _table(medians: dict[str, Measurement]) -> str:
    lines = [f"{'row':<18}" + "".join(f"{title:>{width}}" for title, width, _ in _COLUMNS)]
    for name, median in medians.items():
        cells = []
        for _, width, text_of in _COLUMNS:
            try:
                text = text_of(median)
            except ZeroDivisionError:  # loopback has no round trip to count
                text = "-"
            cells.append(f"{text:>{width}}")
        chosen = f"  {median['plan']}" if name == "auto" else ""
        lines.append(f"{name:<18}" + "".join(cells) + chosen)
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benches.bench_remote_decode", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "--model", nargs="+", default=list(_MODELS), help=f"{', '.join(_MODELS)}: their shapes; or as everywhere"
    )
    parser.add_argument("--link", default="1g", choices=LINKS)
    parser.add_argument("--rows", "--plan", nargs="+", default=list(_ROWS), metavar="ROW", help=", ".join(_ROWS))
    parser.add_argument("--executor", default="null", choices=EXECUTORS)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--prompt-tokens", type=int, default=32, metavar="N", help="how many random ids (default: 32)")
    parser.add_argument("--new-tokens", type=int, default=33, metavar="N", help="at most, the first included")
    parser.add_argument("--seconds", type=float, default=12.0, help="of a row in a round, about (default: 12)")
    parser.add_argument("--threads", type=int, default=0, help="torch's, in every process; 0: one for each core")
    parser.add_argument("--rounds", type=int, default=3)
    add_output(parser, "remote-decode-LINK.json", parts=True)
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    args = parser.parse_args(argv)
    output = args.output.with_name(args.output.name.replace("LINK", args.link))
    keep_whole(parser, args, ("model", "rows"), [output])
    if min(args.prompt_tokens, args.rounds) < 1 or args.new_tokens < 2:
        parser.error("--prompt-tokens and --rounds must be 1 or more, --new-tokens 2 or more")
    try:
        rungs = [parse_rung(name) for name in dict.fromkeys(args.rows)]
    except ValueError as error:
        parser.error(f"--rows: {error}")
    if args.threads:
        torch.set_num_threads(args.threads)
    kind = LINKS[args.link]
    result: dict[str, Any] = {
        "environment": describe(["python", "-m", "benches.bench_remote_decode", *argv]),
        "options": {name: value for name, value in vars(args).items() if name not in ("output", "force")},
        "link": {"rate_bit_per_s": kind.rate_bit_per_s, "round_trip_s": kind.round_trip_s},
        "models": {},
    }
    for name in dict.fromkeys(args.model):
        model = null_model(name)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, model.config.vocab_size, (args.prompt_tokens,), generator=generator)
        rounds: dict[str, list[Measurement]] = {rung.name: [] for rung in rungs}
        with (
            torch.inference_mode(),
            executor_process(args.executor, name, args.dtype, args.threads) as executor,
            ExitStack() as stack,
        ):
            addresses = json.loads(executor.ready)
            with fastsplit.connect(addresses["fastsplit-unix"] + "?shm=off") as channel:
                known = RemoteModel.fetch(channel, model)
            services = dict.fromkeys(rung.service for rung in rungs)
            uris = {service: stack.enter_context(through(kind, addresses[service])) for service in services}
            for rung in interleaved([rungs], args.rounds, f"{name}, {args.link}"):
                measured = _measure(rung, uris[rung.service], known, executor.pid, ids, kind, args)
                rounds[rung.name].append(measured)
                progress(f"{rung.name}: {measured['tokens_per_s']:.2f} tokens/s")
                medians = {row: _median(found) for row, found in rounds.items() if found}
                result["models"][name] = {"medians": medians, "rounds": rounds}
                save(result, output)  # after each step, so that a run that is ended keeps its results
        print(f"{name}, {args.dtype}, {args.link} ({kind.text}), {args.executor} executor, medians of {args.rounds}")
        print(_table(medians))
        print()
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())

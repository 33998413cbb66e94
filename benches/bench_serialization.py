"""What it costs to make bytes of a message with tensors, and tensors of bytes: fastsplit beside its rivals.

    python -m benches.bench_serialization                    2 passes: 3 to 4 minutes, 2 GB
    python -m benches.bench_serialization --quick            1 pass, 128 MiB in float32 alone: a minute
    python -m benches.bench_serialization --only "arrow" "fastsplit" "row-float32"
    python -m pytest benches/bench_serialization.py          one pass, with pytest-benchmark's own tables

Messages. "row": a hidden state of one token, [1, 2048]. "hidden": of a prompt, [1024, 2048]. "scores": of 32 heads,
[32, 1024, 1024], 128 MiB in float32. "qkv": [1024, 2048] and twice [1024, 256]. Each goes with an op and two
attributes, where the format can say them (`general`), in float32 and in bfloat16.

What is measured. "encode": from tensors to buffers that `socket.sendmsg` takes. "decode": from what a receiver has read
(serializers/__init__.py) to tensors that may be written to. "both": one after the other, the decoder with bytes that
were received before. Each contestant encodes a message of the same kind again and again: what it keeps between them is
warm, memory that it asks for anew is not. The floor is numpy's copy of the payload from warm memory into warm memory,
twice in "both"; "x" is how many times that: far below 1 the payload was not touched.

Rules. Values, dtype, shape, op and attributes of what came out are checked after the time was taken, and that it can be
written to. What is not installed is skipped. No garbage is collected meanwhile. In each pass every contestant has its
block of rounds; every other pass goes in reversed order, and a result is the median of the passes' medians. The JSON is
pytest-benchmark's own; `serializers` in it has what contestants say of themselves.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benches.environment import ROOT, add_output, describe, keep_whole, save
from benches.rounds import progress
from benches.rounds import table as text_table
from benches.serializers import FLOOR, SERIALIZERS, Message, Serializer, open_serializer
from benches.serializers.serializer import wire_nbytes

__all__ = ["MESSAGES", "check", "main", "merge", "stored", "table"]

MESSAGES: dict[str, tuple[tuple[int, ...], ...]] = {
    "row": ((1, 2048),),
    "hidden": ((1024, 2048),),
    "qkv": ((1024, 2048), (1024, 256), (1024, 256)),
    "scores": ((32, 1024, 1024),),
}
DTYPES = ("float32", "bfloat16")
TASKS = ("encode", "decode", "both")
OP, LAYER, SCALE = "linear", 3, 0.125

_ROUNDS = 10
# By --quick: how long one contestant's rounds take in a pass, about; but never fewer rounds than so many.
_BLOCK_S = {False: 0.02, True: 0.015}
_LEAST_ROUNDS = {False: 4, True: 2}
_STATS = ("min", "max", "mean", "stddev", "median", "iqr", "outliers", "ops", "rounds", "iterations")
_OF_CONTESTANTS = ("how", "general", "copies_encode", "copies_decode", "safe", "note")
_OF_MESSAGES = ("serializer", "payload_nbytes", "wire_nbytes", "writable")


# ---- one benchmark ---------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)  # all of them together take 500 MB
def _message(name: str, dtype: str) -> Message:
    generator = torch.Generator().manual_seed(7)
    tensors = [torch.randn(shape, generator=generator).to(getattr(torch, dtype)) for shape in MESSAGES[name]]
    return Message(OP, LAYER, SCALE, tensors)


def check(serializer: Serializer, message: Message, arrived: Message) -> dict[str, Any]:
    """Raises AssertionError if `arrived` is not the message, or cannot be written to, which is tried: it is lost then.

    Returns what was found out about its tensors.
    """
    if serializer.general:
        said = (arrived.op, arrived.layer, arrived.scale)
        assert said == (message.op, message.layer, message.scale), f"op and attributes: {said}"
    assert len(arrived.tensors) == len(message.tensors)
    alignments = []
    for tensor, expected in zip(arrived.tensors, message.tensors):
        assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape)
        bits, expected_bits = (one.contiguous().view(torch.int16) for one in (tensor, expected))
        assert torch.equal(bits, expected_bits), "other values"
        address = tensor.data_ptr()
        alignments.append(address & -address)
        assert address % tensor.itemsize == 0, f"not aligned to its elements of {tensor.itemsize} bytes"
    for tensor in arrived.tensors:
        tensor.zero_()
        assert not tensor.view(torch.int16).any(), "it cannot be written to"
    return {"writable": True, "alignment_nbytes": min(64, *alignments)}


def _rounds(run: Callable[[], Any], quick: bool) -> tuple[int, int]:
    """How many rounds of how many runs take the time that one contestant has. The runs before that warm it up."""
    block_s = _BLOCK_S[quick]
    runs, wall_s = 1, _time_s(run, 1)
    if wall_s < block_s:  # else the first one, cold as it was, has said enough
        wall_s = _time_s(run, 1)
    while wall_s < 0.001:
        runs *= 4
        wall_s = _time_s(run, runs)
    run_s = wall_s / runs
    if run_s * _ROUNDS > block_s:
        return max(int(block_s / run_s), _LEAST_ROUNDS[quick]), 1
    return _ROUNDS, int(block_s / _ROUNDS / run_s)


def _time_s(run: Callable[[], Any], runs: int) -> float:
    started_s = time.perf_counter()
    for _ in range(runs):
        run()
    return time.perf_counter() - started_s


def _cases() -> Iterator[Any]:
    for message in MESSAGES:
        for dtype in DTYPES:
            for task in TASKS:
                for name in SERIALIZERS:
                    yield pytest.param(message, dtype, task, name, id=f"{message}-{dtype}-{task}-{name}")


@pytest.mark.benchmark(disable_gc=True)
@pytest.mark.parametrize(("message", "dtype", "task", "serializer"), list(_cases()))
def test_serialization(
    benchmark: Any, pytestconfig: pytest.Config, message: str, dtype: str, task: str, serializer: str
) -> None:
    try:
        contestant = open_serializer(serializer)
    except ImportError as error:  # not installed, or does not load
        pytest.skip(f"{serializer}: {error}")
    benchmark.group = f"{message} {dtype}: {task}"
    sent = _message(message, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where it makes a tensor of memory that must not be written to
        wire = contestant.encode(sent)
        nbytes = wire_nbytes(wire)
        received = contestant.receive(wire)
        del wire
        encode, decode = contestant.encode, contestant.decode

        # Each drops what it made, as who has sent it or has used it does, so that allocators can use memory again.
        def run_encode() -> None:
            encode(sent)

        def run_decode() -> None:
            decode(received)

        def run_both() -> None:
            encode(sent)
            decode(received)

        run = {"encode": run_encode, "decode": run_decode, "both": run_both}[task]
        rounds, iterations = _rounds(run, pytestconfig.getoption("--quick"))
        benchmark.pedantic(run, rounds=rounds, iterations=iterations)
        if task != "decode":
            received = contestant.receive(encode(sent))
        found = check(contestant, sent, decode(received))
    about = {name: getattr(contestant, name) for name in _OF_CONTESTANTS}
    sizes = {"payload_nbytes": sum(tensor.nbytes for tensor in sent.tensors), "wire_nbytes": nbytes}
    benchmark.extra_info.update({"serializer": serializer, **sizes, **about, **found})


# ---- all passes in one -----------------------------------------------------------------------------------------------


def merge(passes: list[dict[str, Any]]) -> dict[str, Any]:
    """The JSON of several passes as one, in pytest-benchmark's own form."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for document in passes:
        for one in document["benchmarks"]:
            by_name.setdefault(one["fullname"], []).append(one)
    merged = dict(passes[0])
    merged["benchmarks"] = [_merged(same) for same in by_name.values()]
    return merged


def _merged(same: list[dict[str, Any]]) -> dict[str, Any]:
    over = {"min": min, "max": max, "rounds": sum, "total": sum}
    stats: dict[str, Any] = {}
    for key, value in same[0]["stats"].items():
        if isinstance(value, (int, float)):  # others are counts of outliers as text
            stats[key] = over.get(key, statistics.median)([one["stats"][key] for one in same])
        elif key != "data":
            stats[key] = value
    stats["ops"] = 1 / stats["mean"]
    return same[0] | {"stats": stats}


def stored(merged: dict[str, Any]) -> dict[str, Any]:
    """As it is kept: what contestants say of themselves once, and the statistics that pytest-benchmark compares."""
    contestants: dict[str, Any] = {}
    rows = []
    for one in merged["benchmarks"]:
        info, stats = one["extra_info"], one["stats"]
        contestants[info["serializer"]] = {key: info[key] for key in _OF_CONTESTANTS}
        row = {key: one[key] for key in ("group", "name", "fullname", "param")}
        row["extra_info"] = {key: info[key] for key in _OF_MESSAGES}
        rows.append(row | {"stats": {key: stats[key] for key in _STATS}})
    machine = {key: value for key, value in merged["machine_info"].items() if key != "cpu"} | {"node": ""}
    about = {key: merged[key] for key in ("environment", "version", "datetime", "commit_info")}
    return {**about, "machine_info": machine, "serializers": contestants, "benchmarks": rows}


# ---- the table -------------------------------------------------------------------------------------------------------


def table(document: dict[str, Any]) -> str:
    """For each message and dtype, one row a contestant; quickest together first."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for one in document["benchmarks"]:
        group, _, task = one["group"].partition(": ")
        groups.setdefault(group, {}).setdefault(one["extra_info"]["serializer"], {})[task] = one
    shown = []
    for group, rows in groups.items():
        floor = {task: one["stats"]["median"] for task, one in rows.get(FLOOR, {}).items()}
        medians = {}
        for name in sorted(rows, key=lambda name, rows=rows: _order(rows[name])):
            info = next(iter(rows[name].values()))["extra_info"]
            label = name + " *" * (info["how"] == "common") + " T" * (not info["general"])
            medians[label] = info | {task: one["stats"]["median"] for task, one in rows[name].items()}
        shown.append(_lines(group, floor, medians))
    return "\n\n".join(shown) + "\n\n*: as it is commonly written. T: tensors alone, no op and no attributes."


def _order(tasks: dict[str, dict[str, Any]]) -> float:
    return tasks["both"]["stats"]["median"] if "both" in tasks else math.inf


def _lines(group: str, floor: dict[str, float], medians: dict[str, dict[str, Any]]) -> str:
    columns: list[Any] = []
    for task in TASKS:
        columns.append((f"{task} us", 13, lambda m, task=task: f"{m[task] * 1e6:.1f}"))
        columns.append(("x", 8, lambda m, task=task: f"{m[task] / floor[task]:.2f}"))
    columns += [
        ("wire B", 12, lambda m: str(m["wire_nbytes"])),
        ("copies", 8, lambda m: f"{m['copies_encode']} + {m['copies_decode']}"),
        ("writable", 10, lambda m: "yes" if m["writable"] else "no"),
        ("safe", 8, lambda m: m["safe"].partition(":")[0]),
    ]
    return text_table(group, columns, medians, {})


# ---- the command -----------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m benches.bench_serialization",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--passes", type=int, metavar="N", help="default: 2, with --quick 1")
    parser.add_argument("--quick", action="store_true", help="128 MiB in float32 alone, and fewer rounds")
    parser.add_argument(
        "--only", nargs="+", metavar="TEXT", help="those with TEXT in MESSAGE-DTYPE-TASK-NAME, beside memcpy"
    )
    add_output(parser, "serialization.json")
    args = parser.parse_args(argv)
    keep_whole(parser, args, ("quick", "only"), [args.output])
    passes = args.passes or (1 if args.quick else 2)
    if passes < 1:
        parser.error(f"--passes {passes}: expected 1 or more")
    environment = describe(["python", "-m", "benches.bench_serialization", *argv])
    documents, failed = [], False
    with tempfile.TemporaryDirectory() as folder:
        for number in range(passes):
            progress(f"pass {number + 1} of {passes}")
            path = Path(folder) / f"{number}.json"
            failed |= not _run_pass(args, path, reverse=number % 2 == 1)
            if not path.exists() or not path.stat().st_size:
                print(f"pass {number + 1} has no result", file=sys.stderr)
                return 1
            documents.append(json.loads(path.read_text(encoding="utf-8")))
    merged = merge(documents) | {"environment": {**environment, "passes": passes}}
    print(table(merged))
    print(save(stored(merged), args.output))
    return 1 if failed else 0


def _run_pass(args: argparse.Namespace, path: Path, *, reverse: bool) -> bool:
    """One pass in a process of its own. Returns whether nothing failed; what was skipped or failed is printed once."""
    options = [f"--benchmark-json={path}"]
    options += ["--quiet", "--no-header", "--tb=short", "-p", "no:cacheprovider", "--benchmark-quiet"]
    options += ["--quick"] * args.quick + ["--reverse"] * reverse + [f"--only={text}" for text in args.only or ()]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "benches/bench_serialization.py", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        print(run.stdout + run.stderr, file=sys.stderr)
    elif not reverse:
        skipped = {line.partition(": ")[2] for line in run.stdout.splitlines() if line.startswith("SKIPPED")}
        for reason in sorted(skipped):
            print(f"left out: {reason}", file=sys.stderr)
    return run.returncode == 0


if __name__ == "__main__":
    sys.exit(main())

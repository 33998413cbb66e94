"""Each codec on real activations and scores of SmolLM2 (not on noise): ratio, MB/s each way, break-even bandwidth.

    python -m benches.codecs [--output JSON]            about two minutes

What is compressed. A real prefill of 1024 tokens of English (this repository's LICENSE) runs through the plan "folded",
both sides in this process, and what would cross the link is kept, of layers 1, 15 and 29: the residual stream x, q and
k, the scores, the probabilities that the softmax makes of them, gate and up, and the gated h. All of it in fp32, and as
bfloat16 and float16 would have it, were it cast before it travels.

What the numbers are. For the three layers together, by one caller: ratio is compressed to uncompressed bytes, MB/s are
of uncompressed bytes, from and into memory that has been touched before. What a codec gives up on travels as it is, at
ratio 1. The break-even bandwidth is that of a link on which it makes no difference whether a tensor is compressed,
sent and unpacked, one after another, or sent as it is: on slower ones it pays. At 1 Gbit/s and at 100 Mbit/s: which
codec takes least time for all of that, and what share of the time without it.

Codecs take turns in every round, in changing order; rates are medians of the rounds. Nothing else may run meanwhile.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from demo.smollm2 import model_dir
from fastsplit.executor.service import Executor
from fastsplit.models import open_model
from fastsplit.schema.coding import CODECS
from fastsplit.tee.remote import RemoteModel
from fastsplit.tee.runner import Runner
from fastsplit.tensors.pool import pool
from fastsplit.wire.call import Client
from fastsplit.wire.codecs import compress, decompress, installed, probe
from fastsplit.wire.stats import Stats

from .environment import add_output, describe, keep_whole, save
from .rounds import interleaved

__all__ = ["Recorded", "main", "measure"]

TEXT = Path(__file__).resolve().parents[1] / "LICENSE"
DTYPES = ("float32", "bfloat16", "float16")
KINDS = ("x", "qk", "scores", "probabilities", "gate_up", "gated h")
LINKS = {"1 Gbit/s": 125e6, "100 Mbit/s": 12.5e6}
_SENT = {"values_gate_up": "probabilities", "down_qkv": "gated h"}
_REPLIED = {"down_qkv": ("x", "qk"), "scores": ("scores",), "values_gate_up": ("", "gate_up")}

Recorded = dict[str, list[torch.Tensor]]
"""Kind -> what crossed, of one layer after another."""


class _Reply(list[torch.Tensor]):
    attrs: dict[str, Any]


class _RecordingBackend:
    """A `fastsplit.tee.remote.Backend`: an
    executor's handlers, called directly, and copies of what they get and give."""

    def __init__(self, executor: Executor, layers: Sequence[int]) -> None:
        self.stats = Stats()
        self.recorded: Recorded = {kind: [] for kind in KINDS}
        self._handlers = executor.handlers
        self._layers = layers
        self._client = Client()

    def empty(self, shape: Sequence[int], dtype: Any = "float32") -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype)

    def call(self, op: str, /, *tensors: torch.Tensor, expect: Any = None, **attrs: Any) -> _Reply:
        recorded = attrs.get("layer") in self._layers
        if recorded and op in _SENT:
            self.recorded[_SENT[op]].append(tensors[0].clone())
        attrs = {key: list(value) if isinstance(value, tuple) else value for key, value in attrs.items()}
        call: Any = SimpleNamespace(tensors=tensors, attrs=attrs, reply_attrs={}, empty=self.empty, client=self._client)
        results = self._handlers[op](call)
        reply = _Reply([] if results is None else [results] if isinstance(results, torch.Tensor) else results)
        reply.attrs = call.reply_attrs
        if recorded:
            for kind, tensor in zip(_REPLIED.get(op, ()), reply):
                if kind:
                    self.recorded[kind].append(tensor.clone())
        return reply

    def submit(self, op: str, /, *tensors: torch.Tensor, expect: Any = None, **attrs: Any) -> _Reply:
        raise NotImplementedError("recorded with one lane")


def _record(tokens: int, layers: Sequence[int]) -> Recorded:
    """What crosses in a prefill of the text."""
    directory = model_dir()
    ids = AutoTokenizer.from_pretrained(directory)(TEXT.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"]
    if ids.shape[1] < tokens:
        raise SystemExit(f"error: {TEXT.name} has {ids.shape[1]} tokens, fewer than {tokens}")
    model = open_model(str(directory))
    backend = _RecordingBackend(Executor(model), layers)
    known = RemoteModel(model.name, model.config, "float32", model.tee_weights())
    runner = Runner(known, backend, "folded", lanes=1, scores_nbytes=2**62)
    with torch.inference_mode(), runner.new_cache(1, tokens) as cache:
        runner.forward(ids[:, :tokens], cache, keep="all")
    return backend.recorded


def _as_sent(tensors: Sequence[torch.Tensor], dtype: str) -> list[memoryview]:
    """Their bytes, in memory as it is sent from."""
    found = []
    for tensor in tensors:
        cast = tensor.to(getattr(torch, dtype)).contiguous().reshape(-1).view(torch.uint8).numpy()
        memory = pool.allocate(cast.nbytes)
        memory[:] = cast
        found.append(memory.data)
    return found


def measure(recorded: Recorded, dtypes: Sequence[str], codecs: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """One row for each kind, dtype and codec."""
    data = {(kind, dtype): _as_sent(recorded[kind], dtype) for kind in recorded for dtype in dtypes}
    groups = [[(kind, dtype, codec) for codec in codecs] for kind, dtype in data]
    packed_nbytes: dict[Any, int] = {}
    compress_s: dict[Any, list[float]] = {key: [] for group in groups for key in group}
    decompress_s: dict[Any, list[float]] = {key: [] for group in groups for key in group}
    for key in interleaved(groups, rounds, "compressing"):
        kind, dtype, codec = key
        number, itemsize = CODECS[codec], getattr(torch, dtype).itemsize
        packing_s = unpacking_s = 0.0
        packed_nbytes[key] = 0
        for piece in data[kind, dtype]:
            unpacked = pool.allocate(piece.nbytes)
            unpacked[:] = 255
            start = time.perf_counter()
            packed = compress(number, piece, itemsize, pool.allocate)
            packing_s += time.perf_counter() - start
            if packed is None:
                packed_nbytes[key] += piece.nbytes
                continue
            packed_nbytes[key] += packed.nbytes
            start = time.perf_counter()
            decompress(number, packed, unpacked.data, itemsize)
            unpacking_s += time.perf_counter() - start
            if not np.array_equal(unpacked, np.asarray(piece)):
                raise SystemExit(f"error: {kind}, {dtype}, {codec}: what came back is not what was compressed")
        compress_s[key].append(packing_s)
        decompress_s[key].append(unpacking_s)
    rows = []
    for key, seconds in compress_s.items():
        kind, dtype, codec = key
        nbytes = sum(piece.nbytes for piece in data[kind, dtype])
        packing_s, unpacking_s = statistics.median(seconds), statistics.median(decompress_s[key])
        saved = nbytes - packed_nbytes[key]
        # the middle one: what somebody who asks is told
        middle = data[kind, dtype][len(data[kind, dtype]) // 2]
        estimates = [probe(CODECS[codec], middle, getattr(torch, dtype).itemsize) for _ in range(5)]
        rows.append(
            {
                "kind": kind,
                "dtype": dtype,
                "codec": codec,
                "bytes": nbytes,
                "ratio": packed_nbytes[key] / nbytes,
                "compress_bytes_per_s": nbytes / packing_s,
                "decompress_bytes_per_s": nbytes / unpacking_s if unpacking_s else None,
                "break_even_bits_per_s": 8 * saved / (packing_s + unpacking_s) if saved else None,
                "seconds": {name: packing_s + unpacking_s + packed_nbytes[key] / rate for name, rate in LINKS.items()},
                "probe_ratio": statistics.median(estimate.ratio for estimate in estimates),
                "probe_compress_bytes_per_s": statistics.median(each.compress_bytes_per_s for each in estimates),
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| tensor | dtype | codec | ratio | compress MB/s | decompress MB/s | break-even Mbit/s | estimated |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        unpacking, even = row["decompress_bytes_per_s"], row["break_even_bits_per_s"]
        lines.append(
            f"| {row['kind']} | {row['dtype']} | {row['codec']} | {row['ratio']:.3f} "
            f"| {row['compress_bytes_per_s'] / 1e6:.0f} | {'-' if unpacking is None else f'{unpacking / 1e6:.0f}'} "
            f"| {'never' if even is None else f'{even / 1e6:.0f}'} "
            f"| {row['probe_ratio']:.3f}, {row['probe_compress_bytes_per_s'] / 1e6:.0f} MB/s |"
        )
    return "\n".join(lines)


def best(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[Any]]]:
    """Kind and dtype -> link -> the codec that takes least time, "-" for none, and its share of the time without."""
    found: dict[str, dict[str, list[Any]]] = {}
    for name, rate in LINKS.items():
        for row in rows:
            share = row["seconds"][name] * rate / row["bytes"]
            known = found.setdefault(f"{row['kind']}, {row['dtype']}", {}).setdefault(name, ["-", 1.0])
            if share < known[1]:
                known[:] = [row["codec"], share]
    return found


def best_table(found: dict[str, dict[str, list[Any]]]) -> str:
    lines = ["| tensor, dtype | " + " | ".join(LINKS) + " |", "|---|" + "---|" * len(LINKS)]
    for what, by_link in found.items():
        cells = [f"{codec}, {share:.0%}" if codec != "-" else "as it is" for codec, share in by_link.values()]
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m benches.codecs", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=1024, metavar="N", help="of the prefill (default: 1024)")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 15, 29], metavar="N", help="default: 1 15 29")
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--codec", nargs="+", default=list(installed()), choices=installed())
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="default: 7")
    add_output(parser, "codecs.json", parts=True)
    args = parser.parse_args(argv)
    keep_whole(parser, args, ("layers", "dtype", "codec"), [args.output])
    environment = describe(["python", "-m", "benches.codecs", *argv])
    recorded = _record(args.tokens, args.layers)
    rows = measure(recorded, args.dtype, args.codec, args.rounds)
    fastest = best(rows)
    print(f"{table(rows)}\n\n{best_table(fastest)}\n")
    result = {
        "environment": environment,
        "options": {key: value for key, value in vars(args).items() if key not in ("output", "force")},
        "text": TEXT.name,
        "codecs": rows,
        "best": fastest,
    }
    print(save(result, args.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The ladder: one prefill by the original system and by each step away from it, on links from loopback to 100 Mbit/s.

    python -m benches.ladder --links 1g                           TinyLlama-1.1B's shape, 1024 tokens, no arithmetic
    python -m benches.ladder --links 100m --rows original folded auto --rounds 1
    python -m benches.ladder --executor real --links loopback     with the real executor, and with errors
    python -m benches.ladder --links 1g --table                   what the files in --output-dir have, nothing new
    python -m benches.ladder --model random:tiny --prefill 200 --links loopback --output-dir /tmp

The steps: fewer calls (original, original-batched, then fastsplit's plans), serialization (tuned-batched sends tensors
out of band, fastsplit's own), compression, casts on the wire, several stretches under way at once, and what the library
chooses by itself. benches/splits.py says how rows are named; any name of that kind may be given to --rows.

How it is measured. Two processes, the TEE side (this one) and the executor, and what slows the bytes between them down
(benches/link.py; on loopback nothing). The executor is benches.null_executor, so that the link is what is measured:
shapes are real, nothing is computed, and the numbers are random, which no codec likes. Or a real one, of which one
copy of the weights serves all rows. Every row has a connection of its own, made anew each time, over which a short
prompt goes first, untimed. Then come the rounds, each with every row once, in changing order; only one row is at work
at any moment. A row of more than --once-over seconds has one round. The JSON of each link is written after every
measurement, and rows that it has from an earlier run stay until they are measured again, so that a long ladder can be
climbed in parts; who ends it early keeps what there is. The table has medians.

What the columns are. wall: seconds. comm, serial: of these what this side waited beyond the executor's own time, and
what it spent on messages, compression and casts included as far as it did not happen beside the rest. tee: its own
computing. gpu: the executor's handlers. calls: RPCs. up, down: MB through the socket. /orig: how many times fewer bytes
than the original's, on the same link. floor: the least that these bytes and calls take on this link. Where one call is
made at a time, (up + down) / bandwidth + calls * round trip. Where several are under way (async), both directions are
busy at once, and round trips hide behind bytes, or bytes behind round trips: the greater of max(up, down) / bandwidth +
one round trip, and chain * round trip, chain being the calls of one stretch, of which each needs the reply of the one
before. No arrangement of these bytes can be faster than either. Bytes and all of the chain's round trips together are
in the JSON as floor_added_s: less than that can be had. wall/floor and comm/floor: how many times that it took. On
loopback the bandwidth is what a bare sendall / recv_into loop reaches in this run, round trips count as nothing.
others: CPU seconds that other programs used meanwhile, the link's process among them. error: with a real executor, the
last row's logits against those of the first row that changes no number, max |difference| / max |logit|.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from fastsplit.models import DTYPES

from .environment import add_output_dir, describe, keep_whole
from .link import LINKS
from .measurements import Columns, Measurement, median, table, write_whole
from .rungs import Climber, codecs_line
from .splits import parse_rung
from .workers import EXECUTORS, executor_process

__all__ = ["ROWS", "main"]

ROWS = (
    # calls and serialization, one after the other
    "original",
    "original-batched",
    "tuned-batched",
    "per-op",
    "batched",
    "fused",
    "folded",
    "linear",
    # fewer bytes
    "folded+zlib",
    "folded+lz4",
    "folded+zstd",
    "folded+blosc2",
    "folded+auto",
    "folded+bfloat16",
    "folded+float16",
    "folded+bfloat16+auto",
    "folded+float16+auto",
    # asynchronous
    "folded+lanes2",
    "folded+lanes4",
    "folded+lanes8",
    "folded+float16+lanes2",
    "folded+float16+lanes4",
    "folded+float16+lanes8",
    "folded+float16+auto+lanes2",
    "folded+float16+auto+lanes4",
    "folded+float16+auto+lanes8",
    "folded+float16+zstd+lanes4",
    "folded+float16+blosc2+lanes4",
    "folded+bfloat16+auto+lanes4",
    "folded+bfloat16+blosc2+lanes4",
    "auto",
)


# ---- what is kept ----------------------------------------------------------------------------------------------------


class _Document:
    """The JSON of one link, on disk after every change."""

    def __init__(self, path: Path, subject: dict[str, Any], fresh: bool) -> None:
        self._path = path
        self.content: dict[str, Any] = {"subject": subject, "runs": [], "rows": {}}
        if not fresh and path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept.get("subject") != subject:
                raise SystemExit(f"{path} is of {kept.get('subject')}: give --fresh or another --output-dir")
            self.content = kept

    @property
    def rows(self) -> dict[str, Any]:
        rows: dict[str, Any] = self.content["rows"]
        return rows

    def begin(self, circumstances: dict[str, Any]) -> None:
        self.content["runs"].append(circumstances)

    def add(self, name: str, measured: Measurement) -> None:
        """One more round of a row; with the first one in a run, what it had before goes."""
        run = len(self.content["runs"]) - 1
        row = self.rows.get(name)
        if row is None or row["run"] != run:
            row = self.rows[name] = {"run": run, "rounds": []}
        row["rounds"].append(measured)
        row["median"] = median(row["rounds"])
        original = self.rows.get("original", {}).get("median")
        if original is not None:
            for other in self.rows.values():
                other["median"]["times_fewer_bytes"] = _nbytes(original) / _nbytes(other["median"])
        known = {name: self.rows[name] for name in ROWS if name in self.rows}
        self.content["rows"] = {**known, **self.rows}  # in the ladder's order
        write_whole(self._path, self.content)


def _nbytes(median: Measurement) -> float:
    return float(median["bytes_sent"] + median["bytes_received"])


# ---- the table -------------------------------------------------------------------------------------------------------

_COLUMNS: Columns = (
    ("wall s", 9, lambda m: f"{m['wall_s']:.3f}"),
    ("comm s", 9, lambda m: f"{m['communication_s']:.3f}"),
    ("serial s", 10, lambda m: f"{m['serialization_s']:.3f}"),
    ("tee s", 8, lambda m: f"{m['tee_compute_s']:.3f}"),
    ("gpu s", 8, lambda m: f"{m['gpu_compute_s']:.3f}"),
    ("calls", 7, lambda m: f"{m['rpc_calls']:.0f}"),
    ("up MB", 9, lambda m: f"{m['bytes_sent'] / 1e6:.1f}"),
    ("down MB", 9, lambda m: f"{m['bytes_received'] / 1e6:.1f}"),
    ("/orig", 7, lambda m: f"{m['times_fewer_bytes']:.2f}"),
    ("floor s", 9, lambda m: f"{m['floor_s']:.3f}"),
    ("of", 7, lambda m: "async" if m["asynchronous"] else "1 call"),
    ("wall/floor", 11, lambda m: f"{m['wall_s'] / m['floor_s']:.3f}"),
    ("comm/floor", 11, lambda m: f"{m['communication_s'] / m['floor_s']:.3f}"),
    ("others s", 9, lambda m: f"{m['others_cpu_s']:.1f}"),
    ("rounds", 7, lambda m: f"{m['rounds']}"),
    ("error", 9, lambda m: f"{m['logits_error']:.1e}"),
)


def _table(rows: dict[str, Any]) -> str:
    medians = {name: {**row["median"], "rounds": len(row["rounds"])} for name, row in rows.items()}
    notes = {}
    if "auto" in rows:
        said = medians["auto"]["said"]
        notes["auto"] = [*said.get("choice", []), f"codecs: {codecs_line(said['codecs'])}"]
    return table("row", _COLUMNS, medians, notes)


# ---- the command -----------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benches.ladder", description=__doc__.partition("\n")[0])
    parser.add_argument("--links", nargs="+", default=list(LINKS), choices=LINKS)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), metavar="ROW", help=f"of {', '.join(ROWS)}, or others")
    parser.add_argument("--executor", default="null", choices=EXECUTORS)
    parser.add_argument("--model", default="random:tinyllama-1.1b", help="a HF directory, or random:PRESET[@SEED]")
    parser.add_argument("--prefill", type=int, default=1024, metavar="N", help="how many random ids (default: 1024)")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="the executor's and the TEE side's")
    parser.add_argument("--threads", type=int, default=0, help="torch's, in every process; 0: one for each core")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--once-over", type=float, default=60.0, metavar="S", help="seconds (default: 60)")
    parser.add_argument("--warm-up", type=int, default=16, metavar="N", help="tokens, at most all (default: 16)")
    parser.add_argument("--fresh", action="store_true", help="forget what the files have")
    parser.add_argument("--table", action="store_true", help="only show what the files have")
    add_output_dir(parser, "ladder-LINK.json, ladder-real-LINK.json")
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    args = parser.parse_args(argv)
    if min(args.prefill, args.rounds) < 1 or args.warm_up < 0:
        parser.error("--prefill and --rounds must be 1 or more, --warm-up 0 or more")
    try:
        rungs = [parse_rung(name) for name in dict.fromkeys(args.rows)]
    except ValueError as error:
        parser.error(f"--rows: {error}")
    subject = {key: getattr(args, key) for key in ("executor", "model", "prefill", "dtype")}
    prefix = "ladder" if args.executor == "null" else f"ladder-{args.executor}"
    links = list(dict.fromkeys(args.links))
    paths = {link: args.output_dir / f"{prefix}-{link}.json" for link in links}
    if args.fresh:  # else rows that are measured join those that the files have
        keep_whole(parser, args, ("rows",), paths.values())
    documents = {link: _Document(path, {"link": link, **subject}, args.fresh) for link, path in paths.items()}
    if not args.table:
        if args.threads:
            torch.set_num_threads(args.threads)
        with executor_process(args.executor, args.model, args.dtype, args.threads) as executor:
            climber = Climber.at(args.executor, executor, args.model, args.prefill)
            for link, document in documents.items():
                circumstances = describe(["python", "-m", "benches.ladder", *argv])
                document.begin({"environment": circumstances, "rounds": args.rounds, "warm_up": args.warm_up})
                found = climber.climb(link, rungs, rounds=args.rounds, once_over_s=args.once_over, warm_up=args.warm_up)
                for name, measured in found:
                    document.add(name, measured)
    for link, document in documents.items():
        print(f"{link}, {args.executor} executor, {args.model}, {args.prefill} tokens, {args.dtype}, medians")
        print(_table(document.rows))
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())

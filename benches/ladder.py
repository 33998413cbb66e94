"""The ladder that this project began with: one prefill by the original system and by each step away from it.

    python -m benches.ladder                                      loopback and 1 Gbit/s: 15 minutes, 11 GB
    python -m benches.ladder --links 100m --rows original folded auto
    python -m benches.ladder --quick                              192 tokens, one round

Its steps, in this order: fewer calls, faster serialization, compression, several calls at a time; of each a note on the
original system predicted calls and seconds, on another machine: compare the steps, not the seconds. Rows between and
behind the predicted ones: the same calls by fastsplit, plans of fewer calls, a cast, what the library chooses by
itself. --rows takes any name that splits.py has.

How it is measured. TEE side (this process), executor, and between them a relay that slows the bytes down (link.py; on
loopback none). A row has a connection of its own each time, over which a short prompt goes first, untimed. Rounds have
every row once, in changing order; a row of more than --once-over seconds has one. split-ladder.json is written after
every measurement; links of an earlier run with the same model and tokens stay in it.

What the columns are. predicted: by the note. Then by link: calls; GB through the socket, both directions; s, the wall
clock; x, how many times faster than the row "original" on the same link; /floor, how many times the least that these
bytes and calls can take there; error, the last row's logits against those of the first row that changes no number. The
floor of one call at a time is bytes / bandwidth + calls * round trip. Of several under way it is the greater of the
busier direction's bytes / bandwidth + one round trip, and the round trips of one chunk's calls. Loopback's bandwidth is
what a bare sendall / recv_into loop reaches in this run, its round trips count as nothing, and its floor has no
arithmetic.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

import fastsplit
from fastsplit.models import DTYPES, Model, open_model
from fastsplit.split.plan import PLANS
from fastsplit.tee.report import codec_counts

from .environment import add_output, describe, keep_whole
from .link import LINKS, LinkKind
from .processes import OthersCpu, Process
from .rounds import Columns, Measurement, interleaved, median, progress, table
from .split_phases import run_prefill
from .split_systems import Document, Setting, Workers
from .splits import Split, open_split, parse
from .transports.pair import raw_bytes_per_s

__all__ = ["STEPS", "floor_s", "main"]

STEPS: dict[str, tuple[str, tuple[int, float, float] | None]] = {
    "original": ("per-op, msgpack, one call at a time", (200, 40.0, 1.0)),
    "original-batched": ("+ linear layers of one input in one call", (110, 22.0, 1.8)),
    "tuned-batched": ("+ faster serialization: tensors out of band", (110, 15.0, 2.7)),
    "batched": ("the same calls by fastsplit: kv heads go once, scores stop at the diagonal", None),
    "batched+blosc2": ("+ compression", (110, 8.0, 5.0)),
    "batched+blosc2+lanes4": ("+ asynchronous", (110, 4.0, 10.0)),
    "folded": ("plan folded alone: half of the calls", None),
    "minimal+float16+lanes4": ("plan minimal, cast to float16, asynchronous", None),
    "auto": ("what the library chooses", None),
}
"""Row -> what it is, and what was predicted: calls, seconds, and how many times faster than the original."""

_WARM_UP_ROWS = 16
_QUICK_TOKENS = 192
"""The fewest of which two chunks can be under way at once."""


def floor_s(measured: Measurement, bytes_per_s: float, round_trip_s: float) -> float:
    """The least that what was sent takes on a link. `measured`: bytes_sent, bytes_received, rpc_calls, chain_calls,
    asynchronous."""
    up, down = measured["bytes_sent"], measured["bytes_received"]
    if measured["asynchronous"]:
        return max(max(up, down) / bytes_per_s + round_trip_s, float(measured["chain_calls"] * round_trip_s))
    return float((up + down) / bytes_per_s + measured["rpc_calls"] * round_trip_s)


def _climb(
    names: Sequence[str], kind: LinkKind, ids: torch.Tensor, setting: Setting, executor: Process, bytes_per_s: float
) -> Iterator[tuple[str, Measurement]]:
    """Rows on one link, as they are measured."""
    reference: torch.Tensor | None = None
    slow: set[str] = set()
    model = open_model(setting.model)
    for name in interleaved([names], setting.rounds, kind.name):
        if name in slow:
            continue
        measured, logits = _measure(name, kind, ids, model, executor)
        measured["floor_s"] = floor_s(measured, bytes_per_s, kind.round_trip_s)
        if reference is None and parse(name).cast is None and name != "auto":
            reference = logits
        if reference is not None:
            measured["logits_error"] = float((logits - reference).abs().max() / reference.abs().max())
        progress(f"{kind.name}: {name} {measured['wall_s']:.2f} s, floor {measured['floor_s']:.2f} s")
        if measured["wall_s"] > setting.once_over_s:
            slow.add(name)
        yield name, measured


def _measure(
    name: str, kind: LinkKind, ids: torch.Tensor, model: Model, executor: Process
) -> tuple[Measurement, torch.Tensor]:
    with torch.inference_mode(), ExitStack() as stack:
        split = open_split(stack, name, model, executor, rows=len(ids), relay=kind)
        run_prefill(split, ids[:_WARM_UP_ROWS])
        gc.collect()
        others = OthersCpu(os.getpid(), executor.pid)
        measured, logits = run_prefill(split, ids)
        measured["others_cpu_s"] = others.seconds()
        del measured["ops"]
        runner = split.runner
        chain_calls = PLANS[runner.plan].calls(runner.config.num_hidden_layers)
        asynchronous = runner.lanes > 1 and measured["rpc_calls"] > chain_calls
        measured.update(plan=runner.plan, lanes=runner.lanes, chain_calls=chain_calls, asynchronous=asynchronous)
        measured["said"] = _said(split)
    return measured, logits


def _said(split: Split) -> dict[str, Any]:
    """What a connection found out and did, the short prompt before included; nothing of a rival's."""
    channel, runner = split.backend, split.runner
    if not isinstance(channel, fastsplit.Channel):
        return {}
    codecs = {name: used["ratio"] for name, used in codec_counts(channel.stats).items()}
    said: dict[str, Any] = {"link": channel.link._asdict(), "codecs": codecs}
    return said if runner.tuning is None else {**said, "choice": runner.tuning.lines()}


# ---- the table -------------------------------------------------------------------------------------------------------


def _table(rows: Sequence[dict[str, Any]], links: Sequence[str]) -> str:
    columns: list[Any] = [
        ("predicted: calls", 18, lambda row: str(row["predicted"]["calls"])),
        ("s", 6, lambda row: f"{row['predicted']['seconds']:.0f}"),
        ("x", 6, lambda row: f"{row['predicted']['speed_up']:.1f}"),
    ]
    for link in links:
        columns += _columns_of(link)
    notes = {}
    for row in rows:
        chosen = [f"{on}: {line}" for on, m in row["measured"].items() for line in m["said"].get("choice", ())]
        notes[row["row"]] = [row["step"], *chosen]
    return table("row", columns, {row["row"]: row for row in rows}, notes)


def _columns_of(link: str) -> Columns:
    def of(row: Measurement) -> Measurement:
        found: Measurement = row["measured"][link]
        return found

    return (
        (f"{link}: calls", max(len(link) + 9, 14), lambda row: str(of(row)["rpc_calls"])),
        ("GB", 8, lambda row: f"{(of(row)['bytes_sent'] + of(row)['bytes_received']) / 1e9:.3f}"),
        ("s", 9, lambda row: f"{of(row)['wall_s']:.3f}"),
        ("x", 7, lambda row: f"{of(row)['speed_up']:.2f}"),
        ("/floor", 8, lambda row: f"{of(row)['wall_s'] / of(row)['floor_s']:.2f}"),
        ("error", 9, lambda row: f"{of(row)['logits_error']:.1e}"),
    )


# ---- the command -----------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benches.ladder", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"{_QUICK_TOKENS} tokens, one round")
    parser.add_argument("--links", nargs="+", default=["loopback", "1g"], choices=LINKS)
    parser.add_argument(
        "--rows", nargs="+", default=list(STEPS), metavar="ROW", help=f"of {', '.join(STEPS)}, or others"
    )
    parser.add_argument("--model", default="random:tinyllama-1.1b", help="a HF directory, or random:PRESET[@SEED]")
    parser.add_argument("--tokens", type=int, metavar="N", help="random ids (default: 1024)")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="the executor's and the TEE side's")
    parser.add_argument("--rounds", type=int, metavar="N", help="default: 3; --quick: 1")
    parser.add_argument("--once-over", type=float, default=25.0, metavar="S", help="one round is enough (default: 25)")
    parser.add_argument("--threads", type=int, default=0, help="torch's, in every process; 0: one for each core")
    add_output(parser, "split-ladder.json")
    return parser


def _document(path: Path, environment: dict[str, Any], options: dict[str, Any], links: Sequence[str]) -> Document:
    """With the rows that an earlier run of the same has on other links."""
    document = Document(path, environment, options, links={})
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if all(before["options"].get(key) == options[key] for key in ("model", "tokens", "dtype")):
            document.content["links"] = {link: about for link, about in before["links"].items() if link not in links}
            document.rows += before["rows"]
            for row in document.rows:
                row["measured"] = {link: m for link, m in row["measured"].items() if link not in links}
    return document


def _row(document: Document, name: str) -> dict[str, Any]:
    for row in document.rows:
        if row["row"] == name:
            return row
    step, expected = STEPS.get(name, (name, None))
    predicted = None if expected is None else dict(zip(("calls", "seconds", "speed_up"), expected))
    document.rows.append({"row": name, "step": step, "predicted": predicted, "measured": {}})
    return document.rows[-1]


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    args = parser.parse_args(argv)
    keep_whole(parser, args, ("quick", "rows"), [args.output])
    tokens, rounds = args.tokens or (_QUICK_TOKENS if args.quick else 1024), args.rounds or (1 if args.quick else 3)
    if min(tokens, rounds) < 1:
        parser.error("--tokens and --rounds must be 1 or more")
    names, links = list(dict.fromkeys(args.rows)), list(dict.fromkeys(args.links))
    try:
        for name in names:
            parse(name)
    except ValueError as error:
        parser.error(f"--rows: {error}")
    if args.threads:
        torch.set_num_threads(args.threads)
    setting = Setting(args.model, rounds, args.once_over)
    options = {"model": setting.model_name, "tokens": tokens, "dtype": args.dtype, "rounds": rounds}
    environment = describe(["python", "-m", "benches.ladder", *argv])
    document = _document(args.output, environment, options, links)
    rows = [_row(document, name) for name in names]
    vocab_size = open_model(args.model).config.vocab_size
    ids = torch.randint(0, vocab_size, (tokens,), generator=torch.Generator().manual_seed(0))
    origin = {key: environment[key] for key in ("date", "git_revision", "git_changed_files")}
    with Workers(args.threads) as workers:
        executor = workers.get(args.model, args.dtype, "executor")["executor"]
        for link in links:
            kind, measured_rounds = LINKS[link], {}
            about = {"executor": "real", "tokens": tokens, **vars(kind), "environment": origin}
            document.content["links"][link] = about
            bytes_per_s = about["bytes_per_s"] = kind.rate_bit_per_s / 8 or raw_bytes_per_s("tcp", quick=args.quick)
            for name, measured in _climb(names, kind, ids, setting, executor, bytes_per_s):
                found = measured_rounds.setdefault(name, [])
                found.append(measured)
                rows[names.index(name)]["measured"][link] = {**median(found), "rounds": len(found)}
                original = rows[0]["measured"].get(link) if names[0] == "original" else None
                for row in rows if original else ():
                    if link in row["measured"]:
                        row["measured"][link]["speed_up"] = original["wall_s"] / row["measured"][link]["wall_s"]
                document.write()
    print(f"ladder: {setting.model_name}, {tokens} tokens, {args.dtype}, medians of {rounds} at most")
    print(*(f"{link}: {LINKS[link].text}" for link in links), sep="\n")
    print(_table(rows, links))
    document.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())

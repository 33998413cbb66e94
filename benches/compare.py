"""Two full runs of the same benchmarks, side by side: which conclusions hold in both, and which are noise.

    python -m benches.compare benches/results build/second            Markdown
    python -m benches.compare A B --margin 0.05 --output build/compare.json

A conclusion is the order of two systems that were measured in one group, with how many times longer the one takes: of
transports and serializers, fastsplit's each against everything else that is no reference, at the same size, on the same
link; of a model's systems, fastsplit's against the rivals and HF, and its plans on one link against each other; of the
ladder, each step against the one before and against the first. Two systems whose times differ by no more than the
margin are tied.

It holds if both runs say the same: the same one is quicker, or they are tied. It is noise if one run has a difference
where the other has a tie. It flipped if both have one, and not the same; such a conclusion is wrong in one of the runs,
and should not be drawn. Measurements that only one run has are counted, and not compared. The spread is how far a
system's own figure is apart in the two runs: the greater by the smaller.

The exit code is 1 if there was nothing to compare. What differs says nothing about why: both runs' machines and
revisions are in the head of what is printed.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .environment import describe, save
from .stored import LINKS, Missing, bytes_text, environment, is_memcpy, load, origin, transport_rows

__all__ = ["Conclusion", "compare", "main"]

_Seconds = dict[str, dict[str, float]]
"""Group -> system -> seconds."""
_Pairs = Callable[[dict[str, Any], str, list[str]], Iterator[tuple[str, str]]]


@dataclass(frozen=True)
class Conclusion:
    """`first` took `ratios` times as long as `second`, in the one run and in the other."""

    group: str
    first: str
    second: str
    ratios: tuple[float, float]
    verdict: str
    """"holds", "noise" or "flipped"."""


# ---- what the files have ---------------------------------------------------------------------------------------------


def _serialization(document: dict[str, Any]) -> _Seconds:
    found: _Seconds = {}
    for benchmark in document["benchmarks"]:
        name = benchmark["extra_info"]["serializer"]
        if not is_memcpy(name) and benchmark["extra_info"].get("general", True):
            found.setdefault(benchmark["group"], {})[name] = benchmark["stats"]["median"]
    return found


def _transport(document: dict[str, Any]) -> _Seconds:
    found: _Seconds = {}
    kinds = (("round trip", "p50_us", "spinning"), ("round trip", "p50_us", "sleeping"), ("one way", "mean_us", None))
    for what, key, mode in kinds:
        for (name, nbytes), row in transport_rows(document, what, mode).items():
            us = row["median"].get(key)
            system = document["systems"][name]
            if us and not system["floor"] and (what == "one way" or system.get("latency", True)):
                title = LINKS.get(row["link"], row["link"])
                group = f"{what}, {title}, {bytes_text(nbytes, binary=True)}{f', {mode}' if mode else ''}"
                found.setdefault(group, {})[name] = us / 1e6
    # nobody to compare with
    return {group: systems for group, systems in found.items() if len(systems) > 1}


def _phase(key: str) -> Callable[[dict[str, Any]], _Seconds]:
    def seconds(document: dict[str, Any]) -> _Seconds:
        found: _Seconds = {}
        for row in document["rows"]:
            if row["median"].get(key):
                group = ", ".join(str(row[part]) for part in ("phase", "dtype") if row.get(part))
                found.setdefault(f"{group}, {row.get('tokens')} tokens", {})[row["system"]] = row["median"][key]
        return found

    return seconds


def _ladder(document: dict[str, Any]) -> _Seconds:
    found: _Seconds = {}
    for row in document["rows"]:
        for link, measured in row["measured"].items():
            about = document["links"][link]
            group = f"ladder, {link}, {about['executor']} executor, {about['tokens']} tokens"
            found.setdefault(group, {})[row["row"]] = measured["wall_s"]
    return found


def _ours_and_others(document: dict[str, Any], group: str, systems: list[str]) -> Iterator[tuple[str, str]]:
    for ours in systems:
        if "fastsplit" in ours:
            yield from ((ours, other) for other in systems if "fastsplit" not in other)


def _plans_and_others(document: dict[str, Any], group: str, systems: list[str]) -> Iterator[tuple[str, str]]:
    about = {row["system"]: row for row in document["rows"]}
    ours = [name for name in systems if about[name]["kind"] == "fastsplit"]
    for number, name in enumerate(ours):
        yield from ((name, other) for other in ours[number + 1 :] if about[other]["link"] == about[name]["link"])
        yield from ((name, other) for other in systems if about[other]["kind"] != "fastsplit")


def _steps(document: dict[str, Any], group: str, systems: list[str]) -> Iterator[tuple[str, str]]:
    for number in range(1, len(systems)):
        yield from ((systems[number], before) for before in dict.fromkeys((systems[number - 1], systems[0])))


_FILES: dict[str, tuple[Callable[[dict[str, Any]], _Seconds], _Pairs]] = {
    "serialization.json": (_serialization, _ours_and_others),
    "transport.json": (_transport, _ours_and_others),
    "split-prefill.json": (_phase("wall_s"), _plans_and_others),
    "split-decode.json": (_phase("step_s"), _plans_and_others),
    "split-ladder.json": (_ladder, _steps),
}


# ---- comparing -------------------------------------------------------------------------------------------------------


def _winner(ratio: float, margin: float) -> int:
    """-1: the first is quicker, 1: the second, 0: a tie."""
    if max(ratio, 1 / ratio) <= 1 + margin:
        return 0
    return -1 if ratio < 1 else 1


def _verdict(ratios: tuple[float, float], margin: float) -> str:
    one, other = (_winner(ratio, margin) for ratio in ratios)
    return "holds" if one == other else "flipped" if one * other < 0 else "noise"


def compare(first: Path, second: Path, margin: float) -> dict[str, Any]:
    """By file: conclusions, spreads, how many measurements only one run has. `left_out`: files, and why."""
    files: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    origins: dict[str, list[str]] = {}
    for name, (seconds, pairs) in _FILES.items():
        try:
            documents = [load(run, name) for run in (first, second)]
            one, other = map(seconds, documents)
        except Missing as missing:
            left_out[name] = str(missing)
            continue
        except (KeyError, TypeError) as error:
            left_out[name] = f"not as expected: {type(error).__name__} {error}"
            continue
        machines = [f"{environment(document).get('cpu')}, {origin(document)}" for document in documents]
        origins[name] = machines
        conclusions = []
        spread = {}
        unpaired = 0
        for group in dict.fromkeys([*one, *other]):
            of_one, of_other = one.get(group, {}), other.get(group, {})
            both = [system for system in of_one if system in of_other]
            unpaired += len(of_one.keys() ^ of_other.keys())
            for system in both:
                ratio = of_one[system] / of_other[system]
                spread[f"{group}: {system}"] = max(ratio, 1 / ratio)
            for ours, theirs in pairs(documents[0], group, both):
                ratios = (of_one[ours] / of_one[theirs], of_other[ours] / of_other[theirs])
                conclusions.append(Conclusion(group, ours, theirs, ratios, _verdict(ratios, margin)))
        if not spread:
            left_out[name] = "the runs have no measurement in common"
            continue
        worst = max(spread, key=lambda what: spread[what])
        files[name] = {
            "conclusions": [asdict(conclusion) for conclusion in conclusions],
            "counts": {
                verdict: sum(conclusion.verdict == verdict for conclusion in conclusions)
                for verdict in ("holds", "noise", "flipped")
            },
            "spread": spread,
            "spread_median": statistics.median(spread.values()),
            "spread_worst": {"of": worst, "ratio": spread[worst]},
            "unpaired": unpaired,
        }
    return {
        "runs": [str(first), str(second)],
        "margin": margin,
        "origins": origins,
        "files": files,
        "left_out": left_out,
    }


def _markdown(result: dict[str, Any], longest: int) -> str:
    lines = [f"Two runs, `{result['runs'][0]}` and `{result['runs'][1]}`; a tie is within {result['margin']:.0%}.", ""]
    for origins, names in _by_origin(result["origins"]).items():
        lines.append(f"- {', '.join(names)}: {origins[0]}; then {origins[1]}")
    lines += ["", "| file | conclusions | hold | noise | flipped | spread, median | worst | of | in one run alone |"]
    lines.append("|" + " --- |" * 9)
    for name, found in result["files"].items():
        counts, worst = found["counts"], found["spread_worst"]
        total = sum(counts.values())
        lines.append(
            f"| {name} | {total} | {_share(counts['holds'], total)} | {counts['noise']} | {counts['flipped']} | "
            f"{found['spread_median']:.3f} | {worst['ratio']:.2f} | {worst['of']} | {found['unpaired']} |"
        )
    lines += [f"| {name} | left out: {why} |" + " |" * 7 for name, why in result["left_out"].items()]
    for verdict, title in (
        ("flipped", "Flipped outright"),
        ("noise", "Noise: a tie in one run, a difference in the other"),
    ):
        listed = [
            one for found in result["files"].values() for one in found["conclusions"] if one["verdict"] == verdict
        ]
        if not listed:
            continue
        # those that are furthest apart first: they are what one would have got wrong
        listed.sort(key=lambda one: -abs(math.log(one["ratios"][0] / one["ratios"][1])))
        lines += ["", f"{title}: {len(listed)}", "", "| group | first | second | first / second | the other run |"]
        lines.append("|" + " --- |" * 5)
        lines += [
            f"| {one['group']} | {one['first']} | {one['second']} | {one['ratios'][0]:.3f} | {one['ratios'][1]:.3f} |"
            for one in listed[:longest]
        ]
        if len(listed) > longest:
            lines += ["", f"and {len(listed) - longest} more, in the JSON."]
    return "\n".join(lines)


def _by_origin(origins: dict[str, list[str]]) -> dict[tuple[str, ...], list[str]]:
    found: dict[tuple[str, ...], list[str]] = {}
    for name, of_runs in origins.items():
        found.setdefault(tuple(of_runs), []).append(name)
    return found


def _share(count: int, total: int) -> str:
    return f"{count} ({count / total:.0%})" if total else "0"


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m benches.compare", description=__doc__.partition("\n")[0])
    parser.add_argument("first", type=Path, metavar="A", help="a directory with the JSON of one run")
    parser.add_argument("second", type=Path, metavar="B", help="and with that of another")
    parser.add_argument("--margin", type=float, default=0.1, help="times this much longer is a tie (default: 0.1)")
    parser.add_argument("--longest", type=int, default=100, metavar="N", help="lines in a list (default: 100)")
    parser.add_argument("--output", type=Path, help="a JSON file with every conclusion")
    args = parser.parse_args(argv)
    if args.margin < 0:
        parser.error("--margin is not negative")
    result = compare(args.first, args.second, args.margin)
    print(_markdown(result, args.longest))
    if args.output is not None:
        command = ["python", "-m", "benches.compare", *argv]
        save({"environment": describe(command), **result}, args.output)
    return 0 if result["files"] else 1


if __name__ == "__main__":
    sys.exit(main())

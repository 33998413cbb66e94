"""The systems that benches.bench_split compares, and the rounds in which they take turns, whatever is measured of them.

    LINK-PLAN                            fastsplit: over a unix socket with shared memory (shm-), without (unix-), and
                                         over tcp (tcp-), in one of its plans
    original-tcp, tuned-tcp, tuned-ipc   the rivals, in plan "batched", as the original was (benches/rivals)
    hf-eager, hf-sdpa, hf-loop           HF's own class in one process, undivided

How it is measured. Three processes for each dtype: this one is the TEE side and drives one `Runner` a system; one
executor serves fastsplit and the rivals out of one copy of the weights; one runs HF. Only one system is at work at any
moment, and only that one is connected: each thread of an executor that has a connection keeps threads for arithmetic of
its own, and with six of them there decoding took longer (98 against 79 ms a token, folded). First
it does a little, untimed. In every other round the order is reversed, so that what drifts on the machine does not
favour one of them. A system whose round takes longer than --once-over seconds has that one round; HF, with which the
others are compared, has them all. Ratios are those of the same round, and the median is that of the ratios.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fastsplit

from .measurements import Columns, Measurement, median, table, write_whole
from .processes import OthersCpu, Process, peak_rss_bytes, reset_peak_rss
from .rounds import progress
from .splits import RIVALS, Split, memory, open_splits
from .workers import Workers

__all__ = ["CIRCUMSTANCES", "DEFAULT_PLANS", "Document", "Phase", "Setting", "System", "measure", "system_names"]

DEFAULT_PLANS = {
    "shm": ("folded", "fused", "linear", "batched", "per-op"),
    "unix": ("folded", "linear", "batched"),
    "tcp": ("folded", "linear", "batched"),
}
"""Link -> the plans that are measured over it, unless others are asked for."""


CIRCUMSTANCES: Columns = (
    ("RSS GB", 12, lambda m: f"{m.get('tee_peak_rss_bytes', 0) / 1e9:.1f}+{m['worker_peak_rss_bytes'] / 1e9:.1f}"),
    ("PSS GB", 12, lambda m: f"{m.get('tee_pss_bytes', 0) / 1e9:.1f}+{m['worker_pss_bytes'] / 1e9:.1f}"),
    ("others s", 10, lambda m: f"{m['others_cpu_s']:.1f}"),
)
"""What is measured around any phase."""


def system_names(links: Sequence[str], plans: Sequence[str] | None, hf: Sequence[str], *, rivals: bool) -> list[str]:
    """All systems over these links, each in `plans`; None: in those that the link has by default."""
    names = [f"{link}-{plan}" for link in dict.fromkeys(links) for plan in dict.fromkeys(plans or DEFAULT_PLANS[link])]
    return [*names, *(RIVALS if rivals else ()), *hf]


@dataclass
class System:
    """One way to run a model: a split of it, or HF's process, to which `hf` leads."""

    name: str
    worker_pid: int
    """The process that has the weights."""
    split: Split | None = None
    hf: fastsplit.Channel | None = None

    @property
    def kind(self) -> str:
        if self.hf is not None:
            return "hf"
        return "rival" if self.name in RIVALS else "fastsplit"

    def row(self) -> dict[str, Any]:
        """What is said of it in the results. The link is fastsplit's own, as is the plan."""
        link, _, plan = self.name.partition("-") if self.kind == "fastsplit" else (None, "", None)
        shm, reason = (None, "") if self.split is None else (self.split.shm, self.split.shm_reason)
        return {"system": self.name, "link": link, "plan": plan, "kind": self.kind, "shm": shm, "reason": reason}


@dataclass(frozen=True)
class Setting:
    """On what, and how often, systems are measured."""

    model: str
    rounds: int
    once_over_s: float

    @property
    def model_name(self) -> str:
        """Without the directories of the machine that it was measured on."""
        return Path(self.model).name


class Phase:
    """What is measured of every system: a prefill, or decoding."""

    name: str
    columns: Columns
    size: Mapping[str, int]
    """How many tokens, by what they are."""
    ops_key: str
    """Where a measurement has seconds by operation."""
    ops_unit: tuple[str, float]
    """What these are shown in: its name, and how many of it are a second."""

    def warm_up(self, system: System) -> None:
        raise NotImplementedError

    def run(self, system: System) -> Measurement:
        raise NotImplementedError

    def compare(self, measured: Mapping[str, Measurement]) -> None:
        """Puts into each of a round's measurements, by system, how it compares with HF's."""
        raise NotImplementedError

    def summary(self, row: Mapping[str, Any]) -> Measurement:
        """The medians of a system's rounds, and what follows from them."""
        return median(row["rounds"])


class Document:
    """One JSON file of results, on disk after every measurement."""

    def __init__(self, path: Path, environment: dict[str, Any], options: dict[str, Any], **more: Any) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.content = {"environment": environment, "options": options, "rows": self.rows, **more}

    def write(self) -> None:
        write_whole(self.path, self.content)

    def close(self) -> None:
        """Notes who else was busy meanwhile; and where it all is."""
        self.content["environment"]["load_average_after"] = os.getloadavg()
        self.write()
        print(self.path, end="\n\n")


# ---- measuring -------------------------------------------------------------------------------------------------------


@contextmanager
def _connected(name: str, processes: Mapping[str, Process], setting: Setting) -> Iterator[System]:
    """A system with a connection of its own, for as long as it is its turn."""
    with ExitStack() as stack:
        if name.startswith("hf-"):
            hf = processes["hf"]
            yield System(name, hf.pid, hf=stack.enter_context(fastsplit.connect(hf.ready, call_timeout_s=600)))
            return
        (split,) = open_splits(stack, [name], setting.model, processes["real"])
        yield System(name, split.worker_pid, split)


def _measured(phase: Phase, system: System) -> Measurement:
    """One round of a system, with the memory that it took and the CPU time that others did."""
    gc.collect()
    pids = {"worker": system.worker_pid} if system.hf is not None else {"tee": os.getpid(), "worker": system.worker_pid}
    for pid in pids.values():
        reset_peak_rss(pid)
    others = OthersCpu(os.getpid(), system.worker_pid)
    measured = phase.run(system)
    measured["others_cpu_s"] = others.seconds()
    for side, pid in pids.items():
        measured[f"{side}_peak_rss_bytes"] = peak_rss_bytes(pid)
        measured.update(memory(pid, side))
    return measured


def measure(
    phase: Phase,
    names: Sequence[str],
    dtype: str,
    setting: Setting,
    document: Document,
    workers: Workers,
    *,
    finish: Callable[[], None] = lambda: None,
) -> list[str]:
    """Adds a row for each of these systems to the document. Returns the lines that say what came out.

    `finish` is called before these are made.
    """
    kinds = {"hf" if name.startswith("hf-") else "real": None for name in names}
    processes = dict(zip(kinds, workers.get(setting.model, dtype, *kinds)))
    rows: dict[str, dict[str, Any]] = {}
    slow: set[str] = set()
    with torch.inference_mode():
        for number in range(setting.rounds):
            turn: dict[str, Measurement] = {}
            for name in names if number % 2 == 0 else reversed(names):
                if name in slow:
                    continue
                with _connected(name, processes, setting) as system:
                    phase.warm_up(system)
                    measured = turn[name] = _measured(phase, system)
                    if name not in rows:
                        about = {"phase": phase.name, "dtype": dtype, **system.row(), **phase.size}
                        rows[name] = {**about, "rounds": [], "median": {}}
                        document.rows.append(rows[name])
                rows[name]["rounds"].append(measured)
                phase.compare(turn)
                for one in turn:  # HF's turn may have come last
                    rows[one]["median"] = phase.summary(rows[one])
                document.write()
                wall_s = measured["wall_s"]
                progress(f"{phase.name}, {dtype}, round {number + 1}: {name} {wall_s:.2f} s")
                if wall_s > setting.once_over_s and rows[name]["kind"] != "hf":
                    slow.add(name)
    finish()
    for row in document.rows:  # also those of another dtype: what `finish` found out may be theirs, too
        row["median"] = phase.summary(row)
    document.write()
    size = ", ".join(f"{count} {of.replace('_', ' ')}" for of, count in phase.size.items())
    return [
        f"{phase.name}: {setting.model_name}, {size}, {dtype}, medians of {setting.rounds} at most",
        *_lines(phase, rows),
    ]


def _lines(phase: Phase, rows: Mapping[str, dict[str, Any]]) -> list[str]:
    medians = {name: {**row["median"], "rounds": len(row["rounds"])} for name, row in rows.items()}
    lines = [table("system", (*phase.columns, ("rounds", 8, lambda m: str(m["rounds"]))), medians, {})]
    unit, units_a_second = phase.ops_unit
    for name, measured in medians.items():
        ops = measured.get(phase.ops_key, {})
        for side in ("tee", "gpu"):
            parts = sorted(((op["total_s"], of) for of, op in ops.items() if op["side"] == side), reverse=True)
            if parts:
                text = ", ".join(f"{of} {total_s * units_a_second:.3f}" for total_s, of in parts)
                lines.append(f"{name}, {side}, {unit}: {text}")
    lines += [f"{name}: {row['reason']}" for name, row in rows.items() if row["reason"]]
    return lines

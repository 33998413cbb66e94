"""The systems that bench_split and the ladder compare, their processes, and the rounds in which they take turns.

    LINK-PLAN, original-tcp, ...         splits: fastsplit's and the rivals' (splits.py)
    hf-eager, hf-sdpa, hf-loop           HF's own class in one process, undivided (rivals/hf.py)

How it is measured. Three processes for each dtype: this one is the TEE side and drives one `Runner` a system; one
executor serves fastsplit and the rivals out of one copy of the weights; one runs HF. One system at a time is at work,
and connected. First it does a little, untimed. In every other round the order is reversed, so that drift on the machine
favours no system. A system whose round takes longer than --once-over seconds has that one round; HF, with which the
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
from fastsplit.gpu_side import SPIN_COUNT
from fastsplit.models import open_model

from . import UNTOUCHED
from .environment import save
from .link import LinkKind
from .processes import OthersCpu, Process, memory, reset_peak_rss
from .rounds import Columns, Measurement, median, progress, table
from .splits import RIVALS, Split, open_split

__all__ = ["DEFAULT_PLANS", "Document", "Phase", "Setting", "System", "Workers", "measure", "system_names"]

DEFAULT_PLANS = {
    "shm": ("tee-attention", "folded", "fused", "minimal", "batched", "per-op"),
    "unix": ("folded", "minimal", "batched"),
    "tcp": ("folded", "minimal", "batched"),
}
"""Link -> the plans that are measured over it, unless others are asked for."""


def system_names(links: Sequence[str], plans: Sequence[str] | None, hf: Sequence[str], *, rivals: bool) -> list[str]:
    """All systems over these links, each in `plans`; None: in those that the link has by default."""
    names = [f"{link}-{plan}" for link in dict.fromkeys(links) for plan in dict.fromkeys(plans or DEFAULT_PLANS[link])]
    return [*names, *(RIVALS if rivals else ()), *hf]


class Workers:
    """The processes that have the weights of one model in one dtype: "executor" and "hf". Both stay for the next
    request of the same, and end with this process. OpenMP's idle threads wait in an executor as in the GPU side's
    script, in HF's process as torch has it.

    `threads`: torch's in each; 0: one for each core. `device`: of the executor.
    """

    def __init__(self, threads: int = 0, device: str = "cpu") -> None:
        self._threads = threads
        self._device = device
        self._of: tuple[str, str] | None = None
        self._running: dict[str, Process] = {}

    def get(self, model: str, dtype: str, *kinds: str) -> dict[str, Process]:
        """One of each kind, listening: `ready` has its address, an executor's all of them as JSON."""
        if self._of != (model, dtype):
            self.close()
            self._of = model, dtype
        missing = [kind for kind in kinds if kind not in self._running]
        for kind in missing:
            progress(f"starting: {kind}, {dtype}")
            options = ["--model", model, "--dtype", dtype, "--threads", str(self._threads)]
            environment = UNTOUCHED
            if kind == "executor":
                options += ["--device", self._device]
                environment = {"GOMP_SPINCOUNT": str(SPIN_COUNT)} if UNTOUCHED["OMP_WAIT_POLICY"] is None else {}
            self._running[kind] = Process(f"benches.rivals.{kind}", *options, environment=environment, wait=False)
        for kind in missing:  # which have been loading side by side
            self._running[kind].wait_ready()
        return self._running

    def close(self) -> None:
        while self._running:
            self._running.popitem()[1].close()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class System:
    """One way to run a model: a split of it, or HF's process, to which `hf` leads."""

    name: str
    worker_pid: int
    """The process that has the weights."""
    split: Split | None = None
    hf: fastsplit.Channel | None = None

    def row(self) -> dict[str, Any]:
        """What is said of it in the results. Link and plan are fastsplit's alone."""
        kind = "hf" if self.hf is not None else "rival" if self.name in RIVALS else "fastsplit"
        link, _, plan = self.name.partition("-") if kind == "fastsplit" else (None, "", None)
        shm, reason = (None, "") if self.split is None else (self.split.shm, self.split.reason)
        return {"system": self.name, "link": link, "plan": plan, "kind": kind, "shm": shm, "reason": reason}


@dataclass(frozen=True)
class Setting:
    """On what, and how often, systems are measured. `relay`: what the splits' tcp goes through."""

    model: str
    rounds: int
    once_over_s: float
    relay: LinkKind | None = None

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
    rows: int
    """Of the prompt."""

    def warm_up(self, system: System) -> None: ...

    def run(self, system: System) -> Measurement:
        """Seconds and bytes by name; what is a dict is by operation, and for the table on the screen alone."""
        raise NotImplementedError

    def compare(self, measured: Mapping[str, Measurement]) -> None:
        """Puts into each of a round's measurements, by system, how it compares with HF's."""

    def summary(self, row: Mapping[str, Any], rounds: Sequence[Measurement]) -> Measurement:
        """The medians of a system's rounds, and what follows from them."""
        return median(rounds)


class Document:
    """One JSON file of results, on disk after every measurement."""

    def __init__(self, path: Path, environment: dict[str, Any], options: dict[str, Any], **more: Any) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.content = {"environment": environment, "options": options, **more, "rows": self.rows}

    def write(self) -> None:
        save(self.content, self.path)

    def close(self) -> None:
        """Notes the machine's load meanwhile, and prints the path."""
        self.content["environment"]["load_average_after"] = os.getloadavg()
        self.write()
        print(self.path, end="\n\n")


@contextmanager
def _connected(name: str, processes: Mapping[str, Process], setting: Setting, rows: int) -> Iterator[System]:
    """A system with a connection of its own, for its turn."""
    with ExitStack() as stack:
        if name.startswith("hf-"):
            hf = processes["hf"]
            yield System(name, hf.pid, hf=stack.enter_context(fastsplit.connect(hf.ready, call_timeout_s=600)))
            return
        executor, model = processes["executor"], open_model(setting.model)
        split = open_split(stack, name, model, executor, rows=rows, relay=setting.relay)
        yield System(name, executor.pid, split)


def _measured(phase: Phase, system: System) -> Measurement:
    """One round of a system, with the memory that it took and the CPU time of other programs."""
    gc.collect()
    pids = {"worker": system.worker_pid} if system.hf is not None else {"tee": os.getpid(), "worker": system.worker_pid}
    for pid in pids.values():
        reset_peak_rss(pid)
    others = OthersCpu(os.getpid(), system.worker_pid)
    measured = phase.run(system)
    measured["others_cpu_s"] = others.seconds()
    for side, pid in pids.items():
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
    kinds = dict.fromkeys("hf" if name.startswith("hf-") else "executor" for name in names)
    processes = workers.get(setting.model, dtype, *kinds)
    rows: dict[str, dict[str, Any]] = {}
    rounds: dict[str, list[Measurement]] = {}
    slow: set[str] = set()

    def keep(names: Sequence[str]) -> dict[str, Measurement]:
        medians = {name: phase.summary(rows[name], rounds[name]) for name in names}
        for name, found in medians.items():
            kept = {key: value for key, value in found.items() if not isinstance(value, dict)}
            rows[name].update(rounds=len(rounds[name]), median=kept)
        document.write()
        return medians

    with torch.inference_mode():
        for number in range(setting.rounds):
            turn: dict[str, Measurement] = {}
            for name in names if number % 2 == 0 else reversed(names):
                if name in slow:
                    continue
                with _connected(name, processes, setting, phase.rows) as system:
                    phase.warm_up(system)
                    measured = turn[name] = _measured(phase, system)
                    if name not in rows:
                        rows[name] = {"phase": phase.name, "dtype": dtype, **system.row(), **phase.size}
                        document.rows.append(rows[name])
                rounds.setdefault(name, []).append(measured)
                phase.compare(turn)
                keep(list(turn))  # HF's turn may have come last
                progress(f"{phase.name}, {dtype}, round {number + 1}: {name} {measured['wall_s']:.2f} s")
                if measured["wall_s"] > setting.once_over_s and not name.startswith("hf-"):
                    slow.add(name)
    finish()
    medians = keep(list(rows))
    size = ", ".join(f"{count} {of.replace('_', ' ')}" for of, count in phase.size.items())
    title = f"{phase.name}: {setting.model_name}, {size}, {dtype}, medians of {setting.rounds} at most"
    columns = (
        *phase.columns,
        ("PSS GB", 12, lambda m: f"{m.get('tee_pss_bytes', 0) / 1e9:.1f}+{m['worker_pss_bytes'] / 1e9:.1f}"),
        ("others s", 10, lambda m: f"{m['others_cpu_s']:.1f}"),
    )
    notes = {name: [*_by_operation(found), *filter(None, [rows[name]["reason"]])] for name, found in medians.items()}
    return [title, table("system", columns, medians, notes)]


def _by_operation(found: Measurement) -> Iterator[str]:
    for ops in (value for value in found.values() if isinstance(value, dict)):
        for side in ("tee", "gpu"):
            parts = sorted(((op["total_s"], of) for of, op in ops.items() if op["side"] == side), reverse=True)
            if parts:
                yield f"{side}, ms: " + ", ".join(f"{of} {total_s * 1e3:.3g}" for total_s, of in parts)

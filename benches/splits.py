"""The split's systems, fastsplit's and the rivals', that benchmarks drive: each a Runner at one executor process.

    LINK-PLAN       fastsplit, over "shm", "unix" or "tcp", in one of its plans: shm-folded
    a rival         original-tcp, tuned-tcp, tuned-ipc: plan "batched", as the original was

Over a slow link there is more to choose, and a system is named by what was (`parse_rung`):

    PLAN[+CODEC][+DTYPE][+lanesN][+blocksN]
                                fastsplit in a plan; what its tensors are compressed with ("auto": if it pays), and cast
                                to on the wire; so many stretches under way at once, the connection sending while it
                                receives; rows in a block of scores: folded+zstd+bfloat16+lanes4
    auto                        fastsplit, all of that as it chooses for itself
    original, original-batched  the original's messages, in plan "per-op" and "batched"
    tuned, tuned-batched        the same with tensors out of band

Rules. Systems that are opened together over one link share its connection, and a link has one only if it is asked for:
what an executor keeps for each of its clients slows the others down. Every system of a process computes out of the same
copy of the weights.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastsplit
from fastsplit.models import open_model
from fastsplit.split.ops import PLANS
from fastsplit.tee.open import open_split, share_cores
from fastsplit.tee.remote import RemoteModel
from fastsplit.tee.report import Recorder
from fastsplit.tee.runner import Runner

from .processes import Process
from .rivals.backend import RivalBackend, rival_runner
from .rivals.executor import RIVALS

__all__ = [
    "LINKS",
    "RIVALS",
    "Rung",
    "Split",
    "memory",
    "open_rung",
    "open_splits",
    "parse_rung",
]

CODECS = ("auto", "zlib", "lz4", "zstd", "blosc2")
CASTS = ("bfloat16", "float16")

LINKS = {
    "shm": ("fastsplit-unix", ""),
    "unix": ("fastsplit-unix", "?shm=off"),
    "tcp": ("fastsplit-tcp", ""),
}
"""Link -> which of the executor's addresses, and what the URI says beside it."""


@dataclass
class Split:
    """One system, ready to run."""

    name: str
    runner: Runner
    backend: Any
    worker_pid: int
    shm: bool | None = None
    """Whether tensors cross in shared memory; None where that is no question."""
    shm_reason: str = ""

    def record(self) -> Recorder:
        """A new stopwatch for what the Runner does from now on."""
        recorder = self.runner.recorder = Recorder()
        if isinstance(self.backend, RivalBackend):
            self.backend.recorder = recorder
        return recorder


def open_splits(stack: ExitStack, names: Sequence[str], model_name: str, executor: Process) -> list[Split]:
    """Connects to the executor, once for each link and rival."""
    model = open_model(model_name)
    addresses = json.loads(executor.ready)
    with fastsplit.connect(addresses["fastsplit-unix"]) as channel:
        known = RemoteModel.fetch(channel, model)
    channels: dict[str, fastsplit.Channel] = {}
    splits = []
    for name in names:
        if name in RIVALS:
            rival = stack.enter_context(RivalBackend(addresses[name], RIVALS[name], model.config))
            splits.append(Split(name, rival_runner(known, rival), rival, executor.pid))
            continue
        link, _, plan = name.partition("-")
        if link not in channels:
            address, query = LINKS[link]
            channels[link] = stack.enter_context(fastsplit.connect(addresses[address] + query, call_timeout_s=600))
            share_cores(channels[link], known)
        channel = channels[link]
        runner = Runner(known, channel, plan)
        reason = f"{channel.shm_reason}; {runner.plan_reason}".rstrip("; ")
        splits.append(Split(name, runner, channel, executor.pid, channel.shm, reason))
    return splits


@dataclass(frozen=True)
class Rung:
    """One system of those that are named by what was chosen."""

    name: str
    rival: str | None = None
    """The way of a rival: "original" or "tuned"."""
    plan: str = "auto"
    codec: str | None = None
    cast: str | None = None
    lanes: int | None = None
    blocks: int | None = None

    @property
    def auto(self) -> bool:
        return self.rival is None and self.plan == "auto"

    @property
    def service(self) -> str:
        """Which of an executor's addresses."""
        return "fastsplit-tcp" if self.rival is None else f"{self.rival}-tcp"


def parse_rung(name: str) -> Rung:
    """Raises ValueError for what is no system's name."""
    if name == "auto":
        return Rung(name)
    first, *parts = name.split("+")
    way, _, plan = first.partition("-")
    if way in ("original", "tuned") and plan in ("", "batched") and not parts:
        return Rung(name, rival=way, plan=plan or "per-op", lanes=1)
    chosen: dict[str, Any] = {}
    found: tuple[str, Any]
    for part in parts:
        if part in CODECS:
            found = ("codec", part)
        elif part in CASTS:
            found = ("cast", part)
        elif (number := re.fullmatch("(lanes|blocks)([1-9][0-9]*)", part)) is not None:
            found = (number[1], int(number[2]))
        else:
            raise ValueError(f"{name!r}: {part!r}, expected one of {', '.join((*CODECS, *CASTS))}, lanesN, blocksN")
        if found[0] in chosen:
            raise ValueError(f"{name!r}: two of a kind")
        chosen[found[0]] = found[1]
    if first not in PLANS:
        raise ValueError(f"{name!r}: {first!r}, expected one of auto, original, tuned, {', '.join(PLANS)}")
    return Rung(name, plan=first, **{"lanes": 1, **chosen})


def open_rung(
    stack: ExitStack, rung: Rung, uri: str, known: RemoteModel, worker_pid: int, rows: int | None = None
) -> Split:
    """Connects to `uri`, where the rung's service is. `rows`: of the prompts that are to come, which "auto" asks."""
    if rung.rival is not None:
        rival = stack.enter_context(RivalBackend(uri, rung.rival, known.config))
        return Split(rung.name, rival_runner(known, rival, rung.plan), rival, worker_pid)
    if rung.auto:
        opened = stack.enter_context(open_split(uri, known, rows=rows, call_timeout_s=600))
        channel, runner = opened.channel, opened.runner
        return Split(rung.name, runner, channel, worker_pid, channel.shm, runner.plan_reason)
    options: dict[str, Any] = {"codec": rung.codec or "off", "wire_dtype": rung.cast, "overlap": rung.lanes != 1}
    channel = stack.enter_context(fastsplit.connect(uri, call_timeout_s=600, **options))
    share_cores(channel, known)
    runner = Runner(known, channel, rung.plan, lanes=rung.lanes, block_rows=rung.blocks)
    return Split(rung.name, runner, channel, worker_pid, channel.shm, runner.plan_reason)


def memory(pid: int, prefix: str) -> dict[str, int]:
    """What a process holds now, in bytes: PSS counts what is shared by halves, so that two processes' add up to what
    they really take; `shared` is the part of RSS in shared memory. Empty where the system does not say."""
    found = {}
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                found[f"{prefix}_pss_bytes"] = int(line.split()[1]) * 1024
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssShmem:"):
                found[f"{prefix}_rss_shared_bytes"] = int(line.split()[1]) * 1024
    return found

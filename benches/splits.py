"""A split that benchmarks drive: a Runner at an executor's process, named by what was chosen.

    [LINK-]PLAN[+CODEC][+DTYPE][+lanesN][+blocksN]
                  fastsplit. With a LINK ("shm", "unix", "tcp") it chooses the rest for itself. Without one it runs over
                  tcp, and what is not named is off: tensors are compressed with CODEC ("auto": if it pays), cast to
                  DTYPE on the link, N chunks of a prompt are under way at once, blocks of scores have N rows
    auto          fastsplit over tcp, as it chooses for itself
    original-tcp, tuned-tcp, tuned-ipc
                  the rivals in plan "batched", as the original was; `original-batched`, `tuned-batched` are other names
    original      the original in plan "per-op"

Rules. A split has a connection of its own for as long as it is measured: each connected client costs the executor
threads, which slow the others down. All systems compute out of one copy of the weights.
"""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import fastsplit
from fastsplit import tee
from fastsplit.models import Model
from fastsplit.split.plan import PLANS
from fastsplit.tee.remote import RemoteModel
from fastsplit.tee.report import Recorder
from fastsplit.tee.runner import Runner

from .link import LinkKind, through
from .processes import Process
from .rivals.backend import RivalBackend, rival_runner
from .rivals.executor import RIVALS

__all__ = ["LINKS", "PLAN_NAMES", "RIVALS", "Spec", "Split", "open_split", "parse"]

CODECS = ("auto", "zlib", "lz4", "zstd", "blosc2")
CASTS = ("bfloat16", "float16")
LINKS = {"shm": ("fastsplit-unix", ""), "unix": ("fastsplit-unix", "?shm=off"), "tcp": ("fastsplit-tcp", "")}
"""Link -> which of the executor's addresses, and what the URI says beside it."""

PLAN_NAMES = tuple(PLANS)


@dataclass(frozen=True)
class Spec:
    """A system by its name. None: fastsplit chooses."""

    name: str
    service: str
    """Which of an executor's addresses."""
    query: str = ""
    plan: str = "auto"
    codec: str | None = None
    cast: str | None = None
    lanes: int | None = None
    blocks: int | None = None

    @property
    def rival(self) -> bool:
        return self.service in RIVALS


def parse(name: str) -> Spec:
    """Raises ValueError for what is no system's name."""
    way, _, plan = name.partition("-")
    if way in ("original", "tuned") and name in {*RIVALS, "original", f"{way}-batched"}:
        return Spec(name, name if name in RIVALS else f"{way}-tcp", plan="batched" if plan else "per-op", lanes=1)
    first, *parts = name.split("+")
    link, dash, plan = first.partition("-")
    if link not in LINKS:
        link, dash, plan = "tcp", "", first
    if plan not in (*PLAN_NAMES, "auto"):
        raise ValueError(f"{name!r}: {plan!r}, expected one of auto, original, tuned, {', '.join(PLAN_NAMES)}")
    chosen: dict[str, Any] = {} if dash or plan == "auto" else {"codec": "off", "lanes": 1}
    seen = set()
    for part in parts:
        number = re.fullmatch("(lanes|blocks)([1-9][0-9]*)", part)
        if number is None and part not in CODECS + CASTS:
            raise ValueError(f"{name!r}: {part!r}, expected one of {', '.join(CODECS + CASTS)}, lanesN, blocksN")
        kind = number[1] if number else "codec" if part in CODECS else "cast"
        if kind in seen:
            raise ValueError(f"{name!r}: two of a kind")
        seen.add(kind)
        chosen[kind] = int(number[2]) if number else part
    service, query = LINKS[link]
    return Spec(name, service, query, plan, **chosen)


@dataclass
class Split:
    """One system, ready to run."""

    spec: Spec
    runner: Runner
    backend: Any
    shm: bool | None = None
    """Whether tensors cross in shared memory; None where that is no question."""
    reason: str = ""

    def record(self) -> Recorder:
        """A new stopwatch for what the Runner does from now on."""
        recorder = self.runner.recorder = Recorder()
        if isinstance(self.backend, RivalBackend):
            self.backend.recorder = recorder
        return recorder


def open_split(
    stack: ExitStack, name: str, model: Model, executor: Process, *, rows: int, relay: LinkKind | None = None
) -> Split:
    """Connects to the executor, through `relay` if there is one. `rows`: of the prompts to come, for "auto"."""
    spec = parse(name)
    uri = json.loads(executor.ready)[spec.service] + spec.query
    if relay is not None:
        uri = stack.enter_context(through(relay, uri))
    with fastsplit.connect(json.loads(executor.ready)["fastsplit-unix"]) as channel:
        known = RemoteModel.fetch(channel, model)
    if spec.rival:
        rival = stack.enter_context(RivalBackend(uri, RIVALS[spec.service], known.config))
        return Split(spec, rival_runner(known, rival, spec.plan), rival)
    auto = spec.plan == "auto"
    split = stack.enter_context(
        tee.open_split(
            uri,
            known,
            rows=rows,
            plan=spec.plan,
            lanes=spec.lanes,
            block_rows=spec.blocks,
            cast="auto" if auto else spec.cast or "off",
            codec=spec.codec or "auto",
            call_timeout_s=600,
        )
    )
    channel = split.channel
    reason = f"{channel.shm_reason}; {split.runner.plan_reason}".rstrip("; ")
    return Split(spec, split.runner, channel, channel.shm, reason)

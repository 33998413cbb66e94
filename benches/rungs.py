"""A row of the ladder, measured on one link: one prefill by a `Rung`, and the least that its bytes and calls can take.

What benches.ladder and benches.split_ladder share. An executor, "null" or "real", serves all rows on all links; a row
has a connection of its own each time, over which a short prompt goes first, untimed. Rounds have every row once, in
changing order; a row of more than `once_over_s` seconds has one. benches/ladder.py has what is measured, by name.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

import fastsplit
from fastsplit.split.ops import PLANS
from fastsplit.tee.remote import RemoteModel
from fastsplit.tee.report import codec_counts

from .link import LINKS, LinkKind, through
from .measurements import Measurement
from .null_executor import null_model
from .processes import OthersCpu, Process
from .rivals.raw_socket import one_way_bytes_per_s
from .rounds import interleaved, progress
from .splits import Rung, Split, open_rung

__all__ = ["FEW_MESSAGES", "Climber", "codecs_line", "floors"]

FEW_MESSAGES: dict[str, Any] = {"counts": (8, 48)}
"""Of `one_way_bytes_per_s`: a quick look, to a tenth or two."""

_COUNTERS = ("bytes_sent", "bytes_received", "bytes_copied", "calls", "remote_s")


def floors(measured: Measurement, bytes_per_s: float, round_trip_s: float) -> dict[str, float]:
    """The least that what was sent takes on a link, for one call at a time and for several under way.

    `measured`: bytes_sent, bytes_received, rpc_calls, chain_calls, asynchronous.
    """
    up, down, trips_s = measured["bytes_sent"], measured["bytes_received"], measured["chain_calls"] * round_trip_s
    blocking_s = (up + down) / bytes_per_s + measured["rpc_calls"] * round_trip_s
    busier_s = max(up, down) / bytes_per_s
    overlapped_s = max(busier_s + round_trip_s, trips_s)
    return {
        "floor_blocking_s": blocking_s,
        "floor_overlapped_s": overlapped_s,
        "floor_added_s": busier_s + trips_s,
        "floor_s": overlapped_s if measured["asynchronous"] else blocking_s,
    }


@dataclass
class Climber:
    """An executor, and what climbs the ladder on any link to it."""

    kind: str
    """Of the executor: "null" or "real"."""
    executor: Process
    known: RemoteModel
    ids: torch.Tensor
    quick: bool = False
    """Whether to take a shorter look at what loopback can do."""

    @classmethod
    def at(cls, kind: str, executor: Process, model_name: str, tokens: int, *, quick: bool = False) -> Climber:
        """The prompt is so many random ids."""
        model = null_model(model_name)
        ids = torch.randint(0, model.config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(0))
        with fastsplit.connect(json.loads(executor.ready)["fastsplit-unix"] + "?shm=off") as channel:
            return cls(kind, executor, RemoteModel.fetch(channel, model), ids, quick)

    def climb(
        self, link: str, rungs: Sequence[Rung], *, rounds: int, once_over_s: float, warm_up: int = 16
    ) -> Iterator[tuple[str, Measurement]]:
        """Names of rows, as they are measured, and what was. `warm_up`: tokens of the untimed prompt, at most all.

        With a real executor "logits_error" is against the first row that changes no number.
        """
        addresses = json.loads(self.executor.ready)
        kind = LINKS[link]
        bytes_per_s, round_trip_s = _bandwidth(kind, quick=self.quick), kind.round_trip_s
        reference: torch.Tensor | None = None
        slow: set[str] = set()
        with ExitStack() as stack:
            services = dict.fromkeys(rung.service for rung in rungs)
            uris = {service: stack.enter_context(through(kind, addresses[service])) for service in services}
            for rung in interleaved([rungs], rounds, link):
                if rung.name in slow:
                    continue
                progress(f"{link}: {rung.name}")
                measured, logits = self._measure(rung, uris[rung.service], warm_up)
                measured.update(bytes_per_s=bytes_per_s, round_trip_s=round_trip_s)
                measured.update(floors(measured, bytes_per_s, round_trip_s))
                if self.kind == "real":
                    if reference is None and rung.cast is None and not rung.auto:
                        reference = logits
                    if reference is not None:
                        measured["logits_error"] = float((logits - reference).abs().max() / reference.abs().max())
                        measured["same_top_token"] = bool(logits.argmax() == reference.argmax())
                progress(f"{link}: {rung.name} {measured['wall_s']:.2f} s, floor {measured['floor_s']:.2f} s")
                if measured["wall_s"] > once_over_s:
                    slow.add(rung.name)
                yield rung.name, measured

    def _measure(self, rung: Rung, uri: str, warm_up: int) -> tuple[Measurement, torch.Tensor]:
        with torch.inference_mode(), ExitStack() as stack:
            split = open_rung(stack, rung, uri, self.known, self.executor.pid, len(self.ids))
            if warm_up:
                _run(split, self.ids[:warm_up])
            gc.collect()
            others = OthersCpu(os.getpid(), self.executor.pid)
            measured, logits = _run(split, self.ids)
            measured["others_cpu_s"] = others.seconds()
            measured["said"] = _said(split)
        return measured, logits.clone()


def codecs_line(found: Measurement) -> str:
    """What each codec did on a connection, as text."""
    return ", ".join(f"{name} {used['ratio']:.2f} times smaller" for name, used in found.items()) or "none"


def _run(split: Split, ids: torch.Tensor) -> tuple[Measurement, torch.Tensor]:
    runner = split.runner
    with runner.new_cache(1, len(ids)) as cache:
        before = split.backend.stats.as_dict()
        recorder = split.record()
        with recorder.phase("prefill"):
            logits = runner.forward(ids[None], cache)[0, -1]
        after = split.backend.stats.as_dict()
    a, b = PLANS[runner.plan]
    chain_calls = a * runner.config.num_hidden_layers + b
    measured = {
        **recorder.as_dict(),
        **{key: after[key] - before[key] for key in _COUNTERS},
        "plan": runner.plan,
        "lanes": runner.lanes,
        "chain_calls": chain_calls,
        "asynchronous": runner.lanes > 1 and recorder.rpc_calls > chain_calls,
    }
    del measured["ops"]
    return measured, logits


def _said(split: Split) -> dict[str, Any]:
    """What a connection found out and did, the short prompt before included; nothing of a rival's."""
    channel, runner = split.backend, split.runner
    if not isinstance(channel, fastsplit.Channel):
        return {}
    said: dict[str, Any] = {"link": channel.link._asdict(), "codecs": codec_counts(channel.stats)}
    if channel.stats.casts_widened:
        said["casts_widened"] = channel.stats.casts_widened
    if runner.tuning is not None:
        said["choice"] = runner.tuning.lines()
    return said


def _bandwidth(kind: LinkKind, *, quick: bool) -> float:
    """Bytes per second in one direction. Without a limit, the better of what memory that is in no cache and memory
    that is can do: replies come from the former, what the TEE side works on in place may be the latter."""
    if kind.rate_bit_per_s:
        return kind.rate_bit_per_s / 8
    counts = FEW_MESSAGES if quick else {}
    return max(one_way_bytes_per_s("tcp", **counts), one_way_bytes_per_s("tcp", buffers=1, **counts))

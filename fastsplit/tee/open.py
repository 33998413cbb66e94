"""Setting up a split: connect, fetch and check the model, share cores, measure the link, tune, make the Runner.

    with open_split("unix:///tmp/gpu.sock", open_model("models/llama")) as split, torch.inference_mode():
        for token in split.runner.generate(ids, 64):
            ...

Rules. The script, `SplitModelForCausalLM` and the benchmarks set up a split here, so that the same arguments give the
same settings everywhere. An error at any step closes the channel before it is raised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..extras import torch
from ..models import Model
from ..wire.blocking.channel import Channel
from ..wire.transport.meter import LinkEstimate
from ..wire.transport.spin import spin_us_beside
from .guard import Guard
from .remote import RemoteModel
from .report import Recorder
from .runner import MAX_CACHE_NBYTES, Runner
from .tuning import Tuning, may_overlap, measure_link, tune

__all__ = ["Split", "open_split", "share_cores"]


@dataclass(frozen=True, eq=False)
class Split:
    """A model that is ready to run at an executor. A context manager; `close` closes the channel."""

    channel: Channel
    model: RemoteModel
    link: LinkEstimate | None
    """The measured link; None over shared memory and unix sockets, which are not measured."""
    tuning: Tuning
    runner: Runner

    def close(self) -> None:
        """Closes the channel, and with it the caches on the executor. Idempotent."""
        self.channel.close()

    def __enter__(self) -> Split:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_split(
    uri: str,
    trusted: Model | RemoteModel | None,
    *,
    rows: int | Callable[[RemoteModel], int | None] | None = None,
    batch: int = 1,
    plan: str = "auto",
    lanes: int | None = None,
    block_rows: int | None = None,
    cast: str = "auto",
    codec: str = "auto",
    tee_dtype: str | None = None,
    wire_dtype: str | None = None,
    timeout_s: float = 10.0,
    call_timeout_s: float | None = 300.0,
    recorder: Recorder | None = None,
    guard: Guard | None = None,
    max_cache_nbytes: int = MAX_CACHE_NBYTES,
) -> Split:
    """Connects to the executor at `uri` and sets up a split of its model. The caller closes the result.

    `trusted`: the copy (`open_model`) that the executor's configuration and norm weights must equal; None takes the
    executor's unchecked; a RemoteModel that was fetched and checked before is used as it is. `rows`, `batch`: tokens of
    the expected prompts, and sequences in a batch; `rows` None is a typical length. A function as `rows` gets the
    fetched model before the link is measured, and may raise to refuse it.

    `plan`, `lanes`, `block_rows`, `cast`: settings, see `tune`; "auto" and None are chosen for the link, which is
    measured now. `codec`: as for `fastsplit.connect`. `tee_dtype`, `wire_dtype`, `recorder`, `guard`,
    `max_cache_nbytes`: as for `Runner`. `timeout_s`: for connecting. `call_timeout_s`: for each call; None: no limit.

    Raises AddressError, ConnectError and DeadlineError as `fastsplit.connect` does; VerificationError if the model is
    not the trusted one; RemoteProtocolError for a malformed description; SettingError for a setting out of range.
    """
    channel = Channel(
        uri,
        arrays="torch",
        timeout_s=timeout_s,
        call_timeout_s=call_timeout_s,
        codec=codec,
        overlap=may_overlap(uri, lanes),
    )
    try:
        with torch.inference_mode():
            model = trusted if isinstance(trusted, RemoteModel) else RemoteModel.fetch(channel, trusted)
            share_cores(channel, model)
            expected_rows = rows(model) if callable(rows) else rows
            link = measure_link(channel, call_timeout_s)
            tuning = tune(
                model.config,
                model.dtype,
                expected_rows,
                batch=batch,
                link=link,
                shm=channel.shm,
                near=channel.near,
                threads=model.threads,
                plan=plan,
                lanes=lanes,
                block_rows=block_rows,
                cast=cast,
                wire_dtype=wire_dtype,
                tee_threads=torch.get_num_threads(),
                has_embedding=model.trusted is not None,
            )
            runner = Runner(
                model,
                channel,
                recorder=recorder,
                tee_dtype=tee_dtype,
                wire_dtype=wire_dtype,
                choice=tuning,
                guard=guard,
                max_cache_nbytes=max_cache_nbytes,
            )
        return Split(channel, model, link, tuning, runner)
    except BaseException:
        channel.close()
        raise


def share_cores(channel: Channel, model: RemoteModel) -> None:
    """Makes callers sleep without spinning, if the executor computes with all cores of this machine."""
    spin_us = spin_us_beside(model.threads) if channel.shm else None
    if spin_us is not None:
        channel.spin_us = spin_us

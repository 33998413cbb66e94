"""The fast path: a whole call in one compiled step, where two ends share memory and a ring (native/fastpath.c).

What it does. `call` describes a request, writes it, waits, and makes the Result; `submit` and `wait` are its two
halves. `receive` waits for a request and makes its Call; `reply` describes a result and writes it. Each does so only
while all is plain: shapes that came before, tensors in the arena or small, no other thread that sends or reads, nothing
that is to be refused or ended. All else it leaves to the modules of blocking/: before anything was sent, or with the
slot still in the ring, and the call goes on as a Future.

Rules. A FastPath belongs to one connection, and keeps to the rules of blocking/: a client's call makes its thread the
reader (`Reader.reading`); a server's is used by the connection's thread. It holds nothing that holds it. What a call or
a reply counts is in the Stats when it ends, but for bytes that crossed by reference, as where Python counts
(`Connection.fill`).
"""

from __future__ import annotations

from functools import partial
from time import monotonic
from typing import Any

from ..tensors import Arrays, copy_in
from .backend import FastPath, compiled, knows_torch
from .call import Call
from .connection import Connection, greeting
from .result import Result
from .shm.ring import Ring
from .shm.slots import Slots
from .stats import Stats

__all__ = ["add_fast_path"]

_ARMED_S = 60.0  # a socket's own timeout, of seconds, saves a system call where a call has a longer one


def add_fast_path(
    connection: Connection, arrays: Arrays, stats: Stats, future_type: Any = None, handlers: Any = None
) -> Any:
    """Gives a connection its fast path, if it can have one, and returns it; None where it cannot.

    `arrays`: what results and calls hold. `stats`: of the connection, to which each call and each reply adds.
    `future_type`: of a client's calls that go on as Futures. `handlers`: a server's, by op.
    """
    arena, ring, session = connection.arena, connection.transport, connection.session
    templates, heads = session.encoder.compiled, session.decoder.compiled
    if arena is None or not isinstance(ring, Ring) or templates is None or heads is None:
        return None
    if type(ring.slots) is not compiled(Slots) or (arrays.kind == "torch" and not knows_torch()):
        return None
    ring.link.arm(monotonic() + _ARMED_S)
    connection.fast_path = FastPath(
        slots=ring.slots,
        templates=templates,
        heads=heads,
        session=session,
        arena=arena,
        requests=session.requests,
        returns=arena.returns,
        dead=arena.dead,
        idle=arena.idle,
        is_sending=connection.sending.locked,
        frames=connection.outbox.frames,
        inside=connection.inside,
        greeting=greeting,
        copy_in=partial(copy_in, arena),
        stats=stats,
        link=ring.link,
        passes_descriptors=ring.passes_descriptors,
        spin=ring.spin,
        fd=ring.fileno(),
        as_torch=arrays.kind == "torch",
        result_type=Result,
        future_type=future_type,
        call_type=Call,
        handlers=handlers,
    )
    return connection.fast_path

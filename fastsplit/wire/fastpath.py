"""The fast path: a whole call in one compiled step, through a ring or through a socket (native/fastpath.c).

What it does. `call` describes a request, writes it, waits, and makes the Result; `submit` and `wait` are its two
halves. `receive` waits for a request and makes its Call; `reply` describes a result and writes it. Each does so only
while all is plain: shapes that came before, no other thread that sends or reads, nothing that is to be refused or
ended; tensors in the arena or small, and through a socket small ones that are not coded. All else it leaves to the
modules of blocking/: before anything was sent, or with the frame still in the ring or in the session's staging memory,
and the call goes on as a Future. Of a frame that a socket has taken in part, they send the rest (`rest`).

Rules. A FastPath belongs to one connection, and keeps to the rules of blocking/: a client's call makes its thread the
reader (`Reader.reading`); a server's is used by the connection's thread. It holds nothing that holds it. What a call or
a reply counts is in the Stats when it ends, but for bytes, as where Python counts (`Connection.fill`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any

from ..schema.header import REPLY_FLAGS
from ..tensors import Arrays, check_memory, copy_in
from .backend import FastPath, compiled, knows_torch
from .call import Call
from .connection import Connection, greeting, weakly
from .result import Result
from .shm.ring import Ring
from .shm.slots import Slots
from .stats import Stats
from .transport.stream import Stream

__all__ = ["add_fast_path"]

_ARMED_S = 60.0  # a socket's own timeout, of seconds, saves a system call where a call has a longer one
_MAX_SENT_NBYTES = 64 * 1024
"""The most tensor bytes of a message through a socket: the interpreter's lock is held while the kernel copies them."""
_STAGING_NBYTES = _MAX_SENT_NBYTES + 4096
"""What comes in with one read, and is copied out: a message with as many, and its head."""


def add_fast_path(
    connection: Connection,
    arrays: Arrays,
    stats: Stats,
    *,
    future_type: Any = None,
    handlers: Any = None,
    send_rest: Callable[[Any], None] | None = None,
) -> None:
    """Gives a connection its fast path, if it can have one.

    `arrays`: what results and calls hold. `stats`: of the connection, to which each call and each reply adds.
    `future_type`: of a client's calls that go on as Futures. `handlers`: a server's, by op. `send_rest`: a client's
    `Sender.send_rest`.
    """
    arena, transport, session, coder = connection.arena, connection.transport, connection.session, connection.coder
    templates, heads = session.encoder.compiled, session.decoder.compiled
    if templates is None or heads is None or (arrays.kind == "torch" and not knows_torch()):
        return
    own = dict.fromkeys(("slots", "arena", "returns", "dead", "idle", "copy_in", "staging"))
    link: Any = transport
    if isinstance(transport, Ring) and arena is not None and type(transport.slots) is compiled(Slots):
        link = transport.link
        own |= {"slots": transport.slots, "arena": arena, "returns": arena.returns, "dead": arena.dead}
        own |= {"idle": arena.idle, "copy_in": partial(copy_in, arena)}
    elif type(transport) is Stream and arena is None and not transport.passes_descriptors and not coder.overlaps:
        own["staging"] = session.enlarge_staging(_STAGING_NBYTES)
    else:
        return
    link.arm(monotonic() + _ARMED_S)
    connection.fast_path = FastPath(
        **own,
        templates=templates,
        heads=heads,
        session=session,
        requests=session.requests,
        sending=connection.sending,
        acquire_sending=connection.sending.acquire,
        at_once=(False,),
        frames=connection.outbox.frames,
        inside=connection.inside,
        greeting=greeting,
        check_memory=check_memory,
        stats=stats,
        link=link,
        passes_descriptors=transport.passes_descriptors,
        spin=transport.spin,
        fd=transport.fileno(),
        as_torch=arrays.kind == "torch",
        max_nbytes=max(min(_MAX_SENT_NBYTES, coder.least_nbytes - 1), 0),
        known_flags=REPLY_FLAGS if connection.can_code else 0,
        result_type=Result,
        future_type=future_type,
        call_type=Call,
        handlers=handlers,
        send_rest=None if send_rest is None else weakly(send_rest),
    )

"""Whether two sides share memory, and how: what each offers in its HELLO, and what follows from both.

Rules. Both sides come to the same result, since it is a function of the two offers alone. Each result has a reason in
words, for people to read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ...errors import AddressError, RemoteProtocolError
from ..transport.scheme import SHM_AUTO, SHM_OFF, Address, check_prefix
from .segment import Memfd, Named, new_token, why_no_memfd
from .semaphores import semaphores

__all__ = ["Offer", "Sharing", "agree", "offer"]

_MEMFD, _NAMED = Memfd.kind, Named.kind


@dataclass(frozen=True)
class Offer:
    """What one side can do.

    `kinds`: of segments, the preferred one first. `prefix`: the path that names of segments start with. `note`: why
    there are no kinds. `semaphores`: the name of those that a ring would use, empty if there can be no ring. `token`:
    names this side of this connection.
    """

    kinds: tuple[str, ...]
    prefix: str
    note: str
    semaphores: str
    token: str

    def attrs(self) -> dict[str, Any]:
        """The offer as attributes of a HELLO."""
        return {
            "shm": " ".join(self.kinds),
            "shm_prefix": self.prefix,
            "shm_note": self.note,
            "shm_token": self.token,
            "semaphores": self.semaphores,
        }

    @classmethod
    def of(cls, attrs: dict[str, Any]) -> Offer:
        """The offer that came in a HELLO. One without any has no shared memory. Raises RemoteProtocolError."""
        values = [attrs.get(name, "") for name in ("shm", "shm_prefix", "shm_note", "semaphores", "shm_token")]
        if not all(isinstance(value, str) for value in values):
            raise RemoteProtocolError(f"hello, shm: {values!r}, expected strings")
        kinds, prefix, note, semaphores, token = values
        if prefix:
            try:
                check_prefix(prefix)
            except AddressError as error:
                raise RemoteProtocolError(f"hello, {error}") from None
        if _NAMED in kinds.split() and not re.fullmatch("[0-9a-f]{16}", token):
            raise RemoteProtocolError(f"hello, shm_token: {token!r}, expected 16 hexadecimal digits")
        return cls(tuple(kinds.split()), prefix, note, semaphores, token)


@dataclass(frozen=True)
class Sharing:
    """What was agreed on. `factory`: makes segments; None for no shared memory. `ring`: whether control goes through
    shared memory, too. `reason`: in words."""

    factory: Memfd | Named | None
    ring: bool
    reason: str


def offer(address: Address, is_peer_local: bool, *, is_client: bool) -> Offer:
    """What this side of a connection offers. `is_peer_local`: Address.is_peer_local of this connection."""
    kinds: tuple[str, ...] = ()
    prefix = note = ""
    explicit = address.shm not in (SHM_AUTO, SHM_OFF)
    if address.shm == SHM_OFF:
        note = f"the {'client' if is_client else 'server'}'s URI says shm=off"
    elif not is_peer_local:
        note = "the two sides may be on different hosts"
    elif address.passes_descriptors:
        no_memfd = why_no_memfd()
        kinds = (_NAMED,) if explicit or no_memfd else (_MEMFD, _NAMED)
        prefix = address.shm if explicit else ""
        note = no_memfd or ""
    elif explicit or not is_client:
        kinds, prefix = (_NAMED,), address.shm if explicit else ""
    else:
        scheme = str(address).partition(":")[0]
        note = f"over {scheme} it must be asked for, with ?shm=/dev/shm/NAME"
    return Offer(kinds, prefix, note, semaphores() if kinds and address.carries_ring else "", new_token())


def agree(client: Offer, server: Offer, *, is_client: bool) -> Sharing:
    """What follows from both offers. `is_client`: ours is the client's."""
    own, peer = (client, server) if is_client else (server, client)
    for kind in client.kinds:
        if kind not in server.kinds:
            continue
        prefix = client.prefix or server.prefix
        if kind == _NAMED and (not prefix or (server.prefix and prefix != server.prefix)):
            continue
        factory = Memfd() if kind == _MEMFD else Named(prefix, own.token, peer.token)
        what = "memfd segments" if kind == _MEMFD else f"segments named {prefix}-..."
        if client.semaphores and client.semaphores == server.semaphores:
            return Sharing(factory, True, f"{what}, control in a ring")
        texts = " and ".join(offer.semaphores or "none that are known" for offer in (client, server))
        return Sharing(factory, False, f"{what}, control over the socket: semaphores are {texts}")
    if client.kinds and server.kinds:
        asked = [f"{' or '.join(offer.kinds)} {offer.prefix}".rstrip() for offer in (client, server)]
        notes = "".join(f": {offer.note}" for offer in (client, server) if offer.note)
        return Sharing(None, False, f"off: the client wants {asked[0]}, the server {asked[1]}{notes}")
    note = client.note or server.note or "a side has no shared memory"
    return Sharing(None, False, f"off: {note}")

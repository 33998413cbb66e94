"""Whether two sides share memory, and how: what each offers in its HELLO, and what follows from both.

Rules. Both sides come to the same result, since it is a function of the two offers alone. Whatever is not used has a
reason in words, for people to read; the reason for what is used, too.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass
from typing import Any

from ...errors import AddressError, RemoteProtocolError
from ..transport.address import SHM_AUTO, SHM_OFF, Address, TcpAddress, UnixAddress
from .ring import semaphores
from .segment import Memfd, Named, check_prefix, new_token, why_no_memfd

__all__ = ["Offer", "Sharing", "agree", "offer"]

_MEMFD, _NAMED = Memfd.kind, Named.kind


@dataclass(frozen=True)
class Offer:
    """What one side can do. `kinds`: of segments, the preferred one first. `note`: why there are none. `token`: of this
    side of this connection, new for each."""

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
    """What was agreed on. `factory`: None for no shared memory. `ring`: whether control goes through it, too."""

    factory: Memfd | Named | None
    ring: bool
    reason: str


def offer(address: Address, sock: socket.socket, *, is_client: bool) -> Offer:
    """What this side of a connection offers."""
    kinds: tuple[str, ...] = ()
    prefix = note = ""
    explicit = address.shm not in (SHM_AUTO, SHM_OFF)
    if address.shm == SHM_OFF:
        note = f"the {'client' if is_client else 'server'}'s URI says shm=off"
    elif isinstance(address, UnixAddress):
        no_memfd = why_no_memfd()
        kinds = (_NAMED,) if explicit or no_memfd else (_MEMFD, _NAMED)
        prefix = address.shm if explicit else ""
        note = no_memfd or ""
    elif not isinstance(address, TcpAddress) or not _is_loopback(sock):
        note = "the two sides may be on different hosts"
    elif explicit or not is_client:
        kinds, prefix = (_NAMED,), address.shm if explicit else ""
    else:
        note = "over tcp it must be asked for, with ?shm=/dev/shm/NAME"
    return Offer(kinds, prefix, note, semaphores() if kinds else "", new_token())


def agree(client: Offer, server: Offer, *, is_client: bool) -> Sharing:
    """What follows from both offers; `is_client` says which of them is ours."""
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


def _is_loopback(sock: socket.socket) -> bool:
    try:
        return ipaddress.ip_address(sock.getpeername()[0].partition("%")[0]).is_loopback
    except (OSError, ValueError):
        return False

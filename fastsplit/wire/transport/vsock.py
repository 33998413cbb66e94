"""`vsock://cid:port`: between a virtual machine and its host. A listener has the local cid, unless it is `insecure`."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import SplitResult

from ...errors import AddressError
from .scheme import SHM_AUTO, SocketAddress, is_u32, shm_query

__all__ = ["VsockAddress"]

_VMADDR_CID_LOCAL = 1


@dataclass(frozen=True)
class VsockAddress(SocketAddress):
    cid: int
    port: int
    shm: str = SHM_AUTO

    def __str__(self) -> str:
        return f"vsock://{self.cid}:{self.port}{shm_query(self.shm)}"

    @classmethod
    def parse(cls, uri: str, parts: SplitResult, shm: str) -> Self:
        if parts.path or "@" in parts.netloc:
            raise AddressError(f"address {uri!r}: expected vsock://host:port and nothing else")
        cid, _, port = parts.netloc.rpartition(":")
        if not (is_u32(cid) and is_u32(port)):
            raise AddressError(f"address {uri!r}: expected vsock://cid:port with two numbers of 32 bits")
        return cls(int(cid), int(port), shm)

    def _targets(self) -> list[tuple[int, Any]]:
        return [self._to_bind()]

    def _to_listen_on(self, insecure: bool) -> Self:
        if self.cid != _VMADDR_CID_LOCAL and not insecure:
            raise AddressError(
                f"{self}: refused to listen: links are not authenticated, so a vsock listener may only be local "
                f"(cid {_VMADDR_CID_LOCAL}), unless it is said to be insecure"
            )
        return self

    def _to_bind(self) -> tuple[int, Any]:
        if not hasattr(socket, "AF_VSOCK"):
            raise AddressError(f"{self}: this system has no vsock")
        return socket.AF_VSOCK, (self.cid, self.port)

    def _new_socket(self, family: int) -> socket.socket:
        try:
            return super()._new_socket(family)
        except OSError as error:
            raise AddressError(f"{self}: this system has no vsock: {error.strerror}") from None

    def _bound(self, sock: socket.socket) -> Self:
        cid, port = sock.getsockname()
        return type(self)(cid, port, self.shm)

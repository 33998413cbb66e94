"""torch.distributed with gloo, its sockets on the loopback interface: `send` and `recv` of tensors between two ranks.

Both ends receive into tensors that are there before, and ask for the next message (`irecv`) before they send their own:
gloo sends no tensor before the other end has said where it goes. One way that makes no difference. Only sleeping:
gloo's thread moves the bytes. Small messages are unsteady where the ends have no core for themselves.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from . import Bytes, Client, Peer, Run, bytes_of

__all__ = ["GlooClient", "GlooPeer"]

_PEER, _CLIENT = 0, 1
_Store: Any = dist.TCPStore  # type: ignore[attr-defined]
_INTERFACE = "GLOO_SOCKET_IFNAME"
_TIMEOUT = timedelta(minutes=2)  # of the rendezvous, and of each message


def _join(store: Any, rank: int) -> None:
    """Waits for the other end. The process has no other group of its own."""
    if dist.is_initialized():
        raise RuntimeError("this process is in a group of torch.distributed already")
    before = os.environ.get(_INTERFACE)
    os.environ[_INTERFACE] = "lo"
    try:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=_TIMEOUT)
    finally:
        if before is None:
            del os.environ[_INTERFACE]
        else:
            os.environ[_INTERFACE] = before


class GlooPeer(Peer):
    """The client joins the group before the first run; until then a thread waits for it."""

    def __init__(self, directory: Path, link: str) -> None:
        store = _Store("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=_TIMEOUT)
        self.address = str(store.port)
        self._joining = threading.Thread(target=_join, args=(store, _PEER), daemon=True)
        self._joining.start()
        self._buffers = (torch.zeros(0), torch.zeros(0))

    def prepare(self, run: Run) -> None:
        self._joining.join()
        if self._buffers[0].nbytes != run.nbytes:
            self._buffers = (torch.ones(run.nbytes // 4), torch.ones(run.nbytes // 4))

    def serve(self, run: Run) -> None:
        near, far = self._buffers
        coming = dist.irecv(near, _CLIENT) if run.count else None
        for left in range(run.count - 1, -1, -1):
            assert coming is not None
            coming.wait()
            coming = dist.irecv(far, _CLIENT) if left else None
            if run.mark:
                bytes_of(near)[:] += 1
            dist.send(near, _CLIENT)
            near, far = far, near

    def take(self, run: Run) -> None:
        buffer, _ = self._buffers
        for _ in range(run.count):
            dist.recv(buffer, _CLIENT)
            self.taken += 1
        self.last = buffer
        dist.send(torch.ones(1, dtype=torch.uint8), _CLIENT)

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


class GlooClient(Client):
    modes = ("sleeping",)
    copies = "0"
    safe = "partly: nothing says what comes"

    def __init__(self, address: str) -> None:
        _join(_Store("127.0.0.1", int(address), is_master=False, timeout=_TIMEOUT), _CLIENT)
        self._message = self._reply = torch.zeros(0)

    def prepare(self, nbytes: int) -> str:
        self._message, self._reply = torch.ones(nbytes // 4), torch.ones(nbytes // 4)
        return ""

    def trip(self, run: Run) -> Callable[[], object]:
        message, reply, send, irecv = self._message, self._reply, dist.send, dist.irecv

        def once() -> None:
            coming = irecv(reply, _PEER)
            send(message, _PEER)
            assert coming is not None
            coming.wait()

        return once

    def marked(self, run: Run, message: Bytes) -> Bytes:
        bytes_of(self._message)[:] = message
        self.trip(run)()
        return bytes_of(self._reply).copy()

    def push(self, run: Run, message: Bytes) -> None:
        tensor, answer = torch.from_numpy(message.view("float32")), torch.zeros(1, dtype=torch.uint8)
        for _ in range(run.count):
            dist.send(tensor, _PEER)
        dist.recv(answer, _PEER)

    def release(self, nbytes: int) -> None:
        self._message = self._reply = torch.zeros(0)

    def close(self) -> None:
        self.release(0)
        with suppress(RuntimeError):
            dist.destroy_process_group()

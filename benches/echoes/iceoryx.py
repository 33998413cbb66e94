"""iceoryx2's request-response: memory is loaned, and what is loaned is sent by reference, whatever its size.

At its best: one client, one server and one request at a time are all that the service has room for; requests and
responses are slices that are loaned uninitialized and sent as they are, and their loans are returned by hand, which is
sooner than by the collector. Received memory cannot be sent on, so that the response is a loan of its own: nobody
writes it, either ("Bare"), although an echo of the bytes would have to copy them. "Torch" adds what a caller of
fastsplit gets: a tensor over the request where it is made and where it arrives, and the same for the response; nothing
is copied there, either.

Spinning: `receive` until something is there. Sleeping: an event service each way; who sent notifies, who waits
is in its listener's `blocking_wait`. A WaitSet around the same listener was no faster.

All its files are in a directory of this benchmark's, and its names in /dev/shm begin with a prefix of this benchmark's,
so that what iceoryx2 leaves there (one name, or all if it is killed) can be removed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
from pathlib import Path
from typing import Any

import iceoryx2
import numpy as np

from . import Bytes, Client, Peer, Run

__all__ = ["BareClient", "BarePeer", "TorchClient", "TorchPeer"]

_MAX_NBYTES = 128 * 1024**2
_SHM = Path("/dev/shm")
_PREFIX = "fastsplit_bench_"


class _Ports:
    """A node with the service, and the two event services: "asked" and "answered"."""

    def __init__(self, root: str, prefix: str) -> None:
        iceoryx2.set_log_level(iceoryx2.LogLevel.Error)
        config = iceoryx2.config.default()
        config.global_cfg.root_path = iceoryx2.Path.new(root)
        config.global_cfg.prefix = iceoryx2.FileName.new(prefix)
        builder = iceoryx2.NodeBuilder.new().config(config)
        builder = builder.signal_handling_mode(iceoryx2.SignalHandlingMode.Disabled)
        self.node = builder.create(iceoryx2.ServiceType.Ipc)
        payload = iceoryx2.Slice[ctypes.c_uint8]  # with an alignment of 64, each byte would take 64 of address space
        service = self.node.service_builder(iceoryx2.ServiceName.new("echo")).request_response(payload, payload)
        service = service.max_nodes(2).max_clients(1).max_servers(1)
        service = service.max_active_requests_per_client(1).max_loaned_requests(1)
        service = service.max_response_buffer_size(1).max_borrowed_responses_per_pending_response(1)
        self.service = service.open_or_create()
        self.asked = self._event("asked")
        self.answered = self._event("answered")

    def _event(self, name: str) -> Any:
        return self.node.service_builder(iceoryx2.ServiceName.new(name)).event().max_nodes(2).open_or_create()


class BarePeer(Peer):
    def __init__(self, directory: Path) -> None:
        root, prefix = str(directory), f"{_PREFIX}{os.getpid()}_"
        for name in _SHM.glob(f"{_PREFIX}*"):
            pid = name.name.removeprefix(_PREFIX).partition("_")[0]
            if not Path("/proc", pid).exists():  # it was killed
                _remove(name)
        self.address = json.dumps([root, prefix])
        self._ports: _Ports | None = _Ports(root, prefix)
        builder = self._ports.service.server_builder().initial_max_slice_len(_MAX_NBYTES)
        self._server = builder.max_loaned_responses_per_request(1).create()
        self._listener = self._ports.asked.listener_builder().create()
        self._notifier = self._ports.answered.notifier_builder().create()

    def serve(self, run: Run) -> None:
        receive, wait, notify = self._server.receive, self._listener.blocking_wait, self._notifier.notify
        nbytes, spinning, view = run.nbytes, run.spinning, self._view
        for _ in range(run.count):
            while (request := receive()) is None:
                if not spinning:
                    wait()
            response = request.loan_slice_uninit(nbytes)
            if run.mark:
                _view(response, nbytes)[:] = _view(request, nbytes) + np.uint8(1)
            elif view is not None:
                view(request, nbytes)
                view(response, nbytes)
            response.assume_init().send()
            if not spinning:
                notify()
            request.delete()

    _view: Any = None

    def close(self) -> None:
        for port in (self._server, self._listener, self._notifier):
            port.delete()
        self._server = self._listener = self._notifier = self._ports = None


class BareClient(Client):
    def __init__(self, address: str) -> None:
        root, self._prefix = json.loads(address)
        self._ports: _Ports | None = _Ports(root, self._prefix)
        self._client = self._ports.service.client_builder().initial_max_slice_len(_MAX_NBYTES).create()
        self._listener = self._ports.answered.listener_builder().create()
        self._notifier = self._ports.asked.notifier_builder().create()
        self._message: Bytes | None = None
        self._reply: Bytes | None = None

    def prepare(self, nbytes: int) -> str:
        return ""

    def trips(self, run: Run) -> None:
        loan, wait, notify = self._client.loan_slice_uninit, self._listener.blocking_wait, self._notifier.notify
        nbytes, spinning, view = run.nbytes, run.spinning, self._view
        for _ in range(run.count):
            request = loan(nbytes)
            if run.mark:
                _view(request, nbytes)[:] = self._message
            elif view is not None:
                view(request, nbytes)
            pending = request.assume_init().send()
            if not spinning:
                notify()
            while (response := pending.receive()) is None:
                if not spinning:
                    wait()
            if run.mark:
                self._reply = _view(response, nbytes).copy()
            elif view is not None:
                view(response, nbytes)
            response.delete()
            pending.delete()

    _view: Any = None

    def marked(self, run: Run, message: Bytes) -> Bytes:
        self._message = message
        self.trips(run)
        assert self._reply is not None
        return self._reply

    def close(self) -> None:
        for port in (self._client, self._listener, self._notifier):
            port.delete()
        self._client = self._listener = self._notifier = self._ports = None
        for name in _SHM.glob(f"{self._prefix}*"):
            _remove(name)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _view(loan: Any, nbytes: int) -> Bytes:
    payload = loan.payload()
    if payload.len() != nbytes:
        raise ConnectionError(f"{payload.len()} bytes came, expected {nbytes}")
    return np.frombuffer(payload.as_memory_view(), np.uint8)


_array_types: dict[int, Any] = {}


def _torch_view(loan: Any, nbytes: int) -> Any:
    """A tensor over the payload. By way of its Slice it would take 2.0 instead of 0.9 us."""
    import torch

    array_type = _array_types.get(nbytes)
    if array_type is None:
        array_type = _array_types[nbytes] = ctypes.c_uint8 * nbytes
    return torch.from_numpy(np.frombuffer(array_type.from_address(loan.payload_ptr), np.float32))


class TorchPeer(BarePeer):
    def __init__(self, directory: Path) -> None:
        import torch  # noqa: F401 - now, rather than in the first round trip

        super().__init__(directory)

    _view = staticmethod(_torch_view)


class TorchClient(BareClient):
    _view = staticmethod(_torch_view)

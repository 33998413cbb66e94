"""iceoryx2: memory is loaned, and what is loaned is sent by reference, whatever its size.

Round trips by request-response at its best: the service has room for one client, one server and one request at a time;
requests and responses are slices that are loaned uninitialized, sent as they are, and returned by hand. Received memory
cannot be sent on, so the response is a loan of its own, which nobody writes ("Bare"), although an echo of the bytes
would copy them. "Torch" makes a tensor over request and response at both ends. One way by publish-subscribe without
loss: a publisher that finds the queue (8 messages, down to 2 large ones) full asks again and again. It loans a slice,
copies the message into it and sends it; the subscriber makes an array or tensor over it, and returns the one before.

Spinning: `receive` until something is there. Sleeping: an event service each way; the sender notifies a listener that
is in `blocking_wait`. All its files are in a directory, and its names in /dev/shm under a prefix, of this benchmark's.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import iceoryx2
import numpy as np

from . import Bytes, Client, Peer, Run

__all__ = ["BareClient", "BarePeer", "TorchClient", "TorchPeer"]

_MAX_NBYTES = 128 * 1024**2
_QUEUE = 8  # messages
_QUEUE_NBYTES = 16 * 1024**2
_SHM = Path("/dev/shm")
_PREFIX = "fastsplit_bench_"


def _queued(nbytes: int) -> int:
    """How many messages of a size may wait for the subscriber."""
    return min(max(_QUEUE_NBYTES // nbytes, 2), _QUEUE)


class _Ports:
    """A node with its services: the echo, what goes one way, and two of events, "asked" and "answered"."""

    def __init__(self, root: str, prefix: str) -> None:
        iceoryx2.set_log_level(iceoryx2.LogLevel.Error)
        config = iceoryx2.config.default()
        config.global_cfg.root_path = iceoryx2.Path.new(root)
        config.global_cfg.prefix = iceoryx2.FileName.new(prefix)
        builder = iceoryx2.NodeBuilder.new().config(config)
        builder = builder.signal_handling_mode(iceoryx2.SignalHandlingMode.Disabled)
        self.node = builder.create(iceoryx2.ServiceType.Ipc)
        payload = iceoryx2.Slice[ctypes.c_uint8]  # with an alignment of 64, each byte would take 64 of address space
        service = self._service("echo").request_response(payload, payload)
        service = service.max_nodes(2).max_clients(1).max_servers(1)
        service = service.max_active_requests_per_client(1).max_loaned_requests(1)
        service = service.max_response_buffer_size(1).max_borrowed_responses_per_pending_response(1)
        self.echo = service.open_or_create()
        stream = self._service("stream").publish_subscribe(payload)
        stream = stream.max_nodes(2).max_publishers(1).max_subscribers(1)
        stream = stream.history_size(0).enable_safe_overflow(False)
        self.stream = stream.subscriber_max_buffer_size(_QUEUE).subscriber_max_borrowed_samples(2).open_or_create()
        self.asked = self._service("asked").event().max_nodes(2).open_or_create()
        self.answered = self._service("answered").event().max_nodes(2).open_or_create()

    def _service(self, name: str) -> Any:
        return self.node.service_builder(iceoryx2.ServiceName.new(name))


class BarePeer(Peer):
    def __init__(self, directory: Path, link: str) -> None:
        root, prefix = str(directory), f"{_PREFIX}{os.getpid()}_"
        for name in _SHM.glob(f"{_PREFIX}*"):
            pid = name.name.removeprefix(_PREFIX).partition("_")[0]
            if not Path("/proc", pid).exists():  # it was killed
                _remove(name)
        self.address = json.dumps([root, prefix])
        self._ports: _Ports | None = _Ports(root, prefix)
        builder = self._ports.echo.server_builder().initial_max_slice_len(_MAX_NBYTES)
        self._server = builder.max_loaned_responses_per_request(1).create()
        self._listener = self._ports.asked.listener_builder().create()
        self._notifier = self._ports.answered.notifier_builder().create()
        self._subscriber: Any = None
        self._sample: Any = None
        self._nbytes = 0

    def prepare(self, run: Run) -> None:
        self._return_last()
        if run.one_way and self._nbytes != run.nbytes:
            assert self._ports is not None
            self._unsubscribe()
            self._subscriber = self._ports.stream.subscriber_builder().buffer_size(_queued(run.nbytes)).create()
            self._nbytes = run.nbytes

    def _return_last(self) -> None:
        self.last = None
        if self._sample is not None:
            self._sample.delete()
            self._sample = None

    def _unsubscribe(self) -> None:
        self._return_last()
        if self._subscriber is not None:
            self._subscriber.delete()
        self._subscriber, self._nbytes = None, 0

    def serve(self, run: Run) -> None:
        receive, wait, notify = self._server.receive, self._listener.blocking_wait, self._notifier.notify
        nbytes, spinning, view = run.nbytes, run.spinning, self._seen
        for _ in range(run.count):
            while (request := receive()) is None:
                if not spinning:
                    wait()
            response = request.loan_slice_uninit(nbytes)
            if run.mark:
                _array(response, nbytes)[:] = _checked(request, nbytes) + np.uint8(1)
            elif view is not None:
                view(request, nbytes)
                view(response, nbytes)
            response.assume_init().send()
            if not spinning:
                notify()
            request.delete()

    def take(self, run: Run) -> None:
        receive, nbytes, view = self._subscriber.receive, run.nbytes, self._view
        held = None
        for _ in range(run.count):
            while (sample := receive()) is None:
                pass
            self.last = view(sample, nbytes)
            self.taken += 1
            if held is not None:
                held.delete()
            held = sample
        self._sample = held
        if held is not None:
            _checked(held, nbytes)
        while (request := self._server.receive()) is None:
            pass
        request.loan_slice_uninit(1).assume_init().send()
        request.delete()

    @staticmethod
    def _view(loan: Any, nbytes: int) -> Any:
        """What a subscriber has of a message."""
        return _array(loan, nbytes)

    _seen: Any = None
    """What both ends make of each request and response."""

    def close(self) -> None:
        self._unsubscribe()
        for port in (self._server, self._listener, self._notifier):
            port.delete()
        self._server = self._listener = self._notifier = self._ports = None


class BareClient(Client):
    most_nbytes = _MAX_NBYTES
    copies = "0, and the peer fills its answer itself; 1 from ordinary memory into shared"
    writable = "no: received memory is mapped read-only"
    safe = "no: the peer may change what it has sent while it is read, and the queues"

    def __init__(self, address: str) -> None:
        root, self._prefix = json.loads(address)
        self._ports: _Ports | None = _Ports(root, self._prefix)
        self._client = self._ports.echo.client_builder().initial_max_slice_len(_MAX_NBYTES).create()
        self._listener = self._ports.answered.listener_builder().create()
        self._notifier = self._ports.asked.notifier_builder().create()
        self._publisher: Any = None

    def prepare(self, nbytes: int) -> str:
        assert self._ports is not None
        builder = self._ports.stream.publisher_builder().initial_max_slice_len(nbytes).max_loaned_samples(1)
        builder = builder.backpressure_strategy(iceoryx2.BackpressureStrategy.RetryUntilDelivered)
        self._publisher = builder.create()
        return ""

    def trip(self, run: Run) -> Callable[[], object]:
        loan, wait, notify = self._client.loan_slice_uninit, self._listener.blocking_wait, self._notifier.notify
        nbytes, spinning, view = run.nbytes, run.spinning, self._seen

        def once() -> None:
            request = loan(nbytes)
            if view is not None:
                view(request, nbytes)
            pending = request.assume_init().send()
            if not spinning:
                notify()
            while (response := pending.receive()) is None:
                if not spinning:
                    wait()
            if view is not None:
                view(response, nbytes)
            response.delete()
            pending.delete()

        return once

    _seen: Any = None

    def marked(self, run: Run, message: Bytes) -> Bytes:
        request = self._client.loan_slice_uninit(run.nbytes)
        _array(request, run.nbytes)[:] = message
        pending = request.assume_init().send()
        if not run.spinning:
            self._notifier.notify()
        while (response := pending.receive()) is None:
            if not run.spinning:
                self._listener.blocking_wait()
        reply = _checked(response, run.nbytes).copy()
        response.delete()
        pending.delete()
        return reply

    def push(self, run: Run, message: Bytes) -> None:
        loan, nbytes, source, memmove = (
            self._publisher.loan_slice_uninit,
            run.nbytes,
            message.ctypes.data,
            ctypes.memmove,
        )
        for _ in range(run.count):
            sample = loan(nbytes)
            memmove(sample.payload_ptr, source, nbytes)
            sample.assume_init().send()
        pending = self._client.loan_slice_uninit(1).assume_init().send()
        while (response := pending.receive()) is None:
            pass
        response.delete()
        pending.delete()

    def release(self, nbytes: int) -> None:
        self._publisher.delete()
        self._publisher = None

    def close(self) -> None:
        for port in (self._client, self._listener, self._notifier, self._publisher):
            if port is not None:
                port.delete()
        self._client = self._listener = self._notifier = self._publisher = self._ports = None
        for name in _SHM.glob(f"{self._prefix}*"):
            _remove(name)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _checked(loan: Any, nbytes: int) -> Bytes:
    payload = loan.payload()
    if payload.len() != nbytes:
        raise ConnectionError(f"{payload.len()} bytes came, expected {nbytes}")
    return np.frombuffer(payload.as_memory_view(), np.uint8)


_array_types: dict[int, Any] = {}


def _array(loan: Any, nbytes: int, dtype: Any = np.uint8) -> Any:
    """An array over the payload. By way of its Slice it would take twice as long."""
    array_type = _array_types.get(nbytes)
    if array_type is None:
        array_type = _array_types[nbytes] = ctypes.c_uint8 * nbytes
    memory: Any = array_type.from_address(loan.payload_ptr)
    return np.frombuffer(memory, dtype)


def _tensor(loan: Any, nbytes: int) -> Any:
    import torch

    return torch.from_numpy(_array(loan, nbytes, np.float32))


class TorchPeer(BarePeer):
    def __init__(self, directory: Path, link: str) -> None:
        import torch  # noqa: F401 - now, rather than in the first round trip

        super().__init__(directory, link)

    _view = staticmethod(_tensor)
    _seen = staticmethod(_tensor)


class TorchClient(BareClient):
    _seen = staticmethod(_tensor)

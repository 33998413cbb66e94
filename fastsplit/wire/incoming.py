"""Memory for the tensors of incoming messages: where a payload is read into, and leases on what is in shared memory.

Rules. Memory is asked for only after the header, the metadata and the session's state were checked against each other.
A message that there is no memory for gets a `refusal` in the place of its buffers; its payload is read into scratch
memory and dropped. A tensor that comes coded (schema/coding.py) is read into memory of its own and decoded when the
frame is complete. A tensor in shared memory that is dropped is resolved first: the death of that lease returns it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from ..errors import ArenaFull, RemoteProtocolError, ResourceError, fresh
from ..schema.descriptor import Message, TensorDesc
from ..schema.header import Header

__all__ = ["Codings", "IncomingTensors", "Payload", "Shared", "inline_targets"]

_SCRATCH_NBYTES = 1024**2
_SEGMENT_BITS = 2**32 - 1


class Shared(Protocol):
    """What a session needs of an arena."""

    returns: deque[tuple[int, int]]

    def take_returns(self, at_most: int) -> list[int]: ...
    def requeue_returns(self, taken: Sequence[int]) -> None: ...
    def attach(self, segment_id: int, nbytes: int, name: str) -> None: ...
    def retire(self, segment_id: int) -> None: ...
    def resolve(self, segment_id: int, offset: int, desc: TensorDesc) -> Any: ...
    def returned(self, returns: Sequence[int]) -> None: ...


class Codings(Protocol):
    """What a session needs to know of codings."""

    accepted: frozenset[int]

    def decode(self, coding: int, data: Any, desc: TensorDesc) -> Any:
        """The memory of a tensor whose coded bytes are in `data`. Raises RemoteProtocolError, ArenaFull."""


class Payload:
    """A frame whose payload is still arriving, and the memory that it is read into."""

    __slots__ = ("at", "buffers", "header", "index", "message", "refusal", "targets")

    def __init__(
        self,
        header: Header,
        message: Message,
        buffers: list[Any],
        targets: list[memoryview],
        refusal: ResourceError | None = None,
    ) -> None:
        self.header = header
        self.message = message
        self.buffers = buffers
        self.refusal = refusal
        self.targets = targets  # memory to fill, in the order of the payload
        self.index = self.at = 0  # the first target that is not full, and the bytes that it has

    @property
    def is_whole(self) -> bool:
        return self.index == len(self.targets)

    def remaining(self) -> list[memoryview]:
        """The memory that is still to be filled, in order."""
        targets = self.targets[self.index :]
        if self.at:
            targets[0] = targets[0][self.at :]
        return targets

    def after(self, nbytes: int) -> tuple[int, int]:
        """`index` and `at` when `nbytes` more bytes are in."""
        index, at, targets = self.index, self.at + nbytes, self.targets
        while index < len(targets) and at >= len(targets[index]):
            at -= len(targets[index])
            index += 1
        return index, at

    def fill(self, staged: memoryview) -> int:
        """Copies the part of the payload that was read with the frame's head. Returns its bytes."""
        taken = 0
        for target in self.targets:
            part = min(len(target), len(staged) - taken)
            target[:part] = staged[taken : taken + part]
            taken += part
        self.index, self.at = self.after(taken)
        return taken

    def drop(self) -> None:
        """Lets all memory go. In place: the frames of an error that a read raised hold these very lists."""
        self.targets.clear()
        self.buffers.clear()
        self.index = self.at = 0


class IncomingTensors:
    """Memory of one session. `allocate(nbytes)`: writable memory for one tensor, a flat uint8 array."""

    __slots__ = ("_codings", "_scratch", "allocate", "shared")

    def __init__(self, allocate: Callable[[int], Any], codings: Codings | None) -> None:
        self.allocate = allocate
        self.shared: Shared | None = None
        """The arena, once both sides have agreed on one."""
        self._codings = codings
        self._scratch: memoryview | None = None

    def take(self, message: Message) -> list[Any]:
        """The buffers of a message without a payload: leases, and memory of no bytes. Takes note of its returns."""
        shared, placements = self.shared, message.placements
        buffers: list[Any] = []
        if shared is not None and placements:
            at = 0
            for desc in message.tensors:
                segment = placements[at]
                buffers.append(
                    shared.resolve(segment, placements[at + 1], desc) if segment else self.allocate(desc.nbytes)
                )
                at += 3
        elif message.tensors:
            buffers = self.make_room(message)
        if message.returns:
            self.take_returns(message)
        return buffers

    def take_returns(self, message: Message) -> None:
        """Takes note of the returns that a message brings."""
        if self.shared is None:
            raise RemoteProtocolError("returns: expected none, since no shared memory was agreed on")
        self.shared.returned(message.returns)

    def make_room(self, message: Message) -> list[Any]:
        """Memory for each tensor: fresh memory for those in the payload, leases on those in shared memory.

        Raises MemoryError, before any lease.
        """
        placements = message.placements
        if not placements:
            return [self.allocate(desc.nbytes) for desc in message.tensors]
        # The bytes that the payload has: fewer than the tensor's, if it is coded.
        buffers = [
            None if placements[at] & _SEGMENT_BITS else self.allocate(placements[at + 2])
            for at in range(0, len(placements), 3)
        ]
        for index, lease in self._leases(message):
            buffers[index] = lease
        return buffers

    def open_payload(self, header: Header, message: Message, wanted: bool) -> Payload:
        """A place for a payload that is still to come: scratch memory if it is not wanted, or does not fit."""
        refusal = None
        if wanted:
            try:
                buffers = self.make_room(message)
            except MemoryError as error:
                refusal = _no_memory(error)
            else:
                return Payload(header, message, buffers, inline_targets(message, buffers))
        self.drop(message)
        return Payload(header, message, [], self._scratch_targets(header[4]), refusal)

    def drop(self, message: Message) -> None:
        """Returns the tensors in shared memory of a message that is dropped: takes leases, which die at once."""
        if message.placements:
            for _ in self._leases(message):
                pass

    def decoded(
        self, message: Message, buffers: list[Any], refusal: ResourceError | None = None
    ) -> tuple[list[Any], ResourceError | None]:
        """The tensors' memory after decoding; no buffers, and the refusal, if there is no memory for it."""
        if not buffers or not message.placements:
            return buffers, refusal
        try:
            return self._decode(message, buffers), refusal
        except MemoryError as error:
            return [], _no_memory(error)

    def close(self) -> None:
        """Lets the scratch memory go."""
        self._scratch = None

    def _decode(self, message: Message, buffers: list[Any]) -> list[Any]:
        codings = self._codings
        decoded = buffers.copy()
        for index, segment in enumerate(message.placements[::3]):
            if segment > _SEGMENT_BITS:
                assert codings is not None  # else the decoder had accepted no coding
                decoded[index] = codings.decode(segment >> 32, buffers[index], message.tensors[index])
        return decoded

    def _leases(self, message: Message) -> Iterator[tuple[int, Any]]:
        """The tensors of a message that are in shared memory: index, and a lease."""
        placements = message.placements
        for index, desc in enumerate(message.tensors):
            segment = placements[3 * index]
            if segment & _SEGMENT_BITS:
                if self.shared is None:
                    raise RemoteProtocolError(
                        "placement: in shared memory, expected in the payload: none was agreed on"
                    )
                yield index, self.shared.resolve(segment, placements[3 * index + 1], desc)

    def _scratch_targets(self, nbytes: int) -> list[memoryview]:
        """Targets for bytes that are dropped: the same megabyte over and over."""
        if not nbytes:
            return []
        if self._scratch is None:
            self._scratch = memoryview(bytearray(_SCRATCH_NBYTES))
        whole, rest = divmod(nbytes, _SCRATCH_NBYTES)
        return [self._scratch] * whole + ([self._scratch[:rest]] if rest else [])


def inline_targets(message: Message, buffers: Sequence[Any]) -> list[memoryview]:
    """The buffers that the payload's bytes belong in, in order, without those of no bytes."""
    placements = message.placements
    return [
        memoryview(buffer)
        for index, buffer in enumerate(buffers)
        if not (placements and placements[3 * index] & _SEGMENT_BITS) and len(buffer)
    ]


def _no_memory(error: MemoryError) -> ResourceError:
    """The refusal of a message that there is no memory for."""
    return fresh(error) if isinstance(error, ArenaFull) else ArenaFull(f"no memory for a tensor: {error}")

"""The outgoing side of a session: makes the frames that one end sends.

Rules. Each method that makes a frame returns the bytes of its head; the tensors' bytes, if any, follow it through the
stream. The sender's lock covers all of it. Errors of our own (LimitError, SettingError, LocalProtocolError) are raised
before anything changes. Returns of shared memory ride on every frame, MAX_RETURNS at most; those of the last frame are
in `returns`, so that `discard_last` can queue them again. The table of open requests is shared with the incoming side:
each operation on it is atomic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..errors import ConnectError, FastsplitError, LimitError, LocalProtocolError, ResourceError
from ..schema.descriptor import Attrs, AttrValue
from ..schema.dtypes import BY_NAME
from ..schema.header import HEADER_NBYTES, VERSION, Kind, pack_header
from ..schema.limits import MAX_DIMS, Limits
from ..tensors import Desc
from .backend import Encoder
from .incoming import Shared
from .rules import BROKEN, REFUSED, SHORTAGE

__all__ = ["MAX_RETURNS", "NO_REQUEST", "Expected", "Frames"]

MAX_RETURNS = 32
"""Returns that ride on another frame; if more are waiting, they get a frame of their own."""
_MAX_RETURNS_ALONE = 48  # in a frame of their own: it fits a ring's slot, so that it is sent whole or not at all
_MAX_TEXT_NBYTES = 3500  # of an ERROR or ABORT: with the rest of the frame it fits the smallest metadata cap
_SOFTWARE = "fastsplit"
_UINT8 = BY_NAME["uint8"].code
_REQUEST, _REPLY = int(Kind.REQUEST), int(Kind.REPLY)  # an int of an enum costs more than the rest of a check
NO_REQUEST: Any = object()
"""What the table of requests gives for an id that it does not have."""

Expected = Sequence[Desc] | None


class Frames:
    """Makes one end's frames. `offer`: attributes for the HELLO, beside the limits and the capabilities."""

    def __init__(self, *, limits: Limits, capabilities: int, offer: Mapping[str, AttrValue]) -> None:
        self.limits = limits
        self.peer_limits: Limits | None = None
        """Set by the peer's HELLO."""
        self.capabilities = capabilities
        """Ours, and once the peer's HELLO is in, those of both sides."""
        self.shared: Shared | None = None
        """The arena, if memory is shared."""
        self.returns: list[int] = []
        """Returns that went with the last frame: segment and offset, flat."""
        self.may_request = False
        self.encoder = Encoder(Limits(), HEADER_NBYTES)
        self.requests: dict[int, Expected] = {}
        """Client: the requests without an answer, and what each answer must hold."""
        self.unwanted: set[int] = set()
        """Client: those of them that were cancelled."""
        self.next_id = 1
        """Client: of the next request."""
        self._offer = dict(offer)

    # ---- calls ----

    @property
    def inflight(self) -> int:
        """Client: requests without an answer."""
        return len(self.requests)

    def request(
        self,
        op: str,
        tensors: Sequence[Desc],
        attrs: Attrs,
        nbytes: int,
        time_ns: int = 0,
        expect: Expected = None,
        placements: Sequence[int] = (),
        flags: int = 0,
    ) -> tuple[int, bytearray]:
        """A request's id and head.

        `nbytes`: of the payload that follows. `time_ns`: left to its deadline, 0 for none. `expect`: what its reply
        must hold, checked before memory is allocated for that. `placements`: see Encoder.encode. `flags`:
        schema.header.reply_flags, 0 where codings were not agreed on.

        Raises LimitError over a cap of the peer's, SettingError for an op or an attribute that cannot be sent,
        LocalProtocolError if the session is not open.
        """
        if not self.may_request or self.peer_limits is None:
            raise LocalProtocolError(f"{op!r}: a request before the handshake or after the end")
        if len(self.requests) >= self.peer_limits.max_inflight:
            raise LimitError(
                f"{op!r}: {len(self.requests)} requests in flight, the peer accepts {self.peer_limits.max_inflight}"
            )
        request_id = self.next_id
        frame = self._frame(_REQUEST, request_id, op, tensors, attrs, nbytes, time_ns, placements, flags=flags)
        self.next_id = request_id + 1
        self.requests[request_id] = expect
        return request_id, frame

    def mark_cancelled(self, request_id: int) -> bool:
        """Marks a request whose answer will be read and dropped. False if it was answered already."""
        self.unwanted.add(request_id)  # first: the reader may be taking the answer in at this moment
        if request_id in self.requests:
            return True
        self.unwanted.discard(request_id)
        return False

    def forget(self, request_id: int) -> None:
        """Client: a request was answered."""
        self.requests.pop(request_id, None)
        self.unwanted.discard(request_id)

    def discard(self, request_id: int) -> None:
        """Forgets the last request if it has this id: no byte of it was sent."""
        if self.requests.pop(request_id, NO_REQUEST) is not NO_REQUEST:
            self.unwanted.discard(request_id)
            self.discard_last()

    def discard_last(self) -> None:
        """Queues the returns of the last frame again: it was not sent."""
        if self.shared is not None and self.returns:
            self.shared.requeue_returns(self.returns)
        self.returns = []

    def cancel(self, request_id: int) -> bytearray:
        """Tells the server that the answer to a request will be dropped."""
        return self._frame(Kind.CANCEL, request_id, "", (), {})

    def reply(
        self,
        request_id: int,
        tensors: Sequence[Desc],
        nbytes: int,
        time_ns: int,
        attrs: Attrs | None = None,
        placements: Sequence[int] = (),
    ) -> bytearray:
        """A reply's head. `time_ns`: that the handler took.

        Raises LimitError over a cap of the peer's, SettingError for an attribute that cannot be sent.
        """
        return self._frame(_REPLY, request_id, "", tensors, attrs or {}, nbytes, time_ns, placements)

    def error(self, request_id: int, code: str, text: str) -> bytearray:
        """The answer to a request that failed. `code`: failed, unknown-op, deadline or cancelled."""
        return self._frame(Kind.ERROR, request_id, "", (), {"code": code, "text": _sendable(text)})

    # ---- the connection ----

    def hello(self) -> bytearray:
        """The handshake: the first frame of either side."""
        attrs: dict[str, Any] = {"software": _SOFTWARE, "version": VERSION, "capabilities": self.capabilities}
        attrs |= asdict(self.limits) | {"max_dims": min(self.limits.max_dims, MAX_DIMS)} | self._offer
        return self._frame(Kind.HELLO, 0, "hello", (), attrs)

    def probe(self, number: int, padding_nbytes: int, wanted: int, bytes_per_s: float, rtt_s: float) -> bytearray:
        """Client: asks the server to answer at once, with `wanted` bytes of padding. `padding_nbytes` follow here."""
        return self._probe(number, 0, padding_nbytes, wanted, bytes_per_s, int(rtt_s * 1e9))

    def probe_answer(self, number: int, padding_nbytes: int, bytes_per_s: float) -> bytearray:
        """Server: the answer to a probe, with `padding_nbytes` that follow."""
        return self._probe(number, 1, padding_nbytes, 0, bytes_per_s, 0)

    def _probe(self, number: int, answer: int, nbytes: int, wanted: int, bytes_per_s: float, rtt_ns: int) -> bytearray:
        attrs = {"answer": answer, "wanted": wanted, "bytes_per_s": bytes_per_s}
        return self._frame(Kind.PROBE, number, "", [(_UINT8, (nbytes,))] if nbytes else (), attrs, nbytes, rtt_ns)

    def goodbye(self) -> bytearray:
        """The last frame of this side. There are no requests after it."""
        self.may_request = False
        return self._frame(Kind.GOODBYE, 0, "", (), {})

    def abort(self, error: FastsplitError | str) -> bytearray:
        """The last frame of this side if it cannot go on: how the peer broke the protocol, what this side has run out
        of (ResourceError), or, as a server's first frame, why it refuses the client (ConnectError)."""
        self.may_request = False
        code = BROKEN
        if isinstance(error, ResourceError):
            code = SHORTAGE
        elif isinstance(error, ConnectError):
            code = REFUSED
        return self._frame(Kind.ABORT, 0, "", (), {"text": _sendable(str(error)), "code": code})

    # ---- shared memory ----

    def segment(self, segment_id: int, nbytes: int, name: str) -> bytearray:
        """Announces a segment of ours; id 0 is the ring."""
        return self._frame(Kind.SEGMENT, 0, "", (), {"id": segment_id, "nbytes": nbytes, "name": name})

    def attached(self, text: str) -> bytearray:
        """Server: the answer to the ring. `text`: why it could not be mapped, empty if it was."""
        return self._frame(Kind.ATTACHED, 0, "", (), {"text": _sendable(text)})

    def retire(self, segment_id: int) -> bytearray:
        """Tells the peer to unmap a segment of ours."""
        return self._frame(Kind.RETIRE, 0, "", (), {"id": segment_id})

    def return_frame(self, max_waiting: int = MAX_RETURNS) -> bytearray | None:
        """Returns in a frame of their own; None if no more than `max_waiting` are left to ride on another one."""
        shared = self.shared
        if shared is None or len(shared.returns) <= max_waiting:
            return None
        return self._frame(Kind.RETURN, 0, "", (), {"wanted": 0}, max_returns=_MAX_RETURNS_ALONE)

    def want_returns(self) -> bytearray:
        """Asks the peer for its returns."""
        return self._frame(Kind.RETURN, 0, "", (), {"wanted": 1})

    # ---- every frame ----

    def _frame(
        self,
        kind: int,
        request_id: int,
        op: str,
        tensors: Sequence[Desc],
        attrs: Attrs,
        nbytes: int = 0,
        time_ns: int = 0,
        placements: Sequence[int] = (),
        max_returns: int = MAX_RETURNS,
        flags: int = 0,
    ) -> bytearray:
        shared = self.shared
        if shared is None or not shared.returns:
            if self.returns:
                self.returns = []
            frame, varying_nbytes = self.encoder.encode(op, tensors, attrs, placements)
        else:
            returns = self.returns = shared.take_returns(max_returns)
            try:
                frame, varying_nbytes = self.encoder.encode(op, tensors, attrs, placements, returns)
            except LimitError:  # perhaps it fits without them
                self.discard_last()
                frame, varying_nbytes = self.encoder.encode(op, tensors, attrs, placements)
            except BaseException:
                self.discard_last()
                raise
        pack_header(frame, kind, request_id, varying_nbytes, nbytes, time_ns, flags)
        return frame


def _sendable(text: str) -> str:
    """A text of ours without what is not Unicode, and short enough: it always encodes and always fits."""
    return text.encode(errors="replace")[:_MAX_TEXT_NBYTES].decode(errors="ignore")

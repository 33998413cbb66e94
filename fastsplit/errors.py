"""Every error that fastsplit raises on purpose, in one tree.

    FastsplitError
    ├── AddressError (ValueError)            a URI that cannot be used, or must not be listened on
    ├── SettingError (ValueError)            an argument or environment variable that cannot be used
    ├── TensorError (TypeError)              a value that has no tensor description: its dtype, its device, its layout
    ├── LimitError (ValueError)              we were asked to send more than a cap allows; nothing was sent
    ├── ArenaFull (MemoryError)              no room in shared memory: a limit, the system's memory, or a deadline
    ├── ConnectError (ConnectionError)       nobody there
    ├── PeerLostError (ConnectionError)      the peer went away; what was in flight has no answer
    ├── ClosedError                          used after close(), or after an error that ended the connection
    ├── DeadlineError (TimeoutError)         a deadline passed: a call's, or that of connecting
    ├── CancelledError                       the call was cancelled before its reply came
    ├── ProtocolError
    │   ├── LocalProtocolError               we broke the protocol, or were about to: a bug on this side
    │   └── RemoteProtocolError              the peer broke it: the connection is dead
    ├── RemoteOpError                        the peer's handler failed; the connection lives on
    ├── ModelError                           a model that is not there, cannot be read, or is not supported
    └── VerificationError                    the peer's model is not the one that the trusted copy describes

Rules: whose fault it was can be read off the class. A message names the field, what came, and what was expected. Parts
of it may be a peer's words, so `str` of each is one line of printable characters; `args` has it as it came.
Every class says with which code the scripts exit (`exit_code`), so that the mapping stands in one place.
"""

from __future__ import annotations

from typing import ClassVar

from .printable import one_line

__all__ = [
    "AddressError",
    "ArenaFull",
    "CancelledError",
    "ClosedError",
    "ConnectError",
    "DeadlineError",
    "FastsplitError",
    "LimitError",
    "LocalProtocolError",
    "ModelError",
    "PeerLostError",
    "ProtocolError",
    "RemoteOpError",
    "RemoteProtocolError",
    "SettingError",
    "TensorError",
    "VerificationError",
]


class FastsplitError(Exception):
    """The root of the tree: catch it to catch all that fastsplit raises on purpose."""

    exit_code: ClassVar[int] = 1

    def __str__(self) -> str:
        return one_line(super().__str__(), limit=None)


class AddressError(FastsplitError, ValueError):
    """A URI that is malformed, or an address that must not be listened on."""

    exit_code = 2


class SettingError(FastsplitError, ValueError):
    """An argument or an environment variable that cannot be used."""

    exit_code = 2


class TensorError(FastsplitError, TypeError):
    """A value that cannot be described as a tensor on the wire."""


class LimitError(FastsplitError, ValueError):
    """A message of ours is over a cap. Raised before anything is sent; the connection lives on."""


class ArenaFull(FastsplitError, MemoryError):
    """Shared memory has no room: over its limit, the system has none, or nothing was given back within the deadline."""


class ConnectError(FastsplitError, ConnectionError):
    """No connection could be made: nobody listens there. (Nobody in time is a DeadlineError.)"""

    exit_code = 3


class PeerLostError(FastsplitError, ConnectionError):
    """The peer went away, or its stream ended in the middle of a frame."""

    exit_code = 3


class ClosedError(FastsplitError):
    """The channel or server was closed on this side, or an earlier error ended it."""

    exit_code = 3


class DeadlineError(FastsplitError, TimeoutError):
    """A deadline passed. The message says which, and how long it was."""

    exit_code = 3


class CancelledError(FastsplitError):
    """The call was cancelled on this side before its reply came."""


class ProtocolError(FastsplitError):
    """The wire protocol was broken, by whichever side."""

    exit_code = 4


class LocalProtocolError(ProtocolError):
    """This side broke the protocol or was about to: a bug here, never the peer's doing."""


class RemoteProtocolError(ProtocolError):
    """The peer broke the protocol, or says that we did. The connection is dead."""


class RemoteOpError(FastsplitError):
    """The peer's handler failed. The connection lives on.

    `op` is the operation's name, `message` what the peer said: `KeyError: 'x'`, for example. That is the peer's text as
    it came; to show it, print the error.
    """

    def __init__(self, op: str, message: str) -> None:
        super().__init__(op, message)
        self.op = op
        self.message = message

    def __str__(self) -> str:
        return one_line(f"{self.op}: {self.message}", limit=None)


class ModelError(FastsplitError):
    """A model directory or preset that is missing, unreadable, inconsistent, or of an unsupported kind."""


class VerificationError(FastsplitError):
    """What the peer says of its model differs from the trusted copy."""

    exit_code = 5

"""Every error that fastsplit raises on purpose, in one tree.

    FastsplitError
    ├── AddressError (ValueError)            a URI that cannot be used, or must not be listened on
    ├── SettingError (ValueError)            an argument, attribute or environment variable that cannot be used
    ├── TensorError (TypeError)              what cannot be sent as a tensor: type, dtype, device, layout, storage
    ├── LimitError (ValueError)              we were asked to send more than a cap allows; nothing was sent
    ├── ResourceError                        no descriptor, memory or thread is left here: never the peer's fault
    │   └── ArenaFull (MemoryError)          no room for a tensor: a limit, the system's memory, or a deadline
    ├── ListenError (OSError)                an address is in use or not permitted, or its directory is missing
    ├── ConnectError (ConnectionError)       nobody there, or the server accepts no more connections
    ├── PeerLostError (ConnectionError)      the peer went away; what was in flight has no answer
    ├── ClosedError                          used after close(), or after an error that ended the connection
    ├── DeadlineError (TimeoutError)         a deadline passed: a call's, or that of connecting
    ├── CancelledError                       cancelled before its reply came (also concurrent.futures' CancelledError)
    ├── ReentrantCallError (RuntimeError)    a call in the middle of another one of the same thread, on the same channel
    ├── ProtocolError
    │   ├── LocalProtocolError               we broke the protocol, or were about to: a bug on this side
    │   └── RemoteProtocolError              the peer broke it: the connection is dead
    ├── RemoteOpError                        the peer's handler failed; the connection lives on
    ├── ModelError                           a model that is not there, cannot be read, or is not supported
    ├── MissingExtraError (ModuleNotFoundError)  a package of an extra is not installed here
    └── VerificationError                    the peer's model is not the one that the trusted copy describes

Rules: whose fault it was can be read off the class. A message names the field, what came, and what was expected. Parts
of it may be a peer's words, so `str` of each is one line of printable characters; `args` has it as it came.
An argument that cannot be used is one of these, too. A call that does not fit a signature (an unknown keyword, an
argument too many) is Python's own TypeError, and SplitModelForCausalLM raises TypeError and NotImplementedError for
what a split model cannot do, as transformers does.
Every class says with which code the scripts exit (`exit_code`), so that the mapping stands in one place.
"""

from __future__ import annotations

import concurrent.futures
import copy
from typing import ClassVar, TypeVar

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
    "ListenError",
    "LocalProtocolError",
    "MissingExtraError",
    "ModelError",
    "PeerLostError",
    "ProtocolError",
    "ReentrantCallError",
    "RemoteOpError",
    "RemoteProtocolError",
    "ResourceError",
    "SettingError",
    "TensorError",
    "VerificationError",
    "fresh",
    "shown",
]

_MAX_SHOWN = 200


def shown(value: object) -> str:
    """What came, for a message: its repr in one line, shortened; its type where that fails (an int of 5000 digits)."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # noqa: BLE001 (whatever it raises, the message that is being made is the one that helps)
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


class FastsplitError(Exception):
    """The root of the tree: catch it to catch all that fastsplit raises on purpose."""

    exit_code: ClassVar[int] = 1

    def __str__(self) -> str:
        return one_line(super().__str__(), limit=None)


class AddressError(FastsplitError, ValueError):
    """A URI that is malformed, or an address that must not be listened on."""

    exit_code = 2


class SettingError(FastsplitError, ValueError):
    """An argument, an attribute of a message or an environment variable that cannot be used."""

    exit_code = 2


class TensorError(FastsplitError, TypeError):
    """A value that cannot be sent as a tensor, because of its type, dtype, shape, device, layout or storage."""


class LimitError(FastsplitError, ValueError):
    """A message of ours is over a cap. Raised before anything is sent; the connection lives on."""


class ResourceError(FastsplitError):
    """This process or system has no descriptor, memory or thread left. The message names the limit and its value.

    A connection that this ends tells the peer, which gets a PeerLostError with the same text.
    """


class ArenaFull(ResourceError, MemoryError):
    """There is no room for a tensor. Shared memory: over its limit, the system has none, or nothing was given back
    within the deadline. Private memory: the system has none."""

    def __init__(self, *args: object, may_wait: bool = False) -> None:
        """`may_wait`: whether room may come back, since what is in use may be returned."""
        super().__init__(*args)
        self.may_wait = may_wait


class ListenError(FastsplitError, OSError):
    """An address cannot be listened on: it is in use or not permitted, or its directory is missing; `errno` says which.
    (A listener that others could reach without `insecure` is an AddressError.)"""

    def __str__(self) -> str:
        return super().__str__() if self.strerror is None else one_line(self.strerror, limit=None)


class ConnectError(FastsplitError, ConnectionError):
    """No connection could be made: no server listens there, or the server accepts no more. (No answer in time is a
    DeadlineError.)"""

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


class CancelledError(FastsplitError, concurrent.futures.CancelledError):
    """The call was cancelled on this side before its reply came."""


class ReentrantCallError(FastsplitError, RuntimeError):
    """A finalizer or a signal's handler, run in the middle of a call, used the channel of that very call.

    It would have to wait for itself. Nothing was sent; do it later: note what is to be done, and do it after a call."""


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


class MissingExtraError(FastsplitError, ModuleNotFoundError):
    """A package of an extra of fastsplit is not installed: `name`. The message gives the command that installs it."""


class VerificationError(FastsplitError):
    """What the peer says of its model differs from the trusted copy."""

    exit_code = 5


_Error = TypeVar("_Error", bound=BaseException)


def fresh(error: _Error) -> _Error:
    """A copy of an error without its traceback and context, to be stored, or to be raised once more.

    A traceback keeps the frames that the error passed through, and with them tensors and connections; for ever, until
    the cyclic collector comes, if one of these frames keeps the error.
    """
    return copy.copy(error)

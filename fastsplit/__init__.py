"""fastsplit: tensor RPC without copies, and a TEE + GPU split of Llama-family models on top of it.

    def scale(call):
        (x,) = call.tensors
        x *= call.attrs["by"]
        return x

    server = fastsplit.Server("unix:///tmp/demo.sock", {"scale": scale})
    with server, fastsplit.connect("unix:///tmp/demo.sock") as channel:
        (y,) = channel.call("scale", x, by=2.0)

`fastsplit.aio` is the same for asyncio: `async with fastsplit.aio.connect(uri) as channel: await channel.call(...)`.

Importing this needs numpy and flatbuffers alone; torch is used where it is installed. `SplitModelForCausalLM` is here,
too, and needs torch and transformers: without them importing it raises MissingExtraError.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import (
    AddressError,
    ArenaFull,
    CancelledError,
    ClosedError,
    ConnectError,
    DeadlineError,
    FastsplitError,
    LimitError,
    ListenError,
    LocalProtocolError,
    MissingExtraError,
    ModelError,
    PeerLostError,
    ProtocolError,
    ReentrantCallError,
    RemoteOpError,
    RemoteProtocolError,
    ResourceError,
    SettingError,
    TensorError,
    VerificationError,
)
from .schema.limits import Limits
from .wire.backend import native
from .wire.blocking.channel import Channel
from .wire.blocking.future import Future
from .wire.blocking.server import Server
from .wire.call import Call, Client, Handler
from .wire.result import Result
from .wire.stats import Stats

__all__ = [
    "AddressError",
    "ArenaFull",
    "Call",
    "CancelledError",
    "Channel",
    "Client",
    "ClosedError",
    "ConnectError",
    "DeadlineError",
    "FastsplitError",
    "Future",
    "Handler",
    "LimitError",
    "Limits",
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
    "Result",
    "Server",
    "SettingError",
    "Stats",
    "TensorError",
    "VerificationError",
    "__version__",
    "aio",
    "connect",
    "native",
]

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import aio as aio
    from .hf import SplitModelForCausalLM as SplitModelForCausalLM


def __getattr__(name: str) -> Any:
    """What not everybody needs is imported when it is first asked for: `aio` brings asyncio, `SplitModelForCausalLM`
    torch and transformers."""
    if name == "aio":
        return importlib.import_module(".aio", __name__)  # `from . import aio` would call this function again
    if name == "SplitModelForCausalLM":
        from .hf import SplitModelForCausalLM

        return SplitModelForCausalLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


connect = Channel
"""Connects to a server: `connect(uri, *, arrays="auto", timeout_s=10.0, call_timeout_s=300.0, ...)`, see Channel."""

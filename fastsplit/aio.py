"""The asyncio front: `fastsplit.aio.connect` and `fastsplit.aio.serve`.

    async with fastsplit.aio.connect(uri) as channel:
        y, z = await asyncio.gather(channel.call("scale", x, by=2.0), channel.call("scale", x, by=3.0))

    async with fastsplit.aio.serve(uri, handlers) as server:
        await server.serve_forever()

The same protocol, sessions and shared memory as with `fastsplit.connect` and `fastsplit.Server`, and either end may be
either of them; but any number of calls in any number of connections, on one thread. A blocking channel's single call is
quicker: it can spin for its reply, and an event loop has its price (docs/notes.md).

Rules. Channels and servers belong to the loop that was running when they were opened, and to its thread.
"""

from __future__ import annotations

from .wire.aio.channel import Channel, connect
from .wire.aio.server import Call, Handler, Server, serve
from .wire.result import Result

__all__ = ["Call", "Channel", "Handler", "Result", "Server", "connect", "serve"]

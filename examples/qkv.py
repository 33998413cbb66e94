"""Three projections of the same rows, q, k and v: one call after the other, all three at once, or one call for all.

With asyncio three calls are in flight on one connection, and the server answers them as they are done. What one call
for all three saves beside that is the other two round trips, which matter for few rows and not for many.

    python examples/qkv.py
"""

import asyncio
import multiprocessing
import tempfile
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection

import numpy as np

import fastsplit

HIDDEN = {"q": 512, "k": 128, "v": 128}  # of a model with 8 heads of 64, 2 of them for keys and values


def worker(parent: Connection, uri: str) -> None:
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((512, size), np.float32) for name, size in HIDDEN.items()}

    def linear(call: fastsplit.Call) -> list[np.ndarray]:
        (x,) = call.tensors
        names = call.attrs["names"]
        outs = [call.empty((len(x), HIDDEN[name])) for name in names]  # memory that the reply is sent from as it is
        for name, out in zip(names, outs, strict=True):
            np.matmul(x, weights[name], out=out)
        return outs

    async def serve() -> None:
        # Plain functions run in threads, so that the three overlap; coroutines would run on the loop.
        async with fastsplit.aio.serve(uri, {"linear": linear}, arrays="numpy", workers=3):
            parent.send("ready")
            await asyncio.to_thread(parent.recv)  # until the other side has had enough

    asyncio.run(serve())


async def measure(way: Callable[[], Awaitable[list[np.ndarray]]], rounds: int) -> tuple[float, list[np.ndarray]]:
    await way()  # memory and caches are warm then
    started = time.perf_counter()
    for _ in range(rounds):
        result = await way()
    return (time.perf_counter() - started) / rounds * 1e3, result


async def compare(uri: str, rows: int, rounds: int) -> None:
    async with fastsplit.aio.connect(uri, arrays="numpy") as channel:
        x = channel.empty((rows, 512))  # shared with the server: no byte of it is copied or sent
        x[...] = np.random.default_rng(1).standard_normal(x.shape, np.float32)

        async def in_turn() -> list[np.ndarray]:
            return [(await channel.call("linear", x, names=[name]))[0] for name in HIDDEN]

        async def at_once() -> list[np.ndarray]:
            return [y for (y,) in await asyncio.gather(*(channel.call("linear", x, names=[name]) for name in HIDDEN))]

        async def batched() -> list[np.ndarray]:
            return list(await channel.call("linear", x, names=list(HIDDEN)))

        times, results = zip(*[await measure(way, rounds) for way in (in_turn, at_once, batched)], strict=True)
    same = all(np.array_equal(y, z) for other in results[1:] for y, z in zip(results[0], other, strict=True))
    print(
        f"{rows:5} rows: one after the other {times[0]:.2f} ms, three at once {times[1]:.2f} ms, "
        f"one call for all {times[2]:.2f} ms; the same numbers: {'yes' if same else 'NO'}"
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        uri = f"unix://{directory}/linear.sock"
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=worker, args=(theirs, uri))
        process.start()
        ours.recv()
        for rows, rounds in ((1, 300), (64, 100), (1024, 10)):
            asyncio.run(compare(uri, rows, rounds))
        ours.send("enough")
        process.join()


if __name__ == "__main__":
    main()

"""A pipeline that is not a language model: one process makes video frames, another finds what moves in them.

Frames are made in shared memory and cross by reference, and up to eight are on their way while the next is made.

    python examples/frames.py
"""

import multiprocessing
import tempfile
from collections import deque
from multiprocessing.connection import Connection

import numpy as np

import fastsplit

SHAPE = (480, 640, 3)


def worker(parent: Connection, uri: str) -> None:
    def motion(call: fastsplit.Call) -> np.ndarray:
        before, after = call.tensors  # uint8, where the other process made them
        difference = call.empty(SHAPE[:2], "int16")  # memory that the reply is sent from as it is
        np.subtract(after.max(axis=2), before.max(axis=2), out=difference, dtype="int16", casting="unsafe")
        call.reply_attrs["moved"] = int((np.abs(difference) > call.attrs["threshold"]).sum())
        return difference

    with fastsplit.Server(uri, {"motion": motion}, arrays="numpy"):
        parent.send("ready")
        parent.recv()  # until the other side has had enough


def main(frames: int = 64) -> list[int]:
    moved: list[int] = []
    with tempfile.TemporaryDirectory() as directory:
        uri = f"unix://{directory}/frames.sock"
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=worker, args=(theirs, uri))
        process.start()
        ours.recv()
        with fastsplit.connect(uri, arrays="numpy") as channel:
            in_flight: deque[fastsplit.Future] = deque()
            before = channel.empty(SHAPE, "uint8")
            before[...] = 0
            for index in range(frames):
                after = channel.empty(SHAPE, "uint8")
                after[...] = 0
                after[100:200, index * 8 : index * 8 + 100] = 255  # a square that moves to the right
                in_flight.append(channel.submit("motion", before, after, threshold=16))
                before = after
                if len(in_flight) == 8:
                    moved.append(in_flight.popleft().result().attrs["moved"])
            moved += [future.result().attrs["moved"] for future in in_flight]
            shared, copied = channel.stats.bytes_shared, channel.stats.bytes_copied
        ours.send("enough")
        process.join()
    print(
        f"{frames} pairs of frames, {shared / 1e6:.0f} MB by reference, {copied} copied; pixels moved: {moved[:4]} ..."
    )
    return moved


if __name__ == "__main__":
    main()

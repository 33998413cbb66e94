"""Ways to make bytes of tensors and tensors of bytes, for benches/bench_serialization.py: one class each.

Rules. `encode` ends with buffers that `socket.sendmsg` takes; `decode` begins with what a receiver of that format would
have read its bytes into, and ends with writable torch tensors, aligned to their elements. Making that memory, and
reading into it, is no contestant's time: it is the socket's, and all get it for free. Formats in which the bytes of a
tensor stand by themselves ("out-of-band", fastsplit) get one buffer for each tensor, as their receivers know the sizes
before; those of one piece get one bytearray, or bytes where their library takes nothing else. numpy has no bfloat16:
unless a class says otherwise its bits travel as int16, without a copy, and the name of the dtype beside them.

What may be decoded from whomever (`safe`). "yes": wrong bytes give an error, whatever they are: no code of the sender's
runs, nothing is read beyond what came, and nothing allocated beyond a small multiple of it and the limits that are
stated. "partly": that holds but for what stands behind it. "no": it does not. What attributes mean is for their reader
to check, whichever format brought them.
"""

from __future__ import annotations

import importlib

from .serializer import Message, Serializer

__all__ = ["FLOOR", "SERIALIZERS", "Message", "Serializer", "open_serializer"]

FLOOR = "memcpy"

SERIALIZERS: dict[str, str] = {
    FLOOR: "floor.Memcpy",  # the floor: numpy's copyto into memory that is warm
    "fastsplit": "fastsplit_frames.Frames",  # the sessions of fastsplit/wire over a stream, without the socket
    "fastsplit, new shape": "fastsplit_frames.NewShape",  # the same for a message of a shape that was not seen before
    "flatbuffers": "flatbuffers_vectors.Vectors",  # Builder and CreateByteVector, as one writes it with generated code
    "flatbuffers, sized": "flatbuffers_vectors.SizedVectors",  # a Builder of the right size, one copy
    "protobuf": "protobuf_messages.BytesField",  # a bytes field for each tensor
    "protobuf, out-of-band": "protobuf_messages.OutOfBand",  # the tensors' own memory beside it
    "msgpack": "msgpack_messages.Original",  # all in one, as the original
    "msgpack, out-of-band": "msgpack_messages.OutOfBand",  # the tensors' own memory beside it
    "msgspec": "msgspec_structs.Structs",  # a Struct with a bytes field, in MessagePack
    "msgspec, in place": "msgspec_structs.InPlace",  # memoryviews, padded: aligned where they arrive
    "msgspec, out-of-band": "msgspec_structs.OutOfBand",  # the tensors' own memory beside it
    "pickle 4": "pickles.Protocol4",  # numpy arrays
    "pickle, torch": "pickles.TorchTensors",  # torch tensors as they are, protocol 5
    "pickle 5, out-of-band": "pickles.OutOfBand",  # numpy arrays, their memory beside the pickle
    "numpy.save": "npy_files.NumpySave",  # into a BytesIO
    "npy, out-of-band": "npy_files.OutOfBand",  # the same format: numpy's header, then the tensor's own memory
    "torch.save": "torch_files.TorchSave",  # into a BytesIO
    "safetensors": "safetensors_files.Library",  # safetensors.torch.save and load
    "safetensors, out-of-band": "safetensors_files.OutOfBand",  # its header, then the tensors' own memory
    "arrow tensor": "arrow_ipc.Tensors",  # pyarrow.ipc.write_tensor and read_tensor
    "arrow batch": "arrow_ipc.Batch",  # a record batch with a column for each tensor, read where it arrived
    "arrow batch, in pieces": "arrow_ipc.Pieces",  # the same, written by a stream that hands on what it need not copy
    "capnproto": "capnproto.Assigned",  # assigned, to_bytes, from_bytes
    "capnproto, in place": "capnproto.InPlace",  # written into the message's own memory, read where it arrived
}
"""By name: module and class. A module is imported only when its class is opened."""


def open_serializer(name: str) -> Serializer:
    """Raises ImportError where its package is not installed, or does not load."""
    module, _, cls = SERIALIZERS[name].partition(".")
    made: Serializer = getattr(importlib.import_module(f"{__name__}.{module}"), cls)()
    return made

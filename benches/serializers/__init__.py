"""Ways to make bytes of tensors and tensors of bytes, for benches/bench_serialization.py: one class each.

    memcpy                      the floor: numpy's copyto into memory that is warm
    fastsplit                   the sessions of fastsplit/wire over a stream, without the socket
    fastsplit, new shape        the same for a message of a shape that was not seen before
    flatbuffers                 Builder and CreateByteVector, as one writes it with generated code
    flatbuffers, sized          a Builder that is large enough from the start, the payload put in by one copy
    protobuf                    a bytes field for each tensor
    protobuf, out-of-band       what is said in protobuf, each tensor's own memory beside it
    msgpack                     all in one, as the system that fastsplit replaces (benches/rivals/messages.py)
    msgpack, out-of-band        what is said in msgpack, each tensor's own memory beside it
    msgspec                     a Struct with a bytes field, in MessagePack
    msgspec, in place           the same with memoryviews, padded so that tensors are aligned where they arrive
    msgspec, out-of-band        a Struct for what is said, each tensor's own memory beside it
    pickle 4                    numpy arrays
    pickle, torch               torch tensors as they are, protocol 5
    pickle 5, out-of-band       numpy arrays, their memory beside the pickle
    numpy.save                  into a BytesIO
    npy, out-of-band            the same format: numpy's header, then the tensor's own memory
    torch.save                  into a BytesIO
    safetensors                 safetensors.torch.save and load
    safetensors, out-of-band    the same format: its JSON header, then the tensors' own memory
    arrow tensor                pyarrow.ipc.write_tensor and read_tensor
    arrow batch                 a record batch with a column for each tensor, read where it arrived
    arrow batch, in pieces      the same, written by a stream that hands on what it need not copy
    capnproto                   assigned, to_bytes, from_bytes
    capnproto, in place         written into the message's own memory, read where it arrived

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
    FLOOR: "floor.Memcpy",
    "fastsplit": "fastsplit_frames.Frames",
    "fastsplit, new shape": "fastsplit_frames.NewShape",
    "flatbuffers": "flatbuffers_vectors.Vectors",
    "flatbuffers, sized": "flatbuffers_vectors.SizedVectors",
    "protobuf": "protobuf_messages.BytesField",
    "protobuf, out-of-band": "protobuf_messages.OutOfBand",
    "msgpack": "msgpack_messages.Original",
    "msgpack, out-of-band": "msgpack_messages.OutOfBand",
    "msgspec": "msgspec_structs.Structs",
    "msgspec, in place": "msgspec_structs.InPlace",
    "msgspec, out-of-band": "msgspec_structs.OutOfBand",
    "pickle 4": "pickles.Protocol4",
    "pickle, torch": "pickles.TorchTensors",
    "pickle 5, out-of-band": "pickles.OutOfBand",
    "numpy.save": "npy_files.NumpySave",
    "npy, out-of-band": "npy_files.OutOfBand",
    "torch.save": "torch_files.TorchSave",
    "safetensors": "safetensors_files.Library",
    "safetensors, out-of-band": "safetensors_files.OutOfBand",
    "arrow tensor": "arrow_ipc.Tensors",
    "arrow batch": "arrow_ipc.Batch",
    "arrow batch, in pieces": "arrow_ipc.Pieces",
    "capnproto": "capnproto.Assigned",
    "capnproto, in place": "capnproto.InPlace",
}
"""By name: module and class. A module is imported only when its class is opened."""


def open_serializer(name: str) -> Serializer:
    """Raises ImportError where its package is not installed, or does not load."""
    module, _, cls = SERIALIZERS[name].partition(".")
    made: Serializer = getattr(importlib.import_module(f"{__name__}.{module}"), cls)()
    return made

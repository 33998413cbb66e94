"""Arrow's IPC format: its tensors, and its record batches.

Tensors hold no op and no attributes; pyarrow gives them as read-only, even in memory that is not, so they are copied.
A batch has one row, and a column for each tensor, whose dtype and shape are metadata of its field; op and attributes
are metadata of the schema. Its bytes are read where they arrived: pyarrow says where that is, and the bytearray is
writable. As one piece the payload is copied once, into memory that pyarrow allocates; a stream over an object of
Python's is handed the tensor's own memory instead ("in pieces").
"""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pyarrow as pa

from .arrays import array_of, dtype_name, flat_bytes, offset_in, tensor_of, tensor_over
from .serializer import Message, Serializer

__all__ = ["Batch", "Pieces", "Tensors"]


class Tensors(Serializer):
    """As commonly written, into a stream that grows. What arrives is one bytearray."""

    how = "common"
    copies_encode = 1
    copies_decode = 1
    safe = "partly: the metadata is verified, strides and body as far as Arrow's reader does"
    general = False
    note = "what the stream's growth moves is not counted"

    def encode(self, message: Message) -> list[Any]:
        stream = pa.BufferOutputStream()
        for tensor in message.tensors:
            pa.ipc.write_tensor(pa.Tensor.from_numpy(array_of(tensor)), stream)
        return [stream.getvalue()]

    def decode(self, received: bytearray) -> Message:
        tensors = []
        with pa.BufferReader(pa.py_buffer(received)) as reader:
            while reader.tell() < len(received):
                array = pa.ipc.read_tensor(reader).to_numpy().copy()
                tensors.append(tensor_of(array, "bfloat16" if array.dtype == np.int16 else str(array.dtype)))
        return Message("", 0, 0.0, tensors)


class Batch(Serializer):
    """As one piece. What arrives is one bytearray."""

    copies_encode = 1
    copies_decode = 0
    safe = "partly: metadata, offsets and shape are checked, but what is compressed is inflated before it is refused"

    def encode(self, message: Message) -> list[Any]:
        batch = self._batch(message)
        return [batch.schema.serialize(), batch.serialize()]

    def _batch(self, message: Message) -> Any:
        fields, columns = [], []
        for index, tensor in enumerate(message.tensors):
            said = json.dumps({"dtype": dtype_name(tensor), "shape": tuple(tensor.shape)})
            fields.append(pa.field(str(index), pa.large_binary(), metadata={"tensor": said}))
            offsets = np.array([0, tensor.nbytes], np.int64)
            buffers = [None, pa.py_buffer(offsets), pa.py_buffer(flat_bytes(tensor))]
            columns.append(pa.Array.from_buffers(pa.large_binary(), 1, buffers))
        attrs = json.dumps({"layer": message.layer, "scale": message.scale})
        schema = pa.schema(fields, {"op": message.op, "attrs": attrs})
        return pa.RecordBatch.from_arrays(columns, schema=schema)

    def decode(self, received: bytearray) -> Message:
        reader = pa.BufferReader(pa.py_buffer(received))
        schema = pa.ipc.read_schema(reader)
        batch = pa.ipc.read_record_batch(reader, schema)
        batch.validate(full=True)
        if batch.num_rows != 1:
            raise ValueError(f"{batch.num_rows} rows, expected 1")
        tensors = []
        for field, column in zip(schema, batch.columns):
            said = json.loads(field.metadata[b"tensor"])
            _, offsets, memory = column.buffers()
            start, end = np.frombuffer(offsets, np.int64, 2).tolist()
            at = offset_in(memory, received)
            tensors.append(tensor_over(received, said["dtype"], said["shape"], at + start, end - start))
        attrs = json.loads(schema.metadata[b"attrs"])
        return Message(schema.metadata[b"op"].decode(), attrs["layer"], attrs["scale"], tensors)


class _Sink(io.RawIOBase):
    """A file that keeps the pieces that Arrow's writer hands on."""

    def __init__(self) -> None:
        self.pieces: list[Any] = []
        self._nbytes = 0

    def write(self, piece: Any) -> int:
        view = memoryview(piece)  # of bytes, or of Arrow's own buffer
        self.pieces.append(view)
        self._nbytes += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        return self._nbytes

    def writable(self) -> bool:
        return True


class Pieces(Batch):
    """A stream of one batch, in as many pieces as Arrow writes. What arrives is one bytearray."""

    copies_encode = 0

    def encode(self, message: Message) -> list[Any]:
        batch, sink = self._batch(message), _Sink()
        with pa.ipc.new_stream(pa.PythonFile(sink, mode="w"), batch.schema) as writer:
            writer.write_batch(batch)
        return sink.pieces

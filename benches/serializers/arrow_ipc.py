"""Arrow's IPC format: its tensors, and its record batches.

Tensors hold no op and no attributes; pyarrow gives them as read-only, even in memory that is not, so they are copied.
A batch has one row, and a column for each tensor, whose dtype and shape are metadata of its field; op and attributes
are metadata of the schema. Its bytes are read where they arrived: pyarrow says where that is, and the bytearray is
writable. Both write the payload once, into memory that pyarrow allocates; nothing in Python sends a batch from where it
lies.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa

from .arrays import array_of, dtype_name, flat_bytes, offset_in, tensor_of, tensor_over
from .serializer import Message, Serializer, joined

__all__ = ["Batch", "Tensors"]


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

    def receive(self, wire: list[Any]) -> bytearray:
        return joined(wire)

    def decode(self, received: bytearray) -> Message:
        tensors = []
        with pa.BufferReader(pa.py_buffer(received)) as reader:
            while reader.tell() < len(received):
                array = pa.ipc.read_tensor(reader).to_numpy().copy()
                tensors.append(tensor_of(array, "bfloat16" if array.dtype == np.int16 else str(array.dtype)))
        return Message("", 0, 0.0, tensors)


class Batch(Serializer):
    """At its best. What arrives is one bytearray."""

    how = "best"
    copies_encode = 1
    copies_decode = 0
    safe = "yes: the metadata is verified, offsets by validate(full=True), the shape by this code"

    def encode(self, message: Message) -> list[Any]:
        fields, columns = [], []
        for index, tensor in enumerate(message.tensors):
            said = json.dumps({"dtype": dtype_name(tensor), "shape": tuple(tensor.shape)})
            fields.append(pa.field(str(index), pa.large_binary(), metadata={"tensor": said}))
            offsets = np.array([0, tensor.nbytes], np.int64)
            buffers = [None, pa.py_buffer(offsets), pa.py_buffer(flat_bytes(tensor))]
            columns.append(pa.Array.from_buffers(pa.large_binary(), 1, buffers))
        attrs = json.dumps({"layer": message.layer, "scale": message.scale})
        schema = pa.schema(fields, {"op": message.op, "attrs": attrs})
        return [schema.serialize(), pa.RecordBatch.from_arrays(columns, schema=schema).serialize()]

    def receive(self, wire: list[Any]) -> bytearray:
        return joined(wire)

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

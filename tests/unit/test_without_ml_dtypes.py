"""Without ml_dtypes installed: bfloat16 and float8 are tagged integers for numpy, and go on as what they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import sys

sys.modules["ml_dtypes"] = None  # an ImportError

import numpy as np
import torch
import fastsplit
from fastsplit.schema.dtypes import BY_NAME

def make(call):
    return torch.tensor([1.0, 2.0, 3.0], dtype=getattr(torch, call.attrs["dtype"]))

def which(call):
    call.reply_attrs.update(dtype=str(call.tensors[0].dtype), values=str(call.tensors[0].tolist()))

with fastsplit.Server(sys.argv[1], {"make": make, "which": which}, arrays="torch") as server:
    for query in ("", "?shm=off"):
        with fastsplit.connect(server.uri + query, arrays="numpy") as channel:
            for name, integer in (("bfloat16", "uint16"), ("float8_e4m3fn", "uint8"), ("float8_e5m2", "uint8")):
                (array,) = channel.call("make", dtype=name)
                assert array.dtype == integer and array.dtype.metadata == {"fastsplit.dtype": name}
                assert BY_NAME[name].numpy.metadata and BY_NAME[name].buffer_dtype.metadata is None
                made = channel.empty(3, name)
                made[:] = array
                for same in (array, array[:], np.repeat(array, 2)[::2], made):
                    attrs = channel.call("which", same).attrs
                    assert attrs == {"dtype": "torch." + name, "values": "[1.0, 2.0, 3.0]"}, (query, attrs)
                assert channel.call("which", array.view(integer)).attrs["dtype"] == "torch." + integer
assert "ml_dtypes" not in [name for name, module in sys.modules.items() if module is not None]
"""


def test_tagged_integers(unix_uri: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, unix_uri], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr

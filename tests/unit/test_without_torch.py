"""Without torch installed: the package imports, and its arrays are numpy's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import importlib.util
import sys

find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "torch" else find_spec(name, package)

class NoTorch:
    @staticmethod
    def find_spec(name, path, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTorch)

import numpy as np
import fastsplit

def scale(call):
    call.tensors[0][...] *= call.attrs["by"]
    return call.tensors[0]

with fastsplit.Server(sys.argv[1], {"scale": scale}) as server, fastsplit.connect(server.uri) as channel:
    x = channel.empty((2, 3), "float32")
    x[:] = 3
    (y,) = channel.call("scale", x, by=2)
    assert type(x) is type(y) is np.ndarray and (y == 6).all() and y.flags.writeable
def needs_torch(work):
    try:
        work()
    except ModuleNotFoundError as error:
        assert error.name == "torch"
    else:
        raise AssertionError("no error")

needs_torch(lambda: fastsplit.connect(sys.argv[1], arrays="torch"))
needs_torch(lambda: fastsplit.SplitModelForCausalLM)
needs_torch(lambda: fastsplit.SplitModelForCausalLM)  # and again, not a half of it
try:
    fastsplit.nothing
except AttributeError as error:
    assert str(error) == "module 'fastsplit' has no attribute 'nothing'"
else:
    raise AssertionError("no error")
"""


def test_numpy_alone(unix_uri: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, unix_uri], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_importing_brings_no_torch() -> None:
    program = "import fastsplit, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=60)

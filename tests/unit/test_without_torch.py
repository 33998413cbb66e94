"""Without torch installed: the package imports, and its arrays are numpy's."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

MODULES = sorted(
    ".".join(path.relative_to(ROOT / "fastsplit").with_suffix("").parts)
    for path in (ROOT / "fastsplit").rglob("*.py")
    if re.search(r"^from \.+extras import .*torch", path.read_text(encoding="utf-8"), re.MULTILINE)
)
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
    except fastsplit.MissingExtraError as error:
        assert isinstance(error, ImportError) and error.name == "torch"
        assert str(error) == "torch is not installed here: pip install 'fastsplit[torch,hf]'"
    else:
        raise AssertionError("no error")

needs_torch(lambda: fastsplit.connect(sys.argv[1], arrays="torch"))
needs_torch(lambda: fastsplit.SplitModelForCausalLM)
needs_torch(lambda: fastsplit.SplitModelForCausalLM)  # and again, not a half of it
needs_torch(lambda: importlib.import_module("fastsplit.hf"))
needs_torch(lambda: importlib.import_module("fastsplit.tee").open_split)
for module in sys.argv[2:]:
    needs_torch(lambda: importlib.import_module("fastsplit." + module))

import fastsplit.gpu_side, fastsplit.models, fastsplit.tee_side
model = fastsplit.models.open_model("random:tiny")
needs_torch(model.tee_weights)
needs_torch(lambda: next(model.items()))
assert fastsplit.gpu_side.main(["--model", "random:tiny"]) == 1
assert fastsplit.tee_side.main(["--connect", sys.argv[1], "--prompt-ids", "1"]) == 1
try:
    fastsplit.nothing
except AttributeError as error:
    assert str(error) == "module 'fastsplit' has no attribute 'nothing'"
else:
    raise AssertionError("no error")
"""


def test_numpy_alone(unix_uri: str) -> None:
    assert "hf.model" in MODULES and "tee.runner" in MODULES
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, unix_uri, *MODULES], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    hint = "torch is not installed here: pip install 'fastsplit[torch,hf]'"
    assert (done.stdout, done.stderr.splitlines()) == ("", [f"gpu_side: {hint}", f"tee_side: {hint}"])


def test_every_module_takes_them_from_the_extras() -> None:
    """So that the hint is given wherever one is missing. hf/ takes names of transformers after it has asked there."""
    found = []
    for path in (ROOT / "fastsplit").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                node.body = []
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            if {name.partition(".")[0] for name in names} & {"torch", "transformers", "safetensors", "tokenizers"}:
                found.append(path.relative_to(ROOT / "fastsplit").parts[0])
                asked, taken = (path.read_text().index(f"\nfrom {name}") for name in ("..extras", "transformers"))
                assert asked < taken
    assert set(found) == {"hf"}


def test_importing_brings_no_torch() -> None:
    program = "import fastsplit, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=60)

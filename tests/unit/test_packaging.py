"""What is installed is what was promised: files, metadata, console scripts, and a core that works with numpy alone.

The wheel is built from a copy of the sources, with pip as it is configured on this machine.
"""

from __future__ import annotations

import configparser
import email
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastsplit

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(fastsplit.__file__).parents[1]
ROUND_TRIP = """
import sys, tempfile
import numpy as np
import fastsplit

def scale(call):
    call.tensors[0][...] *= call.attrs["by"]
    return call.tensors[0]

assert fastsplit.__file__.startswith(sys.prefix), fastsplit.__file__
with tempfile.TemporaryDirectory() as directory:
    uri = f"unix://{directory}/s"
    with fastsplit.Server(uri, {"scale": scale}), fastsplit.connect(uri) as channel:
        (y,) = channel.call("scale", np.ones((3, 4), np.float32), by=2.5, timeout_s=5)
assert type(y) is np.ndarray and y.flags.writeable and (y == 2.5).all() and y.shape == (3, 4)
assert "torch" not in sys.modules
try:
    fastsplit.SplitModelForCausalLM
except ModuleNotFoundError as error:
    assert error.name in ("torch", "transformers"), error
else:
    raise AssertionError("there is a split model without torch")
"""


def _run(*command: str | Path, cwd: Path) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    # Folders that are no package must not become one.
    for name in ("fastsplit", "tests", "demo", "benches"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    _run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", target, source, cwd=target)
    (path,) = target.glob("*.whl")
    return path


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "fastsplit").rglob("*.py")}
    expected |= {"fastsplit/py.typed", "fastsplit/schema/message.fbs"}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith("/LICENSE") for name in names)


def test_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (info,) = {name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        scripts = configparser.ConfigParser()
        scripts.read_string(archive.read(f"{info}/entry_points.txt").decode())
    assert (metadata["Name"], metadata["Version"]) == ("fastsplit", fastsplit.__version__)
    assert metadata["Requires-Python"] == ">=3.11"
    assert "Apache-2.0" in (metadata["License-Expression"], metadata["License"])
    assert set(metadata.get_all("Provides-Extra")) == {
        "torch",
        "hf",
        "demo",
        "codecs",
        "bench",
        "rivals",
        "plots",
        "test",
    }
    requires = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(line.partition("<")[0].partition(">")[0] for line in requires) == ["flatbuffers", "numpy"]
    assert dict(scripts["console_scripts"]) == {
        "fastsplit-gpu-side": "fastsplit.gpu_side:main",
        "fastsplit-tee-side": "fastsplit.tee_side:main",
    }


def test_installed_alone_it_works_with_numpy(wheel: Path, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    _run(sys.executable, "-m", "venv", venv, cwd=tmp_path)
    python = venv / "bin" / "python"
    _run(python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel, cwd=tmp_path)
    installed = _run(python, "-m", "pip", "list", "--format=freeze", cwd=tmp_path)
    assert {line.partition("==")[0] for line in installed.split()} - {"pip", "setuptools"} == {
        "fastsplit",
        "flatbuffers",
        "numpy",
    }
    _run(python, "-c", ROUND_TRIP, cwd=tmp_path)
    for script in ("fastsplit-gpu-side", "fastsplit-tee-side"):
        assert _run(venv / "bin" / script, "--version", cwd=tmp_path).strip() == f"fastsplit {fastsplit.__version__}"

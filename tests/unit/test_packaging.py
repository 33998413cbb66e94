"""What is installed is what was promised: files, metadata, console scripts, and a core that works with numpy alone.

The wheel is built from a copy of the sources, with the setuptools that is installed here; `make` itself installs with a
build environment of its own.
"""

from __future__ import annotations

import configparser
import email
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import fastsplit

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(fastsplit.__file__).parents[1]
COMPILED = importlib.util.find_spec("fastsplit._native") is not None
"""Whether the compiled core could be built on this machine."""
ASK = """
try:
    import fastsplit
    print(fastsplit.native)
except Exception as error:
    print(type(error).__name__, error)
"""
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
except fastsplit.MissingExtraError as error:
    assert str(error) == "torch is not installed here: pip install 'fastsplit[torch,hf]'", error
else:
    raise AssertionError("there is a split model without torch")
"""
TYPED = """
import asyncio
import concurrent.futures

import fastsplit
import fastsplit.aio
from fastsplit import aio
from fastsplit.aio import Channel, connect


def scale(call: fastsplit.Call) -> object:
    (x,) = call.tensors
    x *= call.attrs["by"]
    calls[call.client] = calls.get(call.client, 0) + 1
    return x


async def slow(call: aio.Call) -> object:
    return await call.allocate((2, 3), "float32")


calls: dict[fastsplit.Client, int] = {}
handlers: dict[str, fastsplit.Handler] = {"scale": scale}
both: dict[str, fastsplit.aio.Handler] = {"scale": scale, "slow": slow}


def blocking(uri: str) -> int:
    with fastsplit.Server(uri, handlers) as server, fastsplit.connect(server.uri) as channel:
        x = channel.empty((2, 3), dtype="float32")
        (y,) = channel.call("scale", x, by=2.0, timeout_s=5)
        future: fastsplit.Future = channel.submit("scale", y, by=0.5)
        result: fastsplit.Result = future.result(timeout=5)
        (z,) = result
        futures: list[fastsplit.Future] = [channel.submit("scale", z, by=2.0)]
        for done in concurrent.futures.as_completed(futures):
            result = done.result()
        concurrent.futures.wait(futures)
        try:
            channel.call("missing", z)
        except fastsplit.RemoteOpError as error:
            print(error.op, error.message)
        return channel.stats.calls


async def main(uri: str) -> None:
    async with aio.serve(uri, both) as server, fastsplit.aio.connect(server.uri) as channel, connect(uri) as another:
        (y,), (z,) = await asyncio.gather(channel.call("slow"), another.call("slow", timeout_s=5))
        with fastsplit.connect(server.uri) as blocking:
            (w,) = await asyncio.wrap_future(blocking.submit("slow"))
        reveal_type(channel)
        reveal_type(Channel is aio.Channel)


reveal_type(fastsplit.connect("unix:///tmp/s"))
fastsplit.connect(3)
"""


def _run(*command: str | Path, cwd: Path, **variables: str) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | variables
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is in the repository."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    # Folders that are no package must not become one.
    for name in ("fastsplit", "native", "tests", "demo", "benches"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "results"))
    return source


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a source distribution, and the wheel that is made of it."""
    target = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", target, source, cwd=target)
    return target


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


def _files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "fastsplit").rglob("*.py")}
    expected |= {"fastsplit/py.typed", "fastsplit/schema/message.fbs"}
    if COMPILED:
        expected.add(f"fastsplit/_native{sysconfig.get_config_var('EXT_SUFFIX')}")
    assert _files(wheel) == expected
    with zipfile.ZipFile(wheel) as archive:
        assert any(name.endswith("/LICENSE") for name in archive.namelist())


def test_without_a_compiler_all_but_the_compiled_core_is_installed(built: Path, wheel: Path, tmp_path: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    _run(*pip, "--wheel-dir", tmp_path, sdist, cwd=tmp_path, CC="no-such-compiler")
    (pure,) = tmp_path.glob("*.whl")
    assert _files(pure) == {name for name in _files(wheel) if not name.endswith(".so")}
    with zipfile.ZipFile(pure) as archive:
        archive.extractall(tmp_path / "installed")
    ask = (sys.executable, "-c", ASK)
    assert _run(*ask, cwd=tmp_path / "installed") == "False\n"
    assert "fastsplit._native was not built" in _run(*ask, cwd=tmp_path / "installed", FASTSPLIT_NATIVE="1")


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
    _run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    python = venv / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    constraints = ("--constraint", ROOT / "constraints.txt")
    _run(*pip, "install", "--quiet", "--no-compile", *constraints, wheel, cwd=tmp_path)
    installed = _run(*pip, "list", "--format=freeze", cwd=tmp_path)
    assert {line.partition("==")[0] for line in installed.split()} == {"fastsplit", "flatbuffers", "numpy"}
    _run(python, "-c", ROUND_TRIP, cwd=tmp_path)
    for wanted, found in {"": str(COMPILED), "0": "False"}.items():
        assert _run(python, "-c", ASK, cwd=tmp_path, FASTSPLIT_NATIVE=wanted) == f"{found}\n"
    assert "FASTSPLIT_NATIVE: 'yes', expected 0 or 1" in _run(python, "-c", ASK, cwd=tmp_path, FASTSPLIT_NATIVE="yes")
    for script in ("fastsplit-gpu-side", "fastsplit-tee-side"):
        assert _run(venv / "bin" / script, "--version", cwd=tmp_path).strip() == f"fastsplit {fastsplit.__version__}"


def test_type_checkers_see_an_editable_install(source: Path, tmp_path: Path) -> None:
    """As `make` installs it, for mypy that runs elsewhere: each way to import it has its types."""
    pytest.importorskip("mypy")
    venv, program = tmp_path / "venv", tmp_path / "program.py"
    python = venv / "bin" / "python"
    _run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-compile")
    _run(*pip, "--no-deps", "--editable", source, cwd=tmp_path, CC="no-such-compiler")
    program.write_text(TYPED)
    settings = ("--strict", "--no-color-output", "--python-executable", str(python))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *settings, program.name], cwd=tmp_path, capture_output=True, text=True
    )
    says = [line.partition(": ")[2] for line in done.stdout.splitlines()[:-1]]
    assert says == [
        'note: Revealed type is "fastsplit.wire.aio.channel.Channel"',
        'note: Revealed type is "bool"',
        'note: Revealed type is "fastsplit.wire.blocking.channel.Channel"',
        'error: Argument 1 to "Channel" has incompatible type "int"; expected "str"  [arg-type]',
    ], done.stdout

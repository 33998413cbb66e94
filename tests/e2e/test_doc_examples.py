"""Each example of README and docs runs as it stands, with numpy alone and with torch; the commands in them exist.

A block is run in a namespace of its own, behind a prologue with what it takes for granted (`EXAMPLES`), and followed by
what must be true then. Only addresses are rewritten. All blocks of one kind run in one interpreter.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import fastsplit
from fastsplit import gpu_side, tee_side

ROOT = Path(fastsplit.__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "benches" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PARSERS = {"fastsplit.gpu_side": gpu_side._parser, "fastsplit.tee_side": tee_side._parser}


class Example(NamedTuple):
    prologue: str = ""
    check: str = ""
    """What is run behind it."""
    needs_torch: bool = False
    """It is about a model."""


SCALING = """
import fastsplit
import numpy as np

def scale(call):
    return call.tensors[0] * call.attrs["by"]

server = fastsplit.Server("tcp://10.0.0.2:7000", {"scale": scale}).start()
x = np.full(300_000, 3, np.float32)
xs = [x, x + 1, x + 2]
"""
MODEL = """
import pathlib, tempfile
import fastsplit
from fastsplit.executor.service import Executor
from fastsplit.models import open_model
from split import make_model
from tokenizers import Tokenizer, models, pre_tokenizers

kept = tempfile.TemporaryDirectory()
model_dir = kept.name
words = {word: index for index, word in enumerate(["<unk>", "Why", "is", "the", "sky", "blue", "?"])}
make_model(pathlib.Path(model_dir), {"vocab_size": len(words)})
tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer.save(f"{model_dir}/tokenizer.json")
pathlib.Path(model_dir, "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
server = fastsplit.Server("unix:///tmp/gpu.sock", Executor(open_model(model_dir)).handlers, arrays="torch").start()
"""
RANDOM_MODEL = """
import fastsplit
from fastsplit.executor.service import Executor
from fastsplit.models import open_model

handlers = Executor(open_model("random:tiny")).handlers
server = fastsplit.Server("unix:///tmp/gpu.sock", handlers, arrays="torch").start()
"""
EXAMPLES = {
    "fastsplit/__init__.py": Example(
        "import fastsplit, numpy as np; x = np.ones(3, np.float32)", "assert type(y).__module__ == arrays and y[0] == 2"
    ),
    "README.md: The same as a model of transformers": Example(
        MODEL, "assert tokens.shape == (1, 6 + 64)", needs_torch=True
    ),
    "README.md: Tensors between two processes": Example(
        check="assert type(z).__module__ == arrays and z.shape == x.shape == (1024, 2048)"
    ),
    "docs/guide.md: Tensors from process to process": Example(
        check="x[:] = 5; assert (z == 5).all() and channel.stats.bytes_copied == 0"
    ),
    "docs/guide.md: The split in Python": Example(MODEL, "assert tokens.shape == (1, 6 + 64)", needs_torch=True),
    "docs/guide.md: The split in Python, 2": Example(
        RANDOM_MODEL, "assert [len(prompt) for prompt in prompts] == [3, 5] and set(step) <= {0, 1}", needs_torch=True
    ),
    "docs/guide.md: Remote links": Example(
        SCALING, "assert (y == 10).all() and (z == 6).all() and {'float16', 'zstd'} <= set(channel.stats.codecs)"
    ),
    "docs/guide.md: asyncio": Example(),
}

PROGRAM = """
import contextlib, gc, importlib.util, json, socket, sys, tempfile, traceback

request = json.load(sys.stdin)

class Missing:
    @staticmethod
    def find_spec(name, path, target=None):
        if name.partition(".")[0] in request["missing"]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in request["missing"] else find_spec(name, package)
sys.meta_path.insert(0, Missing)

def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]

said = {}
for name, parts in request["examples"].items():
    with tempfile.TemporaryDirectory(prefix="fs-") as directory, contextlib.redirect_stdout(sys.stderr):
        here = {"unix:///tmp/": f"unix://{directory}/"}
        here.update(dict.fromkeys(["tcp://10.0.0.2:7000", "tcp://127.0.0.1:7000"], f"tcp://127.0.0.1:{free_port()}"))
        namespace = {"__name__": "__main__", "arrays": request["arrays"]}
        try:
            for part, text in parts.items():
                for address, local in here.items():
                    text = text.replace(address, local)
                exec(compile(text, f"{name}, {part}", "exec"), namespace)
            said[name] = ""
        except BaseException:
            said[name] = traceback.format_exc()
        for opened in ("channel", "server"):
            if opened in namespace:
                namespace[opened].close()
        namespace.clear()
print(json.dumps(said))
"""


def _blocks(language: str) -> dict[str, str]:
    """The fenced blocks of one language, by page and heading, and by number where there are several."""
    found: dict[str, str] = {}
    for page in PAGES:
        heading, fence, lines = "", None, []
        for line in page.read_text(encoding="utf-8").splitlines():
            if fence is None and line.startswith("#"):
                heading = line.lstrip("# ")
            elif line.startswith("```") and fence is None:
                fence, lines = line.removeprefix("```").strip(), []
            elif line.startswith("```"):
                if fence == language:
                    name = f"{page.relative_to(ROOT)}: {heading}"
                    count = sum(other.partition(", ")[0] == name for other in found)
                    found[f"{name}, {count + 1}" if count else name] = "\n".join(lines)
                fence = None
            else:
                lines.append(line)
    return found


def _examples() -> dict[str, str]:
    docstring = ast.get_docstring(ast.parse(Path(fastsplit.__file__).read_text(encoding="utf-8"))) or ""
    indented = [line[4:] for line in docstring.splitlines() if line.startswith("    ") or not line]
    return {"fastsplit/__init__.py": "\n".join(indented), **_blocks("python")}


def _run(arrays: str, missing: list[str], names: list[str]) -> dict[str, str]:
    """What went wrong with each of these, "" if nothing did."""
    texts = _examples()
    parts = {
        name: {"prologue": EXAMPLES[name].prologue, "example": texts[name], "check": EXAMPLES[name].check}
        for name in names
        if name in texts
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps({"arrays": arrays, "missing": missing, "examples": parts}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'e2e'}"},
    )
    assert done.returncode == 0, done.stderr
    said: dict[str, str] = json.loads(done.stdout)
    return said


def test_every_example_is_run() -> None:
    assert sorted(_examples()) == sorted(EXAMPLES), "a block of python without a row in EXAMPLES, or a row without one"


@pytest.fixture(scope="module")
def with_numpy_alone() -> dict[str, str]:
    names = [name for name, example in EXAMPLES.items() if not example.needs_torch]
    return _run("numpy", ["torch", "transformers", "safetensors", "tokenizers", "ml_dtypes"], names)


@pytest.fixture(scope="module")
def with_torch() -> dict[str, str]:
    pytest.importorskip("transformers")
    return _run("torch", [], list(EXAMPLES))


@pytest.mark.parametrize("name", [name for name, example in EXAMPLES.items() if not example.needs_torch])
def test_an_example_with_numpy_alone(name: str, with_numpy_alone: dict[str, str]) -> None:
    assert with_numpy_alone[name] == ""


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_with_torch(name: str, with_torch: dict[str, str]) -> None:
    assert with_torch[name] == ""


# ---- commands --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in _blocks("") if name.startswith(("README.md", "docs/guide.md"))])
def test_commands_exist(name: str) -> None:
    """Their flags, as the scripts' own parsers say; targets of `make`. (Nothing of it is run.)"""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    commands = [words for line in _blocks("")[name].splitlines() if (words := shlex.split(line, comments=True))]
    assert commands
    for words in commands:
        match words:
            case ["python", "-m", module, *arguments]:
                assert PARSERS[module]().parse_args(arguments)
            case ["make", target]:
                assert target in targets
            case _:
                assert words[0] == "ssh", f"{words[0]}: no command that this test knows"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_modules_that_are_named_exist(page: Path) -> None:
    for module in re.findall(r"python -m ((?:fastsplit|benches|demo)[\w.]*)", page.read_text(encoding="utf-8")):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md"])
def test_flags_that_are_named_exist(page: str) -> None:
    known = {flag for parser in PARSERS.values() for flag in parser()._option_string_actions}
    named = re.findall(r"`[^`\n]*`", (ROOT / page).read_text(encoding="utf-8"))
    flags = {flag for code in named for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", code)}
    assert flags and flags - known == set()

"""What an import costs and where imports may point. (The arrows between modules are checked by import-linter.)"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastsplit

PACKAGE = Path(fastsplit.__file__).parent
ROOT = PACKAGE.parent
CORE = sorted(
    [
        PACKAGE / "__init__.py",
        PACKAGE / "aio.py",
        PACKAGE / "errors.py",
        PACKAGE / "memory.py",
        *(PACKAGE / "schema").glob("*.py"),
        *(PACKAGE / "system").glob("*.py"),
        *(PACKAGE / "wire").rglob("*.py"),
    ]
)
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if not path.name.endswith("_generated.py"))


def _name(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def _python(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, capture_output=True, text=True, timeout=60, env={"PYTHONPATH": str(ROOT)}
    )


def test_importing_fastsplit_imports_no_torch(tmp_path: Path) -> None:
    code = "import fastsplit, sys; print(*(name for name in sys.modules if name in ('torch', 'transformers', 'zmq')))"
    done = _python("-c", code, cwd=tmp_path)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


def test_what_runs_before_anything_is_computed_imports_no_torch(tmp_path: Path) -> None:
    """A wrong flag, or a model that is not there, is answered at once."""
    code = (
        "import importlib, sys\n"
        "for module in ('models', 'models.families', 'split.contract', 'tee', 'tee.tuning', 'cli', 'gpu_side',\n"
        "               'tee_side'):\n"
        "    importlib.import_module(f'fastsplit.{module}')\n"
        "    if {'torch', 'transformers'} & set(sys.modules):\n"
        "        sys.exit(f'{module} imports it')\n"
    )
    done = _python("-c", code, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_split_model_is_imported_when_it_is_first_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    code = (
        "import fastsplit, sys; before = 'transformers' in sys.modules; "
        "model = fastsplit.SplitModelForCausalLM; "
        "from fastsplit.hf import SplitModelForCausalLM; "
        "from fastsplit import SplitModelForCausalLM as again; "
        "print(before, 'transformers' in sys.modules, model is SplitModelForCausalLM is again)"
    )
    done = _python("-c", code, cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "False True True"), done.stderr


def test_what_computes_imports_no_transformers_and_comes_when_it_is_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    code = (
        "import fastsplit.tee, importlib, sys; before = 'torch' in sys.modules\n"
        "from fastsplit.tee import Split, open_split\n"
        "from fastsplit.tee.open import open_split as own\n"
        "print(before, open_split is own, hasattr(fastsplit.tee, 'nothing'))\n"
        "for module in ('split.functional', 'tee.runner', 'executor.service'):\n"
        "    importlib.import_module(f'fastsplit.{module}')\n"
        "    if 'transformers' in sys.modules:\n"
        "        sys.exit(f'{module} imports it')\n"
    )
    done = _python("-c", code, cwd=tmp_path)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "False True False", "")


@pytest.mark.parametrize("name", ["SplitModel", "splitmodelforcausallm", "__path_of_nothing__", "torch"])
def test_a_name_that_there_is_not_is_an_attribute_error(name: str) -> None:
    with pytest.raises(AttributeError, match=f"^module 'fastsplit' has no attribute '{name}'$"):
        getattr(fastsplit, name)
    assert not hasattr(fastsplit, name)
    with pytest.raises(ImportError):
        exec(f"from fastsplit import {name}")


def test_asking_for_a_name_that_there_is_not_imports_nothing(tmp_path: Path) -> None:
    code = (
        "import fastsplit, sys; assert not hasattr(fastsplit, 'nothing'); dir(fastsplit); from fastsplit import *; "
        "print(*(name for name in sys.modules if name in ('torch', 'transformers')))"
    )
    done = _python("-c", code, cwd=tmp_path)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


def test_public_names_exist_and_are_sorted() -> None:
    assert [name for name in fastsplit.__all__ if not hasattr(fastsplit, name)] == []
    assert fastsplit.__all__ == sorted(fastsplit.__all__)


@pytest.mark.parametrize("path", CORE, ids=_name)
def test_the_core_needs_only_numpy_and_flatbuffers(path: Path) -> None:
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            imported.add(node.module.partition(".")[0])
    assert imported - set(sys.stdlib_module_names) <= {"numpy", "flatbuffers", "fastsplit"}


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_every_module_opens_with_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_no_module_shadows_the_standard_library() -> None:
    # A script that is run by path has its own folder first on sys.path.
    names = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert names & set(sys.stdlib_module_names) == set()


@pytest.mark.parametrize("script", ["gpu_side", "tee_side"])
@pytest.mark.parametrize("by_path", [False, True], ids=["module", "path"])
def test_scripts_run_from_anywhere(script: str, by_path: bool, tmp_path: Path) -> None:
    args = [str(PACKAGE / f"{script}.py")] if by_path else ["-m", f"fastsplit.{script}"]
    done = _python(*args, "--version", cwd=tmp_path)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, f"fastsplit {fastsplit.__version__}", "")

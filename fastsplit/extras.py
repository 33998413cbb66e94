"""The packages of the extras `torch` and `hf`: `from .extras import torch` is `import torch` with a clearer error.

Every module that needs one of them imports it from here, so that a missing one is always a MissingExtraError with the
command that installs it. A package is imported when its name is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import MissingExtraError

__all__ = ["safetensors", "torch", "transformers"]

if TYPE_CHECKING:
    import safetensors
    import torch
    import transformers


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:  # the package, or one that it imports
        missing = error.name or name
        text = f"{missing} is not installed here: pip install 'fastsplit[torch,hf]'"
        raise MissingExtraError(text, name=missing) from None

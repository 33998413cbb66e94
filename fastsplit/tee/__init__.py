"""The trusted side: runs a model's forward passes, and sends linear algebra to an executor.

    from fastsplit.tee import open_split

Importing this package imports no torch; `open_split` and `Split` need it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .open import Split as Split
    from .open import open_split as open_split

__all__ = ["Split", "open_split"]


def __getattr__(name: str) -> Any:
    """Imports what needs torch when it is first asked for."""
    if name in __all__:
        from . import open as module

        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""The name of before for `fastsplit.tee.runner`."""

from .tee.runner import *  # noqa: F403

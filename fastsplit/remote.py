"""The name of before for `fastsplit.tee.remote`."""

from .tee.remote import *  # noqa: F403

"""Any bytes for the compiled core: it takes what Python takes, and leaves the rest alone. tests/fuzz says how.

Rule. Each run tries the same few inputs. What `make fuzz` finds gets a test of its own.
"""

from __future__ import annotations

import pytest
from fuzz import fuzz
from fuzz.targets import TARGETS

from fastsplit.wire import backend
from fastsplit.wire.shm.segment import why_no_memfd
from fastsplit.wire.shm.semaphores import semaphores

_WHY_NOT = why_no_memfd() or (None if semaphores() else "no semaphores that are known")
if not backend.native:
    _WHY_NOT = "the compiled core is not in use here"
pytestmark = pytest.mark.skipif(_WHY_NOT is not None, reason=str(_WHY_NOT))

INPUTS = {"decode": 20_000, "server": 5000, "client": 5000, "control": 1000, "encode": 4000}
INPUTS |= {"socketserver": 5000, "socketclient": 5000}


@pytest.mark.parametrize("target", TARGETS)
def test_inputs_at_random(target: str) -> None:
    assert [report.inputs for report in fuzz(TARGETS[target], seed=1, inputs=INPUTS[target])][-1] == INPUTS[target]

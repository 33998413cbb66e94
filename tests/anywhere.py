"""What a signal's handler or a finalizer does wherever CPython could run it."""

from __future__ import annotations

import dis
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

import fastsplit

traces_instructions = pytest.mark.skipif(
    sys.version_info >= (3, 12), reason="newer Pythons' tracing does not show each instruction of each function"
)
WIRE = str(Path(fastsplit.__file__).parent / "wire")


@functools.cache
def _names(code: CodeType) -> dict[int, str]:
    return {instruction.offset: instruction.opname for instruction in dis.get_instructions(code)}


class Anywhere:
    """Calls `act` at the `n`th place of fastsplit.wire where CPython could run a signal's handler: where a function
    begins, after a call, and at a jump backwards. `where`: the functions that it was called in, innermost first."""

    def __init__(self, n: int, act: Callable[[], object]) -> None:
        self.n = n
        self.where: list[str] = []
        self.lines: list[int] = []
        self._act = act
        self._last: dict[FrameType, str] = {}

    def __enter__(self) -> Anywhere:
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)
        self._last.clear()

    def _enter(self, frame: FrameType, event: str, arg: object) -> Callable[..., Any] | None:
        if not frame.f_code.co_filename.startswith(WIRE) or self.where:
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        return self._step

    def _step(self, frame: FrameType, event: str, arg: object) -> Callable[..., Any] | None:
        if event == "return":
            self._last.pop(frame, None)
        if event != "opcode" or self.where:
            return self._step
        name = _names(frame.f_code).get(frame.f_lasti, "")
        last = self._last.get(frame, "")
        self._last[frame] = name
        if last.startswith(("CALL", "RESUME", "JUMP_BACKWARD")):
            self.n -= 1
            if self.n < 0:
                inner: FrameType | None = frame
                while inner is not None and inner.f_code.co_filename.startswith(WIRE):
                    self.where.append(inner.f_code.co_name)
                    self.lines.append(inner.f_lineno)
                    inner = inner.f_back
                self._act()
        return self._step

"""Options of the serializers' benchmark: pytest has them when a file of benches/ is given to it."""

from __future__ import annotations

import pytest

from benches.serializers import FLOOR


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="serializers: 128 MiB in float32 alone, and fewer rounds")
    parser.addoption("--only", action="append", metavar="TEXT", help="serializers: those with TEXT in their names")
    parser.addoption("--reverse", action="store_true", help="serializers: in reversed order")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of the serializers: those that are asked for, each with its floor, in the order that is asked for."""
    ours = [item for item in items if item.path.name == "bench_serialization.py"]
    only = config.getoption("--only")
    asked_for = {item for item in ours if not only or any(text in item.name for text in only)}
    groups = {_group(item) for item in asked_for}
    left_out = set()
    for item in ours:
        message, dtype, _ = _group(item)
        is_floor = _params(item)["serializer"] == FLOOR
        is_slow = message == "scores" and dtype != "float32"
        if not (item in asked_for or (is_floor and _group(item) in groups)) or (
            is_slow and config.getoption("--quick")
        ):
            left_out.add(item)
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
    chosen = [item for item in ours if item not in left_out]
    if config.getoption("--reverse"):
        chosen.reverse()
    items[:] = [item for item in items if item not in ours] + chosen


def _params(item: pytest.Item) -> dict[str, str]:
    params: dict[str, str] = item.callspec.params  # type: ignore[attr-defined]
    return params


def _group(item: pytest.Item) -> tuple[str, str, str]:
    params = _params(item)
    return params["message"], params["dtype"], params["task"]

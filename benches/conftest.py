"""Options of the benchmarks that run in pytest, and what their JSON says beside pytest-benchmark's own: the project's
`environment`. They are pytest's options, so they are there when a file of benches/ is given to it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from benches.environment import describe
from benches.serializers import FLOOR


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="serializers: 128 MiB in float32 alone, and fewer rounds")
    parser.addoption("--only", action="append", metavar="TEXT", help="serializers: those with TEXT in their names")
    parser.addoption("--reverse", action="store_true", help="serializers: in reversed order")
    parser.addoption("--described-command", metavar="COMMAND", help="what the JSON calls the command that was run")


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


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    command = config.getoption("--described-command")
    words = shlex.split(command) if command else ["python", "-m", "pytest", *config.invocation_params.args]
    output_json["machine_info"]["node"] = ""  # the host's name is nobody's business
    output_json["environment"] = describe([described(str(word)) for word in words])


def described(word: str) -> str:
    """A word of a command as it may be published: no absolute path says where this checkout lies, or anything else."""
    option, equals, value = word.rpartition("=")
    path = Path(value)
    if not path.is_absolute():
        return word
    root = Path(__file__).resolve().parents[1]
    return option + equals + (str(path.relative_to(root)) if path.is_relative_to(root) else path.name)

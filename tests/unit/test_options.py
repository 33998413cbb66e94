"""The options of channels and servers: one address for each, checked, documented, unchangeable."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError, fields
from typing import Any, get_type_hints

import pytest

from fastsplit.errors import SettingError
from fastsplit.wire import options as module
from fastsplit.wire.options import (
    AioClientOptions,
    AioServerOptions,
    BlockingClientOptions,
    BlockingServerOptions,
    ClientOptions,
    LinkOptions,
    ServerOptions,
    documented,
)

ALL = [
    LinkOptions,
    ClientOptions,
    BlockingClientOptions,
    AioClientOptions,
    ServerOptions,
    BlockingServerOptions,
    AioServerOptions,
]
FRONTS = [BlockingClientOptions, AioClientOptions, BlockingServerOptions, AioServerOptions]


@pytest.mark.parametrize("options", ALL)
def test_what_type_checkers_know_is_what_there_is(options: type[LinkOptions]) -> None:
    keywords = getattr(module, options.__name__.replace("Options", "Keywords"))
    assert {one.name for one in fields(options)} == set(get_type_hints(keywords))
    assert not keywords.__required_keys__


@pytest.mark.parametrize("options", FRONTS)
def test_each_has_a_default_and_a_sentence(options: type[LinkOptions]) -> None:
    made = options.of({})
    for one in fields(options):
        assert one.metadata["text"].endswith("."), one.name
        with pytest.raises(FrozenInstanceError):
            setattr(made, one.name, None)


def test_values_are_checked_and_named() -> None:
    made = BlockingClientOptions.of({"timeout_s": 3, "wire_dtype": "bfloat16", "call_timeout_s": None, "spin_us": 0})
    assert (made.timeout_s, made.call_timeout_s, made.spin_us, made.overlap) == (3.0, None, 0.0, False)
    wrong: list[tuple[type[LinkOptions], dict[str, Any], str]] = [
        (ClientOptions, {"timeout_s": -1}, "timeout_s: -1, expected 0 to 1e\\+06 seconds, as a number"),
        (ClientOptions, {"call_timeout_s": "x"}, "call_timeout_s: 'x', expected 0 to"),
        (ClientOptions, {"wire_dtype": "int8"}, "wire_dtype: 'int8', expected None, "),
        (LinkOptions, {"codec_threshold_nbytes": 0}, "codec_threshold_nbytes: 0, expected 1 or more, as an int"),
        (AioClientOptions, {"max_queued_nbytes": 0}, "max_queued_nbytes: 0, expected 1 or more, as an int"),
        (ServerOptions, {"insecure": "no"}, "insecure: 'no', expected True or False"),
        (ServerOptions, {"max_connections": -1}, "max_connections: -1, expected 0 or more, as an int"),
    ]
    for options, given, text in wrong:
        with pytest.raises(SettingError, match=f"^{text}"):
            options.of(given)
    with pytest.raises(TypeError, match="unexpected keyword argument 'worker'"):
        AioServerOptions.of({"worker": 2})


def test_a_constructor_shows_them() -> None:
    @documented(AioClientOptions)
    class Made:
        """A thing."""

        def __init__(self, uri: str, **options: Any) -> None: ...

    parameters = inspect.signature(Made).parameters
    assert list(parameters) == ["uri", *(one.name for one in fields(AioClientOptions))]
    assert parameters["timeout_s"].default == 10.0 and parameters["timeout_s"].kind is inspect.Parameter.KEYWORD_ONLY
    assert (Made.__doc__ or "").startswith("A thing.\n\nOptions:\n    arrays: Kind of the tensors")

    class Derived(Made):
        def __init__(self, host: str, port: int = 3) -> None: ...

    assert list(inspect.signature(Derived).parameters) == ["host", "port"]

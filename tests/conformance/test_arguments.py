"""Whatever is given to a public call, what it raises is one of our errors; a call of no such form is Python's own."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from aio_front import Front

import fastsplit
from fastsplit.errors import AddressError, FastsplitError, ListenError, SettingError

ODD: list[Any] = [None, 5, -1, 1.5, float("nan"), True, "x", b"x", [], {}, (), object(), np.ones(2), lambda: 0]


@contextlib.contextmanager
def _ours() -> Iterator[None]:
    with contextlib.suppress(FastsplitError):
        yield


def _echo(call: fastsplit.Call) -> Any:
    return call.tensors


def _keywords(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


@pytest.mark.parametrize("make", [fastsplit.Server, fastsplit.aio.Server, fastsplit.aio.Channel])
def test_what_is_made(unix_uri: str, make: Any) -> None:
    """In its constructor, before anything is opened."""
    args = (unix_uri,) if make is fastsplit.aio.Channel else (unix_uri, {"echo": _echo})
    for value in ODD:
        with pytest.raises(AddressError):
            make(value, *args[1:])
        for name in _keywords(make):
            with _ours():
                make(*args, **{name: value})


@pytest.mark.parametrize("make", [fastsplit.Server, fastsplit.aio.Server])
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"arrays": "jax"}, "arrays 'jax', expected 'auto', 'torch' or 'numpy'"),
        ({"arrays": 5}, "arrays 5, expected 'auto', 'torch' or 'numpy'"),
        ({"workers": 1.5}, "workers: 1.5, expected 0 or more, as an int"),
        ({"insecure": "no"}, "insecure: 'no', expected True or False"),
        ({"pool": None}, "pool: None, expected a fastsplit.memory.Pool"),
        ({"on_segment": 5}, "on_segment: 5, expected None or a function of an address and a size"),
    ],
    ids=str,
)
def test_options_of_a_server(unix_uri: str, make: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(SettingError, match=f"^{text}$"):
        make(unix_uri, {}, **options)


def test_calls(socket_uri: str, front: Front) -> None:
    with front.Server(socket_uri, {"echo": _echo}, arrays="numpy") as server:
        for name in _keywords(fastsplit.Channel if front.name == "blocking" else fastsplit.aio.Channel):
            for value in ODD:
                with _ours(), front.connect(server.uri, **{name: value}):
                    pass
        with front.connect(server.uri, arrays="numpy") as channel:
            for value in ODD:
                for args in ((value,), ("echo", value)):
                    with _ours():
                        channel.call(*args, timeout_s=5)
                for name in ("attribute", "timeout_s", "expect", "wire_dtype", "codec"):
                    with _ours():
                        channel.call("echo", **{name: value})
                for args, options in (((value,), {}), ((3, value), {}), ((3,), {"timeout_s": value})):
                    with _ours():
                        channel.empty(*args, **options)
            assert channel.call("echo", np.ones(2))[0].tolist() == [1, 1]


def test_attributes_of_a_channel(unix_uri: str, front: Front) -> None:
    with fastsplit.Server(unix_uri, {"echo": _echo}):
        with front.connect(unix_uri) as channel:
            for value in ODD:
                own = ("spin_us",) if front.name == "blocking" else ()
                for name in ("call_timeout_s", "codec", "wire_dtype", *own):
                    with _ours():
                        setattr(channel, name, value)
                with _ours():
                    channel.measure(value)
                with _ours():
                    channel.measure(timeout_s=value)
            channel.call_timeout_s = None
            assert channel.call_timeout_s is None
            with pytest.raises(SettingError, match=r"^call_timeout_s: 'x', expected 0 to"):
                channel.call_timeout_s = "x"
            assert channel.call("echo") == ()


def test_closing(unix_uri: str, front: Front) -> None:
    with front.Server(unix_uri, {}) as server:
        for value in ODD:
            if not isinstance(value, (int, float)) or not value >= 0:
                with pytest.raises(SettingError, match=r"^timeout_s: "):
                    server.close(value)
        with front.connect(server.uri) as channel:
            assert not channel.closed


def test_an_address_in_use(unix_uri: str, front: Front) -> None:
    with front.Server(unix_uri, {}):
        with pytest.raises(ListenError, match=f"^{unix_uri}: cannot listen: Address already in use$"):
            with front.Server(unix_uri, {}):
                pass


def test_a_call_that_fits_no_signature_is_pythons() -> None:
    for make in (fastsplit.Server, fastsplit.connect, fastsplit.aio.serve, fastsplit.aio.connect):
        with pytest.raises(TypeError, match="unexpected keyword argument 'worker'") as caught:
            make("unix:///s", {}, worker=2) if "handlers" in inspect.signature(make).parameters else make("x", worker=2)
        assert not isinstance(caught.value, FastsplitError)

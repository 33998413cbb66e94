"""Ctrl-C and SIGTERM end `serve_forever` as `close` would: no traceback, code 0, no socket file left."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

import fastsplit

REPOSITORY = Path(__file__).resolve().parents[2]

BLOCKING = """
server = fastsplit.Server(uri, handlers, arrays="numpy").start()
before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
print("READY", flush=True)
server.serve_forever()
assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
print("closed", os.path.exists(uri.removeprefix("unix://")), flush=True)
"""
AIO = """
async def main():
    server = await fastsplit.aio.serve(uri, handlers, arrays="numpy")
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    print("READY", flush=True)
    await server.serve_forever()
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    print("closed", os.path.exists(uri.removeprefix("unix://")), flush=True)

import asyncio
asyncio.run(main())
"""
# Started with SIGINT ignored (nohup, a shell's background job), a program would ignore it, too.
HEAD = """
import os, signal, sys, time
import fastsplit
signal.signal(signal.SIGINT, signal.default_int_handler)
uri = sys.argv[1]
handlers = {"sleep": lambda call: (print("asleep", flush=True), time.sleep(30)), "echo": lambda call: call.tensors}
"""
SCRIPTS = {"blocking": BLOCKING, "aio": AIO}


@contextmanager
def _running(script: str, *uris: str) -> Iterator[list[subprocess.Popen[str]]]:
    """One process for each address, which are started at the same time."""
    with ExitStack() as stack:
        processes = []
        for uri in uris:
            command = [sys.executable, "-c", HEAD + script, uri]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            process = stack.enter_context(subprocess.Popen(command, text=True, cwd=REPOSITORY, **pipes))
            stack.callback(process.kill)
            processes.append(process)
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "READY\n"
        yield processes


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_signal_closes_the_server(socket_dir: Path, kind: str) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM)
    uris = [f"unix://{socket_dir}/{number}" for number in numbers]
    with _running(SCRIPTS[kind], *uris) as processes:
        for process, number, uri in zip(processes, numbers, uris):
            with fastsplit.connect(uri, arrays="numpy") as channel:
                assert channel.call("echo") == ()
                process.send_signal(number)
                out, err = process.communicate(timeout=20)
            assert (process.returncode, out, err) == (0, "closed False\n", "")
            assert not os.path.exists(uri.removeprefix("unix://"))


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_second_one_while_it_closes_ends_the_program(unix_uri: str, kind: str) -> None:
    """Where a handler takes long."""
    with _running(SCRIPTS[kind].replace('"numpy"', '"numpy", workers=1'), unix_uri) as (process,):
        with fastsplit.connect(unix_uri, arrays="numpy") as channel:
            channel.submit("sleep")
            assert process.stdout is not None
            assert process.stdout.readline() == "asleep\n"
            process.send_signal(signal.SIGTERM)
            while os.path.exists(unix_uri.removeprefix("unix://")):
                time.sleep(0.001)
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=4)  # a close would wait for 5 s
    assert process.returncode == -signal.SIGTERM


@pytest.fixture
def sigterm() -> Iterator[list[int]]:
    """Numbers of the signals that a handler of the program's own was given."""
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    yield came
    signal.signal(signal.SIGTERM, before)


def _later(act: Callable[[], object]) -> None:
    threading.Timer(0.02, act).start()


def test_a_handler_of_the_programs_own_is_left_alone(unix_uri: str, sigterm: list[int]) -> None:
    server = fastsplit.Server(unix_uri, {})
    _later(lambda: (os.kill(os.getpid(), signal.SIGTERM), _later(server.close)))
    server.serve_forever()
    assert sigterm == [signal.SIGTERM]

    async def serve() -> None:
        server = fastsplit.aio.serve(unix_uri, {})
        loop = asyncio.get_running_loop()
        loop.call_later(0.02, os.kill, os.getpid(), signal.SIGTERM)
        loop.call_later(0.04, lambda: closing.append(loop.create_task(server.close())))
        await server.serve_forever()

    closing: list[asyncio.Task[None]] = []
    asyncio.run(serve())
    assert sigterm == [signal.SIGTERM] * 2


def test_in_another_thread_no_signal_is_taken(unix_uri: str) -> None:
    def handlers() -> list[Any]:
        return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    before = handlers()
    server = fastsplit.Server(unix_uri, {})
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    while not server.started:
        time.sleep(0.001)
    assert handlers() == before
    server.close()
    thread.join()

    async def serve() -> None:
        server = fastsplit.aio.serve(unix_uri, {})
        loop = asyncio.get_running_loop()
        loop.call_later(0.01, lambda: seen.append(handlers()))
        loop.call_later(0.02, lambda: closing.append(loop.create_task(server.close())))
        await server.serve_forever()

    closing: list[asyncio.Task[None]] = []
    seen: list[Any] = []
    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    thread.join()
    assert seen == [before]


@contextmanager
def _terminated() -> Iterator[None]:
    """This process gets SIGTERM as soon as that would not end it."""

    def terminate() -> None:
        while signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate)
    thread.start()
    yield
    thread.join()


def test_a_server_that_found_its_address_in_use_may_try_again(unix_uri: str) -> None:
    blocking = fastsplit.Server(unix_uri, {})
    with fastsplit.Server(unix_uri, {}):
        with pytest.raises(fastsplit.ListenError):
            blocking.serve_forever()
    with _terminated():
        blocking.serve_forever()

    async def serve() -> None:
        server = fastsplit.aio.serve(unix_uri, {})
        with fastsplit.Server(unix_uri, {}):
            with pytest.raises(fastsplit.ListenError):
                await server.serve_forever()
        with _terminated():
            await server.serve_forever()

    asyncio.run(serve())
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

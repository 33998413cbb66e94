"""A program that ends or fails ends at once, however its peer has stalled."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

SERVER = """
import sys, time, fastsplit
fastsplit.Server({uri!r}, {{"echo": lambda call: call.tensors}}, arrays="numpy").start()
print("up", flush=True)
time.sleep(60)
"""
CLIENT = """
import os, signal, sys, numpy as np, fastsplit
channel = fastsplit.connect({uri!r}, overlap={overlap}, arrays="numpy", call_timeout_s=60)
channel.call("echo", np.ones(10))
os.kill({pid}, signal.SIGSTOP)
{work}
sys.exit("an error")
"""
SUBMITS = 'channel.submit("echo", np.zeros(2**26, np.uint8))'
IN_A_THREAD = """
import threading, time
threading.Thread(target=channel.call, args=("echo", np.zeros(2**26, np.uint8)), daemon=True).start()
time.sleep(0.2)"""
CONNECTS = """
import asyncio
async def main():
    connecting = asyncio.ensure_future(fastsplit.aio.connect({uri!r}, timeout_s=60)._open())
    await asyncio.sleep(0.2)
    raise SystemExit("an error")
asyncio.run(main())"""
STALLED_CLIENT = """
import numpy as np, fastsplit, time
channel = fastsplit.connect({uri!r}, arrays="numpy")
channel.submit("large")
print("up", flush=True)
time.sleep(60)
"""
STALLED_SERVER = """
import asyncio, subprocess, sys, threading, time, numpy as np, fastsplit
answering = threading.Event()
def large(call):
    answering.set()
    return np.zeros(2**26, np.uint8)
def stall(uri):
    command = [sys.executable, "-c", {client!r}.replace("URI", uri)]
    client = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    print(client.pid, flush=True)
    client.stdout.readline()
    client.send_signal(19)
    answering.wait(10)
    time.sleep(0.2)
{serve}
"""
BLOCKING = """
server = fastsplit.Server({uri!r}, {{"large": large}}, arrays="numpy", workers={workers}).start()
stall(server.uri)
sys.exit("an error")"""
AIO = """
async def main():
    server = await fastsplit.aio.serve({uri!r}, {{"large": large}}, arrays="numpy", workers={workers})
    await asyncio.get_running_loop().run_in_executor(None, stall, server.uri)
    raise SystemExit("an error")
asyncio.run(main())"""


def _ends_at_once(code: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        started = time.monotonic()
        try:
            _, err = process.communicate(timeout=20)
        finally:
            process.kill()
        assert time.monotonic() - started < 10, "it waited for its peer"
        assert process.returncode == 1
        assert err == "an error\n"


@pytest.fixture
def uri(unix_uri: str) -> str:
    return unix_uri + "?shm=off"


@pytest.fixture
def stalled(uri: str) -> Iterator[int]:
    """The process of a server that is about to be stopped."""
    with subprocess.Popen([sys.executable, "-c", SERVER.format(uri=uri)], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None and server.stdout.readline()
        yield server.pid
        server.send_signal(signal.SIGCONT)
        server.kill()


@pytest.mark.parametrize(
    ("overlap", "work"), [(True, SUBMITS), (False, IN_A_THREAD), (True, IN_A_THREAD)], ids=["submit", "call", "both"]
)
def test_a_client_of_a_stalled_server(uri: str, stalled: int, overlap: bool, work: str) -> None:
    _ends_at_once(CLIENT.format(uri=uri, overlap=overlap, pid=stalled, work=work))


def test_a_client_that_connects_to_a_stalled_server(uri: str, stalled: int) -> None:
    _ends_at_once(CLIENT.format(uri=uri, overlap=False, pid=stalled, work=CONNECTS.format(uri=uri)))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("serve", [BLOCKING, AIO], ids=["blocking", "aio"])
def test_a_server_of_a_stalled_client(uri: str, serve: str, workers: int) -> None:
    client = STALLED_CLIENT.format(uri="URI")
    code = STALLED_SERVER.format(client=client, serve=serve.format(uri=uri, workers=workers))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    pid = 0
    try:
        assert process.stdout is not None and process.stderr is not None
        pid = int(process.stdout.readline())
        started = time.monotonic()
        err = process.stderr.read()
        assert process.wait(20) == 1
        assert time.monotonic() - started < 10, "it waited for its peer"
        assert "an error\n" in err
    finally:
        process.kill()
        process.communicate()
        if pid:
            subprocess.run(["kill", "-9", str(pid)], check=False)

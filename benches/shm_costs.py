"""What bench_shm.py measures beside round trips: a copy into the arena, and what connections cost that only wait.

Its docstring says how each is measured, and what its figures are.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from benches.processes import process
from benches.rounds import interleaved
from benches.transports.pair import Pair

__all__ = ["copy_table", "idle_table", "measure_copies", "measure_idle", "measure_matmul"]

_ROUND_S = 0.1
_MATMUL_SIZE = 1024
_MATMULS = 20  # in each round

# ---- copies ----------------------------------------------------------------------------------------------------------


def measure_copies(pair: Pair, sizes: dict[str, int], rounds: int) -> list[dict[str, Any]]:
    """What a copy into the arena takes, beside numpy's between two warm arrays.

    A call with a tensor from outside is compared with numpy's copy and then a call with a tensor from the arena: both
    have moved the bytes through the caches and let the server fall asleep before they send. `call_share_of_numpy`
    compares with a call alone, while the server spins, and so counts cold caches and the wake-up as copying.
    """
    import torch

    client: Any = pair.client
    channel = client.channel("spinning")
    results = []
    with pair.listening():
        for size, nbytes in sizes.items():
            outside, inside = torch.ones(nbytes // 4), channel.empty((nbytes // 4,), "float32")
            inside.copy_(outside)
            source, target = np.ones(nbytes // 4, np.float32), np.ones(nbytes // 4, np.float32)

            def copy_then_call(source: Any = source, target: Any = target, inside: Any = inside) -> None:
                np.copyto(target, source)
                channel.call("take", inside)

            jobs: dict[str, Callable[[], object]] = {
                "outside": partial(channel.call, "take", outside),
                "numpy, then inside": copy_then_call,
                "inside": partial(channel.call, "take", inside),
                "numpy": partial(np.copyto, target, source),
            }
            seconds: dict[str, list[float]] = {name: [] for name in jobs}
            count = max(int(_ROUND_S / 2 / _seconds(jobs["numpy"], 1)), 3)
            for job in jobs.values():
                _seconds(job, 3)
            copied_nbytes = channel.stats.bytes_copied
            for name in interleaved([list(jobs)], rounds, f"copies, {size}"):
                seconds[name].append(_seconds(jobs[name], count) / count)
            if channel.stats.bytes_copied - copied_nbytes != nbytes * count * rounds:
                raise SystemExit(f"{channel.stats.bytes_copied - copied_nbytes} bytes were copied, not {nbytes} a call")
            median_s = {name: statistics.median(figures) for name, figures in seconds.items()}
            numpy_s = median_s["numpy"]
            rate = nbytes / (median_s["outside"] - (median_s["numpy, then inside"] - numpy_s))
            numpy_rate = nbytes / numpy_s
            results.append(
                {
                    "size": size,
                    "calls_a_round": count,
                    "copy_bytes_per_s": rate,
                    "numpy_bytes_per_s": numpy_rate,
                    "share_of_numpy": rate / numpy_rate,
                    "call_share_of_numpy": numpy_s / (median_s["outside"] - median_s["inside"]),
                    "medians_s": median_s,
                    "rounds_s": seconds,
                }
            )
    return results


def _seconds(job: Callable[[], object], count: int) -> float:
    started_s = time.perf_counter()
    for _ in range(count):
        job()
    return time.perf_counter() - started_s


def copy_table(copies: list[dict[str, Any]]) -> str:
    lines = [
        f"  {one['size']:<10}{one['copy_bytes_per_s'] / 1e9:6.2f} GB/s, "
        f"numpy {one['numpy_bytes_per_s'] / 1e9:.2f} GB/s: {one['share_of_numpy']:.2f} "
        f"({one['call_share_of_numpy']:.2f} with the wake-up that it delays)"
        for one in copies
    ]
    return "\n".join(["", "a copy into the arena", *lines])


# ---- idle ------------------------------------------------------------------------------------------------------------


def measure_idle(pair: Pair, idle_s: float) -> dict[str, float]:
    """CPU seconds of both sides in `idle_s` seconds without a call, right after a thousand of them."""
    client: Any = pair.client
    with pair.listening():
        for _ in range(1000):
            client.channel("spinning").call("echo")
    with pair.listening() as served:
        cpu_s = time.process_time()
        time.sleep(idle_s)
        cpu_s = time.process_time() - cpu_s
    return {"idle_s": idle_s, "client_cpu_s": cpu_s, "server_cpu_s": served["cpu_s"]}


def measure_matmul(rounds: int) -> dict[str, Any]:
    """A matrix product alone and beside two connections that would have something to spin for."""
    import torch

    torch.set_num_threads(1)
    left, right = torch.rand(_MATMUL_SIZE, _MATMUL_SIZE), torch.rand(_MATMUL_SIZE, _MATMUL_SIZE)
    product = torch.empty(_MATMUL_SIZE, _MATMUL_SIZE)

    def multiply() -> None:
        torch.mm(left, right, out=product)

    seconds: dict[str, list[float]] = {"alone": [], "beside": []}
    others_cpu_s, calls, wall_s = 0.0, 0, 0.0
    with process("benches.idle_peer", "serve") as server, process("benches.idle_peer", "call", server.ready) as caller:
        _seconds(multiply, _MATMULS)
        for name in interleaved([list(seconds)], rounds, "matmul"):
            if name == "beside":
                caller.write_line("go")
                caller.read_line()
            started_s = time.perf_counter()
            seconds[name].append(_seconds(multiply, _MATMULS) / _MATMULS)
            if name == "beside":
                wall_s += time.perf_counter() - started_s
                caller.write_line("stop")
                said = json.loads(caller.read_line())
                others_cpu_s += said["cpu_s"]
                calls += said["calls"]
    median_s = {name: statistics.median(figures) for name, figures in seconds.items()}
    return {
        "size": _MATMUL_SIZE,
        "alone_s": median_s["alone"],
        "beside_s": median_s["beside"],
        "ratio": median_s["beside"] / median_s["alone"],
        "caller_cpu_share": others_cpu_s / wall_s,
        "calls_per_s": calls / wall_s,
        "rounds_s": seconds,
    }


def idle_table(idle: dict[str, float], matmul: dict[str, Any]) -> str:
    alone_ms, beside_ms = matmul["alone_s"] * 1e3, matmul["beside_s"] * 1e3
    return (
        f"idle for {idle['idle_s']:g} s: CPU {idle['client_cpu_s']:.4f} s client, {idle['server_cpu_s']:.4f} s server\n"
        f"a {matmul['size']}^3 product in one thread: alone {alone_ms:.2f} ms, "
        f"beside two connections {beside_ms:.2f} ms: {matmul['ratio']:.3f}\n"
        f"    (they make {matmul['calls_per_s']:.0f} calls/s, "
        f"for which their caller uses {matmul['caller_cpu_share']:.3f} of a core)"
    )

"""The two scripts as two processes: what they print, what they count, and how they fail."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastsplit
from fastsplit import gpu_side as gpu_side_script
from fastsplit import tee_side
from fastsplit.executor import device as devices
from fastsplit.executor.service import Executor
from fastsplit.models import open_model
from fastsplit.split.plan import PLANS
from fastsplit.tee import open as open_module
from fastsplit.tee.open import share_cores
from fastsplit.tee.remote import RemoteModel
from fastsplit.wire.transport import spin

pytest.importorskip("transformers")
from lazy_driver import LazyDriver
from split import load_hf, make_model, relative_error

ROOT = Path(fastsplit.__file__).parent.parent
KEYS = {
    "plan": str,
    "plan_wanted": str,
    "plan_reason": str,
    "link": dict,
    "cast": str,
    "cast_reason": str,
    "codec": str,
    "codecs": dict,
    "wire_dtype": str,
    "tee_dtype": str,
    "lanes": int,
    "lanes_reason": str,
    "uri": str,
    "shm": bool,
    "shm_reason": str,
    "native": bool,
    "model": str,
    "prompt_tokens": int,
    "new_tokens": int,
    "tokens": list,
    "text": str,
    "top_logits": list,
    "rpc_calls": int,
    "setup_calls": int,
    "bytes_sent": int,
    "bytes_received": int,
    "bytes_shared": int,
    "bytes_copied": int,
    "wall_s": float,
    "prefill_s": float,
    "decode_s": float,
    "serialization_s": float,
    "communication_s": float,
    "gpu_compute_s": float,
    "tee_compute_s": float,
    "ops": dict,
}


class GpuSide:
    """A GPU side that is ready."""

    def __init__(self, *args: str, listen: str, by_path: bool = False) -> None:
        script = [str(ROOT / "fastsplit" / "gpu_side.py")] if by_path else ["-m", "fastsplit.gpu_side"]
        self.process = subprocess.Popen(
            [sys.executable, *script, "--listen", listen, *args], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("READY uri="), line
        self.uri = line.strip().removeprefix("READY uri=")

    def stop(self, number: int = signal.SIGTERM) -> int:
        assert self.process.stdout is not None
        self.process.send_signal(number)
        try:
            code = self.process.wait(20)
        finally:
            self.process.kill()
        assert self.process.stdout.read() == "", "stdout has the READY line and nothing else"
        self.process.stdout.close()
        return code


def run(module: str, *args: str, by_path: bool = False, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    script = [str(ROOT / "fastsplit" / f"{module}.py")] if by_path else ["-m", f"fastsplit.{module}"]
    return subprocess.run(
        [sys.executable, *script, *args], capture_output=True, text=True, timeout=timeout_s, cwd=ROOT, check=False
    )


def inside(module: str, *args: str) -> subprocess.CompletedProcess[str]:
    """What `run` gives, in this process: without the second or more that Python and torch take to start.

    Each kind of result and each exit code is also looked at from outside, by at least one test.
    """
    main = {"tee_side": tee_side.main, "gpu_side": gpu_side_script.main}[module]
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # which a script would set for itself, and for whom it starts
        code = main(args)
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def executor(directory: Path, uri: str) -> Iterator[str]:
    """What a GPU side serves, in this process; its URI."""
    with fastsplit.Server(uri, Executor(open_model(str(directory))).handlers, arrays="torch") as server:
        yield server.uri


@pytest.fixture(scope="module")
def gpu_side(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[GpuSide, Path]]:
    directory = tmp_path_factory.mktemp("scripts")
    make_model(directory / "model", {})
    side = GpuSide("--model", str(directory / "model"), listen=f"unix://{directory}/gpu.sock")
    yield side, directory / "model"
    assert side.stop() == 0
    assert not (directory / "gpu.sock").exists()


@pytest.mark.parametrize("plan", PLANS)
def test_json_is_one_document_with_hf_logits(gpu_side: tuple[GpuSide, Path], plan: str) -> None:
    side, model = gpu_side
    ids = [5, 17, 80, 3, 3, 42]
    prompt = ",".join(map(str, ids))
    flags = ("--model", str(model), "--plan", plan, "--format", "json", "--max-new-tokens", "5")
    runs = run if plan == "folded" else inside
    done = runs("tee_side", "--connect", side.uri, "--prompt-ids", prompt, *flags)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    report: dict[str, Any] = json.loads(done.stdout)
    assert {key: type(report[key]) for key in KEYS} == KEYS
    reference = load_hf(model)
    logits = reference(torch.tensor([ids])).logits[0, -1].detach()
    top = torch.tensor([value for _, value in report["top_logits"]])
    assert [index for index, _ in report["top_logits"]] == logits.topk(10).indices.tolist()
    assert relative_error(top, logits.topk(10).values) <= 1e-5
    expected = reference.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False)[0, len(ids) :]
    assert report["tokens"] == expected.tolist()
    assert (report["prompt_tokens"], report["new_tokens"]) == (6, 5)
    assert (report["plan"], report["plan_wanted"], report["plan_reason"]) == (plan, plan, "")
    assert (report["cast"], report["codecs"]) == ("off", {})
    assert report["cast_reason"] == "shared memory: nothing travels"
    assert report["link"] == {"rtt_s": None, "send_bytes_per_s": None, "receive_bytes_per_s": None}
    per_layer, once = PLANS[plan].call_counts
    assert report["rpc_calls"] == 5 * (per_layer * 3 + once)
    assert report["setup_calls"] == 4, "describe, tee_weights, open, close"
    assert report["shm"] is True
    ids_sent = 0 if plan == "tee-attention" else 6 + 4  # which looks them up here
    selected = 1 if PLANS[plan].folds else 0
    assert report["bytes_copied"] == 8 * (ids_sent + selected), "token ids, and the prompt's row that is wanted"
    assert report["bytes_shared"] > 10_000 > report["bytes_copied"]
    parts = ("serialization_s", "communication_s", "gpu_compute_s", "tee_compute_s")
    assert sum(report[part] for part in parts) == pytest.approx(report["wall_s"], rel=0.02)
    assert sum(op["total_s"] for op in report["ops"].values()) == pytest.approx(
        report["gpu_compute_s"] + report["tee_compute_s"]
    )
    assert {op["side"] for op in report["ops"].values()} == {"gpu", "tee"}


def test_a_plan_that_this_model_cannot_have_is_another_one_and_the_report_says_why(tmp_path: Path) -> None:
    make_model(tmp_path / "model", {"model_type": "qwen2"})
    with executor(tmp_path / "model", f"unix://{tmp_path}/gpu.sock") as uri:
        flags = ("--connect", uri, "--model", str(tmp_path / "model"), "--prefill", "5", "--max-new-tokens", "2")
        reason = "qwen2: biases of q and k come between the products"
        for name in ("minimal", "linear"):  # and its name of before
            done = inside("tee_side", *flags, "--plan", name, "--format", "json")
            report = json.loads(done.stdout)
            assert (report["plan"], report["plan_wanted"], report["plan_reason"]) == ("folded", "minimal", reason)
            assert report["rpc_calls"] == 2 * (3 * 3 + 1)
        text = inside("tee_side", *flags, "--plan", "linear").stderr
        assert f"\nplan folded instead of minimal: {reason}\n" in text
        report = json.loads(inside("tee_side", *flags, "--wire-dtype", "float16", "--format", "json").stdout)
        reason = "float16: the residual stream may leave its range"
        assert (report["plan"], report["plan_wanted"], report["plan_reason"]) == ("fused", "auto", reason)
        assert (report["dtype"], report["wire_dtype"], report["tee_dtype"]) == ("float32", "float16", "float16")


def test_text_goes_to_stdout_and_the_report_to_stderr(gpu_side: tuple[GpuSide, Path], tmp_path: Path) -> None:
    side, _model = gpu_side
    trace = tmp_path / "trace.json"
    done = run(
        "tee_side",
        "--connect",
        side.uri,
        "--prefill",
        "9",
        "--max-new-tokens",
        "4",
        "--trace",
        str(trace),
        by_path=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 4
    assert "warning: configuration and norm weights come from the GPU side" in done.stderr
    assert "\nshared memory: yes, " in done.stderr
    assert f"\ncompiled core: {'yes' if fastsplit.native else 'no'}\n" in done.stderr
    assert ", plan folded, " in done.stderr
    words = ("RPC calls", "serialization", "embedding+linear", "matmul+linear", "linear+lm_head", "rmsnorm", "rotary")
    for word in (*words, "softmax", "silu", "sampling"):
        assert word in done.stderr
    events = json.loads(trace.read_text())["traceEvents"]
    assert {event["name"] for event in events} >= {"linear", "matmul", "softmax"}
    assert all(event["dur"] >= 0 for event in events if event["ph"] == "X")


def test_without_shared_memory_the_report_says_why(gpu_side: tuple[GpuSide, Path]) -> None:
    side, _ = gpu_side
    flags = ("--connect", f"{side.uri}?shm=off", "--prefill", "9", "--max-new-tokens", "1")
    done = inside("tee_side", *flags)
    assert (done.returncode, done.stdout.count("\n")) == (0, 1), done.stderr
    assert "\nshared memory: no, off: the client's URI says shm=off\n" in done.stderr
    report = json.loads(inside("tee_side", *flags, "--format", "json").stdout)
    assert (report["shm"], report["shm_reason"]) == (False, "off: the client's URI says shm=off")
    assert report["bytes_copied"] == report["bytes_shared"] == 0


def test_max_new_tokens_0_stops_after_the_prompt(gpu_side: tuple[GpuSide, Path]) -> None:
    side, _ = gpu_side
    flags = ("--prefill", "20", "--max-new-tokens", "0", "--format", "json")
    first, second = (json.loads(inside("tee_side", "--connect", side.uri, *flags).stdout) for _ in range(2))
    assert first["rpc_calls"] == 3 * 3 + 1
    assert (first["tokens"], first["decode_s"]) == ([], 0)
    assert first["top_logits"] == second["top_logits"], "the ids are seeded"


@pytest.mark.usefixtures("sigint")
def test_text_prompts_with_a_tokenizer(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<unk>": 0, "why": 1, "is": 2, "the": 3, "sky": 4, "blue": 5}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    make_model(tmp_path, {"vocab_size": len(words)})
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    template = "{% for m in messages %}is {{ m['content'] }}{% endfor %}"
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template})
    )
    (tmp_path / "prompt.txt").write_text("why is")
    with executor(tmp_path, "tcp://127.0.0.1:0") as uri:
        flags = ("--connect", uri, "--model", str(tmp_path), "--max-new-tokens", "6")
        plain = json.loads(inside("tee_side", *flags, "--prompt", "why is", "--format", "json").stdout)
        assert plain["prompt_tokens"] == 2
        inverse = {index: word for word, index in words.items()}
        assert plain["text"].split() == [inverse[token] for token in plain["tokens"]]
        streamed = inside("tee_side", *flags, "--prompt-file", str(tmp_path / "prompt.txt"))
        assert streamed.stdout == plain["text"] + "\n"
        chat = json.loads(inside("tee_side", *flags, "--prompt", "why is", "--format", "json", "--chat").stdout)
        assert chat["prompt_tokens"] == 3


@pytest.mark.matrix(one_in=2, each=False)
@pytest.mark.parametrize("pause_s", [0.01, 0.1])
def test_a_second_interrupt_changes_nothing(socket_dir: Path, pause_s: float) -> None:
    """It comes while the server closes, or while the interpreter ends."""
    command = [sys.executable, "-m", "fastsplit.gpu_side", "--model", "random:tiny", "--listen"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    with subprocess.Popen([*command, f"unix://{socket_dir}/s"], **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("READY")
        process.send_signal(signal.SIGINT)
        time.sleep(pause_s)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")
    assert not (socket_dir / "s").exists()


FAILURES = {
    "no flags": ((), 2, "--connect"),
    "no prompt": (("--connect", "unix:///x"), 2, "--prompt"),
    "two prompts": (("--connect", "unix:///x", "--prompt", "a", "--prefill", "1"), 2, "not allowed with"),
    "unknown plan": (("--connect", "unix:///x", "--prefill", "1", "--plan", "best"), 2, "--plan"),
    "not a number": (("--connect", "unix:///x", "--prompt-ids", "1,b"), 2, "numbers"),
    "not an address": (("--connect", "http://x", "--prefill", "1"), 2, "scheme 'http'"),
    "text without a tokenizer": (("--connect", "unix:///x", "--prompt", "a"), 2, "tokenizer"),
    "no such model": (("--connect", "unix:///x", "--prefill", "1", "--model", "/nowhere"), 1, "no such directory"),
    "no such prompt file": (("--connect", "unix:///x", "--prompt-file", "/nowhere"), 2, "tokenizer"),
    "GPU side absent, unix": (("--connect", "unix:///nowhere.sock", "--prefill", "1"), 3, "cannot connect"),
    "GPU side absent, tcp": (("--connect", "tcp://127.0.0.1:1", "--prefill", "1"), 3, "cannot connect"),
}


FROM_OUTSIDE = ("no flags", "no such model", "GPU side absent, unix", "no model", "model directory missing")


@pytest.mark.parametrize("name", FAILURES)
def test_tee_side_failures_have_one_line_and_their_code(name: str) -> None:
    args, code, text = FAILURES[name]
    done = (run if name in FROM_OUTSIDE else inside)("tee_side", *args)
    assert done.returncode == code
    assert done.stdout == ""
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if "tee_side: " in line]) == 1


def test_prompts_that_do_not_fit(gpu_side: tuple[GpuSide, Path]) -> None:
    side, _ = gpu_side
    for flags, text in (
        (("--prompt-ids", "97"), "prompt ids 97 to 97, expected 0 to 96"),
        (("--prefill", "500", "--max-new-tokens", "13"), "the model has 512 positions"),
    ):
        done = inside("tee_side", "--connect", side.uri, *flags)
        assert done.returncode == 2
        assert text in done.stderr


def test_verification_failure(gpu_side: tuple[GpuSide, Path], tmp_path: Path) -> None:
    side, _ = gpu_side
    make_model(tmp_path, {}, seed=1)
    done = inside("tee_side", "--connect", side.uri, "--prefill", "3", "--model", str(tmp_path))
    assert (done.returncode, done.stdout) == (5, "")
    assert "verification: norm weights: 7 of 7 differ" in done.stderr


GPU_FAILURES = {
    "no model": ((), 2, "--model"),
    "model directory missing": (("--model", "/nowhere"), 1, "no such directory"),
    "unknown preset": (("--model", "random:huge"), 1, "preset 'huge'"),
    "unknown device": (("--model", "random:tiny", "--device", "tpu"), 1, "device 'tpu'"),
    "off loopback": (("--model", "random:tiny", "--listen", "tcp://0.0.0.0:0"), 2, "refused to listen"),
    "no such folder": (("--model", "random:tiny", "--listen", "unix:///nowhere/x.sock"), 1, "cannot listen"),
}


@pytest.mark.parametrize("name", GPU_FAILURES)
def test_gpu_side_failures_have_one_line_and_their_code(name: str) -> None:
    args, code, text = GPU_FAILURES[name]
    done = (run if name in FROM_OUTSIDE else inside)("gpu_side", *args)
    assert done.returncode == code
    assert done.stdout == ""
    assert text in done.stderr
    assert "Traceback" not in done.stderr


def test_port_and_path_in_use(gpu_side: tuple[GpuSide, Path]) -> None:
    side, _ = gpu_side
    done = inside("gpu_side", "--model", "random:tiny", "--listen", side.uri)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Address already in use" in done.stderr
    with fastsplit.Server("tcp://127.0.0.1:0", {}) as server:
        done = inside("gpu_side", "--model", "random:tiny", "--listen", server.uri)
    assert done.returncode == 1
    assert "Address already in use" in done.stderr
    with fastsplit.connect(side.uri, arrays="numpy") as channel:
        assert "config" in channel.call("describe").attrs, "the first one goes on serving"


class _Stop(Exception):
    pass


@pytest.mark.parametrize(
    ("cuda", "threads", "env", "expected"),
    [
        (False, 2, None, 0.0),
        (False, 1, None, None),
        (True, 2, None, None),
        (False, 2, "30", None),
    ],
    ids=["all cores", "a core is left", "a device", "the user's word"],
)
def test_the_gpu_side_spins_only_on_cores_that_it_does_not_compute_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cuda: bool, threads: int, env: str | None, expected: float | None
) -> None:
    given: dict[str, Any] = {}

    def server(uri: str, handlers: Any, **options: Any) -> None:
        given.update(options)
        raise _Stop

    monkeypatch.setattr(gpu_side_script, "Server", server)
    monkeypatch.setattr(spin, "cores", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(devices, "open_device", lambda name: devices.Cuda(LazyDriver()) if cuda else devices.Cpu())
    monkeypatch.delenv("FASTSPLIT_SPIN_US", raising=False)
    if env is not None:
        monkeypatch.setenv("FASTSPLIT_SPIN_US", env)
    args = gpu_side_script._parser().parse_args(["--model", "random:tiny", "--listen", f"unix://{tmp_path}/s"])
    with pytest.raises(_Stop):
        gpu_side_script._serve(args)
    assert given["spin_us"] == expected


@pytest.mark.parametrize(("threads", "query", "expected"), [(2, "", 0.0), (1, "", 50.0), (2, "?shm=off", 50.0)])
def test_the_tee_side_does_not_spin_on_cores_that_the_gpu_side_computes_with(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    threads: int,
    query: str,
    expected: float,
) -> None:
    executor = Executor(open_model("random:tiny"))

    def describe(call: fastsplit.Call) -> None:
        executor.handlers["describe"](call)
        call.reply_attrs["threads"] = threads

    found: list[float] = []

    def share(channel: fastsplit.Channel, model: RemoteModel) -> None:
        share_cores(channel, model)
        found.append(channel.spin_us)

    monkeypatch.setattr(spin, "cores", lambda: 2)
    monkeypatch.delenv("FASTSPLIT_SPIN_US", raising=False)
    monkeypatch.setattr(open_module, "share_cores", share)
    handlers = {**executor.handlers, "describe": describe}
    with fastsplit.Server(f"unix://{tmp_path}/s", handlers, arrays="torch") as server:
        flags = ("--model", "random:tiny", "--prefill", "3", "--max-new-tokens", "2")
        assert tee_side.main(["--connect", server.uri + query, *flags]) == 0, capfd.readouterr().err
    assert found == [expected]


def test_lanes_that_are_asked_for_run_in_each_plan(gpu_side: tuple[GpuSide, Path]) -> None:
    side, model = gpu_side
    flags = ("--model", str(model), "--prefill", "300", "--max-new-tokens", "2", "--format", "json", "--lanes", "2")
    found = {
        plan: json.loads(inside("tee_side", "--connect", side.uri, *flags, "--plan", plan).stdout)
        for plan in ("folded", "minimal")
    }
    assert {plan: report["lanes"] for plan, report in found.items()} == {"folded": 2, "minimal": 2}
    assert found["folded"]["tokens"] == found["minimal"]["tokens"]


def test_a_network_link_is_measured_and_what_is_chosen_for_it_is_said(tmp_path: Path) -> None:
    make_model(tmp_path, {})
    with executor(tmp_path, "tcp://127.0.0.1:0") as uri:
        flags = ("--connect", uri, "--model", str(tmp_path), "--prefill", "300", "--max-new-tokens", "3")
        forced = ("--plan", "folded", "--lanes", "3", "--cast", "float16", "--codec", "zlib")
        done = inside("tee_side", *flags, *forced, "--format", "json")
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert {key: type(report[key]) for key in KEYS} == KEYS
        assert (report["plan"], report["plan_reason"]) == ("folded", "")
        assert (report["lanes"], report["lanes_reason"]) == (3, "asked for")
        assert (report["cast"], report["cast_reason"], report["codec"]) == ("float16", "asked for", "zlib")
        assert 0 < report["link"]["rtt_s"] < 1
        cast = report["codecs"]["float16"]
        assert set(cast) == {"tensors", "raw_nbytes", "wire_nbytes", "ratio", "encode_s", "decode_s"}
        assert cast["tensors"] > 0 and cast["ratio"] == pytest.approx(2, rel=0.1)
        for line in ("plan folded: asked for", "lanes 3: asked for", "cast float16: asked for"):
            assert f"tee_side: {line}\n" in done.stderr
        plain = json.loads(inside("tee_side", *flags, "--cast", "off", "--codec", "off", "--format", "json").stdout)
        assert (plain["codec"], plain["codecs"], plain["cast"]) == ("off", {}, "off")
        assert report["bytes_received"] < 0.7 * plain["bytes_received"]  # small tensors are not cast
        assert report["top_logits"][0][0] == plain["top_logits"][0][0]


@pytest.mark.parametrize(("flag", "value"), [("--cast", "float32"), ("--codec", "rar")])
def test_casts_and_codecs_that_there_are_not(capsys: pytest.CaptureFixture[str], flag: str, value: str) -> None:
    assert tee_side.main(["--connect", "unix:///x", "--prefill", "1", flag, value]) == 2
    assert flag in capsys.readouterr().err


@pytest.mark.parametrize("lanes", ["0", "-1", "17", "x"])
def test_lanes_that_there_are_not(lanes: str) -> None:
    done = inside("tee_side", "--connect", "unix:///x", "--prefill", "1", "--lanes", lanes)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--lanes" in done.stderr


@pytest.mark.matrix(one_in=2, each=False)
@pytest.mark.parametrize("scheme", ["unix", "tcp"])
def test_gpu_side_killed_in_the_middle(tmp_path: Path, scheme: str) -> None:
    listen = f"unix://{tmp_path}/gpu.sock" if scheme == "unix" else "tcp://127.0.0.1:0"
    side = GpuSide("--model", "random:tiny", listen=listen, by_path=True)
    flags = ("--prefill", "2", "--max-new-tokens", "500", "--ignore-eos")
    tee = subprocess.Popen(
        [sys.executable, "-m", "fastsplit.tee_side", "--connect", side.uri, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert tee.stdout is not None
    tee.stdout.read(1)  # it is decoding
    side.stop(signal.SIGKILL)
    killed_at = time.monotonic()
    _, stderr = tee.communicate(timeout=20)
    assert tee.returncode == 3
    assert "tee_side: connection: " in stderr
    assert "Traceback" not in stderr
    assert time.monotonic() - killed_at < 5


def test_a_stalled_gpu_side_ends_in_a_deadline(tmp_path: Path) -> None:
    side = GpuSide("--model", "random:tiny", listen=f"unix://{tmp_path}/gpu.sock")
    side.process.send_signal(signal.SIGSTOP)
    try:
        done = inside("tee_side", "--connect", side.uri, "--prefill", "2", "--connect-timeout-s", "1")
        assert done.returncode == 3
        assert "no handshake within 1.0 s" in done.stderr
    finally:
        side.process.send_signal(signal.SIGCONT)
        assert side.stop() == 0

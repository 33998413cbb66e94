"""The demonstration: its model is converted faithfully, and its runner leaves nothing behind, whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
from demo.run import DemoError, start_gpu_side, stop
from demo.smollm2 import ConversionError, cached_dir, gguf_path, model_dir

ROOT = Path(__file__).resolve().parents[2]
CHAT_END = "<|im_end|>"


@pytest.fixture(scope="module")
def directory() -> Path:
    try:
        return model_dir()
    except ConversionError as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.matrix(one_in=0)
@pytest.mark.timeout(300)
def test_the_converted_model_is_the_packaged_one(directory: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = gguf_path()
    packaged = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    converted = AutoModelForCausalLM.from_pretrained(directory)
    tokenizers = [
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name),
        AutoTokenizer.from_pretrained(directory),
    ]
    messages = [{"role": "user", "content": "Why is the sky blue?\n\tIn 2026, it's  naïve to ask: 1 + 1 = 2."}]
    prompts = [
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        for tokenizer in tokenizers
    ]
    assert torch.equal(prompts[0]["input_ids"], prompts[1]["input_ids"])
    with torch.inference_mode():
        logits = [model(**prompts[0]).logits for model in (packaged, converted)]
    assert torch.equal(*logits)
    assert not hasattr(converted.config, "quantization_config")
    assert converted.generation_config.eos_token_id == tokenizers[1].convert_tokens_to_ids(CHAT_END)
    assert tokenizers[1].eos_token == CHAT_END


def test_the_cache_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cached_dir() == tmp_path / "cache" / "fastsplit" / "smollm2-135m-instruct"
    for unset in ("", "relative/to/nothing"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert cached_dir() == tmp_path / "home" / ".cache" / "fastsplit" / "smollm2-135m-instruct"


def test_a_failed_conversion_leaves_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Path, target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("demo.smollm2.gguf_path", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr("demo.smollm2.convert", fail)
    with pytest.raises(KeyboardInterrupt):
        model_dir()
    assert [path.name for path in (tmp_path / "fastsplit").iterdir()] == ["smollm2-135m-instruct.lock"]


def test_a_gpu_side_that_fails_says_why_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    started_s = time.monotonic()
    with pytest.raises(DemoError, match="exit code 1") as failed:
        start_gpu_side(tmp_path / "missing", tmp_path / "demo.sock")
    assert failed.value.exit_code == 1
    assert time.monotonic() - started_s < 30
    assert "missing" in capfd.readouterr().err  # the GPU side's own words


def test_a_gpu_side_that_is_never_ready_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match=r"not ready within 0\.01 s"):
        start_gpu_side(tmp_path, tmp_path / "demo.sock", timeout_s=0.01)


def test_stop_kills_what_does_not_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("demo.run._STOP_TIMEOUT_S", 0.2)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    stop(process)
    assert process.returncode == -signal.SIGKILL


def _left_in(directory: Path) -> list[str]:
    """What the demo has left there. A directory that torch makes, and keeps, is torch's."""
    return [path.name for path in directory.iterdir() if not path.name.startswith("torchinductor_")]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_demo_completes_a_prompt(directory: Path, tmp_path: Path) -> None:
    done = _demo(tmp_path, "--prompt", "What is the capital of France?", "--max-new-tokens", "16")
    out, err = done.communicate(timeout=240)
    assert done.returncode == 0, err
    assert "Paris" in out
    assert "READY" not in out
    assert "RPC calls" in err
    assert _left_in(tmp_path) == []  # the socket's directory was here


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("sigint")
@pytest.mark.matrix(one_in=2, each=False)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing(directory: Path, socket_dir: Path, number: signal.Signals) -> None:
    """A socket's path in there must be short."""
    process = _demo(socket_dir, "--max-new-tokens", "4000")
    assert process.stderr is not None
    for line in process.stderr:  # until both sides run
        if "starting the TEE side" in line:
            break
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert _left_in(socket_dir) == []
    assert subprocess.run(["pgrep", "-f", str(socket_dir)], stdout=subprocess.DEVNULL).returncode == 1


def _demo(directory: Path, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "demo.run", *args],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(directory)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

"""What tee_side prints of a model's tokens, and what it says where a tokenizer or a chat template fails."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import subprocess
import sys
import tty
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
from split import make_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import fastsplit
from fastsplit import tee_side
from fastsplit.errors import ModelError
from fastsplit.executor.service import Executor
from fastsplit.models import open_model

VOCAB = 290
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2, TinyLlama, Mistral and Gemma have it."""
    bytes_ = {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    words = {word: 259 + index for index, word in enumerate(("▁Hello", "a", "▁", "é", "▁▁", "\ufffd", "\n", "▁."))}
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **bytes_, **words}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=inner, **SPECIAL)


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2, Llama 3 and Qwen have it."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab.update({char: 3 + index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))})
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("<|end|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, **SPECIAL)


def word_pieces(clean_up: bool = False) -> PreTrainedTokenizerFast:
    words = ("<unk>", "do", "n", "'", "t", "s", "##x", ".", "!", "it")
    inner = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", clean_up_tokenization_spaces=clean_up)


def metaspace() -> PreTrainedTokenizerFast:
    words = ("<unk>", "▁Hello", "a", "▁", "é", "▁▁")
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


def stream(tokenizer: Any, tokens: list[int]) -> tuple[str, str, list[str]]:
    """What is printed, what the printer says the text is, what was printed after each token."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        printer = tee_side._Printer(tokenizer, True)
        steps = []
        for token in tokens:
            printer.add(token)
            steps.append(out.getvalue())
        text = printer.finish()
    return out.getvalue(), text, steps


@pytest.mark.parametrize("make", [byte_fallback, byte_level, word_pieces, metaspace])
def test_pieces_make_the_text(make: Callable[[], Any], capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = make()
    some = [token for token in range(VOCAB) if tokenizer.decode([token])] + [0, 2, VOCAB]  # special and unknown ones
    likely = some + [token for token in some if token > 256] * 20
    for seed in range(100):
        draw = random.Random(seed)
        tokens = [draw.choice(likely if seed % 2 else some) for _ in range(draw.randint(1, 25))]
        printed, text, _ = stream(tokenizer, tokens)
        assert text == tokenizer.decode(tokens, skip_special_tokens=True)
        assert printed == text + "\n", tokens
    assert capsys.readouterr().err == ""


def test_text_is_printed_when_more_tokens_cannot_change_it() -> None:
    ids = byte_fallback().get_vocab()
    names = ["▁Hello", "<0x0A>", "▁Hello", "<0xE4>", "<0xB8>", "<0x96>", "</s>", "a", "<0x0A>", "<0x98>", "▁Hello"]
    printed, text, steps = stream(byte_fallback(), [ids[name] for name in names])
    hello, world = "Hello\n Hello", "Hello\n Hello世a"
    assert steps == ["Hello", "Hello", *[hello] * 5, *[world] * 3, f"{world}\ufffd\ufffd Hello"]
    assert printed == f"{text}\n" == f"{world}\ufffd\ufffd Hello\n"
    ids = byte_level().get_vocab()
    tokens = byte_level()("aé\n世")["input_ids"]
    assert stream(byte_level(), tokens)[2] == ["a", "a", "aé", "aé\n", "aé\n", "aé\n", "aé\n世"]
    assert stream(byte_level(), tokens[:-1])[0] == "aé\n\ufffd\n", "what is left at the end is printed"


def test_a_tokenizer_that_changes_what_was_printed_is_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = word_pieces(clean_up=True)
    tokens = tokenizer.convert_tokens_to_ids(["it", "do", "n", "'", "t", "s"])
    tokenizer.clean_up_tokenization = lambda text: text.replace(" n ' t", "n't")
    printed, text, steps = stream(tokenizer, tokens)
    assert text == "it don't s"
    assert steps[2] == "it do n"
    assert printed == "it do n ' \nit don't s\n".replace(" ' ", " '")
    note = "tee_side: the tokenizer changed text that was printed already; here is all of it\n"
    assert capsys.readouterr().err == note


# ---- the script ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Where a model is served, and its directory."""
    directory = tmp_path_factory.mktemp("text") / "model"
    make_model(directory, {"vocab_size": VOCAB, "num_hidden_layers": 1})
    handlers = Executor(open_model(str(directory))).handlers
    with fastsplit.Server(f"unix://{tmp_path_factory.mktemp('uri')}/s", handlers, arrays="torch") as server:
        yield server.uri, directory


def run(served: tuple[str, Path], *flags: str, out: Any = None) -> tuple[int, str, str]:
    uri, directory = served
    out, err = io.StringIO() if out is None else out, io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # which a script would set for itself, and for whom it starts
        code = tee_side.main(["--connect", uri, "--model", str(directory), "--max-new-tokens", "2", *flags])
    return code, out.getvalue() if isinstance(out, io.StringIO) else "", err.getvalue()


HOT = ("--prompt-ids", "259", "--temperature", "50", "--max-new-tokens", "120", "--ignore-eos")


@pytest.mark.parametrize("make", [byte_fallback, byte_level])
def test_tokens_of_a_hot_sampler_are_printed_to_the_end(
    served: tuple[str, Path], tmp_path: Path, make: Callable[[], Any]
) -> None:
    make().save_pretrained(tmp_path)
    for seed in ("0", "1", "2"):
        flags = (*HOT, "--tokenizer", str(tmp_path), "--seed", seed)
        code, _, err = run(served, *flags, "--format", "json", out=(document := io.StringIO()))
        report = json.loads(document.getvalue())
        assert (code, report["new_tokens"]) == (0, 120), err
        assert "\ufffd" in report["text"]
        code, printed, err = run(served, *flags)
        assert (code, printed) == (0, report["text"] + "\n")
        assert "prefill" in err


def test_on_a_terminal_nothing_is_acted_upon(served: tuple[str, Path], tmp_path: Path) -> None:
    byte_level().save_pretrained(tmp_path)
    flags = (*HOT, "--tokenizer", str(tmp_path))
    text = json.loads(run(served, *flags, "--format", "json")[1])["text"]
    ours, theirs = os.openpty()
    try:
        tty.setraw(theirs)  # else it makes \r\n of \n
        with open(theirs, "w", encoding="utf-8", closefd=False) as terminal:
            code, _, err = run(served, *flags, out=terminal)
            terminal.write("\0")
        shown = b""
        while not shown.endswith(b"\0"):
            shown += os.read(ours, 65536)
    finally:
        os.close(ours)
        os.close(theirs)
    assert code == 0, err
    printed = shown[:-1].decode()
    assert "\x1b" in text or "\x9b" in text or any(ord(char) < 32 for char in text)
    assert not [char for char in printed if char not in "\n\t" and (ord(char) < 32 or 127 <= ord(char) < 160)]
    assert printed == fastsplit.printable.for_terminal(text) + "\n"


def test_an_escape_sequence_in_two_tokens_is_none_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdout", out := Terminal())
    tokenizer = byte_level()
    printer = tee_side._Printer(tokenizer, True)
    for token in tokenizer("a\x1b[2J\t\u202e\x9bé\n")["input_ids"]:
        printer.add(token)
    assert printer.finish() == "a\x1b[2J\t\u202e\x9bé\n"
    assert out.getvalue() == "a\\x1b[2J\t\\u202e\\x9bé\n\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_output_that_cannot_have_every_character(served: tuple[str, Path], tmp_path: Path, encoding: str) -> None:
    byte_fallback().save_pretrained(tmp_path)
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding)
    code, _, err = run(served, *HOT, "--tokenizer", str(tmp_path), out=out)
    assert code == 0, err
    assert rb"\ufffd" in raw.getvalue()


# ---- what fails ------------------------------------------------------------------------------------------------------


def one_line(result: tuple[int, str, str]) -> str:
    code, out, err = result
    assert out == ""
    assert code in (1, 2), err
    lines = [line for line in err.splitlines() if "[transformers]" not in line]
    assert len(lines) == 1 and lines[0].isprintable(), err
    return lines[0]


TEMPLATES: dict[str, tuple[Any, str]] = {
    "it raises": (
        "{{ raise_exception('a system\nmessage, please\x1b[2J') }}",
        "TemplateError: a system message, please",
    ),
    "several, none is the default": (
        {"rag": "x", "tool_use": "y"},
        "ValueError: This model has multiple chat templates",
    ),
    "broken": ("{% for m in messages %}{{ m.content }", "TemplateSyntaxError: unexpected '}'"),
    "a name that is not there": ("{{ messages[1].content }}", "UndefinedError: list object has no element 1"),
    "a filter that is not there": ("{{ messages | nothing }}", "TemplateAssertionError: No filter named 'nothing'"),
    "a division by zero": ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
    "what is not safe": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError: "),
    "no end": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError: "),
    "no Unicode": ("{{ '\\ud800' }}", "Error: "),
    "none": (None, "the tokenizer has no chat template"),
    "nothing comes out": ("{# #}", "an empty prompt, expected one token or more"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_that_fails_is_one_line(served: tuple[str, Path], tmp_path: Path, name: str) -> None:
    template, text = TEMPLATES[name]
    tokenizer = byte_level()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    line = one_line(run(served, "--tokenizer", str(tmp_path), "--chat", "--prompt", "hi"))
    assert text in line
    assert line.startswith("tee_side: --chat: ") or "empty prompt" in line


def test_chat_templates_that_work(served: tuple[str, Path], tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = {"default": "<s>{{ messages[0].content }}!", "rag": "x"}
    tokenizer.save_pretrained(tmp_path)
    flags = ("--tokenizer", str(tmp_path), "--chat", "--prompt", "hi", "--format", "json")
    code, out, err = run(served, *flags)
    assert code == 0, err
    assert json.loads(out)["prompt_tokens"] == 4


FILES: dict[str, tuple[dict[str, bytes | None], str]] = {
    "no tokenizer.json": ({"tokenizer.json": None}, "no tokenizer.json there"),
    "not JSON": ({"tokenizer.json": b"what?"}, ": "),
    "not a tokenizer": ({"tokenizer.json": b"{}"}, ": "),
    "a list": ({"tokenizer.json": b"[1]"}, ": "),
    "empty": ({"tokenizer.json": b""}, ": "),
    "not UTF-8": ({"tokenizer.json": b"\xff\xfe"}, ": "),
    "a configuration that is not JSON": ({"tokenizer_config.json": b"{"}, ": "),
    "code of its own": (
        {
            "tokenizer_config.json": b'{"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", null]}}',
            "mine.py": b"raise SystemExit(7)",
        },
        "trust_remote_code",
    ),
    "a template that is not UTF-8": ({"chat_template.jinja": b"\xff"}, "UnicodeDecodeError: "),
}


@pytest.mark.parametrize("name", FILES)
def test_a_tokenizer_that_cannot_be_opened_is_one_line(served: tuple[str, Path], tmp_path: Path, name: str) -> None:
    files, text = FILES[name]
    byte_level().save_pretrained(tmp_path)
    for file, data in files.items():
        (tmp_path / file).unlink() if data is None else (tmp_path / file).write_bytes(data)
    line = one_line(run(served, "--tokenizer", str(tmp_path), "--prompt", "hi"))
    assert line.startswith(f"tee_side: tokenizer {str(tmp_path)!r}: ") and text in line


MERGES = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}
STRIP = [
    {"type": "Replace", "pattern": {"Regex": "[^x]"}, "content": "x"},
    {"type": "Strip", "content": "x", "start": 0, "stop": 9},
]
TEMPLATE = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}
PANICS: dict[str, tuple[dict[str, Any], str]] = {
    "opening": ({"model": MERGES}, "tokenizer '"),
    "encoding": (
        {"post_processor": {**TEMPLATE, "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}]}},
        "tokenizer: the prompt: ",
    ),
    "decoding": ({"decoder": {"type": "Sequence", "decoders": STRIP}}, "tokenizer: decoding "),
}


@pytest.mark.parametrize("name", PANICS)
def test_a_panic_of_native_code_is_one_line(
    served: tuple[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    changes, text = PANICS[name]
    byte_level().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    line = one_line(run(served, "--tokenizer", str(tmp_path), "--prompt", "hi", "--ignore-eos"))
    assert line.startswith(f"tee_side: {text}") and "PanicException" in line
    assert capfd.readouterr() == ("", "")


def test_what_native_code_prints_is_no_part_of_the_result(
    served: tuple[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    byte_level().save_pretrained(tmp_path)
    token = {"content": "<s>", "special": True, "an option\x1b[2J": 1}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": token}))
    code, out, err = run(served, "--tokenizer", str(tmp_path), "--prompt", "hi", "--format", "json")
    assert code == 0 and json.loads(out)["prompt_tokens"] == 2
    assert "tee_side: Ignored unknown kwarg option an option\\x1b[2J\n" in err
    assert capfd.readouterr() == ("", "")


def test_what_transformers_says_of_a_models_files_is_printable(served: tuple[str, Path], tmp_path: Path) -> None:
    byte_level().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil\x1b[2J\n\x9b"}))
    flags = ("--tokenizer", str(tmp_path), "--prompt", "hi", "--max-new-tokens", "1", "--connect", served[0])
    script = [sys.executable, "-m", "fastsplit.tee_side", *flags]
    result = subprocess.run(script, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert all(line.isprintable() for line in result.stderr.split("\n"))
    assert "tee_side: [transformers] You are using a model of type `evil\\x1b[2J\n" in result.stderr


class _Panic(BaseException):
    """What a panic of the tokenizers' Rust is to Python."""


class _Broken:
    """A tokenizer that fails in one method."""

    chat_template = "x"

    def __init__(self, inner: Any, method: str, error: BaseException) -> None:
        self._inner, self._method, self._error = inner, method, error

    def __call__(self, text: str) -> Any:
        return self._get("__call__")(text)

    def __getattr__(self, name: str) -> Any:
        return self._get(name)

    def _get(self, name: str) -> Any:
        if name == self._method:
            raise self._error
        return getattr(self._inner, name)


@pytest.mark.parametrize(
    "error", [ValueError("bad\nid \x1b[2J"), KeyError(5), _Panic("index out of range"), Exception()]
)
@pytest.mark.parametrize(
    ("method", "flags", "text"),
    [
        ("__call__", ("--prompt", "hi"), "tokenizer: the prompt"),
        ("apply_chat_template", ("--prompt", "hi", "--chat"), "--chat"),
        ("decode", ("--prompt", "hi"), "tokenizer: decoding 1 tokens"),
        ("decode", ("--prompt", "hi", "--format", "json"), "tokenizer: decoding 2 tokens"),
        ("convert_ids_to_tokens", ("--prompt", "hi"), "tokenizer: token "),
    ],
    ids=["encoding", "chat", "decoding", "decoding, json", "tokens"],
)
def test_whatever_a_tokenizer_raises_is_one_line(
    served: tuple[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    flags: tuple[str, ...],
    text: str,
    error: BaseException,
) -> None:
    monkeypatch.setattr(tee_side, "_open_tokenizer", lambda *_: _Broken(byte_level(), method, error))
    line = one_line(run(served, *flags, "--ignore-eos"))
    assert line.startswith(f"tee_side: {text}")
    assert type(error).__name__ in line


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ModelError("ours")])
def test_what_is_not_the_tokenizers_passes(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, tee_side._tokenizer_failures("x"):
        raise error
    assert caught.value is error


def test_a_prompt_that_is_not_unicode_or_not_the_models_is_one_line(served: tuple[str, Path], tmp_path: Path) -> None:
    byte_level().save_pretrained(tmp_path)
    line = one_line(run(served, "--tokenizer", str(tmp_path), "--prompt", "hi \udcff"))
    assert line == "tee_side: the prompt is not UTF-8 text"
    assert "empty prompt" in one_line(run(served, "--tokenizer", str(tmp_path), "--prompt", ""))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens([f"<extra{index}>" for index in range(40)])
    tokenizer.save_pretrained(tmp_path)
    line = one_line(run(served, "--tokenizer", str(tmp_path), "--prompt", "hi <extra39>"))
    assert f"expected 0 to {VOCAB - 1}" in line

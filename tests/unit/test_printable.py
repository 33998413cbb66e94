"""What others say, on our terminals and in our logs: nothing but printable characters."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
from aio_front import Front
from raw_peer import ABORT, connected, frame

import fastsplit
from fastsplit import cli, errors
from fastsplit.errors import ConnectError, FastsplitError, RemoteOpError, RemoteProtocolError
from fastsplit.printable import for_terminal, get_logger, one_line, trace

EVIL = "\x1b[2J\x07\x9b31m\r\nWARNING fastsplit: all is well\x7f\u202e\u2028\u200b\udcff\0"
EVIL_SHOWN = r"\x1b[2J\x07\x9b31m\r\nWARNING fastsplit: all is well\x7f\u202e\u2028\u200b\udcff\x00"


def test_one_line_of_printable_characters() -> None:
    assert one_line(EVIL) == EVIL_SHOWN
    assert one_line("Grüße, 世界 \\n") == "Grüße, 世界 \\n"
    assert one_line("A" * 5000) == "A" * 1000 + "... (5000 characters)"
    assert one_line("\0" * 900) == (r"\x00" * 250) + "... (900 characters)"
    assert one_line("\t" * 5000, limit=None) == r"\t" * 5000
    assert one_line(one_line(EVIL)) == EVIL_SHOWN


def test_on_a_terminal_text_stays_text() -> None:
    text = "Grüße,\n\t世界\u3000\xa0 क्\u200dष 👩\u200d🔬 \ufffd"
    assert for_terminal(text) == text
    assert for_terminal("a\n" + EVIL) == "a\n" + EVIL_SHOWN.replace(r"\n", "\n")
    controls = {chr(code) for code in (*range(32), *range(127, 160))} - {"\n", "\t"}
    others = {"\xad", "\u061c", "\u200b", "\u200e", *map(chr, range(0x2028, 0x202F)), *map(chr, range(0x2060, 0x2065))}
    others |= {*map(chr, range(0x2066, 0x2070)), "\ufeff", "\U000e0041", "\ud800"}
    for char in controls | others:
        assert for_terminal(f"x{char}y") == f"x{char.encode('unicode_escape').decode()}y"
    assert for_terminal("\x1b") + for_terminal("[2J") == r"\x1b[2J", "in pieces, too"


ERRORS = [value for name, value in vars(errors).items() if name in errors.__all__ and isinstance(value, type)]


@pytest.mark.parametrize("kind", [kind for kind in ERRORS if kind is not RemoteOpError])
def test_the_text_of_every_error_is_one_line(kind: type[FastsplitError]) -> None:
    assert str(kind(f"the peer says {EVIL}")) == f"the peer says {EVIL_SHOWN}"
    assert str(kind()) == ""


def test_a_remote_error_shows_one_line_and_keeps_what_came() -> None:
    error = RemoteOpError(f"op{EVIL}", f"ValueError: {EVIL}")
    assert str(error) == f"op{EVIL_SHOWN}: ValueError: {EVIL_SHOWN}"
    assert (error.op, error.message) == (f"op{EVIL}", f"ValueError: {EVIL}")
    assert str(ConnectError(2, "no such\nfile")) == r"[Errno 2] no such\nfile"


def test_a_traceback_has_the_texts_of_others_in_one_line_each() -> None:
    def fail() -> None:
        try:
            raise KeyError(EVIL)
        except KeyError as error:
            raise ValueError(f"came: {EVIL}") from error

    with pytest.raises(ValueError, match="came") as caught:
        fail()
    lines = trace(caught.value).split("\n")
    assert all(line.isprintable() for line in lines)
    assert f"ValueError: came: {EVIL_SHOWN}" in lines
    assert any(line.startswith("KeyError: ") for line in lines)
    assert any(line.startswith('  File "') and line.endswith("in fail") for line in lines)
    assert any(line.strip() == 'raise ValueError(f"came: {EVIL}") from error' for line in lines)
    assert not any(line.startswith("WARNING") for line in lines)


class _Capture(logging.Handler):
    """The lines that a plain handler prints."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines += self.format(record).split("\n")


@pytest.fixture
def logged() -> Any:
    handler = _Capture()
    root, loggers = logging.getLogger(), [logging.getLogger(f"fastsplit.{name}") for name in ("server", "channel")]
    levels = [logger.level for logger in loggers]
    root.addHandler(handler)
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
    yield handler.lines
    root.removeHandler(handler)
    for logger, level in zip(loggers, levels):
        logger.setLevel(level)


def test_a_logger_prints_a_message_as_one_line(logged: list[str]) -> None:
    logger = get_logger("fastsplit.server")
    logger.warning("%s: %d%%: %s", "uri", 5, EVIL)
    logger.warning("100% sure")
    assert logged == [f"uri: 5%: {EVIL_SHOWN}", "100% sure"]
    assert get_logger("fastsplit.server") is logger and len(logger.filters) == 1


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["blocking", "aio"])
def test_a_servers_log_has_the_peers_texts_in_one_line(
    unix_uri: str, kind: str, workers: int, logged: list[str]
) -> None:
    def fail(call: fastsplit.Call) -> None:
        raise ValueError(f"{call.attrs['text']}")

    front = Front(kind)
    try:
        with front.Server(unix_uri, {f"op{EVIL[:-2]}": fail}, workers=workers) as server:
            with connected(server.uri) as peer:
                peer.greet()
                peer.send(frame(ABORT, attrs={"text": EVIL[:-2]}))
                assert peer.receive() is None
            with front.connect(server.uri) as channel:
                with pytest.raises(RemoteOpError) as caught:
                    channel.call(f"op{EVIL[:-2]}", text=EVIL[:-2])
        shown = EVIL_SHOWN[: EVIL_SHOWN.index(r"\udcff")]
        assert str(caught.value) == f"op{shown}: ValueError: {shown}"
        assert f"{server.uri}: a connection ended: the peer ended the connection: {shown}" in logged
        assert f"ValueError: {shown}" in logged, "the handler's traceback"
        assert any("the handler of 'op" in line for line in logged)
        assert all(line.isprintable() for line in logged)
        assert not any(line.startswith("WARNING fastsplit") for line in logged)
    finally:
        front.close()


def test_a_channels_errors_have_the_peers_texts_in_one_line(unix_uri: str, serve: Callable[..., Any]) -> None:
    def abort(call: fastsplit.Call) -> None:
        raise fastsplit.errors.ModelError(EVIL[:-2])

    server = serve(unix_uri, {"x": abort})
    with fastsplit.connect(server.uri) as channel, pytest.raises(RemoteOpError) as caught:
        channel.call("x")
    assert str(caught.value).isprintable()
    error = RemoteProtocolError(f"the peer ended the connection: {EVIL}")
    assert str(error) == f"the peer ended the connection: {EVIL_SHOWN}"


# ---- the scripts -----------------------------------------------------------------------------------------------------


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "expected"),
    [(io.StringIO, EVIL[:-2] + "é\n"), (_Terminal, EVIL_SHOWN[:-10].replace(r"\n", "\n") + "é\n")],
    ids=["a pipe", "a terminal"],
)
def test_results_are_escaped_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO], expected: str
) -> None:
    out = stream()
    monkeypatch.setattr(sys, "stdout", out)
    cli.write(EVIL[:-2])
    cli.write("é\n")
    assert out.getvalue() == expected
    monkeypatch.setattr(sys, "stdout", None)
    cli.write("nobody reads")


@pytest.mark.parametrize(
    ("encoding", "expected"), [("ascii", b"\\xe9\\u4e16\\udcff"), ("latin-1", b"\xe9\\u4e16\\udcff")]
)
def test_what_an_encoding_lacks_is_escaped(monkeypatch: pytest.MonkeyPatch, encoding: str, expected: bytes) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding))
    cli.write("é世\udcff")
    assert raw.getvalue() == expected


def test_what_a_script_says_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    cli.tell("tee_side", EVIL)
    record = logging.LogRecord("other", logging.ERROR, "", 0, "%s", (EVIL,), None)
    try:
        raise ValueError(EVIL)
    except ValueError:
        record.exc_info = sys.exc_info()
    text = cli._Formatter("tee_side: %(message)s").format(record)
    assert capsys.readouterr().err == f"tee_side: {EVIL_SHOWN}\n"
    assert text.startswith(f"tee_side: {EVIL_SHOWN}\n")
    assert text.endswith(f"\nValueError: {EVIL_SHOWN}")
    assert all(line.isprintable() for line in text.split("\n"))


def test_flags_that_are_refused_are_shown_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    parser = cli.make_parser("tee_side", "")
    with pytest.raises(SystemExit) as stop:
        parser.parse_args([f"--x{EVIL}"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith(f": error: unrecognized arguments: --x{EVIL_SHOWN}\n")


def test_what_others_print_meanwhile_is_told_in_printable_lines(capfd: pytest.CaptureFixture[str]) -> None:
    print("before")
    with cli.retold("tee_side"):
        os.write(1, b"native: \x1b[2J\n\xff\n\n")
        os.write(2, EVIL[:8].encode())
    print("after")
    out, err = capfd.readouterr()
    assert out == "before\nafter\n"
    lines = [r"tee_side: native: \x1b[2J", r"tee_side: \xff", f"tee_side: {one_line(EVIL[:8])}"]
    assert err.splitlines() == lines


def test_of_what_others_print_before_an_error_nothing_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    @cli.retold("tee_side")
    def panic() -> None:
        os.write(2, b"thread panicked\n")
        raise KeyError

    with pytest.raises(KeyError):
        panic()
    os.write(1, b"out")
    os.write(2, b"err")
    assert capfd.readouterr() == ("out", "err")


def test_a_descriptor_that_was_closed_from_the_start_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What has its number by now is the connection, for example."""
    monkeypatch.setattr(sys, "__stdout__", None)
    with cli.retold("tee_side"):
        os.write(1, b"to a peer")
    assert capfd.readouterr() == ("to a peer", "")

"""What a person types in a chat: edited lines, messages of several lines, and a history that the next chat has."""

import io
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from terminals import Terminal

from jaxgen.cli.keyboard import Keyboard, history_file

pytest.importorskip("readline")

ECHO = """
from jaxgen.cli.keyboard import Keyboard
keyboard = Keyboard()
while (line := keyboard.read()) is not None:
    print(f"read {line!r}")
"""


@pytest.fixture
def history(tmp_path: Path) -> Path:
    return tmp_path / "state" / "history"


@pytest.fixture
def echo(history: Path) -> Iterator[Terminal]:
    terminal = Terminal(sys.executable, "-c", ECHO, JAXGEN_CHAT_HISTORY=str(history))
    yield terminal
    terminal.close()


def test_the_next_chat_has_the_last_thousand_lines_of_those_before(history: Path) -> None:
    history.parent.mkdir()
    history.write_text("".join(f"line {number}\n" for number in range(1200)))
    history.chmod(0o644)
    terminal = Terminal(sys.executable, "-c", ECHO, JAXGEN_CHAT_HISTORY=str(history))
    terminal.wait_for("> ")
    terminal.type("\x1b[A\x1b[A\n")  # the arrow key, twice
    terminal.wait_for("read 'line 1198'\r\n> ")
    terminal.type("\x12ne 700\r")  # Ctrl-R, and the key that ends a line
    terminal.wait_for("read 'line 700'\r\n> ")
    terminal.type("\x04")
    assert terminal.process.wait() == 0
    terminal.close()
    lines = history.read_text().splitlines()
    assert lines[0] == "line 202" and lines[-3:] == ["line 1199", "line 1198", "line 700"] and len(lines) == 1000
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


def test_three_quotes_begin_and_end_a_message_of_several_lines(echo: Terminal, history: Path) -> None:
    echo.wait_for("> ")
    for typed, read in {
        '"""a fox\n  and\n\na bird"""\n': "a fox\\n  and\\n\\na bird",
        '"""\n/exit\n"""\n': "//exit",
        '"""one"""\n': "one",
        'what is """ in Python\n': 'what is """ in Python',
    }.items():
        echo.wait_until_it_waits()  # what is typed while the terminal changes its mode can be lost
        echo.type(typed)
        assert f"read {read!r}\r\n".replace("\\\\", "\\") in echo.wait_for("read .*\r\n> ")
    echo.wait_until_it_waits()
    echo.type('"""dropped\n')
    echo.wait_for(r"\.\.\. ")
    echo.wait_until_it_waits()
    echo.type("\x03")
    echo.wait_for("to leave\\)\r\n> ")
    echo.wait_until_it_waits()
    echo.type('"""unfinished\n')
    echo.wait_for(r"\.\.\. ")
    echo.type("\x04")
    echo.wait_for('has no """ at its end, so it is not sent')
    assert echo.process.wait() == 0
    assert "  and\n" in history.read_text() and stat.S_IMODE(history.stat().st_mode) == 0o600


def test_a_history_that_cannot_be_written_is_no_error() -> None:
    terminal = Terminal(sys.executable, "-c", ECHO, JAXGEN_CHAT_HISTORY="/proc/none/history")
    terminal.wait_for("> ")
    terminal.type("hello\n")
    terminal.wait_for("read 'hello'\r\n")
    terminal.close()


def test_a_pipe_leaves_no_history(history: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXGEN_CHAT_HISTORY", str(history))
    monkeypatch.setattr(sys, "stdin", io.StringIO('hello\n"""two\nlines"""\n"""no end\n'))
    keyboard = Keyboard()
    assert [keyboard.read(), keyboard.read(), keyboard.read()] == ["hello", "two\nlines", None]
    assert not history.parent.exists()


def test_the_history_is_in_the_users_state_folder_unless_it_is_off(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("JAXGEN_CHAT_HISTORY", raising=False)
    if sys.platform == "linux":
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
        assert history_file() == tmp_path / "jaxgen" / "chat_history"
    monkeypatch.setenv("JAXGEN_CHAT_HISTORY", "off")
    assert history_file() is None

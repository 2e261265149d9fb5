"""What the user types in `jaxgen chat`: lines that can be edited, messages of several lines, and their history."""

import contextlib
import os
import sys
from collections import deque
from pathlib import Path

from platformdirs import user_state_path

from jaxgen.cli.terminal import say

_MOST_LINES = 1000
_MOST_BYTES = 1 << 22  # a larger history file is not read
_QUOTES = '"""'


class Keyboard:
    """Reads messages and commands from standard input.

    In a terminal, lines are edited with readline, where Python has it, and kept for the next chat in `history_file()`.
    If that file cannot be read or written, there is no history.
    """

    def __init__(self) -> None:
        self._file, self._lines = None, deque[str](maxlen=_MOST_LINES)
        self._terminal = sys.stdin is not None and sys.stdin.isatty()
        if not self._terminal:
            return
        try:
            import readline  # makes `input` editable
        except ImportError:
            return
        self._file = history_file()
        with contextlib.suppress(OSError):
            if self._file is not None and self._file.stat().st_size <= _MOST_BYTES:
                self._lines.extend(self._file.read_text(encoding="utf-8", errors="replace").splitlines())
        readline.clear_history()
        for line in self._lines:
            readline.add_history(line)

    def read(self) -> str | None:
        """The next message or command; None at the end of the input.

        A message between three quotes may have several lines. If it begins with a slash, another slash is added, which
        marks it as a message and not a command.
        """
        while True:
            try:
                line = self._line("> ").strip()
                return line if not line.startswith(_QUOTES) else self._lines_after(line.removeprefix(_QUOTES))
            except EOFError:
                print()
                return None
            except KeyboardInterrupt:
                print("\n(/exit or Ctrl-D to leave)")

    def _lines_after(self, line: str) -> str:
        """Reads the rest of a message, up to the closing quotes; `line` is its first line."""
        lines = [line]
        while not lines[-1].rstrip().endswith(_QUOTES):
            try:
                lines.append(self._line("... "))
            except EOFError:
                say(f"the message has no {_QUOTES} at its end, so it is not sent.")
                raise
        text = "\n".join(lines).rstrip().removesuffix(_QUOTES).strip("\n")
        return f"/{text}" if text.startswith("/") else text

    def _line(self, prompt: str) -> str:
        if sys.stdin is None:
            raise EOFError
        line = input(prompt if self._terminal else "")
        if line.strip() and self._file is not None:
            with contextlib.suppress(OSError, UnicodeError):
                self._remember(self._file, line)
        return line

    def _remember(self, file: Path, line: str) -> None:
        """Appends a line to the file; once the file is full, it is rewritten with the latest lines."""
        full = len(self._lines) == _MOST_LINES
        self._lines.append(line.replace("\n", " "))
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = os.open(file, os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if full else os.O_APPEND), 0o600)
        with open(new, "w", encoding="utf-8") as opened:
            os.chmod(file, 0o600)
            opened.writelines(f"{each}\n" for each in (self._lines if full else [self._lines[-1]]))


def history_file() -> Path | None:
    """`$JAXGEN_CHAT_HISTORY`, else `jaxgen/chat_history` in the user's state folder; None if it is off or there is no
    home folder."""
    where = os.environ.get("JAXGEN_CHAT_HISTORY")
    if where is not None and where.lower() in ("", "off"):
        return None
    file = Path(where) if where else user_state_path("jaxgen", appauthor=False) / "chat_history"
    return file if where or file.is_absolute() else None

"""A line in the terminal that says what the user is waiting for. It disappears when the wait is over.

JAX is not imported here, so that the line appears before the import.
"""

import contextlib
import sys
from collections.abc import Iterator


class Note:
    """Shows at most one line on standard error, and none if that is not a terminal."""

    def __init__(self) -> None:
        self._text = ""

    def show(self, text: str) -> None:
        """Shows a text instead of the last one."""
        if text != self._text and sys.stderr is not None and sys.stderr.isatty():
            self.clear()
            self._text = text
            print(text, end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._text:
            print(f"\r{' ' * len(self._text)}\r", end="", file=sys.stderr, flush=True)
            self._text = ""


@contextlib.contextmanager
def waiting(text: str) -> Iterator[None]:
    """Shows a note while the body runs."""
    note = Note()
    note.show(text)
    try:
        yield
    finally:
        note.clear()

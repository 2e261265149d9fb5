"""An answer on the screen of `jaxgen chat`, and Ctrl-C while it comes."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from jaxgen.cli.note import Note
from jaxgen.generation.text_stream import TextPieces

if TYPE_CHECKING:
    from jaxgen.lazy import PreTrainedTokenizerBase

COMPILING = "compiling, the first answer takes a while ..."


class Screen:
    """Shows an answer as it comes, and before that a note about what the user is waiting for."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self._pieces, self._note = TextPieces(tokenizer), Note()
        self._waiting: list[int] = []
        self._compiles, self._looks, self._ended = False, 0, False

    @property
    def begun(self) -> bool:
        """Whether tokens arrive steadily: the first token comes before the program for the others is compiled."""
        return self._looks > 1

    def note(self, text: str) -> None:
        """Shows a note instead of the last one, in a terminal, until the text comes."""
        if not self._looks and not self._ended:
            self._compiles = text == COMPILING
            self._note.show(text)

    def show(self, ids: np.ndarray) -> None:
        """Shows the text of new token ids, int [T]; nothing after `close`."""
        self._looks += 1
        self._waiting += ids.tolist()
        # If the first program had to be compiled, the note hides the first token until the second program is compiled,
        # too.
        if self._ended or (self._compiles and not self.begun):
            return
        self._note.clear()
        piece, self._waiting = self._pieces.add(self._waiting), []
        print(piece, end="", flush=True)

    def close(self) -> None:
        """Stops showing anything, even if the answer is still being computed."""
        self._ended = True
        self._note.clear()

    def end(self) -> None:
        """Shows the rest of an answer that was not dropped."""
        print(self._pieces.add(self._waiting) + self._pieces.end(), flush=True)


@contextlib.contextmanager
def interruptible(screen: Screen) -> Iterator[Callable[[], bool]]:
    """Yields a function: was Ctrl-C pressed? A second Ctrl-C, or one before the answer has begun, raises."""
    pressed: list[int] = []

    def press(*_: object) -> None:
        pressed.append(1)
        if len(pressed) > 1 or not screen.begun:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)

"""Extracts the new tokens of each chunk while a call runs, for `stream` and for streamers."""

from collections.abc import Callable
from typing import Protocol

import numpy as np

from jaxgen.decoding.loop import Progress
from jaxgen.generation.call import PreparedCall


class Streamer(Protocol):
    """The methods of a transformers streamer that a call uses."""

    def put(self, value: np.ndarray, /) -> object:
        """Gets first the prompts, int32 [rows, P], then at each step the next token of each row, int32 [rows]."""
        ...

    def end(self) -> object: ...


class NewTokens:
    """The tokens since the previous chunk: `new(progress)` is int32 [rows, tokens], for the caller's rows."""

    def __init__(self, prepared: PreparedCall):
        self._rows, self._printed = prepared.rows * prepared.call.strategy.copies, prepared.prompt_length

    def __call__(self, progress: Progress) -> np.ndarray:
        assert progress.text is not None, "beam search has no text before the end"
        printed, self._printed = self._printed, int(progress.length)
        # `text` [N, S] holds prompts and tokens from the left: columns from `printed` up to `length` are new.
        return np.asarray(progress.text)[: self._rows, printed : self._printed]


def to_streamer(streamer: Streamer, prepared: PreparedCall) -> Callable[[Progress], None]:
    """Passes the prompts to a streamer, as transformers does. Returns a function that passes it the new tokens."""
    new = NewTokens(prepared)
    streamer.put(np.repeat(prepared.inputs.input_ids, prepared.call.strategy.copies, axis=0))

    def look(progress: Progress) -> None:
        for column in new(progress).T:
            streamer.put(column)

    return look

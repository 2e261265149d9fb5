"""What a call shows while it runs: the new tokens of each chunk, for `stream` and for streamers."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxgen.decoding.loop import Progress
from jaxgen.generation.call import PreparedCall


class NewTokens:
    """What has come since the last look: `new(progress)` is int32 [rows, T], of the caller's rows."""

    def __init__(self, prepared: PreparedCall):
        self._rows, self._printed = prepared.rows * prepared.call.strategy.copies, prepared.prompt_length

    def __call__(self, progress: Progress) -> np.ndarray:
        assert progress.text is not None, "beams are not watched"
        printed, self._printed = self._printed, int(progress.length)
        return np.asarray(progress.text)[: self._rows, printed : self._printed]


def to_streamer(streamer: Any, prepared: PreparedCall) -> Callable[[Progress], None]:
    """Hands a streamer the prompts, int32 [rows, P], as transformers does, and returns what hands it the new tokens."""
    new = NewTokens(prepared)
    streamer.put(np.repeat(prepared.inputs.input_ids, prepared.call.strategy.copies, axis=0))

    def look(progress: Progress) -> None:
        for column in new(progress).T:
            streamer.put(column)

    return look

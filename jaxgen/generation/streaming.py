"""What a call shows while it runs: the new tokens of each chunk, for `stream` and for streamers."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxgen.decoding.loop import Progress
from jaxgen.generation.call import Call


class NewTokens:
    """What has come since the last look: `new(progress)` is int32 [rows, T], of the caller's rows."""

    def __init__(self, call: Call):
        self._rows, self._seen = call.rows * call.strategy.copies, call.columns

    def __call__(self, progress: Progress) -> np.ndarray:
        assert progress.text is not None, "beams are not watched"
        seen, self._seen = self._seen, int(progress.length)
        return np.asarray(progress.text)[: self._rows, seen : self._seen]


def to_streamer(streamer: Any, call: Call) -> Callable[[Progress], None]:
    """Hands a streamer the prompts, int32 [rows, P], as transformers does, and returns what hands it the new tokens."""
    new = NewTokens(call)
    padded = np.asarray(call.prompt.input_ids)
    prompts = padded[: call.rows, padded.shape[1] - call.columns :]
    streamer.put(np.repeat(prompts, call.strategy.copies, axis=0))

    def look(progress: Progress) -> None:
        for column in new(progress).T:
            streamer.put(column)

    return look

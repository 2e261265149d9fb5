"""The cost of streaming: whole calls with a streamer that does nothing over the same calls without, as a table.

    python bench/streaming.py

The 135M shape with random weights in float32, one row, a 32-token prompt and 128 new tokens without an eos. The calls
alternate; figures are medians. The tokens must be equal, and the second call of each kind must not compile.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from common import positive, random_prompts, record, seconds, varied

import jaxgen
from jaxgen.planning.shapes import SHAPES

PROMPT_TOKENS, NEW_TOKENS = 32, 128


class Watcher:
    """A streamer that does nothing."""

    def put(self, value: np.ndarray) -> None: ...

    def end(self) -> None: ...


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--repeats", type=positive, default=9, help="timed calls of each (default: 9)")
    parser.add_argument("--json", type=Path, help="append the figures to this file, one JSON object per line")
    arguments = parser.parse_args()
    model = jaxgen.from_config(varied(arguments.shape))
    prompt = random_prompts(model.vocab_size, 1, PROMPT_TOKENS)

    def call(**kwargs: Any) -> np.ndarray:
        return jaxgen.generate(model, prompt, max_new_tokens=NEW_TOKENS, eos_token_id=None, **kwargs)

    if not np.array_equal(call(), call(streamer=Watcher())):
        raise SystemExit("The streamed call gave different tokens, so its time is not valid.")
    compiled = jaxgen.compile_counts()
    times: dict[str, list[float]] = {"plain": [], "streamed": []}
    for _ in range(arguments.repeats):
        times["plain"].append(seconds(call))
        times["streamed"].append(seconds(lambda: call(streamer=Watcher())))
    assert jaxgen.compile_counts() == compiled
    plain, streamed = (statistics.median(values) / NEW_TOKENS * 1e3 for values in times.values())
    print(f"{'shape':8} {'plain ms/token':>15} {'streamed':>9} {'ratio':>6}")
    print(f"{arguments.shape:8} {plain:15.3f} {streamed:9.3f} {streamed / plain:6.3f}")
    figures = {"shape": arguments.shape, "plain_ms": plain, "streamed_ms": streamed, "ratio": streamed / plain}
    record(arguments.json, {**figures, "repeats": arguments.repeats})


if __name__ == "__main__":
    main()

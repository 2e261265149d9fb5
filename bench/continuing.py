"""The savings of a kept cache, chunked prefill and kept programs, as a table.

    python bench/continuing.py

The 135M shape with random weights in float32. A prefix of 512 tokens is prefilled once for 16 prompts of 32 more,
against 16 times; a prompt of 1536 tokens is prefilled in chunks of 128, against all at once; and a second process that
finds the programs of the first is timed from the call to its first token. Tokens must be equal.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import positive, random_prompts, record, seconds, varied

import jaxgen
from jaxgen.planning.shapes import SHAPES

PREFIX, OWN, PROMPTS = 512, 32, 16
LONG, CHUNK = 1536, 128
FIRST_TOKEN = """
import sys, time
import numpy as np
import jaxgen

model = jaxgen.load(sys.argv[1])
start = time.perf_counter()
tokens = jaxgen.stream(model, np.arange(3, 35)[None], max_new_tokens=128, eos_token_id=None)
next(tokens)
print(time.perf_counter() - start)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--repeats", type=positive, default=3, help="timed calls of each (default: 3)")
    parser.add_argument("--json", type=Path, help="append the figures to this file, one JSON object per line")
    arguments = parser.parse_args()
    model = jaxgen.from_config(varied(arguments.shape))
    measured = {
        "prefix": prefix(model, arguments.repeats),
        "chunks": chunks(model, arguments.repeats),
        "second process": second_process(model, arguments.repeats),
    }
    print(f"{'what':16} {'without':>12} {'with':>12} {'ratio':>7}")
    for what, figures in measured.items():
        without, with_it, unit = figures["without"], figures["with"], figures["unit"]
        print(f"{what:16} {without:9.3f} {unit:2} {with_it:9.3f} {unit:2} {without / with_it:7.2f}")
        figures |= {"ratio": without / with_it, "repeats": arguments.repeats}
        record(arguments.json, {"shape": arguments.shape, "what": what, **figures})


def prefix(model: Any, repeats: int) -> dict[str, Any]:
    """Seconds to the first token of every prompt."""
    shared, own = random_prompts(model.vocab_size, 1, PREFIX), random_prompts(model.vocab_size, PROMPTS, OWN)
    whole = np.concatenate([np.repeat(shared, PROMPTS, axis=0), own], axis=1)

    def call(prompt: np.ndarray, **kwargs: Any) -> Any:
        arguments = {"max_new_tokens": 1, "eos_token_id": None, "return_dict_in_generate": True}
        return jaxgen.generate(model, prompt, **arguments, **kwargs)

    def reused() -> np.ndarray:
        return call(whole, cache=call(shared).cache).sequences

    if not np.array_equal(call(whole).sequences, reused()):
        raise SystemExit("The shared prefix gave different tokens, so its time is not valid.")
    times: dict[str, list[float]] = {"without": [], "with": []}
    for _ in range(repeats):
        times["without"].append(seconds(lambda: call(whole)))
        times["with"].append(seconds(reused))
    return {**{name: statistics.median(values) for name, values in times.items()}, "unit": "s"}


def chunks(model: Any, repeats: int) -> dict[str, Any]:
    """Megabytes that the program needs besides weights, prompt and result, and the time that chunks cost."""
    prompt = random_prompts(model.vocab_size, 1, LONG)
    arguments = {"max_new_tokens": 2, "eos_token_id": None}
    figures: dict[str, Any] = {"unit": "MB"}
    tokens, times = [], []
    for name, size in (("without", None), ("with", CHUNK)):
        call = jaxgen.prepare(model, prompt, prefill_chunk_size=size, **arguments)
        program = jax.jit(lambda model, call=call: jaxgen.decode(model, call))
        figures[name] = program.lower(model).compile().memory_analysis().temp_size_in_bytes / 1e6
        run = lambda size=size: jaxgen.generate(model, prompt, prefill_chunk_size=size, **arguments)  # noqa: E731
        tokens.append(run())
        times.append(statistics.median(seconds(run) for _ in range(repeats)))
    if not np.array_equal(*tokens):
        raise SystemExit("Chunks gave different tokens, so their memory is not valid.")
    return {**figures, "seconds_without": times[0], "seconds_with": times[1]}


def second_process(model: Any, repeats: int) -> dict[str, Any]:
    """Seconds to the first token in a new process, without programs to find and with."""
    times: dict[str, list[float]] = {"without": [], "with": []}
    with tempfile.TemporaryDirectory() as folder:
        jaxgen.save(model, Path(folder) / "model")
        for number in range(repeats):
            programs = {
                "JAX_COMPILATION_CACHE_DIR": f"{folder}/programs-{number}",
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            }
            for name in times:
                command = [sys.executable, "-c", FIRST_TOKEN, f"{folder}/model"]
                environment = {**os.environ, **programs}
                ended = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
                times[name].append(float(ended.stdout))
    return {**{name: statistics.median(values) for name, values in times.items()}, "unit": "s"}


if __name__ == "__main__":
    main()

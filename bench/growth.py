"""How the time of a decode step grows with the text, the batch and the beams: milliseconds, as tables.

    python bench/growth.py

All lengths are of calls with the same limit, whose cache has grown to the size that it has at that length. The slope
over the length, by least squares, is compared with the time to read the keys and values of one more token at the
bandwidth measured in the same run. The time of a step is the time of a call of some steps minus that of a call of one,
divided by their number; calls alternate, figures are medians, with the range beside them.
"""

import argparse
import copy
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import bandwidth, continued, positive, random_prompts, record, step_times, varied

import jaxgen
from jaxgen.buckets import bucket
from jaxgen.generation.api import prepare_call
from jaxgen.generation.request import Request
from jaxgen.generation.running.driver import cache_sizes
from jaxgen.planning.shapes import SHAPES

FRESH = 16  # columns of a prompt that its call reads, the others being in a cache
PROMPT_TOKENS = 128  # where batch or beams grow


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Until:
    """Ends a text at a length, which is data: another one compiles nothing."""

    length: Any

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
        return jnp.full(len(input_ids), cur_len >= self.length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument(
        "--length", nargs="*", type=int, default=[128, 512, 1024, 2048, 4096, 8192], help="valid columns, from 96 on"
    )
    parser.add_argument("--batch", nargs="*", type=int, default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--beams", nargs="*", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--steps", type=int, default=32, help="of a timed call (default: 32)")
    parser.add_argument("--repeats", type=positive, default=5, help="timed calls of each (default: 5)")
    parser.add_argument("--json", type=Path, help="append the figures to this file, one JSON object per line")
    arguments = parser.parse_args()
    if wrong := [length for length in arguments.length if length < 96 or bucket(length) != length]:
        parser.error(
            f"--length {wrong} are none of 96, 128, 192, 256, 384, ..., for which the calls have the same room."
        )
    room = bucket(max(arguments.length, default=96) + arguments.steps)
    config = varied(arguments.shape) | {"max_position_embeddings": room + 1}
    rate = bandwidth()
    model = jaxgen.from_config(config, dtype=arguments.dtype)
    common = {"shape": arguments.shape, "dtype": arguments.dtype, "steps": arguments.steps, "bandwidth": rate}
    measured = {
        "length": lambda: by_length(model, arguments.length, room, arguments.steps, arguments.repeats),
        "batch": lambda: by_call(model, arguments.batch, "batch", arguments.steps, arguments.repeats),
        "beams": lambda: by_call(model, arguments.beams, "beams", arguments.steps, arguments.repeats),
    }
    for axis, measure in measured.items():
        if not (rows := measure()):
            continue
        print(f"{axis:>8} {'ms/step':>9} {'(range)':>19}")
        for figures in rows:
            spread = "({:.3f} - {:.3f})".format(*figures["step_ms_range"])
            print(f"{figures['value']:8} {figures['step_ms']:9.3f} {spread:>19}", flush=True)
        own = common
        if axis == "length" and len(rows) > 1:
            slope, floor = slopes(rows, model.cache_bytes_per_token, rate)
            own = common | {"slope_ms": slope, "floor_slope_ms": floor}
            print(f"{slope * 1e3:.2f} us per column; its bytes take {floor * 1e3:.2f} us at {rate / 1e9:.1f} GB/s")
        for figures in rows:
            record(arguments.json, {"axis": axis, **own, **figures, "repeats": arguments.repeats})


def by_length(model: Any, lengths: list[int], room: int, steps: int, repeats: int) -> list[dict[str, Any]]:
    """The steps behind texts of so many columns, in calls that may go on to `room` columns."""
    if not lengths:
        return []
    ids = random_prompts(model.vocab_size, 1, max(lengths))
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    arguments = {"prefill_chunk_size": 512, "return_dict_in_generate": True}
    whole = continued(model, ids[:, :-FRESH], 1, **arguments).cache

    slots = {}

    def call(length: int) -> Callable[[int], Any]:
        past = copy.copy(whole)
        past.crop(length - max(lengths))
        keywords = {"cache": past, "max_new_tokens": room - length}
        prepared = prepare_call(model, Request(inputs=ids[:, :length], keywords=keywords))
        slots[length] = next(cache_sizes(prepared, weights)).slots

        def run(steps: int) -> Any:
            until = Until(np.int32(length + 1 + steps))
            return continued(model, ids[:, :length], room - length, cache=past, stopping_criteria=[until])

        return run

    calls = {length: call(length) for length in lengths}
    figures = _steps(calls, steps, repeats)
    # The mean over the steps, each of which attends its own column too.
    return [
        each | {"columns": each["value"] + (steps + 3) / 2, "slots": slots[each["value"]], "room": room}
        for each in figures
    ]


def by_call(model: Any, values: Iterable[int], axis: str, steps: int, repeats: int) -> list[dict[str, Any]]:
    """The steps of calls for so many rows, or of one row for so many beams."""

    def call(value: int) -> Callable[[int], Any]:
        prompts = random_prompts(model.vocab_size, value if axis == "batch" else 1, PROMPT_TOKENS)
        beams = {"num_beams": value} if axis == "beams" else {}
        return lambda steps: continued(model, prompts, steps + 1, **beams)

    return _steps({value: call(value) for value in values}, steps, repeats)


def _steps(calls: dict[int, Callable[[int], Any]], steps: int, repeats: int) -> list[dict[str, Any]]:
    """Milliseconds of a step beyond the first, by the varied value."""
    return [
        {"value": value, "step_ms": statistics.median(taken), "step_ms_range": [min(taken), max(taken)]}
        for value, taken in step_times(calls, steps, repeats).items()
    ]


def slopes(rows: list[dict[str, Any]], bytes_per_column: int, rate: float) -> tuple[float, float]:
    """Milliseconds per column: measured, by least squares, and what its bytes take at `rate` bytes per second."""
    columns, milliseconds = ([each[name] for each in rows] for name in ("columns", "step_ms"))
    return float(np.polyfit(columns, milliseconds, 1)[0]), bytes_per_column / rate * 1e3


if __name__ == "__main__":
    main()

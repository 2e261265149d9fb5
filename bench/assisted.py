"""Prompt lookup beside the plain call: a text that repeats its prompt, and a story that does not.

    python bench/assisted.py
    python bench/assisted.py --model FOLDER_OR_FILE --num-tokens 3 7 --batch 1 8

The calls alternate, so that a machine that slows down slows both; figures are medians. Tokens must be equal. The random
weights of the shapes write no text, so a rule makes them copy: of a loop of words only the next one is allowed.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import positive, record

import jaxgen
from jaxgen.planning.shapes import SHAPES

LOOP = 40  # tokens of the text that is copied


def copies(input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
    """Allows only the token that came `LOOP` tokens before."""
    token = jax.lax.dynamic_slice_in_dim(input_ids, cur_len - LOOP, 1, axis=1)
    return jnp.where(jnp.arange(scores.shape[1])[None] == token, scores, -jnp.inf)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="135m", help="with random weights (default: 135m)")
    parser.add_argument("--model", help="a folder, a GGUF file or a name on the hub, instead of a shape")
    parser.add_argument("--num-tokens", nargs="+", type=positive, default=[3, 7])
    parser.add_argument("--batch", nargs="+", type=positive, default=[1])
    parser.add_argument("--new-tokens", type=positive, default=96)
    parser.add_argument("--repeats", type=positive, default=5, help="timed calls of each (default: 5)")
    parser.add_argument("--json", type=Path, help="append the figures to this file, one JSON object per line")
    arguments = parser.parse_args()
    name = arguments.model or arguments.shape
    model = jaxgen.load(name) if arguments.model else jaxgen.from_config(SHAPES[name])
    for batch in arguments.batch:
        ids = np.random.default_rng(0).integers(3, 1000, (batch, LOOP))
        tasks: dict[str, dict[str, Any]] = {"copy": {"logits_processor": [copies]}, "no copy": {}}
        for task, keywords in tasks.items():
            for num_tokens in arguments.num_tokens:
                call = {"max_new_tokens": arguments.new_tokens, "eos_token_id": None, **keywords}
                row = measured(model, ids, call, num_tokens, arguments.repeats)
                row = {"model": name, "task": task, "batch": batch, "num_tokens": num_tokens, **row}
                print(row, flush=True)
                record(arguments.json, row)


def measured(model: Any, ids: np.ndarray, call: dict[str, Any], num_tokens: int, repeats: int) -> dict[str, Any]:
    """Milliseconds per token of the plain and of the assisted call, and the median of their ratios."""
    mask = np.ones_like(ids)

    def timed(**more: int) -> tuple[float, np.ndarray]:
        begun = time.perf_counter()
        tokens = jaxgen.generate(model, ids, attention_mask=mask, **call, **more)
        return (time.perf_counter() - begun) / call["max_new_tokens"] * 1e3, tokens

    times: list[tuple[float, float]] = []
    for number in range(repeats + 1):
        (plain, expected), (assisted, tokens) = timed(), timed(prompt_lookup_num_tokens=num_tokens)
        np.testing.assert_array_equal(tokens, expected)
        if number:  # the first calls compile
            times.append((plain, assisted))
    plains, others = zip(*times, strict=True)
    speed = statistics.median(plain / assisted for plain, assisted in times)
    return {
        "plain_ms_per_token": round(statistics.median(plains), 3),
        "assisted_ms_per_token": round(statistics.median(others), 3),
        "speed": round(speed, 3),
    }


if __name__ == "__main__":
    main()

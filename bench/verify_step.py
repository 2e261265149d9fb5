"""What the compilers for TPUs expect of the pass that checks drafts: over 4 and 8 columns beside a plain step.

    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python bench/verify_step.py --target v5e --shape 1b    # with jax[tpu]

Compiles a loop of forward passes over so many columns, on a cache whose rows drop some of them again, and adds up the
cycles that the compiler expects of its body; see `compilers.py`. It is a cost model, not a measurement.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from common import positive, record
from compilers import CLOCKS, Case, devices, loop_body, placed, programs, timed
from jax import lax

from jaxgen.base import Model
from jaxgen.planning.shapes import SHAPES

SLOTS = 2048


def passes(model: Model[Any], cache: Any, tokens: jax.Array, count: jax.Array) -> tuple[Any, jax.Array]:
    """Runs `count` passes over int32 [N, T] tokens. Each reads the likeliest tokens after the last ones."""
    columns = tokens.shape[1]

    def step(_: jax.Array, carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
        cache, tokens = carry
        mask = jnp.ones_like(tokens, bool)
        logits, cache, _ = model.extend(cache, tokens, mask, None, (), logits_to_keep=columns)
        following = jnp.argmax(logits, axis=1).astype(jnp.int32).reshape(tokens.shape)
        if columns > 1:
            cache = cache.drop_last(following[:, 0] % columns)
        return cache, following

    return lax.fori_loop(0, count, step, (cache, tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="+", choices=[*CLOCKS], required=True)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, required=True)
    parser.add_argument("--batch", type=positive, default=1)
    parser.add_argument("--columns", nargs="+", type=positive, default=[1, 4, 8])
    parser.add_argument("--json", type=Path, help="append the figures to this file, one JSON object per line")
    arguments = parser.parse_args()
    for target in arguments.target:
        for shape in arguments.shape:
            plain = None
            for columns in arguments.columns:
                milliseconds, seconds = estimated(target, shape, arguments.batch, columns)
                plain = milliseconds if columns == 1 else plain
                row = {"target": target, "shape": shape, "batch": arguments.batch, "columns": columns}
                row |= {"pass_ms": round(milliseconds, 3), "compile_s": round(seconds, 1)}
                row |= {} if plain is None else {"of_plain": round(milliseconds / plain, 3)}
                print(row, flush=True)
                record(arguments.json, row)


def estimated(target: str, shape: str, batch: int, columns: int) -> tuple[float, float]:
    """The milliseconds of a pass, and the seconds of its compilation."""
    model, _, everywhere = programs(Case(target, shape, (1, 1), batch, 64, 64), devices(target, 1))

    def cache(model: Model[Any]) -> Any:
        made = model.make_cache(batch, SLOTS)
        return made if columns == 1 else made.ragged()

    held = jax.tree.map(lambda leaf: placed(leaf, everywhere), jax.eval_shape(cache, model))
    tokens = placed(jax.ShapeDtypeStruct((batch, columns), jnp.int32), everywhere)
    count = placed(jax.ShapeDtypeStruct((), jnp.int32), everywhere)
    compiled, seconds = timed(jax.jit(passes, donate_argnums=1).lower(model, held, tokens, count))
    return sum(each.cycles for each in loop_body(compiled.as_text())) / CLOCKS[target] * 1e3, seconds


if __name__ == "__main__":
    main()

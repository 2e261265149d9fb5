"""The costs and savings of smaller dtypes: milliseconds of a decode step, bytes, and how far the distributions move.

    python bench/quantization.py

Models of the same random weights in float32, bfloat16 and int8 take turns; the time of a step is the time of a call of
some steps minus that of a call of one, divided by their number. The divergence is KL, in nats per token, from the
float32 model of `--model` (by default the bundled one), over texts that this one wrote; beside it, how often the top
token differs. A small model trained on one kind of text says little about a real one.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import continued, positive, random_prompts, record, step_times, varied

import jaxgen
from jaxgen.planning.shapes import SHAPES

KINDS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "float32", "quantize": "int8"},
    "int8, bfloat16": {"dtype": "bfloat16", "quantize": "int8"},
}
PROMPT_TOKENS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--model", type=Path, default=jaxgen.BUNDLED_MODEL, help="folder whose distributions move")
    parser.add_argument("--batch", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--steps", type=int, default=32, help="of a timed call (default: 32)")
    parser.add_argument("--repeats", type=positive, default=5, help="timed calls of each (default: 5)")
    parser.add_argument("--json", type=Path, help="append the figures to this file, one JSON object per line")
    arguments = parser.parse_args()
    moved = {kind: divergence(arguments.model, kind) for kind in KINDS}
    models = {kind: jaxgen.from_config(varied(arguments.shape), **options) for kind, options in KINDS.items()}
    print(
        f"{'weights':16} {'MB':>7} {'KL, nats':>9} {'other token':>11} {'batch':>5} {'ms/step':>8} {'of float32':>10}"
    )
    for batch in arguments.batch:
        steps = step_ms(models, batch, arguments.steps, arguments.repeats)
        for kind, model in models.items():
            figures = {
                "shape": arguments.shape,
                "model": arguments.model.name,
                "weights": kind,
                "bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(model)),
                **moved[kind],
                "batch": batch,
                "step_ms": steps[kind],
                "of_float32": steps[kind] / steps["float32"],
            }
            print(
                f"{kind:16} {figures['bytes'] / 1e6:7.1f} {figures['kl']:9.6f} {figures['other_token']:11.2%} "
                f"{batch:5} {figures['step_ms']:8.2f} {figures['of_float32']:10.2f}",
                flush=True,
            )
            record(arguments.json, figures | {"steps": arguments.steps, "repeats": arguments.repeats})


def divergence(folder: Path, kind: str) -> dict[str, float]:
    """Of a model in this kind of weights from itself in float32, over 16 texts of 128 tokens."""
    wide, model = jaxgen.load(folder, dtype="float32"), jaxgen.load(folder, **KINDS[kind])
    starts = np.full((16, 1), wide.generation_config.bos_token_id)
    texts = jnp.asarray(continued(wide, starts, 127, do_sample=True, top_k=0, key=0))
    log_p, log_q = (jax.nn.log_softmax(jax.jit(type(each).__call__)(each, texts)) for each in (wide, model))
    return {
        "kl": float((jnp.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean()),
        "other_token": float((log_p.argmax(axis=-1) != log_q.argmax(axis=-1)).mean()),
    }


def step_ms(models: dict[str, Any], batch: int, steps: int, repeats: int) -> dict[str, float]:
    prompts = random_prompts(next(iter(models.values())).vocab_size, batch, PROMPT_TOKENS)
    calls = {
        kind: lambda new_tokens, model=model: continued(model, prompts, new_tokens) for kind, model in models.items()
    }
    for call in calls.values():
        if not np.array_equal(call(1 + steps), call(1 + steps)):
            raise SystemExit("the same call gave different tokens, so its times are not valid.")
    return {kind: statistics.median(taken) for kind, taken in step_times(calls, steps, repeats).items()}


if __name__ == "__main__":
    main()

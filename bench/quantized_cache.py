"""The costs and savings of a cache in eight bits: milliseconds of a step behind a long text, bytes, and exactness.

    python bench/quantized_cache.py --columns 4096 --batch 1 8

The model's dtype, int8 and fp8 take turns. Each step continues a kept cache of `--columns` columns; its time is that of
a call of some steps minus that of a call of one, divided by their number.
The divergence is KL, in nats per token, from the same model with a cache in its own dtype. It is measured with
`--model` on the texts of `quantization.py`, over the tokens after each prompt. The next column says how often the top
token differs.
"""

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import cache_options, continued, positive, random_prompts, record, step_times, varied
from quantization import TEXTS, divergence, written
from transformers import AutoTokenizer

import jaxgen
from jaxgen.base import empty_cache
from jaxgen.planning.shapes import SHAPES

BACKENDS = (None, "int8", "fp8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--model", type=Path, default=jaxgen.BUNDLED_MODEL, help="folder whose distributions move")
    parser.add_argument("--batch", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--columns", type=positive, default=4096, help="before the first step (default: 4096)")
    parser.add_argument("--steps", type=int, default=32, help="of a timed call (default: 32)")
    parser.add_argument("--repeats", type=positive, default=5, help="timed calls of each (default: 5)")
    parser.add_argument("--json", type=Path, help="append the figures to this file, one JSON object per line")
    arguments = parser.parse_args()
    moved = divergences(arguments.model, arguments.dtype)
    model = jaxgen.from_config(varied(arguments.shape), dtype=arguments.dtype)
    wide = f"of {arguments.dtype}"
    print(f"{'cache':8} {'KL, nats':>9} {'other token':>11} {'batch':>5} {'MB':>8} {'ms/step':>8} {wide:>12}")
    for batch in arguments.batch:
        prompts = random_prompts(model.vocab_size, batch, arguments.columns)
        pasts = {backend: kept(model, prompts, backend) for backend in BACKENDS}
        longer = np.concatenate([prompts, prompts[:, :1]], axis=1)
        calls = {
            backend: lambda new_tokens, past=past, longer=longer: continued(model, longer, new_tokens, cache=past)
            for backend, past in pasts.items()
        }
        steps = step_times(calls, arguments.steps, arguments.repeats)
        for backend in BACKENDS:
            shares = [mine / wide for mine, wide in zip(steps[backend], steps[None], strict=True)]
            held = jax.eval_shape(partial(empty_cache, model, batch, arguments.columns, backend))
            figures = {
                "shape": arguments.shape,
                "dtype": arguments.dtype,
                "model": arguments.model.name,
                "cache_backend": backend,
                **moved[backend],
                "batch": batch,
                "columns": arguments.columns,
                "cache_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(held.layers)),
                "step_ms": statistics.median(steps[backend]),
                "of_dtype": statistics.median(shares),
                "of_dtype_range": [min(shares), max(shares)],
            }
            print(
                f"{backend or arguments.dtype:8} {figures['kl']:9.6f} {figures['other_token']:11.2%} {batch:5} "
                f"{figures['cache_bytes'] / 1e6:8.1f} {figures['step_ms']:8.2f} {figures['of_dtype']:12.2f}",
                flush=True,
            )
            record(arguments.json, figures | {"steps": arguments.steps, "repeats": arguments.repeats})


def kept(model: Any, prompts: np.ndarray, backend: str | None) -> Any:
    """The cache after the prompts."""
    return continued(model, prompts, 1, return_dict_in_generate=True, **cache_options(backend)).cache


def divergences(folder: Path, dtype: str) -> dict[str | None, dict[str, Any]]:
    """Of the model with each cache from itself with a cache in its dtype; see `quantization.divergence`."""
    model, tokenizer = jaxgen.load(folder, dtype=dtype), AutoTokenizer.from_pretrained(folder)
    texts = {kind: [written(model, tokenizer, kind, begin) for begin in begins] for kind, begins in TEXTS.items()}
    expected = {kind: [log_probabilities(model, *each, None) for each in several] for kind, several in texts.items()}
    return {
        backend: divergence(texts, expected, lambda *text, backend=backend: log_probabilities(model, *text, backend))
        for backend in BACKENDS
    }


@partial(jax.jit, static_argnums=(2, 3))
def log_probabilities(model: Any, texts: jax.Array, prompt_tokens: int, backend: str | None) -> jax.Array:
    """Of the tokens after the first one that follows the prompt, and of one more: [2 * tokens, V].

    The prompt is read first, and then the other tokens, which attend to what the cache holds of it and of each other.
    """
    rows, columns = texts.shape
    mask, rest = jnp.ones(texts.shape, bool), slice(prompt_tokens, None)
    cache = empty_cache(model, rows, prompt_tokens, backend).reserve(columns)
    _, cache, _ = model.extend(cache, texts[:, :prompt_tokens], mask[:, :prompt_tokens])
    logits, _, _ = model.extend(
        cache.grow(columns), texts[:, rest], mask[:, rest], logits_to_keep=columns - prompt_tokens
    )
    return jax.nn.log_softmax(logits)


if __name__ == "__main__":
    main()

"""The costs and savings of smaller dtypes: milliseconds of a decode step, bytes, and how far the distributions move.

    python bench/quantization.py

Models of the same random weights in float32, bfloat16, int8 and int4 take turns; the time of a step is the time of a
call of some steps minus that of a call of one, divided by their number, and its share of float32's is the median over
turns.
The divergence is KL, in nats per token, from the float32 model of `--model` (by default the bundled one), over prose,
code and answers that this one wrote, without the prompts; beside it, how often the top token differs. A small model
trained on one kind of text says little about a real one.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import continued, positive, random_prompts, record, step_times, varied
from transformers import AutoTokenizer

import jaxgen
from jaxgen.planning.shapes import SHAPES

KINDS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "float32", "quantize": "int8"},
    "int8, bfloat16": {"dtype": "bfloat16", "quantize": "int8"},
    "int4": {"dtype": "float32", "quantize": "int4"},
    "int4, bfloat16": {"dtype": "bfloat16", "quantize": "int4"},
}
PROMPT_TOKENS = 32
# How texts begin; each is continued to TEXT_TOKENS twice. Questions are put into the model's chat template, if any.
TEXT_TOKENS = 128
TEXTS = {
    "prose": [
        "The old house at the end of the street",
        "In the spring of 1848, the city",
        "Most people think that bees",
        "She opened the letter and",
    ],
    "code": [
        "import numpy as np\n\ndef ",
        "#include <stdio.h>\n\nint main(",
        'class Stack:\n    """',
        "function parse(text) {\n",
    ],
    "chat": [
        "How do I cook rice?",
        "Explain why the sky is blue.",
        "Write a poem about winter.",
        "What should I see in Rome?",
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--model", type=Path, default=jaxgen.BUNDLED_MODEL, help="folder whose distributions move")
    parser.add_argument("--batch", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--steps", type=int, default=32, help="of a timed call (default: 32)")
    parser.add_argument("--repeats", type=positive, default=5, help="timed calls of each (default: 5)")
    parser.add_argument("--json", type=Path, help="append the figures to this file, one JSON object per line")
    arguments = parser.parse_args()
    moved = divergences(arguments.model)
    models = {kind: jaxgen.from_config(varied(arguments.shape), **options) for kind, options in KINDS.items()}
    print(
        f"{'weights':16} {'MB':>7} {'KL, nats':>9} {'other token':>11} {'batch':>5} {'ms/step':>8} {'of float32':>10}"
    )
    for batch in arguments.batch:
        steps = step_ms(models, batch, arguments.steps, arguments.repeats)
        for kind, model in models.items():
            shares = [mine / wide for mine, wide in zip(steps[kind], steps["float32"], strict=True)]
            figures = {
                "shape": arguments.shape,
                "model": arguments.model.name,
                "weights": kind,
                "bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(model)),
                **moved[kind],
                "batch": batch,
                "step_ms": statistics.median(steps[kind]),
                "of_float32": statistics.median(shares),
                "of_float32_range": [min(shares), max(shares)],
            }
            print(
                f"{kind:16} {figures['bytes'] / 1e6:7.1f} {figures['kl']:9.6f} {figures['other_token']:11.2%} "
                f"{batch:5} {figures['step_ms']:8.2f} {figures['of_float32']:10.2f}",
                flush=True,
            )
            record(arguments.json, figures | {"steps": arguments.steps, "repeats": arguments.repeats})


def divergences(folder: Path) -> dict[str, dict[str, Any]]:
    """Of the model in each kind of weights from itself in float32: means, and the KL for each kind of text."""
    wide, tokenizer = jaxgen.load(folder, dtype="float32"), AutoTokenizer.from_pretrained(folder)
    texts = {text: [written(wide, tokenizer, text, begin) for begin in begins] for text, begins in TEXTS.items()}
    expected = {text: [log_probabilities(wide, *each) for each in several] for text, several in texts.items()}
    return {
        kind: divergence(texts, expected, partial(log_probabilities, jaxgen.load(folder, **options)))
        for kind, options in KINDS.items()
    }


def divergence(
    texts: dict[str, list[tuple[np.ndarray, int]]],
    expected: dict[str, list[jax.Array]],
    log_probabilities: Callable[[np.ndarray, int], jax.Array],
) -> dict[str, Any]:
    """The mean KL of all tokens from the expected log-probabilities, that of each kind of text, and how often the top
    token differs."""
    moved = {
        kind: np.concatenate(
            [distances(log_p, log_probabilities(*each)) for log_p, each in zip(expected[kind], several, strict=True)],
            axis=1,
        )
        for kind, several in texts.items()
    }
    kl, other = np.concatenate([*moved.values()], axis=1).mean(axis=1)
    by_kind = {kind: float(kl.mean()) for kind, (kl, _) in moved.items()}
    return {"kl": float(kl), "kl_by_text": by_kind, "other_token": float(other)}


def written(model: Any, tokenizer: Any, kind: str, begin: str) -> tuple[np.ndarray, int]:
    """Two texts of the model that begin like this, int [2, TEXT_TOKENS], and the number of tokens of the prompt."""
    if kind == "chat" and tokenizer.chat_template:
        message = [{"role": "user", "content": begin}]
        begin = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    ids = np.array([tokenizer(begin, add_special_tokens=False)["input_ids"]] * 2)
    texts = continued(model, ids, TEXT_TOKENS - ids.shape[1], do_sample=True, top_k=0, key=0)
    return np.asarray(texts), ids.shape[1]


def log_probabilities(model: Any, texts: np.ndarray, prompt_tokens: int) -> jax.Array:
    """Of the tokens after the prompt, and of one more: [2 * tokens, V]."""
    logits = jax.jit(type(model).__call__)(model, jnp.asarray(texts))[:, prompt_tokens - 1 :]
    return jax.nn.log_softmax(logits).reshape(-1, logits.shape[-1])


def distances(log_p: jax.Array, log_q: jax.Array) -> np.ndarray:
    """[2, tokens]: the KL of each token, and whether the top token differs."""
    other = log_p.argmax(axis=-1) != log_q.argmax(axis=-1)
    return np.stack([(jnp.exp(log_p) * (log_p - log_q)).sum(axis=-1), other])


def step_ms(models: dict[str, Any], batch: int, steps: int, repeats: int) -> dict[str, list[float]]:
    """Of each model, once per turn."""
    prompts = random_prompts(next(iter(models.values())).vocab_size, batch, PROMPT_TOKENS)
    calls = {
        kind: lambda new_tokens, model=model: continued(model, prompts, new_tokens) for kind, model in models.items()
    }
    for call in calls.values():
        if not np.array_equal(call(1 + steps), call(1 + steps)):
            raise SystemExit("the same call gave different tokens, so its times are not valid.")
    return step_times(calls, steps, repeats)


if __name__ == "__main__":
    main()

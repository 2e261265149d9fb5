"""An evaluation script as users of transformers' Flax models wrote it, moved to jaxgen line by line.

Each comment quotes what the line was. It continues prompts with the weights of a training state, greedily and by
sampling, in a jitted step whose weights and key are arguments.

    python examples/from_flax.py        seconds on one CPU core
"""

from collections.abc import Callable
from dataclasses import replace

import jax
import numpy as np
from transformers import AutoTokenizer

import jaxgen

PROMPTS = ["Once upon a time", "One day, a small fox", "Near a quiet river"]
MAX_LENGTH = 48

Model = Callable[..., jax.Array]  # int32 [N, T] ids -> float32 [N, T, V] logits; itself a pytree


def main() -> None:
    greedy, samples = evaluate()
    for text in [*greedy, *samples]:
        print(text)


def evaluate() -> tuple[list[str], list[str]]:
    """The greedy continuations and the samples of the prompts."""
    # model = FlaxLlamaForCausalLM.from_pretrained(folder); params = model.params
    model = jaxgen.load(jaxgen.BUNDLED_MODEL)
    # tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer = AutoTokenizer.from_pretrained(jaxgen.BUNDLED_MODEL, padding_side="left")
    # batch = tokenizer(PROMPTS, padding=True, return_tensors="np")
    batch = tokenizer(PROMPTS, padding=True, return_tensors="np")

    # output = model.generate(**batch, params=params, max_length=MAX_LENGTH)
    # greedy = output.sequences
    greedy = jaxgen.generate(model, **batch, max_length=MAX_LENGTH)

    # @jax.jit
    # def generate_step(params, batch, prng_key):
    #     output = model.generate(
    #         **batch, params=params, prng_key=prng_key, do_sample=True, top_k=20, max_length=MAX_LENGTH
    #     )
    #     return output.sequences
    call = jaxgen.prepare(model, **batch, do_sample=True, top_k=20, max_length=MAX_LENGTH, key=0)

    @jax.jit
    def generate_step(model: Model, call: jaxgen.Call, key: jax.Array) -> jax.Array:
        return jaxgen.decode(model, replace(call, strategy=replace(call.strategy, key=key)))["sequences"]

    # samples = generate_step(params, batch, jax.random.PRNGKey(1))
    samples = np.asarray(generate_step(model, call, jax.random.key(1)))[: len(PROMPTS), :MAX_LENGTH]

    # tokenizer.batch_decode(samples, skip_special_tokens=True)
    return tuple(tokenizer.batch_decode(rows, skip_special_tokens=True) for rows in (greedy, samples))


if __name__ == "__main__":
    main()

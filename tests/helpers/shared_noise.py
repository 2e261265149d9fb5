"""The same uniform numbers for torch's multinomial and for jaxgen's noise: sampling becomes comparable token by token.

A draw from a softmax p is the argmax of p / q with q exponential, for torch as for us, so equal numbers give equal
tokens. The numbers are a hash of the step, the row and the column.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import lazy
from jaxgen.decoding import beam_search, choice, loop


def _hash(step: Any, row: Any, column: Any, module: Any) -> Any:
    """uint32 of uint32 numbers that broadcast."""

    def word(number: int) -> Any:
        return module.uint32(number)

    x = step * word(1000003) + row * word(10007) + column * word(101) + word(7)
    x = x * word(2654435761)
    x = x ^ (x >> word(16))
    x = x * word(2246822519)
    return x ^ (x >> word(13))


def gumbel(keys: jax.Array, step: jax.Array, columns: jax.Array) -> jax.Array:
    """In the place of `jaxgen.decoding.gumbel.gumbel`."""
    rows = jnp.arange(len(keys), dtype=jnp.uint32).reshape(-1, *[1] * (columns.ndim - 1))
    x = _hash(step.astype(jnp.uint32), rows, columns.astype(jnp.uint32), jnp)
    # -log of (x + 1/2) / 2^32, from whichever end keeps float32 exact.
    low, high = ((each.astype(jnp.float32) + 0.5) * 2.0**-32 for each in (x, ~x))
    return -jnp.log(jnp.where(x < jnp.uint32(2**31), -jnp.log(low), -jnp.log1p(-high)))


class Multinomial:
    """In the place of `torch.multinomial`, for one call of `generate`."""

    def __init__(self) -> None:
        self.step = 0

    def __call__(self, p: Any, num_samples: int) -> Any:
        import torch

        rows, columns = (np.arange(size, dtype=np.uint32) for size in p.shape)
        with np.errstate(over="ignore"):
            x = _hash(np.uint32(self.step), rows[:, None], columns[None], np)
        self.step += 1
        exponential = -np.log((x.astype(np.float64) + 0.5) / 2**32)
        drawn = torch.topk(p.double() / torch.tensor(exponential), num_samples)[1]
        if num_samples > 1 and lazy.cache_name() != "cache":  # transformers 5.24 puts the likeliest first by itself
            drawn = drawn.gather(1, p.gather(1, drawn).sort(dim=1, descending=True)[1])
        return drawn


@contextmanager
def in_jaxgen(window: int = choice.WINDOW) -> Iterator[None]:
    """Programs built in here draw with the shared numbers, from `window` candidates."""
    before = choice.gumbel, beam_search.gumbel, choice.WINDOW
    _forget_programs()
    choice.gumbel, beam_search.gumbel, choice.WINDOW = gumbel, gumbel, window
    try:
        yield
    finally:
        choice.gumbel, beam_search.gumbel, choice.WINDOW = before
        _forget_programs()


def _forget_programs() -> None:
    for program in (loop.prefill, loop.advance):
        program.clear_cache()  # pyright: ignore


@contextmanager
def in_torch() -> Iterator[None]:
    """One call of transformers' `generate` in here draws with the shared numbers."""
    import torch

    before = torch.multinomial
    torch.multinomial = Multinomial()
    try:
        yield
    finally:
        torch.multinomial = before

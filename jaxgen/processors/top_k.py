"""The highest of many scores, without sorting them or visiting most of them twice."""

import jax
import jax.numpy as jnp
from jax import lax

_BLOCK = 64  # columns whose maximum stands for them in a search


def highest_few(scores: jax.Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The highest scores of each row, falling, their columns, each [N, count], and bool [N] rows that are invalid.

    They lie in the `count` blocks with the highest maxima, so most of the vocabulary is only read once. The barriers
    keep XLA from computing the scores again for each use, and the maxima of blocks again for that of a row.
    """
    scores = lax.optimization_barrier(scores)
    blocks = in_blocks(scores)
    maxima = lax.optimization_barrier(blocks.max(axis=2))
    invalid = ~jnp.isfinite(maxima.max(axis=1))
    if blocks.shape[1] <= 2 * count:
        return *_top_k(scores, count), invalid
    _, best = lax.top_k(maxima, count)
    columns = best[:, :, None] * _BLOCK + jnp.arange(_BLOCK)[None, None]
    values = jnp.take_along_axis(blocks, best[:, :, None], axis=1).reshape(len(scores), -1)
    values, places = _top_k(values, count)
    return values, jnp.take_along_axis(columns.reshape(len(scores), -1), places, axis=1), invalid


def _top_k(scores: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    # Without the barriers XLA:CPU turns a slice of the result into a sort of the whole: 5.5 ms instead of 0.9. One for
    # each, as a barrier for both makes it crash where scores are spread over devices (jax 0.10).
    values, places = lax.top_k(scores, count)
    return lax.optimization_barrier(values), lax.optimization_barrier(places)


def first_highest(scores: jax.Array) -> jax.Array:
    """int32 [N]: the argmax of each row, NaN counting as the greatest; in two steps 5 times faster on XLA:CPU."""
    blocks = in_blocks(scores)
    if blocks.shape[1] <= 2 * _BLOCK:
        return jnp.argmax(scores, axis=1).astype(jnp.int32)
    block = jnp.argmax(blocks.max(axis=2), axis=1).astype(jnp.int32)
    within = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * _BLOCK + jnp.argmax(within, axis=1).astype(jnp.int32)


def in_blocks(scores: jax.Array) -> jax.Array:
    """float32 [N, V / 64, 64], filled up with -inf."""
    rows, columns = scores.shape
    return jnp.pad(scores, ((0, 0), (0, -columns % _BLOCK)), constant_values=-jnp.inf).reshape(rows, -1, _BLOCK)

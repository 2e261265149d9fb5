"""Forward passes over several columns of each row, of which rows read as many as they have."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxgen.base import AnyCache, Model


def extend_by_columns(
    model: Model[AnyCache], cache: AnyCache, tokens: jax.Array, mask: jax.Array
) -> tuple[jax.Array, AnyCache]:
    """A forward pass over int32 [N, T] tokens, of which each row reads the first ones, as bool [N, T] says.

    Where no row reads more than its first column, as between two finds of prompt lookup, the pass is that of a plain
    step. Returns float32 [N * T, V] logits, zeros for columns that were left out.
    """
    rows, width = tokens.shape

    def reads(columns: int) -> Callable[[AnyCache], tuple[jax.Array, AnyCache]]:
        def read(cache: AnyCache) -> tuple[jax.Array, AnyCache]:
            logits, cache, _ = model.extend(
                cache, tokens[:, :columns], mask[:, :columns], None, (), logits_to_keep=columns
            )
            logits = logits.reshape(rows, columns, -1)
            return jnp.pad(logits, ((0, 0), (0, width - columns), (0, 0))).reshape(rows * width, -1), cache

        return read

    if width == 1:
        return reads(1)(cache)
    return lax.cond(mask[:, 1:].any(), reads(width), reads(1), cache)


def with_tokens(texts: jax.Array, lengths: jax.Array, tokens: jax.Array, count: jax.Array | int) -> jax.Array:
    """int32 [N, S] texts, with the first `count` of int32 [N, T] tokens written from column `lengths` on."""
    number = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    written = number < (count[:, None] if isinstance(count, jax.Array) else count)
    columns = jnp.where(written, lengths[:, None] + number, texts.shape[1])
    return texts.at[jnp.arange(len(texts))[:, None], columns].set(tokens, mode="drop")

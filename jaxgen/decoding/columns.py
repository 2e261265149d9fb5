"""Forward passes over several columns, of which each row may read only the first few."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxgen.base import AnyCache, Model

_SHORT = 8  # columns; compiling a pass for every width would take too long


def extend_by_columns(
    model: Model[AnyCache], cache: AnyCache, tokens: jax.Array, mask: jax.Array
) -> tuple[jax.Array, AnyCache]:
    """A forward pass over int32 [N, T] tokens. Each row reads only its first tokens, which the bool [N, T] mask marks.

    Drafts are often short or missing, so the pass has 1, 8 or T columns: the smallest width that covers every row.
    Returns float32 [N * T, V] logits, zeros for columns outside this width, and the cache.
    """
    rows, most = tokens.shape
    widths = sorted({1, min(_SHORT, most), most})
    fitting = sum((mask[:, width:].any().astype(jnp.int32) for width in widths[:-1]), jnp.int32(0))

    def reads(width: int) -> Callable[[jax.Array, tuple[jax.Array, AnyCache]], tuple[jax.Array, AnyCache]]:
        def read(number: jax.Array, carry: tuple[jax.Array, AnyCache]) -> tuple[jax.Array, AnyCache]:
            del number
            all_logits, cache = carry
            logits, cache, _ = model.extend(cache, tokens[:, :width], mask[:, :width], None, (), logits_to_keep=width)
            logits = logits.reshape(rows, width, -1)
            return lax.dynamic_update_slice_in_dim(all_logits, logits, 0, axis=1), cache

        return read

    carry = jnp.zeros((rows, most, model.vocab_size), jnp.float32), cache
    # Loops of at most one pass instead of a conditional: XLA copies the cache into and out of its branches.
    for index, width in enumerate(widths):
        carry = lax.fori_loop(jnp.int32(0), (fitting == index).astype(jnp.int32), reads(width), carry)
    return carry[0].reshape(rows * most, -1), carry[1]


def with_tokens(texts: jax.Array, lengths: jax.Array, tokens: jax.Array, count: jax.Array | int) -> jax.Array:
    """The int32 [N, S] texts, with the first `count` of the int32 [N, T] tokens written from column `lengths` on."""
    number = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    written = number < (count[:, None] if isinstance(count, jax.Array) else count)
    columns = jnp.where(written, lengths[:, None] + number, texts.shape[1])
    return texts.at[jnp.arange(len(texts))[:, None], columns].set(tokens, mode="drop")

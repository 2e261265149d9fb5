"""Top-k and argmax over large vocabularies, from the maxima of blocks instead of by sorting."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

_BLOCK = 64  # scores per block


def blocked_top_k(scores: jax.Array, count: int, shards: int = 1) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The `count` highest scores of each row.

    Devices that share the vocabulary find the highest of their own scores first, and exchange only these:

    ```
    scores of a row, 2 shards   7 1 9 3 | 8 2 4 6      count = 2
    highest of each shard           9 7 | 8 6          of columns 2 0 | 4 7
    highest of the row              9 8                of columns 2 4
    ```

    Args:
        scores: [N, V], or [N, C, V] of which the highest of all C * V are found.
        count: at least 1.
        shards: static. The number of devices that V is sharded over; it must divide V.

    Returns:
        The scores in descending order and their indices in V or C * V, each [N, count], and bool [N] rows that are
        invalid: with a NaN, an infinity or no finite score.
    """
    rows = len(scores)
    if shards == 1:
        values, indices, maxima = _highest(scores.reshape(rows, -1), count, _top_k)
        return values, indices, ~jnp.isfinite(maxima)
    parts = _parts(scores, shards)  # [N, T, V / T] or [N, C, T, V / T]
    size = parts.shape[-1]
    values, indices, maxima = _highest(parts, min(count, size), _sorted)
    indices += jnp.arange(0, parts[0].size, size, dtype=indices.dtype).reshape(*parts.shape[1:-1], 1)
    # With the parts as the last axis, XLA exchanges these few scores once, and not in rounds of a distributed sort.
    values, indices = (jnp.moveaxis(each, -1, 1).reshape(rows, -1) for each in (values, indices))
    values, best = _top_k(values, count)
    indices = jnp.take_along_axis(indices, best, axis=1)
    return values, indices, ~jnp.isfinite(maxima.reshape(rows, -1).max(axis=1))


def _highest(
    scores: jax.Array, count: int, top_k: Callable[[jax.Array, int], tuple[jax.Array, jax.Array]]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The `count` highest scores [..., V] and their indices, each [..., count], and the highest [...], or a NaN.

    They are in the `count` blocks with the highest maxima, so most of the vocabulary is read only once. The barriers
    keep XLA from computing the scores again for each use, and the maxima of blocks again for the maximum of a row.
    """
    scores = lax.optimization_barrier(scores)
    blocks = to_blocks(scores)
    maxima = lax.optimization_barrier(blocks.max(axis=-1))
    if blocks.shape[-2] <= 2 * count:
        return *top_k(scores, count), maxima.max(axis=-1)
    _, best = top_k(maxima, count)
    # Block b holds columns 64 * b to 64 * b + 63; both arrays are [..., count * 64], block after block.
    columns = (best[..., None] * _BLOCK + jnp.arange(_BLOCK)).reshape(*best.shape[:-1], -1)
    values = jnp.take_along_axis(blocks, best[..., None], axis=-2).reshape(*best.shape[:-1], -1)
    values, indices = top_k(values, count)
    return values, jnp.take_along_axis(columns, indices, axis=-1), maxima.max(axis=-1)


def _top_k(scores: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    # Without the barriers XLA:CPU turns a slice of the result into a full sort: 5.5 ms instead of 0.9. One barrier for
    # both arrays makes it crash if scores are sharded over devices (jax 0.10).
    values, indices = lax.top_k(scores, count)
    return lax.optimization_barrier(values), lax.optimization_barrier(indices)


def _sorted(scores: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """As `_top_k`, by a sort: XLA leaves its rows on their devices. For a TopK, XLA:GPU first gathers all rows."""
    indices = lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    values, indices = lax.sort((-scores, indices), num_keys=1)
    return -values[..., :count], indices[..., :count]


def blocked_argmax(scores: jax.Array) -> jax.Array:
    """int32 [N]: the argmax of each row, with NaN the highest. Its two steps are 5 times faster on XLA:CPU.

    On other platforms it has one step: devices that share the vocabulary then exchange only their best scores. They
    would exchange the scores if their shares were not whole blocks.
    """

    def at_once(scores: jax.Array) -> jax.Array:
        return jnp.argmax(scores, axis=1).astype(jnp.int32)

    def by_blocks(scores: jax.Array) -> jax.Array:
        blocks = to_blocks(scores)
        block = jnp.argmax(blocks.max(axis=2), axis=1).astype(jnp.int32)
        within = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
        return block * _BLOCK + jnp.argmax(within, axis=1).astype(jnp.int32)

    if scores.shape[1] <= 2 * _BLOCK * _BLOCK:
        return at_once(scores)
    return lax.platform_dependent(scores, cpu=by_blocks, default=at_once)


def row_maxima(scores: jax.Array, shards: int = 1) -> jax.Array:
    """float32 [N]: the highest of the scores [N, V] of each row, or a NaN. See `blocked_top_k` about `shards`."""
    if shards == 1:
        return to_blocks(scores).max(axis=(1, 2))
    return to_blocks(_parts(scores, shards)).max(axis=(1, 2, 3))


def to_blocks(scores: jax.Array) -> jax.Array:
    """float32 [..., V] -> [..., V / 64, 64], padded with -inf."""
    *leading, columns = scores.shape
    padding = [(0, 0)] * len(leading) + [(0, -columns % _BLOCK)]
    return jnp.pad(scores, padding, constant_values=-jnp.inf).reshape(*leading, -1, _BLOCK)


def _parts(scores: jax.Array, shards: int) -> jax.Array:
    """[..., V] -> [..., T, V / T], each part on one device."""
    return scores.reshape(*scores.shape[:-1], shards, -1)

"""Attention of a decode step as one kernel for NVIDIA GPUs, written in Pallas.

XLA computes it in four kernels and reads every slot of the cache, used or not. This one reads the blocks of slots from
the first to the last that a row attends to, and keeps the scores in registers. 64 rows of an 8B in a half-filled cache
take 6.7 instead of 7.5 ms a step on an H200.

Kernels of others did not fit: JAX's own decode attention, `pallas.ops.gpu.decode_attention`, wants the slots before the
heads, which would copy the cache at every step, and rows without holes; cuDNN, behind `jax.nn.dot_product_attention`,
wants the same order, and padding on the right. Pallas' Triton backend is deprecated, so nothing depends on this kernel:
where it is missing, attention is computed by XLA.
"""

import importlib.util
from functools import cache, partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxgen.quantized_array import Array, Int8Array, QuantizedArray

BLOCK = 64  # slots; a cache for the kernel has whole blocks
_MOST_QUERIES = 64  # of a group: its heads times the columns, which are beams, or the drafts of an assisted step
_PROGRAMS = 264  # two for each multiprocessor of an H100


@cache
def installed() -> bool:
    """Whether JAX can compile kernels for NVIDIA GPUs; if it runs on one, for this one."""
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        return False
    try:
        from jax.experimental.pallas import triton  # noqa: F401
    except ImportError:
        return False
    capability = compute_capability()
    return capability is None or capability >= 8.0  # older ones do not multiply bfloat16


@cache
def compute_capability() -> float | None:
    """Of the GPU that JAX runs on; None without one, when programs are compiled for another machine."""
    device = jax.local_devices()[0]
    return float(device.compute_capability) if device.platform == "gpu" else None


def fits(queries: int, slots: int, head_dim: int, dtype: Any, float8: bool = False) -> bool:
    """Whether the kernel can compute the attention of so many queries per group over so many slots.

    It is for half precision, and reads whole blocks. Triton wants sizes that are powers of two.
    """
    if not installed() or (float8 and (compute_capability() or 8.9) < 8.9):  # older ones cannot convert these numbers
        return False
    return (
        dtype in (jnp.bfloat16, jnp.float16)
        and queries <= _MOST_QUERIES
        and slots % BLOCK == 0
        and head_dim in (32, 64, 128, 256)
    )


def decode_attention(
    queries: jax.Array, keys: Array, values: Array, mask: jax.Array, scale: float, *, interpret: bool = False
) -> jax.Array:
    """As `layers.attend`, for a few columns.

    The slots in use are shared among programs if there are too few rows and heads to fill the GPU. Each program keeps
    a running softmax, as flash attention does, and the shares are joined afterwards.

    ```
    slots of a row    . . . . | 1 1 1 1 | 1 1 1 1 | 1 . 1 . | . . . . | . . . .      blocks of 4
    first 1, count 3            program 0 . . . . . program 1                        2 shares
    ```

    Args:
        queries: [N, K, G, T, H], with G * T of at most 64.
        keys, values: [N, K, S, H]. Those in eight bits are widened in registers. The scales of columns multiply the
            scores and the weights.
        mask: bool [N, T, S]. A column that attends to no slot gets zeros.
        scale: of the products of queries and keys.
        interpret: for tests, on any device.

    Returns:
        [N, K, G, T, H].
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    rows, heads, group, columns, head_dim = queries.shape
    slots, used = keys.shape[2], group * columns
    quantized = [each for each in (keys, values) if isinstance(each, QuantizedArray)]
    stored, scales = [each.values for each in quantized] or [keys, values], [each.scales for each in quantized]
    num_scales, by_column = len(scales), isinstance(keys, Int8Array)
    scales = [each if by_column else each.reshape(1) for each in scales]
    # Triton wants powers of two, and at least 16 rows in a product.
    padded = max(16, 1 << (used - 1).bit_length())
    shares = 1
    while rows * heads * shares < _PROGRAMS and slots >= 4 * shares * BLOCK:
        shares *= 2
    # With many programs smaller blocks are faster (64 rows of an 8B after 600 tokens on an H200: 53 instead of 60 us a
    # layer), with few programs larger ones.
    block_size = BLOCK // 2 if shares == 1 else BLOCK
    first, count = _blocks_in_use(mask, block_size)

    # Products of half precision are exact, whatever `jax_default_matmul_precision` is. Triton does not know all values.
    dot = partial(triton.dot, precision=lax.Precision.DEFAULT)

    def kernel(queries: Any, keys: Any, values: Any, mask: Any, first: Any, count: Any, *others: Any) -> None:
        scales, (out, *sums) = others[:num_scales], others[num_scales:]
        row, head, share = (pl.program_id(axis) for axis in range(3))
        number = jnp.arange(padded)
        inside = number < used
        # Array indices, because JAX 0.12 refuses a slice that extends past the array, as the masked rows do.
        places = number[:, None], jnp.arange(head_dim)[None]
        own_queries = triton.load(queries.at[row, head, *places], mask=inside[:, None], other=0.0)
        each = (count[row] + shares - 1) // shares
        start = first[row] + share * each
        end = jnp.minimum(start + each, first[row] + count[row])

        def with_block(block: jax.Array, so_far: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            attended, highest, total = so_far
            part = pl.ds(block * block_size, block_size)
            if columns == 1:
                allowed = mask[row, 0, part][None]
            else:
                allowed = mask[row, (number % columns)[:, None], (block * block_size + jnp.arange(block_size))[None]]
            own_keys, own_values = (each[row, head, part] for each in (keys, values))
            if scales and not by_column:
                own_keys, own_values = (
                    each.astype(jnp.float32) * factor[0]
                    for each, factor in zip((own_keys, own_values), scales, strict=True)
                )
            own_keys, own_values = (each.astype(queries.dtype) for each in (own_keys, own_values))
            scores = dot(own_queries, own_keys.T) * scale
            if by_column:
                scores = scores * scales[0][row, head, part][None]
            scores = jnp.where(allowed, scores, -jnp.inf)
            higher = jnp.maximum(highest, scores.max(axis=1))
            finite = jnp.maximum(higher, jnp.finfo(jnp.float32).min)  # -inf minus -inf would be NaN
            weights, before = jnp.exp(scores - finite[:, None]), jnp.exp(highest - finite)
            factors = weights * scales[1][row, head, part][None] if by_column else weights
            weighted = dot(factors.astype(own_values.dtype), own_values)
            return attended * before[:, None] + weighted, higher, total * before + weights.sum(axis=1)

        nothing = (
            jnp.zeros((padded, head_dim), jnp.float32),
            jnp.full(padded, -jnp.inf, jnp.float32),
            jnp.zeros(padded, jnp.float32),
        )
        attended, highest, total = lax.fori_loop(start, end, with_block, nothing)
        if not sums:
            attended = attended / jnp.where(total > 0, total, 1)[:, None]
        where = (row, head) if not sums else (row, head, share)
        triton.store(out.at[*where, *places], attended.astype(out.dtype), mask=inside[:, None])
        for ref, value in zip(sums, (highest, total), strict=False):
            triton.store(ref.at[*where, number], value, mask=inside)

    call = partial(
        pl.pallas_call,
        kernel,
        grid=(rows, heads, shares),
        interpret=interpret,
        compiler_params=None if interpret else triton.CompilerParams(num_warps=4, num_stages=3),
        name="decode_attention",
    )
    inputs = (queries.reshape(rows, heads, used, head_dim), *stored, mask, first, count, *scales)
    if shares == 1:
        out = call(out_shape=jax.ShapeDtypeStruct((rows, heads, used, head_dim), queries.dtype))(*inputs)
        return out.reshape(queries.shape)
    shape = (rows, heads, shares, used)
    sums = [jax.ShapeDtypeStruct(each, jnp.float32) for each in ((*shape, head_dim), shape, shape)]
    attended, highest, total = call(out_shape=sums)(*inputs)
    return _joined(attended, highest, total).astype(queries.dtype).reshape(queries.shape)


def _joined(attended: jax.Array, highest: jax.Array, total: jax.Array) -> jax.Array:
    """The sums of all shares, [N, K, shares, M, H] and twice [N, K, shares, M] -> float32 [N, K, M, H].

    Written out share by share, so that XLA makes one kernel of it; reductions over an axis would be three.
    """
    shares = range(highest.shape[2])
    top = reduce(jnp.maximum, (highest[:, :, share] for share in shares), jnp.finfo(jnp.float32).min)
    factors = [jnp.exp(highest[:, :, share] - top) for share in shares]
    whole = sum(total[:, :, share] * factors[share] for share in shares)
    weighted = sum(attended[:, :, share] * factors[share][..., None] for share in shares)
    return weighted / jnp.where(whole > 0, whole, 1)[..., None]


def _blocks_in_use(mask: jax.Array, block_size: int) -> tuple[jax.Array, jax.Array]:
    """int32 [N] twice: the first block of slots that any column attends to, and the number of blocks up to the last."""
    slots = mask.any(axis=1)
    blocks = slots.reshape(len(slots), -1, block_size).any(axis=2)
    first = jnp.argmax(blocks, axis=1)
    after_last = blocks.shape[1] - jnp.argmax(blocks[:, ::-1], axis=1)
    return first.astype(jnp.int32), jnp.where(blocks.any(axis=1), after_last - first, 0).astype(jnp.int32)

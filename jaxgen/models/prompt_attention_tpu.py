"""Attention of a long prompt as one kernel for TPUs, written in Pallas.

XLA computes the scores of all slots, of which a causal mask forbids half, and writes them to the device's memory. This
kernel goes over blocks of columns and slots, keeps their scores on the chip with a running softmax, as flash attention
does, and neither reads nor computes blocks without an allowed slot. The mask is data: causal or not, with padding,
windows and kept slots.

JAX's own kernel, `pallas.ops.tpu.splash_attention`, takes about as long by the compiler's schedule, but did not fit.
With a mask that is data it wants four bytes for each of its entries, cannot be built in a jitted function (JAX 0.10),
computes the rows of a batch one after the other, and has the mean of the values or NaN for a column that attends to no
slot. Both are experimental in JAX, so nothing depends on the kernel: where it is missing, attention is computed by XLA.
"""

import importlib.util
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_LANES = 128  # numbers in a row of a TPU's register
_MOST_QUERIES = 1024  # of a block: its columns times the heads of a group
_SLOTS = 512  # of a block, so that scores and weights of a block take half of a v5e's 16 MiB for a kernel
_MOST_BLOCKS = 1 << 15  # of all rows; there are three numbers for each of them in the scalar memory
_NONE, _SOME, _ALL = range(3)  # of a block's pairs of columns and slots may attend


@cache
def installed() -> bool:
    """Whether JAX can compile for TPUs, and if it runs on one, whether that multiplies bfloat16 in such kernels."""
    if importlib.util.find_spec("libtpu") is None:
        return False
    try:
        from jax.experimental.pallas import tpu  # noqa: F401
    except ImportError:
        return False
    return jax.local_devices()[0].device_kind not in ("TPU v2", "TPU v3")


def fits(shape: tuple[int, ...], slots: int, dtype: Any) -> bool:
    """Whether the kernel can compute the attention of queries [N, K, G, T, H] over so many slots.

    It is for dtypes of the matrix unit, and blocks of columns that fill registers.
    """
    rows, _, group, columns, head_dim = shape
    size = _columns_of_block(group, columns)
    return (
        installed()
        and dtype in (jnp.bfloat16, jnp.float32)
        and size > 0
        and rows * (columns // size) * -(-slots // _SLOTS) <= _MOST_BLOCKS
        and head_dim <= 256
        and head_dim % 8 == 0
    )


def _columns_of_block(group: int, columns: int) -> int:
    """The largest fitting size; 0 if there is none. 32 rows of int8, the mask's, fill a register."""
    sizes = (size for size in (512, 256, 128, 64, 32) if columns % size == 0 and group * size <= _MOST_QUERIES)
    return next(sizes, 0)


def _precision(dtype: Any) -> lax.Precision:
    """The one of the two that kernels know which is not less than `jax_default_matmul_precision`."""
    asked = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    fast = dtype == jnp.bfloat16 or asked in (None, "default", "fastest", "bfloat16")
    return lax.Precision.DEFAULT if fast else lax.Precision.HIGHEST


def prompt_attention_tpu(
    queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array, scale: float, *, interpret: bool = False
) -> jax.Array:
    """As `layers.attend`, for many columns.

    ```
    column 0    1 . . . | . . . . | . . . .      blocks of 2 columns and 4 slots
           1    1 1 . . | . . . . | . . . .
           2    1 1 1 . | . . . . | . . . .      3 of 9 blocks are computed with their mask, 1 without, 5 not at all
           3    1 1 1 1 | . . . . | . . . .
           4    1 1 1 1 | 1 . . . | . . . .
           5    1 1 1 1 | 1 1 . . | . . . .
    ```

    Args:
        queries: [N, K, G, T, H].
        keys, values: [N, K, S, H].
        mask: bool [N, T, S]. A column that attends to no slot gets zeros.
        scale: of the products of queries and keys.
        interpret: for tests, on any device.

    Returns:
        [N, K, G, T, H].
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    rows, heads, group, columns, head_dim = queries.shape
    slots, size = keys.shape[2], _columns_of_block(group, columns)
    part = min(_SLOTS, slots + -slots % _LANES)
    grid = rows, heads, columns // size, pl.cdiv(slots, part)

    product = partial(jnp.einsum, preferred_element_type=jnp.float32, precision=_precision(queries.dtype))

    def place(row: Any, block: Any, number: Any) -> Any:
        return (row * grid[2] + block) * grid[3] + number

    def kernel(kinds: Any, _slots: Any, _mask: Any, queries: Any, keys: Any, values: Any, mask: Any, *others: Any):
        out, highest, total, attended = others
        row, block, number = (pl.program_id(axis) for axis in (0, 2, 3))
        kind = kinds[place(row, block, number)]

        def wide(sums: jax.Array, width: int) -> jax.Array:
            """[G * T, lanes], which are all the same, -> [G * T, width]."""
            return jnp.tile(sums, (1, pl.cdiv(width, _LANES)))[:, :width]

        def add(masked: bool) -> None:
            # The queries of a group share keys, values and mask: one product with G * T rows.
            own_queries, own_values = queries[...].reshape(group * size, head_dim), values[...]
            scores = product("mh,sh->ms", own_queries, keys[...]) * scale
            if masked:
                allowed = mask[...].astype(jnp.int32)[None] != 0
                if slots % part:  # the last block extends past the slots, where anything may be, even NaN
                    left = slots - number * part
                    allowed &= lax.broadcasted_iota(jnp.int32, (1, 1, part), 2) < left
                    own_values = jnp.where(lax.broadcasted_iota(jnp.int32, (part, 1), 0) < left, own_values, 0)
                scores = jnp.where(allowed, scores.reshape(group, size, part), -jnp.inf).reshape(scores.shape)
            higher = jnp.maximum(highest[...], scores.max(axis=1, keepdims=True))
            weights, before = jnp.exp(scores - wide(higher, part)), jnp.exp(highest[...] - higher)
            weighted = product("ms,sh->mh", weights.astype(own_values.dtype), own_values)
            highest[...] = higher
            total[...] = total[...] * before + weights.sum(axis=1, keepdims=True)
            attended[...] = attended[...] * wide(before, head_dim) + weighted

        @pl.when(number == 0)
        def _() -> None:
            highest[...] = jnp.full_like(highest, jnp.finfo(jnp.float32).min)  # -inf minus -inf would be NaN
            total[...], attended[...] = jnp.zeros_like(total), jnp.zeros_like(attended)

        pl.when(kind == _SOME)(lambda: add(True))
        pl.when(kind == _ALL)(lambda: add(False))

        @pl.when(number == grid[3] - 1)
        def _() -> None:
            divisor = jnp.where(total[...] > 0, total[...], 1)
            out[...] = (attended[...] / wide(divisor, head_dim)).astype(out.dtype).reshape(out.shape)

    zero = np.int32(0)  # of Python it would have 64 bits under JAX's x64

    def of_queries(row: Any, head: Any, block: Any, *_: Any) -> tuple[Any, ...]:
        return row, head, zero, block, zero

    def of_slots(row: Any, head: Any, block: Any, number: Any, _kinds: Any, slots: Any, _mask: Any) -> tuple[Any, ...]:
        return row, head, slots[place(row, block, number)], zero

    def of_mask(row: Any, head: Any, block: Any, number: Any, _kinds: Any, _slots: Any, mask: Any) -> tuple[Any, ...]:
        return row, block, mask[place(row, block, number)]

    by_queries = pl.BlockSpec((None, None, group, size, head_dim), of_queries)
    by_slots = pl.BlockSpec((None, None, part, head_dim), of_slots)
    sums = [pltpu.VMEM((group * size, width), jnp.float32) for width in (_LANES, _LANES, head_dim)]
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=grid,
            in_specs=[by_queries, by_slots, by_slots, pl.BlockSpec((None, size, part), of_mask)],
            out_specs=by_queries,
            scratch_shapes=sums,
        ),
        out_shape=jax.ShapeDtypeStruct(queries.shape, values.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="prompt_attention",
    )(*_blocks(mask, size, part), queries, keys, values, mask.astype(jnp.int8))  # Pallas passes bools as int32


def _blocks(mask: jax.Array, size: int, part: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Describes each block of bool [N, T, S] to the kernel before the block is read, as int32 [blocks].

    Returns:
        How many of its pairs may attend; and the blocks of slots and of the mask to have on the chip for it. Where
        it does not need a block, these are the ones that are there already, so that nothing is read.
    """
    rows, columns, slots = mask.shape
    by_columns = mask.reshape(rows, columns // size, size, slots)
    # Padded to whole blocks when columns are reduced already: XLA would write a padded mask to memory, more than once.
    padding = (0, 0), (0, 0), (0, -slots % part)
    some, every = (jnp.pad(each, padding) for each in (by_columns.any(axis=2), by_columns.all(axis=2)))
    some, every = (each.reshape(rows, columns // size, -1, part) for each in (some, every))
    kinds = jnp.where(every.all(axis=3), _ALL, jnp.where(some.any(axis=3), _SOME, _NONE))

    def latest(needed: jax.Array) -> jax.Array:
        numbers = jnp.where(needed, jnp.arange(needed.shape[2]), jnp.argmax(needed, axis=2)[..., None])
        return lax.cummax(numbers, axis=2)

    needed = kinds, latest(kinds != _NONE), latest(kinds == _SOME)
    kinds, own_slots, own_mask = (each.astype(jnp.int32).reshape(-1) for each in needed)
    return kinds, own_slots, own_mask

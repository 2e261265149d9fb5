"""Weights in int4: 32 consecutive inputs of a row share a multiplier, and a few outlier columns are unquantised.

A weight is a value from -8 to 7, times the multiplier of its group from -15 to 15, times the scale of its row. Value
times multiplier is a byte, so that a product is that of `Int8` once the values are unpacked, and just as exact.
"""

from dataclasses import dataclass, field
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxgen.models.int8 import Array, Int8, is_quantised, without_outliers
from jaxgen.pytree import pytree

GROUP = 32  # consecutive inputs with one multiplier
_HALF = GROUP // 2


@pytree
@dataclass(frozen=True)
class Int4(Int8):
    """A quantised matrix [out, in], which replaces an array in the parameters of a model.

    Inputs are padded to whole groups. The inputs of a group are the first axis of `values`, so that a multiplier
    belongs to the same number of each of these slices, and neither has to be repeated or transposed:

    ```
    input       0   1  ...  15 | 16  17  ...  31 | 32   of a row
    values[i]   0   1  ...  15    0   1  ...  15    0
    bits        low            | high            | low
    group       0                                  1
    ```

    Attributes:
        values: uint8 [16, out, groups], two values per byte, each plus 8; zero in the outlier columns.
        scales: float32 [out].
        columns: int32 [outliers], the indices of the outlier columns.
        outliers: [out, outliers], those columns in the dtype of the original matrix.
        multipliers: int8 [out, groups].
        inputs: in, without the padding.
    """

    multipliers: Array
    inputs: int = field(metadata={"static": True})

    def _values_of_rows(self, ids: jax.Array) -> jax.Array:
        halves = _unpacked(jnp.asarray(self.values)[:, ids], jnp.asarray(self.multipliers)[ids])
        values = jnp.moveaxis(jnp.stack(halves), (0, 1), (-2, -1))  # [2, 16, ..., groups] -> [..., groups, 2, 16]
        return values.reshape(*ids.shape, -1)[..., : self.inputs]

    def _multiply(self, rows: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        multipliers = jnp.asarray(self.multipliers)
        groups = multipliers.shape[1]
        padded = jnp.pad(rows, ((0, 0), (0, GROUP * groups - self.inputs)))
        # [rows, groups * 32] -> [16, 2, rows, groups].
        grouped = padded.reshape(len(rows), groups, 2, _HALF).transpose(3, 2, 0, 1)

        def multiplied(spec: str, halves: tuple[jax.Array, ...], values: jax.Array) -> jax.Array:
            low, high = (
                jnp.einsum(spec, half, each.astype(rows.dtype), preferred_element_type=dtype)
                for half, each in zip(halves, _unpacked(values, multipliers), strict=True)
            )
            return low + high

        def at_once(grouped: jax.Array) -> jax.Array:
            # The compiler for TPUs fuses the unpacking into the product.
            return multiplied("jmg,jog->mo", (grouped[:, 0], grouped[:, 1]), jnp.asarray(self.values))

        def on_gpu(grouped: jax.Array) -> jax.Array:
            # The compiler for GPUs fuses it into a sum, as of a single row. For a product it unpacks bytes in memory.
            if len(rows) != 1:
                return at_once(grouped)
            low, high = (each.astype(dtype) for each in _unpacked(jnp.asarray(self.values), multipliers))
            of_low, of_high = (each.astype(dtype) for each in (grouped[:, 0], grouped[:, 1]))  # [16, 1, groups]
            return (low * of_low + high * of_high).sum(axis=(0, 2))[None]

        def slice_by_slice(grouped: jax.Array) -> jax.Array:
            # XLA:CPU unpacks in memory: so much at a time that it stays in the cache.
            def add(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
                (low, high), values = part
                return total + multiplied("mg,og->mo", (low, high), values), None

            zeros = jnp.zeros((len(rows), len(multipliers)), dtype)
            return lax.scan(add, zeros, (grouped, jnp.asarray(self.values)))[0]

        return lax.platform_dependent(grouped, cpu=slice_by_slice, tpu=at_once, default=on_gpu)


def quantised(array: Array) -> Array | Int4:
    """A matrix as `Int4`, computed with JAX if it is a JAX array, else with NumPy.

    Other arrays are returned as they are, and so are matrices of one row.
    """
    if not is_quantised(array.shape):
        return array
    numpy, columns, parts = without_outliers(array)
    values, multipliers, scales = (
        numpy.concatenate(each, axis=axis)
        for axis, each in zip((1, 0, 0), zip(*(_quantise(numpy, part) for part in parts), strict=True), strict=True)
    )
    return Int4(values, scales, columns, array[:, columns], multipliers, array.shape[1])


def group_count(columns: int) -> int:
    """The number of groups of a row."""
    return -(-columns // GROUP)


def _quantise(numpy: ModuleType, wide: Array) -> tuple[Array, Array, Array]:
    """`values`, `multipliers` and `scales` of a float32 [out, in]. Zeros have the scale 0; NaN shows in the scale.

    The entry of a group that is furthest from zero becomes about -8, since the range ends at 7 on the other side. Three
    multipliers are tried and the best is taken: the largest leaves that entry in range, the other two cut it and round
    the rest less. That takes a quarter of the squared error away (SmolLM2-135M).
    """
    out, columns = wide.shape
    groups = group_count(columns)
    grouped = numpy.pad(wide, ((0, 0), (0, GROUP * groups - columns))).reshape(out, groups, GROUP)
    largest, smallest = grouped.max(axis=2), grouped.min(axis=2)
    peaks = numpy.where(largest > -smallest, largest, smallest)
    scales = numpy.abs(peaks).max(axis=1) / (8 * 15)
    unit = numpy.where(scales > 0, scales, 1)[:, None]  # rows of zeros are not divided by 0

    def rounded(multipliers: Array) -> Array:
        return numpy.clip(numpy.round(grouped / (multipliers * unit)[..., None]), -8, 7)

    sizes = numpy.ceil(numpy.abs(peaks) / (8 * unit))
    tried = [
        numpy.clip(sizes - less, 1, 15) * numpy.where(peaks > 0, -1.0, 1.0).astype(np.float32) for less in range(3)
    ]
    errors = [((rounded(each) * (each * unit)[..., None] - grouped) ** 2).sum(axis=2) for each in tried]
    best = numpy.stack(errors).argmin(axis=0)
    multipliers = numpy.take_along_axis(numpy.stack(tried), best[None], axis=0)[0]
    low, high = numpy.split((rounded(multipliers) + 8).astype(np.uint8), 2, axis=2)
    return (low | high << 4).transpose(2, 0, 1), multipliers.astype(np.int8), scales


def _unpacked(values: jax.Array, multipliers: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The low and the high halves, uint8 [..., groups] -> int8 times the multipliers of the last axes of that shape."""
    low, high = (each.astype(jnp.int8) - 8 for each in (values & 15, values >> 4))
    factors = multipliers.reshape((1,) * (values.ndim - multipliers.ndim) + multipliers.shape)
    return low * factors, high * factors

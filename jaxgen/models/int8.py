"""Weights in int8: each row of a matrix in 127ths of its largest entry.

Only weights are quantised; activations keep their precision. The scale of a row multiplies the product and not the
weights, so that the weights are read as bytes.
"""

from dataclasses import dataclass, field
from types import EllipsisType, ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxgen.base import as_last
from jaxgen.pytree import pytree

Array = jax.Array | np.ndarray

_ROWS = 4096  # of a matrix that are in float32 at a time


@pytree
@dataclass(frozen=True)
class Int8:
    """A quantised matrix [out, in], which replaces an array in the parameters of a model.

    Attributes:
        values: int8 [out, in].
        scales: float32 [out].
        dtype: of the original matrix, static.
    """

    values: Array
    scales: Array
    dtype: np.dtype = field(metadata={"static": True})

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def __getitem__(self, ids: jax.Array | EllipsisType) -> "Array | Int8":
        """Rows, int32 [...] -> [..., in]; or with `...` the matrix itself, as Flax reads a parameter: `param[...]`."""
        if ids is Ellipsis:
            return self
        return (self.values[ids].astype(jnp.float32) * self.scales[ids][..., None]).astype(self.dtype)

    def product(self, x: jax.Array) -> jax.Array:
        """x @ self.T, [..., in] -> [..., out]."""
        return lax.platform_dependent(x, cpu=self._product_on_cpu, default=self._product)

    def _product(self, x: jax.Array) -> jax.Array:
        # On GPU and TPU the compilers fuse this cast into the product, so that memory traffic is in bytes.
        y = jnp.einsum("...i,oi->...o", x, self.values.astype(x.dtype), preferred_element_type=jnp.float32)
        return (y * as_last(self.scales, y)).astype(x.dtype)

    def _product_on_cpu(self, x: jax.Array) -> jax.Array:
        """A product of bytes with bytes. XLA:CPU would cast the weights in memory, which is 10 times slower.

        Each row of `x` becomes two rows of bytes, a coarse and a fine one. XLA:CPU also multiplies two rows faster than
        one. The coarse row is in units of 1/127 of the largest entry, and the fine row is the remainder in 1/254 of
        that unit: 15 bits, more than bfloat16 has.
        """
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        unit = jnp.maximum(jnp.abs(rows).max(axis=1, keepdims=True), jnp.finfo(jnp.float32).tiny) / 127
        coarse = jnp.round(rows / unit)
        fine = jnp.round((rows / unit - coarse) * 254)
        both = jnp.concatenate([coarse, fine]).astype(jnp.int8)
        products = jnp.einsum("mi,oi->mo", both, self.values, preferred_element_type=jnp.int32).astype(jnp.float32)
        coarse_products, fine_products = jnp.split(products, 2)
        y = (coarse_products + fine_products / 254) * unit * self.scales[None]
        return y.astype(x.dtype).reshape(*x.shape[:-1], -1)


def quantised(array: Array) -> Array | Int8:
    """A matrix as `Int8`, computed with JAX if it is a JAX array, else with NumPy; other arrays unchanged."""
    if array.ndim != 2:
        return array
    if isinstance(array, jax.Array):
        return Int8(*_quantise(jnp, array), array.dtype)
    values, scales = np.empty(array.shape, np.int8), np.empty(len(array), np.float32)
    for start in range(0, len(array), _ROWS):
        rows = slice(start, start + _ROWS)
        values[rows], scales[rows] = _quantise(np, array[rows])
    return Int8(values, scales, array.dtype)


def _quantise(numpy: ModuleType, array: Array) -> tuple[Array, Array]:
    """int8 [out, in] and float32 [out], with `numpy` or `jax.numpy`. Zeros have the scale 0; NaN shows in the scale."""
    wide = array.astype(np.float32)
    scales = numpy.abs(wide).max(axis=1) / 127
    unit = numpy.where(scales > 0, scales, 1)[:, None]  # rows of zeros are not divided by 0
    return numpy.round(wide / unit).astype(np.int8), scales

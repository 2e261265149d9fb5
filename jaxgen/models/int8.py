"""Weights of one byte: each row of a matrix in 127ths of its largest entry.

Only weights are quantised. What they are multiplied with keeps its precision, and a row's scale multiplies the product
and not the weights, which are read as the bytes that they are.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxgen.base import as_last
from jaxgen.pytree import pytree

_ROWS = 4096  # of a matrix that are wide at a time


@pytree
@dataclass(frozen=True)
class Int8:
    """A matrix [out, in], in place of an array in the parameters of a model.

    Attributes:
        values: int8 [out, in].
        scales: float32 [out].
        dtype: of the array it stands for, static.
    """

    values: Any
    scales: Any
    dtype: np.dtype = field(metadata={"static": True})

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def __getitem__(self, ids: Any) -> Any:
        """Rows, int32 [...] -> [..., in]; with `...` itself, as Flax asks for what a parameter holds."""
        if ids is Ellipsis:
            return self
        return (self.values[ids].astype(jnp.float32) * self.scales[ids][..., None]).astype(self.dtype)

    def product(self, x: jax.Array) -> jax.Array:
        """x @ self.T, [..., in] -> [..., out]."""
        return lax.platform_dependent(x, cpu=self._product_on_cpu, default=self._product)

    def _product(self, x: jax.Array) -> jax.Array:
        # The compilers widen the weights on their way to the product, not in memory.
        y = jnp.einsum("...i,oi->...o", x, self.values.astype(x.dtype), preferred_element_type=jnp.float32)
        return (y * as_last(self.scales, y)).astype(x.dtype)

    def _product_on_cpu(self, x: jax.Array) -> jax.Array:
        """XLA:CPU widens in memory, 10 times slower, but multiplies bytes with bytes fast, two rows faster than one.

        So each row of `x` becomes two: in 127ths of its largest entry, and in 254ths of these what is left. That is 15
        bits, more than bfloat16 has.
        """
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        unit = jnp.maximum(jnp.abs(rows).max(axis=1, keepdims=True), jnp.finfo(jnp.float32).tiny) / 127
        whole = jnp.round(rows / unit)
        rest = jnp.round((rows / unit - whole) * 254)
        both = jnp.concatenate([whole, rest]).astype(jnp.int8)
        products = jnp.einsum("mi,oi->mo", both, self.values, preferred_element_type=jnp.int32).astype(jnp.float32)
        of_whole, of_rest = jnp.split(products, 2)
        y = (of_whole + of_rest / 254) * unit * self.scales[None]
        return y.astype(x.dtype).reshape(*x.shape[:-1], -1)


def quantised(array: Any) -> Any:
    """A matrix as `Int8`, by NumPy or, of a JAX array, by JAX; anything else as it is."""
    if array.ndim != 2:
        return array
    if isinstance(array, jax.Array):
        return Int8(*_quantise(jnp, array), array.dtype)
    values, scales = np.empty(array.shape, np.int8), np.empty(len(array), np.float32)
    for start in range(0, len(array), _ROWS):
        some = slice(start, start + _ROWS)
        values[some], scales[some] = _quantise(np, array[some])
    return Int8(values, scales, array.dtype)


def _quantise(numpy: Any, array: Any) -> tuple[Any, Any]:
    """int8 [out, in] and float32 [out]. A row of zeros, and one with what is no number, has a scale of its own."""
    wide = array.astype(np.float32)
    scales = numpy.abs(wide).max(axis=1) / 127
    unit = numpy.where(scales > 0, scales, 1)[:, None]
    return numpy.round(wide / unit).astype(np.int8), scales

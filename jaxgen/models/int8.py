"""Weights in int8: each row of a matrix in units of 1/127 of its largest entry, and a few outlier columns unquantised.

Only weights are quantised; activations keep their precision. The scale of a row is applied to the product and not to
the weights, so that the weights are read as bytes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import EllipsisType, ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxgen.base import as_last
from jaxgen.pytree import pytree

Array = jax.Array | np.ndarray

_ROWS = 4096  # of a matrix that are in float32 at a time
_FEW_ROWS = 256  # of activations that a TPU multiplies as bytes


@pytree
@dataclass(frozen=True)
class Int8:
    """A quantised matrix [out, in], which replaces an array in the parameters of a model.

    Attributes:
        values: int8 [out, in], zero in the outlier columns.
        scales: float32 [out].
        columns: int32 [outliers], the indices of the outlier columns.
        outliers: [out, outliers], those columns in the dtype of the original matrix.
    """

    values: Array
    scales: Array
    columns: Array
    outliers: Array

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the original matrix."""
        return self.outliers.dtype

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in jax.tree.leaves(self))

    def __getitem__(self, ids: jax.Array | EllipsisType) -> "Array | Int8":
        """Rows, int32 [...] -> [..., in]; or with `...` the matrix itself, as Flax reads a parameter: `param[...]`."""
        if ids is Ellipsis:
            return self

        def rows(ids: jax.Array) -> jax.Array:
            values = self._values_of_rows(ids).astype(jnp.float32) * self.scales[ids][..., None]
            return values.astype(self.dtype).at[..., self.columns].set(self.outliers[ids])

        def on_tpu(ids: jax.Array) -> jax.Array:
            # For a single row the compiler copies the whole matrix into another layout (1.05 GB per step of an 8B).
            if ids.size != 1:
                return rows(ids)
            return rows(jnp.pad(ids.reshape(1), (0, 1)))[:1].reshape(*ids.shape, -1)

        return lax.platform_dependent(ids, tpu=on_tpu, default=rows)

    def product(self, x: jax.Array) -> jax.Array:
        """x @ self.T, [..., in] -> [..., out]."""
        # On a TPU the products of many rows in int32 would take more memory than everything else in a prefill.
        on_tpu = self._product_of_bytes if x.size // x.shape[-1] <= _FEW_ROWS else self._product
        return lax.platform_dependent(x, cpu=self._product_of_bytes, tpu=on_tpu, default=self._product)

    def _product(self, x: jax.Array) -> jax.Array:
        # On a GPU the compiler fuses this cast into the product, so that memory traffic is in bytes.
        y = self._multiply(x.reshape(-1, x.shape[-1]), jnp.float32).reshape(*x.shape[:-1], -1)
        return (y * as_last(self.scales, y) + self._outlier_product(x)).astype(x.dtype)

    def _product_of_bytes(self, x: jax.Array) -> jax.Array:
        """Multiplies bytes by bytes. Otherwise XLA:CPU would cast the weights in memory, which is 10 times slower.

        A TPU has a unit for such products. With casts, a single row goes to the vector unit instead (8B on a v5e,
        estimated: 64 -> 13 ms a step).
        """
        rows = x.reshape(-1, x.shape[-1])
        y = as_bytes(rows, lambda rows: self._multiply(rows, jnp.int32)) * self.scales[None]
        return (y.reshape(*x.shape[:-1], -1) + self._outlier_product(x)).astype(x.dtype)

    def _values_of_rows(self, ids: jax.Array) -> jax.Array:
        """int32 [...] -> int8 [..., in]."""
        return jnp.asarray(self.values)[ids]

    def _multiply(self, rows: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """rows @ values.T, [rows, in] -> [rows, out] in this dtype."""

        def at_once(rows: jax.Array) -> jax.Array:
            return jnp.einsum("mi,oi->mo", rows, self.values.astype(rows.dtype), preferred_element_type=dtype)

        if len(rows) > 1:
            return at_once(rows)
        # The compiler for GPUs multiplies eight rows faster than one (both products of an MLP of an 8B on an H200: 62
        # instead of 86 us, and 92 in bfloat16).
        padding = (0, 7), (0, 0)
        return lax.platform_dependent(rows, cuda=lambda rows: at_once(jnp.pad(rows, padding))[:1], default=at_once)

    def _outlier_product(self, x: jax.Array) -> jax.Array:
        """The outlier columns' part of the product, [..., in] -> float32 [..., out]."""
        return lax.platform_dependent(
            x,
            cpu=lambda x: self._outlier_product_of_gathered(x, jnp.float32),  # XLA:CPU lacks some products of bfloat16
            tpu=self._outlier_product_on_tpu,
            default=self._outlier_product_of_gathered,
        )

    def _outlier_product_of_gathered(self, x: jax.Array, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
        """In a dtype that holds every number of x, by default its own."""
        dtype = x.dtype if dtype is None else dtype
        selected, outliers = x[..., self.columns].astype(dtype), self.outliers.astype(x.dtype).astype(dtype)
        return jnp.einsum("...i,oi->...o", selected, outliers, preferred_element_type=jnp.float32)

    def _outlier_product_on_tpu(self, x: jax.Array) -> jax.Array:
        """Two products in the matrix unit, the first of which selects the columns.

        A gather is three operations of about a microsecond each, and without padding a single row goes to the vector
        unit (8B on a v5e, estimated: 13.1 -> 12.2 ms a step, and 13.6 -> 12.9 at batch 8).
        """
        rows = x.reshape(-1, x.shape[-1])
        padded = jnp.pad(rows, ((0, max(8 - len(rows), 0)), (0, 0)))
        selected = jnp.einsum("mi,ci->mc", padded, jax.nn.one_hot(self.columns, x.shape[-1], dtype=x.dtype))
        outliers = self.outliers.astype(x.dtype)
        y = jnp.einsum("mc,oc->mo", selected, outliers, preferred_element_type=jnp.float32)
        return y[: len(rows)].reshape(*x.shape[:-1], -1)


def as_bytes(rows: jax.Array, multiply: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """float32 [..., M, out]: `multiply` of rows [..., M, in], a linear function of int8 with results in int32.

    Each row becomes two rows of bytes, a coarse and a fine one. XLA:CPU also multiplies two rows faster than one. The
    coarse row is in units of 1/127 of the largest entry, and the fine row is the remainder in 1/254 of that unit: 15
    bits, more than bfloat16 has.
    """
    rows = rows.astype(jnp.float32)
    unit = jnp.maximum(jnp.abs(rows).max(axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny) / 127
    coarse = jnp.round(rows / unit)
    fine = jnp.round((rows / unit - coarse) * 254)
    products = multiply(jnp.concatenate([coarse, fine], axis=-2).astype(jnp.int8)).astype(jnp.float32)
    coarse_products, fine_products = jnp.split(products, 2, axis=-2)
    return (coarse_products + fine_products / 254) * unit


def outlier_columns(columns: int) -> int:
    """The number of columns of a matrix that stay unquantised: at most 16, and at most one in 32."""
    return min(16, columns // 32)


def quantised(array: Array) -> Array | Int8:
    """A matrix as `Int8`, computed with JAX if it is a JAX array, else with NumPy.

    Other arrays are returned as they are, and so are matrices of one row.
    """
    if not is_quantised(array.shape):
        return array
    numpy, columns, parts = without_outliers(array)
    values, scales = zip(*(_quantise(numpy, part) for part in parts), strict=True)
    return Int8(numpy.concatenate(values), numpy.concatenate(scales), columns, array[:, columns])


def is_quantised(shape: tuple[int, ...]) -> bool:
    """Whether an array of this shape is a matrix of more than one row."""
    return len(shape) == 2 and shape[0] > 1


def without_outliers(array: Array) -> tuple[ModuleType, Array, Iterator[Array]]:
    """`jax.numpy` for a JAX array, else NumPy; int32 [outliers], the outlier columns; and the matrix in float32, some
    rows at a time, with zeros in these columns."""
    numpy, size = (jnp, len(array)) if isinstance(array, jax.Array) else (np, _ROWS)

    def parts() -> Iterator[Array]:
        return (array[start : start + size].astype(np.float32) for start in range(0, len(array), size))

    columns = _find_outliers(numpy, parts(), outlier_columns(array.shape[1]))
    others = ~_among(numpy, columns, array.shape[1])[None]
    return numpy, columns, (numpy.where(others, part, 0) for part in parts())


def _find_outliers(numpy: ModuleType, parts: Iterator[Array], count: int) -> Array:
    """int32 [count]: half are the columns with the largest entries, half those with the smallest entries on average.

    An entry that is large for its row would set the scale of the row. It belongs to an input that is rarely active, and
    then strongly. In a column of small entries the input is large for every token, which multiplies the errors. On
    SmolLM2-135M, leaving these columns unquantised removes two thirds of the divergence.
    """
    tiny = np.finfo(np.float32).tiny  # rows of zeros are not divided by 0
    peaks, sums = [], []
    for part in parts:
        sizes = numpy.abs(part)
        peaks.append((sizes / numpy.sqrt((part * part).mean(axis=1, keepdims=True) + tiny)).max(axis=0))
        sums.append(sizes.sum(axis=0))
    largest = numpy.argsort(-numpy.stack(peaks).max(axis=0))[: (count + 1) // 2]
    total = numpy.stack(sums).sum(axis=0)
    smallest = numpy.argsort(numpy.where(_among(numpy, largest, len(total)), np.inf, total))[: count // 2]
    return numpy.concatenate([largest, smallest]).astype(np.int32)


def _quantise(numpy: ModuleType, wide: Array) -> tuple[Array, Array]:
    """float32 [out, in] -> int8 [out, in] and float32 [out]. Zeros have the scale 0; NaN shows in the scale."""
    scales = numpy.abs(wide).max(axis=1) / 127
    unit = numpy.where(scales > 0, scales, 1)[:, None]  # rows of zeros are not divided by 0
    return numpy.round(wide / unit).astype(np.int8), scales


def _among(numpy: ModuleType, columns: Array, count: int) -> Array:
    """bool [count]: True at the indices in `columns`."""
    return (numpy.arange(count, dtype=columns.dtype)[:, None] == columns[None]).any(axis=1)

"""Keys or values of the KV cache in eight bits. They take half the memory of bfloat16, or a quarter of float32."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.pytree import pytree


@dataclass(frozen=True)
class QuantizedArray:
    """An array [..., S, H] in eight bits. It stands where the cache otherwise has an array in the model's dtype.

    Attributes:
        values: [..., S, H].
        scales: float32, what to multiply the values with.
        dtype: static, the dtype of the array.
    """

    values: jax.Array
    scales: jax.Array
    dtype: np.dtype = field(metadata={"static": True})

    @classmethod
    def of(cls, array: jax.Array, valid: jax.Array | None = None) -> Self:
        """Quantises an array [..., S, H]; `valid`, bool that broadcasts to it, tells which entries set the scale."""
        raise NotImplementedError

    def quantized(self, array: jax.Array) -> Self:
        """Quantises new columns, [..., T, H], which are to be written into this array."""
        raise NotImplementedError

    def mapped(self, function: Callable[..., jax.Array], *others: "QuantizedArray") -> Self:
        """The result of a function that moves slots or rows, but changes no numbers; with others of the same class.

        The function gets arrays [..., S, H], where H may also be 1.
        """
        raise NotImplementedError

    def dequantized(self) -> jax.Array:
        """[..., S, H] in the dtype of the array."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim


@pytree
@dataclass(frozen=True)
class Int8Array(QuantizedArray):
    """Each column of a head in units of 1/127 of its largest entry.

    Attributes:
        values: int8 [..., S, H].
        scales: float32 [..., S].
    """

    @classmethod
    def of(cls, array: jax.Array, valid: jax.Array | None = None) -> Self:
        del valid  # every column has a scale of its own
        wide = array.astype(jnp.float32)
        scales = jnp.abs(wide).max(axis=-1) / 127
        unit = jnp.where(scales > 0, scales, 1)[..., None]  # columns of zeros are not divided by 0
        return cls(jnp.round(wide / unit).astype(jnp.int8), scales, array.dtype)

    def quantized(self, array: jax.Array) -> Self:
        return self.of(array)

    def mapped(self, function: Callable[..., jax.Array], *others: QuantizedArray) -> Self:
        arrays = self, *others
        values = function(*(each.values for each in arrays))
        scales = function(*(each.scales[..., None] for each in arrays))[..., 0]
        return type(self)(values, scales, self.dtype)

    def dequantized(self) -> jax.Array:
        return (self.values.astype(jnp.float32) * self.scales[..., None]).astype(self.dtype)


@pytree
@dataclass(frozen=True)
class Float8Array(QuantizedArray):
    """Same as transformers 5.24 `Fp8QuantizedLayer`: one scale for all entries, which the prompt's largest one sets.

    Attributes:
        values: float8_e4m3fn [..., S, H].
        scales: float32 [].
    """

    LARGEST: ClassVar[float] = float(jnp.finfo(jnp.float8_e4m3fn).max)

    @classmethod
    def of(cls, array: jax.Array, valid: jax.Array | None = None) -> Self:
        sizes = jnp.abs(array.astype(jnp.float32))
        largest = (sizes if valid is None else jnp.where(valid, sizes, 0)).max(initial=0)
        # XLA replaces a division by a constant by a product, which rounds otherwise. To it, this divisor is none.
        divisor = jnp.where(jnp.isnan(largest), 1, cls.LARGEST)
        scale = jnp.maximum(largest / divisor, jnp.finfo(jnp.float32).tiny)
        return cls(array, scale, array.dtype).quantized(array)

    def quantized(self, array: jax.Array) -> Self:
        # torch rounds what is too large to the largest number, and JAX to NaN.
        scaled = jnp.clip(array.astype(jnp.float32) / self.scales, -self.LARGEST, self.LARGEST)
        return type(self)(scaled.astype(jnp.float8_e4m3fn), self.scales, self.dtype)

    def mapped(self, function: Callable[..., jax.Array], *others: QuantizedArray) -> Self:
        return type(self)(function(self.values, *(each.values for each in others)), self.scales, self.dtype)

    def dequantized(self) -> jax.Array:
        return (self.values.astype(jnp.float32) * self.scales).astype(self.dtype)


Array = jax.Array | QuantizedArray

# By the name of the backend in `cache_config`.
BACKENDS: dict[str, type[QuantizedArray]] = {"int8": Int8Array, "fp8": Float8Array}


def mapped(function: Callable[..., jax.Array], *arrays: Array) -> Array:
    """`function` of arrays [..., S, H], quantised or not; see `QuantizedArray.mapped`."""
    quantized = [array for array in arrays if isinstance(array, QuantizedArray)]
    return quantized[0].mapped(function, *quantized[1:]) if quantized else function(*arrays)


def dequantized(array: Array) -> jax.Array:
    """The array itself unless it is quantised."""
    return array.dequantized() if isinstance(array, QuantizedArray) else array

"""What the decoder of an encoder-decoder model sees of its source: written once, then only read."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import jax

from jaxgen.pytree import pytree


@pytree
@dataclass(frozen=True)
class Memory:
    """The keys and values of the cross-attention, computed from the encoder's output.

    Several rows of the cache may belong to one source: with N = B * r rows, row n reads source n // r. So the samples
    and the beams of a prompt share its memory.

    Attributes:
        layers: one (keys, values) pair per layer of the decoder, each [B, K, X, H] without dimensions B or K of size 1,
            as in `KVCache`.
        mask: bool [B, X]. False on padding of the source.
    """

    layers: tuple[tuple[jax.Array, jax.Array], ...]
    mask: jax.Array

    @classmethod
    def of(cls, layers: Iterable[tuple[jax.Array, jax.Array]], mask: jax.Array) -> Self:
        """From keys and values [B, K, X, H]."""

        def squeezed(array: jax.Array) -> jax.Array:
            return array.reshape(*without_ones(*array.shape[:2]), *array.shape[2:])

        return cls(tuple((squeezed(keys), squeezed(values)) for keys, values in layers), mask)

    def take(self, rows: jax.Array, of: int) -> Self:
        """The memory of int32 [M] rows of a cache that has `of` rows, with M sources."""
        sources, batch = rows // (of // len(self.mask)), len(self.mask)

        def take(array: jax.Array) -> jax.Array:
            return array.reshape(batch, -1, *array.shape[-2:])[sources]

        return self.of(((take(keys), take(values)) for keys, values in self.layers), self.mask[sources])


def without_ones(*sizes: int) -> tuple[int, ...]:
    """The sizes that are not 1; see `KVCache`."""
    return tuple(size for size in sizes if size > 1)

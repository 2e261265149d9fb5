"""The KV cache: one pair of arrays per layer, written at one index that all rows share.

Left padding is what makes the index a scalar: the newest token of every row sits in the same slot, so a step writes
each layer with one `dynamic_update_slice`, which XLA does in place. The invariant: slot `s` of row `n` may be attended
exactly if `valid[n, s]`, and slots at `length` and beyond are never valid. Those that are not hold finite numbers all
the same: a weight of 0 times NaN is NaN, and to mask values at each step costs 6 % at batch 8 (CPU).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgen.base import rows_axis
from jaxgen.pytree import pytree


@pytree
@dataclass(frozen=True)
class KVCache:
    """Keys and values of the columns seen so far.

    The layout [N, K, S, H] keeps the products of attention free of transposed copies on CPU, GPU and TPU. Of N and K, a
    dimension of size one is left out: XLA:CPU drops it from the products but not from the arrays the loop carries, and
    then copies every layer at every step to reconcile the two (a batch of one, 192 slots: 4 times slower attention).

    Attributes:
        layers: one (keys, values) pair per layer, each [N, K, S, H] less its ones, in the model's dtype, keys rotated.
        valid: bool [N, S]. Slots that later columns may attend.
        length: int32 []. Columns written so far, which is the next slot to write.
        position: int32 [N]. Position id of each row's next token.
        columns: int32 [S]. Which column of the text each slot holds, up to a constant; less than any of them where
            nothing is written. None for a model whose layers all look back without limit.
    """

    layers: tuple[tuple[jax.Array, jax.Array], ...]
    valid: jax.Array
    length: jax.Array
    position: jax.Array
    columns: jax.Array | None = None

    @property
    def branches(self) -> int:
        return 1

    @property
    def slots(self) -> int:
        return self.valid.shape[-1]

    @classmethod
    def zeros(
        cls,
        layers: int,
        rows: int,
        slots: int,
        heads: int,
        head_dim: int,
        dtype: jax.typing.DTypeLike,
        windowed: bool = False,
    ):
        # Zeros, not `jnp.empty`: since jax 0.11 the latter is uninitialised memory, which can hold NaN.
        shape = (*_without_ones(rows, heads), slots, head_dim)
        return cls(
            layers=tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(layers)),
            valid=jnp.zeros((rows, slots), bool),
            length=jnp.zeros((), jnp.int32),
            position=jnp.zeros((rows,), jnp.int32),
            columns=jnp.full((slots,), -1, jnp.int32) if windowed else None,
        )

    def placed(self, mesh: Mesh, rows: int, heads: int) -> Self:
        """The cache spread over a mesh: rows over its axis "data", heads over "tensor"."""
        axes = [axis for axis, size in zip((rows_axis(mesh, rows), "tensor"), (rows, heads), strict=True) if size > 1]
        spec = [axis if axis in mesh.shape else None for axis in axes]
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return replace(self, layers=lax.with_sharding_constraint(self.layers, sharding))

    def extend(
        self, attention_mask: jax.Array, position_ids: jax.Array | None = None
    ) -> tuple["KVCache", jax.Array, jax.Array]:
        """Makes room for T more columns; called once per forward pass, before the layers' `update`.

        Unless they are given, positions count the unmasked columns and are 0 on masked ones. The next token follows the
        position of the last column, as in transformers 5.24: a right-padded row therefore continues at position 1.

        Args:
            attention_mask: bool [N, T].
            position_ids: int32 [N, T].

        Returns:
            The cache, int32 [N, T] position ids, and bool [N, T, S] saying which slots each column attends.
        """
        columns = attention_mask.shape[1]
        if position_ids is None:
            counted = self.position[:, None] + jnp.cumsum(attention_mask, axis=1, dtype=jnp.int32) - 1
            position_ids = jnp.where(attention_mask, counted, 0)
        valid = lax.dynamic_update_slice_in_dim(self.valid, attention_mask, self.length, axis=1)
        own_slot = self.length + jnp.arange(columns)
        causal = jnp.arange(valid.shape[1])[None] <= own_slot[:, None]
        cache = replace(self, valid=valid, length=self.length + columns, position=position_ids[:, -1] + 1)
        return cache._numbered(own_slot), position_ids, valid[:, None, :] & causal[None]

    def _numbered(self, own_columns: jax.Array) -> Self:
        """The cache whose last T slots hold int32 [T] columns."""
        if self.columns is None:
            return self
        own = own_columns.astype(jnp.int32)
        return replace(self, columns=lax.dynamic_update_slice_in_dim(self.columns, own, self.length - len(own), axis=0))

    def within(self, window: int, mask: jax.Array) -> jax.Array:
        """Of the mask that `extend` gave with this cache, bool [N, T, S], the last `window` columns up to the own one.

        Counted are columns, as in transformers, and not positions: padding between two tokens parts them.
        """
        assert self.columns is not None, "made without `windowed`"
        width = mask.shape[1]
        own = lax.dynamic_slice_in_dim(self.columns, self.length - width, width)
        return mask & (self.columns[None] > own[:, None] - window)[None]

    def skip(self, columns: jax.Array) -> Self:
        """The same cache, for a forward pass whose first int32 [] columns pad a bucket and are none of the text."""
        # Slots number what comes next; what is there already moves up to it.
        return self if self.columns is None else replace(self, columns=self.columns + columns)

    def update(self, layer: int, keys: jax.Array, values: jax.Array) -> tuple[Self, jax.Array, jax.Array]:
        """Writes one layer's [N, K, T, H] into the slots that `extend` made room for.

        Returns:
            The cache, and all keys and values of the layer, each [N, K, S, H] less its ones.
        """
        rows, heads, columns, head_dim = keys.shape
        batch = _without_ones(rows, heads)
        start = self.length - columns
        all_keys, all_values = (
            lax.dynamic_update_slice_in_dim(old, new.reshape(*batch, columns, head_dim), start, axis=-2)
            for old, new in zip(self.layers[layer], (keys, values), strict=True)
        )
        layers = (*self.layers[:layer], (all_keys, all_values), *self.layers[layer + 1 :])
        return replace(self, layers=layers), all_keys, all_values

    def grow(self, slots: int) -> Self:
        """The same cache with `slots` slots, the new ones zero and not valid."""
        extra = slots - self.slots

        def pad(array: jax.Array) -> jax.Array:
            return jnp.pad(array, (*[(0, 0)] * (array.ndim - 2), (0, extra), (0, 0)))

        return replace(
            self,
            layers=tuple((pad(keys), pad(values)) for keys, values in self.layers),
            valid=jnp.pad(self.valid, (*[(0, 0)] * (self.valid.ndim - 1), (0, extra))),
            columns=None if self.columns is None else jnp.pad(self.columns, (0, extra), constant_values=-1),
        )

    def grow_by_parts(self, slots: int, grow: Callable[[Self, int], Self]) -> Self:
        """See `base.Cache`: one layer grows after the other, and makes room for the next."""
        layers, grown = [], self
        for pair in self.layers:
            grown = grow(replace(self, layers=(pair,)), slots)
            for array in pair:
                array.delete()
            layers += grown.layers
        return replace(grown, layers=tuple(layers))

    def take(self, rows: jax.Array) -> Self:
        """The cache of int32 [M] rows of this one, in their order."""

        def take(array: jax.Array) -> jax.Array:
            taken = array.reshape(len(self.valid), -1, *array.shape[-2:])[rows]
            return taken.reshape(*_without_ones(*taken.shape[:2]), *array.shape[-2:])

        return replace(
            self,
            layers=tuple((take(keys), take(values)) for keys, values in self.layers),
            valid=self.valid[rows],
            position=self.position[rows],
        )

    def select(self, rows: jax.Array, slots: jax.Array, valid: jax.Array, length: jax.Array) -> "KVCache":
        """A cache of chosen columns, one after the other; positions have to be given to what follows.

        Args:
            rows: int32 [M].
            slots: int32 [M, S]. Of each of these rows, the slots to take, in their new order.
            valid: bool [M, S]. Which of them later columns may attend: none from `length` on.
            length: int32 []. How many of them are columns. The slots after these are room for more, whatever they hold.
        """

        def select(array: jax.Array) -> jax.Array:
            whole = array.reshape(len(self.valid), -1, *array.shape[-2:])
            heads = jnp.arange(whole.shape[1])[None, :, None]
            taken = whole[rows[:, None, None], heads, slots[:, None]]
            return taken.reshape(*_without_ones(*taken.shape[:2]), *taken.shape[2:])

        numbers = jnp.arange(slots.shape[1], dtype=jnp.int32)
        return KVCache(
            layers=tuple((select(keys), select(values)) for keys, values in self.layers),
            valid=valid,
            length=jnp.asarray(length, jnp.int32),
            position=jnp.zeros(len(rows), jnp.int32),
            columns=None if self.columns is None else jnp.where(numbers < length, numbers, -1),
        )

    def branch(self, branches: int) -> "BranchedCache":
        """A cache of C branches that each continue a row; see `BranchedCache`."""
        return BranchedCache(
            layers=self.layers,
            valid=jnp.repeat(self.valid[:, None], branches, axis=1),
            length=self.length,
            position=jnp.repeat(self.position[:, None], branches, axis=1),
            columns=self.columns,
        )

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def with_layers(self, layers: tuple[tuple[jax.Array, jax.Array], ...]) -> Self:
        """The same cache with other keys and values, each [N, K, S, H] with all its dimensions."""
        shaped = tuple(
            (keys.reshape(own[0].shape), values.reshape(own[1].shape))
            for own, (keys, values) in zip(self.layers, layers, strict=True)
        )
        return replace(self, layers=shaped)

    def layer(self, index: int) -> tuple[jax.Array, jax.Array]:
        """One layer's keys and values, each [N, K, S, H] with all its dimensions."""
        keys, values = self.layers[index]
        shape = (len(self.valid), -1, *keys.shape[-2:])
        return keys.reshape(shape), values.reshape(shape)


@pytree
@dataclass(frozen=True)
class BranchedCache(KVCache):
    """The cache of C branches per row, such as beams, that share what is written.

    A forward pass over C columns gives one to each branch, in C slots side by side. What a branch attends is its own
    past: the prompt, and of the C slots of every step the one of its ancestor. A branch that continues another takes
    over which slots those are, C x S bools a row, and no key or value ever moves.

    Attributes:
        valid: bool [N, C, S]. Slots that the next column of each branch may attend.
        position: int32 [N, C].
    """

    @property
    def branches(self) -> int:
        return self.valid.shape[1]

    def extend(
        self, attention_mask: jax.Array, position_ids: jax.Array | None = None
    ) -> tuple["BranchedCache", jax.Array, jax.Array]:
        """As `KVCache.extend`, for int32 [N, C] columns that go one to each branch and do not attend each other."""
        if position_ids is None:
            position_ids = self.position
        own = jnp.eye(self.branches, dtype=bool)[None] & attention_mask[:, None]
        valid = lax.dynamic_update_slice_in_dim(self.valid, own, self.length, axis=2)
        cache = replace(self, valid=valid, length=self.length + self.branches, position=position_ids + 1)
        if self.columns is not None:  # all of them continue the text by the same column
            cache = cache._numbered(jnp.full(self.branches, self.columns.max() + 1))
        return cache, position_ids, valid

    def reorder(self, parents: jax.Array) -> Self:
        """The cache whose branch c continues branch `parents[n, c]` of row n; int32 [N, C]."""
        valid, position = jax.vmap(lambda row, places: (row[0][places], row[1][places]))(
            (self.valid, self.position), parents
        )
        return replace(self, valid=valid, position=position)

    def keep(self, chosen: jax.Array) -> Self:
        """The cache whose branches all continue branch `chosen[n]` of row n; int32 [N].

        Of the C columns written last, the chosen one moves to the first of their slots, and the others are free again.
        """
        start = self.length - self.branches

        def keep(array: jax.Array) -> jax.Array:
            written = lax.dynamic_slice_in_dim(array, start, self.branches, axis=-2)
            columns = written.reshape(len(chosen), -1, *written.shape[-2:])
            kept = jnp.take_along_axis(columns, chosen[:, None, None, None], axis=2)
            return lax.dynamic_update_slice_in_dim(array, kept.reshape(*written.shape[:-2], 1, -1), start, axis=-2)

        slots = jnp.arange(self.valid.shape[2])[None, None]
        return replace(
            self,
            layers=tuple((keep(keys), keep(values)) for keys, values in self.layers),
            valid=(self.valid & (slots < start)) | (slots == start),
            length=start + 1,
        )


def _without_ones(*sizes: int) -> tuple[int, ...]:
    return tuple(size for size in sizes if size > 1)

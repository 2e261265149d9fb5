"""The KV cache: one pair of arrays per layer, written at one index that all rows share.

```
slot      0  1  2  3  4  5  6  7
row 0     .  .  a  b  c  d  _  _      "." padding, not valid; "_" free, not valid
row 1     e  f  g  h  i  j  _  _      length = 6: the next token of every row goes to slot 6
```

The index is a scalar because prompts are padded on the left: the newest tokens of all rows are in the same slot, and a
step writes each layer with one `dynamic_update_slice`, which XLA does in place. Slot `s` of row `n` may be attended if
and only if `valid[n, s]`, and slots from `length` on are never valid. Slots that are not valid still hold finite
numbers: a weight of 0 times NaN is NaN, and masking the values at each step costs 6 % at batch 8 (CPU).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgen.base import rows_axis, tensor_shards
from jaxgen.encoder_memory import Memory, without_ones
from jaxgen.pytree import pytree
from jaxgen.quantized_array import BACKENDS, Array, QuantizedArray, dequantized, mapped

_FREE = -(1 << 30)  # in `columns`: a slot without a column; so low that no `skip` raises it to a real column


@pytree
@dataclass(frozen=True)
class KVCache:
    """Keys and values of the columns seen so far.

    With the layout [N, K, S, H], attention needs no transposed copies on CPU, GPU and TPU. If N or K is 1, that
    dimension is left out. XLA:CPU drops it from the products but not from the carry of the loop, and would copy every
    layer at every step to convert between the two (a batch of one, 192 slots: 4 times slower attention).

    Attributes:
        layers: one (keys, values) pair per layer, each [N, K, S, H] without dimensions N or K of size 1, in the model's
            dtype or quantised. Keys are rotated.
        valid: bool [N, S]. Slots that later columns may attend to.
        length: int32 []. The number of slots written so far, which is also the next slot to write.
        position: int32 [N]. Position id of each row's next token.
        columns: int32 [S]. The column of the text in each slot, up to a constant; a far lower number in free slots.
            None if the model does not measure distances in columns, as sliding windows do.
        memory: of an encoder-decoder model, what the decoder sees of the source; None for other models.
        room: static, see `reserve`; None unless the next forward pass reads the whole prompt.
        copies: static. How often each key-value head is in `layers`, one copy after the other. On a mesh with more
            devices than heads, each device has a copy of one head, and K above is all copies.
    """

    layers: tuple[tuple[Array, Array], ...]
    valid: jax.Array
    length: jax.Array
    position: jax.Array
    columns: jax.Array | None = None
    memory: Memory | None = None
    room: int | None = field(default=None, metadata={"static": True})
    copies: int = field(default=1, metadata={"static": True})

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
        copies: int = 1,
    ) -> Self:
        # Zeros, not `jnp.empty`: since jax 0.11 the latter is uninitialised memory, which can hold NaN.
        shape = (*without_ones(rows, heads * copies), slots, head_dim)
        return cls(
            layers=tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(layers)),
            valid=jnp.zeros((rows, slots), bool),
            length=jnp.zeros((), jnp.int32),
            position=jnp.zeros((rows,), jnp.int32),
            columns=jnp.full((slots,), _FREE, jnp.int32) if windowed else None,
            copies=copies,
        )

    def placed(self, mesh: Mesh, rows: int, heads: int) -> Self:
        """The cache sharded over a mesh: rows over its axis "data", heads over "tensor" if it divides them."""
        heads *= self.copies
        # One axis per dimension that the arrays have: N and K of size 1 are left out of them.
        heads_axis = "tensor" if heads % tensor_shards(mesh) == 0 else None
        axes = [axis for axis, size in zip((rows_axis(mesh, rows), heads_axis), (rows, heads), strict=True) if size > 1]
        spec = [axis if axis in mesh.shape else None for axis in axes]
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return replace(self, layers=lax.with_sharding_constraint(self.layers, sharding))

    def extend(
        self, attention_mask: jax.Array, position_ids: jax.Array | None = None
    ) -> tuple["KVCache", jax.Array, jax.Array]:
        """Makes room for T more columns. Call it once per forward pass, before the layers' `update`.

        By default positions count the unmasked columns, and masked columns have position 0. The next token follows the
        position of the last column, as in transformers 5.24, so a right-padded row continues at position 1.

        ```
        slot      0 1 2 3 4 5         length = 2, T = 3, attention_mask of a row = 0 1 1
        valid     1 1 0 1 1 0
        column 0  1 1 0 0 0 0         the slots that the new columns attend to: valid,
        column 1  1 1 0 1 0 0         and not after their own slot (2, 3, 4)
        column 2  1 1 0 1 1 0
        ```

        Args:
            attention_mask: bool [N, T].
            position_ids: int32 [N, T].

        Returns:
            The cache, int32 [N, T] position ids, and bool [N, T, S], the slots that each column attends to.
        """
        columns = attention_mask.shape[1]
        if position_ids is None:
            counted = self.position[:, None] + jnp.cumsum(attention_mask, axis=1, dtype=jnp.int32) - 1
            position_ids = jnp.where(attention_mask, counted, 0)
        valid = lax.dynamic_update_slice_in_dim(self.valid, attention_mask, self.length, axis=1)
        # All rows have the same slots, so the causal mask, [T, S], is the same for all rows.
        new_slots = self.length + jnp.arange(columns)
        causal = jnp.arange(valid.shape[1])[None] <= new_slots[:, None]
        cache = replace(self, valid=valid, length=self.length + columns, position=position_ids[:, -1] + 1)
        return cache._numbered(new_slots), position_ids, valid[:, None, :] & causal[None]

    def _numbered(self, columns: jax.Array) -> Self:
        """The cache with the columns of the last T slots set to int32 [T], if it keeps them."""
        if self.columns is None:
            return self
        start = self.length - len(columns)
        written = lax.dynamic_update_slice_in_dim(self.columns, columns.astype(jnp.int32), start, axis=0)
        return replace(self, columns=written)

    def within(self, window: int, mask: jax.Array) -> jax.Array:
        """Limits the mask of `extend`, bool [N, T, S], to each column itself and the `window` - 1 columns before it.

        As in transformers, the distance is in columns and not in positions: padding between two tokens counts.
        """
        new, all_columns = self.text_columns(mask.shape[1])
        # A column attends to the slots whose numbers are above its own minus the window.
        return mask & (all_columns[:, None] > new[:, :, None] - window)

    def text_columns(self, num_new: int) -> tuple[jax.Array, jax.Array]:
        """int32 [1, T] and [1, S]: the columns of the text in the last T slots and in all slots, up to a constant.

        The columns of free slots are far below all others.
        """
        assert self.columns is not None, "made without `windowed`"
        new = lax.dynamic_slice_in_dim(self.columns, self.length - num_new, num_new)
        return new[None], self.columns[None]

    def skip(self, columns: jax.Array) -> Self:
        """See `base.Cache.skip`."""
        # The next T slots are numbered by slot. With 2 columns of padding the older ones move up to close the gap:
        #   slot      0  1  2  3  4  5  6        a b c, then . . d e
        #   columns   2  3  4  3  4  5  6        d is 1 column after c, not 3
        return self if self.columns is None else replace(self, columns=self.columns + columns)

    def update(self, layer: int, keys: jax.Array, values: jax.Array) -> tuple[Self, Array, Array]:
        """Writes the [N, K, T, H] keys and values of one layer into the slots that `extend` made room for.

        Each head comes once, and is written as often as the cache has it.

        Returns:
            The cache, and all keys and values of the layer as in `layers`; in the pass that reads a whole prompt these
            are its own, as they were given.
        """
        keys, values = (self._copied(each) for each in (keys, values))
        rows, heads, columns, _ = keys.shape
        batch = without_ones(rows, heads)
        start = self.length - columns

        def squeezed(array: jax.Array) -> jax.Array:
            return array.reshape(*batch, *array.shape[2:])

        def write(old: jax.Array, new: jax.Array) -> jax.Array:
            # Slots are the last axis but one of [N, K, S, H], whether or not N and K are left out.
            return lax.dynamic_update_slice_in_dim(old, squeezed(new), start, axis=-2)

        def written(old: Array, new: jax.Array) -> Array:
            return mapped(write, old, old.quantized(new) if isinstance(old, QuantizedArray) else new)

        def first(old: Array, new: jax.Array) -> Array:
            """The prompt fills the cache. It may set the scale of all later columns."""
            if isinstance(old, QuantizedArray):
                return mapped(squeezed, old.of(new, self.valid[:, None, :, None]))
            return write(old, new)

        news, olds, room = (keys, values), self.layers[layer], self.room
        if room is None:
            pair = all_keys, all_values = tuple(map(written, olds, news))
        else:
            pair, (all_keys, all_values) = tuple(map(first, olds, news)), map(squeezed, news)
        if room:
            pair = _each(lambda array: _padded(array, self.slots + room), pair)
            # Or XLA would pad all layers after the last one, and the prompt would be there twice.
            pair, all_keys, all_values = lax.optimization_barrier((pair, all_keys, all_values))
        layers = (*self.layers[:layer], pair, *self.layers[layer + 1 :])
        return replace(self, layers=layers), all_keys, all_values

    def reserve(self, slots: int) -> Self:
        """See `base.Cache.reserve`: `update` pads each layer, and `grow` finds it padded."""
        return replace(self, room=slots - self.slots)

    def grow(self, slots: int) -> Self:
        """The same cache with `slots` slots, the new ones zero and not valid."""
        extra = slots - self.slots
        return replace(
            self,
            room=None,
            layers=_each(lambda array: _padded(array, slots), self.layers),
            # `valid` has one more axis in a cache with branches.
            valid=jnp.pad(self.valid, (*[(0, 0)] * (self.valid.ndim - 1), (0, extra))),
            columns=None
            if self.columns is None
            else jnp.pad(self.columns, (*[(0, 0)] * (self.columns.ndim - 1), (0, extra)), constant_values=_FREE),
        )

    def grow_by_parts(self, slots: int, grow: Callable[[Self, int], Self]) -> Self:
        """See `base.Cache.grow_by_parts`: layer by layer, each deleted once it has grown."""
        layers, grown = [], self
        for pair in self.layers:
            # Without the memory, which does not grow and would be copied.
            grown = grow(replace(self, layers=(pair,), memory=None), slots)
            for array in jax.tree.leaves(pair):
                array.delete()
            layers += grown.layers
        return replace(grown, layers=tuple(layers), memory=self.memory)

    def repeat(self, copies: int) -> Self:
        """See `base.Cache.repeat`. The copies share the memory."""
        return replace(self.take(jnp.repeat(jnp.arange(len(self.valid)), copies)), memory=self.memory)

    def take(self, rows: jax.Array) -> Self:
        """Gathers int32 [M] rows, as `batch_select_indices` of transformers' caches."""

        def take(array: jax.Array) -> jax.Array:
            # The gather needs N and K even if they are 1. Afterwards they are left out again if they are 1.
            taken = array.reshape(len(self.valid), -1, *array.shape[-2:])[rows]
            return taken.reshape(*without_ones(*taken.shape[:2]), *array.shape[-2:])

        return replace(
            self,
            layers=_each(take, self.layers),
            valid=self.valid[rows],
            position=self.position[rows],
            memory=self._memory_of(rows),
        )

    def _memory_of(self, rows: jax.Array) -> Memory | None:
        return None if self.memory is None else self.memory.take(rows, len(self.valid))

    def select(self, rows: jax.Array, slots: jax.Array, valid: jax.Array, length: jax.Array) -> "KVCache":
        """Gathers slots of rows, such as the slots of one beam. Pass `position_ids` to the next forward pass.

        ```
        slot          0  1  2  3  4  5  6
        row 0         a  b  c  d  e  _  _      slots = 0 1 3 5 6, length = 3
        new row       a  b  d  _  _
        ```

        Args:
            rows: int32 [M].
            slots: int32 [M, S]. The slots to gather from each of these rows, in their new order.
            valid: bool [M, S]. The new slots that later columns may attend to: none from `length` on.
            length: int32 []. How many of the new slots hold columns. The others are free, and their content does not
                matter.
        """

        def select(array: jax.Array) -> jax.Array:
            heads_apart = array.reshape(len(self.valid), -1, *array.shape[-2:])
            heads = jnp.arange(heads_apart.shape[1])[None, :, None]
            # Indices [M, 1, 1], [1, K, 1] and [M, 1, S] -> [M, K, S, H].
            taken = heads_apart[rows[:, None, None], heads, slots[:, None]]
            return taken.reshape(*without_ones(*taken.shape[:2]), *taken.shape[2:])

        numbers = jnp.arange(slots.shape[1], dtype=jnp.int32)
        return KVCache(
            layers=_each(select, self.layers),
            valid=valid,
            length=jnp.asarray(length, jnp.int32),
            position=jnp.zeros(len(rows), jnp.int32),  # not known here
            columns=None if self.columns is None else jnp.where(numbers < length, numbers, _FREE),
            memory=self._memory_of(rows),
            copies=self.copies,
        )

    def branch(self, branches: int) -> "BranchedCache":
        """A cache with C branches, each of which continues its row; see `BranchedCache`."""
        return BranchedCache(
            layers=self.layers,  # shared by the branches, not copied
            valid=jnp.repeat(self.valid[:, None], branches, axis=1),
            length=self.length,
            position=jnp.repeat(self.position[:, None], branches, axis=1),
            columns=self.columns,
            memory=self.memory,
            copies=self.copies,
        )

    def ragged(self) -> "RaggedCache":
        """This cache with rows that advance at different speeds; see `RaggedCache`."""
        columns = None if self.columns is None else jnp.broadcast_to(self.columns[None], self.valid.shape)
        return RaggedCache(
            self.layers, self.valid, self.length, self.position, columns, self.memory, copies=self.copies
        )

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def backend(self) -> str | None:
        """See `base.Cache.backend`."""
        first = self.layers[0][0]
        return next((name for name, kind in BACKENDS.items() if isinstance(first, kind)), None)

    def quantized(self, backend: str) -> Self:
        """See `base.Cache.quantized`."""
        kind = BACKENDS[backend]
        layers = tuple((kind.of(dequantized(keys)), kind.of(dequantized(values))) for keys, values in self.layers)
        return replace(self, layers=layers)

    def with_layers(self, layers: tuple[tuple[jax.Array, jax.Array], ...]) -> Self:
        """The same cache with other keys and values, each [N, K, S, H] even where N or K is 1, with each head once."""
        shaped = tuple(
            (self._copied(keys).reshape(old_keys.shape), self._copied(values).reshape(old_values.shape))
            for (old_keys, old_values), (keys, values) in zip(self.layers, layers, strict=True)
        )
        return replace(self, layers=shaped)

    def of_layer(self, index: int) -> Self:
        """The cache of one layer alone, for its `update`."""
        memory = self.memory and replace(self.memory, layers=self.memory.layers[index : index + 1])
        return replace(self, layers=self.layers[index : index + 1], memory=memory)

    def layer(self, index: int) -> tuple[jax.Array, jax.Array]:
        """One layer's keys and values, each [N, K, S, H] even where N or K is 1, with each head once."""
        keys, values = map(dequantized, self.layers[index])
        shape = (len(self.valid), -1, *keys.shape[-2:])
        return keys.reshape(shape)[:, :: self.copies], values.reshape(shape)[:, :: self.copies]

    def _copied(self, array: jax.Array) -> jax.Array:
        """[N, K, T, H] with every head as often as in `layers`: heads a b -> a a b b."""
        return array if self.copies == 1 else jnp.repeat(array, self.copies, axis=1)


def _each(function: Callable[[jax.Array], jax.Array], arrays: Any) -> Any:
    """A pytree of arrays [..., S, H], quantised or not, after a function of each; see `quantized_array.mapped`."""
    return jax.tree.map(partial(mapped, function), arrays, is_leaf=lambda node: isinstance(node, QuantizedArray))


def _padded(array: jax.Array, slots: int) -> jax.Array:
    """Keys or values [..., S, H] with zeros behind the slots they have, up to `slots`."""
    return jnp.pad(array, (*[(0, 0)] * (array.ndim - 2), (0, slots - array.shape[-2]), (0, 0)))


@pytree
@dataclass(frozen=True)
class BranchedCache(KVCache):
    """A cache with C branches per row, such as beams, which share the keys and values of their row.

    A forward pass takes one column for each branch and writes them to C adjacent slots. A branch attends to the prompt
    and, of the C slots of each step, to its ancestor's slot. When a branch continues another one, it inherits its row
    of `valid`, so `reorder` moves C x S bools per row and no keys or values:

    ```
                    prompt    step 0    step 1           C = 2
    slot            0  1  2   3  4      5  6
    holds           a  b  c   d  e      f  g
    valid, branch 0 1  1  1   1  0      1  0             a b c d f
    valid, branch 1 1  1  1   0  1      0  1             a b c e g
                                                         reorder with parents [1, 1]:
    valid, branch 0 1  1  1   0  1      0  1             a b c e g
    valid, branch 1 1  1  1   0  1      0  1             a b c e g
    ```

    The methods are those of `KVCache`, with other shapes.

    Attributes:
        layers, length, columns: as in `KVCache`.
        valid: bool [N, C, S]. Slots that the next column of each branch may attend to.
        position: int32 [N, C]. Position id of each branch's next token.
    """

    @property
    def branches(self) -> int:
        return self.valid.shape[1]

    def extend(
        self, attention_mask: jax.Array, position_ids: jax.Array | None = None
    ) -> tuple["BranchedCache", jax.Array, jax.Array]:
        """As `KVCache.extend`, for [N, C] columns, one per branch. They do not attend to each other.

        ```
        slot            ...  length        C = 3: each branch attends to its own new slot
        branch 0        ...  1  0  0
        branch 1        ...  0  1  0
        branch 2        ...  0  0  1
        ```
        """
        if position_ids is None:
            position_ids = self.position
        # [N, C, C]: each branch attends to its own new slot, or to none of them if its column is masked.
        new_valid = jnp.eye(self.branches, dtype=bool)[None] & attention_mask[:, None]
        valid = lax.dynamic_update_slice_in_dim(self.valid, new_valid, self.length, axis=2)
        cache = replace(self, valid=valid, length=self.length + self.branches, position=position_ids + 1)
        if self.columns is not None:  # the C slots hold the same column of the text, once for each branch
            cache = cache._numbered(jnp.full(self.branches, self.columns.max() + 1))
        return cache, position_ids, valid

    def reorder(self, parents: jax.Array) -> Self:
        """The cache whose branch c continues branch `parents[n, c]` of row n; int32 [N, C]."""

        def gather(valid: jax.Array, position: jax.Array, parents: jax.Array) -> tuple[jax.Array, jax.Array]:
            return valid[parents], position[parents]

        valid, position = jax.vmap(gather)(self.valid, self.position, parents)
        return replace(self, valid=valid, position=position)

    def keep(self, chosen: jax.Array) -> Self:
        """The cache whose branches all continue branch `chosen[n]` of row n; int32 [N].

        Of the last C columns, the chosen one moves to the first of their slots, and the others are free again:

        ```
        slot           0  1  2  3  4  5        C = 3, start = 3, length = 6, chosen = 1
        before         a  b  c  x  y  z
        after          a  b  c  y  _  _        length = 4, and slot 3 is valid for all branches
        ```
        """
        start = self.length - self.branches

        def keep(array: jax.Array) -> jax.Array:
            # Slots are the last axis but one, whether or not N and K are left out.
            last = lax.dynamic_slice_in_dim(array, start, self.branches, axis=-2)
            columns = last.reshape(len(chosen), -1, *last.shape[-2:])  # [N, K, C, H]
            kept = jnp.take_along_axis(columns, chosen[:, None, None, None], axis=2)
            return lax.dynamic_update_slice_in_dim(array, kept.reshape(*last.shape[:-2], 1, -1), start, axis=-2)

        slots = jnp.arange(self.valid.shape[2])[None, None]
        return replace(
            self,
            layers=_each(keep, self.layers),
            # All branches attend to the same slots before `start`, unless there was a `reorder`.
            valid=(self.valid & (slots < start)) | (slots == start),
            length=start + 1,
        )


@pytree
@dataclass(frozen=True)
class RaggedCache(KVCache):
    """A cache whose rows advance at different speeds, as in assisted decoding.

    A forward pass writes T columns of every row at the shared slot. Then each row drops some of its last columns. The
    next pass begins after the longest row. Shorter rows have holes before it, which are not valid:

    ```
    slot      0  1  2  3  4  5  6  7  8  9        T = 3
    row 0     a  b  c  d  e  _  .  .  .  .        drops 1
    row 1     p  q  r  s  _  _  .  .  .  .        drops 2
    next pass                f  g  h              length moved back from 6 to 5
                             t  u  v              slot 4 of row 1 stays a hole
    ```

    Attributes:
        layers, valid, length, position: as in `KVCache`.
        columns: int32 [N, S]; as in `KVCache`, for each row.
    """

    def extend(
        self, attention_mask: jax.Array, position_ids: jax.Array | None = None
    ) -> tuple["RaggedCache", jax.Array, jax.Array]:
        """As `KVCache.extend`. Each row reads only its first columns, which the bool [N, T] mask marks."""
        columns = attention_mask.shape[1]
        number = jnp.arange(columns, dtype=jnp.int32)[None]
        if position_ids is None:
            position_ids = self.position[:, None] + number
        cache, position_ids, mask = super().extend(attention_mask, position_ids)
        assert isinstance(cache, RaggedCache)
        numbered = cache.columns
        if numbered is not None:
            following = numbered.max(axis=1, keepdims=True) + 1 + number
            following = jnp.where(attention_mask, following, _FREE)
            numbered = lax.dynamic_update_slice_in_dim(numbered, following, self.length, axis=1)
        position = position_ids[:, 0] + attention_mask.sum(axis=1, dtype=jnp.int32)
        return replace(cache, position=position, columns=numbered), position_ids, mask

    def _numbered(self, columns: jax.Array) -> Self:
        del columns  # these differ between rows; see `extend`
        return self

    def text_columns(self, num_new: int) -> tuple[jax.Array, jax.Array]:
        """As `KVCache.text_columns`, for each row: int32 [N, T] and [N, S]."""
        assert self.columns is not None, "made without `windowed`"
        return lax.dynamic_slice_in_dim(self.columns, self.length - num_new, num_new, axis=1), self.columns

    def drop_last(self, count: jax.Array) -> Self:
        """The cache without the last `count[n]` columns of row n; int32 [N].

        ```
        slot      0  1  2  3  4  5  6            0  1  2  3  4  5  6
        row 0     a  b  c  d  _  e  .    1  ->   a  b  c  d  _  .  .      length 4
        row 1     .  p  q  r  s  t  .    3  ->   .  p  q  _  _  .  .
        ```
        """
        # The number of the row's columns at or after each slot.
        following = jnp.cumsum(self.valid[:, ::-1], axis=1, dtype=jnp.int32)[:, ::-1]
        dropped = self.valid & (following <= count[:, None])
        valid = self.valid & ~dropped
        last = jnp.where(valid.any(axis=0), jnp.arange(self.slots, dtype=jnp.int32), -1).max()
        return replace(
            self,
            valid=valid,
            length=last + 1,
            position=self.position - count.astype(jnp.int32),
            columns=None if self.columns is None else jnp.where(dropped, _FREE, self.columns),
        )

    def has_room(self, columns: int) -> jax.Array:
        """bool []. Whether T more columns fit."""
        return self.length + columns <= self.slots

    def squeezed(self) -> Self:
        """The same cache without holes: the valid slots of each row move right, up to a common length.

        ```
        slot      0  1  2  3  4  5  6              0  1  2  3  4  5  6
        row 0     a  b  c  d  e  _  f      ->      a  b  c  d  e  f  .      length 6
        row 1     .  p  _  _  q  _  r              .  .  .  p  q  r  .
        ```
        """
        count = self.valid.sum(axis=1, dtype=jnp.int32)
        length = count.max()
        # A stable sort puts the valid slots last; rolling moves the free ones of the longest row to the end.
        order = jnp.argsort(self.valid, axis=1, stable=True)
        order = jnp.roll(order, length - self.slots, axis=1)
        rows = jnp.arange(len(count), dtype=jnp.int32)
        valid = jnp.take_along_axis(self.valid, order, axis=1)
        columns = None if self.columns is None else jnp.take_along_axis(self.columns, order, axis=1)
        packed = self.select(rows, order, valid, length)
        return replace(self, layers=packed.layers, valid=valid, length=length, columns=columns)

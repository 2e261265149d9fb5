"""The cache of a finished call, as the caller sees it and as a later call continues it."""

from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import lazy
from jaxgen.base import Cache, Model, no_mesh


class PastKeyValues(Sequence):
    """The cache of a call without its padding: `past[layer]` is a pair, each [M, K, L, H] on the device.

    The M rows are those of the call's `sequences`, or of its running beams; the L columns are those that the model has
    seen. Given to another call as `cache`, it is read and never changed: any number of calls may continue it.
    """

    def __init__(self, cache: Any, slots: np.ndarray):
        """Of a cache of N rows, int [N, C, L] slots: for each continuation of each row, where its columns are."""
        rows, branches, columns = slots.shape
        self._cache = cache
        self._rows = np.repeat(np.arange(rows, dtype=np.int32), branches)
        self._slots = slots.reshape(rows * branches, columns).astype(np.int32)

    @classmethod
    def from_transformers(cls, model: Model, given: Any) -> Self | None:
        """A copy of a transformers `Cache` that torch has filled; None of an empty one.

        Raises:
            ValueError: if it is of another model, or no longer holds all columns.
        """
        layers = getattr(given, "layers", None)
        if layers is None:
            raise ValueError(
                f"`cache` is of type {type(given).__name__}. Pass a `DynamicCache`, or that of an earlier call."
            )
        lengths = [int(layer.get_seq_length()) for layer in layers]
        if not any(lengths):
            return None
        rows, columns = len(layers[0].keys), lengths[0]
        empty = jax.eval_shape(lambda: model.make_cache(rows, columns))
        expected = [
            jax.eval_shape(lambda cache, layer=layer: cache.layer(layer), empty) for layer in range(empty.num_layers)
        ]
        for number, (layer, length) in enumerate(zip(layers, lengths, strict=True)):
            held = layer.keys.shape[2]
            if held < length:
                raise ValueError(
                    f"`cache` holds {held} of {length} columns in layer {number}, a {type(layer).__name__}, and jaxgen "
                    "needs them all. Pass the whole text without a cache."
                )
        pairs = [(layer.keys[:, :, :columns], layer.values[:, :, :columns]) for layer in layers]

        def kind(array: Any) -> tuple[tuple[int, ...], str]:
            return tuple(array.shape), str(array.dtype).removeprefix("torch.")

        if [[*map(kind, pair)] for pair in pairs] != [[*map(kind, pair)] for pair in expected]:
            raise ValueError(_ANOTHER_MODEL)
        # A copy: on a CPU `asarray` may share the memory of torch, which goes on to change it.
        arrays = tuple(
            tuple(jnp.array(lazy.as_numpy(array), each.dtype, copy=True) for array, each in zip(*pair, strict=True))
            for pair in zip(pairs, expected, strict=True)
        )
        cache = model.make_cache(rows, columns).with_layers(arrays)
        return cls(cache, np.broadcast_to(np.arange(columns), (rows, 1, columns)))

    def __len__(self) -> int:
        return self._cache.num_layers

    def __getitem__(self, layer: Any) -> Any:
        if isinstance(layer, slice):
            return [self[each] for each in range(len(self))[layer]]
        heads = np.arange(self._cache.layer(0)[0].shape[1])[None, :, None]
        place = self._rows[:, None, None], heads, self._slots[:, None]
        with no_mesh(), jax.transfer_guard("allow"):
            return tuple(array[place] for array in self._cache.layer(range(len(self))[layer]))

    @property
    def batch_size(self) -> int:
        """M."""
        return len(self._rows)

    def get_seq_length(self) -> int:
        """L: columns of the prompt and the new tokens that the model has seen."""
        return self._slots.shape[1]

    @property
    def slots(self) -> int:
        """The columns that there is room for."""
        return self._cache.slots

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last -`tokens_to_remove` columns. Same as transformers 5.24 `Cache.crop`.

        Raises:
            ValueError: unless it is an integer from -L to 0.
        """
        columns = self.get_seq_length()
        if type(tokens_to_remove) is not int or not -columns <= tokens_to_remove <= 0:
            raise ValueError(
                f"`crop` removes columns by a negative number, of the {columns} that there are, but got "
                f"{tokens_to_remove!r}. Pass an integer from {-columns} to 0."
            )
        self._slots = self._slots[:, : columns + tokens_to_remove]

    def to_cache(self, model: Model, rows: int, slots: int, mask: np.ndarray) -> Cache:
        """The cache to continue in a program.

        Args:
            model: that goes on.
            rows: N, at least the B rows of the call.
            slots: to have, at least L. The columns are in the first of them; the others are room for more.
            mask: bool [B, L]. Which columns may be attended. A cache of one row is that of every row.

        Raises:
            ValueError: if the cache is not of this model.
        """
        batch, columns = mask.shape
        own = np.broadcast_to(np.arange(batch) if self.batch_size > 1 else 0, batch)
        below, after = (0, rows - batch), (0, slots - columns)
        chosen = (
            np.pad(self._rows[own], below),
            np.pad(self._slots[own], (below, after)),
            np.pad(mask, (below, after)),
            np.int32(columns),
        )
        expected = jax.eval_shape(lambda: model.make_cache(rows, slots))
        if jax.eval_shape(_select, self._cache, *chosen) != expected:
            raise ValueError(_ANOTHER_MODEL)
        return _select(self._cache, *chosen)


_ANOTHER_MODEL = (
    "`cache` is of another model: its layers, heads or dtype differ. Pass what a call with this model returned, or "
    "leave it out."
)


@jax.jit
def _select(cache: Cache, rows: jax.Array, slots: jax.Array, valid: jax.Array, length: jax.Array) -> Cache:
    return cache.select(rows, slots, valid, length)

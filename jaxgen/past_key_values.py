"""The cache of a finished call, as the caller sees it and as a later call continues it."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxgen.base import Cache, Model, no_mesh


class PastKeyValues(Sequence):
    """The cache of a call without its padding: `past[layer]` is a pair, each [M, K, L, H] on the device.

    The M rows are those of the call's `sequences`, or of its running beams; the L columns are those that the model has
    seen. Given to another call as `past_key_values`, it is read and never changed: any number of calls may continue it.
    """

    def __init__(self, cache: Any, slots: np.ndarray):
        """Of a cache of N rows, int [N, C, L] slots: for each continuation of each row, where its columns are."""
        rows, branches, columns = slots.shape
        self._cache = cache
        self._rows = np.repeat(np.arange(rows, dtype=np.int32), branches)
        self._slots = slots.reshape(rows * branches, columns).astype(np.int32)

    def __len__(self) -> int:
        return len(self._cache.layers)

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

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last -`tokens_to_remove` columns. Same as transformers 5.23 `Cache.crop`.

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

    def lower(self, model: Model, rows: int, slots: int, mask: np.ndarray) -> Cache:
        """The cache to continue in a program.

        Args:
            model: that goes on.
            rows: N, at least the B rows of the call.
            slots: to have, at least L. The columns are in the last of them.
            mask: bool [B, L]. Which columns may be attended. A cache of one row is that of every row.

        Raises:
            ValueError: if the cache is not of this model.
        """
        batch, columns = mask.shape
        own = np.broadcast_to(np.arange(batch) if self.batch_size > 1 else 0, batch)
        below, before = (0, rows - batch), (slots - columns, 0)
        chosen = (
            np.pad(self._rows[own], below),
            np.pad(self._slots[own], (below, before)),
            np.pad(mask, (below, before)),
        )
        expected = jax.eval_shape(lambda: model.make_cache(rows, slots))
        if jax.eval_shape(_select, self._cache, *chosen) != expected:
            raise ValueError(
                "`past_key_values` is of another model: its layers, heads or dtype differ. Pass what a call with this "
                "model returned, or leave it out."
            )
        return _select(self._cache, *chosen)


@jax.jit
def _select(cache: Cache, rows: jax.Array, slots: jax.Array, valid: jax.Array) -> Cache:
    return cache.select(rows, slots, valid)

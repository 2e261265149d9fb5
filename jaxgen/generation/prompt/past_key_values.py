"""The cache of a finished call, as the caller sees it and as a later call continues it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self, overload

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import lazy
from jaxgen.base import Cache, Model, empty_cache, no_mesh

Layer = tuple[jax.Array, jax.Array]  # keys and values


class PastKeyValues(Sequence[Layer]):
    """The cache of a call without its padding: `past[layer]` is a pair, each [N * C, K, L, H] on the device.

    The rows are those of the call's `sequences`, or its running beams; L is the number of tokens that the model has
    read. Any number of later calls can continue it as their `cache`, and none of them changes it.
    """

    def __init__(self, cache: Cache, slots: np.ndarray):
        """From a cache of N rows, and `slots`, int [N, C, L]: the slots of each branch's tokens."""
        rows, branches, length = slots.shape
        # Row i of the view is branch i % C of row i // C of the cache.
        self._cache = cache
        self._rows = np.repeat(np.arange(rows, dtype=np.int32), branches)
        self._slots = slots.reshape(rows * branches, length).astype(np.int32)

    @classmethod
    def from_transformers(cls, model: Model, given: object) -> Self | None:
        """A copy of a transformers `Cache` of torch tensors; None if it is empty.

        Raises:
            ValueError: if it belongs to another model, or does not hold all tokens any more.
        """
        layers = getattr(given, "layers", None)
        if layers is None:
            raise ValueError(
                f"`cache` is of type {type(given).__name__}. Pass a `DynamicCache`, or the `cache` of an earlier call."
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
            # A sliding layer of transformers keeps only its window.
            held = layer.keys.shape[2]
            if held < length:
                raise ValueError(
                    f"`cache` holds {held} of {length} tokens in layer {number}, a {type(layer).__name__}, and jaxgen "
                    "needs them all. Pass the whole text without a cache."
                )
        # A static cache of transformers has more slots than tokens.
        pairs = [(layer.keys[:, :, :columns], layer.values[:, :, :columns]) for layer in layers]

        def kind(array: Any) -> tuple[tuple[int, ...], str]:
            return tuple(array.shape), str(array.dtype).removeprefix("torch.")

        if [[*map(kind, pair)] for pair in pairs] != [[*map(kind, pair)] for pair in expected]:
            raise ValueError(_ANOTHER_MODEL)
        # A copy, since on a CPU `asarray` may share memory with torch, which may change it later.
        arrays = tuple(
            tuple(jnp.array(lazy.as_numpy(array), each.dtype, copy=True) for array, each in zip(*pair, strict=True))
            for pair in zip(pairs, expected, strict=True)
        )
        cache = model.make_cache(rows, columns).with_layers(arrays)
        return cls(cache, np.broadcast_to(np.arange(columns), (rows, 1, columns)))

    def __len__(self) -> int:
        return self._cache.num_layers

    @overload
    def __getitem__(self, layer: int) -> Layer: ...
    @overload
    def __getitem__(self, layer: slice) -> list[Layer]: ...
    def __getitem__(self, layer: int | slice) -> Layer | list[Layer]:
        if isinstance(layer, slice):
            return [self[each] for each in range(len(self))[layer]]
        # [N, K, S, H] indexed with [N * C, 1, 1] rows, [1, K, 1] heads and [N * C, 1, L] slots is [N * C, K, L, H].
        heads = np.arange(self._cache.layer(0)[0].shape[1])[None, :, None]
        index = self._rows[:, None, None], heads, self._slots[:, None]
        with no_mesh(), jax.transfer_guard("allow"):
            keys, values = self._cache.layer(range(len(self))[layer])
            return keys[index], values[index]

    @property
    def memory(self) -> object:
        """With an encoder, what the decoder sees of the source: a `Memory`, with one row per prompt; else None."""
        return self._cache.memory

    @property
    def batch_size(self) -> int:
        """The number of rows, N * C."""
        return len(self._rows)

    def get_seq_length(self) -> int:
        """L: the number of tokens that the model has read, those of the prompt included."""
        return self._slots.shape[1]

    @property
    def slots(self) -> int:
        """The number of tokens per row that the cache has room for."""
        return self._cache.slots

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens. Same as transformers 5.24 `Cache.crop`.

        Raises:
            ValueError: if it is not an integer from -L to 0.
        """
        length = self.get_seq_length()
        if type(tokens_to_remove) is not int or not -length <= tokens_to_remove <= 0:
            raise ValueError(
                f"`crop` takes minus the number of tokens to remove from the {length} tokens, but got "
                f"{tokens_to_remove!r}. Pass an integer from {-length} to 0."
            )
        self._slots = self._slots[:, : length + tokens_to_remove]

    def to_cache(self, model: Model, rows: int, slots: int, mask: np.ndarray) -> Cache:
        """A cache for a program to continue.

        Args:
            model: the call's model.
            rows: N, at least the B rows of the call.
            slots: size of the new cache, at least L. The tokens are in its first slots; the others are free.
            mask: bool [B, L]. Which tokens may be attended. A cache of one row is repeated for every row.

        Raises:
            ValueError: if the cache belongs to another model.
        """
        batch, length = mask.shape
        indices = np.broadcast_to(np.arange(batch) if self.batch_size > 1 else 0, batch)
        # [B, L] becomes [N, S]: padding rows below, free slots to the right.
        below, after = (0, rows - batch), (0, slots - length)
        arguments = (
            np.pad(self._rows[indices], below),
            np.pad(self._slots[indices], (below, after)),
            np.pad(mask, (below, after)),
            np.int32(length),
        )
        # Compared as shapes, before anything is computed.
        expected: Any = jax.eval_shape(lambda: empty_cache(model, rows, slots, self._cache.backend))
        selected = jax.eval_shape(_select, self._cache, *arguments)
        if model.is_encoder_decoder and selected.memory is not None:
            expected = replace(expected, memory=selected.memory)  # of any length
        if selected != expected or (model.is_encoder_decoder and selected.memory is None):
            raise ValueError(_ANOTHER_MODEL)
        return _select(self._cache, *arguments)


def cached_tokens(past: object, rows: int) -> int:
    """The number of tokens per row in a cache."""
    if not isinstance(past, PastKeyValues):
        raise ValueError(
            f"`cache` is of type {type(past).__name__}, but must be the `cache` of an earlier call of "
            "`jaxgen.generate` with `return_dict_in_generate=True`, or a transformers `DynamicCache`."
        )
    if past.batch_size not in (1, rows):
        raise ValueError(
            f"`cache` has {past.batch_size} rows, but there are {rows} prompts. Pass a cache with one row per "
            "prompt, or with a single row that all prompts share."
        )
    return past.get_seq_length()


_ANOTHER_MODEL = (
    "`cache` belongs to another model: its layers, heads or dtype differ. Pass the `cache` of a call with this model, "
    "or leave it out."
)


@jax.jit
def _select(cache: Cache, rows: jax.Array, slots: jax.Array, valid: jax.Array, length: jax.Array) -> Cache:
    return cache.select(rows, slots, valid, length)

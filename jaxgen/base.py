"""Core types: what a model, a cache and a decoding strategy are to the decode loop.

The model column (`models/`, `kv_cache`, `checkpoint`) and the decode column (`decoding`, `sampling`, ...) never import
each other. They meet through the Protocols of this file, so a test can put a transition table where a Llama would be.

Dimension letters, used in every docstring of the package:

    B  prompts of one call              N  rows of the compiled program (B rounded up to a bucket)
    P  prompt columns                   S  cache slots, and columns of the token buffer
    T  columns of one forward pass      E  end-of-sequence ids
    V  vocabulary                       D  hidden size              I  MLP size
    Q  query heads                      K  key-value heads          G  query heads per key-value head (Q = K * G)
    H  head dimension
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

import jax
from jax.tree_util import register_dataclass


@register_dataclass
@dataclass(frozen=True)
class Prompt:
    """A batch of prompts as the compiled program takes it, padded to its buckets on the left and below.

    Attributes:
        input_ids: int32 [N, P]. The caller's prompt (its own padding included) in the last `length` columns.
        attention_mask: bool [N, P]. False on the caller's padding and on the bucket's.
        length: int32 []. Columns of the caller's prompt.
        rows: int32 []. Rows of the caller's prompt; the rows below them belong to the bucket.
    """

    input_ids: jax.Array
    attention_mask: jax.Array
    length: jax.Array
    rows: jax.Array


class Cache(Protocol):
    """Keys and values of the columns seen so far: a pytree, never mutated."""

    def grow(self, slots: int) -> Self:
        """The same cache with room for `slots` columns."""
        ...

    def cleared(self) -> Self:
        """The same cache with zeros wherever attention may not look."""
        ...


AnyCache = TypeVar("AnyCache", bound=Cache)


class Model(Protocol[AnyCache]):
    """A causal language model: a pytree of weights that makes its own cache."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_position_embeddings(self) -> int: ...

    @property
    def generation_config(self) -> Any:
        """The `transformers.GenerationConfig` of the checkpoint; read on the host only."""
        ...

    @property
    def cache_bytes_per_token(self) -> int: ...

    def make_cache(self, rows: int, slots: int) -> AnyCache: ...

    def extend(self, cache: AnyCache, input_ids: jax.Array, attention_mask: jax.Array) -> tuple[jax.Array, AnyCache]:
        """One forward pass over the next T columns.

        Args:
            input_ids: int32 [N, T].
            attention_mask: bool [N, T]. False where no later column may look.

        Returns:
            float32 [N, V] logits of the last column, and the cache T columns longer.
        """
        ...


class StrategyState(Protocol):
    """What a strategy carries from step to step: a pytree."""

    @property
    def tokens(self) -> jax.Array:
        """int32 [N]. The tokens chosen last: the next input of the model."""
        ...


AnyState = TypeVar("AnyState", bound=StrategyState)


class Strategy(Protocol[AnyState]):
    """How tokens are chosen. A pytree: numbers are traced, so a new number compiles nothing."""

    def init(self, prompt: Prompt, slots: int) -> AnyState: ...

    def step(self, logits: jax.Array, state: AnyState) -> AnyState:
        """Chooses one more token per row from float32 [N, V] logits."""
        ...

    def unfinished(self, state: AnyState) -> jax.Array:
        """bool []. Whether any row still wants a token."""
        ...

    def finalize(self, state: AnyState) -> Mapping[str, jax.Array]:
        """The outputs by their Hugging Face names, and two more for the host.

        `length` is int32 [], the valid columns of `sequences`; `invalid` is bool [N], the rows that met a NaN.
        """
        ...

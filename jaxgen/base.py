"""Core types: what a model, a cache and a decoding strategy are to the decode loop.

The model column (`models/`, `kv_cache`, `checkpoint`) and the decode column (`decoding`, `sampling`, ...) never import
each other. They meet through the Protocols of this file, so a test can put a transition table where a Llama would be.

Dimension letters, used in every docstring of the package:

    B  prompts of one call              N  rows of a program: B, rounded up, times R
    P  prompt columns                   S  cache slots, and columns of the token buffer
    T  columns of one forward pass      E  end-of-sequence ids
    V  vocabulary                       D  hidden size              I  MLP size
    W  candidates of one draw           M  sequences of a rule      R  returned sequences per prompt
    Q  query heads                      K  key-value heads          G  query heads per key-value head (Q = K * G)
    H  head dimension
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol, Self, TypeVar

import jax
import numpy as np
from jax.tree_util import GetAttrKey, register_pytree_with_keys

AnyClass = TypeVar("AnyClass", bound=type)


def pytree(cls: AnyClass) -> AnyClass:
    """Registers a dataclass as a pytree; fields with the metadata `static=True` are part of its structure.

    Unlike `jax.tree_util.register_dataclass`, whose nodes of different classes compare equal (jax 0.10 to 0.12) when
    their fields do: `jit` then now and then runs the program of the other class, say of `TopP` for `MinP`.
    """
    static = tuple(each.name for each in fields(cls) if each.metadata.get("static"))
    dynamic = tuple(each.name for each in fields(cls) if not each.metadata.get("static"))
    keys = tuple(map(GetAttrKey, dynamic))

    def flatten(node: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return tuple(getattr(node, name) for name in dynamic), tuple(getattr(node, name) for name in static)

    def flatten_with_keys(node: Any) -> tuple[tuple[tuple[Any, Any], ...], tuple[Any, ...]]:
        children, aux = flatten(node)
        return tuple(zip(keys, children, strict=True)), aux

    def unflatten(aux: tuple[Any, ...], children: Iterable[Any]) -> Any:
        node = object.__new__(cls)
        vars(node).update(zip(dynamic, children, strict=True), **dict(zip(static, aux, strict=True)))
        return node

    register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def leaf(value: Any, dtype: Any) -> Any:
    """A NumPy leaf of a traced pytree: the dispatch moves it to the device, where `jnp` would take one of its own."""
    return np.asarray(value, dtype)


@pytree
@dataclass(frozen=True)
class Prompt:
    """A batch of prompts as the compiled program takes it, padded to its buckets on the left and below.

    Attributes:
        input_ids: int32 [N, P]. The caller's prompt (its own padding included) in the last `length` columns.
        attention_mask: bool [N, P]. False on the caller's padding and on the bucket's.
        length: int32 []. Columns of the caller's prompt.
        rows: int32 []. Rows of the caller's prompt; the rows below them belong to the bucket.
        position_ids: int32 [N, P], or None to count the unmasked columns of each row.
    """

    input_ids: jax.Array
    attention_mask: jax.Array
    length: jax.Array
    rows: jax.Array
    position_ids: jax.Array | None = None


class Cache(Protocol):
    """Keys and values of the columns seen so far: a pytree, never mutated."""

    def grow(self, slots: int) -> Self:
        """The same cache with room for `slots` columns."""
        ...

    def take(self, rows: jax.Array) -> Self:
        """The cache of int32 [M] rows of this one, in their order."""
        ...

    def cleared(self) -> Self:
        """The same cache with zeros wherever attention may not look."""
        ...


AnyCache = TypeVar("AnyCache", bound=Cache)


Internals = dict[str, tuple[jax.Array, ...]]


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

    def internals_bytes(self, name: str, columns: int, slots: int) -> int:
        """Bytes that `extend` returns per row as one of its internals, for T columns that attend S slots."""
        ...

    def make_cache(self, rows: int, slots: int) -> AnyCache: ...

    def extend(
        self,
        cache: AnyCache,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        position_ids: jax.Array | None = None,
        collect: tuple[str, ...] = (),
    ) -> tuple[jax.Array, AnyCache, Internals]:
        """One forward pass over the next T columns.

        Args:
            input_ids: int32 [N, T].
            attention_mask: bool [N, T]. False where no later column may look.
            position_ids: int32 [N, T], or None to go on counting.
            collect: which internals to return: "hidden_states", "attentions".

        Returns:
            float32 [N, V] logits of the last column, the cache T columns longer, and the internals asked for:
            `hidden_states`, one [N, T, D] more than there are layers, `attentions`, one [N, Q, T, S] per layer.
        """
        ...


class LogitsProcessor:
    """A rule that changes the scores before a token is chosen: a pytree, whose numbers are traced.

    Most rules are a `__call__`. One that would have to read the whole history at every step keeps a state instead, by
    overriding `init` and `step`.
    """

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
        """New scores.

        Args:
            input_ids: int32 [N, S]. The prompt and the new tokens, of which the first `cur_len` columns are valid.
            scores: float32 [N, V].
            cur_len: int32 [].

        Returns:
            float32 [N, V].
        """
        raise NotImplementedError

    def init(self, prompt: Prompt, vocab_size: int) -> Any:
        """The state before the first step, a pytree; the prompt has its N rows already."""
        del prompt, vocab_size
        return ()

    def step(self, input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """New scores and the next state."""
        return self(input_ids, scores, cur_len), state


class StrategyState(Protocol):
    """What a strategy carries from step to step: a pytree."""

    @property
    def tokens(self) -> jax.Array:
        """int32 [N]. The next input of the model: the tokens chosen last."""
        ...


AnyState = TypeVar("AnyState", bound=StrategyState)


class Strategy(Protocol[AnyState]):
    """How tokens are chosen. A pytree: numbers are traced, so a new number compiles nothing."""

    @property
    def num_return_sequences(self) -> int:
        """R. The prompt's forward runs once; its rows are repeated R times afterwards."""
        ...

    def init(self, prompt: Prompt, slots: int, vocab_size: int) -> AnyState: ...

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

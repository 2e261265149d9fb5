"""When a row is finished: array maths over the tokens so far, same as transformers 5.24 `stopping_criteria.py`."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax

from jaxgen.buckets import bucket
from jaxgen.pytree import Int32, pytree

_MIN_IDS = 8  # most models have one to three ids that end a text; all of them share a program


def any_of(criteria: Iterable[Any], input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
    """bool [N]: the rows of int32 [N, S] tokens, of which `cur_len` columns are valid, that any criterion finishes."""
    finished = jnp.zeros(len(input_ids), bool)
    for criterion in criteria:
        finished |= criterion(input_ids, scores, cur_len)
    return finished


@pytree
@dataclass(frozen=True)
class EosToken:
    """Finishes a row on an end-of-sequence id. Same as transformers 5.24 `EosTokenCriteria`.

    Attributes:
        eos_token_id: int32 [E]. Unused places hold -1, which no token equals.
    """

    eos_token_id: Int32

    @classmethod
    def build(cls, token_ids: Iterable[int], vocab_size: int) -> Self:
        """From the ids among these that a model can produce. Their number is rounded up."""
        ids = [token for token in token_ids if 0 <= token < vocab_size]
        places = bucket(max(_MIN_IDS, len(ids)))
        return cls([*ids, *[-1] * (places - len(ids))])

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
        """bool [N] for int32 [N, S] tokens of which `cur_len` columns are valid; `scores` [N, V] chose the last."""
        last = lax.dynamic_slice_in_dim(input_ids, cur_len - 1, 1, axis=1)
        return (last == self.eos_token_id[None]).any(axis=1)


@pytree
@dataclass(frozen=True)
class MaxLength:
    """Finishes every row at a length. Same as transformers 5.24 `MaxLengthCriteria`.

    Attributes:
        max_length: int32 []. Columns, the prompt included.
    """

    max_length: Int32

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
        """bool []."""
        return cur_len >= self.max_length


@pytree
@dataclass(frozen=True)
class CustomCriterion:
    """A caller's JAX function `(input_ids, scores, cur_len) -> bool [N]`, compiled into the program.

    Attributes:
        function: a callable pytree: the caller's own, or a function in a `jax.tree_util.Partial`.
        kind: its class, static; see `base.pytree`.
    """

    function: Any
    kind: type = field(metadata={"static": True})

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
        return self.function(input_ids, scores, cur_len)

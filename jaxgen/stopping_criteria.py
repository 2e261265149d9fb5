"""When a row is finished: array maths over the token just chosen and the length so far."""

from dataclasses import dataclass

import jax
from jax.tree_util import register_dataclass


@register_dataclass
@dataclass(frozen=True)
class EosToken:
    """Finishes a row on an end-of-sequence id. Same as transformers 5.23 `EosTokenCriteria`.

    Attributes:
        eos_token_id: int32 [E]. Unused places hold -1, which no token equals.
    """

    eos_token_id: jax.Array

    def __call__(self, tokens: jax.Array, length: jax.Array) -> jax.Array:
        """bool [N] for int32 [N] new tokens and int32 [] columns including them."""
        del length
        return (tokens[:, None] == self.eos_token_id).any(axis=1)


@register_dataclass
@dataclass(frozen=True)
class MaxLength:
    """Finishes every row at a length. Same as transformers 5.23 `MaxLengthCriteria`.

    Attributes:
        max_length: int32 []. Columns, the prompt included.
    """

    max_length: jax.Array

    def __call__(self, tokens: jax.Array, length: jax.Array) -> jax.Array:
        """bool [] for int32 [N] new tokens and int32 [] columns including them."""
        del tokens
        return length >= self.max_length

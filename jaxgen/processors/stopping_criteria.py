"""Stopping criteria, which decide when a row is finished. Same as transformers 5.24 `stopping_criteria.py`."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Self

import jax
import jax.numpy as jnp
from jax import lax

from jaxgen.base import ColumnsCriterion, EosCriterion, LengthCriterion, StoppingCriterion
from jaxgen.buckets import bucket
from jaxgen.pytree import Int32, pytree

_MIN_IDS = 8  # most models have one to three eos ids; this way they all share a program


def any_of(
    criteria: Iterable[StoppingCriterion], input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array
) -> jax.Array:
    """bool [N]: the rows that at least one criterion finishes. The arguments are those of `base.StoppingCriterion`."""
    finished = jnp.zeros(len(input_ids), bool)
    for criterion in criteria:
        finished |= criterion(input_ids, scores, cur_len)
    return finished


def any_of_columns(
    criteria: Iterable[StoppingCriterion], input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array, read: jax.Array
) -> jax.Array:
    """bool [N, T]: whether at least one criterion finishes a row with each of T consecutive tokens.

    Criteria see one token of one row at a time.

    Args:
        criteria: the call's criteria.
        input_ids: int32 [N, S]. The texts with the T tokens.
        scores: float32 [N, T, V]. The scores of these tokens.
        cur_len: int32 [N]. The columns of each row before the T tokens.
        read: bool [N, T]. The tokens that count.
    """
    listed = tuple(criteria)
    compiled = [each for each in listed if not isinstance(each, ColumnsCriterion)]

    def of_token(text: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
        finished = any_of(compiled, text[None], scores[None], cur_len)
        if finished.shape != (1,):
            raise ValueError(
                f"a stopping criterion returned {finished.shape[0]} answers for one row. In assisted decoding, rows "
                "are at different steps, so a criterion gets one row at a time and cannot hold numbers for each row. "
                "Leave out assisted decoding."
            )
        return finished[0]

    ends = cur_len[:, None] + 1 + jnp.arange(scores.shape[1], dtype=jnp.int32)[None]
    finished = jax.vmap(jax.vmap(of_token, (None, 0, 0)))(input_ids, scores, ends)
    for criterion in listed:
        if isinstance(criterion, ColumnsCriterion):
            finished |= criterion.of_columns(input_ids, cur_len, read)
    return finished


@pytree
@dataclass(frozen=True)
class EosToken(EosCriterion):
    """Finishes a row on an eos token. Same as transformers 5.24 `EosTokenCriteria`.

    Attributes:
        eos_token_id: int32 [E], padded with -1, which no token equals.
    """

    eos_token_id: Int32

    @classmethod
    def build(cls, token_ids: Iterable[int], vocab_size: int) -> Self:
        """Uses the ids that are in the vocabulary. E is rounded up, so that other ids reuse the program."""
        ids = [token for token in token_ids if 0 <= token < vocab_size]
        size = bucket(max(_MIN_IDS, len(ids)))
        return cls([*ids, *[-1] * (size - len(ids))])

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
        """bool [N]; see `base.StoppingCriterion`."""
        last = lax.dynamic_slice_in_dim(input_ids, cur_len - 1, 1, axis=1)
        return (last == self.eos_token_id[None]).any(axis=1)


@pytree
@dataclass(frozen=True)
class MaxLength(LengthCriterion):
    """Finishes every row at a length. Same as transformers 5.24 `MaxLengthCriteria`.

    Attributes:
        max_length: int32 []. Columns, the prompt included.
    """

    max_length: Int32

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
        """bool []; see `base.StoppingCriterion`."""
        return cur_len >= self.max_length


@pytree
@dataclass(frozen=True)
class CustomCriterion:
    """A caller's JAX function `(input_ids, scores, cur_len) -> bool [N]`, compiled into the program.

    Attributes:
        function: a callable pytree: the caller's own, or a function in a `jax.tree_util.Partial`.
        kind: the class of `function`, static, so that two classes never share a program; see `pytree.pytree`.
    """

    function: StoppingCriterion
    kind: type = field(metadata={"static": True})

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
        return self.function(input_ids, scores, cur_len)

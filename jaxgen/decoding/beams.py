"""Sequences of each prompt with their scores: what the strategies that keep several of them share."""

from dataclasses import dataclass, replace
from typing import Self

import jax
import jax.numpy as jnp
from jax import lax

from jaxgen.base import Prompt
from jaxgen.pytree import pytree

NEVER = -1e9  # transformers' score of what must not be chosen


@pytree
@dataclass(frozen=True)
class Beams:
    """Some sequences of each prompt, m of them.

    Attributes:
        sequences: int32 [B, m, S].
        scores: float32 [B, m]. Of running beams the sum of log-probabilities, of finished ones divided by a power of
            the number of tokens.
        beam_indices: int32 [B, m, S - P]. The row of a step's scores that each new token was chosen in, -1 where there
            is none.
        finished: bool [B, m].
    """

    sequences: jax.Array
    scores: jax.Array
    beam_indices: jax.Array
    finished: jax.Array

    @classmethod
    def of_prompts(cls, prompt: Prompt, slots: int, fill: jax.Array, beams: int) -> Self:
        """Each prompt as often as it has beams, with scores of 0, and `fill` in the columns to come."""
        rows, columns = prompt.input_ids.shape
        sequences = jnp.broadcast_to(prompt.left_aligned(slots, fill)[:, None], (rows, beams, slots))
        return cls(
            sequences,
            jnp.zeros((rows, beams), jnp.float32),
            jnp.full((rows, beams, slots - columns), -1, jnp.int32),
            jnp.zeros((rows, beams), bool),
        )

    def take(self, places: jax.Array) -> Self:
        """The beams at int32 [B, m] places."""
        return jax.tree.map(lambda array: take(array, places), self)

    def beside(self, others: Self) -> Self:
        """All of both, these first."""
        return jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), self, others)

    def best(self, count: int) -> Self:
        """Those with the highest scores, falling; of equals the first."""
        return self.take(lax.top_k(self.scores, count)[1])

    def extend(
        self,
        sources: jax.Array,
        tokens: jax.Array,
        scores: jax.Array,
        rows: jax.Array,
        cur_len: jax.Array,
        step: jax.Array,
    ) -> Self:
        """Continuations, W of each prompt.

        Args:
            sources: int32 [B, W]. The beams that they continue.
            tokens: int32 [B, W]. What they are continued with, in column `cur_len`.
            scores: float32 [B, W].
            rows: int32 [B, W]. The rows of the step's scores that the tokens were chosen in.
            cur_len: int32 []. Valid columns of the beams.
            step: int32 []. New tokens so far.
        """
        continued = self.take(sources)
        write = lax.dynamic_update_slice_in_dim
        return replace(
            continued,
            sequences=write(continued.sequences, tokens[:, :, None], cur_len, axis=2),
            scores=scores,
            beam_indices=write(continued.beam_indices, rows[:, :, None].astype(jnp.int32), step, axis=2),
        )


def take(array: jax.Array, places: jax.Array) -> jax.Array:
    """[B, m, ...] of [B, n, ...], at int32 [B, m] places."""
    return jax.vmap(lambda row, place: row[place])(array, places)

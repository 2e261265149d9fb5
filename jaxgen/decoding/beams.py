"""Beams: several scored sequences per prompt. Both beam searches use them."""

from dataclasses import dataclass, replace
from typing import Self

import jax
import jax.numpy as jnp
from jax import lax

from jaxgen.base import Prompt
from jaxgen.pytree import pytree

NEVER = -1e9  # transformers adds this to scores that must not win


@pytree
@dataclass(frozen=True)
class Beams:
    """The sequences of each prompt, with their scores.

    Attributes:
        sequences: int32 [B, beams, S].
        scores: float32 [B, beams]. The sum of log-probabilities. For finished beams it is divided by a power of their
            length.
        beam_indices: int32 [B, beams, S - P]. The row of its step's scores that each new token was chosen from;
            -1 after the last token.
        finished: bool [B, beams].
    """

    sequences: jax.Array
    scores: jax.Array
    beam_indices: jax.Array
    finished: jax.Array

    @classmethod
    def of_prompts(cls, prompt: Prompt, slots: int, fill: jax.Array, beams: int) -> Self:
        """Copies of each prompt, one per beam, with scores of 0 and `fill` in the columns of new tokens."""
        rows, columns = prompt.input_ids.shape
        sequences = jnp.broadcast_to(prompt.left_aligned(slots, fill)[:, None], (rows, beams, slots))
        return cls(
            sequences,
            jnp.zeros((rows, beams), jnp.float32),
            # S - P: room for the new tokens, whatever the length of the prompt in its bucket.
            jnp.full((rows, beams, slots - columns), -1, jnp.int32),
            jnp.zeros((rows, beams), bool),
        )

    def take(self, indices: jax.Array) -> Self:
        """Gathers beams at int32 [B, count] indices."""
        return jax.tree.map(lambda array: take(array, indices), self)

    def beside(self, others: Self) -> Self:
        """Both sets of beams concatenated, these first."""
        return jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), self, others)

    def best(self, count: int) -> Self:
        """The beams with the `count` highest scores, best first; of equal scores the first."""
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
        """W continuations of each prompt by one token.

        ```
        beams        sources    tokens    continuations
        0: a b . .   1          z         c d z .         cur_len = 2
        1: c d . .   0          y         a b y .
                     1          x         c d x .
        ```

        Args:
            sources: int32 [B, W]. The beams to continue.
            tokens: int32 [B, W]. Written to column `cur_len`.
            scores: float32 [B, W].
            rows: int32 [B, W]. The rows of the step's scores that the tokens were chosen from.
            cur_len: int32 []. Valid columns of the beams.
            step: int32 []. New tokens so far.
        """
        # `beam_indices` has columns for new tokens only, so they are written at `step` and not at `cur_len`.
        continued = self.take(sources)
        write = lax.dynamic_update_slice_in_dim
        return replace(
            continued,
            sequences=write(continued.sequences, tokens[:, :, None], cur_len, axis=2),
            scores=scores,
            beam_indices=write(continued.beam_indices, rows[:, :, None].astype(jnp.int32), step, axis=2),
        )


def take(array: jax.Array, indices: jax.Array) -> jax.Array:
    """Gathers along the second axis: [B, beams, ...] at int32 [B, count] -> [B, count, ...]."""
    return jax.vmap(lambda row, index: row[index])(array, indices)

"""Drafters: what proposes tokens for assisted decoding. A draft changes how soon tokens come, and never which."""

from dataclasses import dataclass, field
from typing import Protocol

import jax
import jax.numpy as jnp

from jaxgen.pytree import Int32, pytree


class Drafter(Protocol):
    """Proposes the next tokens of each row: a pytree."""

    @property
    def most_tokens(self) -> int:
        """The most tokens of a draft, static."""
        ...

    def draft(self, sequences: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """int32 [N, most_tokens], and how many of them are meant, int32 [N].

        Args:
            sequences: int32 [N, S]. Row n has a text of `lengths[n]` columns.
            lengths: int32 [N].
        """
        ...


@pytree
@dataclass(frozen=True)
class PromptLookup:
    """Proposes what followed the last tokens where the text had them before.

    Of all places with the longest match the last one counts; transformers 5.24 `PromptLookupCandidateGenerator` takes
    the first. A continuation that reaches the end of the text repeats from its start, so a loop is drafted in full:

    ```
    text      a b c x a b c y a b c         the last 3 tokens were seen twice
    draft                           y a b   what followed the second time, and then round again
    ```

    Attributes:
        num_tokens: int32 []. Tokens of a draft.
        max_ngram: int32 []. How many last tokens to compare at most.
        most_tokens: at least `num_tokens`, static.
        most_compared: at least `max_ngram`, static.
    """

    num_tokens: Int32
    max_ngram: Int32
    most_tokens: int = field(metadata={"static": True})
    most_compared: int = field(metadata={"static": True})

    def draft(self, sequences: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        columns = jnp.arange(sequences.shape[1], dtype=jnp.int32)[None]
        # matched[n, s]: how many of the tokens before column s are the last ones of the text.
        matched, equal = jnp.zeros_like(sequences), True
        for back in range(1, self.most_compared + 1):
            last = jnp.take_along_axis(sequences, jnp.maximum(lengths - back, 0)[:, None], axis=1)
            equal &= (jnp.roll(sequences, back, axis=1) == last) & (columns >= back) & (back <= self.max_ngram)
            matched += equal
        matched = jnp.where(columns < lengths[:, None], matched, 0)
        best = matched.max(axis=1)
        start = jnp.where(matched == best[:, None], columns, 0).max(axis=1)
        period = jnp.maximum(lengths - start, 1)
        offsets = jnp.arange(self.most_tokens, dtype=jnp.int32)[None] % period[:, None]
        tokens = jnp.take_along_axis(sequences, start[:, None] + offsets, axis=1)
        return tokens, jnp.where(best > 0, self.num_tokens, 0)

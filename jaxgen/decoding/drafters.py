"""Drafters: what proposes tokens for assisted decoding. A draft changes how soon tokens come, and never which."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jaxgen.base import Prompt, RaggedCache
from jaxgen.pytree import Int32, pytree


class Texts(NamedTuple):
    """The texts that drafts continue.

    Attributes:
        tokens: int32 [N, S]. Row n has a text of `lengths[n]` columns.
        lengths: int32 [N].
        processors: the states of the processors after these texts.
    """

    tokens: jax.Array
    lengths: jax.Array
    processors: tuple[object, ...]


class Chosen(NamedTuple):
    """What the call would choose from logits; see `Choose`.

    Attributes:
        tokens: int32 [N].
        log_p: float32 [N]. Their log-probabilities under the processed scores.
        is_eos: bool [N]. Whether a token ends its text.
        processors: the states of the processors after these tokens.
    """

    tokens: jax.Array
    log_p: jax.Array
    is_eos: jax.Array
    processors: tuple[object, ...]


# Chooses the next token of each text from float32 [N, V] logits, with the rules and the noise of the call: with logits
# that are nearly those of the model, a draft is right nearly always.
Choose = Callable[[Texts, jax.Array], Chosen]

Memory = TypeVar("Memory")


class Draft(NamedTuple, Generic[Memory]):
    """The proposed tokens of a step.

    Attributes:
        tokens: int32 [N, most_tokens].
        num_tokens: int32 [N]. How many of them are meant.
        memory: of the drafter.
    """

    tokens: jax.Array
    num_tokens: jax.Array
    memory: Memory


class Drafter(Generic[Memory]):
    """Proposes the next tokens of each row: a dataclass and a pytree.

    A subclass sets `most_tokens` and overrides `draft`. One that remembers something from step to step overrides `init`
    too. It is told nothing about which of its tokens stayed: it sees the texts as they are.

    Attributes:
        most_tokens: the most tokens of a draft, static.
    """

    most_tokens: int

    def init(self, prompt: Prompt, copies: int) -> "Memory | tuple[()]":
        """The memory before the first draft, a pytree; each of the N rows of the prompt becomes so many neighbours."""
        del prompt, copies
        return ()

    def draft(
        self,
        texts: Texts,
        limits: jax.Array,
        choose: Choose,
        memory: Memory,
    ) -> Draft[Memory]:
        """A draft for each row.

        Args:
            texts: the prompts and the tokens so far.
            limits: int32 [N]. How many tokens a row has a use for: 0 once it is finished.
            choose: how the call chooses a token.
            memory: from `init`, or from the draft before.
        """
        raise NotImplementedError

    def caches(self, memory: Memory) -> tuple[RaggedCache, ...]:
        """The caches of models in the memory; see `Strategy.caches`."""
        del memory
        return ()

    def with_caches(self, memory: Memory, caches: tuple[RaggedCache, ...]) -> Memory:
        """The same memory with these caches."""
        del caches
        return memory


@pytree
@dataclass(frozen=True)
class PromptLookup(Drafter[tuple[()]]):
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

    def draft(
        self,
        texts: Texts,
        limits: jax.Array,
        choose: Choose,
        memory: tuple[()],
    ) -> Draft[tuple[()]]:
        del limits, choose
        tokens, lengths, _ = texts
        columns = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        # matched[n, s]: how many of the tokens before column s are the last ones of the text.
        matched, equal = jnp.zeros_like(tokens), True
        for back in range(1, self.most_compared + 1):
            last = jnp.take_along_axis(tokens, jnp.maximum(lengths - back, 0)[:, None], axis=1)
            equal &= (jnp.roll(tokens, back, axis=1) == last) & (columns >= back) & (back <= self.max_ngram)
            matched += equal
        matched = jnp.where(columns < lengths[:, None], matched, 0)
        best = matched.max(axis=1)
        start = jnp.where(matched == best[:, None], columns, 0).max(axis=1)
        period = jnp.maximum(lengths - start, 1)
        offsets = jnp.arange(self.most_tokens, dtype=jnp.int32)[None] % period[:, None]
        draft = jnp.take_along_axis(tokens, start[:, None] + offsets, axis=1)
        return Draft(draft, jnp.where(best > 0, self.num_tokens, 0), memory)

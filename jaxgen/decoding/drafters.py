"""Drafters propose tokens for assisted decoding. A draft changes the speed of a call, never its tokens."""

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
        processors: the processors' states after these texts.
    """

    tokens: jax.Array
    lengths: jax.Array
    processors: tuple[object, ...]


class Chosen(NamedTuple):
    """The tokens that the call would choose from given logits; see `Choose`.

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


# Chooses the next token of each text from float32 [N, V] logits, with the processors and random numbers of the call, so
# that logits close to the model's nearly always give the right token.
Choose = Callable[[Texts, jax.Array], Chosen]

Memory = TypeVar("Memory")

SURE = 4  # tokens; so long a match is hardly ever a coincidence
_MOST_MISSES = 5  # then 2**5 = 32 steps without a draft


class Draft(NamedTuple, Generic[Memory]):
    """The proposed tokens of a step.

    Attributes:
        tokens: int32 [N, most_tokens].
        num_tokens: int32 [N]. How many of them count; the others are padding.
        memory: the memory for the next draft.
    """

    tokens: jax.Array
    num_tokens: jax.Array
    memory: Memory


class Drafter(Generic[Memory]):
    """Proposes the next tokens of each row. Subclasses are dataclasses and pytrees.

    A subclass sets `most_tokens` and overrides `draft`. If it keeps a memory from step to step, it overrides `init`
    too. A drafter is not told which of its tokens were accepted. It only sees the texts.

    Attributes:
        most_tokens: the maximum length of a draft, static.
    """

    most_tokens: int

    def init(self, prompt: Prompt, copies: int, slots: int) -> "Memory | tuple[()]":
        """The memory before the first draft, a pytree.

        Args:
            prompt: the prompts before they are repeated.
            copies: how many neighbouring rows each prompt gets.
            slots: S, the columns of the texts.
        """
        del prompt, copies, slots
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
            limits: int32 [N]. How many drafted tokens each row can use: 0 once it is finished.
            choose: chooses the next tokens as the call does; see `Choose`.
            memory: from `init`, or from the previous draft.
        """
        raise NotImplementedError

    def caches(self, memory: Memory) -> tuple[RaggedCache, ...]:
        """The caches in the memory; see `Strategy.caches`."""
        del memory
        return ()

    def bytes_of_caches(self, prompt: Prompt, copies: int, new_tokens: int) -> int:
        """At least how many bytes these `caches` have in the end; see `init`."""
        del prompt, copies, new_tokens
        return 0

    def with_caches(self, memory: Memory, caches: tuple[RaggedCache, ...]) -> Memory:
        """The same memory with these caches."""
        del caches
        return memory


@pytree
@dataclass(frozen=True)
class LookupMemory:
    """What prompt lookup remembers of each row.

    Attributes:
        lengths: int32 [N]. The length of each text when the last draft was made.
        drafted: int32 [N]. The length of the last draft.
        misses: int32 [N]. The number of consecutive drafts without an accepted token, at most 5.
        wait: int32 [N]. For how many more steps only a match of `SURE` tokens is drafted.
    """

    lengths: jax.Array
    drafted: jax.Array
    misses: jax.Array
    wait: jax.Array


@pytree
@dataclass(frozen=True)
class PromptLookup(Drafter[LookupMemory]):
    """Proposes the tokens that followed an earlier occurrence of the text's last tokens.

    If the longest match occurs several times, the last occurrence is used; transformers 5.24
    `PromptLookupCandidateGenerator` uses the first. A continuation that reaches the end of the text starts over, so
    drafts of repeating text have their full length:

    ```
    text      a b c x a b c y a b c             the last 3 tokens were seen twice
    draft                           y a b c y   what followed the second time, and then over again
    ```

    Any text repeats two tokens now and then, and a wrong draft makes a step slower. So after a draft without an
    accepted token, the next 2, 4, 8, ... steps draft only where `SURE` tokens match.

    Attributes:
        num_tokens: int32 []. The length of a draft.
        max_ngram: int32 []. The maximum number of last tokens to compare.
        most_tokens: at least `num_tokens`, static.
        most_compared: at least `max_ngram` and `SURE`, static.
    """

    num_tokens: Int32
    max_ngram: Int32
    most_tokens: int = field(metadata={"static": True})
    most_compared: int = field(metadata={"static": True})

    def init(self, prompt: Prompt, copies: int, slots: int) -> LookupMemory:
        del slots
        zeros = jnp.zeros(len(prompt.input_ids) * copies, jnp.int32)
        return LookupMemory(zeros, zeros, zeros, zeros)

    def draft(self, texts: Texts, limits: jax.Array, choose: Choose, memory: LookupMemory) -> Draft[LookupMemory]:
        del choose
        tokens, lengths, _ = texts
        columns = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        # matched[n, s]: how many tokens just before column s are the same as those at the end of the text.
        matched, equal = jnp.zeros_like(tokens), jnp.ones_like(tokens, bool)
        for back in range(1, self.most_compared + 1):
            last = jnp.take_along_axis(tokens, jnp.maximum(lengths - back, 0)[:, None], axis=1)
            equal &= (jnp.roll(tokens, back, axis=1) == last) & (columns >= back)
            matched += equal.astype(jnp.int32)
        matched = jnp.where(columns < lengths[:, None], matched, 0)
        compared = jnp.minimum(matched, self.max_ngram)
        best = compared.max(axis=1, keepdims=True)
        start = jnp.where(compared == best, columns, 0).max(axis=1)
        period = jnp.maximum(lengths - start, 1)
        offsets = jnp.arange(self.most_tokens, dtype=jnp.int32)[None] % period[:, None]
        draft = jnp.take_along_axis(tokens, start[:, None] + offsets, axis=1)

        # A step adds the accepted tokens and one more.
        stayed = lengths - memory.lengths > 1
        missed = (memory.drafted > 0) & ~stayed
        misses = jnp.where(missed, jnp.minimum(memory.misses + 1, _MOST_MISSES), memory.misses)
        misses = jnp.where(stayed, 0, misses)
        wait = jnp.where(missed, jnp.left_shift(1, misses), jnp.maximum(memory.wait - 1, 0))
        wait = jnp.where(stayed, 0, wait)
        sure = jnp.take_along_axis(matched, start[:, None], axis=1)[:, 0] >= SURE
        found = (best[:, 0] > 0) & ((wait == 0) | sure)
        drafted = jnp.where(found, jnp.minimum(self.num_tokens, limits), 0)
        return Draft(draft, drafted, LookupMemory(lengths, drafted, misses, wait))

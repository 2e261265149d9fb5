"""A smaller model as the drafter of assisted decoding, with a cache of its own."""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxgen.base import Cache, Model, Prompt, RaggedCache
from jaxgen.decoding.columns import extend_by_columns, with_tokens
from jaxgen.decoding.drafters import Choose, Draft, Drafter, Texts
from jaxgen.pytree import Bool, Float32, Int32, pytree

_CHUNK = 128  # columns of a prompt; the buffer of a conversation is much longer than most of its texts
_AT_ONCE = 2  # columns: the last token of a step, and the last draft before it where that stayed


@pytree
@dataclass(frozen=True)
class AssistantMemory:
    """What an assistant remembers from one draft to the next.

    Attributes:
        cache: of the assistant. It holds the text and then the draft, but not the last token of the draft.
        lengths: int32 [N]. The text that the last draft was for.
        cached: int32 [N]. How many tokens of text and draft the cache holds.
        drafted: int32 [N]. Tokens of the last draft.
        num_tokens: int32 [N]. How many tokens the last draft was to have.
    """

    cache: RaggedCache
    lengths: jax.Array
    cached: jax.Array
    drafted: jax.Array
    num_tokens: jax.Array


class _Drafting(NamedTuple):
    """The state of the loop over the tokens of a draft.

    Attributes:
        cache, cached: as in `AssistantMemory`.
        tokens: int32 [N, S]. The texts with the drafts.
        drafted: int32 [N]. Tokens of the draft so far.
        sure: bool [N]. Whether the last one is likely enough for the draft to go on, and does not end the text.
        processors: the states of the processors after the drafts.
    """

    cache: RaggedCache
    cached: jax.Array
    tokens: jax.Array
    drafted: jax.Array
    sure: jax.Array
    processors: tuple[object, ...]


@pytree
@dataclass(frozen=True)
class Assistant(Drafter[AssistantMemory]):
    """Drafts the tokens that the call would choose from the logits of another model.

    A row's draft ends with a token that the assistant is not sure of. The rules and the noise are those of the call, so
    that a sampled draft is right where both models agree. The cache is cut back to what of the draft stayed, and the
    tokens after it are read before the next draft:

    ```
    text       a b c                  cache  a b c d        draft  d e, of which e was not read
    text       a b c d e w            cache  a b c d        reads  e w, both drafts stayed
    text       a b c w                cache  a b c          reads  w, no draft stayed
    ```

    Attributes:
        model: the assistant.
        num_tokens: int32 []. Tokens of the first draft.
        threshold: float32 []. The probability that a token needs for the draft to go on after it.
        adapts: bool []. Whether a draft that stayed in full makes the next one longer by 2 tokens, and another one
            makes it shorter by 1, as the schedules "heuristic" and "heuristic_transient" of transformers 5.24.
        most_tokens: static; drafts do not get longer.
    """

    model: Any
    num_tokens: Int32
    threshold: Float32
    adapts: Bool
    most_tokens: int = field(metadata={"static": True})

    def init(self, prompt: Prompt, copies: int) -> AssistantMemory:
        """Reads the prompts."""
        rows = jnp.repeat(jnp.arange(len(prompt.input_ids), dtype=jnp.int32), copies)
        cache = self._read(prompt)
        lengths = jnp.broadcast_to(jnp.asarray(prompt.length, jnp.int32), rows.shape)
        room = cache.slots + self.most_tokens + _AT_ONCE  # for the first draft
        return AssistantMemory(
            cache=cache.take(rows).grow(room).ragged(),
            lengths=lengths,
            cached=lengths,
            drafted=jnp.zeros_like(lengths),
            # Before the first draft all of none have stayed, which adds 2.
            num_tokens=jnp.broadcast_to(jnp.asarray(self.num_tokens) - 2, rows.shape),
        )

    def _read(self, prompt: Prompt) -> Cache:
        """The cache after the prompts, of P slots. Long ones are read in chunks, from the first that is not padding."""
        model: Model[Any] = self.model
        ids, mask = self._known(prompt.input_ids), prompt.attention_mask.astype(bool)
        columns = ids.shape[1]
        size = _CHUNK if columns > _CHUNK and columns % _CHUNK == 0 else columns

        def read(number: jax.Array, cache: Any) -> Any:
            part, part_mask = (lax.dynamic_slice_in_dim(each, number * size, size, axis=1) for each in (ids, mask))
            return model.extend(cache, part, part_mask)[1]

        first = (columns - prompt.length) // size
        return lax.fori_loop(first, columns // size, read, model.make_cache(*ids.shape))

    def draft(
        self,
        texts: Texts,
        limits: jax.Array,
        choose: Choose,
        memory: AssistantMemory,
    ) -> Draft[AssistantMemory]:
        lengths = texts.lengths
        # A step adds the drafted tokens that were right and one more.
        stayed = jnp.clip(lengths - memory.lengths - 1, 0, memory.drafted)
        cached = jnp.minimum(memory.cached, memory.lengths + stayed)
        adapted = jnp.where(stayed == memory.drafted, memory.num_tokens + 2, jnp.maximum(memory.num_tokens - 1, 1))
        num_tokens = jnp.where(self.adapts, jnp.minimum(adapted, self.most_tokens), self.num_tokens)
        wanted = jnp.minimum(num_tokens, limits)

        def goes_on(drafting: _Drafting) -> jax.Array:
            return (drafting.drafted < wanted) & drafting.sure

        def step(drafting: _Drafting) -> _Drafting:
            going, ends = goes_on(drafting), lengths + drafting.drafted
            count = jnp.where(going, jnp.minimum(ends - drafting.cached, _AT_ONCE), 0)
            columns = drafting.cached[:, None] + jnp.arange(_AT_ONCE, dtype=jnp.int32)[None]
            tokens = jnp.take_along_axis(drafting.tokens, columns, axis=1, mode="clip")
            mask = jnp.arange(_AT_ONCE)[None] < count[:, None]
            logits, cache = extend_by_columns(self.model, drafting.cache, self._known(tokens), mask)
            # Where it reads nothing a row has written its columns nevertheless, which the next pass writes over.
            cache = cache.drop_last(jnp.zeros_like(count))
            last = jnp.maximum(count - 1, 0)[:, None, None]
            logits = jnp.take_along_axis(logits.reshape(len(tokens), _AT_ONCE, -1), last, axis=1)[:, 0]
            chosen = choose(Texts(drafting.tokens, ends, drafting.processors), logits)
            new = going & (drafting.cached + count == ends)  # others have more to read before they draft

            def where_new(after: jax.Array, before: jax.Array) -> jax.Array:
                return jnp.where(new.reshape(-1, *[1] * (after.ndim - 1)), after, before)

            return _Drafting(
                cache=cache,
                cached=drafting.cached + count,
                tokens=with_tokens(drafting.tokens, ends, chosen.tokens[:, None], new.astype(jnp.int32)),
                drafted=drafting.drafted + new,
                sure=where_new((jnp.exp(chosen.log_p) >= self.threshold) & ~chosen.is_eos, drafting.sure),
                processors=jax.tree.map(where_new, chosen.processors, drafting.processors),
            )

        done = lax.while_loop(
            lambda drafting: goes_on(drafting).any(),
            step,
            _Drafting(
                cache=memory.cache.drop_last(memory.cached - cached),
                cached=cached,
                tokens=texts.tokens,
                drafted=jnp.zeros_like(lengths),
                sure=jnp.ones_like(lengths, bool),
                processors=texts.processors,
            ),
        )
        columns = lengths[:, None] + jnp.arange(self.most_tokens, dtype=jnp.int32)[None]
        tokens = jnp.take_along_axis(done.tokens, columns, axis=1, mode="clip")
        after = AssistantMemory(done.cache, lengths, done.cached, done.drafted, num_tokens)
        return Draft(tokens, done.drafted, after)

    def _known(self, tokens: jax.Array) -> jax.Array:
        """The tokens as ids of the assistant, whose vocabulary may end earlier."""
        return jnp.clip(tokens, 0, self.model.vocab_size - 1)

    def caches(self, memory: AssistantMemory) -> tuple[RaggedCache, ...]:
        return (memory.cache,)

    def with_caches(self, memory: AssistantMemory, caches: tuple[RaggedCache, ...]) -> AssistantMemory:
        (cache,) = caches
        return replace(memory, cache=cache)

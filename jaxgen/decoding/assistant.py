"""A smaller model as the drafter of assisted decoding, with its own cache."""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax

from jaxgen.base import Cache, EncoderDecoderModel, Model, Prompt, RaggedCache, Source
from jaxgen.decoding.columns import extend_by_columns, with_tokens
from jaxgen.decoding.drafters import Choose, Draft, Drafter, Texts
from jaxgen.pytree import Bool, Float32, Int32, pytree

_CHUNK = 128  # prompt columns per forward pass; chunks that hold only padding are skipped
# Columns of a pass: the newest token, and before it the last drafted token if it was accepted, as no pass has read it.
_AT_ONCE = 2
MOST_PIECES = 4  # assistant tokens for one token of the model; any more are dropped


@pytree
@dataclass(frozen=True)
class Translation:
    """Tables that translate the model's tokens to those of an assistant with another tokenizer.

    Attributes:
        same: int32 [V]. For each token of the model, the assistant's token with the same text, or -1.
        pieces: int32 [V, MOST_PIECES]. For each token of the model, the assistant's tokens for its text.
        counts: int32 [V]. How many `pieces` each token has, at least 1.
        prompt: the prompts in the assistant's tokens.
    """

    same: Int32
    pieces: Int32
    counts: Int32
    prompt: Prompt


class _Own(NamedTuple):
    """The texts in the assistant's tokens.

    Attributes:
        tokens: int32 [N, S]. The texts, each followed by its draft.
        lengths: int32 [N]. The length of each text, without its draft.
    """

    tokens: jax.Array
    lengths: jax.Array


@pytree
@dataclass(frozen=True)
class AssistantMemory:
    """What an assistant remembers from one draft to the next.

    Attributes:
        cache: the assistant's cache. It holds each text and its draft, except the last token of the draft.
        lengths: int32 [N]. The length of each text when the last draft was made.
        own: these texts in the assistant's tokens; None if the assistant has the model's tokenizer.
        cached: int32 [N]. How many tokens of the text and the draft are in the cache, in the assistant's tokens.
        drafted: int32 [N]. The length of the last draft.
        num_tokens: int32 [N]. The intended length of the last draft.
    """

    cache: RaggedCache
    lengths: jax.Array
    own: _Own | None
    cached: jax.Array
    drafted: jax.Array
    num_tokens: jax.Array


class _Drafting(NamedTuple):
    """The state of the loop over the tokens of a draft.

    Attributes:
        cache, cached: as in `AssistantMemory`.
        tokens: int32 [N, S]. The texts, each followed by its draft.
        own: int32 [N, S]. The same texts and drafts in the assistant's tokens.
        drafted: int32 [N]. The length of each draft so far.
        sure: bool [N]. Whether the draft may continue: its last token is likely enough and does not end the text.
        processors: the processors' states after the drafts.
    """

    cache: RaggedCache
    cached: jax.Array
    tokens: jax.Array
    own: jax.Array
    drafted: jax.Array
    sure: jax.Array
    processors: tuple[object, ...]


@pytree
@dataclass(frozen=True)
class Assistant(Drafter[AssistantMemory]):
    """Drafts the tokens that the call would choose from the logits of another model.

    A row's draft ends after a token with a low probability. Drafting uses the call's processors and random numbers, so
    a sampled draft is accepted where both models agree. Rejected tokens are dropped from the cache. The next draft
    begins by reading the tokens that are not in the cache yet:

    ```
    text       a b c                  cache  a b c d        draft  d e, of which e was not read
    text       a b c d e w            cache  a b c d        reads  e w, both drafted tokens were accepted
    text       a b c w                cache  a b c          reads  w, neither was accepted
    ```

    Attributes:
        model: the assistant.
        num_tokens: int32 []. The length of the first draft.
        threshold: float32 []. The draft continues after tokens of at least this probability.
        adapts: bool []. Whether the length adapts: 2 tokens longer after a draft that was accepted in full, otherwise 1
            shorter. These are the schedules "heuristic" and "heuristic_transient" of transformers 5.24.
        most_tokens: the maximum length of a draft, static.
        translation: the tables for an assistant with another tokenizer, which drafts only tokens that both vocabularies
            have; None if it has the model's tokenizer.
        source: the input of the assistant's encoder; None if it has no encoder.
    """

    model: Any
    num_tokens: Int32
    threshold: Float32
    adapts: Bool
    most_tokens: int = field(metadata={"static": True})
    translation: Translation | None = None
    source: Source | None = None

    def init(self, prompt: Prompt, copies: int, slots: int) -> AssistantMemory:
        """The memory after a forward pass over the prompts."""
        rows = len(prompt.input_ids) * copies
        lengths = jnp.broadcast_to(jnp.asarray(prompt.length, jnp.int32), (rows,))
        own, own_lengths, new = None, lengths, slots - prompt.input_ids.shape[1]
        if self.translation is not None:
            prompt = self.translation.prompt
            own_lengths = jnp.broadcast_to(jnp.asarray(prompt.length, jnp.int32), (rows,))
            # A row gets no more drafts once its text in the assistant's tokens is longer than this.
            tokens = prompt.repeated(copies).left_aligned(prompt.input_ids.shape[1] + 2 * new, 0)
            own = _Own(tokens, own_lengths)
        cache = self._read(prompt)
        room = cache.slots + self.most_tokens + MOST_PIECES  # for the first draft
        return AssistantMemory(
            cache=cache.repeat(copies).grow(room).ragged(),
            lengths=lengths,
            own=own,
            cached=own_lengths,
            drafted=jnp.zeros_like(lengths),
            # `draft` treats the empty draft before the first one as accepted in full, and adds 2.
            num_tokens=jnp.broadcast_to(jnp.asarray(self.num_tokens) - 2, (rows,)),
        )

    def _read(self, prompt: Prompt) -> Cache:
        """The cache of the prompts, with P slots. Long prompts are read in chunks; chunks of padding are skipped."""
        model: Model[Any] = self.model
        ids, mask = self._known(prompt.input_ids), prompt.attention_mask.astype(bool)
        columns = ids.shape[1]
        size = _CHUNK if columns > _CHUNK and columns % _CHUNK == 0 else columns

        def read(number: jax.Array, cache: Any) -> Any:
            part, part_mask = (lax.dynamic_slice_in_dim(each, number * size, size, axis=1) for each in (ids, mask))
            return model.extend(cache, part, part_mask)[1]

        first, cache = (columns - prompt.length) // size, model.make_cache(*ids.shape)
        if self.source is not None:
            cache, _ = cast(EncoderDecoderModel[Any], model).read(cache, self.source)
        return lax.fori_loop(first, jnp.int32(columns // size), read, cache)

    def draft(self, texts: Texts, limits: jax.Array, choose: Choose, memory: AssistantMemory) -> Draft[AssistantMemory]:
        # A step adds the accepted tokens and one more.
        stayed = jnp.clip(texts.lengths - memory.lengths - 1, 0, memory.drafted)
        adapted = jnp.where(stayed == memory.drafted, memory.num_tokens + 2, jnp.maximum(memory.num_tokens - 1, 1))
        num_tokens = jnp.where(self.adapts, jnp.minimum(adapted, self.most_tokens), self.num_tokens)
        own, agreed = self._own_texts(texts, stayed, memory)
        cached = jnp.minimum(memory.cached, agreed)
        room = own.tokens.shape[1] - own.lengths
        wanted = jnp.minimum(num_tokens, jnp.minimum(limits, room))

        def goes_on(drafting: _Drafting) -> jax.Array:
            return (drafting.drafted < wanted) & drafting.sure

        def step(drafting: _Drafting) -> _Drafting:
            going, end = goes_on(drafting), own.lengths + drafting.drafted
            count = jnp.where(going, jnp.minimum(end - drafting.cached, _AT_ONCE), 0)
            columns = drafting.cached[:, None] + jnp.arange(_AT_ONCE, dtype=jnp.int32)[None]
            tokens = self._known(jnp.take_along_axis(drafting.own, columns, axis=1, mode="clip"))
            mask = jnp.arange(_AT_ONCE)[None] < count[:, None]
            logits, cache = extend_by_columns(self.model, drafting.cache, tokens, mask)
            # Dropping 0 moves the length back over columns that no row has read: the next pass reuses their slots.
            cache = cache.drop_last(jnp.zeros_like(count))
            last = jnp.maximum(count - 1, 0)[:, None, None]
            logits = jnp.take_along_axis(logits.reshape(len(tokens), _AT_ONCE, -1), last, axis=1)[:, 0]
            ends = texts.lengths + drafting.drafted
            chosen = choose(Texts(drafting.tokens, ends, drafting.processors), self._of_model(logits))
            new = going & (drafting.cached + count == end)  # the other rows have more to read before they draft

            def where_new(after: jax.Array, before: jax.Array) -> jax.Array:
                return jnp.where(new.reshape(-1, *[1] * (after.ndim - 1)), after, before)

            added = new.astype(jnp.int32)
            return _Drafting(
                cache=cache,
                cached=drafting.cached + count,
                tokens=with_tokens(drafting.tokens, ends, chosen.tokens[:, None], added),
                own=with_tokens(drafting.own, end, self._of_assistant(chosen.tokens)[:, None], added),
                drafted=drafting.drafted + added,
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
                own=own.tokens,
                drafted=jnp.zeros_like(stayed),
                sure=jnp.ones_like(stayed, bool),
                processors=texts.processors,
            ),
        )
        columns = texts.lengths[:, None] + jnp.arange(self.most_tokens, dtype=jnp.int32)[None]
        tokens = jnp.take_along_axis(done.tokens, columns, axis=1, mode="clip")
        kept = None if self.translation is None else _Own(done.own, own.lengths)
        after = AssistantMemory(done.cache, texts.lengths, kept, done.cached, done.drafted, num_tokens)
        return Draft(tokens, done.drafted, after)

    def _own_texts(self, texts: Texts, stayed: jax.Array, memory: AssistantMemory) -> tuple[_Own, jax.Array]:
        """The texts in the assistant's tokens, and int32 [N]: how many of them are unchanged since the last draft.

        With a translation, accepted tokens are in these texts already, and only the token after them is translated:

        ```
        model's tokens        once| upon| a| midnight          "midnight" was not drafted
        assistant's           once| upon| a| mid|night
        ```
        """
        if self.translation is None:
            return _Own(texts.tokens, texts.lengths), memory.lengths + stayed
        assert memory.own is not None
        last = jnp.take_along_axis(texts.tokens, jnp.maximum(texts.lengths - 1, 0)[:, None], axis=1)[:, 0]
        pieces, counts = jnp.asarray(self.translation.pieces)[last], jnp.asarray(self.translation.counts)[last]
        known = memory.own.lengths + stayed
        return _Own(with_tokens(memory.own.tokens, known, pieces, counts), known + counts), known

    def _of_model(self, logits: jax.Array) -> jax.Array:
        """The assistant's logits as float32 [N, V] logits of the model's tokens."""
        if self.translation is None:
            return logits
        same = jnp.asarray(self.translation.same)
        return jnp.where(same[None] >= 0, logits[:, jnp.maximum(same, 0)], -jnp.inf)

    def _of_assistant(self, tokens: jax.Array) -> jax.Array:
        """int32 [N]: the assistant's ids of drafted tokens."""
        return tokens if self.translation is None else jnp.asarray(self.translation.same)[tokens]

    def _known(self, tokens: jax.Array) -> jax.Array:
        """The tokens clipped to the assistant's vocabulary, which may be smaller."""
        return jnp.clip(tokens, 0, self.model.vocab_size - 1)

    def caches(self, memory: AssistantMemory) -> tuple[RaggedCache, ...]:
        return (memory.cache,)

    def bytes_of_caches(self, prompt: Prompt, copies: int, new_tokens: int) -> int:
        own = prompt if self.translation is None else self.translation.prompt
        rows, slots = len(prompt.input_ids) * copies, own.input_ids.shape[1] + new_tokens
        columns = 0 if self.source is None else self.source.attention_mask.size  # of all prompts
        return (rows * slots + columns) * self.model.cache_bytes_per_token

    def with_caches(self, memory: AssistantMemory, caches: tuple[RaggedCache, ...]) -> AssistantMemory:
        (cache,) = caches
        return replace(memory, cache=cache)

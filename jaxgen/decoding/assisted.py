"""Assisted decoding: a drafter proposes tokens, and one forward pass checks all of them.

A forward pass over the last token and a draft gives, at each of its columns, the token that `Sample` would choose
there. This holds for samples too, because the noise of a token depends only on its row, step and id. Drafted tokens are
accepted up to the first that differs from the chosen token, and the row continues with that chosen token. So the tokens
are the same as without a drafter, greedy or sampled, and every step yields at least one token per row:

```
text          a b c          lengths = 3
reads         c x y z        the last token and a draft of 3
chooses       x y w .        x and y as drafted, w not: 3 new tokens
text          a b c x y w    the columns of c, x and y stay in the cache
```

Rows advance at different speeds, so each has its own length. A finished row continues with padding up to the length of
the others, since the returned cache has a column for every output token.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxgen.base import (
    EosCriterion,
    Intermediates,
    LengthCriterion,
    LogitsProcessor,
    Prompt,
    RaggedCache,
    StoppingCriterion,
    Strategy,
)
from jaxgen.decoding.choice import choose, output_buffers, split_warpers
from jaxgen.decoding.columns import with_tokens
from jaxgen.decoding.drafters import Chosen, Draft, Drafter, Texts
from jaxgen.decoding.gumbel import row_keys
from jaxgen.processors.logits_process import by_row, process_columns
from jaxgen.processors.stopping_criteria import any_of_columns
from jaxgen.pytree import Int32, pytree

_NOT_YET = 2**30  # in `ends`: the row is not finished


@pytree
@dataclass(frozen=True)
class AssistedState:
    """The state of a decode whose rows have different lengths.

    Attributes:
        sequences: int32 [N, S]. The caller's prompt from column 0, then the new tokens.
        lengths: int32 [N]. Valid columns of each row of `sequences`.
        ends: int32 [N]. The length of a finished row; `_NOT_YET` before. Padding rows of the bucket end at 0.
        prompt_length: int32 []. Columns of the caller's prompt.
        tokens: int32 [N, T]. The last token of each row, then its draft.
        num_read: int32 [N]. How many of `tokens` the next forward pass reads.
        num_kept: int32 [N]. How many columns of the last forward pass each row kept.
        invalid, keys, recorded: as in `SampleState`.
        processors: the states of the processors, with a leading axis of rows.
        memory: the drafter's memory.
        rounds: int32 [N]. The number of forward passes that have chosen tokens of the row, including the prompt's.
        drafted: int32 [N]. The number of drafted tokens so far.
        accepted: int32 [N]. How many of them were accepted.
    """

    sequences: jax.Array
    lengths: jax.Array
    ends: jax.Array
    prompt_length: jax.Array
    tokens: jax.Array
    num_read: jax.Array
    num_kept: jax.Array
    invalid: jax.Array
    keys: jax.Array | None
    processors: tuple[object, ...]
    recorded: dict[str, jax.Array]
    memory: Any
    rounds: jax.Array
    drafted: jax.Array
    accepted: jax.Array

    @property
    def going(self) -> jax.Array:
        """bool [N]. Rows that are not finished."""
        return self.ends == _NOT_YET

    @property
    def cur_len(self) -> jax.Array:
        """int32 []. The number of columns that no row changes any more: the length of the shortest unfinished row."""
        return jnp.where(self.going.any(), jnp.where(self.going, self.lengths, _NOT_YET).min(), self.ends.max())


@pytree
@dataclass(frozen=True)
class Assisted(Strategy[AssistedState]):
    """Chooses the same tokens as `Sample`, several per forward pass where a drafter guesses them.

    Processors and criteria are called for one row at a time, with that row's own length.

    Attributes:
        eos, max_length, pad_token_id, key, processors, stopping_criteria, num_return_sequences, outputs, vocab_shards:
            as in `Sample`.
        drafter: proposes tokens.
        whole_cache: whether finished rows read padding until the cache holds as many of their columns as of the longest
            row, static.
    """

    eos: EosCriterion
    max_length: LengthCriterion
    pad_token_id: Int32 | None
    drafter: Drafter[Any]
    key: jax.Array | None = None
    processors: tuple[LogitsProcessor, ...] = ()
    stopping_criteria: tuple[StoppingCriterion, ...] = ()
    num_return_sequences: int = field(default=1, metadata={"static": True})
    outputs: tuple[str, ...] = field(default=(), metadata={"static": True})
    vocab_shards: int = field(default=1, metadata={"static": True})
    whole_cache: bool = field(default=False, metadata={"static": True})

    @property
    def copies(self) -> int:
        return self.num_return_sequences

    @property
    def columns(self) -> int:
        return 1 + self.drafter.most_tokens

    def cache_slots(self, columns: int, new_tokens: int) -> int:
        return columns + new_tokens + self.columns  # the last step may write T columns and keep one

    def init(self, prompt: Prompt, slots: int, vocab_size: int) -> AssistedState:
        """The state before the first token."""
        memory = self.drafter.init(prompt, self.num_return_sequences, slots)
        prompt = prompt.repeated(self.num_return_sequences)
        rows, columns = prompt.input_ids.shape
        states = [processor.init(prompt, vocab_size) for processor in self.processors]
        zeros = jnp.zeros(rows, jnp.int32)
        return AssistedState(
            sequences=prompt.left_aligned(slots, 0),
            lengths=jnp.full(rows, prompt.length, jnp.int32),
            ends=jnp.where(jnp.arange(rows) < prompt.rows, _NOT_YET, 0).astype(jnp.int32),
            prompt_length=prompt.length,
            tokens=jnp.zeros((rows, self.columns), jnp.int32),
            num_read=jnp.ones(rows, jnp.int32),
            num_kept=zeros,
            invalid=jnp.zeros(rows, bool),
            keys=None
            if self.key is None
            else row_keys(self.key, rows // self.num_return_sequences, self.num_return_sequences),
            processors=by_row(states, rows),
            recorded=output_buffers(self.outputs, rows, vocab_size, slots - columns),
            memory=memory,
            rounds=zeros,
            drafted=zeros,
            accepted=zeros,
        )

    def start(
        self, prompt: Prompt, slots: int, logits: jax.Array, scores: jax.Array, intermediates: Intermediates
    ) -> AssistedState:
        state = self.init(prompt, slots, logits.shape[1])
        logits, scores = (jnp.repeat(array, self.copies, axis=0)[:, None] for array in (logits, scores))
        return self._next(logits, scores, state)

    def step(
        self, logits: jax.Array, scores: jax.Array, intermediates: Intermediates, state: AssistedState
    ) -> AssistedState:
        by_column = (len(state.tokens), self.columns, -1)
        return self._next(logits.reshape(by_column), scores.reshape(by_column), state)

    def _next(self, logits: jax.Array, scores: jax.Array, state: AssistedState) -> AssistedState:
        """The state after a forward pass with float32 [N, T, V] logits, or [N, 1, V] for the prompt's forward pass."""
        rows, columns, vocab_size = scores.shape
        number = jnp.arange(columns, dtype=jnp.int32)[None]
        draft = state.tokens[:, 1:columns]
        on = state.going | (self.pad_token_id is None)  # rows that choose tokens; the others continue with padding
        read = on[:, None] & (number < state.num_read[:, None])

        texts = with_tokens(state.sequences, state.lengths, draft, draft.shape[1])
        processors, warpers = split_warpers(self.processors, self.key is not None, self.outputs)
        kept_states, count = state.processors, len(processors)
        scores, states = process_columns(processors, texts, scores, state.lengths, read, kept_states[:count])
        step = (state.lengths - state.prompt_length)[:, None] + number
        choice = choose(
            logits.reshape(-1, vocab_size),
            scores.reshape(-1, vocab_size),
            None if state.keys is None else jnp.repeat(state.keys, columns, axis=0),
            step.reshape(-1, 1),
            ~read.reshape(-1),
            warpers,
            "logprobs" in self.outputs,
            self.vocab_shards,
        )
        tokens, log_p, invalid = (array.reshape(rows, columns) for array in choice)

        # The accepted tokens, and one more.
        agrees = (tokens[:, :-1] == draft) & read[:, 1:]
        agreed = jnp.cumprod(agrees.astype(jnp.int32), axis=1).sum(axis=1, dtype=jnp.int32)
        new = jnp.minimum(agreed + 1, self.max_length.max_length - state.lengths)
        counts = (number < new[:, None]) & state.going[:, None]
        texts = with_tokens(state.sequences, state.lengths, tokens, new)
        criteria = self.eos, self.max_length, *self.stopping_criteria
        ended = any_of_columns(criteria, texts, scores, state.lengths, counts) & counts
        first = jnp.where(ended.any(axis=1), jnp.argmax(ended, axis=1) + 1, _NOT_YET).astype(jnp.int32)
        ends = jnp.where(first < _NOT_YET, state.lengths + first, state.ends)
        if self.pad_token_id is not None:
            new = jnp.where(on, jnp.minimum(new, first), state.num_read)
            tokens = jnp.where(on[:, None], tokens, self.pad_token_id)

        following = replace(
            state,
            sequences=with_tokens(state.sequences, state.lengths, tokens, new),
            lengths=state.lengths + new,
            ends=ends,
            num_kept=new,
            # Tokens after the end of a row do not count: without a pad token, rows continue after their end.
            invalid=state.invalid
            | (invalid & (number < new[:, None]) & (state.lengths[:, None] + number < ends[:, None])).any(axis=1),
            processors=(*_after(states, new), *kept_states[count:]),
            recorded=self._record(logits, scores, tokens, log_p, state, new, ends),
            rounds=state.rounds + state.going.astype(jnp.int32),
            accepted=state.accepted + jnp.where(state.going, jnp.minimum(agreed, new), 0),
        )
        return self._drafted(following, vocab_size)

    def _drafted(self, state: AssistedState, vocab_size: int) -> AssistedState:
        """The state with the tokens of the next forward pass."""
        last = jnp.take_along_axis(state.sequences, jnp.maximum(state.lengths - 1, 0)[:, None], axis=1)
        # A pass yields at most one token more than the draft has, and no row gets longer than the maximum.
        left = self.max_length.max_length - state.lengths
        on = state.going | (self.pad_token_id is None)
        limits = jnp.where(on, jnp.maximum(left - 1, 0), 0)

        def choose_next(texts: Texts, logits: jax.Array) -> Chosen:
            # Vocabularies of different sizes differ only in their padding.
            missing = max(vocab_size - logits.shape[1], 0)
            logits = jnp.pad(logits[:, :vocab_size], ((0, 0), (0, missing)), constant_values=-jnp.inf)
            return self._chosen(state, texts, logits)

        texts = Texts(state.sequences, state.lengths, state.processors)
        draft = self.drafter.draft(texts, limits, choose_next, state.memory)
        _check_draft(draft, (len(texts.tokens), self.drafter.most_tokens))
        # A draft ends before an invalid token id, which the model and functions on the host would look up.
        known = jnp.cumprod(((draft.tokens >= 0) & (draft.tokens < vocab_size)).astype(jnp.int32), axis=1)
        count = jnp.clip(jnp.minimum(draft.num_tokens, known.sum(axis=1, dtype=jnp.int32)), 0, limits)
        num_read = jnp.where(left > 0, 1 + count, 0)
        tokens = draft.tokens
        if self.pad_token_id is not None:
            longest = jnp.where(state.going.any(), jnp.where(state.going, state.lengths, 0).max(), state.ends.max())
            behind = jnp.clip(longest - state.lengths, 0, self.columns)
            tokens = jnp.where(state.going[:, None], tokens, self.pad_token_id)
            num_read = jnp.where(state.going, num_read, behind)
        return replace(
            state,
            tokens=jnp.concatenate([last, tokens], axis=1).astype(jnp.int32),
            num_read=num_read.astype(jnp.int32),
            memory=draft.memory,
            drafted=state.drafted + jnp.where(state.going, count, 0),
        )

    def _chosen(self, state: AssistedState, texts: Texts, logits: jax.Array) -> Chosen:
        """The tokens that the call would choose from float32 [N, V] logits of another model; see `drafters.Choose`."""
        tokens, lengths, states = texts
        rows = len(tokens)
        chosen_from = [each for each in self.processors if not each.on_host]
        processors, warpers = split_warpers(tuple(chosen_from), self.key is not None, ())
        own = [state for each, state in zip(self.processors, states, strict=True) if not each.on_host]
        scores, stacked = process_columns(
            processors, tokens, logits[:, None], lengths, jnp.ones((rows, 1), bool), own[: len(processors)]
        )
        step = (lengths - state.prompt_length)[:, None]
        choice = choose(logits, scores[:, 0], state.keys, step, jnp.zeros(rows, bool), warpers, True, self.vocab_shards)
        after = iter(_after(stacked, jnp.ones(rows, jnp.int32)))
        # Host processors and warpers have no states.
        states = tuple(next(after, ()) if not each.on_host else () for each in self.processors)
        is_eos = (choice.tokens[:, None] == self.eos.eos_token_id[None]).any(axis=1)
        return Chosen(choice.tokens, choice.log_p, is_eos, states)

    def _record(
        self,
        logits: jax.Array,
        scores: jax.Array,
        tokens: jax.Array,
        log_p: jax.Array,
        state: AssistedState,
        new: jax.Array,
        ends: jax.Array,
    ) -> dict[str, jax.Array]:
        """The buffers of recorded outputs, [steps, N, ...], with the values of the new tokens."""
        if not state.recorded:
            return {}
        rows, columns = tokens.shape
        values = {"scores": scores, "logits": logits}
        if "logprobs" in self.outputs:
            chosen = jnp.take_along_axis(logits, tokens[:, :, None], axis=2)[:, :, 0]
            values["logprobs"] = chosen - jax.nn.logsumexp(logits, axis=2)
            values["processed_logprobs"] = log_p
        number = jnp.arange(columns, dtype=jnp.int32)[None]
        column = state.lengths[:, None] + number
        step = column - state.prompt_length
        # The log-probabilities of padding are 0, since the buffers start as zeros.
        stays = (number < new[:, None]) & (column < ends[:, None])
        row = jnp.arange(rows)[:, None]
        return {
            name: buffer.at[jnp.where(stays, step, len(buffer)), row].set(values[name], mode="drop")
            for name, buffer in state.recorded.items()
        }

    def caches(self, state: AssistedState) -> tuple[RaggedCache, ...]:
        return self.drafter.caches(state.memory)

    def bytes_of_caches(self, prompt: Prompt, new_tokens: int) -> int:
        return self.drafter.bytes_of_caches(prompt, self.num_return_sequences, new_tokens)

    def with_caches(self, state: AssistedState, caches: tuple[RaggedCache, ...]) -> AssistedState:
        return replace(state, memory=self.drafter.with_caches(state.memory, caches))

    def read(self, state: AssistedState) -> jax.Array:
        return jnp.arange(self.columns)[None] < state.num_read[:, None]

    def kept(self, state: AssistedState) -> jax.Array:
        return state.num_kept

    def unfinished(self, state: AssistedState) -> jax.Array:
        if self.pad_token_id is not None and not self.whole_cache:
            return state.going.any()
        return state.going.any() | (state.lengths < state.ends.max()).any()

    def text(self, state: AssistedState) -> jax.Array:
        if self.pad_token_id is None:
            return state.sequences
        columns = jnp.arange(state.sequences.shape[1])[None]
        return jnp.where(columns < state.lengths[:, None], state.sequences, self.pad_token_id)

    def finalize(self, state: AssistedState) -> Mapping[str, jax.Array]:
        """As `Sample.finalize`, with `rounds`, `drafted` and `accepted` of `AssistedState`."""
        transposed = {name: buffer.T if buffer.ndim == 2 else buffer for name, buffer in state.recorded.items()}
        return {
            "sequences": self.text(state),
            "length": state.cur_len,
            "invalid": state.invalid,
            "rounds": state.rounds,
            "drafted": state.drafted,
            "accepted": state.accepted,
            **transposed,
        }


def _check_draft(draft: object, shape: tuple[int, int]) -> None:
    """Raises ValueError unless a drafter returned a `Draft` of int32 [N, most_tokens] tokens."""
    if not isinstance(draft, Draft):
        raise ValueError(f"a drafter returned {type(draft).__name__}, but must return a `jaxgen.Draft`.")
    for name, array, expected in (("tokens", draft.tokens, shape), ("num_tokens", draft.num_tokens, shape[:1])):
        found = jax.eval_shape(lambda array=array: jnp.asarray(array))
        if found.shape != expected or not jnp.issubdtype(found.dtype, jnp.integer):
            raise ValueError(
                f"a drafter returned `{name}` of shape {found.shape} and dtype {found.dtype}, but it must be int32 of "
                f"shape {expected}."
            )


def _after(states: tuple[object, ...], new: jax.Array) -> tuple[object, ...]:
    """Selects the states after int32 [N] `new` tokens of each row: [T + 1, N, ...] -> [N, ...]."""
    return jax.tree.map(lambda leaf: leaf[new, jnp.arange(len(new))], states)

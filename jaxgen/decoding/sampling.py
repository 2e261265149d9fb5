"""The one-beam strategy, greedy or sampling: same as transformers 5.24 `GenerationMixin._sample`.

A token is drawn by Gumbel-max: the highest score after adding noise, which is the same law as a draw from the softmax.
The noise of a token depends on its row's key, the step and the token alone. A row's sample is therefore the same
whatever its batch mates, padding, bucket or chunk, and whether it is drawn from the whole vocabulary or from the few
candidates that sampling leaves.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxgen.base import Internals, LogitsProcessor, Prompt, Strategy, step_buffers, write_step
from jaxgen.decoding.gumbel import gumbel, row_keys
from jaxgen.processors.logits_process import TopK, TopP, Warper, process
from jaxgen.processors.stopping_criteria import EosToken, MaxLength, any_of
from jaxgen.processors.top_k import first_highest, highest_few, in_blocks
from jaxgen.pytree import Int32, pytree

WINDOW = 64  # candidates of a draw; holds the usual top_k of 50


@pytree
@dataclass(frozen=True)
class SampleState:
    """The token buffer of a one-beam decode, and what is kept beside it.

    Attributes:
        sequences: int32 [N, S]. Hugging Face's `input_ids`: the caller's prompt from column 0, then the new tokens.
        cur_len: int32 []. Valid columns of `sequences`.
        prompt_length: int32 []. Columns of the caller's prompt.
        tokens: int32 [N]. The last valid column.
        finished: bool [N]. Rows that ask for no more tokens; the bucket's rows from the start.
        invalid: bool [N]. Rows whose scores held a NaN, an infinity, or no finite number before they were finished.
        keys: uint32 [N, 2], or None if nothing is drawn.
        processors: the states of the processors.
        recorded: the outputs asked for, in buffers with a leading axis of steps.
    """

    sequences: jax.Array
    cur_len: jax.Array
    prompt_length: jax.Array
    tokens: jax.Array
    finished: jax.Array
    invalid: jax.Array
    keys: jax.Array | None
    processors: tuple[Any, ...]
    recorded: dict[str, jax.Array]


@pytree
@dataclass(frozen=True)
class Sample(Strategy):
    """Chooses one token per row: the likeliest, the first of equals, or with a `key` one at random.

    Attributes:
        eos: when a row is finished.
        max_length: when all rows are.
        pad_token_id: int32 []. What finished rows receive while others go on; None to let them go on too.
        key: None for greedy decoding, or an int, or a `jax.random` key, or one of either per prompt. Row r of a single
            key draws with `fold_in(key, r)`, a prompt with its own key as row 0 does; sequence i of a prompt with that
            folded with i.
        processors: in the order they act; see `logits_process`.
        stopping_criteria: more ways to finish, called with (input_ids, scores, cur_len) after each token.
        num_return_sequences: R, static.
        outputs: what to record of every step, static: "scores", "logits", "logprobs".
    """

    eos: EosToken
    max_length: MaxLength
    pad_token_id: Int32 | None
    key: jax.Array | None = None
    processors: tuple[LogitsProcessor, ...] = ()
    stopping_criteria: tuple[Any, ...] = ()
    num_return_sequences: int = field(default=1, metadata={"static": True})
    outputs: tuple[str, ...] = field(default=(), metadata={"static": True})

    @property
    def copies(self) -> int:
        return self.num_return_sequences

    def init(self, prompt: Prompt, slots: int, vocab_size: int) -> SampleState:
        """The state before the first token."""
        tokens = jnp.repeat(prompt.input_ids[:, -1], self.num_return_sequences)
        prompt = prompt.repeated(self.num_return_sequences)
        rows, columns = prompt.input_ids.shape
        of_vocabulary = jax.ShapeDtypeStruct((rows, vocab_size), jnp.float32)
        of_rows = jax.ShapeDtypeStruct((rows,), jnp.float32)
        shapes = {"scores": of_vocabulary, "logits": of_vocabulary, "logprobs": of_rows, "processed_logprobs": of_rows}
        names = [*self.outputs, *(["processed_logprobs"] if "logprobs" in self.outputs else [])]
        return SampleState(
            sequences=prompt.left_aligned(slots, 0),
            cur_len=prompt.length,
            prompt_length=prompt.length,
            tokens=tokens,
            finished=jnp.arange(rows) >= prompt.rows,
            invalid=jnp.zeros(rows, bool),
            keys=None
            if self.key is None
            else row_keys(self.key, rows // self.num_return_sequences, self.num_return_sequences),
            processors=tuple(processor.init(prompt, vocab_size) for processor in self.processors),
            recorded=step_buffers(names, slots - columns, shapes),
        )

    def step(self, logits: jax.Array, scores: jax.Array, internals: Internals, state: SampleState) -> SampleState:
        few = self._first_warper()
        scores, states = process(self.processors[:few], state.sequences, scores, state.cur_len, state.processors[:few])
        tokens, log_p, invalid = self._choose(scores, self.processors[few:], state)
        if self.key is not None and few == len(self.processors):
            invalid |= ~jnp.isfinite(in_blocks(logits).max(axis=(1, 2)))  # the rules of sampling may drop a NaN
        recorded = self._record(logits, scores, tokens, log_p, state)

        if self.pad_token_id is not None:
            tokens = jnp.where(state.finished, self.pad_token_id, tokens)
        sequences = lax.dynamic_update_slice_in_dim(state.sequences, tokens[:, None], state.cur_len, axis=1)
        cur_len = state.cur_len + 1
        criteria = self.eos, self.max_length, *self.stopping_criteria
        finished = state.finished | any_of(criteria, sequences, scores, cur_len)
        return SampleState(
            sequences=sequences,
            cur_len=cur_len,
            prompt_length=state.prompt_length,
            tokens=tokens,
            finished=finished,
            invalid=state.invalid | (invalid & ~state.finished),
            keys=state.keys,
            processors=(*states, *state.processors[few:]),
            recorded=recorded,
        )

    def _first_warper(self) -> int:
        """The place of the first processor that may run on a few candidates: a TopK that only warpers follow."""
        if self.key is not None and "scores" not in self.outputs:
            for place, processor in enumerate(self.processors):
                if isinstance(processor, TopK) and all(isinstance(each, Warper) for each in self.processors[place:]):
                    return place
        return len(self.processors)

    def _choose(
        self, scores: jax.Array, warpers: tuple[Any, ...], state: SampleState
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """int32 [N] tokens, float32 [N] their log-probabilities (if wanted, or zeros), bool [N] invalid rows."""

        def pick(scores: jax.Array, columns: jax.Array | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
            noisy = scores
            if state.keys is not None:
                drawn = jnp.broadcast_to(jnp.arange(scores.shape[1]), scores.shape) if columns is None else columns
                noisy = scores + gumbel(state.keys, state.cur_len - state.prompt_length, drawn)
            if columns is None:
                tokens = best = first_highest(noisy)
            else:  # in any order, so that the first of equals has to be found by its column
                equal = noisy == noisy.max(axis=1, keepdims=True)
                best = jnp.argmin(jnp.where(equal, columns, jnp.iinfo(jnp.int32).max), axis=1)
                tokens = jnp.take_along_axis(columns, best[:, None], axis=1)[:, 0].astype(jnp.int32)
            chosen = jnp.take_along_axis(scores, best[:, None], axis=1)[:, 0]
            log_p = jnp.zeros_like(chosen)
            if "logprobs" in self.outputs:
                log_p = chosen - jax.nn.logsumexp(scores, axis=1)
            # torch and jax both hold NaN for the greatest, so the chosen score tells whether there is one.
            return tokens, log_p, ~jnp.isfinite(chosen)

        def pick_from_all(scores: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            for warper in warpers:
                scores = warper.warp(scores)
            return pick(scores)

        if not warpers:
            return pick_from_all(scores)
        candidates = _candidates(scores, warpers, state.finished)
        tokens, log_p, invalid = lax.cond(
            candidates.complete,
            lambda: pick(candidates.scores, candidates.columns),
            lambda: pick_from_all(scores),
        )
        return tokens, log_p, invalid | candidates.invalid

    def _record(
        self, logits: jax.Array, scores: jax.Array, tokens: jax.Array, log_p: jax.Array, state: SampleState
    ) -> dict[str, jax.Array]:
        """The recorded outputs with this step's."""
        values = {"scores": scores, "logits": logits}
        if "logprobs" in self.outputs:
            raw = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, axis=1)
            values["logprobs"] = jnp.where(state.finished, 0, raw)
            values["processed_logprobs"] = jnp.where(state.finished, 0, log_p)
        return write_step(state.recorded, values, state.cur_len - state.prompt_length)

    def unfinished(self, state: SampleState) -> jax.Array:
        return ~state.finished.all()

    def text(self, state: SampleState) -> jax.Array:
        return state.sequences

    def finalize(self, state: SampleState) -> Mapping[str, jax.Array]:
        """See `base.Strategy.finalize`; with the recorded outputs: [steps, N, V], or [N, steps] of logprobs."""
        transposed = {name: buffer.T if buffer.ndim == 2 else buffer for name, buffer in state.recorded.items()}
        return {"sequences": state.sequences, "length": state.cur_len, "invalid": state.invalid, **transposed}


@pytree
@dataclass(frozen=True)
class _Candidates:
    """The tokens that sampling leaves, in no particular order.

    Attributes:
        scores: float32 [N, W], warped.
        columns: int32 [N, W].
        complete: bool []. Whether no token beyond them has a chance, in any row.
        invalid: bool [N]. Rows with a NaN, an infinity or no finite score.
    """

    scores: jax.Array
    columns: jax.Array
    complete: jax.Array
    invalid: jax.Array


def _candidates(scores: jax.Array, warpers: tuple[Any, ...], finished: jax.Array) -> _Candidates:
    """Warps the few highest scores instead of all, where those few are enough.

    They are if top_k is at most their number, with no equals of the last one left out, or if what is left out is too
    unlikely for top_p. Sorting a vocabulary of 128k takes XLA:CPU 190 ms at batch 8; finding its 64 highest, 0.6 ms.
    """
    vocab_size = scores.shape[1]
    window = min(WINDOW, vocab_size)
    top_k, *others = warpers
    top_p = others.pop(0).top_p if others and isinstance(others[0], TopP) else jnp.float32(1)
    limited = top_k.top_k <= window

    values, columns, invalid = highest_few(scores, window)
    last = lax.dynamic_slice_in_dim(values, jnp.clip(top_k.top_k, 1, window) - 1, 1, axis=1)
    edge = values[:, -1:]

    def left_out(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Whether all scores from the edge on are candidates, and the logsumexp of the others, each [N, 1]."""
        rest = jax.nn.logsumexp(jnp.where(scores < edge, scores, -jnp.inf), axis=1, keepdims=True)
        return (scores >= edge).sum(axis=1, keepdims=True) <= window, rest

    def nothing_left_out(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        alone = (edge < last) | (last == -jnp.inf) | (window == scores.shape[1])
        return alone, jnp.full_like(edge, -jnp.inf)

    alone, rest = lax.cond(limited | (top_p >= 1), nothing_left_out, left_out, scores)
    total = jnp.logaddexp(jax.nn.logsumexp(values, axis=1, keepdims=True), rest)
    enough = limited | ((top_k.top_k >= vocab_size) & (top_p < 1) & (jnp.exp(rest - total) <= 1 - top_p))
    complete = (alone & enough)[:, 0] | finished | invalid

    if others:  # they count on the order of the columns
        columns, values = lax.sort((columns, values), dimension=1, num_keys=1)
    values = jnp.where(limited & (values < last), -jnp.inf, values)
    values = TopP(top_p).keep_nucleus(values, rest, columns)
    for warper in others:
        values = warper.warp(values)
    return _Candidates(values, columns, complete.all(), invalid)

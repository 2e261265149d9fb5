"""Beam search and beam sampling: same as transformers 5.24 `GenerationMixin._beam_search`, state for state.

Every prompt has b running beams, which grow, and b finished ones, which wait for better ones to replace them. The
prompt's forward pass runs once for all its beams, and every other one takes b columns per prompt; see
`kv_cache.BranchedCache`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxgen.base import Internals, LogitsProcessor, Prompt, Strategy, step_buffers, write_step
from jaxgen.decoding.beams import NEVER, Beams, take
from jaxgen.decoding.gumbel import gumbel, row_keys
from jaxgen.processors.logits_process import process, reorder
from jaxgen.processors.stopping_criteria import EosToken, MaxLength, any_of
from jaxgen.processors.top_k import highest_few
from jaxgen.pytree import Bool, Float32, Int32, pytree


@pytree
@dataclass(frozen=True)
class BeamState:
    """The beams of a decode, and what is kept beside them.

    Attributes:
        running: the b beams that grow, the best first.
        finished: the best b finished ones so far; before there are b of them, also placeholders that are not.
        cur_len: int32 []. Valid columns of the running beams.
        prompt_length: int32 []. Columns of the caller's prompt.
        rows: int32 []. Rows of the caller's prompt.
        tokens: int32 [B * b]. The last column of the running beams.
        parents: int32 [B, b]. The running beam that each one continued.
        improvable: bool [B]. Whether a running beam may still beat a finished one; once False, it stays so.
        ended: bool []. Whether no prompt wants another token.
        invalid: bool [B]. Prompts whose scores held a NaN, an infinity, or no finite number.
        keys: uint32 [B, 2], or None if nothing is drawn.
        processors: the states of the processors.
        recorded: the outputs asked for, in buffers with a leading axis of steps.
    """

    running: Beams
    finished: Beams
    cur_len: jax.Array
    prompt_length: jax.Array
    rows: jax.Array
    tokens: jax.Array
    parents: jax.Array
    improvable: jax.Array
    ended: jax.Array
    invalid: jax.Array
    keys: jax.Array | None
    processors: tuple[Any, ...]
    recorded: dict[str, jax.Array]


@pytree
@dataclass(frozen=True)
class BeamSearch(Strategy):
    """Keeps the b likeliest continuations of each prompt, or with a `key` some at random.

    Attributes:
        eos, max_length: when a beam is finished.
        fill: int32 []. What follows the end of a beam.
        length_penalty: float32 []. The power of the number of tokens by which a finished beam's score is divided.
        stop_when_full: bool []. `early_stopping=True`: a prompt is done as soon as it has b finished beams.
        assume_longest: bool []. `early_stopping="never"` with a positive penalty: running beams are judged by what they
            might score at `longest`, not by what they score now.
        longest: int32 []. The columns that a beam may have.
        key: None, or as `Sample.key`.
        processors: in the order they act, on log-probabilities; see `logits_process`.
        stopping_criteria: more ways to finish, called with all candidates as (input_ids [B * W, S], scores [B * b, V],
            cur_len).
        num_beams: b, static.
        num_candidates: W, static: the continuations of a prompt among which beams finish or go on running.
        outputs: what to record of every step, static: "scores", "logits", "parents".
    """

    eos: EosToken
    max_length: MaxLength
    fill: Int32
    length_penalty: Float32
    stop_when_full: Bool
    assume_longest: Bool
    longest: Int32
    key: jax.Array | None = None
    processors: tuple[LogitsProcessor, ...] = ()
    stopping_criteria: tuple[Any, ...] = ()
    num_beams: int = field(default=2, metadata={"static": True})
    num_candidates: int = field(default=4, metadata={"static": True})
    outputs: tuple[str, ...] = field(default=(), metadata={"static": True})

    @property
    def branches(self) -> int:
        return self.num_beams

    def cache_slots(self, columns: int, new_tokens: int) -> int:
        return columns + self.num_beams * new_tokens

    @property
    def log_probabilities(self) -> bool:
        return True

    def init(self, prompt: Prompt, slots: int, vocab_size: int) -> BeamState:
        rows, columns = prompt.input_ids.shape
        unused = jnp.arange(rows) >= prompt.rows  # rows of the bucket
        beams = Beams.of_prompts(prompt, slots, self.fill, self.num_beams)
        of_vocabulary = jax.ShapeDtypeStruct((rows * self.num_beams, vocab_size), jnp.float32)
        of_beams = jax.ShapeDtypeStruct((rows, self.num_beams), jnp.int32)
        shapes = {"scores": of_vocabulary, "logits": of_vocabulary, "parents": of_beams}
        repeated = prompt.repeated(self.num_beams)
        return BeamState(
            # Only the first beam counts at first: the others would choose the same tokens again.
            running=replace(beams, scores=beams.scores.at[:, 1:].set(NEVER)),
            finished=replace(beams, scores=beams.scores + NEVER, finished=beams.finished | unused[:, None]),
            cur_len=prompt.length,
            prompt_length=prompt.length,
            rows=prompt.rows,
            tokens=jnp.repeat(prompt.input_ids[:, -1], self.num_beams),
            parents=jnp.zeros((len(prompt.input_ids), self.num_beams), jnp.int32),
            improvable=~unused,
            ended=jnp.bool_(False),
            invalid=jnp.zeros(rows, bool),
            keys=None if self.key is None else row_keys(self.key, rows, 1),
            processors=tuple(processor.init(repeated, vocab_size) for processor in self.processors),
            recorded=step_buffers(self.outputs, slots - columns, shapes),
        )

    def step(self, logits: jax.Array, scores: jax.Array, internals: Internals, state: BeamState) -> BeamState:
        sequences = state.running.sequences.reshape(len(scores), -1)
        scores, states = process(self.processors, sequences, scores, state.cur_len, state.processors)

        candidates, sources, invalid = self._candidates(scores, state)
        criteria = self.eos, self.max_length, *self.stopping_criteria
        flat = candidates.sequences.reshape(-1, candidates.sequences.shape[2])
        hits = any_of(criteria, flat, scores, state.cur_len + 1).reshape(candidates.scores.shape)

        alive = candidates.scores + jnp.where(hits, NEVER, 0)
        _, best = lax.top_k(alive, self.num_beams)
        running = replace(candidates, scores=alive).take(best)
        parents = take(sources, best)
        finished = self._finish(replace(candidates, finished=hits), state)
        improvable = state.improvable & self._improvable(running, finished, state)

        unused = (jnp.arange(len(hits)) >= state.rows)[:, None]
        full = (finished.finished | unused).all() & self.stop_when_full
        tokens = lax.dynamic_index_in_dim(running.sequences, state.cur_len, axis=2, keepdims=False).reshape(-1)
        rows = (jnp.arange(len(parents))[:, None] * self.num_beams + parents).reshape(-1)
        values = {"scores": scores, "logits": logits, "parents": parents}
        return BeamState(
            running=running,
            finished=finished,
            cur_len=state.cur_len + 1,
            prompt_length=state.prompt_length,
            rows=state.rows,
            tokens=tokens,
            parents=parents,
            improvable=improvable,
            ended=~improvable.any() | full | (hits | unused).all(),
            invalid=state.invalid | (invalid & state.improvable),
            keys=state.keys,
            processors=reorder(self.processors, states, rows),
            recorded=write_step(state.recorded, values, state.cur_len - state.prompt_length),
        )

    def _candidates(self, scores: jax.Array, state: BeamState) -> tuple[Beams, jax.Array, jax.Array]:
        """W continuations of each prompt, the best first.

        Returns:
            The continuations, int32 [B, W] the running beams they continue, and bool [B] prompts with invalid scores.
        """
        running = state.running
        vocab_size = scores.shape[1]
        step = state.cur_len - state.prompt_length
        totals = scores.reshape(*running.scores.shape, vocab_size) + running.scores[:, :, None]
        totals = totals.reshape(len(running.scores), -1)
        if state.keys is None:
            values, places, invalid = highest_few(totals, self.num_candidates)
        else:
            noise = gumbel(state.keys, step, jnp.broadcast_to(jnp.arange(totals.shape[1]), totals.shape))
            _, places, invalid = highest_few(totals + noise, self.num_candidates)
            drawn = jnp.take_along_axis(totals, places, axis=1)
            values, order = lax.top_k(drawn, self.num_candidates)
            places = jnp.take_along_axis(places, order, axis=1)
        sources, tokens = places // vocab_size, places % vocab_size
        rows = jnp.arange(len(sources))[:, None] * self.num_beams + sources
        return running.extend(sources, tokens, values, rows, state.cur_len, step), sources, invalid

    def _finish(self, candidates: Beams, state: BeamState) -> Beams:
        """The best of the finished beams and of the candidates that are finished; only the first b may be."""
        new_tokens = (state.cur_len + 1 - state.prompt_length).astype(jnp.float32)
        just_finished = candidates.finished & (jnp.arange(self.num_candidates) < self.num_beams)[None]
        full = state.finished.finished.all(axis=1, keepdims=True) & self.stop_when_full
        scores = candidates.scores / new_tokens**self.length_penalty
        # One after the other, as transformers adds them: what stays unfinished is ranked by these sums.
        scores = scores + jnp.where(full, NEVER, 0)
        scores = scores + jnp.where(state.improvable[:, None], 0, NEVER)
        scores = scores + jnp.where(just_finished, 0, NEVER)
        return state.finished.beside(replace(candidates, scores=scores, finished=just_finished)).best(self.num_beams)

    def _improvable(self, running: Beams, finished: Beams, state: BeamState) -> jax.Array:
        """bool [B]: whether the best running beam may still beat the worst finished one, or there are not b of them."""
        columns = jnp.where(self.assume_longest, self.longest, state.cur_len + 1)
        new_tokens = (columns - state.prompt_length).astype(jnp.float32)
        best = running.scores[:, :1] / new_tokens**self.length_penalty
        worst = jnp.where(finished.finished, finished.scores.min(axis=1, keepdims=True), NEVER)
        return (best > worst).any(axis=1)

    def parents(self, state: BeamState) -> jax.Array:
        return state.parents

    def unfinished(self, state: BeamState) -> jax.Array:
        return ~state.ended

    def finalize(self, state: BeamState) -> Mapping[str, jax.Array]:
        """See `base.Strategy.finalize`; of all b beams of each prompt, the best first, and what is recorded.

        `sequences` is [B, b, S], `sequences_scores` [B, b] and `beam_indices` [B, b, S - P].
        """
        return {
            "sequences": state.finished.sequences,
            "length": state.cur_len,
            "invalid": state.invalid,
            "sequences_scores": state.finished.scores,
            "beam_indices": state.finished.beam_indices,
            **state.recorded,
        }

"""Beam search and beam sampling: same as transformers 5.24 `GenerationMixin._beam_search`, with the same state.

Every prompt has C running beams, which grow, and C finished beams, until better ones replace them. The prompt's forward
pass runs once for all its beams. Each later one takes C columns per prompt; see `kv_cache.BranchedCache`.

One step of one prompt, with C = 2 beams and W = 4 candidates:

```
running beams        scores of all continuations      the W best candidates      with eos     without eos
"the cat"  -1.0      [C * V], summed with the beam    "the cat sat"     -1.5                  running 0
"a dog"    -1.2      they continue                    "a dog."          -1.7     finished
                                                      "a dog ran"       -1.9                  running 1
                                                      "the cat."        -2.0     dropped: not among the first C
```

A finished candidate is ranked with the finished beams, and the best C are kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jax import lax

from jaxgen.base import (
    EosCriterion,
    Intermediates,
    LengthCriterion,
    LogitsProcessor,
    Prompt,
    StoppingCriterion,
    Strategy,
    step_buffers,
    write_step,
)
from jaxgen.decoding.beams import NEVER, Beams, take
from jaxgen.decoding.gumbel import gumbel, row_keys
from jaxgen.processors.logits_process import process, reorder
from jaxgen.processors.stopping_criteria import any_of
from jaxgen.processors.top_k import blocked_top_k
from jaxgen.pytree import Bool, Float32, Int32, pytree


@pytree
@dataclass(frozen=True)
class BeamState:
    """The state of a beam search.

    Attributes:
        running: the C unfinished beams, best first.
        finished: the best C finished beams so far, filled up with placeholders whose `finished` is False.
        cur_len: int32 []. Valid columns of the running beams.
        prompt_length: int32 []. Columns of the caller's prompt.
        rows: int32 []. Rows of the caller's prompt.
        tokens: int32 [B * C]. The last column of the running beams.
        parents: int32 [B, C]. The previous running beam that each running beam continues.
        improvable: bool [B]. Whether a running beam may still beat a finished one. Once False, it stays False.
        ended: bool []. Whether no prompt needs another token.
        invalid: bool [B]. Prompts whose scores held a NaN, an infinity, or no finite number.
        keys: uint32 [B, 2], or None without sampling.
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
    processors: tuple[object, ...]
    recorded: dict[str, jax.Array]


@pytree
@dataclass(frozen=True)
class BeamSearch(Strategy[BeamState]):
    """Keeps the C most likely continuations of each prompt, or samples them if there is a `key`.

    Attributes:
        eos, max_length: finish a beam; see `EosToken` and `MaxLength`.
        fill: int32 []. The token after the end of a beam.
        length_penalty: float32 []. A finished beam's score is divided by its number of tokens to this power.
        stop_when_full: bool []. `early_stopping=True`: a prompt is done as soon as it has C finished beams.
        assume_longest: bool []. `early_stopping="never"` with a positive penalty: a running beam is compared by its
            score at the length `longest`, not at its present length.
        longest: int32 []. The maximum columns of a beam.
        key: None, or as `Sample.key`.
        processors: applied to log-probabilities in this order; see `logits_process`.
        stopping_criteria: the caller's own, called with all candidates as (input_ids [B * W, S], scores [B * C, V],
            cur_len).
        num_beams: C, static.
        num_candidates: W, static: the candidates of a prompt, which finish or keep running.
        outputs: the arrays to record at every step, static: "scores", "logits", "parents".
        vocab_shards: static. The number of devices that the vocabulary is sharded over; see `blocked_top_k`.
    """

    eos: EosCriterion
    max_length: LengthCriterion
    fill: Int32
    length_penalty: Float32
    stop_when_full: Bool
    assume_longest: Bool
    longest: Int32
    key: jax.Array | None = None
    processors: tuple[LogitsProcessor, ...] = ()
    stopping_criteria: tuple[StoppingCriterion, ...] = ()
    num_beams: int = field(default=2, metadata={"static": True})
    num_candidates: int = field(default=4, metadata={"static": True})
    outputs: tuple[str, ...] = field(default=(), metadata={"static": True})
    vocab_shards: int = field(default=1, metadata={"static": True})

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
        per_token = jax.ShapeDtypeStruct((rows * self.num_beams, vocab_size), jnp.float32)
        per_beam = jax.ShapeDtypeStruct((rows, self.num_beams), jnp.int32)
        shapes = {"scores": per_token, "logits": per_token, "parents": per_beam}
        repeated = prompt.repeated(self.num_beams)
        return BeamState(
            # All beams start as copies of the prompt. Only the first one may win, or all would choose the same tokens.
            running=replace(beams, scores=beams.scores.at[:, 1:].set(NEVER)),
            # Placeholders, which any beam that finishes replaces. Rows of the bucket are full from the start.
            finished=replace(beams, scores=beams.scores + NEVER, finished=beams.finished | unused[:, None]),
            cur_len=prompt.length,
            prompt_length=prompt.length,
            rows=prompt.rows,
            tokens=jnp.repeat(prompt.input_ids[:, -1], self.num_beams),
            parents=jnp.zeros((len(prompt.input_ids), self.num_beams), jnp.int32),
            improvable=~unused,
            ended=jnp.bool_(False),
            invalid=jnp.zeros(rows, bool),
            # One key for each prompt, whose beams sample together from C * V continuations.
            keys=None if self.key is None else row_keys(self.key, rows, 1),
            processors=tuple(processor.init(repeated, vocab_size) for processor in self.processors),
            recorded=step_buffers(self.outputs, slots - columns, shapes),
        )

    def step(self, logits: jax.Array, scores: jax.Array, intermediates: Intermediates, state: BeamState) -> BeamState:
        sequences = state.running.sequences.reshape(len(scores), -1)  # [B, C, S] -> [B * C, S], as the scores
        scores, states = process(self.processors, sequences, scores, state.cur_len, state.processors)

        candidates, sources, invalid = self._candidates(scores, state)
        # At the length with the new token, though the scores are of the running beams, as in transformers.
        criteria = self.eos, self.max_length, *self.stopping_criteria
        # Criteria see the W candidates as rows, [B * W, S].
        flat = candidates.sequences.reshape(-1, candidates.sequences.shape[2])
        hits = any_of(criteria, flat, scores, state.cur_len + 1).reshape(candidates.scores.shape)

        # Candidates that keep running: the best C of the W, the finished ones last.
        running_scores = candidates.scores + jnp.where(hits, NEVER, 0)
        _, best = lax.top_k(running_scores, self.num_beams)
        running = replace(candidates, scores=running_scores).take(best)
        parents = take(sources, best)
        finished = self._finish(replace(candidates, finished=hits), state)
        improvable = state.improvable & self._improvable(running, finished, state)

        # The end is decided for all prompts of the caller together; padding rows of the bucket do not delay it.
        unused = (jnp.arange(len(hits)) >= state.rows)[:, None]
        full = (finished.finished | unused).all() & self.stop_when_full
        # The tokens just written: column `cur_len` of [B, C, S], as the next input [B * C].
        tokens = lax.dynamic_index_in_dim(running.sequences, state.cur_len, axis=2, keepdims=False).reshape(-1)
        # Beam c of prompt p is row p * C + c of the scores: parents [[1, 1], [0, 1]] are rows [1, 1, 2, 3].
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
            # As transformers' `_beam_search_has_unfinished_sequences`, for all prompts at once.
            ended=~improvable.any() | full | (hits | unused).all(),
            # Scores of a prompt that is done no longer affect its text.
            invalid=state.invalid | (invalid & state.improvable),
            keys=state.keys,
            processors=reorder(self.processors, states, rows),
            recorded=write_step(state.recorded, values, state.cur_len - state.prompt_length),
        )

    def _candidates(self, scores: jax.Array, state: BeamState) -> tuple[Beams, jax.Array, jax.Array]:
        """W continuations of each prompt, best first.

        Returns:
            The candidates, int32 [B, W] the running beams that they continue, and bool [B] prompts with invalid scores.
        """
        running = state.running
        vocab_size = scores.shape[1]
        step = state.cur_len - state.prompt_length
        # Of [B, C, V], index i of a row is token i % V after beam i // V.
        totals = scores.reshape(*running.scores.shape, vocab_size) + running.scores[:, :, None]
        prompts = jnp.arange(len(totals))[:, None]
        if state.keys is None:
            values, indices, invalid = blocked_top_k(totals, self.num_candidates, self.vocab_shards)
        else:
            # The key of a prompt and the index in [C * V] tell the continuations of different beams apart.
            numbers = jnp.broadcast_to(jnp.arange(totals[0].size).reshape(totals[0].shape), totals.shape)
            noise = gumbel(state.keys, step, numbers)
            _, indices, invalid = blocked_top_k(totals + noise, self.num_candidates, self.vocab_shards)
            # They come in the order of their noisy totals; transformers sorts its samples by score.
            sampled = totals[prompts, indices // vocab_size, indices % vocab_size]
            values, order = lax.top_k(sampled, self.num_candidates)
            indices = jnp.take_along_axis(indices, order, axis=1)
        sources, tokens = indices // vocab_size, indices % vocab_size
        rows = prompts * self.num_beams + sources
        return running.extend(sources, tokens, values, rows, state.cur_len, step), sources, invalid

    def _finish(self, candidates: Beams, state: BeamState) -> Beams:
        """The best C of the finished beams and the finished ones among the first C candidates."""
        new_tokens = (state.cur_len + 1 - state.prompt_length).astype(jnp.float32)
        just_finished = candidates.finished & (jnp.arange(self.num_candidates) < self.num_beams)[None]
        # With `early_stopping`, a prompt with C finished beams takes no more.
        full = state.finished.finished.all(axis=1, keepdims=True) & self.stop_when_full
        scores = candidates.scores / new_tokens**self.length_penalty
        # Three separate additions, as in transformers: these sums rank the placeholders.
        scores = scores + jnp.where(full, NEVER, 0)
        scores = scores + jnp.where(state.improvable[:, None], 0, NEVER)
        scores = scores + jnp.where(just_finished, 0, NEVER)
        return state.finished.beside(replace(candidates, scores=scores, finished=just_finished)).best(self.num_beams)

    def _improvable(self, running: Beams, finished: Beams, state: BeamState) -> jax.Array:
        """bool [B]: whether the best running beam may still beat a finished beam or replace a placeholder."""
        columns = jnp.where(self.assume_longest, self.longest, state.cur_len + 1)
        new_tokens = (columns - state.prompt_length).astype(jnp.float32)
        # Running beams are sorted, so the first is the best; while a placeholder is left, it only has to beat NEVER.
        best = running.scores[:, :1] / new_tokens**self.length_penalty
        worst = jnp.where(finished.finished, finished.scores.min(axis=1, keepdims=True), NEVER)
        return (best > worst).any(axis=1)

    def parents(self, state: BeamState) -> jax.Array:
        return state.parents

    def unfinished(self, state: BeamState) -> jax.Array:
        return ~state.ended

    def finalize(self, state: BeamState) -> Mapping[str, jax.Array]:
        """See `base.Strategy.finalize`. Returns all C beams of each prompt, best first, and the recorded arrays.

        `sequences` is [B, C, S], `sequences_scores` [B, C] and `beam_indices` [B, C, S - P].
        """
        return {
            "sequences": state.finished.sequences,
            "length": state.cur_len,
            "invalid": state.invalid,
            "sequences_scores": state.finished.scores,
            "beam_indices": state.finished.beam_indices,
            **state.recorded,
        }

"""Greedy search and sampling: same as transformers 5.24 `GenerationMixin._sample`.

Tokens are sampled by Gumbel-max: the highest score after adding noise has the same distribution as a sample from the
softmax. The noise of a token depends only on its row's key, the step and the token id. A row's sample is therefore
independent of the other rows, of padding, buckets and chunks, and of whether it is drawn from the whole vocabulary or
from the few candidates that sampling leaves.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

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
from jaxgen.decoding.gumbel import gumbel, row_keys
from jaxgen.processors.logits_process import TopK, TopP, Warper, process
from jaxgen.processors.stopping_criteria import any_of
from jaxgen.processors.top_k import blocked_argmax, blocked_top_k, to_blocks
from jaxgen.pytree import Int32, pytree

WINDOW = 64  # candidates of a sample; more than the usual top_k of 50


@pytree
@dataclass(frozen=True)
class SampleState:
    """The state of a decode with one sequence per row.

    Attributes:
        sequences: int32 [N, S]. Hugging Face's `input_ids`: the caller's prompt from column 0, then the new tokens.
        cur_len: int32 []. Valid columns of `sequences`.
        prompt_length: int32 []. Columns of the caller's prompt.
        tokens: int32 [N]. The last valid column.
        finished: bool [N]. Rows that need no more tokens; rows of the bucket are finished from the start.
        invalid: bool [N]. Rows whose scores held a NaN, an infinity, or no finite number before they were finished.
        keys: uint32 [N, 2], or None without sampling.
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
    processors: tuple[object, ...]
    recorded: dict[str, jax.Array]


@pytree
@dataclass(frozen=True)
class Sample(Strategy[SampleState]):
    """Chooses one token per row: the most likely one (of equals the first), or a sample if there is a `key`.

    Attributes:
        eos: finishes a row; see `EosToken`.
        max_length: finishes all rows; see `MaxLength`.
        pad_token_id: int32 []. The token of finished rows while other rows go on; None to go on in all rows.
        key: None for greedy search, or an int, or a `jax.random` key, or one of either per prompt. With a single key,
            prompt r has the key `fold_in(key, r)`. With a key for each prompt, a prompt has `fold_in(its key, 0)`.
            Sequence i of a prompt folds i into that.
        processors: applied in this order; see `logits_process`.
        stopping_criteria: the caller's own, called with (input_ids, scores, cur_len) after each token.
        num_return_sequences: static.
        outputs: the arrays to record at every step, static: "scores", "logits", "logprobs".
    """

    eos: EosCriterion
    max_length: LengthCriterion
    pad_token_id: Int32 | None
    key: jax.Array | None = None
    processors: tuple[LogitsProcessor, ...] = ()
    stopping_criteria: tuple[StoppingCriterion, ...] = ()
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
        per_token = jax.ShapeDtypeStruct((rows, vocab_size), jnp.float32)
        per_row = jax.ShapeDtypeStruct((rows,), jnp.float32)
        shapes = {"scores": per_token, "logits": per_token, "logprobs": per_row, "processed_logprobs": per_row}
        names = [*self.outputs, *(["processed_logprobs"] if "logprobs" in self.outputs else [])]
        return SampleState(
            sequences=prompt.left_aligned(slots, 0),
            cur_len=prompt.length,
            prompt_length=prompt.length,
            tokens=tokens,
            finished=jnp.arange(rows) >= prompt.rows,
            invalid=jnp.zeros(rows, bool),
            # Each sequence of a prompt has its own key.
            keys=None
            if self.key is None
            else row_keys(self.key, rows // self.num_return_sequences, self.num_return_sequences),
            processors=tuple(processor.init(prompt, vocab_size) for processor in self.processors),
            recorded=step_buffers(names, slots - columns, shapes),
        )

    def step(
        self, logits: jax.Array, scores: jax.Array, intermediates: Intermediates, state: SampleState
    ) -> SampleState:
        top_k, warpers = self._warpers_of_candidates()
        count = len(self.processors) - len(warpers) - (top_k is not None)  # of processors on the whole vocabulary
        states = state.processors
        scores, new_states = process(self.processors[:count], state.sequences, scores, state.cur_len, states[:count])
        tokens, log_p, invalid = self._choose(scores, top_k, warpers, state)
        if self.key is not None and top_k is None:
            invalid |= ~jnp.isfinite(to_blocks(logits).max(axis=(1, 2)))  # warpers may drop a NaN
        recorded = self._record(logits, scores, tokens, log_p, state)

        # After `_record`: the log-probabilities are of the chosen tokens, not of padding.
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
            processors=(*new_states, *states[count:]),  # warpers have no state
            recorded=recorded,
        )

    def _warpers_of_candidates(self) -> tuple[TopK | None, list[Warper]]:
        """The processors that may run on a few candidates: a TopK and all after it, if these are warpers too."""
        # Recorded scores are of the whole vocabulary.
        if self.key is not None and "scores" not in self.outputs:
            for index, processor in enumerate(self.processors):
                warpers = [each for each in self.processors[index + 1 :] if isinstance(each, Warper)]
                if isinstance(processor, TopK) and len(warpers) == len(self.processors) - index - 1:
                    return processor, warpers
        return None, []

    def _choose(
        self, scores: jax.Array, top_k: TopK | None, warpers: list[Warper], state: SampleState
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """int32 [N] tokens, float32 [N] log-probabilities of them (zeros unless recorded), bool [N] invalid rows."""

        def pick(scores: jax.Array, token_ids: jax.Array | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
            """From scores [N, V], or from scores [N, W] of these token ids."""
            noisy = scores
            if state.keys is not None:
                noisy_ids = (
                    jnp.broadcast_to(jnp.arange(scores.shape[1]), scores.shape) if token_ids is None else token_ids
                )
                noisy = scores + gumbel(state.keys, state.cur_len - state.prompt_length, noisy_ids)
            if token_ids is None:
                tokens = best = blocked_argmax(noisy)
            else:  # these come in any order, and of equal scores the lowest id wins, as in an argmax over [N, V]
                equal = noisy == noisy.max(axis=1, keepdims=True)
                best = jnp.argmin(jnp.where(equal, token_ids, jnp.iinfo(jnp.int32).max), axis=1)
                tokens = jnp.take_along_axis(token_ids, best[:, None], axis=1)[:, 0].astype(jnp.int32)
            chosen = jnp.take_along_axis(scores, best[:, None], axis=1)[:, 0]
            log_p = jnp.zeros_like(chosen)
            if "logprobs" in self.outputs:
                log_p = chosen - jax.nn.logsumexp(scores, axis=1)
            # An argmax takes NaN for the highest score, in torch and in JAX: the chosen score shows if there is one.
            return tokens, log_p, ~jnp.isfinite(chosen)

        if top_k is None:
            return pick(scores)

        def pick_from_all(scores: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            for warper in (top_k, *warpers):
                scores = warper.warp(scores)
            return pick(scores)

        candidates = _candidates(scores, top_k, warpers, state.finished)
        tokens, log_p, invalid = lax.cond(
            candidates.complete,
            lambda: pick(candidates.scores, candidates.token_ids),
            lambda: pick_from_all(scores),
        )
        return tokens, log_p, invalid | candidates.invalid

    def _record(
        self, logits: jax.Array, scores: jax.Array, tokens: jax.Array, log_p: jax.Array, state: SampleState
    ) -> dict[str, jax.Array]:
        """The buffers of recorded outputs with the values of this step."""
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
        token_ids: int32 [N, W].
        complete: bool []. Whether in every row all other tokens have probability 0.
        invalid: bool [N]. Rows with a NaN, an infinity or no finite score.
    """

    scores: jax.Array
    token_ids: jax.Array
    complete: jax.Array
    invalid: jax.Array


def _candidates(scores: jax.Array, top_k: TopK, warpers: list[Warper], finished: jax.Array) -> _Candidates:
    """Warps the W highest scores instead of all V, and says whether they were enough.

    They are enough if top_k is at most W and no token outside has the same score as the last one inside, or if all
    tokens outside together are too unlikely for top_p. Sorting a vocabulary of 128k takes XLA:CPU 190 ms at batch 8;
    finding its 64 highest scores takes 0.6 ms.

    ```
    scores, highest first   9 8 8 7 6 6 | 6 5 4 ...     W = 6, edge = 6
    top_k = 4                     ^ last = 7            complete: edge < last
    top_k = 5                       ^ last = 6          not complete: 6 is also outside, and TopK keeps equal scores
    ```
    """
    vocab_size = scores.shape[1]
    window = min(WINDOW, vocab_size)
    nucleus = TopP(jnp.float32(1))  # keeps all tokens
    if warpers and isinstance(first := warpers[0], TopP):
        nucleus, warpers = first, warpers[1:]
    top_p = nucleus.top_p
    limited = top_k.top_k <= window

    values, token_ids, invalid = blocked_top_k(scores, window)
    # The k-th highest score; only used if top_k is within the window.
    last = lax.dynamic_slice_in_dim(values, jnp.clip(top_k.top_k, 1, window) - 1, 1, axis=1)
    edge = values[:, -1:]

    def outside(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Whether no score outside equals the edge, and the logsumexp of the scores outside, each [N, 1]."""
        rest = jax.nn.logsumexp(jnp.where(scores < edge, scores, -jnp.inf), axis=1, keepdims=True)
        return (scores >= edge).sum(axis=1, keepdims=True) <= window, rest

    def nothing_outside(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The same where only top_k counts, without reading all scores."""
        separate = (edge < last) | (last == -jnp.inf) | (window == scores.shape[1])
        return separate, jnp.full_like(edge, -jnp.inf)

    separate, rest = lax.cond(limited | (top_p >= 1), nothing_outside, outside, scores)
    # Enough for top_k, or for top_p alone: it drops the tokens outside if together they have at most 1 - p.
    total = jnp.logaddexp(jax.nn.logsumexp(values, axis=1, keepdims=True), rest)
    enough = limited | ((top_k.top_k >= vocab_size) & (top_p < 1) & (jnp.exp(rest - total) <= 1 - top_p))
    # Finished and invalid rows take any token, so that they do not send the whole batch to the slow path.
    complete = (separate & enough)[:, 0] | finished | invalid

    if warpers:  # they break ties by the order of the token ids
        token_ids, values = lax.sort((token_ids, values), dimension=1, num_keys=1)
    values = jnp.where(limited & (values < last), -jnp.inf, values)
    values = nucleus.keep_nucleus(values, rest, token_ids)
    for warper in warpers:
        values = warper.warp(values)
    return _Candidates(values, token_ids, complete.all(), invalid)

"""Greedy search and sampling: same as transformers 5.24 `GenerationMixin._sample`.

A row's sample is independent of the other rows, of padding, buckets and chunks; see `choice`.
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
    write_step,
)
from jaxgen.decoding.choice import choose, output_buffers, split_warpers
from jaxgen.decoding.gumbel import row_keys
from jaxgen.processors.logits_process import process
from jaxgen.processors.stopping_criteria import any_of
from jaxgen.pytree import Int32, pytree


@pytree
@dataclass(frozen=True)
class SampleState:
    """The state of a decode with one sequence per row.

    Attributes:
        sequences: int32 [N, S]. Hugging Face's `input_ids`: the caller's prompt from column 0, then the new tokens.
        cur_len: int32 []. Valid columns of `sequences`.
        prompt_length: int32 []. Columns of the caller's prompt.
        tokens: int32 [N]. The last token of each row.
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
    """Chooses one token per row: a sample if there is a `key`, else the most likely one. Ties go to the lowest id.

    Attributes:
        eos: finishes a row; see `EosToken`.
        max_length: finishes all rows; see `MaxLength`.
        pad_token_id: int32 []. Fills finished rows while other rows continue; None if all rows continue.
        key: None for greedy search; an int, a `jax.random` key, or one of either per prompt. With a single key, prompt
            r has the key `fold_in(key, r)`. With a key per prompt, each prompt has `fold_in(its key, 0)`. Sequence i of
            a prompt folds i into its prompt's key.
        processors: applied in this order; see `logits_process`.
        stopping_criteria: the caller's own, called with (input_ids, scores, cur_len) after each token.
        num_return_sequences: static.
        outputs: the arrays to record at every step, static: "scores", "logits", "logprobs".
        vocab_shards: static. The number of devices that the vocabulary is sharded over; see `blocked_top_k`.
    """

    eos: EosCriterion
    max_length: LengthCriterion
    pad_token_id: Int32 | None
    key: jax.Array | None = None
    processors: tuple[LogitsProcessor, ...] = ()
    stopping_criteria: tuple[StoppingCriterion, ...] = ()
    num_return_sequences: int = field(default=1, metadata={"static": True})
    outputs: tuple[str, ...] = field(default=(), metadata={"static": True})
    vocab_shards: int = field(default=1, metadata={"static": True})

    @property
    def copies(self) -> int:
        return self.num_return_sequences

    def init(self, prompt: Prompt, slots: int, vocab_size: int) -> SampleState:
        """The state before the first token."""
        tokens = jnp.repeat(prompt.input_ids[:, -1], self.num_return_sequences)
        prompt = prompt.repeated(self.num_return_sequences)
        rows, columns = prompt.input_ids.shape
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
            recorded=output_buffers(self.outputs, rows, vocab_size, slots - columns),
        )

    def step(
        self, logits: jax.Array, scores: jax.Array, intermediates: Intermediates, state: SampleState
    ) -> SampleState:
        processors, warpers = split_warpers(self.processors, self.key is not None, self.outputs)
        states, count = state.processors, len(processors)
        scores, new_states = process(processors, state.sequences, scores, state.cur_len, states[:count])
        step, with_log_p = state.cur_len - state.prompt_length, "logprobs" in self.outputs
        tokens, log_p, invalid = choose(
            logits, scores, state.keys, step, state.finished, warpers, with_log_p, self.vocab_shards
        )
        recorded = self._record(logits, scores, tokens, log_p, state)

        # After `_record`, which needs the chosen tokens and not padding.
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
        """See `base.Strategy.finalize`. Recorded outputs are [steps, N, V], and [N, steps] for logprobs."""
        transposed = {name: buffer.T if buffer.ndim == 2 else buffer for name, buffer in state.recorded.items()}
        return {"sequences": state.sequences, "length": state.cur_len, "invalid": state.invalid, **transposed}

"""Contrastive search: the tokens of transformers 4.41 `GenerationMixin._contrastive_search`.

Each step has C candidates, the most likely next tokens. The winner is likely and also unlike the tokens so far, by the
cosine of their last hidden states (Su et al. 2022, arXiv 2202.06417). The model therefore runs on all candidates, as
branches of their row, before one of them is chosen and the others are dropped; see `kv_cache.BranchedCache`.

```
forward pass over      chooses                   and proposes
the prompt             -                         C candidates for the first token
these C candidates     the first token           C candidates for the second token
...
```
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
from jaxgen.processors.logits_process import process
from jaxgen.processors.stopping_criteria import any_of
from jaxgen.processors.top_k import blocked_top_k
from jaxgen.pytree import Float32, Int32, pytree


@pytree
@dataclass(frozen=True)
class ContrastiveState:
    """The token buffer, the candidates for its next column, and the hidden states that they are compared with.

    Attributes:
        sequences: int32 [N, S]. The caller's prompt from column 0, then the new tokens.
        cur_len: int32 []. Valid columns of `sequences`.
        prompt_length: int32 []. Columns of the caller's prompt.
        tokens: int32 [N * C]. The candidates, the next input of the model.
        probabilities: float32 [N, C]. The probabilities of the candidates.
        scores: float32 [N, V]. The scores that the candidates were taken from; None if no criterion needs them.
        chosen: int32 [N]. The index of the chosen candidate among those of the previous step.
        context: float32 [N, S, D]. The last hidden states of the columns of `sequences`, as unit vectors.
        compared: bool [N, S]. The columns to compare with. Padding and unwritten columns are left out.
        finished: bool [N]. Rows that need no more tokens; rows of the bucket are finished from the start.
        invalid: bool [N]. Rows whose scores held a NaN, an infinity, or no finite number before they were finished.
        processors: the states of the processors.
        recorded: the outputs asked for, in buffers with a leading axis of steps.
    """

    sequences: jax.Array
    cur_len: jax.Array
    prompt_length: jax.Array
    tokens: jax.Array
    probabilities: jax.Array
    scores: jax.Array | None
    chosen: jax.Array
    context: jax.Array
    compared: jax.Array
    finished: jax.Array
    invalid: jax.Array
    processors: tuple[object, ...]
    recorded: dict[str, jax.Array]


@pytree
@dataclass(frozen=True)
class ContrastiveSearch(Strategy[ContrastiveState]):
    """Chooses the best candidate by (1 - penalty_alpha) * probability - penalty_alpha * highest cosine.

    Attributes:
        eos, max_length, pad_token_id, processors, stopping_criteria: as in `Sample`.
        penalty_alpha: float32 [], in [0, 1].
        top_k: C, static: the candidates of a step.
        outputs: the arrays to record at every step, static: "scores", "logits", "chosen".
        vocab_shards: static. The number of devices that the vocabulary is sharded over; see `blocked_top_k`.
    """

    eos: EosCriterion
    max_length: LengthCriterion
    pad_token_id: Int32 | None
    penalty_alpha: Float32
    processors: tuple[LogitsProcessor, ...] = ()
    stopping_criteria: tuple[StoppingCriterion, ...] = ()
    top_k: int = field(default=4, metadata={"static": True})
    outputs: tuple[str, ...] = field(default=(), metadata={"static": True})
    vocab_shards: int = field(default=1, metadata={"static": True})

    @property
    def branches(self) -> int:
        return self.top_k

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hidden_states",)

    def cache_slots(self, columns: int, new_tokens: int) -> int:
        return columns + new_tokens + self.top_k - 1  # the last step writes C columns and keeps one

    def forward_passes(self, new_tokens: int) -> int:
        return new_tokens  # one more than usual: a token is chosen only after the model has run on it

    def start(
        self, prompt: Prompt, slots: int, logits: jax.Array, scores: jax.Array, intermediates: Intermediates
    ) -> ContrastiveState:
        rows, columns = prompt.input_ids.shape
        vocab_size = logits.shape[1]
        per_token = jax.ShapeDtypeStruct((rows, vocab_size), jnp.float32)
        per_row = jax.ShapeDtypeStruct((rows,), jnp.int32)
        shapes = {"scores": per_token, "logits": per_token, "chosen": per_row}

        state = ContrastiveState(
            sequences=prompt.left_aligned(slots, 0),
            cur_len=prompt.length,
            prompt_length=prompt.length,
            tokens=jnp.zeros(rows * self.top_k, jnp.int32),
            probabilities=jnp.zeros((rows, self.top_k), jnp.float32),
            scores=jnp.zeros((rows, vocab_size), jnp.float32) if self.stopping_criteria else None,
            chosen=jnp.zeros(rows, jnp.int32),  # nothing was chosen before the first candidates; not read
            context=prompt.moved_left(_unit(intermediates["hidden_states"][-1]), slots),
            compared=prompt.moved_left(prompt.attention_mask, slots),
            finished=jnp.arange(rows) >= prompt.rows,
            invalid=jnp.zeros(rows, bool),
            processors=tuple(processor.init(prompt, vocab_size) for processor in self.processors),
            # One more step than tokens: the last step proposes candidates that are not used.
            recorded=step_buffers(self.outputs, slots - columns + 1, shapes),
        )
        return self._propose(logits, scores, state)

    def step(
        self, logits: jax.Array, scores: jax.Array, intermediates: Intermediates, state: ContrastiveState
    ) -> ContrastiveState:
        rows = len(state.sequences)
        # [N, C, D] of the candidates and [N, S, D] of the text: unit vectors, so the products are cosines.
        hidden = _unit(intermediates["hidden_states"][-1])
        cosines = jnp.einsum("ncd,nsd->ncs", hidden, state.context)
        similarity = jnp.where(state.compared[:, None], cosines, -jnp.inf).max(axis=2)
        ranking = (1 - self.penalty_alpha) * state.probabilities - self.penalty_alpha * similarity
        # Where fewer than C tokens are allowed, the other candidates have probability 0. In transformers they may win.
        chosen = jnp.argmax(jnp.where(state.probabilities > 0, ranking, -jnp.inf), axis=1).astype(jnp.int32)

        candidates = state.tokens.reshape(rows, self.top_k)
        tokens = jnp.take_along_axis(candidates, chosen[:, None], axis=1)
        if self.pad_token_id is not None:
            tokens = jnp.where(state.finished[:, None], self.pad_token_id, tokens)
        write = lax.dynamic_update_slice_in_dim
        sequences = write(state.sequences, tokens, state.cur_len, axis=1)
        # Only the caller's criteria read the scores that the token was chosen from.
        token_scores = jnp.zeros((rows, 0), jnp.float32) if state.scores is None else state.scores
        criteria = self.eos, self.max_length, *self.stopping_criteria
        finished = state.finished | any_of(criteria, sequences, token_scores, state.cur_len + 1)
        chosen_hidden = jnp.take_along_axis(hidden, chosen[:, None, None], axis=1)
        following = replace(
            state,
            sequences=sequences,
            cur_len=state.cur_len + 1,
            chosen=chosen,
            context=write(state.context, chosen_hidden, state.cur_len, axis=1),
            compared=write(state.compared, jnp.ones((rows, 1), bool), state.cur_len, axis=1),
            finished=finished,
        )
        # [N * C, V] -> [N, V]: the next candidates come after the chosen one.
        logits, scores = (
            jnp.take_along_axis(array.reshape(rows, self.top_k, -1), chosen[:, None, None], axis=1)[:, 0]
            for array in (logits, scores)
        )
        return self._propose(logits, scores, following)

    def _propose(self, logits: jax.Array, scores: jax.Array, state: ContrastiveState) -> ContrastiveState:
        """The state with the C most likely next tokens, by the scores of the last column, float32 [N, V]."""
        scores, states = process(self.processors, state.sequences, scores, state.cur_len, state.processors)
        highest, tokens, invalid = blocked_top_k(scores, self.top_k, self.vocab_shards)
        values = {"scores": scores, "logits": logits, "chosen": state.chosen}
        return replace(
            state,
            tokens=tokens.astype(jnp.int32).reshape(-1),
            # Softmax over the whole vocabulary, so the probabilities of the candidates do not add up to 1.
            probabilities=jnp.exp(highest - jax.nn.logsumexp(scores, axis=1, keepdims=True)),
            scores=scores if self.stopping_criteria else None,
            invalid=state.invalid | (invalid & ~state.finished),
            processors=states,
            recorded=write_step(state.recorded, values, state.cur_len - state.prompt_length),
        )

    def chosen(self, state: ContrastiveState) -> jax.Array:
        return state.chosen

    def unfinished(self, state: ContrastiveState) -> jax.Array:
        return ~state.finished.all()

    def text(self, state: ContrastiveState) -> jax.Array:
        return state.sequences

    def finalize(self, state: ContrastiveState) -> Mapping[str, jax.Array]:
        """See `base.Strategy.finalize`. Recorded outputs are [steps, N, V].

        `chosen` is [steps, N]: the index of the candidate that a step chose before it proposed the next ones.
        """
        return {"sequences": state.sequences, "length": state.cur_len, "invalid": state.invalid, **state.recorded}


def _unit(vectors: jax.Array) -> jax.Array:
    """Vectors [..., D] normalised to length 1, in float32; zeros stay zeros."""
    wide = vectors.astype(jnp.float32)
    return wide * lax.rsqrt(jnp.maximum((wide * wide).sum(axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny))

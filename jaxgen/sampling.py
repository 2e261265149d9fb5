"""The one-beam strategy, greedy: same as transformers 5.23 `GenerationMixin._sample` with `do_sample=False`."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import register_dataclass

from jaxgen.base import Prompt
from jaxgen.stopping_criteria import EosToken, MaxLength


@register_dataclass
@dataclass(frozen=True)
class GreedyState:
    """The token buffer of a one-beam decode.

    Attributes:
        sequences: int32 [N, S]. Hugging Face's `input_ids`: the caller's prompt from column 0, then the new tokens.
        cur_len: int32 []. Valid columns of `sequences`.
        tokens: int32 [N]. The last valid column.
        finished: bool [N]. Rows that only receive padding from here on; the bucket's rows from the start.
        invalid: bool [N]. Rows that had a NaN among their scores before they were finished.
    """

    sequences: jax.Array
    cur_len: jax.Array
    tokens: jax.Array
    finished: jax.Array
    invalid: jax.Array


@register_dataclass
@dataclass(frozen=True)
class Greedy:
    """Chooses the likeliest token, the first of equals.

    Attributes:
        eos: when a row is finished.
        max_length: when all rows are.
        pad_token_id: int32 []. What finished rows receive while others go on.
    """

    eos: EosToken
    max_length: MaxLength
    pad_token_id: jax.Array

    def init(self, prompt: Prompt, slots: int) -> GreedyState:
        rows, columns = prompt.input_ids.shape
        left_aligned = jnp.roll(prompt.input_ids, prompt.length - columns, axis=1)
        return GreedyState(
            sequences=jnp.pad(left_aligned, ((0, 0), (0, slots - columns))),
            cur_len=prompt.length,
            tokens=prompt.input_ids[:, -1],
            finished=jnp.arange(rows) >= prompt.rows,
            invalid=jnp.zeros(rows, bool),
        )

    def step(self, logits: jax.Array, state: GreedyState) -> GreedyState:
        best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        # A NaN is the greatest, for torch too, so the winner tells whether there is one.
        is_nan = jnp.isnan(jnp.take_along_axis(logits, best[:, None], axis=-1)[:, 0])
        tokens = jnp.where(state.finished, self.pad_token_id, best)
        length = state.cur_len + 1
        return GreedyState(
            sequences=lax.dynamic_update_slice_in_dim(state.sequences, tokens[:, None], state.cur_len, axis=1),
            cur_len=length,
            tokens=tokens,
            finished=state.finished | self.eos(tokens, length) | self.max_length(tokens, length),
            invalid=state.invalid | (is_nan & ~state.finished),
        )

    def unfinished(self, state: GreedyState) -> jax.Array:
        return ~state.finished.all()

    def finalize(self, state: GreedyState) -> Mapping[str, jax.Array]:
        return {"sequences": state.sequences, "length": state.cur_len, "invalid": state.invalid}

"""Logits processors: rules that change the scores before a token is chosen.

Same results as the classes of transformers 5.24 `generation/logits_process.py`. The names are the same without the
suffixes. Numbers are leaves of pytrees, so a new penalty or threshold compiles nothing. Lists of token ids become masks
[V], so that lists of any length share a program. Warpers depend only on the scores and not on their tokens, so they can
also run on the few candidates of a sample; see `decoding.choice`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxgen.base import LogitsProcessor, Prompt
from jaxgen.buckets import bucket
from jaxgen.processors.top_k import blocked_top_k
from jaxgen.pytree import Bool, Float32, Int32, pytree


def token_mask(token_ids: Iterable[int], vocab_size: int) -> np.ndarray:
    """bool [V], True at the token ids. Ids outside the vocabulary are ignored."""
    mask = np.zeros(vocab_size, bool)
    mask[[token for token in token_ids if 0 <= token < vocab_size]] = True
    return mask


def process(
    processors: Sequence[LogitsProcessor],
    input_ids: jax.Array,
    scores: jax.Array,
    cur_len: jax.Array,
    states: Sequence[object],
) -> tuple[jax.Array, tuple[object, ...]]:
    """The scores after all processors, float32 [N, V], and the processors' next states; see `LogitsProcessor`."""
    new_states = []
    for processor, state in zip(processors, states, strict=True):
        scores, state = processor.step(input_ids, scores, cur_len, state)
        new_states.append(state)
    return scores, tuple(new_states)


def by_row(states: Sequence[object], rows: int) -> tuple[object, ...]:
    """The states from `init` by row, for `process_columns`: [N, 1, ...], or [N] for single numbers."""
    return tuple(
        jax.tree.map(lambda leaf: leaf[:, None] if leaf.ndim else jnp.broadcast_to(leaf, (rows,)), state)
        for state in states
    )


def process_columns(
    processors: Sequence[LogitsProcessor],
    input_ids: jax.Array,
    scores: jax.Array,
    cur_len: jax.Array,
    read: jax.Array,
    states: Sequence[object],
) -> tuple[jax.Array, tuple[object, ...]]:
    """The scores of T consecutive tokens of each row after all processors; see `LogitsProcessor.step_columns`.

    `states` have the layout of `by_row`.
    """
    stacked = []
    for processor, state in zip(processors, states, strict=True):
        scores, state = processor.step_columns(input_ids, scores, cur_len, read, state)
        stacked.append(state)
    return scores, tuple(stacked)


def reorder(processors: Sequence[LogitsProcessor], states: Sequence[object], rows: jax.Array) -> tuple[object, ...]:
    """The processors' states after row n continues row `rows[n]`; int32 [N]."""
    return tuple(processor.reorder(state, rows) for processor, state in zip(processors, states, strict=True))


@pytree
@dataclass(frozen=True)
class SequenceBias(LogitsProcessor):
    """Adds a bias to the token that would complete a sequence; -inf forbids it. `SequenceBiasLogitsProcessor`.

    The sequences (5,), (7, 8) and (1, 2, 3), in buckets of 4 sequences and 4 tokens:

    ```
    single[5] = bias        prefixes             last        a row that ends with  1 2
                            -1  -1  -1   7       8           gets the bias of the second sequence on token 3:
                            -1  -1   1   2       3           its last 4 tokens equal the prefix where it is not -1
                            -1  -1  -1  -1       V           V is outside of the vocabulary, so nothing is added
                            -1  -1  -1  -1       V
    ```

    Attributes:
        single: float32 [V]. The biases of sequences of one token.
        prefixes: int32 [sequences, tokens]. The longer sequences without their last tokens, right-aligned; -1 matches
            any token.
        last: int32 [sequences]. The last tokens of the longer sequences; V in unused rows.
        biases: float32 [sequences].
    """

    single: Float32
    prefixes: Int32
    last: Int32
    biases: Float32

    @classmethod
    def build(cls, sequences: Mapping[tuple[int, ...], float], vocab_size: int) -> Self:
        """Builds it from {token ids: bias}. Array sizes are rounded up, so that other sequences share the program."""
        single = np.zeros(vocab_size, np.float32)
        for sequence, bias in sequences.items():
            if len(sequence) == 1:
                single[sequence[0]] = bias
        longer = {sequence: bias for sequence, bias in sequences.items() if len(sequence) > 1}
        count = bucket(len(longer)) if longer else 0
        columns = bucket(max(map(len, longer), default=1))
        prefixes = np.full((count, columns), -1, np.int32)
        last = np.full(count, vocab_size, np.int32)
        biases = np.zeros(count, np.float32)
        for row, (sequence, bias) in enumerate(longer.items()):
            # Right-aligned: its last token but one is in the last column.
            prefixes[row, columns + 1 - len(sequence) :] = sequence[:-1]
            last[row], biases[row] = sequence[-1], bias
        return cls(single, prefixes, last, biases)

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
        bias = jnp.broadcast_to(self.single, scores.shape)
        if len(self.last):
            # The last columns of the row, as many as a prefix has. Before column 0 there is -2, which only -1 matches.
            columns = cur_len - self.prefixes.shape[1] + jnp.arange(self.prefixes.shape[1])
            recent = jnp.where(columns[None] >= 0, jnp.take(input_ids, columns, axis=1, mode="clip"), -2)
            # [N, 1, tokens] against [1, sequences, tokens].
            prefixes = self.prefixes[None]
            matches = ((prefixes == -1) | (recent[:, None] == prefixes)).all(axis=-1)
            bias = bias.at[:, self.last].add(jnp.where(matches, self.biases[None], 0), mode="drop")
        return scores + bias


@pytree
@dataclass(frozen=True)
class RepetitionPenalty(LogitsProcessor[jax.Array]):
    """Penalises tokens that are already in the row. `RepetitionPenaltyLogitsProcessor`.

    The state is a mask [N, V] of each row's tokens, because reading all columns again would cost more with each step.
    Padding before the prompt does not count. Masked columns after its first token do, as in transformers.

    Attributes:
        penalty: float32 []. Above 1 discourages.
    """

    penalty: Float32

    def init(self, prompt: Prompt, vocab_size: int) -> jax.Array:
        columns = prompt.input_ids.shape[1]
        mask = prompt.attention_mask
        # The first attended column of each row; in a row without one, the first column of the caller's prompt.
        first = jnp.where(mask.any(axis=1), jnp.argmax(mask, axis=1), columns - prompt.length)
        return _seen(prompt, first[:, None], vocab_size)

    def step(
        self, input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array, state: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        # A prompt of embeddings alone has no tokens, so `cur_len` is 0 in the first step and nothing is marked.
        last = jnp.where(cur_len > 0, input_ids[:, cur_len - 1], scores.shape[1])
        # The rows of a step differ from the last step's in one token only.
        state = state.at[jnp.arange(len(scores)), last].set(True, mode="drop")
        return _penalise(scores, state, self.penalty), state


@pytree
@dataclass(frozen=True)
class EncoderRepetitionPenalty(LogitsProcessor[jax.Array]):
    """Makes tokens of the prompt more likely. `EncoderRepetitionPenaltyLogitsProcessor`; padding counts too.

    Attributes:
        penalty: float32 []. Above 1 encourages.
    """

    penalty: Float32

    def init(self, prompt: Prompt, vocab_size: int) -> jax.Array:
        if prompt.encoder_input_ids is not None:
            return _occurring(prompt.encoder_input_ids, prompt.encoder_input_ids >= 0, vocab_size)
        return _seen(prompt, prompt.input_ids.shape[1] - prompt.length, vocab_size)

    def step(
        self, input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array, state: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        return _penalise(scores, state, 1 / self.penalty), state


def _seen(prompt: Prompt, first: jax.Array, vocab_size: int) -> jax.Array:
    """bool [N, V]: the tokens of each prompt from column `first` ([N, 1] or []) on."""
    return _occurring(prompt.input_ids, jnp.arange(prompt.input_ids.shape[1])[None] >= first, vocab_size)


def _occurring(ids: jax.Array, counted: jax.Array, vocab_size: int) -> jax.Array:
    """bool [N, V]: the tokens of each row of ids, int32 [N, columns], where bool [N, columns] `counted` is True."""
    # Other columns become token V, which the scatter drops.
    ids = jnp.where(counted, ids, vocab_size)
    rows = len(ids)
    return jnp.zeros((rows, vocab_size), bool).at[jnp.arange(rows)[:, None], ids].set(True, mode="drop")


def _penalise(scores: jax.Array, mask: jax.Array, penalty: jax.Array) -> jax.Array:
    # Dividing a negative score would raise it.
    return jnp.where(mask, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


@pytree
@dataclass(frozen=True)
class NoRepeatNGram(LogitsProcessor):
    """Forbids n-grams that are already in the row, padding included. `NoRepeatNGramLogitsProcessor`.

    Attributes:
        size: n, static.
    """

    size: int = field(metadata={"static": True})

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
        return _forbid_ngrams(input_ids, scores, cur_len, self.size, input_ids, cur_len)


@pytree
@dataclass(frozen=True)
class EncoderNoRepeatNGram(LogitsProcessor[tuple[jax.Array | None, jax.Array]]):
    """Forbids n-grams that are in the prompt, padding included. `EncoderNoRepeatNGramLogitsProcessor`.

    Its state is the tokens of the source, or None, and the number of columns of the prompt.

    Attributes:
        size: n, static.
    """

    size: int = field(metadata={"static": True})

    def init(self, prompt: Prompt, vocab_size: int) -> tuple[jax.Array | None, jax.Array]:
        return prompt.encoder_input_ids, prompt.length

    def step(
        self,
        input_ids: jax.Array,
        scores: jax.Array,
        cur_len: jax.Array,
        state: tuple[jax.Array | None, jax.Array],
    ) -> tuple[jax.Array, tuple[jax.Array | None, jax.Array]]:
        source, length = state
        if source is None:
            return _forbid_ngrams(input_ids, scores, cur_len, self.size, input_ids, length), state
        columns = jnp.int32(source.shape[1])
        # A text shorter than n - 1 tokens, as the start token alone, has no n-gram to complete.
        forbidden = _forbid_ngrams(input_ids, scores, cur_len, self.size, source, columns)
        return jnp.where(cur_len >= self.size - 1, forbidden, scores), state


def _forbid_ngrams(
    input_ids: jax.Array,
    scores: jax.Array,
    cur_len: jax.Array,
    size: int,
    others: jax.Array,
    end: jax.Array,
) -> jax.Array:
    """Forbids tokens that would repeat an n-gram of `others`, int32 [N, columns], in the columns before `end`.

    Negative tokens are padding. With n = 3 and `others` the text itself, the row ends with b c, and an n-gram that
    starts so is in columns 1 to 3:

    ```
    column          0  1  2  3  4  5  6
    token           a  b  c  d  a  b  c      cur_len = 7
    rolled by 1     c  a  b  c  d  a  b      equal to the last token c in columns 0 and 3
    rolled by 2     b  c  a  b  c  d  a      equal to the one before, b, in columns 0 and 3
    completes       -  -  *  *  *  *  *      columns from n - 1 on; only 3 passes all tests, so d is forbidden
    ```
    """
    columns = jnp.arange(others.shape[1])
    completes = ((columns >= size - 1) & (columns < end))[None] & (others >= 0)
    for back in range(1, size):
        recent = lax.dynamic_slice_in_dim(input_ids, cur_len - back, 1, axis=1)
        completes &= jnp.roll(others, back, axis=1) == recent
    # All other columns become token V, which the scatter drops.
    forbidden = jnp.where(completes, others, scores.shape[1])
    return scores.at[jnp.arange(len(scores))[:, None], forbidden].set(-jnp.inf, mode="drop")


@pytree
@dataclass(frozen=True)
class MinLength(LogitsProcessor):
    """Forbids eos tokens before a length. `MinLengthLogitsProcessor`, `MinNewTokensLengthLogitsProcessor`.

    Attributes:
        min_length: int32 []. Columns, the prompt included.
        eos: bool [V].
    """

    min_length: Int32
    eos: Bool

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
        return jnp.where((self.eos & (cur_len < self.min_length))[None], -jnp.inf, scores)


@pytree
@dataclass(frozen=True)
class ForceTokensAt(LogitsProcessor):
    """Allows only some tokens at one length. `ForcedBOSTokenLogitsProcessor`, `ForcedEOSTokenLogitsProcessor`.

    Attributes:
        length: int32 []. Columns before the forced token, the prompt included.
        forced: bool [V].
    """

    length: Int32
    forced: Bool

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
        return jnp.where(cur_len == self.length, jnp.where(self.forced[None], 0.0, -jnp.inf), scores)


@pytree
@dataclass(frozen=True)
class InfNanRemove(LogitsProcessor):
    """NaN becomes 0, infinities the largest finite numbers. `InfNanRemoveLogitsProcessor`."""

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
        return jnp.nan_to_num(scores, nan=0.0)


@pytree
@dataclass(frozen=True)
class ExponentialDecayLengthPenalty(LogitsProcessor):
    """Makes eos tokens more likely with each token after a start. `ExponentialDecayLengthPenalty`.

    Attributes:
        start: int32 []. Columns up to which nothing changes, the prompt included.
        factor: float32 [].
        eos: bool [V].
    """

    start: Int32
    factor: Float32
    eos: Bool

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
        # Only finite scores: an eos that is forbidden, with a score of -inf, stays forbidden.
        late = jnp.maximum(cur_len - self.start, 0)
        raised = jnp.abs(scores) * (self.factor ** late.astype(jnp.float32) - 1)
        return jnp.where(self.eos[None] & (late > 0) & jnp.isfinite(scores), scores + raised, scores)


@pytree
@dataclass(frozen=True)
class SuppressTokens(LogitsProcessor):
    """Forbids tokens. `SuppressTokensLogitsProcessor`.

    Attributes:
        suppressed: bool [V].
    """

    suppressed: Bool

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
        return jnp.where(self.suppressed[None], -jnp.inf, scores)


@pytree
@dataclass(frozen=True)
class SuppressTokensAtBegin(LogitsProcessor):
    """Forbids tokens at one length, usually the prompt's. `SuppressTokensAtBeginLogitsProcessor`.

    Attributes:
        begin: int32 [].
        suppressed: bool [V].
    """

    begin: Int32
    suppressed: Bool

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
        return jnp.where(self.suppressed[None] & (cur_len == self.begin), -jnp.inf, scores)


@pytree
@dataclass(frozen=True)
class Temperature(LogitsProcessor):
    """Divides the scores. `TemperatureLogitsWarper`.

    Attributes:
        temperature: float32 []. Below 1 makes likely tokens more likely.
    """

    temperature: Float32

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
        return scores / self.temperature


class Warper(LogitsProcessor):
    """A processor that depends only on the scores, of the whole vocabulary or of the tokens that may still be sampled.

    Ties are broken by column, so candidates are sorted by token id. `min_tokens_to_keep` (static) is 1, or with beams
    one more than there are eos ids.
    """

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
        return self.warp(scores)

    def step_columns(
        self, input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array, read: jax.Array, state: tuple[()]
    ) -> tuple[jax.Array, tuple[()]]:
        """See `LogitsProcessor.step_columns`: all rows and tokens at once."""
        return self.warp(scores.reshape(-1, scores.shape[2])).reshape(scores.shape), state

    def warp(self, scores: jax.Array) -> jax.Array:
        """float32 [N, V] or [N, W] -> the same shape, with -inf for tokens that are removed."""
        raise NotImplementedError


@pytree
@dataclass(frozen=True)
class TopH(Warper):
    """Keeps the most likely tokens up to a share of their entropy (top-H decoding). `TopHLogitsWarper`.

    Attributes:
        top_h: float32 [], in (0, 1].
    """

    top_h: Float32

    def warp(self, scores: jax.Array) -> jax.Array:
        highest, columns = lax.top_k(scores, min(100, scores.shape[1]))  # 100 as in transformers
        log_p = jax.nn.log_softmax(highest)
        p = jnp.exp(log_p)
        # In the entropy torch replaces -inf by the lowest float. In the cumulative sum, terms of probability 0 are NaN,
        # and the comparison drops them.
        entropy = -jnp.sum(p * jnp.maximum(log_p, jnp.finfo(jnp.float32).min), axis=1, keepdims=True)
        kept = (jnp.cumsum(-p * log_p, axis=1) <= entropy * self.top_h) & (p > 0)
        kept = kept.at[:, 0].set(True)  # the most likely token
        values = jnp.where(kept, highest, -jnp.inf)
        return jnp.full_like(scores, -jnp.inf).at[jnp.arange(len(scores))[:, None], columns].set(values)


@pytree
@dataclass(frozen=True)
class TopK(Warper):
    """Keeps the k highest scores and all scores equal to the k-th. `TopKLogitsWarper`.

    Attributes:
        top_k: int32 []. From V on, all tokens are kept.
    """

    top_k: Int32

    def warp(self, scores: jax.Array) -> jax.Array:
        def keep_highest(scores: jax.Array) -> jax.Array:
            # The highest x that at least k scores reach: the k-th highest score.
            bits = _ordered_bits(scores)
            lowest = _bisect(lambda x: (bits >= x).sum(axis=1, keepdims=True) >= self.top_k, len(scores))
            return jnp.where(bits < lowest, -jnp.inf, scores)

        return lax.cond(self.top_k < scores.shape[1], keep_highest, lambda scores: scores, scores)


@pytree
@dataclass(frozen=True)
class TopP(Warper):
    """Keeps the most likely tokens that together reach a probability (nucleus sampling). `TopPLogitsWarper`.

    Attributes:
        top_p: float32 []. From 1 on, all tokens are kept.
    """

    top_p: Float32
    min_tokens_to_keep: int = field(default=1, metadata={"static": True})

    def warp(self, scores: jax.Array) -> jax.Array:
        return lax.cond(self.top_p < 1, self.keep_nucleus, lambda scores: scores, scores)

    def keep_nucleus(
        self, scores: jax.Array, rest: jax.Array | float = -jnp.inf, columns: jax.Array | None = None
    ) -> jax.Array:
        """As `warp`, also for candidates.

        As in transformers, probabilities are summed from the lowest up, and tokens with a sum over 1 - p are kept:

        ```
        probabilities   0.5  0.2  0.2  0.1        p = 0.6
        sums            1.0  0.3  0.5  0.1        over 0.4: the first and the third
        ```

        Of equal probabilities, the lower column is summed first, so the higher column is kept first.

        Args:
            scores: float32 [N, V], or [N, W] of candidates.
            rest: float32 [N, 1]. The logsumexp of the scores that are not candidates, all lower than theirs.
            columns: int32 [N, W]. The token ids of at most 128 candidates, in any order; None if they are sorted.
        """
        total = jnp.logaddexp(jax.nn.logsumexp(scores, axis=1, keepdims=True), rest)
        p, below = jnp.exp(scores - total), jnp.exp(rest - total)
        columns = jnp.arange(scores.shape[1])[None] if columns is None else columns
        if scores.shape[1] <= 128:
            mass = _cumulative_by_pairs(scores, columns, p, below)
        else:
            mass = _cumulative_at_border(scores, p, below, 1 - self.top_p)
        kept = mass > 1 - self.top_p
        if self.min_tokens_to_keep == 1:
            # If the highest score occurs several times, its last column: the sums above keep it first.
            last = jnp.max(jnp.where(scores == scores.max(axis=1, keepdims=True), columns, 0), axis=1, keepdims=True)
            kept |= columns == last
        else:
            kept |= scores >= _kth_highest(scores, self.min_tokens_to_keep)
        return jnp.where(kept, scores, -jnp.inf)


def _cumulative_by_pairs(scores: jax.Array, columns: jax.Array, p: jax.Array, below: jax.Array) -> jax.Array:
    """float [N, W]: the probability of each token and all lower ones, plus `below`, by comparing all pairs."""
    # [N, W, W], so only for a few candidates.
    this, other = scores[:, :, None], scores[:, None, :]
    lower = (other < this) | ((other == this) & (columns[:, None, :] <= columns[:, :, None]))
    return below + jnp.where(lower, p[:, None, :], 0).sum(axis=2)


def _cumulative_at_border(scores: jax.Array, p: jax.Array, below: jax.Array, limit: jax.Array) -> jax.Array:
    """As `_cumulative_by_pairs`, but exact only for tokens with the score at which the sum passes `limit`.

    It is enough to compare the result with `limit`: tokens with lower scores get 0, those with higher scores infinity.
    """
    bits = _ordered_bits(scores)

    def mass_below(x: jax.Array) -> jax.Array:
        return below + jnp.where(bits < x, p, 0).sum(axis=1, keepdims=True)

    # The lowest score with a sum over the limit; or the highest score, if rounding keeps all sums below the limit.
    border = jnp.minimum(_bisect(lambda x: mass_below(x) <= limit, len(scores)), bits.max(axis=1, keepdims=True))
    equal = bits == border
    # Of equal scores, each column adds its own probability to those before it.
    at_border = mass_below(border) + jnp.cumsum(equal, axis=1).astype(p.dtype) * p
    return jnp.where(equal, at_border, jnp.where(bits > border, jnp.inf, 0))


def _ordered_bits(scores: jax.Array) -> jax.Array:
    """uint32 that compare as the float32 scores do."""
    bits = lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.uint32)  # -0 equals 0
    # Bits of positive floats rise with the float, bits of negative floats fall: set the sign bit, or flip all bits.
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _bisect(holds: Callable[[jax.Array], jax.Array], rows: int) -> jax.Array:
    """uint32 [N, 1]: the highest number for which `holds` is True, if it is True for all lower numbers too.

    It decides bit by bit, from the highest down. These 32 passes over a vocabulary are 20 times faster than sorting it
    on XLA:CPU (8 x 128k), and compile faster.
    """

    def decide(bit: jax.Array, number: jax.Array) -> jax.Array:
        higher = number | jnp.uint32(1) << jnp.uint32(31 - bit)
        return jnp.where(holds(higher), higher, number)

    return lax.fori_loop(0, 32, decide, jnp.zeros((rows, 1), jnp.uint32))


@pytree
@dataclass(frozen=True)
class MinP(Warper):
    """Keeps tokens whose probability is at least a share of the highest probability. `MinPLogitsWarper`.

    Attributes:
        min_p: float32 [], in [0, 1].
    """

    min_p: Float32
    min_tokens_to_keep: int = field(default=1, metadata={"static": True})

    def warp(self, scores: jax.Array) -> jax.Array:
        p = jax.nn.softmax(scores)
        # The `min_tokens_to_keep` highest scores stay, whatever their probability.
        unlikely = p < self.min_p * p.max(axis=1, keepdims=True)
        return jnp.where(unlikely & (scores < _kth_highest(scores, self.min_tokens_to_keep)), -jnp.inf, scores)


@pytree
@dataclass(frozen=True)
class Typical(Warper):
    """Keeps the tokens whose -log p is closest to the entropy (typical sampling). `TypicalLogitsWarper`.

    Attributes:
        typical_p: float32 [], in (0, 1). The probability to reach.
    """

    typical_p: Float32
    min_tokens_to_keep: int = field(default=1, metadata={"static": True})

    def warp(self, scores: jax.Array) -> jax.Array:
        log_p = jax.nn.log_softmax(scores)
        p = jnp.exp(log_p)
        entropy = -jnp.nansum(log_p * p, axis=1, keepdims=True)
        distance = jnp.abs(-log_p - entropy)
        order = jnp.argsort(distance, axis=1)
        mass = jnp.cumsum(jnp.take_along_axis(p, order, axis=1), axis=1)
        # The index in `order` where the sum reaches `typical_p`; rounding may keep the whole sum below it.
        last = jnp.minimum((mass < self.typical_p).sum(axis=1, keepdims=True), scores.shape[1] - 1)
        farthest = jnp.take_along_axis(distance, jnp.take_along_axis(order, last, axis=1), axis=1)
        # `farthest` is the distance of the last token needed to reach `typical_p`. The closest tokens are always kept,
        # also where distances are infinite.
        closest = order[:, : self.min_tokens_to_keep]
        kept = (distance <= farthest).at[jnp.arange(len(scores))[:, None], closest].set(True)
        return jnp.where(kept, scores, -jnp.inf)


@pytree
@dataclass(frozen=True)
class Epsilon(Warper):
    """Keeps tokens with at least a given probability, and the most likely (epsilon sampling). `EpsilonLogitsWarper`.

    Attributes:
        epsilon: float32 [], in (0, 1).
    """

    epsilon: Float32
    min_tokens_to_keep: int = field(default=1, metadata={"static": True})

    def warp(self, scores: jax.Array) -> jax.Array:
        return _cut_below(scores, self.epsilon, self.min_tokens_to_keep)


@pytree
@dataclass(frozen=True)
class Eta(Warper):
    """Eta sampling: as `Epsilon`, but tokens may be less likely where the entropy is high.

    The least probability is min(epsilon, sqrt(epsilon) * exp(-entropy)). Same as transformers' `EtaLogitsWarper`.

    Attributes:
        epsilon: float32 [], in (0, 1).
    """

    epsilon: Float32
    min_tokens_to_keep: int = field(default=1, metadata={"static": True})

    def warp(self, scores: jax.Array) -> jax.Array:
        log_p = jax.nn.log_softmax(scores)
        # The lowest float in place of -inf, since 0 * -inf is NaN.
        entropy = -jnp.sum(jnp.exp(log_p) * jnp.maximum(log_p, jnp.finfo(jnp.float32).min), axis=1, keepdims=True)
        limit = jnp.minimum(self.epsilon, jnp.sqrt(self.epsilon) * jnp.exp(-entropy))
        return _cut_below(scores, limit, self.min_tokens_to_keep)


def _cut_below(scores: jax.Array, probability: jax.Array, count: int) -> jax.Array:
    """Removes tokens below a probability, except the `count` most likely ones."""
    cut = (jax.nn.softmax(scores) < probability) & (scores < _kth_highest(scores, count))
    return jnp.where(cut, -jnp.inf, scores)


def _kth_highest(scores: jax.Array, count: int) -> jax.Array:
    """float32 [N, 1]: the lowest of the `count` highest scores of each row."""
    if count == 1:
        return scores.max(axis=1, keepdims=True)
    return blocked_top_k(scores, min(count, scores.shape[1]))[0][:, -1:]


@pytree
@dataclass(frozen=True)
class LogitNormalization(Warper):
    """Makes the scores log-probabilities. `LogitNormalization`."""

    def warp(self, scores: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(scores)


@pytree
@dataclass(frozen=True)
class Custom(LogitsProcessor):
    """A caller's JAX function `(input_ids, scores, cur_len) -> scores`, compiled into the program.

    Attributes:
        function: a callable pytree: the caller's own, or a function in a `jax.tree_util.Partial`.
        kind: the class of `function`, static, so that two classes never share a program; see `pytree.pytree`.
    """

    function: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    kind: type = field(metadata={"static": True})

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
        return self.function(input_ids, scores, cur_len)

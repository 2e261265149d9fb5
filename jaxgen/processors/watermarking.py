"""Watermarks: biases of the scores that a detector with the same key can recognise in the text.

There are two schemes: green lists (Kirchenbauer et al. 2023, arXiv 2306.04634; transformers'
`WatermarkLogitsProcessor`) and SynthID-Text (Dathathri et al., Nature 2024; transformers'
`SynthIDTextWatermarkLogitsProcessor`). Both give the numbers of transformers 5.24 on CPU, so its detectors work on the
text. This needs torch's random generator, the Mersenne Twister MT19937, and 64-bit integers. JAX has 64-bit integers
only in x64 mode, so here they are pairs (high, low) of uint32 arrays.
"""

import dataclasses
import functools
import operator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxgen.base import LogitsProcessor, Prompt
from jaxgen.pytree import Bool, Float32, Int32, UInt32, pytree

Wide = tuple[jax.Array, jax.Array]  # high and low words of 64-bit integers

TABLE_SIZE = 1_000_003  # of selfhash's permutation, a prime
CANDIDATES = 40  # of selfhash, as in transformers
MULTIPLIER = 6364136223846793005  # of the linear congruential generator that SynthID-Text hashes with


@pytree
@dataclass(frozen=True)
class GreenlistWatermark(LogitsProcessor):
    """Adds a bias to a random part of the vocabulary. Same as transformers 5.24 `WatermarkLogitsProcessor`.

    The green tokens are the first `greenlist_size` tokens of a shuffled vocabulary. "lefthash" seeds the shuffle with
    the last token. "selfhash" shuffles once for each of the 40 best candidates, seeded with the candidate and the
    tokens before it. A candidate gets the bias if it is green in its own shuffle.

    Attributes:
        bias: float32 []. Added to the scores of green tokens.
        hashing_key: uint32 [].
        table: int32 [1000003]. The permutation that selfhash hashes tokens with; [0] for lefthash.
        greenlist_size: static.
        context_width: static. Shorter rows are not watermarked. With selfhash it is the number of tokens in a seed.
        selfhash: static. Whether the seeding is "selfhash" and not "lefthash".
    """

    bias: Float32
    hashing_key: UInt32
    table: Int32
    greenlist_size: int = dataclasses.field(metadata={"static": True})
    context_width: int = dataclasses.field(metadata={"static": True})
    selfhash: bool = dataclasses.field(metadata={"static": True})

    @classmethod
    def from_config(cls, config: Any, vocab_size: int) -> "GreenlistWatermark":
        """The watermark of a `transformers.WatermarkingConfig`."""
        key, ratio = operator.index(config.hashing_key), config.greenlist_ratio
        selfhash = config.seeding_scheme == "selfhash"
        if not selfhash and config.seeding_scheme != "lefthash":
            raise ValueError(f"seeding_scheme must be 'lefthash' or 'selfhash', not {config.seeding_scheme!r}")
        if not 0 < ratio < 1:
            raise ValueError(f"greenlist_ratio must lie strictly between 0 and 1, not {ratio}")
        if not 0 <= key < 2**32:
            raise ValueError(f"hashing_key must lie between 0 and 2**32 - 1, not {key}")
        if config.context_width < 1:
            raise ValueError(f"context_width must be at least 1, not {config.context_width}")
        if selfhash and vocab_size < CANDIDATES:
            raise ValueError(
                f"seeding_scheme 'selfhash' needs the {CANDIDATES} best tokens, but the vocabulary has {vocab_size}: "
                "use 'lefthash'"
            )
        return cls(
            bias=jnp.float32(config.bias),
            hashing_key=jnp.uint32(key),
            table=jnp.asarray(_shuffled_table(key) if selfhash else np.zeros(0, np.int32)),
            greenlist_size=int(vocab_size * ratio),
            context_width=config.context_width,
            selfhash=selfhash,
        )

    def __call__(self, input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
        """See `LogitsProcessor.__call__`."""
        if not self.greenlist_size or self.context_width > input_ids.shape[1]:
            return scores
        green = (
            self._selfhash(input_ids, scores, cur_len) if self.selfhash else self._lefthash(input_ids, scores, cur_len)
        )
        return jnp.where(green & (cur_len >= self.context_width), scores + self.bias, scores)

    def _lefthash(self, input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
        last = lax.dynamic_index_in_dim(input_ids, cur_len - 1, axis=1, keepdims=False)
        # The generator takes the low 32 bits of a seed, so the product may overflow.
        words = _mersenne_twister(self.hashing_key * last.astype(jnp.uint32), self.greenlist_size)
        return _first_of_shuffle(words, scores.shape[1])

    def _selfhash(self, input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
        rows, vocab_size = scores.shape
        _, candidates = lax.top_k(scores, CANDIDATES)
        before = self.context_width - 1
        context = lax.dynamic_slice_in_dim(input_ids, cur_len - before, before, axis=1)
        context = jnp.broadcast_to(context[:, None], (rows, CANDIDATES, before))
        hashes = self._hash(jnp.concatenate([context, candidates[:, :, None]], axis=2))
        # The seed of a candidate: the minimum, over context and candidate, of hash * hash of the candidate * key.
        product = _multiply((jnp.uint32(0), hashes), (jnp.uint32(0), hashes[:, :, -1:]))
        seeds = _torch_seed(_minimum(_multiply(product, (jnp.uint32(0), self.hashing_key))))
        words = _mersenne_twister(seeds.reshape(-1), self.greenlist_size).reshape(-1, rows, CANDIDATES)

        def accepted(row: tuple[jax.Array, jax.Array]) -> jax.Array:
            row_words, row_candidates = row
            return _first_of_shuffle(row_words, vocab_size)[jnp.arange(CANDIDATES), row_candidates]

        # Row by row, since a row takes memory for 40 permutations of the vocabulary.
        green = lax.map(accepted, (words.swapaxes(0, 1), candidates))
        return jnp.zeros(scores.shape, bool).at[jnp.arange(rows)[:, None], candidates].set(green)

    def _hash(self, tokens: jax.Array) -> jax.Array:
        """uint32, at least 1, as in transformers."""
        return self.table[tokens % TABLE_SIZE].astype(jnp.uint32) + 1


@pytree
@dataclass(frozen=True)
class SynthIDState:
    """The state of `SynthIDWatermark`.

    Attributes:
        context: int32 [N, ngram_len - 1]. The last tokens, zeros at first.
        history: uint32 [N, context_history_size] twice, high and low words. Hashes of the last contexts, newest first;
            zeros at first.
        calls: int32 []. Steps so far.
    """

    context: jax.Array
    history: Wide
    calls: jax.Array


@pytree
@dataclass(frozen=True)
class SynthIDWatermark(LogitsProcessor[SynthIDState]):
    """Runs a tournament among the tokens. Same as transformers 5.24 `SynthIDTextWatermarkLogitsProcessor`.

    At each depth, every token gets a bit from a hash of the last tokens, itself and the depth's key. Probability
    then moves from tokens with bit 0 to tokens with bit 1. A context that is in the history is not watermarked again.
    As in transformers, the prompt is not part of the context, and the state is not reordered with the beams.

    Attributes:
        keys: uint32 [depths]. The low words of the keys. The high words do not affect the bits that index the table.
        sampling_table: bool, with a power of two of entries.
        ngram_len: static. Number of tokens hashed together, including the candidate.
        context_history_size: static. Number of contexts in the history.
        skip_first_ngram_calls: static. Whether the first `ngram_len - 1` steps are not watermarked.
        debug_mode: static. Whether all scores are replaced by ones, to see the watermark alone.
    """

    keys: UInt32
    sampling_table: Bool
    ngram_len: int = dataclasses.field(metadata={"static": True})
    context_history_size: int = dataclasses.field(metadata={"static": True})
    skip_first_ngram_calls: bool = dataclasses.field(metadata={"static": True})
    debug_mode: bool = dataclasses.field(metadata={"static": True})

    @classmethod
    def from_config(cls, config: Any, vocab_size: int) -> "SynthIDWatermark":
        """The watermark of a `transformers.SynthIDTextWatermarkingConfig`."""
        del vocab_size
        size = config.sampling_table_size
        if not 1 <= size <= 2**24 or size & (size - 1):
            raise ValueError(
                f"sampling_table_size must be a power of two up to 2**24, not {size}; use 65536, which is the default"
            )
        keys = np.asarray(config.keys, np.int64)
        return cls(
            keys=jnp.asarray(keys.astype(np.uint32)),
            sampling_table=jnp.asarray(_torch_words(config.sampling_table_seed, size) % 2 == 1),
            ngram_len=config.ngram_len,
            context_history_size=config.context_history_size,
            skip_first_ngram_calls=bool(config.skip_first_ngram_calls),
            debug_mode=bool(config.debug_mode),
        )

    def init(self, prompt: Prompt, vocab_size: int) -> SynthIDState:
        rows = len(prompt.input_ids)
        hashes = jnp.zeros((rows, self.context_history_size), jnp.uint32)
        return SynthIDState(jnp.zeros((rows, self.ngram_len - 1), jnp.int32), (hashes, hashes), jnp.int32(0))

    def step(
        self, input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array, state: SynthIDState
    ) -> tuple[jax.Array, SynthIDState]:
        """See `LogitsProcessor.step`."""
        last = lax.dynamic_slice_in_dim(input_ids, cur_len - 1, 1, axis=1)
        shifted = jnp.concatenate([state.context, last], axis=1)[:, 1:]
        # In the first step the last token belongs to the prompt, which is not part of the context.
        context = jnp.where(state.calls > 0, shifted, state.context)
        calls = state.calls + 1
        if self.debug_mode:
            scores = jnp.ones_like(scores)

        context_hash = self._context_hash(context)
        # [N, 1] against the history, [N, context_history_size].
        high, low = (word[:, None] for word in context_hash)
        repeated = ((state.history[0] == high) & (state.history[1] == low)).any(axis=1, keepdims=True)
        watermarked = jnp.where(repeated, scores, self._tournament(scores, context_hash[1]))
        history = (
            jnp.concatenate([high, state.history[0]], axis=1)[:, :-1],
            jnp.concatenate([low, state.history[1]], axis=1)[:, :-1],
        )
        if self.skip_first_ngram_calls:
            active = calls >= self.ngram_len
            watermarked = jnp.where(active, watermarked, scores)
            history = jax.tree.map(functools.partial(jnp.where, active), history, state.history)
        return watermarked, SynthIDState(context, history, calls)

    def reorder(self, state: SynthIDState, rows: jax.Array) -> SynthIDState:
        """The state unchanged, as in transformers."""
        del rows
        return state

    def _context_hash(self, context: jax.Array) -> Wide:
        """uint32 [N] twice, high and low words: value = (value + token) * MULTIPLIER + 1 for each token."""
        # The hash of no tokens is 1, as in transformers.
        value = jnp.zeros(len(context), jnp.uint32), jnp.ones(len(context), jnp.uint32)
        multiplier = jnp.uint32(MULTIPLIER >> 32), jnp.uint32(MULTIPLIER & 0xFFFFFFFF)
        one = jnp.uint32(1)
        for column in context.astype(jnp.uint32).T:
            value = _add(_multiply(_add(value, column), multiplier), one)
        return value

    def _tournament(self, scores: jax.Array, context_hash: jax.Array) -> jax.Array:
        """float32 [N, V] log-probabilities, given the low words of the context's hash, uint32 [N]."""
        multiplier = jnp.uint32(MULTIPLIER & 0xFFFFFFFF)
        tokens = jnp.arange(scores.shape[1], dtype=jnp.uint32)[None]
        # Only low bits index the table, so the low words are enough.
        token_hash = (context_hash[:, None] + tokens) * multiplier + 1

        def play(probabilities: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
            index = ((token_hash + key) * multiplier + 1) % np.uint32(len(self.sampling_table))
            g = self.sampling_table[index].astype(jnp.float32)
            # Of the probability of tokens with bit 0, a share of `mass` moves to the tokens with bit 1.
            mass = (g * probabilities).sum(axis=1, keepdims=True)
            return probabilities * (1 + g - mass), None

        probabilities, _ = lax.scan(play, jax.nn.softmax(scores, axis=1), self.keys)
        logs = jnp.log(probabilities)
        return jnp.where(jnp.isfinite(logs), logs, jnp.finfo(logs.dtype).min)


def _first_of_shuffle(words: jax.Array, vocab_size: int) -> jax.Array:
    """The numbers in the first places of `torch.randperm(V)`, as a mask, without computing the permutation.

    Step i of the shuffle swaps place i with its target, a random place at or after i. From then on place i is final,
    and the number in it is green:

    ```
    V = 5, 3 steps, with targets 2, 4, 3
    0 1 2 3 4     start
    2 1 0 3 4     step 0 swaps places 0 and 2
    2 4 0 3 1     step 1 swaps places 1 and 4
    2 4 3 0 1     step 2 swaps places 2 and 3: the green numbers are 2, 4, 3. Number 0 moved 0 -> 2 -> 3
    ```

    The steps are sequential, but the mask can be computed from all targets at once:

    * If place n is the target of a step before n, that step moves number n to its own place: n is green.
    * Otherwise step n moves n to its target. If a later step has the same target, that step moves n to its own place: n
      is green. If not, n stays there until the step of that place moves it. Beyond the last step it stays there for
      good.

    So only the last step of each target passes its number on, which one scatter finds. These moves form chains, which
    are followed by doubling.

    Args:
        words: uint32 [steps, N] of the generator, with fewer steps than V.

    Returns:
        bool [N, V].
    """
    size, rows = words.shape
    steps = jnp.arange(size)[None]
    targets = steps + (words.T % (vocab_size - steps).astype(jnp.uint32)).astype(jnp.int32)
    # A step whose target is its own place makes the number there final and is not part of a chain.
    last_step = jnp.full((rows, vocab_size), -1).at[jnp.arange(rows)[:, None], targets]
    last_step = last_step.max(jnp.where(targets == steps, -1, steps), mode="promise_in_bounds")
    settled = vocab_size
    moves = jnp.where(_take(last_step, targets) == steps, targets, settled)

    def follow(moves: jax.Array) -> jax.Array:
        """Replaces each move to the place of a step by the move from that place, until none leads to such a place."""
        return jnp.where(moves < size, _take(moves, jnp.minimum(moves, size - 1)), moves)

    # Each round doubles the moves that are followed, so a chain of n steps takes log2(n) rounds.
    moves = lax.while_loop(lambda moves: (moves < size).any(), follow, moves)
    targeted = last_step >= 0
    return jnp.concatenate([targeted[:, :size] | (moves == settled), targeted[:, size:]], axis=1)


def _take(array: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(array, index, axis=1, mode="promise_in_bounds")


def _mersenne_twister(seeds: jax.Array, count: int) -> jax.Array:
    """uint32 [count, N]: the first outputs of MT19937 for uint32 [N] seeds."""

    def initialize(word: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        word = np.uint32(1812433253) * (word ^ (word >> 30)) + index
        return word, word

    def twist(window: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        # A word depends on the words 624, 623 and 227 before it, so blocks of 227 words are computed at once.
        mixed = (window[:227] & np.uint32(0x80000000)) | (window[1:228] & np.uint32(0x7FFFFFFF))
        new = window[397:] ^ (mixed >> 1) ^ ((mixed & 1) * np.uint32(0x9908B0DF))
        return jnp.concatenate([window[227:], new]), new

    _, words = lax.scan(initialize, seeds, jnp.arange(1, 624, dtype=jnp.uint32))
    _, words = lax.scan(twist, jnp.concatenate([seeds[None], words]), length=-(-count // 227))
    words = words.reshape(-1, len(seeds))[:count]
    # Tempering, the last part of MT19937.
    words ^= words >> 11
    words ^= (words << 7) & np.uint32(0x9D2C5680)
    words ^= (words << 15) & np.uint32(0xEFC60000)
    return words ^ (words >> 18)


def _add(a: Wide, b: jax.Array) -> Wide:
    """The sum modulo 2**64; uint32 `b`."""
    low = a[1] + b  # less than `b` if it overflowed
    return a[0] + (low < b).astype(jnp.uint32), low


def _multiply(a: Wide, b: Wide) -> Wide:
    """The product modulo 2**64."""
    (a_high, a_low), (b_high, b_low) = a, b
    half = np.uint32(0xFFFF)
    # The high word of a_low * b_low, from four products of 16 by 16 bits. Each fits 32 bits with its carry.
    first = (a_low >> 16) * (b_low & half) + ((a_low & half) * (b_low & half) >> 16)
    second = (a_low & half) * (b_low >> 16) + (first & half)
    carried = (a_low >> 16) * (b_low >> 16) + (first >> 16) + (second >> 16)
    return carried + a_high * b_low + a_low * b_high, a_low * b_low


def _minimum(value: Wide) -> Wide:
    """The minimum over the last axis, as signed 64-bit numbers."""
    # The high words decide, with their sign; the low words, without sign, only among equal high words.
    high = lax.bitcast_convert_type(value[0], jnp.int32)
    least = high.min(axis=-1, keepdims=True)
    low = jnp.where(high == least, value[1], np.uint32(0xFFFFFFFF)).min(axis=-1)
    return lax.bitcast_convert_type(least[..., 0], jnp.uint32), low


def _torch_seed(value: Wide) -> jax.Array:
    """The low word of a torch seed: the number modulo 2**64 - 1, so that a negative one is 1 lower than its bits."""
    return value[1] - (value[0] >> 31)


def _torch_words(seed: int, count: int) -> np.ndarray:
    """uint32 [count]: the first outputs of torch's CPU generator, the same as of NumPy's `RandomState`."""
    return np.random.RandomState(seed & 0xFFFFFFFF).randint(2**32, size=count, dtype=np.uint32)


@functools.cache
def _shuffled_table(key: int) -> np.ndarray:
    """int32 [1000003]: `torch.randperm` with this seed."""
    steps = np.arange(TABLE_SIZE - 1)
    targets = steps + _torch_words(key, TABLE_SIZE - 1) % (TABLE_SIZE - steps)
    table = list(range(TABLE_SIZE))
    for step, target in enumerate(targets.tolist()):
        table[step], table[target] = table[target], table[step]
    return np.array(table, np.int32)

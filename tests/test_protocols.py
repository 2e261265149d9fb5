"""A model and a cache of another kind need no more than the Protocols of `base.py`: here a recurrent network."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from transformers import GenerationConfig

import jaxgen
from jaxgen.base import Intermediates
from jaxgen.pytree import pytree

VOCAB, HIDDEN = 5, 7


@pytree
@dataclass(frozen=True)
class StateCache:
    """The state of each row, or of each of its branches, after the columns seen so far.

    Attributes:
        state: float32 [N, D], or [N, C, D] with branches.
        valid: bool [N, S], or [N, C, S]. Which columns were tokens.
        length: int32 []. Columns seen so far.
    """

    state: jax.Array
    valid: jax.Array
    length: jax.Array

    @property
    def branches(self) -> int:
        return self.state.shape[1] if self.state.ndim == 3 else 1

    @property
    def slots(self) -> int:
        return self.valid.shape[-1]

    @property
    def backend(self) -> None:
        return None

    def quantized(self, backend: str) -> "StateCache":
        raise ValueError(f"a state has no keys to hold in {backend}")

    @property
    def num_layers(self) -> int:
        return 0

    def layer(self, index: int) -> tuple[jax.Array, jax.Array]:
        raise IndexError(f"there is no layer {index} of keys and values")

    def with_layers(self, layers: tuple[tuple[jax.Array, jax.Array], ...]) -> "StateCache":
        del layers
        raise ValueError("a state is not made of keys and values")

    def grow(self, slots: int) -> "StateCache":
        return replace(self, valid=jnp.pad(self.valid, (*[(0, 0)] * (self.valid.ndim - 1), (0, slots - self.slots))))

    def grow_by_parts(self, slots: int, grow: Callable[["StateCache", int], "StateCache"]) -> "StateCache":
        return grow(self, slots)

    def skip(self, columns: jax.Array) -> "StateCache":
        del columns  # masked as they are, they change no state
        return self

    @property
    def memory(self) -> None:
        return None

    def reserve(self, slots: int) -> "StateCache":
        del slots
        return self

    def repeat(self, copies: int) -> "StateCache":
        return replace(self, state=jnp.repeat(self.state, copies, axis=0), valid=jnp.repeat(self.valid, copies, axis=0))

    def select(self, rows: jax.Array, slots: jax.Array, valid: jax.Array, length: jax.Array) -> "StateCache":
        raise ValueError("a state cannot be cut into columns")

    def branch(self, branches: int) -> "StateCache":
        state, valid = (jnp.repeat(array[:, None], branches, axis=1) for array in (self.state, self.valid))
        return replace(self, state=state, valid=valid)

    def reorder(self, parents: jax.Array) -> "StateCache":
        state, valid = (jax.vmap(lambda row, place: row[place])(x, parents) for x in (self.state, self.valid))
        return replace(self, state=state, valid=valid)

    def keep(self, chosen: jax.Array) -> "StateCache":
        return self.reorder(jnp.broadcast_to(chosen[:, None], self.state.shape[:2]))


@pytree
@dataclass(frozen=True)
class Recurrent:
    """A recurrent network: state = tanh(embedding[token] + mixing @ state), logits = head @ state."""

    embedding: jax.Array
    mixing: jax.Array
    head: jax.Array

    vocab_size, hidden_size, max_position_embeddings, mesh, cache_bytes_per_token = VOCAB, HIDDEN, 1000, None, 1
    is_encoder_decoder = has_position_table = False

    @property
    def generation_config(self) -> GenerationConfig:
        return GenerationConfig()

    @property
    def slots_per_block(self) -> int | None:
        return None

    def intermediates_bytes(self, name: str, columns: int, slots: int) -> int:
        del name, columns, slots
        return 0

    def first_layers(self, count: int) -> "Recurrent":
        raise ValueError(f"there is one layer, and not {count}")

    def make_cache(self, rows: int, slots: int) -> StateCache:
        return StateCache(jnp.zeros((rows, HIDDEN)), jnp.zeros((rows, slots), bool), jnp.int32(0))

    def extend(
        self,
        cache: StateCache,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        position_ids: jax.Array | None = None,
        intermediates: tuple[str, ...] = (),
    ) -> tuple[jax.Array, StateCache, Intermediates]:
        del position_ids, intermediates
        if cache.branches > 1:
            state = self._next(cache.state, input_ids)
            written = jnp.broadcast_to(attention_mask[:, :, None], (*input_ids.shape, 1))
        else:

            def column(state: jax.Array, given: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
                tokens, mask = given
                return jnp.where(mask[:, None], self._next(state, tokens), state), None

            state, _ = lax.scan(column, cache.state, (input_ids.T, attention_mask.T))
            written = attention_mask
        valid = lax.dynamic_update_slice_in_dim(cache.valid, written, cache.length, axis=-1)
        logits = state @ self.head.T
        return logits.reshape(-1, VOCAB), StateCache(state, valid, cache.length + written.shape[-1]), {}

    def _next(self, state: jax.Array, tokens: jax.Array) -> jax.Array:
        return jnp.tanh(self.embedding[tokens] + state @ self.mixing.T)

    def scores(self, tokens: list[int]) -> np.ndarray:
        """Of the token after each, float64 [L, V] logits: by NumPy, one token after the other."""
        embedding, mixing, head = (np.asarray(x, np.float64) for x in (self.embedding, self.mixing, self.head))
        state, logits = np.zeros(HIDDEN), []
        for token in tokens:
            state = np.tanh(embedding[token] + mixing @ state)
            logits.append(head @ state)
        return np.stack(logits)

    def log_probability(self, tokens: list[int], given: int) -> float:
        """Of all tokens after the first `given`."""
        logits = self.scores(tokens)[given - 1 : -1]
        chosen = logits[np.arange(len(logits)), tokens[given:]]
        return float((chosen - np.log(np.exp(logits).sum(axis=1))).sum())


def assert_greedy(model: Recurrent, tokens: list[int], given: int) -> None:
    """Every token after the first `given` is the likeliest."""
    assert tokens[given:] == model.scores(tokens)[given - 1 : -1].argmax(axis=1).tolist()


@pytest.fixture(scope="module")
def model() -> Recurrent:
    rng = np.random.default_rng(3)
    shapes = ((VOCAB, HIDDEN), (HIDDEN, HIDDEN), (VOCAB, HIDDEN))
    return Recurrent(*(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes))


PROMPTS, MASK = [[0, 1, 2], [3, 4, 1]], [[0, 1, 1], [1, 1, 1]]


def test_greedy_tokens_are_the_likeliest_ones_in_a_padded_batch(model: Recurrent) -> None:
    found = jaxgen.generate(model, PROMPTS, attention_mask=MASK, max_new_tokens=6)
    assert found.shape == (2, 9)
    assert_greedy(model, found[0, 1:].tolist(), 2)
    assert_greedy(model, found[1].tolist(), 3)


def test_enough_beams_find_the_likeliest_of_all_continuations(model: Recurrent) -> None:
    found = jaxgen.generate(
        model, PROMPTS, attention_mask=MASK, max_new_tokens=3, num_beams=VOCAB**2, return_dict_in_generate=True
    )
    for row, prompt in enumerate(([1, 2], [3, 4, 1])):
        every = ([*prompt, *new] for new in itertools.product(range(VOCAB), repeat=3))
        best = max(every, key=lambda tokens: model.log_probability(tokens, len(prompt)))
        assert found.sequences[row, -len(best) :].tolist() == best


def test_a_sample_does_not_depend_on_batch_mates_or_chunks(model: Recurrent) -> None:
    options = {"max_new_tokens": 20, "do_sample": True}
    together = jaxgen.generate(model, PROMPTS, attention_mask=MASK, key=[7, 8], num_return_sequences=2, **options)
    alone = jaxgen.generate(model, [PROMPTS[1]], key=[8], num_return_sequences=2, **options)
    np.testing.assert_array_equal(together[2:], alone)
    assert len({tuple(row) for row in together}) == 4
    chunks = jaxgen.stream(model, PROMPTS, attention_mask=MASK, key=[7, 8], num_return_sequences=2, **options)
    np.testing.assert_array_equal(np.concatenate([*chunks], axis=1), together[:, 3:])


def test_texts_that_outgrow_the_first_cache_go_on(model: Recurrent) -> None:
    before = jaxgen.compile_counts()["grow"]
    found = jaxgen.generate(model, PROMPTS, attention_mask=MASK, max_new_tokens=500)
    assert jaxgen.compile_counts()["grow"] > before
    assert_greedy(model, found[1].tolist(), 3)


@pytest.mark.parametrize("chunk", [None, 2])
def test_a_prompt_read_in_chunks_leaves_the_same_state(chunk: int | None, model: Recurrent) -> None:
    found = jaxgen.generate(model, [[0, 1, 2, 3, 4]], max_new_tokens=5, prefill_chunk_size=chunk)
    assert_greedy(model, found[0].tolist(), 5)


def test_a_state_is_no_cache_to_be_looked_into(model: Recurrent) -> None:
    cache = jaxgen.generate(model, PROMPTS, max_new_tokens=3, return_dict_in_generate=True).cache
    assert len(cache) == 0 and cache.get_seq_length() == 5
    with pytest.raises(ValueError, match="a state cannot be cut into columns"):
        jaxgen.generate(model, [[*row, 0, 0, 0] for row in PROMPTS], cache=cache, max_new_tokens=2)
    with pytest.raises(ValueError, match="a state has no keys to hold in int8"):
        int8 = {"cache_implementation": "quantized", "cache_config": {"backend": "int8"}}
        jaxgen.generate(model, PROMPTS, max_new_tokens=3, **int8)

"""Watermarks, compared with transformers live, and with its recorded answers where torch is missing."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers.generation.configuration_utils import SynthIDTextWatermarkingConfig, WatermarkingConfig

from jaxgen import Prompt
from jaxgen.processors import watermarking
from jaxgen.processors.watermarking import GreenlistWatermark, SynthIDWatermark

LARGE_KEYS = [1, 15485863, 2**31, 2**32 - 5]
LOWEST = np.finfo(np.float32).min


@jax.jit
def biased(watermark: GreenlistWatermark, input_ids: Any, scores: Any, cur_len: Any) -> jax.Array:
    return watermark(input_ids, scores, cur_len)


def random_batch(vocab_size: int, rows: int = 3, columns: int = 9, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(rows, vocab_size)).astype(np.float32) * 3
    return rng.integers(0, vocab_size, (rows, columns), np.int32), scores


def greens(last_token: int, vocab_size: int, **config: Any) -> list[int]:
    watermark = GreenlistWatermark.from_config(WatermarkingConfig(**config), vocab_size)
    ids = jnp.array([[3, last_token, 5]])
    scores = biased(watermark, ids, jnp.zeros((1, vocab_size)), jnp.int32(2))
    return np.flatnonzero(scores[0]).tolist()


def torch_scores(config: Any, ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
    import torch

    processor = config.construct_processor(scores.shape[1], "cpu")
    return processor(torch.tensor(ids).long(), torch.tensor(scores)).numpy()


def test_the_greens_after_token_10_of_20_are_the_recorded_ones() -> None:
    assert greens(10, 20) == [1, 4, 9, 12, 15]


def test_the_greens_after_token_7_of_64_are_the_recorded_ones() -> None:
    assert greens(7, 64) == [17, 20, 24, 28, 31, 37, 42, 43, 47, 52, 53, 55, 56, 57, 60, 63]


def test_columns_beyond_the_length_do_not_count() -> None:
    watermark = GreenlistWatermark.from_config(WatermarkingConfig(), 20)
    scores = jnp.zeros((1, 20))
    expected = biased(watermark, jnp.array([[10]]), scores, jnp.int32(1))
    assert (biased(watermark, jnp.array([[10, 4, 4]]), scores, jnp.int32(1)) == expected).all()


def test_each_row_has_its_own_greens() -> None:
    watermark = GreenlistWatermark.from_config(WatermarkingConfig(bias=3.0), 20)
    both = biased(watermark, jnp.array([[10], [11]]), jnp.zeros((2, 20)), jnp.int32(1))
    assert [np.flatnonzero(row).tolist() for row in both] == [greens(10, 20), greens(11, 20)]
    assert set(np.unique(both)) == {0.0, 3.0}


@pytest.mark.parametrize("seeding_scheme", ["lefthash", "selfhash"])
def test_scores_stay_while_the_row_is_shorter_than_the_context(seeding_scheme: str) -> None:
    config = WatermarkingConfig(seeding_scheme=seeding_scheme, context_width=4)
    ids, scores = random_batch(64)
    watermark = GreenlistWatermark.from_config(config, 64)
    assert (biased(watermark, ids, scores, jnp.int32(3)) == scores).all()
    assert (biased(watermark, ids, scores, jnp.int32(4)) != scores).any()
    assert (biased(watermark, ids[:, :2], scores, jnp.int32(2)) == scores).all()


def test_a_ratio_too_small_for_one_token_leaves_the_scores() -> None:
    assert greens(2, 20, greenlist_ratio=0.01) == []


def test_bias_and_key_are_numbers_of_one_compiled_program() -> None:
    program: Any = jax.jit(lambda watermark, ids, scores, length: watermark(ids, scores, length))
    ids, scores = random_batch(64)
    for bias, key in [(2.0, 3), (1.5, 99)]:
        program(GreenlistWatermark.from_config(WatermarkingConfig(bias=bias, hashing_key=key), 64), ids, scores, 5)
    assert program._cache_size() == 1


@pytest.mark.parametrize("seeding_scheme", ["lefthash", "selfhash"])
def test_a_watermark_runs_inside_a_compiled_loop(seeding_scheme: str) -> None:
    watermark = GreenlistWatermark.from_config(WatermarkingConfig(seeding_scheme=seeding_scheme, bias=9.0), 50)
    ids, scores = random_batch(50)

    def step(watermark: GreenlistWatermark, ids: Any, length: Any) -> jax.Array:
        tokens = watermark(ids, jnp.asarray(scores), length).argmax(axis=1).astype(jnp.int32)
        return jax.lax.dynamic_update_slice_in_dim(ids, tokens[:, None], length, axis=1)

    looped = jax.jit(lambda mark, ids: jax.lax.fori_loop(2, 9, lambda length, ids: step(mark, ids, length), ids))
    one_by_one = jnp.asarray(ids)
    for length in range(2, 9):
        one_by_one = jax.jit(step)(watermark, one_by_one, jnp.int32(length))
    assert (looped(watermark, ids) == one_by_one).all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"seeding_scheme": "righthash"}, "seeding_scheme .* not 'righthash'"),
        ({"greenlist_ratio": 0.0}, "greenlist_ratio .* not 0.0"),
        ({"greenlist_ratio": 1.0}, "greenlist_ratio .* not 1.0"),
        ({"hashing_key": 2**32}, r"hashing_key .* 2\*\*32 - 1, not 4294967296"),
        ({"hashing_key": -1}, "hashing_key .* not -1"),
        ({"context_width": 0}, "context_width .* not 0"),
        ({"seeding_scheme": "selfhash"}, "40 best tokens, but the vocabulary has 39"),
    ],
)
def test_a_green_list_that_cannot_be_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GreenlistWatermark.from_config(WatermarkingConfig(**config), 39)


def random_wide(seed: int) -> tuple[np.ndarray, watermarking.Wide]:
    values = np.random.default_rng(seed).integers(0, 2**64, (50, 7), np.uint64)
    values[0] = [0, 1, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
    return values, (jnp.asarray((values >> 32).astype(np.uint32)), jnp.asarray(values.astype(np.uint32)))


def joined(value: Any) -> np.ndarray:
    return np.asarray(value[0]).astype(np.uint64) << 32 | np.asarray(value[1])


def test_pairs_of_words_calculate_like_64_bit_integers() -> None:
    (a, wide_a), (b, wide_b) = random_wide(0), random_wide(1)
    b, wide_b = b[::-1], jax.tree.map(lambda word: word[::-1], wide_b)
    assert (joined(jax.jit(watermarking._multiply)(wide_a, wide_b)) == a * b).all()
    assert (joined(jax.jit(watermarking._add)(wide_a, wide_b[1])) == a + (b & np.uint64(2**32 - 1))).all()
    least = jax.jit(watermarking._minimum)(wide_a)
    assert (joined(least).astype(np.int64) == a.astype(np.int64).min(axis=1)).all()
    seeds = [int(value) % (2**64 - 1) % 2**32 for value in a.astype(np.int64).ravel()]
    assert jax.jit(watermarking._torch_seed)(wide_a).ravel().tolist() == seeds


def test_the_generator_gives_the_words_of_numpys_mersenne_twister() -> None:
    seeds = np.array([0, 1, 5489, 2**31, 2**32 - 1], np.uint32)
    words = jax.jit(watermarking._mersenne_twister, static_argnums=1)(seeds, 2000)
    expected = [np.random.RandomState(seed).randint(2**32, size=2000, dtype=np.uint32) for seed in seeds]
    assert (np.stack(expected) == words.T).all()


def test_the_first_of_a_shuffle_are_those_of_the_sequential_loop() -> None:
    rng = np.random.default_rng(0)
    for size, vocab_size in [(1, 2), (1, 9), (4, 5), (5, 20), (19, 20), (300, 700)]:
        words = rng.integers(0, 2**32, (size, 40), np.uint32)
        first = jax.jit(watermarking._first_of_shuffle, static_argnums=1)(words, vocab_size)
        for row, column in zip(first, words.T, strict=True):
            order = list(range(vocab_size))
            for step, word in enumerate(column.tolist()):
                target = step + word % (vocab_size - step)
                order[step], order[target] = order[target], order[step]
            assert np.flatnonzero(row).tolist() == sorted(order[:size])


@pytest.mark.oracle
@pytest.mark.parametrize("vocab_size", [20, 64, 1000, 32000])
@pytest.mark.parametrize("ratio", [0.25, 0.9])
def test_the_greens_are_the_first_of_torchs_permutation(vocab_size: int, ratio: float) -> None:
    import torch

    rng = np.random.default_rng(vocab_size)
    seeds = np.concatenate([[0, 1, 2**31, 2**32 - 1], rng.integers(0, 2**32, 16)]).astype(np.uint32)
    size = int(vocab_size * ratio)
    words = jax.jit(watermarking._mersenne_twister, static_argnums=1)(seeds, size)
    masks = jax.jit(watermarking._first_of_shuffle, static_argnums=1)(words, vocab_size)
    for seed, mask in zip(seeds.tolist(), masks, strict=True):
        permutation = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(seed))
        assert np.flatnonzero(mask).tolist() == sorted(permutation[:size].tolist())


@pytest.mark.oracle
@pytest.mark.parametrize("seeding_scheme", ["lefthash", "selfhash"])
@pytest.mark.parametrize("hashing_key", LARGE_KEYS)
@pytest.mark.parametrize(("context_width", "ratio"), [(1, 0.25), (2, 0.5), (3, 0.8), (4, 0.25)])
def test_scores_are_those_of_transformers(
    seeding_scheme: str, hashing_key: int, context_width: int, ratio: float
) -> None:
    config = WatermarkingConfig(ratio, 2.5, hashing_key, seeding_scheme, context_width)
    ids, scores = random_batch(1000, seed=hashing_key)
    watermark = GreenlistWatermark.from_config(config, 1000)
    for length in (4, 9):
        expected = torch_scores(config, ids[:, :length], scores)
        assert (biased(watermark, ids, scores, jnp.int32(length)) == expected).all()


@pytest.mark.oracle
def test_the_vocabulary_of_llama_2_gets_the_scores_of_transformers() -> None:
    for config in (WatermarkingConfig(), WatermarkingConfig(seeding_scheme="selfhash", context_width=2)):
        ids, scores = random_batch(32000)
        watermark = GreenlistWatermark.from_config(config, 32000)
        assert (biased(watermark, ids, scores, jnp.int32(9)) == torch_scores(config, ids, scores)).all()


@pytest.mark.oracle
def test_selfhash_seeds_are_those_of_transformers_where_the_product_is_negative() -> None:
    """The keys above overflow 64 bits; here the seeds themselves are compared, and some of them must be negative."""
    key = 2**32 - 5
    processor: Any = WatermarkingConfig(hashing_key=key, seeding_scheme="selfhash").construct_processor(1000, "cpu")
    table = watermarking._shuffled_table(key)
    assert (table == processor.fixed_table.numpy()).all()
    hashes = (table[:1000] + 1).astype(np.uint32)
    products = watermarking._multiply((jnp.uint32(0), jnp.asarray(hashes)), (jnp.uint32(0), jnp.asarray(hashes)))
    products = watermarking._multiply(products, (jnp.uint32(0), jnp.uint32(key)))
    exact = (key * processor.fixed_table[:1000].add(1) ** 2).numpy()
    assert (joined(products).astype(np.int64) == exact).all()
    assert (exact < 0).any() and (exact > 0).any()


@pytest.mark.oracle
def test_transformers_detector_finds_the_watermark() -> None:
    import torch
    from transformers import LlamaConfig, WatermarkDetector

    config = WatermarkingConfig(bias=9.0)
    watermark = GreenlistWatermark.from_config(config, 300)
    _, scores = random_batch(300, columns=60)
    ids = np.zeros((3, 60), np.int32)
    for length in range(1, 60):
        noise = np.roll(scores, length * 7, axis=1)
        ids[:, length] = biased(watermark, ids, noise, jnp.int32(length)).argmax(axis=1)
    detector: Any = WatermarkDetector(LlamaConfig(vocab_size=300), "cpu", config)
    assert detector(torch.tensor(ids).long()).all()


KEYS = [654, 400, 836, 123, 340, 443, 597, 160, 57, 2**40 + 29, -3]


@jax.jit
def synthid_step(watermark: SynthIDWatermark, input_ids: Any, scores: Any, cur_len: Any, state: Any) -> Any:
    return watermark.step(input_ids, scores, cur_len, state)


def synthid_scores(config: SynthIDTextWatermarkingConfig, ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """float32 [steps, N, V] for scores of the same shape: the first step sees the columns that have no scores."""
    watermark = SynthIDWatermark.from_config(config, scores.shape[2])
    prompt_length = ids.shape[1] - len(scores)
    prompt = jnp.asarray(ids[:, :prompt_length])
    rows, columns = prompt.shape
    state = watermark.init(Prompt(prompt, prompt >= 0, jnp.int32(columns), jnp.int32(rows)), scores.shape[2])
    outputs = []
    for step, step_scores in enumerate(scores):
        output, state = synthid_step(watermark, ids, step_scores, jnp.int32(prompt_length + step), state)
        outputs.append(output)
    return np.stack(outputs)


def repetitive_steps(vocab_size: int = 400, steps: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of three kinds only, so that contexts come back, and scores of which every other is filtered."""
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(steps, 3, vocab_size)).astype(np.float32) * 3
    scores[:, :, 1::2] = -np.inf
    return rng.integers(0, 3, (3, 4 + steps), np.int32), scores


def test_synthid_hashes_contexts_with_64_bits() -> None:
    watermark = SynthIDWatermark.from_config(SynthIDTextWatermarkingConfig(5, KEYS), 40)
    contexts = np.array([[0, 0, 0, 0], [1, 2, 3, 4], [128255, 0, 31999, 2**31 - 1]], np.int32)
    expected = []
    for context in contexts.tolist():
        value = 1
        for token in context:
            value = ((value + token) * 6364136223846793005 + 1) % 2**64
        expected.append(value)
    assert joined(jax.jit(watermark._context_hash)(contexts)).tolist() == expected


def test_synthid_does_not_watermark_a_context_again() -> None:
    _, scores = repetitive_steps()
    ids = np.full((3, 34), 7, np.int32)
    outputs = synthid_scores(SynthIDTextWatermarkingConfig(3, KEYS), ids, scores)
    # Contexts: two zeros, a zero and a 7, two 7s, and then two 7s again.
    assert (outputs == scores).all(axis=(1, 2)).tolist() == [False] * 3 + [True] * 27


def test_synthid_forgets_contexts_beyond_its_history() -> None:
    _, scores = repetitive_steps()
    ids = np.tile(np.array([7, 8, 9], np.int32), (3, 12))[:, :34]
    for history, repeats in [(2, False), (3, True)]:
        outputs = synthid_scores(SynthIDTextWatermarkingConfig(2, KEYS, context_history_size=history), ids, scores)
        assert (outputs[-1] == scores[-1]).all() == repeats


def test_synthid_gives_filtered_tokens_the_lowest_finite_score() -> None:
    ids, scores = repetitive_steps()
    outputs = synthid_scores(SynthIDTextWatermarkingConfig(3, KEYS), ids, scores)
    assert (outputs[0, :, 1::2] == LOWEST).all() and (outputs[0, :, ::2] > LOWEST).all()


@pytest.mark.parametrize("size", [0, 1000, 2**25])
def test_a_sampling_table_of_another_size_is_refused(size: int) -> None:
    config = SynthIDTextWatermarkingConfig(3, KEYS, sampling_table_size=size)
    with pytest.raises(ValueError, match=f"power of two up to 2\\*\\*24, not {size}; use 65536"):
        SynthIDWatermark.from_config(config, 40)


@pytest.mark.oracle
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ngram_len": 1},
        {"ngram_len": 2, "context_history_size": 2},
        {"ngram_len": 5, "context_history_size": 5, "sampling_table_size": 2**10, "sampling_table_seed": 99},
        {"ngram_len": 4, "skip_first_ngram_calls": True},
        {"debug_mode": True},
        {"debug_mode": True, "skip_first_ngram_calls": True},
    ],
    ids=str,
)
def test_thirty_steps_of_synthid_are_those_of_transformers(options: dict[str, Any]) -> None:
    import torch

    config = SynthIDTextWatermarkingConfig(**{"ngram_len": 3, "keys": KEYS, **options})
    ids, scores = repetitive_steps()
    processor: Any = config.construct_processor(scores.shape[2], "cpu")
    expected = np.stack(
        [
            processor(torch.tensor(ids[:, : 4 + step]).long(), torch.tensor(step_scores)).numpy()
            for step, step_scores in enumerate(scores)
        ]
    )
    outputs = synthid_scores(config, ids, scores)
    assert (np.isneginf(outputs) == np.isneginf(expected)).all()
    # Losers to an almost certain token have the rounding of 1 - 1 for a probability: no two sums agree on its log.
    likely = expected > np.log(1e-3)
    np.testing.assert_allclose(outputs[likely], expected[likely], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.exp(outputs), np.exp(expected), rtol=1e-4, atol=1e-6)
    given = np.ones_like(scores) if config.debug_mode else scores
    untouched = (expected == given).all(axis=2)
    assert untouched.any() and not untouched.all()

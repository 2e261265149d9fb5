"""The rules that change scores, one by one: tables of what each does, then random cases against transformers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from jaxgen import LogitsProcessor, Prompt
from jaxgen.processors import logits_process
from jaxgen.processors.logits_process import (
    EncoderNoRepeatNGram,
    EncoderRepetitionPenalty,
    Epsilon,
    Eta,
    ExponentialDecayLengthPenalty,
    ForceTokensAt,
    InfNanRemove,
    LogitNormalization,
    MinLength,
    MinP,
    NoRepeatNGram,
    RepetitionPenalty,
    SequenceBias,
    SuppressTokens,
    SuppressTokensAtBegin,
    Temperature,
    TopH,
    TopK,
    TopP,
    Typical,
    token_mask,
)

INF = np.inf
F32 = np.finfo(np.float32)
RAMP = np.stack([np.arange(10.0) - 5, 100 * (np.arange(10.0) - 5)])


# The class is an argument of its own: JAX calls the trees of two dataclasses equal where their leaves are, and now and
# then takes the program of one for the other.
def compiled(function: Any) -> Any:
    program = jax.jit(
        lambda processor, rest, kind, vocab_size: function(processor, *rest, *vocab_size), static_argnums=(2, 3)
    )
    return lambda processor, *rest, vocab_size=(): program(processor, rest, type(processor), vocab_size)


processed = compiled(lambda processor, ids, scores, cur_len: processor(ids, scores, cur_len))
stepped = compiled(lambda processor, ids, scores, cur_len, state: processor.step(ids, scores, cur_len, state))
_started = compiled(lambda processor, prompt, vocab_size: processor.init(prompt, vocab_size))


def started(processor: LogitsProcessor, prompt: Prompt, vocab_size: int) -> Any:
    return _started(processor, prompt, vocab_size=(vocab_size,))


def apply(processor: LogitsProcessor, scores: Any, ids: Any = ((0,),), cur_len: int | None = None) -> np.ndarray:
    ids = np.asarray(ids, np.int32)
    length = ids.shape[1] if cur_len is None else cur_len
    return np.asarray(processed(processor, ids, np.asarray(scores, np.float32), np.int32(length)))


def padded(ids: Any, mask: Any = None, columns: int = 0, filler: int = 0) -> Prompt:
    """A prompt whose bucket has `columns` more columns, full of a token that nothing may see."""
    ids = np.asarray(ids, np.int32)
    mask = np.ones_like(ids) if mask is None else np.asarray(mask)
    return Prompt(
        jnp.asarray(np.pad(ids, ((0, 0), (columns, 0)), constant_values=filler)),
        jnp.asarray(np.pad(mask.astype(bool), ((0, 0), (columns, 0)))),
        jnp.int32(ids.shape[1]),
        jnp.int32(len(ids)),
    )


def first_step(processor: LogitsProcessor, scores: Any, prompt: Prompt, generated: Any = None) -> np.ndarray:
    scores = np.asarray(scores, np.float32)
    ids = np.asarray(prompt.input_ids)[:, -int(prompt.length) :]
    if generated is not None:
        ids = np.concatenate([ids, np.asarray(generated, np.int32)], axis=1)
    buffer = np.pad(ids, ((0, 0), (0, 3)))
    state = started(processor, prompt, scores.shape[1])
    return np.asarray(stepped(processor, buffer, scores, np.int32(ids.shape[1]), state)[0])


def kept(rule: LogitsProcessor, probabilities: list[float]) -> np.ndarray:
    """The probabilities that a rule of sampling leaves, 0 where it rules a token out."""
    with np.errstate(divide="ignore"):
        return np.exp(apply(rule, np.log([probabilities])))[0]


def banned(scores: np.ndarray) -> list[list[int]]:
    return np.isneginf(scores).astype(int).tolist()


def bias_of(sequences: dict[tuple[int, ...], float], vocab_size: int = 5) -> SequenceBias:
    return SequenceBias.build(sequences, vocab_size)


# The rules of sampling.


@pytest.mark.parametrize(("top_k", "expected"), [(1, [9]), (3, [7, 8, 9]), (10, range(10)), (99, range(10))])
def test_top_k_keeps_the_highest_of_a_ramp(top_k: int, expected: Any) -> None:
    assert np.flatnonzero(np.isfinite(apply(TopK(np.int32(top_k)), RAMP[:1]))).tolist() == [*expected]


def test_top_k_looks_at_each_row_on_its_own() -> None:
    scores = [np.arange(10), [0, 1, 7, 8, 9, 5, 4, 3, 2, 1]]
    assert banned(apply(TopK(np.int32(3)), scores)) == [[1] * 7 + [0] * 3, [1, 1, 0, 0, 0, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("top_k", "scores", "expected"),
    [
        (1, [1, 1, 1, 1], [0, 0, 0, 0]),
        (2, [3, 1, 1, 0], [0, 0, 0, 1]),
        (1, [2, 1, 2, 0], [0, 1, 0, 1]),
        (3, [0, -INF, -INF, -INF], [0, 1, 1, 1]),
        (2, [0.0, -0.0, -1, 0.0], [0, 0, 1, 0]),
    ],
)
def test_top_k_keeps_all_that_equal_the_last_of_the_highest(top_k: int, scores: list, expected: list) -> None:
    assert banned(apply(TopK(np.int32(top_k)), [scores])) == [expected]


@pytest.mark.parametrize(
    ("top_p", "probabilities", "expected"),
    [
        (0.8, [0.3, 0.1, 0.1, 0.5], [0.3, 0, 0, 0.5]),
        (0.8, [0.15, 0.3, 0.3, 0.25], [0, 0.3, 0.3, 0.25]),
        (0.6, [0.3, 0.1, 0.1, 0.5], [0.3, 0, 0, 0.5]),
        (0.0, [0.3, 0.1, 0.1, 0.5], [0, 0, 0, 0.5]),
        (1.0, [0.3, 0.1, 0.1, 0.5], [0.3, 0.1, 0.1, 0.5]),
    ],
)
def test_top_p_keeps_the_token_that_crosses_the_probability(top_p: float, probabilities: list, expected: list) -> None:
    np.testing.assert_allclose(kept(TopP(np.float32(top_p)), probabilities), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("top_p", "probabilities", "expected"),
    [
        (0.5, [0.25] * 4, [0, 0, 1, 1]),
        (0.75, [0.5, 0.25, 0.25], [1, 0, 1]),
        (0.5, [0.125] * 8, [0, 0, 0, 0, 1, 1, 1, 1]),
        (0.25, [0.125] * 8, [0] * 6 + [1, 1]),
        (0.125, [0.125] * 8, [0] * 7 + [1]),
        (0.875, [0.125] * 8, [0] + [1] * 7),
        (0.0, [0.125] * 8, [0] * 7 + [1]),
        (0.5, [0.5, 0.25, 0.125, 0.125], [1, 0, 0, 0]),
        (0.75, [0.5, 0.25, 0.125, 0.125], [1, 1, 0, 0]),
        (0.875, [0.5, 0.25, 0.125, 0.125], [1, 1, 0, 1]),
        (0.875, [0.125, 0.5, 0.125, 0.25], [0, 1, 1, 1]),
        (0.5, [0.25, 0.125, 0.25, 0.125, 0.25], [0, 0, 1, 0, 1]),
        (0.75, [0.25, 0.125, 0.25, 0.125, 0.25], [1, 0, 1, 0, 1]),
        (0.6875, [0.0625] * 16, [0] * 5 + [1] * 11),
        (0.0625, [0.0625] * 16, [0] * 15 + [1]),
    ],
)
def test_top_p_removes_the_lower_columns_of_equal_scores_first(
    top_p: float, probabilities: list, expected: list
) -> None:
    assert (kept(TopP(np.float32(top_p)), probabilities) > 0).astype(int).tolist() == expected


def test_the_nucleus_beside_less_likely_tokens_is_that_of_all_tokens() -> None:
    rng = np.random.default_rng(0)
    scores = (3 * rng.normal(size=(20, 64))).astype(np.float32)
    nucleus = jax.jit(lambda rule, scores, rest, columns=None: rule.keep_nucleus(scores, rest, columns))
    for top_p in (0.1, 0.5, 0.8):
        rule = TopP(np.float32(top_p))
        columns = np.sort(np.argsort(scores, axis=1)[:, -50:], axis=1)
        others = np.sort(scores, axis=1)[:, :-50]
        rest = np.log(np.exp(others).sum(axis=1, keepdims=True))
        few = nucleus(rule, np.take_along_axis(scores, columns, axis=1), rest)
        whole = apply(rule, scores)
        assert (np.take_along_axis(whole, columns, axis=1) == few).all()
        assert np.isfinite(whole).sum() == np.isfinite(few).sum()
        falling = np.argsort(-scores, axis=1)[:, :50]
        any_order = nucleus(rule, np.take_along_axis(scores, falling, axis=1), rest, falling)
        assert (np.take_along_axis(whole, falling, axis=1) == any_order).all()


def test_the_nucleus_of_equal_scores_in_any_order_is_that_of_their_columns() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 4, (20, 32)).astype(np.float32)
    columns = rng.permuted(np.tile(np.arange(32), (20, 1)), axis=1)
    for top_p in (0.1, 0.5, 0.9):
        rule = TopP(np.float32(top_p))
        any_order = rule.keep_nucleus(np.take_along_axis(scores, columns, axis=1), columns=columns)
        assert (np.take_along_axis(apply(rule, scores), columns, axis=1) == any_order).all()


@pytest.mark.parametrize(
    ("top_h", "probabilities", "expected"),
    [
        (0.3, [0.97, 0.01, 0.01, 0.01], [0.97, 0, 0, 0]),
        (0.7, [0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0, 0]),
        (1.0, [0.25] * 4, [0.25] * 4),
        (0.4, [0.75, 0.25, 0, 0], [0.75, 0, 0, 0]),
    ],
)
def test_top_h_keeps_the_likeliest_up_to_a_share_of_the_entropy(
    top_h: float, probabilities: list, expected: list
) -> None:
    np.testing.assert_allclose(kept(TopH(np.float32(top_h)), probabilities), expected, rtol=1e-5)


def test_top_h_looks_at_the_best_hundred_tokens_only() -> None:
    """Half of the entropy of a hundred almost equally likely tokens is that of fifty; of all 150 it would be 75."""
    scores = np.arange(150) * 1e-4
    assert np.flatnonzero(np.isfinite(apply(TopH(np.float32(0.505)), [scores])[0])).tolist() == [*range(100, 150)]


def test_top_h_keeps_no_token_without_a_chance() -> None:
    """Compilers take log(exp(x)) for x, so a probability of 0 has to be ruled out by itself."""
    scores = 100 * (np.arange(10, dtype=np.float32) - 5)
    assert np.flatnonzero(np.isfinite(apply(TopH(np.float32(0.5)), [scores])[0])).tolist() == [9]


@pytest.mark.parametrize(
    ("min_p", "probabilities", "expected"),
    [
        (0.05, [0.9, 0.0274, 0.047, 0.0274], [0.9, 0, 0.047, 0]),
        (0.05, [0.15, 0.3, 0.3, 0.25], [0.15, 0.3, 0.3, 0.25]),
        (0.05, [0.97, 0.01, 0.01, 0.01], [0.97, 0, 0, 0]),
        (0.0, [0.97, 0.01, 0.01, 0.01], [0.97, 0.01, 0.01, 0.01]),
        (1.0, [0.15, 0.3, 0.3, 0.25], [0, 0.3, 0.3, 0]),
        (0.5, [0.5, 0.25, 0.125, 0.125], [0.5, 0.25, 0, 0]),
    ],
)
def test_min_p_keeps_tokens_of_at_least_a_share_of_the_highest(
    min_p: float, probabilities: list, expected: list
) -> None:
    np.testing.assert_allclose(kept(MinP(np.float32(min_p)), probabilities), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("typical_p", "probabilities", "expected"),
    [
        (0.5, [0.97, 0.01, 0.01, 0.01], [0.97, 0, 0, 0]),
        (0.5, [0.4, 0.2, 0.2, 0.2], [0, 0.2, 0.2, 0.2]),
        (0.1, [0.4, 0.2, 0.2, 0.2], [0, 0.2, 0.2, 0.2]),
        (0.7, [0.4, 0.2, 0.2, 0.2], [0.4, 0.2, 0.2, 0.2]),
        (0.9, [1, 0, 0, 0], [1, 0, 0, 0]),
    ],
)
def test_typical_keeps_the_least_surprising_and_all_that_equal_the_last(
    typical_p: float, probabilities: list, expected: list
) -> None:
    np.testing.assert_allclose(kept(Typical(np.float32(typical_p)), probabilities), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("epsilon", "probabilities", "expected"),
    [
        (0.1, [0.87, 0.099, 0.001, 0.03], [0.87, 0, 0, 0]),
        (0.1, [0.4, 0.299, 0.101, 0.2], [0.4, 0.299, 0.101, 0.2]),
        (0.6, [0.4, 0.4, 0.1, 0.1], [0.4, 0.4, 0, 0]),
    ],
)
def test_epsilon_keeps_tokens_of_a_probability_and_the_likeliest(
    epsilon: float, probabilities: list, expected: list
) -> None:
    np.testing.assert_allclose(kept(Epsilon(np.float32(epsilon)), probabilities), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("epsilon", "probabilities", "expected"),
    [
        (0.0625, [0, 0.1, 0.8, 0.1], [0, 0.1, 0.8, 0.1]),
        (0.0625, [0.01, 0.04, 0.9, 0.05], [0, 0, 0.9, 0]),
        (0.9, [0.25] * 4, [0.25] * 4),
    ],
)
def test_eta_cuts_lower_where_the_entropy_is_high(epsilon: float, probabilities: list, expected: list) -> None:
    np.testing.assert_allclose(kept(Eta(np.float32(epsilon)), probabilities), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("rule", "number", "expected"),
    [(TopP, 0.9, 3), (MinP, 0.9, 1), (Typical, 0.7, 2), (Epsilon, 0.05, 3), (Eta, 0.1, 2)],
)
def test_a_rule_keeps_the_end_of_a_ramp_and_one_token_of_a_steep_one(rule: Any, number: float, expected: int) -> None:
    kept_of_ramp = np.isfinite(apply(rule(np.float32(number)), RAMP))
    assert kept_of_ramp.tolist() == [[False] * (10 - count) + [True] * count for count in (expected, 1)]


@pytest.mark.parametrize("rule", [TopP, MinP, Typical, Epsilon, Eta, TopH])
def test_a_rule_of_sampling_changes_no_score_that_it_keeps(rule: Any) -> None:
    scores = 2 * np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32)
    output = apply(rule(np.float32(0.3)), scores)
    assert (output[np.isfinite(output)] == scores[np.isfinite(output)]).all()
    assert (output.argmax(axis=1) == scores.argmax(axis=1)).all() or rule is Typical


def test_temperature_sharpens_below_one_and_flattens_above() -> None:
    scores = np.log([[0.5, 0.3, 0.2]])
    np.testing.assert_allclose(apply(Temperature(np.float32(0.5)), scores), 2 * scores, rtol=1e-6)
    np.testing.assert_allclose(apply(Temperature(np.float32(2.0)), scores), scores / 2, rtol=1e-6)
    assert apply(Temperature(np.float32(0.5)), [[-INF, 1]]).tolist() == [[-INF, 2]]


def test_normalised_scores_are_log_probabilities() -> None:
    output = apply(LogitNormalization(), [[-23.18, -29.96, -43.54, 47.77]])
    np.testing.assert_allclose(output, [[-70.95, -77.73, -91.31, 0]], rtol=1e-5, atol=1e-6)
    assert apply(LogitNormalization(), [[3, -INF]]).tolist() == [[0, -INF]]


@pytest.mark.parametrize("rule", [Temperature, TopP, MinP, Typical, Epsilon, Eta, TopH])
def test_a_new_number_compiles_nothing(rule: Any) -> None:
    program: Any = jax.jit(lambda rule, scores: rule(None, scores, None))
    for number in (0.25, 0.75):
        program(rule(np.float32(number)), RAMP.astype(np.float32))
    assert program._cache_size() == 1


# Repetitions.


@pytest.mark.parametrize(
    ("size", "expected"),
    [(1, [[0, 1, 1], [1, 1, 0]]), (2, [[0, 1, 1], [1, 0, 0]]), (3, [[0, 0, 0], [1, 0, 0]]), (9, [[0, 0, 0]] * 2)],
)
@pytest.mark.parametrize("columns_beyond", [0, 3])
def test_an_n_gram_of_the_row_does_not_come_again(size: int, expected: list, columns_beyond: int) -> None:
    ids = np.pad([[1, 1, 2, 1], [0, 1, 0, 1]], ((0, 0), (0, columns_beyond)))
    assert banned(apply(NoRepeatNGram(size), np.zeros((2, 3)), ids, 4)) == expected


def test_a_longer_row_bans_the_token_that_followed_its_last_two() -> None:
    output = apply(NoRepeatNGram(3), np.zeros((1, 9)), [[1, 2, 5, 7, 8, 5, 1, 2]])
    assert np.flatnonzero(np.isneginf(output)).tolist() == [5]


@pytest.mark.parametrize(("size", "length", "expected"), [(1, 1, [4]), (2, 1, []), (3, 2, []), (2, 2, [4])])
def test_a_row_shorter_than_an_n_gram_bans_nothing(size: int, length: int, expected: list) -> None:
    output = apply(NoRepeatNGram(size), np.zeros((1, 6)), [[4, 4, 4, 4]], length)
    assert np.flatnonzero(np.isneginf(output)).tolist() == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [(2, [[0, 1, 1], [0, 1, 0], [1, 0, 1], [0, 1, 0]]), (3, [[0, 1, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0]])],
)
def test_an_n_gram_of_the_prompt_does_not_come_again(size: int, expected: list) -> None:
    prompt = padded([[1, 2, 1, 1], [1, 2, 1, 1], [0, 0, 2, 1], [0, 0, 2, 1]], columns=4)
    generated = [[1, 2, 1], [1, 0, 2], [0, 0, 0], [0, 2, 2]]
    assert banned(first_step(EncoderNoRepeatNGram(size), np.zeros((4, 3)), prompt, generated)) == expected


@pytest.mark.parametrize(("size", "expected"), [(2, [[0, 1, 1], [0, 1, 0]]), (3, [[0, 1, 0], [0, 0, 0]])])
def test_n_grams_of_new_tokens_may_come_again(size: int, expected: list) -> None:
    prompt = padded([[1, 2, 1, 1]] * 2)
    generated = [[1, 2, 1], [8, 0, 2]]
    assert banned(first_step(EncoderNoRepeatNGram(size), np.zeros((2, 3)), prompt, generated)) == expected
    repeated = np.tile([[0, 2]], (2, 5))
    output = first_step(EncoderNoRepeatNGram(size), np.zeros((2, 3)), padded([[1, 1, 1]] * 2), repeated)
    assert not np.isneginf(output).any()


def penalty_scores() -> np.ndarray:
    scores = np.full((2, 6), 0.1)
    scores[0, 0], scores[1, 5] = -0.1, 0.4
    return scores


@pytest.mark.parametrize(
    ("processor", "mask", "expected"),
    [
        (RepetitionPenalty, [[1, 1], [1, 1]], {(0, 0): -0.2, (0, 1): 0.05, (1, 0): 0.05, (1, 5): 0.2}),
        (RepetitionPenalty, [[0, 1], [1, 1]], {(0, 1): 0.05, (1, 0): 0.05, (1, 5): 0.2}),
        (EncoderRepetitionPenalty, [[1, 1], [1, 1]], {(0, 0): -0.05, (0, 1): 0.2, (1, 0): 0.2, (1, 5): 0.8}),
        (EncoderRepetitionPenalty, [[0, 1], [1, 1]], {(0, 0): -0.05, (0, 1): 0.2, (1, 0): 0.2, (1, 5): 0.8}),
    ],
)
def test_a_penalty_multiplies_negative_scores_and_divides_the_others(processor: Any, mask: Any, expected: dict) -> None:
    scores = penalty_scores()
    output = first_step(processor(np.float32(2)), scores, padded([[0, 1], [5, 0]], mask, columns=3, filler=4))
    for place, score in expected.items():
        scores[place] = score
    np.testing.assert_allclose(output, scores, rtol=1e-6)


@pytest.mark.parametrize(
    ("ids", "mask", "expected"),
    [
        ([0, 0, 5, 6], [1, 1, 1, 1], [0, 5, 6]),
        ([0, 0, 5, 6], [0, 0, 1, 1], [5, 6]),
        ([7, 0, 5, 6], [1, 0, 1, 1], [0, 5, 6, 7]),
        ([7, 5, 0, 0], [1, 1, 0, 0], [0, 5, 7]),
        ([0, 7, 0, 5], [0, 1, 0, 1], [0, 5, 7]),
        ([7, 5, 6, 6], [0, 0, 0, 0], [5, 6, 7]),
        ([9, 9, 9, 9], [0, 0, 0, 1], [9]),
    ],
)
@pytest.mark.parametrize("columns", [0, 4])
def test_only_padding_before_the_first_token_escapes_the_penalty(
    ids: list, mask: list, expected: list, columns: int
) -> None:
    prompt = padded([ids], [mask], columns, filler=3)
    output = first_step(RepetitionPenalty(np.float32(2)), np.ones((1, 10)), prompt)
    assert np.flatnonzero(output[0] == 0.5).tolist() == expected and set(output[0]) == {0.5, 1}


def test_new_tokens_are_penalised_from_the_step_after_them() -> None:
    processor, prompt, scores = RepetitionPenalty(np.float32(2)), padded([[3, 1]]), np.ones((1, 6), np.float32)
    state, ids = started(processor, prompt, 6), np.array([[3, 1, 4, 4, 0]], np.int32)
    seen = []
    for length in (2, 3, 4, 5):
        output, state = stepped(processor, ids, scores, np.int32(length), state)
        seen.append(np.flatnonzero(output[0] == 0.5).tolist())
    assert seen == [[1, 3], [1, 3, 4], [1, 3, 4], [0, 1, 3, 4]]


def test_the_penalty_of_the_prompt_forgets_new_tokens() -> None:
    output = first_step(EncoderRepetitionPenalty(np.float32(2)), np.ones((1, 6)), padded([[3, 1]]), [[4, 5]])
    assert output.tolist() == [[1, 2, 1, 2, 1, 1]]


# Words.

BIASES = {
    (1,): 100.0,
    (4,): 100.0,
    (1, 0): -100.0,
    (0, 1, 2): -100.0,
    (1, 3, 1, 3): -100.0,
    (1, 3, 1, 3, 1, 3): -100.0,
}
WORD_ROWS = [[0, 1, 3, 1], [0, 1, 0, 1]]


def test_biases_count_where_a_sequence_would_be_complete() -> None:
    output = apply(bias_of(BIASES), np.zeros((2, 5)), WORD_ROWS)
    assert output.tolist() == [[-100, 100, 0, -100, 100], [-100, 100, -100, 0, 100]]


def test_a_prefix_may_fill_the_whole_row() -> None:
    assert apply(bias_of({(0, 1, 2): -5.0}), np.zeros((1, 5)), [[0, 1]]).tolist() == [[0, 0, -5, 0, 0]]
    assert apply(bias_of({(0, 1, 2): -5.0}), np.zeros((1, 5)), [[1]]).tolist() == [[0, 0, 0, 0, 0]]


def test_the_biases_of_all_matching_sequences_add_up() -> None:
    processor = bias_of({(2,): 1.0, (1, 2): 10.0, (0, 1, 2): 100.0, (3, 1, 2): 1000.0})
    assert apply(processor, np.ones((1, 5)), [[4, 0, 1]]).tolist() == [[1, 1, 112, 1, 1]]


@pytest.mark.parametrize("columns_beyond", [0, 3])
def test_bad_words_are_forbidden_where_they_would_be_complete(columns_beyond: int) -> None:
    processor = bias_of(dict.fromkeys([(1,), (1, 0), (0, 1, 2), (1, 3, 1, 3)], -INF))
    ids = np.pad(WORD_ROWS, ((0, 0), (0, columns_beyond)), constant_values=1)
    assert banned(apply(processor, np.zeros((2, 5)), ids, 4)) == [[1, 1, 0, 1, 0], [1, 1, 1, 0, 0]]


def test_no_words_forbid_nothing() -> None:
    assert apply(bias_of({}), np.ones((2, 5)), WORD_ROWS).tolist() == np.ones((2, 5)).tolist()


def test_other_words_of_the_same_bucket_compile_nothing() -> None:
    program: Any = jax.jit(lambda processor, ids, scores: processor(ids, scores, 4))
    for sequences in ({(1, 2): 1.0, (2, 1, 3): 0.5}, {(3,): 1.0, (0, 1, 3): 2.0, (2, 2): -INF}):
        program(bias_of(sequences), np.array(WORD_ROWS, np.int32), np.zeros((2, 5), np.float32))
    assert program._cache_size() == 1


# Lengths and lists of tokens.


@pytest.mark.parametrize(("cur_len", "expected"), [(1, [1, 0, 0, 1]), (4, [1, 0, 0, 1]), (5, [0] * 4), (9, [0] * 4)])
def test_the_end_is_forbidden_before_the_minimum_length(cur_len: int, expected: list) -> None:
    processor = MinLength(np.int32(5), token_mask([0, 3], 4))
    assert banned(apply(processor, np.ones((1, 4)), cur_len=cur_len)) == [expected]


def test_a_forced_end_leaves_only_its_tokens_at_its_length() -> None:
    processor = ForceTokensAt(np.int32(4), token_mask([0, 3], 5))
    scores = [[1, 2, 3, -INF, 5]]
    assert apply(processor, scores, cur_len=4).tolist() == [[0, -INF, -INF, 0, -INF]]
    for other in (3, 5):
        assert apply(processor, scores, cur_len=other).tolist() == scores


def test_a_forced_start_leaves_only_its_token_after_one_column() -> None:
    processor = ForceTokensAt(np.int32(1), token_mask([2], 4))
    assert apply(processor, np.ones((2, 4)), cur_len=1).tolist() == [[-INF, -INF, 0, -INF]] * 2
    assert apply(processor, np.ones((2, 4)), cur_len=2).tolist() == np.ones((2, 4)).tolist()


@pytest.mark.parametrize(
    ("score", "cur_len", "expected"),
    [
        (0.05, 2, 0.05),
        (0.05, 7, 0.05),
        (0.05, 8, 0.055),
        (0.05, 20, 0.172614),
        (-0.05, 7, -0.05),
        (-0.05, 8, -0.045),
        (-0.05, 20, 0.0726136),
        (0.0, 20, 0.0),
        (-INF, 20, -INF),
        (INF, 20, INF),
    ],
)
def test_the_end_gets_likelier_with_each_token_after_the_start(score: float, cur_len: int, expected: float) -> None:
    processor = ExponentialDecayLengthPenalty(np.int32(2 + 5), np.float32(1.1), token_mask([1], 3))
    output = apply(processor, [[0.3, score, -0.3]], cur_len=cur_len)
    np.testing.assert_allclose(output, [[0.3, expected, -0.3]], rtol=1e-5)


def test_nan_becomes_zero_and_infinities_the_largest_finite_numbers() -> None:
    output = apply(InfNanRemove(), [[0, 0.7, 0.8, np.nan], [0.1, INF, 0.3, -INF]])
    expected = np.array([[0, 0.7, 0.8, 0], [0.1, F32.max, 0.3, F32.min]], np.float32)
    assert (output == expected).all()


@pytest.mark.parametrize("token_ids", [[1, 3], [3, 1, 1], [1, 3, 4, 99], [-1, 1, 3]])
def test_suppressed_tokens_are_forbidden_and_ids_outside_the_vocabulary_are_nobodys(token_ids: list) -> None:
    assert banned(apply(SuppressTokens(token_mask(token_ids, 4)), np.ones((2, 4)))) == [[0, 1, 0, 1]] * 2


@pytest.mark.parametrize(("cur_len", "expected"), [(2, [0, 0, 0]), (3, [0, 1, 0]), (4, [0, 0, 0])])
def test_tokens_suppressed_at_the_beginning_are_free_afterwards(cur_len: int, expected: list) -> None:
    processor = SuppressTokensAtBegin(np.int32(3), token_mask([1], 3))
    assert banned(apply(processor, np.ones((1, 3)), cur_len=cur_len)) == [expected]


# Random cases against transformers. One shape for all of them, so each rule compiles once.

ROWS, SLOTS, VOCAB, BUCKET, STEPS = 3, 12, 29, 8, 4


class Batch(NamedTuple):
    ids: np.ndarray
    scores: np.ndarray
    length: int
    rng: np.random.Generator


class History(NamedTuple):
    prompt: Prompt
    ids: np.ndarray
    mask: np.ndarray
    scores: np.ndarray


def random_scores(
    rng: np.random.Generator, shape: tuple[int, ...], spread: float, ties: bool, hidden: float, dead: bool
) -> np.ndarray:
    """float32 scores, whole numbers (and zeros of both signs) for ties, -inf with the chance `hidden`.

    Each row keeps a finite score, but for the first if it is `dead`.
    """
    scores = rng.normal(size=shape) * spread
    if ties:
        scores = np.round(scores)
    finite = rng.random(shape) >= hidden
    np.put_along_axis(finite, rng.integers(0, shape[-1], (*shape[:-1], 1)), True, axis=-1)
    scores = np.where(finite, scores, -INF)
    if dead:
        scores[..., 0, :] = -INF
    return scores.astype(np.float32)


def random_batch(
    seed: int, length: int, tokens: int, spread: float, ties: bool, hidden: float, dead: bool = False
) -> Batch:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, tokens, (ROWS, SLOTS), np.int32)
    return Batch(ids, random_scores(rng, (ROWS, VOCAB), spread, ties, hidden, dead), length, rng)


def random_history(
    seed: int, length: int, tokens: int, spread: float, ties: bool, hidden: float, masked: str
) -> History:
    """A prompt at the right of its bucket, and the tokens that follow it in the buffer."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, tokens, (ROWS, SLOTS), np.int32)
    if masked == "nothing":
        mask = np.ones((ROWS, length), bool)
    elif masked == "left":
        mask = np.arange(length) >= rng.integers(0, length, (ROWS, 1))
    else:  # anything: holes, right padding, rows without a token
        mask = rng.random((ROWS, length)) < rng.random((ROWS, 1)) - 0.1
    columns = BUCKET - length
    bucket_ids = np.concatenate([rng.integers(0, VOCAB, (ROWS, columns), np.int32), ids[:, :length]], axis=1)
    bucket_mask = np.pad(mask, ((0, 0), (columns, 0)))
    prompt = Prompt(jnp.asarray(bucket_ids), jnp.asarray(bucket_mask), jnp.int32(length), jnp.int32(ROWS))
    return History(prompt, ids, mask, random_scores(rng, (STEPS, ROWS, VOCAB), spread, ties, hidden, False))


seeds = st.integers(0, 2**63)
spreads = st.sampled_from([0.05, 1.0, 3.0, 10.0, 100.0, 1e4, 1e30])
hiddens = st.sampled_from([0.0, 0.3, 0.9])
alphabets = st.sampled_from([2, 4, VOCAB])


def batches(dead: bool = True, spreads: Any = spreads, lengths: Any = st.integers(1, SLOTS)) -> Any:  # noqa: B008
    deaths = st.booleans() if dead else st.just(False)
    return st.builds(random_batch, seeds, lengths, alphabets, spreads, st.booleans(), hiddens, deaths)


def histories(tokens: int = VOCAB) -> Any:
    return st.builds(
        random_history,
        seeds,
        st.integers(1, BUCKET),
        st.sampled_from([2, 4, tokens]),
        spreads,
        st.booleans(),
        hiddens,
        st.sampled_from(["nothing", "left", "anything"]),
    )


def numbers(least: float, most: float) -> Any:
    """Floats that float32 holds exactly: torch calculates with a double, and it must be the same number."""
    return st.floats(float(np.float32(least)), float(np.float32(most)), width=32, allow_subnormal=False)


def random_cases(**given_arguments: Any) -> Callable[[Any], Any]:
    """A test of 100 random cases, always the same ones."""

    def decorate(test: Any) -> Any:
        every = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        return pytest.mark.oracle(every(given(**given_arguments)(test)))

    return decorate


def assert_same(ours: Any, theirs: Any, rtol: float = 0.0, atol: Any = 0.0) -> None:
    ours, theirs = np.asarray(ours), theirs.numpy()
    assert ours.dtype == np.float32 and ours.shape == theirs.shape
    assert (np.isneginf(ours) == np.isneginf(theirs)).all()
    finite = np.isfinite(theirs)
    assert (np.isnan(ours) == np.isnan(theirs)).all() and (np.isposinf(ours) == np.isposinf(theirs)).all()
    limit = np.broadcast_to(atol, theirs.shape)[finite] + rtol * np.abs(theirs[finite].astype(float))
    assert (np.abs(ours[finite].astype(float) - theirs[finite]) <= limit).all()


def assert_same_but_ties(ours: Any, theirs: Any, batch: Batch) -> None:
    """As `assert_same`, but which of equal scores at the border stay is compared nowhere, only how many.

    transformers sorts without asking for a stable order, so there torch's algorithm decides, which differs between
    CPUs and lengths.
    """
    ours = np.asarray(ours)
    assert (np.sort(ours) == np.sort(theirs.numpy())).all()
    lowest = np.where(np.isfinite(ours), ours, INF).min(axis=1, keepdims=True)
    split = (np.isneginf(ours) & (batch.scores == lowest)).any(axis=1)
    assert_same(ours[~split], theirs[~split])


def of_transformers(name: str, batch: Batch, *args: Any, **kwargs: Any) -> Any:
    import torch
    from transformers.generation import logits_process as reference

    processor = getattr(reference, name)(*args, **kwargs)
    return processor(torch.tensor(batch.ids[:, : batch.length]).long(), torch.tensor(batch.scores))


def of_jaxgen(processor: LogitsProcessor, batch: Batch) -> jax.Array:
    return processed(processor, batch.ids, batch.scores, np.int32(batch.length))


def softmax(scores: np.ndarray) -> np.ndarray:
    """In float64. NaN for rows of -inf only, which no comparison below calls close."""
    with np.errstate(invalid="ignore"):
        raised = np.exp(scores.astype(float) - scores.max(axis=1, keepdims=True).astype(float))
    return raised / raised.sum(axis=1, keepdims=True)


def entropy_terms(p: np.ndarray) -> np.ndarray:
    return -p * np.log(np.where(p > 0, p, 1))


def close(sums: np.ndarray, threshold: Any) -> np.ndarray:
    """Whether sums of float32 may fall on either side of a threshold."""
    return np.abs(sums - threshold) < 1e-5


@random_cases(batch=batches(), temperature=numbers(0.01, 100))
def test_temperature_divides_as_in_transformers(batch: Batch, temperature: float) -> None:
    expected = of_transformers("TemperatureLogitsWarper", batch, temperature)
    assert_same(of_jaxgen(Temperature(np.float32(temperature)), batch), expected, rtol=1e-6)


@random_cases(batch=batches(), top_k=st.integers(1, VOCAB + 3))
def test_top_k_keeps_what_transformers_keeps(batch: Batch, top_k: int) -> None:
    assert_same(of_jaxgen(TopK(np.int32(top_k)), batch), of_transformers("TopKLogitsWarper", batch, top_k))


@random_cases(batch=batches(), top_p=numbers(0, 0.999))
def test_top_p_keeps_what_transformers_keeps(batch: Batch, top_p: float) -> None:
    mass = np.cumsum(np.sort(softmax(batch.scores)), axis=1)[:, :-1]
    assume(not close(mass, 1 - top_p).any())
    expected = of_transformers("TopPLogitsWarper", batch, top_p)
    assert_same_but_ties(of_jaxgen(TopP(np.float32(top_p)), batch), expected, batch)


@random_cases(batch=batches(dead=False, spreads=st.sampled_from([0.05, 1.0, 2.0, 4.0])), top_h=numbers(0.001, 0.999))
def test_top_h_keeps_what_transformers_keeps(batch: Batch, top_h: float) -> None:
    falling = -np.sort(-batch.scores, axis=1)
    terms = entropy_terms(softmax(falling))
    edges = close(np.cumsum(terms, axis=1), top_h * terms.sum(axis=1, keepdims=True)) & np.isfinite(falling)
    assume(not edges[:, 1:].any())
    expected = of_transformers("TopHLogitsWarper", batch, top_h)
    assert_same_but_ties(of_jaxgen(TopH(np.float32(top_h)), batch), expected, batch)


@random_cases(batch=batches(), min_p=numbers(0, 1))
def test_min_p_keeps_what_transformers_keeps(batch: Batch, min_p: float) -> None:
    p = softmax(batch.scores)
    share = p / p.max(axis=1, keepdims=True)
    assume(not ((np.abs(share - min_p) < 1e-5 * min_p) & (share < 1)).any())
    assert_same(of_jaxgen(MinP(np.float32(min_p)), batch), of_transformers("MinPLogitsWarper", batch, min_p))


@random_cases(batch=batches(), typical_p=numbers(0.001, 0.999))
def test_typical_keeps_what_transformers_keeps(batch: Batch, typical_p: float) -> None:
    p = softmax(batch.scores)
    with np.errstate(invalid="ignore"):
        surprise = (
            -(batch.scores.astype(float) - batch.scores.max(axis=1, keepdims=True)) - np.log(p.max(axis=1))[:, None]
        )
    distance = np.abs(surprise - entropy_terms(p).sum(axis=1, keepdims=True))
    order = np.argsort(distance, axis=1, kind="stable")
    mass = np.cumsum(np.take_along_axis(p, order, axis=1), axis=1)
    last = np.take_along_axis(order, np.minimum((mass < typical_p).sum(axis=1), VOCAB - 1)[:, None], axis=1)
    border = np.take_along_axis(distance, last, axis=1)
    with np.errstate(invalid="ignore"):
        near = np.abs(distance - border) < 1e-5 * (1 + border)
    ties = near & (batch.scores != np.take_along_axis(batch.scores, last, axis=1))
    assume(not close(mass, typical_p).any() and not ties.any())
    expected = of_transformers("TypicalLogitsWarper", batch, typical_p)
    assert_same(of_jaxgen(Typical(np.float32(typical_p)), batch), expected)


@random_cases(batch=batches(), epsilon=numbers(0.0001, 0.999))
def test_epsilon_keeps_what_transformers_keeps(batch: Batch, epsilon: float) -> None:
    assume(not (np.abs(softmax(batch.scores) - epsilon) < 1e-5 * epsilon).any())
    expected = of_transformers("EpsilonLogitsWarper", batch, epsilon)
    assert_same(of_jaxgen(Epsilon(np.float32(epsilon)), batch), expected)


@random_cases(batch=batches(dead=False), epsilon=numbers(0.0001, 0.999))
def test_eta_keeps_what_transformers_keeps(batch: Batch, epsilon: float) -> None:
    p = softmax(batch.scores)
    eta = np.minimum(epsilon, np.sqrt(epsilon) * np.exp(-entropy_terms(p).sum(axis=1, keepdims=True)))
    assume(not (np.abs(p - eta) < 1e-5 * eta).any())
    assert_same(of_jaxgen(Eta(np.float32(epsilon)), batch), of_transformers("EtaLogitsWarper", batch, epsilon))


# Beyond 128 scores a nucleus is found by bisection, and beyond some thousands the highest scores by blocks.
AT_REAL_SIZES: dict[str, tuple[Any, str, float | int, int]] = {
    "the highest 300": (TopK, "TopKLogitsWarper", 300, 0),
    "a wide nucleus": (TopP, "TopPLogitsWarper", 0.9, 1),
    "a small nucleus": (TopP, "TopPLogitsWarper", 0.1, 1),
    "a nucleus of three at least": (TopP, "TopPLogitsWarper", 1e-6, 3),
    "a share of the likeliest": (MinP, "MinPLogitsWarper", 0.02, 1),
    "three at least of a share": (MinP, "MinPLogitsWarper", 1.0, 3),
    "typical ones": (Typical, "TypicalLogitsWarper", 0.6, 1),
    "three typical ones at least": (Typical, "TypicalLogitsWarper", 1e-6, 3),
    "those above a probability": (Epsilon, "EpsilonLogitsWarper", 3e-4, 1),
    "those above a falling probability": (Eta, "EtaLogitsWarper", 3e-4, 1),
    "most of the entropy": (TopH, "TopHLogitsWarper", 0.8, 0),
}


@pytest.mark.oracle
@pytest.mark.parametrize("vocab_size", [129, 20_000])
@pytest.mark.parametrize("case", AT_REAL_SIZES)
def test_large_vocabularies_keep_what_transformers_keeps(case: str, vocab_size: int) -> None:
    rule, name, number, keep = AT_REAL_SIZES[case]
    rng = np.random.default_rng(vocab_size)
    batch = Batch(np.zeros((4, 1), np.int32), 2 * rng.normal(size=(4, vocab_size)).astype(np.float32), 1, rng)
    if rule is TopK:
        number = min(number, vocab_size - 9)
    ours = rule(np.int32(number)) if rule is TopK else rule(np.float32(number), *([keep] if keep else []))
    theirs = of_transformers(name, batch, number, **({"min_tokens_to_keep": keep} if keep > 1 else {}))
    found, expected = np.isfinite(of_jaxgen(ours, batch)), np.isfinite(theirs.numpy())
    assert (expected.sum(axis=1) >= max(keep, 1)).all() and not expected.all()
    # Sums of thousands of float32 differ in their last digits, so a token at the border may be on either side of it.
    assert ((found != expected).sum(axis=1) <= (vocab_size > 1000 and expected.sum(axis=1) > 100)).all()


@pytest.mark.parametrize("vocab_size", [129, 1000])
@pytest.mark.parametrize("kept", [1, 2, 100, 128])
def test_of_many_equal_scores_top_p_removes_those_of_the_lower_columns(kept: int, vocab_size: int) -> None:
    scores = np.full((2, vocab_size), -3.0)
    scores[1, ::2] = -INF  # half of them have no chance
    columns = [np.arange(vocab_size), np.arange(1, vocab_size, 2)]
    for row, possible in enumerate(columns):
        count = min(kept, len(possible))
        top_p = np.float32((count - 0.5) / len(possible))
        found = np.flatnonzero(np.isfinite(apply(TopP(top_p), scores)[row]))
        np.testing.assert_array_equal(found, possible[-count:])


@random_cases(batch=batches())
def test_log_probabilities_are_those_of_transformers(batch: Batch) -> None:
    # Near 0 a log-probability is the rounding of log 1.
    assert_same(of_jaxgen(LogitNormalization(), batch), of_transformers("LogitNormalization", batch), 1e-5, 1e-6)


@pytest.mark.parametrize("size", [1, 3, *(pytest.param(size, marks=pytest.mark.sweep) for size in (2, 4))])
@random_cases(batch=batches())
def test_n_grams_of_the_row_are_banned_as_in_transformers(size: int, batch: Batch) -> None:
    ids = batch.ids + (VOCAB - 2) * (batch.length % 2)  # every other case has ids beyond the scores
    batch = batch._replace(ids=ids)
    assert_same(of_jaxgen(NoRepeatNGram(size), batch), of_transformers("NoRepeatNGramLogitsProcessor", batch, size))


def assert_same_steps(processor: LogitsProcessor, reference: Any, history: History, rtol: float = 0.0) -> None:
    import torch

    state = started(processor, history.prompt, VOCAB)
    for step, scores in enumerate(history.scores):
        length = history.mask.shape[1] + step
        ours, state = stepped(processor, history.ids, scores, np.int32(length), state)
        assert_same(ours, reference(torch.tensor(history.ids[:, :length]).long(), torch.tensor(scores)), rtol)


@pytest.mark.parametrize("size", [1, 3, *(pytest.param(size, marks=pytest.mark.sweep) for size in (2, 4))])
@random_cases(history=histories())
def test_n_grams_of_the_prompt_are_banned_as_in_transformers(size: int, history: History) -> None:
    import torch
    from transformers.generation.logits_process import EncoderNoRepeatNGramLogitsProcessor

    prompt = torch.tensor(history.ids[:, : history.mask.shape[1]]).long()
    assert_same_steps(EncoderNoRepeatNGram(size), EncoderNoRepeatNGramLogitsProcessor(size, prompt), history)


@random_cases(history=histories(VOCAB + 4), penalty=numbers(0.05, 20))
def test_tokens_of_the_row_are_penalised_as_in_transformers(history: History, penalty: float) -> None:
    import torch
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    padding = torch.tensor(history.mask.argmax(axis=1))
    reference = RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=padding)
    assert_same_steps(RepetitionPenalty(np.float32(penalty)), reference, history, rtol=1e-6)


@random_cases(history=histories(), penalty=numbers(0.05, 20))
def test_tokens_of_the_prompt_are_encouraged_as_in_transformers(history: History, penalty: float) -> None:
    import torch
    from transformers.generation.logits_process import EncoderRepetitionPenaltyLogitsProcessor

    prompt = torch.tensor(history.ids[:, : history.mask.shape[1]]).long()
    reference = EncoderRepetitionPenaltyLogitsProcessor(penalty, prompt)
    assert_same_steps(EncoderRepetitionPenalty(np.float32(penalty)), reference, history, rtol=1e-6)


def random_words(batch: Batch, count: int) -> list[list[int]]:
    """Sequences of tokens; most end a row of the batch and go on with one token more."""
    words = {}
    for _ in range(count):
        size = int(batch.rng.integers(0, 9))
        word = batch.rng.integers(0, VOCAB, size + 1).tolist()
        if batch.rng.random() < 0.8:
            word = [*batch.ids[batch.rng.integers(ROWS), max(batch.length - size, 0) : batch.length], word[-1] % 4]
        words[tuple(int(token) for token in word)] = None
    return [[*word] for word in words]


@random_cases(batch=batches(), count=st.integers(1, 8))
def test_sequences_are_biased_as_in_transformers(batch: Batch, count: int) -> None:
    biases = {tuple(word): float(batch.rng.integers(-99, 99) / 4) for word in random_words(batch, count)}
    expected = of_transformers("SequenceBiasLogitsProcessor", batch, biases)
    # The score and its biases are added in any order.
    assert_same(of_jaxgen(bias_of(biases, VOCAB), batch), expected, 1e-6, 1e-6 * sum(map(abs, biases.values())))


@random_cases(batch=batches(), count=st.integers(1, 8))
def test_words_are_forbidden_as_in_transformers(batch: Batch, count: int) -> None:
    words = random_words(batch, count)
    expected = of_transformers("NoBadWordsLogitsProcessor", batch, words)
    assert_same(of_jaxgen(bias_of(dict.fromkeys(map(tuple, words), -INF), VOCAB), batch), expected)


id_lists = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5)
any_id_lists = st.lists(st.integers(-3, VOCAB + 3), max_size=5)


@random_cases(batch=batches(), min_length=st.integers(0, SLOTS + 2), eos=id_lists)
def test_the_end_is_forbidden_as_in_transformers(batch: Batch, min_length: int, eos: list[int]) -> None:
    processor = MinLength(np.int32(min_length), token_mask(eos, VOCAB))
    assert_same(of_jaxgen(processor, batch), of_transformers("MinLengthLogitsProcessor", batch, min_length, eos))


@random_cases(batch=batches(), prompt_length=st.integers(1, SLOTS), new_tokens=st.integers(0, SLOTS), eos=id_lists)
def test_the_end_is_forbidden_before_new_tokens_as_in_transformers(
    batch: Batch, prompt_length: int, new_tokens: int, eos: list[int]
) -> None:
    processor = MinLength(np.int32(prompt_length + new_tokens), token_mask(eos, VOCAB))
    expected = of_transformers("MinNewTokensLengthLogitsProcessor", batch, prompt_length, new_tokens, eos)
    assert_same(of_jaxgen(processor, batch), expected)


@random_cases(batch=batches(), after=st.integers(-1, 1), eos=id_lists)
def test_the_end_is_forced_as_in_transformers(batch: Batch, after: int, eos: list[int]) -> None:
    processor = ForceTokensAt(np.int32(batch.length + after), token_mask(eos, VOCAB))
    expected = of_transformers("ForcedEOSTokenLogitsProcessor", batch, batch.length + after + 1, eos)
    assert_same(of_jaxgen(processor, batch), expected)


@random_cases(batch=batches(lengths=st.integers(1, 2)), bos=st.integers(0, VOCAB - 1))
def test_the_start_is_forced_as_in_transformers(batch: Batch, bos: int) -> None:
    processor = ForceTokensAt(np.int32(1), token_mask([bos], VOCAB))
    assert_same(of_jaxgen(processor, batch), of_transformers("ForcedBOSTokenLogitsProcessor", batch, bos))


@random_cases(batch=batches(), invalid=st.sampled_from([0.0, 0.1, 0.5]))
def test_invalid_scores_are_replaced_as_in_transformers(batch: Batch, invalid: float) -> None:
    where = batch.rng.random(batch.scores.shape) < invalid
    batch.scores[where] = batch.rng.choice([np.nan, INF, -INF], where.sum())
    assert_same(of_jaxgen(InfNanRemove(), batch), of_transformers("InfNanRemoveLogitsProcessor", batch))


@random_cases(
    batch=batches(spreads=st.sampled_from([0.05, 1.0, 10.0, 1e4])),
    start=st.one_of(st.integers(-500, 0), st.integers(0, SLOTS)),
    prompt_length=st.integers(1, SLOTS),
    factor=numbers(-2, 3),
    eos=id_lists,
)
def test_the_end_gets_likelier_as_in_transformers(
    batch: Batch, start: int, prompt_length: int, factor: float, eos: list[int]
) -> None:
    late = max(batch.length - start - prompt_length, 0)
    assume(abs(factor) <= 1 or late * np.log(abs(factor)) < np.log(1e30))
    processor = ExponentialDecayLengthPenalty(
        np.int32(start + prompt_length), np.float32(factor), token_mask(eos, VOCAB)
    )
    expected = of_transformers("ExponentialDecayLengthPenalty", batch, (start, factor), eos, prompt_length)
    # A raise can be as large as the score and of the other sign, so the error is a share of the score.
    atol = 1e-6 * np.abs(np.where(np.isfinite(batch.scores), batch.scores, 0))
    # 1e-4, as a float32 power of hundreds of steps has the error of its logarithm times their number.
    assert_same(of_jaxgen(processor, batch), expected, rtol=1e-4, atol=atol)


@random_cases(batch=batches(), suppressed=any_id_lists)
def test_tokens_are_suppressed_as_in_transformers(batch: Batch, suppressed: list[int]) -> None:
    expected = of_transformers("SuppressTokensLogitsProcessor", batch, suppressed)
    assert_same(of_jaxgen(SuppressTokens(token_mask(suppressed, VOCAB)), batch), expected)


@random_cases(batch=batches(), after=st.integers(-1, 1), suppressed=any_id_lists)
def test_tokens_are_suppressed_at_the_beginning_as_in_transformers(
    batch: Batch, after: int, suppressed: list[int]
) -> None:
    begin = batch.length + after
    expected = of_transformers("SuppressTokensAtBeginLogitsProcessor", batch, suppressed, begin)
    assert_same(of_jaxgen(SuppressTokensAtBegin(np.int32(begin), token_mask(suppressed, VOCAB)), batch), expected)


def test_every_rule_is_compared() -> None:
    rules = {
        name
        for name, rule in vars(logits_process).items()
        if isinstance(rule, type) and issubclass(rule, LogitsProcessor) and rule.__module__ == logits_process.__name__
    }
    assert rules - {"Warper", "Custom"} == {name for name in rules if name in globals()}

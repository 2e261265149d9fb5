"""Python inside a program: what it is given, where its results go, and how its errors come out."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.generation.running import host_callbacks
from jaxgen.generation.running.host_callbacks import (
    HostCriterion,
    HostFunctions,
    HostProcessor,
    for_criterion,
    for_prefix,
    for_processor,
)

# A bucket of four rows and eight columns, of which three and five are the caller's.
ROWS, COLUMNS, VOCAB = 3, 5, 7
IDS = np.arange(32, dtype=np.int32).reshape(4, 8) % VOCAB
SCORES = np.random.default_rng(0).standard_normal((4, VOCAB)).astype(np.float32)


@jax.jit
def called(rule: Any, ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
    return rule(ids, scores, cur_len)


def run(kind: Any, function: Any, scores: Any = SCORES, host: HostFunctions | None = None) -> np.ndarray:
    """What a program with this function gives."""
    host = HostFunctions() if host is None else host
    rule = kind(host.add(function, "logits_processor"), ROWS)
    with host.registered():
        return np.asarray(called(rule, IDS, jnp.asarray(scores), np.int32(COLUMNS)))


def processed(function: Any, scores: Any = SCORES) -> np.ndarray:
    return run(HostProcessor, for_processor(function), scores)


def finished(function: Any) -> np.ndarray:
    return run(HostCriterion, for_criterion(function))


# ---- Processors ----


def test_a_numpy_function_gets_the_callers_rows_and_the_valid_columns_and_the_other_rows_stay() -> None:
    def checked(input_ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        assert (type(input_ids), input_ids.dtype, type(scores), scores.dtype) == (
            np.ndarray, np.int32, np.ndarray, np.float32,
        )  # fmt: skip
        np.testing.assert_array_equal(input_ids, IDS[:ROWS, :COLUMNS])
        np.testing.assert_array_equal(scores, SCORES[:ROWS])
        return scores * [[1], [2], [3]]

    found = processed(checked)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, SCORES * np.float32([[1], [2], [3], [1]]))


def test_a_function_may_write_into_what_it_is_given_and_only_its_result_counts() -> None:
    def scribble(input_ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        result = scores + 1
        input_ids[:], scores[:] = 6, -1
        return result

    np.testing.assert_array_equal(processed(scribble)[:ROWS], SCORES[:ROWS] + 1)

    def in_place(input_ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        scores[:, 2] = -np.inf
        return scores

    found = processed(in_place)
    assert np.isneginf(found[:ROWS, 2]).all() and np.isfinite(found[ROWS:]).all()


def test_what_a_function_keeps_of_its_arguments_stays_as_it_was() -> None:
    kept: list[np.ndarray] = []

    def keep(input_ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        kept.extend((input_ids, scores))
        return scores + 1

    processed(keep)
    np.testing.assert_array_equal(kept[0], IDS[:ROWS, :COLUMNS])
    np.testing.assert_array_equal(kept[1], SCORES[:ROWS])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda dtype: dtype.__name__)
def test_a_result_of_another_dtype_is_cast_to_that_of_the_scores(dtype: Any) -> None:
    scores = jnp.asarray(SCORES, dtype)
    found = processed(lambda input_ids, scores: scores.astype(np.float64) * 3, scores)
    assert found.dtype == dtype
    expected = (np.asarray(scores[:ROWS], np.float64) * 3).astype(dtype)
    np.testing.assert_array_equal(found, np.concatenate([expected, scores[ROWS:]]))
    assert processed(lambda input_ids, scores: scores.tolist(), scores).dtype == dtype


@pytest.mark.oracle
def test_a_processor_and_a_criterion_of_transformers_get_tensors_of_their_own() -> None:
    import torch
    import transformers

    def check(input_ids: Any) -> None:
        assert isinstance(input_ids, torch.Tensor) and input_ids.dtype == torch.long
        np.testing.assert_array_equal(input_ids.numpy(), IDS[:ROWS, :COLUMNS])

    class Negated(transformers.LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            check(input_ids)
            assert isinstance(scores, torch.Tensor) and scores.dtype == torch.float32
            np.testing.assert_array_equal(scores.numpy(), SCORES[:ROWS])
            return scores.neg_()

    class SecondRow(transformers.StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            check(input_ids)
            assert scores is None and not kwargs
            return torch.tensor([False, True, False])

    np.testing.assert_array_equal(processed(Negated()), np.concatenate([-SCORES[:ROWS], SCORES[ROWS:]]))
    np.testing.assert_array_equal(finished(SecondRow()), [False, True, False, True])


@pytest.mark.parametrize("shape", [(VOCAB,), (1, VOCAB), (ROWS, 1), (ROWS, VOCAB, 1), ()], ids=str)
def test_scores_are_never_broadcast_to_the_shape_they_should_have(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"returned scores of shape \(.*\), but got \(3, 7\)"):
        processed(lambda input_ids, scores: np.zeros(shape))


def test_functions_are_called_in_the_order_of_the_program_and_of_its_steps() -> None:
    seen: list[tuple[str, int]] = []

    def named(name: str) -> Any:
        def function(input_ids: np.ndarray, scores: np.ndarray | None) -> Any:
            seen.append((name, input_ids.shape[1]))
            return False if scores is None else scores + 1

        return function

    host = HostFunctions()
    first, second = (HostProcessor(host.add(for_processor(named(each)), "logits_processor"), ROWS) for each in "ab")
    last = HostCriterion(host.add(for_criterion(named("c")), "stopping_criteria"), ROWS)

    @jax.jit
    def steps(scores: jax.Array) -> jax.Array:
        def step(cur_len: Any, scores: jax.Array) -> jax.Array:
            scores = second(IDS, first(IDS, scores, cur_len), cur_len)
            return scores + last(IDS, scores, cur_len)[:, None]

        return jax.lax.fori_loop(COLUMNS, COLUMNS + 3, step, scores)

    with host.registered():
        found = np.asarray(steps(np.zeros_like(SCORES)))
    assert seen == [(name, columns) for columns in (5, 6, 7) for name in "abc"]
    np.testing.assert_array_equal(found[:, 0], [6, 6, 6, 3])  # the last row is finished at every step


# ---- Criteria ----


def test_a_numpy_criterion_gets_the_callers_rows_and_no_scores_and_the_other_rows_are_finished() -> None:
    def criterion(input_ids: np.ndarray, scores: None) -> np.ndarray:
        assert input_ids.dtype == np.int32 and scores is None
        np.testing.assert_array_equal(input_ids, IDS[:ROWS, :COLUMNS])
        input_ids[:] = 0
        return np.array([True, False, True])

    found = finished(criterion)
    assert found.dtype == bool
    np.testing.assert_array_equal(found, [True, False, True, True])


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (False, [False, False, False, True]),
        (np.True_, [True, True, True, True]),
        ([0, 1, 0], [False, True, False, True]),
        (np.array([0.0, 0.0, 2.0]), [False, False, True, True]),
    ],
    ids=["one bool", "one of NumPy", "ints", "floats"],
)
def test_whatever_a_criterion_returns_is_a_bool_for_each_row(result: Any, expected: list[bool]) -> None:
    np.testing.assert_array_equal(finished(lambda input_ids, scores: result), expected)


@pytest.mark.parametrize("result", [[True, False], [True] * 4, [[True], [True], [True]]], ids=str)
def test_a_criterion_for_another_number_of_rows_is_an_error(result: Any) -> None:
    with pytest.raises(ValueError, match=r"returned shape \(.*\), but there are 3 rows"):
        finished(lambda input_ids, scores: np.array(result))


# ---- Prefixes ----


def test_a_prefix_function_gets_the_number_of_the_prompt_and_the_row_so_far() -> None:
    seen: list[tuple[int, list[int]]] = []

    def allowed(batch_id: int, tokens: np.ndarray) -> list[int]:
        seen.append((batch_id, tokens.tolist()))
        return [batch_id, 6]

    found = for_prefix(allowed, copies=2)(IDS[:, :COLUMNS], SCORES)
    assert seen == [(row // 2, IDS[row, :COLUMNS].tolist()) for row in range(4)]
    kept = np.array([[0, 6], [0, 6], [1, 6], [1, 6]])
    expected = np.full_like(SCORES, -np.inf)
    np.put_along_axis(expected, kept, np.take_along_axis(SCORES, kept, axis=1), axis=1)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.oracle
@pytest.mark.parametrize("copies", [1, 2, 3])
def test_constrained_scores_equal_transformers_where_the_model_rules_everything_out_too(copies: int) -> None:
    import torch
    import transformers

    rng = np.random.default_rng(copies)
    sets = [rng.choice(VOCAB, int(rng.integers(1, 4)), replace=False).tolist() for _ in range(200)]
    ids = rng.integers(0, VOCAB, (6, 4))
    for number in range(0, 200, 10):

        def allowed(batch_id: int, tokens: Any, number: int = number) -> list[int]:
            return sets[(number + 5 * batch_id + int(tokens[-1])) % 200]

        scores = np.where(rng.random((6, VOCAB)) < 0.7, -np.inf, rng.standard_normal((6, VOCAB))).astype(np.float32)
        theirs = transformers.PrefixConstrainedLogitsProcessor(allowed, copies)(torch.tensor(ids), torch.tensor(scores))
        np.testing.assert_array_equal(for_prefix(allowed, copies)(ids, scores), theirs)


@pytest.mark.parametrize("allowed", [4, np.int64(4), np.array([4]), (4,), [[4]]], ids=repr)
def test_the_allowed_tokens_may_be_an_id_or_any_array_of_ids(allowed: Any) -> None:
    found = for_prefix(lambda batch_id, tokens: allowed, 1)(IDS, SCORES)
    np.testing.assert_array_equal(np.isfinite(found), np.arange(VOCAB) == np.full((4, 1), 4))


def test_an_id_below_zero_is_refused_by_name_and_number() -> None:
    with pytest.raises(ValueError, match="allowed -1 for batch ID 1, but ids of this model are 0 to 6"):
        for_prefix(lambda batch_id, tokens: [3, -1] if batch_id else [3], 2)(IDS, SCORES)


# ---- What is registered ----


@pytest.mark.parametrize("kind", ["processor", "criterion"])
def test_an_error_comes_out_of_the_program_as_the_object_that_was_raised(kind: str) -> None:
    error = LookupError("of my own")

    def fail(input_ids: np.ndarray, scores: np.ndarray | None) -> Any:
        raise error

    with pytest.raises(LookupError, match="of my own") as caught:
        processed(fail) if kind == "processor" else finished(fail)
    assert caught.value is error and caught.value.__cause__ is not None
    assert not host_callbacks._functions
    np.testing.assert_array_equal(processed(lambda input_ids, scores: scores), SCORES)


def test_an_error_of_the_program_itself_stays_what_it_is() -> None:
    host = HostFunctions()
    host.add(for_processor(lambda input_ids, scores: scores), "logits_processor")
    with pytest.raises(ZeroDivisionError), host.registered():
        _ = 1 / 0
    assert not host_callbacks._functions


def test_functions_can_be_called_while_they_are_registered_and_not_before_or_after() -> None:
    host = HostFunctions()
    number = host.add(for_processor(lambda input_ids, scores: scores + 1), "logits_processor")
    assert int(number) not in host_callbacks._functions
    for _ in range(2):  # the same functions, again and again
        with host.registered():
            assert int(number) in host_callbacks._functions
            np.testing.assert_array_equal(
                called(HostProcessor(number, ROWS), IDS, jnp.asarray(SCORES), np.int32(COLUMNS))[:ROWS],
                SCORES[:ROWS] + 1,
            )
        assert int(number) not in host_callbacks._functions


def test_calls_within_calls_have_functions_of_their_own() -> None:
    outer, inner = HostFunctions(), HostFunctions()
    one, two = (host.add(for_processor(np.add), "logits_processor") for host in (outer, inner))
    assert one.dtype == two.dtype == np.int32 and one != two
    with outer.registered():
        with inner.registered():
            assert {int(one), int(two)} <= {*host_callbacks._functions}
        assert int(one) in host_callbacks._functions and int(two) not in host_callbacks._functions


def test_another_function_compiles_nothing() -> None:
    processed(lambda input_ids, scores: scores)
    before = called._cache_size()
    processed(lambda input_ids, scores: scores * 2)
    assert called._cache_size() == before


def test_a_call_without_functions_is_known_as_one() -> None:
    host = HostFunctions()
    assert not host
    host.add(for_processor(np.add), "logits_processor")
    assert host

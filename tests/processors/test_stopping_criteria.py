"""When a row is finished: by an id, at a length, or by what the caller says."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.processors.stopping_criteria import CustomCriterion, EosToken, MaxLength, any_of

VOCAB = 97
IDS = np.array([[5, 6, 7, 2], [7, 2, 5, 6], [2, 7, 6, 5]], np.int32)
SCORES = np.arange(3 * VOCAB, dtype=np.float32).reshape(3, VOCAB)


@jax.jit
def finished(criterion: Any, input_ids: jax.Array, cur_len: jax.Array) -> jax.Array:
    return criterion(input_ids, jnp.asarray(SCORES), cur_len)


@pytest.mark.parametrize(
    ("ids", "kept", "places"),
    [
        ([], [], 8),
        ([2], [2], 8),
        ([7, 2, 96, 0], [7, 2, 96, 0], 8),
        ([-1, 2, VOCAB, 2**40], [2], 8),
        (range(8), [*range(8)], 8),
        (range(9), [*range(9)], 12),
        (range(VOCAB), [*range(VOCAB)], 128),
    ],
    ids=["none", "one", "several in their order", "out of the vocabulary", "eight", "nine", "all"],
)
def test_the_ids_of_a_model_stand_in_front_of_places_that_hold_none(ids: Any, kept: list[int], places: int) -> None:
    eos = EosToken.build(ids, VOCAB).eos_token_id
    assert eos.dtype == np.int32
    assert eos.tolist() == [*kept, *[-1] * (places - len(kept))]


def test_up_to_eight_ids_share_a_program() -> None:
    program = jax.jit(lambda criterion: criterion(jnp.asarray(IDS), jnp.asarray(SCORES), jnp.int32(4)))
    for ids in ([], [2], [*range(8)]):
        program(EosToken.build(ids, VOCAB))
    assert program._cache_size() == 1


@pytest.mark.parametrize("ids", [[], [2], [6, 2], [40, *range(9, 60), 7]], ids=["none", "one", "two", "more"])
@pytest.mark.parametrize("cur_len", [1, 2, 3, 4])
def test_a_row_ends_with_the_last_valid_column_and_no_other(ids: list[int], cur_len: int) -> None:
    expected = np.isin(IDS[:, cur_len - 1], ids)
    np.testing.assert_array_equal(finished(EosToken.build(ids, VOCAB), IDS, np.int32(cur_len)), expected)


@pytest.mark.parametrize("length", [0, 3, 4, 5, 2**31 - 1])
def test_all_rows_end_as_soon_as_a_length_is_reached(length: int) -> None:
    assert [bool(finished(MaxLength(length), IDS, np.int32(columns))) for columns in (3, 4)] == [
        length <= 3, length <= 4,
    ]  # fmt: skip


@pytest.mark.oracle
@pytest.mark.parametrize("cur_len", [1, 3, 4])
def test_ids_and_lengths_finish_the_rows_that_they_do_in_transformers(cur_len: int) -> None:
    import torch
    import transformers

    text = torch.tensor(IDS[:, :cur_len])
    for ids in (2, [2], [5, 7]):
        theirs = transformers.EosTokenCriteria(ids)(text, None)
        ours = EosToken.build([ids] if isinstance(ids, int) else ids, VOCAB)
        np.testing.assert_array_equal(finished(ours, IDS, np.int32(cur_len)), theirs)
    for length in range(6):
        theirs = transformers.MaxLengthCriteria(length)(text, None)
        np.testing.assert_array_equal(np.repeat(finished(MaxLength(length), IDS, np.int32(cur_len)), 3), theirs)


def by_score(limit: jax.Array, input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
    return (input_ids[:, 0] == 5) | (scores[:, cur_len] > limit)


def test_the_callers_function_sees_ids_scores_and_length() -> None:
    function = jax.tree_util.Partial(by_score, np.float32(SCORES[1, 3]))
    for cur_len, expected in ((3, [True, False, True]), (4, [True, True, True])):
        found = finished(CustomCriterion(function, type(function)), IDS, np.int32(cur_len))
        np.testing.assert_array_equal(found, expected)


def test_the_class_of_the_callers_object_is_part_of_the_compile_key_and_its_numbers_are_not() -> None:
    function = jax.tree_util.Partial(by_score, np.float32(1))
    criterion = CustomCriterion(function, int)
    structures = [
        jax.tree.structure(each)
        for each in (
            criterion,
            CustomCriterion(jax.tree_util.Partial(by_score, np.float32(2)), int),
            replace(criterion, kind=float),
        )
    ]
    assert structures[0] == structures[1] != structures[2]


def test_any_criterion_of_several_finishes_a_row() -> None:
    @jax.jit
    def any_finished(criteria: Any, cur_len: jax.Array) -> jax.Array:
        return any_of(criteria, jnp.asarray(IDS), jnp.asarray(SCORES), cur_len)

    twos, sevens, end = EosToken([2]), EosToken([7]), MaxLength(4)
    table: list[tuple[Any, int, list[bool]]] = [
        ((), 4, [False, False, False]),
        ((twos,), 4, [True, False, False]),
        ((sevens, twos), 3, [True, False, False]),
        ((sevens, twos), 2, [False, True, True]),
        ((twos, end), 3, [False, False, False]),
        ((end, twos), 4, [True, True, True]),
    ]
    for criteria, cur_len, expected in table:
        found = any_finished(criteria, np.int32(cur_len))
        assert (found.dtype, found.tolist()) == (bool, expected)

"""Prompts in their buckets: which column of the text is in which slot of the cache, and what the model reads."""

from typing import Any

import numpy as np
import pytest

import jaxgen
from jaxgen.base import Prefill
from jaxgen.generation.prompt.inputs import Inputs
from jaxgen.generation.prompt.prompts import guided_prompt, padded_prompt


@pytest.fixture(scope="module")
def model() -> Any:
    return jaxgen.load(jaxgen.BUNDLED_MODEL)


def inputs(rows: int, columns: int, **changes: Any) -> Inputs:
    ids = np.arange(5, 5 + rows * columns, dtype=np.int32).reshape(rows, columns)
    mask = np.ones((rows, columns), bool)
    mask[0, 0] = False
    return Inputs(ids, mask, mask, changes.pop("num_new", columns), **changes)


def test_a_plain_prompt_is_all_that_the_model_reads(model: Any) -> None:
    prompt, prefill, slots = padded_prompt(model, inputs(5, 5), None, 0, 10)
    assert prefill is None and np.shape(prompt.input_ids) == (6, 16)
    assert slots.tolist() == [11, 12, 13, 14, 15]
    assert (int(prompt.rows), int(prompt.length)) == (5, 5)
    assert prompt.attention_mask[0].tolist() == [False] * 12 + [True] * 4 and not prompt.attention_mask[5].any()


def read(prefill: Prefill | None) -> Prefill:
    assert prefill is not None
    return prefill


@pytest.mark.parametrize(
    ("columns", "chunk", "full", "expected"),
    [
        (6, 3, 1, [0, 1, 2, 3, 4, 5]),
        (7, 3, 2, [0, 1, 2, 3, 4, 5, 8]),  # the last chunk is padded on the left
        (8, 3, 2, [0, 1, 2, 3, 4, 5, 7, 8]),
    ],
)
def test_chunks_are_full_but_for_the_last(columns: int, chunk: int, full: int, expected: list[int], model: Any) -> None:
    given = inputs(2, columns)
    _, prefill, slots = padded_prompt(model, given, chunk, 0, 10)
    prefill = read(prefill)
    assert slots.tolist() == expected
    assert (prefill.chunk, int(prefill.full_chunks)) == (chunk, full)  # pyright: ignore[reportArgumentType]
    np.testing.assert_array_equal(np.asarray(prefill.inputs)[:2, expected], given.input_ids)
    np.testing.assert_array_equal(np.asarray(prefill.attention_mask)[:2, expected], given.attention_mask)
    assert np.asarray(prefill.attention_mask).sum() == given.attention_mask.sum()
    assert np.asarray(prefill.position_ids)[0, expected].tolist() == [0, *range(columns - 1)]


def test_a_chunk_that_holds_the_whole_prompt_is_none(model: Any) -> None:
    assert padded_prompt(model, inputs(1, 6), 6, 0, 10)[1] is None


def test_positions_of_the_callers_own_are_laid_beside_the_tokens(model: Any) -> None:
    positions = np.array([[7, 8, 9]], np.int32)
    _, prefill, slots = padded_prompt(model, inputs(1, 3, position_ids=positions), None, 0, 10)
    np.testing.assert_array_equal(np.asarray(read(prefill).position_ids)[:1, slots], positions)


def test_reserved_slots_fix_every_shape_whatever_the_length_of_the_prompt(model: Any) -> None:
    shapes = set()
    for columns in (2, 33, 200):
        prompt, prefill, _ = padded_prompt(model, inputs(1, columns), None, 512, 100)
        prefill = read(prefill)
        assert prefill.past is not None and prefill.past.slots == 512
        shapes.add((np.shape(prompt.input_ids), np.shape(prefill.inputs), prefill.chunk))
    assert len(shapes) == 1


def test_reserved_slots_double_until_the_prompt_and_its_answer_fit(model: Any) -> None:
    prompt, prefill, _ = padded_prompt(model, inputs(1, 500), None, 512, 100)
    past = read(prefill).past
    assert past is not None and past.slots == 1024 and np.shape(prompt.input_ids)[1] == 1024


def test_negative_prompts_stand_below_the_others_and_count_their_columns(model: Any) -> None:
    given = inputs(5, 5)
    negative, mask = np.array([[9, 8]] * 5, np.int32), np.array([[0, 1]] * 5, bool)
    prompt, prefill, slots = guided_prompt(model, given, negative, mask, 1.5)
    assert np.shape(prompt.input_ids) == (6, 16) and (int(prompt.rows), int(prompt.length)) == (5, 5)
    assert slots.tolist() == [11, 12, 13, 14, 15] and float(prefill.guidance_scale) == 1.5  # pyright: ignore
    assert np.asarray(prefill.inputs)[6:, -2:].tolist() == [[9, 8]] * 5 + [[0, 0]]
    assert np.asarray(prefill.attention_mask)[6, -3:].tolist() == [False, False, True]
    positions = np.asarray(prefill.position_ids)
    assert positions[0, -5:].tolist() == [0, 0, 1, 2, 3] and positions[6, -3:].tolist() == [0, 0, 1]

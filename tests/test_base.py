"""What stands in `base.py` besides Protocols: prompts, prefills and calls as data."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxgen
from jaxgen.base import Call, Prefill, Prompt
from jaxgen.kv_cache import KVCache

# Two prompts of three columns, the first of which is padded by the caller, in a bucket of 4 rows and 5 columns.
IDS = np.array([[0, 0, 9, 5, 6], [0, 0, 7, 8, 9], [0] * 5, [0] * 5])
MASK = np.array([[0, 0, 0, 1, 1], [0, 0, 1, 1, 1], [0] * 5, [0] * 5], bool)
PROMPT = Prompt(IDS, MASK, 3, 2)
STRATEGY = jaxgen.Sample(jaxgen.EosToken([2]), jaxgen.MaxLength(8), pad_token_id=0)


def test_a_prompt_is_moved_to_the_left_of_its_buffer_and_filled_behind() -> None:
    assert PROMPT.left_aligned(7, -1)[:2].tolist() == [[9, 5, 6, -1, -1, -1, -1], [7, 8, 9, -1, -1, -1, -1]]


def test_arrays_of_a_prompt_move_with_it() -> None:
    moved = PROMPT.moved_left(PROMPT.attention_mask[..., None] * jnp.float32(2), 6)
    assert moved.shape == (4, 6, 1)
    assert moved[:2, :3, 0].tolist() == [[0, 2, 2], [2, 2, 2]] and not moved[:, 5:].any()


def test_rows_are_repeated_side_by_side_and_counted() -> None:
    repeated = PROMPT.repeated(3)
    assert repeated.input_ids[:, 2].tolist() == [9, 9, 9, 7, 7, 7, *[0] * 6]
    assert (int(repeated.rows), int(repeated.length)) == (6, 3)


def prefill(**changes: Any) -> Prefill:
    return replace(Prefill(np.zeros((8, 6), np.int32), np.ones((8, 6), bool), np.zeros((8, 6), np.int32)), **changes)


@pytest.mark.parametrize(
    ("read", "rows", "slots"),
    [
        (None, 4, 5),
        (prefill(), 8, 6),
        (prefill(past=KVCache.zeros(1, 8, 32, 1, 2, np.float32)), 8, 32),
    ],
    ids=["the prompt", "other columns", "behind a cache"],
)
def test_a_call_knows_what_its_prefill_fills(read: Prefill | None, rows: int, slots: int) -> None:
    call = Call(PROMPT, STRATEGY, 16, read)
    assert (call.model_rows, call.prompt_slots, call.guidance_scale) == (rows, slots, None)


def test_a_call_is_a_pytree_whose_slots_are_static() -> None:
    call = Call(PROMPT, STRATEGY, 16, prefill(guidance_scale=1.5))
    leaves, structure = jax.tree.flatten(call)
    again = jax.tree.unflatten(structure, leaves)
    assert again.slots == 16 and float(again.guidance_scale) == 1.5
    assert jax.tree.structure(replace(call, slots=17)) != structure
    assert jax.tree.structure(replace(call, strategy=replace(STRATEGY, max_length=jaxgen.MaxLength(9)))) == structure


def test_a_call_goes_into_a_jit_as_an_argument_and_other_numbers_compile_nothing(model: Any) -> None:
    compiled = []

    @jax.jit
    def run(call: Call) -> Any:
        compiled.append(call.slots)
        return jaxgen.decode(model, call)["sequences"]

    for prompt, new_tokens in ([5, 6, 7], 4), ([9, 10], 3):
        call = jaxgen.prepare(model, [prompt], max_new_tokens=new_tokens)
        expected = jaxgen.generate(model, [prompt], max_new_tokens=new_tokens)
        np.testing.assert_array_equal(run(call)[:1, : expected.shape[1]], expected)
    assert len(compiled) == 1

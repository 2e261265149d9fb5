"""Fields of pytrees that hold numbers have their own dtype, whatever they are given."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxgen
from jaxgen.pytree import Bool, Float32, Int32, UInt32, pytree


@pytree
@dataclass(frozen=True)
class Numbers:
    count: Int32
    share: Float32 | None = None
    flag: Bool = False
    word: UInt32 = 0
    other: Any = 7


@pytest.mark.parametrize("given", [3, 3.0, np.int64(3), np.array(3, np.int8), True + 2])
def test_numbers_become_numpy_arrays_of_the_dtype_of_their_field(given: Any) -> None:
    node = Numbers(given, share=1, flag=1, word=2**32 - 1)
    assert [(type(x), x.dtype) for x in (node.count, node.share, node.flag, node.word)] == [
        (np.ndarray, np.int32), (np.ndarray, np.float32), (np.ndarray, np.bool_), (np.ndarray, np.uint32)
    ]  # fmt: skip
    assert node.count == 3 and node.word == 2**32 - 1 and node.other == 7


def test_lists_become_arrays_and_none_stays() -> None:
    node = Numbers([1, 2])
    assert node.share is None and node.count.dtype == np.int32 and node.count.tolist() == [1, 2]
    assert replace(node, share=0.5).share.dtype == np.float32


def test_arrays_of_jax_and_what_takes_their_place_in_a_tree_stay_as_they_are() -> None:
    on_device = jnp.float32(3)
    assert Numbers(on_device).count is on_device
    node = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), Numbers(1, 2.0, other=None))
    assert isinstance(node.count, jax.ShapeDtypeStruct)
    assert jax.jit(lambda node: replace(node, count=node.count + 1).count)(Numbers(1, 2.0)) == 2


def test_a_strategy_is_written_in_plain_numbers(model: Any) -> None:
    strategy = jaxgen.Sample(jaxgen.EosToken([2]), jaxgen.MaxLength(4), pad_token_id=0)
    output = jaxgen.decode(model, jaxgen.Call(jaxgen.Prompt([[5, 6]], [[True, True]], 2, 1), strategy, 6))
    np.testing.assert_array_equal(
        output["sequences"][:, :4], jaxgen.generate(model, [[5, 6]], max_length=4, eos_token_id=2, pad_token_id=0)
    )

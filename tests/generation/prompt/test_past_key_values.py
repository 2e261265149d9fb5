"""The cache of a call as a sequence of layers: what it shows, forgets, takes from torch and hands to a program."""

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.generation.prompt.past_key_values import PastKeyValues
from jaxgen.kv_cache import KVCache

# Of two rows with two branches each: three columns, in whatever slots they were written to.
LAYERS, ROWS, HEADS, SLOTS, SIZE = 3, 2, 2, 6, 4
TAKEN = np.array([[[0, 1, 3], [0, 1, 4]], [[2, 1, 5], [2, 0, 5]]])
ROW = np.array([0, 0, 1, 1])
ANOTHER = "`cache` belongs to another model: its layers, heads or dtype differ"


def filled(layers: int = LAYERS, rows: int = ROWS, heads: int = HEADS) -> KVCache:
    """No two numbers are the same, in float32."""
    empty = KVCache.zeros(layers, rows, SLOTS, heads, SIZE, np.float32)
    leaves, tree = jax.tree.flatten(empty.layers)
    arrays = [1000 * number + np.arange(leaf.size, dtype=np.float32) for number, leaf in enumerate(leaves)]
    shaped = [jnp.asarray(array).reshape(leaf.shape) for array, leaf in zip(arrays, leaves, strict=True)]
    return KVCache(jax.tree.unflatten(tree, shaped), empty.valid, empty.length, empty.position)


def numbers(layer: int, part: int, rows: int = ROWS, heads: int = HEADS) -> np.ndarray:
    """What `filled` has in the keys (0) or the values (1) of a layer."""
    size = rows * heads * SLOTS * SIZE
    return (1000 * (2 * layer + part) + np.arange(size, dtype=np.float32)).reshape(rows, heads, SLOTS, SIZE)


def model(layers: int = LAYERS, heads: int = HEADS, dtype: Any = np.float32, windowed: bool = False) -> Any:
    return SimpleNamespace(
        is_encoder_decoder=False,
        make_cache=lambda rows, slots: KVCache.zeros(layers, rows, slots, heads, SIZE, dtype, windowed),
    )


@pytest.fixture
def past() -> PastKeyValues:
    return PastKeyValues(filled(), TAKEN)


# ---- A sequence of layers ----


def test_a_layer_is_the_keys_and_the_values_of_every_branch_in_the_order_of_its_text(past: PastKeyValues) -> None:
    for layer in range(LAYERS):
        pair = past[layer]
        assert type(pair) is tuple and all(isinstance(each, jax.Array) for each in pair)
        for part, found in enumerate(pair):
            expected = [numbers(layer, part)[ROW[m]][:, TAKEN.reshape(4, 3)[m]] for m in range(4)]
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("rows", "heads"), [(1, 2), (2, 1), (1, 1)])
def test_all_four_dimensions_are_there_if_some_are_of_size_one(rows: int, heads: int) -> None:
    past = PastKeyValues(filled(1, rows, heads), np.broadcast_to([[3, 1]], (rows, 1, 2)))
    for part, found in enumerate(past[0]):
        np.testing.assert_array_equal(found, numbers(0, part, rows, heads)[:, :, [3, 1]])


def test_it_is_a_sequence_of_its_layers(past: PastKeyValues) -> None:
    assert isinstance(past, Sequence) and len(past) == LAYERS

    def first_numbers(pairs: Any) -> list[float]:
        return [float(keys[0, 0, 0, 0]) for keys, _ in pairs]

    assert first_numbers(past) == [0, 2000, 4000]
    assert first_numbers(reversed(past)) == [4000, 2000, 0]
    assert first_numbers([past[-1], past[np.int64(-2)], past[-3]]) == [4000, 2000, 0]
    assert first_numbers(past[1:]) == [2000, 4000]
    assert first_numbers(past[::-2]) == [4000, 0]
    assert past[3:] == []
    for wrong in (LAYERS, -LAYERS - 1):
        with pytest.raises(IndexError):
            past[wrong]


def test_rows_are_branches_and_columns_are_those_that_were_seen(past: PastKeyValues) -> None:
    assert (past.batch_size, past.get_seq_length(), past.slots) == (4, 3, SLOTS)


# ---- Cropping ----


def test_cropping_forgets_the_last_columns_of_every_row(past: PastKeyValues) -> None:
    whole = np.asarray(past[1][0])
    past.crop(0)
    assert past.get_seq_length() == 3
    past.crop(-1)
    np.testing.assert_array_equal(past[1][0], whole[:, :, :2])
    assert (past.get_seq_length(), past.batch_size, past.slots) == (2, 4, SLOTS)
    past.crop(-2)
    assert past.get_seq_length() == 0 and past[0][0].shape == (4, HEADS, 0, SIZE)


def test_what_is_cropped_is_no_column_of_its_copies(past: PastKeyValues) -> None:
    other = copy.copy(past)
    past.crop(-2)
    assert (past.get_seq_length(), other.get_seq_length()) == (1, 3)


@pytest.mark.parametrize("wrong", [1, -4, np.int64(-1), "1"], ids=repr)
def test_more_columns_than_there_are_or_no_integer_cannot_be_cropped(wrong: Any, past: PastKeyValues) -> None:
    with pytest.raises(ValueError, match=r"to remove from the 3 tokens.*Pass an integer from -3 to 0"):
        past.crop(wrong)
    assert past.get_seq_length() == 3


@pytest.mark.oracle
def test_cropping_leaves_the_columns_that_it_leaves_in_transformers() -> None:
    import torch
    import transformers

    theirs = transformers.DynamicCache()
    theirs.update(torch.ones(2, 2, 5, SIZE), torch.ones(2, 2, 5, SIZE), 0)
    ours = PastKeyValues(filled(1), np.broadcast_to(np.arange(5), (2, 1, 5)))
    for removed in (-1, -2):
        theirs.crop(removed)
        ours.crop(removed)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert tuple(ours[0][0].shape) == tuple(theirs.layers[0].keys.shape)


# ---- From torch ----


@pytest.mark.oracle
@pytest.mark.parametrize(("rows", "heads"), [(2, 2), (1, 2), (2, 1), (1, 1)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cache_of_torch_comes_back_with_its_numbers(dtype: str, rows: int, heads: int) -> None:
    import torch
    import transformers

    original = PastKeyValues(filled(LAYERS, rows, heads), np.broadcast_to([[4, 0, 2]], (rows, 1, 3)))
    theirs = transformers.DynamicCache()
    for layer, pair in enumerate(original):
        keys, values = (torch.tensor(np.array(each)).to(getattr(torch, dtype)) for each in pair)
        theirs.update(keys, values, layer)
    found = PastKeyValues.from_transformers(model(heads=heads, dtype=jnp.dtype(dtype)), theirs)
    assert found is not None
    assert (found.batch_size, found.get_seq_length(), found.slots, len(found)) == (rows, 3, 3, LAYERS)
    for mine, expected in zip(found, original, strict=True):
        for one, other in zip(mine, expected, strict=True):
            assert one.dtype == dtype
            np.testing.assert_array_equal(one, other.astype(dtype))


@pytest.mark.oracle
def test_of_a_static_cache_the_columns_that_are_filled_are_taken() -> None:
    import torch
    import transformers

    sizes = {"num_hidden_layers": 1, "num_attention_heads": HEADS, "hidden_size": HEADS * SIZE}
    theirs = transformers.StaticCache(config=transformers.LlamaConfig(**sizes), max_cache_len=9)
    assert PastKeyValues.from_transformers(model(1), theirs) is None
    keys = torch.arange(2 * HEADS * 5 * SIZE, dtype=torch.float32).reshape(2, HEADS, 5, SIZE)
    theirs.update(keys, -keys, 0)
    found = PastKeyValues.from_transformers(model(1), theirs)
    assert found is not None and found.get_seq_length() == 5
    for one, other in zip(found[0], (keys, -keys), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.oracle
def test_what_torch_does_to_its_cache_later_changes_no_copy_of_it() -> None:
    import torch
    import transformers

    theirs = transformers.StaticCache(
        config=transformers.LlamaConfig(num_hidden_layers=1, num_attention_heads=HEADS, hidden_size=HEADS * SIZE),
        max_cache_len=5,  # all of them filled, so that nothing is cut: JAX could share the memory
    )
    keys = torch.arange(1, 1 + 2 * HEADS * 5 * SIZE, dtype=torch.float32).reshape(2, HEADS, 5, SIZE)
    theirs.update(keys, -keys, 0)
    found = PastKeyValues.from_transformers(model(1), theirs)
    assert found is not None
    theirs.reset()
    np.testing.assert_array_equal(found[0][0], keys)


@pytest.mark.oracle
@pytest.mark.parametrize("other", [{"layers": 1}, {"layers": 3}, {"heads": 1}, {"heads": 4}, {"dtype": np.float16}])
def test_a_cache_of_torch_of_another_model_is_refused(other: dict[str, Any]) -> None:
    import torch
    import transformers

    theirs = transformers.DynamicCache()
    for layer in range(2):
        theirs.update(torch.ones(2, HEADS, 3, SIZE), torch.ones(2, HEADS, 3, SIZE), layer)
    assert PastKeyValues.from_transformers(model(2), theirs) is not None
    with pytest.raises(ValueError, match=ANOTHER):
        PastKeyValues.from_transformers(model(**{"layers": 2, **other}), theirs)


@pytest.mark.oracle
def test_a_layer_that_has_let_go_of_columns_is_refused_by_its_number() -> None:
    import torch
    import transformers

    sizes = {"num_hidden_layers": 2, "num_attention_heads": HEADS, "hidden_size": HEADS * SIZE, "sliding_window": 4}
    layer_types = ["full_attention", "sliding_attention"]
    config = transformers.Qwen2Config(**sizes, use_sliding_window=True, layer_types=layer_types)
    theirs = transformers.DynamicCache(config=config)
    for layer in range(2):
        theirs.update(torch.ones(1, HEADS, 6, SIZE), torch.ones(1, HEADS, 6, SIZE), layer)
    with pytest.raises(ValueError, match=r"`cache` holds 3 of 6 tokens in layer 1, a DynamicSlidingWindowLayer"):
        PastKeyValues.from_transformers(model(2), theirs)


def test_what_has_no_layers_is_refused_by_its_type() -> None:
    with pytest.raises(ValueError, match=r"`cache` is of type tuple\. Pass a `DynamicCache`"):
        PastKeyValues.from_transformers(model(), ((1, 2),))


# ---- Into a program ----


def lowered(past: PastKeyValues, mask: Any, rows: int = 6, slots: int = 8) -> Any:
    return past.to_cache(model(), rows, slots, np.asarray(mask, bool))


def test_the_columns_lie_in_the_first_slots_and_the_rest_is_room_that_nobody_attends(past: PastKeyValues) -> None:
    mask = [[1, 1, 1], [0, 1, 1], [1, 0, 1], [0, 0, 1]]
    cache = lowered(past, mask)
    assert int(cache.length) == 3 and cache.slots == 8 and cache.columns is None
    np.testing.assert_array_equal(cache.valid, np.pad(np.array(mask, bool), ((0, 2), (0, 5))))
    for layer in range(LAYERS):
        for found, expected in zip(cache.layer(layer), past[layer], strict=True):
            assert found.shape == (6, HEADS, 8, SIZE)
            np.testing.assert_array_equal(found[:4, :, :3], expected)


def test_one_row_is_that_of_every_prompt() -> None:
    past = PastKeyValues(filled(rows=1), np.array([[[5, 0]]]))
    mask = [[1, 1], [0, 1], [1, 1]]
    cache = lowered(past, mask)
    np.testing.assert_array_equal(cache.valid, np.pad(np.array(mask, bool), ((0, 3), (0, 6))))
    for found, expected in zip(cache.layer(1), past[1], strict=True):
        np.testing.assert_array_equal(found[:3, :, :2], np.repeat(expected, 3, axis=0))


def test_a_cropped_cache_goes_on_from_the_columns_it_has_left(past: PastKeyValues) -> None:
    past.crop(-1)
    cache = lowered(past, np.ones((4, 2)))
    assert int(cache.length) == 2
    np.testing.assert_array_equal(cache.valid.sum(axis=1), [2, 2, 2, 2, 0, 0])
    np.testing.assert_array_equal(cache.layer(0)[1][:4, :, :2], past[0][1])


def test_going_on_changes_nothing_of_the_cache_that_was_given(past: PastKeyValues) -> None:
    before = [np.array(each) for pair in past for each in pair]
    one, other = lowered(past, np.ones((4, 3))), lowered(past, np.ones((4, 3)))
    for array in jax.tree.leaves(one):
        array.delete()  # as if donated
    np.testing.assert_array_equal(other.layer(0)[0][:4, :, :3], before[0])
    for found, expected in zip((each for pair in past for each in pair), before, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "other", [{"layers": 2}, {"heads": 1}, {"heads": 4}, {"dtype": jnp.bfloat16}, {"windowed": True}], ids=str
)
def test_a_model_with_another_cache_does_not_go_on_from_it(other: dict[str, Any], past: PastKeyValues) -> None:
    with pytest.raises(ValueError, match=ANOTHER):
        past.to_cache(model(**other), 6, 8, np.ones((4, 3), bool))

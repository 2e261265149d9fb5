import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.kv_cache import BranchedCache, KVCache

ROWS, HEADS, SLOTS, HEAD_DIM = 2, 3, 6, 4


def empty() -> KVCache:
    return KVCache.zeros(1, ROWS, SLOTS, HEADS, HEAD_DIM, jnp.float32)


def filled(columns: int, value: float) -> jax.Array:
    return jnp.full((ROWS, HEADS, columns, HEAD_DIM), value)


def test_positions_count_unmasked_columns_and_are_zero_on_padding() -> None:
    mask = jnp.array([[0, 0, 1, 1], [1, 1, 1, 1]], bool)
    _, positions, _ = empty().extend(mask)
    assert positions.tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


def test_the_next_token_follows_the_last_position_also_after_right_padding() -> None:
    cache, _, _ = empty().extend(jnp.array([[1, 1, 1], [1, 1, 0]], bool))
    _, positions, _ = cache.extend(jnp.ones((ROWS, 1), bool))
    assert positions.tolist() == [[3], [1]]  # transformers restarts a right-padded row at 1


def test_a_column_attends_to_valid_slots_up_to_its_own() -> None:
    cache, _, mask = empty().extend(jnp.array([[0, 1, 1], [1, 1, 1]], bool))
    assert mask[0].astype(int).tolist() == [[0] * 6, [0, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0]]
    _, _, mask = cache.extend(jnp.ones((ROWS, 1), bool))
    assert mask[:, 0].astype(int).tolist() == [[0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0]]


def test_updates_fill_the_slots_in_order_and_leave_the_rest_alone() -> None:
    cache, _, _ = empty().extend(jnp.ones((ROWS, 2), bool))
    cache, _, _ = cache.update(0, filled(2, 1.0), filled(2, -1.0))
    cache, _, _ = cache.extend(jnp.ones((ROWS, 1), bool))
    cache, keys, values = cache.update(0, filled(1, 2.0), filled(1, -2.0))
    assert keys[0, 0, :, 0].tolist() == [1, 1, 2, 0, 0, 0]
    assert values[1, 0, :, 0].tolist() == [-1, -1, -2, 0, 0, 0]
    assert int(cache.length) == 3


def test_growing_keeps_what_was_written_and_adds_slots_that_are_not_valid() -> None:
    cache, _, _ = empty().extend(jnp.ones((ROWS, SLOTS), bool))
    cache, _, _ = cache.update(0, filled(SLOTS, 1.0), filled(SLOTS, 1.0))
    grown = cache.grow(9)
    assert grown.layers[0][0].shape == (ROWS, HEADS, 9, HEAD_DIM)
    assert grown.valid.sum(axis=1).tolist() == [SLOTS, SLOTS]
    np.testing.assert_array_equal(grown.layers[0][1][:, :, SLOTS:], 0)


def test_a_layer_of_a_reserving_cache_grows_as_soon_as_it_is_written() -> None:
    def written(cache: KVCache) -> tuple[KVCache, jax.Array]:
        cache, _, _ = cache.extend(jnp.ones((ROWS, SLOTS), bool))
        cache, keys, _ = cache.update(0, filled(SLOTS, 1.0), filled(SLOTS, 2.0))
        return cache, keys

    reserving, keys = written(empty().reserve(9))
    assert reserving.layers[0][0].shape[2] == 9
    assert keys.shape[2] == reserving.slots == SLOTS  # attention reads no empty slots
    expected, _ = written(empty())
    jax.tree.map(np.testing.assert_array_equal, reserving.grow(9), expected.grow(9))


def test_growing_branches_keeps_which_slots_each_attends() -> None:
    cache, _, _ = empty().extend(jnp.ones((ROWS, 2), bool))
    branched, _, _ = cache.branch(3).extend(jnp.ones((ROWS, 3), bool))
    grown = branched.grow(9)
    np.testing.assert_array_equal(grown.valid, np.pad(branched.valid, ((0, 0), (0, 0), (0, 9 - SLOTS))))
    assert (grown.slots, grown.branches) == (9, 3)


@pytest.mark.parametrize(("rows", "heads"), [(1, 3), (2, 1), (1, 1)])
def test_dimensions_of_size_one_are_left_out_of_the_arrays(rows: int, heads: int) -> None:
    cache = KVCache.zeros(1, rows, SLOTS, heads, HEAD_DIM, jnp.float32)
    cache, _, _ = cache.extend(jnp.ones((rows, 2), bool))
    new = jnp.arange(rows * heads * 2 * HEAD_DIM, dtype=jnp.float32).reshape(rows, heads, 2, HEAD_DIM)
    cache, keys, _ = cache.update(0, new, new)
    assert 1 not in keys.shape
    full = cache.grow(SLOTS + 2).layers[0][1].reshape(rows, heads, SLOTS + 2, HEAD_DIM)
    np.testing.assert_array_equal(full[:, :, :2], new)


def test_heads_that_are_there_several_times_are_written_and_read_once() -> None:
    """The copies of a head lie side by side, whatever the cache becomes."""
    cache = KVCache.zeros(1, ROWS, SLOTS, HEADS, HEAD_DIM, jnp.float32, copies=2)
    cache, _, _ = cache.extend(jnp.ones((ROWS, SLOTS), bool))
    new = jnp.arange(ROWS * HEADS * SLOTS * HEAD_DIM, dtype=jnp.float32).reshape(ROWS, HEADS, SLOTS, HEAD_DIM)
    cache, keys, _ = cache.update(0, new, -new)
    np.testing.assert_array_equal(keys, np.repeat(new, 2, axis=1))
    chosen = jnp.broadcast_to(jnp.arange(SLOTS), (ROWS, SLOTS))
    selected = cache.select(jnp.arange(ROWS), chosen, jnp.ones((ROWS, SLOTS), bool), jnp.int32(SLOTS))
    for each in (cache, cache.grow(9), cache.branch(2), cache.ragged(), cache.take(jnp.arange(ROWS)), selected):
        np.testing.assert_array_equal(each.layer(0)[0][:, :, :SLOTS], new)
    np.testing.assert_array_equal(cache.with_layers(((-new, new),)).layers[0][1], keys)


# ---- Windows ----


def windowed() -> KVCache:
    return KVCache.zeros(1, ROWS, SLOTS, HEADS, HEAD_DIM, jnp.float32, windowed=True)


def seen(cache: KVCache, mask: jax.Array, window: int) -> list[list[int]]:
    """Of the columns of the second row, the slots that they attend."""
    return [np.flatnonzero(column).tolist() for column in np.asarray(cache.within(window, mask)[1])]


def test_a_window_ends_with_the_own_column_and_counts_padding() -> None:
    cache, _, mask = windowed().extend(jnp.array([[1, 1, 1, 1], [1, 1, 0, 1]], bool))
    assert seen(cache, mask, 1) == [[0], [1], [], [3]]
    assert seen(cache, mask, 2) == [[0], [0, 1], [1], [3]]
    cache, _, mask = cache.extend(jnp.ones((ROWS, 1), bool))
    assert seen(cache, mask, 2) == [[3, 4]]
    assert seen(cache, mask, 4) == [[1, 3, 4]]


def test_columns_that_are_skipped_are_not_counted() -> None:
    cache, _, _ = windowed().extend(jnp.ones((ROWS, 2), bool))
    cache, _, mask = cache.skip(jnp.int32(2)).extend(jnp.ones((ROWS, 3), bool).at[:, :2].set(False))
    assert seen(cache, mask, 2)[2] == [1, 4]
    assert seen(cache, mask, 3)[2] == [0, 1, 4]


def test_columns_that_are_taken_from_elsewhere_lie_side_by_side() -> None:
    cache, _, _ = windowed().extend(jnp.ones((ROWS, SLOTS), bool))
    chosen = jnp.array([[0, 2, 4], [1, 3, 5]])
    cache = cache.select(jnp.arange(ROWS), chosen, jnp.ones((ROWS, 3), bool), jnp.int32(3)).grow(SLOTS)
    cache, _, mask = cache.take(jnp.array([1, 0])).extend(jnp.ones((ROWS, 1), bool))
    assert seen(cache, mask, 3) == [[1, 2, 3]]


def test_the_slots_of_a_step_are_one_column_to_a_window() -> None:
    cache, _, _ = windowed().extend(jnp.ones((ROWS, 2), bool))
    branched = cache.branch(2)
    for expected in ([[1, 2], [1, 3]], [[2, 4], [3, 5]]):
        branched, _, mask = branched.extend(jnp.ones((ROWS, 2), bool))
        assert seen(branched, mask, 2) == expected
    kept = cache.branch(2).extend(jnp.ones((ROWS, 2), bool))[0].keep(jnp.array([0, 1]))
    kept, _, mask = kept.extend(jnp.ones((ROWS, 2), bool))
    assert seen(kept, mask, 2) == [[2, 3], [2, 4]]


# ---- Branches ----


def branched(branches: int = 2) -> BranchedCache:
    """Two prompt columns, of which row 0 may not look at the first, and room for two columns of each branch."""
    cache, _, _ = empty().extend(jnp.array([[0, 1], [1, 1]], bool))
    cache, _, _ = cache.update(0, filled(2, 1.0), filled(2, 1.0))
    return cache.branch(branches)


def a_column_each(cache: BranchedCache, value: float) -> tuple[BranchedCache, jax.Array, jax.Array]:
    """The cache after one more column of each branch, whose keys hold `value` and the branch's tenths."""
    cache, positions, mask = cache.extend(jnp.ones((ROWS, cache.branches), bool))
    new = filled(cache.branches, value) + jnp.arange(cache.branches)[:, None] / 10
    cache, _, _ = cache.update(0, new, new)
    return cache, positions, mask


def attended(mask: jax.Array) -> list[list[int]]:
    """Of the branches of the second row, the slots that they attend."""
    return [np.flatnonzero(branch).tolist() for branch in np.asarray(mask[1])]


def test_branches_share_the_prompt_and_attend_their_own_columns_only() -> None:
    cache, positions, mask = a_column_each(branched(), 2.0)
    assert attended(mask) == [[0, 1, 2], [0, 1, 3]]
    assert positions.tolist() == [[1, 1], [2, 2]]
    _, positions, mask = a_column_each(cache, 3.0)
    assert attended(mask) == [[0, 1, 2, 4], [0, 1, 3, 5]]
    assert np.flatnonzero(mask[0, 1]).tolist() == [1, 3, 5]  # not the padding of its prompt
    assert positions.tolist() == [[2, 2], [3, 3]]


def test_a_branch_that_continues_another_attends_its_columns_and_no_key_moves() -> None:
    cache, _, _ = a_column_each(branched(), 2.0)
    reordered = cache.reorder(jnp.array([[0, 1], [1, 1]]))
    np.testing.assert_array_equal(reordered.layers[0][0], cache.layers[0][0])
    _, _, mask = a_column_each(reordered, 3.0)
    assert attended(mask) == [[0, 1, 3, 4], [0, 1, 3, 5]]
    assert [np.flatnonzero(branch).tolist() for branch in np.asarray(mask[0])] == [[1, 2, 4], [1, 3, 5]]


def test_keeping_one_branch_frees_the_slots_of_the_others() -> None:
    cache, _, _ = a_column_each(branched(), 2.0)
    kept = cache.keep(jnp.array([0, 1]))
    assert int(kept.length) == 3
    np.testing.assert_allclose(kept.layers[0][0][:, 0, 2, 0], [2.0, 2.1])  # each row's own choice
    cache, positions, mask = a_column_each(kept, 3.0)
    assert attended(mask) == [[0, 1, 2, 3], [0, 1, 2, 4]]
    assert positions.tolist() == [[2, 2], [3, 3]]


@pytest.mark.parametrize(("rows", "heads"), [(1, 3), (2, 1), (1, 1)])
def test_branches_work_without_dimensions_of_size_one(rows: int, heads: int) -> None:
    cache = KVCache.zeros(1, rows, SLOTS, heads, HEAD_DIM, jnp.float32).branch(3)
    cache, _, _ = cache.extend(jnp.ones((rows, 3), bool))
    new = jnp.arange(rows * heads * 3 * HEAD_DIM, dtype=jnp.float32).reshape(rows, heads, 3, HEAD_DIM)
    cache, _, _ = cache.update(0, new, new)
    kept = cache.keep(jnp.full(rows, 2)).layer(0)[0]
    np.testing.assert_array_equal(kept[:, :, 0], new[:, :, 2])


# ---- Quantised ----


def numbers(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def read(backend: str | None, rows: int, heads: int) -> KVCache:
    """A cache after a prompt of four columns, with room for two more."""
    cache = KVCache.zeros(1, rows, 4, heads, HEAD_DIM, jnp.float32)
    cache = (cache if backend is None else cache.quantized(backend)).reserve(SLOTS)
    mask = jnp.asarray(np.arange(4) >= np.arange(rows)[:, None])
    cache, _, _ = cache.extend(mask)
    new = numbers(rows, heads, 4, HEAD_DIM)
    cache, keys, _ = cache.update(0, new, numbers(rows, heads, 4, HEAD_DIM, seed=1))
    # The prompt attends to itself as it is.
    np.testing.assert_array_equal(keys, new.reshape(*(size for size in new.shape if size > 1)))
    return cache.grow(SLOTS)


@pytest.mark.parametrize("backend", ["int8", "fp8"])
@pytest.mark.parametrize(("rows", "heads"), [(2, 3), (1, 3), (2, 1), (1, 1)])
def test_a_quantised_cache_does_to_its_numbers_what_a_plain_one_does(backend: str, rows: int, heads: int) -> None:
    quantized = read(backend, rows, heads)
    assert (quantized.backend, quantized.grow(9).backend, quantized.slots) == (backend, backend, SLOTS)
    plain = read(None, rows, heads).with_layers((quantized.layer(0),))
    assert plain.backend is None
    new = numbers(rows, heads, 2, HEAD_DIM, seed=2), numbers(rows, heads, 2, HEAD_DIM, seed=3)
    # What the quantised cache makes of the new columns.
    rounded = [old.quantized(each).dequantized() for old, each in zip(quantized.layers[0], new, strict=True)]
    last = jnp.full(rows, 1, jnp.int32)
    order = jnp.broadcast_to(jnp.array([1, 3, 0, 2, 5, 4]), (rows, SLOTS))
    valid = jnp.ones((rows, SLOTS), bool)

    def every_way(cache: KVCache, new: list[jax.Array]) -> list[KVCache]:
        longer, _, _ = cache.extend(jnp.ones((rows, 2), bool))
        longer, _, _ = longer.update(0, *new)
        branched, _, _ = cache.branch(2).extend(jnp.ones((rows, 2), bool))
        branched, _, _ = branched.update(0, *new)
        return [
            longer,
            longer.grow(9),
            longer.repeat(2),
            longer.select(jnp.arange(rows)[::-1], order, valid, jnp.int32(5)),
            longer.ragged().drop_last(last).squeezed(),
            branched.keep(last),
        ]

    for ours, theirs in zip(every_way(quantized, [*new]), every_way(plain, rounded), strict=True):
        assert ours.backend == backend
        for found, expected in zip(ours.layer(0), theirs.layer(0), strict=True):
            np.testing.assert_array_equal(found, expected)

"""The highest of many scores."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.processors.top_k import blocked_argmax, blocked_top_k, row_maxima


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 5000, 20_001])
def test_the_highest_scores_are_found_in_blocks_as_in_the_whole(columns: int) -> None:
    scores = np.random.default_rng(columns).integers(-150, -50, (3, columns)).astype(np.float32)
    np.testing.assert_array_equal(blocked_argmax(jnp.asarray(scores)), scores.argmax(axis=1))
    count = min(17, columns)
    values, indices, invalid = blocked_top_k(jnp.asarray(scores), count)
    np.testing.assert_array_equal(values, -np.sort(-scores, axis=1)[:, :count])
    np.testing.assert_array_equal(np.take_along_axis(scores, np.asarray(indices), axis=1), values)
    assert not invalid.any()


@pytest.mark.parametrize("shape", [(3, 160), (2, 3, 160), (3, 40_000), (2, 3, 40_000)])
@pytest.mark.parametrize("shards", [2, 8])
def test_the_highest_of_all_shards_are_among_the_highest_of_each(shape: tuple[int, ...], shards: int) -> None:
    """In fewer columns than are looked for, in blocks, and in several vocabularies side by side."""
    scores = np.random.default_rng(shards).permutation(np.prod(shape)).reshape(shape).astype(np.float32)
    for number, value in enumerate((np.inf, -np.inf, np.nan)[: len(scores) - 1]):
        scores[1 + number] = np.where(np.arange(shape[-1]) == 7, value, scores[1 + number])
    flat = scores.reshape(len(scores), -1)
    values, indices, invalid = blocked_top_k(jnp.asarray(scores), 33, shards)
    np.testing.assert_array_equal(np.take_along_axis(flat, np.asarray(indices), axis=1), values)
    np.testing.assert_array_equal(values[0], -np.sort(-flat[0])[:33])
    assert invalid.tolist() == [not np.isfinite(row.max()) for row in flat]


def test_a_row_without_a_finite_score_is_invalid_but_a_shard_may_be_without() -> None:
    scores = np.full((3, 64), -np.inf, np.float32)
    scores[1, 63] = 5
    scores[2, 3] = np.nan
    for shards in (1, 4):
        values, indices, invalid = blocked_top_k(jnp.asarray(scores), 2, shards)
        assert invalid.tolist() == [True, False, True]
        assert (values[1, 0], indices[1, 0]) == (5, 63)
        assert (~jnp.isfinite(row_maxima(jnp.asarray(scores), shards))).tolist() == [True, False, True]

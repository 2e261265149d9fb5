"""The highest of many scores."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.processors.top_k import blocked_argmax, blocked_top_k


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 5000, 20_001])
def test_the_highest_scores_are_found_in_blocks_as_in_the_whole(columns: int) -> None:
    scores = np.random.default_rng(columns).integers(-150, -50, (3, columns)).astype(np.float32)
    np.testing.assert_array_equal(blocked_argmax(jnp.asarray(scores)), scores.argmax(axis=1))
    count = min(17, columns)
    values, indices, invalid = blocked_top_k(jnp.asarray(scores), count)
    np.testing.assert_array_equal(values, -np.sort(-scores, axis=1)[:, :count])
    np.testing.assert_array_equal(np.take_along_axis(scores, np.asarray(indices), axis=1), values)
    assert not invalid.any()

"""The noise of a draw."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.decoding.gumbel import gumbel


def test_the_noise_is_standard_gumbel_to_its_ends() -> None:
    noise = np.asarray(gumbel(jnp.arange(20, dtype=jnp.uint32).reshape(10, 2), jnp.int32(3), _columns(100_000)))
    assert np.isfinite(noise).all()
    assert abs(noise.mean() - np.euler_gamma) < 0.005 and abs(noise.std() - np.pi / np.sqrt(6)) < 0.005
    for quantile in (0.001, 0.5, 0.999, 0.99999):
        expected = -np.log(-np.log(quantile))
        assert abs((noise < expected).mean() - quantile) < 4 * np.sqrt(quantile * (1 - quantile) / noise.size)


def _columns(count: int) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(count), (10, count))

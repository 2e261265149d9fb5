"""The layers that families share: that derivatives of any kind go through them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

IDS = np.array([[5, 6, 7, 8], [0, 0, 9, 10]])
MASK = np.array([[1, 1, 1, 1], [0, 0, 1, 1]])


def loss(model: Any) -> jax.Array:
    return jax.nn.logsumexp(model(IDS, jnp.asarray(MASK))[:, -1]).sum()


DERIVATIVES = {
    "reverse": lambda model, direction: jax.grad(loss)(model),
    "forward": lambda model, direction: jax.jvp(loss, (model,), (direction,))[1],
    "forward over reverse": lambda model, direction: jax.jvp(jax.grad(loss), (model,), (direction,))[1],
    "reverse over forward": lambda model, direction: jax.grad(lambda at: jax.jvp(loss, (at,), (direction,))[1])(model),
}


@pytest.mark.parametrize("kind", DERIVATIVES)
def test_derivatives_of_a_left_padded_batch_are_finite_and_hold_no_nan_on_the_way(kind: str, model: Any) -> None:
    """Padding attends to nothing: the sum of its weights is 0."""
    with jax.debug_nans(True):
        derivative = jax.jit(DERIVATIVES[kind])(model, jax.tree.map(jnp.ones_like, model))
    assert all(np.isfinite(each).all() for each in jax.tree.leaves(derivative))
    assert any(np.any(np.asarray(each) != 0) for each in jax.tree.leaves(derivative))

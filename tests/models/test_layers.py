"""Products and attention: each form, by rows and columns, gives the numbers of the plain one, and has derivatives."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.models import layers
from jaxgen.models.layers import attend, columns_at_once, product

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def rounding(dtype: Any) -> float:
    return float(jnp.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("rows", [1, 2, 32, 33, 300])
def test_a_product_is_the_plain_one_rounded_once_for_any_number_of_rows(rows: int, dtype: Any) -> None:
    rng = np.random.default_rng(rows)
    x, weight = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((1, rows, 48), (40, 48)))
    found = jax.jit(product)(x, weight)
    assert (found.shape, found.dtype) == ((1, rows, 40), dtype)
    wide, other = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    # A sum of 48 is off by several roundings of float32, of which a narrow result shows none but its own.
    bound = 48 * rounding(jnp.float32) * (np.abs(wide) @ np.abs(other.T)) + rounding(dtype) * np.abs(wide @ other.T)
    assert (np.abs(np.asarray(found, np.float64) - wide @ other.T) <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("rows", [1, 4, 5])
def test_the_rows_of_a_group_are_multiplied_one_by_one_or_together_with_one_result(rows: int, dtype: Any) -> None:
    rng = np.random.default_rng(rows)
    x, shared = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((2, 3, rows, 8), (2, 3, 20, 8)))
    scores = jax.jit(layers._grouped, static_argnums=0)("...mh,...sh->...ms", x, shared)
    assert scores.dtype == jnp.float32
    expected = np.einsum("nkmh,nksh->nkms", *(np.asarray(each, np.float64) for each in (x, shared)))
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    back = jax.jit(layers._grouped, static_argnums=0)("...ms,...sh->...mh", scores.astype(dtype), shared)
    expected = np.einsum("nkms,nksh->nkmh", *(np.asarray(each, np.float64) for each in (scores.astype(dtype), shared)))
    np.testing.assert_allclose(back, expected, atol=1e-4)


def test_up_to_256_columns_and_those_that_are_no_multiple_of_128_have_their_scores_in_memory_at_once() -> None:
    assert [columns_at_once(columns) for columns in (1, 255, 256, 300, 384, 385, 1024)] == [
        1, 255, 256, 300, 128, 385, 128,
    ]  # fmt: skip


@pytest.mark.parametrize(("columns", "heads"), [(1, 2), (256, 2), (300, 2), (384, 2), (384, 1)])
def test_attention_over_any_number_of_columns_is_that_of_the_formula(columns: int, heads: int) -> None:
    """With slots before the columns, as behind a kept cache, and one column that may look nowhere."""
    rng = np.random.default_rng(columns)
    slots = columns + 40
    queries = rng.standard_normal((2, heads, 3, columns, 8), np.float32)
    keys, values = rng.standard_normal((2, 2, heads, slots, 8), np.float32)
    mask = rng.random((2, columns, slots)) < 0.7
    mask &= np.arange(slots) <= np.arange(columns)[:, None] + 40
    mask[1, columns // 2] = False
    shape = (2, *[heads] * (heads > 1), slots, 8)  # of heads a single one is left out

    @jax.jit
    def both(*arrays: Any) -> Any:
        attended, weights = attend(*arrays)
        return attended, weights()

    attended, weights = both(queries, keys.reshape(shape), values.reshape(shape), mask)
    scores = np.einsum("nkgth,nksh->nkgts", queries, keys, dtype=np.float64) / 8**0.5
    raised = np.where(mask[:, None, None], np.exp(scores), 0)
    expected = raised / np.maximum(raised.sum(axis=-1, keepdims=True), 1e-30)
    np.testing.assert_allclose(weights, expected, atol=1e-6)
    np.testing.assert_allclose(attended, np.einsum("nkgts,nksh->nkgth", expected, values), atol=1e-5)


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

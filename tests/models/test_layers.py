"""Norms, products and attention: each form gives the numbers of the plain one, and has derivatives."""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxgen
from jaxgen.models import layers
from jaxgen.models.layers import Embed, Linear, RMSNorm, attend, columns_at_once, product, unfuse
from jaxgen.quantized_array import Int8Array

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


@pytest.mark.parametrize("shape", [(48,), (1, 48), (2, 3, 48), (1, 1, 1, 48)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda dtype: dtype.__name__)
def test_a_product_keeps_all_dimensions_but_the_last(dtype: Any, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x, weight = (rng.integers(-3, 4, each) for each in (shape, (40, 48)))  # whose products are exact
    found = jax.jit(product)(jnp.asarray(x, dtype), jnp.asarray(weight, dtype))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, (x @ weight.T).astype(dtype))


def test_a_linear_layer_adds_its_bias_and_an_embedding_scores_against_every_entry() -> None:
    rng = np.random.default_rng(0)
    x, weight, bias = (rng.integers(-3, 4, each) for each in ((2, 3, 8), (5, 8), (5,)))
    linear = Linear(8, 5, bias=True, std=1.0, rngs=nnx.Rngs(0))
    linear.weight, linear.bias = (nnx.Param(jnp.asarray(each, jnp.float32)) for each in (weight, bias))
    np.testing.assert_array_equal(linear(jnp.asarray(x, jnp.float32)), x @ weight.T + bias)
    assert Linear(8, 5, bias=False, std=1.0, rngs=nnx.Rngs(0)).bias is None
    embed = Embed(5, 8, std=1.0, rngs=nnx.Rngs(0))
    embed.weight = nnx.Param(jnp.asarray(weight, jnp.float32))
    np.testing.assert_array_equal(embed(np.array([[4, 0]])), weight[[[4, 0]]])
    np.testing.assert_array_equal(embed.attend(jnp.asarray(x, jnp.float32)), x @ weight.T)


@pytest.mark.parametrize("size", [1e-3, 1.0, 200.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
def test_a_norm_is_the_formula_rounded_once_and_weighted(dtype: Any, size: float) -> None:
    """Squares of 200 overflow float16, and those of a thousandth vanish in it beside the epsilon."""
    rng = np.random.default_rng(0)
    norm = RMSNorm(48, eps=1e-5)
    norm.weight = nnx.Param(jnp.asarray(1 + 0.2 * rng.standard_normal(48), dtype))
    x = jnp.asarray(size * rng.standard_normal((2, 5, 48)), dtype)
    found = jax.jit(lambda norm, x: norm(x))(norm, x)
    assert (found.shape, found.dtype) == (x.shape, dtype)
    wide, weight = np.asarray(x, np.float64), np.asarray(norm.weight[...], np.float64)
    normalised = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + 1e-5)
    # Rounded to the dtype before the weight and after it; 48 squares are added in float32.
    bound = (rounding(dtype) + 48 * rounding(jnp.float32)) * np.abs(normalised * weight) + 1e-7
    assert (np.abs(np.asarray(found, np.float64) - normalised * weight) <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda dtype: dtype.__name__)
def test_a_norm_is_rounded_before_it_is_weighted_as_in_transformers(dtype: Any) -> None:
    """The other way round, a third of the numbers differ in their last bit."""
    rng = np.random.default_rng(1)
    x, weight = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((20, 48), (48,)))
    norm = RMSNorm(48, eps=1e-5)
    norm.weight = nnx.Param(weight)
    wide = np.asarray(x, np.float64)
    rounded = (wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + 1e-5)).astype(dtype)
    assert np.mean(np.asarray(norm(x)) == rounded * np.asarray(weight)) > 0.99


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_the_parts_of_a_fused_product_come_apart_whoever_holds_shares_of_them(shards: int, axis: int) -> None:
    sizes, rng = (16, 8, 4), np.random.default_rng(0)
    parts = [rng.standard_normal([size if each == axis else 3 for each in range(3)]) for size in sizes]
    # The axis holds the first share of each part, then the second of each, and so on.
    shares = [np.split(part, shards, axis) for part in parts]
    fused = np.concatenate([share[shard] for shard in range(shards) for share in shares], axis)
    found = unfuse(jnp.asarray(fused), sizes, shards, axis)
    assert len(found) == 3
    for mine, expected in zip(found, parts, strict=True):
        np.testing.assert_array_equal(mine, expected.astype(np.float32))


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


def test_on_a_cpu_a_block_of_few_heads_has_more_columns() -> None:
    shapes = [(1, 3, 3, 8192, 64), (1, 8, 4, 8192, 128), (2, 3, 3, 512, 64), (1, 3, 3, 384, 64), (1, 3, 3, 300, 64)]
    assert [layers._block_on_cpu(shape) for shape in shapes] == [256, 128, 128, 128, 300]


@jax.jit
def both(*arrays: Any) -> Any:
    attended, weights = attend(*arrays)
    return attended, weights()


@pytest.mark.parametrize(("columns", "heads"), [(1, 2), (256, 2), (300, 2), (384, 2), (384, 1), (512, 2)])
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

    attended, weights = both(queries, keys.reshape(shape), values.reshape(shape), mask)
    scores = np.einsum("nkgth,nksh->nkgts", queries, keys, dtype=np.float64) / 8**0.5
    raised = np.where(mask[:, None, None], np.exp(scores), 0)
    expected = raised / np.maximum(raised.sum(axis=-1, keepdims=True), 1e-30)
    np.testing.assert_allclose(weights, expected, atol=1e-6)
    np.testing.assert_allclose(attended, np.einsum("nkgts,nksh->nkgth", expected, values), atol=1e-5)


@pytest.mark.parametrize("window", [None, 300])
def test_a_long_prompt_reads_only_the_parts_of_the_slots_that_its_columns_attend_to(window: int | None) -> None:
    """384 columns behind 500 slots, in blocks of 128 columns and parts of 256 slots, the rest of which holds NaN."""
    rng = np.random.default_rng(0)
    columns, before, slots = 384, 500, 1280
    queries, keys, values = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((1, 2, 3, columns, 8), *[(2, slots, 8)] * 2)
    )
    slot, last = np.arange(slots), np.arange(columns)[:, None] + before
    mask = (slot <= last) & (slot > last - (window or slots)) & (rng.random((1, 1, slots)) < 0.9)
    mask[0, 7] = False

    def squares(keys: jax.Array, values: jax.Array, attend: Any) -> jax.Array:
        return (attend(queries, keys, values, jnp.asarray(mask))[0] ** 2).sum()

    at_once = functools.partial(layers._attend_at_once, scale=8**-0.5, bias=None)
    expected = at_once(queries, keys, values, jnp.asarray(mask))[0]
    holed = (jnp.where(slot[:, None] >= 1024, np.nan, each) for each in (keys, values))
    np.testing.assert_allclose(jax.jit(attend_only)(queries, *holed, mask), expected, atol=1e-5)
    ours, theirs = (
        jax.jit(jax.grad(functools.partial(squares, attend=each), (0, 1)))(keys, values) for each in (attend, at_once)
    )
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def attend_only(*arrays: Any) -> Any:
    return attend(*arrays)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("columns", [1, 384])
@pytest.mark.parametrize(("rows", "heads", "group"), [(1, 1, 5), (1, 2, 1), (2, 2, 5)])
def test_attention_of_any_dtype_and_group_is_that_of_the_formula(
    rows: int, heads: int, group: int, columns: int, dtype: Any
) -> None:
    """The exponential of a score over 89 is infinite in float32, of one over 11 in float16."""
    rng = np.random.default_rng(0)
    slots = columns + 3
    queries = jnp.asarray(20 * rng.standard_normal((rows, heads, group, columns, 8)), dtype)
    shape = (*[each for each in (rows, heads) if each > 1], slots, 8)  # without the ones
    keys, values = (jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(2))
    mask = rng.random((rows, columns, slots)) < 0.7
    mask[..., 0] = True
    attended, weights = both(queries, keys, values, mask)
    assert attended.dtype == weights.dtype == dtype and attended.shape == queries.shape
    wide = [np.asarray(each, np.float64).reshape(rows, heads, -1, slots, 8) for each in (keys, values)]
    scores = np.asarray(queries, np.float64) @ wide[0].swapaxes(-1, -2) / 8**0.5
    assert scores.max() > (11 if columns == 1 else 89)
    scores = np.where(mask[:, None, None], scores, -np.inf)
    raised = np.exp(scores - scores.max(axis=-1, keepdims=True))
    expected = raised / raised.sum(axis=-1, keepdims=True)
    # A score of 100 in float32 is off by 1e-5, and a weight as much; then each number is rounded to the dtype once.
    np.testing.assert_allclose(weights, expected, rtol=1e-4 + rounding(dtype), atol=1e-6)
    np.testing.assert_allclose(attended, expected @ wide[1], atol=2e-4 + 4 * rounding(dtype))


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


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("columns", [1, 5, 40])
@pytest.mark.parametrize(("rows", "heads", "group"), [(2, 3, 4), (1, 3, 2), (2, 1, 7), (1, 1, 1)])
def test_attention_to_int8_is_attention_to_the_numbers_that_it_stands_for(
    rows: int, heads: int, group: int, columns: int, dtype: Any
) -> None:
    rng = np.random.default_rng(columns)
    batch = [size for size in (rows, heads) if size > 1]
    queries = jnp.asarray(rng.standard_normal((rows, heads, group, columns, 16)), dtype)
    keys, values = (Int8Array.of(jnp.asarray(rng.standard_normal((*batch, 64, 16)), dtype)) for _ in range(2))
    mask = jnp.asarray(rng.random((rows, columns, 64)) < 0.7).at[0, 0].set(False)
    attended, weights = jax.jit(lambda *arrays: [attend(*arrays)[0], attend(*arrays)[1]()])(queries, keys, values, mask)
    assert attended.dtype == weights.dtype == dtype
    # Dequantised in float32: the scales are never rounded to the dtype.
    wide = [replace(each, dtype=jnp.dtype(jnp.float32)).dequantized() for each in (keys, values)]
    expected, expected_weights = attend(queries.astype(jnp.float32), *wide, mask)
    tolerance = 1e-4 + 3 * rounding(dtype)
    np.testing.assert_allclose(attended.astype(jnp.float32), expected, atol=tolerance)
    np.testing.assert_allclose(weights.astype(jnp.float32), expected_weights(), atol=tolerance)


@pytest.mark.parametrize(
    ("shape", "block"), [((1, 2048), 2048), ((1, 4096), 512), ((3, 768), 384), ((2, 1152), 384), ((1, 2100), 2100)]
)
def test_a_cpu_computes_many_tokens_in_blocks_that_stay_in_its_caches(shape: tuple[int, int], block: int) -> None:
    x, seen = jnp.asarray(np.random.default_rng(0).normal(size=(*shape, 4)), jnp.float32), set()

    def function(x: jax.Array) -> jax.Array:
        seen.add(x.shape[:2])
        return jnp.cumsum(x, axis=2)

    lowered = jax.jit(lambda x: layers.by_tokens(function, x)).trace(x)
    for platform in ("cpu", "cuda"):
        in_blocks = "stablehlo.while" in lowered.lower(lowering_platforms=(platform,)).as_text()
        assert in_blocks == (platform == "cpu" and block < shape[0] * shape[1])
    assert min(seen, key=np.prod) == (shape if block == shape[0] * shape[1] else (1, block))
    np.testing.assert_array_equal(layers.by_tokens(function, x), function(x))


def test_the_mlp_of_a_long_prompt_is_computed_in_blocks() -> None:
    config = {"model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 4096}
    model = jaxgen.from_config(config | {"num_hidden_layers": 1, "num_attention_heads": 2})
    compiled = jax.jit(lambda model, ids: model(ids)).lower(model, jnp.ones((1, 3072), jnp.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 3072 * 4096, "as much as the units of all tokens"

"""Weights of one byte: what they stand for, what products with them are, and what a model of them is worth."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxgen
from jaxgen.decoding import loop
from jaxgen.models.int8 import Int8, quantised

RNG = np.random.default_rng(0)


def matrix(out: int = 40, columns: int = 64) -> np.ndarray:
    return RNG.standard_normal((out, columns)).astype(np.float32) * RNG.uniform(0.01, 10, (out, 1)).astype(np.float32)


def wide(weight: Int8) -> np.ndarray:
    rows = np.asarray(weight.values, np.float64) * np.asarray(weight.scales, np.float64)[:, None]
    rows[:, np.asarray(weight.columns)] += np.asarray(weight.outliers, np.float64)
    return rows


@pytest.mark.parametrize("of", [np.asarray, jnp.asarray], ids=["NumPy", "JAX"])
def test_every_weight_is_off_by_half_a_127th_of_the_largest_of_its_row_at_most(of: Any) -> None:
    array = matrix()
    found = quantised(of(array))
    assert found.values.dtype == np.int8 and found.scales.dtype == np.float32
    unit = np.abs(array).max(axis=1, keepdims=True) / 127
    assert (np.abs(wide(found) - array) <= 0.5001 * unit).all()


def test_a_matrix_of_many_rows_is_quantised_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    array = matrix()
    array[:7, 3], array[:, 5] = 0, array[:, 5] / 10  # column 3 is the smallest of the first part, 5 of all
    whole = quantised(array)
    monkeypatch.setattr("jaxgen.models.int8._ROWS", 7)
    in_parts = quantised(array)
    for found, expected in zip(jax.tree.leaves(in_parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("of", [np.asarray, jnp.asarray], ids=["NumPy", "JAX"])
def test_columns_of_outliers_are_exact_and_do_not_spoil_the_others(of: Any) -> None:
    """One with a huge entry, and one whose entries are all small, as those of large inputs are."""
    array = matrix()
    array[3, 7], array[:, 50] = 1e6, array[:, 50] / 100
    found = quantised(of(array))
    assert sorted(np.asarray(found.columns).tolist()) == [7, 50]
    np.testing.assert_array_equal(wide(found)[:, [7, 50]], array[:, [7, 50]])
    unit = np.abs(np.delete(array, 7, axis=1)).max(axis=1, keepdims=True) / 127
    assert (np.abs(wide(found) - array) <= 0.5001 * unit).all()


@pytest.mark.parametrize(("columns", "outliers"), [(16, 0), (32, 1), (64, 2), (1024, 16)])
def test_at_most_sixteen_columns_and_one_in_32_are_outliers(columns: int, outliers: int) -> None:
    weight = quantised(jnp.asarray(matrix(columns=columns)))
    assert weight.outliers.shape == (40, outliers) and len({*np.asarray(weight.columns).tolist()}) == outliers
    x = jnp.asarray(RNG.standard_normal((1, columns)), jnp.float32)
    np.testing.assert_allclose(weight.product(x), np.asarray(x) @ wide(weight).T, rtol=1e-3, atol=0.02)


def test_a_row_looked_up_is_that_of_the_product() -> None:
    weight = quantised(jnp.asarray(matrix()))
    np.testing.assert_allclose(weight[jnp.asarray([[4, 0], [39, 4]])], wide(weight)[[[4, 0], [39, 4]]], rtol=1e-6)


def test_a_row_of_zeros_stays_zero_and_a_nan_stays_in_its_row() -> None:
    array = matrix()
    array[3], array[5, 2] = 0, np.nan
    products = np.asarray(quantised(jnp.asarray(array)).product(jnp.ones((1, 64))))
    assert products[0, 3] == 0 and np.flatnonzero(np.isnan(products[0])).tolist() == [5]


@pytest.mark.parametrize("rows", [1, 2, 5, 70])
@pytest.mark.parametrize("form", ["_product", "_product_of_bytes"])
def test_a_product_is_that_of_the_wide_weights(rows: int, form: str) -> None:
    weight = quantised(jnp.asarray(matrix()))
    x = RNG.standard_normal((rows, 64)).astype(np.float32) * RNG.uniform(1e-3, 1e3, (rows, 1)).astype(np.float32)
    found = np.asarray(jax.jit(getattr(weight, form))(jnp.asarray(x)))
    expected = x.astype(np.float64) @ wide(weight).T
    # 15 bits of what is multiplied: an error of half a 32,258th of the largest, per entry.
    bound = np.abs(x).max(axis=1)[:, None] / 32258 * np.abs(wide(weight)).sum(axis=1)
    assert (np.abs(found - expected) <= bound).all()


@pytest.mark.parametrize(("rows", "multiplied"), [(1, 8), (2, 2)])
def test_a_gpu_multiplies_a_single_row_as_eight(rows: int, multiplied: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = quantised(jnp.asarray(matrix())), jnp.asarray(RNG.standard_normal((rows, 64)), jnp.float32)
    elsewhere = weight._product(x)
    exported = jax.export.export(jax.jit(weight.product), platforms=["cuda"])(x)
    assert f"tensor<{multiplied}x40xf32>" in exported.mlir_module()
    monkeypatch.setattr("jax.lax.platform_dependent", lambda *args, cuda=None, default, **_: (cuda or default)(*args))
    np.testing.assert_allclose(weight._product(x), elsewhere, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(64,), (1, 1, 64), (3, 5, 64)], ids=str)
def test_outlier_columns_are_multiplied_alike_on_all_platforms(shape: tuple[int, ...]) -> None:
    weight, x = quantised(jnp.asarray(matrix())), jnp.asarray(RNG.standard_normal(shape), jnp.float32)
    expected = np.asarray(x)[..., np.asarray(weight.columns)] @ np.asarray(weight.outliers).T
    for form in (weight._outlier_product_on_tpu, weight._outlier_product_of_gathered):
        np.testing.assert_allclose(form(x), expected, rtol=1e-5, atol=1e-5)


def test_a_product_with_nothing_but_zeros_is_zero() -> None:
    assert not np.asarray(quantised(jnp.asarray(matrix()))._product_of_bytes(jnp.zeros((2, 64)))).any()


def test_a_loaded_model_holds_a_byte_per_weight_and_gives_nearly_the_same_distributions() -> None:
    model = jaxgen.load(jaxgen.BUNDLED_MODEL, dtype="float32")
    small = jaxgen.load(jaxgen.BUNDLED_MODEL, dtype="float32", quantize="int8")
    size = {
        each: sum(leaf.nbytes for leaf in jax.tree.leaves(each_model))
        for each, each_model in (("f", model), ("q", small))
    }
    assert size["q"] < 0.29 * size["f"]
    assert small.dtype == model.dtype == jnp.float32
    ids = np.asarray(jaxgen.generate(model, [[1, 5, 6]], max_new_tokens=60, eos_token_id=None))
    log_probabilities = jax.jit(lambda model: jax.nn.log_softmax(model(ids)))
    log_p, log_q = log_probabilities(model), log_probabilities(small)
    divergence = (jnp.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    assert 0 < float(divergence.mean()) < 0.005


def test_a_model_in_bfloat16_multiplies_and_caches_in_it(one_layer: Path) -> None:
    small = jaxgen.load(one_layer, dtype="bfloat16", quantize="int8")
    assert small.dtype == jnp.bfloat16
    assert small.make_cache(1, 4).layers[0][0].dtype == jnp.bfloat16
    assert jaxgen.generate(small, [[5, 6]], max_new_tokens=4, num_beams=2, eos_token_id=None).shape == (1, 6)


def test_what_is_quantised_at_load_is_what_is_quantised_at_random() -> None:
    config = {"model_type": "llama", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    small, model = jaxgen.from_config(config, quantize="int8"), jaxgen.from_config(config)
    for found, expected in zip(jax.tree.leaves(small), jax.tree.leaves(jax.tree.map(quantised, model)), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_no_program_holds_its_weights_wide() -> None:
    config = {"model_type": "llama", "vocab_size": 997, "hidden_size": 256, "intermediate_size": 512}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = jaxgen.from_config(config, quantize="int8")
    call = jaxgen.prepare(model, np.ones((1, 20), int), max_new_tokens=20)
    state = jax.eval_shape(lambda: loop._prefill(model, call))
    compiled = loop.advance.lower(model, state, call.strategy, np.int32(1)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 256 * 1024  # the matrices of a layer are 590,000 bytes


def test_other_kinds_and_saving_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`quantize`='int2' is not supported"):
        jaxgen.load(jaxgen.BUNDLED_MODEL, quantize="int2")
    with pytest.raises(ValueError, match="`quantize`='fp8'"):
        jaxgen.from_config({}, quantize="fp8")
    with pytest.raises(ValueError, match="`model` is quantised"):
        jaxgen.save(jaxgen.load(jaxgen.BUNDLED_MODEL, quantize="int8"), tmp_path)

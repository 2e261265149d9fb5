"""Weights of half a byte: what they stand for, what products with them are, and what a model of them is worth."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxgen
from jaxgen.checkpoint.source import named_leaves
from jaxgen.decoding import loop
from jaxgen.models.int4 import Int4, quantised
from jaxgen.models.int8 import Int8

RNG = np.random.default_rng(0)
OF = pytest.mark.parametrize("of", [np.asarray, jnp.asarray], ids=["NumPy", "JAX"])
CONFIG = {"model_type": "llama", "vocab_size": 97, "hidden_size": 64, "intermediate_size": 80}
CONFIG |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def matrix(out: int = 40, columns: int = 64) -> np.ndarray:
    return RNG.standard_normal((out, columns)).astype(np.float32) * RNG.uniform(0.01, 10, (out, 1)).astype(np.float32)


def wide(weight: Int8) -> np.ndarray:
    """float64 [out, in], by the definition of the format."""
    values = np.asarray(weight.values, np.int64)
    if isinstance(weight, Int4):
        halves = np.stack([values & 15, values >> 4]) - 8  # [2, 16, out, groups]
        values = (halves * np.asarray(weight.multipliers, np.int64)).transpose(2, 3, 0, 1)
        values = values.reshape(len(values), -1)[:, : weight.inputs]
    rows = values * np.asarray(weight.scales, np.float64)[:, None]
    rows[:, np.asarray(weight.columns)] += np.asarray(weight.outliers, np.float64)
    return rows


def groups(array: np.ndarray) -> np.ndarray:
    """[out, groups, 32], padded with zeros."""
    return np.pad(array, ((0, 0), (0, -array.shape[1] % 32))).reshape(len(array), -1, 32)


@pytest.mark.parametrize("columns", [64, 41])
@OF
def test_weights_are_off_by_half_an_eighth_of_the_largest_of_their_group_or_less(columns: int, of: Any) -> None:
    array = matrix(columns=columns)
    found = quantised(of(array))
    assert found.values.dtype == np.uint8 and found.values.shape == (16, 40, -(-columns // 32))
    assert found.multipliers.dtype == np.int8 and found.scales.dtype == np.float32
    rest = array.copy()
    rest[:, np.asarray(found.columns)] = 0
    peaks = np.abs(groups(rest)).max(axis=2, keepdims=True)
    errors = np.sqrt((groups(wide(found) - array) ** 2).mean(axis=2, keepdims=True))
    assert (errors <= peaks / 16 + peaks.max(axis=1, keepdims=True) / 240).all()


@OF
def test_the_multiplier_of_a_group_is_the_best_of_three(of: Any) -> None:
    array = np.ones((2, 16), np.float32)  # too few columns for outliers
    array[:, 0] = 15, -15
    found = quantised(of(array))
    np.testing.assert_allclose(found.scales, [0.125, 0.125], rtol=1e-6)
    # In steps of 15, 14 and 13 eighths, 1 is off by 7, 6 and 5 eighths, and 15 by 0, 8 and 16.
    np.testing.assert_array_equal(found.multipliers, [[-14], [14]])


def test_numpy_and_jax_give_the_same_values() -> None:
    array = matrix(columns=100)
    found = quantised(jnp.asarray(array))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(quantised(array)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)  # XLA may multiply by a reciprocal


def test_a_matrix_of_many_rows_is_quantised_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    array = matrix()
    array[:7, 3], array[:, 5] = 0, array[:, 5] / 10  # column 3 is the smallest of the first part, 5 of all
    whole = quantised(array)
    monkeypatch.setattr("jaxgen.models.int8._ROWS", 7)
    for found, expected in zip(jax.tree.leaves(quantised(array)), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(found, expected)


@OF
def test_columns_of_outliers_are_exact_and_do_not_spoil_their_group(of: Any) -> None:
    array = matrix()
    array[3, 7], array[:, 50] = 1e6, array[:, 50] / 100
    found = quantised(of(array))
    assert sorted(np.asarray(found.columns).tolist()) == [7, 50]
    np.testing.assert_array_equal(wide(found)[:, [7, 50]], array[:, [7, 50]])
    assert np.abs(np.delete(wide(found) - array, 7, axis=1)).max() < np.abs(np.delete(array, 7, axis=1)).max() / 6


def test_what_is_no_matrix_of_several_rows_stays() -> None:
    for array in (np.ones(64, np.float32), np.ones((1, 64), np.float32)):
        assert quantised(array) is array


@pytest.mark.parametrize("columns", [64, 41])
def test_rows_looked_up_are_those_of_the_product(columns: int) -> None:
    weight = quantised(jnp.asarray(matrix(columns=columns)))
    for ids in ([[4, 0], [39, 4]], [[7]]):
        np.testing.assert_allclose(weight[jnp.asarray(ids)], wide(weight)[ids], rtol=1e-6)


def test_rows_and_groups_of_zeros_stay_zero_and_a_nan_stays_in_its_row() -> None:
    array = matrix()
    array[3], array[4, :32], array[5, 2] = 0, 0, np.nan
    weight = quantised(jnp.asarray(array))
    assert not wide(weight)[3].any() and not wide(weight)[4, :32].any()
    products = np.asarray(weight.product(jnp.ones((1, 64))))
    assert products[0, 3] == 0 and np.flatnonzero(np.isnan(products[0])).tolist() == [5]


@pytest.mark.parametrize("columns", [64, 41])
@pytest.mark.parametrize("rows", [1, 5])
def test_a_product_is_that_of_the_wide_weights_on_every_platform(rows: int, columns: int) -> None:
    weight = quantised(jnp.asarray(matrix(columns=columns)))
    x = RNG.standard_normal((rows, columns)).astype(np.float32)
    expected = x.astype(np.float64) @ wide(weight).T
    # 15 bits of what is multiplied: an error of half a 32,258th of the largest, per entry.
    bound = np.abs(x).max(axis=1)[:, None] / 32258 * np.abs(wide(weight)).sum(axis=1) + 1e-4
    for product in (weight._product, weight._product_of_bytes):
        lowered = jax.jit(product).trace(jnp.asarray(x)).lower(lowering_platforms=("cpu",))
        assert (np.abs(np.asarray(lowered.compile()(jnp.asarray(x))) - expected) <= bound).all()
    on_a_gpu = jax.export.export(jax.jit(weight.product), platforms=["cuda"])(jnp.asarray(x))
    assert "while" not in on_a_gpu.mlir_module(), "the slices are for the caches of a CPU"


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("platform", ["tpu", "default"])
def test_the_forms_for_other_platforms_give_the_same_products(
    platform: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = quantised(jnp.asarray(matrix(columns=100)))
    x = jnp.asarray(RNG.integers(-127, 128, (rows, 100)), jnp.int8)
    in_slices = weight._multiply(x, jnp.int32)
    monkeypatch.setattr("jax.lax.platform_dependent", lambda *args, **forms: forms[platform](*args))
    np.testing.assert_array_equal(weight._multiply(x, jnp.int32), in_slices)


def test_a_model_holds_half_a_byte_per_weight_and_its_embedding_in_int8() -> None:
    made = functools.partial(jaxgen.from_config, CONFIG | {"tie_word_embeddings": False})
    model, small = (jax.eval_shape(functools.partial(made, quantize=each)) for each in (None, "int4"))
    kinds = {path: type(leaf) for path, leaf in named(small)}
    assert kinds.pop("embed_tokens.weight") is kinds.pop("lm_head.weight") is Int8
    assert {kind for path, kind in kinds.items() if "proj" in path} == {Int4}
    assert {kind for path, kind in kinds.items() if "norm" in path} == {jax.ShapeDtypeStruct}
    matrices = [leaf for path, leaf in named_leaves(model) if "proj" in path]
    held = [leaf for _, leaf in named(small) if isinstance(leaf, Int4)]
    for given, found in zip(matrices, held, strict=True):
        assert found.values.size == given.shape[0] * -(-given.shape[1] // 32) * 16


def named(model: Any) -> Any:
    leaves, treedef = jax.tree.flatten(model, is_leaf=lambda leaf: isinstance(leaf, Int8))
    paths = (path for path, _ in named_leaves(treedef.unflatten(range(len(leaves)))))
    return zip(paths, leaves, strict=True)


def test_generate_gives_the_tokens_of_the_dequantised_weights() -> None:
    small = jaxgen.load(jaxgen.BUNDLED_MODEL, dtype="float32", quantize="int4").first_layers(1)
    leaves = [jnp.asarray(wide(leaf), jnp.float32) if isinstance(leaf, Int8) else leaf for _, leaf in named(small)]
    dequantised = jax.tree.unflatten(jax.tree.structure(small, is_leaf=lambda leaf: isinstance(leaf, Int8)), leaves)
    tokens = [jaxgen.generate(each, [[1, 5, 6]], max_new_tokens=60, eos_token_id=None) for each in (small, dequantised)]
    np.testing.assert_array_equal(*tokens)


def test_the_distributions_stay_near_those_of_the_full_model(tokenizer: Any) -> None:
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her dog."
    ids = tokenizer(text, return_tensors="np")["input_ids"]
    log_probabilities = jax.jit(lambda model: jax.nn.log_softmax(model(jnp.asarray(ids))))
    model, small = (jaxgen.load(jaxgen.BUNDLED_MODEL, dtype="float32", quantize=each) for each in (None, "int4"))
    log_p, log_q = log_probabilities(model), log_probabilities(small)
    divergence = float((jnp.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean())
    assert 0 < divergence < 0.1, divergence


def test_a_copy_is_the_model_that_is_loaded_so_and_caches_in_its_dtype() -> None:
    load = functools.partial(jaxgen.load, jaxgen.BUNDLED_MODEL, dtype="bfloat16")
    copy, small = jax.eval_shape(jaxgen.to_int4, load()), load(quantize="int4")
    assert small.dtype == jnp.bfloat16 and small.make_cache(1, 4).layers[0][0].dtype == jnp.bfloat16
    assert jax.tree.structure(copy) == jax.tree.structure(small)
    for found, expected in zip(jax.tree.leaves(copy), jax.tree.leaves(small), strict=True):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)


def test_no_program_holds_its_weights_wide() -> None:
    config = CONFIG | {"vocab_size": 997, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    model = jaxgen.from_config(config, quantize="int4")
    call = jaxgen.prepare(model, np.ones((1, 20), int), max_new_tokens=20)
    state = jax.eval_shape(lambda: loop._prefill(model, call))
    compiled = loop.advance.lower(model, state, call.strategy, np.int32(1)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 256 * 1024  # as bytes, a layer has 590,000


def test_saving_and_quantising_again_are_refused(tmp_path: Path) -> None:
    small = jaxgen.load(jaxgen.BUNDLED_MODEL, quantize="int4")
    with pytest.raises(ValueError, match="`model` is quantised"):
        jaxgen.save(small, tmp_path)
    for again in (jaxgen.to_int4, jaxgen.to_int8):
        with pytest.raises(ValueError, match="`model` is already in int4"):
            again(small)

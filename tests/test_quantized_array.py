import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.quantized_array import BACKENDS, Float8Array, Int8Array, QuantizedArray, dequantized, mapped

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def array(*shape: int, dtype: object = jnp.float32, seed: int = 0) -> jax.Array:
    # Columns of very different sizes.
    random = np.random.default_rng(seed)
    return jnp.asarray(random.normal(size=shape) * 10.0 ** random.integers(-3, 3, (*shape[:-1], 1)), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
def test_int8_is_off_by_half_a_unit_of_each_column_and_one_rounding(dtype: object) -> None:
    given = array(2, 3, 5, 16, dtype=dtype)
    found = Int8Array.of(given).dequantized()
    assert found.dtype == dtype
    wide = np.asarray(given, np.float64)
    unit = np.abs(wide).max(axis=-1, keepdims=True) / 127
    rounding = float(jnp.finfo(dtype).eps) * np.abs(wide)
    assert (np.abs(np.asarray(found, np.float64) - wide) <= 0.5001 * unit + rounding + 1e-7).all()


@pytest.mark.parametrize("kind", BACKENDS.values())
def test_zeros_stay_zeros(kind: type[QuantizedArray]) -> None:
    np.testing.assert_array_equal(kind.of(jnp.zeros((2, 4, 8))).dequantized(), 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda dtype: dtype.__name__)
def test_fp8_holds_the_numbers_of_transformers_also_where_new_columns_are_too_large(dtype: object) -> None:
    torch = pytest.importorskip("torch")
    cache_utils = pytest.importorskip("transformers.cache_utils")
    if not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this transformers has no cache in fp8")
    layer = cache_utils.Fp8QuantizedLayer()
    prompt, new = array(2, 3, 5, 16, dtype=dtype), array(2, 3, 1, 16, dtype=dtype, seed=1)
    new = new.at[0, 0, 0, :2].set(jnp.array([3, -1.05], dtype) * jnp.abs(prompt).max())
    target = getattr(torch, prompt.dtype.name)
    tensors = [torch.tensor(np.asarray(each, np.float32)).to(target) for each in (prompt, new)]
    layer.update(tensors[0], -tensors[0])
    theirs = [np.asarray(each.float()) for each in layer.update(tensors[1], -tensors[1])]
    ours = Float8Array.of(prompt)
    both = np.concatenate([ours.dequantized(), ours.quantized(new).dequantized()], axis=2)
    np.testing.assert_array_equal(both.astype(np.float32), theirs[0])
    np.testing.assert_array_equal(-both.astype(np.float32), theirs[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
def test_compiled_the_scale_of_fp8_has_the_bits_of_a_division(dtype: object) -> None:
    """Not of a product with 1/448, which differs for half of all numbers, and then every number of the cache does."""
    given = jnp.asarray(np.random.default_rng(0).normal(size=(300, 4, 8)), dtype)
    found = jax.jit(jax.vmap(Float8Array.of))(given)
    largest = np.abs(np.asarray(given, np.float32)).max(axis=(1, 2))
    np.testing.assert_array_equal(found.scales, largest / np.float32(448))


def test_only_columns_that_count_set_the_scale_of_fp8() -> None:
    given = array(2, 3, 5, 16)
    valid = jnp.asarray(np.arange(5) >= 2)[None, None, :, None]
    expected = Float8Array.of(given[:, :, 2:])
    found = Float8Array.of(given, valid)
    assert found.scales == expected.scales
    np.testing.assert_array_equal(found.dequantized()[:, :, 2:], expected.dequantized())


@pytest.mark.parametrize("kind", BACKENDS.values())
def test_moving_slots_moves_their_scales(kind: type[QuantizedArray]) -> None:
    given = kind.of(array(2, 3, 5, 16))
    moved = mapped(lambda each: each[::-1, :, 1:4], given)
    assert isinstance(moved, kind)
    assert (moved.shape, moved.ndim, moved.dtype) == ((2, 3, 3, 16), 4, jnp.float32)
    np.testing.assert_array_equal(moved.dequantized(), given.dequantized()[::-1, :, 1:4])


def test_what_is_not_quantised_stays_as_it_is() -> None:
    given = array(2, 5, 16)
    assert dequantized(given) is given
    np.testing.assert_array_equal(mapped(lambda each: each[1:], given), given[1:])

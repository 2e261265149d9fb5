"""The kernel for a GPU's decode steps, computed by Pallas' interpreter, beside the attention of other devices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreted import gpu_kernels, queries_keys_values
from prepared import prepared

import jaxgen
from jaxgen.generation.running import driver
from jaxgen.models import decode_attention, layers, llama
from jaxgen.quantized_array import Float8Array, Int8Array

# N, K, G, T, S, H. Few rows share the slots among several programs, many rows do not.
SIZES = [
    (3, 2, 4, 1, 256, 64),
    (2, 1, 3, 5, 192, 32),
    (40, 8, 1, 1, 128, 32),
    (2, 2, 8, 4, 320, 32),
    (1, 1, 7, 1, 64, 128),
]


def case(sizes: tuple[int, ...], dtype: Any, masks: str) -> tuple[jax.Array, ...]:
    rows, _, _, columns, slots, _ = sizes
    random = np.random.default_rng(slots)
    mask = np.zeros((rows, columns, slots), bool)
    for row in range(rows):
        start, end = sorted(random.integers(0, slots + 1, 2)) if masks == "ragged" else (slots // 2, slots // 2 + 30)
        mask[row, :, start:end] = random.random((columns, end - start)) < (0.7 if masks == "ragged" else 1)
    if rows > 1:
        mask[0] = False
    return *queries_keys_values(sizes[:6], dtype), jnp.asarray(mask)


@pytest.mark.parametrize("masks", ["ragged", "window"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_kernel_computes_the_attention_of_other_devices(sizes: tuple[int, ...], masks: str) -> None:
    arrays = case(sizes, jnp.float32, masks)
    ours = decode_attention.decode_attention(*arrays, 0.2, interpret=True)
    theirs, _ = layers.attend(*arrays, 0.2)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    if sizes[0] > 1:
        assert not ours[0].any()  # that row attends to no slot


@pytest.mark.parametrize("kind", [Int8Array, Float8Array])
@pytest.mark.parametrize("sizes", SIZES[:2], ids=str)
def test_the_kernel_widens_eight_bits_in_place(sizes: tuple[int, ...], kind: Any) -> None:
    queries, *pair, mask = case(sizes, jnp.float32, "ragged")
    pair = [kind.of(each) for each in pair]
    ours = decode_attention.decode_attention(queries, *pair, mask, 0.2, interpret=True)
    theirs, _ = layers.attend(queries, *(each.dequantized() for each in pair), mask, 0.2)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_the_kernel_rounds_as_other_devices_do() -> None:
    arrays = case(SIZES[0], jnp.bfloat16, "ragged")
    ours = decode_attention.decode_attention(*arrays, 0.2, interpret=True)
    theirs, _ = layers.attend(*(each if each.dtype == bool else each.astype(jnp.float32) for each in arrays), 0.2)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours.astype(jnp.float32), theirs, atol=2e-2)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_kernel_on_this_gpu(sizes: tuple[int, ...], dtype: str) -> None:
    queries, keys, values, mask = case(sizes, dtype, "ragged")
    ours = jax.jit(lambda *arrays: layers.attend(*arrays, kernel=True)[0])
    assert "triton" in ours.lower(queries, keys, values, mask).as_text()
    wide = [each.astype(jnp.float32) for each in (queries, keys, values)]
    theirs, _ = layers.attend(*wide, mask)
    np.testing.assert_allclose(ours(queries, keys, values, mask).astype(jnp.float32), theirs, atol=2e-2)


def test_the_kernel_reads_no_block_before_or_after_the_slots_in_use() -> None:
    queries, keys, values, mask = case(SIZES[0], jnp.float32, "window")
    used = jnp.asarray(mask[1, 0]).reshape(-1, decode_attention.BLOCK).any(axis=1).repeat(decode_attention.BLOCK)
    unread = [jnp.where(used[:, None], each, jnp.nan) for each in (keys, values)]
    attended = decode_attention.decode_attention(queries, *unread, mask, 0.2, interpret=True)
    assert np.isfinite(attended).all()


def test_the_kernel_under_vmap() -> None:
    arrays = [jnp.stack([each, each[::-1]]) for each in case(SIZES[0], jnp.float32, "ragged")]
    both = jax.vmap(lambda *arrays: decode_attention.decode_attention(*arrays, 0.2, interpret=True))(*arrays)
    np.testing.assert_allclose(both[1], both[0][::-1], atol=1e-6)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_beams": 3, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "quantized", "cache_config": {"backend": "int8"}},
        {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}, "num_beams": 2},
    ],
    ids=["greedy", "beams", "assisted", "int8", "beams in fp8"],
)
def test_tokens_are_those_of_other_devices(arguments: dict[str, Any]) -> None:
    config = {
        **{"model_type": "mistral", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16},
        **{"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.4},
        "sliding_window": 20,
    }
    model = jaxgen.from_config(config)
    prompts = np.random.default_rng(0).integers(3, 96, (2, 9))
    mask = np.ones_like(prompts)
    prompts[1, :4], mask[1, :4] = 0, 0
    if "prompt_lookup_num_tokens" in arguments:  # of one row, as in transformers
        prompts, mask = prompts[:1].repeat(2, axis=1), mask[:1].repeat(2, axis=1)
    options = {"attention_mask": mask, "max_new_tokens": 24, "pad_token_id": 0, "eos_token_id": None, **arguments}
    expected = jaxgen.generate(model, prompts, **options)
    with gpu_kernels():
        np.testing.assert_array_equal(jaxgen.generate(model, prompts, **options), expected)


def test_products_of_half_precision_are_exact_whatever_precision_jax_is_asked_for() -> None:
    arrays = case(SIZES[0], jnp.bfloat16, "ragged")
    with jax.default_matmul_precision("BF16_BF16_F32_X6"):  # which Triton does not know
        jaxpr = str(jax.make_jaxpr(lambda: decode_attention.decode_attention(*arrays, 0.2, interpret=True))())
    assert "precision=(Precision.DEFAULT, Precision.DEFAULT)" in jaxpr
    assert "X6" not in jaxpr


def test_attention_over_several_devices_does_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would gather the cache on each of them."""
    monkeypatch.setattr(layers, "fits", lambda *sizes: True)
    arrays = case(SIZES[0], jnp.bfloat16, "ragged")
    for kernel in (True, False):
        jaxpr = str(jax.make_jaxpr(lambda kernel=kernel: layers.attend(*arrays, kernel=kernel)[0])())
        assert ("pallas_call" in jaxpr) == kernel


@pytest.mark.parametrize("kind", [Int8Array, Float8Array])
def test_a_quantised_cache_has_the_kernel_and_arrays_of_two_dtypes_have_none(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "fits", lambda *sizes: True)
    queries, keys, values, _ = case(SIZES[0], jnp.bfloat16, "ragged")
    assert layers._kernels(queries, kind.of(keys), kind.of(values), 0.2).keys() == {"cuda"}
    assert not layers._kernels(queries.astype(jnp.float16), kind.of(keys), kind.of(values), 0.2)


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [((4, 64, 64), "float32"), ((65, 64, 64), "bfloat16"), ((4, 100, 64), "bfloat16"), ((4, 64, 80), "bfloat16")],
)
def test_the_kernel_is_left_out_where_it_does_not_fit(
    sizes: tuple[int, int, int], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_attention, "installed", lambda: True)
    assert decode_attention.fits(4, 64, 64, jnp.dtype("bfloat16"))
    assert not decode_attention.fits(*sizes, jnp.dtype(dtype))


def test_without_a_compiler_for_gpus_nothing_is_traced_for_them() -> None:
    if not decode_attention.installed():
        assert not decode_attention.fits(4, 64, 64, jnp.dtype("bfloat16"))


def test_a_cache_whose_used_slots_alone_are_read_has_its_size_from_the_start(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama.Llama, "slots_per_block", 64)
    call = prepared(model, [[5, 6]], max_new_tokens=3000, eos_token_id=None)
    (size,) = driver.cache_sizes(call, weights=0)
    assert call.cache_slots <= size.slots < call.cache_slots + 64
    assert size.slots % 64 == 0
    assert size.steps_until_full == call.forward_passes

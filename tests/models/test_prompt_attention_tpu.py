"""The kernel for a TPU's long prompts, computed by Pallas' interpreter, beside the attention of other devices."""

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreted import as_if_on, queries_keys_values

import jaxgen
from jaxgen.models import layers, prompt_attention_tpu

# N, K, G, T, S, H. Blocks have 512 slots, and these columns: 128, 512, 128, 256, 64.
SIZES = [
    (2, 2, 4, 384, 384, 64),
    (3, 1, 1, 512, 700, 64),
    (1, 2, 7, 384, 1100, 128),
    (2, 1, 4, 512, 300, 128),
    (2, 1, 12, 384, 1024, 32),
]


def case(sizes: tuple[int, ...], dtype: Any, masks: str) -> tuple[jax.Array, ...]:
    """Row 0 has padding on the left and, as every row, columns that attend to no slot; the last row has only these."""
    rows, _, _, columns, slots, _ = sizes
    random = np.random.default_rng(slots)
    distances = np.arange(columns)[:, None] + max(0, slots - columns - 20) - np.arange(slots)
    mask = np.broadcast_to(distances >= 0, (rows, columns, slots)).copy()
    if masks == "window":
        mask &= distances < 100
    if masks == "ragged":
        mask = random.random(mask.shape) < np.linspace(0, 1, columns)[:, None]
        mask[:, columns // 2 :, : slots // 2] = False
    mask[0, :, :30] = False
    mask[:, 40:50] = False
    if rows > 1:
        mask[-1] = False
    return *queries_keys_values(sizes[:6], dtype), jnp.asarray(mask)


@pytest.mark.parametrize("masks", ["causal", "window", "ragged"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_kernel_computes_the_attention_of_other_devices(sizes: tuple[int, ...], masks: str) -> None:
    arrays = case(sizes, jnp.float32, masks)
    ours = prompt_attention_tpu.prompt_attention_tpu(*arrays, 0.2, interpret=True)
    theirs, _ = layers.attend(*arrays, 0.2)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    unused = ~arrays[-1].any(axis=2)
    assert unused.any()
    assert not jnp.where(unused[:, None, None, :, None], ours, 0).any()


def test_the_kernel_rounds_as_other_devices_do() -> None:
    arrays = case(SIZES[2], jnp.bfloat16, "causal")
    ours = prompt_attention_tpu.prompt_attention_tpu(*arrays, 0.2, interpret=True)
    theirs, _ = layers.attend(*(each if each.dtype == bool else each.astype(jnp.float32) for each in arrays), 0.2)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours.astype(jnp.float32), theirs, atol=2e-2)


@pytest.mark.skipif(jax.default_backend() != "tpu", reason="there is no TPU")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("masks", ["causal", "window", "ragged"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_kernel_on_this_tpu(sizes: tuple[int, ...], masks: str, dtype: str) -> None:
    queries, keys, values, mask = case(sizes, dtype, masks)
    ours = jax.jit(lambda *arrays: layers.attend(*arrays, kernel=True)[0])
    assert "tpu_custom_call" in ours.lower(queries, keys, values, mask).as_text()
    with jax.default_matmul_precision("highest"):
        theirs, _ = layers.attend(*(each.astype(jnp.float32) for each in (queries, keys, values)), mask)
    np.testing.assert_allclose(ours(queries, keys, values, mask).astype(jnp.float32), theirs, atol=2e-2)


def test_the_kernel_computes_no_block_that_no_column_attends_to() -> None:
    queries, keys, values, mask = case((1, 1, 1, 512, 2048, 64), jnp.float32, "window")
    used = mask.any(axis=(0, 1)).reshape(-1, 512).any(axis=1)
    assert not used.all()
    unread = [jnp.where(used.repeat(512)[:, None], each, jnp.nan) for each in (keys, values)]
    assert np.isfinite(prompt_attention_tpu.prompt_attention_tpu(queries, *unread, mask, 0.2, interpret=True)).all()


def test_blocks_that_the_kernel_does_not_need_are_not_read() -> None:
    """Blocks of 2 columns and 4 slots; the slots end within the fourth block, which is never whole."""
    some, every, none = np.eye(2, 4), np.ones((2, 4)), np.zeros((2, 4))
    rows = [[none, some, every, none], [every, none, none, some], [none, none, none, none], [none, none, none, every]]
    mask = jnp.asarray(np.block(rows)[None, :, :-1] > 0)
    kinds, own_slots, own_mask = (each.reshape(4, 4).tolist() for each in prompt_attention_tpu._blocks(mask, 2, 4))
    assert kinds == [[0, 1, 2, 0], [2, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 1]]  # none, some, all
    assert own_slots == [[1, 1, 2, 2], [0, 0, 0, 3], [0, 0, 0, 0], [3, 3, 3, 3]]
    assert own_mask == [[1, 1, 1, 1], [3, 3, 3, 3], [0, 0, 0, 0], [3, 3, 3, 3]]


@pytest.mark.parametrize(
    ("dtype", "asked", "used"),
    [
        ("float32", None, "DEFAULT"),
        ("float32", "bfloat16", "DEFAULT"),
        ("float32", "tensorfloat32", "HIGHEST"),  # kernels have nothing in between
        ("float32", "F32_F32_F32", "HIGHEST"),
        ("bfloat16", "highest", "DEFAULT"),  # products of bfloat16 are exact
    ],
)
def test_products_are_as_precise_as_jax_is_asked_to_be(dtype: str, asked: str | None, used: str) -> None:
    arrays = case((2, 1, 2, 384, 384, 32), dtype, "causal")
    kernel = partial(prompt_attention_tpu.prompt_attention_tpu, scale=0.2, interpret=True)
    with jax.default_matmul_precision(asked):
        jaxpr = str(jax.make_jaxpr(kernel)(*arrays))
    assert {*re.findall(r"precision=\(Precision\.(\w+), Precision\.\w+\)", jaxpr)} == {used}


def test_settings_of_jax_do_not_stop_the_kernel() -> None:
    arrays = case((2, 1, 2, 384, 384, 32), "bfloat16", "causal")
    kernel = partial(prompt_attention_tpu.prompt_attention_tpu, scale=0.2)
    expected = kernel(*arrays, interpret=True)
    for setting in (jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"), jax.enable_x64(True)):
        with setting:
            np.testing.assert_array_equal(kernel(*arrays, interpret=True), expected)
            jaxpr = jax.make_jaxpr(kernel)(*arrays)
        (equation,) = (each for each in jaxpr.eqns if each.primitive.name == "pallas_call")
        for block in equation.params["grid_mapping"].block_mappings:  # Mosaic takes no other indices
            assert {str(index.dtype) for index in block.index_map_jaxpr.out_avals} == {"int32"}


def test_the_kernel_under_vmap() -> None:
    arrays = [jnp.stack([each, each[::-1]]) for each in case((2, 1, 2, 384, 384, 32), jnp.float32, "ragged")]
    kernel = partial(prompt_attention_tpu.prompt_attention_tpu, scale=0.2, interpret=True)
    both = jax.vmap(kernel)(*arrays)
    np.testing.assert_allclose(both[1], both[0][::-1], atol=1e-6)


@pytest.fixture
def on_tpu() -> Iterator[list[tuple[int, ...]]]:
    """Every program as if for a TPU, with Pallas' interpreter in its place. Yields the shapes of the queries."""
    kernel, seen = prompt_attention_tpu.prompt_attention_tpu, []

    def interpreted(queries: jax.Array, *arguments: Any) -> jax.Array:
        seen.append(queries.shape)
        return kernel(queries, *arguments, interpret=True)

    with as_if_on("tpu") as patch:
        patch.setattr(prompt_attention_tpu, "prompt_attention_tpu", interpreted)
        patch.setattr(prompt_attention_tpu, "installed", lambda: True)
        yield seen


def test_gradients_are_those_of_other_devices(request: pytest.FixtureRequest) -> None:
    queries, keys, values, mask = case((2, 1, 4, 384, 400, 32), jnp.float32, "ragged")

    def loss(*arrays: jax.Array) -> jax.Array:
        return (layers.attend(*arrays, mask, kernel=True)[0] ** 2).sum()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt_attention_tpu, "installed", lambda: False)
        expected = jax.value_and_grad(loss, (0, 1, 2))(queries, keys, values)
    seen = request.getfixturevalue("on_tpu")
    found = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(queries, keys, values)
    assert seen
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)


def test_keys_without_rows_and_heads(on_tpu: list[tuple[int, ...]]) -> None:
    queries, keys, values, mask = case((1, 1, 4, 384, 400, 32), jnp.float32, "causal")
    attended, _ = layers.attend(queries, keys[0, 0], values[0, 0], mask, kernel=True)
    theirs, _ = layers.attend(queries, keys, values, mask)
    assert len(on_tpu) == 1
    np.testing.assert_allclose(attended, theirs, atol=1e-5)


def model_with(window: int | None) -> Any:
    config = {
        **{"model_type": "mistral", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.4},
        "sliding_window": window,
    }
    return jaxgen.from_config(config)


INT8 = {"cache_implementation": "quantized", "cache_config": {"backend": "int8"}}


@pytest.mark.parametrize(("window", "cache"), [(None, {}), (100, {}), (None, INT8)], ids=["full", "window", "int8"])
def test_tokens_are_those_of_other_devices(
    window: int | None, cache: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    model = model_with(window)
    prompts = np.random.default_rng(0).integers(3, 96, (2, 300))
    mask = np.ones_like(prompts)
    prompts[1, :170], mask[1, :170] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None, **cache}
    expected = jaxgen.generate(model, prompts, **options)
    seen = request.getfixturevalue("on_tpu")
    np.testing.assert_array_equal(jaxgen.generate(model, prompts, **options), expected)
    assert seen


@pytest.mark.parametrize("window", [None, 100])
def test_a_cache_with_more_slots_than_the_prompt(window: int | None, request: pytest.FixtureRequest) -> None:
    """Kept slots before the columns, and empty ones after them."""
    model = model_with(window)
    ids = jnp.asarray(np.random.default_rng(0).integers(3, 96, (2, 768)))
    mask = jnp.ones_like(ids, bool).at[1, :30].set(False)

    def second_half() -> jax.Array:
        _, cache, _ = model.hidden_states(model.make_cache(2, 900), ids[:, :384], mask[:, :384])
        return model.hidden_states(cache, ids[:, 384:], mask[:, 384:])[0]

    expected = second_half()
    seen = request.getfixturevalue("on_tpu")
    np.testing.assert_allclose(second_half(), expected, atol=1e-4)
    assert seen


def test_attention_over_several_devices_does_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would gather the cache on each of them."""
    monkeypatch.setattr(prompt_attention_tpu, "installed", lambda: True)
    arrays = case(SIZES[0], jnp.bfloat16, "causal")
    for kernel in (True, False):
        jaxpr = str(jax.make_jaxpr(lambda kernel=kernel: layers.attend(*arrays, kernel=kernel)[0])())
        assert ("pallas_call" in jaxpr) == kernel


def test_arrays_of_several_dtypes_and_a_bias_do_without_the_kernel(on_tpu: list[tuple[int, ...]]) -> None:
    queries, keys, values, mask = case(SIZES[0], jnp.float32, "causal")
    layers.attend(queries, *(each.astype(jnp.bfloat16) for each in (keys, values)), mask, kernel=True)
    layers.attend(queries, keys, values, mask, bias=lambda _, count: jnp.zeros((1, 1, 1, count, 384)), kernel=True)
    assert not on_tpu


@pytest.mark.parametrize(
    ("shape", "slots", "dtype", "fits"),
    [
        ((1, 8, 4, 8192, 128), 8320, "bfloat16", True),
        ((64, 8, 4, 1024, 64), 2000, "float32", True),
        ((1, 8, 4, 8192, 128), 8320, "float16", False),
        ((1, 8, 4, 8192, 100), 8320, "bfloat16", False),
        ((1, 8, 4, 8192, 512), 8320, "bfloat16", False),
        ((1, 1, 71, 1024, 64), 1024, "bfloat16", False),  # 32 columns are too many
        ((64, 8, 4, 16384, 128), 16384, "bfloat16", False),  # 64 * 64 * 32 blocks
    ],
)
def test_the_kernel_is_left_out_where_it_does_not_fit(
    shape: tuple[int, ...], slots: int, dtype: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_attention_tpu, "installed", lambda: True)
    assert prompt_attention_tpu.fits(shape, slots, jnp.dtype(dtype)) == fits


def test_without_a_compiler_for_tpus_nothing_is_traced_for_them() -> None:
    if not prompt_attention_tpu.installed():
        assert not prompt_attention_tpu.fits((1, 8, 4, 8192, 128), 8320, jnp.dtype("bfloat16"))

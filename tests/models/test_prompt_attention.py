"""The kernel for prompts on a GPU, computed by Pallas' interpreter, beside the attention of other devices."""

from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreted import gpu_kernels, queries_keys_values

import jaxgen
from jaxgen.models import decode_attention, layers, prompt_attention
from jaxgen.models.prompt_attention import Tile, tile_for

# N, K, G, T, S, H, and the columns and slots of a tile.
SIZES = [
    (2, 2, 4, 64, 64, 32, 16, 16),
    (2, 1, 1, 32, 96, 64, 16, 32),
    (1, 1, 7, 32, 64, 32, 8, 32),
    (2, 1, 3, 48, 48, 32, 16, 16),
]
MASKS = ["causal", "padded", "window", "ragged"]


def case(sizes: tuple[int, ...], dtype: Any, masks: str) -> tuple[jax.Array, ...]:
    rows, _, _, columns, slots, *_ = sizes
    random = np.random.default_rng(slots)
    # The columns are the last of the slots.
    column, slot = np.arange(slots - columns, slots)[:, None], np.arange(slots)[None]
    mask = np.repeat((slot <= column)[None], rows, axis=0)
    if masks == "padded":
        mask[-1, :, : slots // 3] = False
    elif masks == "window":
        mask &= slot > column - slots // 3
    elif masks == "ragged":
        mask = random.random(mask.shape) < 0.3
        mask[:, :, : slots // 2] |= random.random((rows, columns, 1)) < 0.8
        mask[-1, columns // 2 :] = False
    return *queries_keys_values(sizes[:6], dtype), jnp.asarray(mask)


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_kernel_computes_the_attention_of_other_devices(sizes: tuple[int, ...], masks: str) -> None:
    arrays, tile = case(sizes, jnp.float32, masks), Tile(*sizes[-2:], stages=2)
    ours = prompt_attention.prompt_attention(*arrays, 0.2, tile, interpret=True)
    theirs, _ = layers.attend(*arrays, 0.2)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    attends = arrays[-1].any(axis=2)[:, None, None, :, None]
    assert not np.where(attends, 0, ours).any()


def test_the_kernel_rounds_as_other_devices_do() -> None:
    arrays = case(SIZES[0], jnp.bfloat16, "padded")
    ours = prompt_attention.prompt_attention(*arrays, 0.2, Tile(16, 16, 2), interpret=True)
    theirs, _ = layers.attend(*(each if each.dtype == bool else each.astype(jnp.float32) for each in arrays), 0.2)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours.astype(jnp.float32), theirs, atol=2e-2)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize(
    "sizes",
    [(2, 2, 4, 256, 256, 64), (1, 2, 1, 512, 512, 128), (2, 1, 7, 64, 320, 128), (1, 1, 8, 192, 192, 256)],
    ids=str,
)
def test_the_kernel_on_this_gpu(sizes: tuple[int, ...], masks: str, dtype: str) -> None:
    queries, keys, values, mask = case(sizes, dtype, masks)
    ours = jax.jit(lambda *arrays: layers.attend(*arrays, kernel=True)[0])
    assert "prompt_attention" in ours.lower(queries, keys, values, mask).as_text()
    theirs, _ = layers.attend(*(each.astype(jnp.float32) for each in (queries, keys, values)), mask)
    np.testing.assert_allclose(ours(queries, keys, values, mask).astype(jnp.float32), theirs, atol=2e-2)


@pytest.mark.parametrize("masks", MASKS[:3])
def test_tiles_that_no_column_attends_to_are_not_read(masks: str) -> None:
    queries, keys, values, mask = case(SIZES[0], jnp.float32, masks)
    tile = Tile(*SIZES[0][-2:], stages=2)
    whole = prompt_attention.prompt_attention(queries, keys, values, mask, 0.2, tile, interpret=True)
    for number in range(mask.shape[1] // tile.columns):
        columns = slice(number * tile.columns, (number + 1) * tile.columns)
        used = mask[:, columns].any(axis=1).reshape(len(mask), -1, tile.slots).any(axis=2).repeat(tile.slots, axis=1)
        unread = [jnp.where(used[:, None, :, None], each, jnp.nan) for each in (keys, values)]
        ours = prompt_attention.prompt_attention(queries, *unread, mask, 0.2, tile, interpret=True)
        np.testing.assert_array_equal(ours[:, :, :, columns], whole[:, :, :, columns])


def test_the_mask_is_read_only_where_a_tile_is_neither_excluded_nor_whole() -> None:
    mask = case(SIZES[0], jnp.float32, "padded")[-1]  # of 64 columns, and 21 of padding in the second row
    spans = prompt_attention._spans(mask, Tile(columns=16, slots=16, stages=2))
    assert spans.tolist() == [
        [[0, 1, 1, 1], [0, 0, 1, 2], [0, 0, 2, 3], [0, 0, 3, 4]],
        [[0, 0, 0, 0], [1, 2, 2, 2], [1, 3, 3, 3], [1, 2, 3, 4]],
    ]


def test_the_derivative_is_that_of_other_devices() -> None:
    queries, keys, values, mask = case(SIZES[0], jnp.float32, "padded")

    def loss(queries: jax.Array, keys: jax.Array, values: jax.Array, kernel: bool) -> jax.Array:
        return (layers.attend(queries, keys, values, mask, kernel=kernel)[0] ** 2).sum()

    gradient = jax.grad(loss, argnums=(0, 1, 2))
    theirs = gradient(queries, keys, values, False)
    with gpu_kernels():
        ours = gradient(queries, keys, values, True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), ours, theirs)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"prefill_chunk_size": 16},
        {"guidance_scale": 2.0},
    ],
    ids=str,
)
def test_tokens_are_those_of_other_devices(arguments: dict[str, Any]) -> None:
    config = {
        **{"model_type": "mistral", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.4},
        "sliding_window": 24,
    }
    model = jaxgen.from_config(config)
    prompts = np.random.default_rng(0).integers(3, 96, (2, 60))
    mask = np.ones_like(prompts)
    prompts[1, :21], mask[1, :21] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None, **arguments}
    expected = jaxgen.generate(model, prompts, **options)
    with gpu_kernels(), mock.patch.object(layers, "prompt_attention", wraps=layers.prompt_attention) as kernel:
        np.testing.assert_array_equal(jaxgen.generate(model, prompts, **options), expected)
        assert kernel.called


def test_products_of_half_precision_are_exact_whatever_precision_jax_is_asked_for() -> None:
    arrays = case(SIZES[0], jnp.bfloat16, "padded")
    with jax.default_matmul_precision("BF16_BF16_F32_X6"):  # which Triton does not know
        jaxpr = str(
            jax.make_jaxpr(lambda: prompt_attention.prompt_attention(*arrays, 0.2, Tile(16, 16, 2), interpret=True))()
        )
    assert "precision=(Precision.DEFAULT, Precision.DEFAULT)" in jaxpr
    assert "X6" not in jaxpr


def test_settings_of_jax_do_not_stop_the_kernel() -> None:
    arrays = case(SIZES[0], jnp.bfloat16, "padded")
    kernel = partial(prompt_attention.prompt_attention, scale=0.2, tile=Tile(16, 16, 2))
    expected = kernel(*arrays, interpret=True)
    for setting in (jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"), jax.enable_x64(True)):
        with setting:
            assert kernel(*arrays, interpret=True).dtype == jnp.bfloat16
            np.testing.assert_array_equal(kernel(*arrays, interpret=True), expected)


def test_attention_over_several_devices_does_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would gather the prompt's keys and values on each of them."""
    monkeypatch.setattr(layers, "tile_for", lambda *sizes: Tile(16, 16, 2))
    arrays = case(SIZES[0], jnp.bfloat16, "padded")
    for kernel in (True, False):
        jaxpr = str(jax.make_jaxpr(lambda kernel=kernel: layers.attend(*arrays, kernel=kernel)[0])())
        assert ("pallas_call" in jaxpr) == kernel


# G, T, S, H. A tile divides the columns and the slots, which 100 slots do not allow; 16 columns may be beams.
@pytest.mark.parametrize(
    ("sizes", "tile"),
    [
        ((4, 2048, 2048, 128), Tile(32, 64, 3)),
        ((1, 512, 512, 64), Tile(128, 64, 3)),
        ((7, 512, 1024, 128), Tile(16, 64, 3)),
        ((4, 96, 96, 128), Tile(32, 32, 3)),
        ((4, 512, 512, 256), Tile(16, 32, 3)),
        ((4, 100, 100, 128), None),
        ((1, 72, 72, 128), None),
        ((8, 16, 2048, 128), None),
        ((4, 64, 64, 80), None),
    ],
)
def test_a_tile_fits_into_a_large_gpu(
    sizes: tuple[int, int, int, int], tile: Tile | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_attention, "installed", lambda: True)
    monkeypatch.setattr(prompt_attention, "compute_capability", lambda: 9.0)
    assert tile_for(*sizes, jnp.dtype("bfloat16")) == tile
    assert tile_for(*sizes, jnp.dtype("float32")) is None


def test_a_tile_of_a_small_gpu_takes_less_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_attention, "installed", lambda: True)
    monkeypatch.setattr(prompt_attention, "compute_capability", lambda: 8.9)
    assert tile_for(4, 2048, 2048, 128, jnp.dtype("bfloat16")) == Tile(16, 32, 2)


def test_without_a_compiler_for_gpus_nothing_is_traced_for_them() -> None:
    if not decode_attention.installed():
        assert tile_for(4, 64, 64, 64, jnp.dtype("bfloat16")) is None

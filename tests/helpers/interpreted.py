"""For tests of attention's kernels: random arrays, and the kernels for GPUs on any device by Pallas' interpreter."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxgen.models import decode_attention, layers, prompt_attention


def queries_keys_values(sizes: tuple[int, ...], dtype: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[N, K, G, T, H] and twice [N, K, S, H] for N, K, G, T, S, H."""
    rows, heads, group, columns, slots, head_dim = sizes
    random = np.random.default_rng(slots)
    shapes = [(rows, heads, group, columns, head_dim), *[(rows, heads, slots, head_dim)] * 2]
    queries, keys, values = (jnp.asarray(random.normal(size=shape), dtype) for shape in shapes)
    return queries, keys, values


@contextmanager
def as_if_on(platform: str) -> Iterator[pytest.MonkeyPatch]:
    """Attention takes its branch for "cuda" or "tpu" on any device. Yields a patch to replace kernels with."""
    original = lax.platform_dependent

    def platform_dependent(*operands: Any, **branches: Any) -> Any:
        branch = branches.pop(platform, None)
        return original(*operands, **branches) if branch is None else branch(*operands)

    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers.lax, "platform_dependent", platform_dependent)
        yield patch
    jax.clear_caches()


@contextmanager
def gpu_kernels() -> Iterator[None]:
    """Every program as if for a GPU, as far as attention is concerned; small enough tiles for short prompts."""

    def of_step(*arguments: Any) -> jax.Array:
        return decode_attention.decode_attention(*arguments, interpret=True)

    def of_prompt(*arguments: Any) -> jax.Array:
        return prompt_attention.prompt_attention(*arguments, interpret=True)

    def fits(queries: int, slots: int, head_dim: int, dtype: Any, float8: bool = False) -> bool:
        del head_dim, dtype, float8
        return queries <= 8 and slots % decode_attention.BLOCK == 0

    def tile_for(group: int, columns: int, slots: int, head_dim: int, dtype: Any) -> Any:
        del head_dim, dtype
        tile = prompt_attention.Tile(math.gcd(columns, 8), math.gcd(slots, 16), stages=1)
        return tile if tile.columns * group >= 4 and tile.slots >= 4 else None

    with as_if_on("cuda") as patch:
        patch.setattr(layers, "decode_attention", of_step)
        patch.setattr(layers, "prompt_attention", of_prompt)
        patch.setattr(layers, "fits", fits)
        patch.setattr(layers, "tile_for", tile_for)
        yield

"""Nothing that was never written is ever read: unused slots may hold NaN."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import architecture

import jaxgen
from jaxgen import decoding, generation


@pytest.mark.parametrize("rows", [1, 3])
def test_nan_in_unused_slots_changes_nothing(rows: int) -> None:
    model = jaxgen.from_config(architecture(1).config, key=3)
    ids = np.random.default_rng(0).integers(3, 97, (rows, 9))
    mask = np.arange(9) >= np.arange(rows)[:, None]
    call = generation.lower(model, ids, None, {"attention_mask": mask, "max_new_tokens": 40, "eos_token_id": None})
    state = decoding.prefill(model, call.prompt, call.strategy, call.slots)

    def poison(layer: jax.Array) -> jax.Array:
        full = layer.reshape(rows, -1, *layer.shape[-2:])
        return jnp.where(state.cache.valid[:, None, :, None], full, jnp.nan).reshape(layer.shape)

    poisoned = replace(state, cache=replace(state.cache, layers=jax.tree.map(poison, state.cache.layers)))
    assert any(bool(jnp.isnan(leaf).any()) for leaf in jax.tree.leaves(poisoned.cache.layers))
    results = []
    for start in (poisoned, state):
        end = decoding.advance(model, jax.tree.map(jnp.copy, start), call.strategy, jnp.int32(call.slots))
        results.append(call.wrap(decoding.finalize(call.strategy, end), end))
    np.testing.assert_array_equal(*results)

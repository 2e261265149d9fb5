"""Nothing is ever read that was not written: what a mask hides is a finite number all the same."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from architectures import architecture

import jaxgen
from jaxgen.decoding import loop

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "candidates": {"penalty_alpha": 0.6, "top_k": 3},
}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_slots_that_nobody_may_attend_hold_finite_numbers_and_unwritten_ones_zeros(way: str, rows: int) -> None:
    """A weight of 0 times NaN is NaN, and memory that was not written can hold one."""
    model = jaxgen.from_config(architecture(1).config, key=3)
    ids = np.random.default_rng(0).integers(3, 97, (rows, 9))
    mask = np.arange(9) >= np.arange(rows)[:, None]
    arguments = {"attention_mask": mask, "max_new_tokens": 40, "eos_token_id": None, **WAYS[way]}
    call = jaxgen.prepare(model, ids, **arguments)
    state, _ = loop.prefill(model, call)
    lengths = []
    for _ in range(3):
        written = int(state.cache.length)
        lengths.append(written)
        for layer in range(2):
            for array in state.cache.layer(layer):
                assert jnp.isfinite(array).all() and (array[:, :, : written - 2] != 0).any()
                scratch = call.strategy.branches if way == "candidates" else 0
                assert (array[:, :, written + scratch :] == 0).all()
        state, _ = loop.advance(model, state, call.strategy, jnp.int32(5))
    steps = 5 * (call.strategy.branches if way == "beams" else 1)
    assert lengths == [16, 16 + steps, 16 + 2 * steps]  # so that each look saw more than the one before

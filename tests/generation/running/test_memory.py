"""A call that cannot fit is refused before anything is compiled."""

from typing import Any

import jax
import numpy as np
import pytest
from prepared import prepared

import jaxgen
from jaxgen.decoding import loop
from jaxgen.generation.running import memory

PROMPTS = np.array([[5, 9, 17, 4], [3, 7, 12, 3]])
DRAFTS = {"max_new_tokens": 200, "num_assistant_tokens": 3}


def size(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_the_cache_of_an_assistant_is_counted_as_it_will_be(model: Any) -> None:
    call = prepared(model, PROMPTS, assistant_model=model, do_sample=True, num_return_sequences=2, key=0, **DRAFTS).call
    counted = call.strategy.bytes_of_caches(call.prompt, call.slots - call.prompt.input_ids.shape[1])
    state: Any = loop.prefill.eval_shape(model, call)[0]
    held = size(state.inner.memory.cache.layers)
    assert 0.9 * held < counted <= held


@pytest.mark.parametrize("shares_weights", [False, True])
def test_the_weights_and_the_cache_of_an_assistant_count(
    shares_weights: bool, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assistant = model if shares_weights else jaxgen.from_config(model.config.to_json(), key=1)
    ready = prepared(model, PROMPTS, assistant_model=assistant, **DRAFTS)
    call, prompt = ready.call, ready.call.prompt
    weights = size(model) if shares_weights else size(model) + size(assistant)
    cache = call.model_rows * ready.cache_slots * model.cache_bytes_per_token
    needed = weights + cache + call.strategy.bytes_of_caches(prompt, call.slots - prompt.input_ids.shape[1])
    monkeypatch.setattr(memory, "memory_bytes", lambda: needed)
    memory.check_memory(model, ready)
    monkeypatch.setattr(memory, "memory_bytes", lambda: needed - 1)
    with pytest.raises(
        ValueError, match=r"GB for the weights, .* GB for the cache, .* GB for the cache of the assistant.*Lower"
    ):
        memory.check_memory(model, ready)

"""A call that cannot fit is refused before anything is compiled."""

import re
from typing import Any

import jax
import numpy as np
import pytest
from encoder_decoders import encoder_decoder
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


def test_each_layer_of_a_prompt_is_written_where_it_will_stay(model: Any) -> None:
    """Padded after the last layer, on a GPU all layers would be there twice."""
    for arguments, barriers in (
        ({}, model.config.num_hidden_layers),
        ({"do_sample": True, "num_return_sequences": 2}, 0),
    ):
        call = prepared(model, PROMPTS, max_new_tokens=40, **arguments).call
        jaxpr = str(jax.make_jaxpr(lambda model, call=call: loop._prefill(model, call))(model))
        # Each passes on the padded keys and values, and those that attention reads.
        assert len(re.findall(r"(?:\w+:\S+ ){4}= optimization_barrier", jaxpr)) == barriers


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
    memory.check_memory(ready)
    monkeypatch.setattr(memory, "memory_bytes", lambda: needed - 1)
    with pytest.raises(
        ValueError, match=r"GB for the weights, .* GB for the cache, .* GB for the cache of the assistant.*Lower"
    ):
        memory.check_memory(ready)


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_source_and_the_arrays_of_an_encoder_count(use_cache: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = jaxgen.from_config(encoder_decoder(1).config, key=0)
    asked = {"output_attentions": True, "output_hidden_states": True, "return_dict_in_generate": True}
    ready = prepared(model, np.full((3, 20), 5), max_new_tokens=40, num_beams=2, use_cache=use_cache, **asked)
    state: Any = loop.prefill.eval_shape(model, ready.call, ready.intermediates)[0]
    monkeypatch.setattr(memory, "memory_bytes", lambda: 1)
    with pytest.raises(ValueError, match="GB for the source") as refused:
        memory.check_memory(ready)
    sizes = dict(re.findall(r"[\d,.]+ GB for ((?:the \w+)|(?:`\w+`))()", str(refused.value)))
    assert sizes.keys() == {
        "the weights",
        "the cache",
        "the source",
        *(f"`output_{name}`" for name in ("attentions", "hidden_states")),
        *(f"`{name}`" for name in ("cross_attentions", "encoder_attentions", "encoder_hidden_states")),
    }
    columns, rows = ready.call.source.inputs.shape[1], ready.call.model_rows
    assert rows * columns * model.cache_bytes_per_token == size(state.cache.memory.layers)
    for name in ("encoder_attentions", "encoder_hidden_states"):
        held = size(state.prompt_intermediates[name])
        assert rows * model.intermediates_bytes(name, columns, columns) == held
    width = ready.call.prompt_slots
    held = size(state.prompt_intermediates["cross_attentions"])
    assert rows * model.intermediates_bytes("cross_attentions", width, columns) == held

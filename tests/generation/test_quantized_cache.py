"""A cache in eight bits: the tokens of transformers, whose own is in fp8, and one that rounds as ours in int8."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from encoder_decoders import encoder_decoder
from prepared import prepared

import jaxgen
from jaxgen import lazy
from jaxgen.decoding import loop
from jaxgen.generation.running.memory import check_memory

COLUMNS = 11
IDS = np.random.default_rng(0).integers(3, 97, (3, COLUMNS))
PADDED = np.arange(COLUMNS) >= np.array([[0], [2], [5]])
PLAIN = {"max_new_tokens": 20, "pad_token_id": 0, "eos_token_id": 1}
INT8 = {"cache_implementation": "quantized", "cache_config": {"backend": "int8"}}
FP8 = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "penalties": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
}


def rounding_cache(layers: int) -> Any:
    """A cache of transformers that holds what a cache in int8 holds."""
    import torch
    from transformers.cache_utils import Cache, DynamicLayer

    def rounded(array: torch.Tensor) -> torch.Tensor:
        unit = array.abs().amax(dim=-1, keepdim=True) / 127
        return torch.round(array / unit) * unit

    class Rounding(DynamicLayer):
        def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            first = self.get_seq_length() == 0
            held = super().update(rounded(keys), rounded(values), *args, **kwargs)
            return (keys, values) if first else held

    return Cache(layers=[Rounding() for _ in range(layers)])


@pytest.mark.oracle
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_tokens_with_a_cache_in_fp8_equal_transformers(model: Any, twin: Any, way: str, rows: int) -> None:
    import torch
    from transformers import cache_utils

    if not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this transformers has no cache in fp8")
    given = {**PLAIN, **WAYS[way], **FP8}
    theirs = twin.generate(torch.tensor(IDS[:rows]), **given)
    np.testing.assert_array_equal(jaxgen.generate(model, IDS[:rows], **given), theirs)


@pytest.mark.oracle
@pytest.mark.parametrize("way", WAYS)
def test_tokens_with_a_cache_in_int8_are_those_of_a_cache_that_rounds_so(model: Any, twin: Any, way: str) -> None:
    import torch

    given, cache = {**PLAIN, **WAYS[way]}, rounding_cache(twin.config.num_hidden_layers)
    theirs = twin.generate(
        torch.tensor(IDS), attention_mask=torch.tensor(PADDED), **given, **{lazy.cache_name(): cache}
    )
    np.testing.assert_array_equal(jaxgen.generate(model, IDS, attention_mask=PADDED, **given, **INT8), theirs)


def test_a_quantised_cache_changes_the_tokens_of_this_model(model: Any) -> None:
    """Or the tests above would not show that anything is rounded."""
    plain, int8, fp8 = (
        jaxgen.generate(model, IDS, **{**PLAIN, "max_new_tokens": 60}, **each) for each in ({}, INT8, FP8)
    )
    assert not np.array_equal(plain, fp8)
    assert not np.array_equal(int8, fp8)


def test_steps_read_and_write_bytes(model: Any) -> None:
    """Through the sizes that a cache grows, and in what the memory is checked by."""
    call = prepared(model, IDS, **PLAIN, **INT8)
    state, _ = loop.prefill(model, call.call, (), 256)
    values = [each.values for pair in state.cache.layers for each in pair]
    assert {each.dtype for each in values} == {jnp.dtype(jnp.int8)}
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((state.cache.layers, state.cache.valid)))
    assert held == len(state.cache.valid) * 256 * call.cache_bytes_per_token
    assert call.cache_bytes_per_token < model.cache_bytes_per_token
    check_memory(call)


@pytest.mark.parametrize("backend", ["int8", "fp8"])
def test_a_kept_cache_goes_on_as_it_is(model: Any, backend: str) -> None:
    given = {**PLAIN, "eos_token_id": None, "return_dict_in_generate": True}
    quantized = {"cache_implementation": "quantized", "cache_config": {"backend": backend}}
    whole = jaxgen.generate(model, IDS, **given, **quantized).sequences
    start = jaxgen.generate(model, IDS, **{**given, "max_new_tokens": 8}, **quantized)
    keys, _ = start.cache[0]
    assert keys.dtype == model.dtype
    again = jaxgen.generate(model, start.sequences, cache=start.cache, **{**given, "max_new_tokens": 12})
    np.testing.assert_array_equal(again.sequences, whole)
    assert again.cache._cache.backend == backend
    many = np.concatenate([start.sequences, np.tile(IDS, (1, 5))], axis=1)  # more columns than int8 is read for
    assert jaxgen.generate(model, many, cache=start.cache, **given).sequences.shape == (3, many.shape[1] + 20)


@pytest.mark.parametrize(
    "given",
    [
        {"prompt_lookup_num_tokens": 3},
        {"do_sample": True, "key": 3, "num_return_sequences": 2},
        {"num_beams": 4, "do_sample": True, "key": 1},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"guidance_scale": 1.5},
        {"return_dict_in_generate": True, "output_attentions": True},
    ],
    ids=lambda given: next(iter(given)),
)
def test_int8_goes_with_every_way_of_decoding(model: Any, given: dict[str, Any]) -> None:
    """Behind a long prompt, which is rounded only after it was read: the first token is that of a plain cache."""
    ids = np.tile(IDS, (1, 30))

    def tokens(**more: Any) -> np.ndarray:
        output = jaxgen.generate(model, ids, **{**PLAIN, **given, **more})
        return np.asarray(output if isinstance(output, np.ndarray | jax.Array) else output.sequences)

    found, plain = tokens(**INT8), tokens()
    np.testing.assert_array_equal(found[:, : ids.shape[1] + 1], plain[:, : ids.shape[1] + 1])
    if "prompt_lookup_num_tokens" in given:
        np.testing.assert_array_equal(found, jaxgen.generate(model, ids, **PLAIN, **INT8))


def test_embeddings_and_chunks_of_steps_give_the_same_tokens(model: Any) -> None:
    expected = jaxgen.generate(model, IDS, **PLAIN, **INT8)
    embeddings = np.asarray(model.embed_tokens.weight[...])[IDS]
    np.testing.assert_array_equal(
        jaxgen.generate(model, inputs_embeds=embeddings, **PLAIN, **INT8), expected[:, COLUMNS:]
    )
    *_, last = jaxgen.stream(model, IDS, **PLAIN, **INT8)
    assert last is not None


def test_use_cache_false_has_no_cache_to_quantise_as_in_transformers(model: Any) -> None:
    given = {**PLAIN, "use_cache": False}
    np.testing.assert_array_equal(jaxgen.generate(model, IDS, **given, **FP8), jaxgen.generate(model, IDS, **given))


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"cache_config": None}, "the backend 'quanto'"),
    ({"cache_config": {"backend": "hqq", "nbits": 8}}, "the backend 'hqq'"),
    ({"cache_config": {"backend": "fp8", "nbits": 4}}, r"`cache_config` has \['nbits'\]"),
    ({"cache_config": {"backend": ["fp8"]}}, r"the backend \['fp8'\]"),
    ({"cache_config": [1]}, "must be a dict"),
    ({"cache_config": np.zeros(2)}, "must be a dict"),
    ({"cache_implementation": "offloaded"}, "`cache_implementation`='offloaded' is not supported"),
    ({"prefill_chunk_size": 4}, "`prefill_chunk_size`=4 cannot be combined with a quantised cache"),
    ({"guidance_scale": 2.0}, "`guidance_scale`=2.0 cannot be combined with a cache in fp8"),
    ({"prompt_lookup_num_tokens": 2}, "Assisted decoding requires a cache that can be cropped"),
    ({"custom_generate": lambda model, input_ids: input_ids}, "`cache_implementation` cannot be combined with"),
]


@pytest.mark.parametrize(("given", "message"), REFUSALS, ids=[next(iter(given)) for given, _ in REFUSALS])
def test_what_a_quantised_cache_does_not_go_with_is_refused(model: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jaxgen.generate(model, IDS, **{**PLAIN, **FP8, **given})


def test_an_encoder_decoder_model_refuses_it_as_in_transformers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not go with an encoder-decoder model"):
        jaxgen.generate(jaxgen.load(encoder_decoder(0).write(tmp_path)), IDS, **PLAIN, **INT8)

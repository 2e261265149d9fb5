"""JAX's own settings, which users have for their own code: none of them stops a call or changes a token."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from architectures import ARCHITECTURES
from transformers.generation.configuration_utils import SynthIDTextWatermarkingConfig, WatermarkingConfig

import jaxgen

IDS = np.array([[5, 6, 7, 8, 9], [0, 0, 11, 12, 13], [0, 0, 0, 0, 14]])
MASK = (IDS > 0).astype(int)
PROCESSORS: dict[str, Any] = {
    "sequence_bias": [[[5], 1.0], [[6, 7], 2.0]],
    "encoder_repetition_penalty": 1.2,
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 2,
    "bad_words_ids": [[9], [8, 9]],
    "min_length": 9,
    "min_new_tokens": 3,
    "forced_bos_token_id": 5,
    "forced_eos_token_id": [2],
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": (1, 1.1),
    "suppress_tokens": [11, 12],
    "begin_suppress_tokens": [13],
    "renormalize_logits": True,
    "eos_token_id": [2, 3],
}
WARPERS: dict[str, Any] = {
    "do_sample": True,
    "key": 3,
    "temperature": 0.9,
    "top_k": 20,
    "top_p": 0.9,
    "min_p": 0.01,
    "typical_p": 0.9,
    "epsilon_cutoff": 0.001,
    "eta_cutoff": 0.001,
}
WAYS: dict[str, dict[str, Any]] = {
    "processors": {**PROCESSORS, "prefix_allowed_tokens_fn": lambda row, tokens: [2, 5, 6, 7, 8]},
    "sampling": {**WARPERS, "top_h": 0.9, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "eos_token_id": [4, 5], "length_penalty": 0.5, "num_return_sequences": 2},
    "sampled beams": {"do_sample": True, "key": 3, "top_k": 5, "num_beams": 3},
    "groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 3},
    "guidance": {"guidance_scale": 1.5, "quantize": "int8"},
    "green list": {"watermark": {"seeding_scheme": "selfhash"}},
    "stop strings": {"stop_strings": ["the", "a"], "top_k": 0, "top_p": 0.9, "do_sample": True, "key": 1}
    | {"watermark": {"keys": [1, 2, 3], "ngram_len": 3}},  # SynthID
    "continuing": {"again": True},
    "drafts": {"do_sample": True, "key": 3, "top_k": 20, "repetition_penalty": 1.2, "assisted": True},
}


@contextmanager
def setting(name: str, value: Any) -> Iterator[None]:
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)


def together(**settings: Any) -> Callable[[], AbstractContextManager[Any]]:
    @contextmanager
    def entered() -> Iterator[None]:
        with ExitStack() as stack:
            for name, value in settings.items():
                stack.enter_context(setting(name, value))
            yield

    return entered


def explicit_mesh(*axes: str) -> AbstractContextManager[Any]:
    return jax.set_mesh(jax.make_mesh((1,) * len(axes), axes, axis_types=(jax.sharding.AxisType.Explicit,) * len(axes)))


STRICT = {"jax_numpy_rank_promotion": "raise", "jax_numpy_dtype_promotion": "strict"}
EVERY_WAY: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "x64": together(jax_enable_x64=True, jax_numpy_dtype_promotion="standard"),
    # Each of them only refuses what the others allow.
    "strict promotion, no NaN, no infinity, transfer guard": together(
        **STRICT, jax_debug_nans=True, jax_debug_infs=True, jax_transfer_guard="disallow"
    ),
}
ONE_WAY: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no jit": jax.disable_jit,
    "mesh": partial(explicit_mesh, "data", "tensor"),
    "checks": together(jax_enable_checks=True, jax_check_tracer_leaks=True, jax_log_compiles=True),
    "keys, device": lambda: together(
        jax_default_prng_impl="rbg", jax_threefry_partitionable=False, jax_default_device=jax.devices()[0]
    )(),
}


@pytest.fixture(scope="module")
def tokens(folder: Path, model: Any, bundled: Any, tokenizer: Any) -> Callable[[str], np.ndarray]:
    small = jaxgen.load(folder, quantize="int8")

    def run(way: str) -> np.ndarray:
        arguments = {"attention_mask": MASK, "max_new_tokens": 5, "pad_token_id": 0, **WAYS[way]}
        ours = small if arguments.pop("quantize", None) else model
        if arguments.pop("assisted", False):
            arguments |= {"assistant_model": ours, "num_assistant_tokens": 2}
        if watermark := arguments.pop("watermark", None):
            kind = SynthIDTextWatermarkingConfig if "keys" in watermark else WatermarkingConfig
            arguments["watermarking_config"] = kind(**watermark)
        if "stop_strings" in arguments:
            ours, arguments["tokenizer"] = bundled, tokenizer
        if not arguments.pop("again", False):
            return np.asarray(jaxgen.generate(ours, IDS, **arguments))
        output = jaxgen.generate(ours, IDS, return_dict_in_generate=True, **arguments)
        past = output.cache
        assert past[0][0].shape[2] == output.sequences.shape[1] - 1
        arguments["attention_mask"] = np.pad(MASK, ((0, 0), (0, 5)), constant_values=1)
        return np.asarray(jaxgen.generate(ours, output.sequences, cache=past, **arguments))

    return run


# Sampled beams are both.
@pytest.mark.parametrize(
    "way",
    [pytest.param(way, marks=[pytest.mark.sweep] if way in ("sampling", "beams") else []) for way in WAYS],
)
def test_no_setting_changes_a_token(way: str, tokens: Callable[[str], np.ndarray]) -> None:
    expected = tokens(way)
    for name, entered in (EVERY_WAY | (ONE_WAY if way == "sampled beams" else {})).items():
        with entered():
            ours = tokens(way)
        np.testing.assert_array_equal(ours, expected, err_msg=name)


# ---- The mesh of `jax.set_mesh` ----


def test_what_is_made_under_a_mesh_is_where_it_would_be_without(folder: Path) -> None:
    with explicit_mesh("x"):
        models = jaxgen.load(folder), jaxgen.from_config(jaxgen.load(folder).config.to_json())
    for each in jax.tree.leaves(models):
        assert isinstance(each.sharding, jax.sharding.SingleDeviceSharding)


def test_the_pure_functions_run_in_the_jit_of_a_caller_with_a_mesh(model: Any) -> None:
    call = jaxgen.prepare(model, IDS, attention_mask=MASK, max_new_tokens=5, pad_token_id=0)

    @jax.jit
    def both(model: Any) -> tuple[jax.Array, jax.Array]:
        return jaxgen.decode(model, call)["sequences"], model(IDS, MASK)

    tokens, logits = both(model)
    with explicit_mesh("x"):
        ours, scores = both(model)
    np.testing.assert_array_equal(ours, tokens)
    np.testing.assert_allclose(scores, logits, atol=1e-5)


def test_a_stream_leaves_the_mesh_to_its_reader(model: Any) -> None:
    plain = jaxgen.generate(model, IDS, max_new_tokens=5, eos_token_id=None)
    with explicit_mesh("x"):
        chunks = []
        for chunk in jaxgen.stream(model, IDS, max_new_tokens=5, eos_token_id=None):
            assert jax.sharding.get_abstract_mesh().axis_names == ("x",)
            chunks.append(chunk)
    np.testing.assert_array_equal(np.concatenate(chunks, axis=1), plain[:, IDS.shape[1] :])


def test_strict_promotion_changes_no_token_of_rotary_frequencies_that_grow_with_the_text(tmp_path: Path) -> None:
    dynamic = next(each for each in ARCHITECTURES if each.name.endswith("dynamic"))
    model = jaxgen.load(dynamic.write(tmp_path))
    ids, mask = dynamic.prompts()
    expected = jaxgen.generate(model, ids, attention_mask=mask, max_new_tokens=4)
    with together(**STRICT)():
        np.testing.assert_array_equal(jaxgen.generate(model, ids, attention_mask=mask, max_new_tokens=4), expected)

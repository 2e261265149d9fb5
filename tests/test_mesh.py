"""A model that is spread over many devices gives the tokens of one device, and each device holds its share."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import encoder_decoders
import jax
import numpy as np
import pytest
from checkpoints import CONFIG, random_tensors, write_checkpoint

import jaxgen

HELPERS = Path(__file__).parent / "helpers"
WIDE = {"hidden_size": 64, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 8, "vocab_size": 64}
SPREAD = CONFIG | WIDE | {"intermediate_size": 48, "num_hidden_layers": 1, "attention_bias": True, "mlp_bias": True}

INT8: dict[str, Any] = {"cache_implementation": "quantized", "cache_config": {"backend": "int8"}}
FP8: dict[str, Any] = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
GREEDY: list[tuple[int, int, dict[str, Any]]] = [
    (1, 8, {}),
    *((data, 1, {"rows": 5}) for data in (2, 8)),  # more rows than devices, and fewer
    (2, 4, {"rows": 3}),
    (4, 2, {"do_sample": True, "key": 3}),
    (2, 4, {"again": True}),
    (2, 4, {"another mesh": True}),
    (2, 4, {"assisted": True, "rows": 3}),
    (2, 4, {"quantize": "int8"}),
    (2, 2, {"quantize": "int4"}),
]
MORE: list[tuple[int, int, dict[str, Any]]] = [
    *((1, tensor, {}) for tensor in (1, 2, 4)),
    (4, 1, {"rows": 5}),
    (2, 2, {}),
    (2, 2, {"num_beams": 3, "rows": 3}),
    (1, 8, {"num_beams": 2, "num_return_sequences": 2, "do_sample": True, "key": 5}),
    (8, 1, {"do_sample": True, "num_return_sequences": 3, "top_k": 5, "key": 1, "rows": 1}),
    (2, 4, {"penalty_alpha": 0.6, "top_k": 3}),
    (4, 2, {"guidance_scale": 1.5}),
    (4, 2, {"assisted": True, "do_sample": True, "num_return_sequences": 2, "key": 1}),
    (1, 8, {"prompt_lookup_num_tokens": 3, "rows": 5}),
    (2, 4, {"prefill_chunk_size": 4, "rows": 9}),
    (4, 2, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "rows": 7}),
    (4, 2, FP8),
    (2, 4, INT8 | {"num_beams": 3, "rows": 3}),
]


def run(folder: Path, config: dict[str, Any], calls: list[tuple[int, int, dict[str, Any]]]) -> None:
    write_checkpoint(folder, config, random_tensors(config))
    run_on_meshes(folder, calls)


def run_on_meshes(folder: Path, calls: list[tuple[int, int, dict[str, Any]]]) -> None:
    on_eight_devices("meshes.py", str(folder), json.dumps(calls))


def on_eight_devices(script: str, *arguments: str) -> str:
    """What the script prints."""
    flags = f"--xla_force_host_platform_device_count=8 {os.environ['XLA_FLAGS']}"
    command = [sys.executable, str(HELPERS / script), *arguments]
    environment = os.environ | {
        "XLA_FLAGS": flags,
        "PYTHONPATH": os.pathsep.join([str(HELPERS.parents[1]), str(HELPERS)]),
    }
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-5000:]
    return ended.stdout


def test_tokens_are_the_same_on_every_mesh_of_eight_devices(tmp_path: Path) -> None:
    run(tmp_path, SPREAD, GREEDY)


@pytest.mark.sweep
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False},
        {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "mlp_bias": False},
        {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 4, "attention_bias": False}
        | {"mlp_bias": False},
    ],
    ids=str,
)
def test_every_way_of_decoding_gives_the_same_tokens_on_a_mesh(changes: dict[str, Any], tmp_path: Path) -> None:
    run(tmp_path, SPREAD | changes, GREEDY + MORE)


OF_ENCODERS: dict[int, dict[str, Any]] = {  # by the seed of an `encoder_decoder`: sizes that eight devices divide
    0: {"num_heads": 8, "d_kv": 4, "feed_forward_proj": "gated-gelu"},
    1: {"encoder_attention_heads": 8, "decoder_attention_heads": 8, "decoder_ffn_dim": 48},
}
USUAL_SEED = 1


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=[] if seed == USUAL_SEED else [pytest.mark.sweep]) for seed in OF_ENCODERS]
)
def test_an_encoder_and_its_decoder_give_the_same_tokens_on_a_mesh(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_decoders, "VOCAB", 72)
    member = encoder_decoders.encoder_decoder(seed)
    config = member.config | OF_ENCODERS[seed] | {"vocab_size": 72, "d_ff": 48, "encoder_layers": 1}
    folder = replace(member, config=config).write(tmp_path)
    calls: list[tuple[int, int, dict[str, Any]]] = [(1, 8, {}), (2, 4, {"num_beams": 3, "rows": 3})]
    run_on_meshes(folder, [*calls, (8, 1, {"do_sample": True, "num_return_sequences": 2, "key": 1, "rows": 5})])


def mesh(*axes: str) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape((1,) * len(axes)), axes)


@pytest.mark.parametrize("axes", [("model",), ("data", "tensor", "expert"), ("x", "y")])
def test_axes_of_other_names_are_refused(axes: tuple[str, ...], folder: Path) -> None:
    with pytest.raises(ValueError, match=r"`mesh` has the axes .*, but must have 'data', 'tensor' or both"):
        jaxgen.load(folder, mesh=mesh(*axes))


def test_a_mesh_that_jax_made_is_taken(folder: Path) -> None:
    """Whatever kind of axes it has by default in this version."""
    ours = jaxgen.load(folder, mesh=jax.make_mesh((1, 1), ("data", "tensor")))
    np.testing.assert_array_equal(
        jaxgen.generate(ours, [[5, 6, 7]], max_new_tokens=4),
        jaxgen.generate(jaxgen.load(folder), [[5, 6, 7]], max_new_tokens=4),
    )


@pytest.mark.parametrize("key_value_heads", [pytest.param(1, marks=pytest.mark.sweep), 2])
def test_with_fewer_key_value_heads_than_devices_each_device_has_a_copy_of_one(
    key_value_heads: int, tmp_path: Path
) -> None:
    calls: list[tuple[int, int, dict[str, Any]]] = [(1, 8, {}), (2, 4, {"num_beams": 3, "rows": 3}), (1, 2, {})]
    calls += [(2, 4, {"again": True}), (1, 4, {"assisted": True, "rows": 3})]
    calls += [(1, 8, {"penalty_alpha": 0.6, "top_k": 3}), (2, 4, INT8)]
    run(tmp_path, SPREAD | {"num_key_value_heads": key_value_heads}, [*calls, (2, 4, {"quantize": "int8"})])


def test_a_step_exchanges_neither_a_vocabulary_nor_a_cache() -> None:
    """With copies of key-value heads, and whatever chooses the tokens."""
    calls: dict[str, dict[str, Any]] = {
        "greedy": {},
        "samples": {"do_sample": True, "key": 1},
        "beams": {"num_beams": 3},
        "sampled beams": {"num_beams": 2, "do_sample": True, "key": 1, "top_k": 0},
        "groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
        "a cache in int8": INT8,
    }
    config = SPREAD | {"num_key_value_heads": 2, "vocab_size": 65_536}
    found = json.loads(on_eight_devices("collectives.py", json.dumps(config), json.dumps(calls)))
    assert found.keys() == calls.keys()
    # A device has 8,192 entries of the vocabulary, and 256 numbers per row of a layer's keys for as few slots as 32.
    assert max(found.values()) < 2048, found


@pytest.mark.parametrize(("key", "value"), [("intermediate_size", 42)])
def test_what_does_not_come_out_even_is_refused_by_name(key: str, value: int) -> None:
    from jaxgen.models import FAMILIES

    config = FAMILIES["llama"].config(SPREAD | {key: value})
    spread = jax.sharding.AbstractMesh((4,), ("tensor",))
    with pytest.raises(ValueError, match=f'`{key}`={value} cannot be spread over the 4 devices of the axis "tensor"'):
        FAMILIES["llama"].partition(config, spread)  # type: ignore[arg-type]

"""GGUF files hold what a Hugging Face folder holds: the same numbers, by the same names, with the same config."""

import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from checkpoints import CONFIG, random_tensors, write_checkpoint
from gguf_models import BLOCK_TYPES, byte_level, paired, sentencepiece, stored, write_gguf
from oracle import torch_generate

import jaxgen
from jaxgen import CheckpointError
from jaxgen.checkpoint import gguf_file
from jaxgen.checkpoint.safetensors_file import Tensor
from jaxgen.checkpoint.source import Source, open_checkpoint
from jaxgen.models.rope import Default, Linear, Llama3, Yarn

WIDE = CONFIG | {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}


def values(tensor: Tensor, dtype: Any = None) -> np.ndarray:
    whole = np.empty(tensor.shape, tensor.dtype if dtype is None else dtype)
    tensor.read_into(whole)
    return whole


# ---- Types of blocks ----


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", *BLOCK_TYPES])
def test_rows_of_every_type_are_read_in_any_pieces(kind: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", WIDE, kind=lambda name: kind)
    read = gguf_file.read(path).tensors
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"):
        tensor, heads = read[name], 4 if "q_proj" in name else None
        array = random_tensors(WIDE)[name]
        code = gguf.GGMLQuantizationType[kind]
        expected = gguf.quants.dequantize(stored(array if heads is None else paired(array, heads), kind), code)
        if heads is not None:
            expected = expected.reshape(heads, -1, 2, 256).swapaxes(1, 2).reshape(-1, 256)
        for start, stop in ((0, 1), (1, 8), (5, 48), (0, len(expected)), (len(expected) - 1, len(expected))):
            rows = np.empty((stop - start, 256), np.float32)
            tensor.read_into(rows, start)
            assert rows.tobytes() == expected[start:stop].tobytes()
        assert np.concatenate([block.copy() for block in tensor.blocks(3)]).astype(np.float32).tobytes() == (
            expected[3:].tobytes()
        )
        half = values(tensor, np.float16)  # rounded once
        assert half.tobytes() == expected.astype(np.float16).tobytes()
    assert tensor.dtype == ("float32" if kind not in ("F16", "BF16") else {"F16": "float16", "BF16": "bfloat16"}[kind])


@pytest.mark.parametrize("kind", ["IQ4_NL", "TQ2_0", "I32", "F64"])
def test_other_types_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    path, code = write_gguf(tmp_path / "model.gguf", WIDE, kind=lambda name: "F16"), gguf.GGMLQuantizationType
    content = path.read_bytes()
    place = content.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16
    path.write_bytes(content[:place] + int(code[kind]).to_bytes(4, "little") + content[place + 4 :])
    with pytest.raises(CheckpointError, match=rf"`token_embd.weight` is of type {kind}; jaxgen reads `F32`.*`Q6_K`"):
        jaxgen.load(path)


# ---- Against transformers ----

SMALL = CONFIG | {
    "vocab_size": 320,
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "intermediate_size": 96,
    "rope_theta": 5000.0,
}
QWEN = {"max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None}
MODELS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    # llama.cpp tells llamas the size of a head by the rotated dimensions
    "llama": (SMALL | {"head_dim": 32}, {"q_proj": "Q8_0", "k_proj": "F16", "up_proj": "Q5_0", "down_proj": "Q5_1"}),
    "qwen2": (
        SMALL | QWEN | {"model_type": "qwen2", "tie_word_embeddings": True},
        {"q_proj": "Q4_0", "embed_tokens": "Q8_0", "o_proj": "BF16", "gate_proj": "Q4_1"},
    ),
    "qwen3": (  # where transformers takes 128 for the size of a head, whatever the file says
        SMALL | QWEN | {"model_type": "qwen3", "hidden_size": 256, "intermediate_size": 256, "head_dim": 128},
        {"q_proj": "Q4_K", "k_proj": "Q6_K", "v_proj": "Q5_K", "up_proj": "Q3_K", "down_proj": "Q2_K"},
    ),
}


def mixed(architecture: str, path: Path) -> Path:
    config, kinds = MODELS[architecture]
    vocabulary = sentencepiece() if architecture == "llama" else byte_level()
    return write_gguf(path, config, kind=lambda name: kinds.get(name.split(".")[-2], "F32"), metadata=vocabulary)


@pytest.mark.oracle
@pytest.mark.parametrize("architecture", MODELS)
def test_tensors_and_tokens_are_those_of_transformers(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    # It asks for accelerate, which it does not use for a model on one CPU.
    torch.set_num_threads(1)
    monkeypatch.setattr("transformers.modeling_utils.is_accelerate_available", lambda: True)
    path = mixed(architecture, tmp_path / "model.gguf")
    twin = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    theirs = {name: tensor.numpy() for name, tensor in twin.state_dict().items()}
    ours = gguf_file.read(path).tensors
    assert {*ours} == {*theirs} - ({"lm_head.weight"} if MODELS[architecture][0].get("tie_word_embeddings") else set())
    for name, tensor in ours.items():
        assert values(tensor, np.float32).tobytes() == theirs[name].tobytes(), name
    model = jaxgen.load(path)
    assert model.dtype == np.float32
    prompts, mask = np.array([[5, 6, 7, 8], [9, 9, 3, 4]]), np.array([[1, 1, 1, 1], [0, 0, 1, 1]])
    for options in ({}, {"num_beams": 3, "num_return_sequences": 2}):
        arguments = {"attention_mask": mask, "max_new_tokens": 12, "pad_token_id": 0, **options}
        np.testing.assert_array_equal(
            jaxgen.generate(model, prompts, **arguments), torch_generate(twin, prompts, **arguments)
        )
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    assert [getattr(model.generation_config, name) for name in ids] == [
        getattr(twin.generation_config, name) for name in ids
    ]


# ---- Metadata ----


def opened(path: Path, config: dict[str, Any] = CONFIG, **metadata: Any) -> Source:
    """The source of a file with more metadata; two underscores are a dot."""
    more = {key.replace("__", "."): value for key, value in metadata.items()}
    return open_checkpoint(write_gguf(path / "model.gguf", config, metadata=more))


def test_the_config_is_that_of_the_folder_it_was_made_of(tmp_path: Path) -> None:
    folder = open_checkpoint(write_checkpoint(tmp_path / "folder", CONFIG | {"head_dim": 8}))
    assert opened(tmp_path).abstract.config == folder.abstract.config
    assert not opened(tmp_path, tokenizer__ggml__bos_token_id=7).warnings
    assert opened(tmp_path, CONFIG | {"tie_word_embeddings": True}).abstract.config.tie_word_embeddings


def test_biases_are_those_that_the_file_holds(tmp_path: Path) -> None:
    biased = CONFIG | {"attention_bias": True, "mlp_bias": True}
    path = write_gguf(tmp_path / "model.gguf", biased)
    assert open_checkpoint(path).abstract.config.attention_bias and open_checkpoint(path).abstract.config.mlp_bias
    read, expected = gguf_file.read(path).tensors, random_tensors(biased)
    for name, array in expected.items():
        np.testing.assert_array_equal(values(read[name]), array)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"llama.rope.freq_base": None}, Default(rope_theta=10000.0, head_dim=8)),
        ({"llama.rope.scaling.type": "none"}, Default(rope_theta=10000.0, head_dim=8)),
        ({"llama.rope.scaling.factor": 4.0}, Linear(rope_theta=10000.0, head_dim=8, factor=4.0)),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 2.0,
                "llama.rope.scaling.original_context_length": 32,
                "llama.rope.scaling.yarn_beta_fast": 16.0,
                "llama.rope.scaling.yarn_ext_factor": 1.0,
            },
            Yarn(
                rope_theta=10000.0,
                head_dim=8,
                factor=2.0,
                max_position_embeddings=64,
                original_max_position_embeddings=32,
                beta_fast=16.0,
            ),
        ),
    ],
)
def test_the_rope_is_that_of_the_metadata(metadata: dict[str, Any], expected: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", metadata=metadata)
    assert open_checkpoint(path).abstract.config.rope == expected


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_factors_of_llama_3_1_are_its_rope_again(factor: float, tmp_path: Path) -> None:
    numbers = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = Llama3(rope_theta=500000.0, head_dim=64, original_max_position_embeddings=8192, **numbers)
    unscaled = Default(rope_theta=500000.0, head_dim=64).inverse_frequencies(1)
    factors = (unscaled / rope.inverse_frequencies(1)).astype(np.float32)
    config = WIDE | {"rope_theta": 500000.0}
    path = write_gguf(tmp_path / "model.gguf", config, others={"rope_freqs.weight": factors})
    assert open_checkpoint(path).abstract.config.rope == rope
    factors[20] *= 1.01
    for wrong in (factors, factors[:-1], -factors):
        write_gguf(path, config, others={"rope_freqs.weight": wrong})
        with pytest.raises(CheckpointError, match=r"`rope_freqs.weight`"):
            open_checkpoint(path)


def test_a_llama_with_a_window_is_a_mistral(tmp_path: Path) -> None:
    config = opened(tmp_path, llama__attention__sliding_window=16).abstract.config
    assert (config.model_type, config.sliding_window) == ("mistral", 16)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("expert_count", 8),
        ("attention.causal", False),
        ("attention.clamp_kqv", 8.0),
        ("attention.scale", 0.5),
        ("final_logit_softcapping", 30.0),
        ("rope.scaling.type", "longrope"),
        ("rope.scaling.yarn_attn_factor", 1.5),
        ("rope.dimension_count", 4),
        ("attention.value_length", 16),
        ("attention.head_count_kv", [2, 2]),
        ("something.new", 3),
        ("context_length", None),
        ("attention.layer_norm_rms_epsilon", None),
    ],
)
def test_what_would_change_the_computation_is_refused_by_name(key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"model.gguf: `llama.{key}`="):
        opened(tmp_path, **{f"llama.{key}": value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.expert_count", 0),
        ("llama.attention.causal", True),
        ("llama.tensor_data_layout", "Meta AI original pth"),
        ("llama.rope.scaling.finetuned", True),
        ("llama.logit_scale", 1.0),
        ("general.name", "A model"),
        ("general.tags", ["a", "b"]),
    ],
)
def test_what_changes_nothing_is_taken(key: str, value: Any, tmp_path: Path) -> None:
    assert opened(tmp_path, **{key: value}).abstract.config == opened(tmp_path).abstract.config


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"split.count": 3}, r"one of 3 parts .* `llama-gguf-split --merge"),
        ({"general.type": "adapter"}, "`general.type`='adapter'"),
        ({"general.quantization_version": 1}, "`general.quantization_version`=1"),
        (
            {"general.architecture": "gemma3"},
            r"the architecture 'gemma3', which is not supported; it may be one of \['llama', 'qwen2', 'qwen3'\]",
        ),
        ({"general.architecture": "mistral"}, "the architecture 'mistral'"),
        ({"tokenizer.ggml.eos_token_id": "2"}, "`tokenizer.ggml.eos_token_id`='2' must be an integer"),
        ({"llama.vocab_size": None}, "`llama.vocab_size`=0 must be a positive int"),
    ],
)
def test_what_is_no_model_of_these_is_refused(metadata: dict[str, Any], message: str, tmp_path: Path) -> None:
    if "general.architecture" in metadata:
        path = write_gguf(tmp_path / "model.gguf")
        name = metadata["general.architecture"].encode()
        old, new = ((len(text)).to_bytes(8, "little") + text for text in (b"llama", name))
        path.write_bytes(path.read_bytes().replace(old, new, 1))
    else:
        path = write_gguf(tmp_path / "model.gguf", metadata=metadata)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def test_settings_of_sampling_go_to_the_fields_they_came_from(tmp_path: Path) -> None:
    given = {"temp": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1, "penalty_repeat": 1.05, "mirostat": 2}
    source = opened(
        tmp_path,
        tokenizer__ggml__bos_token_id=1,
        **{f"general.sampling.{name}": value for name, value in given.items()},
    )
    config = source.abstract.generation_config
    assert (config.temperature, config.top_k, config.top_p, config.min_p) == (0.6, 20, 0.95, 0.1)
    assert (config.repetition_penalty, config.do_sample, config.bos_token_id) == (1.05, None, 1)
    assert config.mirostat == 2  # which `generate` reports


def test_tensors_that_the_model_lacks_are_named(tmp_path: Path) -> None:
    tensors = random_tensors()
    path = write_gguf(tmp_path / "model.gguf", others={"blk.0.attn_sinks.weight": np.ones(4, np.float32)})
    with pytest.raises(CheckpointError, match=r"it holds `blk.0.attn_sinks.weight`, which a llama model does not use"):
        open_checkpoint(path)
    path = write_gguf(tmp_path / "model.gguf", others={"model.norm.bias": np.ones(4, np.float32)})
    with pytest.raises(CheckpointError, match=r"it holds `model.norm.bias`"):
        open_checkpoint(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"lacks `model.layers.1.mlp.up_proj.weight`"):
        open_checkpoint(write_gguf(path, tensors=tensors))


def test_without_the_package_one_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"needs the gguf package: `pip install 'jaxgen\[gguf\]'`"):
        jaxgen.load(path)


def test_a_file_is_known_by_its_first_bytes_too(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf").rename(tmp_path / "model")
    assert open_checkpoint(path).folder == path
    (tmp_path / "link.gguf").symlink_to(path)
    assert open_checkpoint(tmp_path / "link.gguf").family is open_checkpoint(path).family

"""A key of a `config.json` counts if transformers reads it; what nobody reads changes no token and is said once."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import CONFIG, random_tensors, write_checkpoint
from oracle import torch_generate, torch_model

import jaxgen
from jaxgen import CheckpointError, lazy
from jaxgen.models import FAMILIES, llama
from jaxgen.models.config_keys import NO_EFFECT, READ_BY_TRANSFORMERS
from jaxgen.models.llama import FULL, SLIDING

CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
families = pytest.mark.parametrize("model_type", CLASSES)
PROMPT = [[5, 6, 7, 9, 11, 3]]
PLAIN = {"max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}


def config_of(model_type: str) -> dict[str, Any]:
    names = {"model_type": model_type, "architectures": [f"{CLASSES[model_type]}ForCausalLM"]}
    return {**CONFIG, **names, "head_dim": 8, **({"sliding_window": 4} if model_type == "mistral" else {})}


def write(folder: Path, model_type: str, **changes: Any) -> Path:
    """A folder whose weights are large enough for every token to depend on all of the computation."""
    config = config_of(model_type)
    tensors = {name: 3 * values for name, values in random_tensors(config).items()}
    return write_checkpoint(folder, config | changes, tensors)


def loaded(folder: Path) -> tuple[Any, list[str]]:
    """The model and what was said."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = jaxgen.load(folder)
    return model, [str(each.message) for each in caught]


# Keys in the wild, and those of features that exist in other families only.
UNREAD: dict[str, Any] = {
    "use_flash_attn": True,
    "num_labels": 3,
    "model_max_length": 2048,
    "torchscript": True,
    "is_decoder": True,
    "gradient_checkpointing": True,
    "problem_type": "regression",
    "pruned_heads": {"0": [1]},
    "rope_condense_ratio": 8,
    "partial_rotary_factor": 0.5,
    "attn_logit_softcapping": 30.0,
    "final_logit_softcapping": 30.0,
    "logits_scaling": 8.0,
    "embedding_multiplier": 12.0,
    "num_experts": 8,
    "qk_layernorm": True,
    "use_mrope": True,
    "quantization": {"bits": 4},
    "general.architecture": "llama",
    "torch_compile": "default",
}
# Read by transformers where they change no token.
OF_NO_CONSEQUENCE = {
    *("_attn_implementation_internal", "_experts_implementation", "_experts_implementation_internal", "attribute_map"),
    *("_heterogeneity_spec", "_output_attentions", "_post_init_done", "experts_implementation"),
    *("gradient_checkpointing", "num_labels", "problem_type", "quantization_config", "num_heads", "embed_dim"),
    *("mlp_layer_types", "mtp_layer_types"),  # validated only
    *("vision_aspect_ratio", "vision_feature_layer", "vision_feature_select_strategy"),  # of models that see
    "partial_rotary_factor",  # see `rope.unread_keys`
}


@pytest.mark.oracle
@families
def test_what_transformers_reads_of_a_config_is_accounted_for(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = lazy.transformers().PreTrainedConfig
    read: set[str] = set()
    plain = base.__getattribute__

    def recorded(self: Any, key: str) -> Any:
        read.add(key)
        return plain(self, key)

    monkeypatch.setattr(base, "__getattribute__", recorded)
    model = torch_model(write(tmp_path, model_type))
    for changes in ({}, {"num_beams": 2}, {"do_sample": True}, {"use_cache": False}):
        torch_generate(model, PROMPT, **PLAIN, **changes)
    monkeypatch.undo()
    on_class = {key for key in read if hasattr(type(model.config), key)}
    code = on_class - {field.name for field in dataclasses.fields(model.config)}  # methods, and what a class decides
    dialect = FAMILIES[model_type].config(config_of(model_type)).dialect
    known = {*NO_EFFECT, *READ_BY_TRANSFORMERS, *OF_NO_CONSEQUENCE, *dialect.defaults, *dialect.fixed}
    known |= {*llama._REQUIRED, *llama._ROPE, *lazy.transformers().GenerationConfig().to_dict(), "layer_types"}
    assert "rms_norm_eps" in read and "is_causal" in read
    assert sorted(key for key in read - known - code if not key.startswith("__")) == []


@pytest.mark.oracle
@families
def test_what_nobody_reads_changes_no_token_and_is_listed_in_one_warning(model_type: str, tmp_path: Path) -> None:
    config = FAMILIES[model_type].config(config_of(model_type))
    contradictions = {key: not value for key, value in config.dialect.fixed.items()}
    changes = UNREAD | contradictions | {"is_causal": True, "hidden_dropout": 0.0, "use_qkv_norm": False}
    model, said = loaded(write(tmp_path / "with", model_type, **changes))
    assert len(said) == 1 and f"in a {model_type}" in said[0]
    assert all(f"`{key}`" in said[0] for key in UNREAD | contradictions)
    assert "is_causal" not in said[0] and "hidden_dropout" not in said[0] and "use_qkv_norm" not in said[0]
    expected = torch_generate(torch_model(tmp_path / "with"), PROMPT, **PLAIN)
    np.testing.assert_array_equal(jaxgen.generate(model, PROMPT, **PLAIN), expected)
    np.testing.assert_array_equal(
        torch_generate(torch_model(write(tmp_path / "without", model_type)), PROMPT, **PLAIN), expected
    )


@families
def test_keys_that_are_bookkeeping_or_say_that_something_is_off_are_not_worth_a_word(
    model_type: str, tmp_path: Path
) -> None:
    quiet = {key: "x" for key in ("_name_or_path", "unsloth_version", "tokenizer_class", "attn_implementation")}
    off = {"use_mrope": False, "num_experts": 0, "quantization": {}, "norm_groups": None, "temperature": 0.6}
    neutral = {key: values[-1] for key, values in READ_BY_TRANSFORMERS.items()}
    known = FAMILIES[model_type].config(config_of(model_type)).dialect.defaults
    neutral = {key: value for key, value in neutral.items() if key not in known}
    assert loaded(write(tmp_path, model_type, **quiet, **off, **neutral))[1] == []


READ: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"is_causal": False}),
    ("qwen3", {"is_causal": None}),
    ("llama", {"is_encoder_decoder": True}),
    ("llama", {"sliding_window": 4}),
    ("llama", {"sliding_window": 0}),
    ("llama", {"attention_chunk_size": 2}),
    ("qwen2", {"kv_sharing_modes": ["reuse", "own"]}),
    ("qwen2", {"per_layer_config": {"0": {"num_attention_heads": 2}}}),
    ("llama", {"tie_last_hidden_states": False}),
    ("mistral", {"transformers_weights": "other.safetensors"}),
    ("mistral", {"text_config": {"vocab_size": 3}}),
    ("llama", {"decoder": {}}),
    ("llama", {"attribute_map": {"num_hidden_layers": "n_layer"}}),
    ("llama", {"layer_types": [FULL, SLIDING]}),
    ("llama", {"layer_types": [FULL]}),
    ("llama", {"layer_types": FULL}),
    ("mistral", {"layer_types": [FULL, FULL]}),
    ("qwen3", {"rope_scaling": {FULL: {"rope_type": "default"}}}),
    ("llama", {"partial_rotary_factor": 0.5, "rope_scaling": {"type": "linear", "factor": 2.0}}),
]


@pytest.mark.parametrize(("model_type", "changes"), READ, ids=str)
def test_what_transformers_reads_and_jaxgen_does_not_implement_is_refused_by_name(
    model_type: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=f"`{next(iter(changes))}`"):
        jaxgen.load(write(tmp_path, model_type, **changes))


@pytest.mark.oracle
@pytest.mark.parametrize("changes", [{"is_causal": False}, {"sliding_window": 4}, {"attention_chunk_size": 2}], ids=str)
def test_what_is_refused_would_give_other_tokens(changes: dict[str, Any], tmp_path: Path) -> None:
    plain, changed = (
        torch_generate(torch_model(write(tmp_path / str(bool(each)), "llama", **each)), PROMPT, **PLAIN)
        for each in ({}, changes)
    )
    assert (plain != changed).any()


def test_layer_types_that_say_what_a_llama_is_are_read(tmp_path: Path) -> None:
    model, said = loaded(write(tmp_path, "llama", layer_types=[FULL, FULL]))
    assert said == [] and model.config.layer_types == (FULL, FULL)


# Extra keys as published, and where they are read in other types.
ROPES: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "attn_factor": 0.8782488562869419},
        ["attn_factor"],
    ),
    ({"type": "default", "mrope_section": [2, 1, 1]}, ["mrope_section"]),
    ({"type": "default", "factor": 8.0, "partial_rotary_factor": 0.5}, ["partial_rotary_factor", "factor"]),
    ({"type": "linear", "factor": 2.0, "beta_fast": 3, "finetuned": True, "magic": 0}, ["beta_fast", "finetuned"]),
    ({"type": "dynamic", "factor": 2.0, "low_freq_factor": 1.0}, ["low_freq_factor"]),
]


@pytest.mark.oracle
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(("rope", "unread"), ROPES, ids=str)
def test_rotary_parameters_that_the_type_does_not_read_are_listed_and_change_no_token(
    rope: dict[str, Any], unread: list[str], spelling: str, tmp_path: Path
) -> None:
    model_type = "qwen3" if spelling == "rope_scaling" else "llama"
    model, said = loaded(write(tmp_path, model_type, **{spelling: rope}))
    assert len(said) == 1 and ", ".join(f"`{spelling}.{key}`" for key in unread) + ". Neither" in said[0]
    expected = torch_generate(torch_model(tmp_path), PROMPT, **PLAIN)
    np.testing.assert_array_equal(jaxgen.generate(model, PROMPT, **PLAIN), expected)


def test_a_random_model_says_so_too() -> None:
    with pytest.warns(UserWarning, match=r"config\.json has `use_flash_attn`\. Neither"):
        jaxgen.from_config(CONFIG | {"use_flash_attn": True})

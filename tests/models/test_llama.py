"""What a `config.json` may say, what is refused by name, and that what is written is read back by both libraries."""

import json
from pathlib import Path
from typing import Any

import pytest
from architectures import ARCHITECTURES
from checkpoints import CONFIG

from jaxgen import lazy
from jaxgen.models.llama import LlamaConfig

GENERATION_FIELDS = frozenset(lazy.transformers().GenerationConfig().to_dict())
REQUIRED = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
SIZES = [*REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings"]

configs = pytest.mark.parametrize(
    "raw", [pytest.param(architecture.config, id=architecture.name) for architecture in ARCHITECTURES[:33]]
)


def read(**changes: Any) -> LlamaConfig:
    return LlamaConfig.from_json({**CONFIG, **changes}, GENERATION_FIELDS)


def test_what_a_config_leaves_out_is_what_transformers_takes() -> None:
    raw = {key: CONFIG[key] for key in REQUIRED}
    ours, theirs = LlamaConfig.from_json(raw), lazy.transformers().LlamaConfig(**raw)
    written = {key: value for key, value in ours.to_json().items() if key not in ("architectures", "rope_theta")}
    assert written == {key: getattr(theirs, key) for key in written}


@pytest.mark.parametrize("key", ["num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "rope_theta"])
def test_null_means_the_default(key: str) -> None:
    left_out = {name: value for name, value in CONFIG.items() if name != key}
    assert read(**{key: None}) == LlamaConfig.from_json(left_out)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sliding_window", 4096),
        ("layer_types", ["full_attention"]),
        ("architectures", ["MistralForCausalLM"]),
        ("architectures", ["LlamaForSequenceClassification"]),
        ("hidden_act", "mish"),
        ("hidden_act", ["silu"]),
        ("hidden_size", 30),
        ("num_key_value_heads", 3),
        ("head_dim", 7),
        ("rms_norm_eps", "1e-5"),
        ("attention_bias", "false"),
        ("mlp_bias", [1]),
        ("tie_word_embeddings", "false"),
        ("initializer_range", "small"),
        *[(key, value) for key in SIZES for value in (-1, "4", 4.0, True)],
        ("num_attention_heads", 0),
    ],
)
def test_what_would_change_the_computation_and_is_not_handled_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{key}`") as refusal:
        read(**{key: value})
    assert str(value) in str(refusal.value)


@pytest.mark.parametrize("key", REQUIRED)
def test_a_config_without_a_size_is_refused_by_its_name(key: str) -> None:
    with pytest.raises(ValueError, match=rf"lacks \['{key}'\]"):
        LlamaConfig.from_json({name: value for name, value in CONFIG.items() if name != key})


@pytest.mark.parametrize(
    ("quantization", "method"),
    [({"quant_method": "gptq", "bits": 4}, "gptq"), ({"load_in_4bit": True}, "quantised"), ("awq", "quantised")],
)
def test_a_quantised_checkpoint_is_refused_with_the_way_out(quantization: Any, method: str) -> None:
    with pytest.raises(ValueError, match=f"{method}.*unquantised original"):
        read(quantization_config=quantization)


@pytest.mark.parametrize(
    "harmless",
    [
        {"sliding_window": None, "rope_interleaved": False, "pruned_heads": {}, "auto_map": None, "num_experts": 0},
        {"architectures": None},
        {"quantization_config": None},
        {"_name_or_path": "x/y", "transformers_version": "4.31.0", "torch_dtype": "float16", "dtype": "float16"},
        {"use_cache": True, "attention_dropout": 0.1, "pretraining_tp": 2, "tokenizer_class": "LlamaTokenizer"},
        {"max_length": 4096, "temperature": 0.6, "top_p": 0.9, "do_sample": True, "output_attentions": True},
        {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": -1},
    ],
)
def test_bookkeeping_and_what_is_switched_off_change_nothing(harmless: dict[str, Any]) -> None:
    assert read(**harmless) == read()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_key_value_heads", 4),
        ("head_dim", 16),
        ("hidden_act", "gelu"),
        ("rms_norm_eps", 1e-3),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("tie_word_embeddings", True),
        ("max_position_embeddings", 128),
        ("rope_theta", 5e5),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
    ],
)
def test_what_changes_the_computation_changes_the_compile_key(key: str, value: Any) -> None:
    changed = read(**{key: value})
    assert changed != read()
    assert hash(changed) == hash(read(**{key: value}))


@configs
def test_what_is_written_is_read_back_equal(raw: dict[str, Any]) -> None:
    config = LlamaConfig.from_json(raw)
    assert LlamaConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def by_transformers(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    (folder / "config.json").write_text(json.dumps(content))
    config = lazy.transformers().AutoConfig.from_pretrained(folder)
    config.standardize_rope_params()  # as its models do
    return config.to_dict()


@configs
@pytest.mark.parametrize(
    "dropped", [(), ("rope_parameters",), ("rope_theta", "rope_scaling")], ids=["both", "old", "new"]
)
def test_transformers_reads_what_is_written_as_it_reads_the_original(
    raw: dict[str, Any], dropped: tuple[str, ...], tmp_path: Path
) -> None:
    written = {key: value for key, value in LlamaConfig.from_json(raw).to_json().items() if key not in dropped}
    theirs, ours = by_transformers(tmp_path, raw), by_transformers(tmp_path, written)
    rope = {key: value for key, value in theirs["rope_parameters"].items() if key != "type"}
    if rope["rope_type"] == "yarn":  # what transformers leaves to its defaults is written out
        rope = {"beta_fast": 32, "beta_slow": 1, "truncate": True} | rope
    assert ours["rope_parameters"] == rope
    same = [key for key in written if key not in ("rope_parameters", "rope_scaling", "rope_theta")]
    assert [ours[key] for key in same] == [theirs[key] for key in same]

"""The keys of a `config.json` that affect the computation: one policy for all families.

A key can change the computation only if transformers reads it, in the classes of the family or in the code that all
models share. So there are three kinds of keys:

- keys that the family implements;
- keys in `READ_BY_TRANSFORMERS`, which the shared code reads and jaxgen does not implement. Values that would change
  the computation are refused;
- keys that are not read. The folder loads as in transformers, and one warning lists them.

A test records which keys the installed transformers reads, and fails when a new version reads another one.
"""

from collections.abc import Collection, Mapping
from typing import Any

# Read elsewhere, or only informative: left out of the warning.
NO_EFFECT = frozenset(
    "model_type architectures dtype torch_dtype transformers_version _name_or_path name_or_path _commit_hash use_cache "
    "attention_dropout bos_token_id eos_token_id pad_token_id return_dict id2label label2id chunk_size_feed_forward "
    "tokenizer_class _attn_implementation_autoset _attn_implementation attn_implementation is_llama_config "
    "transformers.js_config unsloth_version unsloth_fixed pretraining_tp max_sequence_length task_specific_params "
    "auto_map".split()
)
# Keys that `PreTrainedConfig`, masks, caches and loading read in transformers 5.23, with the values that have no
# effect.
READ_BY_TRANSFORMERS: dict[str, tuple[object, ...]] = {
    "is_causal": (True,),
    "is_encoder_decoder": (None, False),
    "sliding_window": (None,),
    "attention_chunk_size": (None,),
    "kv_sharing_modes": (None, []),
    "per_layer_config": (None, {}),
    "tie_last_hidden_states": (None, True),
    "transformers_weights": (None,),
    "fusion_config": (None, {}),
    "text_config": (None,),
    "decoder": (None,),
    "generator": (None,),
    "text_encoder": (None,),
    "attribute_map": (None, {}),
    "_rope_type_labels": (None, []),
}


def unread_keys(raw: Mapping[str, object], implemented: Collection[str]) -> list[str]:
    """The keys of a config.json that are set, but that neither transformers nor jaxgen reads.

    Args:
        raw: the parsed file.
        implemented: the keys that the family implements.

    Raises:
        ValueError: naming a key that transformers reads and jaxgen does not implement.
    """
    others = {key: value for key, value in raw.items() if key not in implemented and key not in NO_EFFECT}
    for key, value in others.items():
        if key in READ_BY_TRANSFORMERS and value not in READ_BY_TRANSFORMERS[key]:
            raise ValueError(
                f"config.json has `{key}`={value!r:.200}, which changes the computation in transformers. jaxgen does "
                "not implement it: run this model with transformers."
            )
    # In a config, a false or empty value means that a feature is off.
    return [key for key, value in others.items() if value and key not in READ_BY_TRANSFORMERS]


def check_types(settings: Mapping[str, Any], types: Mapping[str, type], positive: Collection[str]) -> None:
    """Raises a ValueError for a value of another type, or a size below 1. None and unknown keys pass.

    Args:
        settings: of a config.json.
        types: by key.
        positive: the keys of sizes.
    """
    for key, value in settings.items():
        kind = types.get(key)
        if value is None or kind is None:
            continue
        # Not by isinstance: JSON tells 1 from true. A float such as 1.0 may be written as 1.
        if type(value) not in (kind, *([int] if kind is float else [])):
            raise ValueError(f"`{key}`={value!r} in config.json must be of type {kind.__name__}.")
        if key in positive and value < 1:
            raise ValueError(f"`{key}`={value!r} in config.json must be positive.")


def refuse_unhandled(values: Mapping[str, object], architectures: Collection[str]) -> None:
    """Raises a ValueError for a quantised checkpoint and for another architecture.

    Args:
        values: of a config.json.
        architectures: names of the classes that the family implements; the first is the usual one.
    """
    if quantization := values.get("quantization_config"):
        method = quantization.get("quant_method", "unnamed") if isinstance(quantization, dict) else quantization
        raise ValueError(f"the checkpoint is quantised (`quant_method`={method!r}). Use the unquantised original.")
    usual, *_ = architectures
    if values.get("architectures") not in (None, *([name] for name in architectures)):
        raise ValueError(
            f"`architectures`={values['architectures']!r} in config.json is not ['{usual}']. Save the model with its "
            "language modelling head."
        )

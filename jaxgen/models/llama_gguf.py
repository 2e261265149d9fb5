"""How a GGUF file stores a Llama: config.json from its metadata, and the row order of queries and keys."""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import numpy as np

from jaxgen.models.family import Gguf
from jaxgen.models.llama import Dialect, LlamaConfig
from jaxgen.models.mistral import MISTRAL
from jaxgen.models.rope import Default, Llama3

_FACTORS = "rope_freqs.weight"
# Metadata keys, without the architecture's name -> keys of config.json.
_SIZES = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_YARN = {"beta_fast": "rope.scaling.yarn_beta_fast", "beta_slow": "rope.scaling.yarn_beta_slow"}
# Keys that never have an effect, and keys with only one supported value. All other keys must be off: zero, false or
# empty.
_NO_EFFECT = {"tensor_data_layout", "rope.scaling.finetuned", "rope.scaling.original_context_length"}
_ONLY = {
    "attention.causal": True,
    "logit_scale": 1.0,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
    "rope.scale_linear": 1.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
}


def gguf(dialect: Dialect, paired: bool) -> Gguf:
    """The GGUF rules of a dialect. `paired`: whether llama.cpp rotates neighbouring rows in this architecture."""
    return Gguf(
        config=partial(config_json, dialect=dialect),
        buffers=(_FACTORS,),
        paired=_heads if paired else lambda config, names: {},
    )


def config_json(
    metadata: Mapping[str, Any], names: Collection[str], buffers: Mapping[str, np.ndarray], dialect: Dialect
) -> dict[str, Any]:
    """See `Gguf.config`."""
    left, architecture = dict(metadata), dialect.model_type
    raw: dict[str, Any] = {name: left.pop(key, None) for key, name in _SIZES.items()}
    raw["num_key_value_heads"] = raw["num_key_value_heads"] or raw["num_attention_heads"]
    for key, name in _SIZES.items():
        _check_number(f"{architecture}.{key}", raw[name], float if name == "rms_norm_eps" else int)
    head_dim = left.pop("attention.key_length", None) or raw["hidden_size"] // raw["num_attention_heads"]
    _check_number(f"{architecture}.attention.key_length", head_dim, int)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (value := left.pop(key, head_dim)) != head_dim:
            raise ValueError(
                f"`{architecture}.{key}`={value!r:.100} differs from the head dimension of keys, {head_dim!r:.100}; "
                "jaxgen does not implement that."
            )
    if architecture == "llama" and (window := left.pop("attention.sliding_window", 0)):
        dialect, raw["sliding_window"] = MISTRAL, window
    raw["head_dim"] = head_dim
    raw["rope_parameters"] = _rope(architecture, left, buffers.get(_FACTORS), head_dim)
    raw["tie_word_embeddings"] = "output.weight" not in names
    if "attention_bias" in dialect.defaults:
        raw["attention_bias"] = "blk.0.attn_q.bias" in names
    if "mlp_bias" in dialect.defaults:
        raw["mlp_bias"] = "blk.0.ffn_up.bias" in names
    for key in left.keys() - _NO_EFFECT:
        if left[key] != _ONLY[key] if key in _ONLY else left[key]:
            raise ValueError(
                f"`{architecture}.{key}`={left[key]!r:.100} may change the computation, and jaxgen does not implement "
                "it. Run this model with llama.cpp."
            )
    return LlamaConfig.from_json(raw, dialect=dialect).to_json()


def _rope(architecture: str, left: dict[str, Any], factors: np.ndarray | None, head_dim: int) -> dict[str, Any]:
    """The `rope_parameters`; removes their keys from the metadata in `left`."""
    theta, factor = left.pop("rope.freq_base", 10000.0), left.pop("rope.scaling.factor", 0.0)
    kind = left.pop("rope.scaling.type", "linear" if factor else "none")  # the defaults of llama.cpp
    parameters: dict[str, Any] = {"rope_type": kind, "rope_theta": theta, "factor": factor}
    if kind == "none" or (kind == "linear" and factor in (0, 1)):
        parameters = {"rope_type": "default", "rope_theta": theta}
    elif kind == "yarn":
        given = {name: left.pop(key) for name, key in _YARN.items() if key in left}
        if original := left.pop("rope.scaling.original_context_length", None):
            given["original_max_position_embeddings"] = original
        parameters |= given
    elif kind != "linear":
        raise ValueError(
            f"`{architecture}.rope.scaling.type`={kind!r:.100} is not supported; it may be 'none', 'linear' or 'yarn'."
        )
    if factors is None:
        return parameters
    # llama.cpp's converter writes the factors of Llama 3.1, but not the numbers that they were computed from.
    numbers: dict[str, Any] = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    numbers |= {"factor": float(factors.max()), "original_max_position_embeddings": 8192}
    _check_number(f"{architecture}.rope.freq_base", theta, float)
    if parameters["rope_type"] != "default" or factors.shape != (head_dim // 2,) or not factors.min() > 0:
        raise ValueError(
            f"`{_FACTORS}` of shape {factors.shape} does not fit a head dimension of {head_dim} and {kind!r} scaling."
        )
    unscaled = Default(rope_theta=theta, head_dim=head_dim).inverse_frequencies(1)
    scaled = Llama3(rope_theta=theta, head_dim=head_dim, **numbers).inverse_frequencies(1)
    if not np.allclose(unscaled / factors, scaled, rtol=1e-4, atol=0):
        raise ValueError(
            f"`{_FACTORS}` does not hold the factors of rope_type llama3 (low 1, high 4, original length 8192), the "
            "only ones that jaxgen reads. Convert the original model instead."
        )
    return {"rope_type": "llama3", "rope_theta": theta, **numbers}


def _check_number(key: str, value: object, kind: type[int] | type[float]) -> None:
    if type(value) is not kind or not 0 < value < 1 << 31:
        raise ValueError(f"`{key}`={value!r:.100} must be a positive {kind.__name__}, below 2**31.")


def _heads(config: LlamaConfig, names: Collection[str]) -> dict[str, int]:
    heads = {".q_proj.": config.num_attention_heads, ".k_proj.": config.num_key_value_heads}
    return {name: heads[part] for name in names for part in heads if part in name}

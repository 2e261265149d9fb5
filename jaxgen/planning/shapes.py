"""The `config.json` of known models, for `jaxgen plan` and the benchmarks."""

from typing import Any

_Config = dict[str, Any]

_COMMON = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def _llama3(
    hidden_size: int, intermediate_size: int, num_hidden_layers: int, num_attention_heads: int, factor: float = 8.0
) -> _Config:
    return _COMMON | {
        "vocab_size": 128256,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "dtype": "bfloat16",
    }


SHAPES: dict[str, _Config] = {
    "2-layer": _COMMON
    | {
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    },
    "135m": _COMMON
    | {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
    "1b": _llama3(2048, 8192, 16, 32, factor=32.0) | {"tie_word_embeddings": True},  # Llama 3.2
    "8b": _llama3(4096, 14336, 32, 32),  # Llama 3.1, as the next two
    "70b": _llama3(8192, 28672, 80, 64),
    "405b": _llama3(16384, 53248, 126, 128),
}

"""Mistral: a Llama with a sliding window. Same as transformers 5.24 `MistralConfig`."""

from jaxgen.models.llama import COMMON_DEFAULTS, Dialect

MISTRAL = Dialect(
    model_type="mistral",
    architecture="MistralForCausalLM",
    defaults={
        **COMMON_DEFAULTS,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    fixed={"attention_bias": False, "mlp_bias": False, "qk_norm": False},
)

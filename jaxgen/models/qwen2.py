"""Qwen2 and 2.5: a Llama with biases on queries, keys and values. Same as transformers 5.24 `Qwen2Config`."""

from jaxgen.models.llama import COMMON_DEFAULTS, Dialect

QWEN_DEFAULTS = {
    **COMMON_DEFAULTS,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
QWEN2 = Dialect(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    defaults=QWEN_DEFAULTS,
    fixed={"attention_bias": True, "o_proj_bias": False, "mlp_bias": False, "qk_norm": False},
)

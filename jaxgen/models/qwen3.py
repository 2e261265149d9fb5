"""Qwen3: a Llama that normalises queries and keys before rotating them. Same as transformers 5.24 `Qwen3Config`."""

from jaxgen.models.llama import Dialect
from jaxgen.models.qwen2 import QWEN_DEFAULTS

QWEN3 = Dialect(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    defaults={**QWEN_DEFAULTS, "head_dim": 128, "attention_bias": False},
    fixed={"mlp_bias": False, "qk_norm": True},
)

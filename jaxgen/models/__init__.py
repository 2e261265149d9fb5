"""The registry of model families: `model_type` of a config.json -> how to build and load that model.

A family reads the same keys of a config.json as transformers does; see `config_keys`.
"""

from jaxgen.models.family import Family
from jaxgen.models.llama import LLAMA, Llama
from jaxgen.models.llama_family import like_llama
from jaxgen.models.llama_gguf import gguf
from jaxgen.models.mistral import MISTRAL
from jaxgen.models.qwen2 import QWEN2
from jaxgen.models.qwen3 import QWEN3

# The return type of `load`: the class of the models of all families.
LoadedModel = Llama

FAMILIES: dict[str, Family] = {
    "llama": like_llama(LLAMA, gguf(LLAMA, paired=True)),
    "mistral": like_llama(MISTRAL),
    "qwen2": like_llama(QWEN2, gguf(QWEN2, paired=False)),
    "qwen3": like_llama(QWEN3, gguf(QWEN3, paired=False)),
}

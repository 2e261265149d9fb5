"""The registry of model families: `model_type` of a config.json -> how to build and load that model.

A family reads the same keys of a config.json as transformers does; see `config_keys`.
"""

from jaxgen.models.encoder_decoder.bart import BART, Bart
from jaxgen.models.encoder_decoder.bart_family import like_bart
from jaxgen.models.encoder_decoder.m2m_100 import M2M_100
from jaxgen.models.encoder_decoder.marian import MARIAN
from jaxgen.models.encoder_decoder.mbart import MBART
from jaxgen.models.encoder_decoder.pegasus import PEGASUS
from jaxgen.models.encoder_decoder.t5 import MT5, T5, UMT5, T5Model
from jaxgen.models.encoder_decoder.t5_family import like_t5
from jaxgen.models.family import Family
from jaxgen.models.llama import LLAMA, Llama
from jaxgen.models.llama_family import like_llama
from jaxgen.models.llama_gguf import gguf
from jaxgen.models.mistral import MISTRAL
from jaxgen.models.qwen2 import QWEN2
from jaxgen.models.qwen3 import QWEN3

# The return type of `load`: the classes of the models of all families.
LoadedModel = Llama | T5Model | Bart

FAMILIES: dict[str, Family] = {
    "llama": like_llama(LLAMA, gguf(LLAMA, paired=True)),
    "mistral": like_llama(MISTRAL),
    "qwen2": like_llama(QWEN2, gguf(QWEN2, paired=False)),
    "qwen3": like_llama(QWEN3, gguf(QWEN3, paired=False)),
    "t5": like_t5(T5),
    "mt5": like_t5(MT5),
    "umt5": like_t5(UMT5),
    "bart": like_bart(BART),
    "mbart": like_bart(MBART),
    "pegasus": like_bart(PEGASUS),
    "marian": like_bart(MARIAN),
    "m2m_100": like_bart(M2M_100),
}

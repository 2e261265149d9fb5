"""Hugging Face `generate()` for JAX: the same arguments, the same tokens, the whole decode one compiled program."""

from jaxgen.base import Model, Prompt, Strategy
from jaxgen.checkpoint import BUNDLED_MODEL, from_config, load, save
from jaxgen.decoding import compile_counts, decode
from jaxgen.generation import generate
from jaxgen.safetensors_file import CheckpointError
from jaxgen.sampling import Greedy
from jaxgen.stopping_criteria import EosToken, MaxLength
from jaxgen.version import __version__

__all__ = [
    "__version__",
    "BUNDLED_MODEL",
    "CheckpointError",
    "EosToken",
    "Greedy",
    "MaxLength",
    "Model",
    "Prompt",
    "Strategy",
    "compile_counts",
    "decode",
    "from_config",
    "generate",
    "load",
    "save",
]

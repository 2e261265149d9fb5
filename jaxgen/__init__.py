"""Hugging Face `generate()` for JAX: the same arguments, the same tokens, the whole decode one compiled program."""

from jaxgen.base import LogitsProcessor, Model, Prompt, Strategy
from jaxgen.beam_search import BeamSearch
from jaxgen.checkpoint import BUNDLED_MODEL, from_config, load, save
from jaxgen.contrastive_search import ContrastiveSearch
from jaxgen.decoding import compile_counts, decode
from jaxgen.generation import Call, generate, prepare, stream
from jaxgen.group_beam_search import GroupBeamSearch
from jaxgen.outputs import compute_transition_scores
from jaxgen.safetensors_file import CheckpointError
from jaxgen.sampling import Sample
from jaxgen.stopping_criteria import EosToken, MaxLength
from jaxgen.version import __version__

__all__ = [
    "__version__",
    "BUNDLED_MODEL",
    "BeamSearch",
    "Call",
    "CheckpointError",
    "ContrastiveSearch",
    "EosToken",
    "GroupBeamSearch",
    "LogitsProcessor",
    "MaxLength",
    "Model",
    "Prompt",
    "Sample",
    "Strategy",
    "compile_counts",
    "compute_transition_scores",
    "decode",
    "from_config",
    "generate",
    "load",
    "prepare",
    "save",
    "stream",
]

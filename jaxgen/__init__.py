"""Hugging Face `generate()` for JAX: the same arguments, the same tokens, the whole decode one compiled program."""

import importlib
from typing import TYPE_CHECKING, Any

from jaxgen.version import __version__

if TYPE_CHECKING:
    from jaxgen.base import LogitsProcessor, Model, Prompt, Strategy
    from jaxgen.beam_search import BeamSearch
    from jaxgen.checkpoint import BUNDLED_MODEL, from_config, load, save
    from jaxgen.contrastive_search import ContrastiveSearch
    from jaxgen.decoding import compile_counts, decode
    from jaxgen.folder import CheckpointError
    from jaxgen.generation import Call, generate, prepare, stream
    from jaxgen.group_beam_search import GroupBeamSearch
    from jaxgen.outputs import compute_transition_scores
    from jaxgen.past_key_values import PastKeyValues
    from jaxgen.sampling import Sample
    from jaxgen.stopping_criteria import EosToken, MaxLength
    from jaxgen.text_stream import stream_text

# Where the public names live. They are imported when they are first asked for, so that `jaxgen --help` answers at once.
_HOMES = {
    "BUNDLED_MODEL": "checkpoint",
    "BeamSearch": "beam_search",
    "Call": "generation",
    "CheckpointError": "folder",
    "ContrastiveSearch": "contrastive_search",
    "EosToken": "stopping_criteria",
    "GroupBeamSearch": "group_beam_search",
    "LogitsProcessor": "base",
    "MaxLength": "stopping_criteria",
    "Model": "base",
    "PastKeyValues": "past_key_values",
    "Prompt": "base",
    "Sample": "sampling",
    "Strategy": "base",
    "compile_counts": "decoding",
    "compute_transition_scores": "outputs",
    "decode": "decoding",
    "from_config": "checkpoint",
    "generate": "generation",
    "load": "checkpoint",
    "prepare": "generation",
    "save": "checkpoint",
    "stream": "generation",
    "stream_text": "text_stream",
}

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
    "PastKeyValues",
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
    "stream_text",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxgen' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"jaxgen.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return __all__
